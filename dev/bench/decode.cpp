// build/bench_decode [MODEL]: how fast one row decodes with weights in each type, beside what this
// machine's memory allows.
//
// Every token reads all weights once, so the speed limit is their bytes divided by the bandwidth.
// The types take turns, and each one's figure is the best of its turns: a machine that does other
// work at times slows all of them alike. Without a model: random weights in SmolLM2-135M's shape.
#include <sys/mman.h>

#include <CLI/CLI.hpp>
#include <cstring>
#include <span>

#include "cake/checkpoint.h"

namespace cake {
namespace {

// Bytes a second that all threads read from memory far larger than the caches.
double read_bandwidth(std::span<const uint64_t> memory) {
  uint64_t sink = 0;
  const int64_t blocks = int64_t(memory.size()) / 8192;
  const double start = now();
#pragma omp parallel for schedule(static) reduction(+ : sink)
  for (int64_t block = 0; block < blocks; block++) {
    // Eight streams at a time: one alone does not fill the lines that a core may have under way.
    typedef uint64_t Line __attribute__((vector_size(64)));
    const auto* x = reinterpret_cast<const Line*>(memory.data()) + block * 1024;
    Line sum[8] = {};
    for (int i = 0; i < 128; i++) {
#pragma GCC unroll 8
      for (int stream = 0; stream < 8; stream++) sum[stream] += x[stream * 128 + i];
    }
    for (const Line& s : sum)
      for (int k = 0; k < 8; k++) sink += s[k];
  }
  const double seconds = now() - start;
  if (sink == 1) std::printf(" ");  // the sum is used: the loop stays
  return double(blocks) * 8192 * 8 / seconds;
}

struct Candidate {
  std::string name;
  std::unique_ptr<Gpt> gpt;
  double bytes = 0;    // that a token reads
  double tokens = 0;   // a second, the best
  double prefill = 0;  // tokens a second, the best
};

std::vector<WeightType> all_matrices(const ParamTable& table, WeightType type) {
  std::vector<WeightType> types;
  for (const Tensor& t : table.tensors) {
    const bool matrix = t.kind == Kind::matrix || t.kind == Kind::embedding || t.kind == Kind::head;
    types.push_back(matrix ? type : WeightType::f32);
  }
  return types;
}

double weight_bytes(const Gpt& gpt, const std::vector<WeightType>& types) {
  constexpr double kBytes[] = {4, 2, 2, 34. / 32};
  double bytes = 0;
  const auto& tensors = gpt.table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& t = tensors[i];
    const bool read =
        t.kind == Kind::matrix || t.kind == Kind::head || t.offset == gpt.table().head.weight;
    if (read) bytes += double(t.size()) * kBytes[int(types[i])];
  }
  return bytes;
}

// Tokens a second of one row, from an empty context.
double decode_speed(Gpt& gpt, int tokens) {
  const auto cache = gpt.make_cache(tokens + 8);
  const int sequence = cache->create();
  DecodeResult result;
  std::vector<int> next = {17 % gpt.config().V};
  const DecodeRow first{sequence, next, {}, {}};
  gpt.decode(*cache, {&first, 1}, result);
  const double start = now();
  for (int i = 0; i < tokens; i++) {
    next = {result.ids[0]};
    Sampling greedy;
    greedy.temperature = 0;
    const DecodeRow row{sequence, next, greedy, {}};
    gpt.decode(*cache, {&row, 1}, result);
  }
  return tokens / (now() - start);
}

double prefill_speed(Gpt& gpt, int tokens) {
  const auto cache = gpt.make_cache(tokens + 8);
  std::vector<int> prompt;
  for (int i = 0; i < tokens; i++) prompt.push_back(int(i * 7919LL % gpt.config().V));
  DecodeResult result;
  const DecodeRow row{cache->create(), prompt, {}, {}};
  const double start = now();
  gpt.decode(*cache, {&row, 1}, result);
  return tokens / (now() - start);
}

int main_decode(int argc, char** argv) {
  std::string model;
  std::vector<std::string> names = {"f32", "f16", "bf16", "q8_0"};
  int threads = 0, tokens = 128, prompt = 512, turns = 10;
  CLI::App app("Measures decoding of one row with weights in each type.");
  app.add_option("model", model, "a model's directory or .gguf file; default: SmolLM2's shape");
  app.add_option("--types", names, "f32, f16, bf16, q8_0")->delimiter(',');
  app.add_option("--tokens", tokens, "decoded in a turn");
  app.add_option("--prompt", prompt, "tokens of the prompt whose speed is measured too; 0: none");
  app.add_option("--turns", turns, "of each type");
  app.add_option("--threads", threads);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    fail(e.what(), " (see --help)");
  }
  set_threads(threads);
  Config c;
  if (model.empty()) {
    c.family = Family::llama, c.tied = true, c.norm_eps = 1e-5, c.rope.theta = 100000;
    c.V = 49152, c.T = 8192, c.L = 30, c.C = 576, c.NH = 9, c.NKV = 3, c.HS = 64, c.F = 1536;
  } else {
    c = load_config(model_dir(model));
  }
  std::vector<Candidate> candidates;
  for (const std::string& name : names) {
    const auto found = std::find(std::begin(kWeightTypeNames), std::end(kWeightTypeNames), name);
    if (found == std::end(kWeightTypeNames)) fail("--types: found ", name);
    GptOptions options{.device = Device::cpu, .mode = Mode::inference};
    options.weights = all_matrices(make_table(c), WeightType(found - std::begin(kWeightTypeNames)));
    auto gpt = make_gpt(c, options);
    if (model.empty()) {
      for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
        Tensor t = gpt->table().tensors[i];
        if (!t.init_one) t.init_std = .02;
        gpt->write(int(i), Slot::weight, initial_values(t, 1));
      }
    } else {
      load_weights(model_dir(model), *gpt);
    }
    const double bytes = weight_bytes(*gpt, options.weights);
    candidates.push_back({name, std::move(gpt), bytes});
  }
  constexpr size_t kBytes = size_t(256) << 20;  // on huge pages, as the weights are
  void* pages = std::aligned_alloc(size_t(2) << 20, kBytes);
  require(pages != nullptr, "out of memory: expected ", bytes_text(double(kBytes)));
  madvise(pages, kBytes, MADV_HUGEPAGE);
  std::memset(pages, 1, kBytes);
  const std::span memory(static_cast<const uint64_t*>(pages), kBytes / sizeof(uint64_t));
  double bandwidth = 0;
  for (int turn = 0; turn < turns; turn++) {
    bandwidth = std::max(bandwidth, read_bandwidth(memory));
    for (Candidate& x : candidates) {
      x.tokens = std::max(x.tokens, decode_speed(*x.gpt, tokens));
      if (prompt > 0) x.prefill = std::max(x.prefill, prefill_speed(*x.gpt, prompt));
    }
  }
  std::printf("reads: %.1f GB/s\n", bandwidth / 1e9);
  std::printf("weights   tokens/s     GB/s   share of what memory allows   prompt tokens/s\n");
  for (const Candidate& x : candidates) {
    std::printf("%-8s %9.1f %8.1f %28.0f%% %17.0f\n", x.name.c_str(), x.tokens,
                x.tokens * x.bytes / 1e9, 100 * x.tokens * x.bytes / bandwidth, x.prefill);
  }
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_decode(argc, argv); });
}
