// Main text of pages.
#include "cake/corpus.h"
namespace cake::corpus {
Extracted extract(std::string_view, std::string_view, const ExtractOptions&) {
  fail("extract: not there yet");
}
}  // namespace cake::corpus
