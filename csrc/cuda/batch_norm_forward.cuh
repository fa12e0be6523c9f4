// Batch norm forward, streaming: statistics, then output, each a kernel that fills the machine whatever the number of
// channels (batch_norm_plan.h).
//
// batch_norm_statistics_kernel reads the input once. A thread takes a few packs at a time: their mean, the squared
// deviations from it, and the update of Chan, Golub and LeVeque with what it has so far; threads are merged the same
// way. batch_norm_merge_moments_kernel (batch_norm_finish.cuh) merges the blocks of a channel and finishes its
// statistics; where a channel has a single block, that one does it, and there is no merge.
//
// batch_norm_apply_kernel computes the output, and the sign bits if they are asked for. After the statistics it goes
// through the tensor backwards, since what was read last is what the L2 still has. In evaluation it is alone.
//
// Traffic: three passes over the activations in training, two in evaluation, one more with a residual; partial results
// are 8 bytes a channel and block. Nothing is added atomically.

#pragma once

#include "batch_norm_walk.cuh"

namespace fastreg::cuda {

struct StatisticsArguments {
  BatchNormForwardArguments norm;
  StreamPlan plan;
  float* partials;  // (2, parts, channels): means, sums of squared deviations
  bool moments;     // wanted are mean and M2, the latter in the place of rstd
};

struct ApplyArguments {
  BatchNormForwardArguments norm;
  StreamPlan plan;
  bool evaluation;  // the statistics come from the running ones, and are saved
};

// --- statistics ------------------------------------------------------------------------------------------------------

// By one thread a channel.
__device__ __forceinline__ void finish_moments(const BatchNormForwardArguments& norm, bool moments, int64_t channel,
                                               float mean, float squares) {
  if (moments) {
    norm.mean[channel] = mean;
    norm.rstd[channel] = squares;
  } else {
    finish_channel(norm, channel, mean, squares);
  }
}

// The moments of the packs that a thread has at hand, of which it has `count`.
template <int channels, class Element, int width, int packs>
__device__ __forceinline__ ChannelMoments<channels> moments_of(const Pack<Element, width> (&input)[packs],
                                                               const bool (&valid)[packs], int count) {
  ChannelMoments<channels> moments{};
  moments.count = static_cast<float>(count * (width / channels));
#pragma unroll
  for (int pack = 0; pack < packs; ++pack) {
    if (valid[pack]) {
#pragma unroll
      for (int index = 0; index < width; ++index) {
        moments.mean[channels == 1 ? 0 : index] += value_of(input[pack], index);
      }
    }
  }
  const float share = mean_of(1.0f, moments.count);
#pragma unroll
  for (float& mean : moments.mean) mean *= share;
#pragma unroll
  for (int pack = 0; pack < packs; ++pack) {
    if (valid[pack]) {
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const int channel = channels == 1 ? 0 : index;
        const float difference = value_of(input[pack], index) - moments.mean[channel];
        moments.squares[channel] += difference * difference;
      }
    }
  }
  return moments;
}

// What the kernel does, group norm's too: `apart` as in batch_norm_walk.cuh, where all parts leave partial results.
template <class Element, bool rows, int width, bool apart>
__device__ __forceinline__ void stream_statistics(const StatisticsArguments& arguments, const GroupShape& group) {
  using Data = Pack<Element, width>;
  using Value = ChannelMoments<pack_channels<width, rows>>;
  using ValueExchange = std::conditional_t<rows, StripExchange<Value>, Exchange<Moments<float>>>;
  constexpr int packs = stream_forward_packs(width);
  constexpr int channels = pack_channels<width, rows>;
  FASTREG_SHARED(ValueExchange, exchange);
  const BatchNormForwardArguments& norm = arguments.norm;
  const StreamPlan& plan = arguments.plan;
  Walk<width, rows, apart> walk(norm.shape, plan, false);
  const Element* input = static_cast<const Element*>(norm.input);

  Value value{};
  for (int start = 0; start < walk.items; start += packs * walk.step) {
    Data data[packs];
    bool valid[packs];
    int count = 0;
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      valid[pack] = walk.valid();
      if (valid[pack]) {
        data[pack] = Data::load(walk.at(input, norm.shape, norm.input_stride));
        ++count;
      }
      walk.advance();
    }
    value = together(value, moments_of<channels>(data, valid, count));
  }

  if constexpr (rows) {
    over_strip(value, plan, exchange);
  } else {
    over_block(value, exchange);
  }
  const bool first = static_cast<int>(threadIdx.x) < (rows ? plan.lanes : 1);
  if (first && walk.has_channels()) {
#pragma unroll
    for (int index = 0; index < channels; ++index) {
      const int64_t channel = walk.channel + index;
      if (!apart && plan.parts == 1) {
        finish_moments(norm, arguments.moments, channel, value.mean[index], value.squares[index]);
      } else {
        float* partial = arguments.partials + walk.partial(norm.shape, plan, group, channel);
        partial[0] = value.mean[index];
        partial[walk.partials(norm.shape, plan)] = value.squares[index];
      }
    }
  }
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    batch_norm_statistics_kernel(const StatisticsArguments arguments) {
  stream_statistics<Element, rows, width, false>(arguments, {});
}

// --- output ----------------------------------------------------------------------------------------------------------

// What a thread's channels are multiplied by; in evaluation one thread of all that have them saves their statistics.
template <int width, bool rows, bool apart>
__device__ __forceinline__ Affine<pack_channels<width, rows>> affine_of(const ApplyArguments& arguments,
                                                                       const GroupShape& group,
                                                                       const Walk<width, rows, apart>& walk) {
  const BatchNormForwardArguments& norm = arguments.norm;
  const bool saves = walk.part == 0 && static_cast<int>(threadIdx.x) < (rows ? arguments.plan.lanes : 1);
  Affine<pack_channels<width, rows>> affine{};
  if (!walk.has_channels()) {
    return affine;
  }
#pragma unroll
  for (int index = 0; index < pack_channels<width, rows>; ++index) {
    const int64_t channel = walk.channel + index;
    float mean;
    float rstd;
    if (!apart && arguments.evaluation) {
      mean = load_channel({norm.running_mean.data, norm.running_mean.dtype}, channel, 0.0f);
      const float variance = load_channel({norm.running_var.data, norm.running_var.dtype}, channel, 1.0f);
      rstd = reciprocal_deviation_of(variance, norm.eps);
      if (saves) {
        norm.mean[channel] = mean;
        norm.rstd[channel] = rstd;
      }
    } else {
      const int64_t statistic = walk.statistic(group, channel);
      mean = norm.mean[statistic];
      rstd = norm.rstd[statistic];
    }
    affine.set(index, mean, rstd, load_channel(norm.weight, channel, 1.0f), load_channel(norm.bias, channel, 0.0f));
  }
  return affine;
}

// What the kernel does, group norm's too, which knows no residual, signs or evaluation.
template <class Element, bool rows, int width, bool apart>
__device__ __forceinline__ void stream_apply(const ApplyArguments& arguments, const GroupShape& group) {
  using Data = Pack<Element, width>;
  constexpr int packs = stream_forward_packs(width);
  const BatchNormForwardArguments& norm = arguments.norm;
  const StreamPlan& plan = arguments.plan;
  Walk<width, rows, apart> walk(norm.shape, plan, !arguments.evaluation);
  const Affine<pack_channels<width, rows>> affine = affine_of(arguments, group, walk);
  const Element* input = static_cast<const Element*>(norm.input);
  const Element* residual = static_cast<const Element*>(norm.residual);
  Element* output = static_cast<Element*>(norm.output);
  const bool has_residual = !apart && residual != nullptr;
  const int64_t dense_stride = norm.shape.dense_stride();
  const int64_t sign_bytes = norm.shape.sign_bytes_per_line();

  for (int start = 0; start < walk.items; start += packs * walk.step) {
    Data data[packs];
    Data added[packs];
    Walk<width, rows, apart> behind = walk;
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if (walk.valid()) {
        data[pack] = Data::load(walk.at(input, norm.shape, norm.input_stride));
        if (has_residual) added[pack] = Data::load(walk.at(residual, norm.shape, norm.residual_stride));
      }
      walk.advance();
    }
    behind.forget_places();
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      const bool valid = behind.valid();
      float values[width] = {};
      data[pack].keep_packed();
      added[pack].keep_packed();
      if (valid) arguments_of(affine, data[pack], has_residual, added[pack], values);
      if (!apart && norm.signs != nullptr) {
        store_signs<width>(norm.signs, behind.line(norm.shape), sign_bytes, behind.element(), valid,
                           sign_bits(norm.activation, values));
      }
      if (valid) {
        activate(norm.activation, values);
        cuda::pack<Element, width>(values).store(behind.at(output, norm.shape, dense_stride));
      }
      behind.advance();
    }
  }
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    batch_norm_apply_kernel(const ApplyArguments arguments) {
  stream_apply<Element, rows, width, false>(arguments, {});
}

}  // namespace fastreg::cuda
