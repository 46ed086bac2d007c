// Stage 2 on a GPU: the CUDA engine, the same Gpt interface as the CPU engine in train_gpt.cpp,
// which is what it is checked against. plain::Gpt of cake/layers.h is the page to read first.
//
//   1. the model         forward, backward and update of a whole GPT
//   2. vocabulary        what kernels and their launchers are written with
//   3. layers            in the order in which the data meets them: definition, kernel, launcher
//   4. optimizers        AdamW and Muon
//   5. decoding          attention over a paged KV cache, sampling
//   6. for speed         radix sort, fused epilogues, tuned products, graphs, memory: a reader may
//                        stop here
//   7. entry points      the functions that cake/gpt.h declares
//
// It compiles in two ways: by nvcc for a GPU, and as C++ over test/cuda_on_cpu/, which runs every
// thread of every kernel on the CPU and checks what it touches. Only the wrappers of special
// instructions differ (sections 2, 3 and 6). So that this stays true: shared memory comes from
// shared_memory() alone, kernels start by launch() alone, and no other inline assembly or intrinsic
// beyond CUDA's shuffles, votes, integer atomics and bf16 conversions is used.
//
// Deterministic: every floating-point sum has a fixed order; atomics count integers only.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "cake/gpt.h"
#include "cake/json.h"
#ifdef CAKE_CUDA_ON_CPU
#include "test/cuda_on_cpu/device.h"
#endif

namespace cake::gpu {

// =============================================================================================
// 1. The model
//
// A is the type of weights in products and of activations: float, or bf16 with fp32 master weights,
// gradients and moments. Arrays live on the device. Kernels and products are only queued on a
// stream, so that the host runs ahead of the device by a step or two.

using bf16 = __nv_bfloat16;

// What a layer's forward pass writes and its backward pass reads.
template <class A>
struct LayerActivations {
  A* x;                  // (N, C) the residual stream that enters
  A* norm1;              // (N, C)
  float *mean1, *rstd1;  // (N) of norm1; mean: LayerNorm only
  A* qkv;                // (N, (NH + 2 NKV) HS)
  A* rotated;  // (N, (NH + NKV) HS) q and k after norm and RoPE: qwen3 in training; else in place
  A* att;      // (N, NH HS)
  float* lse;  // (NH, N) log of the sum of exp of a row's scores
  A* mid;      // (N, C) the stream after attention
  A* norm2;    // (N, C)
  float *mean2, *rstd2;  // (N)
  A* up;                 // (N, 2F) gate and up; gpt2: (N, F)
  A* act;                // (N, F)
};
template <class A>
struct Activations;  // those of all layers, and of what surrounds them
template <class A>
struct Weights;

// A prompt's tokens in one call: products of 4,096 rows fill a GPU.
inline constexpr int kCudaPrefillTokens = 4096;

class Memory;
class Graphs;
using GraphKey = std::vector<int64_t>;
struct Machine;
struct Product;
template <class A>
struct AttentionInput;  // where attention finds q, k and v

// A batch as the device reads it, and what it writes back. Inputs lie side by side, as the host
// packs them: one copy brings them. Where each lies follows from N, the rows of logits and the
// kinds of weights, all of which are in a graph's key.
struct DeviceBatch {
  unsigned char* inputs;                                            // room for all inputs
  int *tokens = nullptr, *targets = nullptr, *positions = nullptr;  // (N)
  int *doc_start = nullptr, *doc_end = nullptr;                     // (N) of each position
  int* row_of = nullptr;             // (rows) position of each row of logits; -1: none
  int* live_tokens = nullptr;        // (1) those that are not dead rows
  unsigned char* weights = nullptr;  // where those begin that are there:
  float *dlogp = nullptr, *dentropy = nullptr, *dvalue = nullptr;  // (N), or null
  float *logp, *entropy, *value;                                   // (N) results

  static size_t input_bytes(int64_t N, bool train);
  void lay_out(int64_t N, bool train, Memory& memory);
};

template <class A>
static void embed_forward(A* x, const A* wte, const A* wpe, const int* tokens, const int* positions,
                          int N, int C, cudaStream_t stream);
template <class A>
static void embed_backward(float* dtable, const A* dx, const int* ids, const int* live, int N,
                           int C, int rows, void* scratch, cudaStream_t stream);
template <class A>
static void swiglu_forward(A* y, const A* gate_up, int N, int F, cudaStream_t stream);
template <class A>
static void swiglu_backward(A* dgate_up, const A* dy, const A* gate_up, int N, int F,
                            cudaStream_t stream);

template <class A>
class CudaGpt final : public Gpt {
 public:
  CudaGpt(const Config& config, const GptOptions& options);
  ~CudaGpt() override;

  // The whole forward pass, to log-probabilities of the targets or to the scalar head's values.
  void forward(const Batch& batch, Pass pass) override {
    if (pass == Pass::train) expect_trainable("forward", train_);
    begin(batch);
    send_batch();
    run_graph(key(kForward), [&] {
      trunk_forward();
      head_forward();
    });
    forward_is_live_ = pass == Pass::train;
    logits_kept_ = rows_ <= a_.logit_rows;
  }

  // dL/dlogp, dL/dvalue and dL/dentropy of each position go back through the last forward pass.
  void backward(std::span<const float> dlogp, std::span<const float> dvalue,
                std::span<const float> dentropy) override {
    expect_trainable("backward", train_);
    if (!forward_is_live_) fail("backward: no forward with Pass::train came before");
    begin_weights();
    pack_weights(dlogp, dvalue, dentropy);
    send_batch();
    begin_gradients();
    run_graph(key(logits_kept_ ? kBackwardOfLogits : kBackward), [&] {
      head_backward(logits_kept_);
      trunk_backward();
    });
    forward_is_live_ = false;
  }

  // The same two for weights that are known beforehand: the logits are made once.
  void forward_backward(const Batch& batch, std::span<const float> dlogp,
                        std::span<const float> dvalue, std::span<const float> dentropy) override {
    expect_trainable("forward_backward", train_);
    begin(batch);
    pack_weights(dlogp, dvalue, dentropy);
    send_batch();
    begin_gradients();
    run_graph(key(kForwardBackward), [&] {
      trunk_forward();
      if (config_.head == Head::scalar) head_forward();
      head_backward(false);
      trunk_backward();
    });
    forward_is_live_ = false;
  }

  // Clips the gradient and steps every trainable tensor by its optimizer. Learning rates change
  // from step to step, so the kernels that take them stay out of the recorded graph.
  void update(const OptimizerStep& step) override {
    if (!train_) fail("update: an inference model has no gradients");
    clear_zeroed_gradients();
    run_graph({kUpdate, std::bit_cast<int32_t>(step.max_norm),
               std::bit_cast<int32_t>(step.muon_momentum)},
              [&] {
                clip_gradients(step.max_norm);
                muon_directions(step.muon_momentum);
              });
    muon_step(step);
    adamw_step(step);
    gradients_zeroed_ = true, forward_is_live_ = false;
    optimizer_->history.add(optimizer_->step.data(), stream_);
  }

 private:
  // From tokens to final_norm. The products of o and down add the stream to what they make.
  // `attend` makes a.att from q, k and v: over documents, or over a KV cache.
  template <class Attend>
  void layers_forward(int64_t N, const Activations<A>& acts, const int* tokens,
                      const int* positions, Attend&& attend) const {
    const LayerActivations<A>& layer0 = acts.layers[0];
    embed_forward(layer0.x, weights_->matrix(table_.wte), weights_->matrix(table_.wpe), tokens,
                  positions, int(N), config_.C, stream_);
    for (int l = 0; l < config_.L; l++) {
      const Block& b = table_.blocks[size_t(l)];
      const LayerActivations<A>& a = acts.layers[size_t(l)];
      norm(N, b.norm1, a.x, a.norm1, a.mean1, a.rstd1);
      layer_forward(N, l, acts, positions, attend);
      linear(N, b.down, a.act, l + 1 < config_.L ? acts.layers[size_t(l) + 1].x : acts.x, acts,
             a.mid);
    }
    norm(N, table_.final_norm, acts.x, acts.final_norm, acts.final_mean, acts.final_rstd);
  }

  // One layer from a.norm1 to a.act: its down product is the caller's.
  template <class Attend>
  void layer_forward(int64_t N, int l, const Activations<A>& acts, const int* positions,
                     Attend&& attend) const {
    const Block& b = table_.blocks[size_t(l)];
    const LayerActivations<A>& a = acts.layers[size_t(l)];
    linear(N, b.qkv, a.norm1, a.qkv, acts);
    rotate(N, positions, b, a.qkv, a.rotated);
    attend(heads_of(a.qkv, a.rotated), a, l);
    linear(N, b.o, a.att, a.mid, acts, a.x);
    norm(N, b.norm2, a.mid, a.norm2, a.mean2, a.rstd2);
    if (config_.has_gate()) {
      linear(N, b.up, a.norm2, a.up, acts);
      swiglu_forward(a.act, a.up, int(N), config_.F, stream_);
    } else {
      linear_gelu(N, b.up, a.norm2, a.up, a.act, acts);
    }
  }

  void trunk_forward() {
    layers_forward(N_, a_, batch_.tokens, batch_.positions,
                   [&](const auto& in, auto& a, int) { attend_batch(in, a); });
  }

  // From a_.dx, the gradient of the stream that leaves the last layer, down to the embeddings.
  // a_.dx stays the stream's gradient: each half-layer's norm adds what came back through that
  // half.
  void trunk_backward() {
    for (int l = config_.L - 1; l >= 0; l--) {
      const Block& b = table_.blocks[size_t(l)];
      const LayerActivations<A>& a = a_.layers[size_t(l)];
      if (saved_ != Saved::all && l + 1 < config_.L) {  // the last layer's are still there
        norm(N_, b.norm1, a.x, a.norm1, a.mean1, a.rstd1);
        if (saved_ == Saved::light) {
          norm(N_, b.norm2, a.mid, a.norm2, a.mean2, a.rstd2);
          activate(a.act, a.up);
        } else {
          layer_forward(N_, l, a_, batch_.positions,
                        [&](const auto& in, auto& acts, int) { attend_batch(in, acts); });
        }
      }
      // The norm above each stream has added the bias gradients of down and o.
      bool bias = true;  // up's is still to be added
      if (config_.has_gate()) {
        linear_backward(b.down, a.act, a_.dx, a_.dact, false);
        swiglu_backward(a_.dup, a_.dact, a.up, N_, config_.F, stream_);
      } else {
        bias = !linear_gelu_backward(b, a, a_.dx, a_.dup);
      }
      linear_backward(b.up, a.norm2, a_.dup, a_.dnorm, bias);
      stream_norm_backward(b.norm2, a_.dnorm, a.mid, a.mean2, a.rstd2, &b.o);
      linear_backward(b.o, a.att, a_.dx, a_.dnorm, false);
      attend_batch_backward(heads_of(a.qkv, a.rotated), a);
      rotate_backward(b, a);
      linear_backward(b.qkv, a.norm1, a_.dqkv, a_.dnorm);
      stream_norm_backward(b.norm1, a_.dnorm, a.x, a.mean1, a.rstd1,
                           l > 0 ? &table_.blocks[size_t(l) - 1].down : nullptr);
    }
    if (!gradient(table_.wte)) return;  // frozen, and the positions with it
    embed_backward(gradient(table_.wte), a_.dx, batch_.tokens, batch_.live_tokens, N_, config_.C,
                   config_.V, a_.scratch, stream_);
    if (table_.wpe >= 0) {
      embed_backward(gradient(table_.wpe), a_.dx, batch_.positions, batch_.live_tokens, N_,
                     config_.C, config_.T, a_.scratch, stream_);
    }
  }

  // The pieces, in the order of the file.

  // The batch, its results, the gradients
  void begin(const Batch& batch);
  void begin_weights();
  void pack_weights(std::span<const float> dlogp, std::span<const float> dvalue,
                    std::span<const float> dentropy);
  void send_batch();
  std::span<const float> fetch(std::vector<float>& host, const float* device, Head head);
  float* gradient(int64_t offset) const {  // null: nothing is there, or it is frozen
    if (offset < frozen_ || offset < 0) return nullptr;
    return optimizer_->gradients.data() + offset - frozen_;
  }
  void clear_zeroed_gradients() {  // before something adds to them
    if (gradients_zeroed_) optimizer_->gradients.clear(stream_);
    gradients_zeroed_ = false;
  }
  void begin_gradients();

  // x, y, dy (N, C); mean, rstd (N)
  float eps() const { return float(config_.norm_eps); }
  void norm(int64_t N, const Norm& n, const A* x, A* y, float* mean, float* rstd) const;
  // summand: the linear layer whose output the stream took in last before this norm (null: none);
  // the stream's gradient is also its output's, so that the kernel adds the gradient of its bias.
  void stream_norm_backward(const Norm& n, const A* dy, const A* x, const float* mean,
                            const float* rstd, const Linear* summand);

  // x, dx (N, in); y, residual, dy (N, out). residual (not y): what is added to y, or null. bias:
  // add the bias's gradient too
  void linear(int64_t N, const Linear& l, const A* x, A* y, const Activations<A>& acts,
              const A* residual = nullptr) const;
  void linear_backward(const Linear& l, const A* x, const A* dy, A* dx, bool bias = true) const;
  void weight_backward(const Linear& l, const A* x, const A* dy, bool bias) const;
  void add_weight_gradient(const Linear& l, const A* x, const A* dy, float* dweight,
                           float* dbias) const;
  Product linear_product(int64_t N, const Linear& l, const A* x, A* y) const;
  Product input_gradient_product(int64_t N, const Linear& l, const A* dy, A* dx) const;
  Product weight_gradient_product(int64_t N, const Linear& l, const A* x, const A* dy) const;
  void matmul(const Product& p) const;
  bool has_adapters(const Linear& l) const { return adapters_ && !l.adapters.empty(); }
  void adapters_forward(int64_t N, const Linear& l, const A* x, A* y,
                        const Activations<A>& acts) const;
  void adapters_backward(const Linear& l, const A* x, const A* dy, A* dx) const;
  void adapter_inner(int64_t N, const Linear& l, const Adapter& a, const A* x, A* inner) const;
  void adapter_gradient(int64_t M, int64_t N, const A* a, int64_t lda, const A* b,
                        int64_t offset) const;

  // qkv (N, (NH + 2 NKV) HS); rotated (N, (NH + NKV) HS) or null
  AttentionInput<A> heads_of(const A* qkv, const A* rotated) const;
  void extend_rope(int positions) {
    if (config_.family == Family::gpt2) return;
    if (resources_->rope.extend(positions, stream_)) resources_->graphs.clear();
  }
  void rotate(int64_t N, const int* positions, const Block& b, A* qkv, A* rotated) const;
  void rotate_backward(const Block& b, const LayerActivations<A>& a);
  void attend_batch(const AttentionInput<A>& in, const LayerActivations<A>& a) const;
  void attend_batch_backward(const AttentionInput<A>& in, const LayerActivations<A>& a) const;

  void activate(A* act, const A* up) const;  // the live batch's
  void linear_gelu(int64_t N, const Linear& l, const A* x, A* up, A* act,
                   const Activations<A>& acts) const;
  bool linear_gelu_backward(const Block& b, const LayerActivations<A>& a, const A* dy,
                            A* dup) const;

  // Rows begin .. begin + rows - 1 of the logits
  const A* head_input(int64_t begin, int64_t rows) const;
  void classify(int64_t begin, int64_t rows, bool backward) const;
  void head_forward();
  void head_backward(bool logits_ready);

  void clip_gradients(float max_norm) const;
  void muon_directions(float momentum) const;
  void muon_step(const OptimizerStep& step) const;
  void adamw_step(const OptimizerStep& step) const;

  enum Recorded : int64_t {
    kForward,
    kBackward,
    kBackwardOfLogits,
    kForwardBackward,
    kUpdate,
    kDecode,
  };
  GraphKey key(Recorded what) const {  // all that a pass over the live batch passes by value
    return {what,       N_,          rows_,         gathered_,
            has_dlogp_, has_dvalue_, has_dentropy_, std::bit_cast<int32_t>(inverse_temperature_),
            adapters_,  overwrites_};
  }
  template <class Work>
  void run_graph(const GraphKey& key, Work&& work) {
    resources_->graphs.run(key, stream_, work);
  }
  template <class Compute>
  bool fused_is_faster(const char* what, int64_t N, const Linear& l, Compute&& compute) const;
  template <class Compute>
  bool bias_gradient_is_fused(const char* what, const Linear& l, Compute&& compute) const;
  bool try_matmul(const Product& p) const;
  void reserve(int64_t N);
  void clear(void* p, size_t bytes) const;
  void wait() const;
  struct Slice {  // a tensor on the device; null where it has none
    float* data;
    A* copy;  // a weight's in bf16
  };
  Slice slice(int tensor, Slot slot) const;

 public:
  UpdateStats stats(int updates_ago) override;
  bool queues_work() const override { return true; }
  void zero_gradients() override {
    gradients_zeroed_ = true;
    if (train_) clear(&optimizer_->step.data()->loss_so_far, sizeof(double));
  }
  std::map<std::string, std::string> tuned_plans() const override;
  void set_tuned_plans(const std::map<std::string, std::string>& plans) override;

  std::span<const float> logp() override { return fetch(logp_, batch_.logp, Head::lm); }
  std::span<const float> entropy() override { return fetch(entropy_, batch_.entropy, Head::lm); }
  std::span<const float> value() override { return fetch(value_, batch_.value, Head::scalar); }

  std::unique_ptr<KvCache> make_cache(int64_t limit, CacheType type) override;
  void decode(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
              bool logits) override;
  int prefill_tokens() const override { return kCudaPrefillTokens; }

  void read(int tensor, Slot slot, std::span<float> out) const override;
  void write(int tensor, Slot slot, std::span<const float> in) override;

  Graphs& graphs() { return resources_->graphs; }  // of this model

  // What decode allocates for calls of the size that the options name.
  static int64_t decoding_bytes(const Config& config, const GptOptions& options);

  double datasheet_operations() const override;

 private:
  std::shared_ptr<Machine> machine_;
  cudaStream_t stream_;
  bool train_;
  Saved saved_;
  int64_t frozen_;  // where the table's trainable rows begin
  std::shared_ptr<Weights<A>> weights_;
  // The gradients count as zero: the next backward pass writes those that are one product each and
  // clears the others before it adds.
  bool gradients_zeroed_ = true;
  bool overwrites_ = false;  // the live backward pass is that one

  Activations<A> a_{};
  DeviceBatch batch_{};
  int64_t capacity_ = 0;  // tokens that these two have room for

  // The live batch
  int N_ = 0;              // rows, dead ones too: padded_tokens(live_tokens_)
  int live_tokens_ = 0;    // of the caller's batch
  int64_t rows_ = 0;       // of logits: positions that have a target, and dead rows
  bool gathered_ = false;  // not every position has a target
  bool has_dlogp_ = false, has_dvalue_ = false, has_dentropy_ = false;
  float inverse_temperature_ = 1;
  std::vector<float> logp_, entropy_, value_;  // empty until they are asked for
  bool forward_is_live_ = false, logits_kept_ = false;

  struct Optimizer;  // gradients, moments and scratch: training only
  std::unique_ptr<Optimizer> optimizer_;
  struct Decoding;  // its own activations: it does not disturb a live forward
  std::unique_ptr<Decoding> decoding_;
  struct Resources;  // memory, graphs, and what waits to be copied
  std::unique_ptr<Resources> resources_;
};

// =============================================================================================
// 2. Vocabulary: what kernels and their launchers are written with

// Throw Error when a call fails; `what` names it.
static void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail("cuda: ", what, ": ", cudaGetErrorString(status));
}
static void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuda: ", what, ": cuBLASLt's status ", int(status));
}
static cudaDeviceProp device_properties() {
  int device = 0;
  cudaDeviceProp properties{};
  check(cudaGetDevice(&device), "the device");
  check(cudaGetDeviceProperties(&properties, device), "its properties");
  return properties;
}

// `count` elements on the device under a name; when there is no room, the error says what lowers
// it.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const char* name, int64_t count, const char* lower) : size_(count) {
    if (count == 0) return;
    const cudaError_t status = cudaMalloc(reinterpret_cast<void**>(&data_), bytes());
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // clears the error, which is reported here
      size_t free = 0, total = 0;
      check(cudaMemGetInfo(&free, &total), "free memory");
      fail("out of memory on the GPU: ", name, " takes ", bytes_text(double(bytes())), ", found ",
           bytes_text(double(free)), " free of ", bytes_text(double(total)), "; lower ", lower);
    }
    check(status, name);
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (data_) cudaFree(data_);
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  size_t bytes() const { return size_t(size_) * sizeof(T); }
  void clear(cudaStream_t stream) const {
    if (size_ > 0) check(cudaMemsetAsync(data_, 0, bytes(), stream), "clearing memory");
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Queue a copy of `count` elements. The caller waits before it reads what came to the host.
template <class T>
static void copy_to_device(T* dst, const T* src, size_t count, cudaStream_t stream,
                           const char* what) {
  check(cudaMemcpyAsync(dst, src, count * sizeof(T), cudaMemcpyHostToDevice, stream), what);
}
template <class T>
static void copy_to_host(T* dst, const T* src, size_t count, cudaStream_t stream,
                         const char* what) {
  check(cudaMemcpyAsync(dst, src, count * sizeof(T), cudaMemcpyDeviceToHost, stream), what);
}

// Starts `kernel` with `shared` bytes of shared memory. `name` stands in the error when it fails.
template <class... Parameters, class... Arguments>
static void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared, cudaStream_t stream, Arguments... arguments) {
#ifdef CAKE_CUDA_ON_CPU
  cuda_on_cpu::name_next_launch(name);
#endif
  cudaError_t status = cudaSuccess;
  if (shared > 48 << 10) {
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared, config.stream = stream;
  if (status == cudaSuccess) {
    status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  if (status != cudaSuccess) {
    fail("cuda: kernel ", name, " with grid (", grid.x, ", ", grid.y, ", ", grid.z, "), block ",
         block.x, ", ", shared, " bytes of shared memory: ", cudaGetErrorString(status));
  }
}

static unsigned blocks_for(int64_t n, int64_t each) { return unsigned((n + each - 1) / each); }
static int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// 16 bytes at once: 4 floats or 8 bf16. `p` is 16-byte aligned.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

#ifdef CAKE_CUDA_ON_CPU

using cuda_on_cpu::exp2_approx;    // see below
using cuda_on_cpu::shared_memory;  // template <class T>
template <class T>
inline Pack<T> load_pack(const T* p) {
  cuda_on_cpu::check_aligned(p, 16);
  Pack<T> r;
  std::memcpy(&r, p, 16);
  return r;
}
template <class T>
inline void store_pack(T* p, const Pack<T>& r) {
  cuda_on_cpu::check_aligned(p, 16);
  std::memcpy(p, &r, 16);
}

#else

// The block's dynamic shared memory; 128-byte aligned.
template <class T>
__device__ inline T* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}
template <class T>
__device__ inline Pack<T> load_pack(const T* p) {
  Pack<T> r;
  *reinterpret_cast<float4*>(&r) = *reinterpret_cast<const float4*>(p);
  return r;
}
template <class T>
__device__ inline void store_pack(T* p, const Pack<T>& r) {
  *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(&r);
}
// 2^x, good to 2 bits of the last place
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ inline T from_float(float x) {  // to the nearest
  return T(x);
}

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Over the 32 lanes of a warp; every lane gets the result, summed in one fixed order (a butterfly).
__device__ inline float warp_sum(float x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}
struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
// The sum of the warp's lanes up to this one, in integers.
template <class T>
__device__ inline T warp_scan(T x) {
  for (int d = 1; d < 32; d *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, d);
    if (int(threadIdx.x) % 32 >= d) x += before;
  }
  return x;
}
// Over the block's threads (a multiple of 32, at most 1,024); every thread gets the result.
// `scratch` is 32 floats of shared memory that no one else uses; all threads call.
__device__ inline float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.f);
}
__device__ inline float block_max(float x, float* scratch) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : -INFINITY);
}

// n elements as floats, by whole packs when n is a multiple of theirs.
template <class T, int n>
__device__ inline void load_floats(float (&x)[n], const T* p) {
  constexpr int kSize = Pack<T>::kSize;
  if constexpr (n % kSize == 0) {
    for (int i = 0; i < n; i += kSize) {
      const Pack<T> pack = load_pack(p + i);
      for (int j = 0; j < kSize; j++) x[i + j] = to_float(pack.v[j]);
    }
  } else {
    for (int i = 0; i < n; i++) x[i] = to_float(p[i]);
  }
}
template <class T, int n>
__device__ inline void store_floats(T* p, const float (&x)[n]) {
  constexpr int kSize = Pack<T>::kSize;
  if constexpr (n % kSize == 0) {
    for (int i = 0; i < n; i += kSize) {
      Pack<T> pack;
      for (int j = 0; j < kSize; j++) pack.v[j] = from_float<T>(x[i + j]);
      store_pack(p + i, pack);
    }
  } else {
    for (int i = 0; i < n; i++) p[i] = from_float<T>(x[i]);
  }
}

// Launchers queue and return: they neither allocate nor wait, and scratch is handed in.
//
// Nearly all kernels are bound by memory. They are fast when each byte moves once, 16 at a time,
// and when enough loads are under way: so most kernels are templates on W, the neighbours a thread
// takes at once, which is a Pack's worth where rows and pointers are multiples of 16 bytes and
// else 1. Rows go to warps: lane l has elements l W .. l W + W - 1, then those 32 W further on; a
// warp needs no barrier. Gradients of vectors are sums over all rows: blocks sum theirs into
// partial rows, and column_sums adds those, both in an order that depends on the shape alone.

inline constexpr int kRowThreads = 256;  // of kernels whose rows go to warps
// Of kernels in which one large block does the work. Their __launch_bounds__ make the compiler stay
// within 64 registers: a block has 65,536, and a launch that needs more fails on every GPU.
inline constexpr int kBlockThreads = 1024;
inline constexpr int kPartialRows = 512;                // blocks that sum for column_sums, at most
inline constexpr size_t kRowShared = size_t(64) << 10;  // bytes such a block takes, where it can
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = .6931471805599453f;
// Running maxima begin here: below any score, but finite. From -inf, a row that has met only masked
// keys would compute exp(-inf + inf), which is NaN. And p log p of a logit of kLowest is 0.
inline constexpr float kLowest = -1e30f;

// Grids of one warp a row, with kRowThreads threads a block.
static dim3 warp_rows(int N) { return blocks_for(N, kRowThreads / 32); }

// Tokens of a batch, at most: attention's grids have a row of blocks for every 32 to 128 tokens,
// and CUDA allows 65,535 of them.
inline constexpr int kFewestTileRows = 32;
inline constexpr int64_t kMostTokens = int64_t(65535) * kFewestTileRows;
static void check_tokens(const char* what, int64_t N, const char* lower) {
  if (N <= kMostTokens) return;
  fail(what, ": found ", N, " tokens at once, expected at most ", kMostTokens,
       " on a CUDA device (65535 blocks of ", kFewestTileRows, " in attention's grid): lower ",
       lower);
}

// Rows that a batch of N tokens takes: the next multiple of 64, and from 2,048 on of a sixteenth to
// a 32nd of N. Dead rows (see CudaGpt::begin) fill it up, so that the products and the graphs of
// batches whose N differs are the same. A multiple of its step stays what it is.
inline bool rounds_up_batches = true;  // a test compares with a batch that has no dead rows
static int64_t padded_tokens(int64_t N) {
  if (!rounds_up_batches) return N;
  const int64_t step = std::max<int64_t>(64, int64_t(std::bit_floor(uint64_t(N))) / 16);
  return std::min(round_up(N, step), kMostTokens);
}

// Rows that decoding one token of each of R sequences takes: a power of two to 8, then the next
// multiple of 8.
static int64_t padded_rows(int64_t R) {
  if (!rounds_up_batches) return R;
  return R <= 8 ? int64_t(std::bit_ceil(uint64_t(R))) : round_up(R, 8);
}

// Whether all these pointers, and what lies a multiple of `strides` elements of A further on, can
// be read by packs. strides: row lengths, or'ed.
template <class A, class... Pointers>
static bool by_packs(int64_t strides, const Pointers*... pointers) {
  return strides % Pack<A>::kSize == 0 &&
         (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

// out[s][c] += sum_r in[r, s, c] for the pointers of out that are not null, the sets, in order.
// out (up to 3) of (columns); in (count, sets, columns)
static void column_sums(std::array<float*, 3> out, const float* in, int count, int columns,
                        cudaStream_t stream);

// =============================================================================================
// 3. The layers, in the order in which the data meets them
//
// cake/layers.h (plain::) has their definitions as loops.

// ---------------------------------------------------------------------------------------------
// A batch, and where gradients go

// Everything a pass over N tokens writes.
template <class A>
struct Activations {
  std::vector<LayerActivations<A>> layers;
  A* x;           // (N, C) the stream that leaves the last layer
  A* final_norm;  // (N, C)
  float *final_mean, *final_rstd;
  A* head_in;              // (logit_rows, C) rows of final_norm that have a target
  A* logits;               // (logit_rows, padded V)
  A* dhead_in;             // (logit_rows, C)
  A *dx, *dnorm;           // (N, C), (N, max(C, NH HS))
  A* dqkv;                 // (N, qkv)
  A *dact, *dup;           // (N, F), (N, 2F or F)
  A* inner;                // (N, rank) of the adapter at hand
  float* att_dot;          // (NH, N) attention's, sum of dout out
  float* bias_sums;        // (widest bias) a fused epilogue's result
  unsigned char* scratch;  // of whichever kernel runs

  int64_t logit_rows = 0;  // made at a time

  // `rows`: of logits that a pass over N tokens may ask for; `rank`: of adapters
  void lay_out(const Config& c, int rank, int64_t N, int64_t rows, Saved saved, Memory& memory);
};

// Rows of logits that a batch of N rows takes where so many of its tokens have a target.
static int64_t padded_logit_rows(int64_t targets, int64_t N) {
  const int64_t step = std::max<int64_t>(128, int64_t(std::bit_floor(uint64_t(N))) / 16);
  return std::min(round_up(targets, step), round_up(N, 128));
}

// Checks a batch and packs it for the device.
//
// Behind its tokens come dead rows, up to padded_tokens(N): token 0 at position 0, each a document
// of its own, without target and with weights 0. All that is computed from them is finite, and what
// they add to a gradient is exactly 0, at the end of each sum; the embedding's sums, whose split
// depends on how often an id occurs, leave them out. So a batch gives the same bytes with and
// without them where sums over rows are split alike: a kernel splits those of biases by every 64
// rows, up to 256 parts, and cuBLASLt may choose another algorithm for another number of rows.
template <class A>
void CudaGpt<A>::begin(const Batch& batch) {
  const auto N = int64_t(batch.tokens.size());
  const auto& starts = batch.doc_starts;
  const bool lm = config_.head == Head::lm;
  check_batch(config_, batch);
  check_tokens("batch", N, "--micro-batch-tokens");
  const int64_t padded = padded_tokens(N);
  std::vector<int> doc_start(static_cast<size_t>(padded)), doc_end(doc_start);
  std::vector<int> positions(static_cast<size_t>(N));
  int longest = 0;
  for (size_t d = 0; d + 1 < starts.size(); d++) {
    const int length = starts[d + 1] - starts[d];
    longest = std::max(longest, length);
    for (int t = 0; t < length; t++) {
      const auto n = size_t(starts[d] + t);
      positions[n] = t, doc_start[n] = starts[d], doc_end[n] = starts[d + 1];
    }
  }
  for (int64_t n = N; n < padded; n++) {
    doc_start[size_t(n)] = int(n), doc_end[size_t(n)] = int(n) + 1;
  }
  std::vector<int> rows;
  for (int64_t n = 0; lm && n < N; n++)
    if (batch.targets[size_t(n)] >= 0) rows.push_back(int(n));
  gathered_ = int64_t(rows.size()) < N;
  rows_ = gathered_ ? padded_logit_rows(int64_t(rows.size()), padded) : padded;
  forward_is_live_ = logits_kept_ = overwrites_ = false;
  reserve(padded);
  extend_rope(longest);
  N_ = int(padded), live_tokens_ = int(N);
  inverse_temperature_ = 1 / batch.temperature;
  logp_.clear(), entropy_.clear(), value_.clear();

  auto& staging = resources_->staging;
  staging.begin(batch_.inputs, DeviceBatch::input_bytes(capacity_, train_));
  batch_.tokens = staging.pack(batch.tokens, padded, 0);
  batch_.targets = staging.pack(batch.targets, lm ? padded : 0, -1);
  batch_.positions = staging.pack(positions, padded, 0);
  batch_.doc_start = staging.pack(doc_start, padded, 0);
  batch_.doc_end = staging.pack(doc_end, padded, 0);
  batch_.row_of = staging.pack(rows, rows_, -1);
  batch_.live_tokens = staging.pack(std::array{live_tokens_}, 1, 0);
  batch_.weights = staging.end();
  pack_weights({}, {}, {});
}

// Begins to pack weights for the batch that is on the device.
template <class A>
void CudaGpt<A>::begin_weights() {
  resources_->staging.begin(batch_.weights, DeviceBatch::input_bytes(capacity_, train_));
}

// Checks the weights of the positions and packs them.
template <class A>
void CudaGpt<A>::pack_weights(std::span<const float> dlogp, std::span<const float> dvalue,
                              std::span<const float> dentropy) {
  check_weights(config_, live_tokens_, dlogp, dvalue, dentropy);
  has_dlogp_ = !dlogp.empty(), has_dvalue_ = !dvalue.empty(), has_dentropy_ = !dentropy.empty();
  const auto pack = [&](std::span<const float> weights) {
    return resources_->staging.pack(weights, weights.empty() ? 0 : N_, 0.f);
  };
  batch_.dlogp = pack(dlogp), batch_.dvalue = pack(dvalue), batch_.dentropy = pack(dentropy);
}

template <class A>
void CudaGpt<A>::send_batch() {
  resources_->staging.send(stream_);
}

// x[s.offset .. s.offset + s.size - 1] = 0 for each stretch s: a block has one. stretches (count)
struct Stretch {
  int64_t offset, size;
};
__global__ void clear_stretches_kernel(float* x, const Stretch* stretches) {
  const Stretch s = stretches[blockIdx.x];
  for (int64_t i = threadIdx.x; i < s.size; i += blockDim.x) x[s.offset + i] = 0;
}
static void clear_stretches(float* x, const Stretch* stretches, int count, cudaStream_t stream) {
  if (count == 0) return;
  launch("clear_stretches", clear_stretches_kernel, unsigned(count), kRowThreads, 0, stream, x,
         stretches);
}

// Gradients of matrices in the blocks, and of a head of logits, are one product each, which writes
// them in the first backward pass of a step. All others are cleared, since what makes them adds.
template <class A>
void CudaGpt<A>::begin_gradients() {
  overwrites_ = gradients_zeroed_;
  gradients_zeroed_ = false;
  if (!overwrites_) return;
  const Optimizer& o = *optimizer_;
  for (const Stretch& s : o.long_stretches) {
    clear(o.gradients.data() + s.offset, size_t(s.size) * sizeof(float));
  }
  clear_stretches(o.gradients.data(), o.short_stretches.data(), int(o.short_stretches.size()),
                  stream_);
  const Linear& head = table_.head;
  if (config_.head == Head::lm && rows_ == 0 && gradient(head.weight)) {  // then no product comes
    clear(gradient(head.weight), size_t(head.out) * size_t(head.in) * sizeof(float));
  }
}

// (N) results of the last forward; waits for the device the first time.
template <class A>
std::span<const float> CudaGpt<A>::fetch(std::vector<float>& host, const float* device, Head head) {
  if (config_.head != head || N_ == 0) return {};
  if (host.empty()) {
    host.resize(size_t(live_tokens_));
    copy_to_host(host.data(), device, host.size(), stream_, "results");
    wait();
  }
  return host;
}

// ---------------------------------------------------------------------------------------------
// Embeddings. The gradient needs a sort: section 6.

// x[n] = wte[tokens[n]] + wpe[positions[n]]. x (N, C), wte (V, C), wpe (T, C) or null
template <class A, int W>
__global__ void embed_forward_kernel(A* x, const A* wte, const A* wpe, const int* tokens,
                                     const int* positions, int N, int C) {
  const int64_t n = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (n >= N) return;
  const A* token = wte + int64_t(tokens[n]) * C;
  const A* position = wpe ? wpe + int64_t(positions[n]) * C : nullptr;
  for (int c = threadIdx.x % 32 * W; c < C; c += 32 * W) {
    float v[W], p[W];
    load_floats(v, token + c);
    if (position) {
      load_floats(p, position + c);
      for (int j = 0; j < W; j++) v[j] += p[j];
    }
    store_floats(x + n * C + c, v);
  }
}
template <class A>
static void embed_forward(A* x, const A* wte, const A* wpe, const int* tokens, const int* positions,
                          int N, int C, cudaStream_t stream) {
  launch("embed_forward",
         by_packs<A>(C, x, wte, wpe) ? embed_forward_kernel<A, Pack<A>::kSize>
                                     : embed_forward_kernel<A, 1>,
         warp_rows(N), kRowThreads, 0, stream, x, wte, wpe, tokens, positions, N, C);
}

// ---------------------------------------------------------------------------------------------
// Norms. x is read once, y written once: a lane keeps its part of the row in shared memory, where
// mean, variance and y find it, whatever C is.

// plain::norm_forward: y = (x - mean) rstd w + b; RMSNorm (bias null): mean 0, no b. y, x (N, C);
// mean, rstd (N) or null; weight (C)
template <class A, int W>
__global__ void norm_forward_kernel(A* y, float* mean_out, float* rstd_out, const A* x,
                                    const float* weight, const float* bias, float eps, int N,
                                    int C) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x * (blockDim.x / 32) + warp;
  if (n >= N) return;
  A* row = shared_memory<A>() + warp * C;
  float v[W], w[W], total = 0, square = 0;
  for (int c = lane * W; c < C; c += 32 * W) {
    load_floats(v, x + n * C + c);
    store_floats(row + c, v);
    for (int j = 0; j < W; j++) total += v[j];
  }
  const float mean = bias ? warp_sum(total) / C : 0;
  for (int c = lane * W; c < C; c += 32 * W) {
    load_floats(v, row + c);
    for (int j = 0; j < W; j++) square += (v[j] - mean) * (v[j] - mean);
  }
  const float rstd = 1 / sqrtf(warp_sum(square) / C + eps);
  for (int c = lane * W; c < C; c += 32 * W) {
    load_floats(v, row + c);
    load_floats(w, weight + c);
    for (int j = 0; j < W; j++) v[j] = (v[j] - mean) * rstd * w[j];
    if (bias) {
      load_floats(w, bias + c);
      for (int j = 0; j < W; j++) v[j] += w[j];
    }
    store_floats(y + n * C + c, v);
  }
  if (lane == 0 && mean_out) mean_out[n] = mean;
  if (lane == 0 && rstd_out) rstd_out[n] = rstd;
}
template <class A>
static void norm_forward(A* y, float* mean, float* rstd, const A* x, const float* weight,
                         const float* bias, float eps, int N, int C, cudaStream_t stream) {
  const size_t row = size_t(C) * sizeof(A);
  const int warps = int(std::clamp<size_t>(kRowShared / row, 1, kRowThreads / 32));
  launch("norm_forward",
         by_packs<A>(C, y, x, weight, bias) ? norm_forward_kernel<A, Pack<A>::kSize>
                                            : norm_forward_kernel<A, 1>,
         blocks_for(N, warps), 32 * warps, warps * row, stream, y, mean, rstd, x, weight, bias, eps,
         N, C);
}
// Where in shared memory a lane keeps a float for each of its columns: the W floats of lane l as
// packs of 4, lanes side by side, so that 16-byte accesses meet all banks.
template <int W>
__device__ inline int column_slot(int c) {
  if constexpr (W == 1) return c;
  const int lane = c / W % 32, j = c % W;
  return c - c % (32 * W) + j / 4 * 128 + lane * 4 + j % 4;
}
template <int W>
__device__ inline void add_to_slots(float* slots, int c, const float (&d)[W]) {
  if constexpr (W == 1) {
    slots[c] += d[0];
  } else {
    for (int j = 0; j < W; j += 4) {
      float* slot = slots + column_slot<W>(c + j);
      Pack<float> sum = load_pack(slot);
      for (int i = 0; i < 4; i++) sum.v[i] += d[j + i];
      store_pack(slot, sum);
    }
  }
}

//
// The kernel reads dy, x and dx, writes dx, once each (the second look at dy and x finds them in
// the cache). A warp's rows are g, g + all warps, ...; its sums, `sets` rows of dw, db (where there
// is a mean) and the columns of dx as it is stored (when sums_dx), stay in shared memory until the
// end.
template <class A, int W>
__global__ void __launch_bounds__(kRowThreads)
    norm_backward_kernel(A* dx, float* partials, const A* dy, const A* x, const float* mean_in,
                         const float* rstd_in, const float* weight, int N, int C, int padded,
                         int sets, bool sums_dx) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool bias = mean_in != nullptr;
  float* shared = shared_memory<float>();  // (warps, sets, padded)
  float *dw = shared + warp * sets * padded, *db = dw + padded, *dx_sums = dw + (sets - 1) * padded;
  for (int c = lane; c < sets * padded; c += 32) dw[c] = 0;
  __syncwarp();
  for (int64_t n = blockIdx.x * warps + warp; n < N; n += gridDim.x * warps) {
    const float mean = bias ? mean_in[n] : 0, rstd = rstd_in[n];
    float v[W], d[W], w[W], g_sum = 0, gh_sum = 0;
    for (int c = lane * W; c < C; c += 32 * W) {
      load_floats(v, x + n * C + c);
      load_floats(d, dy + n * C + c);
      load_floats(w, weight + c);
      for (int j = 0; j < W; j++) {
        const float h = (v[j] - mean) * rstd, g = d[j] * w[j];
        g_sum += g;
        gh_sum += g * h;
        v[j] = d[j] * h;
      }
      if (!partials) continue;
      add_to_slots<W>(dw, c, v);
      if (bias) add_to_slots<W>(db, c, d);
    }
    const float g_mean = bias ? warp_sum(g_sum) / C : 0, gh_mean = warp_sum(gh_sum) / C;
    for (int c = lane * W; c < C; c += 32 * W) {
      float dx_sum[W];
      load_floats(v, x + n * C + c);
      load_floats(d, dy + n * C + c);
      load_floats(w, weight + c);
      load_floats(dx_sum, dx + n * C + c);
      for (int j = 0; j < W; j++) {
        const float h = (v[j] - mean) * rstd;
        dx_sum[j] =
            to_float(from_float<A>(dx_sum[j] + rstd * (d[j] * w[j] - g_mean - h * gh_mean)));
      }
      store_floats(dx + n * C + c, dx_sum);
      if (sums_dx) add_to_slots<W>(dx_sums, c, dx_sum);
    }
  }
  if (!partials) return;
  __syncthreads();
  for (int i = threadIdx.x; i < sets * C; i += blockDim.x) {
    const int set = i / C, c = i % C;
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += shared[(w * sets + set) * padded + column_slot<W>(c)];
    partials[(int64_t(blockIdx.x) * sets + set) * C + c] = sum;
  }
}
static size_t norm_backward_scratch(int N, int C) {  // bytes
  return size_t(std::min(N, kPartialRows)) * 3 * size_t(C) * sizeof(float);
}
// dx_sums (C) += column sums of dx as it is stored, or null. dweight null (frozen): no sums at all
template <class A>
static void norm_backward(A* dx, float* dweight, float* dbias, float* dx_sums, const A* dy,
                          const A* x, const float* mean, const float* rstd, const float* weight,
                          int N, int C, void* scratch, cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  const bool packs = by_packs<A>(C, dx, dy, x, weight);
  const int padded = int(blocks_for(C, 32 * (packs ? kW : 1))) * 32 * (packs ? kW : 1);
  const int sets = dweight ? 1 + (mean != nullptr) + (dx_sums != nullptr) : 0;
  const size_t sums = size_t(sets) * size_t(padded) * sizeof(float);  // of a warp
  const int most = kRowThreads / 32;
  const int warps = sums ? int(std::clamp<size_t>(kRowShared / sums, 1, most)) : most;
  const int blocks = std::min<int>(int(blocks_for(N, warps)), kPartialRows);
  float* partials = dweight ? static_cast<float*>(scratch) : nullptr;  // (blocks, sets, C)
  launch("norm_backward", packs ? norm_backward_kernel<A, kW> : norm_backward_kernel<A, 1>, blocks,
         32 * warps, warps * sums, stream, dx, partials, dy, x, mean, rstd, weight, N, C, padded,
         sets, sets > 0 && dx_sums);
  if (dweight) column_sums({dweight, dbias, dx_sums}, partials, blocks, C, stream);
}

template <class A>
void CudaGpt<A>::norm(int64_t N, const Norm& n, const A* x, A* y, float* mean, float* rstd) const {
  norm_forward<A>(y, mean, rstd, x, weights_->vector(n.weight), weights_->vector(n.bias), eps(),
                  int(N), config_.C, stream_);
}
template <class A>
void CudaGpt<A>::stream_norm_backward(const Norm& n, const A* dy, const A* x, const float* mean,
                                      const float* rstd, const Linear* summand) {
  norm_backward(a_.dx, gradient(n.weight), gradient(n.bias),
                summand ? gradient(summand->bias) : nullptr, dy, x, mean, rstd,
                weights_->vector(n.weight), N_, config_.C, a_.scratch, stream_);
}

// ---------------------------------------------------------------------------------------------
// Linear layers: y = x W^T + b, dx = dy W, dW += dy^T x, db += column sums of dy

enum class Epilogue {
  none,
  bias,           // D = .. + bias[n]
  gelu,           // aux = op(A) op(B) [+ bias[n]], D = GELU(aux)
  dgelu,          // D = op(A) op(B) GELU'(aux), and where there is a bias, bias[n] = sum_m D[m, n]
  bias_gradient,  // and bias[m] = sum_k op(A)[m, k]
};

// D (M, N) = alpha op(A) op(B) + beta C, all row-major; op(A) (M, K), op(B) (K, N). `batch` of
// them, their matrices the given strides apart.
struct Product {
  int64_t M, N, K;
  const void *a, *b;
  void* d;
  cudaDataType_t in, out;                           // of A and B, of C and D
  int64_t lda, ldb, ldd;                            // row strides; C's is D's
  bool a_transposed = false, b_transposed = false;  // stored (K, M), (N, K)
  float alpha = 1, beta = 0;
  const void* c = nullptr;  // null: D itself
  int batch = 1;
  int64_t a_stride = 0, b_stride = 0, d_stride = 0;
  Epilogue epilogue = Epilogue::none;
  const void* bias = nullptr;  // (N) as D; bias_gradient: (M) as D. Both gradients overwrite it
  void* aux = nullptr;         // (M, N) as D, row stride ldd
};

template <class T>
static constexpr cudaDataType_t kDataType = std::is_same_v<T, float> ? CUDA_R_32F : CUDA_R_16BF;

// db[o] += sum_n weight[n] dy[n, o]. db (out), dy (N, out), weight (N) or null: 1
//
// The kernel reads dy once: partials[b, o] is that sum over the rows of block b. Grid: x over
// columns, 32 W a block; y over blocks of rows.
template <class A, int W>
__global__ void column_partials_kernel(float* partials, const A* dy, const float* weight, int N,
                                       int out) {
  float* sums = shared_memory<float>();  // (warps, W, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int c = (blockIdx.x * 32 + lane) * W;
  float sum[W] = {}, d[W];
  if (c < out) {
    for (int64_t n = blockIdx.y * warps + warp; n < N; n += gridDim.y * warps) {
      const float w = weight ? weight[n] : 1;
      load_floats(d, dy + n * out + c);
      for (int j = 0; j < W; j++) sum[j] += w * d[j];
    }
  }
  for (int j = 0; j < W; j++) sums[(warp * W + j) * 32 + lane] = sum[j];
  __syncthreads();
  if (warp > 0 || c >= out) return;
  for (int w = 1; w < warps; w++)
    for (int j = 0; j < W; j++) sum[j] += sums[(w * W + j) * 32 + lane];
  store_floats(partials + int64_t(blockIdx.y) * out + c, sum);
}
static int bias_partial_rows(int N) { return int(std::min(blocks_for(N, 64), 256u)); }
static size_t bias_backward_scratch(int N, int out) {  // bytes
  return size_t(bias_partial_rows(N)) * size_t(out) * sizeof(float);
}
template <class A>
static void bias_backward(float* db, const A* dy, const float* weight, int N, int out,
                          void* scratch, cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  float* partials = static_cast<float*>(scratch);
  const bool packs = by_packs<A>(out, dy, partials);
  const int w = packs ? kW : 1, rows = bias_partial_rows(N);
  launch("column_partials", packs ? column_partials_kernel<A, kW> : column_partials_kernel<A, 1>,
         dim3(blocks_for(out, 32 * w), rows), kRowThreads, kRowThreads * w * sizeof(float), stream,
         partials, dy, weight, N, out);
  column_sums({db}, partials, rows, out, stream);
}
// y += x, a bias's gradient in any type. y, x (n)
template <class T>
__global__ void add_kernel(float* y, const T* x, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] += to_float(x[i]);
}
template <class T>
static void add(float* y, const T* x, int n, cudaStream_t stream) {
  launch("add", add_kernel<T>, blocks_for(n, kRowThreads), kRowThreads, 0, stream, y, x, n);
}

// D (M, N) = A B, A B^T with B stored (N, K), and A^T B with A stored (K, M); rows side by side
template <class A, class T>
static Product product(int64_t M, int64_t N, int64_t K, const A* a, const A* b, T* d) {
  return {M, N, K, a, b, d, kDataType<A>, kDataType<T>, K, N, N};
}
template <class A, class T>
static Product product_abt(int64_t M, int64_t N, int64_t K, const A* a, const A* b, T* d) {
  Product p = product(M, N, K, a, b, d);
  p.b_transposed = true, p.ldb = K;
  return p;
}
template <class A, class T>
static Product product_atb(int64_t M, int64_t N, int64_t K, const A* a, const A* b, T* d) {
  Product p = product(M, N, K, a, b, d);
  p.a_transposed = true, p.lda = M;
  return p;
}

// y (N, out) = x W^T + b
template <class A>
Product CudaGpt<A>::linear_product(int64_t N, const Linear& l, const A* x, A* y) const {
  Product p = product_abt(N, l.out, l.in, x, weights_->matrix(l.weight), y);
  p.epilogue = l.bias >= 0 ? Epilogue::bias : Epilogue::none;
  p.bias = weights_->matrix(l.bias);
  return p;
}
template <class A>
void CudaGpt<A>::linear(int64_t N, const Linear& l, const A* x, A* y, const Activations<A>& acts,
                        const A* residual) const {
  Product p = linear_product(N, l, x, y);
  if (residual) p.c = residual, p.beta = 1;
  matmul(p);
  adapters_forward(N, l, x, y, acts);
}

// dx (N, in) = dy W
template <class A>
Product CudaGpt<A>::input_gradient_product(int64_t N, const Linear& l, const A* dy, A* dx) const {
  return product(N, l.in, l.out, dy, weights_->matrix(l.weight), dx);
}
// dW (out, in) += dy^T x, or dW = dy^T x in the first backward pass of a step
template <class A>
Product CudaGpt<A>::weight_gradient_product(int64_t N, const Linear& l, const A* x,
                                            const A* dy) const {
  Product p = product_atb(l.out, l.in, N, dy, x, gradient(l.weight));
  p.beta = overwrites_ ? 0 : 1;
  return p;
}
// dW += dy^T x, db += column sums of dy unless db is null
template <class A>
void CudaGpt<A>::add_weight_gradient(const Linear& l, const A* x, const A* dy, float* dweight,
                                     float* dbias) const {
  Product p = weight_gradient_product(N_, l, x, dy);
  p.d = dweight;
  if (!dbias) return matmul(p);
  const auto compute = [&](bool fused, float* dweight, float* dbias) {
    p.d = dweight;
    p.epilogue = fused ? Epilogue::bias_gradient : Epilogue::none;
    p.bias = fused ? a_.bias_sums : nullptr;
    if (!try_matmul(p)) return false;
    if (fused) {
      add(dbias, a_.bias_sums, l.out, stream_);
    } else {
      bias_backward<A>(dbias, dy, nullptr, N_, l.out, a_.scratch, stream_);
    }
    return true;
  };
  if (!(bias_gradient_is_fused("bias gradient", l, compute) && compute(true, dweight, dbias))) {
    compute(false, dweight, dbias);
  }
}
template <class A>
void CudaGpt<A>::weight_backward(const Linear& l, const A* x, const A* dy, bool bias) const {
  if (!gradient(l.weight)) return;  // frozen
  add_weight_gradient(l, x, dy, gradient(l.weight), bias ? gradient(l.bias) : nullptr);
}
template <class A>
void CudaGpt<A>::linear_backward(const Linear& l, const A* x, const A* dy, A* dx, bool bias) const {
  weight_backward(l, x, dy, bias);
  matmul(input_gradient_product(N_, l, dy, dx));
  adapters_backward(l, x, dy, dx);
}

// ---------------------------------------------------------------------------------------------
// LoRA, where it takes part: y += u B^T with u = scale x A^T (N, rank). Backward:
// dB += dy^T u;  du = scale dy B;  dA += du^T x;  dx += du A

// u is made in the memory of `in`.
template <class A>
void CudaGpt<A>::adapters_forward(int64_t N, const Linear& l, const A* x, A* y,
                                  const Activations<A>& acts) const {
  if (!adapters_) return;
  for (const Adapter& a : l.adapters) {
    adapter_inner(N, l, a, x, acts.inner);
    Product p =
        product_abt(N, a.out, table_.lora.rank, acts.inner, weights_->matrix(a.b), y + a.begin);
    p.ldd = l.out, p.beta = 1;
    matmul(p);
  }
}
template <class A>
void CudaGpt<A>::adapter_inner(int64_t N, const Linear& l, const Adapter& a, const A* x,
                               A* inner) const {
  Product p = product_abt(N, table_.lora.rank, l.in, x, weights_->matrix(a.a), inner);
  p.alpha = table_.lora.scale();
  matmul(p);
}
// gradient (M, N) += a^T b, a (N_, M) with rows lda apart, b (N_, N)
template <class A>
void CudaGpt<A>::adapter_gradient(int64_t M, int64_t N, const A* a, int64_t lda, const A* b,
                                  int64_t offset) const {
  Product p = product_atb(M, N, N_, a, b, gradient(offset));
  p.lda = lda, p.beta = 1;
  matmul(p);
}
template <class A>
void CudaGpt<A>::adapters_backward(const Linear& l, const A* x, const A* dy, A* dx) const {
  if (!adapters_) return;
  const int r = table_.lora.rank;
  A* inner = a_.inner;
  for (const Adapter& a : l.adapters) {
    adapter_inner(N_, l, a, x, inner);
    adapter_gradient(a.out, r, dy + a.begin, l.out, inner, a.b);
    Product du = product(N_, r, a.out, dy + a.begin, weights_->matrix(a.b), inner);
    du.lda = l.out, du.alpha = table_.lora.scale();
    matmul(du);
    adapter_gradient(r, l.in, inner, r, x, a.a);
    Product back = product(N_, l.in, r, inner, weights_->matrix(a.a), dx);
    back.beta = 1;
    matmul(back);
  }
}

// ---------------------------------------------------------------------------------------------
// QK-norm and RoPE: q and k are read and written once. A head goes to a group of 1 to 32 lanes,
// each of which has W pairs (x[i], x[i + HS/2]) at once; HS up to 256.

// cos and sin of every position so far, (positions, HS/2), made on the host in double.
class RopeTable {
 public:
  explicit RopeTable(const Config& c) : half_(c.HS / 2), T_(c.T), frequency_(rope_frequencies(c)) {}
  // True when the table moved. Grows to the next power of two, at most to T.
  bool extend(int positions, cudaStream_t stream) {
    if (positions <= positions_) return false;
    int capacity = 256;
    while (capacity < positions) capacity *= 2;
    positions_ = std::max(positions, std::min(capacity, T_));
    std::vector<float2> values;
    values.reserve(size_t(positions_) * size_t(half_));
    for (int t = 0; t < positions_; t++)
      for (const double f : frequency_)
        values.push_back({float(std::cos(t * f)), float(std::sin(t * f))});
    table_ = Buffer<float2>("RoPE's table", int64_t(values.size()), "--context");
    copy_to_device(table_.data(), values.data(), values.size(), stream, "RoPE's table");
    check(cudaStreamSynchronize(stream), "RoPE's table");
    return true;
  }
  const float2* data() const { return table_.data(); }

 private:
  int half_, T_, positions_ = 0;
  std::vector<double> frequency_;
  Buffer<float2> table_;
};

template <int W>
inline constexpr int kPairPasses = W == 1 ? 4 : 1;
inline constexpr int kMostHeadSize = 256;

__device__ inline float group_sum(float x, int lanes) {  // over groups of `lanes`, a power of two
  for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}
static int head_lanes(int HS, int W) {
  if (HS > kMostHeadSize) fail("cuda: head size ", HS, ", expected at most ", kMostHeadSize);
  int lanes = 1;
  while (lanes < 32 && lanes * W < HS / 2) lanes *= 2;
  return lanes;
}

// plain::norm_forward over each head of q and k (q_norm, k_norm (HS) null: none), then plain::rope:
// the pair (x[i], x[i + HS/2]) turns by the angle of rope[position, i] = (cos, sin). q, q_in
// (N, NH HS), k, k_in (N, NKV HS) with rows q_ld, k_ld, in_ld apart; q may be q_in and k k_in
template <class A, int W>
__global__ void qk_forward_kernel(A* q, int64_t q_ld, A* k, int64_t k_ld, const A* q_in,
                                  const A* k_in, int64_t in_ld, const float* q_norm,
                                  const float* k_norm, const float2* rope, const int* positions,
                                  float eps, int N, int NH, int NKV, int HS, int lanes) {
  const int half = HS / 2, lane = threadIdx.x % lanes;
  const int64_t item = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const bool in_range =
      item < int64_t(N) * (NH + NKV);  // if not, it only takes part in the shuffles
  const int64_t n = in_range ? item / (NH + NKV) : 0;
  const int head = in_range ? int(item % (NH + NKV)) : 0;
  const bool is_q = head < NH;
  const A* src = (is_q ? q_in : k_in) + n * in_ld + (is_q ? head : head - NH) * HS;
  A* dst = is_q ? q + n * q_ld + head * HS : k + n * k_ld + (head - NH) * HS;
  const float* turns = reinterpret_cast<const float*>(rope + int64_t(positions[n]) * half);

  float a[kPairPasses<W>][W], b[kPairPasses<W>][W], square = 0;
  for (int p = 0; p < kPairPasses<W>; p++) {
    const int i = (p * lanes + lane) * W;
    if (i >= half) continue;
    load_floats(a[p], src + i);
    load_floats(b[p], src + half + i);
    for (int j = 0; j < W; j++) square += a[p][j] * a[p][j] + b[p][j] * b[p][j];
  }
  const float* weight = is_q ? q_norm : k_norm;
  const float rstd = q_norm ? 1 / sqrtf(group_sum(square, lanes) / HS + eps) : 1;
  for (int p = 0; p < kPairPasses<W>; p++) {
    const int i = (p * lanes + lane) * W;
    if (i >= half || !in_range) continue;
    if (weight) {
      float wa[W], wb[W];
      load_floats(wa, weight + i);
      load_floats(wb, weight + half + i);
      for (int j = 0; j < W; j++) a[p][j] *= rstd * wa[j], b[p][j] *= rstd * wb[j];
    }
    float turn[2 * W];  // cos, sin of each pair
    load_floats(turn, turns + 2 * i);
    for (int j = 0; j < W; j++) {
      const float x = a[p][j], y = b[p][j], c = turn[2 * j], s = turn[2 * j + 1];
      a[p][j] = x * c - y * s;
      b[p][j] = y * c + x * s;
    }
    store_floats(dst + i, a[p]);
    store_floats(dst + half + i, b[p]);
  }
}
template <class A>
static void qk_forward(A* q, int64_t q_ld, A* k, int64_t k_ld, const A* q_in, const A* k_in,
                       int64_t in_ld, const float* q_norm, const float* k_norm, const float2* rope,
                       const int* positions, float eps, int N, int NH, int NKV, int HS,
                       cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  const bool packs = HS % 2 == 0 && by_packs<A>(HS / 2 | q_ld | k_ld | in_ld, q, k, q_in, k_in,
                                                q_norm, k_norm, rope);
  const int lanes = head_lanes(HS, packs ? kW : 1);
  launch("qk_forward", packs ? qk_forward_kernel<A, kW> : qk_forward_kernel<A, 1>,
         blocks_for(int64_t(N) * (NH + NKV) * lanes, kRowThreads), kRowThreads, 0, stream, q, q_ld,
         k, k_ld, q_in, k_in, in_ld, q_norm, k_norm, rope, positions, eps, N, NH, NKV, HS, lanes);
}

// Backward of qk_forward, dq and dk in place: turns back, then plain::norm_backward over each head
// (q_norm null: none); dq_norm, dk_norm (HS) += theirs (null: frozen). dq, dk rows ld apart; q_in,
// k_in in_ld.
//
// Blocks y = 0 have q, 1: k. Lanes keep their columns' sums for the norm's gradient in registers.
template <class A, int W>
__global__ void __launch_bounds__(kRowThreads)
    qk_backward_kernel(A* dq, A* dk, int64_t ld, const A* q_in, const A* k_in, int64_t in_ld,
                       const float* q_norm, const float* k_norm, float* partials,
                       const float2* rope, const int* positions, float eps, int N, int NH, int NKV,
                       int HS, int lanes) {
  const int half = HS / 2, lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
  const int heads = blockIdx.y ? NKV : NH;
  const A* in = blockIdx.y ? k_in : q_in;
  A* gradient = blockIdx.y ? dk : dq;
  const float* weight = blockIdx.y ? k_norm : q_norm;
  const int64_t items = int64_t(N) * heads;
  float da[kPairPasses<W>][W] = {}, db[kPairPasses<W>][W] = {};  // of the weights
  for (int64_t begin = int64_t(blockIdx.x) * groups; begin < items;
       begin += int64_t(gridDim.x) * groups) {
    const int64_t item = begin + threadIdx.x / lanes;
    const bool in_range = item < items;
    const int64_t n = in_range ? item / heads : 0, head = in_range ? item % heads : 0;
    A* d = gradient + n * ld + head * HS;
    const A* x = in + n * in_ld + head * HS;
    const float* turns = reinterpret_cast<const float*>(rope + int64_t(positions[n]) * half);

    float a[kPairPasses<W>][W] = {}, b[kPairPasses<W>][W] = {};  // dy, turned back; then dx
    float xa[kPairPasses<W>][W] = {}, xb[kPairPasses<W>][W] = {};
    float square = 0, gx_sum = 0;
    for (int p = 0; p < kPairPasses<W>; p++) {
      const int i = (p * lanes + lane) * W;
      if (i >= half || !in_range) continue;
      float turn[2 * W];
      load_floats(a[p], d + i);
      load_floats(b[p], d + half + i);
      load_floats(turn, turns + 2 * i);
      for (int j = 0; j < W; j++) {
        const float u = a[p][j], v = b[p][j], c = turn[2 * j], s = -turn[2 * j + 1];
        a[p][j] = u * c - v * s;
        b[p][j] = v * c + u * s;
      }
      if (!weight) continue;
      float wa[W], wb[W];
      load_floats(xa[p], x + i);
      load_floats(xb[p], x + half + i);
      load_floats(wa, weight + i);
      load_floats(wb, weight + half + i);
      for (int j = 0; j < W; j++) {
        square += xa[p][j] * xa[p][j] + xb[p][j] * xb[p][j];
        gx_sum += xa[p][j] * a[p][j] * wa[j] + xb[p][j] * b[p][j] * wb[j];
      }
    }
    float rstd = 1, gh_mean = 0;
    if (weight) {
      rstd = 1 / sqrtf(group_sum(square, lanes) / HS + eps);
      gh_mean = group_sum(gx_sum, lanes) * rstd / HS;
    }
    for (int p = 0; p < kPairPasses<W>; p++) {
      const int i = (p * lanes + lane) * W;
      if (i >= half || !in_range) continue;
      if (weight) {
        float wa[W], wb[W];
        load_floats(wa, weight + i);
        load_floats(wb, weight + half + i);
        for (int j = 0; j < W; j++) {
          const float ha = xa[p][j] * rstd, hb = xb[p][j] * rstd;
          da[p][j] += a[p][j] * ha;
          db[p][j] += b[p][j] * hb;
          a[p][j] = rstd * (a[p][j] * wa[j] - ha * gh_mean);
          b[p][j] = rstd * (b[p][j] * wb[j] - hb * gh_mean);
        }
      }
      store_floats(d + i, a[p]);
      store_floats(d + half + i, b[p]);
    }
  }
  if (!partials) return;
  float* sums = shared_memory<float>();  // (groups, HS)
  for (int p = 0; p < kPairPasses<W>; p++) {
    const int i = (p * lanes + lane) * W;
    for (int j = 0; j < W && i < half; j++) {
      sums[threadIdx.x / lanes * HS + i + j] = da[p][j];
      sums[threadIdx.x / lanes * HS + half + i + j] = db[p][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < HS; i += blockDim.x) {
    float sum = 0;
    for (int g = 0; g < groups; g++) sum += sums[g * HS + i];
    partials[(int64_t(blockIdx.x) * 2 + blockIdx.y) * HS + i] = sum;
  }
}
static size_t qk_backward_scratch(int, int HS) {  // bytes
  return size_t(kPartialRows) * 2 * size_t(HS) * sizeof(float);
}
template <class A>
static void qk_backward(A* dq, A* dk, int64_t ld, const A* q_in, const A* k_in, int64_t in_ld,
                        const float* q_norm, const float* k_norm, float* dq_norm, float* dk_norm,
                        const float2* rope, const int* positions, float eps, int N, int NH, int NKV,
                        int HS, void* scratch, cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  const bool packs =
      HS % 2 == 0 && by_packs<A>(HS / 2 | ld | in_ld, dq, dk, q_in, k_in, q_norm, k_norm, rope);
  const int lanes = head_lanes(HS, packs ? kW : 1), groups = kRowThreads / lanes;
  const int blocks =
      int(std::min<unsigned>(blocks_for(int64_t(N) * std::max(NH, NKV), groups), kPartialRows));
  const bool trained = q_norm && dq_norm;
  float* partials = trained ? static_cast<float*>(scratch) : nullptr;  // (blocks, 2, HS)
  launch("qk_backward", packs ? qk_backward_kernel<A, kW> : qk_backward_kernel<A, 1>,
         dim3(blocks, 2), kRowThreads, size_t(groups) * HS * sizeof(float), stream, dq, dk, ld,
         q_in, k_in, in_ld, q_norm, k_norm, partials, rope, positions, eps, N, NH, NKV, HS, lanes);
  if (trained) column_sums({dq_norm, dk_norm}, partials, blocks, HS, stream);
}

// Norm and RoPE of q and k: in place, unless backward needs q and k as they were.
template <class A>
void CudaGpt<A>::rotate(int64_t N, const int* positions, const Block& b, A* qkv, A* rotated) const {
  if (config_.family == Family::gpt2) return;
  const int64_t q = int64_t(config_.NH) * config_.HS, ld = config_.qkv();
  const int64_t out_ld = rotated ? int64_t(config_.NH + config_.NKV) * config_.HS : ld;
  A* out = rotated ? rotated : qkv;
  qk_forward(out, out_ld, out + q, out_ld, qkv, qkv + q, ld, weights_->vector(b.q_norm),
             weights_->vector(b.k_norm), resources_->rope.data(), positions, eps(), int(N),
             config_.NH, config_.NKV, config_.HS, stream_);
}
// dqkv holds the gradients of the rotated q and k: they are rotated back, and go through qwen3's
// norm.
template <class A>
void CudaGpt<A>::rotate_backward(const Block& b, const LayerActivations<A>& a) {
  if (config_.family == Family::gpt2) return;
  const int64_t q = int64_t(config_.NH) * config_.HS, ld = config_.qkv();
  qk_backward(a_.dqkv, a_.dqkv + q, ld, a.qkv, a.qkv + q, ld, weights_->vector(b.q_norm),
              weights_->vector(b.k_norm), gradient(b.q_norm), gradient(b.k_norm),
              resources_->rope.data(), batch_.positions, eps(), N_, config_.NH, config_.NKV,
              config_.HS, a_.scratch, stream_);
}

// ---------------------------------------------------------------------------------------------
// Attention
//
// A row of `out` is softmax(q k^T / sqrt(HS)) v over the keys of its own document up to itself. The
// (N, N) scores are never stored: flash attention (Dao et al. 2022, 2023) walks over tiles of keys
// with a running maximum and a running sum, and keeps of a row only lse, the log of the sum of exp
// of its scores, from which backward makes the probabilities again:
//
//   p = exp(q k / sqrt(HS) - lse),  dp = dout v,  delta = sum of p dp over keys = dout out
//   ds = p (dp - delta),  dq = ds k / sqrt(HS),  dk = ds^T q / sqrt(HS),  dv = p^T dout
//
// Backward takes two kernels, one that owns keys and one that owns queries, and both compute p and
// dp: two products more than with one kernel, but no sum crosses blocks, so no atomics.
//
// Rows of a document lie side by side and doc_start, doc_end never fall from row to row, so what a
// run of rows can see is a single interval: from doc_start of its first row to its last row.

struct AttentionShape {
  int N, NH, NKV, HS;
  const int* doc_start;  // (N) on the device: the first row of the document of row n
  const int* doc_end;    // (N): one past its last
  __device__ int key_head(int h) const { return h / (NH / NKV); }  // that query head h attends to
};

// q (N, NH HS), k and v (N, NKV HS), in rows of their own stride; several may lie inside one
// buffer.
template <class A>
struct AttentionInput {
  const A *q, *k, *v;
  int64_t q_ld, k_ld, v_ld;
};

// A forward kernel has its queries in the batch. Its keys are there too, or in the pages of a KV
// cache: PackedRows and CachedRows tell it what a block has to do, and where.

// A block's queries are rows begin .. end - 1 of the batch, but no more than the kernel takes; they
// see keys key_begin .. key_end - 1, or some of them. Of a cache: `row` of the page table, and what
// a query's row of the batch lies below its position.
struct AttentionTile {
  int begin, end, key_begin, key_end, row = 0, shift = 0;
};
// Keys: rows first_row .. end - 1 of k and v, one key/value head's.
template <class A>
struct KeyTile {
  const A *k, *v;
  int64_t k_ld, v_ld;
  int first_row, end;
};
// Which columns of the scores a row meets: from begin_of(row) to last_of(row). Rows beyond the last
// are never stored: they may meet what it meets.
struct DocumentKeys {  // rows are queries, columns the keys that they see
  const AttentionShape& shape;
  __device__ int begin_of(int row) const { return shape.doc_start[min(row, shape.N - 1)]; }
  __device__ int last_of(int row) const { return row; }
};
struct DocumentQueries {  // rows are keys, columns the queries that see them
  const AttentionShape& shape;
  __device__ int begin_of(int row) const { return row; }
  __device__ int last_of(int row) const { return shape.doc_end[min(row, shape.N - 1)] - 1; }
};
struct CachedKeys {  // rows are queries, columns the positions that they see
  int shift;
  __device__ int begin_of(int) const { return 0; }
  __device__ int last_of(int row) const { return row + shift; }
};

template <class A>
struct PackedRows {
  AttentionInput<A> in;
  AttentionShape shape;

  // Block y of the grid's; the last queries first, since they see the most keys
  __device__ AttentionTile tile(int each) const {
    const int begin = int(gridDim.y - 1 - blockIdx.y) * each;
    return {begin, shape.N, shape.doc_start[begin], min(begin + each, shape.N)};
  }
  __device__ DocumentKeys columns(const AttentionTile&) const { return {shape}; }
  __device__ KeyTile<A> keys(const AttentionTile&, int kv, int key) const {
    return {in.k + kv * shape.HS, in.v + kv * shape.HS, in.k_ld, in.v_ld, key, shape.N};
  }
};

// A page of kPage positions of a KV cache holds for each layer its keys, [NKV][kPage][HS], then for
// each layer its values. Position t of a row is place t % kPage of the page page_table[row
// max_pages + t / kPage]; where a layer's part begins in a page is the same in all.
template <class A>
struct PageTable {
  A* const* pages;           // (rows, max_pages)
  int max_pages;             // of a row
  int64_t keys, values = 0;  // where the layer's begin in a page

  __device__ A* page(int row, int t) const { return pages[int64_t(row) * max_pages + t / kPage]; }
};

// Tokens begin .. end - 1 of a call to decode, up to kQueryTile of them, all of one row, which has
// the first at `position`.
inline constexpr int kQueryTile = 128;
struct QueryTile {
  int row, begin, end, position;
};

// Tiles of keys lie in one page and begin at the same positions in every call, so that a token's
// sums do not depend on how its prompt is cut into calls.
template <class A>
struct CachedRows {
  AttentionInput<A> in;  // k and v are in the pages already
  AttentionShape shape;  // without documents
  PageTable<A> table;
  const QueryTile* tiles;

  // Part z of tile y of the grid's
  __device__ AttentionTile tile(int each) const {
    const QueryTile t = tiles[blockIdx.y];
    const int begin = t.begin + int(blockIdx.z) * each, shift = t.position - t.begin;
    return {begin, t.end, 0, min(begin + each, t.end) + shift, t.row, shift};
  }
  __device__ CachedKeys columns(const AttentionTile& tile) const { return {tile.shift}; }
  __device__ KeyTile<A> keys(const AttentionTile& tile, int kv, int key) const {
    const A* page = table.page(tile.row, key) + int64_t(kv) * kPage * shape.HS;
    const int place = key % kPage;
    return {page + table.keys,         page + table.values, shape.HS, shape.HS, place,
            place + tile.key_end - key};
  }
};

// ---------------------------------------------------------------------------------------------
// Plain attention, in fp32: for float, and for bf16 rows that are not whole chunks of 16 bytes;
// head sizes to 128. It is what flash attention below does, without tensor cores. A block owns 32
// rows and meets 32 of the other side at a time, all in fp32 in shared memory. Thread (x, y) of 16
// x 16 computes the scores of rows y, y + 16 with columns x, x + 16 and then, of the sums of its
// two rows, the elements x, x + 16, x + 32, ... So the scores of a row are written and read by 16
// lanes of one warp.

inline constexpr int kPlainTile = kFewestTileRows, kPlainThreads = 256, kPlainEach = 128 / 16;
inline constexpr int kPlainScores = kPlainTile * (kPlainTile + 1);  // floats in a tile of scores

// Rows of a tile lie an odd number of floats apart: 16 rows at one column are in 16 banks.
__host__ __device__ inline int plain_stride(int HS) { return HS | 1; }
static size_t plain_shared(int HS, int tiles, int scores) {
  return sizeof(float) * size_t(tiles * kPlainTile * plain_stride(HS) + scores * kPlainScores);
}

// Rows first_row .. first_row + 31 of a matrix; zeros from row N on.
template <class A>
__device__ inline void load_plain(float* tile, const A* rows, int64_t ld, int first_row, int N,
                                  int HS) {
  for (int i = int(threadIdx.x); i < kPlainTile * HS; i += kPlainThreads) {
    const int r = i / HS, d = i % HS;
    tile[r * plain_stride(HS) + d] =
        first_row + r < N ? to_float(rows[(first_row + r) * ld + d]) : 0.f;
  }
}

// c[i][j] = row y + 16 i of a times row x + 16 j of b
__device__ inline void multiply_plain(float (&c)[2][2], const float* a, const float* b, int HS) {
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16, stride = plain_stride(HS);
  c[0][0] = c[0][1] = c[1][0] = c[1][1] = 0;
  for (int d = 0; d < HS; d++)
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++)
        c[i][j] += a[(y + 16 * i) * stride + d] * b[(x + 16 * j) * stride + d];
}

// This thread's place in a tile of scores, and the row that it reads them from
__device__ inline float& plain_score(float* scores, int i, int j) {
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  return scores[(y + 16 * i) * (kPlainTile + 1) + x + 16 * j];
}
// c[i][e] += sum over r of scores[y + 16 i][r] tile[r][x + 16 e]
__device__ inline void add_plain(float (&c)[2][kPlainEach], const float* scores, const float* tile,
                                 int HS) {
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  for (int r = 0; r < kPlainTile; r++)
#pragma unroll
    for (int e = 0; e < kPlainEach; e++)
      if (x + 16 * e < HS) {
        const float t = tile[r * plain_stride(HS) + x + 16 * e];
        c[0][e] += scores[y * (kPlainTile + 1) + r] * t;
        c[1][e] += scores[(y + 16) * (kPlainTile + 1) + r] * t;
      }
}

// Rows first_row + y and first_row + y + 16 of a matrix, times scale[i]
template <class A>
__device__ inline void store_plain(A* rows, int64_t ld, int first_row, int N, int HS,
                                   const float (&c)[2][kPlainEach], const float (&scale)[2]) {
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < kPlainEach; e++) {
      const int n = first_row + y + 16 * i, d = x + 16 * e;
      if (n < N && d < HS) rows[n * ld + d] = from_float<A>(c[i][e] * scale[i]);
    }
}

// One block a query head (x) and 32 queries. scale: 1 / sqrt(HS). lse null: not asked for.
template <class A, class Rows>
__global__ void __launch_bounds__(kPlainThreads)
    plain_forward_kernel(A* out, float* lse, Rows source, float scale) {
  const int HS = source.shape.HS, h = int(blockIdx.x), kv = source.shape.key_head(h);
  const int size = kPlainTile * plain_stride(HS);
  const AttentionTile tile = source.tile(kPlainTile);
  if (tile.begin >= tile.end) return;
  const auto columns = source.columns(tile);
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  float *q_tile = shared_memory<float>(), *k_tile = q_tile + size, *v_tile = k_tile + size;
  float* scores = v_tile + size;
  const auto over_row = [](float value, auto&& combine) {  // over the 16 lanes of a row
    for (int d = 1; d < 16; d *= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, d));
    return value;
  };

  float acc[2][kPlainEach] = {}, highest[2] = {kLowest, kLowest}, total[2] = {};
  load_plain(q_tile, source.in.q + h * HS, source.in.q_ld, tile.begin, tile.end, HS);
  for (int key = tile.key_begin; key < tile.key_end; key += kPlainTile) {
    __syncthreads();  // the last keys and values have been read
    const KeyTile<A> keys = source.keys(tile, kv, key);
    load_plain(k_tile, keys.k, keys.k_ld, keys.first_row, keys.end, HS);
    load_plain(v_tile, keys.v, keys.v_ld, keys.first_row, keys.end, HS);
    __syncthreads();  // these are there
    float s[2][2];
    multiply_plain(s, q_tile, k_tile, HS);
    for (int i = 0; i < 2; i++) {
      const int n = tile.begin + y + 16 * i, begin = columns.begin_of(n), last = columns.last_of(n);
      float higher = highest[i];
      for (int j = 0; j < 2; j++) {
        const int m = key + x + 16 * j;
        s[i][j] = m >= begin && m <= last ? s[i][j] * scale : -INFINITY;
        higher = fmaxf(higher, s[i][j]);
      }
      higher = over_row(higher, [](float a, float b) { return fmaxf(a, b); });
      const float shrink = expf(highest[i] - higher);
      highest[i] = higher;
      total[i] *= shrink;
      for (float& a : acc[i]) a *= shrink;
      for (int j = 0; j < 2; j++) {
        total[i] += plain_score(scores, i, j) = expf(s[i][j] - higher);
      }
    }
    __syncwarp();  // the 16 lanes of a row have written its p
    add_plain(acc, scores, v_tile, HS);
  }
  float inverse[2];
  for (int i = 0; i < 2; i++) {
    const int n = tile.begin + y + 16 * i;
    const float sum = over_row(total[i], [](float a, float b) { return a + b; });
    inverse[i] = 1 / sum;
    if (lse && x == 0 && n < tile.end) {
      lse[int64_t(h) * source.shape.N + n] = highest[i] + logf(sum);
    }
  }
  store_plain(out + h * HS, int64_t(source.shape.NH) * HS, tile.begin, tile.end, HS, acc, inverse);
}

// One block a key/value head (x) and 32 keys (y): rows are keys, columns queries.
template <class A>
__global__ void __launch_bounds__(kPlainThreads)
    plain_keys_kernel(A* dk, A* dv, int64_t d_ld, const A* dout, const float* lse,
                      const float* delta, AttentionInput<A> in, AttentionShape shape, float scale) {
  const int N = shape.N, HS = shape.HS, kv = int(blockIdx.x), group = shape.NH / shape.NKV;
  const int first_row = int(blockIdx.y) * kPlainTile, size = kPlainTile * plain_stride(HS);
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  float *k_tile = shared_memory<float>(), *v_tile = k_tile + size;
  float *q_tile = v_tile + size, *dout_tile = q_tile + size;
  float *p_scores = dout_tile + size, *ds_scores = p_scores + kPlainScores;

  float dk_acc[2][kPlainEach] = {}, dv_acc[2][kPlainEach] = {};
  load_plain(k_tile, in.k + kv * HS, in.k_ld, first_row, N, HS);
  load_plain(v_tile, in.v + kv * HS, in.v_ld, first_row, N, HS);
  const int end = shape.doc_end[min(first_row + kPlainTile, N) - 1];
  for (int h = kv * group; h < (kv + 1) * group; h++) {
    for (int query = first_row; query < end; query += kPlainTile) {
      __syncthreads();  // the last tiles have been read
      load_plain(q_tile, in.q + h * HS, in.q_ld, query, N, HS);
      load_plain(dout_tile, dout + h * HS, int64_t(shape.NH) * HS, query, N, HS);
      __syncthreads();
      float p[2][2], ds[2][2];
      multiply_plain(p, k_tile, q_tile, HS);
      multiply_plain(ds, v_tile, dout_tile, HS);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
          const int m = first_row + y + 16 * i, n = query + x + 16 * j;
          const int64_t index = int64_t(h) * N + n;
          const bool seen = n < N && m <= n && m >= shape.doc_start[n];
          const float pe = seen ? expf(p[i][j] * scale - lse[index]) : 0.f;
          plain_score(p_scores, i, j) = pe;
          plain_score(ds_scores, i, j) = seen ? pe * (ds[i][j] - delta[index]) : 0.f;
        }
      __syncwarp();
      add_plain(dv_acc, p_scores, dout_tile, HS);
      add_plain(dk_acc, ds_scores, q_tile, HS);
    }
  }
  store_plain(dk + kv * HS, d_ld, first_row, N, HS, dk_acc, {scale, scale});
  store_plain(dv + kv * HS, d_ld, first_row, N, HS, dv_acc, {1, 1});
}

// One block a query head (x) and 32 queries (y): rows are queries, columns keys.
template <class A>
__global__ void __launch_bounds__(kPlainThreads)
    plain_queries_kernel(A* dq, int64_t dq_ld, const A* dout, const float* lse, const float* delta,
                         AttentionInput<A> in, AttentionShape shape, float scale) {
  const int N = shape.N, HS = shape.HS, h = int(blockIdx.x), kv = shape.key_head(h);
  const int first_row = int(blockIdx.y) * kPlainTile, size = kPlainTile * plain_stride(HS);
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  float *q_tile = shared_memory<float>(), *dout_tile = q_tile + size;
  float *k_tile = dout_tile + size, *v_tile = k_tile + size, *scores = v_tile + size;

  float acc[2][kPlainEach] = {};
  load_plain(q_tile, in.q + h * HS, in.q_ld, first_row, N, HS);
  load_plain(dout_tile, dout + h * HS, int64_t(shape.NH) * HS, first_row, N, HS);
  for (int key = shape.doc_start[first_row]; key < min(first_row + kPlainTile, N);
       key += kPlainTile) {
    __syncthreads();  // the last tiles have been read
    load_plain(k_tile, in.k + kv * HS, in.k_ld, key, N, HS);
    load_plain(v_tile, in.v + kv * HS, in.v_ld, key, N, HS);
    __syncthreads();
    float p[2][2], ds[2][2];
    multiply_plain(p, q_tile, k_tile, HS);
    multiply_plain(ds, dout_tile, v_tile, HS);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) {
        const int n = first_row + y + 16 * i, m = key + x + 16 * j;
        const int64_t index = int64_t(h) * N + n;
        const bool seen = n < N && m <= n && m >= shape.doc_start[n];
        plain_score(scores, i, j) =
            seen ? expf(p[i][j] * scale - lse[index]) * (ds[i][j] - delta[index]) : 0.f;
      }
    __syncwarp();
    add_plain(acc, scores, k_tile, HS);
  }
  store_plain(dq + h * HS, dq_ld, first_row, N, HS, acc, {scale, scale});
}

// ---------------------------------------------------------------------------------------------
// Flash attention in bf16 on the tensor cores. A block is 4 warps; a warp owns MT x 16 rows
// (queries, or keys in the dk, dv kernel) and meets tiles of the other side, which come by cp.async
// into two buffers in turn: one tile is computed while the next is on its way. Head size HS is
// padded with zeros to D = 64 or 128 in shared memory. Accumulators stay in registers throughout.

// What a lane holds of the matrices that mma.sync multiplies, D (16, 8) += A (16, 16) B (16, 8).
// Each entry below is a lane, and the pair of neighbouring elements it has there.
//
//   D, and a row's place in it          column  0,1   2,3   4,5   6,7
//                               row  0           0     1     2     3      d[0], d[1]
//                               row  1           4     5     6     7
//                                  ...
//                               row  7          28    29    30    31
//                               row  8           0     1     2     3      d[2], d[3]
//                                  ...
//                               row 15          28    29    30    31
//
//   A (bf16 pairs in registers a[0] to a[3])    columns 0 .. 7    columns 8 .. 15
//                               rows 0 .. 7        a[0]              a[2]
//                               rows 8 .. 15       a[1]              a[3]
//     each quarter (8, 8) in lanes as the upper half of D
//
//   B (registers b0, b1)        b0 has rows 0 .. 7, b1 rows 8 .. 15
//     each (8, 8) in lanes as the upper half of D, transposed: lane 4 c + q has rows 2 q and 2 q +
//     1 of column c
//
// So the four lanes of a quad share a row of scores: its maximum and sum take two shuffles. And two
// D side by side, rounded to pairs of bf16, are an A, register for register: the probabilities that
// the first product leaves go into the second without passing through memory.

#ifdef CAKE_CUDA_ON_CPU

using cuda_on_cpu::cp_async16;         // see below; bytes land at the wait that covers them
using cuda_on_cpu::cp_async_commit;    //
using cuda_on_cpu::cp_async_wait;      // template <int N>
using cuda_on_cpu::ldmatrix_x4;        //
using cuda_on_cpu::ldmatrix_x4_trans;  //
using cuda_on_cpu::mma_m16n8k16;       //

#else

__device__ inline uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
// Four 8 x 8 matrices of bf16: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned) and gets in r[m] columns 2 (l % 4) and + 1 of row l / 4 of matrix m; trans: of its
// transpose. (PTX ISA, ldmatrix)
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
// D (16, 8) += A (16, 16) B (16, 8): bf16 in, fp32 sums; A row-major, B column-major. With g = l /
// 4 and q = l % 4, lane l holds A[g or g + 8 (odd registers)][2q, 2q + 1, and + 8 (registers 2,
// 3)], B[2q, 2q + 1, and + 8 (register 1)][g], D[g, g, g + 8, g + 8][2q, 2q + 1, 2q, 2q + 1].
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Copies 16 bytes from global to shared memory (both aligned), or writes 16 zero bytes when not
// `valid`; they are there after the wait that covers their group, and a barrier for other threads.
__device__ inline void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>  // all but the newest N groups of this thread are there
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

inline constexpr int kFlashThreads = 128;

// A tile is rows of D bf16, in chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8): the
// eight rows that ldmatrix reads at one chunk, 128 or 256 bytes apart, fall into different banks.
template <int D>
__device__ inline bf16* chunk_at(bf16* tile, int row, int chunk) {
  return tile + row * D + chunk / 8 * 64 + (chunk % 8 ^ row % 8) * 8;
}

// Begins to copy rows first_row .. first_row + ROWS - 1 of a matrix into a tile; rows from N on and
// columns from HS on become zeros. A thread copies the same chunk of every kStep-th row (a multiple
// of 8, so its place in the row is the same too); neighbours copy neighbours.
template <int ROWS, int D>
__device__ inline void load_tile(bf16* tile, const bf16* rows, int64_t ld, int first_row, int N,
                                 int HS) {
  constexpr int kChunks = D / 8, kStep = kFlashThreads / kChunks;
  const int row = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  const bf16* src = rows + (first_row + row) * ld + chunk * 8;
  bf16* dst = chunk_at<D>(tile, row, chunk);
#pragma unroll
  for (int i = 0; i < ROWS / kStep; i++) {
    cp_async16(dst + i * kStep * D, src, first_row + row + i * kStep < N && chunk * 8 < HS);
    src += kStep * ld;
  }
}

// In a 16 x 8 accumulator a lane holds columns lane_column() and + 1 of row lane_row() (elements 0
// and 1) and of row lane_row() + 8 (elements 2 and 3). The four lanes of a row are a quad.
__device__ inline int lane_row() { return int(threadIdx.x) % 32 / 4; }
__device__ inline int lane_column() { return int(threadIdx.x) % 4 * 2; }
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The fragments that mma_m16n8k16 takes, by one ldmatrix each; lane l names one of 32 runs of 8.
// `row` and `column` are multiples of 16, so the lane's part of the swizzle is the same everywhere:
// (column / 8 + c) ^ (r % 8) = column / 8 ^ c ^ l % 8 for c = 0, 1.
template <int D>
__device__ inline bf16* run_at(bf16* tile, int row, int lane_row, int column, int lane_chunk) {
  const int swizzled = column / 8 % 8 ^ (lane_chunk ^ lane_row % 8);
  return tile + lane_row * D + swizzled * 8 + row * D + column / 64 * 64;
}
// A (16, 16) from rows row .. row + 15, columns column .. column + 15: registers 0 to 3 are the
// upper left, lower left, upper right, lower right quarter.
template <int D>
__device__ inline void load_a(uint32_t (&a)[4], bf16* tile, int row, int column) {
  const int l = int(threadIdx.x) % 32;
  ldmatrix_x4(a, run_at<D>(tile, row, l % 16, column, l / 16));
}
// Two B (16, 8) side by side, transposed in the tile: rows row .. row + 7 are the columns of the
// first (registers 0, 1), row + 8 .. row + 15 of the second (2, 3); columns column .. + 15 are
// summed over.
template <int D>
__device__ inline void load_b(uint32_t (&b)[4], bf16* tile, int row, int column) {
  const int l = int(threadIdx.x) % 32;
  ldmatrix_x4(b, run_at<D>(tile, row, l % 8 + l / 16 * 8, column, l / 8 % 2));
}
// Two B (16, 8) side by side as the tile has them: rows row .. row + 15 are summed over.
template <int D>
__device__ inline void load_b_trans(uint32_t (&b)[4], bf16* tile, int row, int column) {
  const int l = int(threadIdx.x) % 32;
  ldmatrix_x4_trans(b, run_at<D>(tile, row, l % 16, column, l / 16));
}

// c (MT 16, COLUMNS) = A B^T: A is MT 16 rows of a tile from `row` on, B the COLUMNS rows of
// another; the sum runs along the head.
template <int MT, int COLUMNS, int D>
__device__ inline void multiply_rows(float (&c)[MT][COLUMNS / 8][4], bf16* a_tile, int row,
                                     bf16* b_tile) {
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
#pragma unroll 2  // wholly, the loads that the compiler moves ahead do not fit the registers
  for (int d = 0; d < D; d += 16) {
    uint32_t a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++) load_a<D>(a[i], a_tile, row + i * 16, d);
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++) {
      uint32_t b[4];
      load_b<D>(b, b_tile, j * 16, d);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        mma_m16n8k16(c[i][2 * j], a[i], b[0], b[1]);
        mma_m16n8k16(c[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Accumulators as bf16: [..][0] the pair of row lane_row(), [..][1] that of row lane_row() + 8. Two
// neighbouring 16 x 8 accumulators are then, register for register, one A fragment.
__device__ inline uint32_t pack_pair(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <int MT, int TILES>
__device__ inline void pack_fragments(uint32_t (&a)[MT][TILES][2], const float (&c)[MT][TILES][4]) {
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      a[i][j][0] = pack_pair(c[i][j][0], c[i][j][1]);
      a[i][j][1] = pack_pair(c[i][j][2], c[i][j][3]);
    }
}

// c (MT 16, D) += A B: A (MT 16, ROWS) from pack_fragments, B a tile of ROWS rows.
template <int MT, int ROWS, int D>
__device__ inline void multiply_tile(float (&c)[MT][D / 8][4], const uint32_t (&a)[MT][ROWS / 8][2],
                                     bf16* b_tile) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      uint32_t b[4];
      load_b_trans<D>(b, b_tile, k * 16, j * 16);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        const uint32_t fragment[4] = {a[i][2 * k][0], a[i][2 * k][1], a[i][2 * k + 1][0],
                                      a[i][2 * k + 1][1]};
        mma_m16n8k16(c[i][2 * j], fragment, b[0], b[1]);
        mma_m16n8k16(c[i][2 * j + 1], fragment, b[2], b[3]);
      }
    }
}

// Writes a warp's accumulators, rows first_row + row .. first_row + row + MT 16 - 1 of a matrix,
// times scale[i][half] for row i 16 + half 8 + lane_row(). They pass through rows row .. of `tile`,
// which no other warp reads or writes, so that whole chunks reach global memory.
template <int MT, int D>
__device__ inline void store_rows(bf16* rows, int64_t ld, int first_row, int N, int HS, bf16* tile,
                                  int row, const float (&c)[MT][D / 8][4],
                                  const float (&scale)[MT][2]) {
  __syncwarp();  // the lanes have read each other's rows by ldmatrix
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t pair =
            pack_pair(c[i][j][2 * half] * scale[i][half], c[i][j][2 * half + 1] * scale[i][half]);
        bf16* chunk = chunk_at<D>(tile, row + i * 16 + half * 8 + lane_row(), j);
        *reinterpret_cast<uint32_t*>(chunk + lane_column()) = pair;
      }
  __syncwarp();  // the rows are whole
#pragma unroll
  for (int i = 0; i < MT * 16 * D / 8 / 32; i++) {
    const int index = i * 32 + int(threadIdx.x) % 32, r = row + index / (D / 8),
              chunk = index % (D / 8);
    if (first_row + r < N && chunk * 8 < HS) {
      store_pack(rows + (first_row + r) * ld + chunk * 8, load_pack(chunk_at<D>(tile, r, chunk)));
    }
  }
}

// The rows of a warp, MT 16 of them, and the interval of columns that each meets.
template <int MT, class Columns>
struct WarpRows {
  const Columns columns;
  int first_row, last_row;                       // the last may lie beyond the batch
  int first_begin, last_of_first, last_of_last;  // of the columns of these two

  __device__ WarpRows(const Columns& c, int row)
      : columns(c),
        first_row(row),
        last_row(row + MT * 16 - 1),
        first_begin(c.begin_of(first_row)),
        last_of_first(c.last_of(first_row)),
        last_of_last(c.last_of(last_row)) {}
  __device__ int row_of(int i, int half) const {
    return first_row + i * 16 + half * 8 + lane_row();
  }
  // Of the `count` columns from `column` on: does any row meet any; do all rows meet all?
  __device__ bool meets_any(int column, int count) const {
    return column <= last_of_last && column + count > first_begin;
  }
  __device__ bool meets_all(int column, int count) const {
    return column + count - 1 <= last_of_first && column >= columns.begin_of(last_row);
  }
  // Scores -inf, of these of TILES 8 columns from `column` on, where a row does not meet the
  // column.
  template <int TILES>
  __device__ void mask(float (&s)[MT][TILES][4], int column) const {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        __syncwarp();  // one row's interval at a time: more do not fit the registers
        const int row = row_of(i, half), begin = columns.begin_of(row), last = columns.last_of(row);
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            const int c = column + j * 8 + lane_column() + odd;
            if (c < begin || c > last) s[i][j][2 * half + odd] = -INFINITY;
          }
      }
  }
};

// One block a query head (x) and MT 64 queries. scale: log2(e) / sqrt(HS), so that exp(s /
// sqrt(HS)) = exp2(s scale). lse null: not asked for.
template <int D, int MT, int KEYS, class Rows>
__global__ void __launch_bounds__(kFlashThreads)
    flash_forward_kernel(bf16* out, float* lse, Rows source, float scale) {
  constexpr int kQueries = MT * 64;
  const int HS = source.shape.HS, h = int(blockIdx.x), kv = source.shape.key_head(h);
  const int warp_row = int(threadIdx.x) / 32 * MT * 16;
  const AttentionTile tile = source.tile(kQueries);
  if (tile.begin >= tile.end) return;
  bf16* q_tile = shared_memory<bf16>();    // (kQueries, D)
  bf16* k_tiles = q_tile + kQueries * D;   // 2 x (KEYS, D)
  bf16* v_tiles = k_tiles + 2 * KEYS * D;  // 2 x (KEYS, D)
  const WarpRows<MT, decltype(source.columns(tile))> rows(source.columns(tile),
                                                          tile.begin + warp_row);

  const auto load_keys = [&](int key, int buffer) {  // tiles take two buffers in turn
    const KeyTile<bf16> keys = source.keys(tile, kv, key);
    load_tile<KEYS, D>(k_tiles + buffer, keys.k, keys.k_ld, keys.first_row, keys.end, HS);
    load_tile<KEYS, D>(v_tiles + buffer, keys.v, keys.v_ld, keys.first_row, keys.end, HS);
    cp_async_commit();
  };
  load_tile<kQueries, D>(q_tile, source.in.q + h * HS, source.in.q_ld, tile.begin, tile.end, HS);
  load_keys(tile.key_begin, 0);

  float acc[MT][D / 8][4] = {};             // sum of p v
  float highest[MT][2], total[MT][2] = {};  // of the row's scores; of p, this lane's columns
#pragma unroll
  for (int i = 0; i < MT; i++) highest[i][0] = highest[i][1] = kLowest;
  for (int key = tile.key_begin, buffer = 0; key < tile.key_end; key += KEYS, buffer ^= KEYS * D) {
    cp_async_wait<0>();  // this thread's part of the tile is there,
    __syncthreads();     // everyone's is, and everyone is done with the other buffer
    if (key + KEYS < tile.key_end) load_keys(key + KEYS, buffer ^ KEYS * D);
    if (!rows.meets_any(key, KEYS)) continue;

    float s[MT][KEYS / 8][4];
    multiply_rows<MT, KEYS, D>(s, q_tile, warp_row, k_tiles + buffer);
    if (!rows.meets_all(key, KEYS)) rows.mask(s, key);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Online softmax: where a row's maximum rises, what it has summed shrinks.
        float higher = highest[i][half];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
          higher = fmaxf(higher, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
        higher = quad_max(higher);
        const float shrink = exp2_approx((highest[i][half] - higher) * scale);
        highest[i][half] = higher;
        total[i][half] *= shrink;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
          acc[i][j][2 * half] *= shrink, acc[i][j][2 * half + 1] *= shrink;
        const float offset = higher * scale;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++)
            total[i][half] += s[i][j][e] = exp2_approx(fmaf(s[i][j][e], scale, -offset));
      }
    uint32_t p[MT][KEYS / 8][2];
    pack_fragments(p, s);
    multiply_tile<MT, KEYS, D>(acc, p, v_tiles + buffer);
  }

  float inverse[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float sum = quad_sum(total[i][half]);
      inverse[i][half] = 1 / sum;
      const int n = rows.row_of(i, half);
      if (lse && lane_column() == 0 && n < tile.end) {
        lse[int64_t(h) * source.shape.N + n] = highest[i][half] * (scale / kLog2E) + logf(sum);
      }
    }
  store_rows<MT, D>(out + h * HS, int64_t(source.shape.NH) * HS, tile.begin, tile.end, HS, q_tile,
                    warp_row, acc, inverse);
}

// One block a key/value head (x) and MT 64 keys (y). It meets the queries of every head of its
// group in order, so grouped gradients are sums in one order. Scores are transposed here: a warp's
// rows are keys, and S^T = K Q^T, dP^T = V dO^T come out as accumulators that are the A fragments
// of dV and dK.
template <int D, int MT, int QUERIES>
__global__ void __launch_bounds__(kFlashThreads)
    flash_keys_kernel(bf16* dk, bf16* dv, int64_t d_ld, const bf16* dout, const float* lse,
                      const float* delta, AttentionInput<bf16> in, AttentionShape shape,
                      float scale) {
  constexpr int kKeys = MT * 64;
  const int N = shape.N, HS = shape.HS, kv = int(blockIdx.x), group = shape.NH / shape.NKV;
  const int first_row = int(blockIdx.y) * kKeys, warp_row = int(threadIdx.x) / 32 * MT * 16;
  bf16* k_tile = shared_memory<bf16>();                                         // (kKeys, D)
  bf16* v_tile = k_tile + kKeys * D;                                            // (kKeys, D)
  bf16* q_tiles = v_tile + kKeys * D;                                           // 2 x (QUERIES, D)
  bf16* dout_tiles = q_tiles + 2 * QUERIES * D;                                 // 2 x (QUERIES, D)
  float2* row_tiles = reinterpret_cast<float2*>(dout_tiles + 2 * QUERIES * D);  // 2 x (QUERIES)
  const WarpRows<MT, DocumentQueries> rows({shape}, first_row + warp_row);

  // Step by step: the tiles of queries of the group's first head, of the next, ... A step's buffers
  // are those of its parity.
  struct Step {
    int h, query;
    int parity = 0;
  };
  const int end = shape.doc_end[min(first_row + kKeys, N) - 1], last_head = kv * group + group - 1;
  const auto after = [&](Step s) {
    const bool same = s.query + QUERIES < end;
    return Step{s.h + !same, same ? s.query + QUERIES : first_row, s.parity ^ 1};
  };
  const auto load_queries = [&](Step s) {
    const int buffer = s.parity * QUERIES * D;
    load_tile<QUERIES, D>(q_tiles + buffer, in.q + s.h * HS, in.q_ld, s.query, N, HS);
    load_tile<QUERIES, D>(dout_tiles + buffer, dout + s.h * HS, int64_t(shape.NH) * HS, s.query, N,
                          HS);
    cp_async_commit();
  };
  // Thread t brings (log2(e) lse, delta) of the tile's query t: into a register before a step's
  // products, on into shared memory after them, so that no thread waits for the load.
  const auto load_row = [&](Step s) {
    const int n = s.query + int(threadIdx.x);
    if (threadIdx.x >= QUERIES || n >= N) return float2{0, 0};
    const int64_t index = int64_t(s.h) * N + n;
    return float2{lse[index] * kLog2E, delta[index]};
  };
  const auto store_row = [&](Step s, float2 row) {
    if (threadIdx.x < QUERIES) row_tiles[s.parity * QUERIES + int(threadIdx.x)] = row;
  };
  Step step{kv * group, first_row};
  load_tile<kKeys, D>(k_tile, in.k + kv * HS, in.k_ld, first_row, N, HS);
  load_tile<kKeys, D>(v_tile, in.v + kv * HS, in.v_ld, first_row, N, HS);
  load_queries(step);
  store_row(step, load_row(step));

  float dk_acc[MT][D / 8][4] = {}, dv_acc[MT][D / 8][4] = {};
  while (step.h <= last_head) {
    const Step next = after(step);
    cp_async_wait<0>();  // this thread's part of the step's tiles is there,
    __syncthreads();     // everyone's is, and all are done with the other buffers
    float2 next_row{};
    if (next.h <= last_head) {
      load_queries(next);
      next_row = load_row(next);
    }
    if (rows.meets_any(step.query, QUERIES)) {
      bf16* q_tile = q_tiles + step.parity * QUERIES * D;
      bf16* dout_tile = dout_tiles + step.parity * QUERIES * D;
      const float2* row_tile = row_tiles + step.parity * QUERIES + lane_column();
      // p and then ds at column query + j 8 + lane_column() + odd of the accumulators
      const auto at_columns = [&](auto&& replace) {
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++)
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            const float2 row = row_tile[j * 8 + odd];
#pragma unroll
            for (int i = 0; i < MT; i++) replace(i, j, odd, row), replace(i, j, odd + 2, row);
          }
      };
      float p[MT][QUERIES / 8][4], ds[MT][QUERIES / 8][4];
      uint32_t a[MT][QUERIES / 8][2];
      multiply_rows<MT, QUERIES, D>(p, k_tile, warp_row, q_tile);
      if (!rows.meets_all(step.query, QUERIES)) rows.mask(p, step.query);
      at_columns([&](int i, int j, int e, float2 row) {
        p[i][j][e] = exp2_approx(fmaf(p[i][j][e], scale, -row.x));
      });
      pack_fragments(a, p);
      multiply_tile<MT, QUERIES, D>(dv_acc, a, dout_tile);
      multiply_rows<MT, QUERIES, D>(ds, v_tile, warp_row, dout_tile);
      at_columns([&](int i, int j, int e, float2 row) {
        ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - row.y);
      });
      pack_fragments(a, ds);
      multiply_tile<MT, QUERIES, D>(dk_acc, a, q_tile);
    }
    if (next.h <= last_head) store_row(next, next_row);
    step = next;
  }

  float dk_scale[MT][2], one[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++) {
    dk_scale[i][0] = dk_scale[i][1] = scale / kLog2E;
    one[i][0] = one[i][1] = 1;
  }
  store_rows<MT, D>(dk + kv * HS, d_ld, first_row, N, HS, k_tile, warp_row, dk_acc, dk_scale);
  store_rows<MT, D>(dv + kv * HS, d_ld, first_row, N, HS, v_tile, warp_row, dv_acc, one);
}

// dq: blocks and tiles as in forward.
template <int D, int MT, int KEYS>
__global__ void __launch_bounds__(kFlashThreads)
    flash_queries_kernel(bf16* dq, int64_t dq_ld, const bf16* dout, const float* lse,
                         const float* delta, AttentionInput<bf16> in, AttentionShape shape,
                         float scale) {
  constexpr int kQueries = MT * 64;
  const int N = shape.N, HS = shape.HS, h = int(blockIdx.x), kv = shape.key_head(h);
  const int first_row = int(gridDim.y - 1 - blockIdx.y) * kQueries;
  const int warp_row = int(threadIdx.x) / 32 * MT * 16;
  bf16* q_tile = shared_memory<bf16>();                                  // (kQueries, D)
  bf16* dout_tile = q_tile + kQueries * D;                               // (kQueries, D)
  bf16* k_tiles = dout_tile + kQueries * D;                              // 2 x (KEYS, D)
  bf16* v_tiles = k_tiles + 2 * KEYS * D;                                // 2 x (KEYS, D)
  float2* row_tile = reinterpret_cast<float2*>(v_tiles + 2 * KEYS * D);  // (kQueries)
  const WarpRows<MT, DocumentKeys> rows({shape}, first_row + warp_row);
  // Tiles of keys, the first where the first row's document begins; they take two buffers in turn.
  const int begin = shape.doc_start[first_row], end = min(first_row + kQueries, N);

  const auto load_keys = [&](int key, int buffer) {
    load_tile<KEYS, D>(k_tiles + buffer, in.k + kv * HS, in.k_ld, key, N, HS);
    load_tile<KEYS, D>(v_tiles + buffer, in.v + kv * HS, in.v_ld, key, N, HS);
    cp_async_commit();
  };
  load_tile<kQueries, D>(q_tile, in.q + h * HS, in.q_ld, first_row, N, HS);
  load_tile<kQueries, D>(dout_tile, dout + h * HS, int64_t(shape.NH) * HS, first_row, N, HS);
  load_keys(begin, 0);

  // A row has (log2(e) lse, delta) in shared memory, since registers are full. The barrier of the
  // first tile shows them to all.
  for (int i = int(threadIdx.x); i < kQueries; i += kFlashThreads) {
    const int64_t index = int64_t(h) * N + min(first_row + i, N - 1);
    row_tile[i] = {lse[index] * kLog2E, delta[index]};
  }

  float acc[MT][D / 8][4] = {};
  for (int key = begin, buffer = 0; key < end; key += KEYS, buffer ^= KEYS * D) {
    cp_async_wait<0>();  // this thread's part,
    __syncthreads();     // and everyone's: as in forward
    if (key + KEYS < end) load_keys(key + KEYS, buffer ^ KEYS * D);
    if (!rows.meets_any(key, KEYS)) continue;

    bf16* k_tile = k_tiles + buffer;
    float p[MT][KEYS / 8][4], ds[MT][KEYS / 8][4];
    multiply_rows<MT, KEYS, D>(p, q_tile, warp_row, k_tile);
    if (!rows.meets_all(key, KEYS)) rows.mask(p, key);
    multiply_rows<MT, KEYS, D>(ds, dout_tile, warp_row, v_tiles + buffer);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 row = row_tile[warp_row + i * 16 + half * 8 + lane_row()];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            ds[i][j][e] = exp2_approx(fmaf(p[i][j][e], scale, -row.x)) * (ds[i][j][e] - row.y);
          }
        __syncwarp();  // one row's numbers at a time, too
      }
    uint32_t a[MT][KEYS / 8][2];
    pack_fragments(a, ds);
    multiply_tile<MT, KEYS, D>(acc, a, k_tile);
  }

  float dq_scale[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++) dq_scale[i][0] = dq_scale[i][1] = scale / kLog2E;
  store_rows<MT, D>(dq + h * HS, dq_ld, first_row, N, HS, q_tile, warp_row, acc, dq_scale);
}

// What each kernel owns (MT; a block 64 times as many rows) and meets at a time. A fragment that is
// loaded from shared memory serves MT products, and accumulators must fit 255 registers. For head
// size 128, keys alone have so many accumulators that MT is 1.
template <int D>
struct FlashTiles {
  static constexpr int kForwardRows = 2, kForwardKeys = 4096 / D;
  static constexpr int kKeysRows = 128 / D, kKeysQueries = 32;
  static constexpr int kQueriesRows = 2, kQueriesKeys = 32;
};

// grid(queries): of a kernel whose blocks have so many queries
template <int D, class Rows, class Grid>
static void flash_forward(const char* name, bf16* out, float* lse, const Rows& rows, Grid&& grid,
                          cudaStream_t stream) {
  using T = FlashTiles<D>;
  constexpr int kQueries = T::kForwardRows * 64;
  launch(name, flash_forward_kernel<D, T::kForwardRows, T::kForwardKeys, Rows>, grid(kQueries),
         kFlashThreads, sizeof(bf16) * D * (kQueries + 4 * T::kForwardKeys), stream, out, lse, rows,
         kLog2E / sqrtf(float(rows.shape.HS)));
}

template <int D>
static void flash_backward(bf16* dq, int64_t dq_ld, bf16* dk, bf16* dv, int64_t dkv_ld,
                           const bf16* dout, const float* lse, const float* delta,
                           const AttentionInput<bf16>& in, const AttentionShape& shape,
                           cudaStream_t stream) {
  using T = FlashTiles<D>;
  constexpr int kKeys = T::kKeysRows * 64, kQueries = T::kQueriesRows * 64;
  const float scale = kLog2E / sqrtf(float(shape.HS));
  launch(
      "attention_backward_keys", flash_keys_kernel<D, T::kKeysRows, T::kKeysQueries>,
      dim3(unsigned(shape.NKV), blocks_for(shape.N, kKeys)), kFlashThreads,
      sizeof(bf16) * D * (2 * kKeys + 4 * T::kKeysQueries) + sizeof(float2) * 2 * T::kKeysQueries,
      stream, dk, dv, dkv_ld, dout, lse, delta, in, shape, scale);
  launch("attention_backward_queries", flash_queries_kernel<D, T::kQueriesRows, T::kQueriesKeys>,
         dim3(unsigned(shape.NH), blocks_for(shape.N, kQueries)), kFlashThreads,
         sizeof(bf16) * D * (2 * kQueries + 4 * T::kQueriesKeys) + sizeof(float2) * kQueries,
         stream, dq, dq_ld, dout, lse, delta, in, shape, scale);
}

// ---------------------------------------------------------------------------------------------
// Attention of either kind

// delta (NH, N): dout times out, row by row of a head. 8 lanes a row, each taking every eighth run
// of W elements.
template <class A, int W>
__global__ void __launch_bounds__(256)
    attention_delta_kernel(float* delta, const A* dout, const A* out, int N, int NH, int HS) {
  const int64_t row = (int64_t(blockIdx.x) * 256 + threadIdx.x) / 8;  // n NH + h
  float sum = 0;
  if (row < int64_t(N) * NH) {
    for (int d = int(threadIdx.x) % 8 * W; d < HS; d += 8 * W) {
      float a[W], b[W];
      load_floats(a, dout + row * HS + d);
      load_floats(b, out + row * HS + d);
      for (int i = 0; i < W; i++) sum += a[i] * b[i];
    }
  }
  for (int d = 1; d < 8; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  if (threadIdx.x % 8 == 0 && row < int64_t(N) * NH) delta[row % NH * N + row / NH] = sum;
}

static void check_attention(int NH, int NKV, int HS) {
  if (HS < 1 || HS > 128) {
    fail("cuda: attention: head size ", HS, ", expected 1 to 128; --device cpu takes any");
  }
  if (NKV < 1 || NH % NKV != 0) {
    fail("cuda: attention: ", NH, " query heads, expected a multiple of the ", NKV,
         " key/value heads");
  }
}

template <class A, class Rows, class Grid>
static void forward_by_tiles(const char* name, A* out, float* lse, const Rows& rows, Grid&& grid,
                             cudaStream_t stream) {
  const AttentionInput<A>& in = rows.in;
  const int HS = rows.shape.HS;
  check_attention(rows.shape.NH, rows.shape.NKV, HS);
  if constexpr (std::is_same_v<A, bf16>) {
    if (by_packs<A>(HS | in.q_ld | in.k_ld | in.v_ld, out, in.q, in.k, in.v)) {
      return HS <= 64 ? flash_forward<64>(name, out, lse, rows, grid, stream)
                      : flash_forward<128>(name, out, lse, rows, grid, stream);
    }
  }
  launch(name, plain_forward_kernel<A, Rows>, grid(kPlainTile), kPlainThreads,
         plain_shared(HS, 3, 1), stream, out, lse, rows, 1 / sqrtf(float(HS)));
}

// out (N, NH HS), lse (NH, N). plain::attention_forward, per document and head.
template <class A>
static void attention_forward(A* out, float* lse, const AttentionInput<A>& in,
                              const AttentionShape& shape, cudaStream_t stream) {
  const auto grid = [&](int each) { return dim3(unsigned(shape.NH), blocks_for(shape.N, each)); };
  forward_by_tiles("attention_forward", out, lse, PackedRows<A>{in, shape}, grid, stream);
}

// From dout (N, NH HS) and what forward left to dq (N, NH HS), dk, dv (N, NKV HS), written in rows
// of their strides; delta (NH, N) is scratch. plain::attention_backward.
template <class A>
static void attention_backward(A* dq, int64_t dq_ld, A* dk, A* dv, int64_t dkv_ld, const A* dout,
                               const A* out, const float* lse, float* delta,
                               const AttentionInput<A>& in, const AttentionShape& shape,
                               cudaStream_t stream) {
  const auto [N, NH, NKV, HS, start, end] = shape;
  check_attention(NH, NKV, HS);
  constexpr int kSize = Pack<A>::kSize;
  launch(
      "attention_delta",
      by_packs<A>(HS, dout, out) ? attention_delta_kernel<A, kSize> : attention_delta_kernel<A, 1>,
      blocks_for(int64_t(N) * NH, 256 / 8), 256, 0, stream, delta, dout, out, N, NH, HS);
  if constexpr (std::is_same_v<A, bf16>) {
    if (by_packs<A>(HS | dq_ld | dkv_ld | in.q_ld | in.k_ld | in.v_ld, dq, dk, dv, dout, in.q, in.k,
                    in.v)) {
      return HS <= 64 ? flash_backward<64>(dq, dq_ld, dk, dv, dkv_ld, dout, lse, delta, in, shape,
                                           stream)
                      : flash_backward<128>(dq, dq_ld, dk, dv, dkv_ld, dout, lse, delta, in, shape,
                                            stream);
    }
  }
  const float scale = 1 / sqrtf(float(HS));
  launch("attention_backward_keys_plain", plain_keys_kernel<A>,
         dim3(unsigned(NKV), blocks_for(N, kPlainTile)), kPlainThreads, plain_shared(HS, 4, 2),
         stream, dk, dv, dkv_ld, dout, lse, delta, in, shape, scale);
  launch("attention_backward_queries_plain", plain_queries_kernel<A>,
         dim3(unsigned(NH), blocks_for(N, kPlainTile)), kPlainThreads, plain_shared(HS, 4, 1),
         stream, dq, dq_ld, dout, lse, delta, in, shape, scale);
}

template <class A>
AttentionInput<A> CudaGpt<A>::heads_of(const A* qkv, const A* rotated) const {
  const int64_t q = int64_t(config_.NH) * config_.HS, qk = q + int64_t(config_.NKV) * config_.HS;
  const int64_t ld = config_.qkv();
  if (rotated) return {rotated, rotated + q, qkv + qk, qk, qk, ld};
  return {qkv, qkv + q, qkv + qk, ld, ld, ld};
}
template <class A>
void CudaGpt<A>::attend_batch(const AttentionInput<A>& in, const LayerActivations<A>& a) const {
  attention_forward(a.att, a.lse, in,
                    {N_, config_.NH, config_.NKV, config_.HS, batch_.doc_start, batch_.doc_end},
                    stream_);
}
template <class A>
void CudaGpt<A>::attend_batch_backward(const AttentionInput<A>& in,
                                       const LayerActivations<A>& a) const {
  const int64_t q = int64_t(config_.NH) * config_.HS, kv = int64_t(config_.NKV) * config_.HS;
  attention_backward(a_.dqkv, config_.qkv(), a_.dqkv + q, a_.dqkv + q + kv, config_.qkv(), a_.dnorm,
                     a.att, a.lse, a_.att_dot, in,
                     {N_, config_.NH, config_.NKV, config_.HS, batch_.doc_start, batch_.doc_end},
                     stream_);
}

// ---------------------------------------------------------------------------------------------
// GELU and SwiGLU. Bytes in and out, once each; a thread takes W neighbours.

// plain::gelu: y = x s(2u), u = sqrt(2/pi) (x + .044715 x^3), s the sigmoid. y, x (n)
template <class A, int W>
__global__ void gelu_forward_kernel(A* y, const A* x, int64_t n) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * W;
  if (i >= n) return;
  float v[W];
  load_floats(v, x + i);
  for (int j = 0; j < W; j++) {
    const float u = .7978845608f * (v[j] + .044715f * v[j] * v[j] * v[j]);
    v[j] = v[j] / (1 + exp2_approx(-2 * kLog2E * u));
  }
  store_floats(y + i, v);
}
template <class A>
static void gelu_forward(A* y, const A* x, int64_t n, cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  const bool packs = by_packs<A>(n, y, x);
  launch("gelu_forward", packs ? gelu_forward_kernel<A, kW> : gelu_forward_kernel<A, 1>,
         blocks_for(n, kRowThreads * (packs ? kW : 1)), kRowThreads, 0, stream, y, x, n);
}

// plain::gelu_derivative: dx = dy (s + x s (1 - s) 2u'). dx, which may be dy, dy, x (n)
template <class A, int W>
__global__ void gelu_backward_kernel(A* dx, const A* dy, const A* x, int64_t n) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * W;
  if (i >= n) return;
  float d[W], v[W];
  load_floats(d, dy + i);
  load_floats(v, x + i);
  for (int j = 0; j < W; j++) {
    const float u = .7978845608f * (v[j] + .044715f * v[j] * v[j] * v[j]);
    const float du = .7978845608f * (1 + .134145f * v[j] * v[j]);
    const float s = 1 / (1 + exp2_approx(-2 * kLog2E * u));
    d[j] *= s + v[j] * s * (1 - s) * 2 * du;
  }
  store_floats(dx + i, d);
}
template <class A>
static void gelu_backward(A* dx, const A* dy, const A* x, int64_t n, cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  const bool packs = by_packs<A>(n, dx, dy, x);
  launch("gelu_backward", packs ? gelu_backward_kernel<A, kW> : gelu_backward_kernel<A, 1>,
         blocks_for(n, kRowThreads * (packs ? kW : 1)), kRowThreads, 0, stream, dx, dy, x, n);
}

// plain::swiglu: y = gate s(gate) up. y (N, F); gate_up (N, 2F): the gate's columns, then up's
// A block a row.
template <class A, int W>
__global__ void swiglu_forward_kernel(A* y, const A* gate_up, int F) {
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x * W; i < F; i += blockDim.x * W) {
    float gate[W], up[W];
    load_floats(gate, gate_up + row * 2 * F + i);
    load_floats(up, gate_up + row * 2 * F + F + i);
    for (int j = 0; j < W; j++) up[j] *= gate[j] / (1 + exp2_approx(-kLog2E * gate[j]));
    store_floats(y + row * F + i, up);
  }
}
template <class A>
static void swiglu_forward(A* y, const A* gate_up, int N, int F, cudaStream_t stream) {
  launch("swiglu_forward",
         by_packs<A>(F, y, gate_up) ? swiglu_forward_kernel<A, Pack<A>::kSize>
                                    : swiglu_forward_kernel<A, 1>,
         N, kRowThreads / 2, 0, stream, y, gate_up, F);
}

// plain::swiglu_derivative: dup = dy gate s, dgate = dy up (s + gate s (1 - s)). dgate_up, which
// may be gate_up, (N, 2F); dy (N, F)
template <class A, int W>
__global__ void swiglu_backward_kernel(A* dgate_up, const A* dy, const A* gate_up, int F) {
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x * W; i < F; i += blockDim.x * W) {
    float gate[W], up[W], d[W];
    load_floats(gate, gate_up + row * 2 * F + i);
    load_floats(up, gate_up + row * 2 * F + F + i);
    load_floats(d, dy + row * F + i);
    for (int j = 0; j < W; j++) {
      const float s = 1 / (1 + exp2_approx(-kLog2E * gate[j]));
      const float dgate = d[j] * up[j] * (s + gate[j] * s * (1 - s));
      up[j] = d[j] * gate[j] * s;
      gate[j] = dgate;
    }
    store_floats(dgate_up + row * 2 * F + i, gate);
    store_floats(dgate_up + row * 2 * F + F + i, up);
  }
}
template <class A>
static void swiglu_backward(A* dgate_up, const A* dy, const A* gate_up, int N, int F,
                            cudaStream_t stream) {
  launch("swiglu_backward",
         by_packs<A>(F, dgate_up, dy, gate_up) ? swiglu_backward_kernel<A, Pack<A>::kSize>
                                               : swiglu_backward_kernel<A, 1>,
         N, kRowThreads / 2, 0, stream, dgate_up, dy, gate_up, F);
}

// ---------------------------------------------------------------------------------------------
// The head: rows of final_norm that have a target -> logits -> log p(target), entropy, and in
// place the gradient of the logits

// dst[r] = src[row_of[r]], zeros where that is -1. dst (rows, C), src (N, C)
// scatter: dst[row_of[r]] = src[r] but where that is -1. dst (N, C), src (rows, C); no position
// occurs twice
template <class A, int W, bool scatter>
__global__ void move_rows_kernel(A* dst, const A* src, const int* row_of, int rows, int C) {
  const int64_t r = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (r >= rows) return;
  const int64_t n = row_of[r];
  if (scatter && n < 0) return;
  for (int c = threadIdx.x % 32 * W; c < C; c += 32 * W) {
    float v[W] = {};
    if (n >= 0) load_floats(v, src + (scatter ? r : n) * C + c);
    store_floats(dst + (scatter ? n : r) * C + c, v);
  }
}
template <bool scatter, class A>
static void move_rows(A* dst, const A* src, const int* row_of, int rows, int C,
                      cudaStream_t stream) {
  launch("move_rows",
         by_packs<A>(C, dst, src) ? move_rows_kernel<A, Pack<A>::kSize, scatter>
                                  : move_rows_kernel<A, 1, scatter>,
         warp_rows(rows), kRowThreads, 0, stream, dst, src, row_of, rows, C);
}

// Two blocks share a multiprocessor from A100 on: while one waits for its row, or at the barriers
// of its sums, the other computes exponentials. Hence threads and registers of half a
// multiprocessor, and these bytes of a row in shared memory.
inline constexpr int kClassifierThreads = 512;
inline constexpr size_t kClassifierShared = size_t(80) << 10;

// plain::classifier_forward: logp[n] = log p(targets[n]) and entropy[n] of softmax(logits[r] x
// inverse_temperature), n = row_of[r]. When `backward`, the logits become
// plain::classifier_backward of dlogp and dentropy ((N); null: 0): dlogits[j] = (dlogp (1[j =
// target] - p_j) - dentropy p_j (log p_j + H)) / temperature, 0 in columns V to ld and in rows with
// row_of -1. logits (rows, ld); targets, logp, entropy (or null) (N)
//
// A block a row: reads it once, writes it once. The first pass is an online softmax (Milakov,
// Gimelshein 2018) in powers of 2; the second finds the first `cached` elements in shared memory
// and the rest, if any, in the L2 cache.
template <class A, int W>
__global__ void __launch_bounds__(kClassifierThreads, 2)
    classifier_kernel(A* logits, int64_t ld, const int* row_of, const int* targets,
                      const float* dlogp, const float* dentropy, float* logp_out,
                      float* entropy_out, float inverse_temperature, int V, int cached,
                      bool backward) {
  float* scratch = shared_memory<float>();       // (32)
  A* copy = reinterpret_cast<A*>(scratch + 32);  // (cached)
  A* row = logits + blockIdx.x * ld;
  const int n = row_of[blockIdx.x], target = n < 0 ? -1 : targets[n];
  const int begin = threadIdx.x * W, stride = blockDim.x * W;
  if (target < 0) {
    const float zero[W] = {};
    for (int j = begin; backward && j < ld; j += stride) store_floats(row + j, zero);
    return;
  }
  const float k = inverse_temperature * kLog2E;
  const float target_logit = to_float(row[target]);

  // sum of 2^z and of z 2^z, z = (x - highest) k
  float v[W], highest = kLowest, sum = 0, weighted = 0;
  for (int j = begin; j < V; j += stride) {
    float top = highest;
    if (j + W <= V) {
      load_floats(v, row + j);
    } else {
      for (int i = 0; i < W; i++) v[i] = j + i < V ? to_float(row[j + i]) : kLowest;
    }
    if (j < cached) store_floats(copy + j, v);
    for (int i = 0; i < W; i++) top = fmaxf(top, v[i]);
    if (top > highest) {
      const float d = (highest - top) * k, shrink = exp2_approx(d);
      weighted = shrink * (weighted + d * sum);
      sum *= shrink;
      highest = top;
    }
    const float offset = highest * k;
    for (int i = 0; i < W; i++) {
      const float z = v[i] * k - offset, e = exp2_approx(z);
      sum += e;
      weighted += e * z;
    }
  }
  const float row_highest = block_max(highest, scratch), d = (highest - row_highest) * k;
  const float shrink = exp2_approx(d);
  weighted = block_sum(shrink > 0 ? shrink * (weighted + d * sum) : 0, scratch);
  sum = block_sum(shrink * sum, scratch);
  const float offset = row_highest * k, log_sum = log2f(sum);
  const float entropy = (log_sum - weighted / sum) * kLn2;
  if (threadIdx.x == 0) {
    logp_out[n] = (target_logit * k - offset - log_sum) * kLn2;
    if (entropy_out) entropy_out[n] = entropy;
  }
  if (!backward) return;

  // dlogits[j] = p_j (a + b (log p_j + H)), and at the target - a
  const float a = dlogp ? -dlogp[n] * inverse_temperature : 0;
  const float b = dentropy ? -dentropy[n] * inverse_temperature : 0;
  const float c0 = a + b * entropy, c1 = b * kLn2, shift = offset + log_sum;
  for (int j = begin; j < ld; j += stride) {
    if (j < cached)
      load_floats(v, copy + j);
    else
      load_floats(v, row + j);
    for (int i = 0; i < W; i++) {
      const float l = v[i] * k - shift;  // log2 of p
      v[i] = exp2_approx(l) * (c0 + c1 * l);
    }
    if (j <= target && target < j + W) {
      for (int i = 0; i < W; i++) v[i] -= j + i == target ? a : 0;
    }
    if (j + W > V) {  // the padding, which may hold anything
      for (int i = 0; i < W; i++) v[i] = j + i < V ? v[i] : 0;
    }
    store_floats(row + j, v);
  }
}
template <class A>
static void classifier(A* logits, int64_t ld, const int* row_of, const int* targets,
                       const float* dlogp, const float* dentropy, float* logp, float* entropy,
                       float inverse_temperature, int V, int rows, bool backward,
                       cudaStream_t stream) {
  constexpr int kW = Pack<A>::kSize;
  const bool packs = by_packs<A>(ld, logits);
  const int w = packs ? kW : 1;
  const int threads = int(std::min<unsigned>(kClassifierThreads, blocks_for(V, 32 * w) * 32));
  const int cached =
      backward ? int(std::min<int64_t>(blocks_for(V, w) * w, kClassifierShared / sizeof(A))) : 0;
  launch("classifier", packs ? classifier_kernel<A, kW> : classifier_kernel<A, 1>, rows, threads,
         32 * sizeof(float) + size_t(cached) * sizeof(A), stream, logits, ld, row_of, targets,
         dlogp, dentropy, logp, entropy, inverse_temperature, V, cached, backward);
}

// value[n] = x[n] . w. value (N), x (N, C), w (C)
template <class A, int W>
__global__ void value_forward_kernel(float* value, const A* x, const A* weight, int N, int C) {
  const int64_t n = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (n >= N) return;
  float v[W], w[W], sum = 0;
  for (int c = threadIdx.x % 32 * W; c < C; c += 32 * W) {
    load_floats(v, x + n * C + c);
    load_floats(w, weight + c);
    for (int j = 0; j < W; j++) sum += v[j] * w[j];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) value[n] = sum;
}
template <class A>
static void value_forward(float* value, const A* x, const A* w, int N, int C, cudaStream_t stream) {
  launch(
      "value_forward",
      by_packs<A>(C, x, w) ? value_forward_kernel<A, Pack<A>::kSize> : value_forward_kernel<A, 1>,
      warp_rows(N), kRowThreads, 0, stream, value, x, w, N, C);
}

// dx[n] = dvalue[n] w;  dw += sum_n dvalue[n] x[n] (null: frozen). dx, x (N, C), dw, w (C), dvalue
// (N)
template <class A, int W>
__global__ void value_backward_kernel(A* dx, const float* dvalue, const A* weight, int N, int C) {
  const int64_t n = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (n >= N) return;
  for (int c = threadIdx.x % 32 * W; c < C; c += 32 * W) {
    float w[W];
    load_floats(w, weight + c);
    for (int j = 0; j < W; j++) w[j] *= dvalue[n];
    store_floats(dx + n * C + c, w);
  }
}
template <class A>
static void value_backward(A* dx, float* dw, const float* dvalue, const A* x, const A* w, int N,
                           int C, void* scratch, cudaStream_t stream) {
  launch("value_backward",
         by_packs<A>(C, dx, w) ? value_backward_kernel<A, Pack<A>::kSize>
                               : value_backward_kernel<A, 1>,
         warp_rows(N), kRowThreads, 0, stream, dx, dvalue, w, N, C);
  if (dw) bias_backward(dw, x, dvalue, N, C, scratch, stream);
}

// Inputs of the head for rows [first, first + rows) of the logits.
template <class A>
const A* CudaGpt<A>::head_input(int64_t begin, int64_t rows) const {
  if (!gathered_) return a_.final_norm + begin * config_.C;
  move_rows<false>(a_.head_in, a_.final_norm, batch_.row_of + begin, int(rows), config_.C, stream_);
  return a_.head_in;
}
template <class A>
void CudaGpt<A>::classify(int64_t begin, int64_t rows, bool backward) const {
  classifier(a_.logits, int64_t(config_.padded_V()), batch_.row_of + begin, batch_.targets,
             has_dlogp_ ? batch_.dlogp : nullptr, has_dentropy_ ? batch_.dentropy : nullptr,
             batch_.logp, batch_.entropy, inverse_temperature_, config_.V, int(rows), backward,
             stream_);
}
template <class A>
void CudaGpt<A>::head_forward() {
  if (config_.head == Head::scalar) {
    value_forward(batch_.value, a_.final_norm, weights_->matrix(table_.head.weight), N_, config_.C,
                  stream_);
    return;
  }
  clear(batch_.logp, size_t(N_) * sizeof(float));  // of positions without a target
  clear(batch_.entropy, size_t(N_) * sizeof(float));
  for (int64_t begin = 0; begin < rows_; begin += a_.logit_rows) {
    const int64_t rows = std::min(a_.logit_rows, rows_ - begin);
    matmul(linear_product(rows, table_.head, head_input(begin, rows), a_.logits));
    classify(begin, rows, false);
  }
}

// Over the block's threads, in a fixed order; all get it. scratch: 32 of T in shared memory
template <class T, class Combine>
__device__ inline T block_reduce(T x, T* scratch, Combine combine) {
  for (int d = 16; d > 0; d /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (unsigned w = 1; w < blockDim.x / 32; w++) x = combine(x, scratch[w]);
  return x;
}
// *out += sum_i a[i] b[i] (b null: 1), by one block. a, b (n)
__global__ void __launch_bounds__(kBlockThreads)
    weighted_sum_kernel(double* out, const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += double(a[i]) * (b ? b[i] : 1);
  sum = block_reduce(sum, shared_memory<double>(), Plus());
  if (threadIdx.x == 0) *out += sum;
}
static void weighted_sum(double* out, const float* a, const float* b, int n, cudaStream_t stream) {
  launch("weighted_sum", weighted_sum_kernel, 1, kBlockThreads, 32 * sizeof(double), stream, out, a,
         b, n);
}

// From the per-token weights to dx, the gradient of the stream that leaves the last layer, through
// the head and the final norm. Logits are made here unless forward left them.
template <class A>
void CudaGpt<A>::head_backward(bool logits_ready) {
  const int C = config_.C;
  const Linear& head = table_.head;
  if (config_.head == Head::scalar) {
    if (has_dvalue_) {
      value_backward(a_.dnorm, gradient(head.weight), batch_.dvalue, a_.final_norm,
                     weights_->matrix(head.weight), N_, C, a_.scratch, stream_);
    } else {
      clear(a_.dnorm, size_t(N_) * size_t(C) * sizeof(A));
    }
  } else {
    if (!logits_ready) {
      clear(batch_.logp, size_t(N_) * sizeof(float));
      clear(batch_.entropy, size_t(N_) * sizeof(float));
    }
    if (gathered_) clear(a_.dnorm, size_t(N_) * size_t(C) * sizeof(A));
    for (int64_t begin = 0; begin < rows_; begin += a_.logit_rows) {
      const int64_t rows = std::min(a_.logit_rows, rows_ - begin);
      const A* x = logits_ready && gathered_ ? a_.head_in : head_input(begin, rows);
      if (!logits_ready) matmul(linear_product(rows, head, x, a_.logits));
      classify(begin, rows, true);
      A* dx = gathered_ ? a_.dhead_in : a_.dnorm + begin * C;
      matmul(input_gradient_product(rows, head, a_.logits, dx));
      if (gradient(head.weight)) {
        Product p = weight_gradient_product(rows, head, x, a_.logits);
        if (begin > 0) p.beta = 1;
        matmul(p);
      }
      if (gathered_) {
        move_rows<true>(a_.dnorm, dx, batch_.row_of + begin, int(rows), C, stream_);
      }
    }
  }
  if (has_dlogp_) {
    weighted_sum(&optimizer_->step.data()->loss_so_far, batch_.dlogp, batch_.logp, N_, stream_);
  }
  clear(a_.dx, size_t(N_) * size_t(C) * sizeof(A));
  stream_norm_backward(table_.final_norm, a_.dnorm, a_.x, a_.final_mean, a_.final_rstd,
                       &table_.blocks.back().down);
}

// =============================================================================================
// 4. The optimizers

// ---------------------------------------------------------------------------------------------
// The gradient's norm, in double; it stays on the device

// What an update needs to know about the whole gradient.
struct DeviceStep {
  double grad_norm;    // before clipping
  float scale;         // that clips it
  int skip;            // the norm is not finite: weights and optimizer state are left as they are
  double loss;         // sum of dlogp logp over the batches of the last step
  double loss_so_far;  // over those of the step under way
};
inline constexpr int kSquarePartials = 1024;  // doubles that sum_of_squares writes

// partials (kSquarePartials) = sums of g^2 over parts of g (n), which is 16-byte aligned
//
// The kernel reads g once; four squares are added in float, all else in double.
__global__ void sum_of_squares_kernel(double* partials, const float* g, int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * 4;
  double sum = 0;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < n; i += stride) {
    float v[4] = {};
    if (i + 4 <= n) {
      load_floats(v, g + i);
    } else {
      for (int j = 0; i + j < n; j++) v[j] = g[i + j];
    }
    sum += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
  }
  sum = block_reduce(sum, shared_memory<double>(), Plus());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
static void sum_of_squares(double* partials, const float* g, int64_t n, cudaStream_t stream) {
  launch("sum_of_squares", sum_of_squares_kernel, kSquarePartials, kRowThreads, 32 * sizeof(double),
         stream, partials, g, n);
}

// step from partials (count); max_norm 0: any norm
__global__ void __launch_bounds__(kBlockThreads)
    finish_norm_kernel(DeviceStep* step, const double* partials, int count, float max_norm) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
  sum = block_reduce(sum, shared_memory<double>(), Plus());
  if (threadIdx.x > 0) return;
  const double norm = sqrt(sum);
  step->grad_norm = norm;
  step->scale = max_norm > 0 && norm > max_norm ? float(max_norm / norm) : 1.f;
  step->skip = !isfinite(norm);
  step->loss = step->loss_so_far;
  step->loss_so_far = 0;
}
static void finish_norm(DeviceStep* step, const double* partials, int count, float max_norm,
                        cudaStream_t stream) {
  launch("finish_norm", finish_norm_kernel, 1, kBlockThreads, 32 * sizeof(double), stream, step,
         partials, count, max_norm);
}

template <class A>
void CudaGpt<A>::clip_gradients(float max_norm) const {
  const Optimizer& o = *optimizer_;
  sum_of_squares(o.partials.data(), o.gradients.data(), o.gradients.size(), stream_);
  finish_norm(o.step.data(), o.partials.data(), kSquarePartials, max_norm, stream_);
}

// ---------------------------------------------------------------------------------------------
// AdamW: reads w, g, m, v and writes w, m, v and the copy once: 30 bytes a parameter

// With g scaled by step->scale: m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
// w -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + decay w), as adamw() of train_gpt.cpp;
// nothing when step->skip. w, g, m, v and copy (w in bf16, or null) are arenas; one launch steps
// all runs of tensors that AdamW has.
struct AdamW {
  float lr[kKinds], decay, beta1, beta2, eps;
  float c1, c2;  // 1 / (1 - beta^step)
};
struct AdamWRun {     // tensors side by side that are stepped alike
  int64_t w, g, v;    // where it begins in w and copy, in g and m, in v
  int64_t size;       // elements
  int64_t chunk = 0;  // a block has a chunk of it: those of the runs before this one
  int rate = 0;       // in AdamW::lr
  bool decay = false;
};
inline constexpr int kAdamWPack = 8, kAdamWChunk = kRowThreads * kAdamWPack;  // elements

__global__ void adamw_kernel(float* w, bf16* copy, const float* g, float* m, float* v,
                             const AdamWRun* runs, int count, AdamW o, const DeviceStep* step) {
  if (step->skip) return;
  int r = 0;  // this block's run: the last whose first chunk is not past this one
  for (int end = count; end - r > 1;) {
    const int middle = (r + end) / 2;
    (runs[middle].chunk <= blockIdx.x ? r : end) = middle;
  }
  const AdamWRun run = runs[r];
  w += run.w, g += run.g, m += run.g, v += run.v;
  if (copy) copy += run.w;
  const int64_t n = run.size, begin = (blockIdx.x - run.chunk) * kAdamWChunk;
  constexpr int W = kAdamWPack;
  const float lr = o.lr[run.rate], decay = run.decay ? o.decay : 0;
  const float scale = step->scale, decay_factor = 1 - lr * decay;
  const auto update = [&](float& wi, float gi, float& mi, float& vi) {
    gi *= scale;
    mi = o.beta1 * mi + (1 - o.beta1) * gi;
    vi = o.beta2 * vi + (1 - o.beta2) * gi * gi;
    wi = decay_factor * wi - lr * o.c1 * mi / (sqrtf(vi * o.c2) + o.eps);
  };
  // Packs are read at once where all arrays of the run begin at multiples of 16 bytes.
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool packs = aligned(w) && aligned(g) && aligned(m) && aligned(v) && aligned(copy);
  const int64_t i = begin + threadIdx.x * W;
  if (packs && i + W <= n) {
    float wi[W], gi[W], mi[W], vi[W];
    load_floats(wi, w + i);
    load_floats(gi, g + i);
    load_floats(mi, m + i);
    load_floats(vi, v + i);
    for (int j = 0; j < W; j++) update(wi[j], gi[j], mi[j], vi[j]);
    store_floats(w + i, wi);
    store_floats(m + i, mi);
    store_floats(v + i, vi);
    if (copy) store_floats(copy + i, wi);
  } else {
    for (int64_t j = i; j < min(n, i + W); j++) {
      update(w[j], g[j], m[j], v[j]);
      if (copy) copy[j] = from_float<bf16>(w[j]);
    }
  }
}
// Numbers the chunks of the runs, in their order; returns how many there are.
static int64_t number_chunks(std::vector<AdamWRun>& runs) {
  int64_t chunks = 0;
  for (AdamWRun& run : runs) {
    run.chunk = chunks;
    chunks += (run.size + kAdamWChunk - 1) / kAdamWChunk;
  }
  return chunks;
}
// runs (count), on the device, with `chunks` in all
static void adamw(float* w, bf16* copy, const float* g, float* m, float* v, const AdamWRun* runs,
                  int count, int64_t chunks, const OptimizerStep& o, const DeviceStep* step,
                  cudaStream_t stream) {
  if (count == 0) return;
  const auto correction = [&](float beta) {
    return 1 / (1 - float(std::pow(double(beta), double(o.step))));
  };
  const float c1 = correction(o.beta1), c2 = correction(o.beta2);
  AdamW how{{}, o.decay, o.beta1, o.beta2, o.eps, c1, c2};
  std::copy(o.lr.begin(), o.lr.end(), how.lr);
  launch("adamw", adamw_kernel, unsigned(chunks), kRowThreads, 0, stream, w, copy, g, m, v, runs,
         count, how, step);
}

template <class A>
void CudaGpt<A>::adamw_step(const OptimizerStep& step) const {
  const Optimizer& o = *optimizer_;
  adamw(weights_->master.data(), weights_->bf16_copy(0), o.gradients.data(), o.moment1.data(),
        o.moment2.data(), o.runs.data(), int(o.runs.size()), o.chunks, step, o.step.data(),
        stream_);
}

// ---------------------------------------------------------------------------------------------
// Muon, as muon() of train_gpt.cpp, for a batch of equal matrices. The products between the steps
// take most of the time.
//
//   muon_momentum  m = mu m + (1-mu) g, and the squares of u = mu m + (1-mu) g
//   muon_begin     X = u / (||u|| + 1e-7), transposed when tall: (rows, columns) is wide
//   five times     A = X X^T, B = A A;  B = 2.0315 B - 4.7750 A;  X = B X + 3.4445 X
//   muon_update    w -= lr (X + decay w), transposed back

struct MuonBatch {
  const int64_t* offsets;  // (count) of the matrices in w, g and m; on the device
  int count, out, in;
  int rows() const { return std::min(out, in); }  // of X
  int columns() const { return std::max(out, in); }
};
inline constexpr int kMuonBlocks = 64;  // for a matrix's norm

// m, g: the arenas that batch.offsets point into; squares (count, kMuonBlocks)
__global__ void muon_momentum_kernel(float* m, float* squares, const float* g,
                                     const int64_t* offsets, int64_t size, float mu,
                                     const DeviceStep* step) {
  if (step->skip) return;
  const int64_t offset = offsets[blockIdx.y];
  const float scale = step->scale;
  float square = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size;
       i += int64_t(kMuonBlocks) * blockDim.x) {
    const float grad = g[offset + i] * scale, mi = mu * m[offset + i] + (1 - mu) * grad;
    const float u = mu * mi + (1 - mu) * grad;
    m[offset + i] = mi;
    square += u * u;
  }
  square = block_sum(square, shared_memory<float>());
  if (threadIdx.x == 0) squares[blockIdx.y * kMuonBlocks + blockIdx.x] = square;
}
static void muon_momentum(float* m, float* squares, const float* g, const MuonBatch& batch,
                          float mu, const DeviceStep* step, cudaStream_t stream) {
  launch("muon_momentum", muon_momentum_kernel, dim3(kMuonBlocks, batch.count), kRowThreads,
         32 * sizeof(float), stream, m, squares, g, batch.offsets, int64_t(batch.out) * batch.in,
         mu, step);
}

// x (count, rows, columns)
// A block has a tile of 32 x 32, which turns in shared memory: reads and writes run along rows.
template <class A>
__global__ void muon_begin_kernel(A* x, const float* squares, const float* g, const float* m,
                                  const int64_t* offsets, int out, int in, float mu,
                                  const DeviceStep* step) {
  if (step->skip) return;
  float* tile = shared_memory<float>();  // (32, 33)
  const int column = threadIdx.x % 32, begin = threadIdx.x / 32, stride = blockDim.x / 32;
  const int64_t offset = offsets[blockIdx.z];
  const float* parts = squares + blockIdx.z * kMuonBlocks;
  const float inverse = 1 / (sqrtf(warp_sum(parts[column] + parts[column + 32])) + 1e-7f);
  const float scale = step->scale;
  const int o0 = blockIdx.y * 32, i0 = blockIdx.x * 32;
  A* dst = x + int64_t(blockIdx.z) * out * in;
  for (int r = begin; r < 32; r += stride) {
    const int o = o0 + r, i = i0 + column;
    if (o >= out || i >= in) continue;
    const int64_t element = int64_t(o) * in + i;
    const float u = mu * m[offset + element] + (1 - mu) * (g[offset + element] * scale);
    if (out > in)
      tile[r * 33 + column] = u * inverse;
    else
      dst[element] = from_float<A>(u * inverse);
  }
  if (out <= in) return;
  __syncthreads();
  for (int r = begin; r < 32; r += stride) {
    const int i = i0 + r, o = o0 + column;
    if (o < out && i < in) dst[int64_t(i) * out + o] = from_float<A>(tile[column * 33 + r]);
  }
}
template <class A>
static void muon_begin(A* x, const float* squares, const float* g, const float* m,
                       const MuonBatch& batch, float mu, const DeviceStep* step,
                       cudaStream_t stream) {
  static_assert(kMuonBlocks == 64, "each lane adds two of them");
  launch("muon_begin", muon_begin_kernel<A>,
         dim3(blocks_for(batch.in, 32), blocks_for(batch.out, 32), batch.count), kRowThreads,
         32 * 33 * sizeof(float), stream, x, squares, g, m, batch.offsets, batch.out, batch.in, mu,
         step);
}

// w = (1 - lr decay) w - lr sqrt(max(1, out/in)) X; w and copy (w in bf16, or null) are arenas
template <class A>
__global__ void muon_update_kernel(float* w, bf16* copy, const A* x, const int64_t* offsets,
                                   int out, int in, float lr, float decay_factor,
                                   const DeviceStep* step) {
  if (step->skip) return;
  float* tile = shared_memory<float>();  // (32, 33)
  const int column = threadIdx.x % 32, begin = threadIdx.x / 32, stride = blockDim.x / 32;
  const int64_t offset = offsets[blockIdx.z];
  const int o0 = blockIdx.y * 32, i0 = blockIdx.x * 32;
  const A* src = x + int64_t(blockIdx.z) * out * in;
  if (out > in) {
    for (int r = begin; r < 32; r += stride) {
      const int i = i0 + r, o = o0 + column;
      if (o < out && i < in) tile[column * 33 + r] = to_float(src[int64_t(i) * out + o]);
    }
    __syncthreads();
  }
  for (int r = begin; r < 32; r += stride) {
    const int o = o0 + r, i = i0 + column;
    if (o >= out || i >= in) continue;
    const int64_t element = int64_t(o) * in + i;
    const float step_x = out > in ? tile[r * 33 + column] : to_float(src[element]);
    const float wi = decay_factor * w[offset + element] - lr * step_x;
    w[offset + element] = wi;
    if (copy) copy[offset + element] = from_float<bf16>(wi);
  }
}
template <class A>
static void muon_update(float* w, bf16* copy, const A* x, const MuonBatch& batch, float lr,
                        float decay, const DeviceStep* step, cudaStream_t stream) {
  const float step_lr = lr * std::sqrt(std::max(1.f, float(batch.out) / float(batch.in)));
  launch("muon_update", muon_update_kernel<A>,
         dim3(blocks_for(batch.in, 32), blocks_for(batch.out, 32), batch.count), kRowThreads,
         32 * 33 * sizeof(float), stream, w, copy, x, batch.offsets, batch.out, batch.in, step_lr,
         1 - lr * decay, step);
}

// Muon's directions of every group, into x: five times X <- a X + (b A + c A A) X, A = X X^T, as
// muon() of train_gpt.cpp; a X and b A come in as the products' C.
template <class A>
void CudaGpt<A>::muon_directions(float momentum) const {
  const Optimizer& o = *optimizer_;
  for (const auto& g : o.layout.groups) {
    for (int begin = 0; begin < g.count; begin += g.batch_size) {
      const MuonBatch batch{o.offsets.data() + g.first_matrix + begin,
                            std::min(g.batch_size, g.count - begin), g.out, g.in};
      const int64_t rows = batch.rows(), columns = batch.columns();
      float* squares = o.squares.data();
      muon_momentum(o.moment1.data(), squares, o.gradients.data(), batch, momentum, o.step.data(),
                    stream_);
      A *x = o.other.data(), *next = o.x.data() + g.x + begin * g.size();
      muon_begin(x, squares, o.gradients.data(), o.moment1.data(), batch, momentum, o.step.data(),
                 stream_);
      const auto batched = [&](Product p) {
        p.batch = batch.count;
        p.a_stride = p.M * p.K, p.b_stride = p.K * p.N, p.d_stride = p.M * p.N;
        return p;
      };
      for (int iteration = 0; iteration < 5; iteration++) {
        A *gram = o.gram.data(), *combined = o.combined.data();
        matmul(batched(product_abt(rows, rows, columns, x, x, gram)));
        Product square = batched(product(rows, rows, rows, gram, gram, combined));
        square.alpha = 2.0315f, square.beta = -4.7750f, square.c = gram;
        matmul(square);
        Product step = batched(product(rows, columns, rows, combined, x, next));
        step.beta = 3.4445f, step.c = x;
        matmul(step);
        std::swap(x, next);
      }
    }
  }
}

template <class A>
void CudaGpt<A>::muon_step(const OptimizerStep& step) const {
  const Optimizer& o = *optimizer_;
  for (const auto& g : o.layout.groups) {
    muon_update(weights_->master.data(), weights_->bf16_copy(0), o.x.data() + g.x,
                {o.offsets.data() + g.first_matrix, g.count, g.out, g.in}, step.muon_lr,
                step.muon_decay, o.step.data(), stream_);
  }
}

template <class A>
UpdateStats CudaGpt<A>::stats(int updates_ago) {
  const DeviceStep* step = optimizer_ ? optimizer_->history.find(updates_ago) : nullptr;
  if (!step) return {};
  return {step->grad_norm, step->skip != 0, step->loss};
}

// =============================================================================================
// 5. Decoding

// Attention over a paged KV cache

template <class A>
class CudaKvCache : public KvCache {
 public:
  CudaKvCache(const Config& c, int64_t limit)
      : KvCache(limit),
        layer_size(int64_t(c.NKV) * kPage * c.HS),
        L_(c.L),
        chunk_pages_(std::clamp<int64_t>(kChunkBytes / page_bytes(c), 1,
                                         std::max<int64_t>(1, pages_of(limit)))) {}
  static int64_t page_bytes(const Config& c) {
    return 2 * int64_t(c.L) * c.NKV * kPage * c.HS * int64_t(sizeof(A));
  }
  static int64_t pages_of(int64_t positions) { return (positions + kPage - 1) / kPage; }
  A* page(int p) const {
    return chunks_[size_t(p / chunk_pages_)].data() + p % chunk_pages_ * page_size();
  }
  int64_t page_size() const { return 2 * L_ * layer_size; }
  PageTable<A> of_layer(A* const* pages, int max_pages, int l) const {
    return {pages, max_pages, l * layer_size, (L_ + l) * layer_size};
  }

  const int64_t layer_size;  // elements of a layer's keys in a page, and of its values

 private:
  // Memory comes in chunks of this size, since each takes a call that stops the device.
  static constexpr int64_t kChunkBytes = int64_t(32) << 20;

  void reserve_memory(int64_t pages) override {
    while (int64_t(chunks_.size()) * chunk_pages_ < pages) {
      chunks_.emplace_back("the KV cache", chunk_pages_ * page_size(), kDecodeFlags);
    }
  }

  int64_t L_, chunk_pages_;
  std::vector<Buffer<A>> chunks_;
};

template <class A>
struct PageCopy {
  const A* src;
  A* dst;
};

// Copies pages, every layer's keys (z = 0) and values (z = 1): grid (copies, L, 2).
template <class A>
__global__ void copy_pages_kernel(const PageCopy<A>* copies, int64_t layer_size) {
  const int64_t layer = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * layer_size;
  const A* src = copies[blockIdx.x].src + layer;
  A* dst = copies[blockIdx.x].dst + layer;
  constexpr int kSize = Pack<A>::kSize;  // layer_size is a multiple of 64 HS
  for (int64_t i = int64_t(threadIdx.x) * kSize; i < layer_size; i += int64_t(blockDim.x) * kSize) {
    store_pack(dst + i, load_pack(src + i));
  }
}

// k, v (N, NKV HS) of N new tokens, in rows of stride ld, to position[n] of row row_of[n]; -1: a
// dead row, which writes nothing.
template <class A, int W>
__global__ void __launch_bounds__(256)
    cache_append_kernel(PageTable<A> table, const A* k, const A* v, int64_t ld, const int* row_of,
                        const int* position, int64_t count, int NKV, int HS) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;  // a run of W elements
  if (i >= count) return;
  const int each = NKV * HS / W, n = int(i / each), element = int(i % each) * W;
  const int kv = element / HS, d = element % HS, t = position[n];
  if (row_of[n] < 0) return;
  A* dst = table.page(row_of[n], t) + (int64_t(kv) * kPage + t % kPage) * HS + d;
  if constexpr (W > 1) {
    store_pack(dst + table.keys, load_pack(k + n * ld + element));
    store_pack(dst + table.values, load_pack(v + n * ld + element));
  } else {
    dst[table.keys] = k[n * ld + element];
    dst[table.values] = v[n * ld + element];
  }
}
template <class A>
static void cache_append(const PageTable<A>& table, const A* k, const A* v, int64_t ld,
                         const int* row_of, const int* position, int N, int NKV, int HS,
                         cudaStream_t stream) {
  constexpr int kSize = Pack<A>::kSize;
  const bool whole = by_packs<A>(HS | ld, k, v);  // pages begin at multiples of 128 bytes
  const int64_t count = int64_t(N) * NKV * HS / (whole ? kSize : 1);
  launch("cache_append", whole ? cache_append_kernel<A, kSize> : cache_append_kernel<A, 1>,
         blocks_for(count, 256), 256, 0, stream, table, k, v, ld, row_of, position, count, NKV, HS);
}

// out (., NH HS): the tokens of `count` tiles, the rows that have several new tokens, attend to the
// positions up to their own, which are in the cache already. in: of all N tokens of the call
template <class A>
static void cache_prefill(A* out, const AttentionInput<A>& in, const PageTable<A>& table,
                          const QueryTile* tiles, int count, int N, int NH, int NKV, int HS,
                          cudaStream_t stream) {
  const auto grid = [&](int each) {
    return dim3(unsigned(NH), unsigned(count), unsigned(kQueryTile / each));
  };
  const CachedRows<A> rows{in, {N, NH, NKV, HS, nullptr, nullptr}, table, tiles};
  forward_by_tiles<A>("cache_prefill", out, nullptr, rows, grid, stream);
}

// out (., NH HS): each of N tokens, which[i] or all of a call, attends to positions 0 ..
// position[n] of row row_of[n], which are in the cache already: one new token of each row. Row -1
// is a dead row, which gets zeros.
//
// One block a token and query head; the heads of a group run side by side and share the pages in
// L2. 8 lanes form a split, which walks over its own part of the keys, kCacheKeys of them at a time
// so that as many loads are under way, with a maximum and a sum of its own; in the end the splits
// are merged. Lane c of a split holds the runs of W elements c, c + 8, ... of query, key, value and
// sum. What a token gets depends on its position alone, not on its neighbours in the batch. (What
// it gets from cache_prefill has other last bits.)
inline constexpr int kCacheThreads = 512, kCacheKeys = 4, kCacheEach = 128 / 8;

template <class A, int W>
__global__ void __launch_bounds__(kCacheThreads)
    cache_attention_kernel(A* out, const A* q, int64_t q_ld, PageTable<A> table, const int* which,
                           const int* row_of, const int* position, int NH, int NKV, int HS,
                           float scale) {
  constexpr int kSplits = kCacheThreads / 8, kWarps = kCacheThreads / 32;
  const auto token = [&] {  // read at the end again: no register is left to keep it in
    const int i = int(blockIdx.y);
    return which ? which[i] : i;
  };
  const int n = token(), h = int(blockIdx.x), kv = h / (NH / NKV);
  const int split = int(threadIdx.x) / 8, lane = int(threadIdx.x) % 8, warp = int(threadIdx.x) / 32;
  const int keys = position[n] + 1, row = row_of[n];
  if (row < 0) {
    if (int(threadIdx.x) < HS) out[(int64_t(n) * NH + h) * HS + threadIdx.x] = from_float<A>(0.f);
    return;
  }
  const auto element = [&](int i) { return (i / W * 8 + lane) * W; };  // of the run of x[i]
  const auto load = [&](float(&x)[kCacheEach], const A* row) {
#pragma unroll
    for (int i = 0; i < kCacheEach; i += W) {
      Pack<A> run{};
      if (element(i) < HS) {
        if constexpr (W > 1) {
          run = load_pack(row + element(i));
        } else {
          run.v[0] = row[element(i)];
        }
      }
#pragma unroll
      for (int e = 0; e < W; e++) x[i + e] = to_float(run.v[e]);
    }
  };
  const auto row_at = [&](int64_t layer, int t) {
    return table.page(row, t) + layer + (int64_t(kv) * kPage + t % kPage) * HS;
  };

  float query[kCacheEach], sum[kCacheEach] = {}, highest = kLowest, total = 0;
  load(query, q + n * q_ld + h * HS);
  for (int begin = 0; begin < keys; begin += kCacheKeys * kSplits) {
    float score[kCacheKeys], higher = highest;
#pragma unroll
    for (int u = 0; u < kCacheKeys; u++) {
      const int t = begin + u * kSplits + split;
      float x[kCacheEach] = {};
      if (t < keys) load(x, row_at(table.keys, t));
      score[u] = 0;
#pragma unroll
      for (int i = 0; i < kCacheEach; i++) score[u] += query[i] * x[i];
      for (int d = 1; d < 8; d *= 2) score[u] += __shfl_xor_sync(kAllLanes, score[u], d);
      score[u] = t < keys ? score[u] * scale : -INFINITY;
      higher = fmaxf(higher, score[u]);
    }
    const float shrink = exp2_approx(highest - higher);
    highest = higher;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < kCacheEach; i++) sum[i] *= shrink;
#pragma unroll
    for (int u = 0; u < kCacheKeys; u++) {
      const int t = begin + u * kSplits + split;
      if (t >= keys) continue;
      float x[kCacheEach];
      load(x, row_at(table.values, t));
      const float p = exp2_approx(score[u] - highest);
      total += p;
#pragma unroll
      for (int i = 0; i < kCacheEach; i++) sum[i] += p * x[i];
    }
  }

  // The four splits of a warp by shuffles, then the warps through shared memory.
  const float warp_highest = warp_max(highest), shrink = exp2_approx(highest - warp_highest);
  const auto over_splits = [](float x) {
    x += __shfl_xor_sync(kAllLanes, x, 8);
    return x + __shfl_xor_sync(kAllLanes, x, 16);
  };
  float* sums = shared_memory<float>();  // (kWarps, HS)
  float* maxima = sums + kWarps * HS;    // (kWarps)
  float* totals = maxima + kWarps;       // (kWarps)
  total = over_splits(total * shrink);
#pragma unroll
  for (int i = 0; i < kCacheEach; i++) {
    sum[i] = over_splits(sum[i] * shrink);
    const int d = element(i) + i % W;
    if (threadIdx.x % 32 < 8 && d < HS) sums[warp * HS + d] = sum[i];
  }
  if (threadIdx.x % 32 == 0) maxima[warp] = warp_highest, totals[warp] = total;
  __syncthreads();  // every warp's part is there
  if (int(threadIdx.x) < HS) {
    float top = maxima[0], value = 0, weight = 0;
    for (int w = 1; w < kWarps; w++) top = fmaxf(top, maxima[w]);
    for (int w = 0; w < kWarps; w++) {
      const float factor = exp2_approx(maxima[w] - top);
      value += factor * sums[w * HS + threadIdx.x];
      weight += factor * totals[w];
    }
    out[(int64_t(token()) * NH + h) * HS + threadIdx.x] = from_float<A>(value / weight);
  }
}
template <class A>
static void cache_attention(A* out, const A* q, int64_t q_ld, const PageTable<A>& table,
                            const int* which, const int* row_of, const int* position, int N, int NH,
                            int NKV, int HS, cudaStream_t stream) {
  check_attention(NH, NKV, HS);
  constexpr int kSize = Pack<A>::kSize;
  launch(
      "cache_attention",
      by_packs<A>(HS | q_ld, q) ? cache_attention_kernel<A, kSize> : cache_attention_kernel<A, 1>,
      dim3(unsigned(NH), unsigned(N)), kCacheThreads,
      sizeof(float) * size_t(kCacheThreads / 32 * (HS + 2)), stream, out, q, q_ld, table, which,
      row_of, position, NH, NKV, HS, kLog2E / sqrtf(float(HS)));
}

// ---------------------------------------------------------------------------------------------
// Sampling, as sample_row() of train_gpt.cpp, a block a row. Where sample_row sorts, and adds in
// order, this kernel counts: probabilities, relative to the likeliest, are integers of 2^-44, and
// sums of integers have no order. A token's key is its probability's bits, then its id's
// complement: keys differ, and larger ones are likelier, or of the smaller id among equals.

struct SampleRow : Sampling {
  uint64_t position = 0;
  int history_begin = 0, history_end = 0;  // in `history`
  int bias_begin = 0, bias_end = 0;        // in `biases`
  bool want_distribution = false;          // in `scratch`
};
struct ScoreRow {  // a row of logits whose token is scored
  int id = -1;     // -1: the sampled one
  int vocab = 0;   // of ids below, the likeliest are looked for
  int top = -1;    // how many of them; -1: the row is not scored
};
using Word = unsigned long long;
inline constexpr int kIdBits = 20, kKeyBits = 50, kBinBits = 10, kBins = 1 << kBinBits;

// mix64 and uniform01 of cake/run.h
__device__ inline uint64_t device_mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
__device__ inline double device_uniform01(uint64_t bits) {
  return (double(bits >> 11) + .5) * 0x1p-53;
}

__device__ inline unsigned bits_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
// p in [0, 1] in units of 2^-44; the sum of 2^20 of them is below 2^64. NaN: 0
__device__ inline Word fixed_point(float p) { return p > 0 ? Word(double(p) * 0x1p44) : 0; }
__device__ inline Word key_of(float p, int id) {
  return Word(bits_of(p)) << kIdBits | Word((1 << kIdBits) - 1 - id);
}

// The key at which the weights of the keys, added from the largest down, reach `goal`. Digit by
// digit: a histogram of the keys that share the digits found so far. bins: (kBins + 2)
template <class Weight>
__device__ inline Word key_at(const float* p, int V, Word goal, Word* bins, Weight weight) {
  Word prefix = 0;
  for (int shift = kKeyBits - kBinBits; shift >= 0; shift -= kBinBits) {
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = 0;
    __syncthreads();
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
      const Word key = key_of(p[j], j);
      if (key >> (shift + kBinBits) != prefix) continue;
      atomicAdd(bins + (key >> shift) % kBins, weight(p[j]));
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l has the 32 bins that end at top
      const int top = kBins - 1 - int(threadIdx.x) * 32;
      Word own = 0;
      for (int b = top; b > top - 32; b--) own += bins[b];
      const Word sum = warp_scan(own);
      const unsigned reached = __ballot_sync(kAllLanes, sum >= goal);
      if (int(threadIdx.x) == __ffs(int(reached)) - 1) {
        Word left = goal - (sum - own);
        int b = top;
        while (bins[b] < left) left -= bins[b--];
        bins[kBins] = Word(b);
        bins[kBins + 1] = left;
      } else if (reached == 0) {
        bins[kBins] = bins[kBins + 1] = 0;  // never: there is no such sum
      }
    }
    __syncthreads();
    prefix = prefix << kBinBits | bins[kBins];
    goal = bins[kBins + 1];
    __syncthreads();
  }
  return prefix;
}

// Tokens whose key is less than `floor` get probability 0.
__device__ inline void drop_below(float* p, int V, Word floor) {
  for (int j = threadIdx.x; j < V; j += blockDim.x)
    if (key_of(p[j], j) < floor) p[j] = 0;
  __syncthreads();  // before other threads read p[j]
}

// The smallest id at which the sum of the fixed-point weights of ids 0 .. id exceeds u (0 to 1) of
// their total; `best` when the total is 0. words: (34)
__device__ inline int draw(const float* p, int V, double u, int best, Word* words) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int each = (V + 32 * warps - 1) / (32 * warps) * 32;  // ids that a warp has
  const int begin = warp * each, end = min(V, begin + each);
  const auto weight = [&](int j) { return j < end ? fixed_point(p[j]) : Word(0); };
  Word sum = 0;
  for (int j = begin + lane; j < end; j += 32) sum += weight(j);
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  __syncthreads();
  if (lane == 0) words[warp] = sum;
  if (threadIdx.x == 0) words[32] = Word(best);
  __syncthreads();
  Word total = 0, before = 0;
  for (int w = 0; w < warps; w++) {
    if (w == warp) before = total;
    total += words[w];
  }
  Word left = Word(u * double(total));
  if (total > 0 && left >= total) left = total - 1;
  if (before <= left && left < before + sum) {  // this warp has it
    left -= before;
    for (int j = begin + lane;; j += 32) {
      const Word up_to = warp_scan(weight(j));
      const unsigned past = __ballot_sync(kAllLanes, left < up_to);
      if (past) {
        if (lane == __ffs(int(past)) - 1) words[32] = Word(j);
        break;
      }
      left -= __shfl_sync(kAllLanes, up_to, 31);
    }
  }
  __syncthreads();
  return int(words[32]);
}

// A float's order as an unsigned number.
__device__ inline unsigned ordered_bits(float x) {
  const unsigned bits = bits_of(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One id a row: penalty, biases, temperature, min_p, top_k, top_p in this order, then a draw by
// (seed, stream, position); temperature 0: the likeliest; -1: a logit is not finite. logp: of the
// id under softmax(logits / temperature). ids, logp (count); logits (count, ld) with V tokens; rows
// (count), history, biases: on the device; scratch (count, V): on request, what the probabilities
// of all V tokens are proportional to. V up to 2^20.
template <class A>
__global__ void __launch_bounds__(kBlockThreads)
    sample_kernel(int* ids, float* logp, const A* logits, int64_t ld, int all,
                  const SampleRow* rows, const int* history, const LogitBias* biases,
                  float* scratch) {
  Word* words = shared_memory<Word>();  // (34) reductions, then (kBins + 2)
  Word* bins = words + 34;
  float* floats = reinterpret_cast<float*>(bins);  // (32) of block_max and block_sum
  const SampleRow& how = rows[blockIdx.x];  // a copy would take registers for the whole kernel
  const int V = how.vocab > 0 ? min(all, how.vocab) : all;
  const A* x = logits + blockIdx.x * ld;
  float* p = scratch + int64_t(blockIdx.x) * all;

  float highest_logit = -INFINITY;  // infinity when a logit is not finite
  for (int j = threadIdx.x; j < all; j += blockDim.x) {
    const float v = to_float(x[j]);
    highest_logit = fmaxf(highest_logit, isfinite(v) ? v : INFINITY);
  }
  highest_logit = block_max(highest_logit, floats);
  if (highest_logit == INFINITY) {
    if (threadIdx.x == 0) ids[blockIdx.x] = -1, logp[blockIdx.x] = 0;
    return;
  }
  for (int j = threadIdx.x; j < V; j += blockDim.x) p[j] = to_float(x[j]) + 0.f;  // no -0
  __syncthreads();
  if (how.repetition_penalty != 1) {  // of each id once: from the logit, not from p
    for (int h = how.history_begin + threadIdx.x; h < how.history_end; h += blockDim.x) {
      const int id = history[h];
      if (id < 0 || id >= V) continue;
      const float v = to_float(x[id]);
      p[id] = (v > 0 ? v / how.repetition_penalty : v * how.repetition_penalty) + 0.f;
    }
    __syncthreads();
  }
  if (how.bias_begin < how.bias_end) {  // each id once
    for (int b = how.bias_begin + threadIdx.x; b < how.bias_end; b += blockDim.x) {
      const int id = biases[b].id;
      if (id >= 0 && id < V) p[id] = p[id] + biases[b].bias + 0.f;
    }
    __syncthreads();
  }
  Word most = 0;  // the logit's order, then the id's complement
  for (int j = threadIdx.x; j < V; j += blockDim.x) {
    most = max(most, Word(ordered_bits(p[j])) << 32 | Word(kAllLanes - unsigned(j)));
  }
  most = block_reduce(most, words, [](Word a, Word b) { return a > b ? a : b; });
  const int best = int(kAllLanes - unsigned(most & kAllLanes));
  int id = best;
  if (how.temperature > 0) {
    const float highest = p[best], k = kLog2E / how.temperature;
    __syncthreads();  // all have read it
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
      const float e = exp2_approx((p[j] - highest) * k);
      p[j] = e < how.min_p ? 0 : e;
    }
    __syncthreads();
    if (how.top_k > 0 && how.top_k < V) {
      drop_below(p, V, key_at(p, V, Word(how.top_k), bins, [](float) { return Word(1); }));
    }
    if (how.top_p < 1) {  // the fewest that reach top_p of what is left, and at least one
      Word sum = 0;
      for (int j = threadIdx.x; j < V; j += blockDim.x) sum += fixed_point(p[j]);
      sum = block_reduce(sum, words, Plus());
      const Word goal = Word(ceil(double(max(how.top_p, 0.f)) * double(sum)));
      drop_below(p, V, key_at(p, V, max(goal, Word(1)), bins, fixed_point));
    }
    const uint64_t bits =
        device_mix64(device_mix64(device_mix64(how.seed) ^ how.stream) ^ how.position);
    id = draw(p, V, device_uniform01(bits), best, words);
  }
  if (how.want_distribution) {  // the weights of `draw`
    for (int j = threadIdx.x; j < all; j += blockDim.x) {
      if (j >= V) {
        p[j] = 0;
      } else if (how.temperature > 0) {
        p[j] = float(double(fixed_point(p[j])) * 0x1p-44);
      } else {
        p[j] = j == best ? 1 : 0;
      }
    }
  }
  // log p of the id, under softmax(logits / temperature) of all tokens, without penalty
  const float k = (how.temperature > 0 ? 1 / how.temperature : 1) * kLog2E;
  float sum = 0;
  for (int j = threadIdx.x; j < all; j += blockDim.x) {
    sum += exp2_approx((to_float(x[j]) - highest_logit) * k);
  }
  sum = block_sum(sum, floats);
  if (threadIdx.x > 0) return;
  ids[blockIdx.x] = id;
  logp[blockIdx.x] = ((to_float(x[id]) - highest_logit) * k - log2f(sum)) * kLn2;
}
template <class A>
static void sample(int* ids, float* logp, const A* logits, int64_t ld, int V, const SampleRow* rows,
                   const int* history, const LogitBias* biases, int count, float* scratch,
                   cudaStream_t stream) {
  if (V > 1 << kIdBits)
    fail("cuda: sampling: found ", V, " tokens, expected at most ", 1 << kIdBits);
  launch("sample", sample_kernel<A>, count, V > 1024 ? kBlockThreads : 256,
         (34 + kBins + 2) * sizeof(Word), stream, ids, logp, logits, ld, V, rows, history, biases,
         scratch);
}

// How likely the model finds a token of each row of logits, and its likeliest tokens in order, the
// smallest id first among equals: log softmax(logits) of all V tokens; and the token's rank in that
// order. logp, rank (count); top (count, top_ld); logits (count, ld); rows (count); ids (count):
// the sampled ones. The likeliest are found one after the other, each as the largest below the one
// before.
template <class A>
__global__ void __launch_bounds__(kBlockThreads)
    score_kernel(float* logp, int* rank, TopToken* top, int top_ld, const A* logits, int64_t ld,
                 int V, const ScoreRow* rows, const int* ids) {
  Word* words = shared_memory<Word>();  // (33)
  float* floats = reinterpret_cast<float*>(words);
  const ScoreRow row = rows[blockIdx.x];
  if (row.top < 0) return;
  const A* x = logits + blockIdx.x * ld;
  float highest = -INFINITY;
  for (int j = threadIdx.x; j < V; j += blockDim.x) highest = fmaxf(highest, to_float(x[j]));
  highest = block_max(highest, floats);
  float sum = 0;
  for (int j = threadIdx.x; j < V; j += blockDim.x) {
    sum += exp2_approx((to_float(x[j]) - highest) * kLog2E);
  }
  const float log2_sum = log2f(block_sum(sum, floats));
  const auto logp_of = [&](int id) {
    return ((to_float(x[id]) - highest) * kLog2E - log2_sum) * kLn2;
  };
  const auto key_of_logit = [&](int j) {
    return Word(ordered_bits(to_float(x[j]) + 0.f)) << 32 | Word(kAllLanes - unsigned(j));
  };
  Word last = ~Word(0);
  for (int k = 0; k < row.top; k++) {
    Word most = 0;
    for (int j = threadIdx.x; j < row.vocab; j += blockDim.x) {
      const Word key = key_of_logit(j);
      if (key < last) most = max(most, key);
    }
    last = block_reduce(most, words, [](Word a, Word b) { return a > b ? a : b; });
    const int id = int(kAllLanes - unsigned(last & kAllLanes));
    if (threadIdx.x == 0) top[blockIdx.x * int64_t(top_ld) + k] = {id, logp_of(id)};
  }
  const int id = row.id >= 0 ? row.id : ids[blockIdx.x];
  Word likelier = 0;  // tokens
  if (id >= 0) {
    const Word own = key_of_logit(id);
    for (int j = threadIdx.x; j < row.vocab; j += blockDim.x) likelier += key_of_logit(j) > own;
  }
  likelier = block_reduce(likelier, words, Plus());
  if (threadIdx.x > 0) return;
  logp[blockIdx.x] = id >= 0 ? logp_of(id) : 0;
  rank[blockIdx.x] = id >= 0 ? 1 + int(likelier) : 0;
}
template <class A>
static void score(float* logp, int* rank, TopToken* top, int top_ld, const A* logits, int64_t ld,
                  int V, const ScoreRow* rows, const int* ids, int count, cudaStream_t stream) {
  launch("score", score_kernel<A>, count, V > 1024 ? kBlockThreads : 256, 33 * sizeof(Word), stream,
         logp, rank, top, top_ld, logits, ld, V, rows, ids);
}

// ---------------------------------------------------------------------------------------------
// A call: the rows' new tokens packed end to end, with pages of keys and values in place of
// documents

// Keys and values have the type of the activations.
template <class A>
static void check_cache_type(CacheType type) {
  constexpr bool kIsF32 = std::is_same_v<A, float>;
  if (type == CacheType::automatic || (type == CacheType::f32) == kIsF32) return;
  const char* own = kIsF32 ? "f32" : "bf16";
  fail("--cache-type ", kIsF32 ? "bf16" : "f32", ": the CUDA engine computes in ", own,
       " here and keeps keys and values in it, expected ", own, " or auto");
}

template <class A>
std::unique_ptr<KvCache> CudaGpt<A>::make_cache(int64_t limit, CacheType type) {
  check_cache_type<A>(type);
  return std::make_unique<CudaKvCache<A>>(config_, limit);
}

// Rows with several new tokens attend by tiles, the last of a row first, since they see the most
// keys; the others token by token.
struct QuerySplit {
  std::vector<QueryTile> tiles;
  std::vector<int> single;  // of the N tokens
};
static QuerySplit split_queries(const NewTokens& added) {
  QuerySplit split;
  for (size_t r = 0; r + 1 < added.starts.size(); r++) {
    const int begin = added.starts[r], end = added.starts[r + 1];
    if (end - begin == 1) split.single.push_back(begin);
    for (int t = (end - begin - 1) / kQueryTile * kQueryTile; end - begin > 1 && t >= 0;
         t -= kQueryTile) {
      split.tiles.push_back(
          {int(r), begin + t, std::min(begin + t + kQueryTile, end), added.lengths[r] + t});
    }
  }
  return split;
}

template <class A>
void CudaGpt<A>::decode(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
                        bool want_logits) {
  auto& pages = dynamic_cast<CudaKvCache<A>&>(cache);
  const int C = config_.C, NH = config_.NH, NKV = config_.NKV, HS = config_.HS, V = config_.V;
  const auto R = int64_t(rows.size());
  const NewTokens added = pack_new_tokens(config_, cache, rows);
  check_tokens("decode", int64_t(added.tokens.size()), "the length of prompts, or their number");
  const std::vector<int>&starts = added.starts, &lengths = added.lengths;
  const QuerySplit split = split_queries(added);
  std::vector<int> row_of, last;
  int64_t longest = 0, past = 0;  // of the rows' sequences; tokens for repetition penalties
  int64_t targets = 0, biases = 0;
  int top = -1;  // the largest of the rows
  for (size_t r = 0; r < rows.size(); r++) {
    const size_t n = rows[r].tokens.size();
    row_of.insert(row_of.end(), n, int(r));
    last.push_back(starts[r + 1] - 1);
    longest = std::max(longest, int64_t(lengths[r]) + int64_t(n));
    if (rows[r].sampling.repetition_penalty != 1) past += int64_t(rows[r].history.size());
    targets += int64_t(rows[r].targets.size()), biases += int64_t(rows[r].biases.size());
    top = std::max(top, std::min(rows[r].top, V));
  }
  result.ids.assign(size_t(R), 0);
  result.logp.assign(size_t(R), 0.f);
  result.logits.resize(want_logits ? size_t(R * V) : 0);
  result.make_scores(rows);
  if (R == 0) return;

  // All memory comes before the cache grows: a page that was replaced has been copied, then, or
  // nothing has changed.
  const auto max_pages = int(round_up(longest, 8 * kPage) / kPage);  // shapes repeat for 512 tokens
  // One token a row is a shape that repeats: dead rows, which have no sequence, fill it up.
  const bool one_each = int64_t(added.tokens.size()) == R;
  const int64_t padded = padded_rows(R), N = one_each ? padded : int64_t(added.tokens.size());
  // Scores: of the rows' sampled tokens, then of their targets
  const bool scored = top >= 0 || targets > 0;
  const int64_t scores = scored ? R + targets : 0, top_ld = std::max(top, 1);
  if (!decoding_) decoding_ = std::make_unique<Decoding>();
  Decoding& d = *decoding_;
  const int64_t bytes = Decoding::input_bytes(N, padded, max_pages) +
                        (past + targets) * int64_t(sizeof(int)) +
                        biases * int64_t(sizeof(LogitBias)) + scores * int64_t(sizeof(ScoreRow));
  if (!d.fits(N, padded, bytes)) resources_->graphs.clear(kDecode);
  d.reserve(config_, table_.lora.rank, N, padded, bytes, 2 * R + scores * (2 + 2 * top_ld));
  d.staging.begin(d.inputs.data(), d.inputs.bytes());
  extend_rope(1 + *std::max_element(added.positions.begin(), added.positions.end()));

  std::vector<PageCopy<A>> copies;
  NewPositions room(cache, rows, [&](int src, int dst) {
    copies.push_back({pages.page(src), pages.page(dst)});
  });
  std::vector<A*> page_table(size_t(R) * size_t(max_pages), nullptr);
  std::vector<int> history;
  std::vector<SampleRow> how;
  std::vector<LogitBias> all_biases;
  std::vector<ScoreRow> score_rows;  // (scores)
  std::vector<int> target_of;        // (targets) of the N tokens
  const auto vocab_of = [&](const DecodeRow& row) {
    return row.sampling.vocab > 0 ? std::min(V, row.sampling.vocab) : V;
  };
  if (scored) {
    for (const DecodeRow& row : rows) {
      score_rows.push_back({-1, vocab_of(row), std::min(row.top, vocab_of(row))});
    }
  }
  for (size_t r = 0; r < rows.size(); r++) {
    const int row_top = std::clamp(rows[r].top, 0, vocab_of(rows[r]));
    for (size_t t = 0; t < rows[r].targets.size(); t++) {
      score_rows.push_back({rows[r].targets[t], vocab_of(rows[r]), row_top});
      target_of.push_back(starts[r] + int(t));
    }
  }
  for (size_t r = 0; r < rows.size(); r++) {
    const std::vector<int>& list = cache.pages(rows[r].sequence);
    for (size_t i = 0; i < list.size(); i++)
      page_table[r * size_t(max_pages) + i] = pages.page(list[i]);
    const auto begin = int(history.size());
    if (rows[r].sampling.repetition_penalty != 1) {
      history.insert(history.end(), rows[r].history.begin(), rows[r].history.end());
    }
    const auto bias_begin = int(all_biases.size());
    all_biases.insert(all_biases.end(), rows[r].biases.begin(), rows[r].biases.end());
    how.push_back({rows[r].sampling, uint64_t(lengths[r]) + rows[r].tokens.size(), begin,
                   int(history.size()), bias_begin, int(all_biases.size()),
                   rows[r].want_distribution});
  }

  // To the device, by one copy. What the recorded layers read comes first: where it lies follows
  // from their key.
  auto& staging = d.staging;
  const int* tokens = staging.pack(added.tokens, N, 0);
  const int* positions = staging.pack(added.positions, N, 0);
  const int* row = staging.pack(row_of, N, -1);
  A* const* table_pages = staging.pack(page_table, padded * max_pages, static_cast<A*>(nullptr));
  const int* last_token = staging.pack(last, padded, -1);
  const QueryTile* tiles = staging.pack(split.tiles, int64_t(split.tiles.size()), {});
  const int* single = staging.pack(split.single, int64_t(split.single.size()), 0);
  const SampleRow* sample_rows = staging.pack(how, R, {});
  const PageCopy<A>* page_copies = staging.pack(copies, int64_t(copies.size()), {});
  const int* past_tokens = staging.pack(history, past, 0);
  const LogitBias* bias_list = staging.pack(all_biases, biases, {});
  const ScoreRow* scored_rows = staging.pack(score_rows, scores, {});
  const int* target_rows = staging.pack(target_of, targets, 0);
  staging.send(stream_);
  // What comes back, by one copy
  int* ids = d.results.data();
  float* logp = reinterpret_cast<float*>(ids + R);
  float* score_logp = logp + R;
  int* ranks = reinterpret_cast<int*>(score_logp + scores);
  TopToken* top_tokens = reinterpret_cast<TopToken*>(ranks + scores);  // (scores, top_ld)
  if (!copies.empty()) {
    launch("copy_pages", copy_pages_kernel<A>,
           dim3(unsigned(copies.size()), unsigned(config_.L), 2), dim3(256), 0, stream_,
           page_copies, pages.layer_size);
  }

  const int64_t ld = config_.padded_V();
  const auto layers = [&] {
    layers_forward(
        N, d.a, tokens, positions,
        [&](const AttentionInput<A>& in, const LayerActivations<A>& a, int l) {
          const PageTable<A> table = pages.of_layer(table_pages, max_pages, l);
          cache_append(table, in.k, in.v, in.k_ld, row, positions, int(N), NKV, HS, stream_);
          if (const auto count = int(split.tiles.size()); count > 0) {
            cache_prefill(a.att, in, table, tiles, count, int(N), NH, NKV, HS, stream_);
          }
          if (const auto count = one_each ? int(N) : int(split.single.size()); count > 0) {
            cache_attention(a.att, in.q, in.q_ld, table, one_each ? nullptr : single, row,
                            positions, count, NH, NKV, HS, stream_);
          }
        });
  };
  if (one_each) {
    run_graph({kDecode, N, max_pages, adapters_}, layers);
  } else {
    layers();
  }
  std::vector<A> logits;
  // Of a row of the chunk of logits that is on the device
  const auto read_distribution = [&](int64_t row, Distribution& distribution) {
    std::vector<A> z(static_cast<size_t>(V));
    std::vector<float>&logp = distribution.logp, &p = distribution.probability;
    logp.resize(size_t(V)), p.resize(size_t(V));
    copy_to_host(z.data(), d.a.logits + row * ld, size_t(V), stream_, "logits");
    copy_to_host(p.data(), d.probabilities + row * V, size_t(V), stream_, "probabilities");
    wait();
    double highest = -INFINITY, sum = 0, total = 0;
    for (const A x : z) highest = std::max(highest, double(float(x)));
    for (const A x : z) sum += std::exp(double(float(x)) - highest);
    for (const float x : p) total += double(x);
    for (size_t j = 0; j < z.size(); j++) {
      logp[j] = float(double(float(z[j])) - highest - std::log(sum));
      p[j] = float(double(p[j]) / total);
    }
  };
  for (int64_t begin = 0; begin < R; begin += d.a.logit_rows) {
    const int64_t count = std::min(d.a.logit_rows, R - begin);
    const int64_t with_dead = std::min(d.a.logit_rows, padded - begin);
    move_rows<false>(d.a.head_in, d.a.final_norm, last_token + begin, int(with_dead), C, stream_);
    matmul(linear_product(with_dead, table_.head, d.a.head_in, d.a.logits));
    sample(ids + begin, logp + begin, d.a.logits, ld, V, sample_rows + begin, past_tokens,
           bias_list, int(count), d.probabilities, stream_);
    if (top >= 0) {
      score(score_logp + begin, ranks + begin, top_tokens + begin * top_ld, int(top_ld), d.a.logits,
            ld, V, scored_rows + begin, ids + begin, int(count), stream_);
    }
    for (int64_t i = 0; i < count; i++) {
      const auto r = size_t(begin + i);
      if (rows[r].want_distribution) read_distribution(i, result.distributions[r]);
    }
    if (!want_logits) continue;
    logits.resize(size_t(count * V));
    check(
        cudaMemcpy2DAsync(logits.data(), size_t(V) * sizeof(A), d.a.logits, size_t(ld) * sizeof(A),
                          size_t(V) * sizeof(A), size_t(count), cudaMemcpyDeviceToHost, stream_),
        "logits");
    wait();
    for (size_t i = 0; i < logits.size(); i++)
      result.logits[size_t(begin * V) + i] = float(logits[i]);
  }
  for (int64_t begin = 0; begin < targets; begin += d.a.logit_rows) {
    const int64_t count = std::min(d.a.logit_rows, targets - begin), offset = R + begin;
    move_rows<false>(d.a.head_in, d.a.final_norm, target_rows + begin, int(count), C, stream_);
    matmul(linear_product(count, table_.head, d.a.head_in, d.a.logits));
    score(score_logp + offset, ranks + offset, top_tokens + offset * top_ld, int(top_ld),
          d.a.logits, ld, V, scored_rows + offset, ids, int(count), stream_);
  }
  std::vector<int> results(size_t(2 * R + scores * (2 + 2 * top_ld)));
  copy_to_host(results.data(), d.results.data(), results.size(), stream_, "sampled tokens");
  wait();
  const int* next_result = results.data();
  const auto unpack = [&](auto* dst, int64_t count) {
    std::memcpy(static_cast<void*>(dst), next_result, size_t(count) * sizeof *dst);
    next_result += size_t(count) * sizeof *dst / sizeof(int);
  };
  std::vector<float> host_logp(static_cast<size_t>(scores));
  std::vector<int> host_ranks(static_cast<size_t>(scores));
  std::vector<TopToken> host_top(static_cast<size_t>(scores * top_ld));
  unpack(result.ids.data(), R), unpack(result.logp.data(), R);
  unpack(host_logp.data(), scores), unpack(host_ranks.data(), scores);
  unpack(host_top.data(), scores * top_ld);
  const auto score_at = [&](size_t i) {
    const auto begin = host_top.begin() + int64_t(i) * top_ld;
    return TokenScore{host_logp[i], {begin, begin + score_rows[i].top}, host_ranks[i]};
  };
  auto target = size_t(R);  // in score_rows
  for (size_t r = 0; r < rows.size() && scored; r++) {
    if (rows[r].top >= 0) result.scores[r] = score_at(r);
    for (TokenScore& s : result.target_scores[r]) {
      s = score_at(target++);
      if (!std::isfinite(s.logp)) result.ids[r] = -1;
    }
  }
  expect_sampled(result, added);
  room.keep();
}

// =============================================================================================
// 6. What is only there to be fast, and memory. A reader may stop here.

// ---------------------------------------------------------------------------------------------
// The sums of section 2

// A block (x, y) has 32 columns of set y. Warp w sums rows w, w + 32, ...; the warps' sums are
// added in order.
__global__ void __launch_bounds__(kBlockThreads)
    column_sums_kernel(float* out0, float* out1, float* out2, const float* in, int count,
                       int columns) {
  float* sums = shared_memory<float>();  // (32 warps, 32 columns)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  const int64_t ld = int64_t(gridDim.y) * columns;
  float sum = 0;
  if (c < columns) {
    for (int r = warp; r < count; r += 32) sum += in[r * ld + int64_t(blockIdx.y) * columns + c];
  }
  sums[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= columns) return;
  for (int w = 1; w < 32; w++) sum += sums[w * 32 + lane];
  (blockIdx.y == 0 ? out0 : blockIdx.y == 1 ? out1 : out2)[c] += sum;
}
static void column_sums(std::array<float*, 3> out, const float* in, int count, int columns,
                        cudaStream_t stream) {
  const auto sets = std::remove(out.begin(), out.end(), nullptr) - out.begin();
  launch("column_sums", column_sums_kernel, dim3(blocks_for(columns, 32), unsigned(sets)),
         kBlockThreads, kBlockThreads * sizeof(float), stream, out[0], out[1], out[2], in, count,
         columns);
}

// ---------------------------------------------------------------------------------------------
// The embedding's gradient, dtable[ids[n]] += dx[n], is a sum of rows by id. Positions are sorted
// by id (a stable radix sort: within an id they stay in order), and each run of one id is summed by
// one owner: a warp when it is short, a block when it is long. So dx is read once and dtable's rows
// are touched once, whatever the ids; the sort moves 16 bytes a position and digit.

inline constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;  // of a key, sorted at a time
inline constexpr int kSortTile = 2048;                           // keys that a block sorts

// counts[digit, tile] = keys of the tile with this digit
__global__ void sort_count_kernel(int* counts, const int* keys, int shift, const int* live) {
  const int N = *live;
  int* histogram = shared_memory<int>();  // (kDigits)
  histogram[threadIdx.x] = 0;
  __syncthreads();
  const int begin = blockIdx.x * kSortTile, end = min(N, begin + kSortTile);
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    atomicAdd(histogram + (keys[i] >> shift) % kDigits, 1);
  }
  __syncthreads();
  counts[threadIdx.x * gridDim.x + blockIdx.x] = histogram[threadIdx.x];
}
// x[i] = sum of x[0 .. i - 1], in place, by one block
__global__ void __launch_bounds__(kBlockThreads) exclusive_scan_kernel(int* x, int n) {
  int* sums = shared_memory<int>();  // (32) of the warps
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int before = 0;
  for (int begin = 0; begin < n; begin += blockDim.x) {
    const int i = begin + threadIdx.x, value = i < n ? x[i] : 0;
    const int sum = warp_scan(value);
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < warps; w++) {
      if (w == warp && i < n) x[i] = before + total + sum - value;
      total += sums[w];
    }
    before += total;
    __syncthreads();
  }
}
// Each key goes to where its digit's keys start, after those of earlier tiles (counts, scanned),
// earlier warps and earlier lanes. values: null for 0, 1, 2, ...
__global__ void sort_scatter_kernel(int* keys_out, int* values_out, const int* keys,
                                    const int* values, const int* counts, int shift,
                                    const int* live) {
  const int N = *live;
  int* next = shared_memory<int>();  // (warps, kDigits) place of the warp's next key
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int each = kSortTile / warps, begin = blockIdx.x * kSortTile + warp * each;
  for (int i = threadIdx.x; i < warps * kDigits; i += blockDim.x) next[i] = 0;
  __syncthreads();
  for (int i = begin + lane; i < min(N, begin + each); i += 32) {
    atomicAdd(next + warp * kDigits + (keys[i] >> shift) % kDigits, 1);
  }
  __syncthreads();
  int place = counts[threadIdx.x * gridDim.x + blockIdx.x];  // a thread has a digit
  for (int w = 0; w < warps; w++) {
    const int count = next[w * kDigits + threadIdx.x];
    next[w * kDigits + threadIdx.x] = place;
    place += count;
  }
  __syncthreads();
  for (int i = begin + lane; i - lane < min(N, begin + each); i += 32) {
    const int key = i < N ? keys[i] : 0;
    const int digit = i < N ? (key >> shift) % kDigits : kDigits;
    const unsigned equal = __match_any_sync(kAllLanes, digit), earlier = equal & ((1u << lane) - 1);
    int* slot = next + warp * kDigits + digit;
    const int dst = i < N ? *slot + __popc(earlier) : 0;
    __syncwarp();
    if (i < N) {
      if (earlier == 0) *slot += __popc(equal);
      keys_out[dst] = key;
      values_out[dst] = values ? values[i] : i;
    }
    __syncwarp();
  }
}

inline constexpr int kShortRun = 32;      // rows of a run that is a warp's, at most
inline constexpr int kLongThreads = 512;  // of a block that has a long one

// Warp i takes the run that begins at entry i of the sorted list, if one does and it is short.
template <class A, int W>
__global__ void embed_backward_short_kernel(float* dtable, const A* dx, const int* ids,
                                            const int* order, const int* live, int C) {
  const int lane = threadIdx.x % 32, i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, N = *live;
  if (i >= N) return;
  const int id = ids[i];
  if (i > 0 && ids[i - 1] == id) return;
  if (i + kShortRun < N && ids[i + kShortRun] == id) return;
  const bool mine = i + lane < N && ids[i + lane] == id;
  const int n = mine ? order[i + lane] : 0, count = __popc(__ballot_sync(kAllLanes, mine));
  for (int begin = 0; begin < C; begin += 32 * W) {
    const int c = begin + lane * W;
    float sum[W] = {}, d[W];
    for (int r = 0; r < count; r++) {
      const int64_t row = __shfl_sync(kAllLanes, n, r);
      if (c < C) {
        load_floats(d, dx + row * C + c);
        for (int j = 0; j < W; j++) sum[j] += d[j];
      }
    }
    if (c >= C) continue;
    float* dst = dtable + int64_t(id) * C + c;
    load_floats(d, dst);
    for (int j = 0; j < W; j++) sum[j] += d[j];
    store_floats(dst, sum);
  }
}
// A long run holds an entry 32 k, the first of which is at most 31 after its beginning: block k
// takes it. Warp w sums rows w, w + 32, ... of the run; the warps' sums are added in order. y:
// columns.
template <class A, int W>
__global__ void __launch_bounds__(kLongThreads)
    embed_backward_long_kernel(float* dtable, const A* dx, const int* ids, const int* order,
                               const int* live, int C) {
  float* sums = shared_memory<float>();  // (warps, W, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int k = blockIdx.x * kShortRun, N = *live;
  if (k >= N) return;
  const int id = ids[k];
  if (k > 0 && ids[k - kShortRun] == id) return;
  const int i = k - 31 + lane;
  const int begin = k + 1 - __popc(__ballot_sync(kAllLanes, i >= 0 && ids[max(i, 0)] == id));
  if (begin + kShortRun >= N || ids[begin + kShortRun] != id) return;
  int end = begin + kShortRun + 1, high = N;  // of the run; ids are sorted
  while (end < high) {
    const int middle = (end + high) / 2;
    if (ids[middle] == id)
      end = middle + 1;
    else
      high = middle;
  }
  const int c = (blockIdx.y * 32 + lane) * W;
  float sum[W] = {}, d[W];
  if (c < C) {
    for (int r = begin + warp; r < end; r += warps) {
      load_floats(d, dx + int64_t(order[r]) * C + c);
      for (int j = 0; j < W; j++) sum[j] += d[j];
    }
  }
  for (int j = 0; j < W; j++) sums[(warp * W + j) * 32 + lane] = sum[j];
  __syncthreads();
  if (warp > 0 || c >= C) return;
  for (int w = 1; w < warps; w++)
    for (int j = 0; j < W; j++) sum[j] += sums[(w * W + j) * 32 + lane];
  float* dst = dtable + int64_t(id) * C + c;
  load_floats(d, dst);
  for (int j = 0; j < W; j++) sum[j] += d[j];
  store_floats(dst, sum);
}

// Bytes of scratch for N positions over a table of `rows` rows.
static size_t embed_backward_scratch(int N, int) {
  return (4 * size_t(N) + size_t(kDigits) * blocks_for(N, kSortTile)) * sizeof(int);
}
// dtable[ids[n]] += dx[n] for the first *live of the N rows. dtable (rows, C), dx (N, C), ids (N)
// in [0, rows), live (1)
template <class A>
static void embed_backward(float* dtable, const A* dx, const int* ids, const int* live, int N,
                           int C, int rows, void* scratch, cudaStream_t stream) {
  int* base = static_cast<int*>(scratch);
  int *keys[2] = {base, base + N}, *values[2] = {base + 2 * int64_t(N), base + 3 * int64_t(N)};
  int* counts = base + 4 * int64_t(N);  // (kDigits, tiles)
  const int tiles = int(blocks_for(N, kSortTile));
  const int *sorted = ids, *order = nullptr;
  int side = 0;
  for (int shift = 0; shift == 0 || (rows - 1) >> shift > 0; shift += kDigitBits, side ^= 1) {
    launch("sort_count", sort_count_kernel, tiles, kDigits, kDigits * sizeof(int), stream, counts,
           sorted, shift, live);
    launch("exclusive_scan", exclusive_scan_kernel, 1, kBlockThreads, 32 * sizeof(int), stream,
           counts, kDigits * tiles);
    launch("sort_scatter", sort_scatter_kernel, tiles, kDigits,
           kDigits / 32 * kDigits * sizeof(int), stream, keys[side], values[side], sorted, order,
           counts, shift, live);
    sorted = keys[side], order = values[side];
  }
  constexpr int kW = Pack<A>::kSize;
  const bool packs = by_packs<A>(C, dtable, dx);
  const int w = packs ? kW : 1;
  launch("embed_backward_short",
         packs ? embed_backward_short_kernel<A, kW> : embed_backward_short_kernel<A, 1>,
         warp_rows(N), kRowThreads, 0, stream, dtable, dx, sorted, order, live, C);
  launch("embed_backward_long",
         packs ? embed_backward_long_kernel<A, kW> : embed_backward_long_kernel<A, 1>,
         dim3(blocks_for(N, kShortRun), blocks_for(C, 32 * w)), kLongThreads,
         kLongThreads * w * sizeof(float), stream, dtable, dx, sorted, order, live, C);
}

// ---------------------------------------------------------------------------------------------
// Memory

static constexpr const char* kModelFlags = "--depth, --layers, --channels";
inline int64_t most_logit_rows = 8192;  // tests lower it

// Rows of logits that are made at a time where a batch may have `rows` of them: 8,192, or what 1
// GiB holds of a large vocabulary, in steps of 128. The head's gradient is summed over them, so
// that they decide its last bits: they are a function of the model alone wherever a batch has more.
template <class A>
int64_t logit_rows_of(const Config& c, int64_t rows) {
  const int64_t in_memory = (int64_t(1) << 30) / (c.padded_V() * int64_t(sizeof(A)));
  return std::min({most_logit_rows, std::max<int64_t>(128, in_memory / 128 * 128), rows});
}

// Device memory for a list of named arrays. With `measure` it only adds up their sizes, for the
// memory plan.
class Memory {
 public:
  Memory(const char* lower, bool measure) : lower_(lower), measure_(measure) {}
  template <class T>
  void allocate(T*& p, const char* name, int64_t count) {
    p = nullptr;
    bytes_ += count * int64_t(sizeof(T));
    if (measure_ || count == 0) return;
    pieces_.emplace_back(name, count * int64_t(sizeof(T)), lower_);
    p = reinterpret_cast<T*>(pieces_.back().data());
  }
  int64_t bytes() const { return bytes_; }

 private:
  const char* lower_;
  bool measure_;
  int64_t bytes_ = 0;
  std::vector<Buffer<unsigned char>> pieces_;
};

// Host arrays on their way to the device. Two sides of pinned memory take turns: one is filled
// while the device may still read the other, and the host waits only for what it sent two turns
// ago.
class Staging {
 public:
  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging() {
    for (Side& side : sides_) {
      if (side.data) cudaFreeHost(side.data);
      if (side.read) cudaEventDestroy(side.read);
    }
  }
  // Begins to pack arrays for the memory at `device`, of `bytes` at most.
  void begin(void* device, size_t bytes) {
    turn_ ^= 1, used_ = 0, device_ = static_cast<unsigned char*>(device);
    Side& side = sides_[turn_];
    if (side.read) {
      check(cudaEventSynchronize(side.read), "the batch before last");
    } else {
      check(cudaEventCreateWithFlags(&side.read, cudaEventDisableTiming), "an event");
    }
    if (bytes <= side.bytes) return;
    if (side.data) check(cudaFreeHost(std::exchange(side.data, nullptr)), "pinned memory");
    side.bytes = 0;
    check(cudaMallocHost(reinterpret_cast<void**>(&side.data), bytes), "pinned memory");
    side.bytes = bytes;
  }
  // Appends `values`, and then `dead` up to `count` elements. Returns where they will be on the
  // device; null: there are none.
  template <class Values, class T = typename Values::value_type>
  T* pack(const Values& values, int64_t count, T dead) {
    if (count == 0) return nullptr;
    Side& side = sides_[turn_];
    const size_t bytes = size_t(count) * sizeof(T), offset = used_;
    if (offset + bytes > side.bytes) fail("cuda: an upload is larger than announced");
    T* pinned = reinterpret_cast<T*>(side.data + offset);
    std::copy(values.begin(), values.end(), pinned);
    std::fill(pinned + values.size(), pinned + count, dead);
    used_ += size_t(round_up(int64_t(bytes), kAlignment));
    return reinterpret_cast<T*>(device_ + offset);
  }
  unsigned char* end() const { return device_ + used_; }  // on the device, of what was packed
  // Queues one copy of all that was packed.
  void send(cudaStream_t stream) {
    if (used_ == 0) return;
    const Side& side = sides_[turn_];
    copy_to_device(device_, side.data, used_, stream, "a copy to the device");
    check(cudaEventRecord(side.read, stream), "an event");
  }

  static constexpr int64_t kAlignment = 16;  // bytes, of each array

 private:
  struct Side {
    unsigned char* data = nullptr;
    size_t bytes = 0;
    cudaEvent_t read = nullptr;  // the device has read it
  };
  Side sides_[2];
  int turn_ = 0;
  size_t used_ = 0;
  unsigned char* device_ = nullptr;
};

// Weights: fp32 masters in the table's order, and in bf16 mode a bf16 copy that products and
// embeddings read. In inference in bf16 only vectors, which norms read, have masters.
template <class A>
struct Weights {
  Buffer<float> master;
  Buffer<A> copy;                            // bf16
  std::map<int64_t, int64_t> vector_offset;  // offset in the table -> in master: inference in bf16
  static constexpr bool kCopy = !std::is_same_v<A, float>;

  Weights(const ParamTable& table, bool train, cudaStream_t stream) {
    int64_t vectors = 0;
    if (kCopy && !train) {
      for (const Tensor& t : table.tensors) {
        if (t.kind != Kind::vector) continue;
        vector_offset[t.offset] = vectors;
        vectors += round_up(t.size(), 16);
      }
    }
    master = Buffer<float>("parameters", kCopy && !train ? vectors : table.size, kModelFlags);
    copy = Buffer<A>("parameters in bf16", kCopy ? table.size : 0, kModelFlags);
    master.clear(stream);
    copy.clear(stream);
  }
  static int64_t bytes(const ParamTable& table, bool train) {
    if (!kCopy) return table.size * 4;
    int64_t vectors = 0;
    for (const Tensor& t : table.tensors)
      if (t.kind == Kind::vector) vectors += round_up(t.size(), 16);
    return table.size * 2 + (train ? table.size : vectors) * 4;
  }
  const A* matrix(int64_t offset) const {
    if (offset < 0) return nullptr;
    if constexpr (kCopy) {
      return copy.data() + offset;
    } else {
      return master.data() + offset;
    }
  }
  bf16* bf16_copy(int64_t offset) const {  // null in fp32
    if constexpr (kCopy) {
      return copy.data() + offset;
    } else {
      return nullptr;
    }
  }
  float* vector(int64_t offset) const {  // fp32; null where only the bf16 copy exists
    if (offset < 0) return nullptr;
    if (vector_offset.empty()) return master.data() + offset;
    const auto found = vector_offset.find(offset);
    return found == vector_offset.end() ? nullptr : master.data() + found->second;
  }
};

template <class A>
void Activations<A>::lay_out(const Config& c, int rank, int64_t N, int64_t rows, Saved saved,
                             Memory& memory) {
  logit_rows = logit_rows_of<A>(c, rows);
  const int64_t up = c.has_gate() ? 2 * c.F : c.F, heads = int64_t(c.NH) * c.HS;
  const auto allocate = [&](auto*& p, const char* name, int64_t count) {
    memory.allocate(p, name, count);
  };
  const int64_t means = c.has_biases() ? N : 0;  // of LayerNorm alone
  layers.resize(size_t(c.L));
  for (int l = 0; l < c.L; l++) {
    LayerActivations<A>& layer = layers[size_t(l)];
    const bool light = l > 0 && saved == Saved::light;  // norms and act of layer 0 serve all
    if (l > 0 && saved != Saved::all && !light) {       // one layer's memory serves all
      layer = layers[0];
      if (saved == Saved::layer_inputs) allocate(layer.x, "x", N * c.C);
      if (saved == Saved::none && l == 1) allocate(layer.x, "x", N * c.C);
      if (saved == Saved::none && l > 1) layer.x = layers[size_t(l) - 2].x;
      continue;
    }
    allocate(layer.x, "x", N * c.C);
    if (light) {
      layer.norm1 = layers[0].norm1, layer.norm2 = layers[0].norm2, layer.act = layers[0].act;
    } else {
      allocate(layer.norm1, "norm1", N * c.C);
      allocate(layer.norm2, "norm2", N * c.C);
      allocate(layer.act, "act", N * c.F);
    }
    allocate(layer.mean1, "mean1", means), allocate(layer.rstd1, "rstd1", N);
    allocate(layer.qkv, "qkv", N * c.qkv());
    if (c.family == Family::qwen3 && saved != Saved::none) {
      allocate(layer.rotated, "rotated", N * (c.NH + c.NKV) * c.HS);
    }
    allocate(layer.att, "att", N * heads);
    allocate(layer.lse, "lse", N * c.NH);
    allocate(layer.mid, "mid", N * c.C);
    allocate(layer.mean2, "mean2", means), allocate(layer.rstd2, "rstd2", N);
    allocate(layer.up, "up", N * up);
  }
  allocate(x, "x", N * c.C);
  allocate(final_norm, "final_norm", N * c.C);
  allocate(final_mean, "final_mean", means), allocate(final_rstd, "final_rstd", N);
  allocate(inner, "inner", N * rank);
  if (c.head == Head::lm) {
    allocate(head_in, "head_in", logit_rows * c.C);
    allocate(logits, "logits", logit_rows * c.padded_V());
  }
  if (saved == Saved::none) return;
  if (c.head == Head::lm) allocate(dhead_in, "dhead_in", logit_rows * c.C);
  allocate(dx, "dx", N * c.C);
  allocate(dnorm, "dnorm", N * std::max<int64_t>(c.C, heads));
  allocate(dqkv, "dqkv", N * c.qkv());
  allocate(dact, "dact", N * c.F);
  allocate(dup, "dup", N * up);
  allocate(att_dot, "att_dot", N * c.NH);
  const int widest = int(std::max<int64_t>(c.qkv(), up)), tokens = int(N);
  allocate(bias_sums, "bias_sums", c.has_qkv_biases() ? widest : 0);
  const size_t bytes =
      std::max({embed_backward_scratch(tokens, c.V), embed_backward_scratch(tokens, c.T),
                norm_backward_scratch(tokens, c.C), qk_backward_scratch(tokens, c.HS),
                bias_backward_scratch(tokens, std::max(widest, c.C))});  // the scalar head's too
  allocate(scratch, "scratch", int64_t(bytes));
}

// Of all inputs of N rows: six arrays, the number of live ones, and the weights.
size_t DeviceBatch::input_bytes(int64_t N, bool train) {
  const int64_t words =
      5 * round_up(N, 4) + round_up(N, 128) + 4 + (train ? 3 : 0) * round_up(N, 4);
  return size_t(words) * sizeof(int);
}
void DeviceBatch::lay_out(int64_t N, bool train, Memory& memory) {
  memory.allocate(inputs, "batch", int64_t(input_bytes(N, train)));
  for (float** p : {&logp, &entropy, &value}) memory.allocate(*p, "results", N);
}

template <class A>
void CudaGpt<A>::reserve(int64_t N) {
  if (N <= capacity_) return;
  wait();
  resources_->graphs.clear();
  a_ = {}, batch_ = {}, capacity_ = 0;
  resources_->memory = std::make_unique<Memory>(kBatchFlags, false);
  a_.lay_out(config_, table_.lora.rank, N, round_up(N, 128), saved_, *resources_->memory);
  batch_.lay_out(N, train_, *resources_->memory);
  capacity_ = N;
}

// ---------------------------------------------------------------------------------------------
// CUDA graphs: the work under a key is launched kernel by kernel the first time (products are timed
// then), recorded the second time, and replayed from then on. The function may only queue kernels
// and products; every value that it passes to them must be part of the key.

class Graphs {
 public:
  Graphs() = default;
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;
  ~Graphs() { clear(); }

  template <class Work>
  void run(const GraphKey& key, cudaStream_t stream, Work&& work) {
    if (!enabled) return work();
    if (entries_.size() >= kMost && !entries_.contains(key)) drop_oldest();
    Entry& entry = entries_[key];
    entry.used = ++turn_;
    if (!entry.graph) {
      if (entry.seen++ == 0) return work();
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a graph");
      cudaGraph_t recorded = nullptr;
      try {
        work();
      } catch (...) {
        cudaStreamEndCapture(stream, &recorded);
        if (recorded) cudaGraphDestroy(recorded);
        throw;
      }
      check(cudaStreamEndCapture(stream, &recorded), "recording a graph");
      const cudaError_t status = cudaGraphInstantiate(&entry.graph, recorded, 0);
      cudaGraphDestroy(recorded);
      check(status, "making a graph");
    } else {
      replays++;
    }
    check(cudaGraphLaunch(entry.graph, stream), "launching a graph");
  }
  // When memory that they name has moved. `kind`: of those whose key begins with it; -1: of all
  void clear(int64_t kind = -1) {
    std::erase_if(entries_, [&](const auto& entry) {
      if (kind >= 0 && entry.first.front() != kind) return false;
      if (entry.second.graph) cudaGraphExecDestroy(entry.second.graph);
      return true;
    });
  }

  int64_t size() const {  // that were recorded
    return std::count_if(entries_.begin(), entries_.end(),
                         [](const auto& entry) { return entry.second.graph != nullptr; });
  }

  bool enabled = true;
  int64_t replays = 0;

 private:
  static constexpr size_t kMost = 64;
  struct Entry {
    int seen = 0;
    int64_t used = 0;  // the last turn
    cudaGraphExec_t graph = nullptr;
  };
  void drop_oldest() {
    const auto oldest = std::min_element(
        entries_.begin(), entries_.end(),
        [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
    if (oldest->second.graph) cudaGraphExecDestroy(oldest->second.graph);
    entries_.erase(oldest);
  }
  std::map<GraphKey, Entry> entries_;
  int64_t turn_ = 0;
};

template <class A>
struct CudaGpt<A>::Resources {
  explicit Resources(const Config& config) : rope(config) {}
  std::unique_ptr<Memory> memory;  // of activations and batch
  Staging staging;
  RopeTable rope;
  Graphs graphs;
};

// ---------------------------------------------------------------------------------------------
// Products: cuBLASLt behind one function
//
// cuBLASLt counts in columns: to it, a row-major matrix is the transpose, so D = A B becomes D^T =
// B^T A^T, and what it calls A is our B. The descriptors and the algorithm of a shape are made once
// and kept. On a GPU, the candidates of its heuristic are timed at the first use of a shape, and
// the fastest is stored in $XDG_CACHE_HOME/cake/products.json (~/.cache) by GPU, version of the
// library and shape. Where this file cannot be read or written, the next run measures again. The
// chosen algorithm of each shape is also saved in trainer_state.json (Gpt::tuned_plans), so that a
// resumed run rounds the same way.

static constexpr int64_t kWorkspace = int64_t(32) << 20;  // bytes, cuBLASLt's

// The cuBLASLt algorithm of each product, and whether each fused epilogue is faster than a kernel,
// as text by name: what this process uses, and what is stored on disk for this GPU.
class TunedPlans {
 public:
  using Plans = std::map<std::string, std::string>;

  explicit TunedPlans(std::string gpu) : gpu_(std::move(gpu)) {
    const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
    if (cache && *cache) {
      path_ = std::filesystem::path(cache) / "cake" / "products.json";
    } else if (home && *home) {
      path_ = std::filesystem::path(home) / ".cache" / "cake" / "products.json";
    }
    values_ = stored();
  }
  std::string find(const std::string& key) {  // empty when unknown
    const auto in_use = in_use_.find(key);
    if (in_use != in_use_.end()) return in_use->second;
    if (!values_.contains(gpu_) || !values_[gpu_].is_object()) return "";
    const auto& own = values_[gpu_];
    if (!own.contains(key) || !own[key].is_string()) return "";
    return in_use_[key] = own[key].template get<std::string>();
  }
  void set(const std::string& key, const std::string& value) { in_use_[key] = value; }
  void save(const std::string& key, const std::string& value) {  // for other processes too
    set(key, value);
    if (path_.empty()) return;
    values_.update(stored(), true);  // another process may have written meanwhile
    values_[gpu_][key] = value;
    try {
      std::filesystem::create_directories(path_.parent_path());
      write_json(path_, values_);
    } catch (const std::exception&) {  // no cache then: the next run measures again
    }
  }
  Plans in_use() const {
    Plans all = in_use_;
    all[kGpu] = gpu_;
    return all;
  }
  void adopt(const Plans& plans) {  // they take precedence over those on disk; plans of another GPU
                                    // are ignored
    const auto gpu = plans.find(kGpu);
    if (gpu == plans.end() || gpu->second != gpu_) return;
    for (const auto& [key, value] : plans)
      if (key != kGpu) set(key, value);
  }

 private:
  static constexpr const char* kGpu = "gpu";
  OrderedJson stored() const {
    try {
      OrderedJson json = OrderedJson::parse(read_file(path_));
      if (json.is_object()) return json;
    } catch (const std::exception&) {  // not there yet, or not ours
    }
    return OrderedJson::object();
  }
  std::string gpu_;
  std::filesystem::path path_;
  OrderedJson values_;  // by GPU, by name
  Plans in_use_;
};

// Whether a product's epilogue does what a kernel after it could do: the faster way, or as a test
// wants.
enum class Fusion { measured, always, never };
inline Fusion fusion = Fusion::measured;

// Whether candidates are timed. The emulator has no speed to measure: there only a test asks for
// it.
#ifdef CAKE_CUDA_ON_CPU
inline bool timing = false;
#else
static constexpr bool timing = true;
#endif

class Products {
 public:
  explicit Products(cudaStream_t stream)
      : stream_(stream), workspace_("cuBLASLt's workspace", kWorkspace, "nothing else helps") {
    check(cublasLtCreate(&handle_), "cublasLtCreate");
    if (timing) {
      tuned_plans_ = std::make_unique<TunedPlans>(
          concat(device_properties().name, ", cuBLASLt ", cublasLtGetVersion(), ", sums in fp32"));
      for (cudaEvent_t& e : events_) check(cudaEventCreate(&e), "an event");
    }
  }
  ~Products() {
    for (auto& [key, plan] : plans_) {
      for (const auto layout : {plan.a, plan.b, plan.c}) cublasLtMatrixLayoutDestroy(layout);
      cublasLtMatmulDescDestroy(plan.description);
    }
    for (cudaEvent_t e : events_)
      if (e) cudaEventDestroy(e);
    cublasLtDestroy(handle_);
  }

  // False when the library cannot do this product with its epilogue; then nothing was done.
  bool run(const Product& p) {
    if (p.aux && p.ldd % 8 != 0) return false;  // the library's condition
    Plan& plan = plan_of(p);
    if (!plan.supported) return false;
    multiply(p, plan, plan.algorithm);
    return true;
  }

  // Whether work(true), with an epilogue (false: there is none), is faster than work(false), with
  // a kernel in its place. Both are run to find out: they must overwrite what they write.
  template <class Work>
  bool fused_is_faster(const char* what, int64_t N, int64_t in, int64_t out, Work&& work) {
    if (fusion != Fusion::measured || !tuned_plans_) return fusion != Fusion::never;
    const std::string key = concat(what, " ", bucket(N), " ", in, " ", out);
    const auto known = fused_.find(key);
    if (known != fused_.end()) return known->second;
    if (capturing()) return true;
    std::string faster = tuned_plans_->find(key);
    if (faster != "fused" && faster != "separate") {
      try {
        const bool fused = work(true) && time([&] { work(true); }) < time([&] { work(false); });
        tuned_plans_->save(key, faster = fused ? "fused" : "separate");
      } catch (const Error&) {  // there is no memory to measure in
        tuned_plans_->set(key, faster = "separate");
      }
    }
    return fused_[key] = faster == "fused";
  }

  TunedPlans* tuned_plans() const { return tuned_plans_.get(); }  // null: nothing is timed

  // Seconds that `work` takes on the device: the best of a few runs.
  template <class Work>
  double time(Work&& work) {
    constexpr int kRuns = 4;
    float best = std::numeric_limits<float>::infinity();
    work();
    for (int repetition = 0; repetition < 3; repetition++) {
      check(cudaEventRecord(events_[0], stream_), "an event");
      for (int i = 0; i < kRuns; i++) work();
      check(cudaEventRecord(events_[1], stream_), "an event");
      check(cudaEventSynchronize(events_[1]), "timing");
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]), "timing");
      best = std::min(best, milliseconds);
    }
    return best / kRuns / 1000;
  }

 private:
  using Key = std::array<int64_t, 20>;
  struct Plan {
    cublasLtMatmulDesc_t description = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;  // C and D share one
    cublasLtMatmulAlgo_t algorithm{};
    bool supported = false;
  };

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status), "the stream");
    return status != cudaStreamCaptureStatusNone;
  }
  // Sizes are rounded up to one of four steps between powers of two, and a measurement serves all
  // sizes of its step: packed batches rarely have the same number of tokens twice.
  static int64_t bucket(int64_t n) {
    return round_up(n, std::max<int64_t>(16, int64_t(std::bit_floor(uint64_t(n))) / 4));
  }
  static int64_t alignment(const void* p) {  // up to 16 bytes: what vector loads ask for
    return p ? std::min<int64_t>(16, int64_t(reinterpret_cast<uintptr_t>(p) & -uintptr_t(p))) : 16;
  }
  static Key key_of(const Product& p) {
    return {p.M,
            p.N,
            p.K,
            p.in,
            p.out,
            p.lda,
            p.ldb,
            p.ldd,
            p.a_transposed,
            p.b_transposed,
            p.beta != 0,
            p.c != nullptr,
            p.batch,
            p.a_stride,
            p.b_stride,
            p.d_stride,
            int64_t(p.epilogue) * 2 + (p.bias != nullptr),
            alignment(p.a),
            alignment(p.b),
            std::min(alignment(p.d), alignment(p.c))};
  }

  template <class T>
  static void set(const Plan& plan, cublasLtMatmulDescAttributes_t attribute, T value) {
    check(cublasLtMatmulDescSetAttribute(plan.description, attribute, &value, sizeof value),
          "a product's description");
  }
  void set_pointers(const Product& p, const Plan& plan) {
    if (p.bias) set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    if (p.aux) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux);
  }
  void multiply(const Product& p, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm) {
    set_pointers(p, plan);
    check(cublasLtMatmul(handle_, plan.description, &p.alpha, p.b, plan.b, p.a, plan.a, &p.beta,
                         p.c ? p.c : p.d, plan.c, p.d, plan.c, &algorithm, workspace_.data(),
                         workspace_.bytes(), stream_),
          "cublasLtMatmul");
  }

  Plan& plan_of(const Product& p) {
    const Key key = key_of(p);
    const auto known = plans_.find(key);
    if (known != plans_.end()) return known->second;
    Plan& plan = plans_[key];
    describe(p, plan);
    if (!tuned_plans_) {
      tune(p, plan, "");
      return plan;
    }
    Key bucketed = key;
    for (const int dimension : {0, 1, 2})
      bucketed[size_t(dimension)] = bucket(key[size_t(dimension)]);
    const std::string near = name_of(bucketed), exact = name_of(key);
    if (!restore(tuned_plans_->find(exact), plan) && !restore(tuned_plans_->find(near), plan)) {
      // A plan that serves neighbouring shapes but not this one is kept for them.
      tune(p, plan, tuned_plans_->find(near).empty() ? near : exact);
    }
    return plan;
  }
  static std::string name_of(const Key& key) {
    std::string name = "product";
    for (const int64_t k : key) (name += ' ') += std::to_string(k);
    return name;
  }

  void describe(const Product& p, Plan& plan) {
    check(cublasLtMatmulDescCreate(&plan.description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "a product's description");
    set(plan, CUBLASLT_MATMUL_DESC_TRANSA, int32_t(p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(plan, CUBLASLT_MATMUL_DESC_TRANSB, int32_t(p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
    const cublasLtEpilogue_t epilogue =
        p.epilogue == Epilogue::bias ? CUBLASLT_EPILOGUE_BIAS
        : p.epilogue == Epilogue::gelu
            ? (p.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX)
        : p.epilogue == Epilogue::dgelu
            ? (p.bias ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU)
        : p.epilogue == Epilogue::bias_gradient ? CUBLASLT_EPILOGUE_BGRADB
                                                : CUBLASLT_EPILOGUE_DEFAULT;
    set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(epilogue));
    if (p.bias) set(plan, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(p.out));
    if (p.aux) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.ldd);
    set_pointers(p, plan);  // the heuristic looks at their alignment
    const auto layout = [&](cublasLtMatrixLayout_t& handle, cudaDataType_t type, int64_t rows,
                            int64_t columns, int64_t ld, int64_t stride) {
      check(cublasLtMatrixLayoutCreate(&handle, type, uint64_t(columns), uint64_t(rows), ld),
            "a matrix's layout");
      if (p.batch == 1) return;
      const auto set_batch = [&](cublasLtMatrixLayoutAttribute_t attribute, auto value) {
        check(cublasLtMatrixLayoutSetAttribute(handle, attribute, &value, sizeof value),
              "a matrix's layout");
      };
      set_batch(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, int32_t(p.batch));
      set_batch(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride);
    };
    layout(plan.a, p.in, p.a_transposed ? p.K : p.M, p.a_transposed ? p.M : p.K, p.lda, p.a_stride);
    layout(plan.b, p.in, p.b_transposed ? p.N : p.K, p.b_transposed ? p.K : p.N, p.ldb, p.b_stride);
    layout(plan.c, p.out, p.M, p.N, p.ldd, p.d_stride);
  }

  // The heuristic's candidates, the fastest of which stays, under `name`.
  void tune(const Product& p, Plan& plan, const std::string& name) {
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), "a product's preference");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
            "a product's preference");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(kWorkspace));
    // Where blocks share one sum over k, they add their parts in fp32, never in D's type.
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(alignment(p.b)));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(alignment(p.a)));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        uint32_t(std::min(alignment(p.d), alignment(p.c))));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(alignment(p.d)));
    std::array<cublasLtMatmulHeuristicResult_t, 12> found{};
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle_, plan.description, plan.b, plan.a, plan.c, plan.c,
                                       preference, int(found.size()), found.data(), &count);
    cublasLtMatmulPreferenceDestroy(preference);
    plan.supported = status == CUBLAS_STATUS_SUCCESS && count > 0;
    if (!plan.supported) {
      if (p.epilogue != Epilogue::none && p.epilogue != Epilogue::bias) return;
      fail("cuda: no product in cuBLASLt for (", p.M, ", ", p.K, ") (", p.K, ", ", p.N,
           "), status ", int(status));
    }
    plan.algorithm = found[0].algo;
    if (!tuned_plans_) return;
    const auto hex = [&] {
      std::string all;
      for (const uint64_t word : plan.algorithm.data)
        all += format("%016llx", (unsigned long long)word);
      return all;
    };
    if (count == 1 || capturing()) return tuned_plans_->set(name, hex());
    // A product that adds to D would add again each time it is timed: it is timed on scratch
    // memory.
    Product timed = p;
    Buffer<char> scratch;
    if (p.beta != 0 && (!p.c || p.c == p.d)) {
      const int64_t elements = (p.batch - 1) * p.d_stride + (p.M - 1) * p.ldd + p.N;
      try {
        scratch = Buffer<char>("a product's result", elements * (p.out == CUDA_R_32F ? 4 : 2), "");
      } catch (const Error&) {  // no memory to measure in: the first candidate stays
        return tuned_plans_->set(name, hex());
      }
      timed.d = scratch.data(), timed.c = nullptr;
    }
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < count; i++) {
      if (found[size_t(i)].state != CUBLAS_STATUS_SUCCESS) continue;
      const double seconds = time([&] { multiply(timed, plan, found[size_t(i)].algo); });
      if (seconds < best) best = seconds, plan.algorithm = found[size_t(i)].algo;
    }
    tuned_plans_->save(name, hex());
  }

  // From the cache on disk; false when there is nothing usable.
  bool restore(const std::string& hex, Plan& plan) {
    constexpr size_t kWords = std::size(decltype(plan.algorithm.data){});
    if (hex.size() != 16 * kWords ||
        hex.find_first_not_of("0123456789abcdef") != std::string::npos) {
      return false;
    }
    for (size_t i = 0; i < kWords; i++) {
      plan.algorithm.data[i] = std::strtoull(hex.substr(16 * i, 16).c_str(), nullptr, 16);
    }
    cublasLtMatmulHeuristicResult_t result{};
    plan.supported =
        cublasLtMatmulAlgoCheck(handle_, plan.description, plan.b, plan.a, plan.c, plan.c,
                                &plan.algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
        result.workspaceSize <= size_t(kWorkspace);
    return plan.supported;
  }

  cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  Buffer<char> workspace_;
  std::map<Key, Plan> plans_;
  std::map<std::string, bool> fused_;
  std::unique_ptr<TunedPlans> tuned_plans_;
  cudaEvent_t events_[2] = {};
};

// What all engines of a process share: one stream, so that a model that reads another's weights
// finds them as the last call left them. All engines of a process must be used by one thread.
struct Machine {
  cudaStream_t stream;
  std::unique_ptr<Products> products;

  Machine() {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    products = std::make_unique<Products>(stream);
  }
  ~Machine() {
    products.reset();
    cudaStreamDestroy(stream);
  }
  static std::shared_ptr<Machine> get() {
    static std::weak_ptr<Machine> shared;
    std::shared_ptr<Machine> machine = shared.lock();
    if (!machine) shared = machine = std::make_shared<Machine>();
    return machine;
  }
  void matmul(const Product& p) const {
    if (!products->run(p)) fail("cuda: this product has no such epilogue in cuBLASLt");
  }
  void wait() const { check(cudaStreamSynchronize(stream), "waiting for the device"); }
};

template <class A>
void CudaGpt<A>::matmul(const Product& p) const {
  machine_->matmul(p);
}
template <class A>
bool CudaGpt<A>::try_matmul(const Product& p) const {
  return machine_->products->run(p);
}
template <class A>
void CudaGpt<A>::wait() const {
  machine_->wait();
}
template <class A>
std::map<std::string, std::string> CudaGpt<A>::tuned_plans() const {
  const TunedPlans* tuned = machine_->products->tuned_plans();
  return tuned ? tuned->in_use() : TunedPlans::Plans{};
}
template <class A>
void CudaGpt<A>::set_tuned_plans(const std::map<std::string, std::string>& plans) {
  if (TunedPlans* tuned = machine_->products->tuned_plans()) tuned->adopt(plans);
}

// ---------------------------------------------------------------------------------------------
// Fused epilogues: GELU, its gradient, and a bias's gradient within the product beside them

// Under what a fused and a separate form are compared.
template <class A>
template <class Compute>
bool CudaGpt<A>::fused_is_faster(const char* what, int64_t N, const Linear& l,
                                 Compute&& compute) const {
  return machine_->products->fused_is_faster(
      std::is_same_v<A, float> ? concat(what, " in fp32").c_str() : what, N, l.in, l.out, compute);
}
// compute(fused, dweight, dbias), of layer l, adds to dbias, so both ways are timed on scratch
// memory.
template <class A>
template <class Compute>
bool CudaGpt<A>::bias_gradient_is_fused(const char* what, const Linear& l,
                                        Compute&& compute) const {
  Buffer<float> scratch;
  return fused_is_faster(what, N_, l, [&](bool with_epilogue) {
    if (scratch.size() == 0) {
      scratch = Buffer<float>("a product's result", int64_t(l.out) * (l.in + 1), "");
    }
    return compute(with_epilogue, scratch.data(), scratch.data() + int64_t(l.out) * l.in);
  });
}

// act = GELU(up) or SwiGLU(up), by a kernel of its own
template <class A>
void CudaGpt<A>::activate(A* act, const A* up) const {
  if (config_.has_gate()) {
    swiglu_forward(act, up, N_, config_.F, stream_);
  } else {
    gelu_forward(act, up, int64_t(N_) * config_.F, stream_);
  }
}

// up = x W^T + b, act = GELU(up)
template <class A>
void CudaGpt<A>::linear_gelu(int64_t N, const Linear& l, const A* x, A* up, A* act,
                             const Activations<A>& acts) const {
  if (has_adapters(l)) {  // they come between
    linear(N, l, x, up, acts);
    return gelu_forward(act, up, N * l.out, stream_);
  }
  const auto compute = [&](bool fused) {
    Product p = linear_product(N, l, x, fused ? act : up);
    if (fused) p.epilogue = Epilogue::gelu, p.aux = up;
    if (!try_matmul(p)) return false;
    if (!fused) gelu_forward(act, up, N * l.out, stream_);
    return true;
  };
  const bool is_made_again = saved_ == Saved::light;  // by activate(), from `up` as it was rounded
  if (!(!is_made_again && fused_is_faster("GELU", N, l, compute) && compute(true))) compute(false);
}
// linear_backward(down) through the GELU that made its input: dup = dy W GELU'(up). True when the
// gradient of up's bias, the column sums of dup, has been added too: the product can make these
// sums, in A, where the product of up's weight gradient then goes without them.
template <class A>
bool CudaGpt<A>::linear_gelu_backward(const Block& b, const LayerActivations<A>& a, const A* dy,
                                      A* dup) const {
  const Linear& l = b.down;
  if (has_adapters(l)) {
    linear_backward(l, a.act, dy, a_.dact, false);
    gelu_backward(dup, a_.dact, a.up, int64_t(N_) * l.in, stream_);
    return false;
  }
  weight_backward(l, a.act, dy, false);
  const auto dgelu_product = [&] {
    Product p = input_gradient_product(N_, l, dy, dup);
    p.epilogue = Epilogue::dgelu, p.aux = a.up;  // which it only reads
    return p;
  };
  const auto compute = [&](bool fused) {
    if (fused) return try_matmul(dgelu_product());
    matmul(input_gradient_product(N_, l, dy, a_.dact));
    gelu_backward(dup, a_.dact, a.up, int64_t(N_) * l.in, stream_);
    return true;
  };
  const auto without_sums = [&] {
    if (!(fused_is_faster("GELU'", N_, l, compute) && compute(true))) compute(false);
  };
  const auto with_sums = [&](float* dbias) {
    Product p = dgelu_product();
    p.bias = a_.bias_sums;
    if (!try_matmul(p)) return false;
    add(dbias, reinterpret_cast<const A*>(a_.bias_sums), l.in, stream_);
    return true;
  };
  const auto both_gradients = [&](bool fused, float* dweight, float* dbias) {  // dup, and up's
    if (fused && !with_sums(dbias)) return false;
    if (!fused) without_sums();
    add_weight_gradient(b.up, a.norm2, dup, dweight, fused ? nullptr : dbias);
    return true;
  };
  float* dbias = gradient(b.up.bias);
  if (dbias && bias_gradient_is_fused("GELU' and bias gradient", b.up, both_gradients) &&
      with_sums(dbias)) {
    return true;
  }
  without_sums();
  return false;
}

// ---------------------------------------------------------------------------------------------
// Optimizer state and what decoding writes

// AdamW goes over runs of tensors that lie side by side and are stepped alike; Muon over groups of
// matrices of one shape, whose products are batches.
struct OptimizerLayout {
  struct Run {
    int64_t offset, size;  // in the table's arena
    int64_t moment2;       // in its own, which Muon's tensors are not in
    Kind kind;
    bool decay;
  };
  struct Group {
    int out, in, count;
    int64_t first_matrix;  // its first matrix in `offsets`
    int64_t x;             // of its first matrix among all of Muon's
    int batch_size;        // matrices that the scratch has room for

    int64_t size() const { return int64_t(out) * in; }
    int64_t gram() const { return int64_t(std::min(out, in)) * std::min(out, in); }
  };
  static constexpr int64_t kScratch = 1 << 25;  // elements, at least one matrix
  std::vector<Run> runs;
  std::vector<Group> groups;
  std::vector<int64_t> offsets;         // of Muon's matrices, group by group
  std::vector<int64_t> moment2_offset;  // of each tensor; -1: Muon's, or frozen
  int64_t moment2_size = 0, x_size = 0, other_size = 0, gram_size = 0, squares_size = 0;

  explicit OptimizerLayout(const ParamTable& table) {
    std::map<std::pair<int, int>, std::vector<int64_t>> shapes;  // none where rows are frozen
    for (const Tensor& t : table.tensors) {
      moment2_offset.push_back(-1);
      if (!t.trainable) continue;
      if (t.muon) {
        shapes[{t.out, t.in}].push_back(t.offset);
        continue;
      }
      Run* run = runs.empty() ? nullptr : &runs.back();
      // between tensors side by side lie at most 15 zeros, which stay zero
      if (run && run->kind == t.kind && run->decay == t.decay &&
          t.offset - run->offset - run->size < 16) {
        run->size = t.offset + t.size() - run->offset;
        moment2_offset.back() = run->moment2 + t.offset - run->offset;
        moment2_size = round_up(run->moment2 + run->size, 16);
        continue;
      }
      moment2_offset.back() = moment2_size;
      runs.push_back({t.offset, t.size(), moment2_size, t.kind, t.decay});
      moment2_size = round_up(moment2_size + t.size(), 16);
    }
    for (const auto& [shape, matrices] : shapes) {
      Group g{shape.first, shape.second, int(matrices.size()), int64_t(offsets.size()), x_size, 1};
      offsets.insert(offsets.end(), matrices.begin(), matrices.end());
      g.batch_size = int(std::clamp<int64_t>(kScratch / (g.size() + 2 * g.gram()), 1, g.count));
      x_size += g.count * g.size();
      other_size = std::max(other_size, g.batch_size * g.size());
      gram_size = std::max(gram_size, g.batch_size * g.gram());
      squares_size = std::max(squares_size, int64_t(g.batch_size) * kMuonBlocks);
      groups.push_back(g);
    }
  }
  std::vector<AdamWRun> adamw_runs(int64_t frozen) const {
    std::vector<AdamWRun> all;
    for (const Run& r : runs) {
      all.push_back({r.offset, r.offset - frozen, r.moment2, r.size, 0, int(r.kind), r.decay});
    }
    return all;
  }
  // Beside the moments; `element`: bytes of the activations' type.
  int64_t scratch_bytes(int64_t element) const {
    return (x_size + other_size + 2 * gram_size) * element + squares_size * 4;
  }
};

// What lies between the gradients that a product writes (see begin_gradients), in the arena of
// gradients.
static std::vector<Stretch> added_gradients(const Config& c, const ParamTable& table) {
  const int64_t frozen = table.first_trainable();
  std::vector<Stretch> written, between;
  const auto add = [&](const Linear& l) {
    if (l.weight >= frozen) written.push_back({l.weight - frozen, int64_t(l.out) * l.in});
  };
  for (const Block& b : table.blocks)
    for (const Linear* l : {&b.qkv, &b.o, &b.up, &b.down}) add(*l);
  if (c.head == Head::lm) add(table.head);
  std::sort(written.begin(), written.end(),
            [](const Stretch& a, const Stretch& b) { return a.offset < b.offset; });
  int64_t end = 0;
  written.push_back({table.size - frozen, 0});
  for (const Stretch& s : written) {
    if (s.offset > end) between.push_back({end, s.offset - end});
    end = s.offset + s.size;
  }
  return between;
}

// What the last two updates tell, copied to pinned memory behind each of them.
class UpdateHistory {
 public:
  UpdateHistory() = default;
  UpdateHistory(const UpdateHistory&) = delete;
  UpdateHistory& operator=(const UpdateHistory&) = delete;
  ~UpdateHistory() {
    if (steps_) cudaFreeHost(steps_);
    for (cudaEvent_t e : copied_)
      if (e) cudaEventDestroy(e);
  }
  void add(const DeviceStep* step, cudaStream_t stream) {
    if (!steps_) {
      check(cudaMallocHost(reinterpret_cast<void**>(&steps_), 2 * sizeof(DeviceStep)),
            "pinned memory");
    }
    cudaEvent_t& copied = copied_[updates_ % 2];
    if (!copied) check(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming), "an event");
    copy_to_host(steps_ + updates_ % 2, step, 1, stream, "the gradient's norm");
    check(cudaEventRecord(copied, stream), "an event");
    updates_++;
  }
  // 0: of the last update, 1: of the one before. Waits for that update. Null: there was none.
  const DeviceStep* find(int updates_ago) const {
    if (updates_ago >= std::min<int64_t>(updates_, 2)) return nullptr;
    const int64_t i = (updates_ - 1 - updates_ago) % 2;
    check(cudaEventSynchronize(copied_[i]), "waiting for the device");
    return steps_ + i;
  }

 private:
  DeviceStep* steps_ = nullptr;  // (2)
  cudaEvent_t copied_[2] = {};
  int64_t updates_ = 0;
};

template <class A>
struct CudaGpt<A>::Optimizer {
  static constexpr int64_t kLongStretch = 1 << 16;  // elements: cudaMemset is faster than a block
  const OptimizerLayout layout;
  Buffer<float> gradients, moment1;  // of the trainable rows, in the table's order
  Buffer<float> moment2;
  Buffer<double> partials{"the gradient's norm", kSquarePartials, kModelFlags};
  Buffer<DeviceStep> step{"the gradient's norm", 1, kModelFlags};
  Buffer<int64_t> offsets;
  Buffer<A> x;      // (all of Muon's matrices) the direction, transposed when tall
  Buffer<A> other;  // (batch_size matrices) X before each of the products that make the next
  Buffer<A> gram, combined;  // (batch_size, rows, rows) A = X X^T, b A + c A A
  Buffer<float> squares;
  Buffer<AdamWRun> runs;
  int64_t chunks = 0;                   // of all runs
  std::vector<Stretch> long_stretches;  // of the gradients, cleared before a step's first backward
  Buffer<Stretch> short_stretches;
  UpdateHistory history;

  Optimizer(const Config& config, const ParamTable& table, cudaStream_t stream)
      : layout(table),
        gradients("gradients", table.size - table.first_trainable(), kModelFlags),
        moment1("first moments", table.size - table.first_trainable(), kModelFlags),
        moment2("second moments", layout.moment2_size, kModelFlags),
        x("Muon's directions", layout.x_size, kModelFlags),
        other("Muon's scratch", layout.other_size, kModelFlags),
        gram("Muon's scratch", layout.gram_size, kModelFlags),
        combined("Muon's scratch", layout.gram_size, kModelFlags),
        squares("Muon's scratch", layout.squares_size, kModelFlags) {
    moment1.clear(stream);
    moment2.clear(stream);
    step.clear(stream);
    std::vector<AdamWRun> all = layout.adamw_runs(table.first_trainable());
    chunks = number_chunks(all);
    runs = on_device(all, "AdamW's runs", stream);
    std::vector<Stretch> few;
    for (const Stretch& s : added_gradients(config, table)) {
      (s.size >= kLongStretch ? long_stretches : few).push_back(s);
    }
    short_stretches = on_device(few, "stretches of gradients", stream);
    offsets = on_device(layout.offsets, "Muon's matrices", stream);
    check(cudaStreamSynchronize(stream), "the optimizer's tables");  // before the host's are gone
  }

 private:
  template <class T>
  static Buffer<T> on_device(const std::vector<T>& host, const char* name, cudaStream_t stream) {
    Buffer<T> buffer(name, int64_t(host.size()), kModelFlags);
    if (!host.empty()) copy_to_device(buffer.data(), host.data(), host.size(), stream, name);
    return buffer;
  }
};

template <class A>
struct CudaGpt<A>::Decoding {
  Staging staging;
  std::unique_ptr<Memory> memory;
  Activations<A> a{};
  int64_t capacity = 0, row_capacity = 0;
  float* probabilities;          // (logit_rows, V) scratch
  Buffer<unsigned char> inputs;  // of a call, packed
  Buffer<int> results;           // of a call: what decode() copies to the host

  // Of N tokens of R rows, without the lists whose lengths the caller chooses. Each of 13 arrays
  // may take some bytes more, so that the next one is aligned.
  static int64_t input_bytes(int64_t N, int64_t R, int64_t max_pages) {
    return 3 * N * int64_t(sizeof(int)) + (N / kQueryTile + R) * int64_t(sizeof(QueryTile)) +
           R * int64_t(max_pages * sizeof(A*) + 2 * sizeof(int) + sizeof(SampleRow) +
                       sizeof(PageCopy<A>)) +
           13 * Staging::kAlignment;
  }
  bool fits(int64_t N, int64_t R, int64_t bytes) const {
    return N <= capacity && R <= row_capacity && bytes <= inputs.size();
  }
  void reserve(const Config& c, int rank, int64_t N, int64_t R, int64_t bytes, int64_t words) {
    grow(inputs, bytes, "the rows to decode"), grow(results, words, "sampled tokens");
    if (N <= capacity && R <= row_capacity) return;
    N = std::max(N, capacity), R = std::max(R, row_capacity);
    capacity = row_capacity = 0, memory = nullptr;
    memory = std::make_unique<Memory>(kDecodeFlags, false);
    a = {};
    lay_out(c, rank, N, R, *memory);
    capacity = N, row_capacity = R;
  }
  void lay_out(const Config& c, int rank, int64_t N, int64_t R, Memory& all) {
    a.lay_out(c, rank, N, R, Saved::none, all);
    all.allocate(probabilities, "probabilities", a.logit_rows * c.V);
  }

 private:
  template <class T>
  static void grow(Buffer<T>& buffer, int64_t size, const char* name) {
    if (size <= buffer.size()) return;
    buffer = {};
    buffer = Buffer<T>(name, round_up(2 * size, 64), kDecodeFlags);
  }
};

template <class A>
int64_t CudaGpt<A>::decoding_bytes(const Config& config, const GptOptions& options) {
  const DecodePlan& d = options.decode;
  const int64_t R = padded_rows(d.rows);
  const int64_t N = std::max<int64_t>(R, d.tokens > 0 ? d.tokens : kCudaPrefillTokens);
  const int64_t pages = CudaKvCache<A>::pages_of(d.positions);
  Memory memory("", true);
  Decoding().lay_out(config, options.lora.rank, N, R, memory);
  return memory.bytes() + Decoding::input_bytes(N, R, (pages + R - 1) / std::max<int64_t>(1, R));
}

// ---------------------------------------------------------------------------------------------
// A model is made; its tensors, in and out

template <class A>
CudaGpt<A>::CudaGpt(const Config& config, const GptOptions& options)
    : Gpt(config, options.muon, options.lora),
      machine_(Machine::get()),
      stream_(machine_->stream),
      train_(options.mode == Mode::train),
      saved_(saved_activations(options)),
      frozen_(table_.first_trainable()),
      resources_(std::make_unique<Resources>(config)) {
  if (options.share) {
    const auto* other = dynamic_cast<const CudaGpt*>(options.share);
    if (!other) fail("share: the other model is on another device, or in another precision");
    weights_ = other->weights_;
    if (train_) fail("share: a model that trains needs weights of its own");
  } else {
    weights_ = std::make_shared<Weights<A>>(table_, train_, stream_);
  }
  if (train_) optimizer_ = std::make_unique<Optimizer>(config_, table_, stream_);
  if (options.batch_tokens > 0) reserve(padded_tokens(options.batch_tokens));
}
template <class A>
CudaGpt<A>::~CudaGpt() {
  cudaStreamSynchronize(stream_);
}

template <class A>
void CudaGpt<A>::clear(void* p, size_t bytes) const {
  check(cudaMemsetAsync(p, 0, bytes, stream_), "clearing memory");
}

template <class A>
typename CudaGpt<A>::Slice CudaGpt<A>::slice(int tensor, Slot slot) const {
  const Tensor& t = table_.tensors.at(size_t(tensor));
  if (slot == Slot::weight) {
    return {weights_->vector(t.offset),
            Weights<A>::kCopy ? weights_->copy.data() + t.offset : nullptr};
  }
  if (!train_) fail(t.name, ": an inference model has no gradients and no moments");
  if (!t.trainable) return {nullptr, nullptr};
  if (slot == Slot::gradient) return {gradient(t.offset), nullptr};
  if (slot == Slot::moment1) return {optimizer_->moment1.data() + t.offset - frozen_, nullptr};
  const int64_t offset = optimizer_->layout.moment2_offset[size_t(tensor)];
  return {offset < 0 ? nullptr : optimizer_->moment2.data() + offset, nullptr};
}

template <class A>
void CudaGpt<A>::read(int tensor, Slot slot, std::span<float> out) const {
  const Tensor& t = table_.tensors.at(size_t(tensor));
  if (int64_t(out.size()) != t.size()) {
    fail(t.name, ": found room for ", out.size(), " floats, expected ", t.size());
  }
  const Slice src = slice(tensor, slot);
  if ((slot == Slot::gradient && gradients_zeroed_) || (!src.data && !src.copy)) {
    std::fill(out.begin(), out.end(), 0.f);  // Muon's tensors have one moment, frozen ones nothing
  } else if (src.data) {
    copy_to_host(out.data(), src.data, out.size(), stream_, t.name.c_str());
    wait();
  } else {
    std::vector<A> values(out.size());
    copy_to_host(values.data(), src.copy, values.size(), stream_, t.name.c_str());
    wait();
    for (size_t i = 0; i < out.size(); i++) out[i] = float(values[i]);
  }
}

template <class A>
void CudaGpt<A>::write(int tensor, Slot slot, std::span<const float> in) {
  const Tensor& t = table_.tensors.at(size_t(tensor));
  if (int64_t(in.size()) != t.size()) {
    fail(t.name, ": found ", in.size(), " floats, expected ", t.size());
  }
  const Slice dst = slice(tensor, slot);
  if (!dst.data && !dst.copy) {
    fail(t.name,
         t.trainable ? ": Muon keeps no second moment" : ": it is frozen: it has weights alone");
  }
  if (slot == Slot::gradient) clear_zeroed_gradients();
  if (dst.data) copy_to_device(dst.data, in.data(), in.size(), stream_, t.name.c_str());
  std::vector<A> values;
  if (dst.copy) {
    for (const float x : in) values.push_back(A(x));
    copy_to_device(dst.copy, values.data(), values.size(), stream_, t.name.c_str());
  }
  wait();
}

// =============================================================================================
// 7. Entry points: the functions that cake/gpt.h declares

static bool wants_bf16(const GptOptions& options) { return options.precision != Precision::fp32; }

std::string unavailable() {
  int devices = 0, driver = 0, runtime = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  cudaGetLastError();
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int v) { return concat(v / 1000, ".", v % 1000 / 10); };
  if (status == cudaErrorInsufficientDriver && driver > 0) {
    return concat("the driver supports CUDA ", version(driver), ", this build needs ",
                  version(runtime), ": update the driver");
  }
  if (status == cudaErrorInsufficientDriver) return "found no CUDA driver";
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) {
    return "found no CUDA device";
  }
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const cudaDeviceProp properties = device_properties();
  if (properties.major < 8) {
    return concat(properties.name, " has compute capability ", properties.major, ".",
                  properties.minor, ", expected 8.0 or newer");
  }
  return "";
}

template <class A>
static MemoryPlan plan_of(const Config& c, const GptOptions& options) {
  const bool train = options.mode == Mode::train;
  const ParamTable table = make_table(c, options.muon, options.lora);
  const int64_t trained = table.size - table.first_trainable();
  MemoryPlan plan;
  if (!options.share) {
    plan.items.push_back({"parameters", Weights<A>::bytes(table, train), kModelFlags});
  }
  if (train) {
    const OptimizerLayout layout(table);
    plan.items.push_back({"gradients", trained * 4, kModelFlags});
    plan.items.push_back({"optimizer state", (trained + layout.moment2_size) * 4, kModelFlags});
    plan.items.push_back({"optimizer scratch", layout.scratch_bytes(sizeof(A)), kModelFlags});
  }
  if (options.batch_tokens > 0) {
    Activations<A> layout;
    DeviceBatch batch;
    Memory memory("", true);
    const int64_t N = padded_tokens(options.batch_tokens);
    layout.lay_out(c, options.lora.rank, N, round_up(N, 128), saved_activations(options), memory);
    batch.lay_out(N, train, memory);
    plan.items.push_back({"activations", memory.bytes(),
                          train && options.recompute != Recompute::full
                              ? kBatchFlags
                              : "--micro-batch-tokens, --context"});
  }
  if (const DecodePlan& d = options.decode; d.rows > 0) {
    plan.items.push_back({"decoding", CudaGpt<A>::decoding_bytes(c, options), kDecodeFlags});
    plan.items.push_back({"KV cache",
                          CudaKvCache<A>::pages_of(d.positions) * CudaKvCache<A>::page_bytes(c),
                          kDecodeFlags});
  }
  plan.items.push_back({"cuBLASLt's workspace", kWorkspace, kModelFlags});
  return plan;
}

int64_t cache_page_bytes(const Config& c, const GptOptions& options) {
  return wants_bf16(options) ? CudaKvCache<bf16>::page_bytes(c) : CudaKvCache<float>::page_bytes(c);
}

int64_t free_memory() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "free memory");
  return int64_t(free);
}

MemoryPlan plan_memory(const Config& config, const GptOptions& options) {
  return wants_bf16(options) ? plan_of<bf16>(config, options) : plan_of<float>(config, options);
}

std::unique_ptr<Gpt> make_gpt(const Config& config, const GptOptions& options) {
  if (const std::string why = unavailable(); !why.empty()) fail("--device cuda: ", why);
  config.check("model");
  if (config.HS % 16 != 0 || config.HS > 128) {
    fail("model: head_dim: found ", config.HS,
         ", expected a multiple of 16 up to 128 on a CUDA device");
  }
  const bool in_bf16 = wants_bf16(options);
  check_tokens("the model's largest batch", options.batch_tokens, "--micro-batch-tokens");
  in_bf16 ? check_cache_type<bf16>(options.decode.cache)
          : check_cache_type<float>(options.decode.cache);
  for (const WeightType type : options.weights) {
    if (type == WeightType::f32 || (type == WeightType::bf16 && in_bf16)) continue;
    fail("--weights ", kWeightTypeNames[int(type)], ": the CUDA engine computes in ",
         in_bf16 ? "bf16" : "f32", " here and keeps weights in it, expected ",
         in_bf16 ? "bf16" : "f32", " or auto");
  }
  const MemoryPlan plan = gpu::plan_memory(config, options);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "free memory");
  if (plan.total() > int64_t(free)) {
    fail("out of memory on the GPU: the plan takes ", bytes_text(double(plan.total())), " (",
         plan.text(), "), found ", bytes_text(double(free)), " free of ", bytes_text(double(total)),
         "; lower ", plan.largest().lower);
  }
  if (in_bf16) return std::make_unique<CudaGpt<bf16>>(config, options);
  return std::make_unique<CudaGpt<float>>(config, options);
}

// One large product in the model's type, on numbers like a model's: a GPU's clock depends on them.
template <class A>
static double product_peak() {
  static double peak = 0;  // once a process
  if (peak > 0) return peak;
  const auto machine = Machine::get();
  if (!timing) return peak = 1e9;  // the emulator has no speed of its own
  for (int64_t n = std::is_same_v<A, float> ? 4096 : 8192; n >= 512 && peak == 0; n /= 2) {
    Buffer<A> a, b, d;
    try {
      for (Buffer<A>* x : {&a, &b, &d}) *x = Buffer<A>("a product's matrix", n * n, "");
    } catch (const Error&) {
      continue;  // memory is full: a smaller one
    }
    std::vector<A> values(1 << 18);
    Rng rng{1};
    for (A& x : values) x = A(float(rng.normal()));
    for (const Buffer<A>* x : {&a, &b})
      for (int64_t i = 0; i < n * n; i += int64_t(values.size()))
        copy_to_device(x->data() + i, values.data(), values.size(), machine->stream,
                       "a product's matrix");
    const Product p = product_abt(n, n, n, a.data(), b.data(), d.data());
    machine->matmul(p);
    peak = 2. * double(n) * double(n) * double(n) /
           machine->products->time([&] { machine->matmul(p); });
  }
  return peak;
}

// By NVIDIA's datasheets, dense: tensor cores with bf16 operands, and fp32 without them.
struct DatasheetRates {
  const char* gpu;             // as its driver names it
  double bf16_tera, f32_tera;  // operations a second
};
static constexpr DatasheetRates kDatasheets[] = {
    {"NVIDIA H200", 989, 67},
    {"NVIDIA H100 80GB HBM3", 989, 67},
    {"NVIDIA H100 PCIe", 756, 51},
    {"NVIDIA A100-SXM4-40GB", 312, 19.5},
    {"NVIDIA A100-SXM4-80GB", 312, 19.5},
    {"NVIDIA A100-PCIE-40GB", 312, 19.5},
    {"NVIDIA A100 80GB PCIe", 312, 19.5},
    {"NVIDIA L40S", 362, 91.6},
    {"NVIDIA L4", 121, 30.3},
    {"NVIDIA A10", 125, 31.2},
    {"NVIDIA GeForce RTX 4090", 165, 82.6},
};
static double datasheet_operations(const std::string& gpu, bool in_bf16) {
  for (const DatasheetRates& d : kDatasheets)
    if (gpu == d.gpu) return 1e12 * (in_bf16 ? d.bf16_tera : d.f32_tera);
  return 0;
}
template <class A>
double CudaGpt<A>::datasheet_operations() const {
  return gpu::datasheet_operations(device_properties().name, Weights<A>::kCopy);
}

double measure_peak(const Gpt& gpt) {
  return dynamic_cast<const CudaGpt<bf16>*>(&gpt) ? product_peak<bf16>() : product_peak<float>();
}

}  // namespace cake::gpu
