// Reading and checking the head of an HTTP request: cake/http_request.h.
#include "cake/http_request.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace cake {
namespace {

constexpr size_t kMaxLine = 8000;  // bytes of a line
constexpr int kMaxLines = 100;

[[noreturn]] void bad_syntax(const std::string& what) { bad_request("", what); }
[[noreturn]] void refuse(int status, const std::string& what) {
  throw ApiError(status, "invalid_request_error", "", "", what);
}
[[noreturn]] void forbid(const char* code, const std::string& what) {
  throw ApiError(403, "permission_error", code, "", what);
}

bool is_token_character(char c) {  // of a method or of a header's name
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         (c != '\0' && std::strchr("!#$%&'*+-.^_`|~", c) != nullptr);
}
bool is_token(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), is_token_character);
}
bool is_digits(std::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Syntax

size_t HeadScanner::scan(std::string_view input) {
  while (offset_ < input.size()) {
    const char c = input[offset_++];
    const bool ends_line = c == '\n' && previous_ == '\r';
    if (c == '\n' ? !ends_line : previous_ == '\r')
      bad_syntax("the head: expected CR LF at the end of each line");
    if ((c >= 0 && c < ' ' && c != '\t' && c != '\r' && c != '\n') || c == 0x7f) {
      bad_syntax(concat("the head: found a control character (byte ", int(c),
                        "), expected HTTP (not HTTPS)"));
    }
    previous_ = c;
    if (int64_t(offset_) > max_bytes_)
      refuse(431, concat("the head has more than ", max_bytes_, " bytes"));
    if (offset_ - line_ > kMaxLine) {
      refuse(lines_ == 0 ? 414 : 431,
             concat("a line of the head has more than ", kMaxLine, " bytes"));
    }
    if (!ends_line) continue;
    const bool empty = offset_ - line_ == 2;
    line_ = offset_;
    if (!empty && ++lines_ > kMaxLines)
      refuse(431, concat("the head has more than ", kMaxLines, " lines"));
    if (empty && lines_ > 0) return offset_;  // a client may begin with empty lines: section 2.2
  }
  return 0;
}

namespace {

std::string percent_decoded(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdefABCDEF";
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const std::string_view digits = text.substr(i + 1, 2);
    if (digits.size() < 2 || digits.find_first_not_of(kDigits) != std::string_view::npos)
      bad_syntax("the path: expected two hexadecimal digits behind %");
    if (digits == "00") bad_syntax("the path: found %00");
    out += char(std::stoi(std::string(digits), nullptr, 16));
    i += 2;
  }
  return out;
}

void parse_request_line(std::string_view line, RequestHead& head) {
  const size_t first = line.find(' '), last = line.rfind(' ');
  if (first == std::string_view::npos || first == last)
    bad_syntax("expected a line such as GET /health HTTP/1.1");
  head.method = line.substr(0, first);
  head.target = line.substr(first + 1, last - first - 1);
  const std::string_view version = line.substr(last + 1);
  if (!is_token(head.method)) bad_syntax("the method: expected letters");
  if (version != "HTTP/1.1" && version != "HTTP/1.0")
    bad_syntax("the version: expected HTTP/1.1 or HTTP/1.0");
  head.minor = version.back() - '0';
  for (const char c : head.target)
    if (c <= ' ' || c >= 0x7f) bad_syntax("the path: expected other bytes percent-encoded");
  std::string_view path = head.target;
  if (ascii_lower(path.substr(0, 7)) == "http://") {  // what a client sends to a proxy
    path.remove_prefix(7);
    const size_t end = std::min(path.find_first_of("/?#"), path.size());
    head.authority = path.substr(0, end);
    if (head.authority.empty()) bad_syntax("the path: http:// without a host");
    path.remove_prefix(end);
  }
  path = path.substr(0, path.find_first_of("?#"));
  head.path = path.empty() && !head.authority.empty() ? "/" : percent_decoded(path);
  const bool all = head.path == "*" && head.method == "OPTIONS";
  if (!head.path.starts_with("/") && !all)
    bad_syntax("the path: expected / as its first character");
}

// How the body is framed: section 6.
void parse_framing(RequestHead& head) {
  const bool has_length = head.has_header("content-length");
  if (head.has_header("transfer-encoding")) {
    if (has_length) bad_syntax("found Content-Length and Transfer-Encoding, expected one of them");
    if (ascii_lower(head.header("transfer-encoding")) != "chunked" || head.minor == 0)
      bad_syntax("Transfer-Encoding: expected chunked, in HTTP/1.1");
    head.length = -1;
  } else if (has_length) {
    const std::string length = head.header("content-length");
    if (!is_digits(length)) bad_syntax("Content-Length: expected decimal digits");
    head.length = length.size() > 18 ? std::numeric_limits<int64_t>::max() : std::stoll(length);
  }
}

}  // namespace

RequestHead parse_head(std::string_view text) {
  RequestHead head;
  while (text.starts_with("\r\n")) text.remove_prefix(2);
  size_t end = text.find("\r\n");
  parse_request_line(text.substr(0, end), head);
  for (size_t begin = end + 2; (end = text.find("\r\n", begin)) != begin; begin = end + 2) {
    const std::string_view line = text.substr(begin, end - begin);
    const size_t colon = std::min(line.find(':'), line.size());
    const std::string_view name = line.substr(0, colon);
    if (colon == line.size() || !is_token(name))
      bad_syntax(concat("line ", head.headers.size() + 2, " of the head: expected NAME: VALUE"));
    head.headers.emplace_back(ascii_lower(name), strip_ascii(line.substr(colon + 1)));
  }
  parse_framing(head);
  return head;
}

bool RequestHead::has_header(std::string_view name) const {
  return std::any_of(headers.begin(), headers.end(),
                     [&](const auto& header) { return header.first == name; });
}

std::string RequestHead::header(std::string_view name) const {
  const std::string* found = nullptr;
  for (const auto& [key, value] : headers) {
    if (key != name) continue;
    if (found) bad_syntax(concat("found two ", name, " headers, expected one"));
    found = &value;
  }
  return found ? *found : "";
}

bool RequestHead::keep_alive() const {
  std::string options;
  for (const auto& [key, value] : headers)
    if (key == "connection") options += ascii_lower(value) + ",";
  if (options.find("close") != std::string::npos) return false;
  return minor == 1 || options.find("keep-alive") != std::string::npos;
}

// ---------------------------------------------------------------------------------------------
// Host and Origin

namespace {

struct HostAndPort {
  std::string host, port;  // in lower case; port empty: not given
};

// "localhost:8080", "[::1]:8080", "chat.example". Empty host: it is not of this form.
HostAndPort parse_authority(std::string_view text) {
  const std::string lower = ascii_lower(text);
  const size_t bracket = lower.starts_with("[") ? lower.find(']') : 0;
  if (bracket == std::string::npos) return {};
  const size_t end = std::min(lower.find(':', bracket), lower.size());
  const std::string port = end < lower.size() ? lower.substr(end + 1) : "";
  if (end < lower.size() && !is_digits(port)) return {};
  return {lower.substr(0, end), port};
}

// A page of another site can make its own name point to this machine (DNS rebinding): to a browser
// this server is then a part of that site. Host still has the page's name.
void check_name(const std::string& authority, const HttpOptions& options, const std::string& local,
                int our_port) {
  const auto [host, port] = parse_authority(authority);
  if (!host.empty()) {
    for (const std::string& entry : options.hosts) {
      const HostAndPort allowed = parse_authority(entry);
      if (host == allowed.host && (allowed.port.empty() || port == allowed.port)) return;
    }
    // An address that the client connected to is no name. 0.0.0.0, to which nobody connects, is
    // another way of browsers to reach this machine.
    const bool wildcard = options.host == "0.0.0.0" || options.host == "::";
    const bool ours = host == "localhost" || host == "127.0.0.1" || host == "[::1]" ||
                      host == local || (!wildcard && host == ascii_lower(options.host));
    if (ours && (port.empty() || port == std::to_string(our_port))) return;
  }
  forbid("forbidden_host", concat("Host: this server is not known as ", json_text(authority),
                                  "; --allow-host NAME lets it answer to that name"));
}

}  // namespace

void check_host(const RequestHead& head, const HttpOptions& options, const std::string& local,
                int port) {
  if (!head.has_header("host")) bad_syntax("the header Host is missing");
  check_name(head.header("host"), options, local, port);
  if (!head.authority.empty()) check_name(head.authority, options, local, port);
}

// A page of another site can send requests here, but it cannot choose these two headers. Programs
// that are no browsers send neither.
std::string check_origin(const RequestHead& head, const HttpOptions& options) {
  const std::string origin = head.header("origin"), site = head.header("sec-fetch-site");
  constexpr std::string_view kHelp = " may not call this server; --allow-origin ORIGIN lets them";
  if (!origin.empty()) {
    for (const std::string& allowed : options.origins)
      if (ascii_lower(origin) == ascii_lower(allowed)) return origin;
    const size_t scheme = origin.find("://");
    if (scheme == std::string::npos ||
        ascii_lower(origin.substr(scheme + 3)) != ascii_lower(head.header("host"))) {
      forbid("forbidden_origin", concat("web pages of ", json_text(origin), kHelp));
    }
  }
  if (site.empty() || site == "same-origin" || site == "none") return "";
  // A link on another page may open ours: that page cannot read the answer.
  if (head.method == "GET" && head.header("sec-fetch-mode") == "navigate" &&
      head.header("sec-fetch-dest") == "document") {
    return "";
  }
  forbid("forbidden_origin",
         concat("Sec-Fetch-Site: ", json_text(site), ": web pages of other origins", kHelp));
}

std::string allowed_headers(const RequestHead& preflight) {
  const std::string wanted = ascii_lower(preflight.header("access-control-request-headers"));
  const bool plain = std::all_of(wanted.begin(), wanted.end(), [](char c) {
    return is_token_character(c) || c == ',' || c == ' ';
  });
  return concat("authorization, content-type", plain && !wanted.empty() ? ", " + wanted : "");
}

// ---------------------------------------------------------------------------------------------
// Key and body

namespace {

// Does not tell by its time how much of the key is right.
bool same_key(std::string_view found, std::string_view key) {
  size_t difference = found.size() ^ key.size();
  for (size_t i = 0; i < found.size(); i++)
    difference |= size_t((found[i] ^ key[i % key.size()]) & 0xff);
  return difference == 0;
}

}  // namespace

void check_key(const RequestHead& head, const HttpOptions& options) {
  const auto& open = options.public_paths;
  if (options.keys.empty() || std::find(open.begin(), open.end(), head.path) != open.end()) return;
  const std::string value = head.header("authorization");
  const bool bearer = ascii_lower(value.substr(0, 7)) == "bearer ";
  const std::string_view found = bearer ? strip_ascii(std::string_view(value).substr(7)) : "";
  bool known = false;
  for (const std::string& key : options.keys) known |= same_key(found, key);
  if (known) return;
  throw ApiError(401, "authentication_error", "invalid_api_key", "",
                 concat(found.empty() ? "a key is missing" : "the key is not known",
                        "; expected the header Authorization: Bearer KEY"));
}

void check_body(const RequestHead& head, const HttpOptions& options) {
  if (head.method == "POST" && head.length == 0 && !head.has_header("content-length"))
    refuse(411, "expected the header Content-Length");
  if (head.length > options.body_bytes)
    refuse(413, concat("the body has more than ", options.body_bytes, " bytes"));
  const std::string encoding = ascii_lower(head.header("content-encoding"));
  if (!encoding.empty() && encoding != "identity")
    refuse(415, "Content-Encoding: expected a body that is not compressed");
  const std::string expect = ascii_lower(head.header("expect"));
  if (!expect.empty() && expect != "100-continue")
    refuse(417, "Expect: 100-continue alone is supported");
}

void check_http_options(const HttpOptions& options) {
  require(options.port >= 0 && options.port <= 65535, "--port: found ", options.port,
          ", expected 0 to 65535");
  for (const std::string& name : options.hosts) {
    require(!parse_authority(name).host.empty(), "--allow-host ", name,
            ": expected a name or NAME:PORT, as in chat.example");
  }
  for (const std::string& origin : options.origins) {
    const size_t scheme = origin.find("://");
    require(scheme != std::string::npos && scheme > 0 &&
                !parse_authority(origin.substr(scheme + 3)).host.empty() &&
                origin.find('/', scheme + 3) == std::string::npos,
            "--allow-origin ", origin,
            ": expected what a browser sends, as in https://chat.example (without a path)");
  }
  for (const std::string& key : options.keys) {
    const bool printable =
        std::all_of(key.begin(), key.end(), [](char c) { return c > ' ' && c < 0x7f; });
    require(!key.empty() && printable,
            "an API key: found white space or nothing, expected printable ASCII characters");
  }
}

}  // namespace cake
