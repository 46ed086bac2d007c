// Model directories: config.json's rules, safetensors whole and damaged, weights by the table, and
// saves that leave all or nothing.
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <csignal>
#include <map>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "test/support.h"

using namespace cake;

namespace {

Config tiny(Family family) {
  const bool g = family == Family::gpt2;
  Config c{.family = family, .V = 19, .T = 24, .L = 2, .C = 12, .NH = 3};
  c.NKV = g ? 3 : 1;
  c.HS = g ? 4 : 6;  // NH HS differs from C in the families that allow it
  c.F = 20;
  c.tied = g;
  c.norm_eps = g ? 1e-5 : 1e-6;
  c.bos = c.eos = 17;
  return c;
}

const Family kFamilies[] = {Family::gpt2, Family::llama, Family::qwen3, Family::qwen2};

Json base_json(Family family) { return Json::parse(config_json(tiny(family)).dump()); }

std::string config_error(const Json& json) {
  return error_of([&] { parse_config(json, "config.json"); });
}

// The error when `key` holds `value`, or is absent.
std::string with(Json json, const char* key, const Json& value) {
  json[key] = value;
  return config_error(json);
}
std::string without(Json json, const char* key) {
  json.erase(key);
  return config_error(json);
}

bool same(const Config& a, const Config& b) { return config_json(a) == config_json(b); }

// Every file of a directory with its bytes.
std::map<std::string, std::string> contents(const std::filesystem::path& dir) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir)) {
    files[entry.path().lexically_relative(dir).string()] =
        entry.is_directory() ? "" : read_file(entry.path());
  }
  return files;
}

// A safetensors file of a header's text and data.
void write_raw(const std::filesystem::path& path, const std::string& header,
               const std::string& data) {
  const uint64_t length = header.size();
  write_file(path, std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
}

// The tensors of a file as (shape, values), to be written again with changes.
struct Loose {
  std::vector<int64_t> shape;
  std::vector<float> values;
};
using LooseTensors = std::map<std::string, Loose>;

LooseTensors read_loose(const std::filesystem::path& path) {
  const SafeTensors file(path);
  LooseTensors loose;
  for (const auto& [name, t] : file.tensors()) {
    loose[name] = {t.shape, std::vector<float>(size_t(t.count))};
    t.read(0, loose[name].values);
  }
  return loose;
}

void write_loose(const std::filesystem::path& path, const LooseTensors& loose, bool bf16 = false) {
  std::vector<SafeTensorsWriter::Entry> entries;
  for (const auto& [name, t] : loose) entries.push_back({name, t.shape});
  SafeTensorsWriter writer(path, entries, bf16 ? FloatType::bf16 : FloatType::f32);
  for (const auto& entry : loose) writer.write(entry.second.values);
  writer.commit();
}

void check_same_weights(const FakeGpt& a, const FakeGpt& b) {
  REQUIRE(a.table().tensors.size() == b.table().tensors.size());
  for (size_t i = 0; i < a.table().tensors.size(); i++) {
    CAPTURE(a.table().tensors[i].name);
    CHECK(a.values(int(i)) == b.values(int(i)));
  }
}

// A config.json with two end tokens.
Json with_list() {
  Json json = base_json(Family::gpt2);
  json["eos_token_id"] = {4, 11};
  return json;
}

std::string load_error(const std::filesystem::path& dir, FakeGpt& gpt, bool new_score = false) {
  return error_of([&] { load_weights(dir, gpt, {.new_score = new_score, .seed = 5}); });
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// config.json

TEST_CASE("a config written is the config read, for every family and head") {
  for (const Family family : kFamilies) {
    for (const Head head : {Head::lm, Head::scalar}) {
      Config c = tiny(family);
      c.head = head;
      c.tied = !c.tied;
      c.pad = 3;
      c.rope.theta = 50000;
      if (family == Family::gpt2) c.rope = {};
      if (family == Family::llama) c.rope = {1e6, 8, 1, 4, 16};
      if (family == Family::qwen2) c.rope.factor = 2.5, c.rope.linear = true;
      const Config back = parse_config(Json::parse(config_json(c).dump()), "x");
      CHECK(same(back, c));
      CHECK(back.head == head);
      CHECK(back.rope.theta == c.rope.theta);
      CHECK(back.rope.factor == c.rope.factor);
      CHECK(back.rope.linear == c.rope.linear);
      CHECK(back.pad == 3);
    }
  }
}

TEST_CASE("absent keys mean what they mean to transformers") {
  const Config g = parse_config(
      Json::parse(R"({"model_type":"gpt2","vocab_size":50257,"n_positions":1024,"n_embd":768,
        "n_layer":12,"n_head":12,"architectures":["GPT2LMHeadModel"],"n_ctx":1024,
        "resid_pdrop":0.1,"eos_token_id":50256})"),
      "x");
  CHECK(g.tied);
  CHECK(g.F == 3072);
  CHECK(g.HS == 64);
  CHECK(g.NKV == 12);
  CHECK(g.norm_eps == 1e-5);
  CHECK(g.eos == 50256);
  CHECK(g.bos == 50256);
  const Json sizes = Json::parse(
      R"({"vocab_size":1000,"max_position_embeddings":64,"hidden_size":4096,"intermediate_size":99,
        "num_hidden_layers":2,"num_attention_heads":64,"n_inner":null})");
  Json json = sizes;
  json["model_type"] = "llama";
  const Config l = parse_config(json, "x");
  CHECK(l.HS == 64);
  CHECK(l.NKV == 64);
  CHECK(!l.tied);
  CHECK(l.norm_eps == 1e-6);
  CHECK(l.rope.theta == 10000);
  CHECK(l.rope.factor == 0);
  CHECK(l.bos == 1);
  CHECK(l.end_tokens == std::vector{2});
  json["model_type"] = "qwen2";
  const Config q2 = parse_config(json, "x");
  CHECK(q2.HS == 64);
  CHECK(q2.NKV == 32);
  CHECK(q2.eos == -1);
  json["model_type"] = "qwen3";
  const Config q = parse_config(json, "x");
  CHECK(q.HS == 128);
  CHECK(q.NKV == 32);
  CHECK(!q.tied);
  json["num_key_value_heads"] = nullptr;  // there, and null: as many as query heads
  CHECK(parse_config(json, "x").NKV == 64);
}

// The values are those of the configuration classes of transformers 5.24.
TEST_CASE("a config.json of a model_type alone is transformers' default model") {
  const auto sizes = [](const Config& c) {
    return std::vector{c.V, c.T, c.L, c.C, c.NH, c.NKV, c.HS, c.F, c.bos, c.eos};
  };
  const auto of = [&](const char* type, const Json& more = Json::object()) {
    Json json = {{"model_type", type}};
    json.update(more);
    return sizes(parse_config(json, "x"));
  };
  CHECK(of("gpt2") == std::vector{50257, 1024, 12, 768, 12, 12, 64, 3072, 50256, 50256});
  CHECK(of("llama") == std::vector{32000, 2048, 32, 4096, 32, 32, 128, 11008, 1, 2});
  CHECK(of("mistral", {{"sliding_window", nullptr}}) ==
        std::vector{32000, 131072, 32, 4096, 32, 8, 128, 14336, 1, 2});
  CHECK(of("qwen2") == std::vector{151936, 32768, 32, 4096, 32, 32, 128, 22016, -1, -1});
  CHECK(of("qwen3") == std::vector{151936, 32768, 32, 4096, 32, 32, 128, 22016, -1, -1});
  // gpt2's sizes by the names of the other families
  CHECK(of("gpt2", {{"hidden_size", 48}, {"num_attention_heads", 3}, {"num_hidden_layers", 2}}) ==
        std::vector{50257, 1024, 2, 48, 3, 3, 16, 192, 50256, 50256});
  // a default token that a smaller vocabulary lacks is no token
  const Config small = parse_config({{"model_type", "gpt2"}, {"vocab_size", 300}}, "x");
  CHECK(small.eos == -1);
  CHECK(small.all_end_tokens().empty());
  CHECK(parse_config({{"model_type", "llama"}, {"eos_token_id", nullptr}}, "x").eos == -1);
}

TEST_CASE("mistral without a sliding window is llama") {
  Json json = base_json(Family::llama);
  json["model_type"] = "mistral";
  json["architectures"] = {"MistralForCausalLM"};
  json["sliding_window"] = nullptr;
  const Config c = parse_config(json, "x");
  CHECK(same(c, parse_config(base_json(Family::llama), "x")));
  CHECK(config_json(c)["model_type"] == "llama");
  CHECK(contains(with(json, "sliding_window", 4096), "sliding_window: found 4096, expected null"));
  CHECK(contains(without(json, "sliding_window"), "which means 4096 to transformers"));
  // transformers refuses such a llama and loads such a mistral
  Config odd = c;
  odd.C = 13;
  const OrderedJson written = config_json(odd);
  CHECK(written["model_type"] == "mistral");
  CHECK(written["architectures"][0] == "MistralForCausalLM");
  CHECK(contains(written.dump(), "\"sliding_window\":null"));
  CHECK(parse_config(Json::parse(written.dump()), "x").C == 13);
}

TEST_CASE("RoPE is read from rope_parameters and from rope_theta with rope_scaling") {
  Json json = base_json(Family::llama);
  json.erase("rope_parameters");
  json["rope_theta"] = 500000;
  CHECK(parse_config(json, "x").rope.theta == 500000);
  json["rope_scaling"] = nullptr;
  CHECK(parse_config(json, "x").rope.factor == 0);
  const Json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.},
                       {"low_freq_factor", 1.},
                       {"high_freq_factor", 4.},
                       {"original_max_position_embeddings", 8192}};
  json["rope_scaling"] = llama3;
  Rope rope = parse_config(json, "x").rope;
  CHECK(rope.theta == 500000);
  CHECK(rope.factor == 8);
  CHECK(rope.original_T == 8192);
  json.erase("rope_scaling");
  json.erase("rope_theta");
  json["rope_parameters"] = llama3;
  json["rope_parameters"]["rope_theta"] = 1e6;
  rope = parse_config(json, "x").rope;
  CHECK(rope.theta == 1e6);
  CHECK(rope.high_freq_factor == 4);

  const auto scaled = [&](const char* key, const Json& value) {
    Json changed = json;
    changed["rope_parameters"][key] = value;
    return config_error(changed);
  };
  CHECK(contains(scaled("rope_type", "yarn"), "rope_parameters: rope_type: found yarn"));
  CHECK(contains(scaled("factor", nullptr), "rope_parameters: factor: found null"));
  CHECK(contains(scaled("factor", 0), "factor: found 0"));
  CHECK(contains(scaled("high_freq_factor", 1.), "high_freq_factor: found 1"));
  CHECK(contains(scaled("original_max_position_embeddings", 0), "expected at least 1"));
  CHECK(contains(scaled("rope_theta", -1.), "rope_theta: found -1"));
  CHECK(contains(scaled("partial_rotary_factor", .5), "partial_rotary_factor: found 0.5"));
  json.erase("rope_parameters");
  json["rope_scaling"] = {{"type", "linear"}, {"factor", 2.}};  // the oldest spelling
  rope = parse_config(json, "x").rope;
  CHECK(rope.linear);
  CHECK(rope.factor == 2);
  CHECK(rope.theta == 10000);
  // rope_scaling goes first where both are there, as in transformers
  json["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 4.}, {"rope_theta", 7.}};
  CHECK(parse_config(json, "x").rope.factor == 2);
  json["rope_scaling"] = nullptr;
  CHECK(parse_config(json, "x").rope.factor == 4);
  json["rope_parameters"] = {{"full_attention", json["rope_parameters"]}};
  CHECK(parse_config(json, "x").rope.theta == 7);
  // llama3's original context is the model's, where no key says otherwise
  json["rope_scaling"] = llama3;
  json["rope_scaling"].erase("original_max_position_embeddings");
  CHECK(parse_config(json, "x").rope.original_T == 24);
  json["rope_scaling"] = {{"type", "dynamic"}, {"factor", 2.}};
  CHECK(contains(config_error(json), "rope_scaling: rope_type: found dynamic"));
}

TEST_CASE("a config.json that cannot be honoured is an error that names the key") {
  const Json g = base_json(Family::gpt2), l = base_json(Family::llama),
             q = base_json(Family::qwen3), q2 = base_json(Family::qwen2);
  for (const Json& json : {g, l, q, q2}) {
    CHECK(config_error(json) == "no error");
    CHECK(contains(without(json, "model_type"), "config.json: model_type is missing"));
    CHECK(contains(with(json, "model_type", "mamba"), "model_type: found mamba, expected gpt2"));
    CHECK(contains(with(json, "vocab_size", 0), "vocab_size: found 0"));
    CHECK(contains(with(json, "vocab_size", -5), "vocab_size: found -5"));
    CHECK(contains(with(json, "vocab_size", 1e300), "vocab_size: found 1e+300"));
    CHECK(contains(with(json, "vocab_size", 1ull << 40), "expected a smaller integer"));
    CHECK(contains(with(json, "vocab_size", "19"), "vocab_size: found \"19\""));
    CHECK(contains(with(json, "eos_token_id", 19), "eos_token_id: found 19, expected less than"));
    CHECK(contains(with(json, "eos_token_id", {3, 19}), "eos_token_id: found 19, expected less"));
    CHECK(contains(with(json, "eos_token_id", {3, "4"}), "eos_token_id: found \"4\""));
    CHECK(contains(with(json, "pad_token_id", 19), "pad_token_id: found 19"));
    CHECK(contains(with(json, "quantization_config", {{"bits", 4}}), "quantization_config"));
    CHECK(contains(with(json, "architectures", {"BertForMaskedLM"}), "found BertForMaskedLM"));
    CHECK(contains(with(json, "architectures", {"XForSequenceClassification"}),
                   "id2label: found 2 labels"));
    CHECK(with(json, "bos_token_id", -1) == "no error");
    CHECK(with(json, "eos_token_id", {3, 4}) == "no error");
  }
  for (const char* key : {"n_positions", "n_layer", "n_embd", "n_head"}) {
    CHECK(contains(with(g, key, 0), std::string(key) + ": found 0"));
  }
  CHECK(contains(with(g, "n_head", 5), "n_head: found 5"));
  CHECK(contains(with(g, "activation_function", "relu"), "activation_function: found relu"));
  CHECK(contains(with(g, "scale_attn_weights", false), "scale_attn_weights: found false"));
  CHECK(contains(with(g, "scale_attn_by_inverse_layer_idx", true), "inverse_layer_idx: found"));
  CHECK(contains(with(g, "add_cross_attention", true), "add_cross_attention: found true"));
  CHECK(contains(with(g, "layer_norm_epsilon", 0), "layer_norm_epsilon: found 0"));
  for (const Json& json : {l, q, q2}) {
    for (const char* key : {"max_position_embeddings", "num_hidden_layers", "hidden_size",
                            "num_attention_heads", "intermediate_size"}) {
      CHECK(contains(with(json, key, 0), std::string(key) + ": found 0"));
    }
    CHECK(contains(with(json, "hidden_act", "gelu"), "hidden_act: found gelu"));
    const bool biases = json["model_type"] == "qwen2";  // of q, k and v, without such a key
    CHECK(contains(with(json, "attention_bias", !biases), "attention_bias: found "));
    CHECK(contains(with(json, "mlp_bias", true), "mlp_bias: found true"));
    CHECK(contains(with(json, "use_sliding_window", true), "use_sliding_window: found true"));
    CHECK(contains(with(json, "layer_types", {"full_attention", "sliding_attention"}),
                   "layer_types: found \"sliding_attention\""));
    CHECK(with(json, "no_rope_layers", {1, 1}) == "no error");
    CHECK(contains(with(json, "no_rope_layers", {1, 0}), "no_rope_layers: found 0, expected 1"));
    CHECK(contains(with(json, "partial_rotary_factor", .5), "partial_rotary_factor: found 0.5"));
    CHECK(contains(with(json, "rope_interleaved", true), "rope_interleaved: found true"));
    for (const char* type : {"dynamic", "yarn", "longrope", "su", "mrope", "proportional"}) {
      CHECK(
          contains(with(json, "rope_scaling", {{"rope_type", type}, {"factor", 2.}}),
                   concat("rope_scaling: rope_type: found ", type, ", expected default, linear")));
    }
    for (const char* key :
         {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
          "logit_scale", "attn_logit_softcapping", "final_logit_softcapping", "num_experts",
          "num_local_experts", "n_routed_experts", "clip_qkv", "q_lora_rank", "kv_lora_rank",
          "qk_layernorm"}) {
      CHECK(contains(with(json, key, 8), concat(key, ": found 8, expected no such key")));
      CHECK(with(json, key, nullptr) == "no error");
    }
    CHECK(contains(with(json, "num_key_value_heads", 2), "num_key_value_heads: found 2"));
    CHECK(contains(with(json, "head_dim", 5), "head_dim: found 5, expected an even number"));
    CHECK(contains(with(json, "rms_norm_eps", -1.), "rms_norm_eps: found -1"));
    CHECK(contains(with(json, "tie_word_embeddings", "no"), "tie_word_embeddings: found \"no\""));
  }
  CHECK(contains(with(l, "sliding_window", 4096), "sliding_window: found 4096"));
  CHECK(with(q, "sliding_window", 4096) == "no error");  // behind its switch
  CHECK(with(q2, "sliding_window", 4096) == "no error");
  for (const char* type : {"granite", "smollm3", "qwen3_moe", "mixtral", "gemma2", "phi3"}) {
    const std::string error = with(l, "model_type", type);
    CHECK(contains(error, concat("model_type: found ", type, " (")));
    CHECK(contains(error, "), expected gpt2, llama, mistral, qwen2 or qwen3"));
  }
  for (const char* method : {"gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors"}) {
    const std::string error = with(l, "quantization_config", {{"quant_method", method}});
    CHECK(contains(error, concat("quantization_config: found ", method, " weights, expected F32, ",
                                 "BF16 or F16: take the model that was quantized, or a .gguf")));
    CHECK(contains(error, "dequantize") ==
          (method == std::string("fp8") || method == std::string("bitsandbytes")));
  }
  Json odd = l;
  odd.erase("head_dim");
  CHECK(contains(with(odd, "hidden_size", 13), "num_attention_heads: found 3"));
  CHECK(contains(config_error(Json::parse("[1]")), "config.json: found [1], expected an object"));

  TempDir dir;
  CHECK(contains(error_of([&] { load_config(dir.path()); }), "config.json: cannot open"));
  write_file(dir / "config.json", "{\"model_type\": \"gpt2\",");
  CHECK(contains(error_of([&] { load_config(dir.path()); }), "config.json: not JSON: parse error"));
  write_file(dir / "config.json", std::string("\0\1\2", 3));
  CHECK(contains(error_of([&] { load_config(dir.path()); }), "not JSON"));
}

TEST_CASE("a saved model keeps the sampling settings of the model that it began as") {
  TempDir dir;
  Config c = tiny(Family::qwen3);
  c.end_tokens = {17, 3};
  const FakeGpt gpt(c);
  std::filesystem::create_directory(dir / "base");
  const auto saved = [&](const std::filesystem::path& started_from) {
    SaveOptions options;
    options.started_from = started_from;
    save_checkpoint(dir / "m", gpt, options);
    return read_json(dir / "m/generation_config.json");
  };
  const Json none = {{"do_sample", true}, {"bos_token_id", 17}, {"eos_token_id", {17, 3}}};
  CHECK(saved("") == none);
  CHECK(saved(dir / "base") == none);
  write_file(dir / "base/generation_config.json",
             R"({"temperature": 0.6, "top_k": 20, "do_sample": false, "eos_token_id": 5,
                 "pad_token_id": 2})");
  const Json kept = {{"do_sample", false},
                     {"temperature", .6},
                     {"top_k", 20},
                     {"bos_token_id", 17},
                     {"eos_token_id", {17, 3}}};
  CHECK(saved(dir / "base") == kept);
  CHECK(saved(dir / "m") == kept);  // a resumed run's own
  // of adapters without a file of their own: their base's
  write_file(dir / "base/config.json", config_json(c).dump());
  std::filesystem::create_directory(dir / "adapters");
  write_file(dir / "adapters/adapter_config.json", Json{{"peft_type", "LORA"},
                                                        {"r", 2},
                                                        {"lora_alpha", 4},
                                                        {"base_model_name_or_path", "../base"}}
                                                       .dump());
  CHECK(saved(dir / "adapters") == kept);
  write_file(dir / "base/generation_config.json", "{");
  CHECK(contains(error_of([&] { saved(dir / "base"); }), "generation_config.json: not JSON"));
}

TEST_CASE("a directory with weights of another format says what to do") {
  TempDir dir;
  FakeGpt gpt(tiny(Family::llama));
  write_file(dir / "config.json", config_json(gpt.config()).dump());
  CHECK(contains(load_error(dir.path(), gpt), "model.safetensors: cannot open"));
  for (const char* name : {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
                           "consolidated.00.pth", "consolidated.safetensors"}) {
    write_file(dir / name, "x");
    const std::string error = load_error(dir.path(), gpt);
    CHECK(contains(error, concat(": found ", name, ", expected model.safetensors: ")));
    CHECK(contains(error, *name == 'p' ? ".save_pretrained(\"DIR\")" : "Hugging Face's format"));
    remove_path(dir / "config.json");  // Meta's directories have none
    CHECK(contains(error_of([&] { model_dir(dir.path()); }), concat(": found ", name)));
    write_file(dir / "config.json", config_json(gpt.config()).dump());
    remove_path(dir / name);
  }
}

TEST_CASE("all end tokens of config.json and generation_config.json are read and written") {
  TempDir dir;
  const auto ends = [&](const Json& config, const Json& generation) {
    Json json = base_json(Family::qwen3);
    json["eos_token_id"] = config;
    write_file(dir / "config.json", json.dump());
    write_file(dir / "generation_config.json", Json{{"eos_token_id", generation}}.dump());
    const Config c = load_config(dir.path());
    CHECK(c.eos == (c.end_tokens.empty() ? -1 : c.end_tokens[0]));
    return c.end_tokens;
  };
  CHECK(ends(5, {6, 5, 3}) == std::vector{5, 6, 3});
  CHECK(ends({5, 4}, 4) == std::vector{5, 4});
  CHECK(ends(nullptr, {7, 8}) == std::vector{7, 8});
  CHECK(ends(5, nullptr) == std::vector{5});
  CHECK(ends(nullptr, nullptr).empty());
  CHECK(
      contains(error_of([&] {
                 ends(5, {6, 19});
               }),
               "generation_config.json: eos_token_id: found 19, expected less than vocab_size 19"));
  CHECK(contains(error_of([&] { ends(5, 5.5); }), "eos_token_id: found 5.5"));
  write_file(dir / "generation_config.json", "[]");
  CHECK(contains(error_of([&] { load_config(dir.path()); }), "generation_config.json: found []"));
  remove_path(dir / "generation_config.json");
  CHECK(load_config(dir.path()).end_tokens == std::vector{5});

  // the list goes on through a saved model
  FakeGpt gpt(parse_config(with_list(), "x"));
  save_checkpoint(dir / "saved", gpt, {});
  CHECK(load_config(dir / "saved").end_tokens == std::vector{4, 11});
  CHECK(read_json(dir / "saved/generation_config.json")["eos_token_id"] == Json({4, 11}));

  Config c = tiny(Family::llama);  // eos 17
  CHECK(config_json(c)["eos_token_id"] == 17);
  c.set_first_end_token(4);
  CHECK(c.eos == 4);
  CHECK(c.end_tokens == std::vector{4, 17});
  c.set_first_end_token(17);
  CHECK(c.end_tokens == std::vector{17, 4});
  CHECK(config_json(c)["eos_token_id"] == OrderedJson::array({17, 4}));
  CHECK(generation_config_json(c, OrderedJson::object())["eos_token_id"] ==
        OrderedJson::array({17, 4}));
  CHECK(parse_config(Json::parse(config_json(c).dump()), "x").end_tokens == c.end_tokens);
}

// -------------------------------------------------------------------------------------------------
// safetensors

TEST_CASE("half precisions widen exactly, and bf16 rounds to nearest even") {
  for (int bits = 0; bits < 1 << 16; bits++) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                             : exponent == 31 ? (fraction ? double(NAN) : double(INFINITY))
                                              : std::ldexp(fraction + 1024, exponent - 25);
    const float x = f16_to_float(uint16_t(bits));
    const bool good = std::isnan(magnitude) ? std::isnan(x)
                                            : double(x) == magnitude * (bits >> 15 ? -1 : 1) &&
                                                  std::signbit(x) == bool(bits >> 15);
    if (!good) FAIL("F16 " << bits << " is " << x);
    const float y = bf16_to_float(uint16_t(bits));
    if (!(std::isnan(y) ? std::isnan(bf16_to_float(float_to_bf16(y))) : float_to_bf16(y) == bits)) {
      FAIL("BF16 " << bits << " is " << y);
    }
  }
  CHECK(bf16_to_float(float_to_bf16(1 + 0x1p-8f)) == 1.f);              // tie: to even
  CHECK(bf16_to_float(float_to_bf16(1 + 3 * 0x1p-8f)) == 1 + 0x1p-6f);  // tie: to even
  CHECK(bf16_to_float(float_to_bf16(1 + 1.01f * 0x1p-8f)) == 1 + 0x1p-7f);
  CHECK(std::isinf(bf16_to_float(float_to_bf16(3.4e38f))));
  uint32_t quiet_at_the_end = 0x7f800001;  // a NaN whose upper half alone would be infinity
  float nan;
  std::memcpy(&nan, &quiet_at_the_end, 4);
  CHECK(std::isnan(bf16_to_float(float_to_bf16(nan))));
}

TEST_CASE("tensors written are the tensors read, in F32 and BF16") {
  TempDir dir;
  const LooseTensors loose = {{"a", {{2, 3}, {1, 2, 3, -4, .5f, 6}}},
                              {"b.weight", {{4}, {0, 1e-30f, -1e30f, 7}}},
                              {"empty", {{0, 5}, {}}},
                              {"scalar", {{}, {3.25f}}}};
  write_loose(dir / "x", loose);
  const LooseTensors back = read_loose(dir / "x");
  REQUIRE(back.size() == 4);
  for (const auto& [name, t] : loose) {
    CHECK(back.at(name).shape == t.shape);
    CHECK(back.at(name).values == t.values);
  }
  write_loose(dir / "y", loose, true);
  CHECK(SafeTensors(dir / "y").find("a")->dtype == "BF16");
  for (const auto& [name, t] : loose) {
    // 8 bits of precision: half a unit in the last place is 2^-8 at most
    CHECK(rel_error(read_loose(dir / "y").at(name).values, t.values) <= 0x1p-8);
  }
}

TEST_CASE("a damaged safetensors file is an error that names the file and the tensor") {
  TempDir dir;
  const auto path = dir / "m.safetensors";
  const auto error = [&](const std::string& header, size_t data_bytes) {
    write_raw(path, header, std::string(data_bytes, '\0'));
    return error_of([&] { read_loose(path); });
  };
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + "}}";
  };
  CHECK(error(entry("F32", "[2,3]", "[0,24]"), 24) == "no error");
  CHECK(error(R"({"__metadata__":{"format":"pt"}})", 0) == "no error");

  // length
  CHECK(contains(error_of([&] { SafeTensors file(dir / "none"); }), "none: cannot open"));
  write_file(path, "");
  CHECK(contains(error_of([&] { SafeTensors file(path); }), "m.safetensors: found 0 bytes"));
  write_file(path, "short");
  CHECK(contains(error_of([&] { SafeTensors file(path); }), "found 5 bytes, expected a header"));
  write_file(path, "<html><body>404 not found");
  CHECK(contains(error_of([&] { SafeTensors file(path); }), "truncated or no safetensors file"));
  write_file(path, std::string(8, '\xff') + "{}");
  CHECK(contains(error_of([&] { SafeTensors file(path); }), "found a header of 1844674407370955"));
  write_raw(path, entry("F32", "[2,3]", "[0,24]"), std::string(24, '\0'));
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  CHECK(contains(error_of([&] { SafeTensors file(path); }),
                 "m.safetensors: a: data_offsets: found [0,24], expected two within the 23 bytes"));
  CHECK(contains(error(entry("F32", "[2,3]", "[0,24]"), 28), "found 28 bytes of tensors"));
  CHECK(contains(error("{}", 4), "found 4 bytes of tensors, expected the 0"));
  // header
  CHECK(contains(error("{\"a\":", 0), "header: not JSON: parse error"));
  CHECK(contains(error("[]", 0), "found no JSON object"));
  CHECK(contains(error("", 0), "not JSON"));
  CHECK(contains(error(R"({"a":3})", 0), "a: found 3, expected an object"));
  CHECK(contains(error(R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},
                           "a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
                       0),
                 "found the tensor a twice"));
  CHECK(contains(error(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4), "a: dtype is missing"));
  CHECK(contains(error(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4), "a: shape: expected"));
  CHECK(contains(error(R"({"a":{"dtype":"F32","shape":[1]}})", 4), "data_offsets: found null"));
  // type
  CHECK(contains(error(entry("F33", "[1]", "[0,4]"), 4), "a: dtype: found F33"));
  CHECK(contains(error(entry("I32", "[1]", "[0,4]"), 4), "a: found type I32, expected F32, BF16"));
  // shape
  CHECK(
      contains(error(entry("F32", "[2,4]", "[0,24]"), 24), "found 24 bytes, expected F32 (2, 4)"));
  CHECK(contains(error(entry("BF16", "[2,3]", "[0,24]"), 24), "found 24 bytes, expected BF16"));
  CHECK(contains(error(entry("F32", "[-2,-3]", "[0,24]"), 24), "shape: found [-2,-3]"));
  CHECK(contains(error(entry("F32", "[2.5]", "[0,10]"), 10), "shape: found 2.5"));
  CHECK(contains(error(entry("F32", "[4294967296,4294967296]", "[0,0]"), 0), "possible sizes"));
  CHECK(contains(error(entry("F32", "[4611686018427387904]", "[0,0]"), 0), "found 0 bytes"));
  // offsets
  CHECK(contains(error(entry("F32", "[1]", "[4,0]"), 4), "data_offsets: found [4,0]"));
  CHECK(contains(error(entry("F32", "[1]", "[-4,0]"), 4), "data_offsets: found [-4,0]"));
  CHECK(contains(error(entry("F32", "[1]", "[0]"), 4), "data_offsets: found [0]"));
  CHECK(contains(error(entry("F32", "[1]", "[4,8]"), 8), "found a begin at 4, expected 0"));
  const auto two = [&](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + a +
           R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":)" + b + "}}";
  };
  CHECK(error(two("[8,16]", "[0,8]"), 16) == "no error");
  CHECK(contains(error(two("[0,8]", "[4,12]"), 12), "b: data_offsets: found a begin at 4"));
  CHECK(contains(error(two("[0,8]", "[0,8]"), 8), "b: data_offsets: found those of a"));
  CHECK(contains(error(two("[0,8]", "[12,20]"), 20), "found a begin at 12, expected 8"));
}

TEST_CASE("shards are read through their index, whose statements are checked") {
  TempDir dir;
  write_loose(dir / "one.safetensors", {{"a", {{2}, {1, 2}}}});
  write_loose(dir / "two.safetensors", {{"b", {{1}, {3}}}});
  const auto error = [&](const Json& map) {
    write_file(dir / "model.safetensors.index.json", Json{{"weight_map", map}}.dump());
    return error_of([&] { SafeTensors::of_model(dir.path()); });
  };
  CHECK(error({{"a", "one.safetensors"}, {"b", "two.safetensors"}}) == "no error");
  const SafeTensors all = SafeTensors::of_model(dir.path());
  CHECK(all.tensors().size() == 2);
  std::vector<float> b(1);
  all.find("b")->read(0, b);
  CHECK(b[0] == 3);
  CHECK(contains(error({{"a", "one.safetensors"}, {"c", "two.safetensors"}}),
                 "index.json: c: not found in two.safetensors"));
  CHECK(contains(error({{"a", "none.safetensors"}}), "none.safetensors: cannot open"));
  CHECK(contains(error({{"a", "../one.safetensors"}}), "a: found ../one.safetensors"));
  CHECK(contains(error({{"a", 3}}), "a: found 3, expected a string"));
  CHECK(contains(error("x"), "weight_map is missing"));
  write_loose(dir / "two.safetensors", {{"a", {{1}, {3}}}});
  CHECK(
      contains(error({{"a", "one.safetensors"}, {"b", "two.safetensors"}}), "found in two files"));
  TempDir empty;
  CHECK(contains(error_of([&] { SafeTensors::of_model(empty.path()); }),
                 "model.safetensors: cannot open"));
}

// -------------------------------------------------------------------------------------------------
// Weights by the table

TEST_CASE("weights saved are the weights loaded, for every family, head and tying") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      for (const Head head : {Head::lm, Head::scalar}) {
        TempDir dir;
        Config c = tiny(family);
        c.tied = tied;
        c.head = head;
        FakeGpt a(c);
        a.randomize(1);
        save_checkpoint(dir / "m", a, {});
        FakeGpt b(load_config(dir / "m"));
        load_weights(dir / "m", b);
        check_same_weights(a, b);
        CHECK(!std::filesystem::exists(dir / "m/trainer_state.json"));
        CHECK(!std::filesystem::exists(dir / "m.new"));
        const bool lm_head = SafeTensors::of_model(dir / "m").find("lm_head.weight");
        CHECK(lm_head == (head == Head::lm && !tied));
      }
    }
  }
}

TEST_CASE("gpt2 stores q, k and v as columns of one tensor (in, out)") {
  TempDir dir;
  const Config c = tiny(Family::gpt2);
  FakeGpt gpt(c);
  gpt.randomize(1);
  save_checkpoint(dir / "m", gpt, {});
  const LooseTensors disk = read_loose(dir / "m/model.safetensors");
  const Loose& weight = disk.at("h.1.attn.c_attn.weight");
  const Loose& bias = disk.at("h.1.attn.c_attn.bias");
  CHECK(weight.shape == std::vector<int64_t>{12, 36});
  CHECK(bias.shape == std::vector<int64_t>{36});
  for (int part = 0; part < 3; part++) {
    const std::string name = std::string("blocks.1.") + "qkv"[part];
    const std::vector<float> w = gpt.values(name + ".weight"), b = gpt.values(name + ".bias");
    for (int o = 0; o < 12; o++) {
      CHECK(bias.values[size_t(part * 12 + o)] == b[size_t(o)]);
      for (int i = 0; i < 12; i++) {
        CHECK(weight.values[size_t(i * 36 + part * 12 + o)] == w[size_t(o * 12 + i)]);
      }
    }
  }
  const Loose& fc = disk.at("h.0.mlp.c_fc.weight");
  CHECK(fc.shape == std::vector<int64_t>{12, 20});
  CHECK(fc.values[3 * 20 + 7] == gpt.values("blocks.0.up.weight")[7 * 12 + 3]);
  CHECK(disk.at("wte.weight").shape == std::vector<int64_t>{19, 12});
  // With a head of its own, or a score, transformers 4 finds the others by their prefix alone.
  for (const Head head : {Head::lm, Head::scalar}) {
    Config other = c;
    other.head = head, other.tied = head == Head::scalar;
    save_checkpoint(dir / "other", FakeGpt(other), {});
    CHECK(read_loose(dir / "other/model.safetensors").count("transformer.wte.weight") == 1);
  }
}

TEST_CASE("names with and without the root, buffers and an equal tied head are accepted") {
  TempDir dir;
  for (const Family family : kFamilies) {
    Config c = tiny(family);
    c.tied = true;
    FakeGpt a(c), b(c);
    a.randomize(1);
    save_checkpoint(dir / "m", a, {});
    const auto path = dir / "m/model.safetensors";
    const std::string root = family == Family::gpt2 ? "transformer." : "model.";
    LooseTensors disk, bare;
    for (const auto& [name, t] : read_loose(path)) {
      const std::string end = name.starts_with(root) ? name.substr(root.size()) : name;
      disk[root + end] = bare[end] = t;
    }
    bare["h.0.attn.bias"] = {{1, 1, 2, 2}, {1, 0, 1, 1}};
    bare["h.0.attn.masked_bias"] = {{}, {-1e4}};
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = {{1}, {1}};
    write_loose(path, bare);
    CHECK(load_error(dir / "m", b) == "no error");
    check_same_weights(a, b);

    LooseTensors with_head = disk;
    const std::string wte = root + (family == Family::gpt2 ? "wte.weight" : "embed_tokens.weight");
    with_head["lm_head.weight"] = disk.at(wte);
    write_loose(path, with_head);
    CHECK(load_error(dir / "m", b) == "no error");
    with_head["lm_head.weight"].values[5] += 1;
    write_loose(path, with_head);
    CHECK(contains(load_error(dir / "m", b), "lm_head.weight: found values that differ"));
    with_head["lm_head.weight"] = {{1, 12}, std::vector<float>(12)};
    write_loose(path, with_head);
    CHECK(contains(load_error(dir / "m", b), "lm_head.weight: found shape (1, 12)"));
  }
}

TEST_CASE("weights of another model are errors that name the tensor") {
  TempDir dir;
  const Config c = tiny(Family::qwen3);
  FakeGpt gpt(c);
  gpt.randomize(1);
  save_checkpoint(dir / "m", gpt, {});
  const auto path = dir / "m/model.safetensors";
  const LooseTensors good = read_loose(path);
  const auto error = [&](auto&& change) {
    LooseTensors changed = good;
    change(changed);
    write_loose(path, changed);
    return load_error(dir / "m", gpt);
  };
  const std::string name = "model.layers.1.self_attn.k_proj.weight";
  CHECK(contains(error([&](auto& t) { t.erase(name); }), "tensor " + name + " is missing"));
  CHECK(contains(error([&](auto& t) {
                   t["model.layers.2.mlp.up_proj.weight"] = {{1}, {0}};
                 }),
                 "model.layers.2.mlp.up_proj.weight: found a tensor that a Qwen3ForCausalLM"));
  CHECK(contains(error([&](auto& t) {
                   t["model.layers.0.self_attn.q_proj.bias"] = {{1}, {0}};
                 }),
                 "q_proj.bias: found a tensor"));
  CHECK(contains(error([&](auto& t) { std::swap(t[name].shape[0], t[name].shape[1]); }),
                 name + ": found shape (12, 6), expected (6, 12)"));
  CHECK(contains(error([&](auto& t) {
                   t["model.norm.weight"].shape = {12, 1};
                 }),
                 "model.norm.weight: found shape (12, 1), expected (12)"));
  CHECK(contains(error([&](auto& t) {
                   t["lm_head.weight"].shape = {38, 6};
                 }),
                 "lm_head.weight: found shape (38, 6), expected (19, 12)"));
}

TEST_CASE("a reward model starts from a language model only when it says so") {
  for (const bool tied : {false, true}) {
    TempDir dir;
    Config c = tiny(Family::llama);
    c.tied = tied;
    FakeGpt lm(c);
    lm.randomize(1);
    save_checkpoint(dir / "m", lm, {});
    c.head = Head::scalar;
    FakeGpt reward(c);
    CHECK(contains(load_error(dir / "m", reward), "tensor score.weight is missing"));
    CHECK(load_error(dir / "m", reward, true) == "no error");
    const int score = reward.table().find("score");
    CHECK(reward.values(score) == initial_values(reward.table().tensors[size_t(score)], 5));
    CHECK(reward.values("wte") == lm.values("wte"));
    save_checkpoint(dir / "r", reward, {});  // and back: a score that is there is kept
    reward.randomize(2);
    const std::vector<float> before = reward.values(score);
    CHECK(load_error(dir / "r", reward, true) == "no error");
    CHECK(reward.values(score) != before);
    CHECK(contains(load_error(dir / "r", lm),
                   tied ? "score.weight: found a tensor" : "tensor lm_head.weight is missing"));
  }
}

TEST_CASE("BF16 weights load to what BF16 can hold") {
  TempDir dir;
  FakeGpt a(tiny(Family::qwen3)), b(tiny(Family::qwen3));
  a.randomize(1);
  save_checkpoint(dir / "m", a, {.type = FloatType::bf16});
  CHECK(read_json(dir / "m/config.json")["dtype"] == "bfloat16");
  load_weights(dir / "m", b);
  for (size_t i = 0; i < a.table().tensors.size(); i++) {
    CHECK(rel_error(b.values(int(i)), a.values(int(i))) <= 0x1p-8);
  }
  CHECK(contains(error_of([&] {
                   save_checkpoint(dir / "m", a, {.optimizer = true, .type = FloatType::bf16});
                 }),
                 "found bf16 with the optimizer's state"));
}

// -------------------------------------------------------------------------------------------------
// Trainer state

TEST_CASE("trainer state and moments come back exactly, Muon's and AdamW's") {
  for (const bool muon : {false, true}) {
    TempDir dir;
    const Config c = tiny(Family::qwen3);
    FakeGpt a(c, muon), b(c, muon);
    a.randomize(1);
    const Json state = {{"step", 7}, {"loss", 0.1}, {"seed", 0xffffffffffffffffull}};
    save_checkpoint(dir / "m", a, {.trainer_state = state, .optimizer = true});
    load_weights(dir / "m", b);
    CHECK(load_trainer_state(dir / "m", b) == state);
    check_same_weights(a, b);
    for (size_t i = 0; i < a.table().tensors.size(); i++) {
      const bool owned = a.table().tensors[i].muon;
      CHECK(b.values(int(i), Slot::moment1) == a.values(int(i), Slot::moment1));
      CHECK((b.values(int(i), Slot::moment2) == a.values(int(i), Slot::moment2)) == !owned);
    }
    FakeGpt other(c, !muon);
    CHECK(contains(error_of([&] { load_trainer_state(dir / "m", other); }),
                   "resume with the optimizer that the run began with"));
    save_checkpoint(dir / "m", a, {});  // without state: gone with the old directory
    CHECK(contains(error_of([&] { load_trainer_state(dir / "m", b); }),
                   "trainer_state.json: not found"));
  }
}

TEST_CASE("what a device's speed decided comes back with the trainer's state") {
  struct Timed : FakeGpt {
    using FakeGpt::FakeGpt;
    std::map<std::string, std::string> chosen;
    std::map<std::string, std::string> tuned_plans() const override { return chosen; }
    void set_tuned_plans(const std::map<std::string, std::string>& plans) override {
      chosen = plans;
    }
  };
  TempDir dir;
  Timed a(tiny(Family::qwen3)), b(tiny(Family::qwen3));
  a.chosen = {{"gpu", "a fast one"}, {"product 3 4 5", "00ff"}};
  save_checkpoint(dir / "m", a, {.trainer_state = {{"step", 7}}, .optimizer = true});
  CHECK(load_trainer_state(dir / "m", b)["step"] == 7);
  CHECK(b.chosen == a.chosen);
  Timed begun(
      tiny(Family::qwen3));  // a model to begin from may be anyone's: its plans are not read
  load_weights(dir / "m", begun);
  CHECK(begun.chosen.empty());
  FakeGpt elsewhere(tiny(Family::qwen3));  // an engine that times nothing
  CHECK(load_trainer_state(dir / "m", elsewhere)["step"] == 7);
  write_file(dir / "m/trainer_state.json", R"({"step": 7, "choices": {"gpu": 5}})");
  CHECK(contains(error_of([&] { load_trainer_state(dir / "m", b); }), "choices: found "));
}

// -------------------------------------------------------------------------------------------------
// Adapters

namespace {

constexpr Lora kLora{.rank = 3, .alpha = 5};

// Adapters of random values beside the model in `base`, and moments.
FakeGpt with_adapters(const std::filesystem::path& base, uint64_t seed) {
  FakeGpt gpt(load_config(base), false, kLora);
  load_weights(base, gpt);
  const auto& tensors = gpt.table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    if (tensors[i].kind != Kind::adapter) continue;
    Tensor t = tensors[i];
    t.init_std = .3;
    for (const Slot slot : {Slot::weight, Slot::moment1, Slot::moment2}) {
      gpt.write(int(i), slot, initial_values(t, mix64(seed, uint64_t(slot))));
    }
  }
  return gpt;
}

void save_base(const std::filesystem::path& dir, const Config& c, uint64_t seed = 1) {
  FakeGpt gpt(c);
  gpt.randomize(seed);
  save_checkpoint(dir, gpt, {});
}

}  // namespace

TEST_CASE("adapters saved are the adapters loaded, on their base and without its weights") {
  for (const Family family : kFamilies) {
    TempDir dir;
    save_base(dir / "a/base/model", tiny(family));
    const FakeGpt a = with_adapters(dir / "a/base/model", 7);
    SaveOptions options{.trainer_state = {{"step", 3}}, .optimizer = true};
    options.base = adapter_base(dir / "a/base/model");
    save_checkpoint(dir / "a/run/model", a, options);
    const auto files = contents(dir / "a/run/model");
    CHECK(files.count("model.safetensors") == 0);
    CHECK(files.count("adapter_config.json") == 1);
    CHECK(files.count("config.json") == 1);
    size_t bytes = 0;
    for (const auto& [name, content] : files) {
      if (name.find("safetensors") != std::string::npos) bytes += content.size();
    }
    CHECK(int64_t(bytes) <= checkpoint_bytes(a.table(), true));
    CHECK(checkpoint_bytes(a.table(), true) < checkpoint_bytes(a.table(), false) * 4);
    std::filesystem::rename(dir / "a", dir / "b");  // the two move together
    const auto run = dir / "b/run/model";
    FakeGpt b(load_config(run), false, kLora);
    load_weights(run, b);
    CHECK(load_trainer_state(run, b) == options.trainer_state);
    check_same_weights(a, b);
    for (size_t i = 0; i < a.table().tensors.size(); i++) {
      if (!a.table().tensors[i].trainable) continue;
      CHECK(b.values(int(i), Slot::moment1) == a.values(int(i), Slot::moment1));
      CHECK(b.values(int(i), Slot::moment2) == a.values(int(i), Slot::moment2));
    }
    // New ones begin as the same function: B is zero.
    FakeGpt fresh(load_config(run), false, kLora);
    load_weights(dir / "b/base/model", fresh, {.seed = 4});
    for (size_t i = 0; i < a.table().tensors.size(); i++) {
      const Tensor& t = a.table().tensors[i];
      if (t.kind == Kind::adapter) CHECK(fresh.values(int(i)) == initial_values(t, 4));
    }
    CHECK(adapter_base(run).hash == options.base.hash);
    CHECK(std::filesystem::equivalent(adapter_base(run).dir, dir / "b/base/model"));
  }
}

TEST_CASE("an engine without rows for adapters gets W + alpha / rank B A") {
  for (const Family family : kFamilies) {
    TempDir dir;
    save_base(dir / "base", tiny(family));
    const FakeGpt a = with_adapters(dir / "base", 7);
    save_checkpoint(dir / "run", a, {.base = adapter_base(dir / "base")});
    FakeGpt merged(load_config(dir / "run"));
    load_weights(dir / "run", merged);
    for (size_t i = 0; i < merged.table().tensors.size(); i++) {
      const Tensor& t = merged.table().tensors[i];
      CAPTURE(t.name);
      std::vector<float> w = a.values(int(i));
      if (t.kind == Kind::matrix) {
        std::vector<float> A, B;
        for (size_t j = 0; j < a.table().tensors.size(); j++) {
          if (a.table().tensors[j].disk == adapter_name(t.disk, "A")) A = a.values(int(j));
          if (a.table().tensors[j].disk == adapter_name(t.disk, "B")) B = a.values(int(j));
        }
        REQUIRE(A.size() == size_t(3 * t.in));
        REQUIRE(B.size() == size_t(3 * t.disk_out));
        for (int o = 0; o < t.out; o++)
          for (int k = 0; k < t.in; k++) {
            double sum = w[size_t(o * t.in + k)];
            for (int r = 0; r < 3; r++) {
              sum += 5. / 3 * B[size_t((t.disk_begin + o) * 3 + r)] * A[size_t(r * t.in + k)];
            }
            w[size_t(o * t.in + k)] = float(sum);
          }
        CHECK(rel_error(w, a.values(int(i))) > .1);
      }
      CHECK(rel_error(merged.values(int(i)), w) < 1e-6);  // sums of four numbers in float
    }
  }
}

TEST_CASE("adapters whose base is gone or another, or that do not fit, are errors") {
  TempDir dir;
  save_base(dir / "their_base", tiny(Family::qwen3));
  const FakeGpt a = with_adapters(dir / "their_base", 7);
  const SaveOptions options{.base = adapter_base(dir / "their_base")};
  const auto run = dir / "run", config = run / "adapter_config.json";
  save_checkpoint(run, a, options);
  FakeGpt plain(tiny(Family::qwen3));
  CHECK(load_error(run, plain) == "no error");

  save_base(dir / "their_base", tiny(Family::qwen3), 2);  // trained again
  CHECK(contains(load_error(run, plain), "their_base: found weights of hash "));
  CHECK(contains(load_error(run, plain), "the model has changed"));
  std::filesystem::rename(dir / "their_base", dir / "elsewhere");
  CHECK(contains(
      load_error(run, plain),
      "adapter_config.json: base_model_name_or_path: found ../their_base, where no config"));
  save_base(dir / "their_base", tiny(Family::qwen3));
  CHECK(load_error(run, plain) == "no error");

  FakeGpt other(tiny(Family::qwen3), false, {.rank = 3, .alpha = 6});
  CHECK(contains(load_error(run, other), "found adapters of rank 3 and alpha 5, expected rank 3 "));

  const Json good = read_json(config);
  const auto with_key = [&](const char* key, const Json& value) {
    Json json = good;
    json[key] = value;
    write_file(config, json.dump());
    const std::string message = load_error(run, plain);
    write_file(config, good.dump());
    return message;
  };
  CHECK(contains(with_key("peft_type", "LOHA"), "peft_type: found \"LOHA\", expected \"LORA\""));
  CHECK(contains(with_key("bias", "some"), "bias: found \"some\""));
  CHECK(contains(with_key("use_dora", true), "use_dora: found true"));
  CHECK(contains(with_key("modules_to_save", {"lm_head"}),
                 "tensor base_model.model.lm_head.weight is missing"));
  CHECK(contains(with_key("rank_pattern", {{"q_proj", 8}}),
                 "q_proj.lora_A.weight: found shape (3, 12), expected (8, 12)"));
  CHECK(contains(with_key("init_lora_weights", "pissa"), "init_lora_weights: found \"pissa\""));
  CHECK(contains(with_key("r", 0), "r: found 0"));
  CHECK(contains(with_key("r", 4), "lora_A.weight: found shape (3, 12), expected (4, 12)"));
  CHECK(contains(with_key("lora_alpha", nullptr), "lora_alpha: found null"));
  CHECK(contains(with_key("base_model_name_or_path", "../run"), "which are adapters themselves"));
  CHECK(with_key("target_modules", "all-linear") == "no error");

  const auto weights = run / "adapter_model.safetensors";
  const LooseTensors tensors = read_loose(weights);
  const auto changed = [&](auto&& change) {
    LooseTensors t = tensors;
    change(t);
    write_loose(weights, t);
    return load_error(run, plain);
  };
  const std::string name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
  REQUIRE(tensors.count(name) == 1);
  CHECK(changed([](auto&) {}) == "no error");  // and no hash: as PEFT writes it
  CHECK(contains(changed([&](auto& t) { t.erase(name); }), "tensor " + name + " is missing"));
  CHECK(contains(changed([&](auto& t) {
                   t["base_model.model.lm_head.lora_A.weight"] = {{1}, {0}};
                 }),
                 "lm_head.lora_A.weight: found a tensor that adapters of a Qwen3ForCausalLM do"));

  // Saving
  CHECK(contains(error_of([&] { save_checkpoint(dir / "new", a, {}); }),
                 "found adapters to save without the model"));
  Config score = tiny(Family::qwen3);
  score.head = Head::scalar;
  const FakeGpt scalar(score, false, kLora);
  CHECK(contains(error_of([&] { save_checkpoint(dir / "new", scalar, options); }),
                 "found adapters of a scalar head"));
  CHECK(!std::filesystem::exists(dir / "new"));
}

TEST_CASE("what is not finite is refused at load: weights, adapters, moments, each by its tensor") {
  TempDir dir;
  FakeGpt a(tiny(Family::gpt2)), b(tiny(Family::gpt2));
  a.randomize(1);
  save_checkpoint(dir / "m", a, {.trainer_state = {{"step", 1}}, .optimizer = true});
  const auto spoil = [](const std::filesystem::path& file, const std::string& name) {
    LooseTensors tensors = read_loose(file);
    tensors.at(name).values.at(5) = NAN;
    write_loose(file, tensors);
  };
  // q, k and v are columns of one tensor.
  spoil(dir / "m/model.safetensors", "h.1.attn.c_attn.weight");
  CHECK(contains(load_error(dir / "m", b),
                 "model.safetensors: h.1.attn.c_attn.weight: found 1 values that are "
                 "not finite, expected none"));
  spoil(dir / "m/optimizer.safetensors", "moment2.blocks.0.q.weight");
  CHECK(contains(error_of([&] { load_trainer_state(dir / "m", b); }),
                 "optimizer.safetensors: moment2.blocks.0.q.weight: found 1 values that are not"));

  save_base(dir / "base", tiny(Family::qwen3));
  const FakeGpt adapted = with_adapters(dir / "base", 7);
  save_checkpoint(dir / "adapters", adapted, {.base = adapter_base(dir / "base")});
  const std::string name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight";
  spoil(dir / "adapters/adapter_model.safetensors", name);
  FakeGpt merged(tiny(Family::qwen3)), rows(tiny(Family::qwen3), false, kLora);
  CHECK(contains(load_error(dir / "adapters", merged), name + ": found 1 values that are not"));
  CHECK(contains(load_error(dir / "adapters", rows), name + ": found 1 values that are not"));
}

// -------------------------------------------------------------------------------------------------
// All or nothing

TEST_CASE("the tokenizer's files travel with the model") {
  TempDir dir;
  FakeGpt gpt(tiny(Family::qwen3));
  std::filesystem::create_directory(dir / "tok");
  write_file(dir / "tok/tokenizer.json", "{\"t\":1}");
  write_file(dir / "tok/tokenizer_config.json", "{}");
  write_file(dir / "tok/other.txt", "no");
  save_checkpoint(dir / "m/", gpt, {.tokenizer_from = dir / "tok"});
  CHECK(read_file(dir / "m/tokenizer.json") == "{\"t\":1}");
  CHECK(std::filesystem::exists(dir / "m/tokenizer_config.json"));
  CHECK(!std::filesystem::exists(dir / "m/other.txt"));
  save_checkpoint(dir / "m", gpt, {.tokenizer_from = dir / "m"});  // from itself
  CHECK(read_file(dir / "m/tokenizer.json") == "{\"t\":1}");
}

TEST_CASE("a save that fails leaves the old checkpoint, bit for bit, and nothing else") {
  TempDir dir;
  FakeGpt a(tiny(Family::qwen3)), b(tiny(Family::qwen3));
  a.randomize(1);
  b.randomize(2);
  save_checkpoint(dir / "m", a, {.trainer_state = {{"step", 1}}, .optimizer = true});
  const auto before = contents(dir.path());
  const SaveOptions options{.trainer_state = {{"step", 2}}, .optimizer = true};

  // A tokenizer that is not there.
  SaveOptions no_tokenizer = options;
  no_tokenizer.tokenizer_from = dir / "none";
  const std::string error = error_of([&] { save_checkpoint(dir / "m", b, no_tokenizer); });
  CHECK(contains(error, "none/tokenizer.json: cannot open"));
  CHECK(contains(error, "untouched"));
  CHECK(contents(dir.path()) == before);

  // Weights or moments that are not finite.
  for (const Slot slot : {Slot::weight, Slot::moment2}) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      FakeGpt broken(tiny(Family::qwen3));
      std::vector<float> values = broken.values("blocks.1.o.weight");
      values[3] = bad;
      broken.write(broken.table().find("blocks.1.o.weight"), slot, values);
      CHECK(contains(error_of([&] { save_checkpoint(dir / "m", broken, options); }),
                     "blocks.1.o.weight: found 1 values that are not finite"));
      CHECK(contents(dir.path()) == before);
    }
  }

  // A disk that is full, after any number of bytes: a limit on the size of files stands for it.
  const auto biggest = std::filesystem::file_size(dir / "m/optimizer.safetensors");
  for (const double part : {0., .01, .3, .55, .999}) {
    const pid_t child = fork();
    if (child == 0) {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{rlim_t(part * double(biggest)), RLIM_INFINITY};
      setrlimit(RLIMIT_FSIZE, &limit);
      const std::string message = error_of([&] { save_checkpoint(dir / "m", b, options); });
      _exit(contains(message, "cannot write: File too large") && contains(message, "untouched") &&
                    !contains(message, "\n")
                ? 0
                : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    CHECK(contents(dir.path()) == before);
  }
  save_checkpoint(dir / "m", b, options);  // and with room it goes through
  CHECK(contents(dir.path()) != before);
  CHECK(contents(dir.path()).size() == before.size());
}

TEST_CASE("a process killed at any moment of a save leaves a whole checkpoint") {
  TempDir dir;
  FakeGpt a(tiny(Family::llama)), b(tiny(Family::llama));
  a.randomize(1);
  b.randomize(2);
  const auto save = [&](const FakeGpt& gpt, int step) {
    save_checkpoint(dir / "m", gpt, {.trainer_state = {{"step", step}}, .optimizer = true});
  };
  save(a, 1);
  const auto old_files = contents(dir / "m");
  save(b, 2);
  const auto new_files = contents(dir / "m");
  const double start = now();
  save(b, 2);
  const double save_seconds = now() - start;
  for (int moment = 0; moment < 20; moment++) {  // over one and a half saves
    save(a, 1);
    const pid_t child = fork();
    if (child == 0) {
      for (;;) save(b, 2);
    }
    usleep(useconds_t(moment / 20. * 1.5e6 * save_seconds));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const auto files = contents(model_dir(dir / "m"));
    const bool whole = files == old_files || files == new_files;
    CHECK(whole);
  }
  save(a, 1);  // what the killed left is gone
  CHECK(contents(dir.path()).count("m.new") == 0);
}

TEST_CASE("an exchange in two steps that was interrupted is repaired") {
  TempDir dir;
  FakeGpt a(tiny(Family::llama)), b(tiny(Family::llama));
  a.randomize(1);
  b.randomize(2);
  save_checkpoint(dir / "run/model", a, {});
  save_checkpoint(dir / "fresh", b, {});
  const auto old_files = contents(dir / "run/model"), new_files = contents(dir / "fresh");

  // Uninterrupted, as where renameat2 is not supported.
  const auto replaced = exchange_directories(dir / "fresh", dir / "run/model", false);
  CHECK(replaced == dir / "run/model.old");
  CHECK(contents(dir / "run/model") == new_files);
  CHECK(contents(replaced) == old_files);

  // Ended after the first rename. A reader finds the old checkpoint, whichever way it is named, and
  // leaves it where a writer that is still at work needs it; a writer that goes on brings it back.
  std::filesystem::rename(dir / "run/model", dir / "run/model.new");
  CHECK(model_dir(dir / "run") == dir / "run/model.old");
  CHECK(model_dir(dir / "run/model/") == dir / "run/model.old");
  CHECK(contents(dir / "run/model.old") == old_files);
  FakeGpt reader(tiny(Family::llama));
  load_weights(model_dir(dir / "run"), reader);
  CHECK(reader.values(0) == a.values(0));
  CHECK(contents(dir / "run").count("model") == 0);
  repair_checkpoint(dir / "run/model");
  CHECK(model_dir(dir / "run") == dir / "run/model");
  CHECK(contents(dir / "run/model") == old_files);
  // A save repairs first, so that its own failure costs nothing, and cleans up what is left.
  std::filesystem::rename(dir / "run/model", dir / "run/model.old");
  CHECK(error_of([&] {
          save_checkpoint(dir / "run/model", b, {.tokenizer_from = dir / "none"});
        }) != "no error");
  CHECK(contents(dir / "run/model") == old_files);
  std::filesystem::rename(dir / "run/model", dir / "run/model.old");
  save_checkpoint(dir / "run/model", b, {});
  CHECK(contents(dir / "run").count("model.old") == 0);
  CHECK(contents(dir / "run").count("model.new") == 0);
  CHECK(contents(dir / "run/model") == new_files);
}

TEST_CASE("a run and its model directory both name the model") {
  TempDir dir;
  FakeGpt gpt(tiny(Family::gpt2));
  save_checkpoint(dir / "run/model", gpt, {});
  CHECK(model_dir(dir / "run") == dir / "run/model");
  CHECK(model_dir(dir / "run/model") == dir / "run/model");
  CHECK(contains(error_of([&] { model_dir(dir / "none"); }), "none: not found"));
  std::filesystem::create_directory(dir / "empty");
  CHECK(contains(error_of([&] { model_dir(dir / "empty"); }), "found neither config.json nor"));
}
