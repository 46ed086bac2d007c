// Tools, and ./chat as its user meets it: through a pipe and in a terminal.
#include <doctest/doctest.h>
#include <poll.h>
#include <pty.h>
#include <termios.h>

#include <csignal>
#include <sstream>

#include "cake/generate.h"
#include "cake/tools.h"
#include "test/chatml.h"
#include "test/golden.h"
#include "test/scripted_model.h"

using namespace cake;

// ---------------------------------------------------------------------------------------------
// The calculator

TEST_CASE("the calculator's decimals are exact") {
  const std::pair<const char*, const char*> cases[] = {
      {"0.1+0.2", "0.3"},
      {"9.11-9.9", "-0.79"},
      {"2+3*4", "14"},
      {"(2+3)*4", "20"},
      {"100/8/5", "2.5"},
      {"10-2-3", "5"},
      {"--5", "5"},
      {"-(3+4)*2", "-14"},
      {"2*-3", "-6"},
      {" .5 + 5. ", "5.5"},
      {"-0", "0"},
      {"1/3", "0.333333333333"},
      {"-2/3", "-0.666666666667"},
      {"1/3*3", "1"},
      {"2999999999999.9999/3", "1000000000000"},
      {"1/30000000000", "0.0000000000333333333333"},
      {"123456789012345678*1000000000000000", "123456789012345678000000000000000"},
      {"48/2", "24"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    CHECK(calculate(c.first) == c.second);
  }
}

TEST_CASE("the calculator takes arithmetic and nothing else") {
  const std::string deep = std::string(101, '(') + "1" + std::string(101, ')');
  const std::pair<std::string, const char*> cases[] = {
      {"", "found nothing"},
      {"1/0", "division by zero"},
      {"1/(2-2)", "division by zero"},
      {"1e5", "found \"e5\", expected an operator"},
      {"2**3", "expected a number"},
      {"1 2", "expected an operator"},
      {"(1", "found the end, expected )"},
      {"1)", "found \")\""},
      {".", "expected a number"},
      {"1,000", "found \",000\""},
      {"__import__('os')", "expected a number"},
      {"system", "expected a number"},
      {deep, "nested deeper than 100"},
      {std::string(40, '9'), "more than 36 digits"},
      {"99999999999999999999*99999999999999999999", "more than 36 digits"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    CHECK(contains(error_of([&] { calculate(c.first); }), c.second));
  }
  CHECK(calculate(std::string(100, '(') + "1" + std::string(100, ')')) == "1");
  CHECK(calculate(std::string(100000, '-') + "1") == "1");
}

// ---------------------------------------------------------------------------------------------
// The search

TEST_CASE("the search finds the passage with the rarer words, or nothing") {
  const Search search({"Anna Frost is a baker. She lives in Olm. Anna likes green apples.",
                       "Bert Frost is a sailor. He lives in Kvist.", "The town of Olm is old."},
                      {}, 8);
  CHECK(search.passages() ==
        std::vector<std::string>{"Anna Frost is a baker.", "She lives in Olm.",
                                 "Anna likes green apples.", "Bert Frost is a sailor.",
                                 "He lives in Kvist.", "The town of Olm is old."});
  CHECK(search.best("Which apples does Anna like?") == "Anna likes green apples.");
  CHECK(search.best("SAILOR") == "Bert Frost is a sailor.");
  CHECK(search.best("frost") == "Anna Frost is a baker.");  // the first among equals
  CHECK(search.best("old Olm") == "The town of Olm is old.");
  CHECK(search.best("Zorn Blixt") == "");
  CHECK(search.best("") == "");
  CHECK(Search({}).best("anything") == "");
}

TEST_CASE("the search scores by BM25") {
  // n = 3, mean length 7/3; "a" is in two passages, "b" in one: idf(a) = ln 1.6, idf(b) = ln 2.667.
  // Passage 0, "a a b": a: 2 * 2.2 / (2 + 1.2 (.25 + .75 * 9/7)) = 1.269; b: .8894.
  // For "a": passage 0 has 1.269 ln 1.6 = .597, passage 1, "a", 2.2 / (1 + 1.2 (.25 + .75 * 3/7)) =
  // 1.3050 ln 1.6 = .613: the short one wins, and with "b" the long one.
  const Search search({"a a b", "a", "c d e"});
  CHECK(search.best("a") == "a");
  CHECK(search.best("a b") == "a a b");
}

TEST_CASE("passages are whole sentences while those fit, and never longer than asked") {
  int counted = 0;
  const auto letters = [&](std::string_view s) {
    counted++;
    return int(s.size());
  };
  const Search search({"One two. Three.\nFour five six seven eight nine ten eleven. Twelve"},
                      letters, 16);
  CHECK(counted > 0);
  CHECK(search.passages() == std::vector<std::string>{"One two. Three.", "Four five six",
                                                      "seven eight nine", "ten eleven.", "Twelve"});
}

TEST_CASE("what goes wrong in a call is the tool's answer") {
  CHECK(run_tool({"calculator", R"({"expression": "6*7"})"}, nullptr) == "42");
  CHECK(run_tool({"calculator", R"({"expression": "1/0"})"}, nullptr) ==
        "error: calculator: division by zero");
  CHECK(
      contains(run_tool({"calculator", R"({"x": 1})"}, nullptr), "error: calculator: expression"));
  CHECK(contains(run_tool({"calculator", "{"}, nullptr), "error: calculator: arguments: not JSON"));
  CHECK(contains(run_tool({"shell", "{}"}, nullptr), "error: found a call of \"shell\""));
  CHECK(
      contains(run_tool({"search", R"({"query": "x"})"}, nullptr), "error: search: there are no"));
  CHECK(contains(run_tool({"", "what"}, nullptr), "error: a call: found something else"));
  const Search search({"A cat."});
  CHECK(run_tool({"search", R"({"query": "cat"})"}, &search) == "A cat.");
  CHECK(run_tool({"search", R"({"query": "dog"})"}, &search) == "");
}

TEST_CASE("a turn's ids are read as its message, and its tools' answers continue its ids") {
  const ScriptedModel model;
  const Tokenizer& t = model.tokenizer();
  Conversation c{.messages = {{"user", "How many?", {}},
                              {"assistant",
                               "Let me see.",
                               {{"calculator", R"({"expression":"6*7"})"}, {"search", "{}"}}}},
                 .tools = {kCalculatorTool}};
  const ChatTemplate& chat = chatml_template(t);
  const std::vector<int> before =
      chatml(t, {.messages = {c.messages[0]}, .tools = c.tools}, true).ids;
  const std::vector<int> whole = chatml(t, c).ids;
  REQUIRE(std::equal(before.begin(), before.end(), whole.begin()));
  const int end = chat.end_of_turn();
  const std::vector<int> turn(
      whole.begin() + int64_t(before.size()),
      std::find(whole.begin() + int64_t(before.size()), whole.end(), end) + 1);
  const Message m = read_turn(chat, turn);
  CHECK(m.content == "Let me see.");
  REQUIRE(m.tool_calls.size() == 2);
  CHECK(m.tool_calls[0].name == "calculator");
  CHECK(m.tool_calls[0].arguments == R"({"expression": "6*7"})");

  const std::vector<int> appended = answer_calls(chat, c, nullptr);
  REQUIRE(c.messages.size() == 4);
  CHECK(c.messages[2].content == "42");
  std::vector<int> ids = before;
  ids.insert(ids.end(), turn.begin(), turn.end());
  ids.insert(ids.end(), appended.begin(), appended.end());
  CHECK(ids == chatml(t, c, true).ids);

  Conversation plain{.messages = {c.messages[0], read_turn(chat, t.encode("No.<|im_end|>", true))},
                     .tools = {}};
  CHECK(answer_calls(chat, plain, nullptr).empty());
  CHECK(plain.messages.size() == 2);
  CHECK(read_turn(chat, t.encode("No call.<|endoftext|>", true)).content == "No call.");
  const Message bad = read_turn(chat, t.encode("<tool_call>\nnonsense<|im_end|>", true));
  REQUIRE(bad.tool_calls.size() == 1);
  CHECK(bad.tool_calls[0].name == "");
  plain.messages[1] = bad;
  CHECK(!answer_calls(chat, plain, nullptr).empty());
}

// ---------------------------------------------------------------------------------------------
// ./chat generate: the texts of its command line and the files of its prompts

namespace {

// Continues "ask" with "The answer\nis 1." and any other prompt with "xxx...".
struct Asked {
  ScriptedModel m;
  std::string dir;

  Asked() {
    m.write(1 + int(m.tokenizer().encode("ask").size()), "The answer\nis 1.<|endoftext|>");
    dir = m.save();
  }
  Output generate(const std::string& arguments) const {
    const bool samples = contains(arguments, "--temperature");
    return shell("./chat generate " + dir + " --threads 1 " + (samples ? "" : "--temperature 0 ") +
                 arguments);
  }
  // The lines of --output.
  std::vector<Json> results(const std::string& arguments) const {
    const std::string path = m.dir() / "results.jsonl";
    const Output out = generate(arguments + " -o " + path);
    REQUIRE_MESSAGE(out.status == 0, out.text);
    std::vector<Json> results;
    std::istringstream lines(read_file(path));
    for (std::string line; std::getline(lines, line);) results.push_back(Json::parse(line));
    return results;
  }
  std::vector<std::string> prompts(const std::string& arguments) const {
    std::vector<std::string> prompts;
    for (const Json& result : results(arguments + " --max-tokens 1")) {
      prompts.push_back(result["prompt"]);
    }
    return prompts;
  }
};

using Texts = std::vector<std::string>;

}  // namespace

TEST_CASE("--stop and --prompt of chat generate read escapes; --raw and files have none") {
  const Asked asked;
  CHECK(asked.generate("--prompt ask").text == "askThe answer\nis 1.\n");
  CHECK(asked.generate("--prompt ask --stop '\\n'").text == "askThe answer\n");
  CHECK(asked.generate("--prompt ask --stop '\\x0ais'").text == "askThe answer\n");
  CHECK(asked.generate("--prompt ask --stop '\\n' --raw").text == "askThe answer\nis 1.\n");
  CHECK(asked.prompts("--prompt 'a\\n\\tb\\\\'") == Texts{"a\n\tb\\"});
  CHECK(asked.prompts("--raw --prompt 'a\\n\\frac'") == Texts{"a\\n\\frac"});
  for (const std::string name : {"p.txt", "p.jsonl"}) {
    const std::string path = asked.m.dir() / name;
    write_file(path, name == "p.txt" ? "a\\nb\\frac\n" : Json{{"prompt", "a\\nb\\frac"}}.dump());
    CHECK(asked.prompts("--prompts " + path) == Texts{"a\\nb\\frac"});
  }
  const Output bad = asked.generate("--prompt '\\frac{1}{2}'");
  CHECK(bad.status == 1);
  CHECK(bad.text.starts_with("error: --prompt: found \\f, expected "));
  CHECK(std::count(bad.text.begin(), bad.text.end(), '\n') == 1);
  // The system message of a conversation, which /system shows.
  const Output system = shell("echo /system | ./chat " + asked.dir + " --system 'Be\\nkind.'");
  CHECK_MESSAGE(contains(system.text, "system: Be\nkind.\n"), system.text);
}

TEST_CASE("nothing of a stop string that spans tokens is printed") {
  const Asked asked;
  const Tokenizer& t = asked.m.tokenizer();
  REQUIRE(t.encode("answer\nis").size() > 1);
  for (const std::string stop : {"answer\nis", "r\nis 1", "swer", "e answer\ni"}) {
    CAPTURE(stop);
    const std::string all = "The answer\nis 1.";
    const Output out = asked.generate("--prompt ask --stop '" + stop + "'");
    CHECK(out.text == "ask" + all.substr(0, all.find(stop)) + "\n");
  }
}

TEST_CASE("prompts are read from every shape of file, told apart by content") {
  const Asked asked;
  const std::string file = asked.m.dir() / "prompts";
  const Texts expected = {"a", "the \u00e9"};
  const std::pair<std::string, std::string> files[] = {
      {"a\nthe \u00e9\n", ""},
      {"a\r\nthe \u00e9", ""},
      {"\xef\xbb\xbf"
       "a\nthe \u00e9\n\n\n",
       ""},
      {"{\"prompt\": \"a\"}\n{\"prompt\": \"the \\u00e9\"}\n", ""},
      {" \n[{\"prompt\": \"a\"},\n {\"prompt\": \"the \u00e9\"}]", ""},
      {"{\"x\": {\"y\": [\"a\"]}}\n{\"x\": {\"y\": [\"the \u00e9\"]}}\n", " --map prompt=x.y.0"},
      {"{\"prompt\": \"a\"}\n{\"prompt\": 3}\nnot JSON\n{}\n{\"prompt\": \"the \u00e9\"}\n",
       " --bad-lines skip"}};
  for (const auto& f : files) {
    const std::string text = f.first, flags = f.second;
    CAPTURE(text);
    write_file(file, text);
    CHECK(asked.prompts("--prompts " + file + flags) == expected);
    CHECK(asked.prompts("--prompts -" + flags + " < " + file) == expected);
    write_file(file + ".gz", deflated(text));
    CHECK(asked.prompts("--prompts " + file + ".gz" + flags) == expected);
  }
  const Output out = asked.generate("--max-tokens 1 --bad-lines skip --prompts " + file);
  CHECK(contains(out.text, "left out 3 of 5 records: bad line\n"));
  CHECK(contains(out.text, "prompts:2: \"prompt\": found a number"));
  write_file(file, "{\"question\": \"a\"}\n");
  CHECK(contains(asked.generate("--prompts " + file).text, "found the keys \"question\""));
}

TEST_CASE("a prompt that fills the context is named, or left out") {
  const Asked asked;
  const int T = asked.m.T();
  const Tokenizer& t = asked.m.tokenizer();
  REQUIRE(t.encode("zz").size() == 2);  // z is no part of the vocabulary's words
  const std::string file = asked.m.dir() / "prompts";
  const auto prompt_of = [](int tokens) { return std::string(size_t(tokens - 1), 'z'); };
  for (const int left : {2, 1}) {  // tokens of the context behind the prompt
    write_file(file, prompt_of(T - left) + "\n");
    const std::vector<Json> results = asked.results("--max-tokens 5 --prompts " + file);
    CHECK(results.at(0)["tokens"].size() == size_t(left));
    CHECK(results.at(0)["finish"] == "context");
  }
  write_file(file, "a\n" + prompt_of(T) + "\nthe\n");
  const Output out = asked.generate("--prompts " + file);
  CHECK(out.status == 1);
  CHECK(out.text == concat("error: ", file, ":2: found ", T, " tokens, expected at most ", T - 1,
                           ", since the context is ", T, "\n"));
  CHECK(asked.prompts("--bad-lines skip --prompts " + file) == Texts{"a", "the"});
  CHECK(contains(asked.generate("--max-tokens 1 --bad-lines skip --prompts " + file).text,
                 "left out 1 of 3 records: too long\n"));
  write_file(file, prompt_of(T) + "\n");
  const Output none = asked.generate("--bad-lines skip --prompts " + file);
  CHECK(none.status == 1);
  CHECK(contains(none.text, "prompts: found no record to use: 1 too long"));
}

TEST_CASE("the smallest temperature writes the most likely text, with finite log-probabilities") {
  const Asked asked;
  const Json greedy = asked.results("--prompt ask --max-tokens 9").at(0);
  for (const char* temperature : {"1e-3", "1e-30", "1e-39", "1e-45"}) {
    CAPTURE(temperature);
    const Json small =
        asked.results(concat("--prompt ask --max-tokens 9 --temperature ", temperature)).at(0);
    CHECK(small["completion"] == greedy["completion"]);
    CHECK(small["completion"] != "");
    for (const Json& logp : small["logp"]) CHECK(logp == 0);
  }
}

// ---------------------------------------------------------------------------------------------
// ./chat through a pipe

namespace {

// A conversation that the scripted model is to write its part of.
struct Plan {
  ScriptedModel& model;
  Conversation c;
  const ChatTemplate& chat;
  int n = 0;  // ids up to the end of the last turn of the assistant

  explicit Plan(ScriptedModel& m, Conversation opening = {})
      : model(m), c(std::move(opening)), chat(chatml_template(m.tokenizer())) {}
  Plan(ScriptedModel& m, const ChatTemplate& other) : model(m), chat(other) {}
  Plan& user(const std::string& text) {
    c.messages.push_back({.role = "user", .content = text});
    return *this;
  }
  // Behind a user's message the whole conversation is rendered; behind tools, what they answered.
  Plan& assistant(const std::string& text) {
    const bool goes_on = c.messages.back().role == "tool";
    const int begin =
        goes_on ? n + int(chat.ids_behind_turn(c).size()) : int(chat.render(c, true).ids.size());
    const std::string end(model.tokenizer().token_bytes(chat.end_of_turn()));
    n = model.write(begin, text + end);
    c.messages.push_back(read_turn(chat, model.tokenizer().encode(text, true)));
    return *this;
  }
  Plan& tool(const std::string& text) {
    c.messages.push_back({.role = "tool", .content = text});
    return *this;
  }
};

Output say(const std::string& model, const std::string& flags, const std::string& lines) {
  write_file(model + ".lines", lines);
  return shell("./chat " + model + " --threads 1 --temperature 0 " + flags + " < " + model +
               ".lines");
}

std::string call_text(const std::string& name, const std::string& arguments) {
  return "<tool_call>\n{\"name\": \"" + name + "\", \"arguments\": " + arguments +
         "}\n</tool_call>";
}

}  // namespace

TEST_CASE("chat answers turn by turn, and every command does what help says") {
  ScriptedModel m;
  Plan(m).user("hello").assistant("The answer is 1.").user("more").assistant("The answer is 2.");
  Plan(m, {.messages = {{"system", "Be a very kind and patient assistant, in every answer.", {}}}})
      .user("who?")
      .assistant("A kind one.");
  const std::string dir = m.save(), saved = m.dir() / "saved.jsonl";
  const Output out =
      say(dir, "--max-tokens 40",
          "hello\nmore\n/retry\n/save " + saved +
              "\n/system\n/system Be a very kind and patient assistant, in every answer.\n"
              "who?\n/system\n/save " +
              saved +
              "\n/reset\n/retry\n/save\n/temperature 0.5\n/temperature -1\n/temperature x\n"
              "/nothing\n/help\n/quit\nnever read\n");
  REQUIRE_MESSAGE(out.status == 0, out.text);
  CHECK(out.text.starts_with("The answer is 1.\nThe answer is 2.\nThe answer is 2.\nsaved in " +
                             saved +
                             "\nno system message\na new conversation with this system message\n"
                             "A kind one.\nsystem: Be a very kind and patient assistant, in every "
                             "answer.\nsaved in " +
                             saved +
                             "\na new conversation\nthere is no message yet\n"
                             "/save: a file's name is missing\ntemperature 0.5\n"
                             "temperature: found -1, expected 0 to 100\n"
                             "temperature: found x, expected 0 to 100\n"
                             "there is no /nothing; /help lists what there is\n"));
  for (const char* command : {"/reset", "/system", "/retry", "/save", "/temperature", "/quit"}) {
    CHECK(contains(out.text, std::string("\n") + command + " ") !=
          (std::string(command) == "/quit"));  // which stands beside Ctrl+D
  }
  CHECK(contains(out.text, "Ctrl+C "));

  std::istringstream lines(read_file(saved));
  std::string first, second;
  std::getline(lines, first);
  std::getline(lines, second);
  CHECK(Json::parse(first) == Json::parse(R"({"messages": [{"role": "user", "content": "hello"},
                        {"role": "assistant", "content": "The answer is 1."},
                        {"role": "user", "content": "more"},
                        {"role": "assistant", "content": "The answer is 2."}]})"));
  CHECK(Json::parse(second)["messages"].size() == 3);
  CHECK(Json::parse(second)["messages"][0]["role"] == "system");
}

TEST_CASE("chat runs the tools that are called, shows them, and continues with their answers") {
  ScriptedModel m(2048);
  write_file(m.dir() / "documents.jsonl", "{\"text\": \"Anna is a baker in Olm.\"}\n");
  Plan(m, {.tools = {kCalculatorTool, kSearchTool}})
      .user("6*7?")
      .assistant(call_text("calculator", R"({"expression": "6*7"})"))
      .tool("42")
      .assistant("It is 42.")
      .user("Anna?")
      .assistant("Wait.\n" + call_text("search", R"({"query": "Anna"})"))
      .tool("Anna is a baker in Olm.")
      .assistant("A baker.");
  const std::string dir = m.save(), saved = m.dir() / "saved.jsonl";
  const Output out = say(dir, "--calculator --documents " + (m.dir() / "documents.jsonl").string(),
                         "6*7?\nAnna?\n/save " + saved + "\n");
  CHECK(out.status == 0);
  CHECK(out.text ==
        "  calculator {\"expression\": \"6*7\"}\n  = 42\nIt is 42.\nWait.\n"
        "  search {\"query\": \"Anna\"}\n  = Anna is a baker in Olm.\nA baker.\nsaved in " +
            saved + "\n");
  const Json json = Json::parse(read_file(saved));
  CHECK(json["tools"].size() == 2);
  REQUIRE(json["messages"].size() == 8);
  CHECK(json["messages"][1]["tool_calls"][0]["function"]["arguments"]["expression"] == "6*7");
  CHECK(json["messages"][2] == Json({{"role", "tool"}, {"content", "42"}}));
  CHECK(json["messages"][7]["content"] == "A baker.");
}

TEST_CASE("chat drops the oldest turns when the context is full, and says so") {
  ScriptedModel m(128);
  const std::string dir = m.save();
  std::string lines;
  for (int i = 0; i < 8; i++) lines += "tell me of it\n";
  const Output out = say(dir, "--max-tokens 10", lines + std::string(300, 'z') + "\nhi\n");
  CHECK(out.status == 0);
  CHECK(contains(out.text, "the context of 128 tokens is full: the oldest "));
  CHECK(contains(out.text, " are dropped\n"));
  CHECK(contains(out.text, "xxxxxxxxxx\n(the answer is as long as --max-tokens allows)\n"));
  CHECK(contains(out.text, " in the context of 128: the message was not added"));
  CHECK(out.text.ends_with("allows)\n"));
}

TEST_CASE("chat keeps a conversation within --context") {
  ScriptedModel m(512);
  const std::string dir = m.save();
  std::string lines;
  for (int i = 0; i < 8; i++) lines += "tell me of it\n";
  const Output out =
      say(dir, "--context 128 --max-tokens 10", lines + std::string(300, 'z') + "\nhi\n");
  CHECK(out.status == 0);
  CHECK(contains(out.text, "the context of 128 tokens is full: the oldest "));
  CHECK(contains(out.text, " in the context of 128: the message was not added"));
  const Output whole = say(dir, "--max-tokens 10", lines);
  CHECK(!contains(whole.text, "is full"));
  const Output filled = say(dir, "--context 60", "tell me of it\n");
  CHECK(contains(filled.text, "x\n(the context of 60 tokens is full)\n"));
  const Output system = say(dir, "--context 20 --system 'tell me of the answer at length'", "hi\n");
  CHECK(contains(system.text, "expected at most 10, half of the context"));
}

TEST_CASE("chat answers the same from keys and values in bf16 where the model is sure") {
  ScriptedModel m(256);
  Plan(m).user("hello").assistant("The answer is 1.").user("more").assistant("The answer is 2.");
  const std::string dir = m.save();
  CHECK(say(dir, "--cache-type bf16", "hello\nmore\n").text == say(dir, "", "hello\nmore\n").text);
}

TEST_CASE("a message that is too long is refused, and the conversation stays") {
  ScriptedModel m(256);
  Plan(m).user("hello").assistant("The answer is 1.").user("more").assistant("The answer is 2.");
  const std::string dir = m.save(), saved = m.dir() / "saved.jsonl";
  const std::string too_long(300, 'z');
  const Output out = say(dir, "", "hello\n" + too_long + "\nmore\n/save " + saved + "\n");
  CHECK(out.status == 0);
  CHECK(contains(out.text, "expected at most 255 in the context of 256: the message was not"));
  CHECK(!contains(out.text, "dropped"));
  CHECK(contains(out.text, "not added\nThe answer is 2.\n"));
  CHECK(Json::parse(read_file(saved))["messages"].size() == 4);

  // A document that has ended stays too, until another one begins.
  ScriptedModel b(256);
  b.write(1 + int(b.tokenizer().encode("Once").size()), " a cat.<|endoftext|>");
  const std::string base = b.save(), text = b.dir() / "saved.jsonl";
  const Output document = say(base, "--base", "Once\n" + too_long + "\n/save " + text + "\n");
  CHECK(contains(document.text, "the message was not added"));
  CHECK(contains(read_file(text), "Once a cat."));
}

TEST_CASE("blank lines inside an answer are printed, newlines around it are not") {
  ScriptedModel m(512);
  Plan(m)
      .user("a poem")
      .assistant("\n\nRoses:\n\n\n  red\n\nViolets\n\n")
      .user("more")
      .assistant("No.");
  CHECK(say(m.save(), "", "a poem\nmore\n").text == "Roses:\n\n\n  red\n\nViolets\nNo.\n");
}

TEST_CASE("a base model continues what is typed until the document ends") {
  ScriptedModel m;
  const int n = 1 + int(m.tokenizer().encode("Once").size());
  const int then = m.write(n, " upon a time") + int(m.tokenizer().encode("\nand then").size());
  m.write(then, " the end.<|endoftext|>");
  const std::string dir = m.save(), saved = m.dir() / "saved.jsonl";
  const Output out =
      say(dir, "--base --max-tokens " + std::to_string(m.tokenizer().encode(" upon a time").size()),
          "Once\nand then\n/save " + saved + "\n/system x\nOnce\n");
  CHECK(out.status == 0);
  CHECK(out.text.starts_with(" upon a time\n the end.\n--- the document ends; the next begins\n"));
  CHECK(contains(out.text, "a base model has no system message\n upon a time\n"));
  CHECK(contains(read_file(saved), "Once upon a time\\nand then the end."));
}

namespace {

// A model whose tokenizer_config.json has another template.
std::string with_template(ScriptedModel& m, const std::string& text) {
  const std::string dir = m.save(), config = dir + "/tokenizer_config.json";
  Json json = read_json(config);
  text.empty() ? void(json.erase("chat_template")) : void(json["chat_template"] = text);
  write_file(config, json.dump());
  return dir;
}

// In the shape of Llama 3's, with the tokens of the test's tokenizer; one more token ends a turn.
const std::string kHeaders =
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_start|>\n\n' + m['content'] | "
    "trim + '<tool_response>' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}";

// Without special tokens: what stands before the next question ends an answer.
const std::string kInstructions =
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif 'no way' in m.content %}{{ raise_exception('not this') }}"
    "{% elif m.role == 'user' %}{{ '### Ask: ' + m.content + '\n\n### Answer: ' }}"
    "{% else %}{{ m.content | trim + '\n\n' }}{% endif %}{% endfor %}";

}  // namespace

TEST_CASE("chat talks in the template of the model, whatever it is") {
  ScriptedModel m;
  const ChatTemplate headers(m.tokenizer(), kHeaders, "headers");
  Plan(m, headers).user("hello").assistant("The answer is 1.").user("more").assistant("Two.");
  CHECK(say(with_template(m, kHeaders), "", "hello\nmore\n").text == "The answer is 1.\nTwo.\n");
  // The model's own, or the one of a file.
  const std::string file = m.dir() / "headers.jinja";
  write_file(file, kHeaders);
  CHECK(say(m.save(), "--template " + file, "hello\nmore\n").text == "The answer is 1.\nTwo.\n");

  ScriptedModel i;
  const ChatTemplate instructions(i.tokenizer(), kInstructions, "instructions");
  REQUIRE(instructions.find_end_of_turn() < 0);
  Conversation c{.messages = {{"user", "hi", {}}}, .tools = {}};
  i.write(int(instructions.render(c, true).ids.size()), "Well.\n\n### Ask: never shown");
  c.messages.push_back({"assistant", "Well.", {}});
  c.messages.push_back({"user", "more", {}});
  i.write(int(instructions.render(c, true).ids.size()), "No.\n\n### Ask: never shown");
  const std::string dir = with_template(i, kInstructions), saved = i.dir() / "saved.jsonl";
  CHECK(say(dir, "", "hi\nmore\n/save " + saved + "\n").text ==
        "Well.\nNo.\nsaved in " + saved + "\n");
  CHECK(Json::parse(read_file(saved))["messages"][1]["content"] == "Well.");
}

TEST_CASE("what a template refuses is one line, and the conversation goes on") {
  ScriptedModel m;
  const ChatTemplate instructions(m.tokenizer(), kInstructions, "instructions");
  const Conversation c{.messages = {{"user", "hi", {}}}, .tools = {}};
  m.write(int(instructions.render(c, true).ids.size()), "Well.\n\n### Ask: never shown");
  const std::string dir = with_template(m, kInstructions);
  const Output out = say(dir, "", "/system Be kind.\nno way\nhi\n");
  CHECK(out.status == 0);
  CHECK(contains(out.text, "no system here"));
  CHECK(contains(out.text, "not this: the message was not added\n"));
  CHECK(contains(out.text, "\nWell.\n"));
  const Output system = say(dir, "--system 'Be kind.'", "hi\n");
  CHECK(system.status == 1);
  CHECK(contains(system.text, "no system here"));
  CHECK(std::count(system.text.begin(), system.text.end(), '\n') == 1);
  const Output tools = say(dir, "--calculator", "hi\n");
  CHECK(tools.status == 1);
  CHECK(contains(tools.text, "expected one that declares tools"));

  CHECK(contains(say(with_template(m, ""), "", "hi\n").text, "found no chat template"));
  CHECK(say(with_template(m, ""), "--template chatml --max-tokens 3", "hi\n")
            .text.starts_with("xxx\n"));
  const Output broken = say(with_template(m, "{% for x %}"), "", "hi\n");
  CHECK(broken.status == 1);
  CHECK(std::count(broken.text.begin(), broken.text.end(), '\n') == 1);
  CHECK(contains(broken.text, ":1: "));
}

TEST_CASE("a system message that a template leaves out is said to be") {
  ScriptedModel m;
  const std::string users =
      "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + "
      "m.content + '<|im_end|>' }}{% endif %}{% endfor %}";
  const std::string dir = with_template(m, users);
  const std::string said = "the chat template leaves the system message out\n";
  CHECK(contains(say(dir, "--system 'Be kind.' --max-tokens 2", "hi\n").text, said));
  CHECK(!contains(say(dir, "--max-tokens 2", "hi\n").text, said));
  CHECK(!contains(say(m.save(), "--system 'Be kind.' --max-tokens 2", "hi\n").text, said));
}

TEST_CASE("--template-set and --date reach the template") {
  ScriptedModel m;
  const std::string text =
      "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
      "{% if strftime_now('%Y-%m-%d') == '2026-02-03' %}{{ 'dated' }}{% endif %}{% if style == "
      "{'long': true} %}{{ 'x' * 9 }}{% endif %}";
  TemplateOptions options{.date = "2026-02-03"};
  options.variables["style"] = {{"long", true}};
  const ChatTemplate chat(m.tokenizer(), text, "dated", options);
  const ChatTemplate other(m.tokenizer(), text, "dated", {.date = "2026-02-03"});
  const Conversation c{.messages = {{"user", "hi", {}}}, .tools = {}};
  m.write(int(chat.render(c, true).ids.size()), "Long.<|im_end|>");
  m.write(int(other.render(c, true).ids.size()), "No.<|im_end|>");
  const std::string dir = with_template(m, text);
  CHECK(say(dir, "--date 2026-02-03", "hi\n").text == "No.\n");
  CHECK(say(dir, R"(--date 2026-02-03 --template-set 'style={"long": true}')", "hi\n").text ==
        "Long.\n");
}

namespace {

// Longer than the reasoning that is cut before it, so that the answer to it is behind the others.
const std::string kLong = "Then tell me more of it, at length, and with every detail.";

}  // namespace

TEST_CASE("chat renders what was said again: earlier turns lose their reasoning") {
  // The answers stand where they follow the rendered conversation, and nowhere else.
  ScriptedModel m;
  Plan(m)
      .user("hello")
      .assistant("<think>\nA long while.\n</think>\n\nThe answer is 1.")
      .user(kLong)
      .assistant("<think>\nAgain.\n</think>\n\nThe answer is 2.")
      .user(kLong)
      .assistant("The answer is 3.");
  const std::string dir = m.save(), saved = m.dir() / "saved.jsonl";
  const Output out =
      say(dir, "", "hello\n" + kLong + "\n/retry\n" + kLong + "\n/save " + saved + "\n");
  CHECK(out.text ==
        "<think>\nA long while.\n</think>\n\nThe answer is 1.\n"
        "<think>\nAgain.\n</think>\n\nThe answer is 2.\n"
        "<think>\nAgain.\n</think>\n\nThe answer is 2.\nThe answer is 3.\nsaved in " +
            saved + "\n");
  const Json messages = Json::parse(read_file(saved))["messages"];
  REQUIRE(messages.size() == 6);
  CHECK(messages[1]["content"] == "<think>\nA long while.\n</think>\n\nThe answer is 1.");
}

TEST_CASE("--thinking hide does not print reasoning, and cut takes it out of the conversation") {
  ScriptedModel m;
  const std::string reasoning = "\nA long while.\n";
  Plan(m)
      .user("hello")
      .assistant("<think>" + reasoning + "</think>\n\nThe answer is 1.")
      .user(kLong)
      .assistant("The answer is 2.");
  const std::string dir = m.save();
  const size_t tokens = m.tokenizer().encode(reasoning).size();
  for (const std::string how : {"hide", "cut"}) {
    CAPTURE(how);
    const std::string saved = m.dir() / how;
    const std::string said = how == "cut" ? "cut" : "hidden";
    CHECK(say(dir, "--thinking " + how, "hello\n" + kLong + "\n/save " + saved + "\n").text ==
          concat("(", tokens, " tokens of reasoning, ", said, ")\nThe answer is 1.\n",
                 "The answer is 2.\nsaved in ", saved, "\n"));
    CHECK(contains(read_file(saved), "A long while.") == (how == "hide"));
  }
  // Reasoning that does not end.
  ScriptedModel n;
  Plan(n).user("hello").assistant("<think>\nOn and on");
  const std::string endless = n.save(), saved = n.dir() / "saved.jsonl";
  const Output out = say(endless, "--thinking cut", "hello\n/save " + saved + "\n");
  CHECK(contains(out.text, "tokens of reasoning, cut)\nsaved in "));
  CHECK(Json::parse(read_file(saved))["messages"][1]["content"] == "");
}

TEST_CASE("reasoning that the prompt opens is reasoning, and a template may cut it from turns") {
  // In the shape of DeepSeek-R1's: the header ends with <think>, and what stands before </think> is
  // left out of earlier turns. A model whose <think> is text is read in the same way.
  const std::string opens =
      "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content.split('</think>')"
      "[-1] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";
  ScriptedModel m;
  const ChatTemplate chat(m.tokenizer(), opens, "opens");
  Plan(m, chat)
      .user("hello")
      .assistant("A long while.\n</think>\n\nThe answer is 1.")
      .user(kLong)
      .assistant("Again.\n</think>\n\nThe answer is 2.");
  const std::string dir = with_template(m, opens), saved = m.dir() / "saved.jsonl";
  const Output out = say(dir, "", "hello\n" + kLong + "\n/save " + saved + "\n");
  CHECK(out.text ==
        "<think>A long while.\n</think>\n\nThe answer is 1.\n"
        "<think>Again.\n</think>\n\nThe answer is 2.\nsaved in " +
            saved + "\n");
  CHECK(Json::parse(read_file(saved))["messages"][1]["content"] ==
        "<think>\nA long while.\n</think>\n\nThe answer is 1.");
  CHECK(contains(say(dir, "--thinking hide", "hello\n").text, "hidden)\nThe answer is 1.\n"));
}

TEST_CASE("--template plain ends an answer where the next question would begin") {
  ScriptedModel p;
  const Tokenizer& t = p.tokenizer();
  const std::string first = "User: hi\nAssistant:", second = " Well.\n\nUser: more\nAssistant:";
  p.write(1 + int(t.encode(first).size()), " Well.\nUser: never shown");
  p.write(1 + int(t.encode(first + second).size()), " No.\nUser: never shown");
  CHECK(say(p.save(), "--template plain", "hi\nmore\n").text == " Well.\n No.\n");
}

TEST_CASE("an answer stops at every end token of generation_config.json") {
  ScriptedModel m;
  const std::vector<int> ids = m.tokenizer().encode(" Well done.");
  REQUIRE(std::count(ids.begin(), ids.end(), ids.back()) == 1);
  m.write(1 + int(m.tokenizer().encode("User: hi\nAssistant:").size()), ids);
  const std::string dir = m.save();
  write_file(dir + "/generation_config.json", Json{{"eos_token_id", {0, ids.back()}}}.dump());
  const std::string shown = m.tokenizer().decode(std::span(ids).first(ids.size() - 1));
  CHECK(say(dir, "--template plain --max-tokens 30", "hi\n").text == shown + "\n");
}

// The ids that ./chat makes are not to be seen from outside, but what a model answers that reads
// all of them is: letters, so that the answer is text. dev/golden/llama3_template.py made the ids.
TEST_CASE("chat writes Llama 3's template as transformers does") {
  const Json golden = read_json("test/golden/llama3_template.json");
  const TempDir dir;
  const std::string model = dir / "model";
  std::filesystem::create_directories(dir / "tokenizer");
  write_file(dir / "tokenizer" / "tokenizer.json", golden.at("tokenizer").dump());
  write_file(dir / "tokenizer" / "tokenizer_config.json", golden.at("config").dump());
  const Tokenizer tokenizer = Tokenizer::load(dir / "tokenizer");
  const Config config{.family = Family::llama,
                      .V = tokenizer.vocab_size(),
                      .T = 256,
                      .L = 2,
                      .C = 32,
                      .NH = 2,
                      .NKV = 2,
                      .HS = 16,
                      .F = 64,
                      .bos = tokenizer.special("<|begin_of_text|>"),
                      .eos = tokenizer.special("<|eot_id|>"),
                      .pad = tokenizer.special("<|eot_id|>")};
  const auto gpt = goldens::make_formula_gpt(config);
  const int head = gpt->table().find("head");
  std::vector<float> rows = goldens::read(*gpt, head, Slot::weight);
  for (int id = 0; id < config.V; id++) {
    const std::string bytes(tokenizer.token_bytes(id));
    if (bytes.size() == 1 && bytes[0] >= 'a' && bytes[0] <= 'z') continue;
    std::fill_n(rows.begin() + std::ptrdiff_t(id) * config.C, config.C, 0.f);
  }
  gpt->write(head, Slot::weight, rows);
  save_checkpoint(model, *gpt, {.tokenizer_from = dir / "tokenizer"});
  write_file(model + "/tokenizer_config.json", golden.at("config").dump());

  const int tokens = 16;
  for (const Json& c : golden.at("conversations")) {
    std::vector<int> ids = c.at("ids").get<std::vector<int>>(), answer;
    const auto cache = gpt->make_cache(config.T);
    const int sequence = cache->create();
    for (std::span<const int> next = ids; answer.size() < size_t(tokens);
         next = std::span(answer).last(1)) {
      DecodeResult result;
      const DecodeRow row{.sequence = sequence, .tokens = next, .sampling = {.temperature = 0}};
      gpt->decode(*cache, {&row, 1}, result);
      answer.push_back(result.ids[0]);
    }
    const std::string expected = tokenizer.decode(answer);
    std::string flags = "--max-tokens " + std::to_string(tokens), said;
    for (const Json& message : c.at("messages")) {
      const std::string content = message.at("content");
      if (message.at("role") == "system") {
        flags += " --system '" + content + "'";
        continue;
      }
      for (const char x : content) said += x == '\n' ? std::string("\\\n") : std::string(1, x);
    }
    CAPTURE(said);
    const Output out = say(model, flags, said + "\n");
    CHECK(out.status == 0);
    CHECK(out.text.substr(0, size_t(tokens)) == expected);
  }
}

TEST_CASE("chat answers bad flags with one line and status 1") {
  ScriptedModel m;
  const std::string dir = m.save();
  const std::pair<const char*, const char*> cases[] = {
      {"--temperature -1", "--temperature: found -1"},
      {"--max-tokens -1", "--max-tokens: found -1"},
      {"--template what", "what"},
      {"--thinking what", "--thinking: found what, expected show, hide or cut"},
      {"--date 2026-02-30", "--date: found 2026-02-30, expected YYYY-MM-DD"},
      {"--template-set x", "--template-set: found x, expected NAME=JSON"},
      {"--template-set x=what", "--template-set x: not JSON"},
      {"--documents none.jsonl", "none.jsonl: cannot open"},
      {"--context 513", "--context: found 513, expected 2 to 512, the context of the model, or 0"},
      {"--context 1", "--context: found 1, expected 2 to 512"},
      {"--cache-type q8_0", "--cache-type: found q8_0, expected auto, f32 or bf16"},
      {"--weights int4", "--weights: found int4, expected auto, f32, bf16 or q8_0"},
      {"--base --system x", "--base: found --system"},
      {"--base --template chatml", "--base: found --template, expected it with an assistant"},
      {"--base --template-set a=1", "--base: found --template-set, expected it with an assistant"},
      {"--base --date 2026-01-02", "--base: found --date, expected it with an assistant"},
      {"--base --thinking cut", "--base: found --thinking, expected it with an assistant"},
      {"--what", "--what"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const Output out = shell("./chat " + dir + " " + c.first + " < /dev/null");
    CHECK(out.status == 1);
    CHECK(out.text.starts_with("error: "));
    CHECK(contains(out.text, c.second));
    CHECK(std::count(out.text.begin(), out.text.end(), '\n') == 1);
  }
  CHECK(contains(shell("./chat").text, "error: model is required"));
  CHECK(shell("./chat --help").status == 0);
}

// ---------------------------------------------------------------------------------------------
// ./chat in a terminal

namespace {

class Terminal {  // a program on a pseudoterminal
 public:
  explicit Terminal(const std::vector<std::string>& command) {
    winsize size{24, 200, 0, 0};
    pid_ = forkpty(&fd_, nullptr, nullptr, &size);
    REQUIRE(pid_ >= 0);
    if (pid_ == 0) {
      setenv("TERM", "xterm", 1);
      setenv("GOMP_SPINCOUNT", "1000", 1);
      std::vector<char*> arguments;
      for (const std::string& a : command) arguments.push_back(const_cast<char*>(a.c_str()));
      arguments.push_back(nullptr);
      execv(arguments[0], arguments.data());
      _exit(127);
    }
  }
  ~Terminal() {
    if (pid_ > 0) kill(pid_, SIGKILL), waitpid(pid_, nullptr, 0);
    close(fd_);
  }
  void type(const std::string& keys) {
    REQUIRE(write(fd_, keys.data(), keys.size()) == ssize_t(keys.size()));
  }
  // Reads until `text` was written behind what earlier calls returned; false after 20 seconds.
  bool expect(const std::string& text) {
    const double limit = now() + 20;
    for (;;) {
      const size_t at = screen_.find(text, seen_);
      if (at != std::string::npos) return seen_ = at + text.size(), true;
      pollfd wait{fd_, POLLIN, 0};
      char buffer[4096];
      if (now() > limit || poll(&wait, 1, 1000) < 0) return false;
      if (!(wait.revents & (POLLIN | POLLHUP))) continue;
      const ssize_t n = read(fd_, buffer, sizeof buffer);
      if (n <= 0) return false;
      screen_.append(buffer, size_t(n));
    }
  }
  // Waits for the prompt, and for the editor to take keys: it does so after it has shown it.
  bool prompt() {
    if (!expect("> ")) return false;
    for (const double limit = now() + 20; now() < limit; usleep(1000)) {
      termios settings;
      if (tcgetattr(fd_, &settings) == 0 && !(settings.c_lflag & ICANON)) return true;
    }
    return false;
  }
  int wait() {
    int status = 0;
    while (expect("\x01 never written")) {
    }
    const double limit = now() + 20;
    while (waitpid(pid_, &status, WNOHANG) == 0) {
      if (now() > limit) return -1;
      usleep(1000);
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  const std::string& screen() const { return screen_; }

 private:
  int fd_ = -1;
  pid_t pid_ = -1;
  std::string screen_;
  size_t seen_ = 0;
};

}  // namespace

TEST_CASE("in a terminal lines are edited and remembered, and Ctrl+C stops the answer alone") {
  ScriptedModel m(4096);
  Plan(m).user("h\u00e9llo").assistant("The answer is 1.").user("h\u00e9llo").assistant("Twice.");
  const std::string dir = m.save();
  Terminal t({"./chat", dir, "--threads", "1", "--temperature", "0"});
  REQUIRE_MESSAGE(t.expect("/help lists commands"), t.screen());
  REQUIRE_MESSAGE(t.prompt(), t.screen());
  // Typed wrong and mended: a character of two bytes is erased as one.
  t.type("h\u00e9llp\u00e9\x7f\x7fo\r");
  CHECK_MESSAGE(t.expect("The answer is 1."), t.screen());
  CHECK(t.prompt());
  t.type("\033[A\r");  // the line before
  CHECK_MESSAGE(t.expect("Twice."), t.screen());
  CHECK(t.prompt());
  t.type("go on\r");  // without end: x until the context is full
  CHECK_MESSAGE(t.expect("xxxxxxxxxxxxxxxx"), t.screen());
  t.type("\x03");
  CHECK_MESSAGE(t.expect("(stopped)"), t.screen());
  CHECK(t.prompt());
  t.type("half a line\x03");  // empties the line
  CHECK(t.prompt());
  t.type("/temperature 1\r");
  CHECK_MESSAGE(t.expect("temperature 1\r\n"), t.screen());
  CHECK(t.prompt());
  t.type("\x04");  // Ctrl+D
  CHECK(t.wait() == 0);
  CHECK(!contains(t.screen(), "is full"));
}

TEST_CASE("SIGTERM ends chat while it waits") {
  ScriptedModel m;
  const std::string dir = m.save();
  const Output out =
      shell("sleep 4 | timeout --foreground --preserve-status -s TERM 2 ./chat " + dir);
  CHECK(out.status == 143);
}
