// The files of tokenizers: every kind in and out, equal ids, and what is refused.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"
#include "test/bpe_support.h"

using namespace cake;

namespace {

const Tokenizer& real(const std::string& name) {
  static std::map<std::string, Tokenizer> loaded;
  const auto it = loaded.find(name);
  if (it != loaded.end()) return it->second;
  return loaded.emplace(name, Tokenizer::load(data_path("tokenizers/" + name))).first->second;
}

std::string error_of_loading(const std::filesystem::path& path, const std::string& pattern = "") {
  const std::string error = error_of([&] { Tokenizer::load(path, pattern); });
  CHECK(!contains(error, "\n"));
  return error;
}

std::string base64(std::string_view bytes) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < 8 * bytes.size(); i += 6) {
    int digit = 0;
    for (size_t bit = i; bit < i + 6; bit++) {
      const bool one = bit < 8 * bytes.size() && (bytes[bit / 8] >> (7 - bit % 8) & 1);
      digit = 2 * digit + one;
    }
    text += digits[size_t(digit)];
  }
  while (text.size() % 4) text += '=';
  return text;
}

// A .tiktoken file of all bytes and then `tokens`.
std::string tiktoken_file(const std::vector<std::string>& tokens) {
  std::string text;
  for (int b = 0; b < 256; b++) text += base64(std::string(1, char(b))) + concat(" ", b, "\n");
  for (size_t i = 0; i < tokens.size(); i++) text += base64(tokens[i]) + concat(" ", 256 + i, "\n");
  return text;
}

// Byte pair encoding as tiktoken defines it: always the two neighbours whose concatenation is the
// token of the lowest rank, the leftmost first; a piece that is a token is that token.
Ids tiktoken_encode(const std::map<std::string, int>& ranks, const std::string& piece) {
  if (ranks.count(piece)) return {ranks.at(piece)};
  std::vector<std::string> parts;
  for (const char c : piece) parts.push_back(std::string(1, c));
  for (;;) {
    int best = -1;
    size_t where = 0;
    for (size_t i = 0; i + 1 < parts.size(); i++) {
      const auto it = ranks.find(parts[i] + parts[i + 1]);
      if (it != ranks.end() && (best < 0 || it->second < best)) best = it->second, where = i;
    }
    if (best < 0) break;
    parts[where] += parts[where + 1];
    parts.erase(parts.begin() + int64_t(where) + 1);
  }
  Ids ids;
  for (const std::string& part : parts) ids.push_back(ranks.at(part));
  return ids;
}

// The same tokenizer without the file that it was read from, so that saving it writes one.
Tokenizer without_file(const Tokenizer& tokenizer) {
  auto data = std::make_shared<TokenizerData>(tokenizer.data());
  data->json.clear();
  data->config.clear();
  return Tokenizer(data);
}

Tokenizer written_and_read(const Tokenizer& tokenizer) {
  TempDir dir;
  without_file(tokenizer).save(dir.path());
  return Tokenizer::load(dir.path());
}

// A tokenizer.json trained here, to be changed.
Json small_json(const std::string& pattern = "cl100k") {
  TempDir dir;
  train_on("ab ab abc the of and 12 12 don't", 290, pattern).save(dir.path());
  return read_json(dir / "tokenizer.json");
}

Tokenizer load_json(const Json& json) {
  TempDir dir;
  write_file(dir / "tokenizer.json", json.dump());
  return Tokenizer::load(dir.path());
}

}  // namespace

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
  json["post_processor"] = {{"type", "ByteLevel"}, {"trim_offsets", false}};
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
  CHECK(contains(with("/normalizer", {{"type", "Precompiled"}}), "SentencePiece"));
  CHECK(contains(with("/normalizer", {{"type", "Strip"}}), "type: found \"Strip\", expected NFC"));
  CHECK(contains(with("/post_processor", {{"type", "X"}}), "post_processor.type: found \"X\""));
  CHECK(contains(with("/post_processor", {{"type", "BertProcessing"}, {"cls", {"x"}}}),
                 "post_processor.cls: found [\"x\"]"));
  CHECK(contains(with("/post_processor",
                      {{"type", "BertProcessing"}, {"cls", {"x", 9999}}, {"sep", {"x", 1}}}),
                 "post_processor: found id 9999"));
  CHECK(contains(with("/decoder", {{"type", "Metaspace"}}), "decoder.type: found \"Metaspace\""));
  CHECK(contains(with("/pre_tokenizer", {{"type", "Whitespace"}}), "type: found \"Whitespace\""));
  CHECK(contains(with("/pre_tokenizer", {{"type", "Digits"}}), "expected a step ByteLevel"));
  CHECK(contains(with("/added_tokens/0/id", 1), "added_tokens: found id 1 for"));
  CHECK(contains(with("/added_tokens/0/content", "<think>"), "\"<think>\" twice"));
  CHECK(contains(with("/added_tokens/0/id", 1 << 25), "expected 0 to 16777216"));
  CHECK(contains(with("/pre_tokenizer", nullptr), "pre_tokenizer: found null"));
  CHECK(contains(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", "(a)\\1"),
                 "pre_tokenizer: regular expression (a)\\1"));
  CHECK(contains(with("/pre_tokenizer/pretokenizers/1/add_prefix_space", true),
                 "\"add_prefix_space\": false behind another step"));
  CHECK(contains(with("/model/vocab/a", 98), "found id 98 twice"));
  CHECK(contains(with("/model/vocab/a", -5), "model.vocab: found -5"));
  CHECK(contains(with("/model/vocab/a", "x"), "model.vocab: found \"x\", expected a token id"));
  CHECK(contains(with("/model/merges/0", "a"), "model.merges[0]: found \"a\""));
  CHECK(contains(with("/model/merges/0", "a q"), "model.merges[0]: found \"a q\""));
  CHECK(contains(with("/model/merges/0", {"a"}), "model.merges[0]: found [\"a\"]"));
  CHECK(contains(with("/model/merges", 3), "model.merges: found 3, expected an array"));
  CHECK(contains(with("/model/dropout", .1), "model.dropout: found 0.1"));
  const auto without = [&](const char* object, const char* key) {
    Json json = good;
    json[Json::json_pointer(object)].erase(key);
    const std::string path = path_of(dir, "tokenizer.json", json.dump());
    return error_of([&] { Tokenizer::load(path); });
  };
  CHECK(contains(without("", "model"), "tokenizer.json: model is missing"));
  CHECK(contains(without("/model", "merges"), "model.merges is missing"));
  CHECK(contains(without("/model/vocab", "b"), "model.merges[0]: found"));
  // A token that is made before its parts by one merge, and long after them by another.
  Json json = good;
  json["model"]["vocab"].update({{"xy", 600}, {"yz", 601}, {"xyz", 602}});
  json["model"]["merges"] = {"xy z", "x y", "y z", "x yz"};
  const std::string apart = path_of(dir, "tokenizer.json", json.dump());
  CHECK(contains(error_of([&] { Tokenizer::load(apart); }), "model.merges[3]"));
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
// tokenizer.json: what real files hold

TEST_CASE("every step of a tokenizer.json is read, written and read again as the same") {
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", false}};
  Json with_regex = byte_level, with_space = byte_level;
  with_regex["use_regex"] = true;
  with_space["use_regex"] = true, with_space["add_prefix_space"] = true;
  const auto split = [](const Json& pattern, const char* behavior, bool invert = false) {
    return Json{
        {"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
  };
  const auto sequence = [](const std::vector<Json>& steps) {
    return Json{{"type", "Sequence"}, {"pretokenizers", steps}};
  };
  const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
  const Json runs = {{"type", "Digits"}, {"individual_digits", false}};
  const Json punctuation = {{"type", "Punctuation"}, {"behavior", "Contiguous"}};
  const std::vector<Json> pre_tokenizers = {
      with_regex,
      with_space,
      byte_level,
      sequence({digits, with_regex}),
      sequence({runs, punctuation, with_regex}),
      sequence({split({{"Regex", "\\p{N}{1,3}"}}, "Isolated"),
                split({{"Regex", "[一-龥぀-ゟ゠-ヿ]+"}}, "Isolated"), byte_level}),
      sequence({split({{"Regex", "\\s+"}}, "MergedWithPrevious"), byte_level}),
      sequence({split({{"Regex", "[a-z]+|[^a-z]+"}}, "Removed", true), byte_level}),
      sequence({split({{"String", "an"}}, "MergedWithNext"), byte_level}),
      sequence({punctuation, with_regex, runs, split({{"Regex", "[0-9][0-9]"}}, "Isolated")})};
  const auto normalizers =
      std::vector<Json>{nullptr,
                        {{"type", "NFC"}},
                        {{"type", "NFKC"}},
                        {{"type", "Lowercase"}},
                        {{"type", "Sequence"},
                         {"normalizers",
                          {{{"type", "NFD"}},
                           {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "bb"}},
                           {{"type", "Prepend"}, {"prepend", "x"}},
                           {{"type", "NFKD"}}}}}};
  std::set<uint64_t> hashes;
  for (size_t i = 0; i < pre_tokenizers.size(); i++) {
    CAPTURE(i);
    Json json = small_json();
    json["pre_tokenizer"] = pre_tokenizers[i];
    json["normalizer"] = normalizers[i % normalizers.size()];
    const Tokenizer t = load_json(json), again = written_and_read(t);
    CHECK(hashes.insert(t.hash()).second);
    CHECK(again.hash() == t.hash());
    TempDir dir;
    without_file(t).save(dir.path());
    const Json written = read_json(dir / "tokenizer.json");
    CHECK(written["pre_tokenizer"] == pre_tokenizers[i]);
    CHECK(written["normalizer"] == json["normalizer"]);
  }
}

TEST_CASE("added tokens, post-processor and decoder are read, written and read again") {
  Json json = small_json();
  json["added_tokens"].push_back({{"id", 290},
                                  {"content", "<word>"},
                                  {"special", false},
                                  {"lstrip", true},
                                  {"rstrip", true},
                                  {"single_word", true},
                                  {"normalized", true}});
  json["post_processor"] = {
      {"type", "Sequence"},
      {"processors",
       {{{"type", "ByteLevel"}},
        {{"type", "TemplateProcessing"},
         {"single",
          {{{"SpecialToken", {{"id", "<|im_start|>"}, {"type_id", 0}}}},
           {{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
           {{"SpecialToken", {{"id", "<|im_end|>"}, {"type_id", 0}}}}}},
         {"special_tokens",
          {{"<|im_start|>", {{"id", "<|im_start|>"}, {"ids", {274}}, {"tokens", {"x"}}}},
           {"<|im_end|>", {{"id", "<|im_end|>"}, {"ids", {275}}, {"tokens", {"x"}}}}}}}}}};
  json["decoder"] = {{"type", "Sequence"}, {"decoders", {{{"type", "ByteLevel"}}}}};
  const Tokenizer t = load_json(json);
  for (const Tokenizer& each : {t, written_and_read(t)}) {
    const AddedToken& word = each.data().added.back();
    CHECK(word.text == "<word>");
    CHECK(word.id == 290);
    CHECK(!word.special);
    CHECK(word.lstrip);
    CHECK(word.rstrip);
    CHECK(word.single_word);
    CHECK(word.normalized);
    CHECK(each.data().added[0].special);
    CHECK(!each.data().added[0].normalized);
    CHECK(each.data().text_begin == Ids{274});
    CHECK(each.data().text_end == Ids{275});
    CHECK(each.hash() == t.hash());
  }
  json["post_processor"] = {
      {"type", "RobertaProcessing"}, {"sep", {"</s>", 276}}, {"cls", {"<s>", 277}}};
  const Tokenizer roberta = load_json(json);
  CHECK(roberta.data().text_begin == Ids{277});
  CHECK(roberta.data().text_end == Ids{276});
}

TEST_CASE("a byte without a token is an error only in a text that holds it") {
  Json json = small_json("gpt2");
  json["model"]["vocab"].erase("ÿ");  // bytes 255 and 0
  json["model"]["vocab"].erase("Ā");
  const Tokenizer t = load_json(json);
  CHECK(t.decode(t.encode("the ab")) == "the ab");
  CHECK(contains(error_of([&] { t.encode(std::string("a\0b", 3)); }), "byte 0x00"));
  CHECK(contains(error_of([&] { t.encode("a\xff"); }), "byte 0xff"));
  CHECK(written_and_read(t).hash() == t.hash());
  json["model"]["unk_token"] = "<|spare_0|>";
  const Tokenizer unknown = load_json(json);
  const int id = unknown.special("<|spare_0|>");
  CHECK(unknown.encode("a\xff") == Ids{unknown.encode("a")[0], id});
  CHECK(unknown.token_bytes(id) == "<|spare_0|>");
  CHECK(written_and_read(unknown).encode("\xff") == Ids{id});
}

TEST_CASE("entries that no text becomes keep their ids and bytes") {
  Json json = small_json("gpt2");
  json["model"]["vocab"]["日本"] = 300;  // not spelled by ByteLevel's characters
  json["model"]["vocab"]["zzz"] = 301;   // no merge makes it
  const Tokenizer t = load_json(json);
  for (const Tokenizer& each : {t, written_and_read(t)}) {
    CHECK(each.vocab_size() == 302);
    CHECK(each.decode(Ids{300}) == "日本");
    CHECK(each.decode(Ids{301}) == "zzz");
    CHECK(each.encode("zzz") == Ids{each.encode("z")[0], each.encode("z")[0], each.encode("z")[0]});
    CHECK(each.encode("日本").size() == 6);
  }
  json["model"]["ignore_merges"] = true;
  const Tokenizer whole = load_json(json);
  for (const Tokenizer& each : {whole, written_and_read(whole)}) {
    CHECK(each.encode("zzz") == Ids{301});
    CHECK(each.encode("日本").size() == 6);
  }
}

TEST_CASE("the document separator is the tokenizer's own") {
  const auto separator = [](const std::vector<std::string>& names, const Json& config,
                            bool begins = false) {
    Json json = small_json();
    json["added_tokens"] = Json::array();
    json["model"]["vocab"].erase("<|endoftext|>");
    for (size_t i = 0; i < names.size(); i++) {
      json["added_tokens"].push_back({{"id", 400 + i}, {"content", names[i]}, {"special", true}});
    }
    if (begins) {
      json["post_processor"] = {
          {"type", "BertProcessing"}, {"sep", {"x", 401}}, {"cls", {"x", 401}}};
    }
    TempDir dir;
    write_file(dir / "tokenizer.json", json.dump());
    write_file(dir / "tokenizer_config.json", config.dump());
    const Tokenizer t = Tokenizer::load(dir.path());
    return t.data().separator;
  };
  CHECK(separator({"<s>", "<|endoftext|>"}, {{"bos_token", "<s>"}}) == 401);
  CHECK(separator({"<s>", "<x>"}, {{"bos_token", "<s>"}}, true) == 401);
  CHECK(separator({"<s>", "<x>"}, {{"bos_token", "<x>"}}) == 401);
  CHECK(separator({"<s>", "<x>"}, {{"bos_token", {{"content", "<x>"}}}}) == 401);
  CHECK(separator({"<s>", "<x>"}, {{"bos_token", nullptr}, {"eos_token", "<x>"}}) == 401);
  CHECK(separator({"<x>", "<｜begin▁of▁sentence｜>"}, Json::object()) == 401);
  CHECK(separator({"<x>", "<y>"}, Json::object()) == -1);
}

// ---------------------------------------------------------------------------------------------
// .tiktoken

TEST_CASE("a .tiktoken file is encoded as tiktoken does it, even where merges are out of order") {
  // "abcd" has a lower rank than "abc", of which a merge makes it; "xyzw" no merge makes.
  const std::vector<std::string> tokens = {"ab", "abcd", "abc", "dd", "cdd", "xyzw", "da", "dab"};
  std::map<std::string, int> ranks;
  for (int b = 0; b < 256; b++) ranks[std::string(1, char(b))] = b;
  for (size_t i = 0; i < tokens.size(); i++) ranks[tokens[i]] = 256 + int(i);
  TempDir dir;
  const std::string path = path_of(dir, "x.tiktoken", tiktoken_file(tokens));
  const Tokenizer t = Tokenizer::load(path, "\\p{L}+|[^\\p{L}]+");
  const Tokenizer from_json = written_and_read(t);
  CHECK(t.encode("abcd") == Ids{257});
  CHECK(t.encode("xyzw") == Ids{261});
  Rng rng{3};
  for (int i = 0; i < 20000; i++) {
    std::string text;
    for (uint64_t n = 1 + rng.below(14); n > 0; n--) text += "abcdabcdxyzw"[rng.below(12)];
    const Ids expected = tiktoken_encode(ranks, text);
    REQUIRE(t.encode(text) == expected);
    REQUIRE(from_json.encode(text) == expected);
  }
  const std::string long_text(50000, 'd');
  CHECK((t.decode(t.encode("abc" + long_text)) == "abc" + long_text));
}

TEST_CASE("vocabularies are known by the number of their ranks") {
  // Bytes, all pairs of them, and three bytes in rising order: each is a merge of two tokens.
  std::vector<std::string> tokens;
  for (int a = 0; a < 256; a++) {
    for (int b = 0; b < 256; b++) tokens.push_back({char(a), char(b)});
  }
  for (int a = 0; a < 256; a++) {
    for (int b = a + 1; b < 256; b++) {
      for (int c = b + 1; c < 256 && tokens.size() < 248044; c++) {
        tokens.push_back({char(a), char(b), char(c)});
      }
    }
  }
  const auto load = [&](size_t ranks) {
    TempDir dir;
    const std::vector<std::string> some(tokens.begin(), tokens.begin() + int64_t(ranks) - 256);
    return Tokenizer::load(path_of(dir, "tokenizer.model", tiktoken_file(some)));
  };
  const Tokenizer llama = load(128000), qwen = load(151643), qwen35 = load(248044);
  CHECK(llama.vocab_size() == 128256);
  CHECK(llama.special("<|begin_of_text|>") == 128000);
  CHECK(llama.special("<|reserved_special_token_0|>") == 128002);
  CHECK(llama.special("<|start_header_id|>") == 128006);
  CHECK(llama.special("<|eot_id|>") == 128009);
  CHECK(llama.special("<|reserved_special_token_245|>") == 128255);
  CHECK(llama.document_separator() == 128000);
  CHECK(llama.data().pre_tokenizer.pattern() == Pattern::cl100k);
  CHECK(qwen.vocab_size() == 151851);
  CHECK(qwen.special("<|im_end|>") == 151645);
  CHECK(qwen.special("<|extra_204|>") == 151850);
  CHECK(qwen.document_separator() == 151643);
  CHECK(qwen.data().pre_tokenizer.pattern() == Pattern::qwen2);
  CHECK(qwen.data().normalizer.steps.size() == 1);
  CHECK(qwen35.special("<|im_end|>") == 248046);
  CHECK(qwen35.is_special(248057));
  CHECK(qwen35.special("</think>") == 248069);
  CHECK(qwen35.is_special(248069) == false);
  CHECK(qwen35.pieces("a\u0301b 12").size() == 4);  // a mark is part of a word; single digits
  // What it cannot know, the configuration beside it says.
  TempDir dir;
  const std::string path = path_of(dir, "tokenizer.model", tiktoken_file({"ab", "bc"}));
  CHECK(contains(error_of_loading(path), "found 258 ranks, expected 50256 (r50k)"));
  CHECK(contains(error_of_loading(path), "--pattern"));
  write_file(dir / "tokenizer_config.json",
             R"({"added_tokens_decoder": {"300": {"content": "<x>", "special": true}},
                 "eos_token": "<x>"})");
  const Tokenizer other = Tokenizer::load(dir.path(), "qwen2");
  CHECK(other.vocab_size() == 301);
  CHECK(other.document_separator() == 300);
  CHECK(contains(error_of_loading(path, "gpt3"), "--pattern: found gpt3, expected gpt2"));
  CHECK(contains(error_of_loading(path, "(a"), "tokenizer.model: "));
}

TEST_CASE("Whisper's file has an empty token, and its special tokens begin behind it") {
  std::vector<std::string> tokens;
  for (int i = 0; i < 50000; i++) tokens.push_back({char(i / 256), char(i % 256)});
  TempDir dir;
  const std::string text = tiktoken_file(tokens) + "= 50256\n";
  const Tokenizer t = Tokenizer::load(path_of(dir, "multilingual.tiktoken", text));
  CHECK(t.vocab_size() == 51865);
  CHECK(t.end_of_text() == 50257);
  CHECK(t.special("<|en|>") == 50259);
  CHECK(t.special("<|su|>") == 50357);
  CHECK(t.special("<|translate|>") == 50358);
  CHECK(t.special("<|0.00|>") == 50364);
  CHECK(t.special("<|30.00|>") == 51864);
}

TEST_CASE("vocabularies go from .tiktoken to tokenizer.json and back unchanged") {
  if (skip_without_data("tokenizers/cl100k_base.tiktoken")) return;
  TempDir dir;
  for (const char* name : {"r50k_base.tiktoken", "cl100k_base.tiktoken"}) {
    const Tokenizer& t = real(name);
    convert_tokenizer(t, dir / "t.json");
    const Tokenizer json = Tokenizer::load(dir / "t.json");
    CHECK(json.hash() == t.hash());
    convert_tokenizer(json, dir / "t.tiktoken");
    CHECK((read_file(dir / "t.tiktoken") == read_file(data_path(concat("tokenizers/", name)))));
    convert_tokenizer(json, dir / "folder");
    CHECK(read_file(dir / "folder" / "tokenizer.json") == read_file(dir / "t.json"));
  }
}

TEST_CASE("the hashes that shards hold do not change") {
  CHECK(train_on("some text and some more text of all kinds\n", 290, "cl100k").hash() ==
        0x78409bc5f8a82451);
  if (skip_without_data("tokenizers/o200k_base.tiktoken")) return;
  CHECK(real("r50k_base.tiktoken").hash() == 0x5204574ccb20c919);
  CHECK(real("cl100k_base.tiktoken").hash() == 0x1bef9718f158b4a9);
  CHECK(real("o200k_base.tiktoken").hash() == 0xf64b741f1fb24b88);
}

TEST_CASE("what a .tiktoken file cannot hold is refused when it is written") {
  const auto refused = [](const Json& json) {
    TempDir dir;
    const Tokenizer t = load_json(json);
    const std::string error = error_of([&] { convert_tokenizer(t, dir / "t.tiktoken"); });
    CHECK(std::filesystem::exists(dir / "t.tiktoken") == (error == "no error"));
    return error;
  };
  Json json = small_json();
  CHECK(refused(json) == "no error");
  json["normalizer"] = {{"type", "NFC"}};
  CHECK(contains(refused(json), "a normalizer"));
  json = small_json();
  json["model"]["vocab"].erase("Ā");
  CHECK(contains(refused(json), "no token for byte 0"));
  json = small_json();
  json["model"]["vocab"]["zzz"] = 300;
  CHECK(contains(refused(json), "no merge makes"));
  json = small_json();
  for (auto& [key, id] : json["model"]["vocab"].items()) {
    if (id == 256 || id == 257) id = 256 + 257 - id.get<int>();
  }
  CHECK(contains(refused(json), "ids in another order"));
  json = small_json();
  json["pre_tokenizer"]["pretokenizers"].insert(
      json["pre_tokenizer"]["pretokenizers"].begin(),
      Json{{"type", "Digits"}, {"individual_digits", true}});
  CHECK(contains(refused(json), "several steps"));
}

// ---------------------------------------------------------------------------------------------
// tekken.json, vocab.json

TEST_CASE("tekken.json puts its special tokens before its ranks") {
  Json json = {{"config",
                {{"pattern", "\\p{L}+|[^\\p{L}]+"},
                 {"num_vocab_tokens", 259},
                 {"default_vocab_size", 268},
                 {"default_num_special_tokens", 10},
                 {"version", "v11"}}},
               {"vocab", Json::array()},
               {"special_tokens",
                {{{"rank", 0}, {"token_str", "<unk>"}, {"is_control", true}},
                 {{"rank", 1}, {"token_str", "<s>"}, {"is_control", true}}}}};
  for (int i = 0; i < 259; i++) {
    const std::string bytes = i < 256    ? std::string(1, char(i))
                              : i == 256 ? "ab"
                              : i == 257 ? "abc"
                                         : "no";
    json["vocab"].push_back({{"rank", i}, {"token_bytes", base64(bytes)}, {"token_str", nullptr}});
  }
  TempDir dir;
  const Tokenizer t = Tokenizer::load(path_of(dir, "tekken.json", json.dump()));
  CHECK(t.vocab_size() == 268);
  CHECK(t.encode("abc no") == Ids{267, 42, 120, 121});  // the last token is not in the vocabulary
  CHECK(t.special("<s>") == 1);
  CHECK(t.special("<SPECIAL_9>") == 9);
  CHECK(t.document_separator() == 1);
  CHECK(Tokenizer::load(dir.path()).hash() == t.hash());
  CHECK(written_and_read(t).hash() == t.hash());
  CHECK(contains(error_of_loading(dir / "tekken.json", "gpt2"), "says its own"));
  json["vocab"][7]["rank"] = 8;
  CHECK(contains(error_of_loading(path_of(dir, "tekken.json", json.dump())), "expected rank 7"));
  json["vocab"][7]["rank"] = 7;
  json["config"]["default_vocab_size"] = 300;
  CHECK(contains(error_of_loading(path_of(dir, "tekken.json", json.dump())), "290 tokens"));
}

TEST_CASE("vocab.json with merges.txt gives the ids of tokenizer.json") {
  TempDir dir;
  const Tokenizer t = train_on(random_text(40, 20000), 600, "gpt2");
  t.save(dir / "whole");
  const Json json = read_json(dir / "whole" / "tokenizer.json");
  write_file(dir / "vocab.json", json["model"]["vocab"].dump());
  std::string merges = "#version: 0.2\n";
  for (const Json& merge : json["model"]["merges"]) merges += merge.get<std::string>() + "\n";
  write_file(dir / "merges.txt", merges);
  for (const auto& path : {dir.path(), dir / "vocab.json", dir / "merges.txt"}) {
    const Tokenizer read = Tokenizer::load(path);
    CHECK(read.encode(random_text(41, 5000)) == t.encode(random_text(41, 5000)));
    CHECK(read.end_of_text() == t.end_of_text());
  }
  write_file(
      dir / "special_tokens_map.json",
      R"({"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<think>"]})");
  write_file(dir / "added_tokens.json", R"({"<|new|>": 700})");
  write_file(dir / "tokenizer_config.json", R"({"tokenizer_class": "Qwen2Tokenizer"})");
  const Tokenizer qwen = Tokenizer::load(dir.path());
  CHECK(qwen.data().pre_tokenizer.pattern() == Pattern::qwen2);
  CHECK(qwen.special("<|im_end|>") == t.special("<|im_end|>"));
  CHECK(qwen.special("<think>") == t.special("<think>"));
  CHECK(qwen.special("<|new|>") == 700);
  CHECK(Tokenizer::load(dir.path(), "cl100k").data().pre_tokenizer.pattern() == Pattern::cl100k);
  std::filesystem::remove(dir / "vocab.json");
  CHECK(contains(error_of_loading(dir / "merges.txt"), "expected vocab.json beside them"));
}

TEST_CASE("files are told apart by their content") {
  TempDir dir;
  CHECK(contains(error_of_loading(path_of(dir, "tokenizer.model", "\n\x0e\n\x05<unk>\x15")),
                 "found a SentencePiece model"));
  CHECK(contains(error_of_loading(path_of(dir, "a.model", "IQ== 0\nIg== 1\n")), "found 2 ranks"));
  const std::string json = small_json().dump();
  CHECK(Tokenizer::load(path_of(dir, "no_extension", json)).vocab_size() == 289);
  CHECK(contains(error_of_loading(path_of(dir, "b.json", "{\"a\": 1}")), "model is missing"));
}
