// Published chat templates against Jinja2: what cake/jinja.h makes of each is what Jinja2 makes of
// it. The templates are others' texts and not here: $CAKE_TEMPLATES names a folder of them, which
// dev/interop/chat_templates.py writes together with the hashes in test/golden/.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cake/jinja.h"
#include "cake/json.h"
#include "cake/messages.h"
#include "cake/run.h"
#include "cake/sha256.h"
#include "test/support.h"

namespace cake {
namespace {

namespace fs = std::filesystem;
using jinja::Origin;
using jinja::Source;

struct Case {
  std::string name;
  OrderedJson variables;
};

std::string hex(std::string_view text) {
  std::string out;
  for (const unsigned char byte : sha256(text)) out += format("%02x", unsigned(byte));
  return out;
}

OrderedJson read_golden(const std::string& name) {
  return OrderedJson::parse(read_file(fs::path("test/golden") / name));
}

// The conversations; each has the variables that all of them have.
std::vector<Case> read_cases(const OrderedJson& file) {
  std::vector<Case> cases;
  for (const OrderedJson& conversation : file["conversations"]) {
    OrderedJson variables = file["variables"];
    for (const auto& [name, value] : conversation["variables"].items()) variables[name] = value;
    cases.push_back({conversation["name"], std::move(variables)});
  }
  return cases;
}

// Each message's strings have its number; tools have theirs; other variables are the template's.
jinja::Variables with_origins(const OrderedJson& variables) {
  jinja::Variables out;
  for (const auto& [name, value] : variables.items()) {
    if (name == "messages") {
      std::vector<jinja::Value> messages;
      for (const OrderedJson& message : value) {
        const int number = int(messages.size());
        jinja::Variables parts;
        for (const auto& [key, part] : message.items()) {
          const Source source = key == "role"                ? Source::role
                                : key == "tool_calls"        ? Source::tool_call
                                : key == "reasoning_content" ? Source::reasoning
                                                             : Source::content;
          parts.emplace_back(key, jinja::from_json(part, Origin{number, source}));
        }
        messages.push_back(jinja::make_dict(std::move(parts)));
      }
      out.emplace_back(name, jinja::make_list(std::move(messages)));
    } else {
      const Source source = name == "tools" ? Source::tools : Source::from_template;
      out.emplace_back(name, jinja::from_json(value, Origin{-1, source}));
    }
  }
  return out;
}

struct Attempt {
  std::optional<jinja::Output> output;
  std::string error;
};

Attempt attempt(const std::string& text, const std::string& name, const OrderedJson& variables,
                const std::string& date) {
  try {
    return {jinja::Template(text, name).render(with_origins(variables), date), ""};
  } catch (const Error& error) {
    return {std::nullopt, error.what()};
  }
}

// Whether the error begins with NAME:LINE:
bool names_a_line(const std::string& error, const std::string& name) {
  if (!error.starts_with(name + ":")) return false;
  const size_t end = error.find_first_not_of("0123456789", name.size() + 1);
  return end != std::string::npos && end > name.size() + 1 && error[end] == ':';
}

// The pieces cover the text from its first byte to its last.
bool pieces_cover(const jinja::Output& output) {
  size_t end = 0;
  for (const jinja::Piece& piece : output.pieces) {
    if (piece.begin != end || piece.end <= piece.begin) return false;
    end = piece.end;
  }
  return end == output.text.size();
}

// Whether [begin, end) of the text is from message `number` alone but for white space, which a
// template may replace.
bool is_from_message(const jinja::Output& output, size_t begin, size_t end, int number) {
  for (const jinja::Piece& piece : output.pieces) {
    const size_t first = std::max(begin, piece.begin), last = std::min(end, piece.end);
    if (first >= last || piece.origin.message == number) continue;
    if (!strip(std::string_view(output.text).substr(first, last - first)).empty()) return false;
  }
  return true;
}

// Where a message's content stands whole in the output, it is marked as that message's. Left out:
// contents with reasoning, which templates take out to write the markers themselves, and contents
// that the template's text contains, such as "/no_think".
bool contents_are_marked(const jinja::Output& output, const OrderedJson& messages,
                         std::string_view template_text) {
  for (size_t i = 0; i < messages.size(); i++) {
    if (!messages[i]["content"].is_string()) continue;
    const std::string content = messages[i]["content"];
    if (content.size() < 8 || content.find("<think>") != std::string::npos) continue;
    if (template_text.find(content) != std::string_view::npos) continue;
    for (size_t begin = output.text.find(content); begin != std::string::npos;
         begin = output.text.find(content, begin + 1)) {
      if (!is_from_message(output, begin, begin + content.size(), int(i))) return false;
    }
  }
  return true;
}

// The same text in other letters: a to n, b to o, ... z to m.
std::string other_letters(std::string text) {
  for (char& c : text)
    if (c >= 'a' && c <= 'z') c = char('a' + (c - 'a' + 13) % 26);
  return text;
}

OrderedJson other_letters(OrderedJson value) {
  if (value.is_string()) return other_letters(value.get<std::string>());
  if (value.is_structured())
    for (OrderedJson& part : value) part = other_letters(std::move(part));
  return value;
}

// What message i says, in other letters: its content, reasoning and the arguments of its calls.
OrderedJson with_other_letters(OrderedJson variables, size_t i) {
  OrderedJson& message = variables["messages"][i];
  for (const char* key : {"content", "reasoning_content"})
    if (message.contains(key)) message[key] = other_letters(std::move(message[key]));
  if (message.contains("tool_calls")) {
    for (OrderedJson& call : message["tool_calls"]) {
      OrderedJson& arguments = call["function"]["arguments"];
      arguments = other_letters(std::move(arguments));
    }
  }
  return variables;
}

// Whether the bytes that differ between two outputs are all from message `number`.
bool differ_by_message(const jinja::Output& a, const jinja::Output& b, int number) {
  for (const jinja::Piece& piece : a.pieces) {
    const size_t size = piece.end - piece.begin;
    if (piece.origin.message == number) continue;
    if (a.text.compare(piece.begin, size, b.text, piece.begin, size) != 0) return false;
  }
  return true;
}

struct Published {
  std::string name, text;
  std::vector<std::string> outputs;  // of each conversation: the hash, or "error"
};

// The templates of the goldens, as they lie in the folder that $CAKE_TEMPLATES names.
std::vector<Published> read_templates(const fs::path& folder) {
  std::vector<Published> templates;
  const OrderedJson golden = read_golden("chat_templates.json");
  for (const OrderedJson& row : golden["templates"]) {
    const std::string name = row["name"];
    const std::string text = read_file(folder / (name + ".jinja"));
    CAPTURE(name);
    REQUIRE(hex(text) == row["sha256"].get<std::string>());
    templates.push_back({name, text, row["outputs"]});
  }
  return templates;
}

std::optional<fs::path> templates_folder() {
  const char* folder = std::getenv("CAKE_TEMPLATES");
  if (folder && *folder) return folder;
  skip_test("CAKE_TEMPLATES names no folder of templates");
  return std::nullopt;
}

}  // namespace

// What two of the published templates need and few others have.
TEST_CASE("a list with * gives a macro its arguments, and a safe string escapes what is added") {
  const auto render = [](const std::string& text) {
    return jinja::Template(text, "test").render({}, "2026-01-05").text;
  };
  const std::string macro = "{% macro f(a, b, c='-') %}{{ a }}{{ b }}{{ c }}{% endmacro %}";
  CHECK(render(macro + "{{ f(*[1, 2]) }} {{ f(0, *'xy') }} {{ f(*[3], c='!') }}") == "12- 0xy 3!");
  CHECK_THROWS_WITH_AS(render("\n{{ range(*[1], 2) }}"),
                       doctest::Contains("test:2: found \"2\", expected no argument"), Error);
  CHECK(render("{{ '<b>' | safe + '<i>&\"' }}") == "<b>&lt;i&gt;&amp;&#34;");
  CHECK(render("{{ \"'\" + '<b>' | safe }}") == "&#39;<b>");
  CHECK(render("{{ '<' | safe + '>' | safe }}{{ '<' | safe ~ '>' }}") == "<><>");
}

TEST_CASE("published chat templates give what Jinja2 gives, or are refused by name and line") {
  const auto folder = templates_folder();
  if (!folder) return;
  const OrderedJson file = read_golden("chat_conversations.json");
  const std::vector<Case> cases = read_cases(file);
  const std::string date = file["date"];
  int equal = 0, refused = 0;
  for (const Published& published : read_templates(*folder)) {
    REQUIRE(published.outputs.size() == cases.size());
    for (size_t i = 0; i < cases.size(); i++) {
      const Attempt ours = attempt(published.text, published.name, cases[i].variables, date);
      const std::string& expected = published.outputs[i];
      INFO(published.name, ", conversation ", i, " (", cases[i].name, "): ", ours.error);
      if (ours.output) {
        const std::string found = hex(ours.output->text).substr(0, 12);
        CHECK(found == expected);
        equal += found == expected;
      } else {
        CHECK(names_a_line(ours.error, published.name));
        equal += expected == "error";
        refused += expected != "error";
        if (expected != "error") MESSAGE("refused: ", ours.error);
      }
    }
  }
  MESSAGE(equal, " of ", equal + refused, " outputs equal Jinja2's");
  CHECK(refused == 0);
}

TEST_CASE("published chat templates keep the origin of every message's content") {
  const auto folder = templates_folder();
  if (!folder) return;
  const OrderedJson file = read_golden("chat_conversations.json");
  const std::vector<Case> cases = read_cases(file);
  for (const Published& published : read_templates(*folder)) {
    for (size_t i = 0; i < cases.size(); i++) {
      const Attempt ours =
          attempt(published.text, published.name, cases[i].variables, file["date"]);
      if (!ours.output) continue;
      INFO(published.name, ", conversation ", i, " (", cases[i].name, ")");
      CHECK(pieces_cover(*ours.output));
      CHECK(contents_are_marked(*ours.output, cases[i].variables["messages"], published.text));
    }
  }
}

// Marks are tested here without a look at what a template does: whatever changes in the output when
// a message's letters do is from that message. Letters decide on the output's length in few
// templates (that look for a word); such outputs are not compared.
TEST_CASE("what changes with a message's letters is marked as that message's") {
  const auto folder = templates_folder();
  if (!folder) return;
  const OrderedJson file = read_golden("chat_conversations.json");
  const std::vector<Case> cases = read_cases(file);
  int compared = 0;
  for (const Published& published : read_templates(*folder)) {
    for (const Case& c : cases) {
      const Attempt ours = attempt(published.text, published.name, c.variables, file["date"]);
      for (size_t i = 0; ours.output && i < c.variables["messages"].size(); i++) {
        const OrderedJson changed = with_other_letters(c.variables, i);
        const Attempt other = attempt(published.text, published.name, changed, file["date"]);
        if (!other.output || other.output->text.size() != ours.output->text.size()) continue;
        if (other.output->text == ours.output->text) continue;
        INFO(published.name, ", conversation ", c.name, ", message ", i);
        CHECK(differ_by_message(*ours.output, *other.output, int(i)));
        compared++;
      }
    }
  }
  CHECK(compared > 8000);
}

}  // namespace cake
