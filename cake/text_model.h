// A model that writes text: its files, its tokenizer, its engine and its chat template. What
// `./chat` and `./serve` share.
//
//     ModelOptions -> open_model -> TextModel -> load_engine -> Gpt
//     use_template: a conversation's ids follow TextModel::chat; a base model has none
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/generate.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/run.h"
#include "cake/tokenizer.h"
#include "cake/tools.h"

namespace cake {

// Error unless `good`, for the value of a flag.
inline void need(bool good, const std::string& flag, const auto& found, const char* expected) {
  if (!good) fail(flag, ": found ", found, ", expected ", expected);
}

// ---------------------------------------------------------------------------------------------
// A model with its tokenizer

struct ModelOptions {
  std::string path;  // a model directory, a .gguf file, or the directory of a run
  std::string device = "auto";
  int threads = 0;      // 0: one for each physical core that the process may use
  int64_t context = 0;  // the longest text in tokens; 0: choose_context()
  std::string cache_type = "auto", weights = "auto";
};

struct TextModel {
  std::filesystem::path dir;
  Config config;
  Tokenizer tokenizer;
  std::unique_ptr<Gpt> gpt;   // null: without its weights
  int document_start = -1;    // the id that documents begin with, -1 for none
  std::vector<int> stop_ids;  // ids that end a document
  // Of use_template. nullopt: a base model, which continues documents.
  std::optional<ChatTemplate> chat;
  std::vector<int> turn_stop_ids;              // ids that end an answer: stop_ids, the end of turn
  std::vector<std::string> turn_stop_strings;  // texts that end it, where there is no such id
};

inline void add_stop_id(std::vector<int>& ids, int id) {
  if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
}

// From now on the conversations of `m` are rendered by `chat`; nullopt: it is a base model.
inline void use_template(TextModel& m, std::optional<ChatTemplate> chat);

inline TextModel open_model(const ModelOptions& options) {
  const std::filesystem::path dir = model_dir(options.path);
  TextModel m{.dir = dir,
              .config = load_config_with_head(dir, Head::lm),
              .tokenizer = Tokenizer::load(dir)};
  require(m.tokenizer.vocab_size() <= m.config.V, dir.string(), ": found a tokenizer of ",
          m.tokenizer.vocab_size(), " tokens, expected at most vocab_size ", m.config.V);
  const int separator = m.tokenizer.find_document_separator();
  m.document_start = separator >= 0 ? separator : m.config.bos;
  m.stop_ids = m.config.all_end_tokens();
  add_stop_id(m.stop_ids, separator);
  use_template(m, std::nullopt);
  return m;
}

// The engine's options, for scoring `batch_tokens` at a time (0: none) and for decoding.
inline GptOptions engine_options(const TextModel& m, const ModelOptions& o, int batch_tokens,
                                 DecodePlan decode) {
  decode.cache = parse_cache_type(o.cache_type);
  GptOptions options{.device = parse_device(o.device),
                     .mode = Mode::inference,
                     .batch_tokens = batch_tokens,
                     .decode = decode};
  options.weights = weight_types(m.dir, m.config, make_table(m.config), o.weights);
  if (find_device(options.device) == Device::cuda) {  // one type for all: that of the products
    require(o.weights != "q8_0", "--weights q8_0: the CUDA engine has no such products, expected ",
            "auto, f32, bf16 or --device cpu");
    options.weights.clear();
    if (o.weights != "auto") options.precision = parse_precision(o.weights);
  }
  return options;
}

inline void load_engine(TextModel& m, const ModelOptions& o, const GptOptions& options) {
  set_threads(o.threads);
  m.gpt = make_gpt(m.config, options);
  load_weights(m.dir, *m.gpt, {.interruptible = true});
}

// Sets how long sequences may be and how far the cache may grow, for sequences of up to `longest`
// tokens. `cache_mb`: of the cache, unless one sequence needs more.
inline void limit_cache(GeneratorOptions& g, const Config& c, int64_t longest, int cache_mb,
                        const GptOptions& options) {
  const int64_t bytes = std::min(int64_t(cache_mb) << 20, memory_beside_model(c, options) / 4);
  g.cache_type = options.decode.cache;
  g.cache_positions = cache_positions(g.rows, std::min<int64_t>(longest, g.context), bytes,
                                      cache_page_bytes(c, options));
}

// ---------------------------------------------------------------------------------------------
// The chat template of a model

struct TemplateFlags {
  std::string choice = "auto";      // of --template: auto, chatml, plain or a file
  std::vector<std::string> values;  // of --template-set, each NAME=JSON
  std::string date;                 // of --date, YYYY-MM-DD; empty: today
};

inline void use_template(TextModel& m, std::optional<ChatTemplate> chat) {
  m.chat = std::move(chat);
  m.turn_stop_ids = m.stop_ids;
  m.turn_stop_strings.clear();
  if (!m.chat) return;
  add_stop_id(m.turn_stop_ids, m.chat->find_end_of_turn());
  if (!m.chat->stop_string().empty()) m.turn_stop_strings = {m.chat->stop_string()};
}

// Throws Error where a value is not NAME=JSON, or where a name is given twice.
inline TemplateOptions template_options(const TemplateFlags& flags) {
  TemplateOptions options{.date = flags.date};
  need(flags.date.empty() || is_date(flags.date), "--date", flags.date, "YYYY-MM-DD");
  for (const std::string& value : flags.values) {
    const size_t equals = value.find('=');
    need(equals != std::string::npos && equals > 0, "--template-set", value, "NAME=JSON");
    const std::string name = value.substr(0, equals);
    need(!options.variables.contains(name), "--template-set", name + " twice", "it once");
    options.variables[name] =
        parse_json<OrderedJson>(value.substr(equals + 1), "--template-set " + name);
  }
  return options;
}

// The template that --template names, for conversations of `m`. Throws Error where the model has
// none of its own, or where its tokenizer lacks the tokens of the one that is named.
inline ChatTemplate find_template(const TextModel& m, const TemplateFlags& flags) {
  const bool has_none = flags.choice == "auto" && chat_template(m.dir).empty();
  require(!has_none, m.dir.string(), ": found no chat template, expected one; --template names ",
          "one, --base talks to a base model");
  return open_chat_template(m.tokenizer, m.dir, flags.choice, template_options(flags));
}

// The ids of a text that begins a document.
inline std::vector<int> document_ids(const TextModel& m, std::string_view text) {
  std::vector<int> ids;
  if (m.document_start >= 0) ids.push_back(m.document_start);
  m.tokenizer.encode(text, ids);
  return ids;
}

inline std::optional<Search> load_documents(const std::string& path, const Tokenizer& tokenizer) {
  if (path.empty()) return std::nullopt;
  return Search::load(path,
                      [&](std::string_view text) { return int(tokenizer.encode(text).size()); });
}

// ---------------------------------------------------------------------------------------------
// Flags

inline void add_engine_flags(CLI::App& app, ModelOptions& o) {
  app.add_option("--device", o.device, "auto, cpu or cuda");
  app.add_option("--threads", o.threads, "CPU threads; 0: one for each physical core");
  app.add_option("--context", o.context,
                 "longest text in tokens, its prompt included; 0: the model's context, or what a "
                 "quarter of the free memory holds");
  app.add_option("--cache-type", o.cache_type,
                 "of keys and values: f32, bf16 (half the memory), or auto: f32 on the CPU, as the "
                 "engine computes on CUDA");
  app.add_option("--weights", o.weights,
                 "how matrices are kept: f32, bf16 (half the memory), q8_0 (a quarter; CPU alone), "
                 "or auto: as a .gguf file has them, otherwise f32; on CUDA auto is bf16");
}

inline void add_model_flags(CLI::App& app, ModelOptions& o) {
  app.add_option("model", o.path, "model directory, .gguf file, or the directory of a run")
      ->required();
  add_engine_flags(app, o);
}

// `more`: what --template may be beside what all commands know.
inline void add_template_flags(CLI::App& app, TemplateFlags& t, const std::string& more = "") {
  app.add_option("--template", t.choice,
                 "chat template: chatml; plain (User: ..., Assistant: ...); a file with Jinja; " +
                     more + "or auto: the model's own");
  app.add_option("--template-set", t.values,
                 "NAME=JSON, a variable of the template, as enable_thinking=false; may be given "
                 "several times")
      ->allow_extra_args(false);
  app.add_option("--date", t.date, "YYYY-MM-DD, for templates that say the date; empty: today");
}

inline void add_sampling_flags(CLI::App& app, Sampling& s) {
  app.add_option("--temperature", s.temperature, "of sampling; 0: always the most likely token");
  app.add_option("--top-k", s.top_k, "sample among the K most likely tokens; 0: among all");
  app.add_option("--top-p", s.top_p,
                 "sample among the most likely tokens whose probabilities sum to P; 1: among all");
  app.add_option("--min-p", s.min_p,
                 "sample among tokens at least P times as likely as the most likely; 0: among all");
  app.add_option("--repetition-penalty", s.repetition_penalty,
                 "above 1: tokens that the text contains already become less likely");
  app.add_option("--seed", s.seed, "of the random numbers: the same seed gives the same texts");
}

inline void add_batch_flags(CLI::App& app, int& rows, int& cache_mb) {
  app.add_option("--rows", rows, "texts that are generated together, at most");
  app.add_option("--cache-mb", cache_mb,
                 "memory for keys and values, in MiB; more if one text needs more");
}

inline void check_model_options(const ModelOptions& model, const Sampling& s) {
  need(model.threads >= 0 && model.threads <= 4096, "--threads", model.threads,
       "1 to 4096, or 0 for all cores");
  need(s.temperature >= 0 && s.temperature <= 100, "--temperature", s.temperature, "0 to 100");
  need(s.top_k >= 0, "--top-k", s.top_k, "0 (all) or more");
  need(s.top_p > 0 && s.top_p <= 1, "--top-p", s.top_p, "above 0, at most 1");
  need(s.min_p >= 0 && s.min_p <= 1, "--min-p", s.min_p, "0 to 1");
  need(s.repetition_penalty > 0 && s.repetition_penalty <= 100, "--repetition-penalty",
       s.repetition_penalty, "above 0, at most 100");
}

}  // namespace cake
