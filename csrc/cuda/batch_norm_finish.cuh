// What the blocks of a channel found out, merged in the order of their index: a kernel of its own, not the last block
// to arrive. The tickets by which blocks would know who that is need memory that is zero before, which is a launch too,
// or state that outlives the call and that two streams could share; and one block would be alone with the some hundred
// parts of a strip, where here many work on them.
//
// Partial moments have known counts: the mean of the means first, then
// the squared deviations of the parts from it, with no division in between.

#pragma once

#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"
#include "batch_norm_slices.cuh"

namespace fastreg::cuda {

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
