// What users of other programs ran into, as public bug reports tell it, on this project's binaries.
// Each test states what is right. Cases that belong to one function are tested beside it.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cake/checkpoint.h"
#include "test/scripted_model.h"
#include "test/support.h"

using namespace cake;

namespace {

// Exit status 1 and one line, which has `part`.
void check_refused(const std::string& command, const std::string& part) {
  const Output o = shell(command);
  CAPTURE(command);
  CHECK(o.status == 1);
  CHECK_MESSAGE(o.text.rfind("error: ", 0) == 0, o.text.substr(0, 400));
  CHECK_MESSAGE(contains(o.text, part), o.text.substr(0, 400));
  CHECK(std::count(o.text.begin(), o.text.end(), '\n') == 1);
}

std::string output_of(const std::string& command) {
  const Output o = shell(command);
  CAPTURE(command);
  CHECK_MESSAGE(o.status == 0, o.text.substr(0, 600));
  return o.text;
}

// The ids that `./bpe ids` gives for a text.
std::string ids_of(const std::string& tokenizer, const std::string& file) {
  return output_of("./bpe ids " + tokenizer + " " + file);
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// Tokenizers

TEST_CASE("a model trained with any kind of tokenizer file is saved with a tokenizer of its ids") {
  ScriptedModel m;
  const std::string d = m.dir().path().string() + "/";
  std::filesystem::create_directories(d + "files");
  std::string text;
  for (int i = 0; i < 200; i++) text += "hello well hell ";
  write_file(d + "a.txt", text);
  write_file(d + "b.txt", "well, a yellow hell\n");
  // Two merges alone, and beside them another tokenizer.json, which is not theirs.
  write_file(d + "files/vocab.bpe", "#version: 0.2\nh e\nl l\n");
  std::filesystem::copy(d + "tokenizer/tokenizer.json", d + "files/tokenizer.json");
  std::filesystem::copy(d + "tokenizer/tokenizer.json", d + "files/another_name.json");
  std::vector<std::string> names = {"vocab.bpe", "another_name.json"};
  if (std::filesystem::exists(data_path("tokenizers/r50k_base.tiktoken"))) {
    std::filesystem::copy(data_path("tokenizers/r50k_base.tiktoken"), d + "files/ranks.tiktoken");
    names.push_back("ranks.tiktoken");
  }
  for (const std::string& name : names) {
    CAPTURE(name);
    const std::string file = d + "files/" + name, run = d + "run-" + name;
    output_of("./bpe encode " + file + " " + d + "a.txt --val-fraction .1 -o " + run + ".tokens/x");
    output_of("./train_gpt --data " + run + ".tokens/x -o " + run +
              " --layers 1 --channels 32 --heads 1 --context 32 --batch-tokens 64 --steps 1 "
              "--device cpu");
    CHECK(ids_of(run + "/model", d + "b.txt") == ids_of(file, d + "b.txt"));
  }
}

TEST_CASE("vocab.json and merges.txt are a tokenizer, by either name and in a directory") {
  if (skip_without_data("tokenizers/gpt2_encoder.json")) return;
  TempDir dir;
  const std::string d = dir.path().string() + "/";
  std::filesystem::create_directories(d + "slow");
  std::filesystem::copy(data_path("tokenizers/gpt2_encoder.json"), d + "slow/vocab.json");
  std::filesystem::copy(data_path("tokenizers/gpt2_vocab.bpe"), d + "slow/merges.txt");
  write_file(d + "text.txt", "a  b, and a model of 2026");  // "model" is a token of GPT-2's
  for (const std::string name : {"slow", "slow/vocab.json", "slow/merges.txt"}) {
    CAPTURE(name);
    // tiktoken's encoding of the same text
    CHECK(ids_of(d + name, d + "text.txt") == "[64,220,275,11,290,257,2746,286,1160,2075]\n");
  }
}

TEST_CASE("a regular expression's pieces are the same by Isolated and by Removed with invert") {
  ScriptedModel m;
  const std::string d = m.dir().path().string() + "/";
  Json json = read_json(d + "tokenizer/tokenizer.json");
  int changed = 0;
  for (Json& step : json["pre_tokenizer"]["pretokenizers"]) {
    if (step["type"] != "Split") continue;
    REQUIRE(step["behavior"] == "Isolated");
    step["behavior"] = "Removed", step["invert"] = true, changed++;
  }
  REQUIRE(changed == 1);
  write_file(d + "other.json", json.dump());
  write_file(d + "text.txt", "The answer is  42.\n\n\tuser's\xC3\xA9 12345 x");
  CHECK(ids_of(d + "other.json", d + "text.txt") == ids_of(d + "tokenizer", d + "text.txt"));
}

TEST_CASE("an added token that is not special is one id in a text and in what is trained") {
  ScriptedModel m;
  const std::string model = m.save(), d = m.dir().path().string() + "/";
  Json json = read_json(model + "/tokenizer.json");
  std::string id;
  for (Json& token : json["added_tokens"]) {
    if (token["content"] != "<think>") continue;
    token["special"] = false, id = token["id"].dump();
  }
  REQUIRE(!id.empty());
  write_file(d + "text.txt", "a<think>b");
  write_file(d + "data.jsonl", R"({"prompt": "x", "completion": "<think>b"})"
                               "\n");
  const std::string show =
      "./sft --model " + model + " --val-fraction 0 --show 1 --data " + d + "data.jsonl";
  CHECK(!contains(ids_of(model, d + "text.txt"), "," + id + ","));
  CHECK(!contains(output_of(show), ", 3 trained"));
  write_file(model + "/tokenizer.json", json.dump());
  CHECK(contains(ids_of(model, d + "text.txt"), "," + id + ","));
  CHECK(contains(output_of(show), ", 3 trained"));  // it, b and the end
}

TEST_CASE("an id without a token decodes to nothing, and one beyond the vocabulary is an error") {
  if (skip_without_data("tokenizers/cl100k_base.tiktoken")) return;
  const std::string file = data_path("tokenizers/cl100k_base.tiktoken").string();
  CHECK(output_of("./bpe decode " + file + " 9906 100256 1917") == "Hello world");
  check_refused("./bpe decode " + file + " 100277", "100277");
}

TEST_CASE("a tokenizer of nothing is an error, and one of spaces is smaller than asked for") {
  TempDir dir;
  const std::string d = dir.path().string() + "/";
  write_file(d + "empty.txt", "");
  write_file(d + "spaces.txt", "   ");
  check_refused("./bpe train " + d + "empty.txt --vocab-size 300 -o " + d + "none",
                "empty.txt: found an empty file");
  CHECK(!std::filesystem::exists(d + "none"));
  const std::string said =
      output_of("./bpe train " + d + "spaces.txt --vocab-size 300 -o " + d + "spaces");
  CHECK(contains(said, "the text has pairs for only 275 of the 300 tokens asked for"));
}

// -------------------------------------------------------------------------------------------------
// Sampling

TEST_CASE("the smallest temperatures give the text of temperature 0, and log-probabilities") {
  ScriptedModel m;
  const std::string model = m.save(), d = m.dir().path().string() + "/";
  write_file(d + "prompts.txt", "a\n");
  const auto generated = [&](const std::string& temperature) {
    output_of("./chat generate " + model + " --prompts " + d + "prompts.txt --max-tokens 5 -o " +
              d + "out.jsonl --seed 1 --temperature " + temperature);
    return Json::parse(read_file(d + "out.jsonl"));
  };
  const Json greedy = generated("0");
  for (const std::string temperature : {"1e-4", "1e-30", "1e-39", "1e-45"}) {
    CAPTURE(temperature);
    const Json sampled = generated(temperature);
    CHECK(sampled["tokens"] == greedy["tokens"]);
    CHECK(sampled["logp"] == Json{0., 0., 0., 0., 0.});
  }
}

// -------------------------------------------------------------------------------------------------
// Models of other programs

TEST_CASE("the head is the embedding or not as the tensors say it, against tie_word_embeddings") {
  for (const bool tied : {false, true}) {
    ScriptedModel m;
    TempDir dir;
    Config c{.family = Family::llama, .V = m.tokenizer().vocab_size(), .T = 16, .L = 1, .C = 8};
    c.NH = c.NKV = 1, c.HS = 8, c.F = 8, c.tied = tied;
    FakeGpt gpt(c);
    gpt.randomize(1);
    const auto model = dir / "model";
    save_checkpoint(model, gpt, {.tokenizer_from = m.dir() / "tokenizer"});
    Json json = read_json(model / "config.json");
    CHECK(load_config(model).tied == tied);
    json["tie_word_embeddings"] = !tied;
    write_file(model / "config.json", json.dump());
    CHECK(load_config(model).tied == tied);
    FakeGpt loaded(load_config(model));
    load_weights(model, loaded);
    CHECK(loaded.table().tensors.size() == gpt.table().tensors.size());
    CHECK(loaded.values("wte") == gpt.values("wte"));
    if (!tied) CHECK(loaded.values("head") == gpt.values("head"));
    const std::string said =
        output_of("./chat generate " + model.string() + " --prompt a --max-tokens 2");
    CHECK(contains(said, tied ? "tie_word_embeddings is false, but there is no lm_head.weight"
                              : "tie_word_embeddings is true, but lm_head.weight differs"));
    // What is saved from it is in agreement again.
    save_checkpoint(dir / "again", loaded, {});
    CHECK(read_json(dir / "again/config.json")["tie_word_embeddings"] == tied);
  }
}

TEST_CASE("a chat template's own system message is rendered") {
  const char* with_system = R"({%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nYou are a baker.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %})";
  ScriptedModel m;
  const std::string model = m.save(), d = m.dir().path().string() + "/";
  write_file(d + "chat.jsonl", R"({"messages": [{"role": "user", "content": "x"}, )"
                               R"({"role": "assistant", "content": "a"}]})"
                               "\n");
  const std::string show =
      "./sft --model " + model + " --val-fraction 0 --show 1 --data " + d + "chat.jsonl";
  CHECK(!contains(output_of(show), "You are a baker."));
  // In transformers' older form: a list of templates by name.
  Json config = read_json(model + "/tokenizer_config.json");
  config["chat_template"] = Json::array({{{"name", "tool_use"}, {"template", "none"}},
                                         {{"name", "default"}, {"template", with_system}}});
  write_file(model + "/tokenizer_config.json", config.dump());
  CHECK(contains(output_of(show), "You are a baker."));
}

TEST_CASE("files that were not downloaded whole are errors that say so") {
  ScriptedModel m;
  const std::string model = m.save(), weights = model + "/model.safetensors";
  const std::string generate = "./chat generate " + model + " --prompt a --max-tokens 1";
  const std::string whole = read_file(weights), tokenizer = read_file(model + "/tokenizer.json");
  output_of(generate);
  write_file(weights, whole.substr(0, 100'000));
  check_refused(generate, "expected two within the ");
  write_file(weights, whole.substr(0, whole.size() - 1));
  check_refused(generate, "model.safetensors: ");
  write_file(weights, whole.substr(0, 5));
  check_refused(generate, "found 5 bytes, expected a header");
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n";
  write_file(weights, pointer);
  check_refused(generate,
                "model.safetensors: found a pointer of Git LFS, expected the file itself");
  write_file(weights, whole);
  write_file(model + "/tokenizer.json", pointer);
  check_refused(generate, "tokenizer.json: found a pointer of Git LFS");
  write_file(model + "/tokenizer.json", tokenizer);
  write_file(m.dir() / "model.gguf", pointer);
  check_refused("./chat generate " + (m.dir() / "model.gguf").string(),
                "model.gguf: found a pointer of Git LFS");
  // Shards: one that is missing, and one that is cut
  std::filesystem::rename(weights, model + "/model-00001-of-00001.safetensors");
  const SafeTensors shard(model + "/model-00001-of-00001.safetensors");
  Json map = Json::object();
  for (const auto& item : shard.tensors()) map[item.first] = "model-00001-of-00001.safetensors";
  const std::string index = model + "/model.safetensors.index.json";
  write_file(index, Json{{"weight_map", map}}.dump());
  output_of(generate);
  write_file(model + "/model-00001-of-00001.safetensors", whole.substr(0, whole.size() / 2));
  check_refused(generate, "model-00001-of-00001.safetensors: ");
  map[map.begin().key()] = "model-00002-of-00002.safetensors";
  write_file(index, Json{{"weight_map", map}}.dump());
  check_refused(generate, "model-0000");
}

TEST_CASE("weights of 8 bits are refused by their type") {
  ScriptedModel m;
  const std::string model = m.save(), weights = model + "/model.safetensors";
  const std::string whole = read_file(weights);
  uint64_t length;
  std::memcpy(&length, whole.data(), 8);
  Json header = Json::parse(whole.substr(8, length));
  for (const std::string type : {"F8_E4M3", "I8", "F4"}) {
    Json changed = header;
    Json& tensor = changed["wpe.weight"];
    tensor["dtype"] = type;
    tensor["shape"] = {tensor["shape"][0].get<int>() * 4, tensor["shape"][1]};
    const std::string text = changed.dump();
    const uint64_t size = text.size();
    write_file(weights, std::string(reinterpret_cast<const char*>(&size), 8) + text +
                            whole.substr(8 + length));
    check_refused("./chat generate " + model + " --prompt a",
                  "wpe.weight: " + std::string(type == "F4" ? "dtype: found F4" : "found "));
  }
}

// -------------------------------------------------------------------------------------------------
// Adapters of PEFT

namespace {

constexpr int kRank = 2;
constexpr float kAlpha = 3;

// The tensors of a safetensors file.
using Tensors = std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>>;

Tensors read_tensors(const std::filesystem::path& path) {
  Tensors all;
  const SafeTensors file(path);
  for (const auto& [name, t] : file.tensors()) {
    all[name] = {t.shape, std::vector<float>(size_t(t.count))};
    t.read(0, all[name].second);
  }
  return all;
}

void write_tensors(const std::filesystem::path& path, const Tensors& tensors) {
  std::vector<SafeTensorsWriter::Entry> entries;
  for (const auto& [name, t] : tensors) entries.push_back({name, t.first});
  SafeTensorsWriter writer(path, entries, FloatType::f32);
  for (const auto& item : tensors) writer.write(item.second.second);
  writer.commit();
}

// Adapters of a small model as a program other than this one may have written them.
struct PeftWorld {
  TempDir dir;
  Config c{.family = Family::qwen3, .V = 19, .T = 24, .L = 3, .C = 12, .NH = 3};
  OrderedJson config;
  Tensors tensors;

  explicit PeftWorld(Family family = Family::qwen3) {
    c.family = family;
    c.NKV = 3, c.HS = 4, c.F = 20, c.tied = family == Family::gpt2;
    FakeGpt base(c);
    base.randomize(1);
    save_checkpoint(dir / "base", base, {});
    FakeGpt gpt(c, false, {.rank = kRank, .alpha = kAlpha});
    load_weights(dir / "base", gpt);
    const auto& all = gpt.table().tensors;
    for (size_t i = 0; i < all.size(); i++) {
      if (all[i].kind != Kind::adapter) continue;
      Tensor t = all[i];
      t.init_std = .3;
      gpt.write(int(i), Slot::weight, initial_values(t, 7));
    }
    save_checkpoint(dir / "adapters", gpt, {.base = adapter_base(dir / "base")});
    config = OrderedJson::parse(read_file(dir / "adapters/adapter_config.json"));
    tensors = read_tensors(dir / "adapters/adapter_model.safetensors");
  }

  // The weights of the model with these adapters added, or the error.
  std::string load(const OrderedJson& changes, FakeGpt& into) {
    OrderedJson json = config;
    json.update(changes);
    write_file(dir / "adapters/adapter_config.json", json.dump());
    write_tensors(dir / "adapters/adapter_model.safetensors", tensors);
    return error_of([&] { load_weights(dir / "adapters", into); });
  }
  std::vector<float> base(const std::string& name) const {
    return read_tensors(dir / "base/model.safetensors").at(name).second;
  }
  // W + scale B A of a module by its name: (out, in) on disk.
  std::vector<float> with_adapter(const std::string& module, double scale) const {
    std::vector<float> w = base(module + ".weight");
    const auto& a = tensors.at("base_model.model." + module + ".lora_A.weight");
    const auto& b = tensors.at("base_model.model." + module + ".lora_B.weight");
    const size_t rank = size_t(a.first[0]), in = size_t(a.first[1]);
    for (size_t i = 0; i < w.size(); i++) {
      double sum = 0;
      for (size_t r = 0; r < rank; r++) {
        sum += double(b.second[i / in * rank + r]) * double(a.second[r * in + i % in]);
      }
      w[i] = float(w[i] + scale * sum);
    }
    return w;
  }
  void resize(const std::string& module, int rank) {  // its adapters, to another rank
    auto& a = tensors.at("base_model.model." + module + ".lora_A.weight");
    auto& b = tensors.at("base_model.model." + module + ".lora_B.weight");
    a.first[0] = b.first[1] = rank;
    a.second.resize(size_t(rank * a.first[1]), .25f),
        b.second.resize(size_t(b.first[0] * rank), .5f);
  }
  // Whether this layer's matrices, q_proj and down_proj for all, are W + scale B A; 0: just W.
  void check_layer(const FakeGpt& gpt, int layer, double q_scale, double down_scale) const {
    CAPTURE(layer);
    const std::string block = concat("blocks.", layer, "."), disk = concat("model.layers.", layer);
    CHECK(rel_error(gpt.values(block + "q.weight"),
                    with_adapter(disk + ".self_attn.q_proj", q_scale)) < 1e-6);
    CHECK(rel_error(gpt.values(block + "down.weight"),
                    with_adapter(disk + ".mlp.down_proj", down_scale)) < 1e-6);
  }
};

}  // namespace

TEST_CASE("adapters are added to the layers and modules that PEFT adds them to") {
  PeftWorld w;
  const double scale = kAlpha / kRank;
  FakeGpt gpt(w.c);
  struct Case {
    OrderedJson changes;
    std::vector<double> q, down;  // scales of layers 0, 1, 2
  };
  const double s = scale;
  const Case cases[] = {
      {OrderedJson::object(), {s, s, s}, {s, s, s}},
      {{{"layers_to_transform", {0}}}, {s, 0, 0}, {s, 0, 0}},
      {{{"layers_to_transform", 2}}, {0, 0, s}, {0, 0, s}},
      {{{"layers_to_transform", {0, 2}}, {"layers_pattern", "layers"}}, {s, 0, s}, {s, 0, s}},
      {{{"layers_to_transform", {1}}, {"layers_pattern", {"h", "layers"}}}, {0, s, 0}, {0, s, 0}},
      {{{"layers_to_transform", {0, 1}}, {"layers_pattern", "h"}}, {0, 0, 0}, {0, 0, 0}},
      {{{"layers_to_transform", OrderedJson::array()}}, {s, s, s}, {s, s, s}},
      {{{"target_modules", {"q_proj"}}}, {s, s, s}, {0, 0, 0}},
      {{{"target_modules", {"model.layers.1.mlp.down_proj"}}}, {0, 0, 0}, {0, s, 0}},
      {{{"target_modules", "all-linear"}}, {s, s, s}, {s, s, s}},
      {{{"target_modules", R"(.*\.[02]\.self_attn\.(q|k)_proj)"}}, {s, 0, s}, {0, 0, 0}},
      {{{"target_modules", R"(model\.layers\.\d+\.mlp\..*)"}}, {0, 0, 0}, {s, s, s}},
      {{{"exclude_modules", {"q_proj"}}}, {0, 0, 0}, {s, s, s}},
      {{{"exclude_modules", R"(.*layers\.1\..*)"}}, {s, 0, s}, {s, 0, s}},
      {{{"target_modules", nullptr}}, {s, s, s}, {s, s, s}},
  };
  for (const Case& test : cases) {
    CAPTURE(test.changes.dump());
    REQUIRE(w.load(test.changes, gpt) == "no error");
    for (int layer = 0; layer < 3; layer++) {
      w.check_layer(gpt, layer, test.q[size_t(layer)], test.down[size_t(layer)]);
    }
  }
  // Without the tensors of what is left out, as PEFT saves them.
  std::erase_if(w.tensors, [](const auto& t) { return !contains(t.first, ".layers.1."); });
  CHECK(contains(w.load(OrderedJson::object(), gpt), "lora_A.weight is missing"));
  CHECK(w.load({{"layers_to_transform", {1}}}, gpt) == "no error");
  CHECK(gpt.values("blocks.0.q.weight") == w.base("model.layers.0.self_attn.q_proj.weight"));
  w.check_layer(gpt, 1, scale, scale);
  w.tensors.erase("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight");
  CHECK(contains(w.load({{"target_modules", nullptr}}, gpt), "up_proj.lora_B.weight is missing"));
}

TEST_CASE("ranks, alphas and scales of adapters are those of PEFT's patterns and of rsLoRA") {
  PeftWorld w;
  FakeGpt gpt(w.c);
  const double s = kAlpha / kRank;
  REQUIRE(w.load({{"use_rslora", true}}, gpt) == "no error");
  const double stable = kAlpha / std::sqrt(double(kRank));
  for (int layer = 0; layer < 3; layer++) w.check_layer(gpt, layer, stable, stable);
  REQUIRE(w.load({{"alpha_pattern", {{"q_proj", 8}}}}, gpt) == "no error");
  for (int layer = 0; layer < 3; layer++) w.check_layer(gpt, layer, 8. / kRank, s);

  // The first pattern in the file's order counts, and a pattern fits the end of a name or all of
  // it.
  w.resize("model.layers.1.self_attn.q_proj", 4);
  const std::string ranks =
      R"({"rank_pattern": {"x_proj": 9, "layers\\.1\\.self_attn\\.q_proj": 4, "a": 5,
      "q_proj": 2, "model.layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"(layers.1|layers.2).mlp.down_proj": 5}})";
  REQUIRE(w.load(OrderedJson::parse(ranks), gpt) == "no error");
  w.check_layer(gpt, 0, s, s);
  w.check_layer(gpt, 1, kAlpha / 4., 5. / kRank);
  w.check_layer(gpt, 2, s, 5. / kRank);
  OrderedJson stabilized = OrderedJson::parse(ranks);
  stabilized["use_rslora"] = true;
  REQUIRE(w.load(stabilized, gpt) == "no error");
  w.check_layer(gpt, 1, kAlpha / 2., 5. / std::sqrt(double(kRank)));
  CHECK(contains(w.load(OrderedJson::object(), gpt),
                 "q_proj.lora_A.weight: found shape (4, 12), expected "
                 "(2, 12)"));

  const OrderedJson other_order = {
      {"rank_pattern", {{"q_proj", 2}, {"layers.1.self_attn.q_proj", 4}}}};
  CHECK(contains(w.load(other_order, gpt), "lora_A.weight: found shape (4, 12), expected (2, 12)"));

  // To be trained on, all must have one rank and alpha, which the engine's rows have too.
  FakeGpt rows(w.c, false, {.rank = kRank, .alpha = kAlpha});
  CHECK(contains(w.load(OrderedJson::parse(ranks), rows),
                 "found adapters of several ranks or alphas"));
  w.resize("model.layers.1.self_attn.q_proj", 2);
  CHECK(w.load(OrderedJson::object(), rows) == "no error");
  FakeGpt stable_rows(w.c, false, {.rank = kRank, .alpha = kAlpha * std::sqrt(float(kRank))});
  CHECK(w.load({{"use_rslora", true}}, stable_rows) == "no error");
}

TEST_CASE("weights that PEFT saved beside adapters take the place of the model's") {
  for (const Family family : {Family::qwen3, Family::gpt2}) {
    PeftWorld w(family);
    FakeGpt gpt(w.c);
    const bool is_gpt2 = family == Family::gpt2;
    const std::string norm = is_gpt2 ? "transformer.ln_f" : "model.norm";
    w.tensors["base_model.model." + norm + ".weight"] = {{12}, std::vector<float>(12, 2.5f)};
    CHECK(
        contains(w.load(OrderedJson::object(), gpt), "weight: found a tensor that adapters of a "));
    if (is_gpt2) {
      w.tensors["base_model.model." + norm + ".bias"] = {{12}, std::vector<float>(12, .75f)};
      w.tensors["base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"] = {
          {36}, std::vector<float>(36, -1.5f)};
      w.tensors["base_model.model.transformer.h.0.attn.bias"] = {{1, 1, 1}, {1}};  // a mask
    }
    const std::string last = norm.substr(norm.rfind('.') + 1);
    REQUIRE(w.load({{"modules_to_save", {last}}, {"bias", is_gpt2 ? "all" : "none"}}, gpt) ==
            "no error");
    CHECK(gpt.values("final_norm.weight") == std::vector<float>(12, 2.5f));
    if (is_gpt2) {
      CHECK(gpt.values("final_norm.bias") == std::vector<float>(12, .75f));
      for (const char* part : {"q", "k", "v"}) {
        CHECK(gpt.values(concat("blocks.0.", part, ".bias")) == std::vector<float>(12, -1.5f));
      }
      CHECK(gpt.values("blocks.1.q.bias") != std::vector<float>(12, -1.5f));
    }
    FakeGpt rows(w.c, false, {.rank = kRank, .alpha = kAlpha});
    CHECK(contains(w.load({{"modules_to_save", {last}}, {"bias", "all"}}, rows),
                   "other weights beside them"));
  }
  PeftWorld w;  // the embedding and the head, as people save them who added tokens
  FakeGpt gpt(w.c);
  w.tensors["base_model.model.lm_head.weight"] = {{19, 12}, std::vector<float>(228, .5f)};
  w.tensors["base_model.model.model.embed_tokens.weight"] = {{19, 12},
                                                             std::vector<float>(228, .25f)};
  REQUIRE(w.load({{"modules_to_save", {"lm_head", "embed_tokens"}}}, gpt) == "no error");
  CHECK(gpt.values("head") == std::vector<float>(228, .5f));
  CHECK(gpt.values("wte") == std::vector<float>(228, .25f));
  w.tensors["base_model.model.lm_head.weight"].second[3] = NAN;
  CHECK(contains(w.load({{"modules_to_save", {"lm_head", "embed_tokens"}}}, gpt),
                 "lm_head.weight: found 1 values that are not finite"));
}

TEST_CASE("adapters that compute something else are refused by the key that says so") {
  PeftWorld w;
  FakeGpt gpt(w.c);
  const std::pair<const char*, OrderedJson> refused[] = {
      {"use_dora", true},
      {"use_qalora", true},
      {"lora_bias", true},
      {"alora_invocation_tokens", {1, 2}},
      {"layer_replication", {{0, 2}, {1, 3}}},
      {"trainable_token_indices", {5}},
      {"target_parameters", {"experts.gate_up_proj"}},
      {"init_lora_weights", "pissa_niter_16"},
      {"init_lora_weights", "olora"},
      {"target_modules", "(["},
      {"target_modules", "(?<=q)_proj"},
      {"target_modules", 5},
      {"layers_to_transform", {"0"}},
      {"layers_to_transform", -1},
      {"rank_pattern", {{"q_proj", 0}}},
      {"rank_pattern", {{"q_proj", "4"}}},
      {"alpha_pattern", {{"q_proj", -1}}},
      {"alpha_pattern", 5},
      {"bias", "some"},
      {"bias", 1},
  };
  for (const auto& change : refused) {
    const std::string key = change.first, value = change.second.dump();
    CAPTURE(key);
    CAPTURE(value);
    const std::string error = w.load({{key, change.second}}, gpt);
    CHECK_MESSAGE(contains(error, "adapter_config.json: " + key), error);
  }
  CHECK(contains(w.load({{"target_modules", "all-linear"}, {"layers_to_transform", {0}}}, gpt),
                 "layers_to_transform: found [0], expected no such key beside a target_modules"));
  const std::pair<const char*, OrderedJson> read[] = {{"init_lora_weights", "eva"},
                                                      {"init_lora_weights", false},
                                                      {"use_dora", nullptr},
                                                      {"bias", nullptr},
                                                      {"bias", "all"},
                                                      {"rank_pattern", OrderedJson::object()},
                                                      {"alpha_pattern", nullptr},
                                                      {"modules_to_save", nullptr},
                                                      {"exclude_modules", nullptr}};
  for (const auto& change : read) {
    const std::string key = change.first;
    CAPTURE(key);
    CHECK(w.load({{key, change.second}}, gpt) == "no error");
  }
}

// -------------------------------------------------------------------------------------------------
// Training

TEST_CASE("a run of one step moves the weights") {
  ScriptedModel m;
  const std::string model = m.save(), d = m.dir().path().string() + "/";
  write_file(d + "data.jsonl", R"({"prompt": "a", "completion": "b"})"
                               "\n");
  for (const std::string schedule : {"linear", "cosine"}) {
    const std::string run = d + schedule;
    output_of("./sft --model " + model + " --data " + d + "data.jsonl --val-fraction 0 --steps 1 " +
              "--warmup 0 --optimizer adamw --schedule " + schedule + " -o " + run);
    CHECK(read_file(run + "/model/model.safetensors") != read_file(model + "/model.safetensors"));
    const std::string metrics = read_file(run + "/metrics.jsonl");
    const size_t begin = metrics.find("{\"step\":1,");
    REQUIRE(begin != metrics.npos);
    const Json step = Json::parse(metrics.substr(begin, metrics.find('\n', begin) - begin));
    CHECK(step["lr"].get<double>() > 0);
  }
}

TEST_CASE("a step over a short and a long answer is the same in one batch and in small ones") {
  ScriptedModel m;
  const std::string model = m.save(), d = m.dir().path().string() + "/";
  // Each takes more than half of the context, so that each is a bin of its own.
  std::string many;
  for (int i = 0; i < 100; i++) many += concat(" ", i % 7, "x");
  const std::string lines = Json{{"prompt", many}, {"completion", "b"}}.dump() + "\n" +
                            Json{{"prompt", "a"}, {"completion", many}}.dump() + "\n";
  write_file(d + "data.jsonl", lines);
  std::vector<Tensors> weights;
  std::vector<double> loss;
  for (const std::string size : {"32", "100000"}) {
    const std::string run = d + size;
    output_of("./sft --model " + model + " --data " + d + "data.jsonl --val-fraction 0 --steps 1 " +
              "--warmup 0 --optimizer adamw --device cpu --micro-batch-tokens " + size + " -o " +
              run);
    CHECK(read_json(run + "/summary.json")["trained_tokens"].get<int>() > 250);
    weights.push_back(read_tensors(run + "/model/model.safetensors"));
    loss.push_back(read_json(run + "/summary.json")["train_loss"].get<double>());
  }
  CHECK(std::fabs(loss[0] - loss[1]) < 1e-4 * loss[1]);
  for (const auto& tensor : weights[0]) {
    const std::string name = tensor.first;
    CAPTURE(name);
    CHECK(rel_error(tensor.second.second, weights[1].at(name).second) < 1e-4);
  }
}
