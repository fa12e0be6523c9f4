// How a block adds up what many parts know of a few channels: 8 channels, and 32 threads for each.

#pragma once

#include "batch_norm_plan.h"
#include "reduce.cuh"

namespace fastreg::cuda {

inline constexpr int finish_slices = finish_threads / finish_channels;

// A value of each warp and channel.
using FinishExchange = float[finish_threads / warp_lanes][finish_channels];

// The sum over the slices of a channel, in all of its threads.
__device__ __forceinline__ float over_slices(float value, FinishExchange& exchange) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int distance = finish_channels; distance < warp_lanes; distance *= 2) {
    value += __shfl_xor_sync(all_lanes, value, distance);
  }
  if (thread % warp_lanes < finish_channels) exchange[thread / warp_lanes][thread % finish_channels] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < finish_threads / warp_lanes; ++warp) sum += exchange[warp][thread % finish_channels];
  return sum;
}

struct FinishTables {
  FinishExchange first;
  FinishExchange second;
};

// How many elements of its channel a part has.
__device__ __forceinline__ float elements_of_part(const StreamPlan& plan, int64_t part, int64_t of_item) {
  const int64_t start = part * plan.share;
  const int64_t items = plan.items - start < plan.share ? plan.items - start : plan.share;
  return static_cast<float>(items * of_item);
}

}  // namespace fastreg::cuda
