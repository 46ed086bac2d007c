// Measures, rules and signatures: each rule on both sides of its threshold, the values against
// plain definitions and datatrove's, MinHash against its definition and its theory, hostile bytes.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <set>
#include <thread>

#include "cake/corpus.h"
#include "cake/json.h"
#include "cake/run.h"
#include "test/support.h"

using namespace cake;
using namespace cake::corpus;

namespace {

MeasureOptions without_language() {
  MeasureOptions options;
  options.detect_language = false;
  return options;
}

Measured measured(const std::string& text, const MeasureOptions& options = without_language(),
                  const std::string& url = "") {
  Measured out;
  Measurer(options).measure(text, url, out);
  return out;
}

int measure_index(std::string_view name) {
  for (size_t i = 0; i < measures().size(); i++)
    if (measures()[i].name == name) return int(i);
  FAIL("no measure ", name);
  return -1;
}
int rule_index(std::string_view name) {
  for (size_t i = 0; i < rules().size(); i++)
    if (rules()[i].name == name) return int(i);
  FAIL("no rule ", name);
  return -1;
}
double value(const Measured& m, std::string_view name) {
  return m.values.at(size_t(measure_index(name)));
}
double value_of(const std::string& text, std::string_view name) {
  return value(measured(text), name);
}
std::string first_reason(const std::string& text) {
  const int rule = first_failed(measured(text).values, fineweb_thresholds());
  return rule < 0 ? "kept" : std::string(rules()[size_t(rule)].name);
}

// Different words of five letters.
std::string word(int i) {
  std::string w = "q";
  for (int k = 0; k < 4; k++, i /= 20) w += char('a' + i % 20);
  return w;
}
std::string words(int n, int first = 0, const std::string& between = " ") {
  std::string text;
  for (int i = 0; i < n; i++) text += (i ? between : "") + word(first + i);
  return text;
}
std::string lines(int n, const std::function<std::string(int)>& line, const char* newline = "\n") {
  std::string text;
  for (int i = 0; i < n; i++) text += (i ? newline : "") + line(i);
  return text;
}

// -----------------------------------------------------------------------------------------------
// Families of documents: document k + 1 is a step nearer to the threshold of one rule than document
// k, and some document is beyond it.

struct RuleFamily {
  std::string rule;
  std::function<std::string(int)> text;
  double threshold = kOff;  // where FineWeb has none
  double step = .03;        // most that one step may change the value
};

// Words, with a phrase `times` times among them.
std::string with_phrase(const std::string& phrase, int times) {
  std::string text;
  for (int i = 0; i < 100; i++) text += word(i) + " " + (i < times ? phrase + " " : "");
  return text;
}
// 400 words and then n of the first of them again.
std::string with_passage(int n) { return words(400) + " " + words(n); }

std::vector<RuleFamily> families() {
  const auto unique_line = [](int i) { return words(6, 6 * i) + "."; };
  std::vector<RuleFamily> all = {
      {"min-characters", [](int k) { return std::string(size_t(2 - std::min(k, 2)), 'a'); }, kOff,
       1},
      {"max-duplicate-paragraphs",
       [=](int k) {
         return lines(
             40 + k, [&](int i) { return unique_line(i < 40 ? i : 0); }, "\n\n");
       }},
      {"max-duplicate-paragraph-characters",
       [=](int k) {
         return lines(20, unique_line, "\n\n") + "\n\n" + words(k, 900) + "\n\n" + words(k, 900);
       }},
      {"max-duplicate-lines",
       [=](int k) { return lines(40 + k, [&](int i) { return unique_line(i < 40 ? i : 0); }); }},
      {"max-duplicate-line-characters",
       [=](int k) { return lines(20, unique_line) + "\n" + words(k, 900) + "\n" + words(k, 900); }},
      {"max-top-2gram", [](int k) { return with_phrase("alpha beta", k); }},
      {"max-top-3gram", [](int k) { return with_phrase("alpha beta gamma", k); }},
      {"max-top-4gram", [](int k) { return with_phrase("alpha beta gamma delta", k); }},
      {"min-words", [](int k) { return words(60 - k) + "!"; }, kOff, 1},
      {"max-words", [](int k) { return words(99997 + k); }, kOff, 1},
      {"min-mean-word-length",
       [](int k) {
         return lines(
             100, [&](int i) { return i < k ? "ab" : "abcd"; }, " ");
       }},
      {"max-mean-word-length",
       [](int k) {
         return lines(
             100, [&](int i) { return i < k ? word(i) + "abcdefghijklmno" : word(i); }, " ");
       },
       kOff, .2},
      {"max-hashes",
       [](int k) {
         return words(100) + lines(
                                 k, [](int) { return " #"; }, "");
       }},
      {"max-ellipses",
       [](int k) {
         return words(100) + lines(
                                 k, [](int i) { return i % 2 ? " ..." : " …"; }, "");
       }},
      {"max-bullet-lines",
       [=](int k) {
         return lines(40, [&](int i) {
           return (i >= k ? "" : i % 2 ? " - " : "\t• ") + unique_line(i);
         });
       }},
      {"max-ellipsis-lines",
       [=](int k) {
         return lines(40, [&](int i) {
           return words(6, 6 * i) + (i >= k ? "." : i % 2 ? "... " : "…");
         });
       }},
      {"min-alphabetic-words",
       [](int k) {
         return lines(
             100, [&](int i) { return i < k ? std::to_string(100 + i) : word(i); }, " ");
       }},
      {"min-stop-words",
       [](int k) {
         const std::string stops[] = {"the with of", "the with", "that", "The"};
         return words(50) + " " + stops[std::min(k, 3)];
       },
       kOff, 1},
      {"max-long-word-lines",
       [=](int k) {
         return lines(40, [&](int i) {
           return unique_line(i) + " " + std::string(i < k ? 1001 : 1000, 'a');
         });
       },
       .5},
      {"max-few-word-lines",
       [=](int k) {
         return lines(40, [&](int i) { return i < k ? "Next page" : "Next page is"; });
       },
       .5},
      {"max-javascript-lines",
       [=](int k) {
         return lines(40, [&](int i) { return unique_line(i) + (i < k ? " JavaScript on" : ""); });
       },
       .5},
      {"max-policy-lines",
       [=](int k) {
         const std::string phrases[] = {"Terms of Use", "Privacy policy", "cookie policy",
                                        "uses cookies", "use of cookies", "we use cookies"};
         return lines(40, [&](int i) {
           return unique_line(i) + (i < k ? phrases[i % 6] : "use of terms, cookies used");
         });
       },
       .5},
      {"max-lorem-ipsum-lines",
       [=](int k) {
         return lines(9,
                      [&](int i) { return unique_line(i) + (i < k ? " Lorem Ipsum" : " ipsum"); });
       },
       kOff, 1},
      {"max-curly-bracket-lines",
       [=](int k) {
         return lines(9, [&](int i) { return unique_line(i) + (i < k ? " {" : " }"); });
       },
       kOff, 1},
      {"min-sentences",
       [](int k) {
         return lines(
             8 - k, [](int i) { return words(5, 5 * i) + (i % 2 ? "." : "?!"); }, " ");
       },
       kOff, 1},
      {"min-stop-character-lines",
       [](int k) {
         return lines(100, [&](int i) {
           return words(6, 6 * i) + (i >= 20 - k ? "," : i % 2 ? "." : "。");
         });
       }},
      {"max-short-lines",
       [](int k) {
         return lines(100,
                      [&](int i) { return words(4, 4 * i) + (i < k ? " éàîôüæ" : " éàîôüæø"); });
       }},
      {"max-duplicate-characters",
       [=](int k) { return lines(300 + k, [&](int i) { return unique_line(i < 300 ? i : 0); }); }},
      {"max-newlines",
       [](int k) { return lines(80, [&](int i) { return words(i < k ? 3 : 4, 4 * i); }); }},
  };
  for (int n = 5; n <= 10; n++) {
    all.push_back({concat("max-duplicate-", n, "gram"), with_passage});
  }
  return all;
}

std::set<std::string> rules_tested_elsewhere() {
  return {"max-blocked-domains", "max-blocked-hosts",     "max-blocked-urls",
          "max-banned-words",    "max-soft-banned-words", "max-banned-substrings",
          "language-share",      "max-contamination",     "min-quality"};
}

}  // namespace

TEST_CASE("the rules are FineWeb's, in FineWeb's order, each of one measure") {
  std::set<std::string> names, filters;
  std::vector<std::string> order;
  for (const Rule& rule : rules()) {
    CAPTURE(std::string(rule.name));
    CHECK(names.insert(std::string(rule.name)).second);
    REQUIRE(rule.measure >= 0);
    REQUIRE(size_t(rule.measure) < measures().size());
    if (order.empty() || order.back() != rule.filter) order.push_back(std::string(rule.filter));
    if (rule.name != "language-share") {
      CHECK(rule.name.starts_with(rule.direction == Rule::min ? "min-" : "max-"));
    }
  }
  CHECK(order == std::vector<std::string>{"url", "language", "gopher_repetition", "gopher_quality",
                                          "c4", "fineweb_quality", "contamination", "quality"});
  std::set<std::string> measure_names;
  for (const Measure& measure : measures()) {
    CHECK(measure_names.insert(std::string(measure.name)).second);
    CHECK(!measure.help.empty());
  }
  const std::map<std::string, double> fineweb = {
      {"max-blocked-domains", 0},
      {"max-blocked-hosts", 0},
      {"max-blocked-urls", 0},
      {"max-banned-words", 0},
      {"max-soft-banned-words", 1},
      {"max-banned-substrings", 0},
      {"language-share", .65},
      {"min-characters", 1},
      {"max-duplicate-paragraphs", .3},
      {"max-duplicate-paragraph-characters", .2},
      {"max-duplicate-lines", .3},
      {"max-duplicate-line-characters", .2},
      {"max-top-2gram", .2},
      {"max-top-3gram", .18},
      {"max-top-4gram", .16},
      {"max-duplicate-5gram", .15},
      {"max-duplicate-6gram", .14},
      {"max-duplicate-7gram", .13},
      {"max-duplicate-8gram", .12},
      {"max-duplicate-9gram", .11},
      {"max-duplicate-10gram", .1},
      {"min-words", 50},
      {"max-words", 100000},
      {"min-mean-word-length", 3},
      {"max-mean-word-length", 10},
      {"max-hashes", .1},
      {"max-ellipses", .1},
      {"max-bullet-lines", .9},
      {"max-ellipsis-lines", .3},
      {"min-alphabetic-words", .8},
      {"min-stop-words", 2},
      {"max-lorem-ipsum-lines", 0},
      {"max-curly-bracket-lines", 0},
      {"min-sentences", 5},
      {"min-stop-character-lines", .12},
      {"max-short-lines", .67},
      {"max-duplicate-characters", .01},
      {"max-newlines", .3},
      {"max-contamination", 0},
  };
  const Thresholds thresholds = fineweb_thresholds();
  REQUIRE(thresholds.size() == rules().size());
  size_t applied = 0;
  for (size_t i = 0; i < rules().size(); i++) {
    CAPTURE(std::string(rules()[i].name));
    const auto it = fineweb.find(std::string(rules()[i].name));
    applied += it != fineweb.end();
    if (it == fineweb.end()) CHECK(std::isnan(thresholds[i]));
    if (it != fineweb.end()) CHECK(thresholds[i] == it->second);
  }
  CHECK(applied == fineweb.size());
}

TEST_CASE("a rule drops what is beyond its threshold, and only that") {
  const Thresholds off(rules().size(), kOff);
  for (size_t i = 0; i < rules().size(); i++) {
    const Rule& rule = rules()[i];
    CAPTURE(std::string(rule.name));
    std::vector<double> values(measures().size(), kOff);
    Thresholds only = off;
    only[i] = .5;
    CHECK(first_failed(values, only) == -1);  // not measured
    values[size_t(rule.measure)] = .5;
    CHECK(first_failed(values, only) == -1);
    values[size_t(rule.measure)] = std::nextafter(.5, rule.direction == Rule::min ? 0 : 1);
    CHECK(first_failed(values, only) == int(i));
    CHECK(first_failed(values, off) == -1);
  }
  CHECK(contains(error_of([&] { first_failed(std::vector<double>(3), off); }), "found 3 values"));
}

TEST_CASE("the first rule that fails is the reason") {
  std::vector<double> values(measures().size(), kOff);
  values[size_t(measure_index("words"))] = 3;
  values[size_t(measure_index("stop_words"))] = 0;
  const Thresholds thresholds = fineweb_thresholds();
  CHECK(first_failed(values, thresholds) == rule_index("min-words"));
  values[size_t(measure_index("top_4gram"))] = .5;
  CHECK(first_failed(values, thresholds) == rule_index("max-top-4gram"));
  values[size_t(measure_index("banned_words"))] = 1;
  CHECK(first_failed(values, thresholds) == rule_index("max-banned-words"));
}

TEST_CASE("every rule keeps a document just below its threshold and drops one just above it") {
  std::set<std::string> tested = rules_tested_elsewhere();
  for (const RuleFamily& family : families()) {
    CAPTURE(family.rule);
    tested.insert(family.rule);
    const size_t index = size_t(rule_index(family.rule));
    Thresholds only(rules().size(), kOff);
    only[index] = std::isnan(family.threshold) ? rules()[index].fineweb : family.threshold;
    const size_t measure = size_t(rules()[index].measure);
    double before = kOff;
    int k = 0;
    for (;; k++) {
      REQUIRE(k < 300);
      const Measured m = measured(family.text(k));
      const double v = m.values[measure];
      REQUIRE(std::isfinite(v));
      if (first_failed(m.values, only) >= 0) {
        CAPTURE(k);
        CAPTURE(v);
        CAPTURE(before);
        REQUIRE(k > 0);  // the one before was kept
        const bool min = rules()[index].direction == Rule::min;
        CHECK((min ? v < only[index] : v > only[index]));
        CHECK((min ? before >= only[index] : before <= only[index]));
        CHECK(std::abs(v - before) <= family.step);
        break;
      }
      before = v;
    }
  }
  for (const Rule& rule : rules()) CHECK_MESSAGE(tested.count(std::string(rule.name)), rule.name);
}

TEST_CASE("the cases of the reference have their reasons") {
  const auto times = [](const char* text, int n) {
    return lines(
        n, [&](int) { return text; }, "");
  };
  CHECK(value_of(times("I am your father.\n", 4), "duplicate_lines") == 3. / 5);
  CHECK(first_reason(times("I am your father.\n", 4)) == "max-duplicate-lines");
  CHECK(first_reason("I am Frank, I am Frank, I am Frank") == "max-top-2gram");
  CHECK(value_of(times("interconnection ", 20), "mean_word_length") == 15);
  CHECK(value_of(times("# comment ", 20), "hashes") == .5);
  CHECK(value_of(times("... comment ", 20), "ellipses") == .5);
  CHECK(first_reason("") == "min-characters");
  CHECK(normal_form("Café Naïve — 3,141.59 Résumé!") == "cafe naive 0 0 resume");
}

TEST_CASE("a document that is empty or shorter than an n-gram has all values") {
  for (const std::string text :
       {"", " ", "\n", "\n\n\n", "word", "two words", ".", "1", "\xE2\x80\xA6"}) {
    CAPTURE(text);
    const Measured m = measured(text);
    for (size_t i = 0; i < measures().size(); i++) {
      const std::string name(measures()[i].name);
      CAPTURE(name);
      const bool not_asked_for = i <= size_t(measure_index("banned_substrings")) ||
                                 name == "language_share" || name == "contamination" ||
                                 name == "quality";
      CHECK(std::isnan(m.values[i]) == not_asked_for);
      if (!not_asked_for) CHECK(m.values[i] >= 0);
    }
    CHECK(!m.signature.has_bands);
  }
}

// -----------------------------------------------------------------------------------------------
// Words

namespace {
std::string joined_words(const std::string& text) {
  std::string out;
  for (std::string_view w : split_words(text)) out += (out.empty() ? "" : "|") + std::string(w);
  return out;
}
}  // namespace

TEST_CASE("words are cut as spaCy's English tokenizer cuts them") {
  const std::pair<const char*, const char*> cases[] = {
      {"", ""},
      {"  one\ttwo\u00a0three\u3000four ", "one|two|three|four"},
      {"Hello, world!", "Hello|,|world|!"},
      {"(\"Yes,\" she said.)", "(|\"|Yes|,|\"|she|said|.|)"},
      {"don't he'll we\u2019re it's cat's dogs'", "do|n't|he|'ll|we|\u2019re|it|'s|cat|'s|dogs|'"},
      {"Mr. Smith of the U.S. said e.g. J. Doe vs. us.",
       "Mr.|Smith|of|the|U.S.|said|e.g.|J.|Doe|vs.|us|."},
      {"wait... what.. Why… so", "wait|...|what|..|Why|…|so"},
      {"a well-known mother-in-law, 32-bit 5-6 --",
       "a|well|-|known|mother|-|in|-|law|,|32|-|bit|5|-|6|--"},
      {"yes--no a—b and/or 1/2", "yes|--|no|a|—|b|and|/|or|1/2"},
      {"$5.00 50% 10km 5pm 3.14 1,000 x=1", "$|5.00|50|%|10|km|5|pm|3.14|1,000|x=1"},
      {"http://a.b/c-d?e=f www.example.com, example.org/a-b",
       "http://a.b/c-d?e=f|www.example.com|,|example.org/a-b"},
      {"end.Next one,two", "end|.|Next|one|,|two"},
      {"彼は家に帰った。 東京", "彼は家に帰った|。|東京"},
  };
  for (const auto& [text, expected] : cases) CHECK(joined_words(text) == expected);
}

// -----------------------------------------------------------------------------------------------
// The values against plain definitions: strings in sets, one after another.

namespace {

struct Duplicates {
  double number = 0, characters = 0;
};
double characters_of(const std::string& text) {
  double n = 0;
  for (char c : text) n += (uint8_t(c) & 0xC0) != 0x80;
  return n;
}
Duplicates plain_duplicates(const std::vector<std::string>& list) {
  std::set<std::string> seen;
  Duplicates d;
  for (const std::string& s : list)
    if (!seen.insert(s).second) d.number++, d.characters += characters_of(s);
  return d;
}
std::string join(const std::vector<std::string>& w, size_t begin, size_t n, const char* between) {
  std::string text;
  for (size_t i = begin; i < begin + n; i++) text += (i > begin ? between : "") + w[i];
  return text;
}
double plain_top(const std::vector<std::string>& w, size_t n) {
  std::map<std::string, int> counts;
  std::vector<std::string> order;
  for (size_t i = 0; i + n <= w.size(); i++) {
    const std::string gram = join(w, i, n, " ");
    if (counts[gram]++ == 0) order.push_back(gram);
  }
  std::string top;
  for (const std::string& gram : order)
    if (top.empty() || counts[gram] > counts[top]) top = gram;
  return top.empty() ? 0 : characters_of(top) * counts[top];
}
double plain_repeated(const std::vector<std::string>& w, size_t n) {
  std::set<std::string> seen;
  double characters = 0;
  for (size_t i = 0; i + n <= w.size();) {
    if (seen.insert(join(w, i, n, " ")).second) {
      i++;
    } else {
      characters += characters_of(join(w, i, n, ""));
      i += n;
    }
  }
  return characters;
}

// A text of few words, so that all n-grams come again.
std::string repetitive_text(Rng& rng) {
  const int vocabulary = 2 + int(rng.below(30)), n = int(rng.below(300));
  std::string text;
  for (int i = 0; i < n; i++) {
    const std::string between[] = {" ", " ", " ", " ", ", ", ". ", "\n", "\n\n", "\n\n\n", " é "};
    text += word(int(rng.below(uint64_t(vocabulary)))).substr(0, 2 + rng.below(4)) +
            between[rng.below(10)];
    if (rng.below(30) == 0 && text.size() > 40)
      text += text.substr(text.rfind(' ', text.size() / 2));
  }
  return text;
}

}  // namespace

TEST_CASE("repeated n-grams are those of the plain definition") {
  Rng rng{7};
  for (int round = 0; round < 150; round++) {
    const std::string text = repetitive_text(rng);
    CAPTURE(text);
    const Measured m = measured(text);
    std::vector<std::string> w;
    for (size_t i = 0; i < text.size();) {  // lines one after another: words do not cross them
      const size_t end = std::min(text.find('\n', i), text.size());
      for (std::string_view s : split_words(std::string_view(text).substr(i, end - i)))
        w.push_back(std::string(s));
      i = end + 1;
    }
    const double size = std::max(characters_of(text), 1.);
    for (size_t n = 2; n <= 4; n++)
      CHECK(value(m, concat("top_", n, "gram")) == plain_top(w, n) / size);
    for (size_t n = 5; n <= 10; n++)
      CHECK(value(m, concat("duplicate_", n, "gram")) == plain_repeated(w, n) / size);
  }
}

TEST_CASE("duplicate lines and paragraphs are those of the plain definition") {
  Rng rng{8};
  for (int round = 0; round < 150; round++) {
    std::string text = round % 3 ? "x" : "\n";
    for (int i = 0; i < int(rng.below(30)); i++) {
      text += word(int(rng.below(6))) + (rng.below(2) ? " é" : "");
      text += std::string(1 + rng.below(3), '\n');
    }
    CAPTURE(text);
    const auto split = [](const std::string& s, size_t newlines) {
      std::vector<std::string> parts(1);
      for (size_t i = 0; i < s.size();) {
        size_t end = i;
        while (end < s.size() && s[end] == '\n') end++;
        if (end - i >= newlines) {
          parts.push_back("");
          i = end;
        } else {
          parts.back() += s[i++];
        }
      }
      return parts;
    };
    const size_t begin = text.find_first_not_of(" \n"), end = text.find_last_not_of(" \n");
    const std::string stripped = begin == text.npos ? "" : text.substr(begin, end + 1 - begin);
    const auto l = split(text, 1), p = split(stripped, 2);
    const Measured m = measured(text);
    CHECK(value(m, "duplicate_lines") == plain_duplicates(l).number / double(l.size()));
    CHECK(value(m, "duplicate_line_characters") ==
          plain_duplicates(l).characters / characters_of(text));
    CHECK(value(m, "duplicate_paragraphs") == plain_duplicates(p).number / double(p.size()));
    CHECK(value(m, "duplicate_paragraph_characters") ==
          plain_duplicates(p).characters / characters_of(text));
  }
}

TEST_CASE("values, reasons and kept lines are datatrove's on made-up documents") {
  std::ifstream in("test/golden/corpus_rules.jsonl");
  REQUIRE(in);
  int documents = 0;
  std::set<std::string> reasons;
  for (std::string line; std::getline(in, line); documents++) {
    const Json expected = parse_json(line, "golden");
    const std::string text = expected["text"];
    CAPTURE(text);
    const Measured m = measured(text);
    CHECK(m.text == expected["kept"].get<std::string>());
    CHECK(first_reason(text) == expected["reason"].get<std::string>());
    reasons.insert(expected["reason"].get<std::string>());
    for (const auto& [key, v] : expected["values"].items()) {
      const std::string name = key;
      CAPTURE(name);
      CHECK(value(m, name) == v.get<double>());
    }
  }
  CHECK(documents > 40);
  CHECK(reasons.size() > 12);
}

// -----------------------------------------------------------------------------------------------
// C4's lines

TEST_CASE("the text becomes the lines that C4 keeps") {
  const std::string text =
      "  The first line stays.[12][edit] \r\n"
      "Too few\n"
      "Please enable JavaScript to go on.\n"
      "This line [citation needed] stays [sic] too [ 3].\u2028"
      "We use cookies on this page.\n"
      "\n"
      "The last one stays.";
  const Measured m = measured(text);
  CHECK(m.text == "The first line stays.\nThis line  stays [sic] too [ 3].\nThe last one stays.");
  CHECK(value(m, "sentences") == 3);
  CHECK(value(m, "few_word_lines") == 2. / 7);
  CHECK(value(m, "javascript_lines") == 1. / 7);
  CHECK(value(m, "policy_lines") == 1. / 7);
  MeasureOptions whole = without_language();
  whole.c4_lines = false;
  const Measured unchanged = measured(text, whole);
  CHECK(unchanged.text == text);
  CHECK(value(unchanged, "javascript_lines") == 1. / 7);
  MeasureOptions short_words = without_language();
  short_words.max_word_characters = 5, short_words.min_line_words = 0;
  CHECK(measured("aaaaa ééééé\naaaaaa b\nc", short_words).text == "aaaaa ééééé\nc");
}

// -----------------------------------------------------------------------------------------------
// URLs

namespace {
std::string list_file(const TempDir& dir, const std::string& name, const std::string& text) {
  write_file(dir / name, text);
  return (dir / name).string();
}
}  // namespace

TEST_CASE("lists of URLs block by registered domain, host, URL, words and substrings") {
  const TempDir dir;
  MeasureOptions o = without_language();
  o.blocked_domains = {
      list_file(dir, "domains", "# bad ones\nspam.co.uk\n\nBad.com\nsub.fine.org\n")};
  o.blocked_hosts = {list_file(dir, "hosts", "only.this.net\n")};
  o.blocked_urls = {list_file(dir, "urls", "http://good.com/Bad?x=1\n")};
  o.banned_words = {list_file(dir, "words", "casino\n")};
  o.soft_banned_words = {list_file(dir, "soft", "hot\nwin\ndeal\n")};
  o.banned_substrings = {list_file(dir, "substrings", "free-money\n")};
  Measurer measurer(o);
  const auto reason = [&](const std::string& url) {
    Measured m;
    measurer.measure("A text.", url, m);
    const int rule = first_failed(m.values, fineweb_thresholds());
    const bool url_rule = rule >= 0 && rules()[size_t(rule)].filter == "url";
    if (url_rule) CHECK(!m.match.empty());
    return url_rule ? std::string(rules()[size_t(rule)].name) : "passes";
  };
  const std::string passes = "passes";
  CHECK(reason("https://www.a.SPAM.co.uk:80/x") == "max-blocked-domains");
  CHECK(reason("https://user@bad.com") == "max-blocked-domains");
  CHECK(reason("bad.com/path") == "max-blocked-domains");
  CHECK(reason("https://notbad.com/") == passes);
  CHECK(reason("https://co.uk/") == passes);
  CHECK(reason("https://sub.fine.org/") == "max-blocked-hosts");
  CHECK(reason("https://fine.org/") == passes);
  CHECK(reason("https://only.this.net/") == "max-blocked-hosts");
  CHECK(reason("https://www.only.this.net/") == passes);
  CHECK(reason("http://good.com/Bad?x=1") == "max-blocked-urls");
  CHECK(reason("http://good.com/bad?x=1") == passes);
  CHECK(reason("http://good.com/best-casino_2") == "max-banned-words");
  CHECK(reason("http://good.com/bestcasino2") == passes);
  CHECK(reason("http://good.com/hot/deal") == "max-soft-banned-words");
  CHECK(reason("http://good.com/hot/hot/hotdeal") == passes);
  CHECK(reason("http://good.com/Free_Money.html") == "max-banned-substrings");
  CHECK(reason("http://good.com/free/your/money") == passes);
  for (const char* url : {"", "no url at all", "://", "http://", "http://[::1]/", "http://1.2.3.4/",
                          "//", "http://...", "http://@/", "\xff\xfe", "http://xn--a/"}) {
    CHECK(reason(url) == passes);
  }
  Measured m;
  measurer.measure("A text.", "http://bad.com/casino", m);
  CHECK(m.match == "blocked_domain: bad.com");
  // Without a list a measure is not there, and its rule passes.
  CHECK(std::isnan(
      value(measured("A text.", without_language(), "http://bad.com"), "blocked_domain")));
  MeasureOptions missing;
  missing.blocked_urls = {(dir / "missing").string()};
  CHECK(contains(error_of([&] { Measurer{missing}; }), "missing: cannot open"));
}

// -----------------------------------------------------------------------------------------------
// Language

TEST_CASE("language is told by its share of bytes, and old codes are mapped") {
  const std::pair<const char*, const char*> cases[] = {
      {"en", "All human beings are born free and equal in dignity and rights."},
      {"he", "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון."},
      {"zh",
       "人人生而自由,在尊嚴和權利上一律平等。他們賦有理性和良心,並應以兄弟關係的精神互相對待。"},
      {"id",
       "Tidak seorang pun boleh diperbudak atau diperhambakan, perbudakan dan perdagangan "
       "budak dalam bentuk apapun mesti dilarang."},
      {"es", "Adoptada y proclamada por la Asamblea General en su resolución de 10 de diciembre"},
      {"id",
       "Semua orang dilahirkan merdeka. Mereka tahu bahwa mereka bisa hidup bebas karena hukum."},
      {"ms",
       "Semua manusia dilahirkan bebas dan samarata dari segi kemuliaan dan hak-hak. Mereka "
       "mempunyai pemikiran dan perasaan hati dan hendaklah bertindak bersama-sama."},
      {"gl",
       "Tódolos seres humanos nacen libres e iguais en dignidade e dereitos e, dotados como "
       "están de razón e conciencia, débense comportar fraternalmente uns cos outros."},
      {"no",
       "Alle mennesker er født frie og med samme menneskeverd og menneskerettigheter. De er "
       "utstyrt med fornuft og samvittighet og bør handle mot hverandre i brorskapets ånd."},
      {"da",
       "Alle mennesker er født frie og lige i værdighed og rettigheder. De er udstyret med "
       "fornuft og samvittighed, og de bør handle mod hverandre i en broderskabets ånd."},
      {"af",
       "Alle menslike wesens word vry, met gelyke waardigheid en regte, gebore. Hulle het rede "
       "en gewete en behoort in die gees van broederskap teenoor mekaar op te tree."},
      {"un", "12345 67890 -- ++"},
  };
  for (const auto& [language, sentence] : cases) {
    const std::string code = language, text = sentence;
    MeasureOptions o;
    o.languages = {code};
    const Measured m = measured(text, o);
    CAPTURE(text);
    CHECK(m.language == code);
    if (code != "un") CHECK(value(m, "language_share") > .9);
    o.languages = {"fr", "sv"};
    CHECK(value(measured(text, o), "language_share") == 0);
    o.languages = {};
    if (code != "un") CHECK(value(measured(text, o), "language_share") > .9);
  }
}

TEST_CASE("a wanted language may have its old code") {
  MeasureOptions o;
  o.languages = {"iw"};
  const Measured m = measured("כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.", o);
  CHECK(value(m, "language_share") > .9);
}

TEST_CASE("the rule of language keeps a text just above its share and drops one below") {
  const std::string english =
      "The committee said on Monday that it would publish its report before the end of the year. ";
  const std::string russian =
      "Все люди рождаются свободными и равными в своем достоинстве и правах. ";
  const size_t rule = size_t(rule_index("language-share"));
  Thresholds only(rules().size(), kOff);
  only[rule] = .65;
  std::string text;
  for (int i = 0; i < 16; i++) text += english;
  int dropped_at = -1;
  double before = 1;
  for (int k = 0; k < 16 && dropped_at < 0; k++, text += "\n" + russian) {
    const Measured m = measured(text, MeasureOptions());
    const double share = value(m, "language_share");
    CHECK(share <= before);
    if (first_failed(m.values, only) >= 0) {
      dropped_at = k;
      CHECK(share < .65);
      CHECK(before >= .65);
      CHECK(m.language == "en");
    }
    before = share;
  }
  CHECK(dropped_at > 3);
}

TEST_CASE("a long document's language is that of its begin, middle and end") {
  const std::string russian =
      "Все люди рождаются свободными и равными в своем достоинстве и правах. ";
  const std::string english = "All human beings are born free and equal in dignity and rights. ";
  const auto times = [](const std::string& s, int n) {
    return lines(
        n, [&](int) { return s; }, "");
  };
  MeasureOptions o;
  // Of three parts of the same number of bytes, one is English.
  const std::string r = times(russian, 300), e = times(english, int(r.size() / english.size()));
  for (const std::string& text : {e + r + r, r + e + r, r + r + e}) {
    const Measured m = measured(text, o);
    CHECK(m.language == "ru");
    CHECK(value(m, "language_share") > .1);
    CHECK(value(m, "language_share") < .5);
  }
}

TEST_CASE(
    "paragraphs of 80 characters or more are told in 96 of 100 cases in each of the languages") {
  if (skip_without_data("languages/udhr.jsonl")) return;
  std::ifstream in(data_path("languages/udhr.jsonl"));
  std::map<std::string, std::pair<int, int>> by_language;
  int right = 0, all = 0;
  Measurer measurer{MeasureOptions()};
  Measured m;
  for (std::string line; std::getline(in, line);) {
    const Json paragraph = parse_json(line, "udhr");
    const std::string text = paragraph["text"], language = paragraph["lang"];
    if (characters_of(text) < 80) continue;
    measurer.measure(text, "", m);
    auto& [good, number] = by_language[language];
    number++, all++;
    if (m.language == language) good++, right++;
  }
  CHECK(all > 300);
  CHECK(right >= .96 * all);
  for (const auto& [key, counts] : by_language) {
    const std::string language = key;
    CAPTURE(language);
    CHECK(counts.first >= .8 * counts.second);
  }
}

// -----------------------------------------------------------------------------------------------
// Private data

TEST_CASE("e-mail and public IP addresses are replaced, and what only looks like them stays") {
  const std::pair<const char*, const char*> cases[] = {
      {"Write to jane.doe+x@mail.example.co.uk.", "Write to email@example.com."},
      {"<a@b.de>, (c@d.org)", "<email@example.com>, (email@example.com)"},
      {"mailto:a_b@c-d.com?x", "mailto:email@example.com?x"},
      {"a@b, user@localhost, @name, a@b.1, x@, @x.com, a@-b.com", nullptr},
      {"from 8.8.8.8 to 1.1.1.1.", "from 22.214.171.124 to 22.214.171.124."},
      {"http://8.8.8.8:80/ [9.9.9.9]", "http://22.214.171.124:80/ [22.214.171.124]"},
      {"999.1.1.1 256.1.1.1 1.2.3 1.2.3.4.5 v8.8.8.8 x8.8.8.8 8.8.8.8x 01.02.03.04", nullptr},
      {"10.1.2.3 192.168.77.1 172.31.0.1 127.0.0.1 169.254.1.1 0.0.0.0 224.0.0.1 255.255.255.255",
       nullptr},
      {"version 8.8.8.8, Version: 5.6.7.8, linux-8.8.8.8, release 8.4.2.1", nullptr},
      {"at 12:30:45 or 10:20, 1::2 a::b std::vector ::1 fe80::1 2001:db8::5 fc00::1", nullptr},
      {"from 2600:1f18::abcd and 2a00:1450:4001:81b::200e.", "from 2001:db8::1 and 2001:db8::1."},
      {"[2600:1f18::abcd]:80", "[2001:db8::1]:80"},
      {"2600:1f18:::1 2600:1f18:1 2600:1f18::12345", nullptr},
      {"", nullptr},
  };
  for (const auto& [text, expected] : cases) {
    std::string out = "> ";
    const int64_t number = replace_private_data(text, out);
    CHECK(out == concat("> ", expected ? expected : text));
    CHECK((number > 0) == (expected != nullptr));
    std::string again;  // placeholders are what they are replaced by
    replace_private_data(std::string_view(out).substr(2), again);
    CHECK(again == out.substr(2));
  }
  MeasureOptions off = without_language();
  off.private_data = false;
  const std::string text = "Write to a@b.com or c@d.com at 8.8.8.8 now.";
  CHECK(measured(text, off).text == text);
  CHECK(measured(text, off).private_data == 0);
  CHECK(measured(text).text ==
        "Write to email@example.com or email@example.com at 22.214.171.124 now.");
  CHECK(measured(text).private_data == 3);
  CHECK(measured(text).signature.text_hash == measured(text, off).signature.text_hash);
}

// -----------------------------------------------------------------------------------------------
// Signatures

TEST_CASE("the normal form has lower case, numbers as 0, and no marks or punctuation") {
  const std::pair<const char*, const char*> cases[] = {
      {"", ""},
      {"  A\n\tB\u00a0C ", "a b c"},
      {"1,000,000 3.14 5. 7,x a1b22c", "0 0 0 0 0 x a0b0c"},
      {"١٢٣ १२३", "0 0"},
      {"Ä\u0301ÖÉ ſtraße ΑΒΓ Ёлка", "aoe ſtraße αβγ елка"},
      {"“Don’t”—«stop»… (now)", "don t stop now"},
      {"한국어 日本、東京。", "한국어 日本 東京"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string form = normal_form(text);
    // Hangul is decomposed in the normal form: compare what its own normal form is.
    CHECK(form ==
          (std::string(text).find("한") == std::string::npos ? expected : normal_form(expected)));
  }
}

TEST_CASE("the vectorised minima are those of the plain definition") {
  Rng rng{3};
  for (size_t n : {0, 1, 2, 3, 7, 8, 9, 100, 1001}) {
    std::vector<uint64_t> x(n);
    for (uint64_t& v : x) v = rng.next();
    CHECK(min_hashes(x) == min_hashes_plain(x));
  }
}

TEST_CASE("the hashes of a signature are the same on every machine") {
  std::string text;
  for (int i = 0; i < 200; i++) text += word(int(mix64(uint64_t(i)) % 150)) + " ";
  const Signature s = measured(text).signature;
  uint64_t all = mix64(s.text_hash[0], s.text_hash[1]);
  for (uint64_t h : s.band_hashes) all = mix64(all, h);
  CHECK(format("%016llx", static_cast<unsigned long long>(all)) == "211f755077588de0");
}

TEST_CASE("texts of fewer than five words have no bands, and equal normal forms equal ones") {
  CHECK(!measured("one two three four").signature.has_bands);
  const Signature a = measured("One two, three four five!").signature;
  const Signature b = measured("one two three four five").signature;
  CHECK(a.has_bands);
  CHECK(a.band_hashes == b.band_hashes);
  CHECK(a.text_hash != b.text_hash);
  CHECK(shingles("one two three four five six").size() == 2);
}

TEST_CASE("bands match as often as theory says for the Jaccard similarity by brute force") {
  Rng rng{5};
  double expected = 0, variance = 0, equal = 0, expected_equal = 0, variance_equal = 0;
  int matched = 0;
  for (int pair = 0; pair < 1500; pair++) {
    std::vector<std::string> a, b;
    const int n = 60 + int(rng.below(200));
    for (int i = 0; i < n; i++) a.push_back(word(int(rng.below(100000))));
    b = a;
    for (int change = int(rng.below(8)); change > 0; change--) {  // runs of words are replaced
      const size_t begin = rng.below(b.size()), size = 1 + rng.below(6);
      for (size_t i = begin; i < std::min(begin + size, b.size()); i++)
        b[i] = word(int(rng.below(100000)));
    }
    std::set<std::string> x, y;
    for (size_t i = 0; i + 5 <= a.size(); i++) x.insert(join(a, i, 5, " "));
    for (size_t i = 0; i + 5 <= b.size(); i++) y.insert(join(b, i, 5, " "));
    double common = 0;
    for (const std::string& gram : x) common += double(y.count(gram));
    const double s = common / (double(x.size() + y.size()) - common);
    const std::string text_a = join(a, 0, a.size(), " "), text_b = join(b, 0, b.size(), " ");
    const Signature p = measured(text_a).signature, q = measured(text_b).signature;
    bool match = false;
    for (size_t band = 0; band < kBands; band++)
      match |= p.band_hashes[band] == q.band_hashes[band];
    matched += match;
    const double probability = 1 - std::pow(1 - std::pow(s, 8), 14);
    expected += probability, variance += probability * (1 - probability);
    const MinHashes u = min_hashes(shingles(text_a)), v = min_hashes(shingles(text_b));
    for (size_t band = 0; band < kBands; band++)
      for (size_t k = 0; k < kHashesPerBand; k++) equal += u[band][k] == v[band][k];
    expected_equal += 112 * s, variance_equal += 112 * s * (1 - s);
  }
  CAPTURE(matched);
  CAPTURE(expected);
  CAPTURE(equal);
  CAPTURE(expected_equal);
  CHECK(variance > 20);
  CHECK(std::abs(matched - expected) < 3 * std::sqrt(variance));
  CHECK(std::abs(equal - expected_equal) < 4 * std::sqrt(variance_equal));
}

// -----------------------------------------------------------------------------------------------
// Any bytes

TEST_CASE("invalid UTF-8 is replaced, and never crashes") {
  CHECK(measured("This is a \xff line.\xe2\x82").text ==
        "This is a \xEF\xBF\xBD line.\xEF\xBF\xBD");
  CHECK(measured("aa bb \xed\xa0\x80 cc").text ==
        "aa bb \xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD cc");  // a surrogate
  CHECK(measured(std::string("Now a\0b and c.", 14)).text == std::string("Now a\0b and c.", 14));
  Rng rng{11};
  MeasureOptions o;
  Measurer measurer(o);
  Measured m;
  for (int round = 0; round < 300; round++) {
    std::string bytes(rng.below(400), '\0');
    for (char& c : bytes) {
      const char some[] = " .'@:-[\n\xe2\x80\xa6\xc2\xf0\x9f";
      c = rng.below(2) ? char(rng.next()) : some[rng.below(sizeof some)];
    }
    measurer.measure(bytes, bytes, m);
    CHECK(m.values.size() == measures().size());
  }
}

TEST_CASE("a text of 10 MB without a space is measured in linear time") {
  Measurer measurer{MeasureOptions()};
  Measured m;
  for (const char* unit :
       {"a", "\xE5\xAE\xB6", "(", ".", "'d", "'s", "-a", "1.", "@", ":", "a@", "\n", "#"}) {
    CAPTURE(unit);
    std::string text;
    const size_t bytes = std::isalpha(*unit) ? 10'000'000 : 1'000'000;
    while (text.size() < bytes) text += unit;
    const double begin = now();
    measurer.measure(text, "", m);
    CHECK(now() - begin < 5);
    CHECK(value(m, "characters") == characters_of(text));
  }
}

TEST_CASE("a measurer that is used again, a copy and a fresh one find the same") {
  Rng rng{13};
  std::vector<std::string> texts;
  for (int i = 0; i < 60; i++) texts.push_back(repetitive_text(rng));
  texts.push_back("All human beings are born free. \xff Write to a@b.com [1] {");
  texts.push_back("");
  std::swap(texts[0], texts.back());
  MeasureOptions o;
  const auto same = [](const Measured& a, const Measured& b) {
    return a.values.size() == b.values.size() &&
           std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(double)) == 0 &&
           a.language == b.language && a.match == b.match && a.text == b.text &&
           a.private_data == b.private_data && a.signature.text_hash == b.signature.text_hash &&
           a.signature.band_hashes == b.signature.band_hashes &&
           a.signature.has_bands == b.signature.has_bands;
  };
  std::vector<Measured> expected(texts.size());
  for (size_t i = 0; i < texts.size(); i++) Measurer(o).measure(texts[i], "", expected[i]);
  Measurer used(o);
  std::vector<std::thread> threads;
  std::atomic<int> different{0};
  for (int t = 0; t < 3; t++) {
    threads.emplace_back([&, t, measurer = Measurer(used)]() mutable {
      Measured m;  // used again too
      for (size_t k = 0; k < 3 * texts.size(); k++) {
        const size_t i = (k * size_t(t + 7)) % texts.size();
        measurer.measure(texts[i], "", m);
        different += !same(m, expected[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(different == 0);
}

TEST_CASE("values print and parse back exactly") {
  for (double v : measured(words(77) + "\nThe end. # ...").values) {
    if (std::isnan(v)) continue;
    CHECK(std::strtod(format("%.17g", v).c_str(), nullptr) == v);
    CHECK(Json::parse(Json(v).dump()).get<double>() == v);
  }
}
