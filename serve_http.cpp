// The HTTP server: cake/http.h says what it promises.
//
//     run()              accepts, makes room by closing a silent connection, starts a thread
//     serve()            a connection's thread: waits for a request, serves it, again
//     serve_request()    read_head -> check_host, check_origin, check_key -> find_route
//                        -> read_body -> process_request of the library -> handler -> answer
#include "cake/http.h"

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <atomic>
#include <condition_variable>
#include <limits>
#include <list>
#include <mutex>
#include <set>
#include <thread>

#include "cake/http_request.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Errors as JSON

std::string error_body(const ApiError& error) {
  const auto text_or_null = [](const std::string& text) {
    return text.empty() ? OrderedJson(nullptr) : OrderedJson(text);
  };
  OrderedJson body = {{"message", error.what()},
                      {"type", error.type},
                      {"param", text_or_null(error.param)},
                      {"code", text_or_null(error.code)}};
  if (error.more.is_object())
    for (const auto& [key, value] : error.more.items()) body[key] = value;
  return json_line(OrderedJson{{"error", body}});
}

void set_error(httplib::Response& res, const ApiError& error) {
  res.status = error.status;
  res.set_content(error_body(error), "application/json");
  if (error.status == 401) res.set_header("WWW-Authenticate", "Bearer");
  if (error.status == 503) res.set_header("Retry-After", "1");
  if (error.status == 500) res.set_header("x-should-retry", "false");
}

void set_event_stream(httplib::Response& res, std::function<bool(httplib::DataSink&)> write) {
  res.headers.erase("Cache-Control");
  res.set_header("Cache-Control", "no-cache");
  res.set_header("X-Accel-Buffering", "no");  // nginx would collect them
  // The type exactly so: with parameters the library would compress the events, and hold them back.
  res.set_chunked_content_provider(
      "text/event-stream",
      [write = std::move(write)](size_t, httplib::DataSink& sink) { return write(sink); });
}

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int kBacklog = 512;  // connections that the kernel holds until accept()
constexpr int kRefusing = 64;  // connections beyond the limit that are told so at the same time
constexpr int kOtherFiles = 64 + kRefusing;  // descriptors that are none of the connections
constexpr double kSlowestReader = 4096;      // bytes/s
constexpr double kLingerSeconds = 5;         // see linger()
// Of which 32 KB were touched by the largest requests: no regular expression reads what a client
// sent, and JSON has a bounded depth. The sanitizers' frames are larger.
constexpr size_t kStackBytes = 512 << 10;

[[noreturn]] void refuse(int status, const std::string& what, const char* code = "") {
  throw ApiError(status, status == 503 ? "server_error" : "invalid_request_error", code, "", what);
}

// Waits for `events` of a descriptor. False: they did not come in time.
bool wait_for(int fd, short events, double seconds) {
  const double until = now() + seconds;
  while (true) {
    const double left = until - now();
    pollfd wanted = {fd, events, 0};
    const int ready = poll(&wanted, 1, left <= 0 ? 0 : int(std::min(left, 1e6) * 1000) + 1);
    if (ready > 0) return true;
    if ((ready == 0 && now() >= until) || (ready < 0 && errno != EINTR)) return false;
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// A connection

struct HttpServer::Connection {
  Connection(int fd, const HttpOptions& options) : fd(fd), options(options) {
    socklen_t size = sizeof local;
    getsockname(fd, reinterpret_cast<sockaddr*>(&local), &size);
  }
  ~Connection() { ::close(fd); }

  const int fd;
  const HttpOptions& options;
  sockaddr_storage local = {};  // the address that the client connected to
  bool refused = false;         // there was no room: it is told so
  // Other threads read these, to choose whom to close.
  std::atomic<bool> waits = true;            // for a request's first byte
  std::atomic<double> silent_since = now();  // kNever: a handler is at work
  std::atomic<bool> closed = false;          // by close()

  std::string input;  // bytes that came; those before `used` were used
  size_t used = 0;
  double deadline = kNever;  // of the request that is being read
  bool write_timed_out = false;
  bool ends = false;  // with the answer that is being written
  // While the library works on a request:
  RequestHead head;
  std::string allowed_origin;  // of another site's page, which may read the answer
  std::string body;
  HttpServer::Handler handler;

  // Wakes the connection's thread, which then ends. Called while the connection is listed.
  void close() {
    closed = true;
    shutdown(fd, SHUT_RDWR);
  }
  bool left() const {  // the client closed, or it was closed here
    pollfd state = {fd, POLLRDHUP, 0};
    return closed || (poll(&state, 1, 0) > 0 && (state.revents & (POLLRDHUP | POLLHUP | POLLERR)));
  }
  size_t unused() const { return input.size() - used; }

  // Appends bytes to `input`, once some came. False: there will be none. ApiError 408 when none
  // came until `deadline`.
  bool receive() {
    if (used > 0) input.erase(0, std::exchange(used, 0));
    char bytes[16384];
    while (true) {
      const ssize_t n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
      if (n > 0) input.append(bytes, size_t(n));
      if (n >= 0) return n > 0;
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return false;
      if (!wait_for(fd, POLLIN, deadline - now())) {
        refuse(408, concat("the request took longer than ", options.request_seconds,
                           " seconds to arrive"));
      }
    }
  }
  void expect_more(const char* what) {
    if (!receive()) refuse(400, concat("the connection ended within ", what));
  }

  // Bytes that the kernel holds, because the client has not taken them.
  int64_t unsent() const {
    int bytes = 0;
    return ioctl(fd, SIOCOUTQ, &bytes) == 0 ? bytes : 0;
  }
  // Sends all of it. False: the client left, or is too slow. While the kernel's buffer is full,
  // patience runs out, and what the client takes refills it.
  bool send_all(const char* data, size_t size, bool more) {
    double patience = options.write_seconds;
    while (size > 0) {
      const ssize_t n = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
      if (n > 0) {
        data += n, size -= size_t(n);
        continue;
      }
      if (errno == EINTR) continue;
      write_timed_out = errno == ETIMEDOUT;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return false;
      const double begin = now();
      const int64_t before = unsent();
      silent_since = begin;
      wait_for(fd, POLLOUT, std::min(patience, .1));
      silent_since = kNever;
      const double taken = double(std::max<int64_t>(0, before - unsent()));
      patience += taken / kSlowestReader - (now() - begin);
      patience = std::min(patience, options.write_seconds);
      if (patience <= 0) {
        write_timed_out = true;
        return false;
      }
    }
    return true;
  }

  // Closing a socket that has unread bytes resets the connection, and the client may lose the
  // answer that it did not read yet. So what it still sends is read and dropped, for a while.
  void linger() {
    if (closed) return;
    shutdown(fd, SHUT_WR);
    silent_since = now();
    waits = true;  // stop() need not wait for it
    char bytes[8192];
    int64_t budget = 16 << 20;
    for (const double until = now() + kLingerSeconds; budget > 0 && now() < until;) {
      if (!wait_for(fd, POLLIN, until - now())) return;
      const ssize_t n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN)) return;
      budget -= std::max<ssize_t>(0, n);
    }
  }
};

namespace {

using Connection = HttpServer::Connection;
thread_local Connection* this_connection = nullptr;

// Waits for a request's head, and takes it out of the input. False: the client left before it.
bool read_head(Connection& c) {
  HeadScanner scanner(c.options.head_bytes);
  size_t size = 0;
  while ((size = scanner.scan(std::string_view(c.input).substr(c.used))) == 0) {
    if (c.unused() > 0) {
      c.expect_more("the head");
    } else if (!c.receive()) {
      return false;
    }
  }
  c.head = parse_head(std::string_view(c.input).substr(c.used, size));
  c.used += size;
  return true;
}

// A line of at most 256 bytes, without its CR LF: of the chunks' framing.
std::string read_chunk_line(Connection& c) {
  while (true) {
    const std::string_view rest = std::string_view(c.input).substr(c.used);
    const size_t end = rest.find('\n');
    if (end == std::string_view::npos ? rest.size() > 256 : end > 256)
      refuse(400, "chunked body: found a long line, expected a chunk's length");
    if (end != std::string_view::npos) {
      if (end == 0 || rest[end - 1] != '\r') refuse(400, "chunked body: expected CR LF");
      c.used += end + 1;
      return std::string(rest.substr(0, end - 1));
    }
    c.expect_more("the body");
  }
}

void append_bytes(Connection& c, std::string& body, size_t count) {
  while (count > 0) {
    if (c.unused() == 0) c.expect_more("the body");
    const size_t n = std::min(count, c.unused());
    body.append(c.input, c.used, n);
    c.used += n, count -= n;
  }
}

std::string read_chunks(Connection& c) {
  const int64_t limit = c.options.body_bytes;
  const auto too_large = [&] { refuse(413, concat("the body has more than ", limit, " bytes")); };
  std::string body;
  int64_t overhead = 0;  // bytes of framing
  while (true) {
    const std::string line = read_chunk_line(c);
    overhead += int64_t(line.size()) + 4;
    const size_t digits = std::min(line.find_first_not_of("0123456789abcdefABCDEF"), line.size());
    const std::string_view rest = strip_ascii(std::string_view(line).substr(digits));
    if (digits == 0 || digits > 15 || !(rest.empty() || rest.starts_with(";")))
      refuse(400, "chunked body: expected a chunk's length in hexadecimal digits");
    const size_t size = std::stoull(line.substr(0, digits), nullptr, 16);
    if (size == 0) break;
    if (size > size_t(limit) - body.size() || overhead > limit) too_large();
    append_bytes(c, body, size);
    if (!read_chunk_line(c).empty()) refuse(400, "chunked body: expected CR LF behind a chunk");
  }
  for (std::string trailer; !(trailer = read_chunk_line(c)).empty();) {
    overhead += int64_t(trailer.size());
    if (overhead > limit) too_large();
  }
  return body;
}

std::string read_body(Connection& c, const RequestHead& head) {
  const bool waits = head.has_header("expect") && head.minor == 1;
  if (waits && head.length != 0 && c.unused() == 0) {
    constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
    if (!c.send_all(kContinue.data(), kContinue.size(), false)) refuse(400, "the client left");
    c.silent_since = now();
  }
  if (head.length < 0) return read_chunks(c);
  std::string body;
  append_bytes(c, body, size_t(head.length));
  return body;
}

// What the library sees of a connection: the request's first line and those of its headers that
// handlers may read, then what it writes.
struct GuardedStream : httplib::Stream {
  GuardedStream(Connection& c, std::string request) : c(c), request(std::move(request)) {}
  bool is_readable() const override { return offset < request.size(); }
  bool is_writable() const override { return !c.left(); }
  ssize_t read(char* dst, size_t size) override {
    const size_t n = std::min(size, request.size() - offset);
    std::memcpy(dst, request.data() + offset, n);
    offset += n;
    return ssize_t(n);
  }
  // The head of the answer waits for what comes behind it, so that both go out in one packet. The
  // kernel does not wait for longer than 200 ms.
  ssize_t write(const char* data, size_t size) override {
    return c.send_all(data, size, writes++ == 0) ? ssize_t(size) : -1;
  }
  ~GuardedStream() override {
    const int on = 1;  // sends what waits
    if (writes == 1) setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  void get_remote_ip_and_port(std::string&, int&) const override {}
  void get_local_ip_and_port(std::string&, int&) const override {}
  socket_t socket() const override { return c.fd; }

  Connection& c;
  const std::string request;
  size_t offset = 0;
  int writes = 0;
};

// Left out: what the server has dealt with (lengths, keys), what the library would do badly
// (ranges, compression), and cookies, which belong to other servers of this machine.
std::string request_for_library(const RequestHead& head) {
  std::string text = "GET / HTTP/1.1\r\n";  // method and path are set later, as they are
  const std::set<std::string_view> kept = {"accept", "content-type", "host",        "if-none-match",
                                           "origin", "user-agent",   "x-request-id"};
  for (const auto& [name, value] : head.headers)
    if (kept.contains(name)) text += concat(name, ": ", value, "\r\n");
  return text + "\r\n";
}

// The address as it stands in a Host header: "127.0.0.1", "[::1]".
std::string address_text(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(address).sin_addr, text, sizeof text);
    return text;
  }
  if (address.ss_family != AF_INET6) return "";
  const in6_addr& six = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  if (IN6_IS_ADDR_V4MAPPED(&six)) {
    inet_ntop(AF_INET, six.s6_addr + 12, text, sizeof text);
    return text;
  }
  inet_ntop(AF_INET6, &six, text, sizeof text);
  return concat("[", text, "]");
}

// What a browser asks before it lets a page of another site call.
void answer_preflight(const Connection& c, httplib::Response& res) {
  res.status = 204;
  if (c.allowed_origin.empty()) return;
  res.set_header("Access-Control-Allow-Methods", "GET, POST");
  res.set_header("Access-Control-Allow-Headers", allowed_headers(c.head));
  res.set_header("Access-Control-Max-Age", "600");
  if (c.head.has_header("access-control-request-private-network"))
    res.set_header("Access-Control-Allow-Private-Network", "true");
}

// On every answer.
void add_headers(const Connection& c, httplib::Response& res) {
  const auto set = [&](const char* name, const std::string& value) {
    if (!res.has_header(name)) res.set_header(name, value);
  };
  set("X-Content-Type-Options", "nosniff");
  set("Cache-Control", "no-store");
  if (!c.options.origins.empty()) set("Vary", "Origin");
  if (!c.allowed_origin.empty()) {
    set("Access-Control-Allow-Origin", c.allowed_origin);
  } else {
    set("Cross-Origin-Resource-Policy", "same-origin");
  }
  if (res.status == 204 || res.status == 304) res.headers.erase("Content-Length");
  res.headers.erase("Accept-Ranges");  // the library's, for HEAD: ranges are not served
  res.headers.erase("Keep-Alive");     // the library's has other numbers
  res.headers.erase("Connection");
  if (c.ends) {
    res.set_header("Connection", "close");
  } else {
    res.set_header("Keep-Alive", concat("timeout=", int64_t(c.options.idle_seconds)));
  }
}

}  // namespace

bool client_left() { return this_connection && this_connection->left(); }

// ---------------------------------------------------------------------------------------------
// The server

struct HttpServer::State {
  struct Route {
    Route(const char* method, const std::string& path, Handler handler)
        : method(method), path(path), handler(std::move(handler)) {
      if ((is_prefix = path.ends_with("/*"))) this->path.pop_back();
    }
    bool matches(const std::string& other) const {
      return is_prefix ? other.starts_with(path) && other.size() > path.size() : other == path;
    }
    std::string method, path;
    bool is_prefix = false;
    Handler handler;
  };

  HttpOptions options;
  int limit = 0;  // of connections
  int listener = -1, port = 0;
  int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);  // ends run()'s poll
  std::vector<Route> routes;
  std::atomic<bool> stopping = false;

  mutable std::mutex mutex;
  std::condition_variable all_closed;
  std::list<Connection*> connections;  // that have a thread
  HttpCounts counts;

  ~State() {
    if (listener >= 0) ::close(listener);
    ::close(wake);
  }

  // The handler; ApiError 404 or 405.
  const Route& find_route(const RequestHead& head) const {
    bool known = false;
    for (const Route& route : routes) {
      if (!route.matches(head.path)) continue;
      known = true;
      if (route.method == (head.method == "HEAD" ? "GET" : head.method)) return route;
    }
    if (known) {
      refuse(405, concat(json_text(head.path), " does not answer to ", head.method),
             "method_not_allowed");
    }
    throw ApiError(404, "not_found_error", "", "",
                   concat("there is no ", json_text(head.path), " on this server"));
  }
  std::string allowed_methods(const std::string& path) const {
    std::string list;
    for (const Route& route : routes) {
      if (!route.matches(path)) continue;
      if (!list.empty()) list += ", ";
      list += route.method == "GET" ? "GET, HEAD" : route.method;
    }
    return list.empty() ? "OPTIONS" : list + ", OPTIONS";
  }

  // Called with the mutex held. The number of connections that were not told to close.
  int64_t open() const {
    return std::count_if(connections.begin(), connections.end(),
                         [](const Connection* c) { return !c->closed && !c->refused; });
  }
  // Called with the mutex held. Closes the connection that has been silent longest: of those that
  // were refused, or of the others. False: all are at work.
  bool close_silent(bool refused = false) {
    Connection* oldest = nullptr;
    for (Connection* c : connections) {
      if (c->closed || c->refused != refused || c->silent_since == kNever) continue;
      if (!oldest || c->silent_since < oldest->silent_since) oldest = c;
    }
    if (!oldest) return false;
    oldest->close();
    return true;
  }
  // Called with the mutex held. Makes room for a new connection, or decides that it is refused.
  void admit(Connection& c) {
    counts.accepted++;
    if (open() >= limit) {
      if (close_silent()) {
        counts.closed_idle++;
      } else {
        c.refused = true;
        counts.refused++;
        const auto refusing = std::count_if(connections.begin(), connections.end(),
                                            [](const Connection* o) { return o->refused; });
        if (refusing >= kRefusing) close_silent(true);
      }
    }
    connections.push_back(&c);
  }
};

HttpServer::HttpServer(HttpOptions options) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.options = std::move(options);
  require(s.wake >= 0, "cannot make an eventfd: ", errno_text());
  check_http_options(s.options);
  // As many descriptors as the system allows, then as many connections as they suffice for.
  rlimit files = {};
  getrlimit(RLIMIT_NOFILE, &files);
  const rlim_t wanted = rlim_t(s.options.connections + kOtherFiles);
  if (files.rlim_cur < wanted) {
    files.rlim_cur = std::min(wanted, files.rlim_max);
    setrlimit(RLIMIT_NOFILE, &files);
    getrlimit(RLIMIT_NOFILE, &files);
  }
  s.limit = int(std::min<rlim_t>(wanted, files.rlim_cur)) - kOtherFiles;
  require(s.limit > 0, "ulimit -n: found ", files.rlim_cur, ", expected more than ", kOtherFiles,
          " open files");

  set_pre_routing_handler([](const httplib::Request& req, httplib::Response& res) {
    Connection& c = *this_connection;
    const auto error = [&](const ApiError& e) {
      const httplib::Response dropped = std::exchange(res, httplib::Response());
      set_error(res, e);
    };
    const auto bug = [&](const char* what) {
      std::fprintf(stderr, "error: %s %s: %s\n", c.head.method.c_str(),
                   json_text(c.head.path).c_str(), what);
      error(ApiError(500, "server_error", "", "", "an error inside the server"));
    };
    try {
      c.handler(req, res);
    } catch (const ApiError& e) {
      error(e);
    } catch (const std::exception& e) {
      bug(e.what());
    } catch (...) {
      bug("an unknown exception");
    }
    if (res.status == -1) res.status = 200;
    if (c.head.minor == 0) res.is_chunked_content_provider_ = false;  // HTTP/1.0 has no chunks
    return HandlerResponse::Handled;
  });
  set_post_routing_handler([&s](const httplib::Request&, httplib::Response& res) {
    if (s.stopping) this_connection->ends = true;
    add_headers(*this_connection, res);
  });
}

HttpServer::~HttpServer() {
  stop();
  close_all();
  wait_until_closed(kNever);
}

void HttpServer::Get(const std::string& path, Handler handler) {
  state_->routes.emplace_back("GET", path, std::move(handler));
}
void HttpServer::Post(const std::string& path, Handler handler) {
  state_->routes.emplace_back("POST", path, std::move(handler));
}

// ---------------------------------------------------------------------------------------------
// Listening

namespace {

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

Addresses addresses_of(const std::string& host, int port) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const std::string name =
      host.starts_with("[") && host.ends_with("]") ? host.substr(1, host.size() - 2) : host;
  const int status = getaddrinfo(name.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (status != 0) fail("--host ", host, ": ", gai_strerror(status));
  return Addresses(list);
}

bool is_loopback_address(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr) >> 24) == 127;
  }
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

}  // namespace

bool is_loopback(const std::string& host) {
  const Addresses list = addresses_of(host, 0);
  for (const addrinfo* a = list.get(); a; a = a->ai_next)
    if (!is_loopback_address(a->ai_addr)) return false;
  return true;
}

int HttpServer::bind() {
  State& s = *state_;
  const std::string& host = s.options.host;
  if (!is_loopback(host) && s.options.keys.empty() && !s.options.no_key) {
    fail("--host ", host,
         ": other machines could use this server; expected a key, in "
         "--api-key-file FILE or CAKE_API_KEY (--no-key lets everyone in)");
  }
  const Addresses list = addresses_of(host, s.options.port);
  int error = 0;
  std::vector<const addrinfo*> order;  // 127.0.0.1 is what people try for localhost
  for (const addrinfo* a = list.get(); a; a = a->ai_next)
    order.insert(a->ai_family == AF_INET ? order.begin() : order.end(), a);
  for (const addrinfo* a : order) {
    if (s.listener >= 0) break;
    const int fd = ::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const int on = 1, off = 0;
    // A port can be used again while old connections time out, but never by two servers at once.
    if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (a->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (fd >= 0 && ::bind(fd, a->ai_addr, a->ai_addrlen) == 0 && ::listen(fd, kBacklog) == 0) {
      s.listener = fd;
    } else {
      error = errno;
      if (fd >= 0) ::close(fd);
    }
  }
  if (s.listener < 0) {
    fail("--port ", s.options.port, ": cannot listen on ", host, ": ", std::strerror(error),
         "; --port N chooses another port, --port 0 any that is free");
  }
  sockaddr_storage local = {};
  socklen_t size = sizeof local;
  getsockname(s.listener, reinterpret_cast<sockaddr*>(&local), &size);
  s.port = ntohs(local.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(local).sin6_port
                                             : reinterpret_cast<sockaddr_in&>(local).sin_port);
  svr_sock_ = s.listener;  // the library's streams end when it has no socket
  return s.port;
}

void HttpServer::run() {
  State& s = *state_;
  require(s.listener >= 0, "run() without bind()");
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStackBytes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);

  struct Start {
    HttpServer* server;
    std::unique_ptr<Connection> connection;
  };
  const auto thread = [](void* argument) -> void* {
    const std::unique_ptr<Start> start(static_cast<Start*>(argument));
    start->server->serve(*start->connection);
    return nullptr;
  };

  double pause = 0;  // after accept() failed for want of something
  while (!s.stopping) {
    pollfd wanted[] = {{s.wake, POLLIN, 0}, {s.listener, POLLIN, 0}};
    poll(wanted, pause > 0 ? 1 : 2, pause > 0 ? int(pause * 1000) : -1);
    pause = 0;
    if (s.stopping) break;
    const int fd = accept4(s.listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        pause = .02;
        const std::lock_guard lock(s.mutex);
        if (s.close_silent()) s.counts.closed_idle++;
      }
      continue;  // the others are of one connection, which is gone
    }
    // The kernel's own patience is for clients that vanished, behind answers that were sent.
    const int on = 1, patience_ms = int(s.options.write_seconds * 2000);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof patience_ms);
    auto start = std::make_unique<Start>(Start{this, std::make_unique<Connection>(fd, s.options)});
    Connection* c = start->connection.get();
    {
      const std::lock_guard lock(s.mutex);
      s.admit(*c);
    }
    // Where there are no more threads to have, others end.
    pthread_t id;
    int error = 0;
    for (int tries = 0; tries < 10; tries++) {
      if ((error = pthread_create(&id, &attributes, thread, start.get())) == 0) break;
      {
        const std::lock_guard lock(s.mutex);
        if (s.close_silent()) s.counts.closed_idle++;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    if (error == 0) {
      start.release();
    } else {
      const std::lock_guard lock(s.mutex);
      s.connections.remove(c);
    }
  }
  pthread_attr_destroy(&attributes);
  const std::lock_guard lock(s.mutex);
  ::close(std::exchange(s.listener, -1));
}

void HttpServer::stop() {
  State& s = *state_;
  s.stopping = true;
  const uint64_t one = 1;
  if (::write(s.wake, &one, sizeof one) < 0) {  // it is full: run() wakes anyway
  }
  const std::lock_guard lock(s.mutex);
  for (Connection* c : s.connections)
    if (c->waits) c->close();
}

bool HttpServer::stopping() const { return state_->stopping; }

bool HttpServer::wait_until_closed(double seconds) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  const auto none = [&] { return s.connections.empty(); };
  if (seconds > 1e6) {
    s.all_closed.wait(lock, none);
    return true;
  }
  return s.all_closed.wait_for(lock, std::chrono::duration<double>(seconds), none);
}

void HttpServer::close_all() {
  const std::lock_guard lock(state_->mutex);
  for (Connection* c : state_->connections) c->close();
}

HttpCounts HttpServer::counts() const {
  const std::lock_guard lock(state_->mutex);
  HttpCounts counts = state_->counts;
  counts.open = state_->open();
  counts.limit = state_->limit;
  return counts;
}

// ---------------------------------------------------------------------------------------------
// A connection's thread

void HttpServer::serve(Connection& c) {
  State& s = *state_;
  this_connection = &c;
  try {
    while (serve_request(c)) {
    }
  } catch (const std::exception& e) {  // from a handler's stream: the answer had begun
    std::fprintf(stderr, "error: %s\n", e.what());
  }
  this_connection = nullptr;
  const std::lock_guard lock(s.mutex);
  if (c.write_timed_out) s.counts.timed_out++;
  s.connections.remove(&c);
  if (s.connections.empty()) s.all_closed.notify_all();
}

// False: the connection is to be closed.
bool HttpServer::serve_request(Connection& c) {
  State& s = *state_;
  c.head = {};
  c.allowed_origin.clear();
  c.body.clear();
  c.deadline = kNever;
  int64_t unread = -1;  // bytes of the body that were not read; -1: nobody knows
  try {
    if (c.refused) {
      refuse(503, concat("all ", s.limit, " connections are in use"), "too_many_connections");
    }
    if (c.unused() == 0) {
      // A new connection is silent since it was accepted, however late its thread begins.
      if (c.silent_since == kNever) c.silent_since = now();
      c.waits = true;
      const bool came = !s.stopping && wait_for(c.fd, POLLIN, c.options.idle_seconds);
      c.waits = false;
      if (!came || c.closed) {
        const std::lock_guard lock(s.mutex);
        if (!came && !s.stopping) s.counts.closed_idle++;
        return false;
      }
    }
    c.silent_since = now();
    c.deadline = now() + c.options.request_seconds;
    if (!read_head(c)) return false;
    unread = c.head.length;
    check_host(c.head, s.options, address_text(c.local), s.port);
    c.allowed_origin = check_origin(c.head, s.options);
    if (c.head.method == "OPTIONS") {
      c.handler = [&](const httplib::Request&, httplib::Response& res) {
        answer_preflight(c, res);
        res.set_header("Allow", s.allowed_methods(c.head.path));
      };
    } else {
      check_key(c.head, s.options);
      c.handler = s.find_route(c.head).handler;
    }
    check_body(c.head, s.options);
    c.body = read_body(c, c.head);
    unread = 0;
  } catch (const ApiError& e) {
    if (e.status == 408) {
      const std::lock_guard lock(s.mutex);
      s.counts.timed_out++;
    }
    c.handler = [&s, &c, e](const httplib::Request&, httplib::Response& res) {
      if (e.status == 405) res.set_header("Allow", s.allowed_methods(c.head.path));
      set_error(res, e);
    };
  }
  const bool framed = unread >= 0 && size_t(unread) <= c.unused();
  if (framed) c.used += size_t(unread);
  c.ends = !framed || !c.head.keep_alive();

  c.silent_since = kNever;
  bool library_closes = false, sent = false;
  {
    GuardedStream stream(c, request_for_library(c.head));
    sent = process_request(stream, c.ends, library_closes, [&](httplib::Request& req) {
      req.method = c.head.method;
      req.target = c.head.target;
      req.path = c.head.path;
      req.body = std::move(c.body);
    });
  }
  c.handler = nullptr;
  if (sent && (!framed || c.unused() > 0) && c.ends) c.linger();
  return sent && !c.ends;
}

}  // namespace cake
