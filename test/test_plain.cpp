// plain::Gpt, the whole model in plain loops (cake/layers.h): its gradients against finite
// differences in double, and both engines against it. It shares no code with either engine, so an
// error that both of them make is found here.
#include <cmath>

#include "cake/layers.h"
#include "test/support.h"

using namespace cake;

namespace {

const Family kFamilies[] = {Family::gpt2, Family::llama, Family::qwen3, Family::qwen2};

// Two layers; every size is another, query heads share keys where the family can.
Config small_config(Family family, Head head, bool tied) {
  Config c;
  c.family = family, c.head = head, c.tied = tied, c.V = 29, c.T = 40, c.L = 2;
  c.norm_eps = family == Family::gpt2 ? 1e-5 : 1e-6;
  if (family == Family::gpt2) c.C = 48, c.NH = 3, c.NKV = 3, c.HS = 16, c.F = 56;
  if (family == Family::llama) c.C = 40, c.NH = 4, c.NKV = 2, c.HS = 16, c.F = 56;
  if (family == Family::qwen3) c.C = 40, c.NH = 2, c.NKV = 1, c.HS = 32, c.F = 72;
  if (family == Family::qwen2) c.C = 40, c.NH = 3, c.NKV = 1, c.HS = 16, c.F = 48;
  if (family == Family::qwen2) c.rope.factor = 2.5, c.rope.linear = true;
  if (family == Family::llama) {  // llama 3's passage between wavelengths
    c.rope = {.theta = 500, .factor = 8, .original_T = 20};
  }
  return c;
}

// Every family, tied or not, with each head.
std::vector<Config> all_configs() {
  std::vector<Config> configs;
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) configs.push_back(small_config(family, Head::lm, tied));
    configs.push_back(small_config(family, Head::scalar, false));
  }
  return configs;
}

// Random everywhere, norms and biases too; large enough that attention is far from uniform.
std::vector<float> random_weights(const Tensor& t) {
  Rng rng{hash64(t.name)};
  const double std = t.kind == Kind::vector ? .2 : 1 / std::sqrt(double(t.in));
  std::vector<float> values(size_t(t.size()));
  for (float& x : values) x = float((t.init_one ? 1 : 0) + std * rng.normal());
  return values;
}

struct Packed {
  std::vector<int> tokens, targets, doc_starts{0};
  std::vector<float> dlogp, dentropy, dvalue;  // what the config's head has no use for is empty
  Batch batch() const { return {tokens, targets, doc_starts, .7f}; }
};
// Documents of these lengths; every fifth position or so has no target.
Packed packed(const Config& c, std::initializer_list<int> lengths) {
  Packed p;
  Rng rng{11};
  for (const int length : lengths) p.doc_starts.push_back(p.doc_starts.back() + length);
  for (int n = 0; n < p.doc_starts.back(); n++) {
    p.tokens.push_back(int(rng.below(uint64_t(c.V))));
    p.targets.push_back(rng.below(5) == 0 ? -1 : int(rng.below(uint64_t(c.V))));
    (c.head == Head::lm ? p.dlogp : p.dvalue).push_back(float(rng.normal()));
    if (c.head == Head::lm) p.dentropy.push_back(float(rng.normal()));
  }
  return p;
}
std::vector<double> doubles(std::span<const float> x) { return {x.begin(), x.end()}; }

// The bias of gpt2's keys adds the same to all scores of a query, which softmax does not see. RoPE
// turns the bias of qwen2's keys by each key's position: that one has a gradient.
bool has_no_gradient(const Config& c, const Tensor& t) {
  return c.family == Family::gpt2 && t.name.ends_with(".k.bias");
}

double dot(const std::vector<float>& weights, const std::vector<double>& x) {
  double sum = 0;
  for (size_t i = 0; i < weights.size(); i++) sum += weights[i] * x[i];
  return sum;
}

// An engine's log-probabilities, entropies, values and every gradient, on 64 tokens, against
// plain::Gpt in double. In fp32 a rounding is 6e-8 of a number; sums here have some tens of terms
// of mixed sign, and from a token to a gradient there are a hundred of them: a few 1e-7 of a
// tensor's norm. 1e-5 leaves room for exp and rsqrt; a wrong or missing term errs by 1e-2 and more.
constexpr double kFp32 = 1e-5;

void check_engine(Gpt& engine) {
  const Config& c = engine.config();
  const auto& tensors = engine.table().tensors;
  plain::Gpt<double> reference(c);
  for (size_t i = 0; i < tensors.size(); i++) {
    const auto values = random_weights(tensors[i]);
    engine.write(int(i), Slot::weight, values);
    std::copy(values.begin(), values.end(), &reference.weights[size_t(tensors[i].offset)]);
  }
  const Packed p = packed(c, {33, 1, 30});
  engine.forward(p.batch(), Pass::train);
  reference.forward(p.batch());
  CHECK(rel_error(engine.logp(), reference.logp) < kFp32);
  CHECK(rel_error(engine.entropy(), reference.entropy) < kFp32);
  CHECK(rel_error(engine.value(), reference.value) < kFp32);
  engine.backward(p.dlogp, p.dvalue, p.dentropy);
  reference.backward(doubles(p.dlogp), doubles(p.dvalue), doubles(p.dentropy));
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& t = tensors[i];
    CAPTURE(t.name);
    std::vector<float> gradient(size_t(t.size()));
    engine.read(int(i), Slot::gradient, gradient);
    const double* begin = &reference.gradients[size_t(t.offset)];
    const std::vector<double> truth(begin, begin + t.size());
    if (has_no_gradient(c, t)) {
      for (const double g : truth) CHECK(std::abs(g) < 1e-12);
      for (const float g : gradient) CHECK(std::abs(g) < kFp32);
    } else {
      CHECK(rel_error(gradient, truth) < kFp32);
    }
  }
}

}  // namespace

TEST_CASE("plain::Gpt's gradients match finite differences in every tensor") {
  // Central differences with h = 1e-5 err by h^2 = 1e-10 of the third derivative and by 1e-16 / h =
  // 1e-11 of the loss, which is below 100: 1e-6 is safe beside gradients of 1e-2 to 10.
  constexpr double h = 1e-5, kTolerance = 1e-6;
  for (const Config& c : all_configs()) {
    plain::Gpt<double> gpt(c);
    for (const Tensor& t : gpt.table.tensors) {
      const auto values = random_weights(t);
      std::copy(values.begin(), values.end(), &gpt.weights[size_t(t.offset)]);
    }
    const Packed p = packed(c, {7, 1, 5});
    const auto loss = [&] {
      gpt.forward(p.batch());
      return dot(p.dlogp, gpt.logp) + dot(p.dentropy, gpt.entropy) + dot(p.dvalue, gpt.value);
    };
    loss();
    gpt.backward(doubles(p.dlogp), doubles(p.dvalue), doubles(p.dentropy));
    Rng rng{5};
    for (const Tensor& t : gpt.table.tensors) {
      CAPTURE(int(c.family));
      CAPTURE(t.name);
      const double* gradient = &gpt.gradients[size_t(t.offset)];
      const auto larger = [](double a, double b) { return std::abs(a) < std::abs(b); };
      int64_t i = std::max_element(gradient, gradient + t.size(), larger) - gradient;
      CHECK((std::abs(gradient[i]) > 1e-2) == !has_no_gradient(c, t));
      for (int pick = 0; pick < 4; pick++) {  // the largest, and three at random
        double& w = gpt.weights[size_t(t.offset + i)];
        const double middle = w;
        w = middle + h;
        const double above = loss();
        w = middle - h;
        const double below = loss();
        w = middle;
        CHECK(std::abs((above - below) / (2 * h) - gradient[i]) < kTolerance);
        i = int64_t(rng.below(uint64_t(t.size())));
      }
    }
  }
}

TEST_CASE("plain::Gpt adds the gradients of two batches") {
  const Config c = small_config(Family::qwen3, Head::lm, true);
  plain::Gpt<double> gpt(c);
  for (const Tensor& t : gpt.table.tensors) {
    const auto values = random_weights(t);
    std::copy(values.begin(), values.end(), &gpt.weights[size_t(t.offset)]);
  }
  const Packed p = packed(c, {9, 4});
  gpt.forward(p.batch());
  gpt.backward(doubles(p.dlogp));
  auto twice = gpt.gradients;
  for (double& g : twice) g *= 2;
  gpt.backward(doubles(p.dlogp));
  CHECK(rel_error(gpt.gradients, twice) < 1e-14);  // double's rounding
}

TEST_CASE("the CPU engine is plain::Gpt: log-probabilities, values and every gradient") {
  for (const Config& c : all_configs()) {
    CAPTURE(int(c.family));
    CAPTURE(int(c.head));
    CAPTURE(c.tied);
    check_engine(*make_gpt(c, {.device = Device::cpu}));
  }
}

TEST_CASE("cuda, fp32: the engine is plain::Gpt: log-probabilities, values and every gradient") {
  for (const Config& c : all_configs()) {
    CAPTURE(int(c.family));
    CAPTURE(int(c.head));
    CAPTURE(c.tied);
    check_engine(*gpu::make_gpt(c, {.device = Device::cuda, .precision = Precision::fp32}));
  }
}
