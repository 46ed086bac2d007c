// Chat templates: from a conversation to ids, and which of them are trained. The interface and the
// rules are in cake/chat_template.h.
#include <algorithm>
#include <ctime>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/chat_template.h"
#include "cake/chatml.h"
#include "cake/checkpoint.h"
#include "cake/jinja.h"
#include "cake/json.h"
#include "cake/messages.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  localtime_r(&now, &parts);
  return format("%04d-%02d-%02d", parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday);
}

bool is_date(std::string_view text) {
  constexpr std::string_view kForm = "dddd-dd-dd";
  const auto fits = [](char c, char form) { return form == 'd' ? c >= '0' && c <= '9' : c == '-'; };
  if (!std::equal(text.begin(), text.end(), kForm.begin(), kForm.end(), fits)) return false;
  const auto number = [&](size_t begin) {
    return (text[begin] - '0') * 10 + text[begin + 1] - '0';
  };
  const int month = number(5), day = number(8), year = number(0) * 100 + number(2);
  const bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
  const int last = month == 2                                              ? 28 + leap
                   : month == 4 || month == 6 || month == 9 || month == 11 ? 30
                                                                           : 31;
  return year >= 1 && month >= 1 && month <= 12 && day >= 1 && day <= last;
}

std::string python_text(const OrderedJson& json) {
  static const jinja::Template code("{{ value | tojson }}", "JSON");
  return code.render({{"value", jinja::from_json(json)}}, "2000-01-01").text;
}

// ---------------------------------------------------------------------------------------------
// Variables of a template

namespace chat_templates {

using jinja::Origin;
using jinja::Source;

// Markers inside of an assistant's turn. They are no end of turn.
constexpr const char* kMarkers[] = {"<think>", "</think>", "<tool_call>", "</tool_call>"};
constexpr const char* kNamedTokens[] = {"bos_token", "eos_token", "pad_token", "unk_token"};
constexpr const char* kOwnVariables[] = {"messages", "tools", "documents", "add_generation_prompt"};

// User: ...\nAssistant: ..., for a model that has no template.
constexpr const char* kPlainTemplate = R"({{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + message.content + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant: ' + message.content + '\n\n' }}
    {%- else %}
        {{- raise_exception('found role ' + message.role + ', expected system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
)";

// A piece that says something, unlike the template's own text and the names of roles.
bool is_said(const Origin& origin) {
  return origin.source != Source::from_template && origin.source != Source::role;
}
bool is_said_by(const Origin& origin, size_t message) {
  return is_said(origin) && origin.message == int(message);
}

// The arguments of a call: the object that its text is. Text that is no object stays text. So does
// an object that a person wrote with other spaces, where the template writes text as it is.
OrderedJson call_arguments(const std::string& text, bool takes_text) {
  OrderedJson json;
  try {
    json = parse_json<OrderedJson>(text, "arguments");
  } catch (const Error&) {
  }
  if (!json.is_object() || (takes_text && python_text(json) != text)) return text;
  return json;
}

}  // namespace chat_templates

struct ChatTemplate::Data {
  Data(const Tokenizer& t, std::string template_text, std::string template_name,
       TemplateOptions template_options);

  jinja::Output output(const Conversation&, bool generation_prompt) const;
  jinja::Value message_value(const Conversation&, size_t i, int& calls) const;

  // The text's ids, encoded apart behind each of `cuts`, and their places.
  Rendered encode(const Conversation&, const jinja::Output&, const std::vector<size_t>& cuts,
                  std::vector<TokenPlace>* places = nullptr) const;
  std::vector<SpecialStretch> allowed_stretches(const Conversation&, const jinja::Output&) const;
  bool is_added(int id) const { return tokenizer.special(tokenizer.token_bytes(id)) == id; }
  // A special token that is no marker, or what the model's files call the end of a text.
  bool ends_turn(int id) const;

  size_t training_begin(const Conversation&, const jinja::Output&, size_t i) const;
  void check_whole(const Conversation&, const jinja::Output&, size_t i) const;
  void check_generated(const jinja::Output&, size_t i, size_t begin, size_t end) const;

  void find_end_of_turn();
  bool probe_tools() const;

  Tokenizer tokenizer;
  std::string text, name;
  TemplateOptions options;
  jinja::Template code;
  jinja::Variables constants;   // named tokens, and options.variables
  int eos = -1;                 // the id of eos_token, -1: none
  std::vector<int> markers;     // kMarkers that are special tokens
  bool gives_call_ids = false;  // calls have ids in messages
  bool takes_text_arguments = false;
  bool content_is_list = false;  // [{"type": "text", "text": ...}]
  int end_of_turn = -1;
  std::string stop;
  bool has_tools = false;
};

ChatTemplate::Data::Data(const Tokenizer& t, std::string template_text, std::string template_name,
                         TemplateOptions template_options)
    : tokenizer(t),
      text(std::move(template_text)),
      name(std::move(template_name)),
      options(std::move(template_options)),
      code(text, name) {
  using namespace chat_templates;
  require(options.variables.is_object(), name, ": variables of the chat template: found ",
          json_text(options.variables), ", expected a JSON object");
  for (const char* variable : kNamedTokens) {
    std::string token = tokenizer.named_token(variable);
    const int separator = tokenizer.find_document_separator();
    if (token.empty() && std::string_view(variable) == "bos_token" && separator >= 0) {
      token = tokenizer.token_bytes(separator);
    }
    if (!token.empty()) constants.push_back({variable, jinja::make_text(token)});
  }
  for (const auto& item : options.variables.items()) {
    const std::string& variable = item.key();
    const auto is_variable = [&](const char* known) { return variable == known; };
    if (std::any_of(std::begin(kNamedTokens), std::end(kNamedTokens), is_variable) ||
        std::any_of(std::begin(kOwnVariables), std::end(kOwnVariables), is_variable)) {
      fail(name, ": variables of the chat template: found ", variable,
           ", expected a name that not every template is given, as enable_thinking");
    }
    // Who sends a request may set them, so that they are no more trusted than a message.
    constants.push_back({variable, jinja::from_json(item.value(), {-1, Source::content})});
  }
  for (const char* marker : kMarkers) {
    const int id = tokenizer.special(marker);
    if (id >= 0 && tokenizer.is_special(id)) markers.push_back(id);
  }
  eos = tokenizer.special(tokenizer.named_token("eos_token"));
  // Mistral's templates refuse calls without ids; to the others they say nothing.
  gives_call_ids = text.find("tool_call_id") != text.npos || text.find("call.id") != text.npos ||
                   text.find("call['id']") != text.npos || text.find("call[\"id\"]") != text.npos;
  takes_text_arguments = text.find("arguments is string") != text.npos;
  try {
    find_end_of_turn();
  } catch (const Error& text_error) {
    // Templates of models that see pictures go through a list of parts.
    content_is_list = true;
    try {
      find_end_of_turn();
    } catch (const Error&) {
      throw text_error;
    }
  }
  has_tools = probe_tools();
}

jinja::Value ChatTemplate::Data::message_value(const Conversation& conversation, size_t i,
                                               int& calls) const {
  using namespace chat_templates;
  const Message& m = conversation.messages[i];
  const auto value = [&](const std::string& s, Source source) {
    return jinja::make_text(s, {int(i), source});
  };
  std::string content = m.content;
  for (const ToolCall& call : m.tool_calls) {  // what a model wrote that is no call stays text
    if (!call.name.empty()) continue;
    content += concat(content.empty() ? "" : "\n", "<tool_call>", call.arguments, "</tool_call>");
  }
  jinja::Variables fields = {{"role", value(m.role, Source::role)},
                             {"content", value(content, Source::content)}};
  if (content_is_list) {
    fields[1].second = jinja::make_list({jinja::make_dict(
        {{"type", jinja::make_text("text")}, {"text", value(content, Source::content)}})});
  }
  if (!strip(m.reasoning).empty()) {  // the name of most templates, and that of gpt-oss
    for (const char* key : {"reasoning_content", "thinking"}) {
      fields.push_back({key, value(m.reasoning, Source::reasoning)});
    }
  }
  // Nine characters, as Mistral's templates expect; of the answer the same as of its call.
  const auto call_id = [&](int number) { return format("call%05d", number); };
  OrderedJson list = OrderedJson::array();
  for (const ToolCall& call : m.tool_calls) {
    if (call.name.empty()) {
      calls++;
      continue;
    }
    OrderedJson json = {{"type", "function"}};
    if (gives_call_ids) json["id"] = call_id(calls);
    calls++;
    json["function"] = {{"name", call.name},
                        {"arguments", call_arguments(call.arguments, takes_text_arguments)}};
    list.push_back(std::move(json));
  }
  if (!list.empty()) {
    fields.push_back({"tool_calls", jinja::from_json(list, {int(i), Source::tool_call})});
  }
  if (gives_call_ids && m.role == "tool") {
    size_t caller = i;
    while (caller > 0 && conversation.messages[caller].role == "tool") caller--;
    const int number =
        calls - int(conversation.messages[caller].tool_calls.size()) + int(i - caller) - 1;
    fields.push_back({"tool_call_id", value(call_id(std::max(number, 0)), Source::role)});
  }
  return jinja::make_dict(std::move(fields));
}

jinja::Output ChatTemplate::Data::output(const Conversation& conversation,
                                         bool generation_prompt) const {
  using namespace chat_templates;
  std::vector<jinja::Value> messages;
  int calls = 0;
  for (size_t i = 0; i < conversation.messages.size(); i++) {
    messages.push_back(message_value(conversation, i, calls));
  }
  OrderedJson tools;  // null: there are none
  for (const std::string& tool : conversation.tools) {
    OrderedJson json = parse_json<OrderedJson>(tool, name + ": tools");
    const bool is_wrapped = json.is_object() && json.contains("function");
    tools.push_back(is_wrapped ? std::move(json)
                               : OrderedJson{{"type", "function"}, {"function", json}});
  }
  jinja::Variables variables = constants;
  variables.push_back({"messages", jinja::make_list(std::move(messages))});
  variables.push_back({"tools", jinja::from_json(tools, {-1, Source::tools})});
  variables.push_back({"documents", jinja::from_json(nullptr)});
  variables.push_back({"add_generation_prompt", jinja::from_json(generation_prompt)});
  return code.render(variables, options.date.empty() ? today() : options.date);
}

// ---------------------------------------------------------------------------------------------
// Text to ids

// Where special tokens are recognised: in the template's text with the names of roles in it, which
// are four; and the markers alone in what the assistant says.
std::vector<SpecialStretch> ChatTemplate::Data::allowed_stretches(const Conversation& conversation,
                                                                  const jinja::Output& out) const {
  using namespace chat_templates;
  std::vector<SpecialStretch> allowed;
  for (const jinja::Piece& piece : out.pieces) {
    const auto& [message, source] = piece.origin;
    const std::string_view role =
        message < 0 ? "" : std::string_view(conversation.messages[size_t(message)].role);
    const bool is_known =
        role == "system" || role == "user" || role == "assistant" || role == "tool";
    std::span<const int> only;
    if (is_said(piece.origin) || (source == Source::role && !is_known)) {
      if (role != "assistant" || source == Source::role || markers.empty()) continue;
      only = markers;
    }
    // A token may be written in several pieces: '<|' + message.role + '|>'.
    if (!allowed.empty() && allowed.back().end == piece.begin &&
        allowed.back().only.empty() == only.empty()) {
      allowed.back().end = piece.end;
    } else {
      allowed.push_back({piece.begin, piece.end, only});
    }
  }
  return allowed;
}

Rendered ChatTemplate::Data::encode(const Conversation& conversation, const jinja::Output& out,
                                    const std::vector<size_t>& cuts,
                                    std::vector<TokenPlace>* places) const {
  const std::vector<SpecialStretch> allowed = allowed_stretches(conversation, out);
  Rendered rendered;
  std::vector<TokenPlace> all;
  size_t stretch = 0, piece = 0;
  for (size_t k = 0, begin = 0; k <= cuts.size(); k++) {
    const size_t end = k < cuts.size() ? cuts[k] : out.text.size();
    std::vector<SpecialStretch> part;
    while (stretch < allowed.size() && allowed[stretch].end <= begin) stretch++;
    for (size_t s = stretch; s < allowed.size() && allowed[s].begin < end; s++) {
      part.push_back({std::max(allowed[s].begin, begin) - begin,
                      std::min(allowed[s].end, end) - begin, allowed[s].only});
    }
    const bool begins = all.empty() || is_added(all.back().id);
    const std::string_view part_text = std::string_view(out.text).substr(begin, end - begin);
    for (const TokenPlace& place : tokenizer.encode_places(part_text, part, begins)) {
      all.push_back({place.id, begin + place.begin, begin + place.end});
    }
    begin = end;
  }
  for (const TokenPlace& place : all) {
    rendered.ids.push_back(place.id);
    while (piece + 1 < out.pieces.size() && out.pieces[piece].end <= place.begin) piece++;
    while (piece > 0 && out.pieces[piece].begin > place.begin) piece--;
    rendered.origins.push_back(out.pieces.empty() ? jinja::Origin{} : out.pieces[piece].origin);
  }
  if (places) *places = std::move(all);
  return rendered;
}

bool ChatTemplate::Data::ends_turn(int id) const {
  const std::string_view bytes = tokenizer.token_bytes(id);
  if (std::find(std::begin(chat_templates::kMarkers), std::end(chat_templates::kMarkers), bytes) !=
      std::end(chat_templates::kMarkers)) {
    return false;
  }
  return tokenizer.is_special(id) || id == eos;
}

// ---------------------------------------------------------------------------------------------
// The training mask

namespace chat_templates {

// The text of a message's own pieces: text[begin, end), and the text before it that belongs to no
// message: text[header, begin).
struct Turn {
  size_t header = 0, begin = 0, end = 0;
};

std::optional<Turn> find_turn(const jinja::Output& out, size_t message) {
  Turn turn;
  bool is_found = false;
  for (const jinja::Piece& piece : out.pieces) {
    const bool is_own = piece.origin.message == int(message);
    if (!is_said(piece.origin) && (is_own || piece.origin.message < 0)) continue;
    if (is_own) {
      if (!is_found) turn.begin = piece.begin;
      is_found = true;
      turn.end = piece.end;
    } else if (!is_found) {
      turn.header = piece.end;
    }
  }
  return is_found ? std::optional(turn) : std::nullopt;
}

// The text behind everything that is of a message.
std::string_view text_behind(const jinja::Output& out) {
  size_t begin = 0;
  for (const jinja::Piece& piece : out.pieces) {
    if (is_said(piece.origin) || piece.origin.message >= 0) begin = piece.end;
  }
  return std::string_view(out.text).substr(begin);
}

Conversation first_messages(const Conversation& conversation, size_t count) {
  const auto begin = conversation.messages.begin();
  return {{begin, begin + long(count)}, conversation.tools};
}

// How much of two texts is equal at their beginnings, in bytes, without a part of an added token or
// of a character at its end.
size_t common_prefix(const Tokenizer& tokenizer, std::string_view a, std::string_view b) {
  const auto differ = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  size_t size = size_t(differ.first - a.begin());
  if (size == a.size() || size == b.size()) return size;
  for (const TokenPlace& place : tokenizer.encode_places(a, true)) {
    const bool is_added = tokenizer.special(tokenizer.token_bytes(place.id)) == place.id;
    if (is_added && place.begin < size && size < place.end) size = place.begin;
  }
  while (size > 0 && (static_cast<unsigned char>(a[size]) & 0xC0) == 0x80) size--;
  return size;
}

// Text without white space and without <think> and </think>, which a template may move or write by
// itself.
std::string plain_words(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    const std::string_view rest = text.substr(i);
    const size_t marker = rest.starts_with("<think>") ? 7 : rest.starts_with("</think>") ? 8 : 0;
    if (marker > 0) {
      i += marker - 1;
    } else if (text[i] != ' ' && (text[i] < '\t' || text[i] > '\r')) {
      out += text[i];
    }
  }
  return out;
}

// Whether all names, keys and values of calls stand in `written`, as they are or inside of JSON.
bool has_words(const std::string& written, const OrderedJson& json) {
  if (json.is_object() || json.is_array()) {
    for (const auto& item : json.items()) {
      if (json.is_object() && !has_words(written, item.key())) return false;
      if (!has_words(written, item.value())) return false;
    }
    return true;
  }
  if (json.is_boolean() || json.is_null()) return true;  // true, or True
  std::string text = json.is_string() ? json.get<std::string>() : python_text(json);
  for (int quoted = 0; quoted < 3; quoted++) {  // JSON may stand inside of a string of JSON
    if (written.find(text) != written.npos) return true;
    std::string more;
    append_json_string(more, text);
    text = more.substr(1, more.size() - 2);
  }
  return false;
}

std::string shortened(std::string_view text) { return json_text(std::string(text)); }

}  // namespace chat_templates

// The offset where training of message i begins.
size_t ChatTemplate::Data::training_begin(const Conversation& conversation,
                                          const jinja::Output& out, size_t i) const {
  using namespace chat_templates;
  const Turn turn = *find_turn(out, i);
  const std::string_view header =
      std::string_view(out.text).substr(turn.header, turn.begin - turn.header);
  const std::vector<Message>& messages = conversation.messages;
  const bool is_asked = std::any_of(messages.begin(), messages.begin() + long(i),
                                    [](const Message& m) { return m.role == "user"; });
  if (is_asked) {
    const jinja::Output prompt = output(first_messages(conversation, i), true);
    const std::string_view given = text_behind(prompt);
    // The prompt may end with what the message itself begins with: a space, or <think>.
    const std::string_view whole =
        std::string_view(out.text).substr(turn.header, turn.end - turn.header);
    if (given.size() > header.size() && whole.starts_with(given)) return turn.header + given.size();
    return turn.header + common_prefix(tokenizer, header, given);
  }
  // The assistant begins the conversation. Templates need a user for a generation prompt.
  Conversation asked = first_messages(conversation, i + 1);
  asked.messages.insert(asked.messages.end() - 1, {.role = "user", .content = "Hello."});
  const jinja::Output answered = output(asked, false);
  const std::optional<Turn> other = find_turn(answered, i + 1);
  if (!other) return turn.begin;
  const std::string_view own = std::string_view(answered.text).substr(0, other->begin);
  const size_t trained = other->begin - training_begin(asked, answered, i + 1);
  return header.ends_with(own.substr(own.size() - trained)) ? turn.begin - trained : turn.begin;
}

// Throws Error unless all that message i says has come through the template.
void ChatTemplate::Data::check_whole(const Conversation& conversation, const jinja::Output& out,
                                     size_t i) const {
  using namespace chat_templates;
  const Message& m = conversation.messages[i];
  std::string said, thought, calls;
  for (const jinja::Piece& piece : out.pieces) {
    if (!is_said_by(piece.origin, i)) continue;
    const Source source = piece.origin.source;
    (source == Source::content     ? said
     : source == Source::reasoning ? thought
                                   : calls) +=
        out.text.substr(piece.begin, piece.end - piece.begin);
  }
  const auto refuse = [&](const char* what, std::string_view found, std::string_view expected) {
    fail(name, ": found a chat template that writes ", shortened(found), " as the assistant's ",
         what, ", expected ", shortened(expected), " whole, but for white space at its ends, to ",
         "train on");
  };
  // Templates may take reasoning out of the content and write its markers by themselves.
  const bool is_split = split_answer(m).reasoning && strip(m.reasoning).empty();
  const bool is_whole =
      strip(said) == strip(m.content) || (is_split && plain_words(said) == plain_words(m.content));
  if (!is_whole) refuse("content", said, m.content);
  if (strip(thought) != strip(m.reasoning)) refuse("reasoning", thought, m.reasoning);
  for (const ToolCall& call : m.tool_calls) {
    const OrderedJson arguments = call_arguments(call.arguments, false);
    if (!has_words(calls, {{call.name, arguments}})) {
      refuse("call", calls, concat(call.name, " ", call.arguments));
    }
  }
  if (!find_turn(out, i)) refuse("content", "", m.content);
  // Its pieces are one stretch, without anyone else's words in it.
  const Turn turn = *find_turn(out, i);
  for (const jinja::Piece& piece : out.pieces) {
    if (piece.begin < turn.begin || piece.end > turn.end || !is_said(piece.origin)) continue;
    if (is_said_by(piece.origin, i)) continue;
    fail(name, ": found a chat template that writes ",
         shortened(out.text.substr(piece.begin, piece.end - piece.begin)),
         " inside of the assistant's message, expected its own words alone to train on");
  }
}

// Where the template marks what to train with {% generation %}, its marks must agree.
void ChatTemplate::Data::check_generated(const jinja::Output& out, size_t i, size_t begin,
                                         size_t end) const {
  if (text.find("endgeneration") == text.npos) return;
  for (const auto& [block_begin, block_end] : out.generated) {
    if (block_begin <= begin && end <= block_end) return;
  }
  fail(name, ": messages[", i, "]: found ",
       chat_templates::shortened(out.text.substr(begin, end - begin)),
       " to train on, expected it inside of the template's {% generation %} block");
}

Rendered ChatTemplate::render_for_training(const Conversation& conversation) const {
  using namespace chat_templates;
  const Data& d = *data_;
  const std::vector<Message>& messages = conversation.messages;
  const jinja::Output out = d.output(conversation, false);
  if (!conversation.tools.empty() &&
      std::none_of(out.pieces.begin(), out.pieces.end(),
                   [](const jinja::Piece& p) { return p.origin.source == Source::tools; })) {
    fail(d.name, ": found a chat template that declares no tools, expected one that writes the ",
         conversation.tools.size(), " tools of the conversation to train on");
  }
  // Messages with what is trained of them.
  std::vector<std::pair<size_t, Turn>> turns;
  std::vector<size_t> cuts;
  for (size_t i = 0; i < messages.size(); i++) {
    if (messages[i].role != "assistant" || !messages[i].trained) continue;
    std::optional<Turn> turn = find_turn(out, i);
    if (!turn) continue;
    turn->begin = d.training_begin(conversation, out, i);
    turns.push_back({i, *turn});
    cuts.push_back(turn->begin);
  }
  for (size_t i = messages.size(); i-- > 0;) {
    if (messages[i].role != "assistant" || !messages[i].trained) continue;
    d.check_whole(conversation, out, i);
    break;
  }
  std::sort(cuts.begin(), cuts.end());
  std::vector<TokenPlace> places;
  Rendered rendered = d.encode(conversation, out, cuts, &places);
  rendered.trained.resize(places.size());
  for (auto& [i, turn] : turns) {
    const auto last_piece = turn.end;
    size_t next = out.text.size();  // where someone speaks again
    for (const jinja::Piece& piece : out.pieces) {
      const int speaker = piece.origin.message;  // of a role, too: a tool may answer nothing
      if (piece.begin < last_piece || (!is_said(piece.origin) && speaker < 0)) continue;
      if (is_said(piece.origin) || speaker != int(i)) next = std::min(next, piece.begin);
    }
    const auto end = std::find_if(places.begin(), places.end(), [&](const TokenPlace& place) {
      return place.begin >= last_piece && place.end <= next && d.ends_turn(place.id);
    });
    if (end != places.end()) turn.end = end->end;
    require(end != places.end() || i != turns.back().first, d.name,
            ": found a chat template that writes no special token behind the assistant's last ",
            "message, expected its end of turn to train on");
    d.check_generated(out, i, turn.begin, turn.end);
    for (size_t k = 0; k < places.size(); k++) {
      if (places[k].begin >= turn.begin && places[k].end <= turn.end) rendered.trained[k] = true;
    }
  }
  return rendered;
}

// ---------------------------------------------------------------------------------------------
// The end of a turn, and tools: probed with a short conversation

void ChatTemplate::Data::find_end_of_turn() {
  using namespace chat_templates;
  const auto output_of = [&](size_t count) {
    const Conversation probe{{{"user", "Question"}, {"assistant", "Answer"}, {"user", "Next"}}, {}};
    return output(first_messages(probe, count), false);
  };
  const auto first_end = [&](const jinja::Output& out, size_t begin, size_t end) {
    std::vector<TokenPlace> places;
    encode({{{"user"}, {"assistant"}, {"user"}}, {}}, out, {}, &places);
    for (const TokenPlace& place : places) {
      if (place.begin >= begin && place.end <= end && ends_turn(place.id)) return place.id;
    }
    return -1;
  };
  const jinja::Output answered = output_of(2);
  const std::optional<Turn> answer = find_turn(answered, 1);
  require(answer.has_value(), name,
          ": found a chat template that does not write what the assistant says, expected one that ",
          "does");
  end_of_turn = first_end(answered, answer->end, answered.text.size());
  if (end_of_turn >= 0) return;
  const std::string_view behind = std::string_view(answered.text).substr(answer->end);
  const std::string_view written = strip(behind);
  for (const char* known : {"<|", "<｜", "</s>", "<end_of_turn>", "<eos>"}) {
    if (!written.starts_with(known)) continue;
    const std::string_view token = written.substr(0, written.find('>') + 1);
    fail(name, ": found no token ", token,
         " in the tokenizer, expected it: the chat template ends ",
         "turns with it; ./sft --add-chat-tokens adds the tokens of ChatML to a base model");
  }
  // A template without a token of its own ends an answer with what begins the next turn.
  const jinja::Output more = output_of(3);
  const std::optional<Turn> before = find_turn(more, 1), next = find_turn(more, 2);
  if (!before || !next || next->begin < before->end) return;
  end_of_turn = first_end(more, before->end, next->begin);
  if (end_of_turn >= 0) return;
  stop = more.text.substr(before->end, next->begin - before->end);
  stop.erase(stop.find_last_not_of(" \t\r\n") + 1);
  const size_t text_begin = std::min(stop.find_first_not_of('\n'), stop.size());
  if (text_begin > 1) stop.erase(0, text_begin - 1);
}

bool ChatTemplate::Data::probe_tools() const {
  using namespace chat_templates;
  const Conversation probe{
      {{"user", "Question"}, {"assistant", "", {{"probe", R"({"key": "value"})"}}}},
      {R"({"name": "probe", "description": "A tool.", "parameters": {"type": "object", )"
       R"("properties": {"key": {"type": "string"}}}})"}};
  jinja::Output out;
  try {
    out = output(probe, false);
  } catch (const Error&) {  // it knows no calls
    return false;
  }
  const std::optional<Turn> turn = find_turn(out, 1);
  const bool is_declared =
      std::any_of(out.pieces.begin(), out.pieces.end(),
                  [](const jinja::Piece& p) { return p.origin.source == Source::tools; });
  if (!turn || !is_declared) return false;
  const size_t begin = out.text.rfind("<tool_call>", turn->begin);
  const size_t end = out.text.find("</tool_call>", turn->end);
  if (begin == out.text.npos || begin < turn->header || end == out.text.npos) return false;
  const size_t call_begin = begin + std::string_view("<tool_call>").size();
  const Json call = Json::parse(out.text.substr(call_begin, end - call_begin), nullptr, false);
  return call.is_object() && call.contains("name") && call.contains("arguments") &&
         call["arguments"].is_object();
}

// ---------------------------------------------------------------------------------------------
// ChatTemplate

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer, std::string text, std::string name,
                           TemplateOptions options)
    : data_(std::make_shared<const Data>(tokenizer, std::move(text), std::move(name),
                                         std::move(options))) {}

jinja::Output ChatTemplate::output(const Conversation& conversation, bool generation_prompt) const {
  return data_->output(conversation, generation_prompt);
}

Rendered ChatTemplate::render(const Conversation& conversation, bool generation_prompt) const {
  return data_->encode(conversation, data_->output(conversation, generation_prompt), {});
}

Rendered ChatTemplate::render_open(const Conversation& conversation) const {
  using namespace chat_templates;
  require(!conversation.messages.empty(), data_->name, ": found no message, expected one to go on");
  const size_t last = conversation.messages.size() - 1;
  jinja::Output out = data_->output(conversation, false);
  const std::optional<Turn> turn = find_turn(out, last);
  if (!turn) return render(first_messages(conversation, last), true);
  out.text.resize(turn->end);
  while (out.pieces.back().begin >= turn->end) out.pieces.pop_back();
  return data_->encode(conversation, out, {});
}

std::vector<int> ChatTemplate::ids_behind_turn(const Conversation& conversation) const {
  using namespace chat_templates;
  size_t count = conversation.messages.size();
  while (count > 0 && conversation.messages[count - 1].role != "assistant") count--;
  require(count > 0, data_->name, ": found no message of the assistant, expected its turn");
  Conversation whole = conversation;
  Message& message = whole.messages[count - 1];
  if (strip(message.content).empty() && message.tool_calls.empty()) message.content = ".";
  const jinja::Output out = data_->output(whole, true);
  const std::optional<Turn> turn = find_turn(out, count - 1);
  require(turn.has_value(), data_->name,
          ": found a chat template that does not write the assistant's last message, expected one ",
          "that does");
  std::vector<TokenPlace> places;
  data_->encode(whole, out, {turn->end}, &places);
  auto begin = std::find_if(places.begin(), places.end(),
                            [&](const TokenPlace& place) { return place.begin >= turn->end; });
  const auto end = std::find_if(
      begin, places.end(), [&](const TokenPlace& place) { return data_->ends_turn(place.id); });
  if (end != places.end() && data_->end_of_turn >= 0) begin = end + 1;
  std::vector<int> ids;
  std::transform(begin, places.end(), std::back_inserter(ids),
                 [](const TokenPlace& place) { return place.id; });
  return ids;
}

int ChatTemplate::find_end_of_turn() const { return data_->end_of_turn; }
int ChatTemplate::end_of_turn() const {
  require(data_->end_of_turn >= 0, data_->name, ": found a chat template that ends turns with ",
          chat_templates::shortened(data_->stop), ", expected one with a special token for that");
  return data_->end_of_turn;
}
const std::string& ChatTemplate::stop_string() const { return data_->stop; }
bool ChatTemplate::has_tools() const { return data_->has_tools; }
const std::string& ChatTemplate::text() const { return data_->text; }
const std::string& ChatTemplate::name() const { return data_->name; }
const Tokenizer& ChatTemplate::tokenizer() const { return data_->tokenizer; }
const TemplateOptions& ChatTemplate::options() const { return data_->options; }

// ---------------------------------------------------------------------------------------------
// Which template, and which ids

ChatTemplate open_chat_template(const Tokenizer& tokenizer, const std::filesystem::path& model,
                                const std::string& choice, TemplateOptions options) {
  const auto open = [&](std::string text, std::string name) {
    return ChatTemplate(tokenizer, std::move(text), std::move(name), std::move(options));
  };
  if (choice == "chatml") return open(kChatTemplate, "chatml");
  if (choice == "plain") return open(chat_templates::kPlainTemplate, "plain");
  if (choice != "auto") {
    require(std::filesystem::is_regular_file(choice), "--template: found ", choice,
            ", expected auto, chatml, plain or a file with a chat template");
    return open(read_file(choice), choice);
  }
  const std::string own = chat_template(model);
  require(!own.empty(), model.string(),
          ": found no chat template, expected one; --template names one");
  return open(own, model.string());
}

std::vector<int> keep_seen_ids(const Tokenizer& tokenizer, std::span<const int> seen,
                               std::vector<int> rendered) {
  // Of each list, the stretch of text from `begin` and the special token behind it.
  const auto find_special = [&](std::span<const int> ids, size_t begin) {
    while (begin < ids.size() && !tokenizer.is_special(ids[begin])) begin++;
    return begin;
  };
  size_t done_seen = 0, done = 0;
  while (true) {
    const size_t end_seen = find_special(seen, done_seen), end = find_special(rendered, done);
    if (end_seen == seen.size() || end == rendered.size() || seen[end_seen] != rendered[end]) break;
    const std::span<const int> all = rendered;
    if (tokenizer.decode(seen.subspan(done_seen, end_seen - done_seen)) !=
        tokenizer.decode(all.subspan(done, end - done))) {
      break;
    }
    done_seen = end_seen + 1, done = end + 1;
  }
  std::vector<int> ids(seen.begin(), seen.begin() + long(done_seen));
  ids.insert(ids.end(), rendered.begin() + long(done), rendered.end());
  return ids;
}

}  // namespace cake
