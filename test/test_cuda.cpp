// The CUDA engine: its kernels against the plain definitions of cake/layers.h, whole tiny models
// against the CPU engine. Over test/cuda_on_cpu/ these tests run anywhere; `make test DEVICE=cuda`
// compiles this same file with nvcc and runs it on a GPU.
#include <doctest/doctest.h>

#include <cstring>
#include <numeric>
#include <set>

#include "train_gpt.cu"
//
#include "cake/generate.h"
#include "cake/layers.h"
#include "test/support.h"
#ifdef CAKE_CUDA_ON_CPU
#include "test/cuda_on_cpu/control.h"
#endif

// -------------------------------------------------------------------------------------------------
// What all tests of kernels share

namespace cake::gpu {

using Doubles = std::vector<double>;

template <class T>
double as_double(T x) {
  if constexpr (std::is_same_v<T, bf16>)
    return double(__bfloat162float(x));
  else
    return double(x);
}
template <class T>
T as(double x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(float(x));
  else
    return T(x);
}

// An array on the device. It is poisoned where nothing was written.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(int64_t n) : n_(size_t(n)) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(1, n_ * sizeof(T))),
          "test");
  }
  template <class U>
  explicit OnDevice(const std::vector<U>& values) : OnDevice(int64_t(values.size())) {
    write(values);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  operator T*() const { return data_; }
  T* only_if(bool condition) const { return condition ? data_ : nullptr; }
  template <class U>
  void write(const std::vector<U>& values) const {
    std::vector<T> host(values.size());
    for (size_t i = 0; i < host.size(); i++) {
      if constexpr (std::is_arithmetic_v<U>)
        host[i] = as<T>(double(values[i]));
      else
        host[i] = values[i];
    }
    check(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "test");
  }
  std::vector<T> raw() const {
    std::vector<T> host(n_);
    check(cudaDeviceSynchronize(), "test");
    check(cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "test");
    return host;
  }
  Doubles read() const {
    Doubles values;
    for (const T x : raw()) values.push_back(as_double(x));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t n_;
};

// Calls `run` under every schedule of the emulator; on a GPU twice.
template <class Run>
void every_schedule(Run&& run) {
#ifdef CAKE_CUDA_ON_CPU
  using cuda_on_cpu::Schedule;
  for (const Schedule schedule : {Schedule::reverse, Schedule::random, Schedule::forward}) {
    INFO("schedule " << int(schedule));
    cuda_on_cpu::set_schedule(schedule, 7);
    run();
  }
#else
  for (int i = 0; i < 2; i++) run();
#endif
}

}  // namespace cake::gpu

// The kernels of train_gpt.cu against their plain definitions in double, on inputs that both types
// hold exactly: float and bf16, sizes odd and even, gradients that add, every schedule of the
// emulator.

namespace kernel_test {

using namespace cake;
using namespace cake::gpu;

// Normal numbers that A holds exactly.
template <class A>
Doubles random(int64_t n, const char* name, double scale = 1) {
  Rng rng{hash64(name)};
  Doubles values;
  for (int64_t i = 0; i < n; i++) values.push_back(as_double(as<A>(scale * rng.normal())));
  return values;
}
std::vector<int> random_ids(int64_t n, int below, const char* name) {
  Rng rng{hash64(name)};
  std::vector<int> ids;
  for (int64_t i = 0; i < n; i++) ids.push_back(int(rng.below(uint64_t(below))));
  return ids;
}

// Tolerances of ||a - b|| / ||b||. fp32 rounds by 2^-24 = 6e-8 a step; sums here are at most a few
// thousand long and of mixed sign, exp2 is good to 2^-22: errors are near 1e-6, and 1e-5 is safe. A
// result in bf16 is an fp32 result rounded once, to 8 bits: by at most 2^-8 of itself, and so is
// the norm of a whole tensor; what is read, changed and written `times` times is rounded as often.
constexpr double kFloat = 1e-5;
template <class A>
double tolerance(int times = 1) {
  return kFloat + (std::is_same_v<A, bf16> ? times * 0x1p-8 : 0);
}

#define CHECK_CLOSE(got, want, tolerance) CHECK(rel_error(got, want) < (tolerance))

#define KERNEL_TEST(name) TEST_CASE_TEMPLATE(name, A, float, bf16)

// -------------------------------------------------------------------------------------------------
// Elementwise

KERNEL_TEST("cuda: gelu forward and backward match the definition") {
  for (const int n : {1, 5, 768, 1003}) {
    CAPTURE(n);
    const Doubles x = random<A>(n, "x", 2), dy = random<A>(n, "dy");
    Doubles y, dx;
    for (int i = 0; i < n; i++) {
      y.push_back(plain::gelu(x[size_t(i)]));
      dx.push_back(dy[size_t(i)] * plain::gelu_derivative(x[size_t(i)]));
    }
    every_schedule([&] {
      const OnDevice<A> x_(x), dy_(dy), y_(n), dx_(n);
      gelu_forward<A>(y_, x_, n, nullptr);
      gelu_backward<A>(dx_, dy_, x_, n, nullptr);
      CHECK_CLOSE(y_.read(), y, tolerance<A>());
      CHECK_CLOSE(dx_.read(), dx, tolerance<A>());
    });
  }
  const OnDevice<A> x(Doubles{-1000, -30, 0, 30, 1000}), y(5);  // far out it is 0 or x, never NaN
  gelu_forward<A>(y, x, 5, nullptr);
  CHECK_CLOSE(y.read(), (Doubles{0, 0, 0, 30, 1000}), tolerance<A>());
}

KERNEL_TEST("cuda: swiglu forward and backward match the definition") {
  for (const int F : {1, 5, 48, 100, 1040}) {
    CAPTURE(F);
    const int N = 3;
    const Doubles x = random<A>(2 * N * F, "gate_up", 2), dy = random<A>(N * F, "dy");
    Doubles y(size_t(N * F)), dx(size_t(2 * N * F));
    for (int n = 0; n < N; n++) {
      for (int f = 0; f < F; f++) {
        const size_t gate = size_t(2 * n * F + f), up = gate + size_t(F), out = size_t(n * F + f);
        y[out] = plain::swiglu(x[gate], x[up]);
        plain::swiglu_derivative(x[gate], x[up], dy[out], dx[gate], dx[up]);
      }
    }
    every_schedule([&] {
      const OnDevice<A> x_(x), dy_(dy), y_(int64_t(y.size())), dx_(int64_t(dx.size()));
      swiglu_forward<A>(y_, x_, N, F, nullptr);
      swiglu_backward<A>(dx_, dy_, x_, N, F, nullptr);
      CHECK_CLOSE(y_.read(), y, tolerance<A>());
      CHECK_CLOSE(dx_.read(), dx, tolerance<A>());
    });
  }
}

KERNEL_TEST("cuda: add adds") {
  for (const int n : {1, 100, 768, 4099}) {
    CAPTURE(n);
    const Doubles x = random<A>(n, "x"), y = random<float>(n, "y");
    Doubles sum, twice;
    for (size_t i = 0; i < size_t(n); i++) {
      sum.push_back(float(x[i] + y[i]));
      twice.push_back(float(sum[i] + x[i]));
    }
    every_schedule([&] {
      const OnDevice<A> x_(x);
      const OnDevice<float> y_(y);
      add<A>(y_, x_, n, nullptr);
      CHECK(y_.read() == sum);
      add<A>(y_, x_, n, nullptr);
      CHECK(y_.read() == twice);
    });
  }
}

// -------------------------------------------------------------------------------------------------
// Rows

KERNEL_TEST("cuda: embedding rows are those of the tokens and positions") {
  for (const int C : {1, 5, 48, 100, 768}) {
    CAPTURE(C);
    const int N = 19, V = 11, T = 7;
    const Doubles wte = random<A>(V * C, "wte"), wpe = random<A>(T * C, "wpe");
    const auto tokens = random_ids(N, V, "tokens"), positions = random_ids(N, T, "positions");
    Doubles both, token;
    for (size_t n = 0; n < size_t(N); n++) {
      for (int c = 0; c < C; c++) {
        token.push_back(wte[size_t(tokens[n] * C + c)]);
        both.push_back(as_double(as<A>(token.back() + wpe[size_t(positions[n] * C + c)])));
      }
    }
    every_schedule([&] {
      const OnDevice<A> wte_(wte), wpe_(wpe), x(int64_t(both.size()));
      const OnDevice<int> tokens_(tokens), positions_(positions);
      embed_forward<A>(x, wte_, wpe_, tokens_, positions_, N, C, nullptr);
      CHECK(x.read() == both);
      embed_forward<A>(x, wte_, nullptr, tokens_, nullptr, N, C, nullptr);
      CHECK(x.read() == token);
    });
  }
}

KERNEL_TEST("cuda: gathered and scattered rows are the rows asked for") {
  for (const int C : {1, 5, 48, 768}) {
    CAPTURE(C);
    const int N = 9, rows = 12;
    const std::vector<int> row_of = {8, -1, 0, 3, -1, 1, 2, 7, 6, -1, -1, -1};
    const Doubles x = random<A>(N * C, "x"), y = random<A>(rows * C, "y");
    Doubles gathered(y.size(), 0.), scattered(x.size(), 0.);
    for (int r = 0; r < rows; r++) {
      for (int c = 0, n = row_of[size_t(r)]; c < C && n >= 0; c++) {
        gathered[size_t(r * C + c)] = x[size_t(n * C + c)];
        scattered[size_t(n * C + c)] = y[size_t(r * C + c)];
      }
    }
    every_schedule([&] {
      const OnDevice<A> x_(x), y_(y), to_rows(int64_t(y.size())), to_x(Doubles(x.size(), 0.));
      const OnDevice<int> row_of_(row_of);
      move_rows<false, A>(to_rows, x_, row_of_, rows, C, nullptr);
      move_rows<true, A>(to_x, y_, row_of_, rows, C, nullptr);
      CHECK(to_rows.read() == gathered);
      CHECK(to_x.read() == scattered);
    });
  }
}

KERNEL_TEST(
    "cuda: the embedding's gradient is the sum by id, with the same bits on every schedule") {
  struct Case {
    int N, C, rows;
    double skew;  // ids are rows u^skew, u uniform: above 1 some are frequent
  };
  for (const Case& c : {Case{1, 5, 1, 1},
                        {33, 48, 1, 1},
                        {300, 100, 7, 1},
                        {300, 1, 300, 1},
                        {700, 8, 257, 6},
                        {2500, 5, 50257, 9},
                        {9000, 1, 300, 1},
                        {64, 768, 12, 2}}) {
    const int N = c.N;
    const int C = c.C;
    const int rows = c.rows;
    const double skew = c.skew;
    CAPTURE(N);
    CAPTURE(rows);
    const int dead = 40;  // rows behind those N: of one id, and not a number
    Doubles dx = random<A>(int64_t(N) * C, "dx");
    const Doubles before = random<float>(int64_t(rows) * C, "table");
    std::vector<int> ids;
    Rng rng{7};
    for (int n = 0; n < N; n++) {
      ids.push_back(std::min(rows - 1, int(rows * std::pow(rng.uniform(), skew))));
    }
    Doubles want = before;
    for (int n = 0; n < N; n++)
      for (int c = 0; c < C; c++)
        want[size_t(ids[size_t(n)]) * size_t(C) + size_t(c)] += 2 * dx[size_t(n * C + c)];
    dx.resize(dx.size() + size_t(dead * C), NAN), ids.resize(ids.size() + dead, 0);
    std::vector<float> first;
    every_schedule([&] {
      const OnDevice<A> dx_(dx);
      const OnDevice<float> table(before);
      const OnDevice<int> ids_(ids), live(std::vector<int>{N});
      const OnDevice<char> scratch(int64_t(embed_backward_scratch(N + dead, rows)));
      for (int twice = 0; twice < 2; twice++) {
        embed_backward<A>(table, dx_, ids_, live, N + dead, C, rows, scratch, nullptr);
      }
      CHECK_CLOSE(table.read(), want, kFloat);
      if (first.empty()) first = table.raw();
      CHECK(std::memcmp(first.data(), table.raw().data(), first.size() * sizeof(float)) == 0);
    });
  }
}

// -------------------------------------------------------------------------------------------------
// Norms

KERNEL_TEST("cuda: norms match the definition") {
  for (const int C : {1, 5, 48, 100, 768, 2056}) {
    for (const bool layer : {false, true}) {
      CAPTURE(C);
      CAPTURE(layer);
      const int N = C > 1000 ? 5 : 19;
      const double eps = 1e-3;
      Doubles x = random<A>(N * C, "x");
      for (double& v : x) v = as_double(as<A>(v + 1));  // a mean that counts
      const Doubles w = random<float>(C, "w"), b = random<float>(C, "b");
      Doubles y(x.size()), mean, rstd;
      const double* bias = layer ? b.data() : nullptr;
      plain::norm_forward<double>(N, C, x.data(), w.data(), bias, eps, y.data());
      for (int n = 0; n < N; n++) {
        double m = 0, square = 0;
        for (int c = 0; layer && c < C; c++) m += x[size_t(n * C + c)] / C;
        for (int c = 0; c < C; c++) square += std::pow(x[size_t(n * C + c)] - m, 2) / C;
        mean.push_back(m), rstd.push_back(1 / std::sqrt(square + eps));
      }
      every_schedule([&] {
        const OnDevice<A> x_(x), y_(int64_t(x.size())), again(int64_t(x.size()));
        const OnDevice<float> w_(w), b_(b), mean_(N), rstd_(N);
        float *to_mean = mean_.only_if(layer), *bias_ = b_.only_if(layer);
        norm_forward<A>(y_, to_mean, rstd_, x_, w_, bias_, float(eps), N, C, nullptr);
        CHECK_CLOSE(y_.read(), y, tolerance<A>());
        CHECK_CLOSE(rstd_.read(), rstd, kFloat);
        if (layer) CHECK_CLOSE(mean_.read(), mean, kFloat);
        norm_forward<A>(again, nullptr, nullptr, x_, w_, bias_, float(eps), N, C, nullptr);
        CHECK(again.read() == y_.read());  // without statistics
      });
    }
  }
}

KERNEL_TEST("cuda: norm backward adds the definition's gradients") {
  for (const int C : {1, 5, 48, 100, 768}) {
    for (const bool layer : {false, true}) {
      CAPTURE(C);
      CAPTURE(layer);
      // 4,200 rows: some warps take two of them. Once is enough.
      const int N = C == 768 ? 11 : C == 5 && layer && std::is_same_v<A, float> ? 4200 : 37;
      const double eps = 1e-3;
      const Doubles x = random<A>(N * C, "x"), dy = random<A>(N * C, "dy");
      const Doubles before = random<A>(N * C, "dx");
      const Doubles w = random<float>(C, "w"), dw_before = random<float>(C, "dw"),
                    db_before = random<float>(C, "db");
      Doubles dx = before, dw = dw_before, db = db_before, mean, rstd;
      for (int twice = 0; twice < 2; twice++) {
        plain::norm_backward<double>(N, C, dy.data(), x.data(), w.data(), layer, eps, dx.data(),
                                     dw.data(), db.data());
      }
      for (int n = 0; n < N; n++) {
        double m = 0, square = 0;
        for (int c = 0; layer && c < C; c++) m += x[size_t(n * C + c)] / C;
        for (int c = 0; c < C; c++) square += std::pow(x[size_t(n * C + c)] - m, 2) / C;
        mean.push_back(m), rstd.push_back(1 / std::sqrt(square + eps));
      }
      every_schedule([&] {
        const OnDevice<A> x_(x), dy_(dy), dx_(before);
        const OnDevice<float> w_(w), dw_(dw_before), db_(db_before), mean_(mean), rstd_(rstd);
        const OnDevice<float> dx_sums_(db_before);
        const OnDevice<char> scratch(int64_t(norm_backward_scratch(N, C)));
        const bool sums_dx = C != 48;
        Doubles dx_sums = db_before;  // of what was stored, once after each call
        for (int twice = 0; twice < 2; twice++) {
          norm_backward<A>(dx_, dw_, db_.only_if(layer), dx_sums_.only_if(sums_dx), dy_, x_,
                           mean_.only_if(layer), rstd_, w_, N, C, scratch, nullptr);
          const Doubles stored = dx_.read();
          for (size_t i = 0; sums_dx && i < stored.size(); i++) dx_sums[i % size_t(C)] += stored[i];
        }
        CHECK_CLOSE(dx_sums_.read(), dx_sums, kFloat);
        // dx is rounded twice, once at half the way, where it may be larger than at the end.
        CHECK_CLOSE(dx_.read(), dx, tolerance<A>(3));
        CHECK_CLOSE(dw_.read(), dw, kFloat);
        CHECK_CLOSE(db_.read(), layer ? db : db_before, kFloat);
      });
    }
  }
}

// -------------------------------------------------------------------------------------------------
// QK-norm and RoPE

KERNEL_TEST("cuda: qk-norm with rope, forward and backward, matches the definitions") {
  struct Case {
    int HS, NH, NKV, N;
    bool norm;
  };
  for (const Case& c : {Case{2, 1, 1, 3, true},
                        {6, 3, 1, 5, true},
                        {16, 4, 2, 9, false},
                        {48, 2, 2, 7, true},
                        {64, 3, 1, 21, true},
                        {64, 2, 1, 4, false},
                        {80, 2, 1, 5, true},
                        {98, 1, 1, 3, true},
                        {128, 2, 1, 5, true},
                        {16, 2, 1, 20000, true}}) {
    const int HS = c.HS;
    const int NH = c.NH;
    const int NKV = c.NKV;
    const int N = c.N;
    const bool norm = c.norm;
    CAPTURE(HS);
    CAPTURE(N);
    const int heads = NH + NKV, T = 13;
    if (N > 1000 && !std::is_same_v<A, float>) continue;  // several items a lane: once is enough
    const int64_t in_ld = (heads + NKV) * HS, out_ld = heads * HS;
    const double eps = 1e-4;
    const Doubles in = random<A>(N * in_ld, "qkv"), dout = random<A>(N * in_ld, "dout");
    const Doubles wq = random<float>(HS, "wq"), wk = random<float>(HS, "wk");
    const Doubles dwq0 = random<float>(HS, "dwq"), dwk0 = random<float>(HS, "dwk");
    const auto positions = random_ids(N, T, "positions");
    Doubles frequency;
    std::vector<float2> table;
    for (int i = 0; i < HS / 2; i++) frequency.push_back(std::pow(100., -2. * i / HS));
    for (int t = 0; t < T; t++)
      for (const double f : frequency)
        table.push_back({float(std::cos(t * f)), float(std::sin(t * f))});

    Doubles out(size_t(N * out_ld)), din = dout, dwq = dwq0, dwk = dwk0;
    for (int n = 0; n < N; n++) {
      for (int h = 0; h < heads; h++) {
        const double *x = &in[size_t(n * in_ld + h * HS)], *w = (h < NH ? wq : wk).data();
        double* y = &out[size_t(n * out_ld + h * HS)];
        if (norm)
          plain::norm_forward<double>(1, HS, x, w, nullptr, eps, y);
        else
          std::copy(x, x + HS, y);
        plain::rope<double>(HS, y, positions[size_t(n)], frequency.data(), 1);
        double* d = &din[size_t(n * in_ld + h * HS)];
        plain::rope<double>(HS, d, positions[size_t(n)], frequency.data(), -1);
        if (!norm) continue;
        const Doubles dy(d, d + HS);
        std::fill(d, d + HS, 0.);
        plain::norm_backward<double>(1, HS, dy.data(), x, w, false, eps, d,
                                     (h < NH ? dwq : dwk).data(), nullptr);
      }
    }
    const auto run = [&] {
      const OnDevice<A> in_(in), out_(int64_t(out.size())), d_(dout);
      const OnDevice<float> wq_(wq), wk_(wk), dwq_(dwq0), dwk_(dwk0);
      const OnDevice<float2> table_(table);
      const OnDevice<int> positions_(positions);
      const OnDevice<char> scratch(int64_t(qk_backward_scratch(N, HS)));
      const float *q_norm = wq_.only_if(norm), *k_norm = wk_.only_if(norm);
      qk_backward<A>(d_, d_ + NH * HS, in_ld, in_, in_ + NH * HS, in_ld, q_norm, k_norm, dwq_, dwk_,
                     table_, positions_, float(eps), N, NH, NKV, HS, scratch, nullptr);
      CHECK_CLOSE(d_.read(), din, tolerance<A>());
      CHECK_CLOSE(dwq_.read(), dwq, kFloat);
      CHECK_CLOSE(dwk_.read(), dwk, kFloat);
      qk_forward<A>(out_, out_ld, out_ + NH * HS, out_ld, in_, in_ + NH * HS, in_ld, q_norm, k_norm,
                    table_, positions_, float(eps), N, NH, NKV, HS, nullptr);
      CHECK_CLOSE(out_.read(), out, tolerance<A>());
      qk_forward<A>(in_, in_ld, in_ + NH * HS, in_ld, in_, in_ + NH * HS, in_ld, q_norm, k_norm,
                    table_, positions_, float(eps), N, NH, NKV, HS, nullptr);  // in place
      Doubles in_place;
      const Doubles all = in_.read();
      for (int n = 0; n < N; n++) {
        in_place.insert(in_place.end(), all.begin() + n * in_ld, all.begin() + n * in_ld + out_ld);
        for (int64_t c = out_ld; c < in_ld; c++) {  // v is left alone
          if (all[size_t(n * in_ld + c)] != in[size_t(n * in_ld + c)]) FAIL("v was changed");
        }
      }
      CHECK_CLOSE(in_place, out, tolerance<A>());
    };
    if (N > 1000)
      run();
    else
      every_schedule(run);
  }
}

// -------------------------------------------------------------------------------------------------
// Biases and the scalar head

KERNEL_TEST("cuda: a bias's gradient adds the sum over rows") {
  struct Case {
    int N, out;
  };
  for (const Case& c : {Case{1, 1}, {7, 5}, {70, 48}, {130, 100}, {600, 768}, {4000, 3}}) {
    const int N = c.N;
    const int out = c.out;
    CAPTURE(N);
    CAPTURE(out);
    const Doubles dy = random<A>(N * out, "dy"), before = random<float>(out, "db");
    Doubles db = before;
    for (int n = 0; n < N; n++)
      for (int o = 0; o < out; o++) db[size_t(o)] += 2 * dy[size_t(n * out + o)];
    every_schedule([&] {
      const OnDevice<A> dy_(dy);
      const OnDevice<float> db_(before);
      const OnDevice<char> scratch(int64_t(bias_backward_scratch(N, out)));
      for (int twice = 0; twice < 2; twice++) {
        bias_backward<A>(db_, dy_, nullptr, N, out, scratch, nullptr);
      }
      CHECK_CLOSE(db_.read(), db, kFloat);
    });
  }
}

KERNEL_TEST("cuda: the scalar head matches the definition") {
  for (const int C : {1, 5, 48, 100, 768}) {
    CAPTURE(C);
    const int N = 75;
    const Doubles x = random<A>(N * C, "x"), w = random<A>(C, "w");
    const Doubles dvalue = random<float>(N, "dvalue"), before = random<float>(C, "dw");
    Doubles value(size_t(N), 0.), dx(x.size()), dw = before;
    plain::linear_forward<double>(N, C, 1, x.data(), w.data(), nullptr, value.data());
    for (int twice = 0; twice < 2; twice++) {
      plain::linear_backward<double>(N, C, 1, x.data(), w.data(), dvalue.data(), dx.data(),
                                     dw.data(), nullptr);
    }
    every_schedule([&] {
      const OnDevice<A> x_(x), w_(w), dx_(int64_t(x.size()));
      const OnDevice<float> value_(N), dvalue_(dvalue), dw_(before);
      const OnDevice<char> scratch(int64_t(bias_backward_scratch(N, C)));
      value_forward<A>(value_, x_, w_, N, C, nullptr);
      for (int twice = 0; twice < 2; twice++) {
        value_backward<A>(dx_, dw_, dvalue_, x_, w_, N, C, scratch, nullptr);
      }
      CHECK_CLOSE(value_.read(), value, kFloat);
      CHECK_CLOSE(dx_.read(), dx, tolerance<A>());
      CHECK_CLOSE(dw_.read(), dw, kFloat);
    });
  }
}

// -------------------------------------------------------------------------------------------------
// LM head

KERNEL_TEST("cuda: the classifier matches the definition, padding apart") {
  struct Case {
    int V, rows;
    double temperature;
  };
  for (const Case& c :
       {Case{1, 2, 1}, {5, 4, .7}, {48, 6, 1.3}, {257, 7, 1}, {257, 5, .7}, {50257, 3, .9}}) {
    const int V = c.V;
    const int rows = c.rows;
    const double temperature = c.temperature;
    CAPTURE(V);
    const int ld = V == 48 ? 50 : (V + 127) / 128 * 128, N = rows + 2;  // 50: no packs
    const double kNan = std::numeric_limits<double>::quiet_NaN();
    Doubles logits = random<A>(rows * ld, "logits", 3);
    for (int r = 0; r < rows; r++)
      for (int j = V; j < ld; j++) logits[size_t(r * ld + j)] = kNan;  // in no sum
    std::vector<int> row_of, targets = random_ids(N, V, "targets");
    for (int r = 0; r < rows; r++) row_of.push_back(r == 1 ? -1 : N - 1 - r);
    for (const int n : {0, 1}) targets[size_t(N - 1 - 2 * n)] = n ? V - 1 : 0;
    const Doubles dlogp = random<float>(N, "dlogp"), dentropy = random<float>(N, "dentropy");

    // Rows without a token: their dlogits are 0; positions without a row keep what they have (7).
    Doubles logp(size_t(N), 7.), entropy = logp, d(logits.size(), 0.), d_logp = d, d_entropy = d;
    for (int r = 0; r < rows; r++) {
      const int n = row_of[size_t(r)];
      if (n < 0) continue;
      const double* x = &logits[size_t(r * ld)];
      const int target = targets[size_t(n)];
      plain::classifier_forward(V, x, target, temperature, logp[size_t(n)], entropy[size_t(n)]);
      double highest = x[0], sum = 0;  // classifier_backward itself, but in V steps, not V^2
      for (int j = 0; j < V; j++) highest = std::max(highest, x[j]);
      for (int j = 0; j < V; j++) sum += std::exp((x[j] - highest) / temperature);
      for (int j = 0; j < V; j++) {
        const double l = (x[j] - highest) / temperature - std::log(sum), p = std::exp(l);
        const size_t at = size_t(r * ld + j);
        d_logp[at] = dlogp[size_t(n)] * (double(j == target) - p) / temperature;
        d_entropy[at] = -dentropy[size_t(n)] * p * (l + entropy[size_t(n)]) / temperature;
        d[at] = d_logp[at] + d_entropy[at];
      }
      if (V > 300) continue;
      Doubles plain_d(static_cast<size_t>(V));
      plain::classifier_backward(V, x, target, temperature, dlogp[size_t(n)], dentropy[size_t(n)],
                                 plain_d.data());
      CHECK_CLOSE(Doubles(&d[size_t(r * ld)], &d[size_t(r * ld)] + V), plain_d, 1e-12);
    }
    const auto run = [&] {
      const OnDevice<A> logits_(logits);
      const OnDevice<int> row_of_(row_of), targets_(targets);
      const OnDevice<float> dlogp_(dlogp), dentropy_(dentropy), logp_(Doubles(size_t(N), 7.)),
          entropy_(Doubles(size_t(N), 7.));
      const auto call = [&](const float* dl, const float* de, float* h, bool backward) {
        classifier<A>(logits_, ld, row_of_, targets_, dl, de, logp_, h, float(1 / temperature), V,
                      rows, backward, nullptr);
      };
      call(nullptr, nullptr, entropy_, false);
      CHECK_CLOSE(logp_.read(), logp, kFloat);
      CHECK_CLOSE(entropy_.read(), entropy, kFloat);
      Doubles after = logits_.read(), same = logits;
      for (double& x : after) x = std::isnan(x) ? 1e9 : x;
      for (double& x : same) x = std::isnan(x) ? 1e9 : x;
      CHECK(after == same);  // forward alone changes none
      logp_.write(Doubles(size_t(N), 7.));
      call(dlogp_, nullptr, nullptr, true);
      CHECK_CLOSE(logp_.read(), logp, kFloat);
      CHECK_CLOSE(logits_.read(), d_logp, tolerance<A>());
      logits_.write(logits);
      call(nullptr, dentropy_, entropy_, true);
      CHECK_CLOSE(logits_.read(), d_entropy, tolerance<A>());
      logits_.write(logits);
      call(dlogp_, dentropy_, entropy_, true);
      CHECK_CLOSE(logits_.read(), d, tolerance<A>());
      CHECK_CLOSE(entropy_.read(), entropy, kFloat);
    };
    every_schedule(run);
  }
}

// -------------------------------------------------------------------------------------------------
// Sums, and the optimizers

TEST_CASE("cuda: weighted sums add in double") {
  for (const int n : {1, 31, 1024, 5003}) {
    CAPTURE(n);
    const Doubles a = random<float>(n, "a"), b = random<float>(n, "b");
    double sum = 3, alone = 3;
    for (size_t i = 0; i < size_t(n); i++) sum += a[i] * b[i], alone += a[i];
    every_schedule([&] {
      const OnDevice<float> a_(a), b_(b);
      const OnDevice<double> out(Doubles{3, 3});
      weighted_sum(out, a_, b_, n, nullptr);
      weighted_sum(out + 1, a_, nullptr, n, nullptr);
      CHECK_CLOSE(out.read(), (Doubles{sum, alone}), 1e-12);  // products and sums are doubles
    });
  }
}

TEST_CASE("cuda: the gradient's norm clips, and tells what is not finite") {
  for (const int n : {1, 3, 1000, 2000003}) {
    CAPTURE(n);
    const Doubles g = random<float>(n, "g");
    double square = 0;
    for (const double x : g) square += x * x;
    const double norm = std::sqrt(square);
    const OnDevice<float> g_(g);
    const OnDevice<double> partials(kSquarePartials);
    const OnDevice<DeviceStep> step(1);
    const auto run = [&](float max_norm) {
      sum_of_squares(partials, g_, n, nullptr);
      finish_norm(step, partials, kSquarePartials, max_norm, nullptr);
      return step.raw()[0];
    };
    for (const float max_norm : {float(norm * .25), 0.f, float(norm * 2)}) {
      if (n > 1000000 && max_norm == 0) break;  // so large that threads go on: once will do
      const DeviceStep s = run(max_norm);
      CHECK_CLOSE(Doubles{s.grad_norm}, Doubles{norm}, 1e-6);  // squares are floats
      CHECK_CLOSE(Doubles{s.scale}, Doubles{max_norm > 0 && max_norm < norm ? .25 : 1}, 1e-6);
      CHECK(s.skip == 0);
    }
    for (const double bad : {double(INFINITY), double(NAN)}) {
      if (n > 1000000) break;
      Doubles with = g;
      with.back() = bad;
      const OnDevice<float> bad_(with);
      sum_of_squares(partials, bad_, n, nullptr);
      finish_norm(step, partials, kSquarePartials, 1, nullptr);
      CHECK(step.raw()[0].skip != 0);
    }
  }
}

TEST_CASE("cuda: AdamW matches the formula, clips, skips, and writes the bf16 copy") {
  // Runs of one launch lie apart in each array, in another order in v than in w; `shift`: not at
  // multiples of 16 bytes. What lies between them keeps its values.
  for (const int shift : {0, 1}) {
    CAPTURE(shift);
    std::vector<AdamWRun> runs;
    const auto add = [&](int64_t w, int64_t v, int64_t size, Kind rate, bool decay) {
      runs.push_back({w + 16 + shift, w + shift, v + shift, size, 0, int(rate), decay});
    };
    add(0, 9000, 1, Kind::embedding, true);
    add(16, 8000, 7, Kind::vector, false);
    add(48, 0, 5003, Kind::matrix, true);
    add(5056, 6000, 768, Kind::head, false);
    add(6000, 8100, 3, Kind::matrix, true);
    const int64_t n = 10000;
    OptimizerStep o;
    o.step = 3, o.beta1 = .8f, o.beta2 = .9f, o.eps = 1e-3f, o.decay = .1f;
    for (size_t i = 0; i < o.lr.size(); i++) o.lr[i] = .01f * float(i + 1);
    const double scale = .5;
    const Doubles w0 = random<float>(n, "w"), g = random<float>(n, "g"), m0 = random<float>(n, "m");
    Doubles v0 = random<float>(n, "v"), w = w0, m = m0;
    for (double& x : v0) x = std::abs(x);
    Doubles v = v0;
    for (const AdamWRun& run : runs) {
      const double lr = double(o.lr[size_t(run.rate)]), decay = run.decay ? double(o.decay) : 0;
      for (int64_t i = 0; i < run.size; i++) {
        const double b1 = double(o.beta1), b2 = double(o.beta2), gi = g[size_t(run.g + i)] * scale;
        double &wi = w[size_t(run.w + i)], &mi = m[size_t(run.g + i)], &vi = v[size_t(run.v + i)];
        mi = b1 * mi + (1 - b1) * gi;
        vi = b2 * vi + (1 - b2) * gi * gi;
        wi -= lr * (mi / (1 - b1 * b1 * b1) / (std::sqrt(vi / (1 - b2 * b2 * b2)) + double(o.eps)) +
                    decay * wi);
      }
    }
    const int64_t chunks = number_chunks(runs);
    CHECK(chunks == 7);  // 5003 elements are three
    const auto count = int(runs.size());
    every_schedule([&] {
      const OnDevice<float> w_(w0), g_(g), m_(m0), v_(v0);
      const OnDevice<bf16> copy(w0);
      const Doubles copy0 = copy.read();
      const OnDevice<AdamWRun> runs_(runs);
      for (const int skip : {1, 0}) {
        const OnDevice<DeviceStep> step(std::vector<DeviceStep>{{1, float(scale), skip, 0, 0}});
        adamw(w_, copy, g_, m_, v_, runs_, count, chunks, o, step, nullptr);
        if (skip) {
          CHECK((w_.read() == w0 && m_.read() == m0 && v_.read() == v0));
        }
      }
      CHECK_CLOSE(w_.read(), w, kFloat);
      CHECK_CLOSE(m_.read(), m, kFloat);
      CHECK_CLOSE(v_.read(), v, kFloat);
      const Doubles stepped = w_.read();
      Doubles rounded = copy0;
      for (const AdamWRun& run : runs) {
        for (auto i = size_t(run.w); i < size_t(run.w + run.size); i++)
          rounded[i] = as_double(as<bf16>(stepped[i]));
      }
      CHECK(copy.read() == rounded);
      const OnDevice<DeviceStep> step(std::vector<DeviceStep>{{1, 1, 0, 0, 0}});
      adamw(w_, nullptr, g_, m_, v_, runs_, count, chunks, o, step, nullptr);  // no copy
      CHECK(copy.read() == rounded);
    });
  }
}

KERNEL_TEST("cuda: Muon's kernels, the products between them apart, match the formula") {
  struct Case {
    int out, in, count;
  };
  for (const Case& c : {Case{1, 1, 1}, {5, 3, 2}, {3, 70, 1}, {48, 48, 2}, {100, 33, 3}}) {
    const int out = c.out;
    const int in = c.in;
    const int count = c.count;
    CAPTURE(out);
    CAPTURE(in);
    const int rows = std::min(out, in), columns = std::max(out, in), size = out * in;
    const bool tall = out > in;
    const float mu = .9f, lr = .02f, decay = .1f, scale = .5f;
    std::vector<int64_t> offsets;
    for (int i = 0; i < count; i++) offsets.push_back(3 + (count - 1 - i) * (size + 5));
    const int64_t arena = 3 + count * (size + 5);
    const Doubles w0 = random<float>(arena, "w"), g = random<float>(arena, "g"),
                  m0 = random<float>(arena, "m");

    Doubles m = m0, x0, w = w0;  // x0: X before the steps
    for (const int64_t offset : offsets) {
      Doubles u(static_cast<size_t>(size));
      double square = 0;
      for (int i = 0; i < size; i++) {
        const size_t at = size_t(offset + i);
        const double grad = g[at] * double(scale);
        m[at] = double(mu) * m[at] + (1 - double(mu)) * grad;
        const double ui = double(mu) * m[at] + (1 - double(mu)) * grad;
        u[size_t(tall ? i % in * out + i / in : i)] = ui;
        square += ui * ui;
      }
      for (double& x : u) x0.push_back(x / (std::sqrt(square) + 1e-7));
    }
    every_schedule([&] {
      const OnDevice<float> w_(w0), g_(g), m_(m0);
      const OnDevice<float> squares(int64_t(count) * kMuonBlocks);
      const OnDevice<bf16> copy(w0);
      const OnDevice<int64_t> offsets_(offsets);
      const OnDevice<A> x_(int64_t(x0.size()));
      const MuonBatch batch{offsets_, count, out, in};
      const OnDevice<DeviceStep> skipped(std::vector<DeviceStep>{{1, scale, 1, 0, 0}});
      const OnDevice<DeviceStep> step(std::vector<DeviceStep>{{1, scale, 0, 0, 0}});
      muon_momentum(m_, squares, g_, batch, mu, skipped, nullptr);
      CHECK(m_.read() == m0);
      muon_momentum(m_, squares, g_, batch, mu, step, nullptr);
      CHECK_CLOSE(m_.read(), m, kFloat);
      muon_begin<A>(x_, squares, g_, m_, batch, mu, step, nullptr);
      CHECK_CLOSE(x_.read(), x0, tolerance<A>());

      // The last step, of an X as it may be
      const Doubles x = random<A>(int64_t(count) * rows * columns, "X");
      x_.write(x);
      Doubles want = w0;
      for (int k = 0; k < count; k++) {
        for (int o = 0; o < out; o++) {
          for (int i = 0; i < in; i++) {
            double& wi = want[size_t(offsets[size_t(k)] + o * in + i)];
            const double xi = x[size_t(k * size + (tall ? i * columns + o : o * columns + i))];
            wi -=
                double(lr) * (std::sqrt(std::max(1., double(out) / in)) * xi + double(decay) * wi);
          }
        }
      }
      muon_update<A>(w_, copy, x_, batch, lr, decay, skipped, nullptr);
      CHECK(w_.read() == w0);
      muon_update<A>(w_, copy, x_, batch, lr, decay, step, nullptr);
      CHECK_CLOSE(w_.read(), want, kFloat);
      Doubles rounded;
      for (const double v : w_.read()) rounded.push_back(as_double(as<bf16>(v)));
      CHECK(copy.read() == rounded);
    });
  }
}

// -------------------------------------------------------------------------------------------------
// Sampling

// sample_row's rules by sorting, in double.
int plain_sample(Doubles x, const SampleRow& how, const std::vector<int>& history,
                 const std::vector<LogitBias>& biases) {
  const int V = int(x.size());
  const std::set<int> seen(history.begin() + how.history_begin, history.begin() + how.history_end);
  for (const int id : seen) {
    if (id < V)
      x[size_t(id)] *= std::pow(double(how.repetition_penalty), x[size_t(id)] > 0 ? -1 : 1);
  }
  for (int b = how.bias_begin; b < how.bias_end; b++) {
    if (biases[size_t(b)].id < V) x[size_t(biases[size_t(b)].id)] += double(biases[size_t(b)].bias);
  }
  std::vector<int> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return x[size_t(a)] > x[size_t(b)]; });
  if (how.temperature == 0) return order[0];
  Doubles p(x.size());
  const double highest = x[size_t(order[0])];
  for (size_t j = 0; j < x.size(); j++) {
    p[j] = std::exp((x[j] - highest) / double(how.temperature));
    if (p[j] < double(how.min_p)) p[j] = 0;
  }
  size_t kept = how.top_k > 0 ? std::min(x.size(), size_t(how.top_k)) : x.size();
  double total = 0, reached = 0;
  for (size_t i = 0; i < kept; i++) total += p[size_t(order[i])];
  if (how.top_p < 1) {
    size_t i = 0;
    while (i < kept && reached < double(how.top_p) * total) reached += p[size_t(order[i++])];
    kept = std::max<size_t>(1, i);
  }
  for (size_t i = kept; i < order.size(); i++) p[size_t(order[i])] = 0;
  total = std::accumulate(p.begin(), p.end(), 0.);
  double left = total * uniform01(mix64(how.seed, how.stream, how.position));
  for (int j = 0; j < V; j++) {
    if (left < p[size_t(j)]) return j;
    left -= p[size_t(j)];
  }
  return order[0];
}

KERNEL_TEST("cuda: sampling follows its rules, ties and limits included") {
  struct Case {
    int V;
    double grid;  // logits are multiples of it: ties
    int draws;
  };
  for (const Case& c : {Case{1, 1, 2}, {5, 1, 4}, {257, .5, 3}, {3000, .25, 1}}) {
    const int V = c.V;
    const double grid = c.grid;
    const int draws = c.draws;
    CAPTURE(V);
    Doubles logits = random<A>(V, "logits", 2);
    for (double& x : logits) x = std::round(x / grid) * grid;
    const auto history = random_ids(12, V + 3, "history");
    std::vector<LogitBias> biases;
    for (int id = 0; id < V + 3; id += 1 + V / 9) {
      biases.push_back({id, float(grid * (id % 2 ? 3 : -2))});
    }
    std::vector<SampleRow> rows;
    Rng rng{5};
    const auto add = [&](SampleRow r) {
      for (int i = 0; i < draws; i++) {
        r.seed = rng.next(), r.stream = uint64_t(i), r.position = 100 + uint64_t(i);
        rows.push_back(r);
      }
    };
    const SampleRow one{};
    add(one);
    for (const float temperature : {0.f, .5f, 1.7f}) {
      SampleRow r = one;
      r.temperature = temperature;
      add(r);
      for (const int top_k : {1, 3, 40, V}) r.top_k = top_k, add(r);
      for (const float top_p : {0.f, .1f, .5f, .9f}) r.top_p = top_p, add(r), r.top_k = 7, add(r);
      r = one, r.temperature = temperature;
      r.min_p = .2f, add(r);
      r.top_p = .7f, add(r);
      r = one, r.temperature = temperature;
      r.repetition_penalty = 1.5f, r.history_begin = 2, r.history_end = 12, add(r);
      r.bias_begin = 1, r.bias_end = int(biases.size()), add(r);
      r.vocab = std::max(1, V / 2), r.top_k = 3, add(r);
    }
    std::vector<int> want;
    Doubles want_logp;
    for (const SampleRow& r : rows) {
      Doubles x(logits.begin(), logits.begin() + (r.vocab ? r.vocab : V));
      want.push_back(plain_sample(x, r, history, biases));
      double entropy;
      want_logp.emplace_back();
      plain::classifier_forward<double>(V, logits.data(), want.back(),
                                        r.temperature > 0 ? double(r.temperature) : 1.,
                                        want_logp.back(), entropy);
    }
    const int count = int(rows.size()), ld = V + 7;
    Doubles padded;
    for (int r = 0; r < count; r++) {
      padded.insert(padded.end(), logits.begin(), logits.end());
      padded.insert(padded.end(), 7, 1e9);  // would win
    }
    const auto run = [&] {
      const OnDevice<A> logits_(padded);
      const OnDevice<SampleRow> rows_(rows);
      const OnDevice<int> history_(history), ids(count);
      const OnDevice<LogitBias> biases_(biases);
      const OnDevice<float> logp(count), scratch(int64_t(count) * V);
      sample<A>(ids, logp, logits_, ld, V, rows_, history_, biases_, count, scratch, nullptr);
      const std::vector<int> got = ids.raw();
      for (size_t r = 0; r < rows.size(); r++) {
        CAPTURE(r);
        CAPTURE(rows[r].temperature);
        CAPTURE(rows[r].top_k);
        CAPTURE(rows[r].top_p);
        CAPTURE(rows[r].repetition_penalty);
        CHECK(got[r] == want[r]);
      }
      CHECK_CLOSE(logp.read(), want_logp, kFloat);
    };
    if (V > 1000)
      run();
    else
      every_schedule(run);
  }
}

KERNEL_TEST("cuda: nucleus sampling stops at a sum it meets exactly") {
  // Four equal tokens, half of the mass: the first two. top_k among equals: the smaller ids.
  const OnDevice<A> logits(Doubles{-9, 1, -9, 1, 1, 1, -9});
  std::set<int> by_p, by_k;
  for (int i = 0; i < 40; i++) {
    SampleRow r;
    r.temperature = .1f, r.top_p = .5f, r.position = uint64_t(i);
    SampleRow k = r;
    k.top_p = 1, k.top_k = 3;
    const OnDevice<SampleRow> rows(std::vector<SampleRow>{r, k});
    const OnDevice<A> both(Doubles{-9, 1, -9, 1, 1, 1, -9, -9, 1, -9, 1, 1, 1, -9});
    const OnDevice<int> ids(2);
    const OnDevice<float> logp(2), scratch(14);
    sample<A>(ids, logp, both, 7, 7, rows, nullptr, nullptr, 2, scratch, nullptr);
    by_p.insert(ids.raw()[0]);
    by_k.insert(ids.raw()[1]);
  }
  CHECK(by_p == std::set<int>{1, 3});
  CHECK(by_k == std::set<int>{1, 3, 4});
}

KERNEL_TEST("cuda: scores are of the whole row, and the likeliest of the vocabulary in order") {
  for (const int V : {1, 5, 257, 3000}) {
    CAPTURE(V);
    const int ld = V + 7, top_ld = 4;
    std::vector<ScoreRow> rows = {{-1, V, std::min(V, 4)},
                                  {V - 1, V, 0},
                                  {0, V, -1},
                                  {V / 2, (V + 1) / 2, std::min(V / 2, 3)}};
    const std::vector<int> sampled = {V / 3, 0, 0, 0};
    Doubles logits, padded;
    for (size_t r = 0; r < rows.size(); r++) {
      Doubles x = random<A>(V, concat("logits", r).c_str(), 2);
      for (double& v : x) v = std::round(v / .25) * .25;  // ties
      logits.insert(logits.end(), x.begin(), x.end());
      padded.insert(padded.end(), x.begin(), x.end());
      padded.insert(padded.end(), 7, 1e9);
    }
    const auto run = [&] {
      const OnDevice<A> logits_(padded);
      const OnDevice<ScoreRow> rows_(rows);
      const OnDevice<int> ids(sampled);
      const OnDevice<float> logp(4);
      const OnDevice<int> rank(4);
      const OnDevice<TopToken> top(16);
      score<A>(logp, rank, top, top_ld, logits_, ld, V, rows_, ids, 4, nullptr);
      const auto got_logp = logp.raw();
      const auto got_rank = rank.raw();
      const auto got_top = top.raw();
      for (size_t r = 0; r < rows.size(); r++) {
        CAPTURE(r);
        if (rows[r].top < 0) continue;
        const double* x = logits.data() + r * size_t(V);
        const auto want = [&](int id) {
          double logp_want, entropy;
          plain::classifier_forward<double>(V, x, id, 1., logp_want, entropy);
          return logp_want;
        };
        const int id = rows[r].id >= 0 ? rows[r].id : sampled[r];
        CHECK(std::abs(double(got_logp[r]) - want(id)) < 1e-5);
        std::vector<int> order(size_t(rows[r].vocab));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
        int likelier = 0;
        for (const int other : order) {
          likelier += x[other] > x[id] || (x[other] == x[id] && other < id);
        }
        CHECK(got_rank[r] == 1 + likelier);
        for (int k = 0; k < rows[r].top; k++) {
          const TopToken& t = got_top[r * 4 + size_t(k)];
          CHECK(t.id == order[size_t(k)]);
          CHECK(std::abs(double(t.logp) - want(t.id)) < 1e-5);
        }
      }
    };
    if (V > 1000)
      run();
    else
      every_schedule(run);
  }
}

#undef CHECK_CLOSE
#undef KERNEL_TEST

}  // namespace kernel_test

// Attention on a device against its definition in cake/layers.h, computed in double from the
// numbers that the device was given. Every matrix is strided: q, k and v are columns of one buffer,
// so are dq, dk and dv, and no column or row beside them may change.

namespace cake::gpu::attention_test {

struct Shape {
  int NH, NKV, HS;
  std::vector<int> documents;  // their lengths
  int N() const { return std::accumulate(documents.begin(), documents.end(), 0); }
  int group() const { return NH / NKV; }
  // Rows of q, k, v side by side, and a gap of 16 that nothing uses
  int ld() const { return (NH + 2 * NKV) * HS + 16; }
  std::string text() const {
    std::string s = "heads " + std::to_string(NH) + ":" + std::to_string(NKV) + ", head size " +
                    std::to_string(HS) + ", documents";
    for (const int d : documents) s += " " + std::to_string(d);
    return s;
  }
};

// What attention takes, as it is stored
template <class A>
struct Input {
  std::vector<A> qkv, dout;  // (N, ld), (N, NH HS)
  std::vector<int> start, end;
  explicit Input(const Shape& s) {
    Rng rng{uint64_t(s.N() + 1000 * s.HS + s.NH)};
    for (int64_t i = 0; i < int64_t(s.N()) * s.ld(); i++) qkv.push_back(as<A>(rng.normal()));
    for (int64_t i = 0; i < int64_t(s.N()) * s.NH * s.HS; i++) dout.push_back(as<A>(rng.normal()));
    int at = 0;
    for (const int length : s.documents) {
      start.insert(start.end(), size_t(length), at);
      at += length;
      end.insert(end.end(), size_t(length), at);
    }
  }
};

// What attention should give, in double, and by how much bf16 may miss it, element by element.
//
// bf16 has 8 significant bits: storing x errs by at most u |x|, u = 2^-8. The kernels store p, ds
// and their results in bf16 and all else in fp32, and delta comes from `out` as it was stored. So,
// to first order, with E[t] = sum_d |dout[t,d]| bound(out[t,d]) for the error of delta:
//   out  u sum_s p |v| + u |out|                   dq  sum_s (u |ds| + p E[t]) |k| + u |dq|
//   dv   u sum_t p |dout| + u |dv|                 dk  sum_t (u |ds| + p E[t]) |q| + u |dk|
// The next order and fp32 are given a twentieth of that and 2e-6.
struct Expected {
  std::vector<double> out, lse, dqkv;  // (N, NH HS), (NH, N), (N, ld)
  std::vector<double> out_bound, dqkv_bound;
};

template <class A>
Expected expect(const Shape& s, const Input<A>& in) {
  const double u = 1 / 256., scale = 1 / std::sqrt(double(s.HS));
  const int N = s.N(), HS = s.HS, ld = s.ld(), C = s.NH * HS;
  Expected e;
  e.out.resize(size_t(N) * C), e.out_bound = e.out;
  e.dqkv.resize(size_t(N) * ld), e.dqkv_bound = e.dqkv;
  e.lse.resize(size_t(s.NH) * N);
  int first = 0;
  for (const int T : s.documents) {
    for (int h = 0; h < s.NH; h++) {
      const int at[3] = {h * HS, C + h / s.group() * HS, C + (s.NKV + h / s.group()) * HS};
      std::vector<double> x[3], dx[3], dout(size_t(T) * HS), out(size_t(T) * HS), p(size_t(T) * T);
      for (int i = 0; i < 3; i++) {
        x[i].resize(size_t(T) * HS), dx[i].resize(size_t(T) * HS);
        for (int t = 0; t < T; t++)
          for (int d = 0; d < HS; d++)
            x[i][t * HS + d] = as_double(in.qkv[size_t(first + t) * ld + at[i] + d]);
      }
      for (int t = 0; t < T; t++)
        for (int d = 0; d < HS; d++)
          dout[t * HS + d] = as_double(in.dout[size_t(first + t) * C + h * HS + d]);
      plain::attention_forward(T, HS, x[0].data(), x[1].data(), x[2].data(), HS, out.data(), HS,
                               p.data());
      plain::attention_backward(T, HS, x[0].data(), x[1].data(), x[2].data(), HS, p.data(),
                                dout.data(), HS, dx[0].data(), dx[1].data(), dx[2].data());
      for (int t = 0; t < T; t++) {
        const size_t row = size_t(first + t);
        double self = 0, mean = 0, delta_bound = 0;
        for (int d = 0; d < HS; d++) {
          const double value = out[t * HS + d];
          double bound = u * std::abs(value);
          for (int m = 0; m <= t; m++) bound += u * p[t * T + m] * std::abs(x[2][m * HS + d]);
          e.out[row * C + h * HS + d] = value;
          e.out_bound[row * C + h * HS + d] = bound;
          self += x[0][t * HS + d] * x[1][t * HS + d] * scale;
          mean += dout[t * HS + d] * value;
          delta_bound += std::abs(dout[t * HS + d]) * bound;
          for (int i = 0; i < 3; i++) e.dqkv[row * ld + at[i] + d] += dx[i][t * HS + d];
        }
        e.lse[size_t(h) * N + row] = self - std::log(p[t * T + t]);
        for (int m = 0; m <= t; m++) {
          double dp = 0;
          for (int d = 0; d < HS; d++) dp += dout[t * HS + d] * x[2][m * HS + d];
          const double pe = p[t * T + m], ds = u * std::abs(pe * (dp - mean)) + pe * delta_bound;
          for (int d = 0; d < HS; d++) {
            e.dqkv_bound[row * ld + at[0] + d] += scale * ds * std::abs(x[1][m * HS + d]);
            double* key_bound = e.dqkv_bound.data() + size_t(first + m) * ld;
            key_bound[at[1] + d] += scale * ds * std::abs(x[0][t * HS + d]);
            key_bound[at[2] + d] += u * pe * std::abs(dout[t * HS + d]);
          }
        }
      }
    }
    first += T;
  }
  for (size_t i = 0; i < e.dqkv.size(); i++) e.dqkv_bound[i] += u * std::abs(e.dqkv[i]);
  return e;
}

// What a device gave
template <class A>
struct Result {
  std::vector<A> out, dqkv;
  std::vector<float> lse;
};

inline constexpr double kUntouched = -77;  // fills what no kernel may write

template <class A>
Result<A> compute(const Shape& s, const Input<A>& in) {
  const int N = s.N(), C = s.NH * s.HS, k = C, v = C + s.NKV * s.HS, ld = s.ld();
  const OnDevice<A> qkv(in.qkv), dout(in.dout);
  const OnDevice<A> dqkv(std::vector<A>(size_t(N) * ld + 64, as<A>(kUntouched)));
  const OnDevice<A> out(std::vector<A>(size_t(N) * C + 64, as<A>(kUntouched)));
  const OnDevice<float> lse(std::vector<float>(size_t(s.NH) * N + 16, float(kUntouched)));
  const OnDevice<float> delta(size_t(s.NH) * N);
  const OnDevice<int> start(in.start), end(in.end);
  const AttentionShape shape{N, s.NH, s.NKV, s.HS, start, end};
  const AttentionInput<A> heads{qkv, qkv + k, qkv + v, ld, ld, ld};
  attention_forward<A>(out, lse, heads, shape, nullptr);
  attention_backward<A>(dqkv, ld, dqkv + k, dqkv + v, ld, dout, out, lse, delta, heads, shape,
                        nullptr);
  return {out.raw(), dqkv.raw(), lse.raw()};
}

// ||got - expected|| / ||expected|| over columns [begin, end) of rows of ld; NaN when any is not
// finite
template <class A>
double relative(const std::vector<A>& got, const std::vector<double>& expected, int N, int ld,
                int begin, int end) {
  double error = 0, norm = 0;
  for (int n = 0; n < N; n++)
    for (int c = begin; c < end; c++) {
      const double x = as_double(got[size_t(n) * ld + c]), y = expected[size_t(n) * ld + c];
      error += (x - y) * (x - y), norm += y * y;
    }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

// The largest |got - expected| / bound over the same; infinite where one is not a number
template <class A>
double worst(const std::vector<A>& got, const std::vector<double>& expected,
             const std::vector<double>& bound, int N, int ld, int begin, int end) {
  double most = 0;
  for (int n = 0; n < N; n++)
    for (int c = begin; c < end; c++) {
      const size_t i = size_t(n) * ld + c;
      const double ratio = std::abs(as_double(got[i]) - expected[i]) / (1.05 * bound[i] + 2e-6);
      if (!(ratio <= most)) most = std::isnan(ratio) ? INFINITY : ratio;
    }
  return most;
}

template <class A>
bool same_bits(const std::vector<A>& a, const std::vector<A>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(A)) == 0;
}

// The tensors of one result against what is expected of them
template <class A>
void compare(const Shape& s, const Expected& e, const Result<A>& r) {
  const int N = s.N(), C = s.NH * s.HS, k = C, v = C + s.NKV * s.HS, end = v + s.NKV * s.HS;
  const int ld = s.ld();
  const auto compare_one = [&](const char* name, const std::vector<A>& got,
                               const std::vector<double>& expected,
                               const std::vector<double>& bound, int row, int from, int to) {
    INFO(name);
    if constexpr (std::is_same_v<A, float>) {
      // A tensor that is zero (dq, dk of documents of one token) is met to rounding error alone.
      CHECK(relative(got, expected, N, row, from, to) < 1e-5);
    } else {
      CHECK(worst(got, expected, bound, N, row, from, to) < 1);
      // Roundings go up as often as down: a whole tensor errs by less than u.
      CHECK(relative(got, expected, N, row, from, to) < 1 / 256.);
    }
  };
  compare_one("out", r.out, e.out, e.out_bound, C, 0, C);
  compare_one("dq", r.dqkv, e.dqkv, e.dqkv_bound, ld, 0, k);
  compare_one("dk", r.dqkv, e.dqkv, e.dqkv_bound, ld, k, v);
  compare_one("dv", r.dqkv, e.dqkv, e.dqkv_bound, ld, v, end);
  // In fp32 throughout, from scores of HS products each
  double lse_error = 0;
  for (size_t i = 0; i < e.lse.size(); i++) {
    const double error = std::abs(r.lse[i] - e.lse[i]);
    if (!(error <= lse_error)) lse_error = std::isnan(error) ? INFINITY : error;
  }
  CHECK(lse_error < 1e-5);
  int touched = 0;
  for (size_t i = 0; i < r.dqkv.size(); i++) {
    const bool gap = i >= size_t(N) * ld || int(i % ld) >= end;
    touched += gap && as_double(r.dqkv[i]) != kUntouched;
  }
  for (size_t i = size_t(N) * C; i < r.out.size(); i++)
    touched += as_double(r.out[i]) != kUntouched;
  for (size_t i = size_t(s.NH) * N; i < r.lse.size(); i++) touched += r.lse[i] != float(kUntouched);
  CHECK(touched == 0);
}

template <class A>
void run(const Shape& s) {
  const std::string what = s.text();
  INFO(what);
  const Input<A> in(s);
  compare<A>(s, expect<A>(s, in), compute<A>(s, in));
}

// Tiles are 32, 64 and 128 rows: documents that end at, before and after their borders, that cross
// them, that fill several, and many in one.
inline const std::vector<std::vector<int>>& layouts() {
  static const std::vector<std::vector<int>> all = {
      {1},
      {1, 1, 1},
      {63},
      {64},
      {65},
      {129},
      {300},
      {32, 32, 64, 1},
      {40, 50, 60},
      {1, 2, 1, 3, 1, 30, 1, 26, 64, 1, 70},
      {127, 1, 1, 65},
      {5, 180, 9},
  };
  return all;
}

}  // namespace cake::gpu::attention_test

TEST_CASE("cuda: attention in fp32 is its definition, on every layout of documents") {
  using namespace cake::gpu::attention_test;
  for (const auto& documents : layouts()) run<float>({2, 1, 16, documents});
}

TEST_CASE("cuda: attention in fp32 is its definition, for every head size and grouping") {
  using namespace cake::gpu::attention_test;
  const std::vector<int> documents = {20, 1, 45};
  for (const int HS : {7, 32, 48, 64, 80, 128}) run<float>({2, 2, HS, documents});
  run<float>({4, 2, 32, documents});
  run<float>({6, 1, 16, documents});
}

TEST_CASE(
    "cuda: attention in bf16 is its definition within rounding, on every layout of documents") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  for (const auto& documents : layouts()) run<bf16>({2, 1, 16, documents});
  for (const auto& documents : layouts()) run<bf16>({1, 1, 80, documents});
}

TEST_CASE("cuda: attention in bf16 is its definition within rounding, for every head size") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  const std::vector<int> documents = {20, 1, 120, 9};
  for (const int HS : {16, 32, 48, 64, 80, 128}) run<bf16>({2, 2, HS, documents});
  // Rows that are not whole chunks of 16 bytes go without tensor cores.
  for (const int HS : {20, 100}) run<bf16>({2, 2, HS, {20, 1, 45}});
}

TEST_CASE("cuda: grouped heads meet their own keys, and a key's gradient is the group's sum") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  for (const int HS : {64, 128}) {
    run<bf16>({4, 2, HS, {70, 30}});
    run<bf16>({6, 1, HS, {70, 30}});
  }
}

TEST_CASE("cuda: attention has the same bits in every order of threads") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  const auto all_same = [](auto zero, const Shape& s) {
    using A = decltype(zero);
    const std::string what = s.text();
    INFO(what);
    const Input<A> in(s);
    const Expected e = expect<A>(s, in);
    std::vector<Result<A>> results;
    cake::gpu::every_schedule([&] { results.push_back(compute<A>(s, in)); });
    for (const Result<A>& r : results) {
      compare<A>(s, e, r);
      CHECK(same_bits(r.out, results[0].out));
      CHECK(same_bits(r.lse, results[0].lse));
      CHECK(same_bits(r.dqkv, results[0].dqkv));
    }
  };
  all_same(0.f, {4, 2, 32, {3, 100, 1, 30}});
  all_same(bf16{}, {4, 2, 64, {3, 200, 1, 90}});
  all_same(bf16{}, {2, 1, 128, {3, 150, 1, 40}});
}

TEST_CASE("cuda: a head size or a grouping that attention cannot take is an error that says so") {
  using namespace cake::gpu::attention_test;
  const auto error = [](int NH, int NKV, int HS) {
    return cake::error_of([&] {
      cake::gpu::attention_forward<float>(nullptr, nullptr, {}, {1, NH, NKV, HS, nullptr, nullptr},
                                          nullptr);
    });
  };
  CHECK(cake::contains(error(1, 1, 129), "head size 129, expected 1 to 128"));
  CHECK(cake::contains(error(3, 2, 64), "3 query heads, expected a multiple of the 2"));
}

namespace cake::gpu::attention_test {

// Rows of a cache, as documents of a packed batch, appended in two parts to pages in shuffled
// order; then every token of `asked` attends through the cache to what precedes it.
template <class A>
struct Cached {
  int max_pages = 0;
  int64_t layer_size = 0;  // keys of a page; its values follow
  std::vector<int> row_of, position;
  std::unique_ptr<OnDevice<A>> memory;
  std::vector<A*> table;

  Cached(const Shape& s, const Input<A>& in) {
    int pages = 0;
    for (const int length : s.documents) {
      max_pages = std::max(max_pages, (length + kPage - 1) / kPage);
      pages += (length + kPage - 1) / kPage;
    }
    std::vector<int> order(size_t(pages) + 2);  // two pages are not used
    std::iota(order.begin(), order.end(), 0);
    Rng rng{11};
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[rng.next() % (i + 1)]);
    layer_size = int64_t(s.NKV) * kPage * s.HS;
    memory = std::make_unique<OnDevice<A>>(order.size() * size_t(2 * layer_size));
    table.assign(s.documents.size() * size_t(max_pages), nullptr);
    int taken = 0;
    for (size_t r = 0; r < s.documents.size(); r++)
      for (int t = 0; t < s.documents[r]; t++) {
        A*& page = table[r * size_t(max_pages) + size_t(t / kPage)];
        if (!page) page = *memory + order[size_t(taken++)] * 2 * layer_size;
        row_of.push_back(int(r)), position.push_back(t);
      }
    const OnDevice<A> qkv(in.qkv);
    const OnDevice<int> rows(row_of), positions(position);
    const OnDevice<A*> on_device(table);
    const PageTable<A> t = page_table(on_device);
    const int k = s.NH * s.HS, v = k + s.NKV * s.HS, ld = s.ld(), half = s.N() / 2;
    if (half > 0) {
      cache_append<A>(t, qkv + k, qkv + v, ld, rows, positions, half, s.NKV, s.HS, nullptr);
    }
    const A* rest = qkv + size_t(half) * ld;
    cache_append<A>(t, rest + k, rest + v, ld, rows + half, positions + half, s.N() - half, s.NKV,
                    s.HS, nullptr);
    check(cudaDeviceSynchronize(), "cache_append");
  }
  PageTable<A> page_table(A* const* on_device) const {
    return {on_device, max_pages, 0, layer_size};
  }

  // out (asked, NH HS)
  std::vector<A> attend(const Shape& s, const Input<A>& in, const std::vector<int>& asked) const {
    std::vector<A> q;
    std::vector<int> rows, positions;
    for (const int n : asked) {
      q.insert(q.end(), in.qkv.begin() + int64_t(n) * s.ld(),
               in.qkv.begin() + int64_t(n + 1) * s.ld());
      rows.push_back(row_of[size_t(n)]), positions.push_back(position[size_t(n)]);
    }
    const OnDevice<A> queries(q), out(asked.size() * size_t(s.NH * s.HS));
    const OnDevice<int> r(rows), p(positions);
    const OnDevice<A*> t(table);
    cache_attention<A>(out, queries, s.ld(), page_table(t), nullptr, r, p, int(asked.size()), s.NH,
                       s.NKV, s.HS, nullptr);
    return out.raw();
  }

  // The same of all tokens, in calls that end at these positions of every row: by tiles where a row
  // has several tokens in a call. The cache holds the keys of later calls already.
  std::vector<A> prefill(const Shape& s, const Input<A>& in, const std::vector<int>& ends) const {
    const size_t C = size_t(s.NH * s.HS), ld = size_t(s.ld());
    std::vector<A> all(size_t(s.N()) * C);
    for (size_t call = 0; call < ends.size(); call++) {
      NewTokens added{.starts = {0}};
      std::vector<int> tokens;  // of the batch
      std::vector<A> q;
      for (size_t r = 0, first = 0; r < s.documents.size(); first += size_t(s.documents[r++])) {
        const int begin = std::min(call ? ends[call - 1] : 0, s.documents[r]);
        for (int t = begin; t < std::min(ends[call], s.documents[r]); t++) {
          tokens.push_back(int(first) + t);
          const auto row = in.qkv.begin() + int64_t((first + size_t(t)) * ld);
          q.insert(q.end(), row, row + int64_t(ld));
        }
        added.starts.push_back(int(tokens.size())), added.lengths.push_back(begin);
      }
      const QuerySplit split = split_queries(added);
      std::vector<int> rows, positions;
      for (const int n : tokens) {
        rows.push_back(row_of[size_t(n)]), positions.push_back(position[size_t(n)]);
      }
      const int N = int(tokens.size()), tiles = int(split.tiles.size());
      const OnDevice<A> queries(q), out(std::vector<A>(tokens.size() * C, as<A>(kUntouched)));
      const OnDevice<int> r(rows), p(positions), single(split.single);
      const OnDevice<QueryTile> t(split.tiles);
      const OnDevice<A*> pages(table);
      const AttentionInput<A> heads{queries, queries, queries, s.ld(), s.ld(), s.ld()};
      if (tiles > 0) {
        cache_prefill<A>(out, heads, page_table(pages), t, tiles, N, s.NH, s.NKV, s.HS, nullptr);
      }
      if (const int count = int(split.single.size()); count > 0) {
        cache_attention<A>(out, queries, s.ld(), page_table(pages), single, r, p, count, s.NH,
                           s.NKV, s.HS, nullptr);
      }
      const std::vector<A> got = out.raw();
      for (size_t i = 0; i < tokens.size(); i++)
        std::copy_n(got.begin() + int64_t(i * C), C, all.begin() + int64_t(size_t(tokens[i]) * C));
    }
    return all;
  }
};

template <class A>
void run_prefill(const Shape& s) {
  const std::string what = s.text();
  INFO(what);
  const Input<A> in(s);
  const Expected e = expect<A>(s, in);
  const Cached<A> cache(s, in);
  const int C = s.NH * s.HS, longest = *std::max_element(s.documents.begin(), s.documents.end());
  const std::vector<std::vector<int>> cuts = {
      {longest}, {128, longest}, {64, 65, longest}, {3, 40, 170, longest}};
  std::vector<std::vector<A>> results;
  for (const std::vector<int>& ends : cuts) {
    const std::vector<A>& out = results.emplace_back(cache.prefill(s, in, ends));
    if constexpr (std::is_same_v<A, float>) {
      CHECK(relative(out, e.out, s.N(), C, 0, C) < 1e-5);
    } else {
      CHECK(worst(out, e.out, e.out_bound, s.N(), C, 0, C) < 1);
      CHECK(relative(out, e.out, s.N(), C, 0, C) < 1 / 256.);
    }
    // However the calls are cut, a token that is not alone in one has the same bits.
    for (size_t n = 0, at = 0; n < results[0].size(); n += size_t(C), at++) {
      const int t = cache.position[at], length = s.documents[size_t(cache.row_of[at])];
      const auto alone = [&](const std::vector<int>& ends) {
        int begin = 0;
        for (int end : ends) {
          end = std::min(end, length);
          if (t >= begin && t < end) return end - begin == 1;
          begin = end;
        }
        return false;
      };
      if (alone(ends) || alone(cuts[0])) continue;
      if (std::memcmp(&out[n], &results[0][n], size_t(C) * sizeof(A)) != 0) {
        FAIL("position ", t, " of ", length, " has other bits");
      }
    }
  }
}

template <class A>
void run_cache(const Shape& s) {
  const std::string what = s.text();
  INFO(what);
  const Input<A> in(s);
  const Expected e = expect<A>(s, in);
  const Cached<A> cache(s, in);
  const std::vector<A> packed = compute<A>(s, in).out;
  std::vector<int> asked;  // in no order: the first and last three of a row, and some between
  for (int n = s.N(); n-- > 0;) {
    const int t = cache.position[size_t(n)],
              last = s.documents[size_t(cache.row_of[size_t(n)])] - 1;
    if (t < 3 || t > last - 3 || t % 61 == 0) asked.push_back(n);
  }
  const size_t C = size_t(s.NH * s.HS);
  const std::vector<A> out = cache.attend(s, in, asked);
  std::vector<double> expected, bound, packed_rows, both;
  for (const int n : asked)
    for (size_t c = size_t(n) * C; c < size_t(n + 1) * C; c++) {
      expected.push_back(e.out[c]), packed_rows.push_back(as_double(packed[c]));
      // p stays in fp32 here: the result alone is rounded.
      bound.push_back(std::abs(e.out[c]) / 256), both.push_back(bound.back() + e.out_bound[c]);
    }
  const int rows = int(asked.size());
  if constexpr (std::is_same_v<A, float>) {
    CHECK(relative(out, expected, rows, int(C), 0, int(C)) < 1e-5);
    CHECK(relative(out, packed_rows, rows, int(C), 0, int(C)) < 1e-5);
  } else {
    CHECK(worst(out, expected, bound, rows, int(C), 0, int(C)) < 1);
    CHECK(worst(out, packed_rows, both, rows, int(C), 0, int(C)) < 1);
  }
  // One token alone
  const size_t some = asked.size() / 2;
  const std::vector<A> alone = cache.attend(s, in, {asked[some]});
  CHECK(same_bits(alone, {out.begin() + int64_t(some * C), out.begin() + int64_t((some + 1) * C)}));
}

}  // namespace cake::gpu::attention_test

TEST_CASE(
    "cuda: attention through the paged cache is packed attention, whoever else is asked for") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  run_cache<float>({2, 2, 16, {1, 64, 65, 2, 130}});
  run_cache<float>({4, 2, 7, {3, 70}});
  run_cache<float>({2, 1, 128, {5, 66}});
  run_cache<bf16>({2, 1, 64, {1, 300, 2}});
  run_cache<bf16>({1, 1, 16, {600}});
  run_cache<bf16>({6, 1, 80, {7, 65}});
  run_cache<bf16>({2, 2, 128, {3, 70}});
  run_cache<bf16>({2, 2, 20, {3, 70}});
}

TEST_CASE("cuda: prompts in calls of any lengths attend through the cache as in one, to the bit") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  run_prefill<float>({2, 1, 16, {300, 1, 129, 65}});
  run_prefill<float>({2, 2, 7, {70, 2}});
  run_prefill<bf16>({2, 1, 64, {300, 1, 129, 65}});
  run_prefill<bf16>({1, 1, 16, {2, 64, 128, 200}});
  run_prefill<bf16>({4, 2, 128, {140, 66}});
  run_prefill<bf16>({1, 1, 80, {300, 33}});
  run_prefill<bf16>({2, 2, 20, {3, 70}});
}

TEST_CASE("cuda: attention through the paged cache has the same bits in every order of threads") {
  using namespace cake::gpu::attention_test;
  using cake::gpu::bf16;
  const Shape s{4, 2, 64, {300, 5}};
  const Input<bf16> in(s);
  std::vector<std::vector<bf16>> results;
  cake::gpu::every_schedule([&] {
    const Cached<bf16> cache(s, in);
    results.push_back(cache.attend(s, in, {0, 150, 299, 304}));
    const std::vector<bf16> tiles = cache.prefill(s, in, {100, 300});
    results.back().insert(results.back().end(), tiles.begin(), tiles.end());
    CHECK(same_bits(results.back(), results[0]));
  });
}

// =============================================================================================
// CudaGpt against CpuGpt, on tiny models that are random everywhere, norms and biases too
//
// Tolerances in fp32 (products without TF32): both engines sum a few hundred terms of mixed sign in
// different orders, so relative errors in norm are a few 1e-7; 1e-5 leaves room for exp, rsqrt and
// two layers. Five optimizer steps: Adam divides by the root of the second moment, so noise of 1e-6
// in a small element becomes noise of 1e-6 of a whole step; 1e-4.
//
// bf16 has 8 significant bits: a rounding is at most 2^-8 of a number, 1.6e-3 of it on average, and
// k of them of independent sign come to sqrt(k) times that. From a token to its logits there are 16
// a layer, weights included (norm, W, qkv, rotated, p, att, W, product, sum, and as many in the
// other half), and 5 more: 37 in two layers, 1e-2 of a logit. Logits deviate by 1 here and are
// divided by a temperature of .7: log-probabilities, of size 5.6, err by 1.4e-2, which is 2.5e-3 of
// them, and the worst of a hundred by three or four times as much: 5e-2. Gradients pass as many
// roundings again and meet activations that are as wrong: sqrt(3 x 37) 1.6e-3 = 1.7e-2, and those
// of attention's scores, p (dp - sum p dp), lose a bit or so to the difference: 3e-2. The bounds
// are twice these or less. A wrong scale, mask or missing term errs by 1e-1 and more.

namespace {

using namespace cake;
using cake::gpu::CudaGpt;

constexpr double kFp32 = 1e-5, kFp32AfterSteps = 1e-4;
constexpr double kBf16Gradient = 6e-2, kBf16Logp = 4e-3, kBf16Worst = 1e-1;
constexpr Family kEngineFamilies[] = {Family::gpt2, Family::llama, Family::qwen3, Family::qwen2};

Config engine_config(Family family, Head head = Head::lm, bool tied = false) {
  Config c;
  c.family = family, c.head = head, c.V = 257, c.T = 100, c.L = 2;
  c.tied = tied || family == Family::gpt2;
  c.norm_eps = family == Family::gpt2 ? 1e-5 : 1e-6;
  if (family == Family::gpt2) c.C = 48, c.NH = 3, c.NKV = 3, c.HS = 16, c.F = 120;
  if (family == Family::llama) c.C = 40, c.NH = 4, c.NKV = 2, c.HS = 16, c.F = 56;
  if (family == Family::qwen3) c.C = 40, c.NH = 2, c.NKV = 1, c.HS = 32, c.F = 72;
  if (family == Family::qwen2) c.C = 48, c.NH = 3, c.NKV = 1, c.HS = 16, c.F = 56;
  if (family == Family::qwen2) c.rope.factor = 2.5, c.rope.linear = true;
  if (family == Family::llama) {  // llama 3's passage between wavelengths, in a context of 100
    c.rope = {
        .theta = 500, .factor = 8, .low_freq_factor = 1, .high_freq_factor = 4, .original_T = 40};
  }
  return c;
}

// Large enough that attention is far from uniform; logits come out with a deviation of 1.
void randomize(Gpt& gpt, uint64_t seed) {
  for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
    const Tensor& t = gpt.table().tensors[i];
    Rng rng{mix64(seed, i)};
    const double std = t.kind == Kind::vector   ? .2
                       : t.kind == Kind::matrix ? 1 / std::sqrt(t.in)
                                                : .15;
    std::vector<float> values(size_t(t.size()));
    for (float& x : values) x = float((t.init_one ? 1 : 0) + std * rng.normal());
    gpt.write(int(i), Slot::weight, values);
  }
}

struct Pair {  // the same model on both engines
  std::unique_ptr<Gpt> cpu, gpu;
  Pair(const Config& c, GptOptions options, uint64_t seed = 7) {
    options.device = Device::cuda;
    gpu = gpu::make_gpt(c, options);
    GptOptions host = options;
    host.device = Device::cpu, host.precision = Precision::automatic,
    host.recompute = Recompute::none;
    host.share = nullptr;
    cpu = make_gpt(c, host);
    randomize(*cpu, seed), randomize(*gpu, seed);
  }
};
constexpr GptOptions kTrainFp32{.precision = Precision::fp32};
constexpr GptOptions kTrainBf16{.precision = Precision::bf16};

struct Packed {
  std::vector<int> tokens, targets, doc_starts{0};
  std::vector<float> dlogp, dentropy, dvalue;
  float temperature = 1;
  Batch batch() const { return {tokens, targets, doc_starts, temperature}; }
};
// Documents of the given lengths; every fifth position or so has no target when `masked`.
Packed packed(const Config& c, std::initializer_list<int> lengths, bool masked, uint64_t seed = 1) {
  Packed p;
  Rng rng{seed};
  for (const int length : lengths) p.doc_starts.push_back(p.doc_starts.back() + length);
  for (int n = 0; n < p.doc_starts.back(); n++) {
    p.tokens.push_back(int(rng.below(uint64_t(c.V))));
    p.targets.push_back(masked && rng.below(5) == 0 ? -1 : int(rng.below(uint64_t(c.V))));
    p.dlogp.push_back(float(rng.normal()));
    p.dentropy.push_back(float(.3 * rng.normal()));
    p.dvalue.push_back(float(rng.normal()));
  }
  return p;
}

std::vector<float> tensor_of(const Gpt& gpt, size_t i, Slot slot) {
  std::vector<float> values(size_t(gpt.table().tensors[i].size()));
  gpt.read(int(i), slot, values);
  return values;
}
std::vector<float> all_of(const Gpt& gpt, Slot slot) {
  std::vector<float> values;
  for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
    const auto t = tensor_of(gpt, i, slot);
    values.insert(values.end(), t.begin(), t.end());
  }
  return values;
}
bool has_no_gradient(const Config& c, const Tensor& t) {  // as in test_plain.cpp
  return c.family == Family::gpt2 && t.name.ends_with(".k.bias");
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double largest = a.size() == b.size() ? 0 : NAN;
  for (size_t i = 0; i < a.size() && i < b.size(); i++) {
    const double d = std::abs(double(a[i]) - double(b[i]));
    if (!(d <= largest)) largest = d;  // NaN stays
  }
  return largest;
}

// Every tensor's slot on both engines. The gradient of gpt2's key biases is rounding noise (softmax
// does not see a constant), so its error is measured against the query bias's gradient beside it.
void check_tensors(const Pair& p, Slot slot, double tolerance, bool key_biases = true) {
  const auto& tensors = p.cpu->table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    CAPTURE(tensors[i].name);
    const auto cpu = tensor_of(*p.cpu, i, slot), gpu = tensor_of(*p.gpu, i, slot);
    if (!tensors[i].trainable) {  // untouched
      CHECK(largest_difference(gpu, cpu) == 0);
      continue;
    }
    if (has_no_gradient(p.cpu->config(), tensors[i])) {
      if (!key_biases) continue;
      const auto scale = tensor_of(*p.cpu, i - 1, slot);  // q.bias
      double difference = 0, norm = 0;
      for (size_t j = 0; j < cpu.size(); j++) {
        difference += std::pow(double(cpu[j]) - double(gpu[j]), 2);
        norm += std::pow(double(scale[j]), 2);
      }
      CHECK(norm > 0);
      CHECK(std::sqrt(difference / norm) < tolerance);
      continue;
    }
    CHECK(rel_error(gpu, cpu) < tolerance);
  }
}
void check_logp(const Pair& p, bool bf16) {
  const auto check = [&](std::span<const float> gpu, std::span<const float> cpu) {
    CHECK(rel_error(gpu, cpu) < (bf16 ? kBf16Logp : kFp32));
    CHECK(largest_difference(gpu, cpu) < (bf16 ? kBf16Worst : 10 * kFp32));
  };
  check(p.gpu->logp(), p.cpu->logp());
  check(p.gpu->entropy(), p.cpu->entropy());
}

// Two accumulated batches through both engines: masked and not, by forward and backward and by
// forward_backward, log-probabilities on the way.
void check_gradients(const Config& c, bool bf16, Lora lora = {}) {
  GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
  options.lora = lora;
  Pair p(c, options);
  const double tolerance = bf16 ? kBf16Gradient : kFp32;
  Packed first = packed(c, {17, 1, 66, 30}, true, 1), second = packed(c, {40, 33}, false, 2);
  first.temperature = .7f;
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->forward(first.batch(), Pass::train);
  check_logp(p, bf16);
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->backward(first.dlogp, {}, first.dentropy);
  check_tensors(p, Slot::gradient, tolerance);
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
    gpt->forward_backward(second.batch(), second.dlogp, {}, second.dentropy);
  }
  check_logp(p, bf16);
  check_tensors(p, Slot::gradient, tolerance);
}

struct Restore {  // globals that a test sets
  ~Restore() {
    gpu::fusion = gpu::Fusion::measured, gpu::most_logit_rows = 8192;
    gpu::rounds_up_batches = true;
  }
};

// What a model has computed, to the bit.
struct Everything {
  std::vector<float> logp, gradients, weights;
  bool operator==(const Everything& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(logp, o.logp) && same(gradients, o.gradients) && same(weights, o.weights);
  }
};
// Five steps of two micro-batches each, whose shapes and weights repeat or not as they come.
template <class Prepare>
Everything run_steps(const Config& c, const GptOptions& options, Prepare&& prepare) {
  const auto gpt = gpu::make_gpt(c, options);
  prepare(*gpt);
  randomize(*gpt, 3);
  Everything e;
  OptimizerStep o{.decay = .1f, .max_norm = 1};
  for (int step = 1; step <= 5; step++) {
    o.step = step, o.lr.fill(.01f / float(step)), o.muon_lr = .02f / float(step);
    for (const int micro : {0, 1}) {
      const Packed b = packed(c, {20, 14}, micro == 1, uint64_t(10 * step + micro));
      gpt->forward_backward(b.batch(), b.dlogp);
      e.logp.insert(e.logp.end(), gpt->logp().begin(), gpt->logp().end());
    }
    if (step == 5) e.gradients = all_of(*gpt, Slot::gradient);
    gpt->update(o);
  }
  e.weights = all_of(*gpt, Slot::weight);
  return e;
}

}  // namespace

TEST_CASE("cuda, fp32: log-probabilities, entropies and every gradient equal the CPU engine's") {
  for (const Family family : kEngineFamilies) {
    CAPTURE(int(family));
    check_gradients(engine_config(family), false);
  }
}

TEST_CASE("cuda, fp32: a tied head and an embedding share a gradient") {
  check_gradients(engine_config(Family::qwen3, Head::lm, true), false);
}

TEST_CASE(
    "cuda, bf16: log-probabilities, entropies and every gradient are the CPU engine's, rounded") {
  for (const Family family : kEngineFamilies) {
    CAPTURE(int(family));
    check_gradients(engine_config(family), true);
  }
}

TEST_CASE("cuda: a scalar head's values and gradients equal the CPU engine's") {
  for (const bool bf16 : {false, true}) {
    CAPTURE(bf16);
    const Config c = engine_config(Family::llama, Head::scalar);
    Pair p(c, bf16 ? kTrainBf16 : kTrainFp32);
    for (const uint64_t seed : {1, 2}) {
      const Packed b = packed(c, {31, 1, 20}, false, seed);
      for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->forward(b.batch(), Pass::train);
      CHECK(rel_error(p.gpu->value(), p.cpu->value()) < (bf16 ? 2e-2 : kFp32));  // as a logit
      for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
        if (seed == 1) gpt->backward({}, b.dvalue);
        if (seed == 2) gpt->forward_backward(b.batch(), {}, b.dvalue);
      }
      check_tensors(p, Slot::gradient, bf16 ? kBf16Gradient : kFp32);
    }
  }
}

TEST_CASE(
    "cuda: forward_backward equals forward then backward to the bit, whatever the chunks of the "
    "head") {
  Restore restore;
  const Config c = engine_config(Family::qwen3);
  for (const bool masked : {false, true}) {
    const Packed b = packed(c, {99, 71, 100, 40}, masked);
    std::vector<float> logp, gradients;
    for (const int64_t rows : {8192, 128}) {
      gpu::most_logit_rows = rows;
      const auto once = gpu::make_gpt(c, kTrainBf16), twice = gpu::make_gpt(c, kTrainBf16);
      randomize(*once, 7), randomize(*twice, 7);
      once->forward_backward(b.batch(), b.dlogp, {}, b.dentropy);
      twice->forward(b.batch(), Pass::train);
      const std::vector<float> before(twice->logp().begin(), twice->logp().end());
      twice->backward(b.dlogp, {}, b.dentropy);
      CHECK(largest_difference(once->logp(), before) == 0);
      CHECK(all_of(*once, Slot::gradient) == all_of(*twice, Slot::gradient));
      if (rows == 8192) {
        logp = before, gradients = all_of(*once, Slot::gradient);
      } else {  // chunks change the order of one sum, the head's dW
        CHECK(largest_difference(before, logp) == 0);
        CHECK(rel_error(all_of(*once, Slot::gradient), gradients) < 1e-5);
      }
    }
  }
}

TEST_CASE("cuda, fp32: five steps of AdamW, and of Muon, end in the CPU engine's weights") {
  for (const bool muon : {false, true}) {
    for (const Family family : kEngineFamilies) {
      CAPTURE(muon);
      CAPTURE(int(family));
      GptOptions options = kTrainFp32;
      options.muon = muon;
      const Config c = engine_config(family);
      Pair p(c, options);
      OptimizerStep o{.decay = .1f, .muon_decay = .01f, .max_norm = 5};
      for (int step = 1; step <= 5; step++) {
        const Packed b = packed(c, {23, 11}, true, uint64_t(step));
        o.step = step, o.lr.fill(3e-3f), o.muon_lr = 5e-3f;
        for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
          gpt->forward_backward(b.batch(), b.dlogp);
          gpt->update(o);
        }
        CHECK(p.gpu->stats().grad_norm == doctest::Approx(p.cpu->stats().grad_norm).epsilon(1e-4));
      }
      check_tensors(p, Slot::weight, kFp32AfterSteps, false);
    }
  }
}

TEST_CASE("cuda: each optimizer alone, on the same gradients, makes the CPU engine's step") {
  for (const bool bf16 : {false, true}) {
    CAPTURE(bf16);
    GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
    options.muon = true;  // and AdamW for the rest
    Config c = engine_config(Family::llama);
    c.L = 3;
    Pair p(c, options);
    const auto before = all_of(*p.cpu, Slot::weight);
    OptimizerStep o{.decay = .1f, .muon_decay = .1f, .max_norm = 30};
    for (size_t i = 0; i < o.lr.size(); i++) o.lr[i] = .001f * float(i + 1);
    o.muon_lr = .02f;
    for (int step = 1; step <= 2; step++) {
      o.step = step;
      for (size_t i = 0; i < p.cpu->table().tensors.size(); i++) {
        Rng rng{mix64(uint64_t(step), i)};
        std::vector<float> g(size_t(p.cpu->table().tensors[i].size()));
        for (float& x : g) x = float(rng.normal());
        for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->write(int(i), Slot::gradient, g);
      }
      for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->update(o);
      CHECK(p.gpu->stats().grad_norm == doctest::Approx(p.cpu->stats().grad_norm).epsilon(1e-6));
      CHECK(p.cpu->stats().grad_norm > 30);  // so that it was clipped
    }
    // AdamW's state and steps are fp32 in both modes; Muon's products are bf16 in bf16 mode: five
    // products of matrices that are rounded by 1.6e-3 on average, whose polynomial (slope 3.4)
    // amplifies early errors: 3.4 x sqrt(10) x 1.6e-3 = 1.7e-2 typically; 4e-2 of the step at most.
    size_t at = 0;
    for (size_t i = 0; i < p.cpu->table().tensors.size(); i++) {
      const Tensor& t = p.cpu->table().tensors[i];
      CAPTURE(t.name);
      auto cpu = tensor_of(*p.cpu, i, Slot::weight), gpu = tensor_of(*p.gpu, i, Slot::weight);
      for (size_t j = 0; j < cpu.size(); j++, at++) cpu[j] -= before[at], gpu[j] -= before[at];
      // steps are differences of weights of size .3: 2^-24 x .3 / 1e-3 = 2e-5 of the step is lost
      CHECK(rel_error(gpu, cpu) < (t.muon && bf16 ? 4e-2 : 1e-4));
    }
    check_tensors(p, Slot::moment1, 1e-6);
    check_tensors(p, Slot::moment2, 1e-6);
    CHECK(largest_difference(all_of(*p.gpu, Slot::gradient),
                             std::vector<float>(before.size(), 0.f)) == 0);
  }
}

TEST_CASE("cuda: a head of 50257 tokens: log-probabilities and gradients are the CPU engine's") {
  Config c = engine_config(Family::llama);
  c.V = 50257, c.L = 1;
  for (const bool bf16 : {false, true}) {
    CAPTURE(bf16);
    Pair p(c, bf16 ? kTrainBf16 : kTrainFp32);
    const Packed b = packed(c, {5}, false);
    for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
      gpt->forward_backward(b.batch(), b.dlogp, {}, b.dentropy);
    }
    check_logp(p, bf16);
    check_tensors(p, Slot::gradient, bf16 ? kBf16Gradient : kFp32);
  }
}

TEST_CASE("cuda: adapters' gradients equal the CPU engine's, and frozen tensors have none") {
  // What adapters add to bf16's errors, u = x A^T and the sum into y once more, is within the
  // bounds of gradients, which count 37 roundings.
  for (const Family family : kEngineFamilies) {
    CAPTURE(int(family));
    check_gradients(engine_config(family), false, {5, 10});
  }
  check_gradients(engine_config(Family::gpt2), true, {8, 16});
  check_gradients(engine_config(Family::qwen3), true, {8, 16});
  const Config c = engine_config(Family::llama, Head::scalar);  // its head is frozen too
  GptOptions options = kTrainFp32;
  options.lora = {4, 8};
  Pair p(c, options);
  const Packed b = packed(c, {31, 1, 20}, false);
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->forward_backward(b.batch(), {}, b.dvalue);
  CHECK(rel_error(p.gpu->value(), p.cpu->value()) < kFp32);
  check_tensors(p, Slot::gradient, kFp32);
}

TEST_CASE("cuda: steps of adapters equal the CPU engine's, and nothing else moves") {
  const Config c = engine_config(Family::gpt2);
  GptOptions options = kTrainFp32;
  options.lora = {4, 8}, options.muon = true;  // which has nothing to do
  Pair p(c, options);
  const auto before = all_of(*p.gpu, Slot::weight);
  OptimizerStep o{.max_norm = 5};
  o.lr.fill(3e-3f);
  for (o.step = 1; o.step <= 3; o.step++) {
    const Packed b = packed(c, {23, 11}, true, uint64_t(o.step));
    for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
      gpt->forward_backward(b.batch(), b.dlogp);
      gpt->update(o);
    }
    CHECK(p.gpu->stats().grad_norm == doctest::Approx(p.cpu->stats().grad_norm).epsilon(1e-4));
  }
  check_tensors(p, Slot::weight, kFp32AfterSteps);
  check_tensors(p, Slot::moment1, kFp32AfterSteps);
  check_tensors(p, Slot::moment2, kFp32AfterSteps);
  const auto after = all_of(*p.gpu, Slot::weight);
  size_t at = 0;
  for (const Tensor& t : p.gpu->table().tensors) {
    CAPTURE(t.name);
    const auto n = size_t(t.size());
    const std::span<const float> was(before.data() + at, n), is(after.data() + at, n);
    CHECK((largest_difference(was, is) > 0) == t.trainable);
    at += n;
  }
  std::vector<float> one(size_t(c.C), 1.f);
  const int frozen = p.gpu->table().find("final_norm.weight");
  CHECK(contains(error_of([&] { p.gpu->write(frozen, Slot::moment1, one); }), "frozen"));
  options.batch_tokens = 64;
  const int64_t adapted = gpu::plan_memory(c, options).total();
  options.lora = {};
  CHECK(adapted < gpu::plan_memory(c, options).total());
}

TEST_CASE("cuda: adapters switched off leave the model they were added to, graphs and all") {
  const Config c = engine_config(Family::qwen3);
  GptOptions options = kTrainBf16;
  const auto base = gpu::make_gpt(c, options);
  options.lora = {8, 16};
  const auto adapted = gpu::make_gpt(c, options);
  randomize(*base, 7), randomize(*adapted, 7);
  const Packed b = packed(c, {20, 14}, true);
  base->forward(b.batch(), Pass::score);
  const std::vector<float> plain(base->logp().begin(), base->logp().end());
  std::vector<float> first;
  for (int i = 0; i < 3; i++) {  // launched, recorded, replayed
    adapted->use_adapters(true);
    adapted->forward(b.batch(), Pass::score);
    const std::vector<float> on(adapted->logp().begin(), adapted->logp().end());
    if (i == 0) first = on;
    CHECK(largest_difference(on, first) == 0);
    CHECK(largest_difference(on, plain) > .1);
    adapted->use_adapters(false);
    adapted->forward(b.batch(), Pass::score);
    CHECK(largest_difference(adapted->logp(), plain) == 0);
  }
}

TEST_CASE("cuda: a model whose adapters are off scores and decodes, and never trains") {
  GptOptions options = kTrainBf16;
  options.lora = {2, 4};
  const Config c = engine_config(Family::llama);
  const auto gpt = gpu::make_gpt(c, options);
  randomize(*gpt, 7);
  const Packed b = packed(c, {20, 14}, false);
  const std::string refused = "found the adapters off, expected them on";
  gpt->forward(b.batch(), Pass::train);
  gpt->use_adapters(false);
  CHECK(contains(error_of([&] { gpt->backward(b.dlogp); }), "backward: " + refused));
  CHECK(contains(error_of([&] { gpt->forward_backward(b.batch(), b.dlogp); }), refused));
  CHECK(contains(error_of([&] { gpt->forward(b.batch(), Pass::train); }), refused));
}

TEST_CASE("cuda: the loss that an update reports is its batches', as the CPU engine's") {
  const Config c = engine_config(Family::llama);
  Pair p(c, kTrainFp32);
  OptimizerStep o{};
  const Packed first = packed(c, {23, 11}, true, 1), second = packed(c, {40}, false, 2);
  const auto same_loss = [&] {
    CHECK(p.gpu->stats().loss == doctest::Approx(p.cpu->stats().loss).epsilon(kFp32));
    return p.gpu->stats().loss;
  };
  for (int step = 1; step <= 2; step++) {  // the second finds no rest of the first
    double expected = 0;
    o.step = step;
    for (const Packed* b : {&first, &second}) {
      for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->forward_backward(b->batch(), b->dlogp);
      for (size_t n = 0; n < b->dlogp.size(); n++)
        expected += double(b->dlogp[n]) * double(p.gpu->logp()[n]);
    }
    for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
      const double before = gpt->stats().loss;
      gpt->update(o);
      CHECK(gpt->stats(1).loss == before);
    }
    CHECK(same_loss() == doctest::Approx(expected).epsilon(1e-6));
  }
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) {
    const double before = gpt->stats().loss;
    gpt->forward_backward(first.batch(), first.dlogp);
    gpt->zero_gradients();  // and the loss with them
    gpt->update(o);
    CHECK(gpt->stats(1).loss == before);
    CHECK(before > 1);
  }
  CHECK(same_loss() == 0);
}

TEST_CASE("cuda: a step's first batch writes its gradients over what was there, later ones add") {
  struct Case {
    Family family;
    Head head;
    int lora;
  };
  Restore restore;
  gpu::most_logit_rows = 16;  // several products for the head's gradient
  for (const Case& of : {Case{Family::gpt2, Head::lm, 0},
                         {Family::qwen3, Head::lm, 0},
                         {Family::llama, Head::scalar, 0},
                         {Family::llama, Head::lm, 2}}) {
    for (const bool tied : {false, true}) {
      if (tied && (of.head == Head::scalar || of.family == Family::gpt2)) continue;
      CAPTURE(int(of.family));
      CAPTURE(tied);
      const Config c = engine_config(of.family, of.head, tied);
      GptOptions options = kTrainBf16;
      options.lora = {of.lora, 4};
      const Packed b = packed(c, {20, 14}, true);
      Packed none = b;  // a batch without targets
      std::fill(none.targets.begin(), none.targets.end(), -1);
      const auto pass = [&](Gpt& gpt, const Packed& batch) {
        const bool lm = c.head == Head::lm;
        gpt.forward_backward(batch.batch(),
                             lm ? std::span<const float>(batch.dlogp) : std::span<const float>(),
                             lm ? std::span<const float>() : std::span<const float>(batch.dvalue));
      };
      const auto fresh = [&] {
        auto gpt = gpu::make_gpt(c, options);
        randomize(*gpt, 7);
        return gpt;
      };
      const auto first = fresh(), used = fresh();
      pass(*first, b);
      const std::vector<float> once = all_of(*first, Slot::gradient);
      pass(*first, b);
      const std::vector<float> twice = all_of(*first, Slot::gradient);
      for (int times = 0; times < 3; times++) {  // launched, recorded, replayed
        for (size_t i = 0; i < used->table().tensors.size(); i++) {
          const Tensor& t = used->table().tensors[i];
          if (!t.trainable) continue;
          used->write(int(i), Slot::gradient, std::vector<float>(size_t(t.size()), NAN));
        }
        used->zero_gradients();
        pass(*used, b);
        CHECK(largest_difference(all_of(*used, Slot::gradient), once) == 0);
        pass(*used, b);
        CHECK(largest_difference(all_of(*used, Slot::gradient), twice) == 0);
      }
      used->zero_gradients();
      if (c.head == Head::lm) {
        pass(*used, none);
        for (const float x : all_of(*used, Slot::gradient)) REQUIRE(x == 0);
      }
      double largest = 0;
      for (size_t i = 0; i < once.size(); i++) {
        largest = std::max(largest, std::abs(double(twice[i]) - 2 * double(once[i])));
      }
      CHECK(largest < 1e-3);
    }
  }
}

TEST_CASE(
    "cuda: a batch larger than a grid can be is an error that says how many tokens it may have") {
  const Config c = engine_config(Family::llama);
  const auto gpt = gpu::make_gpt(c, kTrainBf16);
  const int64_t N = gpu::kMostTokens + 1;
  const auto n = static_cast<size_t>(N);
  Packed b;
  b.tokens.assign(n, 1), b.targets.assign(n, 1);
  for (int64_t begin = 0; begin < N; begin += c.T) {
    b.doc_starts.push_back(int(std::min(N, begin + c.T)));
  }
  const std::string error = error_of([&] { gpt->forward(b.batch(), Pass::score); });
  CHECK(contains(error, "batch: found 2097121 tokens at once, expected at most 2097120"));
  CHECK(contains(error, "lower --micro-batch-tokens"));
  GptOptions options = kTrainBf16;
  options.batch_tokens = int(N);
  CHECK(contains(error_of([&] { gpu::make_gpt(c, options); }), "expected at most 2097120"));
}

TEST_CASE("cuda: a batch's rows are rounded up by little, and a multiple stays what it is") {
  int64_t before = 0;
  for (int64_t N = 1; N < 70000; N++) {
    const int64_t rows = gpu::padded_tokens(N), rounded = gpu::padded_logit_rows(N, rows);
    REQUIRE(rows >= std::max(N, before));
    REQUIRE(rows < N + std::max<int64_t>(64, N / 16));
    REQUIRE(gpu::padded_tokens(rows) == rows);
    REQUIRE(rounded >= N);
    REQUIRE(rounded <= gpu::round_up(rows, 128));
    before = rows;
  }
  for (const int windows : {1, 2, 8, 12, 16, 32, 48, 64, 128}) {
    CHECK(gpu::padded_tokens(1024 * windows) == 1024 * windows);
  }
  CHECK(gpu::padded_tokens(0) == 0);
  CHECK(gpu::padded_tokens(gpu::kMostTokens) == gpu::kMostTokens);
  CHECK(gpu::padded_tokens(gpu::kMostTokens - 100) == gpu::kMostTokens);
  std::vector<int64_t> rows;
  for (const int64_t R : {1, 2, 3, 5, 8, 9, 16, 63}) rows.push_back(gpu::padded_rows(R));
  CHECK(rows == std::vector<int64_t>{1, 2, 4, 8, 8, 16, 16, 64});
}

namespace {

// What a model makes of a batch: forward and then backward, and at once; then an update.
template <class Behind>
std::vector<std::vector<float>> all_results(const Config& c, const GptOptions& options,
                                            const Packed& b, Behind&& behind) {
  const auto gpt = gpu::make_gpt(c, options);
  randomize(*gpt, 7);
  std::vector<std::vector<float>> all;
  const size_t n = b.tokens.size();
  const auto keep = [&](std::span<const float> x) {
    all.emplace_back(x.begin(), x.begin() + int64_t(std::min(n, x.size())));
  };
  Packed with = b;
  behind(with);
  const bool lm = c.head == Head::lm;
  using Floats = std::span<const float>;
  const Floats dlogp = lm ? Floats(with.dlogp) : Floats(), dvalue = lm ? Floats() : with.dvalue,
               dentropy = lm ? Floats(with.dentropy) : Floats();
  for (const bool at_once : {false, true, true}) {
    if (at_once) {
      gpt->forward_backward(with.batch(), dlogp, dvalue, dentropy);
    } else {
      gpt->forward(with.batch(), Pass::train);
      gpt->backward(dlogp, dvalue, dentropy);
    }
    keep(gpt->logp()), keep(gpt->entropy()), keep(gpt->value());
  }
  all.push_back(all_of(*gpt, Slot::gradient));
  OptimizerStep o{.decay = .1f, .max_norm = 1};
  o.lr.fill(.01f), o.muon_lr = .02f;
  gpt->update(o);
  all.push_back({float(gpt->stats().grad_norm), float(gpt->stats().loss)});
  all.push_back(all_of(*gpt, Slot::weight));
  return all;
}
bool same_bytes(const std::vector<std::vector<float>>& a,
                const std::vector<std::vector<float>>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); i++) {
    if (a[i].size() != b[i].size() ||
        std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("cuda: a batch gives the same bytes with and without dead rows, and by each recompute") {
  struct Case {
    Family family;
    Head head = Head::lm;
    int lora = 0;
  };
  Restore restore;
  gpu::fusion = gpu::Fusion::never;  // see Recompute
  for (const Case& of : {Case{Family::gpt2},
                         {Family::qwen3},
                         {Family::qwen2, Head::scalar},
                         {Family::gpt2, Head::lm, 4},
                         {Family::qwen3, Head::lm, 4}}) {
    Config c = engine_config(of.family, of.head);
    c.V = 300;  // 84 rows of padding
    for (const bool bf16 : {false, true}) {
      for (const bool masked : {false, true}) {
        CAPTURE(int(of.family));
        CAPTURE(of.lora);
        CAPTURE(bf16);
        CAPTURE(masked);
        GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
        options.lora = {of.lora, 8}, options.muon = of.family == Family::gpt2;
        const Packed b = packed(c, {40, 1, 36}, masked);  // 77 rows, 128 with dead ones
        gpu::rounds_up_batches = false;
        const auto without = all_results(c, options, b, [](Packed&) {});
        gpu::rounds_up_batches = true;
        CHECK(same_bytes(all_results(c, options, b, [](Packed&) {}), without));
        CHECK(same_bytes(all_results(c, options, b,
                                     [](Packed& with) {  // a caller's own: to 113 rows
                                       with.doc_starts.push_back(77 + 36);
                                       for (int n = 0; n < 36; n++) with.tokens.push_back(n);
                                       with.targets.resize(77 + 36, -1);
                                       for (auto* w : {&with.dlogp, &with.dentropy, &with.dvalue})
                                         w->resize(77 + 36, 0.f);
                                     }),
                         without));
        for (const Recompute how : {Recompute::light, Recompute::full}) {
          options.recompute = how;
          CHECK(same_bytes(all_results(c, options, b, [](Packed&) {}), without));
        }
        for (const auto& x : without)
          for (const float v : x) REQUIRE(std::isfinite(v));
        if (of.family != Family::gpt2 || of.lora > 0) continue;
        gpu::fusion = gpu::Fusion::always, options.recompute = Recompute::none;
        const auto fused = all_results(c, options, b, [](Packed&) {});
        options.recompute = Recompute::full;
        CHECK(same_bytes(all_results(c, options, b, [](Packed&) {}), fused));
        gpu::rounds_up_batches = false;
        CHECK(same_bytes(all_results(c, options, b, [](Packed&) {}), fused));
        gpu::rounds_up_batches = true, gpu::fusion = gpu::Fusion::never;
      }
    }
  }
}

TEST_CASE("cuda: batches whose sizes differ replay one graph, and rows that end replay a few") {
  const Config c = engine_config(Family::qwen3);
  const auto gpt = gpu::make_gpt(c, kTrainBf16);
  randomize(*gpt, 3);
  gpu::Graphs& graphs = dynamic_cast<CudaGpt<gpu::bf16>&>(*gpt).graphs();
  OptimizerStep o;
  o.lr.fill(.001f);
  for (int n = 0; n < 40; n++) {  // an epoch
    const Packed b = packed(c, {5 + n % 7, 64 - n - (5 + n % 7)}, true, uint64_t(n));
    REQUIRE(int(b.tokens.size()) == 64 - n);
    o.step = n + 1;
    gpt->forward_backward(b.batch(), b.dlogp);
    gpt->update(o);
  }
  CHECK(graphs.size() == 2);  // of all batches, and of the update
  CHECK(graphs.replays == 2 * 38);
  const auto cache = gpt->make_cache(64 * 40);
  std::vector<int> sequences;
  const std::vector<int> token = {5};
  const auto step = [&](size_t rows) {
    std::vector<DecodeRow> all;
    for (size_t r = 0; r < rows; r++) all.push_back({sequences[r], token, {}, {}});
    DecodeResult result;
    gpt->decode(*cache, all, result);
  };
  for (int r = 0; r < 20; r++) sequences.push_back(cache->create());
  for (size_t rows = 20; rows > 0; rows--) step(rows), step(rows);
  CHECK(graphs.size() == 2 + 6);  // 24, 16, 8, 4, 2, 1 rows
  CHECK(graphs.replays == 2 * 38 + 40 - 2 * 6);
}

TEST_CASE("cuda: a row decodes to the same bytes beside dead rows and without them") {
  Restore restore;
  for (const bool bf16 : {false, true}) {
    const Config c = engine_config(bf16 ? Family::qwen3 : Family::gpt2);
    GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
    options.mode = Mode::inference;
    const auto run = [&](bool rounds_up) {
      gpu::rounds_up_batches = rounds_up;
      const auto gpt = gpu::make_gpt(c, options);
      randomize(*gpt, 7);
      const Packed text = packed(c, {66}, false);
      const auto cache = gpt->make_cache(64 * 20);
      std::vector<float> all;
      std::vector<int> sequences;
      std::vector<LogitBias> bias = {{3, 2.f}};
      DecodeResult result;
      for (size_t call = 0; call < 5; call++) {  // a prompt, then one token a row
        const size_t tokens = call == 0 ? 9 : 1;
        std::vector<DecodeRow> rows;
        for (size_t r = 0; r < 5; r++) {
          if (sequences.size() <= r) sequences.push_back(cache->create());
          const auto next = std::span<const int>(text.tokens).subspan(8 * r + call, tokens);
          rows.push_back({sequences[r], next, {.top_k = 20, .seed = 5, .stream = r}, text.tokens});
          rows[r].sampling.repetition_penalty = r == 1 ? 1.2f : 1;
          if (r == 2) rows[r].top = 3, rows[r].targets = next, rows[r].want_distribution = true;
          if (r == 3) rows[r].biases = bias;
        }
        gpt->decode(*cache, rows, result, true);
        all.insert(all.end(), result.logits.begin(), result.logits.end());
        all.insert(all.end(), result.logp.begin(), result.logp.end());
        all.insert(all.end(), result.ids.begin(), result.ids.end());
        all.push_back(result.target_scores[2][0].logp);
        for (const TopToken& t : result.scores[2].top) all.push_back(t.logp);
        const std::vector<float>& p = result.distributions[2].probability;
        all.insert(all.end(), p.begin(), p.end());
      }
      CHECK(cache->pages_in_memory() == 5);
      return all;
    };
    const std::vector<float> without = run(false);
    CHECK(largest_difference(run(true), without) == 0);
  }
}

#ifdef CAKE_CUDA_ON_CPU
TEST_CASE(
    "cuda: a batch goes to the device by one copy, and a step of decoding comes back by one") {
  const Config c = engine_config(Family::llama);
  const auto gpt = gpu::make_gpt(c, kTrainBf16);
  randomize(*gpt, 3);
  const Packed b = packed(c, {20, 14}, true);
  const auto copies = [&](auto&& work) {
    work();  // takes memory and makes RoPE's table
    const int64_t before = cuda_on_cpu::copies_with_host();
    work();
    return cuda_on_cpu::copies_with_host() - before;
  };
  CHECK(copies([&] { gpt->forward_backward(b.batch(), b.dlogp, {}, b.dentropy); }) == 1);
  CHECK(copies([&] { gpt->forward(b.batch(), Pass::train); }) == 1);
  const auto backward = [&] {
    gpt->forward(b.batch(), Pass::train);
    gpt->backward(b.dlogp, {}, b.dentropy);
  };
  CHECK(copies(backward) == 2);
  CHECK(copies([&] { gpt->update({}); }) == 1);  // its statistics
  CHECK(copies([&] { gpt->stats(); }) == 0);
  const auto cache = gpt->make_cache(256);
  const int sequence = cache->create();
  DecodeResult result;
  DecodeRow row{sequence, std::span(b.tokens).first(1), {.repetition_penalty = 1.1f}, b.tokens};
  row.top = 3, row.targets = std::span(b.targets).last(1);
  if (row.targets[0] < 0) row.targets = std::span(b.tokens).first(1);
  CHECK(copies([&] { gpt->decode(*cache, std::span(&row, 1), result); }) == 2);
}
#endif

TEST_CASE("cuda: when there are too many graphs, the one that was not used for longest goes") {
  cudaStream_t stream = nullptr;
  REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  const gpu::OnDevice<float> x(int64_t(1));
  {
    gpu::Graphs graphs;
    const auto run = [&](int64_t key) {
      graphs.run({key}, stream, [&] { cudaMemsetAsync(x, 0, sizeof(float), stream); });
    };
    for (int64_t key = 0; key < 64; key++) run(key), run(key);
    CHECK(graphs.replays == 0);
    run(0);
    CHECK(graphs.replays == 1);
    run(64);  // 1 goes
    run(0), run(2);
    CHECK(graphs.replays == 3);
    run(1), run(1);  // as if it were new; 3 goes
    CHECK(graphs.replays == 3);
    cudaStreamSynchronize(stream);
  }
  cudaStreamDestroy(stream);
}

#ifdef CAKE_CUDA_ON_CPU
TEST_CASE("cuda: no product adds partial sums in bf16") {
  const int64_t before = cuda_on_cpu::rounded_reductions();
  const Config c = engine_config(Family::gpt2);
  const auto gpt = gpu::make_gpt(c, kTrainBf16);
  randomize(*gpt, 3);
  const Packed b = packed(c, {20, 14}, false);
  gpt->forward_backward(b.batch(), b.dlogp);
  CHECK(cuda_on_cpu::rounded_reductions() == before);
}

TEST_CASE("cuda: no two blocks of a launch write one place") {
  struct Checked {  // such a write ends the process
    Checked() { cuda_on_cpu::set_write_checks(true); }
    ~Checked() { cuda_on_cpu::set_write_checks(false); }
  };
  for (const Family family : {Family::gpt2, Family::qwen3}) {
    Config c = engine_config(family);
    c.L = 1;
    for (const bool bf16 : {false, true}) {
      GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
      options.muon = bf16;
      const Checked checked;
      const auto gpt = gpu::make_gpt(c, options);
      randomize(*gpt, 7);
      const Packed b = packed(c, {37, 6}, true);
      OptimizerStep o{.max_norm = 1};
      o.lr.fill(.01f), o.muon_lr = .02f;
      gpt->forward_backward(b.batch(), b.dlogp, {}, b.dentropy);
      gpt->update(o);
      CHECK(gpt->stats().grad_norm > 0);
      const auto cache = gpt->make_cache(256);
      DecodeResult result;
      for (const int n : {30, 1}) {
        DecodeRow row{n == 30 ? cache->create() : 0, std::span(b.tokens).first(size_t(n)), {}, {}};
        row.sampling = {.temperature = .9f, .top_k = 20, .top_p = .9f};
        row.top = 3;
        gpt->decode(*cache, std::span(&row, 1), result, true);
      }
      CHECK(result.logits.size() == size_t(c.V));
    }
  }
}

TEST_CASE("cuda: logits are made 8,192 rows at a time, or what 1 GiB holds") {
  Config c = engine_config(Family::gpt2);
  c.V = 50257;  // padded to 50,304
  CHECK(gpu::logit_rows_of<gpu::bf16>(c, 65536) == 8192);
  CHECK(gpu::logit_rows_of<gpu::bf16>(c, 640) == 640);
  CHECK(gpu::logit_rows_of<float>(c, 65536) == 5248);  // 41 * 128 <= 2^30 / 201,216 < 42 * 128
  c.V = 151936;
  CHECK(gpu::logit_rows_of<gpu::bf16>(c, 65536) == 3456);
  CHECK(gpu::logit_rows_of<gpu::bf16>(c, 1 << 20) == 3456);  // of the model alone
  c.V = 10'000'000;
  CHECK(gpu::logit_rows_of<float>(c, 65536) == 128);
  const auto plan = [&](int64_t V) {
    Config config = engine_config(Family::gpt2);
    config.V = int(V), config.C = 16, config.L = 1, config.NH = config.NKV = 1, config.HS = 16;
    GptOptions o = kTrainBf16;
    o.batch_tokens = 1 << 14;
    for (const MemoryPlan::Item& i : gpu::plan_memory(config, o).items)
      if (i.what == "activations") return i.bytes;
    return int64_t(-1);
  };
  CHECK(plan(151936) - plan(151936 / 2) < int64_t(300) << 20);  // both near 1 GiB
}

TEST_CASE("cuda: tuned plans are used again: a run's own, then those on disk") {
  struct Timing {  // as on a GPU, with a cache of its own
    Timing() {
      if (const char* was = std::getenv("XDG_CACHE_HOME")) cache = was;
      setenv("XDG_CACHE_HOME", dir.path().c_str(), 1);
      gpu::timing = true;
    }
    ~Timing() {
      if (cache.empty()) unsetenv("XDG_CACHE_HOME");
      if (!cache.empty()) setenv("XDG_CACHE_HOME", cache.c_str(), 1);
      gpu::timing = false;
    }
    TempDir dir;
    std::string cache;
  } timing;
  using Plans = std::map<std::string, std::string>;
  const auto file = timing.dir / "cake/products.json";
  Config c = engine_config(Family::gpt2);
  c.L = 1;
  // As a new process would run it: of the one before only the file on disk is left.
  const auto run = [&](const Plans& own, std::initializer_list<int> documents,
                       std::vector<float>* gradients = nullptr) {
    const auto gpt = gpu::make_gpt(c, kTrainBf16);
    if (!own.empty()) gpt->set_tuned_plans(own);
    randomize(*gpt, 3);
    const Packed b = packed(c, documents, false);
    for (int times = 0; times < 3; times++) {
      gpt->zero_gradients();
      gpt->forward_backward(b.batch(), b.dlogp);
    }
    if (gradients) *gradients = all_of(*gpt, Slot::gradient);
    return gpt->tuned_plans();
  };
  std::vector<float> gradients;
  const Plans plans = run({}, {20, 14}, &gradients);
  int products = 0, fusions = 0;
  for (const auto& [name, value] : plans) {
    if (name.starts_with("product ")) {
      products++;
      CHECK(value.size() == 128);
    } else if (name != "gpu") {
      fusions++;
      const bool chosen = value == "fused" || value == "separate";
      CHECK(chosen);
    }
  }
  CHECK(products > 8);
  CHECK(fusions >= 4);  // GELU, GELU', and gradients of biases in several shapes
  CHECK(plans.contains("gpu"));
  const Json disk = read_json(file).at(plans.at("gpu"));
  for (const auto& [name, value] : plans)
    if (name != "gpu") CHECK(disk.at(name) == value);

  // The run above timed products with and without an epilogue; later ones need the chosen ones
  // only.
  const auto part_of = [](const Plans& some, const Plans& all) {
    CHECK(some.size() > 8);
    return std::includes(all.begin(), all.end(), some.begin(), some.end());
  };
  std::vector<float> again;
  CHECK(part_of(run({}, {20, 14}, &again), plans));
  CHECK(largest_difference(again, gradients) == 0);
  CHECK(part_of(run({}, {21, 14}), plans));  // a size near it
  CHECK(read_json(file).at(plans.at("gpu")) == disk);

  Plans other = plans;  // the second word of an algorithm is its number
  for (auto& [name, value] : other)
    if (name.starts_with("product ")) value.replace(31, 1, value[31] == '2' ? "1" : "2");
  CHECK(run(other, {20, 14}) == other);
  CHECK(part_of(run({}, {20, 14}), plans));  // the disk was left alone
  std::filesystem::remove(file);
  CHECK(run(plans, {20, 14}) == plans);
  CHECK(!std::filesystem::exists(file));  // nothing was left to time
  Plans foreign = other;
  foreign["gpu"] = "another one";
  CHECK(run(foreign, {20, 14}).at("gpu") == plans.at("gpu"));
  CHECK(std::filesystem::exists(file));  // everything was timed again
  CHECK(contains(plans.at("gpu"), "CUDA on the CPU, cuBLASLt 130000, sums in fp32"));
  Plans torn = plans;  // what is no algorithm is timed again too
  for (auto& [name, value] : torn)
    if (name.starts_with("product ")) value[40] = 'x';
  std::filesystem::remove(file);
  run(torn, {20, 14});
  CHECK(std::filesystem::exists(file));

  // A plan that the library refuses for a shape is measured for this shape; others keep theirs.
  OrderedJson bad = OrderedJson::parse(read_file(file));
  auto& stored = bad[plans.at("gpu")];
  for (auto& [name, value] : stored.items())
    if (name.starts_with("product ")) value = std::string(128, '0');
  const size_t before = stored.size();
  write_json(file, bad);
  run({}, {20, 14});
  CHECK(read_json(file)[plans.at("gpu")].size() > before + 8);
  write_file(file, "{ torn");
  CHECK(run({}, {20, 14}).size() == plans.size());
  CHECK(read_json(file).contains(plans.at("gpu")));
}

TEST_CASE("cuda: the host follows no pointer into the device's memory") {
  struct Checked {  // a touch ends the process
    Checked() { cuda_on_cpu::set_host_checks(true); }
    ~Checked() { cuda_on_cpu::set_host_checks(false); }
  };
  Config c = engine_config(Family::qwen3);
  c.L = 1;
  GptOptions options = kTrainBf16;
  options.muon = true;
  const auto gpt = gpu::make_gpt(c, options);
  randomize(*gpt, 7);
  const Checked checked;
  const Packed b = packed(c, {7, 6}, true);
  OptimizerStep o{.max_norm = 1};
  o.lr.fill(.01f), o.muon_lr = .02f;
  gpt->forward(b.batch(), Pass::train);
  gpt->backward(b.dlogp, {}, b.dentropy);
  gpt->update(o);
  CHECK(gpt->stats().grad_norm > 0);
  const auto cache = gpt->make_cache(64);
  DecodeResult result;
  for (const int n : {5, 1}) {
    const DecodeRow row{n == 5 ? cache->create() : 0, std::span(b.tokens).first(size_t(n)), {}, {}};
    gpt->decode(*cache, std::span(&row, 1), result, true);
  }
  CHECK(result.logits.size() == size_t(c.V));
  CHECK(tensor_of(*gpt, 0, Slot::moment2).size() > 0);
}
#endif

TEST_CASE("cuda: a gradient that is not finite skips the update, and the next one is clean") {
  const Config c = engine_config(Family::gpt2);
  for (const bool muon : {false, true}) {
    GptOptions options = kTrainBf16;
    options.muon = muon;
    const auto gpt = gpu::make_gpt(c, options);
    randomize(*gpt, 7);
    CHECK(!gpt->stats().skipped);
    Packed b = packed(c, {33}, false);
    OptimizerStep o{.max_norm = 1};
    o.lr.fill(.01f), o.muon_lr = .02f;
    gpt->forward_backward(b.batch(), b.dlogp);
    gpt->update(o);
    CHECK(!gpt->stats().skipped);
    const auto weights = all_of(*gpt, Slot::weight), m = all_of(*gpt, Slot::moment1),
               v = all_of(*gpt, Slot::moment2);
    gpt->forward(b.batch(), Pass::score);
    const std::vector<float> logp(gpt->logp().begin(), gpt->logp().end());
    for (const float bad : {std::numeric_limits<float>::infinity(), NAN}) {
      Packed worse = b;
      worse.dlogp[7] = bad;
      gpt->forward_backward(worse.batch(), worse.dlogp);
      gpt->update(o);
      CHECK(gpt->stats().skipped);
      CHECK(all_of(*gpt, Slot::weight) == weights);
      CHECK(all_of(*gpt, Slot::moment1) == m);
      CHECK(all_of(*gpt, Slot::moment2) == v);
    }
    gpt->forward(b.batch(), Pass::score);  // the bf16 copy was left alone too
    CHECK(largest_difference(gpt->logp(), logp) == 0);
    gpt->forward_backward(b.batch(), b.dlogp);
    gpt->update(o);
    CHECK(!gpt->stats().skipped);
    CHECK(all_of(*gpt, Slot::weight) != weights);
  }
}

TEST_CASE("cuda: recomputation of each kind changes no bit") {
  Restore restore;
  gpu::fusion = gpu::Fusion::never;  // GELU in a product does not round its input as `light` must
  for (const Family family : kEngineFamilies) {
    GptOptions options = kTrainBf16;
    Config c = engine_config(family);
    c.L = 3;
    const Everything kept = run_steps(c, options, [](Gpt&) {});
    options.batch_tokens = 4096;
    int64_t before = gpu::plan_memory(c, options).total();
    for (const Recompute how : {Recompute::light, Recompute::full}) {
      options.recompute = how, options.batch_tokens = 0;
      CHECK(run_steps(c, options, [](Gpt&) {}) == kept);
      options.batch_tokens = 4096;
      const int64_t bytes = gpu::plan_memory(c, options).total();
      CHECK(bytes < before);
      before = bytes;
    }
  }
  GptOptions options = kTrainBf16;
  const Config c = engine_config(Family::gpt2);
  const Packed b = packed(c, {20, 14}, true);
  const auto logp = [&](gpu::Fusion fused, Recompute how) {
    gpu::fusion = fused, options.recompute = how;
    const auto gpt = gpu::make_gpt(c, options);
    randomize(*gpt, 3);
    gpt->forward(b.batch(), Pass::train);
    return std::vector<float>(gpt->logp().begin(), gpt->logp().end());
  };
  const std::vector<float> separate = logp(gpu::Fusion::never, Recompute::none);
  CHECK(logp(gpu::Fusion::always, Recompute::none) != separate);
  CHECK(logp(gpu::Fusion::always, Recompute::light) == separate);  // its GELU is never fused
  gpu::fusion = gpu::Fusion::always;
  options.recompute = Recompute::full;  // runs the fused product again
  CHECK(run_steps(c, options, [](Gpt&) {}) == run_steps(c, kTrainBf16, [](Gpt&) {}));
}

TEST_CASE("cuda: light recomputation keeps 10 C of a token's 16 C in each layer") {
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    Config c;  // GPT-2's shape
    c.family = Family::gpt2, c.tied = true, c.V = 257, c.T = 100;
    c.C = 64, c.NH = c.NKV = 4, c.HS = 16, c.F = 256;
    const auto bytes = [&](int layers, Recompute how) {
      c.L = layers;
      GptOptions options{.precision = precision, .recompute = how, .batch_tokens = 4096};
      for (const MemoryPlan::Item& item : gpu::plan_memory(c, options).items)
        if (item.what == "activations") return item.bytes;
      return int64_t(0);
    };
    const auto of_layer = [&](Recompute how) { return bytes(5, how) - bytes(4, how); };
    const int64_t element = precision == Precision::fp32 ? 4 : 2;
    CHECK(of_layer(Recompute::none) - of_layer(Recompute::light) == 6 * 64 * 4096 * element);
    const int64_t vectors = 4096 * (2 * 2 + 4) * 4;  // means, inverse deviations, log sums
    CHECK(of_layer(Recompute::light) == 10 * 64 * 4096 * element + vectors);
  }
}

TEST_CASE("cuda: graphs change no bit, and are replayed where shapes repeat") {
  for (const bool muon : {false, true}) {
    GptOptions options = kTrainBf16;
    options.muon = muon;
    const Config c = engine_config(Family::qwen3);
    const auto graphs = [](Gpt& gpt) -> gpu::Graphs& {
      return dynamic_cast<CudaGpt<gpu::bf16>&>(gpt).graphs();
    };
    const Everything launched =
        run_steps(c, options, [&](Gpt& gpt) { graphs(gpt).enabled = false; });
    CHECK(run_steps(c, options, [](Gpt&) {}) == launched);
    const auto gpt = gpu::make_gpt(c, options);
    randomize(*gpt, 3);
    const Packed b = packed(c, {20, 14}, false);
    OptimizerStep o;
    o.lr.fill(.01f);
    for (int step = 1; step <= 4; step++) {  // launched, recorded, replayed, replayed
      o.step = step, o.lr.fill(.01f / float(step));
      gpt->forward_backward(b.batch(), b.dlogp);
      gpt->update(o);
    }
    CHECK(graphs(*gpt).replays == 4);
    Packed other = b;  // a number that is passed by value is not replayed
    other.temperature = 2;
    gpt->forward(b.batch(), Pass::score);
    gpt->forward(b.batch(), Pass::score);
    const std::vector<float> logp(gpt->logp().begin(), gpt->logp().end());
    gpt->forward(other.batch(), Pass::score);
    CHECK(largest_difference(gpt->logp(), logp) > 1e-3);
    const auto gradients = [&](std::span<const float> dentropy) {
      gpt->zero_gradients();
      gpt->forward_backward(b.batch(), b.dlogp, {}, dentropy);
      return all_of(*gpt, Slot::gradient);
    };
    const auto plain = gradients({});  // nor are weights that the recorded batch did not have
    CHECK(largest_difference(gradients(b.dentropy), plain) > 1e-3);
    CHECK(largest_difference(gradients({}), plain) == 0);
  }
}

TEST_CASE("cuda: a graph is not replayed for weights of other kinds than it was recorded with") {
  using Floats = std::span<const float>;
  // forward_backward with some of the weights, as often as it takes to record and replay it, then
  // with others, whose gradients must be those of a model that has no graphs.
  const auto check = [](Head head, std::initializer_list<std::array<bool, 3>> given) {
    const Config c = engine_config(Family::llama, head);
    const auto with = gpu::make_gpt(c, kTrainFp32), without = gpu::make_gpt(c, kTrainFp32);
    dynamic_cast<CudaGpt<float>&>(*without).graphs().enabled = false;
    randomize(*with, 3), randomize(*without, 3);
    const Packed b = packed(c, {20, 14}, false);
    for (const std::array<bool, 3>& which : given) {
      const Floats dlogp = which[0] ? Floats(b.dlogp) : Floats(),
                   dvalue = which[1] ? Floats(b.dvalue) : Floats(),
                   dentropy = which[2] ? Floats(b.dentropy) : Floats();
      CAPTURE(which[0]);
      CAPTURE(which[1]);
      CAPTURE(which[2]);
      for (int times = 0; times < 3; times++) {
        for (Gpt* gpt : {with.get(), without.get()}) {
          gpt->zero_gradients();
          if (times == 1) {
            gpt->forward(b.batch(), Pass::train);
            gpt->backward(dlogp, dvalue, dentropy);
          } else {
            gpt->forward_backward(b.batch(), dlogp, dvalue, dentropy);
          }
        }
        CHECK(largest_difference(all_of(*with, Slot::gradient), all_of(*without, Slot::gradient)) ==
              0);
      }
    }
    CHECK(dynamic_cast<CudaGpt<float>&>(*with).graphs().replays > 0);
  };
  check(Head::lm, {{true, false, true},
                   {false, false, true},
                   {true, false, false},
                   {false, false, false},
                   {true, false, true}});
  check(Head::scalar, {{false, true, false}, {false, false, false}, {false, true, false}});
}

TEST_CASE("cuda: fused epilogues and the kernels in their place agree") {
  Restore restore;
  for (const bool bf16 : {false, true}) {
    for (const gpu::Fusion how : {gpu::Fusion::always, gpu::Fusion::never}) {
      CAPTURE(bf16);
      CAPTURE(int(how));
      gpu::fusion = how;
      check_gradients(engine_config(Family::gpt2), bf16);
    }
  }
}

TEST_CASE("cuda: decoding, by prompts, forks and single tokens, makes the CPU engine's logits") {
  for (const Family family : kEngineFamilies) {
    for (const bool bf16 : {false, true}) {
      CAPTURE(int(family));
      CAPTURE(bf16);
      GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
      options.mode = Mode::inference;
      if (family == Family::llama) options.lora = {5, 10};
      const Config c = engine_config(family);
      Pair p(c, options);
      const Packed prompts = packed(c, {70, 5}, false), more = packed(c, {9}, false, 2);
      const auto prompt = [&](int r) {
        return std::span(prompts.tokens).subspan(r ? 70 : 0, r ? 5 : 70);
      };
      Gpt* engines[] = {p.cpu.get(), p.gpu.get()};
      DecodeResult results[2];
      std::unique_ptr<KvCache> caches[2];
      int sequences[2][3];
      const auto compare = [&] {
        // the logits of a row err together: the worst of few rows by a few times 7e-3
        CHECK(rel_error(results[1].logits, results[0].logits) < (bf16 ? 4e-2 : kFp32));
        for (size_t r = 0; r < results[0].ids.size();
             r++) {  // bf16 may choose another of almost equals
          const float* logits = results[0].logits.data() + r * size_t(c.V);
          if (!bf16) CHECK(results[1].ids[r] == results[0].ids[r]);
          CHECK(logits[results[1].ids[r]] >= logits[results[0].ids[r]] - (bf16 ? kBf16Worst : 0));
        }
        CHECK(largest_difference(results[1].logp, results[0].logp) < (bf16 ? kBf16Worst : 5e-5));
      };
      const Sampling greedy{.temperature = 0};
      for (const int e : {0, 1}) {  // prompts with empty caches
        caches[e] = engines[e]->make_cache(512);
        for (const int r : {0, 1}) sequences[e][r] = caches[e]->create();
        engines[e]->decode(*caches[e],
                           std::vector<DecodeRow>{{sequences[e][0], prompt(0), greedy, {}},
                                                  {sequences[e][1], prompt(1), greedy, {}}},
                           results[e], true);
      }
      compare();
      for (const int e : {0, 1}) {  // a fork, and different tokens in it: the page is copied
        sequences[e][2] = caches[e]->fork(sequences[e][0]);
        std::vector<DecodeRow> rows;
        for (size_t r = 0; r < 3; r++)
          rows.push_back({sequences[e][r], std::span(more.tokens).subspan(r, 1), greedy, {}});
        engines[e]->decode(*caches[e], rows, results[e], true);
      }
      compare();
      CHECK(std::vector(results[1].logits.begin(), results[1].logits.begin() + c.V) !=
            std::vector(results[1].logits.begin() + 2 * c.V, results[1].logits.end()));
      for (const int e : {0, 1}) {  // several tokens after others, beside one and a new prompt
        caches[e]->truncate(sequences[e][0], 67);
        const int fresh = caches[e]->create();
        engines[e]->decode(*caches[e],
                           std::vector<DecodeRow>{
                               {sequences[e][0], std::span(more.tokens).subspan(0, 6), greedy, {}},
                               {fresh, std::span(more.tokens).subspan(2, 7), greedy, {}},
                               {sequences[e][2], std::span(more.tokens).subspan(8, 1), greedy, {}}},
                           results[e], true);
      }
      compare();
      for (int step = 0; step < 4; step++) {  // the same shape again: graphs
        for (const int e : {0, 1}) {
          engines[e]->decode(
              *caches[e],
              std::vector<DecodeRow>{
                  {sequences[e][0], std::span(more.tokens).subspan(size_t(step), 1), greedy, {}},
                  {sequences[e][1],
                   std::span(more.tokens).subspan(size_t(step) + 3, 1),
                   greedy,
                   {}}},
              results[e], true);
        }
        compare();
      }
    }
  }
}

TEST_CASE("cuda: a prompt's logits have the same bits in calls of any lengths, forks and company") {
  for (const int HS : {16, 128}) {
    for (const bool bf16 : {false, true}) {
      CAPTURE(HS);
      CAPTURE(bf16);
      GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
      options.mode = Mode::inference;
      Config c = engine_config(Family::llama);
      c.T = 320, c.HS = HS;
      const auto gpt = gpu::make_gpt(c, options);
      randomize(*gpt, 7);
      const Packed prompt = packed(c, {300}, false), others = packed(c, {90}, false, 2);
      const auto piece = [](const Packed& p, int begin, int end) {
        return std::span(p.tokens).subspan(size_t(begin), size_t(end - begin));
      };
      const auto cache = gpt->make_cache(3000, CacheType::automatic);
      DecodeResult result;
      // Feeds the rows' pieces in one call: logits of row 0
      const auto feed = [&](const std::vector<DecodeRow>& rows) {
        gpt->decode(*cache, rows, result, true);
        return std::vector<float>(result.logits.begin(), result.logits.begin() + c.V);
      };
      const int whole = cache->create();
      const auto expected = feed({{whole, piece(prompt, 0, 300), {}, {}}});

      const int halves = cache->create();
      feed({{halves, piece(prompt, 0, 128), {}, {}}});
      const int fork = cache->fork(halves);
      const int talk = cache->create(), late = cache->create();
      feed({{talk, piece(others, 0, 30), {}, {}}});
      CHECK(feed({{halves, piece(prompt, 128, 300), {}, {}}}) == expected);
      // a fork in the middle of a page, beside a row that decodes and a new prompt
      feed({{fork, piece(prompt, 128, 203), {}, {}}});
      const int third = cache->fork(fork);
      CHECK(feed({{third, piece(prompt, 203, 300), {}, {}},
                  {talk, piece(others, 30, 31), {}, {}},
                  {late, piece(others, 31, 90), {}, {}},
                  {fork, piece(prompt, 203, 205), {}, {}}}) == expected);
      // A token alone in a call has its sums in another order.
      const int alone = cache->create();
      feed({{alone, piece(prompt, 0, 64), {}, {}}});
      feed({{alone, piece(prompt, 64, 65), {}, {}}});
      CHECK(rel_error(feed({{alone, piece(prompt, 65, 300), {}, {}}}), expected) <
            (bf16 ? 4e-2 : kFp32));
    }
  }
}

TEST_CASE("cuda: a call to decode that fails leaves every sequence as it was") {
  const Config c = engine_config(Family::qwen3);
  const auto gpt = gpu::make_gpt(c, kTrainBf16);
  randomize(*gpt, 7);
  const Packed prompts = packed(c, {70, 64}, false, 4);
  const auto cache = gpt->make_cache(64 * 3);
  const int a = cache->create(), b = cache->create();
  const auto some = [&](int n) { return std::span(prompts.tokens).first(size_t(n)); };
  DecodeResult result;
  const auto decode = [&](const std::vector<DecodeRow>& rows) {
    return error_of([&] { gpt->decode(*cache, rows, result, true); });
  };
  CHECK(decode({{a, some(60), {}, {}}, {b, some(64), {}, {}}}) == "no error");
  CHECK(contains(decode({{a, some(5), {}, {}}, {b, some(5), {}, {}}}),
                 "the KV cache is full: found 1 of its 3 pages of 64 positions free, expected 2"));
  CHECK(contains(decode({{a, some(1), {}, {}}, {a, some(1), {}, {}}}), "in two rows"));
  CHECK(cache->length(a) == 60);
  CHECK(cache->length(b) == 64);
  CHECK(cache->free_positions() == 64);
}

TEST_CASE("cuda: the KV cache takes memory in chunks as it grows, and none for its limit") {
  Config c = engine_config(Family::llama);
  c.L = 4, c.NH = c.NKV = 16, c.HS = 128;  // a page takes 4 MB, a chunk has 8
  const auto in_use = [] {
    size_t free = 0, total = 0;
    gpu::check(cudaMemGetInfo(&free, &total), "test");
    return int64_t(total - free);
  };
  GptOptions options = kTrainFp32;
  options.mode = Mode::inference;
  const auto gpt = gpu::make_gpt(c, options);
  randomize(*gpt, 7);
  CHECK(gpu::cache_page_bytes(c, options) == 4 << 20);
  const int64_t before = in_use();
  const auto cache = gpt->make_cache(int64_t(1) << 40);
  CHECK(in_use() == before);
  std::vector<int> tokens, sequences;
  for (int i = 0; i < 20; i++) tokens.push_back(i), sequences.push_back(cache->create());
  DecodeResult result;
  const auto decode = [&](int n) {  // a token to each of the first n sequences
    std::vector<DecodeRow> rows;
    for (size_t i = 0; i < size_t(n); i++) {
      rows.push_back({sequences[i], std::span(tokens).subspan(i, 1), {}, {}});
    }
    gpt->decode(*cache, rows, result, true);
  };
  decode(8);
  decode(1);
  const int64_t eight = in_use();
  CHECK(cache->pages_in_memory() == 8);
  CHECK(eight - before >= 32 << 20);
#ifdef CAKE_CUDA_ON_CPU
  gpt->make_cache(64);  // takes nothing
  decode(8);            // all but the cache has its memory
  const int lengths = cache->length(sequences[0]);
  cuda_on_cpu::fail_next_malloc(0);
  const DecodeRow more[] = {{sequences[0], std::span(tokens).first(1), {}, {}},
                            {sequences[10], std::span(tokens).first(1), {}, {}}};
  CHECK(contains(error_of([&] { gpt->decode(*cache, more, result); }),
                 "out of memory on the GPU: the KV cache"));
  CHECK(cache->length(sequences[0]) == lengths);
  CHECK(cache->length(sequences[10]) == 0);
  CHECK(cache->pages_in_memory() == 8);
#endif
  for (const int s : sequences) cache->truncate(s, 0);
  decode(20);
  decode(20);
  CHECK(cache->pages_in_memory() == 20);
  CHECK(in_use() - eight >= 64 << 20);
  // Pages in three chunks hold what was stored in them.
  const std::vector<float> together = result.logits;
  for (const size_t i : {0, 7, 8, 15, 16, 19}) {
    const auto own = gpt->make_cache(64);
    const int s = own->create();
    for (int round = 0; round < 2; round++) {
      const DecodeRow row{s, std::span(tokens).subspan(i, 1), {}, {}};
      gpt->decode(*own, std::span(&row, 1), result, true);
    }
    const std::vector<float> row(together.begin() + int64_t(i) * c.V,
                                 together.begin() + int64_t(i + 1) * c.V);
    CHECK(rel_error(row, result.logits) < kFp32);  // cuBLASLt may sum one row in another order
  }
}

TEST_CASE("cuda: weights and keys have the type of the products, and another is refused by name") {
  const Config c = engine_config(Family::qwen3);
  const ParamTable table = make_table(c);
  for (const bool in_bf16 : {false, true}) {
    GptOptions options = in_bf16 ? kTrainBf16 : kTrainFp32;
    options.mode = Mode::inference;
    const auto with = [&](WeightType weights, CacheType cache) {
      GptOptions o = options;
      o.weights.assign(table.tensors.size(), weights);
      o.decode.cache = cache;
      return error_of([&] { gpu::make_gpt(c, o); });
    };
    const CacheType own = in_bf16 ? CacheType::bf16 : CacheType::f32;
    CHECK(with(WeightType::f32, own) == "no error");
    CHECK(with(WeightType::f32, CacheType::automatic) == "no error");
    CHECK(contains(with(WeightType::f32, in_bf16 ? CacheType::f32 : CacheType::bf16),
                   in_bf16 ? "--cache-type f32: the CUDA engine computes in bf16"
                           : "--cache-type bf16: the CUDA engine computes in f32"));
    CHECK(contains(with(WeightType::q8_0, own), "--weights q8_0: the CUDA engine computes in "));
    CHECK(contains(with(WeightType::f16, own), "--weights f16: "));
    const std::string bf16 = with(WeightType::bf16, own);
    CHECK((in_bf16 ? bf16 == "no error" : contains(bf16, "--weights bf16: ")));
    const auto gpt = gpu::make_gpt(c, options);
    CHECK(
        contains(error_of([&] { gpt->make_cache(64, in_bf16 ? CacheType::f32 : CacheType::bf16); }),
                 "--cache-type "));
    // Half the memory for keys and values, and for the matrices of a model that only computes.
    options.decode = {.rows = 1, .tokens = 1, .positions = 640};
    const auto bytes = [&](const char* what) {
      for (const MemoryPlan::Item& i : gpu::plan_memory(c, options).items)
        if (i.what == what) return i.bytes;
      return int64_t(-1);
    };
    CHECK(bytes("KV cache") == int64_t(640) * 2 * c.L * c.NKV * c.HS * (in_bf16 ? 2 : 4));
    CHECK(bytes("parameters") > 0);
  }
}

TEST_CASE("cuda: logits that are not finite end a call to decode") {
  const Config c = engine_config(Family::qwen3);
  for (const GptOptions& options : {kTrainBf16, kTrainFp32}) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      const auto gpt = gpu::make_gpt(c, options);
      randomize(*gpt, 7);
      const int head = gpt->table().find(c.tied ? "wte" : "head");
      std::vector<float> w = tensor_of(*gpt, head, Slot::weight);
      w[size_t(c.V - 1) * size_t(c.C)] = bad;
      gpt->write(head, Slot::weight, w);
      const auto cache = gpt->make_cache(64);
      const std::vector<int> tokens = {3, 1, 4};
      DecodeResult result;
      for (const float temperature : {0.f, 1.f}) {
        const DecodeRow row{cache->create(), tokens, {.temperature = temperature}, {}};
        CHECK(contains(error_of([&] { gpt->decode(*cache, std::span(&row, 1), result); }),
                       "after 3 tokens: found logits that are not finite"));
        CHECK(cache->length(row.sequence) == 0);
      }
    }
  }
}

TEST_CASE("cuda: the memory plan counts what decoding takes") {
  const auto in_use = [] {
    size_t free = 0, total = 0;
    gpu::check(cudaMemGetInfo(&free, &total), "test");
    return int64_t(total - free);
  };
  for (const Family family : kEngineFamilies) {
    for (GptOptions options : {kTrainBf16, kTrainFp32}) {
      const Config c = engine_config(family);
      const int64_t without = gpu::plan_memory(c, options).total();
      options.decode = {.rows = 3, .tokens = 60, .positions = 200};
      const int64_t planned = gpu::plan_memory(c, options).total() - without;
      const auto gpt = gpu::make_gpt(c, options);
      randomize(*gpt, 7);
      const Packed prompts = packed(c, {20, 20, 20}, false, 4);
      const int64_t before = in_use();
      const auto cache = gpt->make_cache(200);
      std::vector<DecodeRow> rows;
      for (size_t r = 0; r < 3; r++) {
        rows.push_back({cache->create(), std::span(prompts.tokens).subspan(20 * r, 20), {}, {}});
      }
      DecodeResult result;
      gpt->decode(*cache, rows, result);
      const int64_t taken = in_use() - before;
      CAPTURE(planned);
      CAPTURE(taken);
      CHECK(taken >= planned);
      CHECK(taken < planned * 1.1);  // page tables, cosines and sines come to it
      // Without a number of tokens, the plan has room for a prompt as long as the engine takes at
      // once.
      const auto of_tokens = [&](int tokens) {
        options.decode.tokens = tokens;
        return gpu::plan_memory(c, options).total();
      };
      CHECK(of_tokens(0) == of_tokens(gpt->prefill_tokens()));
      CHECK(of_tokens(0) > without + 10 * planned);
    }
  }
}

TEST_CASE("cuda: MFU is a share of the datasheet's rate for the precision, where it is known") {
  CHECK(gpu::datasheet_operations("NVIDIA H200", true) == 989e12);
  CHECK(gpu::datasheet_operations("NVIDIA H100 80GB HBM3", false) == 67e12);
  CHECK(gpu::datasheet_operations("NVIDIA H100 PCIe", true) == 756e12);
  CHECK(gpu::datasheet_operations("NVIDIA H100 80GB HBM3 MIG 1g.10gb", true) == 0);
  const auto gpt = gpu::make_gpt(engine_config(Family::gpt2), kTrainBf16);
  CHECK(gpt->datasheet_operations() ==
        gpu::datasheet_operations(gpu::device_properties().name, true));
}

TEST_CASE("cuda, fp32: sampling draws the CPU engine's tokens and leaves a live forward alone") {
  const Config c = engine_config(Family::qwen3);
  Pair p(c, kTrainFp32);
  const Packed b = packed(c, {20, 14}, true);
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->forward(b.batch(), Pass::train);
  const Packed prompt = packed(c, {12}, false, 4);
  Gpt* engines[] = {p.cpu.get(), p.gpu.get()};
  DecodeResult results[2];
  const Sampling how[] = {{.temperature = 1, .seed = 1},
                          {.temperature = .7f, .top_k = 9, .seed = 2, .stream = 3},
                          {.temperature = 1.3f, .top_p = .8f, .vocab = 200, .seed = 4},
                          {.temperature = 1, .min_p = .05f, .repetition_penalty = 1.5f, .seed = 5}};
  for (const int e : {0, 1}) {
    const auto cache = engines[e]->make_cache(1024);
    std::vector<DecodeRow> rows;
    for (const Sampling& s : how)
      rows.push_back({cache->create(), prompt.tokens, s, prompt.tokens});
    engines[e]->decode(*cache, rows, results[e]);
    for (int step = 0; step < 4; step++) {
      const std::vector<int> last = results[e].ids;
      for (size_t r = 0; r < rows.size(); r++) rows[r].tokens = std::span(last).subspan(r, 1);
      engines[e]->decode(*cache, rows, results[e]);
    }
  }
  CHECK(results[1].ids == results[0].ids);
  CHECK(largest_difference(results[1].logp, results[0].logp) < 5e-5);
  for (Gpt* gpt : {p.cpu.get(), p.gpu.get()}) gpt->backward(b.dlogp);
  check_tensors(p, Slot::gradient, kFp32);
}

TEST_CASE("cuda: scores of sampled tokens and of targets are the CPU engine's") {
  for (const bool bf16 : {false, true}) {
    CAPTURE(bf16);
    const Config c = engine_config(Family::qwen3);
    GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
    options.mode = Mode::inference;
    Pair p(c, options);
    const Packed prompts = packed(c, {70, 5, 3}, false, 6);
    const auto tokens = std::span(prompts.tokens);
    const LogitBias bias[] = {{11, 50}};
    Gpt* engines[] = {p.cpu.get(), p.gpu.get()};
    DecodeResult results[2];
    for (const int e : {0, 1}) {
      const auto cache = engines[e]->make_cache(512);
      std::vector<DecodeRow> rows;
      const int begin[] = {0, 70, 75}, size[] = {70, 5, 3}, top[] = {6, 0, -1};
      for (size_t r = 0; r < 3; r++) {
        rows.push_back({.sequence = cache->create(),
                        .tokens = tokens.subspan(size_t(begin[r]), size_t(size[r])),
                        .sampling = {.temperature = 0, .vocab = 200},
                        .top = top[r]});
      }
      rows[0].targets = tokens.subspan(1, 70);  // the last one is scored too
      rows[1].targets = tokens.subspan(71, 2);
      rows[2].biases = bias;
      engines[e]->decode(*cache, rows, results[e], true);
    }
    const double limit = bf16 ? kBf16Worst : 5e-5;
    const DecodeResult& gpu = results[1];
    CHECK(gpu.ids[2] == 11);
    REQUIRE(gpu.scores.size() == 3);
    REQUIRE(gpu.target_scores.size() == 3);
    CHECK(gpu.scores[0].top.size() == 6);
    CHECK(gpu.scores[1].top.empty());
    CHECK(gpu.target_scores[0].size() == 70);
    CHECK(gpu.target_scores[1].size() == 2);
    CHECK(gpu.target_scores[2].empty());
    CHECK(gpu.scores[0].logp == gpu.logp[0]);  // temperature 0 scores as 1 does
    CHECK(gpu.scores[0].top[0].id == gpu.ids[0]);
    CHECK(gpu.scores[0].top[0].logp == gpu.scores[0].logp);
    for (size_t r = 0; r < 2; r++) {
      for (size_t t = 0; t < gpu.target_scores[r].size(); t++) {
        const TokenScore &a = results[0].target_scores[r][t], &b = gpu.target_scores[r][t];
        CHECK(std::abs(a.logp - b.logp) < limit);
        if (!bf16) CHECK(b.rank == a.rank);
        for (size_t k = 0; k < b.top.size(); k++) {
          if (b.top[k].id == int(tokens[(r == 0 ? 0 : 70) + t + 1])) CHECK(b.rank == int(k) + 1);
        }
        REQUIRE(a.top.size() == b.top.size());
        for (size_t k = 0; k < b.top.size(); k++) {
          CHECK(std::abs(a.top[k].logp - b.top[k].logp) < limit);
          CHECK(b.top[k].id < 200);
          if (k > 0) CHECK(b.top[k].logp <= b.top[k - 1].logp);
          if (!bf16) CHECK(b.top[k].id == a.top[k].id);
          if (b.top[k].id == int(tokens[t + 1]) && r == 0) CHECK(b.top[k].logp == b.logp);
        }
      }
    }
    // The likeliest are those of the logits that this engine made.
    const float* z = gpu.logits.data();
    std::vector<int> order(200);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return z[a] > z[b]; });
    for (size_t k = 0; k < 6; k++) CHECK(gpu.scores[0].top[k].id == order[k]);
  }
}

TEST_CASE("cuda: a token's distribution is the CPU engine's, and sums to 1") {
  for (const bool bf16 : {false, true}) {
    CAPTURE(bf16);
    const Config c = engine_config(Family::qwen3);
    GptOptions options = bf16 ? kTrainBf16 : kTrainFp32;
    options.mode = Mode::inference;
    Pair p(c, options);
    const Packed prompts = packed(c, {9}, false, 6);
    const LogitBias bias[] = {{11, 3}, {250, 1}};
    const Sampling ways[] = {{},
                             {.temperature = 0},
                             {.temperature = .7f, .top_k = 5, .vocab = 200},
                             {.temperature = 2, .top_p = .5f},
                             {.min_p = .05f, .vocab = 130, .repetition_penalty = 3}};
    Gpt* engines[] = {p.cpu.get(), p.gpu.get()};
    DecodeResult results[2];
    for (const int e : {0, 1}) {
      const auto cache = engines[e]->make_cache(512);
      std::vector<DecodeRow> rows;
      for (const Sampling& how : ways) {
        rows.push_back({.sequence = cache->create(),
                        .tokens = prompts.tokens,
                        .sampling = how,
                        .history = prompts.tokens,
                        .biases = bias,
                        .want_distribution = true});
      }
      rows.push_back({.sequence = cache->create(), .tokens = prompts.tokens});
      engines[e]->decode(*cache, rows, results[e], true);
      CHECK(results[e].distributions.back().logp.empty());
    }
    for (size_t r = 0; r < std::size(ways); r++) {
      CAPTURE(r);
      const Distribution &a = results[0].distributions[r], &b = results[1].distributions[r];
      REQUIRE(b.logp.size() == size_t(c.V));
      REQUIRE(b.probability.size() == size_t(c.V));
      double own = 0, total = 0;
      for (size_t v = 0; v < size_t(c.V); v++) {
        own += std::exp(double(b.logp[v])), total += double(b.probability[v]);
        CHECK(std::abs(b.logp[v] - a.logp[v]) < (bf16 ? kBf16Worst : 5e-5));
        if (ways[r].vocab > 0 && int(v) >= ways[r].vocab) CHECK(b.probability[v] == 0);
        if (bf16) continue;
        CHECK(std::abs(b.probability[v] - a.probability[v]) < 5e-5);
        CHECK((b.probability[v] > 0) == (a.probability[v] > 0));
      }
      CHECK(std::abs(own - 1) < 1e-5);
      CHECK(std::abs(total - 1) < 1e-5);
      CHECK(b.probability[size_t(results[1].ids[r])] > 0);
    }
  }
}

TEST_CASE("cuda: equal requests in equal company get equal bits") {
  const Config c = engine_config(Family::qwen3);
  GptOptions options = kTrainBf16;
  options.mode = Mode::inference;
  const auto gpt = gpu::make_gpt(c, options);
  randomize(*gpt, 7);
  const Packed text = packed(c, {40}, false, 3);
  const auto run = [&] {
    Generator g(*gpt, [](int) { return std::string_view("x"); },
                {.rows = 4, .cache_positions = 64 * 20, .prefill_tokens = 16, .prefill_slice = 5});
    std::vector<float> all;
    for (int i = 0; i < 6; i++) {
      Request r{.prompt = {text.tokens.begin() + i, text.tokens.begin() + 12 + 4 * i},
                .max_new = 5 + i};
      r.sampling = {.seed = 3, .stream = uint64_t(i)};
      r.top_logprobs = 2, r.score_prompt = i % 2 == 0;
      r.on_prompt_scores = [&](const std::vector<TokenScore>& scores) {
        for (const TokenScore& s : scores) all.push_back(s.logp);
      };
      r.on_token = [&](const Token& t) {
        all.push_back(float(t.id)), all.push_back(t.logp), all.push_back(t.score->top[1].logp);
      };
      g.submit(r);
    }
    g.run();
    return all;
  };
  const std::vector<float> first = run(), second = run();
  CHECK(first.size() > 100);
  CHECK(std::all_of(first.begin(), first.end(), [](float x) { return std::isfinite(x); }));
  CHECK(first == second);
}

TEST_CASE("cuda: every tensor's slots are read as they were written") {
  Config c = engine_config(Family::qwen3);
  const auto numbers = [](size_t i, Slot slot, int64_t n) {
    Rng rng{mix64(i, uint64_t(slot))};
    std::vector<float> values(static_cast<size_t>(n));
    for (float& x : values) x = float(rng.normal());
    return values;
  };
  for (const bool muon : {false, true}) {
    GptOptions options = kTrainBf16;
    options.muon = muon;
    const auto gpt = gpu::make_gpt(c, options);
    const auto& tensors = gpt->table().tensors;
    const Slot slots[] = {Slot::weight, Slot::gradient, Slot::moment1, Slot::moment2};
    const auto absent = [&](size_t i, Slot slot) {
      return tensors[i].muon && slot == Slot::moment2;
    };
    for (const Slot slot : slots)
      for (size_t i = 0; i < tensors.size(); i++)
        if (!absent(i, slot)) gpt->write(int(i), slot, numbers(i, slot, tensors[i].size()));
    for (const Slot slot : slots)
      for (size_t i = 0; i < tensors.size(); i++) {
        CAPTURE(tensors[i].name);
        if (absent(i, slot)) {
          CHECK(tensor_of(*gpt, i, slot) == std::vector<float>(size_t(tensors[i].size()), 0.f));
        } else {
          CHECK(tensor_of(*gpt, i, slot) == numbers(i, slot, tensors[i].size()));
        }
      }
    gpt->zero_gradients();
    CHECK(tensor_of(*gpt, 1, Slot::gradient) == std::vector<float>(size_t(tensors[1].size()), 0.f));
  }
  GptOptions options = kTrainBf16;  // inference keeps vectors whole, and matrices in bf16
  options.mode = Mode::inference;
  const auto gpt = gpu::make_gpt(c, options);
  for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
    const Tensor& t = gpt->table().tensors[i];
    CAPTURE(t.name);
    const auto values = numbers(i, Slot::weight, t.size());
    gpt->write(int(i), Slot::weight, values);
    const auto back = tensor_of(*gpt, i, Slot::weight);
    if (t.kind == Kind::vector) {
      CHECK(back == values);
    } else {
      for (size_t j = 0; j < values.size(); j++) {
        if (!(std::abs(back[j] - values[j]) <= std::abs(values[j]) / 256))
          FAIL(j);  // 2^-8: half is less
      }
    }
  }
  CHECK(contains(error_of([&] { tensor_of(*gpt, 0, Slot::gradient); }), "no gradients"));
}

TEST_CASE("cuda: a model that shares another's weights sees its updates") {
  const Config c = engine_config(Family::llama);
  GptOptions options = kTrainBf16;
  options.muon = true;
  const auto trained = gpu::make_gpt(c, options);
  randomize(*trained, 7);
  options.mode = Mode::inference, options.share = trained.get();
  const auto reader = gpu::make_gpt(c, options);
  const Packed b = packed(c, {20, 14}, false);
  OptimizerStep o;
  o.lr.fill(.01f), o.muon_lr = .02f;
  for (int step = 1; step <= 3; step++) {
    trained->forward(b.batch(), Pass::train);
    reader->forward(b.batch(), Pass::score);
    CHECK(largest_difference(trained->logp(), reader->logp()) == 0);
    trained->backward(b.dlogp);
    o.step = step;
    trained->update(o);
  }
  // The bf16 copy follows the masters: another model with the same masters says the same.
  const auto fresh = gpu::make_gpt(c, kTrainBf16);
  for (size_t i = 0; i < fresh->table().tensors.size(); i++) {
    fresh->write(int(i), Slot::weight, tensor_of(*trained, i, Slot::weight));
  }
  fresh->forward(b.batch(), Pass::score);
  trained->forward(b.batch(), Pass::score);
  CHECK(largest_difference(trained->logp(), fresh->logp()) == 0);
  options.precision = Precision::fp32;
  CHECK(contains(error_of([&] { gpu::make_gpt(c, options); }), "share"));
  options.precision = Precision::bf16, options.mode = Mode::train;
  CHECK(contains(error_of([&] { gpu::make_gpt(c, options); }), "weights of its own"));
}

TEST_CASE("cuda: what cannot be done ends in one clear line") {
  Config c = engine_config(Family::qwen3);
  c.HS = 24;
  CHECK(contains(error_of([&] { gpu::make_gpt(c, kTrainBf16); }), "head_dim: found 24"));
  c.HS = 144;
  CHECK(contains(error_of([&] { gpu::make_gpt(c, kTrainBf16); }), "head_dim: found 144"));
  c = engine_config(Family::qwen3);
  const auto gpt = gpu::make_gpt(c, kTrainBf16);
  randomize(*gpt, 7);
  const Packed b = packed(c, {33}, false);
  const auto forward = [&](const Batch& batch) {
    return error_of([&] { gpt->forward(batch, Pass::score); });
  };
  CHECK(contains(forward({}), "found 0 tokens"));
  Packed bad = b;
  bad.tokens[3] = c.V;
  CHECK(contains(forward(bad.batch()), "position 3: found token 257"));
  bad = b;
  bad.doc_starts.back() = 32;
  CHECK(contains(forward(bad.batch()), "doc_starts"));
  bad = b;
  bad.temperature = NAN;
  CHECK(contains(forward(bad.batch()), "temperature"));
  CHECK(contains(forward(packed(c, {101}, false).batch()), "expected 1 to the context of 100"));
  CHECK(contains(error_of([&] { gpt->backward(b.dlogp); }), "no forward"));
  gpt->forward(b.batch(), Pass::score);
  CHECK(contains(error_of([&] { gpt->backward(b.dlogp); }), "no forward"));
  gpt->forward(b.batch(), Pass::train);
  CHECK(contains(error_of([&] { gpt->backward(std::span(b.dlogp).first(5)); }), "found 5 weights"));
  CHECK(contains(error_of([&] { gpt->backward({}, b.dvalue); }), "dvalue"));
  Config huge = c;
  huge.C = 1 << 18, huge.L = 400, huge.F = 1 << 20;
  const std::string error = error_of([&] { gpu::make_gpt(huge, kTrainBf16); });
  CHECK(contains(error, "out of memory"));
  CHECK(contains(error, "lower --depth"));
  CHECK(gpu::measure_peak(*gpt) > 0);
#ifdef CAKE_CUDA_ON_CPU
  GptOptions options = kTrainBf16;
  options.batch_tokens = 64;
  for (int skip = 0;; skip++) {  // every allocation in turn
    const size_t before = cuda_on_cpu::memory_in_use();
    cuda_on_cpu::fail_next_malloc(skip);
    const std::string why = error_of([&] { gpu::make_gpt(c, options); });
    if (why == "no error") {
      CHECK(skip > 20);
      break;
    }
    CHECK(contains(why, "out of memory on the GPU"));
    CHECK(contains(why, "lower --"));
    CHECK(cuda_on_cpu::memory_in_use() == before);
  }
  cuda_on_cpu::fail_next_malloc(1 << 30);  // none
  cuda_on_cpu::fail_next_launch(5);
  const Packed other = packed(c, {70}, false);  // of a shape that no graph has
  const std::string launch = forward(other.batch());
  CHECK(contains(launch, "cuda: kernel "));
  CHECK(contains(launch, "with grid ("));
  CHECK(forward(other.batch()) == "no error");
  cuda_on_cpu::set_device_count(0);
  CHECK(contains(error_of([&] { gpu::make_gpt(c, options); }), "found no CUDA device"));
  cuda_on_cpu::set_device_count(1);
  cuda_on_cpu::set_compute_capability(7, 5);
  CHECK(contains(error_of([&] { gpu::make_gpt(c, options); }), "compute capability 7.5"));
  cuda_on_cpu::set_compute_capability(9, 0);
  cuda_on_cpu::set_driver_version(12020);
  const std::string old = gpu::unavailable();
  CHECK(contains(old, "CUDA 12.2"));
  CHECK(contains(old, "needs 13."));
  cuda_on_cpu::set_driver_version(13000);
  CHECK(gpu::unavailable().empty());
#endif
}
