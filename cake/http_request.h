// The head of an HTTP request, and whether this server serves it: what cake/http.h checks before
// it reads a body. Functions of bytes and options alone; no sockets.
//
// The syntax is that of RFC 9112 (HTTP/1.1), read strictly: what two readers could understand in
// two ways is an error, because the other reader may be a proxy in front of this server. Every
// error is an ApiError.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/http.h"

namespace cake {

struct RequestHead {
  std::string method, target, path;  // path: percent-decoded, without the query
  std::string authority;             // of a target such as "http://HOST/path"; otherwise empty
  int minor = 1;                     // of HTTP/1.
  std::vector<std::pair<std::string, std::string>> headers;  // name in lower case, value
  int64_t length = 0;                                        // of the body; -1: it comes in chunks

  bool has_header(std::string_view name) const;
  // The header's value. Empty where there is none; an error where there are several.
  std::string header(std::string_view name) const;
  bool keep_alive() const;
};

// Finds a head's end in the bytes that came so far, and checks each of them once.
class HeadScanner {
 public:
  explicit HeadScanner(int64_t max_bytes) : max_bytes_(max_bytes) {}
  // `input`: what came before, and more. The bytes of the head, or 0: it does not end yet.
  size_t scan(std::string_view input);

 private:
  const int64_t max_bytes_;
  size_t offset_ = 0, line_ = 0;  // of the next byte, and of its line's first byte
  int lines_ = 0;                 // that are not empty
  char previous_ = '\0';
};

// `text`: all that HeadScanner found.
RequestHead parse_head(std::string_view text);

// `local`: the address that the client connected to, as it stands in Host: "127.0.0.1", "[::1]".
void check_host(const RequestHead&, const HttpOptions&, const std::string& local, int port);
// Returns the origin of a page of another site that may call, otherwise "".
std::string check_origin(const RequestHead&, const HttpOptions&);
void check_key(const RequestHead&, const HttpOptions&);
// Length and encoding.
void check_body(const RequestHead&, const HttpOptions&);

// Names, origins and keys, as they were given on the command line: Error.
void check_http_options(const HttpOptions&);

// The value of Access-Control-Allow-Headers.
std::string allowed_headers(const RequestHead& preflight);

}  // namespace cake
