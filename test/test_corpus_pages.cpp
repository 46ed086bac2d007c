// Readers of raw pages: every kind of file in every wrapping, damage of every kind, restarts at
// every page.
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "cake/pages.h"
#include "test/support.h"

using namespace cake;

namespace {

// ---------------------------------------------------------------------------------------------
// Files to read

std::string path_of(const TempDir& dir, const std::string& name, const std::string& content) {
  write_file(dir / name, content);
  return (dir / name).string();
}

// bits: 31 gzip, 15 zlib, -15 raw deflate.
std::string join(const std::vector<std::string>& parts) {
  std::string all;
  for (const std::string& part : parts) all += part;
  return all;
}

using Compress = std::string (*)(const std::string&);
std::string gzip(const std::string& text) { return deflated(text); }

// One member or frame for each part.
std::string join(const std::vector<std::string>& parts, Compress compress) {
  std::string all;
  for (const std::string& part : parts) all += compress(part);
  return all;
}

// Words that do not repeat, so that compressed bytes are many.
std::string words(uint64_t seed, size_t bytes) {
  Rng rng{seed};
  std::string text;
  while (text.size() < bytes) {
    for (size_t n = 2 + rng.below(8); n > 0; n--) text += char('a' + rng.below(26));
    text += rng.below(12) ? ' ' : '\n';
  }
  text.resize(bytes);
  return text;
}

std::string warc_record(const std::string& type, const std::string& content_type,
                        const std::string& block, int64_t length = -1) {
  return concat("WARC/1.0\r\nWARC-Type: ", type, "\r\nWARC-Target-URI: http://a.example/", type,
                "\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Type: ", content_type,
                "\r\nContent-Length: ", length < 0 ? int64_t(block.size()) : length, "\r\n\r\n",
                block, "\r\n\r\n");
}
std::string http(const std::string& body, const std::string& fields = "") {
  return "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n" + fields + "\r\n" + body;
}
std::string response(const std::string& message, int64_t length = -1) {
  return warc_record("response", "application/http; msgtype=response", message, length);
}
std::string html(const std::string& text) { return "<html><p>" + text + "</p></html>"; }

// ---------------------------------------------------------------------------------------------
// What was read

struct Reading {
  std::vector<Page> pages;
  ProblemCounts problems;
  std::vector<std::string> texts() const {
    std::vector<std::string> all;
    for (const Page& page : pages) all.push_back(page.text);
    return all;
  }
};

Reading read(const std::string& path, const PageOptions& options = {}) {
  Reading reading;
  PageReader reader(Input(path), 3, options);
  for (Page page; reader.next(page);) reading.pages.push_back(page);
  reading.problems = reader.problems();
  return reading;
}

bool equal(const Page& a, const Page& b) {
  return a.place == b.place && a.html == b.html && a.text == b.text && a.url == b.url &&
         a.id == b.id && a.rest == b.rest && a.repaired == b.repaired;
}

// Another reader for each page, which begins where the one before it says. `compressed`: how far
// into the file the last one began.
Reading read_with_restarts(const std::string& path, uint64_t* compressed = nullptr) {
  Reading reading;
  Entry entry;
  for (bool more = true; more;) {
    PageReader reader(Input(path), 3, {}, entry);
    Page page;
    more = reader.next(page);
    if (more) reading.pages.push_back(page);
    if (more && compressed) *compressed = entry.compressed;
    entry = reader.entry();
    for (const auto& [problem, count] : reader.problems()) reading.problems[problem] += count;
  }
  return reading;
}

void check_restarts(const std::string& path, uint64_t* compressed = nullptr) {
  CAPTURE(path);
  const Reading whole = read(path), parts = read_with_restarts(path, compressed);
  CHECK(whole.problems == parts.problems);
  REQUIRE(whole.pages.size() == parts.pages.size());
  for (size_t i = 0; i < whole.pages.size(); i++) CHECK(equal(whole.pages[i], parts.pages[i]));
}

using Counts = ProblemCounts;
using Texts = std::vector<std::string>;

}  // namespace

// ---------------------------------------------------------------------------------------------
// Inputs

TEST_CASE("folders become their files in order of their paths, hidden ones left out") {
  TempDir dir;
  std::filesystem::create_directories(dir / "b/c");
  std::filesystem::create_directories(dir / ".hidden");
  for (const char* name : {"z.html", "b/2.html", "b/c/1.html", "B.html", ".secret", ".hidden/a"}) {
    path_of(dir, name, "x");
  }
  std::vector<std::string> paths;
  for (const Input& input : expand_inputs({dir / "z.html", dir / "b", "-", dir / "B.html"})) {
    paths.push_back(std::filesystem::relative(input.path, dir.path()));
  }
  CHECK(paths.size() == 5);
  CHECK(paths[0] == "z.html");
  CHECK(paths[1] == "b/2.html");
  CHECK(paths[2] == "b/c/1.html");
  CHECK(paths[4] == "B.html");
  CHECK(expand_inputs({dir.path()}).front().path == dir / "B.html");  // by bytes, not by language
  CHECK(expand_inputs({dir.path()}).size() == 4);
  CHECK(expand_inputs({"-"})[0].name == "standard input");
}

TEST_CASE("inputs that are not there or there twice are refused") {
  TempDir dir;
  const std::string file = path_of(dir, "a.html", "x");
  std::filesystem::create_directories(dir / "empty");
  std::filesystem::create_symlink(file, dir / "link.html");
  const auto error = [](const std::vector<std::string>& arguments) {
    return error_of([&] { expand_inputs(arguments); });
  };
  CHECK(contains(error({dir / "none"}), "none: not found"));
  CHECK(contains(error({dir / "empty"}), "found no files in this folder"));
  CHECK(contains(error({file, file}), "a.html: found the same input twice, expected each once"));
  CHECK(contains(error({file, (dir / "empty").string() + "/../a.html"}), "twice, first as"));
  CHECK(contains(error({file, dir / "link.html"}), "link.html: found the same input twice"));
  CHECK(contains(error({dir.path(), file}), "twice"));
  CHECK(contains(error({"-", "-"}), "standard input: found the same input twice"));
  CHECK(contains(error_of([&] { PageReader(Input(dir.path()), 0); }), "found a directory"));
}

// ---------------------------------------------------------------------------------------------
// Kinds

TEST_CASE("the first bytes tell the kind of a file, then its name") {
  TempDir dir;
  const auto kind = [](const std::string& name, const std::string& head) {
    return file_kind(Input(name), head);
  };
  CHECK(kind("a.txt", "WARC/1.0\r\n") == FileKind::warc);
  CHECK(kind("a.txt", "PAR1") == FileKind::parquet);
  for (const char* head :
       {"<!DOCTYPE html>", "<!doctype HTML PUBLIC", "\n <html lang=en>", "<HEAD>", "<body class=a>",
        "<!-- a --><!-- b -->\n<!doctype html>", "\xef\xbb\xbf<html>",
        "<?xml version=\"1.0\"?>\n<!DOCTYPE html PUBLIC>", "\xff\xfe<\0h\0t\0m\0l\0>\0"}) {
    const std::string bytes = head[0] == '\xff' ? std::string(head, 14) : head;
    CHECK_MESSAGE(kind("a.txt", bytes) == FileKind::html, bytes);
  }
  CHECK(kind("a.txt", "<header> is a tag") == FileKind::text);
  CHECK(kind("a.txt", "<htmlish>") == FileKind::text);
  CHECK(kind("a.txt", "{\"text\": 1}\n{") == FileKind::json);
  CHECK(kind("a.txt", "\n\n {}\n") == FileKind::json);
  CHECK(kind("a.txt", "{ a set }\n") == FileKind::text);
  CHECK(kind("a.txt", "[\n {\"text\": 1}\n]") == FileKind::json);
  CHECK(kind("a.txt", "[1, 2]\n") == FileKind::text);
  CHECK(kind("a.txt", "[[a link]]\n") == FileKind::text);
  CHECK(kind("a", "{\n  \"html\": \"<p>\"\n}") == FileKind::json);
  CHECK(kind("package.json", "{\n  \"name\": \"a\"\n}") == FileKind::text);
  CHECK(kind("a.txt", "{\"text\": \"" + std::string(1 << 17, 'a')) == FileKind::json);
  CHECK(kind("a.jsonl.gz", "garbage") == FileKind::json);
  CHECK(kind("a.json", "[") == FileKind::json);
  CHECK(kind("a.ndjson.zst", "") == FileKind::json);
  CHECK(kind("a.htm", "text") == FileKind::html);
  CHECK(kind("a.xhtml.gz", "text") == FileKind::html);
  CHECK(kind("html", "text") == FileKind::text);
}

TEST_CASE("files of no text are counted, and those that must be unpacked") {
  TempDir dir;
  CHECK(read(path_of(dir, "a", "%PDF-1.7")).problems == Counts{{"skipped: a PDF file", 1}});
  CHECK(read(path_of(dir, "a", "\x89PNG\r\n")).problems == Counts{{"skipped: an image", 1}});
  CHECK(read(path_of(dir, "a", "BZh9")).problems == Counts{{"skipped: bzip2 data", 1}});
  CHECK(read(path_of(dir, "a", std::string(1000, '\0'))).problems ==
        Counts{{"skipped: binary data", 1}});
  CHECK(read(path_of(dir, "a", "")).problems == Counts{{"empty file", 1}});
  CHECK(read(path_of(dir, "a.html", "")).problems == Counts{{"empty file", 1}});
  CHECK(contains(error_of([&] { read(path_of(dir, "a.gz", "text")); }), "expected gzip data"));
}

// ---------------------------------------------------------------------------------------------
// WARC

TEST_CASE("warcio's files are read, the broken ones too") {
  if (skip_without_data("warc/example.warc")) return;
  const auto file = [](const std::string& name) { return read(data_path("warc/" + name)); };
  const Counts skipped = {{"skipped: WARC record of type warcinfo", 2},
                          {"skipped: WARC record of type request", 2},
                          {"skipped: WARC record of type revisit", 1}};
  const auto check_example = [](const Page& page) {
    CHECK(page.html);
    CHECK(page.url == "http://example.com/");
    CHECK(page.text.size() == 1270);
    CHECK(page.text.starts_with("<!doctype html>"));
    CHECK(contains(page.text, "established to be used for illustrative examples"));
    CHECK(page.text.ends_with("</html>\n"));
  };
  // Each record in a member of its own; the body is gzip.
  for (const char* name : {"example.warc", "example.warc.gz", "example-bad-non-chunked.warc.gz"}) {
    CAPTURE(name);
    const Reading r = file(name);
    REQUIRE(r.pages.size() == 1);
    check_example(r.pages[0]);
    CHECK(r.pages[0].place == Place{3, 1197});
    CHECK(r.pages[0].id == "<urn:uuid:a9c51e3e-0221-11e7-bf66-0242ac120005>");
    CHECK(r.problems == skipped);
  }
  const Reading chunked = file("example-iana.org-chunked.warc");
  REQUIRE(chunked.pages.size() == 1);
  CHECK(chunked.pages[0].text.starts_with("<!doctype html>\n<html>"));
  CHECK(chunked.pages[0].text.ends_with("</html>\n"));
  CHECK(chunked.pages[0].text.size() == 0x1c37);
  CHECK(chunked.problems == Counts{{"skipped: WARC record of type warcinfo", 1},
                                   {"skipped: WARC record of type request", 1}});
  // The response's length is too short by two: its block ends where the next record begins.
  const Reading short_length = file("example-trunc.warc");
  REQUIRE(short_length.pages.size() == 1);
  check_example(short_length.pages[0]);
  CHECK(short_length.problems == Counts{{"skipped: WARC record of type warcinfo", 2},
                                        {"skipped: WARC record of type request", 1},
                                        {"wrong WARC Content-Length", 1}});
  // A record that is cut into three gzip members, against the standard.
  const Reading three = file("example-wrong-chunks.warc.gz");
  REQUIRE(three.pages.size() == 1);
  check_example(three.pages[0]);
  CHECK(three.problems == Counts{{"skipped: WARC record of type request", 1}});
  // All records in one member; the last is a redirection with a body.
  const Reading one = file("example-bad.warc.gz.bad");
  REQUIRE(one.pages.size() == 2);
  CHECK(one.pages[0].url == "http://example.com?example=1");
  CHECK(one.pages[1].url == "http://www.iana.org/domains/example");
  CHECK(contains(one.pages[1].text, "302 Found"));
  for (const auto& entry : std::filesystem::directory_iterator(data_path("warc"))) {
    check_restarts(entry.path());
  }
}

TEST_CASE("HTTP bodies are taken out of chunks and encodings, and as they are where these lie") {
  TempDir dir;
  const std::string page = html(words(1, 3000));
  const auto text = [&](const std::string& body, const std::string& fields) {
    const Reading r = read(path_of(dir, "a.warc", response(http(body, fields))));
    CHECK(r.pages.size() + r.problems.size() == 1);
    return r.pages.empty() ? r.problems.begin()->first : r.pages[0].text;
  };
  const std::string chunked = "Transfer-Encoding: chunked\r\n";
  const std::string chunks = "7d0\r\n" + page.substr(0, 2000) + "\r\n" +
                             format("%zx;extension=1\r\n", page.size() - 2000) + page.substr(2000) +
                             "\r\n0\r\n\r\n";
  CHECK(text(page, "") == page);
  CHECK(text(chunks, chunked) == page);
  CHECK(text(chunks.substr(0, 2500), chunked).starts_with(page.substr(0, 2000)));
  CHECK(text(page, chunked) == page);  // claims chunks, has none
  const std::string damaged = "7d0\r\n" + page.substr(0, 2000) + "\r\nnone\r\n";
  CHECK(text(damaged, chunked) == page.substr(0, 2000) + "none\r\n");
  CHECK(text("abba sings<br>\n" + page, chunked) == "abba sings<br>\n" + page);  // "abba": no size
  CHECK(text("ffffffffffffffff\r\n" + page, chunked) == page);
  CHECK(text(deflated(page), "Content-Encoding: gzip\r\n") == page);
  CHECK(text(deflated(page), "content-encoding:X-GZIP\r\n") == page);
  CHECK(text(deflated(page, 15), "Content-Encoding: deflate\r\n") == page);
  CHECK(text(deflated(page, -15), "Content-Encoding: deflate\r\n") == page);
  CHECK(text(deflated(deflated(page, 15)), "Content-Encoding: deflate, gzip\r\n") == page);
  CHECK(text(page, "Content-Encoding: gzip\r\n") == page);
  CHECK(text(page, "Content-Encoding: deflate\r\n") == page);
  CHECK(text(page, "Content-Encoding: br\r\n") == page);
  CHECK(text(format("%zx\r\n", deflated(page).size()) + deflated(page) + "\r\n0\r\n\r\n",
             chunked + "Content-Encoding: gzip\r\n") == page);
  const std::string cut = text(deflated(page).substr(0, 900), "Content-Encoding: gzip\r\n");
  CHECK(cut.size() > 500);
  CHECK(page.starts_with(cut));
  CHECK(text("\x1f\x8b\x08 no gzip", "Content-Encoding: gzip\r\n") == "damaged Content-Encoding");
  CHECK(text("\x01\x02", "Content-Encoding: br\r\n") == "Content-Encoding of another kind");
  const Reading bomb = read(
      path_of(dir, "a.warc",
              response(http(deflated(std::string(1 << 20, ' ')), "Content-Encoding: gzip\r\n"))),
      {.max_page_bytes = 1 << 19});
  CHECK(bomb.problems == Counts{{"damaged Content-Encoding", 1}});  // 1 MB in 1 KB
  CHECK(text(" \r\n", "") == "skipped: empty page");
}

TEST_CASE("records of text and pages are taken, others counted") {
  TempDir dir;
  const std::string warc = join({
      warc_record("warcinfo", "application/warc-fields", "software: x\r\n"),
      warc_record("conversion", "text/plain", "plain text"),
      warc_record("conversion", "application/json", "{}"),
      warc_record("resource", "text/html; charset=utf-8", html("a resource")),
      warc_record("resource", "image/png", "\x89PNG"),
      response("HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n<html>"),
      response("HTTP/1.1 200 OK\r\nContent-Type: application/xhtml+xml\r\n\r\n" + html("xhtml")),
      response("HTTP/1.1 200 OK\r\n\r\n" + html("no type")),
      response("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nplain"),
      response(html("no HTTP")),
      warc_record("invented", "text/html", html("of no known type")),
  });
  const Reading r = read(path_of(dir, "a.warc", warc));
  CHECK(r.texts() ==
        Texts{"plain text", html("a resource"), html("xhtml"), html("no type"), html("no HTTP")});
  CHECK(!r.pages[0].html);
  CHECK(r.pages[1].html);
  CHECK(r.pages[0].url == "http://a.example/conversion");
  CHECK(r.problems == Counts{{"skipped: WARC record of type warcinfo", 1},
                             {"skipped: WARC record of another type", 1},
                             {"skipped: neither HTML nor text", 4}});
  // The crawler's finding is worth more than the server's word; brackets around a URL go.
  const Reading found =
      read(path_of(dir, "a.warc",
                   "WARC/1.1\nwarc-type:response\nWARC-Target-URI: <http://b.example/>\n"
                   "WARC-Identified-Payload-Type: text/html\nContent-Length: 55\n\n"
                   "HTTP/1.1 200 OK\nContent-Type: image/png\n\n<html>a</html>\n\n"));
  REQUIRE(found.pages.size() == 1);
  CHECK(found.pages[0].text == "<html>a</html>");
  CHECK(found.pages[0].url == "http://b.example/");
}

TEST_CASE("lengths that lie, damaged headers and garbage cost no other record") {
  TempDir dir;
  const std::string a = response(http(html(words(1, 500)))), c = response(http(html("c")));
  const std::string body = html(words(2, 700)), message = http(body);
  const std::string text_a = html(words(1, 500)), text_c = html("c");
  const auto middle = [&](const std::string& b) {
    const std::string path = path_of(dir, "a.warc", a + b + c);
    check_restarts(path);
    return read(path);
  };
  for (const int64_t length :
       {int64_t(0), int64_t(1), int64_t(message.size() - 1), int64_t(message.size() + 5),
        int64_t(message.size() + 300), int64_t(message.size() + 1000), int64_t(1) << 24,
        int64_t(1) << 40, std::numeric_limits<int64_t>::max()}) {
    CAPTURE(length);
    const Reading r = middle(response(message, length));
    CHECK(r.texts() == Texts{text_a, body, text_c});
    CHECK(r.problems == Counts{{"wrong WARC Content-Length", 1}});
  }
  for (const char* length : {"-5", "abc", "", "99999999999999999999999", "7 7", "0x10"}) {
    std::string record = response(message);
    const size_t begin = record.find("Content-Length: ") + 16;
    record.replace(begin, record.find('\r', begin) - begin, length);
    const Reading r = middle(record);
    CHECK(r.texts() == Texts{text_a, body, text_c});
    CHECK(r.problems == Counts{{"wrong WARC Content-Length", 1}});
  }
  Reading r = middle("garbage\r\n" + words(3, 5000) + "\n");
  CHECK(r.texts() == Texts{text_a, text_c});
  CHECK(r.problems == Counts{{"bytes that are no WARC record", 1}});
  r = middle("WARC/1.0\r\nWARC-Type: response\r\n");  // a header without an end
  CHECK(r.texts() == Texts{text_a, text_c});
  CHECK(r.problems == Counts{{"damaged WARC header", 1}});
  r = middle("WARC/1.0\r\n" + words(4, 3 << 20) + "\n\n");  // a header of 3 MB
  CHECK(r.texts() == Texts{text_a, text_c});
  CHECK(r.problems == Counts{{"damaged WARC header", 1}});
  r = middle(response(http("<html>In a page:\n\nWARC/1.0\r\nWARC-Type: response\r\n\r\n</html>")));
  CHECK(r.pages.size() == 3);  // a length that is right is believed
  CHECK(r.problems.empty());
}

TEST_CASE("a truncated archive gives what is there") {
  TempDir dir;
  const std::string body = html(words(2, 700));
  const std::string a = response(http(html("a"))), b = response(http(body));
  const size_t body_begin = (a + b).find(body);
  for (size_t size = a.size(); size < a.size() + b.size(); size += 13) {
    CAPTURE(size);
    const std::string path = path_of(dir, "a.warc", (a + b).substr(0, size));
    const Reading r = read(path);
    REQUIRE(r.pages.size() >= 1);
    CHECK(r.pages[0].text == html("a"));
    const size_t there = size > body_begin ? std::min(size - body_begin, body.size()) : 0;
    if (there > 0) {
      REQUIRE(r.pages.size() == 2);
      CHECK(r.pages[1].text == body.substr(0, there));
    }
    const bool is_cut = size > a.size() && there < body.size();
    CHECK(r.problems.count("truncated WARC record") == size_t(is_cut));
    check_restarts(path);
  }
}

TEST_CASE("records longer than a page may be are skipped in bounded memory") {
  TempDir dir;
  const std::string large = response(http(html(words(1, 5 << 20))));
  const std::string path =
      path_of(dir, "a.warc", join({response(http(html("a"))), large, response(http(html("b")))}));
  const PageOptions options{.max_page_bytes = 1 << 16};
  const Reading r = read(path, options);
  CHECK(r.texts() == Texts{html("a"), html("b")});
  CHECK(r.problems == Counts{{"page too long", 1}});
  CHECK(read(path).pages.size() == 3);
}

// ---------------------------------------------------------------------------------------------
// Compression: damage

TEST_CASE("a damaged gzip member costs its own record, not those behind it") {
  TempDir dir;
  std::vector<std::string> records;
  Texts texts;
  for (uint64_t i = 0; i < 9; i++) {
    texts.push_back(html(words(i, 2000)));
    records.push_back(response(http(texts.back())));
  }
  for (const Compress compress : {Compress(gzip), Compress(zstandard)}) {
    const std::string kind = compress == Compress(gzip) ? "gzip" : "Zstandard";
    const std::string path = path_of(dir, "a.warc", join(records, compress));
    CHECK(read(path).texts() == texts);
    const size_t begin = join({records[0], records[1], records[2]}).size();
    const size_t third =
        (compress(records[0]) + compress(records[1]) + compress(records[2])).size();
    const size_t bytes = compress(records[3]).size();
    for (size_t k = 0; k < bytes; k += bytes / 20) {
      CAPTURE(k);
      std::string damaged = join(records, compress);
      damaged[third + k] ^= 0x41;
      const std::string file = path_of(dir, "b.warc", damaged);
      const Reading r = read(file);
      // Some bytes of a gzip header mean nothing: the time, for one.
      if (r.texts() == texts) continue;
      // What the damaged member gave may be no record any more.
      CHECK(r.problems.count("damaged " + kind + " data") +
                r.problems.count("truncated " + kind + " data") ==
            1);
      Texts others = r.texts();
      REQUIRE(others.size() >= 8);
      if (others.size() == 9) {
        CHECK(r.pages[3].place.offset == begin);
        others.erase(others.begin() + 3);
      }
      Texts expected = texts;
      expected.erase(expected.begin() + 3);
      CHECK(others == expected);
      check_restarts(file);
    }
  }
}

TEST_CASE("damage that is noticed beyond the next member's beginning costs no other record") {
  TempDir dir;
  const std::string a = response(http(html("a"))), b = response(http(html(words(1, 800))));
  // A stored block whose length reaches into the next member: header, block type, length and its
  // complement, bytes.
  const uint16_t length = uint16_t(a.size() + 300), complement = uint16_t(~length);
  std::string lying("\x1f\x8b\x08\0\0\0\0\0\0\x03\x01", 11);
  for (const uint16_t n : {length, complement}) lying += {char(n & 0xff), char(n >> 8)};
  const std::string path = path_of(dir, "a.warc.gz", lying + a + gzip(b) + gzip(a));
  const Reading r = read(path);
  REQUIRE(r.pages.size() == 3);
  CHECK(r.pages[0].text == html("a"));
  CHECK(r.pages[1].text == html(words(1, 800)));
  CHECK(r.pages[2].text == html("a"));
  CHECK(r.problems.at("damaged gzip data") == 1);
  check_restarts(path);
}

TEST_CASE("truncated compression gives what was read before") {
  TempDir dir;
  std::string lines;
  Texts texts;
  for (uint64_t i = 0; i < 50; i++) {
    texts.push_back(words(i, 300));
    lines += Json{{"text", texts.back()}}.dump() + "\n";
  }
  for (const Compress compress : {Compress(gzip), Compress(zstandard)}) {
    const std::string kind = compress == Compress(gzip) ? "gzip" : "Zstandard";
    const std::string whole = compress(lines);
    for (const size_t size : {whole.size() - 1, whole.size() * 2 / 3, size_t(30)}) {
      const std::string path = path_of(dir, "a.jsonl.x", whole.substr(0, size));
      const Reading r = read(path);
      CHECK(r.problems == Counts{{"truncated " + kind + " data", 1}});
      const Texts found = r.texts();
      REQUIRE(found.size() <= texts.size());
      CHECK(std::equal(found.begin(), found.end(), texts.begin()));
      check_restarts(path);
      if (compress == Compress(gzip) && size > 1000) CHECK(found.size() > 20);
    }
  }
  const std::string text = words(5, 5000), page = html(text);
  const Reading cut_text = read(path_of(dir, "a.txt.gz", gzip(text).substr(0, 2000)));
  REQUIRE(cut_text.pages.size() == 1);
  CHECK(text.starts_with(cut_text.pages[0].text));
  CHECK(cut_text.problems == Counts{{"truncated gzip data", 1}});
  const Reading cut_page = read(path_of(dir, "a.html.gz", gzip(page).substr(0, 2000)));
  REQUIRE(cut_page.pages.size() == 1);
  CHECK(page.starts_with(cut_page.pages[0].text));
  CHECK(read(path_of(dir, "a.txt.gz", gzip(text) + "garbage")).problems ==
        Counts{{"damaged gzip data", 1}});
}

TEST_CASE("JSON lines go on behind a damaged member") {
  TempDir dir;
  const auto line = [](uint64_t i) { return Json{{"text", words(i, 900)}}.dump() + "\n"; };
  const std::string first = gzip(line(1) + line(2)), third = gzip(line(5) + line(6));
  std::string second = gzip(line(3) + line(4));
  second[second.size() / 2] ^= 0x55;
  const std::string path = path_of(dir, "a.jsonl.gz", first + second + third);
  const Reading r = read(path);
  REQUIRE(r.pages.size() >= 4);
  CHECK(r.pages[r.pages.size() - 1].text == words(6, 900));
  CHECK(r.pages[r.pages.size() - 2].text == words(5, 900));
  CHECK(r.problems.at("damaged gzip data") == 1);
  check_restarts(path);
}

// ---------------------------------------------------------------------------------------------
// JSON lines

TEST_CASE("of JSON lines text, url and id are taken and the rest is kept as written") {
  TempDir dir;
  const auto page = [&](const std::string& line, const PageOptions& options = {}) {
    const Reading r = read(path_of(dir, "a.jsonl", line + "\n"), options);
    REQUIRE(r.pages.size() == 1);
    CHECK(r.problems.empty());
    return r.pages[0];
  };
  Page p = page(R"({ "score" : 0.50 , "text":"a\nb", "url":"http://u/","id":"x",)"
                R"("meta":{"a":[1,{"b":"}]\\\""}],"c":null} , "t\u0061g":[ ],"n":-1e3})");
  CHECK(p.text == "a\nb");
  CHECK(!p.html);
  CHECK(p.url == "http://u/");
  CHECK(p.id == "x");
  CHECK(p.rest ==
        R"("score":0.50,"meta":{"a":[1,{"b":"}]\\\""}],"c":null},"t\u0061g":[ ],"n":-1e3)");
  p = page(R"({"html":"<p>x","text":"t"})");
  CHECK(p.text == "t");
  CHECK(p.rest == R"("html":"<p>x")");
  p = page(R"({"html":"<p>x","text":null,"id":17,"url":null,"a":1})");
  CHECK(p.html);
  CHECK(p.text == "<p>x");
  CHECK(p.id == "17");
  CHECK(p.url == "");
  CHECK(p.rest == R"("a":1)");
  p = page(R"({"t\u0065xt":"escaped key"})");
  CHECK(p.text == "escaped key");
  CHECK(p.rest == "");
  p = page(R"({"content":"c","text":"t","raw":"r"})", {.text_key = "content"});
  CHECK(p.text == "c");
  CHECK(p.rest == R"("raw":"r")");  // the text is written as "text": two would be one too many
  CHECK(page("\xef\xbb\xbf{\"text\":\"behind a mark\"}\r").text == "behind a mark");
}

TEST_CASE("numbers that few programs read pass, and the rest of a page stays JSON") {
  TempDir dir;
  const Reading r = read(path_of(
      dir, "a.jsonl",
      "{\"text\":\"a\",\"n\":92233720368547758423,\"x\":{\"y\":[NaN,-Infinity,\"NaN\"]}}\n"));
  CHECK(r.texts() == Texts{"a"});
  CHECK(r.problems.empty());
  CHECK(r.pages[0].rest == R"("n":92233720368547758423,"x":{"y":[null,null,"NaN"]})");
}

TEST_CASE("pages of a JSON array, of objects over several lines and of a list in an object") {
  TempDir dir;
  std::string list, lines;
  Texts texts;
  for (int i = 0; i < 300; i++) {
    texts.push_back(std::string(size_t(1 + i * 7), char('a' + i % 26)));
    lines +=
        concat("{\n  \"id\": ", i, ",\n  \"text\": \"", texts.back(), "\",\n  \"m\": [{}]\n}\n");
    list += concat(i ? ",\n " : "", "{\"id\": ", i, ", \"text\": \"", texts.back(), "\"}");
  }
  for (const std::string& bytes :
       {"[" + list + "]\n", lines, "{\"version\": 1, \"data\": [" + list + "], \"n\": {}}"}) {
    CAPTURE(bytes.substr(0, 30));
    for (const std::string& path :
         {path_of(dir, "a.json", bytes), path_of(dir, "a.gz", gzip(bytes))}) {
      const Reading r = read(path);
      CHECK(r.texts() == texts);
      CHECK(r.problems.empty());
      CHECK(r.pages[7].id == "7");
      check_restarts(path);
    }
  }
  const std::string bad =
      path_of(dir, "bad.json",
              "[\n  {\"text\": \"a\"},\n  {\"text\": 1},\n  {\"text\": \"b\n  },\n  {\"text\": \"" +
                  std::string(5000, 'x') + "\"},\n  {\"text\": \"c\"}\n]");
  const Reading r = read(bad, {.max_page_bytes = 1000});
  CHECK(r.texts() == Texts{"a", "c"});
  CHECK(r.problems == Counts{{"no text", 1}, {"not JSON", 1}, {"page too long", 1}});
  check_restarts(bad);
}

TEST_CASE("lines that are no documents are counted") {
  TempDir dir;
  const std::string deep =
      "{\"text\":\"x\",\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}\n";
  const std::string deep_object =
      join(std::vector<std::string>(100000, "{\"a\":")) + "1" + std::string(100000, '}') + "\n";
  const std::string path = path_of(
      dir, "a.jsonl",
      "{\"text\":\"one\"}\n\n \r\nnot JSON\n[1]\n{\"text\":1}\n{}\n{\"text\":\"x\"\n" + deep +
          deep_object + std::string("{\"text\":\"\0\"}\n", 13) + "{\"text\":\"nul\\u0000\"}\n" +
          std::string(3, '\0') + "\n{\"text\":\"x\",\"n\":01}\n{\"text\":\"last\"}");
  const Reading r = read(path);
  CHECK(r.texts() == Texts{"one", std::string("nul\0", 4), "last"});
  CHECK(r.problems == Counts{{"JSON number that cannot be read", 1},
                             {"not JSON", 5},
                             {"no text", 2},
                             {"JSON nested too deeply", 2}});
  check_restarts(path);
}

// The most memory that this process has used since the last call, in MB.
double peak_megabytes() {
  double kilobytes = 0;
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) kilobytes = std::atof(line.c_str() + 6);
  }
  std::ofstream("/proc/self/clear_refs") << "5";
  return kilobytes / 1000;
}

TEST_CASE("a line or record of 100 MB is skipped in bounded memory") {
  TempDir dir;
  std::string megabytes;
  const std::string megabyte = gzip(std::string(1 << 20, 'x'));
  for (int i = 0; i < 100; i++) megabytes += megabyte;
  const std::string lines =
      path_of(dir, "a.jsonl.gz",
              gzip("{\"text\":\"a\"}\n{\"text\":\"") + megabytes + gzip("\"}\n{\"text\":\"b\"}\n"));
  const std::string record = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\n";
  const std::string warc =
      path_of(dir, "a.warc.gz",
              gzip(concat(record, "Content-Length: ", 100 << 20, "\r\n\r\n")) + megabytes +
                  gzip("\r\n\r\n" + record + "Content-Length: 1\r\n\r\nb\r\n\r\n"));
  const std::string text = path_of(dir, "a.txt.gz", megabytes + gzip("\n<|endoftext|>\nb\n"));
  for (const std::string& path : {lines, warc, text}) {
    CAPTURE(path);
    peak_megabytes();
    const double before = peak_megabytes();
    const Reading r = read(path, {.max_page_bytes = 4 << 20});
    CHECK(peak_megabytes() < before + 30);
    REQUIRE(!r.pages.empty());
    CHECK(r.pages.back().text == "b");
    CHECK(r.pages.size() == (path == lines ? 2 : 1));
    CHECK(r.problems == Counts{{"page too long", 1}});
  }
}

TEST_CASE("invalid UTF-8 in JSON is repaired or the page dropped, as asked") {
  TempDir dir;
  const std::string path = path_of(dir, "a.jsonl",
                                   "{\"text\":\"a\xff"
                                   "b\"}\n{\"text\":\"half \\ud83d and "
                                   "\\ud83d\\ude00 \\\\ud83d\"}\n{\"text\":\"good\"}\n");
  const Reading r = read(path);
  CHECK(r.texts() == Texts{"a\ufffdb", "half \ufffd and \U0001F600 \\ud83d", "good"});
  CHECK(r.pages[0].repaired);
  CHECK(r.pages[1].repaired);
  CHECK(!r.pages[2].repaired);
  const Reading dropped = read(path, {.drop_invalid = true});
  CHECK(dropped.texts() == Texts{"good"});
  CHECK(dropped.problems == Counts{{"invalid UTF-8, dropped", 2}});
}

// ---------------------------------------------------------------------------------------------
// Plain text and HTML

TEST_CASE("a plain text is one document, or is divided by lines of <|endoftext|>") {
  TempDir dir;
  const auto texts = [&](const std::string& content) {
    const std::string path = path_of(dir, "a.txt", content);
    check_restarts(path);
    return read(path).texts();
  };
  CHECK(texts("one\ntwo\n") == Texts{"one\ntwo"});
  CHECK(texts("one") == Texts{"one"});
  CHECK(texts("\xef\xbb\xbfone") == Texts{"one"});
  CHECK(texts("one\n<|endoftext|>\ntwo\n\n<|endoftext|>\r\nthree\r\n<|endoftext|>") ==
        Texts{"one", "two\n", "three"});
  CHECK(texts("<|endoftext|>\n\n<|endoftext|>\none") == Texts{"one"});
  CHECK(texts("a <|endoftext|>\n<|endoftext|> b\n<|endoftext|>\nc") ==
        Texts{"a <|endoftext|>\n<|endoftext|> b", "c"});
  CHECK(texts("\n") == Texts{});
  // Dividers at every place about the end of a block.
  for (size_t before = (1 << 17) - 110; before < (1 << 17) - 50; before++) {
    const std::string a(before, 'a'), path = path_of(dir, "a.txt", a + "\n<|endoftext|>\nb\n");
    REQUIRE(read(path).texts() == Texts{a, "b"});
  }
  const std::string path =
      path_of(dir, "a.txt", "a\n<|endoftext|>\n" + words(1, 5 << 20) + "\n<|endoftext|>\nb\n");
  const Reading r = read(path, {.max_page_bytes = 1 << 16});
  CHECK(r.texts() == Texts{"a", "b"});
  CHECK(r.problems == Counts{{"page too long", 1}});
}

TEST_CASE("a file of HTML is one page with the address that it gives") {
  TempDir dir;
  const auto page = [&](const std::string& content) {
    const std::string path = path_of(dir, "a.html", content);
    check_restarts(path);
    const Reading r = read(path);
    REQUIRE(r.pages.size() == 1);
    CHECK(r.pages[0].html);
    CHECK(r.pages[0].text == content);
    return r.pages[0].url;
  };
  CHECK(page("plain") == "");
  CHECK(page("<html><link rel=\"canonical\" href=\"https://a.example/?a=1&amp;b=2\">") ==
        "https://a.example/?a=1&b=2");
  CHECK(page("<html><link href=https://a.example/ rel=canonical>") == "https://a.example/");
  CHECK(page("<html><link rel=canonical href=/relative><meta property='og:url' "
             "content='http://b.example/'>") == "http://b.example/");
  CHECK(page("<html>canonical <meta content=http://b.example/ name=og:url>") ==
        "http://b.example/");
  CHECK(page("<html><a href=http://c.example/ class=canonical>") == "");
  const Reading r = read(path_of(dir, "a.html", html(words(1, 2 << 20))), {.max_page_bytes = 999});
  CHECK(r.pages.empty());
  CHECK(r.problems == Counts{{"page too long", 1}});
}

// ---------------------------------------------------------------------------------------------
// Charsets

TEST_CASE("pages of every charset become UTF-8") {
  TempDir dir;
  const auto converted = [](const std::string& utf8, const char* charset) {
    const iconv_t converter = iconv_open(charset, "UTF-8");
    REQUIRE(converter != iconv_t(-1));
    std::string out(4 * utf8.size() + 16, '\0');
    char *in = const_cast<char*>(utf8.data()), *target = out.data();
    size_t left = utf8.size(), room = out.size();
    CHECK(iconv(converter, &in, &left, &target, &room) == 0);
    iconv(converter, nullptr, nullptr, &target, &room);
    iconv_close(converter);
    out.resize(size_t(target - out.data()));
    return out;
  };
  const auto decoded = [&](const std::string& bytes, const std::string& label) {
    const std::string message =
        "HTTP/1.1 200 OK\r\nContent-Type: text/html" + label + "\r\n\r\n" + bytes;
    const Reading r = read(path_of(dir, "a.warc", response(message)));
    REQUIRE(r.pages.size() == 1);
    return r.pages[0];
  };
  struct Case {
    const char *label, *charset, *text;
  };
  const Case cases[] = {
      {"iso-8859-1", "CP1252", "Der Käse – „größer“ für Füße, 5 €, die Straße hinauf, über Äcker."},
      {"windows-1252", "CP1252", "Le garçon a mangé l’œuf à Noël, où la fenêtre était fermée."},
      {"Shift_JIS", "CP932", "吾輩は猫である。名前はまだ無い。①どこで生れたかとんと見当がつかぬ。"},
      {"euc-jp", "EUC-JP", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"},
      {"gb2312", "GB18030", "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠。镕"},
      {"big5", "BIG5", "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍。"},
      {"euc-kr", "EUC-KR", "나의 살던 고향은 꽃피는 산골 복숭아꽃 살구꽃 아기 진달래"},
      {"koi8-r", "KOI8-R", "Все счастливые семьи похожи друг на друга, каждая несчастливая семья."},
      {"windows-1251", "CP1251",
       "Все смешалось в доме Облонских. Жена узнала, что муж был связан."},
      {"iso-8859-2", "ISO-8859-2", "Pchnąć w tę łódź jeża lub ośm skrzyń fig. Zażółć gęślą jaźń."},
      {"iso-8859-7", "ISO-8859-7",
       "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Η γλώσσα μου έδωσαν ελληνική."},
      {"iso-2022-jp", "ISO-2022-JP", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと。"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.label);
    const std::string text = concat("<html><body><p>", c.text, "</p>", c.text, "</body></html>");
    Page page = decoded(converted(text, c.charset), concat("; charset=\"", c.label, "\""));
    CHECK(page.text == text);
    CHECK(!page.repaired);
    const std::string with_meta =
        concat("<html><head><META http-equiv=Content-Type content='text/html; charset = ", c.label,
               "'></head><p>", c.text, "</p></html>");
    CHECK(decoded(converted(with_meta, c.charset), "").text == with_meta);
    CHECK(decoded(text, concat("; charset=", c.label)).text == text);  // valid UTF-8 wins
  }
  // Without any label the detector looks at the bytes.
  for (const size_t i : {2u, 4u, 6u, 7u}) {
    const std::string text = concat("<html><p>", cases[i].text, cases[i].text, "</p></html>");
    CAPTURE(cases[i].label);
    CHECK(decoded(converted(text, cases[i].charset), "").text == text);
    CHECK(decoded(converted(text, cases[i].charset), "; charset=invented").text == text);
  }
  // Two letters alone: the header is believed before the page, and the page before the detector.
  const std::string meta = "<html><meta charset=windows-1251>", letters = "\xca\xe9";
  CHECK(decoded(meta + letters, "; charset=koi8-r").text == meta + "йИ");
  CHECK(decoded(meta + letters, "").text == meta + "Кй");
  CHECK(
      decoded("<?xml version='1.0' encoding='koi8-r'?><html>" + letters, "").text.ends_with("йИ"));
  // UTF-16, with its mark and without; a mark of UTF-8 goes.
  const std::string text = "<html><p>Größe, 吾輩 \U0001F600</p></html>";
  for (const char* charset : {"UTF-16LE", "UTF-16BE"}) {
    const std::string mark = charset[6] == 'L' ? "\xff\xfe" : "\xfe\xff";
    CHECK(decoded(mark + converted(text, charset), "").text == text);
    CHECK(decoded(converted(text, charset), "; charset=utf-16").text == text);
    const Reading r = read(path_of(dir, "a.txt", mark + converted("plain\nGröße\n", charset)));
    CHECK(r.texts() == Texts{"plain\nGröße\n"});
  }
  CHECK(decoded("\xef\xbb\xbf" + text, "").text == text);
  const Reading file = read(path_of(dir, "a.html", "\xff\xfe" + converted(text, "UTF-16LE")));
  CHECK(file.texts() == Texts{text});
}

TEST_CASE("bytes of no charset are repaired or the page dropped, as asked") {
  TempDir dir;
  std::string many = "<html><p>";
  for (int i = 0; i < 20; i++) many += "Größe – ";
  // A page of UTF-8 that was cut and joined: what is left is UTF-8 still, whatever its label says.
  const std::string path = path_of(
      dir, "a.warc", response(http(many + "\xe2\x82 \xff \xed\xa0\x80 \xf0\x9f\x98</html>")));
  const Reading r = read(path);
  REQUIRE(r.pages.size() == 1);
  CHECK(r.pages[0].text == many + "\ufffd \ufffd \ufffd\ufffd\ufffd \ufffd</html>");
  CHECK(r.pages[0].repaired);
  CHECK(read(path, {.drop_invalid = true}).problems == Counts{{"invalid UTF-8, dropped", 1}});
  const std::string text_path = path_of(dir, "a.txt", "caf\xe9 and \xc3\xa9\n");
  const Reading text = read(text_path);
  CHECK(text.texts() == Texts{"caf\ufffd and é"});
  CHECK(text.pages[0].repaired);
  CHECK(read(text_path, {.drop_invalid = true}).pages.empty());
  std::string all;
  for (int i = 0; i < 256; i++) all += char(i);
  const Reading bytes = read(path_of(dir, "a.html", "<html>" + all + all));
  REQUIRE(bytes.pages.size() == 1);
  CHECK(is_utf8(bytes.pages[0].text));
}

// ---------------------------------------------------------------------------------------------
// Parquet

TEST_CASE("rows of parquet become pages with their other columns") {
  const std::string path = "test/golden/parquet/pyarrow_zstd_v2.parquet";
  PageReader reader(Input(path), 0);
  parquet::Reader rows(path);
  Page page;
  int64_t pages = 0;
  uint64_t last = 0;
  while (reader.next(page)) {
    CHECK((pages == 0 || page.place.offset > last));
    last = page.place.offset;
    pages++;
    CHECK(Json::parse("{" + page.rest + "}").is_object());
    CHECK(Json::parse("{" + page.rest + "}").size() >= 1);
    CHECK(reader.progress() <= 1);
  }
  const auto nulls = reader.problems().find("null text");
  CHECK(pages + (nulls == reader.problems().end() ? 0 : nulls->second) == rows.rows());
  CHECK(pages > 0);
  check_restarts(path);
}

TEST_CASE("parquet that cannot be read from its end is refused") {
  TempDir dir;
  const std::string bytes = read_file("test/golden/parquet/pyarrow_zstd_v2.parquet");
  CHECK(contains(error_of([&] { read(path_of(dir, "a.parquet.gz", gzip(bytes))); }),
                 "found parquet inside gzip or Zstandard, expected a file"));
  CHECK(contains(error_of([&] { read(path_of(dir, "a.parquet", bytes.substr(0, 2000))); }),
                 "a.parquet: "));
}

// ---------------------------------------------------------------------------------------------
// Restarts

TEST_CASE("reading with a restart behind every page equals reading in one go, for every kind") {
  TempDir dir;
  std::vector<std::string> lines, records, texts;
  for (uint64_t i = 0; i < 24; i++) {
    const size_t bytes = i % 11 == 3 ? 100000 : 500 + 37 * i;
    lines.push_back(Json{{"text", words(i, bytes)}, {"n", i}}.dump() + "\n");
    records.push_back(response(http(html(words(i, bytes)))));
    if (i % 5 == 0) records.push_back(warc_record("request", "application/http", "GET /"));
    if (i % 5 == 1) lines.push_back("not JSON\n");
    texts.push_back(words(i, bytes) + "\n<|endoftext|>\n");
  }
  struct Kind {
    const char* extension;
    const std::vector<std::string>& parts;
  };
  for (const auto& [extension, parts] :
       {Kind{".jsonl", lines}, Kind{".warc", records}, Kind{".txt", texts}}) {
    const auto path = [&, ending = extension](const std::string& name, const std::string& bytes) {
      return path_of(dir, name + ending, bytes);
    };
    uint64_t compressed = 0;
    const std::string plain = path("plain", join(parts));
    check_restarts(plain, &compressed);
    CHECK(compressed > 1000);  // a plain file is entered anywhere
    const Texts expected = read(plain).texts();
    CHECK(expected.size() == 24);
    for (const Compress compress : {Compress(gzip), Compress(zstandard)}) {
      const std::string one = path("one", compress(join(parts)));
      check_restarts(one, &compressed);
      CHECK(compressed == 0);  // a single member is entered at its beginning
      CHECK(read(one).texts() == expected);
      const std::string many = path("many", join(parts, compress));
      check_restarts(many, &compressed);
      CHECK(double(compressed) > .9 * double(std::filesystem::file_size(many)));
      CHECK(read(many).texts() == expected);
      std::string across;  // members that begin anywhere in a record
      const std::string all = join(parts);
      for (size_t i = 0; i < all.size(); i += 7001) across += compress(all.substr(i, 7001));
      check_restarts(path("across", across), &compressed);
      CHECK(compressed > 1000);
      CHECK(read(path("across", across)).texts() == expected);
    }
  }
  check_restarts(path_of(dir, "a.html", html("a")));
  check_restarts(path_of(dir, "a.html.gz", gzip(html("a"))));
}

TEST_CASE("progress goes from nothing to all") {
  TempDir dir;
  std::string lines;
  for (uint64_t i = 0; i < 3000; i++) lines += Json{{"text", words(i, 2000)}}.dump() + "\n";
  PageReader reader(Input(path_of(dir, "a.jsonl.gz", gzip(lines))), 0);
  double last = 0;
  bool between = false;
  for (Page page; reader.next(page);) {
    CHECK(reader.progress() >= last);
    last = reader.progress();
    between |= last > .2 && last < .8;
  }
  CHECK(between);
  CHECK(last == 1);
}

TEST_CASE("standard input is read as any file, entered again at its beginning") {
  TempDir dir;
  const int kept = dup(STDIN_FILENO);
  const auto read_pipe = [&](const std::string& bytes, Entry entry, Entry* after) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    REQUIRE(write(ends[1], bytes.data(), bytes.size()) == ssize_t(bytes.size()));
    close(ends[1]);
    dup2(ends[0], STDIN_FILENO);
    close(ends[0]);
    std::clearerr(stdin);
    PageReader reader(Input("-"), 0, {}, entry);
    Texts texts;
    for (Page page; reader.next(page);) {
      texts.push_back(page.text);
      if (texts.size() == 1 && after) *after = reader.entry();
    }
    return texts;
  };
  const std::string lines = "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"text\":\"c\"}\n";
  for (const std::string& bytes : {lines, gzip(lines), zstandard(lines)}) {
    Entry after;
    CHECK(read_pipe(bytes, {}, &after) == Texts{"a", "b", "c"});
    CHECK(read_pipe(bytes, after, nullptr) == Texts{"b", "c"});
  }
  CHECK(read_pipe(gzip(response(http(html("a")))), {}, nullptr) == Texts{html("a")});
  CHECK(contains(error_of([&] { read_pipe("PAR1", {}, nullptr); }),
                 "standard input: found parquet that cannot be read from its end"));
  dup2(kept, STDIN_FILENO);
  close(kept);
  std::clearerr(stdin);
}
