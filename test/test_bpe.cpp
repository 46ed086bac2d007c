// The tokenizer: scanner, encoder, trainer, file formats, documents and shards.
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/documents.h"
#include "cake/json.h"
#include "cake/shards.h"
#include "cake/tokenizer.h"
#include "cake/unicode.h"
#include "test/bpe_support.h"

using namespace cake;

namespace {

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

// ---------------------------------------------------------------------------------------------
// Encoding

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

// ---------------------------------------------------------------------------------------------
// Documents

TEST_CASE("documents are the same from every container") {
  TempDir dir;
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 100; i++) texts.push_back(random_text(300 + i, 2000));
  const std::string lines = json_lines(texts);
  const auto read = [](const std::string& path) {
    std::vector<std::string> all;
    DocumentReader reader({Input(path)}, {}, 5000);  // small parts
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
  const std::string plain = "a text:\n" + lines;
  CHECK(read(path_of(dir, "e.txt", plain)) == std::vector<std::string>{plain});
  CHECK(read(path_of(dir, "e.txt.gz", deflated(plain))) == std::vector<std::string>{plain});
  CHECK(read(path_of(dir, "e.txt.zst", zstandard(plain))) == std::vector<std::string>{plain});
  CHECK(read(path_of(dir, "f.txt", std::string(5000, 'x'))) ==
        std::vector<std::string>{std::string(5000, 'x')});  // exactly one part
  // Told by the first line, whatever the name says.
  CHECK(read(path_of(dir, "g.txt", lines)) == texts);
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
  CHECK(read("a.jsonl", "{\"text\": \"\xff\"}\n") == "no error");
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

TEST_CASE("a document longer than a stretch has the same ids as in one piece") {
  TempDir dir;
  std::string text;
  for (uint64_t i = 0; text.size() < (3u << 20); i++) text += random_text(i, 300000);
  text.insert(1u << 20, std::string(1 << 20, 'a'));  // no safe cut in several stretches
  const Tokenizer t = train_on(text.substr(0, 200000), 600, "gpt2");
  Ids expected = {t.end_of_text()};
  t.encode(text, expected);
  encode_corpus({.inputs = {path_of(dir, "t.txt.zst", zstandard(text))}, .threads = 2}, t,
                dir / "tok", dir / "x");
  CHECK((read_split(dir / "x", "train") == expected));
}

// One with each pattern that has a scanner, one with a compiled expression, one with steps that cut
// the pieces of one another, one with a normalizer, and one without <|endoftext|>.
const std::vector<std::pair<std::string, Tokenizer>>& all_kinds() {
  static const std::vector<std::pair<std::string, Tokenizer>> kinds = [] {
    std::vector<std::pair<std::string, Tokenizer>> all;
    const std::string text = random_text(18, 20000);
    for (const char* pattern : kAllPatterns) all.push_back({pattern, train_on(text, 500, pattern)});
    all.push_back({"regex", train_on(text, 500, R"( ?\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}\n]+|\n+)")});
    TempDir dir;
    const auto change = [&](const char* name, const std::function<void(Json&)>& edit) {
      train_on(text, 500, "gpt2").save(dir / name);
      Json json = read_json(dir / name / "tokenizer.json");
      edit(json);
      write_file(dir / name / "tokenizer.json", json.dump());
      return Tokenizer::load(dir / name);
    };
    const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
    all.push_back(
        {"steps", change("steps", [&](Json& json) {
           const Json byte_level = json["pre_tokenizer"];
           json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {digits, byte_level}}};
         })});
    all.push_back({"nfc", change("nfc", [](Json& json) {
                     json["normalizer"] = {{"type", "NFC"}};
                   })});
    all.push_back({"begin_of_text", change("begin_of_text", [](Json& json) {
                     Json& vocab = json["model"]["vocab"];
                     vocab["<|begin_of_text|>"] = vocab["<|endoftext|>"];
                     vocab.erase("<|endoftext|>");
                     json["added_tokens"][0]["content"] = "<|begin_of_text|>";
                   })});
    return all;
  }();
  return kinds;
}

TEST_CASE("stretches of any size and any number of threads give the same shards") {
  TempDir dir;
  for (const auto& kind : all_kinds()) {
    CAPTURE(kind.first);
    const Tokenizer& t = kind.second;
    std::vector<std::string> texts;
    for (uint64_t i = 0; i < 30; i++) texts.push_back(random_text(500 + i, int(1 + 13 * i)));
    Ids expected;
    for (const std::string& text : texts) {
      expected.push_back(t.document_separator());
      t.encode(text, expected);
    }
    // A long text in a file of its own, then short ones.
    const std::string text = random_text(530, 3000) + std::string(300, 'x');
    expected.push_back(t.document_separator());
    t.encode(text, expected);
    const std::vector<std::string> inputs = {path_of(dir, "d.jsonl", json_lines(texts)),
                                             path_of(dir, "d.txt", text)};
    std::set<std::string> files;
    for (const size_t stretch_bytes : {1, 2, 5, 64, 1000, 1 << 20}) {
      for (const int threads : {1, 4}) {
        const DataInfo info =
            encode_corpus({.inputs = inputs, .threads = threads, .stretch_bytes = stretch_bytes}, t,
                          dir / "tok", dir / "x");
        CHECK(info.train.documents == 31);
        CHECK((read_split(dir / "x", "train") == expected));
        files.insert(read_file(shard_path(dir / "x", "train", 0)));
      }
    }
    CHECK(files.size() == 1);
  }
}

TEST_CASE("a text cut at any place that is safe has the same ids in its two parts") {
  for (const auto& kind : all_kinds()) {
    CAPTURE(kind.first);
    const Tokenizer& t = kind.second;
    const std::string text = random_text(19, 4000);
    const Ids whole = t.encode(text);
    TextEncoder encoder(t.data(), 1 << 20);
    int cuts = 0, wrong = 0;
    for (size_t i = 1; i < text.size(); i++) {
      if (!is_safe_cut(t.data(), text, i)) continue;
      Ids ids;
      encoder.encode(text, i, true, false, ids);
      const std::string_view rest = std::string_view(text).substr(i);
      encoder.encode(rest, rest.size(), false, false, ids);
      cuts++;
      wrong += ids != whole;
    }
    CHECK(cuts > 20);
    CHECK(wrong == 0);
  }
}

TEST_CASE("a tokenizer without <|endoftext|> encodes a corpus with the separator that it has") {
  TempDir dir;
  const Tokenizer& t = all_kinds().back().second;
  CHECK(t.special("<|endoftext|>") == -1);
  encode_corpus({.inputs = {path_of(dir, "d.jsonl", json_lines({"one", "two"}))}}, t, dir / "tok",
                dir / "x");
  Ids expected;
  for (const char* text : {"one", "two"}) {
    expected.push_back(t.special("<|begin_of_text|>"));
    t.encode(text, expected);
  }
  CHECK(read_split(dir / "x", "train") == expected);
}

TEST_CASE("names of special tokens in a corpus are text unless asked for") {
  TempDir dir;
  const std::string text = "one <|im_start|>two<|endoftext|>";
  const Tokenizer t = train_on(text, 300, "cl100k");
  const std::string input = path_of(dir, "t.txt", text);
  for (const bool specials : {false, true}) {
    encode_corpus({.inputs = {input}, .specials = specials}, t, dir / "tok", dir / "x");
    Ids expected = {t.document_separator()};
    t.encode(text, expected, specials);
    CHECK(read_split(dir / "x", "train") == expected);
  }
}

TEST_CASE("the size of the cache changes no id") {
  TempDir dir;
  const std::string text = random_text(21, 200000);
  const Tokenizer t = train_on(text.substr(0, 50000), 900, "o200k");
  const std::string input = path_of(dir, "t.txt", text);
  Ids expected = {t.document_separator()};
  t.encode(text, expected);
  for (const size_t bytes : {size_t(0), size_t(1000), size_t(1) << 20, size_t(64) << 20}) {
    encode_corpus({.inputs = {input}, .cache_bytes = bytes}, t, dir / "tok", dir / "x");
    CHECK((read_split(dir / "x", "train") == expected));
  }
}

TEST_CASE("lines of JSON that threads parse keep their numbers in errors") {
  TempDir dir;
  const Tokenizer t = train_on("some text", 280, "gpt2");
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 400; i++) texts.push_back(random_text(700 + i, int(i % 40)));
  const auto encode = [&](const std::string& lines, int threads) {
    const std::string input = path_of(dir, "d.jsonl", lines);
    return error_of([&] {
      encode_corpus({.inputs = {input}, .threads = threads, .stretch_bytes = 300}, t, dir / "tok",
                    dir / "x");
    });
  };
  for (const int threads : {1, 4}) {
    // A byte order mark, blank lines, \r\n and no line break at the end.
    std::string lines = "\xef\xbb\xbf" + json_lines(texts) + "\n \r\n" + json_lines({"end"});
    lines.pop_back();
    CHECK(encode(lines, threads) == "no error");
    Ids expected;
    for (const std::string& text : texts) {
      if (text.empty()) continue;
      expected.push_back(t.end_of_text());
      t.encode(text, expected);
    }
    expected.push_back(t.end_of_text());
    t.encode("end", expected);
    CHECK((read_split(dir / "x", "train") == expected));
    CHECK(contains(encode(json_lines(texts) + "{\n", threads), "d.jsonl:401: not JSON"));
    CHECK(contains(encode(json_lines(texts) + "\n\n[1]\n" + json_lines(texts), threads),
                   "d.jsonl:403: found an array, expected an object"));
    CHECK(contains(encode(json_lines(texts) + "{\"tex\": 1}\n{\n", threads),
                   "d.jsonl:401: \"text\" is missing"));
    CHECK(contains(encode("\n \n", threads), "d.jsonl: found no documents, expected JSON lines"));
  }
}

TEST_CASE("an encoding that is asked to stop leaves nothing") {
  TempDir dir;
  const Tokenizer t = train_on("some text", 280, "gpt2");
  const std::string input = path_of(dir, "t.txt", random_text(22, 20000));
  stop_signal = SIGINT;
  for (const int threads : {1, 3}) {
    bool stopped = false;
    try {
      encode_corpus({.inputs = {input}, .threads = threads}, t, dir / "tok", dir / "x");
    } catch (const Interrupted&) {
      stopped = true;
    }
    CHECK(stopped);
  }
  stop_signal = 0;
  CHECK(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
}

// ---------------------------------------------------------------------------------------------
// Decoding

TEST_CASE("./bpe decode gives back the text of a shard, to a file and to the standard output") {
  TempDir dir;
  // Tokens of more than 16 bytes, and ids of two and of four bytes.
  std::string text = random_text(23, 100000);
  for (int i = 0; i < 300; i++) text += "internationalization of counterrevolutionaries ";
  const Tokenizer small = train_on(text, 700, "cl100k");
  small.save(dir / "small");
  Json json = read_json(dir / "small" / "tokenizer.json");
  json["added_tokens"].push_back({{"id", 70000},
                                  {"content", "<|far|>"},
                                  {"single_word", false},
                                  {"lstrip", false},
                                  {"rstrip", false},
                                  {"normalized", false},
                                  {"special", true}});
  std::filesystem::create_directory(dir / "large");
  write_file(dir / "large" / "tokenizer.json", json.dump());
  const std::string input = path_of(dir, "t.txt", text);
  for (const char* name : {"small", "large"}) {
    CAPTURE(name);
    const std::string tokenizer = (dir / name).string();
    encode_corpus({.inputs = {input}}, Tokenizer::load(tokenizer), tokenizer, dir / "x");
    const std::string shard = shard_path(dir / "x", "train", 0).string();
    const std::string out = (dir / "out.txt").string();
    for (const char* threads : {"1", "3"}) {
      const std::string command =
          concat("./bpe decode ", tokenizer, " ", shard, " --threads ", threads);
      CHECK(shell(command + " -o " + out).status == 0);
      CHECK((read_file(out) == "<|endoftext|>" + text));
      CHECK(shell(command + " > " + out).status == 0);
      CHECK((read_file(out) == "<|endoftext|>" + text));
    }
  }
  CHECK(shell("./bpe decode " + (dir / "small").string() + " 97 98 99").text == "abc");
  // The shard of the larger vocabulary.
  const Output wrong = shell(concat("./bpe decode ", (dir / "small").string(), " ",
                                    shard_path(dir / "x", "train", 0).string()));
  CHECK(wrong.status == 0);  // it holds no id that the smaller one lacks
  ShardWriter writer(dir / "y", "train", 71000, 1);
  writer.append(Ids{97, 98, 70500});
  writer.finish();
  const Output o =
      shell(concat("./bpe decode ", (dir / "small").string(), " ",
                   shard_path(dir / "y", "train", 0).string(), " -o ", (dir / "none").string()));
  CHECK(o.status == 1);
  CHECK(contains(o.text, "position 2: found token 70500, expected an id of the tokenizer"));
  CHECK(!std::filesystem::exists(dir / "none"));
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
