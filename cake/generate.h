// Text from a model: many sequences at once over one KV cache.
//
//     Request -> queue -> row of a batch -> Gpt::decode -> token -> StopStrings -> Utf8Stream ->
//     text
//
// Up to `rows` requests are decoded together. When one finishes, the next of the queue takes its
// row (continuous batching: Yu et al. 2022, Orca). Where someone reads along, every call feeds the
// next token of every row that decodes, and beside them a slice of the prompts (chunked prefill:
// Agrawal et al. 2024, Sarathi-Serve), so that a long prompt does not make the others wait;
// otherwise prompts come first, so that all rows fill up. The CPU engine computes the same bits for
// a row whatever the other rows are, and a sampled token is a function of (seed, stream, position).
// Therefore a request's text does not depend on the other requests, on the slices, nor on the two
// ways in which the generator saves time and memory:
//
// - A prompt is prefilled once. A request whose prompt has a prefix in common with a sequence in
//   the cache forks that sequence and feeds only the rest. Finished sequences stay in the cache
//   until others need their pages (as in SGLang: Zheng et al. 2023).
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
#include <ctime>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <map>
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
  const std::string& held() const { return held_; }  // the beginning of a character

 private:
  static constexpr const char* kReplacement = "\xEF\xBF\xBD";
  std::string held_;
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
  failed,       // see Request::on_failed
};
inline const char* finish_name(Finish f) {
  constexpr const char* names[] = {"stop_token", "stop_string", "length",
                                   "context",    "cancelled",   "failed"};
  return names[int(f)];
}

struct Token {  // one sampled token of one request
  int request;  // the number that submit gave
  int index;    // of the completion's ids: 0 for the first new one
  int id;
  float logp;                        // of the id under softmax(logits / temperature)
  const TokenScore* score;           // of the id; null unless the request has top_logprobs
  const Distribution* distribution;  // that the id is from; null unless the request wants it
  std::string_view text;             // the characters that this token completes; may be empty
  bool last;  // of its turn: the request is finished, or on_turn is called next
};

// Called when a stop token ends a turn, with the request's number and the ids of the turn,
// including the stop token. Returns ids to append, after which the model's next turn follows, or no
// ids: then the request is finished.
using OnTurn = std::function<std::vector<int>(int request, std::span<const int> turn)>;

struct Request {
  std::vector<int> prompt;  // 1 to context - 1 ids
  int max_new = 256;        // tokens to sample at most; at least 1
  Sampling sampling;        // the samples are a function of its seed and stream, and nothing else
  // OpenAI's penalties: from the logit of a token that was sampled n > 0 times in this request,
  // presence_penalty + n frequency_penalty is taken away. logit_bias: each id once.
  float presence_penalty = 0, frequency_penalty = 0;
  std::vector<LogitBias> logit_bias;
  int top_logprobs = -1;  // tokens are scored, with so many of the likeliest ones; -1: not scored
  // The prompt's tokens after the first are scored too. Then the whole prompt is fed, whatever the
  // cache holds of it.
  bool score_prompt = false;
  std::string held_bytes;  // the beginning of a character, which the first token's text completes
  bool want_distribution = false;  // of each token; it costs time and memory
  std::vector<int> stop_ids;
  std::vector<std::string> stop_strings;
  // The callbacks run inside step(), and must not call step() or cancel().
  std::function<void()> on_admitted;  // called once, when the request gets a row
  // Called once, before the first on_token, when the prompt is scored: scores of prompt[1] ...
  std::function<void(std::vector<TokenScore>)> on_prompt_scores;
  std::function<void(const Token&)> on_token;  // called for every sampled token, in order
  OnTurn on_turn;
  // Logits that are not finite, and exceptions of its callbacks, end this request alone, and this
  // is called with the error. Without it, step() throws the error.
  std::function<void(const std::string&)> on_failed;
  int max_inserted = 0;  // ids that on_turn may append in all; the request ends before more
};

struct Completion {
  std::vector<int> ids;       // behind the prompt: sampled (with stop tokens) and inserted ones
  std::vector<float> logp;    // of each sampled id; 0 for an inserted id
  std::vector<bool> sampled;  // of each id: true if the model sampled it, false if inserted
  int last_turn = 0;          // index of the last turn's first id
  std::string text;           // of the last turn: valid UTF-8, without stop token or stop string
  Finish finish = Finish::length;
  int cached_tokens = 0;  // of the prompt: found in the cache when the request got a row
};

struct GeneratorOptions {
  int rows = 64;                // sequences decoded together, at most
  int64_t cache_positions = 0;  // limit of the cache; see cache_positions()
  // Prompt tokens in one call, at most: bounds the activations. 0: Gpt::prefill_tokens()
  int prefill_tokens = 0;
  int context = 0;  // the longest sequence, prompt included; 0: the model's T
  CacheType cache_type = CacheType::automatic;
  // Prompt tokens in a call in which other rows decode, at most. 0: so many that the call takes
  // about twice the time of one without them, as measured on the way; then the calls differ from
  // run to run, and with them the last bits of an engine whose rows are not independent (CUDA's).
  // kPromptsFirst: the rows wait while there are prompts, which is the fastest where nobody reads
  // along, since large calls are the most efficient.
  static constexpr int kPromptsFirst = -1;
  int prefill_slice = kPromptsFirst;
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
  return {.rows = 1,
          .cache_positions = std::min<int64_t>(c.T, prompt_tokens + max_new),
          .prefill_tokens = int(std::clamp<int64_t>(prompt_tokens, 1, kPrefillTokens))};
}

// What a generator takes of the engine when its cache is as full as its limit allows.
inline DecodePlan decode_plan(const GeneratorOptions& o) {
  return {o.rows, o.prefill_tokens, o.cache_positions, o.cache_type};
}

struct GeneratorStats {
  int64_t prompt_tokens = 0;  // fed; those of preempted rows count again
  int64_t reused_tokens = 0;  // found in the cache by a fork
  int64_t new_tokens = 0;     // sampled by rows that decode: all but the first of each row
  int64_t preemptions = 0;
  // The time of a call that feeds both prompts and rows that decode is divided by their tokens.
  double prompt_seconds = 0, decode_seconds = 0;
};

// Processor time of this thread: other programs that want the cores do not add to it.
inline double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Chooses how many tokens of prompts go into a call beside the rows that decode, from the times of
// the calls so far. A call with d rows that decode takes D seconds, and each token of a prompt adds
// c seconds: D / c tokens double the call's time. A token of a prompt takes no more time than one
// of a row that decodes, and the weights are read once for all: at least d tokens, and 4.
class PrefillSlice {
 public:
  // 0: this call shall have no tokens of prompts, so that its time can be measured.
  int tokens(int decoding) const {
    if (!like_the_measured(decoding) || measures_ < 2 || calls_since_ >= kMeasureEvery) return 0;
    const double seconds = token_seconds_ > 0 ? token_seconds_ : decode_seconds_ / 16;
    return std::max({4, decoding, int(std::min(decode_seconds_ / seconds, 1e6))});
  }
  // A call of `decoding` rows that decode and `prompt` tokens of prompts took `seconds`.
  void add(int decoding, int prompt, double seconds) {
    if (decoding == 0) {
      if (token_seconds_ == 0 && prompt >= 16) token_seconds_ = seconds / prompt;
    } else if (prompt == 0) {
      if (!like_the_measured(decoding)) measures_ = 0;
      if (measures_ == 0) {
        decode_seconds_ = seconds;
      } else if (measures_ == 1) {  // one that was interrupted does not count
        decode_seconds_ = std::min(decode_seconds_, seconds);
      } else {  // the mean of the last ones; an interruption counts twice at most
        decode_seconds_ += (std::min(seconds, 2 * decode_seconds_) - decode_seconds_) / 4;
      }
      measures_ = std::min(measures_ + 1, 2);
      rows_ = decoding, calls_since_ = 0;
    } else {  // goes to the median of what a token adds, which interruptions do not move
      calls_since_++;
      const double added = std::max(seconds - decode_seconds_, decode_seconds_ / 100) / prompt;
      if (token_seconds_ == 0) token_seconds_ = added;
      token_seconds_ *= added > token_seconds_ ? 1.1 : 1 / 1.1;
    }
  }

 private:
  static constexpr int kMeasureEvery = 32;  // calls
  bool like_the_measured(int decoding) const {
    return decoding <= 1.25 * rows_ && decoding >= .8 * rows_ && rows_ > 0;
  }
  double decode_seconds_ = 0;  // of a call without prompts
  int rows_ = 0;               // that decoded in it; 0: there was none yet
  int measures_ = 0;           // calls with about so many rows; 2: two or more
  int calls_since_ = 0;        // with prompts
  double token_seconds_ = 0;   // that a token of a prompt adds; 0: not known yet
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
    require(options.prefill_tokens >= 0, "generator: prefill tokens: found ",
            options.prefill_tokens, ", expected at least 1, or 0 for the engine's own number");
    if (options.prefill_tokens == 0) options_.prefill_tokens = gpt.prefill_tokens();
    require(options.prefill_slice >= GeneratorOptions::kPromptsFirst,
            "generator: prefill slice: found ", options.prefill_slice, ", expected -1 or more");
  }

  // Queues a request and returns its number: 0, 1, 2, ...
  int submit(Request request) {
    const int number = next_number_;
    const int64_t n = int64_t(request.prompt.size());
    require(n >= 1 && n <= context_ - 1, "request ", number, ": prompt: found ", n,
            " tokens, expected 1 to ", context_ - 1, ", since the context is ", context_);
    require_ids(request.prompt, number, "prompt");
    require(request.max_new >= 1, "request ", number, ": new tokens: found ", request.max_new,
            ", expected at least 1");
    require(request.max_inserted >= 0, "request ", number, ": inserted tokens: found ",
            request.max_inserted, ", expected 0 or more");
    for (const LogitBias& b : request.logit_bias) require_ids({&b.id, 1}, number, "logit bias");
    require(pages_for(longest(request)) <= pages_, "request ", number, ": found up to ",
            longest(request), " positions, expected at most ", pages_ * kPage,
            ", the limit of the KV cache");
    // Engines multiply by 1 / temperature, which must be a float; far below this limit it is none.
    constexpr float kLowest = 1e-30f;
    if (request.sampling.temperature > 0) {
      request.sampling.temperature = std::max(request.sampling.temperature, kLowest);
    }
    auto job = std::make_unique<Job>();
    job->number = number;
    job->tokens = request.prompt;
    job->stops = StopStrings(request.stop_strings);
    job->utf8.feed(request.held_bytes, job->completion.text);
    job->request = std::move(request);
    job->update_biases();
    queue_.push_back(std::move(job));
    next_number_ = number < std::numeric_limits<int>::max() ? number + 1 : 0;
    return number;
  }

  // One call of the engine. False when every request is finished. After an Error the requests are
  // still in work: they can be cancelled, and step() called again.
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

  bool done(int request) const { return completions_.contains(request); }
  // Removes and returns the completion of a request that is done. Nothing of the request is left.
  Completion pop(int request) {
    auto node = completions_.extract(request);
    if (!node) fail("request ", request, ": found it unfinished or popped, expected a completion");
    return std::move(node.mapped());
  }

  // Ends a request that is queued or in a row. Its completion holds the tokens so far, and its
  // sequence stays in the cache like a finished one.
  void cancel(int request) {
    for (size_t i = 0; i < rows_.size(); i++) {
      if (rows_[i].job->number != request) continue;
      rows_[i].job->finish(Finish::cancelled);
      return retire(i);
    }
    for (size_t i = 0; i < queue_.size(); i++) {
      if (queue_[i]->number != request) continue;
      queue_[i]->finish(Finish::cancelled);
      completions_.emplace(request, std::move(queue_[i]->completion));
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
  int running() const { return int(rows_.size()); }  // requests that have a row
  int queued() const { return int(queue_.size()); }  // requests that wait for one
  const GeneratorStats& stats() const { return stats_; }
  const KvCache& cache() const { return *cache_; }

 private:
  struct Job {  // a request in work
    int number = 0;
    Request request;
    std::vector<int> tokens;  // the prompt and all ids behind it
    Completion completion;
    int sampled = 0, inserted = 0;
    bool admitted = false;                  // it had a row, and may have been preempted since
    std::vector<TokenScore> prompt_scores;  // of prompt[1], ...; until they are reported
    std::map<int, int> counts;              // of the sampled ids, when penalties need them
    std::vector<LogitBias> biases;          // of the next token: logit_bias less the penalties
    int waits_for = -1, waits_until = 0;    // queued: until that request's row has fed so many
    StopStrings stops;
    Utf8Stream utf8;

    void update_biases() {
      const Request& q = request;
      std::map<int, float> sums;
      for (const LogitBias& b : q.logit_bias) sums[b.id] += b.bias;
      for (const auto& [id, n] : counts) {
        sums[id] -= q.presence_penalty + float(n) * q.frequency_penalty;
      }
      biases.clear();
      for (const auto& [id, bias] : sums) biases.push_back({id, bias});
    }
    bool scores_prompt() const { return request.score_prompt && sampled == 0; }

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

  // True while a queued request waits for a row to feed a long part of its prefix, beyond the
  // `cached` tokens, since that saves time. Long is 32 tokens, or half of a short prompt.
  bool is_worth_waiting(Job& job, int cached) const {
    const int size = int(job.tokens.size()), enough = std::max(1, std::min(32, size / 2));
    for (const Row& r : rows_) {
      if (pending(r) <= 1) continue;
      const int n = common_prefix(r.job->tokens, job.tokens, size - 1);
      if (n - cached < enough) continue;
      job.waits_for = r.job->number, job.waits_until = n;
      return true;
    }
    return false;
  }
  bool waits(const Job& job) const {
    for (const Row& r : rows_) {
      if (r.job->number == job.waits_for) return pending(r) > 1 && fed(r) < job.waits_until;
    }
    return false;
  }

  // Moves requests from the queue into rows, in order, while there are rows and pages. Those that
  // wait for a prefix let the others pass.
  void admit() {
    for (size_t k = 0; k < queue_.size() && int(rows_.size()) < options_.rows;) {
      Job& job = *queue_[k];
      if (waits(job)) {
        k++;
        continue;
      }
      // The logits of a cached prefix are gone: a prompt that is scored is fed from its beginning.
      const bool fed_whole = job.scores_prompt();
      const std::vector<int>& tokens = job.tokens;
      const auto find_prefix = [&] { return fed_whole ? Prefix{} : longest_prefix(tokens); };
      Prefix prefix = find_prefix();
      if (!fed_whole && is_worth_waiting(job, prefix.length)) {
        k++;
        continue;
      }
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
        prefix = find_prefix();
      }
      const int sequence = prefix.length > 0 ? cache_->fork(prefix.sequence) : cache_->create();
      cache_->truncate(sequence, prefix.length);
      stats_.reused_tokens += prefix.length;
      if (prefix.finished >= 0) {  // now the one used last, so it is evicted last
        std::rotate(finished_.begin() + prefix.finished, finished_.begin() + prefix.finished + 1,
                    finished_.end());
      }
      if (fed_whole) job.prompt_scores.clear();  // of a row that was preempted on the way
      rows_.push_back({std::move(queue_[k]), sequence});
      queue_.erase(queue_.begin() + int64_t(k));
      if (std::exchange(job.admitted, true)) continue;
      job.completion.cached_tokens = prefix.length;
      if (job.request.on_admitted) job.request.on_admitted();
    }
  }

  // The tokens to feed next: one of each row that decodes, and a slice of the prompts; or prompts
  // alone, as long as there are any, where they come first. Half of a slice goes to the prompt that
  // has the fewest tokens left, so that a short one need not wait for a long one, and the rest in
  // the order of admission.
  std::vector<Part> next_call() const {
    int decoding = 0;
    size_t shortest = rows_.size();
    std::vector<int> counts(rows_.size());
    for (size_t i = 0; i < rows_.size(); i++) {
      const int left = pending(rows_[i]);
      if (left == 1) decoding++, counts[i] = 1;
      if (left > 1 && (shortest == rows_.size() || left < pending(rows_[shortest]))) shortest = i;
    }
    if (shortest < rows_.size()) {
      int slice = options_.prefill_tokens;
      const bool prompts_first = options_.prefill_slice == GeneratorOptions::kPromptsFirst;
      if (prompts_first) {
        std::fill(counts.begin(), counts.end(), 0);
      } else if (decoding > 0) {
        const int wanted =
            options_.prefill_slice > 0 ? options_.prefill_slice : slice_.tokens(decoding);
        slice = std::min(wanted, std::max(1, slice - decoding));
      }
      const auto give = [&](size_t i, int n) {
        n = std::min(n, pending(rows_[i]) - counts[i]);
        counts[i] += n, slice -= n;
      };
      if (!prompts_first) give(shortest, slice / 2);
      for (size_t i = 0; i < rows_.size(); i++) {
        if (pending(rows_[i]) > 1) give(i, slice);
      }
    }
    std::vector<Part> call;
    for (size_t i = 0; i < rows_.size(); i++) {
      if (counts[i] > 0) call.push_back({i, counts[i]});
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
    int decoding = 0, prompt = 0;  // tokens
    for (const Part& p : call) {
      const Row& r = rows_[p.row];
      const Request& q = r.job->request;
      const std::span<const int> tokens(r.job->tokens);
      const size_t begin = size_t(fed(r)), n = size_t(p.n);
      (pending(r) > 1 ? prompt : decoding) += p.n;
      rows.push_back({.sequence = r.sequence,
                      .tokens = tokens.subspan(begin, n),
                      .sampling = q.sampling,
                      .history = tokens.first(begin + n),
                      .top = p.n == pending(r) ? q.top_logprobs : -1,
                      .biases = r.job->biases,
                      .want_distribution = q.want_distribution && p.n == pending(r)});
      if (r.job->scores_prompt()) {
        rows.back().targets = tokens.subspan(begin + 1, std::min(n, tokens.size() - begin - 1));
        rows.back().top = std::max(0, q.top_logprobs);
      }
    }
    result_.ids.clear();
    const double start = now(), thread_start = thread_seconds();
    try {
      gpt_.decode(*cache_, rows, result_);
    } catch (const Error& e) {
      if (!fail_rows(call, e.what())) throw;
      return;
    }
    const double seconds = now() - start;
    slice_.add(decoding, prompt, thread_seconds() - thread_start);
    stats_.prompt_tokens += prompt;
    stats_.new_tokens += decoding;
    stats_.prompt_seconds += seconds * prompt / (prompt + decoding);
    stats_.decode_seconds += seconds * decoding / (prompt + decoding);
    std::vector<size_t> finished_rows;
    std::exception_ptr failure;  // of a callback; it is thrown when all rows have their tokens
    for (size_t i = 0; i < call.size(); i++) {
      Row& r = rows_[call[i].row];
      if (r.job->scores_prompt()) {
        for (TokenScore& s : result_.target_scores[i]) {
          r.job->prompt_scores.push_back(std::move(s));
        }
      }
      if (pending(r) > 0) continue;  // a piece of a prompt: the next token is known
      const bool scored = r.job->request.top_logprobs >= 0;
      const TokenScore* score = scored ? &result_.scores[i] : nullptr;
      bool finished = false;
      try {
        finished = accept(*r.job, result_.ids[i], result_.logp[i], score,
                          r.job->request.want_distribution ? &result_.distributions[i] : nullptr);
      } catch (const std::exception& e) {
        finished = r.job->request.on_failed != nullptr;
        if (!finished) failure = std::current_exception();
        if (finished) r.job->finish(Finish::failed), r.job->request.on_failed(e.what());
      }
      if (finished) finished_rows.push_back(call[i].row);
    }
    for (size_t i = finished_rows.size(); i-- > 0;) retire(finished_rows[i]);
    if (failure) std::rethrow_exception(failure);
  }

  // After a call that failed: ends the rows whose logits are not finite. The others are as they
  // were before the call. False when there is no such row, or one that cannot fail by itself.
  bool fail_rows(const std::vector<Part>& call, const std::string& error) {
    std::vector<size_t> failed;
    for (size_t i = 0; i < result_.ids.size() && i < call.size(); i++) {
      if (result_.ids[i] >= 0) continue;
      if (!rows_[call[i].row].job->request.on_failed) return false;
      failed.push_back(call[i].row);
    }
    for (size_t i = failed.size(); i-- > 0;) {
      Row& r = rows_[failed[i]];
      cache_->truncate(r.sequence, 0);  // no other request shall read what is in it
      r.job->finish(Finish::failed);
      const std::function<void(const std::string&)> on_failed = r.job->request.on_failed;
      retire(failed[i]);
      on_failed(error);
    }
    return !failed.empty();
  }

  // Appends the token that was sampled for a job. True when the job is finished.
  bool accept(Job& job, int id, float logp, const TokenScore* score,
              const Distribution* distribution) {
    Completion& c = job.completion;
    const Request& q = job.request;
    if (job.scores_prompt()) {
      std::vector<TokenScore> scores = std::exchange(job.prompt_scores, {});
      if (q.on_prompt_scores) q.on_prompt_scores(std::move(scores));
    }
    c.ids.push_back(id);
    c.logp.push_back(logp);
    c.sampled.push_back(true);
    job.tokens.push_back(id);
    job.sampled++;
    if (q.presence_penalty != 0 || q.frequency_penalty != 0) {
      job.counts[id]++;
      job.update_biases();
    }
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
                  .score = score,
                  .distribution = distribution,
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
    completions_.emplace(r.job->number, std::move(r.job->completion));
    if (fed(r) == 0) return cache_->free(r.sequence);
    r.job->tokens.resize(size_t(fed(r)));
    finished_.push_back({std::move(r.job->tokens), r.sequence});
    if (int(finished_.size()) > options_.rows) evict();
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
  std::map<int, Completion> completions_;   // that were not popped
  int next_number_ = 0;
  DecodeResult result_;
  PrefillSlice slice_;
  GeneratorStats stats_;
};

}  // namespace cake
