// A safetensors file: 8 bytes with the header's length, a JSON header {name: {dtype, shape,
// data_offsets}}, then the tensors end to end (huggingface/safetensors, format.md).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/number_formats.h"
#include "cake/run.h"

namespace cake {

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

// Fails, with what to do, where a directory has weights in another format only.
inline void refuse_other_weights(const std::filesystem::path& dir) {
  if (!std::filesystem::is_directory(dir)) return;
  const auto ends = [](const std::string& name, const char* end) { return name.ends_with(end); };
  std::set<std::string> names;  // sorted: the same message everywhere
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    names.insert(entry.path().filename().string());
  }
  for (const std::string& name : names) {
    const std::string found =
        concat(dir.string(), ": found ", name, ", expected model.safetensors");
    if (name.starts_with("pytorch_model") && ends(name, ".bin")) {
      fail(found, ": a Python pickle can run programs and is not read; in Python, ",
           "AutoModelForCausalLM.from_pretrained(\"", dir.string(),
           "\").save_pretrained(\"DIR\") of transformers writes it as safetensors");
    }
    if (name.starts_with("consolidated") && (ends(name, ".pth") || ends(name, ".safetensors"))) {
      fail(found, ": these are the weights as Meta's and Mistral's own programs name them; take ",
           "the model in Hugging Face's format, or a .gguf of it");
    }
  }
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
      if (!std::filesystem::exists(dir / "model.safetensors")) refuse_other_weights(dir);
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

  std::string hash() const { return hash_files(files_); }  // in the order of their names

 private:
  void add_file(const std::filesystem::path& path) {
    files_.emplace_back(path);
    const MappedFile& file = files_.back();
    const std::string where = path.string();
    refuse_git_lfs_pointer({reinterpret_cast<const char*>(file.data()), size_t(file.size())},
                           where);
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

// Throws Error when a value rounds to infinity in this type. NaN and infinity pass.
inline void expect_in_range(const std::string& what, std::span<const float> values,
                            FloatType type) {
  if (type == FloatType::f32) return;
  // Of f16, whose largest number is 65504, what is beyond it by less than half a step would still
  // round to it; it is refused too, so that the bound is the one that everybody knows.
  const float bound = type == FloatType::f16 ? kHighestF16 : 0x1.fep127f;
  for (const float x : values) {
    if (std::fabs(x) <= bound || !std::isfinite(x)) continue;
    fail(what, ": found the value ", x, ", expected at most ", bound, ", the largest of ",
         kFloatTypeNames[int(type)], ": ",
         type == FloatType::f16 ? "bf16 and f32 hold" : "f32 holds", " larger ones");
  }
}

// Writes a file tensor by tensor, in the order in which they were declared.
class SafeTensorsWriter {
 public:
  struct Entry {
    std::string name;
    std::vector<int64_t> shape;
    int64_t count() const {
      int64_t n = 1;
      for (const int64_t size : shape) n *= size;
      return n;
    }
  };
  SafeTensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries, FloatType type,
                    std::map<std::string, std::string> metadata = {})
      : file_(path), entries_(std::move(entries)), type_(type) {
    metadata["format"] = "pt";  // transformers asks for it
    OrderedJson header{{"__metadata__", metadata}};
    int64_t end = 0;
    constexpr const char* kTypes[] = {"F32", "F16", "BF16"};
    for (const Entry& e : entries_) {
      const int64_t begin = std::exchange(end, end + e.count() * float_bytes(type));
      header[e.name] = {
          {"dtype", kTypes[int(type)]}, {"shape", e.shape}, {"data_offsets", {begin, end}}};
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // aligns the data
    const uint64_t length = text.size();
    file_.write(&length, sizeof length);
    file_.write(text);
  }
  // The values of the next tensor, all of them. Throws Error naming the tensor when one of them is
  // beyond the largest number of the type.
  void write(std::span<const float> values) {
    const Entry& entry = entries_.at(written_++);
    if (type_ == FloatType::f32) return file_.write(values.data(), values.size_bytes());
    expect_in_range(entry.name, values, type_);
    narrow_.resize(values.size());
    std::transform(values.begin(), values.end(), narrow_.begin(),
                   type_ == FloatType::f16 ? float_to_f16 : float_to_bf16);
    file_.write(narrow_.data(), narrow_.size() * sizeof(uint16_t));
  }
  void commit() { file_.commit(); }

 private:
  AtomicFile file_;
  std::vector<Entry> entries_;
  FloatType type_;
  size_t written_ = 0;  // tensors
  std::vector<uint16_t> narrow_;
};

}  // namespace cake
