// What the doors of group norm's operators share: checked arguments, and a sample as a batch norm problem.
//
// Group norm is batch norm with a problem a sample, in which the D channels of a group share their statistics; the
// kernels are batch norm's. What differs is between the sweeps: sums are gathered over a group, and what comes of them
// is handed to its channels again.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>

#include "batch_norm_door.h"
#include "group_norm_schedule.h"

namespace fastreg {

inline const BatchNormKernels& planes_kernels(DType dtype) {
  return FASTREG_SIMD_VARIANT(batch_norm_planes_kernels)[static_cast<int>(dtype)];
}

inline const BatchNormKernels& rows_kernels(DType dtype) {
  return FASTREG_SIMD_VARIANT(batch_norm_rows_kernels)[static_cast<int>(dtype)];
}

// A view of one sample, with other channels than the tensor has, or the same.
inline ChannelView sample_view(const ChannelView& input, bool rows, int64_t channels, int64_t spatial) {
  ChannelView view = input;
  view.rows = rows;
  view.samples = 1;
  view.channels = channels;
  view.spatial = spatial;
  return view;
}

inline const void* advance(const void* data, int64_t elements, DType dtype) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * element_size(dtype);
}

inline void* advance(void* data, int64_t elements, DType dtype) {
  return const_cast<void*>(advance(static_cast<const void*>(data), elements, dtype));
}

// Arrays of one value a channel of a sample: some of double, and some in the dtype of accumulation, which is Scalar.
class SampleScratch {
 public:
  SampleScratch(const ChannelView& sample, int64_t doubles, int64_t count)
      : stride_(rounded(vector_bytes_of(sample))),
        doubles_stride_(rounded(sample.channels * element_size(DType::Float64))) {
    data_ = static_cast<char*>(scratch_.reserve(doubles * doubles_stride_ + count * stride_));
    others_ = data_ + doubles * doubles_stride_;
  }

  double* doubles(int64_t index) const { return reinterpret_cast<double*>(data_ + index * doubles_stride_); }

  template <class Scalar>
  Scalar* array(int64_t index) const {
    return reinterpret_cast<Scalar*>(others_ + index * stride_);
  }

 private:
  static int64_t rounded(int64_t bytes) { return parts_of(bytes, cache_line) * cache_line; }

  Scratch scratch_;
  int64_t stride_;
  int64_t doubles_stride_;
  char* data_;
  char* others_;
};

// What all sweeps know.
struct [[gnu::visibility("hidden")]] GroupNormProblem {
  GroupNormProblem(const Tensor& input_tensor, int64_t group_count, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, int64_t activation, double negative_slope, const char* op)
      : input(channel_view(input_tensor, op, "input")),
        groups(group_count),
        weights(channel_vector(weight, input, op, "weight")),
        biases(channel_vector(bias, input, op, "bias")),
        weight_row(weights, input.channels),
        bias_row(biases, input.channels) {
    // No channels may be no groups.
    const int64_t divisor = std::max<int64_t>(groups, 1);
    if (groups < (input.channels == 0 ? 0 : 1) || input.channels % divisor != 0) {
      fail(op, "groups must divide input's ", input.channels, " channels, but is ", groups, ".");
    }
    contiguous_groups = !input.rows || input.spatial == 1;
    const int64_t group_channels = input.channels / divisor;
    group = sample_view(input, false, groups, group_channels * input.spatial);
    // Without parameters nothing tells the channels of a group apart.
    const bool alike = contiguous_groups && !weights.given && !biases.given;
    sample = alike ? group : sample_view(input, input.rows, input.channels, input.spatial);
    channels_per_group = sample.channels / divisor;
    norm.geometry = batch_norm_geometry(sample);
    norm.input = {input.data, input.outer_stride};
    norm.bias = bias_row.data();
    norm.activation = activation_of(activation, op);
    norm.negative_slope = negative_slope;
  }

  bool is_empty() const { return input.elements() == 0; }
  int64_t group_elements() const { return group.spatial; }
  int64_t sample_elements() const { return input.channels * input.spatial; }
  int64_t statistics_elements() const { return input.samples * groups; }

  const BatchNormKernels& kernels() const { return kernels_for(sample); }

  GroupNormPlan plan(std::function<std::unique_ptr<GroupNormWorker>()> new_worker) const {
    return {.samples = input.samples,
            .groups = groups,
            .group_elements = group_elements(),
            .sums = {.wanted = true, .geometry = norm.geometry, .channels_per_group = channels_per_group},
            .outputs = {.wanted = true, .geometry = norm.geometry, .channels_per_group = channels_per_group},
            .bytes_read_twice = element_size(input.dtype),
            .new_worker = std::move(new_worker)};
  }

  // The same problem, of one sample.
  BatchNorm of_sample(int64_t index) const {
    BatchNorm result = norm;
    const auto move = [&](BatchNormInput& tensor) {
      tensor.data = advance(tensor.data, index * (input.rows ? input.spatial : 1) * tensor.outer_stride, input.dtype);
    };
    move(result.input);
    move(result.grad_output);
    result.output = advance(norm.output, index * sample_elements(), input.dtype);
    result.grad_input = advance(norm.grad_input, index * sample_elements(), input.dtype);
    return result;
  }

  ChannelView input;
  int64_t groups;
  VectorView weights;
  VectorView biases;
  ParameterRow weight_row;
  ParameterRow bias_row;
  bool contiguous_groups;
  ChannelView group;   // of one sample: its groups as planes, where they are contiguous
  ChannelView sample;  // what the kernels take it for
  int64_t channels_per_group;
  BatchNorm norm{};
};

// squares: sums of squared deviations, one a sample and group, are also stored there unless null.
std::tuple<Tensor, Tensor> group_norm_forward(GroupNormProblem& problem, double eps, void* squares, const char* op);

}  // namespace fastreg
