// HTTP for a program that strangers can reach: cpp-httplib, with guards.
//
//     connection -> a thread of its own: head -> checks -> body -> handler -> answer
//
// Handlers are cpp-httplib's: they read a Request and fill a Response, on the connection's thread.
// The library writes the answers. What comes in is read here, because the library takes what a
// server in reach of strangers must not (lines and bodies without end, two lengths, a client that
// sends one byte a second), and because the checks come before the body:
//
// - One request has a deadline, its head and its body each have a byte budget.
// - Up to `connections` are open. For one more, the connection that has been silent longest is
//   closed; when none is silent, the new one is answered 503 with Retry-After, at once.
// - The order of the checks is: Host, Origin, key, path and method, length and encoding. Web pages
//   of other origins and names that were rebound to this machine reach no handler.
#pragma once

#include <httplib.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// What went wrong, as a client of OpenAI's API reads it:
// {"error": {"message", "type", "param", "code"}}. `param` is the path of a key, as in
// "messages[2].content"; "" for none.
struct ApiError : Error {
  ApiError(int status, std::string type, std::string code, std::string param,
           const std::string& what)
      : Error(what),
        status(status),
        type(std::move(type)),
        code(std::move(code)),
        param(std::move(param)) {}
  int status;
  std::string type, code, param;
  OrderedJson more;  // further keys of the error object, such as n_ctx; null: none
};
// 400: invalid_request_error.
[[noreturn]] inline void bad_request(const std::string& param, const std::string& what) {
  throw ApiError(400, "invalid_request_error", "", param, what);
}
std::string error_body(const ApiError&);  // valid UTF-8, whatever the message holds
// Sets status, body and headers: Retry-After for 503, WWW-Authenticate for 401, and for 500
// x-should-retry: false, because a bug would only happen again.
void set_error(httplib::Response&, const ApiError&);
// The answer is server-sent events, which `write` writes to the sink, on the connection's thread.
// It returns false when the client has left. No proxy on the way shall keep or collect them.
void set_event_stream(httplib::Response&, std::function<bool(httplib::DataSink&)> write);

// This machine alone can reach a server on `host`, which is a name or an address.
bool is_loopback(const std::string& host);

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;  // 0: any that is free
  int connections = 1024;
  int64_t head_bytes = 16 << 10, body_bytes = 1 << 20;
  double request_seconds = 10;  // from a request's first byte to its last
  double idle_seconds = 60;     // between requests
  // A client that takes nothing for so long is closed; so is one that takes less than 4 KB/s for
  // about as long while more waits for it.
  double write_seconds = 30;
  // Names that Host may have, as in "chat.example" (on any port) or "chat.example:8443". The
  // loopback's names and `host` are known, on our port or none.
  std::vector<std::string> hosts;
  std::vector<std::string> origins;  // of web pages that may call: "https://chat.example"
  std::vector<std::string> keys;  // one of them must be in Authorization; empty: none is asked for
  std::vector<std::string> public_paths;  // that need no key
  bool no_key = false;  // a `host` that other machines reach may be served without a key
};

struct HttpCounts {  // since the start, but for `open` and `limit`
  int64_t open = 0;
  int64_t limit = 0;  // `connections`, or what the limit on descriptors allows
  int64_t accepted = 0;
  int64_t refused = 0;      // with 503, because all others were at work
  int64_t closed_idle = 0;  // silent for idle_seconds, or the longest when another one came
  int64_t timed_out = 0;    // requests that came too slowly, answers that were taken too slowly
};

class HttpServer : private httplib::Server {
 public:
  using Handler = std::function<void(const httplib::Request&, httplib::Response&)>;

  explicit HttpServer(HttpOptions);
  // After run() has returned. Closes every connection and waits for the handlers.
  ~HttpServer() override;
  // Before run(). `path` is exact, as in "/health", or a prefix that ends in "/*". A handler of Get
  // answers HEAD too. Request::path is percent-decoded, Request::body complete; Request::params
  // is empty, so that no link can start anything. An ApiError that a handler throws becomes its
  // JSON; any other exception becomes status 500 without its text.
  void Get(const std::string& path, Handler);
  void Post(const std::string& path, Handler);
  // Listens. Returns the port. Error when it is taken: says how to choose another one; and when
  // other machines reach `host` and there is no key.
  int bind();
  // Accepts connections until stop(). Connections that are answering then go on.
  void run();
  // Accepts no more, and closes the connections that wait for a request. From any thread.
  void stop();
  bool stopping() const;
  // Waits until no connection is open, for `seconds` at most. True when none is.
  bool wait_until_closed(double seconds);
  // Closes every connection now.
  void close_all();
  HttpCounts counts() const;

  struct Connection;  // in serve_http.cpp

 private:
  struct State;
  void serve(Connection&);
  bool serve_request(Connection&);
  std::unique_ptr<State> state_;
};

// On a connection's thread: the client has closed the connection, or said that it sends no more,
// or the connection was closed here.
bool client_left();

}  // namespace cake
