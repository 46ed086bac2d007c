// The seam between stages and engines: what a model is, and what an engine does with it.
//
// A stage hands an engine packed documents, reads the log-probability of each target token, decides
// one number per token, dL/dlogp, and hands that back; it never sees a transformer. An engine
// (CpuGpt in train_gpt.cpp, CudaGpt in train_gpt.cu) never sees a stage. On a device only logp(),
// entropy(), value(), stats(), decode() and read() wait for it.
//
//     Config  --make_table-->  ParamTable  --one arena of floats-->  Gpt
//
// Letters, everywhere in this project: V vocabulary, T longest context, L layers, C channels, NH
// query heads, NKV key/value heads, HS head size, F feed-forward width, N tokens in a packed batch,
// D documents in it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/number_formats.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Config: one transformer in four shapes that Hugging Face publishes.

enum class Family {
  gpt2,   // learned positions, LayerNorm, GELU (tanh form), biases, tied (Radford et al. 2019)
  llama,  // RoPE, RMSNorm, SwiGLU, grouped-query attention (Touvron et al. 2023)
  qwen3,  // llama with an RMSNorm over each head of q and k (Qwen3 report 2025)
  qwen2,  // llama with biases of q, k and v (Qwen2 report 2024)
};
enum class Head {
  lm,      // logits over the vocabulary
  scalar,  // one number per position: reward model, critic
};

struct Rope {
  double theta = 10000;
  // rope_type llama3: long wavelengths are divided by `factor`; factor 0 means rope_type default
  double factor = 0, low_freq_factor = 1, high_freq_factor = 4;
  int original_T = 8192;
  bool linear = false;  // rope_type linear: every wavelength is multiplied by `factor`
  const char* type() const { return factor == 0 ? "default" : linear ? "linear" : "llama3"; }
};

struct Config {
  Family family = Family::qwen3;
  Head head = Head::lm;
  int V = 0;               // vocab_size
  int T = 0;               // n_positions, max_position_embeddings
  int L = 0;               // n_layer, num_hidden_layers
  int C = 0;               // n_embd, hidden_size
  int NH = 0;              // n_head, num_attention_heads
  int NKV = 0;             // num_key_value_heads
  int HS = 0;              // head_dim; NH HS may differ from C
  int F = 0;               // n_inner, intermediate_size
  bool tied = false;       // the head is the embedding table
  double norm_eps = 1e-6;  // layer_norm_epsilon, rms_norm_eps
  Rope rope;
  int bos = -1, eos = -1, pad = -1;  // token ids, -1 for none
  // Every token that ends a text or a turn: those of eos_token_id in config.json and in
  // generation_config.json. `eos` is the first.
  std::vector<int> end_tokens;
  // `eos` and then the other end tokens, each once; empty where the model has none.
  std::vector<int> all_end_tokens() const {
    std::vector<int> ids;
    if (eos >= 0) ids.push_back(eos);
    for (const int id : end_tokens)
      if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
    return ids;
  }
  // `id` becomes `eos`. The other end tokens go on ending a text.
  void set_first_end_token(int id) {
    const std::vector<int> others = all_end_tokens();
    eos = id, end_tokens = others;
    end_tokens = all_end_tokens();
  }
  // reward_shift of a reward model: what is added to the value at the end of an answer
  double reward_shift = 0;

  bool has_biases() const { return family == Family::gpt2; }  // of norms and of all projections
  bool has_qkv_biases() const { return has_biases() || family == Family::qwen2; }
  bool has_gate() const { return family != Family::gpt2; }  // SwiGLU: two matrices into F
  int padded_V() const { return (V + 127) / 128 * 128; }    // in memory; the added rows are zero
  int qkv() const { return (NH + 2 * NKV) * HS; }           // columns of the joint projection

  // Throws Error naming `where` (a file) and the key whose value is impossible.
  void check(const std::string& where) const {
    const auto need = [&](bool good, const char* key, auto found, const char* expected) {
      if (!good) fail(where, ": ", key, ": found ", found, ", expected ", expected);
    };
    const bool g = family == Family::gpt2;
    need(V > 0 && V <= 1 << 24, "vocab_size", V, "1 to 16777216");
    need(T > 0, g ? "n_positions" : "max_position_embeddings", T, "at least 1");
    need(L > 0 && L <= 4096, g ? "n_layer" : "num_hidden_layers", L, "1 to 4096");
    need(C > 0 && C <= 1 << 20, g ? "n_embd" : "hidden_size", C, "1 to 1048576");
    need(NH > 0 && NH <= 4096, g ? "n_head" : "num_attention_heads", NH, "1 to 4096");
    need(NKV > 0 && NH % NKV == 0, "num_key_value_heads", NKV, "a divisor of num_attention_heads");
    need(HS > 0 && HS <= 256, "head_dim", HS, "1 to 256");
    need(!g || (NH * HS == C && NKV == NH), "n_head", NH, "a divisor of n_embd");
    need(g || HS % 2 == 0, "head_dim", HS, "an even number, since RoPE rotates pairs");
    need(F > 0 && F <= 1 << 22, g ? "n_inner" : "intermediate_size", F, "1 to 4194304");
    need(norm_eps > 0 && norm_eps < 1, g ? "layer_norm_epsilon" : "rms_norm_eps", norm_eps,
         "between 0 and 1");
    need(rope.theta > 0, "rope_theta", rope.theta, "above 0");
  }
};

// ---------------------------------------------------------------------------------------------
// The table of tensors: the one place that knows their order, shapes, names on disk, initial
// values and optimizers. Initialisation, loading, saving, optimizers and tests loop over its rows.

enum class Kind { embedding, position, matrix, head, vector, adapter };  // each its learning rate
inline constexpr int kKinds = 6;
inline constexpr const char* kKindNames[kKinds] = {"embedding", "position", "matrix",
                                                   "head",      "vector",   "adapter"};

// Low-rank adapters (LoRA: Hu et al. 2021) beside every matrix of the blocks as it is on disk, as
// PEFT makes them: y = W x + alpha / rank B (A x). A (rank, in) starts random and B (out, rank)
// zero. They are all that is trained; every other row is frozen. rank 0: none.
struct Lora {
  int rank = 0;
  float alpha = 0;
  float scale() const { return alpha / float(rank); }
};

struct Tensor {
  std::string name;         // unique here: "blocks.3.q.weight"
  Kind kind;                //
  int out = 0, in = 0;      // a matrix (out, in), row-major; a vector has in = 1
  int64_t offset = 0;       // of its first float in the arena
  std::string disk;         // the tensor in model.safetensors that holds it
  int disk_begin = 0;       // its first output there: rows, or columns when transposed
  int disk_out = 0;         // outputs of the whole tensor on disk
  bool transposed = false;  // stored (in, out): gpt2's Conv1D
  double init_std = 0;      // N(0, init_std); 0 with init_one unset: zeros
  bool init_one = false;    // ones
  bool decay = false;       // AdamW's weight decay applies
  bool muon = false;        // Muon owns it; else AdamW
  bool trainable = true;    // frozen: no gradient, no dW

  int64_t size() const { return int64_t(out) * in; }
};

// Where an engine finds a GEMM's operands: rows of the table that lie side by side. -1: absent.
struct Adapter {
  int64_t a = -1, b = -1;  // arena offsets of (rank, in) and (out, rank)
  int begin = 0, out = 0;  // the group's outputs that it adds to
};
struct Linear {
  int64_t weight = -1, bias = -1;  // arena offsets of (out, in) and (out)
  int out = 0, in = 0;
  std::vector<Adapter> adapters;  // LoRA's
};
struct Norm {
  int64_t weight = -1, bias = -1;  // (C) each; RMSNorm has no bias
};
struct Block {
  Norm norm1;
  Linear qkv;           // q, k, v rows: (NH + 2 NKV) HS outputs
  int64_t q_norm = -1;  // (HS)
  int64_t k_norm = -1;  // (HS)
  Linear o;             // NH HS -> C
  Norm norm2;
  Linear up;    // gate and up rows: 2F outputs; gpt2: F
  Linear down;  // F -> C
};

// What PEFT calls matrix A or B beside the tensor `disk`, "X.weight".
inline std::string adapter_name(const std::string& disk, const char* which) {
  return concat("base_model.model.", disk.substr(0, disk.rfind(".weight")), ".lora_", which,
                ".weight");
}

struct ParamTable {
  std::vector<Tensor> tensors;  // in the arena's order
  int64_t size = 0;             // floats in the arena, padding included
  int64_t wte = -1, wpe = -1;   // (padded V, C), (T, C)
  std::vector<Block> blocks;
  Norm final_norm;
  Linear head;  // lm: (padded V, C), the embedding when tied; scalar: (1, C)
  Lora lora;

  int64_t parameters() const {  // without padding
    int64_t n = 0;
    for (const Tensor& t : tensors) n += t.size();
    return n;
  }
  int64_t matmul_parameters() const {  // that take part in products: blocks and head, once
    int64_t n = 0;
    for (const Tensor& t : tensors) {
      const bool product = t.kind == Kind::matrix || t.kind == Kind::head;
      if (product || t.offset == head.weight) n += t.size();
    }
    return n;
  }
  int64_t trainable_parameters() const {
    int64_t n = 0;
    for (const Tensor& t : tensors) n += t.trainable ? t.size() : 0;
    return n;
  }
  int64_t first_trainable() const {  // arena offset
    for (const Tensor& t : tensors)
      if (t.trainable) return t.offset;
    return size;
  }
  int find(std::string_view name) const {  // index, -1 when absent
    for (size_t i = 0; i < tensors.size(); i++)
      if (tensors[i].name == name) return int(i);
    return -1;
  }
};

// Muon for the block matrices when `muon`, AdamW for the rest (reference: models of GPT-2 start
// from N(0, .02), new ones from N(0, 1/sqrt(fan-in)) with zero projections into the residual).
inline ParamTable make_table(const Config& c, bool muon = false, Lora lora = {}) {
  ParamTable table;
  table.lora = lora;
  const bool g = c.family == Family::gpt2;
  const double residual_std = g ? .02 / std::sqrt(2. * c.L) : 0;
  const auto fan_in_std = [&](int in) { return g ? .02 : 1 / std::sqrt(double(in)); };
  const auto align = [&] { table.size = (table.size + 15) / 16 * 16; };  // 64 bytes: a cache line
  const auto append = [&](Tensor t, int padded_out = 0) {
    t.offset = table.size;
    if (t.disk_out == 0) t.disk_out = t.out;
    table.size += int64_t(std::max(padded_out, t.out)) * t.in;
    table.tensors.push_back(std::move(t));
    return table.tensors.back().offset;
  };
  const auto add = [&](Tensor t, int padded_out = 0) {
    align();
    return append(std::move(t), padded_out);
  };
  const auto vector = [&](const std::string& name, int n, const std::string& disk, bool one) {
    return add(
        {.name = name, .kind = Kind::vector, .out = n, .in = 1, .disk = disk, .init_one = one});
  };
  const auto norm = [&](const std::string& name, const std::string& disk) {
    Norm n;
    n.weight = vector(name + ".weight", c.C, disk + ".weight", true);
    if (g) n.bias = vector(name + ".bias", c.C, disk + ".bias", false);
    return n;
  };
  // One GEMM from `parts` of (name, outputs, name on disk). gpt2 stores q, k, v as one tensor.
  struct Part {
    std::string name;
    int out;
    std::string disk;
  };
  const auto linear = [&](const std::vector<Part>& parts, int in, double std, bool has_bias) {
    Linear l{.in = in};
    for (const Part& p : parts) l.out += p.out;
    for (const bool bias : {false, true}) {
      if (bias && !has_bias) break;
      align();
      int begin = 0;
      for (const Part& p : parts) {
        const bool fused = g && parts.size() > 1;
        Tensor t{.name = p.name + (bias ? ".bias" : ".weight"),
                 .kind = bias ? Kind::vector : Kind::matrix,
                 .out = p.out,
                 .in = bias ? 1 : in,
                 .disk = p.disk + (bias ? ".bias" : ".weight"),
                 .disk_begin = fused ? begin : 0,
                 .disk_out = fused ? l.out : p.out,
                 .transposed = g && !bias,
                 .init_std = bias ? 0 : std,
                 .decay = !bias,
                 .muon = !bias && muon};
        const int64_t offset = append(std::move(t));
        if (begin == 0) (bias ? l.bias : l.weight) = offset;
        begin += p.out;
      }
    }
    return l;
  };

  const std::string root = g ? "transformer." : "model.";
  table.wte = add({.name = "wte",
                   .kind = Kind::embedding,
                   .out = c.V,
                   .in = c.C,
                   .disk = root + (g ? "wte.weight" : "embed_tokens.weight"),
                   .init_std = g || c.tied ? .02 : 1},
                  c.padded_V());
  if (g) {
    table.wpe = add({.name = "wpe",
                     .kind = Kind::position,
                     .out = c.T,
                     .in = c.C,
                     .disk = root + "wpe.weight",
                     .init_std = .01});
  }
  for (int i = 0; i < c.L; i++) {
    const std::string b = "blocks." + std::to_string(i) + ".";
    const std::string d = root + (g ? "h." : "layers.") + std::to_string(i) + ".";
    const std::string attn = d + (g ? "attn." : "self_attn.");
    const int q = c.NH * c.HS, kv = c.NKV * c.HS;
    Block block;
    block.norm1 = norm(b + "norm1", d + (g ? "ln_1" : "input_layernorm"));
    block.qkv = linear({{b + "q", q, attn + (g ? "c_attn" : "q_proj")},
                        {b + "k", kv, attn + (g ? "c_attn" : "k_proj")},
                        {b + "v", kv, attn + (g ? "c_attn" : "v_proj")}},
                       c.C, fan_in_std(c.C), c.has_qkv_biases());
    if (c.family == Family::qwen3) {
      block.q_norm = vector(b + "q_norm.weight", c.HS, attn + "q_norm.weight", true);
      block.k_norm = vector(b + "k_norm.weight", c.HS, attn + "k_norm.weight", true);
    }
    block.o = linear({{b + "o", c.C, attn + (g ? "c_proj" : "o_proj")}}, q, residual_std, g);
    block.norm2 = norm(b + "norm2", d + (g ? "ln_2" : "post_attention_layernorm"));
    block.up =
        g ? linear({{b + "up", c.F, d + "mlp.c_fc"}}, c.C, fan_in_std(c.C), g)
          : linear({{b + "gate", c.F, d + "mlp.gate_proj"}, {b + "up", c.F, d + "mlp.up_proj"}},
                   c.C, fan_in_std(c.C), g);
    block.down =
        linear({{b + "down", c.C, d + (g ? "mlp.c_proj" : "mlp.down_proj")}}, c.F, residual_std, g);
    table.blocks.push_back(block);
  }
  table.final_norm = norm("final_norm", root + (g ? "ln_f" : "norm"));
  table.head = {.weight = table.wte, .out = c.padded_V(), .in = c.C};
  if (c.head == Head::scalar) {
    table.head.out = 1;
    table.head.weight = add({.name = "score",
                             .kind = Kind::head,
                             .out = 1,
                             .in = c.C,
                             .disk = "score.weight",
                             .init_std = 1 / std::sqrt(c.C + 1.)});
  } else if (!c.tied) {
    table.head.weight = add({.name = "head",
                             .kind = Kind::head,
                             .out = c.V,
                             .in = c.C,
                             .disk = "lm_head.weight",
                             .init_std = g ? .02 : .001,
                             .decay = true},
                            c.padded_V());
  }
  align();
  if (lora.rank > 0) {
    for (Tensor& t : table.tensors) t.trainable = false;
    const size_t rows = table.tensors.size();
    const auto adapters = [&](Linear& l) {  // one for each tensor on disk that the group holds
      for (size_t i = 0; i < rows; i++) {
        const Tensor t = table.tensors[i];
        if (t.kind != Kind::matrix || t.offset < l.weight ||
            t.offset >= l.weight + int64_t(l.out) * l.in || t.disk_begin > 0) {
          continue;
        }
        const auto row = [&](const char* which, int out, int in, double std) {
          return add({.name = t.name.substr(0, t.name.rfind(".weight")) + ".lora_" + which,
                      .kind = Kind::adapter,
                      .out = out,
                      .in = in,
                      .disk = adapter_name(t.disk, which),
                      .init_std = std});
        };
        const int begin = int((t.offset - l.weight) / l.in);
        const int64_t a = row("A", lora.rank, l.in, 1 / std::sqrt(3. * l.in));  // as PEFT's uniform
        l.adapters.push_back({a, row("B", t.disk_out, lora.rank, 0), begin, t.disk_out});
      }
    };
    for (Block& b : table.blocks)
      for (Linear* l : {&b.qkv, &b.o, &b.up, &b.down}) adapters(*l);
    align();
  }
  return table;
}

// A tensor's initial values: a function of the seed, its name and the element's index alone.
inline std::vector<float> initial_values(const Tensor& t, uint64_t seed) {
  std::vector<float> values(size_t(t.size()), t.init_one ? 1.f : 0.f);
  if (t.init_std == 0) return values;
  const uint64_t stream = mix64(seed, hash64(t.name));
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < values.size(); i++) {
    values[i] = float(Rng{stream, 2 * i}.normal() * t.init_std);  // normal() takes two numbers
  }
  return values;
}

// Radians a position turns each of the HS/2 pairs by: theta^(-2i/HS). rope_type linear divides all
// of them by `factor` (position interpolation: Chen et al. 2023). llama3 divides those of long
// wavelengths alone, with a smooth passage between (Llama 3 report 2024).
inline std::vector<double> rope_frequencies(const Config& c) {
  std::vector<double> frequency(size_t(c.HS / 2));
  const Rope& r = c.rope;
  for (int i = 0; i < c.HS / 2; i++) {
    double f = std::pow(r.theta, -2. * i / c.HS);
    if (r.linear) {
      f /= r.factor;
    } else if (r.factor > 0) {
      const double turns = r.original_T * f / 6.283185307179586;  // in the original context
      const double mix = std::clamp(
          (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor), 0., 1.);
      f = (1 - mix) * f / r.factor + mix * f;
    }
    frequency[size_t(i)] = f;
  }
  return frequency;
}

// ---------------------------------------------------------------------------------------------
// What goes through an engine

struct Batch {                      // documents packed end to end: no padding anywhere
  std::span<const int> tokens;      // (N) ids
  std::span<const int> targets;     // (N) id to predict at each position, or -1 for none
  std::span<const int> doc_starts;  // (D+1) offsets; attention and positions restart at each
  float temperature = 1;            // of the distribution that is scored
};

enum class Pass {
  train,  // keeps what backward needs
  score,  // keeps no activations
};

// The activations that an engine's memory holds after a forward pass.
enum class Saved {
  all,           // of every layer, for the backward pass
  light,         // the same without norm1, norm2 and act, which are made again from x, mid and up
  layer_inputs,  // and those of the last layer; a layer's others are made again when it comes to it
  none,          // one layer's memory serves all
};

// What an engine asks of a batch before it goes through a model.
inline void check_batch(const Config& c, const Batch& batch) {
  const auto N = int64_t(batch.tokens.size());
  const auto& starts = batch.doc_starts;
  if (N == 0 || N > 1 << 28) fail("batch: found ", N, " tokens, expected 1 to ", 1 << 28);
  if (starts.size() < 2 || starts.front() != 0 || starts.back() != N) {
    fail("batch: doc_starts must begin with 0 and end with the number of tokens");
  }
  const bool lm = c.head == Head::lm;
  if (lm && int64_t(batch.targets.size()) != N) {
    fail("batch: found ", batch.targets.size(), " targets, expected ", N);
  }
  if (!(batch.temperature > 0))
    fail("batch: temperature: found ", batch.temperature, ", expected above 0");
  for (size_t d = 0; d + 1 < starts.size(); d++) {
    const int length = starts[d + 1] - starts[d];
    if (length <= 0 || length > c.T) {
      fail("batch: document ", d, ": found ", length, " tokens, expected 1 to the context of ",
           c.T);
    }
  }
  for (size_t n = 0; n < batch.tokens.size(); n++) {
    const int token = batch.tokens[n], target = lm ? batch.targets[n] : -1;
    if (token < 0 || token >= c.V || target < -1 || target >= c.V) {
      fail("batch: position ", n, ": found token ", token, " and target ", target,
           ", expected ids below ", c.V);
    }
  }
}

// The same for the weights of its N positions.
inline void check_weights(const Config& c, int N, std::span<const float> dlogp,
                          std::span<const float> dvalue, std::span<const float> dentropy) {
  const auto check = [&](const char* name, std::span<const float> w, bool wanted) {
    if (w.empty()) return;
    if (!wanted) fail(name, ": this model's head does not make it");
    if (w.size() != size_t(N)) {
      fail(name, ": found ", w.size(), " weights, expected one for each of ", N, " tokens");
    }
  };
  check("dlogp", dlogp, c.head == Head::lm);
  check("dentropy", dentropy, c.head == Head::lm);
  check("dvalue", dvalue, c.head == Head::scalar);
}

struct OptimizerStep {
  int64_t step = 1;                // 1 for the first: AdamW's bias correction
  std::array<float, kKinds> lr{};  // AdamW's learning rate for each Kind
  float beta1 = .9f, beta2 = .95f, eps = 1e-8f;
  float decay = 0;  // AdamW's weight decay, on rows that say so
  float muon_lr = 0, muon_momentum = .95f, muon_decay = 0;
  float max_norm = 0;  // of the whole gradient, which is scaled down to it; 0: any
};

struct UpdateStats {     // of an update
  double grad_norm = 0;  // before clipping
  bool skipped = false;  // the norm was not finite: weights and optimizer state are untouched
  double loss = 0;       // sum of dlogp logp over its batches: the mean when weights are -1/N
};

// How an inference model keeps a matrix (cake/number_formats.h). Products are summed in float; with
// q8_0 the input is quantized too.
enum class WeightType { f32, f16, bf16, q8_0 };
inline constexpr const char* kWeightTypeNames[] = {"f32", "f16", "bf16", "q8_0"};
inline constexpr int kWeightTypes = 4;
// Of keys and values. automatic: f32 on the CPU; on CUDA the type of the activations.
enum class CacheType { automatic, f32, bf16 };

enum class Slot { weight, gradient, moment1, moment2 };  // Muon's momentum is moment1

struct Sampling {  // in this order: penalty, biases, temperature, min_p, top_k, top_p of what is
                   // left
  float temperature = 1;  // 0: the most likely token, the smallest id among equals
  int top_k = 0;          // 0: all
  float top_p = 1, min_p = 0;
  int vocab = 0;                 // ids from here on, which no token has, are never sampled; 0: none
  float repetition_penalty = 1;  // of logits of tokens that the sequence holds (Keskar 2019)
  uint64_t seed = 0;             // the draw is a function of (seed, stream, position)
  uint64_t stream = 0;           // tells sequences with one seed apart
};

struct LogitBias {  // is added to the logit of a token before one is sampled
  int id = 0;
  float bias = 0;
};

struct DecodeRow {
  int sequence = 0;             // of the cache
  std::span<const int> tokens;  // to append: a prompt, or the token sampled last
  Sampling sampling;
  std::span<const int> history;  // for the repetition penalty: all tokens of the sequence so far
  int top = -1;  // score the sampled token, with so many of the likeliest ones; -1: no score
  std::span<const LogitBias> biases;  // each id once; after the repetition penalty
  // Known tokens to score: targets[t] as the one after tokens[t]. No more than tokens.
  std::span<const int> targets;
  bool want_distribution = false;  // that the token is sampled from
};

// How likely the model finds a token: under softmax(logits), which is the model's own distribution,
// before temperature, penalties and truncation.
struct TopToken {
  int id = 0;
  float logp = 0;
};
struct TokenScore {
  float logp = 0;
  std::vector<TopToken> top;  // the likeliest tokens, in order; the smallest id first among equals
  int rank = 0;  // in that order, among all ids below Sampling::vocab; 1: the likeliest
};

// What a token is sampled from. (V) each.
struct Distribution {
  std::vector<float> logp;  // under softmax(logits), as in TokenScore
  // With which each token is sampled: penalty, biases, temperature, min_p, top_k and top_p are in
  // it, and 0 is a token that they leave out. They sum to 1.
  std::vector<float> probability;
};

struct DecodeResult {         // one entry a row, for the position after its last token
  std::vector<int> ids;       // -1 where a logit is not finite: then decode throws Error
  std::vector<float> logp;    // of the id under softmax(logits / temperature) (temperature 0: 1)
  std::vector<float> logits;  // (rows, V), on request
  // Of a row with top >= 0: of its sampled id. Otherwise empty.
  std::vector<TokenScore> scores;
  // Of each row's targets, with as many of the likeliest tokens as `top` says.
  std::vector<std::vector<TokenScore>> target_scores;
  std::vector<Distribution> distributions;  // of the rows that want theirs. Otherwise empty.

  void make_scores(std::span<const DecodeRow> rows) {  // empty ones, for an engine to fill
    scores.assign(rows.size(), {});
    target_scores.assign(rows.size(), {});
    distributions.assign(rows.size(), {});
    for (size_t r = 0; r < rows.size(); r++) target_scores[r].resize(rows[r].targets.size());
  }
};

// Sequences over pages of 64 positions; pages are shared between forks and copied when written.
// This is the bookkeeping; the memory of the pages is the engine's. A cache grows: it takes memory
// for a page when the page is first needed, up to a limit. Pages that were freed are used again
// before new ones are made, and memory returns to the system with the cache.
inline constexpr int kPage = 64;

class KvCache {
 public:
  // `limit`: positions of all sequences together, rounded up to pages.
  explicit KvCache(int64_t limit) : limit_((limit + kPage - 1) / kPage) {}
  virtual ~KvCache() = default;

  int create() {  // an empty sequence
    for (size_t s = 0; s < sequences_.size(); s++)
      if (!sequences_[s].alive) return sequences_[s].alive = true, int(s);
    sequences_.push_back({.alive = true});
    return int(sequences_.size()) - 1;
  }
  int fork(int sequence) {  // a new sequence that shares every page of this one
    const int s = create();
    sequences_[size_t(s)] = sequences_[size_t(sequence)];
    for (int p : sequences_[size_t(s)].pages) references_[size_t(p)]++;
    return s;
  }
  void truncate(int sequence, int length) {
    Sequence& s = sequences_[size_t(sequence)];
    s.length = std::min(s.length, length);
    while (int(s.pages.size()) * kPage >= s.length + kPage) {
      release(s.pages.back());
      s.pages.pop_back();
    }
  }
  void free(int sequence) {
    truncate(sequence, 0);
    sequences_[size_t(sequence)].alive = false;
  }
  int length(int sequence) const { return sequences_[size_t(sequence)].length; }
  const std::vector<int>& pages(int sequence) const { return sequences_[size_t(sequence)].pages; }
  // That are left up to the limit, in memory or not.
  int64_t free_positions() const { return free_pages() * kPage; }
  // Whose memory was taken: the most that were in use at one time.
  int64_t pages_in_memory() const { return int64_t(references_.size()); }
  // Pages that n more positions would take.
  int pages_needed(int sequence, int n) const {
    const Sequence& s = sequences_[size_t(sequence)];
    const bool copied = s.length % kPage != 0 && references_[size_t(s.pages.back())] > 1;
    return (s.length + n + kPage - 1) / kPage - int(s.pages.size()) + (n > 0 && copied);
  }

  // Takes the memory that all rows' new tokens need. Throws Error, and changes no sequence, when a
  // sequence is in two rows, when the limit is reached, or when there is no memory.
  void make_room(std::span<const DecodeRow> rows) {
    std::vector<bool> in_call(sequences_.size());
    std::map<int, int> writers;  // of a page that ends several sequences
    int64_t need = 0;
    for (const DecodeRow& row : rows) {
      if (in_call.at(size_t(row.sequence))) {
        fail("decode: found sequence ", row.sequence, " in two rows, expected it in one");
      }
      in_call[size_t(row.sequence)] = true;
      need += pages_needed(row.sequence, int(row.tokens.size()));
      // When every holder of a page replaces it by a copy, the last one writes in place instead.
      const Sequence& s = sequences_[size_t(row.sequence)];
      if (s.length % kPage == 0 || references_[size_t(s.pages.back())] == 1) continue;
      need -= ++writers[s.pages.back()] == references_[size_t(s.pages.back())];
    }
    make_pages(need);
  }

  // For engines: makes room for n more positions. The first of them may stand in a page that a fork
  // shares: then the page is replaced, and copy(src, dst) must copy its memory.
  template <class Copy>
  void append(int sequence, int n, Copy&& copy) {
    Sequence& s = sequences_[size_t(sequence)];
    if (s.length % kPage != 0 && references_[size_t(s.pages.back())] > 1) {
      const int fresh = pop_free_page();
      copy(s.pages.back(), fresh);
      release(s.pages.back());
      s.pages.back() = fresh;
    }
    s.length += n;
    while (int(s.pages.size()) * kPage < s.length) s.pages.push_back(pop_free_page());
  }

 private:
  struct Sequence {
    std::vector<int> pages;
    int length = 0;
    bool alive = false;
  };
  // For engines: memory for the pages 0 .. pages - 1. Those that had memory keep it and its
  // content. Throws Error when there is none.
  virtual void reserve_memory([[maybe_unused]] int64_t pages) {}

  int64_t free_pages() const { return int64_t(free_.size()) + limit_ - pages_in_memory(); }
  // Makes new pages until `need` of those in memory are free.
  void make_pages(int64_t need) {
    if (need > free_pages()) {
      fail("the KV cache is full: found ", free_pages(), " of its ", limit_, " pages of ", kPage,
           " positions free, expected ", need);
    }
    const int64_t before = pages_in_memory(), added = need - int64_t(free_.size());
    if (added <= 0) return;
    reserve_memory(before + added);
    references_.resize(size_t(before + added), 0);
    std::vector<int> pages;  // the last is used first
    for (int64_t p = before + added; p-- > before;) pages.push_back(int(p));
    free_.insert(free_.begin(), pages.begin(), pages.end());
  }
  int pop_free_page() {
    make_pages(1);
    const int p = free_.back();
    free_.pop_back();
    references_[size_t(p)] = 1;
    return p;
  }
  void release(int p) {
    if (--references_[size_t(p)] == 0) free_.push_back(p);
  }
  int64_t limit_;                // pages
  std::vector<int> references_;  // of each page that has memory
  std::vector<int> free_;        // pages that have memory and no reference
  std::vector<Sequence> sequences_;
};

// The room that a call to decode makes for its new tokens in the cache. When the call fails, its
// sequences get their old lengths back: no position is left without its key and value.
class NewPositions {
 public:
  template <class Copy>
  NewPositions(KvCache& cache, std::span<const DecodeRow> rows, Copy&& copy)
      : cache_(cache), rows_(rows) {
    cache.make_room(rows);
    for (const DecodeRow& row : rows) {
      lengths_.push_back(cache.length(row.sequence));
      cache.append(row.sequence, int(row.tokens.size()), copy);
    }
  }
  NewPositions(const NewPositions&) = delete;
  NewPositions& operator=(const NewPositions&) = delete;
  ~NewPositions() {
    for (size_t r = 0; r < lengths_.size(); r++) {
      cache_.truncate(rows_[r].sequence, lengths_[r]);
    }
  }
  void keep() { lengths_.clear(); }  // the call succeeded

 private:
  KvCache& cache_;
  std::span<const DecodeRow> rows_;
  std::vector<int> lengths_;  // before the call
};

// The new tokens of a call to decode, checked and packed end to end.
struct NewTokens {
  std::vector<int> tokens, positions;  // (N) ids, and positions in their sequences
  std::vector<int> starts;             // (R+1) where the tokens of each row begin
  std::vector<int> lengths;            // (R) of the sequences before this call
};
inline NewTokens pack_new_tokens(const Config& c, const KvCache& cache,
                                 std::span<const DecodeRow> rows) {
  if (c.head != Head::lm) fail("decode: a model with a scalar head samples nothing");
  NewTokens all;
  all.starts = {0};
  for (const DecodeRow& row : rows) {
    const int length = cache.length(row.sequence), n = int(row.tokens.size());
    if (n == 0 || length + n > c.T) {
      fail("decode: found ", n, " tokens after ", length, ", expected 1 up to the context of ",
           c.T);
    }
    const auto expect_token = [&](int token) {
      if (token < 0 || token >= c.V) fail("decode: found token ", token, ", expected below ", c.V);
    };
    if (row.targets.size() > size_t(n)) {
      fail("decode: found ", row.targets.size(), " targets of ", n, " tokens, expected no more");
    }
    for (const int target : row.targets) expect_token(target);
    for (const LogitBias& b : row.biases) expect_token(b.id);
    for (int t = 0; t < n; t++) {
      const int token = row.tokens[size_t(t)];
      expect_token(token);
      all.tokens.push_back(token);
      all.positions.push_back(length + t);
    }
    all.starts.push_back(int(all.tokens.size()));
    all.lengths.push_back(length);
  }
  return all;
}

// What decode sampled, or Error: logits that are not finite have no distribution.
inline void expect_sampled(const DecodeResult& result, const NewTokens& added) {
  for (size_t r = 0; r < result.ids.size(); r++) {
    if (result.ids[r] >= 0) continue;
    const int n = added.lengths[r] + added.starts[r + 1] - added.starts[r];
    fail("decode: after ", n, " tokens: found logits that are not finite, expected numbers; ",
         "the model diverged while it was trained, or its weights are damaged");
  }
}

// ---------------------------------------------------------------------------------------------
// The engine

inline constexpr int kPrefillTokens = 512;  // of an engine that names no other number

class Gpt {
 public:
  virtual ~Gpt() = default;
  const Config& config() const { return config_; }
  const ParamTable& table() const { return table_; }

  // Log-probabilities of the batch's targets, or values. One live forward: its activations stay
  // until the next forward; decode does not disturb them.
  virtual void forward(const Batch&, Pass) = 0;
  // From dL/dlogp, dL/dvalue, dL/dentropy, each (N) or empty; adds to the gradients.
  virtual void backward(std::span<const float> dlogp, std::span<const float> dvalue = {},
                        std::span<const float> dentropy = {}) = 0;
  // The same two for weights that are known beforehand: the logits are made once.
  virtual void forward_backward(const Batch&, std::span<const float> dlogp,
                                std::span<const float> dvalue = {},
                                std::span<const float> dentropy = {}) = 0;
  // Clips, steps every trainable tensor by its optimizer, clears the gradients.
  virtual void update(const OptimizerStep&) = 0;
  // Of the last update, or of the one before it: waits for that update, not for what came after.
  virtual UpdateStats stats(int updates_ago = 0) = 0;
  // Whether calls return before the device has done what they ask for.
  virtual bool queues_work() const { return false; }
  virtual void zero_gradients() = 0;
  // LoRA: off, the model computes as if it had no adapters, which is the model they were added to.
  // It only scores and decodes then: with Pass::train and in backward passes that is an Error.
  void use_adapters(bool on) { adapters_ = on && table_.lora.rank > 0; }

  // Of the last forward, (N) each; positions without a target hold 0.
  virtual std::span<const float> logp() = 0;
  virtual std::span<const float> entropy() = 0;  // nats, of the scored distribution
  virtual std::span<const float> value() = 0;    // scalar head: read after tokens[n]

  // `limit`: positions that all sequences of the cache share, rounded up to pages. Memory is taken
  // as they are used.
  virtual std::unique_ptr<KvCache> make_cache(int64_t limit,
                                              CacheType type = CacheType::automatic) = 0;
  // Appends each row's tokens to its sequence and samples the token that follows. A call that
  // throws leaves every sequence as it was.
  virtual void decode(KvCache&, std::span<const DecodeRow>, DecodeResult&, bool logits = false) = 0;
  // Tokens of prompts that one call takes at best: more of them are not faster, only larger.
  virtual int prefill_tokens() const { return kPrefillTokens; }

  // Any tensor, (out, in) row-major as float. moment1 and moment2 exist in training only.
  virtual void read(int tensor, Slot, std::span<float> out) const = 0;
  virtual void write(int tensor, Slot, std::span<const float> in) = 0;
  // How this model keeps the weights of a tensor: GptOptions::weights.
  WeightType weight_type(int tensor) const {
    return weight_types_.empty() ? WeightType::f32 : weight_types_.at(size_t(tensor));
  }
  // The blocks of a matrix that this model keeps as q8_0, (out, in / 32) row-major: exactly these,
  // where write() would quantize floats.
  virtual void write_q8_0(int tensor, std::span<const Q8Block>) {
    fail(table_.tensors.at(size_t(tensor)).name, ": this engine keeps no matrix as q8_0");
  }

  // The plans that were chosen by timing on this device, for instance which algorithm computes each
  // product, by name. They decide the last bits of results. A run saves them, so that a resumed run
  // rounds as one that never stopped. An engine ignores plans of another kind of device.
  virtual std::map<std::string, std::string> tuned_plans() const { return {}; }
  virtual void set_tuned_plans(const std::map<std::string, std::string>&) {}

  // Operations a second that the device's datasheet promises products in this precision, without
  // sparsity: what MFU (model FLOPs utilization) is a share of. 0: unknown, as for every CPU.
  virtual double datasheet_operations() const { return 0; }

 protected:
  Gpt(Config config, bool muon, Lora lora = {})
      : config_(config), table_(make_table(config, muon, lora)), adapters_(lora.rank > 0) {}
  // `trains`: the model has gradients.
  void expect_trainable(const char* call, bool trains) const {
    if (!trains) fail(call, ": an inference model has no gradients");
    if (table_.lora.rank > 0 && !adapters_) {
      fail(call, ": found the adapters off, expected them on: nothing else is trained");
    }
  }
  Config config_;
  ParamTable table_;
  bool adapters_;                         // LoRA's take part
  std::vector<WeightType> weight_types_;  // GptOptions::weights of an engine that supports them
};

// For every engine of this process; 0: usable_cores().
void set_threads(int threads);

enum class Device { automatic, cpu, cuda };
enum class Mode { train, inference };  // inference: no gradients, no optimizer state

enum class Precision {
  automatic,  // the device's own: bf16 on CUDA, fp32 on the CPU
  fp32,
  bf16,  // activations and products; master weights, gradients and moments stay fp32. CUDA alone
};

// The largest call to decode that a stage expects, and the positions that it expects the cache to
// hold, which may be fewer than the cache's limit. The memory plan counts what they take; nothing
// is allocated before the first call.
struct DecodePlan {
  int rows = 0;           // sequences decoded together; 0: the model does not decode
  int tokens = 0;         // new tokens in a call; 0: Gpt::prefill_tokens()
  int64_t positions = 0;  // that are expected to be in the KV cache at one time
  CacheType cache = CacheType::automatic;
};
// What lowers the memory that decoding and training take.
inline constexpr const char* kDecodeFlags =
    "the number of sequences decoded together, or their length";
inline constexpr const char* kBatchFlags =
    "--micro-batch-tokens, --context, or give --recompute light or full";

// What the backward pass makes again, so that the forward pass need not keep it. none: nothing.
// light: norm1, norm2 and the MLP's activation, element by element. full: all of a layer but its
// input, by its whole forward pass. A batch gives the same bytes with each of them, but for `light`
// on CUDA where the others compute GELU within the product before it, from sums that are not yet
// rounded: those are not kept, so with `light` GELU is a kernel of its own in both passes.
enum class Recompute { none, light, full };
inline Recompute parse_recompute(const std::string& name) {
  if (name == "none") return Recompute::none;
  if (name == "light") return Recompute::light;
  if (name == "full") return Recompute::full;
  fail("--recompute: found ", name, ", expected none, light or full");
}

struct GptOptions {
  Device device = Device::automatic;
  Mode mode = Mode::train;
  Precision precision = Precision::automatic;
  Recompute recompute = Recompute::none;
  bool muon = false;     // Muon owns the block matrices
  Lora lora;             // adapters, which are then all that is trained
  int batch_tokens = 0;  // the largest N expected: sizes the activations, which grow when needed
  DecodePlan decode;
  // Inference: the type of each of the table's tensors, in its order. Empty: all f32. Tensors that
  // one product reads together (q, k, v; gate, up) have one type. q8_0 needs a row length that is a
  // multiple of 32.
  std::vector<WeightType> weights;
  Gpt* share = nullptr;  // read this model's weights, of the same Config, in place of own ones
};

// The type of the tensor at this arena offset.
inline WeightType weight_type(const ParamTable& table, const std::vector<WeightType>& types,
                              int64_t offset) {
  for (size_t i = 0; i < types.size(); i++)
    if (table.tensors[i].offset == offset) return types[i];
  return WeightType::f32;
}
// Error, with the tensor's name, for types that GptOptions::weights cannot have.
inline void check_weight_types(const ParamTable& table, const GptOptions& o) {
  if (o.weights.empty()) return;
  if (o.weights.size() != table.tensors.size()) {
    fail("weights: found ", o.weights.size(), " types, expected one for each of ",
         table.tensors.size(), " tensors");
  }
  const auto type_name = [](WeightType type) { return kWeightTypeNames[int(type)]; };
  for (size_t i = 0; i < o.weights.size(); i++) {
    const Tensor& t = table.tensors[i];
    const WeightType type = o.weights[i];
    if (type == WeightType::f32) continue;
    const bool score = t.kind == Kind::head && table.head.out == 1;
    if ((t.kind != Kind::matrix && t.kind != Kind::embedding && t.kind != Kind::head) || score) {
      fail(
          t.name, ": found type ", type_name(type),
          ", expected f32: only the matrices of blocks, the embedding and the LM head are smaller");
    }
    if (o.mode == Mode::train) {
      fail(t.name, ": found type ", type_name(type), ", expected f32 in a model that trains");
    }
    if (type == WeightType::q8_0 && t.in % kQ8Block != 0) {
      fail(t.name, ": found rows of ", t.in, " as q8_0, expected a multiple of ", kQ8Block);
    }
  }
  for (const Block& b : table.blocks) {
    for (const Linear* l : {&b.qkv, &b.o, &b.up, &b.down}) {
      const WeightType type = weight_type(table, o.weights, l->weight);
      for (size_t i = 0; i < o.weights.size(); i++) {
        const Tensor& t = table.tensors[i];
        const bool inside = t.offset >= l->weight && t.offset < l->weight + int64_t(l->out) * l->in;
        if (inside && o.weights[i] != type) {
          fail(t.name, ": found type ", type_name(o.weights[i]), ", expected ", type_name(type),
               " as the matrices that are multiplied with it have");
        }
      }
    }
  }
}

inline Saved saved_activations(const GptOptions& o) {
  if (o.mode == Mode::inference) return Saved::none;
  return o.recompute == Recompute::full    ? Saved::layer_inputs
         : o.recompute == Recompute::light ? Saved::light
                                           : Saved::all;
}

// Memory an engine will take, item by item, in bytes; known before anything is allocated.
struct MemoryPlan {
  struct Item {
    std::string what;
    int64_t bytes;
    std::string lower;  // the flag or choice that lowers it
  };
  std::vector<Item> items;
  int64_t total() const {
    int64_t n = 0;
    for (const Item& i : items) n += i.bytes;
    return n;
  }
  std::string text() const {  // "weights 1.2 GB, gradients 600 MB"
    std::string all;
    for (const Item& i : items)
      all += concat(all.empty() ? "" : ", ", i.what, " ", bytes_text(double(i.bytes)));
    return all;
  }
  const Item& largest() const {
    return *std::max_element(items.begin(), items.end(),
                             [](const Item& a, const Item& b) { return a.bytes < b.bytes; });
  }
};

MemoryPlan plan_memory(const Config&, const GptOptions&);
// Bytes of one page of a KV cache of type options.decode.cache.
int64_t cache_page_bytes(const Config&, const GptOptions&);
// Bytes that are free on the device: what the system has, or what the container's limit leaves.
int64_t free_memory(Device);
// Bytes that are free on the device once all that plan_memory counts, apart from the KV cache, has
// been taken; 0 when there are none.
int64_t memory_beside_model(const Config&, const GptOptions&);
// cpu or cuda: what `automatic` means here.
Device find_device(Device);
// Throws Error when the device was not built in, is not there, or does not compute in `precision`.
void check_device(Device, Precision precision = Precision::automatic);
// Throws Error when the device was not built in, is not there, or has too little memory. Weights
// are uninitialised: load a checkpoint or write initial_values.
std::unique_ptr<Gpt> make_gpt(const Config&, const GptOptions&);

// Operations a second that products reach at best on this device: the peak that speeds are shares
// of. The CPU's is measured with multiply-adds in registers, a GPU's with one large product.
double measure_peak(const Gpt&);
// Operations that training on packed documents takes, forward and backward.
double training_operations(const Gpt&, std::span<const int> doc_starts);

// The CUDA engine's part of the functions above, in train_gpt.cu; built in where CAKE_CUDA is
// defined.
namespace gpu {
std::string unavailable();  // why no device can be used; empty when one can
MemoryPlan plan_memory(const Config&, const GptOptions&);
int64_t cache_page_bytes(const Config&, const GptOptions&);  // of a page of the KV cache
int64_t free_memory();
std::unique_ptr<Gpt> make_gpt(const Config&, const GptOptions&);
double measure_peak(const Gpt&);
}  // namespace gpu

inline Precision parse_precision(const std::string& name) {
  if (name == "auto") return Precision::automatic;
  if (name == "f32" || name == "fp32") return Precision::fp32;
  if (name == "bf16") return Precision::bf16;
  fail("--precision: found ", name, ", expected auto, f32 or bf16");
}
inline CacheType parse_cache_type(const std::string& name) {
  if (name == "auto") return CacheType::automatic;
  if (name == "f32") return CacheType::f32;
  if (name == "bf16") return CacheType::bf16;
  fail("--cache-type: found ", name, ", expected auto, f32 or bf16");
}
inline Device parse_device(const std::string& name) {
  if (name == "auto") return Device::automatic;
  if (name == "cpu") return Device::cpu;
  if (name == "cuda") return Device::cuda;
  fail("--device: found ", name, ", expected auto, cpu or cuda");
}

}  // namespace cake
