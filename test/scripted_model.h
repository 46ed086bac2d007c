// A model that writes what a test tells it to, by position: the token after position p is script[p]
// whatever was read, at temperature 0. GPT-2's learned positions are all it looks at.
#pragma once

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/tokenizer.h"
#include "test/support.h"

namespace cake {

class ScriptedModel {
 public:
  explicit ScriptedModel(int T = 512) : T_(T), tokenizer_(make_tokenizer(dir_)) {
    script_.assign(size_t(T), tokenizer_.encode("x")[0]);
  }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  int T() const { return T_; }

  // After a prompt of n tokens, these follow. Returns the position behind them.
  int write(int n, std::span<const int> ids) {
    for (const int id : ids) script_.at(size_t(n++ - 1)) = id;
    return n;
  }
  int write(int n, const std::string& text) { return write(n, tokenizer_.encode(text, true)); }

  // The model directory, with the script as it is now.
  std::string save(const std::string& name = "model") {
    const Config c{.family = Family::gpt2,
                   .V = tokenizer_.vocab_size(),
                   .T = T_,
                   .L = 1,
                   .C = 384,
                   .NH = 6,
                   .NKV = 6,
                   .HS = 64,
                   .F = 8,
                   .tied = true};
    REQUIRE(c.V <= c.C);
    const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      const Tensor& t = gpt->table().tensors[i];
      std::vector<float> values(size_t(t.size()), t.init_one ? 1.f : 0.f);
      if (t.kind == Kind::embedding) {
        for (size_t v = 0; v < size_t(c.V); v++) values[v * size_t(c.C) + v] = 1;
      }
      if (t.kind == Kind::position) {
        for (size_t p = 0; p < size_t(T_); p++) values[p * size_t(c.C) + size_t(script_[p])] = 10;
      }
      gpt->write(int(i), Slot::weight, values);
    }
    save_checkpoint(dir_ / name, *gpt, {.tokenizer_from = dir_ / "tokenizer"});
    return dir_ / name;
  }
  const TempDir& dir() const { return dir_; }

 private:
  static Tokenizer make_tokenizer(const TempDir& dir) {
    std::string text;
    for (int i = 0; i < 50; i++) text += concat("The answer is ", i, ". user system assistant\n");
    write_file(dir / "text.txt", text);
    const Tokenizer t = train_tokenizer({.inputs = {dir / "text.txt"}}, 320, "qwen2");
    std::filesystem::create_directories(dir / "tokenizer");
    t.save(dir / "tokenizer");
    return t;
  }

  TempDir dir_;
  int T_;
  Tokenizer tokenizer_;
  std::vector<int> script_;
};

}  // namespace cake
