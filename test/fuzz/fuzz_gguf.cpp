// Any bytes as a GGUF file: reading it ends in keys and tensors or in an Error of one line. What
// is read and can be written is read again the same.
//
//     build/fuzz/fuzz_gguf -max_len=65536 build/corpus_gguf test/golden/gguf
#include <filesystem>
#include <string>
#include <vector>

#include "cake/gguf.h"
#include "test/fuzz/fuzz.h"

namespace {
using namespace cake;

std::vector<float> values_of(const GgufTensor& t) {
  std::vector<float> values(size_t(t.count));
  t.read(0, values);
  return values;
}
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Writes what of the keys has a function to write it.
void write_key(GgufWriter& writer, const std::string& key, const GgufValue& value) {
  if (key == "general.alignment" || key == "split.count") return;
  if (const auto* x = std::get_if<uint64_t>(&value)) {
    if (*x <= UINT32_MAX) writer.set_u32(key, uint32_t(*x));
  } else if (const auto* x = std::get_if<bool>(&value)) {
    writer.set_bool(key, *x);
  } else if (const auto* x = std::get_if<std::string>(&value)) {
    writer.set_text(key, *x);
  } else if (const auto* x = std::get_if<std::vector<std::string>>(&value)) {
    writer.set_texts(key, *x);
  }
}

void write_and_read_again(const GgufFile& file, const std::filesystem::path& path) {
  std::vector<const GgufTensor*> tensors;
  for (const GgufTensor& t : file.tensors()) {
    if (t.count > 0 && !t.shape.empty()) tensors.push_back(&t);
  }
  {
    GgufWriter writer(path);
    for (const auto& [key, value] : file.keys()) write_key(writer, key, value);
    for (const GgufTensor* t : tensors) writer.add_tensor(t->name, t->shape, GgufType::f32);
    for (const GgufTensor* t : tensors) writer.write(values_of(*t));
    writer.commit();
  }
  const GgufFile again(path);
  for (const auto& [key, value] : again.keys()) {
    fuzz::expect(file.keys().at(key) == value, "a key is read again");
  }
  fuzz::expect(again.tensors().size() == tensors.size(), "all tensors are read again");
  for (const GgufTensor* t : tensors) {
    const GgufTensor* found = again.find(t->name);
    fuzz::expect(found && found->shape == t->shape, "a tensor's shape is read again");
    fuzz::expect(same_bits(values_of(*found), values_of(*t)), "a tensor's values are read again");
  }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::filesystem::path folder = [] {
    const auto path = std::filesystem::temp_directory_path() / concat("fuzz_gguf_", getpid());
    std::filesystem::create_directories(path);
    return path;
  }();
  const fuzz::MemoryFile bytes(data, size);
  try {
    const GgufFile file(bytes.path());
    fuzz::expect(GgufFile::is_gguf(bytes.path()), "what is read begins with GGUF");
    for (const GgufTensor& t : file.tensors()) {
      fuzz::expect(t.data >= file.tensors()[0].data && t.bytes() <= int64_t(size),
                   "a tensor lies in the file");
      values_of(t);
    }
    write_and_read_again(file, folder / "written.gguf");
  } catch (const Error& error) {
    fuzz::expect(std::string(error.what()).find('\n') == std::string::npos, "errors have one line");
  }
  return 0;
}
