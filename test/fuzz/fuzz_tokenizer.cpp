// Any bytes as a tokenizer's file: loading ends in a tokenizer or in an Error of one line. What
// loads encodes a text or says which byte has no token, decodes its ids, and is written as a
// tokenizer.json that gives the same ids.
//
// The first byte of the input chooses the file's name and the split pattern. Behind a byte 0xFF
// begins the file that stands beside tokenizer.json: tokenizer_config.json. Beside merges.txt stand
// vocab.json, tokenizer_config.json, added_tokens.json and special_tokens_map.json.
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;

constexpr const char* kText =
    "Hello world, it's 12345 <|endoftext|> done.\n\n  a\tb \xff\xfe caf\xc3\xa9 "
    "\xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80 aaaaaaaaaaaaaaaaaaaaaaaa abcabcabc";

// The ids; none where a byte of the text has no token.
std::vector<int> encode(const Tokenizer& tokenizer, bool special) {
  try {
    return tokenizer.encode(kText, special);
  } catch (const Error& error) {
    fuzz::expect(std::string(error.what()).find("has no token") != std::string::npos,
                 "encoding fails only at a byte without a token");
    return {};
  }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::filesystem::path folder = [] {
    const auto path = std::filesystem::temp_directory_path() / concat("fuzz_tokenizer_", getpid());
    std::filesystem::create_directories(path);
    return path;
  }();
  if (size == 0) return 0;
  static constexpr const char* kNames[] = {"tokenizer.json", "x.tiktoken", "tokenizer.model",
                                           "tekken.json",    "merges.txt", "vocab.bpe"};
  static constexpr const char* kPatterns[] = {"", "gpt2", "o200k", "\\p{L}+|[^\\p{L}]+"};
  static constexpr const char* kBeside[] = {"vocab.json", "tokenizer_config.json",
                                            "added_tokens.json", "special_tokens_map.json"};
  const int kind = data[0] % 6;
  const std::filesystem::path file = folder / kNames[kind];
  std::string_view content(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto write_part = [&](const std::filesystem::path& path) {
    const size_t end = kind == 0 || kind == 4 ? content.find('\xff') : content.npos;
    std::ofstream(path, std::ios::binary) << content.substr(0, end);
    content = end == content.npos ? std::string_view() : content.substr(end + 1);
  };
  write_part(file);
  if (kind == 0 && !content.empty()) write_part(folder / kBeside[1]);
  for (int i = 0; i < 4 && kind == 4 && !content.empty(); i++) write_part(folder / kBeside[i]);
  try {
    const Tokenizer tokenizer = Tokenizer::load(file, kPatterns[data[0] / 6 % 4]);
    for (const bool special : {false, true}) {
      const std::vector<int> ids = encode(tokenizer, special);
      tokenizer.decode(ids);
      auto copy = std::make_shared<TokenizerData>(tokenizer.data());
      copy->json.clear(), copy->config.clear();
      try {
        Tokenizer(copy).save(folder / "written");
        const Tokenizer again = Tokenizer::load(folder / "written");
        fuzz::expect(encode(again, special) == ids,
                     "the tokenizer.json written gives the same ids");
      } catch (const Error&) {  // a name that JSON cannot hold
      }
    }
  } catch (const Error& error) {
    fuzz::expect(std::string(error.what()).find('\n') == std::string::npos, "errors have one line");
  }
  std::filesystem::remove(file);
  for (const char* name : kBeside) std::filesystem::remove(folder / name);
  return 0;
}
