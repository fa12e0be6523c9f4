// What the blocks of a channel found out, merged in the order of their index: a kernel of its own, not the last block
// to arrive. The tickets by which blocks would know who that is need memory that is zero before, which is a launch too,
// or state that outlives the call and that two streams could share; and one block would be alone with the some hundred
// parts of a strip, where here many work on them.
//
// A block has 8 channels and 32 threads for each. Partial moments have known counts: the mean of the means first, then
// the squared deviations of the parts from it, with no division in between.

#pragma once

#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"

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

__global__ void __launch_bounds__(finish_threads) batch_norm_merge_moments_kernel(const StatisticsArguments arguments) {
  FASTREG_SHARED(FinishTables, tables);
  const BatchNormForwardArguments& norm = arguments.norm;
  const StreamPlan& plan = arguments.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const int slice = thread / finish_channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * finish_channels + thread % finish_channels;
  const bool has_channel = channel < norm.shape.channels;
  const float* means = arguments.partials + channel;
  const float* squares = means + plan.parts * norm.shape.channels;
  const int64_t of_item = norm.shape.rows ? 1 : norm.shape.spatial / plan.line_packs;

  float sum = 0.0f;
  if (has_channel) {
#pragma unroll 4
    for (int64_t part = slice; part < plan.parts; part += finish_slices) {
      sum += means[part * norm.shape.channels] * elements_of_part(plan, part, of_item);
    }
  }
  const float mean = over_slices(sum, tables.first) / static_cast<float>(norm.shape.per_channel());

  sum = 0.0f;
  if (has_channel) {
#pragma unroll 4
    for (int64_t part = slice; part < plan.parts; part += finish_slices) {
      const float difference = means[part * norm.shape.channels] - mean;
      sum += squares[part * norm.shape.channels] +
             difference * difference * elements_of_part(plan, part, of_item);
    }
  }
  const float total = over_slices(sum, tables.second);
  if (has_channel && slice == 0) finish_moments(norm, arguments.moments, channel, mean, total);
}

__global__ void __launch_bounds__(finish_threads) batch_norm_merge_sums_kernel(const SumsArguments arguments) {
  FASTREG_SHARED(FinishTables, tables);
  const BatchNormBackwardArguments& norm = arguments.norm;
  const int thread = static_cast<int>(threadIdx.x);
  const int slice = thread / finish_channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * finish_channels + thread % finish_channels;
  const bool has_channel = channel < norm.shape.channels;
  const float* partials = arguments.partials + channel;

  float plain = 0.0f;
  float projection = 0.0f;
  if (has_channel) {
#pragma unroll 4
    for (int64_t part = slice; part < arguments.plan.parts; part += finish_slices) {
      plain += partials[part * norm.shape.channels];
      projection += partials[(arguments.plan.parts + part) * norm.shape.channels];
    }
  }
  plain = over_slices(plain, tables.first);
  projection = over_slices(projection, tables.second);
  if (has_channel && slice == 0) finish_sums(norm, arguments.sums, channel, plain, projection);
}

}  // namespace fastreg::cuda
