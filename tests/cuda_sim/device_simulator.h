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

// The tracer (tracer.h) sees every access of the functions around these, but not theirs.
#define FASTREG_UNTRACED __attribute__((noinline, no_sanitize("thread")))

// --- barriers and warps ----------------------------------------------------------------------------------------------

#define FASTREG_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FASTREG_SITE) { simulator::block_barrier(0, {file, line}); }

inline int __syncthreads_count(int predicate, FASTREG_SITE) {
  return simulator::block_barrier(predicate, {file, line});
}

inline int __syncthreads_or(int predicate, FASTREG_SITE) {
  return simulator::block_barrier(predicate, {file, line}) != 0;
}

inline int __syncthreads_and(int predicate, FASTREG_SITE) {
  return simulator::block_barrier(predicate == 0, {file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, FASTREG_SITE) { simulator::meet(mask, 0, true, {file, line}); }

namespace simulator {

template <class Value>
uint64_t bits_of(Value value) {
  static_assert(sizeof(Value) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <class Value>
Value value_of(uint64_t bits) {
  Value value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class Value>
Value shuffle(unsigned mask, Value value, int source, Site site) {
  const Lanes lanes = meet(mask, bits_of(value), false, site);
  if ((mask >> source & 1u) == 0) {
    fail("a shuffle at line " + std::to_string(site.line) + " reads lane " + std::to_string(source) +
         ", which its mask does not name");
  }
  return value_of<Value>(lanes.values[static_cast<size_t>(source)]);
}

// The lane itself where `source` would leave the group of `width` lanes.
inline int within(int source, int width) {
  const int lane = static_cast<int>(running->lane());
  return source < 0 || source / width != lane / width ? lane : source;
}

template <class Value, class Combine>
Value reduce(unsigned mask, Value value, Site site, const Combine& combine) {
  const Lanes lanes = meet(mask, bits_of(value), false, site);
  bool first = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const Value other = value_of<Value>(lanes.values[lane]);
    value = first ? other : combine(value, other);
    first = false;
  }
  return value;
}

}  // namespace simulator

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, FASTREG_SITE) {
  const int lane = static_cast<int>(simulator::running->lane());
  return simulator::shuffle(mask, value, lane / width * width + (source & (width - 1)), {file, line});
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
  const simulator::Lanes lanes = simulator::meet(mask, predicate != 0, false, {file, line});
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= lanes.values[lane] != 0 ? 1u << lane : 0u;
  return votes;
}

inline int __any_sync(unsigned mask, int predicate, FASTREG_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, FASTREG_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

template <class Value>
unsigned __match_any_sync(unsigned mask, Value value, FASTREG_SITE) {
  const simulator::Lanes lanes = simulator::meet(mask, simulator::bits_of(value), false, {file, line});
  unsigned equal = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0 && lanes.values[lane] == simulator::bits_of(value)) equal |= 1u << lane;
  }
  return equal;
}

// Of 32-bit integers, as in hardware.
#define FASTREG_WARP_REDUCTION(name, expression)                                                      \
  template <class Value>                                                                              \
  Value name(unsigned mask, Value value, FASTREG_SITE) {                                              \
    static_assert(std::is_integral_v<Value> && sizeof(Value) == 4);                                   \
    return simulator::reduce(mask, value, {file, line},                                               \
                             [](Value left, Value right) { return static_cast<Value>(expression); }); \
  }

FASTREG_WARP_REDUCTION(__reduce_add_sync, left + right)
FASTREG_WARP_REDUCTION(__reduce_min_sync, left < right ? left : right)
FASTREG_WARP_REDUCTION(__reduce_max_sync, left < right ? right : left)
FASTREG_WARP_REDUCTION(__reduce_and_sync, left& right)
FASTREG_WARP_REDUCTION(__reduce_or_sync, left | right)
FASTREG_WARP_REDUCTION(__reduce_xor_sync, left ^ right)

// --- memory and arithmetic -------------------------------------------------------------------------------------------

inline void __threadfence() { simulator::fence(); }

// Threads take turns only where they wait, so a plain read and write is atomic. Each returns what was there before.
#define FASTREG_ATOMIC(name, expression)                                           \
  template <class Value>                                                           \
  FASTREG_UNTRACED Value name(Value* address, std::type_identity_t<Value> value) { \
    simulator::atomic_access(address, sizeof(Value));                              \
    const Value before = *address;                                                 \
    *address = static_cast<Value>(expression);                                     \
    return before;                                                                 \
  }

FASTREG_ATOMIC(atomicAdd, before + value)
FASTREG_ATOMIC(atomicSub, before - value)
FASTREG_ATOMIC(atomicMin, before < value ? before : value)
FASTREG_ATOMIC(atomicMax, before < value ? value : before)
FASTREG_ATOMIC(atomicAnd, before& value)
FASTREG_ATOMIC(atomicOr, before | value)
FASTREG_ATOMIC(atomicXor, before ^ value)
FASTREG_ATOMIC(atomicExch, value)
FASTREG_ATOMIC(atomicInc, before >= value ? Value{} : before + 1)

template <class Value>
FASTREG_UNTRACED Value atomicCAS(Value* address, std::type_identity_t<Value> expected,
                                 std::type_identity_t<Value> value) {
  simulator::atomic_access(address, sizeof(Value));
  const Value before = *address;
  if (before == expected) *address = value;
  return before;
}

// Loads and stores with a hint for the caches. A value of several elements is one access, and must be aligned to all
// of it.
#define FASTREG_LOAD(name)                                                 \
  template <class Value>                                                   \
  __attribute__((always_inline)) inline Value name(const Value* address) { \
    simulator::check_aligned(address, sizeof(Value));                      \
    return *address;                                                       \
  }
#define FASTREG_STORE(name)                                                                            \
  template <class Value>                                                                               \
  __attribute__((always_inline)) inline void name(Value* address, std::type_identity_t<Value> value) { \
    simulator::check_aligned(address, sizeof(Value));                                                  \
    *address = value;                                                                                  \
  }

FASTREG_LOAD(__ldg)
FASTREG_LOAD(__ldca)
FASTREG_LOAD(__ldcg)
FASTREG_LOAD(__ldcs)
FASTREG_LOAD(__ldlu)
FASTREG_LOAD(__ldcv)
FASTREG_STORE(__stwb)
FASTREG_STORE(__stcg)
FASTREG_STORE(__stcs)
FASTREG_STORE(__stwt)

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
  return simulator::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
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

template <class... Expected>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Expected...), int threads,
                                                          size_t dynamic_shared_bytes) {
  *blocks = simulator::resident_blocks_per_multiprocessor(threads, dynamic_shared_bytes);
  return cudaSuccess;
}

template <class Value>
cudaError_t cudaMalloc(Value** address, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(address), bytes);
}

#include "cooperative_groups_simulator.h"

// --- the names of csrc/cuda/device.cuh -------------------------------------------------------------------------------

namespace fastreg::cuda {

inline constexpr bool simulated = true;

// One variable a block: the key is the address of a static that each instance of the kernel has once.
#define FASTREG_SHARED(type, name)  \
  static const char name##_key = 0; \
  type& name = *static_cast<type*>(::simulator::shared_variable(&name##_key, sizeof(type), alignof(type)))

inline unsigned char* dynamic_shared() { return simulator::dynamic_shared(); }

inline float exp2_approximate(float value) { return std::exp2(value); }
inline float reciprocal_approximate(float value) { return 1.0f / value; }

__attribute__((always_inline)) inline uint4 load_streamed(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

__attribute__((always_inline)) inline void store_wide(void* address, const uint4& value) {
  __stwb(static_cast<uint4*>(address), value);
}

inline void forget(uint32_t&) {}
inline void forget(uint16_t&) {}

template <int bytes = 16>
inline void copy_async(void* shared, const void* global) {
  static_assert(bytes == 8 || bytes == 16);
  simulator::copy_async(shared, global, bytes);
}

inline void copy_async_commit() { simulator::copy_async_commit(); }

template <int pending>
void copy_async_wait() {
  simulator::copy_async_wait(pending);
}

inline void grid_barrier(FASTREG_SITE) { simulator::grid_barrier({file, line}); }

using simulator::counter_arrive;
using simulator::counter_wait;

inline unsigned cluster_rank() { return simulator::running->block->rank; }

inline void cluster_arrive() { simulator::cluster_arrive(false); }

inline void cluster_wait() { simulator::cluster_wait(); }

using simulator::Mailbox;
using simulator::mailbox_expect;
using simulator::mailbox_open;
using simulator::mailbox_send;
using simulator::mailbox_wait;
using simulator::mailboxes_publish;

}  // namespace fastreg::cuda
