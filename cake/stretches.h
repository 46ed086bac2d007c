// A corpus for many threads: its documents as stretches of text, and work that is written in order.
//
//     documents (cake/documents.h) --CorpusReader--> stretches --work, in all threads--> results
//         --write, in the order of the text--> shards, counts
//
// One thread at a time reads the next stretch, every thread works on a stretch of its own, and
// results are written in the order of the text. So reading, work and writing overlap, and what is
// written is the same for any number of threads. A stretch holds documents and parts of documents
// which are encoded apart from each other. A document is cut only where that changes no token
// (is_safe_cut); one without such a place is in one stretch, however long it is.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cake/bpe.h"
#include "cake/documents.h"
#include "cake/run.h"

namespace cake {

// A document, or a part of one.
struct Chunk {
  size_t begin, end;  // in the stretch's text
  size_t text_end;    // the stretch holds the document's text at least to here
  bool begins_document, is_validation;
  size_t size() const { return end - begin; }
};
struct Stretch {
  std::string text;
  std::vector<Chunk> chunks;
  // Lines of JSON from which text and chunks are still to be made: CorpusReader::parse.
  std::string json;
  int64_t json_line = 0;  // the number of the first line
  std::string json_file;
  simdjson::dom::parser parser;
  LeftOut left_out;  // lines of JSON, with --bad-lines skip
  // The chunk and what follows it in its document: whether a piece ends can depend on that.
  std::string_view text_of(const Chunk& c) const {
    return std::string_view(text).substr(c.begin, c.text_end - c.begin);
  }
};

// The lines that a long command prints; none when it is quiet.
class ConsoleLog {
 public:
  explicit ConsoleLog(bool quiet) : quiet_(quiet) {}
  bool progress_is_due() {  // five lines a second are enough
    const double time = now();
    if (quiet_ || time < next_) return false;
    next_ = time + .2;
    return true;
  }
  void progress(const std::string& line, bool last = false) {
    if (!quiet_) line_.show(line, last);
  }
  void note(const std::string& line) {
    if (!quiet_) line_.note(line);
  }
  double seconds() const { return now() - start_; }
  std::string rate(int64_t bytes) const {  // since the start
    return format("%.2f s, %.1f MB/s", seconds(), double(bytes) / 1e6 / std::max(seconds(), 1e-9));
  }

 private:
  bool quiet_;
  ProgressLine line_;
  double start_ = now(), next_ = start_ + 1;
};

// ---------------------------------------------------------------------------------------------
// Work in order

// Calls read(item), which fills an item and returns false at the end, in one thread at a time;
// work(item, thread) in all threads; write(item) in the order of reading, one at a time. Items are
// reused, so that their memory is touched for the first time only once. At most 2 * threads + 1 of
// them exist. An exception in a thread comes out here, the one of the earliest item.
template <class Item, class Read, class Work, class Write>
void run_in_order(int threads, Read&& read, Work&& work, Write&& write) {
  std::mutex reading, writing;
  std::condition_variable written;
  int64_t items_read = 0, items_written = 0;
  std::map<int64_t, Item> waiting;  // done, but an earlier one is not
  std::vector<Item> spare;
  bool ended = false, is_writing = false;
  std::atomic<bool> failed = false;
  std::exception_ptr failure;
  int64_t failed_item = INT64_MAX;

  const auto pop_spare = [&] {
    if (spare.empty()) return Item();
    Item item = std::move(spare.back());
    spare.pop_back();
    return item;
  };
  // Hands an item over. The thread that brings the next one in order writes it, and those behind it
  // that wait already. Returns an item to fill.
  const auto deliver = [&](int64_t number, Item item) {
    std::unique_lock lock(writing);
    written.wait(lock, [&] {
      return failed || number == items_written || waiting.size() < size_t(threads);
    });
    waiting.emplace(number, std::move(item));
    if (number != items_written || is_writing) return pop_spare();
    is_writing = true;
    while (!failed && !waiting.empty() && waiting.begin()->first == items_written) {
      Item next = std::move(waiting.begin()->second);
      waiting.erase(waiting.begin());
      lock.unlock();
      write(next);
      lock.lock();
      spare.push_back(std::move(next));
      items_written++;
      written.notify_all();
    }
    is_writing = false;
    return pop_spare();
  };
  const auto run_thread = [&](size_t thread) {
    int64_t number = 0;
    try {
      for (Item item = Item();; item = deliver(number, std::move(item))) {
        {
          const std::lock_guard lock(reading);
          number = items_read;
          if (ended || failed) return;
          stop_if_signalled();
          ended = !read(item);
          if (ended) return;
          items_read++;
        }
        work(item, thread);
      }
    } catch (...) {
      const std::lock_guard lock(writing);
      failed = true;
      if (number < failed_item) failure = std::current_exception(), failed_item = number;
      written.notify_all();
    }
  };
  {
    std::vector<std::jthread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(run_thread, size_t(t));
    run_thread(0);
  }
  if (failure) std::rethrow_exception(failure);
}

// ---------------------------------------------------------------------------------------------
// The part of the corpus that is kept for validation

// Of the first 64 KiB of a document, which is to say of all of most documents.
inline uint64_t document_hash(std::string_view document) {
  return piece_hash(document.substr(0, 1 << 16));
}

//   one document:       its last `fraction`, from the next line on
//   2 to 64 documents:  those with the smallest hashes; their number is the nearest to the
//                       fraction, but at least one and not all
//   more documents:     those whose hash is below the fraction of 2^64
class ValidationSplit {
 public:
  static constexpr size_t kFew = 64;

  ValidationSplit(const std::vector<Input>& inputs, double fraction,
                  const RecordOptions& options = {}) {
    require(fraction >= 0 && fraction < 1, "--val-fraction: found ", fraction,
            ", expected 0 or more and less than 1");
    if (fraction == 0) return;
    std::set<uint64_t> hashes;
    size_t documents = 0;
    DocumentReader reader(inputs, options);
    for (DocumentPart part; documents <= kFew && reader.next(part);) {
      if (!part.begins || part.text.empty()) continue;
      documents++;
      hashes.insert(document_hash(part.text));
      if (!part.ends) reader.skip_document();
    }
    if (documents == 1) {
      find_tail(inputs, fraction, options);
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
    return threshold_ > 0 && document_hash(document) < threshold_;
  }

 private:
  void find_tail(const std::vector<Input>& inputs, double fraction, const RecordOptions& options) {
    int64_t bytes = 0;
    DocumentReader counter(inputs, options);
    for (DocumentPart part; counter.next(part);) bytes += int64_t(part.text.size());
    const int64_t wanted = bytes - int64_t(double(bytes) * fraction);
    std::string near;  // the bytes from `wanted` on
    int64_t offset = 0;
    DocumentReader reader(inputs, options);
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

// ---------------------------------------------------------------------------------------------
// Documents to stretches

class CorpusReader {
 public:
  // `others`: vocabularies that are to encode the same stretches.
  CorpusReader(const std::vector<Input>& inputs, const RecordOptions& options,
               const ValidationSplit& split, const TokenizerData& data, size_t stretch_bytes,
               std::span<const TokenizerData* const> others = {})
      : reader_(inputs, options, kPartBytes),
        split_(split),
        data_(data),
        others_(others),
        stretch_bytes_(stretch_bytes) {}

  // The next stretch: whole documents, and of one that goes on the text up to the last safe cut;
  // or lines of JSON. Called by one thread at a time.
  bool next(Stretch& stretch) {
    stretch.text.swap(rest_);
    rest_.clear();
    stretch.chunks.clear();
    stretch.json.clear();
    stretch.left_out = {};
    chunk_begin_ = 0;
    if (!open_ && !part_is_open_ && !split_.has_tail() && next_json(stretch)) return true;
    // Where there was no safe cut, twice as much text as before: looking for a cut anew takes no
    // longer in all than reading.
    const size_t wanted = 2 * stretch.text.size() + stretch_bytes_;
    while (stretch.text.size() < wanted && next_part(stretch)) add_text(stretch, wanted);
    if (open_) defer_rest(stretch);
    return !stretch.chunks.empty() || open_;
  }

  // Makes text and chunks of the lines of JSON, if there are any. May be called by several threads,
  // each with its stretch.
  void parse(Stretch& stretch) const {
    if (stretch.json.empty()) return;
    const std::string_view lines =
        std::string_view(stretch.json).substr(0, stretch.json.size() - simdjson::SIMDJSON_PADDING);
    int64_t number = stretch.json_line;
    for (size_t begin = 0; begin < lines.size(); number++) {
      const size_t end = std::min(lines.size(), lines.find('\n', begin));
      const std::string_view line = lines.substr(begin, end - begin);
      begin = end + 1;
      std::string_view document;
      try {
        document = parse_document(line, {stretch.json_file, number}, stretch.parser);
      } catch (const RecordError& e) {
        if (!reader_.options().skip_bad_lines) throw;
        stretch.left_out.add("bad line", e.what());
      }
      if (document.empty()) continue;
      const size_t chunk_begin = stretch.text.size();
      stretch.text += document;
      stretch.chunks.push_back({chunk_begin, stretch.text.size(), stretch.text.size(), true,
                                split_.is_validation(document)});
    }
  }

  // What was left out before the stretches, and the line about <|endoftext|> inside lines.
  const LeftOut& left_out() const { return reader_.left_out(); }
  std::string divider_note(bool specials) const { return reader_.divider_note(specials); }

 private:
  // The text in a line of JSON; "": the line is blank, or the text is.
  std::string_view parse_document(std::string_view line, const LinePlace& place,
                                  simdjson::dom::parser& parser) const {
    simdjson::dom::element record;
    std::string_view text;
    if (!parse_json_value(line, place, parser, record)) return {};
    const FieldNames& names = reader_.options().names;
    if (document_text(record, names, text)) return text;
    throw RecordError(document_problem(record, names, place.where()));
  }

  // What is read at once: it is copied into a stretch while it is in the processor's cache.
  static constexpr size_t kPartBytes = 256 << 10;

  bool next_json(Stretch& stretch) {
    JsonBlock block;
    if (!reader_.next_json_lines(block, stretch_bytes_)) return false;
    stretch.json = block.lines;
    stretch.json.append(simdjson::SIMDJSON_PADDING, '\0');
    stretch.json_line = block.number;
    stretch.json_file = std::move(block.file);
    return true;
  }

  // part_ is a part of which some text is left, or one that ends its document.
  bool next_part(const Stretch& stretch) {
    if (part_is_open_) return true;
    if (!reader_.next(part_)) return false;
    part_is_open_ = true;
    if (part_.begins) {
      begin_document(stretch, !split_.has_tail() && split_.is_validation(part_.text));
      offset_ = 0;
    }
    return true;
  }

  // Moves text from part_ to the stretch: all of it, or up to the wanted size, or up to the tail.
  void add_text(Stretch& stretch, size_t wanted) {
    size_t size = std::min(part_.text.size(), wanted - stretch.text.size());
    const bool before_tail = split_.has_tail() && offset_ < split_.tail();
    if (before_tail) size = std::min(size, size_t(split_.tail() - offset_));
    stretch.text += part_.text.substr(0, size);
    part_.text.remove_prefix(size);
    offset_ += int64_t(size);
    if (before_tail && offset_ == split_.tail()) {
      end_document(stretch);
      begin_document(stretch, true);
    }
    if (!part_.text.empty()) return;
    part_is_open_ = false;
    if (part_.ends) end_document(stretch);
  }

  void begin_document(const Stretch& stretch, bool validation) {
    open_ = begins_ = true;
    validation_ = validation;
    chunk_begin_ = stretch.text.size();
  }
  void end_document(Stretch& stretch) {
    add_chunk(stretch, stretch.text.size());
    open_ = false;
  }

  // Leaves the text of an unfinished document behind the last safe cut to the next stretch.
  void defer_rest(Stretch& stretch) {
    size_t cut = stretch.text.size();
    while (cut > chunk_begin_ && !all_allow_cut(stretch.text, cut)) cut--;
    add_chunk(stretch, cut);
    rest_ = stretch.text.substr(cut);
  }

  bool all_allow_cut(std::string_view text, size_t i) const {
    return is_safe_cut(data_, text, i) &&
           std::all_of(others_.begin(), others_.end(),
                       [&](const TokenizerData* other) { return is_safe_cut(*other, text, i); });
  }

  void add_chunk(Stretch& stretch, size_t end) {
    if (end == chunk_begin_) return;
    stretch.chunks.push_back(
        {chunk_begin_, end, stretch.text.size(), std::exchange(begins_, false), validation_});
    chunk_begin_ = end;
  }

  DocumentReader reader_;
  const ValidationSplit& split_;
  const TokenizerData& data_;
  const std::span<const TokenizerData* const> others_;
  const size_t stretch_bytes_;
  DocumentPart part_;
  bool part_is_open_ = false;
  std::string rest_;        // text of the open document for the next stretch
  size_t chunk_begin_ = 0;  // where the text of the open document that is in no chunk yet begins
  int64_t offset_ = 0;      // bytes of the open document so far
  bool open_ = false, begins_ = false, validation_ = false;
};

// ---------------------------------------------------------------------------------------------
// The whole: work(stretch, result, thread) for each stretch, then write(stretch, result) in order.
// `verb` is for the progress line. `others`: further vocabularies that encode the same stretches.
// Returns the records that were left out, which the log names.
template <class Result, class Work, class Write>
LeftOut for_each_stretch(const Corpus& corpus, const TokenizerData& data, const char* verb,
                         ConsoleLog& log, Work&& work, Write&& write,
                         std::span<const TokenizerData* const> others = {}) {
  if (corpus.inputs.empty()) fail("found no inputs, expected text, JSON lines, WET or parquet");
  if (corpus.threads < 1) fail("--threads: found ", corpus.threads, ", expected 1 or more");
  std::vector<Input> inputs = expand_folders(corpus.inputs);
  std::vector<SpooledInput> copies;  // of standard input: a split reads the inputs first
  if (corpus.val_fraction > 0) {
    for (Input& input : inputs) copies.emplace_back(input);
  }
  const ValidationSplit split(inputs, corpus.val_fraction, corpus.records);
  CorpusReader reader(inputs, corpus.records, split, data, corpus.stretch_bytes, others);
  struct Item {
    Stretch stretch;
    Result result;
  };
  int64_t bytes = 0, documents = 0;
  LeftOut left_out;
  run_in_order<Item>(
      corpus.threads, [&](Item& item) { return reader.next(item.stretch); },
      [&](Item& item, size_t thread) {
        reader.parse(item.stretch);
        work(item.stretch, item.result, thread);
      },
      [&](Item& item) {
        write(item.stretch, item.result);
        for (const Chunk& c : item.stretch.chunks) {
          bytes += int64_t(c.size());
          documents += c.begins_document;
        }
        left_out.add(item.stretch.left_out);
        if (log.progress_is_due()) {
          log.progress(concat(verb, ": ", bytes_text(double(bytes)), ", ", log.rate(bytes)));
        }
      });
  left_out.add(reader.left_out());
  require(documents > 0 || left_out.total() == 0, "found no document to use: ", left_out.summary());
  std::string notes =
      left_out.text(documents + left_out.total()) + reader.divider_note(corpus.specials);
  if (notes.ends_with('\n')) notes.pop_back();
  if (!notes.empty()) log.note(notes);
  return left_out;
}

}  // namespace cake
