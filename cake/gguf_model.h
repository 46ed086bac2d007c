// A model in a GGUF file: which keys are the Config, which tensors are the rows of the parameter
// table, which keys are the tokenizer. The file itself is cake/gguf.h; writing one is
// cake/gguf_export.h.
//
// A row of the table is one matrix of our engine; the file differs in three ways:
// - gpt2: q, k and v are one tensor, attn_qkv. All matrices are (out, in): nothing is transposed,
//   where Hugging Face's Conv1D stores (in, out).
// - llama: rows of q and k stand in the order of the rope that turns neighbouring pairs. See
//   gguf_row.
// - The head is absent where it is the embedding.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <climits>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/config.h"
#include "cake/gguf.h"
#include "cake/gpt.h"
#include "cake/safetensors.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Names and rows

// general.architecture, which also begins the names of its keys: "llama.block_count".
inline const char* gguf_architecture(const Config& c) { return kModelTypes[int(c.family)]; }

// The tensor in a GGUF file that holds a row of the table: "blk.3.attn_q.weight". Throws Error for
// a row that the format has no tensor for: a scalar head, adapters.
inline std::string gguf_tensor_name(const Config& c, const Tensor& t) {
  static const std::map<std::string_view, const char*> whole = {
      {"wte", "token_embd.weight"},
      {"wpe", "position_embd.weight"},
      {"final_norm.weight", "output_norm.weight"},
      {"final_norm.bias", "output_norm.bias"},
      {"head", "output.weight"}};
  static const std::map<std::string_view, const char*> in_block = {
      {"norm1", "attn_norm"}, {"q", "attn_q"},           {"k", "attn_k"},
      {"v", "attn_v"},        {"q_norm", "attn_q_norm"}, {"k_norm", "attn_k_norm"},
      {"o", "attn_output"},   {"norm2", "ffn_norm"},     {"gate", "ffn_gate"},
      {"up", "ffn_up"},       {"down", "ffn_down"}};
  const std::string_view name = t.name;
  if (const auto it = whole.find(name); it != whole.end()) return it->second;
  const std::string_view blocks = "blocks.";
  if (t.kind != Kind::adapter && name.starts_with(blocks)) {
    const size_t number_end = name.find('.', blocks.size()), part_end = name.rfind('.');
    const std::string_view part = name.substr(number_end + 1, part_end - number_end - 1);
    if (const auto it = in_block.find(part); it != in_block.end()) {
      const bool fused = c.family == Family::gpt2 && (part == "q" || part == "k" || part == "v");
      return concat("blk.", name.substr(blocks.size(), number_end - blocks.size()), ".",
                    fused ? "attn_qkv" : it->second, name.substr(part_end));
    }
  }
  fail(t.name, ": a GGUF file has no tensor for it");
}

// Its shape there, slowest dimension first: of the whole tensor, of which `t` may be a part.
inline std::vector<int64_t> gguf_shape(const Tensor& t) {
  if (t.kind == Kind::vector) return {t.disk_out};
  return {t.disk_out, t.in};
}

// RoPE turns pairs of a head's outputs. Hugging Face and our engine pair output i with i + HS/2.
// llama.cpp does the same for qwen2 and qwen3, but for llama it pairs 2i with 2i + 1, so that the
// rows of q and k are stored in another order. A model whose order is wrong writes good text for
// some twenty tokens.
inline bool gguf_permutes(const Config& c, const Tensor& t) {
  return c.family == Family::llama && t.kind == Kind::matrix &&
         (t.name.ends_with(".q.weight") || t.name.ends_with(".k.weight"));
}

// The row of the file's tensor that holds row `row` of `t`. Of a permuted head, row i of half h
// (0 or 1) is row 2 i + h.
inline int64_t gguf_row(const Config& c, const Tensor& t, int64_t row) {
  if (gguf_permutes(c, t)) {
    const int64_t head = row / c.HS, half = row % c.HS / (c.HS / 2), i = row % (c.HS / 2);
    row = head * c.HS + 2 * i + half;
  }
  return t.disk_begin + row;
}

// ---------------------------------------------------------------------------------------------
// The model

// The shortest decimal number that a float stands for: a file's 9.99999975e-06 is 1e-05.
inline double decimal_of_float(double x) {
  const auto narrow = float(x);
  if (double(narrow) != x) return x;
  std::array<char, 64> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), narrow).ptr;
  std::from_chars(text.data(), end, x);
  return x;
}

// Reads the keys of one architecture.
struct GgufConfigReader {
  const GgufFile& file;
  std::string architecture;

  std::string where() const { return file.path().string(); }
  std::string key(const char* name) const { return architecture + "." + name; }
  bool has(const char* name) const { return file.has(key(name)); }
  int size(const char* name) const {  // a count that must be there, above 0
    const int64_t x = file.integer(key(name));
    require(x > 0 && x <= 1 << 24, where(), ": ", key(name), ": found ", x, ", expected 1 to ",
            1 << 24);
    return int(x);
  }
  int size_or(const char* name, int fallback) const { return has(name) ? size(name) : fallback; }
  double number_or(const char* name, double fallback) const {
    const double x = decimal_of_float(file.number_or(key(name), fallback));
    require(std::isfinite(x), where(), ": ", key(name), ": found ", x, ", expected a number");
    return x;
  }
  // A feature that our transformer does not have: any value but `expected` is an error.
  void only(const char* name, double expected, const char* feature) const {
    if (!has(name)) return;
    const GgufValue& value = file.keys().at(key(name));
    double found = std::nan("");
    if (const auto* u = std::get_if<uint64_t>(&value)) found = double(*u);
    if (const auto* i = std::get_if<int64_t>(&value)) found = double(*i);
    if (const auto* d = std::get_if<double>(&value)) found = *d;
    if (const auto* b = std::get_if<bool>(&value)) found = *b;
    if (found == expected) return;
    fail(where(), ": ", key(name), ": found ",
         std::isnan(found) ? "a list or a text" : concat(found), ", expected ", expected, ": ",
         feature, " not supported");
  }
  int token_id(const char* name, int V) const {  // -1: none
    const std::string key = concat("tokenizer.ggml.", name);
    if (!file.has(key)) return -1;
    const int64_t id = file.integer(key);
    if (id < 0 || id == UINT32_MAX) return -1;  // some writers' "none"
    require(id < V, where(), ": ", key, ": found ", id, ", expected less than the ", V,
            " rows of token_embd.weight");
    return int(id);
  }
};

inline void refuse_gguf_features(const GgufConfigReader& in, const Config& c) {
  in.only("expert_count", 0, "mixtures of experts are");
  in.only("expert_used_count", 0, "mixtures of experts are");
  if (in.has("attention.sliding_window") &&
      in.file.integer(in.key("attention.sliding_window")) < c.T) {
    in.only("attention.sliding_window", 0, "sliding windows are");
  }
  in.only("attention.causal", 1, "attention to later tokens is");
  in.only("use_parallel_residual", 0, "parallel blocks are");
  in.only("attention.clamp_kqv", 0, "clipped queries, keys and values are");
  in.only("attention.max_alibi_bias", 0, "ALiBi is");
  in.only("attn_logit_softcapping", 0, "capped logits are");
  in.only("final_logit_softcapping", 0, "capped logits are");
  for (const char* multiplier : {"logit_scale", "residual_scale", "embedding_scale"}) {
    if (in.has(multiplier)) in.only(multiplier, 1, "such multipliers are");
  }
  if (in.has("attention.scale") && in.file.number(in.key("attention.scale")) != 0) {
    in.only("attention.scale", double(float(1 / std::sqrt(double(c.HS)))),
            "other scales of attention are");
  }
}

// The parameters of rope_type llama3 that give these divisors of frequencies, (HS/2), which is how
// a GGUF file has them: in the tensor rope_freqs.weight. `c` is complete but for its scaling.
//
// llama3 divides frequency f by 1 / ((1 - s) / factor + s), with s = (orig f / (2 pi) - low) /
// (high - low) cut to 0..1. The divisors are 1 / f as often as s is cut, and between lie on a line
// s = slope f / (2 pi) - offset, whose two numbers give high / low and orig / low: low itself is
// free, and is 1 in all models that we know of. Throws Error where no parameters fit to 1e-6.
inline Rope fit_llama3_rope(Config c, std::span<const float> divisors, const std::string& where) {
  const size_t n = size_t(c.HS / 2);
  require(divisors.size() == n, where, ": found ", divisors.size(), " values, expected ", n);
  Rope plain = c.rope;
  plain.factor = 0;
  c.rope = plain;
  const std::vector<double> frequency = rope_frequencies(c);
  const auto fits = [&](const Rope& rope) {
    c.rope = rope;
    const std::vector<double> scaled = rope_frequencies(c);
    for (size_t i = 0; i < n; i++) {
      if (!(std::fabs(scaled[i] * divisors[i] / frequency[i] - 1) <= 1e-6)) return false;
    }
    return true;
  };
  if (fits(plain)) return plain;
  const double factor = decimal_of_float(*std::max_element(divisors.begin(), divisors.end()));
  Rope rope = plain;
  rope.factor = factor;
  rope.linear = true;  // all divided alike
  if (factor > 1 && fits(rope)) return rope;
  rope.linear = false;

  // x: turns in a context of length 1.
  std::vector<std::pair<double, double>> line;  // (x, s) of frequencies whose s is not cut
  double unscaled = 0, scaled = 0;  // the smallest x with divisor 1, the largest with `factor`
  for (size_t i = 0; i < n; i++) {
    const double x = frequency[i] / 6.283185307179586, d = divisors[i];
    if (d == 1) {
      unscaled = x;
    } else if (d == float(factor)) {
      scaled = std::max(scaled, x);
    } else {
      line.push_back({x, (1 / d - 1 / factor) / (1 - 1 / factor)});
    }
  }
  const auto accepted = [&](double low, double high, double original) {
    if (!(original >= 1 && original < INT_MAX && high > low)) return false;
    rope.low_freq_factor = low, rope.high_freq_factor = high;
    rope.original_T = int(std::llround(original));
    return fits(rope);
  };
  double high = 4, original = 0;  // for low = 1
  if (line.size() >= 2) {
    double mx = 0, ms = 0, xx = 0, xs = 0;
    for (const auto& [x, s] : line) mx += x / double(line.size()), ms += s / double(line.size());
    for (const auto& [x, s] : line) xx += (x - mx) * (x - mx), xs += (x - mx) * (s - ms);
    const double slope = xs / xx, offset = slope * mx - ms;
    high = 1 + 1 / offset, original = slope / offset;
  } else if (line.size() == 1) {
    original = (1 + (high - 1) * line[0].second) / line[0].first;
  } else if (scaled > 0) {
    original = std::floor(1 / scaled);
    high = std::min(high, original * unscaled);
  }
  for (int low = 1; low <= 16; low++) {  // original_T is whole
    if (accepted(low, std::round(high * low * 8) / 8, original * low)) return rope;
    if (accepted(low, high * low, original * low)) return rope;
  }
  fail(where, ": found divisors of the frequencies that no parameters of rope_type llama3 give, ",
       "all that is supported");
}

inline Rope gguf_rope(const GgufConfigReader& in, const Config& c) {
  Config all = c;
  Rope& rope = all.rope;
  rope.theta = in.number_or("rope.freq_base", 10000);
  const int turned = in.size_or("rope.dimension_count", c.HS);
  require(turned == c.HS, in.where(), ": ", in.key("rope.dimension_count"), ": found ", turned,
          ", expected ", c.HS, ", all of a head: partial rotary positions are not supported");
  in.only("rope.scaling.attn_factor", 1, "scaled attention is");
  // Older files have scale_linear. As in llama.cpp, a factor without a type is a linear one.
  const std::string type = in.file.text_or(in.key("rope.scaling.type"), "linear");
  if (type != "none" && type != "linear") {
    fail(in.where(), ": ", in.key("rope.scaling.type"), ": found ", type,
         ", expected none or linear, all that is supported, or the tensor rope_freqs.weight, ",
         "which is Llama 3's scaling");
  }
  const double factor = in.number_or("rope.scaling.factor", in.number_or("rope.scale_linear", 0));
  if (type == "linear" && factor != 0 && factor != 1) {
    require(factor > 1, in.where(), ": ", in.key("rope.scaling.factor"), ": found ", factor,
            ", expected at least 1");
    rope.factor = factor;
    rope.linear = true;
  }
  const GgufTensor* divisors = in.file.find("rope_freqs.weight");
  if (!divisors || c.family != Family::llama) return rope;  // another tensor that is not expected
  require(rope.factor == 0, divisors->where, ": found together with ",
          in.key("rope.scaling.factor"), ", expected one of the two");
  require(divisors->count == c.HS / 2, divisors->where, ": found ", divisors->count,
          " values, expected ", c.HS / 2);
  std::vector<float> values(size_t(divisors->count));
  divisors->read(0, values);
  return fit_llama3_rope(all, values, divisors->where);
}

// Names of tokens that end an answer. A GGUF file has room for one end-of-text token and one
// end-of-turn token, and many files lack the second, so that llama.cpp also goes by these names.
// It takes such a token as a control token whatever type the file gives it, and so do we.
inline bool gguf_name_ends_text(std::string_view name) {
  static constexpr std::string_view kNames[] = {
      "<|im_end|>",      "<|eot_id|>", "<|endoftext|>", "<|end|>",
      "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>", "</s>",
      "<EOT>",           "[EOT]",      "[EOS]",         "<｜end▁of▁sentence｜>"};
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

// Every token that ends a text or a turn, the file's eos_token_id first.
inline std::vector<int> gguf_end_tokens(const GgufConfigReader& in, int V) {
  std::vector<int> ids;
  const auto add = [&](int id) {
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  };
  add(in.token_id("eos_token_id", V));
  add(in.token_id("eot_token_id", V));
  add(in.token_id("eom_token_id", V));
  if (!in.file.has("tokenizer.ggml.tokens")) return ids;
  const std::vector<std::string>& tokens = in.file.texts("tokenizer.ggml.tokens");
  for (size_t id = 0; id < tokens.size() && int(id) < V; id++) {
    if (gguf_name_ends_text(tokens[id])) add(int(id));
  }
  return ids;
}

// Throws Error naming the file and the key for what our transformer does not have.
inline Config gguf_config(const GgufFile& file) {
  const std::string where = file.path().string();
  const GgufConfigReader in{file, file.text("general.architecture")};
  const std::string type = file.text_or("general.type", "model");
  require(type == "model", where, ": general.type: found ", type, ", expected model");
  const auto family =
      std::find(std::begin(kModelTypes), std::end(kModelTypes), std::string_view(in.architecture));
  if (family == std::end(kModelTypes)) {
    std::string known;
    for (const char* name : kModelTypes) known += concat(known.empty() ? "" : ", ", name);
    fail(where, ": general.architecture: found ", in.architecture, ", expected one of ", known);
  }
  Config c{.family = Family(family - kModelTypes)};
  const bool gpt2 = c.family == Family::gpt2;
  const GgufTensor* embedding = file.find("token_embd.weight");
  require(embedding, where, ": tensor token_embd.weight is missing");
  c.T = in.size("context_length");
  c.L = in.size("block_count");
  c.C = in.size("embedding_length");
  c.F = in.size("feed_forward_length");
  c.NH = in.size("attention.head_count");
  c.NKV = in.size_or("attention.head_count_kv", c.NH);
  require(embedding->shape.size() == 2 && embedding->shape[1] == c.C, embedding->where,
          ": found shape ", shape_text(embedding->shape), ", expected (vocabulary, ", c.C, ")");
  require(embedding->shape[0] <= 1 << 24, embedding->where, ": found ", embedding->shape[0],
          " rows, expected at most ", 1 << 24);
  c.V = int(embedding->shape[0]);
  const int V = in.size_or("vocab_size", c.V);
  require(V == c.V, where, ": ", in.key("vocab_size"), ": found ", V, ", expected the ", c.V,
          " rows of token_embd.weight");
  c.HS = in.size_or("attention.key_length", c.C / c.NH);
  require(in.has("attention.key_length") || c.C % c.NH == 0, where, ": ",
          in.key("attention.head_count"), ": found ", c.NH, ", expected a divisor of ",
          in.key("embedding_length"), " ", c.C);
  const int value_length = in.size_or("attention.value_length", c.C / c.NH);
  require(value_length == c.HS, where, ": ", in.key("attention.value_length"), ": found ",
          value_length, ", expected ", c.HS, ", as ", in.key("attention.key_length"),
          ": values of another size are not supported");
  const char* eps = gpt2 ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon";
  c.norm_eps = decimal_of_float(file.number(in.key(eps)));
  c.tied = file.find("output.weight") == nullptr;
  refuse_gguf_features(in, c);
  if (!gpt2) c.rope = gguf_rope(in, c);
  c.check(where);
  c.bos = in.token_id("bos_token_id", c.V);
  c.pad = in.token_id("padding_token_id", c.V);
  c.end_tokens = gguf_end_tokens(in, c.V);
  if (!c.end_tokens.empty()) c.eos = c.end_tokens[0];
  return c;
}

// The tensor that holds a row. Throws Error when it is missing or has another shape.
inline const GgufTensor& gguf_tensor(const GgufFile& file, const Config& c, const Tensor& t) {
  const std::string name = gguf_tensor_name(c, t);
  const GgufTensor* stored = file.find(name);
  require(stored, file.path().string(), ": tensor ", name, " is missing");
  require(stored->shape == gguf_shape(t), stored->where, ": found shape ",
          shape_text(stored->shape), ", expected ", shape_text(gguf_shape(t)));
  const int values = gguf_blocks(stored->type).values;
  require(t.in % values == 0 || t.kind == Kind::vector, stored->where, ": found ",
          gguf_blocks(stored->type).name, ", whose blocks have ", values,
          " values, expected rows of ", t.in, " to be whole blocks");
  require(t.kind != Kind::vector || values == 1, stored->where, ": found ",
          gguf_blocks(stored->type).name, ", expected f32, f16 or bf16 for a vector");
  return *stored;
}

// Values of one row of the table, in our order of its rows.
inline void read_gguf_row(const GgufFile& file, const Config& c, const Tensor& t,
                          std::span<float> out) {  // (t.out, t.in)
  const GgufTensor& stored = gguf_tensor(file, c, t);
  if (!gguf_permutes(c, t)) return stored.read(int64_t(t.disk_begin) * t.in, out);
#pragma omp parallel for schedule(static)
  for (int o = 0; o < t.out; o++) {
    stored.read(gguf_row(c, t, o) * t.in, out.subspan(size_t(o) * size_t(t.in), size_t(t.in)));
  }
}

// The same blocks of a matrix that the file stores as q8_0, (t.out, t.in / 32), for
// Gpt::write_q8_0. False where it has another type.
inline bool read_gguf_q8_0(const GgufFile& file, const Config& c, const Tensor& t,
                           std::vector<Q8Block>& out) {
  const GgufTensor& stored = gguf_tensor(file, c, t);
  if (stored.type != GgufType::q8_0) return false;
  const size_t blocks = size_t(t.in) / kQ8Block, bytes = blocks * sizeof(Q8Block);
  out.resize(size_t(t.out) * blocks);
#pragma omp parallel for schedule(static)
  for (int o = 0; o < t.out; o++) {
    std::memcpy(out.data() + size_t(o) * blocks, stored.data + size_t(gguf_row(c, t, o)) * bytes,
                bytes);
  }
  for (const Q8Block& block : out) {
    require(std::isfinite(f16_to_float(block.d)), stored.where,
            ": found a scale that is not finite, expected none");
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// The tokenizer: Tokenizer::load reads it (bpe_gguf.cpp)

// tokenizer.ggml.pre names how text is split. `pattern` is a name of ./bpe train --pattern, or
// gpt2_digits: each digit alone, then gpt2.
struct GgufPreTokenizer {
  const char* name;
  const char* pattern;
  bool ignore_merges;  // pieces that are tokens are those tokens, whatever the merges say
  bool add_bos;        // where the key add_bos_token is absent
};
// llama.cpp gives each class one of its regular expressions (src/llama-vocab.cpp). The first name
// of a class is the one to write. Its expressions are those of our patterns but for o200k's, which
// knows upper and lower case of ASCII alone.
inline constexpr GgufPreTokenizer kGgufPreTokenizers[] = {
    {"gpt-2", "gpt2", false, false},
    {"phi-2", "gpt2", false, false},
    {"mpt", "gpt2", false, false},
    {"olmo", "gpt2", false, false},
    {"jais", "gpt2", false, false},
    {"trillion", "gpt2", false, false},
    {"exaone4", "gpt2", false, false},
    {"gigachat", "gpt2", false, false},
    {"mellum", "gpt2", false, false},
    {"a.x-4.0", "gpt2", false, false},
    {"granite-docling", "gpt2", false, false},
    {"smollm", "gpt2_digits", false, false},
    {"starcoder", "gpt2_digits", false, false},
    {"refact", "gpt2_digits", false, false},
    {"command-r", "gpt2_digits", false, false},
    {"codeshell", "gpt2_digits", false, false},
    {"exaone", "gpt2_digits", false, false},
    {"minerva-7b", "gpt2_digits", false, false},
    {"mellum2", "gpt2_digits", false, false},
    {"dbrx", "cl100k", false, false},
    {"smaug-bpe", "cl100k", false, false},
    {"chatglm-bpe", "cl100k", false, false},
    {"llama-bpe", "cl100k", true, true},
    {"llama3", "cl100k", true, true},
    {"llama-v3", "cl100k", true, true},
    {"falcon3", "cl100k", true, true},
    {"falcon-h1", "cl100k", true, true},
    {"pixtral", "cl100k", true, true},
    {"midm-2.0", "cl100k", true, true},
    {"lfm2", "cl100k", true, true},
    {"glm4", "cl100k", true, false},
    {"qwen2", "qwen2", false, false},
    {"deepseek-r1-qwen", "qwen2", false, false},
    {"stablelm2", "qwen2", false, false},
    {"megrez", "qwen2", false, false},
    {"hunyuan", "qwen2", false, false},
    {"solar-open", "qwen2", false, false},
    {"kormo", "qwen2", false, false},
    {"gpt-4o", "o200k", false, false},
    {"llama4", "o200k", false, false},
    {"kanana2", "o200k", false, false},
};

// tokenizer.chat_template, empty where there is none.
inline std::string gguf_chat_template(const GgufFile& file) {
  return file.text_or("tokenizer.chat_template", "");
}

}  // namespace cake
