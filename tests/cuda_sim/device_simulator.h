// The names that CUDA code uses, on top of the simulator. csrc/cuda/device.cuh includes this in place of CUDA.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simulator.h"

#if !defined(__launch_bounds__)
#define __launch_bounds__(...)
#endif

// Macros for what differs from thread to thread; blockDim and gridDim are variables of simulator.h.
#define threadIdx (::simulator::running->index)
#define blockIdx (::simulator::running->block->index)

// --- barriers and warps ----------------------------------------------------------------------------------------------

#define FASTREG_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FASTREG_SITE) { simulator::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, FASTREG_SITE) {
  simulator::warp_operation(simulator::WarpOperation::barrier, mask, 0, 0, {file, line});
}

namespace simulator {

template <class Value>
Value shuffle(unsigned mask, Value value, int source, Site site) {
  static_assert(sizeof(Value) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = warp_operation(WarpOperation::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The lane itself where `source` would leave the group of `width` lanes.
inline int within(int source, int width) {
  const int lane = static_cast<int>(running->lane());
  return source < 0 || source / width != lane / width ? lane : source;
}

}  // namespace simulator

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, FASTREG_SITE) {
  const int lane = static_cast<int>(simulator::running->lane());
  return simulator::shuffle(mask, value, lane / width * width + source % width, {file, line});
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance, int width = 32, FASTREG_SITE) {
  const int lane = static_cast<int>(simulator::running->lane());
  return simulator::shuffle(mask, value, simulator::within(lane ^ distance, width), {file, line});
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, int distance, int width = 32, FASTREG_SITE) {
  const int lane = static_cast<int>(simulator::running->lane());
  return simulator::shuffle(mask, value, simulator::within(lane + distance, width), {file, line});
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance, int width = 32, FASTREG_SITE) {
  const int lane = static_cast<int>(simulator::running->lane());
  return simulator::shuffle(mask, value, simulator::within(lane - distance, width), {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FASTREG_SITE) {
  return static_cast<unsigned>(
      simulator::warp_operation(simulator::WarpOperation::vote, mask, predicate != 0, 0, {file, line}));
}

inline int __any_sync(unsigned mask, int predicate, FASTREG_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, FASTREG_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

// --- memory and arithmetic -------------------------------------------------------------------------------------------

// Threads take turns only where they wait, so a plain read and write is atomic.
template <class Value>
Value atomicAdd(Value* address, Value value) {
  const Value before = *address;
  *address = before + value;
  return before;
}

template <class Value>
Value __ldg(const Value* address) {
  simulator::check_aligned(address, sizeof(Value));
  return *address;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __fdividef(float left, float right) { return left / right; }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

// --- launches --------------------------------------------------------------------------------------------------------

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  simulator::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class... Expected>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Expected...), cudaFuncAttribute attribute, int value) {
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
             ? simulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), value)
             : cudaErrorInvalidValue;
}

template <class... Expected>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Expected...), const cudaLaunchConfig_t* config) {
  return simulator::resident_clusters(clusters, *config);
}

// --- the names of csrc/cuda/device.cuh -------------------------------------------------------------------------------

namespace fastreg::cuda {

inline constexpr bool simulated = true;

// One variable a block: the key is the address of a static that each instance of the kernel has once.
#define FASTREG_SHARED(type, name)  \
  static const char name##_key = 0; \
  type& name = *static_cast<type*>(::simulator::shared_variable(&name##_key, sizeof(type), alignof(type)))

inline unsigned char* dynamic_shared() { return simulator::dynamic_shared(); }

inline uint4 load_streamed(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

inline void store_wide(void* address, const uint4& value) {
  simulator::check_aligned(address, sizeof(value));
  *static_cast<uint4*>(address) = value;
}

inline void forget(uint32_t&) {}
inline void forget(uint16_t&) {}

inline void copy_async(void* shared, const void* global) { simulator::copy_async(shared, global); }

inline void copy_async_commit() { simulator::copy_async_commit(); }

template <int pending>
void copy_async_wait() {
  simulator::copy_async_wait(pending);
}

inline unsigned cluster_rank() { return simulator::running->block->rank; }

inline void cluster_arrive() { simulator::cluster_arrive(); }

inline void cluster_wait() { simulator::cluster_wait(); }

using simulator::Mailbox;
using simulator::mailbox_expect;
using simulator::mailbox_open;
using simulator::mailbox_send;
using simulator::mailbox_wait;

}  // namespace fastreg::cuda
