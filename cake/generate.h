// Text from a model: many sequences at once over one KV cache.
//
//     Request -> queue -> row of a batch -> Gpt::decode -> token -> StopStrings -> Utf8Stream ->
//     text
//
// Up to `rows` requests are decoded together. When one finishes, the next of the queue takes its
// row (continuous batching: Yu et al. 2022, Orca). The engine computes the same bits for a row
// whatever the other rows are, and a sampled token is a function of (seed, request, position).
// Therefore a request's text does not depend on the other requests, nor on the two ways in which
// the generator saves time and memory:
//
// - A prompt is prefilled once, in pieces of bounded size. A request whose prompt has a prefix in
//   common with a sequence in the cache forks that sequence and feeds only the rest. Finished
//   sequences stay in the cache until others need their pages (as in SGLang: Zheng et al. 2023).
// - The caller chooses the limit of the cache, which takes memory as it grows. A request waits
//   until the pages that it needs are free. When the rows together outgrow the limit, the row that
//   was admitted last gives up its pages and is fed again later, its prompt and its tokens so far
//   (preemption by recomputation, as in vLLM: Kwon et al. 2023).
//
// A sequence is token ids. Text is made from ids, and never turned back into ids. After a turn the
// caller may append ids, such as a tool's answer, and the request continues behind them. They are
// fed like a prompt, and marked as inserted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/gpt.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Bytes to text. A token is bytes. A character or a stop string may span several tokens.

// Bytes in, whole UTF-8 characters out. Bytes are held back while they may be the beginning of a
// valid character. Invalid bytes become U+FFFD, one for each maximal prefix of a character (the
// practice of the Unicode Standard, 3.9, and of the WHATWG's decoder).
class Utf8Stream {
 public:
  // Appends to `text` the characters that `bytes` complete.
  void feed(std::string_view bytes, std::string& text) {
    for (const char byte : bytes) {
      const auto b = static_cast<unsigned char>(byte);
      if (missing_ > 0 && (b < low_ || b > high_)) finish(text);
      if (missing_ > 0) {
        held_ += byte;
        low_ = 0x80, high_ = 0xBF;
        if (--missing_ == 0) text += std::exchange(held_, {});
      } else if (b < 0x80) {
        text += byte;
      } else if (b < 0xC2 || b > 0xF4) {
        text += kReplacement;
      } else {
        held_ = byte;
        missing_ = b < 0xE0 ? 1 : b < 0xF0 ? 2 : 3;
        // Overlong forms, surrogates and what lies above U+10FFFF show in the second byte.
        low_ = b == 0xE0 ? 0xA0 : b == 0xF0 ? 0x90 : 0x80;
        high_ = b == 0xED ? 0x9F : b == 0xF4 ? 0x8F : 0xBF;
      }
    }
  }
  // There are no more bytes: an incomplete character is replaced.
  void finish(std::string& text) {
    if (missing_ > 0) text += kReplacement;
    held_.clear();
    missing_ = 0;
  }

 private:
  static constexpr const char* kReplacement = "\xEF\xBF\xBD";
  std::string held_;                        // the beginning of a character
  int missing_ = 0;                         // bytes that it lacks
  unsigned char low_ = 0x80, high_ = 0xBF;  // bounds of the next one
};

// Finds the first of several strings that is complete, in bytes that come in pieces of any size.
// Text that may be the beginning of a stop string is held back until that is decided.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> strings = {}) : strings_(std::move(strings)) {
    for (const std::string& s : strings_) {
      if (s.empty()) fail("a stop string: found an empty one, expected at least one byte");
    }
  }
  // Appends to `text` the bytes that can be part of no stop string. True when a stop string is
  // complete: the text ends before it (before the longest, when several end at once), and the rest
  // of `bytes` is dropped.
  bool feed(std::string_view bytes, std::string& text) {
    for (const char byte : bytes) {
      held_ += byte;
      size_t undecided = 0, found = 0;
      for (const std::string_view s : strings_) {
        size_t n = std::min(s.size(), held_.size());
        while (!held_.ends_with(s.substr(0, n))) n--;  // the longest beginning of s that ends held_
        undecided = std::max(undecided, n);
        if (n == s.size()) found = std::max(found, n);
      }
      if (found > 0) {
        text.append(held_, 0, held_.size() - found);
        held_.clear();
        return true;
      }
      text.append(held_, 0, held_.size() - undecided);
      held_.erase(0, held_.size() - undecided);
    }
    return false;
  }
  // There are no more bytes: what was held back is text.
  void finish(std::string& text) { text += std::exchange(held_, {}); }

 private:
  std::vector<std::string> strings_;
  std::string held_;
};

// ---------------------------------------------------------------------------------------------
// Requests and completions

enum class Finish {
  stop_token,   // one of stop_ids was sampled
  stop_string,  // one of stop_strings is in the text
  length,       // max_new tokens
  context,      // the sequence is as long as the generator's context
  cancelled,    // by cancel()
};
inline const char* finish_name(Finish f) {
  constexpr const char* names[] = {"stop_token", "stop_string", "length", "context", "cancelled"};
  return names[int(f)];
}

struct Token {  // one sampled token of one request
  int request;  // the number that submit gave
  int index;    // of the completion's ids: 0 for the first new one
  int id;
  float logp;             // of the id under softmax(logits / temperature)
  std::string_view text;  // the characters that this token completes; may be empty
  bool last;              // of its turn: the request is finished, or on_turn is called next
};

// Called when a stop token ends a turn, with the request's number and the ids of the turn,
// including the stop token. Returns ids to append, after which the model's next turn follows, or no
// ids: then the request is finished.
using OnTurn = std::function<std::vector<int>(int request, std::span<const int> turn)>;

struct Request {
  std::vector<int> prompt;  // 1 to context - 1 ids
  int max_new = 256;        // tokens to sample at most; at least 1
  Sampling sampling;        // submit sets its stream
  std::vector<int> stop_ids;
  std::vector<std::string> stop_strings;
  std::function<void(const Token&)> on_token;  // called for every sampled token, in order
  OnTurn on_turn;
  int max_inserted = 0;  // ids that on_turn may append in all; the request ends before more
};

struct Completion {
  std::vector<int> ids;       // behind the prompt: sampled (with stop tokens) and inserted ones
  std::vector<float> logp;    // of each sampled id; 0 for an inserted id
  std::vector<bool> sampled;  // of each id: true if the model sampled it, false if inserted
  int last_turn = 0;          // index of the last turn's first id
  std::string text;           // of the last turn: valid UTF-8, without stop token or stop string
  Finish finish = Finish::length;
};

struct GeneratorOptions {
  int rows = 64;                // sequences decoded together, at most
  int64_t cache_positions = 0;  // limit of the cache; see cache_positions()
  int prefill_tokens = 512;     // prompt tokens in one call, at most: bounds the activations
  int context = 0;              // the longest sequence, prompt included; 0: the model's T
  CacheType cache_type = CacheType::automatic;
};

// The longest sequence in tokens: `wanted` (the flag --context); when that is 0, as many as the
// model's context has and a quarter of `free_bytes` holds, in pages of `page_bytes`.
inline int choose_context(const Config& c, int64_t wanted, int64_t free_bytes, int64_t page_bytes) {
  require(wanted == 0 || (wanted >= 2 && wanted <= c.T), "--context: found ", wanted,
          ", expected 2 to ", c.T, ", the context of the model, or 0");
  if (wanted > 0) return int(wanted);
  const int64_t pages = std::max<int64_t>(1, free_bytes / 4 / page_bytes);
  return int(std::min<int64_t>(c.T, pages * kPage));
}
// The same for an engine of these options. Says so on standard error when memory is the limit.
inline int choose_context(const Config& c, int64_t wanted, const GptOptions& options) {
  const int64_t free_bytes = memory_beside_model(c, options);
  const int context = choose_context(c, wanted, free_bytes, cache_page_bytes(c, options));
  if (wanted == 0 && context < c.T) {
    std::fprintf(stderr,
                 "context %d of the model's %d tokens: their keys and values take a quarter of the "
                 "free memory, %s; --context N sets another\n",
                 context, c.T, bytes_text(double(free_bytes)).c_str());
  }
  return context;
}

// How many positions `rows` sequences of up to `longest` tokens need, but no more than `max_bytes`
// hold, in pages of `page_bytes`. There is always room for one sequence.
inline int64_t cache_positions(int rows, int64_t longest, int64_t max_bytes, int64_t page_bytes) {
  const int64_t sequence = (longest + kPage - 1) / kPage * kPage;
  return std::max(sequence, std::min(rows * sequence, max_bytes / page_bytes * kPage));
}

// For one continuation of a prompt.
inline GeneratorOptions options_for_one(const Config& c, int64_t prompt_tokens, int64_t max_new) {
  return {.rows = 1, .cache_positions = std::min<int64_t>(c.T, prompt_tokens + max_new)};
}

// What a generator takes of the engine when its cache is as full as its limit allows.
inline DecodePlan decode_plan(const GeneratorOptions& o) {
  return {o.rows, std::max(o.rows, o.prefill_tokens), o.cache_positions, o.cache_type};
}

struct GeneratorStats {
  int64_t prompt_tokens = 0;  // fed; those of preempted rows count again
  int64_t reused_tokens = 0;  // found in the cache by a fork
  int64_t new_tokens = 0;     // sampled in calls without a prompt: all but the first of each row
  int64_t preemptions = 0;
  double prompt_seconds = 0, decode_seconds = 0;
};

// ---------------------------------------------------------------------------------------------
// The generator

class Generator {
 public:
  using TokenBytes = std::function<std::string_view(int id)>;

  // `token_bytes`: the bytes of an id, empty where it has none.
  Generator(Gpt& gpt, TokenBytes token_bytes, const GeneratorOptions& options)
      : gpt_(gpt),
        token_bytes_(std::move(token_bytes)),
        options_(options),
        context_(options.context > 0 ? options.context : gpt.config().T),
        cache_(gpt.make_cache(options.cache_positions, options.cache_type)),
        pages_(free_pages()) {
    require(context_ >= 1 && context_ <= gpt.config().T, "generator: context: found ", context_,
            ", expected 1 to the model's ", gpt.config().T);
    require(options.rows >= 1, "generator: rows: found ", options.rows, ", expected at least 1");
    require(options.prefill_tokens >= 1, "generator: prefill tokens: found ",
            options.prefill_tokens, ", expected at least 1");
  }

  // Queues a request and returns its number: 0, 1, 2, ... Its samples depend on seed and number.
  int submit(Request request) {
    const int number = int(completions_.size());
    const int64_t n = int64_t(request.prompt.size());
    require(n >= 1 && n <= context_ - 1, "request ", number, ": prompt: found ", n,
            " tokens, expected 1 to ", context_ - 1, ", since the context is ", context_);
    require_ids(request.prompt, number, "prompt");
    require(request.max_new >= 1, "request ", number, ": new tokens: found ", request.max_new,
            ", expected at least 1");
    require(request.max_inserted >= 0, "request ", number, ": inserted tokens: found ",
            request.max_inserted, ", expected 0 or more");
    require(pages_for(longest(request)) <= pages_, "request ", number, ": found up to ",
            longest(request), " positions, expected at most ", pages_ * kPage,
            ", the limit of the KV cache");
    request.sampling.stream = uint64_t(number);
    // Engines multiply by 1 / temperature, which must be a float; far below this limit it is none.
    constexpr float kLowest = 1e-30f;
    if (request.sampling.temperature > 0) {
      request.sampling.temperature = std::max(request.sampling.temperature, kLowest);
    }
    auto job = std::make_unique<Job>();
    job->number = number;
    job->tokens = request.prompt;
    job->stops = StopStrings(request.stop_strings);
    job->request = std::move(request);
    queue_.push_back(std::move(job));
    completions_.emplace_back();
    return number;
  }

  // One call of the engine. False when every request is finished.
  bool step() {
    admit();
    if (rows_.empty()) return false;
    std::vector<Part> call = next_call();
    make_room(call);
    if (!call.empty()) decode(call);
    return true;
  }
  void run() {
    while (step()) {
    }
  }

  bool done(int request) const { return completions_.at(size_t(request)).has_value(); }
  // Removes and returns the completion of a request that is done.
  Completion pop(int request) {
    std::optional<Completion>& c = completions_.at(size_t(request));
    if (!c) fail("request ", request, ": found it unfinished or popped, expected a completion");
    return *std::exchange(c, std::nullopt);
  }

  // Ends a request that is not done. Its completion holds the tokens so far, and its sequence stays
  // in the cache like a finished one.
  void cancel(int request) {
    for (size_t i = 0; i < rows_.size(); i++) {
      if (rows_[i].job->number != request) continue;
      rows_[i].job->finish(Finish::cancelled);
      return retire(i);
    }
    for (size_t i = 0; i < queue_.size(); i++) {
      if (queue_[i]->number != request) continue;
      queue_[i]->finish(Finish::cancelled);
      completions_[size_t(request)] = std::move(queue_[i]->completion);
      queue_.erase(queue_.begin() + int64_t(i));
      return;
    }
    fail("request ", request, ": found it finished or never submitted, expected it in work");
  }

  // Removes the finished sequences from the cache. Needed whenever the weights change.
  void drop_finished() {
    while (evict()) {
    }
  }
  const GeneratorStats& stats() const { return stats_; }
  const KvCache& cache() const { return *cache_; }

 private:
  struct Job {  // a request in work
    int number = 0;
    Request request;
    std::vector<int> tokens;  // the prompt and all ids behind it
    Completion completion;
    int sampled = 0, inserted = 0;
    StopStrings stops;
    Utf8Stream utf8;

    void finish(Finish why) {  // appends the text that was held back
      std::string bytes;
      stops.finish(bytes);
      utf8.feed(bytes, completion.text);
      utf8.finish(completion.text);
      completion.finish = why;
    }
  };
  struct Row {
    std::unique_ptr<Job> job;
    int sequence;  // in the cache: the tokens of the job that were fed
  };
  struct Finished {  // a finished sequence that is still in the cache
    std::vector<int> tokens;
    int sequence;
  };
  struct Part {  // of a call: the next n tokens of a row
    size_t row;
    int n;
  };
  struct Prefix {  // the first `length` tokens of a sequence in the cache
    int sequence = -1, length = 0;
    int finished = -1;  // index in finished_, -1 for the sequence of a row
  };

  void require_ids(std::span<const int> ids, int request, const char* source) const {
    const int V = gpt_.config().V;
    for (const int id : ids) {
      require(id >= 0 && id < V, "request ", request, ": ", source, ": found token ", id,
              ", expected 0 to ", V - 1);
    }
  }
  static int64_t pages_for(int64_t n) { return (n + kPage - 1) / kPage; }
  int64_t free_pages() const { return cache_->free_positions() / kPage; }
  // How many positions a request may need. The token that is sampled last is never fed.
  int64_t longest(const Request& r) const {
    const int64_t all = int64_t(r.prompt.size()) + r.max_new + r.max_inserted;
    return std::min<int64_t>(context_, all) - 1;
  }
  bool may_grow(const Job& job) const {
    return pages_for(longest(job.request)) > pages_for(int64_t(job.tokens.size()));
  }
  int fed(const Row& r) const { return cache_->length(r.sequence); }
  int pending(const Row& r) const { return int(r.job->tokens.size()) - fed(r); }

  static int common_prefix(const std::vector<int>& a, const std::vector<int>& b, int limit) {
    limit = std::min({limit, int(a.size()), int(b.size())});
    return int(std::mismatch(a.begin(), a.begin() + limit, b.begin()).first - a.begin());
  }

  // The longest prefix of `tokens` in the cache. At least one token is left to feed, because the
  // next one is sampled from its logits.
  Prefix longest_prefix(const std::vector<int>& tokens) const {
    Prefix best;
    const int limit = int(tokens.size()) - 1;
    for (const Row& r : rows_) {
      const int n = common_prefix(r.job->tokens, tokens, std::min(limit, fed(r)));
      if (n > best.length) best = {r.sequence, n, -1};
    }
    for (size_t k = 0; k < finished_.size(); k++) {
      const int n = common_prefix(finished_[k].tokens, tokens, limit);
      if (n > best.length) best = {finished_[k].sequence, n, int(k)};
    }
    return best;
  }

  // True when a row is about to feed a long part of the prefix of `tokens`, beyond the `cached`
  // tokens: then waiting for it saves time. Long is 32 tokens, or half of a short prompt.
  bool worth_waiting(const std::vector<int>& tokens, int cached) const {
    const int size = int(tokens.size()), enough = std::max(1, std::min(32, size / 2));
    for (const Row& r : rows_) {
      if (pending(r) > 1 && common_prefix(r.job->tokens, tokens, size - 1) - cached >= enough)
        return true;
    }
    return false;
  }

  // Moves requests from the queue into rows, in order, while there are rows and pages.
  void admit() {
    while (!queue_.empty() && int(rows_.size()) < options_.rows) {
      const std::vector<int>& tokens = queue_.front()->tokens;
      Prefix prefix = longest_prefix(tokens);
      if (worth_waiting(tokens, prefix.length)) return;
      for (;;) {
        // Full pages of the prefix are shared; a page in part is copied. The pages that the rows'
        // prompts still need are reserved, and one more for each row that may grow.
        int64_t need = pages_for(int64_t(tokens.size())) - prefix.length / kPage;
        for (const Row& r : rows_) {
          need += cache_->pages_needed(r.sequence, pending(r)) + may_grow(*r.job);
        }
        if (need <= free_pages()) break;
        if (!evict(prefix.finished)) {
          if (prefix.finished < 0) return;
          evict();
        }
        prefix = longest_prefix(tokens);
      }
      const int sequence = prefix.length > 0 ? cache_->fork(prefix.sequence) : cache_->create();
      cache_->truncate(sequence, prefix.length);
      stats_.reused_tokens += prefix.length;
      if (prefix.finished >= 0) {  // now the one used last, so it is evicted last
        std::rotate(finished_.begin() + prefix.finished, finished_.begin() + prefix.finished + 1,
                    finished_.end());
      }
      rows_.push_back({std::move(queue_.front()), sequence});
      queue_.pop_front();
    }
  }

  // The tokens to feed next: pieces of prompts, as long as there are any, so that all rows fill up;
  // otherwise the next token of every row.
  std::vector<Part> next_call() const {
    std::vector<Part> call;
    int budget = options_.prefill_tokens;
    for (size_t i = 0; i < rows_.size() && budget > 0; i++) {
      const int n = std::min(budget, pending(rows_[i]));
      if (pending(rows_[i]) > 1) call.push_back({i, n}), budget -= n;
    }
    if (call.empty()) {
      for (size_t i = 0; i < rows_.size(); i++) call.push_back({i, 1});
    }
    return call;
  }

  // Frees pages for the call: first those of finished sequences, then those of the rows admitted
  // last, which go back to the front of the queue. The first row always has room: submit checks it.
  void make_room(std::vector<Part>& call) {
    for (;;) {
      int64_t need = 0;
      for (const Part& p : call) need += cache_->pages_needed(rows_[p.row].sequence, p.n);
      if (need <= free_pages()) return;
      if (evict()) continue;
      if (rows_.size() == 1) return;
      if (!call.empty() && call.back().row == rows_.size() - 1) call.pop_back();
      cache_->free(rows_.back().sequence);
      queue_.push_front(std::move(rows_.back().job));
      rows_.pop_back();
      stats_.preemptions++;
    }
  }

  // Frees the finished sequence that was used least recently, but not number `except`.
  bool evict(int except = -1) {
    const size_t k = except == 0 ? 1 : 0;
    if (k >= finished_.size()) return false;
    cache_->free(finished_[k].sequence);
    finished_.erase(finished_.begin() + int(k));
    return true;
  }

  void decode(const std::vector<Part>& call) {
    std::vector<DecodeRow> rows;
    bool prompts = false;
    for (const Part& p : call) {
      const Row& r = rows_[p.row];
      const std::span<const int> tokens(r.job->tokens);
      const size_t begin = size_t(fed(r)), n = size_t(p.n);
      prompts |= pending(r) > 1;
      rows.push_back({.sequence = r.sequence,
                      .tokens = tokens.subspan(begin, n),
                      .sampling = r.job->request.sampling,
                      .history = tokens.first(begin + n)});
    }
    const double start = now();
    gpt_.decode(*cache_, rows, result_);
    const double seconds = now() - start;
    if (prompts) {
      for (const Part& p : call) stats_.prompt_tokens += p.n;
      stats_.prompt_seconds += seconds;
    } else {
      stats_.new_tokens += int64_t(call.size());
      stats_.decode_seconds += seconds;
    }
    std::vector<size_t> finished_rows;
    for (size_t i = 0; i < call.size(); i++) {
      Row& r = rows_[call[i].row];
      if (pending(r) > 0) continue;  // a piece of a prompt: the next token is known
      if (accept(*r.job, result_.ids[i], result_.logp[i])) finished_rows.push_back(call[i].row);
    }
    for (size_t i = finished_rows.size(); i-- > 0;) retire(finished_rows[i]);
  }

  // Appends the token that was sampled for a job. True when the job is finished.
  bool accept(Job& job, int id, float logp) {
    Completion& c = job.completion;
    const Request& q = job.request;
    c.ids.push_back(id);
    c.logp.push_back(logp);
    c.sampled.push_back(true);
    job.tokens.push_back(id);
    job.sampled++;
    std::optional<Finish> finish;
    if (int(job.tokens.size()) >= context_) finish = Finish::context;
    if (job.sampled >= q.max_new) finish = Finish::length;
    const size_t before = c.text.size();
    std::string bytes;
    if (std::find(q.stop_ids.begin(), q.stop_ids.end(), id) != q.stop_ids.end()) {
      finish = Finish::stop_token;
    } else if (job.stops.feed(token_bytes_(id), bytes)) {
      finish = Finish::stop_string;
    }
    job.utf8.feed(bytes, c.text);
    if (finish) job.finish(*finish);
    if (q.on_token) {
      q.on_token({.request = job.number,
                  .index = int(c.ids.size()) - 1,
                  .id = id,
                  .logp = logp,
                  .text = std::string_view(c.text).substr(before),
                  .last = finish.has_value()});
    }
    return finish && !(finish == Finish::stop_token && continue_after_turn(job));
  }

  // After a turn that a stop token ended: true when on_turn appends ids, and there is room for them
  // and for one more token.
  bool continue_after_turn(Job& job) {
    Completion& c = job.completion;
    const Request& q = job.request;
    if (!q.on_turn) return false;
    const std::vector<int> ids =
        q.on_turn(job.number, std::span<const int>(c.ids).subspan(size_t(c.last_turn)));
    if (ids.empty()) return false;
    require_ids(ids, job.number, "on_turn");
    const int64_t n = int64_t(ids.size());
    if (int64_t(job.tokens.size()) + n >= context_) {
      c.finish = Finish::context;
      return false;
    }
    if (job.sampled >= q.max_new || job.inserted + n > q.max_inserted) {
      c.finish = Finish::length;
      return false;
    }
    job.inserted += int(n);
    c.ids.insert(c.ids.end(), ids.begin(), ids.end());
    c.logp.resize(c.ids.size(), 0.f);
    c.sampled.resize(c.ids.size(), false);
    c.last_turn = int(c.ids.size());
    c.text.clear();
    job.tokens.insert(job.tokens.end(), ids.begin(), ids.end());
    job.stops = StopStrings(q.stop_strings);
    return true;
  }

  // Removes a finished row from the batch. Its sequence stays in the cache, for prompts that have a
  // prefix in common with it.
  void retire(size_t row) {
    Row r = std::move(rows_[row]);
    rows_.erase(rows_.begin() + int64_t(row));
    r.job->tokens.resize(size_t(fed(r)));
    finished_.push_back({std::move(r.job->tokens), r.sequence});
    if (int(finished_.size()) > options_.rows) evict();
    completions_[size_t(r.job->number)] = std::move(r.job->completion);
  }

  Gpt& gpt_;
  TokenBytes token_bytes_;
  GeneratorOptions options_;
  int context_;  // tokens of the longest sequence
  std::unique_ptr<KvCache> cache_;
  int64_t pages_;                           // the limit of the cache
  std::deque<std::unique_ptr<Job>> queue_;  // in order of submission
  std::vector<Row> rows_;                   // in order of admission
  std::vector<Finished> finished_;          // least recently used first
  std::vector<std::optional<Completion>> completions_;
  DecodeResult result_;
  GeneratorStats stats_;
};

}  // namespace cake
