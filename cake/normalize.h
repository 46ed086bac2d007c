// Changes to text before it is split: Hugging Face's normalizers. The interface; the algorithms are
// bpe_text.cpp. Bytes that are not UTF-8 stay as they are.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace cake {

struct NormalizerStep {
  enum class Kind { nfc, nfd, nfkc, nfkd, lowercase, prepend, replace };
  Kind kind = Kind::nfc;
  std::string text;     // prepend: what is put in front; replace: what is looked for, not empty
  std::string content;  // replace: what is put in its place
};

// The bytes of the original text that a byte of the normalized text stands for. A byte that no step
// changed stands for itself. All bytes of a changed stretch stand for all that the stretch was: a
// character with its marks (normal forms), a character (lower case), a match (replace). Bytes that
// were put in front stand for nothing: begin and end are equal.
struct SourceBytes {
  size_t begin, end;
};
using Alignment = std::vector<SourceBytes>;  // of each byte of the normalized text

struct Normalizer {
  std::vector<NormalizerStep> steps;

  bool empty() const { return steps.empty(); }
  // Whether normalize() would give the text back, found without doing it; false: not known.
  // `begins`: see below.
  bool keeps(std::string_view text, bool begins = true) const;
  std::string normalize(std::string_view text) const;
  // Sets `out` to the normalized text, and `alignment` if there is one. False: the text stays as it
  // is, and `out` and `alignment` mean nothing. `begins`: something may be put in front of the
  // text, because it is not the continuation of another one.
  bool normalize(std::string_view text, bool begins, std::string& out,
                 Alignment* alignment = nullptr) const;
  // The same for text[0, end), where `end` is a safe cut or the end. The text behind `end` is
  // normalized too, as far as a split looks at it. Sets `end` to the end of the part in `out`.
  bool normalize_part(std::string_view text, size_t& end, bool begins, std::string& out,
                      Alignment* alignment = nullptr) const;
  std::string description() const;  // all that decides what it does, for hashes
};

}  // namespace cake
