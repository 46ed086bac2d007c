// Stage 5, reinforcement learning: an assistant and a reward make a better assistant.
//
//     prompts -> rollouts -> rewards -> log-probabilities -> advantages -> minibatches -> update
//
// A rollout is a prompt with an answer that the policy, the model in training, has sampled. A
// reward is a number that says how good the answer is: the score of a reward model (./reward
// train), a check of the answer (cake/verify.h), or a weighted sum. An advantage says of each
// sampled token how much better the answer was than predicted. The update makes tokens with a
// positive advantage more probable, and tokens with a negative one less.
//
//     ./rlhf ppo         a critic predicts the reward: a second model, which is trained with the
//                        policy; the distance to the first policy is a part of the reward
//     ./rlhf grpo        the prediction is the mean reward of several answers to the same prompt
//     ./rlhf best-of-n   nothing is trained: n answers are sampled and the best is chosen
//
// It is the one idea of the whole project again: the forward pass gives the log-probability l_t of
// each token, an objective makes of them one number per token, dL/dl_t, and the backward pass does
// the rest. Read `ppo_step` and `grpo_step`: each stands below its objectives. The functions that
// both call are declared above them and defined below them.
//
// Every rollout is a line of RUN/rollouts.jsonl: what was asked and answered, its rewards and its
// advantage. Reading them is how one finds out what a reward rewards.
//
// All log-probabilities belong to one distribution: rollouts are sampled at the temperature at
// which they are scored, without top-k, top-p or penalties, and those of the policy at sampling
// (l_old), of the reference (l_ref) and of the policy in training (l) come from the same forward
// pass.
//
// Sources: PPO, Schulman et al. 2017; GAE, Schulman et al. 2015; PPO for language models, Ouyang et
// al. 2022 (InstructGPT); GRPO, Shao et al. 2024 (DeepSeekMath). Others stand beside their
// formulas.
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
#include "cake/flags.h"
#include "cake/generate.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/packed.h"
#include "cake/problems.h"
#include "cake/record_flags.h"
#include "cake/records.h"
#include "cake/reward_model.h"
#include "cake/run.h"
#include "cake/schedule.h"
#include "cake/shards.h"
#include "cake/stage_template.h"
#include "cake/tokenizer.h"
#include "cake/tools.h"
#include "cake/training.h"
#include "cake/verify.h"

namespace cake {
namespace {

// =============================================================================================
// What a step works on

struct Prompt : Problem {  // question: as a person or a verifier reads it
  std::vector<int> ids;    // up to where the answer begins
  bool raw = false;        // a text to continue, not a chat
  bool tools = false;      // the tools that the model calls are run
};

// A prompt and its sampled answer. Ids that a tool inserted stand between the sampled ones: they
// are read like any other id, and never trained on.
struct Rollout {
  const Prompt* prompt = nullptr;
  int group = 0;               // the same for all rollouts of one prompt in a step
  std::vector<int> ids;        // prompt, sampled and inserted ids
  std::vector<bool> sampled;   // (ids) by the model
  std::vector<float> logp;     // (ids) as the generator computed it; 0 where not sampled
  int length = 0;              // sampled ids
  std::string text;            // of the last turn
  bool ended = false;          // the model ended its answer; false: it was cut off
  std::vector<float> rewards;  // of each reward function; NaN where it failed
  double reward = 0;           // their weighted sum: what is learned from
  bool counts = true;          // false: masked out, since its reward failed or it was cut off

  bool failed() const { return !std::isfinite(reward); }
};

// Rollouts end to end, as the engine takes them: all of a step, or a micro-batch of them. Position
// n reads tokens[n] and predicts targets[n]. The last id of a rollout is only predicted. Each array
// has N numbers, or is empty until it is needed. They are 0 where the model sampled nothing, except
// for `value`, which the critic has everywhere.
struct Experience {
  Packed packed;                    // one sequence for each rollout
  std::vector<float> mask;          // (N) 1 where the model sampled the target
  std::vector<float> sampled_logp;  // (N) l of the targets, as the generator computed it
  std::vector<float> old_logp;      // (N) l_old: of the policy that sampled
  std::vector<float> ref_logp;      // (N) l_ref: of the reference
  std::vector<float> value;         // (N) of the critic, before the target is sampled
  std::vector<float> advantage;     // (N)
  std::vector<float> returns;       // (N) what the value should have been
  std::vector<float> weight;        // (N) in the loss: the mask and the 1/N of a mean
  int64_t positions() const { return packed.positions(); }  // N
};

struct Seconds {  // of the parts of a step
  double decode = 0, forward = 0, backward = 0, update = 0, rewards = 0, all = 0;
};

struct Models {
  std::unique_ptr<Gpt> policy;
  // Null where the policy with its adapters off is the reference.
  std::unique_ptr<Gpt> reference;
  std::unique_ptr<Gpt> critic;  // PPO's, else null
  float critic_shift = 0;       // added to its values: the reward_shift of where it began
  Seconds seconds;              // that a step has spent so far
};

// How answers are sampled.
struct RolloutOptions {
  const StageTemplate* chat = nullptr;
  std::vector<int> end_tokens;     // of the policy: Config::all_end_tokens
  const Search* search = nullptr;  // documents for the search tool
  int max_tokens = 128;            // sampled ids
  int tool_tokens = 256;           // ids that tools may insert in a rollout
  int rows = 64;                   // decoded at once
  int context = 0;                 // tokens of the longest rollout, its prompt included
  float temperature = 1;
  std::vector<std::string> stops;  // that end a raw text's continuation, as its
                                   // document separator does; none: --max-tokens do too
  int64_t cache_bytes = int64_t(2) << 30, cache_page_bytes = 1;
};

struct Prompts;          // all of them, and how far the steps have gone through them
struct Rewards;          // the reward functions and their weights
struct PretrainingText;  // mixed in against forgetting

// ---------------------------------------------------------------------------------------------
// The settings that a step reads. Like all settings they are flags and stay in the checkpoint

struct StepSettings {
  int64_t steps = 60;  // of the run
  int rollouts = 128;  // of a step
  double temperature = 1;
  uint64_t seed = 1;
  int minibatches = 1, epochs = 1;  // of a step's rollouts
  double clip_low = .2;             // the ratio's range is 1 - clip_low to 1 + clip_high
  double clip_high = -1;            // -1: as clip_low; dapo .28
  double entropy = 0;               // weight of the entropy bonus
  int64_t micro_batch_tokens = 0;   // 0: chosen
  double beta = 0;                  // price of the KL of the policy to the reference
  double kl_target = 0;             // adapts beta; 0: beta stays
  double kl_horizon = 10000;
  double kl_budget = 0;  // KL per response at which the run ends; 0: none
  OptimizerFlags optimizer{.warmup = 0, .warmdown = .5, .final_lr = .1};
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(StepSettings, steps, rollouts, temperature, seed,
                                                minibatches, epochs, clip_low, clip_high, entropy,
                                                micro_batch_tokens, beta, kl_target, kl_horizon,
                                                kl_budget, optimizer)

struct PpoSettings {
  std::string critic;  // a model to begin from; empty: the reward model, or the policy
  double critic_lr = 0;
  int64_t critic_warmup = 0;  // steps in which only the critic learns
  double gamma = 1, lambda = .95, value_clip = .2;
  bool whiten_rewards = false;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(PpoSettings, critic, critic_lr, critic_warmup,
                                                gamma, lambda, value_clip, whiten_rewards)

// What a run has to remember beside RunState, the order of the prompts and the models.
struct RlState {
  int64_t updates = 0, critic_updates = 0;
  double beta = 0;
  int equal_in_a_row = 0;    // steps in which all rewards were equal
  int kl_evaluations = 0;    // of --eval-at-kl, done
  std::string stopped;       // why the run ends before its last step; empty: it does not
  bool left_budget = false;  // the KL is above --kl-budget
  int64_t within_step = -1;  // of the last weights whose KL was within it; -1: none yet
  double within_kl = 0;      // theirs
  int64_t failed = 0, no_variance = 0, groups = 0, truncated = 0, rollouts = 0, tokens = 0;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(RlState, updates, critic_updates, beta,
                                                equal_in_a_row, kl_evaluations, stopped,
                                                left_budget, within_step, within_kl, failed,
                                                no_variance, groups, truncated, rollouts, tokens)

// ---------------------------------------------------------------------------------------------
// What a step has done

struct MeanAndSpread {
  double mean = 0, spread = 0;
  double squares = 0;  // sum of (x - mean)^2
  int64_t n = 0;
};

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

struct UpdateSums {  // over the updates of a step
  double loss = 0, value_loss = 0, kl_loss = 0, grad_norm = 0, critic_norm = 0;
  double entropy = 0;      // of all tokens
  double text_loss = 0;    // of the pretraining text that is mixed in
  double first_ratio = 0;  // how far the ratios of the first minibatch are from 1
  int64_t updates = 0, critic_updates = 0, tokens = 0;
  RatioStats ratios;
  bool skipped = false, critic_skipped = false;  // the gradient was not finite
};

struct Difference {  // |difference| of two log-probabilities
  double mean = 0, largest = 0;
};

struct Step {
  std::vector<Rollout> rollouts;
  Experience experience;
  MeanAndSpread reward;  // of the rollouts that count
  double kl = 0;         // to the reference, per response (k1 estimator)
  int64_t groups = 0, without_variance = 0, resampled = 0;
  UpdateSums sums;
  std::optional<Difference> generator;  // from the forward pass; none when nothing was learned
};

// ---------------------------------------------------------------------------------------------
// The pieces of a step, in the order in which they are called; defined below the two steps

// The next n prompts: the pool in another order each time that it begins again.
std::vector<const Prompt*> next_prompts(Prompts& prompts, int n, uint64_t seed);
// `copies` rollouts of each prompt, prompt after prompt.
std::vector<Rollout> roll_out(Models& models, const RolloutOptions& o,
                              std::span<const Prompt* const> prompts, int copies, uint64_t seed);
uint64_t seed_of_rollouts(uint64_t seed, int64_t n, int round) {
  return mix64(mix64(seed, hash64("rollouts")), uint64_t(n), uint64_t(round));
}
void give_rewards(std::span<Rollout> rollouts, const Rewards& rewards, Seconds& seconds);
std::vector<double> rewards_of(std::span<const Rollout> rollouts);  // of those that count
MeanAndSpread mean_reward(std::span<const Rollout> rollouts);

Experience end_to_end(std::span<const Rollout> rollouts);
// The numbers of the rollouts, 0, 1, 2, ..., in each `every`-th group.
std::vector<int> numbers_of(std::span<const Rollout> rollouts, int every = 1);
// These rollouts in micro-batches of at most `limit` tokens; a longer one is one of its own.
std::vector<Experience> micro_batches(const Experience& x, std::span<const int> rollouts,
                                      int64_t limit);
// `value` at the sampled tokens of a rollout.
void fill(const Experience& x, size_t rollout, float value, std::vector<float>& dst);  // (N)
// Values of a micro-batch's positions to their places among those of the whole step.
void copy_back(const Experience& b, std::span<const float> values,  // (N) of b
               const Experience& x, std::vector<float>& dst);       // (N) of x

// (N) log-probabilities, or the critic's values, in the rollouts that are named; 0 in others.
std::vector<float> score(Gpt& gpt, const Experience& x, std::span<const int> rollouts,
                         const StepSettings& s, Models& models);
std::vector<float> reference_logp(const Experience& x, std::span<const int> rollouts,
                                  const StepSettings& s, Models& models);
double kl_of(const Experience& x, size_t rollout);  // sum of l_old - l_ref: the k1 estimator
double mean_kl(const Experience& x, std::span<const int> rollouts);
// Of these rollouts, which the policy as it is has sampled: over prompts, of a prompt's mean.
MeanAndSpread kl_by_prompt(std::span<const Rollout> rollouts, const StepSettings& s,
                           Models& models);
// True where the KL or the entropy is a part of what is maximised: then a step teaches something
// even if all its rewards are equal.
bool has_kl_or_entropy(const StepSettings& s) { return s.beta > 0 || s.entropy > 0; }
// False where there is nothing to learn from, or the policy has left the KL budget.
bool can_learn(const Step& step, const StepSettings& s);

// The rollouts of each update of step n: the trained ones in `minibatches` parts, `epochs` times.
std::vector<std::vector<int>> minibatches(Experience& x, const StepSettings& s, int64_t n);
void forward(Gpt& gpt, const Experience& b, double temperature, Seconds& seconds);
std::vector<float> shifted_values(const Models& models);  // (N) of the critic's last forward
// (N) dL/dentropy of the bonus, or empty when it has no weight.
std::vector<float> entropy_weights(const Experience& b, double entropy);
void backward(Gpt& gpt, std::span<const float> dlogp, std::span<const float> dvalue,
              std::span<const float> dentropy, Seconds& seconds);
void update_policy(int64_t n, const StepSettings& s, Models& models, PretrainingText& text,
                   RlState& state, UpdateSums& sums);
void update_critic(int64_t n, const StepSettings& s, double lr, Models& models, RlState& state,
                   UpdateSums& sums);
// Between the log-probabilities of the generator and of the forward pass, where `weight` is not 0;
// an Error where they are far from each other. Comes before the update.
Difference generator_difference(int64_t n, const Experience& x, std::span<const float> weight);

// =============================================================================================
// Objectives of both
//
// An objective knows no model. It says how its loss changes with what went into it: dlogp[t] =
// dL/dl_t, dvalue[t] = dL/dV_t. Its arrays are the engine's, (N), rollout after rollout. A weight
// holds both the mask and the 1/N of a mean: where it is 0, nothing counts, whatever the other
// arrays hold there. NaN comes out where NaN went in. Sums are in double.

template <class T>
using In = std::span<const std::type_identity_t<T>>;  // a vector of T converts, T is not deduced

template <class T>
struct PolicyLoss {
  double loss = 0;
  std::vector<T> dlogp;  // (N)
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

void add_sums(UpdateSums& sums, const Experience& b, const PolicyLoss<float>& loss,
              std::span<const float> entropy) {
  sums.loss += loss.loss;
  sums.ratios.add(loss.ratios);
  for (const float h : entropy) sums.entropy += h;
  for (const float m : b.mask) sums.tokens += m != 0;
}

// =============================================================================================
// PPO: a critic predicts the rewards
//
// The reward of a token is minus the price of the KL that it adds; the last sampled token has the
// rollout's reward in addition. The critic's value V_t predicts the sum of the rewards from token t
// on. Both models learn: the policy from how much better the answer was, the critic from its error.

//   r_t = R [t is the rollout's last sampled token] - beta (l_old - l_ref)
std::vector<float> token_rewards(const Experience& x, std::span<const Rollout> rollouts,
                                 double beta) {
  std::vector<float> rewards(x.mask.size(), 0.f);  // (N)
  for (size_t i = 0; i < rollouts.size(); i++) {
    double score = rollouts[i].counts ? rollouts[i].reward : 0;
    for (size_t n = x.packed.last(i) + 1; n-- > x.packed.begin(i);) {  // from the last token back
      if (x.mask[n] == 0) continue;
      rewards[n] = float(score - beta * (double(x.old_logp[n]) - x.ref_logp[n]));
      score = 0;
    }
  }
  return rewards;
}

template <class T>
struct Advantages {
  std::vector<T> advantages, returns;  // (N), 0 where masked out
};
// Generalised advantage estimation (Schulman et al. 2015). Rollout i is [starts[i], starts[i + 1])
// of the arrays; the next token is the next one that `mask` does not leave out, and after the last
// one V' = A' = 0:
//   delta = r + gamma V' - V,  A = delta + gamma lambda A',  R = A + V
template <class T = float>
Advantages<T> gae(In<T> rewards, In<T> values, In<T> mask, std::span<const int> starts,
                  double gamma, double lambda) {
  Advantages<T> out{std::vector<T>(rewards.size()), std::vector<T>(rewards.size())};
  for (size_t i = 0; i + 1 < starts.size(); i++) {
    double next_value = 0, next_advantage = 0;
    for (size_t t = size_t(starts[i + 1]); t-- > size_t(starts[i]);) {
      if (mask[t] == 0) continue;
      const double delta = rewards[t] + gamma * next_value - values[t];
      next_advantage = delta + gamma * lambda * next_advantage;
      next_value = values[t];
      out.advantages[t] = T(next_advantage);
      out.returns[t] = T(next_advantage + values[t]);
    }
  }
  return out;
}

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

// 1/n for each of the n sampled tokens of the rollouts that count, so that a sum is their mean.
std::vector<float> mean_weights(const Experience& x, std::span<const Rollout> rollouts) {
  int64_t n = 0;
  for (const Rollout& r : rollouts) n += r.counts ? r.length : 0;
  std::vector<float> weights(x.mask.size(), 0.f);  // (N)
  for (size_t i = 0; i < rollouts.size(); i++) {
    if (rollouts[i].counts) fill(x, i, float(1 / double(n)), weights);
  }
  return weights;
}

template <class T>
struct ValueLoss {
  double loss = 0;
  std::vector<T> dvalue;  // (N)
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
    const bool outside = clip > 0 && !(std::abs(step) <= clip);
    const double held = outside ? old_value[t] + std::clamp(step, -clip, clip) - returns[t] : error;
    const bool clipped = outside && !(held * held <= error * error);  // the loss does not follow v
    out.loss += .5 * w * (clipped ? held * held : error * error);
    out.dvalue[t] = T(clipped ? 0 * held : w * error);
    out.count++;
    out.clipped += clipped;
  }
  return out;
}

Step ppo_step(int64_t n, const StepSettings& s, const PpoSettings& ppo, Prompts& prompts,
              const RolloutOptions& options, const Rewards& rewards, Models& models,
              PretrainingText& text, RlState& state) {
  Step step;
  Experience& x = step.experience;

  // Sample an answer to each prompt, and reward it.
  step.rollouts = roll_out(models, options, next_prompts(prompts, s.rollouts, s.seed), 1,
                           seed_of_rollouts(s.seed, n, 0));
  give_rewards(step.rollouts, rewards, models.seconds);
  step.groups = int64_t(step.rollouts.size());
  step.reward = mean_reward(step.rollouts);

  // Log-probabilities, and the values that the critic predicts.
  x = end_to_end(step.rollouts);
  const std::vector<int> all = numbers_of(step.rollouts);
  x.old_logp = score(*models.policy, x, all, s, models);
  x.value = score(*models.critic, x, all, s, models);
  x.ref_logp = reference_logp(x, all, s, models);
  step.kl = mean_kl(x, all);
  if (!can_learn(step, s)) return step;

  // Advantages: how much better than predicted the answers were.
  std::vector<float> r = token_rewards(x, step.rollouts, state.beta);
  if (ppo.whiten_rewards) whiten(r, x.mask, true);
  const Advantages<float> a = gae(r, x.value, x.mask, x.packed.doc_starts, ppo.gamma, ppo.lambda);
  x.advantage = a.advantages, x.returns = a.returns;
  x.weight = mean_weights(x, step.rollouts);
  whiten(x.advantage, x.weight);
  step.generator = generator_difference(n, x, x.mask);

  // Update both models, a minibatch at a time.
  for (const std::vector<int>& minibatch : minibatches(x, s, n)) {
    const std::vector<Experience> batches = micro_batches(x, minibatch, s.micro_batch_tokens);
    if (n > ppo.critic_warmup) {
      for (const Experience& b : batches) {
        forward(*models.policy, b, s.temperature, models.seconds);
        const PolicyLoss<float> loss = clipped_policy(
            models.policy->logp(), b.old_logp, b.advantage, b.weight, s.clip_low, s.clip_high);
        add_sums(step.sums, b, loss, models.policy->entropy());
        backward(*models.policy, loss.dlogp, {}, entropy_weights(b, s.entropy), models.seconds);
      }
      update_policy(n, s, models, text, state, step.sums);
    }
    for (const Experience& b : batches) {
      forward(*models.critic, b, 1, models.seconds);
      const ValueLoss<float> loss =
          clipped_value(shifted_values(models), b.value, b.returns, b.weight, ppo.value_clip);
      step.sums.value_loss += loss.loss;
      backward(*models.critic, {}, loss.dvalue, {}, models.seconds);
    }
    update_critic(n, s, ppo.critic_lr, models, state, step.sums);
  }
  return step;
}

// =============================================================================================
// GRPO: the other answers to the same prompt are the baseline
//
// A step samples several rollouts of each prompt, a group. All tokens of a rollout have one
// advantage, which compares its reward with those of its group: no critic is needed. Where all
// rewards of a group are equal, it teaches the policy nothing, but for the KL and the entropy in
// the loss.

enum class GroupMethod {
  centered_token_mean,  // r - mean; every token of the step has the same weight
  grpo,                 // Shao et al. 2024
  dr_grpo,              // Liu et al. 2025: neither the spread of a group nor a length divides
  dapo,                 // Yu et al. 2025
  rloo,                 // Kool et al. 2019, Ahmadian et al. 2024
  gspo,                 // Zheng et al. 2025: clipped_sequence_policy
};

struct GrpoSettings {
  int group = 8;  // rollouts of a prompt
  std::string method = "centered_token_mean";
  int resample = -1;      // rounds that may replace groups without variance; -1: 0, dapo 3
  std::string pass_rate;  // LOW:HIGH; empty: all problems are trained on
  int pass_samples = 8;
  int64_t pass_problems = 0;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(GrpoSettings, group, method, resample, pass_rate,
                                                pass_samples, pass_problems)

GroupMethod parse_method(const std::string& name) {
  const std::map<std::string, GroupMethod> methods = {
      {"centered_token_mean", GroupMethod::centered_token_mean},
      {"cake", GroupMethod::centered_token_mean},  // its name in older versions
      {"grpo", GroupMethod::grpo},
      {"dr_grpo", GroupMethod::dr_grpo},
      {"dapo", GroupMethod::dapo},
      {"rloo", GroupMethod::rloo},
      {"gspo", GroupMethod::gspo}};
  const auto it = methods.find(name);
  if (it == methods.end()) {
    fail("--method: found ", name,
         ", expected centered_token_mean, grpo, dr_grpo, dapo, rloo or gspo");
  }
  return it->second;
}

bool has_variance(std::span<const double> rewards) {
  return std::any_of(rewards.begin(), rewards.end(), [&](double r) { return r != rewards[0]; });
}

bool varies(std::span<const Rollout> group) { return has_variance(rewards_of(group)); }

// The rollouts of step n with their rewards. With `resample`, groups whose rewards are all equal
// are replaced by those of other prompts while rounds are left (Yu et al. 2025).
void sample_groups(Step& step, int64_t n, const StepSettings& s, const GrpoSettings& grpo,
                   Prompts& prompts, const RolloutOptions& options, const Rewards& rewards,
                   Models& models) {
  for (int round = 0; round <= grpo.resample && int(step.rollouts.size()) < s.rollouts; round++) {
    const int missing = (s.rollouts - int(step.rollouts.size())) / grpo.group;
    std::vector<Rollout> rollouts =
        roll_out(models, options, next_prompts(prompts, missing, s.seed), grpo.group,
                 seed_of_rollouts(s.seed, n, round));
    give_rewards(rollouts, rewards, models.seconds);
    for (size_t i = 0; i < rollouts.size(); i += size_t(grpo.group)) {
      const std::span<Rollout> group(rollouts.data() + i, size_t(grpo.group));
      if (grpo.resample > 0 && !varies(group)) {
        step.resampled++;
        continue;
      }
      for (Rollout& r : group) {
        r.group = int(step.groups);
        step.rollouts.push_back(std::move(r));
      }
      step.groups++;
    }
  }
}

// One advantage for each rollout of a group from the group's rewards; 0 without variance.
std::vector<double> group_advantages(std::span<const double> rewards, GroupMethod method) {
  const double G = double(rewards.size());
  if (!has_variance(rewards)) return std::vector<double>(rewards.size(), 0.);
  double mean = 0, squares = 0, scale = 1;
  for (const double r : rewards) mean += r / G;
  for (const double r : rewards) squares += (r - mean) * (r - mean);
  using M = GroupMethod;
  if (method == M::grpo || method == M::dapo || method == M::gspo) {
    scale = 1 / (std::sqrt(squares / (G - 1)) + 1e-4);  // Bessel's correction
  }
  if (method == M::rloo) scale = G / (G - 1);  // r - mean of the others
  std::vector<double> advantages;
  for (const double r : rewards) advantages.push_back(scale * (r - mean));
  return advantages;
}

// The weight of one token of each rollout. `lengths`: trained tokens of all B rollouts of the step,
// those of skipped groups too. max_length: the most that a rollout may have.
//   grpo, gspo: mean of the rollouts' means;  rloo: mean of their sums;
//   dr_grpo: sum / (B max_length);  centered_token_mean, dapo: mean over all tokens
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

// The step's (N) advantages and weights, from each group's rewards. Returns the number of groups
// without variance: their advantages are 0, and their weights too, unless `has_other_terms`: the
// KL and the entropy of their tokens are in the loss. `kl_price`: of a response's KL, in its reward
// (RLOO).
int64_t group_by_group(Experience& x, std::span<const Rollout> rollouts, int group_size,
                       GroupMethod method, int max_length, double kl_price, bool has_other_terms) {
  std::vector<int> lengths;
  for (const Rollout& r : rollouts) lengths.push_back(r.counts ? r.length : 0);
  const std::vector<double> each = token_weights(method, lengths, max_length);
  x.advantage.assign(x.mask.size(), 0), x.weight.assign(x.mask.size(), 0);
  int64_t without_variance = 0;
  for (size_t begin = 0; begin < rollouts.size(); begin += size_t(group_size)) {
    std::vector<size_t> members;
    std::vector<double> rewards;
    for (size_t i = begin; i < begin + size_t(group_size); i++) {
      if (!rollouts[i].counts) continue;
      members.push_back(i);
      rewards.push_back(rollouts[i].reward - (kl_price > 0 ? kl_price * kl_of(x, i) : 0));
    }
    if (!has_variance(rewards)) {
      without_variance++;
      if (!has_other_terms) continue;
    }
    const std::vector<double> advantages = group_advantages(rewards, method);
    for (size_t k = 0; k < members.size(); k++) {
      fill(x, members[k], float(advantages[k]), x.advantage);
      fill(x, members[k], float(each[members[k]]), x.weight);
    }
  }
  return without_variance;
}

// GSPO (Zheng et al. 2025): one ratio a rollout, s = exp(mean of l - l_old), the mean weighted by w
// (which is constant within a rollout but where it masks), W the sum of a rollout's weights:
//   L = -sum over rollouts of W min(s A, clip(s) A),  dL/dl_t = -w_t A s, or 0
// Rollout i is [starts[i], starts[i + 1]) of the arrays, and has one advantage.
template <class T = float>
PolicyLoss<T> clipped_sequence_policy(In<T> logp, In<T> old_logp, std::span<const int> starts,
                                      In<T> advantages, In<T> weights, double clip_low,
                                      double clip_high) {
  PolicyLoss<T> out;
  out.dlogp.assign(logp.size(), T(0));
  for (size_t i = 0; i + 1 < starts.size(); i++) {
    double W = 0, log_ratio = 0, A = 0;
    for (size_t t = size_t(starts[i]); t < size_t(starts[i + 1]); t++) {
      if (weights[t] == 0) continue;
      W += weights[t];
      log_ratio += weights[t] * (double(logp[t]) - old_logp[t]);
      A = advantages[t];
    }
    if (W == 0) continue;
    log_ratio /= W;
    const double ratio = std::exp(log_ratio);
    const bool clipped = is_clipped(ratio, A, clip_low, clip_high);
    out.loss -= W * A * (clipped ? std::clamp(ratio, 1 - clip_low, 1 + clip_high) : ratio);
    out.ratios.add(log_ratio, clipped);
    for (size_t t = size_t(starts[i]); t < size_t(starts[i + 1]) && !clipped; t++) {
      if (weights[t] != 0) out.dlogp[t] = T(-weights[t] * A * ratio);
    }
  }
  return out;
}

// Of d = l - l_ref at tokens sampled from the policy (Schulman 2020, Approximating KL Divergence):
// each estimates KL(policy, reference), k1 unbiased, k2 and k3 never negative.
enum class KlEstimator { k1, k2, k3 };

double kl_estimate(KlEstimator k, double d) {
  return k == KlEstimator::k1 ? d : k == KlEstimator::k2 ? d * d / 2 : std::expm1(-d) + d;
}
// dk/dl. As a loss use k2: on policy its gradient is that of the KL. k3's is that of KL(reference,
// policy), and the mean of k1's is 0.
double kl_derivative(KlEstimator k, double d) {
  return k == KlEstimator::k1 ? 1 : k == KlEstimator::k2 ? d : -std::expm1(-d);
}

// L = sum w k(l - l_ref)
template <class T = float>
PolicyLoss<T> kl_loss(KlEstimator k, In<T> logp, In<T> reference, In<T> weights) {
  PolicyLoss<T> out;  // without ratios
  out.dlogp.assign(logp.size(), T(0));
  for (size_t t = 0; t < logp.size(); t++) {
    if (weights[t] == 0) continue;
    const double d = double(logp[t]) - reference[t];
    out.loss += weights[t] * kl_estimate(k, d);
    out.dlogp[t] = T(weights[t] * kl_derivative(k, d));
  }
  return out;
}

Step grpo_step(int64_t n, const StepSettings& s, const GrpoSettings& grpo, Prompts& prompts,
               const RolloutOptions& options, const Rewards& rewards, Models& models,
               PretrainingText& text, RlState& state) {
  Step step;
  Experience& x = step.experience;
  const GroupMethod method = parse_method(grpo.method);
  const double kl_price_in_reward = method == GroupMethod::rloo ? s.beta : 0;
  const double kl_price_in_loss = s.beta - kl_price_in_reward;
  const bool is_used_once = s.minibatches * s.epochs == 1;

  // Sample groups of answers, and reward them.
  sample_groups(step, n, s, grpo, prompts, options, rewards, models);
  step.reward = mean_reward(step.rollouts);

  // Log-probabilities. Experience that is used once gets l_old from the update's own forward pass;
  // until then the generator's serve. Where the KL is only watched, a group in four is enough.
  x = end_to_end(step.rollouts);
  const std::vector<int> all = numbers_of(step.rollouts);
  const bool kl_is_used = s.beta > 0 || s.kl_budget > 0;
  const std::vector<int> watched = numbers_of(step.rollouts, kl_is_used ? 1 : 4);
  x.old_logp = is_used_once ? x.sampled_logp : score(*models.policy, x, all, s, models);
  x.ref_logp = reference_logp(x, watched, s, models);
  step.kl = mean_kl(x, watched);
  if (!can_learn(step, s)) return step;

  // Advantages: how much better than its group an answer was.
  step.without_variance = group_by_group(x, step.rollouts, grpo.group, method, options.max_tokens,
                                         kl_price_in_reward, kl_price_in_loss > 0 || s.entropy > 0);

  // Update the policy, a minibatch at a time.
  for (const std::vector<int>& minibatch : minibatches(x, s, n)) {
    for (Experience& b : micro_batches(x, minibatch, s.micro_batch_tokens)) {
      forward(*models.policy, b, s.temperature, models.seconds);
      const std::span<const float> logp = models.policy->logp();
      if (is_used_once) {  // the ratio is 1
        b.old_logp.assign(logp.begin(), logp.end());
        copy_back(b, logp, x, x.old_logp);
      }
      PolicyLoss<float> loss =
          method == GroupMethod::gspo
              ? clipped_sequence_policy(logp, b.old_logp, b.packed.doc_starts, b.advantage,
                                        b.weight, s.clip_low, s.clip_high)
              : clipped_policy(logp, b.old_logp, b.advantage, b.weight, s.clip_low, s.clip_high);
      add_sums(step.sums, b, loss, models.policy->entropy());
      if (kl_price_in_loss > 0) {
        const KlEstimator k = method == GroupMethod::grpo ? KlEstimator::k3 : KlEstimator::k2;
        const PolicyLoss<float> kl = kl_loss(k, logp, b.ref_logp, b.weight);
        for (size_t t = 0; t < logp.size(); t++)
          loss.dlogp[t] += float(kl_price_in_loss * kl.dlogp[t]);
        step.sums.kl_loss += kl_price_in_loss * kl.loss;
      }
      backward(*models.policy, loss.dlogp, {}, entropy_weights(b, s.entropy), models.seconds);
    }
    if (!step.generator) {
      step.generator = generator_difference(n, x, is_used_once ? x.weight : x.mask);
    }
    update_policy(n, s, models, text, state, step.sums);
  }
  return step;
}

// =============================================================================================
// The pieces: prompts

// How a problem is asked.
struct PromptForm {
  std::string form;                // a text with {question} in place of the chat template
  std::vector<std::string> tools;  // declared to chats that declare none
  std::string system;              // the system message of chats that have none
  bool as_chat = false;            // a "prompt" that is a string is a user's message
};

// The form with a problem's question and, where it has a place for them, its choices. Choices that
// have no place of their own stand below the question.
std::string fill_form(const std::string& form, const Problem& problem) {
  const bool has_place = form.find("{choices}") != std::string::npos;
  const std::pair<std::string_view, std::string> parts[] = {
      {"{question}", has_place ? problem.question : question_with_choices(problem)},
      {"{choices}", list_choices(problem)}};
  std::string text;
  for (size_t i = 0; i < form.size();) {
    const auto part = std::ranges::find_if(
        parts, [&](const auto& p) { return form.compare(i, p.first.size(), p.first) == 0; });
    const bool is_part = part != std::end(parts);
    text += is_part ? part->second : std::string(1, form[i]);
    i += is_part ? part->first.size() : 1;
  }
  return text;
}

Prompt make_prompt(Problem problem, const StageTemplate& chat, const PromptForm& how) {
  Prompt p{std::move(problem)};
  p.raw = p.chat.messages.empty() || !how.form.empty();
  if (!how.form.empty()) {
    p.ids = chat.text_ids(fill_form(how.form, p));
    p.chat = {};
    return p;
  }
  p.question = question_with_choices(p);
  if (p.raw && how.as_chat) p.raw = false, p.chat.messages = {{"user", p.question, {}}};
  if (p.raw) {
    p.ids = chat.text_ids(p.question);
    return p;
  }
  p.chat.messages.back().content = p.question;
  if (p.chat.tools.empty()) p.chat.tools = how.tools;
  if (!how.system.empty() && p.chat.messages.front().role != "system") {
    p.chat.messages.insert(p.chat.messages.begin(), {"system", how.system, {}});
  }
  check_conversation(p.chat, p.where, true);
  p.tools = !p.chat.tools.empty();
  const ChatTemplate& form = chat.get();
  require(!p.tools || form.has_tools(), p.where, ": found tools, which ", form.name(),
          " does not declare, expected a chat template that does, and writes calls between ",
          "<tool_call> and </tool_call>");
  try {
    p.ids = form.render(p.chat, true).ids;
  } catch (const Error& e) {
    fail(p.where, ": ", e.what());
  }
  return p;
}

struct PromptReader {
  const StageTemplate& chat;
  PromptForm how;
  int context = 0, max_tokens = 0;
  RecordOptions options;
  // Throws Error where a reward could not judge answers to the problem.
  std::function<void(const Problem&)> check_problem;

  int64_t records = 0;  // that were read
  LeftOut left_out;
  // How many problems have their question, or what is right, under each key of the files.
  std::map<std::string, int64_t> question_keys, answer_keys;
};

// Of every record, except those that leave no room for an answer in the context. Problems that the
// rewards cannot judge are an error, which counts them and names the first, or are left out as bad
// lines are.
std::vector<Prompt> read_prompts(const std::vector<std::string>& paths, PromptReader& reader) {
  std::vector<Prompt> prompts;
  int64_t too_long = 0, unjudged = 0;
  std::string complaints;  // of the first three
  const auto visit = [&](const Record& record) -> const char* {
    Prompt p = make_prompt(parse_problem(record), reader.chat, reader.how);
    if (int(p.ids.size()) + reader.max_tokens > reader.context) return too_long++, "too long";
    try {
      if (reader.check_problem) reader.check_problem(p);
    } catch (const Error& e) {
      if (reader.options.skip_bad_lines) throw;
      if (++unjudged <= 3) complaints += concat(unjudged > 1 ? "; " : "", e.what());
    }
    reader.question_keys[p.question_key]++;
    if (!p.answer_key.empty()) reader.answer_keys[p.answer_key]++;
    prompts.push_back(std::move(p));
    return nullptr;
  };
  int64_t records = 0;
  try {
    records = for_each_record(paths, reader.options, reader.left_out, visit);
  } catch (const Error& e) {
    if (too_long == 0 || !prompts.empty()) throw;
    fail(e.what(), "; too long: no room for an answer of ", reader.max_tokens,
         " tokens (--max-tokens) within the context of ", reader.context);
  }
  reader.records += records;
  if (unjudged > 0) {
    fail(complaints, unjudged > 3 ? "; ..." : "", ": found ", unjudged, " of ", records,
         " problems that --reward or --gold cannot judge, expected none (--bad-lines skip leaves ",
         "them out, --map answer=KEY reads the answer from the key KEY)");
  }
  return prompts;
}

uint64_t hash_of(std::span<const int> ids) {
  uint64_t h = mix64(0x5f7);
  for (const int id : ids) h = mix64(h ^ uint64_t(id));
  return h;
}
// Of everything that a prompt brings into a run: its ids, its tools, the line that judges read.
uint64_t hash_of(std::span<const Prompt> prompts) {
  uint64_t h = prompts.size();
  for (const Prompt& p : prompts) {
    h = mix64(h, hash_of(std::span(p.ids)), hash64(p.line.dump()) + p.tools);
  }
  return h;
}

// Moves the share `fraction` of the prompts to `held_out`, equal ones together.
void hold_out(std::vector<Prompt>& prompts, double fraction, std::vector<Prompt>& held_out) {
  const auto stays = [&](const Prompt& p) {
    return uniform01(hash_of(std::span(p.ids))) >= fraction;
  };
  const auto middle = std::stable_partition(prompts.begin(), prompts.end(), stays);
  held_out.assign(std::move_iterator(middle), std::move_iterator(prompts.end()));
  prompts.erase(middle, prompts.end());
  if (prompts.empty() || held_out.empty()) {
    fail("--val-fraction: found ", fraction, ", which leaves ", prompts.size(),
         " prompts and holds ", held_out.size(), " out, expected some of both");
  }
}

struct Prompts {
  std::vector<Prompt> all;
  std::vector<int> pool;          // indices into `all` of the prompts that are trained on
  int64_t epoch = 0, cursor = 0;  // how far the steps have gone through the pool
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Prompts, pool, epoch, cursor)

// The order is a function of the seed and the epoch.
std::vector<const Prompt*> next_prompts(Prompts& prompts, int n, uint64_t seed) {
  std::vector<const Prompt*> next;
  std::vector<int> order;
  while (int(next.size()) < n) {
    if (order.empty()) {
      order = prompts.pool;
      Rng rng{mix64(seed, hash64("prompts"), uint64_t(prompts.epoch))};
      shuffle(order, rng);
    }
    next.push_back(&prompts.all[size_t(order[size_t(prompts.cursor)])]);
    if (++prompts.cursor == int64_t(order.size())) {
      prompts.cursor = 0, prompts.epoch++, order.clear();
    }
  }
  return next;
}

// =============================================================================================
// The pieces: rollouts

struct Timed {  // adds the time that it lives
  double& sum;
  double begin = now();
  ~Timed() { sum += now() - begin; }
};

Request rollout_request(const Prompt& p, const RolloutOptions& o, uint64_t seed) {
  Request r{.prompt = p.ids, .max_new = std::min(o.max_tokens, o.context - int(p.ids.size()))};
  r.sampling.temperature = o.temperature;  // and nothing else: what is scored is what is sampled
  r.sampling.seed = seed;
  r.stop_ids = {o.chat->end_token(!p.raw)};
  const auto stop_at = [&](int id) {
    const bool known = std::find(r.stop_ids.begin(), r.stop_ids.end(), id) != r.stop_ids.end();
    if (id >= 0 && !known) r.stop_ids.push_back(id);
  };
  if (p.raw) r.stop_strings = o.stops;
  if (!p.raw) stop_at(o.chat->tokenizer().find_document_separator());
  for (const int id : o.end_tokens) stop_at(id);
  if (p.tools) {
    r.max_inserted = o.tool_tokens;
    r.on_turn = [&o, whole = p.chat](int, std::span<const int> turn) mutable {
      whole.messages.push_back(read_turn(o.chat->get(), turn));
      return answer_calls(o.chat->get(), whole, o.search);
    };
  }
  return r;
}

Rollout make_rollout(const Prompt& p, int group, Completion c, const RolloutOptions& o) {
  Rollout r{.prompt = &p, .group = group, .ids = p.ids, .text = std::move(c.text)};
  r.sampled.resize(p.ids.size()), r.logp.resize(p.ids.size());
  r.ids.insert(r.ids.end(), c.ids.begin(), c.ids.end());
  r.sampled.insert(r.sampled.end(), c.sampled.begin(), c.sampled.end());
  r.logp.insert(r.logp.end(), c.logp.begin(), c.logp.end());
  r.length = int(std::count(r.sampled.begin(), r.sampled.end(), true));
  const bool stopped = c.finish == Finish::stop_token || c.finish == Finish::stop_string;
  r.ended = p.raw ? stopped || o.stops.empty() : stopped && r.ids.back() == o.chat->end_token(true);
  return r;
}

// The most tokens that an answer to the prompt may have, the prompt among them.
int64_t longest_answer(const Prompt& p, const RolloutOptions& o) {
  const int64_t all = int64_t(p.ids.size()) + o.max_tokens + (p.tools ? o.tool_tokens : 0);
  return std::min<int64_t>(all, o.context);
}
// For answers of up to `longest` tokens, `all` in number.
GeneratorOptions rollout_generator(const RolloutOptions& o, int64_t longest, int all) {
  GeneratorOptions options{.rows = std::min(o.rows, all), .context = o.context};
  options.cache_positions =
      cache_positions(options.rows, longest, o.cache_bytes, o.cache_page_bytes);
  return options;
}

// A draw is a function of the seed, the prompt's place, the copy and the position alone.
std::vector<Rollout> roll_out(Models& models, const RolloutOptions& o,
                              std::span<const Prompt* const> prompts, int copies, uint64_t seed) {
  const Timed timed{models.seconds.decode};
  Gpt& gpt = *models.policy;
  const int all = int(prompts.size()) * copies;
  int64_t longest = 1;
  for (const Prompt* p : prompts) longest = std::max(longest, longest_answer(*p, o));
  Generator generator(
      gpt, [&](int id) { return o.chat->tokenizer().token_bytes(id); },
      rollout_generator(o, longest, all));
  for (size_t i = 0; i < prompts.size(); i++) {
    for (int k = 0; k < copies; k++) {
      Request request = rollout_request(*prompts[i], o, mix64(seed, i, uint64_t(k)));
      request.sampling.stream = i * size_t(copies) + size_t(k);
      generator.submit(std::move(request));
    }
  }
  while (generator.step()) stop_if_signalled();
  std::vector<Rollout> rollouts;
  for (int n = 0; n < all; n++) {
    rollouts.push_back(make_rollout(*prompts[size_t(n / copies)], n / copies, generator.pop(n), o));
  }
  return rollouts;
}

// =============================================================================================
// The pieces: rewards, several functions, each with a weight

// "NAME", "NAME:ARGUMENT", and "WEIGHT*" before either.
struct RewardSpec {
  std::string name, argument;
  double weight = 1;

  bool is_program() const { return name == "command" || name == "check"; }
};
struct RewardFunction {
  RewardSpec spec;
  bool is_pass_fail = false;  // 1 is right, 0 wrong: what pass@k counts
  std::function<std::vector<float>(std::span<const Rollout>)> score;  // NaN: failed
  std::function<void(const Problem&)> check_problem, try_out;         // see Verifier
  std::string label;                                                  // in metrics
};
struct Rewards {
  std::vector<RewardFunction> functions;
  int verifier = -1;  // the function of the largest weight, if it is pass or fail; -1: it is not
  std::optional<RewardFunction> gold;                // judges held-out answers, is never trained on
  std::vector<std::shared_ptr<RewardModel>> models;  // all that are loaded
  std::string truncated = "penalise";                // answers that were cut off: see --truncated
  double truncated_reward = 0;
};

// The number that is the whole text; NaN: it is none.
double parse_number(std::string_view text) {
  double x = 0;
  const char* end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, x);
  const bool is_number = read.ec == std::errc() && read.ptr == end && std::isfinite(x);
  return is_number ? x : std::numeric_limits<double>::quiet_NaN();
}

RewardSpec parse_reward(std::string text) {
  RewardSpec spec;
  if (const size_t star = text.find('*'); star != std::string::npos && star < text.find(':')) {
    spec.weight = parse_number(text.substr(0, star));
    if (std::isnan(spec.weight)) {
      fail("--reward ", text, ": found weight \"", text.substr(0, star), "\", expected a number");
    }
    text.erase(0, star + 1);
  }
  const size_t colon = text.find(':');
  spec.name = text.substr(0, colon);
  if (colon != std::string::npos) spec.argument = text.substr(colon + 1);
  return spec;
}

struct RewardContext {
  const StageTemplate& chat;  // the policy's
  std::filesystem::path policy_dir;
  int max_tokens;
  Device device;
  CommandLimits limits;
  int64_t micro_batch_tokens = 4096;
};

// What a reward model reads of a rollout, within its context.
std::vector<int> ids_to_score(const Rollout& r, const StageTemplate& chat, int context) {
  const int end = chat.end_token(!r.prompt->raw);
  std::vector<int> ids = with_end(r.ids, end);
  if (int(ids.size()) > context) ids.resize(size_t(context)), ids.back() = end;
  return ids;
}

// The score of a reward model, or the probability that its label is the good one.
RewardFunction model_reward(const RewardSpec& spec, const RewardContext& context,
                            std::vector<std::shared_ptr<RewardModel>>& models) {
  const auto model =
      std::make_shared<RewardModel>(spec.argument, context.device, context.micro_batch_tokens);
  model->check_tokenizer(context.chat.tokenizer(), context.policy_dir);
  models.push_back(model);
  const int T = model->gpt().config().T;
  // A score is the log-odds of a label unless it was moved to mean 0.
  const bool probability = spec.name == "probability";
  if (probability && model->shifted()) {
    fail("--reward probability: ", spec.argument, ": its scores were normalised, expected ",
         "./reward train --normalise-on none");
  }
  return {spec, false,
          [model, chat = context.chat, T, probability](std::span<const Rollout> rollouts) {
            std::vector<std::vector<int>> sequences;
            for (const Rollout& r : rollouts) sequences.push_back(ids_to_score(r, chat, T));
            std::vector<float> scores = model->score(sequences);
            if (probability) {
              for (float& x : scores) x = 1 / (1 + std::exp(-x));
            }
            return scores;
          }};
}

// `models`: every reward model that is loaded is added to them.
RewardFunction make_reward(const RewardSpec& spec, const RewardContext& context,
                           std::vector<std::shared_ptr<RewardModel>>& models) {
  const auto for_each_rollout = [&](auto score) {
    return RewardFunction{spec, false, [score](std::span<const Rollout> rollouts) {
                            std::vector<float> out;
                            for (const Rollout& r : rollouts) out.push_back(float(score(r)));
                            return out;
                          }};
  };
  const auto need_argument = [&](const char* what) {
    if (spec.argument.empty()) fail("--reward ", spec.name, ": expected ", spec.name, ":", what);
  };
  if (const auto v = make_verifier(spec.name, spec.argument, context.limits)) {
    return {spec, v->is_pass_fail,
            [score = v->score](std::span<const Rollout> rollouts) {
              std::vector<Attempt> attempts;
              for (const Rollout& r : rollouts) attempts.push_back({r.prompt, r.text, r.ended});
              return score(attempts);
            },
            v->check_problem, v->try_out};
  }
  if (spec.name == "length") {  // 0 up to so many tokens, then down to -1 at the longest (DAPO)
    need_argument("TOKENS that are free");
    const double free = parse_number(spec.argument), most = context.max_tokens;
    if (!(free >= 0 && free < most)) {
      fail("--reward length: found ", spec.argument, ", expected 0 to ", most, " (--max-tokens)");
    }
    return for_each_rollout([free, most](const Rollout& r) {
      return -std::clamp((r.length - free) / (most - free), 0., 1.);
    });
  }
  if (spec.name == "ended") return for_each_rollout([](const Rollout& r) { return r.ended; });
  if (spec.name == "model" || spec.name == "probability") {
    need_argument("DIRECTORY of a reward model");
    return model_reward(spec, context, models);
  }
  fail("--reward: found ", spec.name,
       ", expected number, exact, choice, countdown, check:COMMAND, command:COMMAND, rubric, "
       "format:PATTERN, length:TOKENS, ended, model:DIRECTORY or probability:DIRECTORY");
}

// Adds a function, under a label that no other has.
void add_reward(Rewards& rewards, RewardFunction f) {
  const RewardSpec& spec = f.spec;
  f.label =
      spec.argument.empty() || spec.is_program() ? spec.name : spec.name + ":" + spec.argument;
  const auto is_same = [&](const RewardFunction& g) {
    return g.label == f.label || g.label.starts_with(f.label + " ");
  };
  const auto n = std::ranges::count_if(rewards.functions, is_same);
  if (n > 0) f.label += concat(" ", n + 1);
  rewards.functions.push_back(std::move(f));
}

int verifier_of(std::span<const RewardFunction> functions) {
  size_t heaviest = 0;
  for (size_t i = 1; i < functions.size(); i++) {
    const double most = std::abs(functions[heaviest].spec.weight);
    if (std::abs(functions[i].spec.weight) > most) heaviest = i;
  }
  return !functions.empty() && functions[heaviest].is_pass_fail ? int(heaviest) : -1;
}

// Fails where a problem lacks what one of its judges needs.
void check_problem(const Rewards& rewards, const Problem& problem) {
  for (const RewardFunction& f : rewards.functions) {
    if (f.check_problem) f.check_problem(problem);
  }
  if (rewards.gold && rewards.gold->check_problem) rewards.gold->check_problem(problem);
}

// Before the run: a user's program works.
void try_programs(const Rewards& rewards, const Problem& problem) {
  for (const RewardFunction& f : rewards.functions) {
    if (f.try_out) f.try_out(problem);
  }
  if (rewards.gold && rewards.gold->try_out) rewards.gold->try_out(problem);
}

// An answer that was cut off gets its own reward, `most`, or the lowest reward of the finished
// answers to the same prompt, whichever is lowest: to go on without an end never pays. Where each
// prompt has one rollout, it is compared with all finished answers.
void penalise_truncated(std::span<Rollout> rollouts, double most) {
  const bool is_alone = !rollouts.empty() && size_t(rollouts.back().group) + 1 == rollouts.size();
  std::map<int, double> lowest;  // of the finished answers of each group
  for (const Rollout& r : rollouts) {
    if (!r.ended || r.failed()) continue;
    const auto it = lowest.try_emplace(is_alone ? 0 : r.group, r.reward).first;
    it->second = std::min(it->second, r.reward);
  }
  for (Rollout& r : rollouts) {
    if (r.ended || r.failed()) continue;
    r.reward = std::min(r.reward, most);
    const auto it = lowest.find(is_alone ? 0 : r.group);
    if (it != lowest.end()) r.reward = std::min(r.reward, it->second);
  }
}

void give_rewards(std::span<Rollout> rollouts, const Rewards& rewards, Seconds& seconds) {
  const Timed timed{seconds.rewards};
  for (Rollout& r : rollouts) r.reward = 0, r.rewards.clear();
  for (const RewardFunction& f : rewards.functions) {
    const std::vector<float> values = f.score(rollouts);
    for (size_t i = 0; i < rollouts.size(); i++) {
      rollouts[i].rewards.push_back(values[i]);
      rollouts[i].reward += f.spec.weight * values[i];
    }
  }
  if (rewards.truncated == "penalise") penalise_truncated(rollouts, rewards.truncated_reward);
  for (Rollout& r : rollouts) {
    r.counts = !r.failed() && (r.ended || rewards.truncated != "mask");
  }
}

template <class Values>
MeanAndSpread mean_and_spread(const Values& values) {  // of those that are finite
  MeanAndSpread m;
  for (const auto x : values) {  // Welford's running mean
    if (!std::isfinite(x)) continue;
    const double off = double(x) - m.mean;
    m.mean += off / double(++m.n);
    m.squares += off * (double(x) - m.mean);
  }
  m.spread = m.n > 1 ? std::sqrt(m.squares / double(m.n - 1)) : 0;
  return m;
}

std::vector<double> rewards_of(std::span<const Rollout> rollouts) {
  std::vector<double> rewards;
  for (const Rollout& r : rollouts)
    if (r.counts) rewards.push_back(r.reward);
  return rewards;
}

MeanAndSpread mean_reward(std::span<const Rollout> rollouts) {
  return mean_and_spread(rewards_of(rollouts));
}

// =============================================================================================
// The pieces: rollouts end to end, their log-probabilities and values

Experience end_to_end(std::span<const Rollout> rollouts) {
  Experience x;
  for (size_t i = 0; i < rollouts.size(); i++) {
    const Rollout& r = rollouts[i];
    x.packed.add(int(i), r.ids, r.ids.size() - 1, [&](size_t p) { return bool(r.sampled[p]); });
    for (size_t p = 1; p < r.ids.size(); p++) {
      x.mask.push_back(r.sampled[p]);
      x.sampled_logp.push_back(r.logp[p]);
    }
  }
  return x;
}

std::vector<int> numbers_of(std::span<const Rollout> rollouts, int every) {
  std::vector<int> numbers;
  for (size_t i = 0; i < rollouts.size(); i++)
    if (rollouts[i].group % every == 0) numbers.push_back(int(i));
  return numbers;
}

std::vector<Experience> micro_batches(const Experience& x, std::span<const int> rollouts,
                                      int64_t limit) {
  std::vector<Experience> batches;
  for (const int i : rollouts) {
    const auto begin = long(x.packed.begin(size_t(i))), end = long(x.packed.last(size_t(i))) + 1;
    Experience& b = batch_with_room(batches, end - begin, limit);
    const auto append = [&](const auto& src, auto& dst) {
      if (!src.empty()) dst.insert(dst.end(), src.begin() + begin, src.begin() + end);
    };
    append(x.packed.tokens, b.packed.tokens), append(x.packed.targets, b.packed.targets);
    b.packed.doc_starts.push_back(int(b.packed.tokens.size()));
    b.packed.members.push_back(i);
    append(x.mask, b.mask), append(x.sampled_logp, b.sampled_logp);
    append(x.old_logp, b.old_logp), append(x.ref_logp, b.ref_logp), append(x.value, b.value);
    append(x.advantage, b.advantage), append(x.returns, b.returns), append(x.weight, b.weight);
  }
  return batches;
}

void fill(const Experience& x, size_t rollout, float value, std::vector<float>& dst) {
  for (size_t n = x.packed.begin(rollout); n <= x.packed.last(rollout); n++) {
    dst[n] = x.mask[n] * value;
  }
}

void copy_back(const Experience& b, std::span<const float> values, const Experience& x,
               std::vector<float>& dst) {
  for (size_t i = 0; i < b.packed.members.size(); i++) {
    const size_t n = b.packed.last(i) + 1 - b.packed.begin(i);
    const auto part = values.subspan(b.packed.begin(i), n);
    std::copy(part.begin(), part.end(),
              dst.begin() + long(x.packed.begin(size_t(b.packed.members[i]))));
  }
}

std::vector<float> shifted_values(const Models& models) {
  const std::span<const float> value = models.critic->value();
  std::vector<float> values(value.begin(), value.end());
  for (float& v : values) v += models.critic_shift;
  return values;
}

std::vector<float> score(Gpt& gpt, const Experience& x, std::span<const int> rollouts,
                         const StepSettings& s, Models& models) {
  const Timed timed{models.seconds.forward};
  std::vector<float> out(x.mask.size(), 0.f);  // (N)
  for (const Experience& b : micro_batches(x, rollouts, s.micro_batch_tokens)) {
    stop_if_signalled();
    gpt.forward(b.packed.batch(float(s.temperature)), Pass::score);
    if (gpt.config().head == Head::scalar) {
      copy_back(b, shifted_values(models), x, out);
    } else {
      copy_back(b, gpt.logp(), x, out);
    }
  }
  return out;
}

std::vector<float> reference_logp(const Experience& x, std::span<const int> rollouts,
                                  const StepSettings& s, Models& models) {
  if (models.reference) return score(*models.reference, x, rollouts, s, models);
  models.policy->use_adapters(false);
  std::vector<float> logp = score(*models.policy, x, rollouts, s, models);
  models.policy->use_adapters(true);
  return logp;
}

double kl_of(const Experience& x, size_t rollout) {
  double sum = 0;
  for (size_t n = x.packed.begin(rollout); n <= x.packed.last(rollout); n++) {
    sum += double(x.old_logp[n]) - x.ref_logp[n];
  }
  return sum;
}
double mean_kl(const Experience& x, std::span<const int> rollouts) {
  double sum = 0;
  for (const int i : rollouts) sum += kl_of(x, size_t(i));
  return sum / double(std::max<size_t>(1, rollouts.size()));
}

MeanAndSpread kl_by_prompt(std::span<const Rollout> rollouts, const StepSettings& s,
                           Models& models) {
  Experience x = end_to_end(rollouts);
  const std::vector<int> all = numbers_of(rollouts);
  x.old_logp = score(*models.policy, x, all, s, models);
  x.ref_logp = reference_logp(x, all, s, models);
  std::map<int, std::vector<int>> groups;
  for (const int i : all) groups[rollouts[size_t(i)].group].push_back(i);
  std::vector<double> means;
  for (const auto& of : groups) means.push_back(mean_kl(x, of.second));
  return mean_and_spread(means);
}

// What is scored must be what was sampled from: equal on the CPU, near it in bf16. Other settings
// in one than in the other would bias every gradient. `off`: a mean difference of
// log-probabilities. A run warns above the first bound, and ends above the second.
constexpr double kLargeDifference = .02, kLargestDifference = .2;

void expect_agreement(int64_t n, const char* what, double off) {
  if (off <= kLargestDifference) return;
  fail("step ", n, ": ", what, ": found ", off, ", expected ", kLargestDifference,
       " at most: what is scored is not what was sampled from");
}

Difference generator_difference(int64_t n, const Experience& x, std::span<const float> weight) {
  double sum = 0, largest = 0, tokens = 0;
  for (size_t t = 0; t < weight.size(); t++) {
    if (weight[t] == 0) continue;
    const double off = std::abs(double(x.old_logp[t]) - x.sampled_logp[t]);
    sum += off, tokens++, largest = off <= largest ? largest : off;
  }
  const double mean = tokens > 0 ? sum / tokens : 0;
  expect_agreement(n, "mean difference of the log-probabilities of generator and forward pass",
                   mean);
  return {mean, largest};
}

// =============================================================================================
// The pieces: minibatches and updates

bool is_within(const StepSettings& s, double kl) { return s.kl_budget <= 0 || kl <= s.kl_budget; }

bool can_learn(const Step& step, const StepSettings& s) {
  const bool teaches = step.reward.spread > 0 || (step.reward.n > 0 && has_kl_or_entropy(s));
  return teaches && std::isfinite(step.kl) && is_within(s, step.kl);
}

std::vector<std::vector<int>> minibatches(Experience& x, const StepSettings& s, int64_t n) {
  std::vector<int> trained;  // rollouts with a weight
  for (size_t i = 0; i + 1 < x.packed.doc_starts.size(); i++) {
    const auto begin = x.weight.begin() + long(x.packed.begin(i));
    const auto end = x.weight.begin() + long(x.packed.last(i)) + 1;
    if (std::any_of(begin, end, [](float w) { return w > 0; })) trained.push_back(int(i));
  }
  // Weights are of the step's mean; each of M minibatches stands for the whole step.
  const size_t all = trained.size(), M = std::min(size_t(s.minibatches), all);
  for (float& w : x.weight) w *= float(M);
  std::vector<std::vector<int>> parts;
  for (int epoch = 0; epoch < s.epochs && all > 0; epoch++) {
    if (s.minibatches * s.epochs > 1) {
      Rng rng{mix64(mix64(s.seed, hash64("minibatches")), uint64_t(n), uint64_t(epoch))};
      shuffle(trained, rng);
    }
    for (size_t m = 0; m < M; m++) {
      parts.emplace_back(trained.begin() + long(m * all / M),
                         trained.begin() + long((m + 1) * all / M));
    }
  }
  return parts;
}

void forward(Gpt& gpt, const Experience& b, double temperature, Seconds& seconds) {
  const Timed timed{seconds.forward};
  gpt.forward(b.packed.batch(float(temperature)), Pass::train);
}

std::vector<float> entropy_weights(const Experience& b, double entropy) {
  std::vector<float> dentropy;
  if (entropy > 0) dentropy = b.weight;
  for (float& w : dentropy) w *= -float(entropy);
  return dentropy;
}

void backward(Gpt& gpt, std::span<const float> dlogp, std::span<const float> dvalue,
              std::span<const float> dentropy, Seconds& seconds) {
  const Timed timed{seconds.backward};
  gpt.backward(dlogp, dvalue, dentropy);
}

// Pretraining text whose loss is mixed in against forgetting (Ouyang et al. 2022, "PPO-ptx").
struct PretrainingText {
  std::unique_ptr<TokenStream> stream;  // null: none
  std::unique_ptr<Loader> loader;
  double weight = 0;   // of its mean loss
  int64_t tokens = 0;  // an update
};

// Adds the gradient of text.weight times the mean loss of some pretraining text; returns that loss.
double add_pretraining_gradient(Models& models, PretrainingText& text) {
  const Timed timed{models.seconds.backward};
  std::vector<int> tokens, targets, starts;
  const int64_t T = text.loader->window_length();
  const int64_t windows = std::max<int64_t>(1, text.tokens / T);
  double loss = 0;
  for (int64_t w = 0; w < windows; w++) {
    text.loader->next(1, tokens, targets, starts);
    const std::vector<float> dlogp(targets.size(), -float(text.weight / double(windows * T)));
    models.policy->forward_backward({tokens, targets, starts}, dlogp);
    for (const float logp : models.policy->logp()) loss -= logp / double(windows * T);
  }
  return loss;
}

OptimizerStep step_of(const OptimizerFlags& o, int64_t update, const StepSettings& s, int64_t n) {
  return optimizer_step(o, update, make_schedule(o, s.steps).at(n));
}

void update_policy(int64_t n, const StepSettings& s, Models& models, PretrainingText& text,
                   RlState& state, UpdateSums& sums) {
  // k3 is half the square of rho - 1 where that is small. Exactly 0 on the CPU.
  if (sums.updates == 0) {
    sums.first_ratio = std::sqrt(2 * std::abs(sums.ratios.mean_k3()));
    expect_agreement(n, "distance of the first minibatch's ratios from 1", sums.first_ratio);
  }
  if (text.loader) sums.text_loss += add_pretraining_gradient(models, text);
  const Timed timed{models.seconds.update};
  models.policy->update(step_of(s.optimizer, ++state.updates, s, n));
  const UpdateStats stats = models.policy->stats();
  sums.grad_norm += stats.grad_norm;
  sums.skipped |= stats.skipped;
  sums.updates++;
}

void update_critic(int64_t n, const StepSettings& s, double lr, Models& models, RlState& state,
                   UpdateSums& sums) {
  const Timed timed{models.seconds.update};
  OptimizerFlags optimizer = s.optimizer;
  optimizer.lr = lr;
  models.critic->update(step_of(optimizer, ++state.critic_updates, s, n));
  const UpdateStats stats = models.critic->stats();
  sums.critic_norm += stats.grad_norm;
  sums.critic_skipped |= stats.skipped;
  sums.critic_updates++;
}

// =============================================================================================
// Metrics: what a step and an evaluation tell

// Signs of reward hacking that show before the reward does.
struct Canaries {
  double length = 0, longest = 0;  // sampled tokens: mean, most
  double ended = 0;                // share that was not cut off
  double repetition = 0;   // share of three tokens in a row that came before in the same answer
  double correlation = 0;  // of reward and length
};
double repetition_of(const Rollout& r) {
  std::vector<int> ids;
  for (size_t p = 0; p < r.ids.size(); p++)
    if (r.sampled[p]) ids.push_back(r.ids[p]);
  std::set<std::array<int, 3>> seen;
  int n = 0;
  for (size_t i = 0; i + 2 < ids.size(); i++, n++) seen.insert({ids[i], ids[i + 1], ids[i + 2]});
  return n > 0 ? 1 - double(seen.size()) / n : 0;
}
Canaries canaries_of(std::span<const Rollout> rollouts) {
  Canaries c;
  const double n = double(std::max<size_t>(1, rollouts.size()));
  std::vector<double> lengths, rewards;
  for (const Rollout& r : rollouts) {
    c.length += r.length;
    c.longest = std::max(c.longest, double(r.length));
    c.ended += r.ended;
    c.repetition += repetition_of(r);
    if (!r.failed()) lengths.push_back(r.length), rewards.push_back(r.reward);
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

// 1 - Var(R - V) / Var(R) over what has a weight: 1 for a perfect critic, 0 for one that always
// predicts the mean. NaN where a return or a value is not finite.
template <class T = float>
double explained_variance(In<T> values, In<T> returns, In<T> weights) {
  std::vector<double> all, rest;
  for (size_t t = 0; t < values.size(); t++) {
    if (weights[t] == 0) continue;
    all.push_back(returns[t]), rest.push_back(double(returns[t]) - values[t]);
    if (!std::isfinite(rest.back())) return std::numeric_limits<double>::quiet_NaN();
  }
  const double squares = mean_and_spread(all).squares;
  return squares > 0 ? 1 - mean_and_spread(rest).squares / squares : 0;
}

OrderedJson ppo_metrics(const Step& step) {
  const double updates = double(std::max<int64_t>(1, step.sums.critic_updates));
  const Experience& x = step.experience;
  return {{"explained_variance",
           x.returns.empty() ? 0. : explained_variance(x.value, x.returns, x.weight)},
          {"value_loss", step.sums.value_loss / updates},
          {"critic_grad_norm", step.sums.critic_norm / updates}};
}
OrderedJson grpo_metrics(const Step& step) {
  return {
      {"no_variance", double(step.without_variance) / double(std::max<int64_t>(1, step.groups))},
      {"resampled", step.resampled}};
}

OrderedJson seconds_json(const Seconds& s) {
  return {{"seconds_decode", s.decode},
          {"seconds_forward", s.forward},
          {"seconds_backward", s.backward},
          {"seconds_update", s.update},
          {"seconds_rewards", s.rewards}};
}

// Of a step; `own`: those of PPO or GRPO alone.
StepResult step_result(const Step& step, const Rewards& rewards, double beta, const Seconds& s,
                       const OrderedJson& own) {
  const Canaries c = canaries_of(step.rollouts);
  const UpdateSums& u = step.sums;
  const double n = double(std::max<size_t>(1, step.rollouts.size()));
  const double updates = double(std::max<int64_t>(1, u.updates));
  const double entropy = u.tokens > 0 ? u.entropy / double(u.tokens) : 0;
  const auto truncated = double(std::ranges::count(step.rollouts, false, &Rollout::ended));
  OrderedJson m;
  if (step.generator) {
    m["generator_off"] = {{"mean", step.generator->mean}, {"largest", step.generator->largest}};
  }
  m["reward"] = step.reward.mean, m["reward_std"] = step.reward.spread;
  for (size_t f = 0; f < rewards.functions.size(); f++) {
    std::vector<float> values;
    for (const Rollout& r : step.rollouts) values.push_back(r.rewards[f]);
    const MeanAndSpread of = mean_and_spread(values);
    m["rewards"][rewards.functions[f].label] = {{"mean", of.mean}, {"std", of.spread}};
  }
  m["kl"] = step.kl, m["kl_token"] = c.length > 0 ? step.kl / c.length : 0;
  m["beta"] = beta;
  m["loss"] = u.loss / updates, m["kl_loss"] = u.kl_loss / updates;
  m["grad_norm"] = u.grad_norm / updates;
  if (u.text_loss != 0) m["ptx_loss"] = u.text_loss / updates;
  if (u.first_ratio != 0) m["first_ratio_off"] = u.first_ratio;
  if (u.critic_skipped) m["critic_skipped"] = true;
  m["entropy"] = entropy;
  m["clipped"] = u.ratios.clipped_share(), m["ratio_off"] = u.ratios.largest;
  m.update(own);
  m["length"] = c.length, m["longest"] = c.longest;
  m["truncated"] = truncated / n, m["ended"] = c.ended;
  m["repetition"] = c.repetition, m["reward_length_correlation"] = c.correlation;
  m["failed"] = std::ranges::count_if(step.rollouts, &Rollout::failed);
  m.update(seconds_json(s));

  std::string line = format("reward %.3f  kl %.2f  entropy %.2f  length %.0f", step.reward.mean,
                            step.kl, entropy, c.length);
  if (truncated > 0) line += format("  cut off %.0f%%", 100 * truncated / n);
  if (own.contains("no_variance")) {
    line += format("  no variance %.0f%%", 100 * own.at("no_variance").get<double>());
  }
  return {.metrics = m, .line = line, .skipped = u.skipped || u.critic_skipped};
}

// Two completions: that of the highest reward and that of the lowest.
void show(ProgressLine& line, std::span<const Rollout> rollouts) {
  const auto less = [](const Rollout& a, const Rollout& b) { return a.reward < b.reward; };
  if (rollouts.empty()) return;
  const auto both = std::minmax_element(rollouts.begin(), rollouts.end(), less);
  const auto shortened = [](std::string text) {
    if (text.size() > 400) text = text.substr(0, 400) + "...";
    return indented(text);
  };
  for (const Rollout* r : {&*both.second, &*both.first}) {
    line.note("asked   " + shortened(r->prompt->question));
    line.note(format("%-7.2f ", r->reward) + shortened(r->text) + (r->ended ? "" : " [cut off]"));
  }
}

// =============================================================================================
// The run: reads, plans, makes the models, takes the steps (cake/training.h), evaluates

struct DataSettings {
  std::string model, form, system, search;  // search: documents
  bool as_chat = false;
  StageTemplateFlags chat_template;
  RecordOptions records;    // of prompts and val
  double val_fraction = 0;  // of the prompts, held out in place of `val`
  std::vector<std::string> prompts, val, tools;
  int max_tokens = 128, rows = 128;  // of an answer; answers decoded at once
  int cache_mb = 2048;               // keys and values of the answers that are decoded
  int64_t context = 0;               // tokens of the longest rollout; 0: choose_context()
  std::vector<std::string> stops;
  std::vector<std::string> rewards;
  std::string gold, truncated = "penalise";
  double truncated_reward = 0;
  double command_seconds = 10, command_start_seconds = 60;  // a line; more for the first
  double command_memory = 4;                                // GB; 0: any
  int command_processes = 64, verifiers = 1;
  std::string ptx;  // prefix of token shards
  double ptx_weight = 27.8;
  int64_t ptx_tokens = 2048;
  int lora = 0;
  double lora_alpha = 32;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(DataSettings, model, form, system, search, as_chat,
                                                chat_template, records, val_fraction, prompts, val,
                                                tools, max_tokens, rows, cache_mb, context, stops,
                                                rewards, gold, truncated, truncated_reward,
                                                command_seconds, command_start_seconds,
                                                command_memory, command_processes, verifiers, ptx,
                                                ptx_weight, ptx_tokens, lora, lora_alpha)

struct EvaluationSettings {
  int eval_prompts = 0, eval_samples = 8;  // held-out prompts at the end, 0: all; answers to each
  int eval_some = 64;                      // held-out prompts during the run
  int64_t eval_every = 0;                  // steps; 0: a fifth of the run
  std::vector<double> eval_at_kl;          // also when sqrt(KL) passes each of these
  std::string keep;                        // best or last weights; empty: the stage chooses
  bool no_rollouts = false;                // RUN/rollouts.jsonl is not written
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(EvaluationSettings, eval_prompts, eval_samples,
                                                eval_some, eval_every, eval_at_kl, keep,
                                                no_rollouts)

struct RlSettings {
  DataSettings data;
  StepSettings step;
  PpoSettings ppo;
  GrpoSettings grpo;
  EvaluationSettings evaluation;
  Budget budget;  // --steps or --minutes; step.steps follows from it
};
// In JSON the parts lie side by side in one object.
void to_json(Json& json, const RlSettings& s) {
  json = s.data;
  for (const Json& part : {Json(s.step), Json(s.ppo), Json(s.grpo), Json(s.evaluation)}) {
    json.update(part);
  }
  json["budget"] = s.budget;
}
// Older versions kept --form, --stop and the patterns of format: as they were typed, with \n for a
// line break.
void read_old_line_breaks(DataSettings& d) {
  const auto read = [](std::string& text) {
    for (size_t i; (i = text.find("\\n")) != std::string::npos;) text.replace(i, 2, "\n");
  };
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(d.form, ignored)) read(d.form);
  std::ranges::for_each(d.stops, read);
  for (std::string& reward : d.rewards)
    if (reward.find("format:") != std::string::npos) read(reward);
  if (d.gold.find("format:") != std::string::npos) read(d.gold);
}
void from_json(const Json& json, RlSettings& s) {
  json.get_to(s.data), json.get_to(s.step), json.get_to(s.ppo), json.get_to(s.grpo);
  json.get_to(s.evaluation);
  if (!json.contains("records")) read_old_line_breaks(s.data);
  s.budget = {.steps = s.step.steps};  // all that older versions knew
  if (const auto it = json.find("budget"); it != json.end()) {
    s.budget.steps = it->value("steps", s.step.steps), s.budget.minutes = it->value("minutes", 0.);
  }
}

const char* kRollouts = "rollouts.jsonl";  // beside metrics.jsonl

// What a run of PPO, GRPO or best-of-n holds.
struct RlParts {
  RlSettings s;
  Run run;
  std::filesystem::path start;  // of the model that the run begins with: policy and reference
  Config config;
  Tokenizer tokenizer;
  StageTemplate chat;
  Prompts prompts;
  std::vector<Prompt> held_out;
  std::optional<Search> search;
  RolloutOptions options;
  Rewards rewards;
  bool has_critic = false;  // PPO's
  Models models;
  AdapterBase base;  // of the policy's adapters
  PretrainingText text;
  OrderedJson model_names;  // path and hash of the reference and the reward models
  OrderedJson data_hashes;  // of prompts, held-out prompts and documents
  RlState state;
  std::optional<Metrics> rollouts;         // rollouts.jsonl, once it is open
  std::string rollout_lines;               // of the last step, to be written
  bool has_warned = false;                 // of log-probabilities that differ
  std::vector<std::vector<float>> within;  // the weights of state.within_step, of trained tensors
  double kl = 0;                           // of the last step
  Seconds seconds;                         // of the steps since the process began
};

template <class T>
void at_least(const char* flag, T found, std::type_identity_t<T> least) {
  if (!(found >= least)) fail(flag, ": found ", found, ", expected at least ", least);
}
void is_share(const char* flag, double found) {
  if (!(found >= 0 && found <= 1)) fail(flag, ": found ", found, ", expected 0 to 1");
}
void is_positive(const char* flag, double found) {
  if (!(found > 0)) fail(flag, ": found ", found, ", expected above 0");
}

void check_data(const DataSettings& d) {
  at_least("--max-tokens", d.max_tokens, 1), at_least("--rows", d.rows, 1);
  at_least("--cache-mb", d.cache_mb, 1);
  at_least("--verifiers", d.verifiers, 1), is_positive("--command-seconds", d.command_seconds);
  at_least("--command-start-seconds", d.command_start_seconds, 0);
  at_least("--command-memory", d.command_memory, 0);
  at_least("--command-processes", d.command_processes, 1);
  at_least("--lora", d.lora, 0), is_positive("--lora-alpha", d.lora_alpha);
  at_least("--ptx-weight", d.ptx_weight, 0), at_least("--ptx-tokens", d.ptx_tokens, 1);
  if (d.truncated != "penalise" && d.truncated != "mask" && d.truncated != "keep") {
    fail("--truncated: found ", d.truncated, ", expected penalise, mask or keep");
  }
  for (const std::string& stop : d.stops) {
    if (stop.empty()) fail("--stop: found \"\", expected some text");
  }
  if (!(d.val_fraction >= 0 && d.val_fraction < 1)) {
    fail("--val-fraction: found ", d.val_fraction, ", expected 0 or more and less than 1");
  }
  if (d.val_fraction > 0 && !d.val.empty()) {
    fail("--val and --val-fraction: found both, expected one");
  }
  if (!d.form.empty() && (d.as_chat || !d.system.empty())) {
    fail("--form: found ", d.as_chat ? "--as-chat" : "--system", " too, expected it without");
  }
  if (!std::isfinite(d.truncated_reward)) {
    fail("--truncated-reward: found ", d.truncated_reward, ", expected a number");
  }
}

RlParts make_parts(const RlSettings& s, const std::string& stage, const RunOptions& options) {
  if (s.data.model.empty()) fail("--model: missing, expected the model to begin with");
  if (s.data.prompts.empty()) fail("--prompts: missing, expected JSON lines");
  if (s.data.rewards.empty()) {
    fail("--reward: missing, expected a function or model:DIRECTORY");
  }
  at_least("--samples", s.evaluation.eval_samples, 1);
  at_least("--limit", s.evaluation.eval_prompts, 0);
  check_data(s.data);
  if (!(s.step.temperature > 0 && std::isfinite(s.step.temperature))) {
    fail("--temperature: found ", s.step.temperature, ", expected above 0: answers are sampled");
  }
  const std::filesystem::path dir = model_dir(s.data.model);
  RlParts p{.s = s,
            .run = Run(),
            .start = dir,
            .config = load_config_with_head(dir, Head::lm),
            .tokenizer = Tokenizer::load(dir)};
  p.run.stage = stage, p.run.options = options, p.run.own_files = {kRollouts};
  p.has_critic = stage == "ppo";
  // A run that is resumed has its template in its checkpoint, which best-of-n has none of.
  StageTemplateFlags& flags = p.s.data.chat_template;
  fix_date(flags);
  const bool has_checkpoint = options.resume && stage != "best-of-n";
  p.chat = has_checkpoint ? StageTemplate(p.tokenizer, model_dir(options.out), {"auto", flags.date})
                          : StageTemplate(p.tokenizer, dir, flags);
  return p;
}

// What differs between PPO and GRPO outside of their steps.
struct Algorithm {
  std::string name;
  void (*choose)(RlSettings& s, const Config& config);  // settings that were left open; checks
  // Makes what it alone needs; `saved`: the checkpoint to resume from, or empty.
  void (*begin)(RlParts& p, const std::filesystem::path& saved);
  Step (*step)(int64_t n, RlParts& p);
  OrderedJson (*metrics)(const Step& step);
};

void check_settings(RlSettings& s) {
  StepSettings& t = s.step;
  EvaluationSettings& e = s.evaluation;
  at_least("--rollouts", t.rollouts, 1);
  at_least("--clip-ratio", t.clip_low, 0), at_least("--entropy", t.entropy, 0);
  if (t.clip_high != -1) at_least("--clip-ratio-high", t.clip_high, 0);
  at_least("--minibatches", t.minibatches, 1), at_least("--epochs", t.epochs, 1);
  at_least("--kl-budget", t.kl_budget, 0), at_least("--kl-target", t.kl_target, 0);
  is_positive("--kl-horizon", t.kl_horizon), at_least("--beta", t.beta, 0);
  at_least(kMicroBatchFlag, t.micro_batch_tokens, 0);
  at_least("--eval-every", e.eval_every, 0), at_least("--eval-some", e.eval_some, 0);
  OptimizerFlags& o = t.optimizer;
  check_optimizer(o);
  o.warmup = std::max<int64_t>(0, o.warmup), o.weight_decay = std::max(0., o.weight_decay);
  if (o.warmdown < 0) o.warmdown = .5;
  if (o.final_lr < 0) o.final_lr = .1;
  if (e.keep != "best" && e.keep != "last") {
    fail("--keep: found ", e.keep, ", expected best or last");
  }
  const bool has_val = !s.data.val.empty() || s.data.val_fraction > 0;
  if (e.keep == "best" && !has_val) fail("--keep best: expected --val FILE to judge by");
  if (!e.eval_at_kl.empty() && !has_val) fail("--eval-at-kl: expected --val FILE");
  if (!std::is_sorted(e.eval_at_kl.begin(), e.eval_at_kl.end())) {
    fail("--eval-at-kl: expected rising numbers");
  }
  if (t.clip_high < 0) t.clip_high = t.clip_low;
  if (e.eval_some == 0) e.eval_some = 64;
}

// Measured on the demo's model of 128 channels: at 3e-4 GRPO's entropy collapses within ten steps
// and held-out problems stay where they are, at 1e-4 they rise. Larger models want less: 1e-6 at
// 4,096 channels is usual.
double chosen_lr(const RlSettings& s, const Config& config, double at_128_channels) {
  if (s.step.optimizer.lr != 0) return s.step.optimizer.lr;
  return at_128_channels * std::min(1., std::pow(128. / config.C, 1.5)) *
         (s.data.lora > 0 ? 10 : 1);
}

// The tokens of the longest answer that the run may meet, its prompt among them.
int64_t longest_answer(const RlParts& p) {
  int64_t longest = 1;
  for (const auto* prompts : {&p.prompts.all, &p.held_out}) {
    for (const Prompt& prompt : *prompts) {
      longest = std::max(longest, longest_answer(prompt, p.options));
    }
  }
  return longest;
}

// A model that reads rollouts has room for the longest.
void check_context(const RlParts& p, const char* flag, const std::filesystem::path& dir, int T) {
  const int64_t longest = longest_answer(p);
  if (T >= longest) return;
  fail(flag, " ", dir.string(), ": found a context of ", T, " tokens, expected at least ", longest,
       ", those of the longest prompt with an answer of --max-tokens");
}
bool has_chats(const RlParts& p) {
  const auto is_chat = [](const Prompt& prompt) { return !prompt.raw; };
  return std::ranges::any_of(p.prompts.all, is_chat) || std::ranges::any_of(p.held_out, is_chat);
}
void check_reward_models(const RlParts& p) {
  for (const auto& m : p.rewards.models) {
    check_context(p, "reward model", m->dir(), m->gpt().config().T);
    if (has_chats(p)) expect_same_template(m->dir(), p.chat.get());
  }
}

GptOptions policy_options(const RlParts& p, int64_t micro_batch_tokens);

// How rollouts are sampled, and how long they may be. The choice is kept in the settings: a run
// that is resumed where other memory is free makes the same rollouts.
void choose_rollout_options(RlParts& p, Mode mode) {
  DataSettings& d = p.s.data;
  p.options = {.chat = &p.chat,
               .end_tokens = p.config.all_end_tokens(),
               .max_tokens = d.max_tokens,
               .rows = d.rows,
               .temperature = float(p.s.step.temperature),
               .cache_bytes = int64_t(d.cache_mb) << 20};
  p.options.stops = d.stops;
  const int64_t tokens = p.s.step.micro_batch_tokens;
  GptOptions engine = policy_options(p, tokens > 0 ? tokens : kCpuMicroBatch);
  if (mode == Mode::inference) engine.mode = mode, engine.batch_tokens = 0;
  p.options.cache_page_bytes = cache_page_bytes(p.config, engine);
  p.options.context = choose_context(p.config, d.context, engine);
  d.context = p.options.context;
}

// The models of --reward and --gold.
std::vector<std::filesystem::path> reward_models_of(const DataSettings& d) {
  std::vector<std::filesystem::path> paths;
  std::vector<std::string> rewards = d.rewards;
  if (!d.gold.empty()) rewards.push_back(d.gold);
  for (const std::string& text : rewards) {
    const RewardSpec spec = parse_reward(text);
    if (spec.name == "model" || spec.name == "probability") paths.push_back(spec.argument);
  }
  return paths;
}

void make_rewards(RlParts& p) {
  const DataSettings& d = p.s.data;
  const CommandLimits limits{d.command_seconds, d.command_start_seconds,
                             int64_t(d.command_memory * 1e9), d.command_processes, d.verifiers};
  const RewardContext reward_context{p.chat,       p.start,
                                     d.max_tokens, parse_device(p.run.options.device),
                                     limits,       p.s.step.micro_batch_tokens};
  const auto reward = [&](const std::string& text) {
    return make_reward(parse_reward(text), reward_context, p.rewards.models);
  };
  for (const std::string& text : d.rewards) add_reward(p.rewards, reward(text));
  p.rewards.verifier = verifier_of(p.rewards.functions);
  if (!d.gold.empty()) p.rewards.gold = reward(d.gold);
  p.rewards.truncated = d.truncated, p.rewards.truncated_reward = d.truncated_reward;
}

// "answer", or "answer (700), solution (20)" where records differ.
std::string keys_text(const std::map<std::string, int64_t>& keys) {
  std::string text;
  for (const auto& [key, count] : keys) {
    text += (text.empty() ? "" : ", ") + key;
    if (keys.size() > 1) text += concat(" (", count_text(double(count)), ")");
  }
  return text.empty() ? "none" : text;
}

// The prompts and the held-out ones. Returns, for the output, what was left out of the files and
// which keys were read.
std::string read_problems(RlParts& p) {
  const DataSettings& d = p.s.data;
  std::vector<std::string> tools;
  for (const std::string& tool : d.tools) {
    if (tool != "calculator" && tool != "search") {
      fail("--tool: found ", tool, ", expected calculator or search");
    }
    if (tool == "search" && d.search.empty()) fail("--tool search: expected --documents FILE");
    tools.push_back(tool == "search" ? kSearchTool : kCalculatorTool);
  }
  const std::string form = d.form.empty() ? "" : form_text(d.form);
  if (!form.empty() && form.find("{question}") == std::string::npos) {
    fail("--form: found no {question} in it");
  }
  PromptReader reader{.chat = p.chat,
                      .how = {form, tools, d.system, d.as_chat},
                      .context = p.options.context,
                      .max_tokens = d.max_tokens,
                      .options = d.records,
                      .check_problem = [&](const Problem& q) { check_problem(p.rewards, q); }};
  p.prompts.all = read_prompts(d.prompts, reader);
  if (d.val_fraction > 0) hold_out(p.prompts.all, d.val_fraction, p.held_out);
  p.prompts.pool.resize(p.prompts.all.size());
  std::iota(p.prompts.pool.begin(), p.prompts.pool.end(), 0);
  if (!d.val.empty()) p.held_out = read_prompts(d.val, reader);
  try_programs(p.rewards, p.prompts.all[0]);
  p.run.records = reader.records, p.run.left_out = reader.left_out;
  std::string read = reader.left_out.text(reader.records);
  if (reader.left_out.count("too long") > 0) {
    read += concat("  no room for ", d.max_tokens, " tokens behind them in the context of ",
                   p.options.context, "\n");
  }
  return read + concat("keys    questions: ", keys_text(reader.question_keys),
                       "; answers: ", keys_text(reader.answer_keys), "\n");
}

void plan_micro_batch(RlParts& p, Mode mode);

void read_inputs(RlParts& p, Mode mode) {
  RlSettings& s = p.s;
  const DataSettings& d = s.data;
  choose_rollout_options(p, mode);
  plan_micro_batch(p, mode);
  make_rewards(p);
  if (!d.search.empty()) p.search = Search::load(d.search);
  p.options.search = p.search ? &*p.search : nullptr;
  const std::string read = read_problems(p);
  check_reward_models(p);
  std::printf("%s", read.c_str());
  std::fflush(stdout);
  p.data_hashes = {{"prompts", hash_of(p.prompts.all)}, {"val", hash_of(p.held_out)}};
  if (!d.search.empty()) p.data_hashes["documents"] = hash64(read_file(d.search));
  OrderedJson models = OrderedJson::array();
  for (const auto& m : p.rewards.models) {
    models.push_back({{"path", m->dir().string()}, {"hash", m->hash()}});
  }
  p.model_names = {{"reference", {{"path", p.start.string()}, {"hash", model_hash(p.start)}}},
                   {"reward_models", models}};
  if (d.ptx.empty()) return;
  const Tokenizer& tokenizer = p.tokenizer;
  p.text = {std::make_unique<TokenStream>(s.data.ptx, "train"), nullptr, s.data.ptx_weight,
            s.data.ptx_tokens};
  if (p.text.stream->vocab_size() > 0 && read_data_info(s.data.ptx).hash != tokenizer.hash()) {
    fail("--ptx ", s.data.ptx, ": found another tokenizer's shards, expected those of ",
         s.data.model);
  }
  p.text.loader = std::make_unique<Loader>(*p.text.stream,
                                           int(std::min<int64_t>(p.config.T, s.data.ptx_tokens)),
                                           s.step.seed, tokenizer.document_separator());
}

// What the engine is asked for when all rows hold the longest answers. Before the prompts are read,
// an answer may fill the context.
DecodePlan rollout_plan(const RlParts& p) {
  const int64_t longest = p.prompts.all.empty() ? p.options.context : longest_answer(p);
  return decode_plan(rollout_generator(p.options, longest, p.options.rows));
}

GptOptions training_options(const RlParts& p, int64_t micro_batch_tokens) {
  GptOptions o = gpt_options(p.run.options);
  o.batch_tokens = int(micro_batch_tokens);
  return o;
}
GptOptions policy_options(const RlParts& p, int64_t micro_batch_tokens) {
  GptOptions o = training_options(p, micro_batch_tokens);
  if (p.s.data.lora > 0) o.lora = {p.s.data.lora, float(p.s.data.lora_alpha)};
  o.decode = rollout_plan(p);
  return o;
}

// With its adapters off the policy is the reference: its weights are there once. When the run began
// from adapters, these belong to the reference, which then needs weights of its own.
bool has_own_reference(const RlParts& p) { return p.s.data.lora == 0 || has_adapters(p.start); }

Config config_of_critic(const RlParts& p, const std::filesystem::path& dir);
std::filesystem::path start_of_critic(const RlParts& p);

// All models that the run holds at once, with micro-batches of so many tokens; the policy is the
// first. Known before any of them is made.
struct PlannedModel {
  std::string name;
  MemoryPlan memory;
};
std::vector<PlannedModel> plan_models(const RlParts& p, Mode mode, int64_t micro_batch_tokens) {
  GptOptions policy = policy_options(p, micro_batch_tokens);
  if (mode == Mode::inference) policy.mode = mode, policy.batch_tokens = 0, policy.lora = {};
  std::vector<PlannedModel> all{{"policy", plan_memory(p.config, policy)}};
  const GptOptions trains = training_options(p, micro_batch_tokens);
  if (mode == Mode::train && has_own_reference(p)) {
    GptOptions reads = trains;
    reads.mode = Mode::inference;
    all.push_back({"reference", plan_memory(p.config, reads)});
  }
  if (mode == Mode::train && p.has_critic) {
    all.push_back({"critic", plan_memory(config_of_critic(p, start_of_critic(p)), trains)});
  }
  for (const std::filesystem::path& path : reward_models_of(p.s.data)) {
    const Config config = load_config_with_head(model_dir(path), Head::scalar);
    all.push_back({"reward model", plan_memory(config, RewardModel::options(config, trains.device,
                                                                            micro_batch_tokens))});
  }
  return all;
}

// Comes before the first model is made.
void plan_micro_batch(RlParts& p, Mode mode) {
  choose_micro_batch(p.s.step.micro_batch_tokens, p.run.options, 256, kAnyMicroBatch,
                     [&](int64_t tokens) {
                       int64_t bytes = 0;
                       for (const PlannedModel& m : plan_models(p, mode, tokens)) {
                         bytes += m.memory.total();
                       }
                       return bytes;
                     });
}

// The policy as `dir` holds it, and the reference as the run began.
void make_models(RlParts& p, const std::filesystem::path& dir) {
  GptOptions o = policy_options(p, p.s.step.micro_batch_tokens);
  p.models.policy = make_gpt(p.config, o);
  load_weights(dir, *p.models.policy, {.seed = p.s.step.seed});
  if (o.lora.rank > 0) p.base = adapter_base(dir);
  if (!has_own_reference(p)) return;
  o.mode = Mode::inference, o.decode = {}, o.lora = {};
  p.models.reference = make_gpt(p.config, o);
  load_weights(p.start, *p.models.reference);
}

void print_plan(const RlParts& p, const std::string& algorithm) {
  const Config& c = p.config;
  const RlSettings& s = p.s;
  const Models& m = p.models;
  const bool lora = s.data.lora > 0;
  std::printf("policy  %s: %d layers, %d channels, %s parameters%s\n", p.start.c_str(), c.L, c.C,
              count_text(double(m.policy->table().parameters())).c_str(),
              lora ? format(", adapters of rank %d", s.data.lora).c_str() : "");
  const auto raw = std::ranges::count(p.prompts.all, true, &Prompt::raw);
  std::printf("prompts %s%s, held out %s; %d rollouts a step%s, up to %d tokens each\n",
              count_text(double(p.prompts.all.size())).c_str(),
              raw > 0 ? format(" (%lld of them texts to continue%s)", (long long)raw,
                               s.data.form.empty() ? "; --as-chat asks them as a user" : "")
                            .c_str()
                      : "",
              count_text(double(p.held_out.size())).c_str(), s.step.rollouts,
              m.critic ? "" : format(" in groups of %d", s.grpo.group).c_str(), s.data.max_tokens);
  std::string rewards;
  for (const RewardFunction& f : p.rewards.functions) {
    rewards +=
        format("%s%g x %s", rewards.empty() ? "" : " + ", f.spec.weight, f.spec.name.c_str());
  }
  const double budget = s.step.kl_budget;
  std::printf("reward  %s; beta %g, KL per response %s\n", rewards.c_str(), s.step.beta,
              budget > 0 ? format("at most %g", budget).c_str() : "without a budget");
  std::printf("updates %s: %lld steps, each of %d minibatches x %d epochs, learning rate %g\n",
              algorithm.c_str(), (long long)s.step.steps, s.step.minibatches, s.step.epochs,
              s.step.optimizer.lr);
  const int64_t tokens = s.step.micro_batch_tokens;
  std::printf("memory  ");
  for (const PlannedModel& planned : plan_models(p, Mode::train, tokens)) {
    const bool is_first = planned.name == "policy";
    std::printf("%s%s %s%s", is_first ? "" : ", ", planned.name.c_str(),
                bytes_text(double(planned.memory.total())).c_str(),
                is_first ? format(" (%s)", planned.memory.text().c_str()).c_str() : "");
  }
  std::printf(", %s", micro_batch_text(tokens).c_str());
  std::printf("\n");
  std::fflush(stdout);
}

OrderedJson state_json(const RlParts& p) {
  OrderedJson json = {{"settings", Json(p.s)}, {"data", p.data_hashes}};
  json.update(p.model_names);
  json.update(OrderedJson(Json(p.prompts)));
  json.update(OrderedJson(Json(p.state)));
  if (p.text.loader) {
    const LoaderState loader = p.text.loader->state();
    json["ptx"] = {{"epoch", loader.epoch}, {"window", loader.window}};
  }
  return json;
}

// Fails where a file's prompts are not those of the hashes in `saved`; older versions had none.
void check_data_hashes(const RlParts& p, const Json& saved) {
  for (const auto& [key, hash] : p.data_hashes.items()) {
    if (!saved.contains("data") || saved.at("data").at(key) == Json(hash)) continue;
    fail("--resume: found other ", key, " than the run began with, expected the same --",
         key == "val" ? "val or --val-fraction" : key,
         key == "documents" ? "" : ", with the same --form, --template, --tool and --system");
  }
}

void restore(RlParts& p, const Json& saved) {
  check_data_hashes(p, saved);
  check_model_hash(saved.at("reference"), p.model_names["reference"]["hash"]);
  for (size_t i = 0; i < p.rewards.models.size(); i++) {
    check_model_hash(saved.at("reward_models").at(i), p.model_names["reward_models"][i]["hash"]);
  }
  saved.get_to(p.prompts), saved.get_to(p.state);
  if (saved.at("finished").get<bool>()) p.state.stopped.clear(), p.state.left_budget = false;
  p.run.stopped = p.state.stopped;
  const std::vector<int>& pool = p.prompts.pool;
  if (pool.empty() || *std::max_element(pool.begin(), pool.end()) >= int(p.prompts.all.size())) {
    fail(p.s.data.prompts[0], ": found other prompts than the run began with, expected the same");
  }
  // Older versions had another name for it.
  p.run.state.best_quality = saved.value("best", p.run.state.best_quality);
  if (p.text.loader) {
    p.text.loader->set_state({saved.at("ptx").at("epoch"), saved.at("ptx").at("window")});
  }
}

// ---------------------------------------------------------------------------------------------
// The last weights within the KL budget: copied before each step, saved with each checkpoint

// The weights of the tensors that are trained, in the order of the table.
std::vector<std::vector<float>> copy_weights(const Gpt& gpt) {
  std::vector<std::vector<float>> copies;
  for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
    const Tensor& t = gpt.table().tensors[i];
    if (!t.trainable) continue;
    copies.emplace_back(size_t(t.size()));
    gpt.read(int(i), Slot::weight, copies.back());
  }
  return copies;
}
void restore_weights(Gpt& gpt, const std::vector<std::vector<float>>& copies) {
  size_t next = 0;
  for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
    if (gpt.table().tensors[i].trainable) gpt.write(int(i), Slot::weight, copies.at(next++));
  }
}

const char* kWithinBudget = "within_budget";  // weights of a checkpoint to resume from

// A model of chats is saved with their template, one of texts as it was.
void save_tokenizer(SaveOptions& o, const RlParts& p) {
  if (has_chats(p)) return save_tokenizer(o, p.chat, p.start);
  o.tokenizer_from = p.start;
}

void save_within_budget(const RlParts& p, const std::filesystem::path& dir) {
  Gpt& policy = *p.models.policy;
  const std::vector<std::vector<float>> current = copy_weights(policy);
  restore_weights(policy, p.within);
  SaveOptions options{.started_from = p.start, .base = p.base};
  save_tokenizer(options, p);
  save_checkpoint(dir / kWithinBudget, policy, options);
  restore_weights(policy, current);
}
void load_within_budget(RlParts& p, const std::filesystem::path& dir) {
  if (!std::filesystem::exists(dir / kWithinBudget)) return;
  Gpt& policy = *p.models.policy;
  const std::vector<std::vector<float>> current = copy_weights(policy);
  load_weights(dir / kWithinBudget, policy);
  p.within = copy_weights(policy);
  restore_weights(policy, current);
}

double seconds_of_evaluation(RlParts& p, int prompts);
void filter_problems(RlParts& p);

// Everything that a run reads: none of it may lie where it writes.
std::vector<std::filesystem::path> inputs_of(const RlSettings& s) {
  const DataSettings& d = s.data;
  std::vector<std::filesystem::path> inputs{d.model, d.form, d.search, d.ptx, s.ppo.critic};
  for (const auto* paths : {&d.prompts, &d.val}) {
    inputs.insert(inputs.end(), paths->begin(), paths->end());
  }
  for (const std::filesystem::path& path : reward_models_of(d)) inputs.push_back(path);
  return inputs;
}

// Makes what the run works with: as it began or, with `saved`, as its last checkpoint has it.
void make_run(RlParts& p, const Algorithm& algorithm, const Json* saved) {
  p.state = {.beta = p.s.step.beta};
  if (saved) restore(p, *saved);
  const std::filesystem::path dir = saved ? p.run.model() : p.start;
  make_models(p, dir);
  if (saved) load_within_budget(p, dir);
  const bool finished = saved && saved->at("finished").get<bool>();
  if (saved) load_run(p.run, *saved, *p.models.policy);
  if (finished) p.state.updates = p.state.critic_updates = 0;
  algorithm.begin(p, saved && !finished ? dir : std::filesystem::path());
  if (finished && p.models.critic) {
    p.run.line.note("a finished run keeps no critic: another one begins");
  }
}

// The steps that fit in --minutes, from the time of some that are made with a learning rate of 0
// and undone afterwards: the clock decides the number of steps and nothing else.
int64_t steps_of_minutes(RlParts& p, const Algorithm& algorithm, double started) {
  const EvaluationSettings& e = p.s.evaluation;
  const double lr_scale = std::exchange(p.s.step.optimizer.lr_scale, 0);
  p.s.step.steps = 1 << 20;
  double step_seconds = calibrate(p.s.budget, [&](int64_t n) {
    algorithm.step(n, p);
    return 1.;
  });
  stop_if_signalled();
  double last_evaluation = 0;
  if (const auto held_out = int(p.held_out.size()); held_out > 0) {
    const int some = std::min(held_out, 8), during = std::min(held_out, e.eval_some),
              last = e.eval_prompts > 0 ? std::min(held_out, e.eval_prompts) : held_out;
    const double a_prompt = seconds_of_evaluation(p, some) / some;
    if (e.eval_every > 0) step_seconds += a_prompt * during / double(e.eval_every);
    last_evaluation = a_prompt * (last + during * (e.eval_every > 0 ? 1 : 6));
  }
  p.s.step.optimizer.lr_scale = lr_scale;
  p.prompts.epoch = p.prompts.cursor = 0;
  if (p.text.loader) p.text.loader->set_state({});
  p.models = {};
  make_run(p, algorithm, nullptr);
  return steps_in_minutes(p.s.budget, started, step_seconds, last_evaluation);
}

// The number of steps: of --steps, of --minutes, or 60. A resumed run keeps its own unless it got
// another budget.
void plan_steps(RlParts& p, const Algorithm& algorithm, const Json* saved, double started) {
  StepSettings& t = p.s.step;
  const Budget& budget = p.s.budget;
  if (!saved) {
    if (budget.steps > 0) t.steps = budget.steps;
    if (budget.minutes > 0) t.steps = steps_of_minutes(p, algorithm, started);
  } else if (p.run.options.new_budget) {
    t.steps = resumed_steps(p.run, budget, t.optimizer, t.steps,
                            [](const Budget&) { return int64_t(60); });
  }
  int64_t& eval_every = p.s.evaluation.eval_every;
  if (eval_every == 0) eval_every = std::max<int64_t>(1, t.steps / 5);
}

int64_t begin_run(RlParts& p, const Algorithm& algorithm, const Json* saved) {
  const double started = now();
  algorithm.choose(p.s, p.config);
  check_settings(p.s);
  read_inputs(p, Mode::train);
  p.run.lr_scale = p.s.step.optimizer.lr_scale;
  p.run.keeps_best = p.s.evaluation.keep == "best";
  try {
    make_run(p, algorithm, saved);
  } catch (const Json::exception& e) {
    fail((p.run.model() / "trainer_state.json").string(), ": ", json_complaint(e));
  }
  if (p.models.critic) p.run.also_bytes = checkpoint_bytes(p.models.critic->table(), true);
  if (p.s.step.kl_budget > 0) {
    p.run.also_bytes += checkpoint_bytes(p.models.policy->table(), false);
  }
  plan_steps(p, algorithm, saved, started);
  print_plan(p, p.models.critic ? algorithm.name : p.s.grpo.method);
  if (!saved && !p.run.options.dry_run && !p.s.grpo.pass_rate.empty()) filter_problems(p);
  return p.s.step.steps;
}

// The factor on the price of the KL that keeps it near a target (Ziegler et al. 2019).
double beta_factor(const StepSettings& s, double kl, size_t rollouts) {
  return 1 + std::clamp(kl / s.kl_target - 1, -.2, .2) * double(rollouts) / s.kl_horizon;
}

// Counts what a step did, and says whether the run ends with it.
void count_step(RlParts& p, const Step& step) {
  RlState& t = p.state;
  const StepSettings& s = p.s.step;
  p.kl = step.kl;
  if (s.kl_target > 0) t.beta *= beta_factor(s, step.kl, step.rollouts.size());
  t.groups += step.groups, t.no_variance += step.without_variance;
  t.failed += std::ranges::count_if(step.rollouts, &Rollout::failed);
  t.truncated += std::ranges::count(step.rollouts, false, &Rollout::ended);
  t.rollouts += int64_t(step.rollouts.size());
  for (const Rollout& r : step.rollouts) t.tokens += r.length;
  const bool taught = step.reward.spread > 0 || has_kl_or_entropy(s);
  t.equal_in_a_row = taught ? 0 : t.equal_in_a_row + 1;
  t.left_budget = !std::isfinite(step.kl) || !is_within(s, step.kl);
  if (t.left_budget) {
    t.stopped =
        format("the KL to the reference is %.3g per response, the budget %g", step.kl, s.kl_budget);
  } else if (t.equal_in_a_row >= 10) {
    t.stopped = "all rewards of ten steps in a row were equal: nothing can be learned from them";
  }
  p.run.stopped = t.stopped;
  const Seconds& c = p.models.seconds;
  Seconds& all = p.seconds;
  all.decode += c.decode, all.forward += c.forward, all.backward += c.backward;
  all.update += c.update, all.rewards += c.rewards, all.all += c.all;
}

// The algorithm's step. Its rollouts measure the KL of the weights from before its update: where
// that is within --kl-budget, or nothing is known of earlier ones, they are kept. A step that fails
// leaves the order of the prompts as it was.
Step step_within_budget(RlParts& p, const Algorithm& algorithm, int64_t n) {
  const StepSettings& s = p.s.step;
  std::vector<std::vector<float>> before;
  if (s.kl_budget > 0) before = copy_weights(*p.models.policy);
  const int64_t epoch = p.prompts.epoch, cursor = p.prompts.cursor;
  try {
    Step step = algorithm.step(n, p);
    if (s.kl_budget > 0 && (is_within(s, step.kl) || p.within.empty())) {
      p.within = std::move(before), p.state.within_step = n - 1, p.state.within_kl = step.kl;
    }
    return step;
  } catch (...) {
    p.prompts.epoch = epoch, p.prompts.cursor = cursor;
    throw;
  }
}

// A line of rollouts.jsonl. Its advantage is the mean over its sampled tokens; null: nothing was
// learned from the step.
OrderedJson rollout_json(int64_t n, const Step& step, size_t i, const RlParts& p) {
  const Rollout& r = step.rollouts[i];
  const Experience& x = step.experience;
  OrderedJson rewards = OrderedJson::object();
  for (size_t f = 0; f < r.rewards.size(); f++) {
    rewards[p.rewards.functions[f].label] = r.rewards[f];
  }
  double advantage = x.advantage.empty() ? NAN : 0;
  for (size_t t = x.packed.begin(i); t <= x.packed.last(i) && !x.advantage.empty(); t++) {
    advantage += x.advantage[t] / double(std::max(1, r.length));
  }
  const auto answer = std::span(r.ids).subspan(r.prompt->ids.size());
  return {{"step", n},
          {"group", r.group},
          {"problem", r.prompt->where},
          {"prompt", r.prompt->question},
          {"completion", r.prompt->tools ? p.tokenizer.decode(answer) : r.text},
          {"rewards", rewards},
          {"reward", r.reward},
          {"advantage", advantage},
          {"length", r.length},
          {"ended", r.ended}};
}

std::string rollout_lines(int64_t n, const Step& step, const RlParts& p) {
  std::string lines;
  for (size_t i = 0; i < step.rollouts.size(); i++) lines += json_line(rollout_json(n, step, i, p));
  if (!lines.empty()) lines.pop_back();  // Metrics adds the last line's end
  return lines;
}

// After step n, when the run's state is that of the weights again: a full disk ends a run here.
void write_rollouts(RlParts& p, int64_t n) {
  if (p.rollout_lines.empty()) return;
  if (!p.rollouts) p.rollouts.emplace().open(p.run.options.out / kRollouts, n - 1);
  p.rollouts->write(std::exchange(p.rollout_lines, {}));
}

// Once: what is scored is not quite what was sampled from.
void warn_of_disagreement(RlParts& p, int64_t n, const Step& step) {
  const double off = std::max(step.generator ? step.generator->mean : 0, step.sums.first_ratio);
  if (off <= kLargeDifference || std::exchange(p.has_warned, true)) return;
  p.run.line.note(format(
      "warning: step %lld: the log-probabilities of generator and forward pass differ by %.3g in "
      "the mean; above %g the run ends. --precision f32 brings them together",
      (long long)n, off, kLargestDifference));
}

StepResult take_step(RlParts& p, const Algorithm& algorithm, int64_t n) {
  const double began = now();
  p.models.seconds = {};
  Step step = step_within_budget(p, algorithm, n);
  p.models.seconds.all = now() - began;
  if (!step.generator) step.without_variance = step.groups;  // nothing was learned
  count_step(p, step);
  warn_of_disagreement(p, n, step);
  if (!p.s.evaluation.no_rollouts) p.rollout_lines = rollout_lines(n, step, p);
  if (n == 1 || n % std::max<int64_t>(1, p.s.step.steps / 5) == 0) show(p.run.line, step.rollouts);
  StepResult r =
      step_result(step, p.rewards, p.state.beta, p.models.seconds, algorithm.metrics(step));
  const OptimizerFlags& o = p.s.step.optimizer;
  r.learning_rate = peak_rate(o) * make_schedule(o, p.s.step.steps).at(n);
  for (const Rollout& rollout : step.rollouts) r.tokens += rollout.length;
  return r;
}

// ---------------------------------------------------------------------------------------------
// Held-out prompts

// The probability that one of k answers is right, from n of which c are (Chen et al. 2021), k <= n:
//   1 - C(n - c, k) / C(n, k)
double pass_at_k(int n, int c, int k) {
  if (n - c < k) return 1;
  double wrong = 1;
  for (int i = n - c + 1; i <= n; i++) wrong *= 1 - double(k) / i;
  return 1 - wrong;
}

struct Evaluation {
  double pass = 0, pass_k = 0, greedy = 0;  // pass@1 at --temperature, pass@k, pass@1 of greedy
  int k = 1;
  int64_t prompts = 0, samples = 0;  // samples: answers to each prompt
  MeanAndSpread reward, gold, kl;    // over prompts, of a prompt's mean; KL per response
  Canaries canaries;
};

// `count` of the prompts at equal distances, since files are often in the order of their sources;
// 0: all.
std::vector<const Prompt*> some_of(std::span<const Prompt> prompts, size_t count) {
  const size_t all = prompts.size(), n = count > 0 ? std::min(count, all) : all;
  std::vector<const Prompt*> some;
  for (size_t i = 0; i < n; i++) some.push_back(&prompts[i * all / n]);
  return some;
}

// Of `prompts` held-out prompts; 0: of all.
Evaluation evaluate(RlParts& p, int prompts) {
  Evaluation e;
  const int samples = p.s.evaluation.eval_samples;
  const Rewards& rewards = p.rewards;
  const std::vector<const Prompt*> asked = some_of(p.held_out, size_t(prompts));
  const uint64_t seed = mix64(p.s.step.seed, hash64("held out"));
  std::vector<Rollout> rollouts = roll_out(p.models, p.options, asked, samples, seed);
  give_rewards(rollouts, rewards, p.models.seconds);
  std::vector<float> gold;
  if (rewards.gold) gold = rewards.gold->score(rollouts);
  e.prompts = int64_t(asked.size()), e.samples = samples;
  e.k = std::min(4, samples);
  e.canaries = canaries_of(rollouts);
  std::vector<double> mean_rewards, mean_golds;
  for (size_t i = 0; i < asked.size(); i++) {
    double reward = 0, of_gold = 0;
    int right = 0;
    for (size_t k = i * size_t(samples); k < (i + 1) * size_t(samples); k++) {
      reward += rollouts[k].reward / samples;
      of_gold += gold.empty() ? 0 : gold[k] / samples;
      right += rewards.verifier >= 0 && rollouts[k].ended &&
               rollouts[k].rewards[size_t(rewards.verifier)] > .5;
    }
    mean_rewards.push_back(reward), mean_golds.push_back(of_gold);
    e.pass += double(right) / samples / double(asked.size());
    e.pass_k += pass_at_k(samples, right, e.k) / double(asked.size());
  }
  e.reward = mean_and_spread(mean_rewards), e.gold = mean_and_spread(mean_golds);
  if (rewards.verifier >= 0) {
    RolloutOptions options = p.options;
    options.temperature = 0;
    const std::vector<Rollout> greedy = roll_out(p.models, options, asked, 1, seed);
    const std::vector<float> right = rewards.functions[size_t(rewards.verifier)].score(greedy);
    for (size_t i = 0; i < greedy.size(); i++) {
      e.greedy += (right[i] > .5 && greedy[i].ended) / double(greedy.size());
    }
  }
  e.kl = kl_by_prompt(rollouts, p.s.step, p.models);
  return e;
}

double seconds_of_evaluation(RlParts& p, int prompts) {
  const double began = now();
  evaluate(p, prompts);
  return now() - began;
}

double ci95(const MeanAndSpread& m) {
  return 1.96 * m.spread / std::sqrt(double(std::max<int64_t>(1, m.n)));
}

// An evaluation as metrics.jsonl has it, and, without the prefix val_ in its names, summary.json.
OrderedJson evaluation_json(const Evaluation& e, const Rewards& rewards,
                            const std::string& prefix) {
  OrderedJson m = {{prefix + "reward", e.reward.mean},
                   {prefix + "reward_ci95", ci95(e.reward)},
                   {prefix + "kl", e.kl.mean},
                   {prefix + "kl_ci95", ci95(e.kl)},
                   {prefix + "length", e.canaries.length},
                   {prefix + "ended", e.canaries.ended},
                   {prefix + "repetition", e.canaries.repetition},
                   {prefix + "reward_length_correlation", e.canaries.correlation}};
  if (rewards.verifier >= 0) {
    m.update({{"pass1", e.pass}, {format("pass%d", e.k), e.pass_k}, {"greedy", e.greedy}});
  }
  if (rewards.gold) {
    m.update({{prefix + "gold", e.gold.mean}, {prefix + "gold_ci95", ci95(e.gold)}});
  }
  return m;
}

// Tells people of an evaluation; returns its line of metrics.jsonl.
OrderedJson note_evaluation(RlParts& p, const Evaluation& e, const std::string& when) {
  std::string line =
      format("%s  held-out reward %.3f +- %.3f", when.c_str(), e.reward.mean, ci95(e.reward));
  if (p.rewards.verifier >= 0) {
    line = format("%s  held-out pass@1 %.1f%%, pass@%d %.1f%%, greedy %.1f%%", when.c_str(),
                  100 * e.pass, e.k, 100 * e.pass_k, 100 * e.greedy);
  }
  if (p.rewards.gold) line += format(", gold %.3f +- %.3f", e.gold.mean, ci95(e.gold));
  p.run.line.note(line + format(", KL %.2f +- %.2f, length %.0f  (%s x %d)", e.kl.mean, ci95(e.kl),
                                e.canaries.length, count_text(double(e.prompts)).c_str(),
                                int(e.samples)));
  OrderedJson m = {{"held_out", when}, {"prompts", e.prompts}, {"answers", e.prompts * e.samples}};
  m.update(evaluation_json(e, p.rewards, "val_"));
  return m;
}

// Keeps the weights when they are within the KL budget and the best so far, by the reward that they
// are trained on: --gold only watches, so that it is an honest judge of the weights that are kept.
void keep_if_best(RlParts& p, const Evaluation& e) {
  const bool is_pass_fail = p.rewards.verifier >= 0;
  if (is_within(p.s.step, e.kl.mean)) save_if_best(p.run, is_pass_fail ? e.pass : e.reward.mean);
}

// After step n: when it is time to, and where the KL has passed a point of --eval-at-kl.
void evaluate_during(RlParts& p, int64_t n) {
  const EvaluationSettings& s = p.s.evaluation;
  const auto passed = [&] {
    const auto next = size_t(p.state.kl_evaluations);
    return next < s.eval_at_kl.size() && p.kl > s.eval_at_kl[next] * s.eval_at_kl[next];
  };
  const bool due = n == 0 || (n % s.eval_every == 0 && n < p.run.steps);
  if (p.held_out.empty() || !p.run.stopped.empty() || !(due || passed())) return;
  const std::string when = n == 0 ? "before" : format("step %lld", (long long)n);
  const Evaluation e = evaluate(p, s.eval_some);
  OrderedJson metrics = note_evaluation(p, e, when);
  if (due) p.run.write_metrics("eval", n, metrics);
  if (due) keep_if_best(p, e);
  while (passed()) {
    metrics["at_sqrt_kl"] = s.eval_at_kl[size_t(p.state.kl_evaluations++)];
    p.run.write_metrics("eval", n, metrics);
    if (size_t(p.state.kl_evaluations) < s.eval_at_kl.size()) continue;
    p.run.stopped = p.state.stopped = "the KL has passed the last point of --eval-at-kl";
  }
}

// The KL per response of the weights as they are, on the prompts that a further step would have.
double kl_of_own_prompts(RlParts& p) {
  const StepSettings& s = p.s.step;
  const int64_t epoch = p.prompts.epoch, cursor = p.prompts.cursor;
  const std::vector<const Prompt*> asked = next_prompts(p.prompts, s.rollouts, s.seed);
  p.prompts.epoch = epoch, p.prompts.cursor = cursor;
  const uint64_t seed = seed_of_rollouts(s.seed, p.run.state.step + 1, 0);
  return kl_by_prompt(roll_out(p.models, p.options, asked, 1, seed), s, p.models).mean;
}

// Where the policy has left --kl-budget, gives it the weights of the last step that was within.
// Returns the step of its weights.
int64_t keep_last_within_budget(RlParts& p) {
  RlState& t = p.state;
  const int64_t step = p.run.state.step;
  if (p.s.step.kl_budget <= 0) return step;
  if (!t.left_budget) {  // the KL of the last update has not been measured
    const double kl = kl_of_own_prompts(p);
    t.left_budget = !is_within(p.s.step, kl);
    if (!t.left_budget) t.within_step = step, t.within_kl = kl;
  }
  if (!t.left_budget) return step;
  restore_weights(*p.models.policy, p.within);
  p.run.line.note(format("keeps the weights of step %lld, the last ones within the KL budget",
                         (long long)t.within_step));
  return t.within_step;
}

// The weights that the run hands on: the best, or the last ones within the KL budget. Returns their
// step.
int64_t choose_weights(RlParts& p) {
  const bool keeps_best = p.s.evaluation.keep == "best";
  if (keeps_best && p.run.stopped.empty()) keep_if_best(p, evaluate(p, p.s.evaluation.eval_some));
  if (!keeps_best || p.run.state.best_step < 0) return keep_last_within_budget(p);
  if (load_best(p.run)) {
    p.run.line.note(format("keeps the weights of step %lld", (long long)p.run.state.best_step));
  }
  return p.run.state.best_step;
}

OrderedJson finish(RlParts& p) {
  const EvaluationSettings& s = p.s.evaluation;
  const std::string& stopped = p.run.stopped;
  if (!stopped.empty()) p.run.line.note("stopped: " + stopped);
  const int64_t kept_step = choose_weights(p);
  OrderedJson summary = {{"stopped", stopped.empty() ? Json() : Json(stopped)},
                         {"best_step", p.run.state.best_step},
                         {"kept_step", kept_step}};
  if (p.s.step.kl_budget > 0 && kept_step == p.state.within_step) {
    summary["kl"] = p.state.within_kl;  // on the run's own prompts; that of held-out ones is better
  }
  if (!p.held_out.empty()) {
    const Evaluation e = evaluate(p, s.eval_prompts);
    p.run.write_metrics("final", p.run.state.step, note_evaluation(p, e, "at the end"));
    summary.update({{"prompts", e.prompts}, {"samples", e.samples}});
    summary.update(evaluation_json(e, p.rewards, ""));
  }
  const RlState& t = p.state;
  const Seconds& c = p.seconds;
  const double other = c.all - c.decode - c.forward - c.backward - c.update;
  summary.update({{"rollouts", t.rollouts},
                  {"tokens", t.tokens},
                  {"failed", t.failed},
                  {"truncated", t.truncated},
                  {"groups", t.groups},
                  {"groups_without_variance", t.no_variance},
                  {"split", seconds_json(c)}});
  summary["split"]["other"] = other;
  const double share = c.all > 0 ? 100 / c.all : 0;
  p.run.line.note(format(
      "time    decode %.0f%%, forward %.0f%%, backward %.0f%%, update %.0f%%, other %.0f%%",
      share * c.decode, share * c.forward, share * c.backward, share * c.update, share * other));
  return summary;
}

// Tokenizer and base of adapters. A checkpoint to resume from holds the critic too, and the last
// weights within the KL budget.
SaveOptions save_options(const RlParts& p, bool resumable) {
  SaveOptions o{.started_from = p.start, .base = p.base};
  if (resumable) {
    o.also = [&p](const std::filesystem::path& dir) {
      if (!p.within.empty()) save_within_budget(p, dir);
      if (!p.models.critic) return;
      SaveOptions critic{.trainer_state = Json{{"stage", "critic"}}, .optimizer = true};
      save_tokenizer(critic, p);
      save_checkpoint(dir / "critic", *p.models.critic, critic);
    };
  }
  save_tokenizer(o, p);
  return o;
}

// The process's exit status.
int run_rl(const Algorithm& algorithm, const RlSettings& s, const RunOptions& options) {
  RlParts p = make_parts(s, algorithm.name, options);
  p.run.inputs = inputs_of(s);
  p.run.hooks = {.begin = [&](const Json* saved) { return begin_run(p, algorithm, saved); },
                 .step = [&](int64_t n) { return take_step(p, algorithm, n); },
                 .evaluate =
                     [&](int64_t n) {
                       write_rollouts(p, n);
                       evaluate_during(p, n);
                     },
                 .finish = [&] { return finish(p); },
                 .model = [&]() -> Gpt& { return *p.models.policy; },
                 .state = [&] { return state_json(p); },
                 .save_options = [&](bool resumable) { return save_options(p, resumable); }};
  return run_steps(p.run);
}

// ---------------------------------------------------------------------------------------------
// PPO's own

void choose_ppo(RlSettings& s, const Config& config) {
  EvaluationSettings& e = s.evaluation;
  if (e.keep.empty()) e.keep = s.data.val.empty() && s.data.val_fraction == 0 ? "last" : "best";
  at_least("--critic-warmup", s.ppo.critic_warmup, 0), at_least("--critic-lr", s.ppo.critic_lr, 0);
  is_share("--gamma", s.ppo.gamma), is_share("--lambda", s.ppo.lambda);
  at_least("--value-clip", s.ppo.value_clip, 0);
  s.step.optimizer.lr = chosen_lr(s, config, 2e-4);
  if (s.ppo.critic_lr == 0) {
    s.ppo.critic_lr = 5 * s.step.optimizer.lr / (s.data.lora > 0 ? 10 : 1);
  }
}

// Where the critic begins: --critic, or the reward model whose scores it predicts; empty: as the
// policy. Never as --gold, from which nothing is learned, nor as a model of a probability, whose
// values are the log-odds.
std::filesystem::path start_of_critic(const RlParts& p) {
  if (!p.s.ppo.critic.empty()) return model_dir(p.s.ppo.critic);
  for (const std::string& text : p.s.data.rewards) {
    const RewardSpec spec = parse_reward(text);
    if (spec.name == "model") return model_dir(spec.argument);
  }
  return {};
}
// `dir`: where it begins, or continues; empty: it is shaped as the policy.
Config config_of_critic(const RlParts& p, const std::filesystem::path& dir) {
  Config config = dir.empty() ? p.config : load_config_with_head(dir, Head::scalar);
  config.head = Head::scalar;
  return config;
}

// The critic begins as a reward model, or as the policy with a head of zeros: then its first values
// are 0.
void begin_ppo(RlParts& p, const std::filesystem::path& saved) {
  const std::filesystem::path dir = saved.empty() ? start_of_critic(p) : saved / "critic";
  const bool from_policy = dir.empty();
  if (saved.empty() && !p.s.ppo.critic.empty()) {
    expect_same_vocabulary(dir, p.tokenizer, p.start);
    if (has_chats(p)) expect_same_template(dir, p.chat.get());
  }
  const Config config = config_of_critic(p, dir);
  check_context(p, "critic", dir, config.T);
  p.models.critic_shift = float(config.reward_shift);
  p.models.critic = make_gpt(config, training_options(p, p.s.step.micro_batch_tokens));
  Gpt& critic = *p.models.critic;
  load_weights(from_policy ? p.start : dir, critic, {.new_score = from_policy});
  if (from_policy) {
    critic.write(critic.table().find("score"), Slot::weight,
                 std::vector<float>(size_t(config.C), 0.f));
  }
  if (!saved.empty()) load_trainer_state(dir, critic);
}

const Algorithm kPpo = {"ppo", choose_ppo, begin_ppo,
                        [](int64_t n, RlParts& p) {
                          return ppo_step(n, p.s.step, p.s.ppo, p.prompts, p.options, p.rewards,
                                          p.models, p.text, p.state);
                        },
                        ppo_metrics};

// ---------------------------------------------------------------------------------------------
// GRPO's own

std::pair<double, double> parse_pass_rate(const std::string& text) {
  const size_t colon = std::min(text.find(':'), text.size());
  const double low = parse_number(text.substr(0, colon)),
               high = parse_number(text.substr(std::min(colon + 1, text.size())));
  if (!(low >= 0 && low <= high && high <= 1)) {
    fail("--pass-rate: found ", text, ", expected LOW:HIGH, as in .2:.8");
  }
  return {low, high};
}

void choose_grpo(RlSettings& s, const Config& config) {
  const bool dapo = parse_method(s.grpo.method) == GroupMethod::dapo;
  at_least("--group", s.grpo.group, 2), at_least("--resample", s.grpo.resample, -1);
  at_least("--pass-samples", s.grpo.pass_samples, 1);
  at_least("--pass-problems", s.grpo.pass_problems, 0);
  if (!s.grpo.pass_rate.empty()) parse_pass_rate(s.grpo.pass_rate);
  if (s.step.rollouts % s.grpo.group != 0) {
    fail("--rollouts: found ", s.step.rollouts, ", expected a multiple of --group ", s.grpo.group);
  }
  if (s.evaluation.keep.empty()) s.evaluation.keep = "last";
  // Yu et al. 2025: clip-higher, and groups without variance are replaced
  if (s.step.clip_high < 0 && dapo) s.step.clip_high = .28;
  if (s.grpo.resample < 0) s.grpo.resample = dapo ? 3 : 0;
  s.step.optimizer.lr = chosen_lr(s, config, 1e-4);
}

// Keeps the problems that the policy solves as often as --pass-rate LOW:HIGH says, before it
// learns.
void filter_problems(RlParts& p) {
  const GrpoSettings& s = p.s.grpo;
  const uint64_t seed = p.s.step.seed;
  const std::pair<double, double> range = parse_pass_rate(s.pass_rate);
  if (p.rewards.verifier < 0) {
    fail("--pass-rate: expected a --reward of right or wrong with the largest weight");
  }
  const RewardFunction& reward = p.rewards.functions[size_t(p.rewards.verifier)];
  std::vector<int>& pool = p.prompts.pool;
  std::vector<int> kept;
  const int64_t n =
      s.pass_problems > 0 ? std::min(s.pass_problems, int64_t(pool.size())) : int64_t(pool.size());
  Rng rng{mix64(seed, hash64("pass rate"))};
  shuffle(pool, rng);
  const int64_t piece = 256;
  for (int64_t begin = 0; begin < n; begin += piece) {
    std::vector<const Prompt*> tried;
    for (int64_t i = begin; i < std::min(n, begin + piece); i++) {
      tried.push_back(&p.prompts.all[size_t(pool[size_t(i)])]);
    }
    const std::vector<Rollout> rollouts =
        roll_out(p.models, p.options, tried, s.pass_samples,
                 mix64(seed, hash64("pass rate"), uint64_t(begin)));
    const std::vector<float> right = reward.score(rollouts);
    for (size_t i = 0; i < tried.size(); i++) {
      int passed = 0;
      for (size_t k = i * size_t(s.pass_samples); k < (i + 1) * size_t(s.pass_samples); k++) {
        passed += right[k] > .5 && rollouts[k].ended;
      }
      const double rate = double(passed) / s.pass_samples;
      if (rate >= range.first && rate <= range.second) kept.push_back(pool[size_t(begin) + i]);
    }
    p.run.line.show(format("pass rates: %lld of %lld problems tried, %zu kept",
                           (long long)std::min(n, begin + piece), (long long)n, kept.size()),
                    begin + piece >= n);
  }
  if (kept.empty()) {
    fail("--pass-rate ", s.pass_rate, ": found none among ", n, " problems, expected some");
  }
  std::sort(kept.begin(), kept.end());
  pool = std::move(kept);
}

const Algorithm kGrpo = {"grpo", choose_grpo, [](RlParts&, const std::filesystem::path&) {},
                         [](int64_t n, RlParts& p) {
                           return grpo_step(n, p.s.step, p.s.grpo, p.prompts, p.options, p.rewards,
                                            p.models, p.text, p.state);
                         },
                         grpo_metrics};

// =============================================================================================
// Best of n: what choosing alone gives
//
// No weight changes: n answers are sampled, and the one with the highest reward is given. That
// moves the distribution of answers by a KL of log n - (n - 1)/n at most, which makes it the
// baseline of all that learns. The chosen answers can be learned from too: rejection sampling.

// KL of the best of n samples to one sample, per response: a bound, reached when no two answers
// have equal rewards (Stiennon et al. 2020; Beirami et al. 2024).
double best_of_n_kl(double n) { return std::log(n) - (n - 1) / n; }

// The mean reward of the best of k answers, drawn from these without replacement, and the mean of
// the same answers' `gold`. Sorted by reward, r_1 <= .. <= r_N, answer i is the best of k in
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
    const auto answer = size_t(order[size_t(i) - 1]);
    best.reward += p * rewards[answer];
    if (!gold.empty()) best.gold += p * gold[answer];
    p *= i > 1 ? double(i - k) / (i - 1) : 0;
  }
  return best;
}

// One line of metrics.jsonl: all of a prompt's answers, and the one that was chosen.
struct Candidates {
  std::vector<std::vector<double>> rewards;  // of each function, of each answer
  std::vector<double> reward, gold;          // their weighted sum; gold may be empty
  std::vector<int> lengths;                  // tokens
  std::vector<bool> ended;                   // and are fit to learn from
  int chosen = -1;                           // -1: none is fit
  std::string text;                          // of the last turn of the chosen one
  Json turns = Json::array();                // its messages, where it may call tools
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Candidates, rewards, reward, gold, lengths, ended,
                                                chosen, text, turns)

// The highest reward; of a verifier's right answers, which all have the same, the shortest. An
// answer that was cut off is not chosen.
int choose(const Candidates& c, int verifier) {
  const bool is_pass_fail = verifier >= 0;
  int best = -1;
  for (size_t i = 0; i < c.reward.size(); i++) {
    const bool is_wrong = is_pass_fail && c.rewards[size_t(verifier)][i] <= .5;
    if (!c.ended[i] || !std::isfinite(c.reward[i]) || is_wrong) continue;
    const bool better = best < 0 || (is_pass_fail ? c.lengths[i] < c.lengths[size_t(best)]
                                                  : c.reward[i] > c.reward[size_t(best)]);
    if (better) best = int(i);
  }
  return best;
}

constexpr int kPiece = 16;  // prompts that are sampled together

// The messages of an answer to a chat: the model's turns, and what the tools that it called said.
std::vector<Message> messages_of(const Rollout& r, const RolloutOptions& o) {
  if (!r.prompt->tools) return {{"assistant", r.text, {}}};
  Conversation whole = r.prompt->chat;
  for (size_t begin = r.prompt->ids.size(); begin < r.ids.size();) {
    size_t end = begin;
    while (end < r.ids.size() && r.sampled[end]) end++;
    const auto ids = std::span(r.ids).subspan(begin, end - begin);
    whole.messages.push_back(read_turn(o.chat->get(), ids));
    if (end < r.ids.size()) answer_calls(o.chat->get(), whole, o.search);  // once more
    while (end < r.ids.size() && !r.sampled[end]) end++;
    begin = end;
  }
  return {whole.messages.begin() + long(r.prompt->chat.messages.size()), whole.messages.end()};
}

// An answer that ended and that ./sft can read: every call is one, no turn is empty.
bool is_fit(const Rollout& r, const RolloutOptions& o) {
  if (!r.ended || r.failed()) return false;
  if (r.prompt->raw) return true;
  Conversation whole = r.prompt->chat;
  for (const Message& m : messages_of(r, o)) whole.messages.push_back(m);
  try {
    check_conversation(whole, r.prompt->where);
  } catch (const Error&) {
    return false;
  }
  return true;
}

// The answers to a piece of the prompts; a draw depends on the piece, and on nothing before it.
std::vector<Candidates> sample_piece(Models& models, const RolloutOptions& options,
                                     const Rewards& rewards, std::span<const Prompt> piece, int n,
                                     uint64_t seed) {
  std::vector<const Prompt*> asked;
  for (const Prompt& p : piece) asked.push_back(&p);
  std::vector<Rollout> rollouts = roll_out(models, options, asked, n, seed);
  give_rewards(rollouts, rewards, models.seconds);
  std::vector<float> gold;
  if (rewards.gold) gold = rewards.gold->score(rollouts);
  std::vector<Candidates> found(piece.size());
  for (size_t i = 0; i < rollouts.size(); i++) {
    const Rollout& r = rollouts[i];
    Candidates& c = found[size_t(r.group)];
    c.rewards.resize(r.rewards.size());
    double sum = 0;
    for (size_t f = 0; f < r.rewards.size(); f++) {
      // A verifier's failure counts as wrong, and is not chosen.
      c.rewards[f].push_back(std::isfinite(r.rewards[f]) ? r.rewards[f] : 0);
      sum += rewards.functions[f].spec.weight * c.rewards[f].back();
    }
    c.reward.push_back(sum);
    if (rewards.gold) c.gold.push_back(gold[i]);
    c.lengths.push_back(r.length);
    c.ended.push_back(is_fit(r, options));
  }
  for (size_t i = 0; i < found.size(); i++) {
    Candidates& c = found[i];
    c.chosen = choose(c, rewards.verifier);
    const Rollout& chosen = rollouts[i * size_t(n) + size_t(std::max(0, c.chosen))];
    c.text = chosen.text;
    if (!chosen.prompt->tools) continue;
    for (const Message& m : messages_of(chosen, options)) c.turns.push_back(Json(message_json(m)));
  }
  return found;
}

// Conversations, or prompts with completions, as ./sft reads them.
void write_answers(const std::string& path, std::span<const Prompt> prompts,
                   std::span<const Candidates> all, const Tokenizer& tokenizer) {
  std::string lines;
  for (size_t i = 0; i < all.size(); i++) {
    const Prompt& p = prompts[i];
    const bool has_turns = !p.tools || !all[i].turns.empty();  // an older version did not keep them
    if (all[i].chosen < 0 || !has_turns) continue;
    OrderedJson json;
    if (p.raw) {
      json = {{"prompt", tokenizer.decode(std::span(p.ids).subspan(1))},
              {"completion", all[i].text}};
    } else {
      json["messages"] = OrderedJson::array();
      for (const Message& m : p.chat.messages) json["messages"].push_back(message_json(m));
      for (const Json& turn : all[i].turns) json["messages"].push_back(OrderedJson(turn));
      if (!p.tools) json["messages"].push_back(message_json({"assistant", all[i].text, {}}));
      for (const std::string& tool : p.chat.tools)
        json["tools"].push_back(OrderedJson::parse(tool));
    }
    lines += json_line(json);
  }
  write_file(path, lines);
  std::printf("%s: %s answers to %s prompts\n", path.c_str(),
              count_text(double(std::ranges::count(lines, '\n'))).c_str(),
              count_text(double(all.size())).c_str());
}

// For each k up to n: the bound on the KL, and the mean rewards of the best of k.
OrderedJson best_of_n_curve(std::span<const Candidates> all, int n, bool gold) {
  OrderedJson points = OrderedJson::array();
  std::printf("    n  KL at most    reward%s\n", gold ? "      gold" : "");
  for (int k = 1; k <= n; k++) {
    BestOf mean;
    for (const Candidates& c : all) {
      const BestOf b = best_of(k, c.reward, c.gold);
      mean.reward += b.reward / double(all.size());
      mean.gold += b.gold / double(all.size());
    }
    OrderedJson point = {{"n", k}, {"kl", best_of_n_kl(k)}, {"reward", mean.reward}};
    if (gold) point["gold"] = mean.gold;
    points.push_back(point);
    const bool power = (k & (k - 1)) == 0;
    if (!power && k != n) continue;
    std::printf("%5d  %10.3f  %8.4f%s\n", k, best_of_n_kl(k), mean.reward,
                gold ? format("  %8.4f", mean.gold).c_str() : "");
  }
  return points;
}

// What was sampled before, in whole pieces. The models and prompts must have the hashes of
// state.json.
std::vector<Candidates> sampled_before(const RlParts& p, const OrderedJson& models) {
  const std::filesystem::path& out = p.run.options.out;
  const Json saved = read_json(out / "state.json");
  check_data_hashes(p, saved);
  for (size_t i = 0; i < models.size(); i++) {
    check_model_hash({{"path", models[i]["path"]}, {"hash", saved.at("models").at(i)}},
                     models[i]["hash"]);
  }
  const size_t prompts = p.prompts.all.size();
  std::vector<Candidates> all;
  std::istringstream lines(read_file(out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (json.is_discarded() || all.size() == prompts) break;  // a line that was cut off
    all.push_back(json.get<Candidates>());
  }
  if (all.size() < prompts) all.resize(all.size() / kPiece * kPiece);
  return all;
}

// Makes the directory of a run of best-of-n; --overwrite removes what such a run wrote, alone.
void begin_directory(const RunOptions& o) {
  if (!o.overwrite) expect_new_run(o.out);
  for (const char* name : {"model", "best"}) {
    if (std::filesystem::exists(o.out / name)) {
      fail(o.out.string(), ": found ", name, ", which no run of best-of-n writes; expected one");
    }
  }
  std::filesystem::create_directories(o.out);
  for (const char* name : {"summary.json", "metrics.jsonl", "state.json"}) {
    remove_path(o.out / name);
  }
}

int best_of_n(const RlSettings& s, const RunOptions& o, const std::string& write) {
  const int n = s.evaluation.eval_samples, limit = s.evaluation.eval_prompts;
  RlParts p = make_parts(s, "best-of-n", o);
  read_inputs(p, Mode::inference);
  std::vector<Prompt>& prompts = p.prompts.all;
  if (limit > 0 && int(prompts.size()) > limit) prompts.resize(size_t(limit));
  OrderedJson models = OrderedJson::array({p.model_names["reference"]});
  for (const auto& m : p.model_names["reward_models"]) models.push_back(m);
  OrderedJson hashes = OrderedJson::array();
  for (const auto& m : models) hashes.push_back(m["hash"]);
  const OrderedJson state = {
      {"stage", "best-of-n"}, {"models", hashes}, {"data", p.data_hashes}, {"settings", Json(p.s)}};
  std::printf("policy  %s; %zu prompts, %d answers to each\n", p.start.c_str(), prompts.size(), n);
  std::vector<Candidates> all;  // of each prompt so far
  GptOptions options = gpt_options(o);
  options.mode = Mode::inference, options.decode = rollout_plan(p);
  p.models.policy = make_gpt(p.config, options);
  load_weights(p.start, *p.models.policy);
  if (o.resume) {
    try {
      all = sampled_before(p, models);
    } catch (const Json::exception& e) {
      fail(o.out.string(), ": state.json or metrics.jsonl: ", json_complaint(e));
    }
  } else {
    if (o.dry_run) return 0;
    expect_elsewhere(o.out, inputs_of(s));
    begin_directory(o);
  }
  const auto lock = o.lock ? o.lock : std::make_shared<RunLock>(o.out);
  write_json(o.out / "state.json", state);
  p.run.metrics.open(o.out / "metrics.jsonl", int64_t(all.size()));
  const double began = now();
  const size_t before = all.size();
  for (size_t begin = before; begin < prompts.size(); begin += kPiece) {
    const auto piece =
        std::span(prompts).subspan(begin, std::min<size_t>(kPiece, prompts.size() - begin));
    for (Candidates& c : sample_piece(p.models, p.options, p.rewards, piece, n,
                                      mix64(s.step.seed, hash64("best of n"), begin))) {
      p.run.write_metrics("step", int64_t(all.size()) + 1, Json(c));
      all.push_back(std::move(c));
    }
    const double left = double(prompts.size() - all.size());
    p.run.line.show(
        format("prompt %zu/%zu  %s left", all.size(), prompts.size(),
               duration_text((now() - began) / double(all.size() - before) * left).c_str()),
        all.size() == prompts.size());
  }
  OrderedJson summary = {{"stage", "best-of-n"}, {"prompts", prompts.size()}, {"n", n}};
  summary["records"] = p.run.records, summary["left_out"] = p.run.left_out.json();
  summary["curve"] = best_of_n_curve(all, n, bool(p.rewards.gold));
  write_json(o.out / "summary.json", summary);
  if (!write.empty()) write_answers(write, prompts, all, p.tokenizer);
  return 0;
}

// =============================================================================================
// Command line

// Of a reward, the pattern of format:PATTERN alone is a text.
std::string unescape_pattern(std::string_view reward, std::string_view flag) {
  const size_t begin = reward.find(':') + 1;  // 0: none
  if (begin == 0 || parse_reward(std::string(reward)).name != "format") return std::string(reward);
  return std::string(reward.substr(0, begin)) + unescape_unless_file(reward.substr(begin), flag);
}

struct RlFlags {
  RlSettings s;
  RunOptions options;
  std::string write;  // best-of-n: file for the chosen answers
};

void add_program_flags(CLI::App& app, DataSettings& d) {
  auto* group = app.add_option_group(
      "Program",
      "check:COMMAND says 1 (right) or 0 (wrong), command:COMMAND any number. For each answer the "
      "program reads a line {\"id\", \"prompt\", \"completion\", \"answer\", \"record\": the "
      "problem's line} and writes a line {\"id\", \"reward\"}. It has all your rights: the limits "
      "are no sandbox.");
  group->add_option("--verifiers", d.verifiers, "processes of the program at once");
  group->add_option("--command-seconds", d.command_seconds, "seconds for an answer");
  group->add_option("--command-start-seconds", d.command_start_seconds,
                    "more seconds for the first answer, which include the program's start");
  group->add_option("--command-memory", d.command_memory, "GB of addresses; 0: any");
  group->add_option("--command-processes", d.command_processes, "processes that it may start");
}

// Those of all three subcommands.
void add_rollout_flags(CLI::App& app, RlFlags& f) {
  DataSettings& d = f.s.data;
  app.add_option("--model", d.model,
                 "run, model directory or .gguf file that answers; ppo and grpo begin with it");
  app.add_option("--prompts", d.prompts,
                 "problems as JSON lines, a JSON array or parquet, .gz and .zst too, -: standard "
                 "input: {\"question\" or \"problem\", \"answer\", \"choices\"}, {\"messages\"}, "
                 "{\"prompt\"}, verl's; the plan says which keys were read");
  add_record_flags(app, d.records);
  auto* reward = app.add_option(
      "--reward", d.rewards,
      "[WEIGHT*]number, exact, choice, countdown (some of the numbers make the target), "
      "countdown:all, check:COMMAND, command:COMMAND, rubric, format:PATTERN, "
      "length:TOKENS, ended, model:DIRECTORY, probability:DIRECTORY (of a model of "
      "labels); several make a sum");
  auto* gold =
      app.add_option("--gold", d.gold,
                     "a reward that judges answers: never trained on, and it chooses no weights");
  app.add_option("--max-tokens", d.max_tokens, "sampled tokens of an answer");
  app.add_option("--temperature", f.s.step.temperature, "of the distribution that is sampled");
  auto* system = app.add_option("--system", d.system,
                                "system message of chats that have none, \\n: line break");
  app.add_flag("--as-chat", d.as_chat,
               "a \"prompt\" that is a string is a user's message, not a text to continue");
  add_stage_template_flags(app, d.chat_template);
  auto* form = app.add_option(
      "--form", d.form,
      "text with {question} in it, and {choices} where they shall stand apart, \\n: line break, or "
      "its file, in place of the chat template");
  auto* stop = app.add_option(
      "--stop", d.stops,
      "strings that end an answer to --form, as <|endoftext|> does, \\n: line break; "
      "none: --max-tokens do too");
  add_raw_flag(app, {system, stop});
  add_raw_flag(app, {form}, unescape_unless_file);
  add_raw_flag(app, {reward, gold}, unescape_pattern);
  app.add_option(
      "--context", d.context,
      "longest rollout in tokens, its prompt included; 0: the model's context, or what a "
      "quarter of the free memory holds as keys and values");
  app.add_option("--cache-mb", d.cache_mb,
                 "memory for keys and values of the answers that are decoded at once");
  app.add_option("--seed", f.s.step.seed, "of prompts, answers and minibatches");
  add_program_flags(app, d);
  add_run_flags(app, f.options);
}

// Those of PPO and GRPO.
void add_data_flags(CLI::App& app, DataSettings& d) {
  app.add_option("--val", d.val, "held-out prompts, for evaluations");
  app.add_option("--val-fraction", d.val_fraction, "or this share of --prompts");
  auto* data = app.add_option_group("Data", "");
  data->add_option("--tool", d.tools, "calculator, search: tools declared with every question");
  data->add_option("--documents", d.search, "documents of the search tool");
  data->add_option("--ptx", d.ptx, "prefix of token shards whose loss is added to the updates");
  data->add_option("--ptx-weight", d.ptx_weight, "weight of that loss");
  data->add_option("--ptx-tokens", d.ptx_tokens, "tokens of it in an update");
  data->add_option("--truncated", d.truncated,
                   "an answer that was cut off: penalise (gets --truncated-reward at most), mask "
                   "(is not trained on) or keep (gets its own reward)");
  data->add_option("--truncated-reward", d.truncated_reward,
                   "largest reward of an answer that was cut off; it gets less where its own "
                   "reward, or that of a finished answer to the same prompt, is less");
  data->add_option("--rows", d.rows, "answers decoded at once");
  data->add_option("--lora", d.lora,
                   "rank of adapters, which are trained in place of the model; 0: none");
  data->add_option("--lora-alpha", d.lora_alpha,
                   "the adapters' output is multiplied by alpha / rank");
}

void add_step_flags(CLI::App& app, StepSettings& s, Budget& budget) {
  auto* updates = app.add_option_group("Updates", "");
  updates->add_option("--steps", budget.steps, "steps of the run; 0: 60, or by --minutes");
  updates->add_option("--minutes", budget.minutes, "minutes of the run, evaluations included");
  updates->add_option("--rollouts", s.rollouts, "rollouts of a step");
  updates->add_option("--minibatches", s.minibatches, "parts of a step's rollouts, one an update");
  updates->add_option("--epochs", s.epochs, "times that a step's rollouts are used");
  updates->add_option("--clip-ratio", s.clip_low, "the ratio's gradient ends at 1 minus this");
  updates->add_option("--clip-ratio-high", s.clip_high,
                      "and at 1 plus this; -1: as --clip-ratio; with --method dapo .28");
  updates->add_option("--beta", s.beta, "price of the KL to the reference");
  updates->add_option("--kl-budget", s.kl_budget,
                      "KL to the reference per response above which the run ends, with the last "
                      "weights that were within it, or the best; 0: any");
  updates->add_option("--entropy", s.entropy, "weight of an entropy bonus");
  updates->add_option(kMicroBatchFlag, s.micro_batch_tokens, kMicroBatchHelp);
  add_optimizer_flags(app, s.optimizer, "the policy's peak learning rate; 0: by the model's width");
}

void add_rl_flags(CLI::App& app, RlFlags& f) {
  add_rollout_flags(app, f), add_data_flags(app, f.s.data);
  add_step_flags(app, f.s.step, f.s.budget);
  EvaluationSettings& e = f.s.evaluation;
  auto* group = app.add_option_group("Evaluation", "");
  group->add_option("--eval-every", e.eval_every, "steps; 0: a fifth of the run");
  group->add_option("--eval-some", e.eval_some, "held-out prompts of an evaluation during the run");
  group->add_option("--limit", e.eval_prompts, "held-out prompts of the last one; 0: all");
  group->add_option("--samples", e.eval_samples, "answers to each held-out prompt");
  group
      ->add_option("--eval-at-kl", e.eval_at_kl,
                   "also evaluate when the square root of the KL per response passes each of "
                   "these, and end the run after the last one")
      ->delimiter(',');
  group->add_option("--keep", e.keep, "best (by --val) or last weights; empty: chosen");
  group->add_flag("--no-rollouts", e.no_rollouts,
                  "do not write DIR/rollouts.jsonl, a line for each answer of a step");
}

void add_ppo_flags(CLI::App& app, RlFlags& f) {
  PpoSettings& s = f.s.ppo;
  f.s.step.minibatches = 4, f.s.step.epochs = 2;
  f.s.step.beta = .05;
  f.s.step.optimizer.eps = 1e-5;
  f.s.data.truncated_reward = -3;
  f.s.evaluation.eval_samples = 1;
  add_rl_flags(app, f);
  auto* group = app.add_option_group("PPO", "");
  group->add_option("--critic", s.critic,
                    "model with a scalar head to begin the critic from; empty: the reward model, "
                    "otherwise the policy with a head of zeros");
  group->add_option("--critic-lr", s.critic_lr, "the critic's learning rate; 0: 5 times --lr");
  group->add_option("--critic-warmup", s.critic_warmup, "steps in which only the critic learns");
  group->add_option("--kl-target", f.s.step.kl_target,
                    "KL per response to which beta is adapted; 0: beta stays");
  group->add_option("--kl-horizon", f.s.step.kl_horizon,
                    "rollouts in which beta changes by a factor of e^.2 at most");
  group->add_option("--gamma", s.gamma, "discount of later rewards");
  group->add_option("--lambda", s.lambda, "GAE's lambda");
  group->add_option("--value-clip", s.value_clip, "largest change of a value; 0: any");
  group->add_flag("--whiten-rewards", s.whiten_rewards, "scale token rewards to variance 1");
}

void add_grpo_flags(CLI::App& app, RlFlags& f) {
  GrpoSettings& s = f.s.grpo;
  add_rl_flags(app, f);
  auto* group = app.add_option_group("GRPO", "");
  group->add_option("--group", s.group, "rollouts of each prompt");
  group->add_option("--method", s.method, "centered_token_mean, grpo, dr_grpo, dapo, rloo or gspo");
  group->add_option("--resample", s.resample,
                    "rounds that may replace groups whose rewards are equal; -1: 0, dapo 3");
  group->add_option("--pass-rate", s.pass_rate,
                    "LOW:HIGH: train on problems that the policy solves so often; empty: on all");
  group->add_option("--pass-samples", s.pass_samples, "answers to each problem, to find out");
  group->add_option("--pass-problems", s.pass_problems, "problems that are tried; 0: all");
}

void add_best_of_n_flags(CLI::App& app, RlFlags& f) {
  f.s.data.rows = 64, f.s.evaluation.eval_samples = 16;
  add_rollout_flags(app, f);
  app.add_option("--write", f.write, "file for the chosen answers, as ./sft reads it");
  app.add_option("--samples", f.s.evaluation.eval_samples, "answers to each prompt");
  app.add_option("--limit", f.s.evaluation.eval_prompts, "prompts; 0: all");
}

// The settings of a run of best-of-n that is resumed. Older versions had other names for some.
RlSettings saved_best_of_n_settings(const RunOptions& o) {
  const std::filesystem::path path = o.out / "state.json";
  Json saved = json_get<Json>(read_json(path), "settings", path.string());
  rename_keys(saved, {{"n", "eval_samples"},
                      {"samples", "eval_samples"},
                      {"most", "eval_prompts"},
                      {"limit", "eval_prompts"}});
  try {
    return saved.get<RlSettings>();
  } catch (const Json::exception& e) {
    fail(path.string(), ": settings: ", json_complaint(e));
  }
}

const char* kClip = "expected --clip-ratio (of PPO's ratio) or --clip-norm (of the gradient)";
const char* kSampling =
    "found with RL, which samples from the distribution that it scores, expected none";
const RenamedFlag kRenamed[] = {
    {"--clip", "", kClip, "ppo"},
    {"--clip", "", kClip, "grpo"},
    {"--top-k", "", kSampling},
    {"--top-p", "", kSampling},
    {"--min-p", "", kSampling},
    {"--repetition-penalty", "", kSampling},
    {"--ban-token", "", kSampling},
    {"--clip-high", "--clip-ratio-high"},
    {"--search", "--documents"},
    {"--eval-samples", "--samples"},
    {"--eval-prompts", "--limit"},
    {"--end-penalty", "--truncated-reward"},
    {"--n", "--samples", "", "best-of-n"},
    {"--most", "--limit", "", "best-of-n"},
};

int main_rlhf(int argc, char** argv) {
  const std::string stage = argc > 1 ? argv[1] : "";
  if (stage == "reward") fail("./rlhf reward: expected ./reward train, where it is now");
  if (stage == "dpo") fail("./rlhf dpo: expected ./reward dpo, where it is now");
  if (stage == "overoptimize") fail("./rlhf overoptimize: expected make overoptimize");
  CLI::App app("Reinforcement learning: an assistant and a reward make a better assistant.");
  app.option_defaults()->always_capture_default();
  app.require_subcommand(1);
  CLI::App* ppo = app.add_subcommand("ppo", "train a policy on a reward, near a reference");
  CLI::App* grpo = app.add_subcommand("grpo", "train a policy on comparisons of its own answers");
  CLI::App* best = app.add_subcommand(
      "best-of-n", "choose the best of several answers: a baseline, and data for ./sft");
  RlFlags of_ppo, of_grpo, of_best;
  add_ppo_flags(*ppo, of_ppo), add_grpo_flags(*grpo, of_grpo), add_best_of_n_flags(*best, of_best);
  std::vector<std::string> shown = {"--model",    "--prompts",    "--map",      "--val",
                                    "--reward",   "--out",        "--resume",   "--steps",
                                    "--rollouts", "--max-tokens", "--kl-budget"};
  std::vector<HelpPage> pages = {{ppo, shown},
                                 {grpo, shown},
                                 {best,
                                  {"--model", "--prompts", "--map", "--reward", "--gold", "--out",
                                   "--resume", "--write", "--samples", "--limit", "--max-tokens"}}};
  pages[1].shown.back() = "--group";
  if (!parse_flags(app, argc, argv, pages, kRenamed)) return 0;
  RlFlags& f = app.got_subcommand(ppo) ? of_ppo : app.got_subcommand(grpo) ? of_grpo : of_best;
  if (app.got_subcommand(best)) {
    const bool resume = std::exchange(f.options.resume, false);  // its run holds no model
    if (resume && f.options.overwrite) fail("--resume and --overwrite: found both, expected one");
    begin_process(f.options);
    f.options.resume = resume;
    if (resume) {
      resume_settings(*best, f.s, f.s.budget, f.options, saved_best_of_n_settings(f.options),
                      {"--limit", "--cache-mb", "--verifiers", "--command-seconds",
                       "--command-start-seconds", "--command-memory", "--command-processes"});
    }
    try {
      return best_of_n(f.s, f.options, f.write);
    } catch (const Interrupted&) {
      std::printf("stopped: go on with --resume\n");
      return 128 + stop_signal;
    }
  }
  begin_process(f.options);
  const Algorithm& algorithm = app.got_subcommand(ppo) ? kPpo : kGrpo;
  if (f.options.resume) {
    resume_settings(app.got_subcommand(ppo) ? *ppo : *grpo, f.s, f.s.budget, f.options,
                    saved_settings<RlSettings>(f.options, algorithm.name),
                    {"--eval-every", "--eval-some", "--limit", "--samples", "--rows", "--cache-mb",
                     "--no-rollouts", "--verifiers", "--command-seconds", "--command-start-seconds",
                     "--command-memory", "--command-processes"});
  } else {
    check_budget(f.s.budget);
  }
  return run_rl(algorithm, f.s, f.options);
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_rlhf(argc, argv); });
}
