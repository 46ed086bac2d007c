// A run of steps, once: what pretraining, fine-tuning, reward models and RL share.
//
//     RUN/metrics.jsonl   one JSON object a line, {"step": n, "kind": K, ...}, where K is
//                         data (at the beginning: what was left out of the files), step, eval or
//                         final
//     RUN/model/          the last checkpoint: a model directory with the trainer's state
//     RUN/model-N/        earlier ones, of step N, with --keep-checkpoints
//     RUN/best/           the best weights so far, where a stage keeps them; gone at the end
//     RUN/summary.json    at the end
//
// A stage fills in a Run: its options, and functions that the run calls in this order:
//
//     begin -> evaluate(0) -> [ step(n) -> evaluate(n) -> save where due ] ... -> finish -> save
//
// A run that was killed goes on from its last checkpoint, bit by bit as if it had not been. What
// has to survive a kill is one struct, RunState, and what the stage's `state` function returns.
// While a process writes a run it holds a lock on the directory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/flags.h"
#include "cake/generate.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/schedule.h"
#include "cake/tokenizer.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Options: how a run is kept, watched and computed. They change no update but for rounding.

struct RunOptions {
  std::filesystem::path out;
  std::string device = "auto", precision = "auto";
  std::string recompute = "none";
  int threads = 0;
  int64_t save_every = 0;    // steps; 0: by time alone
  double save_minutes = 10;  // 0: by steps alone
  int keep_checkpoints = 0;  // beside the last one
  bool resume = false, overwrite = false, dry_run = false;
  bool new_budget = false;        // a resumed run got another one: see resume_settings
  bool new_micro_batch = false;   // a resumed run got another one
  std::shared_ptr<RunLock> lock;  // of `out`, from begin_process on where it exists
};

inline void add_run_flags(CLI::App& app, RunOptions& o) {
  app.add_option("-o,--out", o.out, "the run: DIR/metrics.jsonl, DIR/model, DIR/summary.json");
  app.add_flag("--resume", o.resume, "continue DIR from its last checkpoint");
  app.add_flag("--overwrite", o.overwrite, "remove the run that is in DIR, and begin anew");
  app.add_flag("--dry-run", o.dry_run, "print the plan and stop");
  auto* group = app.add_option_group("Run", "changes no update but for rounding");
  group->add_option("--save-every", o.save_every, "steps between checkpoints; 0: by time alone");
  group->add_option("--save-minutes", o.save_minutes, "minutes between checkpoints; 0: never");
  group->add_option("--keep-checkpoints", o.keep_checkpoints,
                    "keep so many earlier checkpoints, each as DIR/model-STEP");
  group->add_option("--device", o.device, "auto, cpu or cuda");
  group->add_option("--precision", o.precision, "auto, f32 or bf16 (auto: bf16 on CUDA)");
  group->add_option("--recompute", o.recompute,
                    "what the backward pass makes again to save memory: none, light (norms and "
                    "activations) or full (a layer from its input: one more forward pass)");
  group->add_option("--threads", o.threads, "0: the physical cores that the process may use");
}

// What a run writes in its directory; a stage may write more.
inline const std::set<std::string> kRunFiles = {"model", "best", "metrics.jsonl", "summary.json"};

// The step N of a checkpoint's name model-N; -1: it is no such name.
inline int64_t step_of_checkpoint(const std::string& name) {
  const bool is_one = name.starts_with("model-") && name.size() > 6 && name.size() < 20 &&
                      name.find_first_not_of("0123456789", 6) == std::string::npos;
  return is_one ? std::stoll(name.substr(6)) : -1;
}

// Removes what a process that was killed had not finished writing.
inline void remove_leftovers(const std::filesystem::path& out) {
  std::vector<std::filesystem::path> found;
  for (const auto& entry : std::filesystem::directory_iterator(out)) {
    const std::string end = entry.path().extension();
    const std::string name = entry.path().stem();
    const bool own = kRunFiles.count(name) || step_of_checkpoint(name) >= 0;
    if (own && (end == ".new" || end == ".old" || end == ".partial")) found.push_back(entry.path());
  }
  for (const auto& path : found) remove_path(path);
}

// Checks the options and prepares the process: threads, signals, and the lock of a run that exists.
// Comes before everything else.
inline void begin_process(RunOptions& o) {
  if (o.out.empty() && (o.resume || !o.dry_run)) {
    fail("-o: missing, expected the directory of the run");
  }
  if (o.resume && o.overwrite) fail("--resume and --overwrite: found both, expected one");
  require(o.save_every >= 0, "--save-every: found ", o.save_every, ", expected 0 or more");
  require(o.save_minutes >= 0, "--save-minutes: found ", o.save_minutes, ", expected 0 or more");
  require(o.keep_checkpoints >= 0, "--keep-checkpoints: found ", o.keep_checkpoints,
          ", expected 0 or more");
  check_device(parse_device(o.device), parse_precision(o.precision));
  parse_recompute(o.recompute);
  set_threads(o.threads);
  watch_signals();
  if (o.out.empty() || o.dry_run) return;
  if (o.resume && !std::filesystem::exists(o.out)) fail(o.out.string(), ": not found");
  if (std::filesystem::is_directory(o.out)) o.lock = std::make_shared<RunLock>(o.out);
  if (o.resume) {
    for (const char* name : {"model", "best"}) repair_checkpoint(o.out / name);
    remove_leftovers(o.out);
    require(std::filesystem::exists(o.out / "model"), o.out.string(),
            ": found no checkpoint to go on from, expected one: --overwrite begins anew");
  }
}

// What a stage's engine is made with, its own choices apart.
inline GptOptions gpt_options(const RunOptions& o) {
  return {.device = parse_device(o.device),
          .precision = parse_precision(o.precision),
          .recompute = parse_recompute(o.recompute)};
}

inline void expect_not_negative(const char* flag, double found) {
  if (!(found >= 0)) fail(flag, ": found ", found, ", expected above 0");
}

// ---------------------------------------------------------------------------------------------
// Budget: how long a run is. One of the four; the stage turns it into steps.

struct Budget {
  int64_t steps = 0, tokens = 0;
  double epochs = 0, minutes = 0;

  bool chosen() const { return steps > 0 || tokens > 0 || epochs > 0 || minutes > 0; }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Budget, steps, tokens, epochs, minutes)

inline void check_budget(const Budget& b) {
  expect_not_negative("--steps", double(b.steps));
  expect_not_negative("--tokens", double(b.tokens));
  expect_not_negative("--epochs", b.epochs);
  expect_not_negative("--minutes", b.minutes);
  std::string found;  // the flags given, so that the error names no flag that the stage has not
  int count = 0;
  const auto look_at = [&](const char* flag, bool given) {
    if (given) found += concat(count++ > 0 ? ", " : "", flag);
  };
  look_at("--steps", b.steps > 0), look_at("--tokens", b.tokens > 0);
  look_at("--epochs", b.epochs > 0), look_at("--minutes", b.minutes > 0);
  if (count > 1) fail(found, ": found more than one, expected one budget");
}

// Seconds a token: the median of the steps that fit in a small part of the budget. `step(i)` makes
// step i = 1, 2, .. and returns its tokens; the first one touches the memory and is not counted.
template <class Step>
double calibrate(const Budget& budget, Step step) {
  const double limit = budget.minutes > 0 ? std::clamp(.02 * 60 * budget.minutes, .2, 10.) : 3;
  std::vector<double> seconds;
  const double start = now();
  for (int i = 0; i <= 1 || (now() - start < limit && i < 200); i++) {
    const double t = now();
    const double tokens = step(i + 1);
    if (i > 0) seconds.push_back((now() - t) / tokens);
    stop_if_signalled();
  }
  const auto middle = seconds.begin() + long(seconds.size()) / 2;
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

// The steps that fit in what is left of --minutes. `started`: now() when the process began;
// `reserved`: seconds for the last evaluation.
inline int64_t steps_in_minutes(const Budget& budget, double started, double step_seconds,
                                double reserved) {
  const double left = 60 * budget.minutes - (now() - started) - reserved - .3;
  return std::max<int64_t>(1, int64_t(.95 * left / std::max(1e-6, step_seconds)));
}

// ---------------------------------------------------------------------------------------------
// Micro-batch: the tokens that a stage's models hold in memory at once. Its size decides the last
// bits of gradients, since sums are taken in another order, and nothing else. It is therefore
// chosen once, stored with the run's settings, and the same on resume.

inline constexpr const char* kMicroBatchFlag = "--micro-batch-tokens";
inline constexpr const char* kMicroBatchHelp =
    "tokens in memory at once; 0: as many as fit in 90% of the free memory, up to 65,536 on a GPU "
    "and 4,096 on the CPU";
inline constexpr int64_t kAnyMicroBatch = std::numeric_limits<int64_t>::max();
// A GPU's products reach their speed at some ten thousand rows. The CPU's are as fast at a
// thousand.
inline constexpr int64_t kCpuMicroBatch = 4096, kGpuMicroBatch = 65536;
inline int64_t most_micro_batch_tokens(Device device) {
  return find_device(device) == Device::cuda ? kGpuMicroBatch : kCpuMicroBatch;
}

// The largest multiple of `unit` up to `most`, but at least one unit, for which bytes_of(tokens) is
// at most `bytes`. bytes_of never falls as tokens rise.
template <class BytesOf>
int64_t largest_micro_batch(int64_t unit, int64_t most, int64_t bytes, BytesOf&& bytes_of) {
  int64_t fits = 1, too_large = std::max<int64_t>(1, most / unit) + 1;  // in units
  while (too_large - fits > 1) {
    const int64_t middle = fits + (too_large - fits) / 2;
    (bytes_of(middle * unit) <= bytes ? fits : too_large) = middle;
  }
  return fits * unit;
}

// Chooses `tokens`, where it is 0: the largest micro-batch by largest_micro_batch, which leaves a
// tenth of the free memory to other processes. `bytes_of(tokens)`: what all models of the stage
// take by their memory plans. A resumed run whose own micro-batch does not fit here is an Error
// that names one that does; where none does, making the models says what else would help. Comes
// before the first model is made.
template <class BytesOf>
void choose_micro_batch(int64_t& tokens, const RunOptions& o, int64_t unit, int64_t most,
                        BytesOf&& bytes_of) {
  const Device device = parse_device(o.device);
  const int64_t free_bytes = free_memory(device);
  const auto largest = [&] {
    most = std::min(most, most_micro_batch_tokens(device));
    return largest_micro_batch(unit, most, free_bytes / 10 * 9, bytes_of);
  };
  if (tokens == 0) {
    tokens = largest();
  } else if (o.resume && bytes_of(tokens) > free_bytes) {
    const int64_t smaller = largest();
    if (bytes_of(smaller) > free_bytes) return;
    fail("out of memory: micro-batches of ", tokens, " tokens",
         o.new_micro_batch ? "" : ", with which the run was begun,", " take ",
         bytes_text(double(bytes_of(tokens))), ", found ", bytes_text(double(free_bytes)),
         " free; --resume with ", kMicroBatchFlag, " ", smaller,
         " goes on, and the last bits of its updates differ");
  }
}

// Of the plan that a run prints.
inline std::string micro_batch_text(int64_t tokens) {
  return format("micro-batches of %lld tokens (%s)", (long long)tokens, kMicroBatchFlag);
}

// ---------------------------------------------------------------------------------------------
// Optimizer and schedule

struct OptimizerFlags {
  std::string name = "adamw";                           // or muon, for the matrices of the blocks
  double lr = 0;                                        // of matrices and adapters
  double embedding_lr = 0, head_lr = 0, vector_lr = 0;  // 0: as lr
  double lr_scale = 1;                                  // a factor on all of them
  double weight_decay = 0, clip_norm = 1, beta1 = .9, beta2 = .95, eps = 1e-8, momentum = .95;
  std::string schedule = "linear";
  int64_t warmup = -1;                // steps; -1: the stage chooses
  double warmdown = 1, final_lr = 0;  // see Schedule
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(OptimizerFlags, name, lr, embedding_lr, head_lr,
                                                vector_lr, lr_scale, weight_decay, clip_norm, beta1,
                                                beta2, eps, momentum, schedule, warmup, warmdown,
                                                final_lr)

inline void add_optimizer_flags(CLI::App& app, OptimizerFlags& o, const char* lr_help) {
  auto* group = app.add_option_group("Optimizer", "");
  const auto choosable = [](double value, std::string help) {
    return help + (value < 0 ? "; -1: chosen" : "");
  };
  group->add_option("--lr", o.lr, lr_help);
  group->add_option("--head-lr", o.head_lr, "learning rate of the head; 0: chosen");
  group->add_option("--lr-scale", o.lr_scale, "a factor on all learning rates");
  group->add_option("--schedule", o.schedule, "linear, cosine or constant");
  group->add_option("--warmup", o.warmup,
                    choosable(double(o.warmup), "steps in which the rate rises"));
  group->add_option("--warmdown", o.warmdown,
                    choosable(o.warmdown, "share of the steps in which a linear schedule falls"));
  group->add_option("--final-lr", o.final_lr,
                    choosable(o.final_lr, "share of the peak at the end"));
  group->add_option("--weight-decay", o.weight_decay, choosable(o.weight_decay, "of matrices"));
  group->add_option("--clip-norm", o.clip_norm, "largest norm of a step's gradient; 0: any");
  group->add_option("--beta1", o.beta1, "AdamW's decay of the mean gradient");
  group->add_option("--beta2", o.beta2, "AdamW's decay of the mean squared gradient");
  group->add_option("--adam-eps", o.eps, "AdamW's epsilon");
}

// Those of the stages that can train with Muon.
inline void add_muon_flags(CLI::App& app, OptimizerFlags& o) {
  auto* group = app.add_option_group("Muon", "and a learning rate for each kind of tensor");
  group->add_option("--optimizer", o.name, "muon or adamw; empty: chosen by the model's size");
  group->add_option("--embedding-lr", o.embedding_lr, "learning rate of embeddings; 0: chosen");
  group->add_option("--vector-lr", o.vector_lr, "learning rate of norms and biases; 0: chosen");
  group->add_option("--momentum", o.momentum, "Muon's momentum");
}

inline void check_optimizer(const OptimizerFlags& o) {
  expect_not_negative("--lr", o.lr), expect_not_negative("--head-lr", o.head_lr);
  expect_not_negative("--embedding-lr", o.embedding_lr);
  expect_not_negative("--vector-lr", o.vector_lr), expect_not_negative("--lr-scale", o.lr_scale);
  // -1: the stage chooses
  const auto expect = [](const char* flag, double found, double most, bool is_chosen = false) {
    if ((found >= 0 && found <= most) || (is_chosen && found == -1)) return;
    fail(flag, ": found ", found, ", expected ", most == 1 ? "0 to 1" : "0 or more");
  };
  constexpr double kAny = std::numeric_limits<double>::max();
  expect("--warmup", double(o.warmup), kAny, true);
  expect("--weight-decay", o.weight_decay, kAny, true), expect("--clip-norm", o.clip_norm, kAny);
  expect("--warmdown", o.warmdown, 1, true), expect("--final-lr", o.final_lr, 1, true);
  expect("--beta1", o.beta1, 1), expect("--beta2", o.beta2, 1), expect("--momentum", o.momentum, 1);
  if (!(o.eps > 0)) fail("--adam-eps: found ", o.eps, ", expected above 0");
  if (o.schedule != "linear" && o.schedule != "cosine" && o.schedule != "constant") {
    fail("--schedule: found ", o.schedule, ", expected linear, cosine or constant");
  }
  if (o.name != "muon" && o.name != "adamw" && !o.name.empty()) {
    fail("--optimizer: found ", o.name, ", expected muon or adamw");
  }
}

inline Schedule make_schedule(const OptimizerFlags& o, int64_t steps) {
  return {o.schedule, steps, o.warmup, o.warmdown, o.final_lr};
}

inline double peak_rate(const OptimizerFlags& o) { return o.lr_scale * o.lr; }  // of matrices

// Step number `step` of the optimizer; `factor`: the schedule's.
inline OptimizerStep optimizer_step(const OptimizerFlags& o, int64_t step, double factor) {
  const auto rate = [&](double lr) { return factor * o.lr_scale * (lr > 0 ? lr : o.lr); };
  OptimizerStep s;
  s.step = step;
  s.lr[size_t(Kind::embedding)] = s.lr[size_t(Kind::position)] = float(rate(o.embedding_lr));
  s.lr[size_t(Kind::matrix)] = s.lr[size_t(Kind::adapter)] = float(rate(o.lr));
  s.lr[size_t(Kind::head)] = float(rate(o.head_lr));
  s.lr[size_t(Kind::vector)] = float(rate(o.vector_lr));
  s.beta1 = float(o.beta1), s.beta2 = float(o.beta2), s.eps = float(o.eps);
  s.decay = s.muon_decay = float(o.weight_decay);
  s.muon_lr = float(rate(o.lr));
  s.muon_momentum = float(o.momentum);
  s.max_norm = float(o.clip_norm);
  return s;
}

// ---------------------------------------------------------------------------------------------
// The run

// What a run must remember, whatever its stage.
struct RunState {
  int64_t step = 0;                            // steps done
  double seconds = 0;                          // so far, earlier sittings included
  int skipped_in_a_row = 0;                    // steps whose gradient was not finite
  double recent_loss = 0, lowest_loss = 1e30;  // smoothed; the lowest that it has been
  double best_quality = -1e30;                 // of the weights in RUN/best, higher is better
  int64_t best_step = -1;                      // -1: there are none
  int worse_in_a_row = 0;                      // evaluations since then
  int64_t evaluated = -1;                      // the step of the last whole evaluation
  int64_t moments_since = 0;                   // the optimizer's moments were zero after this step
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(RunState, step, seconds, skipped_in_a_row,
                                                recent_loss, lowest_loss, best_quality, best_step,
                                                worse_in_a_row, evaluated, moments_since)

// What a step tells the run.
struct StepResult {
  OrderedJson metrics;                // of the step, without its number
  std::string line;                   // for people
  std::optional<double> loss;         // a mean log-loss; given, its rise ends the run
  double learning_rate = 0;           // of matrices, or of adapters
  double tokens = 0, operations = 0;  // for the speed; 0: not told
  bool skipped = false;               // the gradient was not finite, nothing was updated
  // Given, adds what the statistics of the step's update tell. Where the engine queues its work,
  // run_loop() reads them once the next step is queued, so that the device does not wait for it.
  std::function<void(StepResult&, const UpdateStats&)> add_stats;
};

// What a stage does. Each function is called with the run's state up to date.
struct RunHooks {
  // Reads the data, plans and makes the model; `saved` is trainer_state.json of the checkpoint to
  // go on from, or null. Returns the number of steps. Nothing is written before it returns.
  std::function<int64_t(const Json* saved)> begin;
  std::function<StepResult(int64_t n)> step;
  // After step n (0: before the first): evaluates and samples, if it is time to.
  std::function<void(int64_t n)> evaluate;
  std::function<bool(int64_t n)> evaluates;  // whether it is; where steps have `add_stats`
  std::function<OrderedJson()> finish;       // the last evaluation; returns what summary.json says
  std::function<Gpt&()> model;
  // Settings, and whatever else `begin` reads on resume.
  std::function<OrderedJson()> state;
  // Tokenizer, base of adapters, further files. `resumable`: a checkpoint to go on from, not the
  // end or the best weights.
  std::function<SaveOptions(bool resumable)> save_options;
};

struct Run {
  std::string stage;  // its name in trainer_state.json
  RunOptions options;
  RunHooks hooks;
  std::vector<std::filesystem::path> inputs;  // what it reads: models, data
  std::vector<std::string> own_files;         // what its stage writes beside a run's usual files
  bool keeps_best = false;                    // RUN/best takes room on the disk
  int64_t also_bytes = 0;                     // of what save_options(true).also writes
  RunState state;
  int64_t saved_step = -1;  // of the last checkpoint; -1: there is none
  int64_t steps = 0;        // of the whole run
  double peak = 0;          // operations a second, measured; 0: unknown
  double lr_scale = 1;      // for the advice when a run diverges
  std::string hint;         // a command to try the model with
  std::string stopped;      // why it ends before its last step; empty: it does not
  // Of the files that were read: how many records, and which were left out. The stage sets them
  // before `begin` returns; a stage that reads no records leaves `records` at 0.
  int64_t records = 0;
  LeftOut left_out;
  ProgressLine line;
  Metrics metrics;

  std::filesystem::path model() const { return options.out / "model"; }
  std::filesystem::path best() const { return options.out / "best"; }
  // `kind`: eval or final; run_loop writes those of a step, run_steps that of the data. What is
  // not finite is written as null.
  void write_metrics(const char* kind, int64_t step, const OrderedJson& fields) {
    OrderedJson all = {{"step", step}, {"kind", kind}};
    all.update(fields);
    metrics.write(all.dump(-1, ' ', false, Json::error_handler_t::replace));
  }
};

struct Diverged : Error {
  using Error::Error;
};

// Ends a run whose loss or gradient is not finite, or explodes.
[[noreturn]] inline void fail_diverged(const Run& run, const std::string& what) {
  const std::string model = run.model().string();
  throw Diverged(
      concat("step ", run.state.step, ": ", what,
             "; stopped, nothing was saved after it. Begin again with ", "--lr-scale ",
             run.lr_scale / 2, ", a longer --warmup, or --clip-norm .5",
             run.saved_step > 0 ? concat("; ", model, " is good, of step ", run.saved_step) : ""));
}

// Smooths the loss and ends a run in which it explodes.
inline void watch_loss(Run& run, double loss) {
  RunState& s = run.state;
  if (!std::isfinite(loss)) fail_diverged(run, format("the loss is %f", loss));
  s.recent_loss = s.step == 1 ? loss : .95 * s.recent_loss + .05 * loss;
  s.lowest_loss = std::min(s.lowest_loss, s.recent_loss);
  if (s.recent_loss > s.lowest_loss + 1.5) {
    fail_diverged(run, format("the loss rose from %.2f to %.2f", s.lowest_loss, s.recent_loss));
  }
}

// The checkpoints of steps in RUN, RUN/model-STEP, by step.
inline std::map<int64_t, std::filesystem::path> kept_checkpoints(const std::filesystem::path& out) {
  std::map<int64_t, std::filesystem::path> kept;
  for (const auto& entry : std::filesystem::directory_iterator(out)) {
    const int64_t step = step_of_checkpoint(entry.path().filename());
    if (step >= 0) kept[step] = entry.path();
  }
  return kept;
}

// Keeps RUN/model under a second name too, and of those only the latest. The two share their files,
// which no run ever changes.
inline void keep_checkpoint(const Run& run) {
  namespace fs = std::filesystem;
  const fs::path dst = run.options.out / concat("model-", run.state.step),
                 fresh = dst.string() + ".new";
  remove_path(fresh), remove_path(dst);
  count_disk_change();
  fs::copy(run.model(), fresh, fs::copy_options::recursive | fs::copy_options::create_hard_links);
  sync_path(fresh);
  rename_path(fresh, dst);
  auto kept = kept_checkpoints(run.options.out);
  // The latest of them is RUN/model itself.
  while (int64_t(kept.size()) > run.options.keep_checkpoints + 1) {
    remove_path(kept.begin()->second);
    kept.erase(kept.begin());
  }
}

// What an older version of a run did otherwise. 1 (or none): its schedule reached the floor at the
// last step.
inline constexpr int kStateVersion = 2;

// Writes RUN/model: to go on from or, `finished`, without what only a resumed run needs.
inline void save_run(Run& run, bool finished) {
  SaveOptions options = run.hooks.save_options(!finished);
  options.optimizer = !finished;
  OrderedJson state = {{"version", kStateVersion}, {"stage", run.stage}, {"finished", finished}};
  state.update(OrderedJson(Json(run.state)));
  state.update(run.hooks.state());
  options.trainer_state = Json(state);
  run.metrics.sync();
  save_checkpoint(run.model(), run.hooks.model(), options);
  run.saved_step = run.state.step;
  if (!finished && run.options.keep_checkpoints > 0) keep_checkpoint(run);
}

// Keeps the weights in RUN/best when `quality` (higher is better) is above all before; else false.
inline bool save_if_best(Run& run, double quality) {
  RunState& s = run.state;
  if (!(quality > s.best_quality)) {
    s.worse_in_a_row++;
    return false;
  }
  s.best_quality = quality, s.best_step = run.state.step, s.worse_in_a_row = 0;
  save_checkpoint(run.best(), run.hooks.model(), run.hooks.save_options(false));
  return true;
}

// Gives the model the weights of RUN/best again; false where it has them or there are none.
inline bool load_best(Run& run) {
  if (run.state.best_step < 0 || run.state.best_step >= run.state.step) return false;
  load_weights(run.best(), run.hooks.model());
  return true;
}

// The state of the run in `out`, which must be of this stage.
inline Json read_trainer_state(const std::filesystem::path& out, const std::string& stage) {
  const std::filesystem::path path = model_dir(out) / "trainer_state.json";
  const Json state = read_json(path);
  const auto found = json_get<std::string>(state, "stage", path.string());
  if (found != stage) {
    fail(path.string(), ": found the state of ", found, ", expected that of ", stage);
  }
  return state;
}

// Older versions had other names for some settings. `names`: (old, new).
inline void rename_keys(Json& settings,
                        std::initializer_list<std::pair<const char*, const char*>> names) {
  for (const auto& [old_key, key] : names) {
    if (settings.contains(old_key)) settings[key] = settings[old_key];
  }
}

// Settings with `budget` and `optimizer` as parts; older versions kept their fields beside the
// others, some under other names.
inline Json with_parts(Json settings) {
  if (const auto it = settings.find("optimizer"); it != settings.end() && it->is_object()) {
    return settings;
  }
  Json flat = settings;
  flat["name"] = settings.value("optimizer", "adamw");
  rename_keys(flat, {{"clip", "clip_norm"}, {"matrix_lr", "lr"}, {"adam_eps", "eps"}});
  settings["budget"] = flat, settings["optimizer"] = flat;
  return settings;
}

// The settings that a run was begun with. `with_new_names`: a stage's own for those of older
// versions.
template <class Settings>
Settings saved_settings(const RunOptions& options, const std::string& stage,
                        Json with_new_names(Json) = with_parts) {
  const Json state = read_trainer_state(options.out, stage);
  try {
    return with_new_names(state.at("settings")).template get<Settings>();
  } catch (const Json::exception& e) {
    fail((model_dir(options.out) / "trainer_state.json").string(),
         ": settings: ", json_complaint(e));
  }
}

// The flags that were given on the command line, those of groups too.
inline std::vector<CLI::Option*> given_flags(CLI::App& app) {
  std::vector<CLI::Option*> given;
  for (CLI::Option* option : app.get_options({}))
    if (option->count() > 0) given.push_back(option);
  for (CLI::App* group : app.get_subcommands({})) {
    if (!group->get_name().empty()) continue;  // a subcommand, not a group
    for (CLI::Option* option : given_flags(*group)) given.push_back(option);
  }
  return given;
}

// The settings of a resumed run: those it was begun with. The command line may give another budget,
// another micro-batch, and other values to the flags that are named `changeable`, which decide no
// update; any other flag whose value differs is refused. `settings`: what the flags of `app` write
// to; `budget` is a part of it.
template <class Settings>
void resume_settings(CLI::App& app, Settings& settings, Budget& budget, RunOptions& options,
                     const Settings& saved, const std::set<std::string>& changeable = {}) {
  const Json before = saved;
  std::vector<CLI::Option*> changed;
  for (CLI::Option* flag : given_flags(app)) {
    settings = saved;
    const Json saved_budget = budget;
    flag->run_callback();  // writes the value of this flag alone
    const Json patch = Json::diff(before, Json(settings));
    if (patch.empty()) continue;
    const std::string name = flag->get_name();
    if (Json(budget) != saved_budget) {
      options.new_budget = true;
    } else if (name == kMicroBatchFlag) {
      options.new_micro_batch = true;
    } else if (!changeable.count(name)) {
      const Json::json_pointer key(patch[0].at("path").template get<std::string>());
      fail(name, ": found ", CLI::detail::join(flag->results(), " "),
           " with --resume, expected none: the run was begun with ",
           before.contains(key) ? json_text(before[key]) : "none");
    }
    changed.push_back(flag);
  }
  settings = saved;
  if (options.new_budget) budget = {};
  for (CLI::Option* flag : changed) flag->run_callback();
  if (options.new_budget) check_budget(budget);
}

// The steps of a resumed run whose budget is new; `planned`: those that it had. Steps of --minutes
// follow from the pace so far; `steps_of(budget)` gives those of the budgets that only the stage
// understands. Says so where the learning rate rises.
template <class StepsOf>
int64_t resumed_steps(Run& run, const Budget& budget, const OptimizerFlags& o, int64_t planned,
                      StepsOf steps_of) {
  const int64_t done = run.state.step;
  int64_t steps = budget.steps;
  if (budget.minutes > 0) {
    steps = int64_t(60 * budget.minutes / std::max(1e-9, run.state.seconds) * double(done));
  } else if (budget.steps == 0) {
    steps = steps_of(budget);
  }
  if (steps < done) {
    fail("--resume: found a budget of ", steps, " steps, expected at least the ", done,
         " that are done");
  }
  const Schedule after = make_schedule(o, steps);
  const double last = peak_rate(o) * make_schedule(o, planned).at(done),
               next = peak_rate(o) * after.at(done + 1);
  if (done + 1 > after.warmup && next > last * (1 + 1e-9)) {
    run.line.note(
        format("the learning rate rises from %.3g to %.3g: %lld steps were planned, now "
               "%lld",
               last, next, (long long)planned, (long long)steps));
  }
  return steps;
}

// Reads RUN/model into a model that was made with the run's options. A finished run kept no
// moments: going on, it begins with new ones.
inline void load_run(Run& run, const Json& saved, Gpt& gpt) {
  load_weights(run.model(), gpt);
  if (!saved.at("finished").get<bool>()) {
    load_trainer_state(run.model(), gpt);
    return;
  }
  run.state.moments_since = run.state.step;
}

// Evaluates after step n, if that was not done before the run was saved.
inline void evaluate_once(Run& run) {
  if (run.state.evaluated >= run.state.step) return;
  run.hooks.evaluate(run.state.step);
  run.state.evaluated = run.state.step;
}

// The line and the metrics of step n, which took `seconds`.
inline void report_step(Run& run, int64_t n, StepResult& r, double seconds, double left) {
  r.metrics["lr"] = r.learning_rate;
  r.metrics["seconds"] = seconds;
  if (r.tokens > 0) {
    r.metrics["tokens_per_second"] = r.tokens / seconds;
    r.line += format("  %s tokens/s", count_text(r.tokens / seconds).c_str());
  }
  if (r.operations > 0 && run.peak > 0) {
    r.metrics["peak_share"] = r.operations / seconds / run.peak;
    r.line += format("  %.0f%% of peak", 100 * r.operations / seconds / run.peak);
  }
  const double promised = r.operations > 0 ? run.hooks.model().datasheet_operations() : 0;
  if (promised > 0) {
    r.metrics["mfu"] = r.operations / seconds / promised;
    r.line += format("  %.0f%% MFU", 100 * r.operations / seconds / promised);
  }
  if (r.skipped) r.metrics["skipped"] = true;
  run.write_metrics("step", n, r.metrics);
  run.line.show(format("step %lld/%lld  %s  %s left", (long long)n, (long long)run.steps,
                       r.line.c_str(), duration_text(left).c_str()),
                n == run.steps);
}

// The steps until the last one, a signal, or a reason to stop. Returns whether the run is complete.
inline bool run_loop(Run& run, double began) {
  RunState& s = run.state;
  const RunOptions& o = run.options;
  const double entered = now();
  const int64_t first = s.step + 1;
  double saved = now();
  evaluate_once(run);
  const auto is_due = [&](int64_t n) {  // a checkpoint
    return (o.save_every > 0 && n % o.save_every == 0) ||
           (o.save_minutes > 0 && now() - saved > 60 * o.save_minutes);
  };
  double last_report = now();
  const auto report = [&](int64_t n, StepResult& r, int updates_ago) {
    if (r.add_stats) r.add_stats(r, run.hooks.model().stats(updates_ago));
    const double took = now() - last_report;
    last_report = now();
    s.step = n;
    s.skipped_in_a_row = r.skipped ? s.skipped_in_a_row + 1 : 0;
    const double pace = (now() - entered) / double(n - first + 1);  // with evaluations
    report_step(run, n, r, took, pace * double(run.steps - n));
    if (r.loss) watch_loss(run, *r.loss);
    if (s.skipped_in_a_row >= 3) fail_diverged(run, "three gradients in a row were not finite");
    s.seconds = now() - began;
  };
  std::optional<StepResult> queued;  // of step s.step + 1, whose statistics have not been read
  const auto report_queued = [&](int updates_ago) {
    if (!queued) return;
    StepResult r = std::move(*queued);
    queued.reset();
    const int64_t n = s.step + 1;
    try {
      report(n, r, updates_ago);
    } catch (...) {  // a checkpoint of now has the weights of the updates that came after
      s.step = n + updates_ago;
      throw;
    }
  };
  for (int64_t n = first; n <= run.steps && !stop_signal && run.stopped.empty(); n++) {
    StepResult r;
    try {
      r = run.hooks.step(n);
    } catch (...) {  // the weights are those after the step before
      report_queued(0);
      throw;
    }
    report_queued(1);
    const bool is_looked_at = n == run.steps || stop_signal || is_due(n);  // before the next step
    if (r.add_stats && run.hooks.model().queues_work() && !is_looked_at &&
        !run.hooks.evaluates(n)) {
      queued = std::move(r);
      continue;
    }
    report(n, r, 0);
    evaluate_once(run);
    s.seconds = now() - began;
    if ((is_due(n) || stop_signal) && n < run.steps && run.stopped.empty()) {
      save_run(run, false);
      saved = now();
    }
    last_report = now();
  }
  report_queued(0);
  return s.step >= run.steps || !run.stopped.empty();
}

// Removes the run that is in `out`, and nothing else: files that no run of this stage writes stay.
inline void remove_run(const Run& run) {
  const std::filesystem::path& out = run.options.out;
  remove_leftovers(out);
  for (const auto& kept : kept_checkpoints(out)) remove_path(kept.second);
  for (const std::string& name : run.own_files) remove_path(out / name);
  for (const std::string& name : kRunFiles) remove_path(out / name);
}

// What is in `out` is a run of this stage, or nothing that --overwrite would remove.
inline void expect_own_run(const Run& run) {
  const std::filesystem::path& out = run.options.out;
  if (!std::filesystem::exists(out)) return;
  if (!std::filesystem::is_directory(out)) fail(out.string(), ": found a file, expected a run");
  if (std::filesystem::exists(run.model())) read_trainer_state(out, run.stage);
}

// What is left where a run stopped: the checkpoint of now, or none before the first step.
inline int stop_run(Run& run) {
  const RunState& s = run.state;
  if (s.step > 0 && run.saved_step < s.step) save_run(run, false);
  if (s.step > 0) {
    run.line.note(format("stopped and saved after step %lld of %lld: go on with --resume",
                         (long long)s.step, (long long)run.steps));
  } else {
    run.line.note("stopped before the first step: nothing was saved, --overwrite begins anew");
  }
  return 128 + stop_signal;
}

// An error that is not the weights' fault costs no steps: what is done is saved first.
[[noreturn]] inline void save_and_fail(Run& run, const std::exception& error) {
  if (run.state.step <= run.saved_step || run.state.step == 0) throw Error(error.what());
  try {
    save_run(run, false);
  } catch (const std::exception& second) {
    fail(error.what(), "; what is done since the last checkpoint is lost: ", second.what());
  }
  fail(error.what(), "; saved after step ", run.state.step, ": --resume goes on");
}

// The steps, the last evaluation, the last checkpoint. Returns the process's exit status.
inline int run_to_end(Run& run, double began) {
  try {
    if (!run_loop(run, began)) return stop_run(run);
    OrderedJson summary = {{"stage", run.stage}, {"steps", run.state.step}};
    summary.update(run.hooks.finish());
    summary["seconds"] = run.state.seconds = now() - began;
    write_json(run.options.out / "summary.json", summary);
  } catch (const Interrupted&) {
    return stop_run(run);
  } catch (const Diverged&) {
    throw;
  } catch (const std::exception& e) {
    save_and_fail(run, e);
  }
  save_run(run, true);
  remove_path(run.best());
  run.line.note(concat("model in ", run.model().string(), run.hint.empty() ? "" : ": ", run.hint));
  return 0;
}

// Sets the run's state to that of its checkpoint. Returns false where the run is finished and gets
// no further steps.
inline bool resume_state(Run& run, const Json& saved) {
  run.state = saved.get<RunState>();
  RunState& s = run.state;
  run.saved_step = s.step;
  if (!saved.contains("evaluated")) s.evaluated = s.step;  // older versions always had
  const bool finished = saved.at("finished").get<bool>();
  if (finished && !run.options.new_budget) {
    if (!run.options.dry_run) remove_path(run.best());  // a kill may have left it
    std::printf("%s is finished: %lld steps; --steps MORE goes on\n", run.options.out.c_str(),
                (long long)s.step);
    return false;
  }
  if (finished) {  // its best weights are its weights now
    s.best_quality = -1e30, s.best_step = -1, s.worse_in_a_row = 0, s.evaluated = -1;
  }
  if (saved.value("version", 1) < 2) {
    run.line.note(
        "begun with an older version: the schedule now reaches its floor one step after the last");
  }
  return true;
}

// The whole run. Returns the process's exit status.
inline int run_steps(Run& run) {
  namespace fs = std::filesystem;
  const double started = now();
  RunOptions& o = run.options;
  if (!o.resume && !o.dry_run) {
    expect_elsewhere(o.out, run.inputs);
    o.overwrite ? expect_own_run(run) : expect_new_run(o.out);
  }
  const Json saved = o.resume ? read_trainer_state(o.out, run.stage) : Json();
  try {
    if (o.resume && !resume_state(run, saved)) return 0;
    run.steps = run.hooks.begin(o.resume ? &saved : nullptr);
  } catch (const Interrupted&) {
    std::printf("stopped before the first step: nothing was written\n");
    return 128 + stop_signal;
  } catch (const Json::exception& e) {
    if (!o.resume) throw;
    fail((run.model() / "trainer_state.json").string(), ": ", json_complaint(e));
  }
  if (o.dry_run) return 0;
  if (o.new_micro_batch) {
    run.line.note(concat(kMicroBatchFlag,
                         ": given on resume: sums are taken in another order, and ",
                         "the last bits of updates may differ"));
  }
  if (o.resume) {
    run.line.note(
        format("resumes after step %lld of %lld%s", (long long)run.state.step, (long long)run.steps,
               saved.at("finished").get<bool>() ? "; the optimizer's moments begin at zero" : ""));
  } else {
    fs::create_directories(o.out);
    if (!o.lock) o.lock = std::make_shared<RunLock>(o.out);
    if (o.overwrite) remove_run(run);  // only now: the new run can take its place
  }
  const ParamTable& table = run.hooks.model().table();
  const int64_t checkpoint = checkpoint_bytes(table, true) + run.also_bytes;
  check_disk(o.out, checkpoint * (o.resume ? 1 : 2 + o.keep_checkpoints) +
                        (run.keeps_best ? checkpoint_bytes(table, false) : 0));
  run.metrics.open(o.out / "metrics.jsonl", run.state.step);
  if (!o.resume && run.records > 0) {
    run.write_metrics("data", 0, {{"records", run.records}, {"left_out", run.left_out.json()}});
  }
  return run_to_end(run, started - run.state.seconds);
}

// ---------------------------------------------------------------------------------------------
// A look at the model on the way

// One continuation of `prompt`, of at most `max_new` ids.
inline Completion sample_one(Gpt& gpt, const Tokenizer& tokenizer, std::vector<int> prompt,
                             int max_new, Sampling sampling, std::vector<int> stop_ids) {
  Generator generator(
      gpt, [&](int id) { return tokenizer.token_bytes(id); },
      options_for_one(gpt.config(), int64_t(prompt.size()), max_new));
  Request request;
  request.prompt = std::move(prompt);
  request.max_new = std::min(max_new, gpt.config().T - int(request.prompt.size()));
  request.sampling = sampling;
  request.sampling.vocab = tokenizer.vocab_size();
  request.stop_ids = std::move(stop_ids);
  const int number = generator.submit(request);
  generator.run();
  return generator.pop(number);
}

// Runs `sample`, which shows one. A sample that fails, as when its KV cache finds no memory, is a
// note: the run goes on.
template <class Sample>
void try_sample(ProgressLine& line, Sample&& sample) {
  try {
    sample();
  } catch (const std::exception& e) {
    line.note(concat("sample  failed: ", e.what()));
  }
}

}  // namespace cake
