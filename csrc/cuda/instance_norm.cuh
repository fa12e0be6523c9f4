// The running statistics of instance norm: means over samples of what group norm, with a group a channel, has found.
// 32 threads a channel, added up in a fixed order.

#pragma once

#include "batch_norm_slices.cuh"
#include "batch_norm.cuh"

namespace fastreg::cuda {

struct RunningArguments {
  const float* mean;     // (samples, channels)
  const float* squares;  // M2, the same
  RunningStatistic running_mean;
  RunningStatistic running_var;
  ChannelShape shape;
  float momentum;
};

__global__ void __launch_bounds__(finish_threads) instance_norm_running_kernel(const RunningArguments arguments) {
  FASTREG_SHARED(FinishTables, tables);
  const int thread = static_cast<int>(threadIdx.x);
  const int slice = thread / finish_channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * finish_channels + thread % finish_channels;
  const bool has_channel = channel < arguments.shape.channels;

  float mean = 0.0f;
  float squares = 0.0f;
  if (has_channel) {
#pragma unroll 4
    for (int64_t sample = slice; sample < arguments.shape.samples; sample += finish_slices) {
      mean += arguments.mean[sample * arguments.shape.channels + channel];
      squares += arguments.squares[sample * arguments.shape.channels + channel];
    }
  }
  mean = over_slices(mean, tables.first);
  squares = over_slices(squares, tables.second);
  if (has_channel && slice == 0) {
    const float samples = static_cast<float>(arguments.shape.samples);
    const float degrees = fmaxf(static_cast<float>(arguments.shape.spatial) - 1.0f, 1.0f);
    update_running(arguments.running_mean, channel, arguments.momentum, mean / samples);
    update_running(arguments.running_var, channel, arguments.momentum, squares / degrees / samples);
  }
}

}  // namespace fastreg::cuda
