// Answers checked: numbers and words in texts, the verifiers and what they are held to, the checks
// of ./chat eval's items, a user's own program.
#include <doctest/doctest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cake/verify.h"
#include "test/support.h"

using namespace cake;

// ---------------------------------------------------------------------------------------------
// Answers

TEST_CASE("words are found whole, and case does not matter") {
  CHECK(contains_words("She is a Baker.", "baker"));
  CHECK(!contains_words("She is a bakery owner", "baker"));
  CHECK(!contains_words("grandbaker", "baker"));
  CHECK(contains_words("bakery, baker", "baker"));
  CHECK(contains_words("in New Olm.", "new olm"));
  CHECK(!contains_words("caf\u00e9s", "caf\u00e9"));
  CHECK(!contains_words("caf\u00e9", "caf"));
  CHECK(contains_words("9.9", "9.9"));
  CHECK(!contains_words("anything", ""));
  CHECK(refuses("Sorry, I don\u2019t know that."));
  CHECK(refuses("I DO NOT KNOW."));
  CHECK(refuses("I can't help with that."));
  CHECK(!refuses("I know: a baker."));
}

TEST_CASE("a check passes what it describes and nothing else") {
  const auto check = [](const char* json, const char* answer,
                        const std::set<std::string>& tools = {}) {
    return passes(parse_check(Json::parse(json), "here"), answer, tools);
  };
  const char* contains_one =
      R"({"type": "contains", "any": ["baker", "cook"], "none": ["sailor"]})";
  CHECK(check(contains_one, "A cook."));
  CHECK(!check(contains_one, "A cook or a sailor."));
  CHECK(!check(contains_one, "A judge."));
  CHECK(check(R"({"type": "number", "value": "1,000"})", "It is $1000.00."));
  CHECK(!check(R"({"type": "number", "value": "1000"})", "It is 1001"));
  CHECK(!check(R"({"type": "number", "value": "1000"})", "It is unknown"));
  CHECK(check(R"({"type": "refuses"})", "I don't know."));
  CHECK(!check(R"({"type": "answers"})", "I don't know."));
  CHECK(check(R"({"type": "answers"})", "Olm."));
  CHECK(check(R"({"type": "exact", "text": "Olm."})", " Olm.\n"));
  CHECK(!check(R"({"type": "exact", "text": "Olm."})", "olm."));
  const char* tool =
      R"({"type": "tool", "name": "search", "then": {"type": "number", "value": "3"}})";
  CHECK(check(tool, "3", {"search"}));
  CHECK(!check(tool, "3", {"calculator"}));
  CHECK(!check(tool, "4", {"search"}));

  const std::pair<const char*, const char*> bad[] = {
      {"{}", "here: type is missing"},
      {R"({"type": "vibes"})", "here: type: found \"vibes\", expected contains"},
      {R"({"type": "contains"})", "here: any: found no words"},
      {R"({"type": "contains", "any": "x"})", "here: any: found \"x\", expected an array"},
      {R"({"type": "number", "value": "x"})", "here: value: found \"x\", expected a number"},
      {R"({"type": "tool", "name": "search"})", "here: then is missing"},
      {R"({"type": "tool", "name": "x", "then": {}})", "here: then: type is missing"}};
  for (const auto& c : bad) {
    CHECK(contains(error_of([&] { parse_check(Json::parse(c.first), "here"); }), c.second));
  }
}

TEST_CASE("Wilson's interval has its known values") {
  // 8 of 10: (.4901625, .9433178); 0 of 10: (0, .2775328): R, binom::binom.wilson.
  const Interval a = wilson(.8, 10), none = wilson(0, 10), all = wilson(1, 10);
  CHECK(a.low == doctest::Approx(.4901625).epsilon(1e-6));
  CHECK(a.high == doctest::Approx(.9433178).epsilon(1e-6));
  CHECK(none.low == 0);
  CHECK(none.high == doctest::Approx(.2775328).epsilon(1e-6));
  CHECK(all.high == doctest::Approx(1));
}

// ---------------------------------------------------------------------------------------------
// Verifiers by name

namespace {

// As parse_problem makes it of a record with these keys.
Problem problem(const std::string& answer, const std::string& line = "{}") {
  Problem p{.question = "q", .line = Json::parse(line), .where = "p.jsonl:1"};
  if (!answer.empty()) p.answers = {answer};
  p.choices = p.line.value("choices", p.choices);
  for (const Json& n : p.line.value("numbers", Json::array())) p.numbers.push_back(n.dump());
  if (p.line.contains("target")) p.target = p.line["target"].dump();
  return p;
}

}  // namespace

TEST_CASE("a number is right however it is written") {
  for (const char* text : {"18", "18.", "$18", "It is 18.00", "1 and 17 make 18", "18 ",
                           "<<9+9=18>>18", "No: 17\n#### 18\nthen 3"}) {
    CAPTURE(text);
    CHECK(right_number(problem("18"), text));
    CHECK(right_number(problem("long way\n#### 18"), text));
  }
  CHECK(right_number(problem("1000"), "1,000"));
  CHECK(right_number(problem("-5"), "minus: -5."));
  for (const char* text : {"", "none", "18 or 19", "180", "1.8", "-18"}) {
    CAPTURE(text);
    CHECK(!right_number(problem("18"), text));
  }
  CHECK(right_number(problem("3/4"), "It is 0.75."));
  CHECK(!right_number(problem("3/4"), "1/4"));
  CHECK(!right_number(problem("3/4"), "4"));
  CHECK(right_number(problem("\u22125"), "-5"));
  CHECK(!right_number(problem("\u22125"), "5"));
  CHECK(right_number(problem("1 + 17 is \\boxed{18}"), "18"));
  for (const char* answer : {"many", "12 and 15", "2^6", "2:30", "5x+3"}) {
    CHECK(contains(error_of([&] { expected_numbers(problem(answer)); }),
                   concat("p.jsonl:1: answer: found \"", answer, "\", expected one number")));
  }
}

TEST_CASE("a choice is a letter that the problem offers") {
  const Problem listed = problem("B", R"({"choices": ["one", "two", "three"]})");
  CHECK(right_choice(listed, "Option B, since Z > Y"));
  CHECK(offered_choices(listed).offered == 3);
  Problem asked = problem("E");
  asked.question = "Which?\nA) one\nB) two\nC) three";
  CHECK(offered_choices(asked).offered == 3);
  CHECK(contains(error_of([&] { expected_choices(asked); }), "expected a letter from A to C"));
  CHECK(offered_choices(problem("B")).offered == 26);
  Problem numbered = problem("2");
  numbered.question = "Which?\n1) one\n2) two\n3) three";
  CHECK(right_choice(numbered, "The answer is 2) two."));
  CHECK(!right_choice(numbered, "The answer is B."));
  CHECK(contains(error_of([&] {
                   right_choice(problem("E"), "E"), numbered.answers = {"4"},
                                                    expected_choices(numbered);
                 }),
                 "expected a number from 1 to 3"));
  CHECK(right_choice(problem("C"), "So the answer is C."));
  CHECK(!right_choice(problem("C"), "So the answer is D, not C."));
  CHECK(contains(error_of([] { right_choice(problem("cc"), "C"); }), "expected a letter"));
}

TEST_CASE("a countdown is the target made of numbers, each used once at most") {
  const Problem p = problem("", R"({"numbers": [3, 5, 7, 25], "target": 26})");
  for (const char* text :
       {"3 * 7 + 5", "(3*7)+5 = 26", "First 25 - 3 = 22.\nSo: 5 + 3 * 7 = 26.", "7*3-(0-5)"}) {
    CAPTURE(text);
    CHECK(right_countdown(p, text) == !contains(text, "0-5"));
  }
  for (const char* text : {"", "26", "25 + 1", "3*3*3-1", "5 + 7 * 3 - 0", "25 + 3/3", "5+7",
                           "(3*7+5", "1/0", "3 * 7 + 5 + 25"}) {
    CAPTURE(text);
    CHECK(!right_countdown(p, text));
  }
  // Other arithmetic in the text, lists and typographic signs
  for (const char* text : {"3*7+5 = 26 in 1-2 steps", "Answer: 3*7+5 (5-step)", "1. 3*7 + 5 = 26",
                           "- 3 * 7 + 5 = 26", "3 \u00d7 7 + 5 = 26", "3 \\times 7 + 5"}) {
    CAPTURE(text);
    CHECK(right_countdown(p, text));
  }
  CHECK(right_countdown(problem("", R"({"numbers": [3, 5], "target": 8})"), "- 3 + 5 = 8"));
  CHECK(!right_countdown(p, "3*7+5", true));
  CHECK(right_countdown(p, "25 + 5 + 3 - 7", true));
  CHECK(right_countdown(problem("", R"({"numbers": [3, 5], "target": 8})"), "3+5", true));
  CHECK(contains(error_of([] { right_countdown(problem("8"), "3+5"); }), "found no countdown"));
}

TEST_CASE("a verifier is made by its name, with the argument that it needs") {
  const auto score = [](const std::string& name, const std::string& argument, const Problem& p,
                        const std::string& text, bool ended = true) {
    const Attempt attempts[] = {{&p, "something else", true}, {&p, text, ended}};
    const auto verifier = make_verifier(name, argument, {});
    REQUIRE(verifier);
    const std::vector<float> scores = verifier->score(attempts);
    REQUIRE(scores.size() == 2);
    return verifier->is_pass_fail && scores[0] != 0 ? -1 : scores[1];
  };
  CHECK(score("number", "", problem("18"), "It is 18.") == 1);
  CHECK(score("number", "", problem("18"), "It is 19.") == 0);
  CHECK(score("exact", "", problem(" a b\n"), "a b ") == 1);
  CHECK(score("exact", "", problem("a b"), "A b") == 0);
  CHECK(score("choice", "", problem("B"), "(B)") == 1);
  CHECK(score("countdown", "", problem("", R"({"numbers": [3, 5], "target": 8})"), "3+5") == 1);
  CHECK(score("format", "Steps:\n*", problem(""), "Steps:\nmany") == 1);
  CHECK(score("format", "Steps:\n*", problem(""), "many") == 0);
  Problem open = problem("");
  open.rubric =
      parse_rubric(Json::parse(R"([{"kind": "ends", "words": ["home"], "weight": 1}])"), "rubric");
  CHECK(score("rubric", "", open, "She went home.") == 1);
  CHECK(score("rubric", "", open, "She went home.", false) == 0);
  CHECK(!make_verifier("rubric", "", {})->is_pass_fail);
  CHECK(!make_verifier("length", "", {}));

  CHECK(score("countdown", "all", problem("", R"({"numbers": [3, 5], "target": 8})"), "3+5") == 1);
  // What a problem lacks is found before the first answer.
  const auto lacks = [](const std::string& name) {
    return error_of([&] { make_verifier(name, "", {})->check_problem(problem("")); });
  };
  CHECK(lacks("number") == "p.jsonl:1: answer is missing");
  CHECK(lacks("exact") == "p.jsonl:1: answer is missing");
  CHECK(lacks("choice") == "p.jsonl:1: answer is missing");
  CHECK(contains(lacks("countdown"), "p.jsonl:1: found no countdown"));
  CHECK(lacks("rubric") == "p.jsonl:1: rubric is missing");
  CHECK(contains(error_of([] { make_verifier("countdown", "some", {}); }), "countdown:all"));
  CHECK(error_of([] { make_verifier("command", "", {}); }) ==
        "--reward command: expected command:a shell command");
  CHECK(make_verifier("check", "cat", {})->is_pass_fail);
  CHECK(!make_verifier("command", "cat", {})->is_pass_fail);
  CHECK(error_of([] { make_verifier("format", "", {}, "--check"); }) ==
        "--check format: expected format:PATTERN, where * is any text");
  CHECK(contains(error_of([&] { score("command", "exit 0", problem(""), ""); }),
                 "--reward command: found 1 failures in 2 rollouts, expected a fifth at most; the "
                 "last: it ended"));
}

TEST_CASE("a format matches with * for any text and ? for a byte") {
  CHECK(matches_pattern("Steps: *Answer: *.", "Steps: 1\nAnswer: 2."));
  CHECK(matches_pattern("*", ""));
  CHECK(matches_pattern("a?c*", "abc"));
  CHECK(!matches_pattern("Steps: *Answer: *.", "Steps: 1\nAnswer: 2"));
  CHECK(!matches_pattern("a*b", "ab "));
}

// ---------------------------------------------------------------------------------------------
// A verifier of the user's own

namespace {

// Reads the id of a line in sh.
const std::string kId = R"(i=${l##*\"id\":}; i=${i%%[,\}]*}; )";

struct Verified {
  std::vector<float> rewards;
  std::string why;
};

// Texts, one after another; "hang", "die" and the like are for the command to look for.
Verified verify(const std::string& command, const std::vector<std::string>& texts,
                CommandLimits limits = {.seconds = 5, .start_seconds = 0}) {
  const Problem p = problem("b", R"({"tests": ["t1"]})");
  CommandVerifier verifier(command, limits, false);
  Verified out;
  for (const std::string& text : texts) {
    const Attempt attempt{&p, text};
    out.rewards.push_back(verifier.score({&attempt, 1}, 1).at(0));
  }
  out.why = verifier.last_failure();
  return out;
}

bool failed(float reward) { return std::isnan(reward); }

}  // namespace

TEST_CASE("a command rewards line after line in one process") {
  const Verified v = verify("n=0; while read -r l; do n=$((n+1)); " + kId +
                                "echo \"{\\\"id\\\":$i,\\\"reward\\\":$n.5}\"; done",
                            {"a", "b\nc", "\xff\""});
  CHECK(v.rewards == std::vector<float>{1.5, 2.5, 3.5});  // its count lives
  CHECK(v.why.empty());
  // It reads the prompt, the completion and the answer.
  const Verified seen = verify("while read -r l; do " + kId +
                                   "case $l in "
                                   "*'\"answer\":\"b\"'*'\"completion\":\"b\"'*'\"prompt\":\"q\"'*'"
                                   "\"tests\":[\"t1\"]'*) r=1;; "
                                   "*) r=0;; "
                                   "esac; echo \"{\\\"reward\\\":$r,\\\"id\\\":$i}\"; done",
                               {"a", "b"});
  CHECK(seen.rewards == std::vector<float>{0, 1});
}

TEST_CASE("a command that hangs, ends or writes nonsense loses that answer and no other") {
  const std::string good = "echo \"{\\\"id\\\":$i,\\\"reward\\\":1}\"";
  const auto loop = [&](const std::string& bad) {
    return "while read -r l; do " + kId + "case $l in *bad*) " + bad + ";; *) " + good +
           ";; esac; done";
  };
  const struct {
    const char *what, *bad, *why;
  } cases[] = {
      {"hangs", "sleep 60", "wrote no line within 0.3 s"},
      {"ends", "exit 3", "ended"},
      {"crashes", "kill -SEGV $$", "ended"},
      {"nonsense", "echo ok", "wrote \"ok\", expected {\"id\": 0"},
      {"another id", "echo '{\"id\":7,\"reward\":1}'", "expected {\"id\": 0"},
      {"no number", "echo \"{\\\"id\\\":$i,\\\"reward\\\":\\\"1\\\"}\"", "expected"},
      {"not finite", "echo \"{\\\"id\\\":$i,\\\"reward\\\":1e999}\"", "expected"},
      {"two lines", "echo \"{\\\"id\\\":$i,\\\"reward\\\":1}\nmore\"", "more than one line"}};
  for (const auto& c : cases) {
    CAPTURE(c.what);
    const Verified v = verify(loop(c.bad), {"a", "bad", "b"}, {.seconds = .3, .start_seconds = 2});
    CHECK(v.rewards[0] == 1);
    CHECK(failed(v.rewards[1]));
    CHECK(v.rewards[2] == 1);
    CHECK_MESSAGE(contains(v.why, c.why), v.why);
  }
  CHECK(contains(verify("exit 0", {"a"}).why, "ended"));
  CHECK(contains(verify("/nonexistent/verifier 2>/dev/null", {"a"}).why, "ended"));
}

TEST_CASE("a command has limits of memory and processes") {
  // 16 MB of text in a variable, within 4 GB and within 24 MB of addresses
  const std::string grows = "read -r l; " + kId +
                            "x=$(head -c 16000000 /dev/zero | tr '\\0' x) || exit 1; "
                            "echo \"{\\\"id\\\":$i,\\\"reward\\\":${#x}}\"";
  CHECK(verify(grows, {"a"}).rewards[0] == 16000000);
  CHECK(failed(verify("exec 2>/dev/null; " + grows, {"a"},
                      {.seconds = 5, .start_seconds = 0, .memory = 24 << 20})
                   .rewards[0]));
  if (getuid() != 0) {  // the system does not bind root by the other limit
    const std::string forks =
        "read -r l; " + kId +
        "sleep 9 & sleep 9 & sleep 9 & echo \"{\\\"id\\\":$i,\\\"reward\\\":1}\"";
    CHECK(failed(
        verify(forks + " 2>/dev/null", {"a"}, {.seconds = 5, .start_seconds = 0, .processes = 1})
            .rewards[0]));
  }
}

TEST_CASE("what a command started ends with it") {
  const TempDir dir;
  const std::string mark = dir / "alive";
  verify("(sleep 1; touch " + mark + ") & sleep 60", {"a"}, {.seconds = .1, .start_seconds = 0});
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  CHECK(!std::filesystem::exists(mark));
}

TEST_CASE("several processes take the time of one, and rewards come in the answers' order") {
  const Problem p = problem("b");
  const std::string slow = "while read -r l; do " + kId +
                           "[ $i = 0 ] && sleep .4 || sleep .1; "
                           "echo \"{\\\"id\\\":$i,\\\"reward\\\":$i}\"; done";
  const std::vector<Attempt> attempts(8, {&p, "text"});
  const std::vector<float> expected{0, 1, 2, 3, 4, 5, 6, 7};
  double seconds[2];
  for (const int n : {1, 4}) {
    CommandVerifier verifier(slow, {.seconds = 5, .verifiers = n}, false);
    const double begin = now();
    CHECK(verifier.score(attempts, 0) == expected);
    seconds[n == 4] = now() - begin;
  }
  CHECK(seconds[0] > 1.1);
  CHECK(seconds[1] < .8 * seconds[0]);
}

TEST_CASE("a program that loads for long is waited for once, and its first line is a trial") {
  const std::string late = "sleep .5; while read -r l; do " + kId +
                           "case $l in *bad*) exit;; esac; "
                           "echo \"{\\\"id\\\":$i,\\\"reward\\\":1}\"; done";
  const CommandLimits limits{.seconds = .2, .start_seconds = 5, .verifiers = 2};
  const Problem p = problem("b");
  const Verifier v = command_verifier(late, limits, true, "--reward check");
  v.try_out(p);
  std::vector<Attempt> attempts(10, {&p, "a"});
  attempts[3].text = "bad";  // starts a process anew
  const std::vector<float> rewards = v.score(attempts);
  CHECK(std::ranges::count(rewards, 1) == 9);
  CHECK(failed(rewards[3]));
  // Once more than a fifth have failed, the rest is not waited for.
  for (size_t i = 0; i < 5; i++) attempts[i].text = "bad";
  CHECK(error_of([&] { v.score(attempts); }) ==
        "--reward check: found 3 failures in 10 rollouts, expected a fifth at most; the last: it "
        "ended");
  const Verifier ends = command_verifier("exit 0", limits, true, "--reward check");
  CHECK(contains(error_of([&] { ends.try_out(p); }),
                 "--reward check: tried before the run with an empty completion, it ended"));
}

TEST_CASE("check: says right or wrong, command: any number") {
  const std::string json =
      "while read -r l; do " + kId + "echo \"{\\\"id\\\":$i,\\\"reward\\\":0.5}\"; done";
  const Problem p = problem("b");
  const Attempt attempt{&p, "text"};
  CommandVerifier scores(json, {}, false), checks(json, {}, true);
  CHECK(scores.score({&attempt, 1}, 0).at(0) == .5f);
  CHECK(failed(checks.score({&attempt, 1}, 0).at(0)));
  CHECK(contains(checks.last_failure(), "\"reward\": 0 or 1}"));
}
