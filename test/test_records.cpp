// Records and documents from every shape of file: one reader for all of them.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include "cake/documents.h"
#include "cake/record_flags.h"
#include "cake/records.h"
#include "test/support.h"

namespace cake {
namespace {

using Strings = std::vector<std::string>;

std::string write(const TempDir& dir, const std::string& name, const std::string& bytes) {
  const std::string path = (dir / name).string();
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

// "line 3: {"a":1}" for each record; the error's message at the end, if there is one.
Strings read_all(const Input& input, const RecordOptions& options = {}) {
  Strings found;
  try {
    RecordReader reader(input, options);
    for (Record record; reader.next(record);) {
      const std::string place = record.where.substr(record.where.find_last_of(':') + 1);
      found.push_back(place + " " + std::string(simdjson::minify(record.object)));
    }
  } catch (const Error& e) {
    found.push_back(e.what());
  }
  return found;
}

std::string utf16(const std::string& ascii, bool is_big_endian) {
  std::string bytes = is_big_endian ? "\xfe\xff" : "\xff\xfe";
  for (const char c : ascii) {
    bytes += is_big_endian ? std::string{'\0', c} : std::string{c, '\0'};
  }
  return bytes;
}

std::string with_line_ends(std::string text, const std::string& end) {
  for (size_t i = 0; (i = text.find('\n', i)) != std::string::npos; i += end.size()) {
    text.replace(i, 1, end);
  }
  return text;
}

// The bytes as standard input while it lives.
class StandardInput {
 public:
  explicit StandardInput(const std::string& path) : saved_(dup(0)) {
    if (!std::freopen(path.c_str(), "rb", stdin)) std::abort();
  }
  ~StandardInput() {
    dup2(saved_, 0);
    close(saved_);
    std::clearerr(stdin);
  }

 private:
  int saved_;
};

struct Documents {
  Strings texts;
  std::string error, note;
  LeftOut left_out;
};

Documents documents_of(const std::string& path, const RecordOptions& options = {},
                       size_t part_bytes = 1024) {
  Documents d;
  d.error = error_of([&] {
    DocumentReader reader({Input(path)}, options, part_bytes);
    for (DocumentPart part; reader.next(part);) {
      if (part.begins) d.texts.emplace_back();
      d.texts.back() += part.text;
    }
    d.note = reader.divider_note(false);
    d.left_out = reader.left_out();
  });
  return d;
}

// ---------------------------------------------------------------------------------------------
// Shapes

struct Shape {
  const char* name;
  std::string text;
  Strings records;
};

std::vector<Shape> shapes() {
  const std::string a = R"({"a":1})", b = R"({"b":[{"c":"}]"}]})";
  const Strings lines = {"1 " + a, "2 " + b}, one_line = {"1 " + a, "1 " + b};
  return {
      {"lines", a + "\n" + b + "\n", lines},
      {"lines without a last line break", a + "\n" + b, lines},
      {"blank lines", "\n " + a + " \n\t\n" + b + "\n\n", {"2 " + a, "4 " + b}},
      {"one record", a, {"1 " + a}},
      {"an array on one line", "[" + a + "," + b + "]", one_line},
      {"an array, a record on each line", "[\n" + a + ",\n" + b + "\n]\n", {"2 " + a, "3 " + b}},
      {"an array that is indented",
       "[\n  {\n    \"a\": 1\n  },\n  {\n    \"b\": [\n      {\"c\": \"}]\"}\n    ]\n  }\n]\n",
       {"2 " + a, "5 " + b}},
      {"two arrays", "[" + a + "]\n[" + b + "]", lines},
      {"objects over several lines",
       "{\n  \"a\": 1\n}\n{\n  \"b\": [\n    {\"c\": \"}]\"}]\n}\n",
       {"1 " + a, "4 " + b}},
      {"objects one behind the other", a + b, one_line},
      {"lines with commas", a + ",\n" + b + ",\n", lines},
      {"a list in an object", "{\"version\": \"1\", \"data\": [" + a + ",\n" + b + "]}", lines},
      {"a list in an indented object",
       "{\n  \"rows\": [\n    " + a + ",\n    " + b + "\n  ],\n  \"next\": {\"x\": [1]}\n}\n",
       {"3 " + a, "4 " + b}},
      {"conversations as bare lists",
       "[{\"role\":\"user\",\"content\":\"x\"}]\n[{\"role\":\"user\",\"content\":\"y\"}]\n",
       {"1 {\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}",
        "2 {\"messages\":[{\"role\":\"user\",\"content\":\"y\"}]}"}},
      {"an array of bare lists",
       "[[{\"from\":\"human\",\"value\":\"x\"}],\n[{\"from\":\"gpt\",\"value\":\"y\"}]]",
       {"1 {\"messages\":[{\"from\":\"human\",\"value\":\"x\"}]}",
        "2 {\"messages\":[{\"from\":\"gpt\",\"value\":\"y\"}]}"}},
      {"an indented bare list",
       "[\n {\"role\":\"user\",\n\"content\":\"x\"}\n]\n[\n{\"role\":\"user\",\"content\":\"y\"}]",
       {"1 {\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}",
        "5 {\"messages\":[{\"role\":\"user\",\"content\":\"y\"}]}"}},
  };
}

TEST_CASE("records are the same from every shape, editor and container") {
  TempDir dir;
  for (const Shape& shape : shapes()) {
    CAPTURE(shape.name);
    const auto read = [&](const std::string& name, const std::string& bytes) {
      return read_all(Input(write(dir, name, bytes)));
    };
    CHECK(read("a.jsonl", shape.text) == shape.records);
    CHECK(read("a.json", shape.text) == shape.records);
    CHECK(read("a", shape.text) == shape.records);
    CHECK(read("a.txt", shape.text) == shape.records);
    CHECK(read("a.json.gz", deflated(shape.text)) == shape.records);
    CHECK(read("a.zst", zstandard(shape.text)) == shape.records);
    CHECK(read("a", "\xef\xbb\xbf" + shape.text) == shape.records);
    CHECK(read("a", utf16(shape.text, false)) == shape.records);
    CHECK(read("a", utf16(shape.text, true)) == shape.records);
    CHECK(read("a.gz", deflated(utf16(shape.text, true))) == shape.records);
    CHECK(read("a", utf16(shape.text, false).substr(2)) == shape.records);
    CHECK(read("a", with_line_ends(shape.text, "\r\n")) == shape.records);
    CHECK(read("a", with_line_ends(shape.text, "\r")) == shape.records);
    for (const std::string& bytes : {shape.text, deflated(shape.text), zstandard(shape.text)}) {
      const StandardInput input(write(dir, "stdin", bytes));
      CHECK(read_all(Input("-")) == shape.records);
    }
  }
}

TEST_CASE("records are read across the window's blocks") {
  TempDir dir;
  std::string lines, list = "[", indented;
  Strings expected, of_list, of_indented;
  for (int i = 0; i < 3000; i++) {
    const std::string text(size_t(i % 97) * 7, char('a' + i % 26));
    const std::string record = concat("{\"i\":", i, ",\"t\":\"\\\"", text, "\"}");
    lines += record + "\n";
    list += (i ? ",\n" : "") + record;
    indented += concat("{\n  \"i\": ", i, ",\n  \"t\": \"\\\"", text, "\"\n}\n");
    expected.push_back(concat(i + 1, " ", record));
    of_indented.push_back(concat(4 * i + 1, " ", record));
  }
  CHECK(read_all(Input(write(dir, "a", lines))) == expected);
  CHECK(read_all(Input(write(dir, "a", list + "]"))) == expected);
  CHECK(read_all(Input(write(dir, "a", indented))) == of_indented);
  CHECK(read_all(Input(write(dir, "a", utf16(list + "]", true)))) == expected);
}

TEST_CASE("files that hold no records are refused with what was found") {
  TempDir dir;
  const auto error = [&](const std::string& bytes, const std::string& name = "a") {
    const Strings found = read_all(Input(write(dir, name, bytes)));
    return found.empty() ? "no error" : found.back();
  };
  CHECK(contains(error(""), "a: found an empty file, expected JSON lines, a JSON array of"));
  CHECK(contains(error("Once upon\na time"), "a: found text that begins with \"Once upon\""));
  CHECK(contains(error("WARC/1.0\r\n"), "a: found a WARC archive, expected JSON lines"));
  CHECK(contains(error("<!doctype html><p>"), "a: found a page of HTML"));
  CHECK(contains(error("PK\x03\x04"), "a: found a zip archive"));
  CHECK(contains(error("[1, 2]", "a.json"), "a.json:1: found an array, expected an object"));
  CHECK(contains(error("[{\"a\":1},\n 2]"), "a:2: found a number, expected an object"));
  CHECK(contains(error("{\"a\":1}\n\"b\"\n"), "a:2: found a string, expected an object"));
  CHECK(contains(error("{\"data\":[{\"a\":1}],\"rows\":[{\"b\":1}]}"),
                 "a:1: found a second list of objects, \"rows\", expected one list"));
  const std::string large = "{\"a\":\"" + std::string(1 << 17, 'x') + "\"}";
  CHECK(contains(error("{\"data\":[\n" + large + "]}\n{\"b\":1}"),
                 "a:3: found more behind the object that holds the list of records"));
  CHECK(
      contains(error("[{\"a\":1},\n{\"a\":2}\n"), "a:3: found the end of the file, expected the"));
  CHECK(contains(error("[{\"a\":1},\n{\"a\":"), "a:2: found the end of the file inside a record"));
}

TEST_CASE("rows of parquet are records") {
  const std::string path = "test/golden/parquet/pyarrow_zstd_v2.parquet";
  LeftOut left_out;
  Strings places, texts;
  const int64_t rows = for_each_record({path}, {.names = {{"prompt", "text"}}}, left_out,
                                       [&](const Record& r) -> const char* {
                                         if (!r.has("prompt")) return "null";
                                         places.push_back(r.where);
                                         texts.emplace_back(r.string("prompt"));
                                         return nullptr;
                                       });
  CHECK(rows == 50);
  CHECK(left_out.count("null") == 7);
  REQUIRE(texts.size() == 43);
  CHECK(texts[1].starts_with("document 1: naïve 日本"));
  CHECK(places[1] == path + ": row 2");
  const Documents by_key = documents_of(path, {.names = {{"text", "text"}}});
  CHECK(by_key.texts == texts);
}

TEST_CASE("a list that --map reads as a field is no list of records") {
  TempDir dir;
  const std::string path = write(dir, "a", "{\"data\": [{\"role\": \"user\"}]}");
  CHECK(read_all(Input(path)) == Strings{"1 {\"role\":\"user\"}"});
  CHECK(read_all(Input(path), {.names = {{"messages", "data"}}}) ==
        Strings{"1 {\"data\":[{\"role\":\"user\"}]}"});
}

TEST_CASE("a large array is not held in memory") {
  TempDir dir;
  const std::string path = write(dir, "a.json", "");
  const std::string record = "{\"t\": \"" + std::string(100'000, 'x') + "\"}";
  {
    std::ofstream out(path, std::ios::binary);
    out << '[' << record;
    for (int i = 1; i < 2000; i++) out << ',' << record;  // 200 MB, without a line break
    out << ']';
  }
  const auto peak = [] {
    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss / 1024;  // MiB
  };
  const long before = peak();
  int64_t records = 0;
  RecordReader reader{Input(path)};
  for (Record record; reader.next(record);) records++;
  CHECK(records == 2000);
  CHECK(peak() - before < 20);
}

// ---------------------------------------------------------------------------------------------
// Repair

TEST_CASE("what other programs write is repaired before it is refused") {
  TempDir dir;
  const auto read = [&](const std::string& record) {
    for (const std::string& bytes : {record + "\n", "[" + record + "]"}) {
      RecordReader reader{Input(write(dir, "a", bytes))};
      Record r;
      if (!reader.next(r)) return std::string("nothing");
      if (bytes[0] == '[') return std::string(r.string("text"));
      CHECK(std::string(r.string("text")) == std::string(r.string("text")));
    }
    return std::string();
  };
  CHECK(read(R"({"text":"bad \ud83d end"})") == "bad \xef\xbf\xbd end");
  CHECK(read(R"({"text":"\udc00\\ud83d\ud83d\ude00"})") == "\xef\xbf\xbd\\ud83d\xf0\x9f\x98\x80");
  CHECK(read("{\"text\":\"a\xff b\"}") == "a\xef\xbf\xbd b");
  CHECK(read(R"({"text":"a","id":92233720368547758423})") == "a");
  CHECK(read(R"({"id":-92233720368547758423,"text":"a"})") == "a");
  CHECK(read(R"({"score":NaN,"x":[-Infinity,Infinity,1e999],"text":"a"})") == "a");
  CHECK(read(R"({"score":NaN,"text":"NaN, \ud83d 92233720368547758423"})") ==
        "NaN, \xef\xbf\xbd 92233720368547758423");
}

TEST_CASE("a field that is read and is no number is an error with its name") {
  TempDir dir;
  const auto error = [&](const std::string& value) {
    RecordReader reader{Input(write(dir, "a", "{\"text\":" + value + "}\n"))};
    Record r;
    REQUIRE(reader.next(r));
    return error_of([&] { r.string("text"); });
  };
  CHECK(contains(error("NaN"), "a:1: \"text\": found NaN, expected a string"));
  CHECK(contains(error("-Infinity"), "a:1: \"text\": found Infinity, expected a string"));
  CHECK(contains(error("92233720368547758423"), "found a number beyond 64 bits"));
  CHECK(contains(error("1"), "a:1: \"text\": found a number, expected a string"));
  CHECK(contains(error("null"), "a:1: \"text\" is missing"));
}

TEST_CASE("numbers that simdjson does not have keep their digits") {
  simdjson::dom::parser parser;
  simdjson::dom::element value;
  const auto json = [&](std::string text) {
    text.reserve(text.size() + simdjson::SIMDJSON_PADDING);
    const auto error = parse_and_repair(text, parser, value);
    return error ? simdjson::error_message(error) : python_json(value);
  };
  CHECK(json("{\"a\":92233720368547758423,\"b\":[NaN,-Infinity]}") ==
        "{\"a\": 92233720368547758423, \"b\": [NaN, -Infinity]}");
  CHECK(json("[18446744073709551615, 18446744073709551616, -9223372036854775809]") ==
        "[18446744073709551615, 18446744073709551616, -9223372036854775809]");
  for (const char* bad : {"[01]", "[nan]", "[NaNs]", "[+1]", "[1.]", "[--1]", "[tru]", "[\"\\x\"]",
                          "{\"a\":NaN", "[1e]"}) {
    CAPTURE(bad);
    CHECK(!contains(json(bad), "["));
  }
}

// ---------------------------------------------------------------------------------------------
// Bad lines

struct Skipped {
  Strings kept;
  std::string error;
  LeftOut left_out;
  int64_t records = 0;
};

Skipped skip_bad(const std::string& path) {
  Skipped s;
  const RecordOptions options{.skip_bad_lines = true};
  s.error = error_of([&] {
    s.records = for_each_record({path}, options, s.left_out, [&](const Record& r) {
      s.kept.push_back(r.where.substr(r.where.find_last_of(':') + 1));
      return r.has("drop") ? "too long" : nullptr;
    });
  });
  return s;
}

TEST_CASE("bad lines stop the run at the first, or are counted and three are shown") {
  TempDir dir;
  std::string lines = "{\"a\":\"\\ud83d\"}\n{\"a\":}\n";  // the first is repaired
  for (int i = 0; i < 4; i++) lines += "{\"a\": 1}\n{\"a\": \"cut\n[1]\n";
  const std::string path = write(dir, "a.jsonl", lines);
  LeftOut none;
  CHECK(contains(
      error_of([&] { for_each_record({path}, {}, none, [](const Record&) { return nullptr; }); }),
      "a.jsonl:2: not JSON"));
  const Skipped s = skip_bad(path);
  CHECK(s.error == "no error");
  CHECK(s.kept == Strings{"1", "3", "6", "9", "12"});
  CHECK(s.records == 14);
  CHECK(s.left_out.count("bad line") == 9);
  CHECK(s.left_out.json().dump() == "{\"bad line\":9}");
  const std::string text = s.left_out.text(s.records);
  CHECK(contains(text, "left out 9 of 14 records: bad line\n  "));
  CHECK(contains(text, "a.jsonl:2: not JSON"));
  CHECK(contains(text, "a.jsonl:4: not JSON"));
  CHECK(contains(text, "a.jsonl:5: found an array, expected an object"));
  CHECK(std::count(text.begin(), text.end(), '\n') == 4);
}

TEST_CASE("a visitor that has enough ends the reading before what is bad") {
  TempDir dir;
  const std::string path = write(dir, "a.jsonl", "{\"a\":1}\n{\"a\":2}\n{\"a\":3}\n{\"a\":}\n");
  LeftOut none;
  int visited = 0;
  const auto visit = [&](const Record&) { return ++visited > 2 ? kEnough : nullptr; };
  CHECK(for_each_record({path}, {}, none, visit) == 2);
  CHECK(visited == 3);
  CHECK(none.total() == 0);
}

TEST_CASE("behind a bad element of an array the next one is found") {
  TempDir dir;
  const auto kept = [&](const std::string& bytes) {
    const Skipped s = skip_bad(write(dir, "a", bytes));
    CHECK(s.error == "no error");
    return concat(s.left_out.count("bad line"), " bad: ", Json(s.kept).dump());
  };
  // The brackets match: the next element is right behind.
  CHECK(kept("[{\"a\":1},{\"a\":tru},{\"a\":01},{\"a\":2,},\n3,{\"a\":3}]") ==
        R"(4 bad: ["1","2"])");
  // They do not: the next line that is not indented deeper.
  CHECK(kept("[\n  {\n    \"a\": \"x\n  },\n  {\n    \"a\": [{}]\n  },\n  {\"a\": 3}\n]") ==
        R"(1 bad: ["5","8"])");
  CHECK(kept("[\n{\"a\": {\"b\": 1},\n{\"a\": 2},\n{\"a\": 3}]") == R"(1 bad: ["3","4"])");
  CHECK(kept("{\n \"a\": 1\n}\n{\n \"a\": ]\n}\n{\n \"a\": 3\n}\n") == R"(1 bad: ["1","7"])");
  CHECK(kept("{\n \"a\": 1\n}\nnone\n{\n \"a\": 3\n}\n") == R"(1 bad: ["1","5"])");
  CHECK(kept("[{\"a\":1},\n{\"a\":2},\n{\"a\":") == R"(1 bad: ["1","2"])");
  // Without lines the rest cannot be found: that is no single bad record.
  const Skipped lost =
      skip_bad(write(dir, "a", "[{\"a\":1},{\"a\":{\"b\":1},{\"a\":2},{\"a\":3}]"));
  CHECK(contains(lost.error, "no line behind it begins a record"));
}

TEST_CASE("a file of which nothing is left is an error, and so is damage") {
  TempDir dir;
  const auto error = [&](const std::string& name, const std::string& bytes) {
    return skip_bad(write(dir, name, bytes)).error;
  };
  CHECK(contains(error("a", "{\"drop\":1}\n{\"drop\":2}\n[1]\n"),
                 "a: found no record to use: 1 bad line ("));
  CHECK(contains(error("a", "{\"drop\":1}\n"), "1 too long"));
  CHECK(contains(error("a.jsonl", "\n\n"), "a.jsonl: found no records"));
  CHECK(contains(error("a", "[]"), "a: found no records"));
  std::string lines;
  for (int i = 0; i < 20000; i++) lines += concat("{\"i\":", mix64(uint64_t(i)), "}\n");
  const std::string zipped = deflated(lines);
  CHECK(
      contains(error("a.gz", zipped.substr(0, zipped.size() / 2)), "the gzip data ends too early"));
}

TEST_CASE("what is left out is counted by reason over several files") {
  TempDir dir;
  const std::string a = write(dir, "a", "{}\n{\"drop\":1}\n"),
                    b = write(dir, "b", "[{},{\"drop\":1}]");
  LeftOut left_out;
  const auto visit = [](const Record& r) { return r.has("drop") ? "too long" : nullptr; };
  CHECK(for_each_record({a, b}, {}, left_out, visit) == 4);
  CHECK(left_out.count("too long") == 2);
  CHECK(contains(left_out.text(4), "left out 2 of 4 records: too long\n"));
  LeftOut more;
  for (int i = 0; i < 5; i++) more.add("too long", concat("place ", i));
  more.add(left_out);
  CHECK(more.total() == 7);
  CHECK(!contains(more.text(9), "place 3"));
}

// ---------------------------------------------------------------------------------------------
// --map

TEST_CASE("--map leads into objects and lists, and a key with dots comes first") {
  TempDir dir;
  const auto found = [&](const std::string& json, const std::string& key) {
    RecordReader reader(Input(write(dir, "a", json)), {.names = {{"f", key}}});
    Record r;
    REQUIRE(reader.next(r));
    simdjson::dom::element value;
    return r.find("f", value) ? std::string(simdjson::minify(value)) : "nothing";
  };
  const std::string json =
      R"({"f":0,"a":{"b":[{"c":1},{"c":[2,3]}],"d.e":4,"n":null},"a.x":5,"7":6,"l":[[7]]})";
  CHECK(found(json, "a.b.0.c") == "1");
  CHECK(found(json, "a.b.1.c.1") == "3");
  CHECK(found(json, "a.d.e") == "4");
  CHECK(found(json, "a.x") == "5");
  CHECK(found(json, "7") == "6");
  CHECK(found(json, "l.0.0") == "7");
  for (const char* none :
       {"a.b.2.c", "a.b.c", "a.b.-1", "a.b.0x", "a.n", "b", "a.b.0.c.0", "l.0.0.0"}) {
    CAPTURE(none);
    CHECK(found(json, none) == "nothing");
  }
}

TEST_CASE("--map is FIELD=KEY, and one that is not used is an error") {
  FieldNames names;
  add_field_name(names, "answer=reward_model.ground_truth");
  add_field_name(names, "text=a=b");
  CHECK(names.at("text") == "a=b");
  for (const char* bad : {"a", "=b", "a=", "a=.b", "a=b.", "a=b..c", "", "answer=x"}) {
    CAPTURE(bad);
    CHECK(contains(error_of([&] { add_field_name(names, bad); }), "--map: found "));
  }
  TempDir dir;
  const std::string path = write(dir, "a", "{\"q\":\"x\"}\n");
  const auto read = [&](const FieldNames& map) {
    LeftOut left_out;
    return error_of([&] {
      for_each_record({path}, {.names = map}, left_out, [](const Record& r) {
        r.string("question");
        return nullptr;
      });
    });
  };
  CHECK(read({{"question", "q"}}) == "no error");
  CHECK(contains(read({{"question", "q"}, {"qestion", "q"}}), "--map qestion=q: found no use of"));
  CHECK(contains(read({{"question", "x"}}), "\"question\" is missing"));
}

TEST_CASE("a record of another stage names the stage") {
  TempDir dir;
  const auto error = [&](const std::string& json) {
    RecordReader reader{Input(write(dir, "a", json))};
    Record r;
    REQUIRE(reader.next(r));
    return error_of([&] { fail_unknown_shape(r, "a horse"); });
  };
  CHECK(
      contains(error(R"({"chosen":"a","rejected":"b"})"),
               "a:1: found the keys \"chosen\", \"rejected\" (a preference, which ./reward reads), "
               "expected a horse (--map FIELD=KEY reads the key KEY as FIELD)"));
  CHECK(contains(error(R"({"prompt":"a","completion":"b","label":true})"), "a preference"));
  CHECK(contains(error(R"({"question":"a","answer":"b"})"), "a problem, which ./rlhf grpo"));
  CHECK(contains(error(R"({"prompt":[],"reward_model":{}})"), "a problem, which ./rlhf grpo"));
  CHECK(contains(error(R"({"messages":[]})"), "a conversation, which ./sft reads"));
  CHECK(contains(error(R"({"conversations":[]})"), "a conversation, which ./sft reads"));
  CHECK(contains(error(R"({"instruction":"a","output":"b"})"), "a conversation, which ./sft"));
  CHECK(contains(error(R"({"url":"a","text":"b"})"), "a document, which ./bpe train and"));
  CHECK(contains(error(R"({"url":"a","html":"b"})"), "a page, which ./corpus reads"));
  CHECK(contains(error(R"({"x":1})"), "found the keys \"x\", expected a horse"));
  CHECK(contains(error("{}"), "found the keys none, expected a horse"));
}

// ---------------------------------------------------------------------------------------------
// Lines of text

TEST_CASE("lines of text are the same from every editor") {
  TempDir dir;
  const auto read = [&](const std::string& bytes, const std::string& name = "a") {
    Strings texts;
    for (const TextLine& line : read_text_lines(Input(write(dir, name, bytes)), "prompt")) {
      texts.push_back(line.text);
    }
    return texts;
  };
  const Strings texts = {"Once", "", " upon\ta time "};
  const std::string text = "Once\n\n upon\ta time ";
  for (const std::string& t : {text, text + "\n", text + "\n\n", text + "\n \n\n"}) {
    CHECK(read(t) == texts);
    CHECK(read("\xef\xbb\xbf" + t) == texts);
    CHECK(read(with_line_ends(t, "\r\n")) == texts);
    CHECK(read(with_line_ends(t, "\r")) == texts);
    CHECK(read(utf16(t, false)) == texts);
    CHECK(read(utf16(with_line_ends(t, "\r\n"), true)) == texts);
    CHECK(read(deflated(t), "a.gz") == texts);
    const StandardInput input(write(dir, "stdin", t));
    CHECK(read_text_lines(Input("-"), "prompt").size() == 3);
  }
  CHECK(read("a\rb\nc\r\nd") == Strings{"a", "b", "c", "d"});
  CHECK(read("a\rb\nc\r\nd").size() == 4);
  const std::vector<TextLine> mixed = read_text_lines(Input(write(dir, "m", "a\rb\nc")), "prompt");
  CHECK(mixed[2].where.ends_with("m:3"));
  CHECK(read("\n\n").empty());
  CHECK(read("[1,2]\n{x}\n") == Strings{"[1,2]", "{x}"});
}

TEST_CASE("records with a prompt are prompts, from a file and from standard input") {
  TempDir dir;
  for (const char* text : {"{\"prompt\":\"Hi\"}\n{\"prompt\":\"a\\nb\"}\n",
                           "[{\"prompt\":\"Hi\"},\n{\"prompt\":\"a\\nb\"}]"}) {
    const StandardInput input(write(dir, "p.jsonl", text));
    for (const std::string& path : {(dir / "p.jsonl").string(), std::string("-")}) {
      const std::vector<TextLine> lines = read_text_lines(Input(path), "prompt");
      REQUIRE(lines.size() == 2);
      CHECK(lines[0].text == "Hi");
      CHECK(lines[1].text == "a\nb");
      CHECK(lines[1].where.ends_with(":2"));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Documents

TEST_CASE("documents are told by content, under any name and on standard input") {
  TempDir dir;
  const Strings texts = {"one", "two\nlines"};
  for (const char* text : {"{\"text\":\"one\"}\n{\"text\":\"two\\nlines\"}\n",
                           "[{\"text\":\"one\"},{\"text\":\"two\\nlines\"}]",
                           "{\n \"text\":\"one\"\n}\n{\"text\":\"two\\nlines\"}\n",
                           "one\n<|endoftext|>\ntwo\nlines\n"}) {
    CAPTURE(text);
    for (const char* name : {"a.txt", "a", "a.jsonl.x"}) {
      CHECK(documents_of(write(dir, name, text)).texts == texts);
    }
    const std::string json =
        text[0] == 'o' ? "" : ".json";  // a text that is no JSON is damage there
    CHECK(documents_of(write(dir, "c4-train" + json + ".gz", deflated(text))).texts == texts);
    CHECK(documents_of(write(dir, "a.zst", zstandard(text))).texts == texts);
    CHECK(documents_of(write(dir, "a", utf16(text, false))).texts == texts);
    for (const std::string& bytes : {std::string(text), deflated(text), zstandard(text)}) {
      const StandardInput input(write(dir, "stdin", bytes));
      CHECK(documents_of("-").texts == texts);
    }
  }
  // A program's own file of JSON is a text.
  const std::string config = "{\n  \"name\": \"x\"\n}\n";
  CHECK(documents_of(write(dir, "config.json", config)).texts == Strings{config});
}

TEST_CASE("documents have --map text=KEY and --bad-lines skip") {
  TempDir dir;
  const RecordOptions map{.names = {{"text", "meta.content"}}}, skip{.skip_bad_lines = true};
  const std::string path = write(dir, "a", "{\"meta\":{\"content\":\"one\"}}\n");
  CHECK(documents_of(path, map).texts == Strings{"one"});
  CHECK(contains(documents_of(path).error, "a:1: \"text\" is missing: found the keys \"meta\""));
  CHECK(
      contains(documents_of(path, {.names = {{"txt", "a"}}}).error, "--map txt=a: found a field"));
  CHECK(contains(documents_of(write(dir, "a", "{\"messages\":[]}\n")).error,
                 "(a conversation, which ./sft reads)"));
  for (const char* text :
       {"{\"text\":\"one\"}\n{\"text\":NaN}\n{\n{\"text\":\"two\"}\n",
        "[{\"text\":\"one\"},\n{\"text\":NaN},\n{\"text\": ]},\n{\"text\":\"two\"}]"}) {
    const Documents d = documents_of(write(dir, "a", text), skip);
    CHECK(d.texts == Strings{"one", "two"});
    CHECK(d.left_out.count("bad line") == 2);
    CHECK(contains(documents_of(write(dir, "a", text)).error, "a:2: \"text\": found NaN"));
  }
  CHECK(contains(documents_of(write(dir, "a", "{\"x\":1}\n"), skip).error,
                 "a: found no document to use: 1 bad line ("));
}

TEST_CASE("<|endoftext|> on a line of its own divides a text into documents") {
  TempDir dir;
  const std::string end = "<|endoftext|>";
  const auto read = [&](const std::string& text) {
    const Documents d = documents_of(write(dir, "t.txt", text));
    CHECK(d.note == "");
    for (const char* line_end : {"\r\n", "\r"}) {
      CHECK(documents_of(write(dir, "t.txt", with_line_ends(text, line_end))).texts == d.texts);
    }
    return d.texts;
  };
  const Strings two = {"Once a cat.", "Once a dog."};
  CHECK(read("Once a cat.\n" + end + "\nOnce a dog.\n") == two);
  CHECK(read("Once a cat.\n" + end + "\nOnce a dog.\n" + end + "\n") == two);
  CHECK(read("Once a cat.\n" + end + "\nOnce a dog.\n" + end) == two);
  CHECK(read("\n" + end + "\nOnce a cat.\n \t" + end + "  \n\n" + end + "\nOnce a dog.") == two);
  CHECK(read(end + "\nOnce a cat.\n" + end + "\nOnce a dog.") == two);
  CHECK(read("a\n\n" + end + "\n\nb\n\n") == Strings{"a\n", "\nb\n"});
  CHECK(read("no divider\n") == Strings{"no divider\n"});
}

TEST_CASE("<|endoftext|> inside a line is text, and the output says so once") {
  TempDir dir;
  const std::string end = "<|endoftext|>";
  const std::string text = "a " + end + "\n" + end + " b\n" + end + end + "\n" + end + ".";
  const Documents d = documents_of(write(dir, "t.txt", text));
  CHECK(d.texts == Strings{text});
  CHECK(contains(d.note, "note: found <|endoftext|> inside lines, 5 times, first in "));
  CHECK(std::count(d.note.begin(), d.note.end(), '\n') == 1);
  const std::string far = std::string(65, ' ') + end + "\n";  // too many blanks
  CHECK(documents_of(write(dir, "t.txt", "a\n" + far + "b")).texts.size() == 1);
  CHECK(contains(documents_of(write(dir, "t.txt", "a\n" + far)).note, "1 time in "));
}

TEST_CASE("dividers are found wherever a read part ends") {
  TempDir dir;
  for (const char* line_end : {"\n", "\r\n"}) {
    for (size_t shift = 0; shift < 40; shift++) {
      std::string text(1000 + shift, 'x');
      Strings expected = {text};
      for (int i = 0; i < 40; i++) {
        expected.push_back(std::string(size_t(900 + 97 * i), char('a' + i % 26)));
        text += concat(line_end, i % 3 ? "" : "  ", "<|endoftext|>", line_end, expected.back());
      }
      const Documents d = documents_of(write(dir, "t.txt", text));
      CHECK(d.texts == expected);
      CHECK(documents_of((dir / "t.txt").string(), {}, 1 << 20).texts == expected);
      CHECK(d.note == "");
    }
  }
}

TEST_CASE("a text is the same from every editor") {
  TempDir dir;
  std::string text;
  for (int i = 0; i < 2000; i++) text += concat("line ", i, i % 5 ? "\n" : "\n\n");
  const Strings expected = {text};
  CHECK(read_text_file(Input(write(dir, "t.txt", utf16(with_line_ends(text, "\r\n"), true)))) ==
        text);
  for (const char* line_end : {"\n", "\r\n", "\r"}) {
    const std::string t = with_line_ends(text, line_end);
    CHECK(documents_of(write(dir, "t.txt", t)).texts == expected);
    CHECK(documents_of(write(dir, "t.txt", "\xef\xbb\xbf" + t)).texts == expected);
    CHECK(documents_of(write(dir, "t.txt", utf16(t, false))).texts == expected);
    CHECK(documents_of(write(dir, "t.txt", utf16(t, true))).texts == expected);
  }
  // Where lines end in several ways, that is the text.
  const std::string mixed = "a\r\nb\nc\rd\r\n";
  CHECK(documents_of(write(dir, "t.txt", mixed)).texts == Strings{mixed});
  // Half a character at a part's end, and a pair of units.
  const std::string halves(
      "\xff\xfe"
      "a\0\x3d\xd8\x00\xde\x3d\xd8"
      "b\0\x00\xde"
      "c",
      15);
  CHECK(documents_of(write(dir, "t.txt", halves)).texts == Strings{"a\xf0\x9f\x98\x80\xef\xbf\xbd"
                                                                   "b\xef\xbf\xbd\xef\xbf\xbd"});
}

}  // namespace
}  // namespace cake
