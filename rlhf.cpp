// Stage 4, learning from preferences and from problems whose answers can be checked: an assistant
// to a better one.
//
//     preferences -> reward model -> score at the end of turn              (reward)
//     preferences -> policy against its own beginning                      (dpo)
//     prompts -> rollouts -> rewards -> advantages -> policy               (ppo, grpo)
//     prompts -> n rollouts -> the best of them                            (best-of-n)
//     all of it against a reward that is known                             (overoptimize)
//
// This is the one idea of the whole project again: a forward pass gives the log-probability of each
// token of an answer (or a value behind each), an objective makes of them one number per token,
// dL/dlogp (or dL/dvalue), and the backward pass takes it from there. An objective is a short pure
// function, beside its formula and source; everything else here brings it its inputs.
//
// Whatever is compared is compared at one distribution: rollouts are sampled at the temperature
// that is scored, without top-k, top-p or penalties, and l_old, l_ref and l come from the same
// forward pass.
//
// Sources: Bradley, Terry 1952; InstructGPT, Ouyang et al. 2022; PPO, Schulman et al. 2017; GAE,
// Schulman et al. 2015; DPO, Rafailov et al. 2023; GRPO, Shao et al. 2024 (DeepSeekMath); gold
// against proxy, Gao, Schulman, Hilton 2022 (Scaling Laws for Reward Model Overoptimization).
// Others stand beside what they gave.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "cake/checkpoint.h"
#include "cake/generate.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/schedule.h"
#include "cake/sha256.h"
#include "cake/shards.h"
#include "cake/tokenizer.h"
#include "cake/tools.h"
#include "cake/verify.h"

namespace cake {
namespace {

// =============================================================================================
// Objectives: from log-probabilities, values and rewards to a loss and its derivatives
//
// Nothing here knows of a model. l_t is the log-probability of token t under the policy, and each
// function answers how its loss moves with what went in: dlogp[t] = dL/dl_t, dvalue, dreward. The
// engine takes it from there. Arrays of a batch are packed, rollout after rollout. A weight holds
// both the mask and the 1/N of a mean: what has weight 0 counts nowhere, whatever stands there. NaN
// comes out where NaN went in. Sums are in double.

template <class T>
using In = std::span<const std::type_identity_t<T>>;  // a vector of T converts, T is not deduced

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double log_sigmoid(double x) {  // without overflow on either side
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}

// --- Reward models

// How often "a is better" is right, by how sure the model is: bins of s(|difference|) over .5 to 1.
struct Calibration {
  static constexpr int kBins = 10;
  std::array<int64_t, kBins> pairs{};
  std::array<double, kBins> predicted{}, right{};  // sums of s(|difference|), of right answers

  void add(double difference) {  // r_better - r_worse
    if (std::isnan(difference)) return;
    const double sure = sigmoid(std::abs(difference));
    const size_t bin = size_t(std::clamp(int((sure - .5) * 2 * kBins), 0, kBins - 1));
    pairs[bin]++;
    predicted[bin] += sure;
    right[bin] += difference > 0 ? 1 : difference == 0 ? .5 : 0;
  }
  void add(const Calibration& other) {
    for (size_t b = 0; b < kBins; b++) {
      pairs[b] += other.pairs[b];
      predicted[b] += other.predicted[b];
      right[b] += other.right[b];
    }
  }
  // Expected calibration error: mean distance of what was predicted from what was right.
  double error() const {
    double sum = 0, n = 0;
    for (size_t b = 0; b < kBins; b++) {
      sum += std::abs(predicted[b] - right[b]);
      n += double(pairs[b]);
    }
    return n > 0 ? sum / n : 0;
  }
};

template <class T>
struct RankLoss {
  double loss = 0;
  std::vector<T> dreward;  // (K)
  int pairs = 0;           // whose ranks differ
  double right = 0;        // of them, in the right order; an equal pair counts a half
  double margin = 0;       // sum of r_w - r_l
  Calibration calibration;
};

// K answers to one prompt, ranked (1 is best, equal ranks make no pair). Bradley, Terry 1952; all
// pairs of a prompt in one batch, Ouyang et al. 2022; centring, Eisenstein et al. 2023:
//   L = scale / pairs * sum over pairs of -log s(r_w - r_l - margin) + centring (r_w + r_l)^2
// `scale`: 1 / prompts of the step. Without pairs the loss is 0.
template <class T = float>
RankLoss<T> rank_loss(In<T> reward, std::span<const int> ranking, double margin, double centring,
                      double scale) {
  const size_t K = reward.size();
  RankLoss<T> out;
  std::vector<double> d(K);
  for (size_t w = 0; w < K; w++) {
    for (size_t l = 0; l < K; l++) {
      if (ranking[w] >= ranking[l]) continue;
      const double difference = double(reward[w]) - reward[l], sum = double(reward[w]) + reward[l];
      out.loss += -log_sigmoid(difference - margin) + centring * sum * sum;
      const double dpair = -sigmoid(margin - difference), dcentre = 2 * centring * sum;
      d[w] += dpair + dcentre;
      d[l] += -dpair + dcentre;
      out.pairs++;
      out.right += difference > 0 ? 1 : difference == 0 ? .5 : 0;
      out.margin += difference;
      out.calibration.add(difference);
    }
  }
  const double mean = out.pairs > 0 ? scale / out.pairs : 0;
  out.loss *= mean;
  for (const double x : d) out.dreward.push_back(T(mean * x));
  return out;
}

struct LabelLoss {
  double loss = 0, dreward = 0;
};
// A text that is good, or not: L = -log s(r), or -log s(-r).
LabelLoss label_loss(double reward, bool good) {
  const double sign = good ? 1 : -1;
  return {-log_sigmoid(sign * reward), -sign * sigmoid(-sign * reward)};
}

// --- Advantages

// (x - mean) / sqrt(variance + 1e-8), population variance, over what `weights` does not mask, which
// becomes 0. keep_mean: the mean is added again, as for rewards (Ziegler et al. 2019).
template <class T = float>
void whiten(std::span<std::type_identity_t<T>> x, In<T> weights = {}, bool keep_mean = false) {
  const auto counts = [&](size_t i) { return weights.empty() || weights[i] != 0; };
  double n = 0, mean = 0, variance = 0;
  for (size_t i = 0; i < x.size(); i++) n += counts(i), mean += counts(i) ? double(x[i]) : 0;
  mean /= std::max(1., n);
  for (size_t i = 0; i < x.size(); i++) {
    if (counts(i)) variance += (x[i] - mean) * (x[i] - mean) / n;
  }
  const double scale = 1 / std::sqrt(variance + 1e-8);
  for (size_t i = 0; i < x.size(); i++) {
    x[i] = counts(i) ? T((x[i] - mean) * scale + (keep_mean ? mean : 0)) : T(0);
  }
}

template <class T>
struct Advantages {
  std::vector<T> advantages, returns;
};
// Generalised advantage estimation (Schulman et al. 2015) of one finished rollout, V' = 0 after it:
//   delta = r + gamma V' - V,  A = delta + gamma lambda A',  R = A + V
template <class T = float>
Advantages<T> gae(In<T> rewards, In<T> values, double gamma, double lambda) {
  const size_t n = rewards.size();
  Advantages<T> out{std::vector<T>(n), std::vector<T>(n)};
  double next_value = 0, next_advantage = 0;
  for (size_t t = n; t-- > 0;) {
    const double delta = rewards[t] + gamma * next_value - values[t];
    next_advantage = delta + gamma * lambda * next_advantage;
    next_value = values[t];
    out.advantages[t] = T(next_advantage);
    out.returns[t] = T(next_advantage + values[t]);
  }
  return out;
}

enum class GroupMethod {
  cake,     // r - mean, every token of the step weighs the same
  grpo,     // Shao et al. 2024
  dr_grpo,  // Liu et al. 2025: neither the spread of a group nor a length divides
  dapo,     // Yu et al. 2025
  rloo,     // Kool et al. 2019, Ahmadian et al. 2024
  gspo,     // Zheng et al. 2025: clipped_sequence_policy
};

bool has_variance(std::span<const double> rewards) {
  return std::any_of(rewards.begin(), rewards.end(), [&](double r) { return r != rewards[0]; });
}

// One advantage for each rollout of a group from the group's rewards; 0 without variance.
std::vector<double> group_advantages(std::span<const double> rewards, GroupMethod method) {
  const double G = double(rewards.size());
  if (!has_variance(rewards)) return std::vector<double>(rewards.size(), 0.);
  double mean = 0, squares = 0, scale = 1;
  for (const double r : rewards) mean += r / G;
  for (const double r : rewards) squares += (r - mean) * (r - mean);
  switch (method) {
    case GroupMethod::cake:
    case GroupMethod::dr_grpo:
      break;
    case GroupMethod::grpo:
    case GroupMethod::dapo:
    case GroupMethod::gspo:
      scale = 1 / (std::sqrt(squares / (G - 1)) + 1e-4);  // Bessel's correction
      break;
    case GroupMethod::rloo:  // r - mean of the others
      scale = G / (G - 1);
      break;
  }
  std::vector<double> advantages;
  for (const double r : rewards) advantages.push_back(scale * (r - mean));
  return advantages;
}

// What one token of each rollout weighs. `lengths`: trained tokens of all B rollouts of the step,
// those of skipped groups too. max_length: the most a rollout may have.
//   grpo, gspo: mean of the rollouts' means;  rloo: mean of their sums;
//   dr_grpo: sum / (B max_length);  cake, dapo: mean over all tokens
std::vector<double> token_weights(GroupMethod method, std::span<const int> lengths,
                                  int max_length) {
  const double B = double(lengths.size());
  const double tokens = double(std::accumulate(lengths.begin(), lengths.end(), int64_t(0)));
  std::vector<double> weights;
  for (const int n : lengths) {
    double count = tokens;
    if (method == GroupMethod::grpo || method == GroupMethod::gspo) count = B * n;
    if (method == GroupMethod::dr_grpo) count = B * max_length;
    if (method == GroupMethod::rloo) count = B;
    weights.push_back(n > 0 ? 1 / count : 0);
  }
  return weights;
}

// --- Policy and value

// Of the ratios rho = p / p_old, over what has a weight: sums, to be added over micro-batches.
struct RatioStats {
  int64_t count = 0;         // of ratios: tokens, or rollouts
  double clipped = 0;        // whose gradient the clip removed
  double ratio = 0, k3 = 0;  // sums; k3 estimates KL(old, new)
  double largest = 0;        // |rho - 1|; NaN once it was

  void add(double log_ratio, bool was_clipped) {
    const double off = std::abs(std::expm1(log_ratio));
    count++;
    clipped += was_clipped;
    ratio += std::exp(log_ratio);
    k3 += std::expm1(log_ratio) - log_ratio;
    if (off > largest || std::isnan(off)) largest = off;
  }
  void add(const RatioStats& other) {
    count += other.count, clipped += other.clipped, ratio += other.ratio, k3 += other.k3;
    if (other.largest > largest || std::isnan(other.largest)) largest = other.largest;
  }
  double clipped_share() const { return count > 0 ? clipped / double(count) : 0; }
  double mean_ratio() const { return count > 0 ? ratio / double(count) : 1; }
  double mean_k3() const { return count > 0 ? k3 / double(count) : 0; }
};

template <class T>
struct PolicyLoss {
  double loss = 0;
  std::vector<T> dlogp;  // as long as logp
  RatioStats ratios;
};

// rho A where the clip leaves a gradient: it removes what would move a ratio further out.
bool is_clipped(double ratio, double advantage, double clip_low, double clip_high) {
  return (advantage > 0 && ratio > 1 + clip_high) || (advantage < 0 && ratio < 1 - clip_low);
}

// PPO's clipped surrogate (Schulman et al. 2017), and GRPO's:
//   L = -sum w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),  rho = exp(l - l_old)
//   dL/dl = -w A rho, or 0 where the clip holds
template <class T = float>
PolicyLoss<T> clipped_policy(In<T> logp, In<T> old_logp, In<T> advantages, In<T> weights,
                             double clip_low, double clip_high) {
  PolicyLoss<T> out;
  out.dlogp.assign(logp.size(), T(0));
  for (size_t t = 0; t < logp.size(); t++) {
    if (weights[t] == 0) continue;
    const double w = weights[t], A = advantages[t], log_ratio = double(logp[t]) - old_logp[t];
    const double ratio = std::exp(log_ratio);
    const bool clipped = is_clipped(ratio, A, clip_low, clip_high);
    out.loss -= w * A * (clipped ? std::clamp(ratio, 1 - clip_low, 1 + clip_high) : ratio);
    out.dlogp[t] = clipped ? T(0) : T(-w * A * ratio);
    out.ratios.add(log_ratio, clipped);
  }
  return out;
}

// GSPO (Zheng et al. 2025): one ratio a rollout, s = exp(mean of l - l_old), the mean weighted by w
// (which is constant within a rollout but where it masks), W the sum of a rollout's weights:
//   L = -sum over rollouts of W min(s A, clip(s) A),  dL/dl_t = -w_t A s, or 0
// Rollout i is [starts[i], starts[i + 1]) of the arrays; `advantages` has one for each.
template <class T = float>
PolicyLoss<T> clipped_sequence_policy(In<T> logp, In<T> old_logp, std::span<const int> starts,
                                      In<T> advantages, In<T> weights, double clip_low,
                                      double clip_high) {
  PolicyLoss<T> out;
  out.dlogp.assign(logp.size(), T(0));
  for (size_t i = 0; i + 1 < starts.size(); i++) {
    double W = 0, log_ratio = 0;
    for (size_t t = size_t(starts[i]); t < size_t(starts[i + 1]); t++) {
      if (weights[t] == 0) continue;
      W += weights[t];
      log_ratio += weights[t] * (double(logp[t]) - old_logp[t]);
    }
    if (W == 0) continue;
    log_ratio /= W;
    const double A = advantages[i], ratio = std::exp(log_ratio);
    const bool clipped = is_clipped(ratio, A, clip_low, clip_high);
    out.loss -= W * A * (clipped ? std::clamp(ratio, 1 - clip_low, 1 + clip_high) : ratio);
    out.ratios.add(log_ratio, clipped);
    for (size_t t = size_t(starts[i]); t < size_t(starts[i + 1]) && !clipped; t++) {
      if (weights[t] != 0) out.dlogp[t] = T(-weights[t] * A * ratio);
    }
  }
  return out;
}

template <class T>
struct ValueLoss {
  double loss = 0;
  std::vector<T> dvalue;  // as long as value
  int64_t count = 0;
  double clipped = 0;  // sum, as in RatioStats
};

// PPO's clipped value loss (Schulman et al., OpenAI baselines 2017); clip 0 for none:
//   L = 1/2 sum w max((v - R)^2, (clip(v, v_old -+ clip) - R)^2)
template <class T = float>
ValueLoss<T> clipped_value(In<T> value, In<T> old_value, In<T> returns, In<T> weights,
                           double clip) {
  ValueLoss<T> out;
  out.dvalue.assign(value.size(), T(0));
  for (size_t t = 0; t < value.size(); t++) {
    if (weights[t] == 0) continue;
    const double w = weights[t], error = double(value[t]) - returns[t];
    const double step = double(value[t]) - old_value[t];
    const double held =
        clip > 0 ? old_value[t] + std::clamp(step, -clip, clip) - returns[t] : error;
    const bool clipped = !(held * held <= error * error);  // and then the loss does not follow v
    out.loss += .5 * w * (clipped ? held * held : error * error);
    out.dvalue[t] = T(clipped ? 0 * held : w * error);
    out.count++;
    out.clipped += clipped;
  }
  return out;
}

// 1 - Var(R - V) / Var(R) over what has a weight: 1 for a critic that knows, 0 for one that says
// the mean.
template <class T = float>
double explained_variance(In<T> values, In<T> returns, In<T> weights) {
  double n = 0, mean_return = 0, mean_rest = 0, of_return = 0, of_rest = 0;
  for (size_t t = 0; t < values.size(); t++) {
    if (weights[t] == 0) continue;
    const double r = returns[t], rest = r - values[t];  // Welford's running means
    n++;
    const double off_return = r - mean_return, off_rest = rest - mean_rest;
    mean_return += off_return / n, mean_rest += off_rest / n;
    of_return += off_return * (r - mean_return), of_rest += off_rest * (rest - mean_rest);
  }
  return of_return > 0 ? 1 - of_rest / of_return : 0;
}

// --- KL to the reference

// Of d = l - l_ref at tokens sampled from the policy (Schulman 2020, Approximating KL Divergence):
// each estimates KL(policy, reference), k1 unbiased, k2 and k3 never negative.
enum class KlEstimator { k1, k2, k3 };

double kl_estimate(KlEstimator k, double d) {
  return k == KlEstimator::k1 ? d : k == KlEstimator::k2 ? d * d / 2 : std::expm1(-d) + d;
}
// dk/dl. As a loss take k2: on policy its gradient is that of the KL. k3's is that of KL(reference,
// policy), and k1's is 0 in the mean.
double kl_derivative(KlEstimator k, double d) {
  return k == KlEstimator::k1 ? 1 : k == KlEstimator::k2 ? d : -std::expm1(-d);
}

template <class T>
struct KlLoss {
  double loss = 0;
  std::vector<T> dlogp;  // as long as logp
};
// L = sum w k(l - l_ref)
template <class T = float>
KlLoss<T> kl_loss(KlEstimator k, In<T> logp, In<T> reference, In<T> weights) {
  KlLoss<T> out;
  out.dlogp.assign(logp.size(), T(0));
  for (size_t t = 0; t < logp.size(); t++) {
    if (weights[t] == 0) continue;
    const double d = double(logp[t]) - reference[t];
    out.loss += weights[t] * kl_estimate(k, d);
    out.dlogp[t] = T(weights[t] * kl_derivative(k, d));
  }
  return out;
}

// The KL's price that keeps it near a target (Ziegler et al. 2019).
struct AdaptiveBeta {
  double beta = .15;
  double target = 6;  // nats an answer
  double horizon = 10000;

  void update(double kl, int64_t rollouts) {
    const double error = std::clamp(kl / target - 1, -.2, .2);
    beta *= 1 + error * double(rollouts) / horizon;
  }
};

// --- Direct preferences

// Of one pair; the mean over pairs is the caller's. Derivatives are by the two log-probabilities
// that went in: of a sum each token has all of it, of a mean 1/n.
struct PairLoss {
  double loss = 0, dchosen = 0, drejected = 0;
  double margin = 0;  // what the loss pushes up; right when above 0
};

// DPO (Rafailov et al. 2023) from sums over completions, D = (l_w - l_l) - (ref_w - ref_l), labels
// wrong with probability `smoothing` (Mitchell 2023):
//   L = -(1 - smoothing) log s(beta D) - smoothing log s(-beta D)
PairLoss dpo_loss(double chosen, double rejected, double ref_chosen, double ref_rejected,
                  double beta, double smoothing = 0) {
  const double x = beta * ((chosen - rejected) - (ref_chosen - ref_rejected));
  const double d = -beta * ((1 - smoothing) * sigmoid(-x) - smoothing * sigmoid(x));
  return {-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x), d, -d, x};
}

// IPO (Azar et al. 2023) from means per token: L = (D - 1/(2 beta))^2
PairLoss ipo_loss(double chosen, double rejected, double ref_chosen, double ref_rejected,
                  double beta) {
  const double D = (chosen - rejected) - (ref_chosen - ref_rejected), off = D - 1 / (2 * beta);
  return {off * off, 2 * off, -2 * off, beta * D};
}

// ORPO (Hong et al. 2024) from means per token, without a reference: to learn the chosen answer and
// its odds against the rejected one, o = p / (1 - p) with p = exp(l):
//   L = -l_w - lambda log s(log o_w - log o_l),  d log o/dl = 1 / (1 - p)
PairLoss orpo_loss(double chosen, double rejected, double lambda) {
  const auto log_odds = [](double l) { return l - std::log(-std::expm1(l)); };
  const double w = std::min(chosen, -1e-6), l = std::min(rejected, -1e-6);  // odds stay finite
  const double x = log_odds(w) - log_odds(l), d = lambda * sigmoid(-x);
  return {-chosen - lambda * log_sigmoid(x), -1 - d / -std::expm1(w), d / -std::expm1(l), x};
}

struct KtoLoss {
  double loss = 0, dlogp = 0;
};
// KTO (Ethayarajh et al. 2024), of one answer that is good or not, from sums; weight 1 where both
// kinds are equally many. `baseline`: kto_baseline, through which no gradient flows.
//   L = weight (1 - s(x)), x = beta (l - ref - baseline) of a good answer, -x of the other
KtoLoss kto_loss(double logp, double reference, bool good, double baseline, double beta,
                 double weight = 1) {
  const double sign = good ? 1 : -1, s = sigmoid(sign * beta * (logp - reference - baseline));
  return {weight * (1 - s), -sign * beta * weight * s * (1 - s)};
}
// The KL as KTO estimates it, from l - ref of answers to other prompts: their mean, not below 0.
double kto_baseline(std::span<const double> differences) {
  double sum = 0;
  for (const double d : differences) sum += d;
  return sum < 0 ? 0 : sum / std::max(1., double(differences.size()));
}

// --- Measures

// That one of k answers is right, from n of which c are (Chen et al. 2021), k <= n:
//   1 - C(n - c, k) / C(n, k)
double pass_at_k(int n, int c, int k) {
  if (n - c < k) return 1;
  double wrong = 1;
  for (int i = n - c + 1; i <= n; i++) wrong *= 1 - double(k) / i;
  return 1 - wrong;
}

// KL of the best of n samples to one sample, in nats an answer: a bound, reached when no two
// answers have equal rewards (Stiennon et al. 2020; Beirami et al. 2024).
double best_of_n_kl(double n) { return std::log(n) - (n - 1) / n; }

// Gold reward over d = sqrt(KL), from 0 at d = 0 (Gao et al. 2022, Scaling Laws for Reward Model
// Overoptimization).
enum class Pressure {
  best_of_n,  // R = d (alpha - beta d), highest at alpha / (2 beta)
  rl,         // R = d (alpha - beta log d), highest at exp(alpha / beta - 1)
};
struct Overoptimization {
  double alpha = 0, beta = 0;
  double optimum = 0;  // d; infinity where the curve does not fall
  double highest = 0;  // R there
};

double overoptimized(Pressure pressure, double alpha, double beta, double d) {
  if (d == 0) return 0;
  return d * (alpha - beta * (pressure == Pressure::best_of_n ? d : std::log(d)));
}

// Least squares in alpha and beta, of which R is a sum: needs two different d above 0, NaN else.
Overoptimization fit_overoptimization(Pressure pressure, std::span<const double> d,
                                      std::span<const double> R) {
  double aa = 0, ab = 0, bb = 0, ar = 0, br = 0;  // of R = alpha a + beta b
  for (size_t i = 0; i < d.size(); i++) {
    const double a = d[i], b = overoptimized(pressure, 0, 1, d[i]);
    aa += a * a, ab += a * b, bb += b * b, ar += a * R[i], br += b * R[i];
  }
  const double determinant = aa * bb - ab * ab;
  if (!(determinant > 1e-12 * aa * bb)) return {NAN, NAN, NAN, NAN};
  Overoptimization fit{(bb * ar - ab * br) / determinant, (aa * br - ab * ar) / determinant};
  const double ratio = fit.alpha / fit.beta;
  fit.optimum = !(fit.beta > 0)                   ? INFINITY
                : pressure == Pressure::best_of_n ? std::max(0., ratio / 2)
                                                  : std::exp(ratio - 1);
  fit.highest = overoptimized(pressure, fit.alpha, fit.beta, fit.optimum);
  return fit;
}

// =============================================================================================
// What there is to learn from, as ids

// A prompt as ids: a chat up to the header of the assistant's turn, or <|endoftext|> and a text.
std::vector<int> prompt_ids(const Tokenizer& tokenizer, const Conversation& prompt) {
  return render_chat(tokenizer, prompt, true).ids;
}
std::vector<int> prompt_ids(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int> ids = {tokenizer.end_of_text()};
  tokenizer.encode(text, ids);
  return ids;
}

// What a reward model reads: it scores at <|im_end|>, which a text that was cut off has not.
std::vector<int> ending(std::vector<int> ids, int end_of_turn) {
  if (ids.empty() || ids.back() != end_of_turn) ids.push_back(end_of_turn);
  return ids;
}

// Answers to one prompt, each as the ids of the whole: prompt, answer, <|im_end|>. A labelled text
// is a group of its own, of one answer and no prompt.
struct Group {
  std::vector<std::vector<int>> sequences;
  std::vector<std::vector<bool>> written;  // of a chat's ids: by the assistant, not by a tool
  int prompt_length = 0;                   // ids that all begin with
  std::vector<int> ranking;                // of each, 1 best
  std::optional<bool> label;               // of a text
  double chance = 0;                       // that the labellers chose so, where it is known
  uint64_t problem = 0;  // a hash of the prompt: groups of one problem stay together

  int64_t tokens() const {
    int64_t n = 0;
    for (const auto& s : sequences) n += int64_t(s.size());
    return n;
  }
};

// Strings are texts, or with `as_chat` a user's message and the assistant's answer.
Group make_group(const Tokenizer& tokenizer, Preference p, bool as_chat) {
  const int end = end_of_turn(tokenizer);
  if (as_chat && !p.is_chat && !p.label) {
    p.is_chat = true;
    p.prompt.messages = {{"user", p.text, {}}};
    for (const std::string& c : p.continuations) p.answers.push_back({{"assistant", c, {}}});
    p.continuations.clear();
  }
  Group g;
  g.ranking = p.ranking;
  g.label = p.label;
  g.chance = p.chance;
  const std::vector<int> prompt =
      p.is_chat ? prompt_ids(tokenizer, p.prompt) : prompt_ids(tokenizer, p.text);
  if (p.label) {
    g.sequences.push_back(ending(prompt, end));
  } else {
    g.prompt_length = int(prompt.size());
  }
  for (const std::vector<Message>& answer : p.answers) {
    Conversation whole = p.prompt;
    whole.messages.insert(whole.messages.end(), answer.begin(), answer.end());
    Rendered r = render_chat(tokenizer, whole);
    while (r.ids.back() != end) r.ids.pop_back();  // the newline behind the turn
    r.trained.resize(r.ids.size());
    g.sequences.push_back(std::move(r.ids));
    g.written.push_back(std::move(r.trained));
  }
  for (const std::string& text : p.continuations) {
    std::vector<int> ids = prompt;
    tokenizer.encode(text, ids);
    g.sequences.push_back(ending(std::move(ids), end));
  }
  for (const int id : prompt) g.problem = mix64(g.problem ^ uint64_t(id));
  return g;
}

struct GroupReport {
  int64_t read = 0, too_long = 0, all_tied = 0;
  int longest = 0;  // ids
};

// Reads every line; leaves out groups with an answer longer than the context or without a pair.
std::vector<Group> read_groups(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                               int context, bool as_chat, GroupReport& report) {
  std::vector<Group> groups;
  for (const std::string& path : paths) {
    JsonLines lines{Input(path)};
    simdjson::dom::object object;
    int64_t read = 0;
    while (lines.next(object)) {
      read++;
      Group g = make_group(tokenizer, parse_preference(object, lines.where()), as_chat);
      int longest = 0;
      for (const auto& s : g.sequences) longest = std::max(longest, int(s.size()));
      report.longest = std::max(report.longest, longest);
      const bool tied = !g.label && std::set<int>(g.ranking.begin(), g.ranking.end()).size() < 2;
      report.too_long += longest > context;
      report.all_tied += tied;
      if (longest <= context && !tied) groups.push_back(std::move(g));
    }
    if (read == 0) fail(path, ": found no preferences, expected JSON lines");
    report.read += read;
  }
  if (groups.empty()) {
    fail(paths[0], ": found nothing to learn from among ", report.read, " lines: ", report.too_long,
         " longer than the context of ", context, ", ", report.all_tied, " with all answers tied");
  }
  return groups;
}

uint64_t hash_of(std::span<const Group> groups) {  // of everything that decides a run
  uint64_t h = mix64(groups.size());
  for (const Group& g : groups) {
    h = mix64(h ^ uint64_t(g.prompt_length));
    for (const auto& s : g.sequences)
      for (const int id : s) h = mix64(h ^ uint64_t(id));
    for (const int r : g.ranking) h = mix64(h ^ uint64_t(r));
    if (g.label) h = mix64(h ^ (*g.label ? 3u : 5u));
  }
  return h;
}

// =============================================================================================
// Models and batches

// Sequences end to end as the engine takes them: position p of a sequence reads its id p and is to
// predict id p + 1, if that one stands behind the prompt and, where `written` says so, is the
// model's own.
struct Packed {
  std::vector<int> tokens, targets, doc_starts = {0};
  std::vector<int> members;  // the sequences' numbers

  void add(int member, std::span<const int> ids, int prompt_length,
           const std::vector<bool>& written = {}) {
    members.push_back(member);
    for (size_t p = 0; p < ids.size(); p++) {
      tokens.push_back(ids[p]);
      const size_t next = p + 1;
      const bool target =
          next < ids.size() && int(next) >= prompt_length && (written.empty() || written[next]);
      targets.push_back(target ? ids[next] : -1);
    }
    doc_starts.push_back(int(tokens.size()));
  }
  size_t begin(size_t i) const { return size_t(doc_starts[i]); }  // of member i
  size_t last(size_t i) const { return size_t(doc_starts[i + 1]) - 1; }
  Batch batch(float temperature = 1) const { return {tokens, targets, doc_starts, temperature}; }
};

// Micro-batches of at most `tokens`, in order: what goes together depends on the lengths alone. A
// sequence longer than that is one of its own.
std::vector<Packed> pack(std::span<const std::vector<int>> sequences,
                         std::span<const int> prompt_lengths, int64_t tokens) {
  std::vector<Packed> batches;
  for (size_t i = 0; i < sequences.size(); i++) {
    const int64_t n = int64_t(sequences[i].size());
    if (batches.empty() || int64_t(batches.back().tokens.size()) + n > tokens) {
      batches.emplace_back();
    }
    batches.back().add(int(i), sequences[i], prompt_lengths.empty() ? 1 : prompt_lengths[i]);
  }
  return batches;
}

// A model by its SHA-256: it is named with its path, and nothing of it is copied.
std::string model_hash(const std::filesystem::path& dir) {
  if (!has_adapters(dir)) return sha256_of_weights(dir);
  return sha256_of_file(dir / "adapter_model.safetensors") + adapter_base(dir).hash;
}

// A model in `dir` (a run or a model directory) with the head that is asked for.
Config load_config_of(const std::filesystem::path& dir, Head head) {
  const Config config = load_config(dir);
  if (config.head != head) {
    fail(dir.string(), ": found ", architecture_name(config), ", expected a ",
         head == Head::lm ? "language model" : "reward model (...ForSequenceClassification)");
  }
  return config;
}

// A model that gives a whole sequence, which ends at <|im_end|>, one number.
class RewardModel {
 public:
  RewardModel(const std::filesystem::path& path, Device device, int64_t micro_batch = 4096)
      : dir_(model_dir(path)), micro_batch_(micro_batch) {
    const Config config = load_config_of(dir_, Head::scalar);
    shift_ = float(config.reward_shift);
    gpt_ = make_gpt(config, {.device = device,
                             .mode = Mode::inference,
                             .batch_tokens = int(std::max<int64_t>(micro_batch, config.T))});
    load_weights(dir_, *gpt_);
  }

  // r = value + reward_shift, the value after the last id.
  std::vector<float> score(const std::vector<std::vector<int>>& sequences) {
    std::vector<float> rewards(sequences.size());
    for (const auto& s : sequences) {
      if (s.empty() || int(s.size()) > gpt_->config().T) {
        fail(dir_.string(), ": found a sequence of ", s.size(), " tokens to score, expected 1 to ",
             gpt_->config().T, ", the reward model's context");
      }
    }
    for (const Packed& b : pack(sequences, {}, micro_batch_)) {
      const std::vector<int> none(b.tokens.size(), -1);
      gpt_->forward({b.tokens, none, b.doc_starts}, Pass::score);
      const std::span<const float> value = gpt_->value();
      for (size_t i = 0; i < b.members.size(); i++) {
        rewards[size_t(b.members[i])] = value[b.last(i)] + shift_;
      }
    }
    return rewards;
  }

  // Ids mean the same to both, or an Error.
  void check_tokenizer(const Tokenizer& policy, const std::filesystem::path& policy_dir) const {
    const Tokenizer own = Tokenizer::load(dir_);
    if (own.hash() == policy.hash()) return;
    fail(dir_.string(), ": found another vocabulary (", own.vocab_size(), " tokens) than that of ",
         policy_dir.string(), " (", policy.vocab_size(), "), expected the same");
  }
  const std::filesystem::path& dir() const { return dir_; }
  Gpt& gpt() { return *gpt_; }
  bool shifted() const { return shift_ != 0; }
  std::string hash() const { return model_hash(dir_); }

 private:
  std::filesystem::path dir_;
  int64_t micro_batch_;
  float shift_ = 0;
  std::unique_ptr<Gpt> gpt_;
};

// =============================================================================================
// A run of steps

// How a run is watched and kept: changes no update.
struct Watching {
  std::filesystem::path out;
  std::string device = "auto";
  int threads = 0;
  int64_t save_every = 0;
  double save_minutes = 10;
  bool resume = false, overwrite = false;
};

// A run never writes where the model is that it begins with.
void expect_elsewhere(const std::filesystem::path& from, const std::filesystem::path& out) {
  std::error_code ec;
  if (std::filesystem::equivalent(from, out / "model", ec) ||
      std::filesystem::equivalent(from, out, ec)) {
    fail("-o ", out.string(), ": is the model to begin with, expected another directory");
  }
}

// AdamW's: RL uses it for all tensors. `head`: that of a scalar head; 0: as the others.
Rates adamw(double lr, double head = 0, double clip = 1) {
  return {.matrix = lr, .embedding = lr, .head = head > 0 ? head : lr, .vector = lr, .clip = clip};
}

// What all runs share: a directory, a checkpoint from which a run that was killed goes on bit by
// bit as if it had not been, a line of metrics a step, signals. What a step does, and what has to
// be kept of it, is said by those that derive from it.
//
//     DIR/metrics.jsonl   {"step": n, ...}
//     DIR/model/          the policy, trainer_state.json, optimizer.safetensors; more by save_also
//     DIR/summary.json    at the end
class Run {
 public:
  virtual ~Run() = default;

  int run() {  // the process's exit status
    if (!w_.resume && !w_.overwrite) expect_new_run(w_.out);
    prepare();
    if (w_.resume) {
      const std::filesystem::path path = model() / "trainer_state.json";
      const Json state = read_json(path);
      if (json_get<bool>(state, "finished", path.string())) {
        std::printf("%s is finished: %lld steps\n", w_.out.c_str(),
                    (long long)state.at("step").get<int64_t>());
        return 0;
      }
      done_ = state.at("step").get<int64_t>();
      seconds_ = state.at("seconds").get<double>();
      skipped_in_a_row_ = state.at("skipped_in_a_row").get<int>();
      resume(state);
      line_.note(format("resumes after step %lld of %lld", (long long)done_, (long long)steps()));
    } else {
      start();
      if (w_.overwrite) std::filesystem::remove_all(w_.out);
      std::filesystem::create_directories(w_.out);
    }
    check_disk(w_.out, policy().table());
    metrics_.open(w_.out / "metrics.jsonl", done_);
    steps_loop();
    return stop_signal ? 128 + stop_signal : 0;
  }

 protected:
  struct StepResult {
    OrderedJson metrics;   // of the step, without its number
    std::string line;      // for people
    bool skipped = false;  // the gradient was not finite
  };

  Run(std::string stage, Watching watching) : w_(std::move(watching)), stage_(std::move(stage)) {}

  // Reads data and plans; throws before anything is written.
  virtual void prepare() = 0;
  // Makes the models as a fresh run begins with them.
  virtual void start() = 0;
  // Makes the models and counters as DIR/model holds them.
  virtual void resume(const Json& state) = 0;
  virtual int64_t steps() const = 0;
  virtual StepResult step(int64_t number) = 0;
  virtual void before_first_step() {}
  virtual void after_step(int64_t) {}  // evaluation; may set stop_early_
  // The last evaluation; returns what summary.json says. The model is saved behind it.
  virtual OrderedJson finish() = 0;
  virtual Gpt& policy() = 0;
  virtual OrderedJson settings() const = 0;
  virtual OrderedJson state() const = 0;  // what resume() wants back
  virtual void save_also(const std::filesystem::path&, bool /*resumable*/) {
  }                                              // into the checkpoint
  virtual SaveOptions save_options() const = 0;  // tokenizer and base of adapters

  std::filesystem::path model() const { return w_.out / "model"; }

  void save(bool finished) {
    SaveOptions options = save_options();
    options.optimizer = !finished;
    OrderedJson all = {{"stage", stage_},
                       {"finished", finished},
                       {"step", done_},
                       {"seconds", seconds_},
                       {"skipped_in_a_row", skipped_in_a_row_},
                       {"settings", settings()}};
    all.update(state());
    options.trainer_state = Json(all);
    options.also = [this, finished](const std::filesystem::path& dir) {
      save_also(dir, !finished);
    };
    save_checkpoint(model(), policy(), options);
  }
  [[noreturn]] void diverged(const std::string& what, double lr_scale = 1) const {
    fail_diverged(done_, what, lr_scale, model());
  }
  void write_metrics(OrderedJson fields, int64_t number) {
    OrderedJson all = {{"step", number}};
    all.update(fields);
    metrics_.write(all.dump());
  }

  Watching w_;
  std::string stage_;
  int64_t done_ = 0;    // steps
  double seconds_ = 0;  // of the run so far, earlier sittings included
  int skipped_in_a_row_ = 0;
  bool stop_early_ = false;
  ProgressLine line_;

 private:
  void steps_loop() {
    const double began = now() - seconds_;
    double saved = now(), pace = 0;  // pace: seconds a step, smoothed
    if (done_ == 0) before_first_step();
    for (int64_t n = done_ + 1; n <= steps() && !stop_signal && !stop_early_; n++) {
      const double t = now();
      const StepResult r = step(n);
      const double took = now() - t;
      done_ = n;
      pace = pace > 0 ? .95 * pace + .05 * took : took;
      skipped_in_a_row_ = r.skipped ? skipped_in_a_row_ + 1 : 0;
      if (skipped_in_a_row_ >= 3) diverged("three gradients in a row were not finite");
      write_metrics(r.metrics, n);
      const bool last = n == steps();
      line_.show(format("step %lld/%lld  %s  %s left", (long long)n, (long long)steps(),
                        r.line.c_str(), duration_text(pace * double(steps() - n)).c_str()),
                 last);
      after_step(n);
      seconds_ = now() - began;
      const bool due = (w_.save_every > 0 && n % w_.save_every == 0) ||
                       (w_.save_minutes > 0 && now() - saved > 60 * w_.save_minutes);
      if ((due || stop_signal) && !last && !stop_early_) {
        save(false);
        saved = now();
      }
    }
    if (done_ < steps() && !stop_early_) {
      line_.note(format("stopped and saved after step %lld of %lld: go on with --resume",
                        (long long)done_, (long long)steps()));
      return;
    }
    OrderedJson summary = {{"stage", stage_}, {"steps", done_}};
    summary.update(finish());
    seconds_ = now() - began;
    summary["seconds"] = seconds_;
    write_json(w_.out / "summary.json", summary);
    save(true);
    line_.note(concat("model in ", model().string()));
  }

  Metrics metrics_;
};

// The settings that DIR was begun with; those of a resumed run are not asked again.
template <class Settings>
Settings settings_of(const std::filesystem::path& out, const std::string& stage) {
  const auto path = model_dir(out) / "trainer_state.json";
  const Json state = read_json(path);
  const auto found = json_get<std::string>(state, "stage", path.string());
  if (found != stage) {
    fail(path.string(), ": found the state of ", found, ", expected that of ", stage);
  }
  try {
    return state.at("settings").get<Settings>();
  } catch (const Json::exception& e) {
    fail(path.string(), ": settings: ", json_complaint(e));
  }
}

// What runs a subcommand, made by the function that adds its options.
using Command = std::function<int()>;

void add_watching(CLI::App& app, Watching& w) {
  auto* group = app.add_option_group("Watching", "");
  app.add_option("-o,--out", w.out, "the run: DIR/metrics.jsonl, DIR/model, DIR/summary.json");
  app.add_flag("--resume", w.resume, "go on with DIR after its last checkpoint");
  app.add_flag("--overwrite", w.overwrite, "replace DIR");
  group->add_option("--save-every", w.save_every, "steps");
  group->add_option("--save-minutes", w.save_minutes, "default 10");
  group->add_option("--device", w.device, "auto, cpu or cuda");
  group->add_option("--threads", w.threads, "default: the physical cores it may use");
}

// Before anything of a subcommand is made.
void begin(const Watching& w) {
  if (w.out.empty()) fail("-o: missing, expected a directory to write");
  if (w.resume && w.overwrite) fail("--resume and --overwrite: found both, expected one");
  check_device(parse_device(w.device));
  set_threads(w.threads);
  watch_signals();
}

// =============================================================================================
// Runs over answers that were compared: reward models and DPO

// What both choose: data, budget, optimizer. 0 or negative: plan() chooses.
struct GroupSettings {
  std::string model;
  std::vector<std::string> data, val;
  bool as_chat = false;
  int64_t most = 0;                      // prompts to train on; 0: all
  int context = 0, folds = 0, fold = 0;  // fold: 1 to folds, the part that is held out
  double val_fraction = -1, epochs = 0;
  int64_t steps = 0, batch = 0, micro_batch_tokens = 0, groups = 0;  // groups: of the whole run
  int64_t eval_every = 0;
  double lr = 0, head_lr = 0, weight_decay = 0, clip = 1, final_lr = .1;
  std::string schedule = "cosine";
  int64_t warmup = -1;
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(GroupSettings, model, data, val, as_chat, most, context, folds,
                                   fold, val_fraction, epochs, steps, batch, micro_batch_tokens,
                                   groups, eval_every, lr, head_lr, weight_decay, clip, final_lr,
                                   schedule, warmup, seed)

// Which groups a step has: a function of its number and the seed alone. Each epoch goes over all of
// them in an order of its own.
struct Order {
  int64_t size = 0;
  uint64_t seed = 0;

  std::vector<int> slice(int64_t begin, int64_t end) const {  // of the endless list of epochs
    std::vector<int> out, epoch;
    int64_t number = -1;
    for (int64_t i = begin; i < end; i++) {
      if (i / size != number) epoch = shuffled(number = i / size);
      out.push_back(epoch[size_t(i % size)]);
    }
    return out;
  }
  std::vector<int> shuffled(int64_t epoch) const {  // Fisher, Yates
    std::vector<int> order(size_t(size), 0);
    std::iota(order.begin(), order.end(), 0);
    Rng rng{mix64(seed, hash64("order"), uint64_t(epoch))};
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rng.below(i)]);
    return order;
  }
};

// Groups of one problem are held out together, else the held-out ones are known already.
bool is_held_out(const Group& g, const GroupSettings& s) {
  const double u = uniform01(mix64(g.problem, hash64("held out")));
  return s.folds > 0 ? int(u * s.folds) + 1 == s.fold : u < s.val_fraction;
}

// Whole groups, numbers of `all`, in micro-batches of at most `tokens`: the answers of a prompt are
// compared in one. `members` count the sequences of the batch in order.
struct GroupBatch {
  Packed packed;
  std::vector<int> groups;
};
std::vector<GroupBatch> group_batches(std::span<const Group> all, std::span<const int> chosen,
                                      int64_t tokens) {
  std::vector<GroupBatch> batches;
  for (const int g : chosen) {
    const Group& group = all[size_t(g)];
    const bool full =
        !batches.empty() && int64_t(batches.back().packed.tokens.size()) + group.tokens() > tokens;
    if (batches.empty() || full) batches.emplace_back();
    GroupBatch& b = batches.back();
    b.groups.push_back(g);
    for (size_t k = 0; k < group.sequences.size(); k++) {
      b.packed.add(int(b.packed.members.size()), group.sequences[k], group.prompt_length,
                   group.written.empty() ? std::vector<bool>{} : group.written[k]);
    }
  }
  return batches;
}

// A run over groups: reads and divides them, fixes the steps, gives each step its groups.
class GroupRun : public Run {
 protected:
  GroupRun(std::string stage, GroupSettings settings, Watching watching)
      : Run(std::move(stage), std::move(watching)), g_(std::move(settings)) {}

  // The model, the data and the budget; `lr`: what it is by default at 128 channels.
  void read_and_plan(double lr) {
    from_ = model_dir(w_.resume ? w_.out : std::filesystem::path(g_.model));
    if (!w_.resume) expect_elsewhere(from_, w_.out);
    config_ = load_config(from_);
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::load(from_));
    config_.eos = end_of_turn(*tokenizer_);
    if (config_.pad < 0 || config_.pad == config_.eos) config_.pad = tokenizer_->end_of_text();
    read_data();
    plan(lr);
    order_ = {int64_t(train_.size()), g_.seed};
    schedule_ = {g_.schedule, g_.steps, g_.warmup, 1, g_.final_lr};
  }
  void check_data(const Json& state) const {
    if (state.at("data_hash").get<uint64_t>() == hash_of(train_) &&
        state.at("val_hash").get<uint64_t>() == hash_of(val_)) {
      return;
    }
    fail(g_.data[0], ": found other preferences than the run began with, expected the same files");
  }
  OrderedJson data_state() const {
    return {{"data_hash", hash_of(train_)}, {"val_hash", hash_of(val_)}};
  }
  std::vector<int> groups_of_step(int64_t n) const {
    return order_.slice((n - 1) * g_.batch, std::min(n * g_.batch, g_.groups));
  }
  OptimizerStep optimizer_step(int64_t n) const {
    Rates rates = adamw(g_.lr, g_.head_lr, g_.clip);
    rates.weight_decay = g_.weight_decay;
    return rates.at(n, schedule_.at(n));
  }
  int64_t steps() const override { return g_.steps; }
  void before_first_step() override { report(0); }
  void after_step(int64_t n) override {
    if (n % g_.eval_every == 0 && n < steps()) report(n);
  }
  virtual void report(int64_t n) = 0;  // evaluates on the held-out groups, if there are any
  SaveOptions save_options() const override { return {.tokenizer_from = from_}; }
  void print_plan() const {
    std::printf("model   %s: %d layers, %d channels, context %d, %s parameters\n", from_.c_str(),
                config_.L, config_.C, config_.T,
                count_text(double(make_table(config_).parameters())).c_str());
    std::printf("data    %s prompts or texts, held out %s; the longest has %d tokens",
                count_text(double(train_.size())).c_str(), count_text(double(val_.size())).c_str(),
                report_.longest);
    if (report_.too_long > 0) {
      std::printf("; %s dropped, longer than %d", count_text(double(report_.too_long)).c_str(),
                  g_.context);
    }
    if (report_.all_tied > 0) {
      std::printf("; %s dropped, all tied", count_text(double(report_.all_tied)).c_str());
    }
    std::printf("\nbudget  %s steps of %s prompts, %.2f epochs; learning rate %g, %s\n",
                count_text(double(g_.steps)).c_str(), count_text(double(g_.batch)).c_str(),
                double(g_.groups) / double(train_.size()), g_.lr, g_.schedule.c_str());
    std::fflush(stdout);
  }

  GroupSettings g_;
  std::filesystem::path from_;  // the model that is trained, or the checkpoint it goes on from
  Config config_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<Group> train_, val_;
  GroupReport report_;
  Order order_;
  Schedule schedule_;
  std::unique_ptr<Gpt> gpt_;

 private:
  void read_data() {
    if (g_.context == 0) g_.context = config_.T;
    if (g_.context < 2 || g_.context > config_.T) {
      fail("--context: found ", g_.context, ", expected 2 to the model's ", config_.T);
    }
    if (g_.val_fraction < 0) g_.val_fraction = g_.val.empty() ? .1 : 0;
    if (!(g_.val_fraction < 1)) {
      fail("--val-fraction: found ", g_.val_fraction, ", expected 0 or more and less than 1");
    }
    for (Group& g : read_groups(g_.data, *tokenizer_, g_.context, g_.as_chat, report_)) {
      (is_held_out(g, g_) ? val_ : train_).push_back(std::move(g));
    }
    if (!g_.val.empty()) {
      GroupReport of_val;
      for (Group& g : read_groups(g_.val, *tokenizer_, g_.context, g_.as_chat, of_val))
        val_.push_back(std::move(g));
    }
    if (g_.most > 0 && int64_t(train_.size()) > g_.most) train_.resize(size_t(g_.most));
    if (train_.empty()) fail(g_.data[0], ": found all of it held out, expected some to train on");
  }
  void plan(double lr) {
    const auto positive = [](const char* flag, auto found) {
      if (!(found >= 0)) fail(flag, ": found ", found, ", expected above 0");
    };
    positive("--steps", g_.steps), positive("--epochs", g_.epochs);
    positive("--batch", g_.batch), positive("--micro-batch-tokens", g_.micro_batch_tokens);
    positive("--lr", g_.lr), positive("--head-lr", g_.head_lr);
    if (g_.steps > 0 && g_.groups == 0 && g_.epochs > 0) {
      fail("--steps, --epochs: found both, expected one budget");
    }
    if (g_.schedule != "linear" && g_.schedule != "cosine" && g_.schedule != "constant") {
      fail("--schedule: found ", g_.schedule, ", expected linear, cosine or constant");
    }
    if (g_.groups > 0) return;  // resumed: all is fixed
    if (g_.epochs == 0) g_.epochs = 1;
    const auto all = double(train_.size());
    if (g_.batch == 0) g_.batch = std::clamp<int64_t>(int64_t(all * g_.epochs / 40), 8, 64);
    g_.groups =
        g_.steps > 0 ? g_.steps * g_.batch : std::max<int64_t>(1, std::llround(g_.epochs * all));
    g_.steps = (g_.groups + g_.batch - 1) / g_.batch;
    if (g_.micro_batch_tokens == 0) g_.micro_batch_tokens = 4096;
    if (g_.warmup < 0) g_.warmup = std::clamp<int64_t>(g_.steps / 20, 1, 40);
    if (g_.eval_every == 0) g_.eval_every = std::max<int64_t>(1, g_.steps / 5);
    // A model of a million parameters wants hundreds of times what InstructGPT gave billions.
    if (g_.lr == 0) g_.lr = lr * std::min(1., std::pow(128. / config_.C, 2));
  }
};

// =============================================================================================
// The reward model
//
// A language model whose head was exchanged for one row: the score of a conversation is the value
// at its last <|im_end|>. Of two answers to one prompt the better one is to have the higher score
// (Bradley, Terry 1952): L = -log s(r_w - r_l). Only differences are learned; where zero lies and
// how large one is comes from samples of the reference afterwards.

struct RewardSettings {
  GroupSettings groups;
  double margin = 0, centring = 0;
  // Mean 0 and standard deviation 1 on: "training" answers, a file of answers, or "none".
  std::string normalise = "training";
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RewardSettings, groups, margin, centring, normalise)

// How well scores agree with what was preferred. Sums; to be added over groups and folds.
struct Agreement {
  int64_t groups = 0, pairs = 0;  // a labelled text is a pair of its own
  double loss = 0, right = 0, margin = 0;
  double longer = 0;         // pairs that "the longer answer wins" gets right
  double best_possible = 0;  // of who knows each pair's chance: the sum of max(P, 1 - P)
  int64_t known = 0;         // pairs whose chance is known
  bool texts = false;        // labels: no answers whose lengths could be compared
  Calibration calibration;
  std::vector<float> rewards, lengths;  // of every answer

  double accuracy() const { return right / double(std::max<int64_t>(1, pairs)); }
  double longer_wins() const { return longer / double(std::max<int64_t>(1, pairs)); }
  double mean_loss() const { return loss / double(std::max<int64_t>(1, groups)); }
  double mean_margin() const { return margin / double(std::max<int64_t>(1, pairs)); }

  // Rewards of the group's answers; returns the loss and dL/dreward of one of `of` groups.
  RankLoss<float> add(const Group& g, std::span<const float> reward, double margin_wanted,
                      double centring, double scale) {
    RankLoss<float> r;
    if (g.label) {
      const LabelLoss l = label_loss(reward[0], *g.label);
      const double towards = *g.label ? reward[0] : -reward[0];
      r = {scale * l.loss,
           {float(scale * l.dreward)},
           1,
           towards > 0    ? 1.
           : towards == 0 ? .5
                          : 0.,
           towards,
           {}};
      r.calibration.add(towards);
      texts = true;
    } else {
      r = rank_loss(reward, g.ranking, margin_wanted, centring, scale);
      count_longer(g);
    }
    if (g.chance > 0) known++, best_possible += std::max(g.chance, 1 - g.chance);
    groups++;
    pairs += r.pairs, right += r.right, margin += r.margin, loss += r.loss / scale;
    calibration.add(r.calibration);
    for (size_t k = 0; k < g.sequences.size(); k++) {
      rewards.push_back(reward[k]);
      lengths.push_back(float(int(g.sequences[k].size()) - g.prompt_length));
    }
    return r;
  }
  void add(const Agreement& a) {
    groups += a.groups, pairs += a.pairs, loss += a.loss, right += a.right, margin += a.margin;
    longer += a.longer, texts |= a.texts;
    best_possible += a.best_possible, known += a.known;
    calibration.add(a.calibration);
    rewards.insert(rewards.end(), a.rewards.begin(), a.rewards.end());
    lengths.insert(lengths.end(), a.lengths.begin(), a.lengths.end());
  }

 private:
  void count_longer(const Group& g) {
    for (size_t w = 0; w < g.ranking.size(); w++) {
      for (size_t l = 0; l < g.ranking.size(); l++) {
        if (g.ranking[w] >= g.ranking[l]) continue;
        const size_t a = g.sequences[w].size(), b = g.sequences[l].size();
        longer += a > b ? 1 : a == b ? .5 : 0;
      }
    }
  }
};

struct Spread {
  double mean = 0, std = 0;
};
Spread spread_of(std::span<const float> values) {
  Spread s;
  for (const float v : values) s.mean += v / double(values.size());
  for (const float v : values) s.std += (v - s.mean) * (v - s.mean) / double(values.size());
  return {s.mean, std::sqrt(s.std)};
}

// Pearson's; 0 where one of them does not vary. A reward that grows with length is a canary.
double correlation(std::span<const float> a, std::span<const float> b) {
  const Spread sa = spread_of(a), sb = spread_of(b);
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += (a[i] - sa.mean) * (b[i] - sb.mean);
  const double scale = sa.std * sb.std * double(a.size());
  return scale > 0 ? sum / scale : 0;
}

OrderedJson agreement_json(const Agreement& a) {
  OrderedJson bins = OrderedJson::array();
  for (size_t b = 0; b < Calibration::kBins; b++) {
    const double n = double(std::max<int64_t>(1, a.calibration.pairs[b]));
    bins.push_back({{"pairs", a.calibration.pairs[b]},
                    {"predicted", a.calibration.predicted[b] / n},
                    {"right", a.calibration.right[b] / n}});
  }
  OrderedJson json = {{"held_out", a.groups},      {"pairs", a.pairs},
                      {"accuracy", a.accuracy()},  {"loss", a.mean_loss()},
                      {"margin", a.mean_margin()}, {"calibration_error", a.calibration.error()},
                      {"calibration", bins}};
  if (!a.rewards.empty()) {
    json["reward_length_correlation"] = correlation(a.rewards, a.lengths);
  }
  if (!a.texts) json["longer_wins"] = a.longer_wins();
  if (a.known > 0) json["best_possible"] = a.best_possible / double(a.known);
  return json;
}

// And back, but for the rewards of single answers.
Agreement agreement_of(const Json& json) {
  Agreement a;
  a.groups = json.at("held_out").get<int64_t>();
  a.pairs = json.at("pairs").get<int64_t>();
  const auto pairs = double(a.pairs);
  a.right = pairs * json.at("accuracy").get<double>();
  a.loss = double(a.groups) * json.at("loss").get<double>();
  a.margin = pairs * json.at("margin").get<double>();
  a.texts = !json.contains("longer_wins");
  if (!a.texts) a.longer = pairs * json.at("longer_wins").get<double>();
  for (size_t b = 0; b < Calibration::kBins; b++) {
    const Json& bin = json.at("calibration").at(b);
    const auto n = double(a.calibration.pairs[b] = bin.at("pairs").get<int64_t>());
    a.calibration.predicted[b] = n * bin.at("predicted").get<double>();
    a.calibration.right[b] = n * bin.at("right").get<double>();
  }
  return a;
}

// The same for people.
std::string agreement_text(const Agreement& a) {
  std::string text = format("held out: %s %s, accuracy %.1f%%", count_text(double(a.pairs)).c_str(),
                            a.texts ? "texts" : "pairs", 100 * a.accuracy());
  if (!a.texts) text += format(" (the longer wins: %.1f%%)", 100 * a.longer_wins());
  if (a.known > 0) text += format(" of %.1f%% possible", 100 * a.best_possible / double(a.known));
  text += format(", loss %.4f, margin %.3f\n  sure  right  pairs", a.mean_loss(), a.mean_margin());
  for (size_t b = 0; b < Calibration::kBins; b++) {
    if (a.calibration.pairs[b] == 0) continue;
    const double n = double(a.calibration.pairs[b]);
    text += format("\n  %3.0f%%  %4.0f%%  %5.0f", 100 * a.calibration.predicted[b] / n,
                   100 * a.calibration.right[b] / n, n);
  }
  return text;
}

class RewardRun : public GroupRun {
 public:
  RewardRun(RewardSettings settings, Watching watching)
      : GroupRun("reward", settings.groups, std::move(watching)), s_(std::move(settings)) {}

 protected:
  void prepare() override {
    // Measured on the demo's assistant and 1,500 prompts once over: 82 % right, at 5e-4 78 %.
    read_and_plan(2e-3);
    config_.head = Head::scalar;
    if (!(s_.centring >= 0)) fail("--centring: found ", s_.centring, ", expected 0 or more");
    print_plan();
  }
  void start() override {
    read_reference_answers();  // an error in them shows now, not at the end
    make_model(from_);
  }
  void resume(const Json& state) override {
    check_data(state);
    read_reference_answers();
    make_model(model());
    load_trainer_state(model(), *gpt_);
  }
  Gpt& policy() override { return *gpt_; }
  OrderedJson settings() const override {
    RewardSettings s = s_;
    s.groups = g_;
    return Json(s);
  }
  OrderedJson state() const override { return data_state(); }
  void save_also(const std::filesystem::path& dir, bool) override {
    Config c = config_;
    c.reward_shift = shift_;
    write_json(dir / "config.json", config_json(c));
  }

  StepResult step(int64_t n) override;
  OrderedJson finish() override;

 private:
  void make_model(const std::filesystem::path& dir) {
    gpt_ = make_gpt(
        config_, {.device = parse_device(w_.device), .batch_tokens = int(g_.micro_batch_tokens)});
    load_weights(dir, *gpt_, {.new_score = true, .seed = g_.seed});
  }
  Agreement evaluate();
  void report(int64_t n) override {
    if (val_.empty()) return;
    const Agreement a = evaluate();
    write_metrics({{"val_loss", a.mean_loss()},
                   {"val_accuracy", a.accuracy()},
                   {"val_margin", a.mean_margin()},
                   {"val_pairs", a.pairs}},
                  n);
    line_.note(format("step %lld  held-out accuracy %.1f%%, loss %.4f", (long long)n,
                      100 * a.accuracy(), a.mean_loss()));
  }
  void read_reference_answers();
  Spread normalise();

  RewardSettings s_;
  Agreement agreement_;
  std::vector<std::vector<int>> reference_answers_;  // each as the model reads it
  double shift_ = 0;
};

// Scores of a group batch's answers, in order, after a forward pass.
std::vector<float> rewards_of(Gpt& gpt, const GroupBatch& b) {
  const std::span<const float> value = gpt.value();
  std::vector<float> rewards;
  for (size_t i = 0; i < b.packed.members.size(); i++) rewards.push_back(value[b.packed.last(i)]);
  return rewards;
}

Run::StepResult RewardRun::step(int64_t n) {
  const std::vector<int> chosen = groups_of_step(n);
  Agreement seen;
  int64_t tokens = 0;
  for (const GroupBatch& b : group_batches(train_, chosen, g_.micro_batch_tokens)) {
    gpt_->forward(b.packed.batch(), Pass::train);
    const std::vector<float> rewards = rewards_of(*gpt_, b);
    std::vector<float> dvalue(b.packed.tokens.size());
    size_t k = 0;  // answers of the batch so far
    for (const int g : b.groups) {
      const Group& group = train_[size_t(g)];
      const auto of_group = std::span(rewards).subspan(k, group.sequences.size());
      const RankLoss<float> r =
          seen.add(group, of_group, s_.margin, s_.centring, 1 / double(chosen.size()));
      for (const float d : r.dreward) dvalue[b.packed.last(k++)] = d;
    }
    gpt_->backward({}, dvalue);
    tokens += int64_t(b.packed.tokens.size());
  }
  gpt_->update(optimizer_step(n));
  const UpdateStats stats = gpt_->stats();
  if (!std::isfinite(seen.loss)) diverged(format("the loss is %f", seen.mean_loss()));
  const Spread spread = spread_of(seen.rewards);
  return {{{"loss", seen.mean_loss()},
           {"accuracy", seen.accuracy()},
           {"margin", seen.mean_margin()},
           {"reward_mean", spread.mean},
           {"reward_std", spread.std},
           {"grad_norm", stats.grad_norm},
           {"lr_factor", schedule_.at(n)},
           {"tokens", tokens}},
          format("loss %.4f  accuracy %3.0f%%  margin %+.3f  grad %.2f", seen.mean_loss(),
                 100 * seen.accuracy(), seen.mean_margin(), stats.grad_norm),
          stats.skipped};
}

Agreement RewardRun::evaluate() {
  Agreement a;
  std::vector<int> all(val_.size());
  std::iota(all.begin(), all.end(), 0);
  for (const GroupBatch& b : group_batches(val_, all, g_.micro_batch_tokens)) {
    gpt_->forward(b.packed.batch(), Pass::score);
    const std::vector<float> rewards = rewards_of(*gpt_, b);
    size_t k = 0;
    for (const int g : b.groups) {
      const Group& group = val_[size_t(g)];
      a.add(group, std::span(rewards).subspan(k, group.sequences.size()), 0, 0, 1);
      k += group.sequences.size();
    }
  }
  return a;
}

// Answers of a file, each as a reward model reads it: conversations, prompts with completions, or
// texts.
std::vector<std::vector<int>> read_answers(const std::string& path, const Tokenizer& tokenizer,
                                           int context) {
  JsonLines lines{Input(path)};
  simdjson::dom::object object;
  std::vector<std::vector<int>> answers;
  const int end = end_of_turn(tokenizer);
  while (lines.next(object)) {
    simdjson::dom::element e;
    std::vector<int> ids;
    if (!object.at_key("messages").get(e)) {
      ids = render_chat(tokenizer, parse_conversation(object, lines.where())).ids;
      while (!ids.empty() && ids.back() != end) ids.pop_back();
    } else if (!object.at_key("completion").get(e)) {
      ids = prompt_ids(tokenizer, std::string(lines.get_string(object, "prompt")));
      tokenizer.encode(lines.get_string(object, "completion"), ids);
    } else {
      ids = prompt_ids(tokenizer, std::string(lines.get_string(object, "text")));
    }
    ids = ending(std::move(ids), end);
    if (int(ids.size()) <= context) answers.push_back(std::move(ids));
  }
  if (answers.empty()) fail(path, ": found no answer within the context of ", context, " tokens");
  return answers;
}

constexpr size_t kReferenceAnswers = 1024;  // the mean is then known to 3 % of the spread

void RewardRun::read_reference_answers() {
  reference_answers_.clear();
  if (s_.normalise == "training") {
    for (const Group& g : train_)
      for (const auto& s : g.sequences)
        if (reference_answers_.size() < kReferenceAnswers) reference_answers_.push_back(s);
  } else if (s_.normalise != "none") {
    reference_answers_ = read_answers(s_.normalise, *tokenizer_, g_.context);
    reference_answers_.resize(std::min(reference_answers_.size(), kReferenceAnswers));
  }
}

// Mean 0 and standard deviation 1 on the reference answers: r = value / std - mean / std. The scale
// goes into the row of weights, the shift beside the model. Returns what they were.
Spread RewardRun::normalise() {
  if (reference_answers_.empty()) return {0, 1};
  std::vector<float> scores;
  for (const Packed& b : pack(reference_answers_, {}, g_.micro_batch_tokens)) {
    gpt_->forward(b.batch(), Pass::score);
    for (size_t i = 0; i < b.members.size(); i++) scores.push_back(gpt_->value()[b.last(i)]);
  }
  const Spread spread = spread_of(scores);
  if (!(spread.std > 1e-6)) {
    fail("the reward model gives all ", scores.size(), " reference answers the score ", spread.mean,
         ", expected some spread: --normalise-on none keeps it as it is");
  }
  const int score = gpt_->table().find("score");
  std::vector<float> row(size_t(config_.C));
  gpt_->read(score, Slot::weight, row);
  for (float& w : row) w = float(w / spread.std);
  gpt_->write(score, Slot::weight, row);
  shift_ = -spread.mean / spread.std;
  return spread;
}

OrderedJson RewardRun::finish() {
  OrderedJson summary = {{"prompts", int64_t(train_.size())},
                         {"epochs", double(g_.groups) / double(train_.size())}};
  if (!val_.empty()) {
    agreement_ = evaluate();
    OrderedJson json = agreement_json(agreement_);
    write_metrics({{"final", true},
                   {"val_loss", agreement_.mean_loss()},
                   {"val_accuracy", agreement_.accuracy()}},
                  done_);
    summary.update(json);
    line_.note(agreement_text(agreement_));
  }
  const Spread was = normalise();
  summary["normalised_from"] = {{"mean", was.mean}, {"std", was.std}};
  return summary;
}

// Cross-validation: a run for each fold, whose problems it has not seen; their agreement together
// is that on all of the data. DIR/fold-1 and on hold the runs, DIR/summary.json the whole.
int run_folds(const RewardSettings& settings, const Watching& watching) {
  const std::filesystem::path out = watching.out;
  expect_elsewhere(model_dir(settings.groups.model), out);
  if (!watching.resume && !watching.overwrite) expect_new_run(out);
  if (watching.overwrite) std::filesystem::remove_all(out);
  std::filesystem::create_directories(out);
  Agreement all;
  OrderedJson folds = OrderedJson::array();
  for (int fold = 1; fold <= settings.groups.folds; fold++) {
    Watching w = watching;
    w.out = out / concat("fold-", fold);
    w.overwrite = false;
    w.resume = std::filesystem::exists(w.out / "model/trainer_state.json");
    RewardSettings s = settings;
    s.groups.fold = fold;
    if (w.resume)
      s = settings_of<RewardSettings>(w.out, "reward");
    else
      std::filesystem::remove_all(w.out);
    std::printf("fold %d of %d\n", fold, settings.groups.folds);
    RewardRun run(s, w);
    if (const int status = run.run()) return status;
    const Json of_fold = read_json(w.out / "summary.json");
    if (!of_fold.contains("accuracy")) fail(w.out.string(), ": found nothing held out");
    folds.push_back(of_fold.at("accuracy").get<double>());
    all.add(agreement_of(of_fold));
  }
  OrderedJson summary = {{"stage", "reward"}, {"folds", folds}};
  summary.update(agreement_json(all));
  write_json(out / "summary.json", summary);
  std::printf("all folds\n%s\n", agreement_text(all).c_str());
  return 0;
}

// =============================================================================================
// DPO: the policy learns from comparisons directly
//
// How much more likely the policy makes an answer than its beginning did is a reward (Rafailov et
// al. 2023), r = beta (l - l_ref), l the sum over the answer's tokens: the reward model's loss on
// it needs no reward model. l_ref never changes: it is found once, before the first step.

struct DpoSettings {
  GroupSettings groups;
  std::string loss = "dpo", reference;  // the reference: by default the model itself
  double beta = .1, smoothing = 0;
  int lora = 0;
  double lora_alpha = 32;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(DpoSettings, groups, loss, reference, beta, smoothing, lora,
                                   lora_alpha)

// An answer under a model: the sum of its tokens' log-probabilities, and how many they are.
struct AnswerLogp {
  double sum = 0;
  int tokens = 0;
  double mean() const { return tokens > 0 ? sum / tokens : 0; }
};

// Of every answer of a batch, after a forward pass.
std::vector<AnswerLogp> answer_logps(Gpt& gpt, const Packed& b) {
  const std::span<const float> logp = gpt.logp();
  std::vector<AnswerLogp> answers(b.members.size());
  for (size_t i = 0; i < answers.size(); i++) {
    for (size_t p = b.begin(i); p <= b.last(i); p++) {
      if (b.targets[p] < 0) continue;
      answers[i].sum += logp[p];
      answers[i].tokens++;
    }
  }
  return answers;
}

// What preferences make of a policy. Sums over pairs, of which each group's have weight 1 together.
struct DpoSeen {
  double groups = 0, loss = 0, right = 0, margin = 0;
  double chosen = 0, rejected = 0;                // log-probabilities of answers
  double chosen_reward = 0, rejected_reward = 0;  // beta (l - l_ref)

  OrderedJson json(const std::string& prefix = "") const {
    const double n = std::max(1., groups);
    return {{prefix + "loss", loss / n},
            {prefix + "accuracy", right / n},
            {prefix + "margin", margin / n},
            {prefix + "logp_chosen", chosen / n},
            {prefix + "logp_rejected", rejected / n},
            {prefix + "reward_chosen", chosen_reward / n},
            {prefix + "reward_rejected", rejected_reward / n}};
  }
  std::string text() const {
    const double n = std::max(1., groups);
    return format("loss %.4f  accuracy %3.0f%%  log p chosen %.1f (%+.2f)  rejected %.1f (%+.2f)",
                  loss / n, 100 * right / n, chosen / n, chosen_reward / n, rejected / n,
                  rejected_reward / n);
  }
};

class DpoRun : public GroupRun {
 public:
  DpoRun(DpoSettings settings, Watching watching)
      : GroupRun("dpo", settings.groups, std::move(watching)), s_(std::move(settings)) {}

 protected:
  void prepare() override;
  void start() override;
  void resume(const Json& state) override;
  Gpt& policy() override { return *gpt_; }
  OrderedJson settings() const override {
    DpoSettings s = s_;
    s.groups = g_;
    return Json(s);
  }
  OrderedJson state() const override {
    OrderedJson json = data_state();
    json["reference"] = {{"path", reference_.string()}, {"hash", reference_hash_}};
    return json;
  }
  SaveOptions save_options() const override {
    SaveOptions o;
    o.tokenizer_from = from_;
    o.base = base_;
    return o;
  }
  StepResult step(int64_t n) override;
  OrderedJson finish() override;

 private:
  struct References {                              // of each group
    std::vector<std::vector<AnswerLogp>> answers;  // of each answer
    std::vector<AnswerLogp> mismatched;            // KTO: of another prompt's answer
  };

  void make_model(const std::filesystem::path& dir);
  References score_references(Gpt& gpt, std::span<const Group> groups) const;
  void load_references();
  std::vector<int> mismatched(std::span<const Group> groups, size_t i) const;
  double baseline(std::span<const Group> groups, const References& refs,
                  std::span<const int> chosen);
  DpoSeen pass(std::span<const Group> groups, const References& refs, std::span<const int> chosen,
               bool train);
  std::vector<double> judge(const Group& g, std::span<const AnswerLogp> now,
                            std::span<const AnswerLogp> ref, double kto_baseline, double scale,
                            DpoSeen& seen) const;
  void report(int64_t n) override {
    if (val_.empty()) return;
    std::vector<int> all(val_.size());
    std::iota(all.begin(), all.end(), 0);
    const DpoSeen seen = pass(val_, val_refs_, all, false);
    write_metrics(seen.json("val_"), n);
    line_.note(format("step %lld  held out: %s", (long long)n, seen.text().c_str()));
    last_val_ = seen;
  }

  DpoSettings s_;
  std::filesystem::path reference_;
  std::string reference_hash_;
  AdapterBase base_;
  References train_refs_, val_refs_;
  DpoSeen last_val_;
};

void DpoRun::prepare() {
  if (s_.loss != "dpo" && s_.loss != "ipo" && s_.loss != "kto" && s_.loss != "orpo") {
    fail("--loss: found ", s_.loss, ", expected dpo, ipo, kto or orpo");
  }
  if (!(s_.beta > 0)) fail("--beta: found ", s_.beta, ", expected above 0");
  if (!(s_.smoothing >= 0 && s_.smoothing < .5)) {
    fail("--label-smoothing: found ", s_.smoothing, ", expected 0 or more and less than .5");
  }
  if (s_.smoothing > 0 && s_.loss != "dpo") {
    fail("--label-smoothing: found with --loss ", s_.loss, ", expected dpo");
  }
  if (s_.lora < 0) fail("--lora: found ", s_.lora, ", expected a rank");
  if (s_.lora > 0 && !s_.reference.empty()) {
    fail("--reference: found with --lora, whose reference is the model without its adapters");
  }
  read_and_plan(s_.lora > 0 ? 1e-3 : 1e-4);
  if (config_.head != Head::lm) {
    fail(from_.string(), ": has a scalar head, expected a language model");
  }
  for (const auto* groups : {&train_, &val_}) {
    for (const Group& g : *groups) {
      if (g.label) fail(g_.data[0], ": found a labelled text, expected answers that are compared");
    }
  }
  reference_ = model_dir(s_.reference.empty() ? s_.groups.model : s_.reference);
  reference_hash_ = model_hash(reference_);
  print_plan();
}

void DpoRun::make_model(const std::filesystem::path& dir) {
  GptOptions o{.device = parse_device(w_.device), .batch_tokens = int(g_.micro_batch_tokens)};
  if (s_.lora > 0) o.lora = {s_.lora, float(s_.lora_alpha)};
  gpt_ = make_gpt(config_, o);
  load_weights(dir, *gpt_, {.seed = g_.seed});
  if (s_.lora > 0) base_ = adapter_base(dir);
}

void DpoRun::start() {
  make_model(from_);
  load_references();
}

void DpoRun::resume(const Json& state) {
  check_data(state);
  const auto hash = state.at("reference").at("hash").get<std::string>();
  if (hash != reference_hash_) {
    fail(reference_.string(), ": found a model of hash ", reference_hash_, ", expected ", hash,
         ", that of the run's beginning: it has changed");
  }
  make_model(model());
  load_trainer_state(model(), *gpt_);
  load_references();
}

// The prompt of group i with the next group's first answer: what KTO takes for any answer.
std::vector<int> DpoRun::mismatched(std::span<const Group> groups, size_t i) const {
  const Group &own = groups[i], &other = groups[(i + 1) % groups.size()];
  const auto &a = own.sequences[0], &b = other.sequences[0];
  std::vector<int> ids(a.begin(), a.begin() + own.prompt_length);
  ids.insert(ids.end(), b.begin() + other.prompt_length, b.end());
  ids.resize(std::min(ids.size(), size_t(g_.context)));
  return ids;
}

DpoRun::References DpoRun::score_references(Gpt& gpt, std::span<const Group> groups) const {
  References refs;
  refs.answers.resize(groups.size());
  std::vector<int> all(groups.size());
  std::iota(all.begin(), all.end(), 0);
  for (const GroupBatch& b : group_batches(groups, all, g_.micro_batch_tokens)) {
    gpt.forward(b.packed.batch(), Pass::score);
    const std::vector<AnswerLogp> found = answer_logps(gpt, b.packed);
    size_t k = 0;
    for (const int g : b.groups) {
      for (size_t j = 0; j < groups[size_t(g)].sequences.size(); j++) {
        refs.answers[size_t(g)].push_back(found[k++]);
      }
    }
  }
  if (s_.loss != "kto") return refs;
  for (size_t i = 0; i < groups.size(); i++) {
    Packed one;
    one.add(0, mismatched(groups, i), groups[i].prompt_length);
    gpt.forward(one.batch(), Pass::score);
    refs.mismatched.push_back(answer_logps(gpt, one)[0]);
  }
  return refs;
}

// With adapters, the reference is the policy without them; else a model of its own for as long as
// this takes.
void DpoRun::load_references() {
  if (s_.loss == "orpo") return;  // asks for none
  std::unique_ptr<Gpt> own;
  if (s_.lora == 0) {
    own = make_gpt(load_config_of(reference_, Head::lm),
                   {.device = parse_device(w_.device), .mode = Mode::inference});
    load_weights(reference_, *own);
  } else {
    gpt_->use_adapters(false);
  }
  Gpt& reference = own ? *own : *gpt_;
  train_refs_ = score_references(reference, train_);
  if (!val_.empty()) val_refs_ = score_references(reference, val_);
  if (s_.lora > 0) gpt_->use_adapters(true);
}

// KTO's estimate of the KL, from these groups.
double DpoRun::baseline(std::span<const Group> groups, const References& refs,
                        std::span<const int> chosen) {
  if (s_.loss != "kto") return 0;
  std::vector<double> differences;
  for (const int g : chosen) {
    Packed one;
    one.add(0, mismatched(groups, size_t(g)), groups[size_t(g)].prompt_length);
    gpt_->forward(one.batch(), Pass::score);
    differences.push_back(answer_logps(*gpt_, one)[0].sum - refs.mismatched[size_t(g)].sum);
  }
  return kto_baseline(differences);
}

// The loss of a group, the mean over its pairs, and dL/dlogp of each answer's tokens.
std::vector<double> DpoRun::judge(const Group& g, std::span<const AnswerLogp> now,
                                  std::span<const AnswerLogp> ref, double kto_baseline,
                                  double scale, DpoSeen& seen) const {
  const bool means = s_.loss == "ipo" || s_.loss == "orpo";
  const auto value = [means](const AnswerLogp& a) { return means ? a.mean() : a.sum; };
  const auto reference = [&](size_t k) { return ref.empty() ? AnswerLogp{} : ref[k]; };
  const size_t K = g.sequences.size();
  double pairs = 0;
  for (size_t w = 0; w < K; w++)
    for (size_t l = 0; l < K; l++) pairs += g.ranking[w] < g.ranking[l];
  std::vector<double> d(K);
  for (size_t w = 0; w < K; w++) {
    for (size_t l = 0; l < K; l++) {
      if (g.ranking[w] >= g.ranking[l]) continue;
      const double cw = value(now[w]), cl = value(now[l]);
      const double rw = value(reference(w)), rl = value(reference(l));
      PairLoss p;
      if (s_.loss == "dpo") {
        p = dpo_loss(cw, cl, rw, rl, s_.beta, s_.smoothing);
      } else if (s_.loss == "ipo") {
        p = ipo_loss(cw, cl, rw, rl, s_.beta);
      } else if (s_.loss == "orpo") {
        p = orpo_loss(cw, cl, s_.beta);
      } else {
        const KtoLoss good = kto_loss(cw, rw, true, kto_baseline, s_.beta);
        const KtoLoss bad = kto_loss(cl, rl, false, kto_baseline, s_.beta);
        p = {(good.loss + bad.loss) / 2, good.dlogp / 2, bad.dlogp / 2,
             s_.beta * ((cw - rw) - (cl - rl))};
      }
      d[w] += scale / pairs * p.dchosen / (means ? now[w].tokens : 1);
      d[l] += scale / pairs * p.drejected / (means ? now[l].tokens : 1);
      seen.loss += p.loss / pairs;
      seen.margin += p.margin / pairs;
      seen.right += (p.margin > 0 ? 1 : p.margin == 0 ? .5 : 0) / pairs;
      seen.chosen += now[w].sum / pairs, seen.rejected += now[l].sum / pairs;
      if (ref.empty()) continue;
      seen.chosen_reward += s_.beta * (now[w].sum - ref[w].sum) / pairs;
      seen.rejected_reward += s_.beta * (now[l].sum - ref[l].sum) / pairs;
    }
  }
  seen.groups++;
  return d;
}

// Goes over the chosen groups; `train` adds their gradients.
DpoSeen DpoRun::pass(std::span<const Group> groups, const References& refs,
                     std::span<const int> chosen, bool train) {
  DpoSeen seen;
  const double kl = baseline(groups, refs, chosen);
  for (const GroupBatch& b : group_batches(groups, chosen, g_.micro_batch_tokens)) {
    gpt_->forward(b.packed.batch(), train ? Pass::train : Pass::score);
    const std::vector<AnswerLogp> now = answer_logps(*gpt_, b.packed);
    std::vector<float> dlogp(b.packed.tokens.size());
    size_t k = 0;  // answers of the batch so far
    for (const int i : b.groups) {
      const Group& g = groups[size_t(i)];
      const auto of_group = std::span(now).subspan(k, g.sequences.size());
      std::span<const AnswerLogp> ref;
      if (!refs.answers.empty()) ref = refs.answers[size_t(i)];
      for (const double d : judge(g, of_group, ref, kl, 1. / double(chosen.size()), seen)) {
        for (size_t p = b.packed.begin(k); p <= b.packed.last(k); p++) {
          if (b.packed.targets[p] >= 0) dlogp[p] = float(d);
        }
        k++;
      }
    }
    if (train) gpt_->backward(dlogp);
  }
  return seen;
}

Run::StepResult DpoRun::step(int64_t n) {
  const DpoSeen seen = pass(train_, train_refs_, groups_of_step(n), true);
  gpt_->update(optimizer_step(n));
  const UpdateStats stats = gpt_->stats();
  if (!std::isfinite(seen.loss)) diverged(format("the loss is %f", seen.loss));
  OrderedJson metrics = seen.json();
  metrics.update({{"grad_norm", stats.grad_norm}, {"lr_factor", schedule_.at(n)}});
  return {metrics, seen.text() + format("  grad %.2f", stats.grad_norm), stats.skipped};
}

OrderedJson DpoRun::finish() {
  report(done_);
  OrderedJson summary = {{"loss_is", s_.loss},
                         {"prompts", int64_t(train_.size())},
                         {"held_out", int64_t(val_.size())},
                         {"epochs", double(g_.groups) / double(train_.size())}};
  if (!val_.empty()) summary.update(last_val_.json("val_"));
  return summary;
}

// =============================================================================================
// Learning from rollouts: PPO and GRPO
//
//     prompts -> rollouts -> rewards -> an advantage for each sampled token             (a step)
//         -> minibatches: forward -> ratio to what was sampled from -> loss -> backward -> update
//
// The two differ in where an advantage comes from. PPO asks a critic what was to be expected after
// each token, and spreads what came instead over the tokens (GAE). GRPO compares the rollouts of
// one prompt with each other. All else is one and the same code.

// ---------------------------------------------------------------------------------------------
// Prompts and problems

struct Prompt : Problem {  // question: as a person or a verifier reads it
  std::vector<int> ids;    // up to where the answer begins
  bool raw = false;        // a text to go on with, not a chat
  bool tools = false;      // calls are run
};

struct PromptOptions {
  std::string form;                // a text with {question} in place of the chat template
  std::vector<std::string> tools;  // declared to every question, as JSON
};

// {"question", "answer"}, {"messages"}, or {"prompt"}: a string (a text to go on with) or messages.
Prompt parse_prompt(simdjson::dom::object object, const std::string& where,
                    const Tokenizer& tokenizer, const PromptOptions& options) {
  simdjson::dom::element e;
  const auto has = [&](const char* key) { return !object.at_key(key).get(e); };
  const auto string_of = [&](const char* key) {
    std::string_view text;
    if (!has(key) || e.get(text)) fail(where, ": ", key, ": expected a string");
    return std::string(text);
  };
  Prompt p;
  p.line = Json::parse(simdjson::minify(object)), p.where = where;
  if (has("answer")) p.answer = e.is_string() ? string_of("answer") : simdjson::minify(e);
  if (has("rubric")) p.rubric = parse_rubric(p.line.at("rubric"), where + ": rubric");
  Conversation chat;
  if (has("question")) {
    p.question = string_of("question");
    if (p.question.empty()) fail(where, ": question: found nothing, expected text");
    chat = {{{"user", p.question, {}}}, options.tools};
  } else if (has("messages")) {
    chat = parse_conversation(object, where);
  } else if (has("prompt") && e.is_string()) {
    p.question = string_of("prompt"), p.raw = true;
  } else if (has("prompt")) {
    chat.messages = preferences::messages_of(e, where + ": prompt");
  } else {
    fail(where, ": found neither \"question\", \"messages\" nor \"prompt\"");
  }
  if (!options.form.empty()) {
    std::string text = form_text(options.form);
    const size_t at = text.find("{question}");
    if (at == std::string::npos) fail("--form: found no {question} in it");
    if (p.question.empty()) p.question = chat.messages.back().content;
    p.ids = prompt_ids(tokenizer, text.replace(at, 10, p.question));
    p.raw = true;
  } else if (p.raw) {
    p.ids = prompt_ids(tokenizer, p.question);
  } else {
    check_conversation(chat, where, true);
    if (p.question.empty()) p.question = chat.messages.back().content;
    p.tools = !chat.tools.empty();
    p.ids = prompt_ids(tokenizer, chat);
  }
  return p;
}

// Of every line, but those that leave no room for an answer of `max_new` ids within the context.
std::vector<Prompt> read_prompts(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                                 const PromptOptions& options, int context, int max_new) {
  std::vector<Prompt> prompts;
  int64_t read = 0;
  for (const std::string& path : paths) {
    JsonLines lines{Input(path)};
    simdjson::dom::object object;
    while (lines.next(object)) {
      read++;
      prompts.push_back(parse_prompt(object, lines.where(), tokenizer, options));
      if (int(prompts.back().ids.size()) + max_new > context) prompts.pop_back();
    }
  }
  if (prompts.empty()) {
    fail(paths.at(0), ": found no prompt that leaves room for ", max_new,
         " tokens within the context of ", context, ", among ", read, " lines");
  }
  return prompts;
}

// ---------------------------------------------------------------------------------------------
// Rollouts

// A prompt and what followed it. Actions are the A ids that the model sampled; ids that a tool
// inserted stand between them, are read as any other, and are never learned from: they have neither
// log-probability, nor advantage, nor weight.
struct Rollout {
  const Prompt* prompt = nullptr;
  int group = 0;               // rollouts of one prompt, in one step
  std::vector<int> ids;        // prompt, sampled, inserted
  std::vector<int> actions;    // (A) places in ids
  std::string text;            // of the last turn
  bool ended = false;          // not cut off
  std::vector<float> rewards;  // of each reward function; NaN where it failed
  double reward = 0;           // what is learned from

  std::vector<float> sampled_logp;  // (A) as the generator found it
  std::vector<float> old_logp;      // (A) of the policy that sampled it, by the forward pass
  std::vector<float> ref_logp;      // (A) of the reference
  std::vector<float> value;         // (A) of the critic, before each action
  std::vector<float> advantage;     // (A)
  std::vector<float> returns;       // (A) what the value should have been
  float weight = 0;                 // of each action in the loss: the mask and the 1/N of a mean

  int length() const { return int(actions.size()); }
  bool failed() const { return !std::isfinite(reward); }
  // Nats an answer, by k1. The generator's log-probabilities serve where the forward pass has not
  // given its own.
  double kl() const {
    const std::vector<float>& logp = old_logp.empty() ? sampled_logp : old_logp;
    double sum = 0;
    for (size_t a = 0; a < ref_logp.size(); a++) sum += double(logp[a]) - ref_logp[a];
    return sum;
  }
};

struct RolloutOptions {
  int max_new = 128, rows = 64;
  int tool_tokens = 256;  // ids that tools may insert in a rollout
  float temperature = 1;
  std::vector<std::string> stops;  // strings that end a raw text's continuation; none: fixed length
  const Search* search = nullptr;  // for the search tool
  int64_t cache_bytes = int64_t(2) << 30;
};

Request rollout_request(const Prompt& p, const Tokenizer& tokenizer, const RolloutOptions& o,
                        uint64_t seed, int context) {
  Request r{.prompt = p.ids, .max_new = std::min(o.max_new, context - int(p.ids.size()))};
  r.sampling.temperature = o.temperature;  // and nothing else: what is scored is what is sampled
  r.sampling.seed = seed;
  if (!p.raw) {
    r.stop_ids = {end_of_turn(tokenizer)};
    if (tokenizer.special("<|endoftext|>") >= 0) r.stop_ids.push_back(tokenizer.end_of_text());
  } else if (!o.stops.empty()) {
    r.stop_ids = {tokenizer.end_of_text()};
    r.stop_strings = o.stops;
  }
  if (p.tools) {
    r.max_inserted = o.tool_tokens;
    r.on_turn = [&tokenizer, &o](int, std::span<const int> turn) {
      return answer_calls(tokenizer, read_turn(tokenizer, turn), o.search);
    };
  }
  return r;
}

Rollout make_rollout(const Prompt& p, int group, Completion c, const Tokenizer& tokenizer,
                     const RolloutOptions& o) {
  Rollout r{.prompt = &p, .group = group, .ids = p.ids, .text = std::move(c.text)};
  for (size_t i = 0; i < c.ids.size(); i++) {
    if (!c.sampled[i]) continue;
    r.actions.push_back(int(p.ids.size() + i));
    r.sampled_logp.push_back(c.logp[i]);
  }
  r.ids.insert(r.ids.end(), c.ids.begin(), c.ids.end());
  const bool stopped = c.finish == Finish::stop_token || c.finish == Finish::stop_string;
  r.ended = p.raw ? stopped || o.stops.empty() : stopped && r.ids.back() == end_of_turn(tokenizer);
  return r;
}

// `copies` rollouts of each prompt, prompt after prompt. A draw is a function of (seed, the
// prompt's place, the copy, the position) alone.
std::vector<Rollout> roll_out(Gpt& gpt, const Tokenizer& tokenizer,
                              std::span<const Prompt* const> prompts, int copies,
                              const RolloutOptions& o, uint64_t seed) {
  const int T = gpt.config().T;
  int64_t longest = 1;
  for (const Prompt* p : prompts) {
    longest =
        std::max(longest, int64_t(p->ids.size()) + o.max_new + (p->tools ? o.tool_tokens : 0));
  }
  GeneratorOptions options{.rows = std::min(o.rows, int(prompts.size()) * copies)};
  options.cache_positions = cache_positions(gpt.config(), options.rows, longest, o.cache_bytes);
  Generator generator(
      gpt, [&](int id) { return tokenizer.token_bytes(id); }, options);
  for (size_t i = 0; i < prompts.size(); i++) {
    for (int k = 0; k < copies; k++) {
      generator.submit(rollout_request(*prompts[i], tokenizer, o, mix64(seed, i, uint64_t(k)), T));
    }
  }
  generator.run();
  std::vector<Rollout> rollouts;
  for (int n = 0; n < int(prompts.size()) * copies; n++) {
    rollouts.push_back(
        make_rollout(*prompts[size_t(n / copies)], n / copies, generator.pop(n), tokenizer, o));
  }
  return rollouts;
}

// Rollouts end to end as the engine takes them. Position p of one reads its id p; what is asked of
// it is the id p + 1, if the model sampled that. There, logp is that of the action, and value what
// was to be expected before it. The last id is not read: nothing follows.
struct RolloutBatch {
  std::vector<int> tokens, targets, doc_starts = {0};
  std::vector<Rollout*> rollouts;
  std::vector<int> places = {};   // of all actions, in order
  std::vector<int> starts = {0};  // of each rollout's actions among them

  void add(Rollout& r) {
    const int begin = int(tokens.size());
    rollouts.push_back(&r);
    tokens.insert(tokens.end(), r.ids.begin(), r.ids.end() - 1);
    targets.resize(tokens.size(), -1);
    for (const int a : r.actions) {
      places.push_back(begin + a - 1);
      targets[size_t(begin + a) - 1] = r.ids[size_t(a)];
    }
    doc_starts.push_back(int(tokens.size()));
    starts.push_back(int(places.size()));
  }
  Batch batch(float temperature) const { return {tokens, targets, doc_starts, temperature}; }

  // (N) of the engine -> (A) of the batch's actions, and back.
  std::vector<float> gather(std::span<const float> positions) const {
    std::vector<float> out;
    for (const int p : places) out.push_back(positions[size_t(p)]);
    return out;
  }
  std::vector<float> scatter(std::span<const float> actions) const {
    std::vector<float> out(tokens.size(), 0.f);
    for (size_t a = 0; a < places.size(); a++) out[size_t(places[a])] = actions[a];
    return out;
  }
  // What each rollout holds -> (A), and back.
  std::vector<float> joined(std::vector<float> Rollout::*member) const {
    std::vector<float> out;
    for (const Rollout* r : rollouts)
      out.insert(out.end(), (r->*member).begin(), (r->*member).end());
    return out;
  }
  void divide(std::span<const float> actions, std::vector<float> Rollout::*member) const {
    for (size_t i = 0; i < rollouts.size(); i++) {
      (rollouts[i]->*member).assign(actions.begin() + starts[i], actions.begin() + starts[i + 1]);
    }
  }
  std::vector<float> weights() const {
    std::vector<float> out;
    for (const Rollout* r : rollouts) out.resize(out.size() + r->actions.size(), r->weight);
    return out;
  }
};

// Micro-batches of at most `tokens`, in order; a rollout longer than that is one of its own.
std::vector<RolloutBatch> pack_rollouts(std::span<Rollout* const> rollouts, int64_t tokens) {
  std::vector<RolloutBatch> batches;
  for (Rollout* r : rollouts) {
    const int64_t n = int64_t(r->ids.size()) - 1;
    if (batches.empty() || int64_t(batches.back().tokens.size()) + n > tokens) {
      batches.emplace_back();
    }
    batches.back().add(*r);
  }
  return batches;
}

// ---------------------------------------------------------------------------------------------
// Rewards: several functions, each with a weight

// "NAME", "NAME:ARGUMENT", and "WEIGHT*" before either.
struct RewardSpec {
  std::string name, argument;
  double weight = 1;

  std::string label() const {  // in metrics
    return argument.empty() || name == "command" ? name : name + ":" + argument;
  }
};
RewardSpec parse_reward(std::string text) {
  RewardSpec spec;
  if (const size_t star = text.find('*'); star != std::string::npos && star < text.find(':')) {
    const char* end = text.data() + star;
    const auto read = std::from_chars(text.data(), end, spec.weight);
    if (read.ec != std::errc() || read.ptr != end || !std::isfinite(spec.weight)) {
      fail("--reward ", text, ": found weight \"", text.substr(0, star), "\", expected a number");
    }
    text.erase(0, star + 1);
  }
  const size_t colon = text.find(':');
  spec.name = text.substr(0, colon);
  if (colon != std::string::npos) spec.argument = text.substr(colon + 1);
  return spec;
}

struct RewardFunction {
  RewardSpec spec;
  bool verifies = false;  // 1 is right, 0 wrong: what pass@k counts
  std::function<std::vector<float>(std::span<const Rollout>)> rewards;  // NaN: failed
};

// A function of one rollout as one of many.
template <class OfOne>
auto for_each_rollout(OfOne of_one) {
  return [of_one](std::span<const Rollout> rollouts) {
    std::vector<float> out;
    for (const Rollout& r : rollouts) out.push_back(float(of_one(r)));
    return out;
  };
}

struct RewardContext {
  const Tokenizer& tokenizer;
  std::filesystem::path policy_dir;
  int max_new;
  Device device;
  CommandLimits limits;
};

// What a reward model reads of a rollout, within its context.
std::vector<int> ids_to_judge(const Rollout& r, int end, int context) {
  std::vector<int> ids = ending(r.ids, end);
  if (int(ids.size()) > context) ids.resize(size_t(context)), ids.back() = end;
  return ids;
}

// `models`: every reward model that is loaded, for the checkpoint to name.
RewardFunction make_reward(const RewardSpec& spec, const RewardContext& context,
                           std::vector<std::shared_ptr<RewardModel>>& models) {
  if (const auto v = make_verifier(spec.name, spec.argument, context.limits)) {
    return {spec, v->is_pass_fail, [score = v->score](std::span<const Rollout> rollouts) {
              std::vector<Attempt> attempts;
              for (const Rollout& r : rollouts) attempts.push_back({r.prompt, r.text, r.ended});
              return score(attempts);
            }};
  }
  const auto need_argument = [&](const char* what) {
    if (spec.argument.empty()) fail("--reward ", spec.name, ": expected ", spec.name, ":", what);
  };
  if (spec.name == "length") {  // 0 up to so many tokens, then down to -1 at the longest (DAPO)
    need_argument("TOKENS that are free");
    const double free = std::atof(spec.argument.c_str()), most = context.max_new;
    if (!(free >= 0 && free < most)) {
      fail("--reward length: found ", spec.argument, ", expected 0 to ", most, " (--max-tokens)");
    }
    return {spec, false, for_each_rollout([free, most](const Rollout& r) {
              return -std::clamp((r.length() - free) / (most - free), 0., 1.);
            })};
  }
  if (spec.name == "ended") {  // 1 for an answer that was not cut off
    return {spec, false, for_each_rollout([](const Rollout& r) { return r.ended; })};
  }
  if (spec.name == "model" || spec.name == "probability") {
    need_argument("DIRECTORY of a reward model");
    const auto model = std::make_shared<RewardModel>(spec.argument, context.device);
    model->check_tokenizer(context.tokenizer, context.policy_dir);
    models.push_back(model);
    const int end = end_of_turn(context.tokenizer), T = model->gpt().config().T;
    // A score is the log-odds of a label unless it was moved to mean 0.
    const bool probability = spec.name == "probability";
    if (probability && model->shifted()) {
      fail("--reward probability: ", spec.argument, ": its scores were normalised, expected ",
           "./rlhf reward --normalise-on none");
    }
    return {spec, false, [model, end, T, probability](std::span<const Rollout> rollouts) {
              std::vector<std::vector<int>> sequences;
              for (const Rollout& r : rollouts) sequences.push_back(ids_to_judge(r, end, T));
              std::vector<float> scores = model->score(sequences);
              if (probability) {
                for (float& x : scores) x = 1 / (1 + std::exp(-x));
              }
              return scores;
            }};
  }
  fail("--reward: found ", spec.name,
       ", expected number, exact, choice, countdown, command:COMMAND, rubric, format:PATTERN, "
       "length:TOKENS, ended, model:DIRECTORY or probability:DIRECTORY");
}

// ---------------------------------------------------------------------------------------------
// The run

// What a run is: every choice that decides its updates.
struct RlSettings {
  bool ppo = false;
  std::string model, critic;
  std::vector<std::string> prompts, val, rewards, tools, stops;
  std::string gold, form, search, ptx;

  int64_t steps = 60;
  int rollouts = 128, group = 8;  // a step's rollouts, of which so many share a prompt
  int max_tokens = 128;
  double temperature = 1;
  std::string truncated = "penalise";
  double truncated_reward = 0;
  double command_seconds = 10, command_memory = 4;  // seconds a line, GB
  int command_processes = 64;
  std::string pass_rate;
  int pass_samples = 8;
  int64_t pass_problems = 0;

  std::string method = "cake";
  int resample = -1;  // rounds of sampling that may replace groups without variance
  int minibatches = 1, epochs = 1;
  double clip_low = .2, clip_high = -1;
  double beta = -1, kl_target = 0, kl_horizon = 10000, kl_budget = 0;
  double entropy = 0;
  double gamma = 1, lambda = .95, value_clip = .2;
  bool whiten_rewards = false;
  int64_t critic_warmup = 0;
  double ptx_weight = 27.8;
  int64_t ptx_tokens = 2048;

  double lr = 0, critic_lr = 0, adam_eps = 1e-8, beta2 = .95, weight_decay = 0, clip_norm = 1;
  std::string schedule = "linear";
  int64_t warmup = 0;
  double warmdown = .5, final_lr = .1;
  int lora = 0;
  double lora_alpha = 32;
  int64_t micro_batch_tokens = 4096;
  int rows = 128;

  int eval_prompts = 0, eval_samples = 8;  // 0: all that are held out
  int eval_some = 0;                       // prompts of an evaluation on the way
  int64_t eval_every = 0;
  std::string keep;
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RlSettings, ppo, model, critic, prompts, val, rewards, tools,
                                   stops, gold, form, search, ptx, steps, rollouts, group,
                                   max_tokens, temperature, truncated, truncated_reward,
                                   command_seconds, command_memory, command_processes, pass_rate,
                                   pass_samples, pass_problems, method, resample, minibatches,
                                   epochs, clip_low, clip_high, beta, kl_target, kl_horizon,
                                   kl_budget, entropy, gamma, lambda, value_clip, whiten_rewards,
                                   critic_warmup, ptx_weight, ptx_tokens, lr, critic_lr, adam_eps,
                                   beta2, weight_decay, clip_norm, schedule, warmup, warmdown,
                                   final_lr, lora, lora_alpha, micro_batch_tokens, rows,
                                   eval_prompts, eval_samples, eval_some, eval_every, keep, seed)

// Where a step's seconds go.
struct Split {
  double decode = 0, forward = 0, backward = 0, update = 0, rewards = 0, all = 0;

  double other() const { return all - decode - forward - backward - update; }
  std::string text() const {
    const double n = all > 0 ? 100 / all : 0;
    return format("decode %.0f%%, forward %.0f%%, backward %.0f%%, update %.0f%%, other %.0f%%",
                  n * decode, n * forward, n * backward, n * update, n * other());
  }
};
class Timed {  // adds the time it lives
 public:
  explicit Timed(double& sum) : sum_(sum) {}
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;
  ~Timed() { sum_ += now() - begin_; }

 private:
  double& sum_;
  double begin_ = now();
};

struct MeanAndSpread {
  double mean = 0, spread = 0;
  int64_t n = 0;
};
template <class Values>
MeanAndSpread mean_and_spread(const Values& values) {  // of those that are finite
  MeanAndSpread m;
  double squares = 0;
  for (const auto x : values) {
    if (!std::isfinite(x)) continue;
    const double off = double(x) - m.mean;
    m.mean += off / double(++m.n);
    squares += off * (double(x) - m.mean);
  }
  m.spread = m.n > 1 ? std::sqrt(squares / double(m.n - 1)) : 0;
  return m;
}

// What tells of reward hacking before a reward does.
struct Canaries {
  double length = 0, longest = 0;  // tokens sampled: mean, most
  double ended = 0;                // share that was not cut off
  double repetition = 0;   // share of three tokens in a row that came before in the same answer
  double correlation = 0;  // of reward and length
  double entropy = 0;      // nats a token
};
double repetition_of(const Rollout& r) {
  std::set<std::array<int, 3>> seen;
  const std::vector<int>& a = r.actions;
  int n = 0;
  for (size_t i = 0; i + 2 < a.size(); i++, n++) {
    seen.insert({r.ids[size_t(a[i])], r.ids[size_t(a[i + 1])], r.ids[size_t(a[i + 2])]});
  }
  return n > 0 ? 1 - double(seen.size()) / n : 0;
}
Canaries canaries_of(std::span<const Rollout> rollouts) {
  Canaries c;
  const double n = double(std::max<size_t>(1, rollouts.size()));
  std::vector<double> lengths, rewards;
  for (const Rollout& r : rollouts) {
    c.length += r.length();
    c.longest = std::max(c.longest, double(r.length()));
    c.ended += r.ended;
    c.repetition += repetition_of(r);
    if (!r.failed()) lengths.push_back(r.length()), rewards.push_back(r.reward);
  }
  c.length /= n, c.ended /= n, c.repetition /= n;
  const MeanAndSpread x = mean_and_spread(lengths), y = mean_and_spread(rewards);
  double product = 0;
  for (size_t i = 0; i < lengths.size(); i++) {
    product += (lengths[i] - x.mean) * (rewards[i] - y.mean);
  }
  if (x.spread > 0 && y.spread > 0) {
    c.correlation = product / double(lengths.size() - 1) / (x.spread * y.spread);
  }
  return c;
}

// Held-out prompts, answered.
struct HeldOut {
  double pass = 0, pass_k = 0, greedy = 0;  // pass@1 at --temperature, pass@k, greedy's pass@1
  int k = 1;
  int64_t prompts = 0, answers = 0;
  MeanAndSpread reward, gold;  // over prompts, of a prompt's mean
  double kl = 0;               // nats an answer
  Canaries canaries;
};

GroupMethod parse_method(const std::string& name) {
  const std::map<std::string, GroupMethod> methods = {
      {"cake", GroupMethod::cake}, {"grpo", GroupMethod::grpo}, {"dr_grpo", GroupMethod::dr_grpo},
      {"dapo", GroupMethod::dapo}, {"rloo", GroupMethod::rloo}, {"gspo", GroupMethod::gspo}};
  const auto it = methods.find(name);
  if (it == methods.end()) {
    fail("--method: found ", name, ", expected cake, grpo, dr_grpo, dapo, rloo or gspo");
  }
  return it->second;
}

class RlRun : public Run {
 public:
  RlRun(RlSettings settings, Watching watching)
      : Run(settings.ppo ? "ppo" : "grpo", std::move(watching)),
        s_(std::move(settings)),
        from_(model_dir(s_.model)),
        config_(load_config_of(from_, Head::lm)),
        tokenizer_(Tokenizer::load(from_)) {}

 protected:
  void prepare() override;
  void start() override;
  void resume(const Json& state) override;
  int64_t steps() const override { return s_.steps; }
  StepResult step(int64_t number) override;
  void before_first_step() override;
  void after_step(int64_t number) override;
  OrderedJson finish() override;
  Gpt& policy() override { return *policy_; }
  OrderedJson settings() const override { return Json(s_); }
  OrderedJson state() const override;
  void save_also(const std::filesystem::path& dir, bool resumable) override;
  SaveOptions save_options() const override {
    SaveOptions o;
    o.tokenizer_from = from_;
    o.base = base_;
    return o;
  }

 private:
  struct UpdateResult {  // sums over the updates of a step
    double loss = 0, value_loss = 0, kl_loss = 0, grad_norm = 0, critic_norm = 0, entropy = 0;
    int64_t updates = 0, critic_updates = 0, actions = 0;
    RatioStats ratios;
    bool skipped = false;
  };
  struct Groups {  // of a step
    int64_t all = 0, without_variance = 0, resampled = 0, failed = 0, truncated = 0;
  };

  void check_settings();
  void make_models(const std::filesystem::path& policy_from);
  void make_critic(const std::filesystem::path& dir);
  void print_plan();
  void filter_problems();
  RolloutOptions rollout_options(double temperature) const;
  std::vector<const Prompt*> next_prompts(int n);
  std::vector<Rollout> collect(int64_t number, Groups& groups);
  void give_rewards(std::span<Rollout> rollouts);
  bool left_out(const Rollout& r) const;
  bool varies(std::span<const Rollout> group) const;
  void score(Gpt& gpt, std::span<Rollout* const> rollouts, std::vector<float> Rollout::*out);
  void score_reference(std::span<Rollout* const> rollouts);
  void advantages_by_critic(std::span<Rollout> rollouts);
  void advantages_by_group(std::span<Rollout> rollouts, Groups& groups);
  UpdateResult learn(int64_t number, std::span<Rollout> rollouts);
  void update_policy(int64_t number, std::span<Rollout* const> minibatch, UpdateResult& sum);
  void update_critic(int64_t number, std::span<Rollout* const> minibatch, UpdateResult& sum);
  void add_pretraining_gradient();
  OptimizerStep optimizer_step(int64_t number, double lr) const;
  double mean_kl(std::span<Rollout* const> rollouts) const;
  std::string describe(std::span<const Rollout> rollouts, const Groups& groups,
                       const UpdateResult& u, const MeanAndSpread& reward, double kl,
                       OrderedJson& m) const;
  void check_generator(std::span<Rollout* const> rollouts, OrderedJson& metrics) const;
  HeldOut evaluate(int prompts, int samples);
  void report(const HeldOut& h, int64_t step, const char* when);
  double quality(const HeldOut& h) const;
  void judge(const HeldOut& h, int64_t step);
  void show(std::span<const Rollout> rollouts);
  int copies() const { return s_.ppo ? 1 : s_.group; }
  bool reuses() const { return s_.minibatches * s_.epochs > 1; }
  bool over_budget(double kl) const { return s_.kl_budget > 0 && !(kl <= s_.kl_budget); }

  RlSettings s_;
  std::filesystem::path from_;  // the model that the run began with: the reference
  Config config_;
  Tokenizer tokenizer_;
  GroupMethod method_ = GroupMethod::cake;
  std::vector<Prompt> prompts_, val_;
  std::vector<RewardFunction> rewards_;
  std::optional<RewardFunction> gold_;
  std::vector<std::shared_ptr<RewardModel>> reward_models_;
  std::string reference_hash_;  // these models are named in a checkpoint, never copied
  std::vector<std::string> reward_hashes_;
  std::optional<Search> search_;

  std::unique_ptr<Gpt> policy_, reference_, critic_;  // with adapters no reference of its own
  AdapterBase base_;
  float critic_shift_ = 0;  // of the reward model that the critic began as
  std::unique_ptr<TokenStream> ptx_;
  std::unique_ptr<Loader> ptx_loader_;
  Schedule schedule_;

  std::vector<int> pool_;           // prompts that are trained on
  int64_t epoch_ = 0, cursor_ = 0;  // of the pool's order
  int64_t updates_ = 0;             // of the policy, and of the critic
  int64_t critic_updates_ = 0;
  AdaptiveBeta beta_;
  double best_ = -1e30;
  int64_t best_step_ = -1;
  int equal_in_a_row_ = 0;  // steps in which all rewards were equal
  int64_t failed_ = 0, no_variance_ = 0, groups_ = 0, truncated_ = 0, rollouts_ = 0, tokens_ = 0;
  std::string why_stopped_;
  bool too_far_ = false;  // the KL left its budget
  HeldOut last_held_out_;
  Split split_;  // of this sitting
};

// What the flags left open, and what does not go together.
void RlRun::check_settings() {
  const auto at_least = [](const char* flag, auto found, auto least) {
    if (!(found >= least)) fail(flag, ": found ", found, ", expected at least ", least);
  };
  method_ = parse_method(s_.method);
  at_least("--steps", s_.steps, 1), at_least("--rollouts", s_.rollouts, 1);
  at_least("--max-tokens", s_.max_tokens, 1), at_least("--minibatches", s_.minibatches, 1);
  at_least("--epochs", s_.epochs, 1), at_least("--group", s_.group, s_.ppo ? 1 : 2);
  at_least("--critic-warmup", s_.critic_warmup, 0), at_least("--rows", s_.rows, 1);
  at_least("--kl-budget", s_.kl_budget, 0.), at_least("--kl-target", s_.kl_target, 0.);
  at_least("--eval-samples", s_.eval_samples, 1), at_least("--clip", s_.clip_low, 0.);
  at_least("--lora", s_.lora, 0), at_least("--micro-batch-tokens", s_.micro_batch_tokens, 1);
  if (!(s_.temperature > 0)) {
    fail("--temperature: found ", s_.temperature, ", expected above 0: rollouts are sampled");
  }
  if (!s_.ppo && s_.rollouts % s_.group != 0) {
    fail("--rollouts: found ", s_.rollouts, ", expected a multiple of --group ", s_.group);
  }
  if (s_.truncated != "penalise" && s_.truncated != "mask" && s_.truncated != "keep") {
    fail("--truncated: found ", s_.truncated, ", expected penalise, mask or keep");
  }
  if (s_.keep.empty()) s_.keep = s_.ppo && !s_.val.empty() ? "best" : "last";
  if (s_.keep != "best" && s_.keep != "last") {
    fail("--keep: found ", s_.keep, ", expected best or last");
  }
  if (s_.keep == "best" && s_.val.empty()) fail("--keep best: expected --val FILE to judge by");
  // DAPO: clip-higher, and groups without variance are sampled anew
  if (s_.clip_high < 0) s_.clip_high = method_ == GroupMethod::dapo ? .28 : s_.clip_low;
  if (s_.resample < 0) s_.resample = method_ == GroupMethod::dapo ? 3 : 0;
  if (s_.beta < 0) s_.beta = s_.ppo ? .05 : 0;
  if (s_.eval_every == 0) s_.eval_every = std::max<int64_t>(1, s_.steps / 5);
  if (s_.eval_some == 0) s_.eval_some = 64;
  // Measured on the demo's model of 128 channels: at 3e-4 GRPO's entropy collapses within ten steps
  // and held-out problems stay where they are, at 1e-4 they rise. Larger models want less: 1e-6 at
  // 4,096 channels is usual.
  if (s_.lr == 0) {
    const double small = s_.ppo ? 2e-4 : 1e-4;
    s_.lr = small * std::min(1., std::pow(128. / config_.C, 1.5)) * (s_.lora > 0 ? 10 : 1);
  }
  if (s_.critic_lr == 0) s_.critic_lr = 5 * s_.lr / (s_.lora > 0 ? 10 : 1);
  if (s_.lora > 0 && has_adapters(from_)) {
    fail(from_.string(), ": has adapters, expected --lora to begin from the merged model");
  }
}

void RlRun::prepare() {
  check_settings();
  PromptOptions options{.form = s_.form};
  for (const std::string& tool : s_.tools) {
    if (tool != "calculator" && tool != "search") {
      fail("--tool: found ", tool, ", expected calculator or search");
    }
    if (tool == "search" && s_.search.empty()) fail("--tool search: expected --search DOCUMENTS");
    options.tools.push_back(tool == "search" ? kSearchTool : kCalculatorTool);
  }
  prompts_ = read_prompts(s_.prompts, tokenizer_, options, config_.T, s_.max_tokens);
  if (!s_.val.empty()) {
    val_ = read_prompts(s_.val, tokenizer_, options, config_.T, s_.max_tokens);
  }
  if (!s_.search.empty()) search_ = Search::load(s_.search);
  const RewardContext context{
      tokenizer_,
      from_,
      s_.max_tokens,
      parse_device(w_.device),
      {s_.command_seconds, int64_t(s_.command_memory * 1e9), s_.command_processes}};
  if (s_.rewards.empty()) fail("--reward: missing, expected a function or model:DIRECTORY");
  for (const std::string& text : s_.rewards) {
    rewards_.push_back(make_reward(parse_reward(text), context, reward_models_));
  }
  if (!s_.gold.empty()) gold_ = make_reward(parse_reward(s_.gold), context, reward_models_);
  reference_hash_ = model_hash(from_);
  for (const auto& m : reward_models_) reward_hashes_.push_back(m->hash());
  if (!s_.ptx.empty()) {
    ptx_ = std::make_unique<TokenStream>(s_.ptx, "train");
    if (ptx_->vocab_size() > 0 && read_data_info(s_.ptx).hash != tokenizer_.hash()) {
      fail("--ptx ", s_.ptx, ": found another tokenizer's shards, expected those of ", s_.model);
    }
    ptx_loader_ = std::make_unique<Loader>(*ptx_, int(std::min<int64_t>(config_.T, s_.ptx_tokens)),
                                           s_.seed, tokenizer_.end_of_text());
  }
  schedule_ = {s_.schedule, s_.steps, s_.warmup, s_.warmdown, s_.final_lr};
  beta_ = {s_.beta, s_.kl_target > 0 ? s_.kl_target : 6, s_.kl_horizon};
  pool_.resize(prompts_.size());
  std::iota(pool_.begin(), pool_.end(), 0);
}

// ---------------------------------------------------------------------------------------------
// Models: the policy, its reference, the critic

void RlRun::make_models(const std::filesystem::path& policy_from) {
  GptOptions o{.device = parse_device(w_.device)};
  if (s_.lora > 0) o.lora = {s_.lora, float(s_.lora_alpha)};
  o.batch_tokens = int(s_.micro_batch_tokens);
  policy_ = make_gpt(config_, o);
  load_weights(policy_from, *policy_, {.seed = s_.seed});
  if (s_.lora > 0) {
    base_ = adapter_base(policy_from);
    return;  // with its adapters off the policy is the reference: its weights are there once
  }
  o.mode = Mode::inference;
  reference_ = make_gpt(config_, o);
  load_weights(from_, *reference_);
}

// The critic begins as the reward model that it is to foretell, or as the policy with a head of
// zeros: then its first values are 0. `dir`: a checkpoint's, or empty.
void RlRun::make_critic(const std::filesystem::path& dir) {
  if (!s_.ppo) return;
  std::filesystem::path begin = dir;
  if (begin.empty() && !s_.critic.empty()) begin = model_dir(s_.critic);
  if (begin.empty() && !reward_models_.empty()) begin = reward_models_[0]->dir();
  const bool from_policy = begin.empty();
  Config config = from_policy ? config_ : load_config_of(begin, Head::scalar);
  config.head = Head::scalar;
  critic_shift_ = float(config.reward_shift);
  critic_ = make_gpt(
      config, {.device = parse_device(w_.device), .batch_tokens = int(s_.micro_batch_tokens)});
  load_weights(from_policy ? from_ : begin, *critic_, {.new_score = from_policy});
  if (!from_policy) return;
  const int score = critic_->table().find("score");
  critic_->write(score, Slot::weight, std::vector<float>(size_t(config.C), 0.f));
}

void RlRun::start() {
  if (std::error_code ec; std::filesystem::equivalent(from_, model(), ec)) {
    fail("-o ", w_.out.string(), ": is the model to begin with, expected another directory");
  }
  make_models(from_);
  make_critic({});
  print_plan();
  if (!s_.pass_rate.empty()) filter_problems();
}

OrderedJson RlRun::state() const {
  OrderedJson models = OrderedJson::array();
  for (size_t i = 0; i < reward_models_.size(); i++) {
    models.push_back({{"path", reward_models_[i]->dir().string()}, {"hash", reward_hashes_[i]}});
  }
  OrderedJson json = {{"reference", {{"path", from_.string()}, {"hash", reference_hash_}}},
                      {"reward_models", models},
                      {"pool", pool_},
                      {"epoch", epoch_},
                      {"cursor", cursor_},
                      {"updates", updates_},
                      {"critic_updates", critic_updates_},
                      {"beta", beta_.beta},
                      {"best", best_},
                      {"best_step", best_step_},
                      {"equal_in_a_row", equal_in_a_row_},
                      {"failed", failed_},
                      {"no_variance", no_variance_},
                      {"groups", groups_},
                      {"truncated", truncated_},
                      {"rollouts", rollouts_},
                      {"tokens", tokens_}};
  if (ptx_loader_) {
    const LoaderState at = ptx_loader_->state();
    json["ptx"] = {{"epoch", at.epoch}, {"window", at.window}};
  }
  return json;
}

void RlRun::resume(const Json& state) {
  const auto same = [](const Json& saved, const std::string& found) {
    if (saved.at("hash") == found) return;
    fail(saved.at("path").get<std::string>(), ": found a model of hash ", found, ", expected ",
         saved.at("hash").get<std::string>(), ", that of the run's beginning: it has changed");
  };
  same(state.at("reference"), reference_hash_);
  for (size_t i = 0; i < reward_models_.size(); i++) {
    same(state.at("reward_models").at(i), reward_hashes_[i]);
  }
  pool_ = state.at("pool").get<std::vector<int>>();
  if (pool_.empty() || *std::max_element(pool_.begin(), pool_.end()) >= int(prompts_.size())) {
    fail(s_.prompts[0], ": found other prompts than the run began with, expected the same");
  }
  epoch_ = state.at("epoch"), cursor_ = state.at("cursor");
  updates_ = state.at("updates"), critic_updates_ = state.at("critic_updates");
  beta_.beta = state.at("beta");
  best_ = state.at("best"), best_step_ = state.at("best_step");
  equal_in_a_row_ = state.at("equal_in_a_row");
  failed_ = state.at("failed"), no_variance_ = state.at("no_variance");
  groups_ = state.at("groups"), truncated_ = state.at("truncated");
  rollouts_ = state.at("rollouts"), tokens_ = state.at("tokens");
  make_models(model());
  load_trainer_state(model(), *policy_);
  if (s_.ppo) {
    make_critic(model() / "critic");
    load_trainer_state(model() / "critic", *critic_);
  }
  if (ptx_loader_) {
    ptx_loader_->set_state({state.at("ptx").at("epoch"), state.at("ptx").at("window")});
  }
  print_plan();
}

void RlRun::save_also(const std::filesystem::path& dir, bool resumable) {
  if (!critic_ || !resumable) return;
  SaveOptions o;
  o.tokenizer_from = from_;
  o.optimizer = true;
  o.trainer_state = Json{{"stage", "critic"}};
  save_checkpoint(dir / "critic", *critic_, o);
}

void RlRun::print_plan() {
  const Config& c = config_;
  std::printf("policy  %s: %d layers, %d channels, %s parameters%s\n", from_.c_str(), c.L, c.C,
              count_text(double(policy_->table().parameters())).c_str(),
              s_.lora > 0 ? format(", adapters of rank %d", s_.lora).c_str() : "");
  std::printf("prompts %s, held out %s; %d rollouts a step%s, up to %d tokens each\n",
              count_text(double(prompts_.size())).c_str(), count_text(double(val_.size())).c_str(),
              s_.rollouts, s_.ppo ? "" : format(" in groups of %d", s_.group).c_str(),
              s_.max_tokens);
  std::string rewards;
  for (const RewardFunction& f : rewards_) {
    rewards +=
        format("%s%g x %s", rewards.empty() ? "" : " + ", f.spec.weight, f.spec.name.c_str());
  }
  std::printf("reward  %s; beta %g, %s\n", rewards.c_str(), s_.beta,
              s_.kl_budget > 0 ? format("at most %g nats an answer", s_.kl_budget).c_str()
                               : "no budget of KL");
  std::printf("updates %s: %d minibatches x %d epochs, learning rate %g\n",
              s_.ppo ? "ppo" : s_.method.c_str(), s_.minibatches, s_.epochs, s_.lr);
  const int64_t models = policy_->table().size * (s_.lora > 0 ? 1 : 4) +
                         (reference_ ? reference_->table().size : 0) +
                         (critic_ ? critic_->table().size * 4 : 0);
  std::printf("memory  %s of weights, gradients and moments, and activations of %s tokens\n",
              bytes_text(4. * double(models)).c_str(),
              count_text(double(s_.micro_batch_tokens)).c_str());
  std::fflush(stdout);
}

// ---------------------------------------------------------------------------------------------
// Prompts to rollouts with rewards

RolloutOptions RlRun::rollout_options(double temperature) const {
  RolloutOptions o;
  o.max_new = s_.max_tokens, o.rows = s_.rows;
  o.temperature = float(temperature);
  o.stops = s_.stops;
  o.search = search_ ? &*search_ : nullptr;
  return o;
}

// The pool in another order each time it is gone through: a function of the seed and the place.
std::vector<const Prompt*> RlRun::next_prompts(int n) {
  std::vector<const Prompt*> next;
  std::vector<int> order;
  while (int(next.size()) < n) {
    if (order.empty()) {
      order = pool_;
      Rng rng{mix64(s_.seed, hash64("prompts"), uint64_t(epoch_))};
      for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rng.below(i)]);
    }
    next.push_back(&prompts_[size_t(order[size_t(cursor_)])]);
    if (++cursor_ == int64_t(order.size())) cursor_ = 0, epoch_++, order.clear();
  }
  return next;
}

void RlRun::give_rewards(std::span<Rollout> rollouts) {
  const Timed timed(split_.rewards);
  for (Rollout& r : rollouts) r.reward = 0, r.rewards.clear();
  for (const RewardFunction& f : rewards_) {
    const std::vector<float> values = f.rewards(rollouts);
    for (size_t i = 0; i < rollouts.size(); i++) {
      rollouts[i].rewards.push_back(values[i]);
      rollouts[i].reward += f.spec.weight * values[i];
    }
  }
  for (Rollout& r : rollouts) {
    if (!r.ended && !r.failed() && s_.truncated == "penalise") r.reward = s_.truncated_reward;
  }
}

// Of no account: its reward could not be found, or it was cut off and that is to count nowhere.
bool RlRun::left_out(const Rollout& r) const {
  return r.failed() || (s_.truncated == "mask" && !r.ended);
}

bool RlRun::varies(std::span<const Rollout> group) const {
  std::vector<double> rewards;
  for (const Rollout& r : group)
    if (!left_out(r)) rewards.push_back(r.reward);
  return !rewards.empty() && has_variance(rewards);
}

// A step's rollouts. With --resample, groups without variance are replaced by those of other
// prompts, as long as rounds are left.
std::vector<Rollout> RlRun::collect(int64_t number, Groups& groups) {
  std::vector<Rollout> all;
  for (int round = 0; round <= s_.resample && int(all.size()) < s_.rollouts; round++) {
    const std::vector<const Prompt*> prompts =
        next_prompts((s_.rollouts - int(all.size())) / copies());
    std::vector<Rollout> rollouts;
    {
      const Timed timed(split_.decode);
      rollouts =
          roll_out(*policy_, tokenizer_, prompts, copies(), rollout_options(s_.temperature),
                   mix64(mix64(s_.seed, hash64("rollouts")), uint64_t(number), uint64_t(round)));
    }
    give_rewards(rollouts);
    for (size_t i = 0; i < rollouts.size(); i += size_t(copies())) {
      const std::span<Rollout> group(rollouts.data() + i, size_t(copies()));
      if (s_.resample > 0 && !varies(group)) {
        groups.resampled++;
        continue;
      }
      for (Rollout& r : group) {
        r.group = int(groups.all);
        all.push_back(std::move(r));
      }
      groups.all++;
    }
  }
  for (const Rollout& r : all) groups.failed += r.failed(), groups.truncated += !r.ended;
  return all;
}

// Keeps the problems that the policy solves as often as --pass-rate LO:HI says, before it learns.
void RlRun::filter_problems() {
  double low = 0, high = 1;
  if (std::sscanf(s_.pass_rate.c_str(), "%lf:%lf", &low, &high) != 2 || !(low <= high)) {
    fail("--pass-rate: found ", s_.pass_rate, ", expected LOW:HIGH, as in .2:.8");
  }
  if (!rewards_[0].verifies) {
    fail("--pass-rate: found --reward ", rewards_[0].spec.name, " first, expected a verifier");
  }
  std::vector<int> kept;
  const int64_t n = s_.pass_problems > 0 ? std::min(s_.pass_problems, int64_t(pool_.size()))
                                         : int64_t(pool_.size());
  Rng rng{mix64(s_.seed, hash64("pass rate"))};
  for (size_t i = pool_.size(); i > 1; i--) std::swap(pool_[i - 1], pool_[rng.below(i)]);
  const int64_t piece = 256;
  for (int64_t begin = 0; begin < n && stop_signal == 0; begin += piece) {
    std::vector<const Prompt*> tried;
    for (int64_t i = begin; i < std::min(n, begin + piece); i++) {
      tried.push_back(&prompts_[size_t(pool_[size_t(i)])]);
    }
    const std::vector<Rollout> rollouts =
        roll_out(*policy_, tokenizer_, tried, s_.pass_samples, rollout_options(s_.temperature),
                 mix64(s_.seed, hash64("pass rate"), uint64_t(begin)));
    const std::vector<float> right = rewards_[0].rewards(rollouts);
    for (size_t i = 0; i < tried.size(); i++) {
      int passed = 0;
      for (int k = 0; k < s_.pass_samples; k++) {
        const size_t at = i * size_t(s_.pass_samples) + size_t(k);
        passed += right[at] > .5 && rollouts[at].ended;
      }
      const double rate = double(passed) / s_.pass_samples;
      if (rate >= low && rate <= high) kept.push_back(pool_[size_t(begin) + i]);
    }
    line_.show(format("pass rates: %lld of %lld problems tried, %zu kept",
                      (long long)std::min(n, begin + piece), (long long)n, kept.size()),
               begin + piece >= n);
  }
  if (stop_signal) fail("--pass-rate: stopped before all problems were tried; nothing was saved");
  if (kept.empty()) {
    fail("--pass-rate ", s_.pass_rate, ": found none among ", n, " problems, expected some");
  }
  std::sort(kept.begin(), kept.end());
  pool_ = std::move(kept);
}

// ---------------------------------------------------------------------------------------------
// Log-probabilities and values

// logp (or value, of a model with a scalar head) at each action of each rollout.
void RlRun::score(Gpt& gpt, std::span<Rollout* const> rollouts, std::vector<float> Rollout::*out) {
  const Timed timed(split_.forward);
  const bool scalar = gpt.config().head == Head::scalar;
  for (const RolloutBatch& b : pack_rollouts(rollouts, s_.micro_batch_tokens)) {
    gpt.forward(b.batch(float(s_.temperature)), Pass::score);
    std::vector<float> found = b.gather(scalar ? gpt.value() : gpt.logp());
    for (float& x : found) x += scalar ? critic_shift_ : 0;
    b.divide(found, out);
  }
}

void RlRun::score_reference(std::span<Rollout* const> rollouts) {
  if (reference_) return score(*reference_, rollouts, &Rollout::ref_logp);
  policy_->use_adapters(false);
  score(*policy_, rollouts, &Rollout::ref_logp);
  policy_->use_adapters(true);
}

// The generator and the forward pass are to be of one mind: equal on the CPU, near each other on a
// GPU. Other settings in one than in the other would bias every gradient.
void RlRun::check_generator(std::span<Rollout* const> rollouts, OrderedJson& metrics) const {
  double sum = 0, largest = 0, n = 0;
  for (const Rollout* r : rollouts) {
    for (size_t a = 0; a < r->old_logp.size(); a++, n++) {
      const double off = std::abs(double(r->old_logp[a]) - r->sampled_logp[a]);
      sum += off, largest = off <= largest ? largest : off;
    }
  }
  metrics["generator_off"] = {{"mean", n > 0 ? sum / n : 0}, {"largest", largest}};
  if (n > 0 && !(sum / n <= .02)) {
    fail("step ", done_ + 1,
         ": log-probabilities of the generator and of the forward pass differ by ", sum / n,
         " in the mean, expected .02 at most");
  }
}

// ---------------------------------------------------------------------------------------------
// Advantages

// PPO. The reward of an action is the price of the KL it adds, k1; the last has the score besides.
void RlRun::advantages_by_critic(std::span<Rollout> rollouts) {
  std::vector<std::vector<float>> rewards;
  std::vector<float> all;
  for (const Rollout& r : rollouts) {
    std::vector<float> of_actions;
    for (int a = 0; a < r.length(); a++) {
      const size_t i = size_t(a);
      const double kl = double(r.old_logp[i]) - r.ref_logp[i];
      const double score = a + 1 == r.length() && !left_out(r) ? r.reward : 0;
      of_actions.push_back(float(score - beta_.beta * kl));
    }
    all.insert(all.end(), of_actions.begin(), of_actions.end());
    rewards.push_back(std::move(of_actions));
  }
  if (s_.whiten_rewards) {
    whiten(all, {}, true);
    size_t next = 0;
    for (auto& of_rollout : rewards)
      for (float& x : of_rollout) x = all[next++];
  }
  std::vector<float> advantages;  // of all that count, whitened together
  for (size_t i = 0; i < rollouts.size(); i++) {
    Rollout& r = rollouts[i];
    const auto found = gae(rewards[i], r.value, s_.gamma, s_.lambda);
    r.advantage = found.advantages, r.returns = found.returns;
    if (left_out(r)) continue;
    advantages.insert(advantages.end(), r.advantage.begin(), r.advantage.end());
  }
  whiten(advantages);
  size_t next = 0;
  for (Rollout& r : rollouts) {
    for (float& x : r.advantage) x = left_out(r) ? 0 : advantages[next++];
  }
  std::vector<int> lengths;
  for (const Rollout& r : rollouts) lengths.push_back(left_out(r) ? 0 : r.length());
  const std::vector<double> weights = token_weights(GroupMethod::cake, lengths, s_.max_tokens);
  for (size_t i = 0; i < rollouts.size(); i++) {
    rollouts[i].weight = float(weights[i]);
  }
}

// GRPO. Every action of a rollout has the advantage of the rollout over its group.
void RlRun::advantages_by_group(std::span<Rollout> rollouts, Groups& groups) {
  const double in_reward = method_ == GroupMethod::rloo ? s_.beta : 0;  // RLOO: k1 in the reward
  std::vector<int> lengths;
  for (const Rollout& r : rollouts) lengths.push_back(left_out(r) ? 0 : r.length());
  const std::vector<double> weights = token_weights(method_, lengths, s_.max_tokens);
  for (size_t begin = 0; begin < rollouts.size(); begin += size_t(s_.group)) {
    const std::span<Rollout> group = rollouts.subspan(begin, size_t(s_.group));
    const bool varied = varies(group);
    groups.without_variance += !varied;
    std::vector<double> rewards;
    for (const Rollout& r : group) {
      if (!left_out(r)) rewards.push_back(r.reward - (in_reward > 0 ? in_reward * r.kl() : 0));
    }
    std::vector<double> advantages;
    if (varied) advantages = group_advantages(rewards, method_);
    size_t next = 0;
    for (size_t i = 0; i < group.size(); i++) {
      Rollout& r = group[i];
      const bool counts = varied && !left_out(r);
      r.advantage.assign(r.actions.size(), counts ? float(advantages[next++]) : 0);
      r.weight = counts ? float(weights[begin + i]) : 0;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Updates

OptimizerStep RlRun::optimizer_step(int64_t number, double lr) const {
  Rates rates = adamw(lr, 0, s_.clip_norm);
  rates.beta2 = s_.beta2, rates.weight_decay = s_.weight_decay;
  OptimizerStep o = rates.at(number, 1);
  o.eps = float(s_.adam_eps);
  return o;
}

RlRun::UpdateResult RlRun::learn(int64_t number, std::span<Rollout> rollouts) {
  UpdateResult sum;
  std::vector<Rollout*> trained;
  for (Rollout& r : rollouts)
    if (r.weight > 0) trained.push_back(&r);
  if (trained.empty()) return sum;
  // Weights are of the step's mean; each of M minibatches stands for all of it.
  const size_t n = trained.size(), M = std::min(size_t(s_.minibatches), n);
  for (Rollout* r : trained) r->weight *= float(M);
  for (int epoch = 0; epoch < s_.epochs; epoch++) {
    if (reuses()) {
      Rng rng{mix64(mix64(s_.seed, hash64("minibatches")), uint64_t(number), uint64_t(epoch))};
      for (size_t i = n; i > 1; i--) std::swap(trained[i - 1], trained[rng.below(i)]);
    }
    for (size_t m = 0; m < M; m++) {
      const std::span<Rollout* const> minibatch(trained.data() + m * n / M,
                                                (m + 1) * n / M - m * n / M);
      if (number > s_.critic_warmup) update_policy(number, minibatch, sum);
      if (critic_) update_critic(number, minibatch, sum);
    }
  }
  return sum;
}

void RlRun::update_policy(int64_t number, std::span<Rollout* const> minibatch, UpdateResult& sum) {
  const bool sequence = method_ == GroupMethod::gspo && !s_.ppo;
  // RLOO's KL, and PPO's, is in the reward.
  const double in_loss = s_.ppo || method_ == GroupMethod::rloo ? 0 : s_.beta;
  RatioStats ratios;
  for (const RolloutBatch& b : pack_rollouts(minibatch, s_.micro_batch_tokens)) {
    {
      const Timed timed(split_.forward);
      policy_->forward(b.batch(float(s_.temperature)), Pass::train);
    }
    const std::vector<float> logp = b.gather(policy_->logp());
    std::vector<float> old = b.joined(&Rollout::old_logp);
    if (old.empty()) old = logp, b.divide(logp, &Rollout::old_logp);  // used once: the ratio is 1
    const std::vector<float> weights = b.weights();
    PolicyLoss<float> loss;
    if (sequence) {
      std::vector<float> advantages;
      for (const Rollout* r : b.rollouts) advantages.push_back(r->advantage[0]);
      loss = clipped_sequence_policy(logp, old, b.starts, advantages, weights, s_.clip_low,
                                     s_.clip_high);
    } else {
      loss = clipped_policy(logp, old, b.joined(&Rollout::advantage), weights, s_.clip_low,
                            s_.clip_high);
    }
    sum.loss += loss.loss;
    ratios.add(loss.ratios);
    if (in_loss > 0) {
      const KlEstimator k = method_ == GroupMethod::grpo ? KlEstimator::k3 : KlEstimator::k2;
      const KlLoss<float> kl = kl_loss(k, logp, b.joined(&Rollout::ref_logp), weights);
      for (size_t a = 0; a < logp.size(); a++) loss.dlogp[a] += float(in_loss * kl.dlogp[a]);
      sum.kl_loss += in_loss * kl.loss;
    }
    for (const float h : b.gather(policy_->entropy())) sum.entropy += h;
    sum.actions += int64_t(logp.size());
    std::vector<float> dentropy;
    if (s_.entropy > 0) {
      dentropy = b.scatter(weights);
      for (float& w : dentropy) w *= -float(s_.entropy);
    }
    const Timed timed(split_.backward);
    policy_->backward(b.scatter(loss.dlogp), {}, dentropy);
  }
  // k3 is half the square of rho - 1 where that is small. Exactly 0 on the CPU.
  const double off = std::sqrt(2 * std::abs(ratios.mean_k3()));
  if (sum.updates == 0 && !(off <= 2e-2)) {
    fail("step ", number, ": found ratios of 1 +- ", off,
         " in the first minibatch, expected 1: what is scored is not what was sampled from");
  }
  sum.ratios.add(ratios);
  if (ptx_loader_) add_pretraining_gradient();
  const Timed timed(split_.update);
  policy_->update(optimizer_step(++updates_, s_.lr * schedule_.at(number)));
  const UpdateStats stats = policy_->stats();
  sum.grad_norm += stats.grad_norm;
  sum.skipped |= stats.skipped;
  sum.updates++;
}

// L = 1/2 mean max((v - R)^2, (clip(v) - R)^2), by an optimizer of its own.
void RlRun::update_critic(int64_t number, std::span<Rollout* const> minibatch, UpdateResult& sum) {
  for (const RolloutBatch& b : pack_rollouts(minibatch, s_.micro_batch_tokens)) {
    {
      const Timed timed(split_.forward);
      critic_->forward(b.batch(1), Pass::train);
    }
    std::vector<float> value = b.gather(critic_->value());
    for (float& v : value) v += critic_shift_;
    const auto loss = clipped_value(value, b.joined(&Rollout::value), b.joined(&Rollout::returns),
                                    b.weights(), s_.value_clip);
    sum.value_loss += loss.loss;
    const Timed timed(split_.backward);
    critic_->backward({}, b.scatter(loss.dvalue));
  }
  const Timed timed(split_.update);
  critic_->update(optimizer_step(++critic_updates_, s_.critic_lr * schedule_.at(number)));
  sum.critic_norm += critic_->stats().grad_norm;
  sum.critic_updates++;
}

// Against forgetting (InstructGPT's ptx): ptx_weight times the mean loss of some pretraining text.
void RlRun::add_pretraining_gradient() {
  std::vector<int> tokens, targets, starts;
  const int64_t T = ptx_loader_->window_length();
  const Timed timed(split_.backward);
  const int64_t windows = std::max<int64_t>(1, s_.ptx_tokens / T);
  for (int64_t w = 0; w < windows; w++) {
    ptx_loader_->next(1, tokens, targets, starts);
    const std::vector<float> dlogp(targets.size(), -float(s_.ptx_weight / double(windows * T)));
    policy_->forward_backward({tokens, targets, starts}, dlogp);
  }
}

// ---------------------------------------------------------------------------------------------
// A step

Run::StepResult RlRun::step(int64_t number) {
  const Split before = split_;
  const double began = now();
  Groups groups;
  std::vector<Rollout> rollouts = collect(number, groups);
  std::vector<Rollout*> all, some;
  for (Rollout& r : rollouts) {
    all.push_back(&r);
    // Where the KL is only watched, a group in four tells enough.
    if (s_.ppo || s_.beta > 0 || s_.kl_budget > 0 || r.group % 4 == 0) some.push_back(&r);
  }
  if (s_.ppo || reuses()) score(*policy_, all, &Rollout::old_logp);
  if (critic_) score(*critic_, all, &Rollout::value);
  score_reference(some);
  const double kl = mean_kl(some);

  std::vector<double> rewards;
  for (const Rollout& r : rollouts) rewards.push_back(left_out(r) ? NAN : r.reward);
  const bool equal = !(mean_and_spread(rewards).spread > 0);
  equal_in_a_row_ = equal ? equal_in_a_row_ + 1 : 0;
  if (over_budget(kl) || !std::isfinite(kl)) {
    stop_early_ = too_far_ = true;
    why_stopped_ =
        format("the KL to the reference is %.3g nats an answer, the budget %g", kl, s_.kl_budget);
  } else if (equal_in_a_row_ >= 10) {
    stop_early_ = true;
    why_stopped_ = "all rewards of ten steps in a row were equal: nothing can be learned from them";
  }

  UpdateResult u;
  OrderedJson m;
  if (!too_far_ && !equal) {
    s_.ppo ? advantages_by_critic(rollouts) : advantages_by_group(rollouts, groups);
    u = learn(number, rollouts);
    check_generator(all, m);
  } else {
    groups.without_variance = groups.all;
  }
  if (s_.kl_target > 0) beta_.update(kl, int64_t(rollouts.size()));
  groups_ += groups.all, no_variance_ += groups.without_variance, failed_ += groups.failed;
  truncated_ += groups.truncated, rollouts_ += int64_t(rollouts.size());
  for (const Rollout& r : rollouts) tokens_ += r.length();
  if (number == 1 || number % std::max<int64_t>(1, s_.steps / 5) == 0) show(rollouts);

  StepResult result;
  result.skipped = u.skipped;
  result.line = describe(rollouts, groups, u, mean_and_spread(rewards), kl, m);
  split_.all += now() - began;
  m["seconds"] = {
      {"decode", split_.decode - before.decode},       {"forward", split_.forward - before.forward},
      {"backward", split_.backward - before.backward}, {"update", split_.update - before.update},
      {"rewards", split_.rewards - before.rewards},    {"all", split_.all - before.all}};
  result.metrics = std::move(m);
  return result;
}

double RlRun::mean_kl(std::span<Rollout* const> rollouts) const {
  double sum = 0;
  for (const Rollout* r : rollouts) sum += r->kl();
  return sum / double(std::max<size_t>(1, rollouts.size()));
}

// A step in metrics.jsonl; returns its line for people.
std::string RlRun::describe(std::span<const Rollout> rollouts, const Groups& groups,
                            const UpdateResult& u, const MeanAndSpread& reward, double kl,
                            OrderedJson& m) const {
  Canaries c = canaries_of(rollouts);
  c.entropy = u.actions > 0 ? u.entropy / double(u.actions) : 0;
  const double n = double(std::max<size_t>(1, rollouts.size()));
  const double updates = double(std::max<int64_t>(1, u.updates));
  const double no_variance =
      double(groups.without_variance) / double(std::max<int64_t>(1, groups.all));
  m["reward"] = reward.mean, m["reward_std"] = reward.spread;
  for (size_t f = 0; f < rewards_.size(); f++) {
    std::vector<float> values;
    for (const Rollout& r : rollouts) values.push_back(r.rewards[f]);
    const MeanAndSpread of = mean_and_spread(values);
    m["rewards"][rewards_[f].spec.label()] = {{"mean", of.mean}, {"std", of.spread}};
  }
  m["kl"] = kl, m["kl_token"] = c.length > 0 ? kl / c.length : 0;
  m["beta"] = beta_.beta;
  m["loss"] = u.loss / updates, m["kl_loss"] = u.kl_loss / updates;
  m["grad_norm"] = u.grad_norm / updates;
  m["entropy"] = c.entropy;
  m["clipped"] = u.ratios.clipped_share(), m["ratio_off"] = u.ratios.largest;
  if (critic_) {
    std::vector<float> value, returns;
    for (const Rollout& r : rollouts) {
      if (r.returns.empty() || left_out(r)) continue;
      value.insert(value.end(), r.value.begin(), r.value.end());
      returns.insert(returns.end(), r.returns.begin(), r.returns.end());
    }
    const double times = double(std::max<int64_t>(1, u.critic_updates));
    m["explained_variance"] =
        explained_variance(value, returns, std::vector<float>(value.size(), 1.f));
    m["value_loss"] = u.value_loss / times, m["critic_grad_norm"] = u.critic_norm / times;
  } else {
    m["no_variance"] = no_variance, m["resampled"] = groups.resampled;
  }
  m["length"] = c.length, m["longest"] = c.longest;
  m["truncated"] = double(groups.truncated) / n, m["ended"] = c.ended;
  m["repetition"] = c.repetition, m["reward_length_correlation"] = c.correlation;
  m["failed"] = groups.failed;

  std::string line = format("reward %.3f  kl %.2f  entropy %.2f  length %.0f", reward.mean, kl,
                            c.entropy, c.length);
  if (groups.truncated > 0) line += format("  cut off %.0f%%", 100 * double(groups.truncated) / n);
  if (!critic_) line += format("  no variance %.0f%%", 100 * no_variance);
  return line;
}

// Two completions: of the highest reward and of the lowest.
void RlRun::show(std::span<const Rollout> rollouts) {
  const auto less = [](const Rollout& a, const Rollout& b) { return a.reward < b.reward; };
  if (rollouts.empty()) return;
  const auto both = std::minmax_element(rollouts.begin(), rollouts.end(), less);
  const auto indented = [](std::string text) {
    if (text.size() > 400) text = text.substr(0, 400) + "...";
    for (size_t i = 0; (i = text.find('\n', i)) != std::string::npos; i += 9)
      text.replace(i, 1, "\n        ");
    return text;
  };
  for (const Rollout* r : {&*both.second, &*both.first}) {
    line_.note("asked   " + indented(r->prompt->question));
    line_.note(format("%-7.2f ", r->reward) + indented(r->text) + (r->ended ? "" : " [cut off]"));
  }
}

// ---------------------------------------------------------------------------------------------
// Held-out prompts

HeldOut RlRun::evaluate(int prompts, int samples) {
  HeldOut h;
  std::vector<const Prompt*> asked;
  for (size_t i = 0; i < val_.size() && (prompts == 0 || int(i) < prompts); i++) {
    asked.push_back(&val_[i]);
  }
  const Split before = split_;  // evaluations are no part of a step
  const uint64_t seed = mix64(s_.seed, hash64("held out"));
  std::vector<Rollout> rollouts =
      roll_out(*policy_, tokenizer_, asked, samples, rollout_options(s_.temperature), seed);
  give_rewards(rollouts);
  std::vector<float> gold;
  if (gold_) gold = gold_->rewards(rollouts);
  h.prompts = int64_t(asked.size()), h.answers = int64_t(rollouts.size());
  h.k = std::min(4, samples);
  h.canaries = canaries_of(rollouts);
  std::vector<double> rewards, golds;
  for (size_t i = 0; i < asked.size(); i++) {
    double reward = 0, of_gold = 0;
    int right = 0;
    for (size_t k = 0; k < size_t(samples); k++) {
      const size_t at = i * size_t(samples) + k;
      reward += rollouts[at].reward / samples;
      of_gold += gold.empty() ? 0 : gold[at] / samples;
      right += rollouts[at].rewards[0] > .5 && rollouts[at].ended;
    }
    rewards.push_back(reward), golds.push_back(of_gold);
    h.pass += double(right) / samples / double(asked.size());
    h.pass_k += pass_at_k(samples, right, h.k) / double(asked.size());
  }
  h.reward = mean_and_spread(rewards), h.gold = mean_and_spread(golds);
  if (rewards_[0].verifies) {
    const std::vector<Rollout> greedy =
        roll_out(*policy_, tokenizer_, asked, 1, rollout_options(0), seed);
    const std::vector<float> right = rewards_[0].rewards(greedy);
    for (size_t i = 0; i < greedy.size(); i++) {
      h.greedy += (right[i] > .5 && greedy[i].ended) / double(greedy.size());
    }
  }
  std::vector<Rollout*> some;
  for (size_t i = 0; i < rollouts.size() && (s_.kl_budget > 0 || some.size() < 64); i++) {
    some.push_back(&rollouts[i]);
  }
  score(*policy_, some, &Rollout::old_logp);
  score_reference(some);
  h.kl = mean_kl(some);
  split_ = before;
  return h;
}

void RlRun::report(const HeldOut& h, int64_t step, const char* when) {
  const double error = 1.96 * h.reward.spread / std::sqrt(double(std::max<int64_t>(1, h.prompts)));
  OrderedJson m = {{"held_out", when},
                   {"prompts", h.prompts},
                   {"answers", h.answers},
                   {"val_reward", h.reward.mean},
                   {"val_reward_ci95", error},
                   {"val_kl", h.kl},
                   {"val_length", h.canaries.length},
                   {"val_ended", h.canaries.ended},
                   {"val_repetition", h.canaries.repetition},
                   {"val_reward_length_correlation", h.canaries.correlation}};
  std::string line = format("%s  held-out reward %.3f +- %.3f", when, h.reward.mean, error);
  if (rewards_[0].verifies) {
    m["pass1"] = h.pass, m[format("pass%d", h.k)] = h.pass_k, m["greedy"] = h.greedy;
    line = format("%s  held-out pass@1 %.1f%%, pass@%d %.1f%%, greedy %.1f%%", when, 100 * h.pass,
                  h.k, 100 * h.pass_k, 100 * h.greedy);
  }
  if (gold_) {
    const double gold_error =
        1.96 * h.gold.spread / std::sqrt(double(std::max<int64_t>(1, h.prompts)));
    m["val_gold"] = h.gold.mean, m["val_gold_ci95"] = gold_error;
    line += format(", gold %.3f +- %.3f", h.gold.mean, gold_error);
  }
  line += format(", KL %.2f, length %.0f  (%s x %d)", h.kl, h.canaries.length,
                 count_text(double(h.prompts)).c_str(),
                 int(h.answers / std::max<int64_t>(1, h.prompts)));
  write_metrics(m, step);
  line_.note(line);
}

// What the best checkpoint is chosen by: the reward that is not trained on, where there is one.
double RlRun::quality(const HeldOut& h) const {
  return gold_ ? h.gold.mean : rewards_[0].verifies ? h.pass : h.reward.mean;
}

// Keeps the weights where they are the best so far, and within the budget.
void RlRun::judge(const HeldOut& h, int64_t step) {
  if (over_budget(h.kl) || !(quality(h) > best_)) return;
  best_ = quality(h), best_step_ = step;
  save_checkpoint(w_.out / "best", *policy_, save_options());
}

void RlRun::before_first_step() {
  if (val_.empty()) return;
  last_held_out_ = evaluate(s_.eval_some, s_.eval_samples);
  report(last_held_out_, 0, "before");
  judge(last_held_out_, 0);
}

void RlRun::after_step(int64_t number) {
  if (val_.empty() || stop_early_ || number == s_.steps || number % s_.eval_every != 0) return;
  last_held_out_ = evaluate(s_.eval_some, s_.eval_samples);
  report(last_held_out_, number, format("step %lld", (long long)number).c_str());
  judge(last_held_out_, number);
}

OrderedJson RlRun::finish() {
  const std::filesystem::path best = w_.out / "best";
  if (!val_.empty() && !stop_early_ && s_.keep == "best") {
    judge(evaluate(s_.eval_some, s_.eval_samples), s_.steps);
  }
  if (best_step_ >= 0 && best_step_ < done_ && (s_.keep == "best" || too_far_)) {
    load_weights(best, *policy_);
    line_.note(format("keeps the weights of step %lld", (long long)best_step_));
  } else if (too_far_ && best_step_ < 0) {
    fail(why_stopped_, "; found no checkpoint within the budget: --val FILE keeps one");
  }
  if (!why_stopped_.empty()) line_.note("stopped: " + why_stopped_);
  OrderedJson summary = {{"stopped", why_stopped_.empty() ? Json() : Json(why_stopped_)},
                         {"best_step", best_step_}};
  if (!val_.empty()) {
    const HeldOut h = evaluate(s_.eval_prompts, s_.eval_samples);
    report(h, done_, "at the end");
    const double error = 1.96 / std::sqrt(double(h.prompts));
    summary.update({{"prompts", h.prompts},
                    {"samples", s_.eval_samples},
                    {"reward", h.reward.mean},
                    {"reward_ci95", error * h.reward.spread},
                    {"kl", h.kl},
                    {"length", h.canaries.length},
                    {"ended", h.canaries.ended}});
    if (rewards_[0].verifies) {
      summary.update({{"pass1", h.pass}, {format("pass%d", h.k), h.pass_k}, {"greedy", h.greedy}});
    }
    if (gold_) summary.update({{"gold", h.gold.mean}, {"gold_ci95", error * h.gold.spread}});
  }
  std::filesystem::remove_all(best);
  summary.update({{"rollouts", rollouts_},
                  {"tokens", tokens_},
                  {"failed", failed_},
                  {"truncated", truncated_},
                  {"groups", groups_},
                  {"groups_without_variance", no_variance_},
                  {"split",
                   {{"decode", split_.decode},
                    {"forward", split_.forward},
                    {"backward", split_.backward},
                    {"update", split_.update},
                    {"other", split_.other()},
                    {"rewards", split_.rewards}}}});
  line_.note("time    " + split_.text());
  return summary;
}

// ---------------------------------------------------------------------------------------------
// Flags

// Sampling that RL refuses: it would score another distribution than it samples from.
struct RefusedSampling {
  int top_k = 0;
  double top_p = 1, min_p = 0, repetition_penalty = 1;
  std::vector<int> banned;

  void check() const {
    const char* flag = top_k != 0                ? "--top-k"
                       : top_p != 1              ? "--top-p"
                       : min_p != 0              ? "--min-p"
                       : repetition_penalty != 1 ? "--repetition-penalty"
                       : !banned.empty()         ? "--ban-token"
                                                 : nullptr;
    if (flag) {
      fail(flag,
           ": found with RL, which samples from the distribution that it scores, expected none");
    }
  }
};

struct RlFlags {
  RlSettings s;
  Watching w;
  RefusedSampling refused;
};

void add_rl_flags(CLI::App& app, RlFlags& f) {
  RlSettings& s = f.s;
  app.add_option("--model", s.model,
                 "a run or model directory: the policy's beginning, and the reference");
  app.add_option("--prompts", s.prompts,
                 "JSON lines: {\"question\", \"answer\"}, {\"messages\"} or {\"prompt\"}");
  app.add_option("--val", s.val, "held-out ones, to judge by");
  app.add_option(
      "--reward", s.rewards,
      "[WEIGHT*]number, exact, choice, countdown, command:COMMAND, rubric, "
      "format:PATTERN, length:TOKENS, ended, model:DIRECTORY, probability:DIRECTORY (of a "
      "model of labels); again for a sum");
  app.add_option("--gold", s.gold,
                 "a reward that held-out answers are judged by, never trained on");
  app.add_option("--form", s.form,
                 "a text with {question} in it, or its file, in place of the chat template");
  app.add_option("--stop", s.stops, "strings that end an answer to it (default: a fixed length)");
  app.add_option("--tool", s.tools, "calculator, search: declared with every question");
  app.add_option("--search", s.search, "documents for the search tool");
  add_watching(app, f.w);

  auto* rollouts = app.add_option_group("Rollouts", "");
  rollouts->add_option("--steps", s.steps);
  rollouts->add_option("--rollouts", s.rollouts, "a step");
  rollouts->add_option("--max-tokens", s.max_tokens, "that are sampled, at most");
  rollouts->add_option("--temperature", s.temperature);
  rollouts->add_option("--rows", s.rows, "decoded at once");
  rollouts->add_option("--command-seconds", s.command_seconds, "for a line of a verifier");
  rollouts->add_option("--command-memory", s.command_memory, "GB of addresses");
  rollouts->add_option("--command-processes", s.command_processes);
  rollouts->add_option("--top-k", f.refused.top_k, "refused")->group("");
  rollouts->add_option("--top-p", f.refused.top_p, "refused")->group("");
  rollouts->add_option("--min-p", f.refused.min_p, "refused")->group("");
  rollouts->add_option("--repetition-penalty", f.refused.repetition_penalty, "refused")->group("");
  rollouts->add_option("--ban-token", f.refused.banned, "refused")->group("");

  auto* updates = app.add_option_group("Updates", "");
  updates->add_option("--minibatches", s.minibatches, "a step's rollouts are cut into");
  updates->add_option("--epochs", s.epochs, "times over a step's rollouts");
  updates->add_option("--clip", s.clip_low, "of the ratio, below 1");
  updates->add_option("--clip-high", s.clip_high, "above 1 (default: as --clip; dapo .28)");
  updates->add_option("--beta", s.beta, "price of the KL to the reference");
  updates->add_option("--kl-budget", s.kl_budget, "nats an answer at which to stop");
  updates->add_option("--entropy", s.entropy, "weight of an entropy bonus");
  updates->add_option("--lora", s.lora, "train adapters of this rank beside a model that stays");
  updates->add_option("--lora-alpha", s.lora_alpha,
                      "they are added alpha / rank times (default 32)");
  updates->add_option("--lr", s.lr);
  updates->add_option("--beta2", s.beta2);
  updates->add_option("--adam-eps", s.adam_eps);
  updates->add_option("--clip-norm", s.clip_norm, "largest gradient norm, 0 for any");
  updates->add_option("--weight-decay", s.weight_decay);
  updates->add_option("--schedule", s.schedule, "linear, cosine or constant (default linear)");
  updates->add_option("--warmup", s.warmup, "steps");
  updates->add_option("--warmdown", s.warmdown, "share of the steps in which linear falls");
  updates->add_option("--final-lr", s.final_lr, "share of the peak at the end");
  updates->add_option("--ptx", s.ptx, "token shards whose loss is mixed in: PREFIX");
  updates->add_option("--ptx-weight", s.ptx_weight);
  updates->add_option("--ptx-tokens", s.ptx_tokens, "an update");
  updates->add_option("--micro-batch-tokens", s.micro_batch_tokens, "tokens in memory at once");
  updates->add_option("--seed", s.seed);

  auto* judging = app.add_option_group("Judging", "");
  judging->add_option("--eval-every", s.eval_every, "steps (default: a fifth of the run)");
  judging->add_option("--eval-some", s.eval_some, "held-out prompts on the way");
  judging->add_option("--eval-prompts", s.eval_prompts, "at the end (default: all)");
  judging->add_option("--eval-samples", s.eval_samples, "answers to each");
  judging->add_option("--keep", s.keep, "the best weights by --val, or the last");
}

Command rl_command(const std::shared_ptr<RlFlags>& f) {
  return [f] {
    begin(f->w);
    f->refused.check();
    RlSettings s = f->s;
    if (f->w.resume) {
      s = settings_of<RlSettings>(f->w.out, s.ppo ? "ppo" : "grpo");
    } else if (s.model.empty() || s.prompts.empty()) {
      fail(s.model.empty() ? "--model: missing, expected the policy to begin with"
                           : "--prompts: missing, expected JSON lines");
    }
    return RlRun(std::move(s), f->w).run();
  };
}

Command ppo_command(CLI::App& app) {
  const auto f = std::make_shared<RlFlags>();
  RlSettings& s = f->s;
  s.ppo = true;
  s.minibatches = 4, s.epochs = 2, s.truncated_reward = -3;
  s.adam_eps = 1e-5, s.eval_samples = 1;
  add_rl_flags(app, *f);
  app.add_option("--critic", s.critic,
                 "a model with a scalar head to begin from (default: the reward model, else the "
                 "policy with a head of zeros)");
  app.add_option("--critic-lr", s.critic_lr, "default: 5 times --lr");
  app.add_option("--critic-warmup", s.critic_warmup, "steps in which only the critic learns");
  app.add_option("--kl-target", s.kl_target, "nats an answer: adapts beta");
  app.add_option("--kl-horizon", s.kl_horizon,
                 "rollouts in which beta moves e-fold at most, over 5");
  app.add_option("--gamma", s.gamma);
  app.add_option("--lambda", s.lambda);
  app.add_option("--value-clip", s.value_clip, "0 for none");
  app.add_flag("--whiten-rewards", s.whiten_rewards);
  app.add_option("--end-penalty", s.truncated_reward,
                 "in place of the reward of an answer that did not end its turn (default -3)");
  return rl_command(f);
}

Command grpo_command(CLI::App& app) {
  const auto f = std::make_shared<RlFlags>();
  RlSettings& s = f->s;
  add_rl_flags(app, *f);
  app.add_option("--group", s.group, "rollouts of a prompt");
  app.add_option("--method", s.method, "cake, grpo, dr_grpo, dapo, rloo or gspo");
  app.add_option("--resample", s.resample,
                 "rounds in which groups without variance are replaced (default 0; dapo 3)");
  app.add_option("--truncated", s.truncated,
                 "penalise: --truncated-reward in place of the reward; mask: counts nowhere; keep");
  app.add_option("--truncated-reward", s.truncated_reward);
  app.add_option("--pass-rate", s.pass_rate, "LOW:HIGH: only problems that are solved so often");
  app.add_option("--pass-samples", s.pass_samples, "answers to each, to find out");
  app.add_option("--pass-problems", s.pass_problems, "how many to try (default: all)");
  return rl_command(f);
}

// =============================================================================================
// Best of n: what choosing alone gives
//
// No weight changes: n answers are sampled, and the one that the reward likes best is given. That
// moves the distribution of answers by log n - (n - 1)/n nats at most, which makes it the baseline
// of all that learns. What it chooses can be learned from, too: rejection sampling.

struct BestOfNSettings {
  std::string model, gold, form;
  std::vector<std::string> prompts, rewards, stops;
  int n = 16, max_tokens = 128, most = 0;  // most: prompts; 0: all
  double temperature = 1;
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(BestOfNSettings, model, gold, form, prompts, rewards, stops, n,
                                   max_tokens, most, temperature, seed)

// The mean reward of the best of k answers, drawn from these without putting back, and of their
// `gold` beside it. Sorted by reward, r_1 <= .. <= r_N, answer i is the best of k in
// C(i - 1, k - 1) of the C(N, k) draws. Unbiased, where the best of the first k is only one draw.
struct BestOf {
  double reward = 0, gold = 0;
};
BestOf best_of(int k, std::span<const double> rewards, std::span<const double> gold) {
  const int N = int(rewards.size());
  std::vector<int> order(rewards.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return rewards[size_t(a)] < rewards[size_t(b)]; });
  BestOf best;
  double p = double(k) / N;  // that the i-th is the best, from i = N downwards
  for (int i = N; i >= k; i--) {
    const auto at = size_t(order[size_t(i) - 1]);
    best.reward += p * rewards[at];
    if (!gold.empty()) best.gold += p * gold[at];
    p *= i > 1 ? double(i - k) / (i - 1) : 0;
  }
  return best;
}

// One line of metrics.jsonl: all of a prompt's answers, and the one that was chosen.
struct Candidates {
  std::vector<std::vector<double>> rewards;  // of each function, of each answer
  std::vector<double> reward, gold;          // their weighted sum; gold may be empty
  std::vector<int> lengths;                  // tokens
  std::vector<bool> ended;
  int chosen = -1;  // -1: none is fit to learn from
  std::string text;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Candidates, rewards, reward, gold, lengths, ended, chosen, text)

// The highest reward; of a verifier's right answers, which all have the same, the shortest. An
// answer that was cut off is not chosen.
int choose(const Candidates& c, bool verifies) {
  int best = -1;
  for (int i = 0; i < int(c.reward.size()); i++) {
    const auto at = size_t(i), before = size_t(std::max(0, best));
    if (!c.ended[at] || !std::isfinite(c.reward[at]) || (verifies && c.rewards[0][at] <= .5)) {
      continue;
    }
    const bool better = best < 0 || (verifies ? c.lengths[at] < c.lengths[before]
                                              : c.reward[at] > c.reward[before]);
    if (better) best = i;
  }
  return best;
}

class BestOfN {
 public:
  BestOfN(BestOfNSettings settings, Watching watching, std::string write)
      : s_(std::move(settings)),
        w_(std::move(watching)),
        write_(std::move(write)),
        from_(model_dir(s_.model)),
        config_(load_config_of(from_, Head::lm)),
        tokenizer_(Tokenizer::load(from_)) {
    if (s_.n < 1) fail("--n: found ", s_.n, ", expected at least 1");
    if (s_.max_tokens < 1) fail("--max-tokens: found ", s_.max_tokens, ", expected at least 1");
    if (!(s_.temperature > 0)) {
      fail("--temperature: found ", s_.temperature, ", expected above 0: answers are sampled");
    }
    if (s_.rewards.empty()) fail("--reward: missing, expected a function or model:DIRECTORY");
    prompts_ = read_prompts(s_.prompts, tokenizer_, {.form = s_.form}, config_.T, s_.max_tokens);
    if (s_.most > 0 && int(prompts_.size()) > s_.most) prompts_.resize(size_t(s_.most));
    const RewardContext context{tokenizer_, from_, s_.max_tokens, parse_device(w_.device), {}};
    for (const std::string& text : s_.rewards) {
      rewards_.push_back(make_reward(parse_reward(text), context, models_));
    }
    if (!s_.gold.empty()) gold_ = make_reward(parse_reward(s_.gold), context, models_);
  }

  int run();
  const std::vector<Candidates>& candidates() const { return all_; }

 private:
  static constexpr int kPiece = 16;  // prompts that are sampled together

  OrderedJson state() const;
  void go_on();
  std::vector<Candidates> sample(Gpt& gpt, int begin, int end) const;
  void write_answers() const;
  OrderedJson curve() const;

  BestOfNSettings s_;
  Watching w_;
  std::string write_;
  std::filesystem::path from_;
  Config config_;
  Tokenizer tokenizer_;
  std::vector<Prompt> prompts_;
  std::vector<RewardFunction> rewards_;
  std::optional<RewardFunction> gold_;
  std::vector<std::shared_ptr<RewardModel>> models_;
  std::vector<Candidates> all_;  // of each prompt so far
};

OrderedJson BestOfN::state() const {
  OrderedJson hashes = OrderedJson::array();
  hashes.push_back(model_hash(from_));
  for (const auto& m : models_) hashes.push_back(m->hash());
  return {{"stage", "best-of-n"}, {"models", hashes}, {"settings", Json(s_)}};
}

// Reads what was sampled before: whole lines; the settings and the models must be the same.
void BestOfN::go_on() {
  const Json state = read_json(w_.out / "state.json");
  if (state.at("models") != Json(this->state()).at("models")) {
    fail((w_.out / "state.json").string(),
         ": found models of other hashes than the run began "
         "with, expected the same: they have changed");
  }
  std::istringstream lines(read_file(w_.out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (json.is_discarded() || all_.size() == prompts_.size()) break;  // a line that was cut off
    all_.push_back(json.get<Candidates>());
  }
  if (all_.size() < prompts_.size()) all_.resize(all_.size() / kPiece * kPiece);
}

// A piece of the prompts; a draw depends on the piece, and on nothing that was sampled before it.
std::vector<Candidates> BestOfN::sample(Gpt& gpt, int begin, int end) const {
  RolloutOptions o;
  o.max_new = s_.max_tokens, o.temperature = float(s_.temperature), o.stops = s_.stops;
  std::vector<const Prompt*> piece;
  for (int i = begin; i < end; i++) piece.push_back(&prompts_[size_t(i)]);
  const std::vector<Rollout> rollouts = roll_out(
      gpt, tokenizer_, piece, s_.n, o, mix64(s_.seed, hash64("best of n"), uint64_t(begin)));
  std::vector<Candidates> found(piece.size());
  std::set<size_t> failures;
  for (const RewardFunction& f : rewards_) {
    const std::vector<float> values = f.rewards(rollouts);
    for (size_t r = 0; r < rollouts.size(); r++) {
      Candidates& c = found[r / size_t(s_.n)];
      if (r % size_t(s_.n) == 0) c.rewards.emplace_back();
      // A verifier's failure counts as wrong, and is not chosen.
      const bool failed = !std::isfinite(values[r]);
      if (failed) failures.insert(r);
      c.rewards.back().push_back(failed ? 0 : values[r]);
    }
  }
  std::vector<float> gold;
  if (gold_) gold = gold_->rewards(rollouts);
  for (size_t r = 0; r < rollouts.size(); r++) {
    Candidates& c = found[r / size_t(s_.n)];
    double sum = 0;
    for (size_t f = 0; f < rewards_.size(); f++) {
      sum += rewards_[f].spec.weight * c.rewards[f][r % size_t(s_.n)];
    }
    c.reward.push_back(sum);
    if (gold_) c.gold.push_back(gold[r]);
    c.lengths.push_back(rollouts[r].length());
    c.ended.push_back(rollouts[r].ended && !failures.count(r));
  }
  for (size_t i = 0; i < found.size(); i++) {
    Candidates& c = found[i];
    c.chosen = choose(c, rewards_[0].verifies);
    c.text = rollouts[i * size_t(s_.n) + size_t(std::max(0, c.chosen))].text;
  }
  return found;
}

// Conversations, or prompts with completions, as ./sft reads them.
void BestOfN::write_answers() const {
  std::string lines;
  int64_t written = 0;
  for (size_t i = 0; i < all_.size(); i++) {
    if (all_[i].chosen < 0) continue;
    const Prompt& p = prompts_[i];
    OrderedJson json;
    if (p.raw) {
      json = {{"prompt", tokenizer_.decode(std::span(p.ids).subspan(1))},
              {"completion", all_[i].text}};
    } else {
      Json messages = p.line.contains("messages") ? p.line.at("messages") : Json::array();
      if (p.line.contains("prompt")) messages = p.line.at("prompt");
      if (messages.empty()) messages.push_back({{"role", "user"}, {"content", p.question}});
      messages.push_back({{"role", "assistant"}, {"content", all_[i].text}});
      json = {{"messages", messages}};
    }
    lines += json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    written++;
  }
  write_file(write_, lines);
  std::printf("%s: %s answers to %s prompts\n", write_.c_str(), count_text(double(written)).c_str(),
              count_text(double(all_.size())).c_str());
}

// For each k up to n: the bound on the KL, and the mean rewards of the best of k.
OrderedJson BestOfN::curve() const {
  OrderedJson points = OrderedJson::array();
  std::printf("    n  KL at most    reward%s\n", gold_ ? "      gold" : "");
  for (int k = 1; k <= s_.n; k++) {
    BestOf mean;
    for (const Candidates& c : all_) {
      const BestOf b = best_of(k, c.reward, c.gold);
      mean.reward += b.reward / double(all_.size());
      mean.gold += b.gold / double(all_.size());
    }
    OrderedJson point = {{"n", k}, {"kl", best_of_n_kl(k)}, {"reward", mean.reward}};
    if (gold_) point["gold"] = mean.gold;
    points.push_back(point);
    const bool power = (k & (k - 1)) == 0;
    if (!power && k != s_.n) continue;
    std::printf("%5d  %10.3f  %8.4f%s\n", k, best_of_n_kl(k), mean.reward,
                gold_ ? format("  %8.4f", mean.gold).c_str() : "");
  }
  return points;
}

int BestOfN::run() {
  expect_elsewhere(from_, w_.out);
  if (!w_.resume && !w_.overwrite) expect_new_run(w_.out);
  if (w_.resume) {
    go_on();
  } else {
    if (w_.overwrite) std::filesystem::remove_all(w_.out);
    std::filesystem::create_directories(w_.out);
    write_json(w_.out / "state.json", state());
  }
  const auto gpt = make_gpt(config_, {.device = parse_device(w_.device), .mode = Mode::inference});
  load_weights(from_, *gpt);
  Metrics metrics;
  metrics.open(w_.out / "metrics.jsonl", int64_t(all_.size()));
  ProgressLine line;
  const double start = now();
  const int all = int(prompts_.size()), before = int(all_.size());
  for (int begin = before; begin < all && !stop_signal; begin += kPiece) {
    const int end = std::min(all, begin + kPiece);
    for (Candidates& c : sample(*gpt, begin, end)) {
      OrderedJson json = {{"step", all_.size() + 1}};
      json.update(OrderedJson(Json(c)));
      metrics.write(json.dump(-1, ' ', false, Json::error_handler_t::replace));
      all_.push_back(std::move(c));
    }
    line.show(format("prompt %d/%d  %s left", end, all,
                     duration_text((now() - start) / (end - before) * (all - end)).c_str()),
              end == all);
  }
  if (stop_signal) {
    line.note("stopped: go on with --resume");
    return 128 + stop_signal;
  }
  OrderedJson summary = {{"stage", "best-of-n"}, {"prompts", all}, {"n", s_.n}};
  summary["curve"] = curve();
  write_json(w_.out / "summary.json", summary);
  if (!write_.empty()) write_answers();
  return 0;
}

// =============================================================================================
// Over-optimisation: a reward model is a proxy, and what is optimised against it finds its errors
//
//     preferences --sizes--> proxies --PPO, best of n--> answers -> (sqrt KL, proxy, gold) -> fits
//
// The gold reward is a program here (cake/rubric.h), of which the preferences are noisy
// comparisons. As a policy moves away from where the proxy was trained, the proxy goes on rising;
// the gold reward rises with it, peaks and falls, the sooner the fewer comparisons the proxy has
// seen (Gao, Schulman, Hilton 2022). Rewards are in standard deviations of the first policy's
// answers.

struct OveroptimizeSettings {
  std::string model;
  std::vector<std::string> data, prompts, val;
  std::vector<int64_t> sizes = {64, 256, 1024};  // prompts that a proxy is trained on
  double reward_epochs = 2;
  int64_t steps = 80;  // of PPO
  int rollouts = 64, max_tokens = 128, n = 32, val_prompts = 64, val_samples = 2, points = 10;
  double lr = 0, beta = 0;
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(OveroptimizeSettings, model, data, prompts, val, sizes,
                                   reward_epochs, steps, rollouts, max_tokens, n, val_prompts,
                                   val_samples, points, lr, beta, seed)

struct OverPoint {
  double d = 0, proxy = 0, gold = 0;  // d = sqrt(KL)
};

// One proxy under one kind of pressure.
struct OverCurve {
  int64_t size = 0;
  Pressure pressure = Pressure::rl;
  std::vector<OverPoint> points;  // the first at d = 0
  Overoptimization fit;           // of gold

  void make_fit() {
    std::vector<double> d, gold;
    for (const OverPoint& p : points) {
      if (p.d > 0) d.push_back(p.d), gold.push_back(p.gold);
    }
    fit = fit_overoptimization(pressure, d, gold);
  }
};

class Overoptimize {
 public:
  Overoptimize(OveroptimizeSettings settings, Watching watching)
      : s_(std::move(settings)), w_(std::move(watching)) {}
  int run();

 private:
  std::filesystem::path dir(int64_t size) const { return w_.out / concat("proxy-", size); }
  template <class Part>
  void part(const std::filesystem::path& out, Part&& make);
  void train_proxies();
  void best_of_n();
  void push(int64_t size);
  OrderedJson hacked_answers();
  OrderedJson curves_json();
  void print_curves() const;

  OveroptimizeSettings s_;
  Watching w_;
  std::vector<OverCurve> curves_;
  Spread gold_;                  // of the first policy's answers
  std::vector<Spread> proxies_;  // the same, of each size
};

struct Stopped {
  int status;
};

// One of the runs that this is made of: passed over when it is finished, resumed when it was begun.
template <class Part>
void Overoptimize::part(const std::filesystem::path& out, Part&& make) {
  const std::filesystem::path state = out / "model/trainer_state.json";
  const bool saved = std::filesystem::exists(state);
  if (std::filesystem::exists(out / "summary.json") &&
      (!saved || read_json(state).at("finished") == true)) {
    return;
  }
  Watching w = w_;
  w.out = out;
  w.overwrite = false;
  w.resume = saved || std::filesystem::exists(out / "state.json");
  if (!w.resume) std::filesystem::remove_all(out);
  std::printf("\n%s\n", out.c_str());
  if (const int status = make(w)) throw Stopped{status};
}

void Overoptimize::train_proxies() {
  for (const int64_t size : s_.sizes) {
    part(dir(size) / "reward", [&](const Watching& w) {
      RewardSettings r;
      r.groups.model = s_.model, r.groups.data = s_.data, r.groups.most = size;
      r.groups.epochs = s_.reward_epochs, r.groups.seed = s_.seed;
      if (w.resume) r = settings_of<RewardSettings>(w.out, "reward");
      return RewardRun(r, w).run();
    });
  }
}

// All proxies judge the same answers of the first policy.
void Overoptimize::best_of_n() {
  BestOfNSettings b;
  b.model = s_.model, b.prompts = s_.val, b.gold = "rubric";
  b.n = s_.n, b.max_tokens = s_.max_tokens, b.most = s_.val_prompts, b.seed = s_.seed;
  for (const int64_t size : s_.sizes) {
    b.rewards.push_back("model:" + (dir(size) / "reward").string());
  }
  const std::filesystem::path out = w_.out / "best-of-n";
  part(out, [&](const Watching& w) { return BestOfN(b, w, "").run(); });
  std::vector<Candidates> all;
  std::istringstream lines(read_file(out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);)
    all.push_back(Json::parse(line).get<Candidates>());

  const auto spread = [&](auto values_of) {
    std::vector<float> values;
    for (const Candidates& c : all)
      for (const double x : values_of(c)) values.push_back(float(x));
    return spread_of(values);
  };
  gold_ = spread([](const Candidates& c) { return c.gold; });
  for (size_t i = 0; i < s_.sizes.size(); i++) {
    proxies_.push_back(spread([i](const Candidates& c) { return c.rewards[i]; }));
    OverCurve curve{s_.sizes[i], Pressure::best_of_n, {}, {}};
    for (int k = 1; k <= s_.n; k *= 2) {
      OverPoint p{std::sqrt(best_of_n_kl(k))};
      for (const Candidates& c : all) {
        const BestOf b_k = best_of(k, c.rewards[i], c.gold);
        p.proxy += (b_k.reward - proxies_[i].mean) / proxies_[i].std / double(all.size());
        p.gold += (b_k.gold - gold_.mean) / gold_.std / double(all.size());
      }
      curve.points.push_back(p);
    }
    curve.make_fit();
    curves_.push_back(curve);
  }
}

// PPO against a proxy without a price or a budget of KL. Its evaluations are the points.
void Overoptimize::push(int64_t size) {
  const std::filesystem::path out = dir(size) / "ppo";
  part(out, [&](const Watching& w) {
    RlSettings r;
    r.ppo = true;
    r.model = s_.model, r.prompts = s_.prompts, r.val = s_.val;
    r.rewards = {"model:" + (dir(size) / "reward").string()};
    r.gold = "rubric";
    r.steps = s_.steps, r.rollouts = s_.rollouts, r.max_tokens = s_.max_tokens;
    r.minibatches = 4, r.epochs = 2, r.adam_eps = 1e-5;
    r.lr = s_.lr, r.beta = s_.beta, r.truncated = "keep", r.keep = "last";
    r.eval_every = std::max<int64_t>(1, s_.steps / s_.points);
    r.eval_some = r.eval_prompts = s_.val_prompts, r.eval_samples = s_.val_samples;
    r.seed = s_.seed;
    if (w.resume) r = settings_of<RlSettings>(w.out, "ppo");
    return RlRun(r, w).run();
  });
  const size_t i = size_t(std::find(s_.sizes.begin(), s_.sizes.end(), size) - s_.sizes.begin());
  OverCurve curve{size, Pressure::rl, {{0, 0, 0}}, {}};
  std::istringstream lines(read_file(out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json m = Json::parse(line);
    if (!m.contains("val_gold") || m.at("step") == 0) continue;
    curve.points.push_back({std::sqrt(std::max(0., m.at("val_kl").get<double>())),
                            (m.at("val_reward").get<double>() - proxies_[i].mean) / proxies_[i].std,
                            (m.at("val_gold").get<double>() - gold_.mean) / gold_.std});
  }
  curve.make_fit();
  curves_.push_back(curve);
}

// What reward hacking looks like: the last policies' answers that the proxy likes most beyond what
// they are worth.
OrderedJson Overoptimize::hacked_answers() {
  OrderedJson answers = OrderedJson::array();
  for (size_t i = 0; i < s_.sizes.size(); i++) {
    const std::filesystem::path from = dir(s_.sizes[i]), out = from / "answers";
    BestOfNSettings b;
    b.model = (from / "ppo").string(), b.prompts = s_.val, b.gold = "rubric";
    b.rewards = {"model:" + (from / "reward").string()};
    b.n = 1, b.max_tokens = s_.max_tokens, b.most = s_.val_prompts, b.seed = s_.seed;
    part(out, [&](const Watching& w) { return BestOfN(b, w, "").run(); });
    std::vector<std::pair<double, Json>> found;  // proxy - gold
    std::istringstream lines(read_file(out / "metrics.jsonl"));
    for (std::string line; std::getline(lines, line);) {
      const Json m = Json::parse(line);
      const double proxy =
          (m.at("reward").at(0).get<double>() - proxies_[i].mean) / proxies_[i].std;
      const double gold = (m.at("gold").at(0).get<double>() - gold_.mean) / gold_.std;
      found.push_back(
          {proxy - gold,
           {{"size", s_.sizes[i]}, {"proxy", proxy}, {"gold", gold}, {"text", m.at("text")}}});
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    for (size_t k = 0; k < std::min<size_t>(3, found.size()); k++) {
      const Json& a = found[k].second;
      answers.push_back(OrderedJson(a));
      std::printf("proxy of %lld prompts: proxy %+.2f, gold %+.2f\n  %s\n", (long long)s_.sizes[i],
                  a.at("proxy").get<double>(), a.at("gold").get<double>(),
                  a.at("text").get<std::string>().substr(0, 400).c_str());
    }
  }
  return answers;
}

OrderedJson Overoptimize::curves_json() {
  OrderedJson json = OrderedJson::array();
  for (const OverCurve& c : curves_) {
    OrderedJson points = OrderedJson::array();
    for (const OverPoint& p : c.points) {
      points.push_back({{"sqrt_kl", p.d}, {"proxy", p.proxy}, {"gold", p.gold}});
    }
    json.push_back({{"size", c.size},
                    {"pressure", c.pressure == Pressure::rl ? "ppo" : "best-of-n"},
                    {"alpha", c.fit.alpha},
                    {"beta", c.fit.beta},
                    {"optimum", c.fit.optimum},
                    {"highest_gold", c.fit.highest},
                    {"points", points}});
  }
  return json;
}

void Overoptimize::print_curves() const {
  for (const OverCurve& c : curves_) {
    const bool rl = c.pressure == Pressure::rl;
    std::printf("\n%s against a proxy of %lld prompts\n  sqrt KL   proxy    gold\n",
                rl ? "PPO" : "best of n", (long long)c.size);
    for (const OverPoint& p : c.points)
      std::printf("  %7.3f %+7.3f %+7.3f\n", p.d, p.proxy, p.gold);
    std::printf("  gold = d (%.3f - %.3f %s), highest %+.3f at d = %.2f\n", c.fit.alpha, c.fit.beta,
                rl ? "log d" : "d", c.fit.highest, c.fit.optimum);
  }
}

// A picture of the curves: a panel for each pressure, a colour for each proxy; proxies dashed, gold
// solid, fits thin.
std::string overoptimization_svg(std::span<const OverCurve> curves) {
  constexpr double kWidth = 420, kHeight = 320, kLeft = 48, kTop = 40;
  const char* colours[] = {"#c0392b", "#2471a3", "#1e8449", "#8e44ad", "#b9770e"};
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      2 * (kWidth + kLeft) + 24, kHeight + 2 * kTop + 12);
  for (const Pressure pressure : {Pressure::best_of_n, Pressure::rl}) {
    double right = .1, low = -.1, high = .1;
    for (const OverCurve& c : curves) {
      if (c.pressure != pressure) continue;
      for (const OverPoint& p : c.points) {
        right = std::max(right, p.d);
        low = std::min({low, p.proxy, p.gold}), high = std::max({high, p.proxy, p.gold});
      }
    }
    const bool rl = pressure == Pressure::rl;
    const double left = kLeft + (rl ? kWidth + kLeft : 0);
    const auto x = [&](double d) { return left + d / right * (kWidth - 8); };
    const auto y = [&](double r) { return kTop + (high - r) / (high - low) * kHeight; };
    const auto path = [&](const std::string& points, const char* colour, const char* style) {
      svg += format("<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" %s/>\n", points.c_str(),
                    colour, style);
    };
    svg += format("<text x=\"%g\" y=\"20\" font-size=\"14\">%s</text>\n", left,
                  rl ? "PPO" : "best of n");
    svg += format("<text x=\"%g\" y=\"%g\">sqrt(KL), up to %.2f</text>\n", left + kWidth / 2 - 40,
                  kTop + kHeight + 32, right);
    for (const double r : {low, 0., high}) {
      svg += format(
          "<line x1=\"%g\" x2=\"%g\" y1=\"%g\" y2=\"%g\" stroke=\"#ccc\"/>\n"
          "<text x=\"%g\" y=\"%g\" text-anchor=\"end\">%.1f</text>\n",
          left, left + kWidth - 8, y(r), y(r), left - 4, y(r) + 4, r);
    }
    int number = 0;
    for (const OverCurve& c : curves) {
      if (c.pressure != pressure) continue;
      const char* colour = colours[number % 5];
      std::string proxy, gold, fit;
      for (const OverPoint& p : c.points) {
        proxy += format("%.1f,%.1f ", x(p.d), y(p.proxy));
        gold += format("%.1f,%.1f ", x(p.d), y(p.gold));
        svg += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x(p.d), y(p.gold),
                      colour);
      }
      for (int i = 0; i <= 60 && std::isfinite(c.fit.alpha); i++) {
        const double d = right * i / 60, r = overoptimized(pressure, c.fit.alpha, c.fit.beta, d);
        if (r >= low && r <= high) fit += format("%.1f,%.1f ", x(d), y(r));
      }
      path(proxy, colour, "stroke-dasharray=\"5 4\" stroke-width=\"1.5\"");
      path(gold, colour, "stroke-width=\"1.5\"");
      path(fit, colour, "stroke-width=\".6\"");
      svg += format(
          "<text x=\"%g\" y=\"%d\" fill=\"%s\">%lld prompts: proxy dashed, gold solid, "
          "fit thin</text>\n",
          left + 8, int(kTop) + 14 * ++number, colour, (long long)c.size);
    }
  }
  return svg + "</svg>\n";
}

int Overoptimize::run() {
  expect_elsewhere(model_dir(s_.model), w_.out);
  if (!w_.resume && !w_.overwrite) expect_new_run(w_.out);
  if (w_.overwrite) std::filesystem::remove_all(w_.out);
  std::filesystem::create_directories(w_.out);
  write_json(w_.out / "settings.json", OrderedJson(Json(s_)));
  OrderedJson answers;
  try {
    train_proxies();
    best_of_n();
    for (const int64_t size : s_.sizes) push(size);
    answers = hacked_answers();
  } catch (const Stopped& stopped) {
    return stopped.status;
  }
  print_curves();
  write_file(w_.out / "overoptimization.svg", overoptimization_svg(curves_));
  write_json(w_.out / "summary.json",
             {{"stage", "overoptimize"}, {"curves", curves_json()}, {"answers", answers}});
  std::printf("\npicture in %s\n", (w_.out / "overoptimization.svg").c_str());
  return 0;
}

// =============================================================================================
// Command line

void add_groups(CLI::App& app, GroupSettings& s) {
  app.add_option("--model", s.model, "a run or Hugging Face directory to begin with");
  app.add_option("--data", s.data,
                 "JSON lines with \"prompt\", \"chosen\" and \"rejected\", or \"prompt\", "
                 "\"responses\" and \"ranking\"");
  app.add_option("--val", s.val, "held-out preferences in files of their own");
  app.add_option("--val-fraction", s.val_fraction, "or this share of the prompts (default .1)");
  app.add_flag("--as-chat", s.as_chat,
               "strings are a user's message and the assistant's answer, not a text that goes on");
  app.add_option("--most", s.most, "train on so many prompts (default: all)");
  app.add_option("--context", s.context, "longer answers are dropped (default: the model's)");
  auto* budget = app.add_option_group("Budget", "one of; default: 1 epoch");
  budget->add_option("--epochs", s.epochs, "times over the prompts");
  budget->add_option("--steps", s.steps, "optimizer steps");
  budget->add_option("--batch", s.batch, "prompts a step (default: 64, fewer of little data)");
  budget->add_option("--micro-batch-tokens", s.micro_batch_tokens, "tokens in memory at once");
  auto* optimizer = app.add_option_group("Optimizer", "AdamW");
  optimizer->add_option("--lr", s.lr, "the peak (default: by the model's width)");
  optimizer->add_option("--head-lr", s.head_lr, "of a new head (default: the same)");
  optimizer->add_option("--schedule", s.schedule, "linear, cosine or constant (default cosine)");
  optimizer->add_option("--warmup", s.warmup, "steps");
  optimizer->add_option("--final-lr", s.final_lr, "share of the peak at the end (default .1)");
  optimizer->add_option("--weight-decay", s.weight_decay);
  optimizer->add_option("--clip", s.clip, "largest gradient norm, 0 for any (default 1)");
  optimizer->add_option("--seed", s.seed);
  app.add_option("--eval-every", s.eval_every, "steps (default: a fifth of the run)");
}

// What every run over groups needs, unless its settings come from its checkpoint.
void check_groups(const GroupSettings& s) {
  if (s.model.empty()) fail("--model: missing, expected the model to begin with");
  if (s.data.empty()) fail("--data: missing, expected JSON lines of preferences");
}

Command reward_command(CLI::App& app) {
  const auto s = std::make_shared<RewardSettings>();
  const auto w = std::make_shared<Watching>();
  add_groups(app, s->groups);
  app.add_option("--folds", s->groups.folds,
                 "train as many models, each without the prompts of one part, and judge on these");
  app.add_option("--margin", s->margin, "that the better answer is to be ahead by");
  app.add_option("--centring", s->centring, "weight of (r_w + r_l)^2, for instance .01");
  app.add_option("--normalise-on", s->normalise,
                 "mean 0, spread 1 on: training (default: those answers), none, or a file of "
                 "answers, as ./rlhf best-of-n --n 1 --reward ended --write makes a policy's own");
  add_watching(app, *w);
  return [s, w] {
    begin(*w);
    if (s->groups.folds != 0) {
      if (s->groups.folds < 2 || s->groups.folds > 100) {
        fail("--folds: found ", s->groups.folds, ", expected 2 to 100");
      }
      check_groups(s->groups);
      return run_folds(*s, *w);
    }
    if (w->resume) *s = settings_of<RewardSettings>(w->out, "reward");
    check_groups(s->groups);
    return RewardRun(*s, *w).run();
  };
}

Command dpo_command(CLI::App& app) {
  const auto s = std::make_shared<DpoSettings>();
  const auto w = std::make_shared<Watching>();
  add_groups(app, s->groups);
  app.add_option("--loss", s->loss, "dpo, ipo, kto or orpo (default dpo)");
  app.add_option("--beta", s->beta, "how near to the reference; orpo: weight of the odds");
  app.add_option("--label-smoothing", s->smoothing, "the share of comparisons that are wrong");
  app.add_option("--reference", s->reference, "a model (default: --model)");
  app.add_option("--lora", s->lora, "train adapters of this rank beside a model that stays");
  app.add_option("--lora-alpha", s->lora_alpha, "they are added alpha / rank times (default 32)");
  add_watching(app, *w);
  return [s, w] {
    begin(*w);
    if (w->resume) *s = settings_of<DpoSettings>(w->out, "dpo");
    check_groups(s->groups);
    return DpoRun(*s, *w).run();
  };
}

Command best_of_n_command(CLI::App& app) {
  const auto s = std::make_shared<BestOfNSettings>();
  const auto w = std::make_shared<Watching>();
  const auto write = std::make_shared<std::string>();
  app.add_option("--model", s->model, "a run or model directory that answers");
  app.add_option("--prompts", s->prompts,
                 "JSON lines: {\"question\", \"answer\"}, {\"messages\"} or {\"prompt\"}");
  app.add_option("--reward", s->rewards, "as in ./rlhf ppo: model:DIRECTORY, number, rubric, ...");
  app.add_option("--gold", s->gold, "another reward of the answers that are chosen");
  app.add_option("--write", *write, "a file for the answers that are chosen, as ./sft reads it");
  app.add_option("--n", s->n, "answers to a prompt (default 16)");
  app.add_option("--most", s->most, "so many prompts (default: all)");
  app.add_option("--max-tokens", s->max_tokens, "of an answer (default 128)");
  app.add_option("--temperature", s->temperature);
  app.add_option("--form", s->form,
                 "a text with {question} in it, or its file, in place of the chat template");
  app.add_option("--stop", s->stops, "strings that end an answer to it");
  app.add_option("--seed", s->seed);
  add_watching(app, *w);
  return [s, w, write] {
    begin(*w);
    if (w->resume) *s = read_json(w->out / "state.json").at("settings").get<BestOfNSettings>();
    if (s->model.empty()) fail("--model: missing, expected the model that answers");
    if (s->prompts.empty()) fail("--prompts: missing, expected JSON lines");
    return BestOfN(*s, *w, *write).run();
  };
}

Command overoptimize_command(CLI::App& app) {
  const auto s = std::make_shared<OveroptimizeSettings>();
  const auto w = std::make_shared<Watching>();
  app.add_option("--model", s->model, "the assistant: policies and proxies begin as it");
  app.add_option("--data", s->data, "preferences that the proxies learn from");
  app.add_option("--prompts", s->prompts, "{\"messages\", \"rubric\"} to train on");
  app.add_option("--val", s->val, "held-out ones, to judge by");
  app.add_option("--sizes", s->sizes, "prompts that each proxy sees (default 64 256 1024)");
  app.add_option("--reward-epochs", s->reward_epochs, "default 2");
  app.add_option("--steps", s->steps, "of PPO (default 80)");
  app.add_option("--rollouts", s->rollouts, "a step (default 64)");
  app.add_option("--max-tokens", s->max_tokens, "of an answer (default 128)");
  app.add_option("--lr", s->lr, "of PPO");
  app.add_option("--beta", s->beta, "price of the KL (default 0: nothing holds the policy)");
  app.add_option("--n", s->n, "best of so many (default 32)");
  app.add_option("--val-prompts", s->val_prompts, "default 64");
  app.add_option("--val-samples", s->val_samples, "answers to each (default 2)");
  app.add_option("--points", s->points, "evaluations of a run (default 10)");
  app.add_option("--seed", s->seed);
  add_watching(app, *w);
  return [s, w] {
    begin(*w);
    if (w->resume) *s = read_json(w->out / "settings.json").get<OveroptimizeSettings>();
    const auto need = [](const auto& found, const char* flag, const char* what) {
      if (found.empty()) fail(flag, ": missing, expected ", what);
    };
    need(s->model, "--model", "the model to begin with");
    need(s->data, "--data", "JSON lines of preferences");
    need(s->prompts, "--prompts", "JSON lines"), need(s->val, "--val", "JSON lines");
    need(s->sizes, "--sizes", "numbers of prompts");
    return Overoptimize(*s, *w).run();
  };
}

}  // namespace

int main_rlhf(int argc, char** argv) {
  CLI::App app("Learns from preferences and from problems whose answers can be checked.");
  app.option_defaults()->always_capture_default(false);
  app.require_subcommand(1);
  std::map<CLI::App*, Command> commands;
  const auto add = [&](const char* name, const char* what, Command (*options)(CLI::App&)) {
    CLI::App* sub = app.add_subcommand(name, what);
    commands[sub] = options(*sub);
  };
  add("reward", "preferences, or labelled texts, to a model that scores", reward_command);
  add("dpo", "preferences to a policy, without a reward model", dpo_command);
  add("best-of-n", "the best of several answers: a baseline, and data for ./sft",
      best_of_n_command);
  add("overoptimize", "gold against proxy: how a reward is hacked", overoptimize_command);
  add("ppo", "a policy against a reward, near a reference", ppo_command);
  add("grpo", "a policy by groups of answers whose rewards are checked", grpo_command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    fail(e.what(), " (see --help)");
  }
  return commands.at(app.get_subcommands().at(0))();
}

}  // namespace cake

#ifndef CAKE_NO_MAIN
int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_rlhf(argc, argv); });
}
#endif  // CAKE_NO_MAIN
