// The encoder: the fast scanner against the plain one, ids against the definition of byte pair
// encoding, the cache, and the ends of memory.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cake/bpe.h"
#include "cake/bpe_scanner.h"
#include "cake/split.h"
#include "cake/unicode.h"
#include "test/bpe_support.h"

using namespace cake;

namespace {

Ids plain_encode(const Tokenizer& tokenizer, std::string_view text) {
  Ids ids;
  for (const std::string_view piece : tokenizer.pieces(text)) {
    const Ids tokens = plain::encode(piece, merges_of(tokenizer));
    ids.insert(ids.end(), tokens.begin(), tokens.end());
  }
  return ids;
}

// The ends of the pieces of text[begin, end) by the fast scanner.
template <class Isa>
std::vector<size_t> fast_ends(Pattern pattern, std::string_view text, size_t end,
                              const Merges* merges = nullptr) {
  PieceScanner<Isa> scanner(pattern);
  std::vector<size_t> ends;
  for (size_t begin = 0; begin < end;) {
    const size_t n = scanner.scan(text, begin, end, merges);
    for (size_t i = 1; i <= n; i++) ends.push_back(begin + scanner.starts()[i]);
    CHECK(std::memcmp(scanner.chunk(), text.data() + begin, scanner.starts()[n]) == 0);
    begin += scanner.starts()[n];
  }
  return ends;
}

std::vector<size_t> plain_ends(Pattern pattern, std::string_view text, size_t end) {
  std::vector<size_t> ends;
  for (size_t i = 0; i < end; ends.push_back(i)) i = piece_end(pattern, text, i);
  return ends;
}

// One scanner for each kind of vector instructions that this build may use.
template <class Check>
void with_each_isa(const Check& check) {
  check(PlainSimd());
#if defined(__AVX2__)
  check(Avx2Simd());
#endif
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  check(Avx512Simd());
#endif
}

// Runs of one kind, in lengths about the borders of words of bits, and of chunks.
std::string random_runs(uint64_t seed, size_t size) {
  static const std::vector<std::string> units = {
      "a",          "A",       "a",          "B",        "0",      " ",      "\n",
      "\r",         "\t",      "!",          "/",        "'",      "'s",     "'ll",
      "'D",         "'\u017f", "日",         "本",       "\u0301", "\u0903", "ß",
      "É",          "ǅ",       "ʰ",          "\u00a0",   "\u3000", "\u2003", "\u0085",
      "½",          "\u0661",  "\U0001d7ce", "😀",        "\u200d", "\ufe0f", "\U00010428",
      "\U00010400", "\xff",    "\xe6\x97",   "\xf0\x9f", "\xc3",   "\x80",   "\xed\xa0\x80",
      "\u4dff",     "\u4e00",  "\u9fff",     "한"};
  Rng rng{seed};
  std::string text;
  while (text.size() < size) {
    const std::string& unit = units[rng.below(units.size())];
    const uint64_t kind = rng.below(20);
    const size_t count = kind < 14 ? 1 + rng.below(3) : kind < 19 ? rng.below(90) : rng.below(900);
    for (size_t i = 0; i < count; i++) text += unit;
  }
  return text;
}

// A copy of `text` that ends where readable memory ends.
class GuardedText {
 public:
  explicit GuardedText(std::string_view text) {
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    size_ = (text.size() / page + 2) * page;
    void* const map =
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(map != MAP_FAILED);
    map_ = static_cast<char*>(map);
    REQUIRE(mprotect(map_ + size_ - page, page, PROT_NONE) == 0);
    char* const begin = map_ + size_ - page - text.size();
    std::memcpy(begin, text.data(), text.size());
    text_ = {begin, text.size()};
  }
  ~GuardedText() { munmap(map_, size_); }
  GuardedText(const GuardedText&) = delete;
  GuardedText& operator=(const GuardedText&) = delete;
  std::string_view text() const { return text_; }

 private:
  size_t size_;
  char* map_;
  std::string_view text_;
};

Ids encode_with(Encoder& encoder, std::string_view text) {
  const std::span<const uint32_t> ids = encoder.encode(text, text.size());
  return {ids.begin(), ids.end()};
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The scanner

TEST_CASE("the fast scanner equals the plain one for every pattern and instruction set") {
  for (const char* name : kAllPatterns) {
    CAPTURE(name);
    const Pattern pattern = parse_pattern(name);
    for (uint64_t seed = 0; seed < 400; seed++) {
      CAPTURE(seed);
      const size_t size = seed % 8 == 0 ? 20000 : 1 + seed;
      const std::string text = seed % 4 == 0   ? random_text(seed, int(size / 2))
                               : seed % 4 == 1 ? random_bytes(seed, size)
                                               : random_runs(seed, size);
      const std::vector<size_t> expected = plain_ends(pattern, text, text.size());
      with_each_isa([&](auto isa) {
        const std::vector<size_t> ends = fast_ends<decltype(isa)>(pattern, text, text.size());
        REQUIRE(ends == expected);
      });
    }
  }
}

TEST_CASE("every character has the class in the fast scanner that it has in the plain one") {
  std::string text;
  for (uint32_t c = 0; c < 0x110000; c++) {
    if (c >= 0xD800 && c < 0xE000) continue;
    append_utf8(text, c);
    text += c % 3 == 0 ? "" : c % 3 == 1 ? "a" : " ";
  }
  for (const char* name : kAllPatterns) {
    CAPTURE(name);
    const Pattern pattern = parse_pattern(name);
    const std::vector<size_t> expected = plain_ends(pattern, text, text.size());
    with_each_isa([&](auto isa) {
      CHECK((fast_ends<decltype(isa)>(pattern, text, text.size()) == expected));
    });
  }
}

TEST_CASE("the scanner looks behind the end of its part, and never behind the end of the text") {
  const std::string tricky =
      "don't  stop\r\n\r\n  it's日ABC日AB x'll 12345678 \u3000\u3000é\u0301 !!\n//a \n \n\tb  ";
  for (const char* name : kAllPatterns) {
    CAPTURE(name);
    const Pattern pattern = parse_pattern(name);
    for (size_t size = 0; size <= tricky.size(); size++) {  // each end of the text
      const GuardedText guarded(std::string_view(tricky).substr(0, size));
      const std::string_view text = guarded.text();
      const std::vector<size_t> expected = plain_ends(pattern, text, size);
      with_each_isa(
          [&](auto isa) { CHECK(fast_ends<decltype(isa)>(pattern, text, size) == expected); });
    }
    const std::vector<size_t> expected = plain_ends(pattern, tricky, tricky.size());
    for (size_t i = 0; i < expected.size(); i++) {  // each end of a part
      const std::vector<size_t> part(expected.begin(), expected.begin() + int64_t(i) + 1);
      with_each_isa(
          [&](auto isa) { CHECK(fast_ends<decltype(isa)>(pattern, tricky, expected[i]) == part); });
    }
  }
}

TEST_CASE("every kind of vector instruction gives what plain C++ gives") {
  Rng rng{1};
  for (int round = 0; round < 2000; round++) {
    std::string text;
    while (text.size() < 64)
      text += round % 2 ? char(rng.next()) : " \n'/aZ09\xE4\xB8\xE9\x80"[rng.below(13)];
    const uint64_t bits = rng.next() & (round % 3 ? rng.next() : ~uint64_t(0));
    uint32_t expected_places[160], places[160], numbers[64];
    const auto count = PlainSimd::write_positions(bits, 1000, expected_places) - expected_places;
    alignas(64) uint64_t line[8];
    for (uint64_t& slot : line) slot = rng.below(4) << 21 | rng.below(1 << 21);
    for (uint32_t& x : numbers) x = uint32_t(rng.next());
    PlainSimd::LeastOf<64> expected_least;
    expected_least.load(numbers);
    with_each_isa([&](auto isa) {
      using Isa = decltype(isa);
      const auto same = [](const auto& a, const auto& b) {
        return std::memcmp(&a, &b, sizeof a) == 0;
      };
      CHECK(same(Isa::ascii_bits(text.data()), PlainSimd::ascii_bits(text.data())));
      CHECK(same(Isa::case_bits(text.data()), PlainSimd::case_bits(text.data())));
      CHECK(same(Isa::high_bits(text.data()), PlainSimd::high_bits(text.data())));
      REQUIRE(Isa::write_positions(bits, 1000, places) - places == count);
      CHECK(std::equal(places, places + count, expected_places));
      CHECK(Isa::template matches<21>(line, 2) == PlainSimd::matches<21>(line, 2));
      typename Isa::template LeastOf<64> least;
      least.load(numbers);
      CHECK(least.least() == expected_least.least());
      least.set(uint32_t(round) % 64, 5);
      CHECK(least.least() <= 5);
    });
  }
}

// ---------------------------------------------------------------------------------------------
// Merges and the cache

TEST_CASE("no token crosses a border at which the scanner cuts") {
  Merges merges;
  const std::vector<std::string> tokens = {"日本", "本\xE8", "\xAC語", "語は", "x日"};
  for (const std::string& token : tokens) merges.add_without_parts(token);
  const std::string text = "日本語は日日";
  const bool expected[] = {false, false, false, true, true};  // 本語: 本 and the E8 of 語
  for (size_t i = 0; i < 5; i++)
    CHECK(merges.borders().can_cut(text.data() + 3 * (i + 1)) == expected[i]);
  const std::vector<size_t> ends = fast_ends<Simd>(Pattern::gpt2, text, text.size(), &merges);
  CHECK(ends == std::vector<size_t>{12, 15, 18});
}

TEST_CASE("pieces of every length have the ids of the definition, by every way of merging") {
  const Tokenizer t = train_on(two_letters(15, 20000) + std::string(3000, 'c'), 500, "gpt2");
  Encoder encoder(t.data(), 1 << 20);
  Rng rng{16};
  for (int n = 1; n <= 1300; n += n < 140 ? 1 : 37) {
    std::string piece;
    for (int i = 0; i < n; i++) piece += rng.below(50) ? (rng.below(2) ? 'a' : 'b') : 'c';
    CAPTURE(n);
    const Ids expected = plain_encode(t, piece);
    CHECK(encode_with(encoder, piece) == expected);
    CHECK(encode_with(encoder, piece) == expected);  // from the cache
  }
}

TEST_CASE("a cache of any size gives the same ids: it grows, replaces and reuses its memory") {
  const std::string text =
      random_text(20, 60000) + random_bytes(21, 60000) + two_letters(22, 60000);
  for (const char* pattern : kAllPatterns) {
    const Tokenizer t = train_on(text.substr(0, 60000), 700, pattern);
    Encoder large(t.data(), kCacheBytes);
    const Ids expected = encode_with(large, text);
    CHECK((t.decode(expected) == text));
    CHECK((encode_with(large, text) == expected));
    CHECK(large.misses() < large.pieces() / 2);
    for (const size_t bytes : {0, 1 << 12, 1 << 14, 1 << 17, 1 << 20}) {
      Encoder small(t.data(), bytes);
      CHECK((encode_with(small, text) == expected));
      CHECK((encode_with(small, text) == expected));
      std::vector<int> appended = {7};
      small.encode(text, text.size(), appended);
      CHECK(appended.size() == expected.size() + 1);
      CHECK(std::equal(expected.begin(), expected.end(), appended.begin() + 1));
    }
  }
}

TEST_CASE("a cache that begins with the vocabulary's tokens gives the same ids") {
  const std::string text = random_text(9, 20000) + two_letters(9, 20000);
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    const Tokenizer tokenizer = train_on(text, 1500, pattern);
    Ids expected;
    Encoder(tokenizer.data(), 1 << 20).encode(text, text.size(), expected);
    CHECK((expected == plain_encode(tokenizer, text)));
    for (const size_t cache_bytes : {size_t(0), size_t(1) << 16, size_t(1) << 22}) {
      CAPTURE(cache_bytes);
      Encoder encoder(tokenizer.data(), cache_bytes);
      encoder.preload();
      Ids ids;
      encoder.encode(text, text.size(), ids);
      CHECK((ids == expected));
    }
    // Its short tokens are there, but for the few that others replaced while the table was small.
    Encoder encoder(tokenizer.data(), 1 << 22);
    encoder.preload();
    for (int id = 256; !tokenizer.is_special(id); id++) {
      const std::string_view token = tokenizer.token_bytes(id);
      if (token.size() > 15 || tokenizer.pieces(token).size() > 1) continue;
      Ids ids;
      encoder.encode(token, token.size(), ids);
      REQUIRE(ids == Ids{id});
    }
    CHECK(encoder.pieces() > 500);
    CHECK(100 * encoder.misses() < encoder.pieces());
  }
}

TEST_CASE("merges whose parts come later are not put into the cache beforehand") {
  // "ab" has a rank before "a" + "b" can make it: bytes, then a token that only late pairs make.
  auto data = std::make_shared<TokenizerData>();
  data->merges.add_without_parts("abc");
  const int ab = data->merges.add('a', 'b');
  data->merges.add_late_pair(ab, 'c', 256);
  data->merges.add('b', 'c');
  for (int t = 0; t < data->merges.size(); t++) data->ids.push_back(t);
  data->complete("test");
  for (const bool preloads : {false, true}) {
    CAPTURE(preloads);
    Encoder encoder(*data, 1 << 20);
    if (preloads) encoder.preload();
    Ids ids;
    encoder.encode("abc", 3, ids);
    CHECK(ids == Ids{256});
    CHECK(encoder.misses() == 1);
  }
}

TEST_CASE("long pieces stay in the cache, and are told apart") {
  const Tokenizer t = train_on("abc", 273, "gpt2");
  Encoder encoder(t.data(), 1 << 20);
  for (int round = 0; round < 2; round++) {
    for (int i = 0; i < 500; i++) {
      const std::string piece = std::string(size_t(16 + i % 40), 'a') + format("%c", 'a' + i % 3);
      CHECK(t.decode(encode_with(encoder, piece)) == piece);
    }
  }
  CHECK(encoder.misses() == 120);
  CHECK(encoder.pieces() == 1000);
}

TEST_CASE("threads with encoders of their own agree") {
  const std::string text = random_text(30, 30000) + random_runs(31, 30000);
  const Tokenizer t = train_on(text, 700, "o200k");
  const Ids expected = t.encode(text);
  std::vector<Ids> found(4);
  std::vector<std::thread> threads;
  for (Ids& ids : found) {
    threads.emplace_back([&] {
      Encoder encoder(t.data(), 1 << 20);
      ids = encode_with(encoder, text);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Ids& ids : found) CHECK((ids == expected));
}

TEST_CASE("more tokens than the encoder has room for are refused") {
  Merges merges;
  CHECK(merges.add('a', 'b') == 256);
  CHECK(merges.add('a', 'b') == 257);  // never happens: the first one does
  Merges::Scratch scratch;
  merges.encode("xab", scratch);
  CHECK(scratch.tokens == std::vector<int>{'x', 256});
  while (merges.size() < Merges::kMaxTokens) merges.add_without_parts("");
  CHECK(contains(error_of([&] { merges.add('c', 'd'); }), "found more than 2097151 tokens"));
}

TEST_CASE("the encoder equals the definition of byte pair encoding") {
  for (const char* pattern : kAllPatterns) {
    CAPTURE(pattern);
    const Tokenizer t = train_on(random_text(3, 20000), 700, pattern);
    for (uint64_t seed = 0; seed < 300; seed++) {
      const std::string text = random_text(100 + seed, int(1 + seed % 60));
      CHECK(t.encode(text) == plain_encode(t, text));
    }
    CHECK(t.encode(random_bytes(4, 3000)) == plain_encode(t, random_bytes(4, 3000)));
  }
}

TEST_CASE("the encoder equals the definition where merges overlap most") {
  const Tokenizer t = train_on(two_letters(5, 6000), 400, "gpt2");
  for (uint64_t seed = 0; seed < 200; seed++) {
    std::string piece;
    Rng draw{1000 + seed};
    for (int i = 0; i < 80; i++) piece += draw.below(2 + seed % 3) ? 'a' : 'b';
    CHECK(t.encode(piece) == plain_encode(t, piece));
  }
}

TEST_CASE("any bytes and every token round-trip") {
  for (const char* pattern : kAllPatterns) {
    const Tokenizer t = train_on(random_text(6, 20000), 600, pattern);
    CHECK(t.decode(t.encode(random_bytes(7, 100000))) == random_bytes(7, 100000));
    CHECK(t.decode(t.encode(random_text(8, 50000))) == random_text(8, 50000));
    CHECK(t.encode("").empty());
    for (int id = 0; id < t.vocab_size(); id++) {
      const std::string bytes(t.token_bytes(id));
      CHECK(!bytes.empty());
      CHECK(t.encode(bytes, true) == Ids{id});
    }
  }
}

TEST_CASE("a million of one character is encoded in linear time") {
  // Quadratic work on a million bytes would take minutes: that the test ends is the test.
  const Tokenizer t = train_on(random_text(9, 20000) + std::string(5000, 'a'), 600, "o200k");
  for (const std::string unit : {"a", "A", " ", "\n", "^", "'", "1", "日", "\u0301", "\xff", "/"}) {
    std::string text;
    while (text.size() < 1000000) text += unit;
    const Ids ids = t.encode(text);
    CHECK(t.decode(ids) == text);
    CHECK(ids.size() <= 1000002);
  }
  const std::string upper = "日" + std::string(1000000, 'A');  // a word pattern that must back off
  CHECK(t.decode(t.encode(upper)) == upper);
}
