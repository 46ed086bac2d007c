// The objectives of reward.cpp: known answers worked out by hand, every derivative against finite
// differences through a softmax in double, KTO on labels and pairs as TRL computes it
// (dev/golden/kto.py), and whole steps of a reward model and of DPO against PyTorch's autograd
// (dev/golden/rlhf.py): losses and every gradient.
#include <cmath>
#include <csignal>
#include <set>

#define main cake_reward_main  // of which this file looks at objectives
#pragma GCC diagnostic ignored "-Wunused-function"
#include "reward.cpp"
#undef main
#include "test/objectives.h"
#include "test/support.h"

using namespace cake;

namespace {

// A comparison of answers of one id each.
Comparison answers(const std::vector<int>& ranking) {
  return {.sequences = {ranking.size(), std::vector<int>(1)},
          .ranking = ranking,
          .pairs = pairs_of(ranking)};
}

// ---------------------------------------------------------------------------------------------
// Reward models

TEST_CASE("the ranking loss of three answers is the known one") {
  const Doubles r{1, .5, -.25};
  const auto known = rank_loss(r, pairs_of(std::vector{1, 2, 3}), 0, 0, 1);
  check_known(known.loss, .370959);
  check_known(known.dreward, Doubles{-.200080, .018906, .181174});
  const Agreement a = agreement_on(answers({1, 2, 3}), std::vector<float>{1, .5f, -.25f}, .25);
  CHECK(a.pairs == 3);
  CHECK(a.right == 3);
  CHECK(a.loss == .25);
  check_known(a.margin, .5 + 1.25 + .75);
  // a pair: -log s(r_w - r_l - m), and what centering adds
  const auto pair = rank_loss(Doubles{2, .5}, pairs_of(std::vector{2, 1}), .25, .01, .5);
  check_known(pair.loss, .5 * (std::log(1 + std::exp(1.75)) + .01 * 2.5 * 2.5));
  CHECK(agreement_on(answers({2, 1}), std::vector<float>{2, .5f}, 0).right == 0);
  // in float, the same
  Comparison c = answers({1, 2, 3});
  const auto single = comparison_loss(c, std::vector<float>{1, .5f, -.25f}, 0, 0, 1);
  check_known(single.dreward, Doubles{-.200080, .018906, .181174});
}

TEST_CASE("answers of equal rank make no pair, answers of equal reward are half right") {
  const auto tied = rank_loss(Doubles{1, 2, 3}, pairs_of(std::vector{1, 1, 1}), 0, .01, 1);
  CHECK(agreement_on(answers({1, 1, 1}), std::vector<float>{1, 2, 3}, 0).pairs == 0);
  CHECK(tied.loss == 0);
  CHECK(tied.dreward == Doubles{0, 0, 0});
  CHECK(agreement_on(answers({1, 1, 2}), std::vector<float>{1, 2, 3}, 0).pairs == 2);
  CHECK(agreement_on(answers({1, 2}), std::vector<float>{1, 1}, 0).right == .5);
  const auto equal = rank_loss(Doubles{1, 1}, pairs_of(std::vector{1, 2}), 0, 0, 1);
  check_known(equal.loss, std::log(2));
}

TEST_CASE("the ranking loss's gradient matches finite differences, with margin and center") {
  const Doubles r = noise("rewards", 6, 1.5);
  const std::vector<int> ranking{3, 1, 2, 3, 6, 5};
  const auto loss = [&](const Doubles& x) {
    return rank_loss(x, pairs_of(ranking), .3, .02, .25).loss;
  };
  const auto a = rank_loss(r, pairs_of(ranking), .3, .02, .25);
  CHECK(agreement_on(answers(ranking), std::vector<float>(6), 0).pairs == 14);
  CHECK(rel_error(a.dreward, differences(r, loss)) < kDifference);
}

TEST_CASE("a labelled text's loss is -log s of the reward, and its derivative a difference") {
  check_known(label_loss(2, true).loss, std::log(1 + std::exp(-2)));
  check_known(label_loss(2, false).loss, std::log(1 + std::exp(2)));
  for (const bool good : {true, false}) {
    const auto loss = [&](const Doubles& r) { return label_loss(r[0], good).loss; };
    CHECK(rel_error(label_loss(.8, good).dreward, differences({.8}, loss)) < kDifference);
  }
  CHECK(label_loss(-800, true).loss == doctest::Approx(800));  // no overflow
  CHECK(label_loss(800, true).loss == 0);
}

TEST_CASE("agreement counts which answer is longer, what is possible, and labelled texts") {
  Comparison c = answers({1, 2});
  c.sequences[0] = {1, 2, 3}, c.sequences[1] = {1, 2}, c.prompt_length = 1, c.chance = .3;
  Agreement a = agreement_on(c, std::vector<float>{-1, 1}, 0);
  CHECK(a.accuracy() == 0);
  CHECK(a.longer_wins() == 1);
  CHECK(a.lengths == std::vector<float>{2, 1});
  CHECK(a.best_possible == .7);
  a.add(agreement_on(answers({1, 2}), std::vector<float>{3, 1}, 2));
  CHECK(a.comparisons == 2);
  CHECK(a.accuracy() == .5);
  CHECK(a.longer_wins() == .75);  // equal lengths count a half
  CHECK(a.mean_loss() == 1);
  CHECK(a.mean_margin() == 0);
  CHECK(a.known == 1);
  Comparison text = {.sequences = {{1}}, .label = false};
  CHECK(agreement_on(text, std::vector<float>{-2}, 0).right == 1);
  CHECK(agreement_on(text, std::vector<float>{-2}, 0).texts);
  const RankLoss l = comparison_loss(text, std::vector<float>{-2}, 0, 0, .5);
  check_known(l.loss, .5 * label_loss(-2, false).loss);
  check_known(l.dreward, Doubles{.5 * label_loss(-2, false).dreward[0]});
  const Agreement back = agreement_of(Json::parse(agreement_json(a).dump()), "summary.json");
  CHECK(back.pairs == a.pairs);
  CHECK(back.right == a.right);
  CHECK(back.longer == a.longer);
  CHECK(back.calibration_error() == doctest::Approx(a.calibration_error()));
}

TEST_CASE("calibration puts pairs into bins of certainty and measures how far they are off") {
  Agreement a;
  for (const double right : {1, 1, 1, -1}) a.add_pair(right * std::log(3));  // 3 of 4 at s = .75
  CHECK(a.calibration_error() == doctest::Approx(0));
  CHECK(a.bins[5].pairs + a.bins[4].pairs == 4);
  a.add_pair(0);  // sure of nothing, right by half
  CHECK(a.bins[0].pairs == 1);
  CHECK(a.calibration_error() == doctest::Approx(0));
  a.add_pair(-40), a.add_pair(-40);  // sure, and wrong
  CHECK(a.bins[9].pairs == 2);
  CHECK(a.calibration_error() == doctest::Approx(2. / 7));
  Agreement both;
  both.add(a), both.add(a);
  CHECK(both.bins[9].pairs == 4);
  CHECK(both.calibration_error() == doctest::Approx(a.calibration_error()));
  a.add_pair(kNan);
  CHECK(std::isnan(a.calibration_error()));
  CHECK(std::isnan(a.accuracy()));
}

// ---------------------------------------------------------------------------------------------
// Direct preferences

TEST_CASE("DPO's first loss is ln 2, and the known pair's are the known ones") {
  const PairLoss first = dpo_loss(-12.5, -9, -12.5, -9, .1);
  check_known(first.loss, std::log(2));
  check_known(first.dchosen, -.05);
  CHECK(first.margin == 0);
  check_known(dpo_loss(-12.5, -9, -12.5, -9, .1, .2).loss, std::log(2));
  const PairLoss known = dpo_loss(-10, -14, -11, -13, .1);  // D = 2
  check_known(known.loss, .598139);
  check_known(known.dchosen, -.045017);
  check_known(known.drejected, .045017);
  check_known(known.margin, .2);
  const PairLoss smoothed = dpo_loss(-10, -14, -11, -13, .1, .1);
  check_known(smoothed.loss, .618139);
  check_known(smoothed.dchosen, -.035017);
  const PairLoss ipo = ipo_loss(-10, -14, -11, -13, .1);
  check_known(ipo.loss, 9);
  check_known(ipo.dchosen, -6);
  check_known(ipo.drejected, 6);
  CHECK(dpo_loss(-2000, -1, -1, -1, 1).loss == doctest::Approx(1999));  // no overflow
}

TEST_CASE("KTO and ORPO are what their formulas say at a point") {
  // at the baseline both kinds lose a half
  check_known(kto_loss(-3, -4, true, 1, .1).loss, .5);
  check_known(kto_loss(-3, -4, false, 1, .1, 1.5).loss, .75);
  check_known(kto_loss(-3, -4, true, 1, .1).dlogp, -.1 / 4);
  CHECK(kto_loss(-1, -4, true, 1, .1).loss < .5);
  CHECK(kto_loss(-1, -4, false, 1, .1).loss > .5);
  check_known(kto_baseline(Doubles{1, 3, -1}), 1);
  CHECK(kto_baseline(Doubles{-1, -3, 1}) == 0);
  CHECK(std::isnan(kto_baseline(Doubles{1, kNan})));
  // odds 1 and 1/3: -log(1/2) - lambda log s(log 3)
  const PairLoss orpo = orpo_loss(std::log(.5), std::log(.25), .2);
  check_known(orpo.loss, std::log(2) + .2 * std::log(4. / 3));
  check_known(orpo.margin, std::log(3));
  CHECK(std::isfinite(orpo_loss(0, 0, .2).loss));  // certain of both
  CHECK(std::isfinite(orpo_loss(0, -1, .2).dchosen));
}

TEST_CASE("direct objectives' gradients match finite differences through a softmax") {
  const Softmaxes s{7};
  const size_t chosen = 4;  // tokens of the chosen answer, the rest are the rejected one's
  const double refs[] = {-5, -4};
  // of sums, or of means per token
  const auto check = [&](const std::string& name, bool means, const auto& objective) {
    s.check(name, [&](const Doubles& l, const Doubles&) {
      const double n = means ? double(chosen) : 1, m = means ? double(l.size() - chosen) : 1;
      double a = 0, b = 0;
      for (size_t t = 0; t < l.size(); t++) (t < chosen ? a : b) += l[t];
      const PairLoss pair = objective(a / n, b / m);
      LossAndSlopes answer{pair.loss, Doubles(l.size())};
      for (size_t t = 0; t < l.size(); t++)
        answer.dlogp[t] = t < chosen ? pair.dchosen / n : pair.drejected / m;
      return answer;
    });
  };
  for (const double smoothing : {0., .1}) {
    check("DPO", false,
          [&](double a, double b) { return dpo_loss(a, b, refs[0], refs[1], .3, smoothing); });
  }
  check("IPO", true,
        [&](double a, double b) { return ipo_loss(a, b, refs[0] / 4, refs[1] / 3, .3); });
  check("ORPO", true, [&](double a, double b) { return orpo_loss(a, b, .4); });
  check("KTO", false, [&](double a, double b) {
    const KtoLoss good = kto_loss(a, refs[0], true, .2, .3, 1.25),
                  bad = kto_loss(b, refs[1], false, .2, .3, .75);
    return PairLoss{good.loss + bad.loss, good.dlogp, bad.dlogp};
  });
}

// ---------------------------------------------------------------------------------------------
// NaN

TEST_CASE("objectives of preferences: NaN in is NaN out") {
  const Doubles bad{-1, kNan};
  CHECK(std::isnan(rank_loss(bad, pairs_of(std::vector{1, 2}), 0, 0, 1).loss));
  CHECK(std::isnan(rank_loss(bad, pairs_of(std::vector{1, 2}), 0, 0, 1).dreward[0]));
  CHECK(std::isnan(label_loss(kNan, true).loss));
  for (int i = 0; i < 4; i++) {
    double x[] = {-1, -2, -3, -4};
    x[i] = kNan;
    CHECK(std::isnan(dpo_loss(x[0], x[1], x[2], x[3], .1).dchosen));
    CHECK(std::isnan(ipo_loss(x[0], x[1], x[2], x[3], .1).loss));
    if (i < 2) CHECK(std::isnan(orpo_loss(x[0], x[1], .1).loss));
    if (i < 2) CHECK(std::isnan(kto_loss(x[0], x[1], true, 0, .1).dlogp));
  }
}

// ---------------------------------------------------------------------------------------------
// Whole steps against PyTorch

TEST_CASE("a step of DPO has PyTorch's loss and every gradient, IPO, ORPO and KTO its weights") {
  const Steps s("rlhf_dpo");
  const Golden& g = s.golden;
  const std::vector<float>& ref_logp = g.at("ref_logp");
  const auto policy = make_formula_gpt(g.config);
  policy->forward(s.batch(), Pass::train);
  const std::span<const float> logp = policy->logp();
  const double beta = s.setting("beta"), pairs = double(s.answers.size()) / 2;
  for (const std::string name : {"dpo", "ipo", "orpo", "kto"}) {
    double loss = 0;
    std::vector<float> dlogp(logp.size());
    for (size_t w = 0; w < s.answers.size(); w += 2) {  // chosen w, rejected w + 1
      const bool means = name == "ipo" || name == "orpo";
      const double n = means ? s.length(w) : 1, m = means ? s.length(w + 1) : 1;
      const double chosen = s.sum(logp, w) / n, rejected = s.sum(logp, w + 1) / m,
                   ref_chosen = s.sum(ref_logp, w) / n, ref_rejected = s.sum(ref_logp, w + 1) / m;
      PairLoss pair;
      if (name == "dpo") {
        pair = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, s.setting("smoothing"));
      } else if (name == "ipo") {
        pair = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta);
      } else if (name == "orpo") {
        pair = orpo_loss(chosen, rejected, s.setting("lam"));
      } else {
        const double baseline = s.setting("baseline");
        const KtoLoss good = kto_loss(chosen, ref_chosen, true, baseline, beta),
                      bad = kto_loss(rejected, ref_rejected, false, baseline, beta);
        pair = {(good.loss + bad.loss) / 2, good.dlogp / 2, bad.dlogp / 2};  // mean over answers
      }
      loss += pair.loss / pairs;
      for (size_t t = s.answers[w].first; t < s.answers[w].second; t++)
        dlogp[t] = float(pair.dchosen / n / pairs) * s.live[t];
      for (size_t t = s.answers[w + 1].first; t < s.answers[w + 1].second; t++)
        dlogp[t] = float(pair.drejected / m / pairs) * s.live[t];
    }
    // IPO's loss is about 24: its error is of that size
    check_loss(name == "ipo" ? loss / 24 : loss,
               name == "ipo" ? std::vector{g.at("loss.ipo")[0] / 24} : g.at("loss." + name), name);
    check_close(dlogp, g.at("dlogp." + name), kWeights, "dlogp." + name);
    if (name != "dpo") continue;
    policy->backward(dlogp);
    check_gradients(*policy, g, "");
    policy->forward(s.batch(), Pass::train);
  }
}

TEST_CASE("a step of a reward model on rankings and labels has PyTorch's loss and every gradient") {
  const Golden g = load_golden("rlhf_reward");
  const std::vector<int> tokens = g.ints("tokens"), starts = g.ints("doc_starts");
  const auto model = make_formula_gpt(g.config);
  model->forward({tokens, {}, starts}, Pass::train);
  const std::span<const float> value = model->value();
  std::vector<float> score, dvalue(tokens.size());
  for (size_t i = 1; i < starts.size(); i++) score.push_back(value[size_t(starts[i]) - 1]);
  check_close(score, g.at("score"), kWeights, "score");
  const auto rankings = g.settings.at("rankings").get<std::vector<std::vector<int>>>();
  double loss = 0;
  size_t at = 0;  // answer
  const auto dscore = [&](size_t answer) -> float& {
    return dvalue[size_t(starts[answer + 1]) - 1];
  };
  for (const std::vector<int>& ranking : rankings) {
    const Comparison c = answers(ranking);
    const auto rank =
        comparison_loss(c, std::span(score).subspan(at, ranking.size()), g.settings.at("margin"),
                        g.settings.at("centring"), 1. / double(rankings.size()));
    loss += rank.loss;
    for (size_t k = 0; k < ranking.size(); k++) dscore(at + k) = float(rank.dreward[k]);
    at += ranking.size();
  }
  check_loss(loss, g.at("loss"), "rankings");
  const auto labels = g.settings.at("labels").get<std::vector<int>>();
  loss = 0;
  for (const int good : labels) {
    const RankLoss label = label_loss(score[at], good != 0, 1 / double(labels.size()));
    loss += label.loss;
    dscore(at++) = float(label.dreward[0]);
  }
  check_loss(loss, g.at("loss.labels"), "labels");
  model->backward({}, dvalue);
  check_gradients(*model, g, "");
}

// ---------------------------------------------------------------------------------------------
// KTO on labelled answers

TEST_CASE("KTO on labels, on pairs and on both has TRL's loss and gradient") {
  for (const Json& g : read_json("test/golden/kto.json")) {
    CAPTURE(g.at("name").get<std::string>());
    const auto logp = g.at("logp").get<Doubles>(), reference = g.at("reference").get<Doubles>();
    const DpoSettings s{.loss = "kto",
                        .beta = g.at("beta"),
                        .desirable_weight = g.at("desirable_weight"),
                        .undesirable_weight = g.at("undesirable_weight")};
    const double kl = kto_baseline(g.at("mismatched").get<Doubles>());
    check_known(kl, g.at("kl"));
    std::vector<Comparison> all;
    for (const Json& good : g.at("singles")) {
      all.push_back({.sequences = {{1}}, .label = good.get<bool>()});
    }
    for (int i = 0; i < g.at("pairs"); i++) all.push_back(answers({1, 2}));
    const double scale = 1 / double(logp.size());
    DpoStats seen;
    Doubles gradient;
    for (Comparison& c : all) {
      std::vector<AnswerLogp> l;
      for (size_t k = 0; k < c.sequences.size(); k++) {
        l.push_back({logp[gradient.size() + k], 1});
        c.reference.push_back({reference[gradient.size() + k], 1});
      }
      for (const double d : comparison_loss(s, c, l, kl, scale, seen)) gradient.push_back(d);
    }
    CHECK(seen.answers == double(logp.size()));
    check_known(seen.mean_loss(), g.at("loss"));
    check_known(gradient, g.at("gradient").get<Doubles>());
  }
}

TEST_CASE("the gradient of a step of KTO on labels and pairs is the loss's slope") {
  const Golden g = load_golden("rlhf_dpo");
  const auto gpt = make_formula_gpt(g.config);
  DpoSettings s{.loss = "kto", .beta = .3, .desirable_weight = 1.5, .undesirable_weight = .5};
  s.common.context = g.config.T, s.common.micro_batch_tokens = 9;  // several batches
  std::vector<Comparison> all;
  for (int i = 0; i < 4; i++) {
    Comparison c = i < 2 ? answers({1, 2}) : Comparison{.label = i == 2};
    c.sequences = {{5 + i, 1, 2, 7}};
    if (!c.label) c.sequences.push_back({5 + i, 1, 3, 8, 4});
    c.prompt_length = 2, c.problem = uint64_t(i);
    for (size_t k = 0; k < c.sequences.size(); k++) c.reference.push_back({-9. + double(k), 2});
    all.push_back(std::move(c));
  }
  match_with_other_prompts(all);
  const auto& tensors = gpt->table().tensors;
  // The baseline is a constant of the step: kept at 0, and where the policy does not move it.
  for (const double reference : {1000., -1000.}) {
    for (Comparison& c : all) c.mismatch.reference.sum = reference;
    const bool saturated = reference < 0;  // kl = 1000: a good answer's s is 0, a bad one's 1
    gpt->zero_gradients();
    const DpoStats seen = pass_over(*gpt, s, all, all_of(all), true);
    CHECK((*seen.kl > 0) == saturated);
    if (saturated) {
      check_known(seen.mean_loss(), (1.5 * 3) / 6);  // three good answers lost, three bad ones won
      continue;
    }
    double slope = 0, square = 0;
    std::vector<std::vector<float>> before, direction;
    for (size_t i = 0; i < tensors.size(); i++) {
      before.push_back(goldens::read(*gpt, int(i), Slot::weight));
      const auto gradient = goldens::read(*gpt, int(i), Slot::gradient);
      const Doubles way = noise(tensors[i].name, gradient.size(), .1);
      direction.emplace_back(way.begin(), way.end());
      for (size_t j = 0; j < gradient.size(); j++) {
        slope += double(gradient[j]) * direction.back()[j];
        square += double(gradient[j]) * gradient[j];
      }
    }
    CHECK(square > 0);
    const auto loss_at = [&](float h) {
      for (size_t i = 0; i < tensors.size(); i++) {
        std::vector<float> moved = before[i];
        for (size_t j = 0; j < moved.size(); j++) moved[j] += h * direction[i][j];
        gpt->write(int(i), Slot::weight, moved);
      }
      return pass_over(*gpt, s, all, all_of(all), false).mean_loss();
    };
    // Floats of about 1e-7 over steps of 1e-2: five digits, and the curvature cancels.
    const double measured = (loss_at(.01f) - loss_at(-.01f)) / .02;
    CHECK_MESSAGE(std::abs(measured - slope) < 1e-3 * std::abs(slope) + 1e-5, "measured ", measured,
                  ", slope ", slope);
    loss_at(0);
  }
}

TEST_CASE("labelled answers are right above the baseline, and their kinds are averaged apart") {
  DpoSettings s{.loss = "kto", .beta = .5};
  DpoStats seen;
  const auto add = [&](bool good, double logp, double reference) {
    Comparison c{.sequences = {{1}}, .label = good};
    c.reference = {{reference, 1}};
    const std::vector<AnswerLogp> l = {{logp, 1}};
    comparison_loss(s, c, l, 1, 1, seen);
  };
  add(true, -3, -6);   // 3 above the reference, the baseline is 1
  add(true, -5, -4);   // below
  add(false, -9, -6);  // below, as it should be
  add(false, -4, -5);  // at the baseline
  seen.kl = 1;
  CHECK(seen.accuracy() == (1 + 0 + 1 + .5) / 4);
  CHECK(seen.chosen.mean_logp() == -4);
  CHECK(seen.rejected.mean_logp() == -6.5);
  CHECK(seen.chosen.mean_reward() == .5 * (3 - 1) / 2);
  CHECK(seen.rejected.mean_reward() == .5 * (-3 + 1) / 2);
  CHECK(seen.mean_margin() == 1);
  DpoStats good_alone;
  std::swap(seen, good_alone);
  add(true, -3, -6);
  seen.kl = 0;
  CHECK(OrderedJson::parse(seen.json().dump()).at("logp_rejected").is_null());
  CHECK(!contains(seen.text(), "rejected"));
  CHECK(contains(good_alone.text(), "chosen -4.0 (+0.50)  rejected -6.5 (-0.50)"));
}

// ---------------------------------------------------------------------------------------------
// Margins

TEST_CASE("a pair's margin and the difference of its scores raise what the better one must have") {
  const Tokenizer t = Tokenizer::load("test/golden/eval_model");
  const StageTemplate chat(t, "test/golden/eval_model", {});
  Preference p{.text = "ask", .continuations = {"yes", "no", "yes"}, .ranking = {1, 2, 3}};
  p.scores = {9, 5, 1};
  const auto margins = [&](const Preference& of, double scale) {
    Doubles found;
    for (const Pair& pair : make_comparison(chat, of, false, scale).pairs)
      found.push_back(pair.margin);
    return found;
  };
  // The first answer and the third are the same: they make no pair.
  CHECK(margins(p, 0) == Doubles{0, 0});
  CHECK(margins(p, .25) == Doubles{1, 1});
  p.margin = 2;
  CHECK(margins(p, 0) == Doubles{2, 2});
  CHECK(margins(p, .25) == Doubles{3, 3});
  // -log s(r_w - r_l - margin - m)
  const std::vector<Pair> pairs = {{0, 1, .75}};
  const RankLoss l = rank_loss(Doubles{2, .5}, pairs, .25, 0, 1);
  check_known(l.loss, std::log(1 + std::exp(-.5)));
  const auto loss = [&](const Doubles& r) { return rank_loss(r, pairs, .25, .1, 1).loss; };
  CHECK(rel_error(rank_loss(Doubles{2, .5}, pairs, .25, .1, 1).dreward,
                  differences({2, .5}, loss)) < kDifference);
}

// ---------------------------------------------------------------------------------------------
// KTO's baseline

// A comparison of two answers to a prompt of two ids, of the ids of its number.
Comparison numbered(int number, uint64_t problem) {
  Comparison c = answers({1, 2});
  c.sequences = {{number, 1, 2, number}, {number, 1, 3, number, 4}};
  c.prompt_length = 2, c.problem = problem;
  return c;
}

TEST_CASE("KTO's baseline takes answers to other prompts, chosen and rejected alike") {
  std::vector<Comparison> all;
  const int sizes[] = {4, 4, 1, 3, 4, 2};  // comparisons of each problem, which stand together
  for (int problem = 0; problem < 6; problem++)
    for (int k = 0; k < sizes[problem]; k++)
      all.push_back(numbered(int(all.size()), mix64(uint64_t(problem))));
  match_with_other_prompts(all);
  std::set<int> used;
  int rejected = 0;
  for (const Comparison& c : all) {
    REQUIRE(c.mismatch.comparison >= 0);
    CHECK(all[size_t(c.mismatch.comparison)].problem != c.problem);
    used.insert(c.mismatch.comparison);
    rejected += c.mismatch.answer == 1;
  }
  CHECK(used.size() == all.size());
  CHECK(rejected == int(all.size()) / 2);
  // A problem that fills more than half takes the few others in turn.
  std::vector<Comparison> most = {numbered(0, 7), numbered(1, 7), numbered(2, 7), numbered(3, 8)};
  match_with_other_prompts(most);
  for (const Comparison& c : most) {
    REQUIRE(c.mismatch.comparison >= 0);
    CHECK(most[size_t(c.mismatch.comparison)].problem != c.problem);
  }
  std::vector<Comparison> alone = {numbered(0, 7), numbered(1, 7)};
  match_with_other_prompts(alone);
  for (const Comparison& c : alone) CHECK(c.mismatch.comparison == -1);
  CHECK(kto_baseline({}) == 0);
}

TEST_CASE("a mismatched answer has the log p of its own tokens in answer to the other prompt") {
  const Golden g = load_golden("rlhf_dpo");
  const auto gpt = make_formula_gpt(g.config);
  std::vector<Comparison> all = {numbered(5, 1), numbered(6, 2), numbered(7, 3)};
  all[1].written = {{false, false, true, false}, {false, false, true, false, true}};
  match_with_other_prompts(all);
  PreferenceSettings s;
  s.context = g.config.T, s.micro_batch_tokens = 8;
  const auto found = mismatched_logps(*gpt, s, all, all_of(all));
  REQUIRE(found.size() == 3);
  for (const auto& f : found) {
    const Comparison &own = all[size_t(f.first)], &other = all[size_t(own.mismatch.comparison)];
    const std::vector<int>& answer = other.sequences[own.mismatch.answer];
    std::vector<int> ids = {own.sequences[0][0], own.sequences[0][1]}, targets(answer.size(), -1);
    for (size_t p = 2; p < answer.size(); p++) {
      ids.push_back(answer[p]);
      const bool counts = other.written.empty() || other.written[own.mismatch.answer][p];
      if (counts) targets[p - 1] = answer[p];
    }
    const std::vector<int> starts = {0, int(ids.size())};
    gpt->forward({ids, targets, starts}, Pass::score);
    double sum = 0;
    for (const float l : gpt->logp()) sum += l;
    CHECK(f.second.sum == sum);
    CHECK(sum < 0);
  }
}

// ---------------------------------------------------------------------------------------------
// Signals, and normalization

TEST_CASE("a signal interrupts evaluations and the reference's pass, and no step") {
  const auto gpt = make_formula_gpt(load_golden("rlhf_dpo").config),
             scorer = make_formula_gpt(load_golden("rlhf_reward").config);
  std::vector<Comparison> all = {numbered(5, 1), numbered(6, 2)};
  for (Comparison& c : all) c.reference.resize(2);
  DpoSettings dpo;
  RewardSettings reward;
  dpo.common.micro_batch_tokens = reward.common.micro_batch_tokens = 64;
  for (const int signal : {SIGINT, 0}) {
    stop_signal = signal;
    const auto interrupted = [&](auto work) {
      try {
        work();
      } catch (const Interrupted&) {
        return true;
      }
      return false;
    };
    const bool yes = signal != 0;
    CHECK(interrupted([&] { pass_over(*gpt, dpo, all, all_of(all), false); }) == yes);
    CHECK(interrupted([&] { pass_over(*scorer, reward, all, all_of(all), false); }) == yes);
    CHECK(interrupted([&] { logps_of(gpt.get(), all, 64); }) == yes);
    RewardTraining t;
    t.data.config = load_golden("rlhf_reward").config, t.settings = reward;
    t.gpt = make_formula_gpt(t.data.config);
    t.reference_answers = {{1, 2}, {3}};
    Run run;
    CHECK(interrupted([&] { normalize(t, run); }) == yes);
    CHECK(!interrupted([&] { pass_over(*gpt, dpo, all, all_of(all), true); }));
    CHECK(!interrupted([&] { pass_over(*scorer, reward, all, all_of(all), true); }));
  }
}

TEST_CASE("equal scores are left as they are, others get mean 0 and standard deviation 1") {
  RewardTraining t;
  t.data.config = load_golden("rlhf_reward").config;
  t.gpt = make_formula_gpt(t.data.config);
  t.settings.common.micro_batch_tokens = 64;
  t.reference_answers = {{1, 2, 3}, {4, 5}, {6}};
  Run run;
  normalize(t, run);
  std::vector<float> scores = values_at_end(*t.gpt, t.reference_answers, 64);
  for (float& score : scores) score += float(t.shift);
  CHECK(std::abs(spread_of(scores).mean) < 1e-5);
  CHECK(spread_of(scores).std == doctest::Approx(1).epsilon(1e-5));
  scale_scores(t, 0), t.shift = 0;
  const Spread none = normalize(t, run);
  CHECK(none.mean == 0);
  CHECK(none.std == 1);
  CHECK(t.shift == 0);
}

TEST_CASE("scores are normalized on answers from all over the file") {
  PreferenceData d;
  for (int i = 0; i < 3000; i++) d.train.push_back({.sequences = {{i}}});
  const auto chosen = read_reference_answers({}, d);
  REQUIRE(chosen.size() == kReferenceAnswers);
  CHECK(chosen.front()[0] == 0);
  CHECK(chosen[kReferenceAnswers / 2][0] == 1500);
  CHECK(chosen.back()[0] > 2990);
}

// ---------------------------------------------------------------------------------------------
// Runs of older versions

TEST_CASE("a model that has changed is found by its hash, which older versions took otherwise") {
  const auto check = [](const std::string& saved, const std::string& found) {
    return error_of([&] { check_model_hash({{"path", "a/model"}, {"hash", saved}}, found); });
  };
  const std::string hash = "0123456789abcdef", other = "0123456789abcdee";
  CHECK(check(hash, hash) == "no error");
  CHECK(check(hash, other) == "a/model: found a model of hash " + other + ", expected " + hash +
                                  ", that of the run's beginning: it has changed");
  CHECK(contains(check(hash + hash, hash), "it has changed"));  // had adapters
  CHECK(check(std::string(64, '0'), hash) == "no error");       // SHA-256
  CHECK(check(std::string(64, '0') + hash, hash + hash) == "no error");
}

TEST_CASE("the settings of a run that an older version began are read under their new names") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "run/model");
  write_file(dir / "run/model/config.json", "{}");
  const auto saved = [&](const char* stage, const Json& settings) {
    const Json state = {{"stage", stage}, {"settings", settings}};
    write_file(dir / "run/model/trainer_state.json", state.dump());
  };
  const Json groups = {
      {"model", "m"},         {"data", {"d"}},  {"most", 7},   {"folds", 3},        {"batch", 8},
      {"groups", 30},         {"steps", 4},     {"lr", .002},  {"head_lr", .01},    {"clip", .3},
      {"schedule", "cosine"}, {"final_lr", .2}, {"warmup", 2}, {"weight_decay", .1}};
  saved("reward", {{"groups", groups}, {"margin", .1}, {"centring", .02}, {"normalise", "none"}});
  const auto r = saved_settings<RewardSettings>({.out = dir / "run"}, "reward", with_new_names);
  CHECK(r.margin == .1);
  CHECK(r.center == .02);
  CHECK(r.normalize_on == "none");
  CHECK(r.common.limit == 7);
  CHECK(r.common.folds == 3);
  CHECK(r.common.comparisons == 30);
  CHECK(r.common.steps() == 4);
  CHECK(r.common.optimizer.lr == .002);
  CHECK(r.common.optimizer.head_lr == .01);
  CHECK(r.common.optimizer.clip_norm == .3);
  CHECK(r.common.optimizer.schedule == "cosine");
  CHECK(r.common.optimizer.final_lr == .2);
  CHECK(r.common.optimizer.warmup == 2);
  CHECK(r.common.optimizer.weight_decay == .1);
  // What this version writes, it reads.
  saved("reward", r);
  CHECK(Json(saved_settings<RewardSettings>({.out = dir / "run"}, "reward", with_new_names)) ==
        Json(r));
  saved("dpo", {{"groups", groups}, {"loss", "kto"}, {"beta", .3}, {"lora", 4}});
  const auto d = saved_settings<DpoSettings>({.out = dir / "run"}, "dpo", with_new_names);
  CHECK(d.loss == "kto");
  CHECK(d.lora == 4);
  CHECK(d.common.limit == 7);
  CHECK(error_of([&] {
          saved_settings<RewardSettings>({.out = dir / "run"}, "reward", with_new_names);
        }) != "no error");
}

}  // namespace
