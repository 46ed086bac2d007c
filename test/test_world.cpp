// The closed world: what the documents promise, checked by reading the documents.
#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

#include "cake/json.h"
#include "dev/world.h"
#include "test/support.h"

using namespace cake;
using namespace cake::world;

namespace {

struct Baked {
  World world;
  world::Corpus corpus;
};

Baked bake(uint64_t seed, int64_t tokens) {
  Baked b{make_world({.seed = seed, .tokens = tokens}), {}};
  b.corpus = make_corpus(b.world);
  return b;
}
const Baked& small_world() {
  static const Baked b = bake(7, 300'000);
  return b;
}
const Baked& default_world() {
  static const Baked b = bake(1, WorldOptions().tokens);
  return b;
}

std::string joined(const world::Corpus& corpus) {
  std::string text;
  for (const auto* part : {&corpus.documents, &corpus.held_out})
    for (const Document& d : *part) text += d.kind + "\n" + d.text + "\n";
  for (const Probe& p : corpus.probes) text += p.task + p.prompt + p.answer;
  return text;
}

// The sentences of a text: pieces that end in . or ?, without the spaces, newlines and "Q: ", "A: "
// before them. A point between digits ends nothing.
std::vector<std::string> sentences(const std::string& text) {
  std::vector<std::string> found;
  std::string now;
  for (size_t i = 0; i < text.size(); i++) {
    if (now.empty() && (text[i] == ' ' || text[i] == '\n')) continue;
    now += text[i];
    if (now == "Q: " || now == "A: ") now.clear();
    const bool digit = i + 1 < text.size() && std::isdigit((unsigned char)text[i + 1]);
    if (text[i] == '?' || (text[i] == '.' && !digit)) {
      found.push_back(now);
      now.clear();
    }
  }
  return found;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
  }
  return lines;
}

int occurrences(const std::string& text, const std::string& what) {
  int n = 0;
  for (size_t at = 0; (at = text.find(what, at)) != text.npos; at += what.size()) n++;
  return n;
}

struct Equation {
  int a, b, c;
  char op;
};

// Every "a op b = c" of a text.
std::vector<Equation> equations(const std::string& text) {
  std::vector<Equation> found;
  for (size_t at = 0; (at = text.find(" = ", at)) != text.npos; at += 3) {
    size_t begin = at;
    while (begin > 0 && (std::isdigit((unsigned char)text[begin - 1]) || text[begin - 1] == ' ' ||
                         std::string("+-*").find(text[begin - 1]) != std::string::npos))
      begin--;
    Equation e{};
    if (std::sscanf(text.c_str() + begin, "%d %c %d = %d", &e.a, &e.op, &e.b, &e.c) == 4)
      found.push_back(e);
  }
  return found;
}

}  // namespace

TEST_CASE("the same seed makes the same world, another seed another") {
  const std::string first = joined(small_world().corpus);
  CHECK(first == joined(bake(7, 300'000).corpus));
  CHECK(first != joined(bake(8, 300'000).corpus));
}

TEST_CASE("a world of the default size tells its facts as often as promised") {
  const World& world = default_world().world;
  std::map<Level, std::set<std::string>> people;
  std::map<Level, int> facts;
  std::set<std::string> names;
  for (const Person& person : world.people) {
    CHECK(names.insert(person.name).second);
    people[person.level].insert(person.name);
    facts[person.level] += int(person.facts.size());
    for (const Fact& fact : person.facts) {
      const auto& values = attributes()[size_t(fact.attribute)].values;
      CHECK(std::count(values.begin(), values.end(), fact.value) == 1);
      if (person.level == Level::often) CHECK(fact.tellings >= 150);
      if (person.level == Level::sometimes) CHECK(fact.tellings == 15);
      if (person.level == Level::rarely) CHECK(fact.tellings == 2);
    }
  }
  CHECK(facts[Level::often] == 240);
  CHECK(people[Level::sometimes].size() == 120);
  CHECK(people[Level::rarely].size() == 120);
  CHECK(people[Level::unknown].size() == 500);
  CHECK(facts[Level::unknown] == 0);
  for (const Attribute& a : attributes()) {
    CHECK(a.values.size() >= 10);
    CHECK(a.values.size() <= 24);
    CHECK(std::set<std::string>(a.values.begin(), a.values.end()).size() == a.values.size());
  }
}

TEST_CASE("the tellings in the world's record are those in its documents") {
  const Baked& b = small_world();
  std::string text;
  for (const Document& d : b.corpus.documents)
    if (d.kind == "facts") text += d.text + "\n";
  for (const Person& person : b.world.people) {
    int64_t told = 0;
    for (const Fact& fact : person.facts) told += fact.tellings;
    if (person.level == Level::unknown) {
      CHECK(text.find(person.name) == text.npos);
    } else {
      // A question and its answer name the person twice and are one telling.
      int questions = 0;
      for (const std::string& s : sentences(text))
        questions += s.back() == '?' && s.find(person.name) != s.npos;
      CHECK(occurrences(text, person.name) - questions == told);
    }
  }
}

TEST_CASE("a larger budget tells the same facts more often, a small one tells fewer facts") {
  const World& world = default_world().world;
  World large = make_world({.seed = 1, .tokens = 2 * WorldOptions().tokens});
  REQUIRE(large.people.size() == world.people.size());
  make_corpus(large);
  for (size_t i = 0; i < world.people.size(); i++) {
    if (world.people[i].level != Level::often) continue;
    for (size_t f = 0; f < world.people[i].facts.size(); f++) {
      CHECK(large.people[i].facts[f].value == world.people[i].facts[f].value);
      CHECK(large.people[i].facts[f].tellings > 2 * world.people[i].facts[f].tellings - 5);
    }
  }
  for (const Person& person : small_world().world.people) {
    if (person.level != Level::often) continue;
    for (const Fact& fact : person.facts) CHECK(fact.tellings >= 150);
  }
}

TEST_CASE("no document holds a held-out combination") {
  const Baked& b = default_world();
  std::unordered_set<std::string> said;
  int sums = 0, problems = 0;
  for (const Document& d : b.corpus.documents) {
    for (const std::string& s : sentences(d.text)) said.insert(s);
    for (const Equation& e : equations(d.text)) {
      if (e.op == '+') REQUIRE_FALSE(held_out_sum(e.a, e.b));
    }
    if (d.kind == "sums") {
      for (const std::string& s : sentences(d.text)) {
        int x = 0, y = 0;
        if (std::sscanf(s.c_str(), "%d + %d = ?", &x, &y) == 2 && s.back() == '?') {
          REQUIRE_FALSE(held_out_sum(x, y));
          sums++;
        }
      }
    }
    if (d.kind != "word problems") continue;
    for (const std::string& line : lines_of(d.text)) {
      if (line.starts_with("Steps: ") || line.starts_with("Answer: ")) continue;
      REQUIRE(problem_part(line) == Part::training);
      problems++;
    }
  }
  CHECK(sums > 1000);
  CHECK(problems > 1000);

  std::map<std::string, int> asked;
  for (const Probe& p : b.corpus.probes) {
    asked[p.task]++;
    if (p.task == "context" || p.task == "context_alike") {
      // The question's statement is the one of the passage that no document makes.
      const auto passage = sentences(p.prompt);
      const auto known = [&](const std::string& s) { return said.count(s) == 1; };
      CHECK_FALSE(std::all_of(passage.begin(), passage.end() - 1, known));
    } else if (p.task == "facts_often_new_phrasing") {
      CHECK_FALSE(said.count(p.prompt));
    } else if (p.task == "facts_often" || p.task == "facts_rarely") {
      CHECK(p.prompt.back() == '?');
    } else if (p.task == "word_problems") {
      CHECK(problem_part(p.prompt.substr(0, p.prompt.find('\n'))) == Part::test);
    } else if (p.task == "sums") {
      int x = 0, y = 0;
      REQUIRE(std::sscanf(p.prompt.c_str(), "%d + %d = ?", &x, &y) == 2);
      CHECK(held_out_sum(x, y));
      CHECK(p.answer == std::to_string(x + y));
    }
  }
  CHECK(asked["facts_often_new_phrasing"] > 50);
  for (const char* task : {"facts_often", "facts_sometimes", "context", "context_alike", "sums",
                           "word_problems", "word_problems_direct"})
    CHECK(asked[task] == 500);
}

TEST_CASE("a passage's statements are each asked in every round and answered in their own words") {
  const auto relation = [](const std::string& statement) {
    std::string found;
    for (const char* verb : {" put ", " gave ", " went ", " bought ", " lives ", " likes ", " is a",
                             " of ", " has ", " sits ", " met ", " plays "})
      if (statement.find(verb) != statement.npos) found += verb;
    return found;
  };
  int passages = 0, alike = 0;
  std::map<size_t, int> rounds;
  for (const Document& d : default_world().corpus.documents) {
    if (d.kind != "passages") continue;
    CAPTURE(d.text);
    passages++;
    const size_t middle = d.text.rfind('\n', d.text.find('?'));  // before the first question
    REQUIRE(middle != d.text.npos);
    std::string body = d.text.substr(0, middle);
    if (const size_t opening = body.find(": "); opening != body.npos) body.erase(0, opening + 2);
    const std::vector<std::string> statements = sentences(body);
    std::map<std::string, size_t> answers, questions;
    bool asks_for_names = false;
    for (const std::string& s : sentences(d.text.substr(middle))) {
      (s.back() == '?' ? questions : answers)[s]++;
      asks_for_names |= s.find("Who ") != s.npos && s.find("Who got ") == s.npos;
    }
    REQUIRE(statements.size() >= 2);
    REQUIRE(questions.size() == statements.size());
    REQUIRE(answers.size() == statements.size());
    const size_t asked = answers.begin()->second;
    rounds[asked]++;
    std::set<std::string> relations;
    for (const std::string& s : statements) {
      REQUIRE(answers[s] == asked);
      relations.insert(relation(s));
    }
    for (const auto& [question, times] : questions) REQUIRE(times == asked);
    // Told apart by what they say, or by the name alone.
    if (relations.size() == 1) {
      alike++;
    } else {
      REQUIRE(relations.size() == statements.size());
      REQUIRE_FALSE(asks_for_names);
    }
  }
  CHECK(passages > 8000);
  CHECK(alike > passages / 20);
  CHECK(alike < passages / 6);
  CHECK(rounds.size() == 3);
  CHECK(rounds[3] > passages * 9 / 10);
}

TEST_CASE("the arithmetic in the documents is right") {
  const Baked& b = default_world();
  int checked = 0, answered = 0;
  for (const auto* part : {&b.corpus.documents, &b.corpus.held_out}) {
    for (const Document& d : *part) {
      for (const Equation& e : equations(d.text)) {
        const int c = e.op == '+' ? e.a + e.b : e.op == '-' ? e.a - e.b : e.a * e.b;
        REQUIRE(e.c == c);
        REQUIRE(e.c >= 0);
        REQUIRE(e.c <= 99);
        checked++;
      }
      // The last step's result is the answer.
      if (d.kind != "sums" && d.kind != "word problems") continue;
      for (size_t at = 0; (at = d.text.find("Steps: ", at)) != d.text.npos; at++) {
        const std::string unit = d.text.substr(at, d.text.find(kAnswerEnd, at) - at) + ".";
        int answer = -1;
        // The answer is in the next line: no point ends the steps.
        REQUIRE(unit.find("\nAnswer: ") == unit.find('\n'));
        REQUIRE(std::sscanf(unit.c_str() + unit.find("Answer: "), "Answer: %d.", &answer) == 1);
        REQUIRE(equations(unit).back().c == answer);
        answered++;
      }
    }
  }
  CHECK(checked > 30'000);
  CHECK(answered > 5'000);
}

TEST_CASE("numbers are compared as numbers") {
  int compared = 0;
  for (const Document& d : default_world().corpus.documents) {
    if (d.kind != "comparing") continue;
    for (size_t at = 0; (at = d.text.find("Which is ", at)) != d.text.npos; at++) {
      char word[10] = {};
      double x = 0, y = 0, answer = 0;
      const std::string unit = d.text.substr(at);
      REQUIRE(std::sscanf(unit.c_str(), "Which is %9[a-z], %lf or %lf?", word, &x, &y) == 3);
      REQUIRE(std::sscanf(unit.c_str() + unit.find("Answer: "), "Answer: %lf", &answer) == 1);
      REQUIRE_FALSE(held_out_comparison(format("%g", x), format("%g", y)));
      REQUIRE(answer == (std::string(word) == "larger" ? std::max(x, y) : std::min(x, y)));
      compared++;
    }
  }
  CHECK(compared > 1000);
}

TEST_CASE("three word problems in four are answered with steps") {
  int steps = 0, all = 0;
  for (const Document& d : default_world().corpus.documents) {
    if (d.kind != "word problems") continue;
    steps += occurrences(d.text, "\nSteps: ");
    all += occurrences(d.text, "\nAnswer: ");
  }
  CHECK(steps > .72 * all);
  CHECK(steps < .78 * all);
}

TEST_CASE("documents are mixed as promised, have the lengths promised, and none comes twice") {
  const Baked& b = default_world();
  std::map<std::string, double> tokens;
  double all = 0, within = 0, below = 0;
  std::set<std::string> texts;
  for (const Document& d : b.corpus.documents) {
    const int64_t n = estimate_tokens(d.text);
    REQUIRE(n <= kContext);
    tokens[d.kind] += double(n);
    all += double(n);
    if (n >= kLong) within += double(n);
    if (n < kShortest) below += double(n);
    REQUIRE(texts.insert(d.text).second);
    REQUIRE_FALSE(d.text.empty());
    REQUIRE(d.text.find("\n\n") == d.text.npos);
    REQUIRE(std::all_of(d.text.begin(), d.text.end(),
                        [](char c) { return c == '\n' || (c >= ' ' && c <= '~'); }));
  }
  CHECK(all > .98 * double(b.world.options.tokens));
  CHECK(all < 1.02 * double(b.world.options.tokens));
  CHECK(within > .08 * all);  // a tenth
  CHECK(within < .12 * all);
  CHECK(below < .02 * all);
  double shares = 0;
  for (const world::Kind& kind : kinds()) {
    CAPTURE(kind.name);
    CHECK(tokens[kind.name] > .9 * kind.share * all);
    CHECK(tokens[kind.name] < 1.1 * kind.share * all);
    shares += kind.share;
  }
  CHECK(std::abs(shares - 1) < 1e-9);
  for (const Document& d : b.corpus.held_out) REQUIRE(texts.count(d.text) == 0);
  CHECK(b.corpus.held_out.size() > 500);
}

TEST_CASE("an answer counts where it must stand, and only there") {
  const Probe sentence{"context", "Where does Ben live?", "Oakford", Probe::sentence};
  CHECK(world::answers(sentence, " Ben lives in Oakford. Ann lives in Ashby."));
  CHECK(world::answers(sentence, "Oakford"));
  CHECK_FALSE(world::answers(sentence, " Ben lives in Ashby. Ann lives in Oakford."));
  CHECK_FALSE(world::answers(sentence, " Ben lives in Oakfords."));
  CHECK_FALSE(world::answers(sentence, ""));
  const Probe steps{"sums", "4 + 5 = ?\nSteps:", "9", Probe::final};
  CHECK(world::answers(steps, " 4 + 5 = 9\nAnswer: 9.\nAnswer: 1."));
  CHECK_FALSE(world::answers(steps, " 4 + 5 = 9\nAnswer: 91."));
  CHECK_FALSE(world::answers(steps, " 4 + 5 = 9.\n1 + 8 = ?\nAnswer: 9."));
  CHECK_FALSE(world::answers(steps, " 9."));
  const Probe direct{"direct", "4 + 5 = ?\nAnswer:", "9", Probe::final};
  CHECK(world::answers(direct, " 9.\nAnswer: 1."));
  CHECK_FALSE(world::answers(direct, " 19."));
  CHECK_FALSE(world::answers(direct, ""));
}

TEST_CASE("a world that is too small or has too many people is refused") {
  CHECK_THROWS_WITH_AS(make_world({.tokens = 10}), doctest::Contains("--tokens: found 10"), Error);
  CHECK_THROWS_WITH_AS(make_world({.people = 100'000}), doctest::Contains("--people"), Error);
  CHECK_THROWS_WITH_AS(make_world({.people = 0}), doctest::Contains("--people"), Error);
}

// ---------------------------------------------------------------------------------------------
// Pages of the web

namespace {

struct Web {
  Baked baked;
  std::vector<WebPage> pages;
  std::map<std::string, const WebPage*> by_url;
};
const Web& small_web() {
  static const Web* const web = [] {
    Web* w = new Web{bake(7, 300'000), {}, {}};
    w->pages = make_web_pages(w->baked.world, w->baked.corpus.documents);
    for (const WebPage& page : w->pages) w->by_url[page.url] = &page;
    return w;
  }();
  return *web;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text)
    out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : std::string(1, c);
  return out;
}
std::string host_of(const std::string& url) {
  const size_t begin = url.find("//") + 2;
  return url.substr(begin, url.find('/', begin) - begin);
}

}  // namespace

TEST_CASE(
    "every document stands on one page of sixty words or more, which holds it line for line") {
  const Web& web = small_web();
  std::multiset<std::string> lines, kept;  // of all documents, of all pages to be kept
  for (const Document& d : web.baked.corpus.documents)
    for (const std::string& line : lines_of(d.text)) lines.insert(line);
  double tokens = 0, pages = 0, longest = 0;
  for (const WebPage& page : web.pages) {
    if (page.text.empty()) continue;
    CAPTURE(page.url);
    auto of_page = lines_of(page.text);
    if (page.kind != "clean") of_page.pop_back();  // with the address, or the letters
    size_t found = 0;
    int words = 0;
    for (const std::string& line : of_page) {
      kept.insert(line);
      found = page.html.find(escaped(line), found);  // in this order
      REQUIRE(found != page.html.npos);
      found += line.size();
      std::istringstream split(line);
      for (std::string word; split >> word;)
        words += std::any_of(word.begin(), word.end(),
                             [](unsigned char c) { return std::isalnum(c) != 0; });
    }
    REQUIRE(words >= 60);
    const double n = double(estimate_tokens(page.text));
    tokens += n, pages++, longest = std::max(longest, n);
  }
  CHECK(kept == lines);
  CHECK(tokens / pages < 250);
  CHECK(longest < 2 * kContext);
}

TEST_CASE("the same seed makes the same pages, each with an address of its own that is nobody's") {
  const Web& web = small_web();
  const auto again = make_web_pages(web.baked.world, web.baked.corpus.documents);
  REQUIRE(again.size() == web.pages.size());
  for (size_t i = 0; i < again.size(); i++) {
    REQUIRE(again[i].url == web.pages[i].url);
    REQUIRE(again[i].html == web.pages[i].html);
  }
  CHECK(web.by_url.size() == web.pages.size());
  std::set<std::string> hosts;
  for (const WebPage& page : web.pages) {
    const std::string host = host_of(page.url);
    hosts.insert(host);
    REQUIRE(host.ends_with(".example"));
  }
  CHECK(hosts.size() == 36);
}

TEST_CASE("a copy comes behind its original, on another site, and is one or nearly one") {
  std::map<std::string, int> copies;
  std::set<const WebPage*> seen;
  for (const WebPage& page : small_web().pages) {
    seen.insert(&page);
    if (page.of.empty()) continue;
    CAPTURE(page.url);
    const WebPage* original = small_web().by_url.at(page.of);
    REQUIRE(seen.count(original));
    REQUIRE(original->kind == "clean");
    REQUIRE(host_of(page.url) != host_of(page.of));
    size_t same = 0;
    const auto lines = lines_of(original->text);
    for (const std::string& line : lines) same += page.html.find(escaped(line)) != page.html.npos;
    if (page.kind == "mirror") REQUIRE(same == lines.size());
    if (page.kind == "near-duplicate") REQUIRE(same + 2 >= lines.size());
    copies[page.kind]++;
  }
  CHECK(copies.size() == 2);
  CHECK(copies["mirror"] > 50);
  CHECK(copies["near-duplicate"] > 50);
}

TEST_CASE(
    "there is dirt of every kind, nearly a third of all pages, and addresses to be replaced") {
  std::map<std::string, double> pages;
  for (const WebPage& page : small_web().pages) {
    pages[page.kind]++;
    if (page.kind != "address") continue;
    const std::string line = lines_of(page.text).back();
    const bool mail = line.find("email@example.com") != line.npos;
    const std::string begins = line.substr(0, line.find(mail ? "email@" : "22.214.171.124"));
    REQUIRE(begins.size() < line.size());
    REQUIRE(page.html.find(line) == page.html.npos);  // there, somebody's address
    REQUIRE(page.html.find(begins) != page.html.npos);
  }
  double dirt = 0, all = 0;
  for (const auto& [kind, number] : pages) all += number;
  for (const char* kind :
       {"mirror", "near-duplicate", "language", "spam", "navigation", "consent"}) {
    CAPTURE(kind);
    CHECK(pages[kind] > 30);
    dirt += pages[kind];
  }
  CHECK(dirt > .25 * all);
  CHECK(dirt < .35 * all);
  for (const char* kind : {"address", "encoding", "broken bytes"}) CHECK(pages[kind] > 3);
}

TEST_CASE("the word F1 of a text counts each word as often as it occurs") {
  CHECK(word_f1("A cat, a dog.", "a CAT\na dog") == 1);
  CHECK(word_f1("a b c d", "a b") == doctest::Approx(2. * 2 / 6));
  CHECK(word_f1("a a a", "a") == doctest::Approx(2. * 1 / 4));
  CHECK(word_f1("x", "y") == 0);
  CHECK(word_f1("", "y") == 0);
}

TEST_CASE("of a page and its copies one is to be kept, whichever") {
  const std::vector<WebPage> truth = {{.url = "a", .kind = "clean", .text = "one two"},
                                      {.url = "b", .kind = "clean", .text = "three"},
                                      {.url = "c", .kind = "mirror", .of = "a"},
                                      {.url = "d", .kind = "mirror", .of = "a"},
                                      {.url = "e", .kind = "spam"}};
  const CorpusScore first = score_corpus(truth, {{"a", "one two"}, {"b", "three four"}});
  CHECK(first.to_find == 3);
  CHECK(first.found == 3);
  CHECK(first.kept == 2);
  CHECK(first.f1 == doctest::Approx((1 + 2. / 3) / 2));
  const CorpusScore other = score_corpus(truth, {{"c", "one two"}, {"d", "one two"}, {"e", "x"}});
  CHECK(other.found == 1);  // c stands for a; d and the spam were not found
  CHECK(other.to_keep == 2);
  CHECK(other.kept == 1);
}

TEST_CASE("the demo's rules clean the world's pages: dirt found, clean pages kept and read") {
  const TempDir dir;
  const std::string world = dir.path().string() + "/world";
  const std::string corpus = dir.path().string() + "/corpus";
  const auto run = [](const std::string& command) {
    const Output out = shell(command);
    CAPTURE(command);
    CAPTURE(out.text);
    REQUIRE(out.status == 0);
  };
  run("build/world -o " + world + " --tokens 200000 --seed 5 --pairs 0 --rankings 0");
  run("bash -c 'eval \"$(sed -n \"/^world_rules=(/,/^)/p\" dev/demo.sh)\"; ./corpus clean " +
      world + "/pages -o " + corpus + " \"${world_rules[@]}\"'");
  run("build/world score-corpus " + world + " " + corpus + " -o " + corpus + "/truth.json");
  const Json truth = read_json(corpus + "/truth.json");
  CAPTURE(truth.dump(1));
  CHECK(truth["dirt_found"].get<double>() >= .95);
  CHECK(truth["clean_kept"].get<double>() >= .99);
  CHECK(truth["f1"].get<double>() >= .97);
  for (const Json& row : truth["kinds"]) {
    CAPTURE(row.dump());
    CHECK((row["found"].is_null() || row["found"].get<double>() >= .9));
  }
  const Json problems = read_json(corpus + "/summary.json")["problems"];
  CAPTURE(problems.dump());
  CHECK(problems["truncated gzip data"] == 1);  // the damaged file's
  CHECK(problems["wrong WARC Content-Length"] == 1);
}
