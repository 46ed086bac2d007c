// Learning from rollouts: rollouts and their masks, PPO and GRPO on problems small enough to know
// what must come of them, and ./rlhf as its user meets it.
#include <fstream>
#include <sstream>

#pragma GCC diagnostic ignored "-Wunused-function"
#define main cake_rlhf_main_of_test_rl
#include "rlhf.cpp"
#undef main
#include "test/chatml.h"
#include "test/scripted_model.h"
#include "test/support.h"

using namespace cake;

namespace {
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
}

TEST_CASE("rewards are named with weights and arguments") {
  const RewardSpec plain = parse_reward("number"), weighted = parse_reward("-.5*length:40"),
                   command = parse_reward("command:awk '{print 2*3}'");
  CHECK(plain.name == "number");
  CHECK(plain.weight == 1);
  CHECK(weighted.name == "length");
  CHECK(weighted.argument == "40");
  CHECK(weighted.weight == -.5);
  CHECK(command.argument == "awk '{print 2*3}'");
  CHECK(command.weight == 1);
  CHECK(contains(error_of([] { parse_reward("x*number"); }), "expected a number"));
}

// ---------------------------------------------------------------------------------------------
// Rollouts

TEST_CASE("an evaluation of some prompts takes them from all over the file") {
  const std::vector<Prompt> prompts(10);
  const auto places = [&](size_t count) {
    std::vector<int64_t> of;
    for (const Prompt* p : some_of(prompts, count)) of.push_back(p - prompts.data());
    return of;
  };
  CHECK(places(4) == std::vector<int64_t>{0, 2, 5, 7});
  CHECK(places(1) == std::vector<int64_t>{0});
  CHECK(places(10) == places(0));
  CHECK(places(99).back() == 9);
  CHECK(some_of({}, 3).empty());
}

TEST_CASE("what a tool inserts is read and never learned from") {
  ScriptedModel script;
  const Tokenizer& t = script.tokenizer();
  Conversation chat{{{"user", "What is 6*7?", {}}}, {kCalculatorTool}};
  Prompt p;
  const StageTemplate stage(chatml_template(t));
  p.chat = chat, p.ids = chatml(t, chat, true).ids, p.tools = true;
  const std::string call = R"(<tool_call>
{"name": "calculator", "arguments": {"expression": "6*7"}}
</tool_call><|im_end|>)";
  int at = script.write(int(p.ids.size()), call);
  Conversation reply;
  reply.messages = {{.role = "tool", .content = "42"}};
  std::vector<int> inserted = t.encode("\n");
  const std::vector<int> rest = chatml(t, reply, true).ids;
  inserted.insert(inserted.end(), rest.begin(), rest.end());
  script.write(at + int(inserted.size()), "It is 42.<|im_end|>");
  const std::filesystem::path dir = script.save();
  Models models{make_gpt(load_config(dir), {.device = Device::cpu})};
  load_weights(dir, *models.policy);

  const Prompt* prompts[] = {&p};
  // At this temperature it follows the script.
  const RolloutOptions o{.chat = &stage, .context = script.T(), .temperature = .02f};
  std::vector<Rollout> rollouts = roll_out(models, o, prompts, 1, 1);
  const Rollout& r = rollouts.at(0);
  CHECK(r.text == "It is 42.");
  CHECK(r.ended);
  // The inserted ids stand where they were inserted, and are not the model's.
  const int first = int(p.ids.size() + t.encode(call, true).size());
  CHECK(std::vector<int>(r.ids.begin() + first, r.ids.begin() + first + int(inserted.size())) ==
        inserted);
  CHECK(size_t(r.length) + inserted.size() + p.ids.size() == r.ids.size());
  for (int i = 0; i < int(r.ids.size()); i++) {
    const bool of_tool = i >= first && i < first + int(inserted.size());
    CHECK(r.sampled[size_t(i)] == (i >= int(p.ids.size()) && !of_tool));
  }
  // End to end they are no targets, and what is given to the rollout's tokens does not reach them.
  Experience x = end_to_end(rollouts);
  REQUIRE(x.packed.tokens.size() == r.ids.size() - 1);
  std::vector<float> filled(x.mask.size());
  fill(x, 0, 2, filled);
  for (size_t n = 0; n < x.packed.tokens.size(); n++) {
    CHECK((x.packed.targets[n] >= 0) == r.sampled[n + 1]);
    CHECK(x.mask[n] == (r.sampled[n + 1] ? 1.f : 0.f));
    CHECK(filled[n] == 2 * x.mask[n]);
    if (x.packed.targets[n] >= 0) CHECK(x.packed.targets[n] == r.ids[n + 1]);
  }
  // The generator's log-probabilities are those of a forward pass over the same ids.
  StepSettings s;
  s.temperature = double(o.temperature);
  CHECK(score(*models.policy, x, std::vector{0}, s, models) == x.sampled_logp);
}

TEST_CASE("micro-batches hold whole rollouts, and give their numbers back to the step's places") {
  std::vector<Rollout> rollouts;
  for (int i = 0; i < 4; i++) {
    Rollout r{.group = i};
    for (int k = 0; k < 3 + i; k++) {
      r.ids.push_back(10 * i + k), r.sampled.push_back(k > 1), r.logp.push_back(float(-k));
    }
    rollouts.push_back(r);
  }
  const Experience x = end_to_end(rollouts);  // 2, 3, 4 and 5 positions
  CHECK(x.packed.positions() == 14);
  const std::vector<Experience> batches = micro_batches(x, std::vector{3, 0, 2}, 7);
  REQUIRE(batches.size() == 2);
  CHECK(batches[0].packed.members == std::vector<int>{3, 0});
  CHECK(batches[0].packed.tokens == std::vector<int>{30, 31, 32, 33, 34, 0, 1});
  CHECK(batches[0].mask == std::vector<float>{0, 1, 1, 1, 1, 0, 1});
  CHECK(batches[0].old_logp.empty());  // it is not there yet
  CHECK(batches[1].packed.doc_starts == std::vector<int>{0, 4});
  std::vector<float> back(14, 7.f);
  for (const Experience& b : batches) copy_back(b, b.sampled_logp, x, back);
  for (size_t n = 0; n < 14; n++) {
    CHECK(back[n] == (n == 2 || n == 3 || n == 4 ? 7.f : x.sampled_logp[n]));  // rollout 1
  }
  CHECK(micro_batches(x, std::vector{3, 3}, 2).size() == 2);  // longer than the limit: alone
}

// ---------------------------------------------------------------------------------------------
// A bandit: one question, and a model that answers a, b, c or d, each as often as another

namespace {

class Bandit {
 public:
  Bandit() : tokenizer_(make_tokenizer(dir_)) {
    Config c = new_config(Family::qwen3, 1, 32, tokenizer_.vocab_size(), 64);
    c.HS = 16, c.NH = c.NKV = 2;
    const auto gpt = make_gpt(c, {.device = Device::cpu});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      Tensor t = gpt->table().tensors[i];
      if (t.kind == Kind::head) t.init_std = .2;  // rows that a block can tell apart
      gpt->write(int(i), Slot::weight, initial_values(t, 5));
    }
    // Taught until it answers in form: the four letters, then the end of turn.
    std::vector<Rollout> taught(4);
    for (int i = 0; i < 4; i++) {
      Rollout& r = taught[size_t(i)];
      r.ids = chatml(tokenizer_, {{{"user", "Go", {}}}, {}}, true).ids;
      r.sampled.resize(r.ids.size());
      tokenizer_.encode(std::string(1, char('a' + i)), r.ids);
      r.ids.push_back(tokenizer_.special("<|im_end|>"));
      r.sampled.resize(r.ids.size(), true), r.logp.resize(r.ids.size());
    }
    const Experience b = end_to_end(taught);
    for (int n = 1; n <= 120; n++) {
      gpt->forward_backward(b.packed.batch(1), b.packed.mean_loss_weights(b.packed.trained));
      OptimizerStep step = optimizer_step({.lr = .01}, n, 1);
      step.lr[size_t(Kind::embedding)] = 0;  // what is learned goes through the block
      gpt->update(step);
    }
    save_checkpoint(dir_ / "model", *gpt, {.tokenizer_from = dir_ / "tokenizer"});
    // Problems whose answer is b, and problems whose answers are drawn by lot.
    std::string same, lots;
    Rng rng{3};
    for (int i = 0; i < 64; i++) {
      same += "{\"question\":\"Go\",\"answer\":\"b\"}\n";
      lots += format("{\"question\":\"Go\",\"answer\":\"%c\"}\n", int('a' + rng.below(4)));
    }
    encode_corpus({.inputs = {dir_ / "text.txt"}}, tokenizer_, dir_ / "tokenizer", dir_ / "shards");
    write_file(dir_ / "same.jsonl", same);
    write_file(dir_ / "lots.jsonl", lots);
  }
  std::string path(const std::string& name) const { return dir_ / name; }
  const Tokenizer& tokenizer() const { return tokenizer_; }

  RlSettings settings(const Algorithm& algorithm) const {
    RlSettings s;
    s.data.model = path("model");
    s.data.prompts = {path("same.jsonl")};
    s.data.val = {path("same.jsonl")};
    s.data.rewards = {"exact"};
    s.step.steps = 20, s.step.rollouts = 64, s.data.max_tokens = 4;
    s.step.optimizer.lr = s.ppo.critic_lr = .004;
    s.evaluation.keep = "last";
    s.evaluation.eval_samples = 4, s.evaluation.eval_every = 1000;
    if (algorithm.name == "ppo") s.data.truncated_reward = -1;
    return s;
  }

 private:
  static Tokenizer make_tokenizer(const TempDir& dir) {
    std::string text;
    for (int i = 0; i < 100; i++) text += "user assistant Go a b c d\n";
    write_file(dir / "text.txt", text);
    const Tokenizer t = train_tokenizer({.inputs = {dir / "text.txt"}}, 280, "qwen2");
    std::filesystem::create_directories(dir / "tokenizer");
    t.save(dir / "tokenizer");
    return t;
  }
  TempDir dir_;
  Tokenizer tokenizer_;
};

const Bandit& bandit() {
  static const Bandit b;
  return b;
}

struct Outcome {
  Json summary;
  std::vector<Json> steps, held_out;  // lines of metrics.jsonl
};

Outcome run(const Algorithm& algorithm, const RlSettings& s, const std::filesystem::path& out) {
  run_rl(algorithm, s, {.out = out, .device = "cpu", .save_minutes = 0});
  Outcome o{read_json(out / "summary.json"), {}, {}};
  std::istringstream lines(read_file(out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json j = Json::parse(line);
    if (j.at("kind") == "data") continue;  // what was left out of the prompts
    (j.contains("held_out") ? o.held_out : o.steps).push_back(j);
  }
  return o;
}

}  // namespace

TEST_CASE("GRPO learns a bandit by each of its methods") {
  const TempDir dir;
  for (const char* method : {"centered_token_mean", "grpo", "dr_grpo", "dapo", "rloo", "gspo"}) {
    CAPTURE(method);
    RlSettings s = bandit().settings(kGrpo);
    s.grpo.method = method;
    if (std::string(method) == "rloo" || std::string(method) == "grpo") s.step.beta = .01;
    if (std::string(method) == "gspo") s.step.minibatches = 2;
    const Outcome o = run(kGrpo, s, dir / method);
    // One in four at first, of 256 answers: 5 standard deviations are .14
    CHECK(std::abs(o.held_out.at(0).at("pass1").get<double>() - .25) < .14);
    CHECK(o.summary.at("pass1").get<double>() > .9);
    CHECK(o.summary.at("greedy").get<double>() == 1);
    const Json& first = o.steps.at(0);
    CHECK(first.at("kl") == 0);  // nothing has moved
    CHECK(first.at("ratio_off").get<double>() >= 0);
    CHECK(first.at("generator_off").at("largest") == 0);  // the CPU's two ways are one
    CHECK(o.steps.back().at("kl").get<double>() > .2);    // on its way to ln 4: b alone of four
    CHECK(o.steps.back().at("entropy").get<double>() < first.at("entropy").get<double>());
  }
}

TEST_CASE("GRPO learns nothing from rewards that are drawn by lot") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.prompts = {bandit().path("lots.jsonl")}, s.step.optimizer.lr = .002;
  const Outcome o = run(kGrpo, s, dir / "run");
  double last = 0;
  for (size_t i = 10; i < 20; i++) last += o.steps[i].at("reward").get<double>() / 10;
  CHECK(std::abs(last - .25) < .2);  // 80 groups, each with its own lot: 4 standard deviations
}

TEST_CASE("PPO learns a bandit, and its first ratios are 1") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.step.minibatches = 1, s.step.epochs = 1;
  s.step.beta = .01;
  const Outcome o = run(kPpo, s, dir / "run");
  CHECK(o.summary.at("pass1").get<double>() > .9);
  for (const Json& step : o.steps) {  // each minibatch is a first one, and the same bits
    CHECK(step.at("ratio_off") == 0);
    CHECK(step.at("clipped") == 0);
    if (!step.contains("generator_off")) continue;  // all were right: nothing to learn
    CHECK(step.at("generator_off").at("largest") == 0);
  }
  CHECK(o.steps[0].at("kl") == 0);
  // A head of zeros says 0 everywhere; with lambda .95 the returns of an answer of two tokens are
  // .95 r and r, so the first loss is known from the rewards: half the mean of their squares.
  const double p = o.steps[0].at("reward").get<double>();
  CHECK(std::abs(o.steps[0].at("value_loss").get<double>() - .5 * p * (1 + .95 * .95) / 2) < .01);
  CHECK(std::abs(o.steps[0].at("explained_variance").get<double>()) < 1e-6);
  CHECK(o.steps[19].at("value_loss").get<double>() < o.steps[0].at("value_loss").get<double>());
}

TEST_CASE("PPO learns over minibatches and epochs, with ratios that move and are clipped") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.step.minibatches = 4, s.step.epochs = 2, s.step.optimizer.lr = .002;
  const Outcome o = run(kPpo, s, dir / "run");
  CHECK(o.summary.at("pass1").get<double>() > .9);
  double off = 0, clipped = 0;
  for (const Json& step : o.steps) {
    off = std::max(off, step.at("ratio_off").get<double>());
    clipped += step.at("clipped").get<double>();
  }
  CHECK(off > .01);
  CHECK(clipped > 0);
}

TEST_CASE("PPO learns nothing from rewards that are drawn by lot") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.data.prompts = {bandit().path("lots.jsonl")};
  s.step.minibatches = 1, s.step.epochs = 1, s.step.optimizer.lr = .001;
  const Outcome o = run(kPpo, s, dir / "run");
  double last = 0;
  for (size_t i = 10; i < 20; i++) last += o.steps[i].at("reward").get<double>() / 10;
  CHECK(std::abs(last - .25) < .1);  // 640 prompts: 5 standard deviations
}

TEST_CASE("pretraining text mixed in keeps its loss low") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  const auto loss = [&](const std::filesystem::path& model) {  // of the text, nats a token
    const auto gpt = make_gpt(load_config(model), {.device = Device::cpu});
    load_weights(model, *gpt);
    const TokenStream stream(bandit().path("shards"), "train");
    Loader loader(stream, 32, 1, bandit().tokenizer().end_of_text());
    std::vector<int> tokens, targets, starts;
    loader.next(8, tokens, targets, starts);
    gpt->forward({tokens, targets, starts}, Pass::score);
    double nats = 0;
    for (const float logp : gpt->logp()) nats -= logp / double(targets.size());
    return nats;
  };
  run(kPpo, s, dir / "without");
  s.data.ptx = bandit().path("shards"), s.data.ptx_tokens = 64, s.data.ptx_weight = 1;
  const Outcome o = run(kPpo, s, dir / "with");
  CHECK(o.summary.at("pass1").get<double>() > .4);  // the price of the text
  CHECK(loss(dir / "with/model") < .5 * loss(dir / "without/model"));
}

TEST_CASE("a KL budget stops a run, which keeps the last weights within it and says why") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.step.kl_budget = .3;
  const Outcome o = run(kPpo, s, dir / "run");
  CHECK(contains(o.summary.at("stopped"), "the KL to the reference is "));
  CHECK(o.summary.at("steps").get<int>() < 20);
  const size_t kept = o.summary.at("kept_step");
  CHECK(kept == o.steps.size() - 2);  // a step's KL is that of the weights from before it
  CHECK(o.steps.at(kept).at("kl").get<double>() <= .3);
  CHECK(o.steps.at(kept + 1).at("kl").get<double>() > .3);
  // --keep best: the best of the evaluations within it
  s.evaluation.keep = "best", s.evaluation.eval_every = 1;
  const Outcome best = run(kPpo, s, dir / "best");
  CHECK(best.summary.at("kept_step") == best.summary.at("best_step"));
  CHECK(best.summary.at("kl").get<double>() <= .3);
  // The other way to stay near: a high price
  s.step.kl_budget = 0, s.step.beta = 2, s.evaluation.eval_every = 1000, s.evaluation.keep = "last";
  const Outcome priced = run(kPpo, s, dir / "priced");
  CHECK(priced.summary.at("stopped").is_null());
  CHECK(priced.steps.back().at("kl").get<double>() < .3);
}

TEST_CASE("a KL budget without --val ends with success, and with the last weights within it") {
  const TempDir dir;
  const auto command = [&](const char* out, const std::string& flags) {
    return concat("./rlhf ppo --model ", bandit().path("model"), " --prompts ",
                  bandit().path("same.jsonl"), " --reward exact --device cpu --rollouts 64 ",
                  "--max-tokens 4 --lr .004 --critic-lr .004 --minibatches 1 --epochs 1 --beta 0 ",
                  "--schedule constant -o ", (dir / out).string(), " ", flags);
  };
  const auto weights = [&](const char* out) {
    return read_file(dir / out / "model/model.safetensors");
  };
  const Output o = shell(command("run", "--steps 20 --kl-budget .3"));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK(contains(o.text, "the last ones within the KL budget"));
  const Json summary = read_json(dir / "run/summary.json");
  const int kept = summary.at("kept_step");
  REQUIRE(kept > 0);
  CHECK(kept == summary.at("steps").get<int>() - 2);
  CHECK(summary.at("kl").get<double>() <= .3);
  // They are those of a run that ends there.
  REQUIRE(shell(command("short", concat("--steps ", kept))).status == 0);
  CHECK(weights("run") == weights("short"));
  // The last update may leave the budget: that is measured at the end.
  const Output last = shell(command("last", concat("--kl-budget .3 --steps ", kept + 1)));
  REQUIRE_MESSAGE(last.status == 0, last.text);
  CHECK(read_json(dir / "last/summary.json").at("kept_step") == kept);
  CHECK(weights("last") == weights("short"));
  // A killed run keeps the same ones.
  int status = 0;
  REQUIRE(interrupt(command("killed", "--steps 20 --kl-budget .3 --save-every 1"), dir / "killed",
                    size_t(kept) + 1, SIGKILL, &status));
  const Output resumed = shell("./rlhf ppo --resume -o " + (dir / "killed").string());
  REQUIRE_MESSAGE(resumed.status == 0, resumed.text);
  CHECK(weights("killed") == weights("run"));
}

TEST_CASE("PPO that left its KL budget, ended at any change of the disk, keeps the same weights") {
  const TempDir dir;
  end_at_every_change(dir.path(), "./rlhf ppo --resume -o", [](const std::string& out) {
    return concat("./rlhf ppo --model ", bandit().path("model"), " --prompts ",
                  bandit().path("same.jsonl"), " --reward exact --device cpu --rollouts 16 ",
                  "--max-tokens 4 --lr .01 --steps 3 --save-every 1 --kl-budget .01 -o ", out);
  });
}

TEST_CASE("--gold watches, and chooses no weights") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.gold = "format:a";  // falls while the policy learns to answer b
  s.evaluation.keep = "best", s.evaluation.eval_every = 5;
  const Outcome o = run(kGrpo, s, dir / "run");
  CHECK(o.summary.at("kept_step").get<int>() > 0);
  CHECK(o.summary.at("pass1").get<double>() > .9);
  CHECK(o.summary.at("gold").get<double>() < o.held_out.at(0).at("val_gold").get<double>());
}

TEST_CASE("the held-out KL is that of all rollouts, with its interval") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.step.steps = 5;
  const Json summary = run(kGrpo, s, dir / "run").summary;
  CHECK(summary.at("kl_ci95").get<double>() > 0);
  RlParts p = make_parts(s, "grpo", {.out = dir / "none", .device = "cpu"});
  begin_run(p, kGrpo, nullptr);
  load_weights(dir / "run/model", *p.models.policy);
  const Evaluation e = evaluate(p, 0);
  CHECK(e.kl.n == 64);  // prompts
  CHECK(e.kl.mean == summary.at("kl").get<double>());
}

TEST_CASE("beta follows a target of the KL") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.step.steps = 3, s.step.beta = .1, s.step.kl_target = 5, s.step.kl_horizon = 640;
  const Outcome o = run(kPpo, s, dir / "run");
  // The KL is far below the target: beta falls by .2 x 64/640 a step.
  CHECK(std::abs(o.steps[2].at("beta").get<double>() - .1 * std::pow(.98, 3)) < 1e-9);
}

TEST_CASE("--eval-at-kl evaluates where the KL passes each point, and ends the run at the last") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.evaluation.eval_at_kl = {.1, .12, .5}, s.evaluation.eval_every = 5;
  const Outcome o = run(kPpo, s, dir / "run");
  std::vector<double> points;
  std::set<int> regular;
  for (const Json& e : o.held_out) {
    const int step = e.at("step");
    if (!e.contains("at_sqrt_kl")) {
      regular.insert(step);
      continue;
    }
    points.push_back(e.at("at_sqrt_kl"));
    const double kl = points.back() * points.back();
    for (const Json& m : o.steps) {  // of all steps it is the first behind the point
      if (m.at("step") < step) CHECK(m.at("kl").get<double>() <= kl);
      if (m.at("step") == step) CHECK(m.at("kl").get<double>() > kl);
    }
  }
  CHECK(points == s.evaluation.eval_at_kl);
  CHECK(contains(o.summary.at("stopped"), "--eval-at-kl"));
  const int steps = o.summary.at("steps");
  CHECK(steps < 20);
  CHECK(steps == int(o.steps.size()));
  CHECK(regular.count(0));
  CHECK(bool(regular.count(5)) == (steps >= 5));
  CHECK(regular.count(steps));  // at the end
  s.data.val.clear();
  CHECK(contains(error_of([&] { run(kPpo, s, dir / "none"); }), "--eval-at-kl: expected --val"));
}

TEST_CASE("settings survive the checkpoint, and those of older versions are read") {
  RlSettings s;
  s.data.rewards = {"ended"}, s.step.clip_low = .1, s.ppo.lambda = .9, s.step.seed = 7;
  s.step.optimizer.lr = 3e-5, s.evaluation.eval_at_kl = {1, 2};
  const Json json = s;
  CHECK(Json(with_parts(json).get<RlSettings>()) == json);
  const Json old = {{"model", "m"},
                    {"rewards", {"number"}},
                    {"method", "cake"},
                    {"clip_low", .3},
                    {"lr", 1e-4},
                    {"adam_eps", 1e-5},
                    {"final_lr", .2},
                    {"kl_budget", 25},
                    {"search", "pages.jsonl"},
                    {"eval_samples", 2},
                    {"lambda", .8},
                    {"ppo", true}};
  const auto read = with_parts(old).get<RlSettings>();
  CHECK(read.data.model == "m");
  CHECK(read.data.search == "pages.jsonl");
  CHECK(read.data.rewards == std::vector<std::string>{"number"});
  CHECK(parse_method(read.grpo.method) == GroupMethod::centered_token_mean);
  CHECK(read.step.clip_low == .3);
  CHECK(read.step.optimizer.lr == 1e-4);
  CHECK(read.step.optimizer.eps == 1e-5);
  CHECK(read.step.optimizer.final_lr == .2);
  CHECK(read.step.kl_budget == 25);
  CHECK(read.ppo.lambda == .8);
  CHECK(read.evaluation.eval_samples == 2);
}

TEST_CASE("rewards that are all equal teach nothing, and ten such steps end a run") {
  const TempDir dir;
  for (const Algorithm* algorithm : {&kGrpo, &kPpo}) {
    const bool ppo = algorithm == &kPpo;
    RlSettings s = bandit().settings(*algorithm);
    s.data.rewards = {"format:*"};  // 1, whatever the answer
    s.data.truncated_reward = 1;
    const Outcome o = run(*algorithm, s, dir / (ppo ? "ppo" : "grpo"));
    CHECK(o.steps.size() == 10);
    CHECK(contains(o.summary.at("stopped"), "all rewards of ten steps in a row were equal"));
    CHECK(read_file(dir / (ppo ? "ppo" : "grpo") / "model/model.safetensors") ==
          read_file(bandit().path("model/model.safetensors")));
    if (!ppo) CHECK(o.summary.at("groups_without_variance") == 80);
  }
}

TEST_CASE("where all rewards are equal, the entropy bonus and PPO's critic still learn") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.rewards = {"format:*"}, s.data.truncated_reward = 1, s.step.steps = 12;
  s.step.entropy = .1;
  const Outcome grpo = run(kGrpo, s, dir / "grpo");
  CHECK(grpo.summary.at("stopped").is_null());
  CHECK(grpo.steps.size() == 12);
  CHECK(grpo.summary.at("groups_without_variance") == 96);
  CHECK(grpo.steps.back().at("entropy").get<double>() >
        grpo.steps.front().at("entropy").get<double>() + .004);
  RlSettings priced = bandit().settings(kPpo);
  priced.data.rewards = s.data.rewards, priced.data.truncated_reward = 1, priced.step.steps = 12;
  priced.step.beta = .05;
  const Outcome ppo = run(kPpo, priced, dir / "ppo");
  CHECK(ppo.summary.at("stopped").is_null());
  CHECK(ppo.steps.size() == 12);
  CHECK(ppo.steps.back().at("value_loss").get<double>() <
        .5 * ppo.steps.front().at("value_loss").get<double>());
}

namespace {

// Rollouts of one prompt token and one sampled token each, in groups of `group_size`.
std::vector<Rollout> made_rollouts(const std::vector<double>& rewards, int group_size) {
  std::vector<Rollout> rollouts;
  for (size_t i = 0; i < rewards.size(); i++) {
    Rollout r{.group = int(i) / group_size, .ids = {1, 2}, .sampled = {false, true}};
    r.logp = {0, -1}, r.length = 1, r.ended = true;
    r.reward = rewards[i];
    rollouts.push_back(r);
  }
  return rollouts;
}

}  // namespace

TEST_CASE("groups without variance keep their weight where KL or entropy are in the loss") {
  const std::vector<Rollout> rollouts = made_rollouts({1, 1, 1, 0}, 2);
  Experience x = end_to_end(rollouts);
  x.old_logp = {-1, -1, -1, -1}, x.ref_logp = {-1, -1, -1, -1};
  const GroupMethod grpo = GroupMethod::grpo, rloo = GroupMethod::rloo;
  CHECK(group_by_group(x, rollouts, 2, grpo, 4, 0, false) == 1);
  CHECK(x.weight == std::vector<float>{0, 0, .25, .25});
  CHECK(group_by_group(x, rollouts, 2, grpo, 4, 0, true) == 1);
  CHECK(x.weight == std::vector<float>{.25, .25, .25, .25});
  CHECK(x.advantage[0] == 0);
  CHECK(x.advantage[1] == 0);
  // RLOO compares rewards less the price of the KL: equal scores differ where their KL does.
  x.old_logp = {-1, -.5, -1, -1};
  CHECK(group_by_group(x, rollouts, 2, rloo, 4, .1, false) == 0);
  CHECK(x.advantage[0] == doctest::Approx(.05));
  CHECK(x.advantage[1] == doctest::Approx(-.05));
}

TEST_CASE("an answer that was cut off is never better than the worst finished one to its prompt") {
  const auto rewarded = [](std::vector<Rollout> rollouts, const std::vector<float>& scores,
                           double truncated_reward) {
    Rewards rewards;
    rewards.functions.push_back({{.name = "scores"}, false, [&](auto) { return scores; }});
    rewards.truncated_reward = truncated_reward;
    Seconds seconds;
    give_rewards(rollouts, rewards, seconds);
    std::vector<double> found;
    for (const Rollout& r : rollouts) found.push_back(r.reward);
    return found;
  };
  std::vector<Rollout> rollouts = made_rollouts({0, 0, 0, 0, 0, 0, 0, 0}, 4);
  for (const size_t i : {2, 5, 6}) rollouts[i].ended = false;
  const std::vector<float> scores{-2, 1, 3, kNan, .5, -.5, .75, .25};
  const auto of_groups = rewarded(rollouts, scores, 0);
  CHECK(of_groups[2] == -2);  // as the worst finished one
  CHECK(std::isnan(of_groups[3]));
  CHECK(of_groups[5] == -.5);  // its own
  CHECK(of_groups[6] == 0);    // --truncated-reward
  // Each prompt has one rollout: the worst of all finished ones.
  for (size_t i = 0; i < rollouts.size(); i++) rollouts[i].group = int(i);
  CHECK(rewarded(rollouts, scores, 0)[6] == -2);
  CHECK(rewarded(rollouts, scores, -3)[6] == -3);
}

TEST_CASE("DAPO's penalty of long answers holds for those that were cut off") {
  const StageTemplate chat(chatml_template(bandit().tokenizer()));
  const RewardContext context{chat, {}, 128, Device::cpu, {}};
  Rewards rewards;
  for (const char* text : {"exact", ".5*length:64"}) {
    rewards.functions.push_back(make_reward(parse_reward(text), context, rewards.models));
  }
  Prompt p;
  p.answers = {"b"};
  std::vector<Rollout> rollouts = made_rollouts({0, 0, 0}, 3);
  for (Rollout& r : rollouts) r.prompt = &p, r.text = "a";
  rollouts[0].length = 10, rollouts[1].length = 96;
  rollouts[2].length = 128, rollouts[2].ended = false;
  Seconds seconds;
  give_rewards(rollouts, rewards, seconds);
  CHECK(rollouts[0].reward == 0);
  CHECK(rollouts[1].reward == -.25);
  CHECK(rollouts[2].reward == -.5);
}

TEST_CASE("DAPO replaces groups without variance by others") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.grpo.group = 2, s.grpo.method = "dapo",
  s.step.steps = 2;  // two answers differ in right and wrong: .375
  const Outcome o = run(kGrpo, s, dir / "run");
  CHECK(o.steps[0].at("resampled").get<int>() > 5);
  CHECK(o.steps[0].at("no_variance") == 0);
  s.grpo.resample = 0;
  const Outcome plain = run(kGrpo, s, dir / "plain");
  CHECK(plain.steps[0].at("resampled") == 0);
  CHECK(plain.steps[0].at("no_variance").get<double>() > .3);
}

TEST_CASE("several rewards add up by their weights, and each is logged") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.rewards = {"exact", ".5*ended", "-.25*format:a"};
  s.step.steps = 1;
  const Json step = run(kGrpo, s, dir / "run").steps.at(0);
  const auto mean = [&](const char* name) {
    return step.at("rewards").at(name).at("mean").get<double>();
  };
  CHECK(mean("ended") > .9);
  CHECK(mean("format:a") > .05);
  // Of answers that were cut off the reward is 0, whatever the functions say: none is here.
  CHECK(step.at("truncated") == 0);
  CHECK(std::abs(step.at("reward").get<double>() -
                 (mean("exact") + .5 * mean("ended") - .25 * mean("format:a"))) < 1e-9);
}

TEST_CASE("answers that were cut off are penalised, count nowhere, or count as they are") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.step.steps = 1, s.data.max_tokens = 1;  // no room for the end of turn
  s.data.truncated = "keep";
  const Json kept = run(kGrpo, s, dir / "keep").steps.at(0);
  CHECK(kept.at("truncated") == 1);
  CHECK(kept.at("reward").get<double>() > .05);
  s.data.truncated = "mask";
  const Json masked = run(kGrpo, s, dir / "mask").steps.at(0);
  CHECK(masked.at("grad_norm") == 0);
  s.data.truncated = "penalise", s.data.truncated_reward = -2;
  const Json punished = run(kGrpo, s, dir / "penalise").steps.at(0);
  CHECK(punished.at("reward") == -2);
}

TEST_CASE("failures of a verifier leave their groups, and more than a fifth of them ends the run") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.val.clear(), s.step.steps = 2;
  const std::string id = R"(i=${l##*\"id\":}; i=${i%%[,\}]*}; )";  // of a line, in sh
  const auto command = [&](const std::string& on_a) {
    return "command:while read -r l; do " + id +
           "n=$((n+1)); case $l in *'\"completion\":\"b\"'*) " + "r=1;; *) r=0;; esac; " + on_a +
           "echo \"{\\\"id\\\":$i,\\\"reward\\\":$r}\"; done";
  };
  // Every twentieth process fails at once: three of 64
  s.data.rewards = {command("case $i in 7|27|47) exit 1;; esac; ")};
  const Outcome o = run(kGrpo, s, dir / "some");
  CHECK(o.steps.at(0).at("failed") == 3);
  CHECK(o.summary.at("failed") == 6);
  s.data.rewards = {command("case $i in 2?) exit 1;; 3?) exit 1;; esac; ")};
  CHECK(contains(error_of([&] { run(kGrpo, s, dir / "many"); }),
                 "--reward command: found 13 failures in 64 rollouts, expected a fifth at most"));
}

TEST_CASE("rollouts.jsonl holds what was asked and answered, its rewards and its advantage") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.step.steps = 3, s.step.rollouts = 16, s.data.rewards = {"exact", ".5*format:a"};
  const Outcome o = run(kGrpo, s, dir / "run");
  const auto rows = [](const std::filesystem::path& out) {
    std::vector<Json> found;
    std::istringstream lines(read_file(out / "rollouts.jsonl"));
    for (std::string line; std::getline(lines, line);) found.push_back(Json::parse(line));
    return found;
  };
  const std::vector<Json> all = rows(dir / "run");
  REQUIRE(all.size() == 48);
  for (int n = 1; n <= 3; n++) {
    double sum = 0;
    std::map<int, double> advantages;  // of each group
    for (size_t i = size_t(n - 1) * 16; i < size_t(n) * 16; i++) {
      const Json& r = all[i];
      CHECK(r.at("step") == n);
      CHECK(r.at("prompt") == "Go");
      CHECK(contains(r.at("problem"), "same.jsonl:"));
      CHECK(r.at("rewards").at("exact") == (r.at("completion") == "b" ? 1 : 0));
      CHECK(r.at("rewards").at("format:a") == (r.at("completion") == "a" ? 1 : 0));
      if (r.at("ended") == true) CHECK(r.at("length").get<int>() >= 1);
      sum += r.at("reward").get<double>();
      advantages[r.at("group").get<int>()] += r.at("advantage").get<double>();
    }
    CHECK(sum / 16 == doctest::Approx(o.steps.at(size_t(n) - 1).at("reward").get<double>()));
    CHECK(advantages.size() == 2);
    for (const auto& of : advantages) CHECK(std::abs(of.second) < 1e-6);
  }
  s.evaluation.no_rollouts = true;
  run(kGrpo, s, dir / "none");
  CHECK(!std::filesystem::exists(dir / "none/rollouts.jsonl"));
  // PPO: the mean of the advantages of a rollout's tokens, which are whitened over the step.
  RlSettings ppo = bandit().settings(kPpo);
  ppo.step.steps = 1, ppo.step.rollouts = 16;
  run(kPpo, ppo, dir / "ppo");
  double sum = 0;
  for (const Json& r : rows(dir / "ppo")) {
    sum += r.at("advantage").get<double>() * r.at("length").get<int>();
  }
  CHECK(std::abs(sum) < 1e-4);
}

TEST_CASE("prompts without room for an answer are left out, which is said") {
  const TempDir dir;
  std::string words;
  for (int i = 0; i < 40; i++) words += " Go";
  write_file(dir / "p.jsonl", "{\"question\":\"Go\",\"answer\":\"b\"}\n{\"question\":\"" + words +
                                  "\",\"answer\":\"b\"}\n");
  const Output o =
      shell(concat("./rlhf grpo --dry-run --model ", bandit().path("model"), " --prompts ",
                   (dir / "p.jsonl").string(), " --reward exact --max-tokens 20"));
  CHECK(o.status == 0);
  CHECK_MESSAGE(contains(o.text, "left out 1 of 2 records: too long\n"), o.text);
  CHECK(contains(o.text, "  no room for 20 tokens behind them in the context of 64\n"));
}

TEST_CASE("the generator and the forward pass may differ a little, and not by ten times as much") {
  Experience x;
  x.sampled_logp = {-1, -1}, x.old_logp = {-1.05f, -1.05f};
  const std::vector<float> weight{1, 1};
  CHECK(generator_difference(1, x, weight).mean == doctest::Approx(.05));
  x.old_logp = {-1.3f, -1.3f};
  CHECK(contains(error_of([&] { generator_difference(7, x, weight); }),
                 "step 7: mean difference of the log-probabilities of generator and forward pass"));
  x.old_logp[0] = kNan;
  CHECK(contains(error_of([&] { generator_difference(7, x, weight); }), "expected 0.2 at most"));
  // A run warns once.
  RlParts p = make_parts(bandit().settings(kGrpo), "grpo", {.device = "cpu"});
  Step step;
  step.generator = Difference{.mean = .01};
  warn_of_disagreement(p, 1, step);
  CHECK(!p.has_warned);
  step.sums.first_ratio = .05;
  warn_of_disagreement(p, 2, step);
  CHECK(p.has_warned);
}

TEST_CASE(
    "a critic whose gradient is not finite ends the run, and the loss of mixed-in text is told") {
  const TempDir dir;
  RlSettings s = bandit().settings(kPpo);
  s.step.steps = 2, s.step.rollouts = 16;
  s.data.ptx = bandit().path("shards"), s.data.ptx_tokens = 64, s.data.ptx_weight = .01;
  const Outcome o = run(kPpo, s, dir / "text");
  CHECK(o.steps.at(0).at("ptx_loss").get<double>() > .5);
  CHECK(o.steps.at(0).at("ptx_loss").get<double>() < 20);
  // A critic with a value that is too large for a float's square
  const std::filesystem::path policy = bandit().path("model");
  Config c = load_config(policy);
  c.head = Head::scalar, c.reward_shift = 1e30;
  const auto critic = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  load_weights(policy, *critic, {.new_score = true});
  save_checkpoint(dir / "critic", *critic, {.tokenizer_from = policy});
  s.data.ptx.clear(), s.ppo.critic = dir / "critic", s.step.steps = 8, s.ppo.value_clip = 0;
  CHECK(contains(error_of([&] { run(kPpo, s, dir / "run"); }),
                 "three gradients in a row were not finite"));
  const std::string written = read_file(dir / "run/metrics.jsonl");
  CHECK(contains(written, "\"critic_skipped\":true"));
}

TEST_CASE("reward models score in micro-batches of the run's size") {
  const TempDir dir;
  const std::filesystem::path policy = bandit().path("model");
  Config c = load_config(policy);
  c.head = Head::scalar;
  const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  load_weights(policy, *gpt, {.new_score = true});
  save_checkpoint(dir / "reward", *gpt, {.tokenizer_from = policy});
  RlSettings s = bandit().settings(kPpo);
  s.data.rewards = {"model:" + (dir / "reward").string()}, s.step.micro_batch_tokens = 256;
  RlParts p = make_parts(s, "ppo", {.out = dir / "run", .device = "cpu"});
  read_inputs(p, Mode::train);
  CHECK(p.rewards.models.at(0)->micro_batch_tokens() == 256);
}

TEST_CASE("--cache-mb bounds the cache of rollouts, and changes no weights") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.val.clear(), s.step.steps = 2, s.data.cache_mb = 1;
  RlParts p = make_parts(s, "grpo", {.out = dir / "none", .device = "cpu"});
  read_inputs(p, Mode::train);
  CHECK(p.options.cache_bytes == 1 << 20);
  run(kGrpo, s, dir / "small");
  s.data.cache_mb = 64;
  run(kGrpo, s, dir / "large");
  CHECK(read_file(dir / "small/model/model.safetensors") ==
        read_file(dir / "large/model/model.safetensors"));
}

TEST_CASE("problems are filtered by how often they are solved") {
  const TempDir dir;
  write_file(dir / "p.jsonl",
             "{\"question\":\"Go\",\"answer\":\"b\"}\n{\"question\":\"Go\",\"answer\":\"never\"}\n"
             "{\"question\":\"Go\",\"answer\":\"c\"}\n");
  RlSettings s = bandit().settings(kGrpo);
  s.data.prompts = {dir / "p.jsonl"}, s.step.steps = 1, s.grpo.pass_rate = ".01:.9",
  s.grpo.pass_samples = 32;
  run(kGrpo, s, dir / "run");
  const Json state = read_json(dir / "run/model/trainer_state.json");
  CHECK(state.at("pool") == Json({0, 2}));
  s.grpo.pass_rate = ".99:1";
  CHECK(contains(error_of([&] { run(kGrpo, s, dir / "none"); }), "found none among 3 problems"));
}

TEST_CASE("adapters learn beside a reference that is the policy without them") {
  const TempDir dir;
  RlSettings s = bandit().settings(kGrpo);
  s.data.lora = 4, s.data.lora_alpha = 8, s.step.optimizer.lr = .01, s.step.beta = .01,
  s.grpo.method = "grpo";
  const Outcome o = run(kGrpo, s, dir / "run");
  CHECK(o.summary.at("pass1").get<double>() > .9);
  CHECK(o.steps[0].at("kl") == 0);
  CHECK(o.steps.back().at("kl").get<double>() > .5);
  CHECK(has_adapters(dir / "run/model"));
  // A run that begins from adapters has them in its reference too. There they are added to the
  // weights, which rounds in another way than adapters that stay beside them.
  s.data.model = dir / "run", s.step.steps = 1;
  const Outcome again = run(kGrpo, s, dir / "again");
  CHECK(std::fabs(again.steps[0].at("kl").get<double>()) < 1e-4);
}

TEST_CASE("a text goes on for a fixed length, without a penalty for having no end") {
  const TempDir dir;
  write_file(dir / "p.jsonl", "{\"prompt\":\"Go a\"}\n{\"prompt\":\"Go b\"}\n");
  RlSettings s = bandit().settings(kPpo);
  s.data.prompts = {dir / "p.jsonl"}, s.data.val.clear();
  s.data.rewards = {"format:*a*"}, s.step.steps = 1, s.step.rollouts = 4, s.data.max_tokens = 6;
  const Json fixed = run(kPpo, s, dir / "fixed").steps.at(0);
  CHECK(fixed.at("length") == 6);
  CHECK(fixed.at("ended") == 1);
  CHECK(fixed.at("reward").get<double>() >= 0);  // no penalty
}

TEST_CASE("a form puts questions into a text, whose answers end at a stop string") {
  ScriptedModel script;
  const Tokenizer& t = script.tokenizer();
  simdjson::dom::parser parser;
  const simdjson::dom::object line =
      parser.parse(std::string(R"({"question":"6*7?","answer":"42"})"));
  const Problem problem = parse_problem({line, "here"});
  const StageTemplate stage(chatml_template(t));
  const Prompt p = make_prompt(problem, stage, {.form = "Q: {question}\nA:"});
  CHECK(t.decode(p.ids) == "<|endoftext|>Q: 6*7?\nA:");
  CHECK(p.question == "6*7?");
  script.write(int(p.ids.size()), " 42.\n\nQ: and then");
  Models models{make_gpt(load_config(script.save()), {.device = Device::cpu})};
  load_weights(script.dir() / "model", *models.policy);
  const Prompt* prompts[] = {&p};
  RolloutOptions o{.chat = &stage,
                   .max_tokens = 40,
                   .context = script.T(),
                   .temperature = .02f,
                   .stops = {"\n\n"}};
  const Rollout r = roll_out(models, o, prompts, 1, 1).at(0);
  CHECK(r.text == " 42.");
  CHECK(r.ended);
  CHECK(right_number(p, r.text));
  o.max_tokens = 2;
  CHECK(!roll_out(models, o, prompts, 1, 1).at(0).ended);
}

TEST_CASE("choices stand below the question, or where the form has a place for them") {
  ScriptedModel script;
  const Tokenizer& t = script.tokenizer();
  simdjson::dom::parser parser;
  const simdjson::dom::object line =
      parser.parse(std::string(R"({"question":"{choices}?","choices":["x","y"],"answer":1})"));
  const Problem problem = parse_problem({line, "here"});
  const StageTemplate stage(chatml_template(t));
  const auto text = [&](const std::string& form) {
    return t.decode(make_prompt(problem, stage, {.form = form}).ids);
  };
  CHECK(text("Q: {question}\nA:") == "<|endoftext|>Q: {choices}?\nA. x\nB. y\nA:");
  CHECK(text("{choices} Q: {question} {x}") == "<|endoftext|>A. x\nB. y Q: {choices}? {x}");
  const Prompt chat = make_prompt(problem, stage, {.system = "Be brief."});
  CHECK(chat.question == "{choices}?\nA. x\nB. y");
  CHECK(chat.chat.messages ==
        std::vector<Message>{{"system", "Be brief."}, {"user", chat.question}});
  CHECK(chat.ids == chatml(t, chat.chat, true).ids);
  CHECK(right_choice(chat, "The answer is B."));
  CHECK(!right_choice(chat, "The answer is A."));
  for (const char* right : {"B", "y\n"}) CHECK(right_exact(chat, right));
  for (const char* wrong : {"A", "x", "b"}) CHECK(!right_exact(chat, wrong));
}

TEST_CASE("problems are the same from lines, an array, gzip, Zstandard, and under other keys") {
  const TempDir dir;
  ScriptedModel script;
  std::string lines, other;
  Json array = Json::array();
  for (int i = 0; i < 20; i++) {
    const Json problem = {{"question", concat(i, "+1?")}, {"answer", i + 1}};
    array.push_back(problem);
    lines += problem.dump() + "\r\n";
    other += Json{{"text", {problem["question"]}}, {"of", {{"it", concat(i + 1)}}}}.dump() + "\n";
  }
  write_file(dir / "lines.jsonl", lines), write_file(dir / "array.json", array.dump(2));
  write_file(dir / "lines.json.gz", deflated(lines)), write_file(dir / "a.zst", zstandard(lines));
  write_file(dir / "other.txt", other);
  const auto read = [&](const char* name, const FieldNames& names = {}) {
    const StageTemplate stage(chatml_template(script.tokenizer()));
    PromptReader reader{.chat = stage, .context = 64, .max_tokens = 8};
    reader.options.names = names;
    std::string all;
    for (const Prompt& p : read_prompts({(dir / name).string()}, reader)) {
      all += concat(hash_of(std::span(p.ids)), " ", p.answers.at(0), "\n");
    }
    CHECK(reader.records == 20);
    return all;
  };
  const std::string expected = read("lines.jsonl");
  for (const char* name : {"array.json", "lines.json.gz", "a.zst"}) CHECK(read(name) == expected);
  CHECK(read("other.txt", {{"question", "text.0"}, {"answer", "of.it"}}) == expected);
}

// ---------------------------------------------------------------------------------------------
// The program

namespace {

std::string rl(const std::string& command, const std::filesystem::path& out,
               const std::string& flags = "") {
  return concat("./rlhf ", command, " --model ", bandit().path("model"), " --prompts ",
                bandit().path("lots.jsonl"), " --val ", bandit().path("same.jsonl"),
                " --reward exact -o ", out.string(), " --device cpu --rollouts 16 --max-tokens 4 ",
                "--samples 2 --eval-some 8 --lr .001 ", flags);
}

// Lines as they were written, but for the seconds.
std::vector<Json> metrics(const std::filesystem::path& run_dir) {
  std::vector<Json> result;
  std::istringstream lines(read_file(run_dir / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json written = Json::parse(line);
    Json& kept = result.emplace_back(written);
    for (const auto& item : written.items()) {
      const bool is_time = item.key().starts_with("seconds") || item.key() == "tokens_per_second";
      if (is_time) kept.erase(item.key());
    }
  }
  return result;
}

}  // namespace

TEST_CASE("PPO and GRPO killed at any moment and resumed equal runs that never stopped") {
  const TempDir dir;
  const std::pair<std::string, std::string> runs[] = {
      {"grpo", "grpo --group 4 --method dapo --minibatches 2"},
      {"lora", "grpo --group 4 --lora 4 --beta .01 --method grpo"},
      {"ppo",
       "ppo --kl-target 3 --keep best --critic-warmup 3 --entropy .001 --ptx-tokens 64 --ptx " +
           bandit().path("shards")}};
  for (const auto& of : runs) {
    const std::string &name = of.first, &command = of.second;
    CAPTURE(name);
    const std::string all = " --steps 24 --eval-every 5 --save-every 4";
    const std::string out = dir / ("killed_" + name), one = dir / ("one_" + name);
    const Output whole = shell(rl(command, one, all));
    REQUIRE_MESSAGE(whole.status == 0, whole.text);
    const std::string resume =
        concat("./rlhf ", command.substr(0, command.find(' ')), " --resume --device cpu -o ", out);
    int status = 0;
    REQUIRE(interrupt(rl(command, out, all), out, 9, SIGKILL, &status));
    REQUIRE(interrupt(resume, out, 17, SIGTERM, &status));
    CHECK(WEXITSTATUS(status) == 128 + SIGTERM);
    const Output rest = shell(resume);
    REQUIRE_MESSAGE(rest.status == 0, rest.text);
    CHECK(contains(rest.text, "resumes after step "));
    const std::string file = name == "lora" ? "adapter_model.safetensors" : "model.safetensors";
    CHECK(read_file(std::filesystem::path(out) / "model" / file) ==
          read_file(std::filesystem::path(one) / "model" / file));
    CHECK((metrics(out) == metrics(one)));  // they are long
    CHECK((read_file(std::filesystem::path(out) / "rollouts.jsonl") ==
           read_file(std::filesystem::path(one) / "rollouts.jsonl")));
    CHECK(contains(shell(resume).text, "is finished"));
  }
}

TEST_CASE("a reference that has changed is found on resume") {
  const TempDir dir;
  std::filesystem::copy(bandit().path("model"), dir / "model");
  const std::string command =
      concat("./rlhf grpo --model ", (dir / "model").string(), " --prompts ",
             bandit().path("same.jsonl"), " --reward exact --device cpu -o ",
             (dir / "run").string(), " --steps 4000 --rollouts 16 --max-tokens 4");
  int status = 0;
  REQUIRE(interrupt(command, dir / "run", 3, SIGINT, &status));
  CHECK(WEXITSTATUS(status) == 128 + SIGINT);
  std::fstream file(dir / "model/model.safetensors",
                    std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-1, std::ios::end);
  file.put('?');
  file.close();
  const Output o = shell(concat("./rlhf grpo --resume --device cpu -o ", (dir / "run").string()));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, ": it has changed"), o.text);
}

TEST_CASE("a model of labels rewards with the probability of the good one") {
  const TempDir dir;
  const std::filesystem::path policy = bandit().path("model");
  const Tokenizer tokenizer = Tokenizer::load(model_dir(policy));
  Config c = load_config(model_dir(policy));
  c.head = Head::scalar;
  for (const float shift : {0.f, .5f}) {
    c.reward_shift = shift;
    const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      std::vector<float> values = initial_values(gpt->table().tensors[i], 1);
      for (size_t k = 0; k < values.size(); k++) values[k] += .01f * float(k % 7);
      gpt->write(int(i), Slot::weight, values);
    }
    save_checkpoint(dir / (shift == 0 ? "plain" : "moved"), *gpt,
                    {.tokenizer_from = model_dir(policy)});
  }
  const StageTemplate stage(chatml_template(tokenizer));
  const RewardContext context{stage, policy, 8, Device::cpu, {}};
  const auto reward = [&](const std::string& name) {
    std::vector<std::shared_ptr<RewardModel>> models;
    return make_reward(parse_reward(name + ":" + (dir / "plain").string()), context, models);
  };
  Prompt chat, text;
  text.raw = true;
  std::vector<Rollout> rollouts(2);
  rollouts[0].ids = {1, 2, 3}, rollouts[0].prompt = &chat;
  rollouts[1].ids = {5, 4}, rollouts[1].prompt = &text;
  // A chat is scored at its end of turn, a raw text at the document separator.
  const int turn = tokenizer.special("<|im_end|>"), separator = tokenizer.end_of_text();
  CHECK(ids_to_score(rollouts[0], stage, 64) == std::vector{1, 2, 3, turn});
  CHECK(ids_to_score(rollouts[0], stage, 2) == std::vector{1, turn});
  CHECK(ids_to_score(rollouts[1], stage, 64) == std::vector{5, 4, separator});
  rollouts[1].ids.push_back(separator);
  CHECK(ids_to_score(rollouts[1], stage, 64) == std::vector{5, 4, separator});
  RolloutOptions ends{.chat = &stage, .context = 64};
  CHECK(rollout_request(text, ends, 1).stop_ids == std::vector{separator});
  CHECK(rollout_request(chat, ends, 1).stop_ids == std::vector{turn, separator});
  // and every end token of the policy stops a rollout
  ends.end_tokens = {7, turn};
  CHECK(rollout_request(chat, ends, 1).stop_ids == std::vector{turn, separator, 7});
  CHECK(rollout_request(text, ends, 1).stop_ids == std::vector{separator, 7, turn});
  const auto scores = reward("model").score(rollouts);
  const auto chances = reward("probability").score(rollouts);
  CHECK(scores[0] != scores[1]);
  for (size_t i = 0; i < 2; i++) {
    CHECK(chances[i] == doctest::Approx(1 / (1 + std::exp(-double(scores[i])))).epsilon(1e-6));
  }
  std::vector<std::shared_ptr<RewardModel>> models;
  const std::string moved = "probability:" + (dir / "moved").string();
  CHECK(contains(error_of([&] { make_reward(parse_reward(moved), context, models); }),
                 "its scores were normalised, expected ./reward train --normalise-on none"));
}

TEST_CASE("./rlhf ppo and grpo say in one line what is wrong") {
  const TempDir dir;
  write_file(dir / "empty.jsonl", "\n");
  write_file(dir / "bad.jsonl", "{\"question\":\"Go\"}\n{\"text\":\"Go\"}\n");
  write_file(dir / "words.jsonl", "{\"question\":\"Go\",\"answer\":\"many\"}\n");
  const std::string out = dir / "run";
  const std::string base =
      concat(" --device cpu --overwrite -o ", out, " --model ", bandit().path("model"), " ");
  const std::string prompts = "--prompts " + bandit().path("same.jsonl") + " ";
  const struct {
    std::string command, error;
  } cases[] = {
      {"grpo" + base + prompts, "--reward: missing"},
      {"grpo" + base + prompts + "--reward exact --clip .1", "--clip-ratio"},
      {"ppo" + base + prompts + "--reward exact --clip=.1", "--clip-norm"},
      {"ppo" + base + prompts + "--reward exact --eval-at-kl 2,1 --val " +
           bandit().path("same.jsonl"),
       "expected rising numbers"},
      {"ppo" + base + prompts + "--reward exact --tool search", "expected --documents"},
      {"grpo" + base + prompts + "--reward exact --eval-samples 0", "--samples: found 0"},
      {"reward" + base, "./reward train"},
      {"dpo" + base, "./reward dpo"},
      {"overoptimize" + base, "make overoptimize"},
      {"grpo" + base, "--prompts: missing"},
      {"grpo" + base + prompts + "--reward magic", "--reward: found magic, expected number"},
      {"grpo" + base + prompts + "--reward model:nowhere", "nowhere: not found"},
      {"grpo" + base + prompts + "--reward exact --top-k 50", "--top-k: found with RL"},
      {"grpo" + base + prompts + "--reward exact --top-p .9", "--top-p: found with RL"},
      {"ppo" + base + prompts + "--reward exact --min-p .1", "--min-p: found with RL"},
      {"ppo" + base + prompts + "--reward exact --repetition-penalty 1.1",
       "--repetition-penalty: found with RL"},
      {"grpo" + base + prompts + "--reward exact --ban-token 7", "--ban-token: found with RL"},
      {"grpo" + base + prompts + "--reward exact --group 1", "--group: found 1"},
      {"grpo" + base + prompts + "--reward exact --cache-mb 0", "--cache-mb: found 0"},
      {"grpo" + base + prompts + "--reward exact --rollouts 9", "a multiple of --group 8"},
      {"grpo" + base + prompts + "--reward exact --method magic", "--method: found magic"},
      {"grpo" + base + prompts + "--reward exact --temperature 0", "--temperature: found 0"},
      {"grpo" + base + prompts + "--reward exact --max-tokens 100",
       "too long: no room for an answer of 100 tokens"},
      {"grpo" + base + prompts + "--reward exact --pass-rate high", "--pass-rate: found high"},
      {"grpo" + base + prompts + "--reward exact --keep best", "--keep best: expected --val"},
      {"grpo" + base + prompts + "--reward rubric --max-tokens 4", "same.jsonl:"},
      {"grpo" + base + "--reward exact --prompts " + (dir / "empty.jsonl").string(),
       "empty.jsonl: found"},
      {"grpo" + base + "--reward exact --max-tokens 4 --prompts " + (dir / "bad.jsonl").string(),
       "bad.jsonl:2: found the keys \"text\" (a document, which"},
      {"grpo" + base + "--reward number --max-tokens 4 --prompts " + (dir / "words.jsonl").string(),
       "words.jsonl:1: answer: found \"many\", expected one number"},
      {"ppo" + base + prompts + "--reward exact --critic " + bandit().path("model"),
       "expected a reward model"},
  };
  for (const auto& c : cases) {
    CAPTURE(c.command);
    const Output o =
        shell("./rlhf " + c.command + (contains(c.command, "max-tokens") ? "" : " --max-tokens 4"));
    CHECK(o.status == 1);
    CHECK_MESSAGE(contains(o.text, "error: "), o.text);
    CHECK_MESSAGE(contains(o.text, c.error), o.text);
  }
}
