// The layer that runs CUDA kernels on the CPU, itself: each operation against the CUDA Programming
// Guide's or the PTX ISA's definition in plain loops, each report by a kernel that earns it, each
// call of the runtime and of cuBLASLt that the engine relies on.
//
// A kernel that earns a report ends its process, so it runs in a child (report_of).
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <numeric>
#include <string>
#include <vector>

#include "test/cuda_on_cpu/control.h"
#include "test/cuda_on_cpu/device.h"
//
#include <cublasLt.h>

using namespace cuda_on_cpu;

namespace {

using bf16 = __nv_bfloat16;
constexpr unsigned kAll = 0xffffffffu;

template <class... Parameters, class... Arguments>
cudaError_t try_start(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  name_next_launch(name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared, config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
           const Arguments&... arguments) {
  REQUIRE(try_start("probe", kernel, grid, block, shared, nullptr, arguments...) == cudaSuccess);
}

// An array of device memory, copied in and out.
template <class T>
class Device {
 public:
  explicit Device(size_t n) : n_(n) { REQUIRE(cudaMalloc(&p_, n * sizeof(T)) == cudaSuccess); }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    REQUIRE(cudaMemcpy(p_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(p_); }
  operator T*() const { return p_; }
  std::vector<T> host() const {
    std::vector<T> out(n_);
    REQUIRE(cudaMemcpy(out.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return out;
  }

 private:
  T* p_ = nullptr;
  size_t n_;
};

class WithSchedule {
 public:
  explicit WithSchedule(Schedule schedule, uint64_t seed = 1) { set_schedule(schedule, seed); }
  ~WithSchedule() { set_schedule(Schedule::forward); }
};
constexpr Schedule kSchedules[] = {Schedule::forward, Schedule::reverse, Schedule::random};

// Numbers that bf16 holds exactly, small enough for exact sums.
std::vector<float> small_numbers(size_t n, unsigned seed) {
  std::vector<float> values(n);
  for (float& x : values) {
    seed = seed * 1664525u + 1013904223u;
    x = float(int(seed >> 24) - 128) / 32;
  }
  return values;
}

// What a child process that calls `run` says on stderr before it aborts.
template <class Run>
std::string report_of(Run&& run) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    for (int s : {SIGABRT, SIGSEGV, SIGBUS}) signal(s, SIG_DFL);
    dup2(ends[1], 2);
    set_workers(1);
    run();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[1024];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "no report";
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) return "ended otherwise: " + text;
  return text;
}
bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}
#define CHECK_REPORT(report, part)        \
  do {                                    \
    const std::string text = (report);    \
    CHECK_MESSAGE(has(text, part), text); \
  } while (false)

}  // namespace

// =============================================================================================
// Threads, barriers, schedules

__global__ void write_place(uint3* out) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned at = 2 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  out[at] = threadIdx, out[at + 1] = blockIdx;
}

TEST_CASE("every thread of every block runs once and knows its place") {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  Device<uint3> out(2 * 12 * 60);
  start(write_place, grid, block, 0, out);
  const auto places = out.host();
  size_t at = 0;
  for (unsigned b = 0; b < 12; b++) {
    for (unsigned t = 0; t < 60; t++, at += 2) {
      REQUIRE(places[at].x == t % 5);
      REQUIRE(places[at].y == t / 5 % 4);
      REQUIRE(places[at].z == t / 20);
      REQUIRE(places[at + 1].x == b % 3);
      REQUIRE(places[at + 1].y == b / 3 % 2);
      REQUIRE(places[at + 1].z == b / 6);
    }
  }
}

__global__ void reverse_block(int* out, const int* in, bool barrier) {
  int* shared = shared_memory<int>();
  const unsigned i = threadIdx.x, n = blockDim.x;
  for (int round = 0; round < 3; round++) {
    shared[i] = in[blockIdx.x * n + i] + round;
    if (barrier) __syncthreads();
    out[blockIdx.x * n + i] = shared[n - 1 - i];
    if (barrier) __syncthreads();
  }
}

TEST_CASE("shared memory and __syncthreads work under every schedule") {
  const int blocks = 7, n = 100;  // the last warp is not full
  std::vector<int> in(blocks * n);
  std::iota(in.begin(), in.end(), 5);
  const Device<int> from(in), to(in.size());
  for (Schedule schedule : kSchedules) {
    const WithSchedule with(schedule);
    start(reverse_block, blocks, n, n * sizeof(int), to, from, true);
    const auto out = to.host();
    for (int i = 0; i < blocks * n; i++) REQUIRE(out[i] == in[i / n * n + n - 1 - i % n] + 2);
  }
}

// out[i] = what thread i sees of what thread i + step wrote, with no barrier between.
__global__ void read_neighbour(float* out, int step) {
  float* shared = shared_memory<float>();
  const int i = int(threadIdx.x), n = int(blockDim.x);
  shared[i] = 1;
  out[i] = shared[(i + step + n) % n];
}

TEST_CASE("a missing barrier shows as NaN under the forward or the reverse schedule") {
  const Device<float> out(64);
  const auto nans = [&](Schedule schedule, int step) {
    const WithSchedule with(schedule);
    start(read_neighbour, 1, 64, 64 * sizeof(float), out, step);
    int count = 0;
    for (float x : out.host()) count += std::isnan(x);
    return count;
  };
  CHECK(nans(Schedule::forward, 1) == 63);  // the neighbour above has not run
  CHECK(nans(Schedule::forward, -1) == 1);
  CHECK(nans(Schedule::reverse, 1) == 1);
  CHECK(nans(Schedule::reverse, -1) == 63);
  CHECK(nans(Schedule::random, 1) > 5);
  CHECK(nans(Schedule::random, 1) < 59);
}

__global__ void exchange_in_warp(float* out, bool sync) {
  float* shared = shared_memory<float>();
  const int lane = int(threadIdx.x) % 32;
  for (int d = 16; d > 0; d /= 2) {
    shared[threadIdx.x] = float(lane + d);
    if (sync) __syncwarp();
    out[threadIdx.x] = shared[threadIdx.x ^ unsigned(d)] - float(d);
    if (sync) __syncwarp();
  }
}

TEST_CASE("a missing __syncwarp changes what a warp computes") {
  const Device<float> out(64);
  for (Schedule schedule : kSchedules) {
    const WithSchedule with(schedule);
    for (bool sync : {true, false}) {
      start(exchange_in_warp, 1, 64, 64 * sizeof(float), out, sync);
      const auto values = out.host();
      bool right = true;
      for (int i = 0; i < 64; i++) right = right && values[i] == float((i ^ 1) % 32);
      CHECK(right == sync);
    }
  }
}

__global__ void write_turn(int* turns, int* counter) {
  turns[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

TEST_CASE("schedules run threads forward, in reverse, or at random by the seed") {
  const int n = 160;
  const auto turns = [&](Schedule schedule, uint64_t seed, unsigned blocks = 2) {
    const WithSchedule with(schedule, seed);
    set_workers(1);
    const Device<int> out(n), counter(std::vector<int>{0});
    start(write_turn, blocks, n / blocks, 0, out, counter);
    set_workers(0);
    return out.host();
  };
  const auto forward = turns(Schedule::forward, 1), reverse = turns(Schedule::reverse, 1);
  for (int i = 0; i < n; i++) {
    REQUIRE(forward[i] == i);
    REQUIRE(reverse[i] == n - 1 - i);
  }
  const auto random = turns(Schedule::random, 1);
  CHECK(random == turns(Schedule::random, 1));
  CHECK(turns(Schedule::random, 1, 1) != turns(Schedule::random, 2, 1));
  CHECK(random != forward);
  auto sorted = random;
  std::sort(sorted.begin(), sorted.end());
  CHECK(sorted == forward);
}

__global__ void count_all(unsigned* counters, int n) {
  for (int i = 0; i < n; i++) {
    atomicAdd(&counters[0], 1u);
    atomicMax(&counters[1], blockIdx.x * blockDim.x + threadIdx.x);
    atomicInc(&counters[2], 9);
  }
}

template <class T>
concept HasAtomicAdd = requires(T* p) {
  atomicAdd(p, T(1));
};

TEST_CASE("integer atomics count over all blocks; atomics on floats do not compile") {
  const Device<unsigned> counters(std::vector<unsigned>{0, 0, 0});
  start(count_all, 100, 64, 0, counters, 10);
  CHECK(counters.host() == std::vector<unsigned>{64000, 6399, 0});
  CHECK(HasAtomicAdd<int>);
  CHECK_FALSE(HasAtomicAdd<float>);
  CHECK_FALSE(HasAtomicAdd<double>);
}

__global__ void write_places(bf16* out, unsigned step) {
  out[blockIdx.x * step + threadIdx.x] = __float2bfloat16(1.f + float(blockIdx.x));
  out[blockIdx.x * step + threadIdx.x] = __float2bfloat16(2.f + float(blockIdx.x));
}
__global__ void count_or_write(unsigned* out, unsigned step, bool plain_block) {
  unsigned* place = out + blockIdx.x / 2 * step;
  if (plain_block && blockIdx.x == 1) {
    *place += 2;
  } else {
    atomicAdd(place, 1);
  }
}
__global__ void write_at(unsigned* p, int place) { p[place] = blockIdx.x; }
class WithWriteChecks {
 public:
  WithWriteChecks() { set_write_checks(true); }
  ~WithWriteChecks() { set_write_checks(false); }
};

TEST_CASE("two blocks that write one place are reported, unless they do so by atomics") {
  for (const Schedule schedule : kSchedules) {
    const WithSchedule with(schedule);
    const WithWriteChecks checks;
    const Device<bf16> out(5000);
    start(write_places, 5, 1000, 0, out, 1000u);  // twice by one block, and side by side
    start(write_places, 5, 1000, 0, out, 1000u);  // again, by another launch
    CHECK(float(out.host()[4999]) == 6);
    const Device<bf16> fresh(5000);
    const std::string report = report_of([&] { start(write_places, 5, 1000, 0, fresh, 999u); });
    CHECK_REPORT(report, "cuda_on_cpu: probe: blocks (");
    CHECK_REPORT(report, "both write byte ");
    CHECK_REPORT(report, "of an allocation of 10000 bytes");
    const Device<unsigned> counters(std::vector<unsigned>(2000));
    start(count_or_write, 4, 64, 0, counters, 1999u, false);
    CHECK(counters.host()[0] == 128);
    CHECK(counters.host()[1999] == 128);
    CHECK_REPORT(report_of([&] { start(count_or_write, 4, 64, 0, counters, 1999u, true); }),
                 "byte 0 of an allocation of 8000 bytes");
    CHECK_REPORT(report_of([&] { start(write_at, 2, 1, 0, counters, 2000); }),
                 "out of bounds write at address");
  }
  const Device<bf16> out(5000);  // and none is looked for
  start(write_places, 5, 1000, 0, out, 999u);
}

// =============================================================================================
// Memory

__global__ void copy_shared(float* out, int n) {
  float* shared = shared_memory<float>();
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    out[int(blockIdx.x) * n + i] = shared[i];
    shared[i] = 1;
  }
}

TEST_CASE("device memory and every block's shared memory begin as NaN") {
  const Device<float> out(4 * 1000);
  for (float x : out.host()) REQUIRE(std::isnan(x));
  start(copy_shared, 4, 64, 4000, out, 1000);
  for (float x : out.host()) REQUIRE(std::isnan(x));
  CHECK(std::isnan(float(__ushort_as_bfloat16(0xffff))));
}

__global__ void touch(float* p, int64_t at, bool write) {
  if (write) {
    p[at] = 1;
  } else {
    static_cast<void>(*static_cast<volatile float*>(p + at));
  }
}
__global__ void touch_shared(int64_t at) { shared_memory<char>()[at] = 1; }
__global__ void touch_elsewhere(int64_t address) { *reinterpret_cast<volatile char*>(address) = 1; }

TEST_CASE("an access outside an allocation is reported with kernel, block, thread and distance") {
  const auto run = [](int64_t at, bool write) {
    return report_of([=] {
      const Device<float> p(100);
      try_start("touch", touch, dim3(2, 3), dim3(4, 5), 0, nullptr, p, at, write);
    });
  };
  CHECK(run(99, true) == "no report");
  CHECK_REPORT(run(100, true),
               "cuda_on_cpu: kernel touch, block (0, 0, 0), thread (0, 0, 0): out of bounds");
  CHECK_REPORT(run(100, true), "0 bytes past the end of an allocation of 400 bytes");
  CHECK_REPORT(run(107, false), "28 bytes past the end of an allocation of 400 bytes");
  CHECK_REPORT(run(-2000, true), "8000 bytes before an allocation of 400 bytes");
#ifdef __x86_64__
  CHECK_REPORT(run(100, true), "out of bounds write");
  CHECK_REPORT(run(100, false), "out of bounds read");
#endif
  CHECK_REPORT(report_of([] {
                 const Device<float> p(100);
                 const WithSchedule with(Schedule::reverse);
                 try_start("touch", touch, dim3(2, 3), dim3(4, 5), 0, nullptr, p, 100, true);
               }),
               "block (1, 2, 0), thread (3, 4, 0)");
  CHECK_REPORT(report_of([] {
                 float* p;
                 cudaMalloc(&p, 400);
                 cudaFree(p);
                 try_start("touch", touch, 1, 1, 0, nullptr, p, 7, true);
               }),
               "byte 28 of a freed allocation of 400 bytes");
  CHECK_REPORT(report_of([] { try_start("touch", touch_elsewhere, 1, 1, 0, nullptr, 16); }),
               "address 0x10, which is in no allocation");
}

TEST_CASE("host memory in a kernel's hands, and device memory in the host's, are reported") {
  CHECK_REPORT(report_of([] {
                 std::vector<float> p(100);
                 try_start("touch", touch, 1, 1, 0, nullptr, p.data(), 7, true);
               }),
               "cuda_on_cpu: touch: kernel argument 1, 0x");
  CHECK(report_of([] {
          float* p;
          cudaMallocHost(&p, 400);
          try_start("touch", touch, 1, 1, 0, nullptr, p, 7, true);
        }) == "no report");
  const auto host_touch = [](bool checks) {
    return report_of([=] {
      const Device<float> p(100);
      set_host_checks(checks);
      const Device<float> q(100);
      try_start("touch", touch, 1, 1, 0, nullptr, q, 7, true);
      if (q.host()[7] == 1) p[3] = 1;
    });
  };
  CHECK(host_touch(false) == "no report");
  CHECK_REPORT(host_touch(true), "cuda_on_cpu: host code touches device memory");
  CHECK_REPORT(host_touch(true), "byte 12 of an allocation of 400 bytes");
  CHECK_REPORT(report_of([] {
                 set_host_checks(true);
                 const Device<float> p(100);
                 p[3] = 1;  // before anything else has run
               }),
               "host code touches device memory");
}

TEST_CASE("writes into the bytes between an allocation and its pages are found when it is freed") {
  const auto run = [](int64_t at) {
    return report_of([=] {
      char* p;
      cudaMalloc(&p, 13);
      start(touch_elsewhere, 1, 1, 0, int64_t(uintptr_t(p)) + at);
      cudaFree(p);
    });
  };
  CHECK(run(12) == "no report");
  CHECK_REPORT(run(13), "an allocation of 13 bytes was written to past its end");
  CHECK_REPORT(run(-1), "an allocation of 13 bytes was written to before its start");
}

TEST_CASE("an access outside of shared memory is reported") {
  const auto run = [](int64_t at, size_t bytes) {
    return report_of([=] { try_start("touch", touch_shared, 1, 1, bytes, nullptr, at); });
  };
  CHECK(run(1279, 1280) == "no report");
  CHECK_REPORT(run(1280, 1280), "0 bytes past the end of shared memory of 1280 bytes");
  CHECK_REPORT(run(1283, 1280), "3 bytes past the end of shared memory of 1280 bytes");
  CHECK_REPORT(run(1001, 1000), "shared memory of 1000 bytes was written to past its end");
  CHECK_REPORT(run(-1, 1000), "shared memory of 1000 bytes was written to before its start");
  CHECK_REPORT(run(-70000, 1000), "70000 bytes before shared memory of 1000 bytes");
  CHECK_REPORT(run(0, 0), "0 bytes past the end of shared memory of 0 bytes");
}

__global__ void use_alignment(float* p, int kind) {
  alignas(16) static thread_local char local[32];
  bf16* shared = shared_memory<bf16>();
  uint32_t r[4];
  switch (kind) {
    case 0:
      check_aligned(p + 4, 16);
      break;
    case 1:
      check_aligned(p + 1, 16);
      break;
    case 2:
      ldmatrix_x4(r, shared + 4);
      break;
    case 3:
      ldmatrix_x4(r, reinterpret_cast<bf16*>(local));
      break;
    case 4:
      ldmatrix_x4(r, shared + 512);
      break;
    case 5:
      cp_async16(shared + 8, p + 4, true);
      break;
    case 6:
      cp_async16(shared + 4, p, true);
      break;
    case 7:
      cp_async16(shared, p + 2, true);
      break;
    case 8:
      cp_async16(p, p, true);
      break;
    case 9:
      cp_async16(shared, p + 100, true);
      break;
    case 10:
      __ldg(reinterpret_cast<const float2*>(p + 1));
      break;
  }
}

TEST_CASE("misaligned and misplaced operands of special instructions are reported") {
  const auto run = [](int kind) {
    return report_of([=] {
      const Device<float> p(100);
      try_start("use", use_alignment, 1, 32, 1024, nullptr, p, kind);
    });
  };
  CHECK(run(0) == "no report");
  CHECK_REPORT(run(1), "is not a multiple of 16");
  CHECK_REPORT(run(2), "is not a multiple of 16");
  CHECK_REPORT(run(3), "ldmatrix: out of bounds");
  CHECK_REPORT(run(4), "15 bytes past the end of shared memory of 1024 bytes");
  CHECK(run(5) == "no report");
  CHECK_REPORT(run(6), "is not a multiple of 16");
  CHECK_REPORT(run(7), "is not a multiple of 16");
  CHECK_REPORT(run(8), "cp_async16: out of bounds");
  CHECK_REPORT(run(9), "past the end of an allocation of 400 bytes");
  CHECK_REPORT(run(10), "is not a multiple of 8");
}

__global__ int recurse(int depth) {
  volatile char local[1024];
  local[depth % 1024] = char(depth);
  return depth == 0 ? 0 : recurse(depth - 1) + local[depth % 1024];
}
__global__ void overflow(int* out, int depth) { *out = recurse(depth); }

TEST_CASE("a thread whose local variables do not fit its stack is reported") {
  CHECK_REPORT(report_of([] {
                 const Device<int> out(1);
                 try_start("deep", overflow, 1, 1, 0, nullptr, out, 1000);
               }),
               "kernel deep, block (0, 0, 0), thread (0, 0, 0): stack overflow");
}

// =============================================================================================
// Misuse of barriers and warps

__global__ void misuse(int kind) {
  const int t = int(threadIdx.x), lane = t % 32;
  switch (kind) {
    case 0:
      __syncthreads();
      break;
    case 1:  // some have exited
      if (t < 10) return;
      __syncthreads();
      break;
    case 2:  // some exit later
      if (t < 63) __syncthreads();
      break;
    case 3:  // two barriers
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 4:  // the mask leaves out who calls
      __syncwarp(0xffff);
      break;
    case 5:  // the mask names one that has exited
      if (lane == 0) return;
      __shfl_xor_sync(kAll, t, 1);
      break;
    case 6:  // a lane that is waited for exits
      if (lane < 31) __ballot_sync(kAll, 1);
      break;
    case 7:  // two operations
      if (lane < 8) {
        __shfl_xor_sync(kAll, t, 1);
      } else {
        __shfl_down_sync(kAll, t, 1);
      }
      break;
    case 8:  // two masks
      __syncwarp(lane < 16 ? kAll : 0xfffffff0u);
      break;
    case 9:  // reads a lane that takes no part
      if (lane < 16) __shfl_xor_sync(0xffffu, t, 16);
      break;
    case 10:  // one half waits for the warp, the other for the block
      if (lane < 16) __syncwarp();
      __syncthreads();
      break;
    case 11:  // mma.sync by half a warp, and the other half by another
    {
      float d[4] = {};
      const uint32_t a[4] = {};
      if (lane < 16) {
        mma_m16n8k16(d, a, 0, 0);
      } else {
        mma_m16n8k16(d, a, 0, 0);
      }
    } break;
    case 12:  // halves of a warp that wait for themselves
      if (lane < 16) {
        __syncwarp(0x0000ffffu);
      } else {
        __shfl_xor_sync(0xffff0000u, t, 1);
      }
      __syncthreads();
      break;
    case 13:
      __trap();
  }
}

TEST_CASE("barriers that not all threads reach are reported") {
  const auto run = [](int kind, unsigned threads = 64) {
    return report_of([=] { try_start("misuse", misuse, 1, threads, 0, nullptr, kind); });
  };
  CHECK(run(0) == "no report");
  CHECK_REPORT(run(1), "thread (10, 0, 0): divergent barrier: __syncthreads at");
  CHECK_REPORT(run(1), "but thread (0, 0, 0) has exited");
  CHECK_REPORT(run(2),
               "thread (63, 0, 0): divergent barrier: this thread exits, and thread (0, 0, 0)");
  CHECK_REPORT(run(3),
               "thread (32, 0, 0): divergent barrier: __syncthreads at test_cuda_on_cpu.cpp:");
  CHECK_REPORT(run(3), "but thread (0, 0, 0) waits in another at test_cuda_on_cpu.cpp:");
  CHECK_REPORT(run(10), "deadlock: of 64 threads, 0 have exited; 32 wait in __syncwarp at");
  CHECK_REPORT(run(10), "32 wait in __syncthreads at");
}

TEST_CASE("operations that a warp's lanes do not agree on are reported") {
  const auto run = [](int kind, unsigned threads = 64) {
    return report_of([=] { try_start("misuse", misuse, 1, threads, 0, nullptr, kind); });
  };
  CHECK(run(12) == "no report");
  CHECK_REPORT(run(4), "thread (16, 0, 0): __syncwarp at test_cuda_on_cpu.cpp:");
  CHECK_REPORT(run(4), "the mask 0x0000ffff does not name lane 16, which calls");
  CHECK_REPORT(run(5), "the mask 0xffffffff names lane 0, which has exited");
  CHECK_REPORT(run(6), "lane 31 exits, and lane 0 waits for it in __ballot_sync at");
  CHECK_REPORT(run(7), "thread (8, 0, 0): divergent warp: __shfl_down_sync, mask 0xffffffff, at");
  CHECK_REPORT(run(7), "but lane 0 waits in __shfl_xor_sync, mask 0xffffffff, at");
  CHECK_REPORT(run(8), "divergent warp: __syncwarp, mask 0xfffffff0");
  CHECK_REPORT(run(9), "reads lane 16, which the mask 0x0000ffff does not name");
  CHECK_REPORT(run(11), "thread (16, 0, 0): divergent warp: mma_m16n8k16");
  CHECK_REPORT(run(13), "thread (0, 0, 0): __trap()");
  CHECK_REPORT(run(5, 20), "the mask 0xffffffff names lane 0, which has exited");
  CHECK_REPORT(run(7, 20), "the mask 0xffffffff names lane 20, which this warp does not have");
}

// =============================================================================================
// Operations of a warp

__global__ void shuffle_all(int* out, const int* in, int width, int by) {
  const unsigned t = threadIdx.x;
  int* o = out + 4 * t;
  o[0] = __shfl_sync(kAll, in[t], by, width);
  o[1] = __shfl_xor_sync(kAll, in[t], by, width);
  o[2] = __shfl_up_sync(kAll, in[t], unsigned(by), width);
  o[3] = __shfl_down_sync(kAll, in[t], unsigned(by), width);
}

TEST_CASE("shuffles are the PTX ISA's, in groups of any width, under every schedule") {
  std::vector<int> in(96);
  std::iota(in.begin(), in.end(), 1000);
  const Device<int> from(in), to(4 * in.size());
  for (Schedule schedule : kSchedules) {
    const WithSchedule with(schedule);
    for (int width : {32, 16, 4, 1}) {
      for (int by : {0, 1, 3, 5, 17}) {
        start(shuffle_all, 1, 96, 0, to, from, width, by);
        const auto out = to.host();
        for (int t = 0; t < 96; t++) {
          // shfl.sync, "Semantics": segmask = 32 - width; idx, bfly and down stay at or below the
          // last lane of the group, up at or above the first; else one's own value.
          const int lane = t % 32, warp = t - lane, segmask = 32 - width;
          const int last = (lane & segmask) | (31 & ~segmask), first = lane & segmask;
          const int idx = (lane & segmask) | (by & ~segmask & 31);
          const auto up_to_last = [&](int j) { return in[warp + (j <= last ? j : lane)]; };
          REQUIRE(out[4 * t] == in[warp + idx]);
          REQUIRE(out[4 * t + 1] == up_to_last(lane ^ by));
          REQUIRE(out[4 * t + 2] == in[warp + (lane - by >= first ? lane - by : lane)]);
          REQUIRE(out[4 * t + 3] == up_to_last(lane + by));
        }
      }
    }
  }
}

__global__ void shuffle_types(double* d, bf16* h, long long* l) {
  const unsigned t = threadIdx.x;
  d[t] = __shfl_xor_sync(kAll, double(t) / 3, 1);
  h[t] = __shfl_xor_sync(kAll, bf16(float(t)), 1);
  l[t] = __shfl_xor_sync(kAll, -5000000000ll * t, 1);
}

TEST_CASE("shuffles carry values of 2 and 8 bytes") {
  const Device<double> d(32);
  const Device<bf16> h(32);
  const Device<long long> l(32);
  start(shuffle_types, 1, 32, 0, d, h, l);
  for (int t = 0; t < 32; t++) {
    REQUIRE(d.host()[size_t(t)] == double(t ^ 1) / 3);
    REQUIRE(float(h.host()[size_t(t)]) == float(t ^ 1));
    REQUIRE(l.host()[size_t(t)] == -5000000000ll * (t ^ 1));
  }
}

__global__ void vote(unsigned* out, const int* in, unsigned mask) {
  const unsigned t = threadIdx.x;
  if (!(mask >> t & 1)) return;
  unsigned* o = out + 7 * t;
  o[0] = __ballot_sync(mask, in[t] > 2);
  o[1] = unsigned(__any_sync(mask, in[t] > 8));
  o[2] = unsigned(__all_sync(mask, in[t] > -100));
  o[3] = __match_any_sync(mask, in[t]);
  o[4] = unsigned(__reduce_add_sync(mask, in[t]));
  o[5] = unsigned(__reduce_min_sync(mask, in[t]));
  o[6] = unsigned(__reduce_max_sync(mask, in[t]));
}

TEST_CASE("votes, matches and integer reductions over the lanes of a mask") {
  std::vector<int> in(32);
  for (int i = 0; i < 32; i++) in[i] = (i * 7 + 5) % 11 - (i % 3 == 0 ? 4 : 0);
  for (int shift : {0, 90}) {  // 90: no lane above 2, not all above -100
    for (int& x : in) x -= shift;
    const Device<int> from(in);
    const Device<unsigned> to(7 * 32);
    for (unsigned mask : {kAll, 0x0ff0f001u}) {
      start(vote, 1, 32, 0, to, from, mask);
      unsigned ballot = 0, any = 0, all = 1;
      int sum = 0, low = 1 << 30, high = -(1 << 30);
      for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (in[i] > 2) ballot |= 1u << i;
        if (in[i] > 8) any = 1;
        if (in[i] <= -100) all = 0;
        sum += in[i], low = std::min(low, in[i]), high = std::max(high, in[i]);
      }
      const auto out = to.host();
      for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        unsigned equal = 0;
        for (int j = 0; j < 32; j++) equal |= unsigned((mask >> j & 1) && in[j] == in[i]) << j;
        const unsigned* o = &out[size_t(7 * i)];
        REQUIRE(o[0] == ballot);
        REQUIRE(o[1] == any);
        REQUIRE(o[2] == all);
        REQUIRE(o[3] == equal);
        REQUIRE(int(o[4]) == sum);
        REQUIRE(int(o[5]) == low);
        REQUIRE(int(o[6]) == high);
      }
    }
  }
}

__global__ void load_matrices(uint32_t* out, const uint16_t* in, bool trans) {
  uint16_t* shared =
      shared_memory<uint16_t>();  // rows 24 numbers apart, as padding would have them
  const unsigned lane = threadIdx.x;
  for (unsigned j = 0; j < 8; j++) shared[lane * 24 + j] = in[lane * 8 + j];
  __syncwarp();
  uint32_t r[4];
  const bf16* row = reinterpret_cast<const bf16*>(shared + lane * 24);
  if (trans) {
    ldmatrix_x4_trans(r, row);
  } else {
    ldmatrix_x4(r, row);
  }
  for (unsigned m = 0; m < 4; m++) out[lane * 4 + m] = r[m];
}

TEST_CASE("ldmatrix gives each lane the elements that the PTX ISA says") {
  std::vector<uint16_t> in(256);
  std::iota(in.begin(), in.end(), uint16_t(0x4100));
  const Device<uint16_t> from(in);
  const Device<uint32_t> to(128);
  for (Schedule schedule : kSchedules) {
    const WithSchedule with(schedule);
    for (bool trans : {false, true}) {
      start(load_matrices, 1, 32, 32 * 48, to, from, trans);
      const auto out = to.host();
      // Element (row, column) of each matrix is in lane 4 row + column / 2, its lower half if
      // column is even; with .trans the matrix is read in column-major order.
      for (int m = 0; m < 4; m++) {
        for (int row = 0; row < 8; row++) {
          for (int column = 0; column < 8; column++) {
            const uint32_t word = out[size_t((row * 4 + column / 2) * 4 + m)];
            const int half = column % 2 ? int(word >> 16) : int(word & 0xffff);
            REQUIRE(half == in[size_t(m * 64 + (trans ? column * 8 + row : row * 8 + column))]);
          }
        }
      }
    }
  }
}

__global__ void multiply_fragments(float* d, const bf16* a, const bf16* b) {
  // PTX ISA, "Matrix Fragments for mma.m16n8k16": element by element.
  const unsigned lane = threadIdx.x, group = lane >> 2, in_group = lane % 4;
  uint16_t ra[8], rb[4];
  for (unsigned i = 0; i < 8; i++) {
    const unsigned row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const unsigned column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    ra[i] = __bfloat16_as_ushort(a[row * 16 + column]);
  }
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    rb[i] = __bfloat16_as_ushort(b[row * 8 + group]);
  }
  uint32_t wa[4], wb[2];
  std::memcpy(wa, ra, sizeof wa);
  std::memcpy(wb, rb, sizeof wb);
  float c[4];
  for (unsigned i = 0; i < 4; i++) {
    c[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  mma_m16n8k16(c, wa, wb[0], wb[1]);
  for (unsigned i = 0; i < 4; i++) {
    d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
  }
}

TEST_CASE("mma.sync m16n8k16 adds a matrix product to D") {
  const auto a = small_numbers(256, 1), b = small_numbers(128, 2), c = small_numbers(128, 3);
  const Device<bf16> da(std::vector<bf16>(a.begin(), a.end()));
  const Device<bf16> db(std::vector<bf16>(b.begin(), b.end()));
  for (Schedule schedule : kSchedules) {
    const WithSchedule with(schedule);
    const Device<float> dd(c);
    start(multiply_fragments, 1, 32, 0, dd, da, db);
    const auto d = dd.host();
    for (int i = 0; i < 16; i++) {
      for (int j = 0; j < 8; j++) {
        float sum = c[size_t(i * 8 + j)];  // exact: multiples of 2^-10 below 2^9
        for (int k = 0; k < 16; k++) sum += a[size_t(i * 16 + k)] * b[size_t(k * 8 + j)];
        REQUIRE(d[size_t(i * 8 + j)] == sum);
      }
    }
  }
}

__global__ void copy_async(float* out, const float* in, int step) {
  float* shared = shared_memory<float>();
  const unsigned t = threadIdx.x;
  cp_async16(shared + 4 * t, in + 4 * t, true);
  cp_async_commit();
  cp_async16(shared + 4 * (32 + t), in, t % 2 == 0);  // odd threads: zeros
  cp_async_commit();
  if (step == 1) cp_async_wait<1>();
  if (step == 2) cp_async_wait<0>();
  __syncthreads();
  for (unsigned i = t; i < 256; i += 32) out[i] = shared[i];
}

TEST_CASE("cp.async lands at the wait that covers it, and not before") {
  const auto in = small_numbers(128, 4);
  const Device<float> from(in), to(256);
  for (int step : {0, 1, 2}) {
    start(copy_async, 1, 32, 1024, to, from, step);
    const auto out = to.host();
    for (size_t i = 0; i < 256; i++) {
      const bool second = i >= 128;
      if (step < (second ? 2 : 1)) {
        REQUIRE(std::isnan(out[i]));
      } else if (second) {
        REQUIRE(out[i] == ((i / 4) % 2 == 0 ? in[i % 4] : 0.f));
      } else {
        REQUIRE(out[i] == in[i]);
      }
    }
  }
}

TEST_CASE("bf16 rounds to nearest, ties to even, and keeps NaN and infinity") {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const bf16 x = __ushort_as_bfloat16((unsigned short)bits);
    const float value = float(x);
    if (std::isnan(value)) {
      REQUIRE(std::isnan(float(bf16(value))));
    } else {
      REQUIRE(__bfloat16_as_ushort(bf16(value)) == bits);
    }
  }
  CHECK(float(bf16(1.00390625f)) == 1.f);           // 1 + 2^-8, a tie: to even
  CHECK(float(bf16(1.01171875f)) == 1.015625f);     // 1 + 3 2^-8, a tie: to even
  CHECK(float(bf16(1.00390637f)) == 1.0078125f);    // just above a tie
  CHECK(float(bf16(-1.00390637f)) == -1.0078125f);  //
  CHECK(float(bf16(3.4e38f)) == INFINITY);          // beyond the largest
  const __nv_bfloat162 two = __floats2bfloat162_rn(1.5f, -2.f);
  CHECK(std::bit_cast<uint32_t>(two) == 0xc0003fc0u);  // x in the lower half
}

TEST_CASE("exp2_approx has no subnormal results") {
  CHECK(exp2_approx(-3.f) == .125f);
  CHECK(exp2_approx(-126.f) > 0);
  CHECK(exp2_approx(-127.f) == 0);
  CHECK(exp2_approx(-INFINITY) == 0);
  CHECK(std::isnan(exp2_approx(NAN)));
}

// =============================================================================================
// The runtime

__global__ void nothing() {}
__global__ void add_one(int* p) { p[threadIdx.x]++; }
constexpr int kFewThreads = 96;
template <class T>
__global__ void __launch_bounds__(kFewThreads) add_in_few(T* p) {
  p[threadIdx.x]++;
}
__global__ void __launch_bounds__(1000, 1) add_in_many(int* p) { p[threadIdx.x]++; }

TEST_CASE("launches that a GPU refuses are refused") {
  const auto status = [](dim3 grid, dim3 block, size_t shared) {
    const cudaError_t s = try_start("nothing", nothing, grid, block, shared, nullptr);
    CHECK(cudaGetLastError() == s);
    CHECK(cudaGetLastError() == cudaSuccess);
    return s;
  };
  CHECK(status(1, 1024, 48 << 10) == cudaSuccess);
  CHECK(status(1, 1025, 0) == cudaErrorInvalidConfiguration);
  CHECK(status(1, dim3(1, 1, 65), 0) == cudaErrorInvalidConfiguration);
  CHECK(status(0, 32, 0) == cudaErrorInvalidConfiguration);
  CHECK(status(dim3(1, 65536), 32, 0) == cudaErrorInvalidConfiguration);
  CHECK(status(1, 32, (48 << 10) + 1) == cudaErrorInvalidValue);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK(cudaFuncSetAttribute(nothing, attribute, (227 << 10) + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(nothing, attribute, 227 << 10) == cudaSuccess);
  cudaGetLastError();
  CHECK(status(1, 32, 227 << 10) == cudaSuccess);
  CHECK(status(1, 32, (227 << 10) + 1) == cudaErrorInvalidValue);
  fail_next_launch(1);
  CHECK(status(1, 32, 0) == cudaSuccess);
  CHECK(status(1, 32, 0) == cudaErrorLaunchOutOfResources);
  CHECK(status(1, 32, 0) == cudaSuccess);
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
TEST_CASE("a block larger than a kernel's __launch_bounds__ is refused") {
  const Device<int> p(std::vector<int>(1024));
  const auto status = [&](auto kernel, unsigned threads) {
    const cudaError_t s = try_start("bounded", kernel, 1, threads, 0, nullptr, p);
    cudaGetLastError();
    return s;
  };
  CHECK(status(add_in_few<int>, 96) == cudaSuccess);
  CHECK(status(add_in_few<int>, 97) == cudaErrorLaunchOutOfResources);
  CHECK(status(add_in_many, 1024) == cudaSuccess);  // whole warps
  CHECK(status(add_one, 1024) == cudaSuccess);
  CHECK(p.host()[95] == 3);
  CHECK(p.host()[1023] == 2);
}
#endif

TEST_CASE("memory runs out where the device is said to end, and where a test asks") {
  const size_t before = memory_in_use();
  set_memory(before + 1000);
  float *p = nullptr, *q = nullptr;
  CHECK(cudaMalloc(&p, 1001) == cudaErrorMemoryAllocation);
  CHECK(p == nullptr);
  CHECK(cudaMalloc(&p, 600) == cudaSuccess);
  CHECK(cudaMalloc(&q, 401) == cudaErrorMemoryAllocation);
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  CHECK(free == 400);
  CHECK(total == before + 1000);
  CHECK(cudaFree(p) == cudaSuccess);
  CHECK(cudaFree(p) == cudaErrorInvalidValue);
  fail_next_malloc();
  CHECK(cudaMalloc(&q, 600) == cudaErrorMemoryAllocation);
  CHECK(cudaMalloc(&q, 600) == cudaSuccess);
  CHECK(cudaFree(q) == cudaSuccess);
  CHECK(cudaFree(nullptr) == cudaSuccess);
  CHECK(memory_in_use() == before);
  set_memory(size_t(16) << 30);
  cudaGetLastError();
}

TEST_CASE("a machine without a device, or with an old driver, can be pretended") {
  int count = -1;
  set_device_count(0);
  CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice);
  CHECK(count == 0);
  CHECK(std::string(cudaGetErrorString(cudaErrorNoDevice)) == "no CUDA-capable device is detected");
  set_device_count(1);
  set_driver_version(11080);
  CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver);
  set_driver_version(13000);
  set_compute_capability(7, 5);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
  CHECK(properties.major == 7);
  CHECK(properties.minor == 5);
  set_compute_capability(9, 0);
  CHECK(cudaGetDeviceProperties(&properties, 1) == cudaErrorInvalidDevice);
  cudaGetLastError();
}

TEST_CASE("copies outside of allocations, or in the wrong direction, are refused") {
  const Device<int> d(std::vector<int>{1, 2, 3});
  int host[4] = {};
  CHECK(cudaMemcpy(host, d, 12, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(host[2] == 3);
  CHECK(cudaMemcpy(host, d, 16, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
  CHECK(cudaMemcpy(d, host, 16, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  CHECK(cudaMemcpy(host, d, 12, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  CHECK(cudaMemset(d + 1, 0, 12) == cudaErrorInvalidValue);
  CHECK(cudaMemset(d + 1, 0, 8) == cudaSuccess);
  CHECK(d.host() == std::vector<int>{1, 0, 0});
  cudaGetLastError();
}

TEST_CASE("a captured stream runs nothing; its graph replays kernels and copies in order") {
  const Device<int> d(std::vector<int>{10, 20}), copy(2);
  cudaStream_t stream;
  REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  cudaStreamCaptureStatus capturing;
  CHECK(cudaStreamIsCapturing(stream, &capturing) == cudaSuccess);
  CHECK(capturing == cudaStreamCaptureStatusActive);
  CHECK(try_start("add_one", add_one, 1, 2, 0, stream, d) == cudaSuccess);
  CHECK(cudaMemcpyAsync(copy, d, 8, cudaMemcpyDeviceToDevice, stream) == cudaSuccess);
  CHECK(try_start("add_one", add_one, 1, 2, 0, stream, d) == cudaSuccess);
  cudaGraph_t graph;
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  CHECK(d.host() == std::vector<int>{10, 20});
  cudaGraphExec_t exec;
  REQUIRE(cudaGraphInstantiate(&exec, graph) == cudaSuccess);
  CHECK(cudaGraphDestroy(graph) == cudaSuccess);
  const int64_t launched = kernels_launched();
  for (int i = 0; i < 3; i++) CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess);
  CHECK(kernels_launched() == launched + 6);
  CHECK(d.host() == std::vector<int>{16, 26});
  CHECK(copy.host() == std::vector<int>{15, 25});
  CHECK(cudaGraphExecDestroy(exec) == cudaSuccess);

  // To wait during a capture, or allocate, ends it.
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  int* p;
  CHECK(cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
  CHECK(cudaStreamDestroy(stream) == cudaSuccess);
  cudaGetLastError();
}

TEST_CASE("a stream that waits for an event of a capture takes part in it") {
  const Device<int> d(std::vector<int>{1});
  cudaStream_t first, second;
  cudaEvent_t event, back;
  cudaStreamCreate(&first), cudaStreamCreate(&second);
  cudaEventCreate(&event), cudaEventCreate(&back);
  REQUIRE(cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK(cudaEventRecord(event, first) == cudaSuccess);
  CHECK(cudaStreamWaitEvent(second, event) == cudaSuccess);
  CHECK(try_start("add_one", add_one, 1, 1, 0, second, d) == cudaSuccess);
  CHECK(cudaEventRecord(back, second) == cudaSuccess);
  CHECK(cudaStreamWaitEvent(first, back) == cudaSuccess);
  cudaGraph_t graph;
  REQUIRE(cudaStreamEndCapture(first, &graph) == cudaSuccess);
  CHECK(d.host()[0] == 1);
  cudaGraphExec_t exec;
  REQUIRE(cudaGraphInstantiate(&exec, graph) == cudaSuccess);
  CHECK(cudaGraphLaunch(exec, first) == cudaSuccess);
  CHECK(d.host()[0] == 2);
  CHECK(try_start("add_one", add_one, 1, 1, 0, second, d) == cudaSuccess);  // no longer captured
  CHECK(d.host()[0] == 3);
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
  cudaEventDestroy(event), cudaEventDestroy(back);
  cudaStreamDestroy(first), cudaStreamDestroy(second);
}

TEST_CASE("events measure the time between them") {
  cudaEvent_t start_event, end_event;
  cudaEventCreate(&start_event), cudaEventCreate(&end_event);
  float ms = -1;
  CHECK(cudaEventElapsedTime(&ms, start_event, end_event) == cudaErrorInvalidResourceHandle);
  cudaEventRecord(start_event);
  usleep(2000);
  cudaEventRecord(end_event);
  CHECK(cudaEventElapsedTime(&ms, start_event, end_event) == cudaSuccess);
  CHECK(ms >= 2);
  CHECK(ms < 2000);
  cudaEventDestroy(start_event), cudaEventDestroy(end_event);
  cudaGetLastError();
}

// =============================================================================================
// cuBLASLt, column-major, against plain loops. The inputs are small multiples of 1/32, so that sums
// are exact and only the epilogues and the rounding to bf16 of D need a tolerance.

namespace {

struct ProductTest {
  int m = 21, n = 19, k = 37, batch = 1;
  bool ta = false, tb = false;
  cudaDataType_t in = CUDA_R_32F, out = CUDA_R_32F;
  float alpha = 1, beta = 0;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  int algorithm = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
};

// Memory of either type.
class Values {
 public:
  Values(cudaDataType_t type, const std::vector<float>& host) : type_(type), n_(host.size()) {
    REQUIRE(cudaMalloc(&p_, bytes()) == cudaSuccess);
    const std::vector<bf16> narrow(host.begin(), host.end());
    const void* from = type == CUDA_R_32F ? static_cast<const void*>(host.data()) : narrow.data();
    REQUIRE(cudaMemcpy(p_, from, bytes(), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  ~Values() { cudaFree(p_); }
  void* get() const { return p_; }
  std::vector<float> host() const {
    std::vector<float> wide(n_);
    std::vector<bf16> narrow(n_);
    void* to = type_ == CUDA_R_32F ? static_cast<void*>(wide.data()) : narrow.data();
    REQUIRE(cudaMemcpy(to, p_, bytes(), cudaMemcpyDeviceToHost) == cudaSuccess);
    if (type_ != CUDA_R_32F) std::copy(narrow.begin(), narrow.end(), wide.begin());
    return wide;
  }

 private:
  size_t bytes() const { return n_ * (type_ == CUDA_R_32F ? 4 : 2); }
  cudaDataType_t type_;
  size_t n_;
  char* p_ = nullptr;
};

void check_product(const ProductTest& t) {
  CAPTURE(t.ta);
  CAPTURE(t.tb);
  CAPTURE(int(t.epilogue));
  // Leading dimensions larger than the rows, batches further apart than the matrices.
  const int a_rows = t.ta ? t.k : t.m, a_cols = t.ta ? t.m : t.k;
  const int b_rows = t.tb ? t.n : t.k, b_cols = t.tb ? t.k : t.n;
  const int lda = a_rows + 3, ldb = b_rows + 1, ldd = t.m + 2, ldx = (t.m + 7) / 8 * 8;
  const int64_t sa = int64_t(lda) * a_cols + 5, sb = int64_t(ldb) * b_cols,
                sd = int64_t(ldd) * t.n + 1;
  const auto a = small_numbers(size_t(sa * t.batch), 11),
             b = small_numbers(size_t(sb * t.batch), 12);
  const auto c = small_numbers(size_t(sd * t.batch), 13),
             bias = small_numbers(size_t(t.m + t.n), 14);
  const auto x = small_numbers(size_t(ldx * t.n), 15);
  const Values da(t.in, a), db(t.in, b), dd(t.out, c), dbias(t.out, bias), dx(t.out, x);

  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t la, lb, ld;
  REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
  REQUIRE(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    REQUIRE(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value) ==
            CUBLAS_STATUS_SUCCESS);
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, t.ta ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, t.tb ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, t.epilogue);
  set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, dbias.get());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, dx.get());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(ldx));
  const auto layout = [&](cublasLtMatrixLayout_t* l, cudaDataType_t type, int rows, int cols,
                          int ld_, int64_t stride) {
    REQUIRE(cublasLtMatrixLayoutCreate(l, type, uint64_t(rows), uint64_t(cols), ld_) ==
            CUBLAS_STATUS_SUCCESS);
    cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &t.batch, sizeof(int));
    cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                     sizeof stride);
  };
  layout(&la, t.in, a_rows, a_cols, lda, sa);
  layout(&lb, t.in, b_rows, b_cols, ldb, sb);
  layout(&ld, t.out, t.m, t.n, ldd, sd);
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulPreferenceCreate(&preference);
  const size_t workspace_bytes = 1 << 20;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                       &workspace_bytes, sizeof workspace_bytes);
  const uint32_t reductions = t.reductions;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                       &reductions, sizeof reductions);
  cublasLtMatmulHeuristicResult_t results[8];
  int found = 0;
  REQUIRE(cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, ld, ld, preference, 8, results,
                                         &found) == CUBLAS_STATUS_SUCCESS);
  REQUIRE(found > t.algorithm);
  const Device<char> workspace(workspace_bytes);
  REQUIRE(cublasLtMatmul(handle, desc, &t.alpha, da.get(), la, db.get(), lb, &t.beta, dd.get(), ld,
                         dd.get(), ld, &results[t.algorithm].algo, workspace, workspace_bytes,
                         nullptr) == CUBLAS_STATUS_SUCCESS);
  if (results[t.algorithm].workspaceSize > 0) {
    CHECK(cublasLtMatmul(handle, desc, &t.alpha, da.get(), la, db.get(), lb, &t.beta, dd.get(), ld,
                         dd.get(), ld, &results[t.algorithm].algo, workspace,
                         results[t.algorithm].workspaceSize - 1,
                         nullptr) == CUBLAS_STATUS_INVALID_VALUE);
  }

  const auto d = dd.host(), new_x = dx.host(), new_bias = dbias.host();
  // Rounding to the 8 bits of a bf16 errs by at most 2^-8 of the value; tanhf in fp32 by 1e-7.
  const double tolerance = t.out == CUDA_R_32F ? 1e-5 : 1. / 256;
  const auto close = [&](double found_value, double expected, double scale = 0) {
    return std::abs(found_value - expected) <=
           tolerance * (1e-2 + std::abs(expected)) + 1e-6 * scale;
  };
  const auto bits = [&](unsigned mask) { return (unsigned(t.epilogue) & mask) != 0; };
  const auto gelu = [](double v) {
    return .5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + .044715 * v * v * v)));
  };
  const auto op_a = [&](int g, int i, int p) {
    return double(a[size_t(g * sa + (t.ta ? p + i * lda : i + p * lda))]);
  };
  const auto op_b = [&](int g, int p, int j) {
    return double(b[size_t(g * sb + (t.tb ? j + p * ldb : p + j * ldb))]);
  };
  std::vector<double> row_sums(size_t(t.m), 0.);
  for (int g = 0; g < t.batch; g++) {
    for (int j = 0; j < t.n; j++) {
      for (int i = 0; i < t.m; i++) {
        double sum = 0;
        for (int p = 0; p < t.k; p++) sum += op_a(g, i, p) * op_b(g, p, j);
        const size_t at = size_t(g * sd + j * ldd + i), at_x = size_t(j * ldx + i);
        sum = t.alpha * sum + t.beta * c[at];
        if (bits(4)) sum += bias[size_t(i)];
        if (t.epilogue == CUBLASLT_EPILOGUE_GELU_AUX ||
            t.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
          REQUIRE(close(new_x[at_x], sum));
        } else {
          REQUIRE(new_x[at_x] == x[at_x]);
        }
        const double before = std::abs(sum);  // where 1 + tanh cancels, the error is of this size
        if (bits(32)) sum = gelu(sum);
        if (bits(64)) sum *= (gelu(x[at_x] + 1e-6) - gelu(x[at_x] - 1e-6)) / 2e-6;
        row_sums[size_t(i)] += sum;
        REQUIRE(close(d[at], sum, before));
      }
      for (int i = t.m; i < ldd; i++) {  // between the columns nothing changes
        REQUIRE(d[size_t(g * sd + j * ldd + i)] == c[size_t(g * sd + j * ldd + i)]);
      }
    }
  }
  for (int i = 0; i < t.m + t.n; i++) {
    double expected = bias[size_t(i)];
    if (t.epilogue == CUBLASLT_EPILOGUE_BGRADA && i < t.m) {
      expected = 0;
      for (int p = 0; p < t.k; p++) expected += op_a(0, i, p);
    } else if (t.epilogue == CUBLASLT_EPILOGUE_BGRADB && i < t.n) {
      expected = 0;
      for (int p = 0; p < t.k; p++) expected += op_b(0, p, i);
    } else if (t.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD && i < t.m) {
      // Sums of mixed sign: the error is that of the terms.
      REQUIRE(std::abs(new_bias[size_t(i)] - row_sums[size_t(i)]) < 1e-3 + tolerance * 200);
      continue;
    }
    REQUIRE(close(new_bias[size_t(i)], expected));
  }
  cublasLtMatmulPreferenceDestroy(preference);
  for (auto* l : {la, lb, ld}) cublasLtMatrixLayoutDestroy(l);
  cublasLtMatmulDescDestroy(desc);
  cublasLtDestroy(handle);
}

}  // namespace

TEST_CASE("cublasLtMatmul: transposes, types, alpha, beta, batches") {
  for (bool ta : {false, true}) {
    for (bool tb : {false, true}) {
      ProductTest t;
      t.ta = ta, t.tb = tb;
      check_product(t);
      t.alpha = -.5f, t.beta = 2;
      t.in = CUDA_R_16BF;
      check_product(t);
      t.out = CUDA_R_16BF;
      check_product(t);
      t.batch = 3;
      check_product(t);
    }
  }
  ProductTest large;  // takes the parallel path
  large.m = 130, large.n = 75, large.k = 64;
  check_product(large);
}

TEST_CASE("cublasLtMatmul: epilogues with bias, GELU and their gradients") {
  for (cublasLtEpilogue_t epilogue :
       {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS,
        CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
        CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
    for (bool ta : {false, true}) {
      for (bool tb : {false, true}) {
        ProductTest t;
        t.epilogue = epilogue, t.ta = ta, t.tb = tb;
        t.alpha = .125f;
        check_product(t);
        t.in = t.out = CUDA_R_16BF;
        check_product(t);
      }
    }
  }
}

TEST_CASE("cublasLtMatmul: every algorithm that is offered, and its workspace") {
  for (int algorithm = 0; algorithm < 3; algorithm++) {
    ProductTest t;
    t.algorithm = algorithm;
    check_product(t);
  }
}

TEST_CASE("cublasLtMatmul: sums may be rounded to bf16 before they are whole, where allowed") {
  ProductTest t;
  const int64_t before = rounded_reductions();
  check_product(t);
  t.in = t.out = CUDA_R_16BF;
  check_product(t);
  CHECK(rounded_reductions() == before);
  t.reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
  check_product(t);
  CHECK(rounded_reductions() == before + 1);
}

TEST_CASE("cublasLtMatmul: an operand that leaves its allocation is reported") {
  CHECK_REPORT(report_of([] {
                 cublasLtHandle_t handle;
                 cublasLtMatmulDesc_t desc;
                 cublasLtMatrixLayout_t layout;
                 cublasLtCreate(&handle);
                 cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
                 cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, 8, 8, 8);
                 const Device<float> a(64), b(63), d(64);
                 const float one = 1, zero = 0;
                 cublasLtMatmul(handle, desc, &one, a, layout, b, layout, &zero, d, layout, d,
                                layout, nullptr, nullptr, 0, nullptr);
               }),
               "B, (8, 8) with leading dimension 8, batch 1, 256 bytes at");
}
