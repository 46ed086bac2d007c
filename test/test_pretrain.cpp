// The pretraining loop as its user meets it: the binaries ./bpe and ./train_gpt, run in a temporary
// directory on a text made here.
#include <fstream>
#include <sstream>

#include "cake/json.h"
#include "cake/schedule.h"
#include "cake/training.h"
#include "test/support.h"

using namespace cake;

namespace {

// Sentences of a small grammar: something to learn, different at every seed.
std::string text_of(uint64_t seed, int sentences) {
  const char* who[] = {"the baker", "a sailor", "my aunt", "the judge", "one painter"};
  const char* does[] = {"sees", "likes", "paints", "forgets", "buys"};
  const char* what[] = {"apples", "the sea", "old books", "a grey cat", "bread"};
  Rng rng{seed};
  std::string text;
  for (int i = 0; i < sentences; i++) {
    text += concat(who[rng.below(5)], " ", does[rng.below(5)], " ", what[rng.below(5)], ".\n");
  }
  return text;
}

// Token shards of such a text, made once for all tests of this file.
const std::string& data_prefix() {
  static const TempDir dir;
  static const std::string prefix = [&] {
    const std::string text = dir / "text.txt";
    write_file(text, text_of(1, 4000));
    const Output train = shell(concat("./bpe train ", text, " --vocab-size 320 --pattern qwen2 -o ",
                                      (dir / "tokenizer").string()));
    REQUIRE_MESSAGE(train.status == 0, train.text);
    const std::string data = dir / "data";
    const Output encode = shell(concat("./bpe encode ", (dir / "tokenizer").string(), " ", text,
                                       " --val-fraction .1 -o ", data));
    REQUIRE_MESSAGE(encode.status == 0, encode.text);
    return data;
  }();
  return prefix;
}

std::string train_command(const std::string& out, const std::string& flags, int steps = 120) {
  return concat(
      "./train_gpt --data ", data_prefix(), " -o ", out, " --steps ", steps,
      " --layers 1 --channels 32 --context 32 --batch-tokens 256 --micro-batch-tokens 128 ", flags);
}

}  // namespace

TEST_CASE("the linear schedule rises, stays, and falls on a line, one step short of its floor") {
  const Schedule s{"linear", 100, 10, .5, .1};
  CHECK(s.at(1) == .1);
  CHECK(s.at(10) == 1);
  CHECK(s.at(51) == 1);
  CHECK(s.at(76) == doctest::Approx(.1 + .9 * .5));
  CHECK(s.at(100) == doctest::Approx(.1 + .9 * .02));
  CHECK(s.at(101) == doctest::Approx(.1));
}

TEST_CASE("no step has the rate 0, in runs of any length") {
  for (const char* shape : {"linear", "cosine", "constant"}) {
    for (const int64_t steps : {1, 2, 3, 100, 100000}) {
      for (const double warmdown : {.01, .4, 1.}) {
        for (const int64_t warmup : {int64_t(0), int64_t(1), steps / 2, steps}) {
          const Schedule s{shape, steps, warmup, warmdown, 0};
          for (int64_t n = 1; n <= steps; n += std::max<int64_t>(1, steps / 200))
            CHECK(s.at(n) > 0);
          CHECK(s.at(steps) > 0);
        }
      }
    }
  }
}

TEST_CASE("the cosine schedule is halfway at half of its steps, the constant one never moves") {
  const Schedule s{"cosine", 109, 10, 0, .2};
  CHECK(s.at(10) == 1);
  CHECK(s.at(60) == doctest::Approx(.6));
  CHECK(s.at(110) == doctest::Approx(.2));
  CHECK(Schedule{"constant", 100, 0}.at(100) == 1);
}

TEST_CASE("sizes grow with depth, and every head size divides the width") {
  int before = 0;
  for (int depth = 1; depth <= 40; depth++) {
    const int C = width_of_depth(depth);
    CHECK(C >= before);
    before = C;
    const Config c = new_config(Family::qwen3, depth, C, 1000, 256);
    CAPTURE(depth);
    CHECK(c.NH * c.HS == C);
    c.check("depth");
  }
  CHECK(width_of_depth(4) == 128);
  CHECK(width_of_depth(12) == 768);
}

namespace {

// An engine whose updates are numbered: what update n tells is n.
class NumberedGpt : public FakeGpt {
 public:
  using FakeGpt::FakeGpt;
  void update(const OptimizerStep&) override { updates_++; }
  UpdateStats stats(int updates_ago) override {
    const double n = updates_ - updates_ago;
    return {.grad_norm = n, .skipped = n == 3, .loss = n == nan_at ? NAN : 1 / n};
  }
  bool queues_work() const override { return queues; }
  int nan_at = -1;
  int64_t unwritten_at = -1;  // the step whose line finds a full disk
  bool queues = true;

 private:
  int updates_ = 0;
};

// A run of 10 steps that saves after step 7 and evaluates after step 4; `events` says in which
// order it queues steps (q), reads their statistics (s), evaluates (e) and saves (w).
struct NumberedRun {
  TempDir dir;
  NumberedGpt gpt;
  Run run;
  std::string events;

  explicit NumberedRun(int interrupted_at = -1)
      : gpt(Config{.V = 8, .T = 8, .L = 1, .C = 4, .NH = 1, .NKV = 1, .HS = 4, .F = 4}) {
    const auto event = [this](char what, int64_t n) { events += concat(what, n, " "); };
    run.stage = "test", run.steps = 10;
    run.options.out = dir.path(), run.options.save_every = 7;
    run.hooks.model = [this]() -> Gpt& { return gpt; };
    run.hooks.evaluates = [](int64_t n) { return n == 4; };
    run.hooks.evaluate = [event](int64_t n) {
      if (n == 4) event('e', n);
    };
    run.hooks.state = [this, event] {
      event('w', run.state.step);
      return OrderedJson::object();
    };
    run.hooks.save_options = [](bool) { return SaveOptions(); };
    run.hooks.step = [this, event, interrupted_at](int64_t n) {
      if (n == interrupted_at) throw Interrupted();
      event('q', n);
      gpt.update({});
      StepResult r;
      r.add_stats = [this, event, n](StepResult& result, const UpdateStats& stats) {
        event('s', n);
        if (n == gpt.unwritten_at) fail("metrics.jsonl: no space left");
        CHECK(stats.grad_norm == double(n));
        result.loss = stats.loss, result.skipped = stats.skipped;
        result.metrics = {{"norm", stats.grad_norm}};
      };
      return r;
    };
    run.metrics.open(dir / "metrics.jsonl", 0);
  }
};

}  // namespace

TEST_CASE("a step's statistics are read once the next is queued, unless the model is looked at") {
  NumberedRun r;
  CHECK(run_loop(r.run, now()));
  CHECK(r.events == "q1 q2 s1 q3 s2 q4 s3 s4 e4 q5 q6 s5 q7 s6 s7 w7 q8 q9 s8 q10 s9 s10 ");
  std::istringstream lines(read_file(r.dir / "metrics.jsonl"));
  std::string line;
  int n = 0;
  while (std::getline(lines, line)) {
    const Json row = Json::parse(line);
    CHECK(row.at("step") == ++n);
    CHECK(row.at("norm") == n);
    CHECK(row.contains("skipped") == (n == 3));
  }
  CHECK(n == 10);
}

TEST_CASE("a run that ends early has read the statistics of every update it made") {
  NumberedRun immediate;
  immediate.gpt.queues = false;
  CHECK(run_loop(immediate.run, now()));
  CHECK(immediate.events == "q1 s1 q2 s2 q3 s3 q4 s4 e4 q5 s5 q6 s6 q7 s7 w7 q8 s8 q9 s9 q10 s10 ");
  NumberedRun diverged;
  diverged.gpt.nan_at = 5;
  CHECK(contains(error_of([&] { run_loop(diverged.run, now()); }), "step 5: the loss is nan"));
  CHECK(diverged.events == "q1 q2 s1 q3 s2 q4 s3 s4 e4 q5 q6 s5 ");
  NumberedRun interrupted(7);
  CHECK_THROWS_AS(run_loop(interrupted.run, now()), Interrupted);
  CHECK(interrupted.events == "q1 q2 s1 q3 s2 q4 s3 s4 e4 q5 q6 s5 s6 ");
  CHECK(interrupted.run.state.step == 6);  // which a checkpoint would be of
  NumberedRun unwritten;
  unwritten.gpt.unwritten_at = 5;
  CHECK(contains(error_of([&] { run_loop(unwritten.run, now()); }), "no space left"));
  CHECK(unwritten.events == "q1 q2 s1 q3 s2 q4 s3 s4 e4 q5 q6 s5 ");
  CHECK(unwritten.run.state.step ==
        6);  // whose weights there are: resumed, step 6 is not done again
}

TEST_CASE("--overwrite keeps the old run until another can begin") {
  const TempDir dir;
  const std::string out = dir / "run";
  REQUIRE(shell(train_command(out, "", 2)).status == 0);
  const std::string weights = read_file(out + "/model/model.safetensors");
  const Output huge = shell(concat("./train_gpt --data ", data_prefix(), " -o ", out,
                                   " --overwrite --layers 90 --channels 16384 --context 32"
                                   " --steps 2 --device cpu"));
  CHECK(huge.status == 1);
  CHECK(contains(huge.text, "error: out of memory"));
  CHECK(read_file(out + "/model/model.safetensors") == weights);
  CHECK(metric_lines(out) > 0);
  REQUIRE(shell(train_command(out, "--overwrite", 3)).status == 0);
  CHECK(read_file(out + "/model/model.safetensors") != weights);
}

TEST_CASE("training learns, and writes a model, metrics and a summary") {
  const TempDir dir;
  const std::string out = dir / "run";
  const Output o = shell(train_command(out, ""));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  const Json summary = read_json(dir / "run/summary.json");
  CHECK(summary.at("steps") == 120);
  // three choices of five a sentence are 7 bits; chance over 320 ids would be above 3 bits a byte
  CHECK(summary.at("val_bits_per_byte").get<double>() < 1);
  CHECK(summary.at("val_bits_per_byte").get<double>() > .2);
  CHECK(losses(out).size() == 120 + 10);
  CHECK(std::filesystem::exists(dir / "run/model/config.json"));
  CHECK(std::filesystem::exists(dir / "run/model/tokenizer.json"));
  CHECK(contains(o.text, "--steps 120"));
}

TEST_CASE("a run killed at any moment and resumed equals one that never stopped") {
  const TempDir dir;
  const Output whole = shell(train_command(dir / "whole", ""));
  REQUIRE_MESSAGE(whole.status == 0, whole.text);
  const uint64_t seed = uint64_t(getpid());
  Rng rng{seed};
  CAPTURE(seed);
  const std::string out = dir / "killed";
  // --save-every 7: the last checkpoint lies behind the step that was killed
  const size_t first = 10 + rng.below(40), second = first + 10 + rng.below(40);
  CAPTURE(first);
  CAPTURE(second);
  int status = 0;
  REQUIRE(interrupt(train_command(out, "--save-every 7"), out, first, SIGKILL, &status));
  REQUIRE(interrupt(concat("./train_gpt --resume -o ", out, " --save-every 7"), out, second,
                    SIGKILL, &status));
  const Output resumed = shell(concat("./train_gpt --resume -o ", out));
  REQUIRE_MESSAGE(resumed.status == 0, resumed.text);
  CHECK(losses(dir / "killed") == losses(dir / "whole"));
  CHECK(read_file(dir / "killed/model/model.safetensors") ==
        read_file(dir / "whole/model/model.safetensors"));
  CHECK(contains(shell(concat("./train_gpt --resume -o ", out)).text, "is finished"));
}

TEST_CASE("SIGTERM saves first, and the resumed run equals one that never stopped") {
  const TempDir dir;
  REQUIRE(shell(train_command(dir / "whole", "--optimizer adamw")).status == 0);
  const std::string out = dir / "stopped";
  int status = 0;
  REQUIRE(interrupt(train_command(out, "--optimizer adamw"), out, 30, SIGTERM, &status));
  CHECK(WEXITSTATUS(status) == 128 + SIGTERM);
  REQUIRE(std::filesystem::exists(dir / "stopped/model/trainer_state.json"));
  REQUIRE(shell(concat("./train_gpt --resume -o ", out)).status == 0);
  CHECK(losses(out) == losses(dir / "whole"));
  CHECK(read_file(dir / "stopped/model/model.safetensors") ==
        read_file(dir / "whole/model/model.safetensors"));
}

TEST_CASE("a whole run gives the same bits for 1 and 2 threads") {
  const TempDir dir;
  REQUIRE(shell(train_command(dir / "one", "--threads 1", 30)).status == 0);
  REQUIRE(shell(train_command(dir / "two", "--threads 2", 30)).status == 0);
  CHECK(losses(dir / "one") == losses(dir / "two"));
  CHECK(read_file(dir / "one/model/model.safetensors") ==
        read_file(dir / "two/model/model.safetensors"));
}

TEST_CASE("--minutes prints the equal --steps, which gives the same bits") {
  const TempDir dir;
  const std::string command =
      concat("./train_gpt --data ", data_prefix(),
             " --layers 1 --channels 32 --context 32 --batch-tokens 256 -o ");
  const Output timed = shell(concat(command, (dir / "timed").string(), " --minutes .05"));
  REQUIRE_MESSAGE(timed.status == 0, timed.text);
  const int64_t steps = read_json(dir / "timed/summary.json").at("steps");
  CHECK(contains(timed.text, concat("(--steps ", steps, ")")));
  const Output counted = shell(concat(command, (dir / "counted").string(), " --steps ", steps));
  REQUIRE_MESSAGE(counted.status == 0, counted.text);
  CHECK(read_file(dir / "timed/model/model.safetensors") ==
        read_file(dir / "counted/model/model.safetensors"));
}

TEST_CASE("--minutes reads a small text five times at most") {
  const TempDir dir;
  const Output o =
      shell(concat("./train_gpt --data ", data_prefix(), " -o ", (dir / "run").string(),
                   " --layers 1 --channels 32 --context 32 --batch-tokens 32 --minutes .5"));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK(contains(o.text, "minutes more than this text takes"));
  const double tokens = read_json(data_prefix() + ".json").at("train").at("tokens");
  const double steps = read_json(dir / "run/summary.json").at("steps");
  CHECK(steps == doctest::Approx(std::max(800., 5 * tokens / 32)).epsilon(.01));
}

TEST_CASE("--init-from goes on from a model") {
  const TempDir dir;
  REQUIRE(shell(train_command(dir / "first", "")).status == 0);
  const Output o =
      shell(concat("./train_gpt --data ", data_prefix(), " -o ", (dir / "next").string(),
                   " --init-from ", (dir / "first").string(), " --steps 3"));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  const double before = read_json(dir / "first/summary.json").at("val_bits_per_byte"),
               after = read_json(dir / "next/summary.json").at("val_bits_per_byte");
  CHECK(std::abs(after - before) < .1);  // three small steps; an untrained model stands at 4 bits
}

TEST_CASE("--init-from refuses a model of another tokenizer, unless --tokenizer-differs") {
  const TempDir dir;
  const std::string other = dir / "other", model = dir / "model", out = dir / "run";
  REQUIRE(shell(train_command(model, "", 2)).status == 0);
  // A tokenizer of the same size in which one token has other bytes.
  std::filesystem::copy(model + "/model", other);
  Json tokenizer = read_json(other + "/tokenizer.json");
  for (Json& token : tokenizer.at("added_tokens")) {
    if (token.at("content") != "<|spare_7|>") continue;
    tokenizer.at("model").at("vocab").erase("<|spare_7|>");
    tokenizer.at("model").at("vocab")["<|other|>"] = token.at("id");
    token["content"] = "<|other|>";
  }
  write_file(other + "/tokenizer.json", tokenizer.dump());
  const std::string go_on = concat("./train_gpt --data ", data_prefix(), " --steps 2 -o ", out);
  const Output refused = shell(go_on + " --init-from " + other);
  CHECK(refused.status == 1);
  CHECK(contains(refused.text, "other: found another tokenizer, expected the one that made "));
  CHECK(std::count(refused.text.begin(), refused.text.end(), '\n') == 1);
  CHECK(!std::filesystem::exists(out));
  const Output allowed = shell(go_on + " --tokenizer-differs --init-from " + other);
  CHECK_MESSAGE(allowed.status == 0, allowed.text);
  CHECK(read_file(out + "/model/tokenizer.json") == read_file(model + "/model/tokenizer.json"));

  std::filesystem::remove(other + "/tokenizer.json");
  const Output none = shell(go_on + "2 --init-from " + other);
  CHECK(none.status == 1);
  CHECK(contains(none.text, "found no tokenizer, expected the one that made "));
}

TEST_CASE("a model has a working tokenizer, whatever file the data's came from") {
  const TempDir dir;
  const std::string d = dir.path().string() + "/";
  const auto own = std::filesystem::path(data_prefix()).parent_path() / "tokenizer";
  write_file(d + "text.txt", "hello well hell, the tall hill\n");
  // 256 bytes and 50,000 pairs of bytes: as many ranks as r50k has. Their base64, three bytes at
  // once.
  std::string ranks;
  const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (int i = 0; i < 50256; i++) {
    const bool pair = i >= 256;
    const int bits = (pair ? i - 256 : i << 8) << 8;
    for (int k = 0; k < 2 + pair; k++) ranks += digits[bits >> (18 - 6 * k) & 63];
    ranks += concat(pair ? "= " : "== ", i, "\n");
  }
  // Beside each lies a tokenizer.json that did not make the data.
  for (const char* name : {"bpe", "tiktoken", "renamed"}) {
    std::filesystem::create_directories(d + name);
    std::filesystem::copy(own / "tokenizer.json", d + name + "/tokenizer.json");
  }
  write_file(d + "bpe/vocab.bpe", "#version: 0.2\nh e\nl l\n");
  write_file(d + "tiktoken/r.tiktoken", ranks);
  Json renamed = read_json(own / "tokenizer.json");
  renamed.at("model").at("merges").erase(renamed.at("model").at("merges").size() - 1);
  write_file(d + "renamed/my_tok.json", renamed.dump());
  REQUIRE(shell("./bpe encode " + d + "bpe/vocab.bpe " + d + "text.txt -o " + d + "first").status ==
          0);
  const std::string flags = " --layers 1 --channels 16 --heads 1 --context 16 --batch-tokens 16 ";
  REQUIRE(
      shell("./train_gpt --steps 1 --data " + d + "first -o " + d + "first_run" + flags).status ==
      0);
  for (const char* tokenizer : {"bpe/vocab.bpe", "tiktoken/r.tiktoken", "renamed/my_tok.json",
                                "renamed/tokenizer.json", "first_run"}) {
    CAPTURE(tokenizer);
    const Output encode =
        shell("./bpe encode " + d + tokenizer + " " + d + "text.txt -o " + d + "t");
    REQUIRE_MESSAGE(encode.status == 0, encode.text);
    const Output train = shell("./train_gpt --overwrite --steps 2 --save-every 1 --data " + d +
                               "t -o " + d + "run" + flags);
    CHECK_MESSAGE(train.status == 0, train.text);
    const std::string show = " 'hello well, hill'";
    CHECK(shell("./bpe show " + d + "run" + show).text ==
          shell("./bpe show " + d + tokenizer + show).text);
    CHECK(shell("./chat generate " + d + "run --prompt hell --max-tokens 2").status == 0);
  }
  // A name without a directory.
  const std::string here = std::filesystem::current_path().string();
  const Output bare =
      shell("cd " + d + "renamed && " + here + "/train_gpt --overwrite --steps 1 --data " + d +
            "t --tokenizer my_tok.json -o " + d + "run" + flags);
  CHECK(contains(bare.text, "is not the tokenizer that made"));
  shell("./bpe encode " + d + "renamed/tokenizer.json " + d + "text.txt -o " + d + "t");
  const Output local =
      shell("cd " + d + "renamed && " + here + "/train_gpt --overwrite --steps 1 --data " + d +
            "t --tokenizer tokenizer.json -o " + d + "run" + flags);
  CHECK_MESSAGE(local.status == 0, local.text);
  CHECK(std::filesystem::exists(d + "run/model/tokenizer.json"));
}

TEST_CASE("a damaged trainer_state.json is named when a run is resumed") {
  const TempDir dir;
  REQUIRE(shell(train_command(dir / "run", "", 2)).status == 0);
  const std::string file = dir / "run/model/trainer_state.json";
  const Json good = read_json(file);
  for (const char* key : {"step", "finished", "loader", "settings", "stage"}) {
    Json bad = good;
    bad[key] = Json::array();
    write_file(file, bad.dump());
    const Output o = shell(concat("./train_gpt --resume --steps 3 -o ", (dir / "run").string()));
    CHECK(o.status == 1);
    CHECK_MESSAGE(contains(o.text, "error: " + file + ": "), o.text);
    CHECK(!contains(o.text, "json.exception"));
  }
}

TEST_CASE("a run that the disk has no room for is refused before its first step") {
  const TempDir dir;
  const auto on_disk_of = [&](int kilobytes, const std::string& flags) {
    return shell(concat("unshare -rm sh -c 'mount -t tmpfs -o size=", kilobytes, "k none ",
                        dir.path().string(), " && ", train_command(dir / "run", flags, 3),
                        " --save-every 1; status=$?; ls ", dir.path().string(),
                        "/run; exit $status'"));
  };
  if (shell("unshare -rm mount -t tmpfs none " + dir.path().string()).status != 0) {
    MESSAGE("skipped: no disk can be mounted here");
    return;
  }
  // A checkpoint takes 440 KB. Two are there at once, and those to keep.
  for (const auto& [flags, kilobytes] :
       std::vector<std::pair<std::string, int>>{{"", 800}, {"--keep-checkpoints 2", 1500}}) {
    const Output full = on_disk_of(kilobytes, flags);
    CHECK(full.status == 1);
    CHECK_MESSAGE(contains(full.text, " free on the disk, expected "), full.text);
    CHECK(!contains(full.text, "metrics.jsonl"));
    const Output enough = on_disk_of(kilobytes + 700, flags);
    CHECK_MESSAGE(enough.status == 0, enough.text);
  }
}

TEST_CASE("a loss that explodes stops the run, says what to try, and saves no NaN") {
  const TempDir dir;
  const std::string out = dir / "run";
  const Output o = shell(train_command(
      out, "--matrix-lr 1e20 --embedding-lr 1e20 --head-lr 1e20 --clip 0 --save-every 4"));
  CHECK(o.status == 1);
  CHECK(contains(o.text, "error: step "));
  CHECK(contains(o.text, "--lr-scale"));
  if (std::filesystem::exists(dir / "run/model")) {  // a checkpoint before it is finite
    CHECK(!contains(shell(concat("./train_gpt --resume -o ", out)).text, "not finite"));
  }
}

TEST_CASE("--dry-run prints the plan and makes nothing") {
  const TempDir dir;
  const Output o = shell(train_command(dir / "run", "--dry-run"));
  CHECK(o.status == 0);
  for (const char* part : {"model ", "parameters", "data ", "memory ", "disk ", "time ", "budget "})
    CHECK_MESSAGE(contains(o.text, part), part);
  CHECK(!std::filesystem::exists(dir / "run"));
}

TEST_CASE("train_gpt's bad input ends in one line and exit status 1") {
  const TempDir dir;
  const auto refused = [&](const std::string& command, const std::string& part) {
    const Output o = shell(command);
    CAPTURE(command);
    CAPTURE(o.text);
    CHECK(o.status == 1);
    CHECK(contains(o.text, part));
    CHECK(o.text.rfind("error: ", 0) == 0);
    CHECK(std::count(o.text.begin(), o.text.end(), '\n') == 1);
  };
  const std::string out = dir / "run";
  refused("./train_gpt -o " + out, "--data: missing");
  refused("./train_gpt", "-o: missing");
  refused("./train_gpt --data nowhere -o " + out, "nowhere.json: ");
  refused(train_command(out, "--nonsense 3"), "--nonsense");
  refused(train_command(out, "--schedule steps"), "--schedule: found steps");
  refused(train_command(out, "--minutes 1"), "found more than one");
  refused(train_command(out, "--optimizer sgd"), "--optimizer: found sgd");
  refused(train_command(out, "--device cuda"), "--device cuda");
  refused(train_command(out, "--device cpu --precision bf16"), "--precision bf16: the CPU engine");
  refused(train_command(out, "--precision fp8"), "--precision: found fp8");
  refused("./train_gpt --check", "--model: missing");
  refused(train_command(out, "--heads 3"), "--heads: found 3");
  refused(train_command(out, "--init-from nowhere"), "nowhere: not found");
  refused("./train_gpt --resume -o " + out, "not found");
  CHECK(!std::filesystem::exists(out));
  std::filesystem::create_directories(out);
  write_file(dir / "run/notes.txt", "mine");
  refused(train_command(out, ""), "exists; --resume");
  CHECK(read_file(dir / "run/notes.txt") == "mine");
}
