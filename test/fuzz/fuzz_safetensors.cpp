// Any bytes as the weights of a model: reading them ends in tensors within the file or in an Error
// of one line.
//
// The first byte of the input chooses the file: 0 model.safetensors; 1 a shard, with
// model.safetensors.index.json before it and a byte 0xFF between; 2 adapter_model.safetensors.
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;
namespace fs = std::filesystem;

constexpr const char* kConfig = R"({"model_type": "llama", "hidden_size": 4,
  "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
  "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 5, "max_position_embeddings": 8,
  "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": false, "hidden_act": "silu"})";
constexpr const char* kAdapterConfig = R"({"peft_type": "LORA", "task_type": "CAUSAL_LM",
  "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"]})";

void read_tensors(const SafeTensors& disk) {
  for (const auto& [name, tensor] : disk.tensors()) {
    const int64_t n = std::min<int64_t>(tensor.count, 1000);
    std::vector<float> values(static_cast<size_t>(n));
    try {
      tensor.read(0, values);
      tensor.read(tensor.count - n, values);
    } catch (const Error&) {  // of another type
    }
  }
  disk.hash();
}

void read_weights(const SafeTensorsSource& source, const Config& config) {
  const ParamTable table = make_table(config);
  std::vector<float> values;
  for (const Tensor& t : table.tensors) {
    values.resize(size_t(t.size()));
    try {
      source.read(t, values);
    } catch (const Error&) {  // missing, or of another shape
    }
  }
  source.expect_no_others(table, false);
}

void read(const fs::path& dir, const Config& config, int kind) {
  if (kind < 2) {
    read_tensors(SafeTensors::of_model(dir));
    read_weights(SafeTensorsSource(dir, config), config);
    return;
  }
  read_tensors(SafeTensors(dir / "adapter_model.safetensors"));
  const Adapters adapters(dir, config);
  for (const Tensor& t : make_table(config).tensors) {
    std::vector<float> w(size_t(t.size()));
    if (t.kind == Kind::matrix) adapters.add_to(t, w);
  }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fs::path dir = [] {
    const auto path = fs::temp_directory_path() / concat("fuzz_safetensors_", getpid());
    fs::create_directories(path / "base");
    write_file(path / "base" / "config.json", kConfig);
    write_file(path / "adapter_config.json", kAdapterConfig);
    return path;
  }();
  static const Config config = read_config(dir / "base");
  if (size == 0) return 0;
  const int kind = data[0] % 3;
  std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto write = [&](const char* name, std::string_view text) {
    std::ofstream(dir / name, std::ios::binary) << text;
    return dir / name;
  };
  std::vector<fs::path> files;
  if (kind == 1) {
    const size_t end = bytes.find('\xff');
    files.push_back(write("model.safetensors.index.json", bytes.substr(0, end)));
    bytes = end == bytes.npos ? std::string_view() : bytes.substr(end + 1);
  }
  constexpr const char* kNames[] = {"model.safetensors", "a.safetensors",
                                    "adapter_model.safetensors"};
  files.push_back(write(kNames[kind], bytes));
  try {
    read(dir, config, kind);
  } catch (const Error& error) {
    fuzz::expect(std::string_view(error.what()).find('\n') == std::string_view::npos, "one line");
  }
  for (const fs::path& file : files) fs::remove(file);
  return 0;
}
