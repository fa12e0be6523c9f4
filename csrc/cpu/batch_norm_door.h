// What the doors of batch norm's forward and backward operators share: checked arguments, working memory, and the
// tensors that they return.

#pragma once

#include <cstdint>
#include <optional>

#include "../channels.h"
#include "batch_norm.h"
#include "batch_norm_schedule.h"
#include "door.h"

namespace fastreg {

inline const BatchNormKernels& kernels_for(const ChannelView& view) {
  const int index = static_cast<int>(view.dtype);
  return view.rows ? FASTREG_SIMD_VARIANT(batch_norm_rows_kernels)[index]
                   : FASTREG_SIMD_VARIANT(batch_norm_planes_kernels)[index];
}

// --- arguments and results ---------------------------------------------------------------------------------

// One value a channel, in the dtype of accumulation.
inline int64_t vector_bytes_of(const ChannelView& input) {
  return input.channels * element_size(accumulation_dtype(input.dtype));
}

class ChannelScratch {
 public:
  explicit ChannelScratch(const ChannelView& input) : data_(scratch_.reserve(vector_bytes_of(input))) {}
  void* data() const { return data_; }

 private:
  Scratch scratch_;
  void* data_;
};

class PartialScratch {
 public:
  explicit PartialScratch(const BatchNormGeometry& geometry)
      : elements_(geometry.chunks * geometry.channels), channels_(geometry.channels) {
    data_ = static_cast<double*>(scratch_.reserve(2 * elements_ * static_cast<int64_t>(sizeof(double))));
  }
  BatchNormPartials chunk(int64_t index) const {
    return {data_ + index * channels_, data_ + elements_ + index * channels_};
  }

 private:
  Scratch scratch_;
  int64_t elements_;
  int64_t channels_;
  double* data_;
};

// The two rows of a (2, channels) tensor.
struct PairRows {
  PairRows(const void* data, const ChannelView& input)
      : first(const_cast<void*>(data)), second(static_cast<char*>(first) + vector_bytes_of(input)) {}
  void* first;
  void* second;
};

inline Tensor new_pairs(const ChannelView& input, const char* op) {
  const int64_t sizes[] = {2, input.channels};
  return new_tensor(sizes, 2, accumulation_dtype(input.dtype), input.device, op);
}

inline Tensor new_dense(const ChannelView& input, const char* op) {
  int64_t strides[maximum_dimensions];
  dense_strides(input, strides);
  return new_output(input.sizes, strides, input.dimensions, input.dtype, input.device, op);
}

inline BatchNormInput optional_input(const std::optional<Tensor>& tensor, const ChannelView& input, const char* op,
                              const char* name) {
  if (!tensor.has_value()) {
    return {};
  }
  const ChannelView view = channel_view(*tensor, op, name, &input);
  return {view.data, view.outer_stride};
}

inline bool may_stream(const void* output, const ChannelView& input) {
  return may_stream(output, input.elements() * element_size(input.dtype));
}

template <class Scalar>
void multiply(const void* rstd, const void* weight, void* scale, int64_t channels) {
  const Scalar* factors = static_cast<const Scalar*>(weight);
  for (int64_t channel = 0; channel < channels; ++channel) {
    const Scalar value = static_cast<const Scalar*>(rstd)[channel];
    static_cast<Scalar*>(scale)[channel] = factors == nullptr ? value : value * factors[channel];
  }
}

// What all sweeps know, but for statistics, outputs and gradients.
struct [[gnu::visibility("hidden")]] BatchNormProblem {
  BatchNormProblem(const Tensor& input_tensor, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t activation,
                   double negative_slope, const char* op)
      : input(channel_view(input_tensor, op, "input")),
        geometry(batch_norm_geometry(input)),
        weights(channel_vector(weight, input, op, "weight")),
        biases(channel_vector(bias, input, op, "bias")),
        weight_row(weights, input.channels),
        bias_row(biases, input.channels),
        scale(input) {
    norm.geometry = geometry;
    norm.input = {input.data, input.outer_stride};
    norm.residual = optional_input(residual, input, op, "residual");
    norm.scale = scale.data();
    norm.bias = bias_row.data();
    norm.activation = activation_of(activation, op);
    norm.negative_slope = negative_slope;
  }

  bool is_empty() const { return input.elements() == 0; }

  void use_statistics(const void* statistics) {
    const PairRows rows(statistics, input);
    norm.mean = rows.first;
    norm.rstd = rows.second;
  }

  // scale from statistics that are given.
  void use_scale() {
    (input.dtype == DType::Float64 ? multiply<double> : multiply<float>)(norm.rstd, weight_row.data(),
                                                                         scale.data(), input.channels);
  }

  void run(const BatchNormSweeps& sweeps) const {
    run_batch_norm(geometry, element_size(input.dtype), sweeps);
  }

  ChannelView input;
  BatchNormGeometry geometry;
  VectorView weights;
  VectorView biases;
  ParameterRow weight_row;
  ParameterRow bias_row;
  ChannelScratch scale;
  BatchNorm norm{};
};

}  // namespace fastreg
