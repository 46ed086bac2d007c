// A run: what every stage's main needs and no stage's algorithm.
//
// Errors with a message a user can act on, the cores a process may use, signals that ask a run to
// save and stop, random numbers that are a function of a counter, files that are written whole or
// not at all, the progress line, and metrics.jsonl.
#pragma once

#include <fcntl.h>
#include <omp.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cake {

// ---------------------------------------------------------------------------------------------
// Errors: one exception type; the message names the file, the line or key, what was found and what
// was expected. main prints `error: ...` and exits with status 1.

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
inline std::string format(const char* pattern, ...) {
  va_list args, again;
  va_start(args, pattern);
  va_copy(again, args);
  std::string text(size_t(std::max(0, std::vsnprintf(nullptr, 0, pattern, args))), '\0');
  std::vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  va_end(args);
  return text;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(concat(parts...));
}

// The parts are made whether they are needed or not: where that costs time, `if` and fail().
template <class... Parts>
void require(bool good, const Parts&... parts) {
  if (!good) fail(parts...);
}

// ---------------------------------------------------------------------------------------------
// Cores: the physical cores this process may use. Affinity and the container's quota count; two
// hardware threads of one core count once, since both share its vector units.

inline int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  std::set<std::pair<int, int>> cores;  // (package, core)
  int logical = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &set)) continue;
    logical++;
    const std::string topology = concat("/sys/devices/system/cpu/cpu", cpu, "/topology/");
    int package = 0, core = -1;
    std::ifstream(topology + "physical_package_id") >> package;
    if (std::ifstream(topology + "core_id") >> core) cores.insert({package, core});
  }
  double limit = cores.empty() ? logical : double(cores.size());
  double quota = 0, period = 0;
  if (std::ifstream("/sys/fs/cgroup/cpu.max") >> quota >> period) {  // version 2; "max" fails
    if (period > 0) limit = std::min(limit, quota / period);
  } else if (std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota &&
             std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period) {
    if (quota > 0 && period > 0) limit = std::min(limit, quota / period);
  }
  return std::max(1, int(limit));
}

// libgomp's threads spin for a while at every barrier. Its own choice, milliseconds, is no faster
// than this one on idle cores, and beside other work it is ruinous: decoding with a small model on
// two busy cores made 6 tokens a second, and 530 with this. The library reads its environment when
// it is loaded, so a main calls this first, and the process begins again with it.
inline void spin_briefly(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") || std::getenv("OMP_WAIT_POLICY")) return;
  if (setenv("GOMP_SPINCOUNT", "1000", 1) == 0) execv("/proc/self/exe", argv);
}

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
// Signals: the first SIGINT or SIGTERM asks the run to save and stop, the second ends it at once.

inline std::atomic<int> stop_signal{0};  // the signal's number, 0 for none

struct Interrupted {};  // thrown where work that takes long was asked to stop

// What takes long, and changes nothing that a run saves, calls this once in a while.
inline void stop_if_signalled() {
  if (stop_signal) throw Interrupted();
}

inline void watch_signals() {
  const auto handler = [](int signal) {
    if (stop_signal.exchange(signal)) {
      std::signal(signal, SIG_DFL);
      std::raise(signal);
    }
  };
  std::signal(SIGINT, handler);
  std::signal(SIGTERM, handler);
}

// Runs a stage's body. Every failure becomes one line on stderr and exit status 1; where a signal
// stopped it, the status is 128 and the signal's number.
template <class Body>
int guarded_main(Body&& body) {
  try {
    return body();
  } catch (const Interrupted&) {
    std::fprintf(stderr, "stopped\n");
    return 128 + stop_signal;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: out of memory\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
  }
  return 1;
}

// ---------------------------------------------------------------------------------------------
// Random numbers as a function of (seed, counter): any element can be drawn alone, by any thread,
// on any device. The mixer is splitmix64's finalizer (Steele, Lea, Flood 2014).

inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
inline uint64_t mix64(uint64_t a, uint64_t b) { return mix64(mix64(a) ^ b); }
inline uint64_t mix64(uint64_t a, uint64_t b, uint64_t c) { return mix64(mix64(a, b) ^ c); }

inline uint64_t hash64(std::string_view text) {  // FNV-1a, then mixed: seeds from names
  uint64_t h = 0xcbf29ce484222325;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3;
  return mix64(h);
}

// Uniform in (0, 1): never 0, so that its logarithm is finite.
inline double uniform01(uint64_t bits) { return (double(bits >> 11) + .5) * 0x1p-53; }

struct Rng {  // a stream: the n-th number is mix64(seed, n)
  uint64_t seed = 0, counter = 0;
  uint64_t next() { return mix64(seed, counter++); }
  double uniform() { return uniform01(next()); }
  uint64_t below(uint64_t n) { return uint64_t((__uint128_t(next()) * n) >> 64); }
  double normal() {  // Box-Muller, one of the pair
    const double u = uniform(), v = uniform();
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  }
};

template <class List>
void shuffle(List& list, Rng& rng) {  // Fisher, Yates
  for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[rng.below(i)]);
}

// ---------------------------------------------------------------------------------------------
// Files: read whole; written whole or not at all (written beside, synced, renamed).

inline std::string errno_text() { return std::strerror(errno); }

inline std::string read_file(const std::filesystem::path& path) {
  std::error_code ec;
  if (std::filesystem::is_directory(path, ec)) {
    fail(path.string(), ": found a directory, expected a file");
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(path.string(), ": cannot open: ", errno_text());
  std::string text((std::istreambuf_iterator<char>(in)), {});
  if (in.bad()) fail(path.string(), ": cannot read: ", errno_text());
  return text;
}

// A large file of a Git repository that was not downloaded: a few lines of text stand in its place.
inline void refuse_git_lfs_pointer(std::string_view content, const std::string& where) {
  if (!content.starts_with("version https://git-lfs.")) return;
  fail(where, ": found a pointer of Git LFS, expected the file itself: `git lfs pull` gets it");
}

// Four functions change what is on the disk: every write, sync, rename and removal of a run is one
// of theirs. A test sets CAKE_EXIT_AT=n, and the process ends in place of the n-th change as if it
// had been killed: nothing is flushed, nothing is cleaned up.

inline constexpr int kKilled = 137;  // the exit status then: that of a process killed by SIGKILL

inline void count_disk_change() {
  static std::atomic<int64_t> left = [] {
    const char* text = std::getenv("CAKE_EXIT_AT");
    return text ? std::atoll(text) : int64_t(-1);
  }();
  if (left >= 0 && left-- == 1) _exit(kKilled);
}

// `path`: the name in the error.
inline void write_bytes(std::FILE* file, const void* data, size_t bytes,
                        const std::filesystem::path& path) {
  count_disk_change();
  if (bytes > 0 && std::fwrite(data, 1, bytes, file) != bytes) {
    fail(path.string(), ": cannot write: ", errno_text());
  }
}

// Flushes a file or directory to the disk.
inline void sync_path(const std::filesystem::path& path) {
  count_disk_change();
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path.string(), ": cannot open: ", errno_text());
  const int status = fsync(fd);
  close(fd);
  if (status != 0 && errno != EINVAL) fail(path.string(), ": cannot sync: ", errno_text());
}

// Replaces a file `dst`.
inline void rename_path(const std::filesystem::path& src, const std::filesystem::path& dst) {
  count_disk_change();
  if (std::rename(src.c_str(), dst.c_str()) != 0) {
    fail(dst.string(), ": cannot rename ", src.string(), ": ", errno_text());
  }
}

// Removes a file, or a directory with all that is in it; nothing where there is nothing.
inline void remove_path(const std::filesystem::path& path) {
  std::error_code ec;
  if (std::filesystem::is_directory(std::filesystem::symlink_status(path, ec))) {
    for (const auto& entry : std::filesystem::directory_iterator(path)) remove_path(entry.path());
  }
  count_disk_change();
  std::filesystem::remove(path, ec);
  if (ec) fail(path.string(), ": cannot remove: ", ec.message());
}

// A file under construction: bytes go to PATH.partial, commit() syncs it and renames it to PATH;
// without commit() the partial file is removed and PATH keeps what it had.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path)
      : path_(std::move(path)), partial_(path_.string() + ".partial") {
    file_ = std::fopen(partial_.c_str(), "wb");
    if (!file_) fail(partial_.string(), ": cannot create: ", errno_text());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() {
    if (file_) std::fclose(file_);
    std::error_code ignored;
    if (!committed_) std::filesystem::remove(partial_, ignored);
  }
  void write(const void* data, size_t bytes) { write_bytes(file_, data, bytes, path_); }
  void write(std::string_view text) { write(text.data(), text.size()); }
  void seek(int64_t offset) {
    if (fseeko(file_, offset, SEEK_SET) != 0) fail(path_.string(), ": cannot seek: ", errno_text());
  }
  // Asks the system to write to the disk what it has so far, and does not wait for it.
  void start_writeback() {
    if (std::fflush(file_) != 0) fail(path_.string(), ": cannot write: ", errno_text());
    sync_file_range(fileno(file_), 0, 0, SYNC_FILE_RANGE_WRITE);  // advice: its failure is none
  }
  void close() {  // complete and synced, but not yet under its name
    if (std::fclose(std::exchange(file_, nullptr)) != 0) {
      fail(path_.string(), ": cannot write: ", errno_text());
    }
    sync_path(partial_);
  }
  void commit() {
    if (file_) close();
    rename_path(partial_, path_);
    committed_ = true;
  }

 private:
  std::filesystem::path path_, partial_;
  std::FILE* file_ = nullptr;
  bool committed_ = false;
};

inline void write_file(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

// A file's bytes in memory, read only; the system loads the pages that are touched.
class MappedFile {
 public:
  explicit MappedFile(std::filesystem::path path) : path_(std::move(path)) {
    const int fd = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail(path_.string(), ": cannot open: ", errno_text());
    struct stat status;
    const bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    if (regular && status.st_size > 0) {
      size_ = int64_t(status.st_size);
      void* bytes = mmap(nullptr, size_t(size_), PROT_READ, MAP_SHARED, fd, 0);
      data_ = bytes == MAP_FAILED ? nullptr : static_cast<const unsigned char*>(bytes);
    }
    const int error = errno;
    ::close(fd);
    if (!regular) fail(path_.string(), ": found no regular file");
    if (size_ > 0 && !data_) fail(path_.string(), ": cannot map: ", std::strerror(error));
  }
  MappedFile(MappedFile&& other) noexcept
      : path_(std::move(other.path_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile() {
    if (data_) munmap(const_cast<unsigned char*>(data_), size_t(size_));
  }
  const std::filesystem::path& path() const { return path_; }
  const unsigned char* data() const { return data_; }
  int64_t size() const { return size_; }  // bytes

 private:
  std::filesystem::path path_;
  const unsigned char* data_ = nullptr;
  int64_t size_ = 0;
};

// A hash of every byte of the files, in their order: 16 hexadecimal digits. It tells one model from
// another; it is no protection against forgery.
inline std::string hash_files(const std::vector<MappedFile>& files) {
  constexpr int64_t kPiece = 1 << 20;
  uint64_t h = 0;
  for (const MappedFile& file : files) {
    std::vector<uint64_t> pieces(size_t((file.size() + kPiece - 1) / kPiece));
#pragma omp parallel for schedule(static)
    for (size_t p = 0; p < pieces.size(); p++) {
      const int64_t begin = int64_t(p) * kPiece, end = std::min(begin + kPiece, file.size());
      uint64_t x = uint64_t(end - begin);
      for (int64_t i = begin; i < end; i += 8) {
        uint64_t word = 0;
        std::memcpy(&word, file.data() + i, size_t(std::min<int64_t>(8, end - i)));
        x = mix64(x ^ word);
      }
      pieces[p] = x;
    }
    h = mix64(h, uint64_t(file.size()));
    for (const uint64_t piece : pieces) h = mix64(h, piece);
  }
  return format("%016llx", static_cast<unsigned long long>(h));
}

// ---------------------------------------------------------------------------------------------
// Text

inline std::string ascii_lower(std::string_view text) {  // A to Z as a to z
  std::string lower(text);
  for (char& c : lower)
    if (c >= 'A' && c <= 'Z') c = char(c + ('a' - 'A'));
  return lower;
}
inline std::string_view strip_ascii(std::string_view text) {  // no white space at both ends
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
}

// Later lines under the first one, for notes such as "sample  a text of\n        two lines".
inline std::string indented(std::string text) {
  for (size_t i = 0; (i = text.find('\n', i)) != std::string::npos; i += 9)
    text.replace(i, 1, "\n        ");
  return text;
}

// ---------------------------------------------------------------------------------------------
// Time and the progress line

inline double now() {  // seconds, monotonic
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

inline std::string duration_text(double seconds) {  // 45s, 2m05s, 3h07m
  const long s = std::lround(std::max(0., seconds));
  if (s < 60) return format("%lds", s);
  if (s < 3600) return format("%ldm%02lds", s / 60, s % 60);
  return format("%ldh%02ldm", s / 3600, s / 60 % 60);
}

inline std::string bytes_text(double bytes) {  // 512 B, 3.1 KB, 1.2 GB (powers of 1000)
  const char* units[] = {"B", "KB", "MB", "GB", "TB"};
  int u = 0;
  while (bytes >= 1000 && u < 4) bytes /= 1000, u++;
  return format(u ? "%.1f %s" : "%.0f %s", bytes, units[u]);
}

inline std::string count_text(double n) {  // 1,234 or 5.03M
  if (n >= 1e12) return format("%.2fT", n / 1e12);
  if (n >= 1e9) return format("%.2fB", n / 1e9);
  if (n >= 1e6) return format("%.2fM", n / 1e6);
  std::string digits = format("%.0f", n);
  for (int i = int(digits.size()) - 3; i > 0; i -= 3) digits.insert(size_t(i), ",");
  return digits;
}

// The first `columns` characters of a line.
inline std::string cut_to_width(std::string line, int columns) {
  int characters = 0;
  for (size_t i = 0; i < line.size(); i++) {
    const bool begins_character = (line[i] & 0xc0) != 0x80;  // of UTF-8
    if (begins_character && characters++ == columns) line.resize(i);
  }
  return line;
}

inline int terminal_width() {  // columns of stdout; 0: unknown
  struct winsize size = {};
  return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

// One line that is rewritten in place on a terminal, and cut to its width; in a log, a whole line
// at most every `interval` seconds, so that a file stays readable.
class ProgressLine {
 public:
  explicit ProgressLine(double interval = 10) : interval_(interval) {}
  void show(const std::string& line, bool last = false) {
    const double t = now();
    if (terminal_) {
      const int width = terminal_width();
      std::printf("\r%s\033[K%s", (width > 1 ? cut_to_width(line, width - 1) : line).c_str(),
                  last ? "\n" : "");
      open_ = !last;
    } else if (last || t >= next_) {
      std::printf("%s\n", line.c_str());
      next_ = t + interval_;
    }
    std::fflush(stdout);
  }
  void note(const std::string& text) {  // a lasting line above the progress line
    if (open_) std::printf("\r\033[K");
    std::printf("%s\n", text.c_str());
    std::fflush(stdout);
    open_ = false;
  }

 private:
  bool terminal_ = isatty(STDOUT_FILENO);
  bool open_ = false;
  double interval_, next_ = 0;
};

// One process at a time writes a run: holds its directory until the end of the process. Where the
// file system has no locks, says so.
class RunLock {
 public:
  explicit RunLock(const std::filesystem::path& dir)
      : fd_(open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (fd_ < 0) fail(dir.string(), ": cannot open: ", errno_text());
    if (flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
    if (errno == EWOULDBLOCK) {
      close(fd_);
      fail(dir.string(), ": another process is writing this run");
    }
    std::fprintf(stderr, "%s: cannot lock (%s): see that no second process writes this run\n",
                 dir.c_str(), errno_text().c_str());
  }
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;
  ~RunLock() { close(fd_); }

 private:
  int fd_;
};

// A run never writes where it reads: `out` is none of the inputs and holds none of them.
inline void expect_elsewhere(const std::filesystem::path& out,
                             const std::vector<std::filesystem::path>& inputs) {
  namespace fs = std::filesystem;
  fs::path root = fs::weakly_canonical(fs::absolute(out));
  if (!root.has_filename()) root = root.parent_path();  // "runs/" is "runs"
  for (const fs::path& input : inputs) {
    for (const fs::path& name : {input, input / "model"}) {  // `input` may itself be a run
      if (input.empty() || (name != input && !fs::exists(name))) continue;
      const fs::path path = fs::weakly_canonical(fs::absolute(name));
      const auto differs = std::mismatch(root.begin(), root.end(), path.begin(), path.end());
      if (differs.first == root.end()) {
        fail("-o ", out.string(), ": is or holds ", name.string(),
             ", which the run reads; expected another directory");
      }
    }
  }
}

// Fails when a run's directory holds something already.
inline void expect_new_run(const std::filesystem::path& dir) {
  namespace fs = std::filesystem;
  if (fs::exists(dir) && (!fs::is_directory(dir) || !fs::is_empty(dir))) {
    fail(dir.string(), ": exists; --resume goes on with it, --overwrite begins anew");
  }
}

// ---------------------------------------------------------------------------------------------
// metrics.jsonl: one JSON object a line, {"step": n, ...}, appended

class Metrics {
 public:
  // Keeps the whole lines of steps up to and including `keep_step`, drops what came after: a run
  // that resumes at a checkpoint writes those steps again.
  void open(const std::filesystem::path& path, int64_t keep_step) {
    AtomicFile kept(path);
    if (std::filesystem::exists(path)) {
      std::ifstream lines(path);
      if (!lines) fail(path.string(), ": cannot open: ", errno_text());
      for (std::string line; std::getline(lines, line);) {
        long long step = 0;
        if (std::sscanf(line.c_str(), "{\"step\":%lld", &step) == 1 && step <= keep_step &&
            line.ends_with("}")) {
          kept.write(line + "\n");
        }
      }
      if (lines.bad()) fail(path.string(), ": cannot read: ", errno_text());
    }
    kept.commit();
    file_.reset(std::fopen(path.c_str(), "ab"));
    if (!file_) fail(path.string(), ": cannot append: ", errno_text());
    path_ = path;
  }
  void write(const std::string& json_object) {
    const std::string line = json_object + "\n";
    write_bytes(file_.get(), line.data(), line.size(), path_);
    if (std::fflush(file_.get()) != 0) fail(path_.string(), ": cannot write: ", errno_text());
  }
  void sync() { sync_path(path_); }

 private:
  std::filesystem::path path_;
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace cake
