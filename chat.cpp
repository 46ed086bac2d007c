// Stage 5: talk to a model.
//
//     ./chat generate DIR --prompt "Once upon a time"
//
// A prompt becomes token ids, as every document of the training data did: first <|endoftext|>, then
// the text. The generator (cake/generate.h) feeds them to the engine and samples one token after
// another; each token is bytes again, printed as soon as they make whole characters:
//
//     prompts -> Tokenizer::encode -> Generator -> Gpt::decode -> Tokenizer::token_bytes -> text
//
// One prompt streams to the terminal. Many, from a file or as several samples of one, run side by
// side and come out in their order, as text or as JSONL.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/generate.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// Standard output. Who reads it may stop reading (`./chat generate ... | head`): that is no error.

struct BrokenPipe {};

void print(std::string_view text) {
  const bool good = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (good && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw BrokenPipe{};
  fail("standard output: cannot write: ", errno_text());
}

// ---------------------------------------------------------------------------------------------
// A model with its tokenizer

struct ModelOptions {
  std::string path;  // a model directory, or a run's
  std::string device = "auto";
  int threads = 0;  // 0: the physical cores that the process may use
};

struct Model {
  std::filesystem::path dir;
  Tokenizer tokenizer;
  std::unique_ptr<Gpt> gpt;
  int document_start = -1;    // the id that documents begin with, -1 for none
  std::vector<int> stop_ids;  // that end a document
};

Model load_model(const ModelOptions& options, int batch_tokens) {
  const std::filesystem::path dir = model_dir(options.path);
  const Config config = load_config(dir);
  if (config.head != Head::lm) {
    fail((dir / "config.json").string(), ": architectures: found ", architecture_name(config),
         ", expected a language model");
  }
  Model m{.dir = dir, .tokenizer = Tokenizer::load(dir)};
  if (m.tokenizer.vocab_size() > config.V) {
    fail(dir.string(), ": found a tokenizer of ", m.tokenizer.vocab_size(),
         " tokens, expected at most vocab_size ", config.V);
  }
  set_threads(options.threads);
  m.gpt = make_gpt(config, {.device = parse_device(options.device),
                            .mode = Mode::inference,
                            .batch_tokens = batch_tokens});
  load_weights(dir, *m.gpt);
  const int end_of_text = m.tokenizer.special("<|endoftext|>");
  m.document_start = end_of_text >= 0 ? end_of_text : config.bos;
  for (const int id : {end_of_text, config.eos}) {
    if (id >= 0) m.stop_ids.push_back(id);
  }
  return m;
}

// ---------------------------------------------------------------------------------------------
// generate

struct GenerateOptions {
  ModelOptions model;
  std::string prompt, prompts, output;  // prompts: a file; output: a file, empty for none
  int tokens = 256, samples = 1, rows = 64, cache_mb = 2048;
  Sampling sampling{.temperature = .8f};
  std::vector<std::string> stop;
  bool stats = false;
};

void check(const GenerateOptions& o) {
  const auto need = [](bool good, const char* flag, auto found, const char* expected) {
    if (!good) fail(flag, ": found ", found, ", expected ", expected);
  };
  const Sampling& s = o.sampling;
  need(o.tokens >= 1, "--tokens", o.tokens, "at least 1");
  need(o.samples >= 1, "--samples", o.samples, "at least 1");
  need(o.rows >= 1 && o.rows <= 4096, "--rows", o.rows, "1 to 4096");
  need(o.cache_mb >= 1, "--cache-mb", o.cache_mb, "at least 1");
  need(o.model.threads >= 0 && o.model.threads <= 4096, "--threads", o.model.threads,
       "1 to 4096, or 0 for all cores");
  need(s.temperature >= 0 && s.temperature <= 100, "--temperature", s.temperature, "0 to 100");
  need(s.top_k >= 0, "--top-k", s.top_k, "0 (all) or more");
  need(s.top_p > 0 && s.top_p <= 1, "--top-p", s.top_p, "above 0, at most 1");
  need(s.min_p >= 0 && s.min_p <= 1, "--min-p", s.min_p, "0 to 1");
  need(s.repetition_penalty > 0 && s.repetition_penalty <= 100, "--repetition-penalty",
       s.repetition_penalty, "above 0, at most 100");
  for (const std::string& stop : o.stop) need(!stop.empty(), "--stop", "\"\"", "some text");
}

struct Prompt {
  std::string where;  // the flag, or file and line: for messages
  std::string text;
};

// A line of text each, or, in a .jsonl file, an object with "prompt" each.
std::vector<Prompt> read_prompts(const std::string& path) {
  const Input input(path);
  std::vector<Prompt> prompts;
  if (DocumentReader::is_jsonl(input, {})) {
    JsonLines lines(input);
    for (simdjson::dom::object object; lines.next(object);) {
      prompts.push_back({lines.where(), std::string(lines.get_string(object, "prompt"))});
    }
  } else {
    LineReader lines(input);
    for (std::string_view line; lines.next(line);) {
      if (line.ends_with('\r')) line.remove_suffix(1);
      prompts.push_back({lines.where(), std::string(line)});
    }
  }
  if (prompts.empty()) fail(input.name, ": found no prompt, expected one a line");
  return prompts;
}

std::vector<int> encode_prompt(const Model& m, const Prompt& p) {
  std::vector<int> ids;
  if (m.document_start >= 0) ids.push_back(m.document_start);
  m.tokenizer.encode(p.text, ids);
  const int T = m.gpt->config().T;
  if (ids.empty()) {
    fail(p.where, ": found an empty prompt, expected text: the tokenizer of ", m.dir.string(),
         " has no <|endoftext|> to begin a document with");
  }
  if (int64_t(ids.size()) > T - 1) {
    fail(p.where, ": found ", ids.size(), " tokens, expected at most ", T - 1,
         ", since the model's context is ", T);
  }
  return ids;
}

std::string result_line(const Prompt& prompt, const Completion& c) {
  OrderedJson logp = OrderedJson::array();
  for (const float x : c.logp) logp.push_back(std::strtod(format("%.9g", double(x)).c_str(), {}));
  const OrderedJson json{{"prompt", prompt.text},
                         {"completion", c.text},
                         {"tokens", c.ids},
                         {"logp", logp},
                         {"finish", finish_name(c.finish)}};
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
}

void print_stats(const GeneratorStats& s) {
  const auto rate = [](int64_t n, double seconds) { return seconds > 0 ? double(n) / seconds : 0; };
  std::fprintf(stderr, "prompt  %lld tokens, %.1f tokens/s%s\n", (long long)s.prompt_tokens,
               rate(s.prompt_tokens, s.prompt_seconds),
               s.reused_tokens ? concat("; ", s.reused_tokens, " reused").c_str() : "");
  std::fprintf(stderr, "decode  %lld tokens, %.1f tokens/s\n", (long long)s.new_tokens,
               rate(s.new_tokens, s.decode_seconds));
}

// Runs until everything is done or a signal asks to stop; `after_step` prints what there is.
// Returns the exit status.
template <class AfterStep>
int run(Generator& generator, AfterStep&& after_step) {
  while (stop_signal == 0 && generator.step()) after_step();
  return stop_signal == 0 ? 0 : 128 + stop_signal;
}

// One prompt: the text as it comes.
int stream(Generator& generator, Request request, const Prompt& prompt, int T) {
  const bool terminal = isatty(STDOUT_FILENO);
  print(terminal && !prompt.text.empty() ? "\033[1m" + prompt.text + "\033[0m" : prompt.text);
  bool line_open = !prompt.text.empty() && prompt.text.back() != '\n';
  request.on_token = [&](const Token& t) {
    if (t.text.empty()) return;
    print(t.text);
    line_open = t.text.back() != '\n';
  };
  const int number = generator.submit(std::move(request));
  const int status = run(generator, [] {});
  if (line_open) print("\n");
  if (status == 0 && generator.take(number).finish == Finish::context) {
    std::fprintf(stderr, "the model's context of %d tokens is full\n", T);
  }
  return status;
}

// Many: each when it and those before it are done, to the file or to standard output.
int batch(Generator& generator, const Request& settings, const std::vector<Prompt>& prompts,
          std::vector<std::vector<int>> ids, const GenerateOptions& o) {
  std::optional<AtomicFile> file;
  if (!o.output.empty()) file.emplace(o.output);
  const int total = int(prompts.size()) * o.samples;
  for (int i = 0; i < total; i++) {
    Request request = settings;
    request.prompt = ids[size_t(i / o.samples)];
    generator.submit(std::move(request));
  }
  ProgressLine progress;
  int written = 0;
  const int status = run(generator, [&] {
    for (; written < total && generator.done(written); written++) {
      const Prompt& prompt = prompts[size_t(written / o.samples)];
      const Completion c = generator.take(written);
      if (file) {
        file->write(result_line(prompt, c));
        const bool last = written + 1 == total;
        progress.show(format("%d of %d done", written + 1, total), last);
      } else {
        print(format("--- %d of %d (%s)\n", written + 1, total, finish_name(c.finish)) +
              prompt.text + c.text + "\n");
      }
    }
  });
  if (status == 0 && file) file->commit();
  if (status != 0 && file) {
    std::fprintf(stderr, "\nstopped: %s is not written\n", o.output.c_str());
  }
  return status;
}

int generate(const GenerateOptions& o) {
  check(o);
  std::vector<Prompt> prompts{{"--prompt", o.prompt}};
  if (!o.prompts.empty()) prompts = read_prompts(o.prompts);

  const int64_t total = int64_t(prompts.size()) * o.samples;
  if (total > 1 << 30) fail("--samples: found ", total, " texts to write, expected fewer");
  GeneratorOptions options{.rows = int(std::min<int64_t>(o.rows, total))};
  const Model model = load_model(o.model, std::max(options.prefill_tokens, options.rows));
  const Config& config = model.gpt->config();
  std::vector<std::vector<int>> ids;
  int64_t longest = 0;
  for (const Prompt& p : prompts) {
    ids.push_back(encode_prompt(model, p));
    longest = std::max(longest, int64_t(ids.back().size()) + o.tokens);
  }
  options.cache_positions =
      cache_positions(config, options.rows, longest, int64_t(o.cache_mb) << 20);
  Generator generator(
      *model.gpt, [&](int id) { return model.tokenizer.token_bytes(id); }, options);

  Request request{.max_new = o.tokens,
                  .sampling = o.sampling,
                  .stop_ids = model.stop_ids,
                  .stop_strings = o.stop};
  request.sampling.vocab = model.tokenizer.vocab_size();
  int status;
  if (total == 1 && o.output.empty()) {
    request.prompt = ids[0];
    status = stream(generator, std::move(request), prompts[0], config.T);
  } else {
    status = batch(generator, request, prompts, std::move(ids), o);
  }
  if (o.stats) print_stats(generator.stats());
  return status;
}

// ---------------------------------------------------------------------------------------------
// The command line

void add_model_flags(CLI::App& app, ModelOptions& o) {
  app.add_option("model", o.path, "A model directory, or the directory of a run")->required();
  app.add_option("--device", o.device, "auto, cpu or cuda")->capture_default_str();
  app.add_option("--threads", o.threads, "0: one for each physical core")->capture_default_str();
}

void add_sampling_flags(CLI::App& app, Sampling& s) {
  app.add_option("--temperature", s.temperature, "0: always the most likely token")
      ->capture_default_str();
  app.add_option("--top-k", s.top_k, "Only the K most likely tokens; 0: all")
      ->capture_default_str();
  app.add_option("--top-p", s.top_p, "Only the most likely tokens that make up P")
      ->capture_default_str();
  app.add_option("--min-p", s.min_p, "Only tokens at least P times as likely as the likeliest")
      ->capture_default_str();
  app.add_option("--repetition-penalty", s.repetition_penalty,
                 "Above 1: makes tokens that the text already has less likely")
      ->capture_default_str();
  app.add_option("--seed", s.seed, "The same seed gives the same texts")->capture_default_str();
}

int chat(int argc, char** argv) {
  CLI::App app("Talk to a model.", "chat");
  app.require_subcommand(1);

  GenerateOptions g;
  CLI::App* sub = app.add_subcommand("generate", "Continue a text, as a base model does");
  add_model_flags(*sub, g.model);
  CLI::Option* prompt =
      sub->add_option("--prompt", g.prompt, "The text to continue; none: a new document");
  sub->add_option(
         "--prompts", g.prompts,
         "A file of prompts, one a line; .jsonl: objects with \"prompt\"; -: standard input")
      ->excludes(prompt);
  sub->add_option("-o,--output", g.output,
                  "Write results as JSONL: prompt, completion, tokens, logp, finish");
  sub->add_option("--tokens", g.tokens, "New tokens at most")->capture_default_str();
  sub->add_option("--samples", g.samples, "Texts for each prompt")->capture_default_str();
  sub->add_option("--stop", g.stop, "Stop before this text; may be given several times")
      ->allow_extra_args(false);
  add_sampling_flags(*sub, g.sampling);
  sub->add_option("--rows", g.rows, "Texts made side by side at most")->capture_default_str();
  sub->add_option("--cache-mb", g.cache_mb, "MiB for keys and values, if one text needs no more")
      ->capture_default_str();
  sub->add_flag("--stats", g.stats, "Tokens a second, on standard error");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    fail(e.what(), " (./chat generate --help lists what there is)");
  }
  return generate(g);
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  std::signal(SIGPIPE, SIG_IGN);  // print() sees the error instead
  cake::watch_signals();
  return cake::guarded_main([&] {
    try {
      return cake::chat(argc, argv);
    } catch (const cake::BrokenPipe&) {
      return 0;
    }
  });
}
