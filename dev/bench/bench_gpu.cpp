// What a GPU does with the work of training GPT-2: dev/bench/gpu.sh builds and runs it.
//
//     bench_gpu [--decoding] [--smoke]
//
// --smoke: tiny sizes, to see that it runs; also over test/cuda_on_cpu/.
//
// Prints a line for each figure: name, value and unit, separated by tabs. Products and attention
// are timed alone, on numbers like a model's (a GPU's clock depends on them), then whole steps;
// floor.MODEL is the time of all products of a step as they were timed alone, over.MODEL the step's
// time divided by it, mfu.MODEL its share of what the datasheet promises. A model's name ends with
// the documents of a step, as in 1558M.B16: half of them, and so on, where all do not fit the
// memory that is free. --decoding: instead of these, tokens a second of decoding, and a step of
// GRPO.
//
// The engine's source is part of this file: its inner functions are what is measured.
#include "train_gpt.cu"

namespace cake::gpu {
namespace {

struct Model {
  std::string name;
  Config config;
  int documents;  // of T tokens, in a step
  int64_t tokens() const { return int64_t(documents) * config.T; }
};

Model gpt2(const char* name, int layers, int channels, int heads, int documents, bool smoke) {
  Config c;
  c.family = Family::gpt2, c.tied = true, c.norm_eps = 1e-5;
  c.V = smoke ? 300 : 50257, c.T = smoke ? 32 : 1024, c.L = smoke ? 2 : layers;
  c.NH = c.NKV = smoke ? 2 : heads, c.HS = smoke ? 16 : channels / heads;
  c.C = c.NH * c.HS, c.F = 4 * c.C;
  return {name, c, smoke ? 2 : documents};
}

GptOptions step_options(const Model& m) {
  GptOptions options{.device = Device::cuda, .precision = Precision::bf16};
  options.batch_tokens = int(m.tokens());
  return options;
}

// With as many documents as fit in 90 % of the free memory, by halves; the name says how many.
Model fitted(Model m) {
  const auto bytes = [&] { return gpu::plan_memory(m.config, step_options(m)).total(); };
  while (m.documents > 1 && bytes() > gpu::free_memory() / 10 * 9) m.documents /= 2;
  m.name += concat(".B", m.documents);
  return m;
}

std::vector<int> random_tokens(const Config& c, int64_t count, Rng& rng) {
  std::vector<int> tokens;
  for (int64_t n = 0; n < count; n++) tokens.push_back(int(rng.below(uint64_t(c.V))));
  return tokens;
}

void randomize(Gpt& gpt) {
  const ParamTable& table = gpt.table();
  for (size_t i = 0; i < table.tensors.size(); i++)
    gpt.write(int(i), Slot::weight, initial_values(table.tensors[i], 1));
}

class Bench {
 public:
  explicit Bench(bool smoke) : smoke_(smoke) {}

  void figure(const std::string& name, double value, const char* unit) const {
    std::printf("%s\t%.6g\t%s\n", name.c_str(), value, unit);
    std::fflush(stdout);
  }

  // Seconds of one call: the best of a few times as many calls as take a tenth of a second.
  template <class Body>
  double time(Body&& body) const {
    const auto run = [&](int times) {
      machine_->wait();
      const double start = now();
      for (int i = 0; i < times; i++) body();
      machine_->wait();
      return (now() - start) / times;
    };
    double best = run(1);  // and products choose their algorithms
    if (smoke_) return run(1);
    best = run(1);
    const int times = std::clamp(int(.1 / best), 1, 1000);
    for (int i = 0; i < 3; i++) best = std::min(best, run(times));
    return best;
  }

  // Products of a linear layer over N tokens, (out, in): forward, dx, dW. Their seconds.
  double linear(const std::string& name, int64_t N, int64_t out, int64_t in) const {
    const Buffer<bf16> x = random<bf16>(N * in), y = random<bf16>(N * out),
                       w = random<bf16>(out * in);
    const Buffer<float> dw = random<float>(out * in);
    Product forward{.M = N,
                    .N = out,
                    .K = in,
                    .a = x.data(),
                    .b = w.data(),
                    .d = y.data(),
                    .in = CUDA_R_16BF,
                    .out = CUDA_R_16BF,
                    .lda = in,
                    .ldb = in,
                    .ldd = out,
                    .b_transposed = true};
    Product dx = forward, dW = forward;
    dx.N = in, dx.K = out, dx.a = y.data(), dx.d = x.data();
    dx.lda = out, dx.ldb = in, dx.ldd = in, dx.b_transposed = false;
    dW.M = out, dW.N = in, dW.K = N, dW.a = y.data(), dW.b = x.data(), dW.d = dw.data();
    dW.lda = out, dW.ldb = in, dW.ldd = in, dW.out = CUDA_R_32F, dW.beta = 1;
    dW.a_transposed = true, dW.b_transposed = false;
    double sum = 0;
    // dW first: what it reads, the others overwrite with sums
    for (const auto& [which, p] : {std::pair{"dW", dW}, {"forward", forward}, {"dx", dx}}) {
      const double seconds = time([&, &p = p] { machine_->matmul(p); });
      figure(concat("product.", name, ".", which, ".", N, "x", out, "x", in),
             2. * double(N) * double(out) * double(in) / seconds * 1e-12, "TFLOP/s");
      sum += seconds;
    }
    return sum;
  }

  void attention(int NH, int NKV, int HS, int64_t tokens, int T) const {
    const int N = int(tokens / T * T), C = NH * HS, ld = (NH + 2 * NKV) * HS;
    const Buffer<bf16> qkv = random<bf16>(int64_t(N) * ld), dout = random<bf16>(int64_t(N) * C);
    const Buffer<bf16> out = random<bf16>(int64_t(N) * C), dqkv = random<bf16>(int64_t(N) * ld);
    const Buffer<float> lse = random<float>(int64_t(N) * NH), dot = random<float>(int64_t(N) * NH);
    std::vector<int> begin, end;
    for (int n = 0; n < N; n++) begin.push_back(n / T * T), end.push_back(begin.back() + T);
    const Buffer<int> starts = sent(begin), ends = sent(end);
    const AttentionShape shape{N, NH, NKV, HS, starts.data(), ends.data()};
    const bf16 *q = qkv.data(), *k = q + C, *v = k + NKV * HS;
    const AttentionInput<bf16> in{q, k, v, ld, ld, ld};
    bf16 *dq = dqkv.data(), *dk = dq + C, *dv = dk + NKV * HS;
    // A query meets half the keys of its document: two products forward, five backward.
    const double product = double(N) * T * C;
    const std::string name = concat(".h", NH, ":", NKV, "x", HS, ".T", T);
    const double forward =
        time([&] { attention_forward(out.data(), lse.data(), in, shape, machine_->stream); });
    figure("attention.forward" + name, 2 * product / forward * 1e-12, "TFLOP/s");
    const double backward = time([&] {
      attention_backward(dq, ld, dk, dv, ld, dout.data(), out.data(), lse.data(), dot.data(), in,
                         shape, machine_->stream);
    });
    figure("attention.backward" + name, 5 * product / backward * 1e-12, "TFLOP/s");
  }

  void step(const Model& m, double floor) const {
    const auto gpt = gpu::make_gpt(m.config, step_options(m));
    const ParamTable& table = gpt->table();
    randomize(*gpt);
    Rng rng{1};
    const std::vector<int> tokens = random_tokens(m.config, m.tokens(), rng),
                           targets = random_tokens(m.config, m.tokens(), rng);
    std::vector<int> starts{0};
    for (int d = 1; d <= m.documents; d++) starts.push_back(d * m.config.T);
    const std::vector<float> dlogp(size_t(m.tokens()), -1 / float(m.tokens()));
    OptimizerStep o{.decay = .1f, .max_norm = 1};
    o.lr.fill(1e-4f);
    const auto run = [&](int steps) {
      gpt->stats();
      const double start = now();
      for (int i = 0; i < steps; i++, o.step++) {
        gpt->forward_backward({tokens, targets, starts}, dlogp);
        gpt->update(o);
      }
      gpt->stats();  // waits
      return (now() - start) / steps;
    };
    run(3);  // products are chosen, then graphs recorded
    const double once = smoke_ ? 0 : run(1);
    const double seconds = run(smoke_ ? 1 : std::clamp(int(4 / once), 2, 50));
    if (!std::isfinite(gpt->stats().loss)) fail(m.name, ": the loss is not finite");
    const std::string name = m.name;
    figure("step." + name, seconds * 1e3, "ms");
    figure("tokens." + name, double(m.tokens()) / seconds, "tokens/s");
    const Config& c = m.config;  // operations as training_operations in train_gpt.cpp counts them
    const double operations = double(m.tokens()) * (6. * double(table.matmul_parameters()) +
                                                    6. * c.L * c.NH * c.HS * c.T);
    figure("speed." + name, operations / seconds * 1e-12, "TFLOP/s");
    // As llm.c counts: all parameters, those of the embeddings too, and all of the attention
    // matrix.
    const double counted = 6. * double(table.parameters()) + 6. * c.L * c.C * c.T;
    if (const double promised = gpt->datasheet_operations(); promised > 0) {
      figure("mfu." + name, 100 * counted * double(m.tokens()) / seconds / promised, "%");
    }
    figure("floor." + name, floor * 1e3, "ms");
    figure("over." + name, seconds / floor, "x");
  }

  struct Rollouts {
    double prompts = 0, tokens = 0;  // seconds: of the call that reads the prompts, of a later call
  };
  // `rows` sequences: prompts of `prompt` tokens, then `sampled` tokens each.
  Rollouts roll_out(Gpt& gpt, int rows, int prompt, int sampled) const {
    Rng rng{2};
    const auto cache = gpt.make_cache(int64_t(rows) * round_up(prompt + sampled, kPage));
    std::vector<int> tokens = random_tokens(gpt.config(), int64_t(rows) * prompt, rng);
    std::vector<DecodeRow> batch(static_cast<size_t>(rows));
    for (int r = 0; r < rows; r++) {
      batch[size_t(r)].sequence = cache->create();
      batch[size_t(r)].tokens = std::span(tokens).subspan(size_t(r * prompt), size_t(prompt));
      batch[size_t(r)].sampling.stream = uint64_t(r);
    }
    DecodeResult result;
    Rollouts took;
    double start = now();
    gpt.decode(*cache, batch, result);
    took.prompts = now() - start;
    start = now();
    for (int i = 1; i < sampled; i++) {
      const std::vector<int> last = result.ids;
      for (int r = 0; r < rows; r++)
        batch[size_t(r)].tokens = std::span(last).subspan(size_t(r), 1);
      gpt.decode(*cache, batch, result);
    }
    took.tokens = (now() - start) / (sampled - 1);
    return took;
  }

  // Decoding at several numbers of rows, then a step of GRPO as ./rlhf makes it, without a
  // reference and rewards: 64 rollouts of 128 and 128 tokens, their log-probabilities, an update.
  void decoding() const {
    const Model m = gpt2("124M", 12, 768, 12, 16, smoke_);
    const int prompt = smoke_ ? 8 : 128, sampled = smoke_ ? 4 : 128, rollouts = smoke_ ? 4 : 64;
    GptOptions options = step_options(m);
    options.batch_tokens = rollouts * (prompt + sampled);
    options.decode = {rollouts, rollouts * prompt, int64_t(rollouts) * (prompt + sampled)};
    const auto gpt = gpu::make_gpt(m.config, options);
    randomize(*gpt);
    for (const int rows : {1, 8, rollouts}) {
      roll_out(*gpt, rows, prompt, sampled);  // products are chosen, graphs recorded
      const Rollouts took = roll_out(*gpt, rows, prompt, sampled);
      const std::string name = concat(m.name, ".R", rows);
      figure("decode." + name, rows / took.tokens, "tokens/s");
      figure("prefill." + name, double(rows) * prompt / took.prompts, "tokens/s");
    }
    const int64_t N = options.batch_tokens;
    Rng rng{3};
    const std::vector<int> tokens = random_tokens(m.config, N, rng),
                           targets = random_tokens(m.config, N, rng);
    std::vector<int> starts{0};
    while (starts.back() < N) starts.push_back(starts.back() + prompt + sampled);
    const std::vector<float> dlogp(size_t(N), -1 / float(N));
    OptimizerStep o{.max_norm = 1};
    o.lr.fill(1e-6f);
    const auto step = [&] {
      roll_out(*gpt, rollouts, prompt, sampled);
      gpt->forward({tokens, targets, starts}, Pass::score);
      gpt->logp();
      gpt->forward({tokens, targets, starts}, Pass::train);
      gpt->backward(dlogp);
      gpt->update(o), o.step++;
      if (!std::isfinite(gpt->stats().grad_norm)) fail("GRPO: the gradient is not finite");
    };
    step(), step();
    const double start = now();
    step();
    figure(concat("grpo.", m.name, ".R", rollouts), (now() - start) * 1e3, "ms");
  }

  void run() const {
    {
      const auto gpt = gpu::make_gpt(
          gpt2("", 1, 64, 1, 1, true).config,
          {.device = Device::cuda, .mode = Mode::inference, .precision = Precision::bf16});
      figure("peak", gpu::measure_peak(*gpt) * 1e-12, "TFLOP/s");
    }
    std::vector<double> floors;
    const std::vector<Model> models{fitted(gpt2("124M", 12, 768, 12, 64, smoke_)),
                                    fitted(gpt2("1558M", 48, 1600, 25, 32, smoke_))};
    for (const Model& m : models) {
      const Config& c = m.config;
      const std::string name = m.name;
      const int64_t N = m.tokens(), rows = logit_rows_of<bf16>(c, N);
      const double layer = linear(name + ".qkv", N, c.qkv(), c.C) +
                           linear(name + ".o", N, c.C, c.C) + linear(name + ".up", N, c.F, c.C) +
                           linear(name + ".down", N, c.C, c.F);
      const double head = linear(name + ".head", rows, c.padded_V(), c.C);
      floors.push_back(c.L * layer + double(N) / double(rows) * head);
    }
    for (const int T : smoke_ ? std::vector{32, 64} : std::vector{1024, 2048, 4096, 8192}) {
      attention(smoke_ ? 2 : 12, smoke_ ? 2 : 12, 64, smoke_ ? 64 : 65536, T);
      attention(smoke_ ? 2 : 16, smoke_ ? 1 : 8, 128, smoke_ ? 64 : 32768, T);
    }
    for (size_t i = 0; i < models.size(); i++) step(models[i], floors[i]);
  }

 private:
  template <class T>
  Buffer<T> random(int64_t count) const {
    Buffer<T> to("a benchmark's array", count, "nothing");
    std::vector<T> values(size_t(std::min<int64_t>(count, 1 << 20)));
    Rng rng{uint64_t(count)};
    for (T& x : values) x = T(float(.5 * rng.normal()));
    for (int64_t i = 0; i < count; i += int64_t(values.size())) {
      const int64_t n = std::min(count - i, int64_t(values.size()));
      check(cudaMemcpy(to.data() + i, values.data(), size_t(n) * sizeof(T), cudaMemcpyHostToDevice),
            "a benchmark's array");
    }
    return to;
  }
  static Buffer<int> sent(const std::vector<int>& values) {
    Buffer<int> to("a benchmark's array", int64_t(values.size()), "nothing");
    check(cudaMemcpy(to.data(), values.data(), to.bytes(), cudaMemcpyHostToDevice), "an array");
    return to;
  }

  bool smoke_;
  std::shared_ptr<Machine> machine_ = Machine::get();
};

}  // namespace
}  // namespace cake::gpu

int main(int argc, char** argv) {
  return cake::guarded_main([&] {
    bool smoke = false, decoding = false;
    for (int i = 1; i < argc; i++) {
      const std::string flag = argv[i];
      if (flag != "--smoke" && flag != "--decoding") {
        cake::fail(flag, ": expected --decoding, --smoke or nothing");
      }
      (flag == "--smoke" ? smoke : decoding) = true;
    }
    if (const std::string why = cake::gpu::unavailable(); !why.empty()) cake::fail(why);
    const cake::gpu::Bench bench(smoke);
    decoding ? bench.decoding() : bench.run();
    return 0;
  });
}
