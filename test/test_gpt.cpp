// The CPU engine: each layer's plain definition against finite differences in double, each fast
// layer against its plain definition in float, and the whole model's invariants: the same bits for
// any number of threads, any packing, any chunking. PyTorch's goldens are in test_goldens.cpp.
//
// The engine's source is part of this file: its inner functions are what is tested.
#define main cake_train_gpt_main
#include <map>

#include "train_gpt.cpp"
#undef main
//
#include "test/support.h"

using namespace cake;

namespace {

// Tolerances. fp32 has 2^-24 = 6e-8 of rounding a step; sums here are a few hundred long and of
// mixed sign, so relative errors in norm stay below 1e-6 when the order alone differs. 1e-5 leaves
// room for the functions inside (exp to 1e-7, rsqrt). In double, central differences with h = 1e-5
// have truncation h^2 = 1e-10 and cancellation 1e-16 / h = 1e-11: 1e-7 in norm is safe.
constexpr double kFloatTolerance = 1e-5, kDifferenceTolerance = 1e-7;

template <class T>
std::vector<T> random_values(size_t n, const char* name, double scale = 1) {
  Rng rng{hash64(name)};
  std::vector<T> values(n);
  for (T& x : values) x = T(scale * rng.normal());
  return values;
}

// d(sum of weights * f(x))/dx by central differences.
template <class F>
std::vector<double> differences(std::vector<double> x, F&& f) {
  std::vector<double> gradient;
  constexpr double h = 1e-5;
  for (double& xi : x) {
    const double keep = xi;
    xi = keep + h;
    const double up = f(x);
    xi = keep - h;
    const double down = f(x);
    xi = keep;
    gradient.push_back((up - down) / (2 * h));
  }
  return gradient;
}
double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.);
}

}  // namespace

// =============================================================================================
// Plain definitions against finite differences

TEST_CASE("plain linear backward matches finite differences") {
  const int N = 5, in = 7, out = 3;
  const auto x = random_values<double>(N * in, "x"), w = random_values<double>(out * in, "w"),
             b = random_values<double>(out, "b"), dy = random_values<double>(N * out, "dy");
  const auto loss = [&](const auto& x_, const auto& w_, const auto& b_) {
    std::vector<double> y(size_t(N * out));
    plain::linear_forward(N, in, out, x_.data(), w_.data(), b_.data(), y.data());
    return dot(y, dy);
  };
  std::vector<double> dx(x.size()), dw(w.size()), db(b.size());
  plain::linear_backward(N, in, out, x.data(), w.data(), dy.data(), dx.data(), dw.data(),
                         db.data());
  CHECK(rel_error(dx, differences(x, [&](auto& v) { return loss(v, w, b); })) <
        kDifferenceTolerance);
  CHECK(rel_error(dw, differences(w, [&](auto& v) { return loss(x, v, b); })) <
        kDifferenceTolerance);
  CHECK(rel_error(db, differences(b, [&](auto& v) { return loss(x, w, v); })) <
        kDifferenceTolerance);
}

TEST_CASE("plain norms' backward matches finite differences") {
  const int N = 3, C = 11;
  const auto x = random_values<double>(N * C, "x"), w = random_values<double>(C, "w"),
             b = random_values<double>(C, "b"), dy = random_values<double>(N * C, "dy");
  for (const bool layer_norm : {true, false}) {
    CAPTURE(layer_norm);
    const auto loss = [&](const auto& x_, const auto& w_, const auto& b_) {
      std::vector<double> y(size_t(N * C));
      plain::norm_forward(N, C, x_.data(), w_.data(), layer_norm ? b_.data() : nullptr, 1e-5,
                          y.data());
      return dot(y, dy);
    };
    std::vector<double> dx(x.size()), dw(w.size()), db(b.size());
    plain::norm_backward(N, C, dy.data(), x.data(), w.data(), layer_norm, 1e-5, dx.data(),
                         dw.data(), db.data());
    CHECK(rel_error(dx, differences(x, [&](auto& v) { return loss(v, w, b); })) <
          kDifferenceTolerance);
    CHECK(rel_error(dw, differences(w, [&](auto& v) { return loss(x, v, b); })) <
          kDifferenceTolerance);
    CHECK(rel_error(db, differences(b, [&](auto& v) { return loss(x, w, v); })) <
          kDifferenceTolerance);
  }
}

TEST_CASE("plain activations' derivatives match finite differences") {
  const auto x = random_values<double>(40, "x", 2), up = random_values<double>(40, "up"),
             dy = random_values<double>(40, "dy");
  std::vector<double> dx, dgate(40), dup(40);
  for (size_t i = 0; i < x.size(); i++) {
    dx.push_back(dy[i] * plain::gelu_derivative(x[i]));
    plain::swiglu_derivative(x[i], up[i], dy[i], dgate[i], dup[i]);
  }
  const auto gelu = [&](const auto& v) {
    double sum = 0;
    for (size_t i = 0; i < v.size(); i++) sum += dy[i] * plain::gelu(v[i]);
    return sum;
  };
  const auto swiglu = [&](const auto& g, const auto& u) {
    double sum = 0;
    for (size_t i = 0; i < g.size(); i++) sum += dy[i] * plain::swiglu(g[i], u[i]);
    return sum;
  };
  CHECK(rel_error(dx, differences(x, gelu)) < kDifferenceTolerance);
  CHECK(rel_error(dgate, differences(x, [&](auto& v) { return swiglu(v, up); })) <
        kDifferenceTolerance);
  CHECK(rel_error(dup, differences(up, [&](auto& v) { return swiglu(x, v); })) <
        kDifferenceTolerance);
}

TEST_CASE("plain RoPE turned back is its gradient and its inverse") {
  const int HS = 6;
  const double frequency[] = {1, .3, .07};
  const auto x = random_values<double>(HS, "x"), dy = random_values<double>(HS, "dy");
  auto dx = dy, there = x;
  plain::rope(HS, dx.data(), 13, frequency, -1.);
  const auto loss = [&](std::vector<double> v) {
    plain::rope(HS, v.data(), 13, frequency, 1.);
    return dot(v, dy);
  };
  CHECK(rel_error(dx, differences(x, loss)) < kDifferenceTolerance);
  plain::rope(HS, there.data(), 13, frequency, 1.);
  plain::rope(HS, there.data(), 13, frequency, -1.);
  CHECK(rel_error(there, x) < 1e-14);  // double's rounding
}

TEST_CASE("plain attention backward matches finite differences") {
  const int T = 6, HS = 5;
  const auto q = random_values<double>(T * HS, "q"), k = random_values<double>(T * HS, "k"),
             v = random_values<double>(T * HS, "v"), dout = random_values<double>(T * HS, "dout");
  std::vector<double> out(size_t(T * HS)), p(size_t(T * T));
  const auto loss = [&](const auto& q_, const auto& k_, const auto& v_) {
    plain::attention_forward(T, HS, q_.data(), k_.data(), v_.data(), HS, out.data(), HS, p.data());
    return dot(out, dout);
  };
  loss(q, k, v);
  std::vector<double> dq(q.size()), dk(k.size()), dv(v.size()), probabilities = p;
  plain::attention_backward(T, HS, q.data(), k.data(), v.data(), HS, probabilities.data(),
                            dout.data(), HS, dq.data(), dk.data(), dv.data());
  CHECK(rel_error(dq, differences(q, [&](auto& x) { return loss(x, k, v); })) <
        kDifferenceTolerance);
  CHECK(rel_error(dk, differences(k, [&](auto& x) { return loss(q, x, v); })) <
        kDifferenceTolerance);
  CHECK(rel_error(dv, differences(v, [&](auto& x) { return loss(q, k, x); })) <
        kDifferenceTolerance);
}

TEST_CASE("plain log-probability's and entropy's gradients match finite differences") {
  const int V = 13;
  const auto logits = random_values<double>(V, "logits", 2);
  for (const double temperature : {1., .7}) {
    std::vector<double> dlogits(size_t(V), 0.);
    plain::classifier_backward(V, logits.data(), 4, temperature, .8, -.3, dlogits.data());
    const auto loss = [&](const auto& x) {
      double logp, entropy;
      plain::classifier_forward(V, x.data(), 4, temperature, logp, entropy);
      return .8 * logp - .3 * entropy;
    };
    CHECK(rel_error(dlogits, differences(logits, loss)) < kDifferenceTolerance);
  }
}

// =============================================================================================
// Fast layers against plain ones

TEST_CASE("vexp agrees with exp to two units in the last place, and keeps NaN") {
  double worst = 0;
  for (double x = -87.2; x < 88.6; x += .0137) {
    const double e = exp1(float(x)), truth = std::exp(double(float(x)));
    worst = std::max(worst, std::abs(e - truth) / truth);
  }
  CHECK(worst < 2.4e-7);  // 2 x 2^-23
  CHECK(exp1(0) == 1);
  CHECK(exp1(-std::numeric_limits<float>::infinity()) == 0);
  CHECK(std::isnan(exp1(std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("GEMM agrees with the plain product in every order of its operands") {
  struct Size {
    int M, N, K;
  };
  // below, at and above the tile and the depth of a block
  for (const Size s : {Size{1, 1, 1}, Size{5, 3, 7}, Size{kMR, kNR, 9}, Size{kMR + 1, kNR + 1, 385},
                       Size{37, 70, 800}, Size{130, 33, 384}}) {
    for (const Inner a_inner : {Inner::k, Inner::other}) {
      for (const Inner b_inner : {Inner::k, Inner::other}) {
        const auto a = random_values<float>(size_t(s.M * s.K), "a");
        const auto b = random_values<float>(size_t(s.N * s.K), "b");
        const auto bias = random_values<float>(size_t(s.N), "bias");
        const auto start = random_values<float>(size_t(s.M * s.N), "start");
        const auto at_a = [&](int m, int k) {
          return a[size_t(a_inner == Inner::k ? m * s.K + k : k * s.M + m)];
        };
        const auto at_b = [&](int k, int n) {
          return b[size_t(b_inner == Inner::k ? n * s.K + k : k * s.N + n)];
        };
        std::vector<double> truth;
        for (int m = 0; m < s.M; m++)
          for (int n = 0; n < s.N; n++) {
            double sum = start[size_t(m * s.N + n)];
            for (int k = 0; k < s.K; k++) sum += double(at_a(m, k)) * at_b(k, n);
            truth.push_back(sum);
          }
        CAPTURE(s.M);
        CAPTURE(s.N);
        CAPTURE(s.K);
        auto c = start;
        Product p{s.M,
                  s.N,
                  s.K,
                  {a.data(), a_inner == Inner::k ? s.K : s.M, a_inner},
                  {b.data(), b_inner == Inner::k ? s.K : s.N, b_inner},
                  c.data(),
                  s.N};
        p.accumulate = true;
        gemm(p);
        CHECK(rel_error(c, truth) < kFloatTolerance);
        std::vector<float> d(c.size(), NAN);  // set, not added to
        p.accumulate = false, p.c = d.data(), p.bias = bias.data(), p.residual = start.data();
        gemm(p);
        for (int m = 0; m < s.M; m++)
          for (int n = 0; n < s.N; n++) truth[size_t(m * s.N + n)] += bias[size_t(n)];
        CHECK(rel_error(d, truth) < kFloatTolerance);
        if (a_inner == Inner::other) {  // the sums that come with it
          std::vector<float> sums(size_t(s.M), NAN);
          std::vector<double> sums_truth(size_t(s.M));
          for (int m = 0; m < s.M; m++)
            for (int k = 0; k < s.K; k++) sums_truth[size_t(m)] += at_a(m, k);
          p.bias = p.residual = nullptr, p.sums = sums.data();
          gemm(p);
          CHECK(rel_error(sums, sums_truth) < kFloatTolerance);
          p.accumulate = true;
          gemm(p);
          for (double& x : sums_truth) x *= 2;
          CHECK(rel_error(sums, sums_truth) < kFloatTolerance);
        }
        if (b_inner == Inner::k && a_inner == Inner::k) {  // decoding's panels: the same bits
          std::vector<std::byte> panels(size_t(panels_bytes(WeightType::f32, s.N, s.K)));
          std::vector<float> e(c.size());
          pack_weights(b.data(), s.N, s.K, panels.data());
          p.b = {nullptr, 0, Inner::k, {panels.data()}}, p.c = e.data();
          gemm(p);
          CHECK(e == d);
        }
      }
    }
  }
}

namespace {

// Blocks of all kinds: random, weights at +-127 and -128 (which other programs' files may hold),
// zeros, one number among zeros; scales from the least number of f16 up.
std::vector<Q8Block> all_kinds_of_blocks(int count) {
  Rng rng{5};
  std::vector<Q8Block> blocks(static_cast<size_t>(count));
  for (int b = 0; b < count; b++) {
    Q8Block& block = blocks[size_t(b)];
    block.d = float_to_f16(b % 11 == 0 ? 0x1p-24f : float(.01 * rng.uniform()));
    for (int i = 0; i < kQ8Block; i++) {
      const int kind = b % 7;
      block.q[i] = int8_t(kind == 0   ? -128
                          : kind == 1 ? 127
                          : kind == 2 ? (i % 2 ? -127 : 127)
                          : kind == 3 ? (i == 13 ? -128 : 0)
                                      : int(rng.below(256)) - 128);
    }
  }
  return blocks;
}
// Rows whose blocks are quantized to +-127 alone, or are random, tiny or zero.
std::vector<float> all_kinds_of_rows(int count, int in) {
  auto x = random_values<float>(size_t(count * in), "rows");
  for (int b = 0; b < count * in / kQ8Block; b++)
    for (int i = 0; i < kQ8Block; i++) {
      float& v = x[size_t(b * kQ8Block + i)];
      const int kind = b % 6;
      if (kind == 0) v = 3;
      if (kind == 1) v = -3;
      if (kind == 2) v = i % 2 ? 1e-7f : -1e-7f;
      if (kind == 3) v = 0;
    }
  return x;
}

}  // namespace

TEST_CASE("products with q8_0 equal their plain definition to the last bit") {
  const int threads = omp_get_max_threads();
  for (const int in : {32, 96, 1056}) {
    for (const int out : {1, 5, 33, 200, 389}) {
      const auto blocks = all_kinds_of_blocks(out * in / kQ8Block);
      std::vector<std::byte> panels(size_t(panels_bytes(WeightType::q8_0, out, in)));
      const Panels w{panels.data(), WeightType::q8_0};
      for (int o = 0; o < out; o++) write_blocks(w, in, o, &blocks[size_t(o * in / kQ8Block)]);
      std::vector<float> row(static_cast<size_t>(in)), expected_row(row);
      for (int o = 0; o < out; o++) {  // and come out of the panels as they went in
        for (int i = 0; i < in; i += kQ8Block)
          dequantize_q8_0(blocks[size_t((o * in + i) / kQ8Block)], &expected_row[size_t(i)]);
        read_row(w, in, o, row.data());
        CHECK(row == expected_row);
      }
      const auto bias = random_values<float>(size_t(out), "bias");
      for (const int N : {1, 2, 3, 4, 5, 7, 8, 12, 13, 64}) {
        const auto x = all_kinds_of_rows(N, in);
        std::vector<float> expected(size_t(N * out));
        plain::linear_forward_q8_0(N, in, out, x.data(), blocks.data(), bias.data(),
                                   expected.data());
        for (const int n : {1, 2, 3}) {
          set_threads(n);
          CAPTURE(in);
          CAPTURE(out);
          CAPTURE(N);
          CAPTURE(n);
          std::vector<float> y(expected.size(), NAN);
          Product p = forward_product(N, in, out, x.data(), nullptr, y.data());
          p.b = {nullptr, 0, Inner::k, w}, p.bias = bias.data();
          gemm(p);
          CHECK(y == expected);
        }
      }
    }
  }
  set_threads(threads);
}

TEST_CASE("a row has the same bits in panels of each type, alone and beside others") {
  const int threads = omp_get_max_threads();
  constexpr int kMost = kFewRows + 2;
  for (const WeightType type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    // less than a turn of the streams, one and a part, several; fewer panels than streams and more
    for (const int in : {24, 100, 400}) {
      for (const int out : {1, kNR + 3, 11 * kNR + 5}) {
        CAPTURE(kWeightTypeNames[int(type)]);
        CAPTURE(in);
        CAPTURE(out);
        auto w = random_values<float>(size_t(out * in), "w");
        std::vector<std::byte> memory(size_t(panels_bytes(type, out, in)));
        const Panels panels{memory.data(), type};
        for (int o = 0; o < out; o++) {
          write_row(panels, in, o, &w[size_t(o * in)]);
          read_row(panels, in, o, &w[size_t(o * in)]);  // what the type keeps of it
        }
        const auto x = random_values<float>(size_t(kMost * in), "x");
        const auto bias = random_values<float>(size_t(out), "bias");
        const auto residual = random_values<float>(size_t(kMost * out), "residual");
        const auto product = [&](int rows, float* y) {
          Product p = forward_product(rows, in, out, x.data(), w.data(), y);
          p.bias = bias.data(), p.residual = residual.data();
          return p;
        };
        std::vector<float> expected(size_t(kMost * out));
        gemm(product(kMost, expected.data()));  // from rows of weights, as in training
        for (int rows = 1; rows <= kMost; rows++) {
          for (const int n : {1, 2, 3}) {
            set_threads(n);
            std::vector<float> y(size_t(rows * out) + 1, NAN);
            Product p = product(rows, y.data());
            p.b = {nullptr, 0, Inner::k, panels};
            gemm(p);
            CAPTURE(rows);
            CAPTURE(n);
            CHECK(std::equal(y.begin(), y.end() - 1, expected.begin()));
            CHECK(std::isnan(y.back()));
          }
        }
        // A thread may have some of the rows.
        std::vector<float> y(size_t(kMost * out), NAN);
        Product p = product(kMost, y.data());
        p.b = {nullptr, 0, Inner::k, panels};
        for (const int m : {0, 1, 4, 11}) {
          const int end = m == 0 ? 1 : m == 1 ? 4 : m == 4 ? 11 : kMost;
          gemm_rectangle(p, m, end, 0, out);
        }
        CHECK(y == expected);
      }
    }
  }
  set_threads(threads);
}

TEST_CASE("activations are quantized as weights are, and stay what they are when not finite") {
  Rng rng{3};
  float x[kQ8Block];
  int8_t q[kQ8Block];
  float scale = 0;
  int32_t start = 0;
  for (int trial = 0; trial < 20000; trial++) {
    const double size = std::pow(10., rng.uniform() * 90 - 46);  // subnormal numbers to overflow
    for (float& v : x) {
      v = float(size * rng.normal());
      if (trial % 3 == 0) v = float(size * (double(rng.below(255)) - 127) / 2);  // halves
    }
    if (trial % 3 == 0) x[trial % 32] = float(size * 127 * (trial % 2 ? 1 : -1));
    bool finite = true;
    for (const float v : x) finite &= std::isfinite(v);
    if (!finite) continue;
    quantize_block(x, q, scale, start);
    const Q8Block expected = quantize_q8_0(x);
    CHECK(std::equal(q, q + kQ8Block, expected.q));
    CHECK(scale == f16_to_float(expected.d));
    CHECK(start == -kQ8Offset * std::accumulate(q, q + kQ8Block, 0));
  }
  for (const float wrong : {NAN, INFINITY, -INFINITY}) {
    for (int i = 0; i < kQ8Block; i++) {
      for (int j = 0; j < kQ8Block; j++) x[j] = j == i ? wrong : float(j);
      quantize_block(x, q, scale, start);
      CHECK(std::isnan(scale));
    }
  }
}

TEST_CASE("a team of threads does every item of its loops once, and hands on an exception") {
  const int threads = omp_get_max_threads();
  for (const int n : {1, 2, 5}) {  // more than there are cores, too
    set_threads(n);
    std::vector<int64_t> visits(997);
    const std::string error = error_of([&] {
      with_team([&] {
        CHECK(loop_threads() == n);
        for (int loop = 0; loop < 300; loop++) {
          const int64_t items = loop % 7 == 0 ? 1 : loop % 5 == 0 ? 3 : int64_t(visits.size());
          parallel_for(items, [&](int64_t i) { visits[size_t(i)]++; });
          parallel_groups(items, 1 + loop % 4, [&](int64_t i) { visits[size_t(i)] += 1000; });
        }
        with_team([&] { parallel_for(1, [&](int64_t) { visits[0]++; }); });  // inside another one
        fail("after the loops");
      });
    });
    CHECK(error == "after the loops");
    CHECK(visits[0] == 300 * 1001 + 1);
    CHECK(visits[2] == (300 - 43) * 1001);             // 43 of 300 are multiples of 7
    CHECK(visits[996] == (300 - 43 - 60 + 9) * 1001);  // 60 of 5, 9 of both
    CHECK(loop_threads() == n);
  }
  set_threads(threads);
}

TEST_CASE("the most likely token is the first of the largest logits") {
  for (const int n : {1, 15, 1024, 1025, 5000}) {
    auto x = random_values<float>(size_t(n), "logits");
    for (float& v : x) v -= 100;  // all below zero
    CHECK(index_of_largest(n, x.data()) == std::max_element(x.begin(), x.end()) - x.begin());
    for (const int first : {n - 1, n / 2, n / 3, 0}) {  // equals, later ones among them
      x[size_t(first)] = 1;
      CHECK(index_of_largest(n, x.data()) == first);
    }
  }
}

TEST_CASE("f16 widens in vectors as it does one by one") {
  for (int begin = 0; begin < 65536; begin += kLanes) {
    uint16_t h[kLanes];
    for (int i = 0; i < kLanes; i++) h[i] = uint16_t(begin + i);
    const vec x = widen_f16(reinterpret_cast<const std::byte*>(h));
    for (int i = 0; i < kLanes; i++) {
      const float expected = f16_to_float(h[i]);
      CHECK((x[i] == expected || (std::isnan(x[i]) && std::isnan(expected))));
      CHECK(std::signbit(x[i]) == std::signbit(expected));
    }
  }
}

TEST_CASE("norms agree with their plain definition, forward and backward") {
  for (const int C : {3, 24, 129}) {
    for (const bool layer_norm : {true, false}) {
      const int N = 70;  // more than one block of rows
      const auto x = random_values<float>(size_t(N * C), "x"),
                 w = random_values<float>(size_t(C), "w"), b = random_values<float>(size_t(C), "b"),
                 dy = random_values<float>(size_t(N * C), "dy"),
                 start = random_values<float>(size_t(N * C), "start");
      std::vector<float> y(x.size()), y_plain(x.size()), mean(size_t(N), 0.f), rstd(size_t(N), 0.f);
      const NormStats stats{layer_norm ? mean.data() : nullptr, rstd.data()};
      norm_forward(N, C, x.data(), w.data(), layer_norm ? b.data() : nullptr, 1e-5f, y.data(),
                   stats);
      plain::norm_forward(N, C, x.data(), w.data(), layer_norm ? b.data() : nullptr, 1e-5f,
                          y_plain.data());
      CAPTURE(C);
      CAPTURE(layer_norm);
      CHECK(rel_error(y, y_plain) < kFloatTolerance);
      auto dx = start, dx_plain = start, dw = w, dw_plain = w, db = b, db_plain = b;
      std::vector<float> partials(size_t(norm_partials(N, C)));
      norm_backward(N, C, dy.data(), x.data(), w.data(), stats, dx.data(), dw.data(),
                    layer_norm ? db.data() : nullptr, true, partials.data());
      plain::norm_backward(N, C, dy.data(), x.data(), w.data(), layer_norm, 1e-5f, dx_plain.data(),
                           dw_plain.data(), db_plain.data());
      CHECK(rel_error(dx, dx_plain) < kFloatTolerance);
      CHECK(rel_error(dw, dw_plain) < kFloatTolerance);
      CHECK(rel_error(db, db_plain) < kFloatTolerance);
    }
  }
}

TEST_CASE("activations agree with their plain definition, forward and backward") {
  const int N = 3, F = 37;
  const auto x = random_values<float>(size_t(2 * N * F), "x", 3),
             dy = random_values<float>(size_t(2 * N * F), "dy");
  std::vector<float> y(x.size()), dx = x, y_plain, dx_plain(x.size());
  gelu_forward(int64_t(x.size()), x.data(), y.data());
  gelu_backward(int64_t(x.size()), dx.data(), dy.data());  // in place of x
  for (size_t i = 0; i < x.size(); i++) {
    y_plain.push_back(plain::gelu(x[i]));
    dx_plain[i] = dy[i] * plain::gelu_derivative(x[i]);
  }
  CHECK(rel_error(y, y_plain) < kFloatTolerance);
  CHECK(rel_error(dx, dx_plain) < kFloatTolerance);
  y.resize(size_t(N * F));
  y_plain.clear();
  swiglu_forward(N, F, x.data(), y.data());
  dx = x;
  swiglu_backward(N, F, dx.data(), dy.data());
  for (int n = 0; n < N; n++) {
    for (int f = 0; f < F; f++) {
      const size_t gate = size_t(n * 2 * F + f), up = gate + F;
      y_plain.push_back(plain::swiglu(x[gate], x[up]));
      plain::swiglu_derivative(x[gate], x[up], dy[size_t(n * F + f)], dx_plain[gate], dx_plain[up]);
    }
  }
  CHECK(rel_error(y, y_plain) < kFloatTolerance);
  CHECK(rel_error(dx, dx_plain) < kFloatTolerance);
}

TEST_CASE("attention agrees with its plain definition over packed documents and grouped heads") {
  for (const int HS : {6, 16, 40}) {
    const int NH = 4, NKV = 2;
    const std::vector<int> starts = {0, 1, 70, 135, 143, 300, 893};  // 1 to 593 positions, odd
    const int N = starts.back(), ld = (NH + 2 * NKV) * HS;
    const auto qkv = random_values<float>(size_t(N * ld), "qkv"),
               dout = random_values<float>(size_t(N * NH * HS), "dout");
    std::vector<float> out(dout.size()), lse(size_t(N * NH)), dqkv(qkv.size(), NAN);
    const Attention a{
        NH, NKV, HS, starts, qkv.data(), qkv.data() + NH * HS, qkv.data() + (NH + NKV) * HS,
        ld, ld,  ld};
    attention_forward(a, out.data(), lse.data());
    attention_backward(a, out.data(), lse.data(), dout.data(), dqkv.data(), dqkv.data() + NH * HS,
                       dqkv.data() + (NH + NKV) * HS, ld);
    std::vector<float> out_plain(out.size()), dqkv_plain(qkv.size());
    for (size_t d = 0; d + 1 < starts.size(); d++) {
      for (int h = 0; h < NH; h++) {
        const int T = starts[d + 1] - starts[d], row = starts[d] * ld;
        const int q = row + h * HS, k = row + (NH + h / (NH / NKV)) * HS, v = k + NKV * HS;
        const int o = (starts[d] * NH + h) * HS;
        std::vector<float> p(size_t(T * T));
        plain::attention_forward(T, HS, &qkv[q], &qkv[k], &qkv[v], ld, &out_plain[o], NH * HS,
                                 p.data());
        plain::attention_backward(T, HS, &qkv[q], &qkv[k], &qkv[v], ld, p.data(), &dout[o], NH * HS,
                                  &dqkv_plain[q], &dqkv_plain[k], &dqkv_plain[v]);
      }
    }
    CAPTURE(HS);
    CHECK(rel_error(out, out_plain) < kFloatTolerance);
    CHECK(rel_error(dqkv, dqkv_plain) < kFloatTolerance);
  }
}

TEST_CASE("the classifier agrees with its plain definition") {
  for (const int V : {1, 5, 257, 1000}) {
    const auto logits = random_values<float>(size_t(V), "logits", 3);
    const float temperature = .8f;
    const int target = V / 2;
    float logp, entropy;
    plain::classifier_forward(V, logits.data(), target, temperature, logp, entropy);
    const RowSoftmax s = row_softmax(V, logits.data(), 1 / temperature);
    CHECK(std::abs(s.logp(logits[size_t(target)], 1 / temperature) - logp) < kFloatTolerance);
    CHECK(std::abs(s.entropy - entropy) < kFloatTolerance * 10);  // up to log V = 7
    std::vector<float> dlogits = logits, plain_dlogits(logits.size());
    row_softmax_backward(V, dlogits.data(), s, 1 / temperature, target, .8f, -.3f);
    plain::classifier_backward(V, logits.data(), target, temperature, .8f, -.3f,
                               plain_dlogits.data());
    CHECK(rel_error(dlogits, plain_dlogits) < 3 * kFloatTolerance);
  }
}

// =============================================================================================
// Whole models

namespace {

Config tiny(Family family, bool tied = false) {
  Config c;
  c.family = family;
  c.V = 131, c.T = 160, c.L = 2, c.C = 40, c.NH = 4, c.NKV = 4, c.HS = 10, c.F = 52;
  if (family != Family::gpt2) c.NKV = 2, c.HS = 12;
  c.tied = tied;
  return c;
}

void randomize(Gpt& gpt) {  // everywhere: zero projections would hide half of the gradients
  const auto& tensors = gpt.table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    const double scale = tensors[i].in > 1 ? 1 / std::sqrt(double(tensors[i].in)) : .2;
    auto values = random_values<float>(size_t(tensors[i].size()), tensors[i].name.c_str(), scale);
    if (tensors[i].init_one)
      for (float& x : values) x += 1;
    gpt.write(int(i), Slot::weight, values);
  }
}

std::unique_ptr<Gpt> random_model(const Config& c, GptOptions options = {}) {
  auto gpt = make_gpt(c, options);
  randomize(*gpt);
  return gpt;
}

struct Sample {
  std::vector<int> tokens, targets, doc_starts;
  std::vector<float> dlogp, dentropy;
  Batch batch() const { return {tokens, targets, doc_starts, .9f}; }
};

Sample make_sample(const Config& c, std::vector<int> lengths, const char* name = "sample") {
  Sample s;
  Rng rng{hash64(name)};
  for (int length : lengths) {
    s.doc_starts.push_back(int(s.tokens.size()));
    for (int t = 0; t < length; t++) {
      s.tokens.push_back(int(rng.below(uint64_t(c.V))));
      s.targets.push_back(rng.below(5) == 0 ? -1 : int(rng.below(uint64_t(c.V))));
      s.dlogp.push_back(float(rng.normal()));
      s.dentropy.push_back(float(rng.normal()));
    }
  }
  s.doc_starts.push_back(int(s.tokens.size()));
  return s;
}

std::vector<float> all(const Gpt& gpt, Slot slot) {
  std::vector<float> values;
  for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
    const size_t at = values.size();
    values.resize(at + size_t(gpt.table().tensors[i].size()));
    gpt.read(int(i), slot, std::span(values).subspan(at));
  }
  return values;
}
std::vector<float> copy(std::span<const float> x) { return {x.begin(), x.end()}; }

const Family kFamilies[] = {Family::gpt2, Family::llama, Family::qwen3, Family::qwen2};

struct Threads {  // sets their number for a scope
  explicit Threads(int n) : before(omp_get_max_threads()) { omp_set_num_threads(n); }
  ~Threads() { omp_set_num_threads(before); }
  int before;
};

}  // namespace

TEST_CASE("forward, backward and updates give the same bits for 1, 2, 5 and 16 threads") {
  for (const Family family : kFamilies) {
    for (const bool muon_owns : {false, true}) {
      std::vector<float> first;
      for (const int threads : {1, 2, 5, 16}) {
        const Threads scope(threads);
        const auto gpt = random_model(tiny(family), {.muon = muon_owns});
        const Sample s = make_sample(gpt->config(), {70, 1, 129, 33});
        std::vector<float> result;
        for (int step = 1; step <= 3; step++) {
          gpt->forward_backward(s.batch(), s.dlogp, {}, s.dentropy);
          const auto logp = copy(gpt->logp()), gradient = all(*gpt, Slot::gradient);
          OptimizerStep o;
          o.step = step, o.lr.fill(.01f), o.muon_lr = .02f, o.decay = .1f, o.max_norm = 1;
          gpt->update(o);
          const UpdateStats stats = gpt->stats();
          REQUIRE(stats.grad_norm > 1);  // clipping takes part
          result.insert(result.end(), logp.begin(), logp.end());
          result.insert(result.end(), gradient.begin(), gradient.end());
          result.push_back(float(stats.grad_norm));
        }
        const auto weights = all(*gpt, Slot::weight);
        result.insert(result.end(), weights.begin(), weights.end());
        if (first.empty()) first = result;
        CHECK(first == result);  // NaN would fail this
      }
    }
  }
}

namespace {

// Counts the tasks of every loop, and runs them in order.
struct TaskCounter : LoopObserver {
  explicit TaskCounter(int n) : n(n) { current = this; }
  ~TaskCounter() override { current = nullptr; }
  int threads() const override { return n; }
  void run(const char* where, int64_t count, bool,
           const std::function<void(int64_t)>& work) override {
    most_tasks[where] = std::max(most_tasks[where], count);
    for (int64_t t = 0; t < count; t++) work(t);
  }
  int64_t tasks(const std::string& where) const {  // templates have their types behind the name
    int64_t most = 0;
    for (const auto& [name, count] : most_tasks)
      if (name.starts_with(where)) most = std::max(most, count);
    return most;
  }
  int n;
  std::map<std::string, int64_t> most_tasks;
};

}  // namespace

TEST_CASE("one long document is divided among many threads, and gives the same bits") {
  for (const Family family : kFamilies) {
    Config c = tiny(family);
    c.T = 1100;
    const auto run = [&] {
      std::vector<float> result;
      const auto gpt = random_model(c);
      const Sample s = make_sample(c, {1030});
      gpt->forward_backward(s.batch(), s.dlogp, {}, s.dentropy);
      result = all(*gpt, Slot::gradient);
      const auto cache = gpt->make_cache(1100);
      DecodeResult decoded;
      const std::span tokens(s.tokens);
      const int sequence = cache->create();
      for (const auto& piece : {tokens.first(7), tokens.subspan(7, 700)}) {
        const DecodeRow row{sequence, piece, {}, {}};
        gpt->decode(*cache, {&row, 1}, decoded, true);
        result.insert(result.end(), decoded.logits.begin(), decoded.logits.end());
      }
      return result;
    };
    std::vector<float> first;
    {
      const Threads scope(1);
      first = run();
    }
    for (const int threads : {2, 16}) {
      const Threads scope(threads);
      CHECK(first == run());
    }
    TaskCounter counter(16);
    CHECK(first == run());
    CHECK(counter.tasks("attention_forward") >= 5);
    CHECK(counter.tasks("attention_backward") >= 10);  // keys, and queries
    CHECK(counter.tasks("attend_cached") >= 8);
    CHECK(counter.tasks("embed_backward") >= 16);
  }
}

TEST_CASE("products are dealt out evenly among more threads than there are panels, same bits") {
  struct Case {
    int M, N, K, threads;
  };
  // many rows and few panels for each thread; a last tile that is not whole; few rows
  for (const Case& x : {Case{64, 1000, 70, 64}, {131, 256, 600, 7}, {5, 640, 70, 16}}) {
    const auto a = random_values<float>(size_t(x.M * x.K), "a");
    const auto w = random_values<float>(size_t(x.N * x.K), "w");
    std::vector<float> expected(size_t(x.M * x.N)), y(expected.size(), NAN);
    {
      const Threads scope(1);
      gemm(forward_product(x.M, x.K, x.N, a.data(), w.data(), expected.data()));
    }
    TaskCounter counter(x.threads);
    gemm(forward_product(x.M, x.K, x.N, a.data(), w.data(), y.data()));
    CHECK(y == expected);
  }
}

TEST_CASE("forward_backward equals forward then backward, bit for bit") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      const auto a = random_model(tiny(family, tied)), b = random_model(tiny(family, tied));
      const Sample s = make_sample(a->config(), {70, 1, 33});
      a->forward_backward(s.batch(), s.dlogp, {}, s.dentropy);
      b->forward(s.batch(), Pass::train);
      b->backward(s.dlogp, {}, s.dentropy);
      CHECK(copy(a->logp()) == copy(b->logp()));
      CHECK(copy(a->entropy()) == copy(b->entropy()));
      CHECK(all(*a, Slot::gradient) == all(*b, Slot::gradient));
    }
  }
}

TEST_CASE("a vocabulary whose logits need chunks gives the gradients of whole ones") {
  Config c = tiny(Family::qwen3);
  c.V = 70'001, c.L = 1, c.C = 8, c.F = 8, c.T = 300;
  REQUIRE(logit_rows(c, 300) == 256);  // two chunks for 300 tokens
  Sample s = make_sample(c, {256, 44});
  for (int& t : s.targets) t = std::max(t, 0);  // every position is a row of logits
  const auto a = random_model(c), b = random_model(c), halves = random_model(c);
  a->forward_backward(s.batch(), s.dlogp);
  b->forward(s.batch(), Pass::train);  // backward makes the logits again
  b->backward(s.dlogp);
  CHECK(all(*a, Slot::gradient) == all(*b, Slot::gradient));
  const std::vector<int> first = {0, 256}, second = {0, 44};  // one chunk each
  const std::span tokens(s.tokens), targets(s.targets);
  const std::span dlogp(s.dlogp);
  halves->forward_backward({tokens.first(256), targets.first(256), first, .9f}, dlogp.first(256));
  halves->forward_backward({tokens.subspan(256), targets.subspan(256), second, .9f},
                           dlogp.subspan(256));
  CHECK(rel_error(all(*halves, Slot::gradient), all(*a, Slot::gradient)) < kFloatTolerance);
}

TEST_CASE("two accumulated micro-batches equal one batch") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      const auto whole = random_model(tiny(family, tied)),
                 halves = random_model(tiny(family, tied));
      const Config& c = whole->config();
      const Sample a = make_sample(c, {70, 9}, "a"), b = make_sample(c, {1, 90}, "b");
      Sample both = a;
      both.doc_starts.pop_back();
      for (int start : b.doc_starts) both.doc_starts.push_back(start + int(a.tokens.size()));
      const auto append = [](auto& to, const auto& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      append(both.tokens, b.tokens), append(both.targets, b.targets), append(both.dlogp, b.dlogp);
      whole->forward_backward(both.batch(), both.dlogp);
      halves->forward_backward(a.batch(), a.dlogp);
      halves->forward_backward(b.batch(), b.dlogp);
      for (size_t i = 0; i < whole->table().tensors.size(); i++) {
        const Tensor& t = whole->table().tensors[i];
        std::vector<float> x(size_t(t.size())), y(size_t(t.size()));
        whole->read(int(i), Slot::gradient, x);
        halves->read(int(i), Slot::gradient, y);
        CAPTURE(t.name);
        // a key's bias has no gradient but rounding: compare it with its neighbours' size
        if (family == Family::gpt2 && t.name.ends_with(".k.bias")) continue;
        CHECK(rel_error(y, x) < kFloatTolerance);
      }
    }
  }
}

TEST_CASE("a packed document has the log-probabilities it has alone, bit for bit") {
  for (const Family family : kFamilies) {
    const auto gpt = random_model(tiny(family));
    const Sample s = make_sample(gpt->config(), {70, 1, 129, 33});
    gpt->forward(s.batch(), Pass::score);
    const auto packed = copy(gpt->logp()), entropy = copy(gpt->entropy());
    for (size_t d = 0; d + 1 < s.doc_starts.size(); d++) {
      const size_t begin = size_t(s.doc_starts[d]), length = size_t(s.doc_starts[d + 1]) - begin;
      const std::vector<int> starts = {0, int(length)};
      gpt->forward({std::span(s.tokens).subspan(begin, length),
                    std::span(s.targets).subspan(begin, length), starts, .9f},
                   Pass::score);
      CHECK(copy(gpt->logp()) == std::vector<float>(packed.begin() + long(begin),
                                                    packed.begin() + long(begin + length)));
      CHECK(copy(gpt->entropy()) == std::vector<float>(entropy.begin() + long(begin),
                                                       entropy.begin() + long(begin + length)));
    }
  }
}

TEST_CASE("inference and a shared model score as training does, bit for bit") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      const auto train = random_model(tiny(family, tied));
      const auto inference = random_model(tiny(family, tied), {.mode = Mode::inference});
      const auto shared =
          make_gpt(train->config(), {.mode = Mode::inference, .share = train.get()});
      const Sample s = make_sample(train->config(), {70, 1, 33});
      train->forward(s.batch(), Pass::train);
      inference->forward(s.batch(), Pass::score);
      shared->forward(s.batch(), Pass::score);
      CHECK(copy(train->logp()) == copy(inference->logp()));
      CHECK(copy(train->logp()) == copy(shared->logp()));
      CHECK(all(*inference, Slot::weight) == all(*train, Slot::weight));  // out of its panels
    }
  }
}

TEST_CASE("recomputation of each kind changes no bit, and takes less memory") {
  for (const Family family : kFamilies) {
    for (const Lora lora : {Lora{}, Lora{.rank = 3, .alpha = 5}}) {
      Config c = tiny(family);
      c.L = 4;
      const auto kept = random_model(c, {.lora = lora});
      const Sample s = make_sample(c, {70, 1, 33});
      const auto train = [&](Gpt& gpt) {
        gpt.forward(s.batch(), Pass::train);
        gpt.backward(s.dlogp, {}, s.dentropy);
        gpt.forward_backward(s.batch(), s.dlogp);
      };
      train(*kept);
      for (const Recompute how : {Recompute::light, Recompute::full}) {
        const auto made = random_model(c, {.recompute = how, .lora = lora});
        train(*made);
        CHECK(all(*kept, Slot::gradient) == all(*made, Slot::gradient));
        CHECK(copy(kept->logp()) == copy(made->logp()));
      }
    }
  }
  GptOptions options{.batch_tokens = 4096};
  Config c = tiny(Family::qwen3);
  c.L = 8;
  const int64_t kept = plan_memory(c, options).total();
  options.recompute = Recompute::light;
  const int64_t light = plan_memory(c, options).total();
  CHECK(light < kept * 9 / 10);
  options.recompute = Recompute::full;
  CHECK(plan_memory(c, options).total() < kept / 2);
  CHECK(plan_memory(c, options).total() < light);
}

TEST_CASE("the plan of a model that decodes has its panels, its cache and its activations") {
  for (const Family family : kFamilies) {
    const Config c = tiny(family);
    GptOptions options{.decode = {.rows = 5, .tokens = 40, .positions = 1000}};
    const MemoryPlan plan = plan_memory(c, options);
    const auto item = [&](const std::string& what) {
      int64_t bytes = -1;
      for (const MemoryPlan::Item& i : plan.items)
        if (i.what == what) bytes = i.bytes;
      return bytes;
    };
    Weights weights(c, make_table(c), options);
    weights.make_panels();
    CHECK(item("panels") == weights.panels.size() * 4);
    for (const CacheType type : {CacheType::f32, CacheType::bf16}) {
      const int64_t page = CpuKvCache::page_bytes(c, type);
      options.decode.cache = type;
      CHECK(plan_memory(c, options).items.back().what == "KV cache");
      CHECK(plan_memory(c, options).items.back().bytes == 16 * page);
      CHECK(page ==
            (type == CacheType::f32 ? 4 : 2) * c.L * c.NKV * kPage * (c.HS + to_lanes(c.HS)));
    }
    Activations activations{};
    activations.reserve(c, 40, Saved::none);
    CHECK(item("decoding") == activations.arena.size() * 4);
    options.mode = Mode::inference;  // its only weights are panels
    for (const MemoryPlan::Item& i : plan_memory(c, options).items) CHECK(i.what != "panels");
  }
}

TEST_CASE("a KV cache that no memory can hold is refused with the model, in one clear line") {
  Config c = tiny(Family::llama);
  c.T = 1 << 30, c.HS = 256, c.NKV = 4;
  const GptOptions options{.decode = {.rows = 1, .tokens = 1, .positions = c.T}};
  const std::string error = error_of([&] { make_gpt(c, options); });
  CHECK(contains(error, "KV cache 17.6 TB"));
  CHECK(contains(error, "lower the number of sequences decoded together, or their length"));
}

TEST_CASE("a model whose adapters are off scores and decodes, and never trains") {
  const auto gpt = random_model(tiny(Family::llama), {.lora = {.rank = 2, .alpha = 4}});
  const Sample s = make_sample(gpt->config(), {33});
  const std::string refused = "found the adapters off, expected them on";
  gpt->forward(s.batch(), Pass::train);
  gpt->use_adapters(false);
  CHECK(contains(error_of([&] { gpt->backward(s.dlogp); }), "backward: " + refused));
  CHECK(contains(error_of([&] { gpt->forward_backward(s.batch(), s.dlogp); }), refused));
  CHECK(contains(error_of([&] { gpt->forward(s.batch(), Pass::train); }), refused));
  gpt->forward(s.batch(), Pass::score);
  gpt->use_adapters(true);
  gpt->forward_backward(s.batch(), s.dlogp);
  gpt->update({});
  CHECK(gpt->stats().grad_norm > 0);
}

TEST_CASE("decoding does not disturb a live forward") {
  const auto a = random_model(tiny(Family::qwen3)), b = random_model(tiny(Family::qwen3));
  const Sample s = make_sample(a->config(), {70, 33});
  const std::vector<int> prompt = {3, 1, 4, 1, 5};
  for (Gpt* gpt : {a.get(), b.get()}) {
    gpt->forward(s.batch(), Pass::train);
    if (gpt == a.get()) {
      const auto cache = gpt->make_cache(64);
      DecodeResult result;
      const DecodeRow row{cache->create(), prompt, {}, {}};
      gpt->decode(*cache, {&row, 1}, result);
    }
    gpt->backward(s.dlogp);
  }
  CHECK(all(*a, Slot::gradient) == all(*b, Slot::gradient));
}

TEST_CASE("a gradient that is not finite leaves weights and optimizer state untouched") {
  for (const bool muon_owns : {false, true}) {
    const auto gpt = random_model(tiny(Family::qwen3), {.muon = muon_owns});
    Sample s = make_sample(gpt->config(), {33});
    OptimizerStep o;
    o.lr.fill(.01f), o.muon_lr = .02f;
    gpt->forward_backward(s.batch(), s.dlogp);
    gpt->update(o);
    CHECK(!gpt->stats().skipped);
    const auto weights = all(*gpt, Slot::weight), m = all(*gpt, Slot::moment1),
               v = all(*gpt, Slot::moment2);
    s.targets[7] = 5, s.dlogp[7] = std::numeric_limits<float>::infinity();
    gpt->forward_backward(s.batch(), s.dlogp);
    gpt->update(o);
    CHECK(gpt->stats().skipped);
    CHECK(all(*gpt, Slot::weight) == weights);
    CHECK(all(*gpt, Slot::moment1) == m);
    CHECK(all(*gpt, Slot::moment2) == v);
    s.dlogp[7] = 1;  // and the next step is clean again
    gpt->forward_backward(s.batch(), s.dlogp);
    gpt->update(o);
    CHECK(!gpt->stats().skipped);
  }
}

TEST_CASE("a NaN weight makes a NaN log-probability") {
  for (const Family family : kFamilies) {
    const auto gpt = random_model(tiny(family));
    const int down = gpt->table().find("blocks.0.down.weight");
    std::vector<float> w(size_t(gpt->table().tensors[size_t(down)].size()), NAN);
    gpt->write(down, Slot::weight, w);
    const Sample s = make_sample(gpt->config(), {33});
    gpt->forward(s.batch(), Pass::score);
    for (size_t n = 0; n < s.targets.size(); n++) {
      if (s.targets[n] >= 0) CHECK(std::isnan(gpt->logp()[n]));
    }
  }
}

TEST_CASE("updates without a backward pass before change nothing but the decay") {
  const auto gpt = random_model(tiny(Family::llama));
  const auto before = all(*gpt, Slot::weight);
  OptimizerStep o;
  o.lr.fill(.01f);
  gpt->update(o);
  CHECK(gpt->stats().grad_norm == 0);
  CHECK(all(*gpt, Slot::weight) == before);
}

TEST_CASE("bad batches and impossible models end in one clear line") {
  const auto gpt = random_model(tiny(Family::qwen3));
  Sample s = make_sample(gpt->config(), {33});
  const auto forward = [&](const Batch& b) {
    return error_of([&] { gpt->forward(b, Pass::score); });
  };
  CHECK(contains(forward({}), "found 0 tokens"));
  Sample bad = s;
  bad.tokens[3] = 131;
  CHECK(contains(forward(bad.batch()), "position 3: found token 131"));
  bad = s;
  bad.doc_starts.back() = 32;
  CHECK(contains(forward(bad.batch()), "doc_starts"));
  CHECK(contains(forward(make_sample(gpt->config(), {161}).batch()),
                 "expected 1 to the context of 160"));
  CHECK(contains(error_of([&] { gpt->backward(s.dlogp); }), "no forward"));
  gpt->forward(s.batch(), Pass::train);
  CHECK(contains(error_of([&] { gpt->backward(std::span(s.dlogp).first(5)); }), "found 5 weights"));
  Config huge = tiny(Family::qwen3);
  huge.C = 1 << 18, huge.L = 400, huge.F = 1 << 20;
  CHECK(contains(error_of([&] { make_gpt(huge, {}); }), "lower --depth"));
  CHECK(contains(error_of([&] { make_gpt(tiny(Family::gpt2), {.device = Device::cuda}); }),
                 "expected --device cpu"));
  Config wrong = tiny(Family::llama);
  wrong.NKV = 3;
  CHECK(contains(error_of([&] { make_gpt(wrong, {}); }), "num_key_value_heads: found 3"));
}

TEST_CASE(
    "LoRA: a model with adapters is the model of the merged weights, and learns as it would") {
  for (const Family family : kFamilies) {
    const Lora lora{.rank = 3, .alpha = 5};
    const auto base = random_model(tiny(family)), merged = random_model(tiny(family));
    const auto gpt = random_model(tiny(family), {.lora = lora});  // random everywhere: B too
    const ParamTable& table = gpt->table();
    const Sample s = make_sample(gpt->config(), {70, 1, 33});
    // W + scale B A, on the rows of each adapter's tensor on disk
    std::map<std::string, std::vector<double>> a_of, b_of;  // by the matrix's name on disk
    for (size_t i = 0; i < table.tensors.size(); i++) {
      const Tensor& t = table.tensors[i];
      CHECK(t.trainable == (t.kind == Kind::adapter));
      if (t.kind != Kind::adapter) continue;
      std::vector<float> values(size_t(t.size()));
      gpt->read(int(i), Slot::weight, values);
      const std::string stem = std::string("base_model.model.");
      const bool is_a = t.name.back() == 'A';
      const std::string disk = t.disk.substr(stem.size(), t.disk.rfind(".lora_") - stem.size());
      (is_a ? a_of : b_of)[disk + ".weight"].assign(values.begin(), values.end());
    }
    REQUIRE(a_of.size() ==
            size_t(table.lora.rank ? (family == Family::gpt2 ? 4 : 7) * gpt->config().L : 0));
    const auto& rows = merged->table().tensors;
    for (size_t i = 0; i < rows.size(); i++) {
      const Tensor& t = rows[i];
      if (t.kind != Kind::matrix) continue;
      const auto &a = a_of.at(t.disk), &b = b_of.at(t.disk);
      std::vector<float> w(size_t(t.size()));
      merged->read(int(i), Slot::weight, w);
      for (int o = 0; o < t.out; o++)
        for (int j = 0; j < t.in; j++) {
          double sum = 0;
          for (int r = 0; r < lora.rank; r++)
            sum += b[size_t((t.disk_begin + o) * lora.rank + r)] * a[size_t(r * t.in + j)];
          w[size_t(o * t.in + j)] += float(sum * 5 / 3);
        }
      merged->write(int(i), Slot::weight, w);
    }
    merged->forward_backward(s.batch(), s.dlogp);
    gpt->forward_backward(s.batch(), s.dlogp);
    CHECK(rel_error(copy(gpt->logp()), copy(merged->logp())) < kFloatTolerance);
    // dB = scale dW A^T, dA = scale B^T dW, summed over the rows that share the tensor on disk
    std::map<std::string, std::vector<float>> da, db;
    for (size_t i = 0; i < rows.size(); i++) {
      const Tensor& t = rows[i];
      if (t.kind != Kind::matrix) continue;
      const auto &a = a_of.at(t.disk), &b = b_of.at(t.disk);
      std::vector<float> dw(size_t(t.size()));
      merged->read(int(i), Slot::gradient, dw);
      auto &to_a = da[t.disk], &to_b = db[t.disk];
      to_a.resize(a.size()), to_b.resize(b.size());
      for (int o = 0; o < t.out; o++)
        for (int r = 0; r < lora.rank; r++)
          for (int j = 0; j < t.in; j++) {
            const double d = dw[size_t(o * t.in + j)] * 5. / 3;
            const size_t at_b = size_t((t.disk_begin + o) * lora.rank + r);
            to_b[at_b] += float(d * a[size_t(r * t.in + j)]);
            to_a[size_t(r * t.in + j)] += float(d * b[at_b]);
          }
    }
    for (size_t i = 0; i < table.tensors.size(); i++) {
      const Tensor& t = table.tensors[i];
      if (t.kind != Kind::adapter) continue;
      const std::string disk = t.disk.substr(17, t.disk.rfind(".lora_") - 17) + ".weight";
      std::vector<float> d(size_t(t.size()));
      gpt->read(int(i), Slot::gradient, d);
      CAPTURE(t.name);
      // the sums above are made in float, over up to a matrix's width: ten times the tolerance
      CHECK(rel_error(d, t.name.back() == 'A' ? da.at(disk) : db.at(disk)) < 10 * kFloatTolerance);
    }
    // Accumulation, and nothing but the adapters moves.
    const auto once = all(*gpt, Slot::gradient);
    gpt->forward_backward(s.batch(), s.dlogp);
    auto twice = all(*gpt, Slot::gradient);
    for (float& x : twice) x *= .5f;
    CHECK(rel_error(twice, once) < kFloatTolerance);
    OptimizerStep o;
    o.lr.fill(.1f);
    gpt->update(o);
    for (size_t i = 0; i < rows.size(); i++) {
      std::vector<float> before(size_t(rows[i].size())), after(before.size());
      base->read(int(i), Slot::weight, before);
      gpt->read(int(i), Slot::weight, after);
      CHECK(before == after);
    }
    // Off, it is the model underneath, bit for bit; decoding has the adapters too.
    gpt->use_adapters(false);
    gpt->forward(s.batch(), Pass::score);
    base->forward(s.batch(), Pass::score);
    CHECK(copy(gpt->logp()) == copy(base->logp()));
    gpt->use_adapters(true);
    gpt->forward(s.batch(), Pass::score);
    const auto logp = copy(gpt->logp());
    CHECK(rel_error(logp, copy(base->logp())) > 1e-3);
    const auto cache = gpt->make_cache(128);
    DecodeResult result;
    const int sequence = cache->create();
    const DecodeRow row{sequence, std::span(s.tokens).first(70), {.temperature = 1}, {}};
    gpt->decode(*cache, {&row, 1}, result, true);
    std::vector<float> logits(result.logits);
    float highest = *std::max_element(logits.begin(), logits.end());
    for (float& x : logits) x = (x - highest) / .9f;
    double sum = 0;
    for (float x : logits) sum += std::exp(double(x));
    const int target = s.targets[69];
    if (target >= 0) {
      CHECK(std::fabs(logits[size_t(target)] - std::log(sum) - logp[69]) < 1e-5);
    }
  }
}
