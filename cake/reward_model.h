// A reward model at work: a language model whose head was exchanged for one row gives a whole
// sequence one number, read at its last id: StageTemplate::end_token.
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

// What a reward model reads: the ids with `end` behind them, which a text that was cut off lacks.
// `end`: StageTemplate::end_token of the text's kind.
inline std::vector<int> with_end(std::vector<int> ids, int end) {
  if (ids.empty() || ids.back() != end) ids.push_back(end);
  return ids;
}

// Fails where ids do not mean the same to the model in `dir` and to that of `tokenizer`.
inline void expect_same_vocabulary(const std::filesystem::path& dir, const Tokenizer& tokenizer,
                                   const std::filesystem::path& tokenizer_dir) {
  const Tokenizer found = Tokenizer::load(dir);
  if (found.hash() == tokenizer.hash()) return;
  fail(dir.string(), ": found another vocabulary (", found.vocab_size(), " tokens) than that of ",
       tokenizer_dir.string(), " (", tokenizer.vocab_size(), "), expected the same");
}

// The hash of a model's weights, with that of its adapters. A checkpoint names the models that it
// depends on by path and hash, and copies nothing of them.
inline std::string model_hash(const std::filesystem::path& dir) {
  if (!has_adapters(dir)) return weights_hash(dir);
  return SafeTensors(dir / "adapter_model.safetensors").hash() + adapter_base(dir).hash;
}

// Fails where a model has another hash than the run's checkpoint has `saved` of it, {"path",
// "hash"}. Older versions saved a SHA-256, 64 digits, which cannot be compared and passes.
inline void check_model_hash(const Json& saved, const std::string& found,
                             const std::string& where = "trainer_state.json") {
  const auto path = json_get<std::string>(saved, "path", where),
             expected = json_get<std::string>(saved, "hash", where + ": " + path);
  if (found == expected || expected.size() >= 64) return;
  fail(path, ": found a model of hash ", found, ", expected ", expected,
       ", that of the run's beginning: it has changed");
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
    gpt_ = make_gpt(config, options(config, device, micro_batch_tokens));
    load_weights(dir_, *gpt_);
  }
  static GptOptions options(const Config& config, Device device, int64_t micro_batch_tokens) {
    return {.device = device,
            .mode = Mode::inference,
            .batch_tokens = int(std::max<int64_t>(micro_batch_tokens, config.T))};
  }

  // The reward of each sequence: the value after its last id, plus the config's reward_shift.
  // transformers reads the score at the last token that is not pad_token_id, so that a text must
  // not end with it.
  std::vector<float> score(std::span<const std::vector<int>> sequences) {
    for (const std::vector<int>& ids : sequences) {
      if (!ids.empty() && ids.back() == gpt_->config().pad) {
        fail(dir_.string(), ": found a raw text to score, which ends with token ", ids.back(),
             ", the model's pad_token_id: it was trained on chats alone, or by an older version; ",
             "expected a model that ./reward train made of raw texts");
      }
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
    expect_same_vocabulary(dir_, policy, policy_dir);
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
