// Main text of a page of HTML.
//
//     bytes --SkeletonScanner--> skeleton: tags without attributes, text; attributes beside it
//           --gumbo (HTML5)--> tree --walk--> nodes, blocks of text
//           --block_features--> 241 numbers a block --boosted trees--> probability
//           --choose_blocks (expected F1)--> blocks that are main text --render_blocks--> text
//
// Most bytes of a page are not text: scripts, styles, drawings, comments, attributes that hold
// data: URLs. One pass over the bytes, by the rules of HTML5's tokenizer, leaves these out and
// writes what is left, the skeleton; a tag's attributes are kept in a table beside it, so that the
// parser never copies them. The parser builds HTML5's tree of the skeleton. One walk cuts the text
// at block-level elements. Each block gets features that are known after one pass over nodes and
// blocks; boosted regression trees (Friedman 2001; trained by dev/extraction.py with LightGBM on
// WCXB) give the probability that a reader would call the block main text. The blocks
// chosen are the prefix, by falling probability, with the highest expected F1 (the idea
// of Lewis 1995: "Evaluating and optimizing autonomous text classification systems"): no threshold
// is tuned.
#include <gumbo.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "cake/corpus.h"
#include "cake/extract_model.h"
#include "cake/unicode.h"

namespace cake::corpus {
namespace {

// ---------------------------------------------------------------------------------------------
// Characters and words. A word is a run of letters, numbers and underscores: \w+ of Python.

// The code point that begins at text[i], which i then passes; U+FFFD for a byte that begins none.
uint32_t next_code_point(std::string_view text, size_t& i) {
  const auto byte = [&](size_t k) { return k < text.size() ? uint8_t(text[k]) : uint8_t(0); };
  const uint32_t a = byte(i++);
  if (a < 0x80) return a;
  const int more = a >= 0xf0 && a < 0xf5 ? 3 : a >= 0xe0 && a < 0xf0 ? 2 : a >= 0xc2 && a < 0xe0;
  if (!more) return 0xfffd;
  uint32_t c = a & (0x3fu >> more);
  for (int k = 0; k < more; k++) {
    if ((byte(i + k) & 0xc0) != 0x80) return 0xfffd;
    c = c << 6 | (byte(i + k) & 0x3f);
  }
  if (c > 0x10ffff) return 0xfffd;
  i += more;
  return c;
}
uint32_t previous_code_point(std::string_view text, size_t i) {  // that ends before text[i], i > 0
  size_t begin = i - 1;
  while (begin > 0 && i - begin < 4 && (uint8_t(text[begin]) & 0xc0) == 0x80) begin--;
  return next_code_point(text, begin);
}
void append_code_point(std::string& text, uint32_t c) {
  if (c < 0x80) {
    text += char(c);
    return;
  }
  if (c < 0x800) {
    text += char(0xc0 | c >> 6);
  } else {
    if (c < 0x10000) {
      text += char(0xe0 | c >> 12);
    } else {
      text += char(0xf0 | c >> 18);
      text += char(0x80 | (c >> 12 & 0x3f));
    }
    text += char(0x80 | (c >> 6 & 0x3f));
  }
  text += char(0x80 | (c & 0x3f));
}

bool is_word_character(uint32_t c) {
  if (c < 0x80) return (c | 32) - 'a' < 26u || c - '0' < 10u || c == '_';
  const uint8_t kind = char_classes()[c];
  return kind == kUpper || kind == kLower || kind == kLetter || kind == kNumber;
}
bool is_white(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f);
  return char_classes()[c] == kSpace;
}
bool is_html_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f'; }
char ascii_lower(char c) { return c >= 'A' && c <= 'Z' ? char(c + 32) : c; }

std::string lower_text(std::string_view text) {
  std::string lower;
  lower.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    if (uint8_t(text[i]) < 0x80) {
      lower += ascii_lower(text[i++]);
    } else {
      append_code_point(lower, lower_case(next_code_point(text, i)));
    }
  }
  return lower;
}

// Calls visit(begin, end, code points) for each word.
template <class Visit>
void each_word(std::string_view text, Visit visit) {
  for (size_t i = 0; i < text.size();) {
    size_t begin = i;
    uint32_t n = 0;
    while (i < text.size()) {
      size_t next = i;
      if (!is_word_character(next_code_point(text, next))) {
        if (n == 0) begin = next;
        if (n > 0) break;
        i = next;
        continue;
      }
      i = next;
      n++;
    }
    if (n > 0) visit(begin, i, n);
  }
}
uint32_t count_words(std::string_view text) {
  uint32_t n = 0;
  each_word(text, [&](size_t, size_t, uint32_t) { n++; });
  return n;
}

// ---------------------------------------------------------------------------------------------
// Phrases in lower-case text, many at once: which groups of phrases occur? A group is written as
// alternatives between '|'. In an alternative, a leading or final '<' or '>' asks for a boundary of
// a word there (\b), a leading '^' for the beginning of the text, a final '$' for its end.
//
// All alternatives are one automaton (Aho, Corasick 1975): one table look-up for each byte.

struct PhraseGroup {
  const char* name;
  const char* phrases;
};

class PhraseMatcher {
 public:
  explicit PhraseMatcher(std::span<const PhraseGroup> groups) {
    std::vector<Phrase> phrases;
    for (size_t g = 0; g < groups.size(); g++) {
      const std::string_view all = groups[g].phrases;
      for (size_t begin = 0; begin <= all.size();) {
        const size_t end = std::min(all.find('|', begin), all.size());
        Phrase p;
        p.group = uint8_t(g);
        p.text = all.substr(begin, end - begin);
        begin = end + 1;
        if (p.text.front() == '<') p.checks |= kWordBegins, p.text.erase(0, 1);
        if (p.text.front() == '^') p.checks |= kTextBegins, p.text.erase(0, 1);
        if (p.text.back() == '>') p.checks |= kWordEnds, p.text.pop_back();
        if (p.text.back() == '$') p.checks |= kTextEnds, p.text.pop_back();
        phrases.push_back(p);
      }
    }
    build(phrases);
  }

  // Bit g: a phrase of group g occurs.
  uint32_t match(std::string_view text) const {
    uint32_t found = 0, state = 0;
    for (size_t i = 0; i < text.size(); i++) {
      state = next_[state * symbols_ + symbol_[uint8_t(text[i])]];
      for (uint32_t k = outputs_begin_[state]; k < outputs_begin_[state + 1]; k++) {
        const Output& o = outputs_[k];
        if (found >> o.group & 1) continue;
        if (o.checks && !holds(o, text, i + 1)) continue;
        found |= 1u << o.group;
      }
    }
    return found;
  }

 private:
  enum : uint8_t { kWordBegins = 1, kWordEnds = 2, kTextBegins = 4, kTextEnds = 8 };
  struct Phrase {
    std::string text;
    uint8_t group = 0, checks = 0;
  };
  struct Output {
    uint8_t group, checks;
    uint16_t length;
  };

  static bool boundary(std::string_view text, size_t i) {
    size_t next = i;
    const bool before = i > 0 && is_word_character(previous_code_point(text, i));
    const bool after = i < text.size() && is_word_character(next_code_point(text, next));
    return before != after;
  }
  static bool holds(const Output& o, std::string_view text, size_t end) {
    const size_t begin = end - o.length;
    if (o.checks & kTextBegins && begin != 0) return false;
    if (o.checks & kTextEnds && end != text.size()) return false;
    if (o.checks & kWordBegins && !boundary(text, begin)) return false;
    return !(o.checks & kWordEnds) || boundary(text, end);
  }

  void build(const std::vector<Phrase>& phrases) {
    symbols_ = 1;  // symbol 0: bytes of no phrase
    for (const Phrase& p : phrases) {
      for (const char c : p.text) {
        if (!symbol_[uint8_t(c)]) symbol_[uint8_t(c)] = uint8_t(symbols_++);
      }
    }
    std::vector<std::vector<Output>> outputs(1);
    next_.assign(symbols_, 0);
    for (const Phrase& p : phrases) {  // the trie
      uint32_t state = 0;
      for (const char c : p.text) {
        uint32_t child = next_[state * symbols_ + symbol_[uint8_t(c)]];
        if (!child) {
          child = uint32_t(outputs.size());
          outputs.emplace_back();
          next_.resize(next_.size() + symbols_, 0);
          next_[state * symbols_ + symbol_[uint8_t(c)]] = uint16_t(child);
        }
        state = child;
      }
      outputs[state].push_back({p.group, p.checks, uint16_t(p.text.size())});
    }
    // Breadth first: a missing edge goes where the longest proper suffix's edge goes.
    std::vector<uint32_t> queue, suffix(outputs.size(), 0);
    for (uint32_t s = 0; s < symbols_; s++) {
      if (next_[s]) queue.push_back(next_[s]);
    }
    for (size_t q = 0; q < queue.size(); q++) {
      const uint32_t state = queue[q], back = suffix[state];
      outputs[state].insert(outputs[state].end(), outputs[back].begin(), outputs[back].end());
      for (uint32_t s = 0; s < symbols_; s++) {
        uint16_t& child = next_[state * symbols_ + s];
        if (child) {
          suffix[child] = next_[back * symbols_ + s];
          queue.push_back(child);
        } else {
          child = next_[back * symbols_ + s];
        }
      }
    }
    for (const auto& list : outputs) {
      outputs_begin_.push_back(uint32_t(outputs_.size()));
      outputs_.insert(outputs_.end(), list.begin(), list.end());
    }
    outputs_begin_.push_back(uint32_t(outputs_.size()));
  }

  uint32_t symbols_ = 0;
  std::array<uint8_t, 256> symbol_{};
  std::vector<uint16_t> next_;  // (states, symbols)
  std::vector<uint32_t> outputs_begin_;
  std::vector<Output> outputs_;
};

// ---------------------------------------------------------------------------------------------
// Elements: what the scan, the cut into blocks and the features must know of a name

enum ElementFlags : uint32_t {
  kBlockLevel = 1,  // its start and its end are boundaries of blocks
  kDropped = 2,     // holds no main text
  kVoid = 4,        // has no content, no end tag
  kFormatting = 8,  // HTML5's adoption agency moves it
  kSpecial = 16,    // HTML5's list "special"
  kScope = 32,      // HTML5's "has an element in scope" stops here
  kClosesP = 64,    // its start ends an open p
  kRawText = 128,   // its content is text up to its end tag
  kBreakout = 256,  // its start ends svg
  kUnparsed = 512,  // the parser need not see it: neither text nor a boundary
  kHeading = 1024,
  // combinations
  kSectioning = kBlockLevel | kSpecial | kClosesP,
  kFlow = kSectioning | kBreakout,
  kHeadline = kFlow | kHeading,
  kCell = kBlockLevel | kSpecial | kScope,
  kRaw = kDropped | kRawText | kUnparsed,
  kEmpty = kVoid | kUnparsed,
  kBold = kFormatting | kBreakout,
  kFallback = kDropped,  // shown by browsers that cannot show the element
};
struct HtmlElement {
  const char* name;
  uint32_t flags;
};
// clang-format off
constexpr HtmlElement kElements[] = {
  {"", 0},  // any other
  {"html", kCell}, {"head", kDropped | kSpecial | kBreakout},
  {"body", kBlockLevel | kSpecial | kBreakout}, {"main", kSectioning}, {"article", kSectioning},
  {"section", kSectioning}, {"nav", kSectioning}, {"header", kSectioning}, {"footer", kSectioning},
  {"aside", kSectioning}, {"hgroup", kSectioning}, {"address", kSectioning},
  {"details", kSectioning}, {"summary", kSectioning}, {"figure", kSectioning},
  {"figcaption", kSectioning}, {"form", kSectioning}, {"fieldset", kSectioning},
  {"search", kBlockLevel | kClosesP}, {"dialog", kBlockLevel | kClosesP}, {"div", kFlow}, {"p", kFlow},
  {"center", kFlow}, {"menu", kFlow}, {"ul", kFlow}, {"ol", kFlow}, {"li", kFlow}, {"dl", kFlow},
  {"dt", kFlow}, {"dd", kFlow}, {"pre", kFlow}, {"blockquote", kFlow}, {"hr", kFlow | kVoid},
  {"h1", kHeadline}, {"h2", kHeadline}, {"h3", kHeadline}, {"h4", kHeadline}, {"h5", kHeadline},
  {"h6", kHeadline}, {"table", kFlow | kScope}, {"caption", kCell}, {"td", kCell}, {"th", kCell},
  {"template", kCell}, {"tr", kBlockLevel | kSpecial}, {"thead", kBlockLevel | kSpecial},
  {"tbody", kBlockLevel | kSpecial}, {"tfoot", kBlockLevel | kSpecial}, {"colgroup", kSpecial},
  {"col", kEmpty}, {"button", kBlockLevel | kSpecial}, {"label", kBlockLevel}, {"legend", kBlockLevel},
  {"noscript", kSpecial}, {"dir", kSpecial | kClosesP},
  {"listing", kSpecial | kClosesP | kBreakout}, {"plaintext", kSpecial | kClosesP},
  {"xmp", kSpecial | kClosesP | kRawText}, {"applet", kSpecial | kScope},
  {"marquee", kSpecial | kScope}, {"a", kFormatting}, {"font", kFormatting}, {"b", kBold},
  {"big", kBold}, {"code", kBold}, {"em", kBold}, {"i", kBold}, {"nobr", kBold}, {"s", kBold},
  {"small", kBold}, {"strike", kBold}, {"strong", kBold}, {"tt", kBold}, {"u", kBold},
  {"span", kBreakout}, {"ruby", kBreakout}, {"sub", kBreakout}, {"sup", kBreakout},
  {"var", kBreakout}, {"br", kVoid | kSpecial | kBreakout}, {"math", 0}, {"script", kRaw},
  {"style", kRaw}, {"title", kRaw}, {"textarea", kRaw}, {"iframe", kRaw},
  {"noembed", kRaw | kBreakout}, {"noframes", kRaw}, {"svg", kDropped}, {"foreignobject", 0},
  {"desc", 0}, {"object", kFallback | kSpecial | kScope}, {"canvas", kFallback},
  {"audio", kFallback}, {"video", kFallback}, {"map", kDropped}, {"select", kDropped | kSpecial},
  {"option", kDropped}, {"datalist", kDropped}, {"optgroup", 0}, {"meta", kEmpty | kBreakout},
  {"img", kEmpty | kBreakout}, {"embed", kEmpty | kBreakout}, {"input", kEmpty}, {"image", kEmpty},
  {"area", kEmpty}, {"base", kEmpty}, {"basefont", kEmpty}, {"bgsound", kEmpty}, {"link", kEmpty},
  {"param", kEmpty}, {"source", kEmpty}, {"track", kEmpty}, {"wbr", kEmpty}, {"keygen", kEmpty},
  {"frame", kEmpty}, {"frameset", kUnparsed},
};
// clang-format on
constexpr size_t kElementCount = sizeof kElements / sizeof *kElements;
static_assert(kElementCount < 256);
constexpr uint8_t element_of(std::string_view name) {  // its index in kElements
  for (size_t k = 1; k < kElementCount; k++) {
    if (kElements[k].name == name) return uint8_t(k);
  }
  return 0;
}
// Elements that the code below asks for.
// clang-format off
constexpr uint8_t kTagHtml = element_of("html"), kTagHead = element_of("head"),
    kTagBody = element_of("body"), kTagMain = element_of("main"),
    kTagArticle = element_of("article"), kTagSection = element_of("section"),
    kTagNav = element_of("nav"), kTagHeader = element_of("header"),
    kTagFooter = element_of("footer"), kTagAside = element_of("aside"), kTagDiv = element_of("div"),
    kTagP = element_of("p"), kTagH1 = element_of("h1"), kTagH2 = element_of("h2"),
    kTagH3 = element_of("h3"), kTagH4 = element_of("h4"), kTagH5 = element_of("h5"),
    kTagH6 = element_of("h6"), kTagUl = element_of("ul"), kTagOl = element_of("ol"),
    kTagLi = element_of("li"), kTagDl = element_of("dl"), kTagDt = element_of("dt"),
    kTagDd = element_of("dd"), kTagTable = element_of("table"), kTagTr = element_of("tr"),
    kTagTd = element_of("td"), kTagTh = element_of("th"), kTagCaption = element_of("caption"),
    kTagPre = element_of("pre"), kTagBlockquote = element_of("blockquote"),
    kTagFigure = element_of("figure"), kTagFigcaption = element_of("figcaption"),
    kTagForm = element_of("form"), kTagDetails = element_of("details"),
    kTagSummary = element_of("summary"), kTagDialog = element_of("dialog"),
    kTagButton = element_of("button"), kTagLabel = element_of("label"),
    kTagTemplate = element_of("template"), kTagA = element_of("a"), kTagSpan = element_of("span"),
    kTagBr = element_of("br"), kTagNoscript = element_of("noscript"),
    kTagScript = element_of("script"), kTagTitle = element_of("title"),
    kTagMeta = element_of("meta"), kTagSvg = element_of("svg"),
    kTagPlaintext = element_of("plaintext"), kTagOption = element_of("option"),
    kTagForeignObject = element_of("foreignobject"), kTagDesc = element_of("desc");
// clang-format on

uint64_t name_hash(std::string_view name) {  // FNV-1a of the lower-case name
  uint64_t h = 0xcbf29ce484222325;
  for (const char c : name) h = (h ^ uint8_t(ascii_lower(c))) * 0x100000001b3;
  return h;
}
uint8_t find_element(uint64_t hash) {  // index into kElements, 0: none
  struct Slot {
    uint64_t hash = 0;
    uint8_t element = 0;
  };
  static const std::vector<Slot> slots = [] {
    std::vector<Slot> table(1024);
    for (size_t k = 1; k < kElementCount; k++) {
      const uint64_t h = name_hash(kElements[k].name);
      size_t i = h >> 20 & 1023;
      while (table[i].element) i = (i + 1) & 1023;
      table[i] = {h, uint8_t(k)};
    }
    return table;
  }();
  for (size_t i = hash >> 20 & 1023; slots[i].element; i = (i + 1) & 1023) {
    if (slots[i].hash == hash) return slots[i].element;
  }
  return 0;
}
uint32_t flags_of(uint8_t element) { return kElements[element].flags; }

// ---------------------------------------------------------------------------------------------
// The scan: one pass over the bytes by the rules of HTML5's tokenizer (html.spec.whatwg.org,
// section 13.2.5). It finds the end of scripts, styles, drawings, templates and comments.

struct TagAttributes {  // as written in the page: references such as &amp; are not decoded
  std::string_view class_, id, role, itemprop, component, testid, label;
  bool display_none = false, aria_hidden = false;
};
struct StartTag {
  size_t offset = 0;       // in the skeleton
  uint64_t name = 0;       // hash
  uint8_t element = 0;     // of the name behind the last ':'
  int32_t attributes = 0;  // index into Skeleton::attributes
};
struct Skeleton {
  std::string text;
  std::vector<StartTag> tags;
  std::vector<TagAttributes> attributes = {TagAttributes{}};  // 0: none that matters
  std::string_view title;
  std::string_view og_type, og_title, description;
  std::vector<std::string_view> json_ld;
};

// Deeper elements are left out of the skeleton, their text is kept: the parser looks through all
// open elements at many tags, so its time would be quadratic in the depth. Browsers do the same.
constexpr size_t kMaxDepth = 512;
// What comes after so many tags, or so many bytes of skeleton, is not looked at.
constexpr size_t kMaxTags = 2000000, kMaxSkeleton = size_t(1) << 26;
// Formatting elements that are open when the element around them ends.
constexpr int kMaxMisnested = 100;

class SkeletonScanner {
 public:
  // plain_formatting: see cut_html.
  SkeletonScanner(std::string_view html, bool plain_formatting, Skeleton& out)
      : html_(html), plain_formatting_(plain_formatting), out_(out) {}

  // False: formatting elements are so often not closed that plain_formatting is called for.
  bool scan() {
    out_.text.reserve(html_.size() / 4 + 64);
    while (i_ < html_.size() && written_ < kMaxTags && out_.text.size() < kMaxSkeleton) {
      if (html_[i_] != '<') {
        copy_text(next_markup(i_));
      } else {
        scan_markup();
      }
    }
    return plain_formatting_ || misnested_ <= kMaxMisnested;
  }

 private:
  struct RawTag {  // as it stands in the page
    std::string_view name;
    uint64_t hash = 0;
    uint8_t element = 0;
    bool end = false, self_closing = false, complete = false;
    bool shadow_root = false;
    size_t after = 0;  // behind its '>'
    TagAttributes attributes;
    std::string_view type, property, name_value, content;  // of script and meta
    bool has_attributes = false;
  };
  struct Open {
    uint64_t name;
    uint8_t element;
  };

  char byte(size_t i) const { return i < html_.size() ? html_[i] : '\0'; }
  static bool is_letter(char c) { return uint8_t((c | 32) - 'a') < 26; }
  size_t next_markup(size_t i) const { return std::min(html_.find('<', i), html_.size()); }

  bool starts_with(size_t i, std::string_view lower) const {
    if (html_.size() - std::min(i, html_.size()) < lower.size()) return false;
    for (size_t k = 0; k < lower.size(); k++) {
      if (ascii_lower(html_[i + k]) != lower[k]) return false;
    }
    return true;
  }
  // "</name" or "<name" that a space, '/' or '>' ends.
  bool names_tag(size_t i, std::string_view lower) const {
    if (!starts_with(i, lower)) return false;
    const char c = byte(i + lower.size());
    return is_html_space(c) || c == '/' || c == '>';
  }

  // ---- where things end: each returns the offset behind its end, the page's size if unclosed

  size_t comment_end(size_t i) const {  // html_ at i: "<!--"
    for (size_t k = i + 2; k < html_.size(); k++) {
      k = html_.find("--", k);
      if (k == std::string_view::npos) break;
      if (byte(k + 2) == '>') return k + 3;
      if (k >= i + 4 && byte(k + 2) == '!' && byte(k + 3) == '>') return k + 4;
    }
    return html_.size();
  }
  size_t bogus_comment_end(size_t i) const {
    const size_t k = html_.find('>', i);
    return k == std::string_view::npos ? html_.size() : k + 1;
  }
  // Where "</name" begins that ends raw text.
  size_t raw_text_end(size_t i, std::string_view name) const {
    const std::string end_tag = "</" + lower_text(name);
    while ((i = html_.find("</", i)) != std::string_view::npos) {
      if (names_tag(i, end_tag)) return i;
      i += 2;
    }
    return html_.size();
  }
  // A script may hold "<!--", and within it "<script>...</script>" that does not end it: the states
  // "script data escaped" and "script data double escaped".
  size_t script_end(size_t i) const {
    bool escaped = false, doubly = false;
    while (i < html_.size()) {
      if (escaped && html_[i] == '-' && html_.substr(i, 3) == "-->") {
        escaped = doubly = false;
        i += 3;
      } else if (html_[i] != '<') {
        i = escaped ? std::min(html_.find_first_of("<-", i + 1), html_.size()) : next_markup(i + 1);
      } else if (!escaped && html_.substr(i, 4) == "<!--") {
        escaped = true;
        i += 2;  // "<!-->" ends at once
      } else if (names_tag(i, "</script")) {
        if (!doubly) return i;
        doubly = false;
        i += 8;
      } else {
        if (escaped && !doubly && names_tag(i, "<script")) doubly = true;
        i++;
      }
    }
    return html_.size();
  }

  // A tag at html_[i], whose name begins at `name_begin`, with its attributes.
  RawTag read_tag(size_t i) const {
    RawTag tag;
    tag.end = byte(i + 1) == '/';
    const size_t begin = i + 1 + tag.end;
    size_t k = begin;
    uint64_t h = 0xcbf29ce484222325;
    size_t colon = std::string_view::npos;
    for (; k < html_.size(); k++) {
      const char c = html_[k];
      if (is_html_space(c) || c == '/' || c == '>') break;
      if (c == ':') colon = k;
      h = (h ^ uint8_t(ascii_lower(c))) * 0x100000001b3;
    }
    tag.name = html_.substr(begin, k - begin);
    tag.hash = h;
    tag.element = find_element(h);
    if (!tag.element && colon != std::string_view::npos) {
      tag.element = find_element(name_hash(html_.substr(colon + 1, k - colon - 1)));
    }
    while (k < html_.size()) {
      const char c = html_[k];
      if (c == '>') {
        tag.self_closing = html_[k - 1] == '/' && slash_ == k - 1;
        tag.complete = true;
        tag.after = k + 1;
        return tag;
      }
      if (is_html_space(c) || c == '/') {
        if (c == '/') slash_ = k;
        k++;
      } else {
        k = read_attribute(k, tag);
      }
    }
    tag.after = html_.size();  // the page ends in a tag: HTML5 drops it
    return tag;
  }

  size_t read_attribute(size_t i, RawTag& tag) const {
    const size_t begin = i++;  // a '=' here belongs to the name
    while (i < html_.size() && !is_html_space(html_[i]) && html_[i] != '/' && html_[i] != '>' &&
           html_[i] != '=') {
      i++;
    }
    const std::string_view name = html_.substr(begin, i - begin);
    while (i < html_.size() && is_html_space(html_[i])) i++;
    std::string_view value;
    if (byte(i) == '=' && i < html_.size()) {
      i++;
      while (i < html_.size() && is_html_space(html_[i])) i++;
      const char quote = byte(i);
      if (quote == '"' || quote == '\'') {
        const size_t end = std::min(html_.find(quote, i + 1), html_.size());
        value = html_.substr(i + 1, end - i - 1);
        i = end + 1;
      } else {
        const size_t first = i;
        while (i < html_.size() && !is_html_space(html_[i]) && html_[i] != '>') i++;
        value = html_.substr(first, i - first);
      }
    }
    if (!tag.end) keep_attribute(name, value, tag);
    return i;
  }

  static bool equals(std::string_view text, std::string_view lower) {
    return text.size() == lower.size() &&
           std::equal(text.begin(), text.end(), lower.begin(),
                      [](char a, char b) { return ascii_lower(a) == b; });
  }
  static bool hides(std::string_view style) {  // holds display:none, spaces left out
    std::string packed;
    for (const char c : style) {
      if (c != ' ') packed += ascii_lower(c);
    }
    return packed.find("display:none") != std::string::npos;
  }
  static void keep_attribute(std::string_view name, std::string_view value, RawTag& tag) {
    const auto keep = [&](std::string_view& kept) {
      if (kept.data()) return;  // the first of two counts
      kept = value.data() ? value : std::string_view("");
      tag.has_attributes = true;
    };
    TagAttributes& a = tag.attributes;
    switch (ascii_lower(name[0])) {
      case 'c':
        if (equals(name, "class")) keep(a.class_);
        if (tag.element == kTagMeta && equals(name, "content")) keep(tag.content);
        break;
      case 'i':
        if (equals(name, "id")) keep(a.id);
        if (equals(name, "itemprop")) keep(a.itemprop);
        break;
      case 'r':
        if (equals(name, "role")) keep(a.role);
        break;
      case 'd':
        if (equals(name, "data-component")) keep(a.component);
        if (equals(name, "data-testid")) keep(a.testid);
        break;
      case 'a':
        if (equals(name, "aria-label")) keep(a.label);
        if (equals(name, "aria-hidden") && value == "true")
          a.aria_hidden = tag.has_attributes = true;
        break;
      case 'h':
        if (equals(name, "hidden")) a.display_none = tag.has_attributes = true;
        break;
      case 's':
        if (equals(name, "style") && hides(value)) a.display_none = tag.has_attributes = true;
        if (equals(name, "shadowrootmode")) tag.shadow_root = true;
        break;
      case 't':
        if (tag.element == kTagScript && equals(name, "type")) keep(tag.type);
        break;
      case 'p':
        if (tag.element == kTagMeta && equals(name, "property")) keep(tag.property);
        break;
      case 'n':
        if (tag.element == kTagMeta && equals(name, "name")) keep(tag.name_value);
        break;
    }
  }

  // ---- what is kept

  void copy_text(size_t end) {
    std::string& text = out_.text;
    for (; i_ < end; i_++) {
      const char c = html_[i_];
      if (is_html_space(c)) {
        const bool another = !text.empty() && is_html_space(text.back());
        if (!another || open_pre_ > 0) text += c;
      } else if (c == '<') {
        text += "&lt;";
      } else if (uint8_t(c) >= 0x20 && c != 0x7f) {
        if (c == '&') text_has_reference_ = true;
        text += c;
      } else if (c == '\v') {  // other controls are dropped
        text += ' ';
      }
    }
  }
  // Where something is left out, the text on both sides must not become one reference: "&" "amp;".
  void leave_out(size_t end) {
    if (text_has_reference_) {
      out_.text += "<!>";
      written_++;
    }
    text_has_reference_ = false;
    i_ = std::min(end, html_.size());
  }

  void scan_markup() {
    const char c = byte(i_ + 1);
    if (c == '!') {
      if (html_.substr(i_, 4) == "<!--") return leave_out(comment_end(i_));
      const size_t end = bogus_comment_end(i_ + 2);
      if (!starts_with(i_, "<!doctype")) return leave_out(end);
      out_.text.append(html_.substr(i_, end - i_));
      i_ = end;
    } else if (c == '?') {
      leave_out(bogus_comment_end(i_ + 2));
    } else if (c == '/' && i_ + 2 < html_.size()) {
      if (!is_letter(byte(i_ + 2))) return leave_out(bogus_comment_end(i_ + 2));
      const RawTag tag = read_tag(i_);
      if (!tag.complete || flags_of(exact(tag)) & kUnparsed) return leave_out(tag.after);
      end_tag(tag);
      i_ = tag.after;
    } else if (is_letter(c)) {
      const RawTag tag = read_tag(i_);
      if (!tag.complete) return leave_out(tag.after);
      start_tag(tag);
    } else {
      copy_text(i_ + 1);
    }
  }
  // The element whose name this tag has in full: <o:p> is no p for HTML5.
  static uint8_t exact(const RawTag& tag) {
    return tag.name.find(':') == std::string_view::npos ? tag.element : uint8_t(0);
  }

  void start_tag(const RawTag& tag) {
    const uint8_t element = exact(tag);
    const uint32_t flags = flags_of(element);
    if (element == kTagMeta) keep_meta(tag);
    if (element == kTagSvg) return leave_out(tag.self_closing ? tag.after : svg_end(tag.after));
    if (element == kTagTemplate && !tag.shadow_root) return leave_out(template_end(tag.after));
    if (flags & kUnparsed && flags & kRawText) {
      const size_t end =
          element == kTagScript ? script_end(tag.after) : raw_text_end(tag.after, tag.name);
      const std::string_view content = html_.substr(tag.after, end - tag.after);
      if (element == kTagTitle && !out_.title.data()) out_.title = content;
      if (element == kTagScript && lower_text(tag.type).find("ld+json") != std::string::npos) {
        out_.json_ld.push_back(content);
      }
      return leave_out(bogus_comment_end(end));
    }
    if (flags & kUnparsed) return leave_out(tag.after);
    if (push(tag, element)) {
      StartTag start{out_.text.size(), tag.hash, tag.element, 0};
      if (tag.has_attributes) {
        start.attributes = int32_t(out_.attributes.size());
        out_.attributes.push_back(tag.attributes);
      }
      out_.tags.push_back(start);
      written_++;
      out_.text += '<';
      out_.text += name_in_skeleton(tag, flags);
      if (tag.self_closing) out_.text += '/';
      out_.text += '>';
      text_has_reference_ = false;
    }
    i_ = tag.after;
    if (flags & kRawText) {  // xmp: its content is shown
      const size_t end = raw_text_end(i_, tag.name);
      out_.text += html_.substr(i_, end - i_);
      i_ = end;
    } else if (element == kTagPlaintext) {
      out_.text += html_.substr(i_);
      i_ = html_.size();
    }
  }

  void end_tag(const RawTag& tag) {
    const uint8_t element = exact(tag);
    if (!pop(tag, element)) return;
    written_++;
    out_.text += "</";
    out_.text += name_in_skeleton(tag, flags_of(element));
    out_.text += '>';
    text_has_reference_ = false;
  }

  std::string_view name_in_skeleton(const RawTag& tag, uint32_t flags) const {
    return plain_formatting_ && flags & kFormatting ? std::string_view("q") : tag.name;
  }

  void keep_meta(const RawTag& tag) {
    const std::string key = lower_text(tag.property.empty() ? tag.name_value : tag.property);
    if (key == "og:type") out_.og_type = tag.content;
    if (key == "og:title") out_.og_title = tag.content;
    if ((key == "description" || key == "og:description") &&
        tag.content.size() > out_.description.size()) {
      out_.description = tag.content;
    }
  }

  // svg: everything up to its end tag, or to a tag of HTML that cannot stand in it. Within
  // foreignObject, desc and title, HTML may stand.
  size_t svg_end(size_t i) const {
    std::string open = "s";  // s: in an svg, h: where HTML may stand
    while ((i = next_markup(i)) < html_.size()) {
      if (html_.substr(i, 4) == "<!--") {
        i = comment_end(i);
      } else if (open.back() == 's' && html_.substr(i, 9) == "<![CDATA[") {
        const size_t end = html_.find("]]>", i);
        i = end == std::string_view::npos ? html_.size() : end + 3;
      } else if (byte(i + 1) == '!' || byte(i + 1) == '?') {
        i = bogus_comment_end(i);
      } else if (is_letter(byte(i + 1)) || (byte(i + 1) == '/' && is_letter(byte(i + 2)))) {
        const RawTag tag = read_tag(i);
        const uint8_t element = exact(tag);
        const bool html_may_stand =
            element == kTagForeignObject || element == kTagDesc || element == kTagTitle;
        if (open.back() == 's') {
          const bool breaks_out = tag.end ? element == kTagP || element == kTagBr
                                          : (flags_of(element) & kBreakout) != 0;
          if (breaks_out) {
            while (!open.empty() && open.back() == 's') open.pop_back();
            if (open.empty()) return i;
          } else if (element == kTagSvg && tag.end) {
            open.pop_back();
            if (open.empty()) return tag.after;
          } else if (element == kTagSvg && !tag.self_closing) {
            open += 's';
          } else if (html_may_stand && !tag.end && !tag.self_closing) {
            open += 'h';
          }
          i = tag.after;
        } else {
          if (html_may_stand && tag.end) open.pop_back();
          if (element == kTagSvg && !tag.end && !tag.self_closing) open += 's';
          i = after_raw_text(tag, element);
        }
      } else {
        i++;
      }
    }
    return html_.size();
  }
  // Behind a tag, and behind its content where that is raw text.
  size_t after_raw_text(const RawTag& tag, uint8_t element) const {
    if (tag.end || !(flags_of(element) & kRawText)) return tag.after;
    if (element == kTagScript) return bogus_comment_end(script_end(tag.after));
    return bogus_comment_end(raw_text_end(tag.after, tag.name));
  }
  size_t template_end(size_t i) const {
    int depth = 1;
    while ((i = next_markup(i)) < html_.size()) {
      if (html_.substr(i, 4) == "<!--") {
        i = comment_end(i);
      } else if (byte(i + 1) == '!' || byte(i + 1) == '?') {
        i = bogus_comment_end(i);
      } else if (is_letter(byte(i + 1)) || (byte(i + 1) == '/' && is_letter(byte(i + 2)))) {
        const RawTag tag = read_tag(i);
        const uint8_t element = exact(tag);
        if (element == kTagTemplate) depth += tag.end ? -1 : 1;
        if (depth == 0) return tag.after;
        i = element == kTagSvg && !tag.end && !tag.self_closing ? svg_end(tag.after)
                                                                : after_raw_text(tag, element);
      } else {
        i++;
      }
    }
    return html_.size();
  }

  // ---- the depth: the open elements about as the parser will hold them, 512 at most

  // Whether the tag is written to the skeleton.
  bool push(const RawTag& tag, uint8_t element) {
    const uint32_t flags = flags_of(element);
    if (element == kTagHtml || element == kTagBody || element == kTagHead || flags & kVoid)
      return true;
    close_implied(element);
    if (open_.size() >= kMaxDepth) {
      left_out_[tag.hash]++;
      return false;
    }
    open_.push_back({tag.hash, element});
    if (element == kTagPre) open_pre_++;
    return true;
  }
  void close_implied(uint8_t element) {
    const uint32_t flags = flags_of(element);
    const auto is = [&](size_t k, std::initializer_list<uint8_t> list) {
      return std::find(list.begin(), list.end(), open_[k].element) != list.end();
    };
    if (flags & kClosesP) close_nearest({kTagP}, kScope, {kTagButton});
    if (open_.empty()) return;
    if (flags & kHeading && flags_of(open_.back().element) & kHeading) cut(open_.size() - 1);
    if (element == kTagOption && is(open_.size() - 1, {kTagOption})) cut(open_.size() - 1);
    if (element == kTagLi) close_item({kTagLi});
    if (element == kTagDt || element == kTagDd) close_item({kTagDt, kTagDd});
    if (element == kTagTd || element == kTagTh)
      close_nearest({kTagTd, kTagTh}, 0, {kTagTable, kTagTemplate});
    if (element == kTagTr) close_nearest({kTagTr}, 0, {kTagTable, kTagTemplate});
    if (element == kTagButton) close_nearest({kTagButton}, kScope, {});
  }
  using ElementList = std::initializer_list<uint8_t>;
  static bool in(uint8_t element, ElementList list) {
    return std::find(list.begin(), list.end(), element) != list.end();
  }
  void close_nearest(ElementList wanted, uint32_t stop_flags, ElementList stops) {
    for (size_t k = open_.size(); k-- > 0;) {
      const uint8_t element = open_[k].element;
      if (in(element, wanted)) return cut(k);
      if (flags_of(element) & stop_flags || in(element, stops)) return;
    }
  }
  void close_item(ElementList wanted) {
    for (size_t k = open_.size(); k-- > 0;) {
      const uint8_t element = open_[k].element;
      if (in(element, wanted)) return cut(k);
      if (flags_of(element) & kSpecial && element != kTagDiv && element != kTagP) return;
    }
  }
  void cut(size_t size) {
    for (size_t k = size; k < open_.size(); k++) {
      open_pre_ -= open_[k].element == kTagPre;
      if (k > size && flags_of(open_[k].element) & kFormatting) misnested_++;
    }
    open_.resize(size);
  }
  // Whether the end tag is written to the skeleton.
  bool pop(const RawTag& tag, uint8_t element) {
    const uint32_t flags = flags_of(element);
    if (!left_out_.empty()) {
      const auto it = left_out_.find(tag.hash);
      if (it != left_out_.end()) {
        if (--it->second == 0) left_out_.erase(it);
        return false;
      }
    }
    const bool of_table = in(element, {kTagTable, kTagTr, kTagTd, kTagTh, kTagCaption});
    bool special_above = false;
    for (size_t k = open_.size(); k-- > 0;) {
      const uint32_t other = flags_of(open_[k].element);
      if (open_[k].name == tag.hash) {
        if (flags & kFormatting && special_above) {
          misnested_++;
          open_.erase(open_.begin() + ptrdiff_t(k));
        } else {
          cut(k);
        }
        return true;
      }
      if (of_table ? in(open_[k].element, {kTagTable, kTagTemplate}) : (other & kScope) != 0) break;
      if (!(flags & (kSpecial | kFormatting)) && other & kSpecial) break;
      special_above |= (other & kSpecial) != 0;
    }
    return true;  // closes nothing here; the parser may know better
  }

  const std::string_view html_;
  const bool plain_formatting_;
  Skeleton& out_;
  size_t i_ = 0;
  size_t written_ = 0;               // tags in the skeleton
  mutable size_t slash_ = 0;         // offset of the last '/' in a tag
  bool text_has_reference_ = false;  // '&' since the last tag
  std::vector<Open> open_;
  int open_pre_ = 0, misnested_ = 0;
  std::unordered_map<uint64_t, uint32_t> left_out_;  // start tags left out, by name
};

// ---------------------------------------------------------------------------------------------
// The tree: gumbo's, of the skeleton. Its memory is an arena that is freed at once, because
// gumbo frees a tree by nested calls, one for each level.

class TreeArena {
 public:
  TreeArena() = default;
  TreeArena(const TreeArena&) = delete;
  TreeArena& operator=(const TreeArena&) = delete;
  ~TreeArena() { clear(); }

  // nullptr: the tree would need more memory than any sensible page. The parser is C code with
  // its memory in the arena, so that longjmp may leave it.
  GumboOutput* parse(std::string_view text, size_t most_bytes) {
    clear();
    left_ = most_bytes;
    GumboOptions options = kGumboDefaultOptions;
    options.allocator = &allocate;
    options.deallocator = [](void*, void*) {};
    options.userdata = this;
    options.max_errors = 0;
    if (setjmp(full_)) return nullptr;
    return gumbo_parse_with_options(&options, text.data(), text.size());
  }

 private:
  static constexpr size_t kChunk = size_t(1) << 18;
  static void* allocate(void* self, size_t size) {
    TreeArena& a = *static_cast<TreeArena*>(self);
    size = (size + 15) & ~size_t(15);
    if (size > a.left_) std::longjmp(a.full_, 1);
    a.left_ -= size;
    if (size > a.free_) {
      const size_t chunk = std::max(size, kChunk);
      void* const memory = std::malloc(chunk + sizeof(Chunk));
      if (!memory) std::longjmp(a.full_, 1);
      a.last_ = new (memory) Chunk{a.last_};
      a.next_ = static_cast<char*>(memory) + sizeof(Chunk);
      a.free_ = chunk;
    }
    void* const p = a.next_;
    a.next_ += size;
    a.free_ -= size;
    return p;
  }
  void clear() {
    while (last_) {
      Chunk* const before = last_->before;
      std::free(last_);
      last_ = before;
    }
    free_ = 0;
  }

  struct alignas(16) Chunk {
    Chunk* before;
  };
  Chunk* last_ = nullptr;
  char* next_ = nullptr;
  size_t free_ = 0, left_ = 0;
  std::jmp_buf full_;
};

// References such as &amp; decoded, white space collapsed: of titles and descriptions.
std::string decode_text(std::string_view raw) {
  std::string decoded(raw.substr(0, 10000));
  if (decoded.find('&') != std::string::npos) {
    TreeArena arena;
    const std::string page = "<title>" + decoded + "</title>";
    const GumboOutput* const tree = arena.parse(page, size_t(1) << 22);
    decoded.clear();
    if (tree && tree->root->v.element.children.length > 0) {
      const auto* const head = static_cast<GumboNode*>(tree->root->v.element.children.data[0]);
      const GumboVector& of_head = head->v.element.children;
      const auto* const title = of_head.length ? static_cast<GumboNode*>(of_head.data[0]) : nullptr;
      if (title && title->v.element.children.length > 0) {
        decoded = static_cast<GumboNode*>(title->v.element.children.data[0])->v.text.text;
      }
    }
  }
  std::string text;
  bool space = false;
  for (size_t i = 0; i < decoded.size();) {
    const uint32_t c = next_code_point(decoded, i);
    if (is_white(c)) {
      space = true;
    } else if (c >= 0x20) {
      if (space && !text.empty()) text += ' ';
      space = false;
      append_code_point(text, c);
    }
  }
  return text;
}

// ---------------------------------------------------------------------------------------------
// Nodes and blocks: one walk over the tree. A block is the text between two boundaries of
// block-level elements. Its owner is the element of its first text; its block node the nearest
// block-level element around that.

// What names of classes, ids and roles tell: 30 groups of key words.
constexpr PhraseGroup kClassGroups[] = {
    {"nav", "nav|menu|breadcrumb|crumb|navbar|toc>|table-of-contents|skip"},
    {"footer", "foot|copyright|colophon|legal"},
    {"header", "header|masthead|topbar|banner|navbar"},
    {"side", "side|aside|widget|rail|secondary"},
    {"comment", "comment|disqus|discuss|respon"},
    {"cookie", "cookie|consent|gdpr|privacy|onetrust"},
    {"share", "share|social|follow|facebook|twitter"},
    {"related",
     "relat|recommend|similar|also|recirc|more-|read-next|popular|trending|upsell|cross-sell|up-"
     "next|"
     "suggest"},
    {"content", "content|body|text|entry|story|rte|richtext|prose|markdown|wysiwyg|copy>"},
    {"article", "article|post|blog|news|single"},
    {"main", "<main|primary|page-content|maincontent|#content"},
    {"product", "product|prod-|pdp|sku|item-detail"},
    {"price", "price|amount|money|cost"},
    {"desc", "desc|detail|summary|overview|about|spec|feature|info"},
    {"ad", "<ad>|<ads>|<ad-|advert|sponsor|promo|dfp|taboola|outbrain|banner"},
    {"modal", "modal|popup|pop-up|dialog|overlay|drawer|offcanvas|lightbox|tooltip|toast"},
    {"meta", "meta|byline|author|date|time|tag|categor|label"},
    {"form", "form|search|login|signup|sign-up|subscribe|newsletter|email|input|register"},
    {"cart", "cart|checkout|basket|wishlist|bag|quantity|add-to|variant|swatch|option"},
    {"review", "review|rating|star|testimonial|feedback"},
    {"forum", "thread|topic|message|reply|answer|question|forum|quote|signature|avatar|vote|user"},
    {"list", "list|grid|card|collection|item|result|tile|catalog|row"},
    {"hidden", "hidden|sr-only|visually|screen-reader|collapse|d-none|hide|offscreen|noprint"},
    {"hero", "hero|intro|lead|jumbotron|headline|title|heading"},
    {"faq", "faq|accordion|tab|panel|collaps|toggle"},
    {"gallery", "gallery|slider|carousel|swiper|slick|caption|image|photo|media|thumb"},
    {"cta", "cta|btn|button|action|link"},
    {"site", "site|global|page-|wrapper|layout"},
    {"code", "code|highlight|docs|doc-|api|method|param|example"},
    {"filter", "filter|facet|sort|pagination|pager|paging|toolbar|refine"},
};
constexpr size_t kClassGroupCount = std::size(kClassGroups);
constexpr size_t kClassBytes = 300;  // of an element's attributes that are looked at

// Ancestors that a block is told about; roles of ARIA stand for some of them.
constexpr uint8_t kAncestors[] = {kTagMain,    kTagArticle,    kTagNav,     kTagHeader, kTagFooter,
                                  kTagAside,   kTagSection,    kTagForm,    kTagUl,     kTagOl,
                                  kTagTable,   kTagFigure,     kTagButton,  kTagA,      kTagDialog,
                                  kTagDetails, kTagBlockquote, kTagPre,     kTagLabel,  kTagDl,
                                  kTagP,       kTagLi,         kTagNoscript};
constexpr uint32_t ancestor_bit(uint8_t element) {
  for (size_t k = 0; k < std::size(kAncestors); k++) {
    if (kAncestors[k] == element) return 1u << k;
  }
  return 0;
}
uint32_t role_bit(std::string_view role) {
  if (role == "navigation") return ancestor_bit(kTagNav);
  if (role == "main") return ancestor_bit(kTagMain);
  if (role == "contentinfo") return ancestor_bit(kTagFooter);
  if (role == "banner") return ancestor_bit(kTagHeader);
  if (role == "dialog") return ancestor_bit(kTagDialog);
  if (role == "complementary") return ancestor_bit(kTagAside);
  return 0;
}

struct PageNode {
  int32_t parent = -1;
  int32_t group = 0;       // the siblings of its name and first class: index into group_sizes
  int32_t list_item = -1;  // nearest li, itself included; -1: none
  int32_t row = -1;        // nearest tr
  int32_t cell = -1;       // nearest td or th
  uint32_t depth = 0, children = 0;
  uint32_t classes = 0;    // groups of key words
  uint32_t ancestors = 0;  // with its own
  uint64_t key = 0;        // hash of name and first class
  uint8_t element = 0;
  bool display_none = false, aria_hidden = false;
  // Sums over the blocks whose owner is in it.
  uint32_t blocks = 0, words = 0, link_words = 0, prose_words = 0, sentences = 0;
  int32_t first_block = -1;
};
struct TextBlock {
  std::string text;       // white space collapsed
  std::string formatted;  // of <pre> with its white space, of others with the lines of <br>
  int32_t owner = 0, block_node = 0;
  uint32_t words = 0, link_words = 0, sentences = 0;
};
struct PageBlocks {
  std::vector<PageNode> nodes;
  std::vector<uint32_t> group_sizes;
  std::vector<TextBlock> blocks;
  size_t articles = 0, paragraphs = 0;
  bool has_main = false;
};

class TreeWalk {
 public:
  TreeWalk(const Skeleton& skeleton, PageBlocks& page) : skeleton_(skeleton), page_(page) {}

  void walk(const GumboNode* root) {
    visit(root, {-1, -1, false, false});
    while (!stack_.empty()) {
      Frame& top = stack_.back();
      if (top.next < top.children->length) {
        const auto* const child = static_cast<const GumboNode*>(top.children->data[top.next++]);
        visit(child, top.inside);
      } else {
        if (top.is_block) flush();
        stack_.pop_back();
      }
    }
    flush();
  }

 private:
  struct Inside {  // what text finds around it
    int32_t node, block_node;
    bool link, pre;
  };
  struct Frame {
    const GumboVector* children;
    unsigned next;
    bool is_block;
    Inside inside;
  };

  void visit(const GumboNode* node, const Inside& inside) {
    switch (node->type) {
      case GUMBO_NODE_TEXT:
      case GUMBO_NODE_WHITESPACE:
      case GUMBO_NODE_CDATA:
        text(node->v.text.text, inside);
        break;
      case GUMBO_NODE_ELEMENT:
      case GUMBO_NODE_TEMPLATE:
        element(node->v.element, inside);
        break;
      default:;
    }
  }

  const StartTag* start_tag(const GumboElement& e) {
    const char* const begin = skeleton_.text.data();
    if (!e.original_tag.data || e.original_tag.data < begin ||
        e.original_tag.data >= begin + skeleton_.text.size()) {
      return nullptr;
    }
    const size_t offset = size_t(e.original_tag.data - begin);
    const auto& tags = skeleton_.tags;
    if (next_tag_ < tags.size() && tags[next_tag_].offset == offset) return &tags[next_tag_++];
    const auto it = std::lower_bound(tags.begin(), tags.end(), offset,
                                     [](const StartTag& t, size_t o) { return t.offset < o; });
    if (it == tags.end() || it->offset != offset) return nullptr;
    next_tag_ = size_t(it - tags.begin()) + 1;
    return &*it;
  }

  void element(const GumboElement& e, const Inside& inside) {
    static const StartTag kImplied;
    const StartTag* const written = start_tag(e);
    StartTag tag = written ? *written : kImplied;
    if (!written) {
      tag.name = name_hash(gumbo_normalized_tagname(e.tag));
      tag.element = find_element(tag.name);
    }
    const uint32_t flags = flags_of(tag.element);
    if (flags & kDropped) return;
    if (tag.element == kTagBr) return line_break();
    const bool is_block = flags & kBlockLevel;
    if (is_block) flush();
    const int32_t me = add_node(tag, inside.node);
    Inside within = inside;
    within.node = me;
    if (is_block || inside.block_node < 0) within.block_node = me;
    within.link |= tag.element == kTagA;
    within.pre |= tag.element == kTagPre;
    stack_.push_back({&e.children, 0, is_block, within});
  }

  int32_t add_node(const StartTag& tag, int32_t parent) {
    const TagAttributes& a = skeleton_.attributes[size_t(tag.attributes)];
    PageNode n;
    n.parent = parent;
    n.element = tag.element;
    n.classes = class_groups(a);
    n.display_none = a.display_none;
    n.aria_hidden = a.aria_hidden;
    n.ancestors = ancestor_bit(tag.element) | role_bit(a.role);
    const std::string_view first_class = a.class_.substr(0, a.class_.find(' '));
    n.key = a.class_.empty() ? tag.name : mix64(tag.name, hash64(first_class));
    const int32_t me = int32_t(page_.nodes.size());
    if (parent >= 0) {
      PageNode& p = page_.nodes[size_t(parent)];
      p.children++;
      n.ancestors |= p.ancestors;
      n.display_none |= p.display_none;
      n.aria_hidden |= p.aria_hidden;
      n.depth = p.depth + 1;
      n.list_item = p.list_item;
      n.row = p.row;
      n.cell = p.cell;
    }
    if (tag.element == kTagLi) n.list_item = me;
    if (tag.element == kTagTr) n.row = me;
    if (tag.element == kTagTd || tag.element == kTagTh) n.cell = me;
    const auto [it, added] =
        groups_.try_emplace(mix64(n.key, uint64_t(parent) + 1), int32_t(page_.group_sizes.size()));
    if (added) page_.group_sizes.push_back(0);
    n.group = it->second;
    page_.group_sizes[size_t(n.group)]++;
    page_.articles += tag.element == kTagArticle;
    page_.paragraphs += tag.element == kTagP;
    page_.has_main |= (n.ancestors & ancestor_bit(kTagMain)) != 0;
    page_.nodes.push_back(n);
    return me;
  }
  uint32_t class_groups(const TagAttributes& a) {
    static const PhraseMatcher matcher(kClassGroups);
    attributes_.clear();
    const auto add = [&](std::string_view separator, std::string_view value) {
      if (attributes_.size() >= kClassBytes) return;
      attributes_ += separator;
      for (const char c : value.substr(0, kClassBytes)) attributes_ += ascii_lower(c);
    };
    add("", a.class_);
    if (!a.id.empty()) add(" #", a.id);
    for (const std::string_view v : {a.role, a.itemprop, a.component, a.testid, a.label}) {
      if (!v.empty()) add(" ", v);
    }
    if (attributes_.empty()) return 0;
    return matcher.match(std::string_view(attributes_).substr(0, kClassBytes));
  }

  // ---- the block under construction

  void text(std::string_view piece, const Inside& inside) {
    bool visible = false;
    for (size_t i = 0; i < piece.size();) {
      const size_t begin = i;
      while (i < piece.size() && piece[i] > ' ' && piece[i] < 0x7f) i++;  // ASCII, all at once
      if (i == begin) {
        const uint32_t c = next_code_point(piece, i);
        if (is_white(c)) {
          white(c, inside.pre);
          continue;
        }
        if (c < 0x20 || c == 0x7f) continue;  // controls
      }
      if (!visible) begin_piece(inside);
      visible = true;
      append(piece.substr(begin, i - begin), inside);
    }
  }
  void begin_piece(const Inside& inside) {
    line_breaks_ = 0;
    if (!block_.text.empty()) return;
    block_.owner = inside.node;
    block_.block_node = inside.block_node;
    links_.clear();
    // Only the indentation of a first line is kept.
    gap_ = inside.pre ? gap_.substr(gap_.rfind('\n') + 1) : "";
  }
  void append(std::string_view word, const Inside& inside) {
    if (!gap_.empty() || space_) {
      if (space_ && !block_.text.empty()) block_.text += ' ';
      block_.formatted += gap_;
      gap_.clear();
      space_ = false;
    }
    const size_t begin = block_.text.size();
    block_.text.append(word);
    block_.formatted.append(word);
    if (!inside.link) return;
    if (!links_.empty() && links_.back().second + 1 >= begin && link_node_ == inside.node) {
      links_.back().second = block_.text.size();
    } else {
      links_.push_back({begin, block_.text.size()});
    }
    link_node_ = inside.node;
  }
  void white(uint32_t c, bool pre) {
    space_ = true;
    if (pre) {
      if (c == '\n' || c == '\t') {
        gap_ += char(c);
      } else if (c != '\r') {
        gap_ += ' ';
      }
    } else if (gap_.empty()) {
      gap_ = " ";
    }
  }
  void line_break() {
    space_ = true;
    line_breaks_++;
    if (!stack_.empty() && stack_.back().inside.pre) {
      gap_ += '\n';
      return;
    }
    gap_ = "\n";
    if (line_breaks_ >= 2) flush();
  }
  void flush() {
    gap_.clear();
    space_ = false;
    if (block_.text.empty()) return;
    for (const auto& [begin, end] : links_) {
      block_.link_words += count_words(std::string_view(block_.text).substr(begin, end - begin));
    }
    page_.blocks.push_back(std::move(block_));
    block_ = TextBlock{};
  }

  const Skeleton& skeleton_;
  PageBlocks& page_;
  size_t next_tag_ = 0;
  std::vector<Frame> stack_;
  std::unordered_map<uint64_t, int32_t> groups_;  // (parent, key) -> group
  std::string attributes_;
  TextBlock block_;
  std::vector<std::pair<size_t, size_t>> links_;  // of block_.text, that are in <a>
  int32_t link_node_ = -1;
  std::string gap_;  // white space between words of block_.formatted
  bool space_ = false;
  int line_breaks_ = 0;
};

// The page, cut into blocks. HTML5 opens formatting elements that were never closed (b, i, a) again
// in every later paragraph: a hostile page makes gigabytes of tree, or one 10,000 levels deep, of
// this. On such pages a second scan gives the parser the name of a plain element in their place.
void cut_html(std::string_view html, Skeleton& skeleton, PageBlocks& page) {
  TreeArena arena;
  const GumboOutput* tree = nullptr;
  for (const bool plain_formatting : {false, true}) {
    skeleton = Skeleton{};
    if (!SkeletonScanner(html, plain_formatting, skeleton).scan()) continue;
    tree = arena.parse(skeleton.text, (size_t(1) << 25) + skeleton.text.size() * 160);
    if (tree) break;
  }
  if (tree) TreeWalk(skeleton, page).walk(tree->root);
}

// ---------------------------------------------------------------------------------------------
// Features of blocks: 241 numbers each, in the order of feature_names()

// What the words of a block tell: 17 groups of phrases, looked for in its first 400 characters.
constexpr PhraseGroup kTextGroups[] = {
    {"cookie", "cookie|consent|gdpr"},
    {"policy", "privacy|terms of|terms &|all rights reserved|copyright|©|disclaimer|legal"},
    {"login",
     "log in|login|sign in|signin|sign up|signup|register|my account|create account|subscri|"
     "newsletter|log out|logout"},
    {"share",
     "<share|tweet|facebook|twitter|instagram|linkedin|pinterest|whatsapp|follow us|copy link"},
    {"cart",
     "add to cart|add to bag|add to basket|add to wishlist|checkout|<cart>|sold out|in stock|"
     "out of stock|free shipping|quantity|wishlist|buy now|notify me"},
    {"more",
     "read more|learn more|see more|view all|show more|load more|see all|view more|"
     "continue reading|click here|skip to|back to top|next|previous"},
    {"related",
     "related|recommended|you may|you might|also like|popular|trending|recent posts|latest|similar|"
     "more from|up next|featured|customers also|recently viewed"},
    {"comment",
     "<comment>|<comments>|<reply>|<replies>|leave a|<answer>|<answers>|<vote>|<votes>|<like>|"
     "<likes>|report|quote|<post>|<posts>|<joined>|<member>|<members>"},
    {"date", "<ago>"},
    {"by",
     "^by>|written by|author|posted|published|updated|min read|reviewed by|photo|image|credit|"
     "source:"},
    {"price", "<usd>"},
    {"contact", "contact|call us|phone|@|address|hours|support|help cent"},
    {"ad", "advert|sponsor|promot|affiliate|disclosure"},
    {"search",
     "<search|filter|sort by|select|choose|menu|close|open|toggle|loading|javascript|browser"},
    {"review", "<review>|<reviews>|rating|star>|stars>|verified"},
    {"home",
     "^home$|^about$|^about us$|^faq$|^faqs$|^careers$|^blog$|^news$|^shop|^products$|^services$|"
     "^pricing$"},
    {"table", "table of contents|on this page|in this article|contents|jump to"},
};
constexpr size_t kPhraseCharacters = 400;
enum { kDatePhrase = 8, kPricePhrase = 10, kContactPhrase = 11 };

// The phrases with digits, which are no fixed strings.
//   date      <(19|20)dd>  or  <(jan|...|dec)[a-z]*[.]?_d
//   price     [$€£¥₹]_?d  or  d_?[€£]      (d: a digit, _: a space)
//   contact   ddd[-._]ddd
uint32_t number_phrases(std::string_view text) {
  uint32_t found = 0;
  const auto byte = [&](size_t i) { return i < text.size() ? text[i] : '\0'; };
  const auto digit = [&](size_t i) { return uint8_t(byte(i) - '0') < 10; };
  const auto word_before = [&](size_t i) {
    return i > 0 && is_word_character(previous_code_point(text, i));
  };
  const auto word_after = [&](size_t i) {
    return i < text.size() && is_word_character(next_code_point(text, i));
  };
  const auto one_of = [](std::string_view s, std::initializer_list<const char*> list, bool ends) {
    return std::any_of(list.begin(), list.end(),
                       [&](const char* x) { return ends ? s.ends_with(x) : s.starts_with(x); });
  };
  const auto month_before = [&](size_t i) {  // text[i - 1] is a space
    size_t end = i - 1;
    if (end > 0 && text[end - 1] == '.') end--;
    size_t begin = end;
    while (begin > 0 && uint8_t(text[begin - 1] - 'a') < 26) begin--;
    return !word_before(begin) && one_of(text.substr(begin, end - begin),
                                         {"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug",
                                          "sep", "oct", "nov", "dec"},
                                         false);
  };
  for (size_t i = 0; i < text.size(); i++) {
    if (!digit(i)) continue;
    const bool year = (text.substr(i, 2) == "19" || text.substr(i, 2) == "20") && digit(i + 2) &&
                      digit(i + 3) && !word_before(i) && !word_after(i + 4);
    if (year || (i > 0 && text[i - 1] == ' ' && month_before(i))) found |= 1u << kDatePhrase;
    const size_t before = i - (i > 0 && text[i - 1] == ' ');
    const size_t after = i + 1 + (byte(i + 1) == ' ');
    if (one_of(text.substr(0, before), {"$", "€", "£", "¥", "₹"}, true) ||
        (after <= text.size() && one_of(text.substr(after), {"€", "£"}, false))) {
      found |= 1u << kPricePhrase;
    }
    const char separator = byte(i + 3);
    if (digit(i + 1) && digit(i + 2) && digit(i + 4) && digit(i + 5) && digit(i + 6) &&
        (separator == '-' || separator == '.' || separator == ' ')) {
      found |= 1u << kContactPhrase;
    }
  }
  return found;
}
uint32_t text_groups(std::string_view lower) {
  static const PhraseMatcher matcher(kTextGroups);
  return matcher.match(lower) | number_phrases(lower);
}

// The most frequent words of ten languages: text that reads on has many of them.
constexpr const char* kStopWords =
    "the of and to in a is that for it as with on be are this was by or at from not have an you "
    "your "
    "we our they can will has but if which their all more de la el en y los del que un por con las "
    "para una es se al le les des et du une dans est pour qui der die und das den von zu mit ist "
    "im "
    "ein auf il di e che è per non i o da do não os em um uma на и в не с по het een van op te dat";

class HashedWords {  // hashes of words
 public:
  void add(uint64_t hash) {
    if (std::find(hashes_.begin(), hashes_.end(), hash) == hashes_.end()) hashes_.push_back(hash);
    filter_[hash >> 6 & 31] |= uint64_t(1) << (hash & 63);
  }
  int find(uint64_t hash) const {  // its number, -1: not in the set
    if (!(filter_[hash >> 6 & 31] >> (hash & 63) & 1)) return -1;
    const auto it = std::find(hashes_.begin(), hashes_.end(), hash);
    return it == hashes_.end() ? -1 : int(it - hashes_.begin());
  }
  size_t size() const { return hashes_.size(); }

 private:
  std::vector<uint64_t> hashes_;
  std::array<uint64_t, 32> filter_{};
};

// Hash of a word, of its lower-case code points.
constexpr uint64_t kWordHash = 0xcbf29ce484222325;
uint64_t extend_word(uint64_t hash, uint32_t c) {
  hash = (hash ^ c) * 0x9e3779b97f4a7c15;
  return hash ^ hash >> 29;
}
HashedWords hashed_words(std::string_view text, size_t most) {
  HashedWords set;
  const std::string lower = lower_text(text);
  each_word(lower, [&](size_t begin, size_t end, uint32_t) {
    uint64_t h = kWordHash;
    for (size_t i = begin; i < end;) h = extend_word(h, next_code_point(lower, i));
    if (set.size() < most) set.add(h);
  });
  return set;
}

// What a block's own text tells.
struct TextMeasures {
  uint32_t characters = 0, words = 0, sentences = 0, commas = 0, longest_word = 0;
  uint32_t upper = 0, lower = 0, digits = 0, punctuation = 0, stop_words = 0, capitalised = 0;
  uint32_t title_words = 0, title_words_covered = 0;
  uint32_t first = 0, last = 0;  // code points
  bool separators = false;
  uint64_t lower_hash = kWordHash;
  uint32_t phrases = 0;
};

bool ends_sentence(uint32_t c) {
  return c == '.' || c == '!' || c == '?' || c == 0x2026 || c == 0x3002;
}
bool is_quote_after_sentence(uint32_t c) {
  return c == '"' || c == '\'' || c == ')' || c == 0x201d || c == 0x2019;
}

TextMeasures measure_text(std::string_view text, const HashedWords& title) {
  static const HashedWords stop_words = hashed_words(kStopWords, 1000);
  TextMeasures m;
  std::string lower;  // the first 400 characters
  uint64_t word = kWordHash, covered = 0;
  uint32_t word_characters = 0, before = ' ';
  const auto end_word = [&] {
    if (!word_characters) return;
    m.words++;
    m.longest_word = std::max(m.longest_word, word_characters);
    m.stop_words += stop_words.find(word) >= 0;
    const int k = title.find(word);
    if (k >= 0) {
      m.title_words++;
      covered |= uint64_t(1) << k;
    }
    word = kWordHash;
    word_characters = 0;
  };
  const uint8_t* const classes = char_classes();
  for (size_t i = 0; i < text.size();) {
    const uint32_t c = next_code_point(text, i);
    const uint8_t kind = classes[c];
    const uint32_t small = c < 0x80 ? uint32_t(ascii_lower(char(c))) : lower_case(c);
    m.lower_hash = extend_word(m.lower_hash, small);
    if (m.characters < kPhraseCharacters) append_code_point(lower, small);
    if (m.characters == 0) m.first = c;
    m.characters++;
    m.last = c;
    if (ends_sentence(before) && (is_white(c) || is_quote_after_sentence(c))) m.sentences++;
    const bool letter_or_number =
        kind == kLower || kind == kUpper || kind == kLetter || kind == kNumber;
    if (letter_or_number || c == '_') {
      if (c >= 'A' && c <= 'Z' && !word_characters) m.capitalised++;
      word = extend_word(word, small);
      word_characters++;
    } else {
      end_word();
    }
    m.upper += kind == kUpper;
    m.lower += kind == kLower;
    m.digits += kind == kNumber;
    if (!letter_or_number && !is_white(c)) m.punctuation++;
    m.commas += c == ',';
    m.separators |= c == '|' || c == 0xbb || c == 0x203a || c == 0x2022 || c == 0xb7;
    before = c;
  }
  end_word();
  if (ends_sentence(before)) m.sentences++;
  m.title_words_covered = uint32_t(std::popcount(covered));
  m.phrases = text_groups(lower);
  return m;
}

// ---- the page

// How often "@type": "NAME" occurs in the JSON-LD of a page.
std::unordered_map<std::string, uint32_t> json_ld_types(const Skeleton& skeleton) {
  std::unordered_map<std::string, uint32_t> types;
  for (const std::string_view json : skeleton.json_ld) {
    for (size_t i = 0; (i = json.find("\"@type\"", i)) != std::string_view::npos;) {
      i += 7;
      const auto skip = [&](std::string_view also) {
        while (i < json.size() && (is_html_space(json[i]) || also.find(json[i]) < also.size())) i++;
      };
      skip("");
      if (i >= json.size() || json[i] != ':') continue;
      i++;
      skip("[");
      if (i >= json.size() || json[i] != '"') continue;
      const size_t end = json.find('"', i + 1);
      if (end == std::string_view::npos) break;
      if (end - i < 60) types[std::string(json.substr(i + 1, end - i - 1))]++;
      i = end;
    }
  }
  return types;
}

constexpr const char* kJsonLdTypes[] = {"Product",  "Offer",  "ItemList",    "ListItem",
                                        "Question", "Answer", "FAQPage",     "CollectionPage",
                                        "Review",   "Person", "VideoObject", "Recipe"};
constexpr PhraseGroup kUrlGroups[] = {
    {"product", "/product/|/products/|/p/|/dp/|/item"},
    {"collection", "/collection/|/collections/|/category|/c/|/shop|/browse"},
    {"article", "blog|news|article|/post"},  // and 200d/ to 202d/
    {"forum", "forum|thread|topic|/t/|questions|community|discuss|/r/|board|viewtopic|showthread"},
    {"doc", "doc|wiki|api|reference|guide|learn|tutorial|help"},
    {"service", "service|pricing|solution|feature|about|platform"},
};

// The first 27 features of a page: its metadata and its address.
std::vector<float> metadata_features(const Skeleton& skeleton, std::string_view url) {
  static const PhraseMatcher url_matcher(kUrlGroups);
  std::vector<float> f;
  const std::string og_type = lower_text(skeleton.og_type);
  for (const char* type : {"product", "article", "website"}) {
    f.push_back(og_type.find(type) != std::string::npos);
  }
  const auto types = json_ld_types(skeleton);
  const auto count = [&](const char* type) {
    const auto it = types.find(type);
    return it == types.end() ? 0u : it->second;
  };
  for (const char* type : kJsonLdTypes) f.push_back(float(std::min(count(type), 50u)));
  f.push_back(count("Article") || count("NewsArticle") || count("BlogPosting"));
  f.push_back(count("DiscussionForumPosting") || count("QAPage") || count("Comment"));

  std::string address = lower_text(url);
  for (const char* scheme : {"http://", "https://"}) {
    if (address.starts_with(scheme)) {
      address.erase(0, strlen(scheme));
      break;
    }
  }
  uint32_t groups = url_matcher.match(address);
  for (size_t i = 0; i + 4 < address.size(); i++) {
    if (address[i] == '2' && address[i + 1] == '0' && uint8_t(address[i + 2] - '0') < 3 &&
        uint8_t(address[i + 3] - '0') < 10 && address[i + 4] == '/') {
      groups |= 4;
    }
  }
  for (size_t g = 0; g < std::size(kUrlGroups); g++) f.push_back(groups >> g & 1);
  const size_t slash = address.find('/');
  const std::string path = slash == std::string::npos ? "" : address.substr(slash + 1);
  const auto count_if = [&](auto test) {
    return float(std::count_if(path.begin(), path.end(), test));
  };
  f.push_back(count_if([](char c) { return c == '/'; }));
  f.push_back(count_if([](char c) { return (uint8_t(c) & 0xc0) != 0x80; }));
  f.push_back(count_if([](char c) { return uint8_t(c - '0') < 10; }));
  f.push_back(count_if([](char c) { return c == '-'; }));
  return f;
}

// ---- all of it

constexpr uint8_t kTagFeatures[] = {
    kTagP,      kTagH1,    kTagH2,      kTagH3,         kTagH4,         kTagH5,
    kTagH6,     kTagLi,    kTagTd,      kTagTh,         kTagPre,        kTagDiv,
    kTagSpan,   kTagDt,    kTagDd,      kTagFigcaption, kTagBlockquote, kTagA,
    kTagButton, kTagLabel, kTagSummary, kTagSection,    kTagArticle};
constexpr int tag_feature(uint8_t element) {
  for (size_t k = 0; k < std::size(kTagFeatures); k++) {
    if (kTagFeatures[k] == element) return int(k);
  }
  return -1;
}

std::vector<std::string> make_feature_names() {
  std::vector<std::string> names;
  const auto add = [&](const std::string& prefix, std::initializer_list<const char*> list) {
    for (const char* name : list) names.push_back(prefix + name);
  };
  const auto add_groups = [&](const std::string& prefix, std::span<const PhraseGroup> groups) {
    for (const PhraseGroup& g : groups) names.push_back(prefix + g.name);
  };
  add("", {"words",
           "characters",
           "link_share",
           "sentences",
           "commas",
           "upper",
           "digits",
           "punctuation",
           "stop_words",
           "capitalised",
           "characters_a_word",
           "ends_sentence",
           "ends_colon",
           "begins_upper",
           "begins_digit",
           "all_upper",
           "separators",
           "title_covered",
           "title_share",
           "copies",
           "longest_word",
           "log_words"});
  for (const uint8_t e : kTagFeatures) names.push_back(std::string("tag_") + kElements[e].name);
  for (const uint8_t e : kAncestors) names.push_back(std::string("in_") + kElements[e].name);
  add("", {"display_none", "aria_hidden"});
  add_groups("near_", kClassGroups);
  add_groups("middle_", kClassGroups);
  add_groups("any_", kClassGroups);
  add_groups("text_", kTextGroups);
  add("shape_", {"blocks", "words", "link_share", "sentences", "share"});
  add("", {"siblings", "parent_siblings", "children"});
  add("record_", {"count", "blocks", "words", "link_share", "sentences", "levels", "position",
                  "share", "list_share", "list_link_share", "mean_words"});
  add("", {"index", "relative_index", "to_end", "share_before", "words_before", "depth"});
  add("og_", {"product", "article", "website"});
  for (const char* type : kJsonLdTypes) names.push_back(std::string("ld_") + type);
  add("ld_", {"articles", "forums"});
  add_groups("url_", kUrlGroups);
  add("url_", {"slashes", "characters", "digits", "dashes"});
  add("page_", {"blocks", "words", "link_share", "prose_share", "articles", "main", "h1",
                "words_a_block", "paragraphs", "title_heading", "json_ld", "description"});
  return names;
}

float share_of(double a, double b) { return float(a / std::max(b, 1.)); }

class BlockFeatures {
 public:
  // rows: (blocks, kFeatures)
  BlockFeatures(const Skeleton& skeleton, std::string_view url, PageBlocks& page)
      : page_(page), nodes_(page.nodes), blocks_(page.blocks) {
    const std::string title = decode_text(skeleton.title);
    description_ = decode_text(skeleton.description);
    measure(hashed_words(title + " " + decode_text(skeleton.og_title), 64));
    sum_nodes();
    find_shapes();
    page_features(skeleton, url);
  }

  // Appends the features of the next block to `row`; blocks come in their order.
  void next_row(std::vector<float>& row) {
    row_ = &row;
    own_features(next_);
    tag_features(next_);
    class_features(next_);
    repetition_features(next_);
    position_features(next_);
    row.insert(row.end(), of_page_.begin(), of_page_.end());
    next_++;
  }
  const std::string& description() const { return description_; }

 private:
  void measure(const HashedWords& title) {
    title_size_ = title.size();
    measures_.reserve(blocks_.size());
    for (TextBlock& b : blocks_) {
      const TextMeasures m = measure_text(b.text, title);
      b.words = m.words;
      b.link_words = std::min(b.link_words, b.words);
      b.sentences = m.sentences;
      copies_[m.lower_hash]++;
      measures_.push_back(m);
    }
  }
  static bool is_prose(const TextBlock& b) { return b.words >= 15 && b.link_words * 3 < b.words; }

  // Nodes follow their parents, so one pass from the last to the first adds up the tree.
  void sum_nodes() {
    for (size_t i = blocks_.size(); i-- > 0;) {
      const TextBlock& b = blocks_[i];
      PageNode& n = nodes_[size_t(b.owner)];
      n.blocks++;
      n.words += b.words;
      n.link_words += b.link_words;
      n.sentences += b.sentences;
      if (is_prose(b)) n.prose_words += b.words;
      n.first_block = int32_t(i);
    }
    for (size_t k = nodes_.size(); k-- > 1;) {
      const PageNode& n = nodes_[k];
      if (n.parent < 0) continue;
      PageNode& p = nodes_[size_t(n.parent)];
      p.blocks += n.blocks;
      p.words += n.words;
      p.link_words += n.link_words;
      p.sentences += n.sentences;
      p.prose_words += n.prose_words;
      if (n.first_block >= 0 && (p.first_block < 0 || n.first_block < p.first_block)) {
        p.first_block = n.first_block;
      }
    }
    for (const TextBlock& b : blocks_) {
      words_ += b.words;
      link_words_ += b.link_words;
      if (is_prose(b)) prose_words_ += b.words;
    }
  }

  // Blocks of one shape: the same names and first classes of block node, parent and grandparent.
  struct Shape {
    uint32_t blocks = 0, words = 0, link_words = 0, sentences = 0;
  };
  int32_t parent_or_self(int32_t k) const {
    return nodes_[size_t(k)].parent >= 0 ? nodes_[size_t(k)].parent : k;
  }
  void find_shapes() {
    std::unordered_map<uint64_t, uint32_t> index;
    for (const TextBlock& b : blocks_) {
      const PageNode& n = nodes_[size_t(b.block_node)];
      const PageNode& p = nodes_[size_t(parent_or_self(b.block_node))];
      const uint64_t grandparent = p.parent >= 0 ? nodes_[size_t(p.parent)].key : 0;
      const auto [it, added] =
          index.try_emplace(mix64(n.key, p.key, grandparent), uint32_t(shapes_.size()));
      if (added) shapes_.emplace_back();
      shape_of_.push_back(it->second);
      Shape& s = shapes_[it->second];
      s.blocks++;
      s.words += b.words;
      s.link_words += b.link_words;
      s.sentences += b.sentences;
    }
    // The record around a node: the nearest, itself included, with 3 siblings of its kind or more.
    record_.resize(nodes_.size(), -1);
    for (size_t k = 1; k < nodes_.size(); k++) {
      const PageNode& n = nodes_[k];
      if (n.parent < 0) continue;
      record_[k] = group_size(n) >= 3 ? int32_t(k) : record_[size_t(n.parent)];
    }
    // Groups of key words of all nodes around, without body and html; of the nearest 3; of the
    // next 4.
    any_.resize(nodes_.size());
    for (size_t k = 0; k < nodes_.size(); k++) {
      const PageNode& n = nodes_[k];
      if (n.element != kTagBody && n.element != kTagHtml) any_[k] = n.classes;
      if (n.parent >= 0) any_[k] |= any_[size_t(n.parent)];
    }
  }
  uint32_t group_size(const PageNode& n) const { return page_.group_sizes[size_t(n.group)]; }

  void page_features(const Skeleton& skeleton, std::string_view url) {
    of_page_ = metadata_features(skeleton, url);
    size_t h1 = 0;
    double best = 0;
    for (size_t i = 0; i < blocks_.size(); i++) {
      const uint8_t element = nodes_[size_t(blocks_[i].block_node)].element;
      h1 += element == kTagH1;
      if (element != kTagH1 && element != kTagH2 && element != kTagH3) continue;
      const TextMeasures& m = measures_[i];
      best = std::max(best, double(m.title_words_covered) * m.title_words);
    }
    const double n = double(blocks_.size()), words = double(words_);
    uint32_t description_characters = 0;
    for (size_t i = 0; i < description_.size(); description_characters++) {
      next_code_point(description_, i);
    }
    for (const double x :
         {n, words, double(share_of(double(link_words_), words)),
          double(share_of(double(prose_words_), words)), double(page_.articles),
          double(page_.has_main), double(h1), words / n, double(page_.paragraphs), double(best > 0),
          double(skeleton.json_ld.size()), double(description_characters)}) {
      of_page_.push_back(float(x));
    }
  }

  void add(double x) { row_->push_back(float(x)); }
  void add_bits(uint32_t bits, size_t n) {
    for (size_t k = 0; k < n; k++) row_->push_back(float(bits >> k & 1));
  }

  void own_features(size_t i) {
    const TextBlock& b = blocks_[i];
    const TextMeasures& m = measures_[i];
    const double characters = m.characters, words = m.words;
    const uint8_t first = char_classes()[m.first];
    add(words);
    add(characters);
    add(share_of(b.link_words, words));
    add(m.sentences);
    add(m.commas);
    add(m.upper / characters);
    add(m.digits / characters);
    add(m.punctuation / characters);
    add(share_of(m.stop_words, words));
    add(share_of(m.capitalised, words));
    add(share_of(characters, words));
    add(ends_sentence(m.last) ? m.last != 0x3002
                              : m.last != '\'' && is_quote_after_sentence(m.last));
    add(m.last == ':');
    add(first == kUpper);
    add(first == kNumber);
    add(m.upper > 0 && m.lower == 0);
    add(m.separators);
    add(share_of(m.title_words_covered, double(title_size_)));
    add(share_of(m.title_words, words));
    add(copies_[m.lower_hash]);
    add(m.longest_word);
    add(std::log1p(words));
  }
  void tag_features(size_t i) {
    const PageNode& owner = nodes_[size_t(blocks_[i].owner)];
    const PageNode& block = nodes_[size_t(blocks_[i].block_node)];
    uint32_t tags = 0;
    for (const uint8_t element : {owner.element, block.element}) {
      if (const int k = tag_feature(element); k >= 0) tags |= 1u << k;
    }
    add_bits(tags, std::size(kTagFeatures));
    add_bits(owner.ancestors, std::size(kAncestors));
    add(owner.display_none);
    add(owner.aria_hidden);
  }
  void class_features(size_t i) {
    uint32_t near = 0, middle = 0;
    int32_t k = blocks_[i].owner;
    const uint32_t any = any_[size_t(k)];
    for (int level = 0; level < 7 && k >= 0; level++, k = nodes_[size_t(k)].parent) {
      (level < 3 ? near : middle) |= nodes_[size_t(k)].classes;
    }
    add_bits(near, kClassGroupCount);
    add_bits(middle, kClassGroupCount);
    add_bits(any, kClassGroupCount);
    add_bits(measures_[i].phrases, std::size(kTextGroups));
  }
  void repetition_features(size_t i) {
    const double page_words = double(words_);
    const TextBlock& b = blocks_[i];
    const Shape& s = shapes_[shape_of_[i]];
    add(s.blocks);
    add(double(s.words) / s.blocks);
    add(share_of(s.link_words, s.words));
    add(double(s.sentences) / s.blocks);
    add(share_of(s.words, page_words));
    const PageNode& n = nodes_[size_t(b.block_node)];
    const PageNode& p = nodes_[size_t(parent_or_self(b.block_node))];
    add(n.parent >= 0 ? group_size(n) : 0);
    add(p.parent >= 0 && n.parent >= 0 ? group_size(p) : 0);
    add(p.children);

    const int32_t record = record_[size_t(b.owner)];
    if (record < 0) {
      row_->insert(row_->end(), 11, 0.f);
      return;
    }
    const PageNode& r = nodes_[size_t(record)];
    const PageNode& list = nodes_[size_t(r.parent)];
    add(group_size(r));
    add(r.blocks);
    add(r.words);
    add(share_of(r.link_words, r.words));
    add(r.sentences);
    add(nodes_[size_t(b.owner)].depth - r.depth);
    add(share_of(r.first_block - list.first_block, list.blocks));
    add(share_of(r.words, list.words));
    add(share_of(list.words, page_words));
    add(share_of(list.link_words, list.words));
    add(double(list.words) / group_size(r));
  }
  void position_features(size_t i) {
    const double n = double(blocks_.size());
    add(double(i));
    add(double(i) / n);
    add(n - double(i));
    add(share_of(double(words_before_), double(words_)));
    add(double(words_before_));
    add(nodes_[size_t(blocks_[i].owner)].depth);
    words_before_ += blocks_[i].words;
  }

  PageBlocks& page_;
  std::vector<PageNode>& nodes_;
  std::vector<TextBlock>& blocks_;
  std::vector<TextMeasures> measures_;
  size_t title_size_ = 0;
  std::unordered_map<uint64_t, uint32_t> copies_;
  std::vector<Shape> shapes_;
  std::vector<uint32_t> shape_of_, any_;
  std::vector<int32_t> record_;
  std::vector<float> of_page_;
  std::string description_;
  std::vector<float>* row_ = nullptr;
  size_t next_ = 0;
  uint64_t words_ = 0, link_words_ = 0, prose_words_ = 0, words_before_ = 0;
};

// ---------------------------------------------------------------------------------------------
// The model: the sum over trees of the leaf in which a block falls, through a sigmoid

double tree_score(const float* features) {
  double sum = 0;
  for (int t = 0; t < kExtractTrees; t++) {
    const ExtractSplit* const splits = kExtractSplits + t * (kExtractLeavesOfTree - 1);
    int k = 0;  // >= 0: a split, otherwise ~leaf
    do {
      k = features[splits[k].feature] <= splits[k].threshold ? splits[k].left : splits[k].right;
    } while (k >= 0);
    sum += kExtractLeaves[t * kExtractLeavesOfTree + ~k];
  }
  return sum;
}
float main_text_probability(const float* features) {
  return float(1 / (1 + std::exp(-tree_score(features))));
}
std::vector<float> block_probabilities(BlockFeatures& features, size_t blocks) {
  std::vector<float> p, row;
  for (size_t i = 0; i < blocks; i++) {
    row.clear();
    features.next_row(row);
    p.push_back(main_text_probability(row.data()));
  }
  return p;
}

// ---------------------------------------------------------------------------------------------
// The choice of blocks

// The prefix, by falling probability, with the highest expected F1 of words:
// 2 sum_chosen(p w) / (sum_chosen(w) + sum_all(p w)).
std::vector<bool> choose_by_expected_f1(const std::vector<float>& p,
                                        const std::vector<TextBlock>& blocks) {
  std::vector<size_t> order(p.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
  double expected = 0, words = 0, hits = 0, best = -1;
  size_t chosen = 0;
  for (size_t i = 0; i < p.size(); i++) expected += double(p[i]) * blocks[i].words;
  for (size_t k = 0; k < order.size(); k++) {
    hits += double(p[order[k]]) * blocks[order[k]].words;
    words += blocks[order[k]].words;
    const double f1 = 2 * hits / (words + expected + 1e-9);
    if (f1 > best) best = f1, chosen = k + 1;
  }
  std::vector<bool> choice(p.size());
  for (size_t k = 0; k < chosen; k++) choice[order[k]] = true;
  return choice;
}

// precision: fewer blocks than balanced, recall: more.
void apply_mode(ExtractMode mode, const std::vector<float>& p, std::vector<bool>& choice) {
  const float best = p.empty() ? 0 : *std::max_element(p.begin(), p.end());
  for (size_t i = 0; i < p.size(); i++) {
    if (mode == ExtractMode::precision && p[i] < std::min(.6f, best)) choice[i] = false;
    if (mode == ExtractMode::recall && p[i] >= .2f) choice[i] = true;
  }
}

// Rules alone: no navigation, header, footer, aside, form, button, dialog, nothing hidden; only
// what is in main or article where these hold 30 % of the words or more.
std::vector<bool> choose_by_rules(const PageBlocks& page) {
  const uint32_t bad = ancestor_bit(kTagNav) | ancestor_bit(kTagHeader) | ancestor_bit(kTagFooter) |
                       ancestor_bit(kTagAside) | ancestor_bit(kTagForm) | ancestor_bit(kTagButton) |
                       ancestor_bit(kTagDialog);
  const uint32_t good = ancestor_bit(kTagMain) | ancestor_bit(kTagArticle);
  std::vector<bool> choice;
  uint64_t words = 0, good_words = 0;
  for (const TextBlock& b : page.blocks) {
    const PageNode& n = page.nodes[size_t(b.owner)];
    choice.push_back(!(n.ancestors & bad) && !n.display_none);
    words += b.words;
    if (n.ancestors & good) good_words += b.words;
  }
  if (good_words * 10 < words * 3) return choice;
  for (size_t i = 0; i < choice.size(); i++) {
    if (!(page.nodes[size_t(page.blocks[i].owner)].ancestors & good)) choice[i] = false;
  }
  return choice;
}

// A long text that is chosen twice is kept once.
void drop_repeats(const PageBlocks& page, std::vector<bool>& choice) {
  std::unordered_set<std::string_view> seen;
  for (size_t i = 0; i < choice.size(); i++) {
    if (!choice[i] || page.blocks[i].text.size() <= 80) continue;
    if (!seen.insert(page.blocks[i].text).second) choice[i] = false;
  }
}

// ---------------------------------------------------------------------------------------------
// The text: one block a line, items of lists with "- ", cells of a row on one line

std::string render_blocks(const PageBlocks& page, const std::vector<bool>& choice) {
  std::string text;
  int32_t row = -1, cell = -1, item = -1;
  for (size_t i = 0; i < choice.size(); i++) {
    if (!choice[i]) continue;
    const TextBlock& b = page.blocks[i];
    const PageNode& n = page.nodes[size_t(b.block_node)];
    const bool next_cell = n.row >= 0 && n.row == row && n.cell != cell;
    if (!text.empty()) text += next_cell ? " | " : "\n";
    if (n.list_item >= 0 && n.list_item != item && !next_cell) text += "- ";
    text += next_cell ? b.text : b.formatted;
    row = n.row;
    cell = n.cell;
    item = n.list_item;
  }
  return text;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// All of it

namespace {

// The strings of 12 words or more in a page's JSON-LD: a product's description, an article's body.
std::vector<std::string> json_ld_texts(const Skeleton& skeleton) {
  std::vector<std::string> texts;
  for (const std::string_view json : skeleton.json_ld) {
    for (size_t i = 0; (i = json.find('"', i)) != std::string_view::npos;) {
      std::string text;
      bool in_tag = false;
      for (i++; i < json.size() && json[i] != '"'; i++) {
        uint32_t c = uint8_t(json[i]);
        if (c == '\\' && i + 1 < json.size()) {
          c = uint8_t(json[++i]);
          if (c == 'n' || c == 't' || c == 'r') c = ' ';
          if (c == 'u') {
            c = 0;
            for (int k = 0; k < 4 && i + 1 < json.size(); k++) {
              const char digit = ascii_lower(json[i + 1]);
              if (!std::isxdigit(uint8_t(digit))) break;
              c = c * 16 + uint32_t(digit <= '9' ? digit - '0' : digit - 'a' + 10);
              i++;
            }
            if (c < 0x20 || (c >= 0xd800 && c < 0xe000)) c = ' ';
          }
        } else if (c >= 0x80) {
          size_t next = i;
          c = next_code_point(json, next);
          i = next - 1;
        }
        in_tag |= c == '<';
        if (!in_tag) append_code_point(text, c);
        if (c == '>') in_tag = false, text += ' ';
      }
      i++;
      if (!text.starts_with("http") && count_words(text) >= 12) texts.push_back(decode_text(text));
    }
  }
  return texts;
}

// Pages that are built by scripts hold little text. What they tell about themselves is appended.
void append_metadata(const Skeleton& skeleton, const std::string& description, std::string& text) {
  std::vector<std::string> more = json_ld_texts(skeleton);
  more.insert(more.begin(), description);
  for (const std::string& s : more) {
    if (s.empty() || text.find(s) != std::string::npos) continue;
    if (!text.empty()) text += '\n';
    text += s;
  }
}

constexpr uint32_t kShortWords = 30;
constexpr size_t kMaxHtml = size_t(1) << 30;  // bytes; the parser counts in 32 bits

struct PageParts {
  Skeleton skeleton;
  PageBlocks page;
};
void cut(std::string_view html, PageParts& parts) {
  cut_html(html.substr(0, kMaxHtml), parts.skeleton, parts.page);
}

uint32_t chosen_words(const PageBlocks& page, const std::vector<bool>& choice) {
  uint32_t words = 0;
  for (size_t i = 0; i < choice.size(); i++) {
    if (choice[i]) words += page.blocks[i].words;
  }
  return words;
}

Extracted finish_text(std::string_view html, const PageParts& parts, const std::string& description,
                      std::vector<bool> choice, bool is_short) {
  drop_repeats(parts.page, choice);
  Extracted out;
  out.text = render_blocks(parts.page, choice);
  out.title =
      decode_text(parts.skeleton.title.empty() ? parts.skeleton.og_title : parts.skeleton.title);
  if (is_short) append_metadata(parts.skeleton, description, out.text);
  out.html_bytes = html.size();
  out.parsed_bytes = parts.skeleton.text.size();
  return out;
}

Extracted finish_learned(std::string_view html, const PageParts& parts,
                         const std::string& description, ExtractMode mode,
                         const std::vector<float>& p) {
  std::vector<bool> choice = choose_by_expected_f1(p, parts.page.blocks);
  const bool is_short = chosen_words(parts.page, choice) < kShortWords;
  apply_mode(mode, p, choice);
  return finish_text(html, parts, description, std::move(choice), is_short);
}

}  // namespace

Extracted extract(std::string_view html, std::string_view url, const ExtractOptions& options) {
  PageParts parts;
  cut(html, parts);
  BlockFeatures features(parts.skeleton, url, parts.page);
  if (!options.rules) {
    return finish_learned(html, parts, features.description(), options.mode,
                          block_probabilities(features, parts.page.blocks.size()));
  }
  std::vector<bool> choice = choose_by_rules(parts.page);
  const bool is_short = chosen_words(parts.page, choice) < kShortWords;
  return finish_text(html, parts, features.description(), std::move(choice), is_short);
}

ExtractBlocks extract_blocks(std::string_view html, std::string_view url) {
  PageParts parts;
  cut(html, parts);
  BlockFeatures features(parts.skeleton, url, parts.page);
  ExtractBlocks out;
  for (const TextBlock& b : parts.page.blocks) {
    const size_t begin = out.features.size();
    features.next_row(out.features);
    out.texts.push_back(b.text);
    out.probabilities.push_back(main_text_probability(out.features.data() + begin));
  }
  return out;
}

Extracted extract_chosen(std::string_view html, std::string_view url, ExtractMode mode,
                         std::span<const float> probabilities) {
  PageParts parts;
  cut(html, parts);
  BlockFeatures features(parts.skeleton, url, parts.page);
  require(probabilities.size() == parts.page.blocks.size(), "extract_chosen: found ",
          probabilities.size(), " probabilities, expected ", parts.page.blocks.size());
  return finish_learned(html, parts, features.description(), mode,
                        {probabilities.begin(), probabilities.end()});
}

std::vector<std::string> extract_feature_names() { return make_feature_names(); }

}  // namespace cake::corpus
