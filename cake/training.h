// A run of steps, once: what pretraining, fine-tuning, reward models and RL share.
//
//     RUN/metrics.jsonl   one JSON object a line, {"step": n, ...}: each step, each evaluation
//     RUN/model/          the last checkpoint: a model directory with the trainer's state
//     RUN/best/           the best weights so far, where a stage keeps them; gone at the end
//     RUN/summary.json    at the end
//
// A stage fills in a Run: its options, and functions that the run calls in this order:
//
//     begin -> evaluate(0) -> [ step(n) -> evaluate(n) -> save where due ] ... -> finish -> save
//
// A run that was killed goes on from its last checkpoint, bit by bit as if it had not been. What
// has to survive a kill is one struct, RunState, and what the stage's `state` function returns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cake/checkpoint.h"
#include "cake/flags.h"
#include "cake/generate.h"
#include "cake/json.h"
#include "cake/run.h"
#include "cake/schedule.h"
#include "cake/tokenizer.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Options: how a run is kept and watched. They change no update.

struct RunOptions {
  std::filesystem::path out;
  std::string device = "auto";
  int threads = 0;
  int64_t save_every = 0;    // steps; 0: by time alone
  double save_minutes = 10;  // 0: by steps alone
  bool resume = false, overwrite = false, dry_run = false;
};

inline void add_run_flags(CLI::App& app, RunOptions& o) {
  app.add_option("-o,--out", o.out, "the run: DIR/metrics.jsonl, DIR/model, DIR/summary.json");
  app.add_flag("--resume", o.resume, "continue DIR from its last checkpoint");
  app.add_flag("--overwrite", o.overwrite, "replace DIR");
  auto* group = app.add_option_group("Run", "changes no update");
  group->add_option("--save-every", o.save_every, "steps between checkpoints; 0: by time alone");
  group->add_option("--save-minutes", o.save_minutes, "minutes between checkpoints; 0: never");
  group->add_option("--device", o.device, "auto, cpu or cuda");
  group->add_option("--threads", o.threads, "0: the physical cores that the process may use");
}

// Checks the options and prepares the process: threads, signals. Comes before everything else.
inline void begin_process(const RunOptions& o) {
  if (o.out.empty() && !o.dry_run) fail("-o: missing, expected a directory to write");
  if (o.resume && o.overwrite) fail("--resume and --overwrite: found both, expected one");
  check_device(parse_device(o.device));
  set_threads(o.threads);
  watch_signals();
}

// A run never writes where the model is that it begins with.
inline void expect_elsewhere(const std::filesystem::path& model, const std::filesystem::path& out) {
  std::error_code ec;
  if (std::filesystem::equivalent(model, out / "model", ec) ||
      std::filesystem::equivalent(model, out, ec)) {
    fail("-o ", out.string(), ": is the model to begin with, expected another directory");
  }
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
    if (stop_signal) break;
  }
  if (seconds.empty()) return 0;
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

// Step number `step`; `factor`: the schedule's.
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
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(RunState, step, seconds, skipped_in_a_row,
                                                recent_loss, lowest_loss, best_quality, best_step,
                                                worse_in_a_row)

// What a step tells the run.
struct StepResult {
  OrderedJson metrics;                // of the step, without its number
  std::string line;                   // for people
  std::optional<double> loss;         // a mean log-loss; given, its rise ends the run
  double tokens = 0, operations = 0;  // for the speed; 0: not told
  bool skipped = false;               // the gradient was not finite, nothing was updated
};

// What a stage does. Each function is called with the run's state up to date.
struct RunHooks {
  // Reads the data, plans and makes the model; `saved` is trainer_state.json of the checkpoint to
  // go on from, or null. Returns the number of steps. Nothing is written before it returns.
  std::function<int64_t(const Json* saved)> begin;
  std::function<StepResult(int64_t n)> step;
  // After step n (0: before the first): evaluates and samples, if it is time to.
  std::function<void(int64_t n)> evaluate;
  std::function<OrderedJson()> finish;  // the last evaluation; returns what summary.json says
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
  RunState state;
  int64_t steps = 0;    // of the whole run
  double peak = 0;      // operations a second, measured; 0: unknown
  double lr_scale = 1;  // for the advice when a run diverges
  std::string hint;     // a command to try the model with
  std::string stopped;  // why it ends before its last step; empty: it does not
  ProgressLine line;
  Metrics metrics;

  std::filesystem::path model() const { return options.out / "model"; }
  std::filesystem::path best() const { return options.out / "best"; }
  void write_metrics(int64_t step, const OrderedJson& fields) {
    OrderedJson all = {{"step", step}};
    all.update(fields);
    metrics.write(all.dump(-1, ' ', false, Json::error_handler_t::replace));
  }
};

// Ends a run whose loss or gradient is not finite, or explodes.
[[noreturn]] inline void fail_diverged(const Run& run, const std::string& what) {
  const bool saved = std::filesystem::exists(run.model() / "config.json");
  fail("step ", run.state.step, ": ", what,
       "; stopped, nothing was saved after it. Try --lr-scale ", run.lr_scale / 2,
       ", a longer --warmup, or --clip-norm .5", saved ? "; the last checkpoint is good" : "");
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

// Writes RUN/model: to go on from or, `finished`, without what only a resumed run needs.
inline void save_run(Run& run, bool finished) {
  SaveOptions options = run.hooks.save_options(!finished);
  options.optimizer = !finished;
  OrderedJson state = {{"stage", run.stage}, {"finished", finished}};
  state.update(OrderedJson(Json(run.state)));
  state.update(run.hooks.state());
  options.trainer_state = Json(state);
  save_checkpoint(run.model(), run.hooks.model(), options);
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

// The settings that a run was begun with: those of a resumed run are not asked for again.
template <class Settings>
Settings saved_settings(const RunOptions& options, const std::string& stage) {
  const Json state = read_trainer_state(options.out, stage);
  try {
    return with_parts(state.at("settings")).get<Settings>();
  } catch (const Json::exception& e) {
    fail((model_dir(options.out) / "trainer_state.json").string(),
         ": settings: ", json_complaint(e));
  }
}

// The steps until the last one, a signal, or a reason to stop. Returns whether the run is complete.
inline bool run_loop(Run& run, double began) {
  RunState& s = run.state;
  const RunOptions& o = run.options;
  double saved = now(), pace = 0;  // pace: seconds a step, smoothed
  if (s.step == 0) run.hooks.evaluate(0);
  for (int64_t n = s.step + 1; n <= run.steps && !stop_signal && run.stopped.empty(); n++) {
    const double t = now();
    StepResult r = run.hooks.step(n);
    const double took = now() - t;
    s.step = n;
    pace = pace > 0 ? .95 * pace + .05 * took : took;
    s.skipped_in_a_row = r.skipped ? s.skipped_in_a_row + 1 : 0;
    if (r.loss) watch_loss(run, *r.loss);
    if (s.skipped_in_a_row >= 3) fail_diverged(run, "three gradients in a row were not finite");
    if (r.tokens > 0) {
      r.metrics["tokens_per_second"] = r.tokens / took;
      r.line += format("  %s tokens/s", count_text(r.tokens / pace).c_str());
    }
    if (r.operations > 0 && run.peak > 0) {
      r.metrics["peak_share"] = r.operations / took / run.peak;
      r.line += format("  %.0f%% of peak", 100 * r.operations / pace / run.peak);
    }
    if (r.skipped) r.metrics["skipped"] = true;
    run.write_metrics(n, r.metrics);
    const bool last = n == run.steps;
    run.line.show(format("step %lld/%lld  %s  %s left", (long long)n, (long long)run.steps,
                         r.line.c_str(), duration_text(pace * double(run.steps - n)).c_str()),
                  last);
    run.hooks.evaluate(n);
    s.seconds = now() - began;
    const bool due = (o.save_every > 0 && n % o.save_every == 0) ||
                     (o.save_minutes > 0 && now() - saved > 60 * o.save_minutes);
    if ((due || stop_signal) && !last && run.stopped.empty()) {
      save_run(run, false);
      saved = now();
    }
  }
  return s.step >= run.steps || !run.stopped.empty();
}

// The whole run. Returns the process's exit status.
inline int run_steps(Run& run) {
  namespace fs = std::filesystem;
  const double started = now();
  const RunOptions& o = run.options;
  if (!o.resume && !o.overwrite && !o.dry_run) expect_new_run(o.out);
  Json saved;
  if (o.resume) {
    saved = read_trainer_state(o.out, run.stage);
    run.state = saved.get<RunState>();
    if (saved.at("finished").get<bool>()) {
      std::printf("%s is finished: %lld steps\n", o.out.c_str(), (long long)run.state.step);
      return 0;
    }
  }
  run.steps = run.hooks.begin(o.resume ? &saved : nullptr);
  if (o.dry_run) return 0;
  if (o.resume) {
    run.line.note(
        format("resumes after step %lld of %lld", (long long)run.state.step, (long long)run.steps));
  } else {
    if (o.overwrite) fs::remove_all(o.out);  // only now: another can take its place
    fs::create_directories(o.out);
  }
  check_disk(o.out, run.hooks.model().table());
  run.metrics.open(o.out / "metrics.jsonl", run.state.step);
  const double began = started - run.state.seconds;
  if (!run_loop(run, began)) {
    run.line.note(format("stopped and saved after step %lld of %lld: go on with --resume",
                         (long long)run.state.step, (long long)run.steps));
    return 128 + stop_signal;
  }
  OrderedJson summary = {{"stage", run.stage}, {"steps", run.state.step}};
  summary.update(run.hooks.finish());
  summary["seconds"] = run.state.seconds = now() - began;
  write_json(o.out / "summary.json", summary);
  save_run(run, true);
  fs::remove_all(run.best());
  run.line.note(concat("model in ", run.model().string(), run.hint.empty() ? "" : ": ", run.hint));
  return stop_signal ? 128 + stop_signal : 0;
}

// ---------------------------------------------------------------------------------------------
// A look at the model on the way

// One continuation of `prompt`, of at most `max_new` ids.
inline Completion sample_one(Gpt& gpt, const Tokenizer& tokenizer, std::vector<int> prompt,
                             int max_new, Sampling sampling, std::vector<int> stop_ids) {
  Generator generator(gpt, [&](int id) { return tokenizer.token_bytes(id); },
                      {.rows = 1, .cache_positions = gpt.config().T});
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

}  // namespace cake
