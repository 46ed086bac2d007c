// Byte-level BPE: text to token ids and back. The interface; the algorithm is bpe.cpp.
#pragma once

#include <cstdint>
#include <filesystem>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cake {

struct TokenizerData;

// Copies share their data. All member functions may be called by many threads at once.
class Tokenizer {
 public:
  // A model, run or tokenizer directory, or a tokenizer.json, .tiktoken or vocab.bpe file.
  static Tokenizer load(const std::filesystem::path& path);
  static std::filesystem::path find(const std::filesystem::path& path);  // the file load reads
  // Writes tokenizer.json and tokenizer_config.json into a directory: the files that were loaded,
  // byte for byte, if there were any.
  void save(const std::filesystem::path& directory) const;

  // Appends the ids of `text`. Text that looks like a special token is ordinary text unless
  // `allow_special`.
  void encode(std::string_view text, std::vector<int>& ids, bool allow_special = false) const;
  std::vector<int> encode(std::string_view text, bool allow_special = false) const;
  std::string decode(std::span<const int> ids) const;  // bytes, not always well-formed UTF-8

  int vocab_size() const;                      // the largest id + 1
  std::string_view token_bytes(int id) const;  // empty if no token has this id
  bool is_special(int id) const;               // an added token: never made from ordinary text
  int special(std::string_view name) const;    // id of a special token, -1 when absent
  int end_of_text() const;                     // <|endoftext|>; throws Error when absent
  uint64_t hash() const;                       // of vocabulary, merges, pattern and specials

  // Pre-tokens: the pieces of `text` that merges never cross.
  std::vector<std::string_view> pieces(std::string_view text) const;

  explicit Tokenizer(std::shared_ptr<const TokenizerData> data) : data_(std::move(data)) {}
  const TokenizerData& data() const { return *data_; }  // bpe.cpp's own

 private:
  std::shared_ptr<const TokenizerData> data_;
};

// Reserved in every new tokenizer, in this order, behind the merges.
inline constexpr const char* kSpecialTokens[] = {
    "<|endoftext|>",   "<|im_start|>",     "<|im_end|>",  "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>",     "</think>",    "<|spare_0|>",
    "<|spare_1|>",     "<|spare_2|>",      "<|spare_3|>", "<|spare_4|>", "<|spare_5|>",
    "<|spare_6|>",     "<|spare_7|>"};
inline constexpr int kSpecials = int(std::size(kSpecialTokens));

// The same tokenizer with the template of cake/chat_template.h in its tokenizer_config.json. With
// `add`, the tokens of kSpecialTokens that it lacks get ids behind its last one.
Tokenizer with_chat_tokens(const Tokenizer&, bool add = true);

// Documents: plain text or JSON lines, each also .gz or .zst, or "-"; see cake/records.h. The
// validation part depends only on the documents and the fraction: it is the end of a single
// document, or whole documents, chosen by a hash of their text.
struct Corpus {
  std::vector<std::string> inputs;
  double val_fraction = 0;  // of the text, from 0 to less than 1
  int threads = 1;
  bool quiet = true;  // no progress, no summary
};

// Trains on the part of the corpus that is not validation. `vocab_size` counts 256 bytes, merges
// and kSpecials; `pattern` is gpt2, cl100k, qwen2 or o200k. The result does not depend on the order
// of the documents or the number of threads. The vocabulary is smaller than `vocab_size` if the
// text has too few pairs.
Tokenizer train_tokenizer(const Corpus&, int vocab_size, const std::string& pattern);

// Writes the shards PREFIX_train_*.bin and PREFIX_val_*.bin, then PREFIX.json, which names
// `tokenizer_path` relative to itself: cake/shards.h. Every document begins with <|endoftext|>.
struct DataInfo;
DataInfo encode_corpus(const Corpus&, const Tokenizer&, const std::filesystem::path& tokenizer_path,
                       const std::filesystem::path& prefix);

// Byte pair encoding by its definition, slowly: the first page of bpe.cpp. Bytes are tokens 0 to
// 255, merge k makes token 256 + k.
namespace plain {

using Merge = std::pair<int, int>;  // left, right
std::vector<Merge> learn_merges(std::vector<std::vector<int>> pieces, int count);
std::vector<int> encode(std::string_view piece, std::span<const Merge> merges);

}  // namespace plain
}  // namespace cake
