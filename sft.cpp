// Stage 3, fine-tuning: a base model and conversations to an assistant.
//
//     JSON lines -> parse, check -> chat template -> ids, trained or not     (Examples)
//         -> mixture and order of an epoch -> bins of the context            (Stream)
//         -> forward_backward with -1/N on trained tokens, 0 elsewhere -> update
//
// This is the one idea of the whole project with the simplest weights: every position of a
// conversation goes through the network, and the loss counts only those whose next token the
// assistant is to write: its contents and its ends of turn. N is the number of trained tokens of
// the whole optimizer step, whatever the micro-batches, so that accumulation changes nothing and
// each trained token counts the same.
//
// Examples are packed end to end into bins of the context, best fit decreasing, and attention and
// positions restart at each, so that a packed batch computes what its examples would alone. A bin
// may end short of the context: nothing is padded.
//
// With --lora the model stays as it is: small matrices beside its own are trained and saved, which
// every stage loads as it loads a model, and --merge adds to it.
//
// Sources: InstructGPT, Ouyang et al. 2022; best-fit packing, Ding et al. 2024 (Fewer Truncations
// Improve Language Modeling); ChatML, OpenAI 2023; weights of new tokens at the mean of the old,
// Hewitt 2021; LoRA, Hu et al. 2021, its alpha and learning rate, Schulman et al. 2025 (LoRA
// Without Regret).
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/gpt.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// Examples: what there is to learn from, as ids

// A file and how many times an epoch goes over it: "path" or "path:weight".
struct Source {
  std::string path;
  double weight = 1;
};

Source parse_source(const std::string& text) {
  const size_t colon = text.rfind(':');
  std::error_code ignored;
  if (colon == std::string::npos || std::filesystem::exists(text, ignored)) return {text};
  Source source{text.substr(0, colon)};
  const char *begin = text.data() + colon + 1, *end = text.data() + text.size();
  const auto read = std::from_chars(begin, end, source.weight);
  if (read.ec != std::errc() || read.ptr != end || !(source.weight > 0) || source.weight > 1e6) {
    fail("--data ", text, ": found weight \"", text.substr(colon + 1),
         "\", expected a number above 0");
  }
  return source;
}

enum class TooLong {
  drop,
  cut,  // to the context, from the front
};

// Examples end to end. Example i is ids[starts[i], starts[i + 1]) with one id more than it has
// positions: position p reads id p, and is to predict id p + 1 if that one is trained.
struct Examples {
  std::vector<int> ids;
  std::vector<bool> trained;  // of each id
  std::vector<int64_t> starts = {0};
  std::vector<int> trained_counts;  // of each example
  std::vector<float> weights;       // times an epoch

  int size() const { return int(trained_counts.size()); }
  int positions(int i) const { return int(starts[size_t(i) + 1] - starts[size_t(i)]) - 1; }
  int64_t all_positions() const { return int64_t(ids.size()) - size(); }
  int64_t all_trained() const {
    return std::accumulate(trained_counts.begin(), trained_counts.end(), int64_t(0));
  }
  std::span<const int> ids_of(int i) const {
    return std::span(ids).subspan(size_t(starts[size_t(i)]), size_t(positions(i)) + 1);
  }
  bool is_trained(int i, int p) const { return trained[size_t(starts[size_t(i)] + p)]; }

  void add(const Rendered& r, float weight) {
    ids.insert(ids.end(), r.ids.begin(), r.ids.end());
    trained.insert(trained.end(), r.trained.begin(), r.trained.end());
    starts.push_back(int64_t(ids.size()));
    trained_counts.push_back(int(std::count(r.trained.begin(), r.trained.end(), true)));
    weights.push_back(weight);
  }
  uint64_t hash() const {  // of everything that decides a run
    uint64_t h = mix64(ids.size());
    for (size_t i = 0; i < ids.size(); i++) h = mix64(h ^ (uint64_t(ids[i]) << 1 | trained[i]));
    for (const int64_t s : starts) h = mix64(h ^ uint64_t(s));
    for (const float w : weights) h = mix64(h ^ uint64_t(double(w) * 4096));
    return h;
  }
};

struct ReadReport {
  int64_t conversations = 0, completions = 0;  // read
  int64_t cut = 0, dropped = 0;                // longer than the context
  int longest = 0;                             // positions
};

// A line's text to ids: {"messages", "tools"} or {"prompt", "completion"}.
//
// A prompt with its completion is a document: <|endoftext|> prompt completion <|endoftext|>, of
// which completion and end are trained. They are encoded apart, as when the prompt is given and the
// rest generated.
struct Record {
  std::optional<Conversation> conversation;
  std::string prompt, completion;
};

Record parse_record(simdjson::dom::object object, const JsonLines& lines) {
  const std::string where = lines.where();
  simdjson::dom::element ignored;
  const auto has = [&](const char* key) { return !object.at_key(key).get(ignored); };
  Record record;
  if (has("messages")) {
    record.conversation = parse_conversation(object, where);
    check_conversation(*record.conversation, where);
  } else if (has("prompt") && has("completion")) {
    record.prompt = lines.get_string(object, "prompt");
    record.completion = lines.get_string(object, "completion");
    if (record.completion.empty()) fail(where, ": completion: found nothing, expected text");
  } else {
    fail(where, ": found neither \"messages\" nor \"prompt\" and \"completion\"");
  }
  return record;
}

Rendered render(const Tokenizer& tokenizer, const Record& record) {
  if (record.conversation) return render_chat(tokenizer, *record.conversation);
  Rendered r;
  r.ids.push_back(tokenizer.end_of_text());
  tokenizer.encode(record.prompt, r.ids);
  r.trained.resize(r.ids.size(), false);
  tokenizer.encode(record.completion, r.ids);
  r.ids.push_back(tokenizer.end_of_text());
  r.trained.resize(r.ids.size(), true);
  return r;
}

// Cuts what is longer than the context, and what stands behind the last trained token: it teaches
// nothing. False when nothing trained is left, or when `too_long` says to drop it.
bool trim(Rendered& r, int context, TooLong too_long, ReadReport& report) {
  const auto drop_tail = [&r] {
    while (!r.trained.empty() && !r.trained.back()) r.trained.pop_back();
    r.ids.resize(r.trained.size());
  };
  drop_tail();
  report.longest = std::max(report.longest, int(r.ids.size()) - 1);
  if (int(r.ids.size()) <= context + 1) return true;
  if (too_long == TooLong::cut) {
    r.trained.resize(size_t(context) + 1);
    drop_tail();
  }
  const bool kept = too_long == TooLong::cut && !r.ids.empty();
  (kept ? report.cut : report.dropped)++;
  return kept;
}

// True for the share `fraction` of all examples: by a hash of their ids, so that equal ones are all
// held out or all trained on.
bool is_held_out(const Rendered& r, double fraction) {
  uint64_t h = mix64(0x5f7);
  for (const int id : r.ids) h = mix64(h ^ uint64_t(id));
  return uniform01(h) < fraction;
}

// Reads a file's lines: into `held_out` the share `val_fraction`, the rest into `examples`.
void read_examples(const Source& source, const Tokenizer& tokenizer, int context, TooLong too_long,
                   double val_fraction, Examples& examples, Examples& held_out,
                   ReadReport& report) {
  JsonLines lines{Input(source.path)};
  simdjson::dom::object object;
  std::vector<Record> records;
  std::vector<Rendered> rendered;
  int64_t read = 0;
  const auto flush = [&] {  // texts to ids by all threads, in the file's order
    rendered.assign(records.size(), {});
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t i = 0; i < records.size(); i++) rendered[i] = render(tokenizer, records[i]);
    for (Rendered& r : rendered) {
      const bool out = is_held_out(r, val_fraction);
      if (trim(r, context, too_long, report))
        (out ? held_out : examples).add(r, float(source.weight));
    }
    records.clear();
  };
  while (lines.next(object)) {
    records.push_back(parse_record(object, lines));
    const bool chat = records.back().conversation.has_value();
    read++;
    if ((chat ? report.conversations : report.completions)++ ==
        0) {  // an Error where it lacks them
      chat ? end_of_turn(tokenizer) : tokenizer.end_of_text();
    }
    if (records.size() == 4096) flush();
  }
  flush();
  if (read == 0) fail(source.path, ": found no examples, expected JSON lines");
}

// ---------------------------------------------------------------------------------------------
// Packing

// Bins of `capacity` positions, best fit decreasing: each example, the longest first, goes into the
// fullest bin that has room, the first made among equals. `order`: the examples; equal lengths keep
// it. No length is above the capacity.
std::vector<std::vector<int>> pack(std::vector<int> order, const Examples& examples, int capacity) {
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return examples.positions(a) > examples.positions(b); });
  std::vector<std::vector<int>> bins;
  std::set<std::pair<int, int>> room;  // (positions left, bin)
  for (const int example : order) {
    const int n = examples.positions(example);
    const auto fit = room.lower_bound({n, 0});
    int bin = int(bins.size()), left = capacity;
    if (fit == room.end()) {
      bins.emplace_back();
    } else {
      std::tie(left, bin) = *fit;
      room.erase(fit);
    }
    bins[size_t(bin)].push_back(example);
    if (left > n) room.insert({left - n, bin});
  }
  return bins;
}

// Bins as the engine takes them: their examples end to end.
struct Packed {
  std::vector<int> tokens, targets, doc_starts;
  int trained = 0;  // targets that are not -1

  void clear() { tokens.clear(), targets.clear(), doc_starts.clear(), trained = 0; }
  void add(const Examples& examples, int i) {
    const std::span<const int> ids = examples.ids_of(i);
    if (doc_starts.empty()) doc_starts.push_back(0);
    for (int p = 0; p < examples.positions(i); p++) {
      tokens.push_back(ids[size_t(p)]);
      const bool trains = examples.is_trained(i, p + 1);
      targets.push_back(trains ? ids[size_t(p) + 1] : -1);
      trained += trains;
    }
    doc_starts.push_back(int(tokens.size()));
  }
  Batch batch() const { return {tokens, targets, doc_starts}; }
  // dL/dlogp of the mean loss over `n` trained tokens, of which these are some.
  std::vector<float> weights(int64_t n) const {
    std::vector<float> w(targets.size());
    for (size_t i = 0; i < w.size(); i++) w[i] = targets[i] >= 0 ? -1 / float(n) : 0;
    return w;
  }
};

// Consecutive bins to micro-batches of at most `positions`; a bin is never divided.
std::vector<Packed> micro_batches(const Examples& examples, std::span<const std::vector<int>> bins,
                                  int64_t positions) {
  std::vector<Packed> batches;
  for (const std::vector<int>& bin : bins) {
    int64_t n = 0;
    for (const int i : bin) n += examples.positions(i);
    if (batches.empty() || int64_t(batches.back().tokens.size()) + n > positions) {
      batches.emplace_back();
    }
    for (const int i : bin) batches.back().add(examples, i);
  }
  return batches;
}

// Bins without end, an epoch after another, each packed and shuffled anew: a function of the
// examples, the seed and the place alone.
class Stream {
 public:
  struct State {
    int64_t epoch = 0, bin = 0;
  };
  Stream(const Examples& examples, int context, uint64_t seed)
      : examples_(examples), context_(context), seed_(seed) {}

  std::vector<int> next() {
    if (loaded_ != state_.epoch) bins_ = make_epoch(loaded_ = state_.epoch);
    std::vector<int> bin = bins_[size_t(state_.bin)];
    if (++state_.bin == int64_t(bins_.size())) state_ = {state_.epoch + 1, 0};
    return bin;
  }
  // An example of weight w comes floor(w) or ceil(w) times, over any epochs e of them floor(e w) or
  // ceil(e w) times.
  std::vector<std::vector<int>> make_epoch(int64_t epoch) const {
    std::vector<int> order;
    for (int i = 0; i < examples_.size(); i++) {
      const double w = examples_.weights[size_t(i)];
      const double phase = uniform01(mix64(seed_, hash64("phase"), uint64_t(i)));
      const double times =
          std::floor(double(epoch + 1) * w + phase) - std::floor(double(epoch) * w + phase);
      order.insert(order.end(), size_t(times), i);
    }
    Rng rng{mix64(seed_, hash64("order"), uint64_t(epoch))};
    const auto shuffle = [&rng](auto& list) {  // Fisher, Yates
      for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[rng.below(i)]);
    };
    shuffle(order);
    auto bins = pack(std::move(order), examples_, context_);
    shuffle(bins);
    if (bins.empty()) bins.push_back({int(rng.below(uint64_t(examples_.size())))});  // tiny weights
    return bins;
  }
  State state() const { return state_; }
  double epochs() const {  // seen so far
    return double(state_.epoch) +
           (state_.bin > 0 ? double(state_.bin) / double(make_epoch(state_.epoch).size()) : 0);
  }
  void set_state(State state) {
    const auto bins = int64_t(make_epoch(state.epoch).size());
    if (state.epoch < 0 || state.bin < 0 || state.bin >= bins) {
      fail("resume: found bin ", state.bin, " of epoch ", state.epoch, ", expected one of ", bins,
           ": the data is not what the run began with");
    }
    state_ = state;
  }

 private:
  const Examples& examples_;
  int context_;
  uint64_t seed_;
  State state_;
  int64_t loaded_ = -1;  // the epoch that bins_ are of
  std::vector<std::vector<int>> bins_;
};

// ---------------------------------------------------------------------------------------------
// Looking at examples

// An example's text, what is trained marked by colour or, without colours, by brackets.
std::string marked(const Tokenizer& tokenizer, const Rendered& r, bool colours) {
  std::string out;
  for (size_t i = 0; i < r.ids.size();) {
    const bool trained = r.trained[i];
    size_t end = i;
    while (end < r.ids.size() && r.trained[end] == trained) end++;
    const std::string text = tokenizer.decode(std::span(r.ids).subspan(i, end - i));
    if (colours) {
      out += (trained ? "\x1b[30;48;5;157m" : "\x1b[2m") + text + "\x1b[0m";
    } else {
      out += trained ? "[[" + text + "]]" : text;
    }
    i = end;
  }
  return out;
}

// ---------------------------------------------------------------------------------------------
// New tokens

// The rows of a matrix (old_rows, in) as (new_rows, in): those from `known` on, which no token has
// had so far, are the mean of the `known` ones: then a new token is at first as likely as an
// average one, and changes nothing else much.
std::vector<float> grow_rows(std::span<const float> old, int known, int new_rows, int in) {
  std::vector<float> rows(size_t(new_rows) * size_t(in));
  std::copy_n(old.begin(), size_t(known) * size_t(in), rows.begin());
  std::vector<double> mean(size_t(in), 0.);
  for (int r = 0; r < known; r++)
    for (int c = 0; c < in; c++) mean[size_t(c)] += double(old[size_t(r) * size_t(in) + size_t(c)]);
  for (int r = known; r < new_rows; r++)
    for (int c = 0; c < in; c++)
      rows[size_t(r) * size_t(in) + size_t(c)] = float(mean[size_t(c)] / known);
  return rows;
}

}  // namespace
}  // namespace cake

#ifndef CAKE_NO_MAIN
// =============================================================================================
// The run

#include <CLI/CLI.hpp>

#include "cake/checkpoint.h"
#include "cake/generate.h"
#include "cake/json.h"
#include "cake/schedule.h"

namespace cake {
namespace {

// What a run is: every choice that decides its updates. Stored in the trainer's state; 0, empty or
// negative means that plan_run chooses.
struct Settings {
  std::string model;
  std::vector<std::string> data, val;
  std::string optimizer, schedule = "linear", too_long = "drop";
  bool add_chat_tokens = false;
  int context = 0, patience = 0;
  int lora = 0;  // the adapters' rank; 0: all weights are trained
  double lora_alpha = 32;
  double val_fraction = -1, epochs = 0, minutes = 0;
  int64_t steps = 0, bins = 0, batch_tokens = 0, micro_batch_tokens = 0;  // bins: of the whole run
  int64_t eval_every = 0, eval_tokens = 1 << 18, eval_some = 0;
  double lr = 0, embedding_lr = 0, head_lr = 0, vector_lr = 0, lr_scale = 1;
  double weight_decay = 0, clip = 1, beta1 = .9, beta2 = .95, momentum = .95;
  int64_t warmup = -1;
  double warmdown = 1, final_lr = 0;
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Settings, model, data, val, optimizer, schedule, too_long,
                                   add_chat_tokens, context, patience, lora, lora_alpha,
                                   val_fraction, epochs, minutes, steps, bins, batch_tokens,
                                   micro_batch_tokens, eval_every, eval_tokens, eval_some, lr,
                                   embedding_lr, head_lr, vector_lr, lr_scale, weight_decay, clip,
                                   beta1, beta2, momentum, warmup, warmdown, final_lr, seed)

// How a run is watched and kept: changes no update.
struct Watching {
  std::filesystem::path out;
  std::string device = "auto", prompt;
  int threads = 0, show = 0;
  int64_t sample_every = 0, save_every = 0;
  double save_minutes = 10;
  bool resume = false, overwrite = false, dry_run = false;
};

class Trainer {
 public:
  Trainer(Settings settings, Watching watching)
      : s_(std::move(settings)),
        w_(std::move(watching)),
        from_(model_dir(w_.resume ? w_.out : std::filesystem::path(s_.model))),
        config_(load_config(from_)),
        tokenizer_(Tokenizer::load(from_)) {
    if (config_.head != Head::lm)
      fail(from_.string(), ": has a scalar head, expected a language model");
    prepare_tokenizer();
    read_data();
  }

  int run();
  void show() const;

 private:
  struct StepResult {
    double loss, grad_norm, operations;
    int64_t tokens, trained;
    bool skipped;
  };
  struct Score {
    double loss = 0;  // nats a trained token
    int64_t trained = 0;
  };

  std::filesystem::path model() const { return w_.out / "model"; }
  void prepare_tokenizer();
  void read_data();
  void plan_run();
  void plan_adapters();
  void print_plan(double step_seconds, double total_seconds);
  void make_model(const std::filesystem::path& dir);
  void load_grown(const std::filesystem::path& dir);
  void calibrate();
  StepResult step(int64_t number);
  Score evaluate(int64_t positions);
  void sample(int64_t number);
  void save(const std::filesystem::path& dir, const char* state);
  void train();
  bool judge(int64_t step, const Score& score);
  void finish(int64_t last_step);
  [[noreturn]] void diverged(const std::string& what) {
    fail_diverged(done_, what, s_.lr_scale, model());
  }
  OptimizerStep optimizer_step(int64_t number) const;
  int64_t bins_of_step(int64_t number) const;
  GptOptions options() const {
    GptOptions o;
    o.device = parse_device(w_.device);
    if (s_.lora > 0) o.lora = {s_.lora, float(s_.lora_alpha)};
    o.muon = s_.optimizer == "muon";
    o.batch_tokens = int(s_.micro_batch_tokens);
    return o;
  }

  Settings s_;
  Watching w_;
  std::filesystem::path from_;  // the model that is trained, or the checkpoint it goes on from
  Config config_;
  Tokenizer tokenizer_;
  int known_rows_ = 0;  // of the embedding: those of tokens that the model began with
  int added_tokens_ = 0;
  bool changed_tokenizer_ = false;
  Examples train_, val_;
  ReadReport report_;

  std::unique_ptr<Gpt> gpt_;
  AdapterBase base_;  // of adapters
  std::unique_ptr<Stream> stream_;
  Schedule schedule_;
  int64_t done_ = 0;                            // steps
  int64_t positions_ = 0, trained_ = 0;         // seen
  double seconds_ = 0;                          // of the run so far, earlier sittings included
  double peak_ = 0;                             // operations a second
  double step_seconds_ = 0, eval_seconds_ = 0;  // calibrated, a step and a position; 0: unknown
  double lowest_loss_ = 1e30, recent_loss_ = 0;
  double best_loss_ = 1e30;  // held out
  int64_t best_step_ = 0;
  int worse_in_a_row_ = 0, skipped_in_a_row_ = 0;
  bool stopped_early_ = false;
  Metrics metrics_;
  ProgressLine line_;
};

// The chat template that the model is trained on goes with it, whatever it brought.
void Trainer::prepare_tokenizer() {
  if (config_.V < tokenizer_.vocab_size()) {
    fail(from_.string(), ": found a vocabulary of ", config_.V,
         ", expected at least the tokenizer's ", tokenizer_.vocab_size());
  }
  known_rows_ = tokenizer_.vocab_size();
  const bool has_chat =
      tokenizer_.special("<|im_start|>") >= 0 && tokenizer_.special("<|im_end|>") >= 0;
  if (w_.resume || !(has_chat || s_.add_chat_tokens)) return;  // conversations will be refused
  tokenizer_ = with_chat_tokens(tokenizer_, s_.add_chat_tokens);
  changed_tokenizer_ = true;
  added_tokens_ = tokenizer_.vocab_size() - known_rows_;
  config_.V = std::max(config_.V, tokenizer_.vocab_size());
}

void Trainer::read_data() {
  if (s_.context == 0) s_.context = std::min(config_.T, 4096);
  if (s_.context < 2 || s_.context > config_.T) {
    fail("--context: found ", s_.context, ", expected 2 to the model's ", config_.T);
  }
  if (s_.too_long != "drop" && s_.too_long != "cut") {
    fail("--long: found ", s_.too_long, ", expected drop or cut");
  }
  if (s_.val_fraction < 0) s_.val_fraction = s_.val.empty() ? .05 : 0;
  if (!(s_.val_fraction < 1)) {
    fail("--val-fraction: found ", s_.val_fraction, ", expected 0 or more and less than 1");
  }
  const TooLong too_long = s_.too_long == "cut" ? TooLong::cut : TooLong::drop;
  for (const std::string& text : s_.data) {
    read_examples(parse_source(text), tokenizer_, s_.context, too_long, s_.val_fraction, train_,
                  val_, report_);
  }
  for (const std::string& path : s_.val) {
    Examples none;
    read_examples({path}, tokenizer_, s_.context, too_long, 0, val_, none, report_);
  }
  if (report_.conversations > 0) {
    config_.eos = end_of_turn(tokenizer_);
    if (config_.pad < 0 || config_.pad == config_.eos) {
      config_.pad =
          tokenizer_.special("<|endoftext|>");  // pad is never trained, the end of turn is
    }
  }
  if (train_.size() == 0) {
    fail(s_.data[0], ": found no example within the context of ", s_.context, " tokens among ",
         report_.conversations + report_.completions, ", the longest has ", report_.longest,
         ": --long cut cuts them, a larger --context holds them");
  }
}

void Trainer::show() const {
  const bool colours = isatty(STDOUT_FILENO);
  const auto order = Stream(train_, s_.context, s_.seed).make_epoch(0);
  int shown = 0;
  for (const std::vector<int>& bin : order) {
    for (const int i : bin) {
      if (shown++ == w_.show) return;
      const auto ids = train_.ids_of(i);
      Rendered r{{ids.begin(), ids.end()}, {}};
      for (int p = 0; p < int(ids.size()); p++) r.trained.push_back(train_.is_trained(i, p));
      std::printf("%s\n-- example %d of %d: %zu tokens, %d trained\n\n",
                  marked(tokenizer_, r, colours).c_str(), shown, train_.size(), ids.size(),
                  train_.trained_counts[size_t(i)]);
    }
  }
}

// Batch, budget, optimizer: what the flags left open.
void Trainer::plan_run() {
  const auto positive = [](const char* flag, auto found) {
    if (!(found >= 0)) fail(flag, ": found ", found, ", expected above 0");
  };
  positive("--steps", s_.steps), positive("--epochs", s_.epochs), positive("--minutes", s_.minutes);
  positive("--batch-tokens", s_.batch_tokens), positive("--patience", s_.patience);
  positive("--micro-batch-tokens", s_.micro_batch_tokens);
  positive("--lr", s_.lr), positive("--lr-scale", s_.lr_scale);
  if ((s_.steps > 0) + (s_.epochs > 0) + (s_.minutes > 0) > 1) {
    fail("--steps, --epochs, --minutes: found more than one, expected one budget");
  }
  if (s_.schedule != "linear" && s_.schedule != "cosine" && s_.schedule != "constant") {
    fail("--schedule: found ", s_.schedule, ", expected linear, cosine or constant");
  }
  if (s_.steps == 0 && s_.epochs == 0 && s_.minutes == 0) s_.epochs = 2;
  if (s_.patience > 0 && val_.size() == 0) {
    fail("--patience: found no held-out examples, expected --val FILE or --val-fraction");
  }
  stream_ = std::make_unique<Stream>(train_, s_.context, s_.seed);
  double positions = 0;  // of an epoch
  for (int i = 0; i < train_.size(); i++) {
    positions += double(train_.positions(i)) * double(train_.weights[size_t(i)]);
  }
  if (s_.batch_tokens == 0) {
    const double all = positions * std::max(1., s_.epochs);
    const double wanted = std::exp2(std::round(std::log2(std::max(1., all / 400))));
    s_.batch_tokens = s_.minutes > 0 ? 2048 : int64_t(std::clamp(wanted, 2048., 65536.));
  }
  s_.batch_tokens = std::max<int64_t>(1, s_.batch_tokens / s_.context) * s_.context;
  if (s_.micro_batch_tokens == 0) s_.micro_batch_tokens = 4096;
  s_.micro_batch_tokens = std::clamp<int64_t>(s_.micro_batch_tokens, s_.context, s_.batch_tokens);
  const int64_t bins_a_step = s_.batch_tokens / s_.context;
  if (s_.epochs > 0) {
    double bins = 0;
    const auto whole = int64_t(s_.epochs);
    for (int64_t e = 0; e < whole; e++) bins += double(stream_->make_epoch(e).size());
    if (s_.epochs > double(whole)) {
      bins += (s_.epochs - double(whole)) * double(stream_->make_epoch(whole).size());
    }
    s_.bins = std::max<int64_t>(1, std::llround(bins));
    s_.steps = (s_.bins + bins_a_step - 1) / bins_a_step;
  } else if (s_.steps > 0) {
    s_.bins = s_.steps * bins_a_step;
  }

  if (s_.optimizer.empty()) {
    const bool small = config_.C <= 512 && s_.lora == 0;  // larger ones come from AdamW elsewhere
    s_.optimizer = small && muon_is_cheap(make_table(config_), s_.batch_tokens) ? "muon" : "adamw";
  }
  if (s_.optimizer != "muon" && s_.optimizer != "adamw") {
    fail("--optimizer: found ", s_.optimizer, ", expected muon or adamw");
  }
  if (s_.lora != 0) plan_adapters();
  const bool muon = s_.optimizer == "muon";
  // Measured on the demo's model and conversations, 640 steps of 2,048 tokens, held-out loss: AdamW
  // at .003 .226; Muon at .02 with the others at .003 .207, at .01 with .005 .206. After 500 steps
  // Muon's .012 solves 34 % of the word problems and keeps 89 % of the facts, .02 24 and 87 %, .007
  // 41 and 85 %. Larger models want less: at 768 channels this formula gives 8e-5. Adapters want
  // ten times as much (see Sources), up to a limit: of rank 8 they diverge at .03 here.
  const double adamw_lr = .003 * std::min(1., std::pow(128. / config_.C, 2));
  if (s_.lr == 0) s_.lr = muon ? .012 : s_.lora > 0 ? std::min(.01, 10 * adamw_lr) : adamw_lr;
  if (s_.embedding_lr == 0) s_.embedding_lr = muon ? adamw_lr : s_.lr;
  if (s_.head_lr == 0) s_.head_lr = muon ? adamw_lr : s_.lr;
  if (s_.vector_lr == 0) s_.vector_lr = muon ? adamw_lr : s_.lr;
}

void Trainer::plan_adapters() {
  if (s_.lora < 0 || s_.lora > config_.C) {
    fail("--lora: found ", s_.lora, ", expected a rank from 1 to the model's ", config_.C,
         " channels");
  }
  if (!(s_.lora_alpha > 0)) fail("--lora-alpha: found ", s_.lora_alpha, ", expected above 0");
  if (s_.optimizer == "muon") {
    fail("--optimizer muon: found with --lora, whose thin matrices are AdamW's, expected adamw");
  }
  if (added_tokens_ > 0) {
    fail(
        "--add-chat-tokens: found with --lora, which trains no embedding, expected a model that "
        "has the tokens");
  }
}

int64_t Trainer::bins_of_step(int64_t number) const {  // the last may have fewer
  const int64_t n = s_.batch_tokens / s_.context;
  return s_.bins > 0 ? std::clamp<int64_t>(s_.bins - (number - 1) * n, 1, n) : n;
}

OptimizerStep Trainer::optimizer_step(int64_t number) const {
  const Rates rates{.matrix = s_.lr,
                    .embedding = s_.embedding_lr,
                    .head = s_.head_lr,
                    .vector = s_.vector_lr,
                    .weight_decay = s_.weight_decay,
                    .clip = s_.clip,
                    .beta1 = s_.beta1,
                    .beta2 = s_.beta2,
                    .momentum = s_.momentum};
  return rates.at(number, schedule_.at(number) * s_.lr_scale);
}

void Trainer::print_plan(double step_seconds, double total_seconds) {
  const ParamTable table = make_table(config_, false, options().lora);
  const Config& c = config_;
  const int64_t adapters = s_.lora > 0 ? table.trainable_parameters() : 0;
  std::printf("model   %s: %d layers, %d channels, context %d, vocabulary %d, %s parameters\n",
              from_.c_str(), c.L, c.C, c.T, c.V,
              count_text(double(table.parameters() - adapters)).c_str());
  if (adapters > 0) {
    std::printf("        adapters of rank %d, alpha %g: %s parameters, all that is trained\n",
                s_.lora, s_.lora_alpha, count_text(double(adapters)).c_str());
  }
  if (added_tokens_ > 0) {
    std::printf("        %d tokens added behind the %d it knew\n", added_tokens_, known_rows_);
  }
  const double all = double(train_.all_positions());
  std::printf("data    %s examples: %s tokens, %.0f%% of them trained; held out %s: %s tokens\n",
              count_text(train_.size()).c_str(), count_text(all).c_str(),
              100 * double(train_.all_trained()) / all, count_text(val_.size()).c_str(),
              count_text(double(val_.all_positions())).c_str());
  if (report_.cut + report_.dropped > 0) {
    std::printf(
        "        longer than the context of %d: %s dropped, %s cut; the longest %s tokens\n",
        s_.context, count_text(double(report_.dropped)).c_str(),
        count_text(double(report_.cut)).c_str(), count_text(report_.longest).c_str());
  }
  const auto bins = Stream(train_, s_.context, s_.seed).make_epoch(0);
  int64_t packed = 0;
  for (const auto& bin : bins)
    for (const int i : bin) packed += train_.positions(i);
  std::printf("packing %s bins of %d an epoch, %.1f%% full\n",
              count_text(double(bins.size())).c_str(), s_.context,
              100 * double(packed) / double(int64_t(bins.size()) * s_.context));
  if (s_.steps > 0) {
    std::printf("budget  %s steps of %s tokens, %.2f epochs (--steps %lld)\n",
                count_text(double(s_.steps)).c_str(), count_text(double(s_.batch_tokens)).c_str(),
                double(s_.bins) / double(bins.size()), (long long)s_.steps);
  }
  std::printf("updates %s, %s schedule: learning rate %g for %s", s_.optimizer.c_str(),
              s_.schedule.c_str(), s_.lr * s_.lr_scale, adapters > 0 ? "adapters\n" : "matrices");
  if (adapters == 0) {
    std::printf(", %g embedding, %g head\n", s_.embedding_lr * s_.lr_scale,
                s_.head_lr * s_.lr_scale);
  }
  const MemoryPlan memory = plan_memory(config_, options());
  std::printf("memory  %s (%s)\n", bytes_text(double(memory.total())).c_str(),
              memory.text().c_str());
  if (step_seconds > 0) {
    std::printf("time    %.0f ms a step, %s in all\n", step_seconds * 1e3,
                duration_text(total_seconds).c_str());
  }
  std::fflush(stdout);
}

void Trainer::make_model(const std::filesystem::path& dir) {
  gpt_.reset();
  gpt_ = make_gpt(config_, options());
  if (peak_ == 0) peak_ = measure_peak(*gpt_);
  if (s_.lora > 0 && base_.dir.empty()) base_ = adapter_base(dir);
  if (added_tokens_ > 0) {
    load_grown(dir);
  } else {
    load_weights(dir, *gpt_, {.seed = s_.seed});
  }
}

// Weights of a model with fewer tokens: see grow_rows.
void Trainer::load_grown(const std::filesystem::path& dir) {
  GptOptions reading;
  reading.device = Device::cpu;
  reading.mode = Mode::inference;
  const auto small = make_gpt(load_config(dir), reading);
  load_weights(dir, *small);
  std::vector<float> values;
  for (size_t i = 0; i < gpt_->table().tensors.size(); i++) {
    const Tensor& t = gpt_->table().tensors[i];
    const Tensor& from = small->table().tensors[i];
    values.resize(size_t(from.size()));
    small->read(int(i), Slot::weight, values);
    const bool vocabulary = t.name == "wte" || t.name == "head";
    gpt_->write(int(i), Slot::weight,
                vocabulary ? grow_rows(values, known_rows_, t.out, t.in) : values);
  }
}

// Times steps and evaluation on the model as it is, then makes the model again: the clock decides
// the number of steps and nothing else.
void Trainer::calibrate() {
  const double limit = s_.minutes > 0 ? std::clamp(.02 * 60 * s_.minutes, .2, 10.) : 3;
  schedule_ = {.steps = 1 << 20, .warmup = 1 << 20};
  const int64_t bins = std::exchange(s_.bins, 0);
  std::vector<double> times;  // a position
  const double start = now();
  for (int i = 0; i <= 1 || (now() - start < limit && i < 200); i++) {
    const double t = now();
    const StepResult r = step(i + 1);
    if (i > 0) times.push_back((now() - t) / double(r.tokens));  // the first touches the memory
    if (stop_signal) break;
  }
  s_.bins = bins;
  std::nth_element(times.begin(), times.begin() + long(times.size()) / 2, times.end());
  if (val_.size() > 0) {
    const int64_t positions = std::min(val_.all_positions(), 2 * s_.micro_batch_tokens);
    const double t = now();
    evaluate(positions);
    eval_seconds_ = (now() - t) / double(positions);
  }
  step_seconds_ = times.empty() ? 0 : times[times.size() / 2] * double(s_.batch_tokens);
  stream_->set_state({});
  positions_ = trained_ = 0;
}

Trainer::StepResult Trainer::step(int64_t number) {
  std::vector<std::vector<int>> bins;
  for (int64_t i = bins_of_step(number); i > 0; i--) bins.push_back(stream_->next());
  const std::vector<Packed> batches = micro_batches(train_, bins, s_.micro_batch_tokens);
  StepResult r{};
  for (const Packed& b : batches) r.trained += b.trained, r.tokens += int64_t(b.tokens.size());
  double nats = 0;
  for (const Packed& b : batches) {
    gpt_->forward_backward(b.batch(), b.weights(r.trained));
    for (const float logp : gpt_->logp()) nats -= logp;
    r.operations += training_operations(*gpt_, b.doc_starts);
  }
  gpt_->update(optimizer_step(number));
  const UpdateStats stats = gpt_->stats();
  r.loss = nats / double(r.trained);
  r.grad_norm = stats.grad_norm;
  r.skipped = stats.skipped;
  positions_ += r.tokens, trained_ += r.trained;
  return r;
}

// The mean loss over the trained tokens of the first held-out examples, up to `positions`.
Trainer::Score Trainer::evaluate(int64_t positions) {
  std::vector<int> order;
  for (int i = 0; i < val_.size() && (i == 0 || positions >= val_.positions(i)); i++) {
    order.push_back(i);
    positions -= val_.positions(i);
  }
  double nats = 0;
  Score score;
  const auto bins = pack(std::move(order), val_, s_.context);
  for (const Packed& b : micro_batches(val_, bins, s_.micro_batch_tokens)) {
    gpt_->forward(b.batch(), Pass::score);
    for (const float logp : gpt_->logp()) nats -= logp;
    score.trained += b.trained;
  }
  score.loss = nats / double(score.trained);
  return score;
}

// An answer to --prompt, or to what comes before the answer of a held-out example.
void Trainer::sample(int64_t number) {
  std::vector<int> prompt;
  const bool chat = report_.conversations > 0;
  if (!w_.prompt.empty()) {
    if (chat) {
      prompt = render_chat(tokenizer_, {{{"user", w_.prompt, {}}}, {}}, true).ids;
    } else {
      prompt = {tokenizer_.end_of_text()};
      tokenizer_.encode(w_.prompt, prompt);
    }
  } else {
    const Examples& from = val_.size() > 0 ? val_ : train_;
    const int i = int(number % from.size());
    const auto ids = from.ids_of(i);
    int n = 0;
    while (!from.is_trained(i, n)) n++;
    prompt.assign(ids.begin(), ids.begin() + n);
  }
  const int room = config_.T - int(prompt.size());
  if (prompt.empty() || room < 1) return;
  GeneratorOptions options;
  options.rows = 1;
  options.cache_positions = config_.T;
  Generator generator(
      *gpt_, [&](int id) { return tokenizer_.token_bytes(id); }, options);
  Request request;
  request.prompt = prompt;
  request.max_new = std::min(96, room);
  request.sampling.temperature = 0;
  request.sampling.vocab = tokenizer_.vocab_size();
  for (const char* end : {"<|im_end|>", "<|endoftext|>"}) {
    if (tokenizer_.special(end) >= 0) request.stop_ids.push_back(tokenizer_.special(end));
  }
  const int submitted = generator.submit(request);
  generator.run();
  const Completion done = generator.pop(submitted);
  // The last turn before the answer, then the answer and how it ended.
  std::string asked = tokenizer_.decode(prompt);
  if (const size_t header = asked.rfind("<|im_start|>assistant\n"); header != std::string::npos) {
    asked.resize(header);
    const size_t turn = asked.rfind("<|im_start|>");
    asked = asked.substr(asked.find('\n', turn) + 1);
    asked = asked.substr(0, asked.rfind("<|im_end|>"));
  }
  const auto indented = [](std::string text) {
    for (size_t i = 0; (i = text.find('\n', i)) != std::string::npos; i += 9)
      text.replace(i, 1, "\n        ");
    return text;
  };
  if (asked.size() > 400) asked = "..." + asked.substr(asked.size() - 400);
  line_.note("asked   " + indented(asked));
  line_.note("answer  " + indented(done.text) +
             (done.finish == Finish::stop_token ? "" : " [no end of turn]"));
}

void Trainer::save(const std::filesystem::path& dir, const char* state) {
  const bool resumable = std::string(state) == "running";
  SaveOptions options;
  options.tokenizer_from = from_;
  if (changed_tokenizer_) {
    tokenizer_.save(w_.out / "tokenizer");
    options.tokenizer_from = w_.out / "tokenizer";
  }
  options.optimizer = resumable;
  options.base = base_;
  const Stream::State at = stream_->state();
  options.trainer_state = Json{{"stage", "fine-tuning"},
                               {"finished", !resumable},
                               {"step", done_},
                               {"positions", positions_},
                               {"trained", trained_},
                               {"seconds", seconds_},
                               {"stream", {{"epoch", at.epoch}, {"bin", at.bin}}},
                               {"data_hash", train_.hash()},
                               {"val_hash", val_.hash()},
                               {"lowest_loss", lowest_loss_},
                               {"recent_loss", recent_loss_},
                               {"best_loss", best_loss_},
                               {"best_step", best_step_},
                               {"worse_in_a_row", worse_in_a_row_},
                               {"skipped_in_a_row", skipped_in_a_row_},
                               {"settings", s_}};
  save_checkpoint(dir, *gpt_, options);
}

int Trainer::run() {
  namespace fs = std::filesystem;
  if (!w_.resume && !w_.overwrite && !w_.dry_run) expect_new_run(w_.out);
  std::error_code ec;
  if (!w_.resume && fs::equivalent(model_dir(s_.model), model(), ec)) {
    fail("-o ", w_.out.string(), ": is the model to begin with, expected another directory");
  }
  if (w_.resume) {
    const fs::path path = model() / "trainer_state.json";
    const Json state = read_json(path);
    if (json_get<bool>(state, "finished", path.string())) {
      std::printf("%s is finished: %lld steps\n", w_.out.c_str(),
                  (long long)state.at("step").get<int64_t>());
      return 0;
    }
    if (state.at("data_hash").get<uint64_t>() != train_.hash() ||
        state.at("val_hash").get<uint64_t>() != val_.hash()) {
      fail(s_.data[0], ": found other examples than the run began with, expected the same files");
    }
    stream_ = std::make_unique<Stream>(train_, s_.context, s_.seed);
    stream_->set_state({state.at("stream").at("epoch").get<int64_t>(),
                        state.at("stream").at("bin").get<int64_t>()});
    make_model(model());
    load_trainer_state(model(), *gpt_);
    done_ = state.at("step").get<int64_t>();
    positions_ = state.at("positions").get<int64_t>();
    trained_ = state.at("trained").get<int64_t>();
    seconds_ = state.at("seconds").get<double>();
    lowest_loss_ = state.at("lowest_loss").get<double>();
    recent_loss_ = state.at("recent_loss").get<double>();
    best_loss_ = state.at("best_loss").get<double>();
    best_step_ = state.at("best_step").get<int64_t>();
    worse_in_a_row_ = state.at("worse_in_a_row").get<int>();
    skipped_in_a_row_ = state.at("skipped_in_a_row").get<int>();
    print_plan(0, 0);
    line_.note(format("resumes after step %lld of %lld", (long long)done_, (long long)s_.steps));
  } else {
    const double start = now();
    plan_run();
    if (s_.minutes > 0 || w_.dry_run) {
      make_model(from_);
      calibrate();
    }
    const double last_eval = eval_seconds_ * double(std::min(s_.eval_tokens, val_.all_positions()));
    if (s_.minutes > 0) {
      const double left = 60 * s_.minutes - (now() - start) - last_eval - .3;
      s_.steps = std::max<int64_t>(1, int64_t(.96 * left / std::max(1e-6, step_seconds_)));
      s_.bins = s_.steps * (s_.batch_tokens / s_.context);
    }
    print_plan(step_seconds_, double(s_.steps) * step_seconds_ / .97 + last_eval);
    if (w_.dry_run) return 0;
    if (s_.warmup < 0) s_.warmup = std::clamp<int64_t>(s_.steps / 20, 1, 40);
    // Ten evaluations on the way, on a part of the held-out examples that costs 3 % of the time.
    if (s_.eval_every == 0) s_.eval_every = std::max<int64_t>(1, s_.steps / 10);
    s_.eval_some = std::clamp<int64_t>(
        eval_seconds_ > 0 ? int64_t(.003 * double(s_.steps) * step_seconds_ / eval_seconds_)
                          : s_.batch_tokens * s_.steps / 50,
        std::min<int64_t>(s_.eval_tokens, std::max(4096, 2 * s_.context)), s_.eval_tokens);
    make_model(from_);
    if (w_.overwrite) fs::remove_all(w_.out);  // not before another can take its place
    fs::create_directories(w_.out);
    seconds_ = now() - start;
  }
  schedule_ = {s_.schedule, s_.steps, s_.warmup, s_.warmdown, s_.final_lr};
  check_disk(w_.out, gpt_->table());
  metrics_.open(w_.out / "metrics.jsonl", done_);
  train();
  return stop_signal ? 128 + stop_signal : 0;
}

// Keeps the best weights by held-out loss; true when it has not improved for too long.
bool Trainer::judge(int64_t step, const Score& score) {
  if (s_.patience == 0) return false;
  if (score.loss < best_loss_) {
    best_loss_ = score.loss;
    best_step_ = step;
    worse_in_a_row_ = 0;
    save(w_.out / "best", "best");
    return false;
  }
  return ++worse_in_a_row_ >= s_.patience;
}

void Trainer::train() {
  const int64_t sample_every =
      w_.sample_every > 0 ? w_.sample_every : std::max<int64_t>(1, s_.steps / 4);
  const double began = now() - seconds_;
  double saved = now(), pace = 0;  // pace: seconds a step, smoothed
  if (done_ == 0 && val_.size() > 0) {
    const Score score = evaluate(s_.eval_some);
    metrics_.write(format("{\"step\":0,\"val_loss\":%.6f,\"val_tokens\":%lld}", score.loss,
                          (long long)score.trained));
    line_.note(format("before  held-out loss %.4f", score.loss));
  }
  for (int64_t n = done_ + 1; n <= s_.steps && !stop_signal && !stopped_early_; n++) {
    const double t = now();
    const StepResult r = step(n);
    const double took = now() - t;
    done_ = n;
    pace = pace > 0 ? .95 * pace + .05 * took : took;
    skipped_in_a_row_ = r.skipped ? skipped_in_a_row_ + 1 : 0;
    if (!std::isfinite(r.loss)) diverged(format("the loss is %f", r.loss));
    if (skipped_in_a_row_ >= 3) diverged("three gradients in a row were not finite");
    recent_loss_ = n == 1 ? r.loss : .95 * recent_loss_ + .05 * r.loss;
    lowest_loss_ = std::min(lowest_loss_, recent_loss_);
    if (recent_loss_ > lowest_loss_ + 1.5) {
      diverged(format("the loss rose from %.2f to %.2f", lowest_loss_, recent_loss_));
    }
    metrics_.write(
        format("{\"step\":%lld,\"loss\":%.6f,\"tokens\":%lld,\"trained\":%lld,"
               "\"grad_norm\":%.6g,\"lr_factor\":%.6g,\"tokens_per_second\":%.1f,"
               "\"peak_share\":%.4f%s}",
               (long long)n, r.loss, (long long)r.tokens, (long long)r.trained, r.grad_norm,
               schedule_.at(n), double(r.tokens) / took, r.operations / took / peak_,
               r.skipped ? ",\"skipped\":true" : ""));
    const bool last = n == s_.steps;
    line_.show(
        format("step %lld/%lld  loss %.3f  %s tokens/s  %.0f%% of peak  grad %.2f  %s left",
               (long long)n, (long long)s_.steps, r.loss,
               count_text(double(r.tokens) / pace).c_str(), 100 * r.operations / pace / peak_,
               r.grad_norm, duration_text(pace * double(s_.steps - n)).c_str()),
        last);
    if (val_.size() > 0 && (n % s_.eval_every == 0 || (last && s_.patience > 0))) {
      const Score score = evaluate(s_.eval_some);
      metrics_.write(format("{\"step\":%lld,\"val_loss\":%.6f,\"val_tokens\":%lld}", (long long)n,
                            score.loss, (long long)score.trained));
      line_.note(format("step %lld  held-out loss %.4f", (long long)n, score.loss));
      stopped_early_ = judge(n, score);
    }
    if (n % sample_every == 0) sample(n / sample_every);
    seconds_ = now() - began;
    const bool due = (w_.save_every > 0 && n % w_.save_every == 0) ||
                     (w_.save_minutes > 0 && now() - saved > 60 * w_.save_minutes);
    if ((due || stop_signal) && !last && !stopped_early_) {
      save(model(), "running");
      saved = now();
    }
  }
  if (done_ < s_.steps && !stopped_early_) {
    line_.note(format("stopped and saved after step %lld of %lld: go on with --resume",
                      (long long)done_, (long long)s_.steps));
    return;
  }
  finish(done_);
  seconds_ = now() - began;
}

// The last evaluation, on all held-out examples; with --patience, of the best weights.
void Trainer::finish(int64_t last_step) {
  const std::filesystem::path best = w_.out / "best";
  if (s_.patience > 0 && best_step_ > 0 && best_step_ < last_step) {
    load_weights(best, *gpt_);
    line_.note(format("%s; keeps the weights of step %lld, held-out loss %.4f",
                      stopped_early_ ? "stops early" : "not the best at the end",
                      (long long)best_step_, best_loss_));
  }
  Score score;
  if (val_.size() > 0) {
    score = evaluate(s_.eval_tokens);
    metrics_.write(format("{\"step\":%lld,\"final\":true,\"val_loss\":%.6f,\"val_tokens\":%lld}",
                          (long long)last_step, score.loss, (long long)score.trained));
  }
  save(model(), "finished");
  std::filesystem::remove_all(best);
  std::filesystem::remove_all(w_.out / "tokenizer");
  const OrderedJson summary = {{"steps", last_step},
                               {"stopped_early", stopped_early_},
                               {"tokens", positions_},
                               {"trained_tokens", trained_},
                               {"epochs", stream_->epochs()},
                               {"seconds", seconds_},
                               {"tokens_per_second", double(positions_) / seconds_},
                               {"train_loss", recent_loss_},
                               {"val_loss", val_.size() > 0 ? Json(score.loss) : Json()},
                               {"val_tokens", score.trained},
                               {"dropped", report_.dropped},
                               {"cut", report_.cut}};
  write_json(w_.out / "summary.json", summary);
  line_.note(format("fine-tuned on %s tokens, %s of them trained, in %s: training loss %.3f%s",
                    count_text(double(positions_)).c_str(), count_text(double(trained_)).c_str(),
                    duration_text(seconds_).c_str(), recent_loss_,
                    val_.size() > 0 ? format(", held-out loss %.4f", score.loss).c_str() : ""));
  line_.note(concat("model in ", model().string(), ": ./chat ", w_.out.string()));
}

// ---------------------------------------------------------------------------------------------
// Adapters added to their model

// Writes the model that `from` computes, adapters and all, as a directory with all its weights.
void merge(const std::filesystem::path& from, const std::filesystem::path& out) {
  const std::filesystem::path dir = model_dir(from);
  if (!has_adapters(dir)) fail("--merge ", dir.string(), ": has no adapters");
  if (std::filesystem::exists(out)) fail("-o ", out.string(), ": exists");
  const auto gpt = make_gpt(load_config(dir), {.device = Device::cpu, .mode = Mode::inference});
  load_weights(dir, *gpt);
  SaveOptions options;
  const bool own = std::filesystem::exists(dir / "tokenizer.json");
  options.tokenizer_from = own ? dir : adapter_base(dir).dir;
  save_checkpoint(out, *gpt, options);
  std::printf("model in %s: %s parameters, with the adapters of %s\n", out.c_str(),
              count_text(double(gpt->table().parameters())).c_str(), dir.c_str());
}

// ---------------------------------------------------------------------------------------------
// Command line

int main_sft(int argc, char** argv) {
  Settings s;
  Watching w;
  CLI::App app("Fine-tunes a model on conversations, or on prompts with completions.");
  app.option_defaults()->always_capture_default(false);
  std::string out, adapters;
  app.add_option("--model", s.model, "a run or Hugging Face directory to begin with");
  app.add_option("--data", s.data,
                 "JSON lines with \"messages\", or \"prompt\" and \"completion\"; FILE:2 goes over "
                 "FILE twice an epoch, FILE:.5 over half of it");
  app.add_option("-o,--out", out, "the run: DIR/metrics.jsonl, DIR/model");
  app.add_option("--val", s.val, "held-out examples in files of their own");
  app.add_option("--val-fraction", s.val_fraction, "or this share of --data (default .05)");
  app.add_option("--context", s.context, "size of a bin (default: the model's, 4,096 at most)");
  app.add_option("--long", s.too_long, "examples longer than that: drop or cut (default drop)");
  app.add_flag("--add-chat-tokens", s.add_chat_tokens,
               "give a model without chat tokens new rows for them");
  app.add_option("--show", w.show, "print N examples, trained tokens marked, and stop");
  app.add_flag("--resume", w.resume, "go on with DIR after its last checkpoint");
  app.add_flag("--overwrite", w.overwrite, "replace DIR");
  app.add_flag("--dry-run", w.dry_run, "print the plan and stop");
  app.add_option("--lora", s.lora, "train adapters of this rank beside a model that stays");
  app.add_option("--lora-alpha", s.lora_alpha, "they are added alpha / rank times (default 32)");
  app.add_option("--merge", adapters, "write a run's adapters and their model as one, and stop");

  auto* budget = app.add_option_group("Budget", "one of; default: 2 epochs");
  budget->add_option("--epochs", s.epochs, "times over the data");
  budget->add_option("--minutes", s.minutes, "measure the speed, then fix the steps that fit");
  budget->add_option("--steps", s.steps, "optimizer steps");
  budget->add_option(
      "--patience", s.patience,
      "stop after so many evaluations without a better held-out loss, keep the best");
  budget->add_option("--batch-tokens", s.batch_tokens, "tokens an optimizer step");
  budget->add_option("--micro-batch-tokens", s.micro_batch_tokens, "tokens in memory at once");

  auto* optimizer = app.add_option_group("Optimizer", "");
  optimizer->add_option("--optimizer", s.optimizer,
                        "adamw or muon (default: muon for small models)");
  optimizer->add_option("--lr", s.lr, "of matrices, and for adamw of all that follow; of adapters");
  optimizer->add_option("--embedding-lr", s.embedding_lr);
  optimizer->add_option("--head-lr", s.head_lr);
  optimizer->add_option("--vector-lr", s.vector_lr, "norms and biases");
  optimizer->add_option("--lr-scale", s.lr_scale, "a factor on all of them");
  optimizer->add_option("--schedule", s.schedule, "linear, cosine or constant (default linear)");
  optimizer->add_option("--warmup", s.warmup, "steps");
  optimizer->add_option("--warmdown", s.warmdown, "share of the steps in which linear falls");
  optimizer->add_option("--final-lr", s.final_lr, "share of the peak at the end");
  optimizer->add_option("--weight-decay", s.weight_decay);
  optimizer->add_option("--clip", s.clip, "largest gradient norm, 0 for any");
  optimizer->add_option("--beta1", s.beta1);
  optimizer->add_option("--beta2", s.beta2);
  optimizer->add_option("--momentum", s.momentum, "Muon's");
  optimizer->add_option("--seed", s.seed);

  auto* watching = app.add_option_group("Watching", "");
  watching->add_option("--eval-every", s.eval_every, "steps (default: a tenth of the run)");
  watching->add_option("--eval-tokens", s.eval_tokens, "of the last evaluation at most");
  watching->add_option("--sample-every", w.sample_every, "steps (default: a quarter of the run)");
  watching->add_option("--prompt", w.prompt, "to answer in samples (default: held-out ones)");
  watching->add_option("--save-every", w.save_every, "steps");
  watching->add_option("--save-minutes", w.save_minutes, "default 10");
  watching->add_option("--device", w.device, "auto, cpu or cuda");
  watching->add_option("--threads", w.threads, "default: the physical cores it may use");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    fail(e.what(), " (see --help)");
  }
  w.out = out;
  if (w.show < 0) fail("--show: found ", w.show, ", expected a number of examples");
  if (out.empty() && w.show == 0 && !w.dry_run) fail("-o: missing, expected a directory to write");
  if (!adapters.empty()) return merge(adapters, out), 0;
  if (w.resume && w.overwrite) fail("--resume and --overwrite: found both, expected one");
  if (w.resume) {
    const auto state = model_dir(w.out) / "trainer_state.json";
    try {
      s = read_json(state).at("settings").get<Settings>();
    } catch (const Json::exception& e) {
      fail(state.string(), ": settings: ", json_complaint(e), ": not the state of a ./sft run");
    }
  } else if (s.model.empty() || s.data.empty()) {
    fail(s.model.empty() ? "--model: missing, expected the model to begin with"
                         : "--data: missing, expected JSON lines of conversations");
  }
  check_device(parse_device(w.device));
  set_threads(w.threads);
  watch_signals();
  const int show = w.show;
  Trainer trainer(std::move(s), std::move(w));
  if (show > 0) return trainer.show(), 0;
  return trainer.run();
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_sft(argc, argv); });
}

#endif  // CAKE_NO_MAIN
