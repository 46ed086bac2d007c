// Part of ./bpe: training a vocabulary, and more tokens for an existing one.
//
//     documents --normalizer, split pattern--> pieces --PieceCounter--> distinct pieces with counts
//         --Trainer: the most frequent pair of neighbours, again and again--> merges
//
// Counting. Every thread has a WordTable. Where the tables outgrow their share of the memory, they
// go to temporary files as sorted runs, which are merged at the end, so that counts are exact. If
// the distinct pieces are more than the trainer has memory for, those that occur least often are
// dropped: all that occur less often than a count T, the smallest for which the rest fits. So what
// is dropped depends on the corpus and the bound alone, not on the order of the documents or the
// number of threads.
//
// Merging. The trainer counts the pairs once. A merge then visits only the words that have held
// its pair, and changes the counts of the pairs that it makes and breaks there.
//
// Source: Sennrich et al. 2016, with the same incremental counts.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <queue>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cake/bpe.h"
#include "cake/bpe_pieces.h"
#include "cake/bpe_scanner.h"
#include "cake/run.h"
#include "cake/stretches.h"
#include "cake/tokenizer.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// Counting pieces

struct TooLong {  // pieces above kLongestTrainingPiece
  int64_t pieces = 0, bytes = 0;
};

// Distinct pieces and how often each occurs: a hash table with linear probing. Its keys are those
// of cake/bpe_pieces.h; what it keeps of a long piece is the place of its bytes.
class WordTable {
 public:
  WordTable() : slots_(kSmallest) {}

  // Counts each of n pieces once, and leaves out those that are too long. Slots are fetched from
  // memory for a block of pieces before they are looked at.
  template <class Pieces>
  void add(const Pieces& pieces, size_t n, TooLong& too_long) {
    constexpr size_t kBlock = 64;
    std::array<Key, kBlock> keys;
    for (size_t begin = 0; begin < n; begin += kBlock) {
      const size_t count = std::min(kBlock, n - begin);
      while (10 * (size_ + count) > 7 * slots_.size()) grow();
      for (size_t i = 0; i < count; i++) {
        const bool is_short = pieces.size(begin + i) <= kLongestShortPiece;
        keys[i] = __builtin_expect(is_short, true) ? pieces.short_key(begin + i)
                                                   : make_long_key(pieces[begin + i], 0);
        __builtin_prefetch(&slots_[index(keys[i])]);
      }
      for (size_t i = 0; i < count; i++) {
        const size_t size = pieces.size(begin + i);
        if (size <= kLongestTrainingPiece) {
          find(keys[i], pieces[begin + i]).count++;
        } else {
          too_long.pieces++;
          too_long.bytes += int64_t(size);
        }
      }
    }
  }
  void add(std::string_view piece, int64_t count) {
    while (10 * (size_ + 1) > 7 * slots_.size()) grow();
    const bool is_short = piece.size() <= kLongestShortPiece;
    const Key key = is_short ? ListedPieces{&piece}.short_key(0) : make_long_key(piece, 0);
    find(key, piece).count += count;
  }
  void add(const WordTable& other) {
    other.for_each([&](std::string_view piece, int64_t count) { add(piece, count); });
  }

  size_t size() const { return size_; }
  // Whether it will soon grow, and have more bytes then, for a while, than `memory`.
  bool is_full(int64_t memory) const {
    const size_t grown = 3 * slots_.size() * sizeof(Slot) + 2 * long_text_.capacity();
    return 10 * size_ > 6 * slots_.size() && int64_t(grown) > memory;
  }
  void clear() {
    std::fill(slots_.begin(), slots_.end(), Slot{});
    long_text_.clear();
    size_ = 0;
  }

  // Calls f(piece, count) for each piece. The view lasts until f returns.
  template <class F>
  void for_each(F&& f) const {
    for (const Slot& slot : slots_) {
      if (slot.count > 0) f(piece_of(slot), slot.count);
    }
  }
  // The same, sorted by the pieces' bytes.
  template <class F>
  void for_each_sorted(F&& f) const {
    std::vector<const Slot*> sorted;
    sorted.reserve(size_);
    for (const Slot& slot : slots_) {
      if (slot.count > 0) sorted.push_back(&slot);
    }
    std::sort(sorted.begin(), sorted.end(),
              [this](const Slot* a, const Slot* b) { return piece_of(*a) < piece_of(*b); });
    for (const Slot* slot : sorted) f(piece_of(*slot), slot->count);
  }
  // The same, the most frequent pieces first.
  template <class F>
  void for_each_by_count(F&& f) const {
    std::vector<std::pair<int64_t, const Slot*>> sorted;
    sorted.reserve(size_);
    for (const Slot& slot : slots_) {
      if (slot.count > 0) sorted.push_back({-slot.count, &slot});
    }
    std::sort(sorted.begin(), sorted.end());
    for (const auto& [minus_count, slot] : sorted) f(piece_of(*slot), slot->count);
  }

  static int64_t bytes_of(std::string_view piece) {  // at the load that a table has on average
    return int64_t(2 * sizeof(Slot) + (piece.size() <= kLongestShortPiece ? 0 : 4 + piece.size()));
  }

 private:
  struct Slot {
    uint64_t head = 0, tail = 0;  // the key; as a Key it would be padded to 32 bytes
    int64_t count = 0;            // 0: empty
    Key key() const { return Key{head, tail}; }
  };
  static constexpr size_t kSmallest = 1 << 12;

  size_t index(const Key& key) const {
    const uint64_t tail = is_long(key) ? kLongKey : key[1];
    const uint64_t mixed = (key[0] ^ tail * 0x9e3779b97f4a7c15) * 0xd6e8feb86659fd93;
    return size_t((mixed ^ mixed >> 32) & (slots_.size() - 1));
  }

  Slot& find(const Key& key, std::string_view piece) {
    for (size_t i = index(key);; i = (i + 1) & (slots_.size() - 1)) {
      Slot& slot = slots_[i];
      if (slot.count == 0) {
        slot.head = key[0], slot.tail = key[1];
        if (is_long(key)) slot.tail |= append_long(piece);
        size_++;
        return slot;
      }
      if (slot.head != key[0]) continue;
      if (is_long(key) ? is_long(slot.key()) && piece_of(slot) == piece : slot.tail == key[1]) {
        return slot;
      }
    }
  }

  uint64_t append_long(std::string_view piece) {
    const uint64_t offset = long_text_.size();
    const uint32_t size = uint32_t(piece.size());
    long_text_.append(reinterpret_cast<const char*>(&size), sizeof size).append(piece);
    return offset;
  }
  std::string_view piece_of(const Slot& slot) const {
    if (!is_long(slot.key())) {
      return {reinterpret_cast<const char*>(&slot), size_t(slot.tail >> 56)};
    }
    const char* text = long_text_.data() + (slot.tail & ~kLongKey);
    uint32_t size;
    std::memcpy(&size, text, sizeof size);
    return {text + sizeof size, size};
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.count == 0) continue;
      size_t i = index(slot.key());
      while (slots_[i].count > 0) i = (i + 1) & (slots_.size() - 1);
      slots_[i] = slot;
    }
  }

  std::vector<Slot> slots_;
  std::string long_text_;  // of the pieces of 16 bytes and more: size and bytes of each
  size_t size_ = 0;
};

// A table as a temporary file without a name: its pieces with their counts, sorted by their bytes.
class SortedRun {
 public:
  SortedRun() {
    std::string path = (std::filesystem::temp_directory_path() / "cake-pieces-XXXXXX").string();
    const int fd = mkstemp(path.data());
    if (fd >= 0) unlink(path.c_str());
    file_.reset(fd < 0 ? nullptr : fdopen(fd, "w+b"));
    if (!file_) fail(path, ": cannot create: ", errno_text());
    path_ = path;
  }
  explicit SortedRun(const WordTable& table) : SortedRun() {
    table.for_each_sorted([&](std::string_view piece, int64_t count) { write(piece, count); });
  }

  void write(std::string_view piece, int64_t count) {
    const Head head{count, uint32_t(piece.size())};
    if (std::fwrite(&head, sizeof head, 1, file_.get()) != 1 ||
        std::fwrite(piece.data(), 1, piece.size(), file_.get()) != piece.size()) {
      fail_to("write");
    }
  }
  void rewind() {
    if (std::fflush(file_.get()) != 0) fail_to("write");
    std::rewind(file_.get());
  }
  bool next() {  // reads the next piece; false at the end
    Head head;
    if (std::fread(&head, sizeof head, 1, file_.get()) != 1) {
      if (std::ferror(file_.get())) fail_to("read");
      return false;
    }
    count = head.count;
    piece.resize(head.size);
    if (std::fread(piece.data(), 1, piece.size(), file_.get()) != piece.size()) fail_to("read");
    return true;
  }

  std::string piece;  // that next() has read
  int64_t count = 0;

 private:
  struct Head {
    int64_t count;
    uint32_t size;
  };
  [[noreturn]] void fail_to(const char* verb) const {
    fail(path_, ": cannot ", verb, ": ", errno_text(), " (TMPDIR: the folder of temporary files)");
  }
  std::unique_ptr<std::FILE, CloseFile> file_;
  std::string path_;  // that it had, for errors
};

// Calls f(piece, count) for the distinct pieces of all runs, in the order of their bytes.
void merge_runs(std::vector<SortedRun>& runs,
                const std::function<void(std::string_view, int64_t)>& f) {
  const auto after = [](const SortedRun* a, const SortedRun* b) { return a->piece > b->piece; };
  std::priority_queue<SortedRun*, std::vector<SortedRun*>, decltype(after)> queue(after);
  for (SortedRun& run : runs) {
    run.rewind();
    if (run.next()) queue.push(&run);
  }
  std::string piece;
  int64_t count = 0;
  for (int64_t n = 0; !queue.empty(); n++) {
    if (n % 4096 == 0) stop_if_signalled();
    SortedRun* const run = queue.top();
    queue.pop();
    if (run->piece != piece) {
      if (count > 0) f(piece, count);
      piece = run->piece, count = 0;
    }
    count += run->count;
    if (run->next()) queue.push(run);
  }
  if (count > 0) f(piece, count);
}

// The distinct pieces of a corpus, counted in bounded memory.
class PieceCounter {
 public:
  PieceCounter(int64_t max_memory, int threads)
      : max_memory_(max_memory), tables_(size_t(std::max(1, threads))) {}

  // May be called by all threads at once.
  template <class Pieces>
  void add(const Pieces& pieces, size_t n, size_t thread, TooLong& too_long) {
    WordTable& table = tables_[thread];
    table.add(pieces, n, too_long);
    if (!table.is_full(max_memory_ / 2 / int64_t(tables_.size()))) return;
    SortedRun run(table);
    table.clear();
    const std::lock_guard lock(mutex_);
    runs_.push_back(std::move(run));
    temporary_files_++;
    if (runs_.size() >= kMostRuns) {
      SortedRun merged;
      merge_runs(runs_, [&](std::string_view piece, int64_t count) { merged.write(piece, count); });
      runs_.clear();
      runs_.push_back(std::move(merged));
    }
  }

  // All pieces, without those that are dropped. Fills in what the report says of them.
  WordTable finish(TrainingReport& report) {
    report.temporary_files = temporary_files_;
    if (runs_.empty()) {
      WordTable& all = tables_[0];
      for (size_t t = 1; t < tables_.size(); t++) all.add(std::exchange(tables_[t], {}));
      return drop_rare_pieces(
          report, [&](const auto& f) { all.for_each(f); }, &all);
    }
    for (WordTable& table : tables_) {
      if (table.size() > 0) runs_.emplace_back(table);
      table = {};
    }
    return drop_rare_pieces(
        report, [&](const auto& f) { merge_runs(runs_, f); }, nullptr);
  }

  // What a distinct piece costs from here on: its slot, its tokens, and its places in the lists of
  // the pairs. The test of --max-memory measures it.
  static int64_t cost(std::string_view piece) {
    return WordTable::bytes_of(piece) + 24 + 14 * int64_t(piece.size());
  }

 private:
  using Visitor = std::function<void(std::string_view, int64_t)>;
  static constexpr size_t kMostRuns = 64;

  // `visit` calls its argument for each piece; `table` holds all of them, or is null.
  WordTable drop_rare_pieces(TrainingReport& report,
                             const std::function<void(const Visitor&)>& visit,
                             WordTable* table) const {
    // There are few different counts: n pieces have less than sqrt(2 n).
    std::map<int64_t, int64_t, std::greater<>> cost_of_count;
    visit([&](std::string_view piece, int64_t count) {
      cost_of_count[count] += cost(piece);
      report.distinct_pieces++;
      report.pieces += count;
    });
    int64_t bytes = 0, least = 0;
    for (const auto& [count, cost] : cost_of_count) {
      bytes += cost;
      if (bytes > max_memory_ / 2) break;
      least = count;
    }
    if (bytes <= max_memory_ / 2) least = 1;  // all of them
    if (least == 0) {
      fail("--max-memory: found ", bytes_text(double(max_memory_)),
           ", in which not even the most frequent piece fits");
    }
    report.least_count = least;
    if (table && least == 1) return std::move(*table);
    WordTable kept;
    visit([&](std::string_view piece, int64_t count) {
      if (count >= least) return kept.add(piece, count);
      report.dropped_distinct++;
      report.dropped_pieces += count;
    });
    return kept;
  }

  int64_t max_memory_;
  std::vector<WordTable> tables_;  // one for each thread
  std::mutex mutex_;
  std::vector<SortedRun> runs_;
  int64_t temporary_files_ = 0;
};

int64_t half_of_memory() {  // of the machine's, or of what its container may use
  int64_t memory = int64_t(sysconf(_SC_PHYS_PAGES)) * int64_t(sysconf(_SC_PAGESIZE));
  int64_t limit = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && limit > 0) {
    memory = std::min(memory, limit);  // "max" fails
  }
  return memory / 2;
}

// The text of a chunk as it is split, and where the chunk ends in it.
struct NormalText {
  std::string_view text;
  size_t end;
};
NormalText normalize(const TokenizerData& data, const Stretch& stretch, const Chunk& chunk,
                     std::string& normal) {
  const std::string_view text = stretch.text_of(chunk);
  NormalText result{text, chunk.size()};
  if (data.normalizer.normalize_part(text, result.end, chunk.begins_document, normal)) {
    result.text = normal;
  }
  if (data.add_prefix_space && chunk.begins_document && !result.text.starts_with(' ')) {
    normal = " " + std::string(result.text);
    result = {normal, result.end + 1};
  }
  return result;
}

// Pieces of text for a WordTable, cut by the fast scanner where the pattern has one.
class PieceSplitter {
 public:
  explicit PieceSplitter(const PreTokenizer& pre_tokenizer) : pre_tokenizer_(pre_tokenizer) {
    if (const auto pattern = pre_tokenizer.pattern()) scanner_.emplace(*pattern);
  }
  // Calls count(pieces, n) for n pieces of cake/bpe_pieces.h at a time.
  template <class Count>
  void split(std::string_view text, size_t end, Count&& count) {
    if (!scanner_) {
      pieces_.clear();
      pre_tokenizer_.split(text, end, pieces_);
      return count(ListedPieces{pieces_.data()}, pieces_.size());
    }
    for (size_t begin = 0; begin < end;) {
      const size_t n = scanner_->scan(text, begin, end, nullptr);
      count(AdjacentPieces{scanner_->chunk(), scanner_->starts()}, n);
      begin += scanner_->starts()[n];
    }
  }

 private:
  const PreTokenizer& pre_tokenizer_;
  std::optional<PieceScanner<Simd>> scanner_;
  std::vector<std::string_view> pieces_;
};

WordTable count_pieces(const Corpus& corpus, const TokenizerData& data, ConsoleLog& log,
                       TrainingReport& report) {
  const int64_t memory = corpus.max_memory > 0 ? corpus.max_memory : half_of_memory();
  PieceCounter counter(memory, corpus.threads);
  std::vector<PieceSplitter> splitters(size_t(std::max(1, corpus.threads)),
                                       PieceSplitter(data.pre_tokenizer));
  struct Result {
    std::string normal_text;
    TooLong too_long;
  };
  const auto count = [&](const Stretch& stretch, Result& result, size_t thread) {
    result.too_long = {};
    for (const Chunk& c : stretch.chunks) {
      if (c.is_validation) continue;
      const NormalText normal = normalize(data, stretch, c, result.normal_text);
      splitters[thread].split(normal.text, normal.end, [&](const auto& pieces, size_t n) {
        counter.add(pieces, n, thread, result.too_long);
      });
    }
  };
  const auto add_up = [&](const Stretch& stretch, const Result& result) {
    for (const Chunk& c : stretch.chunks) {
      if (c.is_validation) continue;
      report.documents += c.begins_document;
      report.bytes += int64_t(c.size());
    }
    report.too_long_pieces += result.too_long.pieces;
    report.too_long_bytes += result.too_long.bytes;
  };
  Corpus in_cache = corpus;  // a stretch and the list of its pieces
  in_cache.stretch_bytes = std::min<size_t>(corpus.stretch_bytes, 64 << 10);
  report.left_out = for_each_stretch<Result>(in_cache, data, "reading", log, count, add_up).json();
  if (report.bytes == 0) fail("training: found documents without text, expected text");
  WordTable words = counter.finish(report);

  log.note(format("%lld documents, %s, %s distinct pieces", (long long)report.documents,
                  bytes_text(double(report.bytes)).c_str(),
                  count_text(double(report.distinct_pieces)).c_str()));
  if (report.least_count > 1) {
    log.note(concat("dropped ", count_text(double(report.dropped_distinct)),
                    " distinct pieces that occur fewer than ", report.least_count, " times, ",
                    format("%.2f", 100 * double(report.dropped_pieces) / double(report.pieces)),
                    " % of all pieces, to stay within ", bytes_text(double(memory)),
                    " (--max-memory)"));
  }
  if (report.too_long_pieces > 0) {
    log.note(concat("left out ", count_text(double(report.too_long_pieces)), " pieces longer than ",
                    kLongestTrainingPiece, " bytes, ", bytes_text(double(report.too_long_bytes)),
                    " in all"));
  }
  return words;
}

// ---------------------------------------------------------------------------------------------
// Merging

// The counts of pairs, and where the rest of each pair is kept: a hash table with linear probing,
// so that changing a count touches one place in memory.
class PairTable {
 public:
  struct Slot {
    uint64_t key = kEmpty;
    int64_t count = 0;  // in the text; places that overlap count each
    uint32_t pair = kNew;
  };
  static constexpr uint32_t kNew = UINT32_MAX;

  PairTable() : slots_(1 << 16) {}
  Slot& find(int left, int right) {  // one that is there
    const uint64_t key = pair_key(left, right);
    size_t i = index(key);
    while (slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }
  Slot& find_or_add(int left, int right) {  // valid until the next call
    if (2 * (size_ + 1) > slots_.size()) grow();
    const uint64_t key = pair_key(left, right);
    size_t i = index(key);
    while (slots_[i].key != key && slots_[i].key != kEmpty) i = (i + 1) & (slots_.size() - 1);
    if (slots_[i].key == kEmpty) slots_[i].key = key, size_++;
    return slots_[i];
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t(0);
  size_t index(uint64_t key) const {
    const uint64_t mixed = key * 0x9e3779b97f4a7c15;
    return size_t((mixed ^ mixed >> 32) & (slots_.size() - 1));
  }
  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key == kEmpty) continue;
      size_t i = index(slot.key);
      while (slots_[i].key != kEmpty) i = (i + 1) & (slots_.size() - 1);
      slots_[i] = slot;
    }
  }
  std::vector<Slot> slots_;
  size_t size_ = 0;
};

// Joins the most frequent pair of neighbours again and again, as plain::learn_merges does. Of pairs
// with equal counts the smallest (left, right) is joined, so that the order of words does not
// matter.
class Trainer {
 public:
  // tokens_of(piece, tokens) appends the tokens from which a piece starts.
  template <class TokensOf>
  Trainer(const WordTable& words, TokensOf&& tokens_of) {
    words_.reserve(words.size());
    // The most frequent words first: they are visited most often, and stand close together then.
    words.for_each_by_count([&](std::string_view piece, int64_t count) {
      const size_t begin = tokens_.size();
      const uint32_t w = uint32_t(words_.size());
      tokens_of(piece, tokens_);
      words_.push_back({begin, tokens_.size() - begin, count});
      for (size_t i = begin; i + 1 < tokens_.size(); i++) {
        add(tokens_[i], tokens_[i + 1], w);
      }
    });
    enqueue_fresh();
  }

  // The pair to merge next; false when there is none. The count in an entry of the queue may be out
  // of date. It can only have fallen since: the entry goes back with the present count.
  bool best(int& left, int& right) {
    while (!queue_.empty()) {
      const auto [count, minus_left, minus_right] = queue_.top();
      left = -minus_left, right = -minus_right;
      const int64_t present = pairs_.find(left, right).count;
      if (present == count) return true;
      queue_.pop();
      if (present > 0) queue_.push({present, minus_left, minus_right});
    }
    return false;
  }

  // Replaces the pair by `token` in every word.
  void merge(int left, int right, int token) {
    PairTable::Slot& pair = pairs_.find(left, right);
    const std::vector<uint32_t> words = std::exchange(words_of_[pair.pair], {});
    pair.count = 0;
    fresh_.clear();
    for (size_t i = 0; i < words.size(); i++) {
      prefetch(words, i);
      merge_word(words[i], left, right, token);
    }
    enqueue_fresh();
  }

  // The pair is never merged.
  void exclude(int left, int right) {
    PairTable::Slot& pair = pairs_.find(left, right);
    words_of_[pair.pair] = {};
    pair.count = 0;  // and it falls further where other merges break the pair
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
  using Entry = std::tuple<int64_t, int, int>;  // count, -left, -right

  void enqueue_fresh() {
    for (const auto& [left, right] : fresh_) {
      queue_.push({pairs_.find(left, right).count, -left, -right});
    }
  }

  void add(int left, int right, uint32_t w) {
    PairTable::Slot& pair = pairs_.find_or_add(left, right);
    if (pair.pair == PairTable::kNew) {
      pair.pair = uint32_t(words_of_.size());
      words_of_.emplace_back();
      fresh_.push_back({left, right});
    }
    pair.count += words_[w].count;
    std::vector<uint32_t>& words = words_of_[pair.pair];
    if (words.empty() || words.back() != w) words.push_back(w);
  }

  // Joins (left, right) to `token` in one word, from left to right, in place. Every pair of
  // neighbours that disappears is subtracted from its count once, every new one is added once.
  void merge_word(uint32_t w, int left, int right, int token) {
    Word& word = words_[w];
    int* const t = tokens_.data() + word.begin;
    const auto subtract = [&](int a, int b) { pairs_.find(a, b).count -= word.count; };
    size_t out = 0;
    bool joined = false;  // the last step joined a pair, and subtracted the pair on its right
    for (size_t i = 0; i < word.size;) {
      if (i + 1 < word.size && t[i] == left && t[i + 1] == right) {
        // t[out - 1] is the token before: `token` itself if joined.
        if (out > 0 && !joined) subtract(t[out - 1], left);
        if (i + 2 < word.size) subtract(right, t[i + 2]);
        if (out > 0) add(t[out - 1], token, w);
        t[out++] = token;
        joined = true;
        i += 2;
      } else {
        if (joined) add(token, t[i], w);
        t[out++] = t[i++];
        joined = false;
      }
    }
    word.size = out;
  }

  // Fetches the words that come next, which lie anywhere in memory.
  void prefetch(const std::vector<uint32_t>& words, size_t i) const {
    constexpr size_t kAhead = 8;
    if (i + 2 * kAhead < words.size()) __builtin_prefetch(&words_[words[i + 2 * kAhead]]);
    if (i + kAhead < words.size()) {
      __builtin_prefetch(tokens_.data() + words_[words[i + kAhead]].begin);
    }
  }

  std::vector<int> tokens_;  // of all words, end to end; merges shorten a word in place
  std::vector<Word> words_;
  PairTable pairs_;
  std::vector<std::vector<uint32_t>> words_of_;  // by pair: every word that has held it, once
  std::vector<std::pair<int, int>> fresh_;       // pairs that were met for the first time
  std::priority_queue<Entry> queue_;
};

// Sets the normalizer and the pre-tokenizer: those of a known pattern, of a tokenizer's file, or of
// a regular expression.
void set_pattern(TokenizerData& data, const std::string& pattern) {
  for (const Pattern known : {Pattern::gpt2, Pattern::cl100k, Pattern::qwen2, Pattern::o200k}) {
    if (pattern == pattern_name(known)) data.pre_tokenizer = PreTokenizer(known);
    if (pattern == pattern_name(known)) return;
  }
  std::error_code ec;
  if (std::filesystem::exists(pattern, ec)) {
    const Tokenizer other = Tokenizer::load(pattern);
    data.normalizer = other.data().normalizer;
    data.pre_tokenizer = other.data().pre_tokenizer;
    data.add_prefix_space = other.data().add_prefix_space;
    return;
  }
  const bool is_name = std::all_of(pattern.begin(), pattern.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '/' || c == '.' || c == '-' || c == '_';
  });
  if (is_name) {
    fail("--pattern: found ", pattern, ", expected gpt2, cl100k, qwen2 or o200k, a regular ",
         "expression, or the path of a tokenizer");
  }
  data.pre_tokenizer = PreTokenizer(std::vector<SplitStep>{split_step(pattern)});
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// A new vocabulary

Tokenizer train_tokenizer(const Corpus& corpus, int vocab_size, const std::string& pattern,
                          TrainingReport* report) {
  constexpr int kSmallest = 256 + kSpecials, kLargest = Merges::kMaxTokens;
  require(vocab_size >= kSmallest && vocab_size <= kLargest, "--vocab-size: found ", vocab_size,
          ", expected ", kSmallest, " (256 bytes and ", kSpecials, " special tokens) to ",
          kLargest);
  auto data = std::make_shared<TokenizerData>();
  set_pattern(*data, pattern);
  ConsoleLog log(corpus.quiet);
  TrainingReport counted;
  Trainer trainer(count_pieces(corpus, *data, log, counted),
                  [](std::string_view piece, std::vector<int>& tokens) {
                    for (const unsigned char byte : piece) tokens.push_back(byte);
                  });
  if (report) *report = counted;

  const int merges = vocab_size - kSmallest;
  for (int left, right; data->merges.size() < 256 + merges && trainer.best(left, right);) {
    const int token = data->merges.add(left, right);
    trainer.merge(left, right, token);
    stop_if_signalled();
    if (log.progress_is_due()) log.progress(format("merging: %d of %d", token - 255, merges));
  }
  for (int t = 0; t < data->merges.size(); t++) data->ids.push_back(t);
  for (int i = 0; i < kSpecials; i++) {
    data->added.push_back({kSpecialTokens[i], data->merges.size() + i});
  }
  data->complete("training");

  const int size = data->merges.size() + kSpecials;
  if (size < vocab_size) {
    log.note(format("the text has pairs for only %d of the %d tokens asked for", size, vocab_size));
  }
  log.progress(
      format("trained %d tokens on %lld documents, %s: %.3f bytes a token there, %s", size,
             (long long)counted.documents, bytes_text(double(counted.bytes)).c_str(),
             double(counted.bytes) / double(trainer.tokens()), log.rate(counted.bytes).c_str()),
      true);
  return Tokenizer(data);
}

// ---------------------------------------------------------------------------------------------
// More tokens for a vocabulary

static bool is_whole_token(const TokenizerData& data, std::string_view piece) {
  const int id = data.whole_pieces.find(piece_hash(piece));
  return id >= 0 && data.token(id) == piece;
}

// Special tokens get the ids behind the last one, in the order in which they are named, and trained
// ones those behind them. Trained tokens continue the merges on what the present vocabulary makes
// of the documents, so that a text's ids change only where new tokens are used.
Tokenizer extend_tokenizer(const Tokenizer& tokenizer, const Corpus& corpus,
                           const ExtendOptions& more) {
  const TokenizerData& old = tokenizer.data();
  const int most = Merges::kMaxTokens - old.merges.size();
  require(more.tokens >= 0 && more.tokens <= most, "--tokens: found ", more.tokens,
          ", expected 0 to ", most);
  require(more.tokens > 0 || !more.specials.empty(),
          "extend: found neither --special nor --tokens, expected tokens to add");
  require(more.tokens == 0 || !corpus.inputs.empty(),
          "--tokens: found no INPUT, expected documents to train on");
  auto data = std::make_shared<TokenizerData>(old);
  int next_id = tokenizer.vocab_size();
  std::set<std::string_view> taken;
  for (int id = 0; id < next_id; id++) taken.insert(tokenizer.token_bytes(id));
  for (const std::string& name : more.specials) {
    require(!name.empty(), "--special: found an empty name");
    if (!taken.insert(name).second) {
      fail("--special: found ", name, ", which the vocabulary has already or which is named twice");
    }
    data->added.push_back({name, next_id});
    data->add_token(next_id++, name);
  }
  if (more.tokens > 0) {
    ConsoleLog log(corpus.quiet);
    TrainingReport counted;
    Merges::Scratch scratch;
    Trainer trainer(count_pieces(corpus, old, log, counted),
                    [&](std::string_view piece, std::vector<int>& tokens) {
                      if (old.ignore_merges && is_whole_token(old, piece)) return;
                      old.merges.encode(piece, scratch);
                      tokens.insert(tokens.end(), scratch.tokens.begin(), scratch.tokens.end());
                    });
    const int first_size = data->merges.size(), last_size = first_size + more.tokens;
    std::set<std::string> names;  // of the new tokens
    for (int left, right; data->merges.size() < last_size && trainer.best(left, right);) {
      const std::string bytes = concat(data->merges.bytes(left), data->merges.bytes(right));
      // A token of these bytes that merges do not reach, and bytes without a token.
      const bool is_taken = taken.count(bytes) || names.count(bytes);
      if (is_taken || data->ids[size_t(left)] < 0 || data->ids[size_t(right)] < 0) {
        trainer.exclude(left, right);
        continue;
      }
      names.insert(bytes);
      const int token = data->merges.add(left, right);
      data->ids.push_back(next_id);
      data->add_token(next_id++, bytes);
      trainer.merge(left, right, token);
      stop_if_signalled();
      if (log.progress_is_due()) {
        log.progress(format("merging: %d of %d", token - first_size + 1, more.tokens));
      }
    }
    const int trained = data->merges.size() - first_size;
    if (trained < more.tokens) {
      log.note(format("the text has pairs for only %d of the %d tokens asked for", trained,
                      more.tokens));
    }
    log.progress(
        format("trained %d further tokens on %lld documents, %s: %.3f bytes a token there, %s",
               trained, (long long)counted.documents, bytes_text(double(counted.bytes)).c_str(),
               double(counted.bytes) / double(trainer.tokens()), log.rate(counted.bytes).c_str()),
        true);
  }
  data->json.clear();
  data->complete("tokenizer");
  return Tokenizer(data);
}

}  // namespace cake
