// Stage 2: tokens -> base model. The CPU engine, which is the reference for every other engine, and
// the pretraining loop.
//
// The file tells its story in this order:
//
//   1. the model      CpuGpt: forward, backward and update, made of the pieces below
//   2. layers         in the order in which the data meets them, from the batch to the LM head
//   3. optimizers     the norm of the gradient, AdamW, Muon
//   4. decoding       the KV cache, sampling
//   5. memory         arenas, tensors in and out, what a model takes, make_gpt
//   6. speed          threads that wait awake, weights in panels of four types, the blocked
//   product,
//                     which does 95 % of the work, and the product with q8_0
//   7. pretraining    data, plan, loop, checkpoints, command line, main
//
// One invariant holds everywhere: the same bits for any number of threads and any batch
// composition. Each output element is one chain of fused multiply-adds over k (over a head's size,
// over keys, over tokens), begun and continued in one order, whichever tile or thread computes it.
// So prefill, decoding of 1 or 64 rows and a packed forward agree to the last bit, gradients do not
// depend on OMP_NUM_THREADS, and a chunked LM head equals a whole one. Weights in f16 and bf16 are
// summed as their values in f32; with q8_0 the chain is over blocks of 32, whose sums are exact.
//
// Sources: GPT-2 (Radford et al. 2019), RoPE (Su et al. 2021), RMSNorm (Zhang, Sennrich 2019),
// SwiGLU (Shazeer 2020), flash attention (Dao et al. 2022), AdamW (Loshchilov, Hutter 2019), Muon
// (Jordan et al. 2024), the blocked product (Goto, van de Geijn 2008; Van Zee 2015).

#include <omp.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <numeric>

#include "cake/gpt.h"
#include "cake/layers.h"

namespace cake {

// =============================================================================================
// 1. The model: forward, backward, update. Read plain::Gpt in cake/layers.h first: it is the same
// model in plain loops, with its formulas. Here matrices are computed on all cores, activations lie
// in one arena, and a tensor's gradient may take its place.

// Memory from the system, zeroed, on huge pages where it can. Pages never touched take no memory,
// which lets an arena have room for what a mode does not use; small pages where most is unused.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t floats) { reset(floats); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(); }
  void reset(int64_t floats, bool huge_pages = true);
  void grow(int64_t floats) {  // contents are lost when it grows
    if (floats > size()) reset(floats);
  }
  float* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void release();
  float* data_ = nullptr;
  size_t bytes_ = 0;  // what is mapped
  int64_t size_ = 0;
};

struct NormStats {
  float* mean;  // (N), null for RMSNorm
  float* rstd;  // (N)
};
struct LayerActivations {
  float* x;      // (N, C) the residual stream that enters
  float* norm1;  // (N, C)
  NormStats stats1;
  float* qkv;      // (N, qkv)
  float* rotated;  // (N, (NH + NKV) HS) q and k after norm and RoPE; qwen3 alone
  float* att;      // (N, NH HS)
  float* lse;      // (N, NH)
  float* mid;      // (N, C) the stream after attention
  float* norm2;    // (N, C)
  NormStats stats2;
  float* up;   // (N, 2F) gate and up; gpt2 (N, F); then their gradient
  float* act;  // (N, F)
};

// Everything a pass over N tokens writes, in one arena, of which lay_out hands out the pieces.
struct Activations {
  std::vector<LayerActivations> layers;
  float* x;           // (N, C) the stream that leaves the last layer
  float* final_norm;  // (N, C)
  NormStats final_stats;
  float* head_in;     // (N, C) rows of final_norm that have a target
  float* logits;      // (logit_rows, padded V)
  float* dhead_in;    // (N, C)
  float *dx, *dnorm;  // (N, C), (N, max(C, NH HS))
  float* dqkv;        // (N, qkv)
  float* dact;        // (N, F)
  float* partials;

  Arena arena;
  int64_t capacity = 0;                                   // tokens
  void reserve(const Config& c, int64_t N, Saved saved);  // contents are lost when it grows
  // Returns the number of floats; with `base`, also sets the pointers.
  int64_t lay_out(const Config& c, int64_t N, Saved saved, float* base);
};

struct RowSoftmax {  // of softmax(x / temperature) over one row
  float highest;     // of x
  float log_sum;     // log sum_j exp((x_j - highest) / temperature)
  float entropy;     // nats
  float logp(float x, float inverse_temperature) const {
    return (x - highest) * inverse_temperature - log_sum;
  }
};

struct Attention {  // one layer's attention over packed documents
  int NH, NKV, HS;
  std::span<const int> doc_starts;  // (D+1)
  const float *q, *k, *v;  // (N, NH HS), (N, NKV HS) twice: first heads of rows of stride ld
  int64_t q_ld, k_ld, v_ld;
};

class RopeTable {  // cos and sin of every position so far, made when first needed
 public:
  explicit RopeTable(const Config& c) : half_(c.HS / 2), frequency_(rope_frequencies(c)) {}
  void extend(int positions);
  const float* cos(int position) const { return cos_.data() + int64_t(position) * half_; }
  const float* sin(int position) const { return sin_.data() + int64_t(position) * half_; }

 private:
  int half_;
  std::vector<double> frequency_;
  std::vector<float> cos_, sin_;  // (positions, HS/2)
};

// Layers and optimizers that are functions on arrays; sections 2 and 3 define them. Backward
// functions add to the gradients of weights.
static void attention_forward(const Attention& a, float* out, float* lse);
static void attention_backward(const Attention& a, const float* out, const float* lse,
                               const float* dout, float* dq, float* dk, float* dv, int64_t d_ld);
static void adamw(int64_t size, float* w, const float* g, float* m, float* v, float scale, float lr,
                  float decay, const OptimizerStep& o);
static void muon(int out, int in, float* w, const float* g, float* m, float scale,
                 const OptimizerStep& o);
// Runs visit(i) for i in [0, n), items of unequal cost, on all threads; `group` neighbours, which
// share memory, go to one thread where there are groups enough.
template <class Visit>
static void parallel_groups(int64_t n, int group, Visit&& visit,
                            const char* where = __builtin_FUNCTION());

struct Operand;    // of a product
struct CacheTask;  // of attention over a cache
class CpuKvCache;
struct Weights;

class CpuGpt final : public Gpt {
 public:
  CpuGpt(const Config& config, const GptOptions& options);

  void forward(const Batch& batch, Pass pass) override {
    if (pass == Pass::train) expect_trainable("forward", train_);
    begin(batch);
    trunk_forward();
    head_forward();
    forward_is_live_ = pass == Pass::train;
  }

  void backward(std::span<const float> dlogp, std::span<const float> dvalue,
                std::span<const float> dentropy) override {
    expect_trainable("backward", train_);
    if (!forward_is_live_) fail("backward: no forward with Pass::train came before");
    check_weights(config_, N_, dlogp, dvalue, dentropy);
    head_backward(dlogp, dvalue, dentropy, logits_kept_);
    trunk_backward();
    forward_is_live_ = false;
  }

  void forward_backward(const Batch& batch, std::span<const float> dlogp,
                        std::span<const float> dvalue, std::span<const float> dentropy) override {
    expect_trainable("forward_backward", train_);
    begin(batch);
    check_weights(config_, N_, dlogp, dvalue, dentropy);
    trunk_forward();
    if (config_.head == Head::scalar) head_forward();
    head_backward(dlogp, dvalue, dentropy, false);
    trunk_backward();
    forward_is_live_ = false;
  }

  // Clips the gradient, then every trainable tensor takes a step of its optimizer.
  void update(const OptimizerStep& step) override {
    if (!train_) fail("update: an inference model has no gradients");
    stats_[1] = stats_[0];
    UpdateStats& stats = stats_[0];
    stats = {.grad_norm = gradient_norm(), .loss = std::exchange(loss_, 0)};
    stats.skipped = !std::isfinite(stats.grad_norm);
    gradients_are_zero_ = true;
    forward_is_live_ = false;
    if (stats.skipped) return;
    const bool clipped = step.max_norm > 0 && stats.grad_norm > step.max_norm;
    const float scale = clipped ? float(step.max_norm / stats.grad_norm) : 1.f;
    const std::vector<Piece> pieces = update_pieces();
    parallel_groups(int64_t(pieces.size()), 1, [&](int64_t i) {
      const auto& [t, offset, size] = pieces[size_t(i)];
      float *w = weight(offset), *m = moment1_.data() + offset, *v = moment2_.data() + offset;
      const float* g = gradients_.data() + offset;
      if (t->muon) {
        muon(t->out, t->in, w, g, m, scale, step);
      } else {
        adamw(size, w, g, m, v, scale, step.lr[size_t(t->kind)], t->decay ? step.decay : 0, step);
      }
    });
    weights_changed();
  }

  UpdateStats stats(int updates_ago) override { return stats_.at(size_t(updates_ago)); }
  void zero_gradients() override { gradients_are_zero_ = true, loss_ = 0; }

  std::span<const float> logp() override { return logp_; }
  std::span<const float> entropy() override { return entropy_; }
  std::span<const float> value() override { return value_; }

  std::unique_ptr<KvCache> make_cache(int64_t limit, CacheType type) override;
  void decode(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
              bool logits) override;

  void read(int tensor, Slot slot, std::span<float> out) const override;
  void write(int tensor, Slot slot, std::span<const float> in) override;
  void write_q8_0(int tensor, std::span<const Q8Block> blocks) override;

 private:
  void decode_rows(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
                   bool logits);
  float* floats_of(const Tensor& t, Slot slot) const;
  template <class Visit>
  bool visit_panel_rows(const Tensor& t, Slot slot, Visit&& visit) const;

  template <class E>
  void attend_cached(const CpuKvCache& pages, std::span<const DecodeRow> rows,
                     const NewTokens& added, std::span<const CacheTask> tasks, int l,
                     LayerActivations& a) const;
  void attend_batch(LayerActivations& a) const {
    attention_forward(attention_of(a.qkv, a.rotated), a.att, a.lse);
  }
  void trunk_forward() {
    blocks_forward(a_, N_, tokens_.data(), positions_.data(), weights_in_panels_only(),
                   [&](int, LayerActivations& a) { attend_batch(a); });
    norm(N_, table_.final_norm, a_.x, a_.final_norm, a_.final_stats);
  }

  // From token ids to the residual stream that leaves the last block. attend(l, a) computes a.att
  // from the layer's q, k and v: over packed documents above, over a KV cache in decode.
  template <class Attend>
  void blocks_forward(Activations& acts, int N, const int* tokens, const int* positions,
                      bool panels, Attend&& attend) {
    if (config_.family != Family::gpt2)
      rope_.extend(1 + *std::max_element(positions, positions + N));
    embed(N, tokens, positions, acts.layers[0].x);
    for (int l = 0; l < config_.L; l++) {
      const LayerActivations& a = acts.layers[size_t(l)];
      block_forward(l, acts, N, positions, panels, attend);
      float* next_x = l + 1 < config_.L ? acts.layers[size_t(l) + 1].x : acts.x;
      // next x = mid + down(act)
      linear(N, table_.blocks[size_t(l)].down, a.act, next_x, a.mid, panels);
    }
  }

  // One block from a.x to a.act.
  template <class Attend>
  void block_forward(int l, Activations& acts, int N, const int* positions, bool panels,
                     Attend&& attend) {
    const Block& b = table_.blocks[size_t(l)];
    LayerActivations& a = acts.layers[size_t(l)];
    norm(N, b.norm1, a.x, a.norm1, a.stats1);
    linear(N, b.qkv, a.norm1, a.qkv, nullptr, panels);
    rotate(N, positions, b, a.qkv, a.rotated);
    attend(l, a);
    linear(N, b.o, a.att, a.mid, a.x, panels);  // mid = x + o(att)
    norm(N, b.norm2, a.mid, a.norm2, a.stats2);
    linear(N, b.up, a.norm2, a.up, nullptr, panels);
    activate(N, a.up, a.act);
  }

  // From a_.dx, the gradient of the stream that leaves the last block, down to the embedding. The
  // same lines as the forward pass has, from the last to the first.
  void trunk_backward() {
    const int HS = config_.HS;
    for (int l = config_.L - 1; l >= 0; l--) {
      const Block& b = table_.blocks[size_t(l)];
      LayerActivations& a = a_.layers[size_t(l)];
      if (saved_ == Saved::layer_inputs && l + 1 < config_.L) {  // the last block's are there
        block_forward(l, a_, N_, positions_.data(), false,
                      [&](int, LayerActivations& made) { attend_batch(made); });
      } else if (saved_ == Saved::light && l + 1 < config_.L) {
        norm(N_, b.norm1, a.x, a.norm1, a.stats1);
        norm(N_, b.norm2, a.mid, a.norm2, a.stats2);
        activate(N_, a.up, a.act);
      }
      linear_backward(N_, b.down, a.act, a_.dx, a_.dact);
      activate_backward(a.up, a_.dact);  // a.up becomes its gradient
      linear_backward(N_, b.up, a.norm2, a.up, a_.dnorm);
      norm_back(N_, b.norm2, a_.dnorm, a.mid, a.stats2);
      linear_backward(N_, b.o, a.att, a_.dx, a_.dnorm);
      float *dq = a_.dqkv, *dk = dq + config_.NH * HS, *dv = dk + config_.NKV * HS;
      attention_backward(attention_of(a.qkv, a.rotated), a.att, a.lse, a_.dnorm, dq, dk, dv,
                         config_.qkv());
      rotate_backward(b, a);
      linear_backward(N_, b.qkv, a.norm1, a_.dqkv, a_.dnorm);
      norm_back(N_, b.norm1, a_.dnorm, a.x, a.stats1);
    }
    embed_backward();
    gradients_are_zero_ = false;
  }

  // The batch: checked, copied, its positions; room for what a pass over it writes.
  void begin(const Batch& batch);

  // A layer each, on the weights that stand at one place of the table.
  void embed(int N, const int* tokens, const int* positions, float* x) const;
  void embed_backward();
  void norm(int N, const Norm& n, const float* x, float* y, NormStats stats) const;
  void norm_back(int N, const Norm& n, const float* dy, const float* x, NormStats stats);
  void linear(int N, const Linear& l, const float* x, float* y, const float* residual,
              bool panels) const;
  void linear_backward(int N, const Linear& l, const float* x, const float* dy, float* dx);
  const float* adapter_inner(int N, const Linear& l, const Adapter& a, const float* x) const;
  void scale_inner(int N) const;
  void adapter_forward(int N, const Linear& l, const Adapter& a, const float* x, float* y) const;
  void adapter_backward(int N, const Linear& l, const Adapter& a, const float* x, const float* dy,
                        float* dx);
  void rotate(int N, const int* positions, const Block& b, float* qkv, float* rotated) const;
  void rotate_backward(const Block& b, const LayerActivations& a);
  Attention attention_of(const float* qkv, const float* rotated) const;
  void activate(int N, const float* up, float* act) const;
  void activate_backward(float* up, const float* dact) const;
  void logits_forward(int64_t begin, int64_t rows);
  void head_forward();
  void head_backward(std::span<const float> dlogp, std::span<const float> dvalue,
                     std::span<const float> dentropy, bool logits_ready);

  struct Piece {
    const Tensor* tensor;
    int64_t offset, size;  // in the arena
  };
  double gradient_norm();
  std::vector<Piece> update_pieces() const;

  float* weight(int64_t offset) const;    // null: nothing is there
  float* gradient(int64_t offset) const;  // null: nothing is there, or it is frozen
  Operand matrix(const Linear& l, bool panels) const;
  bool weights_in_panels_only() const;
  void weights_changed();

  bool train_;
  Saved saved_;
  int64_t frozen_;                    // where the table's trainable rows begin
  mutable std::vector<float> inner_;  // (N, rank) scratch of one adapter
  std::shared_ptr<Weights> weights_;
  Arena gradients_, moment1_, moment2_;  // in the table's order
  std::array<UpdateStats, 2> stats_;     // of the last update, and of the one before
  double loss_ = 0;                      // of the batches since the last update
  // All gradients are zero, whatever their arena holds: the next backward sets them.
  bool gradients_are_zero_ = true;
  Activations a_{};
  Activations decode_{};  // decoding's own: it does not disturb a live forward
  RopeTable rope_;

  // The live batch
  int N_ = 0;
  std::vector<int> tokens_, targets_, doc_starts_, positions_;
  float inverse_temperature_ = 1;
  std::vector<int> head_rows_;       // positions that have a target
  std::vector<RowSoftmax> softmax_;  // one for each of head_rows_
  std::vector<float> logp_, entropy_, value_;
  bool forward_is_live_ = false, logits_kept_ = false;
};

// =============================================================================================
// 2. Layers: the fast version of each definition in cake/layers.h (plain::), which has the formulas

// ---------------------------------------------------------------------------------------------
// What the layers are written in: vectors, loops over threads, products, which section 6 defines.
// Vectors are one source for AVX-512, AVX2 and NEON, in GCC vector extensions.

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__FMA__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;  // NEON, SSE
#endif
typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));

static inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline vec load(const Bf16* p) {
  typedef uint16_t half_vec __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t bits_vec __attribute__((vector_size(4 * kLanes)));
  half_vec halves;
  std::memcpy(&halves, p, sizeof halves);
  return vec(__builtin_convertvector(halves, bits_vec) << 16);
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
// x in every lane: x - 0 is x for every x
static inline vec splat(float x) { return x - vec{}; }
// n <= kLanes floats; the other lanes are 0
static inline vec load(const float* p, int n) {
  if (n == kLanes) return load(p);
  vec v{};
  std::memcpy(&v, p, size_t(n) * sizeof(float));
  return v;
}
template <int... I>
static inline vec mask_lanes(vec v, int n, std::integer_sequence<int, I...>) {
  return ivec{I...} < n ? v : vec{};
}
// Zeroes the lanes from n on.
static inline vec mask_lanes(vec v, int n) {
  return mask_lanes(v, n, std::make_integer_sequence<int, kLanes>{});
}
// the first n lanes
static inline void store(float* p, vec v, int n) { std::memcpy(p, &v, size_t(n) * sizeof(float)); }
// Walks n floats a vector at a time: visit(begin, count), count < kLanes only at the end.
template <class Visit>
static inline __attribute__((always_inline)) void for_vectors(int64_t n, Visit&& visit) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(i, kLanes);
  if (i < n) visit(i, int(n - i));
}
// a b + c, rounded once. Products call this function, so that all of them round in the same way. A
// compiler that is left to choose fuses some chains of multiplications and additions and not
// others, and then tiles of different shapes differ in their last bits.
static inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__ARM_NEON)
  return vec(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}
static inline vec vsqrt(vec x) {
#if defined(__AVX512F__)  // every lane; GCC 12 takes _mm512_sqrt_ps to read an uninitialized vector
  return vec(_mm512_maskz_sqrt_ps(0xffff, __m512(x)));
#elif defined(__FMA__)
  return vec(_mm256_sqrt_ps(__m256(x)));
#elif defined(__ARM_NEON)
  return vec(vsqrtq_f32(float32x4_t(x)));
#else
  for (int i = 0; i < kLanes; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
static inline vec vmax(vec a, vec b) { return a > b ? a : b; }
// Lane i of the result is lane i + By.
template <int By, int... I>
static inline vec shifted(vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + By) % kLanes)...);
}
// A tree over the lanes, the same wherever it is called: halves, quarters, ... meet.
template <int N = kLanes / 2, class Op>
static inline float fold_lanes(vec v, Op op) {
  v = op(v, shifted<N>(v, std::make_integer_sequence<int, kLanes>{}));
  if constexpr (N > 1) return fold_lanes<N / 2>(v, op);
  return v[0];
}
static inline float sum_lanes(vec v) {
  return fold_lanes(v, [](vec a, vec b) { return a + b; });
}
static inline float max_lanes(vec v) {
  return fold_lanes(v, [](vec a, vec b) { return vmax(a, b); });
}

// e^x for x below 88 to 1 ulp or so, 0 below -87.3, NaN for NaN: 2^n e^r with |r| <= ln 2 / 2 (the
// polynomial is Cephes'). Each lane does the same operations: its place in a vector does not
// matter.
static inline vec vexp_below_88(vec x) {
  const vec c = vmax(splat(-87.3f), x);
  const vec shifted = c * 1.44269504f + 12582912.f;  // rounds to an integer in the low bits
  const vec n = shifted - 12582912.f;
  const vec r = (c - n * .693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  ivec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  ivec bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  vec result;
  std::memcpy(&result, &bits, sizeof result);
  return x < splat(-87.3f) ? vec{} : result;
}
static inline vec vexp(vec x) { return vexp_below_88(x > splat(88.7f) ? splat(88.7f) : x); }
static inline float exp1(float x) { return vexp(splat(x))[0]; }
static inline vec vsigmoid(vec x) { return 1.f / (1.f + vexp(-x)); }

// Runs every divided loop in place of the threads, task by task, where one is set: `build/bench
// --tasks` finds out so how the loops divide among more threads than this machine has cores.
class LoopObserver {
 public:
  virtual ~LoopObserver() = default;
  virtual int threads() const = 0;
  // Calls work(t) for t in [0, tasks). in_turn: a thread that is free takes the next task,
  // otherwise task t is thread t's. `where`: the function that has the loop.
  virtual void run(const char* where, int64_t tasks, bool in_turn,
                   const std::function<void(int64_t)>& work) = 0;
  static inline LoopObserver* current = nullptr;
};

// Runs work(t) for t in [0, threads), side by side. Inside with_team, threads that wait there do
// it.
static int loop_threads();  // that loops run on
static void run_threads(int threads, void (*work)(void*, int), void* argument);
static void with_team(const std::function<void()>& body);
template <class Work>
static void on_threads(int threads, Work&& work, const char* where = __builtin_FUNCTION()) {
  if (LoopObserver* observer = LoopObserver::current) {
    return observer->run(where, threads, false, [&](int64_t t) { work(int(t)); });
  }
  if (threads == 1) return work(0);
  const auto call = [](void* w, int t) { (*static_cast<std::remove_reference_t<Work>*>(w))(t); };
  run_threads(threads, call, &work);
}
// Runs visit(i) for i in [0, n) on all threads; visits write disjoint outputs.
template <class Visit>
static void parallel_for(int64_t n, Visit&& visit, const char* where = __builtin_FUNCTION()) {
  if (n <= 0) return;
  const auto threads = std::min<int64_t>(n, loop_threads());
  auto work = [&](int t) {
    for (int64_t i = n * t / threads; i < n * (t + 1) / threads; i++) visit(i);
  };
  on_threads(int(threads), work, where);
}
template <class Visit>
static void parallel_groups(int64_t n, int group, Visit&& visit, const char* where) {
  if (n <= 0) return;
  const int64_t threads = loop_threads(), chunk = n >= 4 * group * threads ? group : 1;
  const auto visit_chunk = [&](int64_t begin) {
    for (int64_t i = begin; i < std::min(n, begin + chunk); i++) visit(i);
  };
  if (LoopObserver* observer = LoopObserver::current) {
    return observer->run(where, (n + chunk - 1) / chunk, true,
                         [&](int64_t task) { visit_chunk(task * chunk); });
  }
  std::atomic<int64_t> next{0};
  on_threads(int(std::min(n, threads)), [&](int) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < n;) visit_chunk(begin);
  });
}
// x[0 .. n - 1] = 0, on all threads.
static void clear(float* x, int64_t n) {
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((n + kChunk - 1) / kChunk, [&](int64_t i) {
    std::fill_n(x + i * kChunk, std::min(kChunk, n - i * kChunk), 0.f);
  });
}

// A product is computed in tiles of kMR x kNR.
inline constexpr int kNR = 2 * kLanes;                               // columns of a tile
inline constexpr int kMR = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 8;  // rows: fills the registers

enum class Inner { k, other };  // which index is contiguous in memory: k, or m (of A), n (of B)

// A weight matrix (out, in) as whole-depth panels of kNR outputs each, [panel][in][kNR], in one of
// the four types; section 6 has their layouts. Decoding reads all weights for every token, so its
// time is what reading their bytes takes.
struct Panels {
  std::byte* data = nullptr;
  WeightType type = WeightType::f32;
};
static int64_t panel_bytes(WeightType type, int in);  // of one panel
static int64_t panels_bytes(WeightType type, int out, int in) {
  return int64_t((out + kNR - 1) / kNR) * panel_bytes(type, in);
}
// One row (in) of the matrix, the weights of one output. f16 and bf16 are rounded to nearest, q8_0
// is quantize_q8_0.
static void read_row(const Panels& w, int in, int64_t row, float* x);
static void write_row(const Panels& w, int in, int64_t row, const float* x);
static void write_blocks(const Panels& w, int in, int64_t row, const Q8Block* blocks);  // q8_0
// All of a matrix (out, in), as f32.
static void pack_weights(const float* weight, int out, int in, std::byte* panels);

struct Operand {
  const float* data;
  int64_t ld;  // distance between consecutive m or n (Inner::k), or consecutive k (other)
  Inner inner;
  Panels panels{};  // B only: then there is no data
};

// C (M, N) = init + A (M, K) B (K, N)
struct Product {
  int M, N, K;
  Operand a, b;
  float* c;  // (M, N), row stride ldc
  int64_t ldc;
  bool accumulate = false;          // the chain starts at C
  const float* bias = nullptr;      // (N): the chain starts at bias
  const float* residual = nullptr;  // (M, N), row stride ldc: the chain starts at residual + bias
  bool lower = false;               // only tiles that touch n <= m: a symmetric C
  float* sums = nullptr;  // (M), A by columns in memory: its sums over k, accumulated as C
};

static void gemm(const Product& p);
// The rectangle [m0, m1) x [n0, n1) of the product by one thread; n0 is a multiple of kNR.
static void gemm_rectangle(const Product& p, int m0, int m1, int n0, int n1);
// c (M, N) (+)= a b with a(m,k) = a[m a_row + k a_k], b(k,n) = b[k ldb + n]; operands in cache;
// M <= kMR, N a multiple of kLanes. B: float or Bf16.
template <class B>
static void small_product(int M, int N, int K, const float* a, int64_t a_row, int64_t a_k,
                          const B* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);
// C (size, size) = A B, known to be symmetric, by one thread: half of it is computed.
static void gemm_symmetric(int size, int K, const Operand& a, const Operand& b, float* c);
// Packs `count` (<= Width) lines of an operand over K steps into panel[k][Width]; lines beyond
// count are zero. Line i, step k is x[i * ld + k] (Inner::k) or x[k * ld + i] (Inner::other).
// Writes up to kLanes floats past the panel's end.
template <int Width>
static void pack_panel(const Operand& x, const float* data, int count, int K, float* panel);
// Steps between asking for a line of memory and packing it.
inline constexpr int kPrefetchSteps = 12;

// ---------------------------------------------------------------------------------------------
// Weights

// Weights, in one of two forms. Rows: the arena in the table's order, which training reads and
// updates. Panels: each product's matrix as decoding reads it. Inference has its matrices as panels
// only, the embedding among them, in the types that GptOptions asks for; vectors and adapters stay
// rows. Training makes panels of its rows when it decodes.
struct Weights {
  struct Group {
    int64_t weight;  // its offset in the arena
    int out, in;
    WeightType type;
    int64_t panels;  // its offset in `panels`, in bytes
  };
  Arena rows, panels;
  std::vector<Group> groups;  // in the arena's order
  std::vector<WeightType> types;
  int64_t panels_size = 0;      // bytes
  bool panels_only = false;     // inference
  bool panels_current = false;  // training: they equal the rows

  Weights(const Config& c, const ParamTable& table, const GptOptions& options)
      : groups(groups_of(c, table, options)),
        types(options.weights),
        panels_only(options.mode == Mode::inference) {
    for (const Group& g : groups) panels_size += panels_bytes(g.type, g.out, g.in);
    rows.reset(table.size, !panels_only);
    if (panels_only) panels.reset((panels_size + 3) / 4);
  }
  // What is kept as panels.
  static std::vector<Group> groups_of(const Config& c, const ParamTable& table,
                                      const GptOptions& options) {
    std::vector<Group> all;
    const auto add = [&](const Linear& l) {
      all.push_back({l.weight, l.out, l.in, weight_type(table, options.weights, l.weight), 0});
    };
    const bool lm = c.head == Head::lm;
    const bool inference = options.mode == Mode::inference;
    if (inference && !(lm && c.tied)) add({.weight = table.wte, .out = c.padded_V(), .in = c.C});
    for (const Block& b : table.blocks)
      for (const Linear* l : {&b.qkv, &b.o, &b.up, &b.down}) add(*l);
    if (lm) add(table.head);
    std::sort(all.begin(), all.end(),
              [](const Group& a, const Group& b) { return a.weight < b.weight; });
    int64_t size = 0;
    for (Group& g : all) g.panels = size, size += panels_bytes(g.type, g.out, g.in);
    return all;
  }

  const Group* group_of(int64_t offset) const {  // that holds this arena offset
    const auto after = std::upper_bound(groups.begin(), groups.end(), offset,
                                        [](int64_t x, const Group& g) { return x < g.weight; });
    if (after == groups.begin()) return nullptr;
    const Group& g = after[-1];
    return offset < g.weight + int64_t(g.out) * g.in ? &g : nullptr;
  }
  Panels panels_of(const Group& g) const {
    return {reinterpret_cast<std::byte*>(panels.data()) + g.panels, g.type};
  }
  void make_panels() {
    if (panels_only || panels_current) return;
    panels.grow((panels_size + 3) / 4);
    for (const Group& g : groups)
      pack_weights(rows.data() + g.weight, g.out, g.in, panels_of(g).data);
    panels_current = true;
  }
};

float* CpuGpt::weight(int64_t offset) const {
  return offset < 0 ? nullptr : weights_->rows.data() + offset;
}
float* CpuGpt::gradient(int64_t offset) const {
  return offset < 0 || offset < frozen_ ? nullptr : gradients_.data() + offset;
}
bool CpuGpt::weights_in_panels_only() const { return weights_->panels_only; }
// Decoding makes the panels again before it reads them. With adapters, everything that panels hold
// is frozen.
void CpuGpt::weights_changed() {
  if (frozen_ == 0) weights_->panels_current = false;
}

// ---------------------------------------------------------------------------------------------
// The batch and the embedding

void CpuGpt::begin(const Batch& batch) {
  const auto N = int64_t(batch.tokens.size());
  const auto& starts = batch.doc_starts;
  const bool lm = config_.head == Head::lm;
  check_batch(config_, batch);
  positions_.resize(size_t(N));
  for (size_t d = 0; d + 1 < starts.size(); d++)
    for (int n = starts[d]; n < starts[d + 1]; n++) positions_[size_t(n)] = n - starts[d];
  head_rows_.clear();
  for (int64_t n = 0; lm && n < N; n++)
    if (batch.targets[size_t(n)] >= 0) head_rows_.push_back(int(n));
  N_ = int(N);
  tokens_.assign(batch.tokens.begin(), batch.tokens.end());
  targets_.assign(batch.targets.begin(), batch.targets.end());
  doc_starts_.assign(starts.begin(), starts.end());
  inverse_temperature_ = 1 / batch.temperature;
  logp_.assign(lm ? size_t(N) : 0, 0.f);
  entropy_.assign(lm ? size_t(N) : 0, 0.f);
  value_.assign(lm ? 0 : size_t(N), 0.f);
  softmax_.resize(head_rows_.size());
  a_.reserve(config_, N, saved_);
  forward_is_live_ = logits_kept_ = false;
}

// x[n] = wte[token] (+ wpe[position])
void CpuGpt::embed(int N, const int* tokens, const int* positions, float* x) const {
  const int C = config_.C;
  const Weights& w = *weights_;
  parallel_for(N, [&](int64_t n) {
    float* row = x + n * C;
    if (w.panels_only) {
      read_row(w.panels_of(*w.group_of(table_.wte)), C, tokens[n], row);
    } else {
      std::copy_n(weight(table_.wte + int64_t(tokens[n]) * C), C, row);
    }
    if (table_.wpe >= 0) {
      const float* p = weight(table_.wpe) + int64_t(positions[n]) * C;
      for_vectors(C,
                  [&](int64_t c, int m) { store(row + c, load(row + c, m) + load(p + c, m), m); });
    }
  });
}

// dwte[token[n]] += dx[n], dwpe[position[n]] += dx[n]: each element by one thread, over n in order.
// A task has 64 columns and, where those are fewer than the threads, one of `parts` of the rows. A
// tied head was first.
void CpuGpt::embed_backward() {
  const int C = config_.C;
  const bool tied = table_.head.weight == table_.wte;
  if (!gradient(table_.wte)) return;  // frozen, and the positions with it
  if (gradients_are_zero_ && !tied) clear(gradient(table_.wte), int64_t(config_.V) * C);
  if (gradients_are_zero_ && table_.wpe >= 0) clear(gradient(table_.wpe), int64_t(config_.T) * C);
  const int chunks = (C + 63) / 64, parts = (loop_threads() + chunks - 1) / chunks;
  parallel_for(int64_t(chunks) * parts, [&](int64_t task) {
    const int64_t begin = task / parts * 64;
    const int width = int(std::min<int64_t>(64, C - begin)), part = int(task % parts);
    for (int64_t n = 0; n < N_; n++) {
      const float* d = a_.dx + n * C + begin;
      const auto add = [&](int64_t table, int row) {
        if (parts > 1 && row % parts != part) return;
        float* sum = gradient(table) + row * C + begin;
        for_vectors(
            width, [&](int64_t c, int m) { store(sum + c, load(sum + c, m) + load(d + c, m), m); });
      };
      add(table_.wte, tokens_[size_t(n)]);
      if (table_.wpe >= 0) add(table_.wpe, positions_[size_t(n)]);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Norms (plain::norm_forward). LayerNorm: y = (x - mean) rstd w + b. RMSNorm: mean = 0, no b.
//
// Rows go in parallel. Gradients of weights are summed over blocks of 64 rows first, then over the
// blocks in order: the same sum for any number of threads.

inline constexpr int kRowBlock = 64;

// One row of C; the statistics are sums over lanes, then over the tree of sum_lanes.
static void norm_row(int C, const float* x, const float* weight, const float* bias, float eps,
                     float* y, float* mean_out, float* rstd_out) {
  float mean = 0;
  if (bias) {
    vec sum{};
    for_vectors(C, [&](int64_t c, int n) { sum += load(x + c, n); });
    mean = sum_lanes(sum) / float(C);
  }
  vec square{};
  for_vectors(C, [&](int64_t c, int n) {
    const vec d = mask_lanes(load(x + c, n) - mean, n);
    square += d * d;
  });
  const float rstd = 1 / std::sqrt(sum_lanes(square) / float(C) + eps);
  for_vectors(C, [&](int64_t c, int n) {
    vec h = (load(x + c, n) - mean) * rstd * load(weight + c, n);
    if (bias) h += load(bias + c, n);
    store(y + c, h, n);
  });
  if (mean_out) *mean_out = mean;
  if (rstd_out) *rstd_out = rstd;
}

static void norm_forward(int N, int C, const float* x, const float* weight, const float* bias,
                         float eps, float* y, NormStats stats) {
  parallel_for(N, [&](int64_t n) {
    norm_row(C, x + n * C, weight, bias, eps, y + n * C, bias ? stats.mean + n : nullptr,
             stats.rstd ? stats.rstd + n : nullptr);
  });
}

static int64_t norm_partials(int64_t N, int C) {  // floats of scratch that norm_backward needs
  return (N + kRowBlock - 1) / kRowBlock * 2 * C;
}

// With h = (x - mean) rstd and g = dy w:  dx += rstd (g - [mean of g] - h mean of g h), the bracket
// for LayerNorm alone;  dw += dy h;  db += dy. dweight and dbias (C) are added to when
// `accumulate`, else set.
static void norm_backward(int N, int C, const float* dy, const float* x, const float* weight,
                          NormStats stats, float* dx, float* dweight, float* dbias, bool accumulate,
                          float* partials) {
  const int blocks = (N + kRowBlock - 1) / kRowBlock;
  parallel_for(blocks, [&](int64_t block) {
    float *dw = partials + block * 2 * C, *db = dw + C;
    std::fill(dw, dw + 2 * C, 0.f);
    const int end = std::min(N, int(block + 1) * kRowBlock);
    for (int64_t r = block * kRowBlock; r < end; r++) {
      const float *row = x + r * C, *d = dy + r * C;
      const float mean = stats.mean ? stats.mean[r] : 0.f, rstd = stats.rstd[r];
      vec g_sum{}, gh_sum{};
      for_vectors(C, [&](int64_t c, int n) {
        const vec h = (load(row + c, n) - mean) * rstd, dv = load(d + c, n);
        const vec g = dv * load(weight + c, n);
        g_sum += g;
        gh_sum += g * h;
        store(dw + c, load(dw + c, n) + dv * h, n);
        if (stats.mean) store(db + c, load(db + c, n) + dv, n);
      });
      const float g_mean = stats.mean ? sum_lanes(g_sum) / float(C) : 0.f;
      const float gh_mean = sum_lanes(gh_sum) / float(C);
      for_vectors(C, [&](int64_t c, int n) {
        const vec h = (load(row + c, n) - mean) * rstd;
        const vec g = load(d + c, n) * load(weight + c, n);
        store(dx + r * C + c, load(dx + r * C + c, n) + rstd * (g - g_mean - h * gh_mean), n);
      });
    }
  });
  if (!dweight) return;  // frozen
  const int64_t chunks = (C + 63) / 64;
  parallel_for(chunks, [&](int64_t chunk) {
    for (int64_t c = chunk * 64; c < std::min<int64_t>(C, chunk * 64 + 64); c++) {
      float w = accumulate ? dweight[c] : 0.f, b = accumulate && dbias ? dbias[c] : 0.f;
      for (int block = 0; block < blocks; block++) {
        w += partials[int64_t(block) * 2 * C + c];
        b += partials[int64_t(block) * 2 * C + C + c];
      }
      dweight[c] = w;
      if (dbias) dbias[c] = b;
    }
  });
}

void CpuGpt::norm(int N, const Norm& n, const float* x, float* y, NormStats stats) const {
  norm_forward(N, config_.C, x, weight(n.weight), weight(n.bias), float(config_.norm_eps), y,
               stats);
}
void CpuGpt::norm_back(int N, const Norm& n, const float* dy, const float* x, NormStats stats) {
  norm_backward(N, config_.C, dy, x, weight(n.weight), stats, a_.dx, gradient(n.weight),
                gradient(n.bias), !gradients_are_zero_, a_.partials);
}

// ---------------------------------------------------------------------------------------------
// Linear layers, with adapters

// The three products of x (N, in), weights w (out, in) and y (N, out).
// y = x w^T
static Product forward_product(int N, int in, int out, const float* x, const float* w, float* y) {
  return {N, out, in, {x, in, Inner::k}, {w, in, Inner::k}, y, out};
}
// dx = dy w
static Product input_gradient(int N, int in, int out, const float* w, const float* dy, float* dx) {
  return {N, in, out, {dy, out, Inner::k}, {w, in, Inner::other}, dx, in};
}
// dw = dy^T x
static Product weight_gradient(int N, int in, int out, const float* x, const float* dy, float* dw) {
  return {out, in, N, {dy, out, Inner::other}, {x, in, Inner::other}, dw, in};
}

Operand CpuGpt::matrix(const Linear& l, bool panels) const {  // W (out, in) as B(k = in, n = out)
  if (panels) return {nullptr, 0, Inner::k, weights_->panels_of(*weights_->group_of(l.weight))};
  return {weight(l.weight), l.in, Inner::k};
}
// y (N, out) = x W^T + b [+ residual]
void CpuGpt::linear(int N, const Linear& l, const float* x, float* y, const float* residual,
                    bool panels) const {
  Product p = forward_product(N, l.in, l.out, x, nullptr, y);
  p.b = matrix(l, panels), p.bias = weight(l.bias), p.residual = residual;
  gemm(p);
  for (const Adapter& a : l.adapters) adapter_forward(N, l, a, x, y);
}
// dW += dy^T x, db += column sums of dy; dx = dy W
void CpuGpt::linear_backward(int N, const Linear& l, const float* x, const float* dy, float* dx) {
  if (float* dweight = gradient(l.weight)) {
    Product p = weight_gradient(N, l.in, l.out, x, dy, dweight);
    p.accumulate = !gradients_are_zero_, p.sums = gradient(l.bias);
    gemm(p);
  }
  gemm(input_gradient(N, l.in, l.out, weight(l.weight), dy, dx));
  for (const Adapter& a : l.adapters) adapter_backward(N, l, a, x, dy, dx);
}
// y += u B^T with u = scale x A^T (N, rank)
void CpuGpt::adapter_forward(int N, const Linear& l, const Adapter& a, const float* x,
                             float* y) const {
  if (!adapters_) return;
  const int r = table_.lora.rank;
  const float* u = adapter_inner(N, l, a, x);
  Product p = forward_product(N, r, a.out, u, weight(a.b), y + a.begin);
  p.ldc = l.out, p.accumulate = true;
  gemm(p);
}
const float* CpuGpt::adapter_inner(int N, const Linear& l, const Adapter& a, const float* x) const {
  const int r = table_.lora.rank;
  if (int64_t(inner_.size()) < int64_t(N) * r) inner_.resize(size_t(N) * size_t(r));
  gemm(forward_product(N, l.in, r, x, weight(a.a), inner_.data()));
  scale_inner(N);
  return inner_.data();
}
void CpuGpt::scale_inner(int N) const {
  const int r = table_.lora.rank;
  parallel_for(N, [&](int64_t n) {
    for (int64_t i = n * r; i < (n + 1) * r; i++) inner_[size_t(i)] *= table_.lora.scale();
  });
}
// dB += dy^T u;  du = scale dy B;  dA += du^T x;  dx += du A
void CpuGpt::adapter_backward(int N, const Linear& l, const Adapter& a, const float* x,
                              const float* dy, float* dx) {
  if (!adapters_) return;
  const int r = table_.lora.rank;
  const float* u = adapter_inner(N, l, a, x);
  Product db = weight_gradient(N, r, a.out, u, dy + a.begin, gradient(a.b));
  db.a.ld = l.out, db.accumulate = !gradients_are_zero_;
  gemm(db);
  Product du = input_gradient(N, r, a.out, weight(a.b), dy + a.begin, inner_.data());
  du.a.ld = l.out;
  gemm(du);
  scale_inner(N);
  Product da = weight_gradient(N, l.in, r, x, u, gradient(a.a));
  da.accumulate = !gradients_are_zero_;
  gemm(da);
  Product du_a = input_gradient(N, l.in, r, weight(a.a), u, dx);
  du_a.accumulate = true;
  gemm(du_a);
}

// ---------------------------------------------------------------------------------------------
// RoPE and QK-norm

void RopeTable::extend(int positions) {
  for (int t = int(cos_.size() / size_t(half_)); t < positions; t++) {
    for (double f : frequency_) {
      cos_.push_back(float(std::cos(t * f)));
      sin_.push_back(float(std::sin(t * f)));
    }
  }
}

// RoPE (plain::rope) turns each pair (x[i], x[i + HS/2]) by position x frequency[i].
// (a, b) turned by the angles whose cosines and sines are c and s; back with -s.
static inline void rotate_pairs(vec& a, vec& b, vec c, vec s) {
  const vec x = a;
  a = x * c - b * s;
  b = b * c + x * s;
}

// Rotates one head x (HS) in place; `sign` -1 turns back, which is the backward pass. cos, sin
// (HS/2).
static void rope_row(int HS, float* x, const float* cos, const float* sin, float sign) {
  const int half = HS / 2;
  for_vectors(half, [&](int64_t i, int n) {
    vec a = load(x + i, n), b = load(x + half + i, n);
    rotate_pairs(a, b, load(cos + i, n), sign * load(sin + i, n));
    store(x + i, a, n);
    store(x + half + i, b, n);
  });
}

// y (HS): RMSNorm of one head x (HS) with `weight` (HS), rotated.
static void norm_rope_row(int HS, const float* x, const float* weight, float eps, const float* cos,
                          const float* sin, float* y) {
  const int half = HS / 2;
  vec square{};
  for_vectors(HS, [&](int64_t i, int n) { square += load(x + i, n) * load(x + i, n); });
  const float rstd = 1 / std::sqrt(sum_lanes(square) / float(HS) + eps);
  for_vectors(half, [&](int64_t i, int n) {
    vec a = load(x + i, n) * rstd * load(weight + i, n);
    vec b = load(x + half + i, n) * rstd * load(weight + half + i, n);
    rotate_pairs(a, b, load(cos + i, n), load(sin + i, n));
    store(y + i, a, n);
    store(y + half + i, b, n);
  });
}

// Norm and RoPE of q and k. llama turns them in place; qwen3's backward needs the raw ones, so that
// `rotated` holds the result.
void CpuGpt::rotate(int N, const int* positions, const Block& b, float* qkv, float* rotated) const {
  if (config_.family == Family::gpt2) return;
  const int HS = config_.HS, NH = config_.NH, heads = NH + config_.NKV;
  parallel_for(N, [&](int64_t n) {
    const float *cos = rope_.cos(positions[n]), *sin = rope_.sin(positions[n]);
    for (int h = 0; h < heads; h++) {
      float* x = qkv + n * config_.qkv() + h * HS;
      if (rotated) {
        norm_rope_row(HS, x, weight(h < NH ? b.q_norm : b.k_norm), float(config_.norm_eps), cos,
                      sin, rotated + (n * heads + h) * HS);
      } else {
        rope_row(HS, x, cos, sin, 1);
      }
    }
  });
}

// dqkv holds gradients of the rotated q and k: turned back, and through qwen3's norm.
void CpuGpt::rotate_backward(const Block& b, const LayerActivations& a) {
  if (config_.family == Family::gpt2) return;
  const int HS = config_.HS, half = HS / 2, NH = config_.NH, heads = NH + config_.NKV;
  const int64_t ld = config_.qkv();
  const bool norm = config_.family == Family::qwen3;
  const int blocks = (N_ + kRowBlock - 1) / kRowBlock;
  float* partials = a_.partials;  // (blocks, 2, HS): gradients of q_norm and k_norm
  parallel_for(blocks, [&](int64_t block) {
    float* sums = partials + block * 2 * HS;
    std::fill_n(sums, 2 * HS, 0.f);
    for (int64_t n = block * kRowBlock; n < std::min<int64_t>(N_, (block + 1) * kRowBlock); n++) {
      const float *cos = rope_.cos(positions_[size_t(n)]), *sin = rope_.sin(positions_[size_t(n)]);
      for (int h = 0; h < heads; h++) {
        float* d = a_.dqkv + n * ld + h * HS;
        if (!norm) {
          rope_row(HS, d, cos, sin, -1);
          continue;
        }
        const float *x = a.qkv + n * ld + h * HS, *w = weight(h < NH ? b.q_norm : b.k_norm);
        float* dw = sums + (h < NH ? 0 : HS);
        vec square{}, gx_sum{};
        for_vectors(half, [&](int64_t i, int m) {
          vec d1 = load(d + i, m), d2 = load(d + half + i, m);
          rotate_pairs(d1, d2, load(cos + i, m), -load(sin + i, m));
          const vec x1 = load(x + i, m), x2 = load(x + half + i, m);
          square += x1 * x1 + x2 * x2;
          gx_sum += x1 * d1 * load(w + i, m) + x2 * d2 * load(w + half + i, m);
          store(d + i, d1, m);
          store(d + half + i, d2, m);
        });
        const float rstd = 1 / std::sqrt(sum_lanes(square) / float(HS) + float(config_.norm_eps));
        const float gh_mean = sum_lanes(gx_sum) * rstd / float(HS);
        for_vectors(HS, [&](int64_t i, int m) {
          const vec xhat = load(x + i, m) * rstd, dy = load(d + i, m);
          store(dw + i, load(dw + i, m) + dy * xhat, m);
          store(d + i, rstd * (dy * load(w + i, m) - xhat * gh_mean), m);
        });
      }
    }
  });
  if (!norm || !gradient(b.q_norm)) return;
  for (int i = 0; i < HS; i++) {
    for (const int which : {0, 1}) {
      float* dw = gradient(which ? b.k_norm : b.q_norm) + i;
      float sum = gradients_are_zero_ ? 0.f : *dw;
      for (int block = 0; block < blocks; block++)
        sum += partials[int64_t(block) * 2 * HS + which * HS + i];
      *dw = sum;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Attention (plain::attention_forward and plain::attention_backward define it; read them first):
// out[t] = sum_{s<=t} p[t,s] v[s],  p[t,.] = softmax over s <= t of q[t] k[s] / sqrt(HS)
//
// The fast version makes no T x T matrix. Keys and values of one (document, key/value head) lie in
// pages of kPage positions: keys transposed, [HS][kPage], so that one query meets kPage keys in
// vector lanes; values [kPage][HSP], HSP = HS padded to whole vectors. The KV cache holds the same
// pages, and training makes them on the way, so one function serves both. A row's sums run over its
// pages in order with a running maximum (Dao et al. 2022): the result does not depend on which rows
// stand beside it.

// Where attention finds q, k and v of the live batch.
Attention CpuGpt::attention_of(const float* qkv, const float* rotated) const {
  const int64_t q = int64_t(config_.NH) * config_.HS, qk = q + int64_t(config_.NKV) * config_.HS;
  const int64_t ld = config_.qkv();
  Attention a{config_.NH, config_.NKV, config_.HS, doc_starts_, qkv, qkv + q, qkv + qk, ld, ld, ld};
  if (rotated) a.q = rotated, a.k = rotated + q, a.q_ld = a.k_ld = qk;
  return a;
}

static inline void copy_row(int n, const float* src, float* dst) {
  for_vectors(n, [&](int64_t i, int count) { store(dst + i, load(src + i, count), count); });
}

// Asks for a row of n floats that will be read soon.
static inline void prefetch_row(int n, const float* row) {
  for (int i = 0; i < n; i += 16) __builtin_prefetch(row + i);
}

inline constexpr int kSpan = 4 * kPage;  // keys between two looks at a row's maximum

static inline int to_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// R <= kMR queries of one head at positions first .. first + R - 1; q (R, HS) is already divided by
// sqrt(HS). Pages of E, float or Bf16. out (R, HS); lse (R) log of the sum of exp of a row's
// scores, may be null.
template <class E>
static void attend(int R, int first_position, int HS, const float* q, int64_t q_ld,
                   const E* const* key_pages, const E* const* value_pages, float* out,
                   int64_t out_ld, float* lse, int64_t lse_ld) {
  const int HSP = to_lanes(HS);
  alignas(64) float scores[kMR * kSpan];
  alignas(64) float sums[kMR * 256];  // HSP <= 256
  float highest[kMR];
  vec total[kMR];
  for (int r = 0; r < R; r++)
    highest[r] = -std::numeric_limits<float>::infinity(), total[r] = vec{};
  std::fill(sums, sums + R * HSP, 0.f);
  const int last_position = first_position + R - 1;
  for (int start = 0; start <= last_position; start += kSpan) {
    const int keys = std::min(kSpan, last_position + 1 - start);  // that the last row sees
    const int width = to_lanes(keys);
    for (int key = 0; key < keys; key += kPage)
      small_product(R, to_lanes(std::min(kPage, keys - key)), HS, q, q_ld, 1,
                    key_pages[(start + key) / kPage], kPage, scores + key, kSpan, false);
    for (int r = 0; r < R; r++) {
      const int seen = std::clamp(first_position + r + 1 - start, 0, keys);
      float* s = scores + r * kSpan;
      for (int j = seen; j < width; j++) s[j] = -std::numeric_limits<float>::infinity();
      vec top = splat(highest[r]);
      for (int j = 0; j < width; j += kLanes) top = vmax(top, load(s + j));
      const float higher = max_lanes(top);
      if (start > 0 && higher > highest[r]) {
        const float scale = exp1(highest[r] - higher);
        total[r] *= scale;
        for (int d = 0; d < HSP; d += kLanes) {
          store(sums + r * HSP + d, load(sums + r * HSP + d) * scale);
        }
      }
      highest[r] = higher;
      for (int j = 0; j < width; j += kLanes) {
        const vec p = vexp_below_88(load(s + j) - higher);
        total[r] += p;
        store(s + j, p);
      }
    }
    for (int key = 0; key < keys; key += kPage)
      small_product(R, HSP, std::min(kPage, keys - key), scores + key, kSpan, 1,
                    value_pages[(start + key) / kPage], HSP, sums, HSP, true);
  }
  for (int r = 0; r < R; r++) {
    const float sum = sum_lanes(total[r]);
    const float scale = 1 / sum;
    for_vectors(HS, [&](int64_t d, int n) {
      store(out + r * out_ld + d, load(sums + r * HSP + d) * scale, n);
    });
    if (lse) lse[r * lse_ld] = highest[r] + std::log(sum);
  }
}

// Queries of a document, at positions first .. last - 1, from row `begin` of the batch on.
struct QueryBlock {
  int begin, first, last;
};
// Documents in blocks of at most `size` queries, the last of a document first: it takes longest.
static std::vector<QueryBlock> query_blocks(std::span<const int> doc_starts, int size) {
  std::vector<QueryBlock> blocks;
  for (size_t d = 0; d + 1 < doc_starts.size(); d++) {
    const int begin = doc_starts[d], length = doc_starts[d + 1] - begin;
    for (int first = (length - 1) / size * size; first >= 0; first -= size)
      blocks.push_back({begin, first, std::min(length, first + size)});
  }
  return blocks;
}

// out (N, NH HS), lse (N, NH). A task is one (block of queries, key/value head), and makes the
// pages that these queries see: one in 256 of the work on them.
static void attention_forward(const Attention& a, float* out, float* lse) {
  const int HS = a.HS, HSP = to_lanes(HS);
  const int group = a.NH / a.NKV;
  const float scale = 1 / std::sqrt(float(HS));
  const std::vector<QueryBlock> blocks = query_blocks(a.doc_starts, 256);
  parallel_groups(int64_t(blocks.size()) * a.NKV, a.NKV, [&](int64_t task) {
    const auto [begin, first, length] = blocks[size_t(task / a.NKV)];
    const int kv = int(task % a.NKV), pages = (length + kPage - 1) / kPage;
    thread_local Arena memory;
    const int64_t key_size = int64_t(HS) * kPage, value_size = int64_t(HSP) * kPage;
    const int64_t size = pages * (key_size + value_size);
    memory.grow(size);
    if (HSP != HS) std::fill_n(memory.data(), size, 0.f);  // the padding of values
    std::vector<const float*> key_pages, value_pages;
    for (int p = 0; p < pages; p++) {
      float* key = memory.data() + p * (key_size + value_size);
      const int64_t n = begin + p * kPage;
      const int count = std::min(kPage, length - p * kPage);
      const float *k = a.k + n * a.k_ld + kv * HS, *v = a.v + n * a.v_ld + kv * HS;
      for (int j = 0; j < count; j++) {
        prefetch_row(HS, k + j * a.k_ld);
        prefetch_row(HS, v + (j + kPrefetchSteps) * a.v_ld);
        copy_row(HS, v + j * a.v_ld, key + key_size + int64_t(j) * HSP);
      }
      pack_panel<kPage>({nullptr, a.k_ld, Inner::k}, k, count, HS, key);
      key_pages.push_back(key);
      value_pages.push_back(key + key_size);
    }
    alignas(64) float q[kMR * 256];
    for (int h = kv * group; h < (kv + 1) * group; h++) {
      for (int t = first; t < length; t += kMR) {
        const int R = std::min(kMR, length - t);
        for (int r = 0; r < R; r++) {
          const float* src = a.q + (begin + t + r) * a.q_ld + h * HS;
          prefetch_row(HS, src + kMR * a.q_ld);
          for_vectors(
              HS, [&](int64_t d, int m) { store(q + r * HS + d, load(src + d, m) * scale, m); });
        }
        const int64_t n = begin + t;
        attend(R, t, HS, q, HS, key_pages.data(), value_pages.data(), out + n * a.NH * HS + h * HS,
               a.NH * HS, lse + n * a.NH + h, a.NH);
      }
    }
  });
}

// What one task of the backward pass computes: the gradients of which queries, and of which keys
// and values, of a document. Those of keys [first_key, last_key) need all later queries, those of
// queries [first_query, last_query) all earlier keys.
struct BackwardTask {
  int begin, length;  // of the document
  int first_key, last_key, first_query, last_query;
  bool wants_dq, wants_dkv;
};
// A document is one task where that is enough for the threads. Otherwise its keys and its queries
// are divided, and each P is made twice: 7 products in place of 5. The sums are the same.
static std::vector<BackwardTask> backward_tasks(std::span<const int> doc_starts, int NKV) {
  constexpr int kRows = 4 * kPage;
  const int threads = loop_threads();
  const bool divide = threads > 1 && int64_t(doc_starts.size() - 1) * NKV < 2 * threads;
  std::vector<BackwardTask> tasks;
  for (size_t d = 0; d + 1 < doc_starts.size(); d++) {
    const int begin = doc_starts[d], length = doc_starts[d + 1] - begin;
    if (!divide || length <= kRows) {
      tasks.push_back({begin, length, 0, length, 0, length, true, true});
      continue;
    }
    const int last_block = (length - 1) / kRows * kRows;
    for (int key = 0; key < length; key += kRows) {  // the longest tasks first
      const int query = last_block - key;
      tasks.push_back(
          {begin, length, key, std::min(length, key + kRows), key, length, false, true});
      const int end = std::min(length, query + kRows);
      tasks.push_back({begin, length, 0, end, query, end, true, false});
    }
  }
  return tasks;
}

// From dout (N, NH HS) to dq (N, NH HS), dk, dv (N, NKV HS), all in rows of stride d_ld. P is made
// again from lse. Blocks of kPage queries meet pages of keys; a key's gradient is summed over heads
// and query blocks in order, a query's over pages in order.
static void attention_backward(const Attention& a, const float* out, const float* lse,
                               const float* dout, float* dq, float* dk, float* dv, int64_t d_ld) {
  const int HS = a.HS, HSP = to_lanes(HS);
  const int group = a.NH / a.NKV;
  const int64_t out_ld = int64_t(a.NH) * HS;
  const float scale = 1 / std::sqrt(float(HS));
  const std::vector<BackwardTask> tasks = backward_tasks(a.doc_starts, a.NKV);
  parallel_groups(int64_t(tasks.size()) * a.NKV, a.NKV, [&](int64_t index) {
    const BackwardTask& task = tasks[size_t(index / a.NKV)];
    const int begin = task.begin, length = task.length, first_key = task.first_key;
    const int kv = int(index % a.NKV), key_count = task.last_key - first_key;
    const int padded = (key_count + kPage - 1) / kPage * kPage;
    thread_local Arena memory;
    constexpr int64_t kTile = kPage * 256, kSquare = kPage * kPage;
    memory.grow(int64_t(padded) * (3 * HSP + 2 * HS) + 3 * kTile + 2 * kSquare);
    float* q = memory.data();  // of one page of queries, as the next four
    float *d_out = q + kTile, *d_q = d_out + kTile, *p = d_q + kTile, *ds = p + kSquare;
    float* keys = ds + kSquare;                    // (padded, HSP) from first_key on
    float* keys_t = keys + int64_t(padded) * HSP;  // pages [HS][kPage]
    float* values_t = keys_t + int64_t(padded) * HS;
    float* dkeys = values_t + int64_t(padded) * HS;  // (padded, HSP), as the next two
    float* dvalues = dkeys + int64_t(padded) * HSP;
    if (HSP != HS) std::fill(keys, keys + int64_t(padded) * HSP, 0.f);  // the padding
    std::fill(dkeys, dvalues + int64_t(padded) * HSP, 0.f);
    for (int t0 = 0; t0 < key_count; t0 += kPage) {
      const int count = std::min(kPage, key_count - t0);
      const float* k = a.k + (begin + first_key + t0) * a.k_ld + kv * HS;
      const float* v = a.v + (begin + first_key + t0) * a.v_ld + kv * HS;
      for (int t = 0; t < count; t++) {
        prefetch_row(HS, k + (t + kPrefetchSteps) * a.k_ld);
        prefetch_row(HS, v + t * a.v_ld);
        copy_row(HS, k + t * a.k_ld, keys + int64_t(t0 + t) * HSP);
      }
      pack_panel<kPage>({nullptr, a.k_ld, Inner::k}, k, count, HS, keys_t + int64_t(t0) * HS);
      pack_panel<kPage>({nullptr, a.v_ld, Inner::k}, v, count, HS, values_t + int64_t(t0) * HS);
    }
    for (int h = kv * group; h < (kv + 1) * group; h++) {
      for (int t0 = task.first_query; t0 < task.last_query; t0 += kPage) {
        const int rows = std::min(kPage, task.last_query - t0);
        float dot[kPage], row_lse[kPage];  // dot: sum_d dout out = sum_s p dp
        for (int r = 0; r < rows; r++) {
          const int64_t n = begin + t0 + r;
          const float *src = a.q + n * a.q_ld + h * HS, *d = dout + n * out_ld + h * HS;
          const float* o = out + n * out_ld + h * HS;
          prefetch_row(HS, src + kPrefetchSteps * a.q_ld);
          prefetch_row(HS, d + kPrefetchSteps * out_ld);
          prefetch_row(HS, o + kPrefetchSteps * out_ld);
          vec sum{};
          for_vectors(HS, [&](int64_t i, int m) {
            store(q + r * HSP + i, load(src + i, m) * scale);
            store(d_out + r * HSP + i, load(d + i, m));
            sum += load(d + i, m) * load(o + i, m);
          });
          dot[r] = sum_lanes(sum);
          row_lse[r] = lse[n * a.NH + h];
        }
        std::fill(d_q, d_q + rows * HSP, 0.f);
        for (int s0 = first_key; s0 <= t0 && s0 < task.last_key; s0 += kPage) {
          const int page_keys = std::min(kPage, length - s0);
          const int64_t page = s0 - first_key;
          const bool diagonal = s0 == t0;
          for (int r0 = 0; r0 < rows; r0 += kMR) {
            const int R = std::min(kMR, rows - r0);
            const int count = diagonal ? r0 + R : page_keys;  // keys that the last row sees
            const int width = to_lanes(count);
            float *pr = p + r0 * kPage, *dsr = ds + r0 * kPage;
            small_product(R, width, HS, q + r0 * HSP, HSP, 1, keys_t + page * HS, kPage, pr, kPage,
                          false);
            small_product(R, width, HS, d_out + r0 * HSP, HSP, 1, values_t + page * HS, kPage, dsr,
                          kPage, false);
            for (int r = 0; r < R; r++) {
              const int seen = diagonal ? r0 + r + 1 : page_keys;
              float *ps = pr + r * kPage, *d = dsr + r * kPage;
              const auto weigh = [&](int j, int n) {
                const vec e = mask_lanes(vexp_below_88(load(ps + j) - row_lse[r0 + r]), n);
                store(ps + j, e);
                store(d + j, e * (load(d + j) - dot[r0 + r]));
              };
              int j = 0;
              for (; j + kLanes <= seen; j += kLanes) weigh(j, kLanes);
              for (; j < width; j += kLanes) weigh(j, std::max(0, seen - j));
            }
            if (!task.wants_dq) continue;
            small_product(R, HSP, count, dsr, kPage, 1, keys + page * HSP, HSP, d_q + r0 * HSP, HSP,
                          true);
          }
          for (int j0 = 0; task.wants_dkv && j0 < page_keys; j0 += kMR) {
            const int R = std::min(kMR, page_keys - j0), r_begin = diagonal ? j0 : 0;
            if (r_begin >= rows) break;
            small_product(R, HSP, rows - r_begin, p + r_begin * kPage + j0, 1, kPage,
                          d_out + r_begin * HSP, HSP, dvalues + (page + j0) * HSP, HSP, true);
            small_product(R, HSP, rows - r_begin, ds + r_begin * kPage + j0, 1, kPage,
                          q + r_begin * HSP, HSP, dkeys + (page + j0) * HSP, HSP, true);
          }
        }
        for (int r = 0; task.wants_dq && r < rows; r++)
          for (int d = 0; d < HS; d++)
            dq[(begin + t0 + r) * d_ld + h * HS + d] = d_q[r * HSP + d] * scale;
      }
    }
    for (int t = 0; task.wants_dkv && t < key_count; t++) {
      const int64_t n = begin + first_key + t;
      copy_row(HS, dkeys + int64_t(t) * HSP, dk + n * d_ld + kv * HS);
      copy_row(HS, dvalues + int64_t(t) * HSP, dv + n * d_ld + kv * HS);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Activations

// GELU, tanh form (plain::gelu): y = x s(2u), u = sqrt(2/pi) (x + .044715 x^3), s the sigmoid
static inline vec gelu_argument(vec x) {  // 2u
  return 1.5957691216f * (x + .044715f * x * x * x);
}
static void gelu_forward(int64_t size, const float* x, float* y) {
  parallel_for((size + 1023) / 1024, [&](int64_t chunk) {
    const int64_t begin = chunk * 1024;
    for_vectors(std::min<int64_t>(1024, size - begin), [&](int64_t i, int n) {
      const vec v = load(x + begin + i, n);
      store(y + begin + i, v * vsigmoid(gelu_argument(v)), n);
    });
  });
}
// From dy; x's gradient takes its place.
static void gelu_backward(int64_t size, float* x, const float* dy) {
  parallel_for((size + 1023) / 1024, [&](int64_t chunk) {
    const int64_t begin = chunk * 1024;
    for_vectors(std::min<int64_t>(1024, size - begin), [&](int64_t i, int n) {
      const vec v = load(x + begin + i, n), s = vsigmoid(gelu_argument(v));
      const vec slope = 1.5957691216f * (1.f + .134145f * v * v);
      store(x + begin + i, load(dy + begin + i, n) * (s + v * s * (1.f - s) * slope), n);
    });
  });
}
// SwiGLU (plain::swiglu): y = gate s(gate) up. gate_up (N, 2F): the gate's columns, then up's;
// y (N, F)
static void swiglu_forward(int64_t N, int F, const float* gate_up, float* y) {
  parallel_for(N, [&](int64_t r) {
    const float *gate = gate_up + r * 2 * F, *up = gate + F;
    for_vectors(F, [&](int64_t i, int n) {
      const vec g = load(gate + i, n);
      store(y + r * F + i, g * vsigmoid(g) * load(up + i, n), n);
    });
  });
}
// From dy (N, F); gate_up's gradient takes its place.
static void swiglu_backward(int64_t N, int F, float* gate_up, const float* dy) {
  parallel_for(N, [&](int64_t r) {
    float *gate = gate_up + r * 2 * F, *up = gate + F;
    for_vectors(F, [&](int64_t i, int n) {
      const vec g = load(gate + i, n), u = load(up + i, n), d = load(dy + r * F + i, n);
      const vec s = vsigmoid(g);
      store(up + i, d * g * s, n);
      store(gate + i, d * u * (s + g * s * (1.f - s)), n);
    });
  });
}

void CpuGpt::activate(int N, const float* up, float* act) const {
  if (config_.has_gate()) {
    swiglu_forward(N, config_.F, up, act);
  } else {
    gelu_forward(int64_t(N) * config_.F, up, act);
  }
}
void CpuGpt::activate_backward(float* up, const float* dact) const {
  if (config_.has_gate()) {
    swiglu_backward(N_, config_.F, up, dact);
  } else {
    gelu_backward(int64_t(N_) * config_.F, up, dact);
  }
}

// ---------------------------------------------------------------------------------------------
// LM head: a row of logits -> log p(target), entropy, and in place their gradient

static float largest(int n, const float* x) {
  vec top = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) top = vmax(top, load(x + i));
  float highest = max_lanes(top);
  for (; i < n; i++) highest = std::max(highest, x[i]);
  return highest;
}

// log p(target) and the entropy of softmax(x / temperature) (plain::classifier_forward).
static RowSoftmax row_softmax(int V, const float* x, float inverse_temperature) {
  const float highest = largest(V, x);
  vec sum{}, weighted{};
  for_vectors(V, [&](int64_t i, int n) {
    const vec s = mask_lanes((load(x + i, n) - highest) * inverse_temperature, n);
    const vec e = mask_lanes(vexp_below_88(s), n);
    sum += e;
    weighted += e * s;
  });
  const float total = sum_lanes(sum), log_sum = std::log(total);
  return {highest, log_sum, log_sum - sum_lanes(weighted) / total};
}

// x[j] becomes (dlogp (1[j = target] - p_j) - dentropy p_j (log p_j + H)) / temperature.
static void row_softmax_backward(int V, float* x, const RowSoftmax& s, float inverse_temperature,
                                 int target, float dlogp, float dentropy) {
  const float a = -dlogp * inverse_temperature, b = -dentropy * inverse_temperature;
  for_vectors(V, [&](int64_t j, int n) {
    const vec logp = (load(x + j, n) - s.highest) * inverse_temperature - s.log_sum;
    store(x + j, vexp_below_88(logp) * (a + b * (logp + s.entropy)), n);
  });
  x[target] += dlogp * inverse_temperature;
}

// Rows of logits made at a time: what fits 64 MiB, at least 256. Never a function of the threads.
static int64_t logit_rows(const Config& c, int64_t N) {
  return std::min(N, std::max<int64_t>(256, (int64_t(64) << 20) / (int64_t(c.padded_V()) * 4)));
}

// Logits of head_rows_[first, first + rows) and their softmax statistics.
void CpuGpt::logits_forward(int64_t begin, int64_t rows) {
  const int C = config_.C, V = config_.V, ld = config_.padded_V();
  parallel_for(rows, [&](int64_t r) {
    const int64_t n = head_rows_[size_t(begin + r)];
    std::copy_n(a_.final_norm + n * C, C, a_.head_in + (begin + r) * C);
  });
  Product p = forward_product(int(rows), C, V, a_.head_in + begin * C, nullptr, a_.logits);
  p.b = matrix(table_.head, weights_->panels_only), p.ldc = ld;
  gemm(p);
  parallel_for(rows, [&](int64_t r) {
    const size_t row = size_t(begin + r), n = size_t(head_rows_[row]);
    const float* x = a_.logits + r * ld;
    softmax_[row] = row_softmax(V, x, inverse_temperature_);
    logp_[n] = softmax_[row].logp(x[targets_[n]], inverse_temperature_);
    entropy_[n] = softmax_[row].entropy;
  });
}

void CpuGpt::head_forward() {
  if (config_.head == Head::scalar) {
    gemm(forward_product(N_, config_.C, 1, a_.final_norm, weight(table_.head.weight),
                         value_.data()));
    return;
  }
  const auto M = int64_t(head_rows_.size()), chunk = logit_rows(config_, N_);
  for (int64_t begin = 0; begin < M; begin += chunk) {
    logits_forward(begin, std::min(chunk, M - begin));
  }
  logits_kept_ = M <= chunk;
}

// From the per-token weights to dx, the gradient of the stream that leaves the last layer, through
// the head and the final norm. Logits are made here unless forward left them.
void CpuGpt::head_backward(std::span<const float> dlogp, std::span<const float> dvalue,
                           std::span<const float> dentropy, bool logits_ready) {
  const int C = config_.C, V = config_.V, ld = config_.padded_V();
  const Linear& head = table_.head;
  clear(a_.dnorm, int64_t(N_) * C);
  if (config_.head == Head::scalar) {
    const std::vector<float> zeros(size_t(dvalue.empty() ? N_ : 0));
    const float* d = dvalue.empty() ? zeros.data() : dvalue.data();  // (N, 1)
    if (!dvalue.empty()) gemm(input_gradient(N_, C, 1, weight(head.weight), d, a_.dnorm));
    if (float* dhead = gradient(head.weight)) {
      Product p = weight_gradient(N_, C, 1, a_.final_norm, d, dhead);
      p.accumulate = !gradients_are_zero_;
      gemm(p);
    }
  } else {
    // Logits that no forward left are made 4 MiB or 512 rows at a time, which the caches hold.
    const auto M = int64_t(head_rows_.size()), cached = (int64_t(4) << 20) / (int64_t(ld) * 4);
    const int64_t chunk =
        logits_ready ? M : std::min(logit_rows(config_, N_), std::max<int64_t>(512, cached));
    float* dhead = gradient(head.weight);
    if (gradients_are_zero_ && M == 0 && dhead) clear(dhead, int64_t(V) * C);
    for (int64_t begin = 0; begin < M; begin += chunk) {
      const int rows = int(std::min(chunk, M - begin));
      if (!logits_ready) logits_forward(begin, rows);
      parallel_for(rows, [&](int64_t r) {
        const size_t row = size_t(begin + r), n = size_t(head_rows_[row]);
        row_softmax_backward(V, a_.logits + r * ld, softmax_[row], inverse_temperature_,
                             targets_[n], dlogp.empty() ? 0.f : dlogp[n],
                             dentropy.empty() ? 0.f : dentropy[n]);
      });
      // The logits' gradients now stand in the logits' place.
      Product p =
          input_gradient(rows, C, V, weight(head.weight), a_.logits, a_.dhead_in + begin * C);
      p.a.ld = ld;
      gemm(p);
      if (!dhead) continue;
      p = weight_gradient(rows, C, V, a_.head_in + begin * C, a_.logits, dhead);
      p.a.ld = ld, p.accumulate = !gradients_are_zero_ || begin > 0;
      gemm(p);
    }
    parallel_for(M, [&](int64_t r) {
      std::copy_n(a_.dhead_in + r * C, C, a_.dnorm + int64_t(head_rows_[size_t(r)]) * C);
    });
  }
  for (size_t n = 0; n < dlogp.size(); n++) loss_ += double(dlogp[n]) * logp_[n];
  clear(a_.dx, int64_t(N_) * C);
  norm_back(N_, table_.final_norm, a_.dnorm, a_.x, a_.final_stats);
}

// =============================================================================================
// 3. Optimizers

// The norm of the whole gradient: blocks of a fixed size, then over the blocks in order.
double CpuGpt::gradient_norm() {
  const int64_t size = table_.size - frozen_;  // pages of frozen rows are never touched
  if (gradients_are_zero_) clear(gradients_.data() + frozen_, size);
  constexpr int64_t kChunk = 1 << 15;
  std::vector<double> squares(size_t((size + kChunk - 1) / kChunk));
  parallel_for(int64_t(squares.size()), [&](int64_t block) {
    const float* g = gradients_.data() + frozen_ + block * kChunk;
    double sum = 0;
    for (int64_t start = 0, n = std::min(kChunk, size - block * kChunk); start < n; start += 1024) {
      vec square{};
      for_vectors(std::min<int64_t>(1024, n - start), [&](int64_t i, int m) {
        const vec x = load(g + start + i, m);
        square += x * x;
      });
      sum += sum_lanes(square);
    }
    squares[size_t(block)] = sum;
  });
  return std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.));
}

// What one thread steps at a time: AdamW goes element by element, Muon by whole matrices.
std::vector<CpuGpt::Piece> CpuGpt::update_pieces() const {
  std::vector<Piece> pieces;
  for (const bool muon_owns : {true, false}) {
    for (const Tensor& t : table_.tensors) {
      if (t.muon != muon_owns || !t.trainable) continue;
      const int64_t chunk = muon_owns ? t.size() : int64_t(1) << 16;
      for (int64_t i = 0; i < t.size(); i += chunk)
        pieces.push_back({&t, t.offset + i, std::min(chunk, t.size() - i)});
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return a.tensor->muon && (!b.tensor->muon || a.size > b.size);  // the longest work first
  });
  return pieces;
}

// AdamW (Loshchilov, Hutter 2019) on n floats; g is multiplied by `scale` (clipping) first:
// m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
// w -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + decay w)
static void adamw(int64_t size, float* w, const float* g, float* m, float* v, float scale, float lr,
                  float decay, const OptimizerStep& o) {
  const float c1 = 1 / (1 - float(std::pow(double(o.beta1), double(o.step))));
  const float c2 = 1 / (1 - float(std::pow(double(o.beta2), double(o.step))));
  const float shrink = 1 - lr * decay;
  for_vectors(size, [&](int64_t i, int n) {
    const vec grad = load(g + i, n) * scale;
    const vec mi = o.beta1 * load(m + i, n) + (1 - o.beta1) * grad;
    const vec vi = o.beta2 * load(v + i, n) + (1 - o.beta2) * grad * grad;
    store(m + i, mi, n);
    store(v + i, vi, n);
    store(w + i, shrink * load(w + i, n) - lr * c1 * mi / (vsqrt(vi * c2) + o.eps), n);
  });
}

// Muon (Jordan et al. 2024) on one matrix (out, in), by one thread:
// m = mu m + (1-mu) g;  u = mu m + (1-mu) g (Nesterov);
// X = u / (||u|| + 1e-7), five times X <- a X + (b A + c A A) X with A = X X^T, which drives the
// singular values towards 1;  w -= lr (sqrt(max(1, out/in)) X + decay w)
// A tall X is multiplied from the right instead, with A = X^T X: the same, transposed.
static void muon(int out, int in, float* w, const float* g, float* m, float scale,
                 const OptimizerStep& o) {
  const int64_t size = int64_t(out) * in;
  const bool tall = out > in;
  const int rows = std::min(out, in), columns = std::max(out, in);
  const int64_t square_size = int64_t(rows) * rows;
  thread_local Arena memory;
  memory.grow(2 * size + 4 * square_size);
  float *x = memory.data(), *next = x + size, *a = next + size, *p = a + square_size;
  float *q = p + square_size, *r = q + square_size;  // (rows, rows), as a and p
  const float mu = o.muon_momentum;
  vec squares{};
  for_vectors(size, [&](int64_t i, int n) {
    const vec grad = load(g + i, n) * scale;
    const vec mi = mu * load(m + i, n) + (1 - mu) * grad;
    const vec u = mu * mi + (1 - mu) * grad;
    store(m + i, mi, n);
    store(x + i, u, n);
    squares += u * u;
  });
  const float inverse = 1 / (std::sqrt(sum_lanes(squares)) + 1e-7f);
  for_vectors(size, [&](int64_t i, int n) { store(x + i, load(x + i, n) * inverse, n); });

  // left and right commute
  const auto small = [&](const float* left, const float* right, float* result) {
    gemm_symmetric(rows, rows, {left, rows, Inner::k}, {right, rows, Inner::other}, result);
  };
  const auto gram = [&] {  // A = X X^T, of a tall X X^T X
    const Operand lines{x, in, tall ? Inner::other : Inner::k};
    gemm_symmetric(rows, columns, lines, lines, a);
  };
  const auto polynomial = [&](float* result) {  // a I + b A + c A A
    small(a, a, result);
    for_vectors(square_size, [&](int64_t i, int n) {
      store(result + i, 2.0315f * load(result + i, n) - 4.7750f * load(a + i, n), n);
    });
    for (int i = 0; i < rows; i++) result[int64_t(i) * rows + i] += 3.4445f;
  };
  const auto advance = [&](const float* polynomial_of_a) {  // X <- P X, a tall X <- X P
    const Operand square{polynomial_of_a, rows, tall ? Inner::other : Inner::k};
    const Operand wide{x, in, tall ? Inner::k : Inner::other};
    gemm_rectangle({out, in, rows, tall ? wide : square, tall ? square : wide, next, in}, 0, out, 0,
                   in);
    std::swap(x, next);
  };
  // The polynomials of one A commute, so that the five steps of X are one product of small
  // symmetric matrices, and A follows them by A <- P A P: two wide products of X in place of ten.
  // Rounding in A grows with the steps: to 1e-4 of the result on a gradient of rank 8 with noise a
  // thousand times smaller (step by step 3e-5), to 1.5e-5 on square random matrices (1e-6); on wide
  // ones it is as small as step by step.
  gram();
  polynomial(q);
  for (int step = 1; step < 5; step++) {
    const float* previous = step == 1 ? q : p;  // the polynomial that A has yet to follow
    small(previous, a, r);
    small(r, previous, a);
    polynomial(p);
    small(p, q, r);
    std::swap(q, r);
  }
  advance(q);
  const float lr = o.muon_lr * std::sqrt(std::max(1.f, float(out) / float(in)));
  const float shrink = 1 - o.muon_lr * o.muon_decay;
  for_vectors(size, [&](int64_t i, int n) {
    store(w + i, shrink * load(w + i, n) - lr * load(x + i, n), n);
  });
}

// =============================================================================================
// 4. Decoding: a KV cache in pages, and sampling

// A page has for each layer and key/value head its keys, [HS][kPage], then its values,
// [kPage][HSP], all float or all Bf16. The lanes of values beyond HS stay 0.
class CpuKvCache : public KvCache {
 public:
  CpuKvCache(const Config& c, int64_t limit, CacheType cache_type)
      : KvCache(limit),
        type(cache_type == CacheType::bf16 ? CacheType::bf16 : CacheType::f32),
        key_size_(int64_t(c.HS) * kPage),
        head_size_(key_size_ + int64_t(to_lanes(c.HS)) * kPage),
        NKV_(c.NKV),
        L_(c.L),
        chunk_pages_(std::clamp<int64_t>(kChunkBytes / page_bytes(c, type), 1,
                                         std::max<int64_t>(1, pages_of(limit)))) {}
  static int64_t page_bytes(const Config& c, CacheType type) {
    const int64_t elements = int64_t(c.L) * c.NKV * (c.HS + to_lanes(c.HS)) * kPage;
    return elements * (type == CacheType::bf16 ? 2 : 4);
  }
  static int64_t pages_of(int64_t positions) { return (positions + kPage - 1) / kPage; }

  template <class E>
  E* keys(int page, int layer, int head) const {  // [HS][kPage]
    return reinterpret_cast<E*>(memory(page)) + (int64_t(layer) * NKV_ + head) * head_size_;
  }
  template <class E>
  E* values(int page, int layer, int head) const {  // [kPage][HSP]
    return keys<E>(page, layer, head) + key_size_;
  }
  void copy(int src, int dst) const { std::copy_n(memory(src), page_floats(), memory(dst)); }

  const CacheType type;  // f32 or bf16

 private:
  // Memory comes in chunks of this size. A page that was never written takes none. The system's
  // huge pages may take 2 MB more than was written, once in a chunk.
  static constexpr int64_t kChunkBytes = int64_t(32) << 20;

  void reserve_memory(int64_t pages) override;
  int64_t page_floats() const {
    return L_ * NKV_ * head_size_ / (type == CacheType::bf16 ? 2 : 1);  // head_size_ is even
  }
  float* memory(int page) const {
    return chunks_[size_t(page / chunk_pages_)].data() + page % chunk_pages_ * page_floats();
  }

  int64_t key_size_, head_size_;  // elements
  int64_t NKV_, L_, chunk_pages_;
  std::deque<Arena> chunks_;
};

static int64_t available_memory();

void CpuKvCache::reserve_memory(int64_t pages) {
  while (int64_t(chunks_.size()) * chunk_pages_ < pages) {
    const int64_t bytes = chunk_pages_ * page_floats() * 4, available = available_memory();
    if (bytes > available) {
      fail("out of memory: the KV cache holds ", bytes_text(double(bytes) * double(chunks_.size())),
           " and needs ", bytes_text(double(bytes)), " more, found ", bytes_text(double(available)),
           " available; lower ", kDecodeFlags);
    }
    chunks_.emplace_back(bytes / 4);
  }
}

std::unique_ptr<KvCache> CpuGpt::make_cache(int64_t limit, CacheType type) {
  return std::make_unique<CpuKvCache>(config_, limit, type);
}

static void store_rounded(float x, float* p) { *p = x; }
static void store_rounded(float x, Bf16* p) { p->bits = float_to_bf16(x); }

// One position's key (HS) into lane `lane` of a page, transposed, and its value (HS) into that row.
template <class E>
static void fill_page(int HS, int lane, const float* k, const float* v, E* key_page,
                      E* value_page) {
  for (int d = 0; d < HS; d++) store_rounded(k[d], key_page + d * kPage + lane);
  E* value = value_page + int64_t(lane) * to_lanes(HS);
  for (int d = 0; d < HS; d++) store_rounded(v[d], value + d);
}

// The first of the largest numbers, none of which is NaN.
static int index_of_largest(int n, const float* x) {
  constexpr int kBlock = 1024;
  float highest = x[0];
  int block = 0;
  for (int begin = 0; begin < n; begin += kBlock) {
    const float top = largest(std::min(kBlock, n - begin), x + begin);
    if (top > highest) highest = top, block = begin;
  }
  return int(std::find(x + block, x + n, highest) - x);
}

// Sampling: a function of the logits and of (seed, stream, position) alone. `distribution` gets the
// probability of each token; null: nobody wants it.
static int sample_row(int V, const float* logits, const DecodeRow& row, uint64_t position,
                      std::vector<float>& p, Distribution* distribution) {
  const Sampling& sampling = row.sampling;
  const bool penalty = sampling.repetition_penalty != 1;
  const auto certain = [&](int id) {
    if (distribution) distribution->probability[size_t(id)] = 1;
    return id;
  };
  if (sampling.temperature == 0 && !penalty && row.biases.empty()) {
    return certain(index_of_largest(V, logits));
  }
  p.assign(logits, logits + V);
  if (penalty) {
    std::vector<int> seen(row.history.begin(), row.history.end());
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (int id : seen) {
      if (id >= V) continue;
      float& x = p[size_t(id)];
      x = x > 0 ? x / sampling.repetition_penalty : x * sampling.repetition_penalty;
    }
  }
  for (const LogitBias& b : row.biases) {
    if (b.id < V) p[size_t(b.id)] += b.bias;
  }
  const int best = index_of_largest(V, p.data());
  if (sampling.temperature == 0) return certain(best);
  const float highest = p[size_t(best)], inverse_temperature = 1 / sampling.temperature;
  for_vectors(V, [&](int64_t j, int n) {  // proportional to probabilities; the best has 1
    store(&p[size_t(j)], vexp((load(&p[size_t(j)], n) - highest) * inverse_temperature), n);
  });
  if (sampling.min_p > 0) {
    for (float& x : p) x = x < sampling.min_p ? 0 : x;
  }
  const bool cut_k = sampling.top_k > 0 && sampling.top_k < V, cut_p = sampling.top_p < 1;
  if (cut_k || cut_p) {  // most likely first, smaller ids first among equals
    std::vector<int> order(static_cast<size_t>(V));
    std::iota(order.begin(), order.end(), 0);
    const auto likelier = [&](int a, int b) {
      return p[size_t(a)] != p[size_t(b)] ? p[size_t(a)] > p[size_t(b)] : a < b;
    };
    size_t kept = cut_k ? size_t(sampling.top_k) : size_t(V);
    if (cut_k) std::nth_element(order.begin(), order.begin() + kept - 1, order.end(), likelier);
    if (cut_p) {  // the smallest set that reaches top_p of what is left; few are sorted to find it
      double total = 0, reached = 0;
      for (size_t i = 0; i < kept; i++) total += p[size_t(order[i])];
      size_t i = 0, sorted = 0;
      for (; i < kept && reached < sampling.top_p * total; i++) {
        if (i == sorted) {
          sorted = std::min(kept, std::max<size_t>(64, 4 * sorted));
          std::partial_sort(order.begin() + i, order.begin() + sorted, order.begin() + kept,
                            likelier);
        }
        reached += p[size_t(order[i])];
      }
      kept = i;
    }
    for (size_t i = kept; i < order.size(); i++) p[size_t(order[i])] = 0;
  }
  // Inverse of the cumulative sum: blocks of 256 first, then inside the block.
  std::vector<double> blocks;
  double total = 0;
  for (int begin = 0; begin < V; begin += 256) {
    vec sum{};
    for_vectors(std::min(256, V - begin),
                [&](int64_t j, int n) { sum += load(&p[size_t(begin + j)], n); });
    blocks.push_back(sum_lanes(sum));
    total += blocks.back();
  }
  if (distribution) {
    for (int j = 0; j < V; j++) {
      distribution->probability[size_t(j)] = float(double(p[size_t(j)]) / total);
    }
  }
  double left = total * uniform01(mix64(sampling.seed, sampling.stream, position));
  size_t block = 0;
  while (block + 1 < blocks.size() && left >= blocks[block]) left -= blocks[block++];
  int last = best;  // rounding may pass the block's end: then its last possible token
  for (int j = int(block) * 256; j < std::min(V, int(block) * 256 + 256); j++) {
    if (p[size_t(j)] == 0) continue;
    last = j;
    if (left < p[size_t(j)]) return j;
    left -= p[size_t(j)];
  }
  return last;
}

static bool all_finite(int64_t n, const float* x) {
  vec zeros{};  // x - x is 0, and NaN where x is not finite
  for_vectors(n, [&](int64_t i, int count) { zeros += load(x + i, count) - load(x + i, count); });
  return sum_lanes(zeros) == 0;
}

// The place of a token in the order of `likeliest`, from 1 on. Ids from V on have one too.
static int rank_of(int V, const float* logits, int id) {
  const float own = logits[id];
  const int before = std::min(id, V);
  int likelier = 0;
  for (int j = 0; j < before; j++) likelier += logits[j] >= own;
  for (int j = before; j < V; j++) likelier += logits[j] > own;
  return 1 + likelier;
}

// The k likeliest of V tokens, likeliest first, the smallest id first among equals.
static std::vector<TopToken> likeliest(int V, const float* logits, int k,
                                       const RowSoftmax& softmax) {
  struct Entry {
    float logit;
    int id;
  };
  std::vector<Entry> best;  // a heap: the first entry is the next to leave
  const auto likelier = [](const Entry& a, const Entry& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const size_t kept = size_t(std::clamp(k, 0, V));
  constexpr int kBlock = 1024;
  for (int begin = 0; begin < V && kept > 0; begin += kBlock) {
    const int end = std::min(V, begin + kBlock);
    // Ids rise, so that an equal logit that comes later is not likelier.
    if (best.size() == kept && largest(end - begin, logits + begin) <= best[0].logit) continue;
    for (int id = begin; id < end; id++) {
      const Entry entry{logits[id], id};
      if (best.size() == kept) {
        if (!likelier(entry, best[0])) continue;
        std::pop_heap(best.begin(), best.end(), likelier);
        best.pop_back();
      }
      best.push_back(entry);
      std::push_heap(best.begin(), best.end(), likelier);
    }
  }
  std::sort_heap(best.begin(), best.end(), likelier);
  std::vector<TopToken> top;
  for (const Entry& e : best) top.push_back({e.id, softmax.logp(e.logit, 1)});
  return top;
}

// What a thread does of the attention of one call to decode, for one key/value head: new tokens
// first .. last - 1 of a row.
struct CacheTask {
  size_t row;
  int kv, first, last;
};
// Of a row and head the last tokens first: they see the most keys.
static std::vector<CacheTask> cache_tasks(const NewTokens& added, int NKV) {
  constexpr int kTokens = 16 * kMR;
  std::vector<CacheTask> tasks;
  for (size_t r = 0; r + 1 < added.starts.size(); r++) {
    const int n = added.starts[r + 1] - added.starts[r];
    for (int kv = 0; kv < NKV; kv++)
      for (int first = (n - 1) / kTokens * kTokens; first >= 0; first -= kTokens)
        tasks.push_back({r, kv, first, std::min(n, first + kTokens)});
  }
  return tasks;
}

// Puts the keys and values of layer l's new tokens into pages of E, then attends to all there are.
template <class E>
void CpuGpt::attend_cached(const CpuKvCache& pages, std::span<const DecodeRow> rows,
                           const NewTokens& added, std::span<const CacheTask> tasks, int l,
                           LayerActivations& a) const {
  const int NH = config_.NH, NKV = config_.NKV, HS = config_.HS;
  const float scale = 1 / std::sqrt(float(HS));
  const Attention qkv = attention_of(a.qkv, a.rotated);
  const auto fill = [&](int64_t task) {
    const auto& [r, kv, first, last] = tasks[size_t(task)];
    for (int t = first; t < last; t++) {
      const int position = added.lengths[r] + t;
      const int page = pages.pages(rows[r].sequence)[size_t(position / kPage)];
      const int64_t i = added.starts[r] + t;
      fill_page(HS, position % kPage, qkv.k + i * qkv.k_ld + kv * HS,
                qkv.v + i * qkv.v_ld + kv * HS, pages.keys<E>(page, l, kv),
                pages.values<E>(page, l, kv));
    }
  };
  const auto count = int64_t(tasks.size());
  // A task that has all of its row's new tokens needs no other's keys.
  const bool alone = count == int64_t(rows.size()) * NKV;
  if (!alone) parallel_groups(count, 1, fill);
  parallel_groups(count, 1, [&](int64_t task) {
    if (alone) fill(task);
    const auto& [r, kv, first, last] = tasks[size_t(task)];
    const int before = added.lengths[r];
    std::vector<const E*> key_pages, value_pages;
    for (const int page : pages.pages(rows[r].sequence)) {
      key_pages.push_back(pages.keys<E>(page, l, kv));
      value_pages.push_back(pages.values<E>(page, l, kv));
    }
    alignas(64) float q[kMR * 256];
    for (int h = kv * (NH / NKV); h < (kv + 1) * (NH / NKV); h++) {
      for (int t = first; t < last; t += kMR) {
        const int count = std::min(kMR, last - t);
        const int64_t i = added.starts[r] + t;
        for (int j = 0; j < count; j++)
          for (int d = 0; d < HS; d++)
            q[j * HS + d] = qkv.q[(i + j) * qkv.q_ld + h * HS + d] * scale;
        attend(count, before + t, HS, q, HS, key_pages.data(), value_pages.data(),
               a.att + i * NH * HS + h * HS, NH * HS, nullptr, 0);
      }
    }
  });
}

void CpuGpt::decode(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
                    bool logits) {
  with_team([&] { decode_rows(cache, rows, result, logits); });
}

void CpuGpt::decode_rows(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
                         bool want_logits) {
  auto& pages = dynamic_cast<CpuKvCache&>(cache);
  const int C = config_.C, V = config_.V;
  const auto R = int64_t(rows.size());
  const NewTokens added = pack_new_tokens(config_, cache, rows);
  NewPositions room(cache, rows, [&](int src, int dst) { pages.copy(src, dst); });
  result.ids.assign(size_t(R), 0);
  result.logp.assign(size_t(R), 0.f);
  result.logits.resize(want_logits ? size_t(R * V) : 0);
  result.make_scores(rows);
  if (R == 0) return;
  const int N = int(added.tokens.size());
  weights_->make_panels();
  decode_.reserve(config_, N, Saved::none);
  const std::vector<CacheTask> tasks = cache_tasks(added, config_.NKV);
  const auto attend_cache = [&](int l, LayerActivations& a) {
    if (pages.type == CacheType::bf16) {
      attend_cached<Bf16>(pages, rows, added, tasks, l, a);
    } else {
      attend_cached<float>(pages, rows, added, tasks, l, a);
    }
  };
  blocks_forward(decode_, N, added.tokens.data(), added.positions.data(), true, attend_cache);
  // The positions whose logits are needed: those with a target, and the last one of each row.
  struct HeadRow {
    int64_t n;       // of the N tokens
    size_t row;      //
    size_t offset;   // in its row
    bool is_target;  //
    bool is_last;    //
  };
  std::vector<HeadRow> head_rows;
  for (size_t r = 0; r < rows.size(); r++) {
    const size_t tokens = rows[r].tokens.size(), targets = rows[r].targets.size();
    for (size_t t = 0; t < tokens; t++) {
      const bool is_target = t < targets, is_last = t + 1 == tokens;
      if (is_target || is_last) {
        head_rows.push_back({added.starts[r] + int64_t(t), r, t, is_target, is_last});
      }
    }
  }
  const auto M = int64_t(head_rows.size());
  std::vector<char> finite(head_rows.size());
  for (int64_t m = 0; m < M; m++) {
    std::copy_n(decode_.x + head_rows[size_t(m)].n * C, C, decode_.final_norm + m * C);
  }
  norm(int(M), table_.final_norm, decode_.final_norm, decode_.head_in, decode_.final_stats);
  const int64_t chunk = logit_rows(config_, decode_.capacity), ld = config_.padded_V();
  for (int64_t begin = 0; begin < M; begin += chunk) {
    const int64_t count = std::min(chunk, M - begin);
    Product p =
        forward_product(int(count), C, V, decode_.head_in + begin * C, nullptr, decode_.logits);
    p.b = matrix(table_.head, true), p.ldc = ld;
    gemm(p);
    parallel_groups(count, 1, [&](int64_t i) {
      const HeadRow& head = head_rows[size_t(begin + i)];
      const size_t r = head.row;
      const DecodeRow& row = rows[r];
      const float* x = decode_.logits + i * ld;
      const Sampling& sampling = row.sampling;
      const int vocab = sampling.vocab > 0 ? std::min(V, sampling.vocab) : V;
      thread_local std::vector<float> scratch;
      finite[size_t(begin + i)] = all_finite(V, x);
      if (!finite[size_t(begin + i)]) return;
      const bool scored = head.is_target || row.top >= 0 || row.want_distribution;
      const RowSoftmax softmax = scored ? row_softmax(V, x, 1) : RowSoftmax{};
      const auto score = [&](int id) -> TokenScore {
        return {softmax.logp(x[id], 1), likeliest(vocab, x, row.top, softmax),
                rank_of(vocab, x, id)};
      };
      if (head.is_target) result.target_scores[r][head.offset] = score(row.targets[head.offset]);
      if (!head.is_last) return;
      Distribution* distribution = row.want_distribution ? &result.distributions[r] : nullptr;
      if (distribution) {
        for (int j = 0; j < V; j++) distribution->logp.push_back(softmax.logp(x[j], 1));
        distribution->probability.resize(size_t(V));
      }
      const int id = sample_row(vocab, x, row, uint64_t(added.lengths[r]) + row.tokens.size(),
                                scratch, distribution);
      const float inverse = sampling.temperature > 0 ? 1 / sampling.temperature : 1;
      result.logp[r] =
          (scored && inverse == 1 ? softmax : row_softmax(V, x, inverse)).logp(x[id], inverse);
      if (row.top >= 0) result.scores[r] = score(id);
      result.ids[r] = id;
      if (want_logits) std::copy_n(x, V, result.logits.data() + int64_t(r) * V);
    });
  }
  for (size_t m = 0; m < head_rows.size(); m++) {
    if (!finite[m]) result.ids[head_rows[m].row] = -1;
  }
  expect_sampled(result, added);
  room.keep();
}

// =============================================================================================
// 5. Memory, tensors in and out, and what make_gpt checks

void Arena::reset(int64_t floats, bool huge_pages) {
  release();
  if (floats == 0) return;
  constexpr size_t kHugePage = size_t(2) << 20;
  bytes_ = size_t(floats) * sizeof(float);
  if (bytes_ > kHugePage / 8) bytes_ = (bytes_ + kHugePage - 1) / kHugePage * kHugePage;
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    bytes_ = 0;
    fail("out of memory: cannot reserve ", bytes_text(double(floats) * 4),
         "; lower the batch, the context or the model");
  }
  data_ = static_cast<float*>(p), size_ = floats;
  madvise(p, bytes_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}
void Arena::release() {
  if (data_) munmap(data_, bytes_);
  data_ = nullptr, bytes_ = 0, size_ = 0;
}

void Activations::reserve(const Config& c, int64_t N, Saved saved) {
  if (N <= capacity) return;
  capacity = 0;
  arena.reset(lay_out(c, N, saved, nullptr));
  lay_out(c, N, saved, arena.data());
  capacity = N;
}
int64_t Activations::lay_out(const Config& c, int64_t N, Saved saved, float* base) {
  int64_t used = 0;
  const auto allocate = [&](int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return p;
  };
  const int64_t up = c.has_gate() ? 2 * c.F : c.F, heads = int64_t(c.NH) * c.HS;
  const bool mean = c.has_biases();
  const auto stats = [&] { return NormStats{mean ? allocate(N) : nullptr, allocate(N)}; };
  layers.resize(size_t(c.L));
  for (int l = 0; l < c.L; l++) {
    LayerActivations& a = layers[size_t(l)];
    const bool light = saved == Saved::light && l > 0;  // norms and act of layer 0 serve all
    if (saved != Saved::all && !light && l > 0) {       // one layer's memory serves all
      a = layers[0];
      // Inputs that nobody needs again take turns in two places.
      const bool own = saved == Saved::layer_inputs || l == 1;
      a.x = own ? allocate(N * c.C) : layers[size_t(l) - 2].x;
      continue;
    }
    a.x = allocate(N * c.C);
    a.norm1 = light ? layers[0].norm1 : allocate(N * c.C);
    a.stats1 = stats();
    a.qkv = allocate(N * c.qkv());
    a.rotated = c.family == Family::qwen3 ? allocate(N * (c.NH + c.NKV) * c.HS) : nullptr;
    a.att = allocate(N * heads);
    a.lse = allocate(N * c.NH);
    a.mid = allocate(N * c.C);
    a.norm2 = light ? layers[0].norm2 : allocate(N * c.C);
    a.stats2 = stats();
    a.up = allocate(N * up);
    a.act = light ? layers[0].act : allocate(N * c.F);
  }
  x = allocate(N * c.C);
  final_norm = allocate(N * c.C);
  final_stats = stats();
  if (c.head == Head::lm) {
    head_in = allocate(N * c.C);
    logits = allocate(logit_rows(c, N) * c.padded_V());
  }
  if (saved != Saved::none) {
    dhead_in = allocate(N * c.C);
    dx = allocate(N * c.C);
    dnorm = allocate(N * std::max<int64_t>(c.C, heads));
    dqkv = allocate(N * c.qkv());
    dact = allocate(N * c.F);
    partials = allocate(norm_partials(N, std::max(c.C, c.HS)));
  }
  return used;
}

CpuGpt::CpuGpt(const Config& config, const GptOptions& options)
    : Gpt(config, options.muon, options.lora),
      train_(options.mode == Mode::train),
      saved_(saved_activations(options)),
      frozen_(table_.first_trainable()),
      rope_(config) {
  if (options.share) {
    const auto* other = dynamic_cast<const CpuGpt*>(options.share);
    if (!other) fail("share: the other model is on another device");
    weights_ = other->weights_;
    if (train_) fail("share: a model that trains needs weights of its own");
    if (!options.weights.empty() && options.weights != weights_->types) {
      fail("share: the other model keeps its weights in other types");
    }
  } else {
    check_weight_types(table_, options);
    weights_ = std::make_shared<Weights>(config, table_, options);
  }
  weight_types_ = weights_->types;
  if (train_) {
    gradients_.reset(table_.size);
    moment1_.reset(table_.size);
    moment2_.reset(table_.size);
  }
  if (options.batch_tokens > 0) a_.reserve(config, options.batch_tokens, saved_);
}

// Where the tensor's floats are, unless it is kept as panels.
float* CpuGpt::floats_of(const Tensor& t, Slot slot) const {
  if (slot == Slot::weight) return weight(t.offset);
  if (!train_) fail(t.name, ": an inference model has no gradients and no moments");
  return (slot == Slot::gradient  ? gradients_
          : slot == Slot::moment1 ? moment1_
                                  : moment2_)
             .data() +
         t.offset;
}
// visit(panels, row, i): the tensor's row i is this row of the panels. False: it is not in panels.
template <class Visit>
bool CpuGpt::visit_panel_rows(const Tensor& t, Slot slot, Visit&& visit) const {
  if (slot != Slot::weight || !weights_->panels_only) return false;
  const Weights::Group* g = weights_->group_of(t.offset);
  if (!g) return false;
  const int64_t begin = (t.offset - g->weight) / g->in;
  parallel_for(t.out, [&](int64_t o) { visit(weights_->panels_of(*g), begin + o, o); });
  return true;
}

void CpuGpt::read(int tensor, Slot slot, std::span<float> out) const {
  const Tensor& t = table_.tensors.at(size_t(tensor));
  if (int64_t(out.size()) != t.size()) {
    fail(t.name, ": found room for ", out.size(), " floats, expected ", t.size());
  }
  const bool panels = visit_panel_rows(t, slot, [&](const Panels& w, int64_t row, int64_t i) {
    read_row(w, t.in, row, out.data() + i * t.in);
  });
  if (!panels) std::copy_n(floats_of(t, slot), t.size(), out.data());
  if (slot == Slot::gradient && gradients_are_zero_) std::fill(out.begin(), out.end(), 0.f);
}

void CpuGpt::write(int tensor, Slot slot, std::span<const float> in) {
  const Tensor& t = table_.tensors.at(size_t(tensor));
  if (int64_t(in.size()) != t.size()) {
    fail(t.name, ": found ", in.size(), " floats, expected ", t.size());
  }
  if (slot == Slot::weight) weights_->panels_current = false;
  if (slot == Slot::gradient && gradients_are_zero_) {
    clear(gradients_.data(), gradients_.size());
    gradients_are_zero_ = false;
  }
  if (slot == Slot::weight && weight_type(tensor) == WeightType::q8_0 &&
      !all_finite(t.size(), in.data())) {
    fail(t.name, ": found a weight that is not finite, expected numbers, as q8_0 has no other");
  }
  const bool panels = visit_panel_rows(t, slot, [&](const Panels& w, int64_t row, int64_t i) {
    write_row(w, t.in, row, in.data() + i * t.in);
  });
  if (!panels) std::copy_n(in.data(), t.size(), floats_of(t, slot));
}

void CpuGpt::write_q8_0(int tensor, std::span<const Q8Block> blocks) {
  const Tensor& t = table_.tensors.at(size_t(tensor));
  if (weight_type(tensor) != WeightType::q8_0) {
    fail(t.name, ": found blocks of q8_0 for a matrix of another type");
  }
  const int64_t row_blocks = t.in / kQ8Block;
  if (int64_t(blocks.size()) != t.out * row_blocks) {
    fail(t.name, ": found ", blocks.size(), " blocks, expected ", t.out * row_blocks);
  }
  visit_panel_rows(t, Slot::weight, [&](const Panels& w, int64_t row, int64_t i) {
    write_blocks(w, t.in, row, blocks.data() + i * row_blocks);
  });
}

void set_threads(int threads) { omp_set_num_threads(threads > 0 ? threads : usable_cores()); }

// Bytes a process may still take: what the system has, or what the container's limit leaves.
static int64_t available_memory() {
  int64_t available = std::numeric_limits<int64_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %lld kB", &kib) == 1) available = kib * 1024;
  }
  int64_t limit = 0, used = 0, cached = 0;  // cached: files that the system drops when it must
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit &&
      std::ifstream("/sys/fs/cgroup/memory.current") >> used) {
    std::ifstream stat("/sys/fs/cgroup/memory.stat");
    int64_t bytes = 0;
    for (std::string key; stat >> key >> bytes;)
      if (key == "active_file" || key == "inactive_file") cached += bytes;
    available = std::min(available, std::max<int64_t>(0, limit - used + cached));
  }
  return available;
}

#ifdef CAKE_CUDA
static bool on_gpu(Device device) {  // `automatic`: where there is one that is no emulation
#ifdef CAKE_CUDA_ON_CPU
  return device == Device::cuda;
#else
  return device == Device::cuda || (device == Device::automatic && gpu::unavailable().empty());
#endif
}
#endif

MemoryPlan plan_memory(const Config& c, const GptOptions& options) {
#ifdef CAKE_CUDA
  if (on_gpu(options.device)) return gpu::plan_memory(c, options);
#endif
  const bool train = options.mode == Mode::train;
  const ParamTable table = make_table(c, options.muon, options.lora);
  check_weight_types(table, options);
  int64_t moments = 0;
  for (const Tensor& t : table.tensors)
    if (t.trainable) moments += t.size() * (t.muon ? 1 : 2);
  MemoryPlan plan;
  const char* model = "--depth, --layers, --channels";
  const auto groups = Weights::groups_of(c, table, options);
  if (!options.share && train) plan.items.push_back({"parameters", table.size * 4, model});
  if (!options.share && !train) {
    int64_t bytes[kWeightTypes] = {}, in_panels = 0;
    for (const Weights::Group& g : groups) {
      bytes[int(g.type)] += panels_bytes(g.type, g.out, g.in);
      in_panels += int64_t(g.out) * g.in;
    }
    bytes[int(WeightType::f32)] += (table.size - in_panels) * 4;
    for (const WeightType type :
         {WeightType::bf16, WeightType::f16, WeightType::q8_0, WeightType::f32}) {
      const char* name = kWeightTypeNames[int(type)];
      if (bytes[int(type)] > 0)
        plan.items.push_back({concat(plan.items.empty() ? "weights " : "", name), bytes[int(type)],
                              "--weights, or take a smaller model"});
    }
  }
  if (train) {
    plan.items.push_back({"gradients", table.trainable_parameters() * 4, model});
    plan.items.push_back({"optimizer state", moments * 4, model});
  }
  Activations layout;
  if (options.batch_tokens > 0) {
    const Saved saved = saved_activations(options);
    plan.items.push_back(
        {"activations", layout.lay_out(c, options.batch_tokens, saved, nullptr) * 4,
         saved != Saved::layer_inputs ? kBatchFlags : "--micro-batch-tokens, --context"});
  }
  if (const DecodePlan& d = options.decode; d.rows > 0) {
    int64_t panels = 0;
    for (const Weights::Group& g : groups) panels += panels_bytes(g.type, g.out, g.in);
    if (train) plan.items.push_back({"panels", panels, model});
    const int tokens = std::max(d.rows, d.tokens > 0 ? d.tokens : kPrefillTokens);
    const int64_t decoding = layout.lay_out(c, tokens, Saved::none, nullptr);
    plan.items.push_back({"decoding", decoding * 4, kDecodeFlags});
    plan.items.push_back({"KV cache",
                          CpuKvCache::pages_of(d.positions) * CpuKvCache::page_bytes(c, d.cache),
                          kDecodeFlags});
  }
  return plan;
}

Device find_device(Device device) {
#ifdef CAKE_CUDA
  if (on_gpu(device)) return Device::cuda;
#endif
  return device == Device::automatic ? Device::cpu : device;
}

int64_t cache_page_bytes(const Config& c, const GptOptions& options) {
#ifdef CAKE_CUDA
  if (on_gpu(options.device)) return gpu::cache_page_bytes(c, options);
#endif
  return CpuKvCache::page_bytes(c, options.decode.cache);
}

int64_t free_memory([[maybe_unused]] Device device) {
#ifdef CAKE_CUDA
  if (on_gpu(device)) return gpu::free_memory();
#endif
  return available_memory();
}

int64_t memory_beside_model(const Config& c, const GptOptions& options) {
  GptOptions others = options;
  others.decode.positions = 0;
  return std::max<int64_t>(0, free_memory(options.device) - plan_memory(c, others).total());
}

void check_device(Device device, Precision precision) {
#ifdef CAKE_CUDA
  if (device == Device::cuda) {
    if (const std::string why = gpu::unavailable(); !why.empty()) fail("--device cuda: ", why);
  }
  if (on_gpu(device)) return;
#else
  if (device == Device::cuda) {
    fail("--device cuda: this build has the CPU engine alone, expected --device cpu or auto");
  }
#endif
  if (precision == Precision::bf16) {
    fail("--precision bf16: the CPU engine computes in f32, expected f32 or auto");
  }
}

std::unique_ptr<Gpt> make_gpt(const Config& config, const GptOptions& options) {
  check_device(options.device, options.precision);
  config.check("model");
#ifdef CAKE_CUDA
  if (on_gpu(options.device)) return gpu::make_gpt(config, options);
#endif
  const MemoryPlan plan = plan_memory(config, options);
  const int64_t available = available_memory();
  if (plan.total() > available) {
    fail("out of memory: the plan takes ", bytes_text(double(plan.total())), " (", plan.text(),
         "), found ", bytes_text(double(available)), " available; lower ", plan.largest().lower);
  }
  return std::make_unique<CpuGpt>(config, options);
}

// Additions and multiplications a second that this machine's cores reach with nothing but
// multiply-adds in registers. Takes about .3 s.
static double measure_cpu_peak() {
  double best = 0;
  for (int repetition = 0; repetition < 5; repetition++) {
    constexpr int64_t kSteps = 4'000'000;
    constexpr int kChains = 12;  // enough to hide the latency of two units
    float sink = 0;
    const double start = now();
#pragma omp parallel reduction(+ : sink)
    {
      vec acc[kChains];
      for (int j = 0; j < kChains; j++) acc[j] = splat(float(j));
      const vec x = splat(.999f + 1e-6f * float(repetition)), y = splat(1e-3f);
      for (int64_t i = 0; i < kSteps; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < kChains; j++) acc[j] = fused(acc[j], x, y);
      }
      for (const vec& a : acc) sink += sum_lanes(a);
    }
    if (sink == -1) std::printf(" ");  // the sum is used: the loop stays
    const double seconds = now() - start;
    best = std::max(best, 2. * kLanes * kChains * kSteps * omp_get_max_threads() / seconds);
  }
  return best;
}

double measure_peak(const Gpt& gpt) {
#ifdef CAKE_CUDA
  if (!dynamic_cast<const CpuGpt*>(&gpt)) return gpu::measure_peak(gpt);
#endif
  (void)gpt;
  return measure_cpu_peak();
}

// Operations of forward and backward on a batch: 6 a parameter that takes part in products and
// token, 4 a frozen one, and 6 L NH HS a token and position of its document: half of PaLM's count
// (appendix B), because attention is causal. llm.c counts the same.
double training_operations(const Gpt& gpt, std::span<const int> doc_starts) {
  const Config& c = gpt.config();
  double tokens = 0, squares = 0;
  for (size_t d = 0; d + 1 < doc_starts.size(); d++) {
    const double length = doc_starts[d + 1] - doc_starts[d];
    tokens += length, squares += length * length;
  }
  const ParamTable& table = gpt.table();
  const double trained =
      6 * double(table.lora.rank > 0 ? table.trainable_parameters() : table.matmul_parameters());
  const double frozen = table.lora.rank > 0 ? 4 * double(table.matmul_parameters()) : 0;
  return (trained + frozen) * tokens + 6. * c.L * c.NH * c.HS * squares;
}

// =============================================================================================
// 6. Only to be fast: threads that stay awake, and products

// A step of decoding runs some hundred short loops. Between them the threads of a team wait awake:
// a loop then costs .4 us, where an OpenMP region costs 1.2 us. A thread that waited for long
// sleeps, so that other programs' threads run.
class Team {
 public:
  explicit Team(int threads) : threads_(threads), left_(threads - 1) {}
  int threads() const { return threads_; }
  void run(int threads, void (*work)(void*, int), void* argument) noexcept {
    work_ = work, argument_ = argument, busy_ = threads;
    left_.store(threads_ - 1, std::memory_order_relaxed);
    start_.fetch_add(1, std::memory_order_release);
    start_.notify_all();
    if (work) work(argument, 0);
    for (int left; (left = left_.load(std::memory_order_acquire)) != 0;) wait(left_, left);
  }
  void finish() noexcept { run(threads_, nullptr, nullptr); }
  void follow(int thread) noexcept {  // what all but thread 0 do
    for (unsigned begun = 0;;) {
      while (start_.load(std::memory_order_acquire) == begun) wait(start_, begun);
      begun++;
      const auto work = work_;  // the next loop's may stand there once this thread is counted out
      if (work && thread < busy_) work(argument_, thread);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
      if (!work) return;
    }
  }
  static inline thread_local Team* current = nullptr;  // of the thread that runs with_team's body

 private:
  // Until `x` is no longer `value`; may return before.
  template <class T>
  static void wait(const std::atomic<T>& x, T value) noexcept {
    for (int spin = 0; spin < 1000; spin++) {
      if (x.load(std::memory_order_acquire) != value) return;
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    x.wait(value, std::memory_order_acquire);
  }
  const int threads_;
  void (*work_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  int busy_ = 0;
  alignas(64) std::atomic<unsigned> start_{0};  // loops begun
  alignas(64) std::atomic<int> left_;           // threads that are not through with the last one
};

static int loop_threads() {
  if (LoopObserver::current) return LoopObserver::current->threads();
  return Team::current ? Team::current->threads() : omp_get_max_threads();
}

static void run_threads(int threads, void (*work)(void*, int), void* argument) {
  if (Team* team = Team::current) return team->run(threads, work, argument);
#pragma omp parallel num_threads(threads)
  for (int t = omp_get_thread_num(); t < threads; t += omp_get_num_threads()) work(argument, t);
}

static void with_team(const std::function<void()>& body) {
  if (LoopObserver::current || Team::current || omp_get_max_threads() == 1 || omp_in_parallel())
    return body();
  std::exception_ptr failure;
  std::unique_ptr<Team> team;
#pragma omp parallel
  {
#pragma omp single
    team = std::make_unique<Team>(omp_get_num_threads());
    if (omp_get_thread_num() > 0) {
      team->follow(omp_get_thread_num());
    } else {
      Team::current = team.get();
      try {
        body();
      } catch (...) {
        failure = std::current_exception();
      }
      Team::current = nullptr;
      team->finish();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// In-register transposition of a kLanes x kLanes block: log2(kLanes) rounds of interleaving row i
// with row i + kLanes / 2.
template <int... I>
static inline vec interleave_low(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * kLanes)...);
}
template <int... I>
static inline vec interleave_high(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + (I % 2) * kLanes)...);
}
static inline __attribute__((always_inline)) void transpose(vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) rows[i] = next[i];
  }
}

// ---------------------------------------------------------------------------------------------
// GEMM: C (M, N) = init + A (M, K) B (K, N)
//
// B is packed in panels of kNR columns, [k][kNR]; A in panels of kMR rows, [k][kMR]. A tile of
// kMR x kNR outputs lives in registers while k runs over a block of kKC; between blocks it rests in
// C, so that each output is one chain over k from 0 to K: its bits depend on nothing else. A
// B panel (48 KiB) is packed right before all A panels use it and stays in the second-level cache.
// Threads own rectangles of C and pack for themselves: no barriers.

inline constexpr int kKC = 384;                // depth of a packed block
inline constexpr int kBlock = 80 * kMR * kKC;  // elements of A at work at a time: most of the cache

// R x NV vectors of C advance over K steps: acc[r][v] += a(r, k) b(k, v).
template <int R, int NV, class B>
static inline __attribute__((always_inline)) void tile(int K, const float* a, int64_t a_row,
                                                       int64_t a_k, const B* b, int64_t ldb,
                                                       vec (&acc)[R][NV]) {
  for (int k = 0; k < K; k++) {
    vec bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) bv[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec x = splat(a[r * a_row + k * a_k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[r][v] = fused(x, bv[v], acc[r][v]);
    }
  }
}

// One R x kNR tile of C over a block of k, from packed panels. Only `columns` of it are there at
// the right edge (not Whole). Each loop is unrolled, so that the tile never leaves the registers.
template <int R, bool Whole>
static void block_tile(int K, const float* a, int64_t a_row, int64_t a_k, const float* b, float* c,
                       int64_t ldc, int columns, const float* start, int64_t start_ld,
                       const float* bias) {
  const auto width = [&](int v) {
    return Whole ? kLanes : std::clamp(columns - v * kLanes, 0, kLanes);
  };
  vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      acc[r][v] = start ? load(start + r * start_ld + v * kLanes, width(v)) : vec{};
      if (bias) acc[r][v] += load(bias + v * kLanes, width(v));
    }
  }
  if (a_k == 1) {
    tile<R, 2>(K, a, a_row, 1, b, kNR, acc);
  } else {
    tile<R, 2>(K, a, 1, kMR, b, kNR, acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) store(c + r * ldc + v * kLanes, acc[r][v], width(v));
  }
}

using BlockTile = void (*)(int, const float*, int64_t, int64_t, const float*, float*, int64_t, int,
                           const float*, int64_t, const float*);
template <bool Whole, int... R>
static constexpr std::array<BlockTile, kMR> block_tiles(std::integer_sequence<int, R...>) {
  return {block_tile<R + 1, Whole>...};
}
template <bool Whole>
inline constexpr auto kBlockTiles = block_tiles<Whole>(std::make_integer_sequence<int, kMR>{});

template <int Width>
static void pack_panel(const Operand& x, const float* data, int count, int K, float* panel) {
  if (x.inner == Inner::other) {
    // Whole vectors: what the last one holds beyond the line, the next step overwrites.
    const int whole = count == Width ? (Width % kLanes == 0 ? K : K - 1) : 0;
    for (int k = 0; k < whole; k++) {
      __builtin_prefetch(data + (k + kPrefetchSteps) * x.ld);
      for (int i = 0; i < Width; i += kLanes)
        store(panel + k * Width + i, load(data + k * x.ld + i));
    }
    for (int k = whole; k < K; k++)
      for (int i = 0; i < Width; i++) panel[k * Width + i] = i < count ? data[k * x.ld + i] : 0.f;
    return;
  }
  // Blocks of kLanes lines x kLanes steps, transposed in registers. A block narrower than kLanes
  // stores whole vectors too: what it writes beyond its lines, the next step overwrites.
  for (int line = 0; line < Width; line += kLanes) {
    int k = 0;
    for (; k + kLanes <= K; k += kLanes) {
      vec rows[kLanes];
      if (line + kLanes <= count) {
        for (int i = 0; i < kLanes; i++) rows[i] = load(data + (line + i) * x.ld + k);
      } else {
        for (int i = 0; i < kLanes; i++)
          rows[i] = line + i < count ? load(data + (line + i) * x.ld + k) : vec{};
      }
      transpose(rows);
      for (int i = 0; i < kLanes; i++) {
        if constexpr (Width % kLanes == 0 || Width < kLanes) {
          store(panel + (k + i) * Width + line, rows[i]);
        } else {
          store(panel + (k + i) * Width + line, rows[i], std::min(kLanes, Width - line));
        }
      }
    }
    for (; k < K; k++)
      for (int i = line; i < std::min(Width, line + kLanes); i++)
        panel[k * Width + i] = i < count ? data[i * x.ld + k] : 0.f;
  }
}

// ---------------------------------------------------------------------------------------------
// Panels. A step of f32 or f16 holds its kNR outputs in order. A step of bf16 holds kLanes words of
// 32 bits: output i in the lower half of word i, output kLanes + i in the upper half, so that one
// shift and one mask make two vectors of float. 32 steps of q8_0 are 8 times [kNR][4], four steps
// of an output side by side as one instruction multiplies them, and then kNR scales in f16.

// What turns a weight of q8_0 into its byte: VNNI multiplies unsigned bytes with signed ones, and
// has w + 128.
#if defined(__AVX512VNNI__) || (!defined(__AVX512F__) && defined(__AVXVNNI__))
inline constexpr int kQ8Offset = 128;
#else
inline constexpr int kQ8Offset = 0;
#endif
inline constexpr int64_t kQ8Bytes = int64_t(sizeof(Q8Block)) * kNR;  // of 32 steps

static int64_t panel_bytes(WeightType type, int in) {
  if (type == WeightType::q8_0) return in / kQ8Block * kQ8Bytes;
  return int64_t(kNR) * in * (type == WeightType::f32 ? 4 : 2);
}
// Where weight k of output `lane` of a panel of two-byte weights is.
static int64_t half_index(WeightType type, int k, int lane) {
  const int place = type == WeightType::bf16 ? lane % kLanes * 2 + lane / kLanes : lane;
  return int64_t(k) * kNR + place;
}
// The same in 32 steps of q8_0, in bytes.
static int64_t q8_index(int k, int lane) { return k / 4 * int64_t(kNR) * 4 + lane * 4 + k % 4; }
static Q8Block read_block(const std::byte* steps, int lane) {
  Q8Block block;
  for (int k = 0; k < kQ8Block; k++) block.q[k] = int8_t(int(steps[q8_index(k, lane)]) - kQ8Offset);
  std::memcpy(&block.d, steps + kNR * kQ8Block + lane * 2, 2);
  return block;
}
static void write_block(std::byte* steps, int lane, const Q8Block& block) {
  for (int k = 0; k < kQ8Block; k++) steps[q8_index(k, lane)] = std::byte(block.q[k] + kQ8Offset);
  std::memcpy(steps + kNR * kQ8Block + lane * 2, &block.d, 2);
}
static void read_row(const Panels& w, int in, int64_t row, float* x) {
  const std::byte* panel = w.data + row / kNR * panel_bytes(w.type, in);
  const int lane = int(row % kNR);
  if (w.type == WeightType::q8_0) {
    for (int k = 0; k < in; k += kQ8Block, panel += kQ8Bytes)
      dequantize_q8_0(read_block(panel, lane), x + k);
  } else if (w.type == WeightType::f32) {
    for (int k = 0; k < in; k++)
      x[k] = reinterpret_cast<const float*>(panel)[int64_t(k) * kNR + lane];
  } else {
    for (int k = 0; k < in; k++) {
      const uint16_t h = reinterpret_cast<const uint16_t*>(panel)[half_index(w.type, k, lane)];
      x[k] = w.type == WeightType::bf16 ? bf16_to_float(h) : f16_to_float(h);
    }
  }
}
static void write_row(const Panels& w, int in, int64_t row, const float* x) {
  std::byte* panel = w.data + row / kNR * panel_bytes(w.type, in);
  const int lane = int(row % kNR);
  if (w.type == WeightType::q8_0) {
    for (int k = 0; k < in; k += kQ8Block, panel += kQ8Bytes)
      write_block(panel, lane, quantize_q8_0(x + k));
  } else if (w.type == WeightType::f32) {
    for (int k = 0; k < in; k++) reinterpret_cast<float*>(panel)[int64_t(k) * kNR + lane] = x[k];
  } else {
    for (int k = 0; k < in; k++)
      reinterpret_cast<uint16_t*>(panel)[half_index(w.type, k, lane)] =
          w.type == WeightType::bf16 ? float_to_bf16(x[k]) : float_to_f16(x[k]);
  }
}
static void write_blocks(const Panels& w, int in, int64_t row, const Q8Block* blocks) {
  std::byte* panel = w.data + row / kNR * panel_bytes(w.type, in);
  for (int b = 0; b < in / kQ8Block; b++)
    write_block(panel + b * kQ8Bytes, int(row % kNR), blocks[b]);
}

typedef uint16_t half_vec __attribute__((vector_size(2 * kLanes)));

static inline vec widen_f16(const std::byte* p) {  // kLanes numbers, exactly
  half_vec h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return vec(_mm512_maskz_cvtph_ps(0xffff, __m256i(h)));  // as in vsqrt
#elif defined(__FMA__) && defined(__F16C__)
  return vec(_mm256_cvtph_ps(__m128i(h)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vec(vcvt_f32_f16(float16x4_t(h)));
#else  // f16_to_float
  const ivec x = __builtin_convertvector(h, ivec);
  ivec bits = (x & 0x7fff) << 13;
  vec y;
  std::memcpy(&y, &bits, sizeof y);
  y *= 0x1p112f;
  std::memcpy(&bits, &y, sizeof y);
  bits |= (x & 0x8000) << 16;
  bits |= (x & 0x7c00) == 0x7c00 ? ivec{} + 0x7f800000 : ivec{};
  std::memcpy(&y, &bits, sizeof y);
  return y;
#endif
}
// Step k of a panel as float.
template <WeightType Type>
static inline __attribute__((always_inline)) void load_step(const std::byte* panel, int64_t k,
                                                            vec& low, vec& high) {
  if constexpr (Type == WeightType::f32) {
    const auto* p = reinterpret_cast<const float*>(panel) + k * kNR;
    low = load(p), high = load(p + kLanes);
  } else if constexpr (Type == WeightType::bf16) {
    ivec words;
    std::memcpy(&words, panel + k * kNR * 2, sizeof words);
    const ivec shifted = words << 16, masked = words & int32_t(0xffff0000);
    std::memcpy(&low, &shifted, sizeof low);
    std::memcpy(&high, &masked, sizeof high);
  } else {
    low = widen_f16(panel + k * kNR * 2), high = widen_f16(panel + k * kNR * 2 + kLanes * 2);
  }
}
// `depth` steps as f32, [depth][kNR].
template <WeightType Type>
static void widen_steps(const std::byte* panel, int depth, float* steps) {
  for (int k = 0; k < depth; k++) {
    vec low, high;
    load_step<Type>(panel, k, low, high);
    store(steps + k * kNR, low), store(steps + k * kNR + kLanes, high);
  }
}
static void pack_weights(const float* weight, int out, int in, std::byte* panels) {
  parallel_for((out + kNR - 1) / kNR, [&](int64_t panel) {
    const int64_t begin = panel * kNR;
    const Operand w{weight + begin * in, in, Inner::k};
    pack_panel<kNR>(w, w.data, int(std::min<int64_t>(kNR, out - begin)), in,
                    reinterpret_cast<float*>(panels) + begin * in);
  });
}

// The start of a tile's chains, and its place in C. A tile is R rows of V / 2 panels, `distance`
// columns apart; columns from `end` on, the edge of the matrix, are not there.
static inline int tile_column(int n, int distance, int v) {
  return n + v / 2 * distance + v % 2 * kLanes;
}
template <int R, int V>
static inline __attribute__((always_inline)) void begin_tile(const Product& p, int m, int n,
                                                             int distance, int end,
                                                             vec (&acc)[R][V]) {
  const float* start = p.accumulate ? p.c : p.residual;
#pragma GCC unroll 8  // so that the tile never leaves the registers
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int column = tile_column(n, distance, v), width = std::clamp(end - column, 0, kLanes);
      acc[r][v] = start ? load(start + (m + r) * p.ldc + column, width) : vec{};
      if (p.bias) acc[r][v] += load(p.bias + column, width);
    }
  }
}
template <int R, int V>
static inline __attribute__((always_inline)) void end_tile(const Product& p, int m, int n,
                                                           int distance, int end,
                                                           const vec (&acc)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int column = tile_column(n, distance, v);
      store(p.c + (m + r) * p.ldc + column, acc[r][v], std::clamp(end - column, 0, kLanes));
    }
  }
}

// Few rows: decoding reads every weight once, so this is to read them at the memory's speed and to
// compute meanwhile. A thread's panels are S runs of neighbours, which advance side by side: S
// streams of memory, since one alone does not fill the lines that a core may have under way.
//
// One row keeps the sums of its streams in registers; the hardware sees what comes next. More rows
// take kStreamSteps of each stream in turn, by tiles of equal heights up to kMR, whose sums rest in
// the first-level cache meanwhile. While tiles are computed the hardware fetches nothing by itself,
// so that each tile asks for its share of the next turn's lines, one by one: a processor drops what
// is asked for in a burst. Measured on one core of a Zen 3, 8 rows of f32: 2.1 times as fast as
// asking for a share at the begin of each tile.
inline constexpr int kFewRows = 24;
inline constexpr int kStreamSteps = 64;
// On Zen 5 one stream that asks ahead was measured to be faster, for one row, than several.
inline constexpr int kRowStreams = kLanes == 16 ? 1 : 4;
inline constexpr int kStreamAhead = 6144;  // bytes

// Keeps a vector in a register that many multiply-adds read: left to itself, a compiler loads it
// for each of them, and the loads are more than a core has units for.
static inline __attribute__((always_inline)) void hold(vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  (void)v;
#endif
}

// Calls visit(n, distance, S) with panels of [n0, n1) that stand side by side: at n, n + distance,
// ..., S of them but for the last call.
template <int S, class Visit>
static void for_streams(int n0, int n1, Visit&& visit) {
  const int panels = (n1 - n0 + kNR - 1) / kNR, run = panels / S, left = panels % S;
  for (int i = 0; i < run; i++) visit(n0 + i * kNR, run * kNR, S);
  if (left > 0) visit(n0 + S * run * kNR, kNR, left);
}

template <WeightType Type, int P>
static void stream_row(const Product& p, int m, int n, int distance, int end) {
  vec acc[1][2 * P];
  begin_tile(p, m, n, distance, end, acc);
  const int64_t panel = panel_bytes(Type, p.K), step = panel_bytes(Type, 1);
  const std::byte* panels = p.b.panels.data + n / kNR * panel;
  const int64_t stride = distance / kNR * panel;
  const float* a = p.a.data + m * p.a.ld;
  for (int k = 0; k < p.K; k++) {
    const vec x = splat(a[k]);
#pragma GCC unroll 4
    for (int j = 0; j < P; j++) {
      const std::byte* steps = panels + j * stride;
      if (kRowStreams == 1)
        for (int i = 0; i < step; i += 64) __builtin_prefetch(steps + k * step + kStreamAhead + i);
      vec low, high;
      load_step<Type>(steps, k, low, high);
      acc[0][2 * j] = fused(x, low, acc[0][2 * j]);
      acc[0][2 * j + 1] = fused(x, high, acc[0][2 * j + 1]);
    }
  }
  end_tile(p, m, n, distance, end, acc);
}

// Steps of P panels in which each of T tiles asks for a line of each of S streams.
template <WeightType Type, int S, int T, int P>
inline constexpr int steps_per_line = std::max(1,
                                               S* T * 64 /
                                                   (P * kNR * (Type == WeightType::f32 ? 4 : 2)));

// A tile of R rows advances over `depth` steps of P panels, `stride` bytes apart; a (R, lda), sums
// (P, R, kNR) with `sums_stride` floats between panels. It asks for one T-th of as many bytes of
// each of S streams, which begin at `ahead`, `stride` bytes apart.
template <WeightType Type, int S, int T, int P, int R>
static void stream_tile(int depth, const float* a, int64_t lda, const std::byte* steps, float* sums,
                        int sums_stride, const std::byte* ahead, int64_t stride) {
  vec acc[P][R][2];
#pragma GCC unroll 2
  for (int j = 0; j < P; j++) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float* sum = sums + j * sums_stride + r * kNR;
      acc[j][r][0] = load(sum), acc[j][r][1] = load(sum + kLanes);
    }
  }
  const auto advance = [&](int k) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int j = 0; j < P; j++) {
      vec low, high;
      load_step<Type>(steps + j * stride, k, low, high);
      hold(low), hold(high);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vec x = splat(a[r * lda + k]);
        acc[j][r][0] = fused(x, low, acc[j][r][0]);
        acc[j][r][1] = fused(x, high, acc[j][r][1]);
      }
    }
  };
  int k = 0;
  constexpr int kGroup = steps_per_line<Type, S, T, P>;
  for (; k + kGroup <= depth; k += kGroup, ahead += 64) {
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; i++) {
#pragma GCC unroll 4
      for (int s = 0; s < S; s++)
        if (s * kGroup / S == i) __builtin_prefetch(ahead + s * stride);
      advance(k + i);
    }
  }
  for (; k < depth; k++) advance(k);
#pragma GCC unroll 2
  for (int j = 0; j < P; j++) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float* sum = sums + j * sums_stride + r * kNR;
      store(sum, acc[j][r][0]), store(sum + kLanes, acc[j][r][1]);
    }
  }
}
using StreamTile = void (*)(int, const float*, int64_t, const std::byte*, float*, int,
                            const std::byte*, int64_t);
template <WeightType Type, int S, int T, int... R>
static constexpr std::array<StreamTile, kMR> stream_tiles(std::integer_sequence<int, R...>) {
  return {stream_tile<Type, S, T, 1, R + 1>...};
}
template <WeightType Type, int S, int T>
inline constexpr auto kStreamTiles =
    stream_tiles<Type, S, T>(std::make_integer_sequence<int, kMR>{});

// Rows [m0, m1) and up to S panels. T is the number of tiles that ask for a turn's lines.
template <WeightType Type, int S, int T>
static void stream_panels(const Product& p, int m0, int m1, int n, int distance, int streams,
                          int end) {
  alignas(64) float sums[S * kFewRows * kNR];  // (streams, M, kNR)
  const int M = m1 - m0, tiles = (M + kMR - 1) / kMR;
  const auto sums_of = [&](int s, int m) { return sums + (s * M + m) * kNR; };
  vec acc[1][2];
  for (int s = 0; s < streams; s++)
    for (int m = 0; m < M; m++) {
      begin_tile(p, m0 + m, n + s * distance, kNR, end, acc);
      store(sums_of(s, m), acc[0][0]), store(sums_of(s, m) + kLanes, acc[0][1]);
    }
  const int64_t panel = panel_bytes(Type, p.K), step = panel_bytes(Type, 1);
  const std::byte* panels = p.b.panels.data + n / kNR * panel;
  const int64_t stride = distance / kNR * panel;
  for (int k0 = 0; k0 < p.K; k0 += kStreamSteps) {
    const int depth = std::min(kStreamSteps, p.K - k0);
    const std::byte* ahead = panels + (k0 + kStreamSteps) * step;
    for (int s = 0; s < streams;) {
      // Two rows of one panel have too few chains to keep pace with weights of two bytes.
      const bool two = Type != WeightType::f32 && M == 2 && s + 1 < streams;
      for (int t = 0; t < tiles; t++) {
        const int m = M * t / tiles, rows = M * (t + 1) / tiles - m;
        const StreamTile tile =
            two ? stream_tile<Type, S, T, 2, 2> : kStreamTiles<Type, S, T>[size_t(rows - 1)];
        tile(depth, p.a.data + (m0 + m) * p.a.ld + k0, p.a.ld, panels + s * stride + k0 * step,
             sums_of(s, m), M * kNR, ahead, stride);
        if (t >= T) continue;
        ahead += 64 * (two ? depth / steps_per_line<Type, S, T, 2>
                           : depth / steps_per_line<Type, S, T, 1>);
      }
      s += two ? 2 : 1;
    }
  }
  for (int s = 0; s < streams; s++)
    for (int m = 0; m < M; m++) {
      acc[0][0] = load(sums_of(s, m)), acc[0][1] = load(sums_of(s, m) + kLanes);
      end_tile(p, m0 + m, n + s * distance, kNR, end, acc);
    }
}

template <WeightType Type, int S, int T>
static void stream_rows(const Product& p, int m0, int m1, int n0, int n1) {
  for_streams<S>(n0, n1, [&](int n, int distance, int streams) {
    stream_panels<Type, S, T>(p, m0, m1, n, distance, streams, n1);
  });
}
// As gemm_rectangle, up to kFewRows rows.
template <WeightType Type>
static void few_rows(const Product& p, int m0, int m1, int n0, int n1) {
  if (m1 - m0 == 1) {
    for_streams<kRowStreams>(n0, n1, [&](int n, int distance, int streams) {
      if (streams == kRowStreams) return stream_row<Type, kRowStreams>(p, m0, n, distance, n1);
      for (int s = 0; s < streams; s++) stream_row<Type, 1>(p, m0, n + s * kNR, kNR, n1);
    });
    return;
  }
  // Two turns of the streams and the rows fit the first-level cache.
  if (m1 - m0 <= 4) return stream_rows<Type, 4, 1>(p, m0, m1, n0, n1);
  if (m1 - m0 <= kMR) return stream_rows<Type, 2, 1>(p, m0, m1, n0, n1);
  stream_rows<Type, 2, 2>(p, m0, m1, n0, n1);
}
// Calls work(constant) with the panels' type, one of those that are summed in float.
template <class Work>
static void with_float_type(WeightType type, Work&& work) {
  using enum WeightType;
  if (type == bf16) return work(std::integral_constant<WeightType, bf16>{});
  if (type == f16) return work(std::integral_constant<WeightType, f16>{});
  return work(std::integral_constant<WeightType, f32>{});
}

// ---------------------------------------------------------------------------------------------
// Products with q8_0 (plain::linear_forward_q8_0 defines them). A row of activations is quantized
// once, by the rule of quantize_q8_0. The sum over a block of 32 is an integer, which is exact in
// whatever order it is made; each output adds its blocks in order, as one chain of fused
// multiply-adds: acc = fma(sum, d_w d_x, acc). So the bits do not depend on the tile, and are the
// same with VNNI, AVX2, NEON and in plain code. Decoding reads a quarter of the bytes of f32.

struct QuantizedRows {
  std::vector<int8_t> q;       // (M, K)
  std::vector<float> d;        // (M, K / 32)
  std::vector<int32_t> start;  // (M, K / 32) of the block sums: -kQ8Offset times the sum of q
};

// A block x (32) with its scale and start. What is not finite has a scale of NaN, which all outputs
// of the row get.
static void quantize_block(const float* x, int8_t* q, float& scale, int32_t& start) {
  typedef int8_t byte_vec __attribute__((vector_size(kLanes)));
  vec top{}, zeros{};  // x - x is 0, and NaN where x is not finite
  for (int i = 0; i < kQ8Block; i += kLanes) {
    const vec v = load(x + i);
    top = vmax(top, vmax(v, -v)), zeros += v - v;
  }
  start = 0;
  if (sum_lanes(zeros) != 0) {
    scale = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(q, kQ8Block, 0);
    return;
  }
  const float d = max_lanes(top) / 127, inverse = q8_0_inverse(d);
  ivec sum{};
  for (int i = 0; i < kQ8Block; i += kLanes) {
    // round(x / d), halves away from zero: truncates after adding the number below .5 with x's
    // sign. The product is rounded by itself: fused() keeps it out of the addition.
    const vec v = load(x + i), quotient = fused(v, splat(inverse), vec{});
    const vec half = v < vec{} ? splat(-.49999997f) : splat(.49999997f);
    const ivec rounded = __builtin_convertvector(quotient + half, ivec);
    sum += rounded;
    const byte_vec bytes = __builtin_convertvector(rounded, byte_vec);
    std::memcpy(q + i, &bytes, sizeof bytes);
  }
  scale = f16_to_float(float_to_f16(d));
  for (int i = 0; i < kLanes; i++) start -= kQ8Offset * sum[i];
}

// The operand A of a product, whose rows are contiguous.
static const QuantizedRows& quantize_rows(const Product& p) {
  static thread_local QuantizedRows rows;
  const int64_t blocks = p.K / kQ8Block;
  if (int64_t(rows.q.size()) < p.M * int64_t(p.K)) {
    rows.q.resize(size_t(p.M) * size_t(p.K));
    rows.d.resize(size_t(p.M * blocks)), rows.start.resize(size_t(p.M * blocks));
  }
  QuantizedRows& made = rows;  // the calling thread's, in every thread
  const auto quantize = [&](int64_t m) {
    for (int64_t b = 0; b < blocks; b++) {
      const size_t block = size_t(m * blocks + b);
      quantize_block(p.a.data + m * p.a.ld + b * kQ8Block, &made.q[block * kQ8Block], made.d[block],
                     made.start[block]);
    }
  };
  if (p.M <= 4) {
    for (int m = 0; m < p.M; m++) quantize(m);
  } else {
    parallel_for(p.M, quantize);
  }
  return made;
}

// acc + the products of four weights of each lane with four activations, exactly. Weights reach
// from -128 to 127, activations from -127 to 127.
static inline ivec dot4(ivec acc, ivec weights, int32_t activations) {
#if defined(__AVX512VNNI__)
  return ivec(_mm512_dpbusd_epi32(__m512i(acc), __m512i(weights), _mm512_set1_epi32(activations)));
#elif defined(__AVX512F__) && defined(__AVX512BW__)
  // Unsigned by signed bytes: |w| and x with w's sign. Sums of two stay below 2 128 127 < 2^15.
  const __m512i w = __m512i(weights), x = _mm512_set1_epi32(activations);
  const __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), __m512i{}, x);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
  return acc + ivec(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
  return ivec(
      _mm256_dpbusd_avx_epi32(__m256i(acc), __m256i(weights), _mm256_set1_epi32(activations)));
#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)
  const __m256i w = __m256i(weights), x = _mm256_set1_epi32(activations);  // as above
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return acc + ivec(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return ivec(vdotq_s32(int32x4_t(acc), int8x16_t(weights),
                        vreinterpretq_s8_s32(vdupq_n_s32(activations))));
#else
  for (int i = 0; i < 32; i += 8)
    acc += (weights << (24 - i) >> 24) * int32_t(int8_t(activations >> i));
  return acc;
#endif
}

// R rows and P panels, `distance` columns apart.
template <int R, int P>
static void q8_tile(const Product& p, const QuantizedRows& x, int m, int n, int distance, int end) {
  vec acc[R][2 * P];
  begin_tile(p, m, n, distance, end, acc);
  const int64_t panel = panel_bytes(WeightType::q8_0, p.K), blocks = p.K / kQ8Block;
  const std::byte* steps = p.b.panels.data + n / kNR * panel;
  const int64_t stride = distance / kNR * panel;
  const int8_t* q = x.q.data() + int64_t(m) * p.K;
  const float* d = x.d.data() + m * blocks;
  const int32_t* start = x.start.data() + m * blocks;
  for (int64_t b = 0; b < blocks; b++, steps += kQ8Bytes) {
    if (P == 1)
      for (int i = 0; i < kQ8Bytes; i += 64) __builtin_prefetch(steps + kStreamAhead + i);
    ivec sum[R][2 * P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < 2 * P; v++)
        sum[r][v] = kQ8Offset ? ivec{} + start[r * blocks + b] : ivec{};
#pragma GCC unroll 8
    for (int k = 0; k < kQ8Block; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) {
        ivec low_bytes, high_bytes;  // an array of them would be copied through memory
        std::memcpy(&low_bytes, steps + j * stride + k * kNR, sizeof low_bytes);
        std::memcpy(&high_bytes, steps + j * stride + k * kNR + sizeof low_bytes,
                    sizeof high_bytes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          int32_t activations;
          std::memcpy(&activations, q + r * int64_t(p.K) + b * kQ8Block + k, 4);
          sum[r][2 * j] = dot4(sum[r][2 * j], low_bytes, activations);
          sum[r][2 * j + 1] = dot4(sum[r][2 * j + 1], high_bytes, activations);
        }
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < P; j++) {
      const std::byte* scales = steps + j * stride + kNR * kQ8Block;
      const vec low = widen_f16(scales), high = widen_f16(scales + 2 * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vec scale = splat(d[r * blocks + b]);
        acc[r][2 * j] =
            fused(__builtin_convertvector(sum[r][2 * j], vec), low * scale, acc[r][2 * j]);
        acc[r][2 * j + 1] =
            fused(__builtin_convertvector(sum[r][2 * j + 1], vec), high * scale, acc[r][2 * j + 1]);
      }
    }
  }
  end_tile(p, m, n, distance, end, acc);
}
using Q8Tile = void (*)(const Product&, const QuantizedRows&, int, int, int, int);
inline constexpr int kQ8Rows = kLanes == 16 ? 6 : kLanes == 8 ? 2 : 4;  // fills the registers
template <int... R>
static constexpr std::array<Q8Tile, kQ8Rows> q8_tiles(std::integer_sequence<int, R...>) {
  return {q8_tile<R + 1, 1>...};
}
inline constexpr auto kQ8Tiles = q8_tiles(std::make_integer_sequence<int, kQ8Rows>{});

// As gemm_rectangle.
static void q8_rectangle(const Product& p, const QuantizedRows& x, int m0, int m1, int n0, int n1) {
  if (m1 - m0 == 1) {  // as few_rows
    for_streams<kRowStreams>(n0, n1, [&](int n, int distance, int streams) {
      if (streams == kRowStreams) return q8_tile<1, kRowStreams>(p, x, m0, n, distance, n1);
      for (int s = 0; s < streams; s++) q8_tile<1, 1>(p, x, m0, n + s * kNR, kNR, n1);
    });
    return;
  }
  // Rows at work at a time: what the second-level cache holds beside a panel.
  const int block = std::max(1, (256 << 10) / p.K / kQ8Rows) * kQ8Rows;
  for (int mc = m0; mc < m1; mc += block)
    for (int n = n0; n < n1; n += kNR)
      for (int m = mc; m < std::min(m1, mc + block); m += kQ8Rows) {
        const int rows = std::min({kQ8Rows, m1 - m, mc + block - m});
        kQ8Tiles[size_t(rows - 1)](p, x, m, n, kNR, n1);
      }
}

// Asks for the cache lines of the next B panel while the tiles of this one are computed, a share at
// each tile: packing strides through a matrix too widely for the hardware to see it coming.
struct Prefetch {
  const char* next = nullptr;
  int64_t ld = 0;                          // bytes between the strips of the operand
  int lines_left = 0, lines_per_tile = 0;  // cache lines still to ask for; a tile's share
  int column = 0, width = 1;               // of a strip, in cache lines
  Prefetch(const Product& p, int n, int n1, int k0, int depth, int tiles) {
    if (n >= n1) return;
    const int columns = std::min(kNR, n1 - n);
    const bool inner = p.b.inner == Inner::k;
    if (const Panels& w = p.b.panels; w.data) {
      const int64_t panel = panel_bytes(w.type, p.K), step = panel / p.K;
      next = reinterpret_cast<const char*>(w.data + n / kNR * panel + k0 * step);
      width = lines_left = int((depth * step + 63) / 64);
    } else {
      next = reinterpret_cast<const char*>(inner ? p.b.data + n * p.b.ld + k0
                                                 : p.b.data + k0 * p.b.ld + n);
      ld = 4 * p.b.ld;
      width = ((inner ? depth : columns) * 4 + 63) / 64;
      lines_left = width * (inner ? columns : depth);
    }
    lines_per_tile = (lines_left + tiles - 1) / tiles;
  }
  // Inlined, since a call without effects would be dropped.
  __attribute__((always_inline)) void fetch() {
    const int count = std::min(lines_left, lines_per_tile);
    lines_left -= count;
    for (int i = 0; i < count; i++) {
      __builtin_prefetch(next + column * 64, 0, 2);
      if (++column == width) column = 0, next += ld;
    }
  }
};

// Packs rows of A that lie by columns (Inner::other) over K steps into panels of kMR rows. Several
// panels at a time, so that a cache line is used up while it is there.
static void pack_rows(const Operand& x, const float* data, int rows, int K, float* panels) {
  constexpr int kGroup = 8;
  int m = 0;
  for (; rows - m >= kGroup * kMR; m += kGroup * kMR, panels += kGroup * kMR * K) {
    // Whole vectors: what they hold beyond a panel's line, its next line overwrites.
    for (int k = 0; k + 1 < K; k++) {
      const float* src = data + k * x.ld + m;
      for (int i = 0; i < kGroup * kMR; i += 16)
        __builtin_prefetch(src + kPrefetchSteps * x.ld + i);
#pragma GCC unroll 8
      for (int j = 0; j < kGroup; j++)
        for (int i = 0; i < kMR; i += kLanes)
          store(panels + (j * K + k) * kMR + i, load(src + j * kMR + i));
    }
    for (int i = 0; i < kGroup * kMR; i++)
      panels[(i / kMR * K + K - 1) * kMR + i % kMR] = data[(K - 1) * x.ld + m + i];
  }
  for (; m < rows; m += kMR, panels += kMR * K)
    pack_panel<kMR>(x, data + m, std::min(kMR, rows - m), K, panels);
}

// sums[i] (+)= the sum of a packed panel's row i over K steps: four chains over k, then their sum.
static void add_panel_sums(const float* panel, int count, int K, bool accumulate, float* sums) {
  for (int row = 0; row < count; row += kLanes) {
    vec chain[4] = {};
    for (int k = 0; k < K; k++) chain[k % 4] += load(panel + k * kMR + row);
    const vec sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    const int n = std::min(kLanes, count - row);
    store(sums + row, accumulate ? load(sums + row, n) + sum : sum, n);
  }
}

// Rows of A at work at a time, whole tiles.
static int block_rows(int K) { return kBlock / std::clamp(K, 1, kKC) / kMR * kMR; }

static void gemm_rectangle(const Product& p, int m0, int m1, int n0, int n1) {
  thread_local Arena scratch;
  scratch.grow(std::max<int64_t>(kBlock, int64_t(kMR) * p.K) + kNR * kKC + 2 * kLanes);
  float *b_panel = scratch.data(), *a_panels = b_panel + kNR * kKC + kLanes;
  const Panels& panels = p.b.panels;
  if (panels.data && m1 - m0 <= kFewRows) {
    return with_float_type(panels.type, [&](auto type) { few_rows<type>(p, m0, m1, n0, n1); });
  }
  const auto element = [](const Operand& x, int64_t line, int64_t k) {
    return x.data + (x.inner == Inner::k ? line * x.ld + k : k * x.ld + line);
  };
  const int block = block_rows(p.K);
  for (int mc = m0; mc < m1; mc += block) {
    const int rows = std::min(block, m1 - mc);
    for (int k0 = 0; k0 < p.K || k0 == 0; k0 += kKC) {
      const int depth = std::min(kKC, p.K - k0);
      const bool direct = p.a.inner == Inner::k;
      if (!direct) {
        pack_rows(p.a, element(p.a, mc, k0), rows, depth, a_panels);
        for (int m = 0; p.sums && n0 == 0 && m < rows; m += kMR) {
          add_panel_sums(a_panels + int64_t(m) * depth, std::min(kMR, rows - m), depth,
                         p.accumulate || k0 > 0, p.sums + mc + m);
        }
      }
      for (int n = n0; n < n1; n += kNR) {
        if (p.lower && n >= mc + rows) break;
        const int columns = std::min(kNR, n1 - n);
        const auto& tiles = columns == kNR ? kBlockTiles<true> : kBlockTiles<false>;
        const float* b = b_panel;
        if (panels.data) {
          const int64_t panel = panel_bytes(panels.type, p.K);
          const std::byte* steps = panels.data + n / kNR * panel + panel / p.K * k0;
          if (panels.type == WeightType::f32) {
            b = reinterpret_cast<const float*>(steps);
          } else {
            with_float_type(panels.type,
                            [&](auto type) { widen_steps<type>(steps, depth, b_panel); });
          }
        } else {
          pack_panel<kNR>(p.b, element(p.b, n, k0), columns, depth, b_panel);
        }
        Prefetch prefetch(p, n + kNR, n1, k0, depth, (rows + kMR - 1) / kMR);
        for (int m = 0; m < rows; m += kMR) {
          prefetch.fetch();
          const int r = std::min(kMR, rows - m);
          if (p.lower && n >= mc + m + r) continue;
          float* c = p.c + (mc + m) * p.ldc + n;
          const float* start = k0 > 0 || p.accumulate ? c : nullptr;
          if (k0 == 0 && p.residual) start = p.residual + (mc + m) * p.ldc + n;
          const float* a = direct ? element(p.a, mc + m, k0) : a_panels + int64_t(m) * depth;
          tiles[size_t(r - 1)](depth, a, direct ? p.a.ld : 1, direct ? 1 : kMR, b, c, p.ldc,
                               columns, start, p.ldc, k0 == 0 && p.bias ? p.bias + n : nullptr);
        }
      }
    }
  }
}

// Splits C among the threads: in the grid that takes least, or, where a grid's rectangles would be
// too unlike, tile by tile along the columns, so that only a thread's first and last panel are
// divided. With few rows no panel is: each is read once then.
static void gemm(const Product& p) {
  if (p.M <= 0 || p.N <= 0) return;
  const int threads = loop_threads();
  const int m_panels = (p.M + kMR - 1) / kMR, n_panels = (p.N + kNR - 1) / kNR;
  int best_m = 1;
  double best = 1e300;
  for (int tm = 1; tm <= threads; tm++) {
    const int tn = threads / tm;
    const double rows = double((m_panels + tm - 1) / tm) * kMR;
    const double columns = double((n_panels + tn - 1) / tn) * kNR;
    // an element that is packed, or read from packed weights, costs about as much as a vector
    // multiply-add of kLanes products
    const double pack = rows + columns * std::max(1., rows / block_rows(p.K));
    const double cost = rows * columns + 6 * pack;
    if (cost < best) best = cost, best_m = tm;
  }
  const int tm = best_m, tn = threads / best_m;
  const int64_t tiles = int64_t(m_panels) * n_panels, most_tiles = (tiles + threads - 1) / threads;
  const double most_columns = double(n_panels / threads + 2) * kNR;
  const double dealt = double(most_tiles) * kMR * kNR +
                       6 * (p.M + most_columns * std::max(1., double(p.M) / block_rows(p.K)));
  const bool deals = m_panels >= 5 && dealt < best;
  const bool q8 = p.b.panels.data && p.b.panels.type == WeightType::q8_0;
  const QuantizedRows* quantized = q8 ? &quantize_rows(p) : nullptr;
  const auto rectangle = [&](int m0, int m1, int n0, int n1) {
    if (quantized) return q8_rectangle(p, *quantized, m0, m1, n0, n1);
    gemm_rectangle(p, m0, m1, n0, n1);
  };
  if (double(p.M) * p.N * p.K < 1 << 16) return rectangle(0, p.M, 0, p.N);  // not worth waking
  if (deals) {
    return on_threads(threads, [&](int t) {
      const int64_t end = tiles * (t + 1) / threads;
      for (int64_t tile = tiles * t / threads; tile < end;) {
        const int m = int(tile % m_panels), n = int(tile / m_panels);
        const int rows = int(std::min<int64_t>(m_panels - m, end - tile));
        const int columns = rows == m_panels ? int((end - tile) / m_panels) : 1;
        rectangle(m * kMR, std::min(p.M, (m + rows) * kMR), n * kNR,
                  std::min(p.N, (n + columns) * kNR));
        tile += int64_t(rows) * columns;
      }
    });
  }
  on_threads(tm * tn, [&](int t) {
    const int i = t % tm, j = t / tm;
    const auto cut = [](int panels, int part, int parts, int width, int limit) {
      return std::min(limit, int(int64_t(panels) * part / parts) * width);
    };
    const int m0 = cut(m_panels, i, tm, kMR, p.M), m1 = cut(m_panels, i + 1, tm, kMR, p.M);
    const int n0 = cut(n_panels, j, tn, kNR, p.N), n1 = cut(n_panels, j + 1, tn, kNR, p.N);
    if (m0 < m1 && n0 < n1) rectangle(m0, m1, n0, n1);
  });
}

// ---------------------------------------------------------------------------------------------
// Products of operands that lie in cache

template <class B, int R, int NV>
static void small_tile(int K, const float* a, int64_t a_row, int64_t a_k, const B* b, int64_t ldb,
                       float* c, int64_t ldc, bool accumulate) {
  vec acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : vec{};
  }
  tile<R, NV>(K, a, a_row, a_k, b, ldb, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(c + r * ldc + v * kLanes, acc[r][v]);
  }
}
template <class B>
using SmallTile = void (*)(int, const float*, int64_t, int64_t, const B*, int64_t, float*, int64_t,
                           bool);
template <class B, int NV, int... R>
static constexpr std::array<SmallTile<B>, kMR> small_tiles(std::integer_sequence<int, R...>) {
  return {small_tile<B, R + 1, NV>...};
}
template <class B, int NV>
inline constexpr auto kSmallTiles = small_tiles<B, NV>(std::make_integer_sequence<int, kMR>{});

template <class B>
static void small_product(int M, int N, int K, const float* a, int64_t a_row, int64_t a_k,
                          const B* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int n = 0;
  if (M == 1) {  // decoding: one row has too few chains to keep the units busy
    for (; n + 8 * kLanes <= N; n += 8 * kLanes)
      small_tile<B, 1, 8>(K, a, a_row, a_k, b + n, ldb, c + n, ldc, accumulate);
  }
  for (; n + 2 * kLanes <= N; n += 2 * kLanes)
    kSmallTiles<B, 2>[size_t(M - 1)](K, a, a_row, a_k, b + n, ldb, c + n, ldc, accumulate);
  if (n < N) {
    kSmallTiles<B, 1>[size_t(M - 1)](K, a, a_row, a_k, b + n, ldb, c + n, ldc, accumulate);
  }
}

// Copies the lower triangle of a square matrix (size, size) into the upper one.
template <int... I>
static void mirror(int size, float* c, std::integer_sequence<int, I...>) {
  const int whole = size / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes)
    for (int j = 0; j <= i; j += kLanes) {
      vec block[kLanes];
      for (int k = 0; k < kLanes; k++) block[k] = load(c + int64_t(i + k) * size + j);
      transpose(block);
      for (int k = 0; k < kLanes; k++) {
        float* dst = c + int64_t(j + k) * size + i;
        store(dst, i == j ? (ivec{I...} < k ? load(dst) : block[k]) : block[k]);
      }
    }
  for (int i = whole; i < size; i++)
    for (int j = 0; j < i; j++) c[int64_t(j) * size + i] = c[int64_t(i) * size + j];
}

static void gemm_symmetric(int size, int K, const Operand& a, const Operand& b, float* c) {
  gemm_rectangle({.M = size, .N = size, .K = K, .a = a, .b = b, .c = c, .ldc = size, .lower = true},
                 0, size, 0, size);
  mirror(size, c, std::make_integer_sequence<int, kLanes>{});
}

}  // namespace cake

// =============================================================================================
// 7. Pretraining
//
//     PREFIX shards -> Loader -> forward_backward (micro-batches) -> update -> metrics, evaluation,
//     samples, checkpoints

#include <CLI/CLI.hpp>

#include "cake/checkpoint.h"
#include "cake/flags.h"
#include "cake/generate.h"
#include "cake/schedule.h"
#include "cake/shards.h"
#include "cake/tokenizer.h"
#include "cake/training.h"

namespace cake {
namespace {

// What a run is: every choice that decides its updates. It is stored in the trainer's state. 0,
// empty or negative means that plan_model and plan_run choose.
struct Settings {
  std::string data, tokenizer, init_from;
  std::string family = "qwen3";
  int depth = 0, layers = 0, channels = 0, heads = 0, kv_heads = 0, head_size = 0, ffn = 0;
  int context = 0;
  int tied = -1;
  bool tokenizer_differs = false;
  int64_t batch_tokens = 0, micro_batch_tokens = 0;
  Budget budget;
  OptimizerFlags optimizer{
      .name = "", .lr_scale = 0, .weight_decay = -1, .warmdown = -1, .final_lr = -1};
  uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Settings, data, tokenizer, init_from, family, depth,
                                                layers, channels, heads, kv_heads, head_size, ffn,
                                                context, tied, tokenizer_differs, batch_tokens,
                                                micro_batch_tokens, budget, optimizer, seed)

// What is looked at on the way.
struct Watch {
  int64_t eval_every = 0, sample_every = 0, eval_tokens = 1 << 20;
  std::string prompt;
};

struct Score {
  double loss = 0, bits_per_byte = 0;
  int64_t tokens = 0;
};

class Pretraining {
 public:
  Pretraining(Settings settings, Watch watch, RunOptions options)
      : s_(std::move(settings)),
        w_(std::move(watch)),
        info_(read_data_info(s_.data)),
        tokenizer_path_(s_.tokenizer.empty()
                            ? data_info_path(s_.data).parent_path() / info_.tokenizer
                            : std::filesystem::path(s_.tokenizer)),
        tokenizer_(Tokenizer::load(tokenizer_path_)),
        train_(s_.data, "train"),
        separator_(tokenizer_.document_separator()) {
    if (tokenizer_.hash() != info_.hash) {
      fail(tokenizer_path_.string(), ": is not the tokenizer that made ", s_.data,
           ": encode the data again, or name its tokenizer with --tokenizer");
    }
    if (info_.val.tokens > 1) val_ = std::make_unique<TokenStream>(s_.data, "val");
    token_bytes_.resize(size_t(tokenizer_.vocab_size()));
    for (int id = 0; id < tokenizer_.vocab_size(); id++)
      token_bytes_[size_t(id)] =
          tokenizer_.is_special(id) ? 0 : int(tokenizer_.token_bytes(id).size());
    run_.stage = "pretraining";
    run_.hint = "./chat generate " + options.out.string() + " --prompt \"...\"";
    run_.inputs = {s_.data, tokenizer_path_, s_.init_from};
    run_.options = std::move(options);
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

 private:
  bool small_text() const { return train_.size() < 2'000'000; }  // tokens
  int64_t begin(const Json* saved);
  void plan_model();
  void check_same_tokenizer(const std::filesystem::path& dir) const;
  void plan_run();
  void plan_micro_batch();
  void plan_steps(double started);
  void plan_more_steps(const Json& saved);
  void print_plan(double reserved);
  void make_model();
  void load_or_initialize();
  void calibrate_speed();
  StepResult step(int64_t number);
  Score evaluate(int64_t tokens);
  void report(const char* kind, const Score& score);
  bool is_time(int64_t n, int64_t every, int64_t times) const {  // every so many steps; 0: `times`
    if (n == 0 || n == run_.steps) return false;                 // finish() evaluates at the end
    return n % (every > 0 ? every : std::max<int64_t>(1, run_.steps / times)) == 0;
  }
  bool evaluates(int64_t n) const { return val_ && is_time(n, w_.eval_every, 10); }
  bool samples(int64_t n) const { return is_time(n, w_.sample_every, 4); }
  void evaluate_and_sample(int64_t number);
  OrderedJson finish();
  OrderedJson state() const;
  SaveOptions save_options() const;
  GptOptions options() const {
    GptOptions o = gpt_options(run_.options);
    o.muon = s_.optimizer.name == "muon";
    o.batch_tokens = int(s_.micro_batch_tokens);
    const auto prompt = int64_t(sample_prompt().size());
    o.decode = decode_plan(options_for_one(config_, prompt, kSampleTokens));
    return o;
  }
  std::vector<int> sample_prompt() const {
    std::vector<int> prompt = {separator_};
    tokenizer_.encode(w_.prompt, prompt);
    return prompt;
  }
  void sample(const std::vector<int>& prompt);

  static constexpr int kSampleTokens = 64;

  Settings s_;
  Watch w_;
  DataInfo info_;
  std::filesystem::path tokenizer_path_;
  std::filesystem::path started_from_;  // the model of --init-from; resumed, the run's own
  Tokenizer tokenizer_;
  TokenStream train_;
  std::unique_ptr<TokenStream> val_;
  int separator_;
  std::vector<int> token_bytes_;  // (V) bytes of text an id stands for; 0 for special tokens

  Config config_;
  std::unique_ptr<Gpt> gpt_;
  std::unique_ptr<Loader> loader_;
  Schedule schedule_;
  double step_seconds_ = 0, eval_seconds_ = 0;  // calibrated, of a step and a token; 0: unknown
  Run run_;
  std::vector<int> tokens_, targets_, doc_starts_;
  std::vector<float> dlogp_;
};

// ---------------------------------------------------------------------------------------------
// One step

StepResult Pretraining::step(int64_t number) {
  const int64_t window = loader_->window_length();
  const int64_t windows = s_.batch_tokens / window, micro = s_.micro_batch_tokens / window;
  double bytes = 0;
  StepResult r;
  r.tokens = double(s_.batch_tokens);
  for (int64_t done = 0; done < windows; done += micro) {
    loader_->next(int(std::min(micro, windows - done)), tokens_, targets_, doc_starts_);
    dlogp_.assign(tokens_.size(), -1 / float(s_.batch_tokens));
    gpt_->forward_backward({tokens_, targets_, doc_starts_}, dlogp_);
    for (int id : targets_) bytes += token_bytes_[size_t(id)];
    r.operations += training_operations(*gpt_, doc_starts_);
  }
  const double factor = schedule_.at(number);
  gpt_->update(optimizer_step(s_.optimizer, number - run_.state.moments_since, factor));
  r.learning_rate = peak_rate(s_.optimizer) * factor;
  r.add_stats = [bits = double(s_.batch_tokens) / (std::log(2.) * std::max(1., bytes))](
                    StepResult& result, const UpdateStats& stats) {
    const double bits_per_byte = stats.loss * bits;
    result.loss = stats.loss, result.skipped = stats.skipped;
    result.metrics = {
        {"loss", stats.loss}, {"bits_per_byte", bits_per_byte}, {"grad_norm", stats.grad_norm}};
    result.line =
        format("loss %.3f  %.3f bits/byte  grad %.2f", stats.loss, bits_per_byte, stats.grad_norm);
  };
  return r;
}

// Windows of the context that do not overlap, spread over the validation part when it is longer
// than `tokens`. Bits per byte = nats / (ln 2 x bytes of the targets).
Score Pretraining::evaluate(int64_t tokens) {
  const int T = s_.context;
  const int64_t all = validation_windows(*val_, T);
  const int64_t used = std::clamp<int64_t>(tokens / T, 1, all);
  double nats = 0, bytes = 0;
  Score score;
  for (int64_t i = 0; i < used;) {
    stop_if_signalled();
    tokens_.clear(), targets_.clear(), doc_starts_.clear();
    do {
      const int64_t begin = i * all / used * T;
      append_window(*val_, begin, std::min<int64_t>(T, val_->size() - 1 - begin), separator_,
                    tokens_, targets_, doc_starts_);
      i++;
    } while (i < used && int64_t(tokens_.size()) + T <= s_.micro_batch_tokens);
    doc_starts_.push_back(int(tokens_.size()));
    gpt_->forward({tokens_, targets_, doc_starts_}, Pass::score);
    for (float logp : gpt_->logp()) nats -= logp;
    for (int id : targets_) bytes += token_bytes_[size_t(id)];
    score.tokens += int64_t(tokens_.size());
  }
  score.loss = nats / double(score.tokens);
  score.bits_per_byte = nats / (std::log(2.) * std::max(1., bytes));
  return score;
}

// `kind`: of the line in the metrics.
void Pretraining::report(const char* kind, const Score& score) {
  const int64_t n = run_.state.step;
  run_.write_metrics(kind, n,
                     {{"val_loss", score.loss},
                      {"val_bits_per_byte", score.bits_per_byte},
                      {"val_tokens", score.tokens}});
  run_.line.note(format("step %lld  validation loss %.4f  %.4f bits/byte", (long long)n, score.loss,
                        score.bits_per_byte));
}

// About ten evaluations on the way, each on a part of the validation that costs .3 % of the time,
// and three samples.
void Pretraining::evaluate_and_sample(int64_t n) {
  if (evaluates(n)) {
    const int64_t tokens = eval_seconds_ > 0 && step_seconds_ > 0
                               ? int64_t(.003 * double(run_.steps) * step_seconds_ / eval_seconds_)
                               : s_.batch_tokens * run_.steps / 300;
    report("eval", evaluate(std::clamp<int64_t>(tokens, s_.context, w_.eval_tokens)));
  }
  if (!samples(n)) return;
  const std::vector<int> prompt = sample_prompt();
  if (int(prompt.size()) >= config_.T) return;
  try_sample(run_.line, [&] { sample(prompt); });
}
void Pretraining::sample(const std::vector<int>& prompt) {
  std::vector<int> stop_ids = config_.all_end_tokens();
  stop_ids.push_back(separator_);
  const Completion c = sample_one(*gpt_, tokenizer_, prompt, kSampleTokens,
                                  {.temperature = .8f, .seed = s_.seed}, stop_ids);
  run_.line.note("sample  " + indented(w_.prompt + c.text));
}

// ---------------------------------------------------------------------------------------------
// What the flags left open

// Ids of one tokenizer are noise to a model that learned those of another.
void Pretraining::check_same_tokenizer(const std::filesystem::path& dir) const {
  const bool found = has_tokenizer(dir);
  if (found && Tokenizer::load(dir).hash() == info_.hash) return;
  fail("--init-from ", dir.string(), ": found ", found ? "another" : "no",
       " tokenizer, expected the one that made ", s_.data,
       "; --tokenizer-differs trains the model on the ids of the data all the same");
}

// The model: from a directory, or from --depth with every size overridable.
void Pretraining::plan_model() {
  const int V = tokenizer_.vocab_size();
  if (!s_.init_from.empty()) {
    started_from_ = model_dir(s_.init_from);
    config_ = load_config(started_from_);
    if (!s_.tokenizer_differs) check_same_tokenizer(started_from_);
    if (config_.head != Head::lm)
      fail(s_.init_from, ": has a scalar head, expected a language model");
    if (config_.V < V) {
      fail(s_.init_from, ": found a vocabulary of ", config_.V,
           ", expected at least the tokenizer's ", V);
    }
    if (s_.context == 0) s_.context = std::min(config_.T, 1024);
    if (s_.context > config_.T) {
      fail("--context: found ", s_.context, ", expected at most the model's ", config_.T);
    }
    return;
  }
  const auto* known = std::find(std::begin(kModelTypes), std::end(kModelTypes), s_.family);
  if (known == std::end(kModelTypes)) {
    fail("--family: found ", s_.family, ", expected gpt2, llama, qwen2 or qwen3");
  }
  const Family family = Family(known - kModelTypes);
  // A book is soon seen several times over: a smaller model learns less of it by heart.
  if (s_.depth == 0) {
    s_.depth = small_text() ? 3 : 4;
    if (small_text() && s_.channels == 0) s_.channels = 128;
  }
  if (s_.depth < 1 || s_.depth > 100) fail("--depth: found ", s_.depth, ", expected 1 to 100");
  const int L = s_.layers ? s_.layers : s_.depth;
  const int C = s_.channels ? s_.channels : width_of_depth(s_.depth);
  if (s_.context == 0) {
    // Windows cut documents, and what a cut leaves has lost its beginning: many short documents
    // take long windows, which cost nothing, since attention stays within a document.
    const bool short_documents =
        info_.train.tokens < 512 * std::max<int64_t>(1, info_.train.documents);
    s_.context = short_documents || C >= 512 ? 1024 : C >= 256 ? 512 : s_.depth > 3 ? 256 : 128;
  }
  config_ = new_config(family, L, C, V, s_.context);
  if (s_.head_size)
    config_.HS = s_.head_size, config_.NH = config_.NKV = std::max(1, C / s_.head_size);
  if (s_.heads) {
    config_.NH = config_.NKV = s_.heads;
    if (!s_.head_size) {
      if (C % s_.heads != 0) {
        fail("--heads: found ", s_.heads, ", expected a divisor of the ", C,
             " channels, or --head-size beside it");
      }
      config_.HS = C / s_.heads;
    }
  }
  if (s_.kv_heads) config_.NKV = s_.kv_heads;
  if (s_.ffn) config_.F = s_.ffn;
  if (s_.tied >= 0) config_.tied = s_.tied;
  config_.bos = config_.eos = config_.pad = separator_;
  config_.end_tokens = {separator_};
  config_.check("model flags");
}

// Batch, budget, optimizer.
void Pretraining::plan_run() {
  const ParamTable table = make_table(config_);
  Budget& budget = s_.budget;
  OptimizerFlags& o = s_.optimizer;
  expect_not_negative("--batch-tokens", double(s_.batch_tokens));
  expect_not_negative("--micro-batch-tokens", double(s_.micro_batch_tokens));
  check_budget(budget);
  check_optimizer(o);
  loader_ = std::make_unique<Loader>(train_, s_.context, s_.seed, separator_);
  const int64_t window = loader_->window_length();
  if (!budget.chosen()) budget.tokens = tokens_of_model(table);
  if (s_.batch_tokens == 0) {
    s_.batch_tokens = budget.tokens > 0 ? batch_of_tokens(double(budget.tokens)) : 2048;
  }
  s_.batch_tokens = std::max<int64_t>(1, s_.batch_tokens / window) * window;
  if (budget.tokens > 0) budget.steps = std::max<int64_t>(1, budget.tokens / s_.batch_tokens);

  if (o.name.empty()) {
    o.name = s_.init_from.empty() && muon_is_cheap(table, s_.batch_tokens) ? "muon" : "adamw";
  }
  const bool muon = o.name == "muon";
  const double adamw_lr = std::min(.004, .002 * std::sqrt(128. / config_.C) * 2);
  // Muon's companions, measured: a small text that is seen several times over wants faster
  // embeddings and a long fall (tinyshakespeare: 2.111 bits a byte with them, 2.145 without), fresh
  // tokens do not (the demo's world: .356 with them, .336 without), and learn to copy from a
  // passage at a lower rate (passages alone, 400 steps: 32 % read right at .01, 15 % at .02).
  if (o.lr == 0) o.lr = !muon ? adamw_lr : small_text() ? .03 : .01;
  if (o.embedding_lr == 0) o.embedding_lr = !muon ? adamw_lr : small_text() ? .03 : .01;
  if (o.head_lr == 0) o.head_lr = !muon ? adamw_lr : small_text() ? .004 : .01;
  if (o.vector_lr == 0) o.vector_lr = muon ? .01 : adamw_lr;
  if (o.warmdown < 0) o.warmdown = small_text() ? .8 : .6;
  if (o.final_lr < 0) o.final_lr = small_text() ? 0 : .03;
  if (o.lr_scale == 0) o.lr_scale = s_.init_from.empty() ? 1 : .1;
  if (o.weight_decay < 0) o.weight_decay = muon ? 0 : .1;
  plan_micro_batch();
}

// In whole windows. Where it is chosen here, the micro-batches of a step are equal, or nearly.
void Pretraining::plan_micro_batch() {
  const int64_t window = loader_->window_length(), windows = s_.batch_tokens / window;
  int64_t& tokens = s_.micro_batch_tokens;
  const bool is_open = tokens == 0;
  choose_micro_batch(tokens, run_.options, window, s_.batch_tokens, [&](int64_t n) {
    GptOptions o = options();
    o.batch_tokens = int(n);
    return plan_memory(config_, o).total();
  });
  int64_t micro = std::clamp<int64_t>(tokens / window, 1, windows);
  const int64_t parts = (windows + micro - 1) / micro;
  if (is_open) micro = (windows + parts - 1) / parts;
  tokens = micro * window;
}

// `reserved`: seconds of the last evaluation.
void Pretraining::print_plan(double reserved) {
  const ParamTable table = make_table(config_);
  const Config& c = config_;
  std::printf(
      "model   %s: %d layers, %d channels, %d heads of %d%s, feed-forward %d, context %d, "
      "vocabulary %d\n        %s parameters, %s in products\n",
      kModelTypes[int(c.family)], c.L, c.C, c.NH, c.HS,
      c.NKV < c.NH ? format(" over %d key/value heads", c.NKV).c_str() : "", c.F, c.T, c.V,
      count_text(double(table.parameters())).c_str(),
      count_text(double(table.matmul_parameters())).c_str());
  std::printf("data    %s: %s training tokens, %s validation tokens, %.2f bytes a token\n",
              s_.data.c_str(), count_text(double(info_.train.tokens)).c_str(),
              count_text(double(info_.val.tokens)).c_str(),
              double(info_.train.bytes) / double(std::max<int64_t>(1, info_.train.tokens)));
  const int64_t steps = s_.budget.steps;
  if (steps > 0) {
    const double tokens = double(steps) * double(s_.batch_tokens);
    std::printf("budget  %s steps of %s tokens = %s tokens, %.2f times the data (--steps %lld)\n",
                count_text(double(steps)).c_str(), count_text(double(s_.batch_tokens)).c_str(),
                count_text(tokens).c_str(), tokens / double(train_.size()), (long long)steps);
  }
  const OptimizerFlags& o = s_.optimizer;
  std::printf("updates %s, %s schedule: learning rate %g for matrices, %g embedding, %g head\n",
              o.name.c_str(), o.schedule.c_str(), o.lr * o.lr_scale, o.embedding_lr * o.lr_scale,
              o.head_lr * o.lr_scale);
  const MemoryPlan memory = plan_memory(config_, options());
  std::printf("memory  %s (%s), %s\n", bytes_text(double(memory.total())).c_str(),
              memory.text().c_str(), micro_batch_text(s_.micro_batch_tokens).c_str());
  std::printf(
      "disk    %s a checkpoint with the optimizer's state, twice while one replaces another\n",
      bytes_text(double(checkpoint_bytes(table, true))).c_str());
  if (run_.peak > 0) std::printf("peak    %.4g TFLOP/s measured\n", run_.peak / 1e12);
  if (step_seconds_ > 0) {
    std::printf("time    %.0f ms a step, %s in all\n", step_seconds_ * 1e3,
                duration_text(double(steps) * step_seconds_ / .97 + reserved).c_str());
  }
  std::fflush(stdout);
}

// ---------------------------------------------------------------------------------------------
// The beginning and the end

void Pretraining::make_model() {
  gpt_.reset();
  gpt_ = make_gpt(config_, options());
  if (run_.peak == 0) run_.peak = measure_peak(*gpt_);
}

void Pretraining::load_or_initialize() {
  if (!s_.init_from.empty()) return load_weights(model_dir(s_.init_from), *gpt_);
  const auto& tensors = gpt_->table().tensors;
  for (size_t i = 0; i < tensors.size(); i++)
    gpt_->write(int(i), Slot::weight, initial_values(tensors[i], s_.seed));
}

// Times steps and evaluation. The model is made again afterwards: the clock decides the number of
// steps and nothing else.
void Pretraining::calibrate_speed() {
  schedule_ = {.steps = 1 << 20, .warmup = 1 << 20};
  // One micro-batch stands for a step: a large batch would take minutes to time.
  const int64_t batch = std::exchange(s_.batch_tokens, s_.micro_batch_tokens);
  step_seconds_ = double(batch) * calibrate(s_.budget, [&](int i) {
                    const double tokens = step(i).tokens;
                    gpt_->stats();  // the device has done it
                    return tokens;
                  });
  const double start = now();
  const Score score = val_ ? evaluate(2 * s_.micro_batch_tokens) : Score{};
  eval_seconds_ = score.tokens > 0 ? (now() - start) / double(score.tokens) : 0;
  s_.batch_tokens = batch;
  loader_->set_state({});
}

int64_t Pretraining::begin(const Json* saved) {
  const double started = now();
  if (saved) {
    started_from_ = model_dir(run_.options.out);
    config_ = load_config(started_from_);
    loader_ = std::make_unique<Loader>(train_, s_.context, s_.seed, separator_);
    plan_micro_batch();
    make_model();
    load_run(run_, *saved, *gpt_);
    const Json& loader = saved->at("loader");
    loader_->set_state({loader.at("epoch").get<int64_t>(), loader.at("window").get<int64_t>()});
    eval_seconds_ = saved->at("eval_seconds").get<double>();
    step_seconds_ = saved->value("step_seconds", 0.);
    if (run_.options.new_budget) plan_more_steps(*saved);
    print_plan(0);
  } else {
    plan_model();
    plan_run();
    plan_steps(started);
    if (run_.options.dry_run) return 0;
    make_model();
    load_or_initialize();
  }
  run_.lr_scale = s_.optimizer.lr_scale;
  schedule_ = make_schedule(s_.optimizer, s_.budget.steps);
  return s_.budget.steps;
}

// The steps of a resumed run that got another budget.
void Pretraining::plan_more_steps(const Json& saved) {
  const auto planned = with_parts(saved.at("settings")).at("budget").at("steps").get<int64_t>();
  s_.budget.steps = resumed_steps(
      run_, s_.budget, s_.optimizer, planned,
      [&](const Budget& budget) { return std::max<int64_t>(1, budget.tokens / s_.batch_tokens); });
}

// The number of steps, with --minutes from the speed; prints the plan.
void Pretraining::plan_steps(double started) {
  int64_t& steps = s_.budget.steps;
  if (s_.budget.minutes > 0 || run_.options.dry_run) {
    make_model();
    load_or_initialize();
    calibrate_speed();
  }
  const double last_eval =
      val_ ? eval_seconds_ * double(std::min(w_.eval_tokens, val_->size())) : 0;
  if (s_.budget.minutes > 0) {
    steps = steps_in_minutes(s_.budget, started, step_seconds_, last_eval);
    // tinyshakespeare's tail costs 2.12 bits a byte after five times (128 channels), 2.13 after
    // eight and 2.28 after sixteen (96 channels).
    const int64_t enough = std::max<int64_t>(800, 5 * train_.size() / s_.batch_tokens);
    if (small_text() && steps > enough) {
      steps = enough;
      std::printf(
          "minutes more than this text takes: it would be learned by heart (--steps goes on)\n");
    }
  }
  if (s_.optimizer.warmup < 0) s_.optimizer.warmup = std::clamp<int64_t>(steps / 50, 1, 40);
  print_plan(last_eval);
}

OrderedJson Pretraining::finish() {
  Score score;
  if (val_) report("final", score = evaluate(w_.eval_tokens));
  const double seconds = run_.state.seconds, loss = run_.state.recent_loss;
  const double tokens = double(run_.steps) * double(s_.batch_tokens);
  const auto parameters = gpt_->table().parameters();
  run_.line.note(
      format("trained %s parameters on %s tokens in %s (%s tokens/s): training loss %.3f%s",
             count_text(double(parameters)).c_str(), count_text(tokens).c_str(),
             duration_text(seconds).c_str(), count_text(tokens / seconds).c_str(), loss,
             val_ ? format(", validation %.4f bits/byte", score.bits_per_byte).c_str() : ""));
  return {{"tokens", int64_t(tokens)},
          {"epochs", tokens / double(train_.size())},
          {"tokens_per_second", tokens / seconds},
          {"parameters", parameters},
          {"train_loss", loss},
          {"val_loss", val_ ? Json(score.loss) : Json()},
          {"val_bits_per_byte", val_ ? Json(score.bits_per_byte) : Json()},
          {"val_tokens", score.tokens}};
}

OrderedJson Pretraining::state() const {
  const LoaderState loader = loader_->state();
  return {{"loader", {{"epoch", loader.epoch}, {"window", loader.window}}},
          {"step_seconds", step_seconds_},
          {"eval_seconds", eval_seconds_},
          {"settings", Json(s_)}};
}

// A tokenizer.json is copied with the files that belong to it. One of another name or kind is
// written as a tokenizer.json.
SaveOptions Pretraining::save_options() const {
  const auto file = std::filesystem::absolute(Tokenizer::find(tokenizer_path_));
  SaveOptions options{.started_from = started_from_};
  if (file.filename() == "tokenizer.json") {
    options.tokenizer_from = file.parent_path();
  } else {
    options.also = [this](const std::filesystem::path& dir) { tokenizer_.save(dir); };
  }
  return options;
}

// The user's own model on both engines: the same batch, every gradient side by side.
int check_engines(const std::string& model, const RunOptions& o) {
  check_device(Device::cuda);
  const std::filesystem::path dir = model_dir(model);
  const Config c = load_config(dir);
  const int length = std::min(c.T, 256);
  std::vector<int> tokens, targets;
  const std::vector<int> starts = {0, length, length + (length + 1) / 2};
  Rng rng{1};
  for (int n = 0; n < starts.back(); n++) {
    tokens.push_back(int(rng.below(uint64_t(c.V))));
    targets.push_back(c.head == Head::lm ? int(rng.below(uint64_t(c.V))) : -1);
  }
  const std::vector<float> weights(tokens.size(), -1 / float(tokens.size()));
  std::unique_ptr<Gpt> engines[2];
  std::vector<float> outputs[2];
  for (const int i : {0, 1}) {
    engines[i] =
        make_gpt(c, {.device = i == 0 ? Device::cpu : Device::cuda,
                     .precision = i == 0 ? Precision::automatic : parse_precision(o.precision),
                     .recompute = i == 1 ? parse_recompute(o.recompute) : Recompute::none,
                     .batch_tokens = int(tokens.size())});
    load_weights(dir, *engines[i]);
    const bool lm = c.head == Head::lm;
    engines[i]->forward_backward({tokens, targets, starts}, lm ? weights : std::vector<float>{},
                                 lm ? std::vector<float>{} : weights);
    const auto out = lm ? engines[i]->logp() : engines[i]->value();
    outputs[i].assign(out.begin(), out.end());
  }
  // As in test/test_cuda.cpp: fp32 sums in another order, or some hundred roundings to 8 bits.
  // gpt2's key biases have a gradient of zero in exact arithmetic: what they hold is rounding
  // alone.
  const bool bf16 = parse_precision(o.precision) != Precision::fp32;
  const double bound = bf16 ? 6e-2 : 1e-5;
  bool good = true;
  const auto row = [&](const std::string& name, const std::vector<float>& cpu,
                       const std::vector<float>& gpu, bool counts) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < cpu.size(); i++) {
      difference += (double(cpu[i]) - gpu[i]) * (double(cpu[i]) - gpu[i]);
      norm += double(cpu[i]) * cpu[i];
    }
    const double error = std::sqrt(difference) / std::max(1e-30, std::sqrt(norm));
    const bool fine = !counts || error < bound || (norm == 0 && difference == 0);  // NaN is not
    good &= fine;
    std::printf("%-28s %12.5g %12.2e  %s\n", name.c_str(), std::sqrt(norm), error,
                !counts ? "rounding alone"
                : fine  ? ""
                        : "TOO FAR");
  };
  std::printf("%-28s %12s %12s  (bound %.0e)\n", "", "CPU norm", "difference", bound);
  row(c.head == Head::lm ? "log-probabilities" : "values", outputs[0], outputs[1], true);
  for (size_t i = 0; i < engines[0]->table().tensors.size(); i++) {
    const Tensor& t = engines[0]->table().tensors[i];
    std::vector<float> gradients[2];
    for (const int e : {0, 1}) {
      gradients[e].resize(size_t(t.size()));
      engines[e]->read(int(i), Slot::gradient, gradients[e]);
    }
    const bool no_gradient = c.family == Family::gpt2 && t.name.ends_with(".k.bias");
    row(t.name, gradients[0], gradients[1], !no_gradient);
  }
  std::printf(good ? "the engines agree\n" : "the engines disagree\n");
  return good ? 0 : 1;
}

// ---------------------------------------------------------------------------------------------
// Command line

void add_model_flags(CLI::App& app, Settings& s) {
  auto* model = app.add_option_group("Model", "sizes follow from --depth; each can be overridden");
  model->add_option("--depth", s.depth,
                    "layers, and with them every size; 0: 4, or 3 for a small text");
  model->add_option("--family", s.family, "gpt2, llama, qwen2 or qwen3");
  model->add_option("--layers", s.layers, "0: --depth");
  model->add_option("--channels", s.channels, "width; 0: by --depth");
  model->add_option("--heads", s.heads, "query heads; 0: by the width");
  model->add_option("--kv-heads", s.kv_heads, "key/value heads, a divisor of --heads; 0: --heads");
  model->add_option("--head-size", s.head_size, "0: 32, 64 or 128, by the width");
  model->add_option("--ffn", s.ffn, "feed-forward width; 0: by the width");
  model->add_option("--context", s.context, "longest context in tokens; 0: by width and text");
  model->add_option("--tied", s.tied, "1: the head is the embedding; 0: it is not; -1: by family");
}

void add_budget_flags(CLI::App& app, Settings& s) {
  auto* budget = app.add_option_group("Budget", "one of; default: 10.5 tokens a parameter");
  budget->add_option(
      "--minutes", s.budget.minutes,
      "measure the speed, then fix the steps that fit (a small text: five readings, or 800)");
  budget->add_option("--steps", s.budget.steps, "optimizer steps");
  budget->add_option("--tokens", s.budget.tokens, "tokens seen");
  budget->add_option("--batch-tokens", s.batch_tokens, "tokens an optimizer step; 0: chosen");
  budget->add_option(kMicroBatchFlag, s.micro_batch_tokens, kMicroBatchHelp);
}

int main_train(int argc, char** argv) {
  Settings s;
  Watch w;
  RunOptions o;
  bool check = false;
  std::string check_model;
  CLI::App app("Trains a base model on token shards (made by ./bpe encode).");
  app.option_defaults()->always_capture_default();
  app.add_option("--data", s.data, "token shards: PREFIX of ./bpe encode");
  app.add_option("--tokenizer", s.tokenizer, "in place of the one that PREFIX.json names");
  app.add_option("--init-from", s.init_from,
                 "continue from a model: a run, a Hugging Face directory or a .gguf file");
  app.add_flag("--tokenizer-differs", s.tokenizer_differs,
               "train the model of --init-from on data that another tokenizer made");
  app.add_flag("--check", check,
               "compare the CPU and the CUDA engine on --model, tensor by tensor");
  app.add_option("--model", check_model,
                 "a run, a Hugging Face directory or a .gguf file, for --check");
  add_run_flags(app, o);
  add_model_flags(app, s);
  add_budget_flags(app, s);
  add_optimizer_flags(app, s.optimizer, "learning rate of matrices; 0: chosen by the model");
  add_muon_flags(app, s.optimizer);
  app.add_option("--seed", s.seed, "of the initial weights and the order of the data");
  auto* watch = app.add_option_group("Watch", "changes no update");
  watch->add_option("--eval-every", w.eval_every, "steps; 0: a tenth of the run");
  watch->add_option("--eval-tokens", w.eval_tokens, "most tokens of the final validation");
  watch->add_option("--sample-every", w.sample_every, "steps; 0: a quarter of the run");
  add_raw_flag(app, {watch->add_option("--prompt", w.prompt, "of the samples, \\n: line break")});
  const RenamedFlag renamed[] = {{"--matrix-lr", "--lr"}, {"--clip", "--clip-norm"}};
  const std::vector<std::string> shown = {"--data",    "--out",    "--depth",     "--minutes",
                                          "--steps",   "--tokens", "--init-from", "--resume",
                                          "--dry-run", "--device"};
  if (!parse_flags(app, argc, argv, {{&app, shown}}, renamed)) return 0;
  if (check) {
    if (check_model.empty()) fail("--model: missing, expected the model to --check");
    set_threads(o.threads);
    return check_engines(check_model, o);
  }
  begin_process(o);
  if (o.resume) {
    resume_settings(app, s, s.budget, o, saved_settings<Settings>(o, "pretraining"));
  } else if (s.data.empty()) {
    fail("--data: missing, expected the PREFIX of token shards");
  }
  return Pretraining(std::move(s), std::move(w), std::move(o)).run();
}

}  // namespace
}  // namespace cake

// Weak: a stage that links this file as a library has its own.
__attribute__((weak)) int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::main_train(argc, argv); });
}
