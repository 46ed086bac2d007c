// A whole GPT in plain loops, forward and backward, and the definition of each layer in it: the
// page to read before either engine. Nothing here is fast. All is a template on the scalar: in
// double, finite differences check it; both engines, train_gpt.cpp and train_gpt.cu, are compared
// with it.
//
// The model (N tokens, C channels, NH heads of HS, F, V, ...: the letters of cake/gpt.h), for each
// token n at a position of its document:
//
//     x = wte[token] (+ wpe[position], gpt2)                  embedding; x is the residual stream
//     in each of L blocks:
//       q, k, v = qkv(norm1(x))                               a linear layer
//       q, k = rope(norm(q)), rope(norm(k))                   norm: qwen3; rope: llama and qwen3
//       x = x + o(attention(q, k, v))                         the only place where tokens meet
//       x = x + down(act(up(norm2(x))))                       act: GELU in gpt2, else SwiGLU
//     logp = log softmax(head(final_norm(x)) / temperature)[target]
//     with a scalar head instead: value = head(final_norm(x))
//
// dx is the gradient dL/dx. Each backward function takes the gradient of its layer's output,
// returns the gradient of its input, and adds to the gradients of the layer's weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cake/gpt.h"

namespace cake {

namespace plain {

template <class T>
class Gpt {
 public:
  using Array = std::vector<T>;  // row-major; its shape stands where it is made

  const Config c;
  ParamTable table = make_table(c);
  // (table.size) each: every tensor of the table begins at its offset
  Array weights = Array(table.size), gradients = weights;
  Array logp, entropy, value;  // (N) of the last forward; 0 where there is no target

  explicit Gpt(const Config& config) : c(config) {
    table.head.out = c.head == Head::lm ? c.V : 1;  // without the vocabulary's padding
  }

  void forward(const Batch& batch) {  // what the batch points to is read again by backward
    begin(batch);
    Array x = embedding_forward();  // (N, C)
    for (int l = 0; l < c.L; l++) {
      const Block& b = table.blocks[l];
      Activations& a = blocks_[l];
      a.x = x;                                        // (N, C)
      a.norm1 = norm_forward(b.norm1, a.x);           // (N, C)
      a.qkv = linear_forward(b.qkv, a.norm1);         // (N, (NH + 2 NKV) HS)
      a.rotated = rotate_forward(b, a.qkv);           // (N, (NH + 2 NKV) HS)
      a.att = attention_forward(a.rotated);           // (N, NH HS)
      a.mid = sum(a.x, linear_forward(b.o, a.att));   // (N, C)
      a.norm2 = norm_forward(b.norm2, a.mid);         // (N, C)
      a.up = linear_forward(b.up, a.norm2);           // (N, F); SwiGLU: (N, 2F)
      a.act = activation_forward(a.up);               // (N, F)
      x = sum(a.mid, linear_forward(b.down, a.act));  // (N, C)
    }
    last_ = x;                                            // (N, C)
    final_norm_ = norm_forward(table.final_norm, last_);  // (N, C)
    head_forward(linear_forward(table.head, final_norm_));
  }

  // From dL/dlogp, dL/dvalue, dL/dentropy: (N) each, or empty for zeros. Forward's lines, from the
  // last to the first. dx is the gradient of the residual stream: what a block adds to the stream
  // sends its gradient back beside the one that passes through.
  void backward(const Array& dlogp, const Array& dvalue = {}, const Array& dentropy = {}) {
    const Array dhead = head_backward(dlogp, dvalue, dentropy);            // (N, V) or (N, 1)
    const Array dfinal = linear_backward(table.head, final_norm_, dhead);  // (N, C)
    Array dx(last_.size());                                                // (N, C)
    norm_backward(table.final_norm, last_, dfinal, dx);
    for (int l = c.L - 1; l >= 0; l--) {
      const Block& b = table.blocks[l];
      const Activations& a = blocks_[l];
      const Array dact = linear_backward(b.down, a.act, dx);       // (N, F)
      const Array dup = activation_backward(a.up, dact);           // (N, F); SwiGLU: (N, 2F)
      const Array dnorm2 = linear_backward(b.up, a.norm2, dup);    // (N, C)
      norm_backward(b.norm2, a.mid, dnorm2, dx);                   // adds: dx is now of a.mid
      const Array datt = linear_backward(b.o, a.att, dx);          // (N, NH HS)
      const Array drotated = attention_backward(a.rotated, datt);  // (N, (NH + 2 NKV) HS)
      const Array dqkv = rotate_backward(b, a.qkv, drotated);      // (N, (NH + 2 NKV) HS)
      const Array dnorm1 = linear_backward(b.qkv, a.norm1, dqkv);  // (N, C)
      norm_backward(b.norm1, a.x, dnorm1, dx);                     // adds: dx is now of a.x
    }
    embedding_backward(dx);
  }

 private:
  // Each is defined below, next to the layer that it is made of.
  Array embedding_forward() const;
  void embedding_backward(const Array& dx);
  Array norm_forward(const Norm& norm, const Array& x) const;
  void norm_backward(const Norm& norm, const Array& x, const Array& dy, Array& dx);
  Array linear_forward(const Linear& l, const Array& x) const;
  Array linear_backward(const Linear& l, const Array& x, const Array& dy);
  Array rotate_forward(const Block& b, const Array& qkv) const;
  Array rotate_backward(const Block& b, const Array& qkv, const Array& drotated);
  Array attention_forward(const Array& qkv) const;
  Array attention_backward(const Array& qkv, const Array& dout) const;
  Array activation_forward(const Array& up) const;
  Array activation_backward(const Array& up, const Array& dact) const;
  void head_forward(const Array& outputs);
  Array head_backward(const Array& dlogp, const Array& dvalue, const Array& dentropy) const;

  void begin(const Batch& batch) {
    check_batch(c, batch);
    batch_ = batch;
    N = int(batch.tokens.size());
    positions_.resize(N);
    for (size_t d = 0; d + 1 < batch.doc_starts.size(); d++)
      for (int n = batch.doc_starts[d]; n < batch.doc_starts[d + 1]; n++)
        positions_[n] = n - batch.doc_starts[d];
    blocks_.resize(c.L);
  }
  const T* weight(int64_t offset) const { return offset < 0 ? nullptr : &weights[offset]; }
  T* gradient(int64_t offset) { return offset < 0 ? nullptr : &gradients[offset]; }
  // visit(length, q, k, v, out) for each query head of each document: the indices of the head's
  // first number in qkv (N, (NH + 2 NKV) HS) and in out (N, NH HS). Query head h meets the keys and
  // values of head h / (NH / NKV).
  template <class Visit>
  void for_each_head(Visit&& visit) const {
    for (size_t d = 0; d + 1 < batch_.doc_starts.size(); d++) {
      const int begin = batch_.doc_starts[d], length = batch_.doc_starts[d + 1] - begin;
      for (int h = 0; h < c.NH; h++) {
        const int row = begin * c.qkv(), k = row + (c.NH + h / (c.NH / c.NKV)) * c.HS;
        visit(length, row + h * c.HS, k, k + c.NKV * c.HS, (begin * c.NH + h) * c.HS);
      }
    }
  }
  static Array sum(Array a, const Array& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
    return a;
  }

  struct Activations {  // of a block
    Array x, norm1, qkv, rotated, att, mid, norm2, up, act;
  };
  const std::vector<double> frequency_ = rope_frequencies(c);  // (HS/2) radians a position, of RoPE
  Batch batch_;
  int N = 0;
  std::vector<int> positions_;       // (N), from 0 in each document
  std::vector<Activations> blocks_;  // (L)
  Array last_, final_norm_;          // (N, C): the stream that leaves the last block, normalised
  Array logits_;                     // (N, V)
};

// ---------------------------------------------------------------------------------------------
// Embedding: x[n] = wte[token[n]] + wpe[position[n]]

template <class T>
auto Gpt<T>::embedding_forward() const -> Array {
  Array x(N * c.C);  // (N, C)
  for (int i = 0; i < N * c.C; i++) {
    const int n = i / c.C, column = i % c.C;
    x[i] = weights[table.wte + batch_.tokens[n] * c.C + column];
    if (table.wpe >= 0) x[i] += weights[table.wpe + positions_[n] * c.C + column];
  }
  return x;
}
// dwte[token[n]] += dx[n];  dwpe[position[n]] += dx[n]
template <class T>
void Gpt<T>::embedding_backward(const Array& dx) {
  for (int i = 0; i < N * c.C; i++) {
    const int n = i / c.C, column = i % c.C;
    gradients[table.wte + batch_.tokens[n] * c.C + column] += dx[i];
    if (table.wpe >= 0) gradients[table.wpe + positions_[n] * c.C + column] += dx[i];
  }
}

// ---------------------------------------------------------------------------------------------
// Norms

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

template <class T>
auto Gpt<T>::norm_forward(const Norm& norm, const Array& x) const -> Array {
  Array y(x.size());  // (N, C)
  plain::norm_forward(N, c.C, x.data(), weight(norm.weight), weight(norm.bias), T(c.norm_eps),
                      y.data());
  return y;
}
template <class T>
void Gpt<T>::norm_backward(const Norm& norm, const Array& x, const Array& dy, Array& dx) {
  plain::norm_backward(N, c.C, dy.data(), x.data(), weight(norm.weight), c.has_biases(),
                       T(c.norm_eps), dx.data(), gradient(norm.weight), gradient(norm.bias));
}

// ---------------------------------------------------------------------------------------------
// Linear layers

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
// The same with W (out, in) in q8_0, and x quantized like it: the products of a block are summed as
// integers, then y = b + sum over blocks of (d_x d_w) (q_x . q_w), in order.
inline void linear_forward_q8_0(int N, int in, int out, const float* x,
                                const Q8Block* weight,  // (out, in / 32)
                                const float* bias, float* y) {
  for (int n = 0; n < N; n++) {
    for (int o = 0; o < out; o++) {
      float sum = bias ? bias[o] : 0;
      for (int i = 0; i < in; i += kQ8Block) {
        const Q8Block a = quantize_q8_0(x + n * in + i), &w = weight[(o * in + i) / kQ8Block];
        int dot = 0;
        for (int j = 0; j < kQ8Block; j++) dot += a.q[j] * w.q[j];
        sum = std::fma(float(dot), f16_to_float(a.d) * f16_to_float(w.d), sum);
      }
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

template <class T>
auto Gpt<T>::linear_forward(const Linear& l, const Array& x) const -> Array {
  Array y(N * l.out);  // (N, out)
  plain::linear_forward(N, l.in, l.out, x.data(), weight(l.weight), weight(l.bias), y.data());
  return y;
}
template <class T>
auto Gpt<T>::linear_backward(const Linear& l, const Array& x, const Array& dy) -> Array {
  Array dx(x.size());  // (N, in)
  plain::linear_backward(N, l.in, l.out, x.data(), weight(l.weight), dy.data(), dx.data(),
                         gradient(l.weight), gradient(l.bias));
  return dx;
}

// ---------------------------------------------------------------------------------------------
// Rotary positions

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

// Each head of q and k in qkv (N, (NH + 2 NKV) HS): normalised in qwen3, then turned by its
// position; v stays.
template <class T>
auto Gpt<T>::rotate_forward(const Block& b, const Array& qkv) const -> Array {
  if (c.family == Family::gpt2) return qkv;
  Array rotated = qkv;  // (N, (NH + 2 NKV) HS)
  for (int n = 0; n < N; n++) {
    for (int h = 0; h < c.NH + c.NKV; h++) {
      const int i = n * c.qkv() + h * c.HS;
      const T* w = weight(h < c.NH ? b.q_norm : b.k_norm);  // (HS)
      if (w) plain::norm_forward<T>(1, c.HS, &qkv[i], w, nullptr, T(c.norm_eps), &rotated[i]);
      rope(c.HS, &rotated[i], positions_[n], frequency_.data(), T(1));
    }
  }
  return rotated;
}
template <class T>
auto Gpt<T>::rotate_backward(const Block& b, const Array& qkv, const Array& drotated) -> Array {
  if (c.family == Family::gpt2) return drotated;
  Array dqkv = drotated;  // (N, (NH + 2 NKV) HS)
  for (int n = 0; n < N; n++) {
    for (int h = 0; h < c.NH + c.NKV; h++) {
      const int i = n * c.qkv() + h * c.HS;
      const int64_t w = h < c.NH ? b.q_norm : b.k_norm;
      rope(c.HS, &dqkv[i], positions_[n], frequency_.data(), T(-1));
      if (w < 0) continue;
      const Array dy(&dqkv[i], &dqkv[i] + c.HS);  // (HS)
      std::fill_n(&dqkv[i], c.HS, T(0));
      plain::norm_backward<T>(1, c.HS, dy.data(), &qkv[i], weight(w), false, T(c.norm_eps),
                              &dqkv[i], gradient(w), nullptr);
    }
  }
  return dqkv;
}

// ---------------------------------------------------------------------------------------------
// Attention

// Causal attention of one head within one document of `length` positions. Its rows (HS) of q, k
// and v are ld apart, those of out out_ld: a head is HS columns of a wider matrix.
// out[t] = sum_{s<=t} p[t,s] v[s],  p[t,.] = softmax over s <= t of q[t] k[s] / sqrt(HS)
template <class T>
void attention_forward(int length, int HS, const T* q, const T* k, const T* v, int ld, T* out,
                       int out_ld, T* p) {
  for (int t = 0; t < length; t++) {
    T highest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int s = 0; s <= t; s++) {
      T score = 0;
      for (int d = 0; d < HS; d++) score += q[t * ld + d] * k[s * ld + d];
      p[t * length + s] = score / std::sqrt(T(HS));
      highest = std::max(highest, p[t * length + s]);
    }
    for (int s = 0; s <= t; s++) sum += p[t * length + s] = std::exp(p[t * length + s] - highest);
    for (int d = 0; d < HS; d++) out[t * out_ld + d] = 0;
    for (int s = 0; s <= t; s++) {
      p[t * length + s] /= sum;
      for (int d = 0; d < HS; d++) out[t * out_ld + d] += p[t * length + s] * v[s * ld + d];
    }
  }
}
// dp = dout v;  ds = p (dp - sum_s p dp) / sqrt(HS);  dq += ds k, dk += ds q, dv += p dout
template <class T>
void attention_backward(int length, int HS, const T* q, const T* k, const T* v, int ld, const T* p,
                        const T* dout, int out_ld, T* dq, T* dk, T* dv) {
  for (int t = 0; t < length; t++) {
    T mean = 0;
    std::vector<T> dp(size_t(length), T(0));
    for (int s = 0; s <= t; s++) {
      for (int d = 0; d < HS; d++) dp[size_t(s)] += dout[t * out_ld + d] * v[s * ld + d];
      mean += p[t * length + s] * dp[size_t(s)];
    }
    for (int s = 0; s <= t; s++) {
      const T ds = p[t * length + s] * (dp[size_t(s)] - mean) / std::sqrt(T(HS));
      for (int d = 0; d < HS; d++) {
        dq[t * ld + d] += ds * k[s * ld + d];
        dk[s * ld + d] += ds * q[t * ld + d];
        dv[s * ld + d] += p[t * length + s] * dout[t * out_ld + d];
      }
    }
  }
}

template <class T>
auto Gpt<T>::attention_forward(const Array& qkv) const -> Array {
  Array out(N * c.NH * c.HS);  // (N, NH HS)
  for_each_head([&](int length, int q, int k, int v, int o) {
    Array p(length * length);  // (length, length)
    plain::attention_forward(length, c.HS, &qkv[q], &qkv[k], &qkv[v], c.qkv(), &out[o], c.NH * c.HS,
                             p.data());
  });
  return out;
}
// p is computed again. Query heads that share keys and values add to the same gradients.
template <class T>
auto Gpt<T>::attention_backward(const Array& qkv, const Array& dout) const -> Array {
  Array dqkv(qkv.size()), out(dout.size());  // (N, (NH + 2 NKV) HS), (N, NH HS)
  for_each_head([&](int length, int q, int k, int v, int o) {
    Array p(length * length);  // (length, length)
    plain::attention_forward(length, c.HS, &qkv[q], &qkv[k], &qkv[v], c.qkv(), &out[o], c.NH * c.HS,
                             p.data());
    plain::attention_backward(length, c.HS, &qkv[q], &qkv[k], &qkv[v], c.qkv(), p.data(), &dout[o],
                              c.NH * c.HS, &dqkv[q], &dqkv[k], &dqkv[v]);
  });
  return dqkv;
}

// ---------------------------------------------------------------------------------------------
// Activations

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

// SwiGLU: a row of up (N, 2F) is F gates, then F ups. GELU: up (N, F).
template <class T>
auto Gpt<T>::activation_forward(const Array& up) const -> Array {
  Array act(N * c.F);  // (N, F)
  for (int i = 0; i < N * c.F; i++) {
    const int gate = i + i / c.F * c.F;  // the same column of up's wider row
    act[i] = c.has_gate() ? swiglu(up[gate], up[gate + c.F]) : gelu(up[i]);
  }
  return act;
}
template <class T>
auto Gpt<T>::activation_backward(const Array& up, const Array& dact) const -> Array {
  Array dup(up.size());  // (N, F); SwiGLU: (N, 2F)
  for (int i = 0; i < N * c.F; i++) {
    const int gate = i + i / c.F * c.F;
    if (!c.has_gate())
      dup[i] = dact[i] * gelu_derivative(up[i]);
    else
      swiglu_derivative(up[gate], up[gate + c.F], dact[i], dup[gate], dup[gate + c.F]);
  }
  return dup;
}

// ---------------------------------------------------------------------------------------------
// Head

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

// From the head's outputs (N, V): logits, or (N, 1): values
template <class T>
void Gpt<T>::head_forward(const Array& outputs) {
  const bool lm = c.head == Head::lm;
  logp.assign(lm ? N : 0, 0), entropy = logp;
  (lm ? logits_ : value) = outputs;
  for (int n = 0; lm && n < N; n++) {
    if (batch_.targets[n] >= 0) {
      classifier_forward(c.V, &logits_[n * c.V], batch_.targets[n], T(batch_.temperature), logp[n],
                         entropy[n]);
    }
  }
}
template <class T>
auto Gpt<T>::head_backward(const Array& dlogp, const Array& dvalue, const Array& dentropy) const
    -> Array {
  if (c.head == Head::scalar) return dvalue;  // (N, 1)
  Array dlogits(N * c.V);                     // (N, V)
  for (int n = 0; n < N; n++) {
    if (batch_.targets[n] >= 0) {
      classifier_backward(c.V, &logits_[n * c.V], batch_.targets[n], T(batch_.temperature),
                          dlogp.empty() ? T(0) : dlogp[n], dentropy.empty() ? T(0) : dentropy[n],
                          &dlogits[n * c.V]);
    }
  }
  return dlogits;
}

}  // namespace plain

}  // namespace cake
