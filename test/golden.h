// Goldens of dev/golden/: their files, the formula of the weights, engines that have them. Results
// alone are stored; weights come from a formula, the same here and in dev/golden/common.py.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cake/config.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "test/support.h"

namespace cake::goldens {

// ---------------------------------------------------------------------------------------------
// The formula of the weights: dev/golden/common.py has the same

inline std::vector<float> formula(const Tensor& t) {
  const double scale = t.kind == Kind::vector ? .1
                       : t.kind == Kind::embedding || t.kind == Kind::position
                           ? .5
                           : 1.5 / std::sqrt(double(t.in));
  std::vector<float> values(size_t(t.size()));
  const uint64_t seed = hash64(t.name);
  for (size_t i = 0; i < values.size(); i++) {
    // to float before the 1 is added: no compiler fuses the two
    values[i] = float(scale * (2 * uniform01(mix64(seed, i)) - 1));
    if (t.init_one) values[i] += 1;
  }
  return values;
}

inline std::vector<float> random_values(const std::string& name, int64_t n) {  // in (-1, 1)
  std::vector<float> values(static_cast<size_t>(n));
  const uint64_t seed = hash64(name);
  for (size_t i = 0; i < values.size(); i++) values[i] = float(2 * uniform01(mix64(seed, i)) - 1);
  return values;
}

inline std::vector<int> random_ids(const std::string& name, int n, int below) {
  std::vector<int> ids(static_cast<size_t>(n));
  const uint64_t seed = hash64(name);
  for (size_t i = 0; i < ids.size(); i++) {
    ids[i] = std::min(below - 1, int(uniform01(mix64(seed, i)) * below));
  }
  return ids;
}

// ---------------------------------------------------------------------------------------------
// Goldens

struct Golden {
  Config config;
  float temperature = 1;
  Json settings;  // of the script
  std::map<std::string, std::vector<float>> tensors;

  const std::vector<float>& at(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) fail("golden: found no tensor ", name);
    return found->second;
  }
  bool has(const std::string& name) const { return tensors.count(name) > 0; }
  std::vector<int> ints(const std::string& name) const {
    const std::vector<float>& x = at(name);
    return std::vector<int>(x.begin(), x.end());
  }
};

inline Config config_of(const Json& j) {
  Config c;
  const std::string family = j["family"];
  c.family = Family::llama;  // mistral too
  for (int i = 0; i < int(std::size(kModelTypes)); i++)
    if (family == kModelTypes[i]) c.family = Family(i);
  c.head = j["head"] == "scalar" ? Head::scalar : Head::lm;
  c.V = j["V"], c.T = j["T"], c.L = j["L"], c.C = j["C"];
  c.NH = j["NH"], c.NKV = j["NKV"], c.HS = j["HS"], c.F = j["F"];
  c.tied = j["tied"], c.norm_eps = j["norm_eps"];
  c.rope = {.theta = j["rope_theta"],
            .factor = j["rope_factor"],
            .low_freq_factor = j["rope_low"],
            .high_freq_factor = j["rope_high"],
            .original_T = j["rope_original_T"],
            .linear = j.value("rope_linear", false)};
  c.bos = c.eos = c.pad = 0;
  return c;
}

// A reader of its own, so that the goldens do not depend on the code they judge.
inline Golden load_golden(const std::string& name) {
  const std::string path = "test/golden/" + name + ".safetensors", bytes = read_file(path);
  uint64_t header_bytes = 0;
  REQUIRE(bytes.size() > 8);
  std::memcpy(&header_bytes, bytes.data(), 8);
  REQUIRE(bytes.size() >= 8 + header_bytes);
  const Json header = Json::parse(bytes.substr(8, header_bytes));
  Golden golden;
  for (const auto& [key, t] : header.items()) {
    if (key == "__metadata__") {
      if (!t.contains("golden")) continue;  // a plain file that transformers' logits are in
      golden.settings = Json::parse(t["golden"].get<std::string>());
      golden.config = config_of(golden.settings["config"]);
      golden.temperature = golden.settings["temperature"];
      continue;
    }
    REQUIRE(t["dtype"] == "F32");
    const uint64_t begin = t["data_offsets"][0], end = t["data_offsets"][1];
    REQUIRE(8 + header_bytes + end <= bytes.size());
    std::vector<float>& values = golden.tensors[key];
    values.resize((end - begin) / sizeof(float));
    std::memcpy(values.data(), bytes.data() + 8 + header_bytes + begin, end - begin);
  }
  return golden;
}

// ---------------------------------------------------------------------------------------------
// Engines

inline std::unique_ptr<Gpt> make_formula_gpt(const Config& config) {
  auto gpt = make_gpt(config, {.device = Device::cpu});
  const auto& tensors = gpt->table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    gpt->write(int(i), Slot::weight, formula(tensors[i]));
  }
  return gpt;
}

inline std::vector<float> read(const Gpt& gpt, int tensor, Slot slot) {
  std::vector<float> values(size_t(gpt.table().tensors[size_t(tensor)].size()));
  gpt.read(tensor, slot, values);
  return values;
}

template <class A, class B>
void check_close(const A& found, const B& expected, double tolerance, const std::string& what) {
  const double error = rel_error(found, expected);
  CHECK_MESSAGE(error < tolerance, what, ": relative error ", error, ", tolerance ", tolerance);
}

}  // namespace cake::goldens
