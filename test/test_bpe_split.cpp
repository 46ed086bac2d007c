// How text is cut into pieces: regular expressions against Python's regex, steps against Hugging
// Face's tokenizers (test/golden/split.json), scanners written by hand against their expressions,
// safe cuts against their definition.
#include <string>
#include <string_view>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"
#include "cake/split.h"
#include "cake/split_regex.h"
#include "cake/tokenizer.h"
#include "cake/unicode.h"
#include "test/support.h"

using namespace cake;

namespace {

using StepKind = SplitStep::Kind;
using Pieces = std::vector<std::string_view>;

Pieces pieces_of(const PreTokenizer& pre_tokenizer, std::string_view text, size_t end) {
  Pieces pieces;
  pre_tokenizer.split(text, end, pieces);
  return pieces;
}
Pieces pieces_of(const PreTokenizer& pre_tokenizer, std::string_view text) {
  return pieces_of(pre_tokenizer, text, text.size());
}
std::vector<std::string> strings_of(const PreTokenizer& pre_tokenizer, std::string_view text) {
  const Pieces pieces = pieces_of(pre_tokenizer, text);
  return {pieces.begin(), pieces.end()};
}

PreTokenizer regex_of(const std::string& regex) {
  return PreTokenizer({{.kind = StepKind::regex, .text = regex}});
}
std::vector<std::string> matches(const std::string& regex, std::string_view text) {
  return strings_of(regex_of(regex), text);
}

// As the golden spells them: in code points, or in bytes.
std::string lengths(const Pieces& pieces, bool bytes) {
  std::string out;
  for (const std::string_view piece : pieces) {
    int length = 0;
    for (const char c : piece) length += bytes || (c & 0xC0) != 0x80;
    out += (out.empty() ? "" : " ") + std::to_string(length);
  }
  return out;
}

// Text that visits every class and every corner of the patterns; with `invalid`, bytes that are not
// UTF-8 too.
std::string random_text(Rng& rng, int characters, bool invalid = false) {
  static const std::vector<std::string> alphabet = {
      "a",      "b",      "e",      "A",   "Z",  "s",  "S",    "t",      "ll",
      "'",      "'",      " ",      " ",   " ",  "  ", "\n",   "\n",     "\r\n",
      "\t",     "/",      "!",      ".",   "0",  "1",  "23",   "the ",   "ing ",
      "\u0301", "日",     "本",     "ſ",   "ß",  "ǅ",  "ʰ",    "\u00a0", "\u3000",
      "\u0085", "\u001c", "\u200b", "½",   "é",  "É",  "😀",    "'re",    "x",
      "-",      "(",      "|",      "$",   "１", "²",  "か",   "ガ",     "가",
      "न",      "\u093e", "#",      "IMG", "_",  ",",  "\xff", "\xc3",   "\xed\xa0\x80",
      "\x80"};
  std::string text;
  for (int i = 0; i < characters; i++) {
    text += alphabet[rng.below(alphabet.size() - (invalid ? 0 : 4))];
  }
  return text;
}

SplitStep step_of(const Json& json) {
  static const std::map<std::string, StepKind> kinds = {{"pattern", StepKind::pattern},
                                                        {"regex", StepKind::regex},
                                                        {"literal", StepKind::literal},
                                                        {"digits", StepKind::digits},
                                                        {"punctuation", StepKind::punctuation}};
  static const std::map<std::string, SplitBehavior> behaviors = {
      {"isolated", SplitBehavior::isolated},
      {"removed", SplitBehavior::removed},
      {"merged_with_previous", SplitBehavior::merged_with_previous},
      {"merged_with_next", SplitBehavior::merged_with_next},
      {"contiguous", SplitBehavior::contiguous}};
  SplitStep step{.kind = kinds.at(json["kind"]), .text = json.value("text", "")};
  if (step.kind == StepKind::pattern) step.pattern = parse_pattern(step.text);
  step.behavior = behaviors.at(json.value("behavior", "isolated"));
  step.invert = json.value("invert", false);
  step.individual_digits = json.value("individual_digits", true);
  step.of_bytes = json.value("of_bytes", false);
  return step;
}

struct GoldenSplit {
  std::string name;
  PreTokenizer pre_tokenizer;
  bool bytes = false;
  Json pieces;  // of each text: a string of lengths, or null
};

struct Golden {
  std::vector<std::string> texts;
  std::vector<GoldenSplit> splits;
};

const Golden& golden() {
  static const Golden all = [] {
    const Json json = Json::parse(read_file("test/golden/split.json"));
    Golden out{.texts = json["texts"]};
    for (const Json& e : json["expressions"]) {
      std::string regex = e["regex"];
      if (e["tiktoken"]) regex = SplitRegex::spelled_for_oniguruma(regex);
      out.splits.push_back({.name = e["name"] == "random" ? e["regex"] : e["name"],
                            .pre_tokenizer = regex_of(regex),
                            .pieces = e["pieces"]});
    }
    for (const Json& s : json["sequences"]) {
      std::vector<SplitStep> steps;
      bool bytes = false;
      for (const Json& step : s["steps"]) {
        steps.push_back(step_of(step));
        bytes |= steps.back().of_bytes;
      }
      out.splits.push_back({s["name"], PreTokenizer(steps), bytes, s["pieces"]});
    }
    return out;
  }();
  return all;
}

}  // namespace

TEST_CASE("split: pieces are those of Python's regex and of Hugging Face's tokenizers") {
  REQUIRE(golden().splits.size() > 100);
  for (const GoldenSplit& split : golden().splits) {
    for (size_t i = 0; i < split.pieces.size(); i++) {
      if (split.pieces[i].is_null()) continue;
      const std::string& text = golden().texts[i];
      CHECK_MESSAGE(lengths(pieces_of(split.pre_tokenizer, text), split.bytes) ==
                        split.pieces[i].get<std::string>(),
                    split.name, ": ", Json(text).dump());
    }
  }
}

TEST_CASE("split: a scanner written by hand finds what its regular expression finds") {
  for (const char* name : {"gpt2", "cl100k", "qwen2", "o200k"}) {
    const PreTokenizer by_hand(parse_pattern(name));
    const PreTokenizer compiled = regex_of(pattern_regex(parse_pattern(name)));
    REQUIRE(by_hand.pattern());
    REQUIRE(!compiled.pattern());
    Rng rng{1};
    for (int i = 0; i < 3000; i++) {
      const std::string text = random_text(rng, 1 + int(rng.below(30)), true);
      CHECK(pieces_of(by_hand, text) == pieces_of(compiled, text));
    }
  }
}

TEST_CASE("split: the fast loop finds what match_end finds") {
  for (const GoldenSplit& split : golden().splits) {
    if (split.pre_tokenizer.steps().size() != 1) continue;
    const SplitStep& step = split.pre_tokenizer.steps()[0];
    if (step.kind != StepKind::regex || step.behavior != SplitBehavior::isolated) continue;
    const SplitRegex regex(step.text);
    if (regex.matches_empty()) continue;
    Rng rng{2};
    for (int t = 0; t < 40; t++) {
      const std::string text = random_text(rng, t < 30 ? 10 : 400, true);
      RegexScanner scanner(regex, text);
      Pieces plain;
      size_t gap = 0;
      for (size_t i = 0; i < text.size();) {
        const size_t end = scanner.match_end(i);
        if (end == RegexScanner::kNoMatch) {
          i += size_t(decode_utf8(text.data() + i, text.size() - i).bytes);
          continue;
        }
        if (i > gap) plain.push_back(std::string_view(text).substr(gap, i - gap));
        plain.push_back(std::string_view(text).substr(i, end - i));
        gap = i = end;
      }
      if (text.size() > gap) plain.push_back(std::string_view(text).substr(gap));
      CHECK_MESSAGE(pieces_of(split.pre_tokenizer, text) == plain, split.name);
    }
  }
}

TEST_CASE("split: every published spelling of a known pattern has its scanner") {
  const auto known = [](const SplitStep& step) -> std::string {
    return step.kind == StepKind::pattern ? pattern_name(step.pattern) : "none";
  };
  const std::string rest = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  const std::string spelled = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
  const std::string word = R"(|[^\r\n\p{L}\p{N}]?\p{L}+|)";
  CHECK(known(split_step(
            R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)")) ==
        "gpt2");
  CHECK(known(split_step(
            R"('s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)")) ==
        "gpt2");
  CHECK(
      known(split_step_of_tiktoken(
          R"('(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s)")) ==
      "gpt2");
  CHECK(
      known(split_step(
          R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)")) ==
      "cl100k");
  CHECK(known(split_step("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + word + R"(\p{N}{1,3})" + rest)) ==
        "cl100k");
  CHECK(
      known(split_step(
          R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)")) ==
      "qwen2");
  CHECK(known(split_step("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + word + R"(\p{N}{1})" + rest)) == "qwen2");
  for (const char* name : {"gpt2", "cl100k", "qwen2", "o200k"}) {
    CHECK(known(split_step(pattern_regex(parse_pattern(name)))) == name);
  }

  // Others that look like them. Without U+017F; with a possessive count, which Oniguruma repeats;
  // with the end of the text before newlines, where only the pieces differ and not the ids.
  CHECK(known(split_step(spelled + word + R"(\p{N}{1,3})" + rest)) == "none");
  CHECK(known(split_step("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + word + R"(\p{N}{1,3}+)" + rest)) ==
        "none");
  CHECK(known(split_step_of_tiktoken("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + word + R"(\p{N}{1,3}+)" +
                                     rest)) == "cl100k");
  CHECK(known(split_step(R"([^\r\n\p{L}\p{N}]?\p{L}+)")) == "none");
}

TEST_CASE("split: the two published forms of cl100k make the same ids of different pieces") {
  const SplitStep other = split_step_of_tiktoken(
      R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s)");
  REQUIRE(other.kind == StepKind::regex);
  Rng rng{3};
  std::string corpus;
  for (int i = 0; i < 20000; i++) {
    corpus += random_text(rng, 3) + (rng.below(4) ? " \n  \n" : "\n\n   ");
  }
  TempDir dir;
  write_file(dir / "text.txt", corpus);
  const Tokenizer tokenizer =
      train_tokenizer({.inputs = {(dir / "text.txt").string()}}, 600, "cl100k");
  TokenizerData data = tokenizer.data();
  data.pre_tokenizer = PreTokenizer({other});
  int different = 0;
  for (int i = 0; i < 2000; i++) {
    const std::string text = random_text(rng, 5) + (i % 2 ? "\n  " : " \n\n \n ");
    std::vector<int> ids;
    Encoder(data, 0).encode(text, text.size(), ids);
    CHECK(ids == tokenizer.encode(text));
    different +=
        pieces_of(data.pre_tokenizer, text) != pieces_of(PreTokenizer(Pattern::cl100k), text);
  }
  CHECK(different > 1000);
}

TEST_CASE("split: the behaviours are Hugging Face's") {
  // The example of its documentation.
  const std::string text = "the-final--countdown";
  using Strings = std::vector<std::string>;
  const auto pieces = [&](SplitBehavior behavior, bool invert = false) {
    SplitStep step{.kind = StepKind::literal, .text = "-", .behavior = behavior, .invert = invert};
    const Strings of_literal = strings_of(PreTokenizer({step}), text);
    step.kind = StepKind::regex;
    CHECK(strings_of(PreTokenizer({step}), text) == of_literal);
    return of_literal;
  };
  CHECK(pieces(SplitBehavior::removed) == Strings{"the", "final", "countdown"});
  CHECK(pieces(SplitBehavior::isolated) == Strings{"the", "-", "final", "-", "-", "countdown"});
  CHECK(pieces(SplitBehavior::merged_with_previous) == Strings{"the-", "final-", "-", "countdown"});
  CHECK(pieces(SplitBehavior::merged_with_next) == Strings{"the", "-final", "-", "-countdown"});
  CHECK(pieces(SplitBehavior::contiguous) == Strings{"the", "-", "final", "--", "countdown"});
  CHECK(pieces(SplitBehavior::removed, true) == Strings{"-", "-", "-"});
  // A known pattern covers the text: what is removed between its matches is nothing.
  const SplitStep all{.pattern = Pattern::gpt2, .behavior = SplitBehavior::removed, .invert = true};
  CHECK(PreTokenizer({all}).pattern() == Pattern::gpt2);
  CHECK(strings_of(PreTokenizer({all}), "a b") == Strings{"a", " b"});
}

TEST_CASE("split: the first match in the order of the alternatives wins") {
  using Strings = std::vector<std::string>;
  CHECK(matches("a|ab", "abab") == Strings{"a", "b", "a", "b"});
  CHECK(matches("ab|a", "abab") == Strings{"ab", "ab"});
  CHECK(matches("a+?", "aaa") == Strings{"a", "a", "a"});
  CHECK(matches("a{2,3}?", "aaaaa") == Strings{"aa", "aa", "a"});
  CHECK(matches("(?:a|ab)(?:c|bcd)", "abcd") == Strings{"abcd"});
  CHECK(matches("(?:ab|a)(?:c|bcd)", "abcd") == Strings{"abc", "d"});
  CHECK(matches("a*+a|b", "aab") == Strings{"aa", "b"});  // never gives back
  CHECK(matches("[ab]++b|a", "abb") == Strings{"a", "bb"});
  CHECK(matches("a?+b", "abaab") == Strings{"ab", "a", "ab"});
  CHECK(matches("(?>a{1,2})b", "aab") == Strings{"aab"});
  CHECK(matches("a{1,2}+", "aaaaa") == Strings{"aaaaa"});  // as Oniguruma: (?:a{1,2})+
  CHECK(matches(SplitRegex::spelled_for_oniguruma("a{1,2}+"), "aaaaa") == Strings{"aa", "aa", "a"});
  CHECK(matches("(?>ab|a)", "aba") == Strings{"ab", "a"});  // at the end: as without
  CHECK(matches("b$", "ab\nb") == Strings{"a", "b", "\n", "b"});
  CHECK(matches(R"(b\z)", "ab\nb") == Strings{"ab\n", "b"});
  CHECK(matches(".+", "ab\nb") == Strings{"ab", "\n", "b"});
  CHECK(matches(R"([\p{Lu}&&[^A]]+)", "AABCa") == Strings{"AA", "BC", "a"});
  CHECK(matches(R"(\p{Script=Han}+|\p{sc=Han}|\p{han})", "a日本") == Strings{"a", "日本"});
  CHECK(matches(R"([\x41\u0042\x{43}\t-]+)", "xABC\t-x") == Strings{"x", "ABC\t-", "x"});
  CHECK(matches("(?i)'s|x", "'S'ſX") == Strings{"'S", "'ſ", "X"});
  CHECK(matches("(?i:k)+", "kK\u212aq") == Strings{"kK\u212a", "q"});
  CHECK(matches(R"([\w-]+)", "a_-²b") == Strings{"a_-", "²", "b"});
  CHECK(matches(R"(\w+|-)", "a_-²b") == Strings{"a_", "-", "²b"});
  CHECK(matches("x{|a{,2}", "aaax{") == Strings{"aa", "a", "x{"});
}

TEST_CASE("split: a byte that is not UTF-8 is a character of no property") {
  using Strings = std::vector<std::string>;
  CHECK(matches(R"(\p{L}+|\p{C}+|\s+)", "a\xff\xc3z") == Strings{"a", "\xff\xc3", "z"});
  CHECK(matches(R"([^\p{L}]+)", "a\xff\xc3z") == Strings{"a", "\xff\xc3", "z"});
  CHECK(matches(R"(\P{L})", "a\xff\xc3z") == Strings{"a", "\xff", "\xc3", "z"});
  CHECK(matches(R"(\S)", "\xed\xa0\x80") == Strings{"\xed", "\xa0", "\x80"});
}

TEST_CASE("split: what the subset lacks is refused with its place") {
  const auto refusal = [](const std::string& regex) -> std::string {
    try {
      SplitRegex{regex};
    } catch (const Error& error) {
      return error.what();
    }
    return "compiled";
  };
  const auto refuses = [&](const std::string& regex, const std::string& what) {
    CHECK_MESSAGE(refusal(regex).find(what) != std::string::npos, regex, ": ", refusal(regex));
  };
  refuses("ab(?<=a)", "byte 2: found (?<=");
  refuses("a(?<!b)", "byte 1: found (?<!");
  refuses(R"((a)\1)", R"(byte 3: found \1)");
  refuses(R"(\d{1,3}(?=(?:\d{3})*\b))", R"(found \b)");
  refuses("x(?=ab)", "byte 1: found (?=ab)");
  refuses("x(?=a*)", "byte 1: found (?=a*)");
  refuses("^a", "byte 0: found ^");
  refuses("(?m)a", "byte 0: found (?m)");
  refuses("(?:ab|c)++d", "byte 0: found (?:ab|c)++d");
  refuses("x(?>ab|a)b", "byte 1: found (?>ab|a)b");
  refuses("(?:a*)*", "byte 0: found (?:a*)*");
  refuses("a**", "byte 0: found a**");
  refuses(R"(\p{Greek})", R"(byte 0: found \p{Greek})");
  refuses(R"(a\p{Alphabetic})", "byte 1");
  refuses("[[:alpha:]]", "byte 1: found [:alpha:]");
  refuses("(?i:é)", "byte 4: found é");
  refuses("(?i:[à-ü])", "byte 5: found à-ü");
  refuses(R"((?i:\p{Lu}))", "byte 4");
  refuses("(?i:less)", "found ss under (?i)");
  refuses("[z-a]", "byte 1: found z-a");
  refuses("[]", "byte 1");
  refuses(R"([\w-a])", "byte 1");
  refuses("[a", "byte 0: found [");
  refuses("(a", "byte 2: found the end");
  refuses("a)", "byte 1: found )");
  refuses("a{3,2}", "byte 1: found {3,2}");
  refuses("a{2000}", "byte 1: found {2000}");
  refuses("a\\", "byte 1");
  refuses("a\xff", "byte 1: found a byte that is not UTF-8");
  refuses(R"(\h)", R"(found \h)");
  refuses(R"(\x{110000})", "byte 0");
  refuses("((a{1000}){1000}){1000}", "more than 20000 instructions");
  refuses("(?:a|b)*a(?:a|b){20}", "states, expected a simpler expression");
  refuses(std::string(200, '(') + std::string(200, ')'), "100 deep");
  CHECK(refusal(R"([^\r\n\p{L}\p{N}]?+\p{L}++)") == "compiled");
}

TEST_CASE("split: text can be cut wherever a cut is said to be safe") {
  int cuts = 0;
  const auto check = [&](const std::string& name, const PreTokenizer& pre_tokenizer) {
    Rng rng{4};
    for (int t = 0; t < 60; t++) {
      const std::string text = random_text(rng, 1 + int(rng.below(40)), t % 4 == 0);
      const Pieces whole = pieces_of(pre_tokenizer, text);
      for (size_t i = 0; i < text.size(); i++) {
        if (!pre_tokenizer.is_safe_cut(text, i)) continue;
        cuts++;
        // With all of the text behind the cut to look at, and with one character of it.
        for (const size_t visible : {text.size(), i + 1}) {
          Pieces parts;
          pre_tokenizer.split(std::string_view(text).substr(0, visible), i, parts);
          pre_tokenizer.split(std::string_view(text).substr(i), text.size() - i, parts);
          const bool same = parts == whole;
          CHECK_MESSAGE(
              same, name, ": ",
              Json(std::string(text)).dump(-1, ' ', false, Json::error_handler_t::replace), " at ",
              i);
          if (!same) return;
        }
      }
    }
  };
  for (const GoldenSplit& split : golden().splits) check(split.name, split.pre_tokenizer);
  for (const char* name : {"gpt2", "cl100k", "qwen2", "o200k"}) {
    const PreTokenizer known(parse_pattern(name));
    check(name, known);
    CHECK(known.is_safe_cut("ab cd", 2));
    CHECK(known.is_safe_cut("ab\ncd", 3));
    CHECK(known.is_safe_cut("ab./cd", 3) == false);
    CHECK(known.is_safe_cut("abcd", 2) == false);
    CHECK(known.is_safe_cut("a  b", 2) == false);
    CHECK(known.is_safe_cut("ab\n\nd", 3) == false);
    CHECK(known.is_safe_cut("ab\n日本", 3));
    CHECK(known.is_safe_cut("ab\n\u3000日", 3) == false);
    CHECK(known.is_safe_cut("ab\n\x80日", 3) == false);
  }
  CHECK(PreTokenizer(Pattern::cl100k).is_safe_cut("ab\n/d", 3));
  CHECK(!PreTokenizer(Pattern::o200k).is_safe_cut("ab\n/d", 3));
  CHECK(cuts > 10000);
}

TEST_CASE("split: common vocabularies have safe cuts behind words and lines") {
  const auto find = [](const std::string& name) {
    for (const GoldenSplit& split : golden().splits)
      if (split.name == name) return split.pre_tokenizer;
    fail("found no ", name);
  };
  for (const std::string name : {"gpt2", "llama3", "glm4", "qwen3.5", "o200k", "tekken", "kimi",
                                 "deepseek 3, r1", "nemotron, phi-4", "chameleon"}) {
    CHECK_MESSAGE(find(name).is_safe_cut("ab cd", 2), name);
    CHECK_MESSAGE(find(name).is_safe_cut("ab\ncd", 3), name);
  }
  // Of two newlines gpt2 leaves the second for what follows. As a second step it does not see what
  // follows a cut.
  for (const std::string name : {"digits, gpt2", "falcon"}) {
    CHECK_MESSAGE(find(name).is_safe_cut("ab cd", 2), name);
    CHECK_MESSAGE(!find(name).is_safe_cut("ab\ncd", 3), name);
  }
  const SplitStep merged{
      .kind = StepKind::literal, .text = " ", .behavior = SplitBehavior::merged_with_previous};
  CHECK(!PreTokenizer({merged}).is_safe_cut("ab cd", 3));
  CHECK(!PreTokenizer(std::vector<SplitStep>{}).is_safe_cut("ab cd", 3));
}

TEST_CASE("split: time is in proportion to the text where scans look far beyond their matches") {
  // Quadratic time would be hours.
  const int n = 1'000'000;
  const auto pieces = [](const std::string& regex, const std::string& text) {
    return pieces_of(regex_of(regex), text).size();
  };
  CHECK(pieces("a|a*b", std::string(n, 'a')) == n);
  CHECK(pieces("a*b|a", std::string(n, 'a')) == n);
  CHECK(pieces("a*b", std::string(n, 'a')) == 1);
  CHECK(pieces("(?:ab)*c|a|b", std::string(n, 'a')) == n);
  CHECK(pieces(R"(\s|\s+x)", std::string(n, ' ')) == n);
  CHECK(pieces("a{1,3}|a*[bc]|(?:aa)+d", std::string(n, 'a')) == (n + 2) / 3);
  CHECK(pieces("[^x]*x|é", "é" + std::string(n, 'a')) == 2);
  // What a scan passes before it finds its match has not failed.
  const SplitRegex regex("a*b");
  const std::string text = std::string(1000, 'a') + "b";
  RegexScanner scanner(regex, text);
  for (const size_t i : {0, 0, 500, 1}) CHECK(scanner.match_end(i) == text.size());
  CHECK(pieces("a|a*b", std::string(1000, 'a') + "b") == 1001);
  CHECK(pieces("a*b|a", std::string(1000, 'a') + "b" + std::string(1000, 'a')) == 1001);
}

TEST_CASE("split: the description tells pre-tokenizers apart") {
  std::set<std::string> all;
  for (const GoldenSplit& split : golden().splits) all.insert(split.pre_tokenizer.description());
  CHECK(all.size() > golden().splits.size() - 10);
  CHECK(PreTokenizer(Pattern::o200k).description() == "o200k");
  CHECK(PreTokenizer({{.kind = StepKind::digits}, {.pattern = Pattern::gpt2}}).description() ==
        "gpt2_digits");
  SplitStep step{.kind = StepKind::regex, .text = "a"};
  const std::string isolated = PreTokenizer({step}).description();
  step.invert = true, step.behavior = SplitBehavior::removed;
  CHECK(PreTokenizer({step}).description() != isolated);
}
