// The tokenizers that people use: each family's published configuration over a small vocabulary,
// against the ids and places of Hugging Face's tokenizers. dev/golden/tokenizer_families.py writes
// the golden file and says where each configuration was read.
#include <string>
#include <vector>

#include "cake/json.h"
#include "cake/tokenizer.h"
#include "test/support.h"

using namespace cake;

namespace {

using Ids = std::vector<int>;

const Json& golden() {
  static const Json file = read_json("test/golden/tokenizer_families.json");
  return file;
}

// The family's tokenizer.json: its configuration with the vocabulary that it shares with others.
std::string tokenizer_json(const Json& family) {
  const Json& words = golden().at("vocabularies").at(family.at("vocabulary").get<size_t>());
  Json vocab = Json::object(), added = Json::array();
  for (const Json& token : words.at("tokens")) vocab[token.get<std::string>()] = vocab.size();
  int next = int(vocab.size());
  for (const Json& entry : family.at("added")) {
    Json token = {{"id", next++}, {"content", entry.at(0)}};
    for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized", "special"}) {
      token[flag] = false;
    }
    for (const Json& flag : entry.at(1)) token[flag.get<std::string>()] = true;
    added.push_back(token);
  }
  const Json model = {{"type", "BPE"},
                      {"ignore_merges", family.at("ignore_merges")},
                      {"vocab", vocab},
                      {"merges", words.at("merges")}};
  return Json{{"added_tokens", added},
              {"normalizer", family.at("normalizer")},
              {"pre_tokenizer", family.at("pre_tokenizer")},
              {"post_processor", family.at("post_processor")},
              {"decoder", {{"type", "ByteLevel"}}},
              {"model", model}}
      .dump();
}

Tokenizer load_family(const Json& family) {
  TempDir dir;
  write_file(dir / "tokenizer.json", tokenizer_json(family));
  return Tokenizer::load(dir / "tokenizer.json");
}

// The families that are read; the others are refused.
std::vector<Json> families() {
  std::vector<Json> all;
  for (const Json& family : golden().at("families")) {
    if (!family.count("refused")) all.push_back(family);
  }
  return all;
}

const Json& family_named(const std::string& name) {
  for (const Json& family : golden().at("families")) {
    if (family.at("name") == name) return family;
  }
  FAIL("no family ", name);
  return golden();
}

// The result that the golden file has for a text; null where the vocabulary lacks a byte of it.
const Json* expected(const Json& family, const char* setting, size_t text) {
  const int result = family.at(setting).at(text);
  return result < 0 ? nullptr : &golden().at("results").at(text).at(size_t(result));
}

Ids ids_of(const std::vector<TokenPlace>& tokens) {
  Ids ids;
  for (const TokenPlace& token : tokens) ids.push_back(token.id);
  return ids;
}

bool is_inside_character(const std::string& text, size_t i) {
  return i > 0 && i < text.size() && (text[i] & 0xC0) == 0x80;
}

// begin, end, begin, end, ... of each token, moved outwards to whole characters: Hugging Face
// counts characters.
std::vector<size_t> character_places(const std::string& text, const std::vector<TokenPlace>& all) {
  std::vector<size_t> places;
  for (const TokenPlace& token : all) {
    size_t begin = token.begin, end = token.end;
    while (is_inside_character(text, begin)) begin--;
    while (is_inside_character(text, end)) end++;
    places.insert(places.end(), {begin, end});
  }
  return places;
}

// Whether `found` is `want`. Where a normalizer joins characters, Hugging Face names the first of
// them alone, and the space in front of a text is its first character; here a token stands for all
// of them, and that space for none.
bool same_places(const Json& family, const std::vector<size_t>& found, const Json& want) {
  const auto places = want.get<std::vector<size_t>>();
  const bool same = family.at("normalizer").is_null() && family.at("name") != "blenderbot";
  if (same || found.size() != places.size()) return found == places;
  for (size_t i = 0; i < found.size(); i += 2) {
    const bool inside = found[i] <= places[i] && places[i + 1] <= found[i + 1];
    if (!inside && found[i] != found[i + 1]) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("every family's configuration gives the ids of Hugging Face's tokenizers") {
  CHECK(families().size() >= 40);
  const Json& texts = golden().at("texts");
  for (const Json& family : families()) {
    const std::string name = family.at("name");
    CAPTURE(name);
    const Tokenizer tokenizer = load_family(family);
    int different = 0;
    for (size_t i = 0; i < texts.size(); i++) {
      const std::string text = texts[i];
      for (const char* setting : {"plain", "special"}) {
        const Json* want = expected(family, setting, i);
        if (!want) continue;
        const Ids found = tokenizer.encode(text, setting == std::string("special"));
        if (found == want->at(0).get<Ids>()) continue;
        if (different++ < 2) {
          MESSAGE(name, ", ", setting, ": ", texts[i].dump(), " gives ", Json(found).dump(),
                  ", expected ", want->at(0).dump());
        }
      }
    }
    CHECK(different == 0);
  }
}

TEST_CASE("every family's tokens stand where Hugging Face's tokenizers say") {
  const Json& texts = golden().at("texts");
  for (const Json& family : families()) {
    const std::string name = family.at("name");
    CAPTURE(name);
    const Tokenizer tokenizer = load_family(family);
    int different = 0, compared = 0;
    for (size_t i = 0; i < texts.size(); i++) {
      const std::string text = texts[i];
      for (const char* setting : {"plain", "special"}) {
        const Json* want = expected(family, setting, i);
        if (!want || want->size() < 2) continue;
        const auto tokens = tokenizer.encode_places(text, setting == std::string("special"));
        const std::vector<size_t> found = character_places(text, tokens);
        compared++;
        if (same_places(family, found, want->at(1))) continue;
        if (different++ < 2) {
          MESSAGE(name, ", ", setting, ": ", texts[i].dump(), " gives ", Json(found).dump(),
                  ", expected ", want->at(1).dump());
        }
      }
    }
    CHECK(compared > 40);
    CHECK(different == 0);
  }
}

TEST_CASE("the ids that a family puts around a text are its post_processor's") {
  for (const Json& family : families()) {
    CAPTURE(family.at("name").get<std::string>());
    const Tokenizer tokenizer = load_family(family);
    Ids want = family.at("around");
    const Ids alone = tokenizer.encode("a b", true);
    want.insert(want.end(), alone.begin(), alone.end());
    CHECK(ids_of(tokenizer.encode_places("a b", true, true)) == want);
    CHECK(ids_of(tokenizer.encode_places("a b", true, false)) == alone);
  }
}

TEST_CASE("every family's ids decode to the text, or to its normal form") {
  const Json& texts = golden().at("texts");
  for (const Json& family : families()) {
    const std::string name = family.at("name");
    CAPTURE(name);
    const Tokenizer tokenizer = load_family(family);
    const bool same =
        family.at("normalizer").is_null() || family["normalizer"].count("normalizers");
    for (size_t i = 0; i < texts.size(); i++) {
      const std::string text = texts[i];
      if (!expected(family, "plain", i)) continue;
      const std::string back = tokenizer.decode(tokenizer.encode(text));
      CAPTURE(texts[i].dump());
      // Normal forms change nothing a second time.
      if (!same) CHECK(tokenizer.decode(tokenizer.encode(back)) == back);
      if (same && name != "blenderbot") CHECK(back == text);
    }
  }
}

TEST_CASE("a text with a byte that the vocabulary lacks is an error that names the byte") {
  const Tokenizer smollm = load_family(family_named("smollm"));
  CHECK(smollm.encode("a\x03").size() == 2);
  CHECK_THROWS_WITH_AS(smollm.encode("a\x04"), doctest::Contains("byte 0x04"), Error);
  const Tokenizer neox = load_family(family_named("gpt-neox"));
  CHECK_THROWS_WITH_AS(neox.encode("a\xff"), doctest::Contains("byte 0xff"), Error);
}

TEST_CASE("a split pattern outside the subset is refused in one line that names what it asks for") {
  int refused = 0;
  for (const Json& family : golden().at("families")) {
    if (!family.count("refused")) continue;
    const std::string reason = family.at("refused");
    CHECK_THROWS_WITH_AS(load_family(family), doctest::Contains(reason.c_str()), Error);
    refused++;
  }
  CHECK(refused == 1);
}
