// The report of made-up verdicts: its figures add up, what it shows is what is nearest to a
// threshold, and no text of a page is obeyed.
#include <doctest/doctest.h>

#include "cake/corpus.h"
#include "test/support.h"

namespace cake::corpus {
namespace {

namespace fs = std::filesystem;

size_t rule_index(const std::string& name) {
  for (size_t r = 0; r < rules().size(); r++)
    if (rules()[r].name == name) return r;
  FAIL("no rule is called ", name);
  return 0;
}

// A document that passes every rule of FineWeb, by `value` where a rule's measure is given.
Verdict made_verdict(uint64_t offset) {
  Verdict v;
  v.place = {0, offset};
  v.url = concat("https://www.site", offset % 7, ".co.uk/page/", offset);
  v.id = std::to_string(offset);
  v.language = "en";
  v.bytes = 1000;
  v.begins = concat("Document ", offset, " begins.");
  v.values.assign(measures().size(), std::numeric_limits<double>::quiet_NaN());
  for (const Rule& rule : rules()) v.values[size_t(rule.measure)] = 0;
  for (const Rule& rule : rules()) {
    double& value = v.values[size_t(rule.measure)];
    if (rule.direction == Rule::min && !std::isnan(rule.fineweb)) value = rule.fineweb * 1.5;
  }
  return v;
}

void set_value(Verdict& v, const std::string& rule, double value) {
  v.values[size_t(rules()[rule_index(rule)].measure)] = value;
}
void judge(Verdict& v) { v.rule = first_failed(v.values, fineweb_thresholds()); }

OrderedJson made_summary() {
  OrderedJson thresholds = OrderedJson::object();
  for (size_t r = 0; r < rules().size(); r++) {
    const double t = fineweb_thresholds()[r];
    thresholds[std::string(rules()[r].name)] =
        std::isnan(t) ? OrderedJson(nullptr) : OrderedJson(t);
  }
  return {{"thresholds", thresholds}, {"block_lists", false}};
}

std::string report_of(const std::vector<Verdict>& verdicts, const OrderedJson& summary) {
  TempDir dir;
  TextFile file(dir / "verdicts.jsonl.zst", 1);
  for (const Verdict& v : verdicts) file.write(verdict_line(v));
  file.commit();
  write_json(dir / "summary.json", summary);
  write_report(dir.path());
  return read_file(dir / "report.html");
}

// The part of the page from its heading to the next one.
std::string section_of(const std::string& page, const std::string& id) {
  const size_t begin = page.find("id=\"" + id + "\"");
  REQUIRE_MESSAGE(begin != std::string::npos, id);
  const std::string part = page.substr(begin, page.find("<h2 ", begin) - begin);
  const size_t next_card = part.find("<div class=\"card\" id=");
  return id.starts_with("rule-") ? part.substr(0, next_card) : part;
}

std::string without_tags(const std::string& html) {
  std::string out;
  bool is_tag = false;
  for (const char c : html) {
    if (c == '<') is_tag = true;
    if (!is_tag) out += c;
    if (c == '>') is_tag = false;
  }
  return out;
}

// The cells of all rows of the tables, as text.
std::vector<std::vector<std::string>> rows_of(const std::string& html) {
  std::vector<std::vector<std::string>> rows;
  for (size_t i = 0; (i = html.find("<tr", i)) != std::string::npos;) {
    const size_t end = html.find("</tr>", i);
    std::vector<std::string>& row = rows.emplace_back();
    while ((i = html.find("<td", i)) < end) {
      const size_t cell_end = html.find("</td>", i);
      row.push_back(without_tags(html.substr(i, cell_end - i)));
      i = cell_end;
    }
    i = end;
  }
  return rows;
}
std::vector<std::string> row_of(const std::string& html, const std::string& name) {
  for (const auto& row : rows_of(html))
    if (!row.empty() && row[0] == name) return row;
  FAIL("no row is called ", name);
  return {};
}

int64_t count_in(std::string text) {
  std::erase(text, ',');
  return text.empty() ? 0 : std::stoll(text);
}

// Every tag is one of the report's own, is closed in order, and refers to nothing outside.
std::string fault_of_html(const std::string& html) {
  static const std::set<std::string> kTags = {
      "html",  "head", "title", "style", "body",    "h1",      "h2",  "h3",  "nav",
      "a",     "p",    "i",     "b",     "small",   "ul",      "li",  "div", "span",
      "table", "tr",   "th",    "td",    "details", "summary", "svg", "g",   "text"};
  static const std::set<std::string> kVoid = {"meta", "line", "rect"};
  std::vector<std::string> open;
  REQUIRE(html.starts_with("<!doctype html>"));
  for (size_t i = 1; (i = html.find('<', i)) != std::string::npos; i++) {
    const size_t end = html.find('>', i);
    const std::string tag = html.substr(i + 1, end - i - 1);
    if (end == std::string::npos || tag.empty()) return "a < without a tag";
    const bool closes = tag[0] == '/';
    const std::string name = tag.substr(closes, tag.find_first_of(" /", closes) - closes);
    const size_t href = tag.find("href=");
    if (href != std::string::npos && !tag.substr(href).starts_with("href=\"#")) return tag;
    if (contains(tag, "src=") || contains(tag, " on")) return tag;
    if (kVoid.count(name)) continue;
    if (!kTags.count(name)) return tag;
    if (!closes) {
      open.push_back(name);
    } else if (open.empty() || open.back() != name) {
      return "a stray </" + name + ">";
    } else {
      open.pop_back();
    }
  }
  return open.empty() ? "" : "an open <" + open.back() + ">";
}

// Documents of all fates, in a fixed order.
std::vector<Verdict> made_verdicts(int n) {
  std::vector<Verdict> all;
  for (int i = 0; i < n; i++) {
    Verdict v = made_verdict(uint64_t(i));
    Rng rng{uint64_t(i)};
    v.bytes = 500 + int64_t(rng.below(1000));
    set_value(v, "min-words", double(20 + rng.below(300)));
    set_value(v, "max-duplicate-lines", rng.uniform() * rng.uniform() * .6);
    if (rng.below(5) == 0) v.language = "de", set_value(v, "language-share", rng.uniform());
    if (rng.below(9) == 0) set_value(v, "max-curly-bracket-lines", double(rng.below(4)));
    judge(v);
    if (v.rule < 0 && i > 50 && rng.below(4) == 0) {
      v.original = Place{0, rng.below(5)};
      v.exact = rng.below(2) == 0;
    } else if (v.rule < 0 && rng.below(20) == 0) {
      v.empty = true;
    }
    if (rng.below(6) == 0) v.private_data = 2;
    all.push_back(v);
  }
  return all;
}

}  // namespace

TEST_CASE("report: the funnel begins with all documents, and its steps add up to those kept") {
  const std::vector<Verdict> verdicts = made_verdicts(1500);
  const std::string page = report_of(verdicts, made_summary());
  CHECK(fault_of_html(page) == "");
  std::map<std::string, int64_t> reasons;
  int64_t kept_bytes = 0, private_data = 0;
  for (const Verdict& v : verdicts) {
    reasons[std::string(v.reason())]++;
    if (v.kept()) kept_bytes += v.bytes, private_data += v.private_data;
  }
  REQUIRE(reasons.size() >= 7);  // of rules, empty, both kinds of duplicates, kept

  const std::string funnel = section_of(page, "funnel");
  int64_t left = 1500;
  CHECK(row_of(funnel, "reading")[2] == "1,500");
  for (const auto& row : rows_of(funnel)) {
    if (row.empty()) continue;
    left -= count_in(row[1]);
    CHECK(count_in(row[2]) == left);
    CHECK(row[3] == (left == 1500 ? "100.0 %" : format("%.1f %%", double(left) / 15)));
  }
  CHECK(left == reasons["kept"]);
  CHECK(rows_of(funnel).back()[5] == bytes_text(double(kept_bytes)));
  CHECK(count_in(row_of(funnel, "exact duplicates")[1]) == reasons["exact-duplicate"]);
  CHECK(count_in(row_of(funnel, "near duplicates")[1]) == reasons["near-duplicate"]);
  CHECK(count_in(row_of(funnel, "documents left without text")[1]) == reasons["empty"]);
  CHECK(count_in(row_of(funnel, "Language")[1]) == reasons["language-share"]);
  CHECK(contains(funnel, "no block list given"));
  CHECK(contains(section_of(page, "private"), count_text(double(private_data)) + " e-mail"));
}

TEST_CASE("report: each rule's figures and histogram count all documents") {
  const std::vector<Verdict> verdicts = made_verdicts(1500);
  const std::string page = report_of(verdicts, made_summary());
  const Thresholds thresholds = fineweb_thresholds();
  const std::string table = section_of(page, "rules");
  for (const char* name : {"language-share", "max-duplicate-lines", "min-words",
                           "max-curly-bracket-lines", "max-words"}) {
    CAPTURE(name);
    const size_t r = rule_index(name);
    const Rule& rule = rules()[r];
    int64_t dropped = 0, failed = 0, alone = 0, passed = 0;
    for (const Verdict& v : verdicts) {
      int failing = 0;
      bool this_fails = false;
      for (size_t i = 0; i < rules().size(); i++) {
        const double x = v.values[size_t(rules()[i].measure)];
        const bool fails =
            rules()[i].direction == Rule::min ? x < thresholds[i] : x > thresholds[i];
        failing += fails;
        if (i == r) this_fails = fails;
      }
      dropped += v.rule == int(r), failed += this_fails, alone += this_fails && failing == 1;
      passed += !this_fails;
    }
    const auto row = row_of(table, name);
    CHECK(row[1] ==
          (rule.direction == Rule::min ? "at least " : "at most ") +
              (thresholds[r] >= 1000 ? count_text(thresholds[r]) : format("%g", thresholds[r])));
    CHECK(count_in(row[2]) == dropped);
    CHECK(count_in(row[5]) == failed);
    CHECK(count_in(row[6]) == alone);

    const std::string card = section_of(page, concat("rule-", name));
    CHECK(contains(card, count_text(double(dropped)) + " dropped by it first, " +
                             count_text(double(failed)) + " fail it, of 1,500 measured"));
    int64_t bars_pass = 0, bars_fail = 0;
    for (size_t i = 0; (i = card.find("<title>", i)) != std::string::npos; i++) {
      const std::string bar = card.substr(i, card.find("</title>", i) - i);
      bars_pass += count_in(bar.substr(bar.find(": ") + 2));
      bars_fail += count_in(bar.substr(bar.find("pass, ") + 6));
    }
    CHECK(bars_pass == passed);
    CHECK(bars_fail == failed);
    CHECK(contains(card, "class=\"threshold\""));
  }
}

TEST_CASE("report: bars stand on the side of the threshold where their documents are") {
  for (const bool is_whole : {true, false}) {
    CAPTURE(is_whole);
    std::vector<Verdict> verdicts;
    const std::string least = is_whole ? "min-words" : "min-alphabetic-words";
    const std::string most = is_whole ? "max-words" : "max-duplicate-lines";
    const double unit = is_whole ? 1 : 1e-9;
    const double least_threshold = rules()[rule_index(least)].fineweb;
    const double most_threshold = rules()[rule_index(most)].fineweb;
    for (int i = 0; i < 12; i++) {
      Verdict v = made_verdict(uint64_t(i));
      set_value(v, least, least_threshold + unit * (i % 4 - 2));
      if (i >= 8) set_value(v, most, most_threshold + unit * (i % 4 - 1));
      judge(v);
      verdicts.push_back(v);
    }
    const std::string page = report_of(verdicts, made_summary());
    for (const std::string& name : {least, most}) {
      CAPTURE(name);
      const std::string card = section_of(page, "rule-" + name);
      double line = 0;
      const size_t threshold = card.find("class=\"threshold\"");
      REQUIRE(threshold != std::string::npos);
      const size_t begin = card.rfind("<line", threshold);
      REQUIRE(std::sscanf(card.substr(begin).c_str(), "<line x1=\"%lf\"", &line) == 1);
      for (const char* kind : {"pass", "fail"}) {
        int bars = 0;
        const std::string bar = concat("<rect class=\"", kind, "\" x=\"");
        for (size_t i = 0; (i = card.find(bar, i)) != std::string::npos; i++, bars++) {
          double x = 0, width = 0, y = 0;
          REQUIRE(std::sscanf(card.c_str() + i + bar.size(), "%lf\" y=\"%lf\" width=\"%lf\"", &x,
                              &y, &width) == 3);
          const bool is_left = x + width / 2 < line;
          CHECK(is_left == ((kind[0] == 'p') == (name == most)));
        }
        CHECK(bars > 0);
      }
    }
  }
}

TEST_CASE("report: the samples of a rule are the documents nearest to its threshold") {
  std::vector<Verdict> verdicts;
  const size_t rule = rule_index("min-words");
  const double threshold = rules()[rule].fineweb;
  for (int i = 0; i < 100; i++) {
    Verdict v = made_verdict(uint64_t(i));
    set_value(v, "min-words", threshold - 50 + i);  // the threshold itself passes
    judge(v);
    verdicts.push_back(v);
  }
  const std::string card = section_of(report_of(verdicts, made_summary()), "rule-min-words");
  std::map<std::string, std::vector<std::string>> values;
  for (const auto& row : rows_of(card)) {
    if (row.size() != 3) continue;
    values[row[0]].push_back(row[1]);
    const int i = std::stoi(row[1]) - int(threshold) + 50;
    CHECK(contains(row[2], concat("/page/", i)));
    CHECK(contains(row[2], concat("Document ", i, " begins.")));
  }
  CHECK(values["dropped, nearest"] == std::vector<std::string>{"49", "48", "47", "46"});
  CHECK(values["kept, nearest"] == std::vector<std::string>{"50", "51", "52", "53"});
  CHECK(values["dropped, any"].size() == 4);
}

TEST_CASE("report: languages and sites are counted with what is kept of them") {
  std::vector<Verdict> verdicts;
  const char* const urls[] = {"http://a.example.co.uk/x",
                              "https://user:word@WWW.Example.co.uk:8080?q",
                              "http://example.co.uk./",
                              "http://me.github.io/",
                              "http://you.github.io/",
                              "http://10.0.0.1:80/",
                              "http://[2001:db8::1]:80/",
                              "no address",
                              ""};
  for (const char* url : urls) {
    Verdict v = made_verdict(verdicts.size());
    v.url = url;
    v.language = verdicts.size() < 3 ? "en" : "fr";
    v.empty = verdicts.size() == 1;
    verdicts.push_back(v);
  }
  const std::string page = report_of(verdicts, made_summary());
  const std::string sites = section_of(page, "sites");
  CHECK(row_of(sites, "example.co.uk") ==
        std::vector<std::string>{"example.co.uk", "3", "33.3 %", "2", "66.7 %", ""});
  for (const char* site : {"me.github.io", "you.github.io", "10.0.0.1", "[2001:db8::1]"}) {
    CHECK(row_of(sites, site)[1] == "1");
  }
  CHECK(contains(sites, "5 registered hosts"));
  CHECK(contains(sites, "2 documents have no URL of a site"));
  const std::string languages = section_of(page, "languages");
  CHECK(row_of(languages, "en")[1] == "3");
  CHECK(row_of(languages, "en")[3] == "2");
  CHECK(row_of(languages, "fr")[4] == "100.0 %");
}

TEST_CASE("report: clusters of duplicates are shown by size, with their documents") {
  std::vector<Verdict> verdicts;
  for (uint64_t i = 0; i < 40; i++) {
    Verdict v = made_verdict(i);
    if (i >= 4) {  // of document 0: 29 copies, of 1: 4, of 2: 2, of 3: 1
      v.original = Place{0, i < 33 ? 0 : i < 37 ? 1u : i < 39 ? 2u : 3u};
      v.exact = i % 2 == 0;
    }
    verdicts.push_back(v);
  }
  const std::string page = report_of(verdicts, made_summary());
  const std::string part = section_of(page, "duplicates");
  CHECK(contains(part, "18 exact and 18 near duplicates"));
  CHECK(row_of(part, "2")[1] == "1");
  CHECK(row_of(part, "3")[1] == "1");
  CHECK(row_of(part, "4 to 5")[1] == "1");
  CHECK(row_of(part, "11 to 100")[1] == "1");
  const size_t largest = part.find("29 copies of " + verdicts[0].url),
               second = part.find("4 copies of " + verdicts[1].url),
               last = part.find("1 copy of " + verdicts[3].url);
  CHECK(largest < second);
  CHECK(second < last);
  CHECK(last != std::string::npos);
  const auto rows = rows_of(part.substr(second, last - second));
  REQUIRE(rows.size() >= 5);
  CHECK(contains(rows[1][1], "Document 1 begins."));
  CHECK((rows[2][0] == "exact-duplicate" || rows[2][0] == "near-duplicate"));
}

TEST_CASE("report: the text of hostile pages is shown and not obeyed") {
  const std::string attack =
      "\"'><script>alert(1)</script></td></table><img src=x onerror=alert(2)><a href=\"http://x\">"
      "</style></title><!--<![CDATA[&lt;<svg onload=alert(3)>";
  std::vector<Verdict> verdicts;
  for (int i = 0; i < 8; i++) {
    Verdict v = made_verdict(uint64_t(i));
    v.url = "http://" + attack + (i % 2 ? ".com" : "") + "/" + attack;
    v.begins = attack + std::string("\0\x01\x1b", 3), v.match = attack, v.language = attack;
    if (i > 4) set_value(v, "min-words", 1);
    if (i == 3) v.original = Place{0, 0};
    judge(v);
    verdicts.push_back(v);
  }
  OrderedJson summary = made_summary();
  summary["problems"] = {{attack, 3}};
  summary["languages_wanted"] = {attack};
  const std::string page = report_of(verdicts, summary);
  CHECK(fault_of_html(page) == "");
  CHECK(!contains(page, "<script"));
  CHECK(!contains(page, "<img"));
  CHECK(contains(page, "&lt;script&gt;alert(1)&lt;/script&gt;"));
  CHECK(page.find('\0') == std::string::npos);
  CHECK(page.find('\x1b') == std::string::npos);
}

TEST_CASE("report: what the summary knows is said, and what it lacks is left out") {
  OrderedJson summary = made_summary();
  summary.update({{"inputs", 3},
                  {"documents", 10},
                  {"bytes_read", 4000000},
                  {"html_bytes", 8000000},
                  {"parsed_bytes", 2000000},
                  {"problems", {{"truncated gzip data", 1234}}},
                  {"languages_wanted", {"en", "de"}},
                  {"seconds", {{"pages", 2.0}, {"duplicates", .5}, {"write", .25}}},
                  {"threads", 2}});
  const std::vector<Verdict> verdicts = made_verdicts(10);
  const std::string page = without_tags(report_of(verdicts, summary));
  for (const char* text :
       {"3 inputs, 4.0 MB read.", "Of 8.0 MB of HTML, 2.0 MB (25.0 %) were given",
        "Languages wanted: en, de.", "truncated gzip data1,234", "2.0 MB", "No block list given",
        "reading, extraction and rules 2.0 s, duplicates 0.5 s, writing 0.2 s (threads 2)"}) {
    CHECK_MESSAGE(contains(page, text), text);
  }
  CHECK(!contains(page, "The summary counts"));

  const std::string bare = without_tags(report_of(verdicts, OrderedJson::object()));
  for (const std::string text :
       {"NaN", "nan", "inf", "of HTML", "Languages wanted", "No block list"}) {
    CHECK_MESSAGE(!contains(bare, text), text);
  }
  summary["documents"] = 11;
  CHECK(contains(report_of(verdicts, summary), "The summary counts 11 documents, the verdicts 10"));
}

TEST_CASE("report: a run without documents has one too, and the same run the same bytes") {
  const std::string empty = report_of({}, made_summary());
  CHECK(fault_of_html(empty) == "");
  CHECK(contains(empty, "No document was measured."));
  CHECK(row_of(section_of(empty, "funnel"), "near duplicates")[2] == "0");
  for (const int n : {1, 10, 400}) {
    const std::string page = report_of(made_verdicts(n), made_summary());
    CHECK(fault_of_html(page) == "");
    CHECK(page.size() < 600000);
    // The folder's name is in the title.
    const std::string again = report_of(made_verdicts(n), made_summary());
    const size_t begin = page.find("<nav>");
    CHECK((page.substr(begin) == again.substr(begin)));
  }
}

TEST_CASE("report: missing and damaged files are named") {
  TempDir dir;
  const auto error = [&] { return error_of([&] { write_report(dir.path()); }); };
  CHECK(contains(error(), "summary.json: cannot open"));
  write_file(dir / "summary.json", "[]");
  CHECK(contains(error(), "summary.json: found [], expected an object"));
  write_file(dir / "summary.json", "{\"thresholds\": {\"min-words\": \"50\"}}");
  CHECK(contains(error(), "thresholds: min-words: found \"50\", expected a number"));
  write_file(dir / "summary.json", "{}");
  CHECK(contains(error(), "verdicts.jsonl.zst: cannot open"));
  TextFile file(dir / "verdicts.jsonl.zst", 1);
  file.write(verdict_line(made_verdict(0)));
  file.write("{}\n");
  file.commit();
  CHECK(contains(error(), "verdicts.jsonl.zst:2: "));
  CHECK(!fs::exists(dir / "report.html"));
}

}  // namespace cake::corpus
