// The small kernels of group norm, which merge partial results in the order of their index: the moments or sums of a
// group's channels and parts into its statistics or means, by one block a group; and the sums of a channel over samples
// into the parameters' gradients, by 32 threads a channel.

#pragma once

#include "batch_norm_slices.cuh"
#include "group_norm.cuh"

namespace fastreg::cuda {

// Threads of a block that merges a group's values.
constexpr int group_merge_threads(int64_t values) {
  int threads = 32;
  while (threads < 256 && threads * 4 < values) threads *= 2;
  return threads;
}

struct GroupMomentsArguments {
  GroupNormForwardArguments norm;
  StreamPlan plan;
  const float* partials;  // (2, samples * groups, parts, channels): means, sums of squared deviations
};

struct GroupMeansArguments {
  GroupNormBackwardArguments norm;
  const float* partials;  // (2, samples * groups, parts, channels): sums of dz, of dz * xhat
  int64_t parts;
  float* sums;  // (2, samples * groups): of weight * dz, of weight * dz * xhat
};

struct GroupParametersArguments {
  GroupSums sums;
  int64_t samples;
  int64_t channels;
  int64_t groups;
  void* grad_weight;  // or null
  void* grad_bias;
  DType weight_dtype;
  DType bias_dtype;
};

__global__ void __launch_bounds__(256) group_norm_moments_kernel(const GroupMomentsArguments arguments) {
  using GroupExchange = Exchange<Moments<float>>;
  FASTREG_SHARED(GroupExchange, exchange);
  const GroupNormForwardArguments& norm = arguments.norm;
  const StreamPlan& plan = arguments.plan;
  const int64_t group = blockIdx.x;
  const int channels = static_cast<int>(norm.group.channels);
  const int64_t values = plan.parts * channels;
  const float* const means = arguments.partials + group * values;
  const float* const squares = means + norm.shape.samples * norm.group.groups * values;
  const int64_t of_item = norm.shape.rows ? 1 : norm.shape.spatial / plan.line_packs;

  Moments<float> moments[1] = {};
#pragma unroll 4
  for (int64_t index = threadIdx.x; index < values; index += blockDim.x) {
    const int64_t part = static_cast<unsigned>(index) / static_cast<unsigned>(channels);
    const Moments<float> value{elements_of_part(plan, part, of_item), means[index], squares[index]};
    moments[0] = index == threadIdx.x ? value : together(moments[0], value);
  }
  moments[0] = over_lanes(moments[0], warp_lanes);
  over_warps_and_blocks(moments, Team(static_cast<int>(blockDim.x)), 1, exchange, 0);
  if (threadIdx.x == 0) norm.finish(group, moments[0]);
}

__global__ void __launch_bounds__(256) group_norm_means_kernel(const GroupMeansArguments arguments) {
  FASTREG_SHARED(Exchange<Sums>, exchange);
  const GroupNormBackwardArguments& norm = arguments.norm;
  const int64_t group = blockIdx.x;
  const int channels = static_cast<int>(norm.group.channels);
  const int64_t first_channel = group % norm.group.groups * channels;
  const int64_t values = arguments.parts * channels;
  const int64_t statistics = norm.statistics();
  const float* const plain = arguments.partials + group * values;
  const float* const projection = plain + statistics * values;

  Sums sums[1] = {};
#pragma unroll 4
  for (int64_t index = threadIdx.x; index < values; index += blockDim.x) {
    const int channel = static_cast<int>(static_cast<unsigned>(index) % static_cast<unsigned>(channels));
    const float weight = load_channel(norm.weight, first_channel + channel, 1.0f);
    sums[0].plain += weight * plain[index];
    sums[0].projection += weight * projection[index];
  }
  sums[0] = over_lanes(sums[0], warp_lanes);
  over_warps_and_blocks(sums, Team(static_cast<int>(blockDim.x)), 1, exchange, 0);
  if (threadIdx.x == 0) {
    arguments.sums[group] = sums[0].plain;
    arguments.sums[statistics + group] = sums[0].projection;
  }
}

__global__ void __launch_bounds__(finish_threads)
    group_norm_parameters_kernel(const GroupParametersArguments arguments) {
  FASTREG_SHARED(FinishTables, tables);
  const GroupPieces& pieces = arguments.sums.pieces;
  const int thread = static_cast<int>(threadIdx.x);
  const int slice = thread / finish_channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * finish_channels + thread % finish_channels;
  const bool has_channel = channel < arguments.channels;

  float plain = 0.0f;
  float projection = 0.0f;
  if (has_channel && arguments.samples > 0) {
    const int64_t group = channel / pieces.channels;
    const int64_t of_group = channel - group * pieces.channels;
    const int64_t first = pieces.first(of_group);
    const int64_t count = pieces.count(of_group);
    const int64_t step = pieces.step();
    const float* const second = arguments.sums.data + arguments.sums.statistics * pieces.slots;
#pragma unroll 4
    for (int64_t index = slice; index < arguments.samples * count; index += finish_slices) {
      const int64_t sample = static_cast<unsigned>(index) / static_cast<unsigned>(count);
      const int64_t piece = index - sample * count;
      const int64_t place = (sample * arguments.groups + group) * pieces.slots + first + piece * step;
      plain += arguments.sums.data[place];
      projection += second[place];
    }
  }
  plain = over_slices(plain, tables.first);
  projection = over_slices(projection, tables.second);
  if (has_channel && slice == 0) {
    if (arguments.grad_weight != nullptr) {
      store_parameter(arguments.grad_weight, arguments.weight_dtype, channel, projection);
    }
    if (arguments.grad_bias != nullptr) store_parameter(arguments.grad_bias, arguments.bias_dtype, channel, plain);
  }
}

}  // namespace fastreg::cuda
