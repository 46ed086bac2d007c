// The best of n, as the user of ./rlhf best-of-n meets it.
#include <doctest/doctest.h>

#include <cmath>

#include "cake/conversations.h"
#include "cake/tools.h"
#include "test/chatml.h"
#include "test/preference_world.h"
#include "test/scripted_model.h"

using namespace cake;
using namespace cake::preference_world;

TEST_CASE("the best of n: means over all subsets, the exact bound, answers for fine-tuning") {
  const TempDir dir;
  const std::string written = dir / "answers.jsonl";
  good(stage("rlhf best-of-n", dir / "run",
             "--prompts " + file("prompts.jsonl") +
                 " --reward ended --reward length:4 --gold rubric --n 6 "
                 "--max-tokens 12 --write " +
                 written));
  const std::vector<Json> prompts = metrics(dir / "run", "rewards");
  CHECK(prompts.size() == 24);
  const Json summary = read_json(dir / "run/summary.json");
  for (const Json& point : summary.at("curve")) {
    const int n = point.at("n");
    CHECK(std::abs(point.at("kl").get<double>() - (std::log(n) - (n - 1.) / n)) < 1e-12);
    double reward = 0;
    for (const Json& p : prompts) {  // every subset of n of the six answers
      double sum = 0, subsets = 0;
      for (unsigned set = 0; set < 64; set++) {
        if (__builtin_popcount(set) != n) continue;
        double best = -1e9;
        for (size_t i = 0; i < 6; i++) {
          if (set >> i & 1) best = std::max(best, p.at("reward").at(i).get<double>());
        }
        sum += best, subsets++;
      }
      reward += sum / subsets / 24;
    }
    CHECK(std::abs(point.at("reward").get<double>() - reward) < 1e-9);
  }
  int fit = 0;
  for (const Json& p : prompts) {
    const int chosen = p.at("chosen");
    if (chosen < 0) continue;
    fit++;
    CHECK(p.at("ended").at(size_t(chosen)) == true);
    for (size_t i = 0; i < 6; i++) {  // no other that ended is better
      CHECK((!p.at("ended").at(i).get<bool>() ||
             p.at("reward").at(i) <= p.at("reward").at(size_t(chosen))));
    }
  }
  JsonLines lines{Input(written)};
  simdjson::dom::object object;
  int conversations = 0;
  while (lines.next(object)) {
    conversations++;
    CHECK(parse_conversation({object, lines.where()}).messages.back().role == "assistant");
  }
  CHECK(conversations == fit);
}

TEST_CASE("the best of n with tools is written with its calls and their answers, or not at all") {
  for (const bool is_call : {true, false}) {
    CAPTURE(is_call);
    ScriptedModel script;
    const Tokenizer& t = script.tokenizer();
    const Conversation asked{{{"user", "What is 6*7?", {}}}, {kCalculatorTool}};
    const std::string call = R"({"name": "calculator", "arguments": {"expression": "6*7"}})";
    const std::string turn = "<tool_call>\n" + (is_call ? call : "{}") + "\n</tool_call><|im_end|>";
    const int n = int(chatml(t, asked, true).ids.size());
    const int said = script.write(n, turn);
    const std::vector<int> called = t.encode(turn, true);
    Conversation so_far = asked;
    so_far.messages.push_back(read_turn(chatml_template(t), called));
    const std::vector<int> reply = answer_calls(chatml_template(t), so_far, nullptr);
    script.write(said + int(reply.size()), "It is 42.<|im_end|>");
    const std::string model = script.save(), dir = script.dir().path();
    write_file(dir + "/p.jsonl", json_line(Json{{"messages", {message_json(asked.messages[0])}},
                                                {"tools", {Json::parse(kCalculatorTool)}}}));
    good(concat("./rlhf best-of-n --device cpu --model ", model, " --prompts ", dir,
                "/p.jsonl --reward ended --samples 2 --temperature .02 -o ", dir, "/run --write ",
                dir, "/answers.jsonl"));
    JsonLines lines{Input(dir + "/answers.jsonl")};
    simdjson::dom::object object;
    CHECK(lines.next(object) == is_call);
    if (!is_call) continue;  // a call that is none cannot be learned from
    const Conversation whole = parse_conversation({object, "answers.jsonl:1"});
    check_conversation(whole, "answers.jsonl:1");
    REQUIRE(whole.messages.size() == 4);
    CHECK(whole.messages[1].tool_calls.at(0).name == "calculator");
    CHECK(whole.messages[2] == Message{.role = "tool", .content = "42"});
    CHECK(whole.messages[3] == Message{.role = "assistant", .content = "It is 42."});
    CHECK(whole.tools.size() == 1);
  }
}

TEST_CASE("best of n killed and resumed writes what one that never stopped writes") {
  const TempDir dir;
  const std::string flags =
      "--prompts " + file("prompts.jsonl") + " --reward ended --n 8 --max-tokens 40";
  good(stage("rlhf best-of-n", dir / "one", flags));
  int status = 0;
  const std::string out = dir / "killed";
  REQUIRE(interrupt(stage("rlhf best-of-n", out, flags), out, 1, SIGKILL, &status));
  good("./rlhf best-of-n --resume -o " + out);
  CHECK(read_file(dir / "killed/metrics.jsonl") == read_file(dir / "one/metrics.jsonl"));
  CHECK(read_file(dir / "killed/summary.json") == read_file(dir / "one/summary.json"));
}

TEST_CASE("./rlhf best-of-n says in one line what is missing") {
  const TempDir dir;
  const auto refused = [&](const std::string& flags, const std::string& part) {
    const Output o = shell(stage("rlhf best-of-n", dir / "run", flags));
    CHECK(o.status == 1);
    CHECK(std::count(o.text.begin(), o.text.end(), '\n') == 1);
    CHECK_MESSAGE(contains(o.text, part), o.text);
  };
  refused("--prompts " + file("prompts.jsonl"), "--reward: missing");
  refused("--reward ended", "--prompts: missing");
  CHECK(!std::filesystem::exists(dir / "run"));
}

TEST_CASE("a reward model with another vocabulary is refused") {
  const TempDir dir;
  std::string text;
  for (int i = 0; i < 100; i++) text += "other words altogether, of another kind.\n";
  write_file(dir / "text.txt", text);
  const Tokenizer t = train_tokenizer({.inputs = {(dir / "text.txt").string()}}, 290, "qwen2");
  std::filesystem::create_directories(dir / "tokenizer");
  t.save(dir / "tokenizer");
  Config c = load_config(world() / "model");
  c.head = Head::scalar, c.V = t.vocab_size();
  const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
    gpt->write(int(i), Slot::weight, initial_values(gpt->table().tensors[i], 1));
  }
  save_checkpoint(dir / "reward", *gpt, {.tokenizer_from = dir / "tokenizer"});
  const Output o = shell(stage("rlhf best-of-n", dir / "run",
                               "--prompts " + file("prompts.jsonl") +
                                   " --max-tokens 12 --reward model:" + (dir / "reward").string()));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "found another vocabulary"), o.text);
}
