// config.json and generation_config.json of a model directory, and adapter_config.json of LoRA
// adapters, as Hugging Face's transformers and PEFT read and write them.
#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cake/gguf.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// config.json

constexpr const char* kModelTypes[] = {"gpt2", "llama", "qwen3", "qwen2"};  // in Family's order

// What keys mean that a config.json leaves out: the defaults of transformers 5's GPT2Config,
// LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config. F 0: 4 C. NKV 0: NH. HS 0: C / NH.
struct ConfigDefaults {
  const char* model_type;
  Family family;
  int V, T, L, C, NH, NKV, HS, F;
  int bos, eos;  // -1: none
};
constexpr ConfigDefaults kConfigDefaults[] = {
    {"gpt2", Family::gpt2, 50257, 1024, 12, 768, 12, 0, 0, 0, 50256, 50256},
    {"llama", Family::llama, 32000, 2048, 32, 4096, 32, 0, 0, 11008, 1, 2},
    // Without its sliding window, mistral computes what llama computes, and is saved as llama.
    {"mistral", Family::llama, 32000, 131072, 32, 4096, 32, 8, 0, 14336, 1, 2},
    {"qwen2", Family::qwen2, 151936, 32768, 32, 4096, 32, 32, 0, 22016, -1, -1},
    {"qwen3", Family::qwen3, 151936, 32768, 32, 4096, 32, 32, 128, 22016, -1, -1},
};

// Which of its types transformers should read a Config as. LlamaConfig refuses a hidden_size that
// is no multiple of the number of heads, which MistralConfig accepts: without its sliding window,
// mistral is llama.
inline bool is_written_as_mistral(const Config& c) {
  return c.family == Family::llama && c.C % c.NH != 0;
}

// The class that transformers names in `architectures`.
inline std::string architecture_name(const Config& c) {
  constexpr const char* prefixes[] = {"GPT2", "Llama", "Qwen3", "Qwen2"};
  const char* prefix = is_written_as_mistral(c) ? "Mistral" : prefixes[int(c.family)];
  const char* lm = c.family == Family::gpt2 ? "LMHeadModel" : "ForCausalLM";
  return concat(prefix, c.head == Head::lm ? lm : "ForSequenceClassification");
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
  // A feature of other transformers, which ours has not: any value is an error.
  void absent(const char* key, const char* what) const {
    if (!has(key)) return;
    fail(where, ": ", key, ": found ", json_text(json[key]), ", expected no such key: ", what,
         " are not supported");
  }
  // Token ids: a number or a list of numbers. An absent key means `fallback`, where the vocabulary
  // has it; null and negative numbers mean none.
  std::vector<int> token_ids(const char* key, int V, int fallback = -1) const {
    std::vector<int> ids;
    const auto add = [&](const Json& value) {
      const int id = json_as<int>(value, key, where);
      if (id >= V) fail(where, ": ", key, ": found ", id, ", expected less than vocab_size ", V);
      if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
    };
    if (!json.contains(key)) {
      if (fallback < V) add(fallback);
    } else if (json[key].is_array()) {
      for (const Json& value : json[key]) add(value);
    } else if (has(key)) {
      add(json[key]);
    }
    return ids;
  }
  int token_id(const char* key, int V, int fallback = -1) const {
    const std::vector<int> ids = token_ids(key, V, fallback);
    return ids.empty() ? -1 : ids[0];
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
// `type`). Since then, rope_parameters has all of it; rope_scaling goes first where both are there.
inline Rope parse_rope(const ConfigReader& in, const Config& c) {
  Rope rope;
  rope.theta = in.get_or<double>("rope_theta", rope.theta);
  in.only("partial_rotary_factor", 1.);
  const bool scaling = in.has("rope_scaling") && !in.json["rope_scaling"].empty();
  const char* key = scaling ? "rope_scaling" : "rope_parameters";
  if (!in.has(key)) return rope;
  const std::string where = in.where + ": " + key;
  const Json& all = in.json[key];  // transformers 5 may have them for each type of layer
  const ConfigReader r{all.contains("full_attention") ? all["full_attention"] : all, where};
  rope.theta = r.get_or<double>("rope_theta", rope.theta);
  r.only("partial_rotary_factor", 1.);
  const std::string type =
      r.get_or<std::string>("rope_type", r.get_or<std::string>("type", "default"));
  if (type == "default") return rope;
  if (type != "linear" && type != "llama3") {
    fail(where, ": rope_type: found ", type, ", expected default, linear or llama3");
  }
  rope.factor = r.get<double>("factor");
  if (!(rope.factor >= 1)) fail(where, ": factor: found ", rope.factor, ", expected at least 1");
  rope.linear = type == "linear";
  if (rope.linear) return rope;
  rope.low_freq_factor = r.get<double>("low_freq_factor");
  rope.high_freq_factor = r.get<double>("high_freq_factor");
  constexpr const char* original = "original_max_position_embeddings";
  rope.original_T = in.get_or<int>(original, r.get_or<int>(original, c.T));
  if (!(rope.high_freq_factor > rope.low_freq_factor && rope.low_freq_factor > 0)) {
    fail(where, ": high_freq_factor: found ", rope.high_freq_factor,
         ", expected more than low_freq_factor ", rope.low_freq_factor, ", above 0");
  }
  if (rope.original_T < 1) {
    fail(where, ": ", original, ": found ", rope.original_T, ", expected at least 1");
  }
  return rope;
}

inline void parse_gpt2(const ConfigReader& in, const ConfigDefaults& d, Config& c) {
  // transformers takes the names of the other families too.
  const auto size = [&](const char* key, const char* other, int fallback) {
    return in.get_or<int>(key, in.get_or<int>(other, fallback));
  };
  c.T = size("n_positions", "max_position_embeddings", d.T);
  c.L = size("n_layer", "num_hidden_layers", d.L);
  c.C = size("n_embd", "hidden_size", d.C);
  c.NH = c.NKV = size("n_head", "num_attention_heads", d.NH);
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

// Features of transformers that derive from llama. Some programs save such a model under llama's or
// Qwen's model_type.
inline void refuse_other_features(const ConfigReader& in) {
  for (const char* key : {"embedding_multiplier", "residual_multiplier", "attention_multiplier",
                          "logits_scaling", "logit_scale"}) {
    in.absent(key, "multipliers of Granite and Cohere");
  }
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"}) {
    in.absent(key, "capped logits");
  }
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    in.absent(key, "mixtures of experts");
  }
  in.absent("clip_qkv", "clipped queries, keys and values");
  in.absent("q_lora_rank", "low-rank queries");
  in.absent("kv_lora_rank", "low-rank keys and values");
  in.absent("qk_layernorm", "norms of queries and keys by this key");
  in.only("rope_interleaved", false);
  in.only("mlp_bias", false);
  if (in.has("no_rope_layers")) {  // SmolLM3's: 1 for a layer with rotary positions
    for (const Json& layer : in.json["no_rope_layers"]) {
      if (layer != 1) {
        fail(in.where, ": no_rope_layers: found ", json_text(layer),
             ", expected 1 for every layer: all have rotary positions");
      }
    }
  }
  if (in.has("layer_types")) {
    for (const Json& type : in.json["layer_types"]) {
      if (type != "full_attention") {
        fail(in.where, ": layer_types: found ", json_text(type), ", expected full_attention");
      }
    }
  }
}

inline void parse_llama(const ConfigReader& in, const ConfigDefaults& d, Config& c) {
  const bool qwen = c.family != Family::llama;
  c.T = in.get_or<int>("max_position_embeddings", d.T);
  c.L = in.get_or<int>("num_hidden_layers", d.L);
  c.C = in.get_or<int>("hidden_size", d.C);
  c.NH = in.get_or<int>("num_attention_heads", d.NH);
  // Null means "as many as query heads" in all of them.
  const bool absent = !in.json.contains("num_key_value_heads");
  c.NKV = in.get_or<int>("num_key_value_heads", absent && d.NKV > 0 ? d.NKV : c.NH);
  c.HS = in.get_or<int>("head_dim", d.HS > 0 ? d.HS : c.NH > 0 ? c.C / c.NH : 0);
  if (d.HS == 0 && !in.has("head_dim") && c.NH > 0 && c.C % c.NH != 0) {
    fail(in.where, ": num_attention_heads: found ", c.NH, ", expected a divisor of hidden_size ",
         c.C);
  }
  c.F = in.get_or<int>("intermediate_size", d.F);
  c.tied = in.get_or<bool>("tie_word_embeddings", false);
  c.norm_eps = in.get_or<double>("rms_norm_eps", 1e-6);
  c.rope = parse_rope(in, c);
  const auto activation = in.get_or<std::string>("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail(in.where, ": hidden_act: found ", activation, ", expected silu");
  }
  in.only("attention_bias", c.family == Family::qwen2);
  in.only("use_sliding_window", false);
  const bool mistral = std::string(d.model_type) == "mistral";
  if (mistral && !in.json.contains("sliding_window")) {
    fail(in.where, ": sliding_window: found no such key, which means 4096 to transformers, ",
         "expected null: sliding windows are not supported");
  }
  if (!qwen && in.has("sliding_window")) {  // the Qwen families have the key beside its switch
    fail(in.where, ": sliding_window: found ", json_text(in.json["sliding_window"]),
         ", expected null: sliding windows are not supported");
  }
  refuse_other_features(in);
}

// What to do with a model whose weights are integers or 8-bit floats in a format of other programs.
inline void refuse_quantized(const ConfigReader& in) {
  if (!in.has("quantization_config")) return;
  const Json& json = in.json["quantization_config"];
  std::string method = json.is_object() && json.contains("quant_method")
                           ? json_as<std::string>(json["quant_method"], "quant_method", in.where)
                           : json_text(json);
  const char* python = "";
  if (method == "bitsandbytes") {
    python = ", or in Python model.dequantize() and model.save_pretrained(\"DIR\")";
  } else if (method == "fp8") {
    python =
        ", or in Python AutoModelForCausalLM.from_pretrained(MODEL, quantization_config="
        "FineGrainedFP8Config(dequantize=True)).save_pretrained(\"DIR\")";
  }
  fail(in.where, ": quantization_config: found ", method,
       " weights, expected F32, BF16 or F16: take the model that was quantized, or a .gguf of it",
       python);
}

// Why a well-known model_type is none of our shapes.
inline const char* other_shape(const std::string& model_type) {
  const std::pair<const char*, const char*> known[] = {
      {"granite", "Granite multiplies embeddings, residuals and logits"},
      {"smollm3", "SmolLM3 has layers without rotary positions"},
      {"qwen2_moe", "a mixture of experts"},
      {"qwen3_moe", "a mixture of experts"},
      {"mixtral", "a mixture of experts"},
      {"gemma", "Gemma scales embeddings and adds 1 to the weights of norms"},
      {"gemma2", "Gemma 2 caps logits and has sliding windows"},
      {"gemma3_text", "Gemma 3 has more norms and sliding windows"},
      {"phi", "Phi has parallel blocks"},
      {"phi3", "Phi-3 has fused projections and sliding windows"},
      {"gpt_neox", "GPT-NeoX has parallel blocks"},
      {"olmo2", "OLMo 2 has norms after its sublayers"},
  };
  for (const auto& [name, why] : known)
    if (model_type == name) return why;
  return "";
}

// `where` names the file in errors.
inline Config parse_config(const Json& json, const std::string& where) {
  const ConfigReader in{json, where};
  Config c;
  const auto type = in.get<std::string>("model_type");
  const ConfigDefaults* d =
      std::find_if(std::begin(kConfigDefaults), std::end(kConfigDefaults),
                   [&](const ConfigDefaults& known) { return type == known.model_type; });
  if (d == std::end(kConfigDefaults)) {
    const std::string why = other_shape(type);
    fail(where, ": model_type: found ", type, why.empty() ? "" : " (" + why + ")",
         ", expected gpt2, llama, mistral, qwen2 or qwen3");
  }
  c.family = d->family;
  refuse_quantized(in);
  c.head = parse_head(in);
  c.V = in.get_or<int>("vocab_size", d->V);
  c.family == Family::gpt2 ? parse_gpt2(in, *d, c) : parse_llama(in, *d, c);
  c.check(where);
  c.bos = in.token_id("bos_token_id", c.V, d->bos);
  c.pad = in.token_id("pad_token_id", c.V);
  c.end_tokens = in.token_ids("eos_token_id", c.V, d->eos);
  c.eos = c.end_tokens.empty() ? -1 : c.end_tokens[0];
  if (c.head == Head::scalar) c.reward_shift = in.get_or<double>("reward_shift", 0);
  return c;
}

// generation_config.json may name more end tokens. They follow those of config.json.
inline void add_generation_config(const Json& json, const std::string& where, Config& c) {
  if (!json.is_object()) fail(where, ": found ", json_text(json), ", expected an object");
  const ConfigReader in{json, where};
  in.token_ids("bos_token_id", c.V), in.token_ids("pad_token_id", c.V);  // checked
  const std::vector<int> more = in.token_ids("eos_token_id", c.V);
  c.end_tokens.insert(c.end_tokens.end(), more.begin(), more.end());
  if (c.eos < 0 && !more.empty()) c.eos = more[0];
  c.end_tokens = c.all_end_tokens();
}

// ---------------------------------------------------------------------------------------------
// adapter_config.json

// Which modules of a model are meant: names of modules or ends of them, such as q_proj; or one
// regular expression for the whole name.
struct ModuleNames {
  std::vector<std::string> names;
  std::optional<std::regex> pattern;
  bool all = false;

  bool contain(const std::string& module) const {  // model.layers.3.self_attn.q_proj
    if (all) return true;
    if (pattern) return std::regex_match(module, *pattern);
    return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
      return module == name || module.ends_with("." + name);
    });
  }
};

// Another rank or alpha for the modules whose name, or the end of it behind a dot, is the pattern.
template <class T>
using ModulePatterns = std::vector<std::pair<std::regex, T>>;

struct AdapterConfig {
  Lora lora;                   // rank and alpha where no pattern says otherwise
  std::filesystem::path base;  // the directory of the model that they were added to
  bool has_targets = false;    // false: the modules that have adapters in the file
  ModuleNames targets, excluded;
  std::set<int> layers;                    // those with adapters; empty: all
  std::vector<std::regex> layer_patterns;  // the name before a layer's number; empty: any
  ModulePatterns<int> ranks;
  ModulePatterns<float> alphas;
  bool rank_stabilized = false;            // the scale is alpha / sqrt(rank): "use_rslora"
  std::vector<std::string> saved_modules;  // they have new weights in place of adapters
  bool saves_biases = false;

  // Whether the module should have adapters.
  bool adapts(const std::string& module) const {
    return targets.contain(module) && !excluded.contain(module) && adapts_layer(module);
  }
  // Its rank, and the alpha that gives its scale as alpha / rank.
  Lora lora_of(const std::string& module) const {
    Lora of_module = lora;
    for (const auto& [pattern, rank] : ranks) {
      if (!std::regex_match(module, pattern)) continue;
      of_module.rank = rank;
      break;
    }
    for (const auto& [pattern, alpha] : alphas) {
      if (!std::regex_match(module, pattern)) continue;
      of_module.alpha = alpha;
      break;
    }
    if (rank_stabilized) of_module.alpha *= std::sqrt(float(of_module.rank));
    return of_module;
  }

 private:
  bool adapts_layer(const std::string& module) const {
    if (layers.empty()) return true;
    // The last number between dots, behind any name or one of those that are given.
    static const std::regex number(R"(.*\.[^.]*\.(\d{1,9})\..*)");
    std::smatch match;
    bool found = layer_patterns.empty() && std::regex_match(module, match, number);
    for (size_t i = 0; i < layer_patterns.size() && !found; i++) {
      found = std::regex_match(module, match, layer_patterns[i]);
    }
    return found && layers.count(std::stoi(match[match.size() - 1])) > 0;
  }
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
    if (GgufFile::is_gguf(base) || std::filesystem::exists(base / "config.json")) {
      return base.lexically_normal();
    }
  }
  fail(where, ": base_model_name_or_path: found ", name,
       ", where no config.json is, expected the directory or the .gguf file of the model that the "
       "adapters were added to, from ",
       dir.string(), " or from here");
}

// PEFT's patterns are regular expressions of Python. What the two kinds have in common is all that
// names of modules need; the rest is refused.
inline std::regex parse_module_pattern(const std::string& text, const std::string& found,
                                       const std::string& where) {
  constexpr size_t kLongest = 1000;
  try {
    if (text.size() <= kLongest) return std::regex(text);
  } catch (const std::regex_error&) {
  }
  fail(where, ": found ", json_text(found), ", expected a regular expression of at most ", kLongest,
       " characters, in the syntax that Python and ECMAScript share");
}

// A name, a list of names, or, where a string may be one, a regular expression.
inline ModuleNames parse_module_names(const ConfigReader& in, const char* key) {
  ModuleNames modules;
  if (!in.has(key)) return modules;
  if (in.json[key].is_array()) {
    modules.names = in.get<std::vector<std::string>>(key);
    return modules;
  }
  const auto text = in.get<std::string>(key);
  modules.all = text == "all-linear";
  if (!modules.all) modules.pattern = parse_module_pattern(text, text, in.where + ": " + key);
  return modules;
}

// rank_pattern and alpha_pattern: the first pattern that fits a module's name counts.
template <class T>
ModulePatterns<T> parse_module_patterns(const OrderedJson& json, const char* key,
                                        const std::string& where) {
  ModulePatterns<T> patterns;
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return patterns;
  const std::string place = where + ": " + key;
  if (!it->is_object()) fail(place, ": found ", json_text(*it), ", expected an object");
  for (const auto& item : it->items()) {
    const T value = json_as<T>(Json(item.value()), item.key(), place);
    if (!(value > 0)) fail(place, ": ", item.key(), ": found ", value, ", expected above 0");
    patterns.emplace_back(parse_module_pattern("(.*\\.)?(" + item.key() + ")", item.key(), place),
                          value);
  }
  return patterns;
}

// layers_to_transform and layers_pattern
inline void parse_adapted_layers(const ConfigReader& in, AdapterConfig& c) {
  constexpr const char *kLayers = "layers_to_transform", *kPattern = "layers_pattern";
  if (!in.has(kLayers)) return;
  const Json& layers = in.json[kLayers];
  for (const Json& layer : layers.is_array() ? layers : Json::array({layers})) {
    const int number = json_as<int>(layer, kLayers, in.where);
    if (number < 0) fail(in.where, ": ", kLayers, ": found ", number, ", expected 0 or more");
    c.layers.insert(number);
  }
  if (c.layers.empty()) return;
  if (c.targets.pattern || c.targets.all) {
    fail(in.where, ": ", kLayers, ": found ", json_text(layers),
         ", expected no such key beside a target_modules that is no list, as PEFT has it");
  }
  if (!in.has(kPattern)) return;
  const Json& patterns = in.json[kPattern];
  for (const Json& pattern : patterns.is_array() ? patterns : Json::array({patterns})) {
    const auto text = json_as<std::string>(pattern, kPattern, in.where);
    if (text.empty()) continue;
    c.layer_patterns.push_back(parse_module_pattern(".*\\.(" + text + ")\\.(\\d{1,9})\\..*", text,
                                                    in.where + ": " + kPattern));
  }
}

inline AdapterConfig load_adapter_config(const std::filesystem::path& dir) {
  const std::string where = (dir / "adapter_config.json").string();
  const auto ordered = parse_json<OrderedJson>(read_file(where), where);
  const Json json = ordered;
  const ConfigReader in{json, where};
  in.get<std::string>("peft_type");
  in.only<std::string>("peft_type", "LORA");
  for (const char* variant : {"use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens"}) {
    if (in.has(variant) && json[variant] != false) {
      fail(where, ": ", variant, ": found ", json_text(json[variant]),
           ", expected false, all that is supported");
    }
  }
  // These features train more than A and B, or change the base.
  for (const char* key : {"layer_replication", "trainable_token_indices", "target_parameters"}) {
    if (in.has(key) && !json[key].empty()) {
      fail(where, ": ", key, ": found ", json_text(json[key]), ", expected none, all that is ",
           "supported");
    }
  }
  // PiSSA, CorDA, OLoRA and LoftQ train beside a base that they changed first.
  if (in.has("init_lora_weights") && json["init_lora_weights"].is_string()) {
    const auto init = in.get<std::string>("init_lora_weights");
    if (init != "gaussian" && init != "eva" && init != "orthogonal") {
      fail(where, ": init_lora_weights: found ", json_text(init), ", expected true, false, ",
           "\"gaussian\", \"eva\" or \"orthogonal\", which leave the model's weights as they are");
    }
  }
  AdapterConfig c;
  c.lora.rank = in.get<int>("r");
  c.lora.alpha = in.get<float>("lora_alpha");
  if (c.lora.rank < 1) fail(where, ": r: found ", c.lora.rank, ", expected at least 1");
  if (!(c.lora.alpha > 0)) {
    fail(where, ": lora_alpha: found ", c.lora.alpha, ", expected above 0");
  }
  c.rank_stabilized = in.get_or<bool>("use_rslora", false);
  c.targets = parse_module_names(in, "target_modules");
  c.has_targets = in.has("target_modules");
  c.targets.all |= !c.has_targets;
  c.excluded = parse_module_names(in, "exclude_modules");
  c.ranks = parse_module_patterns<int>(ordered, "rank_pattern", where);
  c.alphas = parse_module_patterns<float>(ordered, "alpha_pattern", where);
  parse_adapted_layers(in, c);
  if (in.has("modules_to_save")) {
    c.saved_modules = in.get<std::vector<std::string>>("modules_to_save");
  }
  const auto bias = in.get_or<std::string>("bias", "none");
  if (bias != "none" && bias != "all" && bias != "lora_only") {
    fail(where, ": bias: found ", json_text(bias), ", expected none, all or lora_only");
  }
  c.saves_biases = bias != "none";
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

// The config of a model directory: config.json with the end tokens of generation_config.json.
inline Config read_config(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "config.json";
  const std::filesystem::path generation = dir / "generation_config.json";
  Config c = parse_config(read_json(path), path.string());
  if (std::filesystem::exists(generation)) {
    add_generation_config(read_json(generation), generation.string(), c);
  }
  return c;
}

// A row's tensor in the files that we write. GPT-2's own files have no `transformer.` in front of
// its names: mlx_lm knows no others, and transformers, vLLM and llama.cpp's converter take both.
// With a head of its own, transformers 4 needs the prefix, and mlx_lm has no such model.
inline std::string written_name(const Config& c, const Tensor& t) {
  const std::string prefix = "transformer.";
  const bool bare = c.family == Family::gpt2 && c.head == Head::lm && c.tied;
  return bare && t.disk.starts_with(prefix) ? t.disk.substr(prefix.size()) : t.disk;
}

// The end tokens as transformers writes them: null, a number, or a list of several.
inline OrderedJson end_tokens_json(const Config& c) {
  const std::vector<int> ids = c.all_end_tokens();
  if (ids.size() > 1) return ids;
  return ids.empty() ? OrderedJson() : OrderedJson(ids[0]);
}

// Writes every key whose absence means something else to transformers: gpt2's dropouts (0.1) and
// token ids (50256), llama's token ids (1, 2), qwen3's head_dim and key/value heads. Other programs
// need more: llama.cpp's converter and mlx_lm gpt2's n_ctx, readers older than transformers 5
// torch_dtype, rope_theta and rope_scaling.
inline OrderedJson config_json(const Config& c, FloatType type = FloatType::f32) {
  constexpr const char* kTypes[] = {"float32", "float16", "bfloat16"};
  const auto id = [](int token) { return token < 0 ? OrderedJson() : OrderedJson(token); };
  const bool mistral = is_written_as_mistral(c);
  const char* dtype = kTypes[int(type)];
  OrderedJson json{{"architectures", OrderedJson::array({architecture_name(c)})},
                   {"model_type", mistral ? "mistral" : kModelTypes[int(c.family)]},
                   {"dtype", dtype},
                   {"torch_dtype", dtype},
                   {"vocab_size", c.V}};
  if (c.family == Family::gpt2) {
    json.update({{"n_positions", c.T},
                 {"n_ctx", c.T},
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
    OrderedJson rope{{"rope_theta", c.rope.theta}, {"rope_type", c.rope.type()}};
    if (c.rope.factor > 0) rope["factor"] = c.rope.factor;
    if (c.rope.factor > 0 && !c.rope.linear) {
      rope.update({{"low_freq_factor", c.rope.low_freq_factor},
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
                 {"attention_dropout", 0.}});
    if (c.rope.factor > 0) json["rope_scaling"] = rope;
    if (c.family != Family::qwen2) json["attention_bias"] = false;  // qwen2 has no such key
    if (c.family == Family::llama) json["mlp_bias"] = false;
    if (mistral) json["sliding_window"] = nullptr;  // absent, it means 4096
    if (c.family != Family::llama) json["use_sliding_window"] = false;
  }
  json.update({{"tie_word_embeddings", c.tied},
               {"use_cache", true},
               {"bos_token_id", id(c.bos)},
               {"eos_token_id", end_tokens_json(c)},
               {"pad_token_id", id(c.pad)}});
  if (c.head == Head::scalar) {
    json.update({{"id2label", {{"0", "score"}}}, {"label2id", {{"score", 0}}}});
    if (c.reward_shift != 0) json["reward_shift"] = c.reward_shift;
  }
  return json;
}

// The directory whose config.json and generation_config.json are those of the model in `dir`:
// adapters without a config.json have their base's.
inline std::filesystem::path config_dir(const std::filesystem::path& dir) {
  const bool base = !std::filesystem::exists(dir / "config.json") && has_adapters(dir);
  return base ? load_adapter_config(dir).base : dir;
}

// What generation_config.json of the model in `dir` says of sampling: temperature, top_p and
// others, which other programs go by. Without such a file: that answers are sampled.
inline OrderedJson generation_settings(const std::filesystem::path& dir) {
  const OrderedJson none{{"do_sample", true}};
  if (!std::filesystem::is_directory(dir)) return none;
  const std::filesystem::path path = dir / "generation_config.json";
  if (!std::filesystem::exists(path)) {
    return has_adapters(dir) ? generation_settings(load_adapter_config(dir).base) : none;
  }
  OrderedJson json = parse_json<OrderedJson>(read_file(path), path.string());
  if (!json.is_object()) fail(path.string(), ": found ", json_text(json), ", expected an object");
  return json;
}

// generation_config.json: the settings with this model's tokens.
inline OrderedJson generation_config_json(const Config& c, OrderedJson settings) {
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) settings.erase(key);
  if (c.bos >= 0) settings["bos_token_id"] = c.bos;
  if (!c.all_end_tokens().empty()) settings["eos_token_id"] = end_tokens_json(c);
  if (c.pad >= 0) settings["pad_token_id"] = c.pad;
  return settings;
}

}  // namespace cake
