// Learning from preferences, as the user of ./reward meets it: reading them, reward models, DPO,
// scores. The objectives themselves are tested in test_reward_objectives.cpp.
#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <sstream>

#include "cake/checkpoint.h"
#include "cake/json.h"
#include "cake/preferences.h"
#include "cake/records.h"
#include "cake/tokenizer.h"
#include "test/chatml.h"
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
  std::vector<int> ids = chatml(t, {{{"user", asked, {}}, {"assistant", answer, {}}}, {}}).ids;
  while (ids.back() != t.special("<|im_end|>")) ids.pop_back();
  return ids;
}

// A raw text, or a text and what continues it: <|endoftext|> before and behind.
std::vector<int> document(const Tokenizer& t, const std::string& prompt,
                          const std::string& completion = "") {
  std::vector<int> ids = {t.end_of_text()};
  t.encode(prompt, ids), t.encode(completion, ids);
  ids.push_back(t.end_of_text());
  return ids;
}

// log p of the ids from `prompt` on.
double logp_of(Gpt& gpt, const std::vector<int>& ids, size_t prompt) {
  std::vector<int> targets(ids.size(), -1);
  for (size_t p = prompt - 1; p + 1 < ids.size(); p++) targets[p] = ids[p + 1];
  const std::vector<int> starts = {0, int(ids.size())};
  gpt.forward({ids, targets, starts}, Pass::score);
  double sum = 0;
  for (const float l : gpt.logp()) sum += l;
  return sum;
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

// A file of lines.
std::string write_lines(const std::filesystem::path& path, const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  write_file(path, text);
  return path;
}

}  // namespace

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

TEST_CASE("raw texts end with the document separator, which a reward model reads") {
  const TempDir dir;
  const std::string data = "--data " + file("pairs.jsonl"), run = dir / "run";
  good(stage("reward train", run,
             data + " --val-fraction 0 --steps 1 --batch 160 --normalize-on none --seed 3"));
  Config c = load_config(world() / "model");
  c.head = Head::scalar;
  const auto gpt = load(world() / "model", c, 3);
  const Tokenizer t = Tokenizer::load(world() / "model");
  double loss = 0;
  for (const Line& l : lines_of("pairs.jsonl")) {
    const double d = value_at_end(*gpt, document(t, l.prompt, l.chosen)) -
                     value_at_end(*gpt, document(t, l.prompt, l.rejected));
    loss += std::log1p(std::exp(-d)) / 160;
  }
  CHECK(std::abs(metrics(run, "loss").at(0).at("loss").get<double>() - loss) < 1e-9);
  // transformers reads the score at the last token that is not pad_token_id.
  Json config = read_json(run + "/model/config.json");
  CHECK(load_config(run + "/model").eos == t.end_of_text());
  CHECK(config.at("pad_token_id") == t.special("<|spare_0|>"));
  // The models of older versions padded with the separator, and were not trained to read it.
  config["pad_token_id"] = t.end_of_text();
  write_file(run + "/model/config.json", config.dump());
  const std::string score = "./reward score " + run + " -o " + (dir / "out").string() + " " + data;
  good(score + " --as-chat");
  const Output refused = shell(score);
  CHECK(refused.status == 1);
  CHECK_MESSAGE(contains(refused.text, "found a raw text to score"), refused.text);

  good(stage("reward dpo", dir / "dpo", data + " --val-fraction 0 --steps 1 --batch 160"));
  const auto policy = load(world() / "model", load_config(world() / "model"));
  double chosen = 0;
  for (const Line& l : lines_of("pairs.jsonl")) {
    const size_t prompt = document(t, l.prompt).size() - 1;
    chosen += logp_of(*policy, document(t, l.prompt, l.chosen), prompt) / 160;
  }
  const Json first = metrics(dir / "dpo", "logp_chosen").at(0);
  CHECK(std::abs(first.at("logp_chosen").get<double>() - chosen) < 1e-9);
}

TEST_CASE("a tokenizer without chat tokens: DPO of raw texts, and no reward model of them") {
  const TempDir dir;
  const std::string flags = " --model test/golden/eval_model --data " + file("pairs.jsonl") +
                            " --steps 1 --batch 8 -o " + (dir / "run").string();
  const Output refused = shell("./reward train" + flags);
  CHECK(refused.status == 1);
  CHECK_MESSAGE(contains(refused.text, "found no <|spare_0|> among the special tokens"),
                refused.text);
  CHECK(contains(shell("./reward dpo --as-chat" + flags).text, "<|im_end|>"));
  CHECK(!std::filesystem::exists(dir / "run"));
  good("./reward dpo" + flags);
  CHECK(load_config(dir / "run/model").eos == Tokenizer::load(dir / "run/model").end_of_text());
}

TEST_CASE("a reward model's scores of chats and of raw texts are those of transformers") {
  const TempDir dir;
  const std::string golden = "test/golden/reward_scores.jsonl", out = dir / "out.jsonl";
  good("./reward score test/golden/reward_model --data " + golden + " -o " + out);
  std::istringstream lines(read_file(out));
  int n = 0;
  for (std::string line; std::getline(lines, line); n++) {
    const Json j = Json::parse(line);
    const double score = j.at("score"), expected = j.at("transformers");
    CHECK_MESSAGE(std::abs(score - expected) < 1e-5, line);
  }
  CHECK(n == 7);
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
  const Tokenizer t = Tokenizer::load(dir / "run/model");
  CHECK(load_config(dir / "run/model").eos == t.special("<|im_end|>"));
  CHECK(config.at("pad_token_id") == t.special("<|spare_0|>"));
  const Config c = load_config(dir / "run/model");
  CHECK(c.reward_shift == config.at("reward_shift"));

  // Over the training answers: those whose problem was not held out. Held-out ones are few, and
  // drawn alike, so that over all the mean is near 0 and the spread near 1.
  const auto gpt = load(dir / "run/model", c);
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

TEST_CASE("DPO of adapters takes the adapters that it begins with as its reference") {
  const TempDir dir;
  const std::string flags = "--data " + file("pairs.jsonl") + " --as-chat --batch 8 --lora 4 ";
  const std::string begun = dir / "begun", one = dir / "one", killed = dir / "killed";
  good(stage("reward dpo", begun, flags + "--steps 4 --lr .05"));
  const std::string more = "./reward dpo --model " + begun + " " + flags + "--steps 60 --lr .01 ";
  good(more + "-o " + one);
  const Json first = metrics(one, "loss").at(0);
  CHECK(std::abs(first.at("loss").get<double>() - std::log(2.)) < 1e-12);
  CHECK(first.at("reward_chosen") == 0);
  // A resumed run has the same reference, not its own adapters.
  int status = 0;
  REQUIRE(interrupt(more + "-o " + killed, killed, 10, SIGTERM, &status));
  good("./reward dpo --resume -o " + killed);
  CHECK(model_bytes(killed) == model_bytes(one));
}

TEST_CASE("KTO estimates the KL from answers to other prompts, and without any takes it as 0") {
  const TempDir dir;
  write_file(dir / "one.jsonl", R"({"prompt":"ask","chosen":"yes","rejected":"no"})"
                                "\n"
                                R"({"prompt":"ask","chosen":"yes 1","rejected":"no 1"})"
                                "\n");
  const std::string flags = " --as-chat --val-fraction 0 --loss kto --steps 8 --lr .002 ";
  good(stage("reward dpo", dir / "one",
             "--data " + (dir / "one.jsonl").string() + flags + "--batch 2"));
  for (const Json& step : metrics(dir / "one", "loss")) CHECK(step.at("kl") == 0);
  good(stage("reward dpo", dir / "many", "--data " + file("pairs.jsonl") + flags + "--batch 160"));
  const auto steps = metrics(dir / "many", "loss");
  CHECK(steps.at(0).at("kl") == 0);
  CHECK(std::abs(steps.at(0).at("loss").get<double>() - .5) < 1e-12);
  double last = 0;
  for (const Json& step : steps) last = std::max(last, step.at("kl").get<double>());
  CHECK(last > 0);
}

// Of the world's answers, each with its label: a third of them good.
std::string labelled_answers(const std::filesystem::path& path) {
  std::vector<std::string> lines;
  int i = 0;
  for (const Line& l : lines_of("pairs.jsonl")) {
    const bool good = i++ % 3 == 0;
    lines.push_back(Json{
        {"prompt", l.prompt},
        {"completion", good ? l.chosen : l.rejected},
        {"label", good}}.dump());
  }
  return write_lines(path, lines);
}

TEST_CASE("KTO learns from labelled answers alone, and from them and pairs together") {
  const TempDir dir;
  const std::string data = labelled_answers(dir / "labels.jsonl");
  const std::string flags = " --loss kto --as-chat --val-fraction 0 --batch 16 --lr .002 ";
  for (const std::string& files : {data, data + " " + file("pairs.jsonl")}) {
    CAPTURE(files);
    const std::string out = dir / concat("run_", files.size());
    const Output o = good(stage("reward dpo", out,
                                "--epochs 4 --val " + file("pairs.jsonl") + flags + "--data " +
                                    files + " --desirable-weight 2"));
    const auto steps = metrics(out, "loss");
    CHECK(std::abs(steps.at(0).at("kl").get<double>()) == 0);
    const Json summary = read_json(out + "/summary.json");
    CHECK(summary.at("val_accuracy").get<double>() > .95);
    CHECK(summary.at("val_margin").get<double>() > .5);
    CHECK(steps.back().at("reward_chosen").get<double>() >
          steps.back().at("reward_rejected").get<double>() + .5);
    CHECK(contains(o.text, files == data ? "answers 54 good of weight 2, 106 bad of weight 1\n"
                                         : "answers 214 good of weight 2, 266 bad of weight 1\n"));
  }
  // A killed run goes on to the same bytes.
  const std::string one = dir / "one", killed = dir / "killed",
                    run = "--steps 60 --data " + data + flags;
  good(stage("reward dpo", one, run));
  int status = 0;
  REQUIRE(interrupt(stage("reward dpo", killed, run), killed, 10, SIGTERM, &status));
  good("./reward dpo --resume -o " + killed);
  CHECK(model_bytes(killed) == model_bytes(one));
}

TEST_CASE("KTO's plan advises weights where good and bad answers are unequally many") {
  const TempDir dir;
  const std::string flags = "--dry-run --loss kto --as-chat --val-fraction 0 --data ";
  const std::string data = labelled_answers(dir / "labels.jsonl");
  const auto plan = [&](const std::string& more) {
    return good(stage("reward dpo", dir / "run", flags + data + more)).text;
  };
  CHECK(contains(plan(""), "answers 54 good of weight 1, 106 bad of weight 1\n"));
  CHECK(contains(plan(""), "--desirable-weight 1.96\n"));
  CHECK(contains(plan(" --desirable-weight 4"), "--undesirable-weight 2.04\n"));
  CHECK(!contains(plan(" --desirable-weight 2"), "advised"));
  const std::string one_kind =
      write_lines(dir / "good.jsonl", {R"({"prompt":"a","completion":"b","label":true})",
                                       R"({"prompt":"c","completion":"d","label":true})"});
  CHECK(contains(good(stage("reward dpo", dir / "run", flags + one_kind)).text,
                 "all answers are of one kind"));
}

TEST_CASE("the first step of KTO on labels has each answer's log p and weights the kinds") {
  const TempDir dir;
  const std::string data = labelled_answers(dir / "labels.jsonl");
  good(stage("reward dpo", dir / "run",
             "--loss kto --as-chat --val-fraction 0 --steps 1 --batch 160 --micro-batch-tokens 200 "
             "--desirable-weight 3 --undesirable-weight .5 --data " +
                 data));
  const auto policy = load(world() / "model", load_config(world() / "model"));
  const Tokenizer t = Tokenizer::load(world() / "model");
  double good_sum = 0, bad_sum = 0;
  int i = 0;
  for (const Line& l : lines_of("pairs.jsonl")) {
    const bool is_good = i++ % 3 == 0;
    const size_t prompt = chatml(t, {{{"user", l.prompt, {}}}, {}}, true).ids.size();
    const double logp =
        logp_of(*policy, turn(t, l.prompt, is_good ? l.chosen : l.rejected), prompt);
    (is_good ? good_sum : bad_sum) += logp;
  }
  const Json first = metrics(dir / "run", "loss").at(0);
  // The policy is its own reference: each answer loses a half of its weight.
  CHECK(std::abs(first.at("loss").get<double>() - (54 * 3 + 106 * .5) / 2 / 160) < 1e-12);
  CHECK(std::abs(first.at("logp_chosen").get<double>() - good_sum / 54) < 1e-6);
  CHECK(std::abs(first.at("logp_rejected").get<double>() - bad_sum / 106) < 1e-6);
  CHECK(first.at("accuracy") == .5);
}

TEST_CASE("what nothing can be learned from is left out, counted, and changes nothing") {
  const TempDir dir;
  std::vector<std::string> lines, with;
  for (const Line& l : lines_of("pairs.jsonl")) {
    lines.push_back(
        Json{{"prompt", l.prompt}, {"chosen", l.chosen}, {"rejected", l.rejected}}.dump());
    with.push_back(lines.back());
    if (lines.size() % 40 == 0) {
      with.push_back(R"({"prompt":"p","chosen":"same","rejected":"same"})");
      with.push_back(R"({"prompt":"p","chosen":"same","rejected":"same \n"})");  // as ids of a chat
      with.push_back(R"({"prompt":"p","chosen":"a","rejected":""})");
      with.push_back(R"({"prompt":"p","responses":["a","b"],"ranking":[1,1]})");
      with.push_back(
          Json{{"prompt", "p"}, {"chosen", "a"}, {"rejected", std::string(2000, 'x')}}.dump());
    }
  }
  const std::string plain = write_lines(dir / "plain.jsonl", lines),
                    mixed = write_lines(dir / "mixed.jsonl", with);
  const Json expected = {{"empty answer", 4}, {"equal answers", 8}, {"tie", 4}, {"too long", 4}};
  for (const std::string command : {"reward train", "reward dpo"}) {
    const std::string flags = " --as-chat --steps 4 --batch 8 ",
                      a = dir / (command + " a").substr(7), b = dir / (command + " b").substr(7);
    const auto quoted = [](const std::string& path) { return "'" + path + "'"; };
    good(stage(command, quoted(a), "--data " + plain + flags));
    const Output o = good(stage(command, quoted(b), "--data " + mixed + flags));
    CHECK(model_bytes(a) == model_bytes(b));
    CHECK(contains(o.text, "left out 8 of 180 records: equal answers\n"));
    CHECK(contains(o.text, "left out 4 of 180 records: too long\n"));
    const Json data = metrics(b, "left_out").at(0);
    CHECK(data.at("left_out") == expected);
    CHECK(data.at("records") == 180);
    CHECK(data.at("kind") == "data");
  }
}

TEST_CASE("bad lines of preferences stop a run, or are skipped, counted and shown") {
  const TempDir dir;
  const std::string data =
      write_lines(dir / "data.jsonl", {R"({"prompt":"p","chosen":"yes","rejected":"no"})", "{",
                                       R"({"prompt":"p","chosen":3,"rejected":"no"})",
                                       R"({"prompt":"q","chosen":"yes 1","rejected":"no 2"})"});
  const std::string flags = "--as-chat --val-fraction 0 --steps 1 --batch 2 --data " + data;
  const Output stopped = shell(stage("reward dpo", dir / "run", flags));
  CHECK(stopped.status == 1);
  CHECK(contains(stopped.text, "data.jsonl:2: not JSON"));
  CHECK(!std::filesystem::exists(dir / "run"));
  const Output o = good(stage("reward dpo", dir / "run", flags + " --bad-lines skip"));
  CHECK(contains(o.text, "left out 2 of "));
  CHECK(contains(o.text, "data.jsonl:2: not JSON"));
  CHECK(contains(o.text, "data.jsonl:3: chosen: found a number"));
  CHECK(metrics(dir / "run", "left_out").at(0).at("left_out") == Json{{"bad line", 2}});
}

TEST_CASE("--map and the shapes of other programs train the same model") {
  const TempDir dir;
  std::vector<std::string> mapped, ultra, hh, compared;
  for (const Line& l : lines_of("pairs.jsonl")) {
    const auto message = [](const char* role, const std::string& content) {
      return Json{{"role", role}, {"content", content}};
    };
    const auto whole = [&](const std::string& answer) {
      return Json::array({message("user", l.prompt), message("assistant", answer)});
    };
    mapped.push_back(
        Json{{"data", {{"ask", l.prompt}}}, {"good", l.chosen}, {"bad", l.rejected}}.dump());
    ultra.push_back(Json{
        {"prompt", l.prompt},
        {"chosen", whole(l.chosen)},
        {"rejected", whole(l.rejected)},
        {"messages", whole(l.chosen)},
        {"score_chosen", 8},
        {"score_rejected",
         4}}.dump());
    const std::string human = "\n\nHuman: " + l.prompt + "\n\nAssistant: ";
    hh.push_back(Json{{"chosen", human + l.chosen}, {"rejected", human + l.rejected}}.dump());
    compared.push_back(Json{{"model_a", "m"},
                            {"model_b", "n"},
                            {"winner", "model_a"},
                            {"conversation_a", whole(l.chosen)},
                            {"conversation_b", whole(l.rejected)}}
                           .dump());
  }
  const std::string flags = "--steps 3 --batch 8 --data ", one = dir / "one";
  good(stage("reward dpo", one, "--as-chat " + flags + file("pairs.jsonl")));
  const auto same = [&](const std::string& name, const std::vector<std::string>& lines,
                        const std::string& more) {
    const std::string out = dir / name;
    good(stage("reward dpo", out, flags + write_lines(dir / (name + ".jsonl"), lines) + more));
    CHECK_MESSAGE(model_bytes(out) == model_bytes(one), name);
  };
  same("mapped", mapped, " --map prompt=data.ask --map chosen=good --map rejected=bad --as-chat");
  same("ultra", ultra, "");
  same("hh", hh, "");
  same("arena", compared, "");
  // Scores are margins where they are asked for: a difference of 4, a quarter each.
  const std::string scores = "--steps 2 --batch 8 --data " + (dir / "ultra.jsonl").string();
  good(stage("reward train", dir / "by_scores", scores + " --score-margin .25"));
  good(stage("reward train", dir / "by_flag", scores + " --margin 1"));
  good(stage("reward train", dir / "without", scores));
  CHECK(model_bytes(dir / "by_scores") == model_bytes(dir / "by_flag"));
  CHECK(model_bytes(dir / "by_scores") != model_bytes(dir / "without"));
}

TEST_CASE("a tokenizer without chat tokens reads transcripts as texts, for DPO and KTO") {
  const TempDir dir;
  const std::string human = R"(\n\nHuman: hi there\n\nAssistant: )";
  const std::string data = write_lines(
      dir / "hh.jsonl", {R"({"chosen":")" + human + R"(yes","rejected":")" + human + R"(no"})",
                         R"({"prompt":"a b","chosen":"yes","rejected":"no"})"});
  const std::string run =
      "./reward dpo --model test/golden/eval_model --steps 1 --batch 2 "
      "--val-fraction 0 --data " +
      data + " -o ";
  good(run + (dir / "dpo").string());
  good(run + (dir / "kto").string() + " --loss kto");
  const Tokenizer t = Tokenizer::load("test/golden/eval_model");
  const auto policy = load("test/golden/eval_model", load_config("test/golden/eval_model"));
  const std::string prompt = "\n\nHuman: hi there\n\nAssistant:";
  const double sum = logp_of(*policy, document(t, prompt, " yes"), document(t, prompt).size() - 1) +
                     logp_of(*policy, document(t, "a b", "yes"), document(t, "a b").size() - 1);
  const double found = metrics(dir / "dpo", "logp_chosen").at(0).at("logp_chosen");
  CHECK(std::abs(found - sum / 2) < 1e-6);
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
  const Rendered r = chatml(t, {{{"user", "ask", {}},
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

TEST_CASE(
    "score reads every shape, keeps what is beside the answers, and leaves out what is empty") {
  const TempDir dir;
  good(stage("reward train", dir / "run",
             "--data " + file("pairs.jsonl") + " --as-chat --steps 2 --batch 8"));
  const std::string chat = R"([{"role":"user","content":"ask 1"}])";
  const std::string data = write_lines(
      dir / "data.jsonl",
      {R"({"prompt":)" + chat + R"(,"chosen":"yes","rejected":"no","id":92233720368547758423})",
       R"({"prompt":)" + chat + R"(,"responses":["yes","no","yes"],"x":NaN})",
       R"({"prompt":)" + chat + R"(,"completion":"yes","label":true,"score":7})",
       R"({"chosen":"\n\nHuman: ask 1\n\nAssistant: yes","rejected":"\n\nHuman: ask 1\n\nAssistant: no"})",
       R"({"prompt":)" + chat + R"(,"chosen":"yes","rejected":""})",
       R"({"prompt":)" + chat + R"(,"chosen":"yes","rejected":"yes"})"});
  const std::string out = dir / "out.jsonl";
  const Output o =
      good("./reward score " + (dir / "run").string() + " --data " + data + " -o " + out);
  std::vector<std::string> lines;
  std::istringstream in(read_file(out));
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  REQUIRE(lines.size() == 6);
  CHECK(contains(lines[0], R"("id": 92233720368547758423, "scores": [)"));
  CHECK(contains(lines[1], R"("x": NaN, "scores": [)"));
  const double yes = Json::parse(lines[2]).at("score");
  CHECK(yes != 7);
  for (const size_t i : {0u, 3u}) {
    const Json scores = Json::parse(lines[i]).at("scores");
    CHECK(scores.at(0).get<double>() == doctest::Approx(yes));
    CHECK(scores.at(1).get<double>() != scores.at(0).get<double>());
  }
  CHECK(Json::parse(lines[4]).at("scores").is_null());
  CHECK(Json::parse(lines[5]).at("scores").size() == 2);
  CHECK(contains(o.text, "left out 1 of 6 records: empty answer\n"));
  CHECK(contains(o.text, "3 texts, accuracy"));
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
  CHECK(a[1].at("score").get<double>() == expected(document(t, "yes", " or no")));
  CHECK(a[2].at("score").get<double>() == expected(document(t, "yes")));
  CHECK(a[3].at("score").is_null());
  CHECK(contains(answers.text, "left out 1 of 4 records: too long"));
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
  const size_t prompt = chatml(t, {{{"user", line.prompt, {}}}, {}}, true).ids.size();
  const double expected = .3 * (logp_of(*policy, ids, prompt) - logp_of(*reference, ids, prompt));
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

// The lines of metrics.jsonl without what the clock decides.
std::string timeless(const std::filesystem::path& run) {
  std::string text;
  for (Json line : json_lines(run / "metrics.jsonl")) {
    for (const char* key : {"seconds", "tokens_per_second", "peak_share"}) line.erase(key);
    text += line.dump() + "\n";
  }
  return text;
}

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
    CHECK(timeless(out) == timeless(one));
    CHECK(contains(shell(concat("./", command, " --resume -o ", out)).text, "is finished"));
  }
}

TEST_CASE("a preference run ended at any change of the disk goes on to the same bytes") {
  for (const std::string command : {"reward train", "reward dpo --lora 2"}) {
    const TempDir dir;
    const std::string name = command.substr(0, command.find(" --"));
    end_at_every_change(dir.path(), "./" + name + " --resume -o", [&](const std::string& out) {
      return stage(
          command, out,
          "--data " + file("pairs.jsonl") + " --as-chat --steps 3 --batch 8 --save-every 1");
    });
  }
}

TEST_CASE("a resumed preference run takes another budget, and no other flag") {
  const TempDir dir;
  const std::string pairs = "--data " + file("pairs.jsonl") + " --as-chat --batch 8 ";
  for (const std::string command : {"reward train", "reward dpo"}) {
    CAPTURE(command);
    const std::string out = dir / command.substr(7),
                      resume = "./" + command + " --resume -o " + out;
    good(stage(command, out, pairs + "--steps 6 --lr .001"));
    const std::string before = model_bytes(out);
    CHECK(contains(good(resume).text, "is finished: 6 steps"));
    for (const std::string flags :
         {"--lr .002", "--seed 2", "--batch 16", "--schedule linear", "--data x.jsonl", "--limit 9",
          "--context 50", "--val-fraction .3"}) {
      const Output o = shell(resume + " " + flags);
      CHECK(o.status == 1);
      CHECK_MESSAGE(contains(o.text, flags.substr(0, flags.find(' ')) + ": found "), o.text);
    }
    CHECK(contains(shell(resume + " --steps 5").text, "expected at least the 6 that are done"));
    CHECK(model_bytes(out) == before);
    const Output more = good(resume + " --steps 12 --eval-every 3");
    CHECK(contains(more.text, "resumes after step 6 of 12"));
    CHECK(contains(more.text, "the learning rate rises from "));
    CHECK(read_json(out + "/summary.json").at("steps") == 12);
    CHECK(metrics(out, "grad_norm").size() == 12);
    CHECK(contains(more.text, "step 9  held"));
  }
}

TEST_CASE("a resumed preference run knows its files, that of --normalize-on too") {
  const TempDir dir;
  const std::string out = dir / "run", pairs = dir / "pairs.jsonl", val = dir / "val.jsonl",
                    answers = dir / "answers.jsonl";
  std::filesystem::copy(world() / "pairs.jsonl", pairs);
  std::filesystem::copy(world() / "shuffled.jsonl", val);
  write_file(answers, "{\"text\":\"yes\"}\n{\"text\":\"no\"}\n");
  good(stage("reward train", out,
             "--as-chat --steps 2 --batch 8 --data " + pairs + " --val " + val +
                 " --normalize-on " + answers));
  const std::string resume = "./reward train --resume --steps 3 -o " + out;
  for (const std::string& path : {pairs, val, answers}) {
    const std::string before = read_file(path);
    write_file(path, before.substr(0, before.find('\n') + 1) + before);
    const Output o = shell(resume);
    CHECK(o.status == 1);
    CHECK_MESSAGE(contains(o.text, path + ": found other preferences than"), o.text);
    write_file(path, before);
  }
  good(resume);
}

TEST_CASE("a signal while a preference run reads its data stops it, and nothing is written") {
  const TempDir dir;
  const std::string pipe = dir / "pipe", run = dir / "run";
  const Output o =
      shell("mkfifo " + pipe + "; " + stage("reward dpo", run, "--as-chat --data " + pipe) +
            " & child=$!; exec 3>" + pipe + "; kill -TERM $child; cat " + file("pairs.jsonl") +
            " >&3; exec 3>&-; wait $child");
  CHECK(o.status == 128 + SIGTERM);
  CHECK_MESSAGE(contains(o.text, "stopped before the first step: nothing was written"), o.text);
  CHECK(!std::filesystem::exists(run));
}

TEST_CASE("--dry-run prints the plan of a preference run, and writes nothing") {
  const TempDir dir;
  for (const std::string command : {"reward train", "reward dpo", "reward train --folds 2"}) {
    const Output o =
        good(stage(command, dir / "run", "--as-chat --dry-run --data " + file("pairs.jsonl")));
    CHECK(contains(o.text, "budget  "));
    CHECK(!std::filesystem::exists(dir / "run"));
  }
}

TEST_CASE("a finished reward model that goes on begins with the scores before normalization") {
  const TempDir dir;
  const std::string out = dir / "run", resume = "./reward train --resume -o " + out;
  good(stage("reward train", out,
             "--data " + file("pairs.jsonl") +
                 " --as-chat --val-fraction .3 --batch 8 --steps 12 --lr .003"));
  const Json finished = read_json(out + "/summary.json");
  CHECK(finished.at("normalised_from").at("std").get<double>() > 1.5);
  good(resume + " --steps 13 --eval-every 12");
  const Json again = metrics(out, "val_loss").back();
  std::vector<double> margins;
  for (const Json& line : metrics(out, "val_margin")) margins.push_back(line.at("val_margin"));
  // Of step 12, evaluated again at the start: as at the end before.
  CHECK(margins.back() == doctest::Approx(finished.at("margin").get<double>()).epsilon(1e-4));
}

TEST_CASE("metrics of preference runs have kinds, the learning rate, and the speed") {
  const TempDir dir;
  for (const std::string command : {"reward train", "reward dpo"}) {
    const auto out = dir / command.substr(7);
    good(stage(command, out, "--data " + file("pairs.jsonl") + " --as-chat --steps 4 --lr .001"));
    std::map<std::string, int> kinds;
    for (const Json& line : json_lines(out / "metrics.jsonl")) {
      kinds[line.at("kind")]++;
      if (line.at("kind") != "step") continue;
      for (const char* key : {"loss", "grad_norm", "lr", "seconds", "tokens", "tokens_per_second"})
        CHECK_MESSAGE(line.at(key).is_number(), key);
      CHECK(line.at("lr").get<double>() > 0);
      CHECK(line.at("lr").get<double>() <= .001);
    }
    CHECK(kinds == std::map<std::string, int>{{"data", 1}, {"step", 4}, {"eval", 4}, {"final", 1}});
  }
}

TEST_CASE("folds go on where they were killed, and --overwrite begins them anew") {
  const TempDir dir;
  const std::string out = dir / "run", one = dir / "one",
                    flags = "--data " + file("pairs.jsonl") +
                            " --as-chat --folds 2 --batch 8 --save-every 5 --steps ";
  good(stage("reward train", one, flags + "40"));
  int status = 0;
  REQUIRE(
      interrupt(stage("reward train", out, flags + "40"), out + "/fold-2", 12, SIGKILL, &status));
  CHECK(contains(shell(stage("reward train", out, flags + "40")).text, "--resume goes on with it"));
  const Output rest = good(stage("reward train", out, flags + "40 --resume"));
  CHECK(contains(rest.text, "is finished"));
  CHECK(contains(rest.text, "resumes after step "));
  CHECK(model_bytes(out + "/fold-2") == model_bytes(one + "/fold-2"));
  CHECK(read_file(out + "/summary.json") == read_file(one + "/summary.json"));
  // Finished folds take another budget, each from its scores before normalization.
  const Output more = good(stage("reward train", out, flags + "42 --resume"));
  CHECK(contains(more.text, "resumes after step 40 of 42"));
  CHECK(read_json(out + "/fold-1/summary.json").at("steps") == 42);
  const Output anew = good(stage("reward train", out, flags + "40 --overwrite"));
  CHECK(!contains(anew.text, "is finished"));
  CHECK(read_file(out + "/summary.json") == read_file(one + "/summary.json"));
}

// ---------------------------------------------------------------------------------------------
// Bad input

TEST_CASE("a reference of another vocabulary, or with too short a context, is refused") {
  const TempDir dir;
  const std::string data = "--as-chat --data " + file("pairs.jsonl");
  const auto refused = [&](const std::string& reference) {
    const Output o = shell(stage("reward dpo", dir / "run", data + " --reference " + reference));
    CHECK(o.status == 1);
    CHECK(!std::filesystem::exists(dir / "run"));
    return o.text;
  };
  CHECK(contains(refused("test/golden/eval_model"), "found another vocabulary (310 tokens)"));
  std::filesystem::copy(world() / "model", dir / "short", std::filesystem::copy_options::recursive);
  Json config = read_json(dir / "short/config.json");
  config["max_position_embeddings"] = 8;
  write_file(dir / "short/config.json", config.dump());
  CHECK(contains(refused(dir / "short"), "found a context of 8, and an answer of "));
}

TEST_CASE("a run of preferences never writes over what it reads") {
  const TempDir dir;
  const std::string inside = dir / "inside";
  std::filesystem::create_directories(inside);
  std::filesystem::copy(world() / "pairs.jsonl", inside + "/pairs.jsonl");
  const std::string flags = "--as-chat --steps 1 --batch 8 --overwrite --data ";
  for (const std::string command : {"reward train", "reward dpo", "reward train --folds 2"}) {
    const Output o = shell(stage(command, inside, flags + inside + "/pairs.jsonl"));
    CHECK(o.status == 1);
    CHECK_MESSAGE(contains(o.text, "which the run reads"), o.text);
    CHECK(read_file(inside + "/pairs.jsonl") == read_file(world() / "pairs.jsonl"));
  }
  const Output o = shell(stage("reward train", inside,
                               flags + file("pairs.jsonl") + " --normalize-on " + inside + "/x"));
  CHECK_MESSAGE(contains(o.text, "which the run reads"), o.text);
}

TEST_CASE("a damaged trainer_state.json of a preference run is named") {
  const TempDir dir;
  const std::string out = dir / "run", state = out + "/model/trainer_state.json";
  good(stage("reward dpo", out, "--data " + file("pairs.jsonl") + " --as-chat --steps 1"));
  const Json saved = read_json(state);
  const auto named = [&](const std::string& command) {
    const Output o = shell(command);
    CHECK(o.status == 1);
    CHECK_MESSAGE(contains(o.text, "trainer_state.json: "), o.text);
    CHECK_MESSAGE(!contains(o.text, "json.exception"), o.text);
  };
  const std::string resume = "./reward dpo --resume -o " + out,
                    score = "./reward score " + out + " -o " + (dir / "s").string() + " --data " +
                            file("pairs.jsonl");
  Json bad = saved;
  bad["settings"] = 3;
  write_file(state, bad.dump());
  named(resume), named(score);
  bad = saved, bad["settings"]["common"] = "x";
  write_file(state, bad.dump());
  named(resume);
  bad = saved, bad.erase("reference");
  write_file(state, bad.dump());
  named(score), named(resume + " --steps 2");
  bad = saved, bad["data_hash"] = "x";
  write_file(state, bad.dump());
  named(resume + " --steps 2");
}

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
                 "equal.jsonl: found no record to use: 1 equal answers ("));
  CHECK(contains(error(stage("reward train", out, "--data " + (dir / "tied.jsonl").string())),
                 "tied.jsonl: found no record to use: 1 tie ("));
  CHECK(contains(error(stage("reward train", out, "--data " + (dir / "empty.jsonl").string())),
                 "empty.jsonl: found an empty file"));
  CHECK(contains(error(stage("reward train", out, data + "--context 500")), "to the model's 96"));
  CHECK(contains(error(stage("reward train", out, data + "--context 3")),
                 "pairs.jsonl: found no record to use: 160 too long ("));
  CHECK(contains(error(stage("reward train", out, data + "--folds 1")), "expected 2 to 100"));
  CHECK(contains(error(stage("reward train", out, data + "--val-fraction 1")), "less than 1"));
  CHECK(contains(error(stage("reward train", out, data + "--schedule wild")), "linear, cosine"));
  CHECK(contains(error(stage("reward train", out, data + "--resume --overwrite")), "expected one"));
  CHECK(contains(error(stage("reward train", world() / "tokenizer", data)),
                 "--resume goes on with it"));
  CHECK(contains(error(stage("reward dpo", out, data + "--loss what")), "dpo, ipo, kto or orpo"));
  CHECK(contains(error(stage("reward dpo", out, data + "--beta 0")), "expected above 0"));
  CHECK(contains(error(stage("reward dpo", out, data + "--label-smoothing .5")), "less than .5"));
  CHECK(contains(error(stage("reward dpo", out, "--data " + file("labels.jsonl"))),
                 "labels.jsonl:1: found a labelled text, and --loss dpo learns from pairs"));
  CHECK(
      contains(error(stage("reward dpo", out, "--loss kto --data " + file("labels.jsonl"))),
               R"(labels.jsonl:1: found a labelled text, expected a "prompt" and a "completion")"));
  const std::string kto =
      write_lines(dir / "kto.jsonl", {R"({"prompt":"a","completion":"b","label":true})"});
  for (const std::string loss : {"dpo", "ipo", "orpo"}) {
    CHECK(contains(error(stage("reward dpo", out, "--loss " + loss + " --data " + kto)),
                   "kto.jsonl:1: found a labelled answer, and --loss " + loss +
                       " learns from pairs: --loss kto takes labelled answers"));
  }
  CHECK(contains(error(stage("reward dpo", out, data + "--desirable-weight 2")),
                 "--desirable-weight: found with --loss dpo, expected --loss kto"));
  CHECK(contains(error(stage("reward dpo", out, data + "--loss kto --undesirable-weight 0")),
                 "--undesirable-weight: found 0, expected above 0"));
  CHECK(contains(error(stage("reward train", out, data + "--score-margin nan")),
                 "--score-margin: found nan"));
  const std::string texts =
      write_lines(dir / "texts.jsonl", {R"({"chosen":"it is a","rejected":"it is b"})"});
  CHECK(contains(error(stage("reward dpo", out, "--as-chat --data " + texts)),
                 R"(texts.jsonl:1: found texts without a "prompt", expected one for --as-chat)"));
  CHECK(contains(error(stage("reward dpo", out, data + "--bad-lines maybe")),
                 "--bad-lines: found \"maybe\", expected stop or skip"));
  CHECK(contains(error(stage("reward dpo", out, data + "--val-fraction -.5")), "found -0.5"));
  write_file(dir / "same.jsonl", R"({"text":"yes"})"
                                 "\n"
                                 R"({"text":"yes"})");
  CHECK(contains(
      error(stage("reward train", out, data + "--normalize-on " + (dir / "same.jsonl").string())),
      "found 2 answers that are all the same"));
  CHECK(contains(error(stage("reward train", out, data + "--margin inf")), "--margin: found inf"));
  CHECK(contains(error(stage("reward train", out, data + "--lr -1")), "--lr: found -1"));
  CHECK(contains(error(stage("reward train", out, data + "--limit -1")), "--limit: found -1"));
  CHECK(contains(error(stage("reward dpo", out, data + "--eval-every -1")), "--eval-every: found"));
  CHECK(contains(error(stage("reward dpo", out, data + "--lora 2 --lora-alpha 0")),
                 "--lora-alpha: found 0"));
  CHECK(contains(error("./reward score"), "MODEL: missing"));
  CHECK(contains(error("./reward score " + file("model")), "--data: missing"));
  CHECK(contains(error("./reward score " + file("model") + " " + data), "-o: missing"));
  CHECK(!std::filesystem::exists(dir / "run"));
}
