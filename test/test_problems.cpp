// Problems as people's files have them: each shape's question and what is right; records that are
// refused, with what is said about them.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "cake/problems.h"
#include "test/support.h"

using namespace cake;

namespace {

Problem read(const std::string& line, const FieldNames& names = {}) {
  simdjson::dom::parser parser;
  const simdjson::padded_string padded(line);
  simdjson::dom::object object;
  require(parser.parse(padded).get(object) == simdjson::SUCCESS, "not an object: ", line);
  return parse_problem({object, "p.jsonl:3", &names});
}

std::string joined(const std::vector<std::string>& list) {
  std::string text;
  for (const std::string& item : list) text += (text.empty() ? "" : " | ") + item;
  return text;
}

// What is asked: the messages, each behind its role's first letter, or a text to continue.
std::string asked(const Problem& p) {
  if (p.chat.messages.empty()) return "text: " + p.question;
  std::string text;
  for (const Message& m : p.chat.messages) {
    text += concat(text.empty() ? "" : " / ", m.role[0], ": ", m.content);
  }
  return text;
}

struct Shape {
  const char *line, *asked, *answers, *keys;
};

}  // namespace

// The keys are those of the named data sets; the texts are made up where they are long.
TEST_CASE("a question and what is right are found in every shape") {
  const Shape shapes[] = {
      // Keys of the question and of the answer
      {R"j({"question":"2+2?","answer":"4"})j", "u: 2+2?", "4", "question > answer"},
      {R"j({"problem":"2+2?","answer":4})j", "u: 2+2?", "4", "problem > answer"},
      {R"j({"query":"2+2?","gold":4.5})j", "u: 2+2?", "4.5", "query > gold"},
      {R"j({"instruction":"Add.","input":"2 and 2","answer":"4"})j", "u: Add.\n\n2 and 2", "4",
       "instruction + input > answer"},
      {R"j({"instruction":"Add 2 and 2.","input":"","target":4})j", "u: Add 2 and 2.", "4",
       "instruction > target"},
      {R"j({"input":"2+2?","output":"4"})j", "u: 2+2?", "4", "input > output"},
      {R"j({"input":"2+2?","target":"4"})j", "u: 2+2?", "4", "input > target"},
      {R"j({"inputs":"2+2?","targets":["4","four"]})j", "u: 2+2?", "4 | four", "inputs > targets"},
      {R"j({"prompt":"2+2=","answer":"4"})j", "text: 2+2=", "4", "prompt > answer"},
      {R"j({"question":"2+2?","final_answer":"4","solution":"By hand."})j", "u: 2+2?", "4",
       "question > final_answer"},
      {R"j({"question":"2+2?","ground_truth":"4"})j", "u: 2+2?", "4", "question > ground_truth"},
      {R"j({"question":"2+2?","reference_answer":"4"})j", "u: 2+2?", "4",
       "question > reference_answer"},
      {R"j({"question":"2+2?","expected_answer":"4"})j", "u: 2+2?", "4",
       "question > expected_answer"},
      {R"j({"question":"2+2?","solution":"so $\\boxed{4}$"})j", "u: 2+2?", "so $\\boxed{4}$",
       "question > solution"},
      {R"j({"question":"2+2?","response":"The answer is: 4"})j", "u: 2+2?", "The answer is: 4",
       "question > response"},
      {R"j({"Question":"2+2?","Final Answer":"4"})j", "u: 2+2?", "4", "Question > Final Answer"},
      {R"j({"question":"2+2?"})j", "u: 2+2?", "", "question > "},
      {R"j({"question":"2^80?","answer":{"number as written":"1208925819614629174706176"}})j",
       "u: 2^80?", "1208925819614629174706176", "question > answer"},
      {R"j({"question":"2+2?","answer":null,"solution":"4"})j", "u: 2+2?", "4",
       "question > solution"},
      {R"j({"question":"2+2?","answer":"  ","target":4})j", "u: 2+2?", "4", "question > target"},
      {R"j({"problem":1,"question":"2+2?","answer":"4"})j", "u: 2+2?", "4", "question > answer"},
      // Several answers, and answers that are no strings
      {R"j({"question":"2+2?","answers":["4","four"]})j", "u: 2+2?", "4 | four",
       "question > answers"},
      {R"j({"question":"2+2?","answer":["4","four","4"]})j", "u: 2+2?", "4 | four",
       "question > answer"},
      {R"j({"question":"2+2?","answer":[4,4.0]})j", "u: 2+2?", "4 | 4.0", "question > answer"},
      {R"j({"question":"Is 2 even?","answer":true})j", "u: Is 2 even?", "true | True | yes | Yes",
       "question > answer"},
      {R"j({"question":"Who?","answers":{"text":["Ada","Lovelace"],"answer_start":[1,5]}})j",  // SQuAD
       "u: Who?", "Ada | Lovelace", "question > answers"},
      {R"j({"question":"Who?","answers":{"text":[],"answer_start":[]}})j", "u: Who?", "",
       "question > answers"},
      {R"j({"question":"Who?","answer":{"value":"Ada","aliases":["Ada","Lovelace"],"type":"x"}})j",
       "u: Who?", "Ada | Lovelace", "question > answer"},  // TriviaQA
      {R"j({"context":"Ada was first.","question":"Who?","answers":{"text":["Ada"]}})j",
       "u: Ada was first.\n\nWho?", "Ada", "context + question > answers"},
      {R"j({"question":"is it so","passage":"It is.","answer":false})j",  // BoolQ
       "u: It is.\n\nis it so", "false | False | no | No", "passage + question > answer"},
      {R"j({"question":"f?","answer":{"inputs":["1"],"outputs":["2"]}})j", "u: f?",
       R"j({"inputs":["1"],"outputs":["2"]})j", "question > answer"},
      // Messages
      {R"j({"messages":[{"role":"user","content":"2+2?"}],"answer":"4"})j", "u: 2+2?", "4",
       "messages > answer"},
      {R"j({"prompt":[{"role":"system","content":"Think."},{"role":"user","content":"2+2?"}],
           "question":"other","answer":"4"})j",
       "s: Think. / u: 2+2?", "4", "prompt > answer"},
      {R"j({"prompt":[{"role":"user","content":"2+2?"}],"label":"4"})j", "u: 2+2?", "4",
       "prompt > label"},
      {R"j({"prompt":[{"role":"user","content":"1?"},{"role":"assistant","content":"1"},
                     {"role":"user","content":"2?"}]})j",
       "u: 1? / a: 1 / u: 2?", "", "prompt > "},
      {R"j({"prompt":"[{\"role\": \"user\", \"content\": \"2+2?\"}]","answer":"4"})j", "u: 2+2?",
       "4", "prompt > answer"},
      {R"j({"conversations":[{"from":"human","value":"2+2?"}],"system":"Think.","answer":4})j",
       "s: Think. / u: 2+2?", "4", "conversations > answer"},
      {R"j({"system_prompt":"Think.","question":"2+2?","answer":4})j", "s: Think. / u: 2+2?", "4",
       "question > answer"},
      // verl, as in DAPO-Math-17k
      {R"j({"data_source":"math_dapo","prompt":[{"content":"Solve: 2+2","role":"user"}],
           "ability":"MATH","reward_model":{"ground_truth":"4","style":"rule-lighteval/MATH_v2"},
           "extra_info":{"index":"9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"}})j",
       "u: Solve: 2+2", "4", "prompt > reward_model.ground_truth"},
      // Its processed copy
      {R"j({"prompt":"Solve: 2+2","solution":"5","data_source":"math_dapo",
           "source_prompt":[{"content":"Solve","role":"user"}],"ability":"MATH",
           "reward_model":{"ground_truth":"4","style":"rule"},"extra_info":{"index":"9a"}})j",
       "text: Solve: 2+2", "4", "prompt > reward_model.ground_truth"},
      // Skywork-OR1: a list as text
      {R"j({"prompt":[{"content":"2/3?","role":"user"}],
           "reward_model":{"ground_truth":"[\"\\\\frac{2}{3}\"]","style":"rule"}})j",
       "u: 2/3?", "\\frac{2}{3}", "prompt > reward_model.ground_truth"},
      // Search-R1
      {R"j({"prompt":[{"role":"user","content":"Who?"}],"reward_model":{"style":"rule",
           "ground_truth":{"target":["Ada","Lovelace"]}},"golden_answers":["Ada"]})j",
       "u: Who?", "Ada | Lovelace", "prompt > reward_model.ground_truth"},
      // GSM8K
      {R"j({"question":"Ducks?","answer":"16 - 3 = <<16-3=13>>13\n#### 13"})j", "u: Ducks?",
       "16 - 3 = <<16-3=13>>13\n#### 13", "question > answer"},
      // MATH, MATH-500
      {R"j({"problem":"Simplify.","level":"Level 3","type":"Algebra","solution":"\\boxed{3}"})j",
       "u: Simplify.", "\\boxed{3}", "problem > solution"},
      {R"j({"problem":"Convert.","solution":"So \\boxed{(3,\\pi)}.","answer":"(3,\\pi)",
           "subject":"Precalculus","level":2,"unique_id":"test/precalculus/807.json"})j",
       "u: Convert.", "(3,\\pi)", "problem > answer"},
      // AIME, as HuggingFaceH4, Maxwell-Jia and di-zhang-fdu have it
      {R"j({"id":60,"problem":"Aya.","solution":"Then 204.","answer":"204","url":"u","year":"2024"})j",
       "u: Aya.", "204", "problem > answer"},
      {R"j({"ID":"2024-II-4","Problem":"Let x.","Solution":"Denote.","Answer":33})j", "u: Let x.",
       "33", "Problem > Answer"},
      {R"j({"ID":"1983-1","Year":1983,"Problem Number":1,"Question":"Let x.","Answer":"60",
           "Part":null})j",
       "u: Let x.", "60", "Question > Answer"},
      // OpenR1-Math-220k, whose messages end with an answer
      {R"j({"problem":"Boat?","solution":"## Solution","answer":"v_B=6","problem_type":"Algebra",
           "source":"olympiads","generations":["<think>"],"correctness_math_verify":[true],
           "messages":[{"role":"user","content":"Boat?"},{"role":"assistant","content":"6"}]})j",
       "u: Boat?", "v_B=6", "problem > answer"},
      // DeepScaleR, Big-Math, DeepMath, MetaMathQA
      {R"j({"problem":"Doctor.","answer":"-\\frac{2}{3}","solution":"We solve."})j", "u: Doctor.",
       "-\\frac{2}{3}", "problem > answer"},
      {R"j({"problem":"Solve.","answer":"2","source":"orca_math","domain":["Applied"],
           "llama8b_solve_rate":0.5})j",
       "u: Solve.", "2", "problem > answer"},
      {R"j({"question":"Limit?","final_answer":"0","difficulty":4.5,"topic":"Limits",
           "r1_solution_1":"Okay"})j",
       "u: Limit?", "0", "question > final_answer"},
      {R"j({"type":"MATH_AnsAug","query":"Grid?","original_question":"Grid","response":"It is: 2"})j",
       "u: Grid?", "It is: 2", "query > response"},
  };
  CHECK(std::size(shapes) >= 50 - 1);
  for (const Shape& shape : shapes) {
    CAPTURE(shape.line);
    const Problem p = read(shape.line);
    CHECK(asked(p) == shape.asked);
    CHECK(joined(p.answers) == shape.answers);
    CHECK(p.question_key + " > " + p.answer_key == shape.keys);
    CHECK(p.where == "p.jsonl:3");
    const bool is_beyond =
        contains(shape.line, "as written");  // as the reader hands such numbers on
    CHECK((is_beyond || p.line == Json::parse(std::string(shape.line))));
    CHECK(p.choices.empty());
    CHECK(p.numbers.empty());
  }
}

TEST_CASE("choices are found in every shape, and what is right is a letter of them") {
  struct Listed {
    const char *line, *choices, *answers;
  };
  const Listed shapes[] = {
      // MMLU, by index, by letter, by text
      {R"j({"question":"q","subject":"law","choices":["u","v","w","x"],"answer":2})j",
       "u | v | w | x", "C"},
      {R"j({"question":"q","choices":["u","v","w","x"],"answer":"c"})j", "u | v | w | x", "C"},
      {R"j({"question":"q","choices":["u","v"],"answer":"(B)"})j", "u | v", "B"},
      {R"j({"question":"q","choices":["u","v"],"answer":"B. v"})j", "u | v", "B"},
      {R"j({"question":"q","choices":["up","down"],"answer":"down"})j", "up | down", "B"},
      {R"j({"question":"q","choices":[1,2,3],"answer":2})j", "1 | 2 | 3", "C"},
      {R"j({"question":"q","choices":["1","2","3"],"answer":"2"})j", "1 | 2 | 3", "B"},
      {R"j({"question":"q","choices":["B","A"],"answer":"A"})j", "B | A", "A"},
      {R"j({"question":"q","choices":["u","v"],"answer":["A","B"]})j", "u | v", "A | B"},
      {R"j({"question":"q","choices":["u","v"],"answerKey":""})j", "u | v", ""},
      // ARC, OpenBookQA, CommonsenseQA
      {R"j({"id":"x","question":"q","choices":{"text":["u","v","w","x"],
           "label":["A","B","C","D"]},"answerKey":"B"})j",
       "u | v | w | x", "B"},
      {R"j({"id":"x","question":"q","choices":{"text":["u","v","w","x"],
           "label":["1","2","3","4"]},"answerKey":"1"})j",
       "u | v | w | x", "A"},
      {R"j({"id":"7-980","question_stem":"x","question":"q","choices":{"text":["u","v"],
           "label":["A","B"]},"answerKey":"B"})j",
       "u | v", "B"},
      {R"j({"id":"x","question":"q","question_concept":"c","choices":{"label":["A","B","C","D","E"],
           "text":["u","v","w","x","y"]},"answerKey":"E"})j",
       "u | v | w | x | y", "E"},
      // ARC's own files
      {R"j({"id":"x","question":{"stem":"q","choices":[{"text":"u","label":"A"},
           {"text":"v","label":"B"}]},"answerKey":"B"})j",
       "u | v", "B"},
      // MMLU-Pro, MedQA, AQuA-RAT, CMMLU, C-Eval, SciQ, GPQA, AGIEval
      {R"j({"question_id":70,"question":"q","options":["u","v","w"],"answer":"C","answer_index":2,
           "cot_content":"","category":"business"})j",
       "u | v | w", "C"},
      {R"j({"question":"q","options":["u","v","w"],"answer_index":2})j", "u | v | w", "C"},
      {R"j({"question":"q","answer":"v","options":{"A":"u","B":"v"},"answer_idx":"B"})j", "u | v",
       "B"},
      {R"j({"question":"q","options":["A)21","B)21.5","C)22"],"rationale":"x","correct":"C"})j",
       "21 | 21.5 | 22", "C"},
      {R"j({"question":"q","choices":["(A) u","(B) v"],"answer":"(B) v"})j", "u | v", "B"},
      {R"j({"id":0,"question":"q","A":"u","B":"v","C":"w","D":"x","answer":"D","explanation":""})j",
       "u | v | w | x", "D"},
      {R"j({"question":"q","distractor3":"c","distractor1":"d","distractor2":"a",
           "correct_answer":"b","support":"s"})j",
       "a | b | c | d", "B"},
      {R"j({"Question":"q","Correct Answer":"b","Incorrect Answer 1":"a","Incorrect Answer 2":"c",
           "Incorrect Answer 3":"d"})j",
       "a | b | c | d", "B"},
      {R"j({"question":"q","correct_answer":"b","incorrect_answers":["a","c"]})j", "a | b | c",
       "B"},
      {R"j({"question":"q","choices":["u","v"],"solution":"So the answer is B."})j", "u | v",
       "So the answer is B."},
      {R"j({"query":"q","choices":["u","v"],"gold":[1]})j", "u | v", "B"},
      {R"j({"prompt":[{"role":"user","content":"q"}],"choices":["u","v"],
           "reward_model":{"ground_truth":"B"}})j",
       "u | v", "B"},
  };
  for (const Listed& shape : shapes) {
    CAPTURE(shape.line);
    const Problem p = read(shape.line);
    CHECK(p.question == "q");
    CHECK(joined(p.choices) == shape.choices);
    CHECK(joined(p.answers) == shape.answers);
  }
}

TEST_CASE("a countdown is its numbers and its target, and asks for them where nothing else does") {
  const char* lines[] = {
      R"j({"target":98,"nums":[44,19,35]})j",  // Countdown-Tasks-3to4
      R"j({"numbers":["44","19","35"],"target":"98"})j",
      R"j({"numbers":"44, 19, 35","target":98})j",
      R"j({"prompt":"Make 98.","reward_model":{"style":"rule",
          "ground_truth":{"target":98,"numbers":[44,19,35]}}})j",
      R"j({"question":"Make 98.","answer":"44+19+35","metadata":{"numbers":[44,19,35],"target":98}})j",
  };
  for (const char* line : lines) {
    CAPTURE(line);
    const Problem p = read(line);
    CHECK(joined(p.numbers) == "44 | 19 | 35");
    CHECK(p.target == "98");
  }
  const Problem p = read(lines[0]);
  CHECK(p.question ==
        "Using the numbers 44, 19, 35, write an expression that equals 98. You can use +, -, *, / "
        "and parentheses, and each number only once.");
  CHECK(p.answers.empty());
  CHECK(p.question_key == "numbers and target");
  CHECK(read(lines[3]).answers.empty());
  CHECK(joined(read(lines[4]).answers) == "44+19+35");
  CHECK(read(R"j({"question":"q","numbers":[1,2],"answer":3})j").numbers.empty());  // no target
}

TEST_CASE("--map names the keys of a question, of what is right, and of other fields") {
  const std::string line =
      R"j({"question":"no","q":{"text":["2+2?"]},"answer":"no","meta":{"sol":[5,"4"]},
          "options":["u","v"]})j";
  const Problem p =
      read(line, {{"question", "q.text.0"}, {"answer", "meta.sol.1"}, {"choices", "c"}});
  CHECK(asked(p) == "u: 2+2?");
  CHECK(joined(p.answers) == "4");
  CHECK(p.choices.empty());
  CHECK(p.question_key + " > " + p.answer_key == "q.text.0 > meta.sol.1");
  CHECK(joined(read(line, {{"answer", "meta.sol"}, {"choices", "none"}}).answers) == "5 | 4");
  CHECK(read(R"j({"p":"2+2=","a":4})j", {{"prompt", "p"}, {"target", "a"}}).question == "2+2=");
  const Problem preferred =
      read(R"j({"prompt":"p","chosen":"c","rejected":"r"})j", {{"question", "prompt"}});
  CHECK(asked(preferred) == "u: p");
  const Problem alpaca = read(R"j({"instruction":"i","output":"o"})j", {{"answer", "output"}});
  CHECK(asked(alpaca) + " > " + joined(alpaca.answers) == "u: i > o");
  CHECK(asked(read(R"j({"instruction":"i","input":"n","output":"o"})j",
                   {{"question", "instruction"}})) == "u: i\n\nn");
  const Problem made = read(R"j({"n":[1,2],"goal":3})j", {{"numbers", "n"}, {"target", "goal"}});
  CHECK(joined(made.numbers) == "1 | 2");
}

TEST_CASE("what is no problem is refused, by the keys found or by the stage that reads it") {
  const std::pair<const char*, const char*> bad[] = {
      {R"j({"title":"x","body":"y"})j", "found the keys \"title\", \"body\", expected a problem"},
      {R"j({"question":"  "})j", "question: found \"  \", expected text or messages"},
      {R"j({"question":7,"answer":"7"})j", "question: found 7, expected text"},
      {R"j({"answer":"4"})j", "--map"},
      {R"j({"prompt":"p","chosen":"c","rejected":"r"})j",
       "found a preference, which ./reward reads"},
      {R"j({"prompt":"p","completion":"c","label":true})j", "found a preference, which ./reward"},
      {R"j({"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"}]})j",
       "ends with the assistant's answer, which ./sft reads"},
      {R"j({"prompt":[]})j", "prompt: found [], expected text or messages"},
      {R"j({"prompt":"2+2=","completion":" 4"})j",
       "found a prompt and its completion, which ./sft reads, expected a problem or a prompt "
       "(--map "
       "answer=KEY reads the key KEY as its answer)"},
      {R"j({"instruction":"Add.","input":"2 and 2","output":"4"})j", "which ./sft reads"},
      {R"j({"text":"x"})j", "(a document, which ./bpe train and ./bpe encode read)"},
      {R"j({"question":"q","choices":["u"],"answer":0})j", "choices: found 1, expected 2 to 26"},
      {R"j({"question":"q","choices":["u","v"],"answer":2})j",
       "answer: found 2, expected a choice: a letter from A to B, the text of one, or its index "
       "from 0 to 1"},
      {R"j({"question":"q","choices":["u","v"],"answer":"2"})j", "answer: found \"2\", expected a"},
      {R"j({"question":"q","choices":["u","v"],"answer":"C"})j", "answer: found \"C\", expected a"},
      {R"j({"question":"q","choices":{"text":["u","v"],"label":["A"]},"answer":"A"})j",
       "found 1 labels of 2 choices"},
      {R"j({"question":"q","choices":"u, v","answer":"A"})j", "choices: found a string, expected"},
      {R"j({"question":"q","choices":{"first":"u"},"answer":"A"})j",
       "choices: found the key \"first\""},
      {R"j({"question":"q","choices":[{"label":"A"}],"answer":"A"})j", "found an object without"},
      {R"j({"question":"q","rubric":[]})j", "rubric: found []"},
  };
  for (const auto& b : bad) {
    const std::string line = b.first;
    CAPTURE(line);
    const std::string error = error_of([&] { read(line); });
    CHECK_MESSAGE(contains(error, b.second), error);
    CHECK(error.starts_with("p.jsonl:3: "));
  }
  CHECK(contains(error_of([] {
                   read(R"j({"question":"q"})j", {{"answer", "a.b"}});
                 }),
                 "found no a.b, expected the answer there"));
  CHECK(contains(error_of([] {
                   read(R"j({"question":"q"})j", {{"question", "x"}});
                 }),
                 "found no x, expected the question there"));
}

TEST_CASE("choices are listed below a question that does not list them") {
  Problem p{.question = "Which?", .choices = {"red", "blue"}};
  CHECK(list_choices(p) == "A. red\nB. blue");
  CHECK(question_with_choices(p) == "Which?\nA. red\nB. blue");
  for (const char* lists : {"Which?\nA. red\nB. blue", "(A) red (B) blue?", "A)red, B)blue"}) {
    p.question = lists;
    CHECK(question_with_choices(p) == lists);
  }
  p.question = "Is it red or blue?";
  CHECK(question_with_choices(p) == "Is it red or blue?\nA. red\nB. blue");
  p.choices.clear();
  CHECK(question_with_choices(p) == "Is it red or blue?");
}
