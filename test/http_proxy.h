// A server for tests that stands between a browser and ./serve, so that a test decides when bytes
// come and what they are.
//
//     browser --> Proxy --> server
//                   |
//                   +--> hold(path): the test itself answers, when it wants to
//
// Answers come back as the server wrote them: at once, or a byte at a time.
#pragma once

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"
#include "test/http_client.h"

namespace cake {

// A request that the test answers. The connection ends with it.
struct HeldCall {
  Connection connection;
  std::string method, path, body;
  OrderedJson json() const { return parse_json<OrderedJson>(body, path); }

  void reply(int status, const OrderedJson& json) {
    const std::string text = json.dump();
    connection.write(concat("HTTP/1.1 ", status, " -\r\nContent-Type: application/json\r\n",
                            "Connection: close\r\nContent-Length: ", text.size(), "\r\n\r\n",
                            text));
    connection.close();
  }
  void begin_stream() {
    connection.write(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        "Cache-Control: no-cache\r\nConnection: close\r\n\r\n");
  }
  void send(const OrderedJson& event) { connection.write("data: " + event.dump() + "\n\n"); }
  void end_stream() {
    connection.write("data: [DONE]\n\n");
    connection.close();
  }
  // Waits until the browser has left, and fails when it does not.
  void wait_for_the_end(double seconds = 20) {
    for (const double end = now() + seconds; !connection.ended();) {
      require(now() < end, path, ": found the browser still there after ", seconds, " s");
      connection.receive(end - now());
    }
  }
};

class Proxy {
 public:
  explicit Proxy(int server_port) : server_port_(server_port) {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    require(listener_ >= 0 &&
                ::bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
                ::listen(listener_, 64) == 0 &&
                ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0,
            "a proxy for a test: ", errno_text());
    port_ = ntohs(address.sin_port);
    acceptor_ = std::thread([this] { accept_all(); });
  }
  ~Proxy() {
    stopping_ = true;
    ::shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (std::thread& t : threads_) t.join();
    ::close(listener_);
  }
  int port() const { return port_; }

  // From here on the test answers the calls of this path: next_call(). pass_on: no more.
  void hold(const std::string& path) {
    const std::lock_guard lock(mutex_);
    held_paths_.insert(path);
  }
  void pass_on(const std::string& path) {
    const std::lock_guard lock(mutex_);
    held_paths_.erase(path);
  }
  // Waits for the next call of a path that is held.
  HeldCall next_call(double seconds = 20) {
    std::unique_lock lock(mutex_);
    const bool came = arrived_.wait_for(lock, std::chrono::duration<double>(seconds),
                                        [&] { return !calls_.empty(); });
    require(came, "the proxy: found no call in ", seconds, " s");
    HeldCall call = std::move(calls_.front());
    calls_.pop_front();
    return call;
  }
  size_t waiting_calls() {
    const std::lock_guard lock(mutex_);
    return calls_.size();
  }
  // From here on answers come one byte at a time. After each byte of a character that is not ASCII
  // and after each line the proxy waits, so that the browser reads them one by one.
  void byte_by_byte(bool slow) { byte_by_byte_ = slow; }
  // The bodies of the calls of this path that were passed on.
  std::vector<std::string> bodies(const std::string& path) {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> list;
    for (const auto& [name, body] : passed_) {
      if (name == path) list.push_back(body);
    }
    return list;
  }

 private:
  void accept_all() {
    for (;;) {
      const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0 && errno == EINTR) continue;
      if (fd < 0) return;
      threads_.emplace_back([this, fd] {
        try {
          answer(Connection::of(fd, 60));
        } catch (const std::exception&) {  // the browser or the server left in the middle
        }
      });
    }
  }

  // One request; every connection is closed behind its answer.
  void answer(Connection browser) {
    size_t end;
    while ((end = browser.held().find("\r\n\r\n")) == std::string::npos) {
      if (!receive(browser)) return;
    }
    const std::string head = browser.held().substr(0, end + 2);
    browser.held().erase(0, end + 4);
    std::istringstream first(head);
    std::string method, path;
    first >> method >> path;
    const size_t length = std::strtoul(header(head, "content-length").c_str(), nullptr, 10);
    while (browser.held().size() < length) {
      if (!receive(browser)) return;
    }
    const std::string body = browser.held().substr(0, length);
    browser.held().clear();
    {
      const std::lock_guard lock(mutex_);
      if (held_paths_.count(path)) {
        calls_.push_back({std::move(browser), method, path, body});
        arrived_.notify_one();
        return;
      }
      passed_.emplace_back(path, body);
    }
    Headers headers = {{"Connection", "close"}};
    for (const char* name : {"authorization", "content-type", "if-none-match"}) {
      if (const std::string value = header(head, name); !value.empty()) {
        headers.emplace_back(name, value);
      }
    }
    Connection server(server_port_, 60);
    server.write(
        http_request(method, path, headers, method == "GET" ? std::nullopt : std::optional(body)));
    while (!server.ended() && !stopping_) {
      server.receive(.1);
      if (!pass_bytes(browser, server.held())) return;  // the server learns it from our close()
      server.held().clear();
      if (browser_left(browser)) return;
    }
  }

  bool pass_bytes(Connection& browser, const std::string& bytes) {
    if (!byte_by_byte_) return browser.write(bytes);
    for (const char byte : bytes) {
      if (!browser.write(std::string_view(&byte, 1))) return false;
      if (byte == '\n' || byte < 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }
  static bool browser_left(Connection& browser) {
    pollfd p{.fd = browser.fd(), .events = POLLIN, .revents = 0};
    if (::poll(&p, 1, 0) <= 0) return false;
    browser.receive(0);
    return browser.ended();
  }
  // False when the browser has closed the connection, or the test is over.
  bool receive(Connection& browser) {
    while (!stopping_ && !browser.ended()) {
      if (browser.receive(.1)) return true;
    }
    return false;
  }
  static std::string header(const std::string& head, const std::string& name) {
    std::istringstream lines(head);
    for (std::string line; std::getline(lines, line);) {
      if (line.size() <= name.size() || line[name.size()] != ':') continue;
      if (strncasecmp(line.c_str(), name.c_str(), name.size()) != 0) continue;
      const size_t begin = line.find_first_not_of(' ', name.size() + 1);
      if (begin != std::string::npos) return line.substr(begin, line.find('\r') - begin);
    }
    return "";
  }

  const int server_port_;
  int listener_ = -1, port_ = 0;
  std::atomic<bool> stopping_{false}, byte_by_byte_{false};
  std::thread acceptor_;
  std::vector<std::thread> threads_;  // of the acceptor's thread until it ends
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::set<std::string> held_paths_;
  std::deque<HeldCall> calls_;
  std::vector<std::pair<std::string, std::string>> passed_;
};

}  // namespace cake
