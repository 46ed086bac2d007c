// The guards of the HTTP server, over real sockets and without a model: what it refuses, and that
// it goes on whatever a client does.
#include <sys/resource.h>
#include <zlib.h>

#include <filesystem>
#include <set>
#include <thread>

#include "cake/http.h"
#include "test/http_client.h"

namespace {
using namespace cake;

// A server in a thread of its own, with a few routes.
struct GuardedServer {
  explicit GuardedServer(HttpOptions options = {}) : GuardedServer(std::move(options), 0) {}
  GuardedServer(HttpOptions options, int wanted_port)
      : http([&] {
          options.port = wanted_port;
          return options;
        }()) {
    http.Get("/health", [](const auto&, auto& res) { res.set_content("ok", "text/plain"); });
    http.Get("/models/*",
             [](const auto& req, auto& res) { res.set_content(req.path, "text/plain"); });
    http.Post("/echo", [](const auto& req, auto& res) {
      res.set_content(req.body + req.get_header_value("Authorization"), "text/plain");
    });
    http.Post("/throw", [](const auto& req, auto& res) {
      res.set_header("Secret", "in a header");
      if (req.body == "bug") throw std::runtime_error("a secret path");
      if (req.body == "int") throw 7;
      ApiError error(422, "some_type", "some_code", "messages[0]", "bad bytes: \xff\n");
      error.more = {{"n_ctx", 5}};
      throw error;
    });
    http.Get("/work", [this](const auto&, auto& res) {  // until it is released
      working++;
      while (!released && !client_left()) usleep(1000);
      if (client_left()) noticed++;
      working--;
      res.set_content("done", "text/plain");
    });
    http.Get("/stream", [this](const auto&, auto& res) {
      const auto count = std::make_shared<int>(0);
      res.set_chunked_content_provider(
          "text/event-stream",
          [count](size_t, httplib::DataSink& sink) {
            const std::string event = concat("data: ", (*count)++, "\n\n");
            sink.write(event.data(), event.size());
            if (*count == 3) sink.done();
            return true;
          },
          [this](bool complete) { complete ? finished++ : broken++; });
    });
    http.Get("/large", [this](const auto&, auto& res) {  // more than the kernel's buffers hold
      res.set_chunked_content_provider(
          "text/event-stream",
          [](size_t, httplib::DataSink& sink) {
            const std::string event = "data: " + std::string(1 << 20, 'x') + "\n\n";
            return sink.write(event.data(), event.size());
          },
          [this](bool complete) { complete ? finished++ : broken++; });
    });
    port = http.bind();
    thread = std::thread([this] { http.run(); });
  }
  ~GuardedServer() {
    released = true;
    http.stop();
    thread.join();
  }

  HttpServer http;
  int port = 0;
  std::atomic<bool> released = false;
  std::atomic<int> working = 0, noticed = 0, finished = 0, broken = 0;
  std::thread thread;
};

// Several seconds: a wait that a slow machine ends in time too.
template <class Condition>
bool soon(Condition&& condition) {
  for (const double end = now() + 20; now() < end; usleep(1000))
    if (condition()) return true;
  return condition();
}

int threads_now() {
  return int(std::distance(std::filesystem::directory_iterator("/proc/self/task"), {}));
}
int files_now() {
  return int(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}));
}

// The code of an error, which must be one of the API's form.
std::string error_code(const Reply& reply) {
  CAPTURE(reply.head);
  CAPTURE(reply.body);
  CHECK(reply.header("Content-Type") == "application/json");
  const OrderedJson error = reply.json().at("error");
  CHECK((error.at("message").is_string() && error.at("type").is_string()));
  CHECK((error.contains("param") && error.contains("code")));
  CHECK_FALSE(error.at("message").get<std::string>().empty());
  return error.at("code").is_null() ? "" : error.at("code").get<std::string>();
}
std::string message_of(const Reply& reply) { return reply.json().at("error").at("message"); }

// More descriptors for the clients of a test.
struct ManyFiles {
  ManyFiles() {
    getrlimit(RLIMIT_NOFILE, &before);
    rlimit more = before;
    more.rlim_cur = std::min<rlim_t>(more.rlim_max, 8192);
    setrlimit(RLIMIT_NOFILE, &more);
  }
  ~ManyFiles() { setrlimit(RLIMIT_NOFILE, &before); }
  rlimit before = {};
};
}  // namespace

TEST_CASE("http: a connection takes one request after another") {
  GuardedServer server;
  Connection c(server.port);
  for (int i = 0; i < 3; i++) {
    const Reply reply = c.ask(http_get("/health"));
    CHECK(reply.status == 200);
    CHECK(reply.body == "ok");
    CHECK(reply.header("X-Content-Type-Options") == "nosniff");
    CHECK(reply.header("Cache-Control") == "no-store");
  }
  CHECK(c.ask(http_post("/echo", "{}")).body == "{}");
  CHECK(c.ask(http_get("/models/a/b%20c%c3%a9?x=1#y")).body == "/models/a/b c\xc3\xa9");
  CHECK(c.ask(http_get("/models/" + std::string(7800, 'a'))).status == 200);
  CHECK(c.ask(http_get("/health", {{"Range", "bytes=0-" + std::string(7000, '1')}})).body == "ok");
  CHECK(c.ask(http_get("/health", {{"Accept-Encoding", "br, gzip"}})).body == "ok");

  c.write(http_request("HEAD", "/health"));
  const Reply head = c.read_reply(true);
  CHECK(head.status == 200);
  CHECK(head.header("Content-Length") == "2");

  const Reply unknown = c.ask(http_get("/models/"));
  CHECK(unknown.status == 404);
  error_code(unknown);
  for (const char* path : {"/nothing", "//health", "/../health", "/health/", "/%2e%2e/health"})
    CHECK(c.ask(http_get(path)).status == 404);
  const Reply other = c.ask(http_request("DELETE", "/health"));
  CHECK(other.status == 405);
  CHECK(other.header("Allow") == "GET, HEAD, OPTIONS");
  CHECK(error_code(other) == "method_not_allowed");
  CHECK(c.ask(http_request("BREW", "/echo")).header("Allow") == "POST, OPTIONS");

  const StreamedReply stream = ask_stream(server.port, http_get("/stream"));
  CHECK(stream.events.size() == 3);
  CHECK(stream.reply.complete);
  CHECK(server.http.counts().accepted == 2);
}

TEST_CASE("http: HTTP/1.0 gets no chunks, and its connection is closed unless it asks") {
  GuardedServer server;
  const std::string head = " HTTP/1.0\r\nHost: localhost\r\n";
  Connection c(server.port);
  Reply reply = c.ask("GET /health" + head + "Connection: Keep-Alive\r\n\r\n");
  CHECK(reply.body == "ok");
  reply = c.ask("GET /stream" + head + "\r\n");
  CHECK_FALSE(reply.has("Transfer-Encoding"));
  CHECK(reply.body == "data: 0\n\ndata: 1\n\ndata: 2\n\n");
  CHECK(c.ended());
}

TEST_CASE("http: Host is a name of this server") {
  GuardedServer server({.hosts = {"Chat.Example", "proxy.example:9000"}});
  const std::string port = concat(":", server.port), other = concat(":", server.port ^ 1);
  const auto ask_host = [&](const std::string& host) {
    return ask(server.port, "GET /health HTTP/1.1\r\nHost: " + host + "\r\n\r\n");
  };
  for (const char* host :
       {"localhost", "LOCALHOST", "127.0.0.1", "[::1]", "chat.example", "chat.example:1",
        "CHAT.example", "proxy.example:9000", "localhost", "127.0.0.1"}) {
    CAPTURE(host);
    CHECK(ask_host(host).status == 200);
  }
  for (const char* host : {"localhost", "127.0.0.1", "[::1]"}) {
    CHECK(ask_host(concat(host, port)).status == 200);
    CHECK(ask_host(concat(host, other)).status == 403);
  }
  for (const char* host :
       {"evil.example", "localhost.evil", "evil.localhost", "localhost.", "0.0.0.0", "127.0.0.2",
        "proxy.example", "proxy.example:9001", "localhost:", "localhost:x", "localhost:80:80",
        "::1", "[::1", "user@localhost", "127.1", "2130706433", "", "localhost,evil.example"}) {
    CAPTURE(host);
    const Reply reply = ask_host(host);
    CHECK(reply.status == 403);
    CHECK(error_code(reply) == "forbidden_host");
    CHECK(message_of(reply).find("--allow-host") != std::string::npos);
  }
  const auto raw = [&](const std::string& text) { return ask(server.port, text).status; };
  CHECK(raw("GET /health HTTP/1.1\r\n\r\n") == 400);
  CHECK(raw("GET /health HTTP/1.0\r\n\r\n") == 400);
  CHECK(raw("GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n") == 400);
  // What a client sends to a proxy: both names count.
  CHECK(raw("GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n") == 200);
  CHECK(raw("GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n") == 404);
  CHECK(raw("GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n") == 403);
  CHECK(raw("GET http://localhost/health HTTP/1.1\r\nHost: evil.example\r\n\r\n") == 403);
  // Host comes before everything else: the path, the key, the length.
  CHECK(raw("POST /nothing HTTP/1.1\r\nHost: evil.example\r\n\r\n") == 403);
  for (const char* bad : {"http://a", "a b:x", "", "a:"})
    CHECK_THROWS_AS(HttpServer({.hosts = {bad}}), Error);
}

TEST_CASE("http: web pages of other origins reach no handler") {
  GuardedServer server({.origins = {"https://chat.example"}, .keys = {"k"}});
  const std::string own = concat("http://127.0.0.1:", server.port);
  const std::string host = own.substr(7), key = "Bearer k";
  const auto ask_with = [&](Headers headers, const char* path = "/health") {
    headers.insert(headers.begin(), {{"Host", host}, {"Authorization", key}});
    return ask(server.port, http_get(path, headers));
  };
  CHECK(ask_with({{"Origin", own}}).status == 200);
  CHECK_FALSE(ask_with({{"Origin", own}}).has("Access-Control-Allow-Origin"));
  CHECK(ask_with({{"Origin", own}, {"Sec-Fetch-Site", "same-origin"}}).status == 200);
  CHECK(ask_with({{"Sec-Fetch-Site", "none"}}).status == 200);
  for (const char* origin :
       {"https://evil.example", "null", "http://127.0.0.1", "http://localhost:1",
        "https://chat.example.evil", "http://chat.example", "https://chat.example:8443", "x"}) {
    CAPTURE(origin);
    const Reply reply = ask_with({{"Origin", origin}});
    CHECK(reply.status == 403);
    CHECK(error_code(reply) == "forbidden_origin");
    CHECK(message_of(reply).find("--allow-origin") != std::string::npos);
    CHECK_FALSE(reply.has("Access-Control-Allow-Origin"));
    CHECK(reply.header("Cross-Origin-Resource-Policy") == "same-origin");
  }
  for (const char* site : {"cross-site", "same-site", "anything"}) {
    CHECK(ask_with({{"Sec-Fetch-Site", site}}).status == 403);
    CHECK(ask_with({{"Sec-Fetch-Site", site}, {"Origin", own}}).status == 403);
  }
  // A form of another page that posts text/plain, which needs no preflight.
  CHECK(ask(server.port,
            http_post("/echo", "{}",
                      {{"Host", host}, {"Authorization", key}, {"Origin", "https://evil.example"}}))
            .status == 403);
  // A link on another page opens the page here; an image or a frame does not.
  const auto navigate = [&](const char* destination) {
    return ask_with({{"Sec-Fetch-Site", "cross-site"},
                     {"Sec-Fetch-Mode", "navigate"},
                     {"Sec-Fetch-Dest", destination}})
        .status;
  };
  CHECK(navigate("document") == 200);
  CHECK(navigate("iframe") == 403);

  const Reply allowed =
      ask_with({{"Origin", "https://chat.example"}, {"Sec-Fetch-Site", "cross-site"}});
  CHECK(allowed.status == 200);
  CHECK(allowed.header("Access-Control-Allow-Origin") == "https://chat.example");
  CHECK(allowed.header("Vary") == "Origin");
  CHECK_FALSE(allowed.has("Access-Control-Allow-Credentials"));
  // The page can read why it was refused.
  const Reply no_key = ask(server.port, http_get("/nothing", {{"Origin", "https://chat.example"}}));
  CHECK(no_key.status == 401);
  CHECK(no_key.header("Access-Control-Allow-Origin") == "https://chat.example");

  Connection c(server.port);
  const Reply preflight =
      c.ask(http_request("OPTIONS", "/echo",
                         {{"Origin", "https://chat.example"},
                          {"Access-Control-Request-Method", "POST"},
                          {"Access-Control-Request-Headers", "authorization,x-stainless-os"},
                          {"Access-Control-Request-Private-Network", "true"}}));
  CHECK(preflight.status == 204);
  CHECK(preflight.body.empty());
  CHECK_FALSE(preflight.has("Content-Length"));
  CHECK(preflight.header("Access-Control-Allow-Origin") == "https://chat.example");
  CHECK(preflight.header("Access-Control-Allow-Headers") ==
        "authorization, content-type, authorization,x-stainless-os");
  CHECK(preflight.header("Access-Control-Allow-Private-Network") == "true");
  CHECK(preflight.has("Access-Control-Max-Age"));
  CHECK(preflight.header("Vary") == "Origin");
  CHECK(c.ask(http_request("OPTIONS", "/echo", {{"Origin", "https://evil.example"}})).status ==
        403);
  const Reply plain = c.ask(http_request("OPTIONS", "*"));
  CHECK(plain.status == 204);
  CHECK_FALSE(plain.has("Access-Control-Allow-Origin"));
  for (const char* bad : {"*", "chat.example", "https://chat.example/", "https://", "null"})
    CHECK_THROWS_AS(HttpServer({.origins = {bad}}), Error);
}

TEST_CASE("http: a key is asked for on every path but the public ones") {
  GuardedServer server({.keys = {"first-key", "second"}, .public_paths = {"/health"}});
  const auto ask_as = [&](const std::string& authorization, const std::string& method,
                          const std::string& path) {
    Headers headers;
    if (!authorization.empty()) headers.push_back({"Authorization", authorization});
    const bool post = method == "POST";
    return ask(server.port, http_request(method, path, headers,
                                         post ? std::optional<std::string>("{}") : std::nullopt));
  };
  for (const char* path : {"/models/a", "/echo", "/work", "/nothing", "/", "/health/", "//health",
                           "/models/../health", "/Health"}) {
    for (const char* method : {"GET", "POST", "DELETE"}) {
      CAPTURE(path);
      const Reply reply = ask_as("", method, path);
      CHECK(reply.status == 401);
      CHECK(error_code(reply) == "invalid_api_key");
      CHECK(reply.header("WWW-Authenticate") == "Bearer");
    }
  }
  CHECK(ask_as("", "GET", "/health").status == 200);
  CHECK(ask_as("Bearer anything", "GET", "/health").status == 200);
  for (const char* key : {"first-key", "second"})
    CHECK(ask_as(concat("Bearer ", key), "POST", "/echo").body == "{}");  // handlers do not see it
  CHECK(ask_as("bearer  second", "GET", "/models/a").status == 200);
  for (const char* wrong : {"Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2",
                            "Bearer Second", "Basic second", "second", "Bearer secondsecond"}) {
    CAPTURE(wrong);
    const Reply reply = ask_as(wrong, "GET", "/models/a");
    CHECK(reply.status == 401);
    CHECK(reply.body.find("first") == std::string::npos);
  }
  const std::string two =
      "GET /models/a HTTP/1.1\r\nHost: localhost\r\n"
      "Authorization: Bearer second\r\nAuthorization: Bearer x\r\n\r\n";
  CHECK(ask(server.port, two).status == 400);
  for (const char* bad : {"", "a b", "a\n", "\xc3\xa9"})
    CHECK_THROWS_AS(HttpServer({.keys = {bad}}), Error);
}

TEST_CASE("http: a server that other machines reach needs a key") {
  CHECK(is_loopback("127.0.0.1"));
  CHECK(is_loopback("127.1.2.3"));
  CHECK(is_loopback("::1"));
  CHECK_FALSE(is_loopback("0.0.0.0"));
  CHECK_FALSE(is_loopback("::"));
  CHECK_FALSE(is_loopback("192.0.2.1"));
  const auto complaint = [](HttpOptions options) -> std::string {
    options.port = 0;
    try {
      HttpServer(options).bind();
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  };
  CHECK(complaint({.host = "0.0.0.0"}).find("--api-key-file") != std::string::npos);
  CHECK(complaint({.host = "::"}).find("--no-key") != std::string::npos);
  CHECK(complaint({.host = "0.0.0.0", .keys = {"k"}}) == "");
  CHECK(complaint({.host = "0.0.0.0", .no_key = true}) == "");
  CHECK(complaint({.host = "not a host"}).find("--host not a host") != std::string::npos);
  // There the name in Host may be the address that the client connected to.
  GuardedServer server({.host = "0.0.0.0", .no_key = true});
  CHECK(ask(server.port, http_get("/health")).status == 200);
  CHECK(ask(server.port, http_get("/health", {{"Host", "0.0.0.0"}})).status == 403);
  CHECK(ask(server.port, http_get("/health", {{"Host", "192.0.2.1"}})).status == 403);
}

TEST_CASE("http: a body has one length, which is known and allowed") {
  GuardedServer server({.body_bytes = 1000});
  const auto status = [&](const std::string& headers, const std::string& body = "") {
    const Reply reply =
        ask(server.port, "POST /echo HTTP/1.1\r\nHost: localhost\r\n" + headers + "\r\n" + body);
    if (reply.status >= 400) error_code(reply);
    return reply.status;
  };
  CHECK(status("Content-Length: 2\r\n", "{}") == 200);
  CHECK(status("Content-Length: 1000\r\n", std::string(1000, 'x')) == 200);
  CHECK(status("Content-Length: 1001\r\n", std::string(1001, 'x')) == 413);
  CHECK(status("Content-Length: 99999999999999999999999\r\n") == 413);
  CHECK(status("") == 411);
  for (const char* length : {"-1", "+2", "2, 2", "0x2", "2.0", "", "two"})
    CHECK(status(concat("Content-Length: ", length, "\r\n"), "{}") == 400);
  CHECK(status("Content-Length: 2\r\nContent-Length: 2\r\n", "{}") == 400);
  CHECK(status("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n") == 400);
  CHECK(status("Content-Length : 2\r\n", "{}") == 400);
  for (const char* coding : {"gzip", "gzip, chunked", "chunked, chunked", "identity", ""})
    CHECK(status(concat("Transfer-Encoding: ", coding, "\r\n"), "0\r\n\r\n") == 400);
  CHECK(ask(server.port,
            "POST /echo HTTP/1.0\r\nHost: localhost\r\n"
            "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
            .status == 400);
  CHECK(status("Content-Length: 2\r\nExpect: miracle\r\n", "{}") == 417);
  // A form is a body like any other: curl -d says so of JSON.
  GuardedServer large;
  const std::string form(100000, 'a');
  CHECK(ask(large.port, http_request("POST", "/echo",
                                     {{"Content-Type", "application/x-www-form-urlencoded"}}, form))
            .body == form);
  CHECK(ask(large.port, http_request("POST", "/echo",
                                     {{"Content-Type", "multipart/form-data; boundary=x"}}, form))
            .body == form);
}

TEST_CASE("http: a compressed body is refused before it is read") {
  GuardedServer server;
  uLongf size = compressBound(64 << 20);
  std::string bomb(size, '\0');
  const std::string zeros(64 << 20, '\0');
  REQUIRE(compress(reinterpret_cast<Bytef*>(bomb.data()), &size,
                   reinterpret_cast<const Bytef*>(zeros.data()), zeros.size()) == Z_OK);
  bomb.resize(size);
  for (const char* encoding : {"gzip", "deflate", "br", "x"}) {
    const Reply reply =
        ask(server.port, http_post("/echo", bomb, {{"Content-Encoding", encoding}}));
    CHECK(reply.status == 415);
    error_code(reply);
  }
  CHECK(ask(server.port, http_post("/echo", "{}", {{"Content-Encoding", "identity"}})).status ==
        200);
}

TEST_CASE("http: the client of a body that is too large reads why") {
  GuardedServer server;
  for (const size_t size : {size_t(1 << 20) + 1, size_t(8) << 20}) {
    Connection c(server.port);
    const std::string request = http_post("/echo", std::string(size, 'x'));
    CHECK(c.write(request));  // all of it, before it reads
    const Reply reply = c.read_reply();
    CHECK(reply.status == 413);
    CHECK(message_of(reply).find("1048576") != std::string::npos);
    char byte;
    CHECK(recv(c.fd(), &byte, 1, 0) == 0);  // the connection ends, and is not reset
  }
}

TEST_CASE("http: chunked bodies are read within the limit") {
  GuardedServer server({.body_bytes = 1000, .request_seconds = 20});
  const auto send = [&](const std::string& body) {
    return ask(
        server.port,
        "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n\r\n" + body);
  };
  CHECK(send("2\r\n{}\r\n0\r\n\r\n").body == "{}");
  CHECK(send("1;name=value\r\n{\r\n00001 \r\n}\r\n000\r\nTrailer: x\r\n\r\n").body == "{}");
  CHECK(send("3e8\r\n" + std::string(1000, 'x') + "\r\n0\r\n\r\n").status == 200);
  CHECK(send("3e9\r\n").status == 413);
  CHECK(send("fffffffffffffff\r\n").status == 413);
  std::string endless;
  for (int i = 0; i < 5000; i++) endless += "1\r\nx\r\n";
  CHECK(send(endless).status == 413);
  std::string extensions;  // framing has a budget too
  for (int i = 0; i < 10; i++) extensions += "1;" + std::string(240, 'e') + "\r\nx\r\n";
  CHECK(send(extensions + "0\r\n\r\n").status == 413);
  CHECK(send("0\r\n" + std::string(2000, 'x') + "\r\n\r\n").status == 400);
  std::string trailers = "0\r\n";
  for (int i = 0; i < 500; i++) trailers += "a: b\r\n";
  CHECK(send(trailers).status == 413);
  for (const char* bad : {"-2\r\n", "-1\r\n", "0x2\r\n{}", "ffffffffffffffff\r\n", "\r\n", "g\r\n",
                          "2\n{}\r\n", "2\r\n{}}\r\n", "2\r\n{}0\r\n\r\n", "2 2\r\n", " 2\r\n"}) {
    CAPTURE(bad);
    CHECK(send(bad).status == 400);
  }
}

TEST_CASE("http: a head has lines of bounded number and length, and no strange bytes") {
  GuardedServer server;
  const auto status = [&](const std::string& text) {
    const Reply reply = ask(server.port, text);
    if (reply.status >= 400) error_code(reply);
    return reply.status;
  };
  const std::string line = "GET /health HTTP/1.1\r\nHost: localhost\r\n";
  std::string many;
  for (int i = 0; i < 1000; i++) many += concat("A", i, ": b\r\n");
  CHECK(status(line + many + "\r\n") == 431);
  CHECK(status(line + "A: " + std::string(8 << 20, 'x')) == 431);
  CHECK(status("GET /" + std::string(8 << 20, 'x')) == 414);
  CHECK(status(line + "A: " + std::string(7900, 'x') + "\r\nB: " + std::string(7900, 'x') +
               "\r\nC: " + std::string(7900, 'x') + "\r\n\r\n") == 431);
  CHECK(status(line + "A: " + std::string(7900, 'x') + "\r\n\r\n") == 200);
  CHECK(status(line + "A: \xc3\xa9\t\xff\r\n\r\n") == 200);
  CHECK(status("\r\n\r\n" + line + "\r\n") == 200);
  for (const std::string& bad :
       {std::string("GET /health HTTP/1.1\nHost: localhost\n\n"),
        std::string("GET /health HTTP/1.1\r\nHost: localhost\n\r\n"),
        std::string("GET /health HTTP/1.1\rHost: localhost\r\r"),
        line + "A: x\rB: y\r\n\r\n",
        line + std::string("A: \0x\r\n\r\n", 9),
        line + "A: \x7f\r\n\r\n",
        line + " folded\r\n\r\n",
        line + "A\r\n\r\n",
        line + "A : b\r\n\r\n",
        line + ": b\r\n\r\n",
        line + "\xc3\xa9: b\r\n\r\n",
        std::string("\x16\x03\x01\x02", 4),
        std::string("\0", 1),
        std::string("GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n"),
        std::string("GET /health http/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET /health\r\nHost: localhost\r\n\r\n"),
        std::string("GET health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET * HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET http:///health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET /a%00 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET /a%2 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET /a%u0041 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET /a%zz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        std::string("G@T /health HTTP/1.1\r\nHost: localhost\r\n\r\n")}) {
    CAPTURE(bad);
    CHECK(status(bad) == 400);
  }
}

TEST_CASE("http: every beginning of a request is an error once the client stops, nothing hangs") {
  GuardedServer server;
  const std::string request = http_post("/echo", "{\"a\": 1}");
  for (size_t size = 0; size <= request.size(); size++) {
    Connection c(server.port);
    c.write(request.substr(0, size));
    c.half_close();
    const Reply reply = c.read_reply();
    CHECK(reply.status == (size == 0 ? 0 : size < request.size() ? 400 : 200));
    CHECK(c.read_all() == "");  // and the connection ends
  }
}

TEST_CASE("http: a request may come in any pieces") {
  GuardedServer server;
  const std::string request = http_post("/echo", "{\"a\": 1}");
  Connection c(server.port);
  for (size_t size = 1; size < request.size(); size++) {
    c.write(request.substr(0, size));
    if (size % 8 == 0) usleep(1000);  // the pieces are seen one by one
    CHECK(c.ask(request.substr(size)).body == "{\"a\": 1}");
  }
  CHECK(c.write_slowly(request));
  CHECK(c.read_reply().body == "{\"a\": 1}");
  std::string chunked =
      "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
      "5\r\nhello\r\n0\r\nA: b\r\n\r\n";
  for (size_t size = 60; size < chunked.size(); size++) {
    c.write(chunked.substr(0, size));
    usleep(500);
    CHECK(c.ask(chunked.substr(size)).body == "hello");
  }
}

TEST_CASE("http: requests that follow each other without waiting are answered in their order") {
  GuardedServer server;
  Connection c(server.port);
  std::string all;
  for (int i = 0; i < 50; i++) all += http_post("/echo", std::to_string(i)) + http_get("/nothing");
  c.write(all);
  for (int i = 0; i < 50; i++) {
    CHECK(c.read_reply().body == std::to_string(i));
    CHECK(c.read_reply().status == 404);
  }
  // The body of a request that is refused is never read as the next request.
  const std::string hidden = http_get("/models/hidden");
  c.write(http_post("/nothing", hidden) + http_get("/health"));
  CHECK(c.read_reply().status == 404);
  CHECK(c.read_reply().body == "ok");
  for (const char* header : {"Content-Length: 1048577\r\n", "Transfer-Encoding: x\r\n", "",
                             "Content-Length: 1\r\nContent-Length: 2\r\n"}) {
    Connection other(server.port);
    other.write(concat("POST /echo HTTP/1.1\r\nHost: localhost\r\n", header, "\r\n", hidden));
    const Reply reply = other.read_reply();
    CHECK(reply.status >= 400);
    if (std::string_view(header).empty()) continue;  // 411 has no body: the next request is one
    CHECK(reply.header("Connection") == "close");
    CHECK(other.read_all() == "");
  }
}

TEST_CASE("http: a client that asks first is told to go on, or why not") {
  GuardedServer server;
  Connection c(server.port);
  std::string request = http_post("/echo", "{}", {{"Expect", "100-continue"}});
  c.write(request.substr(0, request.size() - 2));
  while (c.held().find("\r\n\r\n") == std::string::npos) REQUIRE(c.receive(20));
  CHECK(c.held() == "HTTP/1.1 100 Continue\r\n\r\n");
  c.held().clear();
  c.write("{}");
  CHECK(c.read_reply().body == "{}");
  c.write(request);  // it does not wait: nothing in between
  CHECK(c.read_head().head.starts_with("HTTP/1.1 200"));

  Connection large(server.port);
  large.write(
      http_request("POST", "/echo", {{"Expect", "100-continue"}, {"Content-Length", "2000000"}}));
  CHECK(large.read_reply().status == 413);
}

TEST_CASE("http: what a handler throws becomes JSON without the text of other exceptions") {
  GuardedServer server;
  Connection c(server.port);
  for (const char* body : {"bug", "int"}) {
    const Reply bug = c.ask(http_post("/throw", body));
    CHECK(bug.status == 500);
    CHECK((bug.head + bug.body).find("ecret") == std::string::npos);
    CHECK(bug.header("x-should-retry") == "false");
    error_code(bug);
  }
  const Reply reply = c.ask(http_post("/throw", "error"));
  CHECK(reply.status == 422);
  const OrderedJson error = reply.json().at("error");
  CHECK(error == OrderedJson::parse(R"({"message": "bad bytes: \ufffd\n", "type": "some_type",
      "param": "messages[0]", "code": "some_code", "n_ctx": 5})"));
  CHECK_FALSE(reply.has("Secret"));
}

TEST_CASE("http: a request that comes slowly ends at its deadline") {
  GuardedServer server({.request_seconds = .3});
  const std::string request = http_post("/echo", std::string(200, 'x'));
  for (const size_t at_once : {size_t(1), request.size() - 150}) {  // in the head, in the body
    Connection c(server.port);
    c.write(request.substr(0, at_once));
    Reply reply;
    for (size_t i = at_once; i < request.size() && !c.receive(.05); i++)
      c.write(request.substr(i, 1));  // a byte does not move the deadline
    reply = c.read_reply();
    CHECK(reply.status == 408);
    error_code(reply);
    CHECK(reply.header("Connection") == "close");
  }
  CHECK(soon([&] { return server.http.counts().timed_out == 2; }));
  // The time of waiting for a request does not count.
  Connection c(server.port);
  usleep(400000);
  CHECK(c.ask(http_get("/health")).status == 200);
}

TEST_CASE("http: a connection that asks for nothing is closed after a while") {
  GuardedServer server({.idle_seconds = .2});
  Connection fresh(server.port), used(server.port);
  CHECK(used.ask(http_get("/health")).header("Keep-Alive") == "timeout=0");
  CHECK(fresh.read_all() == "");
  CHECK(used.read_all() == "");
  CHECK(soon([&] { return server.http.counts().closed_idle == 2; }));
}

TEST_CASE("http: a client that takes nothing, or 2 KB a second, is closed") {
  GuardedServer server({.write_seconds = .5});
  Connection nothing(server.port, 30, 4096), slow(server.port, 30, 4096);
  nothing.write(http_get("/large"));
  slow.write(http_get("/large"));
  CHECK(soon([&] {
    char bytes[100];
    recv(slow.fd(), bytes, sizeof bytes, MSG_DONTWAIT);
    usleep(50000);
    return server.broken == 2;
  }));
  CHECK(server.finished == 0);
  CHECK(soon([&] { return server.http.counts().timed_out == 2; }));
  CHECK(soon([&] { return server.http.counts().open == 0; }));
}

TEST_CASE("http: a client that leaves is noticed at work and in a stream") {
  GuardedServer server;
  for (const bool abruptly : {false, true}) {
    Connection c(server.port), stays(server.port), reads(server.port);
    c.write(http_get("/work"));
    stays.write(http_get("/work") + http_get("/health"));
    reads.write(http_get("/large"));
    CHECK(soon([&] { return server.working == 2; }));
    reads.receive(20);
    const int noticed = server.noticed, broken = server.broken;
    abruptly ? c.reset() : c.close();
    abruptly ? reads.reset() : reads.close();
    CHECK(soon([&] { return server.noticed == noticed + 1 && server.broken == broken + 1; }));
    CHECK(server.working == 1);
    server.released = true;
    CHECK(stays.read_reply().body == "done");
    CHECK(stays.read_reply().body == "ok");
    server.released = false;
  }
  CHECK_FALSE(client_left());  // on a thread that has no connection
}

TEST_CASE("http: for one more connection the one that was silent longest is closed") {
  GuardedServer server({.connections = 4});
  Connection works(server.port);
  works.write(http_get("/work"));
  CHECK(soon([&] { return server.working == 1; }));
  Connection idle(server.port);
  CHECK(idle.ask(http_get("/health")).status == 200);
  usleep(100000);
  Connection drips(server.port);
  drips.write("GET ");
  usleep(100000);
  Connection later(server.port);
  CHECK(later.ask(http_get("/health")).status == 200);
  CHECK(server.http.counts().open == 4);

  Connection fifth(server.port);
  CHECK(fifth.ask(http_get("/health")).status == 200);
  CHECK(idle.read_all() == "");
  usleep(100000);
  Connection sixth(server.port);
  CHECK(sixth.ask(http_get("/health")).status == 200);
  CHECK(drips.read_all() == "");
  CHECK(later.ask(http_get("/health")).status == 200);
  const HttpCounts counts = server.http.counts();
  CHECK(counts.open == 4);
  CHECK(counts.limit == 4);
  CHECK(counts.closed_idle == 2);
  CHECK(counts.refused == 0);
  server.released = true;
  CHECK(works.read_reply().body == "done");
}

TEST_CASE("http: when all connections are at work, one more is told to come again") {
  GuardedServer server({.connections = 3});
  std::vector<Connection> busy;
  for (int i = 0; i < 3; i++) {
    busy.emplace_back(server.port);
    busy.back().write(http_get("/work"));
  }
  CHECK(soon([&] { return server.working == 3; }));
  for (int i = 0; i < 200; i++) {  // more than tell it at the same time
    const Reply reply = ask(server.port, http_get("/health"));
    REQUIRE(reply.status == 503);
    CHECK(reply.header("Retry-After") == "1");
    CHECK(error_code(reply) == "too_many_connections");
  }
  CHECK(server.http.counts().refused == 200);
  CHECK(server.http.counts().open == 3);
  // Those who stay are closed when there are many of them: they hold no threads.
  const int threads = threads_now();
  std::vector<Connection> stay;
  for (int i = 0; i < 150; i++) {
    stay.emplace_back(server.port);
    CHECK(stay.back().ask(http_get("/health")).status == 503);
  }
  bool few = false;
  for (const double end = now() + 4; !few && now() < end; usleep(1000))
    few = threads_now() <= threads + 64;
  CHECK(few);
  server.released = true;
  for (Connection& c : busy) CHECK(c.read_reply().body == "done");
  CHECK(ask(server.port, http_get("/health")).status == 200);
}

TEST_CASE("http: 1,100 silent connections and 500 that drip leave room for a new one") {
  const ManyFiles files;
  GuardedServer server;
  std::vector<Connection> clients;
  for (int i = 0; i < 1100; i++) {
    clients.emplace_back(server.port);
    if (i % 2) clients.back().write("GET /health HTTP/1.1\r\nHost: local");
  }
  CHECK(ask(server.port, http_get("/health")).status == 200);
  CHECK(soon([&] { return server.http.counts().accepted == 1101; }));
  CHECK(server.http.counts().open <= server.http.counts().limit);
  CHECK(clients.back().ask("host\r\n\r\n").status == 200);
  CHECK(server.http.counts().refused == 0);
  CHECK(clients.front().read_all() == "");
  clients.clear();
  CHECK(soon([&] { return server.http.counts().open == 0; }));
}

TEST_CASE("http: threads, descriptors and memory do not grow with the requests") {
  GuardedServer server;
  const auto settled = [&] { return server.http.counts().open == 0; };
  const auto resident = [] {
    std::ifstream file("/proc/self/statm");
    long total = 0, pages = 0;
    file >> total >> pages;
    return pages * sysconf(_SC_PAGESIZE);
  };
  const std::string body(8000, 'x');
  const auto work = [&](int rounds) {
    for (int i = 0; i < rounds; i++) {
      Connection c(server.port);
      for (int k = 0; k < 4; k++) REQUIRE(c.ask(http_post("/echo", body)).body == body);
      REQUIRE(c.ask(http_get("/nothing")).status == 404);
    }
    CHECK(soon(settled));
  };
  work(200);      // 1,000 requests
  usleep(20000);  // the last thread ends a little later than its connection
  const int files = files_now(), threads = threads_now();
  [[maybe_unused]] const long before = resident();
  work(1800);
  CHECK(soon([&] { return threads_now() <= threads; }));
  CHECK(soon([&] { return files_now() <= files; }));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(resident() - before < (8 << 20));
#endif
}

TEST_CASE("http: without descriptors for new connections the server waits and goes on") {
  GuardedServer server;
  Connection idle(server.port);
  CHECK(idle.ask(http_get("/health")).status == 200);
  std::vector<int> sockets;
  for (int i = 0; i < 4; i++) sockets.push_back(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  rlimit before = {}, few = {};
  getrlimit(RLIMIT_NOFILE, &before);
  few = before;
  few.rlim_cur = 3;  // none is free below it
  setrlimit(RLIMIT_NOFILE, &few);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(uint16_t(server.port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  for (const int fd : sockets) ::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
  // Threads that wait give up their core, again and again; one that tries in a loop does not.
  const auto pauses = [] {
    rusage all = {}, own = {};
    getrusage(RUSAGE_SELF, &all);
    getrusage(RUSAGE_THREAD, &own);
    return all.ru_nvcsw - own.ru_nvcsw;
  };
  const long start = pauses();
  const bool waits = soon([&] { return pauses() >= start + 10; });
  setrlimit(RLIMIT_NOFILE, &before);
  CHECK(waits);
  CHECK(idle.read_all() == "");  // closed to make room
  for (const int fd : sockets) {
    const std::string request = http_get("/health", {{"Connection", "close"}});
    CHECK(::send(fd, request.data(), request.size(), 0) == ssize_t(request.size()));
    char text[16] = "";
    CHECK(::recv(fd, text, 12, MSG_WAITALL) == 12);
    CHECK(std::string(text) == "HTTP/1.1 200");
    ::close(fd);
  }
}

TEST_CASE("http: a port has one server, and can be used again at once") {
  int port = 0;
  std::vector<Connection> clients;  // which end after the server: its side waits for them
  {
    GuardedServer server;
    port = server.port;
    for (int i = 0; i < 2; i++) clients.emplace_back(port);
    CHECK(clients[0].ask(http_get("/health")).status == 200);
    clients[1].write(http_get("/work"));
    HttpServer second({.port = port});
    try {
      second.bind();
      FAIL("a second server listens on the port");
    } catch (const Error& e) {
      const std::string text = e.what();
      CHECK(text.find("--port 0") != std::string::npos);
      CHECK(text.find(std::to_string(port)) != std::string::npos);
    }
    CHECK(soon([&] { return server.working == 1; }));
  }
  GuardedServer again({}, port);
  CHECK(again.port == port);
  CHECK(ask(port, http_get("/health")).status == 200);
  CHECK_THROWS_AS(HttpServer({.port = 65536}), Error);
}

TEST_CASE("http: a server that stops ends idle connections, and waits for those at work") {
  GuardedServer server;
  Connection idle(server.port), works(server.port), reads(server.port);
  CHECK(idle.ask(http_get("/health")).status == 200);
  works.write(http_get("/work"));
  reads.write(http_get("/large"));
  CHECK(soon([&] { return server.working == 1; }));
  CHECK(reads.receive(20));
  CHECK_FALSE(server.http.stopping());
  server.http.stop();
  CHECK(server.http.stopping());
  CHECK(idle.read_all() == "");
  CHECK_FALSE(server.http.wait_until_closed(.05));
  CHECK_THROWS_AS(ask(server.port, http_get("/health")), Error);  // nobody listens
  server.released = true;
  const Reply reply = works.read_reply();
  CHECK(reply.body == "done");
  CHECK(reply.header("Connection") == "close");
  works.close();
  CHECK(reads.receive(20));  // a stream goes on
  CHECK(server.broken == 0);
  server.http.close_all();
  CHECK(server.http.wait_until_closed(20));
  CHECK(server.broken == 1);
}
