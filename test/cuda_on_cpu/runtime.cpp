// CUDA on the CPU: what launches, threads, memory, streams and products are, without a GPU.
//
// A launch runs its blocks one after the other on each of a few OS threads. Within a block every
// CUDA thread has a stack of its own (a fiber) and runs until it must wait for others, at a barrier
// or in an operation of its warp. There it hands the processor to another thread that can go on, by
// a switch of stacks. The last thread to arrive does the work of an operation for the whole warp,
// so that mma.sync is one small matrix product, not 32 lanes' share of it.
//
// What a GPU would leave to chance is made visible: device and shared memory begin as NaN, each
// allocation ends at a page that cannot be touched, copies by cp.async land as late as they may,
// and the order of threads can be chosen. A thread that does what CUDA does not allow ends the
// process with a message of who, where and what.
//
//   1. settings      5. operations of a warp
//   2. reports       6. launches, streams, events, graphs
//   3. memory        7. the runtime's calls
//   4. fibers        8. cuBLASLt
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "control.h"
#include "device.h"
#include "include/cublasLt.h"

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif
#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace cuda_on_cpu {

constinit thread_local Thread* self = nullptr;
constinit thread_local unsigned char* block_shared_memory = nullptr;
constinit thread_local bool writes_are_checked = false;

namespace {

constexpr size_t kMaxShared = 227 << 10, kDefaultShared = 48 << 10;  // bytes a block, sm_90
constexpr int kMaxThreads = 1024, kMaxWarps = 32;
constexpr int kPoison = 0xff;  // the bytes of a NaN, as float and as bf16; -1 as an integer

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}
size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// =============================================================================================
// 1. Settings

struct Settings {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 1;
  int workers = 0;
  int device_count = 1, major = 9, minor = 0, multiprocessors = 4, driver = CUDART_VERSION;
  size_t memory = size_t(16) << 30;
  int malloc_until_failure = -1, launches_until_failure = -1;  // -1: none fails
  bool write_checks = false;

  Settings() {
    const char* writes = std::getenv("CUDA_ON_CPU_WRITES");
    write_checks = writes && !std::strcmp(writes, "1");
    const char* text = std::getenv("CUDA_ON_CPU_SCHEDULE");
    if (!text || !*text || !std::strcmp(text, "forward")) return;
    if (!std::strcmp(text, "reverse")) {
      schedule = Schedule::reverse;
    } else if (!std::strncmp(text, "random", 6) && (text[6] == ':' || !text[6])) {
      schedule = Schedule::random;
      if (text[6]) seed = std::strtoull(text + 7, nullptr, 10);
    } else {
      std::fprintf(
          stderr,
          "error: CUDA_ON_CPU_SCHEDULE: found \"%s\", expected forward, reverse, random or "
          "random:SEED\n",
          text);
      std::exit(1);
    }
  }
};
Settings& settings() {
  static Settings s;
  return s;
}

// Counts down to a failure that a test asked for.
bool fails_now(int& until) {
  if (until < 0) return false;
  return until-- == 0;
}

thread_local const char* next_launch = nullptr;
thread_local cudaError_t last_error = cudaSuccess;
std::atomic<int64_t> launches{0}, host_copies{0}, reductions_rounded{0};

cudaError_t result(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

int worker_count() {
  if (settings().workers > 0) return settings().workers;
  static const int cores = int(std::clamp(std::thread::hardware_concurrency(), 1u, 16u));
  return cores;
}

// OS threads that sleep until there is work. Nothing waits for those that wake up too late: on
// a busy machine OpenMP's threads, which wait for one another by spinning, took nine tenths of the
// time.
class Workers {
 public:
  // Calls `work` here, and at the same time on at most `others` threads; returns when all are out.
  void run(int others, const std::function<void()>& work) {
    std::unique_lock lock(mutex_);
    if (work_ || others <= 0) {  // another host thread launches
      lock.unlock();
      return work();
    }
    for (; threads_ < others; threads_++) std::thread([this] { serve(); }).detach();
    work_ = &work, wanted_ = others;
    lock.unlock();
    wake_.notify_all();
    work();
    lock.lock();
    wanted_ = 0;
    idle_.wait(lock, [this] { return active_ == 0; });
    work_ = nullptr;
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      wanted_--, active_++;
      const std::function<void()>& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--active_ == 0) idle_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void()>* work_ = nullptr;
  int threads_ = 0, wanted_ = 0, active_ = 0;
};
Workers& workers() {
  static auto* w = new Workers;  // never destroyed: its threads sleep in it
  return *w;
}

}  // namespace

void set_schedule(Schedule schedule, uint64_t seed) {
  settings().schedule = schedule;
  settings().seed = seed;
}
void set_workers(int workers) { settings().workers = workers; }
void set_write_checks(bool on) { settings().write_checks = on; }
void set_device_count(int count) { settings().device_count = count; }
void set_compute_capability(int major, int minor) {
  settings().major = major;
  settings().minor = minor;
}
void set_multiprocessors(int count) { settings().multiprocessors = count; }
void set_memory(size_t bytes) { settings().memory = bytes; }
void set_driver_version(int version) { settings().driver = version; }
void fail_next_malloc(int skip) { settings().malloc_until_failure = skip; }
void fail_next_launch(int skip) { settings().launches_until_failure = skip; }
void name_next_launch(const char* name) { next_launch = name; }
int64_t kernels_launched() { return launches; }
int64_t copies_with_host() { return host_copies; }
int64_t rounded_reductions() { return reductions_rounded; }

// =============================================================================================
// 2. Reports

namespace {

// What runs on this OS thread, for the reports: a kernel's name, or that of a call to the runtime.
thread_local const char* running = nullptr;

struct Label {
  char text[64];
};
Label label_of(const uint3& index) {
  Label label;
  std::snprintf(label.text, sizeof label.text, "(%u, %u, %u)", index.x, index.y, index.z);
  return label;
}

}  // namespace

void report(const char* format, ...) {
  static std::atomic_flag reporting = ATOMIC_FLAG_INIT;
  while (reporting.test_and_set()) pause();  // the first to report ends the process
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_cpu: ");
  if (self) {
    std::fprintf(stderr, "kernel %s, block %s, thread %s: ", running ? running : "(unnamed)",
                 label_of(blockIdx).text, label_of(threadIdx).text);
  } else if (running) {
    std::fprintf(stderr, "%s: ", running);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::abort();
}

// =============================================================================================
// 3. Memory. An allocation's last byte (rounded up to 16) is the last of its pages; around them are
// pages that nothing may touch. Freed addresses stay out of use for a while.

namespace {

constexpr size_t kGuard = 1 << 20;
constexpr size_t kFreedKept = 256;

struct Allocation {
  size_t bytes;        // asked for
  unsigned char* map;  // everything: guard, pages, guard
  size_t map_bytes;
};
struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> live;                // by address
  std::deque<std::pair<uintptr_t, Allocation>> freed;  // newest last
  std::map<uintptr_t, size_t> pinned;                  // host memory: address, bytes
  size_t in_use = 0;
  bool open = true;  // to the host: see set_host_checks
};
Memory& memory() {
  static auto* m = new Memory;  // never destroyed: other destructors may free
  return *m;
}

void protect(const Allocation& a, bool open) {
  mprotect(a.map + kGuard, a.map_bytes - 2 * kGuard, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

unsigned char* allocate(size_t bytes) {
  const size_t size = round_up(std::max<size_t>(bytes, 1), page_bytes());
  const size_t map_bytes = size + 2 * kGuard;
  void* map =
      mmap(nullptr, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  unsigned char* begin = static_cast<unsigned char*>(map) + kGuard;
  if (mprotect(begin, size, PROT_READ | PROT_WRITE) != 0) {
    munmap(map, map_bytes);
    return nullptr;
  }
  std::memset(begin, kPoison, size);
  unsigned char* pointer = begin + size - round_up(std::max<size_t>(bytes, 1), 16);
  const Allocation allocation{bytes, static_cast<unsigned char*>(map), map_bytes};
  memory().live[uintptr_t(pointer)] = allocation;
  memory().in_use += bytes;
  if (!memory().open) protect(allocation, false);
  return pointer;
}

bool all_poison(const unsigned char* from, const unsigned char* to) {
  return std::all_of(from, to, [](unsigned char byte) { return byte == kPoison; });
}

// The bytes around an allocation that no page protects must be as they were.
void check_margins(const unsigned char* pointer, const Allocation& a) {
  const unsigned char* begin = a.map + kGuard;
  const unsigned char* end = a.map + a.map_bytes - kGuard;
  if (!all_poison(begin, pointer)) {
    report("an allocation of %zu bytes was written to before its start", a.bytes);
  }
  if (!all_poison(pointer + std::max<size_t>(a.bytes, 1), end) && a.bytes > 0) {
    report("an allocation of %zu bytes was written to past its end", a.bytes);
  }
}

// True when all of [pointer, pointer + bytes) is in one allocation.
bool on_device(const void* pointer, size_t bytes) {
  std::lock_guard lock(memory().mutex);
  auto it = memory().live.upper_bound(uintptr_t(pointer));
  if (it == memory().live.begin()) return false;
  --it;
  return uintptr_t(pointer) + bytes <= it->first + it->second.bytes;
}

// "8 bytes past the end of an allocation of 400 bytes", or nothing known: "".
std::string describe(uintptr_t address) {
  char text[160] = "";
  Memory& m = memory();
  if (!m.mutex.try_lock()) return text;
  const auto near = [&](uintptr_t start, const Allocation& a, const char* kind) {
    if (address < uintptr_t(a.map) || address >= uintptr_t(a.map) + a.map_bytes) return false;
    if (address >= start + a.bytes) {
      std::snprintf(text, sizeof text, "%zu bytes past the end of %s of %zu bytes",
                    size_t(address - start - a.bytes), kind, a.bytes);
    } else if (address < start) {
      std::snprintf(text, sizeof text, "%zu bytes before %s of %zu bytes", size_t(start - address),
                    kind, a.bytes);
    } else {
      std::snprintf(text, sizeof text, "byte %zu of %s of %zu bytes", size_t(address - start), kind,
                    a.bytes);
    }
    return true;
  };
  bool found = false;
  for (const auto& [start, a] : m.live) found = found || near(start, a, "an allocation");
  for (auto it = m.freed.rbegin(); it != m.freed.rend() && !found; ++it) {
    found = near(it->first, it->second, "a freed allocation");
  }
  m.mutex.unlock();
  return text;
}

}  // namespace

size_t memory_in_use() {
  std::lock_guard lock(memory().mutex);
  return memory().in_use;
}

void check_argument(int number, const void* pointer) {
  if (!pointer) return;
  Memory& m = memory();
  const uintptr_t address = uintptr_t(pointer);
  {
    std::lock_guard lock(m.mutex);
    // A pointer past an end, or to freed memory, is reported if it is followed.
    const auto in_map = [&](const auto& item) {
      const Allocation& a = item.second;
      return address >= uintptr_t(a.map) && address < uintptr_t(a.map) + a.map_bytes;
    };
    if (std::any_of(m.live.begin(), m.live.end(), in_map)) return;
    if (std::any_of(m.freed.begin(), m.freed.end(), in_map)) return;
    for (const auto& [start, bytes] : m.pinned) {
      if (address >= start && address <= start + bytes) return;
    }
  }
  running = next_launch ? next_launch : "(unnamed)";
  report("kernel argument %d, %p, is neither in device memory nor in pinned host memory", number,
         pointer);
}

namespace {

// While host checks are on, device memory is open only to work of the device.
class OpenMemory {
 public:
  OpenMemory() : closed_(!memory().open) { set(true); }
  ~OpenMemory() { set(false); }

 private:
  void set(bool open) {
    if (!closed_) return;
    Memory& m = memory();
    std::lock_guard lock(m.mutex);
    m.open = open;
    for (const auto& [start, a] : m.live) protect(a, open);
  }
  bool closed_;
};

}  // namespace

// ---------------------------------------------------------------------------------------------
// Which block wrote what, for set_write_checks. While a launch runs, all of device memory is
// read-only. A block's first write to a page faults; the page is copied and opened. When the block
// has ended, the bytes that differ from the copy are those that it wrote.

namespace {

class WriteRecord {
 public:
  explicit WriteRecord(dim3 grid) : grid_(grid) {
    std::lock_guard lock(memory().mutex);
    for (const auto& [start, a] : memory().live) {
      const Range range{uintptr_t(a.map) + kGuard, uintptr_t(a.map) + a.map_bytes - kGuard};
      ranges_.push_back(range);
      protect(range.begin, range.end - range.begin, PROT_READ);
    }
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
  }
  ~WriteRecord() {
    for (const Range& r : ranges_) protect(r.begin, r.end - r.begin, PROT_READ | PROT_WRITE);
  }
  WriteRecord(const WriteRecord&) = delete;
  WriteRecord& operator=(const WriteRecord&) = delete;

  // The page of `address`, for writing; false: it is not device memory, or open already.
  bool open(uintptr_t address) {
    if (!contains(address)) return false;
    const uintptr_t begin = address / page_bytes() * page_bytes();
    Page& page = pages_[begin];
    if (page.is_open) return false;
    const auto* bytes = reinterpret_cast<const unsigned char*>(begin);
    page.before.assign(bytes, bytes + page_bytes());
    page.writer.resize(page_bytes(), kNobody);
    page.is_open = true;
    open_.push_back(begin);
    protect(begin, page_bytes(), PROT_READ | PROT_WRITE);
    return true;
  }
  void note_atomic(uintptr_t address, size_t bytes) {
    for (uintptr_t a = address; a < address + bytes; a++)
      if (contains(a)) atomics_.push_back(a);
  }
  // Of the block that ran last
  void end_block(size_t block) {
    const auto own = uint32_t(block + 1);
    for (const uintptr_t address : atomics_) {
      const uintptr_t begin = address / page_bytes() * page_bytes();
      const auto found = pages_.find(begin);
      if (found == pages_.end()) continue;  // it failed: nothing was written
      Page& page = found->second;
      const size_t i = address - begin;
      uint32_t& writer = page.writer[i];
      if (writer != kNobody && writer != kAtomics && writer != own) {
        report("blocks %s and %s both write %s, the first of them not by an atomic",
               label(writer).text, label(own).text, describe(address).c_str());
      }
      writer = kAtomics;
      page.before[i] = *reinterpret_cast<const unsigned char*>(address);
    }
    atomics_.clear();
    for (const uintptr_t begin : open_) {
      Page& page = pages_[begin];
      const auto* now = reinterpret_cast<const unsigned char*>(begin);
      for (size_t i = 0; i < page_bytes(); i++) {
        if (now[i] == page.before[i]) continue;
        uint32_t& writer = page.writer[i];
        if (writer == kAtomics) {
          report("block %s writes %s, and others do so by atomics", label(own).text,
                 describe(begin + i).c_str());
        }
        if (writer != kNobody && writer != own) {
          report("blocks %s and %s both write %s", label(writer).text, label(own).text,
                 describe(begin + i).c_str());
        }
        writer = own;
      }
      page.is_open = false;
      protect(begin, page_bytes(), PROT_READ);
    }
    open_.clear();
  }

 private:
  static constexpr uint32_t kNobody = 0, kAtomics = ~0u;  // else a block's number + 1
  struct Range {
    uintptr_t begin, end;
  };
  struct Page {
    std::vector<unsigned char> before;  // the block that runs
    std::vector<uint32_t> writer;       // of each byte
    bool is_open = false;
  };

  static void protect(uintptr_t begin, size_t bytes, int protection) {
    mprotect(reinterpret_cast<void*>(begin), bytes, protection);
  }
  bool contains(uintptr_t address) const {
    const auto after =
        std::upper_bound(ranges_.begin(), ranges_.end(), address,
                         [](uintptr_t a, const Range& range) { return a < range.begin; });
    return after != ranges_.begin() && address < std::prev(after)->end;
  }
  Label label(uint32_t writer) const {
    const unsigned number = writer - 1;
    return label_of({number % grid_.x, number / grid_.x % grid_.y, number / grid_.x / grid_.y});
  }

  dim3 grid_;
  std::vector<Range> ranges_;  // device memory, by address
  std::unordered_map<uintptr_t, Page> pages_;
  std::vector<uintptr_t> open_, atomics_;  // of the block that runs
};
thread_local WriteRecord* write_record = nullptr;  // of the launch that runs

}  // namespace

void note_atomic(const void* address, size_t bytes) {
  write_record->note_atomic(uintptr_t(address), bytes);
}

// =============================================================================================
// 4. Fibers

namespace {

extern "C" void cuda_on_cpu_switch(void** save, void* load);

// Saves the registers that a call preserves and the stack pointer to *save; takes them from `load`.
// It ends in a jump: a return would be predicted to go where this stack's caller is. For the same
// reason those who wait call it last, so that the compiler makes it a jump from there too.
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
constexpr size_t kSavedWords = 8, kReturnWord = 6;  // six registers, the return address, alignment
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
constexpr size_t kSavedWords = 20, kReturnWord = 11;
#else
#error "cuda_on_cpu switches stacks on x86-64 and aarch64"
#endif

#ifdef CUDA_ON_CPU_ASAN
constexpr size_t kStackBytes = 256 << 10;  // the sanitizer's frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// A stack, and where it was left. It runs one CUDA thread after another, and waits idle in between.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of the stack, for the sanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// ---------------------------------------------------------------------------------------------
// Operations that threads wait in

const char* name_of(Operation operation) {
  static const char* const names[] = {
      "__shfl_sync",       "__shfl_xor_sync",   "__shfl_up_sync",    "__shfl_down_sync",
      "__ballot_sync",     "__any_sync",        "__all_sync",        "__match_any_sync",
      "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync", "__syncwarp",
      "ldmatrix_x4",       "ldmatrix_x4_trans", "mma_m16n8k16",      "__syncthreads"};
  return names[int(operation)];
}

// Copies by cp.async on their way: groups of copies, the oldest first.
struct CopyQueue {
  struct Copy {
    unsigned char* to;
    alignas(16) unsigned char bytes[16];
  };
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;  // in copies
  size_t landed_groups = 0, landed_copies = 0;

  void clear() {
    copies.clear();
    group_ends.clear();
    landed_groups = landed_copies = 0;
  }
  void land_until(size_t groups_left) {
    while (group_ends.size() - landed_groups > groups_left) {
      const size_t end = group_ends[landed_groups++];
      for (; landed_copies < end; landed_copies++) {
        std::memcpy(copies[landed_copies].to, copies[landed_copies].bytes, 16);
      }
    }
    if (landed_copies == copies.size() && landed_groups == group_ends.size()) clear();
  }
};

struct Running : Thread {
  Fiber* fiber = nullptr;  // once it has started
  CopyQueue copies;
};
// What a lane waits in.
struct Lane {
  void* arguments;
  const char* file;
  int line;
  uint32_t mask;
  Operation operation;

  Where where() const { return {file, line}; }
};
struct Warp {
  uint32_t exists = 0, alive = 0, ready = 0, waiting = 0;  // bits of lanes
  Lane lanes[32];
};

void complete(Operation operation, uint32_t mask, const Lane (&lanes)[32]);

bool same_place(const Where& a, const Where& b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}
const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

struct Launch {
  std::string name;
  dim3 grid, size;
  size_t shared_bytes;
  std::function<void()> thread;

  size_t blocks() const { return size_t(grid.x) * grid.y * grid.z; }
  int threads() const { return int(size.x * size.y * size.z); }
};

// ---------------------------------------------------------------------------------------------
// What one OS thread needs to run blocks: the state of the block's threads, stacks, shared memory.

class Processor {
 public:
  Processor();
  ~Processor();
  void begin(const Launch& launch);  // before its blocks
  void run_block(size_t number);

  void arrive_at_barrier(Where where);
  void arrive(Operation operation, uint32_t mask, void* arguments, Where where);
  Running& current() { return *static_cast<Running*>(self); }
  bool in_shared(const unsigned char* p, size_t bytes) const {
    return p >= shared_ && p + bytes <= shared_ + launch_->shared_bytes;
  }
  bool in_stack_guard(uintptr_t address) const;
  std::string describe_shared(uintptr_t address) const;

 private:
  [[noreturn]] static void fiber_main();
  Fiber* idle_fiber();
  void finish(Running& thread);
  Running* next();
  void give_way();
  int choose(uint32_t set);
  void block_thread(const Running& thread) {
    Warp& warp = warps_[thread.warp];
    warp.ready &= ~(1u << thread.lane);
    if (!warp.ready) ready_warps_ &= ~(1u << thread.warp);
  }
  static void enter(Running& thread) {
    self = &thread;
    threadIdx = thread.index;
  }
  Running& thread(int warp, int lane) { return threads_[size_t(32 * warp + lane)]; }
  [[noreturn, gnu::cold]] void report_deadlock();
  [[noreturn, gnu::cold]] void report_barrier(Where where);
  [[noreturn, gnu::cold]] void report_mask(Operation operation, uint32_t mask, Where where);
  [[noreturn, gnu::cold]] void report_source(Operation, uint32_t mask, int source, Where where);
  [[noreturn, gnu::cold]] void report_divergence(Operation, uint32_t mask, Where where, int lane);
  void check_shared_margins();

  const Launch* launch_ = nullptr;
  unsigned char* shared_ = nullptr;
  int thread_count_ = 0, warp_count_ = 0;
  std::vector<Running> threads_;
  Warp warps_[kMaxWarps];
  uint32_t ready_warps_ = 0;
  int alive_ = 0, at_barrier_ = 0;
  const Running* first_at_barrier_ = nullptr;
  Where barrier_{};  // where it waits
  Schedule schedule_ = Schedule::forward;
  uint64_t random_ = 1;

  Fiber main_, *fiber_ = nullptr;  // fiber_: the one that runs
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  unsigned char* stacks_;

  unsigned char *shared_map_, *shared_end_;
  size_t shared_pages_ = 0;  // bytes of pages that may be touched, before shared_end_
};
thread_local Processor* processor = nullptr;

Processor::Processor() : threads_(kMaxThreads) {
  const auto map = [](size_t bytes, int protection) {
    void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) report("cannot map %zu bytes", bytes);
    return static_cast<unsigned char*>(p);
  };
  stacks_ = map(kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE);
  const size_t shared = round_up(kMaxShared + 256, page_bytes());
  shared_map_ = map(shared + 2 * kGuard, PROT_NONE);
  shared_end_ = shared_map_ + kGuard + shared;
}

Processor::~Processor() {
  munmap(stacks_, kStackBytes * kMaxThreads);
  munmap(shared_map_, size_t(shared_end_ - shared_map_) + kGuard);
}

// Stacks begin at different offsets from a page, or the lanes' frames would all share a few sets of
// the cache.
Fiber* Processor::idle_fiber() {
  if (!idle_.empty()) {
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }
  const size_t i = fibers_.size();
  fibers_.push_back(std::make_unique<Fiber>());
  Fiber* fiber = fibers_.back().get();
  unsigned char* stack = stacks_ + i * kStackBytes;
  mprotect(stack, page_bytes(), PROT_NONE);
  fiber->bottom = stack + page_bytes();
  fiber->bytes = kStackBytes - page_bytes();
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes - i % 32 * 128);
  uintptr_t* saved = top - kSavedWords;
  std::fill(saved, top, 0);
  saved[kReturnWord] = reinterpret_cast<uintptr_t>(&fiber_main);
  fiber->stack_pointer = saved;
  return fiber;
}

void Processor::begin(const Launch& launch) {
  launch_ = &launch;
  schedule_ = settings().schedule;
  thread_count_ = launch.threads();
  warp_count_ = (thread_count_ + 31) / 32;
  for (int i = 0; i < thread_count_; i++) {
    Running& t = threads_[size_t(i)];
    const unsigned u = unsigned(i);
    t.index = {u % launch.size.x, u / launch.size.x % launch.size.y,
               u / (launch.size.x * launch.size.y)};
    t.lane = i % 32, t.warp = i / 32;
  }
  blockDim = launch.size, gridDim = launch.grid;

  // Shared memory ends at the guard, but for the 128-byte alignment of its start.
  shared_ = shared_end_ - round_up(launch.shared_bytes, 128);
  const size_t pages = round_up(launch.shared_bytes, page_bytes());
  if (pages != shared_pages_) {
    mprotect(shared_map_, size_t(shared_end_ - shared_map_), PROT_NONE);
    mprotect(shared_end_ - pages, pages, PROT_READ | PROT_WRITE);
    shared_pages_ = pages;
  }
  std::memset(shared_end_ - pages, kPoison, pages);
}

void Processor::run_block(size_t number) {
  const dim3& grid = launch_->grid;
  blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
              unsigned(number / grid.x / grid.y)};
  std::memset(shared_, kPoison, launch_->shared_bytes);
  for (int w = 0; w < warp_count_; w++) {
    const int lanes = std::min(32, thread_count_ - 32 * w);
    Warp& warp = warps_[w];
    warp.exists = warp.alive = warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.waiting = 0;
  }
  ready_warps_ = warp_count_ == 32 ? ~0u : (1u << warp_count_) - 1;
  alive_ = thread_count_, at_barrier_ = 0;
  random_ = (settings().seed + number + 1) * 0x9e3779b97f4a7c15u;

  block_shared_memory = shared_;
  Running* first = next();
  fiber_ = first->fiber = idle_fiber();
  enter(*first);
  switch_fiber(main_, *fiber_);
  self = nullptr;
  check_shared_margins();
}

// A fiber's life: run a thread to its end, then the next that has not started, on the same stack;
// where all have, hand over to one of them and stay idle until given a thread again.
void Processor::fiber_main() {
  Processor& p = *processor;
#ifdef CUDA_ON_CPU_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!p.main_.bottom) p.main_.bottom = bottom, p.main_.bytes = bytes;  // main starts the first
#endif
  for (;;) {
    Running& thread = p.current();
    Fiber& fiber = *p.fiber_;
    p.launch_->thread();
    p.finish(thread);
    if (p.alive_ > 0) {
      Running* next = p.next();
      enter(*next);
      if (!next->fiber) {
        next->fiber = &fiber;
        continue;
      }
      p.fiber_ = next->fiber;
    }
    p.idle_.push_back(&fiber);
    switch_fiber(fiber, p.alive_ > 0 ? *p.fiber_ : p.main_);
  }
}

int Processor::choose(uint32_t set) {
  if (schedule_ == Schedule::forward) return std::countr_zero(set);
  if (schedule_ == Schedule::reverse) return 31 - std::countl_zero(set);
  random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
  const int turn = int(random_ >> 59);
  return (std::countr_zero(std::rotr(set, turn)) + turn) % 32;
}

Running* Processor::next() {
  if (!ready_warps_) report_deadlock();
  const int w = choose(ready_warps_);
  return &thread(w, choose(warps_[w].ready));
}

// The current thread lets others run; returns when it is chosen again.
void Processor::give_way() {
  Running* to = next();
  if (to == self) return;
  Fiber& from = *fiber_;
  if (!to->fiber) to->fiber = idle_fiber();
  enter(*to);
  fiber_ = to->fiber;
  switch_fiber(from, *to->fiber);
}

void Processor::finish(Running& t) {
  Warp& warp = warps_[t.warp];
  if (at_barrier_ > 0) {
    report("divergent barrier: this thread exits, and thread %s waits in __syncthreads at %s:%d",
           label_of(first_at_barrier_->index).text, base_name(barrier_.file), barrier_.line);
  }
  for (uint32_t waiting = warp.waiting; waiting; waiting &= waiting - 1) {
    const int lane = std::countr_zero(waiting);
    const Lane& other = warp.lanes[lane];
    if (other.mask >> t.lane & 1) {
      report("lane %d exits, and lane %d waits for it in %s at %s:%d", t.lane, lane,
             name_of(other.operation), base_name(other.file), other.line);
    }
  }
  block_thread(t);
  warp.alive &= ~(1u << t.lane);
  alive_--;
  t.fiber = nullptr;
  t.copies.clear();
}

void Processor::arrive_at_barrier(Where where) {
  Running& me = current();
  if (alive_ < thread_count_ || (at_barrier_ > 0 && !same_place(where, barrier_))) {
    report_barrier(where);
  }
  if (at_barrier_++ == 0) first_at_barrier_ = &me, barrier_ = where;
  block_thread(me);
  if (at_barrier_ == thread_count_) {
    at_barrier_ = 0;
    for (int w = 0; w < warp_count_; w++) warps_[w].ready = warps_[w].alive;
    ready_warps_ = warp_count_ == 32 ? ~0u : (1u << warp_count_) - 1;
  }
  give_way();
}

void Processor::report_barrier(Where where) {
  for (int i = 0; i < thread_count_; i++) {
    if (warps_[i / 32].alive >> i % 32 & 1) continue;
    report("divergent barrier: __syncthreads at %s:%d, but thread %s has exited",
           base_name(where.file), where.line, label_of(threads_[size_t(i)].index).text);
  }
  report("divergent barrier: __syncthreads at %s:%d, but thread %s waits in another at %s:%d",
         base_name(where.file), where.line, label_of(first_at_barrier_->index).text,
         base_name(barrier_.file), barrier_.line);
}

void Processor::arrive(Operation operation, uint32_t mask, void* arguments, Where where) {
  Running& me = current();
  Warp& warp = warps_[me.warp];
  const uint32_t bit = 1u << me.lane;
  if (!(mask & bit) || (mask & ~warp.alive)) report_mask(operation, mask, where);
  if (operation <= Operation::shfl_down &&
      !(mask >> static_cast<Exchange*>(arguments)->source & 1)) {
    report_source(operation, mask, static_cast<Exchange*>(arguments)->source, where);
  }
  if (const uint32_t others = warp.waiting & mask) {
    const int other = std::countr_zero(others);
    const Lane& lane = warp.lanes[other];
    const bool aligned = operation >= Operation::ldmatrix;  // one instruction for the whole warp
    if (lane.operation != operation || lane.mask != mask ||
        (aligned && !same_place(where, lane.where()))) {
      report_divergence(operation, mask, where, other);
    }
  }
  warp.lanes[me.lane] = {arguments, where.file, where.line, mask, operation};
  warp.waiting |= bit;
  if ((warp.waiting & mask) == mask) {
    complete(operation, mask, warp.lanes);
    warp.waiting &= ~mask;
    warp.ready |= mask;
  } else {
    block_thread(me);
  }
  give_way();
}

void Processor::report_mask(Operation operation, uint32_t mask, Where where) {
  const Warp& warp = warps_[current().warp];
  if (!(mask >> current().lane & 1)) {
    report("%s at %s:%d: the mask 0x%08x does not name lane %d, which calls", name_of(operation),
           base_name(where.file), where.line, mask, current().lane);
  }
  const int lane = std::countr_zero(mask & ~warp.alive);
  report("%s at %s:%d: the mask 0x%08x names lane %d, which %s", name_of(operation),
         base_name(where.file), where.line, mask, lane,
         warp.exists >> lane & 1 ? "has exited" : "this warp does not have");
}

void Processor::report_source(Operation operation, uint32_t mask, int source, Where where) {
  report("%s at %s:%d: reads lane %d, which the mask 0x%08x does not name", name_of(operation),
         base_name(where.file), where.line, source, mask);
}

void Processor::report_divergence(Operation operation, uint32_t mask, Where where, int lane) {
  const Warp& warp = warps_[current().warp];
  const Lane& other = warp.lanes[lane];
  report(
      "divergent warp: %s, mask 0x%08x, at %s:%d, but lane %d waits in %s, mask 0x%08x, at %s:%d",
      name_of(operation), mask, base_name(where.file), where.line, lane, name_of(other.operation),
      other.mask, base_name(other.file), other.line);
}

void Processor::report_deadlock() {
  // Threads by what they wait in, with the first of each.
  struct Group {
    Operation operation;
    Where where;
    int first, count;
  };
  std::vector<Group> groups;
  for (int i = 0; i < thread_count_; i++) {
    const Warp& warp = warps_[i / 32];
    const Lane& lane = warp.lanes[i % 32];
    if (!(warp.alive >> i % 32 & 1)) continue;
    const bool in_warp = warp.waiting >> i % 32 & 1;
    const Group here{in_warp ? lane.operation : Operation::syncthreads,
                     in_warp ? lane.where() : barrier_, i, 1};
    auto it = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.operation == here.operation && same_place(g.where, here.where);
    });
    if (it == groups.end()) {
      groups.push_back(here);
    } else {
      it->count++;
    }
  }
  std::string text;
  for (const Group& g : groups) {
    text += "; " + std::to_string(g.count) + " wait in " + name_of(g.operation) + " at " +
            base_name(g.where.file) + ":" + std::to_string(g.where.line) + " (first: thread " +
            label_of(threads_[size_t(g.first)].index).text + ")";
  }
  report("deadlock: of %d threads, %d have exited%s", thread_count_, thread_count_ - alive_,
         text.c_str());
}

void Processor::check_shared_margins() {
  const unsigned char* end = shared_ + launch_->shared_bytes;
  const bool before = all_poison(shared_end_ - shared_pages_, shared_);
  if (before && all_poison(end, shared_end_)) return;
  report("block %s: shared memory of %zu bytes was written to %s", label_of(blockIdx).text,
         launch_->shared_bytes, before ? "past its end" : "before its start");
}

bool Processor::in_stack_guard(uintptr_t address) const {
  const uintptr_t begin = uintptr_t(stacks_);
  return address >= begin && address < begin + kStackBytes * kMaxThreads &&
         (address - begin) % kStackBytes < page_bytes();
}

std::string Processor::describe_shared(uintptr_t address) const {
  const uintptr_t begin = uintptr_t(shared_), end = begin + launch_->shared_bytes;
  if (address < uintptr_t(shared_map_) || address >= uintptr_t(shared_end_) + kGuard) return "";
  char text[160];
  if (address >= end) {
    std::snprintf(text, sizeof text, "%zu bytes past the end of shared memory of %zu bytes",
                  size_t(address - end), launch_->shared_bytes);
  } else {
    std::snprintf(text, sizeof text, "%zu bytes before shared memory of %zu bytes",
                  size_t(begin - address), launch_->shared_bytes);
  }
  return text;
}

// ---------------------------------------------------------------------------------------------
// Faults of kernels become reports

void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!self || !processor) {  // not a kernel's
    const std::string where = describe(uintptr_t(info->si_addr));
    if (!running && !where.empty()) {
      report("host code touches device memory, address %p, %s", info->si_addr, where.c_str());
    }
    signal(signal_number, SIG_DFL);
    return;
  }
  if (write_record && write_record->open(uintptr_t(info->si_addr))) return;
  const char* access = "access";
  uintptr_t instruction = 0;
#if defined(__x86_64__)
  const auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  access = registers[REG_ERR] & 2 ? "write" : "read";
  instruction = uintptr_t(registers[REG_RIP]);
#elif defined(__aarch64__)
  instruction = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
  char at[320] = "";
  Dl_info object;
  if (dladdr(reinterpret_cast<void*>(instruction), &object) && object.dli_fname) {
    std::snprintf(at, sizeof at, " (addr2line -Cfie %s 0x%zx)", object.dli_fname,
                  size_t(instruction - uintptr_t(object.dli_fbase)));
  }
  const uintptr_t address = uintptr_t(info->si_addr);
  if (processor->in_stack_guard(address)) {
    report("stack overflow: a thread's local variables take more than %zu bytes%s",
           kStackBytes - page_bytes(), at);
  }
  std::string where = processor->describe_shared(address);
  if (where.empty()) where = describe(address);
  if (!where.empty()) {
    report("out of bounds %s at address %p, %s%s", access, info->si_addr, where.c_str(), at);
  }
  if (info->si_code == SI_KERNEL) report("misaligned access, or an address that is none%s", at);
  report("invalid %s at address %p, which is in no allocation%s", access, info->si_addr, at);
}

// While kernels run, on every OS thread that runs them, faults come to on_fault.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
};

// The handler needs a stack of its own: the thread's may be what overflowed.
void ensure_alternate_stack() {
  stack_t present{};
  sigaltstack(nullptr, &present);
  if (!(present.ss_flags & SS_DISABLE) && present.ss_size >= 32 << 10) return;
  thread_local std::unique_ptr<char[]> bytes(new char[64 << 10]);
  stack_t stack{};
  stack.ss_sp = bytes.get(), stack.ss_size = 64 << 10;
  sigaltstack(&stack, nullptr);
}

}  // namespace

void set_host_checks(bool on) {
  static std::unique_ptr<FaultHandler> handler;
  handler.reset(on ? new FaultHandler : nullptr);
  if (on) ensure_alternate_stack();
  Memory& m = memory();
  std::lock_guard lock(m.mutex);
  m.open = !on;
  for (const auto& [start, a] : m.live) protect(a, !on);
}

namespace {

// The number of the i-th block to run.
size_t block_order(size_t i, size_t blocks) {
  switch (settings().schedule) {
    case Schedule::forward:
      return i;
    case Schedule::reverse:
      return blocks - 1 - i;
    case Schedule::random:
      break;
  }
  constexpr size_t prime = 2654435761;  // no grid is a multiple of it
  return (i * prime + settings().seed) % blocks;
}

void run(const Launch& launch) {
  using Clock = std::chrono::steady_clock;
  launches++;
  const size_t blocks = launch.blocks();
  std::atomic<size_t> next_block{0};
  FaultHandler handler;
  std::unique_ptr<WriteRecord> record;
  if (settings().write_checks && blocks > 1) {
    record = std::make_unique<WriteRecord>(launch.grid);
    write_record = record.get(), writes_are_checked = true;
  }
  const std::function<void()> work = [&] {
    thread_local std::unique_ptr<Processor> own;
    if (next_block >= blocks) return;
    if (!own) own = std::make_unique<Processor>();
    ensure_alternate_stack();
    processor = own.get();
    running = launch.name.c_str();
    processor->begin(launch);
    for (size_t i; (i = next_block.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const auto start = Clock::now();
      processor->run_block(block_order(i, blocks));
      if (record) {
        record->end_block(block_order(i, blocks));
        continue;
      }
      // Others are woken where the first block says that it is worth it.
      if (i == 0 && Clock::now() - start > std::chrono::microseconds(50) / blocks) break;
    }
    running = nullptr;
  };
  work();
  if (next_block < blocks) {
    workers().run(int(std::min(size_t(worker_count()), blocks)) - 1, work);
  }
  write_record = nullptr, writes_are_checked = false;
}

}  // namespace

// =============================================================================================
// 5. Operations of a warp. Each lane leaves its arguments; the last does the work of all.

namespace {

// Rows: the 16-byte rows of four 8 x 8 matrices, by matrix and row.
void complete_ldmatrix(bool trans, const Lane (&lanes)[32]) {
  uint16_t m[4][8][8];
  for (int lane = 0; lane < 32; lane++) {
    std::memcpy(m[lane / 8][lane % 8], static_cast<LdmatrixArguments*>(lanes[lane].arguments)->row,
                16);
  }
  for (int lane = 0; lane < 32; lane++) {
    uint32_t* r = static_cast<LdmatrixArguments*>(lanes[lane].arguments)->r;
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int k = 0; k < 4; k++) {
      const uint32_t low = trans ? m[k][j][i] : m[k][i][j];
      const uint32_t high = trans ? m[k][j + 1][i] : m[k][i][j + 1];
      r[k] = low | high << 16;
    }
  }
}

void complete_mma(const Lane (&lanes)[32]) {
  using Row [[gnu::vector_size(32)]] =
      float;  // of 8: the compilers' own loops are four times slower
  const auto low = [](uint32_t x) { return std::bit_cast<float>(x << 16); };
  const auto high = [](uint32_t x) { return std::bit_cast<float>(x & 0xffff0000u); };
  float a[16][16];
  Row b[16], d[16];
  for (int lane = 0; lane < 32; lane++) {
    const auto& l = *static_cast<MmaArguments*>(lanes[lane].arguments);
    const int g = lane / 4, q = 2 * (lane % 4);
    for (int i = 0; i < 4; i++) {
      const int row = g + 8 * (i % 2), column = q + 8 * (i / 2);
      a[row][column] = low(l.a[i]), a[row][column + 1] = high(l.a[i]);
    }
    b[q][g] = low(l.b0), b[q + 1][g] = high(l.b0);
    b[q + 8][g] = low(l.b1), b[q + 9][g] = high(l.b1);
  }
  for (int i = 0; i < 16; i++) {
    d[i] = a[i][0] * b[0];
    for (int k = 1; k < 16; k++) d[i] += a[i][k] * b[k];
  }
  for (int lane = 0; lane < 32; lane++) {
    float* out = static_cast<MmaArguments*>(lanes[lane].arguments)->d;
    const int g = lane / 4, q = 2 * (lane % 4);
    out[0] += d[g][q], out[1] += d[g][q + 1];
    out[2] += d[g + 8][q], out[3] += d[g + 8][q + 1];
  }
}

// A vote or a reduction of integers: one result for all.
uint64_t combine(Operation operation, uint32_t mask, const Lane (&lanes)[32]) {
  const auto value = [&](int lane) { return static_cast<Exchange*>(lanes[lane].arguments)->value; };
  uint64_t result = value(std::countr_zero(mask));
  if (operation <= Operation::all) result = 0;
  uint32_t rest = operation <= Operation::all ? mask : mask & (mask - 1);
  for (; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const int64_t a = int64_t(result), b = int64_t(value(lane));
    switch (operation) {
      case Operation::reduce_add:
        result = uint64_t(a + b);
        break;
      case Operation::reduce_min:
        result = uint64_t(std::min(a, b));
        break;
      case Operation::reduce_max:
        result = uint64_t(std::max(a, b));
        break;
      default:
        result |= uint64_t(b != 0) << lane;
        break;
    }
  }
  if (operation == Operation::any) return result != 0;
  if (operation == Operation::all) return result == mask;
  return result;
}

void complete(Operation operation, uint32_t mask, const Lane (&lanes)[32]) {
  const auto lane_of = [&](int lane) -> Exchange& {
    return *static_cast<Exchange*>(lanes[lane].arguments);
  };
  switch (operation) {
    case Operation::syncwarp:
    case Operation::syncthreads:
      return;
    case Operation::ldmatrix:
      return complete_ldmatrix(false, lanes);
    case Operation::ldmatrix_trans:
      return complete_ldmatrix(true, lanes);
    case Operation::mma:
      return complete_mma(lanes);
    case Operation::shfl:
    case Operation::shfl_xor:
    case Operation::shfl_up:
    case Operation::shfl_down:
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        Exchange& lane = lane_of(std::countr_zero(rest));
        lane.result = lane_of(lane.source).value;
      }
      return;
    case Operation::match_any:
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        Exchange& lane = lane_of(std::countr_zero(rest));
        lane.result = 0;
        for (uint32_t other = mask; other; other &= other - 1) {
          const int o = std::countr_zero(other);
          if (lane_of(o).value == lane.value) lane.result |= 1u << o;
        }
      }
      return;
    default:
      break;
  }
  const uint64_t result = combine(operation, mask, lanes);
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    lane_of(std::countr_zero(rest)).result = result;
}

void check_shared(const void* pointer, size_t bytes, const char* what) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (processor->in_shared(p, bytes)) return;
  const std::string where = processor->describe_shared(
      p >= block_shared_memory ? uintptr_t(p) + bytes - 1 : uintptr_t(p));
  report("%s: out of bounds: address %p is %s", what, pointer,
         where.empty() ? "not in shared memory" : where.c_str());
}

}  // namespace

void wait_for_block(Where where) { processor->arrive_at_barrier(where); }
void wait_for_warp(Operation operation, uint32_t mask, void* arguments, Where where) {
  processor->arrive(operation, mask, arguments, where);
}

void check_row(const void* row) {
  check_aligned(row, 16);
  check_shared(row, 16, "ldmatrix");
}

void cp_async16(void* shared, const void* global, bool valid) {
  check_aligned(shared, 16);
  check_shared(shared, 16, "cp_async16");
  if (valid) check_aligned(global, 16);
  CopyQueue::Copy copy{static_cast<unsigned char*>(shared), {}};
  if (valid) std::memcpy(copy.bytes, global, 16);
  processor->current().copies.copies.push_back(copy);
}
void cp_async_commit() {
  CopyQueue& queue = processor->current().copies;
  queue.group_ends.push_back(queue.copies.size());
}
void cp_async_wait_until(int groups) { processor->current().copies.land_until(size_t(groups)); }

}  // namespace cuda_on_cpu

// =============================================================================================
// 6. Launches, streams, events, graphs

struct cudaGraph {
  std::vector<std::function<void()>> work;
};
struct cudaGraphExec {
  std::vector<std::function<void()>> work;
};
struct cudaStream {
  bool non_blocking = false;
  uint64_t capture = 0;  // that it takes or took part in
  bool origin = false;   // of that
};
struct cudaEvent {
  std::chrono::steady_clock::time_point time;
  bool recorded = false, timing = true;
  uint64_t capture = 0;  // that it was recorded in
};

namespace cuda_on_cpu {
namespace {

struct Capture {
  cudaGraph* graph;
  cudaStreamCaptureMode mode;
  bool strict;  // the legacy stream may not be used meanwhile
  bool invalid = false;
};
std::map<uint64_t, Capture> captures;  // under way, by number
uint64_t last_capture = 0;
std::map<const void*, int> shared_limits;  // by kernel: cudaFuncSetAttribute

// The most threads of a block that a kernel's __launch_bounds__ allow, rounded up to warps: see
// there. Between the address in the table and the kernel are as many bytes 0x90 as warps.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
extern "C" [[gnu::weak]] const uintptr_t __start___patchable_function_entries[];
extern "C" [[gnu::weak]] const uintptr_t __stop___patchable_function_entries[];
unsigned launch_bound(const void* kernel) {
  const auto entry = uintptr_t(kernel);
  for (const uintptr_t* place = __start___patchable_function_entries;
       place != __stop___patchable_function_entries; place++) {
    if (*place >= entry || entry - *place > kMaxWarps) continue;
    const auto* end = static_cast<const unsigned char*>(kernel);
    const auto* begin = end - (entry - *place);
    if (std::all_of(begin, end, [](unsigned char byte) { return byte == 0x90; })) {
      return unsigned(32 * (end - begin));
    }
  }
  return kMaxThreads;
}
#else
unsigned launch_bound(const void*) { return kMaxThreads; }
#endif

Capture* find_capture(uint64_t number) {
  const auto it = captures.find(number);
  return it == captures.end() ? nullptr : &it->second;
}
Capture* capture_of(cudaStream_t stream) {
  return stream ? find_capture(stream->capture) : nullptr;
}

// Work for a stream: done now, or recorded.
template <class Work>
cudaError_t enqueue(cudaStream_t stream, Work&& work) {
  if (Capture* capture = capture_of(stream)) {
    if (capture->invalid) return result(cudaErrorStreamCaptureInvalidated);
    capture->graph->work.emplace_back(std::forward<Work>(work));
    return cudaSuccess;
  }
  for (auto& [number, capture] : captures) {
    if (!stream && capture.strict) {
      capture.invalid = true;
      return result(cudaErrorStreamCaptureUnsupported);
    }
  }
  const OpenMemory open;
  work();
  return cudaSuccess;
}

// Calls that would wait for the device, or touch it beside the streams, end a capture.
bool unsafe_while_capturing() {
  bool unsafe = false;
  for (auto& [number, capture] : captures) {
    if (capture.mode != cudaStreamCaptureModeRelaxed) capture.invalid = unsafe = true;
  }
  return unsafe;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> thread) {
  const char* name = next_launch ? next_launch : "(unnamed)";
  next_launch = nullptr;
  const dim3 &grid = config.gridDim, &size = config.blockDim;
  if (settings().device_count == 0) return result(cudaErrorNoDevice);
  if (fails_now(settings().launches_until_failure)) return result(cudaErrorLaunchOutOfResources);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || size.x == 0 || size.y == 0 || size.z == 0 || size.z > 64 ||
      size.x > kMaxThreads || size.y > kMaxThreads || size.x * size.y * size.z > kMaxThreads) {
    return result(cudaErrorInvalidConfiguration);
  }
  const auto limit = shared_limits.find(kernel);
  const size_t allowed = limit == shared_limits.end()
                             ? kDefaultShared
                             : std::max(kDefaultShared, size_t(limit->second));
  if (config.dynamicSmemBytes > allowed) return result(cudaErrorInvalidValue);
  if (size.x * size.y * size.z > launch_bound(kernel)) {
    return result(cudaErrorLaunchOutOfResources);
  }
  return enqueue(config.stream, [work = Launch{name, grid, size, config.dynamicSmemBytes,
                                               std::move(thread)}] { run(work); });
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new cudaStream{(flags & cudaStreamNonBlocking) != 0};
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (Capture* capture = capture_of(stream)) {
    capture->invalid = true;
    return result(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

// A stream that waits for an event of a capture becomes part of the capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (stream && find_capture(event->capture)) stream->capture = event->capture;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new cudaEvent;
  (*event)->timing = !(flags & cudaEventDisableTiming);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->capture = capture_of(stream) ? stream->capture : 0;
  event->time = std::chrono::steady_clock::now();
  event->recorded = true;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return find_capture(event->capture) ? result(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!start->recorded || !end->recorded || !start->timing || !end->timing) {
    return result(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (!stream) return result(cudaErrorStreamCaptureUnsupported);
  if (capture_of(stream)) return result(cudaErrorIllegalState);
  stream->capture = ++last_capture, stream->origin = true;
  captures[last_capture] = Capture{new cudaGraph, mode, !stream->non_blocking};
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  Capture* found = capture_of(stream);
  if (!found || !stream->origin) return result(cudaErrorIllegalState);
  const Capture capture = *found;
  captures.erase(stream->capture);
  stream->origin = false;
  if (capture.invalid) {
    delete capture.graph;
    return result(cudaErrorStreamCaptureInvalidated);
  }
  *graph = capture.graph;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Capture* capture = capture_of(stream);
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, uint64_t) {
  if (!graph) return result(cudaErrorInvalidValue);
  *exec = new cudaGraphExec{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return result(cudaErrorInvalidValue);
  return enqueue(stream, [work = exec->work] {
    for (const auto& item : work) item();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

// =============================================================================================
// 7. The runtime's calls

namespace {

struct ErrorText {
  cudaError_t status;
  const char *name, *text;
};
const ErrorText* find_error(cudaError_t status) {
  static const ErrorText errors[] = {
      {cudaSuccess, "cudaSuccess", "no error"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
      {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
      {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
       "invalid configuration argument"},
      {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
       "invalid copy direction for memcpy"},
      {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
       "CUDA driver version is insufficient for CUDA runtime version"},
      {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
      {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
      {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
      {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
      {cudaErrorIllegalState, "cudaErrorIllegalState",
       "the operation cannot be performed in the present state"},
      {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
      {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
       "too many resources requested for launch"},
      {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
      {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
      {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
       "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
       "operation failed due to a previous error during capture"},
  };
  for (const ErrorText& e : errors) {
    if (e.status == status) return &e;
  }
  return nullptr;
}

// A device is there and its driver is new enough.
cudaError_t device_status() {
  if (settings().driver < CUDART_VERSION / 1000 * 1000) return cudaErrorInsufficientDriver;
  return settings().device_count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t check_copy(const void* to, size_t to_bytes, const void* from, size_t from_bytes,
                       cudaMemcpyKind kind) {
  if (to_bytes == 0) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault) {
    if (to_device != on_device(to, to_bytes)) return cudaErrorInvalidValue;
    if (from_device != on_device(from, from_bytes)) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t status) {
  const ErrorText* e = find_error(status);
  return e ? e->text : "unrecognized error code";
}
const char* cudaGetErrorName(cudaError_t status) {
  const ErrorText* e = find_error(status);
  return e ? e->name : "unrecognized error code";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings().device_count;
  return result(device_status());
}
cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t status = device_status()) return result(status);
  return result(device >= 0 && device < settings().device_count ? cudaSuccess
                                                                : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return result(device_status());
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (const cudaError_t status = cudaSetDevice(device)) return status;
  *p = {};
  std::snprintf(p->name, sizeof p->name, "CUDA on the CPU");
  p->totalGlobalMem = settings().memory;
  p->sharedMemPerBlock = kDefaultShared;
  p->sharedMemPerBlockOptin = kMaxShared;
  p->sharedMemPerMultiprocessor = kMaxShared + 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = kMaxThreads;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = kMaxThreads, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = settings().major, p->minor = settings().minor;
  p->multiProcessorCount = settings().multiprocessors;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 1 << 20;
  p->memoryBusWidth = 64;
  p->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t status = cudaGetDeviceProperties(&p, device)) return status;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrClockRate:
      *value = 1000000;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrMemoryClockRate:
      *value = 1000000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = p.memoryBusWidth;
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(p.sharedMemPerBlockOptin);
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = settings().driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return result(unsafe_while_capturing() ? cudaErrorStreamCaptureUnsupported : device_status());
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  if (const cudaError_t status = device_status()) return result(status);
  *total = settings().memory;
  *free = *total - std::min(*total, memory_in_use());
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (const cudaError_t status = device_status()) return result(status);
  if (unsafe_while_capturing()) return result(cudaErrorStreamCaptureUnsupported);
  if (fails_now(settings().malloc_until_failure)) return result(cudaErrorMemoryAllocation);
  if (bytes == 0) return cudaSuccess;
  std::lock_guard lock(memory().mutex);
  if (bytes > settings().memory || memory().in_use > settings().memory - bytes) {
    return result(cudaErrorMemoryAllocation);
  }
  *pointer = allocate(bytes);
  return result(*pointer ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* pointer) {
  if (!pointer) return result(device_status());
  if (unsafe_while_capturing()) return result(cudaErrorStreamCaptureUnsupported);
  Memory& m = memory();
  std::lock_guard lock(m.mutex);
  const auto it = m.live.find(uintptr_t(pointer));
  if (it == m.live.end()) return result(cudaErrorInvalidValue);
  const Allocation a = it->second;
  running = "cudaFree";
  if (!m.open) protect(a, true);
  check_margins(static_cast<unsigned char*>(pointer), a);
  running = nullptr;
  m.in_use -= a.bytes;
  m.live.erase(it);
  // The memory goes back; the addresses stay taken.
  mmap(a.map, a.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
       0);
  m.freed.emplace_back(uintptr_t(pointer), a);
  if (m.freed.size() > kFreedKept) {
    munmap(m.freed.front().second.map, m.freed.front().second.map_bytes);
    m.freed.pop_front();
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceReset() {
  std::vector<void*> pointers;
  for (const auto& [address, a] : memory().live)
    pointers.push_back(reinterpret_cast<void*>(address));
  for (void* pointer : pointers) cudaFree(pointer);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  if (const cudaError_t status = device_status()) return result(status);
  *pointer = std::aligned_alloc(64, round_up(std::max<size_t>(bytes, 1), 64));
  if (!*pointer) return result(cudaErrorMemoryAllocation);
  std::memset(*pointer, kPoison, bytes);
  std::lock_guard lock(memory().mutex);
  memory().pinned[uintptr_t(*pointer)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return cudaMallocHost(pointer, bytes);
}
cudaError_t cudaFreeHost(void* pointer) {
  std::lock_guard lock(memory().mutex);
  if (pointer && !memory().pinned.erase(uintptr_t(pointer))) return result(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (const cudaError_t status = check_copy(to, bytes, from, bytes, kind)) return result(status);
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToHost) host_copies++;
  return enqueue(stream, [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (unsafe_while_capturing()) return result(cudaErrorStreamCaptureUnsupported);
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  if (width == 0 || height == 0) return cudaSuccess;
  if (width > to_pitch || width > from_pitch) return result(cudaErrorInvalidValue);
  const cudaError_t status = check_copy(to, (height - 1) * to_pitch + width, from,
                                        (height - 1) * from_pitch + width, kind);
  if (status) return result(status);
  return enqueue(stream, [=] {
    for (size_t row = 0; row < height; row++) {
      std::memmove(static_cast<char*>(to) + row * to_pitch,
                   static_cast<const char*>(from) + row * from_pitch, width);
    }
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes > 0 && !on_device(to, bytes)) return result(cudaErrorInvalidValue);
  return enqueue(stream, [=] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (unsafe_while_capturing()) return result(cudaErrorStreamCaptureUnsupported);
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > kMaxShared) return result(cudaErrorInvalidValue);
  shared_limits[kernel] = value;
  return cudaSuccess;
}

// =============================================================================================
// 8. cuBLASLt: column-major, as in its documentation

struct cublasLtContext {};
struct cublasLtMatmulDescOpaque {
  bool transpose_a = false, transpose_b = false;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void *bias = nullptr, *aux = nullptr;
  int64_t aux_ld = 0, aux_stride = 0;
  int bias_type = -1, aux_type = -1;  // -1: as D
};
struct cublasLtMatrixLayoutOpaque {
  cudaDataType_t type;
  int64_t rows, cols, ld;
  int batch = 1;
  int64_t stride = 0;
};
struct cublasLtMatmulPreferenceOpaque {
  size_t workspace = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
};

namespace {

using Desc = cublasLtMatmulDescOpaque;
using Layout = cublasLtMatrixLayoutOpaque;

// The algorithms that are pretended: they differ in the workspace they need.
constexpr uint64_t kAlgorithmMark = 0x63616b65'6c74616cu;
constexpr size_t kWorkspaces[] = {0, 1 << 16, 1 << 20};

template <class T>
bool copy_attribute(T& to, const void* from, size_t bytes) {
  if (bytes != sizeof(T)) return false;
  std::memcpy(&to, from, bytes);
  return true;
}

size_t bytes_of(int type) { return type == CUDA_R_32F ? 4 : 2; }
bool known(int type) { return type == CUDA_R_32F || type == CUDA_R_16BF; }

float load(const void* p, int64_t i, int type) {
  if (type == CUDA_R_32F) return static_cast<const float*>(p)[i];
  return float(static_cast<const __nv_bfloat16*>(p)[i]);
}
void store(void* p, int64_t i, int type, float x) {
  if (type == CUDA_R_32F) {
    static_cast<float*>(p)[i] = x;
  } else {
    static_cast<__nv_bfloat16*>(p)[i] = __nv_bfloat16(x);
  }
}

// The tanh approximation, which is cuBLASLt's.
constexpr float kGelu = 0.7978845608028654f, kGeluCubic = 0.044715f;  // sqrt(2 / pi)
float gelu(float x) { return .5f * x * (1 + std::tanh(kGelu * (x + kGeluCubic * x * x * x))); }
float gelu_derivative(float x) {
  const float t = std::tanh(kGelu * (x + kGeluCubic * x * x * x));
  return .5f * (1 + t) + .5f * x * (1 - t * t) * kGelu * (1 + 3 * kGeluCubic * x * x);
}

struct Product {
  Desc desc;
  Layout a, b, c, d;
  float alpha, beta;
  const void *A, *B, *C;
  void *D, *workspace;
  size_t workspace_needed;
  bool rounded_reduction = false;

  int64_t m() const { return d.rows; }
  int64_t n() const { return d.cols; }
  int64_t k() const { return desc.transpose_a ? a.rows : a.cols; }
  bool has_bias() const { return desc.epilogue & 4; }
  bool has_aux() const { return desc.epilogue & 128; }
  bool is_gelu() const { return desc.epilogue & 32; }
  bool is_dgelu() const { return desc.epilogue & 64; }
  bool has_gradient() const { return desc.epilogue & (16 | 256 | 512); }
};

cublasStatus_t validate(const Product& p) {
  const Desc& desc = p.desc;
  for (const Layout* l : {&p.a, &p.b, &p.c, &p.d}) {
    if (!known(l->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (l->rows <= 0 || l->cols <= 0 || l->ld < l->rows) return CUBLAS_STATUS_INVALID_VALUE;
    if (l->batch != p.d.batch) return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (p.a.type != p.b.type || p.c.type != p.d.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (p.a.type == CUDA_R_32F && p.d.type != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (p.c.rows != p.d.rows || p.c.cols != p.d.cols) return CUBLAS_STATUS_INVALID_VALUE;
  const int64_t a_rows = desc.transpose_a ? p.a.cols : p.a.rows;
  const int64_t b_rows = desc.transpose_b ? p.b.cols : p.b.rows;
  const int64_t b_cols = desc.transpose_b ? p.b.rows : p.b.cols;
  if (a_rows != p.m() || b_rows != p.k() || b_cols != p.n()) return CUBLAS_STATUS_INVALID_VALUE;
  switch (desc.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_GELU:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
    case CUBLASLT_EPILOGUE_BGRADA:
    case CUBLASLT_EPILOGUE_BGRADB:
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (p.has_aux() && (desc.aux_ld < p.m() || desc.aux_ld % 8 != 0))
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}

// All of a matrix must be in one allocation.
void check_operand(const char* name, const void* pointer, const Layout& l) {
  const size_t bytes =
      size_t((l.batch - 1) * l.stride + (l.cols - 1) * l.ld + l.rows) * bytes_of(l.type);
  if (!on_device(pointer, bytes)) {
    report(
        "cublasLtMatmul: %s, (%ld, %ld) with leading dimension %ld, batch %d, %zu bytes at %p, "
        "is not inside one allocation: its end is %s",
        name, long(l.rows), long(l.cols), long(l.ld), l.batch, bytes, pointer,
        describe(uintptr_t(pointer) + bytes - 1).c_str());
  }
  if (uintptr_t(pointer) % bytes_of(l.type)) report("cublasLtMatmul: %s is misaligned", name);
}

// op(X) in panels of `width` rows: out[panel][k][row]; rows past the end are zeros.
void pack(std::vector<float>& out, int64_t width, const void* X, const Layout& l, int64_t rows,
          int64_t k, int64_t row_step, int64_t k_step, int64_t offset) {
  const int64_t panels = (rows + width - 1) / width;
  out.assign(size_t(panels * k * width), 0.f);
  for (int64_t r = 0; r < rows; r++) {
    float* panel = out.data() + r / width * k * width + r % width;
    for (int64_t i = 0; i < k; i++) {
      panel[i * width] = load(X, offset + r * row_step + i * k_step, l.type);
    }
  }
}

// sums (m, n) column-major = op(A) op(B), by tiles of 16 x 6: fp32 sums in the order of k.
constexpr int64_t kTileM = 16, kTileN = 6;
void multiply(std::vector<float>& sums, const Product& p, int64_t batch) {
  static thread_local std::vector<float> a, b;
  const int64_t m = p.m(), n = p.n(), k = p.k();
  const bool ta = p.desc.transpose_a, tb = p.desc.transpose_b;
  pack(a, kTileM, p.A, p.a, m, k, ta ? p.a.ld : 1, ta ? 1 : p.a.ld, batch * p.a.stride);
  pack(b, kTileN, p.B, p.b, n, k, tb ? 1 : p.b.ld, tb ? p.b.ld : 1, batch * p.b.stride);
  sums.resize(size_t(m * n));
  const float *packed_a = a.data(), *packed_b = b.data();
  const auto column_panel = [&](int64_t j0) {
    for (int64_t i0 = 0; i0 < m; i0 += kTileM) {
      using Half [[gnu::vector_size(32)]] = float;
      Half tile[kTileN][2] = {};
      const float *x = packed_a + i0 * k, *y = packed_b + j0 * k;
      for (int64_t t = 0; t < k; t++, x += kTileM, y += kTileN) {
        Half column[2];
        std::memcpy(column, x, sizeof column);
        for (int j = 0; j < kTileN; j++) {
          tile[j][0] += column[0] * y[j], tile[j][1] += column[1] * y[j];
        }
      }
      for (int64_t j = j0; j < std::min(n, j0 + kTileN); j++) {
        std::memcpy(&sums[size_t(j * m + i0)], tile[j - j0],
                    size_t(std::min(kTileM, m - i0)) * sizeof(float));
      }
    }
  };
  std::atomic<int64_t> next{0};
  const std::function<void()> work = [&] {
    for (int64_t j; (j = next.fetch_add(kTileN, std::memory_order_relaxed)) < n;) column_panel(j);
  };
  if (m * n * k > 200000) {
    workers().run(int(std::min<int64_t>(worker_count(), (n + kTileN - 1) / kTileN)) - 1, work);
  } else {
    work();
  }
}

// Sums of op(A)'s rows (BGRADA), op(B)'s columns (BGRADB) or D's rows (DGELU_BGRAD).
void bias_gradient(const Product& p, const std::vector<float>& result_sums) {
  const Desc& desc = p.desc;
  const int type = desc.bias_type < 0 ? int(p.d.type) : desc.bias_type;
  const bool of_b = desc.epilogue == CUBLASLT_EPILOGUE_BGRADB;
  const bool of_a = desc.epilogue == CUBLASLT_EPILOGUE_BGRADA;
  const int64_t length = of_b ? p.n() : p.m();
  check_operand("the bias gradient", desc.bias, Layout{cudaDataType_t(type), length, 1, length});
  for (int64_t i = 0; i < length; i++) {
    float sum = 0;
    if (of_a || of_b) {
      const Layout& l = of_a ? p.a : p.b;
      const bool along_rows = of_a ? desc.transpose_a : !desc.transpose_b;
      for (int64_t t = 0; t < p.k(); t++) {
        sum += load(of_a ? p.A : p.B, along_rows ? i * l.ld + t : t * l.ld + i, l.type);
      }
    } else {
      for (int64_t j = 0; j < p.n(); j++) sum += result_sums[size_t(j * p.m() + i)];
    }
    store(desc.bias, i, type, sum);
  }
}

void run_product(const Product& p) {
  check_operand("A", p.A, p.a);
  check_operand("B", p.B, p.b);
  check_operand("D", p.D, p.d);
  if (p.beta != 0) check_operand("C", p.C, p.c);
  const Desc& desc = p.desc;
  const int bias_type = desc.bias_type < 0 ? int(p.d.type) : desc.bias_type;
  const int aux_type = desc.aux_type < 0 ? int(p.d.type) : desc.aux_type;
  if (p.has_bias()) {
    check_operand("the bias", desc.bias, Layout{cudaDataType_t(bias_type), p.m(), 1, p.m()});
  }
  if (p.has_aux()) {
    check_operand(
        "the auxiliary matrix", desc.aux,
        Layout{cudaDataType_t(aux_type), p.m(), p.n(), desc.aux_ld, p.d.batch, desc.aux_stride});
  }
  if (p.workspace_needed) {
    if (!on_device(p.workspace, p.workspace_needed)) {
      report("cublasLtMatmul: the workspace is not %zu bytes of device memory", p.workspace_needed);
    }
    std::memset(p.workspace, kPoison, p.workspace_needed);
  }
  std::vector<float> sums;
  for (int64_t batch = 0; batch < p.d.batch; batch++) {
    multiply(sums, p, batch);
    if (p.rounded_reduction)
      for (float& x : sums) x = __bfloat162float(__float2bfloat16(x));
    for (int64_t j = 0; j < p.n(); j++) {
      for (int64_t i = 0; i < p.m(); i++) {
        const int64_t at = batch * p.d.stride + j * p.d.ld + i;
        float& x = sums[size_t(j * p.m() + i)];
        x *= p.alpha;
        if (p.beta != 0) {
          x += p.beta * load(p.C, batch * p.c.stride + j * p.c.ld + i, p.c.type);
        }
        if (p.has_bias()) x += load(desc.bias, i, bias_type);
        const int64_t aux_at = batch * desc.aux_stride + j * desc.aux_ld + i;
        if (p.is_gelu()) {
          if (p.has_aux()) store(desc.aux, aux_at, aux_type, x);
          x = gelu(x);
        }
        if (p.is_dgelu()) x *= gelu_derivative(load(desc.aux, aux_at, aux_type));
        store(p.D, at, p.d.type, x);
      }
    }
  }
  if (p.has_gradient()) bias_gradient(p, sums);
}

}  // namespace

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
  return "CUBLAS_STATUS_UNKNOWN";
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
size_t cublasLtGetVersion() { return 130000; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  if (settings().device_count == 0) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t,
                                        cudaDataType_t scale) {
  if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  *desc = new Desc;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  delete desc;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  bool good = false;
  int32_t number = 0;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      good = copy_attribute(number, value, bytes);
      desc->transpose_a = number != CUBLAS_OP_N;
      break;
    case CUBLASLT_MATMUL_DESC_TRANSB:
      good = copy_attribute(number, value, bytes);
      desc->transpose_b = number != CUBLAS_OP_N;
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      good = copy_attribute(number, value, bytes);
      desc->epilogue = cublasLtEpilogue_t(number);
      break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      good = copy_attribute(desc->bias, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      good = copy_attribute(desc->aux, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      good = copy_attribute(desc->aux_ld, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
      good = copy_attribute(desc->aux_stride, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      good = copy_attribute(desc->bias_type, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
      good = copy_attribute(desc->aux_type, value, bytes);
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
  *layout = new Layout{type, int64_t(rows), int64_t(cols), ld};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
  bool good = false;
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      good = copy_attribute(layout->rows, value, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      good = copy_attribute(layout->cols, value, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_LD:
      good = copy_attribute(layout->ld, value, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      good = copy_attribute(layout->batch, value, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
      good = copy_attribute(layout->stride, value, bytes);
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new cublasLtMatmulPreferenceOpaque;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) {
    return copy_attribute(preference->reductions, value, bytes) ? CUBLAS_STATUS_SUCCESS
                                                                : CUBLAS_STATUS_INVALID_VALUE;
  }
  if (attribute != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return CUBLAS_STATUS_SUCCESS;
  return copy_attribute(preference->workspace, value, bytes) ? CUBLAS_STATUS_SUCCESS
                                                             : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int asked,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
  *found = 0;
  const Product p{*desc, *a, *b, *c, *d, 1, 0, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  if (const cublasStatus_t status = validate(p)) return status;
  if (p.d.type == CUDA_R_16BF && asked > 0 &&
      preference->reductions & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE) {
    cublasLtMatmulHeuristicResult_t& r = results[(*found)++];
    r = {};
    r.algo.data[0] = kAlgorithmMark, r.algo.data[2] = CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    r.wavesCount = 1;
  }
  for (uint64_t i = 0; i < std::size(kWorkspaces) && *found < asked; i++) {
    if (kWorkspaces[i] > preference->workspace) break;
    cublasLtMatmulHeuristicResult_t& r = results[(*found)++];
    r = {};
    r.algo.data[0] = kAlgorithmMark, r.algo.data[1] = i;
    r.workspaceSize = kWorkspaces[i];
    r.wavesCount = 1;
  }
  return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
  const Product p{*desc, *a, *b, *c, *d, 1, 0, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  if (const cublasStatus_t status = validate(p)) return status;
  if (algo->data[0] != kAlgorithmMark || algo->data[1] >= std::size(kWorkspaces)) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  *result = {*algo, kWorkspaces[algo->data[1]], CUBLAS_STATUS_SUCCESS, 1, {}};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  Product p{*desc,
            *a_layout,
            *b_layout,
            *c_layout,
            *d_layout,
            *static_cast<const float*>(alpha),
            *static_cast<const float*>(beta),
            a,
            b,
            c,
            d,
            workspace,
            0};
  if (const cublasStatus_t status = validate(p)) return status;
  if (algo) {
    if (algo->data[0] != kAlgorithmMark || algo->data[1] >= std::size(kWorkspaces)) {
      return CUBLAS_STATUS_INVALID_VALUE;
    }
    p.workspace_needed = kWorkspaces[algo->data[1]];
    if (p.workspace_needed > workspace_bytes) return CUBLAS_STATUS_INVALID_VALUE;
    p.rounded_reduction = algo->data[2] == CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    if (p.rounded_reduction) reductions_rounded++;
  }
  if ((p.has_bias() || p.has_gradient()) && !desc->bias) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.has_aux() && (!desc->aux || uintptr_t(desc->aux) % 16 != 0)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const cudaError_t status = enqueue(stream, [p] { run_product(p); });
  return status == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
