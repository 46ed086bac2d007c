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
#include <omp.h>

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
#include <exception>
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

// Finds where pieces end. Each member is one pattern, its tests in the order of its alternatives.
class Scanner {
 public:
  Scanner(std::string_view text, Pattern pattern)
      : text_(text), end_(pattern == Pattern::gpt2_digits ? 0 : text.size()), pattern_(pattern) {}

  // The end of the piece that begins at `i` < size. Calls follow each other through the text.
  size_t piece_end(size_t i) {
    switch (pattern_) {
      case Pattern::gpt2:
        return gpt2(i);
      case Pattern::gpt2_digits:
        return gpt2_digits(i);
      case Pattern::cl100k:
        return cl100k(i, 3);
      case Pattern::qwen2:
        return cl100k(i, 1);
      default:
        return o200k(i);
    }
  }

 private:
  static constexpr int kEnd = 8;  // the class behind the last character
  static constexpr unsigned kLetters = bit(kUpper) | bit(kLower) | bit(kLetter);
  static constexpr unsigned kSpaces = bit(kSpace) | bit(kNewline);
  static constexpr unsigned kSigns = bit(kOther) | bit(kMark);  // [^\s\p{L}\p{N}]
  // What may stand in front of a word: [^\r\n\p{L}\p{N}]
  static constexpr unsigned kPrefixes = kSigns | bit(kSpace);
  // o200k's two classes of a word; marks and letters without case are in both.
  static constexpr unsigned kUncased = bit(kLetter) | bit(kMark);
  static constexpr unsigned kUppers = bit(kUpper) | kUncased, kLowers = bit(kLower) | kUncased;

  struct Char {
    int kind, bytes;
    bool in(unsigned mask) const { return mask >> kind & 1; }
  };

  Char at(size_t i) const {
    if (i >= end_) return {kEnd, 0};
    const auto byte = static_cast<unsigned char>(text_[i]);
    if (byte < 0x80) return {classes_[byte], 1};
    const CodePoint c = decode_utf8(text_.data() + i, end_ - i);
    return {c.code < kInvalid ? classes_[c.code] : int(kOther), c.bytes};
  }
  bool is(size_t i, char c) const { return i < end_ && text_[i] == c; }

  size_t run(size_t i, unsigned mask) const {
    for (Char c; (c = at(i)).in(mask);) i += size_t(c.bytes);
    return i;
  }

  // '(?:[sdmt]|ll|ve|re): its end, or i. Without regard to case, U+017F is an s.
  size_t contraction(size_t i, bool any_case) const {
    if (!is(i, '\'')) return i;
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

  // \s+(?!\S)|\s+, and before them \s*[\r\n]+ where newlines come first.
  size_t white_space(size_t i, bool newlines_first) const {
    size_t e = i, last = i, after_newline = i;  // last: where the run's last character begins
    for (Char c; (c = at(e)).in(kSpaces); e += size_t(c.bytes)) {
      last = e;
      if (c.kind == kNewline) after_newline = e + 1;
    }
    if (newlines_first && after_newline > i) return after_newline;
    return e == end_ || last == i ? e : last;
  }

  size_t gpt2(size_t i) const {
    const size_t c = contraction(i, false);
    if (c > i) return c;
    const size_t start = i + is(i, ' ');
    const Char first = at(start);
    if (first.in(kLetters)) return run(start, kLetters);
    if (first.in(bit(kNumber))) return run(start, bit(kNumber));
    if (first.in(kSigns)) return run(start, kSigns);
    return white_space(i, false);
  }

  size_t gpt2_digits(size_t i) {
    if (i == end_) {  // the stretch up to here is done
      const Char c = (end_ = text_.size(), at(i));
      if (c.kind == kNumber) return end_ = i + size_t(c.bytes);
      end_ = run(i, ~bit(kNumber) & ~bit(kEnd));
    }
    return gpt2(i);
  }

  size_t cl100k(size_t i, int digits) const {
    const size_t c = contraction(i, true);
    if (c > i) return c;
    const Char first = at(i);
    const size_t second = i + size_t(first.bytes);
    if (first.in(kLetters)) return run(i, kLetters);
    if (first.in(kPrefixes) && at(second).in(kLetters)) return run(second, kLetters);
    if (first.kind == kNumber) return number(i, digits);
    const size_t start = i + is(i, ' ');
    if (at(start).in(kSigns)) return run(run(start, kSigns), bit(kNewline));
    return white_space(i, true);
  }

  size_t o200k(size_t i) const {
    const Char first = at(i);
    const size_t second = i + size_t(first.bytes);
    size_t e = i;
    // The two kinds of words, each tried with the prefix and then without.
    if (first.in(kPrefixes)) e = cased_word(second, i);
    if (e == i) e = cased_word(i, i);
    if (e == i && first.in(kPrefixes)) e = upper_word(second, i);
    if (e == i) e = upper_word(i, i);
    if (e > i) return contraction(e, true);
    if (first.kind == kNumber) return number(i, 3);
    const size_t start = i + is(i, ' ');
    if (!at(start).in(kSigns)) return white_space(i, true);
    for (e = run(start, kSigns); is(e, '\r') || is(e, '\n') || is(e, '/');) e++;
    return e;
  }

  // [uppers]*[lowers]+ from i, or `none`. Where no lower follows the uppers, they give back
  // characters until one of them can be a lower: the last without case.
  size_t cased_word(size_t i, size_t none) const {
    size_t e = i, after_uncased = none;
    for (Char c; (c = at(e)).in(kUppers);) {
      e += size_t(c.bytes);
      if (c.in(kUncased)) after_uncased = e;
    }
    return at(e).in(kLowers) ? run(e, kLowers) : after_uncased;
  }
  // [uppers]+[lowers]* from i, or `none`.
  size_t upper_word(size_t i, size_t none) const {
    const size_t e = run(i, kUppers);
    return e > i ? run(e, kLowers) : none;
  }

  size_t number(size_t i, int digits) const {
    for (Char c; digits-- > 0 && (c = at(i)).kind == kNumber;) i += size_t(c.bytes);
    return i;
  }

  std::string_view text_;
  size_t end_;  // of what the pattern sees
  Pattern pattern_;
  const uint8_t* classes_ = char_classes();
};

// Calls f(piece) for the pieces of text[0, end), a stretch that ends where a piece does; what
// follows it in `text` is seen, since whether text goes on behind white space matters.
template <class F>
void for_each_piece(std::string_view text, size_t end, Pattern pattern, F&& f) {
  Scanner scanner(text, pattern);
  for (size_t i = 0; i < end;) {
    const size_t e = scanner.piece_end(i);
    f(text.substr(i, e - i));
    i = e;
  }
}

// ---------------------------------------------------------------------------------------------
// A corpus arrives in batches of text that fit memory, each cut into chunks that threads can work
// on alone. How it is read is told further below.

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

// Throws Error where there is no input or no thread.
void check_corpus(const Corpus& corpus);

// Calls process(batch) for each batch of the corpus, one after the other. `verb` is for the
// progress line.
void for_each_batch(const Corpus& corpus, const char* verb, ConsoleLog& log,
                    const std::function<void(const TextBatch&)>& process);

// Runs f(i, thread) for 0 <= i < n; an exception in a thread comes out here.
template <class F>
void parallel_for(size_t n, int threads, F&& f) {
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (size_t i = 0; i < n; i++) {
    try {
      f(i, size_t(omp_get_thread_num()));
    } catch (...) {
#pragma omp critical
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// ---------------------------------------------------------------------------------------------
// Training

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
    if (2 * (words_.size() + 1) > slots_.size()) grow();
    const uint64_t hash = piece_hash(word);
    for (size_t i = hash & (slots_.size() - 1);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i] < 0) {
        slots_[i] = int64_t(words_.size());
        words_.push_back({hash, text_.size(), word.size(), count});
        text_ += word;
        return;
      }
      Word& w = words_[size_t(slots_[i])];
      if (w.hash == hash && text(w) == word) {
        w.count += count;
        return;
      }
    }
  }
  size_t size() const { return words_.size(); }
  std::string_view word(size_t i) const { return text(words_[i]); }
  int64_t count(size_t i) const { return words_[i].count; }
  void merge(const WordTable& other) {
    for (size_t i = 0; i < other.size(); i++) add(other.word(i), other.count(i));
  }

 private:
  struct Word {
    uint64_t hash;
    size_t offset, size;
    int64_t count;
  };
  std::string_view text(const Word& w) const { return {text_.data() + w.offset, w.size}; }
  void grow() {
    slots_.assign(std::max<size_t>(1024, 2 * slots_.size()), -1);
    for (size_t w = 0; w < words_.size(); w++) {
      size_t i = words_[w].hash & (slots_.size() - 1);
      while (slots_[i] >= 0) i = (i + 1) & (slots_.size() - 1);
      slots_[i] = int64_t(w);
    }
  }
  std::vector<int64_t> slots_;  // index into words_, -1: free; open addressing
  std::vector<Word> words_;
  std::string text_;  // of all words, end to end
};

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

  // The next merge; its token.
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

  bool can_neighbour(int a, int b) const;

  struct Scratch {
    std::vector<int> tokens;
    std::vector<uint64_t> possible;  // a bit a position: may a token end here?
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

// Joins the most frequent pair of neighbours again and again. Pair counts are kept up to date word
// by word: a merge visits only the words that have held its pair. Ties: of equal counts the
// smallest (left, right), so that the order of words does not matter.
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

  // The pair to merge next; false when there is none. An entry of the queue may be out of date: its
  // pair's count can only have fallen since, so that it goes back with the count of now.
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
    Pair& pair = pairs_[size_t(index_.find(pair_key(left, right)))];
    const std::vector<uint32_t> words = std::move(pair.words);
    pair.words = {};
    std::vector<int> fresh;  // pairs with the new token
    for (const uint32_t w : words) merge_word(w, left, right, token, fresh);
    pairs_[size_t(index_.find(pair_key(left, right)))].count = 0;  // `add` may have moved it
    for (const int p : fresh) enqueue(p);
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
    int64_t count = 0;            // in the text; each place counts, also where places overlap
    std::vector<uint32_t> words;  // that have held it, each once
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

  // left right -> token, from the left, in place. Each pair of neighbours that goes is taken from
  // its count, each that comes is added, once.
  void merge_word(uint32_t w, int left, int right, int token, std::vector<int>& fresh) {
    Word& word = words_[w];
    int* const t = tokens_.data() + word.begin;
    const auto subtract = [&](int a, int b) {
      pairs_[size_t(index_.find(pair_key(a, b)))].count -= word.count;
    };
    size_t out = 0;
    bool joined = false;  // the last step made a token: its pair on the right is gone already
    for (size_t i = 0; i < word.size;) {
      if (i + 1 < word.size && t[i] == left && t[i + 1] == right) {
        // t[out - 1] is what now stands before: `token` itself if joined, else what stood there.
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
  std::vector<int> ids;                                // of each token of `merges`
  std::vector<std::string> bytes;                      // of each id; empty where there is none
  std::vector<std::pair<std::string, int>> specials;   // by id
  std::vector<const std::string*> specials_by_length;  // longest first
  std::unordered_map<std::string, int> special_ids;    // by name
  FlatMap whole_pieces;      // hash of a token's bytes -> id, of what a piece may be as a whole
  std::string json, config;  // the files it was read from
  uint64_t hash = 0;

  void add_token(int id, std::string_view text) {
    if (size_t(id) >= bytes.size()) bytes.resize(size_t(id) + 1);
    bytes[size_t(id)] = text;
  }

  // Fills what follows from the rest. `where` is a file, for errors.
  void complete(const std::string& where);
  uint64_t compute_hash() const;
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
    specials_by_length.push_back(&name);
  }
  std::stable_sort(specials_by_length.begin(), specials_by_length.end(),
                   [](const auto* a, const auto* b) { return a->size() > b->size(); });
  hash = compute_hash();
}

uint64_t TokenizerData::compute_hash() const {
  std::string all =
      concat(pattern_info(pattern).name, nfc ? " nfc" : "", ignore_merges ? " ignore_merges" : "");
  const auto put = [&all](int x) { all.append(reinterpret_cast<const char*>(&x), sizeof x); };
  for (int t = 256; t < merges.size(); t++) {
    put(merges.parts(t).first), put(merges.parts(t).second);
  }
  for (const auto& [name, id] : specials) put(id);
  for (const std::string& token : bytes) put(int(token.size())), all += token;
  return hash64(all);
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
  if (vocab_size < kSmallest || vocab_size > 1 << 24) {
    fail("--vocab-size: found ", vocab_size, ", expected ", kSmallest, " (256 bytes and ",
         kSpecials, " special tokens) to ", 1 << 24);
  }
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
    log.note(
        format("the text has pairs for %d tokens only, of the %d asked for", size, vocab_size));
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

// Whether `a` and `b` can stand side by side when all merges are done, each made of its own
// bytes. Undoes the merges of both, latest first, until a merge across the border shows that
// would have come before (no), or only bytes are left (yes). `limit`: the rank that a merge
// across must stay below to have come first; of two equal ranks the left one is first.
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

// Appends the tokens of one piece, in time linear in its length. Greedy with repentance: takes
// the longest token that can follow the last; where none can, no encoding has a border at this
// position, and the last token is taken back for a shorter one.
void Merges::encode(std::string_view piece, Scratch& scratch) const {
  std::vector<int>& tokens = scratch.tokens;
  std::vector<uint64_t>& possible = scratch.possible;
  tokens.clear();
  possible.assign(piece.size() / 64 + 1, ~uint64_t(0));
  int token = longest(piece);
  for (size_t at = 0; at < piece.size();) {
    const size_t end = at + size_t(length(token));
    if ((possible[end / 64] >> (end % 64) & 1) &&
        (tokens.empty() || can_neighbour(tokens.back(), token))) {
      tokens.push_back(token);
      at = end;
      if (at < piece.size()) token = longest(piece.substr(at));
    } else if (length(token) > 1) {
      token = longest(piece.substr(at, size_t(length(token)) - 1));
    } else {
      possible[at / 64] &= ~(uint64_t(1) << (at % 64));
      token = tokens.back();
      tokens.pop_back();
      at -= size_t(length(token));
    }
  }
}

std::string to_nfc(std::string_view text);  // Normalization Form C

// Text below U+0300 is in Normalization Form C already: nothing there combines.
bool is_plain_nfc(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c < 0xCC; });
}

// Encodes texts; one for each thread, since it remembers. Most pieces of a text are words seen
// before: their ids stand in a direct-mapped cache, one cache line a piece.
class Encoder {
 public:
  Encoder(const TokenizerData& data, bool remember) : data_(data), cache_(remember ? kLines : 0) {}

  // Appends the ids of text[0, end); see for_each_piece for what follows.
  void encode(std::string_view text, size_t end, std::vector<int>& ids) {
    if (!data_.nfc || is_plain_nfc(text)) return encode_normal(text, end, ids);
    std::string normal = to_nfc(text.substr(0, end));
    const size_t normal_end = normal.size();
    normal += text.substr(end, 2);  // ASCII: is_safe_cut
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

  // Every token that merges reach encodes to itself, so that most pieces need one look-up.
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

// The first special token in `text` from `at`: its place and name, the longest one there; the end
// and nothing when there is none.
std::pair<size_t, const std::string*> find_special(const TokenizerData& data, std::string_view text,
                                                   size_t at) {
  std::array<bool, 256> begins{};
  for (const auto& [name, id] : data.specials) begins[static_cast<unsigned char>(name[0])] = true;
  for (; at < text.size(); at++) {
    if (!begins[static_cast<unsigned char>(text[at])]) continue;
    for (const std::string* name : data.specials_by_length) {
      if (text.compare(at, name->size(), *name) == 0) return {at, name};
    }
  }
  return {text.size(), nullptr};
}

}  // namespace

void Tokenizer::encode(std::string_view text, std::vector<int>& ids, bool allow_special) const {
  Encoder encoder(*data_, text.size() > 1 << 16);  // the cache pays for itself in long texts
  for (size_t at = 0; at < text.size();) {
    size_t end = text.size();
    const std::string* special = nullptr;
    if (allow_special) std::tie(end, special) = find_special(*data_, text, at);
    encoder.encode(text.substr(at, end - at), end - at, ids);
    if (special) ids.push_back(data_->special_ids.at(*special));
    at = end + (special ? special->size() : 0);
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
    if (id < 0 || id >= vocab_size()) {
      fail("decode: found token ", id, ", expected 0 to ", vocab_size() - 1);
    }
    text += data_->bytes[size_t(id)];
  }
  return text;
}

int Tokenizer::vocab_size() const { return int(data_->bytes.size()); }

std::string_view Tokenizer::token_bytes(int id) const {
  return id >= 0 && id < vocab_size() ? std::string_view(data_->bytes[size_t(id)])
                                      : std::string_view();
}

bool Tokenizer::is_special(int id) const {
  const auto& all = data_->specials;
  const auto it = std::lower_bound(all.begin(), all.end(), id,
                                   [](const auto& s, int x) { return s.second < x; });
  return it != all.end() && it->second == id;
}

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
  if (info.train.tokens + info.val.tokens == 0) {
    fail("encoding: found documents without text, expected text");
  }
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

constexpr size_t kHeadBytes = 1 << 16;  // of a document: they tell it from others

uint64_t document_hash(std::string_view head) { return piece_hash(head.substr(0, kHeadBytes)); }

// Which documents, or which tail of the only one, are validation.
//   one document:   its last `fraction`, from the next line on
//   2 to 64:        those with the smallest hashes, the nearest number to the fraction, but one at
//                   least and not all
//   more:           those whose hash is below the fraction of 2^64
class ValidationSplit {
 public:
  static constexpr size_t kFew = 64;

  ValidationSplit(const std::vector<Input>& inputs, double fraction) {
    if (!(fraction >= 0 && fraction < 1)) {
      fail("--val-fraction: found ", fraction, ", expected 0 or more and less than 1");
    }
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
    int64_t at = 0;
    DocumentReader reader(inputs);
    for (DocumentPart part; near.size() < 4096 && reader.next(part);) {
      const int64_t skip = std::clamp<int64_t>(wanted - at, 0, int64_t(part.text.size()));
      near += part.text.substr(size_t(skip), 4096 - near.size());
      at += int64_t(part.text.size());
    }
    const size_t newline = near.find('\n');
    size_t cut = 0;
    if (newline != std::string::npos && wanted + int64_t(newline) + 1 < bytes) {
      cut = newline + 1;
    } else {
      while (cut < near.size() && (near[cut] & 0xC0) == 0x80) cut++;
    }
    tail_ = wanted + int64_t(cut);
    if (tail_ <= 0 || tail_ >= bytes) {
      fail("--val-fraction: found ", fraction, " of ", bytes,
           " bytes, expected at least one byte on each side");
    }
  }

  int64_t tail_ = 0;
  uint64_t threshold_ = 0;
};

class CorpusReader {
 public:
  CorpusReader(const std::vector<Input>& inputs, const ValidationSplit& split)
      : reader_(inputs), split_(split) {}

  // The next batch: whole documents, and of a long one as much as is there up to a safe cut.
  bool next(TextBatch& batch) {
    batch.text.swap(rest_);
    rest_.clear();
    const size_t wanted = 2 * batch.text.size() + kBatchBytes;
    batch.chunks.clear();
    stretch_ = 0;
    for (DocumentPart part; batch.text.size() < wanted && reader_.next(part);) add(part, batch);
    if (open_) keep_rest(batch);
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
    if (split_.has_tail() && offset_ < split_.tail() && split_.tail() < offset_ + size) {
      const size_t cut = size_t(split_.tail() - offset_);
      batch.text += part.text.substr(0, cut);
      end_document(batch);
      begin_document(batch, true);
      part.text.remove_prefix(cut);
    } else if (split_.has_tail() && offset_ == split_.tail()) {
      end_document(batch);
      begin_document(batch, true);
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

  // The text of an unfinished document behind the last safe cut waits for the next batch.
  void keep_rest(TextBatch& batch) {
    size_t cut = batch.text.size();
    while (cut > stretch_ && !is_safe_cut(batch.text, cut)) cut--;
    if (cut > stretch_) add_chunks(batch, cut);
    rest_ = batch.text.substr(cut);
  }

  // Chunks for [stretch_, end): about kChunkBytes each, cut where it is safe.
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
  std::string rest_;
  size_t stretch_ = 0;  // where the open document's text in the batch begins
  int64_t offset_ = 0;  // bytes of the open document so far
  bool open_ = false, begins_ = false, validation_ = false;
};

void check_corpus(const Corpus& corpus) {
  if (corpus.inputs.empty()) fail("found no inputs, expected text or JSON lines");
  if (corpus.threads < 1) fail("--threads: found ", corpus.threads, ", expected 1 or more");
}

void for_each_batch(const Corpus& corpus, const char* verb, ConsoleLog& log,
                    const std::function<void(const TextBatch&)>& process) {
  std::vector<Input> inputs(corpus.inputs.begin(), corpus.inputs.end());
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

}  // namespace

// ---------------------------------------------------------------------------------------------
// Writing tokenizer.json

namespace {

// Hugging Face's and GPT-2's files spell a byte as a printable character: most of Latin-1 as
// itself, the other 68 bytes, in order, as U+0100 and on.
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

OrderedJson pre_tokenizer_json(Pattern pattern) {
  const auto byte_level = [](bool use_regex) {
    return OrderedJson{{"type", "ByteLevel"},
                       {"add_prefix_space", false},
                       {"trim_offsets", true},
                       {"use_regex", use_regex}};
  };
  if (pattern == Pattern::gpt2) return byte_level(true);
  const OrderedJson first =
      pattern == Pattern::gpt2_digits
          ? OrderedJson{{"type", "Digits"}, {"individual_digits", true}}
          : OrderedJson{{"type", "Split"},
                        {"pattern", OrderedJson{{"Regex", pattern_info(pattern).regex}}},
                        {"behavior", "Isolated"},
                        {"invert", false}};
  return {
      {"type", "Sequence"},
      {"pretokenizers", OrderedJson::array({first, byte_level(pattern == Pattern::gpt2_digits)})}};
}

std::string tokenizer_json(const TokenizerData& data) {
  OrderedJson added = OrderedJson::array();
  for (const auto& [name, id] : data.specials) {
    added.push_back({{"id", id},
                     {"content", name},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  OrderedJson normalizer;
  if (data.nfc) normalizer = {{"type", "NFC"}};
  const OrderedJson decoder = {{"type", "ByteLevel"},
                               {"add_prefix_space", false},
                               {"trim_offsets", true},
                               {"use_regex", true}};
  std::string out = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n";
  out += "  \"added_tokens\": [";
  for (size_t i = 0; i < added.size(); i++) out += (i ? ",\n    " : "\n    ") + added[i].dump();
  out += "\n  ],\n  \"normalizer\": " + normalizer.dump();
  out += ",\n  \"pre_tokenizer\": " + pre_tokenizer_json(data.pattern).dump();
  out += ",\n  \"post_processor\": null,\n  \"decoder\": " + decoder.dump();
  out += ",\n  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n";
  out += "    \"unk_token\": null,\n    \"continuing_subword_prefix\": null,\n";
  out += "    \"end_of_word_suffix\": null,\n    \"fuse_unk\": false,\n";
  out += "    \"byte_fallback\": false,\n    \"ignore_merges\": ";
  out += data.ignore_merges ? "true" : "false";
  // Special tokens stand in the vocabulary, too: else Hugging Face numbers them by its size, which
  // is wrong where ids have holes.
  out += ",\n    \"vocab\": {";
  const char* separator = "\n      ";
  for (size_t id = 0; id < data.bytes.size(); id++) {
    const std::string& bytes = data.bytes[id];
    if (bytes.empty()) continue;
    const bool special = data.special_ids.count(bytes) && data.special_ids.at(bytes) == int(id);
    out += separator + quoted(special ? bytes : spell(bytes)) + ": " + std::to_string(id);
    separator = ",\n      ";
  }
  out += "\n    },\n    \"merges\": [";
  separator = "\n      ";
  for (int t = 256; t < data.merges.size(); t++) {
    const auto [left, right] = data.merges.parts(t);
    out += separator;
    out += quoted(spell(data.merges.bytes(left)) + " " + spell(data.merges.bytes(right)));
    separator = ",\n      ";
  }
  return out + "\n    ]\n  }\n}\n";
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
    d.json.clear();  // what was read no longer says all
  }
  for (const auto& [name, id] : d.specials) d.bytes[size_t(id)].clear();  // complete() adds them
  d.special_ids.clear();
  d.specials_by_length.clear();
  d.complete("tokenizer");
  const std::string fresh = tokenizer_config_json(d);
  if (d.config.empty()) {
    d.config = fresh;
  } else {
    OrderedJson config = OrderedJson::parse(d.config, nullptr, false);
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
  [[noreturn]] void expected(const std::string& what) const {
    std::string found = simdjson::minify(value);
    if (found.size() > 80) found = found.substr(0, 77) + "...";
    fail(where(), ": found ", found, ", expected ", what);
  }
  bool has(const char* name) const {  // null counts as absent
    JsonElement e;
    return value.at_key(name).get(e) == simdjson::SUCCESS && !e.is_null();
  }
  JsonNode at(const char* name) const {
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
    if (value.get(x)) expected(what);
    return x;
  }
  std::string_view string() const { return as<std::string_view>("a string"); }
  simdjson::dom::object object() const { return as<simdjson::dom::object>("an object"); }
  simdjson::dom::array array() const { return as<simdjson::dom::array>("an array"); }
  int id() const {
    const int64_t x = as<int64_t>("a token id");
    if (x < 0 || x > 1 << 24) expected("0 to 16777216");
    return int(x);
  }
  bool flag(const char* name, bool fallback) const {
    return has(name) ? at(name).as<bool>("true or false") : fallback;
  }
};

// SentencePiece's models spell spaces with U+2581 and fall back to bytes: another algorithm.
[[noreturn]] void refuse_kind(const JsonNode& node, std::string_view kind) {
  fail(
      node.where(), ": found ", kind,
      ", expected byte-level BPE: tokenizers of the SentencePiece, WordPiece and Unigram kinds are "
      "not supported");
}

bool read_normalizer(const JsonNode& root) {  // true: NFC
  if (!root.has("normalizer")) return false;
  JsonNode node = root.at("normalizer");
  if (node.at("type").string() == "Sequence") {
    const JsonNode list = node.at("normalizers");
    if (list.array().size() == 0) return false;
    if (list.array().size() == 1) node = list.item(0);
  }
  const std::string_view type = node.at("type").string();
  if (type == "Prepend" || type == "Replace" || type == "Precompiled" || type == "Sequence") {
    refuse_kind(node, type);
  }
  if (type != "NFC") node.at("type").expected("NFC or no normalizer");
  return true;
}

// Possessive quantifiers change speed, not matches, in the patterns known here.
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
  if (!root.has("pre_tokenizer")) {
    fail(root.where(), ": pre_tokenizer: found null, expected ByteLevel, or Split and ByteLevel");
  }
  const JsonNode node = root.at("pre_tokenizer");
  const auto check_byte_level = [](const JsonNode& n, bool use_regex) {
    const std::string_view type = n.at("type").string();
    if (type == "Metaspace") refuse_kind(n, type);
    if (type != "ByteLevel") n.at("type").expected("ByteLevel");
    if (n.flag("add_prefix_space", true)) n.expected("\"add_prefix_space\": false");
    if (n.flag("use_regex", true) != use_regex) {
      n.expected(concat("\"use_regex\": ", use_regex ? "true" : "false"));
    }
  };
  if (node.at("type").string() != "Sequence") return check_byte_level(node, true), Pattern::gpt2;
  const JsonNode list = node.at("pretokenizers");
  if (list.array().size() != 2) list.expected("Split or Digits, then ByteLevel");
  const JsonNode first = list.item(0), second = list.item(1);
  if (first.at("type").string() == "Digits") {
    if (!first.flag("individual_digits", false)) first.expected("\"individual_digits\": true");
    return check_byte_level(second, true), Pattern::gpt2_digits;
  }
  if (first.at("type").string() != "Split") first.at("type").expected("Split or Digits");
  check_byte_level(second, false);
  if (first.at("behavior").string() != "Isolated") first.at("behavior").expected("\"Isolated\"");
  if (first.flag("invert", false)) first.expected("\"invert\": false");
  const JsonNode regex = first.at("pattern").at("Regex");
  for (const PatternInfo& known : kPatterns) {
    if (known.regex[0] && without_possessive(regex.string()) == known.regex) return known.pattern;
  }
  regex.expected("the pattern of gpt2, cl100k, qwen2 or o200k");
}

void read_added_tokens(const JsonNode& root, TokenizerData& data) {
  if (!root.has("added_tokens")) return;
  const JsonNode list = root.at("added_tokens");
  for (size_t i = 0; i < list.array().size(); i++) {
    const JsonNode token = list.item(i);
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      if (token.flag(key, false)) token.expected(concat("\"", key, "\": false"));
    }
    data.specials.push_back({std::string(token.at("content").string()), token.at("id").id()});
  }
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

// Ranks of the tokens that merges reach, in the order of the merges. Files made from tiktoken's
// list every way to split a token; the first that can happen is the token's.
void read_merges(const JsonNode& model, const std::unordered_map<std::string_view, int>& id_of,
                 TokenizerData& data) {
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
  std::vector<Merge> early;  // a part is not there yet
  int number = 0;
  std::string joined;
  const JsonNode list = model.at("merges");
  for (const JsonElement e : list.array()) {
    std::string_view left, right;
    const bool good = split_merge(e, left, right);
    joined.assign(left).append(right);
    const auto l = id_of.find(left), r = id_of.find(right), j = id_of.find(joined);
    if (!good || l == id_of.end() || r == id_of.end() || j == id_of.end()) {
      list.item(size_t(number)).expected("two tokens whose joint the vocabulary has");
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
  for (const Merge& m : early) {  // harmless when its token came about before its parts
    const int last = std::max(token_of[size_t(m.left)], token_of[size_t(m.right)]);
    const int joined = token_of[size_t(m.joined)];
    const bool both = token_of[size_t(m.left)] >= 0 && token_of[size_t(m.right)] >= 0;
    if (both && (joined < 0 || joined > last)) {
      list.item(size_t(m.number)).expected("the merges that make its parts before it");
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
  const JsonNode model = root.at("model");
  const std::string_view type =
      model.has("type") ? model.at("type").string() : std::string_view("BPE");  // older files
  if (type != "BPE") refuse_kind(model.at("type"), type);
  if (model.flag("byte_fallback", false)) refuse_kind(model, "\"byte_fallback\": true");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(key) && !model.at(key).string().empty()) model.at(key).expected("null");
  }
  if (model.has("dropout") && model.at("dropout").as<double>("a number") != 0) {
    model.at("dropout").expected("null");
  }
  data->nfc = read_normalizer(root);
  data->pattern = read_pattern(root);
  data->ignore_merges = model.flag("ignore_merges", false);
  read_added_tokens(root, *data);
  std::set<std::string_view> added;
  for (const auto& [name, id] : data->specials) added.insert(name);

  std::unordered_map<std::string_view, int> id_of;  // by spelling
  const JsonNode vocab = model.at("vocab");
  std::string bytes;
  for (const auto& [key, value] : vocab.object()) {
    if (added.count(key)) continue;
    const int id = JsonNode{value, vocab.file, "model.vocab"}.id();
    if (!unspell(key, bytes) || bytes.empty()) {
      fail(vocab.where(), ": found ", key, ", expected a spelling by ByteLevel's characters");
    }
    if (size_t(id) < data->bytes.size() && !data->bytes[size_t(id)].empty()) {
      fail(vocab.where(), ": found id ", id, " twice, the second time for ", key);
    }
    data->add_token(id, bytes);
    id_of[key] = id;
  }
  read_merges(model, id_of, *data);
  data->complete(path.string());
  const std::filesystem::path config = path.parent_path() / "tokenizer_config.json";
  if (std::filesystem::exists(config)) data->config = read_file(config);
  return data;
}

// ---------------------------------------------------------------------------------------------
// Reading .tiktoken and vocab.bpe

std::string decode_base64(std::string_view spelling, const std::string& where) {
  std::string_view text = spelling;
  std::string out;
  uint32_t bits = 0;
  int n = 0;
  while (!text.empty() && text.back() == '=') text.remove_suffix(1);
  for (const char c : text) {
    const int value = c >= 'A' && c <= 'Z'   ? c - 'A'
                      : c >= 'a' && c <= 'z' ? c - 'a' + 26
                      : c >= '0' && c <= '9' ? c - '0' + 52
                      : c == '+'             ? 62
                      : c == '/'             ? 63
                                             : -1;
    if (value < 0) fail(where, ": found ", spelling, ", expected base64 and a rank");
    bits = bits << 6 | uint32_t(value);
    n += 6;
    if (n >= 8) n -= 8, out += char(bits >> n & 255);
  }
  return out;
}

// What a .tiktoken file leaves out, by the number of its ranks.
struct KnownVocabulary {
  size_t ranks;
  Pattern pattern;
  std::vector<std::pair<std::string, int>> specials;
};
const std::vector<KnownVocabulary>& known_vocabularies() {
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
  return known;
}

// The file holds tokens and the ranks at which they were made, not what they were made of: that is
// what the earlier merges leave of their bytes, always two parts.
std::shared_ptr<TokenizerData> read_tiktoken(const std::filesystem::path& path) {
  auto data = std::make_shared<TokenizerData>();
  std::vector<std::pair<int, std::string>> ranks;
  LineReader lines{Input(path.string())};
  for (std::string_view line; lines.next(line);) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
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
  const auto& all = known_vocabularies();
  const auto known =
      std::find_if(all.begin(), all.end(), [&](const auto& v) { return v.ranks == ranks.size(); });
  if (known == all.end()) {
    fail(path.string(), ": found ", ranks.size(),
         " ranks, expected 50256 (r50k), 100256 (cl100k) or 199998 (o200k): the file does not say "
         "which split pattern another vocabulary needs");
  }
  data->pattern = known->pattern;
  data->specials = known->specials;
  std::sort(ranks.begin(), ranks.end());
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
      fail(path.string(), ": rank ", rank, ": found a token of ", scratch.tokens.size(),
           " earlier ones, expected two");
    }
    data->merges.add(scratch.tokens[0], scratch.tokens[1]);
    data->ids.push_back(rank);
  }
  data->complete(path.string());
  return data;
}

// GPT-2's own file: a merge a line. Bytes have the ids 0 to 255 in the order of their spelling,
// merges follow, then <|endoftext|>.
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
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
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

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  std::filesystem::path file = path;
  if (std::filesystem::is_directory(path)) {
    file = path / "tokenizer.json";
    if (!std::filesystem::exists(file)) file = path / "model" / "tokenizer.json";
    if (!std::filesystem::exists(file)) {
      fail(path.string(), ": found no tokenizer.json in the directory");
    }
  }
  if (!std::filesystem::exists(file)) fail(file.string(), ": not found, expected a tokenizer");
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
  static const Nfc& instance() {
    static const Nfc nfc;
    return nfc;
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

  int compose_pair(uint32_t a, uint32_t b) const {  // -1: they do not compose
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
    int last = 0;  // class of the code point kept last, behind the starter
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

  FlatMap parts_, composed_;
  std::vector<uint8_t> combining_;  // 0 for the stand-ins of invalid bytes, too
};

std::string to_nfc(std::string_view text) { return Nfc::instance().normalize(text); }

}  // namespace
}  // namespace cake

#ifndef CAKE_NO_MAIN
// ---------------------------------------------------------------------------------------------
// Command line

namespace cake {
namespace {

// The ids of a shard, this project's or llm.c's.
std::vector<int> read_shard(const std::filesystem::path& path) {
  const std::string file = read_file(path);
  int32_t header[kShardHeader] = {};
  std::memcpy(header, file.data(), std::min(file.size(), sizeof header));
  const bool narrow = header[0] == kMagic16;
  if (file.size() < sizeof header || (!narrow && header[0] != kMagic32)) {
    fail(path.string(), ": found magic ", header[0], ", expected ", kMagic16, " or ", kMagic32,
         ": not a token shard");
  }
  const size_t width = narrow ? 2 : 4, n = (file.size() - sizeof header) / width;
  if (header[2] < 0 || file.size() != sizeof header + size_t(header[2]) * width) {
    fail(path.string(), ": found ", n, " tokens, expected the ", header[2], " of its header");
  }
  std::vector<int> ids(n);
  for (size_t i = 0; i < n; i++) {
    std::memcpy(&ids[i], file.data() + sizeof header + i * width, width);
  }
  return ids;
}

void print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

void decode_command(const Tokenizer& tokenizer, const std::vector<std::string>& what) {
  std::vector<int> ids;
  for (const std::string& word : what) {
    if (word.size() <= 9 && word.find_first_not_of("0123456789") == std::string::npos) {
      ids.push_back(std::stoi(word));
    } else {
      const std::vector<int> shard = read_shard(word);
      ids.insert(ids.end(), shard.begin(), shard.end());
    }
  }
  constexpr size_t kBlock = 1 << 20;
  for (size_t i = 0; i < ids.size(); i += kBlock) {
    print(tokenizer.decode(std::span(ids).subspan(i, std::min(kBlock, ids.size() - i))));
  }
  if (isatty(STDOUT_FILENO)) print("\n");
}

// A token as a reader can see it: line ends and other controls by their names, bytes that are only
// part of a character in hexadecimal.
std::string visible(std::string_view token) {
  std::string out;
  for (size_t i = 0; i < token.size();) {
    const CodePoint c = decode_utf8(token.data() + i, token.size() - i);
    if (c.code == '\n') {
      out += "\\n";
    } else if (c.code == '\r') {
      out += "\\r";
    } else if (c.code == '\t') {
      out += "\\t";
    } else if (c.code < 32 || c.code == 127 || c.code >= kInvalid) {
      out += format("\\x%02x", static_cast<unsigned char>(token[i]));
    } else {
      out += token.substr(i, size_t(c.bytes));
    }
    i += size_t(c.bytes);
  }
  return out;
}

// The text with its tokens told apart, by colours on a terminal and by bars elsewhere; then ids.
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
  Corpus corpus;
  corpus.quiet = false;
  corpus.threads = usable_cores();
  std::string tokenizer, output, pattern = "cl100k", file;
  std::vector<std::string> words;
  int vocab_size = 0;
  bool special = false;

  const char* inputs_help =
      "plain text (one document a file) or .jsonl with \"text\", each also .gz or .zst; - is "
      "standard input";
  const char* tokenizer_help = "directory, or tokenizer.json, .tiktoken or vocab.bpe file";
  const auto add_corpus = [&](CLI::App* command) {
    command->add_option("INPUT", corpus.inputs, inputs_help)->required();
    command->add_option("--val-fraction", corpus.val_fraction,
                        "validation: the tail of one document, or whole ones of many; 0 for none");
    command->add_option("--threads", corpus.threads, "changes speed alone")->capture_default_str();
  };
  CLI::App* train = app.add_subcommand("train", "documents to a tokenizer");
  add_corpus(train);
  train
      ->add_option("--vocab-size", vocab_size,
                   concat("tokens: 256 bytes, merges, ", kSpecials, " special tokens"))
      ->required();
  train->add_option("--pattern", pattern, "how text is split: gpt2, cl100k, qwen2 or o200k")
      ->capture_default_str();
  train->add_option("-o", output, "directory to write")->required();

  CLI::App* encode = app.add_subcommand("encode", "documents to token shards");
  encode->add_option("TOKENIZER", tokenizer, tokenizer_help)->required();
  add_corpus(encode);
  encode->add_option("-o", output, "prefix of the shards to write")->required();

  CLI::App* decode = app.add_subcommand("decode", "ids or shards to text");
  decode->add_option("TOKENIZER", tokenizer, tokenizer_help)->required();
  decode->add_option("IDS", words, "ids, or shard files")->required();

  CLI::App* show = app.add_subcommand("show", "a text with its tokens visible");
  show->add_option("TOKENIZER", tokenizer, tokenizer_help)->required();
  show->add_option("TEXT", words, "the text; standard input without it");
  show->add_option("-f", file, "a file to show in its place");
  show->add_flag("--special", special, "read special tokens in the text as such");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    fail(e.what(), " (./bpe --help tells more)");
  }
  if (*train) {
    if (std::filesystem::exists(output) && !std::filesystem::is_directory(output)) {
      fail(output, ": found a file, expected a directory to write");  // now, not after the training
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

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::run(argc, argv); });
}
#endif
