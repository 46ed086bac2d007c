// Any bytes sent to the HTTP server, in one piece or two: the connection ends, and every answer is
// whole and below 500.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <thread>

#include "cake/http.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;

struct FuzzedServer {
  FuzzedServer()
      : http({.port = 0,
              .connections = 8,
              .head_bytes = 4000,
              .body_bytes = 4000,
              .request_seconds = 5,
              .idle_seconds = 5,
              .hosts = {"chat.example"},
              .origins = {"https://chat.example"},
              .keys = {"k"},
              .public_paths = {"/health"}}) {
    const auto size = [](const httplib::Request& req, httplib::Response& res) {
      fuzz::expect(req.body.size() <= 4000, "a body is within the limit");
      res.set_content(concat(req.path.size(), " ", req.body.size(), "\n"), "text/plain");
    };
    http.Get("/health", size);
    http.Get("/a/*", size);
    http.Post("/b", size);
    http.Get("/s", [](const httplib::Request&, httplib::Response& res) {
      res.set_chunked_content_provider("text/event-stream", [](size_t, httplib::DataSink& sink) {
        sink.write("data: 1\n\n", 9);
        sink.done();
        return true;
      });
    });
    port = http.bind();
    std::thread([this] { http.run(); }).detach();
  }
  HttpServer http;
  int port = 0;
};

// Sends the bytes in two pieces, and returns all that comes back until the connection ends.
std::string exchange_bytes(int port, std::string_view bytes, size_t first) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(uint16_t(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  fuzz::expect(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0,
               "the server accepts");
  for (const std::string_view piece : {bytes.substr(0, first), bytes.substr(first)}) {
    if (!piece.empty()) ::send(fd, piece.data(), piece.size(), MSG_NOSIGNAL);
    if (first < bytes.size()) std::this_thread::yield();
  }
  ::shutdown(fd, SHUT_WR);
  std::string reply;
  char buffer[4096];
  while (true) {
    pollfd wanted = {fd, POLLIN, 0};
    int ready = 0;
    while ((ready = poll(&wanted, 1, 15000)) < 0 && errno == EINTR) {  // libFuzzer's timer
    }
    fuzz::expect(ready > 0, "the connection ends");
    const ssize_t n = recv(fd, buffer, sizeof buffer, 0);
    if (n <= 0) break;
    reply.append(buffer, size_t(n));
  }
  const linger reset = {1, 0};  // no port stays in use for a while
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
  ::close(fd);
  return reply;
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static FuzzedServer& server = *new FuzzedServer;
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string reply =
      exchange_bytes(server.port, bytes, std::min(bytes.size(), size_t(data[0]) * 2));
  // Bodies here have line breaks at their ends alone.
  fuzz::expect(reply.empty() || reply.starts_with("HTTP/1.1 "), "an answer is HTTP");
  for (size_t i = 0; i != std::string::npos;) {
    const std::string_view rest = std::string_view(reply).substr(i);
    fuzz::expect(!rest.starts_with("HTTP/1.1 5"), "no answer is 5xx");
    const size_t end = rest.find("\nHTTP/1.1 ");
    i = end == std::string_view::npos ? end : i + end + 1;
  }
  fuzz::expect(reply.empty() || reply.ends_with("\n"), "the last answer is whole");
  return 0;
}
