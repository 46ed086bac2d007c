// Part of ./bpe: what a vocabulary makes of a text, in figures and as a page.
//
//     documents --cake/stretches.h--> stretches --TokenCounter--> how often each id occurs
//         --make_figures--> figures --print_figures--> the screen
//                                   --make_page--> one file of HTML, with the begin of the text
//
// Several vocabularies encode the same stretches, which end where every one of them allows a cut.
// So a text of any size takes the memory of a few stretches. The page is made of the files of web/,
// which the binary contains. The text is in it as hexadecimal digits inside JSON, and its script
// puts text into the page as text: nothing that a document holds can become markup.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"
#include "cake/run.h"
#include "cake/sha256.h"
#include "cake/stretches.h"
#include "cake/unicode.h"
#include "cake/web.h"

namespace cake {
namespace {

struct Vocabulary {
  std::string name;
  Tokenizer tokenizer;
  std::vector<int64_t> counts;  // of each id, in the text
};

struct TextFigures {
  std::string name;
  int64_t documents = 0, bytes = 0, characters = 0;
};

// The begin of the text, which the page shows.
struct Sample {
  struct Document {
    std::string text;
    size_t shown;  // bytes; the text behind them can decide how they are split
  };
  size_t limit;  // bytes
  std::vector<Document> documents;
  size_t bytes = 0;

  void add(std::string_view text, bool begins_document);
  void cut(const std::vector<Vocabulary>& vocabularies);  // to the limit, where all allow it
};

enum class TokenKind { spaced_word, word, number, sign, white_space, fragment };
constexpr const char* kKindNames[] = {
    "words with a space before", "words without", "numbers",
    "punctuation and signs",     "white space",   "parts of characters"};
constexpr size_t kKinds = std::size(kKindNames);

// What the counts of one vocabulary say. Special tokens that do not occur are left out: no text
// makes them.
struct Figures {
  int64_t tokens = 0;  // in the text
  int64_t size = 0;    // tokens of the vocabulary
  int64_t used = 0;    // of which occur in the text
  double entropy = 0;  // bits a token, of the tokens' frequencies in the text
  struct KindCount {
    int64_t text = 0, vocabulary = 0, used = 0;
  };
  std::array<KindCount, kKinds> kinds = {};
  std::vector<int64_t> text_lengths, vocabulary_lengths;  // how many tokens have [so many] bytes
  std::vector<int> frequent, longest, unused, fragments;  // ids, a few of each
};

void check_inputs(const StatsOptions& options);
std::vector<Vocabulary> load_vocabularies(const StatsOptions& options);
TextFigures count_tokens(const StatsOptions& options, std::vector<Vocabulary>& vocabularies,
                         Sample& sample);
Figures make_figures(const Vocabulary& vocabulary);
void print_figures(const TextFigures& text, const std::vector<Vocabulary>& vocabularies,
                   const std::vector<Figures>& figures);
std::string make_page(const TextFigures& text, const std::vector<Vocabulary>& vocabularies,
                      const std::vector<Figures>& figures, const Sample& sample);

}  // namespace

void stats_command(const StatsOptions& options) {
  check_inputs(options);
  std::optional<AtomicFile> page;  // a place that cannot be written is found out before the reading
  if (!options.html.empty()) page.emplace(options.html);

  std::vector<Vocabulary> vocabularies = load_vocabularies(options);
  Sample sample{size_t(options.sample), {}};
  const TextFigures text = count_tokens(options, vocabularies, sample);
  std::vector<Figures> figures;
  for (const Vocabulary& v : vocabularies) figures.push_back(make_figures(v));

  print_figures(text, vocabularies, figures);
  if (page) {
    sample.cut(vocabularies);
    page->write(make_page(text, vocabularies, figures, sample));
    page->commit();
    std::printf("\nwrote %s\n", options.html.c_str());
  }
}

namespace {

// ---------------------------------------------------------------------------------------------
// Inputs

// A tokenizer among the inputs is a vocabulary whose --with was forgotten.
bool is_model_or_tokenizer(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(path)) {
    for (const char* name : {"tokenizer.json", "model.safetensors", "config.json", "model"}) {
      if (std::filesystem::exists(path / name)) return true;
    }
    return false;
  }
  const std::string name = path.filename().string();
  for (const char* ending :
       {"tokenizer.json", "vocab.json", "vocab.bpe", "merges.txt", "tekken.json", "tokenizer.model",
        ".tiktoken", ".safetensors", ".gguf"}) {
    if (name.ends_with(ending)) return true;
  }
  return false;
}

void check_inputs(const StatsOptions& options) {
  for (const std::string& input : options.inputs) {
    if (is_model_or_tokenizer(input)) {
      fail(input, ": found a model or tokenizer, expected text; --with compares vocabularies");
    }
    std::error_code ignored;
    if (!options.html.empty() && std::filesystem::equivalent(input, options.html, ignored)) {
      fail("--html ", options.html, ": is an input, expected another file to write");
    }
  }
  require(options.sample >= 0 && options.sample <= 1 << 24, "--sample: found ", options.sample,
          ", expected 0 to ", 1 << 24, " bytes");
}

// What people call a vocabulary: "cl100k_base" of cl100k_base.tiktoken, "smollm" of
// smollm/tokenizer.json and of smollm/model.
std::string vocabulary_name(const std::string& argument) {
  std::filesystem::path path = std::filesystem::path(argument).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // "runs/" is "runs"
  const std::string name = path.filename().string();
  const std::string folder = path.parent_path().filename().string();
  if ((name == "tokenizer.json" || name == "model") && !folder.empty()) return folder;
  const bool of_stem = path.extension() == ".tiktoken" || path.extension() == ".gguf";
  return of_stem ? path.stem().string() : name;
}

std::vector<Vocabulary> load_vocabularies(const StatsOptions& options) {
  std::vector<std::string> paths = {options.tokenizer};
  paths.insert(paths.end(), options.others.begin(), options.others.end());
  std::map<std::string, int> names;
  for (const std::string& path : paths) names[vocabulary_name(path)]++;
  std::vector<Vocabulary> vocabularies;
  for (const std::string& path : paths) {
    const std::string name = vocabulary_name(path);
    const Tokenizer tokenizer = Tokenizer::load(path, vocabularies.empty() ? options.pattern : "");
    vocabularies.push_back({names[name] > 1 ? path : name, tokenizer,
                            std::vector<int64_t>(size_t(tokenizer.vocab_size()))});
  }
  return vocabularies;
}

// ---------------------------------------------------------------------------------------------
// Counting

bool all_allow_cut(const std::vector<Vocabulary>& vocabularies, std::string_view text, size_t i) {
  return std::all_of(vocabularies.begin(), vocabularies.end(),
                     [&](const Vocabulary& v) { return is_safe_cut(v.tokenizer.data(), text, i); });
}

// Counts the ids that one vocabulary makes of the chunks that one thread encodes.
class TokenCounter {
 public:
  static constexpr size_t kCacheBytes = 16 << 20;  // for each thread and vocabulary

  explicit TokenCounter(const Tokenizer& tokenizer)
      : encoder_(tokenizer.data(), kCacheBytes), counts_(size_t(tokenizer.vocab_size())) {}

  void add(std::string_view text, size_t end, bool begins_document) {
    ids_.clear();
    encoder_.encode(text, end, begins_document, false, ids_);
    for (const int id : ids_) counts_[size_t(id)]++;
  }
  const std::vector<int64_t>& counts() const { return counts_; }

 private:
  TextEncoder encoder_;
  std::vector<int64_t> counts_;
  std::vector<int> ids_;
};

int64_t count_characters(std::string_view text) {  // a byte that is no part of one counts as one
  int64_t characters = 0;
  for (size_t i = 0; i < text.size(); characters++) {
    i += size_t(decode_utf8(text.data() + i, text.size() - i).bytes);
  }
  return characters;
}

TextFigures count_tokens(const StatsOptions& options, std::vector<Vocabulary>& vocabularies,
                         Sample& sample) {
  const size_t n = vocabularies.size(), threads = size_t(options.threads);
  std::vector<std::unique_ptr<TokenCounter>> counters;  // (threads, n)
  for (size_t i = 0; i < threads * n; i++) {
    counters.push_back(std::make_unique<TokenCounter>(vocabularies[i % n].tokenizer));
  }
  TextFigures figures;
  figures.name = options.inputs.size() == 1
                     ? Input(options.inputs[0]).name
                     : concat(options.inputs[0], " and ", options.inputs.size() - 1, " more");
  using Characters = int64_t;  // of a stretch
  const auto count = [&](const Stretch& stretch, Characters& characters, size_t thread) {
    characters = 0;
    for (const Chunk& c : stretch.chunks) {
      const std::string_view text = stretch.text_of(c);
      characters += count_characters(text.substr(0, c.size()));
      for (size_t v = 0; v < n; v++) {
        try {
          counters[thread * n + v]->add(text, c.size(), c.begins_document);
        } catch (const Error& e) {  // a byte without a token
          fail(vocabularies[v].name, ": ", e.what());
        }
      }
    }
  };
  const auto add_up = [&](const Stretch& stretch, Characters& characters) {
    figures.characters += characters;
    for (const Chunk& c : stretch.chunks) {
      figures.documents += c.begins_document;
      figures.bytes += int64_t(c.size());
      sample.add(stretch.text_of(c).substr(0, c.size()), c.begins_document);
    }
  };
  std::vector<const TokenizerData*> others;
  for (size_t v = 1; v < n; v++) others.push_back(&vocabularies[v].tokenizer.data());
  const Corpus corpus{
      .inputs = options.inputs, .threads = options.threads, .records = options.records};
  ConsoleLog log(!isatty(STDOUT_FILENO));
  for_each_stretch<Characters>(corpus, vocabularies[0].tokenizer.data(), "reading", log, count,
                               add_up, others);
  require(figures.bytes > 0, figures.name, ": found documents without text, expected text");
  for (size_t i = 0; i < counters.size(); i++) {
    std::vector<int64_t>& counts = vocabularies[i % n].counts;
    for (size_t id = 0; id < counts.size(); id++) counts[id] += counters[i]->counts()[id];
  }
  return figures;
}

// ---------------------------------------------------------------------------------------------
// Figures

TokenKind kind_of(std::string_view token) {
  bool has_letter = false, has_number = false, has_sign = false;
  for (size_t i = 0; i < token.size();) {
    const CodePoint c = decode_utf8(token.data() + i, token.size() - i);
    if (c.code >= kInvalid) return TokenKind::fragment;
    const int kind = char_classes()[c.code];
    if (kind == kUpper || kind == kLower || kind == kLetter || kind == kMark) {
      has_letter = true;
    } else if (kind == kNumber) {
      has_number = true;
    } else if (kind != kSpace && kind != kNewline) {
      has_sign = true;
    }
    i += size_t(c.bytes);
  }
  if (has_letter) return token[0] == ' ' ? TokenKind::spaced_word : TokenKind::word;
  if (has_number) return TokenKind::number;
  return has_sign ? TokenKind::sign : TokenKind::white_space;
}

// The first `limit` ids in an order.
template <class Before>
std::vector<int> best_ids(std::vector<int> ids, size_t limit, Before before) {
  const size_t size = std::min(limit, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + int64_t(size), ids.end(), before);
  ids.resize(size);
  return ids;
}

// `limit` ids at even distances.
std::vector<int> spread_ids(const std::vector<int>& ids, size_t limit) {
  std::vector<int> spread;
  const size_t size = std::min(limit, ids.size());
  for (size_t i = 0; i < size; i++) spread.push_back(ids[i * ids.size() / size]);
  return spread;
}

Figures make_figures(const Vocabulary& vocabulary) {
  const Tokenizer& tokenizer = vocabulary.tokenizer;
  Figures f;
  std::vector<int> used, unused, visible, fragments;
  for (int id = 0; id < tokenizer.vocab_size(); id++) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    const int64_t count = vocabulary.counts[size_t(id)];
    if (bytes.empty() || (count == 0 && tokenizer.is_special(id))) continue;
    const TokenKind kind = kind_of(bytes);
    (count > 0 ? used : unused).push_back(id);
    if (count > 0 && kind == TokenKind::fragment) fragments.push_back(id);
    if (count > 0 && kind != TokenKind::white_space) visible.push_back(id);
    f.tokens += count;
    f.size++;
    f.kinds[size_t(kind)].text += count;
    f.kinds[size_t(kind)].vocabulary++;
    f.kinds[size_t(kind)].used += count > 0;
    if (bytes.size() >= f.vocabulary_lengths.size()) {
      f.vocabulary_lengths.resize(bytes.size() + 1);
      f.text_lengths.resize(bytes.size() + 1);
    }
    f.vocabulary_lengths[bytes.size()]++;
    f.text_lengths[bytes.size()] += count;
  }
  f.used = int64_t(used.size());
  for (const int id : used) {
    const double p = double(vocabulary.counts[size_t(id)]) / double(f.tokens);
    f.entropy -= p * std::log2(p);
  }
  const auto more_frequent = [&](int a, int b) {
    const int64_t x = vocabulary.counts[size_t(a)], y = vocabulary.counts[size_t(b)];
    return x != y ? x > y : a < b;
  };
  const auto longer = [&](int a, int b) {
    const size_t x = tokenizer.token_bytes(a).size(), y = tokenizer.token_bytes(b).size();
    return x != y ? x > y : more_frequent(a, b);
  };
  f.frequent = best_ids(used, 24, more_frequent);
  f.longest = best_ids(visible, 12, longer);
  f.fragments = best_ids(fragments, 12, more_frequent);
  f.unused = spread_ids(unused, 24);
  return f;
}

// ---------------------------------------------------------------------------------------------
// The screen

std::string percent_text(int64_t part, int64_t whole) {
  const double share = 100 * double(part) / double(std::max<int64_t>(1, whole));
  return share > 0 && share < .05 ? "below 0.1 %" : format("%.1f %%", share);
}

// A table with a column for each vocabulary.
class ColumnPrinter {
 public:
  explicit ColumnPrinter(const std::vector<Vocabulary>& vocabularies) {
    for (const Vocabulary& v : vocabularies) {
      const int characters = int(count_characters(v.name));
      widths_.push_back(std::max(kNarrowest, 2 + characters));
      head_ += std::string(size_t(widths_.back() - characters), ' ') + v.name;
    }
  }
  void head(const char* title) const { std::printf("\n%-*s%s\n", kLabel, title, head_.c_str()); }

  template <class Cell>  // cell(i): the text of column i
  void row(const char* label, Cell cell) const {
    std::printf("%-*s", kLabel, label);
    for (size_t i = 0; i < widths_.size(); i++) {
      std::printf("%*s", widths_[i], std::string(cell(i)).c_str());
    }
    std::printf("\n");
  }

 private:
  static constexpr int kLabel = 30, kNarrowest = 18;
  std::vector<int> widths_;
  std::string head_;
};

// A title, then words in lines of 100 columns.
void print_words(const std::string& title, const std::vector<std::string>& words) {
  if (words.empty()) return;
  std::printf("%s\n", title.c_str());
  std::string line;
  for (const std::string& word : words) {
    if (!line.empty() && count_characters(line) + count_characters(word) > 96) {
      std::printf(" %s\n", line.c_str());
      line.clear();
    }
    line += "   " + word;
  }
  std::printf(" %s\n", line.c_str());
}

void print_lists(const Vocabulary& vocabulary, const Figures& f) {
  const auto words = [&](const std::vector<int>& ids, auto note) {
    std::vector<std::string> list;
    for (const int id : ids) {
      std::string word;
      for (const char c : visible_token(vocabulary.tokenizer.token_bytes(id))) {
        word += c == ' ' ? "\u2423" : std::string(1, c);  // an open box
      }
      list.push_back(word + " " + note(id));
    }
    return list;
  };
  const auto count = [&](int id) { return count_text(double(vocabulary.counts[size_t(id)])); };
  const auto bytes = [&](int id) {
    return concat(vocabulary.tokenizer.token_bytes(id).size(), " bytes");
  };
  const auto name = [](int id) { return concat("(", id, ")"); };
  std::printf("\n%s\n", vocabulary.name.c_str());
  print_words("  most frequent", words(f.frequent, count));
  print_words("  longest that occur, white space apart", words(f.longest, bytes));
  print_words("  parts of characters", words(f.fragments, count));
  print_words("  never occur: " + count_text(double(f.size - f.used)) + ", for example",
              words(f.unused, name));
}

void print_figures(const TextFigures& text, const std::vector<Vocabulary>& vocabularies,
                   const std::vector<Figures>& figures) {
  std::printf("%s: %s document%s, %s characters, %s bytes\n", text.name.c_str(),
              count_text(double(text.documents)).c_str(), text.documents == 1 ? "" : "s",
              count_text(double(text.characters)).c_str(), count_text(double(text.bytes)).c_str());
  const ColumnPrinter table(vocabularies);
  const auto per_token = [&](int64_t n) {
    return
        [&figures, n](size_t i) { return format("%.3f", double(n) / double(figures[i].tokens)); };
  };
  table.head("");
  table.row("tokens", [&](size_t i) { return count_text(double(figures[i].tokens)); });
  table.row("bytes a token", per_token(text.bytes));
  table.row("characters a token", per_token(text.characters));
  table.row("bits a token (entropy)", [&](size_t i) { return format("%.3f", figures[i].entropy); });
  table.row("bits a byte", [&](size_t i) {
    return format("%.3f", figures[i].entropy * double(figures[i].tokens) / double(text.bytes));
  });
  table.row("tokens of the vocabulary",
            [&](size_t i) { return count_text(double(figures[i].size)); });
  table.row("  that occur in the text", [&](size_t i) {
    return count_text(double(figures[i].used)) + ", " +
           percent_text(figures[i].used, figures[i].size);
  });
  table.row("  that never occur",
            [&](size_t i) { return count_text(double(figures[i].size - figures[i].used)); });
  table.head("share of the text's tokens");
  for (size_t k = 0; k < kKinds; k++) {
    table.row(kKindNames[k],
              [&](size_t i) { return percent_text(figures[i].kinds[k].text, figures[i].tokens); });
  }
  for (size_t i = 0; i < vocabularies.size(); i++) print_lists(vocabularies[i], figures[i]);
}

}  // namespace

std::string visible_token(std::string_view token) {
  std::string out;
  for (size_t i = 0; i < token.size();) {
    const CodePoint c = decode_utf8(token.data() + i, token.size() - i);
    const bool is_control = c.code < 32 || (c.code >= 127 && c.code < 160);
    const bool is_invisible = (c.code >= 0x200B && c.code <= 0x200F) ||  // zero width, direction
                              (c.code >= 0x2028 && c.code <= 0x202E) ||  // separators, direction
                              (c.code >= 0x2060 && c.code <= 0x206F) || c.code == 0xFEFF;
    if (c.code == '\n') {
      out += "\\n";
    } else if (c.code == '\r') {
      out += "\\r";
    } else if (c.code == '\t') {
      out += "\\t";
    } else if (c.code >= kInvalid || c.code < 32 || c.code == 127) {
      out += format("\\x%02x", unsigned(static_cast<unsigned char>(token[i])));
    } else if (is_control || is_invisible) {
      out += format("\\u%04x", unsigned(c.code));
    } else {
      out += token.substr(i, size_t(c.bytes));
    }
    i += size_t(c.bytes);
  }
  return out;
}

namespace {

// ---------------------------------------------------------------------------------------------
// The page

void Sample::add(std::string_view text, bool begins_document) {
  constexpr size_t kLookahead = 4;
  if (bytes >= limit + kLookahead) return;
  if (begins_document) documents.push_back({});
  text = text.substr(0, limit + kLookahead - bytes);
  documents.back().text += text;
  documents.back().shown += text.size();
  bytes += text.size();
}

void Sample::cut(const std::vector<Vocabulary>& vocabularies) {
  constexpr size_t kFarthest = 4096;  // from the limit
  while (bytes > limit) {
    auto& [text, shown] = documents.back();
    bytes -= shown;
    shown = limit > bytes ? std::min(shown, limit - bytes) : 0;
    if (shown < text.size()) {
      const size_t lowest = shown > kFarthest ? shown - kFarthest : 0;
      size_t safe = shown;
      while (safe > lowest && !all_allow_cut(vocabularies, text, safe)) safe--;
      if (safe > lowest) {
        shown = safe;
      } else {  // only between two characters
        while (shown > 0 && (text[shown] & 0xC0) == 0x80) shown--;
        text.resize(shown);
      }
    }
    bytes += shown;
    if (shown == 0) documents.pop_back();
  }
}

std::string hex_text(std::string_view bytes) {
  const char* digits = "0123456789abcdef";
  std::string out;
  for (const unsigned char byte : bytes) out += digits[byte >> 4], out += digits[byte & 15];
  return out;
}

// A vocabulary as web/stats.js reads it. `bytes` and `counts` are of the ids that the page shows.
OrderedJson vocabulary_json(const Vocabulary& vocabulary, const Figures& f, const Sample& sample) {
  const Tokenizer& tokenizer = vocabulary.tokenizer;
  std::set<int> ids, specials;
  OrderedJson documents = OrderedJson::array();
  for (const Sample::Document& document : sample.documents) {
    OrderedJson tokens = OrderedJson::array();
    for (const TokenPlace& t : tokenizer.encode_places(document.text)) {
      if (t.end > document.shown) break;
      tokens.push_back({t.id, t.begin, t.end});
      ids.insert(t.id);
      if (tokenizer.is_special(t.id)) specials.insert(t.id);
    }
    documents.push_back(tokens);
  }
  for (const auto* list : {&f.frequent, &f.longest, &f.unused, &f.fragments}) {
    ids.insert(list->begin(), list->end());
  }
  OrderedJson bytes = OrderedJson::object(), counts = OrderedJson::object();
  for (const int id : ids) {
    bytes[std::to_string(id)] = hex_text(tokenizer.token_bytes(id));
    counts[std::to_string(id)] = vocabulary.counts[size_t(id)];
  }
  OrderedJson kinds = OrderedJson::array();
  for (size_t k = 0; k < kKinds; k++) {
    const Figures::KindCount& c = f.kinds[k];
    kinds.push_back({{"kind", kKindNames[k]}, {"text", c.text}, {"vocabulary", c.vocabulary}});
  }
  const Figures::KindCount& fragments = f.kinds[size_t(TokenKind::fragment)];
  return {{"name", vocabulary.name},
          {"tokens", f.tokens},
          {"size", f.size},
          {"used", f.used},
          {"entropy", f.entropy},
          {"kinds", kinds},
          {"lengths", {{"text", f.text_lengths}, {"vocabulary", f.vocabulary_lengths}}},
          {"frequent", f.frequent},
          {"longest", f.longest},
          {"unused", f.unused},
          {"fragments", {{"tokens", fragments.text}, {"frequent", f.fragments}}},
          {"special", specials},
          {"bytes", bytes},
          {"counts", counts},
          {"sample", documents}};
}

// JSON in which no markup can begin or end.
std::string inert_json(const OrderedJson& json) {
  const std::string text = json.dump(-1, ' ', true, OrderedJson::error_handler_t::replace);
  std::string out;
  for (const char c : text) {
    if (c == '<') {
      out += "\\u003c";
    } else {
      out += c;
    }
  }
  return out;
}

std::string make_page(const TextFigures& text, const std::vector<Vocabulary>& vocabularies,
                      const std::vector<Figures>& figures, const Sample& sample) {
  OrderedJson documents = OrderedJson::array(), list = OrderedJson::array();
  for (const auto& [document, shown] : sample.documents) {
    documents.push_back(hex_text(std::string_view(document).substr(0, shown)));
  }
  for (size_t i = 0; i < vocabularies.size(); i++) {
    list.push_back(vocabulary_json(vocabularies[i], figures[i], sample));
  }
  std::filesystem::path name = text.name;  // the page does not tell where the text lay
  if (!name.has_filename()) name = name.parent_path();
  const OrderedJson data = {{"text",
                             {{"name", name.filename().string()},
                              {"documents", text.documents},
                              {"bytes", text.bytes},
                              {"characters", text.characters}}},
                            {"sampled", {{"shown", sample.bytes}, {"whole", text.bytes}}},
                            {"sample", documents},
                            {"vocabularies", list}};
  const std::string style(web::style_css());
  const std::string script = concat("\n", web::tokens_js(), "\n", web::stats_js());
  return concat(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; ",
      "script-src 'sha256-", sha256_base64(script), "'; style-src 'sha256-", sha256_base64(style),
      "'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'\">\n",
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
      "<title>Tokens</title>\n<style>", style, "</style>\n</head>\n<body>\n", web::stats_html(),
      "<script type=\"application/json\" id=\"data\">", inert_json(data), "</script>\n",
      "<script type=\"module\">", script, "</script>\n</body>\n</html>\n");
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The files of web/ that it is made of

CAKE_WEB_FILE(style_css, "web/style.css")
CAKE_WEB_FILE(tokens_js, "web/tokens.js")
CAKE_WEB_FILE(stats_html, "web/stats.html")
CAKE_WEB_FILE(stats_js, "web/stats.js")

}  // namespace cake
