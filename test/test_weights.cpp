// Inference models that keep their matrices in f16, bf16 and q8_0: what they compute, what goes in
// and out of them, what they take, what is refused. The products themselves are tested in
// test_gpt.cpp.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cake/gpt.h"
#include "test/support.h"

using namespace cake;

namespace {

const Family kFamilies[] = {Family::gpt2, Family::llama, Family::qwen3};

// Rows are multiples of 32, as q8_0 needs; outputs are no multiple of any panel's width.
Config small_config(Family family, bool tied) {
  Config c;
  c.family = family, c.tied = tied;
  c.V = 149, c.T = 160, c.L = 2, c.C = 96, c.NH = 4, c.NKV = 4, c.HS = 24, c.F = 160;
  if (family != Family::gpt2) c.NKV = 2, c.HS = 40;
  return c;
}

bool is_matrix(const ParamTable& table, const Tensor& t) {
  return t.kind == Kind::matrix || t.kind == Kind::embedding ||
         (t.kind == Kind::head && table.head.out > 1);
}
std::vector<WeightType> all_matrices(const Config& c, WeightType type, Lora lora = {}) {
  std::vector<WeightType> types;
  const ParamTable table = make_table(c, false, lora);
  for (const Tensor& t : table.tensors)
    types.push_back(is_matrix(table, t) ? type : WeightType::f32);
  return types;
}
// The types take turns: a block's groups, the embedding and the head have different ones.
std::vector<WeightType> mixed(const Config& c) {
  const ParamTable table = make_table(c);
  std::vector<WeightType> types(table.tensors.size(), WeightType::f32);
  int turn = 0;
  const auto set = [&](int64_t begin, int64_t size) {
    const auto type = WeightType(turn++ % kWeightTypes);
    for (size_t i = 0; i < types.size(); i++) {
      const int64_t offset = table.tensors[i].offset;
      if (offset >= begin && offset < begin + size) types[i] = type;
    }
  };
  set(table.wte, 1);
  if (!c.tied) set(table.head.weight, 1);
  for (const Block& b : table.blocks)
    for (const Linear* l : {&b.qkv, &b.o, &b.up, &b.down}) set(l->weight, int64_t(l->out) * l->in);
  return types;
}

std::vector<float> random_values(const Tensor& t) {
  Rng rng{hash64(t.name)};
  const double std = t.in > 1 ? 1 / std::sqrt(double(t.in)) : .2;
  std::vector<float> values(size_t(t.size()));
  for (float& x : values) x = float((t.init_one ? 1 : 0) + std * rng.normal());
  return values;
}
// What a type makes of a matrix (out, in).
std::vector<float> rounded(std::vector<float> values, WeightType type) {
  if (type == WeightType::q8_0) {
    for (size_t i = 0; i < values.size(); i += kQ8Block)
      dequantize_q8_0(quantize_q8_0(&values[i]), &values[i]);
  }
  for (float& x : values) {
    if (type == WeightType::bf16) x = bf16_to_float(float_to_bf16(x));
    if (type == WeightType::f16) x = f16_to_float(float_to_f16(x));
  }
  return values;
}

// With `round`, an f32 model of the weights that `types` make of them.
std::unique_ptr<Gpt> random_model(const Config& c, const std::vector<WeightType>& types,
                                  bool round = false) {
  GptOptions options{.device = Device::cpu, .mode = Mode::inference};
  if (!round) options.weights = types;
  auto gpt = make_gpt(c, options);
  const auto& tensors = gpt->table().tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    const auto values = random_values(tensors[i]);
    gpt->write(int(i), Slot::weight, round ? rounded(values, types[i]) : values);
  }
  return gpt;
}

std::vector<float> copy(std::span<const float> x) { return {x.begin(), x.end()}; }

std::vector<int> random_tokens(const Config& c, int n, uint64_t seed = 1) {
  Rng rng{seed};
  std::vector<int> tokens;
  for (int i = 0; i < n; i++) tokens.push_back(int(rng.below(uint64_t(c.V))));
  return tokens;
}

// Log-probabilities of packed documents.
std::vector<float> scores(Gpt& gpt, const std::vector<int>& tokens, std::vector<int> starts) {
  std::vector<int> targets(tokens.begin() + 1, tokens.end());
  targets.push_back(3);
  gpt.forward({tokens, targets, starts}, Pass::score);
  return copy(gpt.logp());
}
// Logits after each token, decoded `step` tokens at a time.
std::vector<float> decoded(Gpt& gpt, const std::vector<int>& tokens, int step) {
  const auto cache = gpt.make_cache(int64_t(tokens.size()) + 8);
  const int sequence = cache->create();
  std::vector<float> last;
  DecodeResult result;
  for (size_t i = 0; i < tokens.size(); i += size_t(step)) {
    const size_t n = std::min(size_t(step), tokens.size() - i);
    const DecodeRow row{sequence, std::span(tokens).subspan(i, n), {}, {}};
    gpt.decode(*cache, {&row, 1}, result, true);
    last = result.logits;
  }
  return last;
}
// The same for `rows` sequences side by side, of which the others are random.
std::vector<float> decoded_beside(Gpt& gpt, const std::vector<int>& tokens, int rows) {
  const auto cache = gpt.make_cache(int64_t(rows) * 256);
  std::vector<std::vector<int>> texts;
  std::vector<int> sequences;
  for (int r = 0; r < rows; r++) {
    texts.push_back(r == rows / 2 ? tokens
                                  : random_tokens(gpt.config(), int(tokens.size()), uint64_t(r)));
    sequences.push_back(cache->create());
  }
  DecodeResult result;
  for (size_t i = 0; i < tokens.size(); i++) {
    std::vector<DecodeRow> batch;
    for (int r = 0; r < rows; r++)
      batch.push_back({sequences[size_t(r)], std::span(texts[size_t(r)]).subspan(i, 1), {}, {}});
    gpt.decode(*cache, batch, result, true);
  }
  const auto begin = result.logits.begin() + long(rows / 2) * gpt.config().V;
  return {begin, begin + gpt.config().V};
}

}  // namespace

TEST_CASE("weights in bf16 and f16 give the bits of an f32 model with the rounded weights") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      for (const WeightType type : {WeightType::bf16, WeightType::f16}) {
        const Config c = small_config(family, tied);
        const auto types = all_matrices(c, type);
        const auto gpt = random_model(c, types), expected = random_model(c, types, true);
        const auto tokens = random_tokens(c, 70);
        const std::vector<int> starts = {0, 33, 34, 70};
        CHECK(scores(*gpt, tokens, starts) == scores(*expected, tokens, starts));
        for (const int step : {1, 2, 7, 70})
          CHECK(decoded(*gpt, tokens, step) == decoded(*expected, tokens, step));
        for (size_t i = 0; i < types.size(); i++) {
          const auto size = size_t(gpt->table().tensors[i].size());
          std::vector<float> a(size), b(size);
          gpt->read(int(i), Slot::weight, a), expected->read(int(i), Slot::weight, b);
          CHECK(a == b);
        }
      }
    }
  }
}

TEST_CASE("any rows, any threads, prefill, decoding and scoring have the same bits in every type") {
  const int threads = omp_get_max_threads();
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      const Config c = small_config(family, tied);
      std::vector<std::vector<WeightType>> all = {mixed(c)};
      for (const WeightType type : {WeightType::f32, WeightType::bf16, WeightType::q8_0})
        all.push_back(all_matrices(c, type));
      for (const auto& types : all) {
        const auto gpt = random_model(c, types);
        const auto tokens = random_tokens(c, 70), part = random_tokens(c, 9);
        const std::vector<int> starts = {0, 33, 34, 70};
        const auto logp = scores(*gpt, tokens, starts), logits = decoded(*gpt, tokens, 1),
                   part_logits = decoded(*gpt, part, 1);
        for (const float x : logits) REQUIRE(std::isfinite(x));
        for (const int n : {1, 2, 3}) {
          set_threads(n);
          CHECK(scores(*gpt, tokens, starts) == logp);
          for (const int step : {1, 2, 5, 13, 70}) CHECK(decoded(*gpt, tokens, step) == logits);
          for (const int rows : {2, 5, 64}) CHECK(decoded_beside(*gpt, part, rows) == part_logits);
        }
        set_threads(threads);
        // A document alone, and the log-probability that its logits give to the next token.
        const std::vector<int> alone(tokens.begin(), tokens.begin() + 33);
        const auto alone_logp = scores(*gpt, alone, {0, 33});
        CHECK(std::equal(alone_logp.begin(), alone_logp.end() - 1, logp.begin()));
        const auto next = decoded(*gpt, {alone.begin(), alone.end() - 1}, 3);
        const float highest = *std::max_element(next.begin(), next.end());
        double sum = 0;
        for (const float x : next) sum += std::exp(double(x) - highest);
        // log-probabilities of some nats, in floats of 2^-24 relative: 1e-6; 1e-5 is ten times that
        CHECK(std::fabs(next[size_t(alone[32])] - highest - std::log(sum) - alone_logp[31]) < 1e-5);
      }
    }
  }
}

TEST_CASE("q8_0 stays close to the f32 model of its weights, and reads as its blocks") {
  for (const Family family : kFamilies) {
    for (const bool tied : {false, true}) {
      const Config c = small_config(family, tied);
      const auto types = all_matrices(c, WeightType::q8_0);
      const auto gpt = random_model(c, types), expected = random_model(c, types, true);
      const auto tokens = random_tokens(c, 70);
      const auto a = scores(*gpt, tokens, {0, 70}), b = scores(*expected, tokens, {0, 70});
      // Only activations are rounded further, each by up to 1/254 of its block's largest, about .4
      // % of their norm, in nine products one after the other: .4 to 1.2 % of the logits, which are
      // of size 1 beside log-probabilities of 5. A wrong block or scale errs by all of that.
      CHECK(rel_error(a, b) < 1.2e-2);
      CHECK(rel_error(a, b) > 1e-6);  // they are rounded
      for (size_t i = 0; i < types.size(); i++) {
        const auto size = size_t(gpt->table().tensors[i].size());
        std::vector<float> x(size), y(size);
        gpt->read(int(i), Slot::weight, x), expected->read(int(i), Slot::weight, y);
        CHECK(x == y);
      }
    }
  }
}

TEST_CASE("blocks of q8_0 go in as they are, where floats would be quantized again") {
  const Config c = small_config(Family::llama, true);
  const auto gpt = random_model(c, all_matrices(c, WeightType::q8_0));
  for (const char* name : {"wte", "blocks.1.k.weight", "blocks.0.down.weight"}) {
    const int i = gpt->table().find(name);
    const Tensor& t = gpt->table().tensors[size_t(i)];
    std::vector<Q8Block> blocks(size_t(t.size() / kQ8Block));
    Rng rng{9};
    std::vector<float> expected(size_t(t.size())), values(expected.size());
    for (size_t b = 0; b < blocks.size(); b++) {
      blocks[b].d = float_to_f16(float(rng.uniform()));
      // none reaches 127, so that quantizing the floats would choose another scale
      for (int8_t& q : blocks[b].q) q = int8_t(int(rng.below(200)) - 128);
      dequantize_q8_0(blocks[b], &expected[b * kQ8Block]);
    }
    std::vector<float> before(size_t(gpt->table().tensors[size_t(i + 1)].size())), after(before);
    gpt->read(i + 1, Slot::weight, before);
    gpt->write_q8_0(i, blocks);
    gpt->read(i, Slot::weight, values);
    CHECK(values == expected);
    gpt->read(i + 1, Slot::weight, after);
    CHECK(after == before);
    blocks.pop_back();
    CHECK(
        contains(error_of([&] { gpt->write_q8_0(i, blocks); }),
                 concat(name, ": found ", blocks.size(), " blocks, expected ", blocks.size() + 1)));
  }
  const auto f32 = random_model(c, {});
  CHECK(contains(error_of([&] { f32->write_q8_0(0, {}); }), "wte: found blocks of q8_0"));
}

TEST_CASE("numbers that are not finite never become numbers") {
  for (const WeightType type : {WeightType::bf16, WeightType::f16, WeightType::q8_0}) {
    const Config c = small_config(Family::llama, true);
    const auto gpt = random_model(c, all_matrices(c, type));
    const int down = gpt->table().find("blocks.0.down.weight");
    std::vector<float> w(size_t(gpt->table().tensors[size_t(down)].size()));
    w[5] = NAN;
    if (type == WeightType::q8_0) {
      CHECK(contains(error_of([&] { gpt->write(down, Slot::weight, w); }),
                     "blocks.0.down.weight: found a weight that is not finite"));
    } else {
      gpt->write(down, Slot::weight, w);
      CHECK(contains(error_of([&] { decoded(*gpt, {1, 2, 3}, 1); }), "not finite"));
    }
    // Activations that overflow: a norm's weight of 3e38.
    const auto other = random_model(c, all_matrices(c, type));
    const int norm = other->table().find("blocks.0.norm1.weight");
    other->write(norm, Slot::weight, std::vector<float>(size_t(c.C), 3e38f));
    for (const int step : {1, 3}) {
      CHECK(contains(error_of([&] { decoded(*other, {1, 2, 3}, step); }), "not finite"));
    }
    for (const float x : scores(*other, {1, 2, 3}, {0, 3})) CHECK(std::isnan(x));
  }
}

TEST_CASE("adapters stay f32 beside smaller weights, and a shared model reads the same ones") {
  const Config c = small_config(Family::llama, false);
  const Lora lora{.rank = 4, .alpha = 8};
  for (const WeightType type : {WeightType::bf16, WeightType::q8_0}) {
    const auto types = all_matrices(c, type, lora);
    GptOptions options{.device = Device::cpu, .mode = Mode::inference, .lora = lora};
    const auto f32 = make_gpt(c, options);
    options.weights = types;
    const auto gpt = make_gpt(c, options);
    const auto& tensors = gpt->table().tensors;
    for (size_t i = 0; i < tensors.size(); i++) {
      const auto values = random_values(tensors[i]);
      gpt->write(int(i), Slot::weight, values);
      f32->write(int(i), Slot::weight, rounded(values, types[i]));
      std::vector<float> out(values.size());
      gpt->read(int(i), Slot::weight, out);
      CHECK(out == rounded(values, types[i]));
      if (tensors[i].kind == Kind::adapter) CHECK(out == values);
    }
    const auto tokens = random_tokens(c, 40);
    const auto a = scores(*gpt, tokens, {0, 40}), b = scores(*f32, tokens, {0, 40});
    if (type == WeightType::bf16) CHECK(a == b);
    CHECK(rel_error(a, b) < 1.2e-2);  // as above
    options.share = gpt.get();
    const auto shared = make_gpt(c, options);
    CHECK(scores(*shared, tokens, {0, 40}) == a);
    options.weights = all_matrices(c, WeightType::f16, lora);
    CHECK(contains(error_of([&] { make_gpt(c, options); }), "share: "));
  }
}

TEST_CASE("the plan counts each type's bytes, and training's types are all f32") {
  Config c = small_config(Family::llama, true);
  const auto plan = [&](WeightType type) {
    return plan_memory(
        c, {.device = Device::cpu, .mode = Mode::inference, .weights = all_matrices(c, type)});
  };
  const ParamTable table = make_table(c);
  int64_t matrices = 0;
  for (const Tensor& t : table.tensors) matrices += is_matrix(table, t) ? t.size() : 0;
  const double bytes[] = {4, 2, 2, 34. / 32};
  for (const WeightType type : {WeightType::f16, WeightType::bf16, WeightType::q8_0}) {
    const MemoryPlan p = plan(type);
    REQUIRE(p.items.size() == 2);
    CHECK(contains(p.text(), concat("weights ", kWeightTypeNames[int(type)], " ")));
    CHECK(contains(p.text(), ", f32 "));
    // the vocabulary and each group are padded to whole panels
    CHECK(double(p.items[0].bytes) >= double(matrices) * bytes[int(type)]);
    CHECK(double(p.items[0].bytes) < double(matrices) * bytes[int(type)] * 1.3);
    CHECK(p.items[1].bytes == int64_t(2 * c.L + 1) * c.C * 4);
  }
  CHECK(plan(WeightType::f32).items.size() == 1);
}

TEST_CASE("types that make no sense are refused by the tensor's name") {
  const Config c = small_config(Family::qwen3, true);
  const ParamTable table = make_table(c);
  const auto error = [&](const Config& config, std::vector<WeightType> types,
                         Mode mode = Mode::inference) {
    const GptOptions options{.device = Device::cpu, .mode = mode, .weights = std::move(types)};
    const std::string text = error_of([&] { make_gpt(config, options); });
    CHECK(error_of([&] { plan_memory(config, options); }) == text);
    return text;
  };
  CHECK(error(c, {}) == "no error");
  CHECK(error(c, all_matrices(c, WeightType::f32), Mode::train) == "no error");
  CHECK(contains(error(c, all_matrices(c, WeightType::bf16), Mode::train),
                 "wte: found type bf16, expected f32 in a model that trains"));
  CHECK(contains(error(c, {WeightType::f32}), "weights: found 1 types, expected one for each of"));
  const auto with = [&](const char* name, WeightType type) {
    std::vector<WeightType> types(table.tensors.size(), WeightType::f32);
    types[size_t(table.find(name))] = type;
    return error(c, types);
  };
  CHECK(with("wte", WeightType::bf16) == "no error");
  CHECK(with("blocks.1.down.weight", WeightType::q8_0) == "no error");
  for (const char* name : {"final_norm.weight", "blocks.0.q_norm.weight"})
    CHECK(contains(with(name, WeightType::bf16), concat(name, ": found type bf16, expected f32")));
  CHECK(contains(with("blocks.1.k.weight", WeightType::q8_0),
                 "blocks.1.k.weight: found type q8_0, expected f32 as the matrices"));
  CHECK(contains(with("blocks.0.gate.weight", WeightType::f16), "blocks.0.up.weight: found type"));
  Config odd = c;
  odd.F = 152;
  auto types = all_matrices(odd, WeightType::q8_0);
  CHECK(contains(error(odd, types),
                 "blocks.0.down.weight: found rows of 152 as q8_0, expected a multiple of 32"));
  Config scalar = c;
  scalar.head = Head::scalar;
  types = all_matrices(scalar, WeightType::bf16);
  CHECK(error(scalar, types) == "no error");
  types[size_t(make_table(scalar).find("score"))] = WeightType::bf16;
  CHECK(contains(error(scalar, types), "score: found type bf16, expected f32"));
}

TEST_CASE("a reward model scores with smaller weights") {
  Config c = small_config(Family::llama, false);
  c.head = Head::scalar;
  const auto types = all_matrices(c, WeightType::bf16);
  const auto gpt = random_model(c, types), expected = random_model(c, types, true);
  const auto tokens = random_tokens(c, 20);
  const std::vector<int> targets(20, -1), starts = {0, 20};
  for (Gpt* g : {gpt.get(), expected.get()}) g->forward({tokens, targets, starts}, Pass::score);
  CHECK(copy(gpt->value()) == copy(expected->value()));
}
