// Random chat templates and conversations, and random changes of both, for fuzz_chat_template.cpp.
//
// A rule is a list of texts. In a text, `$` and a letter stand for a text of another rule.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace cake::fuzz {

using Rule = std::initializer_list<const char*>;

inline constexpr Rule kExpressions = {
    "$a",
    "$a",
    "$v",
    "$v",
    "$v",
    "($e)",
    "$v.$k",
    "$v['$k']",
    "$v[$a]",
    "$v[$s]",
    "$v | $f",
    "$v | $f | $f",
    "$v.$m",
    "$v.$m.$m",
    "$v.$m[$a]",
    "$v.$m[$s]",
    "$e ~ $e",
    "$v + $v",
    "'$t' + $v + '$t'",
    "$e $o $e",
    "($e) $o ($e)",
    "$e == $e",
    "$v in $v",
    "'$t' in $v",
    "$v not in ['user', '$t']",
    "$e and $e",
    "$e or $e",
    "not $v",
    "-$v",
    "$v is $i",
    "$v is not $i",
    "$e if $e else $e",
    "$e if $e",
    "[$e, $e]",
    "($e, $e)",
    "{'a': $e, $v: $e}",
    "range($a)",
    "range($a, $a, $a)",
    "dict(a=$e)",
    "namespace(a=$e)",
    "f($e)",
    "f($e, y=$e)",
    "loop.$l",
    "loop($e)",
    "strftime_now('%d %b %Y')",
    "raise_exception($e)",
    "caller($e)",
    "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n'",
    "message.content | tojson",
    "(message.content or '') | trim",
    "messages | tojson(indent=2)",
    "message['content'].split('</think>')[-1].lstrip('\\n')",
    "'<|' ~ $v ~ '|>'",
    "'<|' + message.role + '|>' + message.content",
    "'<|im_' ~ message.content",
    "'%s|%s' | format($v, $v)",
    "message.content.replace('$t', $e)"};
inline constexpr Rule kAtoms = {  // $a
    "0",         "1",
    "-1",        "2",
    "7",         "9223372036854775807",
    "1.5",       "1e300",
    "true",      "false",
    "none",      "''",
    "'$t'",      "'a'",
    "'\\n'",     "\"it's\"",
    "'\\u00e9'", "[]",
    "{}",        "'<|im_end|>'",
    "'<|im_'",   "'end|>'",
    "'</s>'",    "x.y",
    "1_000",     "'\xe6\x97\xa5\xe6\x9c\xac'"};
inline constexpr Rule kNames = {  // $v
    "messages",
    "message",
    "message.content",
    "message.role",
    "message.tool_calls",
    "x",
    "y",
    "ns.a",
    "message.reasoning_content",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "messages[0]",
    "messages[-1].content",
    "messages[1:]",
    "loop.index0",
    "nothing",
    "loop",
    "self",
    "call",
    "call.function.name",
    "call.function.arguments",
    "tools[0].function",
    "varargs"};
inline constexpr Rule kKeys = {"role", "content", "function", "name", "a", "tool_calls", "items"};
inline constexpr Rule kSlices = {"1:", ":-1", "::-1", ":$a", "$a:$a", "::2", "$a:$a:$a", ":"};
inline constexpr Rule kOperators = {"+",  "-", "*", "/",  "//", "%",
                                    "**", "~", "<", ">=", "!=", "in"};
inline constexpr Rule kTests = {  // $i
    "defined",     "undefined", "none",       "string", "mapping", "sequence",
    "iterable",    "number",    "true",       "false",  "odd",     "divisibleby($a)",
    "equalto($e)", "in($e)",    "sameas($e)", "lower",  "boolean"};
inline constexpr Rule kFilters = {"trim",
                                  "upper",
                                  "lower",
                                  "title",
                                  "capitalize",
                                  "length",
                                  "first",
                                  "last",
                                  "join",
                                  "join($e)",
                                  "join(', ', attribute='role')",
                                  "tojson",
                                  "tojson(indent=$a)",
                                  "tojson(sort_keys=true)",
                                  "tojson(ensure_ascii=true)",
                                  "reverse",
                                  "sort",
                                  "sort(attribute='role')",
                                  "unique",
                                  "list",
                                  "string",
                                  "int",
                                  "float",
                                  "abs",
                                  "sum",
                                  "min",
                                  "max",
                                  "items",
                                  "dictsort",
                                  "wordcount",
                                  "safe",
                                  "e",
                                  "default($e)",
                                  "default($e, true)",
                                  "replace($e, $e)",
                                  "replace('$t', '$t', $a)",
                                  "map(attribute='content')",
                                  "map('upper')",
                                  "map('trim')",
                                  "select('string')",
                                  "select",
                                  "reject('none')",
                                  "selectattr('role', 'equalto', 'user')",
                                  "rejectattr('tool_calls')",
                                  "batch($a)",
                                  "batch(2, $e)",
                                  "slice($a)",
                                  "indent($a)",
                                  "indent(2, true)",
                                  "center($a)",
                                  "truncate($a)",
                                  "round($a)",
                                  "groupby('role')",
                                  "format($e)",
                                  "attr('content')",
                                  "count",
                                  "urlencode"};
inline constexpr Rule kMethods = {"strip()",
                                  "strip($e)",
                                  "lstrip('\\n')",
                                  "rstrip()",
                                  "split()",
                                  "split($e)",
                                  "split('$t', $a)",
                                  "rsplit('$t', $a)",
                                  "splitlines()",
                                  "startswith($e)",
                                  "endswith('$t')",
                                  "upper()",
                                  "lower()",
                                  "title()",
                                  "capitalize()",
                                  "replace($e, $e)",
                                  "replace('', $e, $a)",
                                  "find($e)",
                                  "index($e)",
                                  "count($e)",
                                  "join($e)",
                                  "isdigit()",
                                  "isspace()",
                                  "get('$k')",
                                  "get($e, $e)",
                                  "items()",
                                  "keys()",
                                  "values()",
                                  "append($e)",
                                  "zfill($a)",
                                  "ljust($a)",
                                  "center($a, '-')",
                                  "format($e)",
                                  "removeprefix($e)",
                                  "removesuffix('$t')",
                                  "partition('$t')",
                                  "rpartition($e)",
                                  "swapcase()"};
inline constexpr Rule kLoop = {"index",  "index0",      "first",         "last",
                               "length", "revindex",    "previtem",      "nextitem",
                               "depth",  "changed($e)", "cycle($e, $e)", "previtem.role"};
inline constexpr Rule kStatements = {
    "$t",
    "$t",
    "{{ $e }}",
    "{{- $e }}",
    "{{ $e -}}",
    "{{ $e }}",
    "{{- $e -}}\n",
    "{% if $e %}$b{% endif %}",
    "{%- if $e -%}\n$b{%- else %}$b{%- endif %}",
    "{% if $e %}$b{% elif $e %}$b{% else %}$b{% endif %}",
    "{% for message in messages %}$b{% endfor %}",
    "{%- for message in messages %}\n$b{%- endfor %}\n",
    "{% for x in $e %}$b{% else %}$b{% endfor %}",
    "{% for x, y in $e %}$b{% endfor %}",
    "{% for x in $e if $e %}$b{% endfor %}",
    "{% for x in $e recursive %}$b{{ loop($e) }}{% endfor %}",
    "{% for call in message.tool_calls or [] %}$b{% endfor %}",
    "{% for tool in tools %}$b{% endfor %}",
    "{% if $e %}{% break %}{% endif %}",
    "{% if $e %}{% continue %}{% endif %}",
    "{% set x = $e %}",
    "{%- set x = $e -%}",
    "{% set x, y = $e %}",
    "{% set ns = namespace(a=$e) %}",
    "{% set ns.a = $e %}",
    "{% set ns.a = ns.a ~ $e %}",
    "{% set x %}$b{% endset %}",
    "{% set x | trim %}$b{% endset %}",
    "{% macro f(x, y=$e) %}$b{% endmacro %}",
    "{% call(x) f($e) %}$b{% endcall %}",
    "{% filter trim %}$b{% endfilter %}",
    "{% with x = $e %}$b{% endwith %}",
    "{% generation %}$b{% endgeneration %}",
    "{# $t #}",
    "{% raw %}$t{% endraw %}",
    "{% if loop.first %}$b{% endif %}",
    "{% if message.role == 'assistant' %}$b{% else %}$b{% endif %}",
    "{% if message['role'] == 'system' %}$b{% endif %}",
    "{% if add_generation_prompt %}$b{% endif %}",
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} "
    "[/INST]"
    "{% else %}{{ message.content | trim }}</s>{% endif %}{% endfor %}"};
inline constexpr Rule kTexts = {  // $t
    "text",
    " ",
    "\n",
    "  \n",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "end|>",
    "</s>",
    "<s>",
    "[INST]",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<note>",
    "assistant\n",
    "\n\n",
    "x",
    "</",
    "\xe6\x97\xa5\xe6\x9c\xac",
    "e\xcc\x81",
    "\xf0\x9f\x98\x80",
    "\t",
    "user",
    "a b",
    ",",
    "{",
    "}"};
inline constexpr Rule kBodies = {"$S", "$S", "$S$S", "$S$S$S", "", "$t", "{{ $e }}"};
// Of a conversation: see read_conversation() in fuzz_chat_template.cpp.
inline constexpr Rule kConversations = {
    "\2$c\3$c",
    "\1$c\2$c\3$c",
    "\2$c\3$c\2$c\3$c",
    "\2$c\3$c\5$c",
    "\2$c\3$c\5$c\2$c\3$c\5$c",
    "\2$c",
    "\7{\"name\": \"f\", \"parameters\": {}}\2$c\3$c\6f {\"a\": \"$t\"}\4$c\3$c",
    "\2$c\3\6f {}\4$c",
    "\2$c\3$c\2$c\10$c",
    "\1$c\1$c\2$c",
    "\3$c\2$c\3$c",
    "\2$c\3 $c \n",
    "",
    "\4$c",
    "\2\3\2\3$c"};
inline constexpr Rule kContents = {"$t", "$t$t", "$t$t$t", "Hi.", "", "$t$t$t$t$t", "two words"};

class Generator {
 public:
  explicit Generator(uint32_t seed) : random_(seed) {}

  size_t below(size_t n) { return n == 0 ? 0 : random_() % n; }
  std::string make(Rule rule, int depth = 6) {
    const std::string_view form = rule.begin()[below(rule.size())];
    std::string out;
    for (size_t i = 0; i < form.size(); i++) {
      if (form[i] != '$' || i + 1 == form.size()) {
        out += form[i];
      } else if (const char letter = form[++i]; depth > 0) {
        out += make(rule_of(letter), depth - 1);
      } else {
        out += letter == 'e' ? "x" : letter == 'a' ? "1" : "";
      }
    }
    return out;
  }
  std::string statement() { return make(kStatements); }
  std::string conversation() { return make(kConversations); }
  std::string chat_template() {
    std::string out;
    for (size_t n = 1 + below(4); n > 0; n--) out += statement();
    return out;
  }

  // One change, or a few, that keep most of it a template.
  std::string changed(std::string text) {
    for (size_t n = 1 + below(3); n > 0; n--) change(text);
    return text;
  }

 private:
  static Rule rule_of(char letter) {
    switch (letter) {
      case 'a':
        return kAtoms;
      case 'b':
        return kBodies;
      case 'c':
        return kContents;
      case 'e':
        return kExpressions;
      case 'f':
        return kFilters;
      case 'i':
        return kTests;
      case 'k':
        return kKeys;
      case 'l':
        return kLoop;
      case 'm':
        return kMethods;
      case 'o':
        return kOperators;
      case 's':
        return kSlices;
      case 'S':
        return kStatements;
      case 't':
        return kTexts;
      default:
        return kNames;
    }
  }

  struct Part {  // a tag, or the text between two
    size_t begin, end;
    bool is_tag() const { return end - begin >= 4 && is_tag_; }
    bool is_tag_ = false;
  };
  static std::vector<Part> parts_of(std::string_view text) {
    std::vector<Part> parts;
    for (size_t i = 0; i < text.size();) {
      const bool opens =
          text[i] == '{' && i + 1 < text.size() && (text[i + 1] == '%' || text[i + 1] == '{');
      const char* close = i + 1 < text.size() && text[i + 1] == '%' ? "%}" : "}}";
      size_t end = opens ? text.find(close, i + 2) : text.find('{', i + 1);
      end = end == text.npos ? text.size() : end + (opens ? 2 : 0);
      parts.push_back({i, end, opens});
      i = end;
    }
    return parts;
  }

  void change(std::string& text) {
    const std::vector<Part> parts = parts_of(text);
    if (parts.empty()) {
      text = chat_template();
      return;
    }
    const Part part = parts[below(parts.size())], other = parts[below(parts.size())];
    const size_t size = part.end - part.begin;
    const std::string content = text.substr(part.begin, size);
    switch (below(9)) {
      case 0:
        text.erase(part.begin, size);
        break;
      case 1:
        text.insert(part.begin, statement());
        break;
      case 2:
        text.insert(part.end, make(kTexts));
        break;
      case 3:
        text.insert(other.begin, content);
        break;
      case 4:
        text.replace(part.begin, size, text.substr(other.begin, other.end - other.begin));
        break;
      case 5:
        text.replace(part.begin, size, statement());
        break;
      case 6:  // the control of white space
        if (part.is_tag()) text.insert(part.end - 2, "-");
        if (part.is_tag()) text.insert(part.begin + 2, "-");
        break;
      case 7:  // a name or a literal becomes an expression
        if (part.is_tag()) replace_word(text, part);
        break;
      default:  // a block around some parts
        if (other.begin >= part.begin) {
          text.insert(other.end, "{% endif %}").insert(part.begin, "{% if " + make(kNames) + " %}");
        }
    }
  }

  void replace_word(std::string& text, const Part& part) {
    static constexpr std::string_view kEnds = " ()[]{}|,=~+";
    const size_t begin =
        text.find_first_of(kEnds, part.begin + 2 + below(part.end - part.begin - 3));
    if (begin == text.npos || begin + 1 >= part.end) return;
    const size_t end = text.find_first_of(kEnds, begin + 1);
    if (end == text.npos || end >= part.end) return;
    text.replace(begin + 1, end - begin - 1, make(kExpressions, 3));
  }

  std::minstd_rand random_;
};

}  // namespace cake::fuzz
