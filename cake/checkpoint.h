// A model: a directory as Hugging Face's transformers reads and writes it, with the trainer's state
// beside the model, or a .gguf file (cake/gguf_model.h), which every stage reads in its place.
//
//     config.json             Config: cake/config.h
//     generation_config.json  the ids of tokens that end a text, and how others sample
//     model.safetensors       weights: load_weights, cake/safetensors.h; or shards with
//                             model.safetensors.index.json
//     tokenizer.json ...      copied from the tokenizer's directory
//     trainer_state.json      what a run needs to go on from here
//     optimizer.safetensors   AdamW's and Muon's moments
//
// LoRA adapters are also a directory, as PEFT reads and writes it. In place of model.safetensors it
// has
//
//     adapter_config.json        rank, alpha, the adapted matrices, and the base model's path
//     adapter_model.safetensors  A and B of each matrix; the metadata has the base model's hash
//
// load_weights reads the base model's weights and puts the adapters into their own rows. Where the
// engine was made without adapter rows, it adds them to the weights.
//
// save_checkpoint writes a whole new directory beside the old one, syncs it to the disk, and
// exchanges the two in one step. At every moment, even in a power cut, one checkpoint is complete.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/config.h"
#include "cake/gguf.h"
#include "cake/gguf_model.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/run.h"
#include "cake/safetensors.h"
#include "cake/tokenizer.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Rows of the parameter table and tensors on disk. Several rows may share one: gpt2's c_attn holds
// q, k and v, as columns, since gpt2 stores (in, out).

inline std::vector<int64_t> disk_shape(const Tensor& t) {
  if (t.kind == Kind::vector) return {t.disk_out};
  if (t.transposed) return {t.in, t.disk_out};
  return {t.disk_out, t.in};
}

// A row's values out of its place in the disk tensor.
inline void gather_row(const Tensor& t, const StoredTensor& disk, std::span<float> out) {
  if (!t.transposed) return disk.read(int64_t(t.disk_begin) * t.in, out);
  constexpr int kRows = 16;  // of the disk's, at a time: writes fill cache lines
  std::vector<float> rows(size_t(kRows) * size_t(t.out));
  for (int i0 = 0; i0 < t.in; i0 += kRows) {
    const int n = std::min(kRows, t.in - i0);
    for (int i = 0; i < n; i++) {
      disk.read(int64_t(i0 + i) * t.disk_out + t.disk_begin,
                std::span(rows).subspan(size_t(i) * size_t(t.out), size_t(t.out)));
    }
    for (int o = 0; o < t.out; o++)
      for (int i = 0; i < n; i++)
        out[size_t(o) * size_t(t.in) + size_t(i0 + i)] =
            rows[size_t(i) * size_t(t.out) + size_t(o)];
  }
}

// The inverse: a row's values into its place in the whole disk tensor.
inline void scatter_row(const Tensor& t, std::span<const float> row, std::span<float> disk) {
  if (!t.transposed) {
    std::copy(row.begin(), row.end(), disk.begin() + int64_t(t.disk_begin) * t.in);
    return;
  }
  constexpr int kRows = 16;
  for (int i0 = 0; i0 < t.in; i0 += kRows)
    for (int o = 0; o < t.out; o++)
      for (int i = i0; i < std::min(i0 + kRows, t.in); i++)
        disk[size_t(i) * size_t(t.disk_out) + size_t(t.disk_begin + o)] =
            row[size_t(o) * size_t(t.in) + size_t(i)];
}

inline void check_finite(const std::string& what, std::span<const float> values,
                         const char* consequence = "") {
  int64_t bad = 0;  // counted without a branch: as fast as memory is read
#pragma omp simd reduction(+ : bad)
  for (size_t i = 0; i < values.size(); i++) bad += !(std::fabs(values[i]) <= FLT_MAX);
  if (bad > 0) {
    fail(what, ": found ", bad, " values that are not finite, expected none", consequence);
  }
}

// Whether two tensors hold the same numbers.
inline bool are_equal(const StoredTensor& a, const StoredTensor& b) {
  if (a.shape != b.shape) return false;
  constexpr int64_t kChunk = 1 << 16;
  std::vector<float> x(kChunk), y(kChunk);
  for (int64_t i = 0; i < a.count; i += kChunk) {
    const size_t n = size_t(std::min(kChunk, a.count - i));
    a.read(i, std::span(x).first(n)), b.read(i, std::span(y).first(n));
    if (std::memcmp(x.data(), y.data(), n * sizeof(float)) != 0) return false;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Where the weights of a whole model are: the safetensors files of a directory, or a .gguf file

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual std::string hash() const = 0;  // of every byte
  virtual bool has(const Tensor& t) const = 0;
  // The file and what it calls the tensor, for errors.
  virtual std::string where(const Tensor& t) const = 0;
  // The type that the tensor has here; f32 for those that an engine does not keep.
  virtual WeightType type(const Tensor& t) const = 0;
  // The values of a row of the table, (out, in). Throws Error when they are missing or have another
  // shape.
  virtual void read(const Tensor& t, std::span<float> values) const = 0;
  // The blocks of a matrix that is stored as q8_0, (out, in / 32); false for other types.
  virtual bool read_q8_0(const Tensor&, std::vector<Q8Block>&) const { return false; }
  // Throws Error naming a tensor that is in no row of the table. `new_score`: an LM head may be.
  virtual void expect_no_others(const ParamTable& table, bool new_score) const = 0;
};

class SafeTensorsSource : public WeightSource {
 public:
  SafeTensorsSource(const std::filesystem::path& dir, const Config& c)
      : config_(c), dir_(dir), disk_(SafeTensors::of_model(dir)) {}
  std::string hash() const override { return disk_.hash(); }
  bool has(const Tensor& t) const override { return find(t.disk) != nullptr; }
  std::string where(const Tensor& t) const override { return stored(t).where; }
  WeightType type(const Tensor&) const override { return WeightType::f32; }
  void read(const Tensor& t, std::span<float> values) const override {
    const StoredTensor& tensor = stored(t);
    tensor.expect_shape(disk_shape(t));
    gather_row(t, tensor, values);
  }

  void expect_no_others(const ParamTable& table, bool new_score) const override {
    std::set<const StoredTensor*> used;
    for (const Tensor& t : table.tensors) used.insert(find(t.disk));
    for (const auto& [name, stored] : disk_.tensors()) {
      if (used.count(&stored)) continue;
      const bool buffer = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") ||
                          name.ends_with("rotary_emb.inv_freq");
      if (buffer) continue;  // constants that older versions of transformers stored
      if (name == "lm_head.weight" && config_.head == Head::scalar && new_score) continue;
      if (name == "lm_head.weight" && config_.head == Head::lm && config_.tied) {
        expect_equal_to_embedding(stored, table);
        continue;
      }
      fail(stored.where, ": found a tensor that a ", architecture_name(config_),
           " of this config.json does not have");
    }
  }

 private:
  // transformers also writes base models, without `transformer.` or `model.` in front.
  const StoredTensor* find(const std::string& name) const {
    const std::string root = config_.family == Family::gpt2 ? "transformer." : "model.";
    const StoredTensor* t = disk_.find(name);
    return t || !name.starts_with(root) ? t : disk_.find(name.substr(root.size()));
  }
  const StoredTensor& stored(const Tensor& t) const {
    const StoredTensor* tensor = find(t.disk);
    if (!tensor) fail((dir_ / "model.safetensors").string(), ": tensor ", t.disk, " is missing");
    return *tensor;
  }
  void expect_equal_to_embedding(const StoredTensor& lm_head, const ParamTable& table) const {
    const StoredTensor& embedding = stored(table.tensors[size_t(table.find("wte"))]);
    lm_head.expect_shape(embedding.shape);
    if (!are_equal(lm_head, embedding)) {
      fail(lm_head.where,
           ": found values that differ from the embedding, expected the same: "
           "tie_word_embeddings is true");
    }
  }

  Config config_;
  std::filesystem::path dir_;
  SafeTensors disk_;
};

class GgufSource : public WeightSource {
 public:
  GgufSource(const std::filesystem::path& path, const Config& c) : config_(c), file_(path) {}
  std::string hash() const override { return file_.hash(); }
  bool has(const Tensor& t) const override {
    return t.name != "score" && file_.find(gguf_tensor_name(config_, t)) != nullptr;
  }
  std::string where(const Tensor& t) const override { return stored(t).where; }
  WeightType type(const Tensor& t) const override {
    switch (stored(t).type) {
      case GgufType::f16:
        return WeightType::f16;
      case GgufType::bf16:
        return WeightType::bf16;
      case GgufType::q8_0:
        return WeightType::q8_0;
      default:
        return WeightType::f32;
    }
  }
  void read(const Tensor& t, std::span<float> values) const override {
    read_gguf_row(file_, config_, t, values);
  }
  bool read_q8_0(const Tensor& t, std::vector<Q8Block>& blocks) const override {
    return read_gguf_q8_0(file_, config_, t, blocks);
  }
  void expect_no_others(const ParamTable& table, bool new_score) const override {
    std::set<std::string> used;
    for (const Tensor& t : table.tensors) {
      if (t.kind != Kind::adapter && t.name != "score") used.insert(gguf_tensor_name(config_, t));
    }
    if (config_.family == Family::llama) used.insert("rope_freqs.weight");  // in gguf_config
    if (config_.head == Head::scalar && new_score) used.insert("output.weight");
    for (const GgufTensor& t : file_.tensors()) {
      if (used.count(t.name)) continue;
      fail(t.where, ": found a tensor that a ", architecture_name(config_),
           " does not have: its model computes something else");
    }
  }

 private:
  const GgufTensor& stored(const Tensor& t) const { return gguf_tensor(file_, config_, t); }
  Config config_;
  GgufFile file_;
};

inline std::unique_ptr<WeightSource> open_weights(const std::filesystem::path& model,
                                                  const Config& c) {
  if (GgufFile::is_gguf(model)) return std::make_unique<GgufSource>(model, c);
  return std::make_unique<SafeTensorsSource>(model, c);
}

// The hash of the files with a model's weights, without adapters.
inline std::string weights_hash(const std::filesystem::path& model) {
  if (GgufFile::is_gguf(model)) return GgufFile(model).hash();
  return SafeTensors::of_model(model).hash();
}

// ---------------------------------------------------------------------------------------------
// The config of a model: of a directory, which may hold adapters alone, or of a .gguf file

// Whether the head is the embedding, as the tensors say it: where config.json says otherwise, some
// program wrote one of the two and forgot the other. transformers goes by the tensors too.
inline bool is_tied(const std::filesystem::path& dir, const Config& c) {
  const bool has_weights = std::filesystem::exists(dir / "model.safetensors") ||
                           std::filesystem::exists(dir / "model.safetensors.index.json");
  if (c.head != Head::lm || !has_weights) return c.tied;
  const SafeTensors disk = SafeTensors::of_model(dir);
  const StoredTensor* head = disk.find("lm_head.weight");
  if (!head) return true;
  if (!c.tied) return false;
  for (const char* name : {"model.embed_tokens.weight", "embed_tokens.weight",
                           "transformer.wte.weight", "wte.weight"}) {
    if (const StoredTensor* embedding = disk.find(name)) return are_equal(*head, *embedding);
  }
  return true;
}

inline Config load_config(const std::filesystem::path& model) {
  if (GgufFile::is_gguf(model)) return gguf_config(GgufFile(model));
  if (!std::filesystem::exists(model / "config.json") && has_adapters(model)) {
    return load_config(load_adapter_config(model).base);
  }
  Config c = read_config(model);
  c.tied = is_tied(model, c);
  return c;
}

// The config of `model`, which must have the head that is asked for.
inline Config load_config_with_head(const std::filesystem::path& model, Head head) {
  const Config config = load_config(model);
  if (config.head != head) {
    fail(model.string(), ": found ", architecture_name(config), ", expected a ",
         head == Head::lm ? "language model" : "reward model (...ForSequenceClassification)");
  }
  return config;
}

// ---------------------------------------------------------------------------------------------
// Adapters

// The model that adapters are added to.
struct AdapterBase {
  std::filesystem::path dir;  // or a .gguf file
  std::string hash;           // weights_hash; empty: not known
};

constexpr const char* kBaseHash =
    "base_model_hash";  // in the metadata of adapter_model.safetensors

// An adapter directory, checked against the shapes of a Config before anything is used.
struct Adapters {
  AdapterConfig config;
  SafeTensors disk;
  Lora lora;  // of the first module that has adapters
  // Every module has this rank and alpha, and nothing beside A and B was trained: the rows of an
  // engine can hold them.
  bool is_uniform = true;

  Adapters(const std::filesystem::path& dir, const Config& c)
      : config(load_adapter_config(dir)),
        disk(dir / "adapter_model.safetensors"),
        path_(dir / "adapter_model.safetensors") {
    std::set<std::string> known;
    for (const Tensor& t : make_table(c, false, config.lora).tensors) {
      t.kind == Kind::adapter ? check_adapter(t, known) : check_saved(t, c, known);
    }
    int left_out = 0;
    for (const auto& [name, stored] : disk.tensors()) {
      const bool buffer = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
      left_out += known.count(name) && !is_used(name);
      if (known.count(name) || buffer) continue;
      fail(stored.where, ": found a tensor that adapters of a ", architecture_name(c),
           " do not have here: they stand beside the matrices of its blocks");
    }
    if (left_out > 0) {
      std::fprintf(stderr,
                   "note: %s: %d tensors are not used: target_modules, exclude_modules or "
                   "layers_to_transform leave their modules out\n",
                   path_.c_str(), left_out);
    }
  }
  AdapterBase base() const {
    const auto hash = disk.metadata().find(kBaseHash);
    return {config.base, hash == disk.metadata().end() ? "" : hash->second};
  }

  // The tensor of a row of kind adapter; null where its module has none.
  const StoredTensor* find(const Tensor& t) const {
    return config.adapts(module_of(t.disk)) ? disk.find(t.disk) : nullptr;
  }
  // The weights that replace a row of the base model: those of modules_to_save, and biases.
  const StoredTensor* find_saved(const Tensor& t) const {
    if (!is_saved(t)) return nullptr;
    const StoredTensor* stored = disk.find("base_model.model." + t.disk);
    return stored ? stored : disk.find(wrapped_name(t.disk));
  }

  // W += alpha / rank B A, on the row W of a matrix: (out, in)
  void add_to(const Tensor& t, std::span<float> w) const {
    const std::string name = adapter_name(t.disk, "A");
    if (!is_used(name) || !disk.find(name)) return;
    const StoredTensor& stored_a = *disk.find(name);
    const StoredTensor& stored_b = *disk.find(adapter_name(t.disk, "B"));
    const Lora of_module = config.lora_of(module_of(name));
    const size_t rank = size_t(of_module.rank), in = size_t(t.in);
    std::vector<float> a(rank * in), b(size_t(t.out) * rank);
    stored_a.read(0, a);
    stored_b.read(int64_t(t.disk_begin) * of_module.rank, b);
    check_finite(stored_a.where, a), check_finite(stored_b.where, b);
    const float scale = of_module.scale();
#pragma omp parallel for schedule(static)
    for (int o = 0; o < t.out; o++) {
      float* row = w.data() + size_t(o) * in;
      for (size_t r = 0; r < rank; r++) {
        const float x = scale * b[size_t(o) * rank + r];
        for (size_t i = 0; i < in; i++) row[i] += x * a[r * in + i];
      }
    }
  }

 private:
  // "base_model.model.X.lora_A.weight" -> "X"
  static std::string module_of(const std::string& name) {
    const size_t begin = std::strlen("base_model.model.");
    return name.substr(begin, name.rfind(".lora_") - begin);
  }
  bool is_used(const std::string& name) const {  // of a tensor that is known
    return name.rfind(".lora_") == std::string::npos || config.adapts(module_of(name));
  }
  // PEFT's name for a tensor of a module that has adapters: "....q_proj.base_layer.bias".
  static std::string wrapped_name(const std::string& disk) {
    return concat("base_model.model.", disk.substr(0, disk.rfind('.')), ".base_layer",
                  disk.substr(disk.rfind('.')));
  }
  bool is_saved(const Tensor& t) const {
    const ModuleNames saved{.names = config.saved_modules};
    return saved.contain(t.disk.substr(0, t.disk.rfind('.'))) ||
           (config.saves_biases && t.disk.ends_with(".bias"));
  }

  // A tensor of adapters as PEFT would have it: present where its module is a target, of the
  // module's rank.
  void check_adapter(const Tensor& t, std::set<std::string>& known) {
    known.insert(t.disk);
    const bool is_a = t.disk.ends_with(".lora_A.weight");
    const StoredTensor* stored = disk.find(t.disk);
    if (!stored) {
      std::string other = t.disk;
      other[other.rfind(".weight") - 1] = is_a ? 'B' : 'A';
      const bool required = config.has_targets && config.adapts(module_of(t.disk));
      if (required || disk.find(other)) {
        fail(path_.string(), ": tensor ", t.disk, " is missing");
      }
      return;
    }
    const Lora of_module = config.lora_of(module_of(t.disk));
    std::vector<int64_t> shape = disk_shape(t);
    shape[is_a ? 0 : 1] = of_module.rank;
    stored->expect_shape(shape);
    if (!is_used(t.disk)) return;
    if (lora.rank == 0) lora = of_module;
    is_uniform &= lora.rank == of_module.rank && lora.alpha == of_module.alpha;
  }
  void check_saved(const Tensor& t, const Config& c, std::set<std::string>& known) {
    if (!is_saved(t)) return;
    known.insert("base_model.model." + t.disk), known.insert(wrapped_name(t.disk));
    const StoredTensor* stored = find_saved(t);
    if (!stored && t.disk.ends_with(".bias")) return;  // PEFT writes them in some versions only
    if (!stored) fail(path_.string(), ": tensor base_model.model.", t.disk, " is missing");
    stored->expect_shape(disk_shape(t));
    if (t.kind == Kind::embedding && c.tied) {
      fail(stored->where, ": found new values of the embedding, expected a model whose ",
           "tie_word_embeddings is false: PEFT leaves the head as it was");
    }
    is_uniform = false;
  }
  std::filesystem::path path_;
};

// The base model of adapters that are trained on top of `model`: `model` itself, or, where `model`
// holds adapters, their base.
inline AdapterBase adapter_base(const std::filesystem::path& model) {
  AdapterBase base{model, ""};
  if (has_adapters(model)) base = Adapters(model, load_config(model)).base();
  if (base.hash.empty()) base.hash = weights_hash(base.dir);
  return base;
}

struct LoadOptions {
  // A model with a scalar head may begin as a language model: the LM head is dropped and the score
  // row gets initial values.
  bool new_score = false;
  uint64_t seed = 0;           // of the score's and of new adapters' initial values
  bool interruptible = false;  // a signal ends it between two tensors: throws Interrupted
};

// Reads the weights of `model`, which must have all of them. Adapters, if there are any, go into
// their rows or are added to the weights.
inline void load_whole_model(const std::filesystem::path& model, Gpt& gpt, const Adapters* adapters,
                             const LoadOptions& options) {
  const std::unique_ptr<WeightSource> source = open_weights(model, gpt.config());
  if (adapters && !adapters->base().hash.empty() && source->hash() != adapters->base().hash) {
    fail(model.string(), ": found weights of hash ", source->hash(), ", expected ",
         adapters->base().hash, ", those that the adapters were trained on: the model has changed");
  }
  const bool rows = gpt.table().lora.rank > 0;  // for adapters
  const std::vector<Tensor>& tensors = gpt.table().tensors;
  std::vector<float> values;
  std::vector<Q8Block> blocks;
  for (size_t i = 0; i < tensors.size(); i++) {
    if (options.interruptible) stop_if_signalled();
    const Tensor& t = tensors[i];
    values.resize(size_t(t.size()));
    if (t.kind == Kind::adapter) {
      const StoredTensor* stored = adapters ? adapters->find(t) : nullptr;
      if (stored) {
        stored->expect_shape(disk_shape(t));
        gather_row(t, *stored, values);
        check_finite(stored->where, values);
      } else {
        values = initial_values(t, options.seed);
      }
      gpt.write(int(i), Slot::weight, values);
      continue;
    }
    if (t.name == "score" && options.new_score && !source->has(t)) {
      gpt.write(int(i), Slot::weight, initial_values(t, options.seed));
      continue;
    }
    if (const StoredTensor* saved = adapters ? adapters->find_saved(t) : nullptr) {
      gather_row(t, *saved, values);
      check_finite(saved->where, values);
      gpt.write(int(i), Slot::weight, values);
      continue;
    }
    const bool added = adapters && !rows && t.kind == Kind::matrix;
    if (!added && gpt.weight_type(int(i)) == WeightType::q8_0 && source->read_q8_0(t, blocks)) {
      gpt.write_q8_0(int(i), blocks);
      continue;
    }
    source->read(t, values);
    check_finite(source->where(t), values);
    if (added) adapters->add_to(t, values);
    gpt.write(int(i), Slot::weight, values);
  }
  source->expect_no_others(gpt.table(), options.new_score);
  if (gpt.config().head != Head::lm || GgufFile::is_gguf(model)) return;
  if (const bool said = read_config(model).tied; said != gpt.config().tied) {
    std::fprintf(stderr, "note: %s: tie_word_embeddings is %s, but %s\n",
                 (model / "config.json").c_str(), said ? "true" : "false",
                 said ? "lm_head.weight differs from the embedding: it is the head"
                      : "there is no lm_head.weight: the embedding is the head");
  }
}

// Fills every weight from a model directory or a .gguf file. Throws an Error that names the tensor
// which is missing, unexpected, not finite, or of another shape or type than the Config says. Where
// `gpt` has adapters and `dir` has none, they get initial values, and `gpt` computes the same as
// the model in `dir`.
inline void load_weights(const std::filesystem::path& dir, Gpt& gpt,
                         const LoadOptions& options = {}) {
  if (!has_adapters(dir)) return load_whole_model(dir, gpt, nullptr, options);
  const Adapters adapters(dir, gpt.config());
  const Lora &found = adapters.lora, &expected = gpt.table().lora;
  if (expected.rank > 0 && !adapters.is_uniform) {
    fail((dir / "adapter_config.json").string(), ": found adapters of several ranks or alphas, or ",
         "other weights beside them, expected one rank and alpha for all of them: ./sft --merge ",
         "makes a model of them, from which new ones begin");
  }
  if (expected.rank > 0 && (found.rank != expected.rank || found.alpha != expected.alpha)) {
    fail((dir / "adapter_config.json").string(), ": found adapters of rank ", found.rank,
         " and alpha ", found.alpha, ", expected rank ", expected.rank, " and alpha ",
         expected.alpha, ": other ones begin from the merged model");
  }
  load_whole_model(adapters.config.base, gpt, &adapters, options);
}

// ---------------------------------------------------------------------------------------------
// How an engine that only computes keeps the weights

// The type of each tensor of the table, for GptOptions::weights. `request`, a value of --weights:
// - f32: all of them;
// - bf16: all matrices (the embedding and the head are such);
// - q8_0: all matrices whose rows are whole blocks of 32 values, the others stay f32;
// - auto: what `model` has: the f16, bf16 and q8_0 matrices of a .gguf file stay as they are, all
//   others are f32. Matrices that adapters are added to hold new values: f32.
// Norms, biases and positions are f32 always. Matrices that one product reads together (q, k, v;
// gate, up) are f32 when `model` has them in different types.
inline std::vector<WeightType> weight_types(const std::filesystem::path& model, const Config& c,
                                            const ParamTable& table, const std::string& request) {
  if (request != "auto" && request != "f32" && request != "bf16" && request != "q8_0") {
    fail("--weights: found ", request, ", expected auto, f32, bf16 or q8_0");
  }
  std::vector<WeightType> types(table.tensors.size(), WeightType::f32);
  if (request == "f32") return types;
  const bool adapted = has_adapters(model);
  std::unique_ptr<WeightSource> source;
  if (request == "auto") {
    source = open_weights(adapted ? load_adapter_config(model).base : model, c);
  }
  const auto type_of = [&](const Tensor& t) {
    const bool matrix = t.kind == Kind::matrix || t.kind == Kind::embedding || t.name == "head";
    if (!matrix) return WeightType::f32;
    if (request == "bf16") return WeightType::bf16;
    if (request == "q8_0") return t.in % kQ8Block == 0 ? WeightType::q8_0 : WeightType::f32;
    if (adapted && t.kind == Kind::matrix) return WeightType::f32;
    return source->has(t) ? source->type(t) : WeightType::f32;
  };
  // Rows of the table that one product reads: those between the weight's offset and its end.
  const auto agree = [&](const Linear& l) {
    std::vector<size_t> members;
    for (size_t i = 0; i < table.tensors.size(); i++) {
      const Tensor& t = table.tensors[i];
      if (t.offset >= l.weight && t.offset < l.weight + int64_t(l.out) * l.in) members.push_back(i);
    }
    for (const size_t i : members) {
      if (types[i] == types[members[0]]) continue;
      for (const size_t j : members) types[j] = WeightType::f32;
      return;
    }
  };
  for (size_t i = 0; i < types.size(); i++) types[i] = type_of(table.tensors[i]);
  for (const Block& b : table.blocks) agree(b.qkv), agree(b.up);
  return types;
}

// ---------------------------------------------------------------------------------------------
// Saving

struct SaveOptions {
  std::filesystem::path tokenizer_from;  // a directory with tokenizer.json; empty: none to copy
  // The model that this one began as: its generation_config.json is kept, with our tokens. Empty, a
  // .gguf file, or a directory without that file: there is none to keep.
  std::filesystem::path started_from;
  Json trainer_state;               // null: none
  bool optimizer = false;           // also its moments, which an exact resume needs
  FloatType type = FloatType::f32;  // of the weights; one of two bytes excludes `optimizer`
  int64_t shard_bytes = INT64_MAX;  // larger models are written as several files
  AdapterBase base;                 // of a model with adapters: only these are saved
  // Writes more into the new directory before it takes the old one's place.
  std::function<void(const std::filesystem::path& dir)> also;
};

// Bytes of a checkpoint on disk, without the tokenizer. While a checkpoint replaces another, both
// are on the disk.
inline int64_t checkpoint_bytes(const ParamTable& table, bool optimizer,
                                FloatType type = FloatType::f32) {
  int64_t bytes = 0;
  for (const Tensor& t : table.tensors) {
    if (table.lora.rank > 0 && t.kind != Kind::adapter) continue;
    bytes += t.size() * float_bytes(type) + 128;
    if (optimizer && t.trainable) bytes += t.size() * (t.muon ? 4 : 8) + 256;
  }
  return bytes + 4096;
}

// The tensors on disk of a model, or of its adapters where it has them, with the rows of the table
// that each holds.
struct DiskTensor {
  SafeTensorsWriter::Entry entry;
  std::vector<size_t> rows;
};
inline std::vector<DiskTensor> disk_tensors(const Config& c, const ParamTable& table) {
  std::vector<DiskTensor> all;
  std::map<std::string, size_t> index;
  for (size_t i = 0; i < table.tensors.size(); i++) {
    const Tensor& t = table.tensors[i];
    if (table.lora.rank > 0 && t.kind != Kind::adapter) continue;
    if (index.emplace(t.disk, all.size()).second) {
      all.push_back({{written_name(c, t), disk_shape(t)}, {}});
    }
    all[index[t.disk]].rows.push_back(i);
  }
  return all;
}

inline void save_tensors(const std::filesystem::path& path, const Gpt& gpt,
                         std::span<const DiskTensor> tensors, FloatType type,
                         const std::map<std::string, std::string>& metadata) {
  std::vector<SafeTensorsWriter::Entry> entries;
  for (const DiskTensor& t : tensors) entries.push_back(t.entry);
  SafeTensorsWriter writer(path, std::move(entries), type, metadata);
  std::vector<float> row, whole;
  for (const DiskTensor& tensor : tensors) {
    whole.resize(size_t(tensor.entry.count()));
    for (const size_t i : tensor.rows) {
      const Tensor& t = gpt.table().tensors[i];
      row.resize(size_t(t.size()));
      gpt.read(int(i), Slot::weight, row);
      check_finite(t.name, row, ": not saved");
      scatter_row(t, row, whole);
    }
    writer.write(whole);
  }
  writer.commit();
}

// Writes all weights; of a model with adapters, only the adapters. Where they take more than
// `shard_bytes`, path/model.safetensors becomes model-00001-of-0000N.safetensors and so on, with
// model.safetensors.index.json, which says what is where. A shard holds at least one tensor.
inline void save_weights(const std::filesystem::path& path, const Gpt& gpt, FloatType type,
                         const std::map<std::string, std::string>& metadata = {},
                         int64_t shard_bytes = INT64_MAX) {
  const std::vector<DiskTensor> tensors = disk_tensors(gpt.config(), gpt.table());
  std::vector<size_t> begins;  // of each shard: its first tensor
  int64_t total = 0, shard = 0;
  for (size_t i = 0; i < tensors.size(); i++) {
    const int64_t bytes = tensors[i].entry.count() * float_bytes(type);
    if (begins.empty() || shard + bytes > shard_bytes) begins.push_back(i), shard = 0;
    shard += bytes, total += bytes;
  }
  if (begins.size() == 1) return save_tensors(path, gpt, tensors, type, metadata);
  OrderedJson weight_map = OrderedJson::object();
  begins.push_back(tensors.size());
  const int shards = int(begins.size()) - 1;
  for (int s = 0; s < shards; s++) {
    const auto part =
        std::span(tensors).subspan(begins[size_t(s)], begins[size_t(s) + 1] - begins[size_t(s)]);
    const std::string name =
        path.stem().string() + format("-%05d-of-%05d", s + 1, shards) + path.extension().string();
    save_tensors(path.parent_path() / name, gpt, part, type, metadata);
    for (const DiskTensor& t : part) weight_map[t.entry.name] = name;
  }
  write_json(path.string() + ".index.json",
             {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}});
}

// The moments that the optimizer of a row keeps, by their names in optimizer.safetensors.
inline std::vector<std::pair<Slot, std::string>> moments(const Tensor& t) {
  if (!t.trainable) return {};
  if (t.muon) return {{Slot::moment1, "moment1." + t.name}};
  return {{Slot::moment1, "moment1." + t.name}, {Slot::moment2, "moment2." + t.name}};
}

inline void save_moments(const std::filesystem::path& path, const Gpt& gpt) {
  const std::vector<Tensor>& tensors = gpt.table().tensors;
  std::vector<SafeTensorsWriter::Entry> entries;
  for (const Tensor& t : tensors)
    for (const auto& moment : moments(t)) entries.push_back({moment.second, {t.out, t.in}});
  SafeTensorsWriter writer(path, entries, FloatType::f32);
  std::vector<float> values;
  for (size_t i = 0; i < tensors.size(); i++) {
    for (const auto& moment : moments(tensors[i])) {
      values.resize(size_t(tensors[i].size()));
      gpt.read(int(i), moment.first, values);
      check_finite(moment.second, values, ": not saved");
      writer.write(values);
    }
  }
  writer.commit();
}

inline constexpr const char* kTokenizerFiles[] = {"tokenizer.json",
                                                  "tokenizer_config.json",
                                                  "special_tokens_map.json",
                                                  "added_tokens.json",
                                                  "vocab.json",
                                                  "merges.txt",
                                                  "chat_template.jinja"};

inline bool has_tokenizer(const std::filesystem::path& model) {
  if (GgufFile::is_gguf(model)) return GgufFile(model).has("tokenizer.ggml.tokens");
  return std::filesystem::exists(model / "tokenizer.json");
}

// The tokenizer's files of the directory `src`, or those that say what the keys of a .gguf file
// say.
inline void copy_tokenizer(const std::filesystem::path& src, const std::filesystem::path& dst) {
  if (GgufFile::is_gguf(src)) return Tokenizer::load(src).save(dst);
  for (const char* name : kTokenizerFiles) {
    const bool required = std::string(name) == "tokenizer.json";
    if (required || std::filesystem::exists(src / name)) {
      write_file(dst / name, read_file(src / name));
    }
  }
}

// The template in a model's files: chat_template.jinja, or "chat_template" of
// tokenizer_config.json, or the key of a .gguf file. Empty when there is none.
inline std::string chat_template(const std::filesystem::path& dir) {
  if (GgufFile::is_gguf(dir)) return gguf_chat_template(GgufFile(dir));
  if (std::filesystem::exists(dir / "chat_template.jinja")) {
    return read_file(dir / "chat_template.jinja");
  }
  if (!std::filesystem::exists(dir / "tokenizer_config.json")) return "";
  const Json config = read_json(dir / "tokenizer_config.json");
  const auto it = config.find("chat_template");
  if (it == config.end()) return "";
  if (it->is_string()) return it->get<std::string>();
  // A list of named templates, {"name", "template"}: "default" is the one for conversations.
  const auto text_of = [](const Json& item, const char* key) {
    const auto found = item.find(key);
    return found != item.end() && found->is_string() ? found->get<std::string>() : "";
  };
  for (const Json& item : it->is_array() ? *it : Json::array()) {
    if (item.is_object() && text_of(item, "name") == "default") return text_of(item, "template");
  }
  return "";
}

// Gives `fresh` the name `dir`. Returns where the directory that had this name is now; empty: there
// was none. On a file system that cannot exchange two names in one step, the old directory becomes
// DIR.old first, and repair_checkpoint brings it back if the process ends between the two renames.
inline std::filesystem::path exchange_directories(const std::filesystem::path& fresh,
                                                  const std::filesystem::path& dir,
                                                  bool one_step = true) {
  if (!std::filesystem::exists(dir)) {
    rename_path(fresh, dir);
    return {};
  }
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE of <linux/fs.h>
  if (one_step) {
    count_disk_change();
    if (syscall(SYS_renameat2, AT_FDCWD, fresh.c_str(), AT_FDCWD, dir.c_str(), kExchange) == 0) {
      return fresh;
    }
    if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP) {
      fail(dir.string(), ": cannot exchange with ", fresh.string(), ": ", errno_text());
    }
  }
  const std::filesystem::path old = dir.string() + ".old";
  rename_path(dir, old);
  try {
    rename_path(fresh, dir);
  } catch (const Error&) {
    rename_path(old, dir);
    throw;
  }
  return old;
}

// Brings back DIR from DIR.old when a run ended between the two renames. Only the process that
// writes DIR calls this: another one could disturb a writer that is between the two. Readers call
// model_dir.
inline void repair_checkpoint(const std::filesystem::path& dir) {
  const std::filesystem::path old = dir.string() + ".old";
  if (!std::filesystem::exists(dir) && std::filesystem::exists(old / "config.json")) {
    rename_path(old, dir);
  }
}

// Writes the model, and what `options` says, as the directory `dir`: all of it or nothing. After an
// Error (a full disk, a tokenizer that cannot be read, weights that are not finite) `dir` is as it
// was before.
inline void save_checkpoint(std::filesystem::path dir, const Gpt& gpt, const SaveOptions& options) {
  if (!dir.has_filename()) dir = dir.parent_path();  // "model/" is "model"
  if (options.type != FloatType::f32 && options.optimizer) {
    fail(dir.string(), ": found ", kFloatTypeNames[int(options.type)],
         " with the optimizer's state, which needs exact weights");
  }
  if (gpt.table().lora.rank > 0) {
    if (gpt.config().head != Head::lm) {
      fail(dir.string(), ": found adapters of a scalar head, expected of a language model");
    }
    if (options.base.dir.empty() || has_adapters(options.base.dir)) {
      fail(dir.string(), ": found adapters to save without the model that they were added to");
    }
  }
  repair_checkpoint(dir);
  const std::filesystem::path fresh = dir.string() + ".new";  // the checkpoint being written
  const auto discard = [](const std::filesystem::path& path) {
    try {
      remove_path(path);
    } catch (const std::exception&) {  // the next checkpoint removes what cannot be removed now
    }
  };
  std::filesystem::path replaced;
  try {
    remove_path(fresh), remove_path(dir.string() + ".old");  // what a killed run left
    std::filesystem::create_directories(fresh);
    write_json(fresh / "config.json", config_json(gpt.config(), options.type));
    write_json(fresh / "generation_config.json",
               generation_config_json(gpt.config(), generation_settings(options.started_from)));
    if (!options.tokenizer_from.empty()) copy_tokenizer(options.tokenizer_from, fresh);
    if (!options.trainer_state.is_null()) {
      Json state = options.trainer_state;
      if (const auto plans = gpt.tuned_plans(); !plans.empty()) state["tuned_plans"] = plans;
      write_file(fresh / "trainer_state.json", state.dump(2) + "\n");
    }
    if (options.optimizer) save_moments(fresh / "optimizer.safetensors", gpt);
    if (gpt.table().lora.rank > 0) {
      // Relative to this directory, so that both can be moved together.
      const auto base = std::filesystem::relative(options.base.dir, fresh);
      write_json(fresh / "adapter_config.json",
                 adapter_config_json(gpt.config(), gpt.table(), base.string()));
      save_weights(fresh / "adapter_model.safetensors", gpt, options.type,
                   {{kBaseHash, options.base.hash}});
    } else {
      save_weights(fresh / "model.safetensors", gpt, options.type, {}, options.shard_bytes);
    }
    if (options.also) options.also(fresh);
    sync_path(fresh);
    replaced = exchange_directories(fresh, dir);
  } catch (const std::exception& e) {
    discard(fresh);
    const bool had = std::filesystem::exists(dir);
    fail(e.what(), had ? "; the checkpoint that was there is untouched" : "");
  }
  sync_path(dir.has_parent_path() ? dir.parent_path() : ".");
  if (!replaced.empty()) discard(replaced);
}

// A run needs `bytes` more on the disk: its checkpoint stays while it writes the next one.
inline void check_disk(const std::filesystem::path& run, int64_t bytes) {
  std::error_code ec;
  const auto space = std::filesystem::space(run, ec);
  if (!ec && int64_t(space.available) < bytes) {
    fail(run.string(), ": found ", bytes_text(double(space.available)),
         " free on the disk, expected ", bytes_text(double(bytes)), " for its checkpoints");
  }
}

// ---------------------------------------------------------------------------------------------
// Resuming

// Reads trainer_state.json and writes the optimizer's moments into `gpt`, which must have been made
// with the same optimizer. The cuBLASLt algorithms that the run chose are kept, so that a resumed
// run rounds the same way.
inline Json load_trainer_state(const std::filesystem::path& dir, Gpt& gpt) {
  const std::filesystem::path state = dir / "trainer_state.json";
  if (!std::filesystem::exists(state)) {
    fail(state.string(),
         ": not found: a model without trainer state cannot be resumed, only started from");
  }
  const std::filesystem::path path = dir / "optimizer.safetensors";
  const SafeTensors disk(path);
  const std::vector<Tensor>& tensors = gpt.table().tensors;
  size_t used = 0;
  std::vector<float> values;
  for (size_t i = 0; i < tensors.size(); i++) {
    for (const auto& moment : moments(tensors[i])) {
      const StoredTensor* t = disk.find(moment.second);
      if (!t) {
        fail(path.string(), ": tensor ", moment.second,
             " is missing: resume with the optimizer that the run began with");
      }
      t->expect_shape({tensors[i].out, tensors[i].in});
      if (t->dtype != "F32") fail(t->where, ": found type ", t->dtype, ", expected F32");
      values.resize(size_t(t->count));
      t->read(0, values);
      check_finite(t->where, values);
      gpt.write(int(i), moment.first, values);
      used++;
    }
  }
  if (used != disk.tensors().size()) {
    fail(path.string(), ": found ", disk.tensors().size(), " tensors, expected ", used,
         ": resume with the optimizer that the run began with");
  }
  const Json json = read_json(state);
  const char* key = json.contains("choices") ? "choices" : "tuned_plans";  // older versions' name
  if (const auto plans = json.find(key); plans != json.end()) {
    try {
      gpt.set_tuned_plans(plans->get<std::map<std::string, std::string>>());
    } catch (const Json::exception&) {
      fail(state.string(), ": ", key, ": found ", plans->type_name(), ", expected text by name");
    }
  }
  return json;
}

// The model that `path` means: `path` itself, a directory or a .gguf file, or RUN/model where it is
// a run. Changes nothing on the disk: while a writer is between its two renames, the model is in
// DIR.old.
inline std::filesystem::path model_dir(std::filesystem::path path) {
  if (path.has_parent_path() && !path.has_filename()) path = path.parent_path();
  if (GgufFile::is_gguf(path)) return path;
  for (std::filesystem::path dir : {path, path / "model"}) {
    if (!std::filesystem::exists(dir)) dir += ".old";
    if (std::filesystem::exists(dir / "config.json") || has_adapters(dir)) return dir;
  }
  if (!std::filesystem::exists(path)) fail(path.string(), ": not found");
  if (!std::filesystem::is_directory(path)) {
    fail(path.string(),
         ": found a file of another kind, expected a model directory or a .gguf file");
  }
  refuse_other_weights(path);
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().extension() != ".gguf") continue;
    fail(path.string(), ": found no config.json but ", entry.path().filename().string(),
         ": give the path of that file");
  }
  fail(path.string(), ": found neither config.json nor model/config.json: not a model directory");
}

// Calls use(dir, expect_same) with the model directory that `path` means. A run that still trains
// exchanges this directory for its next checkpoint and removes it, so that what is read before and
// after may belong to two models, or be gone. expect_same() throws Error where this happened; when
// `use` throws and it has happened, `use` is called again with the new directory.
template <class Use>
void use_one_checkpoint(const std::filesystem::path& path, Use&& use) {
  struct State {
    uint64_t device = 0, file = 0;
    int64_t changed[2] = {};  // when: seconds, nanoseconds
    bool operator==(const State&) const = default;
  };
  const auto state_of = [](const std::filesystem::path& dir) {
    struct stat s;
    if (stat(dir.c_str(), &s) != 0) return State{};
    return State{s.st_dev, s.st_ino, {s.st_ctim.tv_sec, s.st_ctim.tv_nsec}};
  };
  constexpr int kAttempts = 5;
  for (int attempt = 1;; attempt++) {
    const std::filesystem::path dir = model_dir(path);
    const State before = state_of(dir);
    try {
      return use(dir, [&] {
        if (state_of(dir) != before) fail(dir.string(), ": was exchanged while it was read");
      });
    } catch (const std::exception&) {
      if (state_of(dir) == before || attempt == kAttempts) throw;
    }
  }
}

}  // namespace cake
