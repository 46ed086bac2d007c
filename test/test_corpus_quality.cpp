// Decontamination and the quality classifier.
#include <set>

#include "cake/corpus.h"
#include "test/support.h"

namespace cake::corpus {
namespace {

std::string numbered_words(int begin, int end) {
  std::string text;
  for (int i = begin; i < end; i++) text += concat(i == begin ? "" : " ", "w", i);
  return text;
}

TEST_CASE("thirteen words in a row of an evaluation set are found, twelve are not") {
  const TempDir dir;
  const std::string file = dir / "test.jsonl";
  write_file(file, "{\"question\":\"" + numbered_words(0, 20) + "\",\"n\":3}\n");
  const Contamination sets({file});
  CHECK(sets.find(numbered_words(3, 15)).ngrams == 0);
  CHECK(sets.find(numbered_words(3, 15)).example.empty());
  CHECK(sets.find(numbered_words(0, 20)).ngrams == 8);
  const auto match = sets.find("before it " + numbered_words(3, 17) + " and behind");
  CHECK(match.ngrams == 2);
  CHECK(match.example == file + ":1: \"" + numbered_words(3, 16) + "\"");
  CHECK(sets.find("").ngrams == 0);
  CHECK(sets.find(numbered_words(3, 9) + " other " + numbered_words(9, 20)).ngrams == 0);
}

TEST_CASE("words are compared in lower case and without what stands between them") {
  const TempDir dir;
  write_file(dir / "test.jsonl",
             R"(["Äpfel, ÉTÉ; don't (stop) — Ωmega: one本two 3.14 % of Łódź's日"])");
  const Contamination sets({dir / "test.jsonl"});
  // äpfel été don t stop ωmega one 本 two 3 14 of łódź s 日: 15 words, 3 13-grams
  CHECK(sets.counts().ngrams == 3);
  const auto match = sets.find("ÄPFEL été don t STOP\nωMEGA one\t本 two 3 14 of łÓDŹ S日。");
  CHECK(match.ngrams == 3);
  CHECK(contains(match.example, ":1: \"äpfel été don t stop ωmega one 本 two 3 14 of łódź\""));
  CHECK(sets.find("apfel été don t stop ωmega one 本 two 3 14 of łódź").ngrams == 0);
}

TEST_CASE("all strings of JSON lines are taken, at any depth, and none runs into the next") {
  const TempDir dir;
  const std::string a = numbered_words(0, 13), b = numbered_words(100, 113);
  const std::string c = numbered_words(200, 213), d = numbered_words(300, 313);
  const std::string half = numbered_words(400, 407), rest = numbered_words(407, 413);
  const std::string file = dir / "test.jsonl";
  write_file(file, "{\"a\":{\"b\":[1,null,[\"" + a + "\"]]},\"" + c + "\":true,\"x\":\"" + half +
                       "\",\"y\":\"" + rest + "\"}\n\n\"" + b + "\"\n");
  write_file(dir / "plain.txt",
             "first line\n" + numbered_words(300, 307) + "\n" + numbered_words(307, 320) + "\n");
  const std::string plain = dir / "plain.txt";
  const Contamination sets({file, plain});
  CHECK(sets.find(a).example == file + ":1: \"" + a + "\"");
  CHECK(sets.find(b).example == file + ":3: \"" + b + "\"");
  CHECK(sets.find(c).ngrams == 0);  // a key
  CHECK(sets.find(half + " " + rest).ngrams == 0);
  CHECK(sets.find(d).example == plain + ":2: \"" + d + "\"");  // a plain text is one string
  CHECK(sets.find(numbered_words(307, 320)).example ==
        plain + ":3: \"" + numbered_words(307, 320) + "\"");
  CHECK(sets.counts().strings == 5);
  CHECK(sets.counts().short_strings == 2);
  CHECK(sets.counts().ngrams == 2 + 10);
}

TEST_CASE("an n-gram that several lines hold is shown with the first") {
  const TempDir dir;
  const std::string a = numbered_words(0, 13);
  write_file(dir / "1.jsonl", "\"x\"\n\"" + a + "\"\n\"" + a + "\"\n");
  write_file(dir / "2.jsonl", "\"" + a + "\"\n");
  const Contamination sets({dir / "1.jsonl", dir / "2.jsonl"});
  CHECK(sets.counts().ngrams == 1);
  CHECK(sets.find(a + " " + a).ngrams == 2);
  CHECK(contains(sets.find(a).example, "1.jsonl:2: "));
}

TEST_CASE("contamination is that of a set of 13-grams on random texts") {
  const TempDir dir;
  Rng rng{81};
  const auto random_words = [&](size_t n) {
    std::vector<std::string> words(n);
    for (std::string& w : words) w = std::string(1, char('a' + rng.below(2)));
    return words;
  };
  const auto join = [](const std::vector<std::string>& words, size_t begin, size_t end) {
    std::string text;
    for (size_t i = begin; i < end; i++) text += (i > begin ? " " : "") + words[i];
    return text;
  };
  std::set<std::string> grams;
  std::string lines;
  for (int i = 0; i < 60; i++) {
    const auto words = random_words(rng.below(60));
    lines += "\"" + join(words, 0, words.size()) + "\"\n";
    for (size_t k = 0; k + 13 <= words.size(); k++) grams.insert(join(words, k, k + 13));
  }
  write_file(dir / "test.jsonl", lines);
  const Contamination sets({dir / "test.jsonl"});
  CHECK(sets.counts().ngrams == int64_t(grams.size()));
  int64_t found = 0, all = 0;
  for (int i = 0; i < 300; i++) {
    const auto words = random_words(rng.below(80));
    int64_t expected = 0;
    for (size_t k = 0; k + 13 <= words.size(); k++, all++) {
      expected += grams.count(join(words, k, k + 13)) > 0;
    }
    REQUIRE(sets.find(join(words, 0, words.size())).ngrams == expected);
    found += expected;
  }
  CHECK(found > 500);
  CHECK(all - found > 500);
}

TEST_CASE("evaluation sets that cannot be read, or could never match, are refused in one line") {
  const TempDir dir;
  write_file(dir / "bad.jsonl", "{\"a\":1}\n{\"a\":\n");
  CHECK(contains(error_of([&] { Contamination({dir / "bad.jsonl"}); }), "bad.jsonl:2: not JSON"));
  write_file(dir / "none.jsonl", "{\"a\":1}\n");
  CHECK(contains(error_of([&] { Contamination({dir / "none.jsonl"}); }), "found no text"));
  write_file(dir / "short.jsonl", "\"few words\"\n");
  CHECK(contains(error_of([&] { Contamination({dir / "short.jsonl"}); }), "13 words or more"));
  write_file(dir / "empty.txt", "");
  CHECK(contains(error_of([&] { Contamination({dir / "empty.txt"}); }), "found no text"));
  CHECK(contains(error_of([&] { Contamination({dir / "absent"}); }), "cannot open"));
  CHECK(contains(error_of([&] { Contamination({dir.path()}); }), "found a directory"));
  CHECK(Contamination({}).find(numbered_words(0, 50)).ngrams == 0);
}

TEST_CASE("any bytes can be looked for and scored") {
  const TempDir dir;
  Rng rng{82};
  write_file(dir / "test.txt", numbered_words(0, 40));
  const Contamination sets({dir / "test.txt"});
  for (int round = 0; round < 2000; round++) {
    std::string bytes;
    for (size_t n = rng.below(40); bytes.size() < n;) {
      const uint64_t kind = rng.below(4);
      if (kind == 0) bytes += char(rng.below(256));
      if (kind == 1) bytes += "Ⱥ";  // longer in lower case
      if (kind == 2) bytes += "a日";
      if (kind == 3) bytes += "ſİ ";
    }
    REQUIRE(sets.find(bytes).ngrams == 0);
    REQUIRE(sets.find(bytes + "." + numbered_words(0, 13) + "." + bytes).ngrams == 1);
  }
}

TEST_CASE("gsm8k's test problems are found in a text that holds one") {
  if (skip_without_data("gsm8k/test.jsonl")) return;
  const Contamination sets({data_path("gsm8k/test.jsonl")});
  CHECK(sets.counts().ngrams > 50000);
  std::ifstream lines(data_path("gsm8k/test.jsonl"));
  std::string line;
  for (int i = 0; i < 7; i++) std::getline(lines, line);
  const std::string question = Json::parse(line).at("question");
  const auto match = sets.find("A page about sums. " + question + " Who knows?");
  CHECK(match.ngrams > 5);
  CHECK(contains(match.example, "test.jsonl:7: \""));
}

// ---------------------------------------------------------------------------------------------
// The classifier

// Documents of made-up words: good ones prefer the first half of them.
void write_documents(const std::filesystem::path& path, int documents, double good_share,
                     uint64_t seed) {
  Rng rng{seed};
  std::string lines;
  for (int i = 0; i < documents; i++) {
    std::string text;
    for (uint64_t n = 20 + rng.below(40), k = 0; k < n; k++) {
      text += concat("word", (rng.uniform() < good_share ? 0 : 50) + rng.below(50), " ");
    }
    lines += concat("{\"text\":\"", text, "\",\"number\":", i, "}\n");
  }
  write_file(path, lines);
}

ClassifyOptions train_on_words(const TempDir& dir) {
  write_documents(dir / "good.jsonl", 400, .6, 1);
  write_documents(dir / "bad.jsonl", 300, .4, 2);
  ClassifyOptions o;
  o.good = {dir / "good.jsonl"}, o.bad = {dir / "bad.jsonl"};
  o.output = dir / "model";
  classify_train(o);
  return o;
}

double accuracy(const QualityModel& model, const std::filesystem::path& path, bool good) {
  std::ifstream lines(path);
  double right = 0, all = 0;
  for (std::string line; std::getline(lines, line); all++) {
    right += (model.score(Json::parse(line).at("text").get<std::string>()) >= .5) == good;
  }
  return right / all;
}

TEST_CASE("a classifier learns which words are good, and the same data give the same bytes") {
  const TempDir dir;
  const ClassifyOptions o = train_on_words(dir);
  const QualityModel model = QualityModel::load(o.output);
  write_documents(dir / "new_good.jsonl", 300, .6, 3);
  write_documents(dir / "new_bad.jsonl", 300, .4, 4);
  CHECK(accuracy(model, dir / "new_good.jsonl", true) > .8);
  CHECK(accuracy(model, dir / "new_bad.jsonl", false) > .8);
  CHECK(model.score("word1 word2 word3") > .5);
  CHECK(model.score("WORD1 word2, Word3!") == model.score("word1 word2 word3"));
  CHECK(model.score("word61 word52 word73") < .5);
  const std::string bytes = read_file(o.output);
  classify_train(o);
  CHECK((read_file(o.output) == bytes));
}

TEST_CASE("documents are kept by score or by share, and the bytes are those of any threads") {
  const TempDir dir;
  ClassifyOptions o = train_on_words(dir);
  o.model = o.output;
  write_documents(dir / "new.jsonl", 1000, .5, 5);
  o.inputs = {dir / "new.jsonl"};
  const auto apply = [&](const std::string& name) {
    o.output = dir / name;
    classify_apply(o);
    std::vector<Json> documents;
    LineReader lines{Input(o.output)};
    for (std::string_view line; lines.next(line);) documents.push_back(Json::parse(line));
    return documents;
  };
  const auto all = apply("all.jsonl");
  REQUIRE(all.size() == 1000);
  const QualityModel model = QualityModel::load(o.model);
  std::vector<double> scores;
  for (size_t i = 0; i < all.size(); i++) {
    CHECK(all[i].at("number") == int(i));
    const double score = all[i].at("quality");
    CHECK(std::fabs(score - model.score(all[i].at("text").get<std::string>())) <= .50001e-6);
    scores.push_back(score);
  }
  std::vector<double> sorted = scores;
  std::sort(sorted.rbegin(), sorted.rend());
  for (const int threads : {1, 3}) {
    o.threads = threads, o.keep = .2;
    const auto best = apply(concat("best-", threads, ".jsonl.zst"));
    CHECK(best.size() >= 200);
    CHECK(best.size() == size_t(std::count_if(scores.begin(), scores.end(),
                                              [&](double s) { return s >= sorted[199]; })));
    for (const Json& d : best) CHECK(d.at("quality").get<double>() >= sorted[199]);
  }
  CHECK(read_file(dir / "best-1.jsonl.zst") == read_file(dir / "best-3.jsonl.zst"));
  o.keep = 0, o.min_score = sorted[299];
  CHECK(apply("above.jsonl").size() ==
        size_t(std::count_if(scores.begin(), scores.end(),
                             [&](double s) { return s >= sorted[299]; })));
  o.keep = 1;
  CHECK(apply("every.jsonl").size() == 1000);
  o.inputs = {o.output};  // scores once more: each line has one score
  CHECK(apply("again.jsonl").size() == 1000);
  CHECK(read_file(dir / "again.jsonl") == read_file(dir / "every.jsonl"));
  o.keep = 1.5;
  CHECK(contains(error_of([&] { classify_apply(o); }), "expected a share from 0 to 1"));
  o.keep = .5, o.inputs = {"-"};
  CHECK(contains(error_of([&] { classify_apply(o); }), "cannot be read twice"));
}

TEST_CASE("what is no classifier's model is refused in one line") {
  const TempDir dir;
  const ClassifyOptions o = train_on_words(dir);
  const std::string good = read_file(o.output);
  const auto load = [&](const std::string& bytes) {
    write_file(o.output, bytes);
    return error_of([&] { QualityModel::load(o.output); });
  };
  CHECK(load(good) == "no error");
  CHECK(contains(load(""), "expected a model"));
  CHECK(contains(load("other bytes, of some length"), "expected a model"));
  CHECK(contains(load(good.substr(0, good.size() - 4)), "bytes, expected"));
  CHECK(contains(load(good + "x"), "bytes, expected"));
  std::string damaged = good;
  damaged[damaged.size() / 2] ^= 1;
  CHECK(contains(load(damaged), "the file is damaged"));
  damaged = good, damaged[8] = 9;
  CHECK(contains(load(damaged), "found version 9"));
  ClassifyOptions few = o;
  write_file(dir / "few.jsonl", "{\"text\":\"one\"}\n");
  few.good = {dir / "few.jsonl"};
  CHECK(contains(error_of([&] { classify_train(few); }), "good documents: found 1, of which"));
}

TEST_CASE("film reviews are told apart by their words") {
  if (skip_without_data("reviews/movie_reviews.jsonl")) return;
  const TempDir dir;
  std::ifstream lines(data_path("reviews/movie_reviews.jsonl"));
  std::string text[2][2];  // [new][good]
  int64_t count = 0;
  for (std::string line; std::getline(lines, line); count++) {
    text[count % 5 == 0][Json::parse(line).at("label") == "pos"] += line + "\n";
  }
  write_file(dir / "good.jsonl", text[0][1]), write_file(dir / "bad.jsonl", text[0][0]);
  write_file(dir / "new_good.jsonl", text[1][1]), write_file(dir / "new_bad.jsonl", text[1][0]);
  ClassifyOptions o;
  o.good = {dir / "good.jsonl"}, o.bad = {dir / "bad.jsonl"}, o.output = dir / "model";
  classify_train(o);
  const QualityModel model = QualityModel::load(o.output);
  const double good = accuracy(model, dir / "new_good.jsonl", true);
  const double bad = accuracy(model, dir / "new_bad.jsonl", false);
  MESSAGE("accuracy on new reviews: " << (good + bad) / 2);
  CHECK((good + bad) / 2 > .82);
}

}  // namespace
}  // namespace cake::corpus
