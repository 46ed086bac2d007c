// Any bytes through every split pattern: the fast scanner finds the plain one's pieces, and the ids
// stand for the same bytes.
#include "cake/bpe.h"
#include "cake/bpe_scanner.h"
#include "test/fuzz/fuzz.h"

namespace {

using namespace cake;

// Merges of the most common pairs of bytes, so that pieces have several tokens.
TokenizerData small_vocabulary(Pattern pattern) {
  TokenizerData data;
  data.pre_tokenizer = PreTokenizer(pattern);
  int token = data.merges.add(' ', 't');
  token = data.merges.add(token, 'h');
  data.merges.add(token, 'e');
  for (const auto& [a, b] : {std::pair<int, int>('i', 'n'),
                             {'a', 'a'},
                             {' ', ' '},
                             {'\n', '\n'},
                             {0xE4, 0xB8},
                             {0xBA, 0xE4},
                             {0x00, 0x00},
                             {'0', '0'},
                             {0xCC, 0x81}}) {
    data.merges.add(a, b);
  }
  const int letters = data.merges.add(data.merges.size() - 8, data.merges.size() - 8);
  data.merges.add(letters, letters);
  for (int t = 0; t < data.merges.size(); t++) data.ids.push_back(t);
  data.complete("fuzz");
  return data;
}

void check(Pattern pattern, std::string_view text) {
  PieceScanner<Simd> scanner(pattern);
  for (size_t begin = 0; begin < text.size();) {
    const size_t n = scanner.scan(text, begin, text.size(), nullptr);
    for (size_t i = 0; i < n; i++) {
      const size_t end = piece_end(pattern, text, begin + scanner.starts()[i]);
      if (end != begin + scanner.starts()[i + 1]) __builtin_trap();
    }
    begin += scanner.starts()[n];
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TokenizerData vocabularies[] = {
      small_vocabulary(Pattern::gpt2), small_vocabulary(Pattern::cl100k),
      small_vocabulary(Pattern::qwen2), small_vocabulary(Pattern::o200k)};
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const TokenizerData& vocabulary : vocabularies) {
    check(*vocabulary.pre_tokenizer.pattern(), text);
    Encoder encoder(vocabulary, 1 << 14);
    for (int pass = 0; pass < 2; pass++) {
      std::string decoded;
      for (const uint32_t id : encoder.encode(text, text.size())) {
        decoded += vocabulary.merges.bytes(int(id));
      }
      if (decoded != text) __builtin_trap();
    }
  }
  return 0;
}
