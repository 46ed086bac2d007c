// Whole models against PyTorch and transformers: dev/golden/models.py and dev/golden/interchange.py
// computed, in double precision, what stands in test/golden/. Weights come from a formula, the same
// here and there, so that only results are stored. Muon is compared with a plain double-precision
// version that stands here.
//
// Tolerances are relative, ||a - b|| / ||b||, and about ten times what PyTorch's own float32 is off
// from the same goldens (models.py prints that): room for another order of sums, none for a
// mistake. Every comparison fails on NaN.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "test/golden.h"
#include "test/support.h"

using namespace cake;
using namespace cake::goldens;

namespace {

constexpr double kLogits = 4e-6;    // PyTorch's float32: 3.4e-7
constexpr double kLogp = 2e-6;      // 1.2e-7, entropy 1.6e-7
constexpr double kGradient = 2e-5;  // 1.7e-6, a norm's weight over documents of up to 141
constexpr double kValue = 4e-6;     // 4.1e-7
constexpr double kLoss = 1e-6;      // over three steps: 8e-8
constexpr double kNorm = 2e-6;      // of the gradient: 1.0e-7; PyTorch clips to norm + 1e-6
constexpr double kChange = 5e-4;    // of a weight by three steps: 5e-5

const std::vector<std::string> kLmGoldens = {"gpt2",  "gpt2_untied", "llama", "llama3",
                                             "qwen3", "qwen3_long",  "qwen2", "mistral"};
const std::vector<std::string> kScalarGoldens = {"qwen3_scalar", "gpt2_scalar"};

// The batch of a golden, with the vectors its spans look at.
struct Packed {
  std::vector<int> tokens, targets, doc_starts;
  float temperature = 1;
  Batch batch() const { return {tokens, targets, doc_starts, temperature}; }
  int documents() const { return int(doc_starts.size()) - 1; }
  int target_count() const {
    return int(std::count_if(targets.begin(), targets.end(), [](int t) { return t >= 0; }));
  }
};

Packed one_document(const std::vector<int>& tokens) {
  return {tokens, std::vector<int>(tokens.size(), -1), {0, int(tokens.size())}};
}

Packed packed_batch(const Golden& g) {
  Packed p{.tokens = g.ints("tokens"), .doc_starts = g.ints("doc_starts")};
  p.targets = g.has("targets") ? g.ints("targets") : std::vector<int>(p.tokens.size(), -1);
  p.temperature = g.temperature;
  return p;
}

// ---------------------------------------------------------------------------------------------
// Gradients and decoding

double norm(std::span<const float> x) {
  double sum = 0;
  for (float v : x) sum += double(v) * v;
  return std::sqrt(sum);
}

// The gradient of gpt2's key bias is zero in exact arithmetic: softmax does not see what is added
// to all scores of a query. What is left is rounding noise. (qwen2's is turned by RoPE, each key's
// by its position.)
bool has_no_gradient(const Gpt& gpt, const std::string& name) {
  return gpt.config().family == Family::gpt2 && name.ends_with(".k.bias");
}

void check_gradients(const Gpt& gpt, const Golden& golden, const std::string& name) {
  const auto& tensors = gpt.table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    const std::vector<float> gradient = read(gpt, int(i), Slot::gradient);
    const std::string what = name + " gradient." + tensors[i].name;
    if (has_no_gradient(gpt, tensors[i].name)) {
      std::string query = tensors[i].name;
      query.replace(query.size() - 6, 1, "q");
      const double noise = norm(gradient) / norm(golden.at("gradient." + query));
      CHECK_MESSAGE(noise < kGradient, what, ": ", noise, " of the query bias's, expected none");
    } else {
      check_close(gradient, golden.at("gradient." + tensors[i].name), kGradient, what);
    }
  }
}

std::span<const float> optional(const Golden& golden, const std::string& name) {
  if (!golden.has(name)) return {};
  return golden.at(name);
}

// What the engine says after tokens of every document, all documents in one call: for a position,
// its logits and the most likely token that follows. With `prompts` the first half of a document is
// appended as one token and one prompt; the rest goes token by token.
struct Decoded {
  std::map<int, std::vector<float>> logits;
  std::map<int, int> ids;
};
Decoded decode_documents(Gpt& gpt, const Packed& packed, bool prompts) {
  const int D = packed.documents(), V = gpt.config().V;
  const auto cache = gpt.make_cache(int64_t(packed.tokens.size()) + int64_t(D) * kPage);
  std::vector<int> sequences(static_cast<size_t>(D)),
      at(packed.doc_starts.begin(), packed.doc_starts.end() - 1);
  for (int& s : sequences) s = cache->create();
  Decoded decoded;
  for (int round = 0;; round++) {
    std::vector<DecodeRow> rows;
    std::vector<int> last;  // position after whose token each row's logits stand
    for (size_t d = 0; d < size_t(D); d++) {
      const int begin = packed.doc_starts[d], end = packed.doc_starts[d + 1];
      if (at[d] == end) continue;
      const int middle = (begin + end) / 2;
      const int n = prompts && round == 1 && middle > at[d] ? middle + 1 - at[d] : 1;
      const std::span<const int> tokens(packed.tokens.data() + at[d], size_t(n));
      rows.push_back({.sequence = sequences[d], .tokens = tokens, .sampling = {.temperature = 0}});
      at[d] += n;
      last.push_back(at[d] - 1);
    }
    if (rows.empty()) return decoded;
    DecodeResult result;
    gpt.decode(*cache, rows, result, true);
    REQUIRE(result.logits.size() == rows.size() * size_t(V));
    for (size_t r = 0; r < rows.size(); r++) {
      const auto logits = result.logits.begin() + std::ptrdiff_t(r) * V;
      decoded.logits[last[r]] = std::vector<float>(logits, logits + V);
      decoded.ids[last[r]] = result.ids[r];
    }
  }
}

// ---------------------------------------------------------------------------------------------

TEST_CASE("logp, entropy and loss of packed documents equal PyTorch's of each document alone") {
  for (const std::string& name : kLmGoldens) {
    const Golden golden = load_golden(name);
    const Packed packed = packed_batch(golden);
    const auto gpt = make_formula_gpt(golden.config);
    for (const Pass pass : {Pass::train, Pass::score}) {
      gpt->forward(packed.batch(), pass);
      const std::span<const float> logp = gpt->logp(), entropy = gpt->entropy();
      check_close(logp, golden.at("logp"), kLogp, name + " logp");
      check_close(entropy, golden.at("entropy"), kLogp, name + " entropy");
      for (size_t n = 0; n < logp.size(); n++) {
        if (packed.targets[n] >= 0) continue;
        CHECK_MESSAGE(logp[n] == 0, name, ": logp of masked position ", n);
        CHECK_MESSAGE(entropy[n] == 0, name, ": entropy of masked position ", n);
      }
      const double loss =
          -std::accumulate(logp.begin(), logp.end(), 0.) / double(packed.target_count());
      check_close(std::vector{loss}, golden.at("loss"), kLoss, name + " loss");
    }
  }
}

TEST_CASE("every gradient equals PyTorch's, of forward then backward and of forward_backward") {
  for (const std::string& name : kLmGoldens) {
    const Golden golden = load_golden(name);
    const Packed packed = packed_batch(golden);
    const auto gpt = make_formula_gpt(golden.config);
    // masked positions carry a weight too, which must not count
    const auto dlogp = optional(golden, "dlogp"), dentropy = optional(golden, "dentropy");
    gpt->zero_gradients();
    gpt->forward(packed.batch(), Pass::train);
    gpt->backward(dlogp, {}, dentropy);
    check_gradients(*gpt, golden, name + " forward, backward:");
    gpt->zero_gradients();
    gpt->forward_backward(packed.batch(), dlogp, {}, dentropy);
    check_gradients(*gpt, golden, name + " forward_backward:");
  }
}

TEST_CASE("values of a scalar head and their gradients equal PyTorch's") {
  for (const std::string& name : kScalarGoldens) {
    const Golden golden = load_golden(name);
    const Packed packed = packed_batch(golden);
    const auto gpt = make_formula_gpt(golden.config);
    gpt->zero_gradients();
    gpt->forward(packed.batch(), Pass::train);
    check_close(gpt->value(), golden.at("value"), kValue, name + " value");
    gpt->backward({}, golden.at("dvalue"));
    check_gradients(*gpt, golden, name + " forward, backward:");
    gpt->zero_gradients();
    gpt->forward_backward(packed.batch(), {}, golden.at("dvalue"));
    check_gradients(*gpt, golden, name + " forward_backward:");
  }
}

TEST_CASE("logits of decoding over a KV cache equal those of PyTorch's full forward") {
  for (const std::string& name : kLmGoldens) {
    const Golden golden = load_golden(name);
    const Packed packed = packed_batch(golden);
    const auto gpt = make_formula_gpt(golden.config);
    const Decoded decoded = decode_documents(*gpt, packed, true);
    const std::vector<int> positions = golden.ints("logits_at");
    const std::vector<float>& all = golden.at("logits");
    const size_t V = size_t(golden.config.V);
    REQUIRE(all.size() == positions.size() * V);
    size_t compared = 0;
    for (size_t i = 0; i < positions.size(); i++) {
      const int n = positions[i];
      if (!decoded.logits.count(n)) continue;  // inside a prompt
      const std::span<const float> expected(all.data() + i * V, V);
      check_close(decoded.logits.at(n), expected, kLogits, concat(name, " logits at ", n));
      const auto best = std::max_element(expected.begin(), expected.end());
      CHECK_MESSAGE(decoded.ids.at(n) == best - expected.begin(), name, ": greedy token at ", n);
      compared++;
    }
    CHECK(compared == positions.size());
  }
}

TEST_CASE("three clipped AdamW steps follow PyTorch's") {
  for (const std::string& name : kLmGoldens) {
    const Golden golden = load_golden(name);
    const Packed packed = packed_batch(golden);
    const auto gpt = make_formula_gpt(golden.config);
    const Json& adamw = golden.settings["adamw"];
    OptimizerStep step{.eps = adamw["eps"], .decay = adamw["decay"], .max_norm = adamw["max_norm"]};
    for (int k = 0; k < int(Kind::adapter); k++) step.lr[size_t(k)] = adamw["lr"][kKindNames[k]];
    const std::vector<float> dlogp(packed.tokens.size(), -1.f / float(packed.target_count()));
    std::vector<double> losses, norms;
    gpt->zero_gradients();
    for (step.step = 1;; step.step++) {
      gpt->forward_backward(packed.batch(), dlogp);
      const std::span<const float> logp = gpt->logp();
      losses.push_back(-std::accumulate(logp.begin(), logp.end(), 0.) / packed.target_count());
      if (step.step == 4) break;
      gpt->update(step);
      const UpdateStats stats = gpt->stats();
      CHECK_FALSE(stats.skipped);
      norms.push_back(stats.grad_norm);
    }
    check_close(losses, golden.at("adamw.loss"), kLoss, name + " losses");
    check_close(norms, golden.at("adamw.norm"), kNorm, name + " gradient norms");
    const auto& tensors = gpt->table().tensors;
    for (size_t i = 0; i < tensors.size(); i++) {
      const std::string key = "adamw.weight." + tensors[i].name;
      if (!golden.has(key)) continue;
      if (has_no_gradient(*gpt, tensors[i].name))
        continue;  // Adam makes steps of its rounding noise
      const std::vector<float> start = formula(tensors[i]);
      std::vector<float> found = read(*gpt, int(i), Slot::weight), expected = golden.at(key);
      for (size_t j = 0; j < start.size(); j++) found[j] -= start[j], expected[j] -= start[j];
      check_close(found, expected, kChange, name + " change of " + tensors[i].name);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Model directories from and to transformers

TEST_CASE("directories that transformers wrote load and give its logits and scores") {
  // float32; float16 in shards, scaled RoPE; bfloat16; a score head
  for (const std::string name : {"hf_gpt2", "hf_llama", "hf_qwen3", "hf_qwen3_reward"}) {
    const std::string dir = "test/golden/" + name;
    const Golden golden = load_golden(name);
    const Packed prompt = one_document(golden.ints("tokens"));
    const auto gpt = make_gpt(load_config(dir), {.device = Device::cpu, .mode = Mode::inference});
    load_weights(dir, *gpt);
    if (golden.has("value")) {
      REQUIRE(gpt->config().head == Head::scalar);
      gpt->forward(prompt.batch(), Pass::score);
      check_close(gpt->value(), golden.at("value"), kValue, name + " value");
      continue;
    }
    const Decoded decoded = decode_documents(*gpt, prompt, true);
    const size_t V = size_t(gpt->config().V);
    REQUIRE(golden.at("logits").size() == prompt.tokens.size() * V);
    for (const auto& [n, logits] : decoded.logits) {
      const std::span<const float> expected(golden.at("logits").data() + size_t(n) * V, V);
      check_close(logits, expected, kLogits, concat(name, " logits at ", n));
    }
    CHECK(decoded.logits.count(int(prompt.tokens.size()) - 1) == 1);
  }
}

// {name: [dtype, shape, hash of the data]} of a model.safetensors
Json tensors_of(const std::filesystem::path& path) {
  const std::string bytes = read_file(path);
  uint64_t header_bytes = 0;
  REQUIRE(bytes.size() > 8);
  std::memcpy(&header_bytes, bytes.data(), 8);
  Json tensors = Json::object();
  const Json header = Json::parse(bytes.substr(8, header_bytes));
  for (const auto& [key, t] : header.items()) {
    if (key == "__metadata__") continue;
    const uint64_t begin = t["data_offsets"][0], end = t["data_offsets"][1];
    const auto data = std::string_view(bytes).substr(8 + header_bytes + begin, end - begin);
    const std::string hash = format("%016llx", static_cast<unsigned long long>(hash64(data)));
    tensors[key] = {t["dtype"], t["shape"], hash};
  }
  return tensors;
}

// `dev/golden/interchange.py accept` loaded these directories with transformers, found every key in
// its place and the formula's logits, and recorded what they hold. After a change of the format:
// CAKE_INTERCHANGE=DIR leaves them, and what this engine computes, there to be accepted again.
TEST_CASE("written directories hold what transformers was seen to load to equal logits") {
  const char* keep = std::getenv("CAKE_INTERCHANGE");
  const TempDir temporary;
  const std::filesystem::path root = keep ? keep : temporary.path();
  std::filesystem::create_directories(root);
  const Json written = keep ? Json::object() : read_json("test/golden/written.json");
  for (const std::string name :
       {"gpt2", "gpt2_untied", "llama", "llama3", "qwen3", "qwen2", "mistral", "qwen3_scalar"}) {
    const Config config = load_golden(name).config;
    const auto gpt = make_formula_gpt(config);
    save_checkpoint(root / name, *gpt, {});
    if (keep) {
      const Packed prompt = one_document(random_ids(name + ".prompt", 11, config.V));
      std::vector<float> output;
      if (config.head == Head::scalar) {
        gpt->forward(prompt.batch(), Pass::score);
        const std::span<const float> value = gpt->value();
        output.assign(value.begin(), value.end());
      } else {
        for (const auto& [n, logits] : decode_documents(*gpt, prompt, false).logits) {
          output.insert(output.end(), logits.begin(), logits.end());
        }
      }
      write_file(root / (name + ".logits"),
                 {reinterpret_cast<const char*>(output.data()), output.size() * sizeof(float)});
      continue;
    }
    CAPTURE(name);
    CHECK(read_json(root / name / "config.json") == written[name]["config"]);
    CHECK(tensors_of(root / name / "model.safetensors") == written[name]["tensors"]);
  }
}

// ---------------------------------------------------------------------------------------------
// Muon (Jordan et al. 2024), by its definition, one matrix at a time

template <class Real>
struct PlainMuon {
  int out, in;
  std::vector<Real> weight, momentum;

  // (m, k) times (k, n), or times the transpose of (n, k)
  static std::vector<Real> product(const std::vector<Real>& a, const std::vector<Real>& b, int m,
                                   int k, int n, bool b_transposed) {
    std::vector<Real> c(size_t(m) * size_t(n));
    for (int i = 0; i < m; i++)
      for (int j = 0; j < n; j++) {
        Real sum = 0;
        for (int l = 0; l < k; l++) {
          sum +=
              a[size_t(i * k + l)] * (b_transposed ? b[size_t(j * k + l)] : b[size_t(l * n + j)]);
        }
        c[size_t(i * n + j)] = sum;
      }
    return c;
  }

  void step(const std::vector<float>& gradient, double lr, double beta) {
    const int m = std::min(out, in), n = std::max(out, in);
    const bool tall = out > in;
    std::vector<Real> x(weight.size());
    Real squares = 0;
    for (int i = 0; i < out; i++)
      for (int j = 0; j < in; j++) {
        const size_t e = size_t(i * in + j);
        momentum[e] = Real(beta) * momentum[e] + Real(1 - beta) * Real(gradient[e]);
        const Real nesterov = Real(beta) * momentum[e] + Real(1 - beta) * Real(gradient[e]);
        x[tall ? size_t(j * out + i) : e] = nesterov;
        squares += nesterov * nesterov;
      }
    for (Real& v : x) v /= std::sqrt(squares) + Real(1e-7);
    for (int iteration = 0; iteration < 5; iteration++) {
      const std::vector<Real> a = product(x, x, m, n, m, true);
      std::vector<Real> b = product(a, a, m, m, m, false);
      for (size_t e = 0; e < b.size(); e++) b[e] = Real(-4.7750) * a[e] + Real(2.0315) * b[e];
      const std::vector<Real> bx = product(b, x, m, m, n, false);
      for (size_t e = 0; e < x.size(); e++) x[e] = Real(3.4445) * x[e] + bx[e];
    }
    const Real scale = Real(lr * std::sqrt(std::max(1., double(out) / in)));
    for (int i = 0; i < out; i++)
      for (int j = 0; j < in; j++) {
        weight[size_t(i * in + j)] -= scale * x[tall ? size_t(j * out + i) : size_t(i * in + j)];
      }
  }
};

// Three steps on random gradients: the change of each matrix, and that AdamW's rows stay.
void check_muon(const Config& config) {
  const auto gpt = make_gpt(config, {.device = Device::cpu, .muon = true});
  const auto& tensors = gpt->table().tensors;
  std::map<std::string, PlainMuon<double>> plain;
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& t = tensors[i];
    const std::vector<float> start = formula(t);
    gpt->write(int(i), Slot::weight, start);
    if (!t.muon) continue;
    plain[t.name] = {t.out, t.in, std::vector<double>(start.begin(), start.end()),
                     std::vector<double>(start.size())};
  }
  gpt->zero_gradients();
  OptimizerStep step{.muon_lr = .02f};  // AdamW's rates are 0
  for (step.step = 1; step.step <= 3; step.step++) {
    for (size_t i = 0; i < tensors.size(); i++) {
      const Tensor& t = tensors[i];
      const auto gradient = random_values(concat(t.name, ".muon", step.step), t.size());
      gpt->write(int(i), Slot::gradient, gradient);
      if (t.muon) plain[t.name].step(gradient, .02, .95);
    }
    gpt->update(step);
    CHECK_FALSE(gpt->stats().skipped);
  }
  int tall = 0, wide = 0, square = 0;
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& t = tensors[i];
    const std::vector<float> start = formula(t), found = read(*gpt, int(i), Slot::weight);
    if (!t.muon) {
      CHECK_MESSAGE(found == start, t.name, " is AdamW's and its rate is 0");
      continue;
    }
    (t.out > t.in ? tall : t.out < t.in ? wide : square)++;
    std::vector<double> change, expected;
    for (size_t e = 0; e < start.size(); e++) {
      change.push_back(double(found[e]) - start[e]);
      expected.push_back(plain[t.name].weight[e] - start[e]);
    }
    // ten times what PlainMuon<float> is off, 1.3e-6, and the rounding of weights of size 1 that
    // change by some hundredths, 2e-6
    check_close(change, expected, 3e-5, concat("Muon on ", t.name, " ", t.out, " x ", t.in));
  }
  CHECK(tall > 0);
  CHECK(wide > 0);
  CHECK(square > 0);
}

TEST_CASE("Muon equals its definition in double on tall, wide and square matrices") {
  check_muon({.family = Family::qwen3,
              .V = 19,
              .T = 8,
              .L = 2,
              .C = 28,
              .NH = 2,
              .NKV = 1,
              .HS = 14,
              .F = 45});
  check_muon({.family = Family::gpt2,
              .V = 19,
              .T = 8,
              .L = 1,
              .C = 33,
              .NH = 3,
              .NKV = 3,
              .HS = 11,
              .F = 70,  // twice the channels: the way through the Gram matrix
              .tied = true});
}

}  // namespace
