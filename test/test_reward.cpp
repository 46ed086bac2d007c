// Learning from preferences, as the user of ./rlhf meets it: reading them, reward models, DPO, best
// of n, over-optimisation. The objectives themselves are tested in test_rlhf.cpp.
#include <doctest/doctest.h>

#include <cmath>
#include <sstream>

#include "cake/checkpoint.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/schedule.h"
#include "cake/tokenizer.h"
#include "test/support.h"

using namespace cake;

namespace {

// ---------------------------------------------------------------------------------------------
// A small world: 40 prompts, answers that are good ("yes ...") or bad ("no ..."), some longer

const std::filesystem::path& world() {
  static const TempDir dir;
  static const std::filesystem::path path = [] {
    std::string text;
    for (int i = 0; i < 200; i++) text += "the user asks, the assistant says yes or no, 1 2 3 4.\n";
    write_file(dir / "text.txt", text);
    const Tokenizer t = train_tokenizer({.inputs = {(dir / "text.txt").string()}}, 300, "qwen2");
    std::filesystem::create_directories(dir / "tokenizer");
    t.save(dir / "tokenizer");
    Config c = new_config(Family::qwen3, 2, 32, t.vocab_size(), 96);
    c.HS = 16, c.NH = 2, c.NKV = 1;
    const auto gpt = make_gpt(c, {.device = Device::cpu});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      Tensor tensor = gpt->table().tensors[i];
      if (tensor.init_std < .05 && !tensor.init_one) tensor.init_std = .05;
      gpt->write(int(i), Slot::weight, initial_values(tensor, 5));
    }
    save_checkpoint(dir / "model", *gpt, {.tokenizer_from = dir / "tokenizer"});

    std::string pairs, shuffled, rankings, labels, prompts;
    for (int i = 0; i < 160; i++) {
      const std::string asked = concat("ask ", i / 4);  // four pairs a problem
      const std::string good = concat("yes ", i % 5, i % 4 == 0 ? " and more, and more" : "");
      const std::string bad = concat("no ", i % 3, i % 4 == 1 ? " and more" : " ok");
      const auto pair = [&](const std::string& chosen, const std::string& rejected) {
        return Json{{"prompt", asked}, {"chosen", chosen}, {"rejected", rejected}}.dump() + "\n";
      };
      pairs += pair(good, bad);
      shuffled += mix64(uint64_t(i)) % 2 ? pair(good, bad) : pair(bad, good);
      const Json messages = Json::array({{{"role", "user"}, {"content", asked}}});
      rankings += Json{{"prompt", messages},
                       {"responses", {bad, good, "no no", concat("yes, ", i % 7)}},
                       {"ranking", {2, 1, 2, 1}}}
                      .dump() +
                  "\n";
      labels += Json{{"text", i % 2 ? good : bad}, {"label", i % 2 ? "pos" : "neg"}}.dump() + "\n";
      if (i < 24) {
        prompts += Json{{"messages", messages},
                        {"rubric",
                         {{{"kind", "mentions"}, {"words", {"yes"}}, {"weight", 1}},
                          {{"kind", "varied"}, {"weight", 1}}}}}
                       .dump() +
                   "\n";
      }
    }
    write_file(dir / "pairs.jsonl", pairs);
    write_file(dir / "shuffled.jsonl", shuffled);
    write_file(dir / "rankings.jsonl", rankings);
    write_file(dir / "labels.jsonl", labels);
    write_file(dir / "prompts.jsonl", prompts);
    return dir.path();
  }();
  return path;
}

std::string file(const std::string& name) { return (world() / name).string(); }

std::string rlhf(const std::string& command, const std::filesystem::path& out,
                 const std::string& flags) {
  return concat("./rlhf ", command, " --model ", file("model"), " -o ", out.string(), " ", flags);
}

Output good(const std::string& command) {
  const Output o = shell(command);
  REQUIRE_MESSAGE(o.status == 0, o.text);
  return o;
}

// The lines of metrics.jsonl that have `key`.
std::vector<Json> metrics(const std::filesystem::path& run, const std::string& key) {
  std::vector<Json> found;
  std::istringstream lines(read_file(run / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line);
    if (json.contains(key)) found.push_back(json);
  }
  return found;
}

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
  good(rlhf("reward", dir / "run",
            "--data " + file("pairs.jsonl") +
                " --as-chat --val-fraction 0 --steps 1 --batch 160 "
                "--micro-batch-tokens 200 --normalise-on none --seed 3"));
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
  const Output o = good(rlhf("reward", dir / "run",
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
  good(rlhf(
      "reward", dir / "run",
      "--data " + file("shuffled.jsonl") + " --as-chat --val-fraction .4 --epochs 2 --batch 8"));
  const double accuracy = read_json(dir / "run/summary.json").at("accuracy");
  CHECK(std::abs(accuracy - .5) < .25);  // about 64 pairs: four standard deviations
}

TEST_CASE("rankings with ties and labelled texts are learned") {
  const TempDir dir;
  good(rlhf("reward", dir / "ranked",
            "--data " + file("rankings.jsonl") +
                " --epochs 3 --batch 8 --lr .003 --margin .1 "
                "--centring .01"));
  const Json ranked = read_json(dir / "ranked/summary.json");
  CHECK(ranked.at("accuracy").get<double>() > .95);
  CHECK(ranked.at("pairs").get<int>() == 4 * ranked.at("held_out").get<int>());  // two of six tie
  const Output o = good(rlhf("reward", dir / "labels",
                             "--data " + file("labels.jsonl") + " --epochs 4 --batch 8 --lr .003"));
  const Json labels = read_json(dir / "labels/summary.json");
  CHECK(labels.at("accuracy").get<double>() > .95);
  CHECK(!labels.contains("longer_wins"));
}

TEST_CASE("folds judge every pair once") {
  const TempDir dir;
  good(rlhf("reward", dir / "run",
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
    good(rlhf("dpo", out,
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
  good(rlhf(
      "dpo", dir / "run",
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
    const Output o = good(rlhf(
        "dpo", out, concat("--data ", file("rankings.jsonl"), " --epochs 2 --batch 8 ", flags)));
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
      rlhf("dpo", out,
           "--data " + file("pairs.jsonl") + " --as-chat --steps 200 --batch 8 --reference " +
               (dir / "reference").string()),
      out, 5, SIGTERM, &status));
  const auto gpt = load(dir / "reference", load_config(dir / "reference"));
  std::vector<float> w(size_t(gpt->table().tensors[0].size()), .1f);
  gpt->write(0, Slot::weight, w);
  save_checkpoint(dir / "reference", *gpt, {.tokenizer_from = world() / "tokenizer"});
  const Output o = shell("./rlhf dpo --resume -o " + out);
  CHECK(o.status == 1);
  CHECK(contains(o.text, "it has changed"));
}

// ---------------------------------------------------------------------------------------------
// Best of n

TEST_CASE("the best of n: means over all subsets, the exact bound, answers for fine-tuning") {
  const TempDir dir;
  const std::string written = dir / "answers.jsonl";
  good(rlhf("best-of-n", dir / "run",
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
    CHECK(parse_conversation(object, lines.where()).messages.back().role == "assistant");
  }
  CHECK(conversations == fit);
}

// ---------------------------------------------------------------------------------------------
// Going on

TEST_CASE("a run over preferences killed at any moment and resumed equals one that never stopped") {
  const TempDir dir;
  const std::string pairs = "--data " + file("pairs.jsonl") + " --as-chat --steps 60 --batch 8 ";
  const std::pair<std::string, std::string> runs[] = {{"reward", pairs},
                                                      {"dpo", pairs},
                                                      {"dpo", pairs + "--loss kto"},
                                                      {"dpo", pairs + "--lora 2"}};
  int number = 0;
  for (const auto& run : runs) {
    const std::string &stage = run.first, &flags = run.second;
    CAPTURE(flags);
    const std::string out = dir / concat("killed_", ++number), one = dir / concat("one_", number);
    good(rlhf(stage, one, flags));
    int status = 0;
    REQUIRE(interrupt(rlhf(stage, out, flags + " --save-every 7"), out, 20, SIGKILL, &status));
    REQUIRE(interrupt(concat("./rlhf ", stage, " --resume -o ", out), out, 40, SIGTERM, &status));
    CHECK(WEXITSTATUS(status) == 128 + SIGTERM);
    const Output rest = good(concat("./rlhf ", stage, " --resume -o ", out));
    CHECK(contains(rest.text, "resumes after step "));
    CHECK(model_bytes(out) == model_bytes(one));
    CHECK(read_file(out + "/metrics.jsonl") == read_file(one + "/metrics.jsonl"));
    CHECK(contains(shell(concat("./rlhf ", stage, " --resume -o ", out)).text, "is finished"));
  }
}

TEST_CASE("best of n killed and resumed writes what one that never stopped writes") {
  const TempDir dir;
  const std::string flags =
      "--prompts " + file("prompts.jsonl") + " --reward ended --n 8 --max-tokens 40";
  good(rlhf("best-of-n", dir / "one", flags));
  int status = 0;
  const std::string out = dir / "killed";
  REQUIRE(interrupt(rlhf("best-of-n", out, flags), out, 1, SIGKILL, &status));
  good("./rlhf best-of-n --resume -o " + out);
  CHECK(read_file(dir / "killed/metrics.jsonl") == read_file(dir / "one/metrics.jsonl"));
  CHECK(read_file(dir / "killed/summary.json") == read_file(dir / "one/summary.json"));
}

// ---------------------------------------------------------------------------------------------
// Over-optimisation

TEST_CASE("over-optimisation records proxy and gold under both pressures, and draws them") {
  const TempDir dir;
  const std::string out = dir / "run";
  const Output o = good(rlhf("overoptimize", out,
                             concat("--data ", file("rankings.jsonl"), " --prompts ",
                                    file("prompts.jsonl"), " --val ", file("prompts.jsonl"),
                                    " --sizes 8 32 --steps 4 --points 4 --rollouts 8 --n 4 "
                                    "--max-tokens 12 --val-prompts 6 --reward-epochs 1")));
  const Json summary = read_json(dir / "run/summary.json");
  REQUIRE(summary.at("curves").size() == 4);
  for (const Json& curve : summary.at("curves")) {
    const bool ppo = curve.at("pressure") == "ppo";
    CHECK(curve.at("points").size() == (ppo ? 5 : 3));  // n = 1, 2, 4
    CHECK(curve.at("points").at(0).at("sqrt_kl") == 0);
  }
  // The best of more answers has a higher proxy, always.
  const Json& points = summary.at("curves").at(0).at("points");
  CHECK(points.at(2).at("proxy").get<double>() > points.at(0).at("proxy").get<double>());
  CHECK(summary.at("answers").size() == 6);
  const std::string svg = read_file(dir / "run/overoptimization.svg");
  CHECK(svg.substr(0, 4) == "<svg");
  CHECK(contains(svg, "</svg>"));
  CHECK(contains(o.text, "gold = d ("));
}

// ---------------------------------------------------------------------------------------------
// Bad input

TEST_CASE("./rlhf says in one line what is wrong with preferences and flags") {
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
  CHECK(contains(error(rlhf("reward", out, "")), "--data: missing"));
  CHECK(contains(error("./rlhf reward --data x -o " + out), "--model: missing"));
  CHECK(contains(error("./rlhf reward --model x"), "-o: missing"));
  CHECK(contains(error(rlhf("reward", out, "--data " + (dir / "equal.jsonl").string())),
                 "equal.jsonl:1: found the same answer twice"));
  CHECK(contains(error(rlhf("reward", out, "--data " + (dir / "tied.jsonl").string())),
                 "1 with all answers tied"));
  CHECK(contains(error(rlhf("reward", out, "--data " + (dir / "empty.jsonl").string())),
                 "found no preferences"));
  CHECK(contains(error(rlhf("reward", out, data + "--context 500")), "to the model's 96"));
  CHECK(contains(error(rlhf("reward", out, data + "--context 3")), "longer than the context of 3"));
  CHECK(contains(error(rlhf("reward", out, data + "--folds 1")), "expected 2 to 100"));
  CHECK(contains(error(rlhf("reward", out, data + "--val-fraction 1")), "less than 1"));
  CHECK(contains(error(rlhf("reward", out, data + "--schedule wild")), "linear, cosine"));
  CHECK(contains(error(rlhf("reward", out, data + "--resume --overwrite")), "expected one"));
  CHECK(contains(error(rlhf("reward", world() / "model", data)), "--resume goes on with it"));
  CHECK(contains(error(rlhf("dpo", out, data + "--loss what")), "dpo, ipo, kto or orpo"));
  CHECK(contains(error(rlhf("dpo", out, data + "--beta 0")), "expected above 0"));
  CHECK(contains(error(rlhf("dpo", out, data + "--label-smoothing .5")), "less than .5"));
  CHECK(contains(error(rlhf("dpo", out, "--data " + file("labels.jsonl"))), "a labelled text"));
  CHECK(contains(error(rlhf("best-of-n", out, "--prompts " + file("prompts.jsonl"))),
                 "--reward: missing"));
  CHECK(contains(error(rlhf("best-of-n", out, "--reward ended")), "--prompts: missing"));
  CHECK(contains(error(rlhf("overoptimize", out, data)), "--prompts: missing"));
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
  const Output o = shell(rlhf("best-of-n", dir / "run",
                              "--prompts " + file("prompts.jsonl") +
                                  " --max-tokens 12 --reward model:" + (dir / "reward").string()));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "found another vocabulary"), o.text);
}
