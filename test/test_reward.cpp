// Learning from preferences, as the user of ./reward meets it: reading them, reward models, DPO,
// scores. The objectives themselves are tested in test_reward_objectives.cpp.
#include <doctest/doctest.h>

#include <cmath>
#include <sstream>

#include "cake/checkpoint.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/tokenizer.h"
#include "test/preference_world.h"
#include "test/support.h"

using namespace cake;
using namespace cake::preference_world;

namespace {

std::string model_bytes(const std::filesystem::path& run) {
  const bool adapters = has_adapters(run / "model");
  return read_file(run / "model" / (adapters ? "adapter_model.safetensors" : "model.safetensors"));
}

std::unique_ptr<Gpt> load(const std::filesystem::path& dir, const Config& c, uint64_t seed = 1) {
  auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  load_weights(dir, *gpt, {.new_score = true, .seed = seed});
  return gpt;
}

// A question and its answer up to the end of the assistant's turn.
std::vector<int> turn(const Tokenizer& t, const std::string& asked, const std::string& answer) {
  std::vector<int> ids = render_chat(t, {{{"user", asked, {}}, {"assistant", answer, {}}}, {}}).ids;
  while (ids.back() != end_of_turn(t)) ids.pop_back();
  return ids;
}

double value_at_end(Gpt& gpt, const std::vector<int>& ids) {
  const std::vector<int> none(ids.size(), -1), starts = {0, int(ids.size())};
  gpt.forward({ids, none, starts}, Pass::score);
  return gpt.value()[ids.size() - 1];
}

struct Line {  // of pairs.jsonl
  std::string prompt, chosen, rejected;
};
std::vector<Line> lines_of(const std::string& name) {
  std::vector<Line> out;
  std::istringstream lines(read_file(world() / name));
  for (std::string line; std::getline(lines, line);) {
    const Json j = Json::parse(line);
    out.push_back({j.at("prompt"), j.at("chosen"), j.at("rejected")});
  }
  return out;
}

Preference preference(const std::string& json) {
  static simdjson::dom::parser parser;
  simdjson::dom::object object;
  REQUIRE(parser.parse(json).get(object) == simdjson::SUCCESS);
  return parse_preference(object, "here");
}
std::string complaint(const std::string& json) {
  return error_of([&] { preference(json); });
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Reading

TEST_CASE("preferences are pairs or rankings, of texts or of messages") {
  const Preference text = preference(R"({"prompt":"a","chosen":"b","rejected":"c"})");
  CHECK(!text.is_chat);
  CHECK(text.text == "a");
  CHECK(text.continuations == std::vector<std::string>{"b", "c"});
  CHECK(text.ranking == std::vector<int>{1, 2});

  const Preference chat = preference(
      R"({"prompt":[{"role":"user","content":"a"}],"responses":["x","y","z"],"ranking":[2,1,2]})");
  CHECK(chat.is_chat);
  CHECK(chat.prompt.messages.size() == 1);
  CHECK(chat.answers.size() == 3);
  CHECK(chat.answers[1][0].role == "assistant");
  CHECK(chat.answers[1][0].content == "y");
  CHECK(chat.ranking == std::vector<int>{2, 1, 2});

  const Preference messages = preference(
      R"({"prompt":"a","chosen":[{"role":"assistant","content":"b"}],
          "rejected":[{"role":"assistant","content":"c"}]})");
  CHECK(messages.is_chat);
  CHECK(messages.prompt.messages[0].content == "a");

  // Whole conversations: what they share is the prompt, and an answer is all that differs.
  const Preference whole = preference(
      R"({"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},
                    {"role":"user","content":"c"},{"role":"assistant","content":"d"}],
        "rejected":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},
                    {"role":"user","content":"c"},{"role":"assistant","content":"e"}]})");
  CHECK(whole.prompt.messages.size() == 3);
  CHECK(whole.answers[0].size() == 1);
  CHECK(whole.answers[1][0].content == "e");

  CHECK(preference(R"({"text":"fine","label":"pos"})").label == true);
  CHECK(preference(R"({"text":"fine","label":0})").label == false);
  CHECK(preference(R"({"text":"fine","label":true})").label == true);
}

TEST_CASE("bad preferences are refused with file, line and what was found") {
  const auto refused = [](const std::string& json, const std::string& part) {
    const std::string found = complaint(json);
    CHECK_MESSAGE((contains(found, part) && contains(found, "here")), found);
  };
  refused(R"({"prompt":"a","chosen":"b","rejected":"b"})", "the same answer twice");
  refused(R"({"prompt":"a","chosen":"","rejected":"b"})", "chosen: found nothing");
  refused(R"({"prompt":"a","chosen":"b","rejected":" \n"})", "rejected: found nothing");
  refused(R"({"prompt":"a","chosen":"b"})", "found neither");
  refused(R"({"prompt":"a","chosen":3,"rejected":"b"})", "found a number, expected a string");
  refused(R"({"prompt":"a","responses":["x","y"],"ranking":[1]})", "found 1 ranks, expected 2");
  refused(R"({"prompt":"a","responses":["x","y"],"ranking":[1,0]})", "expected ranks from 1 on");
  refused(R"({"prompt":"a","responses":["x","y"],"ranking":"1,2"})", "expected a rank for each");
  refused(R"({"prompt":"a","responses":["x"],"ranking":[1]})", "expected at least 2");
  refused(R"({"prompt":"a","responses":["x","x"],"ranking":[1,2]})", "the same answer twice");
  refused(R"({"text":"a","label":"maybe"})", "expected true or false");
  refused(R"({"text":"","label":1})", "found nothing");
  refused(R"({"prompt":[{"role":"assistant","content":"a"}],"chosen":"b","rejected":"c"})",
          "answer 1");
  CHECK(complaint(R"({"prompt":"a","responses":["x","x","y"],"ranking":[1,1,2]})") == "no error");
}

TEST_CASE("real pairs of solutions are read, two answers each") {
  const std::string name = "preferences/gsm8k_solutions.jsonl";
  if (skip_without_data(name)) return;
  JsonLines lines{Input(data_path(name).string())};
  simdjson::dom::object object;
  int pairs = 0;
  while (lines.next(object)) {
    const Preference p = parse_preference(object, lines.where());
    CHECK(p.continuations.size() == 2);
    pairs++;
  }
  CHECK(pairs == 2429);
}

// ---------------------------------------------------------------------------------------------
// Reward models

TEST_CASE("the first loss of a reward model is that of its pairs one by one") {
  const TempDir dir;
  good(stage("reward train", dir / "run",
             "--data " + file("pairs.jsonl") +
                 " --as-chat --val-fraction 0 --steps 1 --batch 160 "
                 "--micro-batch-tokens 200 --normalize-on none --seed 3"));
  Config c = load_config(world() / "model");
  c.head = Head::scalar;
  const auto gpt = load(world() / "model", c, 3);
  const Tokenizer t = Tokenizer::load(world() / "model");
  double loss = 0, right = 0;
  for (const Line& l : lines_of("pairs.jsonl")) {
    const double d = value_at_end(*gpt, turn(t, l.prompt, l.chosen)) -
                     value_at_end(*gpt, turn(t, l.prompt, l.rejected));
    loss += std::log1p(std::exp(-d)) / 160;
    right += (d > 0) / 160.;
  }
  const Json first = metrics(dir / "run", "loss").at(0);
  // fp32 values of equal bits: sums in double of another order
  CHECK(std::abs(first.at("loss").get<double>() - loss) < 1e-9);
  CHECK(std::abs(first.at("accuracy").get<double>() - right) < 1e-9);
}

TEST_CASE("a reward model learns what was preferred, and scores have mean 0 and spread 1") {
  const TempDir dir;
  const Output o = good(stage("reward train", dir / "run",
                              "--data " + file("pairs.jsonl") +
                                  " --as-chat --val-fraction .25 --epochs 6 --batch 8 --lr .003"));
  const Json summary = read_json(dir / "run/summary.json");
  CHECK(summary.at("accuracy").get<double>() > .95);
  CHECK(summary.at("pairs").get<int>() > 20);
  CHECK(summary.at("margin").get<double>() > 1);
  CHECK(summary.at("calibration").size() == 10);
  CHECK(contains(o.text, "the longer wins: "));
  // Chosen answers are the longer ones in each group of four once, and then the rejected two times.
  CHECK(summary.at("longer_wins").get<double>() < .5);
  const Json config = read_json(dir / "run/model/config.json");
  CHECK(config.at("architectures").at(0) == "Qwen3ForSequenceClassification");
  CHECK(config.at("pad_token_id") != config.at("eos_token_id"));
  const Config c = load_config(dir / "run/model");
  CHECK(c.reward_shift == config.at("reward_shift"));

  // Over the training answers: those whose problem was not held out. Held-out ones are few, and
  // drawn alike, so that over all the mean is near 0 and the spread near 1.
  const auto gpt = load(dir / "run/model", c);
  const Tokenizer t = Tokenizer::load(dir / "run/model");
  double sum = 0, squares = 0;
  for (const Line& l : lines_of("pairs.jsonl")) {
    for (const std::string& answer : {l.chosen, l.rejected}) {
      const double r = value_at_end(*gpt, turn(t, l.prompt, answer)) + c.reward_shift;
      sum += r, squares += r * r;
    }
  }
  CHECK(std::abs(sum / 320) < .1);
  CHECK(std::abs(squares / 320 - 1) < .1);
}

TEST_CASE("a reward model of shuffled preferences knows nothing of held-out ones") {
  const TempDir dir;
  good(stage(
      "reward train", dir / "run",
      "--data " + file("shuffled.jsonl") + " --as-chat --val-fraction .4 --epochs 2 --batch 8"));
  const double accuracy = read_json(dir / "run/summary.json").at("accuracy");
  CHECK(std::abs(accuracy - .5) < .25);  // about 64 pairs: four standard deviations
}

TEST_CASE("rankings with ties and labelled texts are learned") {
  const TempDir dir;
  good(stage("reward train", dir / "ranked",
             "--data " + file("rankings.jsonl") +
                 " --epochs 3 --batch 8 --lr .003 --margin .1 "
                 "--center .01"));
  const Json ranked = read_json(dir / "ranked/summary.json");
  CHECK(ranked.at("accuracy").get<double>() > .95);
  CHECK(ranked.at("pairs").get<int>() == 4 * ranked.at("held_out").get<int>());  // two of six tie
  const Output o =
      good(stage("reward train", dir / "labels",
                 "--data " + file("labels.jsonl") + " --epochs 4 --batch 8 --lr .003"));
  const Json labels = read_json(dir / "labels/summary.json");
  CHECK(labels.at("accuracy").get<double>() > .95);
  CHECK(!labels.contains("longer_wins"));
}

TEST_CASE("folds judge every pair once") {
  const TempDir dir;
  good(stage("reward train", dir / "run",
             "--data " + file("pairs.jsonl") + " --as-chat --folds 3 --steps 4 --batch 8"));
  int pairs = 0;
  double right = 0;
  for (int fold = 1; fold <= 3; fold++) {
    const Json s = read_json(dir / concat("run/fold-", fold, "/summary.json"));
    pairs += s.at("pairs").get<int>();
    right += s.at("pairs").get<int>() * s.at("accuracy").get<double>();
    CHECK(s.at("prompts").get<int>() + s.at("held_out").get<int>() == 160);
    CHECK(s.at("held_out").get<int>() % 4 == 0);  // all pairs of a problem, or none
  }
  const Json all = read_json(dir / "run/summary.json");
  CHECK(pairs == 160);
  CHECK(all.at("pairs") == 160);
  CHECK(std::abs(all.at("accuracy").get<double>() - right / 160) < 1e-12);
}

// ---------------------------------------------------------------------------------------------
// DPO

TEST_CASE("DPO's first loss is ln 2, IPO's 1 / (2 beta)^2, KTO's one half") {
  const TempDir dir;
  int number = 0;
  const auto first = [&](const std::string& flags) {
    const auto out = dir / concat("run_", ++number);
    good(stage("reward dpo", out,
               "--data " + file("pairs.jsonl") +
                   " --as-chat --steps 1 --batch 16 --micro-batch-tokens 100 " + flags));
    return metrics(out, "loss").at(0);
  };
  // The reference has the policy's bits: nothing but the rounding of a logarithm is left.
  CHECK(std::abs(first("").at("loss").get<double>() - std::log(2.)) < 1e-12);
  CHECK(std::abs(first("--lora 4").at("loss").get<double>() - std::log(2.)) < 1e-12);
  CHECK(std::abs(first("--label-smoothing .1").at("loss").get<double>() - std::log(2.)) < 1e-12);
  CHECK(std::abs(first("--loss ipo --beta .1").at("loss").get<double>() - 25) < 1e-12);
  CHECK(std::abs(first("--loss kto").at("loss").get<double>() - .5) < 1e-12);
  const Json dpo = first("");
  CHECK(dpo.at("logp_chosen").get<double>() < 0);
  CHECK(dpo.at("logp_rejected").get<double>() < 0);
  CHECK(dpo.at("logp_chosen") != dpo.at("logp_rejected"));
  CHECK(dpo.at("grad_norm").get<double>() > 0);
}

TEST_CASE("DPO counts the assistant's tokens of an answer of several messages, and no other") {
  const TempDir dir;
  const auto messages = [](const std::string& a, const std::string& b, const std::string& c) {
    return Json::array({{{"role", "assistant"}, {"content", a}},
                        {{"role", "user"}, {"content", b}},
                        {{"role", "assistant"}, {"content", c}}});
  };
  const Json line = {{"prompt", Json::array({{{"role", "user"}, {"content", "ask"}}})},
                     {"chosen", messages("yes", "and", "more yes")},
                     {"rejected", messages("no", "and", "more no")}};
  write_file(dir / "data.jsonl", line.dump() + "\n");
  good(stage(
      "reward dpo", dir / "run",
      concat("--data ", (dir / "data.jsonl").string(), " --val-fraction 0 --steps 1 --batch 1")));
  const auto gpt = load(world() / "model", load_config(world() / "model"));
  const Tokenizer t = Tokenizer::load(world() / "model");
  const Rendered r = render_chat(t, {{{"user", "ask", {}},
                                      {"assistant", "yes", {}},
                                      {"user", "and", {}},
                                      {"assistant", "more yes", {}}},
                                     {}});
  std::vector<int> targets(r.ids.size(), -1);
  for (size_t p = 0; p + 1 < r.ids.size(); p++)
    if (r.trained[p + 1]) targets[p] = r.ids[p + 1];
  const std::vector<int> starts = {0, int(r.ids.size())};
  gpt->forward({r.ids, targets, starts}, Pass::score);
  double sum = 0;
  for (const float logp : gpt->logp()) sum += logp;
  const double found = metrics(dir / "run", "logp_chosen").at(0).at("logp_chosen");
  CHECK(std::abs(found - sum) < 1e-9);
}

TEST_CASE("every loss of DPO's family prefers the chosen answers in the end") {
  const TempDir dir;
  for (const std::string flags :
       {"--lr .002", "--lora 4 --lr .01", "--loss ipo --beta .5 --lr .002", "--loss kto --lr .002",
        "--loss orpo --lr .002", "--label-smoothing .1 --lr .002"}) {
    CAPTURE(flags);
    const auto out = dir / concat("run", hash64(flags));
    const Output o =
        good(stage("reward dpo", out,
                   concat("--data ", file("rankings.jsonl"), " --epochs 2 --batch 8 ", flags)));
    const Json summary = read_json(out / "summary.json");
    CHECK(summary.at("val_accuracy").get<double>() > .9);
    CHECK(summary.at("val_margin").get<double>() > 0);
    CHECK(contains(o.text, "log p chosen"));
  }
}

TEST_CASE("a run of DPO whose reference has changed says so") {
  const TempDir dir;
  std::filesystem::copy(world() / "model", dir / "reference",
                        std::filesystem::copy_options::recursive);
  int status = 0;
  const std::string out = dir / "run";
  REQUIRE(interrupt(
      stage("reward dpo", out,
            "--data " + file("pairs.jsonl") + " --as-chat --steps 200 --batch 8 --reference " +
                (dir / "reference").string()),
      out, 5, SIGTERM, &status));
  const auto gpt = load(dir / "reference", load_config(dir / "reference"));
  std::vector<float> w(size_t(gpt->table().tensors[0].size()), .1f);
  gpt->write(0, Slot::weight, w);
  save_checkpoint(dir / "reference", *gpt, {.tokenizer_from = world() / "tokenizer"});
  const Output o = shell("./reward dpo --resume -o " + out);
  CHECK(o.status == 1);
  CHECK(contains(o.text, "it has changed"));
}

// ---------------------------------------------------------------------------------------------
// Scores

std::vector<Json> json_lines(const std::filesystem::path& path) {
  std::vector<Json> all;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) all.push_back(Json::parse(line));
  return all;
}

// The share of pairs whose first score is higher.
double accuracy_of(const std::vector<Json>& scored) {
  double right = 0;
  for (const Json& line : scored) {
    const double chosen = line.at("scores").at(0), rejected = line.at("scores").at(1);
    right += chosen > rejected ? 1 : chosen == rejected ? .5 : 0;
  }
  return right / double(scored.size());
}

TEST_CASE("a reward model's scores are its values, and agree with preferences as its run says") {
  const TempDir dir;
  good(stage("reward train", dir / "run",
             "--data " + file("pairs.jsonl") + " --val " + file("shuffled.jsonl") +
                 " --as-chat --steps 12 --batch 8 --lr .003"));
  const std::string score = "./reward score " + (dir / "run").string() + " -o ";
  const Output o =
      good(score + (dir / "out.jsonl").string() + " --as-chat --data " + file("shuffled.jsonl"));
  const std::vector<Json> scored = json_lines(dir / "out.jsonl");
  const std::vector<Line> lines = lines_of("shuffled.jsonl");
  REQUIRE(scored.size() == lines.size());
  CHECK(std::abs(accuracy_of(scored) -
                 read_json(dir / "run/summary.json").at("accuracy").get<double>()) < .02);
  CHECK(contains(o.text, "160 pairs, accuracy "));
  const Config c = load_config(dir / "run/model");
  const auto gpt = load(dir / "run/model", c);
  const Tokenizer t = Tokenizer::load(dir / "run/model");
  const auto expected = [&](const std::vector<int>& ids) {
    return doctest::Approx(value_at_end(*gpt, ids) + c.reward_shift).epsilon(1e-5);
  };
  for (const size_t i : {0, 1, 159}) {
    CHECK(scored[i].at("chosen") == lines[i].chosen);  // the line itself is still there
    CHECK(scored[i].at("scores").at(0).get<double>() ==
          expected(turn(t, lines[i].prompt, lines[i].chosen)));
    CHECK(scored[i].at("scores").at(1).get<double>() ==
          expected(turn(t, lines[i].prompt, lines[i].rejected)));
  }

  // Answers that are compared with none, and one that is too long.
  std::string text = "yes";
  for (int i = 0; i < 200; i++) text += " no";
  write_file(
      dir / "answers.jsonl",
      R"({"messages":[{"role":"user","content":"ask"},{"role":"assistant","content":"yes"}]})"
      "\n"
      R"({"prompt":"yes","completion":" or no"})"
      "\n"
      R"({"text":"yes"})"
      "\n"
      R"({"text":")" +
          text + "\"}\n");
  const Output answers =
      good(score + (dir / "a.jsonl").string() + " --data " + (dir / "answers.jsonl").string());
  const std::vector<Json> a = json_lines(dir / "a.jsonl");
  REQUIRE(a.size() == 4);
  CHECK(a[0].at("score").get<double>() == expected(turn(t, "ask", "yes")));
  std::vector<int> ids = {t.end_of_text()};
  t.encode("yes", ids);
  std::vector<int> whole = ids;
  ids.push_back(end_of_turn(t));
  t.encode(" or no", whole);
  whole.push_back(end_of_turn(t));
  CHECK(a[1].at("score").get<double>() == expected(whole));
  CHECK(a[2].at("score").get<double>() == expected(ids));
  CHECK(a[3].at("score").is_null());
  CHECK(contains(answers.text, "1 lines have an answer longer than the context of 96"));
  CHECK(!contains(answers.text, "accuracy"));
}

TEST_CASE("a policy's score is beta times its log-probability against its reference") {
  const TempDir dir;
  const std::string pairs = "--as-chat --data " + file("shuffled.jsonl"), run = dir / "run";
  good(stage("reward dpo", run,
             "--data " + file("pairs.jsonl") + " --val " + file("shuffled.jsonl") +
                 " --as-chat --steps 8 --batch 8 --lr .002 --beta .3"));
  const std::string score = "./reward score ", out = " -o " + (dir / "out.jsonl").string() + " ";
  good(score + run + out + pairs);
  const std::vector<Json> scored = json_lines(dir / "out.jsonl");
  CHECK(std::abs(accuracy_of(scored) -
                 read_json(dir / "run/summary.json").at("val_accuracy").get<double>()) < .02);
  const auto policy = load(dir / "run/model", load_config(dir / "run/model"));
  const auto reference = load(world() / "model", load_config(world() / "model"));
  const Tokenizer t = Tokenizer::load(world() / "model");
  const Line line = lines_of("shuffled.jsonl")[0];
  const std::vector<int> ids = turn(t, line.prompt, line.chosen);
  const size_t prompt = render_chat(t, {{{"user", line.prompt, {}}}, {}}, true).ids.size();
  std::vector<int> targets(ids.size(), -1);
  for (size_t p = prompt - 1; p + 1 < ids.size(); p++) targets[p] = ids[p + 1];
  const auto logp = [&](Gpt& gpt) {
    const std::vector<int> starts = {0, int(ids.size())};
    gpt.forward({ids, targets, starts}, Pass::score);
    double sum = 0;
    for (const float l : gpt.logp()) sum += l;
    return sum;
  };
  const double expected = .3 * (logp(*policy) - logp(*reference));
  CHECK(expected != 0);
  CHECK(std::abs(scored[0].at("scores").at(0).get<double>() - expected) < 1e-5);

  // A model directory alone knows neither beta nor reference.
  std::filesystem::copy(dir / "run/model", dir / "bare");
  std::filesystem::remove(dir / "bare/trainer_state.json");
  const std::string bare = score + (dir / "bare").string() + out + pairs;
  const Output refused = shell(bare);
  CHECK(refused.status == 1);
  CHECK_MESSAGE(contains(refused.text, "--reference: missing"), refused.text);
  const std::string before = read_file(dir / "out.jsonl");
  good(bare + " --beta .3 --reference " + file("model"));
  CHECK(read_file(dir / "out.jsonl") == before);

  // A run's reference that has changed is found.
  Json state = read_json(dir / "run/model/trainer_state.json");
  state["reference"]["hash"] = "other";
  write_file(dir / "run/model/trainer_state.json", state.dump());
  const Output changed = shell(score + run + out + pairs);
  CHECK(changed.status == 1);
  CHECK_MESSAGE(contains(changed.text, "it has changed"), changed.text);
}

// ---------------------------------------------------------------------------------------------
// Going on

TEST_CASE("a run over preferences killed at any moment and resumed equals one that never stopped") {
  const TempDir dir;
  const std::string pairs = "--data " + file("pairs.jsonl") + " --as-chat --steps 60 --batch 8 ";
  const std::pair<std::string, std::string> runs[] = {
      {"train", pairs}, {"dpo", pairs}, {"dpo", pairs + "--loss kto"}, {"dpo", pairs + "--lora 2"}};
  int number = 0;
  for (const auto& run : runs) {
    const std::string command = "reward " + run.first, &flags = run.second;
    CAPTURE(flags);
    const std::string out = dir / concat("killed_", ++number), one = dir / concat("one_", number);
    good(stage(command, one, flags));
    int status = 0;
    REQUIRE(interrupt(stage(command, out, flags + " --save-every 7"), out, 20, SIGKILL, &status));
    REQUIRE(interrupt(concat("./", command, " --resume -o ", out), out, 40, SIGTERM, &status));
    CHECK(WEXITSTATUS(status) == 128 + SIGTERM);
    const Output rest = good(concat("./", command, " --resume -o ", out));
    CHECK(contains(rest.text, "resumes after step "));
    CHECK(model_bytes(out) == model_bytes(one));
    CHECK(read_file(out + "/metrics.jsonl") == read_file(one + "/metrics.jsonl"));
    CHECK(contains(shell(concat("./", command, " --resume -o ", out)).text, "is finished"));
  }
}

// ---------------------------------------------------------------------------------------------
// Bad input

TEST_CASE("./reward says in one line what is wrong with preferences and flags") {
  const TempDir dir;
  const std::string out = dir / "run", data = "--data " + file("pairs.jsonl") + " ";
  const auto error = [&](const std::string& command) {
    const Output o = shell(command);
    CHECK(o.status == 1);
    CHECK(std::count(o.text.begin(), o.text.end(), '\n') == 1);
    CHECK(o.text.substr(0, 7) == "error: ");
    return o.text;
  };
  write_file(dir / "equal.jsonl", R"({"prompt":"a","chosen":"b","rejected":"b"})");
  write_file(dir / "tied.jsonl", R"({"prompt":"a","responses":["b","c"],"ranking":[1,1]})");
  write_file(dir / "empty.jsonl", "");
  CHECK(contains(error(stage("reward train", out, "")), "--data: missing"));
  CHECK(contains(error("./reward train --data x -o " + out), "--model: missing"));
  CHECK(contains(error("./reward train --model x"), "-o: missing"));
  CHECK(contains(error(stage("reward train", out, "--data " + (dir / "equal.jsonl").string())),
                 "equal.jsonl:1: found the same answer twice"));
  CHECK(contains(error(stage("reward train", out, "--data " + (dir / "tied.jsonl").string())),
                 "1 with all answers tied"));
  CHECK(contains(error(stage("reward train", out, "--data " + (dir / "empty.jsonl").string())),
                 "found no preferences"));
  CHECK(contains(error(stage("reward train", out, data + "--context 500")), "to the model's 96"));
  CHECK(contains(error(stage("reward train", out, data + "--context 3")),
                 "longer than the context of 3"));
  CHECK(contains(error(stage("reward train", out, data + "--folds 1")), "expected 2 to 100"));
  CHECK(contains(error(stage("reward train", out, data + "--val-fraction 1")), "less than 1"));
  CHECK(contains(error(stage("reward train", out, data + "--schedule wild")), "linear, cosine"));
  CHECK(contains(error(stage("reward train", out, data + "--resume --overwrite")), "expected one"));
  CHECK(
      contains(error(stage("reward train", world() / "model", data)), "--resume goes on with it"));
  CHECK(contains(error(stage("reward dpo", out, data + "--loss what")), "dpo, ipo, kto or orpo"));
  CHECK(contains(error(stage("reward dpo", out, data + "--beta 0")), "expected above 0"));
  CHECK(contains(error(stage("reward dpo", out, data + "--label-smoothing .5")), "less than .5"));
  CHECK(contains(error(stage("reward dpo", out, "--data " + file("labels.jsonl"))),
                 "a labelled text"));
  CHECK(contains(error("./reward score"), "MODEL: missing"));
  CHECK(contains(error("./reward score " + file("model")), "--data: missing"));
  CHECK(contains(error("./reward score " + file("model") + " " + data), "-o: missing"));
  CHECK(!std::filesystem::exists(dir / "run"));
}
