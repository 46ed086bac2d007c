// From text to ids and back around the encoder: normalizers, added tokens, places, cuts, threads.
#include <string>
#include <thread>
#include <vector>

#include "cake/bpe.h"
#include "cake/json.h"
#include "test/bpe_support.h"

using namespace cake;

namespace {

const Json& golden() {
  static const Json file = read_json("test/golden/normalize.json");
  return file;
}

// A tokenizer over the 256 bytes.
Tokenizer byte_tokenizer(const Json& normalizer, const Json& added_tokens,
                         const Json& pre_tokenizer = golden()["tokenizers"][0]["pre_tokenizer"]) {
  const Json file = {
      {"version", "1.0"},
      {"added_tokens", added_tokens},
      {"normalizer", normalizer},
      {"pre_tokenizer", pre_tokenizer},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", golden().at("vocab")}, {"merges", Json::array()}}}};
  TempDir dir;
  return Tokenizer::load(path_of(dir, "tokenizer.json", file.dump()));
}

struct Flags {
  bool special = false, lstrip = false, rstrip = false, single_word = false, normalized = false;
};
Json token(const char* text, int id, Flags flags) {
  return {{"id", id},
          {"content", text},
          {"special", flags.special},
          {"lstrip", flags.lstrip},
          {"rstrip", flags.rstrip},
          {"single_word", flags.single_word},
          {"normalized", flags.normalized}};
}
const Json kNfc = {{"type", "NFC"}};

// Each token as its bytes in the original text, in brackets.
std::string shown_places(const Tokenizer& t, std::string_view text, bool special = false,
                         bool around = false) {
  std::string shown;
  for (const TokenPlace& p : t.encode_places(text, special, around)) {
    shown += concat("[", text.substr(p.begin, p.end - p.begin), "]");
  }
  return shown;
}

// The same with special tokens allowed in stretches of the text. A token that was found is in
// braces.
std::string shown_places(const Tokenizer& t, std::string_view text,
                         const std::vector<SpecialStretch>& allowed, bool begins = true) {
  std::string shown;
  for (const TokenPlace& p : t.encode_places(text, allowed, begins)) {
    const bool is_added = p.id >= 256;
    shown +=
        concat(is_added ? "{" : "[", text.substr(p.begin, p.end - p.begin), is_added ? "}" : "]");
  }
  return shown;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Against Hugging Face

TEST_CASE("normalizers give the texts that Hugging Face's give") {
  REQUIRE(golden().at("normalizers").size() == 12);
  for (const Json& g : golden().at("normalizers")) {
    CAPTURE(g.at("normalizer").dump());
    const Tokenizer t = byte_tokenizer(g.at("normalizer"), Json::array());
    const Normalizer& normalizer = t.data().normalizer;
    for (size_t i = 0; i < golden()["texts"].size(); i++) {
      const std::string text = golden()["texts"][i], expected = g["texts"][i];
      CHECK(normalizer.normalize(text) == expected);
      CHECK((!normalizer.keeps(text) || text == expected));
      CHECK(t.decode(t.encode(text)) == expected);
    }
  }
}

TEST_CASE("added tokens are found in text as Hugging Face finds them, special ones where allowed") {
  int cases = 0;
  for (const Json& g : golden().at("tokenizers")) {
    CAPTURE(g.at("added_tokens").dump());
    CAPTURE(g.at("normalizer").dump());
    const Tokenizer t =
        byte_tokenizer(g.at("normalizer"), g.at("added_tokens"), g.at("pre_tokenizer"));
    for (const Json& c : g.at("cases")) {
      const std::string text = c[0];
      CAPTURE(text);
      CHECK(t.encode(text, false) == c[1].get<Ids>());
      CHECK(t.encode(text, true) == c[2].get<Ids>());
      cases++;
    }
  }
  CHECK(cases > 300);
}

// ---------------------------------------------------------------------------------------------
// Normalizers

TEST_CASE("a normalizer keeps ASCII, Latin-1 and Chinese text in NFC as they are") {
  const Normalizer nfc{.steps = {{.kind = NormalizerStep::Kind::nfc}}};
  std::string out;
  for (const std::string text :
       {"plain ASCII text, long enough for a block of 32 bytes", "déjà vu, naïve façade; ÿ",
        "汉字和标点，都不变。", "한국어 그대로"}) {
    CHECK(nfc.keeps(text));
    CHECK(!nfc.normalize(text, true, out));
  }
  CHECK(!nfc.keeps("plain ASCII text, long enough for a block of 32 bytes, and e\u0301"));
}

TEST_CASE("the hash of a tokenizer tells normalizers apart") {
  std::set<uint64_t> hashes;
  for (const Json& g : golden().at("normalizers")) {
    hashes.insert(byte_tokenizer(g.at("normalizer"), Json::array()).hash());
  }
  hashes.insert(byte_tokenizer(nullptr, Json::array()).hash());
  CHECK(hashes.size() == golden().at("normalizers").size() + 1);
}

// ---------------------------------------------------------------------------------------------
// Added tokens

TEST_CASE("a special token is recognised only where all of it is in an allowed stretch") {
  const Tokenizer t =
      byte_tokenizer(kNfc, {token("<a>", 256, {.special = true}),
                            token("x<a", 257, {.special = true}), token("<b>", 258, {})});
  const std::string text = "<a><a>";
  using Stretches = std::vector<SpecialStretch>;
  CHECK(shown_places(t, text, Stretches{}) == "[<][a][>][<][a][>]");
  CHECK(shown_places(t, text, Stretches{{0, 6}}) == "{<a>}{<a>}");
  CHECK(shown_places(t, text, Stretches{{0, 3}}) == "{<a>}[<][a][>]");
  CHECK(shown_places(t, text, Stretches{{3, 6}}) == "[<][a][>]{<a>}");
  CHECK(shown_places(t, text, Stretches{{0, 3}, {3, 6}}) == "{<a>}{<a>}");
  CHECK(shown_places(t, text, Stretches{{0, 2}, {2, 5}}) == "[<][a][>][<][a][>]");
  CHECK(shown_places(t, text, Stretches{{4, 6}}) == "[<][a][>][<][a][>]");
  // A token that begins before the stretch does not hide the one inside it.
  CHECK(shown_places(t, "x<a>", Stretches{{1, 4}}) == "[x]{<a>}");
  CHECK(shown_places(t, "x<a>", Stretches{{0, 4}}) == "{x<a}[>]");
  // Tokens that are not special do not ask.
  CHECK(shown_places(t, "<b><a><b>", Stretches{{3, 4}}) == "{<b>}[<][a][>]{<b>}");
  // Some special tokens and not others.
  const std::vector<int> only = {256};
  CHECK(shown_places(t, "<a> x<a", Stretches{{0, 7, only}}) == "{<a>}[ ][x][<][a]");
}

TEST_CASE("allowed stretches are places of the text before it is normalized") {
  const Json nfkc = {{"type", "NFKC"}};
  const Tokenizer t = byte_tokenizer(
      nfkc, Json::array({token("<ffi>", 256, {.special = true, .normalized = true})}));
  const std::string text =
      "\u2460<\ufb03>\u2460";  // circled digits, and a ligature of three letters
  const size_t begin = text.find('<'), end = text.find('>') + 1;
  using Stretches = std::vector<SpecialStretch>;
  CHECK(shown_places(t, text, Stretches{{begin, end}}) == "[\u2460]{<\ufb03>}[\u2460]");
  CHECK(!contains(shown_places(t, text, Stretches{{begin, end - 1}}), "{"));
  CHECK(!contains(shown_places(t, text, Stretches{{begin + 1, end}}), "{"));
}

TEST_CASE("a token takes white space along that is not in its stretch") {
  const Tokenizer t = byte_tokenizer(
      kNfc, Json::array({token("<a>", 256, {.special = true, .lstrip = true, .rstrip = true})}));
  CHECK(shown_places(t, "x <a> y", std::vector<SpecialStretch>{{2, 5}}) == "[x]{ <a> }[y]");
}

TEST_CASE("text that looks like a special token is text unless allowed, other added tokens match") {
  const Tokenizer t =
      byte_tokenizer(nullptr, {token("<s>", 300, {.special = true}), token("<tool>", 301, {}),
                               token("<tool>s", 302, {.special = true})});
  CHECK(t.encode("<s>", true) == Ids{300});
  CHECK(t.encode("<s>").size() == 3);
  CHECK(t.encode("<tool>", false) == Ids{301});
  CHECK(t.encode("<tool>s", true) == Ids{302});   // the longest
  CHECK(t.encode("<tool>s", false).size() == 7);  // the longest one is found, and stays text
  CHECK(t.is_special(300));
  CHECK(!t.is_special(301));
  CHECK(!t.is_special(65));
  CHECK(!t.is_special(-1));
  CHECK(t.special("<tool>") == 301);
}

TEST_CASE("a thousand added tokens are found anywhere in a long text") {
  Json tokens;
  for (int i = 0; i < 1000; i++) {
    tokens.push_back(token(format("<|token %d|>", i).c_str(), 300 + i, {.special = i % 2 == 0}));
  }
  const Tokenizer t = byte_tokenizer(nullptr, tokens);
  std::string text;
  Ids expected;
  for (int i = 0; i < 1000; i++) {
    const std::string filler(size_t(i % 70), i % 3 ? 'x' : '<');
    for (const int id : t.encode(filler)) expected.push_back(id);
    text += filler + format("<|token %d|>", i);
    expected.push_back(300 + i);
  }
  CHECK(t.encode(text, true) == expected);
}

// ---------------------------------------------------------------------------------------------
// Places

TEST_CASE("the places of tokens follow one another through the text when nothing is normalized") {
  const Tokenizer trained = train_on(random_text(1, 20000), 500, "gpt2");
  for (uint64_t seed = 0; seed < 50; seed++) {
    const std::string text = random_text(seed, 200) + random_bytes(seed, 20) + "<|im_end|>.";
    for (const bool special : {false, true}) {
      const Ids ids = trained.encode(text, special);
      size_t offset = 0, i = 0;
      for (const TokenPlace& p : trained.encode_places(text, special)) {
        REQUIRE(p.id == ids[i++]);
        REQUIRE(p.begin == offset);
        REQUIRE(text.substr(p.begin, p.end - p.begin) == trained.token_bytes(p.id));
        offset = p.end;
      }
      CHECK(i == ids.size());
      CHECK(offset == text.size());
    }
  }
}

TEST_CASE("tokens of a normalized stretch have the place of the whole stretch") {
  const Json tokens = {token("<a>", 300, {.lstrip = true}),
                       token("\u00c5B", 301, {.normalized = true})};
  CHECK(shown_places(byte_tokenizer(kNfc, tokens), "xe\u0301y <a>z\u212bB.") ==
        "[x][e\u0301][e\u0301][y][ <a>][z][\u212bB][.]");
  const Json lower = {{"type", "Sequence"},
                      {"normalizers", {{{"type", "NFD"}}, {{"type", "Lowercase"}}, kNfc}}};
  CHECK(shown_places(byte_tokenizer(lower, Json::array()), "aBC\u00c9.") ==
        "[a][B][C][\u00c9][\u00c9][.]");
  const Json replace = {{"type", "Replace"}, {"pattern", {{"String", "bc"}}}, {"content", "xyz"}};
  CHECK(shown_places(byte_tokenizer(replace, Json::array()), "abcd") == "[a][bc][bc][bc][d]");
  const Json gone = {{"type", "Replace"}, {"pattern", {{"String", "bc"}}}, {"content", ""}};
  CHECK(shown_places(byte_tokenizer(gone, Json::array()), "abcd") == "[a][d]");
  const Json prepend = {{"type", "Prepend"}, {"prepend", "__"}};
  CHECK(shown_places(byte_tokenizer(prepend, tokens), "a<a>b") == "[][][a][<a>][][][b]");
  Json prefix = golden()["tokenizers"][0]["pre_tokenizer"];
  prefix["add_prefix_space"] = true;
  CHECK(shown_places(byte_tokenizer(nullptr, tokens, prefix), "a<a> b") == "[][a][<a>][ ][b]");
}

// ---------------------------------------------------------------------------------------------
// Chunks and threads

TEST_CASE("a text that is cut at any safe place has the ids of the whole") {
  const Json prefix = [] {
    Json p = golden()["tokenizers"][0]["pre_tokenizer"];
    p["add_prefix_space"] = true;
    return p;
  }();
  const Json plain = golden()["tokenizers"][0]["pre_tokenizer"];
  const Json prepend = {{"type", "Prepend"}, {"prepend", "_"}};
  const Json replace = {{"type", "Replace"}, {"pattern", {{"String", "\nt"}}}, {"content", "b"}};
  const Json lower = {{"type", "Lowercase"}};
  const Json tokens = {token("\ns", 300, {}),
                       token("!", 0, {.rstrip = true}),
                       token("\u00a0", 302, {.lstrip = true}),
                       token("the", 303, {.single_word = true}),
                       token("\n\n", 304, {.special = true}),
                       token("\nz", 305, {.normalized = true}),
                       token("\n\u00e9", 306, {.normalized = true}),
                       token("z\n", 307, {.normalized = true})};
  int64_t cuts = 0;
  for (const Json& normalizer : {Json(), kNfc, prepend, replace, lower}) {
    for (size_t subset = 0; subset <= tokens.size(); subset++) {
      for (const bool has_prefix : {false, true}) {
        const Json added = subset == tokens.size() ? tokens : Json::array({tokens[subset]});
        const Tokenizer t = byte_tokenizer(normalizer, added, has_prefix ? prefix : plain);
        TextEncoder encoder(t.data(), 1 << 16);
        for (uint64_t seed = 0; seed < 6; seed++) {
          const std::string text = random_text(seed * 100 + subset, 120);
          for (const bool specials : {false, true}) {
            const Ids whole = t.encode(text, specials);
            for (size_t i = 1; i < text.size(); i++) {
              if (!is_safe_cut(t.data(), text, i)) continue;
              Ids parts;
              encoder.encode(text, i, true, specials, parts);
              encoder.encode(std::string_view(text).substr(i), text.size() - i, false, specials,
                             parts);
              if (parts != whole) {
                CAPTURE(text.substr(0, i));
                CAPTURE(text.substr(i));
                CAPTURE(normalizer.dump());
                CAPTURE(added.dump());
                REQUIRE(parts == whole);
              }
              cuts++;
            }
          }
        }
      }
    }
  }
  CHECK(cuts > 1000);
}

TEST_CASE("threads that encode at once with one tokenizer get the ids that one thread gets") {
  const Tokenizer t = train_on(random_text(1, 20000), 500, "cl100k");
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (uint64_t seed = 0; seed < 200; seed++) {
    texts.push_back(random_text(seed, int(seed * 3)));
    expected.push_back(t.encode(texts.back()));
  }
  std::vector<int> wrong(8);
  std::vector<std::thread> threads;
  for (size_t k = 0; k < wrong.size(); k++) {
    threads.emplace_back([&, k, copy = t] {
      for (size_t i = 0; i < texts.size(); i++) {
        wrong[k] += copy.encode(texts[i]) != expected[i];
        wrong[k] += copy.encode_places(texts[i]).size() != expected[i].size();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(8));
}

TEST_CASE("decoding refuses ids that are not in the vocabulary") {
  const Tokenizer t = byte_tokenizer(nullptr, Json::array());
  CHECK(contains(error_of([&] { t.decode(Ids{t.vocab_size()}); }), "decode: found token"));
  CHECK(contains(error_of([&] { t.decode(Ids{-1}); }), "decode: found token -1"));
}

TEST_CASE("the document separator is the tokenizer's own") {
  CHECK(byte_tokenizer(nullptr, Json::array({token("<|endoftext|>", 300, {.special = true})}))
            .document_separator() == 300);
  const Tokenizer llama =
      byte_tokenizer(nullptr, Json::array({token("<|begin_of_text|>", 300, {.special = true})}));
  CHECK(llama.document_separator() == 300);
  const Tokenizer none = byte_tokenizer(nullptr, Json::array());
  CHECK(none.find_document_separator() == -1);
  CHECK(
      contains(error_of([&] { none.document_separator(); }), "no token that separates documents"));
}
