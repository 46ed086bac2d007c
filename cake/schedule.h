// The learning-rate schedules, and the rules of `--depth`: what follows from a model's depth.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "cake/gpt.h"

namespace cake {

// The factor on every learning rate at step s = 1 .. steps: it rises over `warmup` steps, then
//   linear    stays at 1, and falls over the last `warmdown` of the steps to `floor` on a line
//   cosine    falls to `floor` on half a cosine (Loshchilov, Hutter 2017)
//   constant  stays at 1
// The floor is reached one step after the last, so that every step moves the weights.
struct Schedule {
  std::string shape = "linear";
  int64_t steps = 1, warmup = 0;
  double warmdown = .8;  // share of the steps
  double floor = 0;      // of the peak

  double at(int64_t step) const {
    if (step <= warmup) return double(step) / double(warmup);
    if (shape == "constant") return 1;
    if (shape == "cosine") {
      const double t = double(step - warmup) / double(std::max<int64_t>(1, steps + 1 - warmup));
      return floor + (1 - floor) * .5 * (1 + std::cos(3.141592653589793 * std::min(1., t)));
    }
    const double left = double(steps + 1 - step) / std::max(1., warmdown * double(steps));
    return floor + (1 - floor) * std::clamp(left, 0., 1.);
  }
};

// `--depth N` (nanochat's idea: one dial). The width is 64 N for depths from 8 on; smaller models
// are narrower, since at a laptop's budget tokens seen matter more than parameters.
inline int width_of_depth(int depth) {
  const int unit = depth >= 8 ? 64 : 32;
  return std::max(unit, depth * std::clamp(8 * depth, 32, 64) / unit * unit);
}

// A new model's shape from its depth and width: heads of 32, 64 or 128, a feed-forward width of 8/3
// of the channels (llama: SwiGLU's third matrix paid for) or 4 (gpt2), in multiples of 64.
inline Config new_config(Family family, int layers, int channels, int vocab_size, int context) {
  Config c;
  c.family = family;
  c.V = vocab_size, c.T = context, c.L = layers, c.C = channels;
  c.HS = channels < 256 || channels % 64 ? 32 : channels < 1536 || channels % 128 ? 64 : 128;
  c.NH = c.NKV = std::max(1, channels / c.HS);
  c.F = family == Family::gpt2 ? 4 * channels : (channels * 8 / 3 + 63) / 64 * 64;
  c.tied = family == Family::gpt2;
  if (family == Family::gpt2) c.norm_eps = 1e-5;
  return c;
}

// Tokens an optimizer step takes: 2^19 at depth 12, growing as the .38th power of the training
// tokens (nanochat's rule), and no fewer than 2,048.
inline int64_t batch_of_tokens(double training_tokens) {
  const double d12 = 10.5 * 110e6;  // the budget of depth 12
  const double tokens = 524288 * std::pow(training_tokens / d12, .38);
  return std::max<int64_t>(2048, int64_t(1) << std::lround(std::log2(std::max(1., tokens))));
}

// Tokens worth training a model on: 10.5 for each parameter that takes part in products.
inline int64_t tokens_of_model(const ParamTable& table) {
  return int64_t(10.5 * double(table.matmul_parameters()));
}

// Muon's own products cost 5 (3 m^2 n + m^3) a matrix and step: worth it when they are few beside
// the batch's 6 m n a token.
inline bool muon_is_cheap(const ParamTable& table, int64_t batch_tokens) {
  double muon = 0, batch = 0;
  for (const Tensor& t : table.tensors) {
    if (t.kind != Kind::matrix) continue;
    const double m = std::min(t.out, t.in), n = std::max(t.out, t.in);
    muon += 5 * (3 * m * m * n + m * m * m);
    batch += 6 * m * n * double(batch_tokens);
  }
  return muon < .35 * batch;
}

}  // namespace cake
