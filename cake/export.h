// A model for other programs: a GGUF file, or a Hugging Face directory in another type of numbers
// or in several files. Adapters are added to their model first.
#pragma once

#include <cstdio>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/gguf_export.h"
#include "cake/gpt.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {

struct ExportOptions {
  std::string model;                    // a run, a model directory, adapters or a .gguf file
  std::filesystem::path out;            // FILE.gguf, or a directory
  std::string type = "f32";             // of the matrices; of a directory: of all tensors
  std::string name;                     // general.name of a GGUF file; empty: family and size
  int64_t shard_bytes = 5'000'000'000;  // of a directory: larger models become several files
  bool overwrite = false;
  bool ollama = false;  // also a Modelfile beside a GGUF file
};

// Writes the model that `o.model` computes and prints what it wrote. Throws Error, and leaves no
// part of the output, where it cannot be written as it is.
inline void export_model(const ExportOptions& o);

// ---------------------------------------------------------------------------------------------

inline bool is_gguf_output(const ExportOptions& o) { return o.out.extension() == ".gguf"; }

// The number whose name is `name` in a list of names.
template <class Names>
int find_type(const Names& names, const std::string& name, const std::string& expected) {
  int i = 0;
  for (const char* other : names) {
    if (name == other) return i;
    i++;
  }
  fail("--type: found ", name, ", expected ", expected);
}
inline FloatType parse_float_type(const std::string& name) {
  return FloatType(find_type(kFloatTypeNames, name,
                             "f32, f16 or bf16 for a directory; q8_0 and q4_0 are types of a .gguf "
                             "file"));
}
inline GgufType parse_gguf_type(const std::string& name) {
  constexpr GgufType kTypes[] = {GgufType::f32, GgufType::f16, GgufType::bf16, GgufType::q8_0,
                                 GgufType::q4_0};
  constexpr const char* kNames[] = {"f32", "f16", "bf16", "q8_0", "q4_0"};
  return kTypes[find_type(kNames, name, "f32, f16, bf16, q8_0 or q4_0")];
}

// Text in a Modelfile's quotes.
inline std::string modelfile_quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

// What Ollama needs beside a GGUF file: where it is, which texts end an answer, how long a
// conversation may be (Ollama's own default is a few thousand tokens), and ChatML in its own
// template language, since it runs no Jinja.
inline std::string modelfile(const std::string& gguf, const Config& c, const Tokenizer& tokenizer,
                             const std::string& chat_template) {
  constexpr int kLongest = 8192;  // a cache of the whole context is reserved when a model is loaded
  std::string text = "FROM ./" + gguf + "\n";
  const bool chatml = chat_template.find("<|im_start|>") != std::string::npos;
  if (chatml) {
    text +=
        "TEMPLATE \"\"\"{{- range .Messages }}<|im_start|>{{ .Role }}\n"
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n\"\"\"\n";
  }
  const GgufSpecialTokens ids = gguf_special_tokens(c, tokenizer, chat_template);
  std::vector<int> ends = {ids.eot, ids.eos};
  for (const int id : c.all_end_tokens()) ends.push_back(id);
  if (chatml) ends.push_back(tokenizer.special("<|im_end|>"));
  std::set<int> seen;
  for (const int id : ends) {
    if (id < 0 || !seen.insert(id).second) continue;
    const std::string token(tokenizer.token_bytes(id));
    if (!token.empty()) text += "PARAMETER stop " + modelfile_quoted(token) + "\n";
  }
  if (c.T > kLongest) text += concat("# The model's whole context is ", c.T, " tokens.\n");
  return text + concat("PARAMETER num_ctx ", std::min(c.T, kLongest), "\n");
}

// The outputs are none of the inputs, and replace nothing without --overwrite.
inline void expect_outputs_free(const ExportOptions& o) {
  namespace fs = std::filesystem;
  const fs::path model = model_dir(o.model);
  std::vector<fs::path> inputs = {o.model, model};
  if (has_adapters(model)) inputs.push_back(load_adapter_config(model).base);
  expect_elsewhere(o.out, inputs);
  std::vector<fs::path> outputs = {o.out};
  if (o.ollama) outputs.push_back(o.out.parent_path() / "Modelfile");
  for (const fs::path& path : outputs) {
    const bool is_free = !fs::exists(path) || (fs::is_directory(path) && fs::is_empty(path));
    if (!is_free && !o.overwrite) fail(path.string(), ": exists; --overwrite replaces it");
  }
  if (!fs::exists(o.out)) return;
  if (is_gguf_output(o)) {
    if (!fs::is_regular_file(o.out)) fail(o.out.string(), ": found no file, expected one");
    return;
  }
  if (!fs::is_directory(o.out)) fail(o.out.string(), ": found a file, expected a directory");
  // Only what an export writes is removed with the old directory.
  for (const auto& entry : fs::directory_iterator(o.out)) {
    const std::string name = entry.path().filename().string();
    const bool ours = name == "config.json" || name == "generation_config.json" ||
                      name == "model.safetensors" || name == "model.safetensors.index.json" ||
                      (name.starts_with("model-") && name.ends_with(".safetensors")) ||
                      std::find(std::begin(kTokenizerFiles), std::end(kTokenizerFiles), name) !=
                          std::end(kTokenizerFiles);
    if (!ours || !entry.is_regular_file()) {
      fail(entry.path().string(), ": found beside a model, where --overwrite would remove it; ",
           "expected a directory that holds an exported model alone");
    }
  }
}

// Where the model's tokenizer is: adapters may have none of their own.
inline std::filesystem::path tokenizer_place(const std::filesystem::path& dir) {
  const bool own = !has_adapters(dir) || has_tokenizer(dir);
  return own ? dir : load_adapter_config(dir).base;
}

inline void export_gguf(const ExportOptions& o, const std::filesystem::path& dir, const Gpt& gpt,
                        const std::function<void()>& expect_same) {
  const std::filesystem::path place = tokenizer_place(dir);
  const Tokenizer tokenizer = Tokenizer::load(place);
  const GgufExport options{
      .type = parse_gguf_type(o.type), .chat_template = chat_template(place), .name = o.name};
  expect_same();  // all is read
  if (o.out.has_parent_path()) std::filesystem::create_directories(o.out.parent_path());
  for (const std::string& note : write_gguf(o.out, gpt, tokenizer, options)) {
    std::fprintf(stderr, "note: %s\n", note.c_str());
  }
  if (!o.ollama) return;
  write_file(o.out.parent_path() / "Modelfile",
             modelfile(o.out.filename().string(), gpt.config(), tokenizer, options.chat_template));
}

inline void export_directory(const ExportOptions& o, const std::filesystem::path& dir,
                             const Gpt& gpt, const std::function<void()>& expect_same) {
  SaveOptions options{
      .started_from = dir, .type = parse_float_type(o.type), .shard_bytes = o.shard_bytes};
  const std::filesystem::path place = tokenizer_place(dir);
  // Reward models and models of a library may come without a tokenizer.json.
  if (std::filesystem::is_regular_file(place) ||
      std::filesystem::exists(place / "tokenizer.json")) {
    options.tokenizer_from = place;
  }
  options.also = [&](const std::filesystem::path& fresh) {
    if (options.tokenizer_from.empty()) Tokenizer::load(place).save(fresh);
    expect_same();
    if (stop_signal) fail("stopped by a signal: not written");
  };
  save_checkpoint(o.out, gpt, options);
}

inline int64_t bytes_below(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return int64_t(std::filesystem::file_size(path));
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.is_regular_file()) bytes += int64_t(entry.file_size());
  }
  return bytes;
}

inline void export_model(const ExportOptions& o) {
  if (o.out.empty()) fail("-o: missing, expected FILE.gguf or a directory to write");
  const bool gguf = is_gguf_output(o);
  gguf ? void(parse_gguf_type(o.type)) : void(parse_float_type(o.type));
  if (o.ollama && !gguf) fail("--ollama: found a directory, expected -o FILE.gguf");
  expect_outputs_free(o);
  use_one_checkpoint(o.model, [&](const std::filesystem::path& dir, const auto& expect_same) {
    const auto gpt = make_gpt(load_config(dir), {.device = Device::cpu, .mode = Mode::inference});
    load_weights(dir, *gpt);
    gguf ? export_gguf(o, dir, *gpt, expect_same) : export_directory(o, dir, *gpt, expect_same);
    std::printf("%s: %s parameters as %s, %s%s\n", o.out.c_str(),
                count_text(double(gpt->table().parameters())).c_str(), o.type.c_str(),
                bytes_text(double(bytes_below(o.out))).c_str(),
                has_adapters(dir) ? concat(", with the adapters of ", dir.string()).c_str() : "");
  });
  if (o.ollama) {
    std::printf("%s: ollama create NAME -f %s\n", (o.out.parent_path() / "Modelfile").c_str(),
                (o.out.parent_path() / "Modelfile").c_str());
  }
}

}  // namespace cake
