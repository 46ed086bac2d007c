// Stage 1, the tokenizer: documents to a vocabulary, documents to token shards.
//
//     text --split pattern--> pieces --byte pair encoding--> ids
//
//     train    pieces, counted --merge the most frequent pair, again and again--> tokenizer.json
//     encode   documents --tokenizer--> <|endoftext|> ids ... <|endoftext|> ids ... --> shards
//
// The file in order: byte pair encoding by its definition, in a page; the split patterns; training;
// encoding; reading a corpus; files of tokenizers; UTF-8 and Unicode's normal form; the command
// line.
//
// A split pattern cuts text into pieces that tokens never cross: words with the space before them,
// numbers, punctuation, white space. The published patterns are regular expressions. Here each is a
// few lines over one class per code point: a regular expression engine would take most of the time,
// and some overflow their stack on long runs.
//
// In this file a token is named by its rank: bytes are 0 to 255, merge k makes token 256 + k. Ids
// are what a file assigns to tokens. They equal ranks in the tokenizers trained here, and nowhere
// else. A file may list several merges that make the same bytes. At most one of them can ever
// happen: between two places that no merge has crossed, bytes always develop in the same way.
//
// Sources: byte-level BPE, Radford et al. 2019; BPE for words, Sennrich et al. 2016; patterns and
// the .tiktoken format, OpenAI's tiktoken; linear encoding by backtracking over compatible
// neighbours, Antwerpen and Neubeck 2024 (GitHub's rust-gems); tokenizer.json, Hugging Face.

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
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <queue>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cake/chat_template.h"
#include "cake/flags.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/shards.h"
#include "cake/tokenizer.h"
#include "cake/unicode.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Byte pair encoding by its definition. The rest of this file gives the same tokens, but faster;
// the tests compare the two.

namespace plain {

// Replaces each pair of neighbours (left, right) by `token`, from left to right.
static void join_pairs(std::vector<int>& tokens, Merge pair, int token) {
  size_t size = 0;
  for (size_t i = 0; i < tokens.size(); i++) {
    const bool joined = i + 1 < tokens.size() && Merge(tokens[i], tokens[i + 1]) == pair;
    tokens[size++] = joined ? token : tokens[i];
    i += joined;
  }
  tokens.resize(size);
}

// Training: count the pairs of neighbours in all pieces, join the most frequent pair everywhere,
// count again. Of pairs with equal counts the smallest is joined.
std::vector<Merge> learn_merges(std::vector<std::vector<int>> pieces, int count) {
  std::vector<Merge> merges;
  while (int(merges.size()) < count) {
    std::map<Merge, int64_t> counts;
    for (const std::vector<int>& piece : pieces) {
      for (size_t i = 0; i + 1 < piece.size(); i++) counts[{piece[i], piece[i + 1]}]++;
    }
    if (counts.empty()) break;
    const auto less = [](const auto& a, const auto& b) { return a.second < b.second; };
    const Merge best = std::max_element(counts.begin(), counts.end(), less)->first;
    for (std::vector<int>& piece : pieces) join_pairs(piece, best, 256 + int(merges.size()));
    merges.push_back(best);
  }
  return merges;
}

// Encoding: the bytes of a piece, then every merge in the order in which it was learned.
std::vector<int> encode(std::string_view piece, std::span<const Merge> merges) {
  std::vector<int> tokens;
  for (const unsigned char byte : piece) tokens.push_back(byte);
  for (size_t k = 0; k < merges.size(); k++) join_pairs(tokens, merges[k], 256 + int(k));
  return tokens;
}

}  // namespace plain

namespace {

// ---------------------------------------------------------------------------------------------
// Split patterns

// A code point of UTF-8 and its length. A byte that no well-formed sequence holds stands for
// itself: kInvalid plus the byte, one byte long, of class kOther.
struct CodePoint {
  uint32_t code;
  int bytes;
};

constexpr uint32_t kInvalid = 0x110000;  // plus the byte
CodePoint decode_utf8(const char* text, size_t left);
void append_utf8(std::string& out, uint32_t c);

enum class Pattern { gpt2, gpt2_digits, cl100k, qwen2, o200k };

struct PatternInfo {
  Pattern pattern;
  const char* name;
  const char* regex;  // as tokenizer.json spells it
};

// gpt2_digits is SmolLM's: digits are single, and the text between them is split as by gpt2.
constexpr PatternInfo kPatterns[] = {
    {Pattern::gpt2, "gpt2",
     R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"},
    {Pattern::gpt2_digits, "gpt2_digits", ""},
    {Pattern::cl100k, "cl100k",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {Pattern::qwen2, "qwen2",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {Pattern::o200k, "o200k",
     R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
     R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
     R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}};

const PatternInfo& pattern_info(Pattern pattern) { return kPatterns[size_t(pattern)]; }

constexpr unsigned bit(int kind) { return 1u << kind; }

Pattern parse_pattern(const std::string& name) {
  for (const PatternInfo& p : kPatterns) {
    if (name == p.name && p.regex[0]) return p.pattern;
  }
  fail("--pattern: found ", name, ", expected gpt2, cl100k, qwen2 or o200k");
}

// Finds where pieces end. Each pattern is a member function, which tests the alternatives of the
// regular expression in their order.
class Scanner {
 public:
  Scanner(std::string_view text, Pattern pattern)
      : text_(text), end_(pattern == Pattern::gpt2_digits ? 0 : text.size()), pattern_(pattern) {}

  // The end of the piece that begins at byte `i` of the text. Each call continues where the last
  // one ended.
  size_t piece_end(size_t i) {
    if (pattern_ == Pattern::gpt2) return gpt2(i);
    if (pattern_ == Pattern::gpt2_digits) return gpt2_digits(i);
    if (pattern_ == Pattern::o200k) return o200k(i);
    return cl100k(i, pattern_ == Pattern::qwen2 ? 1 : 3);
  }

 private:
  static constexpr int kEnd = 8;  // the class of the position behind the last character
  static constexpr unsigned kLetters = bit(kUpper) | bit(kLower) | bit(kLetter);
  static constexpr unsigned kSpaces = bit(kSpace) | bit(kNewline);
  static constexpr unsigned kSigns = bit(kOther) | bit(kMark);  // [^\s\p{L}\p{N}]
  // The one character that may stand in front of a word: [^\r\n\p{L}\p{N}]
  static constexpr unsigned kPrefixes = kSigns | bit(kSpace);
  // o200k's words: upper-case characters, then lower-case ones. Marks and letters without case
  // count as both.
  static constexpr unsigned kUncased = bit(kLetter) | bit(kMark);
  static constexpr unsigned kUppers = bit(kUpper) | kUncased, kLowers = bit(kLower) | kUncased;

  struct Char {
    int kind, bytes;
    bool in(unsigned mask) const { return mask >> kind & 1; }
  };

  Char char_at(size_t i) const {
    if (i >= end_) return {kEnd, 0};
    const auto byte = static_cast<unsigned char>(text_[i]);
    if (byte < 0x80) return {classes_[byte], 1};
    const CodePoint c = decode_utf8(text_.data() + i, end_ - i);
    return {c.code < kInvalid ? classes_[c.code] : int(kOther), c.bytes};
  }
  bool has(size_t i, char c) const { return i < end_ && text_[i] == c; }

  // The end of the run of characters in `mask` that begins at `i`.
  size_t skip(size_t i, unsigned mask) const {
    for (Char c; (c = char_at(i)).in(mask);) i += size_t(c.bytes);
    return i;
  }

  // '(?:[sdmt]|ll|ve|re): its end, or i. In any case (?i:), U+017F counts as an s.
  size_t contraction(size_t i, bool any_case) const {
    if (!has(i, '\'')) return i;
    const auto lower = [&](size_t j) {
      const char c = j < end_ ? text_[j] : '\0';
      return any_case && c >= 'A' && c <= 'Z' ? char(c + 32) : c;
    };
    const char a = lower(i + 1), b = lower(i + 2);
    if (a == 's' || a == 'd' || a == 'm' || a == 't') return i + 2;
    if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) return i + 3;
    if (any_case && a == '\xC5' && b == '\xBF') return i + 3;
    return i;
  }

  // \s+(?!\S)|\s+, and before them \s*[\r\n]+ where newlines come head.
  size_t white_space(size_t i, bool newlines_first) const {
    size_t e = i, last = i, after_newline = i;  // last: where the run's last character begins
    for (Char c; (c = char_at(e)).in(kSpaces); e += size_t(c.bytes)) {
      last = e;
      if (c.kind == kNewline) after_newline = e + 1;
    }
    if (newlines_first && after_newline > i) return after_newline;
    return e == end_ || last == i ? e : last;
  }

  size_t gpt2(size_t i) const {
    const size_t end = contraction(i, false);
    if (end > i) return end;
    const size_t start = i + has(i, ' ');
    const Char head = char_at(start);
    if (head.in(kLetters)) return skip(start, kLetters);
    if (head.in(bit(kNumber))) return skip(start, bit(kNumber));
    if (head.in(kSigns)) return skip(start, kSigns);
    return white_space(i, false);
  }

  size_t gpt2_digits(size_t i) {
    if (i == end_) {  // the text between two digits ends here
      end_ = text_.size();
      const Char c = char_at(i);
      if (c.kind == kNumber) return end_ = i + size_t(c.bytes);
      end_ = skip(i, ~bit(kNumber) & ~bit(kEnd));
    }
    return gpt2(i);
  }

  size_t cl100k(size_t i, int digits) const {
    const size_t end = contraction(i, true);
    if (end > i) return end;
    const Char head = char_at(i);
    const size_t next = i + size_t(head.bytes);
    if (head.in(kLetters)) return skip(i, kLetters);
    if (head.in(kPrefixes) && char_at(next).in(kLetters)) return skip(next, kLetters);
    if (head.kind == kNumber) return number(i, digits);
    const size_t start = i + has(i, ' ');
    if (char_at(start).in(kSigns)) return skip(skip(start, kSigns), bit(kNewline));
    return white_space(i, true);
  }

  size_t o200k(size_t i) const {
    const Char head = char_at(i);
    const size_t next = i + size_t(head.bytes);
    size_t e = i;
    // The two kinds of words, each tried with the prefix and then without.
    if (head.in(kPrefixes)) e = cased_word(next, i);
    if (e == i) e = cased_word(i, i);
    if (e == i && head.in(kPrefixes)) e = upper_word(next, i);
    if (e == i) e = upper_word(i, i);
    if (e > i) return contraction(e, true);
    if (head.kind == kNumber) return number(i, 3);
    const size_t start = i + has(i, ' ');
    if (!char_at(start).in(kSigns)) return white_space(i, true);
    for (e = skip(start, kSigns); has(e, '\r') || has(e, '\n') || has(e, '/');) e++;
    return e;
  }

  // The end of [uppers]*[lowers]+ from i, or `none`. Where no lower follows the uppers, the regular
  // expression backtracks to the last of them that is a lower too: one without case.
  size_t cased_word(size_t i, size_t none) const {
    size_t e = i, after_uncased = none;
    for (Char c; (c = char_at(e)).in(kUppers);) {
      e += size_t(c.bytes);
      if (c.in(kUncased)) after_uncased = e;
    }
    return char_at(e).in(kLowers) ? skip(e, kLowers) : after_uncased;
  }
  // The end of [uppers]+[lowers]* from i, or `none`.
  size_t upper_word(size_t i, size_t none) const {
    const size_t e = skip(i, kUppers);
    return e > i ? skip(e, kLowers) : none;
  }

  size_t number(size_t i, int digits) const {
    for (Char c; digits-- > 0 && (c = char_at(i)).kind == kNumber;) i += size_t(c.bytes);
    return i;
  }

  std::string_view text_;
  size_t end_;  // of the text that the pattern sees
  Pattern pattern_;
  const uint8_t* classes_ = char_classes();
};

// Calls f(piece) for the pieces of text[0, end), which must end where a piece ends. The text behind
// `end` is looked at, because a piece of white space depends on what follows it.
template <class F>
void for_each_piece(std::string_view text, size_t end, Pattern pattern, F&& f) {
  Scanner scanner(text, pattern);
  for (size_t i = 0; i < end;) {
    const size_t next = scanner.piece_end(i);
    f(text.substr(i, next - i));
    i = next;
  }
}

// ---------------------------------------------------------------------------------------------
// A corpus arrives in batches of text that fit memory, each cut into chunks that threads can work
// on alone. The reader of a corpus is defined below, behind the encoder.

struct Chunk {
  size_t begin, end;  // in the batch's text
  size_t text_end;    // the batch holds the document's text at least to here
  bool begins_document, is_validation;
  size_t size() const { return end - begin; }
};
struct TextBatch {
  std::string text;
  std::vector<Chunk> chunks;
  // The chunk and what follows it in its document: whether a piece ends can depend on that.
  std::string_view text_of(const Chunk& c) const {
    return std::string_view(text).substr(c.begin, c.text_end - c.begin);
  }
};

// The lines that a long command prints; none when it is quiet.
class ConsoleLog {
 public:
  explicit ConsoleLog(bool quiet) : quiet_(quiet) {}
  void progress(const std::string& line, bool last = false) {
    if (!quiet_) line_.show(line, last);
  }
  void note(const std::string& line) {
    if (!quiet_) line_.note(line);
  }
  std::string rate(int64_t bytes) const {  // since the start
    const double seconds = now() - start_;
    return format("%.1f s, %.1f MB/s", seconds, double(bytes) / 1e6 / std::max(seconds, 1e-9));
  }

 private:
  bool quiet_;
  ProgressLine line_;
  double start_ = now();
};

// Throws Error if the corpus has no input or no thread.
void check_corpus(const Corpus& corpus);

// Calls process(batch) for each batch of the corpus, one after the other. `verb` is for the
// progress line.
void for_each_batch(const Corpus& corpus, const char* verb, ConsoleLog& log,
                    const std::function<void(const TextBatch&)>& process);

// ---------------------------------------------------------------------------------------------
// Training: WordTable counts the distinct pieces, Trainer chooses pair after pair, Merges holds
// what was learned, TokenizerData is the result.

// A map from 64-bit keys to int: open addressing, linear probing, nothing is ever removed.
class FlatMap {
 public:
  FlatMap() { resize(16); }
  int find(uint64_t key) const {  // -1 when absent
    for (size_t i = index(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return slots_[i].value;
      if (slots_[i].key == kEmpty) return -1;
    }
  }
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

uint64_t piece_hash(std::string_view piece) { return XXH3_64bits(piece.data(), piece.size()); }
uint64_t pair_key(int a, int b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }

// Distinct pieces and how often each occurs.
class WordTable {
 public:
  void add(std::string_view word, int64_t count) {
    for (uint64_t key = piece_hash(word) >> 1;; key++) {  // the next key where hashes collide
      int& w = index_[key];
      if (w < 0) {
        w = int(words_.size());
        words_.push_back({text_.size(), word.size(), 0});
        text_ += word;
      }
      if (this->word(size_t(w)) != word) continue;
      words_[size_t(w)].count += count;
      return;
    }
  }
  void merge(const WordTable& other) {
    for (size_t i = 0; i < other.size(); i++) add(other.word(i), other.count(i));
  }
  size_t size() const { return words_.size(); }
  std::string_view word(size_t i) const {
    return std::string_view(text_).substr(words_[i].offset, words_[i].size);
  }
  int64_t count(size_t i) const { return words_[i].count; }

 private:
  struct Word {
    size_t offset, size;  // in text_
    int64_t count;
  };
  FlatMap index_;  // hash -> index into words_
  std::vector<Word> words_;
  std::string text_;  // of all words, end to end
};

// The merges in the order in which they were learned, and what the encoder needs to look up.
class Merges {
 public:
  Merges() {
    for (int b = 0; b < 256; b++) {
      bytes_ += char(b);
      offsets_.push_back(size_t(b));
      node_token_.push_back(b);  // the first 256 nodes of the trie
    }
    offsets_.push_back(256);
  }

  int size() const { return int(offsets_.size()) - 1; }  // tokens
  std::string_view bytes(int token) const {
    const size_t begin = offsets_[size_t(token)];
    return {bytes_.data() + begin, offsets_[size_t(token) + 1] - begin};
  }
  int length(int token) const { return int(offsets_[size_t(token) + 1] - offsets_[size_t(token)]); }
  std::pair<int, int> parts(int token) const { return parts_[size_t(token - 256)]; }

  // Appends a merge. Returns its token.
  int add(int left, int right) {
    const int token = size();
    pairs_[pair_key(left, right)] = token;
    parts_.push_back({left, right});
    const std::string joined = std::string(bytes(left)) + std::string(bytes(right));
    bytes_ += joined;
    offsets_.push_back(bytes_.size());
    int node = static_cast<unsigned char>(joined[0]);
    for (size_t i = 1; i < joined.size(); i++) {
      int& child = edges_[edge(node, joined[i])];
      if (child < 0) {
        child = int(node_token_.size());
        node_token_.push_back(-1);
      }
      node = child;
    }
    node_token_[size_t(node)] = token;
    return token;
  }

  bool can_neighbour(int a, int b) const;  // defined with the encoder

  struct Scratch {
    std::vector<int> tokens;         // the result
    std::vector<uint64_t> possible;  // one bit for each position: may a token end here?
  };
  void encode(std::string_view piece, Scratch& scratch) const;

 private:
  static uint64_t edge(int node, char byte) {
    return uint64_t(uint32_t(node)) << 8 | static_cast<unsigned char>(byte);
  }
  int longest(std::string_view text) const;

  std::string bytes_;            // of all tokens, end to end
  std::vector<size_t> offsets_;  // (tokens + 1)
  std::vector<std::pair<int, int>> parts_;
  FlatMap pairs_;                // (left, right) -> token
  FlatMap edges_;                // a trie over the bytes of tokens: (node, byte) -> node
  std::vector<int> node_token_;  // token that ends at the node, -1: none
};

// Joins the most frequent pair of neighbours again and again, as plain::learn_merges does. It
// counts the pairs once: a merge visits only the words that have held its pair, and changes the
// counts of the pairs that it makes and breaks there. Of pairs with equal counts the smallest
// (left, right) is joined, so that the order of words does not matter.
class Trainer {
 public:
  explicit Trainer(const WordTable& words) {
    std::vector<int> fresh;
    for (size_t w = 0; w < words.size(); w++) {
      const std::string_view text = words.word(w);
      words_.push_back({tokens_.size(), text.size(), words.count(w)});
      for (const unsigned char b : text) tokens_.push_back(b);
      for (size_t i = words_[w].begin; i + 1 < tokens_.size(); i++) {
        add(tokens_[i], tokens_[i + 1], uint32_t(w), fresh);
      }
    }
    for (const int p : fresh) enqueue(p);
  }

  // The pair to merge next; false when there is none. The count in an entry of the queue may be out
  // of date. It can only have fallen since: the entry goes back with the present count.
  bool best(int& left, int& right) {
    while (!queue_.empty()) {
      const auto [count, minus_left, minus_right, p] = queue_.top();
      if (pairs_[size_t(p)].count == count) {
        left = -minus_left, right = -minus_right;
        return true;
      }
      queue_.pop();
      if (pairs_[size_t(p)].count > 0) enqueue(p);
    }
    return false;
  }

  // Replaces the pair by `token` in every word.
  void merge(int left, int right, int token) {
    const auto p = size_t(index_.find(pair_key(left, right)));
    std::vector<int> fresh;  // the pairs that hold the new token
    for (const uint32_t w : std::exchange(pairs_[p].words, {})) {
      merge_word(w, left, right, token, fresh);
    }
    pairs_[p].count = 0;
    for (const int f : fresh) enqueue(f);
  }

  int64_t tokens() const {  // in the text
    int64_t n = 0;
    for (const Word& w : words_) n += int64_t(w.size) * w.count;
    return n;
  }

 private:
  struct Word {
    size_t begin, size;  // in tokens_
    int64_t count;       // in the text
  };
  struct Pair {
    int left, right;
    int64_t count = 0;            // in the text; places that overlap count each
    std::vector<uint32_t> words;  // every word that has held the pair, once
  };
  using Entry = std::tuple<int64_t, int, int, int>;  // count, -left, -right, index of the pair

  void enqueue(int p) {
    const Pair& pair = pairs_[size_t(p)];
    queue_.push({pair.count, -pair.left, -pair.right, p});
  }

  void add(int left, int right, uint32_t w, std::vector<int>& fresh) {
    int& p = index_[pair_key(left, right)];
    if (p < 0) {
      p = int(pairs_.size());
      pairs_.push_back({left, right});
      fresh.push_back(p);
    }
    Pair& pair = pairs_[size_t(p)];
    pair.count += words_[w].count;
    if (pair.words.empty() || pair.words.back() != w) pair.words.push_back(w);
  }

  // Joins (left, right) to `token` in one word, from left to right, in place. Every pair of
  // neighbours that disappears is subtracted from its count once, every new one is added once.
  void merge_word(uint32_t w, int left, int right, int token, std::vector<int>& fresh) {
    Word& word = words_[w];
    int* const t = tokens_.data() + word.begin;
    const auto subtract = [&](int a, int b) {
      pairs_[size_t(index_.find(pair_key(a, b)))].count -= word.count;
    };
    size_t out = 0;
    bool joined = false;  // the last step joined a pair, and subtracted the pair on its right
    for (size_t i = 0; i < word.size;) {
      if (i + 1 < word.size && t[i] == left && t[i + 1] == right) {
        // t[out - 1] is the token before: `token` itself if joined.
        if (out > 0 && !joined) subtract(t[out - 1], left);
        if (i + 2 < word.size) subtract(right, t[i + 2]);
        if (out > 0) add(t[out - 1], token, w, fresh);
        t[out++] = token;
        joined = true;
        i += 2;
      } else {
        if (joined) add(token, t[i], w, fresh);
        t[out++] = t[i++];
        joined = false;
      }
    }
    word.size = out;
  }

  std::vector<int> tokens_;  // of all words, end to end; merges shorten a word in place
  std::vector<Word> words_;
  FlatMap index_;  // of pairs_
  std::vector<Pair> pairs_;
  std::priority_queue<Entry> queue_;
};

}  // namespace

struct TokenizerData {
  Pattern pattern = Pattern::gpt2;
  bool nfc = false;            // text is brought to Normalization Form C first
  bool ignore_merges = false;  // a piece that is a token is that token, whatever the merges say
  Merges merges;
  std::vector<int> ids;                               // of each token of `merges`
  std::vector<std::string> bytes;                     // of each id; empty if no token has it
  std::vector<std::pair<std::string, int>> specials;  // by id
  std::unordered_map<std::string, int> special_ids;   // by name
  FlatMap whole_pieces;      // hash of a piece -> the id that the whole piece becomes
  std::string json, config;  // the contents of the files it was read from; empty: none
  uint64_t hash = 0;

  void add_token(int id, std::string_view text) {
    if (size_t(id) >= bytes.size()) bytes.resize(size_t(id) + 1);
    bytes[size_t(id)] = text;
  }

  // Fills what follows from the rest. `where` is a file, for errors.
  void complete(const std::string& where);
};

void TokenizerData::complete(const std::string& where) {
  for (int t = 0; t < merges.size(); t++) add_token(ids[size_t(t)], merges.bytes(t));
  std::sort(specials.begin(), specials.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  for (size_t id = 0; id < bytes.size(); id++) {
    if (ignore_merges && !bytes[id].empty()) whole_pieces[piece_hash(bytes[id])] = int(id);
  }
  for (int t = 0; t < merges.size(); t++) {
    whole_pieces[piece_hash(merges.bytes(t))] = ids[size_t(t)];
  }
  for (const auto& [name, id] : specials) {
    if (name.empty()) fail(where, ": found a special token without text");
    add_token(id, name);
    special_ids[name] = id;
  }
  std::string all =
      concat(pattern_info(pattern).name, nfc ? " nfc" : "", ignore_merges ? " ignore_merges" : "");
  const auto put = [&all](int x) { all.append(reinterpret_cast<const char*>(&x), sizeof x); };
  for (int t = 256; t < merges.size(); t++) {
    put(merges.parts(t).first), put(merges.parts(t).second);
  }
  for (const auto& [name, id] : specials) put(id);
  for (const std::string& token : bytes) put(int(token.size())), all += token;
  hash = hash64(all);
}

namespace {

// The distinct pieces of the training documents.
struct CountedPieces {
  WordTable words;
  int64_t documents = 0, bytes = 0;
};

CountedPieces count_pieces(const Corpus& corpus, Pattern pattern, ConsoleLog& log) {
  check_corpus(corpus);
  CountedPieces all;
  std::vector<WordTable> tables(size_t(corpus.threads));
  for_each_batch(corpus, "reading", log, [&](const TextBatch& batch) {
    parallel_for(batch.chunks.size(), corpus.threads, [&](size_t i, size_t thread) {
      const Chunk& c = batch.chunks[i];
      if (c.is_validation) return;
      for_each_piece(batch.text_of(c), c.size(), pattern,
                     [&](std::string_view piece) { tables[thread].add(piece, 1); });
    });
    for (const Chunk& c : batch.chunks) {
      if (c.is_validation) continue;
      all.documents += c.begins_document;
      all.bytes += int64_t(c.size());
    }
  });
  if (all.bytes == 0) fail("training: found documents without text, expected text");
  all.words = std::move(tables[0]);
  for (size_t t = 1; t < tables.size(); t++) all.words.merge(std::exchange(tables[t], {}));
  return all;
}

}  // namespace

Tokenizer train_tokenizer(const Corpus& corpus, int vocab_size, const std::string& pattern) {
  constexpr int kSmallest = 256 + kSpecials;
  require(vocab_size >= kSmallest && vocab_size <= 1 << 24, "--vocab-size: found ", vocab_size,
          ", expected ", kSmallest, " (256 bytes and ", kSpecials, " special tokens) to ", 1 << 24);
  auto data = std::make_shared<TokenizerData>();
  data->pattern = parse_pattern(pattern);
  ConsoleLog log(corpus.quiet);
  const CountedPieces pieces = count_pieces(corpus, data->pattern, log);
  const std::string size_text = bytes_text(double(pieces.bytes));
  log.note(format("%lld documents, %s, %zu distinct pieces", (long long)pieces.documents,
                  size_text.c_str(), pieces.words.size()));

  Trainer trainer(pieces.words);
  const int merges = vocab_size - kSmallest;
  for (int left, right; data->merges.size() < 256 + merges && trainer.best(left, right);) {
    const int token = data->merges.add(left, right);
    trainer.merge(left, right, token);
    if (token % 64 == 0) log.progress(format("merging: %d of %d", token - 255, merges));
  }
  for (int t = 0; t < data->merges.size(); t++) data->ids.push_back(t);
  for (int i = 0; i < kSpecials; i++) {
    data->specials.push_back({kSpecialTokens[i], data->merges.size() + i});
  }
  data->complete("training");

  const int size = data->merges.size() + kSpecials;
  if (size < vocab_size) {
    log.note(format("the text has pairs for only %d of the %d tokens asked for", size, vocab_size));
  }
  log.progress(
      format("trained %d tokens on %lld documents, %s: %.3f bytes a token there, %s", size,
             (long long)pieces.documents, size_text.c_str(),
             double(pieces.bytes) / double(trainer.tokens()), log.rate(pieces.bytes).c_str()),
      true);
  return Tokenizer(data);
}

// ---------------------------------------------------------------------------------------------
// Encoding

namespace {

// Whether tokens `a` and `b` can be neighbours once all merges are done. Undoes the merges of both,
// the latest first, and looks for a merge that joins the two parts at the border. If that merge
// comes before the one undone last, it would have happened instead: the answer is no. If only bytes
// are left, it is yes. `limit`: a merge across the border with a rank below it would have come
// first. Of two merges with equal ranks the left one comes first.
bool Merges::can_neighbour(int a, int b) const {
  int limit = std::numeric_limits<int>::max();
  for (;;) {
    const int across = pairs_.find(pair_key(a, b));
    if (across >= 0 && across < limit) return false;
    if (a < 256 && b < 256) return true;
    if (a > b) {
      limit = a, a = parts(a).second;
    } else {
      limit = b + 1, b = parts(b).first;
    }
  }
}

// The longest token that `text` begins with.
int Merges::longest(std::string_view text) const {
  int node = static_cast<unsigned char>(text[0]), best = node;
  for (size_t i = 1; i < text.size(); i++) {
    node = edges_.find(edge(node, text[i]));
    if (node < 0) break;
    if (node_token_[size_t(node)] >= 0) best = node_token_[size_t(node)];
  }
  return best;
}

// The tokens of one piece, in time linear in its length, by backtracking: append the longest token
// that can follow the last one. If none can, no encoding has a border at this position: mark it,
// remove the last token and try a shorter one in its place.
void Merges::encode(std::string_view piece, Scratch& scratch) const {
  std::vector<int>& tokens = scratch.tokens;
  std::vector<uint64_t>& possible = scratch.possible;
  tokens.clear();
  possible.assign(piece.size() / 64 + 1, ~uint64_t(0));
  int token = longest(piece);
  for (size_t begin = 0; begin < piece.size();) {
    const size_t end = begin + size_t(length(token));
    if ((possible[end / 64] >> (end % 64) & 1) &&
        (tokens.empty() || can_neighbour(tokens.back(), token))) {
      tokens.push_back(token);
      begin = end;
      if (begin < piece.size()) token = longest(piece.substr(begin));
    } else if (length(token) > 1) {
      token = longest(piece.substr(begin, size_t(length(token)) - 1));
    } else {
      possible[begin / 64] &= ~(uint64_t(1) << (begin % 64));
      token = tokens.back();
      tokens.pop_back();
      begin -= size_t(length(token));
    }
  }
}

std::string to_nfc(std::string_view text);  // Normalization Form C, below

// Text below U+0300 is in Normalization Form C already: nothing there combines.
bool is_plain_nfc(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c < 0xCC; });
}

// Encodes texts. Every thread has its own, because it has a cache: most pieces of a text are words
// that occurred before. The cache is direct-mapped, with one cache line for a piece and its ids.
class Encoder {
 public:
  Encoder(const TokenizerData& data, bool with_cache)
      : data_(data), cache_(with_cache ? kLines : 0) {}

  // Appends the ids of text[0, end); for_each_piece says why `text` goes on.
  void encode(std::string_view text, size_t end, std::vector<int>& ids) {
    if (!data_.nfc || is_plain_nfc(text)) return encode_normal(text, end, ids);
    std::string normal = to_nfc(text.substr(0, end));
    const size_t normal_end = normal.size();
    normal += text.substr(end, 2);  // ASCII, as is_safe_cut has it
    encode_normal(normal, normal_end, ids);
  }

 private:
  static constexpr size_t kLines = 1 << 15, kMaxBytes = 30, kMaxIds = 8;
  struct alignas(64) Line {
    uint8_t bytes = 0, ids = 0;
    char text[kMaxBytes];
    int id[kMaxIds];
  };

  void encode_normal(std::string_view text, size_t end, std::vector<int>& ids) {
    for_each_piece(text, end, data_.pattern, [&](std::string_view piece) {
      const uint64_t hash = piece_hash(piece);
      if (cache_.empty() || piece.size() > kMaxBytes) return encode_piece(piece, hash, ids);
      Line& line = cache_[hash % kLines];
      if (line.bytes != piece.size() || std::memcmp(line.text, piece.data(), piece.size()) != 0) {
        const size_t before = ids.size();
        encode_piece(piece, hash, ids);
        const size_t n = ids.size() - before;
        if (n > kMaxIds) return;
        line.bytes = uint8_t(piece.size()), line.ids = uint8_t(n);
        std::memcpy(line.text, piece.data(), piece.size());
        std::copy(ids.end() - int64_t(n), ids.end(), line.id);
        return;
      }
      ids.insert(ids.end(), line.id, line.id + line.ids);
    });
  }

  // A token that merges can make encodes to itself, so that most pieces need one look-up.
  void encode_piece(std::string_view piece, uint64_t hash, std::vector<int>& ids) {
    const int whole = data_.whole_pieces.find(hash);
    if (whole >= 0 && data_.bytes[size_t(whole)] == piece) return ids.push_back(whole);
    data_.merges.encode(piece, scratch_);
    for (const int token : scratch_.tokens) ids.push_back(data_.ids[size_t(token)]);
  }

  const TokenizerData& data_;
  std::vector<Line> cache_;
  Merges::Scratch scratch_;
};

// The offset and name of the first special token in text[begin, ...), the longest one at its place;
// the text's end and nullptr when there is none.
std::pair<size_t, const std::string*> find_special(const TokenizerData& data, std::string_view text,
                                                   size_t begin) {
  std::array<bool, 256> can_begin{};
  for (const auto& [name, id] : data.specials)
    can_begin[static_cast<unsigned char>(name[0])] = true;
  for (; begin < text.size(); begin++) {
    if (!can_begin[static_cast<unsigned char>(text[begin])]) continue;
    const std::string* longest = nullptr;
    for (const auto& [name, id] : data.specials) {
      if (longest && longest->size() >= name.size()) continue;
      if (text.substr(begin).starts_with(name)) longest = &name;
    }
    if (longest) return {begin, longest};
  }
  return {text.size(), nullptr};
}

}  // namespace

void Tokenizer::encode(std::string_view text, std::vector<int>& ids, bool allow_special) const {
  Encoder encoder(*data_, text.size() > 1 << 16);  // the cache pays for itself in long texts
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.size();
    const std::string* special = nullptr;
    if (allow_special) std::tie(end, special) = find_special(*data_, text, begin);
    encoder.encode(text.substr(begin, end - begin), end - begin, ids);
    if (special) ids.push_back(data_->special_ids.at(*special));
    begin = end + (special ? special->size() : 0);
  }
}

std::vector<int> Tokenizer::encode(std::string_view text, bool allow_special) const {
  std::vector<int> ids;
  encode(text, ids, allow_special);
  return ids;
}

std::string Tokenizer::decode(std::span<const int> ids) const {
  std::string text;
  for (const int id : ids) {
    require(id >= 0 && id < vocab_size(), "decode: found token ", id, ", expected 0 to ",
            vocab_size() - 1);
    text += data_->bytes[size_t(id)];
  }
  return text;
}

int Tokenizer::vocab_size() const { return int(data_->bytes.size()); }

std::string_view Tokenizer::token_bytes(int id) const {
  return id >= 0 && id < vocab_size() ? std::string_view(data_->bytes[size_t(id)])
                                      : std::string_view();
}

bool Tokenizer::is_special(int id) const { return id >= 0 && special(token_bytes(id)) == id; }

int Tokenizer::special(std::string_view name) const {
  const auto it = data_->special_ids.find(std::string(name));
  return it == data_->special_ids.end() ? -1 : it->second;
}

int Tokenizer::end_of_text() const {
  const int id = special("<|endoftext|>");
  if (id < 0) fail("tokenizer: <|endoftext|> is missing among its special tokens");
  return id;
}

uint64_t Tokenizer::hash() const { return data_->hash; }

std::vector<std::string_view> Tokenizer::pieces(std::string_view text) const {
  std::vector<std::string_view> all;
  for_each_piece(text, text.size(), data_->pattern, [&](auto piece) { all.push_back(piece); });
  return all;
}

DataInfo encode_corpus(const Corpus& corpus, const Tokenizer& tokenizer,
                       const std::filesystem::path& tokenizer_path,
                       const std::filesystem::path& prefix) {
  check_corpus(corpus);
  namespace fs = std::filesystem;
  DataInfo info;
  info.hash = tokenizer.hash();
  info.vocab_size = tokenizer.vocab_size();
  info.tokenizer = fs::absolute(tokenizer_path)
                       .lexically_normal()
                       .lexically_proximate(fs::absolute(prefix).lexically_normal().parent_path())
                       .string();
  const int end_of_text = tokenizer.end_of_text();
  ShardWriter train(prefix, "train", info.vocab_size, info.hash);
  ShardWriter val(prefix, "val", info.vocab_size, info.hash);

  ConsoleLog log(corpus.quiet);
  std::vector<Encoder> encoders(size_t(corpus.threads), Encoder(tokenizer.data(), true));
  std::vector<std::vector<int>> ids;  // of each chunk
  for_each_batch(corpus, "encoding", log, [&](const TextBatch& batch) {
    if (ids.size() < batch.chunks.size()) ids.resize(batch.chunks.size());
    parallel_for(batch.chunks.size(), corpus.threads, [&](size_t i, size_t thread) {
      const Chunk& c = batch.chunks[i];
      ids[i].clear();
      if (c.begins_document) ids[i].push_back(end_of_text);
      encoders[thread].encode(batch.text_of(c), c.size(), ids[i]);
    });
    for (size_t i = 0; i < batch.chunks.size(); i++) {
      const Chunk& c = batch.chunks[i];
      DataInfo::Split& split = c.is_validation ? info.val : info.train;
      (c.is_validation ? val : train).append(ids[i]);
      split.documents += c.begins_document;
      split.bytes += int64_t(c.size());
      split.tokens += int64_t(ids[i].size());
    }
  });
  require(info.train.tokens + info.val.tokens > 0,
          "encoding: found documents without text, expected text");
  train.finish();
  val.finish();
  write_data_info(prefix, info);
  for (const auto& [name, split] : {std::pair("train", info.train), std::pair("val", info.val)}) {
    log.note(format("%s: %lld documents, %lld bytes, %lld tokens, %.3f bytes a token", name,
                    (long long)split.documents, (long long)split.bytes, (long long)split.tokens,
                    double(split.bytes) / double(std::max<int64_t>(1, split.tokens))));
  }
  log.progress(
      "encoded into " + prefix.string() + "_*.bin, " + log.rate(info.train.bytes + info.val.bytes),
      true);
  return info;
}

// ---------------------------------------------------------------------------------------------
// Reading a corpus

namespace {

// Whether a piece ends between text[i-1] and text[i] in every pattern, whatever surrounds them:
// behind a newline before a visible ASCII character (o200k would keep a slash), and between a
// letter and a space that a letter follows. NFC joins nothing across such a place either.
bool is_safe_cut(std::string_view text, size_t i) {
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  if (i == 0 || i + 1 >= text.size()) return false;
  const char before = text[i - 1], after = text[i];
  if (before == '\n') return after > ' ' && after < '\x7f' && after != '/';
  return after == ' ' && letter(before) && letter(text[i + 1]);
}

// Of the first 64 KiB of a document, which is to say of all of most documents.
uint64_t document_hash(std::string_view document) {
  return piece_hash(document.substr(0, 1 << 16));
}

// The part of the corpus that is kept for validation.
//   one document:       its last `fraction`, from the next line on
//   2 to 64 documents:  those with the smallest hashes; their number is the nearest to the
//   fraction,
//                       but at least one and not all
//   more documents:     those whose hash is below the fraction of 2^64
class ValidationSplit {
 public:
  static constexpr size_t kFew = 64;

  ValidationSplit(const std::vector<Input>& inputs, double fraction) {
    require(fraction >= 0 && fraction < 1, "--val-fraction: found ", fraction,
            ", expected 0 or more and less than 1");
    if (fraction == 0) return;
    std::set<uint64_t> hashes;
    size_t documents = 0;
    DocumentReader reader(inputs);
    for (DocumentPart part; documents <= kFew && reader.next(part);) {
      if (!part.begins || part.text.empty()) continue;
      documents++;
      hashes.insert(document_hash(part.text));
      if (!part.ends) reader.skip_document();
    }
    if (documents == 1) {
      find_tail(inputs, fraction);
    } else if (documents > kFew) {
      threshold_ = uint64_t(std::ldexp(fraction, 63)) << 1;
    } else if (hashes.size() < 2) {
      fail("--val-fraction: found ", documents,
           " documents, expected at least two different ones, or a single one to cut");
    } else {
      const int64_t n = int64_t(hashes.size());
      const int64_t chosen = std::clamp<int64_t>(std::llround(fraction * double(n)), 1, n - 1);
      threshold_ = *std::next(hashes.begin(), chosen);
    }
  }

  bool has_tail() const { return tail_ > 0; }
  int64_t tail() const { return tail_; }  // byte of the only document at which validation begins
  bool is_validation(std::string_view document) const {
    return document_hash(document) < threshold_;
  }

 private:
  void find_tail(const std::vector<Input>& inputs, double fraction) {
    int64_t bytes = 0;
    DocumentReader counter(inputs);
    for (DocumentPart part; counter.next(part);) bytes += int64_t(part.text.size());
    const int64_t wanted = bytes - int64_t(double(bytes) * fraction);
    std::string near;  // the bytes from `wanted` on
    int64_t offset = 0;
    DocumentReader reader(inputs);
    for (DocumentPart part; near.size() < 4096 && reader.next(part);) {
      const int64_t skip = std::clamp<int64_t>(wanted - offset, 0, int64_t(part.text.size()));
      near += part.text.substr(size_t(skip), 4096 - near.size());
      offset += int64_t(part.text.size());
    }
    const size_t newline = near.find('\n');
    size_t cut = 0;
    if (newline != std::string::npos && wanted + int64_t(newline) + 1 < bytes) {
      cut = newline + 1;
    } else {
      while (cut < near.size() && (near[cut] & 0xC0) == 0x80) cut++;
    }
    tail_ = wanted + int64_t(cut);
    require(tail_ > 0 && tail_ < bytes, "--val-fraction: found ", fraction, " of ", bytes,
            " bytes, expected at least one byte on each side");
  }

  int64_t tail_ = 0;
  uint64_t threshold_ = 0;
};

// Cuts documents into chunks, and a document that is longer than a batch into stretches.
class CorpusReader {
 public:
  CorpusReader(const std::vector<Input>& inputs, const ValidationSplit& split)
      : reader_(inputs), split_(split) {}

  // The next batch: whole documents, and of a long one the text up to the last safe cut.
  bool next(TextBatch& batch) {
    batch.text.swap(rest_);
    rest_.clear();
    const size_t wanted = 2 * batch.text.size() + kBatchBytes;
    batch.chunks.clear();
    stretch_ = 0;
    for (DocumentPart part; batch.text.size() < wanted && reader_.next(part);) add(part, batch);
    if (open_) defer_rest(batch);
    return !batch.chunks.empty() || open_;
  }

 private:
  static constexpr size_t kBatchBytes = 16 << 20, kChunkBytes = 128 << 10;

  void add(DocumentPart part, TextBatch& batch) {
    if (part.begins) {
      begin_document(batch, !split_.has_tail() && split_.is_validation(part.text));
      offset_ = 0;
    }
    const int64_t size = int64_t(part.text.size());
    if (split_.has_tail() && offset_ <= split_.tail() && split_.tail() < offset_ + size) {
      const size_t cut = size_t(split_.tail() - offset_);
      batch.text += part.text.substr(0, cut);
      end_document(batch);
      begin_document(batch, true);
      part.text.remove_prefix(cut);
    }
    offset_ += size;
    batch.text += part.text;
    if (part.ends) end_document(batch);
  }

  void begin_document(const TextBatch& batch, bool validation) {
    open_ = begins_ = true;
    validation_ = validation;
    stretch_ = batch.text.size();
  }
  void end_document(TextBatch& batch) {
    add_chunks(batch, batch.text.size());
    open_ = false;
  }

  // Leaves the text of an unfinished document behind the last safe cut to the next batch.
  void defer_rest(TextBatch& batch) {
    size_t cut = batch.text.size();
    while (cut > stretch_ && !is_safe_cut(batch.text, cut)) cut--;
    if (cut > stretch_) add_chunks(batch, cut);
    rest_ = batch.text.substr(cut);
  }

  // Appends chunks for [stretch_, end): about kChunkBytes each, cut where it is safe.
  void add_chunks(TextBatch& batch, size_t end) {
    const std::string_view text = batch.text;
    for (size_t begin = stretch_; begin < end;) {
      size_t cut = std::min(end, begin + kChunkBytes);
      while (cut < end && !is_safe_cut(text, cut)) cut++;
      batch.chunks.push_back({begin, cut, text.size(), std::exchange(begins_, false), validation_});
      begin = cut;
    }
    stretch_ = end;
  }

  DocumentReader reader_;
  const ValidationSplit& split_;
  std::string rest_;    // text of the open document for the next batch
  size_t stretch_ = 0;  // where the text of the open document that is in no chunk yet begins
  int64_t offset_ = 0;  // bytes of the open document so far
  bool open_ = false, begins_ = false, validation_ = false;
};

void check_corpus(const Corpus& corpus) {
  if (corpus.inputs.empty()) fail("found no inputs, expected text, JSON lines, WET or parquet");
  if (corpus.threads < 1) fail("--threads: found ", corpus.threads, ", expected 1 or more");
}

void for_each_batch(const Corpus& corpus, const char* verb, ConsoleLog& log,
                    const std::function<void(const TextBatch&)>& process) {
  std::vector<Input> inputs = expand_folders(corpus.inputs);
  std::vector<SpooledInput> copies;  // of standard input: a split reads the inputs first
  if (corpus.val_fraction > 0) {
    for (Input& input : inputs) copies.emplace_back(input);
  }
  const ValidationSplit split(inputs, corpus.val_fraction);
  CorpusReader reader(inputs, split);
  int64_t bytes = 0;
  for (TextBatch batch; reader.next(batch);) {
    process(batch);
    for (const Chunk& c : batch.chunks) bytes += int64_t(c.size());
    log.progress(concat(verb, ": ", bytes_text(double(bytes)), ", ", log.rate(bytes)));
  }
}

// ---------------------------------------------------------------------------------------------
// Writing tokenizer.json

// The files of Hugging Face and GPT-2 spell each byte as a printable character: most of Latin-1 as
// itself, the other 68 bytes, in order, as U+0100 and the characters behind it.
std::array<uint32_t, 256> byte_characters() {
  std::array<uint32_t, 256> code{};
  uint32_t next = 0x100;
  for (uint32_t b = 0; b < 256; b++) {
    const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    code[b] = itself ? b : next++;
  }
  return code;
}

std::string spell(std::string_view bytes) {
  static const std::array<uint32_t, 256> code = byte_characters();
  std::string text;
  for (const unsigned char b : bytes) append_utf8(text, code[b]);
  return text;
}

// The bytes of a spelling; false when a character spells none.
bool unspell(std::string_view text, std::string& bytes) {
  static const FlatMap byte_of = [] {
    FlatMap map;
    const std::array<uint32_t, 256> code = byte_characters();
    for (int b = 0; b < 256; b++) map[code[size_t(b)]] = b;
    return map;
  }();
  bytes.clear();
  for (size_t i = 0; i < text.size();) {
    const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
    const int b = byte_of.find(c.code);
    if (b < 0) return false;
    bytes += char(b);
    i += size_t(c.bytes);
  }
  return true;
}

std::string quoted(const std::string& text) { return Json(text).dump(); }

OrderedJson byte_level_json(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

OrderedJson pre_tokenizer_json(Pattern pattern) {
  if (pattern == Pattern::gpt2) return byte_level_json(true);
  const bool digits = pattern == Pattern::gpt2_digits;
  const OrderedJson split =
      digits ? OrderedJson{{"type", "Digits"}, {"individual_digits", true}}
             : OrderedJson{{"type", "Split"},
                           {"pattern", OrderedJson{{"Regex", pattern_info(pattern).regex}}},
                           {"behavior", "Isolated"},
                           {"invert", false}};
  return {{"type", "Sequence"},
          {"pretokenizers", OrderedJson::array({split, byte_level_json(digits)})}};
}

// The items as lines of a JSON list or object.
std::string json_lines(const std::vector<std::string>& items, const std::string& indent) {
  std::string out;
  for (const std::string& item : items) out += (out.empty() ? "\n" : ",\n") + indent + item;
  return out;
}

std::vector<std::string> added_tokens(const TokenizerData& data) {
  std::vector<std::string> items;
  for (const auto& [name, id] : data.specials) {
    items.push_back(concat(R"({"id":)", id, R"(,"content":)", quoted(name),
                           R"(,"single_word":false,"lstrip":false,"rstrip":false,)",
                           R"("normalized":false,"special":true})"));
  }
  return items;
}

// Special tokens are in the vocabulary too. Otherwise Hugging Face numbers them from the size of
// the vocabulary on, which is wrong where ids have holes.
std::vector<std::string> vocabulary(const TokenizerData& data) {
  std::vector<std::string> items;
  for (size_t id = 0; id < data.bytes.size(); id++) {
    const std::string& bytes = data.bytes[id];
    if (bytes.empty()) continue;
    const auto special = data.special_ids.find(bytes);
    const bool is_special = special != data.special_ids.end() && special->second == int(id);
    items.push_back(quoted(is_special ? bytes : spell(bytes)) + ": " + std::to_string(id));
  }
  return items;
}

std::vector<std::string> merge_list(const Merges& merges) {
  std::vector<std::string> items;
  for (int t = 256; t < merges.size(); t++) {
    const auto [left, right] = merges.parts(t);
    items.push_back(quoted(spell(merges.bytes(left)) + " " + spell(merges.bytes(right))));
  }
  return items;
}

std::string tokenizer_json(const TokenizerData& data) {
  constexpr const char* kForm = R"({
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [%s
  ],
  "normalizer": %s,
  "pre_tokenizer": %s,
  "post_processor": null,
  "decoder": %s,
  "model": {
    "type": "BPE",
    "dropout": null,
    "unk_token": null,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": %s,
    "vocab": {%s
    },
    "merges": [%s
    ]
  }
}
)";
  return format(kForm, json_lines(added_tokens(data), "    ").c_str(),
                data.nfc ? R"({"type":"NFC"})" : "null",
                pre_tokenizer_json(data.pattern).dump().c_str(),
                byte_level_json(true).dump().c_str(), data.ignore_merges ? "true" : "false",
                json_lines(vocabulary(data), "      ").c_str(),
                json_lines(merge_list(data.merges), "      ").c_str());
}

std::string tokenizer_config_json(const TokenizerData& data) {
  OrderedJson config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                        {"add_prefix_space", false},
                        {"clean_up_tokenization_spaces", false}};
  if (data.special_ids.count("<|endoftext|>")) {
    for (const char* role : {"bos_token", "eos_token", "pad_token"}) config[role] = "<|endoftext|>";
  }
  if (data.special_ids.count("<|im_end|>")) config["chat_template"] = kChatTemplate;
  return config.dump(2) + "\n";
}

}  // namespace

void Tokenizer::save(const std::filesystem::path& directory) const {
  std::filesystem::create_directories(directory);
  const TokenizerData& d = *data_;
  write_file(directory / "tokenizer_config.json",
             d.config.empty() ? tokenizer_config_json(d) : d.config);
  write_file(directory / "tokenizer.json", d.json.empty() ? tokenizer_json(d) : d.json);
}

Tokenizer with_chat_tokens(const Tokenizer& tokenizer, bool add) {
  auto data = std::make_shared<TokenizerData>(tokenizer.data());
  TokenizerData& d = *data;
  for (const char* name : kSpecialTokens) {
    if (!add || d.special_ids.count(name)) continue;
    d.specials.push_back({name, int(d.bytes.size())});
    d.add_token(int(d.bytes.size()), name);
    d.json.clear();  // the file that was read lacks this token
  }
  for (const auto& [name, id] : d.specials) d.bytes[size_t(id)].clear();  // complete() adds them
  d.special_ids.clear();
  d.complete("tokenizer");
  const std::string fresh = tokenizer_config_json(d);
  if (d.config.empty()) {
    d.config = fresh;
  } else {
    auto config = parse_json<OrderedJson>(d.config, "tokenizer_config.json");
    if (!config.is_object()) fail("tokenizer_config.json: not a JSON object");
    const auto old = config.find("chat_template");
    if (old == config.end() || *old != kChatTemplate) {
      config["chat_template"] = kChatTemplate;
      d.config = config.dump(2) + "\n";
    }
  }
  return Tokenizer(data);
}

// ---------------------------------------------------------------------------------------------
// Reading tokenizer.json

namespace {

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
    return {array().at(index).value(), file, key + "[" + std::to_string(index) + "]"};
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
    if (x < 0 || x > 1 << 24) refuse("0 to 16777216");
    return int(x);
  }
  bool flag(const char* name, bool fallback) const {
    return has(name) ? member(name).as<bool>("true or false") : fallback;
  }
};

// SentencePiece's models spell spaces with U+2581 and fall back to bytes. That is another
// algorithm.
[[noreturn]] void refuse_kind(const JsonNode& node, std::string_view kind) {
  fail(
      node.where(), ": found ", kind,
      ", expected byte-level BPE: tokenizers of the SentencePiece, WordPiece and Unigram kinds are "
      "not supported");
}

void check_model(const JsonNode& model) {
  const std::string_view type =
      model.has("type") ? model.member("type").string() : std::string_view("BPE");  // older files
  if (type != "BPE") refuse_kind(model.member("type"), type);
  if (model.flag("byte_fallback", false)) refuse_kind(model, "\"byte_fallback\": true");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(key) && !model.member(key).string().empty()) model.member(key).refuse("null");
  }
  if (model.has("dropout") && model.member("dropout").as<double>("a number") != 0) {
    model.member("dropout").refuse("null");
  }
}

bool read_normalizer(const JsonNode& root) {  // true: NFC
  if (!root.has("normalizer")) return false;
  JsonNode node = root.member("normalizer");
  if (node.member("type").string() == "Sequence") {
    const JsonNode list = node.member("normalizers");
    if (list.array().size() == 0) return false;
    if (list.array().size() == 1) node = list.item(0);
  }
  const std::string_view type = node.member("type").string();
  if (type == "Prepend" || type == "Replace" || type == "Precompiled" || type == "Sequence") {
    refuse_kind(node, type);
  }
  if (type != "NFC") node.member("type").refuse("NFC or no normalizer");
  return true;
}

// The pattern with a plain quantifier in place of every possessive one. In the patterns known here
// both kinds match the same.
std::string without_possessive(std::string_view regex) {
  std::string out;
  for (const char c : regex) {
    const size_t n = out.size();
    const bool counted = n > 1 && out[n - 1] == '}' && out[n - 2] >= '0' && out[n - 2] <= '9';
    if (c == '+' && n > 0 && (counted || std::string_view("+*?").find(out[n - 1]) < 3)) continue;
    out += c;
  }
  return out;
}

Pattern read_pattern(const JsonNode& root) {
  require(root.has("pre_tokenizer"), root.where(),
          ": pre_tokenizer: found null, expected ByteLevel, or Split and ByteLevel");
  const JsonNode node = root.member("pre_tokenizer");
  const auto check_byte_level = [](const JsonNode& n, bool use_regex) {
    const std::string_view type = n.member("type").string();
    if (type == "Metaspace") refuse_kind(n, type);
    if (type != "ByteLevel") n.member("type").refuse("ByteLevel");
    if (n.flag("add_prefix_space", true)) n.refuse("\"add_prefix_space\": false");
    if (n.flag("use_regex", true) != use_regex) {
      n.refuse(concat("\"use_regex\": ", use_regex ? "true" : "false"));
    }
  };
  if (node.member("type").string() != "Sequence")
    return check_byte_level(node, true), Pattern::gpt2;
  const JsonNode list = node.member("pretokenizers");
  if (list.array().size() != 2) list.refuse("Split or Digits, then ByteLevel");
  const JsonNode split = list.item(0), byte_level = list.item(1);
  if (split.member("type").string() == "Digits") {
    if (!split.flag("individual_digits", false)) split.refuse("\"individual_digits\": true");
    return check_byte_level(byte_level, true), Pattern::gpt2_digits;
  }
  if (split.member("type").string() != "Split") split.member("type").refuse("Split or Digits");
  check_byte_level(byte_level, false);
  if (split.member("behavior").string() != "Isolated")
    split.member("behavior").refuse("\"Isolated\"");
  if (split.flag("invert", false)) split.refuse("\"invert\": false");
  const JsonNode regex = split.member("pattern").member("Regex");
  for (const PatternInfo& known : kPatterns) {
    if (known.regex[0] && without_possessive(regex.string()) == known.regex) return known.pattern;
  }
  regex.refuse("the pattern of gpt2, cl100k, qwen2 or o200k");
}

void read_added_tokens(const JsonNode& root, TokenizerData& data) {
  if (!root.has("added_tokens")) return;
  const JsonNode list = root.member("added_tokens");
  for (size_t i = 0; i < list.array().size(); i++) {
    const JsonNode token = list.item(i);
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      if (token.flag(key, false)) token.refuse(concat("\"", key, "\": false"));
    }
    data.specials.push_back(
        {std::string(token.member("content").string()), token.member("id").id()});
  }
}

// The id of each spelling, without the added tokens. The views last as long as the parser.
using Vocabulary = std::unordered_map<std::string_view, int>;

Vocabulary read_vocabulary(const JsonNode& model, TokenizerData& data) {
  std::set<std::string_view> added;
  for (const auto& [name, id] : data.specials) added.insert(name);
  Vocabulary id_of;
  const JsonNode vocab = model.member("vocab");
  std::string bytes;
  for (const auto& [key, value] : vocab.object()) {
    if (added.count(key)) continue;
    const int id = JsonNode{value, vocab.file, "model.vocab"}.id();
    if (!unspell(key, bytes) || bytes.empty()) {
      fail(vocab.where(), ": found ", key, ", expected a spelling by ByteLevel's characters");
    }
    if (size_t(id) < data.bytes.size() && !data.bytes[size_t(id)].empty()) {
      fail(vocab.where(), ": found id ", id, " twice, the second time for ", key);
    }
    data.add_token(id, bytes);
    id_of[key] = id;
  }
  return id_of;
}

// "left right" or ["left", "right"].
bool split_merge(const JsonElement& merge, std::string_view& left, std::string_view& right) {
  if (merge.is_array()) {
    const simdjson::dom::array pair = merge.get_array();
    return pair.size() == 2 && !pair.at(0).get(left) && !pair.at(1).get(right);
  }
  std::string_view text;
  if (merge.get(text)) return false;
  const size_t space = text.find(' ');
  if (space == std::string_view::npos) return false;
  left = text.substr(0, space), right = text.substr(space + 1);
  return true;
}

// Fills `merges` and `ids`. Files that were made from tiktoken's list every way to split a token.
// Of these merges only the first one that can happen counts.
void read_merges(const JsonNode& model, const Vocabulary& id_of, TokenizerData& data) {
  std::vector<int> token_of(data.bytes.size(), -1);  // by id
  for (int b = 0; b < 256; b++) {
    const auto it = id_of.find(spell(std::string(1, char(b))));
    if (it == id_of.end()) {
      fail(model.where(), ".vocab: byte ", b, " has no token, expected all 256 bytes");
    }
    data.ids.push_back(it->second);
    token_of[size_t(it->second)] = b;
  }
  struct Merge {
    int number, left, right, joined;  // ids
  };
  std::vector<Merge> early;  // those that come before the merge of one of their parts
  int number = 0;
  std::string joined;
  const JsonNode list = model.member("merges");
  for (const JsonElement e : list.array()) {
    std::string_view left, right;
    const bool good = split_merge(e, left, right);
    joined.assign(left).append(right);
    const auto l = id_of.find(left), r = id_of.find(right), j = id_of.find(joined);
    if (!good || l == id_of.end() || r == id_of.end() || j == id_of.end()) {
      list.item(size_t(number))
          .refuse("two tokens such that the vocabulary holds both and their concatenation");
    }
    const int a = token_of[size_t(l->second)], b = token_of[size_t(r->second)];
    if (a < 0 || b < 0) {
      early.push_back({number, l->second, r->second, j->second});
    } else if (token_of[size_t(j->second)] < 0 && data.merges.can_neighbour(a, b)) {
      token_of[size_t(j->second)] = data.merges.add(a, b);
      data.ids.push_back(j->second);
    }
    number++;
  }
  for (const Merge& m : early) {  // harmless when another merge made the token before its parts
    const int last = std::max(token_of[size_t(m.left)], token_of[size_t(m.right)]);
    const int joined = token_of[size_t(m.joined)];
    const bool both = token_of[size_t(m.left)] >= 0 && token_of[size_t(m.right)] >= 0;
    if (both && (joined < 0 || joined > last)) {
      list.item(size_t(m.number)).refuse("a merge that comes after the merges of its two parts");
    }
  }
}

std::shared_ptr<TokenizerData> read_tokenizer_json(const std::filesystem::path& path) {
  auto data = std::make_shared<TokenizerData>();
  data->json = read_file(path);
  simdjson::dom::parser parser;
  JsonElement element;
  if (const auto error = parser.parse(data->json).get(element)) {
    fail(path.string(), ": not JSON: ", simdjson::error_message(error));
  }
  const JsonNode root{element, path.string(), ""};
  root.object();
  const JsonNode model = root.member("model");
  check_model(model);
  data->nfc = read_normalizer(root);
  data->pattern = read_pattern(root);
  data->ignore_merges = model.flag("ignore_merges", false);
  read_added_tokens(root, *data);
  read_merges(model, read_vocabulary(model, *data), *data);
  data->complete(path.string());
  const std::filesystem::path config = path.parent_path() / "tokenizer_config.json";
  if (std::filesystem::exists(config)) data->config = read_file(config);
  return data;
}

// ---------------------------------------------------------------------------------------------
// Reading .tiktoken and vocab.bpe

std::string decode_base64(std::string_view spelling, const std::string& where) {
  static constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string_view text = spelling;
  std::string out;
  uint32_t bits = 0;
  int n = 0;
  while (!text.empty() && text.back() == '=') text.remove_suffix(1);
  for (const char c : text) {
    const size_t value = kDigits.find(c);
    if (value == kDigits.npos) fail(where, ": found ", spelling, ", expected base64 and a rank");
    bits = bits << 6 | uint32_t(value);
    n += 6;
    if (n >= 8) n -= 8, out += char(bits >> n & 255);
  }
  return out;
}

// A .tiktoken file does not name its split pattern and its special tokens. The number of its ranks
// tells which vocabulary it is.
struct KnownVocabulary {
  size_t ranks;
  Pattern pattern;
  std::vector<std::pair<std::string, int>> specials;
};
const KnownVocabulary& find_vocabulary(size_t ranks, const std::string& file) {
  static const std::vector<KnownVocabulary> known = {
      {50256, Pattern::gpt2, {{"<|endoftext|>", 50256}}},
      {100256,
       Pattern::cl100k,
       {{"<|endoftext|>", 100257},
        {"<|fim_prefix|>", 100258},
        {"<|fim_middle|>", 100259},
        {"<|fim_suffix|>", 100260},
        {"<|endofprompt|>", 100276}}},
      {199998, Pattern::o200k, {{"<|endoftext|>", 199999}, {"<|endofprompt|>", 200018}}}};
  for (const KnownVocabulary& v : known) {
    if (v.ranks == ranks) return v;
  }
  fail(file, ": found ", ranks,
       " ranks, expected 50256 (r50k), 100256 (cl100k) or 199998 (o200k): the file does not say "
       "which split pattern another vocabulary needs");
}

// A line holds a token in base64, a space, and its rank. The result is in the order of the ranks.
std::vector<std::pair<int, std::string>> read_ranks(const std::string& path) {
  std::vector<std::pair<int, std::string>> ranks;
  LineReader lines{Input(path)};
  for (std::string_view line; lines.next(line);) {
    if (line.empty()) continue;
    const size_t space = line.find(' ');
    const std::string_view digits = space == std::string_view::npos ? "" : line.substr(space + 1);
    if (digits.empty() || digits.size() > 8 ||
        digits.find_first_not_of("0123456789") != std::string_view::npos) {
      fail(lines.where(), ": found ", line.substr(0, 80), ", expected base64 and a rank");
    }
    ranks.push_back(
        {std::stoi(std::string(digits)), decode_base64(line.substr(0, space), lines.where())});
  }
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

// The file holds tokens and their ranks, not the two parts of each token. Encoding a token's bytes
// with the merges before it gives its parts.
std::shared_ptr<TokenizerData> read_tiktoken(const std::filesystem::path& path) {
  const std::vector<std::pair<int, std::string>> ranks = read_ranks(path.string());
  const KnownVocabulary& known = find_vocabulary(ranks.size(), path.string());
  auto data = std::make_shared<TokenizerData>();
  data->pattern = known.pattern;
  data->specials = known.specials;
  data->ids.assign(256, -1);
  for (size_t i = 0; i < ranks.size(); i++) {
    const auto& [rank, bytes] = ranks[i];
    if (i > 0 && ranks[i - 1].first == rank) fail(path.string(), ": found rank ", rank, " twice");
    if (bytes.size() == 1) data->ids[static_cast<unsigned char>(bytes[0])] = rank;
  }
  for (int b = 0; b < 256; b++) {
    if (data->ids[size_t(b)] < 0) fail(path.string(), ": byte ", b, " has no rank");
  }
  Merges::Scratch scratch;
  for (const auto& [rank, bytes] : ranks) {
    if (bytes.size() == 1) continue;
    if (bytes.empty()) fail(path.string(), ": rank ", rank, ": found an empty token");
    data->merges.encode(bytes, scratch);
    if (scratch.tokens.size() != 2) {
      fail(path.string(), ": rank ", rank, ": found a token made of ", scratch.tokens.size(),
           " earlier tokens, expected 2");
    }
    data->merges.add(scratch.tokens[0], scratch.tokens[1]);
    data->ids.push_back(rank);
  }
  data->complete(path.string());
  return data;
}

// GPT-2's own file has one merge on each line. Its ids: bytes have 0 to 255 in the order of their
// spelling, then come the merges, then <|endoftext|>.
std::shared_ptr<TokenizerData> read_vocab_bpe(const std::filesystem::path& path) {
  auto data = std::make_shared<TokenizerData>();
  const std::array<uint32_t, 256> code = byte_characters();
  for (int b = 0; b < 256; b++) {
    data->ids.push_back(int(
        std::count_if(code.begin(), code.end(), [&](uint32_t c) { return c < code[size_t(b)]; })));
  }
  std::unordered_map<std::string, int> token_of;
  for (int b = 0; b < 256; b++) token_of[std::string(1, char(b))] = b;
  LineReader lines{Input(path.string())};
  for (std::string_view line; lines.next(line);) {
    if (line.empty() || (lines.number() == 1 && line.substr(0, 8) == "#version")) continue;
    const size_t space = line.find(' ');
    std::string left, right;
    if (space == std::string_view::npos || !unspell(line.substr(0, space), left) ||
        !unspell(line.substr(space + 1), right)) {
      fail(lines.where(), ": found ", line.substr(0, 80), ", expected a merge of two tokens");
    }
    const auto l = token_of.find(left), r = token_of.find(right);
    if (l == token_of.end() || r == token_of.end()) {
      fail(lines.where(), ": found ", line, ", expected tokens that earlier lines make");
    }
    if (token_of.count(left + right) || !data->merges.can_neighbour(l->second, r->second)) {
      fail(lines.where(), ": found ", line, ", a merge that can never happen");
    }
    token_of[left + right] = data->merges.add(l->second, r->second);
    data->ids.push_back(int(data->ids.size()));
  }
  if (data->merges.size() == 256) fail(path.string(), ": found no merges");
  data->specials = {{"<|endoftext|>", data->merges.size()}};
  data->complete(path.string());
  return data;
}

}  // namespace

std::filesystem::path Tokenizer::find(const std::filesystem::path& path) {
  std::filesystem::path file = path;
  if (std::filesystem::is_directory(path)) {
    file = path / "tokenizer.json";
    if (!std::filesystem::exists(file)) file = path / "model" / "tokenizer.json";
    if (!std::filesystem::exists(file)) {
      fail(path.string(), ": found no tokenizer.json in the directory");
    }
  }
  if (!std::filesystem::exists(file)) fail(file.string(), ": not found, expected a tokenizer");
  return file;
}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  const std::filesystem::path file = find(path);
  const std::string extension = file.extension().string();
  if (extension == ".json") return Tokenizer(read_tokenizer_json(file));
  if (extension == ".tiktoken") return Tokenizer(read_tiktoken(file));
  if (extension == ".bpe") return Tokenizer(read_vocab_bpe(file));
  fail(file.string(),
       ": found a file of another kind, expected a directory, tokenizer.json, "
       ".tiktoken or vocab.bpe");
}

namespace {

// ---------------------------------------------------------------------------------------------
// UTF-8

CodePoint decode_utf8(const char* text, size_t left) {
  const auto* p = reinterpret_cast<const unsigned char*>(text);
  const auto tail = [&](size_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
  const uint32_t a = p[0];
  if (a < 0x80) return {a, 1};
  if (a >= 0xC2 && a < 0xE0 && tail(1)) return {(a & 31) << 6 | (p[1] & 63u), 2};
  if (a >= 0xE0 && a < 0xF0 && tail(1) && tail(2)) {
    const uint32_t c = (a & 15) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    if (c >= 0x800 && (c < 0xD800 || c > 0xDFFF)) return {c, 3};
  }
  if (a >= 0xF0 && a < 0xF5 && tail(1) && tail(2) && tail(3)) {
    const uint32_t c = (a & 7) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    if (c >= 0x10000 && c <= 0x10FFFF) return {c, 4};
  }
  return {kInvalid + a, 1};
}

void append_utf8(std::string& out, uint32_t c) {
  const auto put = [&](uint32_t byte) { out += char(byte); };
  if (c >= kInvalid) return put(c - kInvalid);
  if (c < 0x80) return put(c);
  if (c < 0x800) return put(0xC0 | c >> 6), put(0x80 | (c & 63));
  if (c < 0x10000) {
    return put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 63)), put(0x80 | (c & 63));
  }
  put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 63)), put(0x80 | (c >> 6 & 63)), put(0x80 | (c & 63));
}

// ---------------------------------------------------------------------------------------------
// Normalization Form C, which Qwen's tokenizers ask for (Unicode Standard Annex 15).

class Nfc {
 public:
  Nfc() : combining_(0x110100) {
    std::set<uint32_t> excluded(std::begin(kCompositionExclusions),
                                std::end(kCompositionExclusions));
    for (size_t i = 0; i < std::size(kDecompositions); i += 3) {
      const uint32_t c = kDecompositions[i], a = kDecompositions[i + 1], b = kDecompositions[i + 2];
      parts_[c] = int(i);
      if (b != 0 && !excluded.count(c)) composed_[pair_key(int(a), int(b))] = int(c);
    }
    for (size_t i = 0; i < std::size(kCombiningRuns); i += 3) {
      for (uint32_t c = kCombiningRuns[i]; c <= kCombiningRuns[i + 1]; c++) {
        combining_[c] = uint8_t(kCombiningRuns[i + 2]);
      }
    }
  }

  std::string normalize(std::string_view text) const {
    std::vector<uint32_t> codes;
    for (size_t i = 0; i < text.size();) {
      const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
      decompose(c.code, codes);
      i += size_t(c.bytes);
    }
    sort_marks(codes);
    compose(codes);
    std::string out;
    out.reserve(text.size());
    for (const uint32_t c : codes) append_utf8(out, c);
    return out;
  }

 private:
  // Hangul syllables are arithmetic: leading consonant, vowel, trailing consonant.
  static constexpr uint32_t kSBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
  static constexpr uint32_t kLCount = 19, kVCount = 21, kTCount = 28;
  static constexpr uint32_t kSCount = kLCount * kVCount * kTCount;

  void decompose(uint32_t c, std::vector<uint32_t>& out) const {
    if (c - kSBase < kSCount) {
      const uint32_t s = c - kSBase;
      out.push_back(kLBase + s / (kVCount * kTCount));
      out.push_back(kVBase + s % (kVCount * kTCount) / kTCount);
      if (s % kTCount) out.push_back(kTBase + s % kTCount);
      return;
    }
    const int i = c < 0xC0 ? -1 : parts_.find(c);
    if (i < 0) return out.push_back(c);
    decompose(kDecompositions[i + 1], out);
    if (kDecompositions[i + 2]) decompose(kDecompositions[i + 2], out);
  }

  void sort_marks(std::vector<uint32_t>& codes) const {  // each run of marks, by class, stably
    const auto cc = [this](uint32_t c) { return combining_[c]; };
    for (size_t i = 0; i < codes.size(); i++) {
      if (cc(codes[i]) == 0) continue;
      size_t end = i;
      while (end < codes.size() && cc(codes[end]) != 0) end++;
      std::stable_sort(codes.begin() + int64_t(i), codes.begin() + int64_t(end),
                       [&](uint32_t a, uint32_t b) { return cc(a) < cc(b); });
      i = end;
    }
  }

  int compose_pair(uint32_t a, uint32_t b) const {  // -1: the two do not compose
    if (a - kLBase < kLCount && b - kVBase < kVCount) {
      return int(kSBase + ((a - kLBase) * kVCount + (b - kVBase)) * kTCount);
    }
    if (a - kSBase < kSCount && (a - kSBase) % kTCount == 0 && b - kTBase - 1 < kTCount - 1) {
      return int(a + (b - kTBase));
    }
    return composed_.find(pair_key(int(a), int(b)));
  }

  // A code point joins the last starter unless one between them has its class or a higher one.
  void compose(std::vector<uint32_t>& codes) const {
    size_t out = 0, starter = SIZE_MAX;
    int last = 0;  // class of the last code point of the result
    for (const uint32_t c : codes) {
      const int cc = combining_[c];
      const bool adjacent = starter != SIZE_MAX && starter + 1 == out;
      if (starter != SIZE_MAX && (adjacent || last < cc)) {
        const int joined = compose_pair(codes[starter], c);
        if (joined >= 0) {
          codes[starter] = uint32_t(joined);
          continue;
        }
      }
      if (cc == 0) starter = out;
      last = cc;
      codes[out++] = c;
    }
    codes.resize(out);
  }

  FlatMap parts_;                   // code point -> index into kDecompositions
  FlatMap composed_;                // pair of code points -> code point
  std::vector<uint8_t> combining_;  // class of a code point; 0: none, and for invalid bytes
};

std::string to_nfc(std::string_view text) {
  static const Nfc nfc;
  return nfc.normalize(text);
}

// ---------------------------------------------------------------------------------------------
// Command line

void print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

void decode_command(const Tokenizer& tokenizer, const std::vector<std::string>& words) {
  std::vector<int> ids;
  for (const std::string& word : words) {
    if (word.size() <= 9 && word.find_first_not_of("0123456789") == std::string::npos) {
      ids.push_back(std::stoi(word));
    } else {
      const Shard shard(word);
      for (int64_t i = 0; i < shard.size(); i++) ids.push_back(int(shard.id(i)));
    }
  }
  constexpr size_t kBlock = 1 << 20;
  for (size_t i = 0; i < ids.size(); i += kBlock) {
    print(tokenizer.decode(std::span(ids).subspan(i, std::min(kBlock, ids.size() - i))));
  }
  if (isatty(STDOUT_FILENO)) print("\n");
}

// A token as a reader can see it: control characters are escaped, and bytes that are only a part of
// a character are hexadecimal.
std::string visible(std::string_view token) {
  std::string out;
  for (size_t i = 0; i < token.size();) {
    const CodePoint c = decode_utf8(token.data() + i, token.size() - i);
    const char* name = c.code == '\n'   ? "\\n"
                       : c.code == '\r' ? "\\r"
                       : c.code == '\t' ? "\\t"
                                        : nullptr;
    const bool is_hidden = c.code < 32 || c.code == 127 || c.code >= kInvalid;
    if (name) {
      out += name;
    } else if (is_hidden) {
      out += format("\\x%02x", static_cast<unsigned char>(token[i]));
    } else {
      out += token.substr(i, size_t(c.bytes));
    }
    i += size_t(c.bytes);
  }
  return out;
}

// Prints the text with its tokens in colours on a terminal and divided by bars elsewhere, then the
// ids.
void show_command(const Tokenizer& tokenizer, const std::string& text, bool special) {
  const std::vector<int> ids = tokenizer.encode(text, special);
  const bool colours = isatty(STDOUT_FILENO);
  const int backgrounds[] = {153, 222, 157, 218, 189};  // of the 256-colour palette
  std::string shown;
  for (size_t i = 0; i < ids.size(); i++) {
    const std::string_view bytes = tokenizer.token_bytes(ids[i]);
    if (colours) {
      shown += format("\x1b[30;48;5;%dm", backgrounds[i % 5]) + visible(bytes) + "\x1b[0m";
    } else {
      shown += (i ? "|" : "") + visible(bytes);
    }
    if (!bytes.empty() && bytes.back() == '\n') shown += "\n";
  }
  if (!shown.empty() && shown.back() != '\n') shown += "\n";
  for (size_t i = 0; i < ids.size(); i++) shown += (i ? " " : "") + std::to_string(ids[i]);
  shown += format("\n%zu bytes, %zu tokens, %.3f bytes a token\n", text.size(), ids.size(),
                  double(text.size()) / double(std::max<size_t>(1, ids.size())));
  print(shown);
}

std::string read_all(const Input& input) {
  ByteSource source(input);
  std::string text;
  for (std::vector<char> block(1 << 20);;) {
    const size_t n = source.read(block.data(), block.size());
    text.append(block.data(), n);
    if (n < block.size()) return text;
  }
}

int run(int argc, char** argv) {
  CLI::App app{"Byte pair encoding: trains a tokenizer, turns documents into token shards."};
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  Corpus corpus;
  corpus.quiet = false;
  corpus.threads = usable_cores();
  std::string tokenizer, output, pattern = "cl100k", file;
  std::vector<std::string> words;
  int vocab_size = 0;
  bool special = false;

  const auto add_corpus = [&](CLI::App* command) {
    const char* inputs =
        "plain text (each file is one document), JSON lines with \"text\", WET, also as .gz or "
        ".zst; parquet with \"text\"; folders of these; - is the standard input";
    const char* share =
        "share of the text that is kept for validation, 0 to 1: the end of a single "
        "document, or whole documents; 0: none";
    const char* threads = "number of threads; changes the speed, not the result";
    command->add_option("INPUT", corpus.inputs, inputs)->required()->default_str("");
    command->add_option("--val-fraction", corpus.val_fraction, share);
    command->add_option("--threads", corpus.threads, threads);
  };
  const auto add_tokenizer = [&](CLI::App* command) {
    const char* help = "a directory, or a tokenizer.json, .tiktoken or vocab.bpe file";
    command->add_option("TOKENIZER", tokenizer, help)->required();
  };
  CLI::App* train = app.add_subcommand("train", "documents to a tokenizer");
  add_corpus(train);
  const std::string sizes = concat("number of tokens: 256 bytes, merges, ", kSpecials, " specials");
  train->add_option("--vocab-size", vocab_size, sizes)->required()->default_str("");
  train->add_option("--pattern", pattern, "split pattern: gpt2, cl100k, qwen2 or o200k");
  train->add_option("-o", output, "directory to write")->required();

  CLI::App* encode = app.add_subcommand("encode", "documents to token shards");
  add_tokenizer(encode);
  add_corpus(encode);
  encode->add_option("-o", output, "prefix of the shards' paths")->required();

  CLI::App* decode = app.add_subcommand("decode", "ids or shards to text");
  add_tokenizer(decode);
  decode->add_option("IDS", words, "ids, or shard files")->required()->default_str("");

  CLI::App* show = app.add_subcommand("show", "a text with its tokens made visible");
  add_tokenizer(show);
  show->add_option("TEXT", words, "the text; without it, the standard input is read")
      ->default_str("");
  show->add_option("-f", file, "file to read the text from");
  show->add_flag("--special", special, "read the names of special tokens as special tokens");

  if (!parse_flags(app, argc, argv, {})) return 0;
  if (*train) {
    if (std::filesystem::exists(output) && !std::filesystem::is_directory(output)) {
      fail(output, ": found a file, expected a directory to write");  // before the training
    }
    train_tokenizer(corpus, vocab_size, pattern).save(output);
  } else if (*encode) {
    encode_corpus(corpus, Tokenizer::load(tokenizer), tokenizer, output);
  } else if (*decode) {
    decode_command(Tokenizer::load(tokenizer), words);
  } else {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
    if (words.empty()) text = read_all(Input(file.empty() ? "-" : file));
    show_command(Tokenizer::load(tokenizer), text, special);
  }
  return 0;
}

}  // namespace
}  // namespace cake

// Weak: programs that link this file as a library have a main of their own.
__attribute__((weak)) int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::run(argc, argv); });
}
