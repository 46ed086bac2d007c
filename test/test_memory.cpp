// Memory that decoding takes, and logits that are not finite, as a user meets them: the binaries on
// a model whose context is far longer than what is asked of it. All of its KV cache would be 141
// TB.
#include <filesystem>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/schedule.h"
#include "cake/tokenizer.h"
#include "cake/training.h"
#include "test/cuda_on_cpu/control.h"
#include "test/support.h"

using namespace cake;

namespace {

class LongContext {
 public:
  LongContext() {
    std::string text, conversations, problems;
    for (int i = 0; i < 60; i++) {
      text += concat("The answer is ", i, ". user system assistant\n");
      conversations += concat("{\"prompt\":\"Question ", i, "?\",\"completion\":\" ", i, ".\"}\n");
      problems += concat("{\"question\":\"Question ", i, "?\",\"answer\":\"", i, "\"}\n");
    }
    write_file(dir_ / "text.txt", text);
    write_file(dir_ / "conversations.jsonl", conversations);
    write_file(dir_ / "problems.jsonl", problems);
    const Tokenizer t = train_tokenizer({.inputs = {dir_ / "text.txt"}}, 320, "qwen2");
    std::filesystem::create_directories(dir_ / "tokenizer");
    t.save(dir_ / "tokenizer");
    config_ = new_config(Family::llama, 8, 32, t.vocab_size(), 1 << 30);
    config_.NH = config_.NKV = 8, config_.HS = 256;
    config_.bos = config_.eos = config_.pad = t.end_of_text();
    save("model", 1);
    config_.T = 256;
    save("overflow", 3e38f);  // finite weights whose logits are not
  }
  std::string operator/(const std::string& name) const { return dir_ / name; }

 private:
  // The model, with a weight of `scale` in its final norm.
  void save(const std::string& name, float scale) {
    const auto gpt = make_gpt(config_, {.device = Device::cpu, .mode = Mode::inference});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      const Tensor& t = gpt->table().tensors[i];
      std::vector<float> values = initial_values(t, 1);
      if (t.name == "final_norm.weight") values.assign(values.size(), scale);
      if (t.name == "head") values.assign(values.size(), 1);
      gpt->write(int(i), Slot::weight, values);
    }
    save_checkpoint(dir_ / name, *gpt, {.tokenizer_from = dir_ / "tokenizer"});
  }

  TempDir dir_;
  Config config_;
};

LongContext& world() {
  static LongContext w;
  return w;
}

std::string train_command(const std::string& out, const std::string& flags) {
  static const std::string data = [] {
    const std::string prefix = world() / "data";
    const Output o = shell(concat("./bpe encode ", world() / "tokenizer", " ", world() / "text.txt",
                                  " --val-fraction 0 -o ", prefix));
    REQUIRE_MESSAGE(o.status == 0, o.text);
    return prefix;
  }();
  return concat("./train_gpt --device cpu --threads 1 --data ", data, " --init-from ",
                world() / "model", " -o ", world() / out,
                " --steps 4 --context 16 --batch-tokens 32 --sample-every 1 ", flags);
}

void check_refused(const Output& o, const std::string& part) {
  CAPTURE(o.text);
  CHECK(o.status == 1);
  CHECK(contains(o.text, part));
  const size_t line = o.text.rfind("error: ");
  REQUIRE(line != std::string::npos);
  CHECK(o.text.find('\n', line) == o.text.size() - 1);
}

}  // namespace

TEST_CASE(
    "a sample on the way takes cache for its prompt and its new tokens, not for the context") {
  const Output pretraining = shell(train_command("base", ""));
  CAPTURE(pretraining.text);
  CHECK(pretraining.status == 0);
  CHECK(contains(pretraining.text, "sample  "));
  CHECK(!contains(pretraining.text, "sample  failed"));
  for (const char* planned : {"panels ", "decoding ", "KV cache "}) {
    CHECK(contains(pretraining.text, planned));
  }
  const Output tuning =
      shell(concat("./sft --device cpu --threads 1 --model ", world() / "model", " --data ",
                   world() / "conversations.jsonl", " --context 64 --steps 2 --sample-every 1 -o ",
                   world() / "sft"));
  CAPTURE(tuning.text);
  CHECK(tuning.status == 0);
  CHECK(contains(tuning.text, "answer  "));
}

// The emulated device, which test_cuda.cpp has built in.
TEST_CASE("a micro-batch is the largest whose plan fits, to the byte") {
  const Config c = new_config(Family::qwen3, 2, 64, 1000, 64);
  const auto bytes_of = [&](int64_t tokens) {
    return gpu::plan_memory(c, {.device = Device::cuda, .batch_tokens = int(tokens)}).total();
  };
  constexpr int64_t kUnit = 64, kMost = 20 * kUnit + 10;  // 20 units
  for (int64_t units = 1; units <= 20; units++) {
    CAPTURE(units);
    const int64_t bytes = bytes_of(units * kUnit);
    CHECK(largest_micro_batch(kUnit, kMost, bytes, bytes_of) == units * kUnit);
    CHECK(largest_micro_batch(kUnit, kMost, bytes - 1, bytes_of) ==
          std::max<int64_t>(1, units - 1) * kUnit);
  }
  CHECK(largest_micro_batch(kUnit, kMost, int64_t(1) << 60, bytes_of) == 20 * kUnit);
  CHECK(largest_micro_batch(kUnit, 1, int64_t(1) << 60, bytes_of) == kUnit);
  // What fits by its plan is made, beside buffers of a few bytes that no plan counts; the next size
  // is not.
  struct SmallDevice {
    explicit SmallDevice(int64_t bytes) { cuda_on_cpu::set_memory(size_t(bytes)); }
    ~SmallDevice() { cuda_on_cpu::set_memory(size_t(16) << 30); }
  } device(bytes_of(7 * kUnit) + (64 << 10) + int64_t(cuda_on_cpu::memory_in_use()));
  const int64_t fits = largest_micro_batch(kUnit, kMost, gpu::free_memory(), bytes_of);
  REQUIRE(fits == 7 * kUnit);
  const auto make = [&](int64_t tokens) {
    gpu::make_gpt(c, {.device = Device::cuda, .batch_tokens = int(tokens)});
  };
  make(fits);
  CHECK(contains(error_of([&] { make(fits + kUnit); }), "out of memory on the GPU"));
}

TEST_CASE("--recompute trains the same weights") {
  for (const std::string how : {"none", "light", "full"}) {
    const Output o = shell(train_command("with_" + how, "--recompute " + how));
    REQUIRE_MESSAGE(o.status == 0, o.text);
    CHECK(read_file(world() / "with_none/model/model.safetensors") ==
          read_file(world() / ("with_" + how + "/model/model.safetensors")));
  }
  check_refused(shell(train_command("with_some", "--recompute some")),
                "--recompute: found some, expected none, light or full");
}

TEST_CASE("--precision bf16 is refused on the CPU in every stage that trains") {
  const std::string model = world() / "model",
                    flags = " --precision bf16 --device cpu -o " + (world() / "no");
  const std::string problems = " --prompts " + (world() / "problems.jsonl") + " --reward number";
  const std::string conversations = " --data " + (world() / "conversations.jsonl");
  for (const std::string& command :
       {train_command("no", "--precision bf16"),
        concat("./sft --model ", model, conversations, " --context 64", flags),
        concat("./rlhf grpo --model ", model, problems, flags),
        concat("./rlhf ppo --model ", model, problems, flags),
        concat("./rlhf best-of-n --model ", model, problems, flags)}) {
    CAPTURE(command);
    check_refused(shell(command), "--precision bf16: the CPU engine computes in f32");
    CHECK(!std::filesystem::exists(world() / "no"));
  }
}

#ifndef __SANITIZE_ADDRESS__  // which takes more address space than the limit
TEST_CASE("a sample that finds no memory is a note, and the run goes on") {
  const std::string prompt(8000, '~');  // 1 GB of cache
  const Output o = shell(
      concat("(ulimit -v 900000; ", train_command("limited", concat("--prompt ", prompt)), ")"));
  CAPTURE(o.text.substr(0, 2000));
  CHECK(o.status == 0);
  CHECK(contains(o.text, "sample  failed: out of memory"));
  CHECK(std::filesystem::exists(world() / "limited/model/model.safetensors"));
}
#endif

TEST_CASE("a cache that no memory can hold ends a stage before it begins, in one line") {
  const std::string enormous = " --context 1073741824 --max-tokens 100000000 --device cpu ";
  check_refused(
      shell(concat("timeout 20 ./chat generate ", world() / "model", " --prompt x", enormous)),
      "KV cache 13.1 TB");
  check_refused(
      shell(concat("timeout 20 ./rlhf grpo --model ", world() / "model", " --prompts ",
                   world() / "problems.jsonl", " --reward number -o ", world() / "rl", enormous)),
      "KV cache 13.1 TB");
  CHECK(!std::filesystem::exists(world() / "rl"));
}

// A page of this model's cache, 64 positions, takes 8.4 MB.
TEST_CASE("a context of a billion tokens takes memory for the tokens that there are") {
  write_file(
      world() / "items.jsonl",
      R"({"task":"a","prompt":"Question 1?","check":{"type":"number","value":"1"},"tokens":4})"
      "\n");
  const std::string model = world() / "model", note = "of the model's 1073741824 tokens: ";
  const std::string flags = " --max-tokens 8 --device cpu --threads 1 ";
#ifdef __SANITIZE_ADDRESS__  // which takes more address space than the limit
  const std::string limit;
#else
  const std::string limit = "ulimit -v 900000; ";
#endif
  write_file(world() / "lines.txt", "Hi\n");
  for (const std::string& command :
       {concat("./chat generate ", model, " --prompt Hi", flags),
        concat("./chat ", model, " --base < ", world() / "lines.txt", flags),
        concat("./chat eval ", model, " --base --tasks ", world() / "items.jsonl", flags),
        concat("./rlhf grpo --model ", model, " --prompts ", world() / "problems.jsonl",
               " --reward number --steps 1 --rollouts 4 --group 2 --micro-batch-tokens 64",
               " --overwrite -o ", world() / "rl_long", flags)}) {
    CAPTURE(command);
    const auto notes = [&](const std::string& more) {
      const Output o = shell(concat("(", limit, command, more, ")"));
      CAPTURE(o.text);
      CHECK(o.status == 0);
      int n = 0;
      for (size_t i = 0; (i = o.text.find(note, i)) != std::string::npos; i++) n++;
      return n;
    };
    CHECK(notes("") == 1);
    CHECK(notes("--context 256") == 0);
  }
  // What the run chose is what it goes on with.
  const Json state = read_json(world() / "rl_long/model/trainer_state.json");
  CHECK(state.at("settings").at("context") == 256);
}

#ifndef __SANITIZE_ADDRESS__
TEST_CASE("a text that outgrows memory ends in one line") {
  const std::string prompt(8000, '~');  // 1 GB of cache
  check_refused(shell(concat("ulimit -v 900000; ./chat generate ", world() / "model", " --prompt ",
                             prompt, " --max-tokens 8 --device cpu --threads 1")),
                "error: out of memory: ");
}
#endif

TEST_CASE("logits that are not finite end chat's answers and RL's rollouts with an error") {
  const std::string model = world() / "overflow", part = "logits that are not finite";
  check_refused(shell(concat("./chat generate ", model, " --prompt Hi --max-tokens 8 ",
                             "--temperature 0 --device cpu")),
                part);
  check_refused(shell(concat("echo hello | ./chat ", model, " --base --max-tokens 8 --device cpu")),
                part);
  check_refused(
      shell(concat("./rlhf grpo --model ", model, " --prompts ", world() / "problems.jsonl",
                   " --reward number --max-tokens 8 --steps 1 --device cpu -o ",
                   world() / "rl_overflow")),
      part);
}
