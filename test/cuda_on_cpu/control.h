// What a test can set: the order threads run in, the device that is pretended, and failures to
// come.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

// Each thread runs until it waits for others. forward: always the lowest thread that can go on;
// reverse: the highest; random: any, by the seed. A barrier that is missing shows under at least
// one of the first two wherever one thread needs what another wrote. The environment variable
// CUDA_ON_CPU_SCHEDULE (forward, reverse, random, random:SEED) sets the schedule at the start.
enum class Schedule { forward, reverse, random };
void set_schedule(Schedule schedule, uint64_t seed = 1);

// OS threads that run blocks; 0: as many as there are cores, at most 16. With 1 none is started, as
// a process after fork() needs.
void set_workers(int workers);

// Reports host code that touches device memory. Every launch and copy then opens all of device
// memory and closes it again: for a few small steps, not for whole suites.
void set_host_checks(bool on);

// Reports two blocks of a launch that write the same byte, unless both do so by atomics. Blocks
// then run one after the other, and each block's first write to a page of memory takes
// microseconds. A write that leaves a byte as it was is not seen. The environment variable
// CUDA_ON_CPU_WRITES=1 begins with it on.
void set_write_checks(bool on);

// The device. The defaults: one device, compute capability 9.0, 4 multiprocessors, 16 GiB, CUDA 13.
void set_device_count(int count);
void set_compute_capability(int major, int minor);
void set_multiprocessors(int count);
void set_memory(size_t bytes);
void set_driver_version(int version);
size_t memory_in_use();
// Products by algorithms of cuBLASLt whose partial sums are added in the type of a bf16 D: the
// heuristic offers one first, unless CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK forbids it.
int64_t rounded_reductions();
int64_t kernels_launched();  // since the start; each replay of a graph counts
// To the device and from it, since the start; those of graphs do not count.
int64_t copies_with_host();

// The allocation (cudaMalloc) or launch after `skip` more of them fails.
void fail_next_malloc(int skip = 0);
void fail_next_launch(int skip = 0);

}  // namespace cuda_on_cpu
