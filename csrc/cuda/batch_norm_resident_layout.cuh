// What the kernels that keep slabs on chip are told, besides what batch_norm.cuh has.

#pragma once

#include "batch_norm.cuh"
#include "batch_norm_resident_plan.h"
#include "reduce.cuh"

namespace fastreg::cuda {

// Of a ResidentPlan. A launch has groups of `slab_blocks` blocks; group g takes slabs g, g + groups, g + 2 * groups ...
struct ResidentLayout {
  int slab_blocks;
  int columns;
  int64_t share;
  int64_t slabs;
  int cluster;         // 1, or slab_blocks where those exchange values through each other's shared memory
  float* partials;     // else: what each block knows of its slab; two of each, used in turn
  unsigned* counters;  // one a group

  __device__ __forceinline__ int rank() const { return static_cast<int>(blockIdx.x % unsigned_blocks()); }
  __device__ __forceinline__ int64_t group() const { return blockIdx.x / unsigned_blocks(); }
  __device__ __forceinline__ int64_t groups() const { return gridDim.x / unsigned_blocks(); }
  __device__ __forceinline__ unsigned unsigned_blocks() const { return static_cast<unsigned>(slab_blocks); }
};

struct ResidentForwardArguments {
  BatchNormForwardArguments norm;
  ResidentLayout layout;
};

struct ResidentBackwardArguments {
  BatchNormBackwardArguments norm;
  ResidentLayout layout;
};

// Before the first round of a group that meets at a counter: it is 0 before anybody arrives there.
__device__ __forceinline__ void start_counters(const ResidentLayout& layout) {
  if (layout.slab_blocks > layout.cluster) {
    if (threadIdx.x == 0 && layout.rank() == 0) layout.counters[layout.group()] = 0;
    grid_barrier();
  }
}

// By one thread, after what its block has to say is in `partials`: all of the group's blocks have said it.
__device__ __forceinline__ void meet_group(const ResidentLayout& layout, unsigned round) {
  counter_arrive(layout.counters + layout.group());
  counter_wait(layout.counters + layout.group(), (round + 1) * static_cast<unsigned>(layout.slab_blocks));
}

// A partial result of each block and channel of a group, in the memory of this round. A block writes for the next but
// one only after all have arrived for the next, and so have read this one's.
template <class Value>
struct Partials {
  static constexpr int words = static_cast<int>(sizeof(Value) / sizeof(float));

  float* base;
  int channels;

  __device__ __forceinline__ Partials(const ResidentLayout& layout, int channels, unsigned round)
      : base(layout.partials + (2 * layout.group() + round % 2) * layout.slab_blocks * channels * words),
        channels(channels) {}

  __device__ __forceinline__ Value load(int block, int channel) const {
    const float* const address = base + (block * channels + channel) * words;
    float parts[words];
#pragma unroll
    for (int word = 0; word < words; ++word) parts[word] = __ldcg(address + word);
    Value value;
    memcpy(&value, parts, sizeof(value));
    return value;
  }

  __device__ __forceinline__ void store(int block, int channel, const Value& value) const {
    float* const address = base + (block * channels + channel) * words;
    float parts[words];
    memcpy(parts, &value, sizeof(value));
#pragma unroll
    for (int word = 0; word < words; ++word) address[word] = parts[word];
  }
};

__device__ __forceinline__ Sums together(const Sums& left, const Sums& right) {
  return {left.projection + right.projection, left.plain + right.plain};
}

// What is copied and computed at a time.
template <class Element>
using Chunk = Pack<Element, full_width<Element>>;

}  // namespace fastreg::cuda
