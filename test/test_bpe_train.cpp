// Training in bounded memory, split patterns for it, and more tokens for an existing vocabulary.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"
#include "cake/tokenizer.h"
#include "test/bpe_support.h"

using namespace cake;

namespace {

// Words of few letters, the short ones often: some pieces are frequent, many occur once.
std::string random_words(uint64_t seed, int words) {
  Rng rng{seed};
  std::string text;
  for (int i = 0; i < words; i++) {
    const uint64_t length = 1 + rng.below(1 + rng.below(12));
    for (uint64_t j = 0; j < length; j++) text += char('a' + rng.below(2 + rng.below(5)));
    text += rng.below(9) ? " " : ".\n";
  }
  return text;
}

Tokenizer train_merges(const std::string& text, int merges, const std::string& pattern) {
  return train_on(text, 256 + merges + kSpecials, pattern);
}

// The bytes of all tokens that merges make, in the order of their ids.
std::vector<std::string> trained_tokens(const Tokenizer& t) {
  std::vector<std::string> tokens;
  for (int id = 256; id < t.vocab_size(); id++) {
    if (!t.is_special(id)) tokens.emplace_back(t.token_bytes(id));
  }
  return tokens;
}

std::map<std::string, int64_t> count_pieces(const Tokenizer& t, const std::string& text) {
  std::map<std::string, int64_t> counts;
  for (const std::string_view piece : t.pieces(text)) counts[std::string(piece)]++;
  return counts;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Bounded memory

TEST_CASE("counts in temporary files give the same tokens as counts in memory") {
  TempDir dir;
  // So often that every thread sees most of the pieces, however the stretches are shared out.
  const std::string words = random_words(1, 60000);
  std::string text;
  for (int i = 0; i < 16; i++) text += words;
  const std::string input = path_of(dir, "t.txt", text);
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    TrainingReport all, report;
    const uint64_t hash = train_tokenizer({.inputs = {input}}, 600, pattern, &all).hash();
    CHECK(all.temporary_files == 0);
    // Enough for all pieces once, and not for a table of them in every thread.
    const Corpus corpus{.inputs = {input},
                        .threads = 8,
                        .max_memory = 420 * all.distinct_pieces,
                        .stretch_bytes = 4000};
    CHECK(train_tokenizer(corpus, 600, pattern, &report).hash() == hash);
    CHECK(report.temporary_files > 0);
    CHECK(report.least_count == 1);
    CHECK(report.dropped_distinct == 0);
    CHECK(report.pieces == all.pieces);
    CHECK(report.distinct_pieces == all.distinct_pieces);
    CHECK(report.bytes == int64_t(text.size()));
  }
}

TEST_CASE("what training drops is every piece below a count, and is stated") {
  TempDir dir;
  const std::string text = random_words(2, 30000);
  const std::string input = path_of(dir, "t.txt", text);
  const std::map<std::string, int64_t> counts = count_pieces(train_merges("ab", 0, "gpt2"), text);
  int64_t least_before = INT64_MAX;
  for (const int64_t memory : {100'000, 400'000, 1'000'000}) {
    CAPTURE(memory);
    TrainingReport report;
    const Tokenizer t = train_tokenizer({.inputs = {input}, .max_memory = memory},
                                        256 + 60 + kSpecials, "gpt2", &report);
    CHECK(report.least_count > 1);
    CHECK(report.least_count < least_before);  // more memory drops less
    least_before = report.least_count;
    int64_t distinct = 0, pieces = 0, all = 0;
    std::vector<Ids> kept;
    for (const auto& [piece, count] : counts) {
      all += count;
      if (count < report.least_count) {
        distinct++, pieces += count;
      } else {
        kept.insert(kept.end(), size_t(count), plain::encode(piece, {}));
      }
    }
    CHECK(report.pieces == all);
    CHECK(report.distinct_pieces == int64_t(counts.size()));
    CHECK(report.dropped_distinct == distinct);
    CHECK(report.dropped_pieces == pieces);
    if (memory > 100'000) continue;  // the definition is slow
    std::vector<plain::Merge> merges;
    for (const plain::Merge& m : plain::learn_merges(kept, 60)) merges.push_back(m);
    for (size_t k = 0; k < merges.size(); k++) {
      const std::string_view bytes = t.token_bytes(256 + int(k));
      CHECK(plain::encode(bytes, std::span(merges).first(k)) ==
            Ids{merges[k].first, merges[k].second});
    }
  }
  CHECK(contains(
      error_of([&] { train_tokenizer({.inputs = {input}, .max_memory = 100}, 300, "gpt2"); }),
      "--max-memory: found 100 B, in which not even the most frequent piece fits"));
}

TEST_CASE("what training drops does not depend on threads or on the order of documents") {
  TempDir dir;
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 60; i++) texts.push_back(random_words(100 + i, 1500));
  const auto lines = [](const std::vector<std::string>& documents) {
    std::string out;
    for (const std::string& text : documents) out += Json{{"text", text}}.dump() + "\n";
    return out;
  };
  const std::string forward = path_of(dir, "a.jsonl", lines(texts));
  const std::string backward = path_of(dir, "b.jsonl", lines({texts.rbegin(), texts.rend()}));
  std::set<std::tuple<uint64_t, int64_t, int64_t>> results;
  for (const std::string& input : {forward, backward}) {
    for (const int threads : {1, 2, 5}) {
      TrainingReport report;
      const Corpus corpus{
          .inputs = {input}, .threads = threads, .max_memory = 1'500'000, .stretch_bytes = 3000};
      const Tokenizer t = train_tokenizer(corpus, 500, "cl100k", &report);
      results.insert({t.hash(), report.least_count, report.dropped_pieces});
      CHECK(report.least_count > 1);
    }
  }
  CHECK(results.size() == 1);
}

TEST_CASE("training leaves out pieces that are longer than any word, and says so") {
  TempDir dir;
  const std::string words = random_words(3, 2000) + "\n";
  std::string blob;
  for (Rng rng{4}; blob.size() < 3 * kLongestTrainingPiece;) blob += char('A' + rng.below(26));
  const std::string just = blob.substr(0, kLongestTrainingPiece);
  const auto train = [&](const std::string& text, TrainingReport& report) {
    return train_tokenizer({.inputs = {path_of(dir, "t.txt", text)}}, 400, "cl100k", &report)
        .hash();
  };
  TrainingReport plain, with_blob, with_just;
  const uint64_t hash = train(words, plain);
  CHECK(train(words + blob, with_blob) == hash);
  CHECK(plain.too_long_pieces == 0);
  CHECK(with_blob.too_long_pieces == 1);
  CHECK(with_blob.too_long_bytes == int64_t(blob.size()));
  CHECK(train(words + just, with_just) != hash);
  CHECK(with_just.too_long_pieces == 0);
}

// ---------------------------------------------------------------------------------------------
// Patterns

TEST_CASE("training takes the split of a tokenizer whose path it is given") {
  TempDir dir;
  const std::string text = "cafe\u0301 cafe\u0301 caf\u00e9 12345 don't";
  train_merges("ab", 0, "qwen2").save(dir / "q");
  Json json = read_json(dir / "q" / "tokenizer.json");
  json["normalizer"] = {{"type", "NFC"}};
  write_file(dir / "q" / "tokenizer.json", json.dump());
  const Tokenizer t = train_merges(text, 20, (dir / "q").string());
  // Normalized before it is counted: no token ends inside the letter that NFC composes.
  const Tokenizer composed = train_merges("caf\u00e9 caf\u00e9 caf\u00e9 12345 don't", 20, "qwen2");
  CHECK(trained_tokens(t) == trained_tokens(composed));
  CHECK(t.encode("cafe\u0301") == t.encode("caf\u00e9"));
  CHECK(t.pieces("12345").size() == 5);
}

TEST_CASE("training takes a regular expression as its pattern, and refuses what is neither") {
  const std::string text = random_words(5, 500);
  for (const Pattern p : {Pattern::gpt2, Pattern::cl100k, Pattern::qwen2, Pattern::o200k}) {
    CHECK(train_merges(text, 50, pattern_regex(p)).hash() ==
          train_merges(text, 50, pattern_name(p)).hash());
  }
  CHECK(contains(error_of([&] { train_merges(text, 50, "no/such.json"); }),
                 "--pattern: found no/such.json, expected gpt2, cl100k, qwen2 or o200k, a regular "
                 "expression, or the path of a tokenizer"));
}

// ---------------------------------------------------------------------------------------------
// More tokens

TEST_CASE("training goes on where a vocabulary ends as if it had never stopped") {
  TempDir dir;
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    const std::string text = random_words(6, 8000);
    const Corpus corpus{.inputs = {path_of(dir, "t.txt", text)}, .threads = 2};
    const Tokenizer small = train_merges(text, 100, pattern);
    const Tokenizer extended = extend_tokenizer(small, corpus, {.tokens = 80});
    CHECK(trained_tokens(extended) == trained_tokens(train_merges(text, 180, pattern)));
    CHECK(extended.vocab_size() == small.vocab_size() + 80);
    for (int id = 0; id < small.vocab_size(); id++) {
      CHECK(extended.token_bytes(id) == small.token_bytes(id));
      CHECK(extended.is_special(id) == small.is_special(id));
    }
    // A text's ids change only where new tokens stand: with these replaced by what they stand for,
    // they are the old ones.
    const std::string other = random_words(7, 3000);
    Ids undone;
    for (const int id : extended.encode(other)) {
      if (id < small.vocab_size()) {
        undone.push_back(id);
      } else {
        small.encode(extended.token_bytes(id), undone);
      }
    }
    CHECK(extended.decode(extended.encode(other)) == other);
    CHECK(extended.encode(other).size() < small.encode(other).size());
    CHECK(small.decode(undone) == other);
  }
}

TEST_CASE("an extended vocabulary is saved and loaded with the same ids") {
  TempDir dir;
  const std::string text = random_words(8, 5000);
  const Corpus corpus{.inputs = {path_of(dir, "t.txt", text)}};
  const Tokenizer t = extend_tokenizer(train_merges(text, 50, "cl100k"), corpus,
                                       {.specials = {"<|tool|>", "[mask]"}, .tokens = 30});
  t.save(dir / "x");
  const Tokenizer again = Tokenizer::load(dir / "x");
  CHECK(again.hash() == t.hash());
  CHECK(again.encode(text + "[mask]", true) == t.encode(text + "[mask]", true));
  CHECK(t.special("<|tool|>") == 256 + 50 + kSpecials);
  CHECK(t.special("[mask]") == 256 + 50 + kSpecials + 1);
  CHECK(t.encode("a[mask]", true) == Ids{'a', 256 + 50 + kSpecials + 1});
  CHECK(t.vocab_size() == 256 + 50 + kSpecials + 2 + 30);
}

TEST_CASE("a trained token never has the bytes of a token that is there") {
  TempDir dir;
  // "<|>" is a special token, and the text is full of it.
  const Tokenizer base = extend_tokenizer(train_merges("ab", 0, "gpt2"), {}, {.specials = {"<|>"}});
  std::string text;
  for (int i = 0; i < 50; i++) text += "<|>";
  const Corpus corpus{.inputs = {path_of(dir, "t.txt", text)}};
  const Tokenizer t = extend_tokenizer(base, corpus, {.tokens = 6});
  std::set<std::string_view> bytes;
  for (int id = 0; id < t.vocab_size(); id++) CHECK(bytes.insert(t.token_bytes(id)).second);
  CHECK(t.special("<|>") == base.special("<|>"));
  CHECK(t.decode(t.encode(text)) == text);
}

TEST_CASE("extending refuses names that are there, empty ones, and nothing to do") {
  const Tokenizer t = train_merges("ab", 1, "gpt2");
  const auto extend = [&](const ExtendOptions& more) {
    return error_of([&] { extend_tokenizer(t, {}, more); });
  };
  CHECK(contains(extend({.specials = {"<|endoftext|>"}}), "--special: found <|endoftext|>, which"));
  CHECK(contains(extend({.specials = {"ab"}}), "--special: found ab, which the vocabulary has"));
  CHECK(contains(extend({.specials = {"<a>", "<a>"}}), "named twice"));
  CHECK(contains(extend({.specials = {""}}), "--special: found an empty name"));
  CHECK(contains(extend({}), "found neither --special nor --tokens"));
  CHECK(contains(extend({.tokens = 5}), "--tokens: found no INPUT"));
  CHECK(contains(extend({.tokens = -5}), "--tokens: found -5"));
}
