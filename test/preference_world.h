// A small world of preferences for the tests of stages 4 and 5: a model, comparisons, prompts.
#pragma once

#include <sstream>

#include "cake/checkpoint.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/schedule.h"
#include "cake/tokenizer.h"
#include "test/support.h"

namespace cake::preference_world {

// 40 prompts, answers that are good ("yes ...") or bad ("no ..."), some longer

inline const std::filesystem::path& world() {
  static const TempDir dir;
  static const std::filesystem::path path = [] {
    std::string text;
    for (int i = 0; i < 200; i++) text += "the user asks, the assistant says yes or no, 1 2 3 4.\n";
    write_file(dir / "text.txt", text);
    const Tokenizer t = train_tokenizer({.inputs = {(dir / "text.txt").string()}}, 300, "qwen2");
    std::filesystem::create_directories(dir / "tokenizer");
    t.save(dir / "tokenizer");
    Config c = new_config(Family::qwen3, 2, 32, t.vocab_size(), 96);
    c.HS = 16, c.NH = 2, c.NKV = 1;
    const auto gpt = make_gpt(c, {.device = Device::cpu});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      Tensor tensor = gpt->table().tensors[i];
      if (tensor.init_std < .05 && !tensor.init_one) tensor.init_std = .05;
      gpt->write(int(i), Slot::weight, initial_values(tensor, 5));
    }
    save_checkpoint(dir / "model", *gpt, {.tokenizer_from = dir / "tokenizer"});

    std::string pairs, shuffled, rankings, labels, prompts;
    for (int i = 0; i < 160; i++) {
      const std::string asked = concat("ask ", i / 4);  // four pairs a problem
      const std::string good = concat("yes ", i % 5, i % 4 == 0 ? " and more, and more" : "");
      const std::string bad = concat("no ", i % 3, i % 4 == 1 ? " and more" : " ok");
      const auto pair = [&](const std::string& chosen, const std::string& rejected) {
        return Json{{"prompt", asked}, {"chosen", chosen}, {"rejected", rejected}}.dump() + "\n";
      };
      pairs += pair(good, bad);
      shuffled += mix64(uint64_t(i)) % 2 ? pair(good, bad) : pair(bad, good);
      const Json messages = Json::array({{{"role", "user"}, {"content", asked}}});
      rankings += Json{{"prompt", messages},
                       {"responses", {bad, good, "no no", concat("yes, ", i % 7)}},
                       {"ranking", {2, 1, 2, 1}}}
                      .dump() +
                  "\n";
      labels += Json{{"text", i % 2 ? good : bad}, {"label", i % 2 ? "pos" : "neg"}}.dump() + "\n";
      if (i < 24) {
        prompts += Json{{"messages", messages},
                        {"rubric",
                         {{{"kind", "mentions"}, {"words", {"yes"}}, {"weight", 1}},
                          {{"kind", "varied"}, {"weight", 1}}}}}
                       .dump() +
                   "\n";
      }
    }
    write_file(dir / "pairs.jsonl", pairs);
    write_file(dir / "shuffled.jsonl", shuffled);
    write_file(dir / "rankings.jsonl", rankings);
    write_file(dir / "labels.jsonl", labels);
    write_file(dir / "prompts.jsonl", prompts);
    return dir.path();
  }();
  return path;
}

inline std::string file(const std::string& name) { return (world() / name).string(); }

// A stage that begins with the world's model.
inline std::string stage(const std::string& command, const std::filesystem::path& out,
                         const std::string& flags) {
  return concat("./", command, " --model ", file("model"), " -o ", out.string(), " ", flags);
}

inline Output good(const std::string& command) {
  const Output o = shell(command);
  REQUIRE_MESSAGE(o.status == 0, o.text);
  return o;
}

// The lines of metrics.jsonl that have `key`.
inline std::vector<Json> metrics(const std::filesystem::path& run, const std::string& key) {
  std::vector<Json> found;
  std::istringstream lines(read_file(run / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line);
    if (json.contains(key)) found.push_back(json);
  }
  return found;
}

}  // namespace cake::preference_world
