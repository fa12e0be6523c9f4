// What the kernels need from the machine, and the one place that names CUDA or the host simulator.
//
// On a GPU these are a few lines of PTX each. With FASTREG_CUDA_SIMULATOR the same names come from tests/cuda_sim, which
// compiles the kernels with a C++ compiler and runs them on a CPU. No other file of csrc/cuda knows the difference.

#pragma once

#if defined(FASTREG_CUDA_SIMULATOR)

#include "device_simulator.h"

#else

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

__device__ __forceinline__ void store_wide(void* address, const uint4& value) {
  *static_cast<uint4*>(address) = value;
}

// Hides from the compiler that `word` keeps its value, so that what was made of it is made again rather than kept.
__device__ __forceinline__ void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void forget(uint16_t& word) { asm volatile("" : "+h"(word)); }

// --- asynchronous copies into shared memory ----------------------------------------------------------------------------

// Starts a copy of 16 bytes; they arrive when the group that they are committed to has been waited for.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups, the latest ones, are still on their way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- thread-block clusters (sm_90 and later; the launch plan never asks for one elsewhere) -------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier over all threads of the cluster in two halves: what a thread wrote before it arrived, to its own block's shared
// memory or another's, is seen by every thread that has waited.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
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

// Writes to the place that `own` (an address in this block's shared memory) has in the block of that rank.
__device__ __forceinline__ void cluster_store(float* own, unsigned rank, float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  __trap();
#endif
}

}  // namespace fastreg::cuda

#endif
