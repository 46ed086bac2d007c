// Models leave: GGUF files with exactly the keys and tensors that llama.cpp reads, Hugging Face
// directories in other types and in shards, Modelfiles, and what `./chat info` says of all of them.
#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cake/bpe.h"
#include "cake/chat_template.h"
#include "cake/export.h"
#include "cake/tokenizer.h"
#include "test/support.h"

using namespace cake;
namespace fs = std::filesystem;

namespace {

// A vocabulary of 256 bytes, some merges and the special tokens.
Tokenizer small_tokenizer(const std::string& pattern) {
  const TempDir dir;
  write_file(dir / "text.txt", "the cat sat on the mat, and the dog sat on the log in 1984; 12 34");
  return train_tokenizer({.inputs = {(dir / "text.txt").string()}}, 290, pattern);
}
const Tokenizer& tokenizer() {
  static const Tokenizer t = small_tokenizer("qwen2");
  return t;
}

Config tiny(Family family, bool tied) {
  const bool g = family == Family::gpt2;
  Config c{.family = family, .V = 300, .T = 48, .L = 2, .C = 64, .NH = 4};
  c.NKV = g ? 4 : 2;
  c.HS = g || family == Family::qwen2 ? 16 : 24;  // NH HS differs from C where llama.cpp allows it
  c.F = 160;
  c.tied = tied;
  c.norm_eps = g ? 1e-5 : 1e-6;
  c.rope.theta = g ? 10000 : 50000;
  c.bos = c.eos = c.pad = tokenizer().end_of_text();
  // llama.cpp ends a text at both by their names, and so does a model that comes from a GGUF file.
  c.end_tokens = {c.eos, tokenizer().special("<|im_end|>")};
  return c;
}
constexpr Family kFamilies[] = {Family::gpt2, Family::llama, Family::qwen3, Family::qwen2};
const Rope kLlama3{
    .theta = 1e6, .factor = 8, .low_freq_factor = 1, .high_freq_factor = 4, .original_T = 16};

// A model directory with random weights.
void write_model(const fs::path& dir, const Config& c, const Tokenizer& t = tokenizer()) {
  FakeGpt gpt(c);
  gpt.randomize(7);
  save_checkpoint(dir, gpt, {.also = [&](const fs::path& fresh) { t.save(fresh); }});
}

// Exports with random weights; returns the file.
GgufFile exported(const fs::path& path, const Config& c, const GgufExport& options = {},
                  const Tokenizer& t = tokenizer(), std::vector<std::string>* notes = nullptr) {
  FakeGpt gpt(c);
  gpt.randomize(7);
  const auto found = write_gguf(path, gpt, t, options);
  if (notes) *notes = found;
  return GgufFile(path);
}

std::string export_error(const Config& c, const GgufExport& options = {},
                         const Tokenizer& t = tokenizer()) {
  const TempDir dir;
  const std::string error = error_of([&] { exported(dir / "x.gguf", c, options, t); });
  CHECK(fs::is_empty(dir.path()));
  if (error == "no error") return error;
  CHECK(error.starts_with((dir / "x.gguf").string()));
  CHECK(!contains(error, "\n"));
  return error;
}

std::set<std::string> key_names(const GgufFile& file) {
  std::set<std::string> names;
  for (const auto& [name, value] : file.keys()) names.insert(name);
  return names;
}

// What `run` prints to the standard output of ./chat; it must succeed.
std::string chat(const std::string& arguments) {
  const Output o = shell("./chat " + arguments);
  REQUIRE_MESSAGE(o.status == 0, o.text);
  return o.text;
}
std::string chat_error(const std::string& arguments) {
  const Output o = shell("./chat " + arguments);
  CHECK_MESSAGE(o.status == 1, o.text);
  return o.text;
}

std::vector<float> values_of(const GgufTensor& t) {
  std::vector<float> out(size_t(t.count));
  t.read(0, out);
  return out;
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// GGUF: what is in the file

TEST_CASE("a GGUF file has exactly the keys that llama.cpp reads, with their values") {
  const TempDir dir;
  const std::set<std::string> general = {"general.architecture",
                                         "general.type",
                                         "general.name",
                                         "general.size_label",
                                         "general.file_type",
                                         "tokenizer.ggml.model",
                                         "tokenizer.ggml.pre",
                                         "tokenizer.ggml.tokens",
                                         "tokenizer.ggml.token_type",
                                         "tokenizer.ggml.merges",
                                         "tokenizer.ggml.bos_token_id",
                                         "tokenizer.ggml.eos_token_id",
                                         "tokenizer.ggml.eot_token_id",
                                         "tokenizer.ggml.padding_token_id",
                                         "tokenizer.ggml.add_bos_token",
                                         "tokenizer.ggml.add_eos_token",
                                         "tokenizer.ggml.add_space_prefix"};
  for (const Family family : kFamilies) {
    const Config c = tiny(family, true);
    const bool g = family == Family::gpt2;
    const std::string a = std::string(kModelTypes[int(family)]) + ".";
    CAPTURE(a);
    const GgufFile file = exported(dir / "x.gguf", c, {.name = "a name"});
    std::set<std::string> expected = general;
    for (const char* key :
         {"vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
          "attention.head_count", "attention.head_count_kv", "attention.key_length",
          "attention.value_length"}) {
      expected.insert(a + key);
    }
    if (g) {
      expected.insert(a + "attention.layer_norm_epsilon");
    } else {
      expected.insert({a + "attention.layer_norm_rms_epsilon", a + "rope.dimension_count",
                       a + "rope.freq_base"});
    }
    CHECK(key_names(file) == expected);
    CHECK(file.text("general.architecture") + "." == a);
    CHECK(file.text("general.name") == "a name");
    CHECK(file.integer("general.file_type") == 0);
    CHECK(file.integer(a + "vocab_size") == 300);
    CHECK(file.integer(a + "context_length") == 48);
    CHECK(file.integer(a + "embedding_length") == 64);
    CHECK(file.integer(a + "block_count") == 2);
    CHECK(file.integer(a + "feed_forward_length") == 160);
    CHECK(file.integer(a + "attention.head_count") == 4);
    CHECK(file.integer(a + "attention.head_count_kv") == c.NKV);
    CHECK(file.integer(a + "attention.key_length") == c.HS);
    CHECK(file.integer(a + "attention.value_length") == c.HS);
    if (!g) {
      CHECK(file.integer(a + "rope.dimension_count") == c.HS);
      CHECK(file.number(a + "rope.freq_base") == 50000);
    }
    CHECK(float(file.number(a + (g ? "attention.layer_norm_epsilon"
                                   : "attention.layer_norm_rms_epsilon"))) == float(c.norm_eps));
  }
}

TEST_CASE("a GGUF file has exactly the tensors of its architecture") {
  const TempDir dir;
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      const Config c = tiny(family, tied);
      const bool g = family == Family::gpt2;
      CAPTURE(kModelTypes[int(family)]);
      std::map<std::string, std::vector<int64_t>> expected = {{"token_embd.weight", {300, 64}},
                                                              {"output_norm.weight", {64}}};
      const auto add = [&](const std::string& name, std::vector<int64_t> shape, bool bias) {
        if (bias) expected[name + ".bias"] = {shape[0]};
        expected[name + ".weight"] = std::move(shape);
      };
      if (g) expected["position_embd.weight"] = {48, 64}, expected["output_norm.bias"] = {64};
      if (!tied) expected["output.weight"] = {300, 64};
      const int q = 4 * c.HS, kv = c.NKV * c.HS;
      for (int i = 0; i < 2; i++) {
        const std::string b = concat("blk.", i, ".");
        add(b + "attn_norm", {64}, g), add(b + "ffn_norm", {64}, g);
        if (g) {
          add(b + "attn_qkv", {192, 64}, true);
        } else {
          const bool bias = family == Family::qwen2;
          add(b + "attn_q", {q, 64}, bias), add(b + "attn_k", {kv, 64}, bias);
          add(b + "attn_v", {kv, 64}, bias), add(b + "ffn_gate", {160, 64}, false);
        }
        if (family == Family::qwen3) {
          add(b + "attn_q_norm", {c.HS}, false), add(b + "attn_k_norm", {c.HS}, false);
        }
        add(b + "attn_output", {64, q}, g);
        add(b + "ffn_up", {160, 64}, g), add(b + "ffn_down", {64, 160}, g);
      }
      std::map<std::string, std::vector<int64_t>> found;
      const GgufFile file = exported(dir / "x.gguf", c);
      for (const GgufTensor& t : file.tensors()) {
        found[t.name] = t.shape;
        CHECK(t.type == GgufType::f32);
      }
      CHECK(found == expected);
    }
  }
}

TEST_CASE("the rows of q and k are interleaved for llama, and for no other family") {
  const TempDir dir;
  for (const Family family : {Family::llama, Family::qwen3, Family::qwen2}) {
    const Config c = tiny(family, true);
    CAPTURE(kModelTypes[int(family)]);
    FakeGpt gpt(c);
    gpt.randomize(3);
    write_gguf(dir / "x.gguf", gpt, tokenizer(), {});
    const GgufFile file(dir / "x.gguf");
    const std::vector<float> q = values_of(*file.find("blk.1.attn_q.weight")),
                             hf = gpt.values("blocks.1.q.weight");
    const bool llama = family == Family::llama;
    int wrong = 0;
    for (int head = 0; head < c.NH; head++)
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < c.HS / 2; i++)
          for (int x = 0; x < c.C; x++) {
            const int row = head * c.HS + half * c.HS / 2 + i;
            const int there = llama ? head * c.HS + 2 * i + half : row;
            wrong += q[size_t(there * c.C + x)] != hf[size_t(row * c.C + x)];
          }
    CHECK(wrong == 0);
    CHECK(values_of(*file.find("blk.1.attn_v.weight")) == gpt.values("blocks.1.v.weight"));
  }
}

TEST_CASE("gpt2's matrices are stored by outputs, with q, k and v as one") {
  const TempDir dir;
  const Config c = tiny(Family::gpt2, true);
  FakeGpt gpt(c);
  gpt.randomize(3);
  write_gguf(dir / "x.gguf", gpt, tokenizer(), {});
  const GgufFile file(dir / "x.gguf");
  std::vector<float> qkv, bias;
  for (const char* name : {"q", "k", "v"}) {
    const auto weight = gpt.values(concat("blocks.0.", name, ".weight"));
    const auto b = gpt.values(concat("blocks.0.", name, ".bias"));
    qkv.insert(qkv.end(), weight.begin(), weight.end());
    bias.insert(bias.end(), b.begin(), b.end());
  }
  CHECK(values_of(*file.find("blk.0.attn_qkv.weight")) == qkv);
  CHECK(values_of(*file.find("blk.0.attn_qkv.bias")) == bias);
  CHECK(values_of(*file.find("blk.0.ffn_down.weight")) == gpt.values("blocks.0.down.weight"));
}

TEST_CASE("llama3 rope is a tensor of divisors, linear rope is two keys") {
  const TempDir dir;
  Config c = tiny(Family::llama, true);
  c.rope = kLlama3;
  const GgufFile file = exported(dir / "x.gguf", c);
  const GgufTensor* t = file.find("rope_freqs.weight");
  REQUIRE(t);
  CHECK(t->shape == std::vector<int64_t>{12});
  const std::vector<float> divisors = values_of(*t);
  for (size_t i = 0; i < divisors.size(); i++) {
    // The rule of llama.cpp's converter, from the wavelength.
    const double wavelength = 6.283185307179586 * std::pow(1e6, 2. * double(i) / 24);
    double expected = 1;
    if (wavelength > 16) {
      expected = 8;
    } else if (wavelength >= 4) {
      const double smooth = (16 / wavelength - 1) / (4 - 1);
      expected = 1 / ((1 - smooth) / 8 + smooth);
    }
    CHECK(divisors[i] == doctest::Approx(expected).epsilon(1e-6));  // f32
  }
  CHECK(!file.has("llama.rope.scaling.type"));

  c.rope = {.theta = 1e4, .factor = 4, .linear = true};
  const GgufFile linear = exported(dir / "y.gguf", c);
  CHECK(!linear.find("rope_freqs.weight"));
  CHECK(linear.text("llama.rope.scaling.type") == "linear");
  CHECK(linear.number("llama.rope.scaling.factor") == 4);
}

TEST_CASE("types of tensors follow what llama-quantize does") {
  const TempDir dir;
  const auto type_of = [](const GgufFile& file, const std::string& name) {
    std::string type = gguf_blocks(file.find(name)->type).name;
    for (char& c : type) c = char(std::tolower(c));
    return type;
  };
  Config c = tiny(Family::llama, true);
  c.F = 168;  // no multiple of 32: rows of ffn_down are f16
  for (const auto& [type, name] :
       {std::pair{GgufType::f16, "f16"}, std::pair{GgufType::bf16, "bf16"},
        std::pair{GgufType::q8_0, "q8_0"}, std::pair{GgufType::q4_0, "q4_0"}}) {
    const std::string expected = name;
    CAPTURE(expected);
    const bool blocks = expected[0] == 'q';
    const GgufFile file = exported(dir / "x.gguf", c, {.type = type});
    CHECK(type_of(file, "blk.0.attn_q.weight") == expected);
    CHECK(type_of(file, "blk.0.ffn_up.weight") == expected);
    CHECK(type_of(file, "blk.0.ffn_down.weight") == (blocks ? "f16" : expected));
    CHECK(type_of(file, "token_embd.weight") == (expected == "q4_0" ? "q8_0" : expected));
    CHECK(type_of(file, "blk.0.attn_norm.weight") == "f32");
    CHECK(type_of(file, "output_norm.weight") == "f32");
    CHECK(file.has("general.quantization_version") == blocks);
  }
  Config untied = tiny(Family::gpt2, false);
  const GgufFile file = exported(dir / "x.gguf", untied, {.type = GgufType::q4_0});
  CHECK(type_of(file, "token_embd.weight") == "q4_0");
  CHECK(type_of(file, "output.weight") == "q8_0");
  CHECK(type_of(file, "position_embd.weight") == "f32");
  CHECK(type_of(file, "blk.0.attn_qkv.bias") == "f32");
  CHECK(file.integer("general.file_type") == 2);
  CHECK(file.integer("general.quantization_version") == 2);
}

TEST_CASE("blocks in the file are those of the rows' values") {
  const TempDir dir;
  Config c = tiny(Family::llama, false);
  FakeGpt gpt(c);
  gpt.randomize(11, 2);
  const std::vector<float> v = gpt.values("blocks.1.v.weight");
  for (const GgufType type : {GgufType::f16, GgufType::bf16, GgufType::q8_0, GgufType::q4_0}) {
    write_gguf(dir / "x.gguf", gpt, tokenizer(), {.type = type});
    const GgufFile file(dir / "x.gguf");
    const GgufTensor& t = *file.find("blk.1.attn_v.weight");
    REQUIRE(t.type == type);
    std::string expected;
    const auto append = [&](const auto& x) {
      expected.append(reinterpret_cast<const char*>(&x), sizeof x);
    };
    if (type == GgufType::q8_0) {
      for (size_t i = 0; i < v.size(); i += 32) append(quantize_q8_0(v.data() + i));
    } else if (type ==
               GgufType::q4_0) {  // reference/ggml-quants: the value of largest magnitude / -8
      for (size_t i = 0; i < v.size(); i += 32) {
        float most = 0;
        for (size_t k = i; k < i + 32; k++) {
          if (std::fabs(v[k]) > std::fabs(most)) most = v[k];
        }
        const float d = most / -8;
        append(float_to_f16(d));
        const auto q = [&](size_t k) { return std::min(15, int(v[i + k] * (1 / d) + 8.5f)); };
        for (size_t k = 0; k < 16; k++) append(uint8_t(q(k) + 16 * q(k + 16)));
      }
    } else {
      for (const float x : v) append(type == GgufType::f16 ? float_to_f16(x) : float_to_bf16(x));
    }
    CHECK(std::string(reinterpret_cast<const char*>(t.data), size_t(t.bytes())) == expected);
  }
}

TEST_CASE("the same model gives the same bytes, wherever they are written") {
  const TempDir dir;
  fs::create_directory(dir / "other");
  for (const Family family : kFamilies) {
    const Config c = tiny(family, true);
    exported(dir / "a.gguf", c, {.type = GgufType::q8_0, .chat_template = kChatTemplate});
    exported(dir / "other/b.gguf", c, {.type = GgufType::q8_0, .chat_template = kChatTemplate});
    CHECK(read_file(dir / "a.gguf") == read_file(dir / "other/b.gguf"));
  }
}

// -------------------------------------------------------------------------------------------------
// GGUF: the tokenizer

TEST_CASE("tokens have their types, each text occurs once, and rows without a token are padding") {
  const TempDir dir;
  const GgufFile file = exported(dir / "x.gguf", tiny(Family::qwen3, true));
  const auto& tokens = file.texts("tokenizer.ggml.tokens");
  const auto& types = file.integers("tokenizer.ggml.token_type");
  const int V = 300, known = tokenizer().vocab_size();
  REQUIRE(int(tokens.size()) == V);
  REQUIRE(int(types.size()) == V);
  CHECK(known == 290);
  CHECK(std::set<std::string>(tokens.begin(), tokens.end()).size() == size_t(V));
  CHECK(tokens[' '] == "\u0120");  // byte-level: a space is spelled so
  const auto type = [&](const char* name) { return types[size_t(tokenizer().special(name))]; };
  CHECK(types['a'] == 1);
  CHECK(type("<|endoftext|>") == 3);
  CHECK(type("<|im_end|>") == 3);
  CHECK(type("<|spare_0|>") == 3);
  for (const char* shown : {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
                            "<think>", "</think>"}) {
    CHECK(type(shown) == 4);
  }
  for (int id = known; id < V; id++) {
    CHECK(tokens[size_t(id)] == concat("[PAD", id, "]"));
    CHECK(types[size_t(id)] == 5);
  }
  CHECK(int(file.texts("tokenizer.ggml.merges").size()) == known - 256 - kSpecials);
  CHECK(file.text("tokenizer.ggml.model") == "gpt2");
  CHECK(file.text("tokenizer.ggml.pre") == "qwen2");
}

TEST_CASE("merges are a key even when there are none") {
  const TempDir dir;
  write_file(dir / "empty.txt", "a");
  const Tokenizer bytes =
      train_tokenizer({.inputs = {(dir / "empty.txt").string()}}, 256 + kSpecials, "gpt2");
  const GgufFile file = exported(dir / "x.gguf", tiny(Family::gpt2, true), {}, bytes);
  REQUIRE(file.has("tokenizer.ggml.merges"));
  CHECK(file.texts("tokenizer.ggml.merges").empty());
}

TEST_CASE("the split pattern has llama.cpp's name, or the model is refused") {
  const TempDir dir;
  const Config c = tiny(Family::llama, true);
  const auto pre = [&](const Tokenizer& t, std::vector<std::string>* notes = nullptr) {
    return exported(dir / "x.gguf", c, {}, t, notes).text("tokenizer.ggml.pre");
  };
  std::vector<std::string> notes;
  CHECK(pre(small_tokenizer("gpt2"), &notes) == "gpt-2");
  CHECK(pre(small_tokenizer("qwen2"), &notes) == "qwen2");
  CHECK(pre(small_tokenizer("cl100k"), &notes) == "dbrx");
  CHECK(notes.empty());
  CHECK(pre(small_tokenizer("o200k"), &notes) == "gpt-4o");
  REQUIRE(notes.size() == 1);
  CHECK(contains(notes[0], "splits o200k in another way"));

  const auto changed = [&](const std::string& pattern, const auto& change) {
    auto data = std::make_shared<TokenizerData>(small_tokenizer(pattern).data());
    data->json.clear();
    change(*data);
    data->complete("test");
    return Tokenizer(data);
  };
  CHECK(pre(changed("gpt2", [](TokenizerData& d) {
          d.pre_tokenizer = PreTokenizer({{.kind = SplitStep::Kind::digits}, {}});
        })) == "smollm");
  CHECK(pre(changed("cl100k", [](TokenizerData& d) { d.ignore_merges = true; })) == "llama-bpe");
  // Every token of these merges is made by them, so that ignore_merges changes nothing.
  CHECK(pre(changed("qwen2", [](TokenizerData& d) { d.ignore_merges = true; })) == "qwen2");

  const auto error = [&](const auto& change) {
    return export_error(c, {}, changed("qwen2", change));
  };
  CHECK(contains(error([](TokenizerData& d) {
                   d.pre_tokenizer = PreTokenizer({split_step("[a-z]+|[^a-z]+")});
                 }),
                 "llama.cpp knows patterns by name, and not this one"));
  CHECK(contains(error([](TokenizerData& d) {
                   d.normalizer.steps.push_back({.kind = NormalizerStep::Kind::lowercase});
                 }),
                 "found a normalizer other than NFC"));
  CHECK(contains(error([](TokenizerData& d) { d.add_prefix_space = true; }), "add_prefix_space"));
  CHECK(contains(error([](TokenizerData& d) { d.text_end = {5}; }), "behind every text"));
  CHECK(contains(error([](TokenizerData& d) { d.added[0].lstrip = true; }), "lstrip"));
  CHECK(contains(error([](TokenizerData& d) {
                   d.added.push_back({"[PAD299]", 290});
                   d.add_token(290, "[PAD299]");
                 }),
                 "found the token \"[PAD299]\" twice"));

  exported(dir / "x.gguf", c, {},
           changed("qwen2",
                   [](TokenizerData& d) {
                     d.normalizer.steps.push_back({.kind = NormalizerStep::Kind::nfc});
                   }),
           &notes);
  REQUIRE(notes.size() == 1);
  CHECK(contains(notes[0], "NFC"));
}

TEST_CASE("a base model begins with the document separator, a chat model does not") {
  const TempDir dir;
  Config c = tiny(Family::qwen3, true);
  const int end_of_text = tokenizer().end_of_text(), im_end = tokenizer().special("<|im_end|>");
  const auto ids = [&](const Config& config, const std::string& chat_template) {
    return gguf_special_tokens(config, tokenizer(), chat_template);
  };
  const auto base = ids(c, "");
  CHECK(base.add_bos);
  CHECK(base.bos == end_of_text);
  CHECK(base.eos == end_of_text);
  CHECK(base.eot == end_of_text);
  CHECK(ids(c, kChatTemplate).add_bos);  // the tokenizer's template, before any fine-tuning

  c.set_first_end_token(im_end);
  const auto assistant = ids(c, kChatTemplate);
  CHECK(!assistant.add_bos);
  CHECK(assistant.bos == end_of_text);
  CHECK(assistant.eos == im_end);
  CHECK(assistant.eot == im_end);
  CHECK(ids(c, "").add_bos);

  c.eos = c.bos = -1, c.end_tokens.clear();
  CHECK(ids(c, "").eos == end_of_text);
  const GgufFile file = exported(dir / "x.gguf", c);
  CHECK(file.integer("tokenizer.ggml.eos_token_id") == end_of_text);
  CHECK(file.boolean("tokenizer.ggml.add_bos_token"));
  CHECK(!file.boolean("tokenizer.ggml.add_eos_token"));

  auto data = std::make_shared<TokenizerData>(tokenizer().data());
  data->json.clear();
  data->config.clear();
  data->added.clear();
  data->complete("test");
  CHECK(contains(export_error(c, {}, Tokenizer(data)), "eos_token_id is missing"));
}

TEST_CASE("generation tags leave the chat template with the white space that they take along") {
  CHECK(without_generation_tags("no tags {{ x }} {% if y %}a{% endif %}") ==
        "no tags {{ x }} {% if y %}a{% endif %}");
  CHECK(without_generation_tags("a {%- generation %}b{%- endgeneration -%}\n c") == "abc");
  CHECK(without_generation_tags("a\n  {% generation %}\n  b {% endgeneration %} c") == "a\n  b  c");
  CHECK(without_generation_tags("a {%generation-%} b") == "a b");
  CHECK(without_generation_tags("{% generation") == "{% generation");
  const std::string ours = without_generation_tags(kChatTemplate);
  CHECK(!contains(ours, "generation %}"));
  CHECK(contains(ours, "add_generation_prompt"));
  CHECK(contains(ours, "assistant\\n' }}            {%- if reasoning"));
  const TempDir dir;
  const GgufFile file =
      exported(dir / "x.gguf", tiny(Family::llama, true), {.chat_template = kChatTemplate});
  CHECK(file.text("tokenizer.chat_template") == ours);
}

TEST_CASE("size labels have two digits or more") {
  CHECK(gguf_size_label(134'515'008) == "135M");
  CHECK(gguf_size_label(1'235'814'400) == "1.2B");
  CHECK(gguf_size_label(264'128) == "264K");
  CHECK(gguf_size_label(4'200) == "4.2K");
}

// -------------------------------------------------------------------------------------------------
// GGUF: refused

TEST_CASE("what llama.cpp cannot compute is refused by name, and no file is left") {
  Config c = tiny(Family::llama, true);
  c.head = Head::scalar;
  CHECK(contains(export_error(c), "found LlamaForSequenceClassification"));
  for (const Family family : {Family::qwen3, Family::qwen2}) {
    c = tiny(family, true);
    c.rope = kLlama3;
    CHECK(contains(export_error(c), "rope_type: found llama3 in a "));
  }
  c = tiny(Family::qwen2, true);
  c.HS = 24;
  CHECK(contains(export_error(c), "head_dim: found 24 and 4 heads, expected hidden_size 64"));
  c = tiny(Family::llama, true);
  c.V = 280;
  c.eos = c.bos = c.pad = 0;
  CHECK(contains(export_error(c), "found 290 tokens, expected at most vocab_size 280"));
  c.V = 300, c.L = 513, c.C = c.F = 2, c.NH = c.NKV = 1, c.HS = 2;
  CHECK(contains(export_error(c), "found 513 layers, expected at most 512"));
}

TEST_CASE("values that a type cannot hold are refused by their tensor") {
  const TempDir dir;
  const Config c = tiny(Family::llama, true);
  FakeGpt gpt(c);
  gpt.randomize(5);
  const int up = gpt.table().find("blocks.1.up.weight");
  const auto error = [&](float x, GgufType type) {
    std::vector<float> values = gpt.values(up);
    values[77] = x;
    gpt.write(up, Slot::weight, values);
    return error_of([&] { write_gguf(dir / "x.gguf", gpt, tokenizer(), {.type = type}); });
  };
  CHECK(contains(error(65536, GgufType::f16), "blk.1.ffn_up.weight"));
  CHECK(error(65536, GgufType::bf16) == "no error");
  CHECK(contains(error(65536 * 128.f, GgufType::q8_0), "blk.1.ffn_up.weight"));
  CHECK(contains(error(65536 * 9.f, GgufType::q4_0), "blk.1.ffn_up.weight"));
  CHECK(error(65536, GgufType::q8_0) == "no error");
  CHECK(contains(error(NAN, GgufType::f32), "blocks.1.up.weight: found 1 values"));
}

// -------------------------------------------------------------------------------------------------
// ./chat export

TEST_CASE("a model that leaves as GGUF in f32 and comes back has the same bytes") {
  struct Case {
    Family family;
    bool tied, llama3;
  };
  const Case cases[] = {{Family::gpt2, true, false},  {Family::gpt2, false, false},
                        {Family::llama, true, false}, {Family::llama, false, true},
                        {Family::qwen3, true, false}, {Family::qwen3, false, false},
                        {Family::qwen2, true, false}, {Family::qwen2, false, false}};
  for (const Case& x : cases) {
    Config c = tiny(x.family, x.tied);
    if (x.llama3) c.rope = kLlama3;
    const std::string family = kModelTypes[int(x.family)];
    CAPTURE(family);
    CAPTURE(x.tied);
    const TempDir dir;
    write_model(dir / "m", c);
    const std::string m = (dir / "m").string(), gguf = (dir / "m.gguf").string(),
                      back = (dir / "back").string();
    chat("export " + m + " -o " + gguf);
    chat("export " + gguf + " -o " + back);
    CHECK(read_file(dir / "m/model.safetensors") == read_file(dir / "back/model.safetensors"));
    const Config found = load_config(dir / "back");
    CHECK(config_json(found) == config_json(load_config(dir / "m")));
    const Tokenizer t = Tokenizer::load(dir / "back");
    for (const char* text : {"the cat sat", " 1984", "<|im_end|>", "<tool_call>"}) {
      CHECK(t.encode(text) == tokenizer().encode(text));
      CHECK(t.encode(text, true) == tokenizer().encode(text, true));
    }
    chat("export " + gguf + " -o " + (dir / "again.gguf").string());
    CHECK(read_file(dir / "again.gguf") == read_file(gguf));
  }
}

TEST_CASE("a directory leaves in another type and in shards that load again") {
  const TempDir dir;
  Config c = tiny(Family::qwen3, false);
  c.L = 24;  // 4.3 MB
  write_model(dir / "m", c);
  const std::string m = (dir / "m").string();
  chat("export " + m + " -o " + (dir / "whole").string());
  CHECK(read_file(dir / "whole/model.safetensors") == read_file(dir / "m/model.safetensors"));
  CHECK(read_file(dir / "whole/tokenizer.json") == read_file(dir / "m/tokenizer.json"));
  CHECK(!fs::exists(dir / "whole/model.safetensors.index.json"));

  chat("export " + m + " --shard-mb 1 -o " + (dir / "shards").string());
  CHECK(!fs::exists(dir / "shards/model.safetensors"));
  const Json index = read_json(dir / "shards/model.safetensors.index.json");
  std::set<std::string> names;
  for (const auto& item : index.at("weight_map").items()) names.insert(item.value());
  CHECK(names.size() == 5);
  CHECK(names.count("model-00001-of-00005.safetensors"));
  CHECK(names.count("model-00005-of-00005.safetensors"));
  for (const std::string& name : names) {
    CHECK(fs::file_size(dir / ("shards/" + name)) < 1'000'000 + 20'000);  // with the header
  }
  const SafeTensors one(dir / "m/model.safetensors"), many = SafeTensors::of_model(dir / "shards");
  REQUIRE(one.tensors().size() == many.tensors().size());
  int64_t bytes = 0;
  for (const auto& [name, t] : one.tensors()) {
    const StoredTensor* other = many.find(name);
    REQUIRE(other);
    CHECK(other->shape == t.shape);
    CHECK(std::memcmp(other->data, t.data, size_t(4 * t.count)) == 0);
    bytes += 4 * t.count;
  }
  CHECK(index.at("metadata").at("total_size") == bytes);
  FakeGpt a(c), b(c);
  load_weights(dir / "m", a);
  load_weights(dir / "shards", b);
  CHECK(a.values("blocks.23.down.weight") == b.values("blocks.23.down.weight"));

  for (const auto& [type, name] : {std::pair{FloatType::f16, "f16"}, {FloatType::bf16, "bf16"}}) {
    const fs::path out = dir / name;
    CAPTURE(out);
    chat(concat("export ", m, " --type ", name, " -o ", out.string()));
    const SafeTensors half(out / "model.safetensors");
    for (const auto& [tensor, t] : half.tensors()) {
      CHECK(t.dtype == (type == FloatType::f16 ? "F16" : "BF16"));
      std::vector<float> found(size_t(t.count)), expected(found);
      t.read(0, found);
      one.find(tensor)->read(0, expected);
      for (float& x : expected) {
        x = type == FloatType::f16 ? f16_to_float(float_to_f16(x))
                                   : bf16_to_float(float_to_bf16(x));
      }
      CHECK(found == expected);
    }
    const Json config = read_json(out / "config.json");
    CHECK(config.at("dtype") == (type == FloatType::f16 ? "float16" : "bfloat16"));
    CHECK(config.at("torch_dtype") == config.at("dtype"));
  }
}

TEST_CASE("f16 refuses a value beyond 65504, by its tensor, and leaves nothing") {
  const TempDir dir;
  const Config c = tiny(Family::llama, true);
  FakeGpt gpt(c);
  gpt.randomize(5);
  std::vector<float> norm = gpt.values("final_norm.weight");
  norm[3] = -70000;
  gpt.write(gpt.table().find("final_norm.weight"), Slot::weight, norm);
  save_checkpoint(dir / "m", gpt,
                  {.also = [&](const fs::path& fresh) { tokenizer().save(fresh); }});
  const std::string m = (dir / "m").string(), out = (dir / "out").string();
  const std::string error = chat_error("export " + m + " --type f16 -o " + out);
  CHECK(contains(error, "model.norm.weight: found the value -70000, expected at most 65504"));
  CHECK(!fs::exists(out));
  CHECK(!fs::exists(out + ".new"));
  chat("export " + m + " --type bf16 -o " + out);
  chat("export " + m + " --type f16 -o " + out + ".gguf");  // norms stay f32 there
}

TEST_CASE("an export replaces nothing without --overwrite, and never an input") {
  const TempDir dir;
  write_model(dir / "m", tiny(Family::llama, true));
  const std::string m = (dir / "m").string(), gguf = (dir / "m.gguf").string(),
                    out = (dir / "out").string();
  chat("export " + m + " -o " + gguf);
  const std::string before = read_file(gguf);
  CHECK(contains(chat_error("export " + m + " --type f16 -o " + gguf),
                 "m.gguf: exists; --overwrite replaces it"));
  CHECK(read_file(gguf) == before);
  chat("export " + m + " --type f16 --overwrite -o " + gguf);
  CHECK(read_file(gguf) != before);
  CHECK(contains(chat_error("export " + gguf + " --overwrite -o " + gguf), "which the run reads"));
  CHECK(contains(chat_error("export " + m + " --overwrite -o " + m), "which the run reads"));
  CHECK(contains(chat_error("export " + m + " --overwrite -o " + dir.path().string()),
                 "which the run reads"));
  fs::create_symlink(dir / "m", dir / "link");
  CHECK(contains(chat_error("export " + m + " --overwrite -o " + (dir / "link").string()),
                 "which the run reads"));

  chat("export " + m + " -o " + out);
  CHECK(contains(chat_error("export " + m + " -o " + out), "exists; --overwrite replaces it"));
  chat("export " + m + " --overwrite --shard-mb 1 -o " + out);
  write_file(dir / "out/notes.txt", "mine");
  CHECK(contains(chat_error("export " + m + " --overwrite -o " + out),
                 "notes.txt: found beside a model"));
  CHECK(read_file(dir / "out/notes.txt") == "mine");
  fs::create_directory(dir / "empty");
  chat("export " + m + " -o " + (dir / "empty").string());

  CHECK(contains(chat_error("export " + m + " --type q8_0 -o " + out + "2"),
                 "--type: found q8_0, expected f32, f16 or bf16 for a directory"));
  CHECK(contains(chat_error("export " + m + " --type q2_K -o " + out + ".gguf"),
                 "--type: found q2_K, expected f32, f16, bf16, q8_0 or q4_0"));
  CHECK(contains(chat_error("export " + m + " --ollama -o " + out + "2"),
                 "--ollama: found a directory"));
  CHECK(contains(chat_error("export " + (dir / "none").string() + " -o " + out + ".gguf"),
                 "none: not found"));
}

TEST_CASE("adapters are added to their model before it leaves, by export and by sft --merge") {
  const TempDir dir;
  for (const Family family : {Family::gpt2, Family::llama}) {
    const Config c = tiny(family, true);
    const std::string name = kModelTypes[int(family)];
    CAPTURE(name);
    const fs::path base = dir / (name + "_base"), adapters = dir / (name + "_adapters");
    write_model(base, c);
    FakeGpt with_rows(c, false, {.rank = 4, .alpha = 8});
    load_weights(base, with_rows);
    for (size_t i = 0; i < with_rows.table().tensors.size(); i++) {
      const Tensor& t = with_rows.table().tensors[i];
      if (t.kind != Kind::adapter) continue;
      std::vector<float> values(size_t(t.size()));
      Rng rng{mix64(5, i)};
      for (float& x : values) x = float(.1 * rng.normal());
      with_rows.write(int(i), Slot::weight, values);
    }
    save_checkpoint(adapters, with_rows, {.tokenizer_from = base, .base = adapter_base(base)});
    const std::string from = adapters.string(), gguf = from + ".gguf", merged = from + "_merged";
    CHECK(contains(chat("export " + from + " -o " + gguf), "with the adapters of"));
    // W + alpha / rank B A, in double; gpt2's adapters of q, k and v are one pair.
    const std::string adapter = family == Family::gpt2 ? "blocks.1.q" : "blocks.1.v";
    const auto a = with_rows.values(adapter + ".lora_A"), b = with_rows.values(adapter + ".lora_B");
    std::vector<float> expected = with_rows.values("blocks.1.v.weight");
    const size_t v_begin = family == Family::gpt2 ? size_t(2 * c.C) : 0;  // in the fused outputs
    for (size_t o = 0; o < size_t(c.NKV * c.HS); o++)
      for (size_t i = 0; i < size_t(c.C); i++) {
        double sum = expected[o * size_t(c.C) + i];
        for (size_t r = 0; r < 4; r++) {
          sum += 2. * double(b[(v_begin + o) * 4 + r]) * double(a[r * size_t(c.C) + i]);
        }
        expected[o * size_t(c.C) + i] = float(sum);
      }
    const GgufFile file(gguf);
    std::vector<float> found = values_of(
        *file.find(family == Family::gpt2 ? "blk.1.attn_qkv.weight" : "blk.1.attn_v.weight"));
    found.erase(found.begin(), found.begin() + int64_t(v_begin) * c.C);
    CHECK(rel_error(found, expected) < 1e-6);  // four additions in f32

    for (const char* extension : {"", ".gguf"}) {
      const Output o = shell("./sft --merge " + from + " -o " + merged + extension);
      REQUIRE_MESSAGE(o.status == 0, o.text);
    }
    CHECK(fs::exists(merged + "/model.safetensors"));
    CHECK(!fs::exists(merged + "/adapter_config.json"));
    const GgufFile by_sft(merged + ".gguf");
    CHECK(rel_error(values_of(by_sft.tensors()[1]), values_of(file.tensors()[1])) < 1e-6);
    const std::string text = chat("info " + from);
    CHECK(contains(
        text, "rank 4, alpha 8, added to " + base.string() + " of hash " + weights_hash(base)));
    CHECK(contains(chat_error("export " + from + " --overwrite -o " + base.string()),
                   "which the run reads"));
  }
}

TEST_CASE("a Modelfile names the file, the texts that end an answer, and the context") {
  const TempDir dir;
  Config c = tiny(Family::llama, true);
  c.set_first_end_token(tokenizer().special("<|im_end|>"));
  write_model(dir / "m", c);
  const std::string m = (dir / "m").string(), out = (dir / "sub/x.gguf").string();
  fs::create_directory(dir / "sub");
  chat("export " + m + " --ollama -o " + out);
  CHECK(read_file(dir / "sub/Modelfile") ==
        "FROM ./x.gguf\n"
        "TEMPLATE \"\"\"{{- range .Messages }}<|im_start|>{{ .Role }}\n"
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        "\"\"\"\n"
        "PARAMETER stop \"<|im_end|>\"\n"
        "PARAMETER stop \"<|endoftext|>\"\n"
        "PARAMETER num_ctx 48\n");
  fs::remove(out);
  CHECK(contains(chat_error("export " + m + " --ollama -o " + out), "Modelfile: exists"));
  c.T = 100'000;
  CHECK(contains(modelfile("x.gguf", c, tokenizer(), ""),
                 "# The model's whole context is 100000 tokens.\nPARAMETER num_ctx 8192\n"));
  CHECK(!contains(modelfile("x.gguf", c, tokenizer(), ""), "TEMPLATE"));
}

TEST_CASE("config, tokenizer and weights come from one checkpoint while a run exchanges them") {
  const TempDir dir;
  Config c = tiny(Family::llama, true);
  write_model(dir / "run/model", c);
  int calls = 0;
  std::vector<int> contexts;
  use_one_checkpoint(dir / "run", [&](const fs::path& found, const auto& expect_same) {
    contexts.push_back(load_config(found).T);
    if (calls++ < 2) {  // as a run does between two of our reads
      c.T++;
      write_model(dir / "run/model", c);
    }
    expect_same();
  });
  CHECK(contexts == std::vector<int>{48, 49, 50});
  // A run that exchanges it all the time: an error, not an endless loop.
  CHECK(contains(error_of([&] {
                   use_one_checkpoint(dir / "run", [&](const fs::path&, const auto& expect_same) {
                     write_model(dir / "run/model", c);
                     expect_same();
                   });
                 }),
                 "was exchanged while it was read"));
  // Other errors are not tried again.
  calls = 0;
  CHECK(error_of([&] {
          use_one_checkpoint(dir / "run", [&](const fs::path&, const auto&) {
            calls++;
            fail("something else");
          });
        }) == "something else");
  CHECK(calls == 1);
}

// -------------------------------------------------------------------------------------------------
// ./chat info

TEST_CASE("info says what a model is, for directories, runs and .gguf files") {
  const TempDir dir;
  Config c = tiny(Family::llama, true);
  c.rope = kLlama3;
  c.set_first_end_token(tokenizer().special("<|im_end|>"));
  write_model(dir / "run/model", c);
  const std::string run = (dir / "run").string(), gguf = (dir / "x.gguf").string(),
                    json = (dir / "info.json").string();
  const std::string text = chat("info " + run + " --json " + json);
  for (const char* part :
       {"LlamaForCausalLM: 2 layers of 64, 4 heads of 24, 2 of keys and values", "feed-forward 160",
        "19,200 embedding (also the head)", "f32", "48 tokens", "llama3, theta 1000000, factor 8",
        "290 tokens of 300 rows, split pattern qwen2", "<|im_end|> 275, <|endoftext|> 273",
        "this project's ChatML", "--weights auto", "q8_0", "LoRA"}) {
    CHECK_MESSAGE(contains(text, part), std::string(part), " in\n", text);
  }
  const Json found = read_json(json);
  CHECK(Json::parse(chat("info " + run + " --json -")) == found);
  const ParamTable table = make_table(c);
  CHECK(found.at("parameters").at("total") == table.parameters());
  CHECK(found.at("parameters").at("embedding") == 300 * 64);
  CHECK(found.at("stored").at("f32").at("bytes") == 4 * table.parameters());
  CHECK(found.at("shape").at("head_size") == 24);
  CHECK(found.at("memory").at("run").at("f32") > 4 * table.parameters());
  CHECK(found.at("memory").at("train") > found.at("memory").at("run").at("f32"));
  CHECK(found.at("memory").at("train_lora_16") < found.at("memory").at("train"));
  CHECK(found.at("tokenizer").at("special_tokens").size() == size_t(kSpecials));
  CHECK(found.at("end_tokens")[0].at("token") == "<|im_end|>");

  chat("export " + run + " --type q8_0 -o " + gguf);
  const std::string of_file = chat("info " + gguf);
  for (const char* part : {"LlamaForCausalLM", "q8_0", "f32", "qwen2", "<|im_end|> 275",
                           "this project's ChatML", "llama3, theta 1000000, factor 8"}) {
    CHECK_MESSAGE(contains(of_file, part), std::string(part), " in\n", of_file);
  }
}

TEST_CASE("info of a reward model, and of a model without a tokenizer") {
  const TempDir dir;
  Config c = tiny(Family::qwen3, true);
  c.head = Head::scalar;
  c.reward_shift = .25;
  FakeGpt gpt(c);
  gpt.randomize(5);
  save_checkpoint(dir / "r", gpt, {});
  const std::string text = chat("info " + (dir / "r").string());
  CHECK(contains(text, "Qwen3ForSequenceClassification"));
  CHECK(contains(text, "plus 0.25"));
  CHECK(contains(text, "64 head"));
  CHECK(contains(text, "found no tokenizer.json"));
  CHECK(!contains(text, "--weights"));
  CHECK(contains(chat_error("info " + (dir / "none").string()), "none: not found"));
  CHECK(contains(chat_error("export " + (dir / "r").string() + " -o " + (dir / "r.gguf").string()),
                 "found"));
  CHECK(!fs::exists(dir / "r.gguf"));
}
