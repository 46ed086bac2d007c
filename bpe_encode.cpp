// Part of ./bpe: text to ids, fast. The interface is cake/bpe.h.
//
//   text --PieceScanner--> pieces --cache--> ids
//                             \--merges--/   for a piece that the cache does not hold
//
// Most pieces of a text are words that occurred before. A piece of up to 15 bytes and its length
// are one key of 16 bytes; an entry of the cache holds the key and up to three ids. Pieces come in
// batches: their keys are hashed and their places in the cache fetched before the first one is
// looked at, so that the waits for memory overlap.
//
// A piece that is not there is merged: up to 15 bytes together with seven others of its batch, so
// that their waits overlap too; up to 64 bytes in registers; beyond that with a list, and from 1024
// bytes on in linear time by backtracking (Antwerpen and Neubeck 2024, GitHub's rust-gems).
//
// In this file a token is its rank, see cake/bpe.h, until it goes into the cache as an id.
#include "cake/bpe.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <queue>

#include "cake/bpe_pieces.h"
#include "cake/bpe_scanner.h"
#include "cake/bpe_simd.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Merges

struct Merges::Trie {       // over the bytes of tokens
  FlatMap edges;            // (node, byte) -> node
  std::vector<int> tokens;  // (nodes) the token that ends at a node, -1: none

  explicit Trie(const Merges& merges);
  static uint64_t edge(int node, char byte) {
    return uint64_t(uint32_t(node)) << 8 | static_cast<unsigned char>(byte);
  }
  int longest(std::string_view text) const;
};

// What only some texts need, made when it is needed.
struct Merges::OnDemand {
  std::atomic<bool> used = false;
  std::once_flag trie_made, borders_made;
  std::optional<Trie> trie;
  std::optional<TokenBorders> borders;
};

Merges::Merges() : byte_pairs_(1 << 16, kNone), on_demand_(std::make_shared<OnDemand>()) {
  for (int b = 0; b < 256; b++) {
    bytes_ += char(b);
    offsets_.push_back(size_t(b));
  }
  offsets_.push_back(256);
  resize_lines(16);
}

inline uint32_t Merges::pair(uint32_t left, uint32_t right) const {
  const uint64_t key = uint64_t(left) << 21 | right;
  for (size_t i = line_of(key);; i = (i + 1) & (lines_.size() - 1)) {
    const uint64_t* const slot = lines_[i].slot;
    const uint32_t found = Simd::matches<21>(slot, key);
    if (__builtin_expect(uint32_t(found == 0) & uint32_t(slot[7] != kEmpty), 0)) continue;
    // Without a branch on `found`: it would be guessed wrong half of the time.
    const uint64_t token = slot[std::countr_zero(found | 128)] & ((1 << 21) - 1);
    const uint32_t none = found == 0 ? kNone : 0;
    return uint32_t(token) | none;
  }
}

void Merges::reserve(size_t tokens, size_t bytes) {
  bytes_.reserve(bytes), offsets_.reserve(tokens + 1), parts_.reserve(tokens);
  const size_t lines = std::bit_ceil(tokens / 4 + 1);
  if (lines > lines_.size()) resize_lines(lines);
}

int Merges::add(int left, int right) {
  const int token = add_without_parts({});
  parts_.back() = {left, right};
  const size_t begin = bytes_.size(), n = size_t(length(left)), m = size_t(length(right));
  bytes_.resize(begin + n + m);  // before the parts are copied: they may move
  std::memcpy(bytes_.data() + begin, bytes(left).data(), n);
  std::memcpy(bytes_.data() + begin + n, bytes(right).data(), m);
  offsets_.back() = bytes_.size();
  add_pair(left, right, token);
  return token;
}

int Merges::add_without_parts(std::string_view bytes) {
  const int token = size();
  require(token < kMaxTokens, "tokenizer: found more than ", kMaxTokens,
          " tokens that merges make, expected at most as many");
  parts_.push_back({-1, -1});
  bytes_ += bytes;
  offsets_.push_back(bytes_.size());
  if (on_demand_->used) on_demand_ = std::make_shared<OnDemand>();
  return token;
}

void Merges::add_late_pair(int left, int right, int token) {
  add_pair(left, right, token);
  late_pairs_.push_back({left, right, token});
}

int Merges::find_pair(int left, int right) const {
  return int(pair(uint32_t(left), uint32_t(right)));  // kNone is -1
}

void Merges::add_pair(int left, int right, int token) {
  if (pair(uint32_t(left), uint32_t(right)) != kNone) return;
  if (left < 256 && right < 256) byte_pairs_[size_t(left << 8 | right)] = uint32_t(token);
  if (2 * ++pairs_ > 8 * lines_.size()) resize_lines(2 * lines_.size());
  const uint64_t key = uint64_t(uint32_t(left)) << 21 | uint64_t(uint32_t(right));
  insert(key << 21 | uint64_t(token));
  pair_filter_[filter_place(key) / 64] |= uint64_t(1) << filter_place(key) % 64;
}

void Merges::insert(uint64_t slot) {
  for (size_t line = line_of(slot >> 21);; line = (line + 1) & (lines_.size() - 1)) {
    for (uint64_t& place : lines_[line].slot) {
      if (place == kEmpty) return void(place = slot);
    }
  }
}

void Merges::resize_lines(size_t lines) {
  std::vector<PairLine> old(lines);
  for (PairLine& line : old) std::fill(std::begin(line.slot), std::end(line.slot), kEmpty);
  old.swap(lines_);
  shift_ = 64 - std::countr_zero(lines);
  pair_filter_.assign(lines, 0);  // 64 bits for a line, which holds four pairs or fewer
  for (const PairLine& line : old) {
    for (const uint64_t slot : line.slot) {
      if (slot == kEmpty) continue;
      insert(slot);
      pair_filter_[filter_place(slot >> 21) / 64] |= uint64_t(1) << filter_place(slot >> 21) % 64;
    }
  }
}

const Merges::Trie& Merges::trie() const {
  std::call_once(on_demand_->trie_made, [this] {
    on_demand_->used = true;
    on_demand_->trie.emplace(*this);
  });
  return *on_demand_->trie;
}

const TokenBorders& Merges::borders() const {
  std::call_once(on_demand_->borders_made, [this] {
    on_demand_->used = true;
    on_demand_->borders.emplace();
    for (int t = 256; t < size(); t++) on_demand_->borders->add(bytes(t));
  });
  return *on_demand_->borders;
}

// Whether tokens `a` and `b` can be neighbours once all merges are done. Undoes the merges of both,
// the latest first, and looks for a merge that joins the two parts at the border. If that merge
// comes before the one undone last, it would have happened instead: the answer is no. If only bytes
// are left, it is yes. `limit`: a merge across the border with a rank below it would have come
// first. Of two merges with equal ranks the left one comes first.
bool Merges::can_neighbour(int a, int b) const {
  int limit = std::numeric_limits<int>::max();
  for (;;) {
    const size_t place = filter_place(uint64_t(uint32_t(a)) << 21 | uint64_t(uint32_t(b)));
    if (pair_filter_[place / 64] >> place % 64 & 1) {
      const uint32_t across = pair(uint32_t(a), uint32_t(b));
      if (across < uint32_t(limit)) return false;
    }
    if (a < 256 && b < 256) return true;
    if (a > b) {
      limit = a, a = parts(a).second;
    } else {
      limit = b + 1, b = parts(b).first;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The merges of one piece. In what follows a token stands at the place of its first byte, and the
// rank of a place is that of the merge of its token with the next one. The merge to do is the
// smallest rank, the leftmost one of equals.

namespace {

// Up to N places in registers, N at most 64. A rank is kept as rank * 64 + place, so that the least
// of them says both.
template <int N>
void merge_places(const Merges& merges, std::string_view piece, std::vector<int>& tokens) {
  uint32_t initial[N], token[N];
  std::fill(initial, initial + N, Merges::kNone);
  const auto* text = reinterpret_cast<const unsigned char*>(piece.data());
  const uint32_t* const byte_pairs = merges.byte_pairs();
  const size_t n = piece.size();
  const auto packed = [](uint32_t rank, uint32_t place) {
    return rank == Merges::kNone ? rank : rank << 6 | place;
  };
  for (uint32_t i = 0; i < n; i++) token[i] = text[i];
  for (uint32_t i = 0; i + 1 < n; i++) {
    initial[i] = packed(byte_pairs[size_t(text[i]) << 8 | text[i + 1]], i);
  }
  Simd::LeastOf<N> ranks;
  ranks.load(initial);
  uint64_t places = n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
  for (uint32_t best; (best = ranks.least()) != Merges::kNone;) {
    const uint32_t place = best & 63, joined = best >> 6;
    const uint64_t right = places & (~uint64_t(1) << place), beyond = right & (right - 1);
    const uint64_t left = places & ((uint64_t(1) << place) - 1);
    places ^= right ^ beyond;
    token[place] = joined;
    ranks.set(uint32_t(std::countr_zero(right)), Merges::kNone);
    uint32_t rank = Merges::kNone;
    if (beyond) rank = merges.pair(joined, token[std::countr_zero(beyond)]);
    ranks.set(place, packed(rank, place));
    if (left) {
      const uint32_t before = 63 - uint32_t(std::countl_zero(left));
      ranks.set(before, packed(merges.pair(token[before], joined), before));
    }
  }
  for (; places; places &= places - 1) tokens.push_back(int(token[std::countr_zero(places)]));
}

}  // namespace

// The ranks of all places in a list, searched for the least one: n * n / 16 steps with AVX-512.
void Merges::encode_medium(std::string_view piece, Scratch& scratch) const {
  const auto n = uint32_t(piece.size());
  std::vector<uint32_t>&ranks = scratch.ranks, &next = scratch.next;
  std::vector<int>& token = scratch.tokens;  // by place; in the end without the places joined
  ranks.assign(n, kNone), next.resize(n), token.resize(n);
  std::vector<uint32_t> previous(n);
  for (uint32_t i = 0; i < n; i++) {
    token[i] = static_cast<unsigned char>(piece[i]), next[i] = i + 1, previous[i] = i - 1;
  }
  for (uint32_t i = 0; i + 1 < n; i++) ranks[i] = byte_pairs_[size_t(token[i] << 8 | token[i + 1])];
  for (;;) {
    uint32_t least = kNone;
    for (uint32_t i = 0; i < n; i++) least = std::min(least, ranks[i]);
    if (least == kNone) break;
    const auto i = uint32_t(std::find(ranks.begin(), ranks.end(), least) - ranks.begin());
    const uint32_t right = next[i], beyond = next[right];
    ranks[right] = kNone, token[i] = int(least), token[right] = -1, next[i] = beyond;
    ranks[i] = kNone;
    if (beyond < n) {
      previous[beyond] = i;
      ranks[i] = pair(least, uint32_t(token[beyond]));
    }
    if (i > 0) ranks[previous[i]] = pair(uint32_t(token[previous[i]]), least);
  }
  std::erase(token, -1);
}

Merges::Trie::Trie(const Merges& merges) {
  tokens.resize(256);
  edges.reserve(2 * size_t(merges.size()));
  for (int b = 0; b < 256; b++) tokens[size_t(b)] = b;  // the first 256 nodes
  for (int t = 256; t < merges.size(); t++) {
    const std::string_view bytes = merges.bytes(t);
    int node = static_cast<unsigned char>(bytes[0]);
    for (size_t i = 1; i < bytes.size(); i++) {
      int& child = edges[edge(node, bytes[i])];
      if (child < 0) {
        child = int(tokens.size());
        tokens.push_back(-1);
      }
      node = child;
    }
    if (tokens[size_t(node)] < 0) tokens[size_t(node)] = t;
  }
}

// The longest token that `text` begins with.
int Merges::Trie::longest(std::string_view text) const {
  int node = static_cast<unsigned char>(text[0]), best = node;
  for (size_t i = 1; i < text.size(); i++) {
    node = edges.find(edge(node, text[i]));
    if (node < 0) break;
    if (tokens[size_t(node)] >= 0) best = tokens[size_t(node)];
  }
  return best;
}

// In time linear in the length of the piece, by backtracking: append the longest token that can
// follow the last one. If none can, no encoding has a border at this position: mark it, remove the
// last token and try a shorter one in its place.
void Merges::encode_long(std::string_view piece, Scratch& scratch) const {
  const Trie& tree = trie();
  std::vector<int>& tokens = scratch.tokens;
  std::vector<uint64_t>& possible = scratch.possible;
  possible.assign(piece.size() / 64 + 1, ~uint64_t(0));
  int token = tree.longest(piece);
  for (size_t begin = 0; begin < piece.size();) {
    const size_t end = begin + size_t(length(token));
    if ((possible[end / 64] >> (end % 64) & 1) &&
        (tokens.empty() || can_neighbour(tokens.back(), token))) {
      tokens.push_back(token);
      begin = end;
      if (begin < piece.size()) token = tree.longest(piece.substr(begin));
    } else if (length(token) > 1) {
      token = tree.longest(piece.substr(begin, size_t(length(token)) - 1));
    } else {
      possible[begin / 64] &= ~(uint64_t(1) << (begin % 64));
      token = tokens.back();
      tokens.pop_back();
      begin -= size_t(length(token));
    }
  }
}

// The definition itself, for vocabularies with late pairs: always the pair that makes the earliest
// token, and of equal ones the leftmost. A queue of pairs, the tokens as a linked list.
void Merges::encode_in_order(std::string_view piece, Scratch& scratch) const {
  struct Pair {
    int token;  // that it makes
    size_t begin;
    int left, right;
    bool operator<(const Pair& b) const {  // std::priority_queue has the largest in front
      return token != b.token ? token > b.token : begin > b.begin;
    }
  };
  const size_t n = piece.size();
  std::vector<int>& tokens = scratch.tokens;
  tokens.resize(n);
  std::vector<size_t> next(n + 1), previous(n + 1);  // n: the end, before and behind the text
  for (size_t i = 0; i < n; i++) {
    tokens[i] = static_cast<unsigned char>(piece[i]);
    next[i] = i + 1, previous[i] = i == 0 ? n : i - 1;
  }
  std::priority_queue<Pair> queue;
  const auto push = [&](size_t i) {  // the pair that begins at i
    if (i == n || next[i] == n) return;
    const int left = tokens[i], right = tokens[next[i]], token = find_pair(left, right);
    if (token >= 0) queue.push({token, i, left, right});
  };
  for (size_t i = 0; i < n; i++) push(i);
  while (!queue.empty()) {
    const Pair pair = queue.top();
    queue.pop();
    const size_t i = pair.begin;
    if (tokens[i] != pair.left || next[i] == n || tokens[next[i]] != pair.right) continue;
    const size_t gone = next[i];
    tokens[i] = pair.token, tokens[gone] = -1;
    next[i] = next[gone];
    if (next[i] < n) previous[next[i]] = i;
    push(previous[i]), push(i);
  }
  tokens.erase(std::remove(tokens.begin(), tokens.end(), -1), tokens.end());
}

void Merges::encode(std::string_view piece, Scratch& scratch) const {
  scratch.tokens.clear();
  if (piece.size() <= 16) return merge_places<16>(*this, piece, scratch.tokens);
  if (piece.size() <= 32) return merge_places<32>(*this, piece, scratch.tokens);
  if (piece.size() <= 64) return merge_places<64>(*this, piece, scratch.tokens);
  if (piece.size() <= 1024) return encode_medium(piece, scratch);
  late_pairs_.empty() ? encode_long(piece, scratch) : encode_in_order(piece, scratch);
}

// ---------------------------------------------------------------------------------------------
// Up to eight short pieces, merged in step

namespace {

constexpr size_t kLanes = 8;

// Where a token has no neighbour, place 15 is taken instead: it holds kNobody, a token that merges
// with none. Then the steps of all pieces are the same, and hardly have a branch.
struct alignas(64) Lane {
  uint32_t token[16];
  Simd::LeastOf<16> ranks;
  uint32_t places;                       // one bit for each
  uint32_t place, left, beyond, joined;  // of the merge in hand
};
constexpr uint32_t kNobody = Merges::kMaxTokens, kNoRank = Merges::kNone << 6;

void load_lane(const Merges& merges, const Key& key, Lane& lane) {
  unsigned char text[16];
  std::memcpy(text, &key, 16);
  const uint32_t n = text[15];
  lane.places = (1u << n) - 1;
  const uint32_t* const byte_pairs = merges.byte_pairs();
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&key));
  const __m512i none = _mm512_set1_epi32(-1);
  const __m512i a = _mm512_cvtepu8_epi32(bytes);
  const __m512i b = _mm512_cvtepu8_epi32(_mm_srli_si128(bytes, 1));
  const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const auto used = __mmask16(lane.places), pairs = __mmask16(lane.places >> 1);
  const __m512i rank = _mm512_mask_i32gather_epi32(
      none, pairs, _mm512_or_si512(_mm512_slli_epi32(a, 8), b), byte_pairs, 4);
  const __mmask16 some = _mm512_cmpneq_epi32_mask(rank, none);
  lane.ranks.v[0] = _mm512_mask_or_epi32(none, some, _mm512_slli_epi32(rank, 6), place);
  _mm512_store_si512(lane.token, _mm512_mask_mov_epi32(_mm512_set1_epi32(int(kNobody)), used, a));
#else
  uint32_t ranks[16];
  std::fill(ranks, ranks + 16, Merges::kNone);
  for (uint32_t i = 0; i + 1 < n; i++) {
    const uint32_t rank = byte_pairs[size_t(text[i]) << 8 | text[i + 1]];
    ranks[i] = rank == Merges::kNone ? rank : rank << 6 | i;
  }
  lane.ranks.load(ranks);
  for (uint32_t i = 0; i < n; i++) lane.token[i] = text[i];
  lane.token[15] = kNobody;
#endif
}

void merge_lanes(const Merges& merges, const Key* keys, size_t count, Lane* lanes) {
  size_t active[kLanes];
  for (size_t k = 0; k < count; k++) {
    load_lane(merges, keys[k], lanes[k]);
    active[k] = k;
  }
  while (count) {
    size_t left = 0;
    for (size_t k = 0; k < count; k++) {
      Lane& x = lanes[active[k]];
      const uint32_t best = x.ranks.least();
      if (best >= kNoRank) continue;
      active[left++] = active[k];
      x.place = best & 63, x.joined = best >> 6;
      const uint32_t right = x.places & (~1u << x.place), beyond = right & (right - 1);
      const uint32_t before = x.places & ((1u << x.place) - 1);
      x.places ^= right ^ beyond;
      x.ranks.set(uint32_t(std::countr_zero(right)), Merges::kNone);
      x.token[x.place] = x.joined;
      x.beyond = uint32_t(std::countr_zero(beyond | 1 << 15));
      x.left = before ? 31 - uint32_t(std::countl_zero(before)) : 15;
      merges.prefetch_pair(x.joined, x.token[x.beyond]);
      merges.prefetch_pair(x.token[x.left], x.joined);
    }
    count = left;
    for (size_t k = 0; k < count; k++) {
      Lane& x = lanes[active[k]];
      const uint32_t with_next = merges.pair(x.joined, x.token[x.beyond]);
      const uint32_t with_last = merges.pair(x.token[x.left], x.joined);
      x.ranks.set(x.place, with_next << 6 | x.place);
      x.ranks.set(x.left, with_last << 6 | x.left);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The cache

}  // namespace

SystemMemory::SystemMemory(size_t bytes) : bytes_(bytes) {
  constexpr size_t kHuge = 2 << 20;
  mapped_ = bytes < kHuge ? bytes : bytes + kHuge;
  map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map_ == MAP_FAILED) {
    fail("encoder: found no memory for ", bytes, " bytes, expected some: ", errno_text());
  }
  data_ = map_;
  if (bytes < kHuge) return;
  data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(map_) + kHuge - 1) & -kHuge);
#ifdef MADV_HUGEPAGE
  madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

SystemMemory::~SystemMemory() {
  if (map_) munmap(map_, mapped_);
}

void IdBuffer::grow(size_t capacity) {
  capacity = std::max(capacity, size_ + size_ / 2 + 1024);
  SystemMemory more(capacity * sizeof(uint32_t));
  if (size_ > 0) std::memcpy(more.as<uint32_t>(), ids(), size_ * sizeof(uint32_t));
  memory_ = std::move(more);
}

namespace {

// What does not fit an entry of the cache is a record in a ring buffer, where new records overwrite
// the oldest ones. Whoever holds a record's offset also holds the round in which it was written:
// the number of times that writing had started again at the beginning of the ring. The round tells
// whether the record is still there.
class RecordRing {
 public:
  struct Handle {
    uint32_t offset, round;
  };
  explicit RecordRing(size_t max_bytes)
      : max_words_(max_bytes / 4), memory_(std::min<size_t>(max_bytes, 1 << 13)) {}

  // Room for a record; nullptr: it would fill more than half of the ring.
  uint32_t* append(size_t words, Handle& handle) {
    if (2 * words > max_words_) return nullptr;
    while (head_ + words > size() && size() < max_words_ && round_ == 0) grow();
    if (head_ + words > size()) head_ = 0, round_++;
    handle = {uint32_t(head_), round_};
    head_ += words;
    return memory_.as<uint32_t>() + handle.offset;
  }
  const uint32_t* find(Handle handle) const {  // nullptr: overwritten
    const bool is_whole =
        handle.round == round_ || (handle.round + 1 == round_ && handle.offset >= head_);
    return is_whole ? memory_.as<uint32_t>() + handle.offset : nullptr;
  }
  void prefetch(Handle handle) const {
    __builtin_prefetch(memory_.as<uint32_t>() + std::min<size_t>(handle.offset, size() - 1));
  }

 private:
  size_t size() const { return memory_.bytes() / 4; }
  void grow() {
    SystemMemory more(std::min(4 * max_words_, 4 * memory_.bytes()));
    std::memcpy(more.as<char>(), memory_.as<char>(), 4 * head_);
    memory_ = std::move(more);
  }
  size_t max_words_, head_ = 0;
  uint32_t round_ = 0;
  SystemMemory memory_;
};

// Up to three ids stand in the entry itself. More, and the ids of a long piece with its bytes, are
// a record in the ring: the ids, then the bytes.
struct Entry {
  Key key;  // zero: empty
  uint32_t ids[3];
  uint32_t count;  // of ids; kInRing is added where they are in the ring
};
static_assert(sizeof(Entry) == 32);
constexpr uint32_t kInRing = uint32_t(1) << 31;
RecordRing::Handle record_handle(const Entry& entry) { return {entry.ids[0], entry.ids[1]}; }
bool is_empty(const Entry& entry) { return entry.key[1] == 0; }

// Entries in groups of four: 128 bytes, two cache lines. The hash of a piece says its home,
// a place in its first group. A search looks there, then in the rest of the group, then in a second
// group. A piece that is found elsewhere in its first group changes places with the one at home, so
// that the next search for it ends at once. When both groups are full, a new piece replaces one of
// its first group that is not at home. So a search never looks at more than eight entries, however
// full the table is.
class PieceCache {
 public:
  explicit PieceCache(size_t bytes)
      : max_entries_(std::max<size_t>(bytes / 4 * 3 / sizeof(Entry) / 4 * 4, kFewest)),
        table_(sizeof(Entry) * std::min(max_entries_, kFirst)),
        ring(std::max<size_t>(bytes / 16 * 3, 1 << 12)) {
    set_size();
  }

  static uint64_t hash(const Key& key) {
    return (key[0] ^ key[1] * 0x9E3779B97F4A7C15) * 0xD6E8FEB86659FD93;
  }
  uint32_t home(const Key& key) const {
    return uint32_t(static_cast<unsigned __int128>(hash(key)) * entries_ >> 64);
  }
  Entry* entries() const { return table_.as<Entry>(); }

  Entry* find(const Key& key) const {  // nullptr: not there
    Entry* const entry = find_place(key);
    return entry && !is_empty(*entry) ? entry : nullptr;
  }
  bool is_in_first_group(const Entry* entry, uint32_t home) const {
    return (uint32_t(entry - entries()) ^ home) < 4;
  }

  void insert(const Entry& entry) {
    if (2 * (used_ + 1) > entries_ && entries_ < max_entries_) grow();
    place(entry);
  }
  uint32_t growths() const { return growths_; }  // how often all homes have moved

 private:
  static constexpr size_t kFewest = 256, kFirst = 1024, kFactor = 16;

  void set_size() { entries_ = table_.bytes() / sizeof(Entry); }
  uint32_t second_group(const Key& key) const {
    return uint32_t(static_cast<unsigned __int128>(hash(key) << 24) * entries_ >> 64);
  }
  // The place that holds the key, or else the empty one that it may have; nullptr: neither, both
  // groups are full. Places are filled in the order of this search, and none becomes empty again:
  // the search ends at the first empty one, mostly in the cache line of the home.
  Entry* find_place(const Key& key) const {
    const uint32_t first = home(key);
    for (uint32_t k = 0; k < 4; k++) {
      Entry* const entry = entries() + (first ^ k);
      if (Simd::equal(entry->key, key) || is_empty(*entry)) return entry;
    }
    const uint32_t second = second_group(key);
    for (uint32_t k = 0; k < 4; k++) {
      Entry* const entry = entries() + (second ^ k);
      if (Simd::equal(entry->key, key) || is_empty(*entry)) return entry;
    }
    return nullptr;
  }
  void place(const Entry& entry) {
    Entry* chosen = find_place(entry.key);
    if (!chosen) chosen = entries() + (home(entry.key) ^ (1 + turn_++ % 3));
    used_ += is_empty(*chosen);
    *chosen = entry;
  }
  void grow() {
    // The sizes are max_entries_ divided by powers of kFactor. So the last growth is a full step
    // too, and copying the old table costs little beside what the new one gains.
    size_t size = max_entries_;
    while (size / kFactor > entries_) size /= kFactor;
    SystemMemory more(sizeof(Entry) * (size / 4 * 4));
    std::swap(table_, more);
    const size_t old_entries = entries_;
    set_size();
    used_ = 0, growths_++;
    for (size_t i = 0; i < old_entries; i++) {
      if (!is_empty(more.as<Entry>()[i])) place(more.as<Entry>()[i]);
    }
  }

  size_t max_entries_, entries_ = 0, used_ = 0;
  SystemMemory table_;
  uint32_t turn_ = 0, growths_ = 0;

 public:
  RecordRing ring;
};

}  // namespace

// ---------------------------------------------------------------------------------------------
// The encoder

namespace {

constexpr size_t kBatch = 128;

}  // namespace

struct Encoder::State {
  State(const TokenizerData& tokenizer, size_t cache_bytes);

  void preload();
  void encode(std::string_view text, size_t end, IdBuffer& ids);

  // Up to kBatch pieces: their keys, and where the cache has them if it has them at home.
  struct Batch {
    Key keys[kBatch];
    uint32_t homes[kBatch], long_pieces[kBatch];
    size_t size, long_count;
    uint32_t growths;  // of the cache, when `homes` was made
  };
  // Fills a batch and fetches its places in the cache, one batch ahead of encode_batch: by then the
  // places have arrived from memory.
  template <class Pieces>
  void prepare_batch(const Pieces& pieces, size_t n, Batch& next);
  // The pieces of a batch to ids from `out` on; returns the end of the ids. There is room for an id
  // for each byte, and for four more.
  template <class Pieces>
  uint32_t* encode_batch(const Pieces& pieces, Batch& batch, const Batch* next, uint32_t* out);
  void find_homes(Batch& some) const;
  template <class Pieces>
  uint32_t* encode_elsewhere(const Pieces& pieces, Batch& batch, const Batch* next, size_t i,
                             uint32_t* out);
  uint32_t* copy_ids(const Entry& entry, std::string_view piece, uint32_t* out) const;
  template <class Pieces>
  void add_short_pieces(const Pieces& pieces, const Batch& batch, const Batch* next, size_t i);
  uint32_t* encode_piece(std::string_view piece, uint32_t* out);
  uint32_t* whole_piece(std::string_view piece, uint32_t* out) const;
  void remember(const Key& key, std::string_view piece, const uint32_t* ids, size_t count);
  uint32_t id_of(int token) const;

  const TokenizerData& data;
  std::optional<PieceScanner<Simd>> scanner;  // where the pattern has one
  bool has_unmade_tokens = false;             // which no merges make: only whole pieces become them
  PieceCache cache;
  alignas(64) Batch batches[2];
  Merges::Scratch scratch;
  std::vector<std::string_view> pieces;
  IdBuffer own;
  int64_t pieces_seen = 0, misses = 0;
};

Encoder::Encoder(const TokenizerData& data, size_t cache_bytes)
    : state_(new State(data, cache_bytes)) {}
Encoder::Encoder(Encoder&&) noexcept = default;
Encoder::~Encoder() = default;

int64_t Encoder::pieces() const { return state_->pieces_seen; }
int64_t Encoder::misses() const { return state_->misses; }

void Encoder::preload() { state_->preload(); }

void Encoder::encode(std::string_view text, size_t end, IdBuffer& ids) {
  state_->encode(text, end, ids);
}

std::span<const uint32_t> Encoder::encode(std::string_view text, size_t end) {
  state_->own.clear();
  encode(text, end, state_->own);
  return {state_->own.data(), state_->own.size()};
}

void Encoder::encode(std::string_view text, size_t end, std::vector<int>& ids) {
  const std::span<const uint32_t> more = encode(text, end);
  ids.insert(ids.end(), more.begin(), more.end());
}

Encoder::State::State(const TokenizerData& tokenizer, size_t cache_bytes)
    : data(tokenizer), cache(cache_bytes) {
  if (const auto pattern = data.pre_tokenizer.pattern()) scanner.emplace(*pattern);
  has_unmade_tokens = !data.merges.late_pairs().empty();
  if (!data.ignore_merges) return;
  const auto made = std::count_if(data.ids.begin(), data.ids.end(),
                                  [this](int id) { return id >= 0 && id != data.unknown; });
  has_unmade_tokens |= data.whole_pieces.size() > size_t(made);
}

// Each of these tokens is what its own bytes become: a merge made it, or whole pieces are looked
// up.
void Encoder::State::preload() {
  if (!data.ignore_merges && !data.merges.late_pairs().empty()) return;
  for (int token = 0; token < data.merges.size(); token++) {
    const std::string_view bytes = data.merges.bytes(token);
    const int id = data.ids[size_t(token)];
    if (id < 0 || bytes.size() > kLongestShortPiece) continue;
    const auto ids = uint32_t(id);
    remember(ListedPieces{&bytes}.short_key(0), bytes, &ids, 1);
  }
}

void Encoder::State::encode(std::string_view text, size_t end, IdBuffer& ids) {
  if (scanner) {
    const Merges* const merges = has_unmade_tokens ? nullptr : &data.merges;
    const size_t before = ids.size();
    for (size_t begin = 0; begin < end;) {
      const size_t n = scanner->scan(text, begin, end, merges);
      const uint32_t* const starts = scanner->starts();
      const size_t room = starts[n] + 4;
      // Memory for all ids that the rest of the text will have by what its beginning had.
      const double rest = double(ids.size() - before) / double(begin + 1) * double(end - begin);
      if (ids.room() < room) ids.reserve_more(room + size_t(1.05 * rest));
      uint32_t* const out = ids.reserve_more(room);
      uint32_t* last = out;
      const AdjacentPieces all{scanner->chunk(), starts};
      prepare_batch(all, std::min(kBatch, n), batches[0]);
      for (size_t i = 0; i < n; i += kBatch) {
        const size_t next = i + kBatch;
        if (next < n) {
          const size_t count = std::min(kBatch, n - next);
          prepare_batch(all.suffix(next), count, batches[next / kBatch % 2]);
        }
        Batch* const two[] = {&batches[i / kBatch % 2], &batches[next / kBatch % 2]};
        last = encode_batch(all.suffix(i), *two[0], next < n ? two[1] : nullptr, last);
      }
      ids.add_written(size_t(last - out));
      pieces_seen += int64_t(n);
      begin += starts[n];
    }
    return;
  }
  pieces.clear();
  data.pre_tokenizer.split(text, end, pieces);
  for (size_t i = 0; i < pieces.size(); i += kBatch) {
    const size_t n = std::min(kBatch, pieces.size() - i);
    size_t bytes = 0;
    for (size_t k = 0; k < n; k++) bytes += pieces[i + k].size();
    uint32_t* const out = ids.reserve_more(bytes + 4);
    const ListedPieces some{pieces.data() + i};
    prepare_batch(some, n, batches[0]);
    ids.add_written(size_t(encode_batch(some, batches[0], nullptr, out) - out));
  }
  pieces_seen += int64_t(pieces.size());
}

template <class Pieces>
__attribute__((noinline)) void Encoder::State::prepare_batch(const Pieces& pieces, size_t n,
                                                             Batch& next) {
  next.size = n, next.long_count = 0, next.growths = cache.growths();
  const Entry* const table = cache.entries();
  for (size_t i = 0; i < n; i++) {
    const Key key = pieces.short_key(i);
    next.keys[i] = key;
    const uint32_t home = cache.home(key);
    next.homes[i] = home;
    __builtin_prefetch(table + home);
    if (__builtin_expect(pieces.size(i) > kLongestShortPiece, 0)) {
      next.long_pieces[next.long_count++] = uint32_t(i);
    }
  }
  for (size_t k = 0; k < next.long_count; k++) {
    const size_t i = next.long_pieces[k];
    next.keys[i] = make_long_key(pieces[i], pieces.size(i));
    next.homes[i] = cache.home(next.keys[i]);
    __builtin_prefetch(table + next.homes[i]);
  }
}

void Encoder::State::find_homes(Batch& some) const {
  for (size_t i = 0; i < some.size; i++) some.homes[i] = cache.home(some.keys[i]);
  some.growths = cache.growths();
}

template <class Pieces>
__attribute__((noinline)) uint32_t* Encoder::State::encode_batch(const Pieces& pieces, Batch& batch,
                                                                 const Batch* next, uint32_t* out) {
  if (batch.growths != cache.growths()) find_homes(batch);
  for (size_t k = 0; k < batch.long_count; k++) {
    cache.ring.prefetch(record_handle(cache.entries()[batch.homes[batch.long_pieces[k]]]));
  }
  const Entry* table = cache.entries();
  for (size_t i = 0; i < batch.size; i++) {
    const Entry& entry = table[batch.homes[i]];
    const bool is_here = Simd::equal(entry.key, batch.keys[i]);
    if (__builtin_expect(!is_here || entry.count > 3, 0)) {
      out = encode_elsewhere(pieces, batch, next, i, out);
      table = cache.entries();
      continue;
    }
    std::memcpy(out, entry.ids, 16);  // and the count, which the next ids overwrite
    out += entry.count;
  }
  return out;
}

// Piece i is not at home, or has many ids, or is long, or is new.
template <class Pieces>
__attribute__((noinline)) uint32_t* Encoder::State::encode_elsewhere(const Pieces& pieces,
                                                                     Batch& batch,
                                                                     const Batch* next, size_t i,
                                                                     uint32_t* out) {
  const Key& key = batch.keys[i];
  const std::string_view piece = pieces[i];
  const Entry& at_home = cache.entries()[batch.homes[i]];
  if (Simd::equal(at_home.key, key)) {
    if (uint32_t* const end = copy_ids(at_home, piece, out)) return end;
  } else if (Entry* const entry = cache.find(key)) {
    if (uint32_t* const end = copy_ids(*entry, piece, out)) {
      Entry& home = cache.entries()[batch.homes[i]];
      if (cache.is_in_first_group(entry, batch.homes[i])) std::swap(*entry, home);
      return end;
    }
  }
  if (is_long(key)) {
    misses++;
    uint32_t* const end = encode_piece(piece, out);
    remember(key, piece, out, size_t(end - out));
    out = end;
  } else {
    add_short_pieces(pieces, batch, next, i);
    const Entry* const entry = cache.find(key);
    uint32_t* const end = entry ? copy_ids(*entry, piece, out) : nullptr;
    out = end ? end : encode_piece(piece, out);  // a small cache may have lost it already
  }
  if (batch.growths != cache.growths()) find_homes(batch);
  return out;
}

// Returns nullptr when the ring has lost the ids.
uint32_t* Encoder::State::copy_ids(const Entry& entry, std::string_view piece,
                                   uint32_t* out) const {
  if (entry.count <= 3) {
    std::copy(entry.ids, entry.ids + entry.count, out);
    return out + entry.count;
  }
  const uint32_t count = entry.count - kInRing;
  const uint32_t* const ids = cache.ring.find(record_handle(entry));
  if (!ids) return nullptr;
  if (is_long(entry.key) && std::memcmp(ids + count, piece.data(), piece.size()) != 0) {
    return nullptr;  // another piece with the same hash and length
  }
  std::memcpy(out, ids, 4 * count);
  return out + count;
}

// Encodes piece i, and with it further short pieces, of this batch and the next one, that are not
// in the cache.
template <class Pieces>
void Encoder::State::add_short_pieces(const Pieces& pieces, const Batch& batch, const Batch* next,
                                      size_t i) {
  Lane lanes[kLanes];
  Key keys[kLanes] = {};
  size_t count = 0;
  const size_t known = batch.size + (next ? next->size : 0);
  for (; i < known && count < kLanes; i++) {
    const Key& key = i < batch.size ? batch.keys[i] : next->keys[i - batch.size];
    if (is_long(key)) continue;
    if (count > 0 && cache.find(key)) continue;
    bool twice = false;
    for (size_t k = 0; k < count; k++) twice |= Simd::equal(keys[k], key);
    if (twice) continue;
    misses++;
    uint32_t whole;
    if (has_unmade_tokens && whole_piece(pieces[i], &whole)) {
      remember(key, pieces[i], &whole, 1);
      if (count == 0) return;
      continue;
    }
    keys[count++] = key;
  }
  merge_lanes(data.merges, keys, count, lanes);
  for (size_t k = 0; k < count; k++) {
    uint32_t ids[kLongestShortPiece];
    size_t m = 0;
    for (uint32_t places = lanes[k].places; places; places &= places - 1) {
      ids[m++] = id_of(int(lanes[k].token[std::countr_zero(places)]));
    }
    remember(keys[k], {}, ids, m);
  }
}

uint32_t Encoder::State::id_of(int token) const {
  const int id = data.ids[size_t(token)];
  if (__builtin_expect(id < 0, 0)) {
    fail(format("tokenizer: found the byte 0x%02x in a text, which has no token in this vocabulary",
                unsigned(token)));
  }
  return uint32_t(id);
}

// Some vocabularies hold tokens that no merges make. Only a whole piece becomes such a token.
uint32_t* Encoder::State::whole_piece(std::string_view piece, uint32_t* out) const {
  const int whole = data.whole_pieces.find(piece_hash(piece));
  if (whole < 0 || data.token(whole) != piece) return nullptr;
  *out = uint32_t(whole);
  return out + 1;
}

// The ids of one piece, without the cache.
uint32_t* Encoder::State::encode_piece(std::string_view piece, uint32_t* out) {
  if (has_unmade_tokens) {
    if (uint32_t* const end = whole_piece(piece, out)) return end;
  }
  data.merges.encode(piece, scratch);
  for (const int token : scratch.tokens) *out++ = id_of(token);
  return out;
}

void Encoder::State::remember(const Key& key, std::string_view piece, const uint32_t* ids,
                              size_t count) {
  Entry entry{key, {0, 0, 0}, uint32_t(count)};
  if (count <= 3 && !is_long(key)) {
    std::copy(ids, ids + count, entry.ids);
    return cache.insert(entry);
  }
  const size_t bytes = is_long(key) ? piece.size() : 0;
  RecordRing::Handle handle;
  uint32_t* const record = cache.ring.append(count + (bytes + 3) / 4, handle);
  if (!record) return;
  std::memcpy(record, ids, 4 * count);
  if (bytes > 0) std::memcpy(record + count, piece.data(), bytes);
  entry.ids[0] = handle.offset, entry.ids[1] = handle.round;
  entry.count = kInRing + uint32_t(count);
  cache.insert(entry);
}

}  // namespace cake
