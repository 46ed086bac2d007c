// Any bytes as a model's config.json, generation_config.json and adapter_config.json, with a byte
// 0xFF between them: reading them ends in a Config or in an Error of one line. A Config that is
// read has possible sizes, and is written as a config.json that reads as the same.
#include <filesystem>
#include <fstream>
#include <string>

#include "cake/checkpoint.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;
namespace fs = std::filesystem;

std::string text_of(const Config& c) { return config_json(c).dump(); }

void check_config(const fs::path& dir) {
  const Config c = read_config(dir);
  fuzz::expect(c.V > 0 && c.C > 0 && c.L > 0 && c.NH > 0 && c.NKV > 0 && c.T > 0, "sizes");
  fuzz::expect(c.NH % c.NKV == 0, "query heads share key heads evenly");
  for (const int id : c.all_end_tokens())
    fuzz::expect(id >= 0 && id < c.V, "end tokens are tokens");
  const ParamTable table = make_table(c);
  int64_t end = 0;
  for (const Tensor& t : table.tensors) {
    fuzz::expect(t.offset >= end && t.size() > 0, "tensors have elements, one behind another");
    end = t.offset + t.size();
  }
  fuzz::expect(table.size >= end, "the table holds its tensors");
  const std::string written = text_of(c);
  const Config again = parse_config(Json::parse(written), "written");
  fuzz::expect(text_of(again) == written, "the config.json written reads as the same");
  generation_config_json(c, generation_settings(dir)).dump();
}

void check_adapters(const fs::path& dir) {
  const AdapterConfig c = load_adapter_config(dir);
  fuzz::expect(c.lora.rank > 0 && c.lora.alpha > 0, "adapters have a rank and a scale");
}

template <class Check>
void one_line(Check check) {
  try {
    check();
  } catch (const Error& error) {
    fuzz::expect(std::string_view(error.what()).find('\n') == std::string_view::npos, "one line");
  }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fs::path dir = [] {
    const auto path = fs::temp_directory_path() / concat("fuzz_config_", getpid());
    fs::create_directories(path / "adapters" / "base");
    write_file(path / "adapters" / "base" / "config.json", "{}");
    return path;
  }();
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t first = std::min(all.find('\xff'), size);
  const size_t second = std::min(all.find('\xff', first + 1), size);
  const auto write = [](const fs::path& path, std::string_view text) {
    fs::remove(path);  // ext4 waits for the disk where a file is written anew in its place
    std::ofstream(path, std::ios::binary) << text;
  };
  write(dir / "config.json", all.substr(0, first));
  write(dir / "generation_config.json",
        first < size ? all.substr(first + 1, second - first - 1) : "{}");
  write(dir / "adapters" / "adapter_config.json", second < size ? all.substr(second + 1) : "");
  one_line([&] { check_config(dir); });
  if (second < size) one_line([&] { check_adapters(dir / "adapters"); });
  return 0;
}
