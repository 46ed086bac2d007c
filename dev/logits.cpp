// What a model computes, as numbers: for comparisons with other programs (dev/interop/).
//
//     build/logits MODEL [--weights auto|f32|bf16|q8_0] < requests.jsonl > answers.jsonl
//
// A request is a line of JSON:
//
//     {"text": "...", "special": true}   or   {"ids": [504, 3575]}
//     "logp": true      the log-probability of each id but the first, given those before it
//     "last": true      the logits behind the last id
//     "greedy": 40      the ids of the most likely continuation, at most so many, with the margins
//                       between the two best logits; it stops behind a token that ends a text
//     "decode": 64      tokens a second of decoding one row behind the ids
//
// The answer has "ids" (with "special", names of special tokens in the text are these tokens), and
// what was asked for. log-probabilities come from the forward pass that scores, "last" and "greedy"
// from decoding with a cache.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/config.h"
#include "cake/flags.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/packed.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {
namespace {

struct LogitsOptions {
  std::string model, input, device = "cpu", weights = "f32", cache_type = "f32";
  int threads = 0;
};

double rounded(double x) { return std::strtod(format("%.9g", x).c_str(), nullptr); }
OrderedJson number_list(std::span<const float> numbers) {
  OrderedJson list = OrderedJson::array();
  for (const float x : numbers) list.push_back(rounded(double(x)));
  return list;
}

// The log-probabilities of ids[1:].
std::vector<float> score(Gpt& gpt, std::span<const int> ids) {
  Packed packed;
  packed.add(0, ids, ids.size() - 1, [](size_t) { return true; });
  gpt.forward(packed.batch(), Pass::score);
  const std::span<const float> logp = gpt.logp();
  return {logp.begin(), logp.end()};
}

// One sequence that is decoded, the most likely token after each.
class Decoder {
 public:
  Decoder(Gpt& gpt, int64_t positions, CacheType cache)
      : gpt_(gpt), cache_(gpt.make_cache(positions, cache)), sequence_(cache_->create()) {}
  int feed(std::span<const int> ids, bool logits) {
    const DecodeRow row{.sequence = sequence_, .tokens = ids, .sampling = {.temperature = 0}};
    gpt_.decode(*cache_, std::span(&row, 1), result_, logits);
    return result_.ids[0];
  }
  std::span<const float> logits() const {  // (V), of the last call to feed
    return std::span(result_.logits).first(size_t(gpt_.config().V));
  }
  float margin() const {
    float first = -INFINITY, second = -INFINITY;
    for (const float x : logits()) {
      second = std::max(second, std::min(first, x));
      first = std::max(first, x);
    }
    return first - second;
  }

 private:
  Gpt& gpt_;
  std::unique_ptr<KvCache> cache_;
  int sequence_;
  DecodeResult result_;
};

OrderedJson answer(Gpt& gpt, const Tokenizer* tokenizer, std::span<const int> end_tokens,
                   CacheType cache, const Json& request) {
  std::vector<int> ids = request.value("ids", std::vector<int>());
  if (request.contains("text")) {
    require(tokenizer != nullptr, "text: found a model without a tokenizer, expected ids");
    ids = tokenizer->encode(request["text"].get<std::string>(), request.value("special", false));
  }
  OrderedJson out{{"ids", ids}};
  if (request.value("logp", false)) {
    out["logp"] = number_list(ids.size() < 2 ? std::vector<float>() : score(gpt, ids));
  }
  const int greedy = request.value("greedy", 0), timed = request.value("decode", 0);
  if (request.value("last", false) || greedy > 0) {
    Decoder decoder(gpt, int64_t(ids.size()) + greedy, cache);
    int id = decoder.feed(ids, true);
    if (request.value("last", false)) out["last"] = number_list(decoder.logits());
    std::vector<int> continuation;
    std::vector<float> margins;
    while (int(continuation.size()) < greedy) {
      continuation.push_back(id);
      margins.push_back(decoder.margin());
      const bool ends = std::find(end_tokens.begin(), end_tokens.end(), id) != end_tokens.end();
      if (ends || int(continuation.size()) == greedy) break;
      id = decoder.feed(std::span(&id, 1), true);
    }
    if (greedy > 0) {
      out["greedy"] = continuation;
      out["margins"] = number_list(margins);
      if (tokenizer) out["greedy_text"] = tokenizer->decode(continuation);
    }
  }
  if (timed > 0) {
    constexpr int kWarmUp = 16;
    Decoder decoder(gpt, int64_t(ids.size()) + kWarmUp + timed, cache);
    decoder.feed(ids, false);
    const int id = ids.back();
    for (int i = 0; i < kWarmUp; i++) decoder.feed(std::span(&id, 1), false);
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < timed; i++) decoder.feed(std::span(&id, 1), false);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    out["tokens_per_second"] = timed / seconds.count();
  }
  return out;
}

void answer_all(const LogitsOptions& o) {
  const std::filesystem::path dir = model_dir(o.model);
  const Config config = load_config_with_head(dir, Head::lm);
  set_threads(o.threads);
  require(o.cache_type == "f32" || o.cache_type == "bf16", "--cache-type: found ", o.cache_type,
          ", expected f32 or bf16");
  const CacheType cache = o.cache_type == "bf16" ? CacheType::bf16 : CacheType::f32;
  const auto gpt =
      make_gpt(config, {.device = parse_device(o.device),
                        .mode = Mode::inference,
                        .weights = weight_types(dir, config, make_table(config), o.weights)});
  load_weights(dir, *gpt);
  std::unique_ptr<Tokenizer> tokenizer;
  if (std::filesystem::is_regular_file(dir) || std::filesystem::exists(dir / "tokenizer.json")) {
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(dir));
  }
  std::vector<int> ends = config.end_tokens;
  if (ends.empty() && config.eos >= 0) ends.push_back(config.eos);
  std::ifstream file;
  if (!o.input.empty()) {
    file.open(o.input);
    require(file.good(), o.input, ": cannot read");
  }
  std::istream& in = o.input.empty() ? std::cin : file;
  int number = 0;
  for (std::string line; std::getline(in, line);) {
    const std::string where = concat(o.input.empty() ? "standard input" : o.input, ":", ++number);
    Json request;
    try {
      request = Json::parse(line);
    } catch (const Json::exception& e) {
      fail(where, ": ", e.what());
    }
    std::printf("%s", json_line(answer(*gpt, tokenizer.get(), ends, cache, request)).c_str());
    std::fflush(stdout);
  }
}

int logits_main(int argc, char** argv) {
  CLI::App app("What a model computes, as numbers: JSON lines in, JSON lines out.");
  app.option_defaults()->always_capture_default();
  LogitsOptions o;
  app.add_option("model", o.model, "model directory, or .gguf file")->required();
  app.add_option("--input", o.input, "file of requests, JSON lines; empty: standard input");
  app.add_option("--device", o.device, "auto, cpu or cuda");
  app.add_option("--weights", o.weights, "auto, f32, bf16 or q8_0: how matrices are kept");
  app.add_option("--cache-type", o.cache_type, "f32 or bf16: how keys and values are kept");
  app.add_option("--threads", o.threads, "CPU threads; 0: one for each physical core");
  if (!parse_flags(app, argc, argv, {})) return 0;
  answer_all(o);
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::logits_main(argc, argv); });
}
