// Measures the tokenizer's encoder: ids of a text in memory, first and again in the same process.
// dev/bench/tokenizer.py runs it beside others.
//
//   bench_tokenizer encode TOKENIZER TEXT [PASSES [CACHE_BYTES]]   a line for each pass: seconds,
//   ids bench_tokenizer scan TOKENIZER TEXT                            the scanner alone
//   bench_tokenizer load TOKENIZER                                 seconds of loading
#include <cstdio>
#include <ctime>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/bpe_scanner.h"

namespace cake {
namespace {

uint64_t checksum(const IdBuffer& ids) {
  return XXH3_64bits(ids.data(), ids.size() * sizeof(uint32_t));
}

// A thread's share of the text.
struct Part {
  Part(const TokenizerData& data, size_t cache_bytes) : encoder(data, cache_bytes) {
    encoder.preload();
  }
  void encode() {
    ids.clear();
    encoder.encode(text, text.size(), ids);
  }
  std::string_view text;
  Encoder encoder;
  IdBuffer ids;
};

// Wall time, and the processor time of this process: on a busy machine the two differ.
struct Stopwatch {
  double wall = now(), cpu = cpu_now();
  static double cpu_now() {
    timespec t{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
};

void print(const char* name, size_t bytes, const Stopwatch& start, const Stopwatch& end,
           const std::string& more) {
  std::printf(
      "{\"pass\": \"%s\", \"bytes\": %zu, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"mb_per_s\": "
      "%.1f, \"cpu_mb_per_s\": %.1f%s}\n",
      name, bytes, end.wall - start.wall, end.cpu - start.cpu,
      double(bytes) / 1e6 / (end.wall - start.wall), double(bytes) / 1e6 / (end.cpu - start.cpu),
      more.c_str());
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  require(argc >= 3, "bench_tokenizer: found ", argc - 1, " arguments, expected encode|scan|load");
  Stopwatch start;
  const Tokenizer tokenizer = Tokenizer::load(argv[2]);
  if (mode == "load") return print("load", 0, start, Stopwatch(), ""), 0;
  const std::string text = read_file(argv[3]);
  if (mode == "scan") {
    PieceScanner<Simd> scanner(tokenizer.data().pre_tokenizer.pattern().value());
    for (int pass = 0; pass < 5; pass++) {
      start = Stopwatch();
      size_t pieces = 0;
      for (size_t begin = 0; begin < text.size();) {
        const size_t n = scanner.scan(text, begin, text.size(), nullptr);
        pieces += n, begin += scanner.starts()[n];
      }
      print("scan", text.size(), start, Stopwatch(), format(", \"pieces\": %zu", pieces));
    }
    return 0;
  }
  const int passes = argc > 4 ? std::stoi(argv[4]) : 3;
  const size_t threads = argc > 5 ? std::stoul(argv[5]) : 1;
  const size_t cache_bytes = argc > 6 ? std::stoull(argv[6]) : kCacheBytes;
  std::vector<Part> parts;
  for (size_t begin = 0, i = 1; i <= threads; i++) {
    size_t end = text.size() * i / threads;
    while (end < text.size() && !is_safe_cut(tokenizer.data(), text, end)) end++;
    parts.emplace_back(tokenizer.data(), cache_bytes);
    parts.back().text = std::string_view(text).substr(begin, end - begin);
    begin = end;
  }
  for (int pass = 0; pass < passes; pass++) {
    int64_t pieces = 0, misses = 0, ids = 0;
    for (const Part& part : parts) pieces -= part.encoder.pieces(), misses -= part.encoder.misses();
    start = Stopwatch();
    parallel_for(parts.size(), int(threads), [&](size_t i, size_t) { parts[i].encode(); });
    const Stopwatch end;
    std::string hashes;
    for (const Part& part : parts) {
      pieces += part.encoder.pieces(), misses += part.encoder.misses();
      ids += int64_t(part.ids.size());
      hashes += format("%016llx", (unsigned long long)checksum(part.ids));
    }
    print(pass ? "warm" : "cold", text.size(), start, end,
          format(", \"ids\": %lld, \"pieces\": %lld, \"misses\": %lld, \"hash\": \"%s\"",
                 (long long)ids, (long long)pieces, (long long)misses, hashes.c_str()));
  }
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::run(argc, argv); });
}
