// Unicode: UTF-8, properties of code points, lower case, normalization forms.
#include <string>
#include <vector>

#include "cake/json.h"
#include "cake/normal_forms.h"
#include "cake/unicode.h"
#include "test/bpe_support.h"

using namespace cake;

namespace {

constexpr NormalForm kForms[] = {NormalForm::nfc, NormalForm::nfd, NormalForm::nfkc,
                                 NormalForm::nfkd};

bool is_surrogate(uint32_t c) { return c >= 0xD800 && c < 0xE000; }

std::string utf8(uint32_t c) {
  std::string text;
  append_utf8(text, c);
  return text;
}

// Bytes of code points that decompose, compose, combine or do none of it, some of them cut short.
std::string tricky_text(uint64_t seed) {
  static const std::vector<std::string> alphabet = {"e",          "o",
                                                    "A",          " ",
                                                    "\u00e9",     "\u0301",
                                                    "\u0323",     "\u0308",
                                                    "\u1ea5",     "\u212b",
                                                    "\uac00",     "\uac01",
                                                    "\u1100",     "\u1161",
                                                    "\u11a8",     "日",
                                                    "が",         "か",
                                                    "\u3099",     "\u0f71",
                                                    "\u0f72",     "\ufb01",
                                                    "\u0e33",     "\uf900",
                                                    "½",          "\u0915",
                                                    "\u093c",     "\xe9",
                                                    "\xcc",       "\x81",
                                                    "\xf0\x9f",   "\u0344",
                                                    "\U0001d15e", "plain text of letters "};
  Rng rng{seed};
  std::string text;
  for (uint64_t i = rng.below(60); i > 0; i--) text += alphabet[rng.below(alphabet.size())];
  return text;
}

}  // namespace

TEST_CASE("well-formed UTF-8 is decoded, and other bytes stand for themselves") {
  for (uint32_t c = 0; c < 0x110000; c++) {
    if (is_surrogate(c)) continue;
    const std::string text = utf8(c);
    const CodePoint decoded = decode_utf8(text.data(), text.size());
    const CodePoint before = decode_utf8_before("x" + text, text.size() + 1);
    if (decoded.code != c || size_t(decoded.bytes) != text.size() || before.code != c) FAIL(c);
  }
  // Cut short, overlong, a surrogate, above the last code point, no lead byte.
  for (const std::string text : {"\xc3", "\xe6\x97", "\xf0\x9f\x98", "\xc0\x80", "\xe0\x80\x80",
                                 "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80", "\xff"}) {
    std::string again;
    for (size_t i = 0; i < text.size(); i++) {
      const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
      CHECK(c.code == kInvalid + static_cast<unsigned char>(text[i]));
      CHECK(c.bytes == 1);
      CHECK(decode_utf8_before(text, i + 1).code == c.code);
      CHECK(general_category(c.code) == Category::Cn);
      CHECK(!is_white_space(c.code));
      CHECK(lower_case(c.code) == c.code);
      append_utf8(again, c.code);
    }
    CHECK(again == text);
  }
}

TEST_CASE("properties and lower case of all code points are those of Unicode 16") {
  const Json golden = read_json("test/golden/normalize.json").at("unicode");
  static constexpr const char* kNames[] = {
      "Cn", "Cc", "Cf", "Co", "Cs", "Lu", "Lt", "Ll", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl",
      "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp"};
  std::string properties, lower;
  for (uint32_t c = 0; c < 0x110000; c++) {
    if (is_surrogate(c) || general_category(c) == Category::Cn) continue;
    properties += kNames[int(general_category(c))];
    if (is_white_space(c)) properties += 'w';
    if (is_han(c)) properties += 'h';
    append_utf8(lower, lower_case(c));
    if (c == 0x130) append_utf8(lower, 0x307);  // of the full mapping
    const char name = kNames[int(general_category(c))][0];
    if (is_letter(c) != (name == 'L') || is_mark(c) != (name == 'M') ||
        is_numeric(c) != (name == 'N') || is_punctuation(c) != (name == 'P') ||
        is_symbol(c) != (name == 'S')) {
      FAIL(c);
    }
  }
  CHECK(format("%016llx", (unsigned long long)hash64(properties)) == golden.at("properties"));
  CHECK(format("%016llx", (unsigned long long)hash64(lower)) == golden.at("lower"));
  CHECK(general_category(0xD800) == Category::Cs);
  CHECK(general_category(0x378) == Category::Cn);
  CHECK(is_han(0x4E00));
  CHECK(!is_han(0x3042));
}

TEST_CASE("the classes of characters are those that split patterns tell apart") {
  CHECK(std::string(kUnicodeVersion) == "16.0.0");
  const uint8_t* kind = char_classes();
  CHECK(kind[0x61] == kLower);
  CHECK(kind[0x1C5] == kUpper);   // titlecase
  CHECK(kind[0x17F] == kLower);   // long s
  CHECK(kind[0x2B0] == kLetter);  // modifier
  CHECK(kind[0x301] == kMark);
  CHECK(kind[0x2167] == kNumber);
  CHECK(kind[0x1C89] == kUpper);    // new in 16
  CHECK(kind[0x16EA0] == kOther);   // new in 17
  CHECK(kind[0x10FFFF] == kOther);  // the last one
  CHECK(kind[0x0A] == kNewline);
  std::vector<uint32_t> spaces;
  for (uint32_t c = 0; c < 0x110000; c++) {
    if (kind[c] == kSpace) spaces.push_back(c);
  }
  CHECK(spaces == std::vector<uint32_t>{0x9,    0xB,    0xC,    0x20,   0x85,   0xA0,
                                        0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004,
                                        0x2005, 0x2006, 0x2007, 0x2008, 0x2009, 0x200A,
                                        0x2028, 0x2029, 0x202F, 0x205F, 0x3000});
}

TEST_CASE("the four normalization forms of every code point are those of Unicode 16") {
  const Json golden = read_json("test/golden/normalize.json").at("unicode");
  static constexpr const char* kNames[] = {"NFC", "NFD", "NFKC", "NFKD"};
  for (const NormalForm form : kForms) {
    std::string all;
    for (uint32_t c = 0; c < 0x110000; c++) {
      if (!is_surrogate(c)) all += normalize(form, utf8(c));
    }
    CAPTURE(kNames[int(form)]);
    CHECK(format("%016llx", (unsigned long long)hash64(all)) == golden.at(kNames[int(form)]));
  }
}

TEST_CASE("normalization forms decompose, order and compose as Unicode says") {
  const auto nfc = [](std::string_view text) { return normalize(NormalForm::nfc, text); };
  CHECK(nfc("e\u0301") == "\u00e9");
  CHECK(nfc("\u1e9b\u0323") == "\u1e9b\u0323");
  CHECK(nfc("\u212b") == "\u00c5");               // a singleton
  CHECK(nfc("\u0958") == "\u0915\u093c");         // excluded from composition
  CHECK(nfc("a\u0315\u0300") == "\u00e0\u0315");  // a higher class does not block
  CHECK(nfc("a\u0302\u0300") == "\u1ea7");
  CHECK(nfc("a\u0300\u0302") == "\u00e0\u0302");
  CHECK(nfc("q\u0307\u0323") == "q\u0323\u0307");  // marks in order
  CHECK(nfc("e\u0323\u0302") == "\u1ec7");         // two steps
  CHECK(nfc("a\u0300\u0301") == "\u00e0\u0301");   // not past one of the same class
  CHECK(nfc("a\u0305\u0300") == "a\u0305\u0300");  // nor past one that stays
  CHECK(nfc("\u0301e") == "\u0301e");              // a mark at the start
  CHECK(nfc("\xffq\xcc") == "\xffq\xcc");
  CHECK(nfc("e\u0301\xff\u0301") == "\u00e9\xff\u0301");  // bytes that are not UTF-8
  CHECK(nfc("\u1100\u1161\u11a8") == "\uac01");
  CHECK(nfc("\ud558\u11ab\u11ab") == "\ud55c\u11ab");
  CHECK(nfc("\uac00\u11a8") == "\uac01");
  CHECK(nfc("\uac01\u11a8") == "\uac01\u11a8");
  CHECK(normalize(NormalForm::nfd, "\u1e9b\u0323") == "\u017f\u0323\u0307");
  CHECK(normalize(NormalForm::nfd, "\uac01") == "\u1100\u1161\u11a8");
  CHECK(normalize(NormalForm::nfkc, "\u1e9b\u0323") == "\u1e69");
  CHECK(normalize(NormalForm::nfkd, "\u1e9b\u0323") == "s\u0323\u0307");
  CHECK(normalize(NormalForm::nfkc, "\ufb01 \uff21 ½") == "fi A 1\u20442");
}

TEST_CASE("the scan for stretches that may change finds what the definition changes") {
  for (uint64_t seed = 0; seed < 20000; seed++) {
    const std::string text = tricky_text(seed);
    for (const NormalForm form : kForms) {
      std::string by_definition;
      std::vector<uint32_t> codes;
      normalization(form).append(text, by_definition, codes);
      const std::string normal = normalize(form, text);
      REQUIRE(normal == by_definition);
      REQUIRE(normalize(form, normal) == normal);
    }
    REQUIRE(normalize(NormalForm::nfc, normalize(NormalForm::nfd, text)) ==
            normalize(NormalForm::nfc, text));
  }
}
