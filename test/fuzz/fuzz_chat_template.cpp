// A chat template, and behind a byte 0 a conversation: read_conversation() says how. Both are any
// bytes; most tries are random templates and changes of templates, by test/fuzz/template_grammar.h.
//
// Rendering ends in text or in an Error of one line that names the template, and
// - is the same twice, and within its limits; limits that are not met change nothing;
// - the pieces cover the text; each message has a character of its own in each of its parts, and
//   wherever that character is, the piece has the message's origin;
// - ids stand for the text; a special token lies in pieces of the template and roles, but for the
//   markers of the assistant's own; what is trained is the assistant's or the template's;
// - training begins behind the ids of the prompt that generation sees.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/chat_template.h"
#include "cake/utf8.h"
#include "test/fuzz/expect.h"
#include "test/fuzz/template_grammar.h"

namespace {
using namespace cake;
using jinja::Origin;
using jinja::Source;

// ---------------------------------------------------------------------------------------------
// The conversation. A byte 1 to 8 begins a part, up to the next such byte.

constexpr char kSystem = 1, kUser = 2, kAssistant = 3, kTool = 4, kReasoning = 5, kCall = 6,
               kDeclaration = 7, kUntrained = 8;

// A character of Unicode's private use area, which stands in one part of one message.
std::string mark(int message, Source source) {
  const int c = 0xE000 + message * 8 + int(source);
  return {char(0xE0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
}

// The mark in its middle, at the beginning of a character.
std::string with_mark(std::string text, int message, Source source) {
  size_t middle = text.size() / 2;
  while (middle < text.size() && (text[middle] & 0xC0) == 0x80) middle++;
  return text.insert(middle, mark(message, source));
}

// null where the text is none.
OrderedJson read_object(const std::string& text) {
  try {
    const auto json = parse_json<OrderedJson>(text, "fuzz");
    return json.is_object() ? json : OrderedJson();
  } catch (const Error&) {
    return {};
  }
}

ToolCall read_call(const std::string& text, int message) {
  const size_t space = std::min(text.find(' '), text.size());
  ToolCall call{text.substr(0, space), "{}"};
  const std::string arguments = text.substr(std::min(space + 1, text.size()));
  if (read_object(arguments).is_object()) call.arguments = arguments;
  call.name = with_mark(call.name, message, Source::tool_call);
  return call;
}

Conversation read_conversation(std::string_view text) {
  Conversation conversation;
  for (size_t i = 0; i < text.size() && conversation.messages.size() < 64;) {
    size_t end = i + 1;
    while (end < text.size() && (text[end] < 1 || text[end] > 8)) end++;
    const std::string part(text.substr(i + 1, end - i - 1));
    const char kind = text[i];
    i = end;
    const int message = int(conversation.messages.size());
    const bool is_answer = message > 0 && conversation.messages.back().role == "assistant";
    if (kind == kDeclaration) {
      const OrderedJson json = read_object(part);
      if (json.is_object()) conversation.tools.push_back(json_line(json));
    } else if (kind == kReasoning || kind == kCall) {
      if (!is_answer) continue;
      Message& answer = conversation.messages.back();
      if (kind == kReasoning) answer.reasoning = with_mark(part, message - 1, Source::reasoning);
      if (kind == kCall) answer.tool_calls.push_back(read_call(part, message - 1));
    } else if (kind >= kSystem && kind <= kUntrained) {
      Message next;
      next.role = kind == kSystem ? "system" : kind == kUser ? "user" : kind == kTool ? "tool" : "";
      if (kind == kAssistant || kind == kUntrained) next.role = "assistant";
      next.content = part.empty() ? part : with_mark(part, message, Source::content);
      next.trained = kind != kUntrained;
      conversation.messages.push_back(next);
    }
  }
  return conversation;
}

// ---------------------------------------------------------------------------------------------
// Checks

bool is_utf8(std::string_view text) {
  for (size_t i = 0, bad = 0; i < text.size();) {
    const size_t length = (text[i] & 0x80) ? utf8_length(text, i, bad) : 1;
    if (length == 0) return false;
    i += length;
  }
  return true;
}

void check_error(const Error& error) {
  const std::string_view text = error.what();
  fuzz::expect(text.find('\n') == text.npos && !text.empty(), "errors have one line");
  fuzz::expect(text.find("fuzz") != text.npos, "errors name the template");
}

// Whether a template or a conversation may itself write such a character, as it is or by its
// number.
bool may_write_marks(std::string_view text) {
  static constexpr std::string_view kWays[] = {"\xEE", "\\u", "\\U", "\\x",
                                               "\\N",  "\\3", "%c",  ":c"};
  return std::any_of(std::begin(kWays), std::end(kWays),
                     [&](std::string_view way) { return text.find(way) != text.npos; });
}

void check_pieces(const jinja::Output& out, bool is_valid, bool marks_are_ours) {
  size_t end = 0;
  for (const jinja::Piece& piece : out.pieces) {
    fuzz::expect(piece.begin == end && piece.end > piece.begin, "pieces follow each other");
    end = piece.end;
    if (!is_valid) continue;
    const std::string_view text(out.text.data() + piece.begin, piece.end - piece.begin);
    fuzz::expect(is_utf8(text), "pieces are UTF-8");
    for (size_t i = 0; marks_are_ours && i + 2 < text.size(); i++) {
      const int c =
          (text[i] & 0xFF) == 0xEE ? 0xE000 | (text[i + 1] & 63) << 6 | (text[i + 2] & 63) : 0;
      if (c < 0xE000 || c >= 0xE000 + 64 * 8) continue;
      fuzz::expect(piece.origin.message == (c - 0xE000) / 8, "a mark is in a piece of its message");
      fuzz::expect(piece.origin.source == Source((c - 0xE000) % 8), "and of its part");
    }
  }
  fuzz::expect(end == out.text.size(), "pieces cover the text");
  size_t before = 0;
  for (const auto& [begin, stop] : out.generated) {
    fuzz::expect(begin <= stop && stop <= out.text.size() && begin >= before, "generated places");
    before = begin;
  }
}

bool same(const jinja::Output& a, const jinja::Output& b) {
  const auto equal = [](const jinja::Piece& x, const jinja::Piece& y) {
    return x.begin == y.begin && x.end == y.end && x.origin == y.origin;
  };
  return a.text == b.text && a.generated == b.generated &&
         std::equal(a.pieces.begin(), a.pieces.end(), b.pieces.begin(), b.pieces.end(), equal);
}

jinja::Variables variables_of(const Conversation& conversation, bool generation_prompt) {
  const auto text = [](std::string_view s, int i, Source source) {
    return jinja::make_text(s, Origin{i, source});
  };
  std::vector<jinja::Value> messages, tools;
  for (int i = 0; i < int(conversation.messages.size()); i++) {
    const Message& m = conversation.messages[size_t(i)];
    jinja::Variables message{{"role", text(m.role, i, Source::role)},
                             {"content", text(m.content, i, Source::content)}};
    if (!m.reasoning.empty()) {
      message.emplace_back("reasoning_content", text(m.reasoning, i, Source::reasoning));
    }
    std::vector<jinja::Value> calls;
    for (const ToolCall& call : m.tool_calls) {
      const OrderedJson function{{"name", call.name},
                                 {"arguments", parse_json<OrderedJson>(call.arguments, "fuzz")}};
      calls.push_back(jinja::from_json({{"type", "function"}, {"function", function}},
                                       Origin{i, Source::tool_call}));
    }
    if (!calls.empty()) message.emplace_back("tool_calls", jinja::make_list(calls));
    messages.push_back(jinja::make_dict(message));
  }
  for (const std::string& tool : conversation.tools) {
    tools.push_back(
        jinja::from_json(parse_json<OrderedJson>(tool, "fuzz"), Origin{-1, Source::tools}));
  }
  jinja::Variables all{{"messages", jinja::make_list(messages)},
                       {"add_generation_prompt", jinja::from_json(generation_prompt)},
                       {"bos_token", jinja::make_text("<s>")},
                       {"eos_token", jinja::make_text("</s>")}};
  all.emplace_back("tools", tools.empty() ? jinja::from_json(nullptr) : jinja::make_list(tools));
  return all;
}

void check_jinja(const std::string& text, const Conversation& conversation, bool is_valid,
                 bool marks_are_ours) {
  constexpr jinja::Limits kSmall{.steps = 5000, .depth = 20, .output = 1 << 12};
  constexpr jinja::Limits kLarge{.steps = 50000, .depth = 100, .output = 1 << 18};
  const jinja::Template code(text, "fuzz");
  const jinja::Variables variables = variables_of(conversation, true);
  const auto render = [&](const jinja::Limits& limits, jinja::Output& out) {
    try {
      out = code.render(variables, "2024-07-26", limits);
      fuzz::expect(out.text.size() <= limits.output, "the output has at most its limit");
      check_pieces(out, is_valid, marks_are_ours);
      return true;
    } catch (const Error& error) {
      check_error(error);
      return false;
    }
  };
  jinja::Output small, large, again;
  const bool fits = render(kSmall, small), is_rendered = render(kLarge, large);
  fuzz::expect(!fits || (is_rendered && same(small, large)),
               "limits that are not met change nothing");
  fuzz::expect(render(kLarge, again) == is_rendered && (!is_rendered || same(large, again)),
               "the same twice");
}

// A trained tokenizer with the special tokens of several templates, and an added token that text
// may always become.
Tokenizer fuzz_tokenizer() {
  const std::string text =
      "user\nassistant\nsystem\nHi. two words text text\n\n  The answer is 1.\n";
  const fuzz::MemoryFile file(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  auto data = std::make_shared<TokenizerData>(
      train_tokenizer({.inputs = {file.path()}}, 290, "qwen2").data());
  for (const char* name :
       {"<s>", "</s>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<note>"}) {
    data->added.push_back({name, data->tokens(), std::strcmp(name, "<note>") != 0});
    data->add_token(data->tokens(), name);
  }
  data->json.clear();
  data->config = R"({"bos_token": "<s>", "eos_token": "</s>"})";
  data->complete("fuzz");
  return Tokenizer(data);
}

const jinja::Piece& piece_at(const jinja::Output& out, size_t place) {
  const auto ends = [](size_t at, const jinja::Piece& piece) { return at < piece.end; };
  return *std::upper_bound(out.pieces.begin(), out.pieces.end(), place, ends);
}

// Whether the special token at text[begin, end) may be one. The roles here are those that templates
// know, which may be a part of one: <|user|>.
bool may_be_special(const jinja::Output& out, size_t begin, size_t end, const Conversation& c) {
  static constexpr std::string_view kMarkers[] = {"<think>", "</think>", "<tool_call>",
                                                  "</tool_call>"};
  const std::string_view name(out.text.data() + begin, end - begin);
  const bool is_marker =
      std::find(std::begin(kMarkers), std::end(kMarkers), name) != std::end(kMarkers);
  bool is_template = true, is_own = true;
  for (size_t i = begin; i < end; i = piece_at(out, i).end) {
    const Origin origin = piece_at(out, i).origin;
    is_template &= origin.source == Source::from_template || origin.source == Source::role;
    is_own &= origin.message >= 0 && c.messages[size_t(origin.message)].role == "assistant";
  }
  return is_template || (is_marker && is_own);
}

void check_ids(const Tokenizer& tokenizer, const Rendered& r, const jinja::Output& out,
               const Conversation& c) {
  fuzz::expect(r.origins.size() == r.ids.size(), "an origin for each id");
  fuzz::expect(tokenizer.decode(r.ids) == out.text, "ids stand for the text");
  size_t begin = 0;
  for (size_t i = 0; i < r.ids.size(); i++) {
    const size_t end = begin + tokenizer.token_bytes(r.ids[i]).size();
    fuzz::expect(end > begin && end <= out.text.size(), "each id has its bytes");
    fuzz::expect(r.origins[i] == piece_at(out, begin).origin, "its first byte's origin");
    fuzz::expect(!tokenizer.is_special(r.ids[i]) || may_be_special(out, begin, end, c),
                 "special tokens are the template's");
    begin = end;
  }
}

// The first answer that is trained: where the text begins with the prompt that generation sees, and
// nobody but the assistant speaks next, training begins behind the prompt's ids.
void check_prompt(const ChatTemplate& chat_template, const Conversation& c, const Rendered& r) {
  const auto trained = std::find(r.trained.begin(), r.trained.end(), true) - r.trained.begin();
  const auto is_said = [](const Origin& o) { return o.message >= 0 && o.source != Source::role; };
  const auto own = std::find_if(r.origins.begin() + trained, r.origins.end(), is_said);
  if (own == r.origins.end()) return;
  const auto before = c.messages.begin() + own->message;
  if (std::none_of(c.messages.begin(), before, [](const Message& m) { return m.role == "user"; })) {
    return;
  }
  const Conversation asked{{c.messages.begin(), before}, c.tools};
  const jinja::Output out = chat_template.output(c), prompt = chat_template.output(asked, true);
  if (!out.text.starts_with(prompt.text)) return;
  for (size_t i = 0; i < prompt.pieces.size(); i++) {
    if (out.pieces[i].origin != prompt.pieces[i].origin) return;
    if (i + 1 < prompt.pieces.size() && out.pieces[i].end != prompt.pieces[i].end) return;
  }
  size_t next = prompt.text.size();
  while (next < out.text.size() && !is_said(piece_at(out, next).origin)) {
    next = piece_at(out, next).end;
  }
  if (next == out.text.size() || piece_at(out, next).origin.message != own->message) return;
  const std::vector<int> ids = chat_template.render(asked, true).ids;
  fuzz::expect(size_t(trained) == ids.size() && std::equal(ids.begin(), ids.end(), r.ids.begin()),
               "training begins behind the prompt's ids");
}

void check_training(const ChatTemplate& chat_template, const Conversation& c) {
  const Rendered r = chat_template.render_for_training(c);
  check_ids(chat_template.tokenizer(), r, chat_template.output(c), c);
  fuzz::expect(r.trained.size() == r.ids.size(), "a mask for each id");
  size_t stretches = 0;
  for (size_t i = 0; i < r.ids.size(); i++) {
    if (!r.trained[i]) continue;
    stretches += i == 0 || !r.trained[i - 1];
    const Origin origin = r.origins[i];
    if (origin.source == Source::from_template) continue;
    fuzz::expect(origin.message >= 0, "tools' declarations are not trained");
    const Message& m = c.messages[size_t(origin.message)];
    fuzz::expect(m.role == "assistant" && m.trained, "what is trained is the assistant's");
  }
  const auto is_trained = [](const Message& m) { return m.role == "assistant" && m.trained; };
  const auto& messages = c.messages;
  fuzz::expect(stretches <= size_t(std::count_if(messages.begin(), messages.end(), is_trained)),
               "one stretch for each message");
  check_prompt(chat_template, c, r);
}

void check_chat_template(const Tokenizer& tokenizer, const std::string& text,
                         const Conversation& c) {
  const auto tried = [](auto&& call) {
    try {
      call();
    } catch (const Error& error) {
      check_error(error);
    }
  };
  const ChatTemplate chat_template(tokenizer, text, "fuzz", {.date = "2024-07-26"});
  std::vector<int> seen;
  for (const bool generation_prompt : {false, true}) {
    tried([&] {
      const Rendered r = chat_template.render(c, generation_prompt);
      check_ids(tokenizer, r, chat_template.output(c, generation_prompt), c);
      const std::vector<int> kept = keep_seen_ids(tokenizer, seen, r.ids);
      fuzz::expect(tokenizer.decode(kept) == tokenizer.decode(r.ids),
                   "ids that were seen change no text");
      seen = r.ids;
    });
  }
  tried([&] { check_training(chat_template, c); });
  tried([&] { chat_template.ids_behind_turn(c); });
  if (!c.messages.empty() && c.messages.back().role == "assistant") {
    tried([&] { chat_template.render_open(c); });
  }
}

// ---------------------------------------------------------------------------------------------
// Inputs

struct Parts {
  std::string chat_template, conversation;
};

Parts parts_of(const uint8_t* data, size_t size) {
  const std::string all(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(all.find('\0'), size);
  return {all.substr(0, end), all.substr(std::min(end + 1, size))};
}

size_t put(const Parts& parts, uint8_t* data, size_t capacity) {
  const std::string all = parts.chat_template + '\0' + parts.conversation;
  const size_t size = std::min(all.size(), capacity);
  std::memcpy(data, all.data(), size);
  return size;
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t capacity);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t capacity,
                                          unsigned seed) {
  fuzz::Generator generator(seed);
  Parts parts = parts_of(data, size);
  switch (generator.below(8)) {
    case 0:
      return LLVMFuzzerMutate(data, size, capacity);
    case 1:
      parts = {generator.chat_template(), generator.conversation()};
      break;
    case 2:
      parts.conversation = generator.conversation();
      break;
    default:
      parts.chat_template = generator.changed(parts.chat_template);
  }
  if (parts.conversation.empty()) parts.conversation = generator.conversation();
  return put(parts, data, capacity);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Tokenizer tokenizer = fuzz_tokenizer();
  const auto [text, rest] = parts_of(data, size);
  const Conversation conversation = read_conversation(rest.empty() ? "\2Hi.\3Hello." : rest);
  try {
    check_jinja(text, conversation, is_utf8(text) && is_utf8(rest),
                !may_write_marks(text) && !may_write_marks(rest));
    check_chat_template(tokenizer, text, conversation);
  } catch (const Error& error) {
    check_error(error);
  }
  return 0;
}
