// Any bytes as a problem or a check and, behind a byte 0, as a model's answer, and behind another
// one as the pattern of `format`: every verifier that runs no command judges the answer, and every
// check does. Judging ends with 0 or 1 (rubric: a finite number), or the problem is refused before.
#include <cmath>
#include <string>
#include <vector>

#include "cake/verify.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;

void judge(const std::string& name, const std::string& argument, const Problem& problem,
           std::string_view answer) {
  const std::optional<Verifier> verifier = make_verifier(name, argument, {});
  fuzz::expect(verifier.has_value(), "the verifier is there");
  try {
    verifier->check_problem(problem);
  } catch (const Error& error) {
    fuzz::expect(std::string_view(error.what()).find('\n') == std::string_view::npos, "one line");
    return;
  }
  const Attempt attempt{&problem, answer};
  const std::vector<float> scores = verifier->score({&attempt, 1});
  fuzz::expect(scores.size() == 1 && std::isfinite(scores[0]), "a score is a number");
  fuzz::expect(!verifier->is_pass_fail || scores[0] == 0 || scores[0] == 1, "right or wrong");
}

void judge_all(const Problem& problem, std::string_view answer, const std::string& pattern) {
  for (const char* name : {"number", "exact", "choice", "countdown", "rubric"}) {
    judge(name, "", problem, answer);
  }
  judge("countdown", "all", problem, answer);
  if (!pattern.empty()) judge("format", pattern, problem, answer);
}

// The first part as it stands, wherever a problem has text.
Problem raw_problem(const std::string& text) {
  Problem p;
  p.question = p.target = text;
  p.answers = {text};
  p.where = "raw:1";
  for (size_t i = 0, end; i < text.size() && p.numbers.size() < 10; i = end + 1) {
    end = std::min(text.find(' ', i), text.size());
    p.numbers.push_back(text.substr(i, end - i));
  }
  return p;
}

void check(const std::string& text, std::string_view answer, const std::string& pattern) {
  Problem raw = raw_problem(text);
  judge_all(raw, answer, pattern);
  raw.choices = {"red", "green", text};
  judge_all(raw, answer, pattern);
  refuses(answer);
  contains_words(answer, text);

  Json json;
  try {
    json = parse_json(text, "check");
    passes(parse_check(json, "check"), answer, {"search"});
  } catch (const Error&) {  // no check
  }
  simdjson::dom::parser parser;
  Record record;
  record.where = "problem:1";
  if (parser.parse(text).get(record.object)) return;
  try {
    judge_all(parse_problem(record), answer, pattern);
  } catch (const Error& error) {  // no problem
    fuzz::expect(std::string_view(error.what()).find('\n') == std::string_view::npos, "one line");
  }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string all(reinterpret_cast<const char*>(data), size);
  const size_t first = std::min(all.find('\0'), size);
  const size_t second = std::min(all.find('\0', first + 1), size);
  const auto part = [&](size_t begin, size_t end) {
    return begin < end ? all.substr(begin, end - begin) : std::string();
  };
  check(part(0, first), part(first + 1, second), part(second + 1, size));
  return 0;
}
