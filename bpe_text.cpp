// Part of ./bpe: from text to ids and back around the encoder: added tokens, normalizers,
// Tokenizer.
//
// A text is cut at added tokens, what is between them is normalized (cake/normalize.h), cut at
// further added tokens, and handed to the Encoder. TextEncoder says in which order and why.
#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <set>
#include <tuple>

#include "cake/bpe.h"
#include "cake/normal_forms.h"
#include "cake/unicode.h"

namespace cake {

// -------------------------------------------------------------------------------------------------
// Searching for added tokens

namespace {

// What regular expressions call \w: Alphabetic, marks, decimal digits, connecting punctuation and
// the two joiners. Alphabetic are letters, letter numbers, marks and the circled letters.
bool is_word_character(uint32_t c) {
  switch (general_category(c)) {
    case Category::Nd:
    case Category::Nl:
    case Category::Pc:
      return true;
    case Category::So:
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
             (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
    default:
      return is_letter(c) || is_mark(c) || c == 0x200C || c == 0x200D;
  }
}
bool ends_with_word(std::string_view text) {
  return !text.empty() && is_word_character(decode_utf8_before(text, text.size()).code);
}
bool starts_with_word(std::string_view text) {
  return !text.empty() && is_word_character(decode_utf8(text.data(), text.size()).code);
}
size_t white_space_end(std::string_view text, size_t i) {
  while (i < text.size()) {
    const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
    if (!is_white_space(c.code)) break;
    i += size_t(c.bytes);
  }
  return i;
}
size_t white_space_begin(std::string_view text, size_t i) {
  while (i > 0) {
    const CodePoint c = decode_utf8_before(text, i);
    if (!is_white_space(c.code)) break;
    i -= size_t(c.bytes);
  }
  return i;
}

// Finds tokens in text, from left to right, the longest one at its place. A trie over their bytes;
// the search enters it only where the first two bytes of a token stand.
class TokenSearch {
 public:
  void add(std::string_view bytes, const AddedToken& token) {
    int node = 0;
    for (const char byte : bytes) {
      int& child = edges_[uint64_t(node) << 8 | static_cast<unsigned char>(byte)];
      if (child < 0) {
        child = int(node_token_.size());
        node_token_.push_back(-1);
      }
      node = child;
    }
    if (node_token_[size_t(node)] >= 0)
      return;  // of added tokens with the same text the first one counts
    node_token_[size_t(node)] = int(tokens_.size());
    tokens_.push_back(token);
    has_always_ |= !token.special;
    const int a = static_cast<unsigned char>(bytes[0]);
    const int b = bytes.size() > 1 ? static_cast<unsigned char>(bytes[1]) : -1;
    for (int any = 0; any < 256; any++) {
      if (b < 0 || b == any) pairs_[pair(a, any)] = true;
    }
    if (!beginnings_.insert({a, b}).second || beginnings_.size() > kFew) return;
    for (size_t k = beginnings_.size() - 1; k < kFew; k++) {  // the last one again and again
      first_[k] = static_cast<unsigned char>(a);
      second_[k] = static_cast<unsigned char>(std::max(b, 0));
      second_mask_[k] = b < 0 ? 0 : 0xFF;
    }
  }

  // Whether there is a token to look for.
  bool is_needed(bool specials) const { return specials ? !tokens_.empty() : has_always_; }

  // Calls visit(token, begin, end) for each token in text[0, end), and with nullptr for each
  // stretch of text between tokens. search_behind(token, begin, end) says of a special token where
  // the search goes on because it is not recognised there, 0: it is recognised.
  template <class SearchBehind, class Visit>
  void each_stretch(std::string_view text, size_t end, const SearchBehind& search_behind,
                    const Visit& visit) const {
    const std::string_view searched = text.substr(0, end);
    size_t done = 0, next = 0;
    for (Match match = find(searched, 0); match.token; match = find(searched, next)) {
      const AddedToken& token = *match.token;
      size_t begin = match.begin, token_end = match.end;
      next = token_end;
      if (token.special) {
        if (const size_t behind = search_behind(token, begin, token_end)) {
          next = behind;
          continue;
        }
      }
      if (token.single_word &&
          (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(token_end)))) {
        continue;
      }
      if (token.lstrip) begin = std::max(done, white_space_begin(text, begin));
      if (token.rstrip) token_end = white_space_end(searched, token_end);
      if (done < begin) visit(nullptr, done, begin);
      if (begin >= token_end) continue;  // the token before it has taken all of its text
      visit(&token, begin, token_end);
      done = token_end;
    }
    if (done < end) visit(nullptr, done, end);
  }

 private:
  struct Match {
    size_t begin, end;
    const AddedToken* token;  // nullptr: there is none
  };
  Match find(std::string_view text, size_t offset) const {
    while ((offset = next_candidate(text, offset)) < text.size()) {
      int node = 0, longest = -1;
      size_t end = offset;
      for (size_t i = offset; i < text.size(); i++) {
        node = edges_.find(uint64_t(node) << 8 | static_cast<unsigned char>(text[i]));
        if (node < 0) break;
        if (node_token_[size_t(node)] >= 0) longest = node_token_[size_t(node)], end = i + 1;
      }
      if (longest >= 0) return {offset, end, &tokens_[size_t(longest)]};
      offset++;
    }
    return {offset, offset, nullptr};
  }

  // The first offset at or behind `i` where a token may begin.
  size_t next_candidate(std::string_view text, size_t i) const {
    const auto* p = reinterpret_cast<const unsigned char*>(text.data());
    const size_t size = text.size();
    const bool few = beginnings_.size() <= kFew;
    while (i < size) {
      const size_t limit = std::min(size, i + 32);
      if (few && i + 33 <= size && !begins_in_block(p + i)) {
        i = limit;
        continue;
      }
      for (; i < limit; i++) {
        if (i + 1 == size || pairs_[pair(p[i], p[i + 1])]) return i;
      }
    }
    return size;
  }
  bool begins_in_block(const unsigned char* p) const {
    unsigned char found = 0;
    for (int i = 0; i < 32; i++) {  // the compiler makes a few vector instructions of it
      for (size_t k = 0; k < kFew; k++) {
        found |= static_cast<unsigned char>((p[i] == first_[k]) &
                                            ((p[i + 1] & second_mask_[k]) == second_[k]));
      }
    }
    return found;
  }
  static size_t pair(int a, int b) { return size_t(a) << 8 | size_t(b); }

  std::vector<AddedToken> tokens_;
  bool has_always_ = false;             // a token that is no special one
  FlatMap edges_;                       // (node, byte) -> node; 0 is the root
  std::vector<int> node_token_ = {-1};  // token that ends at the node, -1: none
  // The first two bytes of tokens: -1 for the second one of a single byte. While they are few, 32
  // places of the text are compared with them at once.
  static constexpr size_t kFew = 4;
  std::set<std::pair<int, int>> beginnings_;
  unsigned char first_[kFew] = {}, second_[kFew] = {}, second_mask_[kFew] = {};
  std::vector<bool> pairs_ = std::vector<bool>(1 << 16);  // first two bytes, at [pair(a, b)]
};

}  // namespace

class AddedTokens {
 public:
  explicit AddedTokens(const TokenizerData& data);

  TokenSearch raw, normalized;

  // Whether a cut between p and the character c (its first byte: q) could divide a token, or the
  // white space that it takes along, or change what the text beside a token becomes.
  bool may_cross(unsigned char p, uint32_t c, unsigned char q, unsigned char q_normal) const {
    const bool begins = begins_[q] || begins_[q_normal] || (q >= 0x80 && begins_[kAnyHighByte]);
    const bool joined =
        joined_[p][q] || joined_[p][q_normal] || (q >= 0x80 && joined_[p][kAnyHighByte]);
    const bool white = p >= 0x80 || is_white_space(p);
    return begins || joined || (lstrip_ && white && is_white_space(c)) ||
           (rstrip_ && (white || ends_[p]) && is_white_space(c)) ||
           (prefix_ && (ends_[p] || (rstrip_ && white)));
  }

 private:
  void note_bytes(std::string_view bytes, bool lower, bool normalized);

  static constexpr size_t kAnyHighByte = 256;  // some byte of 0x80 or above
  bool lstrip_ = false, rstrip_ = false;
  bool prefix_ = false;                      // something is put in front of the text behind a token
  std::array<bool, 257> begins_{}, ends_{};  // bytes that a token begins or ends with
  std::vector<std::array<bool, 257>> joined_{256};  // [a][b]: a token has b right behind a
};

AddedTokens::AddedTokens(const TokenizerData& data) {
  bool lower = false;
  prefix_ = data.add_prefix_space;
  for (const NormalizerStep& step : data.normalizer.steps) {
    lower |= step.kind == NormalizerStep::Kind::lowercase;
    prefix_ |= step.kind == NormalizerStep::Kind::prepend;
  }
  for (const bool special : {true, false}) {  // of equal texts the special token is found
    for (const AddedToken& token : data.added) {
      if (token.special != special) continue;
      const std::string bytes =
          token.normalized ? data.normalizer.normalize(token.text) : token.text;
      if (bytes.empty()) continue;
      (token.normalized ? normalized : raw).add(bytes, token);
      note_bytes(bytes, lower, token.normalized && !data.normalizer.empty());
      lstrip_ |= token.lstrip, rstrip_ |= token.rstrip;
    }
  }
}

// The bytes of a token as they may stand in a text: before it is normalized, a small letter may
// have been a capital, and a byte of 0x80 or above another one.
void AddedTokens::note_bytes(std::string_view bytes, bool lower, bool normalized) {
  const auto each_form = [&](size_t i, const auto& visit) {
    const auto b = static_cast<unsigned char>(bytes[i]);
    visit(size_t(b));
    if (lower && b >= 'a' && b <= 'z') visit(size_t(b) - 32);
    if (normalized && b >= 0x80) visit(kAnyHighByte);
  };
  each_form(0, [&](size_t b) { begins_[b] = true; });
  each_form(bytes.size() - 1, [&](size_t b) { ends_[b] = true; });
  for (size_t i = 0; i + 1 < bytes.size(); i++) {
    each_form(i, [&](size_t a) {
      if (a < 256) each_form(i + 1, [&](size_t b) { joined_[a][b] = true; });
    });
  }
}

std::shared_ptr<const AddedTokens> index_added_tokens(const TokenizerData& data) {
  return std::make_shared<const AddedTokens>(data);
}

// -------------------------------------------------------------------------------------------------
// Normalizers

namespace {

// A text that one step makes of another: what is replaced, and all between it as it was.
class Rewriter {
 public:
  Rewriter(std::string_view in, const Alignment* in_alignment, std::string& out,
           Alignment* alignment)
      : in_(in), in_alignment_(in_alignment), out_(out), alignment_(alignment) {
    out_.clear();
    if (alignment_) alignment_->clear();
  }

  void replace(size_t begin, size_t end, std::string_view bytes) {
    if (in_.substr(begin, end - begin) == bytes) return;
    changed_ = true;
    copy(begin);
    out_ += bytes;
    if (alignment_) alignment_->insert(alignment_->end(), bytes.size(), source(begin, end));
    done_ = end;
  }
  bool finish() {  // whether anything was replaced
    if (changed_) copy(in_.size());
    return changed_;
  }

 private:
  void copy(size_t end) {
    out_ += in_.substr(done_, end - done_);
    for (size_t i = done_; alignment_ && i < end; i++) alignment_->push_back(source(i, i + 1));
  }
  SourceBytes source(size_t begin, size_t end) const {
    if (!in_alignment_) return {begin, end};
    if (begin < end) return {(*in_alignment_)[begin].begin, (*in_alignment_)[end - 1].end};
    const size_t place = begin < in_.size() ? (*in_alignment_)[begin].begin
                         : in_.empty()      ? 0
                                            : in_alignment_->back().end;
    return {place, place};
  }

  std::string_view in_;
  const Alignment* in_alignment_;  // nullptr: it is the original text
  std::string& out_;
  Alignment* alignment_;
  size_t done_ = 0;  // bytes of in_
  bool changed_ = false;
};

bool is_form(NormalizerStep::Kind kind) { return kind <= NormalizerStep::Kind::nfkd; }
NormalForm form_of(NormalizerStep::Kind kind) {
  switch (kind) {
    case NormalizerStep::Kind::nfd:
      return NormalForm::nfd;
    case NormalizerStep::Kind::nfkc:
      return NormalForm::nfkc;
    case NormalizerStep::Kind::nfkd:
      return NormalForm::nfkd;
    default:
      return NormalForm::nfc;
  }
}

void rewrite_form(const Normalization& form, std::string_view in, Rewriter& out) {
  std::string normal;
  std::vector<uint32_t> codes;
  for (size_t offset = 0; offset < in.size();) {
    const Normalization::Stretch s = form.find_stretch(in, offset);
    normal.clear();
    form.append(in.substr(s.begin, s.end - s.begin), normal, codes);
    out.replace(s.begin, s.end, normal);
    offset = s.end;
  }
}

// The first character at or behind `i` that has a lower case; the text's end if there is none.
size_t find_upper_case(std::string_view text, size_t i) {
  while (i < text.size()) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x80) {
      if (byte >= 'A' && byte <= 'Z') break;
      i++;
    } else {
      const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
      if (lower_case(c.code) != c.code) break;
      i += size_t(c.bytes);
    }
  }
  return i;
}

// Each character by itself: a sigma at the end of a word becomes the one inside words.
void rewrite_lower_case(std::string_view in, Rewriter& out) {
  char bytes[8];
  for (size_t i = find_upper_case(in, 0); i < in.size();) {
    const CodePoint c = decode_utf8(in.data() + i, in.size() - i);
    size_t n = size_t(encode_utf8(lower_case(c.code), bytes));
    if (c.code == 0x130) n += size_t(encode_utf8(0x307, bytes + n));
    out.replace(i, i + size_t(c.bytes), {bytes, n});
    i = find_upper_case(in, i + size_t(c.bytes));
  }
}

void rewrite_matches(const NormalizerStep& step, std::string_view in, Rewriter& out) {
  for (size_t i = in.find(step.text); i < in.size(); i = in.find(step.text, i)) {
    out.replace(i, i + step.text.size(), step.content);
    i += step.text.size();
  }
}

void rewrite(const NormalizerStep& step, std::string_view in, bool begins, Rewriter& out) {
  switch (step.kind) {
    case NormalizerStep::Kind::lowercase:
      return rewrite_lower_case(in, out);
    case NormalizerStep::Kind::replace:
      return rewrite_matches(step, in, out);
    case NormalizerStep::Kind::prepend:
      if (begins && !in.empty()) out.replace(0, 0, step.text);
      return;
    default:
      return rewrite_form(normalization(form_of(step.kind)), in, out);
  }
}

const char* step_name(NormalizerStep::Kind kind) {
  static constexpr const char* kNames[] = {"nfc",       "nfd",     "nfkc",   "nfkd",
                                           "lowercase", "prepend", "replace"};
  return kNames[int(kind)];
}

}  // namespace

bool Normalizer::keeps(std::string_view text, bool begins) const {
  for (const NormalizerStep& step : steps) {
    bool kept = true;
    if (is_form(step.kind)) {
      kept = normalization(form_of(step.kind)).find_stretch(text, 0).begin == text.size();
    } else if (step.kind == NormalizerStep::Kind::lowercase) {
      kept = find_upper_case(text, 0) == text.size();
    } else if (step.kind == NormalizerStep::Kind::prepend) {
      kept = !begins || text.empty();
    } else {
      kept = text.find(step.text) == text.npos;
    }
    if (!kept) return false;
  }
  return true;
}

bool Normalizer::normalize(std::string_view text, bool begins, std::string& out,
                           Alignment* alignment) const {
  bool changed = false;
  std::string before;  // what the step before has made
  Alignment before_alignment;
  for (const NormalizerStep& step : steps) {
    if (changed) {
      before.swap(out);
      if (alignment) before_alignment.swap(*alignment);
    }
    Rewriter rewriter(changed ? before : text, changed ? &before_alignment : nullptr, out,
                      alignment);
    rewrite(step, changed ? before : text, begins, rewriter);
    if (rewriter.finish()) {
      changed = true;
    } else if (changed) {
      before.swap(out);
      if (alignment) before_alignment.swap(*alignment);
    }
  }
  return changed;
}

std::string Normalizer::normalize(std::string_view text) const {
  std::string out;
  return normalize(text, true, out) ? out : std::string(text);
}

bool Normalizer::normalize_part(std::string_view text, size_t& end, bool begins, std::string& out,
                                Alignment* alignment) const {
  if (!normalize(text.substr(0, end), begins, out, alignment)) return false;
  constexpr size_t kAhead = 64;
  const std::string_view ahead = text.substr(end, kAhead);
  end = out.size();
  std::string normal;
  if (!ahead.empty()) out += normalize(ahead, false, normal) ? normal : ahead;
  return true;
}

std::string Normalizer::description() const {
  std::string all;
  for (const NormalizerStep& step : steps) {
    all += concat(" ", step_name(step.kind));
    if (!step.text.empty()) all += concat(" ", step.text.size(), ":", step.text);
    if (step.kind == NormalizerStep::Kind::replace) {
      all += concat(" ", step.content.size(), ":", step.content);
    }
  }
  return all;
}

// -------------------------------------------------------------------------------------------------
// TextEncoder

TextEncoder::TextEncoder(const TokenizerData& data, size_t cache_bytes)
    : data_(data), added_(data.added_tokens), encoder_(data, cache_bytes) {}

void TextEncoder::encode(std::string_view text, size_t end, bool begins, bool specials,
                         IdBuffer& ids) {
  ids_ = &ids;
  if (!added_->raw.is_needed(specials)) return encode_raw(text, end, begins, specials, {});
  const auto behind = [&](const AddedToken& token, size_t begin, size_t token_end) {
    return specials ? search_behind(token, begin, token_end, {}) : token_end;
  };
  added_->raw.each_stretch(
      text, end, behind, [&](const AddedToken* token, size_t begin, size_t stretch_end) {
        if (token) return add_token(*token, begin, stretch_end, {});
        // A token ends the stretch before it as the end of the text does.
        const std::string_view stretch =
            text.substr(begin, stretch_end < end ? stretch_end - begin : text.npos);
        encode_raw(stretch, stretch_end - begin, begins || begin > 0, specials,
                   {begin, 0, nullptr});
      });
}

void TextEncoder::encode(std::string_view text, size_t end, bool begins, bool specials,
                         std::vector<int>& ids) {
  own_ids_.clear();
  encode(text, end, begins, specials, own_ids_);
  ids.insert(ids.end(), own_ids_.begin(), own_ids_.end());
}

void TextEncoder::encode_places(std::string_view text, bool specials,
                                std::vector<TokenPlace>& places) {
  own_ids_.clear();
  places_ = &places;
  encode(text, text.size(), true, specials, own_ids_);
  places_ = nullptr;
}

void TextEncoder::encode_places(std::string_view text, std::span<const SpecialStretch> allowed,
                                bool begins, std::vector<TokenPlace>& places) {
  own_ids_.clear();
  places_ = &places, allowed_ = allowed;
  encode(text, text.size(), begins, !allowed.empty(), own_ids_);
  places_ = nullptr, allowed_.reset();
}

void TextEncoder::encode_raw(std::string_view text, size_t end, bool begins, bool specials,
                             Origin origin) {
  size_t normal_end = end;
  const bool changed = data_.normalizer.normalize_part(text, normal_end, begins, normal_,
                                                       places_ ? &alignment_ : nullptr);
  if (!changed) return encode_normalized(text, end, begins, specials, origin);
  encode_normalized(normal_, normal_end, begins, specials, {0, origin.offset, &alignment_});
}

void TextEncoder::encode_normalized(std::string_view text, size_t end, bool begins, bool specials,
                                    Origin origin) {
  if (!added_->normalized.is_needed(specials)) return encode_plain(text, end, begins, origin);
  const auto behind = [&](const AddedToken& token, size_t begin, size_t token_end) {
    return specials ? search_behind(token, begin, token_end, origin) : token_end;
  };
  added_->normalized.each_stretch(
      text, end, behind, [&](const AddedToken* token, size_t begin, size_t stretch_end) {
        if (token) return add_token(*token, begin, stretch_end, origin);
        const std::string_view stretch =
            text.substr(begin, stretch_end < end ? stretch_end - begin : text.npos);
        encode_plain(stretch, stretch_end - begin, begins || begin > 0,
                     {origin.offset + begin, origin.base, origin.alignment});
      });
}

void TextEncoder::encode_plain(std::string_view text, size_t end, bool begins, Origin origin) {
  const bool prefix = data_.add_prefix_space && begins && end > 0 && text[0] != ' ';
  if (prefix) {
    prefixed_ = " ";
    prefixed_ += text;
    text = prefixed_;
  }
  const size_t begin = ids_->size();
  encoder_.encode(text, end + prefix, *ids_);
  if (!places_) return;
  size_t offset = 0;
  for (size_t i = begin; i < ids_->size(); i++) {
    const int id = int((*ids_)[i]);
    const size_t token_end = offset + (id == data_.unknown ? 1 : data_.token(id).size());
    const auto without_prefix = [&](size_t x) { return x - (prefix && x > 0); };
    add_place(id, without_prefix(offset), without_prefix(token_end), origin);
    offset = token_end;
  }
}

void TextEncoder::add_token(const AddedToken& token, size_t begin, size_t end, Origin origin) {
  ids_->push_back(uint32_t(token.id));
  if (places_) add_place(token.id, begin, end, origin);
}

void TextEncoder::add_place(int id, size_t begin, size_t end, Origin origin) {
  std::tie(begin, end) = source(begin, end, origin);
  places_->push_back({id, begin, end});
}

std::pair<size_t, size_t> TextEncoder::source(size_t begin, size_t end, Origin origin) {
  begin += origin.offset, end += origin.offset;
  if (origin.alignment) {
    const Alignment& alignment = *origin.alignment;
    const size_t source_end = begin < end ? alignment[end - 1].end : 0;
    begin = begin < alignment.size() ? alignment[begin].begin
            : alignment.empty()      ? 0
                                     : alignment.back().end;
    end = std::max(begin, source_end);
  }
  return {origin.base + begin, origin.base + end};
}

size_t TextEncoder::search_behind(const AddedToken& token, size_t begin, size_t end,
                                  Origin origin) const {
  if (!allowed_) return 0;
  const auto [source_begin, source_end] = source(begin, end, origin);
  // The last stretch that begins at the token or before it.
  auto stretch = std::upper_bound(allowed_->begin(), allowed_->end(), source_begin,
                                  [](size_t x, const SpecialStretch& s) { return x < s.begin; });
  const bool is_last = stretch == allowed_->end();
  const bool reaches_next = !is_last && stretch->begin < source_end;
  if (stretch != allowed_->begin()) {
    const auto& [stretch_begin, stretch_end, only] = *--stretch;
    const bool is_named =
        only.empty() || std::find(only.begin(), only.end(), token.id) != only.end();
    if (source_end <= stretch_end && is_named) return 0;
    if (source_begin < stretch_end && source_end > stretch_end) return begin + 1;
  }
  // It covers some of a stretch, where another token may begin.
  return reaches_next ? begin + 1 : end;
}

// -------------------------------------------------------------------------------------------------
// Cuts

// The characters beside a cut must be normalized in the same way whatever stands farther away: an
// ASCII character before the cut, and behind it one that no normal form joins to what is before it.
bool is_safe_cut(const TokenizerData& data, std::string_view text, size_t i) {
  if (!data.pre_tokenizer.is_safe_cut(text, i)) return false;
  if (i == 0 || i >= text.size()) return true;
  const auto p = static_cast<unsigned char>(text[i - 1]), q = static_cast<unsigned char>(text[i]);
  const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
  unsigned char q_normal = q;  // the first byte of the normalized character
  if (!data.normalizer.empty()) {
    if (p >= 0x80) return false;
    for (const NormalizerStep& step : data.normalizer.steps) {
      if (step.kind == NormalizerStep::Kind::replace) {
        const auto lower = [](unsigned char b) { return char(lower_case(b)); };
        const char bytes[] = {char(p), lower(p), char(q), lower(q), 0};
        if (q >= 0x80 || step.text.find_first_of({bytes, 4}) != step.text.npos) return false;
      }
    }
    for (const NormalForm form : {NormalForm::nfc, NormalForm::nfkc}) {
      if (!normalization(form).is_boundary(c.code)) return false;
      if (!normalization(form).is_boundary(lower_case(c.code))) return false;
    }
    // What the split sees about the cut is normalized.
    const auto normalized = [&](std::string_view part) {
      std::string out;
      return data.normalizer.normalize(part, false, out) ? out : std::string(part);
    };
    const std::string before = normalized(text.substr(i - 1, 1));
    const std::string behind = normalized(text.substr(i, 32));
    if (behind.empty() || !data.pre_tokenizer.is_safe_cut(before + behind, before.size())) {
      return false;
    }
    q_normal = static_cast<unsigned char>(behind[0]);
  }
  // While a vocabulary is trained it has no added tokens yet.
  return !data.added_tokens || !data.added_tokens->may_cross(p, c.code, q, q_normal);
}

// -------------------------------------------------------------------------------------------------
// Tokenizer

// Encoders that wait for the next text. There are as many as threads have ever encoded at once.
class EncoderPool {
 public:
  // Calls visit(encoder) with one that nobody else uses meanwhile.
  template <class Visit>
  void with_encoder(const TokenizerData& data, const Visit& visit) {
    std::unique_ptr<TextEncoder> encoder;
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        encoder = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    if (!encoder) encoder = std::make_unique<TextEncoder>(data, kPooledCacheBytes);
    visit(*encoder);
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(encoder));
  }

 private:
  static constexpr size_t kPooledCacheBytes = 8 << 20;
  std::mutex mutex_;
  std::vector<std::unique_ptr<TextEncoder>> idle_;
};

Tokenizer::Tokenizer(std::shared_ptr<const TokenizerData> data)
    : data_(std::move(data)), encoders_(std::make_shared<EncoderPool>()) {}

void Tokenizer::encode(std::string_view text, std::vector<int>& ids, bool allow_special) const {
  constexpr size_t kLongText = 4 << 20;  // has words enough for a cache of its own
  if (text.size() >= kLongText) {
    TextEncoder encoder(*data_, kCacheBytes);
    return encoder.encode(text, text.size(), true, allow_special, ids);
  }
  encoders_->with_encoder(*data_, [&](TextEncoder& encoder) {
    encoder.encode(text, text.size(), true, allow_special, ids);
  });
}

std::vector<int> Tokenizer::encode(std::string_view text, bool allow_special) const {
  std::vector<int> ids;
  encode(text, ids, allow_special);
  return ids;
}

std::vector<TokenPlace> Tokenizer::encode_places(std::string_view text, bool allow_special,
                                                 bool around) const {
  std::vector<TokenPlace> places;
  if (around) {
    for (const int id : data_->text_begin) places.push_back({id, 0, 0});
  }
  encoders_->with_encoder(
      *data_, [&](TextEncoder& encoder) { encoder.encode_places(text, allow_special, places); });
  if (around) {
    for (const int id : data_->text_end) places.push_back({id, text.size(), text.size()});
  }
  return places;
}

std::vector<TokenPlace> Tokenizer::encode_places(std::string_view text,
                                                 std::span<const SpecialStretch> allowed,
                                                 bool begins) const {
  std::vector<TokenPlace> places;
  encoders_->with_encoder(
      *data_, [&](TextEncoder& encoder) { encoder.encode_places(text, allowed, begins, places); });
  return places;
}

std::string Tokenizer::decode(std::span<const int> ids) const {
  size_t size = 0;
  for (const int id : ids) {
    require(id >= 0 && id < vocab_size(), "decode: found token ", id, ", expected 0 to ",
            vocab_size() - 1);
    size += data_->token(id).size();
  }
  std::string text;
  text.reserve(size);
  for (const int id : ids) text += data_->token(id);
  return text;
}

int Tokenizer::vocab_size() const { return data_->tokens(); }

std::string_view Tokenizer::token_bytes(int id) const { return data_->token(id); }

bool Tokenizer::is_special(int id) const {
  const auto token = std::lower_bound(data_->added.begin(), data_->added.end(), id,
                                      [](const AddedToken& t, int x) { return t.id < x; });
  return token != data_->added.end() && token->id == id && token->special;
}

int Tokenizer::special(std::string_view name) const {
  const auto it = data_->added_ids.find(std::string(name));
  return it == data_->added_ids.end() ? -1 : it->second;
}

std::string Tokenizer::named_token(const std::string& role) const {
  return data_->named_token(role);
}

int Tokenizer::end_of_text() const {
  const int id = special("<|endoftext|>");
  if (id < 0) fail("tokenizer: <|endoftext|> is missing among its special tokens");
  return id;
}

int Tokenizer::document_separator() const {
  if (data_->separator < 0) {
    fail("tokenizer: found no token that separates documents, expected <|endoftext|> or another");
  }
  return data_->separator;
}

int Tokenizer::find_document_separator() const { return data_->separator; }

uint64_t Tokenizer::hash() const { return data_->hash; }

std::vector<std::string_view> Tokenizer::pieces(std::string_view text) const {
  std::vector<std::string_view> all;
  data_->pre_tokenizer.split(text, text.size(), all);
  return all;
}

}  // namespace cake
