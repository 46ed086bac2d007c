// Every binary has its own main: two stages are libraries too, and a link line in the wrong order
// would give a program their main.
#include "test/scripted_model.h"
#include "test/support.h"

using namespace cake;

namespace {

// Exit status 1 and one line, which has `part`.
void check_refused(const std::string& command, const std::string& part) {
  const Output o = shell(command);
  CAPTURE(command);
  CHECK(o.status == 1);
  CHECK_MESSAGE(o.text.rfind("error: ", 0) == 0, o.text.substr(0, 400));
  CHECK_MESSAGE(contains(o.text, part), o.text.substr(0, 400));
  CHECK(std::count(o.text.begin(), o.text.end(), '\n') == 1);
  CHECK(o.text.size() < 600);
}

}  // namespace

TEST_CASE("each binary's --help is its own") {
  const std::pair<std::string, std::string> binaries[] = {
      {"./bpe", "Byte pair encoding"},      {"./train_gpt", "Trains a base model"},
      {"./sft", "Fine-tunes a model"},      {"./reward", "Learns from preferences"},
      {"./rlhf", "Reinforcement learning"}, {"./chat", "Talks to a model"},
      {"build/world", "closed world"},      {"build/report", "Tells a run on one page"},
      {"build/overoptimize", "picture"},
  };
  for (const auto& binary : binaries) {
    CAPTURE(binary.first);
    const Output help = shell(binary.first + " --help");
    CHECK(help.status == 0);
    for (const auto& other : binaries) {
      CAPTURE(other.second);
      CHECK_MESSAGE(contains(help.text, other.second) == (&other == &binary), help.text);
    }
  }
}

TEST_CASE("JSON of 200,000 brackets is one line in every file that a stage reads") {
  ScriptedModel m;
  const std::string model = m.save(), d = m.dir().path().string() + "/";
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  const auto deep_object = [&](const std::string& key) { return "{\"" + key + "\":" + deep + "}"; };
  const auto refused_with = [&](const std::string& file, const std::string& text,
                                const std::string& command) {
    const std::string before = read_file(file);
    write_file(file, text);
    check_refused(command, file);
    write_file(file, before);
  };
  const std::string generate = "./chat generate " + model;
  refused_with(model + "/config.json", deep_object("model_type"), generate);
  refused_with(model + "/tokenizer.json", deep_object("model"), generate);
  refused_with(model + "/tokenizer_config.json", deep_object("chat_template"), "./chat " + model);
  std::string header = "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":" + deep + "}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  const std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
  refused_with(model + "/model.safetensors", bytes + header + "1234", generate);

  // A run that would be resumed, and token shards.
  std::filesystem::create_directories(d + "run");
  std::filesystem::copy(model, d + "run/model");
  write_file(d + "run/model/trainer_state.json", deep_object("stage"));
  check_refused("./sft --resume -o " + d + "run", d + "run/model/trainer_state.json");
  write_file(d + "shards.json", deep_object("tokenizer"));
  check_refused("./train_gpt --data " + d + "shards -o " + d + "new", d + "shards.json");

  // JSON lines. In the last file a string of a record is JSON itself.
  const std::string lines = d + "lines.jsonl", flags = " --model " + model + " -o " + d + "new";
  for (const std::string& command :
       {generate + " --prompts " + lines, "./chat eval " + model + " --tasks " + lines,
        "./bpe encode " + model + " " + lines + " -o " + d + "new", "./sft --data " + lines + flags,
        "./reward train --data " + lines + flags, "./reward dpo --data " + lines + flags,
        "./rlhf grpo --reward number --prompts " + lines + flags}) {
    write_file(lines, deep_object("messages"));
    check_refused(command, lines + ":1");
  }
  std::string call = R"({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", )"
                     R"("content": "", "tool_calls": [{"name": "f", "arguments": ")";
  write_file(lines, call + deep + "\"}]}], \"tools\": [{\"name\": \"f\"}]}\n");
  check_refused("./sft --data " + lines + flags, lines + ":1");
  CHECK(!std::filesystem::exists(d + "new"));
}

TEST_CASE("a text in square brackets is one text on every command line") {
  ScriptedModel m;
  const std::string model = m.save();
  for (const std::string text : {"[1,2]", "[INST] hi [/INST]", "[]", "[[x]]", "[", "a [b]"}) {
    CAPTURE(text);
    const Output o = shell("./bpe show " + model + " '" + text + "'");
    CHECK(o.status == 0);
    CHECK(contains(o.text, concat("\n", text.size(), " bytes, ")));
  }
  // The model writes "x" for ever: only a stop string of that letter ends it.
  const std::string generate = "./chat generate " + model + " --prompt a --max-tokens 9 --stop ";
  CHECK(contains(shell(generate + "'[x]'").text, "axxxxxxxxx\n"));
  CHECK(contains(shell(generate + "x").text, "a\n"));
}

TEST_CASE("a name in square brackets is the name of a file, in every stage") {
  const TempDir dir;
  const std::string model = "test/golden/eval_model", out = " -o " + (dir / "out").string();
  for (const std::string& command :
       {"./bpe train '[a]' --vocab-size 300" + out, "./bpe encode " + model + " '[a]'" + out,
        "./bpe ids " + model + " '[a]'", "./bpe stats " + model + " '[a]'",
        "./corpus clean '[a]'" + out, "./corpus dedup '[a]'" + out,
        "./sft --model " + model + " --data '[a]'" + out,
        "./sft --model " + model + " '--data=[a]'" + out,
        "./reward train --model " + model + " --data '[a]' '[b]'" + out,
        "./rlhf grpo --model " + model + " --prompts '[a]' --reward number" + out,
        "./rlhf best-of-n --model '[a]' --prompts x --reward number" + out,
        "./train_gpt --data '[a]'" + out, "./chat generate " + model + " --prompts '[a]'",
        "./chat eval " + model + " --base '--tasks=[a],b'", std::string("./chat info '[a]'"),
        std::string("./chat '[a]'")}) {
    check_refused(command, "error: [a]");
  }
  check_refused("./train_gpt --data x '-o[x]' --device '[1,2]'", "found [1,2], expected");
  CHECK(!std::filesystem::exists(dir / "out"));
}

TEST_CASE("texts of flags read escapes in every stage that has them") {
  const TempDir dir;
  const std::string model = "test/golden/eval_model", out = " -o " + (dir / "out").string();
  const std::string rl = " --model " + model + " --prompts x" + out;
  for (const std::string& command :
       {"./chat " + model + " --system '\\q'", "./chat generate " + model + " --prompt '\\q'",
        "./chat generate " + model + " --stop '\\q'", "./train_gpt --data x --prompt '\\q'" + out,
        "./sft --data x --prompt '\\q'" + out, "./rlhf grpo --reward number --stop '\\q'" + rl,
        "./rlhf ppo --reward number --system '\\q'" + rl,
        "./rlhf grpo --reward number --form '\\q{question}'" + rl,
        "./rlhf best-of-n --reward 'format:\\q'" + rl,
        "./rlhf grpo --reward number --gold '.5*format:\\q'" + rl}) {
    check_refused(command, ": found \\q, expected \\n, \\t, \\\\ or \\xHH");
    CHECK(!contains(shell(command + " --raw < /dev/null").text, "found \\q"));
  }
  // A user's program is no text.
  CHECK(!contains(shell("./rlhf grpo --reward 'check:\\q'" + rl).text, "found \\q"));
}
