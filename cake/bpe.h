// What the parts of ./bpe share: the vocabulary as it was read or trained, its merges, and the
// encoder. Parts: bpe.cpp (corpora, command line), bpe_train.cpp (training), bpe_split.cpp and
// bpe_split_regex.cpp (cake/split.h), bpe_text.cpp (cake/normalize.h, added tokens, Tokenizer),
// bpe_encode.cpp (merges, encoder), bpe_files.cpp, bpe_json.cpp and bpe_gguf.cpp (file formats),
// bpe_page.cpp
// (./bpe stats).
//
// Here a token is named by its rank: bytes are 0 to 255, merge k makes token 256 + k. Ids are what
// a file assigns to tokens. They equal ranks in the tokenizers trained here, and nowhere else. A
// file may list several merges that make the same bytes. At most one of them can ever happen:
// between two places that no merge has crossed, bytes always develop in the same way.
#pragma once

// GCC 12 says of its own AVX-512 intrinsics that a variable is not initialised (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12
#pragma GCC diagnostic pop
#endif

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cake/normalize.h"
#include "cake/run.h"
#include "cake/split.h"
#include "cake/tokenizer.h"

namespace cake {

// A map from 64-bit keys to int: open addressing, linear probing, nothing is ever removed.
class FlatMap {
 public:
  FlatMap() { resize(16); }
  void reserve(size_t n) {  // room for n keys without growing
    size_t slots = slots_.size();
    while (slots < 2 * (n + 1)) slots *= 2;
    if (slots > slots_.size()) resize(slots);
  }
  void prefetch(uint64_t key) const { __builtin_prefetch(&slots_[index(key)]); }
  int find(uint64_t key) const {  // -1 when absent
    for (size_t i = index(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return slots_[i].value;
      if (slots_[i].key == kEmpty) return -1;
    }
  }
  size_t size() const { return size_; }
  int& operator[](uint64_t key) {  // -1 when new
    if (2 * (size_ + 1) > slots_.size()) resize(2 * slots_.size());
    size_t i = index(key);
    while (slots_[i].key != key && slots_[i].key != kEmpty) i = (i + 1) & mask_;
    if (slots_[i].key == kEmpty) slots_[i] = {key, -1}, size_++;
    return slots_[i].value;
  }

 private:
  struct Slot {
    uint64_t key;
    int value;
  };
  static constexpr uint64_t kEmpty = ~uint64_t(0);
  size_t index(uint64_t key) const { return size_t(key * 0x9e3779b97f4a7c15 >> shift_); }
  void resize(size_t n) {
    std::vector<Slot> old(n, {kEmpty, -1});
    old.swap(slots_);
    mask_ = n - 1, shift_ = 64 - __builtin_ctzll(n), size_ = 0;
    for (const Slot& s : old)
      if (s.key != kEmpty) (*this)[s.key] = s.value;
  }
  std::vector<Slot> slots_;
  size_t mask_ = 0, size_ = 0;
  int shift_ = 0;
};

inline uint64_t piece_hash(std::string_view piece) {
  return XXH3_64bits(piece.data(), piece.size());
}
inline uint64_t pair_key(int a, int b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }

// The merges in the order in which they were learned, and what the encoder needs to look up.
class TokenBorders;
class Merges {
 public:
  // Ranks are packed into 21 bits; the last one stands for no token.
  static constexpr int kMaxTokens = (1 << 21) - 1;

  Merges();

  int size() const { return int(offsets_.size()) - 1; }  // tokens
  std::string_view bytes(int token) const {
    const size_t begin = offsets_[size_t(token)];
    return {bytes_.data() + begin, offsets_[size_t(token) + 1] - begin};
  }
  int length(int token) const { return int(offsets_[size_t(token) + 1] - offsets_[size_t(token)]); }
  std::pair<int, int> parts(int token) const { return parts_[size_t(token - 256)]; }

  void reserve(size_t tokens, size_t bytes);
  // Appends a merge. Returns its token. Throws Error when there are kMaxTokens already. Of merges
  // of the same pair only the earliest one happens.
  int add(int left, int right);

  // Appends a token that no merge of earlier tokens makes: late pairs do. Its parts are {-1, -1}.
  int add_without_parts(std::string_view token);
  // A merge whose parts may be later tokens than the one it makes. As soon as both parts stand side
  // by side it is the next merge. With such pairs can_neighbour() does not hold. Not added where
  // the two make a token already.
  struct LatePair {
    int left, right, token;
  };
  void add_late_pair(int left, int right, int token);
  const std::vector<LatePair>& late_pairs() const { return late_pairs_; }
  int find_pair(int left, int right) const;  // the token that two tokens make, -1: none

  bool can_neighbour(int a, int b) const;  // defined with the encoder

  struct Scratch {
    std::vector<int> tokens;         // the result
    std::vector<uint64_t> possible;  // one bit for each position: may a token end here?
    std::vector<uint32_t> ranks, next;
  };
  // The tokens of one piece, by the merges so far.
  void encode(std::string_view piece, Scratch& scratch) const;

  // The parts below are for the encoder.
  static constexpr uint32_t kNone = ~uint32_t(0);
  uint32_t pair(uint32_t left, uint32_t right) const;  // the token of two tokens, kNone: none
  void prefetch_pair(uint32_t left, uint32_t right) const {
    __builtin_prefetch(&lines_[line_of(uint64_t(left) << 21 | right)]);
  }
  const uint32_t* byte_pairs() const { return byte_pairs_.data(); }  // [256 * left + right]
  const TokenBorders& borders() const;  // of all tokens; made when it is first asked for

 private:
  // Pairs of tokens in an open hash table of cache lines, whose eight slots are compared at once:
  // left, right and their token in 21 bits each. A pair that finds its line full is in the next.
  struct alignas(64) PairLine {
    uint64_t slot[8];
  };
  static constexpr uint64_t kEmpty = ~uint64_t(0);
  size_t line_of(uint64_t key) const { return size_t(key * 0x9e3779b97f4a7c15 >> shift_); }
  // Another 6 bits of the same product, above line_of's.
  size_t filter_place(uint64_t key) const {
    return size_t(key * 0x9e3779b97f4a7c15 >> (shift_ - 6));
  }
  void add_pair(int left, int right, int token);
  void insert(uint64_t slot);
  void resize_lines(size_t lines);

  struct Trie;
  struct OnDemand;  // the trie and the borders
  const Trie& trie() const;
  void encode_medium(std::string_view piece, Scratch& scratch) const;
  void encode_long(std::string_view piece, Scratch& scratch) const;
  void encode_in_order(std::string_view piece, Scratch& scratch) const;

  std::string bytes_;            // of all tokens, end to end
  std::vector<size_t> offsets_;  // (tokens + 1)
  std::vector<std::pair<int, int>> parts_;
  std::vector<LatePair> late_pairs_;  // by the token they make
  // A bit for the hash of each pair: most pairs that can_neighbour() asks for make no token, and
  // this is small enough for the processor's cache.
  std::vector<uint64_t> pair_filter_;
  std::vector<PairLine> lines_;
  size_t pairs_ = 0;
  int shift_ = 0;
  std::vector<uint32_t> byte_pairs_;     // the token of two bytes
  std::shared_ptr<OnDemand> on_demand_;  // copies share it as long as none adds a merge
};

// A token that merges do not make: it is matched in text as a whole. The flags are Hugging Face's.
struct AddedToken {
  std::string text;
  int id = 0;
  bool special = true;       // matched only where the caller asks; otherwise always
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and behind it
  bool single_word = false;  // only where no word character stands beside it
  bool normalized = false;   // looked for in the normalized text, in normalized form
};

inline constexpr size_t kCacheBytes = 64 << 20;  // of a thread that encodes a corpus

class AddedTokens;  // bpe_text.cpp

struct TokenizerData {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  bool add_prefix_space = false;  // in front of a text that begins with another character
  bool ignore_merges = false;     // a piece that is a token is that token, whatever the merges say
  Merges merges;
  std::vector<int> ids;           // of each token of `merges`; a byte: -1, none
  int unknown = -1;               // id of every byte without a token of its own; -1: an error
  std::vector<int> unspelled;     // ids of entries that no text becomes
  std::vector<AddedToken> added;  // by id
  std::vector<int> text_begin, text_end;  // ids that the post-processor puts around a text
  std::string json, config;               // the contents of the files it was read from; empty: none

  // What complete() makes of it.
  std::unordered_map<std::string, int> added_ids;   // by text
  int separator = -1;                               // begins every document of a corpus; -1: none
  std::shared_ptr<const AddedTokens> added_tokens;  // for the search in text
  // hash of a piece -> the id that the whole piece becomes, whatever the merges say: all entries of
  // the vocabulary with ignore_merges, otherwise empty
  FlatMap whole_pieces;
  uint64_t hash = 0;

  int tokens() const { return int(places_.size()); }  // the largest id + 1
  std::string_view token(int id) const {              // its bytes; empty if no token has this id
    if (size_t(id) >= places_.size()) return {};
    return {arena_.data() + places_[size_t(id)].begin, places_[size_t(id)].size};
  }
  void add_token(int id, std::string_view text) {
    if (id >= tokens()) places_.resize(size_t(id) + 1);
    places_[size_t(id)] = {uint32_t(arena_.size()), uint32_t(text.size())};
    arena_ += text;
  }
  void reserve(size_t tokens, size_t bytes) {
    places_.reserve(tokens), arena_.reserve(bytes);
    ids.reserve(tokens), whole_pieces.reserve(tokens);
    merges.reserve(std::min<size_t>(tokens, Merges::kMaxTokens), bytes);
  }

  // The text of a token that `config` names, as "bos_token"; empty when it names none.
  std::string named_token(const std::string& role) const;

  // To be called when all the rest is there, and again when some of it has changed. `where` is a
  // file, for errors.
  void complete(const std::string& where);

 private:
  struct Place {
    uint32_t begin = 0, size = 0;
  };
  std::string arena_;          // bytes of all ids, in the order in which they were added
  std::vector<Place> places_;  // by id
};

// Memory from the system, zero at first, in huge pages where it is large and the system has them:
// they are mapped and reached at less cost.
class SystemMemory {
 public:
  SystemMemory() = default;
  explicit SystemMemory(size_t bytes);  // throws Error when there is none
  SystemMemory(SystemMemory&& o) noexcept { swap(o); }
  SystemMemory& operator=(SystemMemory&& o) noexcept {
    swap(o);
    return *this;
  }
  ~SystemMemory();
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void swap(SystemMemory& o) noexcept {
    std::swap(bytes_, o.bytes_), std::swap(mapped_, o.mapped_);
    std::swap(map_, o.map_), std::swap(data_, o.data_);
  }
  size_t bytes_ = 0, mapped_ = 0;
  void *map_ = nullptr, *data_ = nullptr;
};

// Ids in memory that grows without being written first.
class IdBuffer {
 public:
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const uint32_t* data() const { return ids(); }
  const uint32_t* begin() const { return ids(); }
  const uint32_t* end() const { return ids() + size_; }
  uint32_t operator[](size_t i) const { return ids()[i]; }

  void clear() { size_ = 0; }
  void push_back(uint32_t id) {
    *reserve_more(1) = id;
    size_++;
  }
  // Room for `count` further ids. Who writes n of them calls add_written(n).
  uint32_t* reserve_more(size_t count) {
    if (count > room()) grow(size_ + count);
    return ids() + size_;
  }
  void add_written(size_t count) { size_ += count; }
  size_t room() const { return memory_.bytes() / sizeof(uint32_t) - size_; }

 private:
  uint32_t* ids() const { return memory_.as<uint32_t>(); }
  void grow(size_t capacity);
  SystemMemory memory_;
  size_t size_ = 0;
};

// Encodes text without added tokens that is normalized already. Every thread has its own, because
// it has a cache: most pieces of a text are words that occurred before. The cache begins with a few
// kilobytes, so that an Encoder for short texts is cheap, and grows with the text.
class Encoder {
 public:
  // `cache_bytes` bounds the memory of the cache; 0: no cache.
  Encoder(const TokenizerData& data, size_t cache_bytes);
  Encoder(Encoder&&) noexcept;
  ~Encoder();

  // Puts the vocabulary's own tokens into the cache: for long texts, which hold most of them.
  void preload();

  // Appends the ids of text[0, end); PreTokenizer::split says why `text` goes on.
  void encode(std::string_view text, size_t end, IdBuffer& ids);
  void encode(std::string_view text, size_t end, std::vector<int>& ids);
  // The same ids in memory of the Encoder's own, which the next call overwrites.
  std::span<const uint32_t> encode(std::string_view text, size_t end);

  int64_t pieces() const;  // so far
  int64_t misses() const;  // pieces that the cache did not hold

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The added tokens of a tokenizer, made ready for the search in text: bpe_text.cpp.
std::shared_ptr<const AddedTokens> index_added_tokens(const TokenizerData& data);

// Encodes stretches of a document as they are: added tokens, the normalizer, then an Encoder. Every
// thread has its own.
//
// As Hugging Face has it, added tokens with normalized = false are looked for first. The text
// between them is normalized, stretch by stretch, and searched for those with normalized = true.
// What is left between tokens is encoded, each stretch as if it were a text of its own. Tokens are
// found from left to right, the longest one at its place. A special token that is not allowed, and
// a single_word beside a word character, stay text; no other token is looked for inside.
class TextEncoder {
 public:
  TextEncoder(const TokenizerData& data, size_t cache_bytes);

  // Appends the ids of text[0, end), where `end` is a safe cut or the end. `text` goes on to its
  // end or to the end of its document. `begins`: a document begins here. `specials`: special tokens
  // are matched too.
  void encode(std::string_view text, size_t end, bool begins, bool specials, IdBuffer& ids);
  void encode(std::string_view text, size_t end, bool begins, bool specials, std::vector<int>& ids);
  // The tokens of a whole text with their places in it: Tokenizer::encode_places.
  void encode_places(std::string_view text, bool specials, std::vector<TokenPlace>& places);
  void encode_places(std::string_view text, std::span<const SpecialStretch> allowed, bool begins,
                     std::vector<TokenPlace>& places);
  const Encoder& encoder() const { return encoder_; }
  void preload() { encoder_.preload(); }

 private:
  // Where the text of a stretch comes from, for places: its offset in the original text, or in the
  // normalized one that `alignment` belongs to, which begins at `base` in the original.
  struct Origin {
    size_t offset = 0, base = 0;
    const Alignment* alignment = nullptr;
  };
  void encode_raw(std::string_view text, size_t end, bool begins, bool specials, Origin origin);
  void encode_normalized(std::string_view text, size_t end, bool begins, bool specials,
                         Origin origin);
  void encode_plain(std::string_view text, size_t end, bool begins, Origin origin);
  // Where the search goes on behind a special token at [begin, end) that is not recognised there;
  // 0: it is recognised.
  size_t search_behind(const AddedToken& token, size_t begin, size_t end, Origin origin) const;
  static std::pair<size_t, size_t> source(size_t begin, size_t end, Origin origin);
  void add_token(const AddedToken& token, size_t begin, size_t end, Origin origin);
  void add_place(int id, size_t begin, size_t end, Origin origin);

  const TokenizerData& data_;
  std::shared_ptr<const AddedTokens> added_;
  Encoder encoder_;
  IdBuffer* ids_ = nullptr;                    // of the call that runs
  std::vector<TokenPlace>* places_ = nullptr;  // likewise; nullptr: not asked for
  // Likewise; nullopt: special tokens are recognised everywhere, or nowhere.
  std::optional<std::span<const SpecialStretch>> allowed_;
  IdBuffer own_ids_;
  std::string normal_, prefixed_;  // the text that is encoded, where it is not the original
  Alignment alignment_;
};

// More tokens behind the last one: special ones, and merges learned on documents that the
// vocabulary encodes first.
struct ExtendOptions {
  std::vector<std::string> specials;
  int tokens = 0;  // to train
};
Tokenizer extend_tokenizer(const Tokenizer&, const Corpus&, const ExtendOptions&);

// Writes a directory, a tokenizer.json or a .tiktoken file: bpe_files.cpp.
void convert_tokenizer(const Tokenizer&, const std::filesystem::path& output);

// Figures on the screen, and a page that shows them with the text: bpe_page.cpp.
struct StatsOptions {
  std::string tokenizer, pattern;  // the pattern as Tokenizer::load has it
  std::vector<std::string> inputs, others;
  std::string html;     // empty: no page
  int sample = 20'000;  // bytes of the text that the page shows
  int threads = 1;
  RecordOptions records = {};  // --map text=KEY and --bad-lines
};
void stats_command(const StatsOptions&);

// A token as a reader can see it on a terminal: control characters and characters without a shape
// are escaped, and bytes that are only a part of a character are hexadecimal.
std::string visible_token(std::string_view token);

// Whether a document can be cut between text[i-1] and text[i] and its parts be encoded apart.
bool is_safe_cut(const TokenizerData& data, std::string_view text, size_t i);

}  // namespace cake
