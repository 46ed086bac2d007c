// A server for tests: in this process, on a free port, with a scripted or a small random model.
#pragma once

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include "cake/serve.h"
#include "test/http_client.h"
#include "test/scripted_model.h"
#include "test/support.h"

namespace cake {

// Waits until the condition holds, `seconds` at most: whether it does.
template <class Condition>
bool wait_until(Condition&& condition, double seconds = 20) {
  for (const double end = now() + seconds; now() < end;) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return condition();
}

// Writes to a FIFO that loading waits for, at its end at the latest: otherwise a test that fails
// before it writes would wait for the server for ever. Made after the server, so that it ends
// first.
class FifoWriter {
 public:
  explicit FifoWriter(std::string path) : path_(std::move(path)) {}
  FifoWriter(const FifoWriter&) = delete;
  FifoWriter& operator=(const FifoWriter&) = delete;
  ~FifoWriter() {
    if (!written_) write();
  }
  // Whether somebody read it, within 20 s.
  bool write(const std::string& text = "A passage.\n") {
    written_ = true;
    int fd = -1;  // without O_NONBLOCK it would wait for a reader that may have ended
    wait_until([&] { return (fd = open(path_.c_str(), O_WRONLY | O_NONBLOCK)) >= 0; });
    if (fd < 0) return false;
    const bool whole = ::write(fd, text.data(), text.size()) == ssize_t(text.size());
    close(fd);
    return whole;
  }

 private:
  std::string path_;
  bool written_ = false;
};

// The options of a test's server: one engine thread, any free port, little memory.
inline ServeOptions serve_options(const std::string& model) {
  ServeOptions options;
  options.models = {model};
  options.chat_template.choice = "chatml";
  options.model.device = "cpu";
  options.model.threads = 1;
  options.http.port = 0;
  options.engine.rows = 16;
  options.cache_mb = 64;
  options.grace_seconds = 1;
  return options;
}

// Serves from construction to destruction.
class RunningServer {
 public:
  explicit RunningServer(const ServeOptions& options, bool wait_for_models = true)
      : server_(std::make_unique<Server>(options)), port_(server_->port()) {
    thread_ = std::thread([this] {
      try {
        status_ = server_->run();
      } catch (const std::exception& e) {
        error_ = e.what();
      }
      ended_ = true;
    });
    if (!wait_for_models) return;
    const bool ready = wait_until(
        [&] { return ended_ || cake::ask(port_, http_get("/health")).status == 200; }, 60);
    if (!ready || ended_) {
      stop();
      fail("the test's server: found it ", ready ? "ended: " : "not ready after 60 s", error_);
    }
  }
  explicit RunningServer(const std::string& model) : RunningServer(serve_options(model)) {}
  ~RunningServer() { stop(); }
  // Stops it and waits. Its exit status.
  int stop() {
    if (thread_.joinable()) {
      server_->stop();
      thread_.join();
    }
    return status_;
  }
  int port() const { return port_; }
  Server& server() { return *server_; }
  bool ended() const { return ended_; }
  const std::string& error() const { return error_; }  // that run() threw; "" for none

  Reply get(const std::string& path, const Headers& headers = {}) {
    return cake::ask(port_, http_get(path, headers));
  }
  Reply post(const std::string& path, const OrderedJson& body, const Headers& headers = {}) {
    return cake::ask(port_, http_post(path, body, headers));
  }
  StreamedReply stream(const std::string& path, OrderedJson body, const Headers& headers = {}) {
    body["stream"] = true;
    return ask_stream(port_, http_post(path, body, headers));
  }

  // A value of /metrics, by its name with its labels as they are printed.
  double metric(const std::string& name) {
    const Reply reply = get("/metrics");
    require(reply.status == 200, "/metrics: found status ", reply.status);
    std::istringstream lines(reply.body);
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with(name + " ")) return std::stod(line.substr(name.size() + 1));
    }
    fail("/metrics: found no ", name, " in:\n", reply.body);
  }

 private:
  std::unique_ptr<Server> server_;
  int port_;
  std::thread thread_;
  std::atomic<bool> ended_{false};
  int status_ = -1;
  std::string error_;
};

// ./serve as a process, on a free port, which it prints.
class ServeBinary {
 public:
  // `models`: as on its command line. `tracer`: a program that begins it in place of itself.
  explicit ServeBinary(const std::string& models, const std::string& flags = "",
                       const std::string& tracer = "") {
    log_ = dir_ / "log";
    child_ = fork();
    if (child_ == 0) {
      execl("/bin/sh", "sh", "-c",
            concat("exec ", tracer, " ./serve ", models,
                   " --port 0 --device cpu --threads 1 --cache-mb 64 --template chatml ", flags,
                   " >", log_, " 2>&1")
                .c_str(),
            nullptr);
      _exit(127);
    }
    const bool ready = wait_until(
        [&] {
          if (ended()) return true;
          const std::string text = log();
          const size_t at = text.find("http://127.0.0.1:");
          if (at == std::string::npos) return false;
          port_ = std::atoi(text.c_str() + at + 17);
          try {
            return port_ > 0 && ask(port_, http_get("/health")).status == 200;
          } catch (const Error&) {
            return false;
          }
        },
        60);
    if (!ready || ended()) fail("./serve: found it not ready: ", log());
  }
  ~ServeBinary() {
    if (!ended()) {
      kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
  }
  void signal(int number) { kill(child_, number); }
  bool ended() {
    if (status_ < 0) {
      int status;
      if (waitpid(child_, &status, WNOHANG) != child_) return false;
      status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    return true;
  }
  int status() const { return status_; }  // exit status, or 128 and a signal's number
  int port() const { return port_; }
  std::string log() const { return std::filesystem::exists(log_) ? read_file(log_) : ""; }

 private:
  TempDir dir_;
  std::string log_;
  pid_t child_ = -1;
  int port_ = 0, status_ = -1;
};

// A model with random weights, whose texts differ with the seed: ScriptedModel's tokenizer, T
// positions. Its directory.
inline std::string save_random_model(const ScriptedModel& scripted, const std::string& name,
                                     int T = 256, double std = .3) {
  const Config c{.family = Family::llama,
                 .V = scripted.tokenizer().vocab_size(),
                 .T = T,
                 .L = 2,
                 .C = 64,
                 .NH = 4,
                 .NKV = 2,
                 .HS = 16,
                 .F = 96,
                 .tied = true};
  const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
    const Tensor& t = gpt->table().tensors[i];
    Rng rng{mix64(7, i)};
    std::vector<float> values(size_t(t.size()));
    for (float& x : values) x = float((t.init_one ? 1 : 0) + std * rng.normal());
    gpt->write(int(i), Slot::weight, values);
  }
  const std::string dir = scripted.dir() / name;
  save_checkpoint(dir, *gpt, {.tokenizer_from = scripted.dir() / "tokenizer"});
  return dir;
}

}  // namespace cake
