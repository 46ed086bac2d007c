// Arithmetic on text: + - * / ( ), decimals and unary minus, exact, as 0.1+0.2 = 0.3 shows.
//
//     calculate("3*(2+0.1)") -> "6.3"             a tool of the assistant (cake/tools.h)
//     exact_value("2/3+1/6") -> "5/6"             of numbers in answers (cake/answers.h)
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// Calculates with fractions of integers.
class Calculator {
 public:
  explicit Calculator(std::string_view expression) : text_(expression) {}

  // In decimal. Decimals that never end are rounded, or, if `exact`, it is a fraction such as 5/6.
  std::string result(bool exact) {
    const Fraction x = sum();
    if (offset_ < text_.size()) unexpected("an operator");
    if (!exact || ends(x)) return decimal(x);
    return (x.above < 0 ? "-" : "") + digits_of(size(x.above)) + "/" + digits_of(x.below);
  }

 private:
  using Integer = __int128;
  struct Fraction {  // in lowest terms; below > 0
    Integer above = 0, below = 1;
  };
  static constexpr int kDigits = 36;       // of numerators and denominators: ten times fits Integer
  static constexpr int kSignificant = 12;  // digits of a result with infinitely many
  static constexpr int kMaxDepth = 100;

  static Integer largest() {
    Integer x = 1;
    for (int i = 0; i < kDigits; i++) x *= 10;
    return x;
  }
  static Integer size(Integer a) { return a < 0 ? -a : a; }
  static Integer product(Integer a, Integer b) {
    if (b != 0 && size(a) > largest() / size(b)) too_large();
    return a * b;
  }
  static Integer gcd(Integer a, Integer b) {
    a = size(a), b = size(b);
    while (b != 0) a = std::exchange(b, a % b);
    return a;
  }
  static Fraction reduced(Integer above, Integer below) {
    if (size(above) > largest() || size(below) > largest()) too_large();
    const Integer g = (below < 0 ? -1 : 1) * gcd(above, below);
    return {above / g, below / g};
  }
  static Fraction times(const Fraction& a, const Fraction& b) {
    const Fraction x = reduced(a.above, b.below), y = reduced(b.above, a.below);
    return {product(x.above, y.above), product(x.below, y.below)};
  }
  static Fraction plus(const Fraction& a, const Fraction& b) {
    const Integer g = gcd(a.below, b.below);
    return reduced(product(a.above, b.below / g) + product(b.above, a.below / g),
                   product(a.below, b.below / g));
  }

  // sum = term {(+|-) term}; term = signed {(*|/) signed}; signed = {-|+} (number | "(" sum ")")
  Fraction sum() {
    Fraction x = term();
    while (sees("+-")) x = plus(x, term());  // the sign is read as the term's own
    return x;
  }
  Fraction term() {
    Fraction x = signed_number();
    while (sees("*/")) {
      const bool divides = text_[offset_++] == '/';
      Fraction y = signed_number();
      if (divides && y.above == 0) fail("calculator: division by zero");
      if (divides) y = y.above < 0 ? Fraction{-y.below, -y.above} : Fraction{y.below, y.above};
      x = times(x, y);
    }
    return x;
  }
  Fraction signed_number() {
    bool negative = false;
    while (sees("+-")) negative ^= text_[offset_++] == '-';
    Fraction x;
    if (sees("(")) {
      offset_++;
      if (++depth_ > kMaxDepth) fail("calculator: parentheses are nested deeper than ", kMaxDepth);
      x = sum();
      if (!sees(")")) unexpected(")");
      offset_++, depth_--;
    } else {
      x = number();
    }
    if (negative) x.above = -x.above;
    return x;
  }
  Fraction number() {
    Integer above = 0, below = 1;
    int digits = 0;
    bool in_decimals = false;
    for (; offset_ < text_.size(); offset_++) {
      const char c = text_[offset_];
      if (c == '.' && !in_decimals) {
        in_decimals = true;
      } else if (c >= '0' && c <= '9') {
        above = product(above, 10) + (c - '0');
        if (in_decimals) below = product(below, 10);
        digits++;
      } else {
        break;
      }
    }
    if (digits == 0) unexpected("a number");
    return reduced(above, below);
  }

  // Skips spaces. True when one of `signs` follows.
  bool sees(std::string_view signs) {
    offset_ = std::min(text_.find_first_not_of(" \t", offset_), text_.size());
    return offset_ < text_.size() && signs.find(text_[offset_]) != signs.npos;
  }
  [[noreturn]] void unexpected(const char* expected) const {
    if (offset_ >= text_.size()) fail("calculator: found the end, expected ", expected);
    fail("calculator: found ", json_text(std::string(text_.substr(offset_, 20))), ", expected ",
         expected);
  }
  [[noreturn]] static void too_large() {
    fail("calculator: found a number of more than ", kDigits, " digits");
  }

  // True where the decimal ends: its denominator has no prime factor but 2 and 5.
  static bool ends(const Fraction& x) {
    Integer rest = x.below;
    while (rest % 2 == 0) rest /= 2;
    while (rest % 5 == 0) rest /= 5;
    return rest == 1;
  }
  static std::string digits_of(Integer x) {
    std::string digits;
    for (; x > 0; x /= 10) digits.insert(0, 1, char('0' + int(x % 10)));
    return digits.empty() ? "0" : digits;
  }
  // All digits if the decimal ends, otherwise rounded.
  static std::string decimal(const Fraction& x) {
    Integer above = size(x.above);
    std::string whole = digits_of(above / x.below), part;
    int significant = whole == "0" ? 0 : int(whole.size());
    const bool all = ends(x);
    for (above %= x.below; above != 0 && (all || part.empty() || significant < kSignificant);
         above %= x.below) {
      above *= 10;
      part += char('0' + int(above / x.below));
      significant += significant > 0 || part.back() != '0';
    }
    if (above * 2 >= x.below) round_up(whole, part);
    while (!part.empty() && part.back() == '0') part.pop_back();
    const bool zero = whole == "0" && part.empty();
    return (x.above < 0 && !zero ? "-" : "") + whole + (part.empty() ? "" : "." + part);
  }
  static void round_up(std::string& whole, std::string& part) {
    for (std::string* digits : {&part, &whole}) {
      for (size_t i = digits->size(); i-- > 0;) {
        if ((*digits)[i]++ < '9') return;
        (*digits)[i] = '0';
      }
    }
    whole.insert(0, 1, '1');
  }

  std::string_view text_;
  size_t offset_ = 0;
  int depth_ = 0;
};

// The value in decimal: exact, or with 12 significant digits if its decimals never end. Throws
// Error on anything but arithmetic, on division by zero, on numbers of more than 36 digits, and on
// parentheses nested deeper than 100.
inline std::string calculate(std::string_view expression) {
  expression = strip_ascii(expression);
  if (expression.empty()) fail("calculator: found nothing, expected an expression");
  return Calculator(expression).result(false);
}

// The value, exact: in decimal if its decimals end, otherwise as a fraction in lowest terms.
inline std::string exact_value(std::string_view expression) {
  return Calculator(strip_ascii(expression)).result(true);
}

}  // namespace cake
