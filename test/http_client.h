// An HTTP client for tests, over raw sockets: any bytes can be sent, in pieces of any size, and a
// connection can be closed at any moment. Nothing is retried and nothing is corrected.
//
//     Connection c(port);
//     c.write(http_post("/v1/completions", body));
//     Reply reply = c.read_reply();                  // status, headers, body
//     EventReader events(c);                         // of a stream: after c.read_head()
//     while (auto event = events.next()) ...
//
// Every wait has a limit, and fails the test when it is over: no test hangs.
#pragma once

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"

namespace cake {

using Headers = std::vector<std::pair<std::string, std::string>>;

// A request as bytes. Host and, with a body, Content-Length are added unless they are in `headers`;
// an empty value there leaves the header out.
inline std::string http_request(const std::string& method, const std::string& path,
                                const Headers& headers = {},
                                const std::optional<std::string>& body = std::nullopt) {
  std::string text = method + " " + path + " HTTP/1.1\r\n";
  const auto add = [&](const std::string& name, const std::string& value) {
    const bool given = std::any_of(headers.begin(), headers.end(), [&](const auto& header) {
      return strcasecmp(header.first.c_str(), name.c_str()) == 0;
    });
    if (!given) text += name + ": " + value + "\r\n";
  };
  add("Host", "127.0.0.1");
  if (body) add("Content-Length", std::to_string(body->size()));
  for (const auto& [name, value] : headers) {
    if (!value.empty()) text += name + ": " + value + "\r\n";
  }
  return text + "\r\n" + body.value_or("");
}
inline std::string http_get(const std::string& path, const Headers& headers = {}) {
  return http_request("GET", path, headers);
}
inline std::string http_post(const std::string& path, const std::string& body,
                             Headers headers = {}) {
  headers.emplace_back("Content-Type", "application/json");
  return http_request("POST", path, headers, body);
}
inline std::string http_post(const std::string& path, const char* body,
                             const Headers& headers = {}) {
  return http_post(path, std::string(body), headers);
}
inline std::string http_post(const std::string& path, const OrderedJson& body,
                             const Headers& headers = {}) {
  return http_post(path, body.dump(), headers);
}

struct Reply {
  int status = 0;    // 0: the connection was closed before a whole head
  std::string head;  // as it came, without the empty line
  Headers headers;
  std::string body;       // chunks joined
  bool complete = false;  // the body is as long as its head says, or its last chunk came

  // The first header of that name, in any case; "" when there is none.
  std::string header(const std::string& name) const {
    for (const auto& [key, value] : headers) {
      if (strcasecmp(key.c_str(), name.c_str()) == 0) return value;
    }
    return "";
  }
  bool has(const std::string& name) const {
    return std::any_of(headers.begin(), headers.end(), [&](const auto& header) {
      return strcasecmp(header.first.c_str(), name.c_str()) == 0;
    });
  }
  OrderedJson json() const { return parse_json<OrderedJson>(body, "the reply"); }
};

class Connection {
 public:
  // `seconds`: the longest wait for any byte. `receive_bytes`: of the kernel's buffer, so that a
  // client that does not read is noticed soon; 0: the system's choice.
  explicit Connection(int port, double seconds = 30, int receive_bytes = 0) : seconds_(seconds) {
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    require(fd_ >= 0, "a socket for a test: ", errno_text());
    if (receive_bytes > 0) {
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof receive_bytes);
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(uint16_t(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
      const std::string why = errno_text();
      close();
      fail("connect to port ", port, ": ", why);
    }
    const int yes = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  }
  // The other side of one: a socket that accept() returned.
  static Connection of(int fd, double seconds = 30) { return Connection(Accepted{fd}, seconds); }
  Connection(Connection&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)),
        seconds_(other.seconds_),
        ended_(other.ended_),
        held_(std::move(other.held_)) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() { close(); }

  int fd() const { return fd_; }
  // False when the other side has closed the connection.
  bool write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      bytes.remove_prefix(size_t(n));
    }
    return true;
  }
  // In pieces of `size` bytes, `seconds` apart.
  bool write_slowly(std::string_view bytes, size_t size = 1, double seconds = 0) {
    for (; !bytes.empty(); bytes.remove_prefix(std::min(size, bytes.size()))) {
      if (!write(bytes.substr(0, size))) return false;
      if (seconds > 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    }
    return true;
  }
  void half_close() { ::shutdown(fd_, SHUT_WR); }  // nothing more is sent; replies can be read
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  void reset() {  // closes with a reset, as a client that crashed
    const linger at_once{.l_onoff = 1, .l_linger = 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close();
  }

  // Waits for bytes and adds them to what was read. False when none came in time, or the other
  // side has closed the connection: then ended().
  bool receive(double seconds) {
    pollfd p{.fd = fd_, .events = POLLIN, .revents = 0};
    for (const double end = now() + seconds;;) {
      const int n = ::poll(&p, 1, std::max(0, int(std::ceil((end - now()) * 1000))));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      break;
    }
    char buffer[16384];
    const ssize_t n = ::recv(fd_, buffer, sizeof buffer, 0);
    if (n <= 0) {
      ended_ = true;
      return false;
    }
    held_.append(buffer, size_t(n));
    return true;
  }
  bool ended() const { return ended_; }
  std::string& held() { return held_; }  // read, and not taken yet

  // All that comes until the other side closes. Fails when it does not, within the limit.
  std::string read_all() {
    for (const double end = now() + seconds_; !ended_;) {
      require(now() < end, "read: found the connection open after ", seconds_, " s, with ",
              held_.substr(0, 200));
      receive(end - now());
    }
    return std::exchange(held_, {});
  }

  // The head of a reply; interim replies (1xx) are passed over. Status 0: closed before it.
  Reply read_head() {
    for (;;) {
      size_t end;
      while ((end = held_.find("\r\n\r\n")) == std::string::npos) {
        if (receive(seconds_)) continue;
        require(ended_, "read: found no reply in ", seconds_, " s, with ", held_.substr(0, 200));
        return {};
      }
      Reply reply;
      reply.head = held_.substr(0, end);
      held_.erase(0, end + 4);
      require(reply.head.starts_with("HTTP/1.") && reply.head.size() >= 12,
              "read: found no HTTP reply: ", reply.head.substr(0, 200));
      reply.status = std::atoi(reply.head.c_str() + 9);
      size_t line = reply.head.find("\r\n");
      while (line != std::string::npos) {
        const size_t next = reply.head.find("\r\n", line + 2);
        const std::string text = reply.head.substr(line + 2, next - line - 2);
        const size_t colon = text.find(':');
        require(colon != std::string::npos, "read: found a header without a colon: ", text);
        const size_t value = text.find_first_not_of(" \t", colon + 1);
        reply.headers.emplace_back(text.substr(0, colon),
                                   value == std::string::npos ? "" : text.substr(value));
        line = next;
      }
      if (reply.status >= 200) return reply;
    }
  }

  // Takes the next bytes of a chunked body, "" at its end or when the connection ends before:
  // then complete is false.
  std::string read_chunk(bool& complete) {
    complete = false;
    size_t end;
    while ((end = held_.find("\r\n")) == std::string::npos) {
      if (receive(seconds_)) continue;
      require(ended_, "read: found no chunk in ", seconds_, " s");
      return "";
    }
    char* behind = nullptr;
    const size_t size = std::strtoul(held_.c_str(), &behind, 16);
    require(behind == held_.c_str() + end && end > 0,
            "read: found no chunk size: ", held_.substr(0, end));
    while (held_.size() < end + 2 + size + 2) {
      if (receive(seconds_)) continue;
      require(ended_, "read: found no whole chunk in ", seconds_, " s");
      return "";
    }
    std::string data = held_.substr(end + 2, size);
    require(held_.compare(end + 2 + size, 2, "\r\n") == 0, "read: found a chunk without its end");
    held_.erase(0, end + 2 + size + 2);
    complete = true;
    return data;
  }

  // A whole reply. `to_head`: the request was HEAD, whose reply has no body.
  Reply read_reply(bool to_head = false) {
    Reply reply = read_head();
    if (reply.status == 0) return reply;
    if (to_head || reply.status == 204 || reply.status == 304) {
      reply.complete = true;
    } else if (strcasecmp(reply.header("Transfer-Encoding").c_str(), "chunked") == 0) {
      for (;;) {
        const std::string data = read_chunk(reply.complete);
        if (data.empty()) break;
        reply.body += data;
      }
    } else if (reply.has("Content-Length")) {
      const size_t size = std::strtoul(reply.header("Content-Length").c_str(), nullptr, 10);
      while (held_.size() < size && receive(seconds_)) {
      }
      require(held_.size() >= size || ended_, "read: found no whole body in ", seconds_, " s");
      reply.complete = held_.size() >= size;
      reply.body = held_.substr(0, size);
      held_.erase(0, reply.body.size());
    } else {  // until the connection is closed
      reply.body = read_all();
      reply.complete = true;
    }
    return reply;
  }

  // Writes a request and reads its reply.
  Reply ask(std::string_view request) {
    write(request);
    return read_reply();
  }

 private:
  struct Accepted {
    int fd;
  };
  Connection(Accepted socket, double seconds) : fd_(socket.fd), seconds_(seconds) {
    const int yes = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  }

  int fd_ = -1;
  double seconds_;
  bool ended_ = false;
  std::string held_;
};

// One request on a connection of its own.
inline Reply ask(int port, std::string_view request, double seconds = 30) {
  return Connection(port, seconds).ask(request);
}

// ---------------------------------------------------------------------------------------------
// Server-sent events

struct ServerEvent {
  std::string text;  // between "data: " and the empty line
  double time = 0;   // when it was complete: now()
  bool is_done() const { return text == "[DONE]"; }
  OrderedJson json() const { return parse_json<OrderedJson>(text, "an event"); }
};

// Reads events behind the head of a chunked reply. Every event must be one line "data: ..." and an
// empty line: that is what the strictest clients read.
class EventReader {
 public:
  explicit EventReader(Connection& connection) : connection_(connection) {}
  // Nothing: the reply has ended. Then complete() says whether its last chunk came.
  std::optional<ServerEvent> next() {
    size_t end;
    while ((end = text_.find("\n\n")) == std::string::npos) {
      const std::string data = connection_.read_chunk(complete_);
      if (data.empty()) {
        require(text_.empty(), "the stream: found an end inside of an event: ", text_);
        return std::nullopt;
      }
      raw_ += data;
      text_ += data;
    }
    ServerEvent event{.text = text_.substr(0, end), .time = now()};
    text_.erase(0, end + 2);
    require(event.text.starts_with("data: ") && !contains_line_end(event.text),
            "the stream: found an event that is no line \"data: ...\": ", event.text);
    event.text.erase(0, 6);
    return event;
  }
  bool complete() const { return complete_; }
  const std::string& raw() const { return raw_; }  // the body so far

 private:
  static bool contains_line_end(const std::string& text) {
    return text.find_first_of("\r\n") != std::string::npos;
  }
  Connection& connection_;
  std::string text_, raw_;
  bool complete_ = false;
};

// A whole streamed reply: its head, and all events with [DONE] if it came.
struct StreamedReply {
  Reply reply;  // body: as it came; complete: the last chunk came
  std::vector<ServerEvent> events;
  bool done() const { return !events.empty() && events.back().is_done(); }
  // The events but [DONE].
  std::vector<OrderedJson> chunks() const {
    std::vector<OrderedJson> list;
    for (const ServerEvent& event : events) {
      if (!event.is_done()) list.push_back(event.json());
    }
    return list;
  }
};

// Reads the reply to a request that was written. When it is no stream of events, `events` is empty
// and `reply` has the body.
inline StreamedReply read_stream(Connection& connection) {
  StreamedReply stream{.reply = connection.read_head(), .events = {}};
  Reply& reply = stream.reply;
  if (reply.status == 0) return stream;
  if (reply.header("Content-Type") != "text/event-stream") {
    const size_t size = std::strtoul(reply.header("Content-Length").c_str(), nullptr, 10);
    while (connection.held().size() < size && connection.receive(30)) {
    }
    reply.complete = connection.held().size() >= size;
    reply.body = connection.held().substr(0, size);
    connection.held().erase(0, reply.body.size());
    return stream;
  }
  EventReader events(connection);
  while (auto event = events.next()) stream.events.push_back(std::move(*event));
  reply.complete = events.complete();
  reply.body = events.raw();
  return stream;
}

inline StreamedReply ask_stream(int port, std::string_view request, double seconds = 30) {
  Connection connection(port, seconds);
  connection.write(request);
  return read_stream(connection);
}

}  // namespace cake
