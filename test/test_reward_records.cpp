// The shapes in which people's files have preferences: a line of JSON, and what is read from it.
#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "cake/preferences.h"
#include "cake/records.h"
#include "test/support.h"

using namespace cake;

namespace {

Preference preference(const std::string& json, const FieldNames& names = {},
                      const PreferenceOptions& options = {}) {
  simdjson::dom::parser parser;
  simdjson::dom::object object;
  REQUIRE_MESSAGE(parser.parse(json).get(object) == simdjson::SUCCESS, json);
  return parse_preference({object, "here", &names}, options);
}

std::string text_of(const std::vector<Message>& messages) {
  std::string out;
  for (const Message& m : messages)
    out += concat(out.empty() ? "" : " ", m.role, ": ", m.content,
                  m.tool_calls.empty() ? "" : " calls");
  return out;
}

// "prompt => answer | answer [ranks]": of a text in quotation marks, of a chat with roles.
std::string summary(const Preference& p) {
  if (p.left_out) return concat("left out: ", p.left_out);
  std::string out = p.is_chat ? text_of(p.prompt.messages) : json_text(p.text);
  out += " =>";
  const char* divider = " ";
  for (const auto& answer : p.answers) out += std::exchange(divider, " | ") + text_of(answer);
  for (const auto& text : p.continuations) out += std::exchange(divider, " | ") + json_text(text);
  out += " [";
  for (const int rank : p.ranking) out += concat(out.ends_with('[') ? "" : " ", rank);
  if (p.label) out += *p.label ? " good" : " bad";
  return out + "]";
}

struct Row {
  const char *line, *expected;
};

void check(const std::vector<Row>& rows, const PreferenceOptions& options = {}) {
  for (const Row& row : rows) {
    std::string found;
    const std::string error = error_of([&] { found = summary(preference(row.line, {}, options)); });
    CHECK_MESSAGE((error == "no error" ? found : error) == row.expected, std::string(row.line));
  }
}

void check_refused(const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    const std::string error = error_of([&] { preference(row.line); });
    CHECK_MESSAGE((error.starts_with("here") && contains(error, row.expected)),
                  std::string(row.line), "\n", error);
    CHECK(!contains(error, "\n"));
  }
}

}  // namespace

TEST_CASE("pairs are read whatever program wrote them") {
  check({
      {R"({"prompt":"a b","chosen":" c","rejected":" d"})", R"("a b" => " c" | " d" [1 2])"},
      {R"({"prompt":"","chosen":"c","rejected":"d"})", R"("" => "c" | "d" [1 2])"},
      // the prompt as messages, the answers as strings, messages or one message
      {R"({"prompt":[{"role":"user","content":"hi"}],"chosen":"c","rejected":"d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"prompt":[{"role":"user","content":"hi"}],
           "chosen":[{"role":"assistant","content":"c"}],
           "rejected":[{"role":"assistant","content":"d"}]})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"messages":[{"role":"user","content":"hi"}],
           "chosen":{"role":"assistant","content":"c"},
           "rejected":{"role":"assistant","content":"d"}})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"prompt":"hi","chosen":[{"role":"assistant","content":"c"}],
           "rejected":[{"role":"assistant","content":"d"}]})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      // UltraFeedback-binarized: the prompt is repeated, and "messages" are the chosen ones
      {R"({"prompt":"Capital?","prompt_id":"7","score_chosen":8.5,"score_rejected":5,
           "messages":[{"role":"user","content":"Capital?"},{"role":"assistant","content":"Rome"}],
           "chosen":[{"role":"user","content":"Capital?"},{"role":"assistant","content":"Rome"}],
           "rejected":[{"role":"user","content":"Capital?"},
                       {"role":"assistant","content":"Oslo"}]})",
       "user: Capital? => assistant: Rome | assistant: Oslo [1 2]"},
      {R"({"prompt":[{"role":"user","content":"hi"}],
           "chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"d"}]})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"prompt":[{"role":"system","content":"s"},{"role":"user","content":"hi"}],
           "chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"d"}]})",
       "system: s user: hi => assistant: c | assistant: d [1 2]"},
      // only its last turn is repeated
      {R"({"prompt":[{"role":"user","content":"hi"},{"role":"assistant","content":"x"},
                     {"role":"user","content":"and"}],
           "chosen":[{"role":"user","content":"and"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"assistant","content":"d"}]})",
       "user: hi assistant: x user: and => assistant: c | assistant: d [1 2]"},
      // orpo-dpo-mix: of several turns, the prompt names one
      {R"({"prompt":"and","question":"and",
           "chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"x"},
                     {"role":"user","content":"and"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"x"},
                       {"role":"user","content":"and"},{"role":"assistant","content":"d"}]})",
       "user: hi assistant: x user: and => assistant: c | assistant: d [1 2]"},
      // whole conversations, the shorter one the beginning of the other
      {R"({"chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"},
                     {"role":"user","content":"and"},{"role":"assistant","content":"e"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}]})",
       "user: hi => assistant: c user: and assistant: e | assistant: c [1 2]"},
      // nobody answers a last question
      {R"({"chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"},
                     {"role":"user","content":"bye"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"d"}]})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      // orca_dpo_pairs, and Argilla's copy
      {R"({"system":"s","question":"hi","chosen":"c","rejected":"d"})",
       "system: s user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"system":"","question":"hi","chosen":"c","rejected":"d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"system":"s","input":"hi","chosen":"c","rejected":"d","generations":["c","d"],
           "rating":[9,2],"status":"unchanged"})",
       "system: s user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"system":"s","prompt":"hi","chosen":"c","rejected":"d"})",
       "system: s user: hi => assistant: c | assistant: d [1 2]"},
      // other names
      {R"({"instruction":"hi","chosen_response":"c","rejected_response":"d","chosen_rating":5})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"instruction":"add","input":"1 2","chosen":"3","rejected":"4"})",
       "user: add\n1 2 => assistant: 3 | assistant: 4 [1 2]"},
      {R"({"qid":1,"question":"hi","response_j":"c","response_k":"d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"input":{"messages":[{"role":"user","content":"hi"}],"tools":[]},
           "preferred_output":[{"role":"assistant","content":"c"}],
           "non_preferred_output":[{"role":"assistant","content":"d"}]})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "rejected_response":"d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
  });
}

TEST_CASE("transcripts are chats, and what both begin with is the prompt") {
  const std::vector<Row> rows = {
      {R"({"chosen":"\n\nHuman: hi\n\nAssistant: hello","rejected":"\n\nHuman: hi\n\nAssistant: go away"})",
       "user: hi => assistant: hello | assistant: go away [1 2]"},
      {R"({"chosen":"\n\nHuman: hi\n\nAssistant: x\n\nHuman: y\n\nAssistant: c",
           "rejected":"\n\nHuman: hi\n\nAssistant: x\n\nHuman: y\n\nAssistant: d"})",
       "user: hi assistant: x user: y => assistant: c | assistant: d [1 2]"},
      {R"({"chosen":"Human: hi\n\nAssistant: c","rejected":"Human: hi\n\nAssistant: d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      // one is the beginning of the other
      {R"({"chosen":"\n\nHuman: hi\n\nAssistant: c\n\nHuman: y\n\nAssistant: e",
           "rejected":"\n\nHuman: hi\n\nAssistant: c"})",
       "user: hi => assistant: c user: y assistant: e | assistant: c [1 2]"},
      // two turns of one side
      {R"({"chosen":"\n\nHuman: hi\n\nHuman: there\n\nAssistant: c",
           "rejected":"\n\nHuman: hi\n\nHuman: there\n\nAssistant: d"})",
       "user: hi\n\nthere => assistant: c | assistant: d [1 2]"},
      {R"({"chosen":"\n\nHuman: hi\n\nAssistant: c\n\nHuman: thanks","rejected":"\n\nHuman: hi\n\nAssistant: d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      // the prompt as a transcript that the answers continue, or repeat
      {R"({"prompt":"\n\nHuman: hi\n\nAssistant:","chosen":" c","rejected":" d"})",
       "user: hi => assistant:  c | assistant:  d [1 2]"},
      {R"({"prompt":"\n\nHuman: hi\n\nAssistant:","chosen":"\n\nHuman: hi\n\nAssistant: c",
           "rejected":"\n\nHuman: hi\n\nAssistant: d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"prompt":"hi","chosen":"\n\nHuman: hi\n\nAssistant: c","rejected":"\n\nHuman: hi\n\nAssistant: d"})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"chosen":"\n\nHuman: hi\n\nAssistant:","rejected":"\n\nHuman: hi\n\nAssistant: d"})",
       "left out: empty answer"},
      {R"({"chosen":"\n\nHuman: hi\n\nAssistant: c","rejected":"\n\nHuman: hi\n\nAssistant: c"})",
       "left out: equal answers"},
  };
  check(rows);
  // For a tokenizer without chat tokens they are texts.
  const PreferenceOptions as_texts{.transcripts_are_chats = false};
  check({{rows[0].line, R"("\n\nHuman: hi\n\nAssistant:" => " hello" | " go away" [1 2])"},
         {rows[1].line,
          R"("\n\nHuman: hi\n\nAssistant: x\n\nHuman: y\n\nAssistant:" => " c" | " d" [1 2])"},
         {rows[6].line, R"("\n\nHuman: hi\n\nAssistant:" => " c" | " d" [1 2])"},
         {rows[7].line, R"("\n\nHuman: hi\n\nAssistant:" => " c" | " d" [1 2])"},
         {rows[9].line, "left out: empty answer"}},
        as_texts);
}

TEST_CASE("texts without a prompt share their beginning, up to a word's end") {
  check({
      {R"({"chosen":"The sky is blue.","rejected":"The sky is green."})",
       R"("The sky is" => " blue." | " green." [1 2])"},
      {R"({"chosen":"The sky is blue.","rejected":"The sky is black."})",
       R"("The sky is" => " blue." | " black." [1 2])"},
      {R"({"chosen":"The sky is","rejected":"The sky is green.","source":"x-1"})",
       R"("The sky" => " is" | " is green." [1 2])"},
      // a text that repeats its prompt
      {R"({"prompt":"The sky","chosen":"The sky is blue.","rejected":"The sky is green."})",
       R"("The sky" => " is blue." | " is green." [1 2])"},
      {R"({"prompt":"The","chosen":"The one","rejected":"The other"})",
       R"("The" => "The one" | "The other" [1 2])"},
  });
  CHECK(!preference(R"({"chosen":"a b","rejected":"a c"})").has_prompt);
  CHECK(preference(R"({"prompt":"a","chosen":"b","rejected":"c"})").has_prompt);
}

TEST_CASE("two answers and a verdict are a pair, or a tie") {
  check({
      {R"({"question_id":1,"model_a":"x","model_b":"y","winner":"model_a",
           "conversation_a":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "conversation_b":[{"role":"user","content":"hi"},{"role":"assistant","content":"d"}]})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"model_a":"x","model_b":"y","winner":"model_b",
           "conversation_a":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"},
                             {"role":"user","content":"y"},{"role":"assistant","content":"e"}],
           "conversation_b":[{"role":"user","content":"hi"},{"role":"assistant","content":"d"},
                             {"role":"user","content":"y"},{"role":"assistant","content":"f"}]})",
       "user: hi => assistant: c user: y assistant: e | assistant: d user: y assistant: f [2 1]"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","model_a":"gpt-x","model_b":"gpt-y",
           "winner":"gpt-y"})",
       R"("p" => "c" | "d" [2 1])"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","winner":"tie"})", "left out: tie"},
      {R"_({"prompt":"p","response_a":"c","response_b":"d","winner":"tie (bothbad)"})_",
       "left out: tie"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","preference":"B"})",
       R"("p" => "c" | "d" [2 1])"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","winner_model_a":0,"winner_model_b":1,
           "winner_tie":0})",
       R"("p" => "c" | "d" [2 1])"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","winner_model_a":0,"winner_model_b":0,
           "winner_tie":1})",
       "left out: tie"},
      // HelpSteer2 and 3: from -3, the first is better, to 3
      {R"({"prompt":"p","response_1":"c","response_2":"d","preference_strength":-2})",
       R"("p" => "c" | "d" [1 2])"},
      {R"({"context":[{"role":"user","content":"hi"}],"response1":"c","response2":"d",
           "overall_preference":3})",
       "user: hi => assistant: c | assistant: d [2 1]"},
      {R"({"prompt":"p","response_1":"c","response_2":"d","preference_strength":0})",
       "left out: tie"},
      // PKU-SafeRLHF, AlpacaFarm, WebGPT, SHP
      {R"({"prompt":"p","response_0":"c","response_1":"d","better_response_id":1,
           "safer_response_id":0})",
       R"("p" => "c" | "d" [2 1])"},
      {R"({"instruction":"hi","input":"","output_1":"c","output_2":"d","preference":2})",
       "user: hi => assistant: c | assistant: d [2 1]"},
      {R"({"instruction":"hi","output_1":"c","output_2":"d","preference":1.0})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"question":"hi","answer_0":"c","answer_1":"d","score_0":-0.5,"score_1":0.5})",
       "user: hi => assistant: c | assistant: d [2 1]"},
      {R"({"history":"hi","human_ref_A":"c","human_ref_B":"d","labels":1,"score_A":2,"score_B":9})",
       "user: hi => assistant: c | assistant: d [1 2]"},
      {R"({"history":"hi","human_ref_A":"c","human_ref_B":"d","labels":0})",
       "user: hi => assistant: c | assistant: d [2 1]"},
      // a pair may be marked as a tie, too
      {R"({"prompt":"p","chosen":"c","rejected":"d","preference":"tie"})", "left out: tie"},
      {R"({"system":"","input":"p","chosen":"c","rejected":"d","status":"tie"})", "left out: tie"},
  });
}

TEST_CASE("lists of answers are ranked by ranks or scores, beside them or inside") {
  check({
      {R"({"prompt":"p","responses":["a","b","c"],"ranking":[2,1,2]})",
       R"("p" => "a" | "b" | "c" [2 1 2])"},
      {R"({"prompt":"p","responses":["a","b","c"],"scores":[1,7.5,1]})",
       R"("p" => "a" | "b" | "c" [2 1 2])"},
      {R"({"instruction":"hi","generations":["a","b"],"ratings":[4,5]})",
       "user: hi => assistant: a | assistant: b [2 1]"},
      // UltraFeedback as it was before it was binarized
      {R"({"source":"x","instruction":"hi","models":["m","n"],"completions":[
           {"model":"m","response":"a","overall_score":6.5,"critique":"so so"},
           {"model":"n","response":"b","overall_score":8.0}]})",
       "user: hi => assistant: a | assistant: b [2 1]"},
      // Nectar
      {R"({"prompt":"\n\nHuman: hi\n\nAssistant: ","answers":[{"answer":"a","model":"m","rank":2},
           {"answer":"b","model":"n","rank":1}]})",
       "user: hi => assistant: a | assistant: b [2 1]"},
      // NeMo-RL, whose ranks begin at 0
      {R"({"context":[{"role":"user","content":"hi"}],"completions":[
           {"rank":0,"completion":[{"role":"assistant","content":"a"}]},
           {"rank":1,"completion":[{"role":"assistant","content":"b"}]}]})",
       "user: hi => assistant: a | assistant: b [1 2]"},
      {R"({"prompt":"p","summaries":[{"text":"a"},{"text":"b"}],"choice":1})",
       R"("p" => "a" | "b" [2 1])"},
      // what is empty or has no score is not compared
      {R"({"prompt":"p","responses":["a","b","c"],"scores":[1,null,2]})",
       R"("p" => "a" | "c" [2 1])"},
      {R"({"prompt":"p","responses":["a","b","c"],"scores":["1","N/A","2"]})",
       R"("p" => "a" | "c" [2 1])"},
      {R"({"prompt":"p","generations":["a",null,"c"],"ratings":[1,5,2]})",
       R"("p" => "a" | "c" [3 2])"},
      {R"({"prompt":"p","responses":["a"," ","c"],"ranking":[3,1,2]})",
       R"("p" => "a" | "c" [3 2])"},
      {R"({"prompt":"p","responses":["a",""],"ranking":[1,2]})", "left out: empty answer"},
      {R"({"prompt":"p","responses":["a","b"],"ranking":[1,1]})", "left out: tie"},
      {R"({"prompt":"p","responses":["a","a"],"ranking":[1,2]})", "left out: equal answers"},
      {R"({"prompt":"p","responses":["a","a","b"],"ranking":[1,2,3]})",
       R"("p" => "a" | "a" | "b" [1 2 3])"},
  });
}

TEST_CASE("an answer with a label is read whatever program wrote it") {
  check({
      {R"({"prompt":"p","completion":"c","label":true})", R"("p" => "c" [1 good])"},
      {R"({"prompt":"p","completion":"c","label":0})", R"("p" => "c" [1 bad])"},
      {R"({"prompt":"p","completion":"c","label":"Good"})", R"("p" => "c" [1 good])"},
      {R"({"prompt":"p","completion":"c","label":"undesirable"})", R"("p" => "c" [1 bad])"},
      {R"({"prompt":"p","completion":"c","label":-1})", R"("p" => "c" [1 bad])"},
      {R"({"prompt":[{"role":"user","content":"hi"}],
           "completion":[{"role":"assistant","content":"c"}],"label":false})",
       "user: hi => assistant: c [1 bad]"},
      {R"({"prompt":[{"role":"user","content":"hi"}],"completion":"c","label":true})",
       "user: hi => assistant: c [1 good]"},
      {R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"x"},
           {"role":"user","content":"y"},{"role":"assistant","content":"c"}],"label":true})",
       "user: hi assistant: x user: y => assistant: c [1 good]"},
      {R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "kto_tag":false})",
       "user: hi => assistant: c [1 bad]"},
      {R"({"instruction":"hi","input":"","output":"c","kto_tag":true})",
       "user: hi => assistant: c [1 good]"},
      {R"({"prompt":"p","completion":" ","label":true})", "left out: empty answer"},
      {R"({"text":"fine","label":"pos"})", R"("fine" => [1 good])"},
      {R"({"text":"","label":1})", "left out: empty answer"},
  });
}

TEST_CASE("equal answers and empty ones are left out, and are no error") {
  check({
      {R"({"prompt":"p","chosen":"c","rejected":"c"})", "left out: equal answers"},
      {R"({"prompt":"p","chosen":"","rejected":"c"})", "left out: empty answer"},
      {R"({"prompt":"p","chosen":"c","rejected":" \n"})", "left out: empty answer"},
      {R"({"prompt":"p","chosen":"c","rejected":null})", "left out: empty answer"},
      {R"({"prompt":"p","chosen":"c","rejected":[]})", "left out: empty answer"},
      {R"({"prompt":[{"role":"user","content":"hi"}],"chosen":"c",
           "rejected":[{"role":"assistant","content":""}]})",
       "left out: empty answer"},
      {R"({"chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}]})",
       "left out: equal answers"},
      {R"({"chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"hi"}]})",
       "left out: empty answer"},
  });
}

TEST_CASE("bad preferences are refused with file, line and what was found") {
  check_refused({
      {R"({"prompt":"a","chosen":"b"})",
       R"(here: found the keys "prompt", "chosen", expected "chosen" and "rejected")"},
      {R"({"question":"a","answer":"b"})",
       R"(found the keys "question", "answer" (a problem, which ./rlhf)"},
      {R"({"prompt":"p","good":"c","worse":"d"})", "--map FIELD=KEY"},
      {R"({"prompt":"a","chosen":3,"rejected":"b"})", "chosen: found a number, expected messages"},
      {R"({"prompt":"a","responses":["x","y"],"ranking":[1]})", "found 1 ranks, expected 2"},
      {R"({"prompt":"a","responses":["x","y"],"ranking":[1,0]})", "expected ranks from 1 on"},
      {R"({"prompt":"a","responses":["x","y"],"ranking":"1,2"})", "expected a rank for each"},
      {R"({"prompt":"a","responses":["x","y"],"scores":[1]})", "found 1 scores, expected 2"},
      {R"({"prompt":"a","responses":["x"],"ranking":[1]})", "expected at least 2"},
      {R"({"prompt":"a","responses":["x","y"]})", R"(found the keys "prompt", "responses")"},
      {R"({"prompt":"p","summaries":["a","b"],"choice":2})", "choice: found 2, expected 0 to 1"},
      {R"({"text":"a","label":"maybe"})", R"(label: found "maybe", expected true or false)"},
      {R"({"text":"a","label":3})", "label: found 3, expected true or false"},
      {R"({"prompt":"p","completion":"c","label":[]})", "label: found [], expected true or false"},
      {R"({"completion":"c","label":true})", R"(expected a "prompt" beside the answer)"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","winner":"x"})",
       R"(winner: found "x", expected "a", "b" or "tie")"},
      {R"({"prompt":"p","response_a":"c","response_b":"d","preference":1})",
       R"(preference: found 1, expected "a", "b" or "tie")"},
      {R"({"prompt":"p","response_a":"c","response_b":"d"})", "found the keys"},
      {R"({"prompt":[{"role":"assistant","content":"a"}],"chosen":"b","rejected":"c"})",
       "answer 1"},
      {R"({"prompt":[],"chosen":"b","rejected":"c"})", "prompt: found an empty list"},
      {R"({"prompt":3,"chosen":"b","rejected":"c"})", "prompt: found a number"},
      // a prompt that nobody has heard of
      {R"({"ask":"What is it?","chosen":"It is a","rejected":"It is b"})",
       "(--map prompt=ask reads the key ask as the prompt)"},
      {R"({"chosen":"yes","rejected":"no"})",
       R"(expected a "prompt", or answers that begin alike)"},
      {R"({"prompt":"other words","chosen":[{"role":"user","content":"hi"},
           {"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"hi"},{"role":"assistant","content":"d"}]})",
       "chosen: found a conversation that does not begin with the prompt"},
      {R"({"chosen":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}],
           "rejected":[{"role":"user","content":"ho"},{"role":"assistant","content":"d"}]})",
       "found no message that the answers begin with, expected a prompt"},
      {R"({"prompt":"p","chosen":"c","rejected":"d","margin":"wide"})",
       R"(margin: found "wide", expected a number)"},
      {R"({"prompt":"p","chosen":"c","rejected":"d","chance":2})", "expected a number from 0 to 1"},
  });
}

TEST_CASE("scores and margins come with the answers") {
  const Preference ultra = preference(
      R"({"prompt":"p","chosen":"c","rejected":"d","score_chosen":8.5,"score_rejected":5})");
  CHECK(ultra.scores == std::vector<double>{8.5, 5});
  CHECK(!ultra.margin);
  CHECK(preference(R"({"prompt":"p","chosen":"c","rejected":"d","chosen-rating":4,
                       "rejected-rating":2})")
            .scores == std::vector<double>{4, 2});
  CHECK(preference(R"({"prompt":"p","responses":["a","b","c"],"scores":[1,null,2]})").scores ==
        std::vector<double>{1, 2});
  CHECK(preference(R"({"prompt":"p","responses":["a","b"],"ranking":[1,2]})").scores.empty());
  CHECK(preference(R"({"prompt":"p","chosen":"c","rejected":"d","margin":0.5})").margin == .5);
  CHECK(preference(R"({"prompt":"p","chosen":"c","rejected":"d","margin":"2"})").margin == 2);
  CHECK(preference(R"({"prompt":"p","chosen":"c","rejected":"d","chance":0.9})").chance == .9);
}

TEST_CASE("--map reads the fields of a preference from other keys") {
  const FieldNames names = {{"prompt", "data.ask"}, {"chosen", "data.good"}, {"rejected", "bad"}};
  CHECK(summary(preference(R"({"data":{"ask":"p","good":"c"},"bad":"d"})", names)) ==
        R"("p" => "c" | "d" [1 2])");
  CHECK(summary(preference(R"({"prompt":"p","text":"c","vote":"up"})",
                           {{"completion", "text"}, {"label", "vote"}})) ==
        R"("p" => "c" [1 good])");
  CHECK(summary(
            preference(R"({"ask":"p","chosen":"c d","rejected":"c e"})", {{"question", "ask"}})) ==
        "user: p => assistant: c d | assistant: c e [1 2]");
}

TEST_CASE("answers to be scored need no ranks and no labels") {
  const PreferenceOptions options{.compared = false};
  check(
      {
          {R"({"text":"fine"})", R"("fine" => [1])"},
          {R"({"prompt":"p","completion":"c"})", R"("p" => "c" [1])"},
          {R"({"prompt":[{"role":"user","content":"hi"}],"response":"c"})",
           "user: hi => assistant: c [1]"},
          {R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"c"}]})",
           "user: hi => assistant: c [1]"},
          {R"({"prompt":"p","responses":["a","b","b"]})", R"("p" => "a" | "b" | "b" [1 1 1])"},
          {R"({"prompt":"p","responses":["a"]})", R"("p" => "a" [1])"},
          {R"({"prompt":"p","chosen":"c","rejected":"c"})", R"("p" => "c" | "c" [1 2])"},
          {R"({"prompt":"p","completion":""})", "left out: empty answer"},
      },
      options);
}

TEST_CASE("real pairs of solutions and real reviews are read") {
  const std::string pairs = "preferences/gsm8k_solutions.jsonl",
                    reviews = "reviews/movie_reviews.jsonl";
  if (skip_without_data(pairs) || skip_without_data(reviews)) return;
  LeftOut left_out;
  int64_t kept = 0, good = 0;
  const int64_t read = for_each_record({data_path(pairs).string()}, {}, left_out,
                                       [&](const Record& record) -> const char* {
                                         const Preference p = parse_preference(record);
                                         if (p.left_out) return p.left_out;
                                         CHECK(p.continuations.size() == 2);
                                         kept++;
                                         return nullptr;
                                       });
  CHECK(read == 2429);
  CHECK(kept == 2429);
  const int64_t texts = for_each_record({data_path(reviews).string()}, {}, left_out,
                                        [&](const Record& record) -> const char* {
                                          good += *parse_preference(record).label;
                                          return nullptr;
                                        });
  CHECK(texts == 2000);
  CHECK(good == 1000);
  CHECK(left_out.total() == 0);
}
