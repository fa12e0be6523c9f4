// What the kernels need from the machine, and the one place that names CUDA or the host simulator.
//
// On a GPU these are a few lines of PTX each. With FASTREG_CUDA_SIMULATOR the same names come from tests/cuda_sim,
// which compiles the kernels with a C++ compiler and runs them on a CPU. No other file of csrc/cuda knows the
// difference.

#pragma once

#if defined(FASTREG_CUDA_SIMULATOR)

#include "device_simulator.h"

#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {

inline constexpr bool simulated = false;

// A variable that all threads of a block share. A macro, because only the simulator can say where it lies.
#define FASTREG_SHARED(type, name) __shared__ type name

// The shared memory whose size the launch gives.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastreg_dynamic_shared[];
  return fastreg_dynamic_shared;
}

// --- global memory ---------------------------------------------------------------------------------------------------

// 16 bytes that this launch reads once: they pass the L1 by, which then keeps the weights for the next row.
__device__ __forceinline__ uint4 load_streamed(const void* address) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address));
  return value;
}

// Not a plain store: nvcc takes some of those apart again, into four of 4 bytes.
__device__ __forceinline__ void store_wide(void* address, const uint4& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Hides from the compiler that `word` keeps its value, so that what was made of it is made again rather than kept.
__device__ __forceinline__ void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void forget(uint16_t& word) { asm volatile("" : "+h"(word)); }

// --- arithmetic ------------------------------------------------------------------------------------------------------

// 2^value to 2 ulp; a result below the smallest normal number is 0.
__device__ __forceinline__ float exp2_approximate(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// 1 / value to 1 ulp; a result below the smallest normal number is 0.
__device__ __forceinline__ float reciprocal_approximate(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// --- asynchronous copies into shared memory --------------------------------------------------------------------------

// Starts a copy of 16 bytes, or of 8; they arrive when the group that they are committed to has been waited for.
template <int bytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    static_assert(bytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(global) : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups, the latest ones, are still on their way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- blocks that run at once (cooperative launches) ------------------------------------------------------------------

// A barrier over all threads of the grid.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// A counter in global memory that blocks arrive at and wait for. By one thread of a block after a barrier of its block:
// what the block has written by then is seen by those who have waited for its arrival, and by their blocks after a
// barrier of theirs.
__device__ __forceinline__ void counter_arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits for the arrival number `target`, counted from 1 and on beyond 2^32.
__device__ __forceinline__ void counter_wait(unsigned* counter, unsigned target) {
  unsigned arrived;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
  } while (static_cast<int>(arrived - target) < 0);
}

// --- thread-block clusters (sm_90 and later; the launch plan never asks for one elsewhere) ---------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier over all threads of the cluster, in two halves: after it every block has started, and the mailboxes that
// were opened before it are open. It orders nothing else, since that would wait for all earlier writes to global
// memory.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Through which other blocks of the cluster send values: an mbarrier in shared memory that counts the bytes that
// arrive. It is used in rounds; a round ends when the bytes expected in it are there.
struct Mailbox {
  unsigned long long barrier;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// By one thread, before mailboxes_publish().
__device__ __forceinline__ void mailbox_open(Mailbox* mailbox) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(mailbox)) : "memory");
#else
  __trap();
#endif
}

// By the thread that opened them, before the cluster's barrier: from there on all of the cluster see them open.
__device__ __forceinline__ void mailboxes_publish() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

// By one thread of the receiving block in each round.
__device__ __forceinline__ void mailbox_expect(Mailbox* mailbox, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Sends a value to the block of that rank, to the place and the mailbox that `slot` and `mailbox` are in this block.
__device__ __forceinline__ void mailbox_send(float* slot, Mailbox* mailbox, unsigned rank, float value) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote_slot;
  uint32_t remote_mailbox;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_slot) : "r"(shared_address(slot)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_mailbox) : "r"(shared_address(mailbox)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_slot),
               "r"(__float_as_uint(value)), "r"(remote_mailbox)
               : "memory");
#else
  __trap();
#endif
}

// Acquires for this block only, which is enough for values that arrive in its own shared memory and, unlike a wider
// scope, leaves the L1 as it is. Waits for the end of a round: `parity` is 0 for the first, 1 for the second, 0 for the
// third and so on.
__device__ __forceinline__ void mailbox_wait(Mailbox* mailbox, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(mailbox)), "r"(parity)
        : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace fastreg::cuda

#endif
