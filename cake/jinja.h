// Jinja, as published chat templates use it, where every text knows where its parts are from. The
// interface; the interpreter is jinja.cpp.
//
//     jinja::Template("{{ messages[0].content }}", "name").render(variables, date)
//         -> Output: a text, and of each stretch of it whether the template wrote it, or which part
//            of which message it is
//
// cake/chat_template.h tells from origins which text may hold special tokens, and which text the
// assistant says.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"

namespace cake::jinja {

// ---------------------------------------------------------------------------------------------
// The interface

enum class Source : uint8_t { from_template, role, content, reasoning, tool_call, tools };

// Where a stretch of text is from: the template, a part of a message, or the declarations of tools.
struct Origin {
  int message = -1;  // its number; -1: of no message
  Source source = Source::from_template;
  bool operator==(const Origin&) const = default;
};

class Value;  // of a variable; copies share what they hold
using Variables = std::vector<std::pair<std::string, Value>>;
Value from_json(const OrderedJson&, Origin = {});  // all its strings and keys have this origin
Value make_text(std::string_view, Origin = {});
Value make_list(std::vector<Value>);
Value make_dict(Variables);

struct Piece {  // text[begin, end) of an output
  size_t begin, end;
  Origin origin;
};
struct Output {
  std::string text;
  std::vector<Piece> pieces;                         // in order, without gaps, none empty
  std::vector<std::pair<size_t, size_t>> generated;  // what {% generation %} blocks wrote
};

struct Limits {
  int64_t steps = 2'000'000;  // statements, parts of expressions, and items that are looked at
  int depth = 100;            // macros that call each other
  size_t output = 64 << 20;   // bytes, of the output and of any text on the way
};

struct Code;

class Template {
 public:
  // Throws Error "NAME:LINE: found ..., expected ...".
  Template(std::string_view text, std::string name);
  // `date`: YYYY-MM-DD, that strftime_now formats. Throws Error with name and line. Many threads
  // may render at once.
  Output render(const Variables&, const std::string& date, const Limits& = {}) const;

 private:
  std::shared_ptr<const Code> code_;
};

// ---------------------------------------------------------------------------------------------
// Values, which jinja.cpp alone looks into

struct Text;
enum class Kind : uint8_t {
  undefined,
  none,
  boolean,
  integer,
  real,
  text,
  list,
  tuple,
  dict,
  space,
  loop,
  macro,
  function,
  method
};

struct Object;
struct Node;

// What Python has instead of some lists. None of them is printed or written as JSON.
enum class Lazy : uint8_t {
  no,
  range,
  view,      // keys, values or items of a dictionary: has a length, but no places
  generator  // of a filter: always true, has no length, and is empty once it was gone through
};

class Value {
 public:
  Value() = default;  // undefined
  explicit Value(Kind k) : kind(k) {}
  explicit Value(bool b) : kind(Kind::boolean) { integer = b; }
  explicit Value(int64_t i) : kind(Kind::integer) { integer = i; }
  explicit Value(double d) : kind(Kind::real) { real = d; }
  explicit Value(Text text);
  Value(Kind k, std::shared_ptr<Object> o) : kind(k), object(std::move(o)) {}

  bool is(Kind k) const { return kind == k; }
  bool is_lazy() const { return lazy != Lazy::no; }
  bool is_list() const { return kind == Kind::list || kind == Kind::tuple; }
  bool is_number() const { return kind >= Kind::boolean && kind <= Kind::real; }
  bool is_integer() const { return kind == Kind::integer || kind == Kind::boolean; }
  double number() const { return kind == Kind::real ? real : double(integer); }
  const Text& text() const;
  const std::vector<Value>& items() const;                // of a list or tuple
  std::vector<std::pair<Value, Value>>& entries() const;  // of a dictionary or namespace
  const Value* find(std::string_view key) const;          // the entry with this text as its key

  Kind kind = Kind::undefined;
  Origin origin;         // a text has its own, run by run
  bool is_safe = false;  // a text behind the filter `safe`: Jinja2 would escape what is added
  Lazy lazy = Lazy::no;  // of a list
  union {
    int64_t integer = 0;  // of a boolean too; of a function, its number
    double real;
    const Node* node;  // of a macro; of what is undefined, what asked for it, or null
  };
  std::shared_ptr<Object> object;  // of texts, lists, dictionaries, namespaces and loops
};

}  // namespace cake::jinja
