// The objectives of rlhf.cpp: known answers worked out by hand, every derivative against finite
// differences through a softmax in double, and whole steps of PPO and GRPO against PyTorch's
// autograd (dev/golden/rlhf.py): losses and every gradient.
#include <cmath>
#include <functional>
#include <limits>

#pragma GCC diagnostic ignored "-Wunused-function"
#define main cake_rlhf_main_of_test_rlhf  // this file looks at the objectives
#include "rlhf.cpp"
#undef main
#include "test/objectives.h"
#include "test/support.h"

using namespace cake;

namespace {

// ---------------------------------------------------------------------------------------------
// Advantages

TEST_CASE("generalised advantages are the known ones, and those of a plain loop") {
  const std::vector<int> three{0, 3};
  const Doubles ones(3, 1);
  const auto known = gae<double>(Doubles{-.1, -.2, 1}, Doubles{.5, .4, .3}, ones, three, 1, .95);
  check_known(known.advantages, Doubles{.14675, .365, .7});
  check_known(known.returns, Doubles{.64675, .765, 1});
  // A_t = sum over k of (gamma lambda)^k delta_{t + k}
  const double gamma = .97, lambda = .9;
  const Doubles r = noise("r", 9), v = noise("v", 9);
  Doubles advantages, returns;
  for (size_t t = 0; t < r.size(); t++) {
    double sum = 0;
    for (size_t k = t; k < r.size(); k++) {
      const double delta = r[k] + (k + 1 < v.size() ? gamma * v[k + 1] : 0) - v[k];
      sum += std::pow(gamma * lambda, double(k - t)) * delta;
    }
    advantages.push_back(sum);
    returns.push_back(sum + v[t]);
  }
  const auto found = gae<double>(r, v, Doubles(9, 1), std::vector{0, 9}, gamma, lambda);
  CHECK(rel_error(found.advantages, advantages) < kExact);
  CHECK(rel_error(found.returns, returns) < kExact);
  // Packed behind another rollout, with tokens between its own that are masked out: the same.
  Doubles packed_r{7, kNan, -.1, kNan, -.2, 1}, packed_v{2, kNan, .5, 1e9, .4, .3};
  const auto packed =
      gae<double>(packed_r, packed_v, Doubles{1, 0, 1, 0, 1, 1}, std::vector{0, 2, 6}, 1, .95);
  check_known(packed.advantages, Doubles{5, 0, .14675, 0, .365, .7});
  check_known(packed.returns, Doubles{7, 0, .64675, 0, .765, 1});
}

TEST_CASE("whitening has mean 0 and variance 1 over what is not masked") {
  Doubles known{.14675, .365, .7};
  whiten<double>(known);
  check_known(known, Doubles{-1.130236, -.171037, 1.301273});
  const Doubles before{.14675, kNan, .365, 1e9, .7}, live{1, 0, .5, 0, 2};
  Doubles masked = before;
  whiten<double>(masked, live);
  check_known(masked, Doubles{-1.130236, 0, -.171037, 0, 1.301273});
  Doubles rewards{1, 2, 6};
  whiten<double>(rewards, {}, true);
  CHECK(rewards[0] + rewards[1] + rewards[2] == doctest::Approx(9));
  Doubles equal{2, 2, 2};
  whiten<double>(equal);
  CHECK(equal == Doubles{0, 0, 0});
}

TEST_CASE("a group's advantages are the known ones of each method") {
  const Doubles r{1, 1, 0, 0, 0};
  using M = GroupMethod;
  for (const M m : {M::grpo, M::dapo, M::gspo}) {
    check_known(group_advantages(r, m), Doubles{1.095245, 1.095245, -.730163, -.730163, -.730163});
  }
  for (const M m : {M::dr_grpo, M::centered_token_mean})
    check_known(group_advantages(r, m), Doubles{.6, .6, -.4, -.4, -.4});
  check_known(group_advantages(r, M::rloo), Doubles{.75, .75, -.5, -.5, -.5});
  // RLOO: r less the mean of the others
  const Doubles rewards{.3, 1.5, -2};
  check_known(group_advantages(rewards, M::rloo), Doubles{.3 + .25, 1.5 + .85, -2 - .9});
  for (const M m : {M::centered_token_mean, M::grpo, M::dr_grpo, M::dapo, M::rloo, M::gspo}) {
    CHECK(group_advantages(Doubles{.1, .1, .1}, m) == Doubles{0, 0, 0});  // .1: no rounding either
    CHECK(group_advantages(Doubles{3}, m) == Doubles{0});
    CHECK(std::isnan(group_advantages(Doubles{1, kNan}, m)[0]));
    CHECK(std::isnan(group_advantages(Doubles{kNan, 1}, m)[0]));
  }
}

TEST_CASE("a group is mixed as often as chance has it") {
  const auto chance = [](double p, int G) {  // over all outcomes
    double sum = 0;
    Doubles rewards(static_cast<size_t>(G));
    for (int outcome = 0; outcome < 1 << G; outcome++) {
      double probability = 1;
      for (int i = 0; i < G; i++) {
        rewards[size_t(i)] = outcome >> i & 1;
        probability *= rewards[size_t(i)] > 0 ? p : 1 - p;
      }
      if (has_variance(rewards)) sum += probability;
    }
    return sum;
  };
  CHECK(std::abs(chance(.30, 8) - .94) < .005);
  CHECK(std::abs(chance(.01, 12) - (1 - std::pow(.01, 12) - std::pow(.99, 12))) < kExact);
}

TEST_CASE("tokens weigh what each method's reduction says") {
  using M = GroupMethod;
  const std::vector<int> lengths{4, 0, 1, 11};  // B = 4, 16 tokens
  check_known(token_weights(M::grpo, lengths, 20), Doubles{1. / 16, 0, 1. / 4, 1. / 44});
  CHECK(token_weights(M::gspo, lengths, 20) == token_weights(M::grpo, lengths, 20));
  check_known(token_weights(M::dr_grpo, lengths, 20), Doubles{1. / 80, 0, 1. / 80, 1. / 80});
  check_known(token_weights(M::rloo, lengths, 20), Doubles{.25, 0, .25, .25});
  for (const M m : {M::dapo, M::centered_token_mean})
    check_known(token_weights(m, lengths, 20), Doubles{1. / 16, 0, 1. / 16, 1. / 16});
}

// ---------------------------------------------------------------------------------------------
// Policy and value

TEST_CASE("the clipped policy loss is the known one on both sides") {
  const auto one = [](double A, double ratio) {
    return clipped_policy<double>(Doubles{std::log(ratio) - 1}, Doubles{-1}, Doubles{A}, Doubles{1},
                                  .2, .2);
  };
  check_known(one(1, 1.3).loss, -1.2);
  CHECK(one(1, 1.3).dlogp[0] == 0);
  CHECK(one(1, 1.3).ratios.clipped_share() == 1);
  check_known(one(-1, 1.3).loss, 1.3);
  check_known(one(-1, 1.3).dlogp[0], 1.3);
  CHECK(one(-1, 1.3).ratios.clipped_share() == 0);
  check_known(one(-1, .7).loss, .8);
  CHECK(one(-1, .7).dlogp[0] == 0);
  check_known(one(1, .7).loss, -.7);
  check_known(one(1, .7).dlogp[0], -.7);
  // DAPO's wider upper side
  const auto wide =
      clipped_policy<double>(Doubles{std::log(1.25)}, Doubles{0}, Doubles{1}, Doubles{1}, .2, .28);
  check_known(wide.loss, -1.25);
  check_known(wide.dlogp[0], -1.25);
  check_known(wide.ratios.mean_ratio(), 1.25);
  check_known(wide.ratios.mean_k3(), .25 - std::log(1.25));
  check_known(wide.ratios.largest, .25);
}

TEST_CASE("before the first update the ratio is 1 and a weight is its advantage") {
  const std::vector<float> l{-1.5f, -.25f, -7}, A{.5f, -2, 1}, w{.25f, .25f, .5f};
  const auto a = clipped_policy(l, l, A, w, .2, .2);
  CHECK(a.ratios.mean_ratio() == 1);
  CHECK(a.ratios.largest == 0);
  CHECK(a.ratios.mean_k3() == 0);
  CHECK(a.dlogp == std::vector<float>{-.125f, .5f, -.5f});
  const auto s = clipped_sequence_policy(l, l, std::vector{0, 2, 3},
                                         std::vector<float>{.5f, .5f, -2}, w, .2, .2);
  CHECK(s.dlogp == std::vector<float>{-.125f, -.125f, 1});
  // another temperature or mask is seen
  CHECK(clipped_policy(std::vector<float>{-1.5f, -.26f, -7}, l, A, w, .2, .2).ratios.largest >
        .009);
}

TEST_CASE("ratios of micro-batches add up to the batch's") {
  const Doubles l = noise("l", 40, .3), old = noise("old", 40, .3), A = noise("A", 40);
  Doubles w(40, 1. / 40);
  w[3] = w[17] = 0;
  const auto whole = clipped_policy<double>(l, old, A, w, .2, .2);
  CHECK(whole.ratios.count == 38);
  CHECK(whole.ratios.clipped > 0);
  RatioStats sum;
  double loss = 0;
  for (const size_t begin : {0, 25}) {
    const size_t n = begin == 0 ? 25 : 15;
    const auto cut = [&](const Doubles& x) { return std::span(x).subspan(begin, n); };
    const auto part = clipped_policy<double>(cut(l), cut(old), cut(A), cut(w), .2, .2);
    sum.add(part.ratios);
    loss += part.loss;
  }
  CHECK(loss == doctest::Approx(whole.loss));
  CHECK(sum.count == whole.ratios.count);
  CHECK(sum.clipped_share() == whole.ratios.clipped_share());
  CHECK(sum.mean_ratio() == doctest::Approx(whole.ratios.mean_ratio()));
  CHECK(sum.mean_k3() == doctest::Approx(whole.ratios.mean_k3()));
  CHECK(sum.largest == whole.ratios.largest);
}

TEST_CASE("policy losses' gradients match finite differences through a softmax") {
  const Softmaxes s{9};
  const Doubles l = s.logp(s.logits), old = plus(l, noise("drift", 9, .3)),
                A{1, -1, .5, -.5, 2, -2, 1, -1, .7};
  Doubles w = noise("w", 9);
  for (double& x : w) x = std::abs(x);
  w[4] = 0;
  const auto tokens = clipped_policy<double>(l, old, A, w, .2, .28);
  REQUIRE(tokens.ratios.clipped > 0);
  REQUIRE(tokens.ratios.clipped < 8);
  s.check("clipped policy", [&](const Doubles& logp, const Doubles&) {
    const auto a = clipped_policy<double>(logp, old, A, w, .2, .28);
    return LossAndSlopes{a.loss, a.dlogp};
  });
  s.check("with an entropy bonus", [&](const Doubles& logp, const Doubles& entropy) {
    const auto a = clipped_policy<double>(logp, old, A, w, .2, .28);
    LossAndSlopes answer{a.loss, a.dlogp};
    for (size_t t = 0; t < w.size(); t++) {
      answer.loss -= .1 * w[t] * entropy[t];
      answer.dentropy.push_back(-.1 * w[t]);
    }
    return answer;
  });
  const std::vector<int> starts{0, 3, 5, 9};
  for (const double first : {1., -1.}) {  // the first rollout's ratio is outside the clip
    Doubles far = old;
    for (size_t t = 0; t < 3; t++) far[t] = l[t] - .4;
    const Doubles advantages{first, first, first, .5, .5, -2, -2, -2, -2};
    const auto run = [&](const Doubles& logp) {
      // within a rollout a weight is constant or 0
      const Doubles flat{.2, 0, .2, .5, .5, .1, .1, 0, .1};
      return clipped_sequence_policy<double>(logp, far, starts, advantages, flat, .2, .2);
    };
    CHECK(run(l).ratios.clipped == (first > 0 ? 1 : 0));
    s.check("GSPO", [&](const Doubles& logp, const Doubles&) {
      return LossAndSlopes{run(logp).loss, run(logp).dlogp};
    });
  }
}

TEST_CASE("the clipped value loss is the known one, and its gradient a difference") {
  const auto known = clipped_value<double>(Doubles{.8}, Doubles{.5}, Doubles{1}, Doubles{1}, .2);
  check_known(known.loss, .045);
  CHECK(known.dvalue[0] == 0);
  CHECK(known.clipped == 1);
  const auto open = clipped_value<double>(Doubles{.8}, Doubles{.5}, Doubles{1}, Doubles{1}, 0);
  check_known(open.loss, .02);
  check_known(open.dvalue[0], -.2);
  // Within the clip's range the gradient stays, although .2 + (.9 - .2) is not .9 in double.
  const auto inside = clipped_value<double>(Doubles{.9}, Doubles{.2}, Doubles{1}, Doubles{1}, 1);
  CHECK(inside.clipped == 0);
  check_known(inside.dvalue[0], -.1);
  const Doubles v = noise("v", 12), old = plus(v, noise("old", 12, .3)), R = noise("R", 12);
  Doubles w(12, .1);
  w[5] = 0;
  const auto run = [&](const Doubles& x) { return clipped_value<double>(x, old, R, w, .2); };
  REQUIRE(run(v).clipped > 0);
  REQUIRE(run(v).clipped < 11);
  CHECK(run(v).count == 11);
  CHECK(rel_error(run(v).dvalue, differences(v, [&](auto& x) { return run(x).loss; })) <
        kDifference);
}

TEST_CASE("explained variance is 1 for a critic that knows and 0 for one that says the mean") {
  const Doubles R{1, 3, -2, kNan, 6}, w{1, .5, 1, 0, 1}, mean(5, 2);
  CHECK(explained_variance<double>(R, R, w) == 1);
  CHECK(std::abs(explained_variance<double>(mean, R, w)) < kExact);
  const Doubles half{.5, 1.5, -1, 0, 3};
  CHECK(explained_variance<double>(half, R, w) == doctest::Approx(.75));
  CHECK(explained_variance<double>(R, Doubles(5, 1), w) == 0);         // nothing to explain
  CHECK(std::isnan(explained_variance<double>(R, R, Doubles(5, 1))));  // a return is NaN
  CHECK(std::isnan(explained_variance<double>(Doubles{1, kNan, 0, 0, 0}, mean, w)));
}

// ---------------------------------------------------------------------------------------------
// KL

TEST_CASE("KL estimators and the adaptive price are the known ones") {
  check_known(kl_estimate(KlEstimator::k1, -.5), -.5);
  check_known(kl_estimate(KlEstimator::k2, -.5), .125);
  check_known(kl_estimate(KlEstimator::k3, -.5), .148721);
  StepSettings s;
  s.kl_target = 6;
  check_known(.15 * beta_factor(s, 12, 512), .151536);
  double slow = 1;
  for (int i = 0; i < 50; i++) slow *= beta_factor(s, 1e9, 64);
  CHECK(std::abs(slow - 1.066) < 5e-4);
  check_known(.15 * beta_factor(s, 5.4, 10000), .135);  // inside the clip: -.1
}

TEST_CASE("KL losses' gradients match finite differences through a softmax") {
  const Softmaxes s{6};
  const Doubles ref = plus(s.logp(s.logits), noise("ref", 6, .5)), w{.3, .1, 0, .2, .2, .2};
  for (const KlEstimator k : {KlEstimator::k1, KlEstimator::k2, KlEstimator::k3}) {
    s.check("k" + std::to_string(int(k) + 1), [&](const Doubles& logp, const Doubles&) {
      const auto a = kl_loss<double>(k, logp, ref, w);
      return LossAndSlopes{a.loss, a.dlogp};
    });
  }
}

// Over all tokens, each as often as the policy draws it.
TEST_CASE("on policy, k2's gradient is the KL's, k3's that of the other KL, k1's none") {
  const size_t V = 5;
  const Doubles z = noise("z", V), zr = noise("zr", V);
  const auto log_softmax = [&](const Doubles& x) {
    Doubles l(V);
    double ignored;
    for (size_t j = 0; j < V; j++)
      plain::classifier_forward(int(V), x.data(), int(j), 1., l[j], ignored);
    return l;
  };
  const auto kl = [&](const Doubles& a, const Doubles& b) {
    double sum = 0;
    for (size_t j = 0; j < V; j++) sum += std::exp(a[j]) * (a[j] - b[j]);
    return sum;
  };
  const Doubles l = log_softmax(z), ref = log_softmax(zr);
  Doubles p(V);
  for (size_t j = 0; j < V; j++) p[j] = std::exp(l[j]);
  const auto gradient = [&](KlEstimator k) {
    const auto a = kl_loss<double>(k, l, ref, p);
    Doubles dz(V), one(V);
    for (size_t j = 0; j < V; j++) {
      plain::classifier_backward(int(V), z.data(), int(j), 1., a.dlogp[j], 0., one.data());
      dz = plus(dz, one);
    }
    return dz;
  };
  CHECK(std::abs(kl_loss<double>(KlEstimator::k1, l, ref, p).loss - kl(l, ref)) < kExact);
  CHECK(std::abs(kl_loss<double>(KlEstimator::k3, l, ref, p).loss - kl(l, ref)) < kExact);
  const auto policy_kl = [&](const Doubles& x) { return kl(log_softmax(x), ref); };
  const auto other_kl = [&](const Doubles& x) { return kl(ref, log_softmax(x)); };
  CHECK(rel_error(gradient(KlEstimator::k2), differences(z, policy_kl)) < kDifference);
  CHECK(rel_error(gradient(KlEstimator::k3), differences(z, other_kl)) < kDifference);
  CHECK(rel_error(gradient(KlEstimator::k1), Doubles(V, 0.)) < kExact);
}

// ---------------------------------------------------------------------------------------------
// NaN

TEST_CASE("NaN in is NaN out, but where it is masked") {
  const Doubles bad{-1, kNan}, fine{-1, -2}, A{1, -1}, live{.5, .5}, masked{.5, 0};
  const auto both = [](double loss, const Doubles& d) {
    return std::isnan(loss) && std::isnan(d[1]);
  };
  const auto none = [](double loss, const Doubles& d) { return std::isfinite(loss) && d[1] == 0; };
  const std::vector<int> starts{0, 1, 2};
  for (int argument = 0; argument < 3; argument++) {
    const auto at = [&](int i, const Doubles& x) { return i == argument ? bad : x; };
    CAPTURE(argument);
    for (const Doubles& w : {live, masked}) {
      const auto test = [&](double loss, const Doubles& d) {
        CHECK((w == live ? both(loss, d) : none(loss, d)));
      };
      const auto policy = clipped_policy<double>(at(0, fine), at(1, fine), at(2, A), w, .2, .2);
      test(policy.loss, policy.dlogp);
      if (argument < 2) CHECK(std::isnan(policy.ratios.largest) == (w == live));
      const auto sequence =
          clipped_sequence_policy<double>(at(0, fine), at(1, fine), starts, at(2, A), w, .2, .2);
      test(sequence.loss, sequence.dlogp);
      const auto value = clipped_value<double>(at(0, fine), at(1, fine), at(2, A), w, .2);
      test(value.loss, value.dvalue);
      if (argument == 2) continue;
      for (const KlEstimator k : {KlEstimator::k2, KlEstimator::k3}) {
        const auto kl = kl_loss<double>(k, at(0, fine), at(1, fine), w);
        test(kl.loss, kl.dlogp);
      }
    }
  }
  const auto rollout =
      clipped_sequence_policy<double>(bad, fine, std::vector{0, 2}, Doubles{1, 1}, masked, .2, .2);
  CHECK(rollout.loss == -.5);
  CHECK(rollout.dlogp == Doubles{-.5, 0});
  RatioStats ratios, nan, more;
  nan.add(kNan, false), more.add(.5, false);
  ratios.add(nan), ratios.add(more);
  CHECK(std::isnan(ratios.largest));
  const std::vector<int> two{0, 2};
  CHECK(std::isnan(gae<double>(bad, fine, live, two, 1, .95).advantages[0]));
  CHECK(std::isnan(gae<double>(fine, bad, live, two, 1, .95).advantages[0]));
  Doubles nans{1, kNan};
  whiten<double>(nans);
  CHECK(std::isnan(nans[0]));
}

// ---------------------------------------------------------------------------------------------
// Measures

TEST_CASE("pass@k is the known one, and that of all draws") {
  check_known(pass_at_k(8, 2, 4), .785714);
  CHECK(pass_at_k(8, 0, 4) == 0);
  CHECK(pass_at_k(8, 5, 4) == 1);
  check_known(pass_at_k(8, 3, 1), 3. / 8);
  int right = 0, draws = 0;  // of 3 out of 6 answers, of which the first two are right
  for (int chosen = 0; chosen < 64; chosen++) {
    if (__builtin_popcount(unsigned(chosen)) != 3) continue;
    draws++;
    right += (chosen & 3) != 0;
  }
  CHECK(pass_at_k(6, 2, 3) == doctest::Approx(double(right) / draws));
}

TEST_CASE("the KL of the best of n is that of the highest of n uniform numbers") {
  CHECK(best_of_n_kl(1) == 0);
  check_known(best_of_n_kl(4), std::log(4) - .75);
  for (const double n : {2., 16.}) {  // density n u^(n-1) against 1
    double sum = 0;
    const int steps = 20000;
    for (int i = 0; i < steps; i++) {
      const double density = n * std::pow((i + .5) / steps, n - 1);
      sum += density * std::log(density) / steps;
    }
    CHECK(std::abs(best_of_n_kl(n) - sum) < 1e-6);  // of the midpoint rule
  }
}

// ---------------------------------------------------------------------------------------------
// Whole steps against PyTorch

TEST_CASE("a step of PPO has PyTorch's losses and gradients, of policy and critic") {
  const Steps s("rlhf_ppo");
  const Golden& g = s.golden;
  const std::vector<float>&old_logp = g.at("old_logp"), &ref_logp = g.at("ref_logp"),
        &old_value = g.at("old_value"), &scores = g.at("scores");
  std::vector<float> rewards(s.tokens.size());
  for (size_t i = 0; i < s.answers.size(); i++) {
    const auto [begin, end] = s.answers[i];
    for (size_t t = begin; t < end; t++) {
      const double kl = kl_estimate(KlEstimator::k1, double(old_logp[t]) - ref_logp[t]);
      rewards[t] = float(-s.setting("beta") * kl + (t + 1 == end ? scores[i] : 0));
    }
  }
  auto [advantages, returns] =
      gae(rewards, old_value, s.live, s.starts, s.setting("gamma"), s.setting("lam"));
  whiten(advantages, s.live);
  const auto packed = [&](const std::vector<float>& x) {
    std::vector<float> kept;
    for (size_t t = 0; t < x.size(); t++)
      if (s.live[t] > 0) kept.push_back(x[t]);
    return kept;
  };
  check_close(packed(advantages), g.at("advantages"), kWeights, "advantages");
  check_close(packed(returns), g.at("returns"), kWeights, "returns");

  std::vector<float> weights(s.tokens.size()), dentropy(s.tokens.size());
  for (size_t t = 0; t < weights.size(); t++) {
    weights[t] = s.live[t] / float(s.trained);
    dentropy[t] = float(-s.setting("entropy")) * weights[t];
  }
  const auto policy = make_formula_gpt(g.config);
  policy->forward(s.batch(), Pass::train);
  const double clip = s.setting("clip");
  const auto loss = clipped_policy(policy->logp(), old_logp, advantages, weights, clip, clip);
  CHECK(loss.ratios.clipped > 0);
  const auto entropy = policy->entropy();
  check_loss(loss.loss + std::inner_product(dentropy.begin(), dentropy.end(), entropy.begin(), 0.),
             g.at("loss"), "loss");
  policy->backward(loss.dlogp, {}, dentropy);
  check_gradients(*policy, g, "");

  Config config = g.config;
  config.head = Head::scalar;
  const auto critic = make_formula_gpt(config);
  critic->forward({s.tokens, {}, s.starts}, Pass::train);
  const auto value =
      clipped_value(critic->value(), old_value, returns, weights, s.setting("value_clip"));
  CHECK(value.clipped > 0);
  check_loss(value.loss, g.at("value_loss"), "value loss");
  critic->backward({}, value.dvalue);
  check_gradients(*critic, g, "critic.");
}

TEST_CASE(
    "a step of each GRPO method has PyTorch's loss and weights, GRPO and GSPO every gradient") {
  const Steps s("rlhf_grpo");
  const Golden& g = s.golden;
  const size_t B = s.answers.size(), G = B / size_t(s.setting("groups"));
  const std::vector<float>&old_logp = g.at("old_logp"), &ref_logp = g.at("ref_logp");
  std::vector<int> lengths;
  for (size_t i = 0; i < B; i++) lengths.push_back(s.length(i));
  const auto policy = make_formula_gpt(g.config);
  policy->forward(s.batch(), Pass::train);
  const std::span<const float> logp = policy->logp();
  const std::pair<const char*, GroupMethod> methods[] = {{"grpo", GroupMethod::grpo},
                                                         {"dr_grpo", GroupMethod::dr_grpo},
                                                         {"dapo", GroupMethod::dapo},
                                                         {"rloo", GroupMethod::rloo},
                                                         {"cake", GroupMethod::centered_token_mean},
                                                         {"gspo", GroupMethod::gspo}};
  for (const auto& [name, method] : methods) {
    const auto each = token_weights(method, lengths, int(s.setting("max_length")));
    Doubles rollout_advantages;
    std::vector<float> advantages(logp.size()), weights(logp.size());
    for (size_t first = 0; first < B; first += G) {
      Doubles rewards;
      for (size_t i = first; i < first + G; i++) {
        rewards.push_back(g.at("rewards")[i]);
        if (method == GroupMethod::rloo)
          rewards.back() -= s.setting("beta") * (s.sum(old_logp, i) - s.sum(ref_logp, i));
      }
      for (const double a : group_advantages(rewards, method)) rollout_advantages.push_back(a);
    }
    for (size_t i = 0; i < B; i++) {
      for (size_t t = s.answers[i].first; t < s.answers[i].second; t++) {
        advantages[t] = float(rollout_advantages[i]);
        weights[t] = float(each[i]) * s.live[t];
      }
    }
    const double low = s.setting("low"),
                 high = method == GroupMethod::dapo ? s.setting("high") : low;
    PolicyLoss<float> a =
        method == GroupMethod::gspo
            ? clipped_sequence_policy(logp, old_logp, s.starts, advantages, weights, low, high)
            : clipped_policy(logp, old_logp, advantages, weights, low, high);
    CHECK(a.ratios.clipped > 0);
    CHECK(a.ratios.count == (method == GroupMethod::gspo ? int64_t(B) : s.trained));
    if (method == GroupMethod::grpo) {
      const auto kl = kl_loss(KlEstimator::k3, logp, ref_logp, weights);
      a.loss += s.setting("beta") * kl.loss;
      for (size_t t = 0; t < logp.size(); t++) a.dlogp[t] += float(s.setting("beta")) * kl.dlogp[t];
    }
    const std::string key = name;
    check_loss(a.loss, g.at("loss." + key), key);
    check_close(a.dlogp, g.at("dlogp." + key), kWeights, "dlogp." + key);
    if (!g.has(key + ".gradient.wte")) continue;
    policy->backward(a.dlogp);
    check_gradients(*policy, g, key + ".");
    policy->forward(s.batch(), Pass::train);
  }
}

}  // namespace
