// Batch norm backward, streaming. With z the activation's argument, dz = grad_output * activation'(z), and
// xhat = (input - mean) * rstd:
//
//   grad_bias = sum of dz, grad_weight = sum of dz * xhat      over the n elements of a channel
//   grad_input = scale * (dz - grad_bias / n - xhat * grad_weight / n)      grad_residual = dz
//
// in evaluation grad_input = scale * dz. batch_norm_sums_kernel reads grad_output and input once for the sums, blocks
// are merged as forward (batch_norm_finish.cuh), and batch_norm_gradient_kernel, which goes backwards through the
// tensors, computes what is as large as they are. dz is computed by both: from the sign bits where there are some, else
// from z, which both compute as forward did; no pre-activation tensor is read, or ever written. Where the gradient of a
// residual is dz to the bit, the sums kernel stores it, and the gradient kernel reads it in the place of grad_output.
//
// Traffic: five passes over the activations; with a residual one read of it more for each kernel, or 1/16 of that with
// bits, and the write of its gradient. In evaluation two passes; with gradients of the parameters the sums kernel
// stores those of the tensors too, and there are three. What is not asked for has a null pointer: it costs nothing.

#pragma once

#include "batch_norm_walk.cuh"

namespace fastreg::cuda {

struct SumsArguments {
  BatchNormBackwardArguments norm;  // grad_input only in evaluation
  StreamPlan plan;
  float* partials;  // (2, parts, channels): sums of dz, of dz * xhat
  float* sums;      // (2, channels)
};

struct GradientArguments {
  BatchNormBackwardArguments norm;
  StreamPlan plan;
  const float* sums;  // (2, channels), or null: the statistics are constants
  float share;        // sums times share are means
};

// --- what both read of a pack ----------------------------------------------------------------------------------------

template <class Element, int width>
struct BackwardPack {
  Pack<Element, width> grad_output;
  Pack<Element, width> input;
  Pack<Element, width> residual;
  uint32_t bits;

  template <bool rows, bool apart>
  __device__ __forceinline__ void load(const BatchNormBackwardArguments& norm, const Walk<width, rows, apart>& walk,
                                       bool reads_input) {
    const auto at = [&](const void* tensor, int64_t stride) {
      return Pack<Element, width>::load(walk.at(static_cast<const Element*>(tensor), norm.shape, stride));
    };
    grad_output = at(norm.grad_output, norm.grad_output_stride);
    if (reads_input) input = at(norm.input, norm.input_stride);
    if (!apart && norm.residual != nullptr) residual = at(norm.residual, norm.residual_stride);
    if (!apart && norm.signs != nullptr) {
      bits = load_signs(norm.signs, walk.line(norm.shape), norm.shape.sign_bytes_per_line(), walk.element());
    }
  }

  __device__ __forceinline__ void keep_packed() {
    grad_output.keep_packed();
    input.keep_packed();
    residual.keep_packed();
  }

  // dz
  template <bool apart, int channels>
  __device__ __forceinline__ void gradients(const BatchNormBackwardArguments& norm, const Affine<channels>& affine,
                                            float (&values)[width]) const {
    argument_gradients(norm.activation, affine, grad_output, input, !apart && norm.residual != nullptr, residual,
                       !apart && norm.signs != nullptr, bits, values);
  }
};

template <int width, bool rows, bool apart>
__device__ __forceinline__ Affine<pack_channels<width, rows>> saved_affine_of(const BatchNormBackwardArguments& norm,
                                                                             const GroupShape& group,
                                                                             const Walk<width, rows, apart>& walk) {
  Affine<pack_channels<width, rows>> affine{};
  if (walk.has_channels()) {
#pragma unroll
    for (int index = 0; index < pack_channels<width, rows>; ++index) {
      const int64_t channel = walk.channel + index;
      const int64_t statistic = walk.statistic(group, channel);
      affine.set(index, __ldg(norm.mean + statistic), __ldg(norm.rstd + statistic),
                 load_channel(norm.weight, channel, 1.0f), load_channel(norm.bias, channel, 0.0f));
    }
  }
  return affine;
}

template <class Element, int width, bool rows, bool apart>
__device__ __forceinline__ void store_gradient(void* tensor, const ChannelShape& shape,
                                               const Walk<width, rows, apart>& walk, const float (&values)[width]) {
  pack<Element, width>(values).store(walk.at(static_cast<Element*>(tensor), shape, shape.dense_stride()));
}

// --- sums ------------------------------------------------------------------------------------------------------------

// By one thread a channel. The sums stay in fp32 for the gradient kernel.
__device__ __forceinline__ void finish_sums(const BatchNormBackwardArguments& norm, float* sums, int64_t channel,
                                            float plain, float projection) {
  if (sums != nullptr) {
    sums[channel] = plain;
    sums[norm.shape.channels + channel] = projection;
  }
  if (norm.grad_weight != nullptr) store_parameter(norm.grad_weight, norm.weight.dtype, channel, projection);
  if (norm.grad_bias != nullptr) store_parameter(norm.grad_bias, norm.bias.dtype, channel, plain);
}

// What the kernel does, group norm's too: `apart` as in batch_norm_walk.cuh, where all parts leave partial results, and
// no tensor's gradient is stored.
template <class Element, bool rows, int width, bool apart>
__device__ __forceinline__ void stream_sums(const SumsArguments& arguments, const GroupShape& group) {
  using Value = ChannelSums<pack_channels<width, rows>>;
  using ValueExchange = std::conditional_t<rows, StripExchange<Value>, Exchange<Sums>>;
  constexpr int packs = stream_backward_packs(width);
  constexpr int channels = pack_channels<width, rows>;
  FASTREG_SHARED(ValueExchange, exchange);
  const BatchNormBackwardArguments& norm = arguments.norm;
  const StreamPlan& plan = arguments.plan;
  Walk<width, rows, apart> walk(norm.shape, plan, false);
  const Affine<channels> affine = saved_affine_of(norm, group, walk);

  Value value{};
  for (int start = 0; start < walk.items; start += packs * walk.step) {
    BackwardPack<Element, width> data[packs];
    Walk<width, rows, apart> behind = walk;
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if (walk.valid()) data[pack].load(norm, walk, true);
      walk.advance();
    }
    behind.forget_places();
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if (behind.valid()) {
        float gradients[width];
        data[pack].keep_packed();
        data[pack].template gradients<apart>(norm, affine, gradients);
        if (!apart && norm.grad_residual != nullptr) {
          store_gradient<Element>(norm.grad_residual, norm.shape, behind, gradients);
        }
#pragma unroll
        for (int index = 0; index < width; ++index) {
          const int channel = channels == 1 ? 0 : index;
          value.plain[channel] += gradients[index];
          value.projection[channel] += gradients[index] * (value_of(data[pack].input, index) - affine.mean[channel]);
        }
        if (!apart && norm.grad_input != nullptr) {
#pragma unroll
          for (int index = 0; index < width; ++index) gradients[index] *= affine.scale[channels == 1 ? 0 : index];
          store_gradient<Element>(norm.grad_input, norm.shape, behind, gradients);
        }
      }
      behind.advance();
    }
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
      const float projection = value.projection[index] * __ldg(norm.rstd + walk.statistic(group, channel));
      if (!apart && plan.parts == 1) {
        finish_sums(norm, arguments.sums, channel, value.plain[index], projection);
      } else {
        float* partial = arguments.partials + walk.partial(norm.shape, plan, group, channel);
        partial[0] = value.plain[index];
        partial[walk.partials(norm.shape, plan)] = projection;
      }
    }
  }
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    batch_norm_sums_kernel(const SumsArguments arguments) {
  stream_sums<Element, rows, width, false>(arguments, {});
}

// --- gradients -------------------------------------------------------------------------------------------------------

// What is taken off dz: a constant of the channel, and a multiple of the centred input.
template <int channels>
struct Correction {
  float constant[channels];
  float multiple[channels];
};

// What the kernel does, group norm's too: there the sums are of a group, weighted, and scaled by rstd alone.
template <class Element, bool rows, int width, bool apart>
__device__ __forceinline__ void stream_gradient(const GradientArguments& arguments, const GroupShape& group) {
  constexpr int packs = stream_backward_packs(width);
  constexpr int channels = pack_channels<width, rows>;
  const BatchNormBackwardArguments& norm = arguments.norm;
  const StreamPlan& plan = arguments.plan;
  const bool corrects = arguments.sums != nullptr;
  const bool reads_input = corrects || norm.computes_argument();
  Walk<width, rows, apart> walk(norm.shape, plan, corrects);
  const Affine<channels> affine = saved_affine_of(norm, group, walk);
  Correction<channels> correction{};
  if (corrects && walk.has_channels()) {
#pragma unroll
    for (int index = 0; index < channels; ++index) {
      const int64_t channel = walk.channel + index;
      if constexpr (apart) {
        const int64_t statistic = walk.statistic(group, channel);
        const float rstd = __ldg(norm.rstd + statistic);
        const int64_t statistics = norm.shape.samples * group.groups;
        correction.constant[index] = rstd * (__ldg(arguments.sums + statistic) * arguments.share);
        correction.multiple[index] = rstd * (__ldg(arguments.sums + statistics + statistic) * arguments.share) * rstd;
      } else {
        correction.constant[index] = __ldg(arguments.sums + channel) * arguments.share;
        correction.multiple[index] = __ldg(arguments.sums + norm.shape.channels + channel) * arguments.share *
                                     __ldg(norm.rstd + channel);
      }
    }
  }

  for (int start = 0; start < walk.items; start += packs * walk.step) {
    BackwardPack<Element, width> data[packs];
    Walk<width, rows, apart> behind = walk;
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if (walk.valid()) data[pack].load(norm, walk, reads_input);
      walk.advance();
    }
    behind.forget_places();
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if (behind.valid()) {
        float gradients[width];
        data[pack].keep_packed();
        data[pack].template gradients<apart>(norm, affine, gradients);
        if (!apart && norm.grad_residual != nullptr) {
          store_gradient<Element>(norm.grad_residual, norm.shape, behind, gradients);
        }
        if (norm.grad_input != nullptr) {
#pragma unroll
          for (int index = 0; index < width; ++index) {
            const int channel = channels == 1 ? 0 : index;
            if constexpr (apart) gradients[index] *= affine.scale[channel];
            if (corrects) {
              const float centred = value_of(data[pack].input, index) - affine.mean[channel];
              gradients[index] -= correction.constant[channel] + centred * correction.multiple[channel];
            }
            if constexpr (!apart) gradients[index] *= affine.scale[channel];
          }
          store_gradient<Element>(norm.grad_input, norm.shape, behind, gradients);
        }
      }
      behind.advance();
    }
  }
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    batch_norm_gradient_kernel(const GradientArguments arguments) {
  stream_gradient<Element, rows, width, false>(arguments, {});
}

}  // namespace fastreg::cuda
