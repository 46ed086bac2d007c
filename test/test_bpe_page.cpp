// ./bpe stats and its page: the figures are those of a slow recount, the page holds the text as it
// is, and nothing in a text is markup.
#include <algorithm>
#include <cmath>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"
#include "cake/sha256.h"
#include "cake/tokenizer.h"
#include "cake/web.h"
#include "test/support.h"

using namespace cake;

namespace {

const char kHostile[] =
    "</script><img src=x onerror=alert(1)> <!-- </style> ]]> ${alert(1)} & &lt;script&gt; \"'`\n";

std::string words(uint64_t seed, size_t bytes) {
  const char* const alphabet[] = {"the", " of",  " and", " 12",    "7",    "!", ", ",
                                  "\n",  "\n\n", " e",   "\u00e9", "日本", " ", "  "};
  Rng rng{seed};
  std::string text;
  while (text.size() < bytes) text += alphabet[rng.below(std::size(alphabet))];
  return text;
}

size_t count(std::string_view text, std::string_view part) {
  size_t n = 0;
  for (size_t i = 0; (i = text.find(part, i)) != text.npos; i++) n++;
  return n;
}

// Two vocabularies, a text and its page.
struct PageTest {
  TempDir dir;
  std::string first = dir / "first", second = dir / "second", page = dir / "page.html";

  PageTest() {
    write_file(dir / "corpus.txt", words(1, 20000) + kHostile);
    train_tokenizer({.inputs = {dir / "corpus.txt"}}, 700, "gpt2").save(first);
    train_tokenizer({.inputs = {dir / "corpus.txt"}}, 500, "o200k").save(second);
  }
  std::string write(const std::string& name, const std::string& text) {
    write_file(dir / name, text);
    return dir / name;
  }
  Output stats(const std::string& arguments) {
    return shell("./bpe stats " + first + " " + arguments + " --html " + page);
  }
  std::string page_text() const { return read_file(page); }
  Json data() const {
    const std::string text = page_text(), mark = "<script type=\"application/json\" id=\"data\">";
    const size_t begin = text.find(mark) + mark.size();
    return Json::parse(text.substr(begin, text.find("</script>", begin) - begin));
  }
};

std::string bytes_of_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2)
    bytes += char(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string joined_sample(const Json& vocabulary) {
  std::string text;
  for (const Json& document : vocabulary.at("sample")) {
    for (const Json& token : document) {
      text += bytes_of_hex(vocabulary.at("bytes").at(std::to_string(token[0].get<int>())));
    }
  }
  return text;
}

// The figures of documents by their definitions.
void check_figures(const Json& found, const Tokenizer& tokenizer,
                   const std::vector<std::string>& documents) {
  std::map<int, int64_t> counts;
  int64_t tokens = 0, size = 0;
  for (const std::string& document : documents) {
    for (const int id : tokenizer.encode(document)) counts[id]++, tokens++;
  }
  std::map<size_t, int64_t> text_lengths, vocabulary_lengths;
  for (int id = 0; id < tokenizer.vocab_size(); id++) {
    if (tokenizer.token_bytes(id).empty() || tokenizer.is_special(id)) continue;
    size++;
    vocabulary_lengths[tokenizer.token_bytes(id).size()]++;
  }
  double entropy = 0;
  for (const auto& [id, n] : counts) {
    text_lengths[tokenizer.token_bytes(id).size()] += n;
    entropy -= double(n) / double(tokens) * std::log2(double(n) / double(tokens));
  }
  CHECK(found.at("tokens") == tokens);
  CHECK(found.at("size") == size);
  CHECK(found.at("used") == counts.size());
  CHECK(std::abs(found.at("entropy").get<double>() - entropy) < 1e-9);
  for (size_t bytes = 0; bytes < found.at("lengths").at("text").size(); bytes++) {
    CHECK(found.at("lengths").at("text")[bytes] == text_lengths[bytes]);
    CHECK(found.at("lengths").at("vocabulary")[bytes] == vocabulary_lengths[bytes]);
  }
  int64_t before = INT64_MAX;
  for (const Json& id : found.at("frequent")) {
    CHECK(counts[id.get<int>()] <= before);
    before = counts[id.get<int>()];
  }
  CHECK(found.at("frequent").size() == std::min<size_t>(24, counts.size()));
  for (const Json& id : found.at("unused")) CHECK(counts.count(id.get<int>()) == 0);
  size_t longest = 0;
  for (const auto& [id, n] : counts) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    if (bytes.find_first_not_of(" \n") != bytes.npos) longest = std::max(longest, bytes.size());
  }
  CHECK(tokenizer.token_bytes(found.at("longest")[0].get<int>()).size() == longest);
  for (const auto& [id, n] : found.at("counts").items()) CHECK(n == counts[std::stoi(id)]);
}

}  // namespace

TEST_CASE("bpe stats counts what a slow recount of each document counts") {
  PageTest t;
  std::vector<std::string> documents = {words(2, 400'000)};  // several chunks
  const std::string text = t.write("long.txt", documents[0]);
  std::string lines;
  for (uint64_t i = 0; i < 50; i++) {
    documents.push_back(words(10 + i, 1 + i * 7));
    lines += json_line(Json{{"text", documents.back()}});
  }
  const std::string jsonl = t.write("short.jsonl", lines);
  for (const char* threads : {"1", "3"}) {
    CAPTURE(threads);
    const Output o = t.stats(text + " " + jsonl + " --threads " + threads + " --with " + t.second);
    REQUIRE_MESSAGE(o.status == 0, o.text);
    const Json data = t.data();
    int64_t bytes = 0, characters = 0;
    for (const std::string& d : documents) {
      bytes += int64_t(d.size());
      characters += std::count_if(d.begin(), d.end(), [](char c) { return (c & 0xC0) != 0x80; });
    }
    CHECK(data.at("text").at("documents") == documents.size());
    CHECK(data.at("text").at("bytes") == bytes);
    CHECK(data.at("text").at("characters") == characters);
    REQUIRE(data.at("vocabularies").size() == 2);
    check_figures(data.at("vocabularies")[0], Tokenizer::load(t.first), documents);
    check_figures(data.at("vocabularies")[1], Tokenizer::load(t.second), documents);
    const double tokens = data.at("vocabularies")[0].at("tokens").get<double>();
    CHECK_MESSAGE(contains(o.text, format("%.3f", double(bytes) / tokens)), o.text);
    CHECK_MESSAGE(contains(o.text, count_text(tokens)), o.text);
  }
}

TEST_CASE("bpe stats cuts a text only where every vocabulary allows it") {
  PageTest t;
  std::string text;  // o200k has `!\n/` in one piece, gpt2 in three
  while (text.size() < 1'000'000) text += text.size() % 50'000 < 4 ? "the\nand" : "!\n/";
  const Output o = t.stats(t.write("a.txt", text) + " --with " + t.second);
  REQUIRE_MESSAGE(o.status == 0, o.text);
  check_figures(t.data().at("vocabularies")[0], Tokenizer::load(t.first), {text});
  check_figures(t.data().at("vocabularies")[1], Tokenizer::load(t.second), {text});
}

TEST_CASE("bpe stats puts the space before a document that its tokenizer asks for, and no other") {
  PageTest t;
  Json tokenizer = read_json(t.first + "/tokenizer.json");
  tokenizer.at("pre_tokenizer").at("add_prefix_space") = true;
  write_json(t.first + "/tokenizer.json", tokenizer);
  const std::vector<std::string> documents = {"of " + words(2, 600'000), "and", "of"};
  std::string lines;
  for (size_t i = 1; i < 3; i++) lines += json_line(Json{{"text", documents[i]}});
  const Output o = t.stats(t.write("a.txt", documents[0]) + " " + t.write("b.jsonl", lines));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  check_figures(t.data().at("vocabularies")[0], Tokenizer::load(t.first), documents);
  const Tokenizer changed = Tokenizer::load(t.first);
  CHECK(changed.token_bytes(changed.encode("of")[0])[0] == ' ');
}

TEST_CASE("bpe stats tells words, numbers, signs, white space and parts of characters apart") {
  PageTest t;
  const std::string text = t.write("text.txt", "ab 1!\n\u00e9 c");
  write_file(t.dir / "nothing.txt", "x");
  train_tokenizer({.inputs = {t.dir / "nothing.txt"}}, 256 + kSpecials, "gpt2").save(t.first);
  REQUIRE(t.stats(text).status == 0);  // every byte is a token
  const Json kinds = t.data().at("vocabularies")[0].at("kinds");
  const std::map<std::string, int> expected = {
      {"words with a space before", 0}, {"words without", 3}, {"numbers", 1},
      {"punctuation and signs", 1},     {"white space", 3},   {"parts of characters", 2}};
  REQUIRE(kinds.size() == expected.size());
  for (const Json& kind : kinds) {
    CAPTURE(kind);
    CHECK(kind.at("text") == expected.at(kind.at("kind")));
  }
  const Json parts = t.data().at("vocabularies")[0].at("fragments");
  CHECK(parts.at("tokens") == 2);
  CHECK(parts.at("frequent") == Json{0xA9, 0xC3});  // the ids of bytes are the bytes
}

TEST_CASE(
    "the tokens on the page of bpe stats are the text, byte for byte, whatever bytes it has") {
  PageTest t;
  std::string bytes;
  for (int b = 0; b < 256; b++) bytes += char(b);
  const std::string text = words(3, 3000) + bytes + kHostile;
  REQUIRE(t.stats(t.write("text.txt", text) + " --with " + t.second).status == 0);
  const Json data = t.data();
  CHECK(bytes_of_hex(data.at("sample")[0]) == text);
  for (const Json& vocabulary : data.at("vocabularies")) {
    CHECK(joined_sample(vocabulary) == text);
    size_t end = 0;
    for (const Json& token : vocabulary.at("sample")[0]) {
      CHECK(token[1] == end);
      end = token[2];
    }
    CHECK(end == text.size());
  }
}

TEST_CASE("a hostile text or file name is no markup on the page of bpe stats") {
  PageTest t;
  const std::string plain = t.write("plain.txt", "A plain text.");
  REQUIRE(t.stats(plain).status == 0);
  const std::string expected = t.page_text();
  std::string repeated;
  for (int i = 0; i < 40; i++) repeated += kHostile;
  const std::string hostile = t.write("<script>alert(1)<%script><!--.txt", repeated);
  REQUIRE(t.stats("'" + hostile + "'").status == 0);
  const std::string page = t.page_text();
  for (const char* part : {"<", "</script", "<script", "<!--", "onerror"}) {
    CAPTURE(part);
    CHECK(count(page, part) == count(expected, part));
  }
  CHECK(joined_sample(t.data().at("vocabularies")[0]) == repeated);
  CHECK(t.data().at("text").at("name") == "<script>alert(1)<%script><!--.txt");
}

TEST_CASE("the page of bpe stats allows its own script and style and nothing else") {
  PageTest t;
  REQUIRE(t.stats(t.write("text.txt", "A text.")).status == 0);
  const std::string page = t.page_text();
  const auto between = [&](const std::string& begin, const std::string& end) {
    const size_t i = page.find(begin) + begin.size();
    return page.substr(i, page.find(end, i) - i);
  };
  const std::string policy = between("http-equiv=\"Content-Security-Policy\" content=\"", "\"");
  CHECK(contains(policy, "default-src 'none'"));
  CHECK(contains(policy, "script-src 'sha256-" +
                             sha256_base64(between("<script type=\"module\">", "</script>")) +
                             "'"));
  CHECK(
      contains(policy, "style-src 'sha256-" + sha256_base64(between("<style>", "</style>")) + "'"));
  for (const char* outside : {"src=\"", "href=\"http", "url(", "@import", "import "}) {
    CAPTURE(outside);
    CHECK(count(page, outside) == 0);
  }
}

TEST_CASE("the files of web/ are in the binary and on the page, byte for byte") {
  PageTest t;
  REQUIRE(t.stats(t.write("text.txt", "A text.")).status == 0);
  const std::string page = t.page_text();
  const std::filesystem::path web = std::filesystem::canonical("test") / ".." / "web";
  const std::pair<const char*, std::string_view> files[] = {{"style.css", web::style_css()},
                                                            {"tokens.js", web::tokens_js()},
                                                            {"stats.html", web::stats_html()},
                                                            {"stats.js", web::stats_js()}};
  for (const auto& [file, embedded] : files) {
    const std::string name = file;
    CAPTURE(name);
    const std::string content = read_file(web / name);
    CHECK(content == embedded);
    CHECK(content.size() > 1000);
    CHECK(count(page, content) == 1);
    CHECK_FALSE(contains(content, "innerHTML"));
  }
}

TEST_CASE("bpe stats writes its page from any directory") {
  PageTest t;
  const std::string text = t.write("text.txt", "A text.");
  const std::string bpe = std::filesystem::absolute("bpe");
  REQUIRE(t.stats(text).status == 0);
  const std::string expected = t.page_text();
  const Output o = shell("cd " + t.dir.path().string() + " && " + bpe +
                         " stats first text.txt --html other.html");
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK(read_file(t.dir / "other.html") == expected);
}

TEST_CASE("the page of bpe stats shows a bounded part of the text and says how much") {
  PageTest t;
  const std::string long_text = words(5, 300'000);
  const std::string text = t.write("text.txt", long_text);
  size_t small_page = 0;
  for (const size_t sample : {size_t(0), size_t(1), size_t(1000), size_t(20'000)}) {
    CAPTURE(sample);
    REQUIRE(t.stats(concat(text, " --with ", t.second, " --sample ", sample)).status == 0);
    const Json data = t.data();
    const size_t shown = data.at("sampled").at("shown");
    CHECK(shown <= sample);
    CHECK(shown + 200 >= sample);  // the cut is safe there: the tokens are those of the whole text
    CHECK(data.at("sampled").at("whole") == long_text.size());
    CHECK(joined_sample(data.at("vocabularies")[0]) == long_text.substr(0, shown));
    for (size_t v = 0; v < 2 && shown > 500; v++) {  // the first tokens of the whole text
      std::vector<int> ids = Tokenizer::load(v ? t.second : t.first).encode(long_text), found;
      for (const Json& token : data.at("vocabularies")[v].at("sample")[0])
        found.push_back(token[0]);
      ids.resize(found.size());
      CHECK(found == ids);
    }
    CHECK(data.at("vocabularies")[0].at("tokens").get<size_t>() >
          long_text.size() / 10);  // of the whole text
    if (sample == 0) small_page = t.page_text().size();
  }
  CHECK(t.page_text().size() < small_page + 20'000 * 30);

  std::string lines;
  for (uint64_t i = 0; i < 300; i++) lines += json_line(Json{{"text", words(i, 100)}});
  REQUIRE(t.stats(t.write("many.jsonl", lines) + " --sample 1000").status == 0);
  const Json data = t.data();
  CHECK(data.at("sample").size() > 5);
  CHECK(data.at("sample").size() <= 10);
  CHECK(data.at("sampled").at("shown") <= 1000);
  CHECK(data.at("sampled").at("shown") > 800);

  // A single word without a safe cut ends between two characters.
  REQUIRE(t.stats(t.write("word.txt", std::string(40'000, 'a') + "\u00e9") + " --sample 20001")
              .status == 0);
  CHECK(t.data().at("sampled").at("shown") == 20'001);
  std::string accents;
  for (int i = 0; i < 20'000; i++) accents += "\u00e9";
  REQUIRE(t.stats(t.write("word.txt", accents) + " --sample 20001").status == 0);
  CHECK(t.data().at("sampled").at("shown") == 20'000);
}

TEST_CASE("bpe stats refuses what is no text in one line, and writes no page then") {
  PageTest t;
  const std::string text = t.write("text.txt", "A text.");
  const std::pair<std::string, std::string> refused[] = {
      {t.second, "second: found a model or tokenizer, expected text; --with"},
      {t.second + "/tokenizer.json", "found a model or tokenizer"},
      {t.dir / "absent.txt", "absent.txt: cannot open"},
      {t.write("empty.txt", ""), "empty.txt: found an empty file"},
      {t.write("blank.jsonl", "{\"text\":\"\"}\n"), "found documents without text"},
      {text + " --with " + (t.dir / "absent").string(), "absent"},
      {text + " --sample -1", "--sample: found -1"},
      {text + " --threads 0", "--threads: found 0"},
      {text + " " + t.page, "is an input, expected another file"}};
  write_file(t.page, "what was there");
  for (const auto& [given, part] : refused) {
    const std::string arguments = given;
    CAPTURE(arguments);
    const Output o = t.stats(arguments);
    CHECK(o.status == 1);
    CHECK_MESSAGE(o.text.starts_with("error: "), o.text);
    CHECK_MESSAGE(contains(o.text, part), o.text);
    CHECK_MESSAGE(count(o.text, "\n") == 1, o.text);
    CHECK(t.page_text() == "what was there");
    CHECK_FALSE(std::filesystem::exists(t.page + ".partial"));
  }
  CHECK(contains(shell("./bpe stats " + t.first + " " + text + " --html /nowhere/page.html").text,
                 "cannot create"));
}

TEST_CASE("visible_token shows every byte of a token on one line") {
  CHECK(visible_token(" the\n\t\r") == " the\\n\\t\\r");
  CHECK(visible_token("\u00e9\xC3") == "\u00e9\\xc3");
  CHECK(visible_token(std::string_view("\0\x1b[31m\x7f", 7)) == "\\x00\\x1b[31m\\x7f");
  CHECK(visible_token("\u200b\u202e\ufeff\u0085") == "\\u200b\\u202e\\ufeff\\u0085");
}

TEST_CASE("sha256 gives the published digests") {
  const auto hex = [](std::string_view text) {
    std::string out;
    for (const unsigned char byte : sha256(text)) out += format("%02x", unsigned(byte));
    return out;
  };
  CHECK(hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hex(std::string(1'000'000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  CHECK(sha256_base64("") == "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
}

// WCAG 2.2: relative luminance and contrast of two colours, "#rrggbb".
double luminance(const std::string& colour) {
  double sum = 0;
  const double weights[] = {.2126, .7152, .0722};
  for (size_t i = 0; i < 3; i++) {
    const double c = std::stoi(colour.substr(1 + 2 * i, 2), nullptr, 16) / 255.;
    sum += weights[i] * (c <= .04045 ? c / 12.92 : std::pow((c + .055) / 1.055, 2.4));
  }
  return sum;
}
double contrast(const std::string& a, const std::string& b) {
  const double x = luminance(a), y = luminance(b);
  return (std::max(x, y) + .05) / (std::min(x, y) + .05);
}

TEST_CASE("text on the pages has a contrast of 4.5 in both themes, edges of tokens and fields 3") {
  const std::string css(web::style_css());
  std::map<std::string, std::array<std::string, 2>> colours;
  const std::regex variable("--([a-z0-9-]+): light-dark\\((#[0-9a-f]{6}), (#[0-9a-f]{6})\\)");
  for (std::sregex_iterator i(css.begin(), css.end(), variable), end; i != end; ++i) {
    colours[(*i)[1]] = {(*i)[2], (*i)[3]};
  }
  for (const size_t theme : {0, 1}) {
    CAPTURE(theme);
    const auto at_least = [&](const std::string& a, const std::string& b, double least) {
      CHECK_MESSAGE(contrast(colours.at(a)[theme], colours.at(b)[theme]) >= least, a, " on ", b);
    };
    for (const char* text : {"ink", "quiet", "accent"}) {
      for (const char* ground : {"paper", "raised", "track"}) at_least(text, ground, 4.5);
    }
    for (const char* i : {"0", "1", "2", "3", "4"}) {
      const std::string tint = std::string("tint-") + i;
      for (const char* text : {"ink", "mark", "byte"}) at_least(text, tint, 4.5);
      at_least(std::string("edge-") + i, "raised", 3);
    }
    for (const char* text : {"mark", "byte"}) at_least(text, "track", 4.5);  // of a template
    at_least("accent-ink", "accent", 4.5);
    at_least("warn", "warn-ground", 4.5);
    for (const char* ground : {"paper", "raised"}) at_least("edge-field", ground, 3);
  }
}
