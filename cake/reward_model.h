// A reward model at work: a language model whose head was exchanged for one row gives a whole
// sequence, which ends at the end of a turn, one number.
//
// `./reward train` makes one, `./reward score` and the rewards of `./rlhf` use it.
#pragma once

#include <algorithm>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/packed.h"
#include "cake/tokenizer.h"

namespace cake {

// What a reward model reads: the ids with <|im_end|> behind them, which a text that was cut off
// lacks.
inline std::vector<int> with_end_of_turn(std::vector<int> ids, int end_of_turn) {
  if (ids.empty() || ids.back() != end_of_turn) ids.push_back(end_of_turn);
  return ids;
}

// The hash of a model's weights, with that of its adapters. A checkpoint names the models that it
// depends on by path and hash, and copies nothing of them.
inline std::string model_hash(const std::filesystem::path& dir) {
  if (!has_adapters(dir)) return SafeTensors::of_model(dir).hash();
  return SafeTensors(dir / "adapter_model.safetensors").hash() + adapter_base(dir).hash;
}

// Fails where a model has another hash than the run's checkpoint has `saved` of it, {"path",
// "hash"}. Older versions saved a SHA-256, 64 digits, which cannot be compared and passes.
inline void check_model_hash(const Json& saved, const std::string& found) {
  const auto expected = saved.at("hash").get<std::string>();
  if (found == expected || expected.size() >= 64) return;
  fail(saved.at("path").get<std::string>(), ": found a model of hash ", found, ", expected ",
       expected, ", that of the run's beginning: it has changed");
}

// The value after the last id of each sequence.
inline std::vector<float> values_at_end(Gpt& gpt, std::span<const std::vector<int>> sequences,
                                        int64_t micro_batch_tokens) {
  std::vector<Packed> batches;
  for (const std::vector<int>& ids : sequences) {
    batch_with_room(batches, int64_t(ids.size()), micro_batch_tokens)
        .add(0, ids, ids.size(), [](size_t) { return false; });
  }
  std::vector<float> values;
  for (const Packed& b : batches) {
    gpt.forward(b.batch(), Pass::score);
    const std::span<const float> value = gpt.value();
    for (size_t i = 0; i < b.members.size(); i++) values.push_back(value[b.last(i)]);
  }
  return values;
}

class RewardModel {
 public:
  RewardModel(const std::filesystem::path& path, Device device, int64_t micro_batch_tokens = 4096)
      : dir_(model_dir(path)), micro_batch_tokens_(micro_batch_tokens) {
    const Config config = load_config_with_head(dir_, Head::scalar);
    shift_ = float(config.reward_shift);
    gpt_ = make_gpt(config, {.device = device,
                             .mode = Mode::inference,
                             .batch_tokens = int(std::max<int64_t>(micro_batch_tokens, config.T))});
    load_weights(dir_, *gpt_);
  }

  // The reward of each sequence: the value after its last id, plus the config's reward_shift.
  std::vector<float> score(std::span<const std::vector<int>> sequences) {
    for (const std::vector<int>& ids : sequences) {
      if (ids.empty() || int(ids.size()) > gpt_->config().T) {
        fail(dir_.string(), ": found a sequence of ", ids.size(),
             " tokens to score, expected 1 to ", gpt_->config().T, ", the reward model's context");
      }
    }
    std::vector<float> rewards = values_at_end(*gpt_, sequences, micro_batch_tokens_);
    for (float& reward : rewards) reward += shift_;
    return rewards;
  }

  // Fails where ids do not mean the same to this model and to the policy.
  void check_tokenizer(const Tokenizer& policy, const std::filesystem::path& policy_dir) const {
    const Tokenizer own = Tokenizer::load(dir_);
    if (own.hash() == policy.hash()) return;
    fail(dir_.string(), ": found another vocabulary (", own.vocab_size(), " tokens) than that of ",
         policy_dir.string(), " (", policy.vocab_size(), "), expected the same");
  }
  const std::filesystem::path& dir() const { return dir_; }
  Gpt& gpt() { return *gpt_; }
  int64_t micro_batch_tokens() const { return micro_batch_tokens_; }
  bool shifted() const { return shift_ != 0; }  // scores were moved to mean 0
  std::string hash() const { return model_hash(dir_); }

 private:
  std::filesystem::path dir_;
  int64_t micro_batch_tokens_;
  float shift_ = 0;
  std::unique_ptr<Gpt> gpt_;
};

}  // namespace cake
