// Conversations in the shapes of other tools, record by record: what each becomes and what is
// trained of it, or why it is left out or refused.
#include <span>
#include <string>
#include <vector>

#include "cake/conversations.h"
#include "cake/records.h"
#include "cake/stage_template.h"
#include "cake/tokenizer.h"
#include "cake/tools.h"
#include "test/chatml.h"
#include "test/support.h"

using namespace cake;

namespace {

const Tokenizer& tokenizer() {
  static const Tokenizer t = [] {
    const TempDir dir;
    write_file(dir / "text.txt", "the user asks and the assistant answers, again and again.\n");
    return train_tokenizer({.inputs = {(dir / "text.txt").string()}}, 280, "qwen2");
  }();
  return t;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t i = 0; (i = text.find(from, i)) != std::string::npos; i += to.size())
    text.replace(i, from.size(), to);
  return text;
}

// Its text, with [[ ]] around what is trained.
std::string marked(const Rendered& r) {
  std::string text;
  bool trained = false;
  std::vector<int> run;
  for (size_t i = 0; i <= r.ids.size(); i++) {
    const bool next = i < r.ids.size() && r.trained[i];
    if (next != trained || i == r.ids.size()) {
      text += tokenizer().decode(run) + (next != trained ? next ? "[[" : "]]" : "");
      run.clear(), trained = next;
    }
    if (i < r.ids.size()) run.push_back(r.ids[i]);
  }
  return text;
}

// What ./sft makes of a record.
std::string trained_of(const std::string& json, const FieldNames& names = {}) {
  simdjson::dom::parser parser;
  simdjson::dom::object object;
  REQUIRE_MESSAGE(parser.parse(json).get(object) == simdjson::SUCCESS, json);
  std::string text;
  try {
    const TrainingText t = parse_training_text({object, "here", &names});
    if (const char* reason = nothing_to_learn(t)) return concat("left out: ", reason);
    if (!t.conversation) {
      Rendered r;
      r.ids = StageTemplate(chatml_template(tokenizer())).text_ids(t.prompt);
      r.trained.resize(r.ids.size(), false);
      tokenizer().encode(t.completion, r.ids);
      r.ids.push_back(tokenizer().end_of_text());
      r.trained.resize(r.ids.size(), true);
      return marked(r);
    }
    check_conversation(*t.conversation, "here");
    const auto render = [](const Conversation& c) { return chatml(tokenizer(), c); };
    for (const Conversation& example : examples_of(*t.conversation, render)) {
      text += (text.empty() ? "" : " and ") + marked(render(example));
    }
  } catch (const Error& e) {
    const std::string message = e.what();
    return "error: " + message.substr(message.starts_with("here: ") ? 6 : 0);
  }
  for (const auto& [name, mark] :
       {std::pair{"<|im_start|>", "«"}, {"<|im_end|>", "»"}, {"\n", "¶"}})
    text = replaced(text, name, mark);
  return text;
}

// A record of each shape, and what is trained of it. « and » stand for <|im_start|> and <|im_end|>,
// ¶ for a line break.
struct Row {
  const char *json, *want;
};

const Row kShapes[] =
    {
        // Messages
        {R"({"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":" Hello\n"}]})",
         "«user¶Hi»¶«assistant¶[[Hello»]]¶"},
        {R"({"conversation":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}],"id":3})",
         "«user¶Hi»¶«assistant¶[[Hello»]]¶"},
        {R"({"messages":"[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"assistant\",\"content\":\"Hello\"}]"})",
         "«user¶Hi»¶«assistant¶[[Hello»]]¶"},
        {R"({"messages":[{"role":"developer","content":"Be brief."},{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]})",
         "«system¶Be brief.»¶«user¶Hi»¶«assistant¶[[Hello»]]¶"},
        {R"({"messages":[{"role":"system","content":""},{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}],"system":"S"})",
         "«system¶S»¶«user¶Hi»¶«assistant¶[[Hello»]]¶"},
        {R"({"prompt":"Hi","prompt_id":"7","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}],"category":"Chat"})",
         "«user¶Hi»¶«assistant¶[[Hello»]]¶"},  // no_robots
        {R"({"prompt":"Hi","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Good"}],"chosen":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Good"}],"rejected":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Bad"}],"score_chosen":8.0})",
         "«user¶Hi»¶«assistant¶[[Good»]]¶"},  // ultrafeedback_binarized
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}]})",
         "«user¶a»¶«assistant¶[[b»]]¶«user¶c»¶"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"user","content":"b"},{"role":"assistant","content":"c"},{"role":"assistant","content":"d"}]})",
         "«user¶a¶¶b»¶«assistant¶[[c¶¶d»]]¶"},
        {R"({"messages":[{"role":"system","content":"a"},{"role":"developer","content":"b"},{"role":"user","content":"c"},{"role":"system","content":"e"},{"role":"assistant","content":"d"}]})",
         "«system¶a¶¶b»¶«user¶c»¶«system¶e»¶«assistant¶[[d»]]¶"},
        {R"({"messages":[{"role":"assistant","content":"Welcome."},{"role":"user","content":"a"},{"role":"assistant","content":"b"}]})",
         "«assistant¶Welcome.»¶«user¶a»¶«assistant¶[[b»]]¶"},
        {R"({"messages":[{"role":"USER","content":"a"},{"role":"Model","content":"b"}]})",
         "«user¶a»¶«assistant¶[[b»]]¶"},
        // ShareGPT
        {R"({"conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"Hello"}]})",
         "«user¶Hi»¶«assistant¶[[Hello»]]¶"},
        {R"({"id":"x","conversations":[{"from":"system","value":"S","weight":null},{"from":"human","value":"a","weight":0.0},{"from":"gpt","value":"b","weight":1.0}]})",
         "«system¶S»¶«user¶a»¶«assistant¶[[b»]]¶"},  // SlimOrca
        {R"({"conversations":[{"from":"gpt","value":"Welcome."},{"from":"human","value":"a"},{"from":"gpt","value":"b"}],"system":"S"})",
         "«system¶S»¶«assistant¶Welcome.»¶«user¶a»¶«assistant¶[[b»]]¶"},
        {R"({"conversations":[{"from":"User","value":"a","label":null},{"from":"Assistant","value":"b","label":null}],"mask":"User","system":""})",
         "«user¶a»¶«assistant¶[[b»]]¶"},  // NeMo
        {R"({"conversations":[{"from":"human","value":"7*6?"},{"from":"function_call","value":"{\"name\": \"times\", \"arguments\": {\"a\": 7, \"b\": 6}}"},{"from":"observation","value":"42"},{"from":"gpt","value":"It is 42."}],"tools":"[{\"name\": \"times\", \"parameters\": {}}]"})",
         "«system¶# Tools¶<tools>¶{\"name\": \"times\", \"parameters\": "
         "{}}¶</tools>»¶«user¶7*6?»¶"
         "«assistant¶[[<tool_call>¶{\"name\": \"times\", \"arguments\": {\"a\": 7, \"b\": "
         "6}}¶</tool_call>»]]¶«user¶<tool_response>¶42¶</tool_response>»¶«assistant¶[[It is "
         "42.»]]¶"},
        {R"({"messages":[{"role":"user","content":"both"},{"role":"tool_call","content":"{\"name\":\"f\",\"arguments\":{}}"},{"role":"tool_call","content":"[{\"name\":\"g\",\"arguments\":\"\"}]"},{"role":"tool_response","content":"1"},{"role":"tool_response","content":"2"},{"role":"assistant","content":"3"}],"tools":""})",
         "«user¶both»¶«assistant¶[[<tool_call>¶{\"name\": \"f\", \"arguments\": "
         "{}}¶</tool_call>¶<tool_call>¶{\"name\": \"g\", \"arguments\": {}}¶</tool_call>»]]¶"
         "«user¶<tool_response>¶1¶</tool_response>¶<tool_response>¶2¶</tool_response>»¶"
         "«assistant¶[[3»]]¶"},  // ms-swift
        {R"({"conversation":[{"human":"a","assistant":"b"},{"human":"c","assistant":"d"}],"system":"S"})",
         "«system¶S»¶«user¶a»¶«assistant¶[[b»]]¶«user¶c»¶«assistant¶[[d»]]¶"},  // ms-swift
        {R"({"conversation":[{"system":"S","input":"a","output":"b"}]})",
         "«system¶S»¶«user¶a»¶«assistant¶[[b»]]¶"},  // XTuner
                                                     // Alpaca and its kin
        {R"({"instruction":"Add.","input":"1 2","output":"3"})",
         "«user¶Add.¶1 2»¶«assistant¶[[3»]]¶"},
        {R"({"instruction":"Add.","input":"","output":"3","text":"Below is an instruction."})",
         "«user¶Add.»¶«assistant¶[[3»]]¶"},
        {R"({"instruction":"e","input":null,"output":"f","system":"S","history":[["a","b"],["c","d"]]})",
         "«system¶S»¶«user¶a»¶«assistant¶[[b»]]¶«user¶c»¶«assistant¶[[d»]]"
         "¶«user¶e»¶«assistant¶[[f»]]¶"},
        {R"({"instruction":"Who?","context":"Ada wrote.","response":"Ada","category":"closed_qa"})",
         "«user¶Who?¶Ada wrote.»¶«assistant¶[[Ada»]]¶"},  // Dolly
        {R"({"id":"niv.1","system_prompt":"S","question":"a","response":"b"})",
         "«system¶S»¶«user¶a»¶«assistant¶[[b»]]¶"},  // OpenOrca
        {R"({"query":"a","response":"b","type":"GSM_Rephrased","original_question":"c"})",
         "«user¶a»¶«assistant¶[[b»]]¶"},  // MetaMathQA
        {R"({"question":"How many?","answer":"2+3=<<2+3=5>>5\n#### 5"})",
         "«user¶How many?»¶«assistant¶[[2+3=<<2+3=5>>5¶#### 5»]]¶"},  // GSM8K
        {R"({"question":"How many?","answer":5})", "«user¶How many?»¶«assistant¶[[5»]]¶"},
        {R"({"problem":"p","solution":"Thus \\boxed{5}.","answer":"5","level":"Level 1"})",
         "«user¶p»¶«assistant¶[[Thus \\boxed{5}.»]]¶"},  // MATH
        {R"({"prompt":"a","response":"b"})", "«user¶a»¶«assistant¶[[b»]]¶"},
        {R"({"inputs":"a","targets":"b","task":"t"})", "«user¶a»¶«assistant¶[[b»]]¶"},  // FLAN
        {R"({"id":"0","data":["a","b","c","d"]})",
         "«user¶a»¶«assistant¶[[b»]]¶«user¶c»¶«assistant¶[[d»]]¶"},  // UltraChat
        {R"({"version":"v1","input":[{"role":"user","content":"a"}],"output":"<think>\nx\n</think>\n\nb","reasoning":"on","system_prompt":"detailed thinking on"})",
         "«system¶detailed thinking on»¶«user¶a»¶«assistant¶[[<think>¶x¶</think>¶¶b»]]¶"},  // Nemotron
        {R"({"id":1,"query":"a","answers":"[{\"name\": \"f\", \"arguments\": {\"x\": 1}}]","tools":"[{\"name\": \"f\", \"parameters\": {}}]"})",
         "«system¶# Tools¶<tools>¶{\"name\": \"f\", \"parameters\": {}}¶</tools>»¶«user¶a»¶"
         "«assistant¶[[<tool_call>¶{\"name\": \"f\", \"arguments\": {\"x\": "
         "1}}¶</tool_call>»]]¶"},  // xLAM
                                   // Prompt and completion
        {R"({"prompt":"the user","completion":" asks"})",
         "<|endoftext|>the user[[ asks<|endoftext|>]]"},
        {R"({"prompt":"","completion":"a"})", "<|endoftext|>[[a<|endoftext|>]]"},
        {R"({"prompt":[{"role":"user","content":"a"}],"completion":[{"role":"assistant","content":"b"}]})",
         "«user¶a»¶«assistant¶[[b»]]¶"},  // TRL
        {R"({"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}],"completion":"d"})",
         "«user¶a»¶«assistant¶b»¶«user¶c»¶«assistant¶[[d»]]¶"},
        {R"({"prompt":"a","completion":[{"role":"assistant","content":"b"}]})",
         "«user¶a»¶«assistant¶[[b»]]¶"},
        // Contents
        {R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"input_text","text":"b"}]},{"role":"assistant","content":[{"type":"output_text","text":"c"}]}]})",
         "«user¶ab»¶«assistant¶[[c»]]¶"},
        {R"({"messages":[{"role":"user","content":"<|im_end|> <think>"},{"role":"assistant","content":"<|im_end|>"}]})",
         "«user¶» <think>»¶«assistant¶[[»»]]¶"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"images":[]})",
         "«user¶a»¶«assistant¶[[b»]]¶"},
        // What is trained
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"bad","weight":0},{"role":"user","content":"b"},{"role":"assistant","content":"good"}]})",
         "«user¶a»¶«assistant¶bad»¶«user¶b»¶«assistant¶[[good»]]¶"},
        {R"({"messages":[{"role":"user","content":"a","train":false},{"role":"assistant","content":"bad","train":false},{"role":"user","content":"b"},{"role":"assistant","content":"good","train":true}]})",
         "«user¶a»¶«assistant¶bad»¶«user¶b»¶«assistant¶[[good»]]¶"},
        {R"({"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b","loss":false},{"from":"human","value":"c"},{"from":"gpt","value":"d","trainable":true,"weight":1},{"from":"human","value":"e"},{"from":"gpt","value":"f","masked":true}]})",
         "«user¶a»¶«assistant¶b»¶«user¶c»¶«assistant¶[[d»]]¶«user¶e»¶«assistant¶f»¶"},
        // Tools and calls
        {R"({"messages":[{"role":"user","content":"time?"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"now","arguments":""}}]},{"role":"tool","tool_call_id":"c1","content":"12:00"},{"role":"assistant","content":"Noon."}],"tools":[{"type":"function","function":{"name":"now","parameters":{}}}]})",
         "«system¶# Tools¶<tools>¶{\"name\": \"now\", \"parameters\": "
         "{}}¶</tools>»¶«user¶time?»¶"
         "«assistant¶[[<tool_call>¶{\"name\": \"now\", \"arguments\": {}}¶</tool_call>»]]¶"
         "«user¶<tool_response>¶12:00¶</tool_response>»¶«assistant¶[[Noon.»]]¶"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":null}},{"name":"f"},{"name":"f","arguments":"{\"x\":1}"},{"name":"f","arguments":{"x":1}}]}],"tools":"[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]"})",
         "«system¶# Tools¶<tools>¶{\"name\": \"f\"}¶</tools>»¶«user¶a»¶"
         "«assistant¶[[<tool_call>¶{\"name\": \"f\", \"arguments\": {}}¶</tool_call>¶"
         "<tool_call>¶{\"name\": \"f\", \"arguments\": {}}¶</tool_call>¶"
         "<tool_call>¶{\"name\": \"f\", \"arguments\": {\"x\":1}}¶</tool_call>¶"
         "<tool_call>¶{\"name\": \"f\", \"arguments\": {\"x\": 1}}¶</tool_call>»]]¶"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"function_call":{"name":"f","arguments":"{}"}},{"role":"function","name":"f","content":"1"},{"role":"assistant","content":"b"}],"functions":[{"name":"f"}]})",
         "«system¶# Tools¶<tools>¶{\"name\": \"f\"}¶</tools>»¶«user¶a»¶"
         "«assistant¶[[<tool_call>¶{\"name\": \"f\", \"arguments\": {}}¶</tool_call>»]]¶"
         "«user¶<tool_response>¶1¶</tool_response>»¶«assistant¶[[b»]]¶"},  // OpenAI before
                                                                           // tools
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":[{"type":"thinking","thinking":"t"},{"type":"text","text":"b"},{"type":"tool_use","id":"1","name":"f","input":{"x":1}}]},{"role":"tool","content":{"y":[2]}}],"tools":null})",
         "«user¶a»¶«assistant¶[[<think>¶t¶</think>¶¶b¶<tool_call>¶{\"name\": \"f\", "
         "\"arguments\": "
         "{\"x\": 1}}¶</tool_call>»]]¶«user¶<tool_response>¶{\"y\": [2]}¶</tool_response>»¶"},
        {R"({"conversations":[{"from":"system","value":"S <tools>"},{"from":"human","value":"a"},{"from":"gpt","value":"<tool_call>\n{'name': 'f'}\n</tool_call>"},{"from":"tool","value":"<tool_response>\n1\n</tool_response>"},{"from":"gpt","value":"b"}]})",
         "«system¶S <tools>»¶«user¶a»¶«assistant¶[[<tool_call>¶{'name': 'f'}¶</tool_call>»]]¶"
         "«user¶<tool_response>¶1¶</tool_response>»¶«assistant¶[[b»]]¶"},  // Hermes function
                                                                           // calling
                                                                           // Reasoning
        {R"({"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"4","reasoning_content":"2+2"}]})",
         "«user¶2+2?»¶«assistant¶[[<think>¶2+2¶</think>¶¶4»]]¶"},
        {R"({"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"4","reasoning":"2+2","thinking":null}]})",
         "«user¶2+2?»¶«assistant¶[[<think>¶2+2¶</think>¶¶4»]]¶"},
        {R"({"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"<think>2+2</think>4","reasoning_content":""}]})",
         "«user¶2+2?»¶«assistant¶[[<think>¶2+2¶</think>¶¶4»]]¶"},
        {R"({"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"2+2\n</think>\n\n4"}]})",
         "«user¶2+2?»¶«assistant¶[[<think>¶2+2¶</think>¶¶4»]]¶"},  // DeepSeek-R1
        {R"({"question":"2+2?","reasoning":"2+2","answer":"4"})",
         "«user¶2+2?»¶«assistant¶[[<think>¶2+2¶</think>¶¶4»]]¶"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","thinking":"x"},{"role":"user","content":"c"},{"role":"assistant","content":"d"},{"role":"user","content":"e"},{"role":"assistant","content":"f","thinking":"y"}]})",
         "«user¶a»¶«assistant¶[[<think>¶x¶</think>¶¶b»]]¶"
         " and «user¶a»¶«assistant¶b»¶«user¶c»¶«assistant¶[[d»]]¶«user¶e»¶"
         "«assistant¶[[<think>¶y¶</think>¶¶f»]]¶"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","thinking":"x"},{"role":"user","content":"c"},{"role":"assistant","content":"<think>y</think>d","weight":0}]})",
         "«user¶a»¶«assistant¶[[<think>¶x¶</think>¶¶b»]]¶"},
        // Left out
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":" \n"}]})",
         "left out: empty answer"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null}]})",
         "left out: empty answer"},
        {R"({"messages":[{"role":"user","content":""},{"role":"assistant","content":"b"}]})",
         "left out: empty message of the user"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]})",
         "left out: no trained message"},
        {R"({"messages":[{"role":"user","content":"a"}]})", "left out: no trained message"},
        {R"({"messages":[{"role":"assistant","content":"a"}]})", "left out: no trained message"},
        {R"({"prompt":"a","completion":""})", "left out: empty answer"},
        {R"({"instruction":"a","output":""})", "left out: empty answer"},
        // Bad
        {R"({"messages":[{"role":"robot","content":"a"}]})",
         "error: messages[0]: role: found \"robot\", expected system, user, assistant or tool"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0.5}]})",
         "error: messages[1]: weight: found 0.5, expected 0 or 1: a message is trained or it "
         "is not"},
        {R"({"messages":[{"role":"user","content":"a","weight":1},{"role":"assistant","content":"b"}]})",
         "error: messages[0]: found a message by the user that is to be trained, expected the "
         "assistant's alone"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":1,"train":false}]})",
         "error: messages[1]: train: found a message that is to be trained and not to be "
         "trained"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","train_detail":[{"begin_offset":0,"end_offset":0,"train":false}]}]})",
         "error: messages[1]: train_detail: found spans of a message, expected messages that "
         "are "
         "trained as a whole"},
        {R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]},{"role":"assistant","content":"b"}]})",
         "error: messages[0]: content[0]: found a part of type image_url, expected text: "
         "models read "
         "text alone here"},
        {R"({"messages":[{"role":"user","content":"<image>"},{"role":"assistant","content":"b"}],"images":["a.png"]})",
         "error: images: found an array, expected text alone: no model here reads it"},
        {R"({"messages":[{"role":"user","content":7},{"role":"assistant","content":"b"}]})",
         "error: messages[0]: content: found a number, expected a string"},
        {R"({"messages":[{"role":"user"},{"role":"assistant","content":"b"}]})",
         "error: messages[0]: content is missing"},
        {R"({"messages":[{"speaker":"user","content":"a"}]})",
         "error: messages[0]: found the keys \"speaker\", \"content\", expected role and "
         "content"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"name":"f","arguments":"{x"}]}]})",
         "error: messages[1]: tool_calls: f: arguments: found {x, expected a JSON object"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"name":"f"}]}],"tools":[{"name":"g"}]})",
         "error: messages[1]: tool_calls: found a call of \"f\", expected one of the 1 "
         "declared tools"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"name":"f"}]},{"role":"user","content":"b"}]})",
         "error: messages[2]: role: found user after assistant, expected tool, the answer to a "
         "call"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"tool","content":"c"}]})",
         "error: messages[2]: role: found tool after assistant, expected user or system"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0},{"role":"assistant","content":"c"}]})",
         "error: messages[2]: found two messages of the assistant in a row, one to be trained "
         "and one "
         "not"},
        {R"({"messages":[{"role":"system","content":"a"},{"role":"user","content":"b"},{"role":"assistant","content":"c"}],"system":"d"})",
         "error: system: found a system message beside that of the messages, expected one of "
         "them"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"function_call","content":"f 1"}]})",
         "error: messages[1]: content: found \"f 1\", expected a call as JSON: {\"name\", "
         "\"arguments\"}"},
        {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"tools":"f x"})",
         "error: tools: found \"f x\", expected tools as JSON"},
        {R"({"messages":"hello"})",
         "error: messages: found \"hello\", expected a list of messages as JSON"},
        {R"({"messages":[]})", "left out: no trained message"},
        {R"({"prompt":"a","completion":"b","label":true})",
         "error: found an answer and whether it is good (label): ./reward reads those; "
         "expected "},
        {R"({"prompt":"a","chosen":"b","rejected":"c"})",
         "error: found a preference: ./reward reads those; expected "},
        {R"({"conversations":[{"from":"human","value":"a"}],"chosen":{"from":"gpt","value":"b"},"rejected":{"from":"gpt","value":"c"}})",
         "error: found a preference: ./reward reads those; expected "},
        {R"({"question":"a","choices":["b","c"],"answer":1})",
         "error: found a question with choices: ./rlhf and ./chat eval read those; expected "},
        {R"({"question":"a","answer":["b","c"]})",
         "error: answer: found an array, expected a string to train on: ./rlhf reads problems "
         "with "
         "several answers"},
        {R"({"prompt":"a","reward_model":{"ground_truth":"3"}})",
         "error: found a prompt without an answer to train on: ./rlhf and ./chat generate read "
         "those; "
         "expected "},
        {R"({"text":"a"})",
         "error: found a text without a prompt: ./bpe encode and ./train_gpt train on those; "
         "expected "},
        {R"({"message_id":"1","parent_id":null,"text":"a","role":"prompter"})",
         "error: found a message of a tree (OpenAssistant), whose parent is another record..."},
        {R"({"message_id":"1","parent_id":"0","text":"a","role":"prompter"})",
         "error: found a message of a tree (OpenAssistant), whose parent is another record..."},
        {R"({"Frage":"a","Antwort":"b"})",
         "error: found the keys \"Frage\", \"Antwort\", expected "},
};

}  // namespace

TEST_CASE("a record of every shape becomes the text that is trained, or says why not") {
  for (const Row& row : kShapes) {
    CAPTURE(row.json);
    const std::string found = trained_of(row.json), want = row.want;
    if (want.starts_with("error: ") && (want.ends_with("expected ") || want.ends_with("..."))) {
      const size_t n = want.size() - (want.ends_with("...") ? 3 : 0);
      CHECK(found.substr(0, n) == want.substr(0, n));
    } else {
      CHECK(found == want);
    }
  }
}

TEST_CASE("--map renames the keys of records and of their messages") {
  const std::string trained = "«user¶a»¶«assistant¶[[b»]]¶";
  CHECK(trained_of(R"({"Frage":"a","Antwort":{"text":["b"]}})",
                   {{"question", "Frage"}, {"answer", "Antwort.text.0"}}) == trained);
  CHECK(trained_of(
            R"({"dialog":{"turns":[{"speaker":"user","said":"a"},{"speaker":"bot","said":"b"}]}})",
            {{"messages", "dialog.turns"}, {"role", "speaker"}, {"content", "said"}}) == trained);
  CHECK(trained_of(R"({"Frage":"a"})", {{"prompt", "Frage"}, {"completion", "Antwort"}}) ==
        "error: found a prompt without an answer to train on: ./rlhf and ./chat generate read "
        "those; expected " +
            std::string(kTrainingShapes));
}

TEST_CASE("the markers of reasoning and calls are tokens in the assistant's text alone") {
  const auto specials = [](const std::string& role, const std::string& content) {
    int count = 0;
    const Conversation c{{{"user", "q"}, {role, content}}, {}};
    for (const int id : chatml(tokenizer(), c).ids) count += tokenizer().is_special(id);
    return count - 4;  // two turns begin and end
  };
  const std::string text =
      "see <think>\na\n</think>, <tool_call>\n{}\n</tool_call> <|im_end|> </b>";
  CHECK(specials("assistant", text) == 4);
  CHECK(specials("assistant", "<think>a</think>b") == 2);
  CHECK(specials("user", text) == 0);
}

TEST_CASE("reasoning is written behind the user's last message alone") {
  Conversation c{{{"user", "a"}, {"assistant", "<think>x</think>\n\n4"}, {"user", "b"}}, {}};
  const auto text = [&](bool prompt) {
    return tokenizer().decode(chatml(tokenizer(), c, prompt).ids);
  };
  CHECK(text(true) ==
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nb"
        "<|im_end|>\n<|im_start|>assistant\n");
  c.messages.pop_back();
  CHECK(text(false) ==
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\n4"
        "<|im_end|>\n");
}

TEST_CASE("a message that is written is the message that is read") {
  const Message messages[] = {{"user", "a"},
                              {"assistant", "b", {}, "thought", false},
                              {"assistant", "", {{"f", "{\"x\": 1}"}}},
                              {"tool", "c"}};
  for (const Message& m : messages) {
    const std::string json = message_json(m).dump();
    CAPTURE(json);
    simdjson::dom::parser parser;
    simdjson::dom::object object;
    REQUIRE(parser.parse(json).get(object) == simdjson::SUCCESS);
    CHECK(parse_message({object, "here"}) == m);
  }
}
