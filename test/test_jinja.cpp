// Jinja: what Jinja2 (3.1, set up as transformers does) makes of the same templates, where the
// parts of a text are from, errors with their lines, limits.
#include "cake/jinja.h"

#include <doctest/doctest.h>

#include <string>
#include <thread>
#include <vector>

#include "cake/chatml.h"
#include "cake/json.h"
#include "cake/run.h"

using namespace cake;
using jinja::Source;

namespace {

constexpr const char* kDate = "2026-11-27";

// The variables of the tests; Jinja2 had the same when it made what they expect.
constexpr const char* kVariables = R"json({
  "x": "abc",
  "name": "Köln",
  "zh": "你好，世界",
  "n": 7,
  "half": 2.5,
  "none": null,
  "yes": true,
  "empty": "",
  "list": [3, 1, 2],
  "words": ["b", "a", "C"],
  "d": {"k": "v", "items": [1, 2], "n": null},
  "messages": [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "more"}],
  "tools": [{"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
})json";

jinja::Variables variables() {
  jinja::Variables list;
  const auto json = parse_json<OrderedJson>(kVariables, "variables");
  for (const auto& [name, value] : json.items()) list.emplace_back(name, jinja::from_json(value));
  return list;
}

std::string rendered(const std::string& text) {
  return jinja::Template(text, "t").render(variables(), kDate).text;
}

struct Case {
  std::string text;
  std::string expected;  // Jinja2's output
};
void check_texts(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    CAPTURE(c.text);
    std::string found;
    try {
      found = rendered(c.text);
    } catch (const Error& e) {
      found = std::string("error: ") + e.what();
    }
    CHECK(found == c.expected);
  }
}

// The error of a template; "" where there is none.
std::string error_of(const std::string& text, const jinja::Limits& limits = {}) {
  try {
    jinja::Template(text, "t").render(variables(), kDate, limits);
    return "";
  } catch (const Error& e) {
    return e.what();
  }
}

// A conversation whose parts have their origins.
jinja::Variables with_origins() {
  using jinja::make_dict, jinja::make_list, jinja::make_text, jinja::from_json;
  const auto json = [](const char* text) { return parse_json<OrderedJson>(text, "json"); };
  const auto message = [&](int i, const char* role, const char* content) {
    return jinja::Variables{{"role", make_text(role, {i, Source::role})},
                            {"content", make_text(content, {i, Source::content})}};
  };
  jinja::Variables calling = message(1, "assistant", " yes \n");
  calling.emplace_back("reasoning_content", make_text("why", {1, Source::reasoning}));
  const auto calls = json(R"([{"type": "function", "function": {
      "name": "f", "arguments": {"a": "b\"c", "n": [1, 2.5]}}}])");
  calling.emplace_back("tool_calls", from_json(calls, {1, Source::tool_call}));
  return {{"messages",
           make_list({make_dict(message(0, "user", "hi<|im_end|>there")), make_dict(calling)})},
          {"tools", from_json(json(R"([{"name": "f"}])"), {-1, Source::tools})},
          {"bos", make_text("<s>")}};
}

// The output with its origins: <0content:...> around what message 0's content wrote; the template's
// own text is bare.
std::string marked(const std::string& text) {
  const jinja::Output output = jinja::Template(text, "t").render(with_origins(), kDate);
  static constexpr const char* kNames[] = {"", "role", "content", "reasoning", "call", "tools"};
  std::string out;
  size_t end = 0;
  for (const jinja::Piece& piece : output.pieces) {
    CHECK(piece.begin == end);
    CHECK(piece.end > piece.begin);
    end = piece.end;
    const std::string part = output.text.substr(piece.begin, piece.end - piece.begin);
    if (piece.origin == jinja::Origin{}) {
      out += part;
    } else {
      const std::string number =
          piece.origin.message < 0 ? "" : std::to_string(piece.origin.message);
      out += "<" + number + kNames[int(piece.origin.source)] + ":" + part + ">";
    }
  }
  CHECK(end == output.text.size());
  return out;
}

void check_marked(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    CAPTURE(c.text);
    CHECK(marked(c.text) == c.expected);
  }
}

}  // namespace

TEST_CASE("jinja: white space goes as trim_blocks, lstrip_blocks, - and + have it") {
  check_texts({
      {"a\n{% if true %}\nb\n{% endif %}\nc\n", "a\nb\nc"},
      {"a\n  {% if true %}  \n  b\n  {% endif %}  c", "a\n  \n  b\n  c"},
      {"a  {% if true %} b {% endif %} c", "a   b  c"},
      {"  {{ x }}\n  {{- x }}  {{ x -}}  \n d", "  abcabc  abcd"},
      {"a\n  {%- if true -%}\n  b  \n  {%- endif -%}\n  c", "abc"},
      {"a\n  {%+ if true +%}\n  b\n  {%+ endif %}\nc", "a\n  \n  b\n  c"},
      {"a\n  {# comment #}\nb {#- c -#} d\n  {#+ e +#}\nf", "a\nbd\n  \nf"},
      {"{# a\nb #}\n\n{% set y = 1 %}\n\n{{ y }}\n\n", "\n\n1\n"},
      {"a\r\nb\rc{% if true %}\r\nd{% endif %}\r\n", "a\nb\ncd"},
      {"{% for m in messages %}\n  {% if loop.first %}\n  {{ m.role }}\n  {% endif %}\n{% endfor "
       "%}",
       "  system\n"},
      {"{{ '{{' }}{{ '%}' }}{{ {'a': {'b': 1}}.a.b }}", "{{%}1"},
  });
}

TEST_CASE("jinja: expressions have Python's values") {
  check_texts({
      {"{{ 7 // 2 }}", "3"},
      {"{{ -7 // 2 }}", "-4"},
      {"{{ 7 % 3 }}", "1"},
      {"{{ -7 % 3 }}", "2"},
      {"{{ 7 / 2 }}", "3.5"},
      {"{{ 7.5 // 2 }}", "3.0"},
      {"{{ -7.5 % 2 }}", "0.5"},
      {"{{ 1 + 2 * 3 - 4 }}", "3"},
      {"{{ -n + 1 }}", "-6"},
      {"{{ n - 1 - 1 }}", "5"},
      {"{{ (n + 1) % 2 == 0 }}", "True"},
      {"{{ 1.0 }}", "1.0"},
      {"{{ 0.1 + 0.2 }}", "0.30000000000000004"},
      {"{{ 1e20 }}", "1e+20"},
      {"{{ 1e-5 }}", "1e-05"},
      {"{{ 123456789.0 * 10 }}", "1234567890.0"},
      {"{{ 1e16 }}", "1e+16"},
      {"{{ 2.5e3 }}", "2500.0"},
      {"{{ 1_000 }}", "1000"},
      {"{{ 1 == 1.0 }}", "True"},
      {"{{ true == 1 }}", "True"},
      {"{{ 'a' == 'a' }}", "True"},
      {"{{ 1 == '1' }}", "False"},
      {"{{ [1, 2] == [1, 2] }}", "True"},
      {"{{ [1] == (1,) }}", "False"},
      {"{{ none == false }}", "False"},
      {"{{ 1 < 2 }}", "True"},
      {"{{ 2 <= 2 < 3 }}", "True"},
      {"{{ 3 > 2 > 2 }}", "False"},
      {"{{ 'a' < 'b' }}", "True"},
      {"{{ 'B' < 'a' }}", "True"},
      {"{{ [1, 2] < [1, 3] }}", "True"},
      {"{{ n != 7 }}", "False"},
      {"{{ 2 >= 3 }}", "False"},
      {"{{ 'b' in x }}", "True"},
      {"{{ 'z' not in x }}", "True"},
      {"{{ 1 in list }}", "True"},
      {"{{ 'k' in d }}", "True"},
      {"{{ 'v' in d }}", "False"},
      {"{{ '' in x }}", "True"},
      {"{{ not 'a' in x }}", "False"},
      {"{{ 4 in (1, 4) }}", "True"},
      {"{{ x ~ 1 ~ none ~ 2.0 ~ undef ~ yes }}", "abc1None2.0True"},
      {"{{ 'a' ~ (1 + 2) }}", "a3"},
      {"{{ 'a' + 'b' * 3 }}", "abbb"},
      {"{{ [1] + [2] }}", "[1, 2]"},
      {"{{ empty or 'x' }}", "x"},
      {"{{ n and x }}", "abc"},
      {"{{ none or 0 }}", "0"},
      {"{{ 0 or none }}", "None"},
      {"{{ not n }}", "False"},
      {"{{ not not empty }}", "False"},
      {"{{ 1 and 0 or 5 }}", "5"},
      {"{{ 'a' if n > 3 else 'b' }}", "a"},
      {"{{ 'a' if empty }}| {{ 1 if 0 else 2 if 0 else 3 }}", "| 3"},
      {"{{ ('a' if yes else 'b') ~ 'c' }}", "ac"},
      {"{{ (1, 2) }}", "(1, 2)"},
      {"{{ (1,) }}", "(1,)"},
      {"{{ () }}", "()"},
      {"{{ [1, 'a', none, true, 1.5] }}", "[1, 'a', None, True, 1.5]"},
      {"{{ {'a': 1, 2: 'b'} }}", "{'a': 1, 2: 'b'}"},
      {"{{ 1, 2 }}", "(1, 2)"},
      {"{{ list[0] }}", "3"},
      {"{{ list[-1] }}", "2"},
      {"{{ list[5] is defined }}", "False"},
      {"{{ d['k'] }}", "v"},
      {"{{ d.k }}", "v"},
      {"{{ x[1] }}", "b"},
      {"{{ zh[0] }}", "你"},
      {"{{ zh[-1] }}", "界"},
      {"{{ messages[1]['content'] }}", "hi"},
      {"{{ list.0 }}", "3"},
      {"{{ list[1:] }}", "[1, 2]"},
      {"{{ list[:1] }}", "[3]"},
      {"{{ list[::-1] }}", "[2, 1, 3]"},
      {"{{ list[-2:] }}", "[1, 2]"},
      {"{{ x[1:] }}", "bc"},
      {"{{ x[:-1] }}", "ab"},
      {"{{ x[::-1] }}", "cba"},
      {"{{ zh[1:3] }}", "好，"},
      {"{{ zh[::-1] }}", "界世，好你"},
      {"{{ x[5:] }}| {{ x[-9:2] }}", "| ab"},
      {"{{ x[::2] }}", "ac"},
      {"{{ x[-1:0:-1] }}", "cb"},
      {"{{ \"a\\n\\t\\\"\\\\\\x41\\u4f60\\U0001F600\\q\" }} {{ 'it\\'s' }} {{ 'a' 'b' }} {{ 'a\nb' "
       "}}",
       "a\n\t\"\\A你😀\\q it's ab a\nb"},
      {"{{ 'a' is string and 1 is number }}", "True"},
      {"{{ not x is none }}", "True"},
      {"{{ x is not none }}", "True"},
      {"{{ n is divisibleby 7 }}", "True"},
      {"{{ 1 + 1 is number }}", "2"},
  });
}

TEST_CASE("jinja: what is printed is what Python's str makes of it") {
  check_texts({
      {"{{ none }}", "None"},
      {"{{ true }}", "True"},
      {"{{ 1 }}", "1"},
      {"{{ 1.5 }}", "1.5"},
      {"{{ undef }}| {{ ['it\\'s', 'a\"b', 'a\\n\\\\', '\\x00é'] }}",
       "| [\"it's\", 'a\"b', 'a\\n\\\\', '\\x00é']"},
      {"{{ {'k': none} }}", "{'k': None}"},
      {"{{ [[1], (2,)] }}", "[[1], (2,)]"},
      {"{{ d }}", "{'k': 'v', 'items': [1, 2], 'n': None}"},
      {"{% set ns = namespace(a=1) %}{% set ns.b = 'x' %}{{ ns.a }}{{ ns.b }}{{ ns.c }}| {{ ns.c "
       "is defined }}",
       "1x| False"},
  });
}

TEST_CASE("jinja: what is undefined is empty, false and no error until something is asked of it") {
  check_texts({
      {"{{ undef }}|{{ d.undef }}|{{ undef is defined }}", "||False"},
      {"{{ d.undef is undefined }}", "True"},
      {"{{ d['n'] is defined }}", "True"},
      {"{{ undef is none }}", "False"},
      {"{% for a in undef %}x{% else %}none{% endfor %} {{ undef | length }} {{ undef | "
       "default('d') }} {{ empty | default('d') }}| {{ empty | default('d', true) }} {{ none | "
       "default('d') }} {{ none | default('d', boolean=true) }}",
       "none 0 d | d None d"},
      {"{{ undef == undef2 }}", "True"},
      {"{{ undef != 1 }}", "True"},
      {"{{ 'a' in undef }}", "False"},
      {"{{ undef | trim }}| {{ undef | string }}| {{ undef | list }}", "| | []"},
      {"{{ undef | join(',') }}", ""},
      {"{% if undef %}a{% elif d.k.undef %}b{% else %}c{% endif %} {{ (undef or 'e') }} {{ x.undef "
       "is defined }} {{ n.undef is defined }} {{ none.undef is defined }}",
       "c e False False False"},
      {"{{ undef is string }}", "False"},
      {"{{ undef is mapping }}", "False"},
      {"{{ undef is iterable }}", "True"},
      {"{{ undef is sequence }}", "True"},
      {"{{ undef is false }}", "False"},
  });
}

TEST_CASE("jinja: scopes are Jinja2's: a for has its own, an if has none") {
  check_texts({
      {"{% set y = 1 %}{% for m in list %}{{ y }}{% set y = m %}{{ y }} {% endfor %}{{ y }}",
       "13 11 12 1"},
      {"{% for m in list %}{% if loop.first %}{% set q = m %}{% endif %}{{ q }},{% endfor %}{{ q "
       "}}",
       "3,,,"},
      {"{% if true %}{% set y = 2 %}{% endif %}{{ y }} {% if false %}{% set x = 3 %}{% endif %}{{ "
       "x }}",
       "2 abc"},
      {"{% set ns = namespace(i=0, found=false) %}{% for m in messages %}{% if m.role == 'user' "
       "%}{% set ns.i = ns.i + 1 %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.i }}{{ "
       "ns.found }}",
       "2True"},
      {"{% set a, b = 1, 2 %}{{ a }}{{ b }} {% set (c, e) = (b, a) %}{{ c }}{{ e }} {% set t = 1, "
       "2 %}{{ t }}",
       "12 21 (1, 2)"},
      {"{% set block %}\n a {{ x }}\n{% endset %}[{{ block }}] {% set up | upper | trim %} b {% "
       "endset %}[{{ up }}]",
       "[ a abc\n] [B]"},
      {"{% set y = 1 %}{% set z %}{% set y = 2 %}{{ y }}{% endset %}{{ y }}{{ z }}", "12"},
      {"{% macro m() %}{{ late }}{{ x }}{% set x = 'in' %}{{ x }}{% endmacro %}{% set late = 'L' "
       "%}{{ m() }}{{ x }}",
       "Labcinabc"},
      {"{% for x in list %}{{ x }}{% endfor %}{{ x }} {% for i in list %}{% for i in words %}{{ i "
       "}}{% endfor %}{{ i }}{% endfor %}",
       "312abc baC3baC1baC2"},
      {"{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}", "inabc"},
  });
}

TEST_CASE("jinja: loops know where they are, and break, continue, filter and else") {
  check_texts({
      {"{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ "
       "loop.revindex0 }}{{ loop.length }}{% if loop.first %}F{% endif %}{% if loop.last %}L{% "
       "endif %} {% endfor %}",
       "10434F 21324 32214 43104L "},
      {"{% for m in messages %}{% if loop.previtem is defined %}<{{ loop.previtem.role }}{% endif "
       "%} {{ m.role }} {% if loop.nextitem is defined %}>{{ loop.nextitem.role }}{% endif %};{% "
       "endfor %}",
       " system >user;<system user >assistant;<user assistant >user;<assistant user ;"},
      {"{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %} {% "
       "for m in messages if m.role == 'z' %}a{% else %}none{% endfor %}",
       "1hi2more none"},
      {"{% for m in list %}{% if m == 1 %}{% continue %}{% endif %}{{ m }}{% endfor %} {% for m in "
       "list %}{% if m == 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
       "32 3"},
      {"{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %} {% for k in d %}{{ k }}{% endfor "
       "%} {% for c in zh %}{{ c }}.{% endfor %} {% for a, b in [(1, 2), [3, 4]] %}{{ a + b }}{% "
       "endfor %}",
       "k=v;items=[1, 2];n=None; kitemsn 你.好.，.世.界. 37"},
      {"{% for i in range(3) %}{{ i }}{% endfor %} {% for i in range(5, 1, -2) %}{{ i }}{% endfor "
       "%} {% for i in range(2, 4) %}{{ i }}{% endfor %} {{ range(3) | list }}",
       "012 53 23 [0, 1, 2]"},
      {"{% for a in list %}{% for b in words %}{{ loop.index }}{% if loop.last %}{% break %}{% "
       "endif %}{% endfor %}{{ loop.index }} {% endfor %}",
       "1231 1232 1233 "},
      {"{% for m in messages[1:] %}{{ m.role }} {% endfor %}{% for m in messages[::-1] %}{{ "
       "m.content }}{% endfor %}",
       "user assistant user more yes hiS"},
  });
}

TEST_CASE("jinja: macros have defaults, names, depth and text as their value") {
  check_texts({
      {"{% macro m(a, b='B', c=a ~ 'c') %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, "
       "2) }}{{ m(b=3, a=4) }}{{ m() }}{{ m(1, c=5) }}",
       "[1B1c][121c][434c][Bc][1B5]"},
      {"{% macro fact(k) %}{% if k > 1 %}{{ k * (fact(k - 1) | int) }}{% else %}1{% endif %}{% "
       "endmacro %}{{ fact(5) }}",
       "120"},
      {"{%- macro type(p) -%}\n  {%- if p.type == 'object' -%}\n    {{- '{' }}{% for k, v in "
       "p.properties.items() %}{{ k }}: {{ type(v) }}{% endfor %}{{- '}' }}\n  {%- else -%}\n    "
       "{{- p.type -}}\n  {%- endif -%}\n{%- endmacro -%}\n{{ type(tools[0].function.parameters) "
       "}}",
       "{city: string}"},
      {"{% macro m() %} a {% endmacro %}{{ m() | trim ~ '!' }} {{ m() | length }} {% set t = m() "
       "%}[{{ t }}]",
       "a! 3 [ a ]"},
  });
}

TEST_CASE("jinja: filters are Jinja2's") {
  check_texts({
      {"{{ '  a b ' | trim }}| {{ '--a-' | trim('-') }}", "a b| a"},
      {"{{ 'aBc' | upper }}", "ABC"},
      {"{{ 'aBc' | lower }}", "abc"},
      {"{{ 'aBC dE' | capitalize }}", "Abc de"},
      {"{{ 'aB cD-eF' | title }}", "Ab Cd-Ef"},
      {"{{ name | upper }}", "KÖLN"},
      {"{{ 'ÀÉя' | lower }}", "àéя"},
      {"{{ zh | length }}", "5"},
      {"{{ list | length }}", "3"},
      {"{{ d | length }}", "3"},
      {"{{ words | join('-') }}", "b-a-C"},
      {"{{ list | join }}", "312"},
      {"{{ messages | join('/', attribute='role') }}", "system/user/assistant/user"},
      {"{{ [1, none, 'a'] | join(', ') }}", "1, None, a"},
      {"{{ list | first }}", "3"},
      {"{{ list | last }}", "2"},
      {"{{ [] | first is defined }}", "False"},
      {"{{ list | sort }}", "[1, 2, 3]"},
      {"{{ words | sort }}", "['a', 'b', 'C']"},
      {"{{ words | sort(reverse=true) }}", "['C', 'b', 'a']"},
      {"{{ messages | sort(attribute='content') | map(attribute='content') | list }}",
       "[' yes ', 'hi', 'more', 'S']"},
      {"{{ list | min }}", "1"},
      {"{{ list | max }}", "3"},
      {"{{ [1, 1, 'a', 'A'] | unique | list }}", "[1, 'a']"},
      {"{{ list | reverse | list }}", "[2, 1, 3]"},
      {"{{ 'abc' | reverse }}", "cba"},
      {"{{ 'abc' | list }}", "['a', 'b', 'c']"},
      {"{{ d | list }}", "['k', 'items', 'n']"},
      {"{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
       "['hi', 'more']"},
      {"{{ messages | rejectattr('role', 'equalto', 'user') | list | length }}", "2"},
      {"{{ messages | selectattr('tool_calls') | list }}", "[]"},
      {"{{ messages | selectattr('content', 'defined') | list | length }}", "4"},
      {"{{ messages | selectattr('role', 'in', ['system']) | list | length }}", "1"},
      {"{{ words | map('upper') | join(' ') }}", "B A C"},
      {"{{ words | select('equalto', 'a') | list }}", "['a']"},
      {"{{ words | reject('equalto', 'a') | list }}", "['b', 'C']"},
      {"{{ [0, 1, none] | select | list }}", "[1]"},
      {"{{ messages | map(attribute='undef', default='-') | join }}", "----"},
      {"{{ none | selectattr('a') | list }}", "[]"},
      {"{{ none | map('upper') | list }}", "[]"},
      {"{{ 'yes' if [] | map('upper') else 'no' }}", "yes"},
      {"{{ d | items | list }}", "[('k', 'v'), ('items', [1, 2]), ('n', None)]"},
      {"{{ {'b': 1, 'a': 2, 'C': 0} | dictsort }}", "[('a', 2), ('b', 1), ('C', 0)]"},
      {"{{ {'b': 1, 'a': 2} | dictsort(by='value') }}", "[('b', 1), ('a', 2)]"},
      {"{{ '42' | int + 1 }}", "43"},
      {"{{ '4.7' | int }}", "4"},
      {"{{ 'a' | int }}", "0"},
      {"{{ 'a' | int(-1) }}", "-1"},
      {"{{ 3.9 | int }}", "3"},
      {"{{ '1.5' | float }}", "1.5"},
      {"{{ 3 | string ~ 1 }}", "31"},
      {"{{ 'a-b-c' | replace('-', '+') }}", "a+b+c"},
      {"{{ 'aaa' | replace('a', 'b', 2) }}", "bba"},
      {"{{ '%s is %d' | format('x', 3) }}", "x is 3"},
      {"{{ 'a\nb\n\nc' | indent }}", "a\n    b\n\n    c"},
      {"{{ 'a\nb' | indent(2, first=true) }}", "  a\n  b"},
      {"{{ -3 | abs }}", "3"},
  });
}

TEST_CASE("jinja: methods are Python's") {
  check_texts({
      {"{{ 'a,b,,c'.split(',') }}", "['a', 'b', '', 'c']"},
      {"{{ ' a  b '.split() }}", "['a', 'b']"},
      {"{{ 'a,b,c'.split(',', 1) }}", "['a', 'b,c']"},
      {"{{ 'a</t>b'.split('</t>')[-1] }}", "b"},
      {"{{ 'a\nb\n'.splitlines() }}", "['a', 'b']"},
      {"{{ ''.split(',') }}", "['']"},
      {"{{ ''.split() }}", "[]"},
      {"[{{ ' \n a \n'.strip() }}] [{{ '\n\na\n'.lstrip('\n') }}] [{{ 'a\n\n'.rstrip('\n') }}] [{{ "
       "'xyaxy'.strip('yx') }}] [{{ '\u3000a\u00a0'.strip() }}] [{{ ' a '.lstrip() }}] [{{ ' a "
       "'.rstrip() }}]",
       "[a] [a\n] [a] [a] [a] [a ] [ a]"},
      {"{{ 'abc'.startswith('ab') }}", "True"},
      {"{{ 'abc'.endswith('bc') }}", "True"},
      {"{{ 'abc'.startswith(('x', 'a')) }}", "True"},
      {"{{ 'aXa'.replace('a', 'b') }}", "bXb"},
      {"{{ 'aXa'.replace('a', 'b', 1) }}", "bXa"},
      {"{{ 'ab'.upper() }}", "AB"},
      {"{{ 'AB'.lower() }}", "ab"},
      {"{{ 'ab cd'.title() }}", "Ab Cd"},
      {"{{ 'ab CD'.capitalize() }}", "Ab cd"},
      {"{{ zh.find('世') }}", "3"},
      {"{{ 'abc'.find('z') }}", "-1"},
      {"{{ 'aba'.count('a') }}", "2"},
      {"{{ '-'.join(words) }}", "b-a-C"},
      {"{{ '{}-{}'.format(1, 'a') }}", "1-a"},
      {"{{ '{0}{1}{0} {k}'.format('a', 'b', k=1) }}", "aba 1"},
      {"{{ d.get('k') }}", "v"},
      {"{{ d.get('z') }}", "None"},
      {"{{ d.get('z', 'e') }}", "e"},
      {"{{ d.keys() | list }}", "['k', 'items', 'n']"},
      {"{{ d.values() | list }}", "['v', [1, 2], None]"},
      {"{{ d.items() | list }}", "[('k', 'v'), ('items', [1, 2]), ('n', None)]"},
      {"{{ d.items is defined }}", "True"},
      {"{{ d['items'] }}", "[1, 2]"},
      {"{{ list.index(1) }}", "1"},
      {"{{ list.count(3) }}", "1"},
      {"{{ 'role' in messages[0].keys() }}", "True"},
      {"{{ '%s' % x }}", "abc"},
      {"{{ '%s-%s' % (1, 'b') }}", "1-b"},
      {"{{ 'x' * 3 }}", "xxx"},
  });
}

TEST_CASE("jinja: tests are Jinja2's") {
  check_texts({
      {"{{ x is string }}", "True"},
      {"{{ n is string }}", "False"},
      {"{{ n is number }}", "True"},
      {"{{ yes is number }}", "True"},
      {"{{ n is integer }}", "True"},
      {"{{ yes is integer }}", "False"},
      {"{{ half is float }}", "True"},
      {"{{ d is mapping }}", "True"},
      {"{{ list is mapping }}", "False"},
      {"{{ list is iterable }}", "True"},
      {"{{ n is iterable }}", "False"},
      {"{{ x is iterable }}", "True"},
      {"{{ list is sequence }}", "True"},
      {"{{ d is sequence }}", "True"},
      {"{{ none is sequence }}", "False"},
      {"{{ (1,) is sequence }}", "True"},
      {"{{ words | map('upper') is iterable }}", "True"},
      {"{{ yes is true }}", "True"},
      {"{{ 1 is true }}", "False"},
      {"{{ yes is boolean }}", "True"},
      {"{{ n is boolean }}", "False"},
      {"{{ false is false }}", "True"},
      {"{{ none is none }}", "True"},
      {"{{ 0 is none }}", "False"},
      {"{{ none is not none }}", "False"},
      {"{{ undef is not defined }}", "True"},
      {"{{ n is odd }}", "True"},
      {"{{ n is even }}", "False"},
      {"{{ n is eq 7 }}", "True"},
      {"{{ n is ne(7) }}", "False"},
      {"{{ n is gt(3) }}", "True"},
      {"{{ 'a' is in(['a']) }}", "True"},
      {"{{ raise_exception is callable }}", "True"},
      {"{{ none is sameas none }}", "True"},
  });
}

TEST_CASE("jinja: tojson writes what Python's json.dumps does") {
  check_texts({
      {"{{ tools | tojson }}",
       "[{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"type\": "
       "\"object\", \"properties\": {\"city\": {\"type\": \"string\"}}, \"required\": "
       "[\"city\"]}}}]"},
      {"{{ 'é\"\\\\\\n\\t\\x01\\x7f/<&>\\'你' | tojson }}",
       "\"é\\\"\\\\\\n\\t\\u0001\177/<&>'你\""},
      {"{{ [1, 2.0, 1e20, true, none, 'a'] | tojson }}", "[1, 2.0, 1e+20, true, null, \"a\"]"},
      {"{{ {} | tojson }}", "{}"},
      {"{{ [] | tojson }}", "[]"},
      {"{{ (1, 'b') | tojson }}", "[1, \"b\"]"},
      {"{{ {1: 2, none: 3, true: 4} | tojson }}", "{\"1\": 4, \"null\": 3}"},
      {"{{ tools[0] | tojson(indent=2) }}",
       "{\n  \"type\": \"function\",\n  \"function\": {\n    \"name\": \"f\",\n    \"parameters\": "
       "{\n      \"type\": \"object\",\n      \"properties\": {\n        \"city\": {\n          "
       "\"type\": \"string\"\n        }\n      },\n      \"required\": [\n        \"city\"\n      "
       "]\n    }\n  }\n}"},
      {"{{ {'a': {}, 'b': [[]]} | tojson(indent=4) }}",
       "{\n    \"a\": {},\n    \"b\": [\n        []\n    ]\n}"},
      {"{{ {'b': 1, 'a': zh} | tojson(sort_keys=true, ensure_ascii=true) }}",
       "{\"a\": \"\\u4f60\\u597d\\uff0c\\u4e16\\u754c\", \"b\": 1}"},
      {"{{ '😀' | tojson(ensure_ascii=True) }}", "\"\\ud83d\\ude00\""},
      {"{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}", "{\"a\":[1,2]}"},
  });
}

TEST_CASE("jinja: dates and numbers come as strftime and Python write them") {
  check_texts({
      {"{{ strftime_now('%d %b %Y') }}", "27 Nov 2026"},
      {"{{ strftime_now('%Y-%m-%d') }}", "2026-11-27"},
      {"{{ strftime_now('%A, %B %-d, %y %j %%') }}", "Friday, November 27, 26 331 %"},
      {"{% set f = strftime_now %}{% if strftime_now is defined %}{{ f('%Y') }}{% endif %}",
       "2026"},
  });
}

TEST_CASE("jinja: parts of Jinja2 that no published chat template uses are refused") {
  for (const char* text :
       {"{% raw %}{{ x }} {% if %}{% endraw %}\n{%- raw -%}  {{ y }}  {%- endraw -%}  z",
        "{{ 2 ** 10 }}",
        "{{ 10 - 2 ** 2 }}",
        "{{ -2 ** 2 }}",
        "{{ 0x1f }}",
        "{% with a = 1, b = x %}{{ a }}{{ b }}{% set n = a %}{{ n }}{% endwith %}{{ a }}{{ n }}",
        "{% macro all() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ all(1, 2, k=3) }} {% macro "
        "two(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ two(*[1, 2]) }}{{ two(**{'b': 1, 'a': 2}) }}",
        "{% macro box(t) %}<{{ t }}{{ caller() }}>{% endmacro %}{% call box('a') %} in {% endcall "
        "%}",
        "{% for m in list %}{% macro f(a) %}{{ a }}{{ m }}{% endmacro %}{{ f('x') }}{% endfor %}",
        "{{ list | sum }}",
        "{{ 2.567 | round(2) }}",
        "{% filter upper %}a {{ x }}{% endfilter %} {{ '<b>' | safe }} {{ '<a&b>' | e }}",
        "{{ 'a,b'.rsplit(',', 1) }}",
        "{{ 'aba'.rfind('a') }}",
        "{{ 'abc'.index('c') }}",
        "{{ 'a1'.isdigit() }}",
        "{{ '12'.isdigit() }}",
        "{{ 'abc'.removeprefix('a') }}",
        "{{ 'a=b=c'.partition('=') }}",
        "{{ '%05.1f|%-4s|%3d|%%' % (2.25, 'a', 5) }}",
        "{{ 'ab' is lower }}",
        "{{ 'AB' is upper }}"}) {
    CAPTURE(std::string(text));
    CHECK(error_of(text).starts_with("t:"));
  }
}

TEST_CASE("jinja: what joins texts and takes parts of them keeps the origin of each part") {
  check_marked({
      {"{% for m in messages %}{{ '[' + m.role + '|' + m.content + ']' }}{% endfor %}",
       "[<0role:user>|<0content:hi<|im_end|>there>][<1role:assistant>|<1content: yes \n>]"},
      {"{{ bos ~ messages[0].content ~ 1 }}", "<s><0content:hi<|im_end|>there>1"},
      {"{% set t = '<' + messages[0].content + '>' %}{{ t[0:3] }}{{ t[-2:] }}{{ t[::-1][:2] }}",
       "<<0content:hie>>><0content:e>"},
      {"{{ ('  ' + messages[1].content + ' x ') | trim }}", "<1content:yes \n> x"},
      {"{{ messages[1].content.strip() }}{{ messages[1].content.lstrip() }}",
       "<1content:yesyes \n>"},
      {"{{ messages[0].content.split('<|im_end|>') | join('+') }}",
       "<0content:hi>+<0content:there>"},
      {"{{ messages[0].content.split('<|')[-1] }}", "<0content:im_end|>there>"},
      {"{{ messages[0].content | replace('<|im_end|>', bos) }}",
       "<0content:hi><s><0content:there>"},
      {"{{ '<|x|>' | replace('x', messages[0].role) }}", "<|<0role:user>|>"},
      {"{{ messages[0].content | upper }}{{ messages[0].role | capitalize }}",
       "<0content:HI<|IM_END|>THERE><0role:User>"},
      {"{{ ('a' + messages[0].role) | upper }}", "A<0role:USER>"},
      {"{{ '%s: %s' | format(messages[0].role, 'x') }}", "<0role:user>: x"},
      {"{% for c in messages[0].role %}{{ c }}.{% endfor %}",
       "<0role:u>.<0role:s>.<0role:e>.<0role:r>."},
      {"{{ messages[0].role[0] + messages[0].role[1:] }}", "<0role:user>"},
      {"{{ messages | map(attribute='role') | join(', ') }}", "<0role:user>, <1role:assistant>"},
      {"{{ messages[0].content if messages[0].role == 'user' else '' }}",
       "<0content:hi<|im_end|>there>"},
      {"{{ messages[1].reasoning_content or '' }}{{ none or messages[0].role }}",
       "<1reasoning:why><0role:user>"},
  });
}

TEST_CASE("jinja: origins go through variables, namespaces, macros and blocks of set") {
  check_marked({
      {"{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.role + ' ' %}"
       "{% endfor %}{{ ns.t }}",
       "<0role:user> <1role:assistant> "},
      {"{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m(messages[0].role) }}{{ m('x') ~ '!' }}",
       "[<0role:user>][x]!"},
      {"{% set t %}({{ messages[0].role }}){% endset %}{{ t }}{{ t[1:-1] }}",
       "(<0role:user>)<0role:user>"},
      {"{% set m = {'content': messages[0].role, 'x': 'y'} %}{{ m.content }}{{ m.x }}",
       "<0role:user>y"},
      {"{% for k, v in messages[0].items() %}{{ v }};{% endfor %}",
       "<0role:user>;<0content:hi<|im_end|>there>;"},
  });
}

TEST_CASE("jinja: JSON has the origins of the values that it writes") {
  check_marked({
      {"{{ tools | tojson }}", "<tools:[{\"name\": \"f\"}]>"},
      {"{{ messages[1].tool_calls[0].function.arguments | tojson }}",
       "<1call:{\"a\": \"b\\\"c\", \"n\": [1, 2.5]}>"},
      {"{{ {'name': messages[1].tool_calls[0].function.name} | tojson }}",
       "{\"name\": <1call:\"f\">}"},
      {"{{ ['a', messages[0].role] | tojson }}", "[\"a\", <0role:\"user\">]"},
      {"{% for k, v in messages[1].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }};"
       "{% endfor %}",
       "<1call:a>=<1call:b\"c>;<1call:n>=<1call:[1, 2.5]>;"},
      {"{{ messages[1].tool_calls[0].function.arguments.n[0] }}", "<1call:1>"},
      {"{{ ('a\n' + messages[0].role) | tojson }}", "\"a\\n<0role:user\">"},
  });
}

TEST_CASE("jinja: the places of generation blocks are known") {
  const auto generated = [](const std::string& text) {
    const jinja::Output output = jinja::Template(text, "t").render(with_origins(), kDate);
    std::string out;
    for (const auto& [begin, end] : output.generated)
      out += "[" + output.text.substr(begin, end - begin) + "]";
    return out;
  };
  CHECK(generated("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c") == "[buser]");
  CHECK(generated("{% for m in messages %}-{% generation %}{{ m.role }}{% endgeneration %}"
                  "{% endfor %}") == "[user][assistant]");
  CHECK(generated("{% for m in messages %}-{%- generation %}\n  x{{ m.role }}\n"
                  "{%- endgeneration %}{% endfor %}") == "[  xuser][  xassistant]");
  CHECK(generated("no block").empty());
}

TEST_CASE("jinja: the chat template of this project is rendered") {
  CHECK(marked(std::string("{% set add_generation_prompt = true %}") + kChatTemplate) ==
        "<|im_start|>system\n# Tools\n<tools>\n<tools:{\"name\": \"f\"}>\n</tools><|im_end|>\n"
        "<|im_start|><0role:user>\n<0content:hi<|im_end|>there><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n<1reasoning:why>\n</think>\n\n<1content:yes>\n"
        "<tool_call>\n{\"name\": \"<1call:f>\", \"arguments\": "
        "<1call:{\"a\": \"b\\\"c\", \"n\": [1, 2.5]}>}\n</tool_call><|im_end|>\n"
        "<|im_start|>assistant\n");
}

TEST_CASE("jinja: an error names the template, its line and what was found") {
  struct Wrong {
    std::string text;
    std::string begin;  // of the error
    std::string part;   // of the error
  };
  const std::vector<Wrong> cases = {
      {"a\n{% if x %}\nb", "t:", "endif"},
      {"a\n{{ x ", "t:2: ", "}}"},
      {"\n\n{{ 'abc }}", "t:3: ", "'"},
      {"{# a", "t:1: ", "#}"},
      {"{% endif %}", "t:1: ", "endif"},
      {"\n{% include 'x' %}", "t:2: ", "include"},
      {"{% extends 'x' %}", "t:1: ", "extends"},
      {"{% block a %}{% endblock %}", "t:1: ", "block"},
      {"{% do x %}", "t:1: ", "do"},
      {"{{ 1 + }}", "t:1: ", "}}"},
      {"{{ (1 }}", "t:1: ", "}"},
      {"{{ 1 ? 2 }}", "t:1: ", "?"},
      {"{% set 1 = 2 %}", "t:1: ", "name"},
      {"{% for x list %}{% endfor %}", "t:1: ", "in"},
      {"{% break %}", "t:1: ", "break"},
      {"{% for x in list %}{% endif %}{% endfor %}", "t:1: ", "endif"},
      {"a\n{{ undef.b }}", "t:2: ", "undef"},
      {"a\n{{ d.undef.b }}", "t:2: ", "undef"},
      {"\n\n{{ undef() }}", "t:3: ", "undef"},
      {"{{ 'a' + undef }}", "t:1: ", "undef"},
      {"{{ 'a' + 1 }}", "t:1: ", "integer"},
      {"{{ 'a' + none }}", "t:1: ", "none"},
      {"{{ 1 + [1] }}", "t:1: ", "list"},
      {"{{ 1 < 'a' }}", "t:1: ", "expected"},
      {"{{ 1 in 'a' }}", "t:1: ", "integer"},
      {"{{ 'a' in none }}", "t:1: ", "none"},
      {"{{ 1 // 0 }}", "t:1: ", "0"},
      {"{{ 9223372036854775807 + 1 }}", "t:1: ", "64 bits"},
      {"{{ none[1:] }}", "t:1: ", "none"},
      {"{% for x in 3 %}{% endfor %}", "t:1: ", "integer"},
      {"{% for x in none %}{% endfor %}", "t:1: ", "none"},
      {"{% for a, b in list %}{% endfor %}", "t:1: ", "integer"},
      {"{% set a, b = [1] %}", "t:1: ", "expected 2"},
      {"{% set d.k = 1 %}", "t:1: ", "dict"},
      {"{{ list.append(1) }}", "t:1: ", "append"},
      {"{{ x.nothing() }}", "t:1: ", "nothing"},
      {"a\n{{ x | nothing }}", "t:2: ", "nothing"},
      {"{{ x is nothing }}", "t:1: ", "nothing"},
      {"{{ none | length }}", "t:1: ", "none"},
      {"{{ undef | tojson }}", "t:1: ", "undef"},
      {"{{ 'a'.split('') }}", "t:1: ", "empty"},
      {"{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}", "t:1: ", "2"},
      {"{% macro m(a) %}{% endmacro %}{{ m(b=1) }}", "t:1: ", "b"},
      {"{% macro m() %}\n\n{{ undef.a }}{% endmacro %}\n{{ m() }}", "t:3: ", "undef"},
      {"a\n{{ raise_exception('roles must ' ~ 'alternate') }}", "t:2: ", "roles must alternate"},
      {"{{ '\\x4' }}", "t:1: ", "expected"},
  };
  for (const Wrong& c : cases) {
    CAPTURE(c.text);
    const std::string error = error_of(c.text);
    CHECK(error.starts_with(c.begin));
    CHECK(error.find(c.part) != std::string::npos);
    CHECK(error.find('\n') == std::string::npos);
  }
}

TEST_CASE("jinja: an error has one line that is not long, whatever it quotes") {
  for (const char* text : {"{{ raise_exception('a\n\tb' * 10000) }}", "{{ list | select('a\nb') }}",
                           "{{ '{a\nb}'.format() }}", "{{ '%\n' % 1 }}"}) {
    CAPTURE(text);
    const std::string error = error_of(text);
    CHECK(error.starts_with("t:"));
    CHECK(error.find('\n') == std::string::npos);
    CHECK(error.size() < 1100);
  }
}

TEST_CASE("jinja: an unknown filter is an error where it is reached only") {
  CHECK(rendered("{% if false %}{{ x | nothing }}{{ x is nothing }}{% endif %}a") == "a");
}

TEST_CASE("jinja: steps, depth and output have limits") {
  const auto expect_limit = [](const std::string& text, const char* part) {
    CAPTURE(text.substr(0, 100));
    const std::string error = error_of(text);
    CHECK(error.starts_with("t:"));
    CHECK(error.find(part) != std::string::npos);
  };
  expect_limit("\n{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
               "more than");
  expect_limit("{% for i in range(99999999) %}{% endfor %}", "range");
  expect_limit("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "100");
  expect_limit("{{ 'x' * 1000000000 }}", "expected");
  expect_limit(
      "{% set ns = namespace(s='x') %}{% for i in range(40) %}"
      "{% set ns.s = ns.s + ns.s %}{% endfor %}",
      "more than");
  expect_limit(
      "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}"
      "{% set ns.l = ns.l + ns.l %}{% endfor %}",
      "more than");
  expect_limit(
      "{% set ns = namespace(l=[]) %}{% for i in range(50000) %}{% set ns.l = [ns.l] %}"
      "{% endfor %}",
      "more than");
  expect_limit("{{ " + std::string(100000, '(') + "1" + std::string(100000, ')') + " }}",
               "more than");
  expect_limit("{{ " + std::string(100000, '-') + "1 }}", "more than");
  expect_limit("{{ " + std::string(100000, '[') + std::string(100000, ']') + " }}", "more than");
  std::string text = "{{ x";
  for (int i = 0; i < 100000; i++) text += ".a";
  expect_limit(text + " }}", "more than");
  text = "{{ x";
  for (int i = 0; i < 100000; i++) text += "|trim";
  expect_limit(text + " }}", "more than");
  text.clear();
  for (int i = 0; i < 100000; i++) text += "{% if x %}";
  expect_limit(text, "more than");
  jinja::Limits few;
  few.steps = 10;
  CHECK(error_of("{% for i in range(100) %}{{ i }}{% endfor %}", few).find("steps") !=
        std::string::npos);
  few = {};
  few.output = 10;
  CHECK(error_of("12345{{ 67890 }}", few).empty());
  CHECK(error_of("12345{{ 67890 }}1", few).find("bytes") != std::string::npos);
}

TEST_CASE("jinja: long chains of operators and long templates are no matter of depth") {
  std::string sum = "{{ 0", joined = "{{ ''", either = "{{ false", branches = "{% if false %}";
  for (int i = 0; i < 500; i++) {
    sum += " + 1";
    joined += " ~ 'a'";
    either += " or false";
    branches += "{% elif false %}";
  }
  CHECK(rendered(sum + " }}") == "500");
  CHECK(rendered(joined + " }}") == std::string(500, 'a'));
  CHECK(rendered(either + " }}") == "False");
  CHECK(rendered(branches + "{% else %}x{% endif %}") == "x");
}

TEST_CASE("jinja: namespaces in a circle are no trouble, and a template can be rendered again") {
  const jinja::Template circle(
      "{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = [b] %}{% set a.a = a %}"
      "{% set a.n = 1 %}{{ a.a.a.b[0].a.n }}",
      "t");
  CHECK(circle.render({}, kDate).text == "1");
  CHECK(circle.render({}, kDate).text == "1");
}

TEST_CASE("jinja: many threads may render one template") {
  const jinja::Template chat(kChatTemplate, "t");
  const jinja::Variables shared = with_origins();
  const std::string expected = chat.render(shared, kDate).text;
  std::vector<std::string> found(4);
  std::vector<std::thread> threads;
  for (std::string& text : found) {
    threads.emplace_back([&chat, &shared, &text] {
      for (int i = 0; i < 50; i++) text = chat.render(shared, kDate).text;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : found) CHECK(text == expected);
}

TEST_CASE("jinja: bytes that are not UTF-8 stay as they are") {
  CHECK(rendered("{{ '\xff\x80' ~ x }}|\xc3") ==
        "\xff\x80"
        "abc|\xc3");
  CHECK(rendered("{{ '\xff' | trim | upper }}") == "\xff");
}

TEST_CASE("jinja: a break or continue in a loop's else is the outer loop's") {
  check_texts({
      {"{% for i in list %}{{ i }}{% for j in [] %}{% else %}{% break %}{% endfor %}-{% endfor %}",
       "3"},
      {"{% for i in list %}{{ i }}{% for j in [] %}{% else %}{% continue %}{% endfor %}-"
       "{% endfor %}",
       "312"},
      // A round that ends with continue or break does not count as one.
      {"{% for y in [1] %}{% continue %}{% else %}b{% endfor %}", "b"},
      {"{% for y in [1] %}{% break %}{% else %}b{% endfor %}", "b"},
      {"{% for y in [1, 2] %}{% if y == 2 %}{% break %}{% endif %}{% else %}b{% endfor %}", ""},
  });
  CHECK(error_of("{% for j in [] %}{% else %}{% break %}{% endfor %}").starts_with("t:1: "));
  CHECK(error_of("{% for j in [1] %}{% set a %}{% break %}{% endset %}{% endfor %}")
            .starts_with("t:1: "));
}

TEST_CASE("jinja: a generation block that begins within a run splits it") {
  const auto generated = [](const std::string& text) {
    const jinja::Output output = jinja::Template(text, "t").render(with_origins(), kDate);
    std::string out;
    for (const auto& [begin, end] : output.generated)
      out += "[" + output.text.substr(begin, end - begin) + "]";
    CHECK(output.pieces.size() <= 3);
    return out;
  };
  CHECK(generated("ab{% generation %}cd{% endgeneration %}ef") == "[cd]");
  CHECK(generated("{% generation %}{% endgeneration %}ef").empty());
  CHECK(generated("a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}e") ==
        "[bcd]");
  CHECK(generated("a{% for m in messages %}{% generation %}{{ m.role }}{% break %}"
                  "{% endgeneration %}{% endfor %}b") == "[user]");
  // Many blocks behind a long text need no time for what was written before them.
  CHECK(generated("{{ 'x' * 1000000 }}{% for i in range(20000) %}{% generation %}y"
                  "{% endgeneration %}{% endfor %}")
            .size() == 20002);
}

TEST_CASE("jinja: white space and names are read as Python does it") {
  check_texts({
      {"a\u00a0\u3000{%- if true -%}\u2003\u00a0b{% endif %}", "ab"},
      {"\u3000{% if true %}b{% endif %}", "b"},  // lstrip_blocks
      {"{{\u00a0x\u3000}}", "abc"},
      {"{{+ true }} {{+ 'a' }}", "True a"},
  });
  CHECK(error_of("{{ \u201ca\u201d }}").starts_with("t:1: "));
  CHECK(error_of("{{ 1 ) }}").find("found )") != std::string::npos);
  for (const char* name : {"true", "none", "False"})
    CHECK(error_of(std::string("{% set ") + name + " = 2 %}").starts_with("t:1: "));
}

TEST_CASE("jinja: what Python calls not printable is escaped in lists") {
  check_texts({
      {"{{ ['a\u00a0b\u3000c\u2028d\u200be\ufefff'] }}",
       "['a\\xa0b\\u3000c\\u2028d\\u200be\\ufefff']"},
      {"{{ ['\\x1c\\x7f\\x85\\xad \u00e9\u4f60'] }}", "['\\x1c\\x7f\\x85\\xad \u00e9\u4f60']"},
      {"{{ ['\\ue000\\U000e0001'] }}", "['\\ue000\\U000e0001']"},
      {"{{ '\\x7f' | tojson(ensure_ascii=true) }}", "\"\\u007f\""},
      {"{{ {1: 2, none: 3} | tojson }}", "{\"1\": 2, \"null\": 3}"},
      {"{{ [1, 2] | tojson(indent=1, separators=(', ', ':')) }}", "[\n 1, \n 2\n]"},
  });
  CHECK(error_of("{{ {(1, 2): 3} | tojson }}").starts_with("t:1: "));
}

TEST_CASE("jinja: unknown arguments and letters are refused") {
  for (const char* text :
       {"{{ x | trim(nothing=1) }}", "{{ x | upper(1) }}", "{{ x.strip(chars='a') }}",
        "{{ x.split(by=' ') }}", "{{ list | tojson(nothing=1) }}", "{{ 1 is odd(1) }}",
        "{{ range(1, stop=2) }}", "{{ d.get('k', default=1) }}", "{{ list | sort(by='a') }}",
        "{{ raise_exception(text='a') }}", "{{ strftime_now('%Q') }}", "{{ strftime_now('%') }}",
        "{{ strftime_now('%99999999d') }}", "{{ strftime_now('%f') }}", "{{ cycler }}",
        "{{ 2 | indent('') }}", "{{ list | map(attribute='a', by=1) | list }}"}) {
    CAPTURE(text);
    CHECK(error_of(text).starts_with("t:1: "));
  }
  check_texts({{"{{ x.split(sep='b') }}{{ 'a' | default('b', boolean=true) }}", "['a', 'c']a"},
               {"{{ strftime_now('%-d %_d %%') }}", "27 27 %"}});
}

TEST_CASE("jinja: lists that Python makes lazily are used up, and have no length or text") {
  check_texts({
      {"{% set g = list | select('odd') %}{{ g | list }}{{ g | list }}", "[3, 1][]"},
      {"{% set g = list | map('string') %}{{ g | first }}{{ g | first }}{{ g | join }}", "312"},
      {"{% set g = [1, 1] | unique %}{{ g | join }}{{ g | join }}|", "1|"},
      {"{% set g = d | items %}{{ g | list | length }}{{ 1 if g else 2 }}", "31"},
      {"{{ d.keys() | length }}{{ d.keys() | list }}{{ d.keys()[0] is defined }}",
       "3['k', 'items', 'n']False"},
      {"{{ range(3) | length }}{{ range(3)[1] }}{{ range(3) is sequence }}{{ 1 in range(3) }}",
       "31TrueTrue"},
      {"{{ (list | select) is sequence }}{{ (list | select) is iterable }}", "FalseTrue"},
      {"{{ range(5)[1:3] | list }}{{ list | reverse | list }}", "[1, 2][2, 1, 3]"},
  });
  for (const char* value :
       {"list | select", "list | map('string')", "messages | selectattr('role')", "d | items",
        "list | unique", "list | reject('odd')"}) {
    CAPTURE(value);
    for (const char* use : {"length", "tojson", "string", "last"})
      CHECK(error_of(std::string("{{ ") + value + " | " + use + " }}").starts_with("t:1: "));
    CHECK(error_of(std::string("{{ ") + value + " }}").starts_with("t:1: "));
    CHECK(error_of(std::string("{{ (") + value + ") + [1] }}").starts_with("t:1: "));
    CHECK(error_of(std::string("{{ (") + value + ")[1:] }}").starts_with("t:1: "));
  }
  for (const char* text : {"{{ range(2) }}", "{{ range(2) | tojson }}", "{{ range(2) + [1] }}",
                           "{{ d.items() }}", "{{ d.keys() | tojson }}", "{{ d.values()[1:] }}"}) {
    CAPTURE(text);
    CHECK(error_of(text).starts_with("t:1: "));
  }
}

TEST_CASE("jinja: the first filter of a block may have arguments") {
  CHECK(rendered("{% filter replace('a', 'b') | upper %}aca{% endfilter %}") == "BCB");
  CHECK(error_of("{% filter upper(1) %}a{% endfilter %}").starts_with("t:1: "));
}

TEST_CASE("jinja: lists are compared as Python does it") {
  check_texts({
      {"{{ [none] < [none] }}{{ [none, 1] < [none, 2] }}{{ [1] <= [1] }}", "FalseTrueTrue"},
      {"{{ 1 is sameas true }}{{ true is sameas true }}", "FalseTrue"},
  });
}

TEST_CASE("jinja: texts of untrusted forms keep their origin") {
  const std::string date = marked("{{ strftime_now('%Y' + messages[0].role) }}");
  CHECK(date == "<0role:2026user>");
  CHECK(marked("{{ [1, 2] | tojson(separators=(messages[0].role, ':')) }}") == "[1<0role:user>2]");
}

TEST_CASE("jinja: work that data decides has limits") {
  // Each would take minutes or gigabytes if only statements were counted.
  const std::string shared =
      "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(40) %}"
      "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}";
  CHECK(rendered(shared + "{{ n.a == n.a }}{{ n.a < n.a }}{{ n.a in [n.a] }}") == "TrueFalseTrue");
  const std::string equal =
      "{% set n = namespace(a={}, b={}) %}{% for i in range(40) %}"
      "{% set n.a = {1: n.a, 2: n.a} %}{% set n.b = {1: n.b, 2: n.b} %}"
      "{% endfor %}";
  const std::string long_text =
      "{% set s = 'ab' * 1000000 %}{% set t = s ~ '' %}"
      "{% set spaces = ' ' * 1000000 %}{% set big = range(20000) | list %}"
      "{% set more = range(20000) | list %}{% for i in range(1000) %}";
  std::vector<std::string> cases = {shared + "{{ n.a == n.b }}",
                                    shared + "{{ n.a < n.b }}",
                                    shared + "{{ n.a in [n.b] }}",
                                    shared + "{{ n.a }}",
                                    shared + "{{ n.a | tojson }}",
                                    shared + "{{ n.a | string }}",
                                    shared + "{{ [n.a, n.b] | sort }}",
                                    shared + "{{ [n.a, n.b] | unique | list }}",
                                    equal + "{{ n.a == n.b }}",
                                    "{{ ('a' * 1000) | map(*(['map'] * 50000)) | list }}",
                                    "{{ ('\n' * 100000) | indent(1000, true, true) }}",
                                    "{{ ('x' * 9000000) | replace('x', 'y' * 1000) }}",
                                    "{{ ('{}' * 1000).format(*(['x' * 60000000] * 1000)) }}",
                                    "{{ ','.join(['a' * 1000000] * 1000) }}"};
  for (const char* part : {"s == t",        "s < t",
                           "[s, t] | sort", "{s: 1}[t]",
                           "s | length",    "s | trim",
                           "s.strip('ab')", "spaces | trim",
                           "s | lower",     "s | string",
                           "s.find('c')",   "s.count('c')",
                           "'c' in s",      "s | replace('c', 'd')",
                           "s.split('c')",  "s.startswith(t)",
                           "s | indent",    "s | int",
                           "s[1]",          "s[:1]",
                           "big == more",   "7.5 in big",
                           "big.count(1)",  "big + more",
                           "s | tojson"})
    cases.push_back(long_text + "{% set y = " + part + " %}{% endfor %}");
  jinja::Limits fewer;
  fewer.steps = 400'000;
  for (const std::string& text : cases) {
    CAPTURE(text);
    const std::string error = error_of(text, fewer);
    CHECK(error.starts_with("t:"));
    CHECK(error.find("more than") != std::string::npos);
  }
  // A search whose parts nearly fit everywhere.
  CHECK(rendered("{% set a = 'a' * 400000 %}{{ (a ~ 'b' ~ a) in (a ~ a ~ a) }}"
                 "{{ (a ~ a).find(a ~ 'b') }}") == "False-1");
  // A run of bytes that belong to no character.
  CHECK(rendered("{{ ('\x80' * 400000) | trim | length }}") == "0");
}

TEST_CASE("jinja: what is deep in each other does not overflow the stack") {
  std::string chain = "1", either = "1";
  for (int i = 0; i < 40; i++) {
    chain = "(" + chain + ")";
    for (int k = 0; k < 400; k++) chain += "+1";
  }
  CHECK(error_of("{{ " + chain + " }}").find("in a row") != std::string::npos);
  CHECK(error_of("{% set " + std::string(100000, '(') + "a" + std::string(100000, ')') + " = 1 %}")
            .find("more than") != std::string::npos);
  // As deep as can be: macros that call each other with long chains around each call.
  std::string deep = "m(n - 1)";
  for (int k = 0; k < 400; k++) deep = deep + " ~ ''" + (k % 2 ? "|trim" : "|upper");
  CHECK(error_of("{% macro m(n) %}{{ " + deep + " }}{% endmacro %}{{ m(90) }}").find("more than") !=
        std::string::npos);
  CHECK(error_of("{% macro m(n) %}{% if n %}{% if n %}{{ ((m(n - 1))) }}{% endif %}{% endif %}"
                 "{% endmacro %}{{ m(90) }}")
            .empty());
  // A loop that holds a loop that holds a loop ...
  CHECK(error_of("{% set n = namespace(l=[]) %}{% for i in range(50000) %}{% for x in [n.l] %}"
                 "{% set n.l = loop %}{% endfor %}{% endfor %}")
            .find("more than") != std::string::npos);
  CHECK(error_of("{% set n = namespace(l=[]) %}{% for i in range(600) %}{% set n.l = [n.l] %}"
                 "{% endfor %}{{ n.l }}{{ n.l | tojson(indent=1) }}{{ n.l == n.l }}")
            .empty());
  CHECK(error_of("{{ 'a' | map(*(['map'] * 90000)) | list }}").find("more than") !=
        std::string::npos);
}
