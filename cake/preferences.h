// Preferences as people's files have them.
//
//     Record (cake/records.h) --parse_preference--> Preference
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/conversations.h"
#include "cake/records.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Preferences: several answers to one prompt and which is better, or one answer and whether it is
// good. The shapes, with the data sets or programs that write them:
//
//     {"prompt", "chosen", "rejected"}     TRL, UltraFeedback-binarized; also chosen_response and
//                                          rejected_response (Argilla, NeMo), response_j and
//                                          response_k (StackExchange), preferred_output and
//                                          non_preferred_output (OpenAI), "messages" and
//                                          rejected_response (ms-swift)
//     {"chosen", "rejected"}               whole conversations, HH transcripts or texts: what both
//                                          begin with is the prompt
//     {"prompt", "response_a", "response_b", "winner"}
//                                          also conversation_a (lmsys arena), response_1 and
//                                          preference_strength (HelpSteer), response_0 and
//                                          better_response_id (PKU), output_1 and preference
//                                          (AlpacaFarm), answer_0 and score_0 (WebGPT), human_ref_A
//                                          and labels (SHP)
//     {"prompt", "responses", "ranking"}   K answers, the rank of each: 1 best, equal is a tie; or
//                                          "scores", higher is better; or a list of objects with
//                                          text and score (UltraFeedback) or rank (Nectar)
//     {"prompt", "completion", "label"}    one answer, good or not (KTO); also {"messages",
//                                          "label"}, kto_tag (LLaMA-Factory)
//     {"text", "label"}                    a text, good or not
//
// The prompt may also be called question, instruction (with "input"), query, context, history,
// input, messages or conversations; "system" is the system's message.
//
// Prompts and answers are strings or messages. If both are strings, the prompt is a text and the
// answers continue it; except that the keys question, instruction, ..., "system" and the
// transcripts of HH ("\n\nHuman: ... \n\nAssistant: ...") make a chat. Answers may repeat the
// prompt: it is removed. Of a list, answers that are empty or have no score are not compared.

struct Preference {
  bool is_chat = false;
  std::string text;                           // the prompt, or the labelled text
  Conversation prompt;                        // of a chat
  std::vector<std::string> continuations;     // of a text
  std::vector<std::vector<Message>> answers;  // of a chat
  std::vector<int> ranking;                   // of each answer; 1 is the best
  std::vector<double> scores;                 // of each answer, higher is better; empty: unknown
  std::optional<double> margin;  // "margin": how much better the better answers are, as a reward
  std::optional<bool> label;     // of the text, or of the one answer
  bool has_prompt = true;        // false: the prompt is only what the answers begin with
  double chance = 0;  // that labellers choose the first answer, if known (synthetic data); else 0
  // Why nothing can be learned from it: "empty answer", "equal answers", "tie"; else nullptr.
  const char* left_out = nullptr;
};

struct PreferenceOptions {
  bool transcripts_are_chats = true;  // else they are texts: for a tokenizer without chat tokens
  // Whether answers must be compared or labelled. If not, {"prompt", "completion"}, conversations,
  // texts and lists of answers are read as well, with equal ranks: to be scored.
  bool compared = true;
};

// Throws Error for a record of another shape, and where a conversation is none.
inline Preference parse_preference(const Record&, const PreferenceOptions& = {});

namespace preferences {
using simdjson::dom::element;
using Messages = std::vector<Message>;

// A number, or a string that is one ("4"). Labellers also write null and "N/A".
inline std::optional<double> number_of(element e) {
  double x = 0;
  std::string_view text;
  if (!e.get(text)) {
    const std::string digits(strip(text));
    char* end = nullptr;
    x = std::strtod(digits.c_str(), &end);
    if (digits.empty() || *end) return std::nullopt;
  } else if (e.get(x)) {
    return std::nullopt;
  }
  return std::isfinite(x) ? std::optional(x) : std::nullopt;
}

// ---------------------------------------------------------------------------------------------
// Answers, and what the record says of them

struct RawAnswers {
  struct Answer {
    std::optional<element> value;  // none: null
    std::string where;             // for messages
  };
  std::vector<Answer> answers;
  std::vector<int> ranking;    // of each
  std::vector<double> scores;  // of each, or empty
  std::optional<bool> label;   // of the one answer

  void add(const Record& record, const char* field, int rank) {
    element e;
    Answer answer{.where = concat(record.where, ": ", field)};
    if (record.find(field, e)) answer.value = e;
    answers.push_back(std::move(answer));
    ranking.push_back(rank);
  }
};

// Rank 1 is the highest score's; equal scores have equal ranks.
inline std::vector<int> ranks_of(const std::vector<double>& scores) {
  std::vector<int> ranking;
  for (const double score : scores)
    ranking.push_back(1 + int(std::count_if(scores.begin(), scores.end(),
                                            [&](double other) { return other > score; })));
  return ranking;
}

inline bool is_tie(element e) {
  std::string_view text;
  if (e.get(text)) return false;
  const std::string word = ascii_lower(strip(text));
  for (const char* tie : {"tie", "tie (bothbad)", "tie_bothbad", "bothbad", "both_bad", "both",
                          "equal", "same", "draw", "neither"})
    if (word == tie) return true;
  return false;
}

// Chosen and rejected, by whatever name.
inline bool find_pair(const Record& record, RawAnswers& found) {
  static constexpr std::pair<const char*, const char*> kNames[] = {
      {"chosen", "rejected"},
      {"chosen_response", "rejected_response"},
      {"response_j", "response_k"},
      {"preferred_output", "non_preferred_output"},
      {"messages", "rejected_response"}};
  for (const auto& [chosen, rejected] : kNames) {
    element e;
    if (!record.has(chosen)) continue;
    // null is an answer that a program failed to write
    if (!record.has(rejected) && record.object.at_key(rejected).get(e)) continue;
    found.add(record, chosen, 1), found.add(record, rejected, 2);
    for (const char* verdict : {"preference", "winner", "status"})
      if (record.find(verdict, e) && is_tie(e)) found.ranking[1] = 1;
    for (const auto& [a, b] :
         {std::pair("score_chosen", "score_rejected"), std::pair("chosen_score", "rejected_score"),
          std::pair("chosen_rating", "rejected_rating"),
          std::pair("chosen-rating", "rejected-rating"),
          std::pair("chosen_reward", "rejected_reward")}) {
      element of_a, of_b;
      if (!record.find(a, of_a) || !record.find(b, of_b)) continue;
      const auto x = number_of(of_a), y = number_of(of_b);
      if (x && y) found.scores = {*x, *y};
    }
    return true;
  }
  for (const auto& [chosen, rejected] : kNames) {
    if (record.has(rejected) || (record.has(chosen) && std::string_view(chosen) != "messages")) {
      fail(record.where, ": found the keys ", record.keys(), ", expected \"", chosen, "\" and \"",
           rejected, "\"");
    }
  }
  return false;
}

// Two answers with names, a and b or 1 and 2.
struct Sides {
  const char *first, *second;            // fields
  const char *first_name, *second_name;  // as a verdict has them
};

// -1: the first is better, 1: the second is, 0: neither.
inline int parse_verdict(const Record& record, const Sides& sides, const std::string& field,
                         element e) {
  const std::string where = concat(record.where, ": ", field);
  double x = 0;
  if (field == "preference_strength" || field == "overall_preference") {  // -3 to 3
    if (e.get(x)) fail(where, ": found ", type_name(e), ", expected a number");
    return x < 0 ? -1 : x > 0 ? 1 : 0;
  }
  if (is_tie(e)) return 0;
  std::string_view text;
  std::string found = simdjson::minify(e);
  if (!e.get(text)) {
    found = ascii_lower(strip(text));
  } else if (!e.get(x) && x == std::floor(x) && std::fabs(x) < 100) {
    if (field == "labels" && (x == 0 || x == 1)) return x == 1 ? -1 : 1;  // SHP: A is better
    found = std::to_string(int(x));
  }
  for (const int side : {-1, 1}) {
    const char* field_name = side < 0 ? sides.first : sides.second;
    const std::string name = ascii_lower(side < 0 ? sides.first_name : sides.second_name);
    if (found == ascii_lower(field_name) || found == name) return side;
    for (const char* prefix : {"model_", "model ", "response_", "answer_", "assistant_"})
      if (found == prefix + name) return side;
    element model;  // the winner by its model's name
    std::string_view model_name;
    if (record.find("model_" + name, model) && !model.get(model_name) && !text.empty() &&
        model_name == text) {
      return side;
    }
  }
  fail(where, ": found ", simdjson::minify(e), ", expected \"", sides.first_name, "\", \"",
       sides.second_name, "\" or \"tie\"");
}

// winner_model_a, winner_model_b and winner_tie, of which one is 1.
inline std::optional<int> find_winner_flags(const Record& record, const Sides& sides) {
  std::optional<int> verdict;
  const std::pair<std::string, int> flags[] = {{concat("winner_model_", sides.first_name), -1},
                                               {concat("winner_model_", sides.second_name), 1},
                                               {"winner_tie", 0}};
  for (const auto& flag : flags) {
    element e;
    if (!record.find(flag.first, e)) continue;
    const std::string json = simdjson::minify(e);
    if (json == "1" || json == "1.0" || json == "true") verdict = flag.second;
  }
  return verdict;
}

inline bool find_sides(const Record& record, RawAnswers& found) {
  static constexpr Sides kSides[] = {{"conversation_a", "conversation_b", "a", "b"},
                                     {"response_a", "response_b", "a", "b"},
                                     {"answer_a", "answer_b", "a", "b"},
                                     {"completion_a", "completion_b", "a", "b"},
                                     {"human_ref_A", "human_ref_B", "A", "B"},
                                     {"response_0", "response_1", "0", "1"},
                                     {"answer_0", "answer_1", "0", "1"},
                                     {"response_1", "response_2", "1", "2"},
                                     {"response1", "response2", "1", "2"},
                                     {"output_1", "output_2", "1", "2"}};
  const auto sides = std::find_if(std::begin(kSides), std::end(kSides), [&](const Sides& s) {
    return record.has(s.first) && record.has(s.second);
  });
  if (sides == std::end(kSides)) return false;
  std::optional<int> verdict;
  element e, other;
  if (const char* field =
          first_field(record,
                      {"winner", "preference", "preferred", "overall_preference",
                       "preference_strength", "better_response_id", "labels", "choice"},
                      e)) {
    verdict = parse_verdict(record, *sides, field, e);
  } else {
    verdict = find_winner_flags(record, *sides);
  }
  if (record.find(concat("score_", sides->first_name), e) &&
      record.find(concat("score_", sides->second_name), other)) {
    const auto x = number_of(e), y = number_of(other);
    if (x && y) found.scores = {*x, *y};
    if (x && y && !verdict) verdict = *x > *y ? -1 : *x < *y ? 1 : 0;
  }
  if (!verdict) return false;
  found.add(record, sides->first, *verdict > 0 ? 2 : 1);
  found.add(record, sides->second, *verdict < 0 ? 2 : 1);
  return true;
}

inline std::vector<int> parse_ranking(element e, size_t answers, const std::string& where) {
  std::vector<int> ranking;
  for (const element rank :
       element_as<simdjson::dom::array>(e, "a rank for each response", where)) {
    int64_t r = 0;
    if (rank.get(r) || r < 1 || r > 1 << 20) {
      fail(where, ": found ", std::string(simdjson::minify(rank)), ", expected ranks from 1 on");
    }
    ranking.push_back(int(r));
  }
  require(ranking.size() == answers, where, ": found ", ranking.size(), " ranks, expected ",
          answers, ", one for each response");
  return ranking;
}

// An item of a list that is an object with the answer, its score or its rank. A message is none.
inline bool find_item(simdjson::dom::object item, element& answer, std::optional<double>& score,
                      std::optional<double>& rank) {
  element e;
  if (!item.at_key("role").get(e) || !item.at_key("from").get(e)) return false;
  bool found = false;
  for (const char* key :
       {"response", "text", "answer", "completion", "content", "output", "generation", "messages"})
    found = found || (!item.at_key(key).get(e) && (answer = e, true));
  for (const char* key : {"overall_score", "score", "rating", "reward", "pm_score"})
    if (!score && !item.at_key(key).get(e)) score = number_of(e);
  for (const char* key : {"rank", "ranking"})
    if (!rank && !item.at_key(key).get(e)) rank = number_of(e);
  return found;
}

// Lists of answers: with ranks or scores beside them, or inside.
inline bool find_list(const Record& record, bool compared, RawAnswers& found) {
  element list;
  const char* field = first_field(record,
                                  {"responses", "completions", "generations", "answers",
                                   "candidates", "outputs", "candidates_completions", "summaries"},
                                  list);
  simdjson::dom::array items;
  if (!field || list.get(items)) return false;
  std::vector<std::optional<double>> scores, ranks;
  for (const element item : items) {
    RawAnswers::Answer answer{.where = concat(record.where, ": ", field, "[", scores.size(), "]")};
    scores.emplace_back(), ranks.emplace_back();
    element inner = item;
    if (item.is_object()) {
      find_item(item.get_object(), inner, scores.back(), ranks.back());
    }
    if (!inner.is_null()) answer.value = inner;
    found.answers.push_back(std::move(answer));
  }
  const size_t n = found.answers.size();
  element e;
  if (const char* key = first_field(record, {"ranking", "rankings", "ranks", "rank"}, e)) {
    const std::vector<int> ranking = parse_ranking(e, n, concat(record.where, ": ", key));
    ranks.assign(ranking.begin(), ranking.end());
  } else if (const char* name = first_field(
                 record, {"scores", "ratings", "rating", "score", "rewards", "overall_scores"},
                 e)) {
    const std::string where = concat(record.where, ": ", name);
    scores.clear();
    for (const element score :
         element_as<simdjson::dom::array>(e, "a score for each response", where))
      scores.push_back(number_of(score));
    require(scores.size() == n, where, ": found ", scores.size(), " scores, expected ", n,
            ", one for each response");
  } else if (record.find("choice", e)) {
    int64_t choice = 0;
    require(!e.get(choice) && choice >= 0 && size_t(choice) < n, record.where, ": choice: found ",
            std::string(simdjson::minify(e)), ", expected 0 to ", n - 1);
    for (size_t i = 0; i < n; i++) ranks[i] = int64_t(i) == choice ? 1 : 2;
  }
  const auto any = [](const auto& all) {
    return std::any_of(all.begin(), all.end(), [](const auto& x) { return x.has_value(); });
  };
  const bool ranked = any(ranks), scored = any(scores);
  if (!ranked && !scored && compared) return false;
  std::vector<RawAnswers::Answer> kept;
  std::vector<double> values;
  for (size_t i = 0; i < n; i++) {
    if (ranked ? !ranks[i] : scored && !scores[i]) continue;
    kept.push_back(std::move(found.answers[i]));
    values.push_back(ranked ? -*ranks[i] : scored ? *scores[i] : 0);
  }
  found.answers = std::move(kept), found.ranking = ranks_of(values);
  if (!ranked && scored) found.scores = std::move(values);
  return true;
}

inline bool parse_label(element e, const std::string& where) {
  std::string_view text;
  const std::string found =
      e.get(text) ? std::string(simdjson::minify(e)) : ascii_lower(strip(text));
  for (const char* good : {"true", "1", "1.0", "pos", "positive", "good", "yes", "desirable",
                           "chosen", "up", "thumbs_up"})
    if (found == good) return true;
  for (const char* bad : {"false", "0", "0.0", "-1", "-1.0", "neg", "negative", "bad", "no",
                          "undesirable", "rejected", "down", "thumbs_down"})
    if (found == bad) return false;
  fail(where, ": found ", std::string(simdjson::minify(e)), ", expected true or false");
}

// One answer, and whether it is good.
inline bool find_labelled(const Record& record, bool compared, RawAnswers& found) {
  element e;
  const char* label = first_field(record, {"label", "kto_tag"}, e);
  if (!label && compared) return false;
  element answer;
  const char* field =
      first_field(record, {"completion", "response", "output", "answer", "generation"}, answer);
  if (!field && !is_conversation(record)) return false;
  if (label) found.label = parse_label(e, concat(record.where, ": ", label));
  if (field) found.add(record, field, 1);
  return true;
}

// ---------------------------------------------------------------------------------------------
// Transcripts

inline constexpr std::string_view kHuman = "Human:", kAssistantTurn = "\n\nAssistant:";

// Whether the text is a transcript as Anthropic's HH has it.
inline bool is_transcript(std::string_view text) {
  return strip_ascii(text).starts_with(kHuman) && text.find(kAssistantTurn) != text.npos;
}

// Its turns. Turns of one side that follow each other are one message. A last turn that has only
// its name is left out: it is where the answer begins.
inline Messages transcript_messages(std::string_view text) {
  Messages messages;
  const std::string whole = concat("\n\n", strip_ascii(text));
  for (std::string_view rest = whole; !rest.empty();) {
    const bool is_human = rest.starts_with("\n\nHuman:");
    rest.remove_prefix(is_human ? kHuman.size() + 2 : kAssistantTurn.size());
    const size_t end = std::min({rest.find("\n\nHuman:"), rest.find(kAssistantTurn), rest.size()});
    const std::string content(strip_ascii(rest.substr(0, end)));
    rest.remove_prefix(end);
    const char* role = is_human ? "user" : "assistant";
    if (!messages.empty() && messages.back().role == role) {
      messages.back().content += concat("\n\n", content);
    } else {
      messages.push_back({.role = role, .content = content});
    }
  }
  if (messages.back().role == "assistant" && messages.back().content.empty()) messages.pop_back();
  return messages;
}

// ---------------------------------------------------------------------------------------------
// The prompt

struct Prompt {
  bool found = false;
  bool is_chat = false;
  bool is_string = false;  // the record has it as one
  std::string text;        // of a text
  Messages messages;       // of a chat
  std::vector<std::string> tools;
};

// Messages from a list, or from one message.
inline Messages messages_of(element e, const std::string& where, const Record& record) {
  if (!e.is_array() && !e.is_object()) fail(where, ": found ", type_name(e), ", expected messages");
  return messages_or_text(e, "", where, record);
}

// `strings`: the answers are strings, so that a prompt that is a string is a text.
inline Prompt find_prompt(const Record& record, bool strings, const PreferenceOptions& options) {
  Prompt prompt;
  element e;
  const char* field = first_field(record,
                                  {"prompt", "question", "instruction", "query", "context",
                                   "history", "input", "messages", "conversations", "conversation"},
                                  e);
  std::string system;
  element value;
  if (const char* name = first_field(record, {"system", "system_prompt"}, value)) {
    system = std::string(record.string(name));
  }
  prompt.found = field != nullptr;
  prompt.tools = parse_tools(record);
  if (!field) {
    if (!system.empty()) prompt.messages = {{.role = "system", .content = system}};
    return prompt;
  }
  const std::string where = concat(record.where, ": ", field), name = field;
  std::string_view text;
  if (!e.get(text)) {
    prompt.is_string = true, prompt.text = std::string(text);
    if (name == "instruction" && record.has("input")) {
      const std::string_view input = record.string("input");
      if (!strip_ascii(input).empty()) prompt.text += concat("\n", input);  // as ./sft
    }
    const bool transcript = options.transcripts_are_chats && is_transcript(text);
    prompt.is_chat = !strings || name != "prompt" || !system.empty() || transcript;
    if (transcript) {
      prompt.messages = transcript_messages(text);
    } else if (prompt.is_chat) {
      prompt.messages = {{.role = "user", .content = prompt.text}};
    }
  } else {
    prompt.is_chat = true;
    simdjson::dom::object inner;
    if (!e.get(inner) && !inner.at_key("messages").get(value)) {  // OpenAI's "input"
      prompt.messages = messages_of(value, where, record);
      prompt.tools = parse_tools({inner, where});
    } else {
      prompt.messages = messages_of(e, where, record);
    }
    require(!prompt.messages.empty(), where, ": found an empty list, expected messages");
    // UltraFeedback's "messages" are the chosen conversation: its last turn is an answer.
    while (name != "prompt" && prompt.messages.size() > 1 &&
           prompt.messages.back().role == "assistant")
      prompt.messages.pop_back();
  }
  if (!system.empty() && prompt.messages[0].role != "system") {
    prompt.messages.insert(prompt.messages.begin(), {.role = "system", .content = system});
  }
  return prompt;
}

// ---------------------------------------------------------------------------------------------
// Prompt and answers put together

// Whether the messages are a conversation, and not the answer to one.
inline bool begins_conversation(const Messages& messages) {
  return !messages.empty() && (messages[0].role == "user" || messages[0].role == "system");
}

// Prompt and answer. The answer may repeat the prompt, or its end.
inline Messages whole_conversation(const Prompt& prompt, const Messages& answer,
                                   const std::string& where) {
  Messages whole = prompt.messages;
  if (whole.empty() || !begins_conversation(answer)) {
    whole.insert(whole.end(), answer.begin(), answer.end());
    return whole;
  }
  const bool has_system = whole[0].role == "system" && answer[0].role != "system";
  const Messages asked(whole.begin() + (whole[0].role == "system"), whole.end());
  const bool repeated =
      std::search(answer.begin(), answer.end(), asked.begin(), asked.end()) != answer.end();
  // A prompt that is a string is often the last turn alone, or holds more than it.
  const auto is_said = [&](const Message& m) {
    return m.role == "user" && prompt.text.find(strip(m.content)) != std::string::npos;
  };
  if (repeated || (prompt.is_string && std::any_of(answer.begin(), answer.end(), is_said))) {
    whole = answer;
    if (has_system) whole.insert(whole.begin(), prompt.messages[0]);
    return whole;
  }
  for (size_t n = std::min(whole.size(), answer.size()); n > 0; n--) {
    if (!std::equal(whole.end() - long(n), whole.end(), answer.begin())) continue;
    whole.insert(whole.end(), answer.begin() + long(n), answer.end());
    return whole;
  }
  fail(where, ": found a conversation that does not begin with the prompt, expected an answer");
}

// The messages that all begin with become the prompt, the rest of each is an answer. `given`: how
// many messages are known to be the prompt.
inline void split_conversations(Preference& p, std::vector<Messages> wholes, size_t given) {
  const Messages& a = wholes[0];
  size_t n = a.size();
  for (const Messages& b : wholes) {
    const auto end = std::mismatch(a.begin(), a.begin() + long(n), b.begin(), b.end()).first;
    n = size_t(end - a.begin());
  }
  if (wholes.size() == 1 && given > 0) {
    n = given;
  } else if (wholes.size() == 1) {
    while (n > 0 && a[n - 1].role != "user") n--;
  } else {
    const auto is_all_of_one = [&] {
      return std::any_of(wholes.begin(), wholes.end(),
                         [&](const Messages& b) { return b.size() == n; });
    };
    while (n > given && (is_all_of_one() || a[n - 1].role == "assistant")) n--;
  }
  p.prompt.messages.assign(a.begin(), a.begin() + long(n));
  for (const Messages& b : wholes) p.answers.emplace_back(b.begin() + long(n), b.end());
}

inline bool is_blank(const Messages& answer) {
  return std::none_of(answer.begin(), answer.end(), [](const Message& m) {
    return m.role == "assistant" && (!strip(m.content).empty() || !m.tool_calls.empty());
  });
}

inline void make_chat(Preference& p, const Prompt& prompt, const RawAnswers& found,
                      bool transcripts, const Record& record) {
  const std::string& where = record.where;
  p.is_chat = true, p.prompt.tools = prompt.tools;
  std::vector<Messages> wholes;
  size_t given = prompt.messages.size();
  for (const RawAnswers::Answer& raw : found.answers) {
    std::string_view text;
    Messages answer;
    if (!raw.value->get(text)) {
      if (transcripts) {
        answer = transcript_messages(text);
      } else {
        answer = {{.role = "assistant", .content = std::string(text)}};
      }
    } else {
      answer = messages_of(*raw.value, raw.where, record);
    }
    // Nobody has answered the last of them.
    while (answer.size() > 1 && answer.back().role == "user") answer.pop_back();
    if (is_blank(answer)) p.left_out = "empty answer";
    if (begins_conversation(answer)) given = 0;
    wholes.push_back(whole_conversation(prompt, answer, raw.where));
  }
  split_conversations(p, std::move(wholes), given);
  if (p.left_out) return;
  if (p.prompt.messages.empty()) {
    fail(where, ": found no message that the answers begin with, expected a prompt");
  }
  for (size_t i = 0; i < p.answers.size(); i++) {
    Conversation whole = p.prompt;
    whole.messages.insert(whole.messages.end(), p.answers[i].begin(), p.answers[i].end());
    check_conversation(whole, concat(where, ": answer ", i + 1));
  }
}

// How many bytes all texts begin with, up to the last white space among them: a word is not cut.
// Of transcripts: through the last "\n\nAssistant:".
inline size_t shared_prompt(const std::vector<std::string>& texts) {
  const std::string& a = texts[0];
  size_t n = a.size();
  for (const std::string& b : texts) {
    const auto end = std::mismatch(a.begin(), a.begin() + long(n), b.begin(), b.end()).first;
    n = size_t(end - a.begin());
  }
  const std::string_view shared = std::string_view(a).substr(0, n);
  if (is_transcript(shared)) return shared.rfind(kAssistantTurn) + kAssistantTurn.size();
  const size_t word = shared.find_last_of(" \t\r\n");
  return word == shared.npos ? 0 : shared.find_last_not_of(" \t\r\n", word) + 1;
}

// A field that may be the prompt under another name: text of several words.
inline std::string likely_prompt(const Record& record, const RawAnswers& found) {
  for (const auto& [key, value] : record.object) {
    std::string_view text;
    if (value.get(text) || strip_ascii(text).find_first_of(" \n") == text.npos) continue;
    const bool is_answer = std::any_of(
        found.answers.begin(), found.answers.end(),
        [&, k = key](const RawAnswers::Answer& a) { return a.where.ends_with(concat(": ", k)); });
    if (!is_answer) return std::string(key);
  }
  return "";
}

inline void make_text(Preference& p, const Prompt& prompt, const RawAnswers& found,
                      const Record& record) {
  for (const RawAnswers::Answer& raw : found.answers) {
    p.continuations.emplace_back(element_as<std::string_view>(
        *raw.value, prompt.found ? "a string, as the prompt is" : "a string", raw.where));
  }
  std::vector<std::string>& all = p.continuations;
  size_t repeated = 0;
  if (prompt.found) {
    p.text = prompt.text;
    const bool is_repeated = std::all_of(all.begin(), all.end(), [&](const std::string& text) {
      return text.size() > p.text.size() && text.starts_with(p.text);
    });
    // One word may begin two answers by chance.
    const bool words = strip_ascii(p.text).find_first_of(" \n") != std::string_view::npos;
    if (is_repeated && words) repeated = p.text.size();
  } else if (all.size() > 1) {
    p.has_prompt = false;
    repeated = shared_prompt(all);
    const std::string likely = likely_prompt(record, found);
    if (repeated == 0 || (!likely.empty() && !is_transcript(all[0]))) {
      fail(record.where, ": found the keys ", record.keys(), ", expected a \"prompt\"",
           repeated == 0 ? ", or answers that begin alike" : "",
           " (--map prompt=", likely.empty() ? "KEY" : likely, " reads the key ",
           likely.empty() ? "KEY" : likely, " as the prompt)");
    }
    p.text = all[0].substr(0, repeated);
  } else {
    p.has_prompt = false;  // one answer to nothing
    fail_unknown_shape(record, "a \"prompt\" beside the answer");
  }
  for (std::string& text : all) text.erase(0, repeated);
  if (std::any_of(all.begin(), all.end(),
                  [](const std::string& text) { return strip_ascii(text).empty(); })) {
    p.left_out = "empty answer";
  }
}

// Takes out what is empty: answers of a list, or else the whole record.
inline void drop_empty(Preference& p, RawAnswers& found, bool is_list) {
  for (size_t i = found.answers.size(); i-- > 0;) {
    const std::optional<element>& value = found.answers[i].value;
    std::string_view text;
    simdjson::dom::array list;
    const bool is_empty = !value || written_number(*value) == "NaN" ||
                          (!value->get(text) && strip_ascii(text).empty()) ||
                          (!value->get(list) && list.size() == 0);
    if (!is_empty) continue;
    if (!is_list || found.answers.size() <= 2) {
      p.left_out = "empty answer";
      return;
    }
    found.answers.erase(found.answers.begin() + long(i));
    found.ranking.erase(found.ranking.begin() + long(i));
    if (!found.scores.empty()) found.scores.erase(found.scores.begin() + long(i));
  }
}

// Whether there are two different answers of which one is better.
inline const char* why_left_out(const Preference& p) {
  bool untied = false;
  for (size_t i = 0; i < p.ranking.size(); i++) {
    for (size_t j = 0; j < i; j++) {
      if (p.ranking[i] == p.ranking[j]) continue;
      untied = true;
      if (p.is_chat ? p.answers[i] != p.answers[j] : p.continuations[i] != p.continuations[j])
        return nullptr;
    }
  }
  return untied ? "equal answers" : "tie";
}

// A field with a number, if the record has it.
inline std::optional<double> find_number(const Record& record, const char* field) {
  element e;
  if (!record.find(field, e)) return std::nullopt;
  const auto x = number_of(e);
  if (!x) {
    fail(record.where, ": ", field, ": found ", std::string(simdjson::minify(e)),
         ", expected a number");
  }
  return x;
}
}  // namespace preferences

inline Preference parse_preference(const Record& record, const PreferenceOptions& options) {
  using namespace preferences;
  Preference p;
  RawAnswers found;
  bool is_list = false;
  if (!find_pair(record, found) && !find_sides(record, found) &&
      !(is_list = find_list(record, options.compared, found)) &&
      !find_labelled(record, options.compared, found)) {
    if (record.has("text") && (record.has("label") || !options.compared)) {
      p.text = std::string(record.string("text"));
      if (strip_ascii(p.text).empty()) p.left_out = "empty answer";
      element e;
      if (record.find("label", e)) p.label = parse_label(e, record.where + ": label");
      p.ranking = {1};
      return p;
    }
    fail_unknown_shape(record,
                       "\"chosen\" and \"rejected\", \"responses\" and \"ranking\" or \"scores\", "
                       "or \"completion\" and \"label\"");
  }
  p.label = found.label;
  p.margin = find_number(record, "margin");
  if (const auto chance = find_number(record, "chance")) {
    p.chance = *chance;
    if (!(p.chance >= 0 && p.chance <= 1)) {
      fail(record.where, ": chance: found ", p.chance, ", expected a number from 0 to 1");
    }
  }
  const auto is_string = [](const RawAnswers::Answer& a) {
    return a.value && a.value->is_string();
  };
  if (found.answers.empty() && !is_list) {  // a conversation: what follows the last question
    Conversation whole = parse_conversation(record);
    check_conversation(whole, record.where);
    p.is_chat = true, p.ranking = {1}, p.prompt.tools = std::move(whole.tools);
    split_conversations(p, {std::move(whole.messages)}, 0);
    return p;
  }
  if (options.compared && !p.label && found.answers.size() < 2) {
    fail(record.where, ": found ", found.answers.size(), " answers, expected at least 2");
  }
  drop_empty(p, found, is_list);
  p.ranking = found.ranking, p.scores = found.scores;
  if (p.left_out) return p;
  const auto all = [&](auto&& is) {
    return std::all_of(found.answers.begin(), found.answers.end(), is);
  };
  const bool strings = all(is_string);
  const bool transcripts =
      strings && options.transcripts_are_chats &&
      all([](const RawAnswers::Answer& a) { return is_transcript(a.value->get_string().value()); });
  const Prompt prompt = find_prompt(record, strings && !transcripts, options);
  if (prompt.is_chat || transcripts || !strings || !prompt.messages.empty()) {
    make_chat(p, prompt, found, transcripts, record);
  } else {
    make_text(p, prompt, found, record);
  }
  if (!p.left_out && !p.label && options.compared) p.left_out = why_left_out(p);
  return p;
}

}  // namespace cake
