// What the readers and writers of tokenizer files share: bpe_files.cpp (which file is what,
// .tiktoken, tekken.json, merges.txt, vocab.bpe), bpe_json.cpp (tokenizer.json) and bpe_gguf.cpp
// (.gguf).
#pragma once

#include <simdjson.h>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"

namespace cake::tokenizer_files {

// Hugging Face and GPT-2 spell each byte as a printable character: most of Latin-1 as itself, the
// other 68 bytes, in order, as U+0100 and the characters behind it.
std::string spell(std::string_view bytes);
// Appends the bytes of a spelling; false when a character of it spells none.
bool unspell(std::string_view text, std::string& bytes);

inline std::string json_string(std::string_view text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string read_whole(const std::filesystem::path& path);  // with room behind it for simdjson

// The id of the vocabulary entry with these bytes, -1 when there is none. Good while a file is
// read: complete() keeps the entries only where whole pieces become them.
inline int find_entry(const TokenizerData& data, std::string_view bytes) {
  const int id = data.whole_pieces.find(piece_hash(bytes));
  return id >= 0 && data.token(id) == bytes ? id : -1;
}

// Fills a vocabulary of spellings and then its merges: tokenizer.json, vocab.json and merges.txt.
class VocabularyBuilder {
 public:
  explicit VocabularyBuilder(TokenizerData& data) : data_(data) {}

  // `where`: for errors. Entries that are no spellings are kept, and no text becomes them.
  void add_entry(std::string_view key, int id, const std::string& where);
  void end_entries();  // after the last of them, before the first merge

  // The next merge of the list. False when one of the two or their concatenation is no entry.
  bool add_merge(std::string_view left, std::string_view right);
  // After the last merge. Returns the number of a merge that cannot be represented, or -1.
  int end_merges();

 private:
  struct Merge {
    int number, left, right, joined;  // ids
  };
  int add_in_any_order();

  TokenizerData& data_;
  std::vector<bool> seen_;     // ids
  std::vector<int> token_of_;  // by id: of `merges`
  std::vector<Merge> merges_;  // the whole list
  std::vector<Merge> early_;   // those that came before the merge of one of their parts
  std::string bytes_;          // scratch
};

using JsonElement = simdjson::dom::element;

// Members of a JSON file, with errors that name the file and the path of keys.
struct JsonNode {
  JsonElement value;
  std::string file, key;  // key.key[index]; empty for the whole file

  std::string where() const { return key.empty() ? file : file + ": " + key; }
  [[noreturn]] void refuse(const std::string& what) const {
    std::string found = simdjson::minify(value);
    if (found.size() > 80) found = found.substr(0, 77) + "...";
    fail(where(), ": found ", found, ", expected ", what);
  }
  bool has(const char* name) const {  // null counts as absent
    JsonElement e;
    return value.at_key(name).get(e) == simdjson::SUCCESS && !e.is_null();
  }
  JsonNode member(const char* name) const {
    JsonElement e;
    const std::string inner = key.empty() ? name : key + "." + name;
    if (value.at_key(name).get(e)) fail(file, ": ", inner, " is missing");
    return {e, file, inner};
  }
  JsonNode item(size_t index) const {
    JsonElement e;
    if (array().at(index).get(e)) refuse(concat("an array of more than ", index, " items"));
    return {e, file, key + "[" + std::to_string(index) + "]"};
  }
  std::vector<JsonNode> items() const {
    std::vector<JsonNode> list;
    for (const JsonElement e : array()) {
      list.push_back({e, file, key + "[" + std::to_string(list.size()) + "]"});
    }
    return list;
  }
  template <class T>
  T as(const char* what) const {
    T x;
    if (value.get(x)) refuse(what);
    return x;
  }
  std::string_view string() const { return as<std::string_view>("a string"); }
  simdjson::dom::object object() const { return as<simdjson::dom::object>("an object"); }
  simdjson::dom::array array() const { return as<simdjson::dom::array>("an array"); }
  int id() const {
    const int64_t x = as<int64_t>("a token id");
    if (x < 0 || x > kMaxTokenId) refuse(concat("0 to ", kMaxTokenId));
    return int(x);
  }
  bool flag(const char* name, bool fallback) const {
    return has(name) ? member(name).as<bool>("true or false") : fallback;
  }
  std::string text(const char* name, const std::string& fallback) const {
    return has(name) ? std::string(member(name).string()) : fallback;
  }

  static constexpr int kMaxTokenId = 1 << 24;
};

JsonNode parse_file(simdjson::dom::parser& parser, const std::string& content,
                    const std::string& path);

// An added token as tokenizer.json and tokenizer_config.json have it.
AddedToken read_added_token(const JsonNode& node, std::string_view text, int id);

// `content`: the file's, of which `root` was parsed.
std::shared_ptr<TokenizerData> read_tokenizer_json(std::string content, const JsonNode& root);
// The tokenizer of a .gguf file: bpe_gguf.cpp.
std::shared_ptr<TokenizerData> read_gguf_tokenizer(const std::filesystem::path& path);
std::string tokenizer_json(const TokenizerData& data);
// A vocabulary as tokenizer.json has it: bytes are spelled, added tokens are their text.
struct SpelledVocabulary {
  std::vector<std::string> tokens;  // by id; empty: no token has this id
  std::vector<std::string> merges;  // "left right"
};
SpelledVocabulary spell_vocabulary(const TokenizerData& data);
std::string tokenizer_config_json(const TokenizerData& data);

// Writes a .tiktoken file.
void write_tiktoken(const TokenizerData& data, const std::filesystem::path& path);

}  // namespace cake::tokenizer_files
