// Problems as people's files have them: a question, and what is right.
//
//     Record (cake/records.h) --parse_problem--> Problem --verifier (cake/verify.h)--> right or not
//
// Keys are found whatever their case, and with or without _, - and blanks: "answerKey", "Correct
// Answer". --map question=KEY and answer=KEY come before all of them; numbers, target and choices
// can be mapped too.
//
// The question is, in this order:
//     prompt, if it is a list of messages     (verl, TRL)
//     question, problem, query, instruction   and an "input" below an instruction; a context,
//                                             passage or article stands above a question
//     messages, conversations                 up to a user's message
//     prompt, a string                        a text to continue, not a chat
//     input, inputs
//     none, where there are numbers and a target: the countdown's rules are the question
//
// What is right is the value of the first of kAnswerKeys, or of kSolutionKeys, that has one. A
// list, or an object as those of SQuAD and TriviaQA, holds several answers, of which any is right.
// true is also yes.
//
// Choices are a list, {"text", "label"}, {"A": .., "B": ..} or keys A, B, ..; their answer is an
// index from 0, a letter, a label or the text of a choice, and becomes a letter. A correct_answer
// with distractors or incorrect answers are choices in alphabetical order.
#pragma once

#include <algorithm>
#include <cctype>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/conversations.h"
#include "cake/json.h"
#include "cake/messages.h"
#include "cake/records.h"
#include "cake/rubric.h"

namespace cake {

struct Problem {  // one record of a problems file
  std::string question;
  // Any of them is right. As the file has them, often with the steps that lead to the answer;
  // letters where the problem has choices. Empty: none is known.
  std::vector<std::string> answers;
  std::vector<std::string> choices;  // the text of A, of B, ...; empty: none are listed
  std::vector<std::string> numbers;  // of a countdown, as in the file; empty: it is none
  std::string target;                // of a countdown
  Json line;                         // the whole record
  Rubric rubric;                     // empty: none
  std::string where;                 // file:line, for messages

  Conversation chat;                     // the question as messages, a user's last; empty: a text
  std::string question_key, answer_key;  // where they were found: "reward_model.ground_truth"
};

// Throws Error where a record has no question, or where its choices and answer do not fit together;
// a record of another stage's kind names that stage.
inline Problem parse_problem(const Record& record);

// The choices, a line for each: "A. red".
inline std::string list_choices(const Problem& problem);

// The question with its choices below it, unless it lists them by itself.
inline std::string question_with_choices(const Problem& problem);

// In the order in which they are looked for; behind them, solutions, whose end is the answer.
inline constexpr std::string_view kAnswerKeys[] = {"reward_model.ground_truth",
                                                   "ground_truth",
                                                   "final_answer",
                                                   "expected_answer",
                                                   "answer_key",
                                                   "correct_answer",
                                                   "answer",
                                                   "answers",
                                                   "gold_answer",
                                                   "reference_answer",
                                                   "gold",
                                                   "target",
                                                   "targets",
                                                   "label",
                                                   "correct_option",
                                                   "answer_index",
                                                   "answer_idx",
                                                   "correct",
                                                   "best_answer"};
inline constexpr std::string_view kSolutionKeys[] = {"solution", "reference_solution", "output",
                                                     "response", "completion"};

// ---------------------------------------------------------------------------------------------
// Keys

namespace problems {
using simdjson::dom::element;
using simdjson::dom::object;

struct Found {
  std::string key;  // as in the file, with dots where it is inside of an object
  element value;
};

// Whether a key begins with a name, with case, _, - and blanks left aside: "Answer Key" and
// "answer_key". `whole`: whether that is all of it.
inline bool matches_key(std::string_view key, std::string_view name, bool whole = true) {
  const auto next = [](std::string_view& text) {
    text.remove_prefix(std::min(text.find_first_not_of("_- "), text.size()));
    if (text.empty()) return 0;
    const int c = std::tolower(uint8_t(text[0]));
    text.remove_prefix(1);
    return c;
  };
  for (;;) {
    const int expected = next(name);
    if (expected == 0) return !whole || next(key) == 0;
    if (next(key) != expected) return false;
  }
}

inline bool is_blank(element e) {
  if (e.is_string()) return strip_ascii(e.get_string().value()).empty();
  if (e.is_array()) return e.get_array().value().size() == 0;
  return e.is_null();
}

// A string without its outer white space, or a number or boolean as JSON.
inline std::string text_of(element e) {
  if (e.is_string()) return std::string(strip_ascii(e.get_string().value()));
  const std::string_view number = written_number(e);
  return number.empty() ? std::string(simdjson::minify(e)) : std::string(number);
}

inline Json json_of(element e) {
  const Json json = Json::parse(python_json(e), nullptr, false);
  return json.is_discarded() ? Json::parse(std::string(simdjson::minify(e))) : json;  // NaN
}

// The member of this name that has a value. A dot leads into an object.
inline std::optional<Found> find_key(object in, std::string_view name) {
  const size_t dot = name.find('.');
  for (const auto& [key, value] : in) {
    if (!matches_key(key, name.substr(0, dot)) || is_blank(value)) continue;
    if (dot == name.npos) return Found{std::string(key), value};
    object inner;
    if (value.get(inner)) continue;
    auto found = find_key(inner, name.substr(dot + 1));
    if (found) return Found{concat(key, ".", found->key), found->value};
  }
  return std::nullopt;
}

inline bool is_mapped(const Record& record, std::string_view field) {
  return record.names && record.names->count(field);
}

// The value of a field that --map names; otherwise the first of `names` that has one.
template <class Names>
std::optional<Found> find_value(const Record& record, std::string_view field, const Names& names) {
  if (is_mapped(record, field)) {
    const std::string& path = record.names->find(field)->second;
    element value;
    if (record.find(field, value)) return Found{path, value};
    return std::nullopt;
  }
  for (const std::string_view name : names) {
    element value;
    if (is_mapped(record, name)) {
      if (record.find(name, value) && !is_blank(value)) {
        return Found{record.names->find(name)->second, value};
      }
    } else if (auto found = find_key(record.object, name)) {
      return found;
    }
  }
  return std::nullopt;
}
inline std::optional<Found> find_value(const Record& record, std::string_view field) {
  return find_value(record, field, std::initializer_list<std::string_view>{field});
}

// ---------------------------------------------------------------------------------------------
// Choices

// Where a text begins with a choice's letter, as in "B) red", "(B) red", "B. red" and "B: red": the
// offset of what is behind it; 0: it does not.
inline size_t behind_letter(std::string_view text, char letter) {
  const size_t i = text.starts_with('(');
  if (i + 1 >= text.size() || std::toupper(uint8_t(text[i])) != letter) return 0;
  const bool is_marked = i ? text[2] == ')' : std::string_view(").:").find(text[1]) != text.npos;
  return is_marked ? std::min(text.find_first_not_of(' ', i + 2), text.size()) : 0;
}

struct Choices {
  std::vector<std::string> texts, labels;  // labels: empty, or one for each text
};

// A list's choices: texts, or objects {"text", "label"}.
inline void add_choices(simdjson::dom::array list, Choices& choices, const std::string& where) {
  for (const element e : list) {
    object choice;
    if (e.get(choice)) {
      choices.texts.push_back(text_of(e));
      continue;
    }
    const auto text = find_key(choice, "text"), label = find_key(choice, "label");
    if (!text) fail(where, ": found an object without \"text\", expected a choice");
    choices.texts.push_back(text_of(text->value));
    if (label) choices.labels.push_back(text_of(label->value));
  }
}

// {"text": [...], "label": [...]} or {"A": .., "B": ..}
inline void add_choices(object from, Choices& choices, const std::string& where) {
  const auto texts = find_key(from, "text"), labels = find_key(from, "label");
  if (texts && texts->value.is_array()) {
    add_choices(texts->value.get_array().value(), choices, where);
    if (!labels) return;
    for (const element e : as_array(labels->value, where + ": label")) {
      choices.labels.push_back(text_of(e));
    }
    return;
  }
  for (const auto& [key, value] : from) {
    if (key.size() != 1 || !std::isalnum(uint8_t(key[0])) || !value.is_string()) {
      fail(where, ": found the key ", json_text(std::string(key)),
           ", expected a list of choices, {\"text\", \"label\"}, or {\"A\": .., \"B\": ..}");
    }
    choices.texts.push_back(text_of(value)), choices.labels.emplace_back(key);
  }
}

// "correct_answer" among its distractors; in alphabetical order, so that no place is the right one.
inline void add_distractors(const Record& record, Choices& choices) {
  const auto correct = find_key(record.object, "correct_answer");
  if (!correct || !correct->value.is_string()) return;
  for (const auto& [key, value] : record.object) {
    const bool is_wrong =
        matches_key(key, "distractor", false) || matches_key(key, "incorrect_answer", false);
    if (!is_wrong || is_blank(value)) continue;
    if (value.is_string()) choices.texts.push_back(text_of(value));
    if (value.is_array()) add_choices(value.get_array().value(), choices, record.where);
  }
  if (choices.texts.empty()) return;
  choices.texts.push_back(text_of(correct->value));
  std::sort(choices.texts.begin(), choices.texts.end());
}

// Keys A, B, C, ... of the record itself.
inline void add_lettered_keys(object from, Choices& choices) {
  for (char letter = 'A'; letter <= 'Z'; letter++) {
    element value;
    if (from.at_key(std::string_view(&letter, 1)).get(value) || !value.is_string()) break;
    choices.texts.push_back(text_of(value));
  }
  if (choices.texts.size() < 2) choices.texts.clear();
}

inline Choices choices_of(const Record& record) {
  Choices choices;
  const auto found =
      find_value(record, "choices",
                 std::initializer_list<std::string_view>{"choices", "options", "question.choices"});
  const std::string where = concat(record.where, ": ", found ? found->key : "choices");
  if (found && found->value.is_array()) {
    add_choices(found->value.get_array().value(), choices, where);
  } else if (found) {
    add_choices(as_object(found->value, where), choices, where);
  } else if (!is_mapped(record, "choices")) {
    add_lettered_keys(record.object, choices);
    if (choices.texts.empty()) add_distractors(record, choices);
  }
  std::vector<std::string>& texts = choices.texts;
  if (texts.empty()) return choices;
  require(texts.size() >= 2 && texts.size() <= 26, where, ": found ", texts.size(),
          ", expected 2 to 26");
  require(choices.labels.empty() || choices.labels.size() == texts.size(), where, ": found ",
          choices.labels.size(), " labels of ", texts.size(), " choices, expected one for each");
  // The letters are written where the choices are listed.
  bool are_lettered = true;
  for (size_t i = 0; i < texts.size(); i++) {
    are_lettered = are_lettered && behind_letter(texts[i], char('A' + i)) > 0;
  }
  for (size_t i = 0; i < texts.size() && are_lettered; i++) {
    texts[i] = texts[i].substr(behind_letter(texts[i], char('A' + i)));
  }
  return choices;
}

// The letter of the choice that an answer names: by its label, as a number by its index from 0, as
// a text by its letter ("B", "(b)"), by itself, or by both ("B. red").
inline std::string letter_of(element answer, const Choices& choices, const std::string& where) {
  const std::string text = text_of(answer);
  const std::vector<std::string>& texts = choices.texts;
  const auto letter = [](auto i) { return std::string(1, char('A' + i)); };
  const auto label = std::find(choices.labels.begin(), choices.labels.end(), text);
  if (label != choices.labels.end()) return letter(label - choices.labels.begin());
  int64_t index = 0;
  if (!answer.get(index) && index >= 0 && index < int64_t(texts.size())) return letter(index);
  for (size_t i = 0; i < texts.size() && answer.is_string(); i++) {
    const size_t behind = behind_letter(text, char('A' + i));
    const bool is_letter = text.size() == 1 && std::toupper(uint8_t(text[0])) == char('A' + i);
    const bool is_lettered =
        behind > 0 && (behind == text.size() || text.substr(behind) == texts[i]);
    if (is_letter || is_lettered) return letter(i);
  }
  const auto same = std::find(texts.begin(), texts.end(), text);
  if (answer.is_string() && same != texts.end()) return letter(same - texts.begin());
  fail(where, ": found ", json_text(json_of(answer)), ", expected a choice: a letter from A to ",
       letter(texts.size() - 1), ", the text of one, or its index from 0 to ", texts.size() - 1);
}

// ---------------------------------------------------------------------------------------------
// Countdowns

// {"numbers": [3, 5], "target": 8}, also with "nums", and as a text "3, 5".
inline bool read_countdown(const std::optional<Found>& numbers, const std::optional<Found>& target,
                           Problem& problem) {
  if (!numbers || !target || target->value.is_array() || target->value.is_object()) return false;
  std::vector<std::string> list;
  simdjson::dom::array array;
  if (!numbers->value.get(array)) {
    for (const element e : array) list.push_back(text_of(e));
  } else if (numbers->value.is_string()) {
    std::string text = text_of(numbers->value);
    for (size_t i = 0, end; i < text.size(); i = end + 1) {
      end = std::min(text.find_first_of(" ,;[]()", i), text.size());
      if (end > i) list.push_back(text.substr(i, end - i));
    }
  }
  if (list.empty()) return false;
  problem.numbers = std::move(list), problem.target = text_of(target->value);
  return true;
}

inline bool is_countdown(element e) {
  object inner;
  return !e.get(inner) && find_key(inner, "target") &&
         (find_key(inner, "numbers") || find_key(inner, "nums"));
}

inline void find_countdown(const Record& record, Problem& problem) {
  using Names = std::initializer_list<std::string_view>;
  if (read_countdown(find_value(record, "numbers", Names{"numbers", "nums"}),
                     find_value(record, "target"), problem)) {
    return;
  }
  for (const char* place : {"reward_model.ground_truth", "ground_truth", "metadata"}) {
    const auto found = find_key(record.object, place);
    object inner;
    if (!found || found->value.get(inner)) continue;
    auto numbers = find_key(inner, "numbers");
    if (!numbers) numbers = find_key(inner, "nums");
    if (read_countdown(numbers, find_key(inner, "target"), problem)) return;
  }
}

// ---------------------------------------------------------------------------------------------
// Answers

inline void add_answers(element value, const Choices& choices, const std::string& where,
                        std::vector<std::string>& answers) {
  const auto add = [&](std::string answer) {
    if (answer.empty() || std::count(answers.begin(), answers.end(), answer)) return;
    answers.push_back(std::move(answer));
  };
  object inner;
  simdjson::dom::array list;
  if (is_blank(value)) return;
  if (!value.get(list)) {
    for (const element e : list) add_answers(e, choices, where, answers);
  } else if (!value.get(inner) && written_number(value).empty()) {
    // SQuAD's {"text": [...]}, TriviaQA's {"value", "aliases": [...]}, Search-R1's {"target":
    // [...]}
    bool found = false;
    for (const char* key : {"value", "aliases", "text", "target", "answer", "answers"}) {
      const auto member = find_key(inner, key);
      if (member) add_answers(member->value, choices, where, answers);
      found |= member.has_value() || !inner.at_key(key).error();
    }
    if (!found) add(text_of(value));  // for a user's program
  } else if (!choices.texts.empty()) {
    add(letter_of(value, choices, where));
  } else if (value.is_bool()) {
    const bool yes = value.get_bool().value();
    for (const char* word :
         {yes ? "true" : "false", yes ? "True" : "False", yes ? "yes" : "no", yes ? "Yes" : "No"}) {
      add(word);
    }
  } else {
    const std::string text = text_of(value);
    // A list as text: ["3/4"]
    const Json list = text.starts_with("[\"") ? Json::parse(text, nullptr, false) : Json();
    if (!list.is_array()) return add(text);
    for (const Json& e : list) add(e.is_string() ? e.get<std::string>() : e.dump());
  }
}

inline void read_answers(const Record& record, const Choices& choices, Problem& problem) {
  std::optional<Found> found;
  if (is_mapped(record, "answer")) {
    found = find_value(record, "answer");
    require(found.has_value(), record.where, ": found no ", record.names->find("answer")->second,
            ", expected the answer there, as --map says");
  }
  for (const std::string_view name : kAnswerKeys) {
    if (found) break;
    if (name == "target" && !problem.numbers.empty()) continue;
    if (name == "correct" && choices.texts.empty()) continue;  // whether an answer is
    found = find_value(record, name);
    if (found && is_countdown(found->value)) found.reset();
  }
  const bool is_solution = !found;  // a text, which may end with a letter
  if (is_solution) found = find_value(record, "", kSolutionKeys);
  if (!found) return;
  problem.answer_key = found->key;
  add_answers(found->value, is_solution ? Choices() : choices,
              concat(record.where, ": ", found->key), problem.answers);
}

// ---------------------------------------------------------------------------------------------
// Questions

[[noreturn]] inline void fail_other_stage(const Record& record, const char* found,
                                          const char* stage, const char* field) {
  fail(record.where, ": found ", found, ", which ", stage,
       " reads, expected a problem or a prompt ", "(--map ", field,
       "=KEY reads the key KEY as its ", field, ")");
}

inline void read_messages(const Record& record, std::vector<Message> messages, Problem& problem) {
  require(!messages.empty(), record.where, ": ", problem.question_key,
          ": found no messages, expected a user's");
  if (messages.back().role == "assistant") {
    fail_other_stage(record, "a conversation that ends with the assistant's answer", "./sft",
                     "question");
  }
  problem.question = messages.back().content;
  problem.chat.messages = std::move(messages);
  problem.chat.tools = parse_tools(record);
  add_system(record, problem.chat.messages);
}

inline void read_text(const Record& record, std::string text, Problem& problem) {
  require(!strip_ascii(text).empty(), record.where, ": ", problem.question_key,
          ": found nothing, expected text");
  read_messages(record, {{.role = "user", .content = std::move(text)}}, problem);
}

// A list of messages, also as a string.
inline bool is_list_of_messages(element e) {
  if (!e.is_string()) return e.is_array();
  const std::string_view text = strip_ascii(e.get_string().value());
  return text.starts_with("[{\"") && text.ends_with("}]") &&
         (text.find("\"role\"") != text.npos || text.find("\"from\"") != text.npos);
}

// The question of {"stem", "choices"}, as in ARC's own files, or of a string.
inline std::optional<std::string> string_of(const std::optional<Found>& found) {
  if (!found) return std::nullopt;
  if (found->value.is_string()) return std::string(found->value.get_string().value());
  object inner;
  if (found->value.get(inner)) return std::nullopt;
  const auto stem = find_key(inner, "stem");
  return stem ? string_of(stem) : std::nullopt;
}

inline bool read_string_question(const Record& record, Problem& problem) {
  for (const char* name : {"question", "problem", "query", "instruction"}) {
    const auto found = find_value(record, name);
    auto text = string_of(found);
    if (!text) continue;
    problem.question_key = found->key;
    if (matches_key(found->key, "instruction")) {
      const auto input = find_value(record, "input");
      if (const auto more = string_of(input)) {
        *text += "\n\n" + *more, problem.question_key += " + " + input->key;
      }
    } else {
      using Names = std::initializer_list<std::string_view>;
      const auto context = find_value(record, "context", Names{"context", "passage", "article"});
      if (const auto above = string_of(context)) {
        *text = *above + "\n\n" + *text;
        problem.question_key = context->key + " + " + problem.question_key;
      }
    }
    return read_text(record, *text, problem), true;
  }
  return false;
}

inline std::string countdown_question(const Problem& p) {
  std::string numbers;
  for (const std::string& n : p.numbers) numbers += (numbers.empty() ? "" : ", ") + n;
  return concat("Using the numbers ", numbers, ", write an expression that equals ", p.target,
                ". You can use +, -, *, / and parentheses, and each number only once.");
}

inline bool read_question(const Record& record, Problem& problem) {
  const auto mapped = is_mapped(record, "question") ? find_value(record, "question") : std::nullopt;
  if (is_mapped(record, "question") && !mapped) {
    fail(record.where, ": found no ", record.names->find("question")->second,
         ", expected the question there, as --map says");
  }
  const auto prompt = find_value(record, "prompt");
  for (const auto& found : {mapped, prompt}) {
    if (!found || !is_list_of_messages(found->value)) continue;
    problem.question_key = found->key;
    const std::string where = concat(record.where, ": ", found->key);
    read_messages(record, parse_messages(found->value, where, &record), problem);
    return true;
  }
  if (read_string_question(record, problem)) return true;
  if (element list; find_messages(record, list, &problem.question_key)) {
    read_messages(record, parse_conversation(record).messages, problem);
    return true;
  }
  if (const auto text = string_of(prompt)) {
    problem.question_key = prompt->key, problem.question = *text;
    return true;
  }
  using Names = std::initializer_list<std::string_view>;
  const auto input = find_value(record, "input", Names{"input", "inputs"});
  if (const auto text = string_of(input)) {
    problem.question_key = input->key;
    return read_text(record, *text, problem), true;
  }
  if (problem.numbers.empty()) return false;
  problem.question_key = "numbers and target";
  return read_text(record, countdown_question(problem), problem), true;
}
}  // namespace problems

// ---------------------------------------------------------------------------------------------
// Records to problems

// Fails where a record is of another stage's kind, unless --map says what of it is the problem.
inline bool has_own_names(const Record& record) {
  return problems::is_mapped(record, "question") || problems::is_mapped(record, "answer");
}

inline void refuse_preference(const Record& record) {
  using namespace problems;
  if (has_own_names(record)) return;
  const auto has = [&](std::string_view key) { return find_value(record, key).has_value(); };
  const auto label = find_value(record, "label");
  const bool is_labelled = label && label->value.is_bool() && has("completion");
  const bool is_compared = (has("chosen") && has("rejected")) ||
                           (has("responses") && has("ranking")) ||
                           (has("preferred_output") && has("non_preferred_output"));
  if (!is_labelled && !is_compared) return;
  fail_other_stage(record, "a preference", "./reward", "question");
}

inline void refuse_training_text(const Record& record, const Problem& p) {
  using namespace problems;
  if (has_own_names(record)) return;
  const auto is = [](std::string_view key, std::string_view name) {
    return matches_key(key, name);
  };
  if (is(p.question_key, "prompt") && is(p.answer_key, "completion")) {
    fail_other_stage(record, "a prompt and its completion", "./sft", "answer");
  }
  if (matches_key(p.question_key, "instruction", false) &&
      (is(p.answer_key, "output") || is(p.answer_key, "response"))) {
    fail_other_stage(record, "an instruction and its output", "./sft", "answer");
  }
}

// Fails since there is no question: its key holds something else, or there is none.
[[noreturn]] inline void fail_without_question(const Record& record) {
  using simdjson::dom::element;
  for (const char* key : {"question", "problem", "query", "instruction", "messages", "prompt"}) {
    element value;
    if (!record.find(key, value)) continue;
    fail(record.where, ": ", key, ": found ", json_text(problems::json_of(value)),
         ", expected text or messages");
  }
  fail_unknown_shape(record, "a problem: \"question\" and \"answer\", \"messages\" or \"prompt\"");
}

inline Problem parse_problem(const Record& record) {
  using namespace problems;
  Problem p;
  p.where = record.where;
  refuse_preference(record);
  find_countdown(record, p);
  if (!read_question(record, p)) fail_without_question(record);
  const Choices choices = choices_of(record);
  read_answers(record, choices, p);
  refuse_training_text(record, p);
  p.choices = choices.texts;
  p.line = Json::object();
  for (const auto& [key, value] : record.object) p.line[std::string(key)] = json_of(value);
  if (element rubric; record.find("rubric", rubric)) {
    p.rubric =
        parse_rubric(Json::parse(std::string(simdjson::minify(rubric))), record.where + ": rubric");
  }
  return p;
}

inline std::string list_choices(const Problem& problem) {
  std::string list;
  for (size_t i = 0; i < problem.choices.size(); i++) {
    list += concat(i > 0 ? "\n" : "", char('A' + i), ". ", problem.choices[i]);
  }
  return list;
}

inline std::string question_with_choices(const Problem& problem) {
  const auto lists = [&](char letter, const std::string& choice) {
    for (const char* mark : {". ", ") ", ": ", ".", ")", ":"}) {
      if (problem.question.find(concat(letter, mark, choice)) != std::string::npos) return true;
    }
    return false;
  };
  for (size_t i = 0; i < problem.choices.size(); i++) {
    if (lists(char('A' + i), problem.choices[i])) continue;
    return concat(problem.question, "\n", list_choices(problem));
  }
  return problem.question;
}

}  // namespace cake
