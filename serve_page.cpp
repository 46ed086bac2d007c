// Part of ./serve: the page.
//
//     GET /          web/page.html
//     GET /page.js   web/page.js, and so every other file that the page loads
//
// The binary holds the files as people wrote them, so that a browser's inspector shows the source.
// There are no others: no path of a request ever becomes a path of a file. With --web DIR the same
// names are read from DIR at each request.
//
// The page shows what models and strangers wrote. Its scripts make text nodes alone, and the
// headers here see to it that a mistake in them does no harm: no script but ours runs, nothing but
// this server is asked for anything, no other page may frame this one or hold a handle to it.
#include "cake/page.h"

#include <filesystem>

#include "cake/sha256.h"
#include "cake/web.h"

namespace cake {

namespace web {
std::string_view page_html();
std::string_view page_css();
std::string_view page_js();
std::string_view api_js();
std::string_view settings_js();
std::string_view scores_js();
std::string_view write_js();
std::string_view chat_js();
std::string_view tokenizer_js();
std::string_view arena_js();
}  // namespace web

CAKE_WEB_FILE(page_html, "web/page.html")
CAKE_WEB_FILE(page_css, "web/page.css")
CAKE_WEB_FILE(page_js, "web/page.js")
CAKE_WEB_FILE(api_js, "web/api.js")
CAKE_WEB_FILE(settings_js, "web/settings.js")
CAKE_WEB_FILE(scores_js, "web/scores.js")
CAKE_WEB_FILE(write_js, "web/write.js")
CAKE_WEB_FILE(chat_js, "web/chat.js")
CAKE_WEB_FILE(tokenizer_js, "web/tokenizer.js")
CAKE_WEB_FILE(arena_js, "web/arena.js")

namespace {

struct PageFile {
  const char* name;  // in web/, and behind the / of its path
  std::string_view (*content)();
};

// The first one is the page itself, at / too.
constexpr PageFile kFiles[] = {
    {"page.html", web::page_html}, {"style.css", web::style_css},
    {"page.css", web::page_css},   {"page.js", web::page_js},
    {"api.js", web::api_js},       {"settings.js", web::settings_js},
    {"scores.js", web::scores_js}, {"write.js", web::write_js},
    {"chat.js", web::chat_js},     {"tokenizer.js", web::tokenizer_js},
    {"arena.js", web::arena_js},   {"tokens.js", web::tokens_js},
};

// Trusted Types make the browser refuse innerHTML and its like. Attributes `style` and `onclick`
// in the markup are refused too. `data:` is for the empty icon.
constexpr const char* kPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'";

const char* content_type(std::string_view name) {
  return name.ends_with(".html")  ? "text/html; charset=utf-8"
         : name.ends_with(".css") ? "text/css; charset=utf-8"
                                  : "text/javascript; charset=utf-8";
}

// Whether If-None-Match names the tag: a list of tags, weak or not, or *.
bool matches(const std::string& header, const std::string& tag) {
  return header == "*" || header.find(tag) != std::string::npos;
}

void send_file(const PageFile& file, const std::string& dir, const httplib::Request& request,
               httplib::Response& response) {
  std::string content;
  if (dir.empty()) {
    content = file.content();
  } else {
    try {
      content = read_file(std::filesystem::path(dir) / file.name);
    } catch (const Error& e) {
      throw ApiError(500, "server_error", "page_file", "", concat("--web: ", e.what()));
    }
  }
  // Browsers keep the files, and ask each time whether they are still the same.
  const std::string tag = "\"" + sha256_base64(content) + "\"";
  response.set_header("ETag", tag);
  response.set_header("Cache-Control", "no-cache");
  response.set_header("Content-Security-Policy", kPolicy);
  response.set_header("Referrer-Policy", "no-referrer");
  response.set_header("Cross-Origin-Opener-Policy", "same-origin");
  response.set_header("Cross-Origin-Resource-Policy", "same-origin");
  if (matches(request.get_header_value("If-None-Match"), tag)) {
    response.status = 304;
  } else {
    response.set_content(content, content_type(file.name));
  }
}

}  // namespace

void add_page(HttpServer& http, const std::string& dir) {
  for (const PageFile& file : kFiles) {
    if (!dir.empty()) {
      try {
        read_file(std::filesystem::path(dir) / file.name);
      } catch (const Error& e) {
        fail("--web ", dir, ": ", e.what(), "; expected a directory with the files of web/");
      }
    }
    const auto handler = [&file, dir](const httplib::Request& request,
                                      httplib::Response& response) {
      send_file(file, dir, request, response);
    };
    if (&file == kFiles) http.Get("/", handler);
    http.Get(concat("/", file.name), handler);
  }
}

std::vector<std::string> page_paths() {
  std::vector<std::string> paths = {"/"};
  for (const PageFile& file : kFiles) paths.push_back(concat("/", file.name));
  return paths;
}

}  // namespace cake
