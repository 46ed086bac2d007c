// The tokenizer: scanner, encoder, trainer, file formats, documents and shards.
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cake/json.h"
#include "cake/records.h"
#include "cake/shards.h"
#include "cake/tokenizer.h"
#include "cake/unicode.h"
#include "test/support.h"

using namespace cake;

namespace {

using Ids = std::vector<int>;
const char* const kAllPatterns[] = {"gpt2", "cl100k", "qwen2", "o200k"};

// Text that visits every class and every corner of the patterns.
std::string random_text(uint64_t seed, int characters) {
  static const std::vector<std::string> alphabet = {
      "a",      "b",      "c",      "e",      "A",      "B", "Z", "s",  "S",
      "t",      "ll",     "'",      "'",      " ",      " ", " ", "  ", "\n",
      "\n",     "\r\n",   "\t",     "/",      "!",      ".", "0", "1",  "23",
      "the ",   "ing ",   "\u0301", "日",     "本",     "ſ", "ß", "ǅ",  "ʰ",
      "\u00a0", "\u3000", "\u0085", "\u001c", "\u200b", "½", "é", "É",  "😀"};
  Rng rng{seed};
  std::string text;
  for (int i = 0; i < characters; i++) text += alphabet[rng.below(alphabet.size())];
  return text;
}

// Long words of two letters: almost every border is contested, most tokens have several splits.
std::string two_letters(uint64_t seed, int n) {
  Rng rng{seed};
  std::string text;
  for (int i = 0; i < n; i++) text += rng.below(3) ? (rng.below(200) ? "a" : " ") : "b";
  return text;
}

std::string random_bytes(uint64_t seed, size_t n) {
  Rng rng{seed};
  std::string bytes;
  while (bytes.size() < n) bytes += char(rng.next());
  return bytes;
}

std::string path_of(const TempDir& dir, const std::string& name, const std::string& content) {
  write_file(dir / name, content);
  return (dir / name).string();
}

Tokenizer train_on(const std::string& text, int vocab_size, const std::string& pattern,
                   int threads = 1) {
  TempDir dir;
  Corpus corpus{.inputs = {path_of(dir, "text.txt", text)}, .threads = threads};
  return train_tokenizer(corpus, vocab_size, pattern);
}

// The merges of a tokenizer that was trained here: its ids are ranks, so that the merges before a
// token leave its two parts of its bytes.
const std::vector<plain::Merge>& merges_of(const Tokenizer& tokenizer) {
  static std::map<uint64_t, std::vector<plain::Merge>> known;
  std::vector<plain::Merge>& merges = known[tokenizer.hash()];
  for (int id = 256 + int(merges.size()); !tokenizer.is_special(id); id++) {
    const Ids parts = plain::encode(tokenizer.token_bytes(id), merges);
    REQUIRE(parts.size() == 2);
    merges.push_back({parts[0], parts[1]});
  }
  return merges;
}

Ids plain_encode(const Tokenizer& tokenizer, std::string_view text) {
  Ids ids;
  for (const std::string_view piece : tokenizer.pieces(text)) {
    const Ids tokens = plain::encode(piece, merges_of(tokenizer));
    ids.insert(ids.end(), tokens.begin(), tokens.end());
  }
  return ids;
}

Ids read_split(const std::filesystem::path& prefix, const std::string& split) {
  const TokenStream stream(prefix, split);
  Ids ids(size_t(stream.size()));
  stream.copy(0, ids);
  return ids;
}

std::string json_lines(const std::vector<std::string>& texts) {
  std::string out;
  for (const std::string& text : texts) out += Json{{"text", text}}.dump() + "\n";
  return out;
}

const Tokenizer& real(const std::string& name) {
  static std::map<std::string, Tokenizer> loaded;
  const auto it = loaded.find(name);
  if (it != loaded.end()) return it->second;
  return loaded.emplace(name, Tokenizer::load(data_path("tokenizers/" + name))).first->second;
}

size_t count_pieces(const Tokenizer& t, std::string_view text) { return t.pieces(text).size(); }

}  // namespace

// ---------------------------------------------------------------------------------------------
// Against Hugging Face

TEST_CASE("pieces and ids equal those of Hugging Face's tokenizers for every pattern") {
  const Json golden = read_json("test/golden/tokenizer.json");
  REQUIRE(golden.at("tokenizers").size() == 5);
  for (const Json& g : golden.at("tokenizers")) {
    CAPTURE(g.at("pattern").get<std::string>());
    TempDir dir;
    const Tokenizer t = Tokenizer::load(path_of(dir, "tokenizer.json", g.at("file").dump()));
    int different = 0;
    for (size_t i = 0; i < golden.at("texts").size(); i++) {
      const std::string text = golden["texts"][i];
      std::vector<size_t> sizes;
      for (const std::string_view piece : t.pieces(text)) sizes.push_back(piece.size());
      const bool same = sizes == g["pieces"][i].get<std::vector<size_t>>() &&
                        t.encode(text) == g["ids"][i].get<Ids>();
      if (!same) MESSAGE("differs: " << Json(text).dump());
      different += !same;
    }
    CHECK(different == 0);
  }
}

TEST_CASE("the Unicode tables hold what Unicode says") {
  CHECK(std::string(kUnicodeVersion) == "16.0.0");
  const uint8_t* kind = char_classes();
  CHECK(kind[0x61] == kLower);
  CHECK(kind[0x1C5] == kUpper);   // titlecase
  CHECK(kind[0x17F] == kLower);   // long s
  CHECK(kind[0x2B0] == kLetter);  // modifier
  CHECK(kind[0x301] == kMark);
  CHECK(kind[0x2167] == kNumber);
  CHECK(kind[0x1C89] == kUpper);    // new in 16
  CHECK(kind[0x16EA0] == kOther);   // new in 17
  CHECK(kind[0x10FFFF] == kOther);  // the last one
  CHECK(kind[0x0A] == kNewline);
  std::vector<uint32_t> spaces;
  for (uint32_t c = 0; c < 0x110000; c++) {
    if (kind[c] == kSpace) spaces.push_back(c);
  }
  CHECK(spaces == std::vector<uint32_t>{0x9,    0xB,    0xC,    0x20,   0x85,   0xA0,
                                        0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004,
                                        0x2005, 0x2006, 0x2007, 0x2008, 0x2009, 0x200A,
                                        0x2028, 0x2029, 0x202F, 0x205F, 0x3000});
}

// ---------------------------------------------------------------------------------------------
// Known answers of the real vocabularies

TEST_CASE("gpt2's vocabulary gives the known answers") {
  if (skip_without_data("tokenizers/r50k_base.tiktoken")) return;
  const Tokenizer& t = real("r50k_base.tiktoken");
  CHECK(t.vocab_size() == 50257);
  CHECK(t.end_of_text() == 50256);
  CHECK(t.encode("hello world") == Ids{31373, 995});
  CHECK(t.encode("hello <|endoftext|>", true) == Ids{31373, 220, 50256});
  CHECK(t.encode("<|endoftext|>") == Ids{27, 91, 437, 1659, 5239, 91, 29});
  CHECK(t.encode("This is some text") == Ids{1212, 318, 617, 2420});
  CHECK(t.encode("hello 👋 world 🌍") == Ids{31373, 50169, 233, 995, 12520, 234, 235});
  const int zeros[] = {15, 405, 830, 2388, 20483, 10535, 24598, 8269};
  for (size_t n = 1; n <= 8; n++) CHECK(t.encode(std::string(n, '0')) == Ids{zeros[n - 1]});
  CHECK(t.encode(std::string(1000000, '^')) == Ids(250000, 39397));
}

TEST_CASE("cl100k's vocabulary gives the known answers") {
  if (skip_without_data("tokenizers/cl100k_base.tiktoken")) return;
  const Tokenizer& t = real("cl100k_base.tiktoken");
  CHECK(t.vocab_size() == 100277);
  CHECK(t.special("<|endofprompt|>") == 100276);
  CHECK(t.token_bytes(100256).empty());  // a hole
  CHECK(t.encode("hello world") == Ids{15339, 1917});
  CHECK(t.encode("rer") == Ids{38149});
  CHECK(t.encode("'rer") == Ids{2351, 81});
  CHECK(t.encode("today\n ") == Ids{31213, 198, 220});
  CHECK(t.encode("today\n \n") == Ids{31213, 27907});
  CHECK(t.encode("today\n  \n") == Ids{31213, 14211});
  CHECK(t.encode("👍") == Ids{9468, 239, 235});
  CHECK(t.encode("hello123!!!? (안녕하세요!) 😉") ==
        Ids{15339, 4513, 12340, 30, 320, 31495, 230, 75265, 243, 92245, 16715, 57037});
  CHECK(t.encode(std::string(1000000, 'a')) == Ids(125000, 70540));
  Ids spaces(7812, 58040);
  spaces.push_back(5351);
  CHECK(t.encode(std::string(1000000, ' ')) == spaces);
}

TEST_CASE("the patterns' corners fall as the published patterns do") {
  if (skip_without_data("tokenizers/o200k_base.tiktoken")) return;
  const Tokenizer all[] = {real("r50k_base.tiktoken"), real("cl100k_base.tiktoken"),
                           real("o200k_base.tiktoken")};
  const auto counts = [&](std::string_view text) {
    return std::vector<size_t>{count_pieces(all[0], text), count_pieces(all[1], text),
                               count_pieces(all[2], text)};
  };
  using Counts = std::vector<size_t>;
  CHECK(counts("'ſ") == Counts{2, 1, 1});
  CHECK(counts("DON'T") == Counts{3, 2, 1});
  CHECK(counts("हिन्दी") == Counts{6, 4, 1});
  CHECK(counts("helloWORLD") == Counts{1, 1, 2});
  CHECK(counts("12345") == Counts{1, 2, 2});
  CHECK(counts("!\n/") == Counts{3, 2, 1});
  CHECK(counts(" \r\n ") == Counts{1, 2, 2});
  CHECK(counts("\nword") == Counts{2, 2, 2});
  CHECK(counts("\tword") == Counts{2, 1, 1});
  CHECK(counts("a\n\n  b") == Counts{3, 4, 4});
  CHECK(counts("\u001c") == Counts{1, 1, 1});
}

TEST_CASE("every token of the real vocabularies encodes to itself and decodes to its bytes") {
  if (skip_without_data("tokenizers/o200k_base.tiktoken")) return;
  for (const char* name : {"r50k_base.tiktoken", "cl100k_base.tiktoken", "o200k_base.tiktoken"}) {
    CAPTURE(name);
    const Tokenizer& t = real(name);
    int wrong = 0, checked = 0;
    for (int id = 0; id < t.vocab_size(); id++) {
      const std::string bytes(t.token_bytes(id));
      if (bytes.empty()) continue;
      checked++;
      wrong += t.decode(Ids{id}) != bytes;
      wrong += t.is_special(id) != (t.special(bytes) == id);
      if (t.is_special(id)) wrong += t.encode(bytes, true) != Ids{id};
      if (!t.is_special(id) && t.pieces(bytes).size() == 1) wrong += t.encode(bytes) != Ids{id};
    }
    CHECK(wrong == 0);
    CHECK(checked >= 50257);
  }
}

TEST_CASE("vocab.bpe, encoder.json and r50k's ranks are one vocabulary") {
  if (skip_without_data("tokenizers/gpt2_vocab.bpe")) return;
  const Tokenizer &a = real("gpt2_vocab.bpe"), &b = real("r50k_base.tiktoken");
  CHECK(a.hash() == b.hash());
  CHECK(a.encode(random_text(1, 5000)) == b.encode(random_text(1, 5000)));
  // encoder.json spells bytes; every spelling of ASCII is itself.
  const Json encoder = read_json(data_path("tokenizers/gpt2_encoder.json"));
  int checked = 0, wrong = 0;
  for (const auto& [key, id] : encoder.items()) {
    if (std::any_of(key.begin(), key.end(), [](char c) { return c <= 32 || c == 127; })) continue;
    checked++;
    wrong += a.token_bytes(id.get<int>()) != key;
  }
  CHECK(checked > 10000);
  CHECK(wrong == 0);
}

TEST_CASE("a real vocabulary with holes among its ids is saved and loaded unchanged") {
  if (skip_without_data("tokenizers/o200k_base.tiktoken")) return;
  for (const char* name : {"r50k_base.tiktoken", "o200k_base.tiktoken"}) {
    const Tokenizer& t = real(name);
    TempDir dir;
    t.save(dir.path());
    const Tokenizer again = Tokenizer::load(dir.path());
    CHECK(again.hash() == t.hash());
    CHECK(again.vocab_size() == t.vocab_size());
    CHECK(again.end_of_text() == t.end_of_text());
    const std::string text = random_text(2, 20000);
    CHECK(again.encode(text) == t.encode(text));
  }
}

// ---------------------------------------------------------------------------------------------
// Encoding

TEST_CASE("the encoder equals the definition of byte pair encoding") {
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    const Tokenizer t = train_on(random_text(3, 20000), 700, pattern);
    for (uint64_t seed = 0; seed < 300; seed++) {
      const std::string text = random_text(100 + seed, int(1 + seed % 60));
      CHECK(t.encode(text) == plain_encode(t, text));
    }
    CHECK(t.encode(random_bytes(4, 3000)) == plain_encode(t, random_bytes(4, 3000)));
  }
}

TEST_CASE("the encoder equals the definition where merges overlap most") {
  const Tokenizer t = train_on(two_letters(5, 6000), 400, "gpt2");
  for (uint64_t seed = 0; seed < 200; seed++) {
    std::string piece;
    Rng draw{1000 + seed};
    for (int i = 0; i < 80; i++) piece += draw.below(2 + seed % 3) ? 'a' : 'b';
    CHECK(t.encode(piece) == plain_encode(t, piece));
  }
}

TEST_CASE("any bytes and every token round-trip") {
  for (const char* pattern : kAllPatterns) {
    const Tokenizer t = train_on(random_text(6, 20000), 600, pattern);
    CHECK(t.decode(t.encode(random_bytes(7, 100000))) == random_bytes(7, 100000));
    CHECK(t.decode(t.encode(random_text(8, 50000))) == random_text(8, 50000));
    CHECK(t.encode("").empty());
    for (int id = 0; id < t.vocab_size(); id++) {
      const std::string bytes(t.token_bytes(id));
      CHECK(!bytes.empty());
      CHECK(t.encode(bytes, true) == Ids{id});
    }
  }
}

TEST_CASE("a million of one character is encoded in linear time") {
  // Quadratic work on a million bytes would take minutes: that the test ends is the test.
  const Tokenizer t = train_on(random_text(9, 20000) + std::string(5000, 'a'), 600, "o200k");
  for (const std::string unit : {"a", "A", " ", "\n", "^", "'", "1", "日", "\u0301", "\xff", "/"}) {
    std::string text;
    while (text.size() < 1000000) text += unit;
    const Ids ids = t.encode(text);
    CHECK(t.decode(ids) == text);
    CHECK(ids.size() <= 1000002);
  }
  const std::string upper = "日" + std::string(1000000, 'A');  // a word pattern that must back off
  CHECK(t.decode(t.encode(upper)) == upper);
}

TEST_CASE("special tokens are text unless allowed, the longest at a place first") {
  const Tokenizer t = train_on(random_text(10, 5000), 300, "cl100k");
  CHECK(t.vocab_size() == 300);
  for (int i = 0; i < kSpecials; i++) {
    CHECK(t.special(kSpecialTokens[i]) == 300 - kSpecials + i);
    CHECK(t.is_special(300 - kSpecials + i));
    CHECK(t.encode(concat("a", kSpecialTokens[i], "b"), true) ==
          Ids{'a', 300 - kSpecials + i, 'b'});
    for (const int id : t.encode(kSpecialTokens[i])) CHECK(!t.is_special(id));
  }
  CHECK(t.special("<|nothing|>") == -1);
  CHECK(t.end_of_text() == 300 - kSpecials);
  CHECK(t.encode("<|endoftext|", true) == t.encode("<|endoftext|"));
  const int end = t.end_of_text();
  CHECK(t.encode("<|endoftext|><|endoftext|>", true) == Ids{end, end});
}

TEST_CASE("decoding refuses ids that no vocabulary has") {
  const Tokenizer t = train_on("some text", 273, "gpt2");
  CHECK(contains(error_of([&] { t.decode(Ids{273}); }), "found token 273, expected 0 to 272"));
  CHECK(contains(error_of([&] { t.decode(Ids{-1}); }), "found token -1"));
}

// ---------------------------------------------------------------------------------------------
// Training

TEST_CASE("training gives the known answer") {
  const Tokenizer t = train_on("aaabdaaabac", 256 + 3 + kSpecials, "gpt2");
  CHECK(t.encode("aaabdaaabac") == Ids{258, 100, 258, 97, 99});
}

TEST_CASE("training equals counting all pairs anew for every merge") {
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    std::string text = random_text(11, 1500) + std::string(37, 'a') + " aaaa aaa abab ababa";
    const Tokenizer t = train_on(text, 256 + 150 + kSpecials, pattern);
    std::vector<Ids> pieces;
    for (const std::string_view piece : t.pieces(text)) pieces.push_back(plain::encode(piece, {}));
    CHECK(merges_of(t).size() == 150);
    CHECK(merges_of(t) == plain::learn_merges(pieces, 150));
  }
}

TEST_CASE("training does not depend on the order of documents or the number of threads") {
  TempDir dir;
  std::vector<std::string> texts, reversed;
  for (uint64_t i = 0; i < 40; i++) texts.push_back(random_text(200 + i, 20000));
  reversed.assign(texts.rbegin(), texts.rend());
  const std::string a = path_of(dir, "a.jsonl", json_lines(texts));
  const std::string b = path_of(dir, "b.jsonl", json_lines(reversed));
  std::vector<std::string> halves = {
      path_of(dir, "c.jsonl", json_lines({texts.begin() + 20, texts.end()})),
      path_of(dir, "d.jsonl", json_lines({texts.begin(), texts.begin() + 20}))};
  for (const char* pattern : kAllPatterns) {
    const uint64_t hash = train_tokenizer({.inputs = {a}}, 800, pattern).hash();
    CHECK(train_tokenizer({.inputs = {a}, .threads = 3}, 800, pattern).hash() == hash);
    CHECK(train_tokenizer({.inputs = {b}, .threads = 2}, 800, pattern).hash() == hash);
    CHECK(train_tokenizer({.inputs = halves}, 800, pattern).hash() == hash);
  }
}

TEST_CASE("a text with too few pairs gives a smaller vocabulary, specials last") {
  const Tokenizer t = train_on("abc abc", 5000, "gpt2");
  CHECK(t.vocab_size() == 256 + 3 + kSpecials);  // ab, abc, " abc"
  CHECK(t.end_of_text() == t.vocab_size() - kSpecials);
}

TEST_CASE("training refuses sizes, patterns, fractions and inputs that cannot be") {
  TempDir dir;
  const std::string text = path_of(dir, "t.txt", "some text");
  const auto train = [&](int size, const char* pattern, double fraction, std::string input) {
    return error_of(
        [&] { train_tokenizer({.inputs = {input}, .val_fraction = fraction}, size, pattern); });
  };
  CHECK(train(273, "gpt2", 0, text) == "no error");
  CHECK(contains(train(272, "gpt2", 0, text), "--vocab-size: found 272, expected 273"));
  CHECK(contains(train(300, "gpt3", 0, text), "--pattern: found gpt3, expected gpt2, cl100k"));
  CHECK(contains(train(300, "gpt2", 1, text), "--val-fraction: found 1, expected"));
  CHECK(contains(train(300, "gpt2", -.1, text), "--val-fraction: found -0.1"));
  CHECK(contains(train(300, "gpt2", std::nan(""), text), "--val-fraction: found nan"));
  CHECK(contains(train(300, "gpt2", .01, text), "--val-fraction: found 0.01 of 9 bytes"));
  CHECK(
      contains(train(300, "gpt2", 0, (dir / "none").string()), "none: cannot open: No such file"));
  CHECK(train(273, "gpt2", 0, dir.path().string()) == "no error");  // the files of a folder
  std::filesystem::create_directory(dir / "empty");
  CHECK(contains(train(300, "gpt2", 0, (dir / "empty").string()), "empty: found no files"));
}

// ---------------------------------------------------------------------------------------------
// Files of tokenizers

TEST_CASE("a trained tokenizer is saved and loaded with the same ids, for every pattern") {
  for (const char* pattern : kAllPatterns) {
    TempDir dir;
    const Tokenizer t = train_on(random_text(12, 20000), 900, pattern);
    t.save(dir / "model");
    for (const auto& path : {dir / "model", dir.path(), dir / "model" / "tokenizer.json"}) {
      const Tokenizer again = Tokenizer::load(path);
      CHECK(again.hash() == t.hash());
      CHECK(again.vocab_size() == 900);
      CHECK(again.special("</think>") == t.special("</think>"));
      CHECK(again.encode(random_text(13, 20000)) == t.encode(random_text(13, 20000)));
    }
    const Json config = read_json(dir / "model" / "tokenizer_config.json");
    CHECK(config.at("tokenizer_class") == "PreTrainedTokenizerFast");
    CHECK(config.at("eos_token") == "<|endoftext|>");
    CHECK(config.at("pad_token") == "<|endoftext|>");
  }
}

TEST_CASE("a tokenizer's files are written back byte for byte") {
  TempDir dir;
  train_on(random_text(14, 5000), 400, "qwen2").save(dir / "a");
  Json json = read_json(dir / "a" / "tokenizer.json");
  json["post_processor"] = {{"type", "Something"}};
  write_file(dir / "a" / "tokenizer.json", json.dump());
  write_file(dir / "a" / "tokenizer_config.json", "{\"chat_template\": \"x\"}");
  Tokenizer::load(dir / "a").save(dir / "b");
  for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
    CHECK(read_file(dir / "a" / name) == read_file(dir / "b" / name));
  }
}

TEST_CASE("the hash tells tokenizers apart by pattern, merges and specials") {
  std::set<uint64_t> hashes;
  for (const char* pattern : kAllPatterns) hashes.insert(train_on("ab", 273, pattern).hash());
  hashes.insert(train_on("ab", 274, "gpt2").hash());
  hashes.insert(train_on("ba", 274, "gpt2").hash());
  TempDir dir;
  train_on("ab", 273, "gpt2").save(dir.path());
  Json json = read_json(dir / "tokenizer.json");
  json["added_tokens"][0]["content"] = "<|other|>";
  json["model"]["vocab"].erase("<|endoftext|>");
  write_file(dir / "tokenizer.json", json.dump());
  hashes.insert(Tokenizer::load(dir.path()).hash());
  CHECK(hashes.size() == 7);
}

TEST_CASE("ignore_merges makes a token of a piece whatever the merges say") {
  TempDir dir;
  train_on("abc abd xyz", 273, "gpt2").save(dir.path());
  Json json = read_json(dir / "tokenizer.json");
  json["model"]["vocab"]["xyz"] = 273;
  write_file(dir / "tokenizer.json", json.dump());
  CHECK(Tokenizer::load(dir.path()).encode("xyz") == Ids{'x', 'y', 'z'});
  json["model"]["ignore_merges"] = true;
  write_file(dir / "tokenizer.json", json.dump());
  CHECK(Tokenizer::load(dir.path()).encode("xyz") == Ids{273});
  CHECK(Tokenizer::load(dir.path()).encode("xyzz") == Ids{'x', 'y', 'z', 'z'});
}

TEST_CASE("merges that list every split of a token give the same ids") {
  TempDir dir;
  const Tokenizer t = train_on(two_letters(15, 6000), 400, "cl100k");
  t.save(dir.path());
  Json json = read_json(dir / "tokenizer.json");
  const Json& vocab = json["model"]["vocab"];
  // As files made from .tiktoken's have it: by rank, then by the ranks of the parts. The spelling
  // of a byte is one or two bytes of UTF-8; cutting between bytes of one gives no token.
  std::map<int, std::vector<std::pair<std::pair<int, int>, std::string>>> splits;
  for (const auto& [key, id] : vocab.items()) {
    if (t.is_special(id.get<int>())) continue;
    for (size_t i = 1; i < key.size(); i++) {
      const std::string left = key.substr(0, i), right = key.substr(i);
      if ((right[0] & 0xC0) == 0x80 || !vocab.contains(left) || !vocab.contains(right)) continue;
      splits[id.get<int>()].push_back({{vocab[left], vocab[right]}, left + " " + right});
    }
  }
  Json merges = Json::array();
  for (auto& [id, list] : splits) {
    std::sort(list.begin(), list.end());
    for (const auto& [parts, text] : list) merges.push_back(text);
  }
  CHECK(merges.size() >= json["model"]["merges"].size() + 100);
  json["model"]["merges"] = merges;
  write_file(dir / "tokenizer.json", json.dump());
  CHECK(Tokenizer::load(dir.path()).hash() == t.hash());
}

TEST_CASE("NFC composes, decomposes and orders as Unicode says") {
  TempDir dir;
  const Tokenizer plain = train_on("ab", 273, "qwen2");
  plain.save(dir.path());
  Json json = read_json(dir / "tokenizer.json");
  json["normalizer"] = {{"type", "NFC"}};
  write_file(dir / "tokenizer.json", json.dump());
  const Tokenizer nfc = Tokenizer::load(dir.path());
  CHECK(nfc.hash() != plain.hash());
  const auto normal = [&](const std::string& text) { return nfc.decode(nfc.encode(text)); };
  CHECK(normal("e\u0301") == "\u00e9");
  CHECK(normal("\u212b") == "\u00c5");                    // the angstrom sign
  CHECK(normal("q\u0307\u0323") == "q\u0323\u0307");      // marks in order
  CHECK(normal("e\u0323\u0302") == "\u1ec7");             // two steps
  CHECK(normal("\u0958") == "\u0915\u093c");              // never composed
  CHECK(normal("\u1112\u1161\u11ab") == "\ud55c");        // Hangul
  CHECK(normal("\ud558\u11ab\u11ab") == "\ud55c\u11ab");  //
  CHECK(normal("a\u0315\u0300") == "\u00e0\u0315");       // past a mark of a higher class
  CHECK(normal("a\u0300\u0301") == "\u00e0\u0301");       // not past one of the same
  CHECK(normal("a\u0305\u0300") == "a\u0305\u0300");      // nor past one that stays
  CHECK(normal("\u0301e") == "\u0301e");                  // a mark at the start
  CHECK(normal("\xff"
               "e\xcc") ==
        "\xff"
        "e\xcc");  // bytes that are no UTF-8 stay
  CHECK(normal("plain \u65e5\u672c") == "plain \u65e5\u672c");
}

TEST_CASE("files that are no byte-level BPE are refused in one line that says why") {
  TempDir dir;
  train_on("ab ab abc", 275, "cl100k").save(dir / "good");
  const Json good = read_json(dir / "good" / "tokenizer.json");
  const auto with = [&](const char* pointer, const Json& value) {
    Json json = good;
    json[Json::json_pointer(pointer)] = value;
    const std::string path = path_of(dir, "tokenizer.json", json.dump());
    const std::string error = error_of([&] { Tokenizer::load(path); });
    CHECK(contains(error, "tokenizer.json: "));
    CHECK(!contains(error, "\n"));
    return error;
  };
  CHECK(contains(with("/model/type", "Unigram"), "model.type: found Unigram, expected byte-level"));
  CHECK(contains(with("/model/byte_fallback", true), "SentencePiece"));
  CHECK(contains(with("/pre_tokenizer", {{"type", "Metaspace"}}), "found Metaspace"));
  CHECK(contains(with("/normalizer", {{"type", "Prepend"}}), "SentencePiece"));
  CHECK(
      contains(with("/normalizer", {{"type", "Lowercase"}}), "found \"Lowercase\", expected NFC"));
  CHECK(contains(with("/pre_tokenizer", nullptr), "pre_tokenizer: found null"));
  CHECK(contains(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\\w+"),
                 "Regex: found \"\\\\w+\", expected the pattern of gpt2"));
  CHECK(contains(with("/pre_tokenizer/pretokenizers/1/add_prefix_space", true),
                 "\"add_prefix_space\": false"));
  CHECK(contains(with("/model/vocab/a", 98), "found id 98 twice"));
  CHECK(contains(with("/model/vocab/a", -5), "model.vocab: found -5"));
  CHECK(contains(with("/model/vocab/a", "x"), "model.vocab: found \"x\", expected a token id"));
  CHECK(contains(with("/model/vocab/日", 400), "found 日, expected a spelling"));
  CHECK(contains(with("/model/merges/0", "a"), "model.merges[0]: found \"a\""));
  CHECK(contains(with("/model/merges/0", "a q"), "model.merges[0]: found \"a q\""));
  CHECK(contains(with("/model/merges/0", {"a"}), "model.merges[0]: found [\"a\"]"));
  CHECK(contains(with("/model/merges", 3), "model.merges: found 3, expected an array"));
  CHECK(contains(with("/added_tokens/0/lstrip", true), "added_tokens[0]"));
  CHECK(contains(with("/model/dropout", .1), "model.dropout: found 0.1"));
  const auto without = [&](const char* object, const char* key) {
    Json json = good;
    json[Json::json_pointer(object)].erase(key);
    const std::string path = path_of(dir, "tokenizer.json", json.dump());
    return error_of([&] { Tokenizer::load(path); });
  };
  CHECK(contains(without("", "model"), "tokenizer.json: model is missing"));
  CHECK(contains(without("/model", "merges"), "model.merges is missing"));
  CHECK(contains(without("/model/vocab", "b"), "model.vocab: byte 98 has no token"));
  // A merge before those that make its parts: the definition would differ from the encoder's.
  Json json = good;
  std::swap(json["model"]["merges"][0], json["model"]["merges"][1]);
  const std::string swapped = path_of(dir, "tokenizer.json", json.dump());
  CHECK(contains(error_of([&] { Tokenizer::load(swapped); }), "model.merges[0]"));
}

TEST_CASE("missing, damaged and unknown tokenizer files are refused with their place") {
  TempDir dir;
  const auto load = [&](const std::string& name, const std::string& content) {
    const std::string path = path_of(dir, name, content);
    return error_of([&] { Tokenizer::load(path); });
  };
  CHECK(contains(error_of([&] { Tokenizer::load(dir / "none"); }), "none: not found"));
  CHECK(contains(error_of([&] { Tokenizer::load(dir.path()); }), "found no tokenizer.json"));
  CHECK(contains(load("tokenizer.json", ""), "tokenizer.json: not JSON"));
  CHECK(contains(load("tokenizer.json", "{\"model\": {"), "tokenizer.json: not JSON"));
  CHECK(contains(load("tokenizer.json", "[]"), "tokenizer.json: found [], expected an object"));
  CHECK(contains(load("t.model", "x"), "found a file of another kind"));
  CHECK(contains(load("t.tiktoken", "IQ== 0\nIg== 1\n"), "found 2 ranks, expected 50256 (r50k)"));
  CHECK(contains(load("t.tiktoken", "IQ== 0\nIg==\n"), "t.tiktoken:2: found Ig=="));
  CHECK(contains(load("t.tiktoken", "I*== 0\n"), "t.tiktoken:1: found I*=="));
  CHECK(contains(load("t.tiktoken", ""), "found 0 ranks"));
  CHECK(contains(load("vocab.bpe", "#version: 0.2\na b\nab\n"), "vocab.bpe:3: found ab"));
  CHECK(contains(load("vocab.bpe", "#version: 0.2\nab c\n"), "vocab.bpe:2: found ab c"));
  CHECK(contains(load("vocab.bpe", ""), "found no merges"));
}

// ---------------------------------------------------------------------------------------------
// Documents

TEST_CASE("documents are the same from every container") {
  TempDir dir;
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 100; i++) texts.push_back(random_text(300 + i, 2000));
  const std::string lines = json_lines(texts);
  const auto read = [](const std::string& path) {
    std::vector<std::string> all;
    DocumentReader reader({Input(path)}, 5000);  // small parts
    for (DocumentPart part; reader.next(part);) {
      if (part.begins) all.emplace_back();
      all.back() += part.text;
    }
    return all;
  };
  CHECK(read(path_of(dir, "a.jsonl", lines)) == texts);
  CHECK(read(path_of(dir, "a.jsonl.gz", deflated(lines))) == texts);
  CHECK(read(path_of(dir, "b.jsonl.gz",
                     deflated(lines.substr(0, 999)) + deflated(lines.substr(999)))) == texts);
  CHECK(read(path_of(dir, "a.jsonl.zst", zstandard(lines))) == texts);
  CHECK(read(path_of(dir, "b.jsonl.zst",
                     zstandard(lines.substr(0, 999)) + zstandard(lines.substr(999)))) == texts);
  CHECK(read(path_of(dir, "c.jsonl", "\xef\xbb\xbf\n" + lines + "\n \r\n")) == texts);
  CHECK(read(path_of(dir, "d.ndjson", lines.substr(0, lines.size() - 1))) == texts);
  CHECK(read(path_of(dir, "e.txt", lines)) == std::vector<std::string>{lines});
  CHECK(read(path_of(dir, "e.txt.gz", deflated(lines))) == std::vector<std::string>{lines});
  CHECK(read(path_of(dir, "e.txt.zst", zstandard(lines))) == std::vector<std::string>{lines});
  CHECK(read(path_of(dir, "f.txt", std::string(5000, 'x'))) ==
        std::vector<std::string>{std::string(5000, 'x')});  // exactly one part
  // Told by the first line, where the name says nothing. A .txt is always plain text.
  CHECK(read(path_of(dir, "g", lines)) == texts);
  CHECK(read(path_of(dir, "g.json.gz", deflated(lines))) == texts);
  CHECK(read(path_of(dir, "h", "{ a set }\n")) == std::vector<std::string>{"{ a set }\n"});
  std::string wet, members;
  for (const std::string& text : texts) {
    const std::string info =
        "WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 4\r\n\r\na: b\r\n\r\n";
    const std::string record =
        info + concat("WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\n",
                      "Content-Length: ", text.size(), "\r\n\r\n", text, "\r\n\r\n");
    wet += record;
    members += deflated(record);
  }
  CHECK(read(path_of(dir, "a.warc.wet", wet)) == texts);
  CHECK(read(path_of(dir, "a.warc.wet.gz", members)) == texts);
  CHECK(read(path_of(dir, "a.warc.wet.zst", zstandard(wet))) == texts);
  // The column "text" of parquet, without its nulls.
  const std::vector<std::string> rows = read("test/golden/parquet/pyarrow_zstd_v2.parquet");
  CHECK(rows.size() == 43);
  CHECK(rows[1].starts_with("document 1: naïve 日本"));
}

TEST_CASE("inputs that are no documents are refused with file and line") {
  TempDir dir;
  const auto read = [&](const std::string& name, const std::string& content) {
    const std::string path = path_of(dir, name, content);
    return error_of([&] {
      DocumentReader reader({Input(path)});
      for (DocumentPart part; reader.next(part);) {
      }
    });
  };
  const std::string lines = json_lines({"one", "two", "three"});
  CHECK(read("a.txt", "text with one \0 in it, and more than a thousand bytes" +
                          std::string(2000, 'x')) == "no error");
  CHECK(contains(read("a.txt", ""), "a.txt: found an empty file"));
  CHECK(contains(read("a.jsonl", ""), "a.jsonl: found an empty file"));
  CHECK(contains(read("a.jsonl", "\n\n"), "a.jsonl: found no documents"));
  CHECK(contains(read("a.txt", std::string("P\0Q\0R", 5)), "NUL bytes"));
  CHECK(contains(read("a.txt",
                      "\x7f"
                      "ELF"),
                 "found a program"));
  CHECK(contains(read("a.txt", "PK\x03\x04"), "found a zip archive"));
  CHECK(contains(read("a.warc", "WARC/1.0\r\n"), "found a WARC archive with truncated"));
  const auto record = [](const std::string& type, const std::string& block) {
    return concat("WARC/1.0\r\nWARC-Type: ", type, "\r\nContent-Type: text/plain\r\n",
                  "Content-Length: ", block.size(), "\r\n\r\n", block, "\r\n\r\n");
  };
  CHECK(contains(read("a.warc", record("metadata", "a: b")), "found a WARC archive without text"));
  CHECK(contains(read("a.warc", record("response", "HTTP/1.1 200 OK\r\n\r\n<html>")),
                 "a.warc: found a WARC archive of pages, expected text: run ./corpus clean or "
                 "./corpus extract first"));
  CHECK(contains(read("a.warc", record("conversion", "text") + "garbage"),
                 "found a WARC archive with bytes that are no WARC record"));
  CHECK(contains(read("a", "<!doctype html><p>"), "a: found a page of HTML, expected text: run"));
  CHECK(contains(read("a.parquet", "PAR1 and no footer"), "a.parquet: "));
  CHECK(contains(read("a.parquet.gz", deflated("PAR1 and no footer")), "inside gzip"));
  CHECK(contains(read("a.txt.gz", "plain"), "a.txt.gz: found other bytes, expected gzip data"));
  CHECK(contains(read("a.txt.zst", "plain"), "expected Zstandard data"));
  CHECK(contains(read("a.txt.gz", ""), "a.txt.gz: found an empty file"));
  const std::string zipped = deflated(random_text(16, 5000)),
                    zst = zstandard(random_text(16, 5000));
  for (const size_t kept : {zipped.size() - 1, zipped.size() / 2, size_t(12)}) {
    CHECK(contains(read("a.txt.gz", zipped.substr(0, kept)), "a.txt.gz: the gzip data ends too"));
  }
  for (const size_t kept : {zst.size() - 1, zst.size() / 2, size_t(12)}) {
    CHECK(contains(read("a.txt.zst", zst.substr(0, kept)), "a.txt.zst: the Zstandard data ends"));
  }
  std::string damaged = zipped;
  damaged[damaged.size() / 2] ^= 0x55;
  CHECK(contains(read("a.txt.gz", damaged), "a.txt.gz: damaged gzip data"));
  CHECK(contains(read("a.txt.gz", zipped + "garbage"), "a.txt.gz: damaged gzip data"));
  damaged = zst;
  damaged[damaged.size() / 2] ^= 0x55;
  CHECK(contains(read("a.txt.zst", damaged), "a.txt.zst: "));
  CHECK(contains(read("a.jsonl", lines + "{\"text\": \"x\"\n"), "a.jsonl:4: not JSON"));
  CHECK(
      contains(read("a.jsonl", lines + "[1]\n"), "a.jsonl:4: found an array, expected an object"));
  CHECK(contains(read("a.jsonl", lines + "\n{\"tex\": 1}\n"), "a.jsonl:5: \"text\" is missing"));
  CHECK(contains(read("a.jsonl", "{\"text\": 1}\n"), "a.jsonl:1: \"text\": found a number"));
  CHECK(contains(read("a.jsonl", "{\"text\": \"\xff\"}\n"), "a.jsonl:1: not JSON"));
}

// ---------------------------------------------------------------------------------------------
// Shards

TEST_CASE("documents become shards in which each begins with <|endoftext|>") {
  TempDir dir;
  const std::vector<std::string> texts = {"one two", "", "three\n", "vier"};
  const Tokenizer t = train_on("one two three", 280, "gpt2");
  t.save(dir / "tok");
  const DataInfo info = encode_corpus({.inputs = {path_of(dir, "d.jsonl", json_lines(texts))}}, t,
                                      dir / "tok", dir / "data" / "x");
  Ids expected;
  for (const std::string& text : texts) {
    if (text.empty()) continue;  // nothing to learn from
    expected.push_back(t.end_of_text());
    t.encode(text, expected);
  }
  CHECK(read_split(dir / "data" / "x", "train") == expected);
  CHECK(info.train.documents == 3);
  CHECK(info.train.bytes == 17);
  CHECK(info.train.tokens == int64_t(expected.size()));
  CHECK(info.val.documents == 0);
  const DataInfo read = read_data_info(dir / "data" / "x");
  CHECK(read.tokenizer == "../tok");
  CHECK(read.hash == t.hash());
  CHECK(read.vocab_size == t.vocab_size());
  CHECK(read.train.bytes == 17);
}

TEST_CASE("a long document has the same ids in chunks, batches and threads as in one piece") {
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    TempDir dir;
    // Many safe cuts, none of them far from corners that look beyond their piece; the text ends in
    // white space.
    const std::string text = random_text(17, 900000) + " \n \n  ";
    const Tokenizer t = train_on(text.substr(0, 100000), 600, pattern);
    Ids expected = {t.end_of_text()};
    t.encode(text, expected);
    const std::string input = path_of(dir, "t.txt", text);
    for (const int threads : {1, 3}) {
      encode_corpus({.inputs = {input}, .threads = threads}, t, dir / "tok", dir / "x");
      CHECK(read_split(dir / "x", "train") == expected);
    }
  }
}

TEST_CASE("a document longer than a batch has the same ids as in one piece") {
  TempDir dir;
  std::string text;
  for (uint64_t i = 0; text.size() < (17u << 20); i++) text += random_text(i, 300000);
  text.insert(31u << 19, std::string(1 << 20, 'a'));  // no safe cut about the batch's end
  const Tokenizer t = train_on(text.substr(0, 200000), 600, "gpt2");
  Ids expected = {t.end_of_text()};
  t.encode(text, expected);
  encode_corpus({.inputs = {path_of(dir, "t.txt.zst", zstandard(text))}, .threads = 2}, t,
                dir / "tok", dir / "x");
  CHECK((read_split(dir / "x", "train") == expected));
}

TEST_CASE("the validation part of one document is its tail, from a line's start") {
  TempDir dir;
  std::string text;
  for (int i = 0; i < 1000; i++) text += format("line number %d of a long document\n", i);
  const Tokenizer t = train_on(text, 400, "qwen2");
  const std::string plain = path_of(dir, "t.txt", text);
  const std::string zipped = path_of(dir, "t.txt.gz", deflated(text));
  const std::string json = path_of(dir, "t.jsonl", json_lines({text}));
  for (const std::string& input : {plain, zipped, json}) {
    const Corpus corpus{.inputs = {input}, .val_fraction = .1};
    const DataInfo info = encode_corpus(corpus, t, dir / "tok", dir / "x");
    const std::string head = t.decode(read_split(dir / "x", "train"));
    const std::string tail = t.decode(read_split(dir / "x", "val"));
    CHECK(head.substr(13) + tail.substr(13) == text);  // behind <|endoftext|>
    CHECK(head.back() == '\n');
    CHECK(info.train.bytes + info.val.bytes == int64_t(text.size()));
    // The cut moves to the next line: by 40 bytes at most.
    CHECK(info.val.bytes <= int64_t(text.size()) / 10);
    CHECK(info.val.bytes > int64_t(text.size()) / 10 - 40);
    // Training with the same fraction leaves out exactly that tail.
    CHECK(train_tokenizer(corpus, 400, "qwen2").hash() ==
          train_on(head.substr(13), 400, "qwen2").hash());
  }
  // Without lines the cut keeps characters whole.
  std::string characters;
  for (int i = 0; i < 5000; i++) characters += "日";
  const Corpus corpus{.inputs = {path_of(dir, "c.txt", characters)}, .val_fraction = .1};
  const DataInfo info = encode_corpus(corpus, t, dir / "tok", dir / "x");
  CHECK(info.val.bytes == 1500);
}

TEST_CASE("the validation part of many documents is chosen by their text") {
  TempDir dir;
  std::vector<std::string> texts;
  for (int i = 0; i < 3000; i++) texts.push_back(format("document %d", i));
  const Tokenizer t = train_on(texts[0], 280, "gpt2");
  const auto split = [&](const std::vector<std::string>& documents, double fraction) {
    const std::string input = path_of(dir, "d.jsonl", json_lines(documents));
    encode_corpus({.inputs = {input}, .val_fraction = fraction}, t, dir / "tok", dir / "x");
    std::set<std::string> val;
    std::string text = t.decode(read_split(dir / "x", "val"));
    for (size_t at = 0; at < text.size();) {
      const size_t begin = at + 13, end = std::min(text.size(), text.find("<|endoftext|>", begin));
      val.insert(text.substr(begin, end - begin));
      at = end;
    }
    return val;
  };
  const std::set<std::string> val = split(texts, .1);
  CHECK(val.size() > 240);  // 300 expected, standard deviation 16
  CHECK(val.size() < 360);
  std::vector<std::string> shuffled(texts.rbegin(), texts.rend());
  CHECK(split(shuffled, .1) == val);
  const std::set<std::string> more = split(texts, .2);  // a larger fraction holds the smaller one
  CHECK(std::includes(more.begin(), more.end(), val.begin(), val.end()));
  // Of a few, the nearest number; never none and never all.
  CHECK(split({texts.begin(), texts.begin() + 20}, .1).size() == 2);
  CHECK(split({texts.begin(), texts.begin() + 3}, .01).size() == 1);
  CHECK(split({texts.begin(), texts.begin() + 2}, .99).size() == 1);
  const std::string same = path_of(dir, "s.jsonl", json_lines({"a", "a"}));
  CHECK(contains(error_of([&] {
                   encode_corpus({.inputs = {same}, .val_fraction = .5}, t, dir / "t", dir / "x");
                 }),
                 "found 2 documents, expected at least two different ones"));
  // Whole files are documents too.
  const std::vector<std::string> files = {path_of(dir, "1.txt", "first"),
                                          path_of(dir, "2.txt", "second"),
                                          path_of(dir, "3.txt", "third")};
  const DataInfo info =
      encode_corpus({.inputs = files, .val_fraction = .3}, t, dir / "t", dir / "x");
  CHECK(info.train.documents == 2);
  CHECK(info.val.documents == 1);
}

TEST_CASE("an encoding that fails leaves an older one whole") {
  TempDir dir;
  const Tokenizer t = train_on("some text", 280, "gpt2");
  const std::string good = path_of(dir, "good.jsonl", json_lines({"some text", "more"}));
  const std::string bad = path_of(dir, "bad.jsonl", json_lines({"other"}) + "{\n");
  encode_corpus({.inputs = {good}}, t, dir / "tok", dir / "x");
  const Ids before = read_split(dir / "x", "train");
  CHECK(contains(error_of([&] { encode_corpus({.inputs = {bad}}, t, dir / "tok", dir / "x"); }),
                 "bad.jsonl:2: not JSON"));
  CHECK(read_split(dir / "x", "train") == before);
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) {
    files += contains(entry.path().string(), "partial");
  }
  CHECK(files == 0);
}

TEST_CASE("the real texts round-trip through the real vocabularies") {
  if (skip_without_data("text/tinyshakespeare.txt")) return;
  for (const char* name : {"r50k_base.tiktoken", "cl100k_base.tiktoken", "o200k_base.tiktoken"}) {
    const Tokenizer& t = real(name);
    for (const char* file : {"text/tinyshakespeare.txt", "languages/udhr.jsonl"}) {
      const std::string text = read_file(data_path(file));
      CHECK((t.decode(t.encode(text)) == text));
    }
  }
}

TEST_CASE("tinyshakespeare's last tenth is held out of training and encoding alike") {
  if (skip_without_data("text/tinyshakespeare.txt")) return;
  TempDir dir;
  const std::string path = data_path("text/tinyshakespeare.txt").string();
  const std::string text = read_file(path);
  const Corpus corpus{.inputs = {path}, .val_fraction = .1, .threads = 2};
  const Tokenizer t = train_tokenizer(corpus, 512, "cl100k");
  CHECK(t.vocab_size() == 512);
  const DataInfo info = encode_corpus(corpus, t, dir / "tok", dir / "x");
  CHECK(info.train.bytes + info.val.bytes == int64_t(text.size()));
  CHECK(info.val.bytes > 111300);
  CHECK(info.val.bytes <= 111539);
  CHECK(train_on(text.substr(0, size_t(info.train.bytes)), 512, "cl100k").hash() == t.hash());
}
