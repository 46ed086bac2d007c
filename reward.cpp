// Stage 4, learning from preferences: which of several answers to a prompt people liked better.
//
//     preferences -> a model that gives an answer one number, its reward     (./reward train)
//     preferences -> the policy itself, against the model it began as        (./reward dpo)
//     answers -> their rewards by either                                     (./reward score)
//
// Both kinds of training say the same thing of a pair. The better answer w wins against the other,
// l, with probability s(r_w - r_l), s the logistic function (Bradley, Terry 1952). A reward model
// reads r off a scalar head, and RL then maximises r (InstructGPT, Ouyang et al. 2022). DPO needs
// no second model: its r is how much more likely the policy makes the answer than its reference
// does, beta (log p - log p_ref) (Rafailov et al. 2023). So a policy of DPO is a reward model too.
//
// Here, too, a stage is a few lines that turn what a forward pass gives into one number per token:
//
//     train:  value at the end of each answer    -> rank_loss -> dL/dvalue -> backward
//     dpo:    log p of each answer's tokens      -> dpo_loss  -> dL/dlogp  -> backward
//
// The file follows the data: comparisons as ids; what both runs share; the reward model (objective,
// step, measures, normalization, folds); DPO and its kin (objectives, step, references); scores.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/flags.h"
#include "cake/gpt.h"
#include "cake/json.h"
#include "cake/packed.h"
#include "cake/preferences.h"
#include "cake/record_flags.h"
#include "cake/records.h"
#include "cake/reward_model.h"
#include "cake/run.h"
#include "cake/stage_template.h"
#include "cake/tokenizer.h"
#include "cake/training.h"

namespace cake {
namespace {

// =============================================================================================
// Comparisons: what there is to learn from, as ids

// An answer under a model: the sum of its tokens' log-probabilities, and how many they are.
struct AnswerLogp {
  double sum = 0;
  int tokens = 0;
  double mean() const { return tokens > 0 ? sum / tokens : 0; }
};

// An answer to another prompt, for KTO's estimate of KL(policy, reference): see kto_baseline.
struct Mismatch {
  int comparison = -1;   // whose answer it is; -1: there is no other prompt
  size_t answer = 0;     // its number there
  AnswerLogp reference;  // in answer to this prompt, under the reference
};

// Two of a comparison's answers, w better than l by a margin of at least so much reward.
struct Pair {
  size_t w = 0, l = 0;
  double margin = 0;
};

// Answers to one prompt, each as the ids of the whole: prompt, answer, and the end_token of its
// kind. A labelled answer is a comparison of its own; a labelled text has no prompt, either.
struct Comparison {
  std::vector<std::vector<int>> sequences;  // (K) of each answer
  std::vector<std::vector<bool>> written;   // (K) of a chat's ids: by the assistant, not by a tool
  int prompt_length = 0;                    // ids that all sequences begin with
  std::vector<int> ranking;                 // (K) 1 is best; equal ranks are a tie
  std::vector<Pair> pairs;                  // what there is to learn; see pairs_of
  std::optional<bool> label;                // of the one answer: is it good?
  double chance = 0;     // that labellers choose as they did, where it is known; else 0
  uint64_t problem = 0;  // a hash of the prompt: comparisons of one problem stay together
  std::vector<AnswerLogp> reference;  // (K) of DPO: under the reference
  Mismatch mismatch;                  // of KTO

  bool is_chat() const { return !written.empty(); }
  int64_t tokens() const {
    int64_t n = 0;
    for (const auto& s : sequences) n += int64_t(s.size());
    return n;
  }
  int longest() const {
    size_t n = 0;
    for (const auto& s : sequences) n = std::max(n, s.size());
    return int(n);
  }
};

// The pairs of answers of which one is the better one.
std::vector<Pair> pairs_of(std::span<const int> ranking) {  // (K)
  std::vector<Pair> pairs;
  for (size_t w = 0; w < ranking.size(); w++)
    for (size_t l = 0; l < ranking.size(); l++)
      if (ranking[w] < ranking[l]) pairs.push_back({w, l});
  return pairs;
}

// Strings are a text and what continues it, or with `as_chat` a user's message and the assistant's
// answer. A preference without answers is a text alone. `score_margin`: the margin of a pair for
// each point by which the scores of its answers differ.
//
// Answers with the same ids make no pair: its gradient would be 0.
Comparison make_comparison(const StageTemplate& chat, Preference p, bool as_chat,
                           double score_margin = 0) {
  if (as_chat && !p.is_chat && !p.continuations.empty()) {
    p.is_chat = true;
    p.prompt.messages = {{"user", p.text, {}}};
    for (const std::string& c : p.continuations) p.answers.push_back({{"assistant", c, {}}});
    p.continuations.clear();
  }
  const int end = chat.end_token(p.is_chat);
  Comparison c{.ranking = p.ranking, .label = p.label, .chance = p.chance};
  const std::vector<int> prompt =
      p.is_chat ? chat.get().render(p.prompt, true).ids : chat.text_ids(p.text);
  for (Message& m : p.prompt.messages) m.trained = false;  // its ids are what generation reads
  if (!p.is_chat && p.continuations.empty()) {
    c.sequences.push_back(with_end(prompt, end));
  } else {
    c.prompt_length = int(prompt.size());
  }
  for (const std::vector<Message>& answer : p.answers) {
    Conversation whole = p.prompt;
    whole.messages.insert(whole.messages.end(), answer.begin(), answer.end());
    Rendered r = chat.get().render_for_training(whole);
    // Without what the template writes behind the turn.
    while (!r.ids.empty() && r.ids.back() != end) r.ids.pop_back();
    require(!r.ids.empty(), chat.get().name(), ": found no end of turn behind an answer, expected ",
            json_text(std::string(chat.tokenizer().token_bytes(end))));
    r.trained.resize(r.ids.size());
    c.sequences.push_back(std::move(r.ids));
    c.written.push_back(std::move(r.trained));
  }
  for (const std::string& text : p.continuations) {
    std::vector<int> ids = prompt;
    chat.tokenizer().encode(text, ids);
    c.sequences.push_back(with_end(std::move(ids), end));
  }
  // Reasoning before a later question is not written again: then they part earlier.
  for (const std::vector<int>& ids : c.sequences) {
    const auto end = std::mismatch(prompt.begin(), prompt.end(), ids.begin(), ids.end()).first;
    c.prompt_length = std::min(c.prompt_length, int(end - prompt.begin()));
  }
  for (const int id : prompt) c.problem = mix64(c.problem ^ uint64_t(id));
  if (c.label) return c;
  for (Pair pair : pairs_of(c.ranking)) {
    if (c.sequences[pair.w] == c.sequences[pair.l]) continue;
    if (p.margin) pair.margin = *p.margin;
    if (!p.scores.empty()) pair.margin += score_margin * (p.scores[pair.w] - p.scores[pair.l]);
    c.pairs.push_back(pair);
  }
  return c;
}

// What a stage learns from besides pairs.
enum class Labels { none, answers, texts_too };

struct ReadOptions {
  RecordOptions records;
  int context = 0;  // ids
  bool as_chat = false;
  double score_margin = 0;
  Labels labels = Labels::none;
  std::string loss;  // that takes them or not, for messages
};

// What read_comparisons met.
struct ReadCounts {
  int64_t records = 0;
  LeftOut left_out;
  int longest = 0;             // ids
  int64_t margins = 0;         // preferences with a margin of their own
  int64_t without_prompt = 0;  // pairs of texts whose beginning is the prompt
};

// How a model without a chat template reads a transcript: as a text.
PreferenceOptions preference_options(const StageTemplate& chat) {
  return {.transcripts_are_chats = chat.has()};
}

// make_comparison of a record's preference; errors name its place. A template may refuse a
// conversation, and a vocabulary may lack a byte.
Comparison make_comparison_of(const std::string& where, const StageTemplate& chat, Preference p,
                              bool as_chat, double score_margin = 0) {
  try {
    return make_comparison(chat, std::move(p), as_chat, score_margin);
  } catch (const Error& e) {
    fail(where, ": ", e.what());
  }
}

void check_label(const Preference& p, const ReadOptions& o, const std::string& where) {
  const bool is_text = p.continuations.empty() && p.answers.empty();
  if (!p.label || o.labels == Labels::texts_too) return;
  if (is_text && o.labels == Labels::answers) {
    fail(where, ": found a labelled text, expected a \"prompt\" and a \"completion\" with it");
  }
  if (o.labels == Labels::none) {
    fail(where, ": found a labelled ", is_text ? "text" : "answer", ", and --loss ", o.loss,
         " learns from pairs: --loss kto takes labelled answers");
  }
}

// Reads every record; leaves out those from which nothing can be learned.
std::vector<Comparison> read_comparisons(const std::vector<std::string>& paths,
                                         const StageTemplate& chat, const ReadOptions& o,
                                         ReadCounts& counts) {
  std::vector<Comparison> all;
  bool lacks_template = false;  // which is no line's fault
  const auto visit = [&](const Record& record) -> const char* {
    const PreferenceOptions options = preference_options(chat);
    Preference p = parse_preference(record, options);
    check_label(p, o, record.where);
    if (p.left_out) return p.left_out;
    if (o.as_chat && !p.has_prompt) {
      fail(record.where, ": found texts without a \"prompt\", expected one for --as-chat");
    }
    lacks_template |= (p.is_chat || o.as_chat) && !chat.has();
    if (lacks_template) return nullptr;
    const bool has_margin = p.margin.has_value(), has_prompt = p.has_prompt;
    Comparison c = make_comparison_of(record.where, chat, std::move(p), o.as_chat, o.score_margin);
    if (!c.label && c.pairs.empty()) return "equal answers";  // as ids
    const int longest = c.longest();
    counts.longest = std::max(counts.longest, longest);
    if (longest > o.context) return "too long";
    counts.margins += has_margin, counts.without_prompt += !has_prompt;
    all.push_back(std::move(c));
    return nullptr;
  };
  if (!paths.empty()) counts.records += for_each_record(paths, o.records, counts.left_out, visit);
  if (lacks_template) chat.get();  // throws
  return all;
}

uint64_t hash_of(std::span<const Comparison> comparisons) {  // of everything that decides a run
  uint64_t h = mix64(comparisons.size());
  for (const Comparison& c : comparisons) {
    h = mix64(h ^ uint64_t(c.prompt_length));
    for (const auto& s : c.sequences)
      for (const int id : s) h = mix64(h ^ uint64_t(id));
    for (const int r : c.ranking) h = mix64(h ^ uint64_t(r));
    for (const Pair& pair : c.pairs)
      if (pair.margin != 0) h = mix64(h ^ std::bit_cast<uint64_t>(pair.margin));
    if (c.label) h = mix64(h ^ (*c.label ? 3u : 5u));
  }
  return h;
}

// The chosen ones of `all` in micro-batches of at most `tokens`. The answers to a prompt are
// compared in one batch: a longer comparison gets a batch of its own. Each sequence's member is the
// number of its comparison. What is predicted: an answer's ids, where `written` says so.
std::vector<Packed> comparison_batches(std::span<const Comparison> all, std::span<const int> chosen,
                                       int64_t tokens) {
  std::vector<Packed> batches;
  for (const int number : chosen) {
    const Comparison& c = all[size_t(number)];
    Packed& b = batch_with_room(batches, c.tokens(), tokens);
    for (size_t k = 0; k < c.sequences.size(); k++) {
      b.add(number, c.sequences[k], c.sequences[k].size(), [&](size_t i) {
        return int(i) >= c.prompt_length && (c.written.empty() || c.written[k][i]);
      });
    }
  }
  return batches;
}

std::vector<int> all_of(std::span<const Comparison> comparisons) {  // 0, 1, ...
  std::vector<int> numbers(comparisons.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// =============================================================================================
// What both kinds of training share: settings, data, plan

struct PreferenceSettings {
  std::string model;
  std::vector<std::string> data, val;
  RecordOptions records;
  bool as_chat = false;
  StageTemplateFlags chat_template;
  int64_t limit = 0;         // comparisons to train on; 0: all
  int context = 0;           // ids; 0: the model's
  int folds = 0, fold = 0;   // fold: 1 to folds, the part that is held out
  double val_fraction = -1;  // -1: chosen
  Budget budget;
  int64_t batch = 0, micro_batch_tokens = 0, eval_every = 0;  // 0: chosen
  int64_t comparisons = 0;  // of the whole run, repetitions included; 0: not planned yet
  OptimizerFlags optimizer{.schedule = "cosine", .final_lr = .1};
  uint64_t seed = 1;

  int64_t steps() const { return (comparisons + batch - 1) / batch; }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(PreferenceSettings, model, data, val, records,
                                                as_chat, chat_template, limit, context, folds, fold,
                                                val_fraction, budget, batch, micro_batch_tokens,
                                                eval_every, comparisons, optimizer, seed)

// The saved settings of a run. Older versions had other names for some.
Json with_new_names(Json s) {
  rename_keys(s, {{"groups", "common"}, {"centring", "center"}, {"normalise", "normalize_on"}});
  Json& common = s["common"] = with_parts(s.at("common"));
  rename_keys(common, {{"most", "limit"}, {"groups", "comparisons"}});
  return s;
}

struct PreferenceData {
  std::filesystem::path source;  // the model that training begins with, or continues from
  Config config;
  Tokenizer tokenizer{nullptr};
  StageTemplate chat;
  bool has_chats = false;  // among the comparisons
  std::vector<Comparison> train, val;
  ReadCounts counts;
  uint64_t answers_hash = 0;  // of the file that a reward model's scores are normalized on
  // Path and hash of models that a checkpoint names and does not hold.
  OrderedJson models = OrderedJson::object();
};

void check_inputs(const PreferenceSettings& s) {
  if (s.model.empty()) fail("--model: missing, expected the model to begin with");
  if (s.data.empty()) fail("--data: missing, expected JSON lines of preferences");
}

// Comparisons of one problem are held out together, else the held-out ones would be known.
bool is_held_out(const Comparison& c, const PreferenceSettings& s) {
  const double u = uniform01(mix64(c.problem, hash64("held out")));
  return s.folds > 0 ? int(u * s.folds) + 1 == s.fold : u < s.val_fraction;
}

// eos_token_id ends what the model learns to write. pad_token_id must end nothing: transformers
// reads a reward model's score at the last token that is another one. -1: there is none.
void choose_special_tokens(PreferenceData& d) {
  bool texts = false;
  for (const std::vector<Comparison>* all : {&d.train, &d.val})
    for (const Comparison& c : *all) (c.is_chat() ? d.has_chats : texts) = true;
  d.config.set_first_end_token(d.chat.end_token(d.has_chats));
  const int text_end = d.tokenizer.find_document_separator();
  const std::vector<int> end_tokens = d.config.all_end_tokens();
  const auto ends = [&](int id) {
    return id == text_end ||
           std::find(end_tokens.begin(), end_tokens.end(), id) != end_tokens.end();
  };
  if (d.config.pad >= 0 && !ends(d.config.pad)) return;
  d.config.pad = d.tokenizer.special("<|spare_0|>");
  if (d.config.pad < 0) d.config.pad = d.tokenizer.special("<|fim_pad|>");  // Qwen's
  if (d.config.pad < 0 && !texts) d.config.pad = text_end;
}

// `o`: what the objective takes; the rest of it is set here.
PreferenceData read_data(PreferenceSettings& s, Run& run, ReadOptions& o) {
  const RunOptions& options = run.options;
  PreferenceData d;
  d.source = model_dir(options.resume ? options.out : std::filesystem::path(s.model));
  d.config = load_config(d.source);
  d.tokenizer = Tokenizer::load(d.source);
  // A run that is resumed has its template in its checkpoint.
  const StageTemplateFlags saved{"auto", s.chat_template.date};
  d.chat = StageTemplate(d.tokenizer, d.source, options.resume ? saved : s.chat_template);
  if (s.context == 0) s.context = d.config.T;
  if (s.context < 2 || s.context > d.config.T) {
    fail("--context: found ", s.context, ", expected 2 to the model's ", d.config.T);
  }
  if (s.val_fraction == -1) s.val_fraction = s.val.empty() ? .1 : 0;
  if (!(s.val_fraction >= 0 && s.val_fraction < 1)) {
    fail("--val-fraction: found ", s.val_fraction, ", expected 0 or more and less than 1");
  }
  o.records = s.records, o.context = s.context, o.as_chat = s.as_chat;
  for (Comparison& c : read_comparisons(s.data, d.chat, o, d.counts)) {
    (is_held_out(c, s) ? d.val : d.train).push_back(std::move(c));
  }
  std::ranges::move(read_comparisons(s.val, d.chat, o, d.counts), std::back_inserter(d.val));
  run.records = d.counts.records, run.left_out = d.counts.left_out;
  if (s.limit > 0 && int64_t(d.train.size()) > s.limit) d.train.resize(size_t(s.limit));
  if (d.train.empty()) fail(s.data[0], ": found all of it held out, expected some to train on");
  choose_special_tokens(d);
  return d;
}

// A model of conversations is saved with their template, one of texts as it was.
void save_tokenizer(SaveOptions& o, const PreferenceData& d) {
  if (d.has_chats) return save_tokenizer(o, d.chat, d.source);
  o.tokenizer_from = d.source;
}

// Fixes what was left open. `lr`: the peak that a model of 128 channels gets. Of a resumed run all
// is fixed but the budget, if it got another.
void plan(PreferenceSettings& s, const PreferenceData& d, Run& run, double lr) {
  check_optimizer(s.optimizer);
  expect_not_negative("--limit", double(s.limit)), expect_not_negative("--batch", double(s.batch));
  expect_not_negative("--micro-batch-tokens", double(s.micro_batch_tokens));
  expect_not_negative("--eval-every", double(s.eval_every));
  const int64_t planned = s.comparisons > 0 ? s.steps() : 0;
  if (planned > 0 && !run.options.new_budget) return;
  check_budget(s.budget);
  const auto all = double(d.train.size());
  const double epochs = s.budget.epochs > 0 ? s.budget.epochs : 1;
  if (s.batch == 0) s.batch = std::clamp<int64_t>(int64_t(all * epochs / 40), 8, 64);
  s.comparisons = s.budget.steps > 0 ? s.budget.steps * s.batch
                                     : std::max<int64_t>(1, std::llround(epochs * all));
  if (s.eval_every == 0) s.eval_every = std::max<int64_t>(1, s.steps() / 5);
  if (s.optimizer.warmup < 0) s.optimizer.warmup = std::clamp<int64_t>(s.steps() / 20, 1, 40);
  // A model of a million parameters wants hundreds of times what InstructGPT gave billions.
  if (s.optimizer.lr == 0) s.optimizer.lr = lr * std::min(1., std::pow(128. / d.config.C, 2));
  if (planned == 0) return;
  resumed_steps(run, s.budget, s.optimizer, planned, [&](const Budget&) { return s.steps(); });
}

// What the trained model is made with. A comparison that is longer than a micro-batch is a batch of
// its own.
GptOptions training_options(const PreferenceData& d, int64_t micro_batch_tokens,
                            const RunOptions& options) {
  GptOptions o = gpt_options(options);
  int64_t longest = micro_batch_tokens;
  for (const std::vector<Comparison>* all : {&d.train, &d.val})
    for (const Comparison& c : *all) longest = std::max(longest, c.tokens());
  o.batch_tokens = int(longest);
  return o;
}
constexpr int64_t kMicroBatchUnit = 256;  // tokens; what is chosen is a multiple of it

// `memory`: of the trained model. `further_models`: ", reference 1.2 GB", or nothing.
void print_plan(const PreferenceSettings& s, const PreferenceData& d, const MemoryPlan& memory,
                const std::string& further_models = "") {
  std::printf("model   %s: %d layers, %d channels, context %d, %s parameters\n", d.source.c_str(),
              d.config.L, d.config.C, d.config.T,
              count_text(make_table(d.config).parameters()).c_str());
  std::printf("data    %s prompts or texts, held out %s; the longest has %d tokens, of %d\n",
              count_text(d.train.size()).c_str(), count_text(d.val.size()).c_str(),
              d.counts.longest, s.context);
  std::fputs(d.counts.left_out.text(d.counts.records).c_str(), stdout);
  if (d.counts.without_prompt > 0) {
    std::printf("%s pairs of texts have no \"prompt\": what both begin with is it\n",
                count_text(d.counts.without_prompt).c_str());
  }
  std::printf("budget  %s steps of %s prompts, %.2f epochs; learning rate %g, %s\n",
              count_text(s.steps()).c_str(), count_text(s.batch).c_str(),
              double(s.comparisons) / double(d.train.size()), s.optimizer.lr,
              s.optimizer.schedule.c_str());
  std::printf("memory  %s (%s)%s, %s\n", bytes_text(double(memory.total())).c_str(),
              memory.text().c_str(), further_models.c_str(),
              micro_batch_text(s.micro_batch_tokens).c_str());
  std::fflush(stdout);
}

// The comparisons of step n: a function of its number and the seed alone. Each epoch goes over all
// of them in an order of its own.
std::vector<int> chosen_in_step(const PreferenceSettings& s, const PreferenceData& d, int64_t n) {
  const int64_t size = int64_t(d.train.size());
  std::vector<int> chosen, order;
  int64_t epoch = -1;
  for (int64_t i = (n - 1) * s.batch; i < std::min(n * s.batch, s.comparisons); i++) {
    if (i / size != epoch) {
      epoch = i / size;
      order = all_of(d.train);
      Rng rng{mix64(s.seed, hash64("order"), uint64_t(epoch))};
      shuffle(order, rng);
    }
    chosen.push_back(order[size_t(i % size)]);
  }
  return chosen;
}

// The update that ends step n, which went over the chosen comparisons: the gradients are there.
// Adds what it did to the step's result.
void update(Gpt& gpt, const PreferenceSettings& s, const PreferenceData& d,
            std::span<const int> chosen, int64_t n, const Run& run, StepResult& result) {
  const double loss = result.metrics.at("loss"),
               factor = make_schedule(s.optimizer, s.steps()).at(n);
  if (!std::isfinite(loss)) fail_diverged(run, format("the loss is %f", loss));
  gpt.update(optimizer_step(s.optimizer, n - run.state.moments_since, factor));
  const UpdateStats stats = gpt.stats();
  for (const Packed& b : comparison_batches(d.train, chosen, s.micro_batch_tokens)) {
    result.tokens += double(b.positions());
    result.operations += training_operations(gpt, b.doc_starts);
  }
  result.learning_rate = peak_rate(s.optimizer) * factor;
  result.metrics.update({{"grad_norm", stats.grad_norm}, {"tokens", int64_t(result.tokens)}});
  result.line += format("  grad %.2f", stats.grad_norm);
  result.skipped = stats.skipped;
}

// What a checkpoint remembers of a training, and what `begin` checks when a run goes on from it.
template <class Training>
OrderedJson state_of(const Training& t) {
  OrderedJson state = {{"settings", Json(t.settings)},
                       {"data_hash", hash_of(t.data.train)},
                       {"val_hash", hash_of(t.data.val)},
                       {"answers_hash", t.data.answers_hash}};
  state.update(t.data.models);
  return state;
}
template <class Training>
void check_state(const Training& t, const Json& saved) {
  const PreferenceSettings& s = t.settings.common;
  const std::string where = (t.data.source / "trainer_state.json").string();
  const Json found = state_of(t);
  const auto check_hash = [&](const char* key, const std::string& file) {
    if (json_get<uint64_t>(saved, key, where) == found.at(key)) return;
    const bool is_old = json_get_or<int>(saved, "version", 1, where) < 2;
    fail(file, ": found other preferences than the run began with, expected the same files",
         is_old ? " (since its version raw texts end with <|endoftext|>)" : "");
  };
  check_hash("data_hash", s.data[0]);
  check_hash("val_hash", s.val.empty() ? s.data[0] : s.val[0]);
  if (saved.contains("answers_hash")) check_hash("answers_hash", t.settings.further_input());
  for (const auto& [name, model] : t.data.models.items()) {
    check_model_hash(json_get<Json>(saved, name, where), model.at("hash"), where);
  }
}

// What a run reads.
std::vector<std::filesystem::path> inputs_of(const PreferenceSettings& s, const std::string& more) {
  std::vector<std::filesystem::path> inputs = {s.model, more};
  inputs.insert(inputs.end(), s.data.begin(), s.data.end());
  inputs.insert(inputs.end(), s.val.begin(), s.val.end());
  return inputs;
}

// A run of steps over the free functions of a training (RewardTraining, DpoTraining): begin, step,
// evaluate, finish and save_options. `settings`: what the flags of `app` write to.
template <class Training, class Settings>
int run_training(CLI::App& app, const char* stage, Settings& settings, RunOptions options) {
  begin_process(options);
  if (options.resume) {
    resume_settings(app, settings, settings.common.budget, options,
                    saved_settings<Settings>(options, stage, with_new_names), {"--eval-every"});
  }
  check_inputs(settings.common);
  fix_date(settings.common.chat_template);
  Training t{.settings = settings};
  Run run;
  run.stage = stage, run.options = std::move(options);
  run.inputs = inputs_of(settings.common, settings.further_input());
  run.hooks = {
      .begin =
          [&](const Json* saved) {
            begin(t, run, saved);
            run.lr_scale = t.settings.common.optimizer.lr_scale;
            return t.settings.common.steps();
          },
      .step = [&](int64_t n) { return step(t, n, run); },
      .evaluate =
          [&](int64_t n) {
            const PreferenceSettings& s = t.settings.common;
            if (n % s.eval_every == 0 && n < s.steps() && !t.data.val.empty()) evaluate(t, n, run);
          },
      .finish = [&] { return finish(t, run); },
      .model = [&]() -> Gpt& { return *t.gpt; },
      .state = [&] { return state_of(t); },
      .save_options = [&](bool) { return save_options(t); },
  };
  return run_steps(run);
}

// =============================================================================================
// The reward model
//
// A language model whose head was exchanged for one row: the score of a conversation is the value
// at its last <|im_end|>, that of a raw text the value at the <|endoftext|> behind it. The
// objective only sees differences of scores. Where zero lies and how large one is, is set after
// training: mean 0 and standard deviation 1 on a set of answers.

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double log_sigmoid(double x) {  // without overflow on either side
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}

struct RankLoss {
  double loss = 0;
  std::vector<double> dreward;  // (K)
};

// K answers to one prompt, and the pairs among them. Bradley, Terry 1952; all pairs of a prompt in
// one batch, Ouyang et al. 2022; a pair's own margin m, Touvron et al. 2023; centering, Eisenstein
// et al. 2023:
//   L = scale / pairs * sum over pairs of -log s(r_w - r_l - margin - m) + center (r_w + r_l)^2
// `scale`: 1 / prompts of the step. Without pairs the loss is 0.
RankLoss rank_loss(std::span<const double> reward,  // (K)
                   std::span<const Pair> pairs, double margin, double center, double scale) {
  RankLoss out{0, std::vector<double>(reward.size())};
  for (const auto& [w, l, own] : pairs) {
    const double difference = reward[w] - reward[l], sum = reward[w] + reward[l];
    const double expected = margin + own;
    out.loss += -log_sigmoid(difference - expected) + center * sum * sum;
    const double dpair = -sigmoid(expected - difference), dcenter = 2 * center * sum;
    out.dreward[w] += dpair + dcenter;
    out.dreward[l] += -dpair + dcenter;
  }
  const double mean = pairs.empty() ? 0 : scale / double(pairs.size());
  out.loss *= mean;
  for (double& d : out.dreward) d *= mean;
  return out;
}

// A text that is good, or not: L = -log s(r), or -log s(-r), times `scale`.
RankLoss label_loss(double reward, bool good, double scale = 1) {
  const double sign = good ? 1 : -1;
  return {scale * -log_sigmoid(sign * reward), {scale * (-sign * sigmoid(-sign * reward))}};
}

// Of a comparison or a labelled text.
RankLoss comparison_loss(const Comparison& c,
                         std::span<const float> reward,  // (K)
                         double margin, double center, double scale) {
  if (c.label) return label_loss(reward[0], *c.label, scale);
  return rank_loss(std::vector<double>(reward.begin(), reward.end()), c.pairs, margin, center,
                   scale);
}

struct RewardSettings {
  PreferenceSettings common;
  double margin = 0, center = 0;  // see rank_loss
  double score_margin = 0;        // see make_comparison
  // Mean 0 and standard deviation 1 on: "training" answers, a file of answers, or "none".
  std::string normalize_on = "training";

  std::string further_input() const {  // a file, or nothing
    return normalize_on == "training" || normalize_on == "none" ? "" : normalize_on;
  }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(RewardSettings, common, margin, center,
                                                score_margin, normalize_on)

struct RewardTraining {
  RewardSettings settings;
  PreferenceData data;
  std::unique_ptr<Gpt> gpt;
  std::vector<std::vector<int>> reference_answers;  // that scores are normalized on
  double shift = 0;                                 // to be added to a value
};

// ---------------------------------------------------------------------------------------------
// How well scores agree with preferences

// How well scores agree with preferences. Sums, to be added over comparisons and folds.
struct Agreement {
  // Pairs by how sure the scores are, s(|difference|) from .5 to 1: how often are they right?
  struct Bin {
    int64_t pairs = 0;
    double predicted = 0, right = 0;  // sums of s(|difference|), of right answers
  };
  int64_t comparisons = 0, pairs = 0;  // a labelled text is a pair of its own
  double loss = 0;                     // of comparisons
  double right = 0, margin = 0;        // of pairs: in the right order, equal ones half; r_w - r_l
  double longer = 0;                   // pairs that "the longer answer wins" gets right
  double best_possible = 0;  // pairs that who knows their chance P gets right: max(P, 1 - P)
  int64_t known = 0;         // pairs whose chance is known
  bool texts = false;        // labels: there are no answers whose lengths could be compared
  std::array<Bin, 10> bins;
  std::vector<float> rewards, lengths;  // of every answer

  double accuracy() const { return right / double(std::max<int64_t>(1, pairs)); }
  double longer_wins() const { return longer / double(std::max<int64_t>(1, pairs)); }
  double mean_loss() const { return loss / double(std::max<int64_t>(1, comparisons)); }
  double mean_margin() const { return margin / double(std::max<int64_t>(1, pairs)); }
  // Expected calibration error: the mean distance between what was predicted and what was right.
  double calibration_error() const {
    double sum = 0, n = 0;
    for (const Bin& b : bins) sum += std::abs(b.predicted - b.right), n += double(b.pairs);
    return n > 0 ? sum / n : 0;
  }

  void add_pair(double difference) {  // r_w - r_l; NaN makes the sums NaN
    const bool is_nan = std::isnan(difference);
    const double is_right = is_nan ? difference : difference > 0 ? 1 : difference == 0 ? .5 : 0;
    pairs++, right += is_right, margin += difference;
    const double sure = sigmoid(std::abs(difference)), place = is_nan ? 0 : (sure - .5) * 2;
    Bin& bin = bins[std::min(size_t(place * double(bins.size())), bins.size() - 1)];
    bin.pairs++, bin.predicted += sure, bin.right += is_right;
  }
  void add(const Agreement& a) {
    comparisons += a.comparisons, pairs += a.pairs, loss += a.loss;
    right += a.right, margin += a.margin, longer += a.longer, texts |= a.texts;
    best_possible += a.best_possible, known += a.known;
    for (size_t b = 0; b < bins.size(); b++) {
      bins[b].pairs += a.bins[b].pairs;
      bins[b].predicted += a.bins[b].predicted;
      bins[b].right += a.bins[b].right;
    }
    rewards.insert(rewards.end(), a.rewards.begin(), a.rewards.end());
    lengths.insert(lengths.end(), a.lengths.begin(), a.lengths.end());
  }
};

// Of one comparison. `loss`: its own.
Agreement agreement_on(const Comparison& c,
                       std::span<const float> reward,  // (K)
                       double loss) {
  Agreement a{.comparisons = 1, .loss = loss, .texts = c.label.has_value()};
  if (c.label) a.add_pair(*c.label ? reward[0] : -reward[0]);
  for (const auto& [w, l, margin] : c.pairs) {
    a.add_pair(double(reward[w]) - reward[l]);
    const size_t length_w = c.sequences[w].size(), length_l = c.sequences[l].size();
    a.longer += length_w > length_l ? 1 : length_w == length_l ? .5 : 0;
  }
  if (c.chance > 0) a.known = 1, a.best_possible = std::max(c.chance, 1 - c.chance);
  for (size_t k = 0; k < c.sequences.size(); k++) {
    a.rewards.push_back(reward[k]);
    a.lengths.push_back(float(int(c.sequences[k].size()) - c.prompt_length));
  }
  return a;
}

struct Spread {
  double mean = 0, std = 0;
};
Spread spread_of(std::span<const float> values) {
  Spread s;
  for (const float v : values) s.mean += v / double(values.size());
  for (const float v : values) s.std += (v - s.mean) * (v - s.mean) / double(values.size());
  return {s.mean, std::sqrt(s.std)};
}

// ---------------------------------------------------------------------------------------------
// A step, and an evaluation

// Goes over the chosen comparisons; `train` adds their gradients, and nothing interrupts it.
Agreement pass_over(Gpt& gpt, const RewardSettings& s, std::span<const Comparison> all,
                    std::span<const int> chosen, bool train) {
  const double scale = train ? 1 / double(chosen.size()) : 1;
  Agreement seen;
  for (const Packed& b : comparison_batches(all, chosen, s.common.micro_batch_tokens)) {
    if (!train) stop_if_signalled();
    gpt.forward(b.batch(), train ? Pass::train : Pass::score);
    const std::span<const float> value = gpt.value();
    std::vector<float> dvalue(b.positions());
    for (size_t i = 0; i < b.members.size();) {
      const Comparison& c = all[size_t(b.members[i])];
      std::vector<float> reward;
      for (size_t k = 0; k < c.sequences.size(); k++) reward.push_back(value[b.last(i + k)]);
      const RankLoss r = train ? comparison_loss(c, reward, s.margin, s.center, scale)
                               : comparison_loss(c, reward, 0, 0, scale);
      seen.add(agreement_on(c, reward, r.loss / scale));
      for (const double d : r.dreward) dvalue[b.last(i++)] = float(d);
    }
    if (train) gpt.backward({}, dvalue);
  }
  return seen;
}

StepResult step(RewardTraining& t, int64_t n, const Run& run) {
  const std::vector<int> chosen = chosen_in_step(t.settings.common, t.data, n);
  const Agreement seen = pass_over(*t.gpt, t.settings, t.data.train, chosen, true);
  const Spread spread = spread_of(seen.rewards);
  StepResult result;
  result.metrics = {{"loss", seen.mean_loss()},
                    {"accuracy", seen.accuracy()},
                    {"margin", seen.mean_margin()},
                    {"reward_mean", spread.mean},
                    {"reward_std", spread.std}};
  result.line = format("loss %.4f  accuracy %3.0f%%  margin %+.3f", seen.mean_loss(),
                       100 * seen.accuracy(), seen.mean_margin());
  update(*t.gpt, t.settings.common, t.data, chosen, n, run, result);
  return result;
}

void evaluate(RewardTraining& t, int64_t n, Run& run) {
  const Agreement a = pass_over(*t.gpt, t.settings, t.data.val, all_of(t.data.val), false);
  run.write_metrics("eval", n,
                    {{"val_loss", a.mean_loss()},
                     {"val_accuracy", a.accuracy()},
                     {"val_margin", a.mean_margin()},
                     {"val_pairs", a.pairs}});
  run.line.note(format("step %lld  held-out accuracy %.1f%%, loss %.4f", (long long)n,
                       100 * a.accuracy(), a.mean_loss()));
}

// ---------------------------------------------------------------------------------------------
// Measures, for files and for people

// Pearson's; 0 where one of them does not vary. A reward that grows with length warns of a model
// that scores length.
double correlation(std::span<const float> a, std::span<const float> b) {
  const Spread sa = spread_of(a), sb = spread_of(b);
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += (a[i] - sa.mean) * (b[i] - sb.mean);
  const double scale = sa.std * sb.std * double(a.size());
  return scale > 0 ? sum / scale : 0;
}

OrderedJson agreement_json(const Agreement& a) {
  OrderedJson bins = OrderedJson::array();
  for (const Agreement::Bin& b : a.bins) {
    const double n = double(std::max<int64_t>(1, b.pairs));
    bins.push_back({{"pairs", b.pairs}, {"predicted", b.predicted / n}, {"right", b.right / n}});
  }
  OrderedJson json = {{"held_out", a.comparisons}, {"pairs", a.pairs},
                      {"accuracy", a.accuracy()},  {"loss", a.mean_loss()},
                      {"margin", a.mean_margin()}, {"calibration_error", a.calibration_error()},
                      {"calibration", bins}};
  if (!a.rewards.empty()) {
    json["reward_length_correlation"] = correlation(a.rewards, a.lengths);
  }
  if (!a.texts) json["longer_wins"] = a.longer_wins();
  if (a.known > 0) json["best_possible"] = a.best_possible / double(a.known);
  return json;
}

// The inverse, without the rewards of single answers. `where`: the file, for errors.
Agreement agreement_of(const Json& json, const std::string& where) try {
  Agreement a;
  a.comparisons = json.at("held_out").get<int64_t>();
  a.pairs = json.at("pairs").get<int64_t>();
  const auto pairs = double(a.pairs);
  a.right = pairs * json.at("accuracy").get<double>();
  a.loss = double(a.comparisons) * json.at("loss").get<double>();
  a.margin = pairs * json.at("margin").get<double>();
  a.texts = !json.contains("longer_wins");
  if (!a.texts) a.longer = pairs * json.at("longer_wins").get<double>();
  for (size_t b = 0; b < a.bins.size(); b++) {
    const Json& bin = json.at("calibration").at(b);
    const auto n = bin.at("pairs").get<int64_t>();
    a.bins[b] = {n, double(n) * bin.at("predicted").get<double>(),
                 double(n) * bin.at("right").get<double>()};
  }
  return a;
} catch (const Json::exception& e) {
  fail(where, ": ", json_complaint(e));
}

// The same for people.
std::string agreement_text(const Agreement& a) {
  std::string text = format("%s %s, accuracy %.1f%%", count_text(a.pairs).c_str(),
                            a.texts ? "texts" : "pairs", 100 * a.accuracy());
  if (!a.texts) text += format(" (the longer wins: %.1f%%)", 100 * a.longer_wins());
  if (a.known > 0) text += format(" of %.1f%% possible", 100 * a.best_possible / double(a.known));
  text += format(", loss %.4f, margin %.3f\n  sure  right  pairs", a.mean_loss(), a.mean_margin());
  for (const Agreement::Bin& b : a.bins) {
    if (b.pairs == 0) continue;
    const double n = double(b.pairs);
    text += format("\n  %3.0f%%  %4.0f%%  %5.0f", 100 * b.predicted / n, 100 * b.right / n, n);
  }
  return text;
}

// ---------------------------------------------------------------------------------------------
// Before the first step and after the last: normalization

constexpr size_t kReferenceAnswers = 1024;  // the mean is then known to 3 % of the spread

// The answers whose scores will have mean 0 and standard deviation 1.
std::vector<std::vector<int>> read_reference_answers(const RewardSettings& s, PreferenceData& d) {
  std::vector<std::vector<int>> answers;
  if (s.normalize_on == "training") {
    for (const Comparison& c : d.train)
      answers.insert(answers.end(), c.sequences.begin(), c.sequences.end());
  } else if (s.normalize_on != "none") {
    PreferenceOptions options = preference_options(d.chat);
    options.compared = false;
    LeftOut left_out;
    const auto visit = [&](const Record& record) -> const char* {
      Preference p = parse_preference(record, options);
      if (p.left_out) return p.left_out;
      const Comparison c = make_comparison_of(record.where, d.chat, std::move(p), s.common.as_chat);
      d.answers_hash = mix64(d.answers_hash, hash_of({&c, 1}));
      if (c.longest() > s.common.context) return "too long";
      answers.insert(answers.end(), c.sequences.begin(), c.sequences.end());
      return nullptr;
    };
    RecordOptions reading;  // --map is for the keys of --data
    reading.skip_bad_lines = s.common.records.skip_bad_lines;
    const int64_t records = for_each_record({s.normalize_on}, reading, left_out, visit);
    std::fputs(left_out.text(records).c_str(), stdout);
    if (answers.empty()) {
      fail(s.normalize_on, ": found no answer within the context of ", s.common.context, " tokens");
    }
  }
  if (s.normalize_on == "none") return answers;
  if (std::set<std::vector<int>>(answers.begin(), answers.end()).size() < 2) {
    fail("--normalize-on ", s.normalize_on, ": found ", answers.size(),
         " answers that are all the same, expected different ones");
  }
  std::vector<std::vector<int>> spread;  // over the whole file, whose parts may differ
  const size_t n = std::min(answers.size(), kReferenceAnswers);
  for (size_t i = 0; i < n; i++) spread.push_back(answers[i * answers.size() / n]);
  return spread;
}

void scale_scores(RewardTraining& t, double factor) {
  const int score = t.gpt->table().find("score");
  std::vector<float> row(size_t(t.data.config.C));
  t.gpt->read(score, Slot::weight, row);
  for (float& w : row) w = float(w * factor);
  t.gpt->write(score, Slot::weight, row);
}

// r = value / std - mean / std. The scale goes into the head's row of weights, the shift beside the
// model. Returns what mean and standard deviation were. Equal scores are left as they are.
Spread normalize(RewardTraining& t, Run& run) {
  if (t.reference_answers.empty()) return {0, 1};
  std::vector<float> scores;
  for (size_t i = 0; i < t.reference_answers.size(); i += 64) {
    stop_if_signalled();
    const auto some = std::span(t.reference_answers)
                          .subspan(i)
                          .first(std::min<size_t>(64, t.reference_answers.size() - i));
    std::ranges::copy(values_at_end(*t.gpt, some, t.settings.common.micro_batch_tokens),
                      std::back_inserter(scores));
  }
  const Spread spread = spread_of(scores);
  if (spread.std <= 1e-6) {
    run.line.note(format("all %zu reference answers have the score %g: not normalized",
                         scores.size(), spread.mean));
    return {0, 1};
  }
  scale_scores(t, 1 / spread.std);
  t.shift = -spread.mean / spread.std;
  return spread;
}

void check_settings(const RewardSettings& s) {
  if (!(s.center >= 0)) fail("--center: found ", s.center, ", expected 0 or more");
  if (!std::isfinite(s.margin)) fail("--margin: found ", s.margin, ", expected a number");
  require(std::isfinite(s.score_margin), "--score-margin: found ", s.score_margin,
          ", expected a number");
}

void begin(RewardTraining& t, Run& run, const Json* saved) {
  PreferenceSettings& s = t.settings.common;
  check_settings(t.settings);
  ReadOptions reading;
  reading.score_margin = t.settings.score_margin, reading.labels = Labels::texts_too;
  t.data = read_data(s, run, reading);
  // Measured on the demo's assistant and 1,500 prompts once over: 82 % right, at 5e-4 78 %.
  plan(s, t.data, run, 2e-3);
  t.reference_answers = read_reference_answers(t.settings, t.data);  // an error in them shows now
  t.data.config.head = Head::scalar;
  if (t.data.config.pad < 0) {
    fail(t.data.source.string(), ": found no <|spare_0|> among the special tokens, expected one ",
         "for pad_token_id: raw texts end with <|endoftext|>, where their score is read");
  }
  const auto options = [&](int64_t n) { return training_options(t.data, n, run.options); };
  choose_micro_batch(s.micro_batch_tokens, run.options, kMicroBatchUnit, kAnyMicroBatch,
                     [&](int64_t n) { return plan_memory(t.data.config, options(n)).total(); });
  const GptOptions o = options(s.micro_batch_tokens);
  print_plan(s, t.data, plan_memory(t.data.config, o));
  if (saved) check_state(t, *saved);
  if (run.options.dry_run) return;
  t.gpt = make_gpt(t.data.config, o);
  if (!saved) return load_weights(t.data.source, *t.gpt, {.new_score = true, .seed = s.seed});
  load_run(run, *saved, *t.gpt);
  if (!json_get<bool>(*saved, "finished", "trainer_state.json")) return;
  const auto path = run.options.out / "summary.json";  // its scores were normalized at the end
  const Json from = json_get<Json>(read_json(path), "normalised_from", path.string());
  scale_scores(t, json_get<double>(from, "std", path.string()));
}

OrderedJson finish(RewardTraining& t, Run& run) {
  OrderedJson summary = {
      {"prompts", int64_t(t.data.train.size())},
      {"epochs", double(t.settings.common.comparisons) / double(t.data.train.size())}};
  if (!t.data.val.empty()) {
    const Agreement a = pass_over(*t.gpt, t.settings, t.data.val, all_of(t.data.val), false);
    run.write_metrics("final", run.state.step,
                      {{"val_loss", a.mean_loss()}, {"val_accuracy", a.accuracy()}});
    summary.update(agreement_json(a));
    run.line.note("held out: " + agreement_text(a));
  }
  const Spread before = normalize(t, run);
  summary["normalised_from"] = {{"mean", before.mean}, {"std", before.std}};
  return summary;
}

SaveOptions save_options(const RewardTraining& t) {
  Config config = t.data.config;
  config.reward_shift = t.shift;
  SaveOptions o{.also = [config](const std::filesystem::path& dir) {
    write_json(dir / "config.json", config_json(config));
  }};
  save_tokenizer(o, t.data);
  return o;
}

// ---------------------------------------------------------------------------------------------
// Cross-validation: a run for each fold, whose problems it has not seen; their agreement together
// is that on all of the data. DIR/fold-1 and on hold the runs, DIR/summary.json the whole.

int run_folds(CLI::App& app, RewardSettings& settings, const RunOptions& options) {
  RewardSettings given = settings;
  const int parts = given.common.folds;
  if (parts < 2 || parts > 100) fail("--folds: found ", parts, ", expected 2 to 100");
  const std::filesystem::path out = options.out;
  check_inputs(given.common);
  if (options.resume && options.overwrite)
    fail("--resume and --overwrite: found both, expected one");
  if (!out.empty()) expect_elsewhere(out, inputs_of(given.common, given.further_input()));
  if (!options.resume && !options.overwrite && !options.dry_run) expect_new_run(out);
  Agreement all;
  OrderedJson folds = OrderedJson::array();
  for (int fold = 1; fold <= parts; fold++) {
    RunOptions o = options;
    if (!out.empty()) {
      o.out = out / concat("fold-", fold);
    }
    const auto has_state = [&](const char* dir) {  // model.old: a kill came between two renames
      return std::filesystem::exists(o.out / dir / "trainer_state.json");
    };
    o.resume = options.resume && (has_state("model") || has_state("model.old"));
    o.overwrite = options.overwrite || (options.resume && !o.resume);
    settings = given;
    settings.common.fold = fold;
    std::printf("fold %d of %d\n", fold, parts);
    if (const int status = run_training<RewardTraining>(app, "reward", settings, o)) return status;
    given.common.chat_template = settings.common.chat_template;  // one date for all folds
    given.common.micro_batch_tokens = settings.common.micro_batch_tokens;
    if (options.dry_run) continue;
    remove_path(out / "summary.json");  // of earlier folds
    const auto path = o.out / "summary.json";
    const Json summary = read_json(path);
    if (!summary.contains("accuracy")) fail(o.out.string(), ": found nothing held out");
    folds.push_back(json_get<double>(summary, "accuracy", path.string()));
    all.add(agreement_of(summary, path.string()));
  }
  if (options.dry_run) return 0;
  OrderedJson summary = {{"stage", "reward"}, {"folds", folds}};
  summary.update(agreement_json(all));
  write_json(out / "summary.json", summary);
  std::printf("all folds\nheld out: %s\n", agreement_text(all).c_str());
  return 0;
}

// =============================================================================================
// DPO: the policy learns from comparisons directly
//
// How much more likely the policy makes an answer than its reference does is a reward (Rafailov et
// al. 2023), r = beta (l - l_ref), l the sum of log p over the answer's tokens: the reward model's
// loss on this r needs no reward model. The reference is the model that training begins with. It
// never changes, so l_ref is computed once, before the first step.

// Of one pair; the mean over pairs is the caller's. Derivatives are by the two log-probabilities
// that went in: of a sum each token has all of it, of a mean 1/n.
struct PairLoss {
  double loss = 0, dchosen = 0, drejected = 0;
  double margin = 0;  // what the loss pushes up; right when above 0
};

// DPO (Rafailov et al. 2023) from sums over completions, D = (l_w - l_l) - (ref_w - ref_l), labels
// wrong with probability `smoothing` (Mitchell 2023):
//   L = -(1 - smoothing) log s(beta D) - smoothing log s(-beta D)
PairLoss dpo_loss(double chosen, double rejected, double ref_chosen, double ref_rejected,
                  double beta, double smoothing = 0) {
  const double x = beta * ((chosen - rejected) - (ref_chosen - ref_rejected));
  const double d = -beta * ((1 - smoothing) * sigmoid(-x) - smoothing * sigmoid(x));
  return {-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x), d, -d, x};
}

// IPO (Azar et al. 2023) from means per token: L = (D - 1/(2 beta))^2
PairLoss ipo_loss(double chosen, double rejected, double ref_chosen, double ref_rejected,
                  double beta) {
  const double D = (chosen - rejected) - (ref_chosen - ref_rejected), off = D - 1 / (2 * beta);
  return {off * off, 2 * off, -2 * off, beta * D};
}

// ORPO (Hong et al. 2024) from means per token, without a reference: to learn the chosen answer and
// its odds against the rejected one, o = p / (1 - p) with p = exp(l):
//   L = -l_w - lambda log s(log o_w - log o_l),  d log o/dl = 1 / (1 - p)
PairLoss orpo_loss(double chosen, double rejected, double lambda) {
  const auto log_odds = [](double l) { return l - std::log(-std::expm1(l)); };
  const double w = std::min(chosen, -1e-6), l = std::min(rejected, -1e-6);  // odds stay finite
  const double x = log_odds(w) - log_odds(l), d = lambda * sigmoid(-x);
  return {-chosen - lambda * log_sigmoid(x), -1 - d / -std::expm1(w), d / -std::expm1(l), x};
}

struct KtoLoss {
  double loss = 0, dlogp = 0;
};
// KTO (Ethayarajh et al. 2024), of one answer that is good or not, from sums. `weight`: of its
// kind, see DpoSettings. `baseline`: kto_baseline, through which no gradient flows.
//   L = weight (1 - s(x)), x = beta (l - ref - baseline) of a good answer, -x of the other
KtoLoss kto_loss(double logp, double reference, bool good, double baseline, double beta,
                 double weight = 1) {
  const double sign = good ? 1 : -1, s = sigmoid(sign * beta * (logp - reference - baseline));
  return {weight * (1 - s), -sign * beta * weight * s * (1 - s)};
}
// The KL as KTO estimates it, from l - ref of answers to other prompts (the paper's x_i with y_j, i
// != j, chosen and rejected alike): their mean, not below 0. Without any it is 0.
double kto_baseline(std::span<const double> differences) {
  double sum = 0;
  for (const double d : differences) sum += d;
  return sum < 0 ? 0 : sum / std::max(1., double(differences.size()));
}

struct DpoSettings {
  PreferenceSettings common;
  std::string loss = "dpo", reference;  // a model; empty: the one that training begins with
  double beta = .1, smoothing = 0;
  // Of KTO: lambda_D and lambda_U, the weights of good and of bad answers.
  double desirable_weight = 1, undesirable_weight = 1;
  int lora = 0;  // the adapters' rank; 0: all weights are trained
  double lora_alpha = 32;

  bool of_means() const { return loss == "ipo" || loss == "orpo"; }  // log p per token, not sums
  const std::string& further_input() const { return reference; }     // a model, or nothing
  double kto_weight(bool good) const { return good ? desirable_weight : undesirable_weight; }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(DpoSettings, common, loss, reference, beta,
                                                smoothing, desirable_weight, undesirable_weight,
                                                lora, lora_alpha)

// Of every answer of a batch.
std::vector<AnswerLogp> answer_logps(std::span<const float> logp,  // (N)
                                     const Packed& b) {
  std::vector<AnswerLogp> answers(b.members.size());
  for (size_t i = 0; i < answers.size(); i++) {
    for (size_t p = b.begin(i); p <= b.last(i); p++) {
      if (b.targets[p] < 0) continue;
      answers[i].sum += logp[p];
      answers[i].tokens++;
    }
  }
  return answers;
}

// What preferences make of a policy. Sums over comparisons; over pairs, of which each comparison's
// have weight 1 together; and over the better and the worse answers of these pairs and the good and
// the bad labelled answers.
struct DpoStats {
  double comparisons = 0, right = 0;
  double answers = 0, loss = 0;  // see loss_weight
  double pairs = 0, margin = 0;
  struct Kind {
    double n = 0, logp = 0, reward = 0;  // reward: beta (l - l_ref)
    void add(double weight, double l, double r) {
      n += weight, logp += weight * l, reward += weight * r;
    }
    double mean_logp() const { return logp / n; }  // NaN where there is none
    double mean_reward() const { return reward / n; }
  };
  Kind chosen, rejected;
  std::optional<double> kl;  // KTO's baseline

  double mean_loss() const { return loss / std::max(1., answers); }
  double accuracy() const { return right / std::max(1., comparisons); }
  // Labelled answers have no pair: what the means of both kinds differ by.
  double mean_margin() const {
    return kl ? chosen.mean_reward() - rejected.mean_reward() : margin / std::max(1., pairs);
  }
  OrderedJson json(const std::string& prefix = "") const {
    OrderedJson json = {{prefix + "loss", mean_loss()},
                        {prefix + "accuracy", accuracy()},
                        {prefix + "margin", mean_margin()},
                        {prefix + "logp_chosen", chosen.mean_logp()},
                        {prefix + "logp_rejected", rejected.mean_logp()},
                        {prefix + "reward_chosen", chosen.mean_reward()},
                        {prefix + "reward_rejected", rejected.mean_reward()}};
    if (kl) json[prefix + "kl"] = *kl;
    return json;
  }
  std::string text() const {
    std::string text = format("loss %.4f  accuracy %3.0f%%", mean_loss(), 100 * accuracy());
    if (chosen.n > 0 || rejected.n > 0) text += "  log p";
    if (chosen.n > 0) {
      text += format(" chosen %.1f (%+.2f)", chosen.mean_logp(), chosen.mean_reward());
    }
    if (rejected.n > 0) {
      text += format("%s rejected %.1f (%+.2f)", chosen.n > 0 ? " " : "", rejected.mean_logp(),
                     rejected.mean_reward());
    }
    return text;
  }
};

// The loss of one pair under `s`, w the better answer.
PairLoss pair_loss(const DpoSettings& s, const AnswerLogp& w, const AnswerLogp& l,
                   const AnswerLogp& ref_w, const AnswerLogp& ref_l, double kl) {
  if (s.loss == "ipo") return ipo_loss(w.mean(), l.mean(), ref_w.mean(), ref_l.mean(), s.beta);
  if (s.loss == "orpo") return orpo_loss(w.mean(), l.mean(), s.beta);
  if (s.loss == "dpo") return dpo_loss(w.sum, l.sum, ref_w.sum, ref_l.sum, s.beta, s.smoothing);
  // KTO learns from a pair as from a good answer and a bad one.
  const KtoLoss good = kto_loss(w.sum, ref_w.sum, true, kl, s.beta, s.kto_weight(true));
  const KtoLoss bad = kto_loss(l.sum, ref_l.sum, false, kl, s.beta, s.kto_weight(false));
  return {(good.loss + bad.loss) / 2, good.dlogp / 2, bad.dlogp / 2,
          s.beta * ((w.sum - ref_w.sum) - (l.sum - ref_l.sum))};
}

// How much a comparison weighs in the mean that the loss is. KTO's is a mean over answers, and a
// pair has two.
double loss_weight(const DpoSettings& s, const Comparison& c) {
  return s.loss == "kto" && !c.label ? 2 : 1;
}

// A labelled answer's loss, times `scale`. Adds it to `seen`, and returns dL/dlogp of its tokens.
std::vector<double> labelled_loss(const DpoSettings& s, const Comparison& c, const AnswerLogp& logp,
                                  double kl, double scale, DpoStats& seen) {
  const double reference = c.reference.at(0).sum, difference = logp.sum - reference;
  const KtoLoss l = kto_loss(logp.sum, reference, *c.label, kl, s.beta, s.kto_weight(*c.label));
  const double above = *c.label ? difference - kl : kl - difference;
  seen.comparisons++, seen.answers++, seen.loss += l.loss;
  seen.right += above > 0 ? 1 : above == 0 ? .5 : 0;
  (*c.label ? seen.chosen : seen.rejected).add(1, logp.sum, s.beta * difference);
  return {scale * l.dlogp};
}

// A comparison's loss is the mean over its pairs, times loss_weight and `scale`. Adds it to `seen`,
// and returns dL/dlogp of each answer's tokens: (K)
std::vector<double> comparison_loss(const DpoSettings& s, const Comparison& c,
                                    std::span<const AnswerLogp> logp,  // (K)
                                    double kl, double scale, DpoStats& seen) {
  if (c.label) return labelled_loss(s, c, logp[0], kl, scale, seen);
  const std::vector<AnswerLogp>& ref = c.reference;
  const double weight = loss_weight(s, c), n = double(c.pairs.size());
  std::vector<double> d(c.sequences.size());
  for (const auto& [w, l, margin] : c.pairs) {
    const PairLoss p = pair_loss(s, logp[w], logp[l], ref[w], ref[l], kl);
    d[w] += weight * scale / n * p.dchosen / (s.of_means() ? logp[w].tokens : 1);
    d[l] += weight * scale / n * p.drejected / (s.of_means() ? logp[l].tokens : 1);
    seen.loss += weight * p.loss / n;
    seen.margin += p.margin / n;
    seen.right += (p.margin > 0 ? 1 : p.margin == 0 ? .5 : 0) / n;
    const bool has_reference = s.loss != "orpo";
    seen.chosen.add(1 / n, logp[w].sum, has_reference * s.beta * (logp[w].sum - ref[w].sum));
    seen.rejected.add(1 / n, logp[l].sum, has_reference * s.beta * (logp[l].sum - ref[l].sum));
  }
  seen.comparisons++, seen.pairs++, seen.answers += weight;
  return d;
}

struct DpoTraining {
  DpoSettings settings;
  PreferenceData data;
  std::unique_ptr<Gpt> gpt;
  AdapterBase base;  // of adapters
};

// Gives each comparison an answer to another prompt, if there is another; chosen and rejected ones,
// good and bad ones take turns as they stand. In an order by problem, the comparison as many places
// further on as the most frequent problem fills is of another problem, and each comparison serves
// once; unless that problem fills more than half of the places: then it takes those of the others
// in turn.
void match_with_other_prompts(std::span<Comparison> all) {
  std::vector<int> order = all_of(all);
  std::ranges::stable_sort(order, {}, [&](int i) { return all[size_t(i)].problem; });
  const size_t n = order.size();
  const auto at = [&](size_t place) -> Comparison& { return all[size_t(order[place % n])]; };
  size_t most = 0, most_begin = 0;  // places that one problem fills
  for (size_t place = 0, begin = 0; place < n; place++) {
    if (at(place).problem != at(begin).problem) begin = place;
    if (place + 1 - begin > most) most = place + 1 - begin, most_begin = begin;
  }
  if (most == n) return;
  for (size_t place = 0; place < n; place++) {
    size_t other = (place + most) % n;
    if (at(other).problem == at(place).problem) {
      other = (most_begin + most + place % (n - most)) % n;
    }
    at(place).mismatch = {order[other], place % at(other).sequences.size()};
  }
}

// The numbers of those of the chosen comparisons that have a mismatch, and its log p under `gpt`.
std::vector<std::pair<int, AnswerLogp>> mismatched_logps(Gpt& gpt, const PreferenceSettings& s,
                                                         std::span<const Comparison> all,
                                                         std::span<const int> chosen) {
  std::vector<Packed> batches;
  for (const int number : chosen) {
    const Comparison& own = all[size_t(number)];
    if (own.mismatch.comparison < 0) continue;
    const Comparison& other = all[size_t(own.mismatch.comparison)];
    const size_t k = own.mismatch.answer, prompt = size_t(own.prompt_length);
    const auto &a = own.sequences[0], &b = other.sequences[k];
    std::vector<int> ids(a.begin(), a.begin() + own.prompt_length);
    ids.insert(ids.end(), b.begin() + other.prompt_length, b.end());
    ids.resize(std::min(ids.size(), size_t(s.context)));
    batch_with_room(batches, int64_t(ids.size()), s.micro_batch_tokens)
        .add(number, ids, ids.size(), [&](size_t p) {
          return p >= prompt &&
                 (!other.is_chat() || other.written[k][p - prompt + size_t(other.prompt_length)]);
        });
  }
  std::vector<std::pair<int, AnswerLogp>> logps;
  for (const Packed& b : batches) {
    gpt.forward(b.batch(), Pass::score);
    const std::vector<AnswerLogp> of_batch = answer_logps(gpt.logp(), b);
    for (size_t i = 0; i < of_batch.size(); i++) logps.emplace_back(b.members[i], of_batch[i]);
  }
  return logps;
}

// Goes over the chosen comparisons; `train` adds their gradients, and nothing interrupts it.
DpoStats pass_over(Gpt& gpt, const DpoSettings& s, std::span<const Comparison> all,
                   std::span<const int> chosen, bool train) {
  std::vector<double> differences;
  if (s.loss == "kto") {
    for (const auto& [i, logp] : mismatched_logps(gpt, s.common, all, chosen))
      differences.push_back(logp.sum - all[size_t(i)].mismatch.reference.sum);
  }
  double weights = 0;
  for (const int number : chosen) weights += loss_weight(s, all[size_t(number)]);
  const double kl = kto_baseline(differences), scale = 1 / weights;
  DpoStats seen;
  if (s.loss == "kto") seen.kl = kl;
  for (const Packed& b : comparison_batches(all, chosen, s.common.micro_batch_tokens)) {
    if (!train) stop_if_signalled();
    gpt.forward(b.batch(), train ? Pass::train : Pass::score);
    const std::vector<AnswerLogp> logps = answer_logps(gpt.logp(), b);
    std::vector<float> dlogp(b.tokens.size());
    for (size_t i = 0; i < b.members.size();) {
      const Comparison& c = all[size_t(b.members[i])];
      const auto logp = std::span(logps).subspan(i, c.sequences.size());
      for (const double d : comparison_loss(s, c, logp, kl, scale, seen)) {
        for (size_t p = b.begin(i); p <= b.last(i); p++) {
          if (b.targets[p] >= 0) dlogp[p] = float(d);
        }
        i++;
      }
    }
    if (train) gpt.backward(dlogp);
  }
  return seen;
}

StepResult step(DpoTraining& t, int64_t n, const Run& run) {
  const std::vector<int> chosen = chosen_in_step(t.settings.common, t.data, n);
  const DpoStats seen = pass_over(*t.gpt, t.settings, t.data.train, chosen, true);
  StepResult result{.metrics = seen.json(), .line = seen.text()};
  update(*t.gpt, t.settings.common, t.data, chosen, n, run, result);
  return result;
}

DpoStats evaluate(DpoTraining& t, int64_t n, Run& run, const char* kind = "eval") {
  const DpoStats seen = pass_over(*t.gpt, t.settings, t.data.val, all_of(t.data.val), false);
  run.write_metrics(kind, n, seen.json("val_"));
  run.line.note(format("step %lld  held out: %s", (long long)n, seen.text().c_str()));
  return seen;
}

// ---------------------------------------------------------------------------------------------
// Before the first step: the reference

// l of every answer of every comparison; without a model 0, as ORPO has no reference.
std::vector<std::vector<AnswerLogp>> logps_of(Gpt* gpt, std::span<const Comparison> all,
                                              int64_t micro_batch_tokens) {
  std::vector<std::vector<AnswerLogp>> logps;
  for (const Comparison& c : all) logps.emplace_back(c.sequences.size());
  if (!gpt) return logps;
  for (const Packed& b : comparison_batches(all, all_of(all), micro_batch_tokens)) {
    stop_if_signalled();
    gpt->forward(b.batch(), Pass::score);
    const std::vector<AnswerLogp> of_batch = answer_logps(gpt->logp(), b);
    for (size_t i = 0; i < of_batch.size();) {
      for (AnswerLogp& l : logps[size_t(b.members[i])]) l = of_batch[i++];
    }
  }
  return logps;
}

// A language model to score with; none in no directory.
std::unique_ptr<Gpt> load_scorer(const std::filesystem::path& dir, GptOptions options) {
  if (dir.empty()) return nullptr;
  options.mode = Mode::inference;
  auto gpt = make_gpt(load_config_with_head(dir, Head::lm), options);
  load_weights(dir, *gpt);
  return gpt;
}

// With --lora the reference is the policy as training begins with it, adapters of `dir` included;
// else a model of its own, which goes when its log-probabilities are known. ORPO has none.
bool has_own_reference(const DpoSettings& s) { return s.lora == 0 && s.loss != "orpo"; }

void load_references(DpoTraining& t, const std::filesystem::path& dir, const RunOptions& options) {
  const PreferenceSettings& s = t.settings.common;
  std::unique_ptr<Gpt> own;
  if (has_own_reference(t.settings)) {
    own = load_scorer(dir, training_options(t.data, s.micro_batch_tokens, options));
  }
  Gpt* reference = t.settings.lora > 0 ? t.gpt.get() : own.get();
  for (std::vector<Comparison>* all : {&t.data.train, &t.data.val}) {
    const auto logps = logps_of(reference, *all, s.micro_batch_tokens);
    for (size_t i = 0; i < all->size(); i++) (*all)[i].reference = logps[i];
    if (t.settings.loss != "kto") continue;
    match_with_other_prompts(*all);
    for (const auto& [i, logp] : mismatched_logps(*reference, s, *all, all_of(*all)))
      (*all)[size_t(i)].mismatch.reference = logp;
  }
}

// What a reference other than --model must have in common with the policy.
void check_reference(const DpoTraining& t, const std::filesystem::path& dir) {
  expect_same_vocabulary(dir, t.data.tokenizer, t.data.source);
  const int context = load_config_with_head(dir, Head::lm).T;
  for (const std::vector<Comparison>* all : {&t.data.train, &t.data.val}) {
    for (const Comparison& c : *all) {
      if (c.longest() <= context) continue;
      fail("--reference ", dir.string(), ": found a context of ", context, ", and an answer of ",
           c.longest(), " tokens with its prompt: --context ", context, " drops longer ones");
    }
  }
}

void check_settings(const DpoSettings& s) {
  if (s.loss != "dpo" && s.loss != "ipo" && s.loss != "kto" && s.loss != "orpo") {
    fail("--loss: found ", s.loss, ", expected dpo, ipo, kto or orpo");
  }
  if (!(s.beta > 0)) fail("--beta: found ", s.beta, ", expected above 0");
  if (!(s.smoothing >= 0 && s.smoothing < .5)) {
    fail("--label-smoothing: found ", s.smoothing, ", expected 0 or more and less than .5");
  }
  if (s.smoothing > 0 && s.loss != "dpo") {
    fail("--label-smoothing: found with --loss ", s.loss, ", expected dpo");
  }
  for (const auto& [flag, weight] : {std::pair("--desirable-weight", s.desirable_weight),
                                     std::pair("--undesirable-weight", s.undesirable_weight)}) {
    require(weight > 0 && std::isfinite(weight), flag, ": found ", weight, ", expected above 0");
    require(weight == 1 || s.loss == "kto", flag, ": found with --loss ", s.loss,
            ", expected --loss kto");
  }
  if (s.lora < 0) fail("--lora: found ", s.lora, ", expected a rank");
  if (!(s.lora_alpha > 0)) fail("--lora-alpha: found ", s.lora_alpha, ", expected above 0");
  if (s.lora > 0 && !s.reference.empty()) {
    fail("--reference: found with --lora, whose reference is the model that training begins with");
  }
}

// How much good and bad answers weigh together. KTO's paper advises that lambda_D n_D be 1 to 4/3
// times lambda_U n_U; each pair is one of both.
void print_balance(const DpoSettings& s, const PreferenceData& d) {
  double good = 0, bad = 0;
  for (const Comparison& c : d.train) {
    good += !c.label || *c.label, bad += !c.label || !*c.label;
  }
  std::printf("answers %s good of weight %g, %s bad of weight %g\n",
              count_text(size_t(good)).c_str(), s.desirable_weight, count_text(size_t(bad)).c_str(),
              s.undesirable_weight);
  const double ratio = s.desirable_weight * good / (s.undesirable_weight * bad);
  if (ratio > .99 && ratio < 1.35) return;
  if (good == 0 || bad == 0) {
    std::printf("        all answers are of one kind: expected good and bad ones\n");
  } else if (ratio < 1) {
    std::printf(
        "        good ones weigh %.2g times the bad ones, advised is 1 to 4/3: "
        "--desirable-weight %.3g\n",
        ratio, s.undesirable_weight * bad / good);
  } else {
    std::printf(
        "        good ones weigh %.2g times the bad ones, advised is 1 to 4/3: "
        "--undesirable-weight %.3g\n",
        ratio, s.desirable_weight * good / bad);
  }
}

void begin(DpoTraining& t, Run& run, const Json* saved) {
  PreferenceSettings& s = t.settings.common;
  const int lora = t.settings.lora;
  check_settings(t.settings);
  const bool kto = t.settings.loss == "kto";
  ReadOptions reading;
  reading.labels = kto ? Labels::answers : Labels::none, reading.loss = t.settings.loss;
  t.data = read_data(s, run, reading);
  plan(s, t.data, run, lora > 0 ? 1e-3 : 1e-4);
  if (t.data.config.head != Head::lm) {
    fail(t.data.source.string(), ": has a scalar head, expected a language model");
  }
  const auto reference = model_dir(t.settings.reference.empty() ? s.model : t.settings.reference);
  if (!t.settings.reference.empty()) check_reference(t, reference);
  t.data.models["reference"] = {{"path", reference.string()}, {"hash", model_hash(reference)}};
  // Two models are there at once while the log-probabilities of the reference are computed.
  const bool has_reference = has_own_reference(t.settings);
  const auto options = [&](int64_t n) {
    GptOptions o = training_options(t.data, n, run.options);
    if (lora > 0) o.lora = {lora, float(t.settings.lora_alpha)};
    return o;
  };
  const Config reference_config = has_reference ? load_config(reference) : Config();
  const auto reference_bytes = [&](int64_t n) {
    GptOptions o = training_options(t.data, n, run.options);
    o.mode = Mode::inference;
    return has_reference ? plan_memory(reference_config, o).total() : 0;
  };
  choose_micro_batch(s.micro_batch_tokens, run.options, kMicroBatchUnit, kAnyMicroBatch,
                     [&](int64_t n) {
                       return plan_memory(t.data.config, options(n)).total() + reference_bytes(n);
                     });
  const GptOptions o = options(s.micro_batch_tokens);
  const int64_t taken = reference_bytes(s.micro_batch_tokens);
  print_plan(s, t.data, plan_memory(t.data.config, o),
             taken > 0 ? ", reference " + bytes_text(double(taken)) : "");
  if (kto) print_balance(t.settings, t.data);
  if (t.data.counts.margins > 0) {
    std::printf("%s preferences have a margin: --loss %s does not use it, ./reward train does\n",
                count_text(t.data.counts.margins).c_str(), t.settings.loss.c_str());
  }
  if (saved) check_state(t, *saved);
  if (run.options.dry_run) return;
  t.gpt = make_gpt(t.data.config, o);
  if (lora > 0) {
    t.base = adapter_base(t.data.source);
    load_weights(reference, *t.gpt, {.seed = s.seed});
  }
  load_references(t, reference, run.options);
  if (saved) return load_run(run, *saved, *t.gpt);
  if (lora == 0) load_weights(t.data.source, *t.gpt);
}

OrderedJson finish(DpoTraining& t, Run& run) {
  OrderedJson summary = {
      {"loss_is", t.settings.loss},
      {"prompts", int64_t(t.data.train.size())},
      {"held_out", int64_t(t.data.val.size())},
      {"epochs", double(t.settings.common.comparisons) / double(t.data.train.size())}};
  if (!t.data.val.empty()) summary.update(evaluate(t, run.state.step, run, "final").json("val_"));
  return summary;
}

SaveOptions save_options(const DpoTraining& t) {
  SaveOptions o{.started_from = t.data.source, .base = t.base};
  save_tokenizer(o, t.data);
  return o;
}

// =============================================================================================
// Scores: the rewards that a reward model, or a policy of DPO, gives to answers
//
//     lines with answers -> ids -> rewards -> the same lines with "score" or "scores"
//                                          -> how often these agree with the preferences

struct ScoreOptions {
  std::string model, data, out, reference, device = "auto";
  RecordOptions records;
  double beta = 0;  // 0: the run's, or DPO's default
  StageTemplateFlags chat_template;
  bool as_chat = false;
  int threads = 0;
};

// The date of the run that made the model in `dir`, as YYYY-MM-DD; empty: it is not known.
std::string date_of_run(const std::filesystem::path& dir) {
  const auto path = dir / "trainer_state.json";
  if (!std::filesystem::exists(path)) return "";
  const Json state = read_json(path);
  const Json::json_pointer date("/settings/common/chat_template/date");
  return state.contains(date) && state[date].is_string() ? state[date].get<std::string>() : "";
}

// What a policy's implicit reward is made of: the loss, beta and reference of its run, if it has
// one.
DpoSettings implicit_reward_of(const std::filesystem::path& dir, const ScoreOptions& o) {
  DpoSettings s{.reference = o.reference};
  const auto path = dir / "trainer_state.json";
  const Json state = std::filesystem::exists(path) ? read_json(path) : Json::object();
  if (state.value("stage", "") == "dpo") {
    const std::string where = path.string();
    const auto settings = json_get<Json>(state, "settings", where);
    s.loss = json_get<std::string>(settings, "loss", where + ": settings");
    s.beta = json_get<double>(settings, "beta", where + ": settings");
    if (s.reference.empty() && s.loss != "orpo") {
      const auto reference = json_get<Json>(state, "reference", where);
      s.reference = json_get<std::string>(reference, "path", where + ": reference");
      check_model_hash(reference, model_hash(model_dir(s.reference)), where);
    }
  } else if (s.reference.empty()) {
    fail("--reference: missing, expected the model that the training of ", dir.string(),
         " began with: it is not a run of ./reward dpo, which remembers it");
  }
  if (o.beta > 0) s.beta = o.beta;
  if (!s.reference.empty()) s.reference = model_dir(s.reference);
  return s;
}

// beta (l - l_ref) of answer after answer. l is what the loss is made of: the sum of log p over an
// answer's tokens, or for IPO and ORPO their mean. ORPO has no reference: its l_ref is 0.
std::vector<float> implicit_rewards(const DpoSettings& s, const std::filesystem::path& policy,
                                    Device device, std::span<const Comparison> all) {
  constexpr int64_t kMicroBatchTokens = 4096;
  const auto logps =
      logps_of(load_scorer(policy, {.device = device}).get(), all, kMicroBatchTokens);
  const auto refs =
      logps_of(load_scorer(s.reference, {.device = device}).get(), all, kMicroBatchTokens);
  std::vector<float> rewards;
  for (size_t i = 0; i < all.size(); i++) {
    for (size_t k = 0; k < logps[i].size(); k++) {
      const AnswerLogp &l = logps[i][k], &ref = refs[i][k];
      rewards.push_back(float(s.beta * (s.of_means() ? l.mean() - ref.mean() : l.sum - ref.sum)));
    }
  }
  return rewards;
}

// The record as JSON without its last bracket, where the new score will stand. Its other fields
// stay as they are, numbers of any size among them.
std::string without_scores(const Record& record) {
  std::string json = "{";
  for (const auto& [key, value] : record.object) {
    if (key == "score" || key == "scores") continue;
    if (json.size() > 1) json += ", ";
    json += concat(Json(key).dump(), ": ");
    append_json(json, value);
  }
  return json;
}

int run_score(const ScoreOptions& o) {
  if (o.model.empty()) fail("MODEL: missing, expected a reward model or a policy of ./reward dpo");
  if (o.data.empty()) fail("--data: missing, expected JSON lines with answers");
  if (o.out.empty()) fail("-o: missing, expected a file to write");
  const Device device = parse_device(o.device);
  check_device(device);
  set_threads(o.threads);
  const std::filesystem::path dir = model_dir(o.model);
  const Tokenizer tokenizer = Tokenizer::load(dir);
  StageTemplateFlags flags = o.chat_template;
  if (flags.date.empty()) flags.date = date_of_run(dir);
  fix_date(flags);
  const StageTemplate chat(tokenizer, dir, flags);
  const Config config = load_config(dir);
  int context = config.T;
  DpoSettings dpo;
  if (config.head == Head::lm) dpo = implicit_reward_of(dir, o);
  if (!dpo.reference.empty()) {
    context = std::min(context, load_config(dpo.reference).T);
    expect_same_vocabulary(dpo.reference, tokenizer, dir);
  }

  std::vector<std::string> records;  // JSON, without the closing bracket
  std::vector<Comparison> answers;   // of each record; none where it is left out
  std::vector<std::vector<int>> sequences;
  LeftOut left_out;
  PreferenceOptions options = preference_options(chat);
  options.compared = false;
  const auto visit = [&](const Record& record) -> const char* {
    Preference p = parse_preference(record, options);
    const char* reason = p.left_out;
    Comparison c{.ranking = p.ranking};
    if (!reason) c = make_comparison_of(record.where, chat, std::move(p), o.as_chat);
    if (c.longest() > context) reason = "too long", c.sequences.clear();
    sequences.insert(sequences.end(), c.sequences.begin(), c.sequences.end());
    answers.push_back(std::move(c));
    records.push_back(without_scores(record));
    return reason;
  };
  const int64_t read = for_each_record({o.data}, o.records, left_out, visit);
  require(!sequences.empty(), o.data, ": found nothing to score among ", read,
          " records: left out ", left_out.json().dump(), ", the context is ", context);
  const std::vector<float> rewards = config.head == Head::scalar
                                         ? RewardModel(dir, device).score(sequences)
                                         : implicit_rewards(dpo, dir, device, answers);

  AtomicFile out(o.out);
  Agreement seen;
  size_t n = 0;  // answers so far
  for (size_t i = 0; i < records.size(); i++) {
    const Comparison& c = answers[i];
    const auto reward = std::span(rewards).subspan(n, c.sequences.size());
    n += reward.size();
    for (const float r : reward) {
      if (!std::isfinite(r)) fail(dir.string(), ": gave a score that is not finite");
    }
    if (!reward.empty()) {
      seen.add(agreement_on(c, reward, comparison_loss(c, reward, 0, 0, 1).loss));
    }
    OrderedJson score;
    if (reward.size() == 1) score = reward[0];
    if (reward.size() > 1) score = std::vector<float>(reward.begin(), reward.end());
    out.write(concat(records[i], records[i] == "{" ? "" : ", ", "\"",
                     c.ranking.size() > 1 ? "scores" : "score", "\": ", score.dump(), "}\n"));
  }
  out.commit();
  const Spread spread = spread_of(seen.rewards);
  std::printf("%s: scores of %s answers in %s lines, mean %.3f, standard deviation %.3f\n",
              o.out.c_str(), count_text(n).c_str(), count_text(records.size()).c_str(), spread.mean,
              spread.std);
  std::fputs(left_out.text(read).c_str(), stdout);
  if (left_out.total() > left_out.count("bad line")) {
    std::printf("the score of what is left out is null\n");
  }
  if (seen.pairs > 0) std::printf("%s\n", agreement_text(seen).c_str());
  return 0;
}

// =============================================================================================
// Command line

void add_preference_flags(CLI::App& app, PreferenceSettings& s) {
  app.add_option("--model", s.model,
                 "a run, a Hugging Face directory or a .gguf file to begin with");
  app.add_option(
      "--data", s.data,
      "preferences: \"prompt\", \"chosen\" and \"rejected\"; \"prompt\", \"responses\" "
      "and \"ranking\" or \"scores\"; whole conversations; \"prompt\", \"completion\" and "
      "\"label\"; and the shapes of the public data sets");
  app.add_option("--val", s.val, "held-out preferences in files of their own");
  app.add_option("--val-fraction", s.val_fraction,
                 "share of the prompts to hold out; -1: .1, or 0 with --val");
  add_record_flags(app, s.records);
  app.add_flag("--as-chat", s.as_chat,
               "strings are a user's message and the assistant's answer, not a text that goes on");
  add_stage_template_flags(app, s.chat_template);
  app.add_option("--limit", s.limit, "train on so many prompts; 0: all");
  app.add_option("--context", s.context, "tokens; longer answers are dropped; 0: the model's");
  auto* budget = app.add_option_group("Budget", "one of the two; neither: 1 epoch");
  budget->add_option("--epochs", s.budget.epochs, "times over the prompts");
  budget->add_option("--steps", s.budget.steps, "optimizer steps");
  app.add_option("--batch", s.batch, "prompts a step; 0: 64, or fewer of little data");
  app.add_option(kMicroBatchFlag, s.micro_batch_tokens, kMicroBatchHelp);
  app.add_option("--seed", s.seed, "of the order of the data and of new weights");
  app.add_option("--eval-every", s.eval_every, "steps between evaluations; 0: a fifth of the run");
  add_optimizer_flags(app, s.optimizer, "peak learning rate of AdamW; 0: by the model's width");
}

}  // namespace

int main_reward(int argc, char** argv) {
  CLI::App app("Learns from preferences: trains a reward model, or the policy itself (DPO).");
  app.option_defaults()->always_capture_default();
  app.require_subcommand(1);
  RewardSettings reward;
  DpoSettings dpo;
  RunOptions options;
  ScoreOptions score;

  CLI::App* train =
      app.add_subcommand("train", "preferences, or labelled texts, to a reward model");
  add_preference_flags(*train, reward.common);
  train->add_option("--folds", reward.common.folds,
                    "cross-validation: train so many models, each without the prompts of one part, "
                    "on which it is evaluated; 0: one model");
  train->add_option("--margin", reward.margin, "how much higher the better answer has to score");
  train->add_option("--score-margin", reward.score_margin,
                    "add to a pair's margin so much times the difference of its scores, such as "
                    "\"score_chosen\" - \"score_rejected\"");
  train->add_option("--center", reward.center, "weight of (r_w + r_l)^2, for instance .01");
  train->add_option("--normalize-on", reward.normalize_on,
                    "scores get mean 0 and standard deviation 1 on: training (answers), none, or a "
                    "file of answers, such as ./rlhf best-of-n --samples 1 --reward ended --write "
                    "makes of a policy");
  add_run_flags(*train, options);

  CLI::App* direct = app.add_subcommand("dpo", "preferences to a policy, without a reward model");
  add_preference_flags(*direct, dpo.common);
  direct->add_option("--loss", dpo.loss, "dpo, ipo, kto or orpo");
  direct->add_option("--beta", dpo.beta,
                     "higher: nearer to the reference; orpo: weight of the odds");
  direct->add_option("--label-smoothing", dpo.smoothing, "share of comparisons that are wrong");
  direct->add_option("--desirable-weight", dpo.desirable_weight,
                     "of kto: the weight of good answers (lambda_D)");
  direct->add_option("--undesirable-weight", dpo.undesirable_weight,
                     "of kto: the weight of bad answers (lambda_U)");
  direct->add_option("--reference", dpo.reference, "a model; empty: --model");
  direct->add_option("--lora", dpo.lora, "train adapters of this rank; 0: all weights");
  direct->add_option("--lora-alpha", dpo.lora_alpha, "adapters are added alpha / rank times");
  add_run_flags(*direct, options);

  CLI::App* scores = app.add_subcommand("score", "answers to their rewards");
  scores->add_option("MODEL", score.model, "a reward model, or a policy of ./reward dpo");
  scores->add_option("--data", score.data,
                     "preferences, lists of answers, conversations (\"messages\"), \"prompt\" and "
                     "\"completion\", or \"text\"");
  add_record_flags(*scores, score.records);
  scores->add_option("-o,--out", score.out, "the same lines with \"score\" or \"scores\"");
  scores->add_option("--reference", score.reference,
                     "of a policy: the model that its training began with; empty: the run's");
  scores->add_option("--beta", score.beta, "of a policy; 0: the run's, or .1");
  scores->add_flag("--as-chat", score.as_chat,
                   "strings are a user's message and the assistant's answer");
  scores->add_option("--template", score.chat_template.name,
                     "of conversations: auto (the model's own), chatml or a file");
  scores->add_option("--date", score.chat_template.date,
                     "YYYY-MM-DD, for templates that write the date; empty: the run's, or today");
  scores->add_option("--device", score.device, "auto, cpu or cuda");
  scores->add_option("--threads", score.threads, "0: the physical cores that the process may use");

  const RenamedFlag renamed[] = {{"--most", "--limit"},
                                 {"--clip", "--clip-norm"},
                                 {"--centring", "--center"},
                                 {"--normalise-on", "--normalize-on"}};
  if (!parse_flags(app, argc, argv,
                   {{train,
                     {"--model", "--data", "--val", "--map", "--as-chat", "--epochs", "--steps",
                      "--lr", "--folds", "--normalize-on", "-o", "--resume"}},
                    {direct,
                     {"--model", "--data", "--val", "--map", "--as-chat", "--epochs", "--steps",
                      "--lr", "--loss", "--beta", "--lora", "-o", "--resume"}},
                    {scores, {"MODEL", "--data", "--map", "-o", "--as-chat", "--reference"}}},
                   renamed)) {
    return 0;
  }
  if (*train && reward.common.folds != 0) return run_folds(*train, reward, options);
  if (*train) return run_training<RewardTraining>(*train, "reward", reward, options);
  if (*direct) return run_training<DpoTraining>(*direct, "dpo", dpo, options);
  return run_score(score);
}

}  // namespace cake

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_reward(argc, argv); });
}
