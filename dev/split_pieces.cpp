// How ./bpe cuts text, for comparisons with other implementations: dev/golden/split.py.
//
// Reads JSON lines. An object sets the pre-tokenizer, and is answered with "ok" or an error:
//   {"regex": "...", "tiktoken": false}    tiktoken: as tiktoken reads it
//   {"steps": [{"kind": "regex", "text": "...", "behavior": "isolated", "invert": false}, ...],
//    "bytes": false}
// A string is a text, and is answered with the lengths of its pieces, in code points or in bytes.
#include <cstdio>
#include <iostream>

#include "cake/json.h"
#include "cake/split.h"
#include "cake/split_regex.h"

using namespace cake;

namespace {

SplitStep read_step(const Json& json) {
  static const std::vector<std::string> kKinds = {"pattern", "regex", "literal", "digits",
                                                  "punctuation"};
  static const std::vector<std::string> kBehaviors = {"isolated", "removed", "merged_with_previous",
                                                      "merged_with_next", "contiguous"};
  const auto number = [&](const std::vector<std::string>& names, const std::string& name) {
    for (size_t i = 0; i < names.size(); i++)
      if (names[i] == name) return int(i);
    fail("found ", name, ", expected ", names[0], " or another");
  };
  SplitStep step;
  step.kind = SplitStep::Kind(number(kKinds, json.at("kind")));
  step.text = json.value("text", "");
  if (step.kind == SplitStep::Kind::pattern) step.pattern = parse_pattern(step.text);
  step.behavior = SplitBehavior(number(kBehaviors, json.value("behavior", "isolated")));
  step.invert = json.value("invert", false);
  step.of_bytes = json.value("of_bytes", false);
  step.individual_digits = json.value("individual_digits", true);
  return step;
}

PreTokenizer read_pre_tokenizer(const Json& json) {
  std::vector<SplitStep> steps;
  if (json.contains("regex")) {
    std::string regex = json["regex"];
    if (json.value("tiktoken", false)) regex = SplitRegex::spelled_for_oniguruma(regex);
    steps.push_back({.kind = SplitStep::Kind::regex, .text = regex});
  } else {
    for (const Json& step : json.at("steps")) steps.push_back(read_step(step));
  }
  return PreTokenizer(steps);
}

void print_lengths(const PreTokenizer& pre_tokenizer, const std::string& text, bool bytes) {
  std::vector<std::string_view> pieces;
  pre_tokenizer.split(text, text.size(), pieces);
  std::string line;
  for (const std::string_view piece : pieces) {
    int length = 0;
    for (const char c : piece) length += bytes || (c & 0xC0) != 0x80;
    line += (line.empty() ? "" : " ") + std::to_string(length);
  }
  std::puts(line.c_str());
}

}  // namespace

int main() {
  return guarded_main([] {
    PreTokenizer pre_tokenizer;
    bool bytes = false;
    for (std::string line; std::getline(std::cin, line);) {
      const Json json = Json::parse(line);
      if (json.is_string()) {
        print_lengths(pre_tokenizer, json, bytes);
        continue;
      }
      try {
        pre_tokenizer = read_pre_tokenizer(json);
        bytes = json.value("bytes", false);
        std::puts("ok");
      } catch (const Error& error) {
        std::puts(error.what());
      }
    }
    return 0;
  });
}
