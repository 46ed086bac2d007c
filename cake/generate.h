// Text from a model: many sequences at once over one KV cache.
//
//     Request -> queue -> row of a batch -> Gpt::decode -> token -> StopStrings -> Utf8Stream ->
//     text
//
// Up to `rows` requests are decoded together; a row that finishes is replaced from the queue
// (continuous batching: Yu et al. 2022, Orca). The engine gives a row the same bits in any company,
// and a draw is a function of (seed, request, position): what a request yields depends neither on
// its neighbours nor on what follows, which only save time:
//
// - A prompt is prefilled in pieces of bounded size, once. A request whose prompt begins like a
//   sequence that is still in the cache forks it there and feeds only the rest. Sequences stay in
//   the cache after they finished, until others need their pages (as in SGLang: Zheng et al. 2023).
// - The cache is as large as the caller says. A request waits until its pages are free; where rows
//   outgrow the cache together, the one admitted last gives up its pages and is fed again later,
//   prompt and tokens so far (preemption by recomputation, as in vLLM: Kwon et al. 2023).
//
// A sequence is token ids from beginning to end: text is made from them and never read back. Where
// a turn ends, the caller may append ids, a tool's answer, and the request goes on behind them:
// they are fed as a prompt is, and marked as inserted.
#pragma once

#include <algorithm>
#include <cstdint>
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
// Bytes to text. A token is bytes, and a character or a stop string may lie across several.

// Bytes in, whole UTF-8 characters out. A byte is held back as long as it may be part of a valid
// character; what can become none is replaced by U+FFFD, one for each maximal prefix of a character
// (the practice of the Unicode Standard, 3.9, and of the WHATWG's decoder).
class Utf8Stream {
 public:
  // Appends to `text` what `bytes` complete.
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
  // The bytes end here: a character that was begun is replaced.
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

// Finds the first of several strings to be complete, bytewise, over any division into pieces. Text
// that may be the beginning of one is held back until that is decided. Each string keeps the length
// of its longest prefix that ends the text so far (Knuth, Morris, Pratt 1977).
class StopStrings {
 public:
  explicit StopStrings(const std::vector<std::string>& strings = {}) {
    for (const std::string& s : strings) {
      if (s.empty()) fail("a stop string: found an empty one, expected at least one byte");
      Pattern p{s, std::vector<int>(s.size(), 0), 0};
      for (size_t i = 1, k = 0; i < s.size(); i++) {
        while (k > 0 && s[i] != s[k]) k = size_t(p.border[k - 1]);
        p.border[i] = int(s[i] == s[k] ? ++k : k);
      }
      patterns_.push_back(std::move(p));
    }
  }
  // Appends to `text` what can be part of no stop string. True when one is complete: the text ends
  // before it (before the longest, when several end at once), and what follows it is dropped.
  bool feed(std::string_view bytes, std::string& text) {
    for (const char byte : bytes) {
      held_ += byte;
      size_t keep = 0, found = 0;
      for (Pattern& p : patterns_) {
        while (p.matched > 0 && p.string[size_t(p.matched)] != byte) {
          p.matched = p.border[size_t(p.matched) - 1];
        }
        if (p.string[size_t(p.matched)] == byte) p.matched++;
        keep = std::max(keep, size_t(p.matched));
        if (size_t(p.matched) == p.string.size()) found = std::max(found, p.string.size());
      }
      if (found > 0) {
        text.append(held_, 0, held_.size() - found);
        held_.clear();
        return true;
      }
      text.append(held_, 0, held_.size() - keep);
      held_.erase(0, held_.size() - keep);
    }
    return false;
  }
  // The bytes end here: nothing was a stop string.
  void finish(std::string& text) { text += std::exchange(held_, {}); }

 private:
  struct Pattern {
    std::string string;
    std::vector<int> border;  // [i]: longest proper prefix of string[0..i] that is also its suffix
    int matched;              // less than the string's length between bytes
  };
  std::vector<Pattern> patterns_;
  std::string held_;
};

// ---------------------------------------------------------------------------------------------
// What is asked and what comes back

enum class Finish {
  stop_token,   // one of stop_ids was sampled
  stop_string,  // one of stop_strings is in the text
  length,       // max_new tokens
  context,      // the sequence is as long as the model's context
  cancelled,    // by cancel()
};
inline const char* finish_name(Finish f) {
  constexpr const char* names[] = {"stop_token", "stop_string", "length", "context", "cancelled"};
  return names[int(f)];
}

struct Token {            // one sampled token of one request
  int request;            // the number that submit gave
  int index;              // of the completion's ids: 0 for the first new one
  int id;                 //
  float logp;             // of the id under softmax(logits / temperature)
  std::string_view text;  // that became certain with it: whole characters, perhaps none
  bool last;              // of its turn: the request is finished, or on_turn is asked next
};

// Called when a stop token ends a turn, with the request's number and the ids of the turn, the stop
// token included. Returns the ids to append (the model's next turn follows them), or none: then the
// request is finished.
using OnTurn = std::function<std::vector<int>(int request, std::span<const int> turn)>;

struct Request {
  std::vector<int> prompt;  // 1 to T - 1 ids
  int max_new = 256;        // tokens to sample, at least 1
  Sampling sampling;        // its stream is set by submit
  std::vector<int> stop_ids;
  std::vector<std::string> stop_strings;
  std::function<void(const Token&)> on_token;  // called once a sampled token, in order
  OnTurn on_turn;
  int max_inserted = 0;  // ids that on_turn may append, over all turns; more end the request
};

struct Completion {
  std::vector<int> ids;       // behind the prompt: sampled, stop tokens included, and inserted
  std::vector<float> logp;    // of each that was sampled; 0 for one that was inserted
  std::vector<bool> sampled;  // each: by the model, not inserted
  int last_turn = 0;          // where the ids of the last turn begin
  std::string text;           // of the last turn: valid UTF-8, without stop token or stop string
  Finish finish = Finish::length;
};

struct GeneratorOptions {
  int rows = 64;                // sequences decoded together at most
  int64_t cache_positions = 0;  // of all sequences in the cache; see cache_positions()
  int prefill_tokens = 512;     // of prompts in one call at most: bounds the engine's activations
};

// Positions that `rows` sequences of up to `longest` tokens need, bounded by `max_bytes` of fp32
// keys and values; one sequence always has room.
inline int64_t cache_positions(const Config& c, int rows, int64_t longest, int64_t max_bytes) {
  const int64_t sequence = (std::min<int64_t>(longest, c.T) + kPage - 1) / kPage * kPage;
  const int64_t bytes = int64_t(2) * c.L * c.NKV * c.HS * int64_t(sizeof(float));
  return std::max(sequence, std::min(rows * sequence, max_bytes / bytes / kPage * kPage));
}

struct GeneratorStats {
  int64_t prompt_tokens = 0;  // fed, those of preempted rows again
  int64_t reused_tokens = 0;  // that a fork found in the cache
  int64_t new_tokens = 0;     // sampled in calls that feed no prompt: all but a row's first
  int64_t preemptions = 0;
  double prompt_seconds = 0, decode_seconds = 0;
};

// ---------------------------------------------------------------------------------------------
// The generator

class Generator {
 public:
  using TokenBytes = std::function<std::string_view(int id)>;

  // The bytes of every id, empty where it has none.
  Generator(Gpt& gpt, TokenBytes token_bytes, const GeneratorOptions& options)
      : gpt_(gpt),
        token_bytes_(std::move(token_bytes)),
        options_(options),
        cache_(gpt.make_cache(options.cache_positions)),
        pages_(free_pages()) {
    if (options.rows < 1) fail("generator: rows: found ", options.rows, ", expected at least 1");
    if (options.prefill_tokens < 1) {
      fail("generator: prefill tokens: found ", options.prefill_tokens, ", expected at least 1");
    }
  }

  // Queues a request and returns its number: 0, 1, 2, ... Its draws depend on its seed and number.
  int submit(Request request) {
    const int number = int(completions_.size()), T = gpt_.config().T;
    const int64_t n = int64_t(request.prompt.size());
    if (n < 1 || n > T - 1) {
      fail("request ", number, ": prompt: found ", n, " tokens, expected 1 to ", T - 1,
           ", since the model's context is ", T);
    }
    for (const int id : request.prompt) {
      if (id >= 0 && id < gpt_.config().V) continue;
      fail("request ", number, ": prompt: found token ", id, ", expected 0 to ",
           gpt_.config().V - 1);
    }
    if (request.max_new < 1) {
      fail("request ", number, ": new tokens: found ", request.max_new, ", expected at least 1");
    }
    if (request.max_inserted < 0) {
      fail("request ", number, ": inserted tokens: found ", request.max_inserted,
           ", expected 0 or more");
    }
    if (pages_for(longest(request)) > pages_) {
      fail("request ", number, ": found up to ", longest(request), " positions, expected at most ",
           pages_ * kPage, ", the size of the KV cache");
    }
    request.sampling.stream = uint64_t(number);
    auto job = std::make_unique<Job>();
    job->number = number;
    job->tokens = request.prompt;
    job->stops = StopStrings(request.stop_strings);
    job->request = std::move(request);
    queue_.push_back(std::move(job));
    completions_.emplace_back();
    return number;
  }

  // One call of the engine. False when nothing is left to do.
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
  // Of a request that is done; once.
  Completion take(int request) {
    std::optional<Completion>& c = completions_.at(size_t(request));
    if (!c) fail("request ", request, ": found it unfinished or taken, expected a completion");
    return *std::exchange(c, std::nullopt);
  }

  // Ends a request that is not done, with what it has. Its sequence stays as a finished one's does.
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
    fail("request ", request, ": found it finished or never submitted, expected it on its way");
  }

  // Drops the finished sequences that the cache still holds: needed when the weights change.
  void forget() {
    while (evict()) {
    }
  }
  const GeneratorStats& stats() const { return stats_; }
  const KvCache& cache() const { return *cache_; }

 private:
  struct Job {  // a request on its way
    int number = 0;
    Request request;
    std::vector<int> tokens;  // prompt and what followed
    Completion completion;
    int sampled = 0, inserted = 0;
    StopStrings stops;
    Utf8Stream utf8;

    void finish(Finish why) {  // text that was held back comes out
      std::string bytes;
      stops.finish(bytes);
      utf8.feed(bytes, completion.text);
      utf8.finish(completion.text);
      completion.finish = why;
    }
  };
  struct Row {
    std::unique_ptr<Job> job;
    int sequence;  // of the cache, which holds the first tokens of the job
  };
  struct Kept {  // a finished sequence
    std::vector<int> tokens;
    int sequence;
  };
  struct Part {  // of a call: the next n tokens of a row
    size_t row;
    int n;
  };
  struct Prefix {  // the beginning of a sequence in the cache
    int sequence = -1, length = 0;
    int kept = -1;  // its index, -1 for a row's
  };

  static int64_t pages_for(int64_t n) { return (n + kPage - 1) / kPage; }
  int64_t free_pages() const { return cache_->free_positions() / kPage; }
  // Positions that a request may need: the token sampled last is never fed.
  int64_t longest(const Request& r) const {
    const int64_t all = int64_t(r.prompt.size()) + r.max_new + r.max_inserted;
    return std::min<int64_t>(gpt_.config().T, all) - 1;
  }
  bool may_grow(const Job& job) const {
    return pages_for(longest(job.request)) > pages_for(int64_t(job.tokens.size()));
  }
  int fed(const Row& r) const { return cache_->length(r.sequence); }
  int pending(const Row& r) const { return int(r.job->tokens.size()) - fed(r); }

  static int common(const std::vector<int>& a, const std::vector<int>& b, int limit) {
    limit = std::min({limit, int(a.size()), int(b.size())});
    return int(std::mismatch(a.begin(), a.begin() + limit, b.begin()).first - a.begin());
  }

  // The longest beginning of `tokens` in the cache. One token at least is left to feed: its logits
  // are what the next one is drawn from.
  Prefix longest_prefix(const std::vector<int>& tokens) const {
    Prefix best;
    const int limit = int(tokens.size()) - 1;
    for (const Row& r : rows_) {
      const int n = common(r.job->tokens, tokens, std::min(limit, fed(r)));
      if (n > best.length) best = {r.sequence, n, -1};
    }
    for (size_t k = 0; k < kept_.size(); k++) {
      const int n = common(kept_[k].tokens, tokens, limit);
      if (n > best.length) best = {kept_[k].sequence, n, int(k)};
    }
    return best;
  }

  // True when a row is about to feed much of what `tokens` begin with: then it is worth waiting
  // for. Much is 32 tokens, a small part of a call, or half of a short prompt.
  bool worth_waiting(const std::vector<int>& tokens, int have) const {
    const int size = int(tokens.size()), much = std::max(1, std::min(32, size / 2));
    for (const Row& r : rows_) {
      if (pending(r) > 1 && common(r.job->tokens, tokens, size - 1) - have >= much) return true;
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
        // Pages of the prefix are shared, but for one that is not full: it is copied. Rows keep
        // what their prompts still need, and a page each to grow into if they may.
        int64_t need = pages_for(int64_t(tokens.size())) - prefix.length / kPage;
        for (const Row& r : rows_) {
          need += cache_->pages_needed(r.sequence, pending(r)) + may_grow(*r.job);
        }
        if (need <= free_pages()) break;
        if (!evict(prefix.kept)) {
          if (prefix.kept < 0) return;
          evict();
        }
        prefix = longest_prefix(tokens);
      }
      const int sequence = prefix.length > 0 ? cache_->fork(prefix.sequence) : cache_->create();
      cache_->truncate(sequence, prefix.length);
      stats_.reused_tokens += prefix.length;
      if (prefix.kept >= 0) {  // used last, evicted last
        std::rotate(kept_.begin() + prefix.kept, kept_.begin() + prefix.kept + 1, kept_.end());
      }
      rows_.push_back({std::move(queue_.front()), sequence});
      queue_.pop_front();
    }
  }

  // Prompts before the next token of every row, so that the batch fills.
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

  // Frees pages for the call: of kept sequences, then of the rows admitted last, which go back to
  // the front of the queue. The first row always has room: submit saw to that.
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

  // Frees the kept sequence that was used longest ago, other than number `except`.
  bool evict(int except = -1) {
    const size_t k = except == 0 ? 1 : 0;
    if (k >= kept_.size()) return false;
    cache_->free(kept_[k].sequence);
    kept_.erase(kept_.begin() + int(k));
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
    std::vector<size_t> finished;
    for (size_t i = 0; i < call.size(); i++) {
      Row& r = rows_[call[i].row];
      if (pending(r) > 0) continue;  // what follows a piece of a prompt is known
      if (accept(*r.job, result_.ids[i], result_.logp[i])) finished.push_back(call[i].row);
    }
    for (size_t i = finished.size(); i-- > 0;) retire(finished[i]);
  }

  // Takes the token that was sampled for a job. True when it was the last.
  bool accept(Job& job, int id, float logp) {
    Completion& c = job.completion;
    const Request& q = job.request;
    c.ids.push_back(id);
    c.logp.push_back(logp);
    c.sampled.push_back(true);
    job.tokens.push_back(id);
    job.sampled++;
    std::optional<Finish> finish;
    if (int(job.tokens.size()) >= gpt_.config().T) finish = Finish::context;
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
    return finish && !(finish == Finish::stop_token && go_on(job));
  }

  // After a turn that a stop token ended: true when on_turn appends something and there is room
  // for it and for a token more.
  bool go_on(Job& job) {
    Completion& c = job.completion;
    const Request& q = job.request;
    if (!q.on_turn) return false;
    const std::vector<int> ids =
        q.on_turn(job.number, std::span<const int>(c.ids).subspan(size_t(c.last_turn)));
    if (ids.empty()) return false;
    for (const int id : ids) {
      if (id >= 0 && id < gpt_.config().V) continue;
      fail("request ", job.number, ": on_turn: found token ", id, ", expected 0 to ",
           gpt_.config().V - 1);
    }
    const int64_t n = int64_t(ids.size());
    if (int64_t(job.tokens.size()) + n >= gpt_.config().T) {
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

  // A finished row leaves the batch; its sequence stays, for prompts that begin like it.
  void retire(size_t row) {
    Row r = std::move(rows_[row]);
    rows_.erase(rows_.begin() + int64_t(row));
    r.job->tokens.resize(size_t(fed(r)));
    kept_.push_back({std::move(r.job->tokens), r.sequence});
    if (int(kept_.size()) > options_.rows) evict();
    completions_[size_t(r.job->number)] = std::move(r.job->completion);
  }

  Gpt& gpt_;
  TokenBytes token_bytes_;
  GeneratorOptions options_;
  std::unique_ptr<KvCache> cache_;
  int64_t pages_;                           // of the cache
  std::deque<std::unique_ptr<Job>> queue_;  // in order of submission
  std::vector<Row> rows_;                   // in order of admission
  std::vector<Kept> kept_;                  // the one used longest ago first
  std::vector<std::optional<Completion>> completions_;
  DecodeResult result_;
  GeneratorStats stats_;
};

}  // namespace cake
