// A model directory as Hugging Face's transformers reads and writes it, with the trainer's state
// beside the model.
//
//     config.json             Config: load_config, config_json
//     generation_config.json  the ids of tokens that end a text
//     model.safetensors       weights: load_weights; or shards with model.safetensors.index.json
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
//
// A safetensors file: 8 bytes with the header's length, a JSON header {name: {dtype, shape,
// data_offsets}}, then the tensors end to end (huggingface/safetensors, format.md).
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// config.json

constexpr const char* kModelTypes[] = {"gpt2", "llama", "qwen3"};  // model_type, in Family's order

// The class that transformers names in `architectures`.
inline std::string architecture_name(const Config& c) {
  constexpr const char* prefixes[] = {"GPT2", "Llama", "Qwen3"};
  const char* lm = c.family == Family::gpt2 ? "LMHeadModel" : "ForCausalLM";
  return concat(prefixes[int(c.family)], c.head == Head::lm ? lm : "ForSequenceClassification");
}

// Reads the keys of one config.json. An absent key and null mean the same, unless a rule says
// otherwise.
struct ConfigReader {
  const Json& json;
  const std::string& where;

  template <class T>
  T get(const char* key) const {
    return json_get<T>(json, key, where);
  }
  template <class T>
  T get_or(const char* key, const T& fallback) const {
    return json_get_or<T>(json, key, fallback, where);
  }
  bool has(const char* key) const { return json.contains(key) && !json[key].is_null(); }
  // A feature that our transformer does not have: any value but `expected` is an error.
  template <class T>
  void only(const char* key, const T& expected) const {
    if (!has(key)) return;
    if (json_as<T>(json[key], key, where) != expected) {
      fail(where, ": ", key, ": found ", json_text(json[key]), ", expected ",
           json_text(Json(expected)), ", all that is supported");
    }
  }
  // transformers allows several end tokens: the first counts here.
  int token_id(const char* key, int V) const {
    if (!has(key)) return -1;
    const Json& value = json[key];
    if (value.is_array() && value.empty()) return -1;
    const int id = json_as<int>(value.is_array() ? value[0] : value, key, where);
    if (id >= V) fail(where, ": ", key, ": found ", id, ", expected less than vocab_size ", V);
    return std::max(id, -1);
  }
};

inline Head parse_head(const ConfigReader& in) {
  if (!in.has("architectures")) return Head::lm;
  const Json& names = in.json["architectures"];
  const std::string name = names.is_array() && names.size() == 1 && names[0].is_string()
                               ? names[0].get<std::string>()
                               : json_text(names);
  if (name.ends_with("ForCausalLM") || name.ends_with("LMHeadModel") || name == "GPT2Model") {
    return Head::lm;
  }
  if (!name.ends_with("ForSequenceClassification")) {
    fail(in.where, ": architectures: found ", name,
         ", expected ...ForCausalLM, GPT2LMHeadModel or ...ForSequenceClassification");
  }
  size_t labels = 2;  // transformers' default
  if (in.has("id2label")) labels = in.json["id2label"].size();
  if (in.has("num_labels")) labels = in.get<size_t>("num_labels");
  if (labels != 1) fail(in.where, ": id2label: found ", labels, " labels, expected 1: the score");
  return Head::scalar;
}

// Before transformers 5, a config has rope_theta and rope_scaling (whose type may be called
// `type`). Since then, rope_parameters has all of it.
inline Rope parse_rope(const ConfigReader& in) {
  Rope rope;
  rope.theta = in.get_or<double>("rope_theta", rope.theta);
  in.only("partial_rotary_factor", 1.);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!in.has(key)) continue;
    const std::string where = in.where + ": " + key;
    const ConfigReader r{in.json[key], where};
    rope.theta = r.get_or<double>("rope_theta", rope.theta);
    r.only("partial_rotary_factor", 1.);
    const std::string type =
        r.get_or<std::string>("rope_type", r.get_or<std::string>("type", "default"));
    if (type == "default") continue;
    if (type != "llama3") {
      fail(where, ": rope_type: found ", type, ", expected default or llama3");
    }
    rope.factor = r.get<double>("factor");
    rope.low_freq_factor = r.get<double>("low_freq_factor");
    rope.high_freq_factor = r.get<double>("high_freq_factor");
    rope.original_T = r.get<int>("original_max_position_embeddings");
    if (!(rope.factor >= 1)) fail(where, ": factor: found ", rope.factor, ", expected at least 1");
    if (!(rope.high_freq_factor > rope.low_freq_factor && rope.low_freq_factor > 0)) {
      fail(where, ": high_freq_factor: found ", rope.high_freq_factor,
           ", expected more than low_freq_factor ", rope.low_freq_factor, ", above 0");
    }
    if (rope.original_T < 1) {
      fail(where, ": original_max_position_embeddings: found ", rope.original_T,
           ", expected at least 1");
    }
  }
  return rope;
}

inline void parse_gpt2(const ConfigReader& in, Config& c) {
  c.T = in.get<int>("n_positions");
  c.L = in.get<int>("n_layer");
  c.C = in.get<int>("n_embd");
  c.NH = c.NKV = in.get<int>("n_head");
  c.HS = c.NH > 0 ? c.C / c.NH : 0;
  c.F = in.get_or<int>("n_inner", int(std::min<int64_t>(4 * int64_t(c.C), INT32_MAX)));
  c.tied = in.get_or<bool>("tie_word_embeddings", true);
  c.norm_eps = in.get_or<double>("layer_norm_epsilon", 1e-5);
  const auto activation = in.get_or<std::string>("activation_function", "gelu_new");
  if (activation != "gelu_new" && activation != "gelu_pytorch_tanh") {  // two names of one formula
    fail(in.where, ": activation_function: found ", activation, ", expected gelu_new");
  }
  in.only("scale_attn_weights", true);
  in.only("scale_attn_by_inverse_layer_idx", false);
  in.only("add_cross_attention", false);
}

inline void parse_llama(const ConfigReader& in, Config& c) {
  const bool qwen3 = c.family == Family::qwen3;
  c.T = in.get<int>("max_position_embeddings");
  c.L = in.get<int>("num_hidden_layers");
  c.C = in.get<int>("hidden_size");
  c.NH = in.get<int>("num_attention_heads");
  // In both families null means "as many as query heads".
  const bool absent = !in.json.contains("num_key_value_heads");
  c.NKV = in.get_or<int>("num_key_value_heads", qwen3 && absent ? 32 : c.NH);
  c.HS = in.get_or<int>("head_dim", qwen3 ? 128 : c.NH > 0 ? c.C / c.NH : 0);
  if (!qwen3 && !in.has("head_dim") && c.NH > 0 && c.C % c.NH != 0) {
    fail(in.where, ": num_attention_heads: found ", c.NH, ", expected a divisor of hidden_size ",
         c.C);
  }
  c.F = in.get<int>("intermediate_size");
  c.tied = in.get_or<bool>("tie_word_embeddings", false);
  c.norm_eps = in.get_or<double>("rms_norm_eps", 1e-6);
  c.rope = parse_rope(in);
  const auto activation = in.get_or<std::string>("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail(in.where, ": hidden_act: found ", activation, ", expected silu");
  }
  in.only("attention_bias", false);
  in.only("mlp_bias", false);
  in.only("use_sliding_window", false);
  if (!qwen3 && in.has("sliding_window")) {  // qwen3 has the key beside its switch
    fail(in.where, ": sliding_window: found ", json_text(in.json["sliding_window"]),
         ", expected null: sliding windows are not supported");
  }
  if (in.has("layer_types")) {
    for (const Json& type : in.json["layer_types"]) {
      if (type != "full_attention") {
        fail(in.where, ": layer_types: found ", json_text(type), ", expected full_attention");
      }
    }
  }
}

// `where` names the file in errors.
inline Config parse_config(const Json& json, const std::string& where) {
  const ConfigReader in{json, where};
  Config c;
  const auto type = in.get<std::string>("model_type");
  const auto family = std::find(std::begin(kModelTypes), std::end(kModelTypes), type);
  if (family == std::end(kModelTypes)) {
    fail(where, ": model_type: found ", type, ", expected gpt2, llama or qwen3");
  }
  c.family = Family(family - kModelTypes);
  if (in.has("quantization_config")) {
    fail(where, ": quantization_config: found a quantized model, expected F32, BF16 or F16");
  }
  c.head = parse_head(in);
  c.V = in.get<int>("vocab_size");
  c.family == Family::gpt2 ? parse_gpt2(in, c) : parse_llama(in, c);
  c.check(where);
  c.bos = in.token_id("bos_token_id", c.V);
  c.eos = in.token_id("eos_token_id", c.V);
  c.pad = in.token_id("pad_token_id", c.V);
  if (c.head == Head::scalar) c.reward_shift = in.get_or<double>("reward_shift", 0);
  return c;
}

// ---------------------------------------------------------------------------------------------
// adapter_config.json

struct AdapterConfig {
  Lora lora;
  std::vector<std::string> targets;  // ends of the names of matrices that have them; empty: any
  std::filesystem::path base;        // the directory of the model that they were added to
};

// Whether the directory holds adapters and takes its other weights from a base model.
inline bool has_adapters(const std::filesystem::path& dir) {
  return std::filesystem::exists(dir / "adapter_config.json") &&
         !std::filesystem::exists(dir / "model.safetensors") &&
         !std::filesystem::exists(dir / "model.safetensors.index.json");
}

// The base model's path is relative to the adapters' directory, as save_checkpoint writes it, or to
// the working directory, as PEFT writes it.
inline std::filesystem::path find_base(const std::filesystem::path& dir, const std::string& name,
                                       const std::string& where) {
  for (const std::filesystem::path& base : {dir / name, std::filesystem::path(name)}) {
    if (std::filesystem::exists(base / "config.json")) return base.lexically_normal();
  }
  fail(where, ": base_model_name_or_path: found ", name,
       ", where no config.json is, expected the directory of the model that the adapters were "
       "added to, from ",
       dir.string(), " or from here");
}

inline AdapterConfig load_adapter_config(const std::filesystem::path& dir) {
  const std::string where = (dir / "adapter_config.json").string();
  const Json json = read_json(where);
  const ConfigReader in{json, where};
  in.get<std::string>("peft_type");
  in.only<std::string>("peft_type", "LORA");
  in.only<std::string>("bias", "none");
  for (const char* variant : {"use_rslora", "use_dora", "use_qalora", "lora_bias"}) {
    in.only(variant, false);
  }
  // These features train more than A and B, give matrices different ranks, or change the base.
  for (const char* key : {"modules_to_save", "layer_replication", "trainable_token_indices",
                          "target_parameters", "rank_pattern", "alpha_pattern"}) {
    if (in.has(key) && !json[key].empty()) {
      fail(where, ": ", key, ": found ", json_text(json[key]), ", expected none, all that is ",
           "supported");
    }
  }
  if (in.has("init_lora_weights") && json["init_lora_weights"].is_string()) {
    in.only<std::string>("init_lora_weights", "gaussian");
  }
  AdapterConfig c;
  c.lora.rank = in.get<int>("r");
  c.lora.alpha = in.get<float>("lora_alpha");
  if (c.lora.rank < 1) fail(where, ": r: found ", c.lora.rank, ", expected at least 1");
  if (!(c.lora.alpha > 0)) {
    fail(where, ": lora_alpha: found ", c.lora.alpha, ", expected above 0");
  }
  if (in.has("target_modules") && json["target_modules"].is_array()) {
    for (const Json& t : json["target_modules"]) {
      c.targets.push_back(json_as<std::string>(t, "target_modules", where));
    }
  }
  c.base = find_base(dir, in.get<std::string>("base_model_name_or_path"), where);
  if (has_adapters(c.base)) {
    fail(where, ": base_model_name_or_path: found ", c.base.string(),
         ", which are adapters themselves, expected a model with all its weights");
  }
  return c;
}

// The file that PEFT reads. Keys that it leaves out have the defaults that load_adapter_config
// expects.
inline OrderedJson adapter_config_json(const Config& c, const ParamTable& table,
                                       const std::string& base) {
  std::set<std::string> targets;  // c_attn, q_proj ...
  for (const Tensor& t : table.tensors) {
    if (t.kind != Kind::matrix) continue;
    const std::string module = t.disk.substr(0, t.disk.rfind(".weight"));
    targets.insert(module.substr(module.rfind('.') + 1));
  }
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", base},
          {"inference_mode", true},
          {"r", table.lora.rank},
          {"lora_alpha", table.lora.alpha},
          {"lora_dropout", 0.},
          {"target_modules", targets},
          {"bias", "none"},
          {"fan_in_fan_out", c.family == Family::gpt2},  // weights are (in, out)
          {"init_lora_weights", true},
          {"use_rslora", false},
          {"use_dora", false},
          {"modules_to_save", nullptr}};
}

// The config of a model directory. Adapters without a config.json have their base's.
inline Config load_config(const std::filesystem::path& dir) {
  std::filesystem::path path = dir / "config.json";
  if (!std::filesystem::exists(path) && has_adapters(dir)) {
    path = load_adapter_config(dir).base / "config.json";
  }
  return parse_config(read_json(path), path.string());
}

// The config of the model in `dir`, which must have the head that is asked for.
inline Config load_config_with_head(const std::filesystem::path& dir, Head head) {
  const Config config = load_config(dir);
  if (config.head != head) {
    fail(dir.string(), ": found ", architecture_name(config), ", expected a ",
         head == Head::lm ? "language model" : "reward model (...ForSequenceClassification)");
  }
  return config;
}

// Writes every key whose absence means something else to transformers: gpt2's dropouts (0.1) and
// token ids (50256), llama's token ids (1, 2), qwen3's head_dim and key/value heads.
inline OrderedJson config_json(const Config& c, bool bf16 = false) {
  const auto id = [](int token) { return token < 0 ? OrderedJson() : OrderedJson(token); };
  OrderedJson json{{"architectures", OrderedJson::array({architecture_name(c)})},
                   {"model_type", kModelTypes[int(c.family)]},
                   {"dtype", bf16 ? "bfloat16" : "float32"},
                   {"vocab_size", c.V}};
  if (c.family == Family::gpt2) {
    json.update({{"n_positions", c.T},
                 {"n_embd", c.C},
                 {"n_layer", c.L},
                 {"n_head", c.NH},
                 {"n_inner", c.F},
                 {"activation_function", "gelu_new"},
                 {"layer_norm_epsilon", c.norm_eps},
                 {"resid_pdrop", 0.},
                 {"embd_pdrop", 0.},
                 {"attn_pdrop", 0.}});
  } else {
    OrderedJson rope{{"rope_theta", c.rope.theta}, {"rope_type", "default"}};
    if (c.rope.factor > 0) {
      rope["rope_type"] = "llama3";
      rope.update({{"factor", c.rope.factor},
                   {"low_freq_factor", c.rope.low_freq_factor},
                   {"high_freq_factor", c.rope.high_freq_factor},
                   {"original_max_position_embeddings", c.rope.original_T}});
    }
    json.update({{"max_position_embeddings", c.T},
                 {"hidden_size", c.C},
                 {"intermediate_size", c.F},
                 {"num_hidden_layers", c.L},
                 {"num_attention_heads", c.NH},
                 {"num_key_value_heads", c.NKV},
                 {"head_dim", c.HS},
                 {"hidden_act", "silu"},
                 {"rms_norm_eps", c.norm_eps},
                 {"rope_parameters", rope},
                 {"rope_theta", c.rope.theta},  // for readers older than rope_parameters
                 {"attention_bias", false},
                 {"attention_dropout", 0.}});
    if (c.rope.factor > 0) json["rope_scaling"] = rope;
    if (c.family == Family::llama) json["mlp_bias"] = false;
    if (c.family == Family::qwen3) json["use_sliding_window"] = false;
  }
  json.update({{"tie_word_embeddings", c.tied},
               {"use_cache", true},
               {"bos_token_id", id(c.bos)},
               {"eos_token_id", id(c.eos)},
               {"pad_token_id", id(c.pad)}});
  if (c.head == Head::scalar) {
    json.update({{"id2label", {{"0", "score"}}}, {"label2id", {{"score", 0}}}});
    if (c.reward_shift != 0) json["reward_shift"] = c.reward_shift;
  }
  return json;
}

inline OrderedJson generation_config_json(const Config& c) {
  OrderedJson json{{"do_sample", true}};
  if (c.bos >= 0) json["bos_token_id"] = c.bos;
  if (c.eos >= 0) json["eos_token_id"] = c.eos;
  if (c.pad >= 0) json["pad_token_id"] = c.pad;
  return json;
}

// ---------------------------------------------------------------------------------------------
// safetensors

inline float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }
inline uint16_t float_to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float f16_to_float(uint16_t x) {
  // The same bits read as float lack 112 in the exponent: exact for subnormal numbers too.
  const float y = 0x1p112f * std::bit_cast<float>(uint32_t(x & 0x7fff) << 13);
  uint32_t bits = std::bit_cast<uint32_t>(y) | uint32_t(x & 0x8000) << 16;
  if ((x & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // infinity, NaN
  return std::bit_cast<float>(bits);
}

inline std::string shape_text(const std::vector<int64_t>& shape) {  // (2, 3)
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

// One tensor in a mapped file.
struct StoredTensor {
  std::string dtype;           // as in the header: F32, BF16, F16, ...
  std::vector<int64_t> shape;  //
  const unsigned char* data;   // of any alignment
  int64_t count;               // elements
  std::string where;           // "FILE: NAME", for errors

  void expect_shape(const std::vector<int64_t>& expected) const {
    if (shape == expected) return;
    fail(where, ": found shape ", shape_text(shape), ", expected ", shape_text(expected));
  }

  // Elements [begin, begin + out.size()) as float.
  void read(int64_t begin, std::span<float> out) const {
    const auto widen = [&](auto convert) {
      for (size_t i = 0; i < out.size(); i++) {
        uint16_t half;
        std::memcpy(&half, data + 2 * (begin + int64_t(i)), 2);
        out[i] = convert(half);
      }
    };
    if (out.empty()) return;
    if (dtype == "F32") {
      std::memcpy(out.data(), data + 4 * begin, out.size_bytes());
    } else if (dtype == "BF16") {
      widen([](uint16_t x) { return bf16_to_float(x); });
    } else if (dtype == "F16") {
      widen([](uint16_t x) { return f16_to_float(x); });
    } else {
      fail(where, ": found type ", dtype, ", expected F32, BF16 or F16");
    }
  }
};

inline int64_t dtype_bytes(const std::string& dtype) {  // 0: unknown
  static const std::map<std::string, int64_t> sizes = {
      {"F64", 8}, {"I64", 8}, {"U64", 8},  {"F32", 4},     {"I32", 4},
      {"U32", 4}, {"F16", 2}, {"I16", 2},  {"U16", 2},     {"BF16", 2},
      {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

// The tensors of one file or of several, by name. The headers are checked completely before any
// tensor is used.
class SafeTensors {
 public:
  SafeTensors() = default;
  explicit SafeTensors(const std::filesystem::path& file) { add_file(file); }

  // model.safetensors, or the shards that model.safetensors.index.json lists.
  static SafeTensors of_model(const std::filesystem::path& dir) {
    const std::filesystem::path index = dir / "model.safetensors.index.json";
    if (std::filesystem::exists(dir / "model.safetensors") || !std::filesystem::exists(index)) {
      return SafeTensors(dir / "model.safetensors");
    }
    const Json json = read_json(index);
    const std::string where = index.string();
    if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
      fail(where, ": weight_map is missing");
    }
    std::set<std::string> files;
    for (const auto& item : json["weight_map"].items()) {
      const auto file = json_as<std::string>(item.value(), item.key(), where);
      if (file.empty() || std::filesystem::path(file).filename() != file || file == "..") {
        fail(where, ": ", item.key(), ": found ", file, ", expected the name of a file beside it");
      }
      files.insert(file);
    }
    SafeTensors all;
    for (const std::string& file : files) all.add_file(dir / file);
    for (const auto& item : json["weight_map"].items()) {
      if (all.find(item.key())) continue;
      fail(where, ": ", item.key(), ": not found in ", item.value().get<std::string>());
    }
    return all;
  }

  const StoredTensor* find(const std::string& name) const {  // null when absent
    const auto it = tensors_.find(name);
    return it == tensors_.end() ? nullptr : &it->second;
  }
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // A hash of every byte of the files, in the order of their names: 16 hexadecimal digits. It tells
  // one model from another; it is no protection against forgery.
  std::string hash() const {
    constexpr int64_t kPiece = 1 << 20;
    uint64_t h = 0;
    for (const MappedFile& file : files_) {
      std::vector<uint64_t> pieces(size_t((file.size() + kPiece - 1) / kPiece));
#pragma omp parallel for schedule(static)
      for (size_t p = 0; p < pieces.size(); p++) {
        const int64_t begin = int64_t(p) * kPiece, end = std::min(begin + kPiece, file.size());
        uint64_t x = uint64_t(end - begin);
        for (int64_t i = begin; i < end; i += 8) {
          uint64_t word = 0;
          std::memcpy(&word, file.data() + i, size_t(std::min<int64_t>(8, end - i)));
          x = mix64(x ^ word);
        }
        pieces[p] = x;
      }
      h = mix64(h, uint64_t(file.size()));
      for (const uint64_t piece : pieces) h = mix64(h, piece);
    }
    return format("%016llx", static_cast<unsigned long long>(h));
  }

 private:
  void add_file(const std::filesystem::path& path) {
    files_.emplace_back(path);
    const MappedFile& file = files_.back();
    const std::string where = path.string();
    if (file.size() < 8) fail(where, ": found ", file.size(), " bytes, expected a header");
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    if (length > uint64_t(file.size() - 8)) {
      fail(where, ": found a header of ", length, " bytes, expected at most ", file.size() - 8,
           ": the file is truncated or no safetensors file");
    }
    const Json header = parse_header(file, int64_t(length), where);
    const unsigned char* data = file.data() + 8 + length;
    const int64_t data_bytes = file.size() - 8 - int64_t(length);
    std::map<std::pair<int64_t, int64_t>, std::string> extents;  // in the file's order
    for (const auto& item : header.items()) {
      if (item.key() == "__metadata__") {
        for (const auto& entry : item.value().items())
          metadata_[entry.key()] = json_as<std::string>(entry.value(), entry.key(), where);
        continue;
      }
      const std::string name = where + ": " + item.key();
      const auto extent = add_tensor(item.key(), item.value(), data, data_bytes, name);
      if (extent.first < extent.second && !extents.emplace(extent, item.key()).second) {
        fail(name, ": data_offsets: found those of ", extents[extent]);
      }
    }
    int64_t end = 0;  // tensors lie end to end from the first byte to the last
    for (const auto& [extent, name] : extents) {
      if (extent.first != end) {
        fail(where, ": ", name, ": data_offsets: found a begin at ", extent.first, ", expected ",
             end, ", where the tensor before it ends");
      }
      end = extent.second;
    }
    if (end != data_bytes) {
      fail(where, ": found ", data_bytes, " bytes of tensors, expected the ", end,
           " of the header");
    }
  }

  static Json parse_header(const MappedFile& file, int64_t length, const std::string& where) {
    std::set<std::string> names;
    const auto unique = [&](int depth, Json::parse_event_t event, Json& parsed) {
      if (event == Json::parse_event_t::key && depth == 1 &&
          !names.insert(parsed.get<std::string>()).second) {
        fail(where, ": found the tensor ", parsed.get<std::string>(), " twice in the header");
      }
      return true;
    };
    const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, size_t(length));
    Json header = parse_json(text, where + ": header", unique);
    if (!header.is_object()) fail(where, ": found no JSON object as header");
    return header;
  }

  // Checks one entry and returns its extent in the data.
  std::pair<int64_t, int64_t> add_tensor(const std::string& key, const Json& entry,
                                         const unsigned char* data, int64_t data_bytes,
                                         const std::string& where) {
    StoredTensor t{.dtype = json_get<std::string>(entry, "dtype", where),
                   .data = nullptr,
                   .count = 1,
                   .where = where};
    const int64_t width = dtype_bytes(t.dtype);
    if (width == 0) fail(where, ": dtype: found ", t.dtype, ", expected F32, BF16 or F16");
    if (!entry.contains("shape") || !entry["shape"].is_array()) {
      fail(where, ": shape: expected a list of sizes");
    }
    for (const Json& size : entry["shape"]) {
      t.shape.push_back(json_as<int64_t>(size, "shape", where));
      if (t.shape.back() < 0 || __builtin_mul_overflow(t.count, t.shape.back(), &t.count)) {
        fail(where, ": shape: found ", json_text(entry["shape"]), ", expected possible sizes");
      }
    }
    const Json offsets = entry.contains("data_offsets") ? entry["data_offsets"] : Json();
    if (!offsets.is_array() || offsets.size() != 2) {
      fail(where, ": data_offsets: found ", json_text(offsets), ", expected [begin, end]");
    }
    const auto begin = json_as<int64_t>(offsets[0], "data_offsets", where);
    const auto end = json_as<int64_t>(offsets[1], "data_offsets", where);
    if (begin < 0 || end < begin || end > data_bytes) {
      fail(where, ": data_offsets: found ", json_text(offsets), ", expected two within the ",
           data_bytes, " bytes of tensors in the file");
    }
    int64_t bytes;
    if (__builtin_mul_overflow(t.count, width, &bytes) || bytes != end - begin) {
      fail(where, ": found ", end - begin, " bytes, expected ", t.dtype, " ", shape_text(t.shape));
    }
    t.data = data + begin;
    if (!tensors_.emplace(key, std::move(t)).second) fail(where, ": found in two files");
    return {begin, end};
  }

  std::vector<MappedFile> files_;
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Writes a file tensor by tensor, in the order in which they were declared.
class SafeTensorsWriter {
 public:
  struct Entry {
    std::string name;
    std::vector<int64_t> shape;
  };
  SafeTensorsWriter(const std::filesystem::path& path, const std::vector<Entry>& entries, bool bf16,
                    std::map<std::string, std::string> metadata = {})
      : file_(path), bf16_(bf16) {
    metadata["format"] = "pt";  // transformers asks for it
    OrderedJson header{{"__metadata__", metadata}};
    int64_t end = 0;
    for (const Entry& e : entries) {
      int64_t count = 1;
      for (const int64_t n : e.shape) count *= n;
      const int64_t begin = std::exchange(end, end + count * (bf16 ? 2 : 4));
      header[e.name] = {
          {"dtype", bf16 ? "BF16" : "F32"}, {"shape", e.shape}, {"data_offsets", {begin, end}}};
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // aligns the data
    const uint64_t length = text.size();
    file_.write(&length, sizeof length);
    file_.write(text);
  }
  void write(std::span<const float> values) {
    if (!bf16_) return file_.write(values.data(), values.size_bytes());
    narrow_.resize(values.size());
    std::transform(values.begin(), values.end(), narrow_.begin(), float_to_bf16);
    file_.write(narrow_.data(), narrow_.size() * sizeof(uint16_t));
  }
  void commit() { file_.commit(); }

 private:
  AtomicFile file_;
  bool bf16_;
  std::vector<uint16_t> narrow_;
};

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

// The model that adapters are added to.
struct AdapterBase {
  std::filesystem::path dir;
  std::string hash;  // SafeTensors::hash; empty: not known
};

constexpr const char* kBaseHash =
    "base_model_hash";  // in the metadata of adapter_model.safetensors

// An adapter directory, checked against the shapes of a Config before anything is used.
struct Adapters {
  AdapterConfig config;
  SafeTensors disk;

  Adapters(const std::filesystem::path& dir, const Config& c)
      : config(load_adapter_config(dir)), disk(dir / "adapter_model.safetensors") {
    const std::string where = (dir / "adapter_model.safetensors").string();
    std::set<std::string> known;
    for (const Tensor& t : make_table(c, false, config.lora).tensors) {
      known.insert(t.disk);
      if (t.kind != Kind::adapter) continue;
      const StoredTensor* stored = disk.find(t.disk);
      if (!stored && !targeted(t)) continue;
      if (!stored) fail(where, ": tensor ", t.disk, " is missing");
      stored->expect_shape(disk_shape(t));
    }
    for (const auto& [name, stored] : disk.tensors()) {
      if (known.count(name)) continue;
      fail(stored.where, ": found a tensor that adapters of a ", architecture_name(c),
           " do not have here: they stand beside the matrices of its blocks");
    }
  }
  AdapterBase base() const {
    const auto hash = disk.metadata().find(kBaseHash);
    return {config.base, hash == disk.metadata().end() ? "" : hash->second};
  }

  // W += alpha / rank B A, on the row W of a matrix: (out, in)
  void add_to(const Tensor& t, std::span<float> w) const {
    const StoredTensor* stored_a = disk.find(adapter_name(t.disk, "A"));
    const StoredTensor* stored_b = disk.find(adapter_name(t.disk, "B"));
    if (!stored_a || !stored_b) return;
    const size_t rank = size_t(config.lora.rank), in = size_t(t.in);
    std::vector<float> a(rank * in), b(size_t(t.out) * rank);
    stored_a->read(0, a);
    stored_b->read(int64_t(t.disk_begin) * config.lora.rank, b);
    check_finite(stored_a->where, a), check_finite(stored_b->where, b);
    const float scale = config.lora.scale();
#pragma omp parallel for schedule(static)
    for (int o = 0; o < t.out; o++) {
      float* row = w.data() + size_t(o) * in;
      for (size_t r = 0; r < rank; r++) {
        const float x = scale * b[size_t(o) * rank + r];
        for (size_t i = 0; i < in; i++) row[i] += x * a[r * in + i];
      }
    }
  }

  bool targeted(const Tensor& t) const {
    const std::string module = t.disk.substr(0, t.disk.rfind(".lora_"));
    return std::any_of(config.targets.begin(), config.targets.end(),
                       [&](const std::string& end) { return module.ends_with("." + end); });
  }
};

// The base model of adapters that are trained on top of `dir`: `dir` itself, or, where `dir` holds
// adapters, their base.
inline AdapterBase adapter_base(const std::filesystem::path& dir) {
  AdapterBase base{dir, ""};
  if (has_adapters(dir)) base = Adapters(dir, load_config(dir)).base();
  if (base.hash.empty()) base.hash = SafeTensors::of_model(base.dir).hash();
  return base;
}

struct LoadOptions {
  // A model with a scalar head may begin as a language model: the LM head is dropped and the score
  // row gets initial values.
  bool new_score = false;
  uint64_t seed = 0;  // of the score's and of new adapters' initial values
};

// Reads the weights of `dir`, which must hold all of them. Adapters, if `dir` has any, go into
// their rows or are added to the weights.
inline void load_whole_model(const std::filesystem::path& dir, Gpt& gpt, const Adapters* adapters,
                             const LoadOptions& options) {
  const SafeTensors disk = SafeTensors::of_model(dir);
  if (adapters && !adapters->base().hash.empty() && disk.hash() != adapters->base().hash) {
    fail(dir.string(), ": found weights of hash ", disk.hash(), ", expected ",
         adapters->base().hash, ", those that the adapters were trained on: the model has changed");
  }
  const bool rows = gpt.table().lora.rank > 0;  // for adapters
  const std::vector<Tensor>& tensors = gpt.table().tensors;
  const std::string where = (dir / "model.safetensors").string();
  // transformers also writes base models, without `transformer.` or `model.` in front.
  const std::string root = gpt.config().family == Family::gpt2 ? "transformer." : "model.";
  const auto find = [&](const std::string& name) {
    const StoredTensor* t = disk.find(name);
    return t || !name.starts_with(root) ? t : disk.find(name.substr(root.size()));
  };
  std::set<const StoredTensor*> used;
  std::vector<float> values;
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& t = tensors[i];
    const bool adapter = t.kind == Kind::adapter;
    const StoredTensor* stored = !adapter   ? find(t.disk)
                                 : adapters ? adapters->disk.find(t.disk)
                                            : nullptr;
    if (!stored && (adapter || (t.name == "score" && options.new_score))) {
      gpt.write(int(i), Slot::weight, initial_values(t, options.seed));
      continue;
    }
    if (!stored) fail(where, ": tensor ", t.disk, " is missing");
    stored->expect_shape(disk_shape(t));
    used.insert(stored);
    values.resize(size_t(t.size()));
    gather_row(t, *stored, values);
    check_finite(stored->where, values);
    if (adapters && !rows && t.kind == Kind::matrix) adapters->add_to(t, values);
    gpt.write(int(i), Slot::weight, values);
  }

  for (const auto& [name, stored] : disk.tensors()) {
    if (used.count(&stored)) continue;
    const bool buffer = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") ||
                        name.ends_with("rotary_emb.inv_freq");
    if (buffer) continue;  // constants that older versions of transformers stored
    if (name == "lm_head.weight" && gpt.config().head == Head::scalar && options.new_score)
      continue;
    if (name == "lm_head.weight" && gpt.config().head == Head::lm && gpt.config().tied) {
      const int wte = gpt.table().find("wte");
      const StoredTensor& embedding = *find(tensors[size_t(wte)].disk);
      stored.expect_shape(embedding.shape);
      std::vector<float> head(size_t(stored.count)), wanted(size_t(stored.count));
      stored.read(0, head);
      embedding.read(0, wanted);
      if (std::memcmp(head.data(), wanted.data(), head.size() * sizeof(float)) != 0) {
        fail(stored.where,
             ": found values that differ from the embedding, expected the same: "
             "tie_word_embeddings is true");
      }
      continue;
    }
    fail(stored.where, ": found a tensor that a ", architecture_name(gpt.config()),
         " of this config.json does not have");
  }
}

// Fills every weight from a model directory. Throws an Error that names the tensor which is
// missing, unexpected, not finite, or of another shape or type than the Config says. Where `gpt`
// has adapters and `dir` has none, they get initial values, and `gpt` computes the same as the
// model in `dir`.
inline void load_weights(const std::filesystem::path& dir, Gpt& gpt,
                         const LoadOptions& options = {}) {
  if (!has_adapters(dir)) return load_whole_model(dir, gpt, nullptr, options);
  const Adapters adapters(dir, gpt.config());
  const Lora &found = adapters.config.lora, &expected = gpt.table().lora;
  if (expected.rank > 0 && (found.rank != expected.rank || found.alpha != expected.alpha)) {
    fail((dir / "adapter_config.json").string(), ": found adapters of rank ", found.rank,
         " and alpha ", found.alpha, ", expected rank ", expected.rank, " and alpha ",
         expected.alpha, ": other ones begin from the merged model");
  }
  load_whole_model(adapters.config.base, gpt, &adapters, options);
}

// ---------------------------------------------------------------------------------------------
// Saving

struct SaveOptions {
  std::filesystem::path tokenizer_from;  // a directory with tokenizer.json; empty: none to copy
  Json trainer_state;                    // null: none
  bool optimizer = false;                // also its moments, which an exact resume needs
  bool bf16 = false;                     // weights as BF16; excludes `optimizer`
  AdapterBase base;                      // of a model with adapters: only these are saved
  // Writes more into the new directory before it takes the old one's place.
  std::function<void(const std::filesystem::path& dir)> also;
};

// Bytes of a checkpoint on disk, without the tokenizer. While a checkpoint replaces another, both
// are on the disk.
inline int64_t checkpoint_bytes(const ParamTable& table, bool optimizer, bool bf16 = false) {
  int64_t bytes = 0;
  for (const Tensor& t : table.tensors) {
    if (table.lora.rank > 0 && t.kind != Kind::adapter) continue;
    bytes += t.size() * (bf16 ? 2 : 4) + 128;
    if (optimizer && t.trainable) bytes += t.size() * (t.muon ? 4 : 8) + 256;
  }
  return bytes + 4096;
}

// Writes all weights; of a model with adapters, only the adapters.
inline void save_weights(const std::filesystem::path& path, const Gpt& gpt, bool bf16,
                         const std::map<std::string, std::string>& metadata = {}) {
  const std::vector<Tensor>& tensors = gpt.table().tensors;
  std::map<std::string, std::vector<size_t>> rows_of;  // of each tensor on disk
  std::vector<SafeTensorsWriter::Entry> entries;
  for (size_t i = 0; i < tensors.size(); i++) {
    if (gpt.table().lora.rank > 0 && tensors[i].kind != Kind::adapter) continue;
    std::vector<size_t>& rows = rows_of[tensors[i].disk];
    if (rows.empty()) entries.push_back({tensors[i].disk, disk_shape(tensors[i])});
    rows.push_back(i);
  }
  SafeTensorsWriter writer(path, entries, bf16, metadata);
  std::vector<float> row, whole;
  for (const SafeTensorsWriter::Entry& entry : entries) {
    const std::vector<size_t>& rows = rows_of[entry.name];
    const Tensor& first = tensors[rows[0]];
    whole.resize(size_t(first.disk_out) * size_t(first.in));
    for (const size_t i : rows) {
      row.resize(size_t(tensors[i].size()));
      gpt.read(int(i), Slot::weight, row);
      check_finite(tensors[i].name, row, ": not saved");
      scatter_row(tensors[i], row, whole);
    }
    writer.write(whole);
  }
  writer.commit();
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
  SafeTensorsWriter writer(path, entries, false);
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

inline void copy_tokenizer(const std::filesystem::path& src, const std::filesystem::path& dst) {
  for (const char* name :
       {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "chat_template.jinja"}) {
    const bool required = std::string(name) == "tokenizer.json";
    if (required || std::filesystem::exists(src / name)) {
      write_file(dst / name, read_file(src / name));
    }
  }
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
  if (options.bf16 && options.optimizer) {
    fail(dir.string(), ": found bf16 with the optimizer's state, which needs exact weights");
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
    write_json(fresh / "config.json", config_json(gpt.config(), options.bf16));
    write_json(fresh / "generation_config.json", generation_config_json(gpt.config()));
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
      save_weights(fresh / "adapter_model.safetensors", gpt, options.bf16,
                   {{kBaseHash, options.base.hash}});
    } else {
      save_weights(fresh / "model.safetensors", gpt, options.bf16);
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

// The model directory that `path` means: `path` itself, or RUN/model where it is a run. Changes
// nothing on the disk: while a writer is between its two renames, the model is in DIR.old.
inline std::filesystem::path model_dir(std::filesystem::path path) {
  if (path.has_parent_path() && !path.has_filename()) path = path.parent_path();
  for (std::filesystem::path dir : {path, path / "model"}) {
    if (!std::filesystem::exists(dir)) dir += ".old";
    if (std::filesystem::exists(dir / "config.json") || has_adapters(dir)) return dir;
  }
  if (!std::filesystem::exists(path)) fail(path.string(), ": not found");
  fail(path.string(), ": found neither config.json nor model/config.json: not a model directory");
}

}  // namespace cake
