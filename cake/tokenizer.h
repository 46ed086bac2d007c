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

#include "cake/json.h"
#include "cake/record_options.h"

namespace cake {

struct TokenizerData;

// A token and the bytes of the text that it stands for: text[begin, end).
struct TokenPlace {
  int id;
  size_t begin, end;
};

// A stretch of a text in which special tokens are recognised: text[begin, end).
struct SpecialStretch {
  size_t begin, end;
  std::span<const int> only = {};  // these alone; empty: all of them
};

// Copies share their data. All member functions may be called by many threads at once.
class Tokenizer {
 public:
  // A model, run or tokenizer directory, or a file: tokenizer.json, .gguf, .tiktoken (Llama's
  // tokenizer.model is one), tekken.json, vocab.json or merges.txt, vocab.bpe. `pattern`: of a file
  // that does not say its split pattern, a name that parse_pattern knows or a regular expression;
  // empty: known by the number of tokens.
  static Tokenizer load(const std::filesystem::path& path, const std::string& pattern = "");
  static std::filesystem::path find(const std::filesystem::path& path);  // the file load reads
  // Writes tokenizer.json and tokenizer_config.json into a directory: the files that were loaded,
  // byte for byte, if there were any.
  void save(const std::filesystem::path& directory) const;

  // Appends the ids of `text`. Text that looks like a special token is ordinary text unless
  // `allow_special`.
  void encode(std::string_view text, std::vector<int>& ids, bool allow_special = false) const;
  std::vector<int> encode(std::string_view text, bool allow_special = false) const;
  // The same with the place of each token in `text`. Where nothing was normalized, these are its
  // own bytes. A token that holds some of what became of a normalized stretch (a character with its
  // marks, a character in lower case, a replaced match) has the whole stretch, and so have its
  // neighbours that hold more of it: places overlap there, and nowhere else but at added tokens
  // that reach into white space which another one has already. A space or text put in front of the
  // text takes no bytes. `around`: with the ids that the tokenizer's file puts before and behind a
  // text, which take no bytes.
  std::vector<TokenPlace> encode_places(std::string_view text, bool allow_special = false,
                                        bool around = false) const;
  // The same, where a special token is recognised only if all of its own bytes lie in one of the
  // stretches `allowed`, which are in order and do not overlap. (The white space that a token takes
  // along may lie outside.) No text beside a stretch hides a special token in it. Added tokens that
  // are not special are recognised everywhere. `begins`: false if the text goes on from another.
  std::vector<TokenPlace> encode_places(std::string_view text,
                                        std::span<const SpecialStretch> allowed,
                                        bool begins = true) const;
  std::string decode(std::span<const int> ids) const;  // bytes, not always well-formed UTF-8

  int vocab_size() const;                      // the largest id + 1
  std::string_view token_bytes(int id) const;  // empty if no token has this id
  // Whether it is an added token with special = true: text never becomes it unless allowed.
  bool is_special(int id) const;
  int special(std::string_view name) const;  // id of an added token, -1 when absent
  // The text of bos_token, eos_token, pad_token or unk_token in tokenizer_config.json; empty when
  // it names none.
  std::string named_token(const std::string& role) const;
  int end_of_text() const;  // <|endoftext|>; throws Error when absent
  // Begins every document of a corpus, and base prompts; throws Error when the tokenizer has none.
  int document_separator() const;
  int find_document_separator() const;  // the same, -1 when it has none
  uint64_t hash() const;                // of vocabulary, merges, pattern and specials

  // Pre-tokens: the pieces of `text` that merges never cross.
  std::vector<std::string_view> pieces(std::string_view text) const;

  explicit Tokenizer(std::shared_ptr<const TokenizerData> data);
  const TokenizerData& data() const { return *data_; }  // bpe.cpp's own

 private:
  std::shared_ptr<const TokenizerData> data_;
  std::shared_ptr<class EncoderPool> encoders_;  // for encode(): they keep their caches
};

// Reserved in every new tokenizer, in this order, behind the merges.
inline constexpr const char* kSpecialTokens[] = {
    "<|endoftext|>",   "<|im_start|>",     "<|im_end|>",  "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>",     "</think>",    "<|spare_0|>",
    "<|spare_1|>",     "<|spare_2|>",      "<|spare_3|>", "<|spare_4|>", "<|spare_5|>",
    "<|spare_6|>",     "<|spare_7|>"};
inline constexpr int kSpecials = int(std::size(kSpecialTokens));

// The same tokenizer with this chat template in its tokenizer_config.json. With `add`, the tokens
// of kSpecialTokens that it lacks get ids behind its last one.
Tokenizer with_chat_tokens(const Tokenizer&, const std::string& chat_template, bool add = true);

// Documents: plain text, JSON lines, WET and parquet, the first three also as .gz or .zst, or "-";
// see cake/documents.h. The validation part depends only on the documents and the fraction: it is
// the end of a single document, or whole documents, chosen by a hash of their text.
struct Corpus {
  std::vector<std::string> inputs;
  double val_fraction = 0;  // of the text, from 0 to less than 1
  int threads = 1;
  bool quiet = true;                 // no progress, no summary
  size_t cache_bytes = 64 << 20;     // encoding: of the cache from pieces to ids, for each thread
  bool specials = false;             // encoding: the names of special tokens are special tokens
  int64_t max_memory = 0;            // training: bytes, about; 0: half of the machine's
  size_t stretch_bytes = 256 << 10;  // of text that a thread works on at once
  RecordOptions records = {};        // --map text=KEY and --bad-lines
};

// What training had to leave out, and what of.
struct TrainingReport {
  int64_t documents = 0, bytes = 0, pieces = 0, distinct_pieces = 0;
  // Pieces that occur less often than this were dropped, because memory was bounded; 1: none.
  // Counts are exact, so that what is dropped depends on the corpus and the bound alone.
  int64_t least_count = 1;
  int64_t dropped_distinct = 0, dropped_pieces = 0;  // distinct ones, and their occurrences
  // Pieces longer than kLongestTrainingPiece were left out: no language has such words.
  int64_t too_long_pieces = 0, too_long_bytes = 0;
  int64_t temporary_files = 0;  // tables of counts that did not fit into memory
  OrderedJson left_out;         // records by reason, with --bad-lines skip: {"bad line": 2}
};
inline constexpr size_t kLongestTrainingPiece = 4096;  // bytes

// Trains on the part of the corpus that is not validation. `vocab_size` counts 256 bytes, merges
// and kSpecials. `pattern` is gpt2, cl100k, qwen2 or o200k, or a regular expression, or the path of
// a tokenizer whose normalizer and pre-tokenizer are used. The result does not depend on the order
// of the documents or the number of threads. The vocabulary is smaller than `vocab_size` if the
// text has too few pairs.
Tokenizer train_tokenizer(const Corpus&, int vocab_size, const std::string& pattern,
                          TrainingReport* report = nullptr);

// Writes the shards PREFIX_train_*.bin and PREFIX_val_*.bin, then PREFIX.json, which names
// `tokenizer_path` relative to itself: cake/shards.h. Every document begins with the tokenizer's
// document_separator().
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
