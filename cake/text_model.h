// A model that writes text: its files, its tokenizer, its engine and its chat template. What
// `./chat` and `./serve` share.
//
//     ModelOptions -> open_model -> TextModel -> load_engine -> Gpt
//     Conversation -> render -> ids, which follow the model's chat template
//
// Ours is ChatML (cake/chat_template.h). Two others are known, and a base model has none.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/generate.h"
#include "cake/gpt.h"
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
};

inline void add_stop_id(std::vector<int>& ids, int id) {
  if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
}

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
// Chat templates: how a conversation becomes ids. Ours is ChatML (render_chat). Two others are
// known.

enum class Template {
  chatml,    // <|im_start|>user\n...<|im_end|>\n
  llama3,    // <|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>
  plain,     // User: ...\nAssistant: ...\n\n
  document,  // none: messages are plain text, and a base model continues it
};

struct TemplateRules {
  std::vector<int> stop_ids;
  std::vector<std::string> stop_strings;
  std::vector<int> closing;  // ids between the end of an answer and the next turn
  int end_of_turn = -1;      // the id that ends a turn, -1 for none
};

inline Template find_template(const TextModel& m, const std::string& name) {
  if (name == "chatml") return Template::chatml;
  if (name == "llama3") return Template::llama3;
  if (name == "plain") return Template::plain;
  require(name == "auto", "--template: found ", name, ", expected auto, chatml, llama3 or plain");
  const std::string text = chat_template(m.dir);
  // Known by the tokens that mark turns: templates of one kind differ in their default system
  // message.
  if (text.find("<|im_start|>") != std::string::npos) return Template::chatml;
  if (text.find("<|start_header_id|>") != std::string::npos) return Template::llama3;
  fail(
      m.dir.string(), ": found ", text.empty() ? "no chat template" : "an unknown chat template",
      ", expected ChatML (<|im_start|>), Llama 3 (<|start_header_id|>) or plain; --template names ",
      "one, --base talks to a base model");
}

inline TemplateRules template_rules(const TextModel& m, Template t) {
  TemplateRules rules{.stop_ids = m.stop_ids};
  const auto need = [&](const char* name) {
    const int id = m.tokenizer.special(name);
    if (id < 0) {
      fail(m.dir.string(), ": found no token ", name,
           " in the tokenizer, expected it for --template ",
           t == Template::llama3 ? "llama3" : "chatml");
    }
    return id;
  };
  if (t == Template::chatml) {
    need("<|im_start|>");
    rules.end_of_turn = need("<|im_end|>");
    rules.closing = m.tokenizer.encode("\n");
  } else if (t == Template::llama3) {
    need("<|start_header_id|>"), need("<|end_header_id|>");
    rules.end_of_turn = need("<|eot_id|>");
  } else if (t == Template::plain) {
    rules.stop_strings = {"\nUser:"};
    rules.closing = m.tokenizer.encode("\n\n");
  }
  add_stop_id(rules.stop_ids, rules.end_of_turn);
  return rules;
}

// The ids of whole turns. `begins`: they are the first ones of a conversation. `answer`: the header
// of the assistant's next turn follows.
inline std::vector<int> render(const TextModel& m, Template t, const Conversation& c, bool begins,
                               bool answer) {
  if (t == Template::chatml) return render_chat(m.tokenizer, c, answer).ids;
  std::vector<int> ids;
  const Tokenizer& tokenizer = m.tokenizer;
  if (!c.tools.empty())
    fail("--template: found tools, expected chatml for a model that calls them");
  if (t == Template::llama3) {
    const auto special = [&](const char* name) {
      if (const int id = tokenizer.special(name); id >= 0) ids.push_back(id);
    };
    const auto header = [&](const std::string& role) {
      special("<|start_header_id|>");
      tokenizer.encode(role, ids);
      special("<|end_header_id|>");
    };
    if (begins) special("<|begin_of_text|>");
    for (const Message& message : c.messages) {
      header(message.role);
      tokenizer.encode(concat("\n\n", strip(message.content)), ids);
      special("<|eot_id|>");
    }
    if (answer) header("assistant"), tokenizer.encode("\n\n", ids);
    return ids;
  }
  if (begins && m.document_start >= 0) ids.push_back(m.document_start);
  std::string text;
  for (const Message& message : c.messages) {
    if (t == Template::document) {
      text += message.content;
    } else if (message.role == "system") {
      text += message.content + "\n\n";
    } else {
      text += (message.role == "user" ? "User: " : "Assistant: ") + message.content;
      text += message.role == "user" ? "\n" : "\n\n";
    }
  }
  if (answer && t == Template::plain) text += "Assistant:";
  tokenizer.encode(text, ids);
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
