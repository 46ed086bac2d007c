// The true reward of an answer to an open request, by a program. A reward model learns to guess it
// from noisy comparisons, so that what the guess is worth can be measured.
//
// A rubric is data, part of a prompt's JSON line: a list of criteria. Each criterion gives an
// answer a mark from 0 to 1, and the true reward is the weighted mean of the marks.
//
//     [{"kind": "mentions", "words": ["Ada", "dog"], "weight": 3},
//      {"kind": "begins", "words": ["Here is", ...], "weight": 1},
//      {"kind": "ends", "words": ["went home", ...], "weight": 2},
//      {"kind": "varied", "weight": 2},
//      {"kind": "length", "low": 30, "high": 60, "weight": 2}]
//
// - mentions: the share of these words that the answer contains.
// - begins: 1 if the answer begins with one of them, else 0.
// - ends: 1 if the last sentence is complete and contains one of them, and no length limit cut the
//   answer off, else 0.
// - varied: 1 if no four words in a row come twice, 0 if a fifth of all sequences of four words (or
//   more) are repetitions, linear between. 0 for an answer of less than four words.
// - length: 1 for 30 to 60 words; below, words / low; above, it falls to 0 at 2 high.
//
// Words are matched whole, and case is ignored.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "cake/json.h"

namespace cake {

struct Criterion {
  enum class Kind { mentions, begins, ends, varied, length } kind = Kind::varied;
  double weight = 1;               // above 0
  std::vector<std::string> words;  // of mentions, begins and ends: at least one
  int low = 0, high = 0;           // of length, in words: 1 <= low <= high
};
inline constexpr const char* kCriterionNames[] = {"mentions", "begins", "ends", "varied", "length"};

using Rubric = std::vector<Criterion>;

inline double criterion_mark(const Criterion& c, std::string_view text, bool ended);

// From 0 to 1. `ended`: the model ended the answer; no length limit cut it off.
inline double true_reward(const Rubric& rubric, std::string_view text, bool ended) {
  double sum = 0, weights = 0;
  for (const Criterion& c : rubric) {
    sum += c.weight * criterion_mark(c, text, ended);
    weights += c.weight;
  }
  return sum / weights;
}

// ---------------------------------------------------------------------------------------------
// Words in text

// The letters A to Z in lower case, and the typographic apostrophe as '.
inline std::string lower_ascii(std::string_view text) {
  constexpr std::string_view kApostrophe = "\u2019";
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); i++) {
    const char c = text[i];
    if (text.compare(i, kApostrophe.size(), kApostrophe) == 0) {
      out += '\'', i += kApostrophe.size() - 1;
    } else {
      out += c >= 'A' && c <= 'Z' ? char(c + ('a' - 'A')) : c;
    }
  }
  return out;
}

// A letter or digit; all bytes beyond ASCII count as letters.
inline bool is_alphanumeric(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || (c & 0x80);
}

// The words of a text in lower case. A word is a run of letters, digits and `others`.
inline std::vector<std::string> words_in(std::string_view text, std::string_view others) {
  std::vector<std::string> words;
  bool inside = false;
  for (const char c : text) {
    const bool part = is_alphanumeric(c) || others.find(c) != others.npos;
    if (part && !inside) words.emplace_back();
    if (part) words.back() += c >= 'A' && c <= 'Z' ? char(c + ('a' - 'A')) : c;
    inside = part;
  }
  return words;
}

// True where `words` stand in the text with no letter or digit on either side; case is ignored.
inline bool contains_words(std::string_view text, std::string_view words) {
  const std::string t = lower_ascii(text), w = lower_ascii(words);
  const auto letter = [&](size_t i) { return i < t.size() && is_alphanumeric(t[i]); };
  if (w.empty()) return false;
  for (size_t begin = t.find(w); begin != std::string::npos; begin = t.find(w, begin + 1)) {
    const size_t end = begin + w.size();
    const bool begins_word = begin == 0 || !letter(begin - 1) || !letter(begin);
    const bool ends_word = !letter(end) || !letter(end - 1);
    if (begins_word && ends_word) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------
// Marks

// The share of all sequences of four words that have come before; 1 for fewer than four words.
inline double repeated_share(const std::vector<std::string>& words) {
  if (words.size() < 4) return 1;
  std::set<std::string> seen;
  const size_t all = words.size() - 3;
  for (size_t i = 0; i < all; i++)
    seen.insert(words[i] + " " + words[i + 1] + " " + words[i + 2] + " " + words[i + 3]);
  return 1 - double(seen.size()) / double(all);
}

// The last sentence, if the text ends with a punctuation mark; otherwise empty.
inline std::string_view last_sentence(std::string_view text) {
  const size_t end = text.find_last_not_of(" \t\r\n");
  if (end == std::string_view::npos || std::string_view(".!?").find(text[end]) == std::string::npos)
    return {};
  text = text.substr(0, end + 1);
  const size_t before = text.find_last_of(".!?\n", end == 0 ? 0 : end - 1);
  return before == std::string_view::npos || end == 0 ? text : text.substr(before + 1);
}

inline double criterion_mark(const Criterion& c, std::string_view text, bool ended) {
  const auto has_any = [&](std::string_view in) {
    return std::any_of(c.words.begin(), c.words.end(),
                       [&](const std::string& w) { return contains_words(in, w); });
  };
  switch (c.kind) {
    case Criterion::Kind::mentions: {
      const auto has = [&](const std::string& w) { return contains_words(text, w); };
      return double(std::count_if(c.words.begin(), c.words.end(), has)) / double(c.words.size());
    }
    case Criterion::Kind::begins: {
      const std::string lower = lower_ascii(text);
      return std::any_of(c.words.begin(), c.words.end(), [&](const std::string& w) {
        return std::string_view(lower).starts_with(lower_ascii(w));
      });
    }
    case Criterion::Kind::ends:
      return ended && has_any(last_sentence(text));
    case Criterion::Kind::varied:
      return std::max(0., 1 - 5 * repeated_share(words_in(lower_ascii(text), "'")));
    case Criterion::Kind::length: {
      const double n = double(words_in(lower_ascii(text), "'").size());
      return n < c.low ? n / c.low : n > c.high ? std::max(0., 2 - n / c.high) : 1;
    }
  }
  fail("rubric: kind: found ", int(c.kind), ", expected one of Criterion's kinds");
}

// ---------------------------------------------------------------------------------------------
// Rubrics in JSON

inline Rubric parse_rubric(const Json& json, const std::string& where) {
  if (!json.is_array() || json.empty()) {
    fail(where, ": found ", json_text(json), ", expected an array of criteria");
  }
  Rubric rubric;
  for (const Json& json_criterion : json) {
    const std::string key = concat(where, "[", rubric.size(), "]");
    const auto kind = json_get<std::string>(json_criterion, "kind", key);
    const auto* name = std::find(std::begin(kCriterionNames), std::end(kCriterionNames), kind);
    require(name != std::end(kCriterionNames), key, ": kind: found ", json_text(kind),
            ", expected mentions, begins, ends, varied or length");
    Criterion c{.kind = Criterion::Kind(name - std::begin(kCriterionNames)),
                .weight = json_get<double>(json_criterion, "weight", key)};
    require(c.weight > 0 && std::isfinite(c.weight), key, ": weight: found ", c.weight,
            ", expected more than 0");
    if (c.kind == Criterion::Kind::length) {
      c.low = json_get<int>(json_criterion, "low", key),
      c.high = json_get<int>(json_criterion, "high", key);
      require(c.low >= 1 && c.high >= c.low, key, ": found low ", c.low, " and high ", c.high,
              ", expected 1 <= low <= high");
    } else if (c.kind != Criterion::Kind::varied) {
      c.words = json_get<std::vector<std::string>>(json_criterion, "words", key);
      if (c.words.empty()) fail(key, ": words: found [], expected an array of strings");
    }
    rubric.push_back(std::move(c));
  }
  return rubric;
}

inline OrderedJson rubric_json(const Rubric& rubric) {
  OrderedJson json = OrderedJson::array();
  for (const Criterion& c : rubric) {
    OrderedJson one{{"kind", kCriterionNames[size_t(c.kind)]}};
    if (!c.words.empty()) one["words"] = c.words;
    if (c.kind == Criterion::Kind::length) one["low"] = c.low, one["high"] = c.high;
    one["weight"] = c.weight;
    json.push_back(one);
  }
  return json;
}

}  // namespace cake
