// What a GPU does with the work of training GPT-2: dev/bench/gpu.sh builds and runs it.
//
//     bench_gpu [--smoke]      --smoke: tiny sizes, to see that it runs; also over
//     test/cuda_on_cpu/
//
// Prints a line for each figure: name, value and unit, separated by tabs. Products and attention
// are timed alone, on numbers like a model's (a GPU's clock depends on them), then whole steps;
// floor.MODEL is the time of all products of a step as they were timed alone, over.MODEL the step's
// time divided by it.
//
// The engine's source is part of this file: its inner functions are what is measured.
#include "train_gpt.cu"

namespace cake::gpu {
namespace {

struct Model {
  const char* name;
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
    GptOptions options{.device = Device::cuda, .precision = Precision::bf16};
    options.batch_tokens = int(m.tokens());
    const auto gpt = gpu::make_gpt(m.config, options);
    const ParamTable& table = gpt->table();
    for (size_t i = 0; i < table.tensors.size(); i++)
      gpt->write(int(i), Slot::weight, initial_values(table.tensors[i], 1));
    Rng rng{1};
    std::vector<int> tokens, targets, starts{0};
    for (int64_t n = 0; n < m.tokens(); n++) {
      tokens.push_back(int(rng.below(uint64_t(m.config.V))));
      targets.push_back(int(rng.below(uint64_t(m.config.V))));
    }
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
    figure("floor." + name, floor * 1e3, "ms");
    figure("over." + name, seconds / floor, "x");
  }

  void run() const {
    {
      GptOptions options{
          .device = Device::cuda, .mode = Mode::inference, .precision = Precision::bf16};
      const auto gpt = gpu::make_gpt(gpt2("", 1, 64, 1, 1, true).config, options);
      figure("peak", gpu::measure_peak(*gpt) * 1e-12, "TFLOP/s");
    }
    std::vector<double> floors;
    const std::vector<Model> models{gpt2("124M", 12, 768, 12, 64, smoke_),
                                    gpt2("1558M", 48, 1600, 25, 32, smoke_)};
    for (const Model& m : models) {
      const Config& c = m.config;
      const std::string name = m.name;
      const int64_t N = m.tokens(), rows = std::min(N, most_logit_rows);
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
    const bool smoke = argc == 2 && std::string(argv[1]) == "--smoke";
    if (argc > 1 && !smoke) cake::fail(argv[1], ": expected --smoke or nothing");
    if (const std::string why = cake::gpu::unavailable(); !why.empty()) cake::fail(why);
    cake::gpu::Bench(smoke).run();
    return 0;
  });
}
