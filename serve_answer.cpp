// Answers of the API: events of the engine's thread become JSON.
//
//     tokens and their text -> TokenText    -> Run: which bytes of which token each character is
//     Run                   -> AnswerReader -> Piece: content, reasoning, a call, a tool's result
//     Piece                 -> Choice       -> chunks of a stream, or one whole answer
//
// A stream and a whole answer go through the same code up to the last step, in which a text is
// either sent or appended. Therefore they hold the same content, reasoning, calls,
// log-probabilities and counts.
//
// What is text is decided as it is for later turns (split_answer, read_turn):
//
// - Reasoning is what stands between <think> and </think> at the beginning of a turn. White space
//   at its ends and behind it is dropped. Where it never ends, all of the answer is reasoning.
//   A prompt may end with <think>: then the answer begins with reasoning.
// - A call is what stands between <tool_call> and </tool_call>; the end of the turn ends it too.
//   They are tokens, or text where the tokenizer has no such tokens. Newlines at the end of an
//   answer with calls are dropped. What is no call is content, with its markers. Calls are looked
//   for only where the request or the server has tools.
// - Everything else is content, unchanged: white space at its ends too.
// - A tool that ran on this server stands in `cake_tools`, with the number of the turn that called
//   it, and the texts of all turns are joined.
//
// An answer that begins with ids of the request (`answer_ids`) is read from these on: what is
// returned is the whole answer. Its first ids have no log-probabilities.
//
// Log-probabilities: each sampled token that is part of the text has an entry. Its bytes are the
// token's own; those that are not part of the text (a stop string, white space that is dropped) are
// cut off. An id, a rank and a kind, with `token_details`, are those of the whole token, and
// /v1/completions has entries in the form of a chat then, beside OpenAI's lists. So the bytes of
// `logprobs.content`, decoded with U+FFFD for invalid ones, are the content, and those of an
// extension, `logprobs.reasoning_content`, are the reasoning. (Each turn, and a prompt that is
// echoed, is decoded by itself: half a character at its end is U+FFFD even where the bytes that
// follow would complete it.) An entry is sent when all of its bytes are known, and at the latest
// before the chunk with finish_reason.
#include <sys/random.h>

#include <charconv>
#include <cmath>
#include <ctime>
#include <numeric>

#include "cake/serve.h"
#include "cake/utf8.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// Text that remembers its tokens

struct Part {              // of a token
  int token;               // its number within the choice
  int id;                  // -1: none
  size_t text_bytes;       // that it adds to the text
  std::string_view bytes;  // the same, but for invalid ones: the text has U+FFFD for them
};

struct Run {
  std::string text;  // whole characters
  std::vector<Part> parts;

  bool empty() const { return parts.empty(); }
  void append(Run&& more) {
    if (empty()) return *this = std::move(more), void();
    text += more.text;
    parts.insert(parts.end(), more.parts.begin(), more.parts.end());
  }
  // Appends what follows, which begins with the rest of the last token.
  void join(Run&& more) {
    Part &last = parts.back(), &rest = more.parts.front();
    last.bytes = {last.bytes.data(), last.bytes.size() + rest.bytes.size()};
    last.text_bytes += rest.text_bytes;
    text += more.text;
    parts.insert(parts.end(), more.parts.begin() + 1, more.parts.end());
  }
  // Removes and returns the first `n` bytes of the text, which are whole characters.
  Run take(size_t n) {
    if (n >= text.size()) return std::exchange(*this, {});
    Run first;
    first.text = text.substr(0, n);
    text.erase(0, n);
    size_t whole = 0;
    // Parts without text belong to the character before them.
    for (; whole < parts.size() && parts[whole].text_bytes <= n; whole++) {
      n -= parts[whole].text_bytes;
    }
    first.parts.assign(parts.begin(), parts.begin() + long(whole));
    parts.erase(parts.begin(), parts.begin() + long(whole));
    if (n > 0) {  // a part is divided: of plain text, since U+FFFD is not
      Part& rest = parts.front();
      first.parts.push_back({rest.token, rest.id, n, rest.bytes.substr(0, n)});
      rest.bytes.remove_prefix(n);
      rest.text_bytes -= n;
    }
    return first;
  }
};

// Finds the tokens of a text. The generator holds bytes back, as the beginning of a character or of
// a stop string, and replaces invalid ones; then a text belongs to earlier tokens.
class TokenText {
 public:
  void push(int token, int id, std::string_view bytes) {
    if (!bytes.empty()) waiting_.push_back({token, id, 0, bytes});
  }
  // `text`: the next whole characters of the tokens' bytes.
  Run pop(std::string_view text) {
    Run run;
    run.text = text;
    if (waiting_.size() == 1 && waiting_.front().bytes == text) {  // nearly always
      run.parts.push_back(waiting_.front());
      run.parts[0].text_bytes = text.size();
      waiting_.clear();
      return run;
    }
    while (!text.empty()) {
      std::string next;  // up to four bytes: those of one character
      for (size_t i = 0; i < waiting_.size() && next.size() < 4; i++) {
        next += waiting_[i].bytes.substr(0, 4 - next.size());
      }
      size_t length = 1, bad = 0;
      if (next.empty() || (next[0] & 0x80) != 0) length = utf8_length(next, 0, bad);
      const std::string_view character =
          length > 0 ? std::string_view(next).substr(0, length) : kReplacement;
      if (next.empty() || !text.starts_with(character)) {
        fail("an answer: found text that is not its tokens': ", json_text(text));
      }
      text.remove_prefix(character.size());
      take(length > 0 ? length : bad, length > 0, run.parts);
    }
    return run;
  }
  // The bytes that are no text: of a token that ends a turn, and behind a stop string.
  std::vector<Part> pop_rest() {
    std::vector<Part> rest(waiting_.begin(), waiting_.end());
    waiting_.clear();
    return rest;
  }

 private:
  // Moves the first `n` bytes. Invalid ones are one U+FFFD, of the first token among them.
  void take(size_t n, bool valid, std::vector<Part>& parts) {
    for (size_t replacement = kReplacement.size(); n > 0; replacement = 0) {
      Part& front = waiting_.front();
      const size_t k = std::min(n, front.bytes.size());
      Part* last = parts.empty() ? nullptr : &parts.back();
      if (valid && last && last->token == front.token && last->text_bytes == last->bytes.size()) {
        last->bytes = {last->bytes.data(), last->bytes.size() + k};
        last->text_bytes += k;
      } else {
        parts.push_back({front.token, front.id, valid ? k : replacement, front.bytes.substr(0, k)});
      }
      front.bytes.remove_prefix(k);
      if (front.bytes.empty()) waiting_.pop_front();
      n -= k;
    }
  }

  std::deque<Part> waiting_;  // tokens, and how much of them is not in the text yet
};

// ---------------------------------------------------------------------------------------------
// Reading an answer

enum Channel { kContent, kReasoning, kChannels };

struct Piece {
  enum Kind { content, reasoning, nothing, tool_call, tool_result };
  Kind kind;
  Run run;             // of nothing: what is neither content nor reasoning
  ToolCall call = {};  // for the client, or the one that has the result
  std::string result = {};
  int turn = 0;  // of a result: the number of the turn that called the tool
};

constexpr std::string_view kCallBegin = "<tool_call>", kCallEnd = "</tool_call>";

// How many bytes at the end of the text may be the beginning of the marker.
size_t beginning_at_end(std::string_view text, std::string_view marker) {
  size_t n = std::min(marker.size() - 1, text.size());
  while (!text.ends_with(marker.substr(0, n))) n--;
  return n;
}
size_t leading_space(std::string_view text) {  // bytes
  const std::string_view rest = strip(text);
  return rest.empty() ? text.size() : size_t(rest.data() - text.data());
}
size_t without_trailing_space(std::string_view text) {  // bytes
  const char last = text.empty() ? ' ' : text.back();
  if (last > ' ' && last < 0x7f) return text.size();
  const std::string_view rest = strip(text);
  return rest.empty() ? 0 : size_t(rest.data() - text.data()) + rest.size();
}

class AnswerReader {
 public:
  AnswerReader(const ApiCall& call, const ServedModel& model) : call_(call), model_(model) {
    const Tokenizer& tokenizer = model.text.tokenizer;
    think_ = tokenizer.special("<think>");
    end_think_ = tokenizer.special("</think>");
    if (think_ < 0 || end_think_ < 0) {
      text_markers_ = true;
      think_ = end_think_ = -1;
    }
    reads_calls_ = call.has_tools || !call.server_tools.empty();
    const int begin = tokenizer.special(kCallBegin), end = tokenizer.special(kCallEnd);
    has_text_calls_ = reads_calls_ && (begin < 0 || end < 0);
    if (reads_calls_ && !has_text_calls_) call_begin_ = begin, call_end_ = end;
    if (call.in_reasoning) mode_ = Mode::reasoning;
  }

  // The next text of the turn, from one token or several.
  void read(Run run) {
    if (!partial_.empty()) {
      partial_.join(std::move(run));
      run = std::exchange(partial_, {});
    }
    while (!run.empty()) {
      size_t n = 0, bytes = 0;
      while (n < run.parts.size() && !is_marker(run.parts[n].id))
        bytes += run.parts[n++].text_bytes;
      if (n == run.parts.size()) return read_text(std::move(run));
      if (bytes > 0) read_text(run.take(bytes));
      const Part marker = run.parts[0];
      if (marker.bytes.size() < model_.text.tokenizer.token_bytes(marker.id).size()) {
        partial_ = std::move(run);  // the generator holds the rest back
        return;
      }
      read_marker(marker.id, run.take(marker.text_bytes));
    }
  }

  // The id `</tool_call>` ended the turn: Request::stop_ids has it without parallel calls.
  bool ends_call(int id) const { return mode_ == Mode::call && id >= 0 && id == call_end_; }
  void end_turn_behind_call() {
    if (Run cut = std::exchange(partial_, {}); !cut.empty()) read_text(std::move(cut));
    end_call(false);  // the id that ended the turn is no text
    end_turn(true);
  }
  // `stopped`: by a token that ends a turn, so that tools of the server have run.
  void end_turn(bool stopped) {
    if (Run cut = std::exchange(partial_, {}); !cut.empty()) read_text(std::move(cut));
    read_held_marker();
    if (mode_ == Mode::call) end_call(false);
    if (Run held = std::exchange(held_, {}); !held.empty()) {
      mode_ == Mode::start ? add_content(std::move(held)) : add_reasoning(std::move(held));
    }
    auto turn = std::exchange(undecided_, {});
    Message message{.role = "assistant"};
    for (const auto& [run, call] : turn) {
      if (call) message.tool_calls.push_back(*call);
    }
    std::vector<ToolResult> results;
    if (stopped && runs_on_server(call_, message)) results = run_calls(model_, message);
    size_t next = 0;
    for (auto& [run, call] : turn) {
      if (call && !results.empty()) {
        ToolResult& r = results.at(next++);
        pieces_.push_back(
            {Piece::tool_result, std::move(run), std::move(r.call), std::move(r.result), turn_});
        has_calls_ = true;
      } else if (call && call_.has_tools) {
        pass_on(std::move(run), std::move(*call));
      } else {
        add_content(std::move(run));
      }
    }
    mode_ = call_.turns_begin_in_reasoning ? Mode::reasoning : Mode::start;
    reasoning_began_ = false;
    turn_++;
  }

  // Behind the last turn.
  void end() {
    add(has_calls_ ? Piece::nothing : Piece::content, std::exchange(waiting_[kContent], {}));
    add(Piece::nothing, std::exchange(waiting_[kReasoning], {}));
  }

  std::vector<Piece> pop_pieces() { return std::exchange(pieces_, {}); }
  int64_t reasoning_tokens() const { return reasoning_tokens_; }  // with their markers

 private:
  enum class Mode {
    start,      // of a turn: white space, or the beginning of a marker in text
    reasoning,  // behind <think>
    answer,     // behind </think>: white space
    content,
    call,  // behind <tool_call>
  };

  void add(Piece::Kind kind, Run run) {
    if (!run.empty()) pieces_.push_back({kind, std::move(run)});
  }
  bool is_marker(int id) const {
    return id >= 0 && (id == think_ || id == end_think_ || id == call_begin_ || id == call_end_);
  }

  void read_marker(int id, Run marker) {
    read_held_marker();
    if (mode_ == Mode::call) {
      called_.append(std::move(marker));
      if (id == call_end_) end_call(true);
    } else if (id == call_begin_) {
      begin_call(std::move(marker));
    } else if (id == think_ && mode_ == Mode::start) {
      begin_reasoning(std::move(marker));
    } else if (id == end_think_ && mode_ == Mode::reasoning) {
      count_reasoning(marker);
      end_reasoning(std::move(marker));
    } else {
      read_text(std::move(marker));
    }
  }

  void read_text(Run run) {
    if (!has_text_calls_) return read_in_mode(std::move(run));
    while (!run.empty()) {
      if (mode_ == Mode::call) {
        const size_t before = called_.text.size();
        called_.append(std::move(run));
        const size_t end = called_.text.find(kCallEnd, before - std::min(before, kCallEnd.size()));
        if (end == std::string::npos) return;
        run = std::exchange(called_, {});
        called_ = run.take(end + kCallEnd.size());
        end_call(true);
      } else {
        held_marker_.append(std::exchange(run, {}));
        const std::string_view text = held_marker_.text;
        size_t begin = text.find(kCallBegin);
        const bool is_call = begin != std::string_view::npos;
        if (!is_call) begin = text.size() - beginning_at_end(text, kCallBegin);
        if (begin > 0) read_in_mode(held_marker_.take(begin));
        if (!is_call) return;
        run = std::exchange(held_marker_, {});
        begin_call(run.take(kCallBegin.size()));
      }
    }
  }
  void read_held_marker() {  // it is none
    if (Run held = std::exchange(held_marker_, {}); !held.empty()) read_in_mode(std::move(held));
  }
  void read_in_mode(Run run) {
    switch (mode_) {
      case Mode::start:
        return read_start(std::move(run));
      case Mode::reasoning:
        return read_reasoning(std::move(run));
      case Mode::answer:
        add(Piece::nothing, run.take(leading_space(run.text)));
        if (run.empty()) return;
        mode_ = Mode::content;
        return add_content(std::move(run));
      case Mode::content:
        return add_content(std::move(run));
      case Mode::call:
        return called_.append(std::move(run));
    }
  }

  void read_start(Run run) {
    constexpr std::string_view kThink = "<think>";
    const bool is_space = leading_space(run.text) == run.text.size();
    held_.append(std::move(run));
    if (is_space) return;
    const size_t space = leading_space(held_.text);
    const std::string_view text = std::string_view(held_.text).substr(space);
    if (!text_markers_ || !text.starts_with(kThink.substr(0, text.size()))) return begin_content();
    if (text.size() < kThink.size()) return;
    Run marker = held_.take(space + kThink.size()), rest = std::exchange(held_, {});
    begin_reasoning(std::move(marker));
    if (!rest.empty()) read_reasoning(std::move(rest));
  }
  void begin_content() {
    mode_ = Mode::content;
    if (Run text = std::exchange(held_, {}); !text.empty()) add_content(std::move(text));
  }

  void begin_reasoning(Run marker) {
    count_reasoning(marker);
    add(Piece::nothing, std::exchange(held_, {}));
    add(Piece::nothing, std::move(marker));
    mode_ = Mode::reasoning;
  }
  void read_reasoning(Run run) {
    count_reasoning(run);
    if (!text_markers_) return add_reasoning(std::move(run));
    constexpr std::string_view kEnd = "</think>";
    held_.append(std::move(run));
    const std::string_view text = held_.text;
    if (const size_t end = text.find(kEnd); end != std::string_view::npos) {
      add_reasoning(held_.take(end));
      end_reasoning(held_.take(kEnd.size()));
      if (Run rest = std::exchange(held_, {}); !rest.empty()) read_in_mode(std::move(rest));
      return;
    }
    add_reasoning(held_.take(text.size() - beginning_at_end(text, kEnd)));
  }
  // White space waits for the reasoning of a later turn, where there can be one.
  void end_reasoning(Run marker) {
    add(Piece::nothing, std::move(marker));
    if (call_.server_tools.empty()) add(Piece::nothing, std::exchange(waiting_[kReasoning], {}));
    mode_ = Mode::answer;
  }
  void count_reasoning(const Run& run) {
    for (const Part& p : run.parts)
      reasoning_tokens_ += std::exchange(last_counted_, p.token) != p.token;
  }

  void add_reasoning(Run run) {
    if (!reasoning_began_) add(Piece::nothing, run.take(leading_space(run.text)));
    reasoning_began_ |= !run.empty();
    const size_t n = without_trailing_space(run.text);
    add_waiting(kReasoning, Piece::reasoning, std::move(run), n);
  }
  void add_content(Run run) {
    if (!undecided_.empty()) {
      undecided_.emplace_back(std::move(run), std::nullopt);
    } else if (!reads_calls_) {
      add(Piece::content, std::move(run));
    } else {
      const size_t n = run.text.find_last_not_of('\n') + 1;
      add_waiting(kContent, Piece::content, std::move(run), n);
    }
  }
  // The first `n` bytes of the run are added, behind what waits. The others wait.
  void add_waiting(Channel channel, Piece::Kind kind, Run run, size_t n) {
    if (n > 0) {
      add(kind, std::exchange(waiting_[channel], {}));
      add(kind, run.take(n));
    }
    waiting_[channel].append(std::move(run));
  }

  void begin_call(Run marker) {
    if (Run held = std::exchange(held_, {}); !held.empty()) {
      mode_ == Mode::start ? add_content(std::move(held)) : add_reasoning(std::move(held));
    }
    if (mode_ == Mode::start) mode_ = Mode::content;
    mode_behind_call_ = std::exchange(mode_, Mode::call);
    called_ = std::move(marker);
  }
  // `closed`: </tool_call> is at its end.
  void end_call(bool closed) {
    std::string inside;
    for (const Part& p : called_.parts) inside += p.bytes;
    inside.erase(inside.size() - (closed ? kCallEnd.size() : 0));
    inside.erase(0, kCallBegin.size());
    mode_ = mode_behind_call_;
    ToolCall call = read_call(std::move(inside));
    if (!call_.server_tools.empty()) {  // the end of the turn tells who runs it
      undecided_.emplace_back(std::exchange(called_, {}), std::move(call));
    } else {
      pass_on(std::exchange(called_, {}), std::move(call));
    }
  }
  void pass_on(Run run, ToolCall call) {  // to the client
    if (call.name.empty()) return add_content(std::move(run));
    pieces_.push_back({Piece::tool_call, std::move(run), std::move(call)});
    has_calls_ = true;
  }

  const ApiCall& call_;
  const ServedModel& model_;
  int think_ = -1, end_think_ = -1, call_begin_ = -1, call_end_ = -1;  // -1: not looked for
  bool text_markers_ = false;  // the tokenizer has no <think>: it is found in the text
  bool reads_calls_ = false, has_text_calls_ = false;  // so it is with <tool_call>
  Mode mode_ = Mode::start, mode_behind_call_ = Mode::content;
  bool reasoning_began_ = false;  // in this turn
  bool has_calls_ = false;        // of the client or the server
  int turn_ = 0;
  Run partial_;             // the beginning of a marker's token
  Run held_marker_;         // the beginning of <tool_call> in text
  Run held_;                // of start, and of a marker in text
  Run waiting_[kChannels];  // white space that is text only if text follows
  Run called_;              // the call so far, with its markers
  // Behind the first call of a turn in which tools of the server may run.
  std::vector<std::pair<Run, std::optional<ToolCall>>> undecided_;
  int64_t reasoning_tokens_ = 0;
  int last_counted_ = -1;
  std::vector<Piece> pieces_;
};

// ---------------------------------------------------------------------------------------------
// Parts of JSON

void append_number(std::string& out, float x) {  // never NaN or infinite; 0.0, not -0.0
  constexpr float kLeast = -9999;
  if (!(x >= kLeast)) x = kLeast;
  if (x == 0) x = 0;
  char text[32];
  const char* end = std::to_chars(text, text + sizeof text, std::min(x, -kLeast)).ptr;
  const std::string_view number(text, size_t(end - text));
  out += number;
  if (number.find_first_of(".e") == std::string_view::npos) out += ".0";
}

void append_item(std::string& list, std::string_view item) {
  if (!list.empty()) list += ',';
  list += item;
}

// The bytes, if they are UTF-8. Otherwise OpenAI's form, which differs between any two tokens:
// bytes:\xe2\x80.
std::string token_name(std::string_view bytes) {
  bool valid = true;
  for (size_t i = 0, bad = 0; valid && i < bytes.size();) {
    const size_t length = (bytes[i] & 0x80) == 0 ? 1 : utf8_length(bytes, i, bad);
    valid = length > 0;
    i += length;
  }
  if (valid) return std::string(bytes);
  std::string name = "bytes:";
  for (const char c : bytes) {
    const bool plain = c >= 0x20 && c < 0x7f && c != '\\';
    name += plain ? std::string(1, c) : format("\\x%02x", static_cast<unsigned char>(c));
  }
  return name;
}

std::string random_name(std::string name, int characters) {  // of the 62 letters and digits
  constexpr std::string_view kLetters =
      "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  while (characters > 0) {
    unsigned char bytes[64];
    require(getrandom(bytes, sizeof bytes, 0) == sizeof bytes, "getrandom: ", errno_text());
    for (const unsigned char b : bytes) {
      if (b < 4 * kLetters.size() && characters-- > 0) name += kLetters[b % kLetters.size()];
    }
  }
  return name;
}

std::string json_string(std::string_view text) {
  std::string out;
  append_json_string(out, text);
  return out;
}

const char* finish_reason(Finish f, bool calls) {
  if (f != Finish::stop_token && f != Finish::stop_string) return "length";
  return calls ? "tool_calls" : "stop";
}

int64_t count_characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// One choice

namespace {

constexpr const char* kKeys[kChannels] = {"content", "reasoning_content"};

struct ScoredToken {
  int id = -1;
  std::optional<TokenScore> score;  // none: the first token of a prompt
  size_t undecided = 0;             // bytes of which it is not known whether they are text
  std::string bytes[kChannels];     // those that are text
  int64_t offset = 0;               // of its first character in the choice's text
};

struct Choice {
  Choice(int number, const ApiCall& call, const ServedModel& model)
      : index(number), reader(call, model) {}
  int index;
  bool begun = false, echoed = false, done = false;
  int tokens = 0;
  TokenText token_text;
  AnswerReader reader;
  int calls = 0;             // that the client gets
  bool has_results = false;  // tools ran on the server
  Channel channel = kContent;
  std::string delta;               // text that is not sent yet
  std::string entries[kChannels];  // logprobs of a chat, without brackets
  std::string token_names, token_logprobs, top_logprobs, offsets;  // logprobs of a completion
  std::string ids;                 // of the answer's tokens that no chunk had
  std::vector<int> turn;           // ids of the turn so far
  std::deque<ScoredToken> scored;  // tokens without an entry yet
  int first_scored = 0;            // number of the first
  int64_t characters = 0;
  // Of a whole answer
  std::string texts[kChannels], tool_calls, results;
  // Counts
  Finish finish = Finish::length;
  int64_t prompt_tokens = 0, cached_tokens = 0, sampled_tokens = 0;
  int64_t begun_reasoning = 0;  // tokens of reasoning in answer_ids
};

}  // namespace

struct AnswerWriter::State {
  State(const ApiCall& call, const ServedModel& model, std::vector<std::vector<int>> ids)
      : call_(call), model_(model), tokenizer_(model.text.tokenizer), prompts_(std::move(ids)) {
    const size_t prompts = call.chat ? 1 : call.prompts.size();
    for (size_t i = 0; i < prompts * size_t(call.n); i++)
      choices_.emplace_back(int(i), call, model);
    head_ = "{\"id\":" + json_string(random_name(call.chat ? "chatcmpl-" : "cmpl-", 29));
    head_ += ",\"object\":\"";
    head_ += !call.chat    ? "text_completion"
             : call.stream ? "chat.completion.chunk"
                           : "chat.completion";
    head_ += "\",\"created\":" + std::to_string(std::time(nullptr));
    head_ += ",\"model\":" + json_string(model.id);
    head_ += ",\"system_fingerprint\":" + json_string(model.fingerprint);
    head_ += ",\"seed\":" + std::to_string(int64_t(call.sampling.seed)) + ",\"choices\":[";
    tail_ = call.include_usage ? "],\"usage\":null}\n\n" : "]}\n\n";
  }

  // ------------------------------------------------------------------------ events

  void add(const Event& e) {
    if (failed_) return;
    if (e.kind == Event::failed) {
      failed_.emplace(e.status, "server_error", e.code, "", e.text);
      if (call_.stream) out_ += "data: " + error_body(*failed_) + "\n";
      return;
    }
    Choice& c = choices_.at(size_t(e.choice));
    if (c.done) return;
    if (!c.begun) begin_answer(c);
    const bool waits_for_scores = e.kind == Event::admitted && call_.top_logprobs >= 0;
    if (call_.echo && !c.echoed && !waits_for_scores) echo(c, e.scores);
    if (e.kind == Event::token && (call_.chat || call_.max_tokens != 0)) add_token(c, e);
    if (e.kind == Event::finished) finish(c, e);
  }

  void add_token(Choice& c, const Event& e) {
    require(call_.top_logprobs < 0 || e.score, "an answer: found a token without its score");
    add_token(c, e, e.score);
  }

  void add_token(Choice& c, const Event& e, const std::optional<TokenScore>& score) {
    push_token(c, e.id, score);
    if (call_.return_ids) add_id(c, e.id);
    if (!e.text.empty()) {
      Run run = c.token_text.pop(e.text);
      call_.chat ? c.reader.read(std::move(run)) : release(c, kContent, std::move(run));
    }
    if (e.turn_ends) {
      const std::vector<int> stops = end_ids(call_, model_);
      const bool behind_call = !call_.parallel_calls && c.reader.ends_call(e.id);
      const bool stopped =
          behind_call || std::find(stops.begin(), stops.end(), e.id) != stops.end();
      behind_call ? c.reader.end_turn_behind_call() : c.reader.end_turn(stopped);
      if (call_.return_ids && stopped) {
        for (const int id : ids_behind_turn(call_, model_, c.turn)) add_id(c, id);
      }
      c.turn.clear();
    }
    write_pieces(c);
    if (e.turn_ends) drop_rest(c);
  }
  void add_id(Choice& c, int id) {
    c.turn.push_back(id);
    append_item(c.ids, std::to_string(id));
  }

  // The ids that the answer begins with are read as the engine's would be.
  void begin_answer(Choice& c) {
    c.begun = true;
    for (const BegunTurn& turn : begun_turns(call_, model_)) {
      Utf8Stream characters;
      for (size_t i = turn.begin; i < turn.end; i++) {
        Event e{.id = call_.answer_ids[i], .turn_ends = turn.ended && i + 1 == turn.end};
        if (!e.turn_ends) characters.feed(tokenizer_.token_bytes(e.id), e.text);
        if (e.turn_ends) characters.finish(e.text);  // otherwise the next token may complete it
        add_token(c, e, {});
      }
    }
    c.begun_reasoning = c.reader.reasoning_tokens();
  }

  void push_token(Choice& c, int id, const std::optional<TokenScore>& score) {
    const std::string_view bytes = tokenizer_.token_bytes(id);
    c.token_text.push(c.tokens, id, bytes);
    if (call_.top_logprobs >= 0) {
      c.scored.push_back({.id = id, .score = score, .undecided = bytes.size()});
    }
    c.tokens++;
  }

  // The prompt, and the scores of its tokens after the first. What the server put in front of a
  // text is no part of it.
  void echo(Choice& c, const std::vector<TokenScore>& scores) {
    c.echoed = true;
    const size_t prompt = size_t(c.index / call_.n);
    const std::vector<int>& ids = prompts_[prompt];
    const bool is_text = std::holds_alternative<std::string>(call_.prompts.at(prompt));
    const bool begins = is_text && !ids.empty() && ids[0] == model_.text.document_start;
    require(call_.top_logprobs < 0 || scores.size() + 1 == ids.size(), "an answer: found ",
            scores.size(), " scores of a prompt, expected ", ids.size() - 1);
    std::string bytes, text;
    for (size_t i = begins; i < ids.size(); i++) {
      bytes += tokenizer_.token_bytes(ids[i]);
      std::optional<TokenScore> score;
      if (i > 0 && !scores.empty()) score = scores[i - 1];
      push_token(c, ids[i], score);
    }
    Utf8Stream characters;
    characters.feed(bytes, text);
    characters.finish(text);
    if (!text.empty()) release(c, kContent, c.token_text.pop(text));
  }

  void finish(Choice& c, const Event& e) {
    c.reader.end_turn(false);
    c.reader.end();
    write_pieces(c);
    drop_rest(c);
    send(c);
    c.done = true;
    c.finish = !call_.chat && call_.max_tokens == 0 ? Finish::length : e.finish;
    c.prompt_tokens = e.prompt_tokens;
    c.cached_tokens = e.cached_tokens;
    c.sampled_tokens = !call_.chat && call_.max_tokens == 0 ? 0 : e.sampled_tokens;
    if (!call_.stream) return;
    begin_chunk(c);
    out_ += call_.chat ? "\"delta\":{}" : "\"text\":\"\"";
    out_ += concat(",\"logprobs\":null,\"finish_reason\":\"", finish_reason(c.finish, c.calls > 0),
                   '"');
    append_ids(out_, c);
    out_ += '}' + tail_;
  }

  // ------------------------------------------------------------------------ writing

  // The run is text.
  void release(Choice& c, Channel channel, Run run) {
    if (channel != c.channel) send(c);
    c.channel = channel;
    c.delta += run.text;
    if (call_.top_logprobs < 0) return;
    const std::string_view text = run.text;
    size_t begin = 0;
    for (const Part& p : run.parts) {
      c.characters += count_characters(text.substr(begin, p.text_bytes));
      const bool amid = p.text_bytes == 0 || (text[begin] & 0xc0) == 0x80;
      ScoredToken& token = scored(c, p);
      if (token.bytes[channel].empty()) {
        token.offset = c.characters - count_characters(text.substr(begin, p.text_bytes)) - amid;
      }
      begin += p.text_bytes;
      decide(c, p, channel);
    }
    write_entries(c);
  }
  void drop(Choice& c, const std::vector<Part>& parts) {  // they are no text
    for (const Part& p : parts) decide(c, p, kChannels);
    write_entries(c);
  }
  void drop_rest(Choice& c) { drop(c, c.token_text.pop_rest()); }
  void write_pieces(Choice& c) {
    for (Piece& piece : c.reader.pop_pieces()) {
      if (piece.kind == Piece::content || piece.kind == Piece::reasoning) {
        release(c, piece.kind == Piece::content ? kContent : kReasoning, std::move(piece.run));
        continue;
      }
      drop(c, piece.run.parts);
      if (piece.kind == Piece::tool_call) send_call(c, piece.call);
      if (piece.kind == Piece::tool_result) send_result(c, piece);
    }
  }
  ScoredToken& scored(Choice& c, const Part& p) {
    return c.scored[size_t(p.token - c.first_scored)];
  }
  void decide(Choice& c, const Part& p, Channel channel) {
    if (call_.top_logprobs < 0) return;
    ScoredToken& token = scored(c, p);
    token.undecided -= p.bytes.size();
    if (channel != kChannels) token.bytes[channel] += p.bytes;
  }
  void write_entries(Choice& c) {
    for (; !c.scored.empty() && c.scored.front().undecided == 0; c.first_scored++) {
      const ScoredToken& token = c.scored.front();
      for (const Channel channel : {kContent, kReasoning}) {
        if (token.bytes[channel].empty() || (call_.chat && !token.score)) continue;
        if (!call_.chat) write_completion_entry(c, token);
        if (call_.chat || call_.token_details) {
          write_chat_entry(c.entries[channel], token, token.bytes[channel]);
        }
      }
      c.scored.pop_front();
    }
  }

  // An open object. `logp` null: the first token of a text, which follows nothing.
  void append_chat_token(std::string& out, int id, std::string_view bytes,
                         const float* logp) const {
    out += "{\"token\":";
    append_json_string(out, token_name(bytes));
    out += ",\"logprob\":";
    if (logp) append_number(out, *logp);
    if (!logp) out += "null";
    out += ",\"bytes\":[";
    for (size_t i = 0; i < bytes.size(); i++) {
      if (i > 0) out += ',';
      out += std::to_string(int(static_cast<unsigned char>(bytes[i])));
    }
    out += ']';
    if (!call_.token_details) return;
    out += concat(",\"id\":", id, ",\"special\":", tokenizer_.is_special(id) ? "true" : "false");
  }
  void write_chat_entry(std::string& out, const ScoredToken& token, std::string_view bytes) const {
    if (!out.empty()) out += ',';
    append_chat_token(out, token.id, bytes, token.score ? &token.score->logp : nullptr);
    if (call_.token_details) {
      out += ",\"rank\":" + (token.score ? std::to_string(token.score->rank) : "null");
    }
    out += ",\"top_logprobs\":[";
    const auto n = token.score ? std::min(token.score->top.size(), size_t(call_.top_logprobs)) : 0;
    for (size_t i = 0; i < n; i++) {
      const TopToken& top = token.score->top[i];
      if (i > 0) out += ',';
      append_chat_token(out, top.id, tokenizer_.token_bytes(top.id), &top.logp);
      out += '}';
    }
    out += "]}";
  }

  // The sampled token is always among the top ones, under the name and with the number that it has
  // in `tokens` and `token_logprobs`. Names differ: of tokens with equal bytes, all but the
  // likeliest are called token_id:N.
  void write_completion_entry(Choice& c, const ScoredToken& token) {
    const std::string name = token_name(token.bytes[kContent]);
    append_item(c.token_names, json_string(name));
    append_item(c.offsets, std::to_string(token.offset));
    if (!token.score) {
      append_item(c.token_logprobs, "null");
      append_item(c.top_logprobs, "null");
      return;
    }
    std::string sampled_logp;
    append_number(sampled_logp, token.score->logp);
    append_item(c.token_logprobs, sampled_logp);
    std::vector<std::string> names = {name};
    std::string top;
    bool has_sampled = false;
    const auto add = [&](const std::string& key, std::string_view number) {
      append_item(top, json_string(key));
      top += ':';
      top += number;
    };
    const auto n = std::min(token.score->top.size(), size_t(call_.top_logprobs));
    for (size_t i = 0; i < n; i++) {
      const auto [id, logp] = token.score->top[i];
      if (id == token.id) {
        add(name, sampled_logp);
        has_sampled = true;
        continue;
      }
      std::string key = token_name(tokenizer_.token_bytes(id)), number;
      if (std::find(names.begin(), names.end(), key) != names.end()) key = concat("token_id:", id);
      names.push_back(key);
      append_number(number, logp);
      add(key, number);
    }
    if (!has_sampled) add(name, sampled_logp);
    append_item(c.top_logprobs, "{" + top + "}");
  }

  // What follows "logprobs": of a chunk or a choice.
  void append_logprobs(std::string& out, const Choice& c) const {
    if (call_.top_logprobs < 0) {
      out += "null";
    } else if (!call_.chat) {
      out += concat("{\"tokens\":[", c.token_names, "],\"token_logprobs\":[", c.token_logprobs,
                    "],\"top_logprobs\":[", c.top_logprobs, "],\"text_offset\":[", c.offsets, "]");
      if (call_.token_details) out += ",\"content\":[" + c.entries[kContent] + "]";
      out += '}';
    } else {
      out += concat("{\"content\":[", c.entries[kContent], "],\"refusal\":null");
      if (!c.entries[kReasoning].empty()) {
        out += concat(",\"reasoning_content\":[", c.entries[kReasoning], "]");
      }
      out += '}';
    }
  }

  // Of the tokens so far that no chunk had before: vLLM's name.
  void append_ids(std::string& out, Choice& c) const {
    if (call_.return_ids) out += concat(",\"token_ids\":[", std::exchange(c.ids, {}), "]");
  }

  void begin_chunk(const Choice& c) {
    out_ += "data: ";
    out_ += head_;
    out_ += "{\"index\":";
    out_ += std::to_string(c.index);
    out_ += ',';
  }

  // Sends the text that is there, with the entries that are ready.
  void send(Choice& c) {
    const bool has_entries =
        !c.entries[kContent].empty() || !c.entries[kReasoning].empty() || !c.token_names.empty();
    if (!call_.stream) {
      c.texts[c.channel] += std::exchange(c.delta, {});
    } else if (!c.delta.empty() || has_entries) {
      begin_chunk(c);
      out_ += !call_.chat ? "\"text\":" : "\"delta\":{\"";
      if (call_.chat) (out_ += kKeys[c.channel]) += "\":";
      append_json_string(out_, c.delta);
      out_ += call_.chat ? "},\"logprobs\":" : ",\"logprobs\":";
      append_logprobs(out_, c);
      out_ += ",\"finish_reason\":null";
      append_ids(out_, c);
      out_ += '}';
      out_ += tail_;
      c.delta.clear();
      for (std::string& entries : c.entries) entries.clear();
      for (auto* list : {&c.token_names, &c.token_logprobs, &c.top_logprobs, &c.offsets}) {
        list->clear();
      }
    }
  }
  void send_delta(Choice& c, const std::string& delta) {
    begin_chunk(c);
    out_ += concat("\"delta\":{", delta, "},\"logprobs\":null,\"finish_reason\":null}", tail_);
  }

  void send_call(Choice& c, const ToolCall& call) {
    send(c);
    const std::string text = concat(
        "\"id\":", json_string(random_name("call_", 24)), ",\"type\":\"function\",\"function\":{",
        "\"name\":", json_string(call.name), ",\"arguments\":", json_string(call.arguments), "}}");
    if (call_.stream) {
      send_delta(c, concat("\"tool_calls\":[{\"index\":", c.calls, ",", text, "]"));
    } else {
      append_item(c.tool_calls, "{" + text);
    }
    c.calls++;
  }

  void send_result(Choice& c, const Piece& r) {
    send(c);
    const std::string text = concat(
        "{\"name\":", json_string(r.call.name), ",\"arguments\":", json_string(r.call.arguments),
        ",\"result\":", json_string(r.result), ",\"turn\":", r.turn, "}");
    if (call_.stream) {
      send_delta(c, "\"cake_tools\":[" + text + "]");
    } else {
      append_item(c.results, text);
    }
    c.has_results = true;
  }

  std::string usage() const {
    int64_t prompt = 0, cached = 0, sampled = 0, reasoning = 0;
    for (const Choice& c : choices_) {
      // The choices of a prompt share it; what the first one found in the cache was there before.
      if (c.index % call_.n == 0) prompt += c.prompt_tokens, cached += c.cached_tokens;
      sampled += c.sampled_tokens;
      reasoning += c.reader.reasoning_tokens() - c.begun_reasoning;
    }
    std::string text = concat("{\"prompt_tokens\":", prompt, ",\"completion_tokens\":", sampled,
                              ",\"total_tokens\":", prompt + sampled,
                              ",\"prompt_tokens_details\":{\"cached_tokens\":", cached, "}");
    if (reasoning > 0) {
      text += concat(",\"completion_tokens_details\":{\"reasoning_tokens\":", reasoning, "}");
    }
    return text + "}";
  }

  std::string whole() const {
    if (failed_) throw ApiError(*failed_);
    std::string out = head_;
    for (const Choice& c : choices_) {
      require(c.done, "an answer: found choice ", c.index, " unfinished");
      if (c.index > 0) out += ',';
      out += concat("{\"index\":", c.index, ",");
      const std::string& text = c.texts[kContent];
      if (!call_.chat) {
        out += "\"text\":" + json_string(text);
      } else {
        const bool none = text.empty() && c.calls > 0;
        out += "\"message\":{\"role\":\"assistant\",\"content\":";
        out += none ? "null" : json_string(text);
        out += ",\"refusal\":null";
        const std::string& reasoning = c.texts[kReasoning];
        if (!reasoning.empty()) out += ",\"reasoning_content\":" + json_string(reasoning);
        if (c.calls > 0) out += ",\"tool_calls\":[" + c.tool_calls + "]";
        if (c.has_results) out += ",\"cake_tools\":[" + c.results + "]";
        out += '}';
      }
      out += ",\"logprobs\":";
      append_logprobs(out, c);
      out += concat(",\"finish_reason\":\"", finish_reason(c.finish, c.calls > 0), '"');
      if (call_.return_ids) out += concat(",\"token_ids\":[", c.ids, "]");
      out += '}';
    }
    return out + "],\"usage\":" + usage() + "}";
  }

  const ApiCall& call_;
  const ServedModel& model_;
  const Tokenizer& tokenizer_;
  std::vector<std::vector<int>> prompts_;
  std::vector<Choice> choices_;
  std::string head_, tail_;  // of every chunk, around its choice
  std::string out_;          // chunks of this call of add()
  std::optional<ApiError> failed_;
};

OrderedJson next_token_json(const Distribution& d, const Tokenizer& tokenizer, int count) {
  // Likeliest first, the smallest id first among equals.
  std::vector<int> order(static_cast<size_t>(tokenizer.vocab_size()));
  std::iota(order.begin(), order.end(), 0);
  const auto listed = order.begin() + std::min<int64_t>(count, int64_t(order.size()));
  std::partial_sort(order.begin(), listed, order.end(), [&](int a, int b) {
    const float x = d.logp[size_t(a)], y = d.logp[size_t(b)];
    return x != y ? x > y : a < b;
  });
  double entropy = 0, entropy_after = 0, total = 0, shown = 0;
  int64_t kept = 0;
  for (const float logp : d.logp) entropy -= std::exp(double(logp)) * double(logp);
  for (const float p : d.probability) {
    if (p == 0) continue;
    entropy_after -= double(p) * std::log(double(p));
    total += double(p);
    kept++;
  }
  OrderedJson tokens = OrderedJson::array();
  for (auto id = order.begin(); id != listed; id++) {
    const std::string_view bytes = tokenizer.token_bytes(*id);
    OrderedJson list = OrderedJson::array();
    for (const char byte : bytes) list.push_back(int(static_cast<unsigned char>(byte)));
    const float p = d.probability[size_t(*id)];
    shown += double(p);
    tokens.push_back({{"id", *id},
                      {"token", token_name(bytes)},
                      {"bytes", std::move(list)},
                      {"special", tokenizer.is_special(*id)},
                      {"logprob", d.logp[size_t(*id)]},
                      {"probability", p}});
  }
  const double nats_to_bits = 1 / std::log(2.);
  return {{"tokens", std::move(tokens)},
          {"rest", std::max(0., total - shown)},
          {"kept", kept},
          {"entropy", entropy * nats_to_bits},
          {"entropy_after", std::max(0., entropy_after) * nats_to_bits}};
}

AnswerWriter::AnswerWriter(const ApiCall& call, const ServedModel& model,
                           std::vector<std::vector<int>> prompts)
    : state_(std::make_unique<State>(call, model, std::move(prompts))) {}
AnswerWriter::~AnswerWriter() = default;

std::string AnswerWriter::begin() {
  State& s = *state_;
  if (!s.call_.chat) return "";
  for (Choice& c : s.choices_) s.send_delta(c, "\"role\":\"assistant\",\"content\":\"\"");
  return std::exchange(s.out_, {});
}

std::string AnswerWriter::add(std::span<const Event> events) {
  State& s = *state_;
  for (const Event& e : events) s.add(e);
  if (!s.failed_) {
    for (Choice& c : s.choices_) s.send(c);
  }
  return std::exchange(s.out_, {});
}

std::string AnswerWriter::keep_alive() {
  State& s = *state_;
  for (Choice& c : s.choices_) {
    if (c.done) continue;
    s.begin_chunk(c);
    s.out_ += s.call_.chat ? "\"delta\":{}" : "\"text\":\"\"";
    s.out_ += ",\"logprobs\":null,\"finish_reason\":null}" + s.tail_;
    break;
  }
  return std::exchange(s.out_, {});
}

std::string AnswerWriter::end() {
  State& s = *state_;
  if (s.failed_) return "";
  std::string out;
  if (s.call_.include_usage) {
    out = "data: " + s.head_ + "],\"usage\":" + s.usage() + "}\n\n";
  }
  return out + "data: [DONE]\n\n";
}

std::string AnswerWriter::whole() { return state_->whole(); }
bool AnswerWriter::failed() const { return state_->failed_.has_value(); }
std::string AnswerWriter::error() const { return state_->failed_ ? state_->failed_->what() : ""; }

}  // namespace cake
