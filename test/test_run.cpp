// What every run promises, each through a binary as its user meets it: nothing of the user's is
// removed, a run that was ended anywhere goes on, other flags are refused, errors lose no steps.
#include <pty.h>

#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

#include "cake/json.h"
#include "cake/run.h"
#include "cake/schedule.h"
#include "test/support.h"

using namespace cake;

namespace {

// Token shards of a small text, their tokenizer, and a base model; made once.
const std::filesystem::path& material() {
  static const TempDir dir;
  static const std::filesystem::path path = [] {
    std::string text;
    for (int i = 0; i < 3000; i++)
      text += concat(i * 7919 % 1000, " is a number, says the baker.\n");
    write_file(dir / "text.txt", text);
    const std::string at = dir.path();
    const Output o = shell(concat(
        "./bpe train ", at, "/text.txt --vocab-size 320 --pattern qwen2 -o ", at, "/tokenizer && ",
        "./bpe encode ", at, "/tokenizer ", at, "/text.txt --val-fraction .1 -o ", at, "/data && ",
        "./train_gpt --data ", at, "/data -o ", at,
        "/base --steps 2 --layers 1 --channels 32 --context 64 --batch-tokens 256"));
    REQUIRE_MESSAGE(o.status == 0, o.text);
    std::string lines;
    for (int i = 0; i < 60; i++) {
      lines += concat(R"({"prompt":"number )", i, R"(","completion":" is )", i % 7, "\"}\n");
    }
    write_file(dir / "examples.jsonl", lines);
    return dir.path();
  }();
  return path;
}

std::string pretrain(const std::string& out, const std::string& flags) {
  return concat("./train_gpt --data ", (material() / "data").string(), " -o ", out,
                " --layers 1 --channels 32 --context 32 ",
                contains(flags, "--batch-tokens") ? "" : "--batch-tokens 64 ", flags);
}

std::string finetune(const std::string& out, const std::string& flags) {
  return concat("./sft --model ", (material() / "base").string(), " --data ",
                (material() / "examples.jsonl").string(), " -o ", out,
                " --batch-tokens 64 --context 64 --optimizer adamw ", flags);
}

// The one line of a command that fails.
std::string error_line(const std::string& command) {
  const Output o = shell(command);
  CHECK(o.status == 1);
  CHECK_MESSAGE(std::count(o.text.begin(), o.text.end(), '\n') == 1, o.text);
  CHECK(o.text.starts_with("error: "));
  return o.text;
}

std::vector<Json> metrics(const std::filesystem::path& run) {
  std::vector<Json> lines;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// What --overwrite and two processes must not do

TEST_CASE("--overwrite removes a run's own files and nothing else") {
  const TempDir dir;
  const std::string out = dir / "run";
  REQUIRE(shell(pretrain(out, "--steps 2 --save-every 1 --keep-checkpoints 1")).status == 0);
  REQUIRE(std::filesystem::exists(dir / "run/model-1"));
  write_file(dir / "run/notes.txt", "mine");
  write_file(dir / "run/model.txt", "mine too");
  write_file(dir / "run/model-first.old", "and this");
  REQUIRE(shell(pretrain(out, "--steps 3 --overwrite")).status == 0);
  CHECK(read_file(dir / "run/notes.txt") == "mine");
  CHECK(read_file(dir / "run/model.txt") == "mine too");
  CHECK(read_file(dir / "run/model-first.old") == "and this");
  CHECK(!std::filesystem::exists(dir / "run/model-1"));
  CHECK(read_json(dir / "run/summary.json").at("steps") == 3);
}

TEST_CASE("--overwrite refuses where an input is, or lies inside, -o; and another stage's run") {
  const TempDir dir;
  const std::string model = dir / "m";
  std::filesystem::copy(material() / "base/model", model);  // a directory as Hugging Face has it
  std::filesystem::create_directories(dir / "runs");
  std::filesystem::copy(material() / "base", dir / "runs/base",
                        std::filesystem::copy_options::recursive);
  const auto tree = files_below(dir.path());
  const std::string examples = material() / "examples.jsonl";
  const auto refuse = [&](const std::string& from, const std::string& out) {
    const std::string line = error_line(concat("./sft --model ", from, " --data ", examples, " -o ",
                                               out, " --steps 1 --overwrite"));
    CHECK(contains(line, "which the run reads; expected another directory"));
  };
  refuse(model, model);
  refuse(model, model + "/");
  refuse(dir / "runs/base", dir / "runs");
  refuse(dir / "runs/base", dir / "runs/base/model");
  refuse(dir / "runs/base", dir / "runs/../runs/base");
  refuse(model, dir.path().string());
  CHECK(contains(error_line(concat("./sft --model ", model, " --data ", examples, " -o ",
                                   dir / "runs/base", " --steps 1 --overwrite")),
                 "found the state of pretraining, expected that of fine-tuning"));
  CHECK(contains(error_line(concat("./train_gpt --data ", (material() / "data").string(), " -o ",
                                   material().string(), " --steps 1 --overwrite")),
                 "which the run reads"));
  CHECK(files_below(dir.path()) == tree);
}

TEST_CASE("two processes cannot write one run") {
  const TempDir dir;
  const std::string out = dir / "run";
  REQUIRE(shell(pretrain(out, "--steps 2")).status == 0);
  const auto tree = files_below(out);
  const RunLock lock(out);
  CHECK(contains(error_line(concat("./train_gpt --resume --steps 4 -o ", out)),
                 "another process is writing this run"));
  CHECK(contains(error_line(pretrain(out, "--steps 2 --overwrite")), "another process"));
  CHECK(files_below(out) == tree);
}

// ---------------------------------------------------------------------------------------------
// A run that is ended

TEST_CASE("pretraining ended at any change of the disk goes on to the same bytes") {
  const TempDir dir;
  end_at_every_change(dir.path(), "./train_gpt --resume -o", [](const std::string& out) {
    return pretrain(out, "--steps 3 --save-every 1 --sample-every 9 --keep-checkpoints 1");
  });
}

TEST_CASE(
    "fine-tuning ended at any change of the disk goes on to the same bytes, best weights too") {
  const TempDir dir;
  end_at_every_change(dir.path(), "./sft --resume -o", [](const std::string& out) {
    // a rate at which the first step's weights are the best
    return finetune(
        out, "--steps 3 --save-every 1 --eval-every 1 --patience 9 --lr .3 --schedule constant");
  });
}

TEST_CASE("every other stage ended at any change of the disk goes on to the same bytes") {
  const std::string base = material() / "base", pairs = material() / "pairs.jsonl",
                    prompts = material() / "prompts.jsonl";
  std::string lines, questions;
  for (int i = 0; i < 40; i++) {
    lines += concat(R"({"prompt":"number )", i, R"(","chosen":" is it","rejected":" was )", i % 7,
                    "\"}\n");
    questions += concat(R"({"prompt":"number )", i, "\"}\n");
  }
  write_file(pairs, lines), write_file(prompts, questions);
  const std::string learn = concat(" --model ", base, " --data ", pairs,
                                   " --steps 3 --save-every 1 --eval-every 1 --batch 8 -o ");
  const std::string reinforce =
      concat(" --model ", base, " --prompts ", prompts, " --val ", prompts,
             " --reward length:2 --max-tokens 4 --rollouts 8 --steps 3 --save-every 1"
             " --eval-every 1 --limit 8 --lr .001 --keep best -o ");
  const std::pair<std::string, std::string> stages[] = {{"./reward train", learn},
                                                        {"./reward dpo", learn},
                                                        {"./rlhf ppo", reinforce},
                                                        {"./rlhf grpo", " --group 4" + reinforce}};
  for (const auto& stage : stages) {
    CAPTURE(stage.first);
    const TempDir dir;
    end_at_every_change(dir.path(), stage.first + " --resume -o",
                        [&](const std::string& out) { return stage.first + stage.second + out; });
  }
}

TEST_CASE("Ctrl+C before the first step says that nothing was saved") {
  const TempDir dir;
  const std::string out = dir / "run";
  // While the speed is measured, for ten seconds here, nothing is written yet.
  const Output o =
      shell(concat("timeout --foreground --preserve-status -s INT 1 ",
                   pretrain(out, "--minutes 30 --batch-tokens 65536 --micro-batch-tokens 16384")));
  CHECK_MESSAGE(contains(o.text, "stopped before the first step: nothing was written"), o.text);
  CHECK(o.status == 128 + SIGINT);
  CHECK(!std::filesystem::exists(out));
}

TEST_CASE("a signal while files are read ends a stage with its number, and nothing is written") {
  // A pipe without an end: the stage is still reading when the signal comes.
  const TempDir dir;
  const Output o = shell(
      "yes '{\"prompt\":\"a\",\"completion\":\"b\"}' | timeout --foreground "
      "--preserve-status -s INT .5 ./sft --model test/golden/eval_model --data - -o " +
      (dir / "run").string());
  CHECK(o.status == 128 + SIGINT);
  CHECK_MESSAGE(contains(o.text, "stopped\n"), o.text);
  CHECK(!std::filesystem::exists(dir / "run"));
  stop_signal = SIGTERM;
  CHECK(guarded_main([]() -> int { throw Interrupted(); }) == 128 + SIGTERM);
  stop_signal = 0;
}

TEST_CASE("an error in the middle of a run saves what is done, and --resume goes on from there") {
  const TempDir dir;
  const std::string flags = "--steps 400 --lora 1 --eval-every 999 --sample-every 999";
  REQUIRE(shell(finetune(dir / "whole", flags)).status == 0);
  // A limit that metrics.jsonl reaches, and the files of the adapters do not.
  const Output o = shell("ulimit -f 100; trap '' XFSZ; " + finetune(dir / "run", flags));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "metrics.jsonl: cannot write"), o.text);
  CHECK_MESSAGE(contains(o.text, "; saved after step "), o.text);
  REQUIRE(shell(concat("./sft --resume -o ", (dir / "run").string())).status == 0);
  CHECK(read_file(dir / "run/model/adapter_model.safetensors") ==
        read_file(dir / "whole/model/adapter_model.safetensors"));
}

// ---------------------------------------------------------------------------------------------
// --resume with flags

TEST_CASE("a run chooses its micro-batch once: printed, stored, and the same on resume") {
  const TempDir dir;
  const std::string whole = dir / "whole", printed = " (--micro-batch-tokens)";
  // 320 windows of 32 tokens, at most 128 of them at once: in three nearly equal parts.
  const Output o =
      shell(pretrain(whole, "--batch-tokens 10240 --steps 4 --save-every 2 --keep-checkpoints 1"));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK_MESSAGE(contains(o.text, "micro-batches of 3424 tokens" + printed), o.text);
  const auto stored = [](const std::string& run) {
    const Json state = read_json(run + "/model/trainer_state.json");
    return state.at("settings").at("micro_batch_tokens").get<int64_t>();
  };
  CHECK(stored(whole) == 3424);
  const auto after_two_steps = [&](const std::string& name, int64_t tokens) {
    const std::string run = dir / name;
    std::filesystem::create_directories(run);
    std::filesystem::copy(whole + "/model-2", run + "/model",
                          std::filesystem::copy_options::recursive);
    Json state = read_json(run + "/model/trainer_state.json");
    state["settings"]["micro_batch_tokens"] = tokens;
    write_json(run + "/model/trainer_state.json", state);
    return run;
  };
  const std::string same = after_two_steps("same", 3424);
  const Output resumed = shell("./train_gpt --resume -o " + same);
  REQUIRE_MESSAGE(resumed.status == 0, resumed.text);
  CHECK(contains(resumed.text, "micro-batches of 3424 tokens" + printed));
  CHECK(!contains(resumed.text, "last bits"));
  CHECK(read_file(same + "/model/model.safetensors") ==
        read_file(whole + "/model/model.safetensors"));
  // Another size is an explicit choice.
  const std::string other = after_two_steps("other", 3424);
  const Output changed = shell(concat("./train_gpt --resume --micro-batch-tokens 1024 -o ", other));
  REQUIRE_MESSAGE(changed.status == 0, changed.text);
  CHECK(contains(changed.text, "the last bits of updates may differ"));
  CHECK(stored(other) == 1024);
  // On a machine with less memory: the error names a size that fits, and it is one.
  const std::string large = after_two_steps("large", 1 << 30);
  const std::string error = error_line("./train_gpt --resume -o " + large);
  CHECK_MESSAGE(contains(error, "micro-batches of 1073741824 tokens, with which the run was begun"),
                error);
  CHECK_MESSAGE(contains(error, "--resume with --micro-batch-tokens 4096 goes on"), error);
  CHECK(shell(concat("./train_gpt --resume --micro-batch-tokens 4096 -o ", large)).status == 0);
}

TEST_CASE("every stage that trains prints the micro-batch that it chose") {
  write_file(material() / "problems.jsonl", R"({"question":"1 + 1?","answer":"2"})"
                                            "\n");
  write_file(material() / "pairs.jsonl", R"({"prompt":"a","chosen":" b","rejected":" c"})"
                                         "\n"
                                         R"({"prompt":"d","chosen":" e","rejected":" f"})"
                                         "\n");
  const std::string model = " --device cpu --dry-run --model " + (material() / "base").string(),
                    pairs =
                        model + " --val-fraction 0 --data " + (material() / "pairs.jsonl").string(),
                    problems = model + " --reward number --max-tokens 8 --prompts " +
                               (material() / "problems.jsonl").string();
  for (const auto& [command, models] :
       {std::pair("./sft" + model + " --batch-tokens 8192 --steps 1 --data " +
                      (material() / "examples.jsonl").string(),
                  ""),
        std::pair("./reward train" + pairs, ""), std::pair("./reward dpo" + pairs, ", reference "),
        std::pair("./rlhf grpo" + problems, ", reference "),
        std::pair("./rlhf ppo" + problems, ", critic ")}) {
    const Output o = shell(command);
    CHECK_MESSAGE(o.status == 0, o.text);
    CHECK_MESSAGE(contains(o.text, "micro-batches of 4096 tokens (--micro-batch-tokens)"), o.text);
    CHECK_MESSAGE(contains(o.text.substr(o.text.find("\nmemory ")), models), o.text);
  }
}

TEST_CASE("--resume refuses every flag that would change the run, by name") {
  const TempDir dir;
  const std::string out = dir / "run", tuned = dir / "tuned";
  REQUIRE(shell(pretrain(out, "--steps 2")).status == 0);
  REQUIRE(shell(finetune(tuned, "--steps 2")).status == 0);
  const auto refuse = [&](const std::string& flag, const std::string& value) {
    const std::string line =
        error_line(concat("./train_gpt --resume -o ", out, " --steps 4 ", flag, " ", value));
    CHECK_MESSAGE(contains(line, concat(flag, ": found ", value, " with --resume")), line);
  };
  refuse("--lr", "0.5");
  refuse("--batch-tokens", "512");
  refuse("--seed", "2");
  refuse("--layers", "2");
  refuse("--schedule", "cosine");
  refuse("--data", "elsewhere");
  CHECK(contains(error_line(concat("./sft --resume -o ", tuned, " --lora 2")),
                 "--lora: found 2 with --resume"));
  CHECK(contains(error_line(concat("./sft --resume -o ", tuned, " --steps 1")),
                 "expected at least the 2 that are done"));
  // the same values, and what changes no update, are fine
  const Output same =
      shell(concat("./train_gpt --resume -o ", out, " --layers 1 --seed 1 --steps 2 --device cpu",
                   " --threads 1 --eval-every 1 --save-every 1 --keep-checkpoints 1"));
  CHECK(same.status == 0);
  CHECK(contains(same.text, "is finished: 2 steps"));
}

TEST_CASE("--resume --dry-run prints the plan of what is left, and changes nothing") {
  const TempDir dir;
  const std::string out = dir / "run";
  CHECK(contains(error_line("./train_gpt --resume --dry-run"), "-o: missing"));
  REQUIRE(shell(pretrain(out, "--steps 2")).status == 0);
  std::filesystem::create_directories(dir / "run/best");  // as a kill at the end leaves it
  write_file(dir / "run/best/config.json", "{}");
  const auto tree = files_below(out);
  const std::string dry_run = concat("./train_gpt --resume --dry-run -o ", out);
  CHECK(contains(shell(dry_run).text, "is finished: 2 steps"));
  CHECK(contains(shell(dry_run + " --steps 7").text, "budget  7 steps"));
  CHECK(files_below(out) == tree);
}

TEST_CASE("--resume --steps MORE goes on with the schedule of the new total, and says so") {
  const TempDir dir;
  const std::string whole = dir / "whole", out = dir / "run";
  REQUIRE(shell(pretrain(whole, "--steps 60")).status == 0);
  // stopped long before its end, a run with a new total has the new total's rates from there on
  int status = 0;
  REQUIRE(interrupt(pretrain(out, "--steps 40000"), out, 20, SIGTERM, &status));
  const auto done = int(metrics(out).back().at("step"));
  const int total = done + 50;
  const Output o = shell(concat("./train_gpt --resume -o ", out, " --steps ", total));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK(read_json(dir / "run/summary.json").at("steps") == total);
  // a finished run, too: its rate was near the floor, and rises
  const Output more = shell(concat("./train_gpt --resume -o ", whole, " --steps 120"));
  REQUIRE_MESSAGE(more.status == 0, more.text);
  CHECK(contains(more.text, "the learning rate rises from "));
  CHECK(contains(more.text, ": 60 steps were planned, now 120"));
  CHECK(contains(more.text, "the optimizer's moments begin at zero"));
  double rate = 0;
  for (const Json& line : metrics(whole)) {
    if (line.at("kind") == "step" && line.at("step") == 61) rate = line.at("lr");
  }
  const double peak = metrics(whole).front().at("lr");  // warmup is one step
  const Schedule schedule{"linear", 120, 1, .8, 0};
  CHECK(rate == doctest::Approx(peak * schedule.at(61)));
}

TEST_CASE("a run of the version before goes on, with the new schedule, and says so") {
  const TempDir dir;
  const std::string out = dir / "run";
  int status = 0;
  REQUIRE(interrupt(pretrain(out, "--steps 4000"), out, 20, SIGTERM, &status));
  const std::filesystem::path path = dir / "run/model/trainer_state.json";
  Json state = read_json(path);
  const auto step = state.at("step").get<int64_t>();
  for (const char* key : {"version", "evaluated", "moments_since"}) state.erase(key);
  Json& settings = state["settings"];  // whose parts stood beside each other
  const Json optimizer = settings["optimizer"], budget = settings["budget"];
  settings.update(budget), settings.update(optimizer);
  settings.erase("budget"), settings.erase("name");
  settings["optimizer"] = optimizer.at("name");
  write_file(path, state.dump());
  const std::string lines = read_file(dir / "run/metrics.jsonl");
  write_file(dir / "run/metrics.jsonl",
             std::regex_replace(lines, std::regex("\"kind\":\"step\","), ""));
  const Output o = shell(concat("./train_gpt --resume -o ", out, " --steps ", step + 2));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK(contains(o.text, "begun with an older version: the schedule now reaches its floor"));
  CHECK(metrics(out).front().at("step") == 1);
}

TEST_CASE("a resumed run of --minutes evaluates on as many tokens as before") {
  const TempDir dir;
  const std::string out = dir / "run";
  int status = 0;
  REQUIRE(interrupt(pretrain(out, "--minutes .1 --eval-every 5"), out, 40, SIGTERM, &status));
  REQUIRE(shell(concat("./train_gpt --resume -o ", out, " --eval-every 5")).status == 0);
  std::set<int64_t> tokens;
  for (const Json& line : metrics(out)) {
    if (line.at("kind") == "eval") tokens.insert(line.at("val_tokens").get<int64_t>());
  }
  CHECK(tokens.size() == 1);
}

TEST_CASE("--resume --epochs and --minutes give a run more, and metrics keep their lines") {
  const TempDir dir;
  const std::string out = dir / "tuned";
  REQUIRE(shell(finetune(out, "--epochs 1")).status == 0);
  const auto steps = read_json(dir / "tuned/summary.json").at("steps").get<int>();
  const size_t lines = metric_lines(out);
  const Output o = shell(concat("./sft --resume -o ", out, " --epochs 2"));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK(read_json(dir / "tuned/summary.json").at("steps") == 2 * steps);
  CHECK(metric_lines(out) > lines + size_t(steps));
}

// ---------------------------------------------------------------------------------------------
// Schedules, metrics, the progress line

TEST_CASE("a run of one step moves the weights") {
  const TempDir dir;
  for (const char* schedule : {"linear", "cosine"}) {
    const std::string one = dir / concat(schedule, "1"), small = dir / concat(schedule, "0");
    REQUIRE(shell(pretrain(one, concat("--steps 1 --warmup 0 --final-lr 0 --schedule ", schedule)))
                .status == 0);
    REQUIRE(
        shell(pretrain(small, concat("--steps 1 --warmup 0 --lr-scale 1e-9 --schedule ", schedule)))
            .status == 0);
    CHECK(read_file(one + "/model/model.safetensors") !=
          read_file(small + "/model/model.safetensors"));
    CHECK(metrics(one).front().at("lr") > 0);
  }
}

TEST_CASE("metrics are JSON with a kind, a rate and a speed, also where a number is not finite") {
  const TempDir dir;
  const std::string out = dir / "run";
  // A rate at which weights overflow: the gradient is not finite before the run ends.
  const Output o = shell(pretrain(out, "--steps 30 --lr 1e30 --optimizer adamw --clip-norm 0"));
  CHECK(o.status == 1);
  CHECK(contains(o.text, "--lr-scale"));
  bool found_null = false;
  for (const Json& line : metrics(out)) {  // parses every line
    CHECK(line.contains("kind"));
    found_null |= line.contains("loss") && line.at("loss").is_null();
  }
  CHECK(found_null);
  REQUIRE(shell(finetune(dir / "tuned", "--steps 3 --eval-every 1")).status == 0);
  std::map<std::string, int> kinds;
  for (const Json& line : metrics(dir / "tuned")) {
    kinds[line.at("kind")]++;
    if (line.at("kind") != "step") continue;
    CHECK(line.at("lr").get<double>() > 0);
    CHECK(line.at("seconds").get<double>() > 0);
    CHECK(line.at("tokens_per_second").get<double>() > 0);
  }
  CHECK(kinds == std::map<std::string, int>{{"data", 1}, {"eval", 3}, {"final", 1}, {"step", 3}});
}

TEST_CASE("the progress line is cut to the terminal's width") {
  const TempDir dir;
  struct winsize size = {};
  size.ws_row = 24, size.ws_col = 30;
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  REQUIRE(child >= 0);
  if (child == 0) {
    const std::string command = "exec " + pretrain(dir / "run", "--steps 9 --sample-every 99");
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(127);
  }
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(terminal, buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  close(terminal);
  CHECK(WEXITSTATUS(status) == 0);
  int lines = 0;
  for (size_t i = 0; (i = text.find("\rstep ", i)) != std::string::npos; i++, lines++) {
    CHECK(text.find("\033[K", i) - (i + 1) == 29);
  }
  CHECK(lines == 9);
}

TEST_CASE("a line is cut between characters") {
  CHECK(cut_to_width("abcdef", 4) == "abcd");
  CHECK(cut_to_width("abc", 4) == "abc");
  CHECK(cut_to_width("ééé", 2) == "éé");
}

TEST_CASE("earlier checkpoints are kept as whole models, as many as asked for") {
  const TempDir dir;
  const std::string out = dir / "run";
  REQUIRE(shell(pretrain(out, "--steps 6 --save-every 1 --keep-checkpoints 2")).status == 0);
  CHECK(!std::filesystem::exists(dir / "run/model-2"));
  CHECK(std::filesystem::exists(dir / "run/model-3/config.json"));
  const Output o =
      shell(concat("./chat generate ", dir / "run/model-4", " --prompt a --max-tokens 2"));
  CHECK_MESSAGE(o.status == 0, o.text);
}
