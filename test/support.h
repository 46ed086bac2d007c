// What the tests share: real data and its absence, temporary directories, relative errors, programs
// that are run and interrupted, and an engine that holds tensors and computes nothing.
#pragma once

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// A file of the real data: $CAKE_DATA, or ../shared/data beside the repository.
inline std::filesystem::path data_path(const std::string& name) {
  const char* root = std::getenv("CAKE_DATA");
  return std::filesystem::path(root && *root ? root : "../shared/data") / name;
}

// The test cases that said they were skipped; test/main.cpp prints how many.
inline std::set<std::string>& skipped_tests() {
  static std::set<std::string> names;
  return names;
}

// Says by name that the running test is skipped, and why.
inline void skip_test(const std::string& why) {
  const std::string test = doctest::getContextOptions()->currentTest->m_name;
  skipped_tests().insert(test);
  MESSAGE("skipped: " << test << ": " << why);
}

// True when the data are absent: then the test says so by name and returns.
//     if (skip_without_data("text/tinyshakespeare.txt")) return;
inline bool skip_without_data(const std::string& name) {
  if (std::filesystem::exists(data_path(name))) return false;
  skip_test(name + " is not there");
  return true;
}

// gzip; with other `bits`, what zlib's deflateInit2 makes of them.
inline std::string deflated(const std::string& text, int bits = 31) {
  z_stream z{};
  deflateInit2(&z, 6, Z_DEFLATED, bits, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&z, text.size()) + 64, '\0');
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  z.avail_in = uInt(text.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = uInt(out.size());
  deflate(&z, Z_FINISH);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

inline std::string zstandard(const std::string& text) {  // with a checksum: damage is found
  std::string out(ZSTD_compressBound(text.size()), '\0');
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  out.resize(ZSTD_compress2(context, out.data(), out.size(), text.data(), text.size()));
  ZSTD_freeCCtx(context);
  return out;
}

// A directory of its own for one test, removed with all it holds.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "cake-XXXXXX").string();
    if (!mkdtemp(pattern.data())) fail(pattern, ": cannot create: ", errno_text());
    path_ = pattern;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// ||a - b|| / ||b||, in double; ||a|| when b is zero. NaN when the sizes differ or any number is
// not finite: compare with `rel_error(a, b) < tolerance`, which NaN fails.
template <class A, class B>
double rel_error(const A& a, const B& b) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  if (std::size(a) != std::size(b)) return nan;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < std::size(a); i++) {
    const double x = double(a[i]), y = double(b[i]);
    if (!std::isfinite(x) || !std::isfinite(y)) return nan;
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// The message of the Error that `body` throws, or "no error".
template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A command as its user meets it.
struct Output {
  int status;        // exit status, 128 + n after signal n
  std::string text;  // stdout and stderr
};

inline Output shell(const std::string& command) {
  std::FILE* pipe = popen(("{ " + command + "; } 2>&1").c_str(), "r");
  REQUIRE(pipe);
  Output out{-1, {}};
  char buffer[4096];
  while (const size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) out.text.append(buffer, n);
  const int status = pclose(pipe);
  out.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return out;
}

inline size_t metric_lines(const std::filesystem::path& run_dir) {
  std::ifstream in(run_dir / "metrics.jsonl");
  return size_t(std::count(std::istreambuf_iterator<char>(in), {}, '\n'));
}

// Starts the command and sends the signal once metrics.jsonl has `lines` lines. False when the run
// ended before.
inline bool interrupt(const std::string& command, const std::filesystem::path& run_dir,
                      size_t lines, int signal, int* status) {
  const pid_t child = fork();
  if (child == 0) {
    execl("/bin/sh", "sh", "-c", ("exec " + command + " >/dev/null 2>&1").c_str(), nullptr);
    _exit(127);
  }
  bool sent = false;
  for (;;) {
    if (waitpid(child, status, WNOHANG) == child) return sent;
    if (!sent && metric_lines(run_dir) >= lines) sent = kill(child, signal) == 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// An engine's tensors without the engine.
class FakeGpt : public Gpt {
 public:
  explicit FakeGpt(const Config& config, bool muon = false, Lora lora = {})
      : Gpt(config, muon, lora) {
    for (auto& arena : arenas_) arena.assign(size_t(table_.size), 0.f);
  }
  // Random everywhere, norms and biases too.
  void randomize(uint64_t seed, double std = .05) {
    for (size_t i = 0; i < table_.tensors.size(); i++) {
      for (int slot = 0; slot < 4; slot++) {
        Rng rng{mix64(seed, i, uint64_t(slot))};
        for (float& x : at(int(i), Slot(slot))) x = float(std * rng.normal());
      }
    }
  }
  std::vector<float> values(int tensor, Slot slot = Slot::weight) const {
    std::vector<float> out(size_t(table_.tensors[size_t(tensor)].size()));
    read(tensor, slot, out);
    return out;
  }
  std::vector<float> values(const std::string& name, Slot slot = Slot::weight) const {
    return values(table_.find(name), slot);
  }

  void read(int tensor, Slot slot, std::span<float> out) const override {
    const auto from = const_cast<FakeGpt*>(this)->at(tensor, slot);
    if (from.size() != out.size()) fail("FakeGpt: read of another size");
    std::copy(from.begin(), from.end(), out.begin());
  }
  void write(int tensor, Slot slot, std::span<const float> in) override {
    const auto to = at(tensor, slot);
    if (to.size() != in.size()) fail("FakeGpt: write of another size");
    std::copy(in.begin(), in.end(), to.begin());
  }

  void forward(const Batch&, Pass) override { none(); }
  void backward(std::span<const float>, std::span<const float>, std::span<const float>) override {
    none();
  }
  void forward_backward(const Batch&, std::span<const float>, std::span<const float>,
                        std::span<const float>) override {
    none();
  }
  void update(const OptimizerStep&) override { none(); }
  UpdateStats stats(int) override { none(); }
  void zero_gradients() override { none(); }
  std::span<const float> logp() override { none(); }
  std::span<const float> entropy() override { none(); }
  std::span<const float> value() override { none(); }
  std::unique_ptr<KvCache> make_cache(int64_t, CacheType) override { none(); }
  void decode(KvCache&, std::span<const DecodeRow>, DecodeResult&, bool) override { none(); }

 private:
  [[noreturn]] static void none() { fail("FakeGpt computes nothing"); }
  std::span<float> at(int tensor, Slot slot) {
    const Tensor& t = table_.tensors.at(size_t(tensor));
    return std::span(arenas_[int(slot)]).subspan(size_t(t.offset), size_t(t.size()));
  }
  std::vector<float> arenas_[4];  // one a slot
};

// The losses of a run's steps, as written.
inline std::vector<std::string> losses(const std::filesystem::path& run_dir) {
  std::vector<std::string> result;
  std::istringstream lines(read_file(run_dir / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json j = Json::parse(line);
    for (const char* key : {"loss", "val_loss"})
      if (j.contains(key)) result.push_back(concat(j.at("step"), " ", key, " ", j.at(key)));
  }
  return result;
}

// Every file below a directory, by its path there.
inline std::map<std::string, std::string> files_below(const std::filesystem::path& dir) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir))
    if (entry.is_regular_file()) {
      files[std::filesystem::relative(entry.path(), dir)] = read_file(entry.path());
    }
  return files;
}

// What a run leaves: its files, those that hold times by their names alone, without the earlier
// checkpoints that it kept.
inline std::map<std::string, std::string> result_of_run(const std::filesystem::path& run) {
  auto files = files_below(run);
  std::erase_if(files, [](const auto& file) {
    return file.first.starts_with("model-") && !contains(file.first, ".new");
  });
  for (auto& [name, bytes] : files) {
    if (name.ends_with("trainer_state.json") || name == "summary.json") bytes.clear();
    if (name == "metrics.jsonl") {
      bytes.clear();
      for (const std::string& loss : losses(run)) bytes += loss + "\n";
    }
  }
  return files;
}

// Ends a run in place of its first, second, .. change of the disk, as a kill would, goes on with
// it, and expects what the run leaves that nothing ended. `begin(OUT)`: the command that begins the
// run in a directory; `resume`: "./stage --resume -o". A kill before the first checkpoint begins
// anew. `make test` tries one change of 17, from a place that changes, `make test-all` every one.
inline void end_at_every_change(const std::filesystem::path& dir, const std::string& resume,
                                const std::function<std::string(const std::string& out)>& begin) {
  const std::string whole = dir / "whole";
  const Output o = shell(begin(whole));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  const auto expected = result_of_run(whole);
  const int stride = std::getenv("CAKE_TEST_ALL") ? 1 : 17;
  for (int change = 1 + int(now()) % stride;; change += stride) {
    CAPTURE(change);
    const std::string out = dir / concat("ended_", change);
    const Output ended = shell(concat("CAKE_EXIT_AT=", change, " ", begin(out)));
    if (ended.status == 0) {
      REQUIRE(change > 50);  // the run has that many
      return;
    }
    REQUIRE_MESSAGE(ended.status == kKilled, ended.text);
    Output rest = shell(concat(resume, " ", out));
    if (rest.status == 1) {
      REQUIRE_MESSAGE(contains(rest.text, "found no checkpoint to go on from"), rest.text);
      rest = shell(begin(out) + " --overwrite");
    }
    REQUIRE_MESSAGE(rest.status == 0, rest.text);
    const auto found = result_of_run(out);
    for (const auto& file : found) CHECK_MESSAGE(expected.count(file.first), file.first);
    for (const auto& file : expected) {
      CAPTURE(file.first);
      REQUIRE(found.count(file.first));
      CHECK(found.at(file.first) == file.second);
    }
    std::filesystem::remove_all(out);
  }
}

}  // namespace cake
