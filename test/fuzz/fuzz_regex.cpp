// Any bytes as a split pattern and, behind a byte 0xFF, a text: the pattern is compiled or refused
// in one line; its pieces are those of match_end, they are the text, and so are the parts at safe
// cuts.
#include "cake/split.h"
#include "cake/split_regex.h"
#include "cake/unicode.h"
#include "test/fuzz/fuzz.h"

namespace {

using namespace cake;
using fuzz::expect;
using Pieces = std::vector<std::string_view>;

// By the plain definition.
Pieces plain_pieces(const SplitRegex& regex, std::string_view text) {
  RegexScanner scanner(regex, text);
  Pieces out;
  size_t gap = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t end = scanner.match_end(i);
    if (end != RegexScanner::kNoMatch) {
      expect(end >= i && end <= text.size(), "a match is in the text");
      if (i > gap) out.push_back(text.substr(gap, i - gap));
      if (end > i) out.push_back(text.substr(i, end - i));
      gap = end;
    }
    i = end != RegexScanner::kNoMatch && end > i
            ? end
            : i + size_t(decode_utf8(text.data() + i, text.size() - i).bytes);
  }
  if (text.size() > gap) out.push_back(text.substr(gap));
  return out;
}

void check(const std::string& pattern, std::string_view text) {
  const SplitRegex regex(pattern);
  const PreTokenizer pre_tokenizer({{.kind = SplitStep::Kind::regex, .text = pattern}});
  Pieces pieces;
  pre_tokenizer.split(text, text.size(), pieces);
  const char* begin = text.data();
  for (const std::string_view piece : pieces) {
    expect(piece.data() == begin && !piece.empty(), "pieces follow one another");
    begin += piece.size();
  }
  expect(begin == text.data() + text.size(), "pieces cover the text");
  expect(pieces == plain_pieces(regex, text), "pieces are those of match_end");
  for (size_t i = 0; i < std::min<size_t>(text.size(), 500); i++) {
    if (!pre_tokenizer.is_safe_cut(text, i)) continue;
    Pieces parts;
    pre_tokenizer.split(text.substr(0, i + 1), i, parts);
    pre_tokenizer.split(text.substr(i), text.size() - i, parts);
    expect(parts == pieces, "a safe cut changes nothing");
  }
  if (text.empty()) return;
  std::string again;  // long enough for what takes more than linear time
  while (again.size() < 1 << 16) again += text;
  pieces.clear();
  pre_tokenizer.split(again, again.size(), pieces);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string all(reinterpret_cast<const char*>(data), size);
  const std::string pattern = all.substr(0, all.find('\xFF'));
  const std::string text = all.substr(std::min(size, pattern.size() + 1));
  try {
    check(pattern, text);
  } catch (const Error& error) {
    expect(std::string_view(error.what()).find('\n') == std::string_view::npos, "one line");
  }
  try {
    SplitRegex::spelled_for_oniguruma(pattern);
  } catch (const Error&) {  // one line for the user
  }
  return 0;
}
