// The true reward of an answer to an open request: what a reward model is made to guess from noisy
// comparisons, and what over-optimisation of the guess is measured by.
//
// A rubric stands with a prompt, as data: a list of criteria, each of which gives an answer a mark
// from 0 to 1. The true reward is the weighted mean of the marks, so it is from 0 to 1 too.
//
//     [{"kind": "mentions", "words": ["Ada", "dog"], "weight": 3}   the share of the words it has
//      {"kind": "begins", "words": ["Here is", ...], "weight": 1}   1 if it begins with one of them
//      {"kind": "ends", "words": ["went home", ...], "weight": 2}   1 if its last sentence is whole
//                                      and has one of them, and the turn was ended, not cut off
//      {"kind": "varied", "weight": 2}   1 where no four words in a row come twice, 0 where a fifth
//                                      of all fours in a row, or more, have come before
//      {"kind": "length", "low": 30, "high": 60, "weight": 2}]   1 for so many words; below, in
//                                      proportion; above, falling to 0 at twice `high`
//
// Words are found whole, case ignored. An answer without four words varies nothing: mark 0.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "cake/json.h"

namespace cake {

struct Criterion {
  enum class Kind { mentions, begins, ends, varied, length } kind = Kind::varied;
  double weight = 1;               // above 0
  std::vector<std::string> words;  // mentions, begins, ends: one at least
  int low = 0, high = 0;           // length, in words: 1 <= low <= high
};
inline constexpr const char* kCriterionNames[] = {"mentions", "begins", "ends", "varied", "length"};

using Rubric = std::vector<Criterion>;

// ---------------------------------------------------------------------------------------------
// Words in text

inline std::string lower_ascii(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? char(c + ('a' - 'A')) : c;
  for (size_t i; (i = out.find("\xe2\x80\x99")) != std::string::npos;) out.replace(i, 3, "'");
  return out;
}

// As whole words, case ignored: no letter or digit on either side.
inline bool contains_words(std::string_view text, std::string_view words) {
  const std::string t = lower_ascii(text), w = lower_ascii(words);
  const auto letter = [&](size_t i) {
    return i < t.size() && (std::isalnum(static_cast<unsigned char>(t[i])) || (t[i] & 0x80));
  };
  if (w.empty()) return false;
  for (size_t at = t.find(w); at != std::string::npos; at = t.find(w, at + 1)) {
    const bool begins = at == 0 || !letter(at - 1) || !letter(at);
    const bool ends = !letter(at + w.size()) || !letter(at + w.size() - 1);
    if (begins && ends) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------
// Marks

// Words in lower case: letters and digits; all else stands between them, but for an apostrophe.
inline std::vector<std::string> words_in(std::string_view text) {
  std::vector<std::string> words;
  bool inside = false;
  for (const char c : lower_ascii(text)) {
    const bool part = std::isalnum(static_cast<unsigned char>(c)) || (c & 0x80) || c == '\'';
    if (part && !inside) words.emplace_back();
    if (part) words.back() += c;
    inside = part;
  }
  return words;
}

// The share of all fours of words in a row that have come before; 1 for fewer than four words.
inline double repeated_share(const std::vector<std::string>& words) {
  if (words.size() < 4) return 1;
  std::set<std::string> seen;
  const size_t all = words.size() - 3;
  for (size_t i = 0; i < all; i++)
    seen.insert(words[i] + " " + words[i + 1] + " " + words[i + 2] + " " + words[i + 3]);
  return 1 - double(seen.size()) / double(all);
}

// Whole, where it ends with a mark of punctuation; otherwise empty.
inline std::string_view last_sentence(std::string_view text) {
  const size_t end = text.find_last_not_of(" \t\r\n");
  if (end == std::string_view::npos || std::string_view(".!?").find(text[end]) == std::string::npos)
    return {};
  text = text.substr(0, end + 1);
  const size_t before = text.find_last_of(".!?\n", end == 0 ? 0 : end - 1);
  return before == std::string_view::npos || end == 0 ? text : text.substr(before + 1);
}

inline double criterion_mark(const Criterion& c, std::string_view text, bool finished) {
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
      return finished && has_any(last_sentence(text));
    case Criterion::Kind::varied:
      return std::max(0., 1 - 5 * repeated_share(words_in(text)));
    case Criterion::Kind::length: {
      const double n = double(words_in(text).size());
      return n < c.low ? n / c.low : n > c.high ? std::max(0., 2 - n / c.high) : 1;
    }
  }
  fail("rubric: kind: found ", int(c.kind), ", expected one of Criterion's kinds");
}

// From 0 to 1. `finished`: the answer ended its turn, where a length limit did not cut it off.
inline double true_reward(const Rubric& rubric, std::string_view text, bool finished) {
  double sum = 0, weights = 0;
  for (const Criterion& c : rubric) {
    sum += c.weight * criterion_mark(c, text, finished);
    weights += c.weight;
  }
  return sum / weights;
}

// ---------------------------------------------------------------------------------------------
// As JSON

inline Rubric parse_rubric(const Json& json, const std::string& where) {
  if (!json.is_array() || json.empty()) {
    fail(where, ": found ", json_text(json), ", expected an array of criteria");
  }
  Rubric rubric;
  for (const Json& from : json) {
    const std::string at = concat(where, "[", rubric.size(), "]");
    const auto kind = json_get<std::string>(from, "kind", at);
    const auto* name = std::find(std::begin(kCriterionNames), std::end(kCriterionNames), kind);
    if (name == std::end(kCriterionNames)) {
      fail(at, ": kind: found ", json_text(kind),
           ", expected mentions, begins, ends, varied or length");
    }
    Criterion c{.kind = Criterion::Kind(name - std::begin(kCriterionNames)),
                .weight = json_get<double>(from, "weight", at)};
    if (!(c.weight > 0 && std::isfinite(c.weight))) {
      fail(at, ": weight: found ", c.weight, ", expected more than 0");
    }
    if (c.kind == Criterion::Kind::length) {
      c.low = json_get<int>(from, "low", at), c.high = json_get<int>(from, "high", at);
      if (c.low < 1 || c.high < c.low) {
        fail(at, ": found low ", c.low, " and high ", c.high, ", expected 1 <= low <= high");
      }
    } else if (c.kind != Criterion::Kind::varied) {
      const auto words = from.find("words");
      if (words == from.end()) fail(at, ": words is missing");
      if (!words->is_array() || words->empty()) {
        fail(at, ": words: found ", json_text(*words), ", expected an array of strings");
      }
      for (const Json& w : *words) c.words.push_back(json_as<std::string>(w, "words", at));
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
