// Stage 0, the corpus: raw pages to clean text, with a verdict on every page.
//
//     pages --extract--> text --measure--> values --rules--> kept, or dropped by the first it fails
//           kept --signatures--> duplicates dropped --> documents.jsonl.zst
//
//     clean    all of it, into a directory: the documents, the verdicts, a report to look at
//     extract  pages to text alone
//     dedup    no rules, duplicates alone
//     what-if  other thresholds on the verdicts of a run: the verdicts of a new run, in seconds
//     classify a quality classifier: train it, apply it
//     status   how far a run is
//
// Many processes can work on one run over a shared folder. The inputs are cut into tasks. A process
// claims a task by a file lock, which ends with the process however it ends. A finished task has a
// marker, a killed one goes on where it last saved: whoever is left finishes what others began. The
// bytes that come out depend on the inputs and the settings alone, not on the number of threads,
// processes or tasks.
//
// Sources: the recipe is FineWeb's (Penedo et al. 2024), with rules from Gopher (Rae et al. 2021)
// and C4 (Raffel et al. 2020); MinHash, Broder 1997; exact substrings, Lee et al. 2022.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <functional>
#include <future>
#include <set>
#include <thread>
#include <unordered_map>

#include "cake/corpus.h"
#include "cake/flags.h"
#include "cake/json.h"

namespace cake::corpus {

namespace fs = std::filesystem;

namespace {

// ---------------------------------------------------------------------------------------------
// A run: its settings, its tasks and its files

struct CleanOptions {
  std::vector<std::string> inputs;
  std::string output;
  PageOptions pages;
  ExtractOptions extract;
  MeasureOptions measure;
  Thresholds thresholds;  // one for each rule
  bool exact = true, near = true;
  int64_t min_repeated = 0;  // bytes of the shortest repeated substring that is removed; 0: none is
  double shard_mb = 256;     // text in which repeated substrings are looked for
  int tasks = 0;             // 0: one for every kTaskBytes of input
  int rank = -1, world_size = 0;  // -1, 0: as the environment says
  int threads = 0;
  double memory_gb = 1;
  double save_seconds = 30;  // between two places from which a killed task goes on
  bool wait = true, overwrite = false;
};

constexpr int64_t kTaskBytes = 64 << 20;
constexpr size_t kPasses = kBands + 1;  // over the signatures' columns: the text's hash, the bands

struct Workers;  // what a process keeps between its tasks
class TaskLock;

// Tasks are runs of inputs. What a task writes lies in DIR/parts under its number.
struct Job {
  CleanOptions options;
  fs::path dir;
  std::vector<Input> inputs;
  std::vector<int64_t> bytes;       // of each input; 0: unknown
  std::vector<size_t> first_input;  // of each task, and the end
  std::shared_ptr<Workers> workers;
  std::shared_ptr<TaskLock> in_use;  // shared by the processes that work on the run

  size_t tasks() const { return first_input.size() - 1; }
  fs::path part(size_t task, const char* what) const {
    return dir / "parts" / format("%05zu.%s", task, what);
  }
  fs::path marker(size_t task) const { return part(task, "json"); }
  fs::path pairs(size_t pass) const { return dir / "parts" / format("pairs-%02zu", pass); }
  fs::path finished() const { return dir / "parts" / "finished"; }  // marks the end
  int64_t task_bytes(size_t task) const {
    int64_t sum = 0;
    for (size_t i = first_input[task]; i < first_input[task + 1]; i++) sum += bytes[i];
    return sum;
  }
};

// The story of `clean`: any process does any of this work, until all is done.
// Pages to verdicts, texts and signatures.
void read_task(Job& job, size_t task);
// Pairs of documents that agree in one column of the signatures.
void pair_pass(const Job& job, size_t pass);
// Duplicates out: the documents, the verdicts, the report.
void finish_job(const Job& job);

using Markers = std::function<fs::path(size_t)>;
bool share_work(const Job& job, const char* what, size_t count, const Markers& marker,
                const std::function<void(size_t)>& work);

void clean(Job& job) {
  const size_t passes = job.options.near ? kPasses : job.options.exact ? 1 : 0;
  const bool done =
      share_work(
          job, "tasks", job.tasks(), [&](size_t i) { return job.marker(i); },
          [&](size_t i) { read_task(job, i); }) &&
      share_work(
          job, "passes over signatures", passes, [&](size_t i) { return job.pairs(i); },
          [&](size_t i) { pair_pass(job, i); }) &&
      share_work(
          job, "end", 1, [&](size_t) { return job.finished(); }, [&](size_t) { finish_job(job); });
  if (!done)
    std::printf("another process goes on with the rest: ./corpus status %s\n", job.dir.c_str());
}

// ---------------------------------------------------------------------------------------------
// Work that processes share

// A lock on a file, which is made where it is missing, or on a directory; the system gives it up
// when the process ends. `operation`: flock's.
class TaskLock {
 public:
  explicit TaskLock(const fs::path& path, int operation = LOCK_EX | LOCK_NB)
      : fd_(fs::is_directory(path) ? open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
                                   : open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail(path.string(), ": cannot open: ", errno_text());
    locked_ = flock(fd_, operation) == 0;
    if (locked_ || errno == EWOULDBLOCK) return;
    const std::string reason = errno_text();
    close(fd_);
    fail(path.string(), ": cannot lock: ", reason,
         ": processes share work only where files can be locked");
  }
  void share() { flock(fd_, LOCK_SH); }  // others may hold it, too
  TaskLock(const TaskLock&) = delete;
  TaskLock& operator=(const TaskLock&) = delete;
  ~TaskLock() { close(fd_); }
  explicit operator bool() const { return locked_; }

 private:
  int fd_;
  bool locked_ = false;
};

// Does the pieces of work that have no marker yet and that no other process holds, until all have
// one. False: others still work on the rest, and this process is not to wait for them. Processes
// begin at different places, so that they seldom meet.
bool share_work(const Job& job, const char* what, size_t count, const Markers& marker,
                const std::function<void(size_t)>& work) {
  const CleanOptions& o = job.options;
  const size_t begin =
      o.rank <= 0 ? 0 : size_t(o.rank) * count / size_t(std::max(o.world_size, o.rank + 1));
  bool told = false;
  for (;;) {
    size_t missing = 0, done_here = 0;
    for (size_t k = 0; k < count; k++) {
      stop_if_signalled();
      const size_t i = (begin + k) % count;
      if (fs::exists(marker(i))) continue;
      const TaskLock lock(marker(i).string() + ".lock");
      if (!lock) {
        missing++;
      } else if (!fs::exists(marker(i))) {  // it may have ended between the two looks
        work(i), done_here++;
      }
    }
    if (missing == 0) return true;
    if (done_here > 0) continue;
    if (!o.wait) return false;
    if (!std::exchange(told, true))
      std::printf("waiting for other processes: %zu %s left\n", missing, what);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

// ---------------------------------------------------------------------------------------------
// Output: frames of text that are complete lines

std::string compressed_frame(std::string_view text, int level) {
  std::string frame(ZSTD_compressBound(text.size()), '\0');
  const size_t size = ZSTD_compress(frame.data(), frame.size(), text.data(), text.size(), level);
  if (ZSTD_isError(size)) fail("zstd: ", ZSTD_getErrorName(size));
  frame.resize(size);
  return frame;
}

constexpr size_t kFrameBytes = 4 << 20;

// A task's file, which grows by whole frames. What a killed process wrote beyond the last saved
// length is cut off.
class PartFile {
 public:
  PartFile(fs::path path, uint64_t length, bool compress)
      : path_(std::move(path)), length_(length), compress_(compress) {
    file_.reset(std::fopen(path_.c_str(), length > 0 ? "r+b" : "wb"));
    if (!file_) fail(path_.string(), ": cannot create: ", errno_text());
    if (ftruncate(fileno(file_.get()), off_t(length)) != 0 ||
        fseeko(file_.get(), 0, SEEK_END) != 0) {
      fail(path_.string(), ": cannot cut to ", length, " bytes: ", errno_text());
    }
  }
  void write(std::string_view bytes) {
    text_ += bytes;
    if (text_.size() >= kFrameBytes) flush();
  }
  uint64_t flush() {  // the file's length; a compressed file without text holds an empty frame
    if (!text_.empty() || (compress_ && length_ == 0)) {
      const std::string& bytes = compress_ ? text_ = compressed_frame(text_, 1) : text_;
      write_bytes(file_.get(), bytes.data(), bytes.size(), path_);
      length_ += bytes.size();
      text_.clear();
    }
    if (std::fflush(file_.get()) != 0) fail(path_.string(), ": cannot write: ", errno_text());
    return length_;
  }
  void sync() { flush(), sync_path(path_); }

 private:
  fs::path path_;
  std::unique_ptr<std::FILE, CloseFile> file_;
  uint64_t length_;
  bool compress_;
  std::string text_;
};

}  // namespace

TextFile::TextFile(const fs::path& path, int threads)
    : zstd_(path.extension() == ".zst"), threads_(size_t(std::max(threads, 1))), frames_(1) {
  if (path != "-") file_.emplace(path);
}

void TextFile::write(std::string_view lines) {
  is_empty_ &= lines.empty();
  frames_.back() += lines;
  if (frames_.back().size() < kFrameBytes) return;
  if (frames_.size() == threads_) compress();
  frames_.emplace_back();
}

void TextFile::compress() {
  if (zstd_) {
    parallel_for(frames_.size(), int(threads_), [&](size_t i, size_t) {
      if (!frames_[i].empty() || is_empty_) frames_[i] = compressed_frame(frames_[i], 3);
    });
  }
  for (const std::string& frame : frames_) {
    if (file_ && !frame.empty()) file_->write(frame);
    if (!file_) write_bytes(stdout, frame.data(), frame.size(), "standard output");
  }
  frames_.clear();
}

void TextFile::commit() {
  compress();
  if (file_) file_->commit();
  if (!file_ && std::fflush(stdout) != 0) fail("standard output: cannot write: ", errno_text());
}

namespace {

// The shortest decimal form that gives the same double back; null: not a number.
void append_value(std::string& out, double x) {
  char digits[32];
  if (std::isnan(x)) {
    out += "null";
  } else if (x == std::floor(x) && std::fabs(x) < 1e15) {
    out.append(digits, std::to_chars(digits, std::end(digits), int64_t(x)).ptr);
  } else {
    out.append(digits, std::to_chars(digits, std::end(digits), x).ptr);
  }
}

void append_member(std::string& out, std::string_view key, std::string_view text) {
  out += '"', out += key, out += "\":";
  append_json_string(out, text);
}
void append_member(std::string& out, std::string_view key, int64_t number) {
  out += '"', out += key, out += "\":", out += std::to_string(number);
}

// At most `bytes` of it, cut before a character.
std::string_view beginning(std::string_view text, size_t bytes) {
  if (text.size() <= bytes) return text;
  while (bytes > 0 && (text[bytes] & 0xc0) == 0x80) bytes--;
  return text.substr(0, bytes);
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Verdicts

std::string_view Verdict::reason() const {
  if (rule >= 0) return rules()[size_t(rule)].name;
  if (empty) return "empty";
  if (original) return exact ? "exact-duplicate" : "near-duplicate";
  return "kept";
}

std::string verdict_line(const Verdict& v) {
  std::string line = "{";
  append_member(line, "input", int64_t(v.place.input));
  line += ',', append_member(line, "offset", int64_t(v.place.offset));
  line += ',', append_member(line, "verdict", v.reason());
  if (v.original) {
    line += concat(",\"original\":[", v.original->input, ",", v.original->offset, "]");
  }
  line += ',', append_member(line, "url", v.url);
  line += ',', append_member(line, "id", v.id);
  line += ',', append_member(line, "language", v.language);
  line += ',', append_member(line, "bytes", v.bytes);
  if (v.empty) line += ",\"empty\":true";
  if (!v.match.empty()) line += ',', append_member(line, "match", v.match);
  if (v.private_data > 0) line += ',', append_member(line, "private_data", v.private_data);
  if (v.repeated_bytes > 0) line += ',', append_member(line, "repeated_bytes", v.repeated_bytes);
  line += ",\"values\":{";
  const std::span<const Measure> names = measures();
  for (size_t i = 0; i < names.size(); i++) {
    line += i ? ",\"" : "\"", line += names[i].name, line += "\":";
    append_value(line, v.values[i]);
  }
  line += "},", append_member(line, "begins", v.begins);
  return line + "}\n";
}

Verdict parse_verdict(std::string_view line, const std::string& where) {
  thread_local simdjson::dom::parser parser;
  simdjson::dom::object object;
  if (const auto error = parser.parse(line.data(), line.size(), true).get(object)) {
    fail(where, ": not JSON: ", simdjson::error_message(error));
  }
  const auto text = [&](const char* key, bool optional = false) {
    std::string_view value;
    if (object[key].get(value) && !optional) fail(where, ": \"", key, "\" is missing or no string");
    return std::string(value);
  };
  const auto number = [&](const char* key, bool optional = false) {
    int64_t value = 0;
    if (object[key].get(value) && !optional)
      fail(where, ": \"", key, "\" is missing or no integer");
    return value;
  };
  Verdict v;
  v.place = {uint32_t(number("input")), uint64_t(number("offset"))};
  v.url = text("url"), v.id = text("id"), v.language = text("language");
  v.match = text("match", true), v.begins = text("begins");
  v.bytes = number("bytes"), v.private_data = number("private_data", true);
  v.repeated_bytes = number("repeated_bytes", true);
  simdjson::dom::object values;
  if (object["values"].get(values)) fail(where, ": \"values\" is missing");
  for (const Measure& measure : measures()) {
    simdjson::dom::element value;
    if (values[measure.name].get(value))
      fail(where, ": values: \"", measure.name,
           "\" is missing: the verdicts are of another version");
    double x = std::numeric_limits<double>::quiet_NaN();
    if (!value.is_null() && value.get(x))
      fail(where, ": values: \"", measure.name, "\": found ", type_name(value),
           ", expected a number");
    v.values.push_back(x);
  }
  simdjson::dom::array original;
  if (object["original"].get(original) == simdjson::SUCCESS) {
    uint64_t input = 0, offset = 0;
    if (original.at(0).get(input) || original.at(1).get(offset))
      fail(where, ": \"original\": expected two integers");
    v.original = Place{uint32_t(input), offset};
  }
  const std::string verdict = text("verdict");
  v.empty = object["empty"].error() == simdjson::SUCCESS, v.exact = verdict == "exact-duplicate";
  if (verdict != "kept" && verdict != "empty" && !v.original) {
    while (++v.rule < int(rules().size()) && rules()[size_t(v.rule)].name != verdict) {
    }
    if (v.rule == int(rules().size()))
      fail(where, ": \"verdict\": found \"", verdict, "\", which no rule is called");
  }
  return v;
}

namespace {

// ---------------------------------------------------------------------------------------------
// A task: pages to verdicts, texts and signatures

struct Document {  // a page on its way
  Page page;
  std::string verdict, text;  // lines of the task's files; no text: it was dropped
  Signature signature;
  size_t html_bytes = 0, parsed_bytes = 0, text_bytes = 0;
};

// Pages that are read while the batch before is worked on.
struct PageBatch {
  std::vector<Document> documents;
  Entry entry;          // from where to read on, behind them
  double progress = 0;  // share of the input that has been read
  std::map<std::string, int64_t> problems;
  bool last = false;  // the input ends with them
};

PageBatch read_batch(PageReader& reader, size_t max_bytes) {
  PageBatch batch;
  for (size_t bytes = 0; bytes < max_bytes && batch.documents.size() < 4096;) {
    Document document;
    if (!reader.next(document.page)) {
      batch.last = true;
      break;
    }
    bytes += document.page.text.size() + document.page.rest.size() + 256;
    batch.documents.push_back(std::move(document));
  }
  batch.entry = reader.entry();
  batch.progress = reader.progress();
  batch.problems = reader.problems();
  return batch;
}

// {"text":...,"url":...,"id":...,...}\n: the form in which a document is kept.
std::string document_line(const Page& page, std::string_view text) {
  std::string line = "{";
  append_member(line, "text", text);
  if (!page.url.empty()) line += ',', append_member(line, "url", page.url);
  if (!page.id.empty()) line += ',', append_member(line, "id", page.id);
  if (!page.rest.empty()) line += ',', line += page.rest;
  return line + "}\n";
}

// The page's text becomes its main text.
void extract_text(Document& d, const ExtractOptions& options) {
  if (!d.page.html) return;
  Extracted extracted = extract(d.page.text, d.page.url, options);
  d.html_bytes = extracted.html_bytes, d.parsed_bytes = extracted.parsed_bytes;
  d.page.text = std::move(extracted.text);
}

constexpr size_t kSampleBytes = 240;  // of each text, in its verdict

void judge(Document& d, const CleanOptions& o, Measurer& measurer, Measured& m) {
  extract_text(d, o.extract);
  d.text_bytes = d.page.text.size();
  measurer.measure(d.page.text, d.page.url, m);
  Verdict v;
  v.place = d.page.place, v.url = d.page.url, v.id = d.page.id;
  v.language = m.language, v.match = m.match, v.values = m.values;
  v.bytes = int64_t(d.text_bytes), v.private_data = m.private_data;
  const std::string_view begins = beginning(d.page.text, kSampleBytes);
  if (o.measure.private_data) {
    replace_private_data(begins, v.begins);
  } else {
    v.begins = begins;
  }
  v.rule = first_failed(m.values, o.thresholds);
  v.empty = strip_ascii(m.text).empty();
  d.verdict = verdict_line(v);
  if (v.kept()) d.text = document_line(d.page, m.text);
  d.signature = m.signature;
}

// Where a task is: what a process that was killed had saved.
struct TaskState {
  size_t input = 0;
  Entry entry;
  int64_t documents = 0, kept = 0, repaired = 0;
  int64_t html_bytes = 0, parsed_bytes = 0, text_bytes = 0;
  double seconds = 0;
  uint64_t verdicts = 0, texts = 0, signatures = 0, kept_flags = 0;  // lengths of the files
  std::map<std::string, int64_t> problems;                           // of what has been read
};

OrderedJson to_json(const TaskState& s) {
  return {{"input", s.input},
          {"entry", {s.entry.compressed, s.entry.begin, s.entry.next}},
          {"documents", s.documents},
          {"kept", s.kept},
          {"repaired", s.repaired},
          {"html_bytes", s.html_bytes},
          {"parsed_bytes", s.parsed_bytes},
          {"text_bytes", s.text_bytes},
          {"seconds", s.seconds},
          {"files", {s.verdicts, s.texts, s.signatures, s.kept_flags}},
          {"problems", s.problems}};
}

TaskState task_state(const fs::path& path) {
  const Json j = read_json(path);
  TaskState s;
  try {
    const Json& entry = j.at("entry");
    const Json& files = j.at("files");
    s = {j.at("input"),        {entry.at(0), entry.at(1), entry.at(2)},
         j.at("documents"),    j.at("kept"),
         j.at("repaired"),     j.at("html_bytes"),
         j.at("parsed_bytes"), j.at("text_bytes"),
         j.at("seconds"),      files.at(0),
         files.at(1),          files.at(2),
         files.at(3),          j.at("problems")};
  } catch (const Json::exception& e) {
    fail(path.string(), ": ", json_complaint(e));
  }
  return s;
}

void add_counts(std::map<std::string, int64_t>& sum, const std::map<std::string, int64_t>& counts) {
  for (const auto& [name, count] : counts) sum[name] += count;
}

// Bytes of input that all tasks have read, for the time that is left: finished tasks by their
// markers, the others as far as they have saved.
class JobProgress {
 public:
  explicit JobProgress(const Job& job) : job_(job) {
    for (const int64_t bytes : job.bytes) all_ += double(bytes);
  }
  void show(size_t task, size_t input, double share, const TaskState& s) {
    double done = double(job_.bytes[input]) * share;
    for (size_t i = job_.first_input[task]; i < input; i++) done += double(job_.bytes[i]);
    const double here = done;
    for (size_t i = 0; i < job_.tasks(); i++) {
      if (i != task && finished(i)) done += double(job_.task_bytes(i));
    }
    if (first_ < 0) first_ = done;
    const double seconds = now() - began_, rate = (done - first_) / std::max(seconds, 1e-3);
    std::string line = format("task %zu/%zu  %s documents, %.0f%% kept", task + 1, job_.tasks(),
                              count_text(double(s.documents)).c_str(),
                              100. * double(s.kept) / double(std::max<int64_t>(s.documents, 1)));
    if (s.seconds > 0) line += "  " + bytes_text(here / s.seconds) + "/s";
    if (all_ > 0) line += format("  %.0f%%", 100 * done / all_);
    if (all_ > 0 && rate > 0) line += "  " + duration_text((all_ - done) / rate) + " left";
    line_.show(line);
  }

 private:
  bool finished(size_t task) {
    if (finished_.size() <= task) finished_.resize(job_.tasks());
    if (!finished_[task]) finished_[task] = fs::exists(job_.marker(task));
    return finished_[task];
  }
  const Job& job_;
  double all_ = 0, first_ = -1, began_ = now();
  std::vector<bool> finished_;
  ProgressLine line_;
};

struct Workers {
  explicit Workers(const Job& job)
      : progress(job),
        measurers(size_t(job.options.threads), Measurer(job.options.measure)),
        measured(size_t(job.options.threads)) {}
  JobProgress progress;
  std::vector<Measurer> measurers;  // one for each thread; they read their lists once
  std::vector<Measured> measured;
};

void append_metrics(const Job& job, size_t task, const TaskState& s) {
  const OrderedJson line = {{"task", task},
                            {"documents", s.documents},
                            {"kept", s.kept},
                            {"text_bytes", s.text_bytes},
                            {"seconds", s.seconds}};
  const fs::path path = job.dir / "metrics.jsonl";
  const std::unique_ptr<std::FILE, CloseFile> file(std::fopen(path.c_str(), "ab"));
  if (!file) fail(path.string(), ": cannot append: ", errno_text());
  const std::string text = json_line(line);
  write_bytes(file.get(), text.data(), text.size(), path);
  if (std::fflush(file.get()) != 0) fail(path.string(), ": cannot write: ", errno_text());
}

// A task's signatures were written one by one; they are kept column by column.
void sort_signatures_by_column(const fs::path& rows, size_t count, const fs::path& columns) {
  const MappedFile file(rows);
  if (size_t(file.size()) != count * sizeof(Signature)) {
    fail(rows.string(), ": found ", file.size(), " bytes, expected ", count * sizeof(Signature));
  }
  write_signatures(columns, {reinterpret_cast<const Signature*>(file.data()), count});
}

void read_task(Job& job, size_t task) {
  const CleanOptions& o = job.options;
  const fs::path saved = job.part(task, "saved");
  TaskState s;
  if (fs::exists(saved)) {
    s = task_state(saved);
  } else {
    s.input = job.first_input[task];
  }
  PartFile verdicts(job.part(task, "verdicts.zst"), s.verdicts, true);
  PartFile texts(job.part(task, "texts.zst"), s.texts, true);
  PartFile rows(job.part(task, "rows"), s.signatures, false);
  PartFile kept_flags(job.part(task, "kept"), s.kept_flags, false);
  const auto save = [&] {
    s.verdicts = verdicts.flush(), s.texts = texts.flush();
    s.signatures = rows.flush(), s.kept_flags = kept_flags.flush();
    verdicts.sync(), texts.sync(), rows.sync(), kept_flags.sync();
    write_file(saved, to_json(s).dump() + "\n");
    append_metrics(job, task, s);
  };

  if (!job.workers) job.workers = std::make_shared<Workers>(job);
  Workers& workers = *job.workers;
  const size_t batch_bytes =
      std::clamp(size_t(o.memory_gb * 1e9 / 32), size_t(1) << 20, size_t(64) << 20);
  double last_save = now(), clock = now();
  while (s.input < job.first_input[task + 1]) {
    const std::map<std::string, int64_t> problems_before = s.problems;
    PageReader reader(job.inputs[s.input], uint32_t(s.input), o.pages, s.entry);
    const auto read_next = [&] { return read_batch(reader, batch_bytes); };
    std::future<PageBatch> next = std::async(std::launch::async, read_next);
    for (bool last = false; !last;) {
      PageBatch batch = next.get();
      last = batch.last;
      if (!last) next = std::async(std::launch::async, read_next);
      std::vector<Document>& documents = batch.documents;
      parallel_for(documents.size(), o.threads, [&](size_t i, size_t thread) {
        judge(documents[i], o, workers.measurers[thread], workers.measured[thread]);
      });
      for (const Document& d : documents) {
        verdicts.write(d.verdict);
        texts.write(d.text);
        rows.write({reinterpret_cast<const char*>(&d.signature), sizeof d.signature});
        kept_flags.write(d.text.empty() ? std::string_view("\0", 1) : "\1");
        s.documents++, s.kept += !d.text.empty(), s.repaired += d.page.repaired;
        s.html_bytes += int64_t(d.html_bytes), s.parsed_bytes += int64_t(d.parsed_bytes);
        s.text_bytes += int64_t(d.text_bytes);
      }
      s.seconds += now() - std::exchange(clock, now());
      workers.progress.show(task, s.input, batch.progress, s);
      s.problems = problems_before;  // a reader counts from where it began
      add_counts(s.problems, batch.problems);
      s.entry = last ? Entry{} : batch.entry;
      s.input += last;
      if (now() - last_save >= o.save_seconds || stop_signal) save(), last_save = now();
      if (!stop_signal) continue;
      if (!last) next.get();
      throw Interrupted();
    }
  }
  save();
  sort_signatures_by_column(job.part(task, "rows"), size_t(s.documents),
                            job.part(task, "signatures"));
  write_file(job.marker(task), to_json(s).dump() + "\n");
  for (const char* part : {"rows", "saved"}) remove_path(job.part(task, part));
}

// ---------------------------------------------------------------------------------------------
// Duplicates of the whole run

// The signature files of all tasks; `kept[task]`: a byte for each document, which takes part if it
// is not 0.
std::vector<SignatureFile> signature_files(const Job& job,
                                           const std::function<std::string(size_t)>& kept) {
  std::vector<SignatureFile> files;
  uint64_t documents = 0;
  for (size_t i = 0; i < job.tasks(); i++) {
    const std::string flags = kept(i);
    files.push_back({job.part(i, "signatures"), documents, {}});
    files.back().considered.assign(flags.begin(), flags.end());
    documents += flags.size();
  }
  return files;
}

DedupOptions dedup_options(const CleanOptions& o, const fs::path& folder) {
  DedupOptions d;
  d.exact = o.exact, d.near = o.near;
  d.memory = size_t(o.memory_gb * 1e9 / 2), d.threads = o.threads, d.folder = folder;
  return d;
}

void pair_pass(const Job& job, size_t pass) {
  const auto kept = [&](size_t task) { return read_file(job.part(task, "kept")); };
  find_pairs(signature_files(job, kept), int(pass), dedup_options(job.options, job.dir / "parts"),
             job.pairs(pass));
}

// ---------------------------------------------------------------------------------------------
// The end: what is no duplicate, in order of place

// Counts for summary.json.
struct Summary {
  int64_t documents = 0, kept = 0, kept_bytes = 0, private_data = 0, repeated_bytes = 0;
  std::map<std::string, int64_t> reasons;
  void add(const Verdict& v) {
    documents++, reasons[std::string(v.reason())]++;
    if (v.kept()) kept++, private_data += v.private_data, repeated_bytes += v.repeated_bytes;
  }
};

OrderedJson thresholds_json(const Thresholds& thresholds) {
  OrderedJson json = OrderedJson::object();
  for (size_t i = 0; i < thresholds.size(); i++) {
    const std::string name(rules()[i].name);
    json[name] = std::isnan(thresholds[i]) ? OrderedJson(nullptr) : OrderedJson(thresholds[i]);
  }
  return json;
}

void write_summary(const Job& job, const fs::path& dir, const Thresholds& thresholds,
                   const Summary& sum, double duplicate_seconds, double write_seconds) {
  TaskState all;
  for (size_t i = 0; i < job.tasks(); i++) {
    const TaskState s = task_state(job.marker(i));
    all.html_bytes += s.html_bytes, all.parsed_bytes += s.parsed_bytes,
        all.text_bytes += s.text_bytes;
    all.seconds += s.seconds, all.repaired += s.repaired;
    add_counts(all.problems, s.problems);
  }
  if (all.repaired > 0) all.problems["documents with invalid UTF-8, repaired"] += all.repaired;
  int64_t bytes_read = 0;
  for (const int64_t bytes : job.bytes) bytes_read += bytes;
  const MeasureOptions& m = job.options.measure;
  const bool lists = !m.blocked_domains.empty() || !m.blocked_hosts.empty() ||
                     !m.blocked_urls.empty() || !m.banned_words.empty() ||
                     !m.soft_banned_words.empty() || !m.banned_substrings.empty();
  write_json(
      dir / "summary.json",
      {{"inputs", job.inputs.size()},
       {"documents", sum.documents},
       {"kept", sum.kept},
       {"reasons", sum.reasons},
       {"bytes_read", bytes_read},
       {"html_bytes", all.html_bytes},
       {"parsed_bytes", all.parsed_bytes},
       {"text_bytes", all.text_bytes},
       {"kept_bytes", sum.kept_bytes},
       {"private_data", sum.private_data},
       {"repeated_bytes", sum.repeated_bytes},
       {"problems", all.problems},
       {"thresholds", thresholds_json(thresholds)},
       {"block_lists", lists},
       {"languages_wanted", m.languages},
       {"tasks", job.tasks()},
       {"threads", job.options.threads},
       {"seconds",
        {{"pages", all.seconds}, {"duplicates", duplicate_seconds}, {"write", write_seconds}}}});
}

// Verdicts in order, with the duplicates among them.
class DuplicateMarks {
 public:
  explicit DuplicateMarks(std::vector<Duplicate> duplicates) : duplicates_(std::move(duplicates)) {
    for (const Duplicate& d : duplicates_) originals_.emplace(d.original, Place{});
  }
  // The duplicate that the next document is, if it is one.
  const Duplicate* next(const Place& place) {
    const uint64_t document = document_++;
    if (const auto it = originals_.find(document); it != originals_.end()) it->second = place;
    if (next_ == duplicates_.size() || duplicates_[next_].document != document) return nullptr;
    return &duplicates_[next_++];
  }
  Place place(const Duplicate& d) const { return originals_.at(d.original); }

 private:
  std::vector<Duplicate> duplicates_;
  size_t next_ = 0;
  uint64_t document_ = 0;
  std::unordered_map<uint64_t, Place> originals_;  // by number, where they have come by
};

void mark_duplicate(Verdict& v, DuplicateMarks& marks) {
  if (const Duplicate* d = marks.next(v.place)) v.original = marks.place(*d), v.exact = d->exact;
}

// Kept documents, which wait until a shard is full where repeated substrings are removed.
class KeptDocuments {
 public:
  KeptDocuments(const Job& job, Summary& summary)
      : options_(job.options),
        summary_(summary),
        documents_(job.dir / "documents.jsonl.zst", job.options.threads),
        verdicts_(job.dir / "verdicts.jsonl.zst", job.options.threads) {}

  void add(const Verdict& v, const std::string& verdict, std::string_view document) {
    if (options_.min_repeated == 0) {
      write(v, verdict, document);
      return;
    }
    waiting_.push_back({v, std::string(document)});
    bytes_ += document.size();
    if (double(bytes_) >= options_.shard_mb * 1e6) end_shard();
  }
  void commit() {
    if (!waiting_.empty()) end_shard();
    documents_.commit(), verdicts_.commit();
  }

 private:
  struct Waiting {
    Verdict verdict;
    std::string document;
  };
  void write(const Verdict& v, const std::string& verdict, std::string_view document) {
    summary_.add(v);
    verdicts_.write(verdict);
    if (!v.kept()) return;
    documents_.write(document);
    summary_.kept_bytes += int64_t(document.size());
  }
  void end_shard() {
    std::vector<std::string> texts;
    std::vector<OrderedJson> documents;
    for (const Waiting& w : waiting_) {
      if (!w.verdict.kept()) continue;
      documents.push_back(parse_json<OrderedJson>(w.document, "texts"));
      texts.push_back(documents.back()["text"]);
    }
    const std::vector<int64_t> removed =
        remove_repeated_substrings(texts, size_t(options_.min_repeated));
    size_t i = 0;
    for (Waiting& w : waiting_) {
      if (w.verdict.kept()) {
        if (removed[i] > 0) {
          w.verdict.repeated_bytes = removed[i];
          w.verdict.empty = strip_ascii(texts[i]).empty();
          documents[i]["text"] = texts[i];
          w.document = json_line(documents[i]);
        }
        i++;
      }
      write(w.verdict, verdict_line(w.verdict), w.document);
    }
    waiting_.clear(), bytes_ = 0;
  }

  const CleanOptions& options_;
  Summary& summary_;
  TextFile documents_, verdicts_;
  std::vector<Waiting> waiting_;
  size_t bytes_ = 0;
};

std::vector<Duplicate> find_duplicates(const std::vector<fs::path>& pairs,
                                       const std::vector<SignatureFile>& files,
                                       const DedupOptions& options) {
  const uint64_t documents =
      files.empty() ? 0 : files.back().first_document + files.back().considered.size();
  return pairs.empty() ? std::vector<Duplicate>{} : cluster(pairs, documents, options);
}

void print_summary(const fs::path& dir, const Summary& sum) {
  std::printf("%s: kept %s of %s documents, %s\n", dir.c_str(),
              count_text(double(sum.kept)).c_str(), count_text(double(sum.documents)).c_str(),
              bytes_text(double(sum.kept_bytes)).c_str());
  std::vector<std::pair<int64_t, std::string>> reasons;
  for (const auto& [name, count] : sum.reasons) {
    if (name != "kept") reasons.emplace_back(-count, name);
  }
  std::sort(reasons.begin(), reasons.end());
  std::string line;
  for (size_t i = 0; i < reasons.size() && i < 6; i++) {
    line += concat(i ? ", " : "dropped: ", reasons[i].second, " ",
                   count_text(double(-reasons[i].first)));
  }
  if (reasons.size() > 6) line += concat(", and ", reasons.size() - 6, " more reasons");
  if (!line.empty()) std::printf("%s\n", line.c_str());
}

// The texts and verdicts of tasks, which documents.jsonl.zst and verdicts.jsonl.zst hold now.
void remove_parts(const Job& job) {
  for (size_t task = 0; task < job.tasks(); task++) {
    for (const char* part : {"verdicts.zst", "texts.zst"}) remove_path(job.part(task, part));
  }
}

void finish_job(const Job& job) {
  const double began = now();
  std::vector<fs::path> pairs;
  for (size_t i = 0; i < kPasses && fs::exists(job.pairs(i)); i++) pairs.push_back(job.pairs(i));
  const auto kept = [&](size_t task) { return read_file(job.part(task, "kept")); };
  DuplicateMarks marks(find_duplicates(pairs, signature_files(job, kept),
                                       dedup_options(job.options, job.dir / "parts")));
  const double duplicates_found = now();
  Summary summary;
  KeptDocuments out(job, summary);
  for (size_t task = 0; task < job.tasks(); task++) {
    LineReader verdicts{Input(job.part(task, "verdicts.zst").string())};
    LineReader texts{Input(job.part(task, "texts.zst").string())};
    const int64_t documents = task_state(job.marker(task)).documents;
    for (int64_t i = 0; i < documents; i++) {
      stop_if_signalled();
      std::string_view line, text;
      if (!verdicts.next(line))
        fail(verdicts.name(), ": found ", i, " verdicts, expected ", documents);
      Verdict v = parse_verdict(line, verdicts.where());
      if (v.kept() && !texts.next(text)) fail(texts.name(), ": a kept document's text is missing");
      mark_duplicate(v, marks);
      out.add(v, v.original ? verdict_line(v) : std::string(line) + "\n", std::string(text) + "\n");
    }
  }
  out.commit();
  write_summary(job, job.dir, job.options.thresholds, summary, duplicates_found - began,
                now() - duplicates_found);
  write_report(job.dir);
  write_file(job.finished(), "");
  remove_parts(job);
  print_summary(job.dir, summary);
}

// ---------------------------------------------------------------------------------------------
// A run's directory: job.json holds the inputs and what decides the bytes that come out

OrderedJson settings_json(const CleanOptions& o) {
  const MeasureOptions& m = o.measure;
  const char* modes[] = {"precision", "balanced", "recall"};
  return {{"thresholds", thresholds_json(o.thresholds)},
          {"text_key", o.pages.text_key},
          {"drop_invalid", o.pages.drop_invalid},
          {"max_page_bytes", o.pages.max_page_bytes},
          {"extract", modes[int(o.extract.mode)]},
          {"extract_by_rules", o.extract.rules},
          {"languages", m.languages},
          {"block_domains", m.blocked_domains},
          {"block_hosts", m.blocked_hosts},
          {"block_urls", m.blocked_urls},
          {"banned_words", m.banned_words},
          {"soft_banned_words", m.soft_banned_words},
          {"banned_substrings", m.banned_substrings},
          {"min_line_words", m.min_line_words},
          {"max_word_characters", m.max_word_characters},
          {"c4_lines", m.c4_lines},
          {"replace_private_data", m.private_data},
          {"decontaminate", m.decontaminate},
          {"quality_model", m.quality_model},
          {"exact", o.exact},
          {"near", o.near},
          {"min_repeated", o.min_repeated},
          {"shard_mb", o.shard_mb}};
}

// What later commands need of a run's settings.
void read_settings(CleanOptions& o, const Json& settings, const std::string& where) {
  const Json thresholds = json_get<Json>(settings, "thresholds", where);
  o.thresholds.clear();
  for (const Rule& rule : rules()) {
    const std::string name(rule.name);
    if (!thresholds.contains(name))
      fail(where, ": thresholds: ", name, " is missing: the run is of another version");
    const Json& value = thresholds.at(name);
    o.thresholds.push_back(value.is_null() ? kOff : json_as<double>(value, name, where));
  }
  MeasureOptions& m = o.measure;
  for (auto [list, key] : {std::pair(&m.languages, "languages"),
                           {&m.blocked_domains, "block_domains"},
                           {&m.blocked_hosts, "block_hosts"},
                           {&m.blocked_urls, "block_urls"},
                           {&m.banned_words, "banned_words"},
                           {&m.soft_banned_words, "soft_banned_words"},
                           {&m.banned_substrings, "banned_substrings"}}) {
    *list = json_get<std::vector<std::string>>(settings, key, where);
  }
  o.exact = json_get<bool>(settings, "exact", where);
  o.near = json_get<bool>(settings, "near", where);
  o.min_repeated = json_get<int64_t>(settings, "min_repeated", where);
}

OrderedJson job_json(const Job& job) {
  OrderedJson inputs = OrderedJson::array();
  for (size_t i = 0; i < job.inputs.size(); i++) {
    inputs.push_back({{"path", job.inputs[i].name}, {"bytes", job.bytes[i]}});
  }
  return {{"version", 1},
          {"inputs", inputs},
          {"first_input", job.first_input},
          {"settings", settings_json(job.options)}};
}

Job load_job(const fs::path& dir) {
  const fs::path path = dir / "job.json";
  if (!fs::exists(path))
    fail(dir.string(), ": found no job.json, expected the directory of ./corpus clean");
  const std::string where = path.string();
  const Json j = read_json(path);
  Job job;
  job.dir = dir;
  for (const Json& input : json_get<Json>(j, "inputs", where)) {
    job.inputs.emplace_back(json_get<std::string>(input, "path", where));
    job.bytes.push_back(json_get<int64_t>(input, "bytes", where));
  }
  for (const Json& first : json_get<Json>(j, "first_input", where)) {
    job.first_input.push_back(json_as<size_t>(first, "first_input", where));
  }
  if (job.first_input.empty()) fail(where, ": first_input is empty");
  read_settings(job.options, json_get<Json>(j, "settings", where), where);
  job.options.threads = usable_cores();
  return job;
}

// The first difference between two values, as "key: found x, expected y"; empty: none.
std::string difference(const Json& found, const Json& expected, const std::string& key) {
  if (found == expected) return {};
  if (found.is_object() && expected.is_object()) {
    for (const auto& [name, value] : expected.items()) {
      const std::string inner =
          difference(found.value(name, Json()), value, key.empty() ? name : key + "." + name);
      if (!inner.empty()) return inner;
    }
  }
  if (found.is_array() && expected.is_array() && found.size() == expected.size()) {
    for (size_t i = 0; i < found.size(); i++) {
      const std::string inner = difference(found[i], expected[i], concat(key, "[", i, "]"));
      if (!inner.empty()) return inner;
    }
  }
  return concat(key, ": found ", json_text(found), ", expected ", json_text(expected));
}

// Tasks are made of whole inputs in their order: about as many bytes in each.
std::vector<size_t> cut_tasks(const std::vector<int64_t>& bytes, int tasks) {
  int64_t all = 0;
  for (const int64_t b : bytes) all += b;
  std::vector<size_t> first = {0};
  const size_t n = bytes.size();
  if (tasks > 0) {
    const size_t count = std::min(size_t(tasks), n);
    int64_t before = 0;
    for (size_t i = 0; i < n; before += bytes[i++]) {
      const size_t cut = first.size();  // of so many tasks, this many begin up to here
      const bool due = double(before) * double(count) >= double(all) * double(cut);
      if (i > 0 && cut < count && (due || n - i == count - cut)) first.push_back(i);
    }
  } else {
    int64_t here = 0;
    for (size_t i = 0; i < n; i++) {
      if (here >= kTaskBytes) first.push_back(i), here = 0;
      here += bytes[i];
    }
  }
  first.push_back(n);
  return first;
}

// Slurm's arrays and srun, Open MPI, Kubernetes' indexed jobs.
void find_rank(CleanOptions& o) {
  const auto number = [](const char* name, int fallback) {
    const char* text = std::getenv(name);
    return text && *text ? std::atoi(text) : fallback;
  };
  if (o.rank >= 0) return;
  if (const int id = number("SLURM_ARRAY_TASK_ID", -1); id >= 0) {
    o.rank = id - number("SLURM_ARRAY_TASK_MIN", 0),
    o.world_size = number("SLURM_ARRAY_TASK_COUNT", 0);
  } else if (const int rank = number("OMPI_COMM_WORLD_RANK", -1); rank >= 0) {
    o.rank = rank, o.world_size = number("OMPI_COMM_WORLD_SIZE", 0);
  } else if (const int index = number("JOB_COMPLETION_INDEX", -1); index >= 0) {
    o.rank = index;
  } else if (const int process = number("SLURM_PROCID", -1); process >= 0) {
    o.rank = process, o.world_size = number("SLURM_NTASKS", 0);
  }
}

// What a run writes into DIR/parts: 00012.texts.zst, pairs-03, finished, .., and their locks.
bool is_part(std::string_view name) {
  const auto is_number = [](std::string_view digits) {
    return !digits.empty() && digits.find_first_not_of("0123456789") == digits.npos;
  };
  for (const std::string_view end : {".partial", ".lock"}) {
    if (name.ends_with(end)) name.remove_suffix(end.size());
  }
  if (name == "job" || name == "finished") return true;
  if (name.starts_with("pairs-")) return is_number(name.substr(6));
  const size_t dot = std::min(name.find('.'), name.size());
  for (const std::string_view what :
       {".verdicts.zst", ".texts.zst", ".rows", ".kept", ".saved", ".signatures", ".json"}) {
    if (name.substr(dot) == what) return is_number(name.substr(0, dot));
  }
  return false;
}

constexpr const char* kJobFiles[] = {"documents.jsonl.zst", "verdicts.jsonl.zst", "summary.json",
                                     "report.html",         "metrics.jsonl",      "job.json"};

// Fails where DIR holds something that no run of this stage wrote. A run that was killed before it
// had written job.json left DIR/parts/job.lock alone.
void expect_own_directory(const fs::path& dir) {
  if (!fs::exists(dir)) return;
  if (!fs::is_directory(dir)) fail(dir.string(), ": found a file, expected a directory to write");
  const fs::path path = dir / "job.json";
  if (fs::exists(path)) {
    const Json job = read_json(path);
    if (job.is_object() && job.contains("first_input") && job.contains("settings")) return;
    fail(path.string(), ": found another program's file, expected a new directory");
  }
  for (const auto& entry : fs::recursive_directory_iterator(dir)) {
    const std::string name = fs::relative(entry.path(), dir).string();
    if (name != "parts" && name != "parts/job.lock" && name != "job.json.partial") {
      if (fs::exists(path)) return expect_own_directory(dir);  // another process began meanwhile
      fail(dir.string(), ": found ", name, ", which no run wrote, expected a new directory");
    }
  }
}

// What a run wrote, and nothing else.
void remove_run(const fs::path& dir) {
  std::vector<fs::path> parts;
  if (fs::exists(dir / "parts")) {
    for (const auto& entry : fs::directory_iterator(dir / "parts")) {
      if (is_part(entry.path().filename().string())) parts.push_back(entry.path());
    }
  }
  for (const fs::path& part : parts) remove_path(part);
  for (const char* name : kJobFiles) remove_path(dir / name);
}

bool lies_inside(const fs::path& path, const fs::path& folder) {
  const fs::path inside =
      fs::weakly_canonical(path).lexically_relative(fs::weakly_canonical(folder));
  return !inside.empty() && *inside.begin() != "..";
}

// All that a run reads lies outside of DIR, and DIR outside of the folders that it reads.
void expect_apart(const Job& job) {
  const MeasureOptions& m = job.options.measure;
  std::vector<fs::path> reads = {m.quality_model};
  for (const Input& input : job.inputs) {
    if (input.path != "-") reads.push_back(input.path);
  }
  for (const auto* list : {&m.blocked_domains, &m.blocked_hosts, &m.blocked_urls, &m.banned_words,
                           &m.soft_banned_words, &m.banned_substrings, &m.decontaminate}) {
    reads.insert(reads.end(), list->begin(), list->end());
  }
  expect_elsewhere(job.dir, reads);
}

// Finds the difference that says most: the inputs, then the settings, then how they are cut.
void expect_same_job(const fs::path& path, const Json& found, const Json& expected) {
  for (const char* key : {"version", "inputs", "settings"}) {
    const std::string d = difference(found.value(key, Json()), expected.at(key), key);
    if (!d.empty()) {
      fail(path.string(), ": another run is there: ", d, " (--overwrite begins anew)");
    }
  }
  if (found.at("first_input") != expected.at("first_input")) {
    fail(path.string(), ": another run is there: found ", found.at("first_input").size() - 1,
         " tasks, expected ", expected.at("first_input").size() - 1, ": give the same --tasks");
  }
}

Job begin_job(const CleanOptions& options) {
  Job job;
  job.options = options;
  job.dir = options.output;
  CleanOptions& o = job.options;
  if (o.threads <= 0) o.threads = usable_cores();
  find_rank(o);
  const bool alone = o.rank < 0 || o.world_size == 1;
  if (o.world_size > 0 && o.rank >= o.world_size) {
    fail("--rank: found ", o.rank, ", expected 0 to ", o.world_size - 1);
  }
  if (o.overwrite && !alone) {
    fail("--overwrite: several processes would remove each other's work: remove ", o.output,
         " before they begin");
  }
  for (const std::string& input : o.inputs) {
    if (fs::is_directory(input) && lies_inside(job.dir, input)) {
      fail("-o: ", job.dir.string(), ": lies inside the input ", input,
           ": choose another directory");
    }
  }
  job.inputs = expand_inputs(o.inputs);
  for (const Input& input : job.inputs) {
    std::error_code ec;
    const auto bytes = input.path == "-" ? 0 : fs::file_size(input.path, ec);
    job.bytes.push_back(ec ? 0 : int64_t(bytes));
    if (input.path == "-" && !alone) fail("standard input: cannot be shared by several processes");
  }
  job.first_input = cut_tasks(job.bytes, o.tasks);
  expect_apart(job);
  expect_own_directory(job.dir);

  std::error_code ec;
  fs::create_directories(job.dir / "parts", ec);
  if (ec) fail(job.dir.string(), ": cannot create: ", ec.message());
  job.in_use = std::make_shared<TaskLock>(job.dir, o.overwrite ? LOCK_EX | LOCK_NB : LOCK_SH);
  if (!*job.in_use) fail(job.dir.string(), ": another process works on this run");
  if (o.overwrite) remove_run(job.dir);
  const TaskLock lock(job.dir / "parts" / "job.lock", LOCK_EX);
  const fs::path path = job.dir / "job.json";
  const OrderedJson expected = job_json(job);
  if (fs::exists(path)) {
    expect_same_job(path, read_json(path), Json::parse(expected.dump()));
  } else {
    write_json(path, expected);
  }
  job.in_use->share();
  return job;
}

void clean_command(const CleanOptions& options) {
  Job job = begin_job(options);
  if (fs::exists(job.finished())) {
    remove_parts(job);  // where a kill left them
    std::printf("%s: finished before; --overwrite begins anew\n", job.dir.c_str());
    return;
  }
  if (const CleanOptions& o = job.options; o.rank >= 0) {
    std::printf("rank %d of %s, %zu tasks\n", o.rank,
                o.world_size > 0 ? std::to_string(o.world_size).c_str() : "?", job.tasks());
  }
  if (const auto& files = options.measure.decontaminate; !files.empty()) {
    const Contamination::Counts counts = Contamination(files).counts();
    std::printf(
        "decontamination: %s strings, %s different runs of 13 words; %s strings are shorter and "
        "never match\n",
        count_text(double(counts.strings)).c_str(), count_text(double(counts.ngrams)).c_str(),
        count_text(double(counts.short_strings)).c_str());
  }
  clean(job);
}

// ---------------------------------------------------------------------------------------------
// What if: the verdicts of a run under other thresholds

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (fs::temp_directory_path() / "cake-corpus-XXXXXX").string();
    if (!mkdtemp(pattern.data())) fail(pattern, ": cannot create: ", errno_text());
    path_ = pattern;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// `given`: a threshold for each rule that was given on the command line.
void what_if(const fs::path& run_dir, const std::map<size_t, double>& given,
             const std::string& output) {
  if (!output.empty() && fs::exists(output)) fail(output, ": exists, expected a new directory");
  const Job job = load_job(run_dir);
  if (!fs::exists(job.finished()))
    fail(run_dir.string(), ": the run is not finished: ./corpus status ", run_dir.string());
  if (job.options.min_repeated > 0)
    fail(run_dir.string(),
         ": the run removed repeated substrings, which depends on the texts: it takes a new run");
  Thresholds thresholds = job.options.thresholds;
  for (const auto& [rule, value] : given) thresholds[rule] = value;

  const TemporaryFolder temporary;
  const fs::path verdicts_path = run_dir / "verdicts.jsonl.zst";
  std::vector<std::string> flags(job.tasks());
  std::set<size_t> measured;
  {
    LineReader lines{Input(verdicts_path.string())};
    for (size_t task = 0; task < job.tasks(); task++) {
      for (int64_t left = task_state(job.marker(task)).documents; left > 0; left--) {
        stop_if_signalled();
        std::string_view line;
        if (!lines.next(line)) fail(verdicts_path.string(), ": ends too early");
        const Verdict v = parse_verdict(line, lines.where());
        flags[task] += char(first_failed(v.values, thresholds) < 0 && !v.empty);
        for (const auto& [rule, value] : given) {
          if (!std::isnan(v.values[size_t(rules()[rule].measure)])) measured.insert(rule);
        }
      }
    }
  }
  for (const auto& [rule, value] : given) {
    if (measured.count(rule) || std::isnan(value)) continue;
    fail("--", rules()[rule].name,
         ": the run did not measure it for any document: it takes a new run");
  }
  const std::vector<SignatureFile> files =
      signature_files(job, [&](size_t task) { return flags[task]; });
  const DedupOptions dedup = dedup_options(job.options, temporary.path());
  std::vector<fs::path> pairs;
  for (size_t pass = 0; pass < (dedup.near ? kPasses : dedup.exact ? 1 : 0); pass++) {
    pairs.push_back(temporary.path() / format("pairs-%02zu", pass));
    find_pairs(files, int(pass), dedup, pairs.back());
  }
  DuplicateMarks marks(find_duplicates(pairs, files, dedup));

  std::unique_ptr<TextFile> out;
  if (!output.empty()) {
    fs::create_directories(output);
    out = std::make_unique<TextFile>(fs::path(output) / "verdicts.jsonl.zst", job.options.threads);
  }
  Summary before, after;
  std::map<std::string, int64_t> changes;
  LineReader lines{Input(verdicts_path.string())};
  for (std::string_view line; lines.next(line);) {
    Verdict v = parse_verdict(line, lines.where());
    before.add(v);
    const std::string was(v.reason());
    v.original.reset(), v.exact = false;
    v.rule = first_failed(v.values, thresholds);
    mark_duplicate(v, marks);
    after.add(v);
    if (was != v.reason()) changes[concat(was, " -> ", v.reason())]++;
    if (out) out->write(verdict_line(v));
  }
  if (out) {
    out->commit();
    write_summary(job, output, thresholds, after, 0, 0);
    write_report(output);
  }
  std::printf("kept %s of %s documents; %s before\n", count_text(double(after.kept)).c_str(),
              count_text(double(after.documents)).c_str(), count_text(double(before.kept)).c_str());
  for (const auto& [change, count] : changes)
    std::printf("  %-50s %s\n", change.c_str(), count_text(double(count)).c_str());
}

// ---------------------------------------------------------------------------------------------
// Status, and text alone

void status(const fs::path& dir) {
  const Job job = load_job(dir);
  size_t finished = 0, running = 0;
  std::string missing;
  int64_t documents = 0;
  for (size_t i = 0; i < job.tasks(); i++) {
    if (fs::exists(job.marker(i))) {
      finished++, documents += task_state(job.marker(i)).documents;
      continue;
    }
    const fs::path lock_path = job.marker(i).string() + ".lock";
    const bool held = fs::exists(lock_path) && !TaskLock(lock_path);
    if (held) running++;
    const std::string saved =
        fs::exists(job.part(i, "saved"))
            ? concat(" (", count_text(double(task_state(job.part(i, "saved")).documents)),
                     " documents saved)")
            : "";
    if (!held || !saved.empty())
      missing += concat(missing.empty() ? "" : ", ", i, held ? " running" : "", saved);
  }
  std::printf("%s: %zu of %zu tasks finished, %zu running; %s documents\n", dir.c_str(), finished,
              job.tasks(), running, count_text(double(documents)).c_str());
  if (!missing.empty()) std::printf("not finished: %s\n", missing.c_str());
  if (finished < job.tasks()) return;
  size_t passes = 0;
  while (passes < kPasses && fs::exists(job.pairs(passes))) passes++;
  if (fs::exists(job.finished())) {
    std::printf("finished: %s\n", (dir / "documents.jsonl.zst").c_str());
  } else {
    std::printf(
        "%zu passes over signatures finished; the command that began the run goes on with it\n",
        passes);
  }
}

void extract_command(const CleanOptions& o, const std::string& output) {
  const int threads = o.threads > 0 ? o.threads : usable_cores();
  const std::vector<Input> inputs = expand_inputs(o.inputs);
  TextFile out(output, threads);
  std::FILE* const log = output == "-" ? stderr : stdout;
  ProgressLine line;
  int64_t pages = 0, html = 0, parsed = 0, empty = 0;
  std::map<std::string, int64_t> problems;
  const double began = now();
  for (size_t i = 0; i < inputs.size(); i++) {
    PageReader reader(inputs[i], uint32_t(i), o.pages);
    for (bool last = false; !last;) {
      stop_if_signalled();
      PageBatch batch = read_batch(reader, size_t(16) << 20);
      std::vector<Document>& documents = batch.documents;
      parallel_for(documents.size(), threads, [&](size_t k, size_t) {
        extract_text(documents[k], o.extract);
        documents[k].text = document_line(documents[k].page, documents[k].page.text);
      });
      for (const Document& d : documents) {
        out.write(d.text);
        pages++, html += int64_t(d.html_bytes), parsed += int64_t(d.parsed_bytes);
        empty += strip_ascii(d.page.text).empty();
      }
      last = batch.last;
      if (last) add_counts(problems, batch.problems);
      if (log == stderr) continue;
      line.show(format("%s pages, %.0f%% of input %zu of %zu", count_text(double(pages)).c_str(),
                       100 * batch.progress, i + 1, inputs.size()));
    }
  }
  out.commit();
  const double seconds = now() - began;
  std::fprintf(
      log,
      "%s: %s pages, %s without text; %.1f s, %.0f pages/s, %s/s of HTML, %.0f%% of it parsed\n",
      output.c_str(), count_text(double(pages)).c_str(), count_text(double(empty)).c_str(), seconds,
      double(pages) / std::max(seconds, 1e-9),
      bytes_text(double(html) / std::max(seconds, 1e-9)).c_str(),
      100. * double(parsed) / double(std::max<int64_t>(html, 1)));
  for (const auto& [problem, count] : problems)
    std::fprintf(log, "  %s: %s\n", problem.c_str(), count_text(double(count)).c_str());
}

// ---------------------------------------------------------------------------------------------
// The command line

struct RuleFlags {  // --min-words 50, --min-words off
  std::vector<std::string> values = std::vector<std::string>(rules().size());

  void add(CLI::App* app) {
    for (size_t i = 0; i < rules().size(); i++) {
      const Rule& rule = rules()[i];
      const Measure& measure = measures()[size_t(rule.measure)];
      const std::string fineweb = std::isnan(rule.fineweb) ? "off" : shortest(rule.fineweb);
      const std::string help = concat("drop ", rule.direction == Rule::min ? "below" : "above",
                                      " this: ", measure.help, "; fineweb: ", fineweb);
      app->add_option("--" + std::string(rule.name), values[i], help)
          ->default_str("")
          ->group(std::string("Rules of ") + std::string(rule.filter));
    }
  }
  std::map<size_t, double> given() const {
    std::map<size_t, double> out;
    for (size_t i = 0; i < values.size(); i++) {
      if (values[i].empty()) continue;
      double x = kOff;
      const char* end = values[i].data() + values[i].size();
      const bool good = values[i] == "off" ||
                        (std::from_chars(values[i].data(), end, x).ptr == end && std::isfinite(x));
      if (!good) fail("--", rules()[i].name, ": found ", values[i], ", expected a number or off");
      out[i] = x;
    }
    return out;
  }
  static std::string shortest(double x) {
    std::string text;
    append_value(text, x);
    return text;
  }
};

int run(int argc, char** argv) {
  watch_signals();
  CLI::App app("The corpus: raw pages to clean text, with a verdict on every page", "corpus");
  app.option_defaults()->always_capture_default();
  app.require_subcommand(1);
  CleanOptions o;
  RuleFlags rule_flags;
  std::string preset = "fineweb", mode = "balanced", run_dir;
  ClassifyOptions classify;
  const char* inputs =
      "WARC, WET, HTML, parquet, JSON lines or text, also .gz and .zst; folders; - is standard "
      "input";

  const auto add_pages = [&](CLI::App* c) {
    c->add_option("INPUT", o.inputs, inputs)->required()->default_str("");
    c->add_option("--text-key", o.pages.text_key,
                  "member of JSON lines and column of parquet that holds the text");
    c->add_flag("--drop-invalid", o.pages.drop_invalid,
                "drop pages with invalid UTF-8 in place of repairing them");
    c->add_option("--mode", mode, "of extraction: precision, balanced or recall")
        ->check(CLI::IsMember({"precision", "balanced", "recall"}));
    c->add_flag("--by-rules", o.extract.rules,
                "extract by hand-written rules, without the classifier of blocks");
    c->add_option(
        "--threads", o.threads,
        "0: the physical cores that the process may use; changes the speed, not the result");
  };
  const auto add_run = [&](CLI::App* c) {
    c->add_option("-o", o.output, "directory to write")->required();
    c->add_flag("--overwrite", o.overwrite, "begin anew in a directory that a run wrote");
    c->add_option("--tasks", o.tasks,
                  "parts into which the inputs are cut for several processes; 0: one for 64 MB");
    c->add_option("--rank", o.rank,
                  "of this process among several; -1: as Slurm, Open MPI or Kubernetes say");
    c->add_option("--world-size", o.world_size, "number of processes");
    c->add_flag("!--no-wait", o.wait,
                "end when only others' tasks are left, in place of waiting for them");
    c->add_option("--save-seconds", o.save_seconds,
                  "between two places from which a killed task goes on");
    c->add_option("--memory", o.memory_gb, "gigabytes for what is read and sorted at once");
    c->add_flag("!--no-exact", o.exact, "keep exact duplicates");
    c->add_flag("!--no-near", o.near, "keep near duplicates (MinHash, 14 bands of 8)");
    c->add_option("--substrings", o.min_repeated,
                  "remove substrings of so many bytes or more that occurred before; 0: none");
    c->add_option("--shard-mb", o.shard_mb,
                  "megabytes of text in which they are looked for at once");
  };
  CLI::App* clean_app =
      app.add_subcommand("clean", "pages to a clean, deduplicated corpus, with a report");
  add_pages(clean_app), add_run(clean_app);
  clean_app->add_option("--preset", preset, "thresholds of all rules: fineweb, or none")
      ->check(CLI::IsMember({"fineweb", "none"}));
  clean_app->add_option("--languages", o.measure.languages, "wanted, ISO 639-1; any: all")
      ->delimiter(',');
  const auto add_list = [&](const char* name, std::vector<std::string>& list, const char* what) {
    clean_app->add_option(name, list, concat("files of ", what, ", one a line"))->default_str("");
  };
  MeasureOptions& m = o.measure;
  add_list("--block-domains", m.blocked_domains, "registered domains whose pages are dropped");
  add_list("--block-hosts", m.blocked_hosts, "hosts whose pages are dropped");
  add_list("--block-urls", m.blocked_urls, "URLs that are dropped");
  add_list("--banned-words", m.banned_words, "words, of which a URL may hold --max-banned-words");
  add_list("--soft-banned-words", m.soft_banned_words,
           "words, of which a URL may hold --max-soft-banned-words");
  add_list("--banned-substrings", m.banned_substrings, "strings that a URL may not hold");
  clean_app
      ->add_option("--decontaminate", o.measure.decontaminate,
                   "JSON lines of evaluations: documents that share 13 words in a row are dropped")
      ->default_str("");
  clean_app->add_option("--quality-model", o.measure.quality_model,
                        "of ./corpus classify train; see --min-quality");
  clean_app->add_flag("!--keep-private-data", o.measure.private_data,
                      "do not replace e-mail and IP addresses");
  clean_app->add_flag("!--keep-lines", o.measure.c4_lines, "keep the lines that C4's rules remove");
  clean_app->add_option("--min-line-words", o.measure.min_line_words,
                        "C4: shorter lines are removed");
  clean_app->add_option("--max-word-characters", o.measure.max_word_characters,
                        "C4: lines with longer words are removed");
  rule_flags.add(clean_app);

  CLI::App* extract_app = app.add_subcommand("extract", "pages to text alone: JSON lines");
  add_pages(extract_app);
  extract_app
      ->add_option("-o", o.output,
                   "file of JSON lines to write; .zst: compressed; -: standard output")
      ->required();

  CLI::App* dedup_app =
      app.add_subcommand("dedup", "duplicates alone: exact, near, and --substrings");
  add_pages(dedup_app), add_run(dedup_app);

  CLI::App* what_app = app.add_subcommand("what-if", "other thresholds on the verdicts of a run");
  std::string what_output;
  what_app->add_option("RUN", run_dir, "directory of ./corpus clean")->required();
  what_app->add_option(
      "-o", what_output,
      "directory to write verdicts and a report to; without it, counts are printed");
  RuleFlags what_flags;
  what_flags.add(what_app);

  CLI::App* status_app = app.add_subcommand("status", "how far a run is");
  status_app->add_option("RUN", run_dir, "directory of ./corpus clean")->required();

  CLI::App* classify_app = app.add_subcommand("classify", "a quality classifier: train, apply");
  classify_app->require_subcommand(1);
  CLI::App* train_app = classify_app->add_subcommand("train", "from good and bad documents");
  train_app->add_option("--good", classify.good, inputs)->required()->default_str("");
  train_app->add_option("--bad", classify.bad, inputs)->required()->default_str("");
  train_app->add_option("--epochs", classify.epochs, "passes over the documents");
  train_app->add_option("--seed", classify.seed, "of the order");
  train_app->add_option("-o", classify.output, "file to write")->required();
  CLI::App* apply_app = classify_app->add_subcommand("apply", "documents with their score");
  apply_app->add_option("MODEL", classify.model, "of classify train")->required();
  apply_app->add_option("INPUT", classify.inputs, inputs)->required()->default_str("");
  apply_app->add_option("--keep", classify.keep,
                        "best share of the documents, 0 to 1; 0: --min-score decides");
  apply_app->add_option("--min-score", classify.min_score,
                        "lowest probability of being good that is kept");
  classify.threads = usable_cores();
  apply_app->add_option("--threads", classify.threads, "change the speed, not the result");
  apply_app->add_option("-o", classify.output, "file of JSON lines to write; .zst: compressed")
      ->required();

  const std::vector<std::string> run_page = {"INPUT",    "-o",        "--substrings", "--tasks",
                                             "--memory", "--threads", "--overwrite"};
  std::vector<std::string> clean_page = run_page;
  clean_page.insert(clean_page.begin() + 2,
                    {"--preset", "--languages", "--decontaminate", "--mode"});
  if (!parse_flags(app, argc, argv, {{clean_app, clean_page}, {dedup_app, run_page}})) return 0;

  o.extract.mode = mode == "precision" ? ExtractMode::precision
                   : mode == "recall"  ? ExtractMode::recall
                                       : ExtractMode::balanced;
  if (o.measure.languages == std::vector<std::string>{"any"}) o.measure.languages.clear();
  if (o.memory_gb <= 0) fail("--memory: found ", o.memory_gb, ", expected gigabytes above 0");
  if (o.min_repeated != 0 && o.min_repeated < 16)
    fail("--substrings: found ", o.min_repeated, ", expected 0, or 16 bytes or more");
  if (o.shard_mb <= 0) fail("--shard-mb: found ", o.shard_mb, ", expected megabytes above 0");
  if (o.tasks < 0) fail("--tasks: found ", o.tasks, ", expected 0 or more");
  if (*dedup_app) {
    preset = "none";
    o.measure.detect_language = o.measure.c4_lines = o.measure.private_data = false;
    o.measure.languages.clear();
  }
  o.measure.signatures = o.exact || o.near;
  o.thresholds = preset == "none" ? Thresholds(rules().size(), kOff) : fineweb_thresholds();
  for (const auto& [rule, value] : rule_flags.given()) {
    o.thresholds[rule] = value;
    const bool of_model = measures()[size_t(rules()[rule].measure)].name == "quality";
    if (of_model && !std::isnan(value) && o.measure.quality_model.empty()) {
      fail("--", rules()[rule].name, ": needs --quality-model");
    }
  }
  try {
    if (*clean_app || *dedup_app) clean_command(o);
    if (*extract_app) extract_command(o, o.output);
    if (*what_app) what_if(run_dir, what_flags.given(), what_output);
    if (*status_app) status(run_dir);
    if (*train_app) classify_train(classify);
    if (*apply_app) classify_apply(classify);
  } catch (const Interrupted&) {
    const bool goes_on = *clean_app || *dedup_app;
    std::fprintf(stderr, "\nstopped; %s\n",
                 goes_on ? "the same command goes on" : "nothing was written");
    return 128 + stop_signal;
  }
  return 0;
}

}  // namespace
}  // namespace cake::corpus

// Weak: programs that link this file as a library have a main of their own.
__attribute__((weak)) int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::corpus::run(argc, argv); });
}
