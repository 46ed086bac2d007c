// ./rlhf as its user meets it: what it refuses before the first step, programs that judge, runs
// that are resumed with other flags or other files.
#include <doctest/doctest.h>

#include "cake/chat_template.h"
#include "test/preference_world.h"
#include "test/scripted_model.h"

using namespace cake;
using namespace cake::preference_world;

namespace {

const std::string kShort =
    " --max-tokens 6 --device cpu --save-minutes 0 --prompts " + file("prompts.jsonl") + " ";
const std::string kGrpo = kShort + "--rollouts 8 --group 4 ";
const std::string kPpo = kShort + "--rollouts 8 --minibatches 2 --epochs 1 ";

// A small model with random weights that differs from the world's in `change`.
template <class Change>
std::string other_model(const TempDir& dir, const std::string& name, Change change,
                        const std::filesystem::path& tokenizer = world() / "tokenizer") {
  Config c = load_config(world() / "model");
  change(c);
  const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
    std::vector<float> values = initial_values(gpt->table().tensors[i], 1);
    for (size_t k = 0; k < values.size(); k++) values[k] += .02f * float(k % 5);
    gpt->write(int(i), Slot::weight, values);
  }
  save_checkpoint(dir / name, *gpt, {.tokenizer_from = tokenizer});
  return dir / name;
}
std::string reward_model(const TempDir& dir, const std::string& name, int context = 96) {
  return other_model(dir, name, [&](Config& c) { c.head = Head::scalar, c.T = context; });
}

// Exit status 1, one line with `part`, and nothing written.
void refused(const TempDir& dir, const std::string& command, const std::string& flags,
             const std::string& part) {
  CAPTURE(flags);
  const Output o = shell(stage(command, dir / "refused", flags));
  CHECK(o.status == 1);
  CHECK_MESSAGE(std::count(o.text.begin(), o.text.end(), '\n') == 1, o.text);
  CHECK_MESSAGE(contains(o.text, part), o.text);
  CHECK(!std::filesystem::exists(dir / "refused"));
}

// A program in sh that answers each line with $r, which `body` sets; $l is the line, $i its id.
std::string program(const std::string& body, const std::string& before = "") {
  return before + R"(while read -r l; do i=${l##*\"id\":}; i=${i%%[,\}]*}; )" + body +
         R"(; echo "{\"id\":$i,\"reward\":$r}"; done)";
}
std::string quoted(const std::string& text) { return "'" + text + "'"; }

}  // namespace

TEST_CASE("./rlhf refuses numbers out of their range before it reads a model") {
  const TempDir dir;
  const std::pair<const char*, const char*> both[] = {
      {"--schedule cosin", "--schedule: found cosin"},
      {"--lr -1", "--lr: found -1"},
      {"--warmdown 2", "--warmdown: found 2, expected 0 to 1"},
      {"--final-lr -.5", "--final-lr: found -0.5"},
      {"--weight-decay -2", "--weight-decay: found -2"},
      {"--beta2 1.5", "--beta2: found 1.5"},
      {"--adam-eps 0", "--adam-eps: found 0"},
      {"--clip-norm -1", "--clip-norm: found -1"},
      {"--entropy -1", "--entropy: found -1"},
      {"--clip-ratio-high -2", "--clip-ratio-high: found -2"},
      {"--limit -1", "--limit: found -1"},
      {"--eval-some -1", "--eval-some: found -1"},
      {"--eval-every -1", "--eval-every: found -1"},
      {"--verifiers 0", "--verifiers: found 0"},
      {"--command-seconds 0", "--command-seconds: found 0"},
      {"--steps -1", "--steps: found -1"},
      {"--steps 5 --minutes 1", "--steps, --minutes: found more than one"},
      {"--val-fraction 1", "--val-fraction: found 1"},
      {"--val-fraction .0001", "which leaves 24 prompts and holds 0 out"},
      {"--reward length:abc", "--reward length: found abc, expected 0 to 6"},
      {"--pass-rate .8:.2 --dry-run", "--pass-rate: found .8:.2"},
      {"--reward countdown:few", "expected countdown or countdown:all"},
      {"--stop ''", "--stop: found \"\", expected some text"},
      {"--form 'no place'", "--form: found no {question}"},
      {"--form {question} --as-chat", "--form: found --as-chat too"}};
  for (const auto& c : both) {
    refused(dir, "rlhf grpo", kGrpo + "--reward ended " + c.first, c.second);
  }
  const std::pair<const char*, const char*> of_ppo[] = {{"--gamma 2", "--gamma: found 2"},
                                                        {"--lambda -1", "--lambda: found -1"},
                                                        {"--value-clip -1", "--value-clip: found"},
                                                        {"--critic-lr -1", "--critic-lr: found"},
                                                        {"--kl-horizon 0", "--kl-horizon: found"}};
  for (const auto& c : of_ppo) {
    refused(dir, "rlhf ppo", kPpo + "--reward ended " + c.first, c.second);
  }
  refused(dir, "rlhf grpo", kGrpo + "--reward ended --pass-samples 0", "--pass-samples: found 0");
}

TEST_CASE("every problem has what its verifier needs, or the run does not begin") {
  const TempDir dir;
  std::string lines;
  for (int i = 0; i < 40; i++) {
    lines += Json{{"question", "ask"}, {"answer", i == 30 ? "no solution" : "3"}}.dump() + "\n";
  }
  write_file(dir / "p.jsonl", lines);
  const std::string p = (dir / "p.jsonl").string();
  const std::string flags = " --max-tokens 6 --device cpu --prompts ";
  refused(dir, "rlhf grpo", flags + p + " --reward number",
          "p.jsonl:31: answer: found \"no solution\", expected one number");
  refused(dir, "rlhf grpo",
          flags + file("prompts.jsonl") + " --reward ended --gold number --val " + p,
          "prompts.jsonl:1: answer is missing");
  refused(dir, "rlhf ppo", flags + p + " --reward choice", "expected a letter from A to Z");
  refused(dir, "rlhf best-of-n", flags + p + " --reward countdown",
          "p.jsonl:1: found no countdown");
  refused(dir, "rlhf best-of-n", flags + p + " --reward countdown",
          "; ...: found 40 of 40 problems that --reward or --gold cannot judge, expected none");
  refused(dir, "rlhf grpo", flags + p + " --reward number --map answer=id",
          "p.jsonl:1: found no id, expected the answer there, as --map says");
}

TEST_CASE("--bad-lines skip leaves bad problems out, says so, and counts them in metrics.jsonl") {
  const TempDir dir;
  std::string lines, words;
  for (int i = 0; i < 60; i++) words += " ask";
  for (int i = 0; i < 16; i++)
    lines += Json{{"problem", concat("ask ", i)}, {"sol", i}}.dump() + "\n";
  lines += Json{{"problem", "ask"}, {"sol", "none"}}.dump() + "\n";  // line 17
  lines += "{\"problem\": \"ask\n";
  lines += Json{{"prompt", "ask"}, {"chosen", "yes"}, {"rejected", "no"}}.dump() + "\n";
  lines += Json{{"title", "ask"}}.dump() + "\n";
  lines += Json{{"problem", words}, {"sol", 3}}.dump() + "\n";
  write_file(dir / "p.jsonl", lines);
  const std::string flags =
      " --max-tokens 6 --device cpu --save-minutes 0 --rollouts 8 --group 4 --steps 1 --prompts " +
      (dir / "p.jsonl").string() + " --reward number ";
  const std::string mapped = "--map answer=sol ";
  refused(dir, "rlhf grpo", flags + mapped, "p.jsonl:18");
  const Output o = good(stage("rlhf grpo", dir / "run", flags + mapped + "--bad-lines skip"));
  CHECK_MESSAGE(contains(o.text, "left out 4 of 21 records: bad line\n"), o.text);
  CHECK_MESSAGE(contains(o.text, "p.jsonl:17: answer: found \"none\", expected one number"),
                o.text);
  CHECK(contains(o.text, "left out 1 of 21 records: too long\n"));
  CHECK(contains(o.text, "  no room for 6 tokens behind them in the context of 96\n"));
  CHECK(contains(o.text, "keys    questions: problem; answers: sol\n"));
  CHECK(contains(o.text, "prompts 16, "));
  std::istringstream metrics(read_file(dir / "run" / "metrics.jsonl"));
  std::string first;
  std::getline(metrics, first);
  CHECK(Json::parse(first) == Json{{"step", 0},
                                   {"kind", "data"},
                                   {"records", 21},
                                   {"left_out", {{"bad line", 4}, {"too long", 1}}}});
}

TEST_CASE("critics and reward models have the policy's vocabulary and room for its answers") {
  const TempDir dir;
  const std::string narrow = reward_model(dir, "narrow", 16), wide = reward_model(dir, "wide");
  refused(dir, "rlhf grpo", kGrpo + "--reward model:" + narrow, "found a context of 16 tokens");
  refused(dir, "rlhf grpo", kGrpo + "--reward ended --gold model:" + narrow,
          "found a context of 16");
  const Output o =
      shell(stage("rlhf ppo", dir / "refused", kPpo + "--reward ended --critic " + narrow));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "found a context of 16 tokens, expected at least"), o.text);
  CHECK(!std::filesystem::exists(dir / "refused"));

  ScriptedModel other;  // with a tokenizer of its own
  const std::string strange = other_model(
      dir, "strange",
      [&](Config& c) { c.head = Head::scalar, c.V = other.tokenizer().vocab_size(); },
      other.dir() / "tokenizer");
  const Output critic =
      shell(stage("rlhf ppo", dir / "refused", kPpo + "--reward ended --critic " + strange));
  CHECK(critic.status == 1);
  CHECK_MESSAGE(contains(critic.text, "strange: found another vocabulary"), critic.text);
}

TEST_CASE("the critic begins as the reward model, and never as the judge of --gold") {
  const TempDir dir;
  const std::string judge = reward_model(dir, "judge");
  const auto explained = [&](const std::string& rewards) {
    const std::string out = dir / std::to_string(hash64(rewards));
    good(stage("rlhf ppo", out, kPpo + "--steps 1 " + rewards));
    return metrics(out, "explained_variance").at(0).at("explained_variance").get<double>();
  };
  // A head of zeros predicts 0 everywhere, which explains nothing.
  CHECK(explained("--reward rubric") == 0);
  CHECK(explained("--reward rubric --gold model:" + judge) == 0);
  CHECK(explained("--reward rubric --critic " + judge) != 0);
  CHECK(explained("--reward model:" + judge) != 0);
}

TEST_CASE("a program that judges is tried before the run; its failures save and stop") {
  const TempDir dir;
  refused(dir, "rlhf grpo", kGrpo + "--reward check:" + quoted("exit 3"),
          "--reward check: tried before the run with an empty completion, it ended");
  refused(dir, "rlhf grpo", kGrpo + "--reward check:" + quoted(program("r=.5; r=2")),
          "expected {\"id\": 0, \"reward\": 0 or 1}");

  // It breaks after 20 lines: in the third step of eight.
  const std::string broken = dir / "broken", fixed = dir / "fixed";
  const std::string breaks =
      program("n=$((n+1)); [ $n -gt 20 ] && [ ! -e " + fixed + " ] && touch " + broken + "; [ -e " +
                  broken + " ] && exit; r=$((n%3))",
              "n=0; ");
  const Output o = shell(
      stage("rlhf grpo", dir / "run", kGrpo + "--steps 5 --reward command:" + quoted(breaks)));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "failures in 8 rollouts, expected a fifth at most"), o.text);
  CHECK_MESSAGE(contains(o.text, "saved after step 2: --resume goes on"), o.text);
  std::filesystem::remove(broken);
  write_file(fixed, "");
  const Output rest = good("./rlhf grpo --resume -o " + (dir / "run").string());
  CHECK(contains(rest.text, "resumes after step 2 of 5"));
  CHECK(read_json(dir / "run/summary.json").at("steps") == 5);
}

TEST_CASE("--verifiers changes the time of a run and nothing else, and rewards have own names") {
  const TempDir dir;
  // Its reward is a function of the answer; it takes longer for some.
  const std::string slow = program("r=${#l}; [ $((r%3)) = 0 ] && sleep .01", "");
  const std::string seen = program("r=0; case $l in *record*rubric*) r=1;; esac", "");
  const std::string flags =
      kGrpo + "--steps 2 --reward command:" + quoted(slow) + " --reward .5*command:" + quoted(seen);
  good(stage("rlhf grpo", dir / "one", flags));
  good(stage("rlhf grpo", dir / "three", flags + " --verifiers 3"));
  const auto one = metrics(dir / "one", "rewards"), three = metrics(dir / "three", "rewards");
  REQUIRE(one.size() == 2);
  for (size_t i = 0; i < 2; i++) {
    CHECK(one[i].at("rewards") == three[i].at("rewards"));
    CHECK(one[i].at("rewards").at("command").at("std") > 0);
    CHECK(one[i].at("rewards").at("command 2").at("mean") == 1);  // it was given the whole record
    CHECK(one[i].at("grad_norm") == three[i].at("grad_norm"));
  }
  CHECK(read_file(dir / "one/model/model.safetensors") ==
        read_file(dir / "three/model/model.safetensors"));
}

TEST_CASE("a score is compared by its mean, right and wrong by its rate") {
  const TempDir dir;
  const std::string val = kGrpo + "--steps 1 --samples 2 --val " + file("prompts.jsonl") + " ";
  const auto evaluation = [&](const std::string& rewards) {
    const std::string out = dir / std::to_string(hash64(rewards));
    good(stage("rlhf grpo", out, val + rewards));
    return metrics(out, "val_reward").at(0);
  };
  const std::string score = program("r=$((${#l}%10))");
  CHECK(!evaluation("--reward command:" + quoted(score)).contains("pass1"));
  const std::string parity = program("r=$((${#l}%2))");
  CHECK(evaluation("--reward check:" + quoted(parity)).contains("pass1"));
  // Of several, the one of the largest weight
  CHECK(evaluation("--reward .1*length:2 --reward check:" + quoted(parity)).contains("pass1"));
  CHECK(!evaluation("--reward rubric --reward .1*check:" + quoted(parity)).contains("pass1"));
}

TEST_CASE("--resume refuses other flags and other prompts by name, and takes more steps") {
  const TempDir dir;
  const std::string prompts = dir / "prompts.jsonl", form = dir / "form.txt";
  std::filesystem::copy_file(file("prompts.jsonl"), prompts);
  write_file(form, "Q: {question}");
  for (const std::string command : {"grpo", "ppo"}) {
    CAPTURE(command);
    const std::string out = dir / command;
    good(stage(
        "rlhf " + command, out,
        " --max-tokens 6 --device cpu --save-minutes 0 --rollouts 8 --steps 2 --reward ended " +
            std::string("--form ") + form + " --stop x --val " + prompts + " --prompts " +
            prompts));
    const std::string resume = "./rlhf " + command + " --resume -o " + out + " ";
    const auto fails = [&](const std::string& flags, const std::string& part) {
      CAPTURE(flags);
      const Output o = shell(resume + flags);
      CHECK(o.status == 1);
      CHECK_MESSAGE(contains(o.text, part), o.text);
    };
    fails("--lr .5", "--lr: found .5 with --resume, expected none");
    fails("--epochs 3", "--epochs: found 3 with --resume");
    fails("--reward number", "--reward: found number with --resume");
    fails("--steps 1", "--resume: found a budget of 1 steps");
    write_file(form, "Other: {question}");
    fails("--steps 4", "found other prompts than the run began with");
    write_file(form, "Q: {question}");
    const std::string before = read_file(prompts);
    write_file(prompts, before + R"({"question":"one more"})" + "\n");
    fails("--steps 4", "found other prompts than the run began with");
    write_file(prompts, before);
    const Output more = good(resume + "--steps 4 --samples 2 --threads 1");
    CHECK(contains(more.text, "resumes after step 2 of 4"));
    CHECK(read_json(std::filesystem::path(out) / "summary.json").at("steps") == 4);
  }
}

TEST_CASE("a run of an older version, whose texts hold \\n as it was typed, resumes as it began") {
  const TempDir dir;
  const auto out = [&](const char* name) { return std::filesystem::path(dir / name); };
  for (const char* name : {"new", "old"}) {
    good(stage("rlhf grpo", out(name),
               kGrpo + "--steps 2 --reward ended '.1*format:*\\n*' --form 'Q: {question}\\nA:' " +
                   "--stop '\\n'"));
  }
  const std::filesystem::path path = out("old") / "model/trainer_state.json";
  Json state = read_json(path);
  Json& settings = state.at("settings");
  CHECK(settings.at("stops") == Json{"\n"});
  CHECK(settings.at("form") == "Q: {question}\nA:");
  settings.erase("records");  // which older versions did not have
  settings["stops"] = {"\\n"}, settings["form"] = "Q: {question}\\nA:";
  settings["rewards"] = {"ended", ".1*format:*\\n*"};
  write_json(path, state);
  for (const char* name : {"new", "old"}) {
    good("./rlhf grpo --resume --steps 4 -o " + out(name).string());
  }
  CHECK(read_file(out("old") / "model/model.safetensors") ==
        read_file(out("new") / "model/model.safetensors"));
  CHECK(read_json(path).at("settings").at("rewards").at(1) == ".1*format:*\n*");
}

TEST_CASE("--dry-run prints the plan and writes nothing, --minutes fits its steps") {
  const TempDir dir;
  const std::string out = dir / "run";
  for (const char* command : {"rlhf grpo", "rlhf ppo", "rlhf best-of-n"}) {
    const Output plan = good(stage(command, out, kShort + "--reward ended --dry-run"));
    CHECK(contains(plan.text, "policy  "));
    CHECK(!std::filesystem::exists(out));
  }
  const double began = now();
  const Output o = good(
      stage("rlhf grpo", out,
            kGrpo + "--reward rubric --entropy .01 --minutes .03 --val-fraction .3 --samples 1"));
  CHECK(now() - began < 6);
  const Json summary = read_json(dir / "run/summary.json");
  const int steps = summary.at("steps");
  CHECK(steps > 2);
  CHECK_MESSAGE(contains(o.text, concat(steps, " steps, each of")), o.text);
  // The clock decided their number and nothing else.
  good(stage("rlhf grpo", dir / "same",
             kGrpo + "--reward rubric --entropy .01 --val-fraction .3 --samples 1 --steps " +
                 std::to_string(steps)));
  CHECK(read_file(dir / "same/model/model.safetensors") ==
        read_file(dir / "run/model/model.safetensors"));
}

TEST_CASE("a run of RL that diverges names flags that it has") {
  const TempDir dir;
  const std::string huge = program("r=$((i%2))");
  const Output o = shell(stage("rlhf grpo", dir / "run",
                               kGrpo + "--truncated keep --reward 1e300*command:" + quoted(huge)));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "three gradients in a row were not finite"), o.text);
  CHECK_MESSAGE(contains(o.text, "--lr-scale 0.5, a longer --warmup, or --clip-norm .5"), o.text);
  const std::string help = good("./rlhf grpo --help-all").text;
  for (const char* flag : {"--lr-scale", "--warmup", "--clip-norm", "--verifiers", "no sandbox"}) {
    CHECK_MESSAGE(contains(help, flag), flag);
  }
}

TEST_CASE("a checkpoint without a key is named, with the key") {
  const TempDir dir;
  good(stage("rlhf grpo", dir / "run", kGrpo + "--steps 1 --reward ended"));
  const std::filesystem::path path = dir / "run/model/trainer_state.json";
  Json state = read_json(path);
  state.erase("reference");
  write_file(path, state.dump());
  const Output o = shell("./rlhf grpo --resume --steps 2 -o " + (dir / "run").string());
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "model/trainer_state.json: key 'reference' not found"), o.text);
}

TEST_CASE("--val-fraction holds prompts out, equal ones together") {
  const TempDir dir;
  const Output plan =
      good(stage("rlhf grpo", dir / "run", kGrpo + "--reward ended --val-fraction .3 --dry-run"));
  int trained = 0, held_out = 0;
  const size_t at = plan.text.find("prompts ");
  REQUIRE(std::sscanf(plan.text.c_str() + at, "prompts %d, held out %d", &trained, &held_out) == 2);
  CHECK(trained + held_out == 24);
  CHECK(trained > held_out);
  CHECK(held_out > 0);
}

TEST_CASE("--stop reads \\n as --form does") {
  ScriptedModel script;
  const Tokenizer& t = script.tokenizer();
  write_file(script.dir() / "p.jsonl", R"({"question":"6*7?","answer":"42"})"
                                       "\n");
  script.write(1 + int(t.encode("Q: 6*7?\nA:").size()), " 42.\n\nQ: and then");
  const std::string model = script.save();
  good(
      "./rlhf best-of-n --model " + model + " --prompts " + (script.dir() / "p.jsonl").string() +
      R"( --form 'Q: {question}\nA:' --stop '\n\n' --reward number --temperature .02 --samples 2)" +
      " --max-tokens 30 -o " + (script.dir() / "run").string());
  const Json found = metrics(script.dir() / "run", "chosen").at(0);
  CHECK(found.at("text") == " 42.");
  CHECK(found.at("ended").at(0) == true);
  CHECK(found.at("reward").at(0) == 1);
  CHECK(
      good("./chat generate " + model +
           " --prompt \"$(printf 'Q: 6*7?\\nA:')\" --temperature 0 --max-tokens 30 --stop '\\n\\n'")
          .text == "Q: 6*7?\nA: 42.\n");
}

TEST_CASE("--system and --as-chat make chats of strings") {
  const TempDir dir;
  write_file(dir / "p.jsonl", R"({"prompt":"ask 1"})"
                              "\n");
  const std::string flags = " --max-tokens 6 --samples 6 --reward 0*ended --prompts " +
                            (dir / "p.jsonl").string() + " --write ";
  good(stage("rlhf best-of-n", dir / "raw", flags + (dir / "raw.jsonl").string()));
  CHECK(contains(read_file(dir / "raw.jsonl"), "\"prompt\":\"ask 1\""));
  const std::string chats = dir / "chats.jsonl";
  const Output o = good(
      stage("rlhf best-of-n", dir / "chat", flags + chats + " --as-chat --system 'Be brief.'"));
  const std::string lines = read_file(chats);
  if (lines.empty()) return;  // no answer has ended
  const Json messages = Json::parse(lines).at("messages");
  CHECK(messages.at(0) == Json{{"role", "system"}, {"content", "Be brief."}});
  CHECK(messages.at(1) == Json{{"role", "user"}, {"content", "ask 1"}});
  CHECK(messages.at(2).at("role") == "assistant");
}

TEST_CASE("best-of-n overwrites its own files alone, and goes on with more prompts") {
  const TempDir dir;
  const std::string out = dir / "run";
  const std::string flags = kShort + "--reward ended --samples 2 --limit 4";
  good(stage("rlhf best-of-n", out, flags));
  write_file(dir / "run/notes.txt", "mine");
  good(stage("rlhf best-of-n", out, flags + " --overwrite"));
  CHECK(read_file(dir / "run/notes.txt") == "mine");
  const Output inside = shell(stage("rlhf best-of-n", world(), flags + " --overwrite"));
  CHECK(inside.status == 1);
  CHECK_MESSAGE(contains(inside.text, "which the run reads"), inside.text);
  const std::string resume = "./rlhf best-of-n --resume -o " + out;
  const Output other = shell(resume + " --max-tokens 9");
  CHECK(other.status == 1);
  CHECK_MESSAGE(contains(other.text, "--max-tokens: found 9 with --resume"), other.text);
  good(resume + " --limit 20");
  CHECK(metrics(dir / "run", "rewards").size() == 20);
  write_file(dir / "run/state.json", "{}");
  const Output broken = shell(resume);
  CHECK(broken.status == 1);
  CHECK_MESSAGE(contains(broken.text, "state.json: settings is missing"), broken.text);
}
