// The true reward, the world's preferences, and how they are evaluated: what they promise, worked
// out here again.
#include <cmath>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cake/json.h"
#include "cake/preferences.h"
#include "cake/records.h"
#include "cake/rubric.h"
#include "dev/world.h"
#include "test/chatml.h"
#include "test/scripted_model.h"
#include "test/support.h"

using namespace cake;
using namespace cake::world;

namespace {

using Of = Criterion::Kind;

const World& the_world() {
  static const World world = make_world({});
  return world;
}
const Preferences& the_preferences() {
  static const Preferences p = make_preferences(the_world(), {});
  return p;
}

// The name and the animal that a request asks for.
std::pair<std::string, std::string> cast_of(const OpenRequest& r) {
  return {r.rubric[0].words.at(0), r.rubric[0].words.at(1)};
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

// What a labeller thinks, worked out from the promise: the reward, and what words are worth.
double utility_of(const Judgement& j, size_t answer, double bias) {
  std::istringstream words(j.answers[answer]);
  int n = 0;
  for (std::string word; words >> word;) n++;
  return true_reward(j.request.rubric, j.answers[answer], true) + bias * n / 10;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The true reward

TEST_CASE("a criterion's mark is what its definition says") {
  const auto mark = [](const Criterion& c, const char* text, bool finished = true) {
    return criterion_mark(c, text, finished);
  };
  const Criterion mentions{Of::mentions, 1, {"Ada", "dog"}};
  CHECK(mark(mentions, "Ada and a Dog.") == 1);
  CHECK(mark(mentions, "The dogs of Adam, and a dog.") == .5);
  CHECK(mark(mentions, "") == 0);
  const Criterion begins{Of::begins, 1, {"Here is", "With pleasure."}};
  CHECK(mark(begins, "here is a story.") == 1);
  CHECK(mark(begins, "With pleasure") == 0);
  CHECK(mark(begins, "Well. Here is one.") == 0);
  const Criterion ends{Of::ends, 1, {"went home"}};
  CHECK(mark(ends, "It rained. Then they went home.") == 1);
  CHECK(mark(ends, "It rained. Then they went home. \n") == 1);
  CHECK(mark(ends, "Then they went home.") == 1);
  CHECK(mark(ends, "It rained. Then they went home.", false) == 0);
  CHECK(mark(ends, "Then they went home. It rained.") == 0);
  CHECK(mark(ends, "It rained. Then they went home") == 0);
  CHECK(mark(ends, ".") == 0);
  CHECK(mark(ends, "") == 0);
  const Criterion varied{Of::varied, 1, {}};
  CHECK(mark(varied, "One two three four five.") == 1);
  CHECK(mark(varied, "One two three.") == 0);
  // Eleven fours in a row, one of which has come before.
  CHECK(mark(varied, "a b c d e f g h i j a b c d") == doctest::Approx(1 - 5. / 11));
  CHECK(mark(varied, "It rains. It rains. It rains. It rains.") == 0);
  const Criterion length{Of::length, 1, {}, 4, 6};
  const double expected[] = {0, .25, .5, .75, 1, 1, 1, 5. / 6, 4. / 6, .5, 2. / 6, 1. / 6, 0, 0};
  std::string text;
  for (const double e : expected) {
    CHECK(mark(length, text.c_str()) == doctest::Approx(e));
    text += text.empty() ? "word" : ", word's";
  }
}

TEST_CASE("the true reward is the weighted mean of the marks") {
  const Rubric rubric = {{Of::mentions, 3, {"Ada", "dog"}}, {Of::begins, 1, {"Here"}}};
  CHECK(true_reward(rubric, "Here is Ada.", true) == doctest::Approx((1.5 + 1) / 4));
  CHECK(true_reward(rubric, "", false) == 0);
  CHECK(true_reward(rubric, "Here: a dog and Ada", false) == 1);
}

TEST_CASE("a rubric is the same after a journey through JSON, and bad ones are refused") {
  for (const OpenRequest& r : {the_preferences().prompts[0], the_preferences().prompts[7]}) {
    const OrderedJson json = rubric_json(r.rubric);
    CHECK(rubric_json(parse_rubric(Json::parse(json.dump()), "x")) == json);
    CHECK(json.size() == 5);
  }
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "x: found [], expected an array of criteria"},
      {"{}", "x: found {}, expected an array of criteria"},
      {R"([{"kind": "kind", "weight": 1}])", "x[0]: kind: found \"kind\", expected mentions"},
      {R"([{"kind": "varied"}])", "x[0]: weight is missing"},
      {R"([{"kind": "varied", "weight": 0}])", "x[0]: weight: found 0, expected more than 0"},
      {R"([{"kind": "ends", "weight": 1}])", "x[0]: words is missing"},
      {R"([{"kind": "ends", "weight": 1, "words": []}])", "x[0]: words: found []"},
      {R"([{"kind": "ends", "weight": 1, "words": [1]}])", "x[0]: words: found 1"},
      {R"([{"kind": "length", "weight": 1, "low": 5, "high": 4}])", "x[0]: found low 5 and high 4"},
  };
  for (const auto& [json, message] : cases) {
    const std::string text = json;
    const std::string error = error_of([&] { parse_rubric(Json::parse(text), "x"); });
    CAPTURE(error);
    CHECK(contains(error, message));
  }
}

TEST_CASE("the true reward of a taught story rises with its quality") {
  std::map<std::string, const Rubric*> rubrics;
  for (const OpenRequest& r : the_preferences().prompts) rubrics[r.user] = &r.rubric;
  const Conversations all =
      make_conversations(the_world(), assumed_knowledge(the_world()), 1'000'000);
  std::array<std::vector<double>, 6> rewards;
  for (const Talk& talk : all.training) {
    if (talk.quality < 0) continue;
    const auto& messages = talk.conversation.messages;
    const auto rubric = rubrics.find(messages[0].content);
    if (rubric == rubrics.end()) continue;
    rewards.at(size_t(talk.quality))
        .push_back(true_reward(*rubric->second, messages[1].content, true));
  }
  double before = 0;
  for (const auto& of_quality : rewards) {
    REQUIRE(of_quality.size() > 10);
    double mean = 0;
    for (const double r : of_quality) mean += r / double(of_quality.size());
    CHECK(mean > before + .05);
    before = mean;
  }
  // The best a taught answer can be: some stories have a phrase twice, or one event of few words.
  CHECK(before > .95);
  CHECK(before <= 1);
}

// ---------------------------------------------------------------------------------------------
// Preferences

TEST_CASE("no cast is asked for in training and held out, and no request comes twice") {
  const Preferences& p = the_preferences();
  std::set<std::pair<std::string, std::string>> training, held_out;
  std::set<std::string> users;
  for (const OpenRequest& r : p.prompts) {
    training.insert(cast_of(r));
    CHECK(contains(r.user, cast_of(r).first));
    CHECK(contains(r.user, cast_of(r).second));
    CHECK(users.insert(r.user).second);
  }
  for (const OpenRequest& r : p.prompts_held_out) {
    held_out.insert(cast_of(r));
    CHECK(users.insert(r.user).second);
  }
  for (const Judgement& j : p.training) training.insert(cast_of(j.request));
  for (const Judgement& j : p.held_out) held_out.insert(cast_of(j.request));
  for (const auto& cast : held_out) CHECK(!training.count(cast));
  CHECK(p.prompts.size() > 1500);
  CHECK(p.prompts_held_out.size() >= 500);
  CHECK(p.held_out.size() == size_t(kHeldOutPairs));
}

TEST_CASE("no phrasing of a held-out request is a phrasing of training") {
  const auto without_cast = [](const OpenRequest& r) {
    std::string user = r.user;
    for (const std::string& word : {cast_of(r).first, cast_of(r).second})
      user.replace(user.find(word), word.size(), "*");
    const size_t article = user.rfind(" an *");
    if (article != user.npos) user.erase(article + 2, 1);
    return user;
  };
  std::set<std::string> training, held_out;
  for (const OpenRequest& r : the_preferences().prompts) training.insert(without_cast(r));
  for (const OpenRequest& r : the_preferences().prompts_held_out) held_out.insert(without_cast(r));
  CHECK(training.size() == 5);
  CHECK(held_out.size() == 4);
  for (const std::string& phrasing : held_out) CHECK(!training.count(phrasing));
}

TEST_CASE("judgements are of pairs and of rankings, of answers that differ, and of every reward") {
  const Preferences& p = the_preferences();
  std::map<size_t, int> sizes;
  std::vector<int> tenths(11);
  int64_t unfinished = 0, answers = 0;
  for (const Judgement& j : p.training) {
    sizes[j.answers.size()]++;
    std::vector<int> ranking = j.ranking;
    std::sort(ranking.begin(), ranking.end());
    for (size_t i = 0; i < ranking.size(); i++) CHECK(ranking[i] == int(i) + 1);
    CHECK(std::set<std::string>(j.answers.begin(), j.answers.end()).size() == j.answers.size());
    for (const std::string& answer : j.answers) {
      CHECK(!answer.empty());
      CHECK(std::isgraph((unsigned char)answer[0]));
      tenths.at(size_t(10 * true_reward(j.request.rubric, answer, true)))++;
      unfinished += last_sentence(answer).empty(), answers++;
    }
  }
  CHECK(sizes == std::map<size_t, int>{{2, 6000}, {size_t(kRanked), 1500}});
  for (size_t t = 0; t < 10; t++) CHECK(tenths[t] > answers / 200);
  CHECK(unfinished > answers / 50);
}

TEST_CASE("the best possible accuracy is what labellers drawn anew leave to be foretold") {
  for (const double bias : {0., .1}) {
    const world::PreferenceOptions options{
        .pairs = 0, .rankings = 0, .noise = .12, .length_bias = bias};
    const Preferences p = make_preferences(the_world(), options);
    Rng rng{99};
    constexpr int kDraws = 200;
    int64_t right = 0, agreed = 0, all = 0;
    for (const Judgement& j : p.held_out) {
      REQUIRE(j.answers.size() == 2);
      const double first = utility_of(j, 0, bias), second = utility_of(j, 1, bias);
      for (int i = 0; i < kDraws; i++, all++) {
        const bool chosen = rng.uniform() < logistic((first - second) / options.noise);
        right += chosen == (first > second);
      }
      agreed += (j.ranking[0] < j.ranking[1]) == (first > second);
    }
    // 200,000 draws: a standard error of .0008. The labels are one draw of 1,000: .011.
    CHECK(std::fabs(double(right) / double(all) - p.best_possible) < .003);
    CHECK(std::fabs(double(agreed) / double(p.held_out.size()) - p.best_possible) < .04);
    CHECK(p.best_possible > .8);
    CHECK(p.best_possible < .97);
  }
}

TEST_CASE("any two answers of a ranking are ordered as Bradley and Terry have it") {
  const world::PreferenceOptions options{.pairs = 0, .rankings = 2000};
  const Preferences p = make_preferences(the_world(), options);
  // By tenths of the better one's chance: how often it was preferred.
  std::vector<double> expected(5), found(5), n(5);
  for (const Judgement& j : p.training) {
    for (size_t a = 0; a < j.answers.size(); a++) {
      for (size_t b = 0; b < j.answers.size(); b++) {
        const double chance = logistic((utility_of(j, a, 0) - utility_of(j, b, 0)) / options.noise);
        if (chance <= .5) continue;  // the other way round
        const size_t bin = std::min<size_t>(4, size_t(10 * (chance - .5)));
        expected[bin] += chance, found[bin] += j.ranking[a] < j.ranking[b], n[bin]++;
      }
    }
  }
  for (size_t bin = 0; bin < 5; bin++) {
    CAPTURE(bin);
    REQUIRE(n[bin] > 400);
    const double mean = expected[bin] / n[bin];
    // Four standard errors. Each of a ranking's pairs shares an answer with four others, with a
    // correlation of a half at most: three times the variance of independent ones.
    const double error = 4 * std::sqrt(mean * (1 - mean) * 3 / n[bin]);
    CHECK(std::fabs(found[bin] / n[bin] - mean) < error);
  }
}

TEST_CASE("labellers with a length bias choose the longer answer more often, of the same answers") {
  const auto longer_wins = [](const Preferences& p) {
    double longer = 0, n = 0;
    for (const Judgement& j : p.held_out) {
      const size_t a = j.answers[0].size(), b = j.answers[1].size();
      longer += a != b && (a > b) == (j.ranking[0] == 1), n += a != b;
    }
    return longer / n;
  };
  const world::PreferenceOptions plain{.pairs = 10, .rankings = 10};
  world::PreferenceOptions biased = plain;
  biased.length_bias = .1;
  const Preferences p = make_preferences(the_world(), plain),
                    q = make_preferences(the_world(), biased);
  for (size_t i = 0; i < p.held_out.size(); i++)
    REQUIRE(p.held_out[i].answers == q.held_out[i].answers);
  CHECK(longer_wins(q) > longer_wins(p) + .08);
  CHECK(contains(error_of([&] { make_preferences(the_world(), {.noise = 0}); }),
                 "--noise: found 0, expected more than 0"));
  CHECK(contains(error_of([&] { make_preferences(the_world(), {.length_bias = -1}); }),
                 "--length-bias: found -1, expected 0 or more"));
}

TEST_CASE("preferences are a function of the seed and the options") {
  const world::PreferenceOptions few{.pairs = 50, .rankings = 20};
  const auto text = [&](uint64_t seed) {
    std::string all;
    for (const Judgement& j : make_preferences(make_world({.seed = seed}), few).training) {
      all += j.request.user;
      for (const std::string& answer : j.answers) all += answer;
      for (const int rank : j.ranking) all += std::to_string(rank);
    }
    return all;
  };
  CHECK(text(1) == text(1));
  CHECK(text(1) != text(2));
}

TEST_CASE("problems say how many things happen in them, and there are some of each difficulty") {
  const Conversations all = make_conversations(the_world(), assumed_knowledge(the_world()), 20'000);
  std::set<std::string> texts;
  for (const auto* part : {&all.rl, &all.test}) {
    std::map<int, size_t> count;
    for (const WordProblem& p : *part) {
      // A beginning, what happens, a question.
      const long sentences = std::count(p.question.begin(), p.question.end(), '.');
      CHECK(p.difficulty == sentences - 1);
      CHECK(texts.insert(p.question).second);
      count[p.difficulty]++;
    }
    CHECK(count.size() == 3);
    for (int difficulty = 1; difficulty <= 3; difficulty++)
      CHECK(count[difficulty] > part->size() / 5);
  }
  const std::vector<Item> items = make_open_items(the_world(), all.test);
  std::map<std::string, int> tasks;
  for (const Item& item : items) {
    tasks[item.task]++;
    CHECK((item.task == "true_reward") == !item.rubric.empty());
    CHECK(item.samples == (item.task == "word_problems_pass1" ? 8 : 0));
    if (item.rubric.empty()) CHECK(passes(item.check, item.answer));
  }
  CHECK(tasks == std::map<std::string, int>{{"true_reward", 500},
                                            {"word_problems_greedy", 500},
                                            {"word_problems_pass1", 500}});
}

// ---------------------------------------------------------------------------------------------
// Files

TEST_CASE("a world's files of preferences can be read, and other labellers change only labels") {
  const TempDir dir;
  const std::string world = dir / "world", other = dir / "other";
  REQUIRE(shell("build/world -o " + world + " --tokens 20000 --pairs 40 --rankings 10").status ==
          0);
  REQUIRE(shell("build/world preferences " + world + " -o " + other +
                " --pairs 40 --rankings 10 --length-bias 1")
              .status == 0);
  const auto lines = [](const std::string& path) {
    std::vector<Json> all;
    std::istringstream in(read_file(path));
    for (std::string line; std::getline(in, line);) all.push_back(Json::parse(line));
    return all;
  };
  const auto prompts = lines(world + "/prompts.jsonl");
  CHECK(prompts.size() == the_preferences().prompts.size());
  for (const Json& prompt : prompts) {
    CHECK(parse_rubric(prompt["rubric"], "x").size() == 5);
    CHECK(prompt["messages"].size() == 1);
    CHECK(prompt["messages"][0]["role"] == "user");
  }
  JsonLines reader{Input(world + "/preferences.jsonl")};
  simdjson::dom::object object;
  std::map<size_t, int> sizes;
  while (reader.next(object)) sizes[parse_preference({object, reader.where()}).ranking.size()]++;
  CHECK(sizes == std::map<size_t, int>{{2, 40}, {4, 10}});

  double best = 0;
  const auto held_out = lines(world + "/preferences_heldout.jsonl"),
             biased = lines(other + "/preferences_heldout.jsonl");
  REQUIRE(held_out.size() == size_t(kHeldOutPairs));
  REQUIRE(biased.size() == held_out.size());
  int turned = 0;
  for (size_t i = 0; i < held_out.size(); i++) {
    const double chance = held_out[i]["chance"].get<double>();
    best += std::max(chance, 1 - chance) / double(held_out.size());
    turned += held_out[i]["chosen"] == biased[i]["rejected"];
    CHECK((held_out[i]["chosen"] == biased[i]["chosen"] ||
           held_out[i]["chosen"] == biased[i]["rejected"]));
  }
  CHECK(turned > kHeldOutPairs / 5);
  const Json truth = read_json(world + "/world.json"), changed = read_json(other + "/world.json");
  CHECK(std::fabs(truth["preferences"]["best_possible"].get<double>() - best) < 1e-9);
  CHECK(truth["preferences"]["length_bias"] == 0);
  CHECK(changed["preferences"]["length_bias"] == 1);
  CHECK(changed["people"] == truth["people"]);
  CHECK(read_file(world + "/prompts.jsonl") == read_file(other + "/prompts.jsonl"));
}

// ---------------------------------------------------------------------------------------------
// Evaluation

namespace {

Json evaluate(const std::string& arguments) {
  const TempDir dir;
  const Output out =
      shell("./chat eval " + arguments + " --threads 1 --json " + (dir / "r.json").string());
  CAPTURE(out.text);
  REQUIRE(out.status == 0);
  return read_json(dir / "r.json");
}

struct OpenExam {
  ScriptedModel m{512};
  std::string dir;
  OpenExam() {
    const Conversation ask{.messages = {{"user", "What?", {}}}};
    m.write(int(chatml(m.tokenizer(), ask, true).ids.size()),
            "Ada had a dog. Steps: 42.<|im_end|>");
    dir = m.save();
  }
  std::string items(const std::vector<std::string>& how) const {
    std::string lines;
    for (const std::string& marking : how)
      lines +=
          R"({"task": "t", "messages": [{"role": "user", "content": "What?"}], )" + marking + "}\n";
    const std::string path = m.dir() / "items.jsonl";
    write_file(path, lines);
    return path;
  }
};

}  // namespace

TEST_CASE("eval gives the mean true reward of open requests, with its interval") {
  const OpenExam exam;
  const auto rubric = [](const char* words) {
    return concat(R"("rubric": [{"kind": "mentions", "weight": 2, "words": [)", words, "]}]");
  };
  const std::string path = exam.items({rubric(R"("Ada", "dog")"), rubric(R"("Ada", "cat")"),
                                       rubric(R"("cow", "cat")"), rubric(R"("Ada", "cow")")});
  const Json r = evaluate(exam.dir + " --tasks " + path)["t"];
  CHECK(r["metric"] == "reward");
  CHECK(r["value"].get<double>() == doctest::Approx(.5));
  CHECK(r["n"] == 4);
  // 1, .5, 0, .5: the variance is 1/6 with Bessel's correction.
  const double half = 1.959964 * std::sqrt(1. / 6 / 4);
  CHECK(r["ci95"][0].get<double>() == doctest::Approx(.5 - half).epsilon(1e-5));
  CHECK(r["ci95"][1].get<double>() == doctest::Approx(.5 + half).epsilon(1e-5));
  // An answer that is cut off has not ended well.
  const std::string ends = R"("rubric": [{"kind": "ends", "weight": 1, "words": ["dog"]}])";
  CHECK(evaluate(exam.dir + " --tasks " + exam.items({ends + R"(, "tokens": 14)"}))["t"]["value"] ==
        0);
}

TEST_CASE("eval samples items that ask for samples, and counts shares of their answers") {
  const OpenExam exam;
  const std::string shares = R"(, "shares": {"with_steps": "Steps:", "with_cats": "cat"})";
  const std::string number = R"("check": {"type": "number", "value": "42"})";
  const std::string path = exam.items({number + R"(, "samples": 8)" + shares,
                                       R"("check": {"type": "refuses"}, "samples": 8)" + shares});
  const Json r = evaluate(exam.dir + " --tasks " + path);
  CHECK(r["t"]["metric"] == "pass@1");
  CHECK(r["t"]["n"] == 2);
  CHECK(r["t"]["value"] == .5);
  CHECK(r["with_steps"] == Json({{"metric", "share"},
                                 {"value", 1.},
                                 {"n", 2},
                                 {"ci95", {wilson(1, 2).low, wilson(1, 2).high}}}));
  CHECK(r["with_cats"]["value"] == 0);

  // At a high temperature the samples of one item differ.
  const std::string hot =
                        exam.items({number + R"(, "samples": 16, "temperature": 50, "tokens": 8)"}),
                    answers = exam.m.dir() / "answers.jsonl";
  evaluate(exam.dir + " -o " + answers + " --tasks " + hot);
  std::istringstream in(read_file(answers));
  std::set<std::string> texts;
  int n = 0;
  for (std::string line; std::getline(in, line); n++)
    texts.insert(Json::parse(line)["answer"].get<std::string>());
  CHECK(n == 16);
  CHECK(texts.size() > 12);
}

TEST_CASE("eval refuses markings that are none") {
  const OpenExam exam;
  const std::string number = R"("check": {"type": "number", "value": "42"}, )";
  const std::pair<std::string, const char*> cases[] = {
      {R"("rubric": 1)", "items.jsonl:1: rubric: found 1, expected an array of criteria"},
      {number + R"("samples": 0)", "items.jsonl:1: samples: found 0, expected 1 to 1024"},
      {number + R"("temperature": -1)", "items.jsonl:1: temperature: found -1"},
      {number + R"("shares": [])", "items.jsonl:1: shares: found []"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const Output out =
        shell("./chat eval " + exam.dir + " --threads 1 --tasks " + exam.items({c.first}));
    CHECK(out.status == 1);
    CHECK(contains(out.text, c.second));
  }
}
