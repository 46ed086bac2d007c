// Stage 6: talk to a model, and measure it.
//
//     ./chat DIR                                       a conversation in the terminal
//     ./chat DIR --base                                a base model continues what you type
//     ./chat generate DIR --prompt "Once upon a time"  texts, one or many
//     ./chat eval DIR --tasks eval.jsonl               questions, checked: a table and JSON
//     ./chat export DIR -o model.gguf                  a file for llama.cpp, LM Studio and Ollama
//     ./chat info DIR                                  what a model is, and the memory it takes
//
// A prompt becomes token ids. A text begins like a document of the training data, with
// <|endoftext|>; a conversation follows its chat template. The generator (cake/generate.h) feeds
// the ids to the engine and samples one token after another. The bytes of the tokens are printed as
// soon as they make whole characters:
//
//     prompts -> Tokenizer::encode -> Generator -> Gpt::decode -> Tokenizer::token_bytes -> text
//
// When an assistant's turn ends with tool calls, the tools run, their answers are appended as ids
// (cake/tools.h), and generation continues behind them. For the next message of the user the chat
// template renders the whole conversation again, since it may write earlier turns otherwise:
// without their reasoning, for example. The ids that the engine's cache has are kept as far as the
// new text begins with them (keep_seen_ids), and only the rest is fed:
//
//     Conversation -> ChatTemplate::render -> keep_seen_ids -> Generator -> read_turn -> Message
//
// The order of this file: standard output; generate; the conversation and its terminal; eval and
// its tasks; info; the command line. export is cake/export.h.
#include <histedit.h>
#include <poll.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cwchar>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/conversations.h"
#include "cake/documents.h"
#include "cake/export.h"
#include "cake/flags.h"
#include "cake/generate.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/packed.h"
#include "cake/problems.h"
#include "cake/record_flags.h"
#include "cake/records.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/sha256.h"
#include "cake/text_model.h"
#include "cake/tokenizer.h"
#include "cake/tools.h"
#include "cake/unicode.h"
#include "cake/verify.h"

namespace cake {
namespace {

using Strings = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------
// Standard output. It is no error when its reader ends first, as in `./chat generate ... | head`.

void print(std::string_view text) {
  const bool good = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (good && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) std::exit(0);
  fail("standard output: cannot write: ", errno_text());
}

// ---------------------------------------------------------------------------------------------
// generate: prompts -> texts

struct GenerateOptions {
  ModelOptions model;
  std::string prompt, prompts, output;  // prompts: a file; output: a file, empty for none
  int max_tokens = 256, samples = 1, rows = 64, cache_mb = 2048;
  Sampling sampling{.temperature = .8f};
  std::vector<std::string> stop;
  bool stats = false;
  RecordOptions records;
};

struct Prompt {
  std::string where;  // the flag, or file and line: for messages
  std::string text;
};

void check(const GenerateOptions& o);
std::vector<Prompt> read_prompts(const GenerateOptions& o, LeftOut& left_out);
std::vector<std::vector<int>> encode_prompts(const TextModel& m, std::vector<Prompt>& prompts,
                                             int context, const GenerateOptions& o,
                                             LeftOut& left_out);
int stream(Generator& generator, Request request, const Prompt& prompt, int context);
int batch(Generator& generator, const Request& settings, const std::vector<Prompt>& prompts,
          const std::vector<std::vector<int>>& ids, const GenerateOptions& o);
void print_stats(const Generator& generator, const Config& config, const GptOptions& engine);

int generate(const GenerateOptions& o) {
  check(o);
  std::vector<Prompt> prompts{{"--prompt", o.prompt}};
  LeftOut left_out;
  if (!o.prompts.empty()) prompts = read_prompts(o, left_out);

  const int64_t total = int64_t(prompts.size()) * o.samples;
  if (total > 1 << 30) fail("--samples: found ", total, " texts to write, expected fewer");
  GeneratorOptions options{.rows = int(std::min<int64_t>(o.rows, total))};
  TextModel model = open_model(o.model);
  const Config& config = model.config;
  GptOptions engine = engine_options(model, o.model, 0, decode_plan(options));
  options.context = choose_context(config, o.model.context, engine);
  const auto ids = encode_prompts(model, prompts, options.context, o, left_out);
  int64_t longest = 0;
  for (const auto& prompt : ids) longest = std::max(longest, int64_t(prompt.size()) + o.max_tokens);
  limit_cache(options, config, longest, o.cache_mb, engine);
  engine.decode = decode_plan(options);
  load_engine(model, o.model, engine);
  Generator generator(
      *model.gpt, [&](int id) { return model.tokenizer.token_bytes(id); }, options);

  Request request{.max_new = o.max_tokens,
                  .sampling = o.sampling,
                  .stop_ids = model.stop_ids,
                  .stop_strings = o.stop};
  request.sampling.vocab = model.tokenizer.vocab_size();
  int status;
  if (total == 1 && o.output.empty()) {
    request.prompt = ids[0];
    status = stream(generator, std::move(request), prompts[0], options.context);
  } else {
    status = batch(generator, request, prompts, ids, o);
  }
  if (o.stats) print_stats(generator, config, engine);
  return status;
}

void check(const GenerateOptions& o) {
  need(o.max_tokens >= 1, "--max-tokens", o.max_tokens, "at least 1");
  need(o.samples >= 1, "--samples", o.samples, "at least 1");
  need(o.rows >= 1 && o.rows <= 4096, "--rows", o.rows, "1 to 4096");
  need(o.cache_mb >= 1, "--cache-mb", o.cache_mb, "at least 1");
  check_model_options(o.model, o.sampling);
  for (const std::string& stop : o.stop) need(!stop.empty(), "--stop", "\"\"", "some text");
}

// One prompt a line of text, or the "prompt" of each record.
std::vector<Prompt> read_prompts(const GenerateOptions& o, LeftOut& left_out) {
  const Input input(o.prompts);
  std::vector<Prompt> prompts;
  for (TextLine& line : read_text_lines(input, "prompt", o.records, &left_out)) {
    prompts.push_back({std::move(line.where), std::move(line.text)});
  }
  if (prompts.empty()) fail(input.name, ": found no prompt, expected one a line");
  return prompts;
}

std::vector<int> encode_prompt(const TextModel& m, const Prompt& p, int context) {
  std::vector<int> ids = document_ids(m, p.text);
  require(!ids.empty(), p.where, ": found an empty prompt, expected text: the tokenizer of ",
          m.dir.string(), " has no <|endoftext|> to begin a document with");
  require(int64_t(ids.size()) <= context - 1, p.where, ": found ", ids.size(),
          " tokens, expected at most ", context - 1, ", since the context is ", context);
  return ids;
}

// The ids of the prompts. Of --prompts, those that fill the context are errors, or left out as
// --bad-lines says.
std::vector<std::vector<int>> encode_prompts(const TextModel& m, std::vector<Prompt>& prompts,
                                             int context, const GenerateOptions& o,
                                             LeftOut& left_out) {
  const size_t records = prompts.size() + size_t(left_out.total());
  std::vector<std::vector<int>> ids;
  std::vector<Prompt> kept;
  for (Prompt& p : prompts) {
    try {
      ids.push_back(encode_prompt(m, p, context));
      kept.push_back(std::move(p));
    } catch (const Error& e) {
      if (o.prompts.empty() || !o.records.skip_bad_lines) throw;
      left_out.add("too long", e.what());
    }
  }
  prompts = std::move(kept);
  require(!prompts.empty(), o.prompts, ": found no record to use: ", left_out.summary());
  std::fputs(left_out.text(int64_t(records)).c_str(), stderr);
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
  return json_line(json);
}

void print_stats(const Generator& generator, const Config& config, const GptOptions& engine) {
  const GeneratorStats& s = generator.stats();
  const auto rate = [](int64_t n, double seconds) { return seconds > 0 ? double(n) / seconds : 0; };
  std::fprintf(stderr, "prompt  %lld tokens, %.1f tokens/s%s\n", (long long)s.prompt_tokens,
               rate(s.prompt_tokens, s.prompt_seconds),
               s.reused_tokens ? concat("; ", s.reused_tokens, " reused").c_str() : "");
  std::fprintf(stderr, "decode  %lld tokens, %.1f tokens/s\n", (long long)s.new_tokens,
               rate(s.new_tokens, s.decode_seconds));
  const MemoryPlan memory = plan_memory(config, engine);
  const int64_t cache = generator.cache().pages_in_memory() * cache_page_bytes(config, engine);
  std::fprintf(stderr, "memory  %s planned (%s); KV cache %s used\n",
               bytes_text(double(memory.total())).c_str(), memory.text().c_str(),
               bytes_text(double(cache)).c_str());
}

// Runs until all requests are done or a signal asks to stop. `after_step` prints new results.
// Returns the exit status.
template <class AfterStep>
int run(Generator& generator, AfterStep&& after_step) {
  while (stop_signal == 0 && generator.step()) after_step();
  return stop_signal == 0 ? 0 : 128 + stop_signal;
}

// One prompt: prints the text while it is generated.
int stream(Generator& generator, Request request, const Prompt& prompt, int context) {
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
  if (status == 0 && generator.pop(number).finish == Finish::context) {
    std::fprintf(stderr, "the context of %d tokens is full\n", context);
  }
  return status;
}

// Many prompts: writes each text, in order, as soon as it is done, to the file or to standard
// output.
int batch(Generator& generator, const Request& settings, const std::vector<Prompt>& prompts,
          const std::vector<std::vector<int>>& ids, const GenerateOptions& o) {
  std::optional<AtomicFile> file;
  if (!o.output.empty()) file.emplace(o.output);
  const int total = int(prompts.size()) * o.samples;
  for (int i = 0; i < total; i++) {
    Request request = settings;
    request.prompt = ids[size_t(i / o.samples)];
    request.sampling.stream = uint64_t(i);  // equal prompts get different texts
    generator.submit(std::move(request));
  }
  ProgressLine progress;
  int written = 0;
  const int status = run(generator, [&] {
    for (; written < total && generator.done(written); written++) {
      const Prompt& prompt = prompts[size_t(written / o.samples)];
      const Completion c = generator.pop(written);
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

// ---------------------------------------------------------------------------------------------
// A conversation: lines of the user -> answers, tool calls, commands

enum class Thinking { show, hide, cut };

struct TalkOptions {
  ModelOptions model;
  TemplateFlags chat_template;
  std::string system, documents, thinking = "show";
  bool base = false, calculator = false;
  int max_tokens = 0;  // of an answer; 0: as many as fit, and 100 of a document
  Sampling sampling{.temperature = .8f};
};

// With --base no template is rendered.
void check_base(bool base, const TemplateFlags& flags) {
  const char* found = flags.choice != "auto"  ? "--template"
                      : !flags.values.empty() ? "--template-set"
                      : !flags.date.empty()   ? "--date"
                                              : nullptr;
  if (base && found) fail("--base: found ", found, ", expected it with an assistant");
}

Thinking parse_thinking(const std::string& name) {
  need(name == "show" || name == "hide" || name == "cut", "--thinking", name, "show, hide or cut");
  return name == "show" ? Thinking::show : name == "hide" ? Thinking::hide : Thinking::cut;
}

// Prints an answer while it is generated: its content, and its reasoning if that is shown, but not
// its calls. Newlines at the ends of content are not printed.
class AnswerPrinter {
 public:
  AnswerPrinter(const TextModel& model, Thinking thinking, bool terminal)
      : thinking_(thinking), terminal_(terminal) {
    const bool has_calls = model.chat && model.chat->has_tools();
    for (const Mode mode : {Mode::reasoning, Mode::call}) {
      if (!model.chat || (mode == Mode::call && !has_calls)) continue;
      const char* begin = mode == Mode::call ? "<tool_call>" : "<think>";
      const char* end = mode == Mode::call ? "</tool_call>" : "</think>";
      markers_.push_back({begin, model.tokenizer.special(begin), mode});
      markers_.push_back({end, model.tokenizer.special(end), Mode::content});
    }
  }

  // The answer begins. `in_reasoning`: its prompt ends with <think>.
  void begin(bool in_reasoning) {
    if (in_reasoning) read_marker(markers_[0]);
  }
  void read(const Token& token) {
    for (const Marker& marker : markers_) {
      if (marker.id != token.id) continue;
      read_text(std::exchange(held_, ""));
      return read_marker(marker);
    }
    if (mode_ == Mode::reasoning) thought_++;
    held_ += token.text;
    read_held();
    if (token.last) end();
  }
  // The turn ends, wherever it is.
  void end() {
    read_text(std::exchange(held_, ""));
    if (mode_ == Mode::reasoning) end_reasoning("");
    mode_ = Mode::content;
    newlines_.clear();
    if (std::exchange(line_open_, false)) print("\n");
  }

 private:
  enum class Mode { content, reasoning, call };
  struct Marker {
    std::string text;
    int id;     // -1: it is written as text
    Mode mode;  // that follows
  };

  // Reads held_ up to what may be the beginning of a marker that is text.
  void read_held() {
    for (size_t i = 0; (i = held_.find('<', i)) != std::string::npos;) {
      const std::string_view rest = std::string_view(held_).substr(i);
      const Marker* found = nullptr;
      bool may_come = false;
      for (const Marker& marker : markers_) {
        if (marker.id >= 0) continue;
        if (rest.starts_with(marker.text)) found = &marker;
        may_come |= std::string_view(marker.text).starts_with(rest);
      }
      if (found) {
        read_text(held_.substr(0, i));
        held_.erase(0, i + found->text.size());
        read_marker(*found);
        i = 0;
      } else if (may_come) {
        read_text(held_.substr(0, i));
        held_.erase(0, i);
        return;
      } else {
        i++;
      }
    }
    read_text(std::exchange(held_, ""));
  }
  void read_marker(const Marker& marker) {
    const bool ends_reasoning = mode_ == Mode::reasoning && marker.mode != Mode::reasoning;
    if (ends_reasoning) {
      end_reasoning(marker.text == "</think>" ? marker.text : "");
    } else if (marker.mode == Mode::reasoning && mode_ != Mode::reasoning) {
      if (thinking_ == Thinking::show) write(marker.text, terminal_ ? "\033[2m" : "");
      thought_ = 0;
    }
    mode_ = marker.mode;
    if (mode_ == Mode::call) newlines_.clear();
  }
  void end_reasoning(const std::string& marker) {
    if (thinking_ == Thinking::show) {
      write(marker);
      if (terminal_) print("\033[0m");
      return;
    }
    if (std::exchange(line_open_, false)) print("\n");
    newlines_.clear();
    print(concat(terminal_ ? "\033[2m" : "", "(", thought_, thought_ == 1 ? " token" : " tokens",
                 " of reasoning, ", thinking_ == Thinking::hide ? "hidden" : "cut", ")",
                 terminal_ ? "\033[0m\n" : "\n"));
  }
  void read_text(const std::string& text) {
    if (mode_ == Mode::call || (mode_ == Mode::reasoning && thinking_ != Thinking::show)) return;
    write(text);
  }
  // Newlines wait for the text behind them.
  void write(const std::string& text, const char* style = "") {
    newlines_ += text;
    const size_t end = newlines_.find_last_not_of('\n') + 1;
    if (end == 0) return;
    const size_t begin = line_open_ ? 0 : newlines_.find_first_not_of('\n');
    print(style + newlines_.substr(begin, end - begin));
    newlines_.erase(0, end);
    line_open_ = true;
  }

  Thinking thinking_;
  bool terminal_;
  std::vector<Marker> markers_;
  Mode mode_ = Mode::content;
  std::string held_;      // may be the beginning of a marker
  std::string newlines_;  // not printed yet
  bool line_open_ = false;
  int thought_ = 0;  // tokens of this reasoning
};

class Talk {
 public:
  Talk(const TextModel& model, const TalkOptions& o, const GeneratorOptions& generator,
       const Search* search, bool terminal)
      : model_(model),
        chat_(model.chat ? &*model.chat : nullptr),
        options_(o),
        thinking_(parse_thinking(o.thinking)),
        search_(search),
        terminal_(terminal),
        context_(generator.context),
        generator_(
            *model.gpt, [this](int id) { return model_.tokenizer.token_bytes(id); }, generator) {
    options_.sampling.vocab = model.tokenizer.vocab_size();
    if (o.calculator) tools_.push_back(kCalculatorTool);
    if (search) tools_.push_back(kSearchTool);
    restart(o.system);
  }

  // Handles a line: a command, or a message. False when the conversation is over.
  bool handle(const std::string& line) {
    if (!line.starts_with('/')) return add_message(line), true;
    const size_t space = std::min(line.find(' '), line.size());
    const std::string command = line.substr(0, space);
    std::string rest = line.substr(std::min(space + 1, line.size()));
    if (command == "/quit" || command == "/exit") return false;
    if (command == "/help") {
      help();
    } else if (command == "/reset") {
      restart(system_);
      note("a new conversation");
    } else if (command == "/system") {
      set_system(rest);
    } else if (command == "/retry") {
      retry();
    } else if (command == "/save") {
      save(rest);
    } else if (command == "/temperature") {
      set_temperature(rest);
    } else {
      note(concat("there is no ", command, "; /help lists what there is"));
    }
    return true;
  }

 private:
  struct Turn {                     // a message and its answer
    std::vector<Message> messages;  // user, assistant, tool, assistant ...
    std::vector<int> typed;         // of a document: the ids of what was typed,
    std::vector<int> written;       // and what the model wrote behind it
  };

  void note(const std::string& text) const {
    print((terminal_ ? "\033[2m" : "") + text + (terminal_ ? "\033[0m\n" : "\n"));
  }

  // The conversation with the turns so far, and `last`.
  Conversation conversation(const Turn& last) const {
    Conversation c{.messages = {}, .tools = tools_};
    if (!system_.empty()) c.messages.push_back({.role = "system", .content = system_});
    for (const Turn& t : turns_) {
      c.messages.insert(c.messages.end(), t.messages.begin(), t.messages.end());
    }
    c.messages.insert(c.messages.end(), last.messages.begin(), last.messages.end());
    return c;
  }

  // The ids of everything so far, up to where the answer to `last` begins.
  std::vector<int> ids_before_answer(const Turn& last) const {
    if (chat_) return chat_->render(conversation(last), true).ids;
    std::vector<int> ids = document_ids(model_, "");
    for (const Turn& t : turns_) {
      ids.insert(ids.end(), t.typed.begin(), t.typed.end());
      ids.insert(ids.end(), t.written.begin(), t.written.end());
    }
    ids.insert(ids.end(), last.typed.begin(), last.typed.end());
    return ids;
  }

  // Throws Error where the template refuses the system message or the tools, or where they fill
  // half of the context.
  void restart(const std::string& system) {
    if (chat_) {
      Conversation c{.messages = {{.role = "user", .content = "x"}}, .tools = tools_};
      if (!system.empty()) c.messages.insert(c.messages.begin(), {"system", system, {}});
      const Rendered rendered = chat_->render(c, true);
      const int tokens = int(rendered.ids.size());
      require(tokens <= context_ / 2 || (system.empty() && tools_.empty()), "system: found ",
              tokens, " tokens with the shortest message, expected at most ", context_ / 2,
              ", half of the context");
      const auto is_system = [](const jinja::Origin& origin) { return origin.message == 0; };
      const bool shows = std::any_of(rendered.origins.begin(), rendered.origins.end(), is_system);
      const std::string text = model_.tokenizer.decode(rendered.ids);
      if (!system.empty() && !shows && text.find(strip(system)) == std::string::npos) {
        note("the chat template leaves the system message out");
      }
    }
    system_ = system;
    turns_.clear();
  }

  void add_message(const std::string& text) {
    Turn turn;
    if (chat_) {
      if (text.find_first_not_of(" \t\n") == std::string::npos) return;
      turn.messages.push_back({.role = "user", .content = text});
    } else {
      // A new line of the document, unless the document begins here. An empty line adds nothing.
      const bool begun = !turns_.empty() && !ended_;
      if (!text.empty()) turn.typed = model_.tokenizer.encode((begun ? "\n" : "") + text);
      if (!begun && turn.typed.empty() && model_.document_start < 0)
        return note("type the beginning of the document");
    }
    // What the message takes where all turns before it are dropped.
    const std::vector<Turn> turns = std::exchange(turns_, {});
    size_t alone = 0;
    std::string error;
    try {
      alone = ids_before_answer(turn).size();
      if (int(alone) > context_ - 1) {
        error = concat("that is ", alone,
                       " tokens with all that stands around it, expected at "
                       "most ",
                       context_ - 1, " in the context of ", context_);
      }
    } catch (const Error& e) {
      error = e.what();
    }
    turns_ = turns;
    if (!error.empty()) return note(error + ": the message was not added");
    if (std::exchange(ended_, false)) turns_.clear();
    answer(std::move(turn));
  }

  // The prompt for an answer to `last`. When less than an eighth of the context is free for the
  // answer, the oldest turns are dropped until a quarter is free.
  std::vector<int> prompt_for(const Turn& last) {
    std::vector<int> ids = ids_before_answer(last);
    int dropped = 0;
    if (int(ids.size()) > context_ - std::max(1, context_ / 8)) {
      while (!turns_.empty() && int(ids.size()) > context_ - std::max(1, context_ / 4)) {
        turns_.erase(turns_.begin());
        ids = ids_before_answer(last);
        dropped++;
      }
    }
    if (dropped > 0) {
      note(concat("the context of ", context_, " tokens is full: the oldest ", dropped,
                  dropped == 1 ? " turn is" : " turns are", " dropped"));
    }
    if (!chat_) return ids;
    std::vector<int> kept = keep_seen_ids(model_.tokenizer, seen_, ids);
    // What the model sampled may take more tokens than the tokenizer makes of the same text.
    return int(kept.size()) > context_ - 1 ? ids : kept;
  }

  // Whether the prompt opens the reasoning of the answer: it ends with <think>.
  bool opens_reasoning(std::span<const int> prompt) const {
    if (!chat_) return false;
    const std::string end =
        model_.tokenizer.decode(prompt.last(std::min<size_t>(16, prompt.size())));
    return strip(end).ends_with("<think>");
  }

  void answer(Turn turn) {
    Request request{.prompt = prompt_for(turn)};
    seen_ = request.prompt;
    const int room =
        context_ - int(request.prompt.size());  // at least 1: add_message has checked it
    request.max_new = options_.max_tokens > 0 ? options_.max_tokens : chat_ ? context_ : 100;
    request.max_inserted = room;
    request.sampling = options_.sampling;
    request.sampling.stream = answers_++;  // /retry gives another answer
    request.stop_ids = model_.turn_stop_ids;
    request.stop_strings = model_.turn_stop_strings;

    const bool in_reasoning = opens_reasoning(request.prompt);
    AnswerPrinter printer(model_, thinking_, terminal_);
    printer.begin(in_reasoning);
    request.on_token = [&](const Token& t) { printer.read(t); };
    const bool has_calls = chat_ && chat_->has_tools();
    if (has_calls) {
      request.on_turn = [&](int, std::span<const int> ids) {
        const bool begins_in_reasoning = in_reasoning && turn.messages.size() == 1;
        turn.messages.push_back(message_of(read_turn(*chat_, ids), begins_in_reasoning));
        printer.end();
        return run_calls(turn);
      };
    }

    const int number = generator_.submit(std::move(request));
    while (generator_.step()) {
      if (stop_signal != 0 && !generator_.done(number)) generator_.cancel(number);
    }
    if (stop_signal == SIGINT) stop_signal = 0;
    printer.end();
    end_turn(std::move(turn), generator_.pop(number), in_reasoning);
  }

  // The message as it is in the conversation from now on. A prompt that ended with <think> has the
  // beginning of its reasoning.
  Message message_of(Message message, bool in_reasoning) const {
    if (in_reasoning) message.content = "<think>\n" + message.content;
    // Behind a header that is text, as "Assistant:", an answer begins with a space.
    if (chat_->find_end_of_turn() < 0) message.content = std::string(strip(message.content));
    if (thinking_ != Thinking::cut) return message;
    std::string& text = message.content;
    for (size_t begin; (begin = text.find("<think>")) != std::string::npos;) {
      const size_t end = text.find("</think>", begin);  // reasoning that was stopped has no end
      text.erase(begin, end == std::string::npos ? end : end + 8 - begin);
    }
    text = std::string(strip(text));
    return message;
  }

  // Runs the calls of the turn's last message. Returns the ids that follow its end of turn.
  std::vector<int> run_calls(Turn& turn) {
    const Message& called = turn.messages.back();
    if (called.tool_calls.empty()) return {};
    Conversation whole = conversation(turn);
    const size_t first_result = whole.messages.size();
    const std::vector<int> ids = answer_calls(*chat_, whole, search_);
    for (size_t i = 0; i < called.tool_calls.size(); i++) {
      const ToolCall& call = called.tool_calls[i];
      const std::string& result = whole.messages[first_result + i].content;
      note(concat("  ", call.name, " ", call.arguments));
      note("  = " + (result.empty() ? "(nothing found)" : result));
    }
    turn.messages.insert(turn.messages.end(), whole.messages.begin() + long(first_result),
                         whole.messages.end());
    return ids;
  }

  void end_turn(Turn turn, Completion c, bool in_reasoning) {
    seen_.insert(seen_.end(), c.ids.begin(), c.ids.end());
    const std::vector<int>& stops = model_.turn_stop_ids;
    const bool whole =
        !c.ids.empty() && std::find(stops.begin(), stops.end(), c.ids.back()) != stops.end();
    if (!chat_) {
      turn.written = std::move(c.ids);
      if (whole) note("--- the document ends; the next begins");
      ended_ = whole;
    } else if (!whole || !chat_->has_tools()) {  // on_turn has added the others
      const Message message{.role = "assistant", .content = c.text};
      turn.messages.push_back(message_of(message, in_reasoning && c.last_turn == 0));
    }
    if (c.finish == Finish::cancelled) note("(stopped)");
    if (c.finish == Finish::context) note(concat("(the context of ", context_, " tokens is full)"));
    if (c.finish == Finish::length && chat_) {
      note("(the answer is as long as --max-tokens allows)");
    }
    turns_.push_back(std::move(turn));
  }

  void set_system(const std::string& text) {
    if (!chat_) return note("a base model has no system message");
    if (text.empty()) return note(system_.empty() ? "no system message" : "system: " + system_);
    try {
      restart(text);
      note("a new conversation with this system message");
    } catch (const Error& e) {
      note(e.what());
    }
  }

  void set_temperature(const std::string& text) {
    float& temperature = options_.sampling.temperature;
    if (!text.empty()) {
      char* rest;
      const float x = std::strtof(text.c_str(), &rest);
      if (*rest || !(x >= 0 && x <= 100)) {
        return note("temperature: found " + text + ", expected 0 to 100");
      }
      temperature = x;
    }
    note(concat("temperature ", temperature));
  }

  void help() const {
    print(
        !chat_
            ? R"(What you type is text, and the model continues it. An empty line adds nothing.
Ctrl+C         stops the answer
Ctrl+D, /quit  ends the program
/reset         begins a new document
/retry         continues in another way
/save FILE     appends the document to a .jsonl file
/temperature X sets the temperature; 0: always the most likely token
)"
            : R"(Type and press Enter. A line that ends with a backslash continues on the next one.
Ctrl+C         stops the answer
Ctrl+D, /quit  ends the program
/reset         begins a new conversation
/system TEXT   begins one with this system message; without TEXT, shows it
/retry         answers again
/save FILE     appends the conversation to a .jsonl file
/temperature X sets the temperature; 0: always the most likely token
)");
  }

  void retry() {
    if (turns_.empty()) return note("there is no message yet");
    Turn turn = std::move(turns_.back());
    turns_.pop_back();
    turn.written.clear();
    if (chat_) turn.messages.resize(1);
    answer(std::move(turn));
  }

  void save(const std::string& path) const {
    if (path.empty()) return note("/save: a file's name is missing");
    if (turns_.empty()) return note("there is no message yet");
    OrderedJson json;
    if (!chat_) {
      std::vector<int> ids;
      for (const Turn& t : turns_) {
        ids.insert(ids.end(), t.typed.begin(), t.typed.end());
        ids.insert(ids.end(), t.written.begin(), t.written.end());
      }
      json["text"] = model_.tokenizer.decode(ids);
    } else {
      json["messages"] = OrderedJson::array();
      for (const Message& m : conversation({}).messages)
        json["messages"].push_back(message_json(m));
      for (const std::string& tool : tools_) {
        json["tools"].push_back({{"type", "function"}, {"function", OrderedJson::parse(tool)}});
      }
    }
    std::ofstream file(path, std::ios::app);
    file << json_line(json) << std::flush;
    note(file ? "saved in " + path : path + ": cannot write: " + errno_text());
  }

  const TextModel& model_;
  const ChatTemplate* chat_;  // nullptr: a base model
  TalkOptions options_;
  Thinking thinking_;
  const Search* search_;
  bool terminal_;
  int context_;  // tokens
  Generator generator_;
  uint64_t answers_ = 0;  // begun so far
  std::vector<std::string> tools_;
  std::string system_;
  std::vector<Turn> turns_;
  std::vector<int> seen_;  // the ids of the last prompt and its answer, which the cache has
  bool ended_ = false;     // the document is over: the next text begins another one
};

// ---------------------------------------------------------------------------------------------
// Lines of input: in a terminal, edited with libedit; otherwise as they come through a pipe

class LineInput {
 public:
  enum Status { line, end, interrupted };

  LineInput() : terminal_(isatty(STDIN_FILENO) && isatty(STDOUT_FILENO)) {
    if (!terminal_) return;
    // UTF-8 whatever the locale is, so that a character of several bytes is edited as one.
    std::setlocale(LC_CTYPE, "");
    if (MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
    edit_ = el_init("chat", stdin, stdout, stderr);
    history_ = history_init();
    if (!edit_ || !history_) fail("the terminal: cannot edit lines on it");
    HistEvent event;
    history(history_, &event, H_SETSIZE, 1000);
    history(history_, &event, H_SETUNIQUE, 1);
    el_set(edit_, EL_CLIENTDATA, this);
    el_set(edit_, EL_PROMPT, prompt_of);
    el_set(edit_, EL_HIST, history, history_);
    el_set(edit_, EL_EDITOR, "emacs");
    el_set(edit_, EL_SIGNAL, 0);
    el_set(edit_, EL_GETCFN, read_character);
    for (const auto& [key, command] :
         {std::pair{"\033[3~", "ed-delete-next-char"}, std::pair{"\033[H", "ed-move-to-beg"},
          std::pair{"\033[F", "ed-move-to-end"}, std::pair{"^R", "em-inc-search-prev"}}) {
      el_set(edit_, EL_BIND, key, command, nullptr);
    }
    el_source(edit_, nullptr);  // the user's .editrc
  }
  LineInput(const LineInput&) = delete;
  LineInput& operator=(const LineInput&) = delete;
  ~LineInput() {
    if (edit_) el_end(edit_);
    if (history_) history_end(history_);
  }

  bool terminal() const { return terminal_; }

  // The next line, without its newline. A line that ends with a backslash continues.
  Status next(std::string& text) {
    text.clear();
    for (prompt_ = "> ";; prompt_ = "| ") {
      std::string part;
      const Status status = terminal_ ? next_edited(part) : next_plain(part);
      if (status != line) return status == end && !text.empty() ? line : status;
      const bool more = part.ends_with('\\');
      if (more) part.back() = '\n';
      text += part;
      if (!more) return line;
    }
  }

 private:
  // Reads one byte of standard input. Returns 1, or 0 at its end, or -1 after a signal, which
  // interrupts poll().
  static int read_byte(char& byte) {
    pollfd wait{STDIN_FILENO, POLLIN, 0};
    while (stop_signal == 0) {
      if (poll(&wait, 1, -1) < 0 && errno == EINTR) continue;
      const ssize_t n = read(STDIN_FILENO, &byte, 1);
      if (n < 0 && errno == EINTR) continue;
      return n > 0 ? 1 : 0;
    }
    return -1;
  }
  static int read_character(EditLine*, wchar_t* out) {
    std::mbstate_t state{};
    for (;;) {
      char byte;
      if (const int status = read_byte(byte); status != 1) return status;
      const size_t n = std::mbrtowc(out, &byte, 1, &state);
      if (n == size_t(-2)) continue;  // the character has more bytes
      if (n == size_t(-1)) *out = L'?';
      return 1;
    }
  }
  static char* prompt_of(EditLine* edit) {
    LineInput* self = nullptr;
    el_get(edit, EL_CLIENTDATA, &self);
    return self->prompt_.data();
  }
  Status next_edited(std::string& text) {
    int n = 0;
    const char* typed = el_gets(edit_, &n);
    if (stop_signal != 0) {
      el_reset(edit_);
      return interrupted;
    }
    if (!typed || n <= 0) return end;
    text.assign(typed, size_t(n));
    if (text.ends_with('\n')) text.pop_back();
    HistEvent event;
    if (!text.empty()) history(history_, &event, H_ENTER, text.c_str());
    return line;
  }
  static Status next_plain(std::string& text) {
    char byte;
    int status;
    while ((status = read_byte(byte)) == 1 && byte != '\n') text += byte;
    if (text.ends_with('\r')) text.pop_back();
    return status == 1 || (status == 0 && !text.empty()) ? line : status == 0 ? end : interrupted;
  }

  bool terminal_;
  EditLine* edit_ = nullptr;
  History* history_ = nullptr;
  std::string prompt_ = "> ";
};

// ---------------------------------------------------------------------------------------------
// The conversation in the terminal

constexpr int kLongConversation = 4096;  // tokens, which the memory plan counts

int talk(const TalkOptions& o) {
  check_model_options(o.model, o.sampling);
  need(o.max_tokens >= 0, "--max-tokens", o.max_tokens, "at least 1, or 0");
  parse_thinking(o.thinking);
  check_base(o.base, o.chat_template);
  require(!o.base || o.thinking == "show",
          "--base: found --thinking, expected it with an assistant");
  TextModel model = open_model(o.model);
  GptOptions engine = engine_options(model, o.model, 0, decode_plan({.rows = 1}));
  const int context = choose_context(model.config, o.model.context, engine);
  engine.decode.positions = std::min(context, kLongConversation);
  load_engine(model, o.model, engine);
  require(!o.base || (!o.calculator && o.documents.empty() && o.system.empty()),
          "--base: found --system, --calculator or --documents, expected them with an assistant");
  if (!o.base) {
    TemplateFlags flags = o.chat_template;
    if (flags.date.empty()) flags.date = today();  // the same for the whole conversation
    use_template(model, find_template(model, flags));
    require((!o.calculator && o.documents.empty()) || model.chat->has_tools(),
            "--calculator, --documents: found the chat template of ", model.chat->name(),
            ", expected one that declares tools");
  }
  const std::optional<Search> search = load_documents(o.documents, model.tokenizer);
  LineInput input;
  // Ctrl+C stops an answer, or clears the line that is being typed. It does not end the program.
  std::signal(SIGINT, [](int signal) { stop_signal = signal; });
  // A turn forks the one before it, and a page that both share in part is copied.
  const GeneratorOptions generator{.rows = 1,
                                   .cache_positions = context + 2 * int64_t(kPage),
                                   .context = context,
                                   .cache_type = engine.decode.cache};
  Talk talk(model, o, generator, search ? &*search : nullptr, input.terminal());
  if (input.terminal()) {
    print(concat(model.dir.string(), ", ", model.gpt->table().parameters(),
                 " parameters. /help lists commands, Ctrl+D ends.\n"));
  }
  for (std::string line;;) {
    const LineInput::Status status = input.next(line);
    if (status == LineInput::interrupted) {
      if (stop_signal == SIGTERM || !input.terminal()) return 128 + stop_signal;
      stop_signal = 0;
      print("\n");
      continue;
    }
    if (status == LineInput::end) {
      if (input.terminal()) print("\n");
      return 0;
    }
    if (!talk.handle(line)) return 0;
    if (stop_signal == SIGTERM) return 128 + SIGTERM;
    if (input.terminal()) print("\n");
  }
}

// ---------------------------------------------------------------------------------------------
// eval: tasks -> results, a table and JSON
//
// A task is a file of items in one of two kinds. Some are answered in words, which are generated:
// the items of a file without a name, and gsm8k. In the others nothing is generated: the model's
// log-probabilities choose among given texts (hellaswag, arc, mmlu) or measure documents
// (bits_per_byte).

constexpr int kScoreTokens = 4096;  // of a forward pass that scores texts

struct EvalOptions {
  ModelOptions model;
  std::vector<std::string> tasks, shots_from;  // NAME=FILE, or FILE with items
  std::vector<std::string> beside;             // NAME=FILE of earlier results
  RecordOptions records;
  TemplateFlags chat_template;
  std::string documents, json, output;
  bool base = false, no_start = false;
  int shots = 0, limit = 0, max_tokens = 0, rows = 64, cache_mb = 2048;
};

struct MultipleChoice {
  std::string where;    // file:line
  std::string subject;  // of MMLU; otherwise empty
  std::string context;
  std::vector<std::string> endings;  // each follows the context and a space
  size_t right = 0;
};

struct Task {
  std::string name;   // of NAME=FILE; empty for a file of items
  std::string path;   // the file
  std::string shots;  // the file of solved examples; empty: none
  std::vector<MultipleChoice> choices;
  LeftOut left_out;  // of the records of `path`
  bool is_in_words() const { return name.empty() || name == "gsm8k"; }
  bool is_of_choices() const { return !is_in_words() && name != "bits_per_byte"; }
};

// What is answered in words: greedily once, or in several samples, each a Question of its own. The
// answer is right or wrong by the check, or it has a true reward by the rubric.
struct Question {
  std::string task, where;
  std::vector<int> prompt;
  Conversation conversation;  // that the prompt was made of, if tools are called
  Check check;
  std::shared_ptr<const Problem> problem;  // of gsm8k, in place of the check
  int max_tokens = 256;                    // of the answer
  std::vector<std::string> stop;
  bool tools = false;  // calls of tools are run
  Rubric rubric;       // empty: the check decides
  float temperature = 0;
  int sample = 0, samples = 1;                              // the number of this sample, and of all
  std::vector<std::pair<std::string, std::string>> shares;  // (task, text): the share of the
                                                            // answers that contain the text
};

struct Answer {
  std::string text;
  std::set<std::string> tools;  // the names of those that were called
  Finish finish = Finish::length;
  bool too_long = false;  // the prompt fills the context: no answer
  double score = 0;       // 1 right, 0 wrong; with a rubric: the true reward
};

struct Result {
  std::string task, metric;
  double value = 0;
  int64_t n = 0;  // items
  Interval ci95{};
  OrderedJson left_out;  // records of the task's file by reason; null: none
};

std::vector<Task> parse_tasks(const EvalOptions& o);
void check(const EvalOptions& o);
void read_items(const TextModel& m, Task& task, const EvalOptions& o, std::vector<Question>& out);
void read_marking(const Json& json, const std::string& where, const EvalOptions& o, Question& q);
void read_gsm8k(const TextModel& m, Task& task, const EvalOptions& o, std::vector<Question>& out);
void read_choices(Task& task, const EvalOptions& o);
GeneratorOptions generator_for(const TextModel& m, const std::vector<Question>& questions,
                               int context, const EvalOptions& o, const GptOptions& engine);
std::vector<Answer> answer_all(const TextModel& m, const std::vector<Question>& questions,
                               const Search* search, const GeneratorOptions& options);
std::vector<Result> mark(const std::vector<Question>& questions, const std::vector<Answer>& answers,
                         const EvalOptions& o);
std::vector<Result> multiple_choice(const TextModel& m, const Task& task, int window,
                                    const EvalOptions& o, std::string& lines);
std::vector<Result> bits_per_byte(const TextModel& m, const Task& task, int window,
                                  const EvalOptions& o);
using Columns = std::vector<std::pair<std::string, std::map<std::string, double>>>;
Columns read_beside(const EvalOptions& o);
void report(const std::vector<Result>& results, const Columns& beside, const EvalOptions& o);
std::string answer_lines(const Tokenizer& tokenizer, const std::vector<Question>& questions,
                         const std::vector<Answer>& answers);

int evaluate(const EvalOptions& o) {
  check(o);
  check_base(o.base, o.chat_template);
  std::vector<Task> tasks = parse_tasks(o);
  const Columns beside = read_beside(o);
  TextModel model = open_model(o.model);
  // Only answers in words need a template.
  const bool in_words =
      std::any_of(tasks.begin(), tasks.end(), [](const Task& t) { return t.is_in_words(); });
  if (in_words && !o.base) use_template(model, find_template(model, o.chat_template));
  const std::optional<Search> search = load_documents(o.documents, model.tokenizer);

  std::vector<Question> questions;
  for (Task& task : tasks) {
    if (task.name.empty()) {
      read_items(model, task, o, questions);
    } else if (task.name == "gsm8k") {
      read_gsm8k(model, task, o, questions);
    } else if (task.is_of_choices()) {
      read_choices(task, o);
    }
  }
  require(!in_words || !questions.empty(), "--tasks: found no item for ",
          o.base ? "a base model" : "an assistant", ", expected \"", o.base ? "prompt" : "messages",
          "\" in some");

  const bool scores =
      std::any_of(tasks.begin(), tasks.end(), [](const Task& t) { return !t.is_in_words(); });
  GptOptions engine = engine_options(model, o.model, scores ? kScoreTokens : 0, {.rows = o.rows});
  const int context = choose_context(model.config, o.model.context, engine);
  // A forward pass takes more memory for a token than its keys and values do.
  const int window = o.model.context > 0 ? context : std::min(context, kScoreTokens);
  if (scores) engine.batch_tokens = std::max(window, kScoreTokens);
  const GeneratorOptions options = generator_for(model, questions, context, o, engine);
  engine.decode = questions.empty() ? DecodePlan() : decode_plan(options);
  load_engine(model, o.model, engine);

  std::vector<Result> results;
  std::string lines;  // of --output
  for (const Task& task : tasks) {
    if (task.is_in_words()) continue;
    const std::vector<Result> more = task.is_of_choices()
                                         ? multiple_choice(model, task, window, o, lines)
                                         : bits_per_byte(model, task, window, o);
    results.insert(results.end(), more.begin(), more.end());
    if (stop_signal != 0) return 128 + stop_signal;
  }
  if (!questions.empty()) {
    for (Question& q : questions) {
      q.stop.insert(q.stop.end(), model.turn_stop_strings.begin(), model.turn_stop_strings.end());
    }
    const std::vector<Answer> answers =
        answer_all(model, questions, search ? &*search : nullptr, options);
    if (stop_signal != 0) return 128 + stop_signal;
    const std::vector<Result> marked = mark(questions, answers, o);
    results.insert(results.begin(), marked.begin(), marked.end());
    lines.insert(0, answer_lines(model.tokenizer, questions, answers));
  }
  for (Result& r : results) {
    const auto is_its_task = [&](const Task& t) {
      return !t.name.empty() && (r.task == t.name || r.task == t.name + "_acc");
    };
    const auto task = std::find_if(tasks.begin(), tasks.end(), is_its_task);
    if (task != tasks.end() && task->left_out.total() > 0) r.left_out = task->left_out.json();
  }
  if (!o.output.empty()) write_file(o.output, lines);
  report(results, beside, o);
  return 0;
}

void check(const EvalOptions& o) {
  need(o.shots >= 0, "--shots", o.shots, "0 or more");
  need(o.limit >= 0, "--limit", o.limit, "0 (all) or more");
  need(o.max_tokens >= 0, "--max-tokens", o.max_tokens, "0 (as the items say) or more");
  need(o.rows >= 1 && o.rows <= 4096, "--rows", o.rows, "1 to 4096");
  need(o.cache_mb >= 1, "--cache-mb", o.cache_mb, "at least 1");
}

// (name, path) of "name=path"; ("", path) of a path alone.
std::pair<std::string, std::string> split_task(const std::string& spec) {
  const size_t equals = spec.find('=');
  if (equals == std::string::npos) return {"", spec};
  return {spec.substr(0, equals), spec.substr(equals + 1)};
}

bool is_arc(const std::string& name) { return name == "arc" || name.starts_with("arc_"); }

std::vector<Task> parse_tasks(const EvalOptions& o) {
  std::map<std::string, std::string> shots;
  for (const std::string& spec : o.shots_from) {
    const auto [name, path] = split_task(spec);
    if (name.empty()) fail("--shots-from: found ", spec, ", expected NAME=FILE");
    shots[name] = path;
  }
  if (o.shots > 0 && shots.empty()) fail("--shots-from is missing: where the --shots come from");
  if (o.shots == 0) shots.clear();
  std::vector<Task> tasks;
  std::set<std::string> seen;
  for (const std::string& spec : o.tasks) {
    const auto [name, path] = split_task(spec);
    const bool choice = name == "hellaswag" || name == "mmlu" || is_arc(name);
    require(name.empty() || choice || name == "gsm8k" || name == "bits_per_byte", "--tasks: found ",
            name, ", expected hellaswag, arc..., mmlu, gsm8k or bits_per_byte before =");
    require(seen.insert(name.empty() ? path : name).second, "--tasks: found ",
            name.empty() ? path : name, " twice");
    tasks.push_back({name, path, shots[name]});
  }
  return tasks;
}

// Calls read(record) for the records of a file, until it has taken `limit` of them (0: all).
template <class Read>
void for_each_item(const std::string& path, int limit, const EvalOptions& o, LeftOut& left_out,
                   Read&& read) {
  int taken = 0;
  const auto visit = [&](const Record& record) -> const char* {
    // --map is of all tasks: a field may be that of another one.
    for (const auto& [field, key] : o.records.names) record.has(field);
    if (limit > 0 && taken == limit) return kEnough;
    read(record);
    taken++;
    return nullptr;
  };
  const int64_t records = for_each_record({path}, o.records, left_out, visit);
  std::fputs(left_out.text(records).c_str(), stderr);
}

// A record with the fields of --map under their own names.
Json json_of(const Record& record) {
  Json json = parse_json(simdjson::minify(record.object), record.where);
  if (!record.names) return json;
  for (const auto& [field, key] : *record.names) {
    json.erase(field);
    simdjson::dom::element value;
    if (record.find(field, value)) json[field] = parse_json(simdjson::minify(value), record.where);
  }
  return json;
}

// Fails where a record lacks a field that every record of a task has. `expected`: its shape.
void expect_fields(const Record& record, std::initializer_list<const char*> fields,
                   const char* expected) {
  for (const char* field : fields) {
    if (!record.has(field)) fail_unknown_shape(record, expected);
  }
}

// ---------------------------------------------------------------------------------------------
// Questions that are answered in words

// The ids of a text that a base model continues.
std::vector<int> text_ids(const TextModel& m, const std::string& text, const EvalOptions& o) {
  return o.no_start ? m.tokenizer.encode(text) : document_ids(m, text);
}

// The ids of a conversation that an assistant answers.
std::vector<int> chat_ids(const TextModel& m, const Conversation& c, const std::string& where) {
  try {
    require(c.tools.empty() || m.chat->has_tools(), m.chat->name(), ": found ", c.tools.size(),
            " tools, expected a chat template that declares them");
    return m.chat->render(c, true).ids;
  } catch (const Error& e) {
    fail(where, ": ", e.what());
  }
}

// {"task", how it is marked; for an assistant "messages" and "tools"; for a base model "prompt" and
// "stop"}. A base model continues behind its answer, so its answer ends at a stop string; the
// default is an empty line.
void read_items(const TextModel& m, Task& task, const EvalOptions& o, std::vector<Question>& out) {
  std::map<std::string, int> counts;
  for_each_item(task.path, 0, o, task.left_out, [&](const Record& record) {
    const std::string& where = record.where;
    const Json json = json_of(record);
    if (!json.contains("task") || !(json.contains("check") || json.contains("rubric"))) {
      fail_unknown_shape(record,
                         "an item with \"task\" and \"check\" or \"rubric\"; a file of a "
                         "benchmark is --tasks NAME=FILE");
    }
    Question q{.task = json_get<std::string>(json, "task", where), .where = where};
    if (o.limit > 0 && counts[q.task]++ >= o.limit) return;
    read_marking(json, where, o, q);
    if (!m.chat) {
      q.stop = json_get_or<Strings>(json, "stop", {"\n\n"}, where);
      if (!json.contains("prompt") || json["prompt"].is_null()) return;
      q.prompt = text_ids(m, json_get<std::string>(json, "prompt", where), o);
    } else {
      if (!record.has("messages")) return;
      const Conversation conversation = parse_conversation(record);
      check_conversation(conversation, where, true);
      q.tools = !conversation.tools.empty();
      q.prompt = chat_ids(m, conversation, where);
      if (q.tools) q.conversation = conversation;
    }
    for (q.sample = 0; q.sample < q.samples; q.sample++) out.push_back(q);
  });
}

// How an item is asked and marked: "check" or "rubric"; "tokens" of the answer; "samples" at a
// "temperature"; and "shares", {"name": "text"}: "name" is another task, whose value is the share
// of the answers that contain the text.
void read_marking(const Json& json, const std::string& where, const EvalOptions& o, Question& q) {
  if (json.contains("rubric")) {
    q.rubric = parse_rubric(json["rubric"], where + ": rubric");
  } else {
    q.check = parse_check(json_get<Json>(json, "check", where), where + ": check");
  }
  q.max_tokens = o.max_tokens > 0 ? o.max_tokens : json_get_or<int>(json, "tokens", 128, where);
  need(q.max_tokens >= 1, where + ": tokens", q.max_tokens, "at least 1");
  q.samples = json_get_or<int>(json, "samples", 1, where);
  need(q.samples >= 1 && q.samples <= 1024, where + ": samples", q.samples, "1 to 1024");
  q.temperature = float(json_get_or<double>(json, "temperature", q.samples > 1 ? 1 : 0, where));
  need(q.temperature >= 0 && q.temperature <= 100, where + ": temperature", q.temperature,
       "0 to 100");
  const Json shares = json_get_or<Json>(json, "shares", Json::object(), where);
  need(shares.is_object(), where + ": shares", json_text(shares), "{\"task\": \"text\"}");
  for (const auto& [name, text] : shares.items())
    q.shares.emplace_back(name, json_as<std::string>(text, name, where + ": shares"));
}

// The solved examples of --shots, in the file's order, that stand before a question: those of its
// subject, without the question itself, which the file may hold too. `examples`: (subject, text).
std::string shots_for(const std::vector<std::pair<std::string, std::string>>& examples,
                      const std::string& subject, const std::string& question, const Task& task,
                      int shots) {
  std::string before;
  int found = 0;
  for (const auto& [of, text] : examples) {
    if (found == shots) break;
    if (of != subject || text == question) continue;
    before += text + "\n\n";
    found++;
  }
  require(found == shots, task.shots, ": found ", found, " examples",
          subject.empty() ? "" : concat(" of the subject ", json_text(subject)), ", expected ",
          shots, ", those of --shots");
  return before;
}

// Whether the questions of a task are those of its solved examples.
bool is_its_own_shots(const Task& task) {
  std::error_code ignored;
  return std::filesystem::equivalent(task.path, task.shots, ignored);
}

// Problems whose answer is a number, as in GSM8K: {"question", "answer"}, where the answer ends in
// "#### 42". A base model reads the solved examples before the question. The texts and the strings
// that end an answer are lm-evaluation-harness's.
void read_gsm8k(const TextModel& m, Task& task, const EvalOptions& o, std::vector<Question>& out) {
  const bool document = !m.chat;
  const auto solved = [](const Problem& p) {
    return "Question: " + p.question + "\nAnswer: " + p.answers.front();
  };
  const auto read = [](const Record& record) {
    Problem problem = parse_problem(record);
    expected_numbers(problem);
    return problem;
  };
  std::vector<std::pair<std::string, std::string>> examples;
  LeftOut ignored;
  if (!task.shots.empty()) {
    for_each_item(task.shots, 0, o, ignored,
                  [&](const Record& record) { examples.emplace_back("", solved(read(record))); });
  }
  std::vector<std::shared_ptr<const Problem>> problems;
  for_each_item(task.path, o.limit, o, task.left_out, [&](const Record& record) {
    problems.push_back(std::make_shared<const Problem>(read(record)));
  });
  const bool own = is_its_own_shots(task);
  for (const auto& problem : problems) {
    std::vector<int> prompt;
    if (document) {
      const std::string before = shots_for(examples, "", own ? solved(*problem) : "", task,
                                           task.shots.empty() ? 0 : o.shots);
      prompt = text_ids(m, before + "Question: " + problem->question + "\nAnswer:", o);
    } else {
      prompt = chat_ids(m, problem->chat, problem->where);
    }
    Question q{.task = task.name,
               .where = problem->where,
               .prompt = std::move(prompt),
               .problem = problem,
               .max_tokens = o.max_tokens > 0 ? o.max_tokens : 256};
    if (document) q.stop = {"Question:", "</s>", "<|im_end|>"};
    out.push_back(std::move(q));
  }
}

constexpr int kToolTokens = 256;  // ids that tools may insert into an answer

// For up to o.rows answers at a time.
GeneratorOptions generator_for(const TextModel& m, const std::vector<Question>& questions,
                               int context, const EvalOptions& o, const GptOptions& engine) {
  int64_t longest = 1;
  for (const Question& q : questions) {
    longest =
        std::max(longest, int64_t(q.prompt.size()) + q.max_tokens + (q.tools ? kToolTokens : 0));
  }
  const size_t rows = std::clamp<size_t>(questions.size(), 1, size_t(o.rows));
  GeneratorOptions options{.rows = int(rows), .context = context};
  limit_cache(options, m.config, longest, o.cache_mb, engine);
  return options;
}

// A prompt that fills the context gets an empty answer.
std::vector<Answer> answer_all(const TextModel& m, const std::vector<Question>& questions,
                               const Search* search, const GeneratorOptions& options) {
  Generator generator(
      *m.gpt, [&](int id) { return m.tokenizer.token_bytes(id); }, options);

  std::vector<Answer> answers(questions.size());
  std::vector<int> numbers(questions.size(), -1);
  size_t asked = 0, done = 0;
  for (size_t i = 0; i < questions.size(); i++) {
    const Question& q = questions[i];
    Answer& a = answers[i];
    a.too_long = int(q.prompt.size()) > options.context - 1;
    if (a.too_long) continue;
    Request request{.prompt = q.prompt,
                    .max_new = q.max_tokens,
                    .sampling = {.temperature = q.temperature, .vocab = m.tokenizer.vocab_size()},
                    .stop_ids = m.turn_stop_ids,
                    .stop_strings = q.stop};
    if (q.tools) {
      request.max_inserted = kToolTokens;
      request.on_turn = [&m, &a, search, conversation = q.conversation](
                            int, std::span<const int> turn) mutable {
        conversation.messages.push_back(read_turn(*m.chat, turn));
        for (const ToolCall& call : conversation.messages.back().tool_calls)
          a.tools.insert(call.name);
        return answer_calls(*m.chat, conversation, search);
      };
    }
    request.sampling.stream = i;
    request.on_token = [&done](const Token& t) { done += t.last; };
    numbers[i] = generator.submit(std::move(request));
    asked++;
  }
  ProgressLine progress;
  while (stop_signal == 0 && generator.step()) {
    progress.show(format("%zu of %zu answered", std::min(done, asked), asked));
  }
  progress.show(format("%zu of %zu answered", std::min(done, asked), asked), true);
  for (size_t i = 0; i < questions.size() && stop_signal == 0; i++) {
    if (numbers[i] < 0) continue;
    Completion c = generator.pop(numbers[i]);
    answers[i].text = std::move(c.text);
    answers[i].finish = c.finish;
    const Question& q = questions[i];
    const bool ended = c.finish == Finish::stop_token || c.finish == Finish::stop_string;
    answers[i].score = q.problem          ? right_number(*q.problem, answers[i].text)
                       : q.rubric.empty() ? passes(q.check, answers[i].text, answers[i].tools)
                                          : true_reward(q.rubric, answers[i].text, ended);
  }
  return answers;
}

// ---------------------------------------------------------------------------------------------
// Marks: from answers to results

// The mean over items, with the 95 % interval of the normal distribution.
Result mean(const std::string& task, const std::string& metric, const std::vector<double>& values) {
  const double n = double(values.size());
  double sum = 0, squares = 0;
  for (const double v : values) sum += v;
  for (const double v : values) squares += (v - sum / n) * (v - sum / n);
  const double half = 1.959963984540054 * std::sqrt(squares / std::max(1., n - 1) / n);
  return {task, metric, sum / n, int64_t(values.size()), {sum / n - half, sum / n + half}};
}

Result share(const std::string& task, const std::string& metric, int64_t right, int64_t n) {
  const double value = double(right) / double(n);
  return {task, metric, value, n, wilson(value, n)};
}

const std::string kReward = "reward";  // the metric of a rubric: a mean from 0 to 1, not a share

std::vector<Result> mark(const std::vector<Question>& questions, const std::vector<Answer>& answers,
                         const EvalOptions& o) {
  struct Scores {
    std::string metric;
    std::vector<double> scores;  // of each item: the mean over its samples
  };
  std::vector<std::string> order;
  std::map<std::string, Scores> tasks;
  const auto add = [&](const std::string& task, const std::string& metric, double score,
                       const Question& q) {
    auto [it, is_new] = tasks.try_emplace(task, Scores{metric, {}});
    if (is_new) order.push_back(task);
    if (q.sample == 0) it->second.scores.push_back(0);
    it->second.scores.back() += score / q.samples;
  };
  int64_t ended = 0, greedy = 0, too_long = 0;
  for (size_t i = 0; i < questions.size(); i++) {
    const Question& q = questions[i];
    const Answer& a = answers[i];
    add(q.task, !q.rubric.empty() ? kReward : q.samples > 1 ? "pass@1" : "accuracy", a.score, q);
    for (const auto& [task, text] : q.shares)
      add(task, "share", a.text.find(text) != std::string::npos, q);
    greedy += q.samples == 1;
    ended += q.samples == 1 && a.finish == Finish::stop_token;
    too_long += a.too_long && q.sample == 0;
  }
  if (too_long > 0) {
    std::fprintf(stderr, "note: %lld questions are longer than the context: not answered\n",
                 (long long)too_long);
  }
  std::vector<Result> results;
  for (const std::string& task : order) {
    const auto& [metric, scores] = tasks[task];
    const bool counted =
        metric != kReward && std::all_of(scores.begin(), scores.end(),
                                         [](double score) { return score == 0 || score == 1; });
    results.push_back(counted ? share(task, metric, std::count(scores.begin(), scores.end(), 1.),
                                      int64_t(scores.size()))
                              : mean(task, metric, scores));
  }
  if (!o.base && greedy > 0) results.push_back(share("end_of_turn", "share", ended, greedy));
  return results;
}

// The columns of --beside: their names, and the value of each task, from files that --json wrote.
Columns read_beside(const EvalOptions& o) {
  Columns columns;
  for (const std::string& pair : o.beside) {
    const auto [name, file] = split_task(pair);
    if (name.empty()) fail("--beside: found ", pair, ", expected NAME=FILE");
    const Json json = read_json(file);
    require(json.is_object(), file, ": found ", json_text(json), ", expected an object");
    std::map<std::string, double> values;
    for (const auto& [task, result] : json.items()) {
      values[task] = json_get<double>(result, "value", concat(file, ": ", task));
    }
    columns.emplace_back(name, values);
  }
  return columns;
}

// Prints a table, the earlier results on the left.
void report(const std::vector<Result>& results, const Columns& beside, const EvalOptions& o) {
  std::string header = format("%-24s %-14s", "task", "metric");
  for (const auto& other : beside) header += format(" %10s", other.first.c_str());
  print(header +
        format(" %10s  %-18s %7s\n", beside.empty() ? "value" : "now", "95 % interval", "items"));
  OrderedJson json = OrderedJson::object();
  for (const Result& r : results) {
    const bool share = r.metric != "bits_per_byte" && r.metric != kReward;
    const double unit = share ? 100 : 1;
    const int digits = share ? 1 : 4;
    const auto cell = [&](double value) {
      return format(" %*.*f%s", share ? 8 : 10, digits, unit * value, share ? " %" : "");
    };
    std::string line = format("%-24s %-14s", r.task.c_str(), r.metric.c_str());
    for (const auto& other : beside) {
      const auto found = other.second.find(r.task);
      line += found == other.second.end() ? format(" %10s", "-") : cell(found->second);
    }
    print(line + cell(r.value) +
          format(
              "  %-18s %7lld\n",
              format("%.*f to %.*f", digits, unit * r.ci95.low, digits, unit * r.ci95.high).c_str(),
              (long long)r.n));
    json[r.task] = {
        {"metric", r.metric}, {"value", r.value}, {"n", r.n}, {"ci95", {r.ci95.low, r.ci95.high}}};
    if (!r.left_out.is_null()) json[r.task]["left_out"] = r.left_out;
  }
  if (!o.json.empty()) write_json(o.json, json);
}

// Of --output, a line of JSON for each answer.
std::string answer_lines(const Tokenizer& tokenizer, const std::vector<Question>& questions,
                         const std::vector<Answer>& answers) {
  std::string lines;
  for (size_t i = 0; i < questions.size(); i++) {
    OrderedJson json{{"task", questions[i].task},
                     {"item", questions[i].where},
                     {"prompt", tokenizer.decode(questions[i].prompt)},
                     {"answer", answers[i].text},
                     {"tools", answers[i].tools},
                     {"finish", finish_name(answers[i].finish)}};
    if (questions[i].rubric.empty()) {
      json["right"] = answers[i].score == 1;
    } else {
      json["reward"] = answers[i].score;
    }
    lines += json_line(json);
  }
  return lines;
}

// ---------------------------------------------------------------------------------------------
// Log-probabilities of texts, which are packed end to end

struct ScoredText {
  std::vector<int> ids;  // at most window + 1
  size_t begin;          // index of the first id that is scored; at least 1
  double logp = 0;       // of the ids from there on, given the ids before
};

void score(Gpt& gpt, std::vector<ScoredText>& all, const std::string& task) {
  std::vector<Packed> batches;
  for (size_t i = 0; i < all.size(); i++) {
    const ScoredText& t = all[i];
    batch_with_room(batches, int64_t(t.ids.size()), kScoreTokens)
        .add(int(i), t.ids, t.ids.size() - 1, [&](size_t p) { return p >= t.begin; });
  }
  ProgressLine progress;
  for (const Packed& b : batches) {
    gpt.forward(b.batch(), Pass::score);
    const std::span<const float> logp = gpt.logp();
    for (size_t i = 0; i < b.members.size(); i++) {
      ScoredText& t = all[size_t(b.members[i])];
      for (size_t n = b.begin(i); n <= b.last(i); n++) t.logp += logp[n];
      if (!std::isfinite(t.logp)) fail(task, ": found a log-probability that is not finite");
    }
    if (stop_signal != 0) return;
    const size_t done = size_t(b.members.back()) + 1;
    progress.show(format("%s: %zu of %zu scored", task.c_str(), done, all.size()),
                  done == all.size());
  }
}

// ---------------------------------------------------------------------------------------------
// Multiple choice, as in lm-evaluation-harness (Gao et al. 2024). The model chooses the ending that
// has the highest log-probability behind the context (acc), or the highest log-probability divided
// by its number of characters (acc_norm).

// Encodes context and ending as one text. If the context alone has n ids, the ending's ids are
// those from the n-th on. Spaces at the end of the context belong to the ending.
ScoredText encode_choice(const TextModel& m, std::string context, const std::string& ending,
                         bool start, int window) {
  std::string rest = " " + ending;
  const size_t spaces = context.size() - (context.find_last_not_of(" \t\r\n") + 1);
  rest = context.substr(context.size() - spaces) + rest;
  context.resize(context.size() - spaces);
  std::vector<int> ids;
  if (start && m.document_start >= 0) ids.push_back(m.document_start);
  size_t begin = ids.size() + m.tokenizer.encode(context).size();
  m.tokenizer.encode(context + rest, ids);
  if (begin == 0 || begin >= ids.size()) {
    fail("a choice: found ", json_text(context + rest), ", expected text before and in the ending");
  }
  const size_t most = size_t(window) + 1;
  if (ids.size() > most) {  // the beginning of the context is cut off
    const size_t cut = ids.size() - most;
    ids.erase(ids.begin(), ids.begin() + int64_t(cut));
    begin = begin > cut + 1 ? begin - cut : 1;
  }
  return {std::move(ids), begin};
}

size_t characters(std::string_view text) {  // code points
  return size_t(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// `lines`: of --output, one more for each item.
std::vector<Result> choose(const TextModel& m, const std::string& task,
                           const std::vector<MultipleChoice>& all, bool norm, bool start,
                           int window, std::string& lines) {
  std::vector<ScoredText> scored;
  for (const MultipleChoice& c : all) {
    for (const std::string& e : c.endings) {
      scored.push_back(encode_choice(m, c.context, e, start, window));
    }
  }
  score(*m.gpt, scored, task);
  int64_t right = 0, right_norm = 0;
  size_t offset = 0;  // of the choice's first ending in `scored`
  for (const MultipleChoice& c : all) {
    std::vector<double> logp, normed;
    for (size_t i = 0; i < c.endings.size(); i++) {
      logp.push_back(scored[offset + i].logp);
      normed.push_back(logp[i] / double(characters(c.endings[i])));
    }
    const auto best = [](const std::vector<double>& of) {
      return size_t(std::max_element(of.begin(), of.end()) - of.begin());
    };
    right += best(logp) == c.right;
    right_norm += best(normed) == c.right;
    offset += c.endings.size();
    OrderedJson json{{"task", task},         {"item", c.where},
                     {"prompt", c.context},  {"choices", c.endings},
                     {"logp", logp},         {"expected", c.right},
                     {"chosen", best(logp)}, {"right", best(logp) == c.right}};
    if (norm) json["chosen_norm"] = best(normed), json["right_norm"] = best(normed) == c.right;
    lines += json_line(json);
  }
  std::vector<Result> results;
  const int64_t n = int64_t(all.size());
  if (norm) results.push_back(share(task, "acc_norm", right_norm, n));
  results.push_back(share(norm ? task + "_acc" : task, "acc", right, n));
  return results;
}

// ---- the files of HellaSwag, ARC and MMLU. The texts are those of lm-evaluation-harness 0.4.13,
// byte for byte.

void replace_all(std::string& text, std::string_view old_part, std::string_view new_part) {
  for (size_t i = 0; (i = text.find(old_part, i)) != std::string::npos; i += new_part.size()) {
    text.replace(i, old_part.size(), new_part);
  }
}

// HellaSwag's texts come from WikiHow, with markup in brackets.
std::string clean_hellaswag(std::string_view raw) {
  std::string text(strip(raw)), out;
  replace_all(text, " [title]", ". ");
  for (size_t i = 0; i < text.size(); i++) {
    const size_t close = text[i] == '[' ? text.find(']', i) : std::string::npos;
    if (close != std::string::npos && text.find('\n', i) > close) {
      i = close;
    } else {
      out += text[i];
    }
  }
  replace_all(out, "  ", " ");
  return out;
}

MultipleChoice read_hellaswag(const Record& record) {
  expect_fields(record, {"activity_label", "ctx_a", "ctx_b", "endings", "label"},
                "HellaSwag's \"activity_label\", \"ctx_a\", \"ctx_b\", \"endings\" and \"label\"");
  const std::string& where = record.where;
  const Json json = json_of(record);
  MultipleChoice c{.where = where};
  c.context = clean_hellaswag(json_get<std::string>(json, "activity_label", where) + ": " +
                              json_get<std::string>(json, "ctx_a", where) + " " +
                              capitalize(json_get<std::string>(json, "ctx_b", where)));
  for (const std::string& e : json_get<Strings>(json, "endings", where)) {
    c.endings.push_back(clean_hellaswag(e));
  }
  const Json label = json_get<Json>(json, "label", where);  // 3 or "3"
  const std::string digits = label.is_string() ? label.get<std::string>() : label.dump();
  c.right = digits.size() == 1 ? size_t(digits[0] - '0') : c.endings.size();
  if (c.right >= c.endings.size()) {
    fail(where, ": label: found ", json_text(label), ", expected 0 to ", c.endings.size() - 1);
  }
  return c;
}

// {"question", "choices": {"text": [...], "label": [...]}, "answerKey"}, or the first release's
// {"question": {"stem", "choices": [{"text", "label"}...]}, "answerKey"}.
MultipleChoice read_arc(const Record& record) {
  expect_fields(record, {"question", "answerKey"},
                "ARC's \"question\", \"choices\" and \"answerKey\"");
  const std::string& where = record.where;
  const Json json = json_of(record);
  const Json question = json_get<Json>(json, "question", where);
  const Json& source = question.is_object() ? question : json;
  const Json choices = json_get<Json>(source, "choices", where);
  MultipleChoice c{.where = where};
  Strings labels;
  if (choices.is_array()) {
    for (const Json& item : choices) {
      c.endings.push_back(json_get<std::string>(item, "text", where));
      labels.push_back(json_get<std::string>(item, "label", where));
    }
  } else {
    c.endings = json_get<Strings>(choices, "text", where + ": choices");
    labels = json_get<Strings>(choices, "label", where + ": choices");
  }
  const auto key = json_get<std::string>(json, "answerKey", where);
  c.right = size_t(std::find(labels.begin(), labels.end(), key) - labels.begin());
  require(c.right < c.endings.size() && labels.size() == c.endings.size(), where,
          ": answerKey: found ", key, ", expected a choice's label");
  c.context = "Question: " +
              json_get<std::string>(source, question.is_object() ? "stem" : "question", where) +
              "\nAnswer:";
  return c;
}

// {"question", "subject", "choices": [...], "answer": 2 or "C"}, or the choices under A, B, C and
// D. The endings are the letters.
MultipleChoice read_mmlu(const Record& record) {
  expect_fields(record, {"question", "subject", "answer"},
                "MMLU's \"question\", \"subject\", \"choices\" and \"answer\"");
  const std::string& where = record.where;
  const Json json = json_of(record);
  Strings choices;
  if (json.contains("choices") || !json.contains("A")) {
    choices = json_get<Strings>(json, "choices", where);
  } else {
    for (std::string key = "A"; json.contains(key); key[0]++) {
      choices.push_back(json_get<std::string>(json, key, where));
    }
  }
  need(choices.size() <= 26, where + ": choices", choices.size(), "at most 26");
  MultipleChoice c{.where = where, .subject = json_get<std::string>(json, "subject", where)};
  c.context = std::string(strip(json_get<std::string>(json, "question", where)));
  for (const std::string& choice : choices) {
    const char letter = char('A' + c.endings.size());
    c.context += concat("\n", letter, ". ", choice);
    c.endings.emplace_back(1, letter);
  }
  c.context += "\nAnswer:";
  const Json answer = json_get<Json>(json, "answer", where);
  const std::string letter = answer.is_string() ? answer.get<std::string>() : "";
  c.right = answer.is_number_unsigned() ? answer.get<size_t>()
            : letter.size() == 1        ? size_t(letter[0] - 'A')
                                        : c.endings.size();
  need(c.right < c.endings.size(), where + ": answer", json_text(answer),
       "a choice's number or letter");
  return c;
}

// The solved examples of MMLU are those of the question's subject.
void read_choices(Task& task, const EvalOptions& o) {
  const bool is_mmlu = task.name == "mmlu";
  const auto read = task.name == "hellaswag" ? read_hellaswag : is_mmlu ? read_mmlu : read_arc;
  const auto solved = [](const MultipleChoice& c) { return c.context + " " + c.endings[c.right]; };
  std::vector<std::pair<std::string, std::string>> examples;
  LeftOut ignored;
  if (!task.shots.empty()) {
    for_each_item(task.shots, 0, o, ignored, [&](const Record& record) {
      const MultipleChoice c = read(record);
      examples.emplace_back(c.subject, solved(c));
    });
  }
  for_each_item(task.path, o.limit, o, task.left_out,
                [&](const Record& record) { task.choices.push_back(read(record)); });
  const bool own = is_its_own_shots(task);
  for (MultipleChoice& c : task.choices) {
    std::string before;
    if (is_mmlu) {
      std::string subject = c.subject;
      replace_all(subject, "_", " ");
      before =
          "The following are multiple choice questions (with answers) about " + subject + ".\n\n";
    }
    if (!task.shots.empty()) {
      before += shots_for(examples, c.subject, own ? solved(c) : "", task, o.shots);
    }
    c.context = before + c.context;
  }
}

std::vector<Result> multiple_choice(const TextModel& m, const Task& task, int window,
                                    const EvalOptions& o, std::string& lines) {
  return choose(m, task.name, task.choices, task.name != "mmlu", !o.no_start, window, lines);
}

// ---------------------------------------------------------------------------------------------
// Bits per byte of documents. A document of more than `window` tokens is scored in windows of that
// many. Each window also reads the token before it. The last window begins earlier, so that it is
// as long; every token is scored once.

std::vector<Result> bits_per_byte(const TextModel& m, const Task& task, int window,
                                  const EvalOptions& o) {
  std::vector<ScoredText> windows;
  std::vector<double> bytes;  // of each window
  RecordOptions options{.skip_bad_lines = o.records.skip_bad_lines};
  const auto key = o.records.names.find("text");  // other fields are those of other tasks
  if (key != o.records.names.end()) options.names.insert(*key);
  DocumentReader reader({Input(task.path)}, options);
  std::string text;
  int documents = 0;
  for (DocumentPart part; (o.limit == 0 || documents < o.limit) && reader.next(part);) {
    if (part.begins) text.clear();
    text += part.text;
    if (!part.ends) continue;
    documents++;
    std::vector<int> ids;
    if (!o.no_start && m.document_start >= 0) ids.push_back(m.document_start);
    m.tokenizer.encode(text, ids);
    const size_t T = size_t(window);
    for (size_t done = 1; done < ids.size();) {  // the first token is not scored
      const size_t end = std::min(done + T, ids.size());
      const size_t begin = end > T + 1 ? end - T - 1 : 0;
      windows.push_back({{ids.begin() + int64_t(begin), ids.begin() + int64_t(end)}, done - begin});
      double n = 0;
      for (size_t i = done; i < end; i++) n += double(m.tokenizer.token_bytes(ids[i]).size());
      bytes.push_back(n);
      done = end;
    }
  }
  if (windows.empty()) fail(task.path, ": found no text of two tokens or more");
  const LeftOut& left_out = reader.left_out();
  std::fputs((left_out.text(documents + left_out.total()) + reader.divider_note(false)).c_str(),
             stderr);
  score(*m.gpt, windows, task.name);
  // A ratio of two sums over windows; the variance of a ratio estimator (Cochran 1977, 2.9).
  double bits = 0, all_bytes = 0, squares = 0;
  for (size_t i = 0; i < windows.size(); i++) {
    bits -= windows[i].logp / std::log(2.);
    all_bytes += bytes[i];
  }
  const double ratio = bits / all_bytes, n = double(windows.size());
  for (size_t i = 0; i < windows.size(); i++) {
    const double d = -windows[i].logp / std::log(2.) - ratio * bytes[i];
    squares += d * d;
  }
  const double half = n > 1 ? 1.96 * std::sqrt(n / (n - 1) * squares) / all_bytes : 0;
  return {{task.name, "bits_per_byte", ratio, documents, {ratio - half, ratio + half}}};
}

// ---------------------------------------------------------------------------------------------
// info: what a model is, without loading its weights

struct InfoOptions {
  std::string model, json, device = "auto";
  int context = 0;  // of the estimates of memory; 0: the model's, 4,096 at most
};

// Tensors of one type in the model's files.
struct StoredType {
  int64_t tensors = 0, bytes = 0;
};

std::map<std::string, StoredType> stored_types(const std::filesystem::path& dir) {
  std::map<std::string, StoredType> types;
  const auto add = [&](const std::string& name, int64_t bytes) {
    types[name].tensors++, types[name].bytes += bytes;
  };
  if (GgufFile::is_gguf(dir)) {
    const GgufFile file(dir);
    for (const GgufTensor& t : file.tensors())
      add(lower_ascii(gguf_blocks(t.type).name), t.bytes());
    return types;
  }
  const SafeTensors disk = has_adapters(dir) ? SafeTensors(dir / "adapter_model.safetensors")
                                             : SafeTensors::of_model(dir);
  for (const auto& [name, t] : disk.tensors()) {
    add(lower_ascii(t.dtype), t.count * dtype_bytes(t.dtype));
  }
  return types;
}

OrderedJson parameters_json(const ParamTable& table) {
  std::map<Kind, int64_t> sizes;
  for (const Tensor& t : table.tensors) sizes[t.kind] += t.size();
  OrderedJson json{{"total", table.parameters()},
                   {"embedding", sizes[Kind::embedding]},
                   {"matrices", sizes[Kind::matrix]}};
  if (sizes[Kind::position] > 0) json["positions"] = sizes[Kind::position];
  if (sizes[Kind::head] > 0) json["head"] = sizes[Kind::head];
  json["vectors"] = sizes[Kind::vector];
  return json;
}

OrderedJson shape_json(const Config& c) {
  return {
      {"layers", c.L},     {"channels", c.C},     {"heads", c.NH},     {"key_value_heads", c.NKV},
      {"head_size", c.HS}, {"feed_forward", c.F}, {"vocabulary", c.V}, {"context", c.T},
      {"tied", c.tied}};
}

OrderedJson rope_json(const Config& c) {
  if (c.family == Family::gpt2) return nullptr;  // learned positions
  OrderedJson json{{"theta", c.rope.theta}};
  if (c.rope.factor > 0) json["factor"] = c.rope.factor;
  if (has_llama3_rope(c)) {
    json["low_freq_factor"] = c.rope.low_freq_factor;
    json["high_freq_factor"] = c.rope.high_freq_factor;
    json["original_context"] = c.rope.original_T;
  }
  json["type"] = c.rope.type();
  return json;
}

OrderedJson end_tokens_info(const Config& c, const Tokenizer* tokenizer) {
  OrderedJson list = OrderedJson::array();
  for (const int id : c.all_end_tokens()) {
    OrderedJson token{{"id", id}};
    if (tokenizer) token["token"] = tokenizer->token_bytes(id);
    list.push_back(token);
  }
  return list;
}

OrderedJson tokenizer_info(const Tokenizer& tokenizer) {
  const TokenizerData& data = tokenizer.data();
  const std::string pattern = data.pre_tokenizer.description();
  OrderedJson specials = OrderedJson::array();
  for (const AddedToken& t : data.added) {
    if (t.special) specials.push_back({{"id", t.id}, {"token", t.text}});
  }
  // A pattern without a name is described in several lines.
  return {{"tokens", tokenizer.vocab_size()},
          {"pattern", pattern.find('\n') == std::string::npos ? pattern : "another"},
          {"special_tokens", specials}};
}

// null: the model has none.
OrderedJson template_info(const std::filesystem::path& place, const std::string& text,
                          const Tokenizer* tokenizer) {
  if (text.empty()) return nullptr;
  std::string hash;
  for (const unsigned char byte : sha256(text)) hash += format("%02x", byte);
  OrderedJson json{
      {"bytes", text.size()},
      {"sha256", hash},
      {"ours", without_generation_tags(text) == without_generation_tags(kChatTemplate)}};
  if (!tokenizer) return json;
  try {
    const ChatTemplate chat(*tokenizer, text, place.string());
    const int end = chat.find_end_of_turn();
    json["end_of_turn"] = end >= 0 ? OrderedJson(tokenizer->token_bytes(end)) : OrderedJson();
    json["stop_string"] = chat.stop_string();
    json["tools"] = chat.has_tools();
  } catch (const Error& e) {  // the model may be used with another one
    json["error"] = e.what();
  }
  return json;
}

// Bytes: to write one text with a cache of `context` positions, by --weights; and to train, with
// the stages' usual batch in memory.
OrderedJson memory_json(const std::filesystem::path& dir, const Config& c, Device device,
                        int context) {
  OrderedJson run = OrderedJson::object();
  const ParamTable table = make_table(c);
  const DecodePlan decode{.rows = 1, .tokens = std::min(context, 256), .positions = context};
  if (c.head == Head::lm) {
    for (const char* type : {"auto", "f32", "bf16", "q8_0"}) {
      const GptOptions options{.device = device,
                               .mode = Mode::inference,
                               .decode = decode,
                               .weights = weight_types(dir, c, table, type)};
      run[type] = plan_memory(c, options).total();
    }
  }
  const GptOptions train{.device = device, .mode = Mode::train, .batch_tokens = context};
  OrderedJson json{{"context", context}, {"run", run}, {"train", plan_memory(c, train).total()}};
  if (c.head == Head::lm) {
    GptOptions lora = train;
    lora.lora = {.rank = 16, .alpha = 32};
    json["train_lora_16"] = plan_memory(c, lora).total();
  }
  return json;
}

OrderedJson model_info(const std::filesystem::path& dir, const InfoOptions& o) {
  const Config c = load_config(dir);
  OrderedJson json{{"model", dir.string()},
                   {"architecture", architecture_name(c)},
                   {"family", kModelTypes[int(c.family)]},
                   {"parameters", parameters_json(make_table(c))},
                   {"shape", shape_json(c)},
                   {"rope", rope_json(c)}};
  OrderedJson stored = OrderedJson::object();
  for (const auto& [name, type] : stored_types(dir)) {
    stored[name] = {{"tensors", type.tensors}, {"bytes", type.bytes}};
  }
  json["stored"] = stored;
  if (has_adapters(dir)) {
    const Adapters adapters(dir, c);
    json["adapters"] = {{"rank", adapters.lora.rank},
                        {"alpha", adapters.lora.alpha},
                        {"base", adapters.base().dir.string()},
                        {"base_hash", adapters.base().hash}};
  }
  if (c.head == Head::scalar) json["reward_shift"] = c.reward_shift;
  const std::filesystem::path place = tokenizer_place(dir);
  std::optional<Tokenizer> tokenizer;
  try {
    tokenizer = Tokenizer::load(place);
    json["tokenizer"] = tokenizer_info(*tokenizer);
  } catch (const Error& e) {  // a model may come without one, or with one of another kind
    json["tokenizer"] = {{"error", e.what()}};
  }
  json["end_tokens"] = end_tokens_info(c, tokenizer ? &*tokenizer : nullptr);
  json["chat_template"] =
      template_info(place, chat_template(place), tokenizer ? &*tokenizer : nullptr);
  const int context = o.context > 0 ? std::min(o.context, c.T) : std::min(c.T, 4096);
  json["memory"] = memory_json(dir, c, parse_device(o.device), context);
  if (std::filesystem::exists(dir / "trainer_state.json")) {
    const Json state = read_json(dir / "trainer_state.json");
    json["run"] = {{"stage", state.value("stage", "")}, {"step", state.value("step", 0)}};
  }
  return json;
}

// ---- the same as a table

// "<|im_end|> (2), <|endoftext|> (0)", at most `most` of them.
std::string tokens_text(const OrderedJson& tokens, size_t most) {
  std::string text;
  for (size_t i = 0; i < std::min(most, tokens.size()); i++) {
    const std::string name =
        tokens[i].contains("token") ? visible_token(tokens[i]["token"].get<std::string>()) : "";
    text += concat(i ? ", " : "", name.empty() ? "id" : name, " ", tokens[i]["id"]);
  }
  if (tokens.size() > most) text += concat(" and ", tokens.size() - most, " more");
  return text.empty() ? "none" : text;
}

std::string template_text(const OrderedJson& j) {
  if (j.is_null()) return "none";
  std::string text = j["ours"] == true ? "this project's ChatML"
                                       : concat(j["bytes"], " bytes, SHA-256 ",
                                                j["sha256"].get<std::string>().substr(0, 12));
  if (j.contains("error")) return concat(text, "; ", j["error"].get<std::string>());
  if (!j.contains("tools")) return text;
  const bool has_token = !j["end_of_turn"].is_null();
  const std::string end = j[has_token ? "end_of_turn" : "stop_string"].get<std::string>();
  text += concat("; answers end with ", has_token ? visible_token(end) : json_text(Json(end)));
  return text + (j["tools"] == true ? "; declares tools" : "; declares no tools");
}

std::string info_text(const OrderedJson& j) {
  std::string text;
  const auto line = [&](const char* name, const std::string& value) {
    text += format("%-12s%s\n", name, value.c_str());
  };
  const auto n = [](const OrderedJson& value) { return count_text(value.get<double>()); };
  const auto bytes = [](const OrderedJson& value) { return bytes_text(value.get<double>()); };
  line("model", j["model"].get<std::string>());
  line("shape", concat(j["architecture"].get<std::string>(), ": ", j["shape"]["layers"],
                       " layers of ", n(j["shape"]["channels"]), ", ", j["shape"]["heads"],
                       " heads of ", j["shape"]["head_size"], ", ", j["shape"]["key_value_heads"],
                       " of keys and values, feed-forward ", n(j["shape"]["feed_forward"])));
  std::string parameters = n(j["parameters"]["total"]) + ":";
  for (const auto& [kind, size] : j["parameters"].items()) {
    if (kind == "total") continue;
    parameters += concat(parameters.back() == ':' ? " " : ", ", n(size), " ", kind);
    if (kind == "embedding" && j["shape"]["tied"] == true) parameters += " (also the head)";
  }
  line("parameters", parameters);
  std::string stored;
  for (const auto& [type, of_type] : j["stored"].items()) {
    stored += concat(stored.empty() ? "" : ", ", bytes(of_type["bytes"]), " of ", type, " in ",
                     of_type["tensors"], " tensors");
  }
  line("stored", stored);
  line("context", n(j["shape"]["context"]) + " tokens");
  if (!j["rope"].is_null()) {
    std::string rope = format("%s, theta %.10g", j["rope"]["type"].get<std::string>().c_str(),
                              j["rope"]["theta"].get<double>());
    if (j["rope"].contains("factor"))
      rope += format(", factor %.10g", j["rope"]["factor"].get<double>());
    if (j["rope"].contains("original_context")) {
      rope += concat(", trained on ", n(j["rope"]["original_context"]), " tokens");
    }
    line("rope", rope);
  }
  if (j["tokenizer"].contains("error")) {
    line("tokenizer", j["tokenizer"]["error"].get<std::string>());
  } else {
    line("tokenizer",
         concat(n(j["tokenizer"]["tokens"]), " tokens of ", n(j["shape"]["vocabulary"]),
                " rows, split pattern ", j["tokenizer"]["pattern"].get<std::string>()));
    line("specials", tokens_text(j["tokenizer"]["special_tokens"], 8));
  }
  line("ends with", tokens_text(j["end_tokens"], 8));
  line("template", template_text(j["chat_template"]));
  if (j.contains("adapters")) {
    const std::string hash = j["adapters"]["base_hash"].get<std::string>();
    line("adapters",
         concat("rank ", j["adapters"]["rank"], ", alpha ",
                format("%g", j["adapters"]["alpha"].get<double>()), ", added to ",
                j["adapters"]["base"].get<std::string>(), hash.empty() ? "" : " of hash " + hash));
  }
  if (j.contains("reward_shift")) {
    line("reward",
         format("the value at the end of an answer, plus %g", j["reward_shift"].get<double>()));
  }
  if (j.contains("run")) {
    line("run", concat(j["run"]["stage"].get<std::string>(), ", step ", n(j["run"]["step"])));
  }
  const OrderedJson& memory = j["memory"];
  std::string run;
  for (const auto& [type, size] : memory["run"].items()) {
    run += concat(run.empty() ? "--weights " : ", ", type, " ", bytes(size));
  }
  const std::string context = n(memory["context"]) + " tokens";
  if (!run.empty()) line("to run", run + ": one text of " + context);
  std::string train = "AdamW " + bytes(memory["train"]);
  if (memory.contains("train_lora_16")) {
    train += ", LoRA of rank 16 " + bytes(memory["train_lora_16"]);
  }
  line("to train", train + ": " + context + " at once");
  return text;
}

int info(const InfoOptions& o) {
  need(o.context >= 0, "--context", o.context, "0 or more");
  use_one_checkpoint(o.model, [&](const std::filesystem::path& dir, const auto& expect_same) {
    const OrderedJson json = model_info(dir, o);
    expect_same();
    if (o.json == "-") return print(json_line(json));
    if (!o.json.empty()) write_file(o.json, json_line(json));
    print(info_text(json));
  });
  return 0;
}

// ---------------------------------------------------------------------------------------------
// The command line

void add_talk_flags(CLI::App& app, TalkOptions& t) {
  add_model_flags(app, t.model);
  app.get_option("model")->required(false);
  app.add_flag("--base", t.base, "the model is a base model: it continues the text that you type");
  CLI::Option* system =
      app.add_option("--system", t.system, "the system message, \\n: line break; empty: none");
  add_raw_flag(app, {system});
  app.add_flag("--calculator", t.calculator, "the assistant may use a calculator");
  app.add_option("--documents", t.documents,
                 "file of documents in which the assistant may search: records with \"text\", or "
                 "plain text; empty: no search");
  add_template_flags(app, t.chat_template);
  app.add_option("--thinking", t.thinking,
                 "reasoning between <think> and </think>: show; hide: it is not printed; or cut: "
                 "it is left out of the conversation too, which goes on and is saved without it");
  app.add_option("--max-tokens", t.max_tokens,
                 "longest answer, in tokens; 0: as many as the context holds, 100 with --base");
  add_sampling_flags(app, t.sampling);
}

void add_generate_flags(CLI::App& app, GenerateOptions& g) {
  add_model_flags(app, g.model);
  CLI::Option* prompt = app.add_option(
      "--prompt", g.prompt, "text to continue, \\n: line break; empty: begin a new document");
  app.add_option(
         "--prompts", g.prompts,
         "file of prompts, -: standard input: a text on each line, or the \"prompt\" of records "
         "(JSON lines, a JSON array or parquet), as the content tells")
      ->excludes(prompt);
  app.add_option("-o,--output", g.output,
                 "file for the results, JSONL: prompt, completion, tokens, logp, finish; empty: "
                 "print them");
  app.add_option("--max-tokens", g.max_tokens, "longest text, in new tokens");
  app.add_option("--samples", g.samples, "texts for each prompt");
  CLI::Option* stop =
      app.add_option("--stop", g.stop,
                     "end before this text, \\n: line break; may be given several times")
          ->allow_extra_args(false);
  add_raw_flag(app, {prompt, stop});
  add_record_flags(app, g.records);
  add_sampling_flags(app, g.sampling);
  add_batch_flags(app, g.rows, g.cache_mb);
  app.add_flag("--stats", g.stats,
               "print the speed in tokens a second and the memory, on standard error");
}

void add_eval_flags(CLI::App& app, EvalOptions& e) {
  add_model_flags(app, e.model);
  app.add_option("--tasks", e.tasks,
                 "files of items, and NAME=FILE where NAME is hellaswag, arc, arc_easy, "
                 "arc_challenge, mmlu or gsm8k (JSON lines, a JSON array or parquet), or "
                 "bits_per_byte (documents)")
      ->required()
      ->delimiter(',');
  app.add_flag("--base", e.base,
               "the model is a base model: ask the items' \"prompt\", not their \"messages\"");
  app.add_option("--shots", e.shots, "solved examples before each question of NAME=FILE tasks");
  app.add_option("--shots-from", e.shots_from,
                 "NAME=FILE, the solved examples of a task: the first ones of the file, for mmlu "
                 "the first ones of the question's subject")
      ->delimiter(',');
  app.add_option("--documents", e.documents,
                 "file of documents for the search tool; empty: no search");
  add_template_flags(app, e.chat_template);
  app.add_option("--limit", e.limit, "items of each task, at most; 0: all");
  app.add_option("--max-tokens", e.max_tokens,
                 "longest answer, in tokens; 0: as the items say, 256 for gsm8k");
  app.add_flag("--no-start", e.no_start,
               "no <|endoftext|> before documents, as in lm-evaluation-harness with GPT-2");
  add_record_flags(app, e.records);
  app.add_option("--beside", e.beside, "NAME=FILE: earlier results of --json, one column each");
  app.add_option("--json", e.json, "file for the results, JSON; empty: none");
  app.add_option("-o,--output", e.output, "file for every answer, JSONL; empty: none");
  add_batch_flags(app, e.rows, e.cache_mb);
}

void add_export_flags(CLI::App& app, ExportOptions& o, int& shard_mb) {
  app.add_option("model", o.model, "run, model directory, adapters, or .gguf file")->required();
  app.add_option("-o,--output", o.out,
                 "FILE.gguf, for llama.cpp, LM Studio and Ollama; or a directory for transformers, "
                 "vLLM and MLX")
      ->required();
  app.add_option("--type", o.type,
                 "of the matrices: f32, f16, bf16, and in .gguf files q8_0, q4_0");
  app.add_option("--name", o.name, "of the model in a .gguf file; empty: its family and size");
  app.add_flag("--ollama", o.ollama, "also write a Modelfile beside the .gguf file");
  app.add_option("--shard-mb", shard_mb,
                 "megabytes of a directory's largest file: larger models become several");
  app.add_flag("--overwrite", o.overwrite, "replace what was exported before");
}

void add_info_flags(CLI::App& app, InfoOptions& o) {
  app.add_option("model", o.model, "run, model directory, adapters, or .gguf file")->required();
  app.add_option(
      "--context", o.context,
      "tokens of a text, for the memory it takes; 0: the model's context, 4,096 at most");
  app.add_option("--device", o.device, "auto, cpu or cuda: whose memory");
  app.add_option("--json", o.json, "file for the same as JSON; -: print it instead; empty: none");
}

int chat(int argc, char** argv) {
  CLI::App app("Talks to a model in the terminal: ./chat DIR");
  app.option_defaults()->always_capture_default();
  app.require_subcommand(0, 1);
  TalkOptions t;
  GenerateOptions g;
  EvalOptions e;
  add_talk_flags(app, t);
  CLI::App* generate_command =
      app.add_subcommand("generate", "continue texts, as a base model does");
  add_generate_flags(*generate_command, g);
  CLI::App* eval_command = app.add_subcommand("eval", "ask questions and mark the answers");
  add_eval_flags(*eval_command, e);
  ExportOptions x;
  int shard_mb = int(x.shard_bytes / 1'000'000);
  CLI::App* export_command =
      app.add_subcommand("export", "write a model for other programs: GGUF or Hugging Face");
  add_export_flags(*export_command, x, shard_mb);
  InfoOptions i;
  CLI::App* info_command = app.add_subcommand("info", "show what a model is and what it takes");
  add_info_flags(*info_command, i);
  const std::vector<HelpPage> pages = {
      {&app,
       {"model", "--base", "--system", "--calculator", "--documents", "--template", "--thinking",
        "--max-tokens", "--temperature", "--top-p", "--seed"}},
      {generate_command,
       {"model", "--prompt", "--prompts", "--map", "--output", "--max-tokens", "--samples",
        "--stop", "--temperature", "--top-p", "--seed"}},
      {eval_command,
       {"model", "--tasks", "--map", "--base", "--shots", "--shots-from", "--limit", "--max-tokens",
        "--beside", "--json", "--output"}},
      {export_command, {"model", "--output", "--type", "--name", "--ollama", "--overwrite"}},
      {info_command, {"model", "--context", "--json"}}};
  constexpr RenamedFlag kRenamed[] = {{"--tokens", "--max-tokens"}};
  if (!parse_flags(app, argc, argv, pages, kRenamed)) return 0;
  if (generate_command->parsed()) return generate(g);
  if (eval_command->parsed()) return evaluate(e);
  if (info_command->parsed()) return info(i);
  if (export_command->parsed()) {
    need(shard_mb >= 1, "--shard-mb", shard_mb, "at least 1");
    x.shard_bytes = int64_t(shard_mb) * 1'000'000;
    return export_model(x), 0;
  }
  if (t.model.path.empty()) fail("model is required (see --help)");
  return talk(t);
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  std::signal(SIGPIPE, SIG_IGN);  // print() sees the error instead
  cake::watch_signals();
  return cake::guarded_main([&] { return cake::chat(argc, argv); });
}
