// Part of ./bpe: the files of tokenizers. Tokenizer::load() tells by its content what a file is:
//
//     tokenizer.json           Hugging Face's tokenizers (bpe_json.cpp)
//     .tiktoken                a token in base64 and its rank a line; Llama's tokenizer.model too
//     tekken.json              Mistral's: the same as JSON, with the split pattern
//     merges.txt, vocab.json   a merge a line; the id of each token
//     vocab.bpe                the same, GPT-2's own: the order of the merges gives the ids
//     .gguf                    a model's keys (bpe_gguf.cpp)
//
// Each reader fills a TokenizerData, which complete() ends. convert_tokenizer() writes.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "cake/bpe.h"
#include "cake/chatml.h"
#include "cake/gguf.h"
#include "cake/json.h"
#include "cake/tokenizer_files.h"
#include "cake/unicode.h"

namespace cake {
namespace {

using namespace tokenizer_files;
namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------
// Special tokens and the end of every reader

// Begins documents: <|endoftext|>, or what the tokenizer puts before a text, or what its
// configuration names, or a name that is known.
int find_separator(const TokenizerData& data) {
  const auto find = [&](const std::string& name) {
    const auto it = data.added_ids.find(name);
    return it == data.added_ids.end() ? -1 : it->second;
  };
  int id = find("<|endoftext|>");
  if (id >= 0) return id;
  if (!data.text_begin.empty()) return data.text_begin[0];
  for (const char* role : {"bos_token", "eos_token"}) {
    if ((id = find(data.named_token(role))) >= 0) return id;
  }
  for (const char* name :
       {"<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<s>", "<|startoftext|>", "[BOS]", "<bos>",
        "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<EOT>"}) {
    if ((id = find(name)) >= 0) return id;
  }
  return -1;
}

// hash64 of a text that is given bit by bit.
class StreamHash {
 public:
  void add(std::string_view bytes) {
    for (const unsigned char c : bytes) hash_ = (hash_ ^ c) * 0x100000001b3;
  }
  void add(int x) { add(std::string_view(reinterpret_cast<const char*>(&x), sizeof x)); }
  uint64_t value() const { return mix64(hash_); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325;
};

// Shards hold this hash, so it must not change for tokenizers that older versions could load.
// Features that came later are hashed only where a tokenizer uses them.
uint64_t hash_of(const TokenizerData& data) {
  StreamHash hash;
  hash.add(data.pre_tokenizer.description());
  hash.add(data.normalizer.description());
  if (data.ignore_merges) hash.add(" ignore_merges");
  if (data.add_prefix_space) hash.add(" add_prefix_space");
  for (int t = 256; t < data.merges.size(); t++) {
    hash.add(data.merges.parts(t).first), hash.add(data.merges.parts(t).second);
  }
  for (const AddedToken& token : data.added) hash.add(token.id);
  for (int id = 0; id < data.tokens(); id++) {
    hash.add(int(data.token(id).size())), hash.add(data.token(id));
  }
  for (const Merges::LatePair& pair : data.merges.late_pairs()) {
    hash.add(pair.left), hash.add(pair.right), hash.add(pair.token);
  }
  for (const AddedToken& token : data.added) {
    const int flags = int(!token.special) | token.lstrip << 1 | token.rstrip << 2 |
                      token.single_word << 3 | token.normalized << 4;
    if (flags != 0) hash.add(token.id), hash.add(flags), hash.add(token.text);
  }
  return hash.value();
}

}  // namespace

std::string TokenizerData::named_token(const std::string& role) const {
  const Json json = Json::parse(config, nullptr, false);
  if (!json.is_object() || !json.contains(role)) return "";
  const Json& token = json[role];
  const Json& name = token.is_object() && token.contains("content") ? token["content"] : token;
  return name.is_string() ? name.get<std::string>() : "";
}

void TokenizerData::complete(const std::string& where) {
  const auto is_own = [&](int t) { return ids[size_t(t)] >= 0 && ids[size_t(t)] != unknown; };
  std::vector<bool> made(places_.size());  // ids that bytes and merges make
  for (int t = 0; t < merges.size(); t++) {
    if (!is_own(t)) continue;
    const int id = ids[size_t(t)];
    if (token(id) != merges.bytes(t)) add_token(id, merges.bytes(t));
    if (size_t(id) >= made.size()) made.resize(size_t(id) + 1);
    made[size_t(id)] = true;
  }
  if (!ignore_merges) whole_pieces = FlatMap();
  std::sort(added.begin(), added.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  added_ids.clear();
  for (const AddedToken& added_token : added) {
    const int id = added_token.id;
    if (added_token.text.empty()) fail(where, ": found an added token without text");
    if (!added_ids.emplace(added_token.text, id).second) {
      fail(where, ": found the added token ", json_string(added_token.text), " twice");
    }
    if (size_t(id) >= made.size() || !made[size_t(id)]) {
      if (token(id) != added_token.text) add_token(id, added_token.text);
    }
  }
  for (const std::vector<int>* around : {&text_begin, &text_end}) {
    for (const int id : *around) {
      if (token(id).empty()) fail(where, ": post_processor: found id ", id, ", expected a token's");
    }
  }
  added_tokens = index_added_tokens(*this);
  separator = find_separator(*this);
  hash = hash_of(*this);
}

namespace tokenizer_files {

// ---------------------------------------------------------------------------------------------
// Bytes as printable characters

namespace {

constexpr bool spells_itself(int byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}
constexpr int kSpellings = 0x144;  // code points below it spell bytes

struct SpellingTables {
  std::array<uint16_t, 256> code{};
  std::array<int16_t, kSpellings> byte{};
};
constexpr SpellingTables kSpelling = [] {
  SpellingTables tables;
  for (auto& b : tables.byte) b = -1;
  int next = 0x100;
  for (int b = 0; b < 256; b++) {
    tables.code[size_t(b)] = uint16_t(spells_itself(b) ? b : next++);
    tables.byte[tables.code[size_t(b)]] = int16_t(b);
  }
  return tables;
}();

}  // namespace

std::string spell(std::string_view bytes) {
  std::string text;
  for (const unsigned char b : bytes) append_utf8(text, kSpelling.code[b]);
  return text;
}

bool unspell(std::string_view text, std::string& bytes) {
  for (size_t i = 0; i < text.size(); i++) {
    int code = static_cast<unsigned char>(text[i]);
    if (code >= 0x80) {  // two bytes: 110xxxxx 10xxxxxx
      if (code < 0xC2 || code > 0xC5 || i + 1 == text.size()) return false;
      const int second = static_cast<unsigned char>(text[++i]);
      if ((second & 0xC0) != 0x80) return false;
      code = (code & 0x1F) << 6 | (second & 0x3F);
    }
    if (code >= kSpellings || kSpelling.byte[size_t(code)] < 0) return false;
    bytes += char(kSpelling.byte[size_t(code)]);
  }
  return true;
}

std::string read_whole(const fs::path& path) {
  std::error_code ec;
  if (fs::is_directory(path, ec)) fail(path.string(), ": found a directory, expected a file");
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             std::fclose);
  if (!file) fail(path.string(), ": cannot open: ", errno_text());
  constexpr size_t kLargest = size_t(1) << 30;
  const uintmax_t size = fs::file_size(path, ec);
  std::string text;
  text.reserve((ec ? size_t(1) << 16 : size_t(std::min<uintmax_t>(size, kLargest))) +
               simdjson::SIMDJSON_PADDING + 1);
  for (size_t n = 1; n > 0;) {
    const size_t begin = text.size();
    if (begin > kLargest) fail(path.string(), ": found more than 1 GiB, expected a tokenizer");
    text.resize(std::max(text.capacity() - simdjson::SIMDJSON_PADDING, begin + (1 << 16)));
    n = std::fread(text.data() + begin, 1, text.size() - begin, file.get());
    text.resize(begin + n);
  }
  if (std::ferror(file.get())) fail(path.string(), ": cannot read: ", errno_text());
  refuse_git_lfs_pointer(text, path.string());
  return text;
}

// ---------------------------------------------------------------------------------------------
// A vocabulary of spellings, and a list of merges

void VocabularyBuilder::add_entry(std::string_view key, int id, const std::string& where) {
  if (size_t(id) >= seen_.size()) seen_.resize(std::max(size_t(id) + 1, 2 * seen_.size()));
  if (seen_[size_t(id)])
    fail(where, ": found id ", id, " twice, the second time for ", json_string(key));
  seen_[size_t(id)] = true;
  bytes_.clear();
  if (!unspell(key, bytes_) || bytes_.empty()) {
    data_.unspelled.push_back(id);
    return data_.add_token(id, key);
  }
  data_.add_token(id, bytes_);
  int& entry = data_.whole_pieces[piece_hash(bytes_)];
  if (entry >= 0 && data_.token(entry) == bytes_)
    fail(where, ": found ", json_string(key), " twice");
  entry = id;
}

void VocabularyBuilder::end_entries() {
  token_of_.assign(size_t(data_.tokens()), -1);
  data_.ids.assign(256, -1);
  for (int b = 0; b < 256; b++) {
    const char byte = char(b);
    const int id = find_entry(data_, {&byte, 1});
    data_.ids[size_t(b)] = id;
    if (id >= 0) token_of_[size_t(id)] = b;
  }
}

// Files that were made from tiktoken's list every way to split a token. Of these merges only the
// first one that can happen counts.
bool VocabularyBuilder::add_merge(std::string_view left, std::string_view right) {
  bytes_.clear();
  if (!unspell(left, bytes_)) return false;
  const size_t middle = bytes_.size();
  if (!unspell(right, bytes_)) return false;
  const std::string_view joined = bytes_;
  const int l = find_entry(data_, joined.substr(0, middle));
  const int r = find_entry(data_, joined.substr(middle)), j = find_entry(data_, joined);
  if (l < 0 || r < 0 || j < 0) return false;
  const Merge merge{int(merges_.size()), l, r, j};
  merges_.push_back(merge);
  const int a = token_of_[size_t(l)], b = token_of_[size_t(r)];
  if (a < 0 || b < 0) {
    early_.push_back(merge);
  } else if (token_of_[size_t(j)] < 0 && data_.merges.can_neighbour(a, b)) {
    token_of_[size_t(j)] = data_.merges.add(a, b);
    data_.ids.push_back(j);
  }
  return true;
}

int VocabularyBuilder::end_merges() {
  // A merge that is listed before its parts can never happen if another merge makes the same token
  // before these parts exist.
  const bool in_order = std::none_of(early_.begin(), early_.end(), [&](const Merge& m) {
    const int a = token_of_[size_t(m.left)], b = token_of_[size_t(m.right)];
    const int joined = token_of_[size_t(m.joined)];
    return a >= 0 && b >= 0 && (joined < 0 || joined > std::max(a, b));
  });
  return in_order ? -1 : add_in_any_order();
}

// Once more, for files where a merge comes before those that make its parts. Every token gets its
// number where the list makes it for the first time, and all its merges have that rank. That is
// right if they stand together.
int VocabularyBuilder::add_in_any_order() {
  data_.merges = Merges();
  data_.ids.resize(256);
  std::fill(token_of_.begin(), token_of_.end(), -1);
  for (int b = 0; b < 256; b++) {
    if (data_.ids[size_t(b)] >= 0) token_of_[size_t(data_.ids[size_t(b)])] = b;
  }
  for (const Merge& m : merges_) {
    int& token = token_of_[size_t(m.joined)];
    if (token < 0) {
      token = data_.merges.add_without_parts(data_.token(m.joined));
      data_.ids.push_back(m.joined);
    } else if (token + 1 != data_.merges.size()) {
      return m.number;
    }
  }
  for (const Merge& m : merges_) {
    const int left = token_of_[size_t(m.left)], right = token_of_[size_t(m.right)];
    if (left >= 0 && right >= 0) {
      data_.merges.add_late_pair(left, right, token_of_[size_t(m.joined)]);
    }
  }
  return -1;
}

}  // namespace tokenizer_files

namespace {

// ---------------------------------------------------------------------------------------------
// Tokens and their ranks: .tiktoken and tekken.json

// In the order of their ranks.
struct RankedTokens {
  std::string bytes;         // end to end
  std::vector<size_t> ends;  // where each ends in `bytes`
  std::vector<int> ids;
  size_t lines = 0;  // of the file, with those of empty tokens
  size_t size() const { return ids.size(); }
  std::string_view operator[](size_t i) const {
    const size_t begin = i == 0 ? 0 : ends[i - 1];
    return {bytes.data() + begin, ends[i] - begin};
  }
  void end_token(int id) { ends.push_back(bytes.size()), ids.push_back(id); }
};

constexpr std::array<int8_t, 256> kBase64 = [] {
  std::array<int8_t, 256> table{};
  for (auto& digit : table) digit = -1;
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (size_t i = 0; i < kDigits.size(); i++) {
    table[static_cast<unsigned char>(kDigits[i])] = int8_t(i);
  }
  return table;
}();

// Appends the bytes; false when the text is not base64.
bool decode_base64(std::string_view text, std::string& bytes) {
  while (!text.empty() && text.back() == '=') text.remove_suffix(1);
  uint32_t bits = 0;
  int n = 0;
  for (const unsigned char c : text) {
    const int digit = kBase64[c];
    if (digit < 0) return false;
    bits = bits << 6 | uint32_t(digit);
    n += 6;
    if (n >= 8) n -= 8, bytes += char(bits >> n & 255);
  }
  return true;
}

// The number of decimal digits; -1 when there are other characters, none, or too many.
int parse_rank(std::string_view digits) {
  if (digits.empty() || digits.size() > 8) return -1;
  int rank = 0;
  for (const char c : digits) {
    if (c < '0' || c > '9') return -1;
    rank = 10 * rank + (c - '0');
  }
  return rank <= JsonNode::kMaxTokenId ? rank : -1;
}

// The next line of `text` from `begin` on, without its newline. Moves `begin` behind it.
std::string_view next_line(std::string_view text, size_t& begin) {
  const size_t end = std::min(text.find('\n', begin), text.size());
  std::string_view line = text.substr(begin, end - begin);
  begin = end + 1;
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

bool is_rank_line(std::string_view line) {
  const size_t space = line.find(' ');
  std::string bytes;
  return space != line.npos && space % 4 == 0 && parse_rank(line.substr(space + 1)) >= 0 &&
         decode_base64(line.substr(0, space), bytes);
}

// A line holds a token in base64, a space, and its rank.
RankedTokens read_ranks(std::string_view text, const std::string& path) {
  RankedTokens tokens;
  tokens.bytes.reserve(text.size() / 2);
  const size_t estimate = text.size() / 12;
  tokens.ends.reserve(estimate), tokens.ids.reserve(estimate);
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const std::string_view line = next_line(text, begin);
    number++;
    if (line.empty()) continue;
    const size_t space = line.find(' '), size = tokens.bytes.size();
    const int rank = space == line.npos ? -1 : parse_rank(line.substr(space + 1));
    if (rank < 0 || !decode_base64(line.substr(0, space), tokens.bytes)) {
      fail(path, ":", number, ": found ", line.substr(0, 80), ", expected base64 and a rank");
    }
    tokens.lines++;
    if (tokens.bytes.size() > size) tokens.end_token(rank);  // Whisper's file has an empty token
  }
  if (std::is_sorted(tokens.ids.begin(), tokens.ids.end())) return tokens;
  std::vector<size_t> order(tokens.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return tokens.ids[a] < tokens.ids[b]; });
  RankedTokens sorted;
  sorted.lines = tokens.lines;
  for (const size_t i : order) sorted.bytes += tokens[i], sorted.end_token(tokens.ids[i]);
  return sorted;
}

// The file holds tokens and their ranks, not the two parts of each token. These are the two tokens
// that the merges before it leave of its bytes: of the splits into two earlier tokens the one whose
// parts can be neighbours. A token without such a split is made only where a whole piece is that
// token, or by a merge of a later one (see Merges::LatePair): then every split counts.
class RankedMerges {
 public:
  RankedMerges(const RankedTokens& tokens, TokenizerData& data, const std::string& path)
      : tokens_(tokens), data_(data), path_(path) {}

  void build() {
    add_entries();
    token_of_.assign(size_t(data_.tokens()), -1);
    for (int b = 0; b < 256; b++) token_of_[size_t(data_.ids[size_t(b)])] = b;
    parts_.assign(tokens_.size(), {-1, -1});
    size_t odd = 0, first_odd = tokens_.size();
    bool any_order = false;
    for (size_t i = 0; i < std::min(kAhead, tokens_.size()); i++) prefetch_splits(i);
    for (size_t i = 0; i < tokens_.size(); i++) {
      const bool found = tokens_[i].size() == 1 || find_parts(i);
      if (i + kAhead < tokens_.size()) prefetch_splits(i + kAhead);  // in the place of token i's
      if (found) {
        if (tokens_[i].size() > 1) add(i);
      } else if (odd++, first_odd = std::min(first_odd, i); !any_order) {
        any_order = for_each_split(i, [](int, int) {});
      }
    }
    if (odd > 0) data_.ignore_merges = true;
    if (any_order) add_in_any_order(first_odd);
  }

 private:
  void add_entries() {
    data_.reserve(size_t(tokens_.size()) + 64, tokens_.bytes.size() + 256);
    data_.ids.assign(256, -1);
    for (size_t i = 0; i < tokens_.size(); i++) {
      if (i + kAhead < tokens_.size()) {
        data_.whole_pieces.prefetch(piece_hash(tokens_[i + kAhead]));
      }
      const std::string_view bytes = tokens_[i];
      const int rank = tokens_.ids[i];
      if (i > 0 && tokens_.ids[i - 1] == rank) fail(path_, ": found rank ", rank, " twice");
      if (bytes.size() > 1 << 16) {
        fail(path_, ": rank ", rank, ": found a token of ", bytes.size(),
             " bytes, expected at most 65536");
      }
      data_.add_token(rank, bytes);
      int& entry = data_.whole_pieces[piece_hash(bytes)];
      if (entry >= 0) {
        fail(path_, ": found the token of rank ", entry, " a second time as rank ", rank);
      }
      entry = rank;
      if (bytes.size() == 1) data_.ids[static_cast<unsigned char>(bytes[0])] = rank;
    }
    for (int b = 0; b < 256; b++) {
      if (data_.ids[size_t(b)] < 0) fail(path_, ": byte ", b, " has no rank");
    }
  }

  // The tables are larger than the processor's cache, and looking for the parts of a token hardly
  // does anything else than waiting for them. So the hashes of its last splits are made, and their
  // places fetched, kAhead tokens before.
  static constexpr size_t kAhead = 8, kSplitsAhead = 4;
  struct Split {
    uint64_t left, right;  // hashes
  };
  void prefetch_splits(size_t i) {
    const std::string_view bytes = tokens_[i];
    for (size_t k = 0; k < kSplitsAhead && k + 1 < bytes.size(); k++) {
      Split& split = splits_[i % kAhead][k];
      split = split_hashes(bytes, k);
      data_.whole_pieces.prefetch(split.left), data_.whole_pieces.prefetch(split.right);
    }
  }
  static Split split_hashes(std::string_view bytes, size_t k) {  // the k-th, from the end
    const size_t middle = bytes.size() - 1 - k;
    return {piece_hash(bytes.substr(0, middle)), piece_hash(bytes.substr(middle))};
  }

  bool find_parts(size_t i) {
    const std::string_view bytes = tokens_[i];
    for (size_t k = 0; k + 1 < bytes.size(); k++) {
      const Split split = k < kSplitsAhead ? splits_[i % kAhead][k] : split_hashes(bytes, k);
      const size_t middle = bytes.size() - 1 - k;
      const int left = token_with(split.left);
      if (left < 0) continue;
      const int right = token_with(split.right);
      if (right < 0) continue;
      data_.merges.prefetch_pair(uint32_t(left), uint32_t(right));  // of add()
      if (!data_.merges.can_neighbour(left, right)) continue;
      if (data_.merges.bytes(left) != bytes.substr(0, middle)) continue;  // of an equal hash
      if (data_.merges.bytes(right) != bytes.substr(middle)) continue;
      parts_[i] = {left, right};
      return true;
    }
    return false;
  }

  int token_with(uint64_t hash) const {  // of `merges`; -1: none so far
    const int id = data_.whole_pieces.find(hash);
    return id < 0 ? -1 : token_of_[size_t(id)];
  }

  // Calls f(left id, right id) for each split of the token into two. Whether there is one.
  template <class F>
  bool for_each_split(size_t i, F f) const {
    const std::string_view bytes = tokens_[i];
    bool any = false;
    for (size_t middle = 1; middle < bytes.size(); middle++) {
      const int left = find_entry(data_, bytes.substr(0, middle));
      if (left < 0) continue;
      const int right = find_entry(data_, bytes.substr(middle));
      if (right >= 0) any = true, f(left, right);
    }
    return any;
  }

  void add(size_t i) {
    token_of_[size_t(tokens_.ids[i])] = data_.merges.add(parts_[i].first, parts_[i].second);
    data_.ids.push_back(tokens_.ids[i]);
  }

  // The parts that find_parts() found are ids of tokens in an order without the odd ones.
  void add_in_any_order(size_t first_odd) {
    std::vector<int> old_ids = data_.ids;  // by the tokens' old numbers
    data_.merges = Merges();
    const size_t size = std::min<size_t>(tokens_.size(), Merges::kMaxTokens);
    data_.merges.reserve(size, 8 * size);
    data_.ids.resize(256);
    for (size_t i = 0; i < tokens_.size(); i++) {
      if (tokens_[i].size() == 1) continue;
      if (parts_[i].first >= 0) {
        for (int* part : {&parts_[i].first, &parts_[i].second}) {
          *part = token_of_[size_t(old_ids[size_t(*part)])];
        }
        add(i);
      } else {
        token_of_[size_t(tokens_.ids[i])] = data_.merges.add_without_parts(tokens_[i]);
        data_.ids.push_back(tokens_.ids[i]);
      }
    }
    for (size_t i = first_odd; i < tokens_.size(); i++) {
      const int token = token_of_[size_t(tokens_.ids[i])];
      for_each_split(i, [&](int left, int right) {
        const int a = token_of_[size_t(left)], b = token_of_[size_t(right)];
        data_.merges.add_late_pair(a, b, token);
      });
    }
  }

  const RankedTokens& tokens_;
  TokenizerData& data_;
  const std::string& path_;
  std::vector<int> token_of_;               // by id: of `merges`
  std::vector<std::pair<int, int>> parts_;  // of each ranked token: tokens of `merges`
  std::array<std::array<Split, kSplitsAhead>, kAhead> splits_{};  // of the next tokens
};

// ---------------------------------------------------------------------------------------------
// .tiktoken: the number of ranks tells which vocabulary a file is, because it names neither its
// split pattern nor its special tokens.

// Special tokens with ids one after the other.
class SpecialList {
 public:
  explicit SpecialList(int id) : id_(id) {}
  SpecialList& add(std::initializer_list<const char*> names) {
    for (const char* name : names) tokens_.push_back({name, id_++});
    return *this;
  }
  // prefix + number + "|>" for numbers from `begin` on.
  SpecialList& numbered(const std::string& prefix, int count, int begin = 0) {
    for (int i = begin; i < begin + count; i++) tokens_.push_back({concat(prefix, i, "|>"), id_++});
    return *this;
  }
  SpecialList& skip(int count) { return id_ += count, *this; }
  const std::vector<AddedToken>& tokens() const { return tokens_; }
  int count() const { return int(tokens_.size()); }

 private:
  std::vector<AddedToken> tokens_;
  int id_;
};

std::vector<AddedToken> r50k_specials() {
  return SpecialList(50256).add({"<|endoftext|>"}).tokens();
}

std::vector<AddedToken> cl100k_specials() {
  return SpecialList(100257)
      .add({"<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"})
      .skip(15)
      .add({"<|endofprompt|>"})
      .tokens();
}

std::vector<AddedToken> o200k_specials() {
  return SpecialList(199999).add({"<|endoftext|>"}).skip(18).add({"<|endofprompt|>"}).tokens();
}

// As openai-whisper names them where it is not told the number of languages.
std::vector<AddedToken> whisper_specials() {
  constexpr std::string_view kLanguages =
      "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no "
      "th ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw "
      "gl mr pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl "
      "mg as tt haw ln ha ba jw su";
  SpecialList list(50257);
  list.add({"<|endoftext|>", "<|startoftranscript|>"});
  for (size_t begin = 0; begin < kLanguages.size();) {
    const size_t end = std::min(kLanguages.find(' ', begin), kLanguages.size());
    list.add({concat("<|", kLanguages.substr(begin, end - begin), "|>").c_str()});
    begin = end + 1;
  }
  list.add({"<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
            "<|notimestamps|>"});
  for (int i = 0; i <= 1500; i++) list.add({format("<|%.2f|>", .02 * i).c_str()});
  return list.tokens();
}

std::vector<AddedToken> llama3_specials() {
  return SpecialList(128000)
      .add({"<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
            "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
            "<|python_tag|>", "<|image|>"})
      .numbered("<|reserved_special_token_", 244, 2)
      .tokens();
}

std::vector<AddedToken> llama4_specials() {
  SpecialList list(200000);
  list.add({"<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>",
            "<|fim_suffix|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>",
            "<|step|>"})
      .numbered("<|text_post_train_reserved_special_token_", 6)
      .add({"<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"})
      .numbered("<|text_post_train_reserved_special_token_", 61, 8)
      .add({"<|image_start|>", "<|image_end|>"})
      .numbered("<|vision_reserved_special_token_", 2)
      .add({"<|tile_x_separator|>", "<|tile_y_separator|>"})
      .numbered("<|vision_reserved_special_token_", 4, 2)
      .add({"<|image|>"})
      .numbered("<|vision_reserved_special_token_", 1, 6)
      .add({"<|patch|>"})
      .numbered("<|vision_reserved_special_token_", 1041, 7)
      .numbered("<|reasoning_reserved_special_token_", 8)
      .add({"<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"});
  return list.numbered("<|reserved_special_token_", 2048 - list.count()).tokens();
}

std::vector<AddedToken> qwen_specials() {
  return SpecialList(151643)
      .add({"<|endoftext|>", "<|im_start|>", "<|im_end|>"})
      .numbered("<|extra_", 205)
      .tokens();
}

std::vector<AddedToken> qwen35_specials() {
  SpecialList list(248044);
  list.add({"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
            "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
            "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
            "<|video_pad|>"});
  const size_t special = list.tokens().size();
  list.add({"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
            "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
            "<think>", "</think>"});
  std::vector<AddedToken> tokens = list.tokens();
  for (size_t i = special; i < tokens.size(); i++) tokens[i].special = false;
  return tokens;
}

// Later names are those of the tokenizer_config.json beside the file.
std::vector<AddedToken> glm_specials() {
  return SpecialList(151329).add({"<|endoftext|>"}).tokens();
}
std::vector<AddedToken> kimi_specials() {
  return SpecialList(163584).add({"[BOS]", "[EOS]"}).tokens();
}

constexpr const char* kKimiRegex =
    R"([\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*)"
    R"([\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+)"
    R"([\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr const char* kQwen35Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N})"
    R"(| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct KnownVocabulary {
  size_t ranks;
  const char* name;
  const char* pattern;  // a name or a regular expression
  std::vector<AddedToken> (*specials)();
  bool nfc = false;
  bool begins = false;  // with its first special token, as Hugging Face's file of it has it
};
constexpr KnownVocabulary kKnownVocabularies[] = {
    {50256, "r50k", "gpt2", r50k_specials},
    {50257, "Whisper", "gpt2", whisper_specials},
    {50280, "p50k", "gpt2", r50k_specials},
    {100256, "cl100k", "cl100k", cl100k_specials},
    {199998, "o200k", "o200k", o200k_specials},
    {128000, "Llama 3", "cl100k", llama3_specials, false, true},
    {200000, "Llama 4", "o200k", llama4_specials, false, true},
    {151643, "Qwen", "qwen2", qwen_specials, true},
    {248044, "Qwen 3.5", kQwen35Regex, qwen35_specials, true},
    {151329, "GLM-4", "cl100k", glm_specials},
    {163584, "Kimi K2", kKimiRegex, kimi_specials}};

const KnownVocabulary* find_vocabulary(size_t ranks) {
  for (const KnownVocabulary& known : kKnownVocabularies) {
    if (known.ranks == ranks) return &known;
  }
  return nullptr;
}

// A name that parse_pattern() knows, or a regular expression as tiktoken reads it.
PreTokenizer parse_pre_tokenizer(const std::string& pattern, const std::string& where) {
  const bool name = std::all_of(pattern.begin(), pattern.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.';
  });
  if (name) return PreTokenizer(parse_pattern(pattern));
  try {
    return PreTokenizer(std::vector<SplitStep>{split_step_of_tiktoken(pattern)});
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
}

// The tokenizer_config.json beside a file, if there is one.
std::string config_beside(const fs::path& file) {
  const fs::path config = file.parent_path() / "tokenizer_config.json";
  return fs::exists(config) ? read_whole(config) : std::string();
}

// Adds the tokens that tokenizer_config.json lists under their ids, over those there.
void add_configured_tokens(const std::string& config, const fs::path& path,
                           std::vector<AddedToken>& added) {
  if (config.empty()) return;
  simdjson::dom::parser parser;
  const std::string file = (path.parent_path() / "tokenizer_config.json").string();
  const JsonNode root = parse_file(parser, config, file);
  if (!root.value.is_object() || !root.has("added_tokens_decoder")) return;
  const JsonNode list = root.member("added_tokens_decoder");
  std::map<int, AddedToken> by_id;
  for (AddedToken& token : added) by_id[token.id] = std::move(token);
  for (const auto& [key, value] : list.object()) {
    const JsonNode node{value, file, concat("added_tokens_decoder.", key)};
    const int id = parse_rank(key);
    if (id < 0) node.refuse("a token id as its key");
    by_id[id] = read_added_token(node, node.member("content").string(), id);
  }
  added.clear();
  std::unordered_set<std::string> texts;
  for (auto& [id, token] : by_id) {
    if (texts.insert(token.text).second) added.push_back(std::move(token));
  }
}

std::shared_ptr<TokenizerData> read_tiktoken(const std::string& content, const fs::path& path,
                                             const std::string& pattern) {
  const RankedTokens tokens = read_ranks(content, path.string());
  const KnownVocabulary* known = find_vocabulary(tokens.lines);
  if (!known && pattern.empty()) {
    std::string list;
    for (const KnownVocabulary& v : kKnownVocabularies) {
      list += concat(list.empty() ? "" : ", ", v.ranks, " (", v.name, ")");
    }
    fail(path.string(), ": found ", tokens.lines, " ranks, expected ", list,
         ", or --pattern: the file does not say its split pattern. `./bpe convert ", path.string(),
         " DIRECTORY --pattern ...` writes a tokenizer.json that does");
  }
  auto data = std::make_shared<TokenizerData>();
  data->pre_tokenizer =
      parse_pre_tokenizer(pattern.empty() ? known->pattern : pattern, path.string());
  if (known) {
    data->added = known->specials();
    if (known->nfc) data->normalizer.steps.push_back({.kind = NormalizerStep::Kind::nfc});
    if (known->begins) data->text_begin.push_back(data->added[0].id);
  }
  RankedMerges(tokens, *data, path.string()).build();
  data->config = config_beside(path);
  add_configured_tokens(data->config, path, data->added);
  return data;
}

// ---------------------------------------------------------------------------------------------
// tekken.json: special tokens have the ids before those of the ranks.

std::shared_ptr<TokenizerData> read_tekken(const JsonNode& root, const fs::path& path) {
  const JsonNode config = root.member("config");
  const int size = config.member("default_vocab_size").id();
  const int specials = config.member("default_num_special_tokens").id();
  auto data = std::make_shared<TokenizerData>();
  data->pre_tokenizer =
      parse_pre_tokenizer(std::string(config.member("pattern").string()), path.string());
  if (root.has("special_tokens")) {
    for (const JsonNode& token : root.member("special_tokens").items()) {
      data->added.push_back(
          {std::string(token.member("token_str").string()), token.member("rank").id()});
    }
  } else {  // older files do not list them
    data->added = SpecialList(0)
                      .add({"<unk>",
                            "<s>",
                            "</s>",
                            "[INST]",
                            "[/INST]",
                            "[AVAILABLE_TOOLS]",
                            "[/AVAILABLE_TOOLS]",
                            "[TOOL_RESULTS]",
                            "[/TOOL_RESULTS]",
                            "[TOOL_CALLS]",
                            "[IMG]",
                            "<pad>",
                            "[IMG_BREAK]",
                            "[IMG_END]",
                            "[PREFIX]",
                            "[MIDDLE]",
                            "[SUFFIX]",
                            "[SYSTEM_PROMPT]",
                            "[/SYSTEM_PROMPT]",
                            "[TOOL_CONTENT]"})
                      .tokens();
  }
  if (data->added.size() > size_t(specials) || specials > size) {
    config.refuse(concat(data->added.size(), " to default_vocab_size special tokens"));
  }
  for (int id = int(data->added.size()); id < specials; id++) {
    data->added.push_back({concat("<SPECIAL_", id, ">"), id});
  }
  for (const AddedToken& token : data->added) {
    if (token.text == "<s>") data->text_begin = {token.id};
  }
  RankedTokens tokens;
  const JsonNode vocab = root.member("vocab");
  for (const JsonElement element : vocab.array()) {
    if (tokens.size() == size_t(size - specials)) break;
    const JsonNode node{element, vocab.file, "vocab"};
    int64_t rank;
    std::string_view base64;
    if (element.at_key("rank").get(rank) || rank != int64_t(tokens.size()) ||
        element.at_key("token_bytes").get(base64) || !decode_base64(base64, tokens.bytes)) {
      node.refuse(concat("rank ", tokens.size(), " and token_bytes in base64"));
    }
    tokens.end_token(int(rank) + specials);
    if (tokens[tokens.size() - 1].empty()) node.refuse("a token that is not empty");
  }
  if (tokens.size() < size_t(size - specials)) {
    vocab.refuse(concat(size - specials, " tokens, as config says"));
  }
  RankedMerges(tokens, *data, path.string()).build();
  return data;
}

// ---------------------------------------------------------------------------------------------
// merges.txt with vocab.json, and vocab.bpe

// Calls f(left, right, line) for each line; f returns what is wrong with it, or nothing.
template <class F>
void for_each_merge(std::string_view text, const std::string& path, F f) {
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const std::string_view line = next_line(text, begin);
    number++;
    if (line.empty() || (number == 1 && line.starts_with("#version"))) continue;
    const size_t space = line.find(' ');
    const char* wrong = "a merge of two tokens";
    if (space != line.npos) wrong = f(line.substr(0, space), line.substr(space + 1));
    if (wrong) fail(path, ":", number, ": found ", line.substr(0, 80), ", expected ", wrong);
  }
}

// GPT-2's own file: bytes have the ids 0 to 255 in the order of their spelling, then come the
// merges, then <|endoftext|>.
std::shared_ptr<TokenizerData> read_vocab_bpe(const std::string& content, const fs::path& path,
                                              const std::string& pattern) {
  auto data = std::make_shared<TokenizerData>();
  data->pre_tokenizer = parse_pre_tokenizer(pattern.empty() ? "gpt2" : pattern, path.string());
  std::vector<std::pair<std::string, int>> bytes;
  for (int b = 0; b < 256; b++) bytes.push_back({spell(std::string(1, char(b))), b});
  std::sort(bytes.begin(), bytes.end());  // UTF-8 sorts as its code points do
  data->ids.assign(256, -1);
  for (int id = 0; id < 256; id++) data->ids[size_t(bytes[size_t(id)].second)] = id;
  std::unordered_map<std::string, int> token_of;
  for (int b = 0; b < 256; b++) token_of[std::string(1, char(b))] = b;
  for_each_merge(content, path.string(), [&](std::string_view l, std::string_view r) {
    std::string left, right;
    if (!unspell(l, left) || !unspell(r, right)) return "a merge of two tokens";
    const auto a = token_of.find(left), b = token_of.find(right);
    if (a == token_of.end() || b == token_of.end()) return "tokens that earlier lines make";
    if (token_of.count(left + right) || !data->merges.can_neighbour(a->second, b->second)) {
      return "a merge that can happen";
    }
    token_of[left + right] = data->merges.add(a->second, b->second);
    data->ids.push_back(int(data->ids.size()));
    return (const char*)nullptr;
  });
  if (data->merges.size() == 256) fail(path.string(), ": found no merges");
  data->added = {{"<|endoftext|>", data->merges.size()}};
  return data;
}

// The special tokens of a directory with vocab.json: in its other files, which may be absent.
void read_specials_beside(const fs::path& path, TokenizerData& data) {
  add_configured_tokens(data.config, path, data.added);
  std::unordered_set<std::string> known;
  for (const AddedToken& token : data.added) known.insert(token.text);
  const auto add = [&](const std::string& text, int id, bool special) {
    if (id < 0 || !known.insert(text).second) return;
    AddedToken token{text, id};
    token.special = special, token.normalized = !special;
    data.added.push_back(std::move(token));
  };
  const fs::path folder = path.parent_path();
  const auto read = [&](const char* name) {
    const fs::path file = folder / name;
    return fs::exists(file) ? read_json(file) : Json::object();
  };
  std::map<std::string, int> added;
  const Json list = read("added_tokens.json");
  for (const auto& [text, id] : list.items()) {
    const int value = json_as<int>(id, text, (folder / "added_tokens.json").string());
    require(value >= 0 && value <= JsonNode::kMaxTokenId, (folder / "added_tokens.json").string(),
            ": found id ", value, ", expected 0 to ", JsonNode::kMaxTokenId);
    added[text] = value;
  }
  const auto find = [&](const std::string& text) {
    const auto it = added.find(text);
    return it != added.end() ? it->second : find_entry(data, text);
  };
  const auto add_named = [&](const Json& token) {
    const Json& text = token.is_object() && token.contains("content") ? token["content"] : token;
    if (text.is_string()) add(text.get<std::string>(), find(text.get<std::string>()), true);
  };
  for (const Json& map : {read("special_tokens_map.json"),
                          data.config.empty() ? Json::object() : read("tokenizer_config.json")}) {
    for (const char* role : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                             "cls_token", "mask_token"}) {
      if (map.is_object() && map.contains(role)) add_named(map[role]);
    }
    if (map.is_object() && map.contains("additional_special_tokens") &&
        map["additional_special_tokens"].is_array()) {
      for (const Json& token : map["additional_special_tokens"]) add_named(token);
    }
  }
  for (const auto& [text, id] : added) add(text, id, false);
  if (data.added.empty()) add("<|endoftext|>", find_entry(data, "<|endoftext|>"), true);
}

std::shared_ptr<TokenizerData> read_merges(const std::string& content, const fs::path& path,
                                           const fs::path& vocab_path, const std::string& pattern) {
  auto data = std::make_shared<TokenizerData>();
  simdjson::dom::parser parser;
  const std::string vocab = read_whole(vocab_path);
  const JsonNode root = parse_file(parser, vocab, vocab_path.string());
  const simdjson::dom::object entries = root.object();
  data->reserve(entries.size(), vocab.size() / 2);
  data->config = config_beside(path);
  const Json config = Json::parse(data->config, nullptr, false);
  const std::string kind = config.is_object() && config.contains("tokenizer_class") &&
                                   config["tokenizer_class"].is_string()
                               ? config["tokenizer_class"].get<std::string>()
                               : "";
  // A split pattern is in none of these files: GPT-2's, except in Qwen's.
  const KnownVocabulary* qwen = find_vocabulary(151643);
  const bool is_qwen = kind.starts_with("Qwen2Tokenizer") || entries.size() == qwen->ranks;
  const char* usual = is_qwen ? qwen->pattern : "gpt2";
  data->pre_tokenizer = parse_pre_tokenizer(pattern.empty() ? usual : pattern, path.string());
  if (is_qwen) data->normalizer.steps.push_back({.kind = NormalizerStep::Kind::nfc});
  data->add_prefix_space = config.is_object() && config.contains("add_prefix_space") &&
                           config["add_prefix_space"] == true;
  VocabularyBuilder builder(*data);
  for (const auto& [key, value] : entries) {
    if (key.ends_with("</w>") && key.size() > 4) {
      fail(vocab_path.string(), ": found ", json_string(key),
           ", expected byte-level BPE without </w>");
    }
    builder.add_entry(key, JsonNode{value, vocab_path.string(), std::string(key)}.id(),
                      vocab_path.string());
  }
  builder.end_entries();
  read_specials_beside(path, *data);
  for_each_merge(content, path.string(), [&](std::string_view left, std::string_view right) {
    return builder.add_merge(left, right) ? nullptr
                                          : "two tokens such that the vocabulary holds both and "
                                            "their concatenation";
  });
  if (builder.end_merges() >= 0) {
    fail(path.string(), ": found a merge before the merges of its parts, expected it after them");
  }
  return data;
}

// ---------------------------------------------------------------------------------------------
// Which file is what

// The file beside `path` with one of these names, or with the same beginning (gpt2_vocab.bpe).
fs::path file_beside(const fs::path& path, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const fs::path file = path.parent_path() / name;
    if (fs::exists(file)) return file;
  }
  return {};
}

bool is_merge_list(std::string_view content) {
  if (content.starts_with("#version")) return true;
  size_t begin = 0;
  const std::string_view line = next_line(content, begin);
  const size_t space = line.find(' ');
  std::string bytes;
  return space != line.npos && space > 0 && unspell(line.substr(0, space), bytes) &&
         unspell(line.substr(space + 1), bytes);
}

// SentencePiece's models are protocol buffers: field 1, its length, then the first piece.
bool is_sentencepiece(std::string_view content) {
  return content.size() > 4 && content[0] == '\n' && content[2] == '\n';
}

std::shared_ptr<TokenizerData> read_json_file(std::string content, const fs::path& path,
                                              const std::string& pattern) {
  const auto refuse_pattern = [&] {
    if (!pattern.empty()) fail(path.string(), ": found --pattern, but the file says its own");
  };
  simdjson::dom::parser parser;
  const JsonNode root = parse_file(parser, content, path.string());
  root.object();
  // In a vocabulary "model", "config" and "vocab" may be tokens, whose values are numbers.
  const auto holds = [&](const char* key) {
    JsonElement element;
    return !root.value.at_key(key).get(element) && !element.is_int64();
  };
  if (holds("model")) {
    refuse_pattern();
    auto data = read_tokenizer_json(std::move(content), root);
    data->config = config_beside(path);
    return data;
  }
  if (holds("config") && holds("vocab")) {
    refuse_pattern();
    return read_tekken(root, path);
  }
  const simdjson::dom::object entries = root.object();
  const bool is_vocab =
      entries.size() > 255 && std::all_of(entries.begin(), entries.end(),
                                          [](const auto& entry) { return entry.value.is_int64(); });
  if (!is_vocab) fail(path.string(), ": model is missing");
  const fs::path merges = file_beside(path, {"merges.txt", "vocab.bpe"});
  if (merges.empty()) {
    fail(path.string(), ": found a vocabulary without merges, expected merges.txt beside it");
  }
  return read_merges(read_whole(merges), merges, path, pattern);
}

std::shared_ptr<TokenizerData> read_file_of_any_kind(const fs::path& path,
                                                     const std::string& pattern) {
  if (GgufFile::is_gguf(path)) {
    if (!pattern.empty()) fail(path.string(), ": found --pattern, but the file says its own");
    return read_gguf_tokenizer(path);
  }
  std::string content = read_whole(path);
  const std::string extension = path.extension().string();
  size_t begin = std::min(content.find_first_not_of(" \t\r\n"), content.size());
  if (extension == ".json" || (begin < content.size() && content[begin] == '{')) {
    return read_json_file(std::move(content), path, pattern);
  }
  if (is_sentencepiece(content)) {
    fail(path.string(), ": found a SentencePiece model, expected byte-level BPE: tokenizers of ",
         "that kind are not supported");
  }
  const std::string_view first_line = next_line(content, begin);
  if (extension == ".tiktoken" || is_rank_line(first_line)) {
    return read_tiktoken(content, path, pattern);
  }
  if (extension == ".bpe" || is_merge_list(content)) {
    const fs::path vocab = file_beside(path, {"vocab.json", "encoder.json"});
    if (!vocab.empty()) return read_merges(content, path, vocab, pattern);
    if (extension == ".bpe") return read_vocab_bpe(content, path, pattern);
    fail(path.string(), ": found merges without a vocabulary, expected vocab.json beside them");
  }
  fail(path.string(),
       ": found a file of another kind, expected a directory, tokenizer.json, .gguf, .tiktoken, "
       "tekken.json, vocab.json with merges.txt, or vocab.bpe");
}

}  // namespace

fs::path Tokenizer::find(const fs::path& path) {
  fs::path file = path;
  if (fs::is_directory(path)) {
    file.clear();
    for (const char* name : {"tokenizer.json", "model/tokenizer.json", "tekken.json", "merges.txt",
                             "vocab.bpe", "tokenizer.model", "tiktoken.model"}) {
      if (file.empty() && fs::exists(path / name)) file = path / name;
    }
    std::vector<fs::path> others;  // .tiktoken
    if (file.empty()) {
      for (const auto& entry : fs::directory_iterator(path)) {
        if (entry.path().extension() == ".tiktoken") others.push_back(entry.path());
      }
      if (others.size() == 1) file = others[0];
    }
    if (others.size() > 1) {
      fail(path.string(), ": found ", others.size(), " .tiktoken files, expected the path of one");
    }
    if (file.empty()) {
      fail(path.string(), ": found no tokenizer.json in the directory, nor tekken.json, ",
           "merges.txt, vocab.bpe, tokenizer.model or a .tiktoken file");
    }
  }
  if (!fs::exists(file)) fail(file.string(), ": not found, expected a tokenizer");
  return file;
}

Tokenizer Tokenizer::load(const fs::path& path, const std::string& pattern) {
  const fs::path file = find(path);
  const std::shared_ptr<TokenizerData> data = read_file_of_any_kind(file, pattern);
  data->complete(file.string());
  return Tokenizer(data);
}

// ---------------------------------------------------------------------------------------------
// Writing

void Tokenizer::save(const fs::path& directory) const {
  fs::create_directories(directory);
  const TokenizerData& d = *data_;
  write_file(directory / "tokenizer_config.json",
             d.config.empty() ? tokenizer_config_json(d) : d.config);
  write_file(directory / "tokenizer.json", d.json.empty() ? tokenizer_json(d) : d.json);
}

namespace tokenizer_files {
namespace {

std::string encode_base64(std::string_view bytes) {
  constexpr const char* kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t bits = 0;
    for (size_t k = 0; k < 3; k++) {
      bits = bits << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0);
    }
    for (size_t k = 0; k < 4; k++) {
      text += i + k > bytes.size() ? '=' : kDigits[bits >> (18 - 6 * k) & 63];
    }
  }
  return text;
}

bool same_merges(const Merges& a, const Merges& b) {
  if (a.size() != b.size() || a.late_pairs().size() != b.late_pairs().size()) return false;
  for (int t = 256; t < a.size(); t++) {
    if (a.bytes(t) != b.bytes(t) || a.parts(t) != b.parts(t)) return false;
  }
  return std::equal(a.late_pairs().begin(), a.late_pairs().end(), b.late_pairs().begin(),
                    [](const Merges::LatePair& x, const Merges::LatePair& y) {
                      return x.left == y.left && x.right == y.right && x.token == y.token;
                    });
}

}  // namespace

// The file holds ids and bytes alone. What reading it would not give back is refused, or stated.
void write_tiktoken(const TokenizerData& data, const fs::path& path) {
  const std::string where = path.string();
  const auto refuse = [&](const std::string& found) {
    fail(where, ": found a tokenizer with ", found, ", which a .tiktoken file cannot hold");
  };
  std::vector<bool> is_added(size_t(data.tokens()));
  for (const AddedToken& token : data.added) is_added[size_t(token.id)] = true;
  for (const int id : data.ids) {
    if (id >= 0) is_added[size_t(id)] = false;
  }
  RankedTokens tokens;
  std::string text;
  for (int id = 0; id < data.tokens(); id++) {
    if (is_added[size_t(id)] || data.token(id).empty()) continue;
    tokens.bytes += data.token(id), tokens.end_token(id);
    text += encode_base64(data.token(id)) + " " + std::to_string(id) + "\n";
  }
  const KnownVocabulary* known = find_vocabulary(tokens.size());
  const bool nfc = data.normalizer.steps.size() == 1 &&
                   data.normalizer.steps[0].kind == NormalizerStep::Kind::nfc;
  if (!data.normalizer.empty() && !(known && known->nfc && nfc)) refuse("a normalizer");
  if (data.add_prefix_space) refuse("add_prefix_space");
  const std::vector<SplitStep>& steps = data.pre_tokenizer.steps();
  const bool one =
      steps.size() == 1 && !steps[0].invert && steps[0].behavior == SplitBehavior::isolated &&
      (steps[0].kind == SplitStep::Kind::pattern || steps[0].kind == SplitStep::Kind::regex);
  if (!one) refuse("a pre_tokenizer of several steps");
  for (size_t b = 0; b < 256; b++) {
    if (data.ids[b] < 0 || data.ids[b] == data.unknown) {
      refuse(concat("no token for byte ", b));
    }
  }
  TokenizerData again;
  RankedMerges(tokens, again, where).build();
  if (again.ignore_merges && !data.ignore_merges) refuse("tokens that no merge makes");
  if (!same_merges(again.merges, data.merges) || again.ids != data.ids) {
    refuse("ids in another order than that of its merges");
  }
  write_file(path, text);
  const bool regex = steps[0].kind == SplitStep::Kind::regex;
  const std::string pattern = regex ? steps[0].text : pattern_name(steps[0].pattern);
  std::printf("%s holds no split pattern and no special tokens. Pattern: %s\n", where.c_str(),
              pattern.c_str());
  if (!known || parse_pre_tokenizer(known->pattern, where).description() !=
                    data.pre_tokenizer.description()) {
    std::printf("The number of tokens is not that of a known vocabulary: read it with --pattern\n");
  }
  constexpr size_t kShown = 20;
  for (size_t i = 0; i < std::min(kShown, data.added.size()); i++) {
    std::printf("special token %d %s\n", data.added[i].id, json_string(data.added[i].text).c_str());
  }
  if (data.added.size() > kShown) std::printf("and %zu more\n", data.added.size() - kShown);
}

}  // namespace tokenizer_files

void convert_tokenizer(const Tokenizer& tokenizer, const fs::path& output) {
  const TokenizerData& data = tokenizer.data();
  const std::string extension = output.extension().string();
  if (extension == ".tiktoken") return write_tiktoken(data, output);
  if (extension == ".json") {
    return write_file(output, data.json.empty() ? tokenizer_json(data) : data.json);
  }
  if (fs::exists(output) && !fs::is_directory(output)) {
    fail(output.string(),
         ": found a file, expected a directory, or a path that ends in .json or .tiktoken");
  }
  tokenizer.save(output);
}

Tokenizer with_chat_tokens(const Tokenizer& tokenizer, const std::string& chat_template, bool add) {
  auto data = std::make_shared<TokenizerData>(tokenizer.data());
  TokenizerData& d = *data;
  for (const char* name : kSpecialTokens) {
    if (!add || d.added_ids.count(name)) continue;
    d.added.push_back({name, d.tokens()});
    d.add_token(d.tokens(), name);
    d.json.clear();  // the file that was read lacks this token
  }
  d.complete("tokenizer");
  if (d.config.empty()) d.config = tokenizer_config_json(d);
  auto config = parse_json<OrderedJson>(d.config, "tokenizer_config.json");
  if (!config.is_object()) fail("tokenizer_config.json: not a JSON object");
  const auto old = config.find("chat_template");
  if (old == config.end() || *old != chat_template) {
    config["chat_template"] = chat_template;
    d.config = config.dump(2) + "\n";
  }
  return Tokenizer(data);
}

}  // namespace cake
