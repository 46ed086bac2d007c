// The definition of every layer, as plain as it can be said: templates on the scalar. In double
// they are checked by finite differences; in float both engines, train_gpt.cpp and train_gpt.cu,
// are compared with them. Nothing here is fast. Rows n are tokens; backward adds where it says +=.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace cake {

namespace plain {

// y = x W^T + b:  y[n,o] = b[o] + sum_i x[n,i] W[o,i]
template <class T>
void linear_forward(int N, int in, int out, const T* x, const T* weight, const T* bias, T* y) {
  for (int n = 0; n < N; n++) {
    for (int o = 0; o < out; o++) {
      T sum = bias ? bias[o] : T(0);
      for (int i = 0; i < in; i++) sum += x[n * in + i] * weight[o * in + i];
      y[n * out + o] = sum;
    }
  }
}
// dx[n,i] = sum_o dy[n,o] W[o,i];  dW[o,i] += sum_n dy[n,o] x[n,i];  db[o] += sum_n dy[n,o]
template <class T>
void linear_backward(int N, int in, int out, const T* x, const T* weight, const T* dy, T* dx,
                     T* dweight, T* dbias) {
  for (int n = 0; n < N; n++) {
    for (int i = 0; i < in; i++) dx[n * in + i] = 0;
    for (int o = 0; o < out; o++) {
      const T d = dy[n * out + o];
      if (dbias) dbias[o] += d;
      for (int i = 0; i < in; i++) {
        dx[n * in + i] += d * weight[o * in + i];
        dweight[o * in + i] += d * x[n * in + i];
      }
    }
  }
}

// LayerNorm: y = (x - mean) rstd w + b. RMSNorm (bias null): mean = 0, no b.
template <class T>
void norm_forward(int N, int C, const T* x, const T* weight, const T* bias, T eps, T* y) {
  for (int n = 0; n < N; n++) {
    const T* row = x + n * C;
    T mean = 0, square = 0;
    for (int c = 0; bias && c < C; c++) mean += row[c] / C;
    for (int c = 0; c < C; c++) square += (row[c] - mean) * (row[c] - mean) / C;
    const T rstd = 1 / std::sqrt(square + eps);
    for (int c = 0; c < C; c++)
      y[n * C + c] = (row[c] - mean) * rstd * weight[c] + (bias ? bias[c] : T(0));
  }
}
// With h = (x - mean) rstd and g = dy w:  dx += rstd (g - [mean of g] - h mean of g h), the bracket
// for LayerNorm alone;  dw += dy h;  db += dy
template <class T>
void norm_backward(int N, int C, const T* dy, const T* x, const T* weight, bool has_bias, T eps,
                   T* dx, T* dweight, T* dbias) {
  for (int n = 0; n < N; n++) {
    const T *row = x + n * C, *d = dy + n * C;
    T mean = 0, square = 0, g_mean = 0, gh_mean = 0;
    for (int c = 0; has_bias && c < C; c++) mean += row[c] / C;
    for (int c = 0; c < C; c++) square += (row[c] - mean) * (row[c] - mean) / C;
    const T rstd = 1 / std::sqrt(square + eps);
    for (int c = 0; c < C; c++) {
      if (has_bias) g_mean += d[c] * weight[c] / C;
      gh_mean += d[c] * weight[c] * (row[c] - mean) * rstd / C;
    }
    for (int c = 0; c < C; c++) {
      const T h = (row[c] - mean) * rstd;
      dx[n * C + c] += rstd * (d[c] * weight[c] - g_mean - h * gh_mean);
      dweight[c] += d[c] * h;
      if (has_bias) dbias[c] += d[c];
    }
  }
}

// GELU, tanh form: .5 x (1 + tanh u) = x s(2u), u = sqrt(2/pi) (x + .044715 x^3), s the sigmoid
template <class T>
T gelu(T x) {
  const T u = T(.7978845608028654) * (x + T(.044715) * x * x * x);
  return x / (1 + std::exp(-2 * u));
}
template <class T>
T gelu_derivative(T x) {
  const T u = T(.7978845608028654) * (x + T(.044715) * x * x * x);
  const T du = T(.7978845608028654) * (1 + T(3 * .044715) * x * x);
  const T s = 1 / (1 + std::exp(-2 * u));
  return s + x * s * (1 - s) * 2 * du;
}
// SwiGLU: y = silu(gate) up, silu(x) = x s(x)
template <class T>
T swiglu(T gate, T up) {
  return gate / (1 + std::exp(-gate)) * up;
}
template <class T>
void swiglu_derivative(T gate, T up, T dy, T& dgate, T& dup) {
  const T s = 1 / (1 + std::exp(-gate));
  dup = dy * gate * s;
  dgate = dy * up * (s + gate * s * (1 - s));
}

// RoPE rotates the pair (x[i], x[i + HS/2]) by position x frequency[i]; backward by the opposite.
template <class T>
void rope(int HS, T* x, int position, const double* frequency, T sign) {
  for (int i = 0; i < HS / 2; i++) {
    const T c = T(std::cos(position * frequency[i])),
            s = sign * T(std::sin(position * frequency[i]));
    const T a = x[i], b = x[i + HS / 2];
    x[i] = a * c - b * s;
    x[i + HS / 2] = b * c + a * s;
  }
}

// Causal attention of one head within one document of T positions; q, k, v, out (T, HS):
// out[t] = sum_{s<=t} p[t,s] v[s],  p[t,.] = softmax over s <= t of q[t] k[s] / sqrt(HS)
template <class T>
void attention_forward(int length, int HS, const T* q, const T* k, const T* v, T* out, T* p) {
  for (int t = 0; t < length; t++) {
    T highest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int s = 0; s <= t; s++) {
      T score = 0;
      for (int d = 0; d < HS; d++) score += q[t * HS + d] * k[s * HS + d];
      p[t * length + s] = score / std::sqrt(T(HS));
      highest = std::max(highest, p[t * length + s]);
    }
    for (int s = 0; s <= t; s++) sum += p[t * length + s] = std::exp(p[t * length + s] - highest);
    for (int d = 0; d < HS; d++) out[t * HS + d] = 0;
    for (int s = 0; s <= t; s++) {
      p[t * length + s] /= sum;
      for (int d = 0; d < HS; d++) out[t * HS + d] += p[t * length + s] * v[s * HS + d];
    }
  }
}
// dp = dout v;  ds = p (dp - sum_s p dp) / sqrt(HS);  dq += ds k, dk += ds q, dv += p dout
template <class T>
void attention_backward(int length, int HS, const T* q, const T* k, const T* v, const T* p,
                        const T* dout, T* dq, T* dk, T* dv) {
  for (int t = 0; t < length; t++) {
    T mean = 0;
    std::vector<T> dp(size_t(length), T(0));
    for (int s = 0; s <= t; s++) {
      for (int d = 0; d < HS; d++) dp[size_t(s)] += dout[t * HS + d] * v[s * HS + d];
      mean += p[t * length + s] * dp[size_t(s)];
    }
    for (int s = 0; s <= t; s++) {
      const T ds = p[t * length + s] * (dp[size_t(s)] - mean) / std::sqrt(T(HS));
      for (int d = 0; d < HS; d++) {
        dq[t * HS + d] += ds * k[s * HS + d];
        dk[s * HS + d] += ds * q[t * HS + d];
        dv[s * HS + d] += p[t * length + s] * dout[t * HS + d];
      }
    }
  }
}

// log p(target) and entropy of softmax(logits / temperature) over V
template <class T>
void classifier_forward(int V, const T* logits, int target, T temperature, T& logp, T& entropy) {
  T highest = logits[0], sum = 0, weighted = 0;
  for (int j = 1; j < V; j++) highest = std::max(highest, logits[j]);
  for (int j = 0; j < V; j++) {
    const T e = std::exp((logits[j] - highest) / temperature);
    sum += e;
    weighted += e * (logits[j] - highest) / temperature;
  }
  logp = (logits[target] - highest) / temperature - std::log(sum);
  entropy = std::log(sum) - weighted / sum;
}
// dlogits[j] = (dlogp (1[j = target] - p_j) - dentropy p_j (log p_j + H)) / temperature
template <class T>
void classifier_backward(int V, const T* logits, int target, T temperature, T dlogp, T dentropy,
                         T* dlogits) {
  T logp, entropy;
  for (int j = 0; j < V; j++) {
    classifier_forward(V, logits, j, temperature, logp, entropy);
    const T p = std::exp(logp);
    dlogits[j] = (dlogp * (T(j == target) - p) - dentropy * p * (logp + entropy)) / temperature;
  }
}

}  // namespace plain

}  // namespace cake
