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
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/conversations.h"
#include "cake/export.h"
#include "cake/flags.h"
#include "cake/generate.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/packed.h"
#include "cake/record_flags.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/schedule.h"
#include "cake/stage_template.h"
#include "cake/tokenizer.h"
#include "cake/training.h"

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

// Examples end to end. Example i is ids[starts[i], starts[i + 1]) with one id more than it has
// positions: position p reads id p, and is to predict id p + 1 if that one is trained.
struct Examples {
  // The last message before the first trained id: ids [begin, end) of the example.
  struct Asked {
    int begin = 0, end = 0;
  };
  std::vector<int> ids;
  std::vector<bool> trained;           // of each id
  std::vector<jinja::Origin> origins;  // of each id, if `keep_origins`, for --show
  bool keep_origins = false;
  std::vector<int64_t> starts = {0};
  std::vector<int> trained_counts;  // of each example
  std::vector<float> weights;       // times an epoch
  std::vector<Asked> asked;         // of each example

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
    if (keep_origins) {
      origins.insert(origins.end(), r.origins.begin(), r.origins.end());
      origins.resize(ids.size());
    }
    asked.push_back(find_asked(r));
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

 private:
  // In a raw text nothing has an origin, and all that comes before is asked.
  static Asked find_asked(const Rendered& r) {
    const auto first = std::find(r.trained.begin(), r.trained.end(), true);
    const auto answer = size_t(first - r.trained.begin());
    size_t end = std::min(answer, r.origins.size());
    while (end > 0 && !is_said(r.origins[end - 1])) end--;
    size_t begin = end;
    while (begin > 0 && r.origins[begin - 1] == r.origins[end - 1]) begin--;
    if (end == 0) end = answer;
    return {int(begin), int(end)};
  }
  static bool is_said(const jinja::Origin& origin) {
    return origin.source == jinja::Source::content || origin.source == jinja::Source::tool_call;
  }
};

struct ReadReport {
  int64_t conversations = 0, completions = 0;  // read
  int64_t records = 0;
  LeftOut left_out;
  int64_t cut = 0;  // longer than the context, and cut
  int longest = 0;  // positions
};

// A text to the ids of its examples. A conversation is one, or several (examples_of). A prompt with
// its completion is a document: <|endoftext|> prompt completion <|endoftext|>, of which completion
// and end are trained. They are encoded apart, as when the prompt is given and the rest generated.
std::vector<Rendered> render(const StageTemplate& chat, const TrainingText& text) {
  std::vector<Rendered> examples;
  if (text.conversation) {
    const auto render_one = [&](const Conversation& c) {
      return chat.get().render_for_training(c);
    };
    for (const Conversation& example : examples_of(*text.conversation, render_one)) {
      examples.push_back(render_one(example));
    }
    return examples;
  }
  Rendered r;
  r.ids = chat.text_ids(text.prompt);
  r.trained.resize(r.ids.size(), false);
  chat.tokenizer().encode(text.completion, r.ids);
  r.ids.push_back(chat.end_token(false));
  r.trained.resize(r.ids.size(), true);
  examples.push_back(std::move(r));
  return examples;
}

// Drops what stands behind the last trained token: it teaches nothing. What is longer than the
// context loses its end with `cut`. False when nothing trained is left, or it is too long.
bool trim(Rendered& r, int context, bool cut, ReadReport& report) {
  const auto drop_tail = [&r] {
    while (!r.trained.empty() && !r.trained.back()) r.trained.pop_back();
    r.ids.resize(r.trained.size());
    if (!r.origins.empty()) r.origins.resize(r.trained.size());
  };
  drop_tail();
  report.longest = std::max(report.longest, int(r.ids.size()) - 1);
  if (int(r.ids.size()) <= context + 1) return true;
  if (!cut) return false;
  r.trained.resize(size_t(context) + 1);
  drop_tail();
  report.cut += !r.ids.empty();
  return !r.ids.empty();
}

// True for the share `fraction` of all examples: by a hash of their ids, so that equal ones are all
// held out or all trained on.
bool is_held_out(const Rendered& r, double fraction) {
  uint64_t h = mix64(0x5f7);
  for (const int id : r.ids) h = mix64(h ^ uint64_t(id));
  return uniform01(h) < fraction;
}

// A failure that no record is to blame for, and that --bad-lines does not skip.
struct TokenizerError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check_tokenizer(const StageTemplate& chat, bool is_chat) {
  try {
    chat.end_token(is_chat);
  } catch (const Error& e) {
    throw TokenizerError(e.what());
  }
}

struct ReadOptions {
  int context = 0;
  bool cut = false;         // what is longer, instead of leaving it out
  double val_fraction = 0;  // the share of examples that are held out
  RecordOptions records;
};

// Reads a file's records: into `held_out` the share `val_fraction`, the rest into `examples`.
void read_examples(const Source& source, const StageTemplate& chat, const ReadOptions& options,
                   Examples& examples, Examples& held_out, ReadReport& report) {
  struct Text {
    TrainingText text;
    std::string where;
    std::vector<Rendered> examples;
    std::string error;  // why the template refuses it
  };
  std::vector<Text> texts;
  LeftOut left_out;
  const int before = examples.size() + held_out.size();
  const auto flush = [&] {  // texts to ids by all threads, in the file's order
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t i = 0; i < texts.size(); i++) {
      try {
        texts[i].examples = render(chat, texts[i].text);
      } catch (const Error& e) {
        texts[i].error = e.what();
      }
    }
    for (Text& text : texts) {
      if (!text.error.empty()) {
        const std::string error = concat(text.where, ": ", text.error);
        require(options.records.skip_bad_lines, error);
        left_out.add("bad line", error);
        continue;
      }
      // The examples of one record are all held out or all trained on.
      const bool out = is_held_out(text.examples[0], options.val_fraction);
      for (Rendered& r : text.examples) {
        if (trim(r, options.context, options.cut, report)) {
          (out ? held_out : examples).add(r, float(source.weight));
        } else {
          left_out.add("too long", text.where);
        }
      }
    }
    texts.clear();
  };
  const auto visit = [&](const Record& record) -> const char* {
    TrainingText text = parse_training_text(record);
    if (const char* reason = nothing_to_learn(text)) return reason;
    const bool is_chat = text.conversation.has_value();
    check_tokenizer(chat, is_chat);
    (is_chat ? report.conversations : report.completions)++;
    if (is_chat) check_conversation(*text.conversation, record.where);
    texts.push_back({std::move(text), record.where, {}, {}});
    if (texts.size() >= 4096) flush();
    return nullptr;
  };
  const int64_t records = for_each_record({source.path}, options.records, left_out, visit);
  flush();
  report.records += records, report.left_out.add(left_out);
  if (examples.size() + held_out.size() > before) return;
  const bool is_short = left_out.count("too long") > 0;
  fail(source.path, ": found nothing to train on in ", records, " records: ", left_out.summary(),
       is_short ? concat("; the longest has ", report.longest, " tokens, the context ",
                         options.context, ": --long cut cuts it, a larger --context holds it")
                : "");
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

void add_example(Packed& batch, const Examples& examples, int i) {
  batch.add(i, examples.ids_of(i), size_t(examples.positions(i)),
            [&](size_t p) { return examples.is_trained(i, int(p)); });
}

// Consecutive bins to micro-batches of at most `positions`; a bin is never divided.
std::vector<Packed> micro_batches(const Examples& examples, std::span<const std::vector<int>> bins,
                                  int64_t positions) {
  std::vector<Packed> batches;
  for (const std::vector<int>& bin : bins) {
    int64_t n = 0;
    for (const int i : bin) n += examples.positions(i);
    Packed& batch = batch_with_room(batches, n, positions);
    for (const int i : bin) add_example(batch, examples, i);
  }
  return batches;
}

struct StreamState {
  int64_t epoch = 0, bin = 0;  // the next bin
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StreamState, epoch, bin)

// Bins without end, an epoch after another, each packed and shuffled anew: a function of the
// examples, the seed and the place alone.
class Stream {
 public:
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
    shuffle(order, rng);
    auto bins = pack(std::move(order), examples_, context_);
    shuffle(bins, rng);
    if (bins.empty()) bins.push_back({int(rng.below(uint64_t(examples_.size())))});  // tiny weights
    return bins;
  }
  StreamState state() const { return state_; }
  double epochs() const {  // seen so far
    return double(state_.epoch) +
           (state_.bin > 0 ? double(state_.bin) / double(make_epoch(state_.epoch).size()) : 0);
  }
  void set_state(StreamState state) {
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
  StreamState state_;
  int64_t loaded_ = -1;  // the epoch that bins_ are of
  std::vector<std::vector<int>> bins_;
};

// ---------------------------------------------------------------------------------------------
// Looking at examples

// Terminal colours (SGR) of a stretch by where its text is from. What is trained has a green
// background.
const char* colour_of(jinja::Source source, bool trained) {
  switch (source) {
    case jinja::Source::from_template:
      return trained ? "38;5;241;48;5;157" : "2";
    case jinja::Source::role:
      return trained ? "38;5;23;48;5;157" : "36";
    case jinja::Source::content:
      return trained ? "30;48;5;157" : "0";
    case jinja::Source::reasoning:
      return trained ? "38;5;94;48;5;157" : "33";
    case jinja::Source::tool_call:
      return trained ? "38;5;21;48;5;157" : "34";
    case jinja::Source::tools:
      return trained ? "38;5;90;48;5;157" : "35";
  }
  return "0";
}

std::string coloured(const std::string& text, jinja::Source source, bool trained) {
  return concat("\x1b[", colour_of(source, trained), "m", text, "\x1b[0m");
}

// What the colours mean.
std::string legend() {
  std::string text;
  for (const auto& [source, name] : {std::pair{jinja::Source::from_template, "template"},
                                     {jinja::Source::role, "role"},
                                     {jinja::Source::content, "content"},
                                     {jinja::Source::reasoning, "reasoning"},
                                     {jinja::Source::tool_call, "tool call"},
                                     {jinja::Source::tools, "tools"}}) {
    text += coloured(name, source, false) + "  ";
  }
  return text + coloured("trained", jinja::Source::content, true) + "\n\n";
}

// An example's text. With colours they show what is trained and where each stretch is from, without
// colours brackets stand around what is trained.
std::string marked(const Tokenizer& tokenizer, const Rendered& r, bool colours) {
  const auto source_of = [&](size_t i) {
    return r.origins.empty() ? jinja::Source::content : r.origins[i].source;
  };
  std::string out;
  for (size_t i = 0; i < r.ids.size();) {
    const bool trained = r.trained[i];
    const jinja::Source source = source_of(i);
    size_t end = i;
    while (end < r.ids.size() && r.trained[end] == trained &&
           (!colours || source_of(end) == source)) {
      end++;
    }
    const std::string text = tokenizer.decode(std::span(r.ids).subspan(i, end - i));
    out += colours ? coloured(text, source, trained) : trained ? "[[" + text + "]]" : text;
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

// =============================================================================================
// The run

// What a run is: every choice that decides its updates. It is stored in the trainer's state. 0,
// empty or negative means that plan_run chooses.
struct Settings {
  std::string model;
  std::vector<std::string> data, val;
  std::string too_long = "drop";
  bool add_chat_tokens = false;
  StageTemplateFlags chat_template;
  int context = 0, patience = 0;
  int lora = 0;  // the adapters' rank; 0: all weights are trained
  double lora_alpha = 32, val_fraction = -1;
  int64_t bins = 0;  // of the whole run
  int64_t batch_tokens = 0, micro_batch_tokens = 0;
  int64_t eval_every = 0, eval_tokens = 1 << 18, eval_some = 0;
  RecordOptions records;
  Budget budget;
  OptimizerFlags optimizer{.name = ""};
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Settings, model, data, val, too_long,
                                                add_chat_tokens, chat_template, context, patience,
                                                lora, lora_alpha, val_fraction, bins, batch_tokens,
                                                micro_batch_tokens, eval_every, eval_tokens,
                                                eval_some, records, budget, optimizer, seed)

// Samples on the way: how often, and what is asked. Or examples to print instead of a run.
struct Watch {
  int64_t sample_every = 0;
  std::string prompt;
  int show = 0;
};

struct Score {
  double loss = 0;  // nats a trained token
  int64_t trained = 0;
};

class FineTuning {
 public:
  FineTuning(Settings settings, Watch watch, RunOptions options)
      : s_(std::move(settings)),
        w_(std::move(watch)),
        from_(model_dir(options.resume ? options.out : std::filesystem::path(s_.model))),
        config_(load_config_with_head(from_, Head::lm)),
        tokenizer_(Tokenizer::load(from_)) {
    run_.stage = "fine-tuning";
    run_.hint = "./chat " + options.out.string();
    run_.lr_scale = s_.optimizer.lr_scale;
    run_.keeps_best = s_.patience > 0;
    run_.inputs = {s_.model};
    for (const std::string& source : s_.data) run_.inputs.push_back(parse_source(source).path);
    for (const std::string& path : s_.val) run_.inputs.push_back(path);
    run_.options = std::move(options);
    prepare_tokenizer();
    read_data();
  }

  int run() {
    run_.hooks = {.begin = [this](const Json* saved) { return begin(saved); },
                  .step = [this](int64_t n) { return step(n); },
                  .evaluate = [this](int64_t n) { evaluate_and_sample(n); },
                  .evaluates = [this](int64_t n) { return evaluates(n) || samples(n); },
                  .finish = [this] { return finish(); },
                  .model = [this]() -> Gpt& { return *gpt_; },
                  .state = [this] { return state(); },
                  .save_options = [this](bool) { return save_options(); }};
    return run_steps(run_);
  }
  void show() const;

 private:
  int64_t begin(const Json* saved);
  void prepare_tokenizer();
  void read_data();
  void plan_run();
  void plan_micro_batch();
  void plan_steps(double started);
  void plan_more_steps(const Json& saved);
  void plan_adapters();
  int64_t bins_a_step() const { return s_.batch_tokens / s_.context; }
  int64_t bins_of(double epochs) const;
  int64_t steps_of(int64_t bins) const { return (bins + bins_a_step() - 1) / bins_a_step(); }
  void print_plan(double reserved);
  void print_left_out() const;
  void make_model(const std::filesystem::path& dir);
  void load_grown(const std::filesystem::path& dir);
  void calibrate_speed();
  StepResult step(int64_t number);
  Score evaluate(int64_t positions);
  bool evaluates(int64_t n) const {
    return val_.size() > 0 && n % s_.eval_every == 0 && n != run_.steps;
  }
  int64_t sample_every() const {
    return w_.sample_every > 0 ? w_.sample_every : std::max<int64_t>(1, run_.steps / 4);
  }
  bool samples(int64_t n) const { return n > 0 && n % sample_every() == 0; }
  void evaluate_and_sample(int64_t number);
  void sample(int64_t number);
  OrderedJson finish();
  OrderedJson state() const;
  SaveOptions save_options() const;
  GptOptions options() const {
    GptOptions o = gpt_options(run_.options);
    o.muon = s_.optimizer.name == "muon";
    o.lora = {s_.lora, float(s_.lora_alpha)};
    o.batch_tokens = int(s_.micro_batch_tokens);
    // A sample's prompt is the beginning of an example, or --prompt: a token has a byte or more.
    const auto prompt = int64_t(s_.context) + int64_t(w_.prompt.size());
    o.decode = decode_plan(options_for_one(config_, prompt, kSampleTokens));
    return o;
  }
  static constexpr int kSampleTokens = 96;

  Settings s_;
  Watch w_;
  std::filesystem::path from_;  // the model that is trained, or the checkpoint it goes on from
  Config config_;
  Tokenizer tokenizer_;
  StageTemplate chat_;
  int known_rows_ = 0;  // of the embedding: those of tokens that the model began with
  int added_tokens_ = 0;
  bool changed_tokenizer_ = false;
  Examples train_, val_;
  ReadReport report_;

  std::unique_ptr<Gpt> gpt_;
  AdapterBase base_;  // of adapters
  std::unique_ptr<Stream> stream_;
  Schedule schedule_;
  int64_t positions_ = 0, trained_ = 0;         // seen
  double step_seconds_ = 0, eval_seconds_ = 0;  // calibrated, a step and a position; 0: unknown
  Run run_;
};

// ---------------------------------------------------------------------------------------------
// One step

StepResult FineTuning::step(int64_t number) {
  int64_t n = bins_a_step();
  if (s_.bins > 0) n = std::clamp<int64_t>(s_.bins - (number - 1) * n, 1, n);  // the last has fewer
  std::vector<std::vector<int>> bins;
  for (int64_t i = 0; i < n; i++) bins.push_back(stream_->next());
  const std::vector<Packed> batches = micro_batches(train_, bins, s_.micro_batch_tokens);
  int64_t tokens = 0, trained = 0;
  for (const Packed& b : batches) tokens += b.positions(), trained += b.trained;
  StepResult r;
  for (const Packed& b : batches) {
    gpt_->forward_backward(b.batch(), b.mean_loss_weights(trained));
    r.operations += training_operations(*gpt_, b.doc_starts);
  }
  const double factor = schedule_.at(number);
  gpt_->update(optimizer_step(s_.optimizer, number - run_.state.moments_since, factor));
  positions_ += tokens, trained_ += trained;
  r.tokens = double(tokens);
  r.learning_rate = peak_rate(s_.optimizer) * factor;
  r.add_stats = [tokens, trained](StepResult& result, const UpdateStats& stats) {
    result.loss = stats.loss, result.skipped = stats.skipped;
    result.metrics = {{"loss", stats.loss},
                      {"tokens", tokens},
                      {"trained", trained},
                      {"grad_norm", stats.grad_norm}};
    result.line = format("loss %.3f  grad %.2f", stats.loss, stats.grad_norm);
  };
  return r;
}

// The mean loss over the trained tokens of held-out examples, of about `positions` tokens in all:
// one of every so many, since files are often in the order of their sources.
Score FineTuning::evaluate(int64_t positions) {
  const int64_t one_of = std::max<int64_t>(1, (val_.all_positions() + positions - 1) / positions);
  std::vector<int> order;
  for (int64_t i = 0; i < val_.size(); i += one_of) order.push_back(int(i));
  double nats = 0;
  Score score;
  const auto bins = pack(std::move(order), val_, s_.context);
  for (const Packed& b : micro_batches(val_, bins, s_.micro_batch_tokens)) {
    stop_if_signalled();
    gpt_->forward(b.batch(), Pass::score);
    for (const float logp : gpt_->logp()) nats -= logp;
    score.trained += b.trained;
  }
  score.loss = nats / double(score.trained);
  return score;
}

// About ten evaluations on the way and four samples. With --patience, keeps the best weights by
// held-out loss and stops when it has not improved for too long.
void FineTuning::evaluate_and_sample(int64_t n) {
  if (evaluates(n)) {
    const Score score = evaluate(s_.eval_some);
    run_.write_metrics("eval", n, {{"val_loss", score.loss}, {"val_tokens", score.trained}});
    run_.line.note(format("step %lld  held-out loss %.4f", (long long)n, score.loss));
    if (n > 0 && s_.patience > 0 && !save_if_best(run_, -score.loss) &&
        run_.state.worse_in_a_row >= s_.patience) {
      run_.stopped = "the held-out loss has not improved";
    }
  }
  if (samples(n)) try_sample(run_.line, [&] { sample(n / sample_every()); });
}

// An answer to --prompt, or to what comes before the answer of a held-out example.
void FineTuning::sample(int64_t number) {
  std::vector<int> prompt;
  std::string asked = w_.prompt;
  if (!w_.prompt.empty()) {
    prompt =
        report_.conversations > 0
            ? chat_.get().render({.messages = {{"user", w_.prompt, {}}}, .tools = {}}, true).ids
            : chat_.text_ids(w_.prompt);
  } else {
    const Examples& examples = val_.size() > 0 ? val_ : train_;
    const int i = int(number % examples.size());
    const auto ids = examples.ids_of(i);
    int n = 0;
    while (!examples.is_trained(i, n)) n++;
    prompt.assign(ids.begin(), ids.begin() + n);
    const auto [begin, end] = examples.asked[size_t(i)];
    asked = tokenizer_.decode(ids.subspan(size_t(begin), size_t(end - begin)));
  }
  if (prompt.empty() || int(prompt.size()) >= config_.T) return;
  std::vector<int> stop_ids = config_.all_end_tokens();
  stop_ids.push_back(tokenizer_.find_document_separator());  // -1 is no token, and stops nothing
  const Completion done =
      sample_one(*gpt_, tokenizer_, prompt, kSampleTokens, {.temperature = 0}, stop_ids);
  if (asked.size() > 400) asked = "..." + asked.substr(asked.size() - 400);
  run_.line.note("asked   " + indented(asked));
  run_.line.note("answer  " + indented(done.text) +
                 (done.finish == Finish::stop_token ? "" : " [no end of turn]"));
}

// ---------------------------------------------------------------------------------------------
// Tokenizer, data, plan

// The tokenizer gets the chat tokens that it lacks, if the user wants them, and the template of the
// run, which is saved with it. A run that is resumed finds both in its checkpoint.
void FineTuning::prepare_tokenizer() {
  if (config_.V < tokenizer_.vocab_size()) {
    fail(from_.string(), ": found a vocabulary of ", config_.V,
         ", expected at least the tokenizer's ", tokenizer_.vocab_size());
  }
  known_rows_ = tokenizer_.vocab_size();
  fix_date(s_.chat_template);
  if (run_.options.resume) {
    chat_ = StageTemplate(tokenizer_, from_, {"auto", s_.chat_template.date});
    return;
  }
  if (s_.add_chat_tokens) {
    const std::string own = chat_template(from_);
    tokenizer_ = with_chat_tokens(tokenizer_, own.empty() ? kChatTemplate : own);
  }
  added_tokens_ = tokenizer_.vocab_size() - known_rows_;
  config_.V = std::max(config_.V, tokenizer_.vocab_size());
  chat_ = StageTemplate(tokenizer_, from_, s_.chat_template);
  changed_tokenizer_ = added_tokens_ > 0 || chat_.is_new(from_);
  if (chat_.is_new(from_)) tokenizer_ = with_chat_tokens(tokenizer_, chat_.get().text(), false);
}

void FineTuning::read_data() {
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
  train_.keep_origins = w_.show > 0;
  ReadOptions options{s_.context, s_.too_long == "cut", s_.val_fraction, s_.records};
  for (const std::string& text : s_.data) {
    read_examples(parse_source(text), chat_, options, train_, val_, report_);
  }
  options.val_fraction = 0;
  for (const std::string& path : s_.val) {
    Examples none;
    read_examples({path}, chat_, options, val_, none, report_);
  }
  run_.records = report_.records, run_.left_out = report_.left_out;
  if (report_.conversations > 0) {
    config_.set_first_end_token(chat_.end_token(true));
    if (config_.pad < 0 || config_.pad == config_.eos) {  // the end of turn is trained, pad never
      config_.pad = tokenizer_.find_document_separator();
    }
  }
  if (train_.size() == 0) {
    fail(s_.data[0],
         ": found examples to hold out and none to train on, expected more of them, or ",
         "a smaller --val-fraction");
  }
}

void FineTuning::show() const {
  const bool colours = isatty(STDOUT_FILENO);
  if (colours) std::fputs(legend().c_str(), stdout);
  const auto order = Stream(train_, s_.context, s_.seed).make_epoch(0);
  int shown = 0;
  for (const std::vector<int>& bin : order) {
    for (const int i : bin) {
      if (shown == w_.show) break;
      shown++;
      const auto ids = train_.ids_of(i);
      Rendered r{{ids.begin(), ids.end()}, {}, {}};
      const auto origins = train_.origins.begin() + train_.starts[size_t(i)];
      r.origins.assign(origins, origins + long(ids.size()));
      for (int p = 0; p < int(ids.size()); p++) r.trained.push_back(train_.is_trained(i, p));
      std::printf("%s\n-- example %d of %d: %zu tokens, %d trained\n\n",
                  marked(tokenizer_, r, colours).c_str(), shown, train_.size(), ids.size(),
                  train_.trained_counts[size_t(i)]);
    }
  }
  std::printf("%s", report_.left_out.text(report_.records).c_str());
}

// Batch, budget, optimizer: what the flags left open.
void FineTuning::plan_run() {
  Budget& budget = s_.budget;
  OptimizerFlags& o = s_.optimizer;
  check_budget(budget);
  check_optimizer(o);
  expect_not_negative("--batch-tokens", double(s_.batch_tokens));
  expect_not_negative("--patience", s_.patience);
  expect_not_negative("--micro-batch-tokens", double(s_.micro_batch_tokens));
  if (!budget.chosen()) budget.epochs = 2;
  if (s_.patience > 0 && val_.size() == 0) {
    fail("--patience: found no held-out examples, expected --val FILE or --val-fraction");
  }
  stream_ = std::make_unique<Stream>(train_, s_.context, s_.seed);
  double positions = 0;  // of an epoch
  for (int i = 0; i < train_.size(); i++) {
    positions += double(train_.positions(i)) * double(train_.weights[size_t(i)]);
  }
  if (s_.batch_tokens == 0) {
    const double all = positions * std::max(1., budget.epochs);
    const double wanted = std::exp2(std::round(std::log2(std::max(1., all / 400))));
    s_.batch_tokens = budget.minutes > 0 ? 2048 : int64_t(std::clamp(wanted, 2048., 65536.));
  }
  s_.batch_tokens = std::max<int64_t>(1, s_.batch_tokens / s_.context) * s_.context;
  if (budget.epochs > 0) {
    s_.bins = bins_of(budget.epochs);
    budget.steps = steps_of(s_.bins);
  } else if (budget.steps > 0) {
    s_.bins = budget.steps * bins_a_step();
  }

  if (o.name.empty()) {
    const bool small = config_.C <= 512 && s_.lora == 0;  // larger ones come from AdamW elsewhere
    o.name = small && muon_is_cheap(make_table(config_), s_.batch_tokens) ? "muon" : "adamw";
  }
  if (s_.lora != 0) plan_adapters();
  const bool muon = o.name == "muon";
  // Measured on the demo's model and conversations, 640 steps of 2,048 tokens, held-out loss: AdamW
  // at .003 .226; Muon at .02 with the others at .003 .207, at .01 with .005 .206. After 500 steps
  // Muon's .012 solves 34 % of the word problems and keeps 89 % of the facts, .02 24 and 87 %, .007
  // 41 and 85 %. Larger models want less: at 768 channels this formula gives 8e-5. Adapters want
  // ten times as much (see Sources), up to a limit: of rank 8 they diverge at .03 here.
  const double adamw_lr = .003 * std::min(1., std::pow(128. / config_.C, 2));
  if (o.lr == 0) o.lr = muon ? .012 : s_.lora > 0 ? std::min(.01, 10 * adamw_lr) : adamw_lr;
  for (double* lr : {&o.embedding_lr, &o.head_lr, &o.vector_lr}) {
    if (*lr == 0) *lr = muon ? adamw_lr : o.lr;
  }
  plan_micro_batch();
}

// At least one bin, at most a batch.
void FineTuning::plan_micro_batch() {
  int64_t& tokens = s_.micro_batch_tokens;
  choose_micro_batch(tokens, run_.options, s_.context, s_.batch_tokens, [&](int64_t n) {
    GptOptions o = options();
    o.batch_tokens = int(n);
    return plan_memory(config_, o).total();
  });
  tokens = std::clamp<int64_t>(tokens, s_.context, s_.batch_tokens);
}

int64_t FineTuning::bins_of(double epochs) const {
  double bins = 0;
  const auto whole = int64_t(epochs);
  for (int64_t e = 0; e < whole; e++) bins += double(stream_->make_epoch(e).size());
  if (epochs > double(whole)) {
    bins += (epochs - double(whole)) * double(stream_->make_epoch(whole).size());
  }
  return std::max<int64_t>(1, std::llround(bins));
}

// The steps of a resumed run that got another budget.
void FineTuning::plan_more_steps(const Json& saved) {
  const auto planned = with_parts(saved.at("settings")).at("budget").at("steps").get<int64_t>();
  s_.bins = 0;
  s_.budget.steps =
      resumed_steps(run_, s_.budget, s_.optimizer, planned, [&](const Budget& budget) {
        s_.bins = bins_of(budget.epochs);
        return steps_of(s_.bins);
      });
  if (s_.bins == 0) s_.bins = s_.budget.steps * bins_a_step();
}

void FineTuning::plan_adapters() {
  if (s_.lora < 0 || s_.lora > config_.C) {
    fail("--lora: found ", s_.lora, ", expected a rank from 1 to the model's ", config_.C,
         " channels");
  }
  if (!(s_.lora_alpha > 0)) fail("--lora-alpha: found ", s_.lora_alpha, ", expected above 0");
  if (s_.optimizer.name == "muon") {
    fail("--optimizer muon: found with --lora, whose thin matrices are AdamW's, expected adamw");
  }
  if (added_tokens_ > 0) {
    fail("--add-chat-tokens: found with --lora, which trains no embedding, ",
         "expected a model that has the tokens");
  }
}

// What of the files is no example, and why.
void FineTuning::print_left_out() const {
  std::istringstream lines(report_.left_out.text(report_.records));
  for (std::string line; std::getline(lines, line);) std::printf("        %s\n", line.c_str());
}

// `reserved`: seconds of the last evaluation.
void FineTuning::print_plan(double reserved) {
  const ParamTable table = make_table(config_, false, options().lora);
  const Config& c = config_;
  const int64_t adapters = s_.lora > 0 ? table.trainable_parameters() : 0;
  std::printf("model   %s: %d layers, %d channels, context %d, vocabulary %d, %s parameters\n",
              from_.c_str(), c.L, c.C, c.T, c.V, count_text(table.parameters() - adapters).c_str());
  if (adapters > 0) {
    std::printf("        adapters of rank %d, alpha %g: %s parameters, all that is trained\n",
                s_.lora, s_.lora_alpha, count_text(adapters).c_str());
  }
  if (added_tokens_ > 0) {
    std::printf("        %d tokens added behind the %d it knew\n", added_tokens_, known_rows_);
  }
  const double all = double(train_.all_positions());
  std::printf("data    %s examples: %s tokens, %.0f%% of them trained; held out %s: %s tokens\n",
              count_text(train_.size()).c_str(), count_text(all).c_str(),
              100 * double(train_.all_trained()) / all, count_text(val_.size()).c_str(),
              count_text(val_.all_positions()).c_str());
  if (report_.cut > 0) {
    std::printf("        %s longer than the context of %d were cut; the longest had %s tokens\n",
                count_text(double(report_.cut)).c_str(), s_.context,
                count_text(report_.longest).c_str());
  }
  print_left_out();
  const auto bins = Stream(train_, s_.context, s_.seed).make_epoch(0);
  int64_t packed = 0;
  for (const auto& bin : bins)
    for (const int i : bin) packed += train_.positions(i);
  std::printf("packing %s bins of %d an epoch, %.1f%% full\n", count_text(bins.size()).c_str(),
              s_.context, 100 * double(packed) / double(int64_t(bins.size()) * s_.context));
  const int64_t steps = s_.budget.steps;
  if (steps > 0) {
    std::printf("budget  %s steps of %s tokens, %.2f epochs (--steps %lld)\n",
                count_text(steps).c_str(), count_text(s_.batch_tokens).c_str(),
                double(s_.bins) / double(bins.size()), (long long)steps);
  }
  const OptimizerFlags& o = s_.optimizer;
  std::printf("updates %s, %s schedule: learning rate %g for %s", o.name.c_str(),
              o.schedule.c_str(), o.lr * o.lr_scale, adapters > 0 ? "adapters\n" : "matrices");
  if (adapters == 0) {
    std::printf(", %g embedding, %g head\n", o.embedding_lr * o.lr_scale, o.head_lr * o.lr_scale);
  }
  const MemoryPlan memory = plan_memory(config_, options());
  std::printf("memory  %s (%s), %s\n", bytes_text(double(memory.total())).c_str(),
              memory.text().c_str(), micro_batch_text(s_.micro_batch_tokens).c_str());
  if (step_seconds_ > 0) {
    std::printf("time    %.0f ms a step, %s in all\n", step_seconds_ * 1e3,
                duration_text(double(steps) * step_seconds_ / .97 + reserved).c_str());
  }
  std::fflush(stdout);
}

// ---------------------------------------------------------------------------------------------
// The beginning and the end

void FineTuning::make_model(const std::filesystem::path& dir) {
  gpt_.reset();
  gpt_ = make_gpt(config_, options());
  if (run_.peak == 0) run_.peak = measure_peak(*gpt_);
  if (s_.lora > 0 && base_.dir.empty()) base_ = adapter_base(dir);
  if (added_tokens_ > 0) {
    load_grown(dir);
  } else {
    load_weights(dir, *gpt_, {.seed = s_.seed});
  }
}

// Weights of a model with fewer tokens: see grow_rows.
void FineTuning::load_grown(const std::filesystem::path& dir) {
  const auto small = make_gpt(load_config(dir), {.device = Device::cpu, .mode = Mode::inference});
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

// Times steps and evaluation. The model is made again afterwards: the clock decides the number of
// steps and nothing else.
void FineTuning::calibrate_speed() {
  schedule_ = {.steps = 1 << 20, .warmup = 1 << 20};
  const int64_t bins = std::exchange(s_.bins, 0);
  step_seconds_ = double(s_.batch_tokens) * calibrate(s_.budget, [&](int i) {
                    const double tokens = step(i).tokens;
                    gpt_->stats();  // the device has done it
                    return tokens;
                  });
  s_.bins = bins;
  if (val_.size() > 0) {
    const int64_t positions = std::min(val_.all_positions(), 2 * s_.micro_batch_tokens);
    const double start = now();
    evaluate(positions);
    eval_seconds_ = (now() - start) / double(positions);
  }
  stream_->set_state({});
  positions_ = trained_ = 0;
}

int64_t FineTuning::begin(const Json* saved) {
  const double started = now();
  if (saved) {
    if (saved->at("data_hash").get<uint64_t>() != train_.hash() ||
        saved->at("val_hash").get<uint64_t>() != val_.hash()) {
      fail(s_.data[0], ": found other examples than the run began with, expected the same files");
    }
    stream_ = std::make_unique<Stream>(train_, s_.context, s_.seed);
    stream_->set_state(saved->at("stream").get<StreamState>());
    plan_micro_batch();
    make_model(run_.model());
    load_run(run_, *saved, *gpt_);
    positions_ = saved->at("positions").get<int64_t>();
    trained_ = saved->at("trained").get<int64_t>();
    if (const auto best = saved->find("best_loss"); best != saved->end()) {  // an older version's
      run_.state.best_quality = -best->get<double>();
      if (run_.state.best_step == 0) run_.state.best_step = -1;
    }
    if (run_.options.new_budget) plan_more_steps(*saved);
    print_plan(0);
  } else {
    plan_run();
    plan_steps(started);
    if (run_.options.dry_run) return 0;
    make_model(from_);
  }
  schedule_ = make_schedule(s_.optimizer, s_.budget.steps);
  return s_.budget.steps;
}

// The number of steps, with --minutes from the speed; prints the plan.
void FineTuning::plan_steps(double started) {
  int64_t& steps = s_.budget.steps;
  if (s_.budget.minutes > 0 || run_.options.dry_run) {
    make_model(from_);
    calibrate_speed();
  }
  const double last_eval = eval_seconds_ * double(std::min(s_.eval_tokens, val_.all_positions()));
  if (s_.budget.minutes > 0) {
    steps = steps_in_minutes(s_.budget, started, step_seconds_, last_eval);
    s_.bins = steps * bins_a_step();
  }
  print_plan(last_eval);
  if (s_.optimizer.warmup < 0) s_.optimizer.warmup = std::clamp<int64_t>(steps / 20, 1, 40);
  // Ten evaluations on the way, on a part of the held-out examples that costs 3 % of the time.
  if (s_.eval_every == 0) s_.eval_every = std::max<int64_t>(1, steps / 10);
  s_.eval_some = std::clamp<int64_t>(
      eval_seconds_ > 0 ? int64_t(.003 * double(steps) * step_seconds_ / eval_seconds_)
                        : s_.batch_tokens * steps / 50,
      std::min<int64_t>(s_.eval_tokens, std::max(4096, 2 * s_.context)), s_.eval_tokens);
}

// The last evaluation, on all held-out examples; with --patience, of the best weights.
OrderedJson FineTuning::finish() {
  if (s_.patience > 0) {
    const bool stopped_early = !run_.stopped.empty();
    if (!stopped_early) save_if_best(run_, -evaluate(s_.eval_some).loss);
    if (load_best(run_)) {
      run_.line.note(format("%s; keeps the weights of step %lld, held-out loss %.4f",
                            stopped_early ? "stops early" : "not the best at the end",
                            (long long)run_.state.best_step, -run_.state.best_quality));
    }
  }
  const int64_t last_step = run_.state.step;
  Score score;
  if (val_.size() > 0) {
    score = evaluate(s_.eval_tokens);
    run_.write_metrics("final", last_step,
                       {{"val_loss", score.loss}, {"val_tokens", score.trained}});
  }
  const double seconds = run_.state.seconds, loss = run_.state.recent_loss;
  run_.line.note(format("fine-tuned on %s tokens, %s of them trained, in %s: training loss %.3f%s",
                        count_text(positions_).c_str(), count_text(trained_).c_str(),
                        duration_text(seconds).c_str(), loss,
                        val_.size() > 0 ? format(", held-out loss %.4f", score.loss).c_str() : ""));
  return {{"stopped_early", !run_.stopped.empty()},
          {"tokens", positions_},
          {"trained_tokens", trained_},
          {"epochs", stream_->epochs()},
          {"tokens_per_second", double(positions_) / seconds},
          {"train_loss", loss},
          {"val_loss", val_.size() > 0 ? Json(score.loss) : Json()},
          {"val_tokens", score.trained},
          {"left_out", report_.left_out.json()},
          {"cut", report_.cut}};
}

OrderedJson FineTuning::state() const {
  return {{"positions", positions_},          {"trained", trained_},
          {"stream", Json(stream_->state())}, {"data_hash", train_.hash()},
          {"val_hash", val_.hash()},          {"settings", Json(s_)}};
}

SaveOptions FineTuning::save_options() const {
  if (!changed_tokenizer_) {
    return {.tokenizer_from = from_, .started_from = from_, .base = base_};
  }
  return {.started_from = from_, .base = base_, .also = [this](const std::filesystem::path& dir) {
            tokenizer_.save(dir);
          }};
}

// ---------------------------------------------------------------------------------------------
// Adapters added to their model

// Writes the model that `from` computes, adapters and all, as a directory or as a .gguf file.
void merge(const std::filesystem::path& from, const std::filesystem::path& out) {
  const std::filesystem::path dir = model_dir(from);
  if (!has_adapters(dir)) fail("--merge ", dir.string(), ": has no adapters");
  if (std::filesystem::exists(out)) fail("-o ", out.string(), ": exists");
  export_model({.model = from, .out = out});
}

// ---------------------------------------------------------------------------------------------
// Command line

void add_data_flags(CLI::App& app, Settings& s) {
  app.add_option("--model", s.model,
                 "a run, a Hugging Face directory or a .gguf file to begin with");
  app.add_option("--data", s.data,
                 "conversations, prompts with completions, or questions with answers, in JSON or "
                 "parquet; - is standard input; FILE:2 goes over FILE twice an epoch, FILE:.5 over "
                 "half of it");
  app.add_option("--val", s.val, "held-out examples in files of their own");
  app.add_option("--val-fraction", s.val_fraction,
                 "or this share of --data; -1: .05, or 0 with --val");
  add_record_flags(app, s.records);
  app.add_option("--context", s.context, "tokens of a bin; 0: the model's context, 4,096 at most");
  app.add_option("--long", s.too_long, "examples longer than that: drop or cut");
  app.add_flag("--add-chat-tokens", s.add_chat_tokens,
               "give a model without chat tokens new rows for them");
  add_stage_template_flags(app, s.chat_template);
  app.add_option("--lora", s.lora,
                 "train adapters of this rank beside a model that stays; 0: none");
  app.add_option("--lora-alpha", s.lora_alpha, "adapters are added alpha / rank times");
}

void add_budget_flags(CLI::App& app, Settings& s) {
  auto* budget = app.add_option_group("Budget", "one of; default: 2 epochs");
  budget->add_option("--epochs", s.budget.epochs, "times over the data");
  budget->add_option("--minutes", s.budget.minutes,
                     "measure the speed, then fix the steps that fit");
  budget->add_option("--steps", s.budget.steps, "optimizer steps");
  budget->add_option("--patience", s.patience,
                     "stop after so many evaluations without a better held-out loss, and keep the "
                     "best weights; 0: never");
  budget->add_option("--batch-tokens", s.batch_tokens, "tokens an optimizer step; 0: chosen");
  budget->add_option(kMicroBatchFlag, s.micro_batch_tokens, kMicroBatchHelp);
}

int main_sft(int argc, char** argv) {
  Settings s;
  Watch w;
  RunOptions o;
  CLI::App app(
      "Fine-tunes a model on conversations, prompts with completions, or questions with answers.");
  app.option_defaults()->always_capture_default();
  std::string adapters;
  add_data_flags(app, s);
  app.add_option("--show", w.show,
                 "print so many examples and stop: trained tokens are marked, in a terminal also "
                 "where each stretch is from");
  app.add_option(
      "--merge", adapters,
      "write a run's adapters and their model as one, a directory or FILE.gguf, and stop");
  add_run_flags(app, o);
  add_budget_flags(app, s);
  add_optimizer_flags(app, s.optimizer, "learning rate of matrices or adapters; 0: chosen");
  add_muon_flags(app, s.optimizer);
  app.add_option("--seed", s.seed, "of the order of the data and of new weights");
  auto* watch = app.add_option_group("Watch", "changes no update");
  watch->add_option("--eval-every", s.eval_every, "steps; 0: a tenth of the run");
  watch->add_option("--eval-tokens", s.eval_tokens, "most tokens of the last evaluation");
  watch->add_option("--sample-every", w.sample_every, "steps; 0: a quarter of the run");
  auto* prompt = watch->add_option(
      "--prompt", w.prompt, "answered in samples, \\n: line break; empty: held-out examples");
  add_raw_flag(app, {prompt});
  const RenamedFlag renamed[] = {{"--clip", "--clip-norm"}};
  const std::vector<std::string> shown = {"--model", "--data",   "--map",     "--out",
                                          "--val",   "--epochs", "--minutes", "--lora",
                                          "--show",  "--resume", "--device"};
  if (!parse_flags(app, argc, argv, {{&app, shown}}, renamed)) return 0;
  if (w.show < 0) fail("--show: found ", w.show, ", expected a number of examples");
  if (!adapters.empty()) {
    if (o.out.empty()) fail("-o: missing, expected a directory to write");
    return merge(adapters, o.out), 0;
  }
  const bool shows = w.show > 0;
  if (!shows) begin_process(o);
  if (o.resume) {
    resume_settings(app, s, s.budget, o, saved_settings<Settings>(o, "fine-tuning"),
                    {"--patience", "--eval-every", "--eval-tokens"});
  } else if (s.model.empty() || s.data.empty()) {
    fail(s.model.empty() ? "--model: missing, expected the model to begin with"
                         : "--data: missing, expected JSON lines of conversations");
  }
  FineTuning tuning(std::move(s), std::move(w), std::move(o));
  if (shows) return tuning.show(), 0;
  return tuning.run();
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_sft(argc, argv); });
}
