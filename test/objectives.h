// What the tests of objectives share: known answers, derivatives by finite differences through a
// softmax in double, and whole steps against PyTorch's (dev/golden/rlhf.py).
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cake/layers.h"
#include "test/golden.h"
#include "test/support.h"

namespace cake {
namespace {

using goldens::check_close;
using goldens::Golden;
using goldens::load_golden;
using goldens::make_formula_gpt;

// Known answers are given to six digits. In double, central differences with h = 1e-5 have
// truncation h^2 = 1e-10 and cancellation 1e-16 / h = 1e-11: 1e-7 in norm is safe. What is exact
// but for the order of sums agrees to 1e-12.
constexpr double kDigits = 6e-7, kDifference = 1e-7, kExact = 1e-12;
const double kNan = std::numeric_limits<double>::quiet_NaN();

using Doubles = std::vector<double>;

void check_known(double found, double known) {
  CHECK_MESSAGE(std::abs(found - known) < kDigits, "found ", found, ", known ", known);
}
template <class T>
void check_known(const std::vector<T>& found, const Doubles& known) {
  REQUIRE(found.size() == known.size());
  for (size_t i = 0; i < known.size(); i++) check_known(double(found[i]), known[i]);
}

Doubles noise(const std::string& name, size_t n, double scale = 1) {
  Rng rng{hash64(name)};
  Doubles x(n);
  for (double& v : x) v = scale * rng.normal();
  return x;
}

Doubles plus(Doubles x, const Doubles& y) {
  for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
  return x;
}

// df/dx by central differences
Doubles differences(Doubles x, const std::function<double(const Doubles&)>& f) {
  constexpr double h = 1e-5;
  Doubles gradient;
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

// What an objective says of a batch's log-probabilities and entropies.
struct LossAndSlopes {
  double loss = 0;
  Doubles dlogp, dentropy = {};
};

// Tokens drawn from softmaxes of their own, as an engine makes them of logits (N, V).
struct Softmaxes {
  int N, V = 5;
  double temperature = .7;
  Doubles logits = noise("logits", size_t(N* V), 1.2);

  int target(int n) const { return n * 3 % V; }
  Doubles logp(const Doubles& z) const { return both(z).first; }
  std::pair<Doubles, Doubles> both(const Doubles& z) const {  // logp, entropy
    Doubles logp(static_cast<size_t>(N)), entropy(static_cast<size_t>(N));
    for (int n = 0; n < N; n++) {
      plain::classifier_forward(V, z.data() + n * V, target(n), temperature, logp[size_t(n)],
                                entropy[size_t(n)]);
    }
    return {logp, entropy};
  }
  // The objective's weights, carried to the logits, against its loss's differences there.
  void check(const std::string& name,
             const std::function<LossAndSlopes(const Doubles&, const Doubles&)>& objective) const {
    const auto [l, H] = both(logits);
    const LossAndSlopes a = objective(l, H);
    REQUIRE(a.dlogp.size() == size_t(N));
    Doubles dlogits(size_t(N * V));
    for (int n = 0; n < N; n++) {
      plain::classifier_backward(
          V, logits.data() + n * V, target(n), temperature, a.dlogp[size_t(n)],
          a.dentropy.empty() ? 0. : a.dentropy[size_t(n)], dlogits.data() + n * V);
    }
    const double error = rel_error(dlogits, differences(logits, [&](const Doubles& z) {
                                     const auto [logp, entropy] = both(z);
                                     return objective(logp, entropy).loss;
                                   }));
    CHECK_MESSAGE(error < kDifference, name, ": ", error);
  }
};

// ---------------------------------------------------------------------------------------------
// Whole steps against PyTorch

// Relative, ||a - b|| / ||b||, about ten times what PyTorch's float32 is off (rlhf.py prints it).
constexpr double kGradient = 3e-5;  // 2.9e-6
constexpr double kWeights = 4e-6;   // dlogp, advantages, returns, scores: 3.5e-7
// Losses are sums of both signs: absolute, of terms about 1, each off by 1e-7.
constexpr double kLoss = 2e-6;

// A golden's rollouts: document i's answer is [begin, end) of the packed positions.
struct Steps {
  Golden golden;
  std::vector<int> tokens, targets, starts;
  std::vector<std::pair<size_t, size_t>> answers;
  std::vector<float> live;  // 1 where there is a target
  int trained = 0;

  explicit Steps(const std::string& name)
      : golden(load_golden(name)),
        tokens(golden.ints("tokens")),
        targets(golden.ints("targets")),
        starts(golden.ints("doc_starts")) {
    for (size_t i = 0; i + 1 < starts.size(); i++) {
      size_t begin = size_t(starts[i]);
      while (targets[begin] < 0) begin++;
      answers.push_back({begin, size_t(starts[i + 1])});
    }
    for (const int t : targets) live.push_back(t >= 0), trained += t >= 0;
  }
  Batch batch() const { return {tokens, targets, starts, golden.temperature}; }
  double setting(const char* name) const { return golden.settings.at(name); }
  int length(size_t i) const {  // trained tokens of an answer
    return int(std::count(live.begin() + std::ptrdiff_t(answers[i].first),
                          live.begin() + std::ptrdiff_t(answers[i].second), 1.f));
  }
  double sum(std::span<const float> x, size_t i) const {  // over an answer's trained tokens
    double s = 0;
    for (size_t t = answers[i].first; t < answers[i].second; t++) s += double(live[t]) * x[t];
    return s;
  }
};

void check_loss(double found, const std::vector<float>& golden, const std::string& what) {
  const double error = std::abs(found - double(golden.at(0)));
  CHECK_MESSAGE(error < kLoss, what, ": found ", found, ", golden ", golden[0]);
}

// Every tensor's gradient, cleared afterwards.
void check_gradients(Gpt& gpt, const Golden& golden, const std::string& prefix) {
  const auto& tensors = gpt.table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    const std::string name = prefix + "gradient." + tensors[i].name;
    check_close(goldens::read(gpt, int(i), Slot::gradient), golden.at(name), kGradient, name);
  }
  gpt.zero_gradients();
}

}  // namespace
}  // namespace cake
