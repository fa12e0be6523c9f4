// Batch norm on a GPU: what its kernels are told, and what they do with one pack of elements. n = samples * spatial:
//
//   output = activation(fma(input - mean, scale, bias) + residual)      scale = rstd * weight
//   mean, M2 over the n elements of a channel, rstd = 1 / sqrt(M2 / n + eps)
//
// A tensor is (samples, channels, spatial) and lies in memory as planes or as rows (csrc/channels.h). Both are lines of
// adjacent elements: the spatial elements of one plane, all in one channel, or the channels of one row. A pack lies
// within a line, and has `channels` channels: one if it is of a plane, as many as elements if it is of a row. Functions
// here take that number as a template parameter, and serve both families.
//
// Two families of kernels share this file: batch_norm_forward.cuh and batch_norm_backward.cuh stream through memory,
// batch_norm_resident*.cuh keep a slab of channels on chip. The pre-activation z is computed by the same roundings in
// all of them, so that backward finds the sign that forward took.

#pragma once

#include "activation.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastreg::cuda {

// --- arguments -------------------------------------------------------------------------------------------------------

// Strides are those of samples (planes) or of rows, in elements. What this launch writes is dense.
struct ChannelShape {
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  bool rows;  // the family

  __host__ __device__ int64_t per_channel() const { return samples * spatial; }
  __host__ __device__ int64_t dense_stride() const { return rows ? channels : channels * spatial; }
  // Each line's sign bits begin a new byte.
  __host__ __device__ int64_t sign_bytes_per_line() const { return ((rows ? channels : spatial) + 7) / 8; }
};

// Statistics that a launch updates in place. Null data: there are none.
struct RunningStatistic {
  void* data;
  DType dtype;
};

struct BatchNormForwardArguments {
  const void* input;
  const void* residual;  // or null
  void* output;
  unsigned char* signs;  // or null; never without a residual, and only for relu and leaky_relu
  Parameter weight;
  Parameter bias;
  RunningStatistic running_mean;  // training: updated, evaluation: read
  RunningStatistic running_var;
  float* mean;  // (channels,) each, saved for backward
  float* rstd;
  ChannelShape shape;
  int64_t input_stride;
  int64_t residual_stride;
  ActivationArguments activation;
  float momentum;
  float eps;
  bool skip_nonfinite;  // a channel whose mean or M2 is not finite keeps its running statistics
};

// Null means: not given, or not asked for.
struct BatchNormBackwardArguments {
  const void* grad_output;
  const void* input;
  const void* residual;        // only where z has to be computed again from it
  const unsigned char* signs;  // relu and leaky_relu: instead of z
  const float* mean;           // (channels,) each
  const float* rstd;
  Parameter weight;
  Parameter bias;
  void* grad_input;
  void* grad_residual;
  void* grad_weight;  // in weight's dtype
  void* grad_bias;    // in bias's dtype
  ChannelShape shape;
  int64_t grad_output_stride;
  int64_t input_stride;
  int64_t residual_stride;
  ActivationArguments activation;
  bool training;  // else the statistics are constants

  // Whether dz depends on z.
  __host__ __device__ bool computes_argument() const {
    return signs == nullptr && activation.kind != Activation::identity;
  }
};

// --- what a channel's elements are multiplied by ---------------------------------------------------------------------

// One value of a vector over channels, in whatever dtype.
__device__ __forceinline__ float load_channel(const Parameter& parameter, int64_t channel, float absent) {
  float value[1];
  load_parameter<1>(parameter, channel, absent, value);
  return value[0];
}

template <int channels>
struct Affine {
  float mean[channels];
  float scale[channels];
  float bias[channels];

  __device__ __forceinline__ void set(int index, float channel_mean, float rstd, float weight, float channel_bias) {
    mean[index] = channel_mean;
    scale[index] = rstd * weight;
    bias[index] = channel_bias;
  }

  __device__ __forceinline__ static int of(int element) { return channels == 1 ? 0 : element; }

  // fma, and then a sum of its own: the compiler may contract nothing further, in no kernel.
  __device__ __forceinline__ float argument(int element, float input) const {
    return fmaf(input - mean[of(element)], scale[of(element)], bias[of(element)]);
  }
};

// An element of a pack in fp32. bfloat16 is the upper half of it: taken from whole words, because halves that have been
// taken apart need a register each.
template <class Element, int width>
__device__ __forceinline__ float value_of(const Pack<Element, width>& pack, int index) {
  if constexpr (std::is_same_v<Element, bfloat16> && width > 1) {
    uint32_t words[width / 2];
    memcpy(words, &pack, sizeof(words));
    const uint32_t word = words[index / 2];
    return __uint_as_float(index % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return pack[index];
  }
}

// z of a pack; `residual` is looked at where there is one.
template <int channels, class Element, int width>
__device__ __forceinline__ void arguments_of(const Affine<channels>& affine, const Pack<Element, width>& input,
                                             bool has_residual, const Pack<Element, width>& residual,
                                             float (&arguments)[width]) {
  static_assert(channels == 1 || channels == width);
#pragma unroll
  for (int index = 0; index < width; ++index) arguments[index] = affine.argument(index, value_of(input, index));
  if (has_residual) {
#pragma unroll
    for (int index = 0; index < width; ++index) arguments[index] = arguments[index] + value_of(residual, index);
  }
}

// --- sign bits -------------------------------------------------------------------------------------------------------

// Lanes whose packs together have the bits of one byte: 1, 2 or 8.
template <int width>
inline constexpr int lanes_per_byte = width < 8 ? 8 / width : 1;

// Where the byte with the bits of a pack is, and the first of its bits there.
__device__ __forceinline__ int64_t sign_byte(int64_t line, int64_t bytes_per_line, int64_t element) {
  return line * bytes_per_line + element / 8;
}

// Stores the bits of a pack whose first element is the `element`th of its line. All 32 lanes must call it; the lanes of
// a byte must be neighbours, the first of them at a multiple of their number. `active`: whether this lane has a pack.
template <int width>
__device__ __forceinline__ void store_signs(unsigned char* signs, int64_t line, int64_t bytes_per_line,
                                            int64_t element, bool active, uint32_t bits) {
  bits = active ? bits << (element % 8) : 0u;
#pragma unroll
  for (int distance = 1; distance < lanes_per_byte<width>; distance *= 2) {
    bits |= __shfl_xor_sync(all_lanes, bits, distance);
  }
  if (active && element % 8 == 0) {
    signs[sign_byte(line, bytes_per_line, element)] = static_cast<unsigned char>(bits);
  }
}

__device__ __forceinline__ uint32_t load_signs(const unsigned char* signs, int64_t line, int64_t bytes_per_line,
                                               int64_t element) {
  return static_cast<uint32_t>(__ldg(signs + sign_byte(line, bytes_per_line, element))) >> (element % 8);
}

// --- one pack backward -----------------------------------------------------------------------------------------------

// dz of a pack. `bits`: its sign bits, where they are given.
template <int channels, class Element, int width>
__device__ __forceinline__ void argument_gradients(const ActivationArguments& activation,
                                                   const Affine<channels>& affine,
                                                   const Pack<Element, width>& grad_output,
                                                   const Pack<Element, width>& input, bool has_residual,
                                                   const Pack<Element, width>& residual, bool has_bits, uint32_t bits,
                                                   float (&gradients)[width]) {
#pragma unroll
  for (int index = 0; index < width; ++index) gradients[index] = value_of(grad_output, index);
  if (activation.kind == Activation::identity) {
    return;
  }
  if (has_bits) {
    differentiate_by_bits(activation, bits, gradients);
  } else {
    float arguments[width];
    arguments_of(affine, input, has_residual, residual, arguments);
    differentiate(activation, arguments, gradients);
  }
}

// --- the end of a channel's statistics -------------------------------------------------------------------------------

__device__ __forceinline__ float reciprocal_deviation_of(float variance, float eps) {
  return 1.0f / sqrtf(variance + eps);
}

__device__ __forceinline__ void update_running(const RunningStatistic& running, int64_t channel, float momentum,
                                               float value) {
  if (running.data != nullptr) {
    // Plain loads: the read-only path is for memory that the launch does not write.
    const auto as = [&]<class Element>() { return to_float(static_cast<const Element*>(running.data)[channel]); };
    const float before = running.dtype == DType::Float32    ? as.template operator()<float>()
                         : running.dtype == DType::BFloat16 ? as.template operator()<bfloat16>()
                                                            : as.template operator()<float16>();
    store_parameter(running.data, running.dtype, channel, (1.0f - momentum) * before + momentum * value);
  }
}

__device__ __forceinline__ bool is_finite(float value) { return value - value == 0.0f; }

// By one thread a channel: saves mean and rstd, updates the running statistics, returns rstd.
__device__ __forceinline__ float finish_channel(const BatchNormForwardArguments& arguments, int64_t channel, float mean,
                                                float squares) {
  const float count = static_cast<float>(arguments.shape.per_channel());
  const float rstd = reciprocal_deviation_of(squares / count, arguments.eps);
  arguments.mean[channel] = mean;
  arguments.rstd[channel] = rstd;
  if (!arguments.skip_nonfinite || (is_finite(mean) && is_finite(squares))) {
    update_running(arguments.running_mean, channel, arguments.momentum, mean);
    update_running(arguments.running_var, channel, arguments.momentum, squares / fmaxf(count - 1.0f, 1.0f));
  }
  return rstd;
}

}  // namespace fastreg::cuda
