// ./chat eval against lm-evaluation-harness, and on a model whose answers are known.
#include <doctest/doctest.h>

#include <sstream>

#include "cake/verify.h"
#include "test/scripted_model.h"

using namespace cake;

// ---------------------------------------------------------------------------------------------
// ./chat eval

namespace {

Json eval(const std::string& arguments) {
  const TempDir dir;
  const std::string path = dir / "results.json";
  const Output out = shell("./chat eval " + arguments + " --threads 1 --json " + path);
  REQUIRE_MESSAGE(out.status == 0, out.text);
  return read_json(path);
}

}  // namespace

TEST_CASE("eval scores HellaSwag, ARC and MMLU as lm-evaluation-harness does") {
  const std::string g = "test/golden/eval_";
  const Json golden = read_json(g + "scores.json");
  const std::string files =
      concat("hellaswag=", g, "hellaswag.jsonl,arc=", g, "arc.jsonl,mmlu=", g, "mmlu.jsonl");
  for (const int shots : {0, 2}) {
    CAPTURE(shots);
    const Json r = eval(
        concat(g, "model --no-start --tasks ", files, " --shots ", shots, " --shots-from ", files));
    const auto want = [&](const char* task, const char* metric) {
      return golden[concat(task, "_", shots, "shot")][metric].get<double>();
    };
    // Shares of 40 items: equal or different by .025.
    CHECK(r["hellaswag"]["value"].get<double>() == doctest::Approx(want("hellaswag", "acc_norm")));
    CHECK(r["hellaswag_acc"]["value"].get<double>() == doctest::Approx(want("hellaswag", "acc")));
    CHECK(r["arc"]["value"].get<double>() == doctest::Approx(want("arc", "acc_norm")));
    CHECK(r["arc_acc"]["value"].get<double>() == doctest::Approx(want("arc", "acc")));
    CHECK(r["mmlu"]["value"].get<double>() == doctest::Approx(want("mmlu", "acc")));
    CHECK(r["mmlu"]["n"] == 40);
    CHECK(r["mmlu"]["metric"] == "acc");
  }
}

TEST_CASE("bits per byte are lm-evaluation-harness's, in windows of the context") {
  const Json golden = read_json("test/golden/eval_scores.json");
  const Json r = eval("test/golden/eval_model --tasks bits_per_byte=test/golden/eval_text.jsonl");
  const double value = r["bits_per_byte"]["value"].get<double>();
  // float here, double there: 1e-6 of 7.8; a window less or more of context changes the third
  // digit.
  CHECK(std::fabs(value - golden["bits_per_byte"].get<double>()) < 1e-5);
  CHECK(r["bits_per_byte"]["n"] == 3);
  CHECK(r["bits_per_byte"]["ci95"][0].get<double>() < value);
}

TEST_CASE("ARC's first format and MMLU's letters mean the same items") {
  const TempDir dir;
  std::string arc, mmlu;
  std::istringstream arc_lines(read_file("test/golden/eval_arc.jsonl"));
  for (std::string line; std::getline(arc_lines, line);) {
    const Json item = Json::parse(line);
    Json choices = Json::array();
    for (size_t i = 0; i < item["choices"]["text"].size(); i++) {
      choices.push_back(
          {{"text", item["choices"]["text"][i]}, {"label", item["choices"]["label"][i]}});
    }
    arc += Json{{"question", {{"stem", item["question"]}, {"choices", choices}}},
                {"answerKey", item["answerKey"]}}
               .dump() +
           "\n";
  }
  std::istringstream mmlu_lines(read_file("test/golden/eval_mmlu.jsonl"));
  for (std::string line; std::getline(mmlu_lines, line);) {
    Json item = Json::parse(line);
    item["answer"] = std::string(1, char('A' + item["answer"].get<int>()));
    mmlu += item.dump() + "\n";
  }
  write_file(dir / "arc.jsonl", arc);
  write_file(dir / "mmlu.jsonl", mmlu);
  const std::string model = "test/golden/eval_model --tasks ";
  CHECK(eval(model + "arc=" + (dir / "arc.jsonl").string() +
             ",mmlu=" + (dir / "mmlu.jsonl").string()) ==
        eval(model + "arc=test/golden/eval_arc.jsonl,mmlu=test/golden/eval_mmlu.jsonl"));
}

namespace {

// Questions of one length, which the model answers with a call of the calculator, then "It is 42.",
// where tools are declared, and with "A baker." where there are none.
struct Exam {
  ScriptedModel m{2048};
  std::string dir, items;

  Exam() {
    const Tokenizer& t = m.tokenizer();
    const Conversation plain{.messages = {{"user", "What?", {}}}};
    Conversation tools = plain;
    tools.tools = {kTool};
    m.write(int(render_chat(t, plain, true).ids.size()), "A baker.<|im_end|>");
    int n = m.write(int(render_chat(t, tools, true).ids.size()),
                    "<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": "
                    "\"6*7\"}}\n</tool_call><|im_end|>");
    n += 1 + int(render_chat(t, {.messages = {{"tool", "42", {}}}}, true).ids.size());
    m.write(n, "It is 42.<|im_end|>");
    m.write(1 + int(t.encode("Who is it?").size()), " A cook.\n\nA baker.<|endoftext|>");
    dir = m.save();
    items = m.dir() / "items.jsonl";
    std::string lines;
    const auto add = [&](const std::string& task, const std::string& check,
                         const std::string& more) {
      lines += "{\"task\": \"" + task +
               "\", \"messages\": [{\"role\": \"user\", \"content\": \"What?\"}], " +
               "\"check\": " + check + more + "}\n";
    };
    const std::string declared = concat(", \"tools\": [", kTool, "]");
    for (int i = 0; i < 3; i++) {
      add("facts", R"({"type": "contains", "any": ["baker"]})", R"(, "prompt": "Who is it?")");
    }
    add("facts", R"({"type": "contains", "any": ["cook"]})", R"(, "prompt": "Who is it?")");
    add("refuse", R"({"type": "refuses"})", R"(, "prompt": null)");
    add("tools",
        R"({"type": "tool", "name": "calculator", "then": {"type": "number", "value": "42"}})",
        declared);
    add("tools", R"({"type": "tool", "name": "search", "then": {"type": "number", "value": "42"}})",
        declared);
    add("cut", R"({"type": "answers"})", R"(, "tokens": 1)");
    write_file(items, lines);
  }
  static constexpr const char* kTool =
      R"({"name": "calculator", "description": "x", "parameters": {"type": "object"}})";
};

}  // namespace

TEST_CASE("eval asks, runs tools, marks and counts, the same way for any number of rows") {
  const Exam exam;
  const Json r = eval(exam.dir + " --tasks " + exam.items);
  CHECK(r["facts"] == Json({{"metric", "accuracy"},
                            {"value", .75},
                            {"n", 4},
                            {"ci95", {wilson(.75, 4).low, wilson(.75, 4).high}}}));
  CHECK(r["refuse"]["value"] == 0);
  CHECK(r["tools"]["value"] == .5);
  CHECK(r["cut"]["value"] == 1);
  CHECK(r["end_of_turn"]["value"] == 7. / 8);
  CHECK(r["end_of_turn"]["n"] == 8);
  CHECK(eval(exam.dir + " --rows 1 --tasks " + exam.items) == r);
  CHECK(eval(exam.dir + " --rows 3 --cache-mb 1 --tasks " + exam.items) == r);
  CHECK(eval(exam.dir + " --limit 1 --tasks " + exam.items)["facts"]["n"] == 1);

  const std::string answers = exam.m.dir() / "answers.jsonl";
  eval(exam.dir + " -o " + answers + " --tasks " + exam.items);
  std::istringstream in(read_file(answers));
  std::string line;
  for (int i = 0; i < 6; i++) std::getline(in, line);
  const Json tool = Json::parse(line);
  CHECK(tool["answer"] == "It is 42.");
  CHECK(tool["tools"] == Json({"calculator"}));
  CHECK(tool["right"] == true);
}

TEST_CASE("eval of a base model continues prompts, up to the end of the paragraph") {
  const Exam exam;
  const Json r = eval(exam.dir + " --base --tasks " + exam.items);
  CHECK(r.size() == 1);
  CHECK(r["facts"]["n"] == 4);
  CHECK(r["facts"]["value"] == .25);  // a cook; the baker is in the next paragraph
}

TEST_CASE(
    "eval leaves unanswered what is longer than --context, and scores texts in windows of it") {
  const Exam exam;
  const Output out =
      shell("./chat eval " + exam.dir + " --threads 1 --context 20 --tasks " + exam.items);
  CHECK(out.status == 0);
  CHECK(contains(out.text, "questions are longer than the context: not answered"));
  const std::string text =
      "test/golden/eval_model --tasks bits_per_byte=test/golden/eval_text.jsonl";
  const auto bits = [&](const std::string& flags) {
    return eval(text + flags)["bits_per_byte"]["value"].get<double>();
  };
  const int T = load_config("test/golden/eval_model").T;
  CHECK(bits(concat(" --context ", T)) == bits(""));
  CHECK(bits(" --context 8") > bits("") + .01);  // less is read before each token
}

TEST_CASE("GSM8K is asked in conversations and after solved examples, and marked by its number") {
  ScriptedModel m(2048);
  const Tokenizer& t = m.tokenizer();
  const std::string solved = "6*7 = <<6*7=42>>42\n#### 42";
  const std::string file = m.dir() / "gsm8k.jsonl", one = m.dir() / "one.jsonl";
  std::string lines;
  for (const char* answer : {"#### 1,042", "x\n#### 42"}) {
    lines += Json{{"question", "How many?"}, {"answer", answer}}.dump() + "\n";
  }
  write_file(file, lines);
  write_file(one, Json{{"question", "Why?"}, {"answer", solved}}.dump() + "\n");
  m.write(int(render_chat(t, {.messages = {{"user", "How many?", {}}}}, true).ids.size()),
          "Steps.\n#### $1,042.00<|im_end|>");
  const std::string shot = "Question: Why?\nAnswer: " + solved + "\n\nQuestion: How many?\nAnswer:";
  m.write(1 + int(t.encode(shot).size()), " 6*7 = <<6*7=42>>42\n#### 42.\n\nQuestion: 99");
  const std::string dir = m.save();
  CHECK(eval(dir + " --tasks gsm8k=" + file)["gsm8k"]["value"] == .5);
  CHECK(eval(dir + " --base --shots 1 --shots-from gsm8k=" + one +
             " --tasks gsm8k=" + file)["gsm8k"]["value"] == .5);
  CHECK(eval(dir + " --base --max-tokens 3 --tasks gsm8k=" + file)["gsm8k"]["value"] == 0);
}

TEST_CASE("the reference solutions of GSM8K pass its own check") {
  for (const char* part : {"gsm8k/train.jsonl", "gsm8k/test.jsonl"}) {
    if (skip_without_data(part)) return;
    std::istringstream lines(read_file(data_path(part)));
    int n = 0;
    for (std::string line; std::getline(lines, line); n++) {
      const auto answer = Json::parse(line)["answer"].get<std::string>();
      const size_t mark = answer.rfind("#### ");
      std::string value = answer.substr(mark + 5);
      value.erase(std::remove(value.begin(), value.end(), ','), value.end());
      CAPTURE(answer);
      CHECK(final_number(answer) == canonical_number(value));
      CHECK(!final_number(answer).empty());
    }
    CHECK(n > 1000);
  }
}

TEST_CASE("eval answers bad input with one line and status 1") {
  const Exam exam;
  const TempDir dir;
  const std::string d = dir.path().string() + "/";
  write_file(d + "json", "{\"task\": \"a\", \"check\": {\"type\": \"refuses\"}}\n{\n");
  write_file(d + "check", "{\"task\": \"a\", \"messages\": []}\n");
  write_file(d + "role",
             "{\"task\": \"a\", \"check\": {\"type\": \"refuses\"}, \"messages\": [{\"role\": "
             "\"cat\", \"content\": \"x\"}]}\n");
  write_file(d + "type", "{\"task\": \"a\", \"check\": {\"type\": \"vibes\"}, \"messages\": []}\n");
  write_file(d + "empty", "");
  write_file(d + "list", "[1]");
  write_file(d + "value", "{\"math\": {\"value\": \"high\"}}");
  write_file(d + "label", R"({"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c"],)"
                          R"( "label": 1})"
                          "\n");
  write_file(d + "gsm8k", "{\"question\": \"x\", \"answer\": \"none\"}\n");
  const std::pair<std::string, const char*> cases[] = {
      {"--tasks " + d + "none", "none: cannot open"},
      {"--tasks " + d + "json", "json:2: not JSON"},
      {"--tasks " + d + "check", "check:1: check is missing"},
      {"--tasks " + d + "role", "role:1: messages[0]: role: found \"cat\""},
      {"--tasks " + d + "type", "type:1: check: type: found \"vibes\""},
      {"--tasks " + d + "empty", "empty: found no item"},
      {"--tasks hellaswag=" + d + "label", "label:1: label: found 1, expected 0 to 0"},
      {"--tasks hellaswag=" + d + "gsm8k", "gsm8k:1: ctx_b is missing"},
      {"--tasks gsm8k=" + d + "gsm8k", "gsm8k:1: answer: found no number"},
      {"--tasks what=" + d + "label", "--tasks: found what, expected hellaswag"},
      {"--tasks mmlu=a,mmlu=b", "--tasks: found mmlu twice"},
      {"--tasks a --shots 2", "--shots-from is missing"},
      {"--tasks a --shots 2 --shots-from b", "--shots-from: found b, expected NAME=FILE"},
      {"--tasks a --rows 0", "--rows: found 0"},
      {"--tasks " + exam.items + " --context 1", "--context: found 1, expected 2 to "},
      {"--tasks " + exam.items + " --cache-type f16", "--cache-type: found f16"},
      {"--tasks " + exam.items + " --weights q4_0", "--weights: found q4_0"},
      // Before any question is asked:
      {"--tasks none --beside x=" + d + "list", "list: found [1], expected an object"},
      {"--tasks none --beside x=" + d + "value", "value: math: value: found \"high\", expected a"},
      {"", "--tasks is required"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const Output out = shell("./chat eval " + exam.dir + " --threads 1 " + c.first);
    CHECK(out.status == 1);
    CHECK(contains(out.text, c.second));
    CHECK(out.text.starts_with("error: "));
    CHECK(std::count(out.text.begin(), out.text.end(), '\n') == 1);
  }
}
