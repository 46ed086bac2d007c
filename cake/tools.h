// The tools an assistant may call: a calculator and a search over documents.
//
//     ToolCall{"calculator", {"expression": "3*(2+0.1)"}} -> "6.3"
//     ToolCall{"search", {"query": "baker of Olm"}}       -> the passage that answers best
//
// Both run in this process. The calculator knows arithmetic only, the search only the documents
// that it was given. If a call goes wrong, the tool's answer is the error message, for the model to
// read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cake/calculator.h"
#include "cake/chat_template.h"
#include "cake/documents.h"
#include "cake/json.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// The search: BM25 (Robertson and Zaragoza 2009) over passages of documents, with k1 = 1.2, b = .75
// and idf = ln(1 + (n - df + .5) / (df + .5)).

class Search {
 public:
  using CountTokens = std::function<int(std::string_view)>;

  // `count_tokens` measures passages. By default, every word and every sign counts as a token.
  explicit Search(const std::vector<std::string>& documents, CountTokens count_tokens = {},
                  int max_tokens = 64) {
    if (!count_tokens) count_tokens = words_and_signs;
    for (const std::string& d : documents) cut(d, count_tokens, max_tokens);
    build_index();
  }
  // From a file of documents as cake/documents.h reads them.
  static Search load(const std::string& path, CountTokens count_tokens = {}, int max_tokens = 64) {
    return Search(read_documents(path), std::move(count_tokens), max_tokens);
  }
  static std::vector<std::string> read_documents(const std::string& path) {
    std::vector<std::string> documents;
    DocumentReader reader({Input(path)});
    for (DocumentPart part; reader.next(part);) {
      if (part.begins) documents.emplace_back();
      documents.back() += part.text;
    }
    std::fputs(reader.divider_note(false).c_str(), stderr);
    return documents;
  }

  // The passage with the highest score, the first one of equals; "" if no word of the query occurs.
  std::string best(std::string_view query) const {
    std::map<std::string, int> words;
    for (const std::string& w : words_in(query, "")) words[w]++;
    std::vector<double> scores(passages_.size());
    const double n = double(passages_.size());
    for (const auto& [word, times] : words) {
      const auto it = index_.find(word);
      if (it == index_.end()) continue;
      const double df = double(it->second.size());
      const double idf = std::log(1 + (n - df + .5) / (df + .5));
      for (const auto& [passage, tf] : it->second) {
        const double length = lengths_[size_t(passage)] / mean_length_;
        scores[size_t(passage)] += times * idf * tf * 2.2 / (tf + 1.2 * (.25 + .75 * length));
      }
    }
    const auto best = std::max_element(scores.begin(), scores.end());
    if (best == scores.end() || *best == 0) return "";
    return passages_[size_t(best - scores.begin())];
  }
  const std::vector<std::string>& passages() const { return passages_; }

 private:
  static int words_and_signs(std::string_view text) {
    int n = 0;
    bool in_word = false;
    for (const char c : text) {
      const bool word = is_alphanumeric(c);
      n += word ? !in_word : std::string_view(" \n\t\r").find(c) == std::string_view::npos;
      in_word = word;
    }
    return n;
  }

  // A sentence ends at . ! or ? before white space, and at a line's end.
  static size_t sentence_end(std::string_view text, size_t begin) {
    for (size_t i = begin; i < text.size(); i++) {
      if (text[i] == '\n') return i + 1;
      const bool stop = std::string_view(".!?").find(text[i]) != std::string_view::npos;
      if (stop && (i + 1 == text.size() || text[i + 1] == ' ')) return i + 1;
    }
    return text.size();
  }
  // A passage is as many whole sentences as fit. A longer sentence is cut between words.
  void cut(std::string_view text, const CountTokens& count_tokens, int max_tokens) {
    size_t begin = 0, end = 0;
    const auto fits = [&](size_t stop) {
      return count_tokens(strip_ascii(text.substr(begin, stop - begin))) <= max_tokens;
    };
    while (begin < text.size()) {
      while (end < text.size()) {
        const size_t next = sentence_end(text, end);
        if (!fits(next)) break;
        end = next;
      }
      if (end == begin) {
        while (end < text.size()) {
          const size_t next = std::min(text.find_first_of(" \n", end + 1), text.size());
          if (end > begin && !fits(next)) break;
          end = next;
          if (!fits(end)) break;
        }
      }
      const std::string_view passage = strip_ascii(text.substr(begin, end - begin));
      if (!passage.empty()) passages_.emplace_back(passage);
      begin = end;
    }
  }
  void build_index() {
    int64_t total = 0;
    for (size_t p = 0; p < passages_.size(); p++) {
      std::map<std::string, int> counts;
      const std::vector<std::string> words = words_in(passages_[p], "");
      for (const std::string& w : words) counts[w]++;
      for (const auto& [word, n] : counts) index_[word].push_back({int(p), n});
      lengths_.push_back(int(words.size()));
      total += int64_t(words.size());
    }
    mean_length_ = passages_.empty() ? 1 : std::max(1., double(total) / double(passages_.size()));
  }

  std::vector<std::string> passages_;
  std::vector<int> lengths_;  // words
  double mean_length_ = 1;
  std::unordered_map<std::string, std::vector<std::pair<int, int>>> index_;  // passage, frequency
};

// ---------------------------------------------------------------------------------------------
// Calls

// The tools as a conversation declares them.
inline constexpr const char* kCalculatorTool =
    R"({"name": "calculator", "description": "Works out arithmetic.", "parameters": )"
    R"({"type": "object", "properties": {"expression": {"type": "string"}}, )"
    R"("required": ["expression"]}})";
inline constexpr const char* kSearchTool =
    R"({"name": "search", "description": "Finds a passage about something.", "parameters": )"
    R"({"type": "object", "properties": {"query": {"type": "string"}}, )"
    R"("required": ["query"]}})";

// The tool's answer; "error: ..." if the call went wrong.
inline std::string run_tool(const ToolCall& call, const Search* search) {
  try {
    if (call.name.empty()) {
      fail(R"(a call: found something else, expected {"name": "...", "arguments": {...}})");
    }
    const Json arguments = parse_json(call.arguments, call.name + ": arguments");
    if (call.name == "calculator") {
      return calculate(json_get<std::string>(arguments, "expression", call.name));
    }
    if (call.name == "search") {
      if (!search) fail("search: there are no documents to search");
      return search->best(json_get<std::string>(arguments, "query", call.name));
    }
    fail("found a call of ", json_text(call.name), ", expected calculator or search");
  } catch (const Error& e) {
    return concat("error: ", e.what());
  }
}

// A message of a line of conversations, in the form in which parse_conversation reads it.
inline OrderedJson message_json(const Message& m) {
  OrderedJson json{{"role", m.role}, {"content", m.content}};
  if (!m.reasoning.empty()) json["reasoning_content"] = m.reasoning;
  if (!m.trained) json["weight"] = 0;
  for (const ToolCall& call : m.tool_calls) {
    // Without a name it is no call: the arguments are what the model wrote.
    const std::string text = call.name.empty() ? "" : call.arguments;
    const OrderedJson arguments = OrderedJson::parse(text, nullptr, false);
    json["tool_calls"].push_back(
        {{"type", "function"},
         {"function",
          {{"name", call.name},
           {"arguments", arguments.is_discarded() ? OrderedJson(call.arguments) : arguments}}}});
  }
  return json;
}

// The text between <tool_call> and </tool_call>. The arguments are written as templates write them,
// and as models have learned to, with spaces behind : and , so that a turn that is rendered again
// is the text that was sampled. What is no call becomes one without a name, whose arguments are the
// text.
inline ToolCall read_call(std::string text) {
  try {
    const auto json = parse_json<OrderedJson>(text, "a call");
    if (json.is_object() && json.contains("name") && json["name"].is_string() &&
        json.contains("arguments") && json["arguments"].is_object()) {
      return {json["name"], python_text(json["arguments"])};
    }
  } catch (const Error&) {  // no JSON
  }
  return {"", std::move(text)};
}

// Moves the calls that a text spells out, between <tool_call> and </tool_call>, to `calls`. A call
// that is not closed ends where the text ends.
inline std::string without_calls(std::string_view text, std::vector<ToolCall>& calls) {
  constexpr std::string_view kBegin = "<tool_call>", kEnd = "</tool_call>";
  std::string rest;
  while (!text.empty()) {
    const size_t begin = std::min(text.find(kBegin), text.size());
    rest += text.substr(0, begin);
    text.remove_prefix(begin);
    if (text.empty()) break;
    text.remove_prefix(kBegin.size());
    const size_t end = std::min(text.find(kEnd), text.size());
    calls.push_back(read_call(std::string(text.substr(0, end))));
    text.remove_prefix(std::min(end + kEnd.size(), text.size()));
  }
  return rest;
}

// An assistant's message from the ids of its turn, with or without the end of turn. Where the
// tokenizer has <tool_call> as a token, only the token begins a call, and no text that looks like
// it.
inline Message read_turn(const ChatTemplate& chat, std::span<const int> turn) {
  const Tokenizer& tokenizer = chat.tokenizer();
  const int begin = tokenizer.special("<tool_call>"), end = tokenizer.special("</tool_call>");
  const int end_of_turn = chat.find_end_of_turn(), separator = tokenizer.find_document_separator();
  const auto is_last = [&](int id) { return id == end_of_turn || id == separator; };
  Message message{.role = "assistant"};
  std::vector<int> text;
  for (size_t i = 0; i < turn.size() && !is_last(turn[i]); i++) {
    if (turn[i] != begin) {
      text.push_back(turn[i]);
      continue;
    }
    std::vector<int> inside;
    while (++i < turn.size() && turn[i] != end && !is_last(turn[i])) inside.push_back(turn[i]);
    message.tool_calls.push_back(read_call(tokenizer.decode(inside)));
    if (i < turn.size() && is_last(turn[i])) break;
  }
  message.content = tokenizer.decode(text);
  if (begin < 0) message.content = without_calls(message.content, message.tool_calls);
  if (end_of_turn < 0 && !chat.stop_string().empty()) {
    message.content.resize(
        std::min(message.content.find(chat.stop_string()), message.content.size()));
  }
  while (!message.content.empty() && message.content.back() == '\n') message.content.pop_back();
  return message;
}

// Runs the calls of the last message of `conversation`, the assistant's turn, and appends the
// tools' answers to it. Returns the ids that follow the turn's end of turn: the answers and the
// header of the assistant's next turn; nothing if the turn calls nothing.
inline std::vector<int> answer_calls(const ChatTemplate& chat, Conversation& conversation,
                                     const Search* search) {
  const std::vector<ToolCall> calls = conversation.messages.back().tool_calls;
  if (calls.empty()) return {};
  for (const ToolCall& call : calls) {
    conversation.messages.push_back({.role = "tool", .content = run_tool(call, search)});
  }
  return chat.ids_behind_turn(conversation);
}

}  // namespace cake
