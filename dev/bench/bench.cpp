// make bench: what this machine can do, what cake does on it, and a peer beside it in the same run.
//
//     build/bench [--peer PYTHON] [--only TEXT] [--seconds S]
//     build/bench --tasks 8,32,64     how the engine's loops divide among so many threads
//
// Every figure is the best of several repetitions; speeds are shares of the peak and of the read
// bandwidth that the same run measured, and ratios to PyTorch (dev/bench/peer_torch.py, run by the
// Python that --peer names, right after cake's own figure). A table on the screen,
// build/bench.json with one named figure a line.
//
// The engine's source is part of this file: its inner functions are what is measured.
#define main cake_train_gpt_main
#include "train_gpt.cpp"
#undef main
//
#include <CLI/CLI.hpp>
#include <functional>
#include <map>

#include "cake/json.h"
#include "dev/bench/tasks.h"

namespace cake {
namespace {

struct Bench {
  std::string peer, only;
  double seconds = 5;  // of each figure
  OrderedJson figures;
  double peak = 0, bandwidth = 0;

  void figure(const std::string& name, double value) { figures[name] = value; }
  bool wanted(const std::string& name) const { return name.find(only) != std::string::npos; }

  // Seconds of one call, the best of those that fit, after one to warm up.
  double best_time(const std::function<void()>& work, double limit) const {
    work();
    double best = 1e30;
    for (const double end = now() + limit; now() < end || best == 1e30;) {
      const double start = now();
      work();
      best = std::min(best, now() - start);
    }
    return best;
  }

  // PyTorch's figures whose names contain `name`.
  std::map<std::string, double> peer_figures(const std::string& name) const {
    std::map<std::string, double> result;
    if (peer.empty()) return result;
    const std::string command =
        concat("'", peer, "' dev/bench/peer_torch.py --only ", name, " --seconds ", seconds,
               " --threads ", omp_get_max_threads(), " 2>/dev/null");
    std::FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) fail(peer, ": cannot run: ", errno_text());
    char line[4096];
    while (std::fgets(line, sizeof line, pipe)) {
      const Json j = Json::parse(line, nullptr, false);
      if (j.is_object()) result[j.value("name", "")] = j.value("value", 0.);
    }
    if (pclose(pipe) != 0) fail(command, ": failed: is PyTorch there?");
    return result;
  }

  void machine();
  void gemms();
  void adamw_update();
  void step(const std::string& name, const Config& c, int B, int T, bool muon_owns);
  void decoding();
};

// Bytes a second that all threads read from memory far larger than the caches.
double read_bandwidth() {
  const int64_t size = int64_t(1) << 26;  // 256 MiB: what huge pages can still be had for
  Arena memory(size);
  parallel_for(size / 4096, [&](int64_t i) { std::fill_n(memory.data() + i * 4096, 4096, 1.f); });
  double best = 0;
  for (int repetition = 0; repetition < 20; repetition++) {
    const double start = now();
    float sink = 0;
#pragma omp parallel for schedule(static) reduction(+ : sink)
    for (int64_t block = 0; block < size / 65536; block++) {
      // four streams at a time: one alone does not fill the lines a core may have under way
      const float* x = memory.data() + block * 65536;
      vec sum[8] = {};
      for (int i = 0; i < 16384; i += 2 * kLanes)
        for (int j = 0; j < 8; j++) sum[j] += load(x + j / 2 * 16384 + i + j % 2 * kLanes);
      for (const vec& s : sum) sink += sum_lanes(s);
    }
    if (sink == -1) std::printf(" ");
    best = std::max(best, double(size) * 4 / (now() - start));
  }
  return best;
}

// The vectors that this build computes with.
std::string vectors() {
  return concat(kLanes == 16  ? "AVX-512"
                : kLanes == 8 ? "AVX2"
                              : "128 bits",
                ", ", kLanes, " lanes");
}

void Bench::machine() {
  peak = measure_cpu_peak(), bandwidth = read_bandwidth();
  std::printf("machine: %d cores, %s, %.0f GFLOP/s of multiply-adds, reads %.1f GB/s\n\n",
              omp_get_max_threads(), vectors().c_str(), peak / 1e9, bandwidth / 1e9);
  figure("machine.gflops", peak / 1e9);
  figure("machine.read_gbs", bandwidth / 1e9);
}

void Bench::gemms() {
  if (!wanted("gemm")) return;
  std::printf("GEMM, GPT-2 124M's shapes            GFLOP/s  share of peak  PyTorch (MKL)\n");
  const std::map<std::string, double> theirs = peer_figures("gemm");
  const struct {
    int out, in;
  } linears[] = {{2304, 768}, {768, 768}, {3072, 768}, {768, 3072}, {50257, 768}};
  for (const int N : {256, 1024}) {
    for (const auto& [out, in] : linears) {
      const int ld = (out + 127) / 128 * 128;  // as the engine's logits
      const Arena x(int64_t(N) * in), w(int64_t(out) * in), y(int64_t(N) * ld);
      for (const Arena* a : {&x, &w, &y})
        for (int64_t i = 0; i < a->size(); i++) a->data()[i] = float(i % 13) - 6;
      const std::pair<const char*, Product> kinds[] = {
          {"forward",
           {N, out, in, {x.data(), in, Inner::k}, {w.data(), in, Inner::k}, y.data(), ld}},
          {"dx",
           {N, in, out, {y.data(), ld, Inner::k}, {w.data(), in, Inner::other}, x.data(), in}},
          {"dw",
           {out, in, N, {y.data(), ld, Inner::other}, {x.data(), in, Inner::other}, w.data(), in}}};
      for (const auto& kind : kinds) {
        const Product& product = kind.second;
        const double t = best_time([&] { gemm(product); }, seconds / 8);
        const double rate = 2. * N * out * in / t;
        const std::string name = concat("gemm.", kind.first, ".", N, "x", out, "x", in);
        figure(name + ".gflops", rate / 1e9), figure(name + ".peak_share", rate / peak);
        std::printf("%-34s %9.0f %13.0f%%", name.c_str() + 5, rate / 1e9, 100 * rate / peak);
        if (theirs.count(name)) {
          figure(name + ".ratio_to_torch", rate / 1e9 / theirs.at(name));
          std::printf(" %9.0f, x%.2f", theirs.at(name), rate / 1e9 / theirs.at(name));
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
  }
  std::printf("\n");
}

// AdamW reads weight, gradient and two moments and writes three of them: 28 bytes a parameter.
void Bench::adamw_update() {
  if (!wanted("adamw")) return;
  const int64_t size = 40'000'000;
  Arena w(size), g(size), m(size), v(size);
  for (const Arena* a : {&w, &g, &m, &v})
    parallel_for(size / 4096, [&](int64_t i) { std::fill_n(a->data() + i * 4096, 4096, .5f); });
  OptimizerStep o;
  o.lr.fill(1e-3f);
  const double t = best_time(
      [&] {
        parallel_for(size / 65536, [&](int64_t i) {
          const int64_t at = i * 65536;
          adamw(65536, w.data() + at, g.data() + at, m.data() + at, v.data() + at, 1, 1e-3f, .1f,
                o);
        });
      },
      seconds / 4);
  const double rate = 28. * double(size) / t;
  figure("adamw.gbs", rate / 1e9), figure("adamw.bandwidth_share", rate / bandwidth);
  std::printf(
      "AdamW                     %.1f GB/s read and written, %.0f%% of the read bandwidth\n\n",
      rate / 1e9, 100 * rate / bandwidth);
}

std::unique_ptr<Gpt> random_gpt(const Config& c, const GptOptions& options) {
  auto gpt = make_gpt(c, options);
  const auto& tensors = gpt->table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    Tensor t = tensors[i];
    if (!t.init_one) t.init_std = .02;  // zero projections would be no honest work
    gpt->write(int(i), Slot::weight, initial_values(t, 1));
  }
  return gpt;
}

void Bench::step(const std::string& name, const Config& c, int B, int T, bool muon_owns) {
  if (!wanted("step." + name)) return;
  double rate, share, update_share;
  {
    const auto gpt = random_gpt(c, {.muon = muon_owns, .batch_tokens = B * T});
    std::vector<int> tokens, targets, starts;
    Rng rng{1};
    for (int i = 0; i < B * T; i++) {
      if (i % T == 0) starts.push_back(i);
      tokens.push_back(int(rng.below(uint64_t(c.V)))),
          targets.push_back(int(rng.below(uint64_t(c.V))));
    }
    starts.push_back(B * T);
    const std::vector<float> dlogp(tokens.size(), -1 / float(B * T));
    OptimizerStep o;
    o.lr.fill(1e-4f), o.muon_lr = 1e-3f, o.decay = .1f, o.max_norm = 1;
    double update = 1e30;
    const double t = best_time(
        [&] {
          gpt->forward_backward({tokens, targets, starts}, dlogp);
          const double start = now();
          gpt->update(o);
          update = std::min(update, now() - start);
        },
        seconds);
    rate = B * T / t, share = training_operations(*gpt, starts) / t / peak,
    update_share = update / t;
  }
  figure("step." + name + ".tokens_per_second", rate);
  figure("step." + name + ".peak_share", share);
  figure("step." + name + ".update_share", update_share);
  std::printf("%-22s %9.0f %12.0f%% %12.0f%%", name.c_str(), rate, 100 * share, 100 * update_share);
  std::fflush(stdout);
  double best = 0;
  for (const auto& [peer_name, value] : peer_figures("step." + name + "."))
    best = std::max(best, value);
  if (best > 0) {
    figure("step." + name + ".torch_tokens_per_second", best);
    figure("step." + name + ".ratio_to_torch", rate / best);
    std::printf(" %9.0f, x%.2f", best, rate / best);
  }
  std::printf("\n");
  std::fflush(stdout);
}

// A step of decoding reads every weight once, and each row's keys and values. Its bound is the
// larger of two: those bytes at the read bandwidth, and 2 operations a row and parameter at the
// peak (of f32: with q8_0 the processor can do more, and shares may pass 100 %).
void Bench::decoding() {
  constexpr int kPrompt = 128;  // positions before the step's
  Config c;
  c.family = Family::gpt2, c.tied = true, c.norm_eps = 1e-5;
  c.V = 50257, c.T = 1024, c.L = 12, c.C = 768, c.NH = c.NKV = 12, c.HS = 64, c.F = 3072;
  const ParamTable table = make_table(c);
  bool titled = false;
  for (int type = 0; type < kWeightTypes; type++) {
    const std::string model = concat("decode.124m.", kWeightTypeNames[type]);
    if (!wanted(model)) continue;
    if (!titled)
      std::printf("\ndecoding, 124M, %-16s tokens/s    memory  arithmetic       step  share\n",
                  vectors().c_str());
    titled = true;
    GptOptions options{.mode = Mode::inference};
    double bytes = 0;  // of the weights
    for (const Tensor& t : table.tensors) {
      const bool matrix = t.kind == Kind::matrix || t.name == "wte";
      options.weights.push_back(matrix ? WeightType(type) : WeightType::f32);
      if (matrix) bytes += double(panels_bytes(WeightType(type), t.out, t.in));
    }
    const auto gpt = random_gpt(c, options);
    for (const int rows : {1, 2, 4, 8, 12, 64}) {
      const auto cache = gpt->make_cache(int64_t(rows) * 256);
      std::vector<int> sequences;
      std::vector<int> prompt(kPrompt);
      for (int i = 0; i < kPrompt; i++) prompt[size_t(i)] = i * 31 % c.V;
      DecodeResult result;
      for (int r = 0; r < rows; r++) {
        sequences.push_back(cache->create());
        const DecodeRow row{sequences.back(), prompt, {}, {}};
        gpt->decode(*cache, {&row, 1}, result);
      }
      std::vector<int> next(size_t(rows), 17);
      const double t = best_time(
          [&] {
            std::vector<DecodeRow> batch;
            for (int r = 0; r < rows; r++) {
              cache->truncate(sequences[size_t(r)], kPrompt);
              batch.push_back(
                  {sequences[size_t(r)], std::span(next).subspan(size_t(r), 1), {}, {}});
            }
            gpt->decode(*cache, batch, result);
          },
          seconds / 4);
      const double keys = 4. * rows * kPrompt * 2 * c.L * c.NKV * c.HS;  // and values; f32
      const double memory = (bytes + keys) / bandwidth;
      const double arithmetic = 2. * rows * double(gpt->table().matmul_parameters()) / peak;
      const double share = std::max(memory, arithmetic) / t;
      const std::string name = concat(model, ".rows", rows);
      figure(name + ".tokens_per_second", rows / t);
      figure(name + ".bound_share", share);
      std::printf("%-5s %2d row%-22s %8.1f %6.1f ms %8.1f ms %7.1f ms %5.0f%%\n",
                  kWeightTypeNames[type], rows, rows > 1 ? "s" : "", rows / t, 1e3 * memory,
                  1e3 * arithmetic, 1e3 * t, 100 * share);
      std::fflush(stdout);
    }
  }
}

int main_bench(int argc, char** argv) {
  Bench b;
  int threads = 0;
  CLI::App app("Measures this machine and cake on it.");
  app.add_option("--peer", b.peer, "a Python with PyTorch, to measure beside");
  app.add_option("--only", b.only, "figures whose name contains this");
  app.add_option("--seconds", b.seconds, "a figure takes (default 5)");
  app.add_option("--threads", threads);
  std::vector<int> tasks;
  app.add_option("--tasks", tasks, "only: how loops divide among so many threads, as in 8,32,64")
      ->delimiter(',')
      ->check(CLI::Range(2, 1024));
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    fail(e.what(), " (see --help)");
  }
  set_threads(threads);
  if (!tasks.empty()) return print_tasks(tasks), 0;
  b.machine();
  b.gemms();
  b.adamw_update();
  Config c;
  c.family = Family::gpt2, c.tied = true, c.norm_eps = 1e-5;
  c.V = 50257, c.T = 1024, c.L = 12, c.C = 768, c.NH = c.NKV = 12, c.HS = 64, c.F = 3072;
  std::printf("training step           tokens/s  share of peak  the update's  PyTorch\n");
  b.step("gpt2_124m", c, 4, 64, false);
  c.T = 256, c.L = 6, c.C = 384, c.NH = c.NKV = 6, c.F = 1536;
  b.step("6x384_v50257", c, 8, 256, false);
  c.V = 1024;
  b.step("6x384_v1024", c, 8, 256, false);
  Config demo;  // the demo's model
  demo.V = 1536, demo.T = 256, demo.L = 4, demo.C = 128, demo.NH = demo.NKV = 4, demo.HS = 32;
  demo.F = 384;
  b.step("demo_adamw", demo, 8, 256, false);
  b.step("demo_muon", demo, 8, 256, true);
  b.decoding();
  std::filesystem::create_directories("build");
  write_json("build/bench.json", b.figures);
  std::printf("\nbuild/bench.json has every figure\n");
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_bench(argc, argv); });
}
