// ./chat eval against lm-evaluation-harness, and on a model whose answers are known.
#include <doctest/doctest.h>

#include <sstream>

#include "cake/verify.h"
#include "test/chatml.h"
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

// What --output writes, a line for each answer.
std::vector<Json> eval_answers(const std::string& arguments) {
  const TempDir dir;
  const std::string path = dir / "answers.jsonl";
  eval(arguments + " -o " + path);
  std::vector<Json> answers;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) answers.push_back(Json::parse(line));
  return answers;
}

}  // namespace

TEST_CASE("eval scores HellaSwag, ARC and MMLU as lm-evaluation-harness does") {
  const std::string g = "test/golden/eval_";
  const Json golden = read_json(g + "scores.json");
  const TempDir dir;  // the harness took the shots for another split: a question is among its own
  std::string files, shots_from;
  for (const std::string task : {"hellaswag", "arc", "mmlu"}) {
    write_file(dir / task, read_file(concat(g, task, ".jsonl")));
    files += concat(files.empty() ? "" : ",", task, "=", g, task, ".jsonl");
    shots_from += concat(shots_from.empty() ? "" : ",", task, "=", (dir / task).string());
  }
  for (const int shots : {0, 2}) {
    CAPTURE(shots);
    const Json r = eval(concat(g, "model --no-start --tasks ", files, " --shots ", shots,
                               " --shots-from ", shots_from));
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

TEST_CASE("HellaSwag's texts are lm-evaluation-harness's, byte for byte") {
  const std::string file = "test/golden/hellaswag.jsonl.gz";
  const std::vector<Json> answers =
      eval_answers("test/golden/eval_model --tasks hellaswag=" + file);
  LineReader lines{Input(file)};
  size_t n = 0;
  for (std::string_view line; lines.next(line); n++) {
    const Json item = Json::parse(line);
    CAPTURE(n);
    REQUIRE(n < answers.size());
    CHECK(answers[n]["prompt"] == item["harness"]["query"]);
    CHECK(answers[n]["choices"] == item["harness"]["choices"]);
    CHECK(answers[n]["expected"] == item["harness"]["gold"]);
  }
  CHECK(n == 200);
  CHECK(answers.size() == n);
}

TEST_CASE("what a choice is by its log-probabilities stands in --output") {
  const std::string file = "test/golden/eval_hellaswag.jsonl";
  const std::string model = "test/golden/eval_model --tasks hellaswag=" + file;
  const std::vector<Json> answers = eval_answers(model);
  int right = 0, right_norm = 0;
  for (const Json& a : answers) {
    CAPTURE(a.dump());
    const auto logp = a["logp"].get<std::vector<double>>();
    REQUIRE(logp.size() == a["choices"].size());
    const auto best = std::max_element(logp.begin(), logp.end()) - logp.begin();
    CHECK(a["chosen"] == best);
    CHECK(a["right"] == (a["expected"] == best));
    CHECK(a["right_norm"] == (a["expected"] == a["chosen_norm"]));
    right += a["right"].get<bool>(), right_norm += a["right_norm"].get<bool>();
  }
  const Json r = eval(model);
  CHECK(r["hellaswag_acc"]["value"].get<double>() == doctest::Approx(right / 40.));
  CHECK(r["hellaswag"]["value"].get<double>() == doctest::Approx(right_norm / 40.));
}

namespace {

Json mmlu_item(const std::string& subject, const std::string& question, int answer) {
  return {{"question", question},
          {"subject", subject},
          {"choices", {"one", "two", "three", "four"}},
          {"answer", answer}};
}
std::string lines_of(const std::vector<Json>& items) {
  std::string lines;
  for (const Json& item : items) lines += item.dump() + "\n";
  return lines;
}

}  // namespace

TEST_CASE("MMLU's solved examples are of the question's subject, in the order of their file") {
  const TempDir dir;
  const std::string dev = dir / "dev.jsonl", questions = dir / "test.jsonl";
  const Json anatomy = mmlu_item("anatomy", "Where is the heart?", 2),
             first = mmlu_item("high_school_biology", "What is a cell? ", 0),
             second = mmlu_item("high_school_biology", "What is a leaf?", 3);
  const std::vector<Json> asked = {mmlu_item("high_school_biology", " What is a root?\n", 1)};
  write_file(questions, lines_of(asked));
  const std::string command =
      "test/golden/eval_model --tasks mmlu=" + questions + " --shots-from mmlu=" + dev;
  const auto prompt = [&](const std::vector<Json>& examples, int shots) {
    write_file(dev, lines_of(examples));
    return eval_answers(concat(command, " --shots ", shots)).at(0)["prompt"].get<std::string>();
  };
  const std::string header =
      "The following are multiple choice questions (with answers) about high school biology.\n\n";
  const std::string choices = "\nA. one\nB. two\nC. three\nD. four\nAnswer:";
  const std::string question = "What is a root?" + choices;
  const std::string one = "What is a cell?" + choices + " A\n\n",
                    two = "What is a leaf?" + choices + " D\n\n";
  CHECK(prompt({anatomy, first, second}, 0) == header + question);
  CHECK(prompt({anatomy, first, second}, 1) == header + one + question);
  CHECK(prompt({second, anatomy, first}, 1) == header + two + question);
  CHECK(prompt({first, anatomy, second}, 2) == header + one + two + question);

  // Too few, as in the harness, is an error.
  write_file(dev, lines_of({anatomy, anatomy, first}));
  const Output out = shell("./chat eval " + command + " --threads 1 --shots 2");
  CHECK(out.status == 1);
  CHECK(out.text == concat("error: ", dev, ": found 1 examples of the subject ",
                           "\"high_school_biology\", expected 2, those of --shots\n"));

  // A file may be both: a question is not among its own examples.
  const std::vector<Json> both = eval_answers(
      "test/golden/eval_model --tasks mmlu=" + (dir / "all").string() + " --shots-from mmlu=" +
      [&] {
        write_file(dir / "all", lines_of({first, asked[0], second}));
        return (dir / "all").string();
      }() +
      " --shots 1");
  CHECK(both.at(0)["prompt"] == header + question + " B\n\n" + "What is a cell?" + choices);
  CHECK(both.at(1)["prompt"] == header + one + question);
}

TEST_CASE("benchmarks are read from every shape of file, with --map and --bad-lines") {
  const TempDir dir;
  const std::string file = dir / "questions", model = "test/golden/eval_model --tasks ";
  const std::vector<Json> items = {mmlu_item("law", "Who?", 1), mmlu_item("law", "What?", 2)};
  write_file(file, lines_of(items));
  const std::vector<Json> expected = eval_answers(model + "mmlu=" + file);
  REQUIRE(expected.size() == 2);
  const auto same_as_expected = [&](const std::string& text, const std::string& flags = "") {
    write_file(file, text);
    std::vector<Json> answers = eval_answers(model + "mmlu=" + file + flags);
    REQUIRE(answers.size() == 2);
    for (size_t i = 0; i < 2; i++) {
      CHECK(answers[i]["prompt"] == expected[i]["prompt"]);
      CHECK(answers[i]["choices"] == expected[i]["choices"]);
      CHECK(answers[i]["expected"] == expected[i]["expected"]);
    }
  };
  std::vector<Json> lettered, renamed;  // the choices under A, B, ..; the keys of another file
  for (Json item : items) {
    renamed.push_back({{"input", item["question"]},
                       {"meta", {{"subjects", {item["subject"]}}}},
                       {"options", item["choices"]},
                       {"answer", "no answer"},
                       {"gold", item["answer"]}});
    for (int i = 0; i < 4; i++) item[std::string(1, char('A' + i))] = item["choices"][size_t(i)];
    item.erase("choices");
    item["answer"] = std::string(1, char('A' + item["answer"].get<int>()));
    lettered.push_back(item);
  }
  same_as_expected(lines_of(lettered));
  same_as_expected(lines_of(renamed),
                   " --map question=input --map subject=meta.subjects.0 --map choices=options "
                   "--map answer=gold");
  same_as_expected("not JSON\n" + items[0].dump() + "\n{\"question\": \"x\"}\n" + items[1].dump(),
                   " --bad-lines skip");
  const Json r = eval(model + "mmlu=" + file + " --bad-lines skip");
  CHECK(r["mmlu"]["left_out"] == Json({{"bad line", 2}}));
  CHECK(r["mmlu"]["n"] == 2);

  write_file(file, lines_of(renamed));
  const Output out = shell("./chat eval " + model + "mmlu=" + file);
  CHECK(out.status == 1);
  CHECK(contains(out.text, "questions:1: found the keys"));
  CHECK(contains(out.text, "\"options\""));
  CHECK(contains(out.text, "--map"));
  write_file(file, "{}\n");
  const Output none = shell("./chat eval " + model + "mmlu=" + file + " --bad-lines skip");
  CHECK(none.status == 1);
  CHECK(contains(none.text, "found no record to use: 1 bad line"));
}

TEST_CASE("GSM8K's prompt is lm-evaluation-harness's") {
  const TempDir dir;
  write_file(dir / "train", lines_of({{{"question", "How many? "}, {"answer", "2+2=4\n#### 4"}},
                                      {{"question", "Which?"}, {"answer", "So 5.\n#### 5"}},
                                      {{"question", "Why?"}, {"answer", "#### 6"}}}));
  write_file(dir / "test", lines_of({{{"question", "And now?\n"}, {"answer", "#### 7"}}}));
  const std::vector<Json> answers = eval_answers(
      concat("test/golden/eval_model --base --no-start --max-tokens 2 --shots 2 --tasks gsm8k=",
             (dir / "test").string(), " --shots-from gsm8k=", (dir / "train").string()));
  CHECK(answers.at(0)["prompt"] ==
        "Question: How many? \nAnswer: 2+2=4\n#### 4\n\nQuestion: Which?\nAnswer: So 5.\n#### 5\n\n"
        "Question: And now?\n\nAnswer:");
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
    m.write(int(chatml(t, plain, true).ids.size()), "A baker.<|im_end|>");
    int n = m.write(int(chatml(t, tools, true).ids.size()),
                    "<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": "
                    "\"6*7\"}}\n</tool_call><|im_end|>");
    tools.messages.push_back({"assistant", "", {{"calculator", R"({"expression": "6*7"})"}}});
    tools.messages.push_back({"tool", "42", {}});
    n += int(chatml_template(t).ids_behind_turn(tools).size());
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
  m.write(int(chatml(t, {.messages = {{"user", "How many?", {}}}}, true).ids.size()),
          "Steps.\n#### $1,042.00<|im_end|>");
  const std::string shot = "Question: Why?\nAnswer: " + solved + "\n\nQuestion: How many?\nAnswer:";
  m.write(1 + int(t.encode(shot).size()), " 6*7 = <<6*7=42>>42\n#### 42.\n\nQuestion: 99");
  const std::string dir = m.save();
  CHECK(eval(dir + " --tasks gsm8k=" + file)["gsm8k"]["value"] == .5);
  // Other names of the same things, and an answer in a box.
  const std::string math = m.dir() / "math.jsonl";
  write_file(math, Json{{"problem", "How many?"}, {"solution", "So \\boxed{1042}."}}.dump());
  CHECK(eval(dir + " --tasks gsm8k=" + math)["gsm8k"]["value"] == 1);
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
      {"--tasks " + d + "check", "check:1: found the keys \"task\", \"messages\""},
      {"--tasks " + d + "role", "role:1: messages[0]: role: found \"cat\""},
      {"--tasks " + d + "type", "type:1: check: type: found \"vibes\""},
      {"--tasks " + d + "empty", "empty: found"},
      {"--tasks hellaswag=" + d + "label", "label:1: label: found 1, expected 0 to 0"},
      {"--tasks hellaswag=" + d + "gsm8k", "gsm8k:1: found the keys \"question\", \"answer\""},
      {"--tasks gsm8k=" + d + "gsm8k", "gsm8k:1: answer: found"},
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
