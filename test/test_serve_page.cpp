// The page of ./serve as a browser gets it: the files of web/ byte for byte, the headers that keep
// strangers out, what browsers keep, and what people see who work on it. What the page does is
// tested in a browser: test_page.cpp.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <regex>
#include <set>
#include <string>

#include "cake/page.h"
#include "cake/serve.h"
#include "cake/sha256.h"
#include "test/http_client.h"
#include "test/scripted_model.h"
#include "test/serve_support.h"
#include "test/support.h"

using namespace cake;

namespace {

const std::filesystem::path& web() {
  static const std::filesystem::path dir = std::filesystem::canonical("test") / ".." / "web";
  return dir;
}

// The file's name of a path of the page.
std::string name_of(const std::string& path) { return path == "/" ? "page.html" : path.substr(1); }

struct Page {
  ScriptedModel m{64};
  ServeOptions options = serve_options(m.save());
  std::string copy;  // of web/, after copy_web()

  void copy_web() {
    copy = m.dir() / "web";
    std::filesystem::copy(web(), copy);
    options.web = copy;
  }
  void write(const std::string& name, const std::string& content) const {
    std::ofstream(copy + "/" + name, std::ios::binary) << content;
  }
};

// The paths of the page, by the files that there are.
std::vector<std::string> paths_of_web() {
  std::vector<std::string> paths = {"/"};
  for (const auto& file : std::filesystem::directory_iterator(web())) {
    const std::string name = file.path().filename();
    if (!name.starts_with("stats.")) paths.push_back("/" + name);
  }
  return paths;
}

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (size_t i = 0; (i = text.find(part, i)) != std::string::npos; i += part.size()) n++;
  return n;
}

// All matches' first groups.
std::vector<std::string> matches(const std::string& text, const std::string& pattern) {
  std::vector<std::string> all;
  const std::regex regex(pattern);
  for (std::sregex_iterator i(text.begin(), text.end(), regex), end; i != end; ++i) {
    all.push_back((*i)[1]);
  }
  return all;
}

}  // namespace

TEST_CASE("page: every file is that of web/, with headers that keep strangers out") {
  Page page;
  RunningServer server(page.options);
  std::set<std::string> names;
  for (const std::string& path : page_paths()) {
    CAPTURE(path);
    const std::string name = name_of(path), content = read_file(web() / name);
    names.insert(name);
    const Reply reply = server.get(path);
    REQUIRE(reply.status == 200);
    CHECK(reply.body == content);
    CHECK(content.size() > 100);
    const std::string type = name.ends_with(".html")  ? "text/html"
                             : name.ends_with(".css") ? "text/css"
                                                      : "text/javascript";
    CHECK(reply.header("Content-Type") == type + "; charset=utf-8");
    CHECK(reply.header("Content-Security-Policy") ==
          "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
          "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
          "require-trusted-types-for 'script'");
    CHECK(reply.header("X-Content-Type-Options") == "nosniff");
    CHECK(reply.header("Referrer-Policy") == "no-referrer");
    CHECK(reply.header("Cross-Origin-Opener-Policy") == "same-origin");
    CHECK(reply.header("Cross-Origin-Resource-Policy") == "same-origin");
    CHECK(reply.header("Cache-Control") == "no-cache");
    CHECK(reply.header("ETag") == "\"" + sha256_base64(content) + "\"");

    Connection connection(server.port());
    connection.write(http_request("HEAD", path));
    Reply head = connection.read_reply(true);
    CHECK(head.status == 200);
    CHECK(head.headers == reply.headers);
    CHECK(connection.ask(http_get("/health")).status == 200);  // HEAD had no body
    CHECK(server.post(path, OrderedJson::object()).status == 405);
  }
  CHECK(server.get("/").body == server.get("/page.html").body);
  // Every file of web/ is on one of the two pages.
  for (const auto& file : std::filesystem::directory_iterator(web())) {
    const std::string name = file.path().filename();
    if (!name.starts_with("stats.")) CHECK_MESSAGE(names.contains(name), name);
  }
}

TEST_CASE("page: it asks for no file but its own, and its markup holds no script and no style") {
  const std::vector<std::string> paths = page_paths();
  const auto is_served = [&](const std::string& name) {
    return std::find(paths.begin(), paths.end(), "/" + name) != paths.end();
  };
  const std::string html = read_file(web() / "page.html");
  for (const std::string& url : matches(html, "(?:src|href)=\"([^\"]*)\"")) {
    CAPTURE(url);
    CHECK((url.starts_with("#") || url == "data:," || is_served(url)));
  }
  CHECK(matches(html, "(<script[^>]*>)[^<]").empty());  // none but empty ones, with src
  CHECK(matches(html, "<[^>]*( style=| on[a-z]+=)").empty());
  CHECK(count(html, "<style") == 0);
  for (const std::string& path : paths) {
    const std::string name = name_of(path), content = read_file(web() / name);
    CAPTURE(name);
    for (const std::string& module : matches(content, "from '([^']*)'")) {
      CHECK_MESSAGE((module.starts_with("./") && is_served(module.substr(2))), module);
    }
    for (const std::string& url : matches(content, "(https?:/[^'\" ]*)")) {
      CHECK_MESSAGE(url == "http://www.w3.org/2000/svg", url);  // a name, which nobody asks for
    }
    for (const char* never : {"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
                              "eval(", "new Function", "srcdoc", "@import", "url("}) {
      CHECK_MESSAGE(count(content, never) == 0, never);
    }
  }
}

TEST_CASE("page: a browser that has a file is answered 304, without the file") {
  Page page;
  RunningServer server(page.options);
  const std::string tag = server.get("/page.js").header("ETag");
  REQUIRE(tag.size() == 46);  // 32 bytes in base64, in quotes
  Connection connection(server.port());
  for (const std::string& known : {tag, "W/" + tag, "\"other\", " + tag, std::string("*")}) {
    CAPTURE(known);
    const Reply reply = connection.ask(http_get("/page.js", {{"If-None-Match", known}}));
    CHECK(reply.status == 304);
    CHECK(!reply.has("Content-Length"));
    CHECK(!reply.has("Content-Type"));
    CHECK(reply.header("ETag") == tag);
    CHECK(reply.header("Cache-Control") == "no-cache");
    CHECK(reply.has("Content-Security-Policy"));
    CHECK(connection.held().empty());
  }
  for (const std::string& known :
       {std::string("\"other\""), tag.substr(1, 44), server.get("/page.css").header("ETag")}) {
    CAPTURE(known);
    const Reply reply = connection.ask(http_get("/page.js", {{"If-None-Match", known}}));
    CHECK(reply.status == 200);
    CHECK(reply.body.size() > 100);
  }
}

TEST_CASE("page: with --web a change shows at the next request") {
  Page page;
  page.copy_web();
  RunningServer server(page.options);
  const Reply before = server.get("/page.js");
  CHECK(before.body == read_file(web() / "page.js"));
  page.write("page.js", "// Another script.\n");
  const Reply after = server.get("/page.js", {{"If-None-Match", before.header("ETag")}});
  CHECK(after.status == 200);
  CHECK(after.body == "// Another script.\n");
  CHECK(after.header("ETag") == "\"" + sha256_base64(after.body) + "\"");
  CHECK(server.get("/page.js", {{"If-None-Match", after.header("ETag")}}).status == 304);
  CHECK(server.get("/api.js").body == read_file(web() / "api.js"));

  // No other file can be had by any path.
  page.write("secret.txt", "secret");
  std::ofstream(page.m.dir() / "secret.txt") << "secret";
  for (const char* path : {"/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/./page.js",
                           "/web/page.js", "/page.js/", "/page.js%00", "/PAGE.JS", "//page.js",
                           "/stats.html", "/v1/page.js", "/..%2fsecret.txt"}) {
    CAPTURE(path);
    const Reply reply = server.get(path);
    CHECK((reply.status == 404 || reply.status == 400));
    CHECK(!contains(reply.body, "\"secret\""));
  }

  // A file that is gone is named, and comes back.
  std::filesystem::remove(page.copy + "/page.js");
  const Reply gone = server.get("/page.js");
  CHECK(gone.status == 500);
  CHECK(gone.json().at("error").at("code") == "page_file");
  const std::string message = gone.json()["error"].at("message");
  CHECK(contains(message, "--web: "));
  CHECK(contains(message, page.copy + "/page.js: cannot open: No such file"));
  CHECK(server.get("/").status == 200);
  page.write("page.js", "// Back.\n");
  CHECK(server.get("/page.js").body == "// Back.\n");
}

TEST_CASE("page: --web with a directory that lacks a file is refused at the start") {
  Page page;
  page.copy_web();
  std::filesystem::remove(page.copy + "/chat.js");
  const auto refusal_of = [&](const std::string& dir) {
    page.options.web = dir;
    return error_of([&] { Server server(page.options); });
  };
  const std::string lacking = refusal_of(page.copy);
  CHECK(contains(lacking, "--web " + page.copy));
  CHECK(contains(lacking, "chat.js: cannot open: No such file"));
  CHECK(contains(lacking, "expected a directory with the files of web/"));
  CHECK(contains(refusal_of(page.copy + "/none"), "page.html: cannot open: No such file"));
  CHECK(contains(refusal_of(page.copy + "/page.css"), "Not a directory"));
}

TEST_CASE("page: it needs no key, and nothing else is without one") {
  Page page;
  page.options.http.keys = {"the-key"};
  RunningServer server(page.options);
  for (const std::string& path : paths_of_web()) {
    CAPTURE(path);
    CHECK(server.get(path).status == 200);
    CHECK(server.get(path, {{"Authorization", "Bearer wrong"}}).status == 200);
    CHECK(!contains(server.get(path).body, "the-key"));
  }
  for (const char* path : {"/props", "/v1/props", "/v1/models", "/metrics", "/stats.html",
                           "/page.js/", "/v1/page.js", "/nothing"}) {
    CAPTURE(path);
    CHECK(server.get(path).status == 401);
  }
  for (const char* path : {"/tokenize", "/v1/chat/completions", "/arena/vote"}) {
    CAPTURE(path);
    CHECK(server.post(path, OrderedJson::object()).status == 401);
  }
}

TEST_CASE("page: it is there while the models load") {
  Page page;
  const std::string fifo = page.m.dir() / "documents";  // loading waits until somebody writes
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  page.options.documents = fifo;
  RunningServer server(page.options, false);
  FifoWriter documents(fifo);
  for (const std::string& path : paths_of_web()) {
    CAPTURE(path);
    CHECK(server.get(path).status == 200);
  }
  const Reply props = server.get("/props");  // by this the page knows that it has to wait
  CHECK(props.status == 503);
  CHECK(props.json().at("error").at("code") == "loading_model");
  REQUIRE(documents.write());
  CHECK(wait_until([&] { return server.get("/props").status == 200; }));
}

TEST_CASE("page: it is small enough to be read, less than 1,500 lines of code and 100 KB") {
  size_t bytes = 0;
  int lines = 0;
  for (const std::string& path : page_paths()) {
    if (path == "/") continue;
    const std::string name = name_of(path), content = read_file(web() / name);
    if (name == "style.css" || name == "tokens.js") continue;  // of the page of ./bpe stats too
    bytes += content.size();
    std::istringstream rows(content);
    int number = 0;
    for (std::string row; std::getline(rows, row);) {
      number++;
      const std::string_view code = strip_ascii(row);
      if (!code.empty() && !code.starts_with("//")) lines++;
      const auto is_start = [](char c) { return (c & 0xC0) != 0x80; };  // of a character
      CHECK_MESSAGE(std::count_if(row.begin(), row.end(), is_start) <= 100, name, ":", number);
    }
  }
  CHECK(lines < 1500);
  CHECK(bytes < 100'000);
}
