// The door of layer norm and RMS norm: checks, allocation, the switch on the dtype, and the launches. `centred` says
// which of the two; layer_norm.cu and rms_norm.cu register them.

#pragma once

#include <limits>

#include "door.h"
#include "layer_norm.cuh"

namespace fastreg::cuda {

inline RowView norm_rows(const Tensor& tensor, int64_t normalized_ndim, const char* op, const char* name) {
  const RowView view = row_view(tensor, normalized_ndim, op, name);
  if (view.hidden > std::numeric_limits<int>::max()) {
    fail(op, "the CUDA kernels take hidden sizes up to 2147483647, not ", view.hidden, ".");
  }
  return view;
}

template <bool centred>
struct Statistics {
  float* mean;
  float* rstd;

  Statistics(void* data, int64_t rows)
      : mean(centred ? static_cast<float*>(data) : nullptr), rstd(static_cast<float*>(data) + (centred ? rows : 0)) {}
};

// --- forward ---------------------------------------------------------------------------------------------------------

struct NormOutputs {
  Tensor output;
  Tensor statistics;
};

template <bool centred>
NormOutputs norm_forward(const char* op, const Tensor& input, int64_t normalized_ndim,
                         const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const RowView rows = norm_rows(input, normalized_ndim, op, "input");
  const VectorView weight_view = parameter_view(weight, rows, op, "weight");
  const VectorView bias_view = parameter_view(bias, rows, op, "bias");

  const int64_t statistics_sizes[] = {2, rows.rows};
  const auto allocate_statistics = [&] {
    return centred ? new_tensor(statistics_sizes, 2, DType::Float32, rows.device, op)
                   : new_vector(rows.rows, DType::Float32, rows.device, op);
  };
  NormOutputs outputs{new_tensor(rows.sizes, rows.dimensions, rows.dtype, rows.device, op), allocate_statistics()};
  if (rows.rows == 0 || rows.hidden == 0) {
    return outputs;
  }

  const OnDevice device(rows.device, op);
  const Statistics<centred> statistics(data_of(outputs.statistics, op), rows.rows);
  const ForwardArguments arguments{.input = rows.data,
                                   .output = data_of(outputs.output, op),
                                   .mean = statistics.mean,
                                   .rstd = statistics.rstd,
                                   .weight = parameter_of(weight_view),
                                   .bias = parameter_of(bias_view),
                                   .rows = rows.rows,
                                   .row_stride = rows.row_stride,
                                   .columns = static_cast<int>(rows.hidden),
                                   .threads_per_row = 0,
                                   .cluster = 1,
                                   .eps = static_cast<float>(eps)};
  const cudaError_t error = with_element(rows.dtype, op, [&]<class Element>() {
    return launch_forward<Element, centred>(arguments, device.traits(), device.stream());
  });
  check_cuda(error, op, "launch");
  return outputs;
}

// --- backward --------------------------------------------------------------------------------------------------------

struct NormGradients {
  Tensor input;
  Tensor weight;
  Tensor bias;
};

struct NormMask {
  bool input;
  bool weight;
  bool bias;
};

// A gradient of the parameter's shape and dtype, or nothing where it is not asked for.
inline Tensor parameter_gradient(bool wanted, const VectorView& view, const std::optional<Tensor>& parameter,
                                 const RowView& rows, const char* op) {
  if (!wanted) {
    return empty_gradient(view.given ? view.dtype : rows.dtype, rows.device, op);
  }
  const auto sizes = parameter->sizes();
  return new_tensor(sizes.data(), static_cast<int64_t>(sizes.size()), view.dtype, rows.device, op);
}

// Adds up the partial sums; without rows there are none, and the gradients become zeros.
template <bool centred>
void reduce_gradients(const BackwardArguments& arguments, int64_t partials, const NormGradients& gradients,
                      const VectorView& weight, const VectorView& bias, const NormMask& mask, const OnDevice& device,
                      const char* op) {
  ReduceArguments reduce{{}, {}, partials, arguments.columns};
  if (mask.weight) reduce.first = {arguments.weight_partials, data_of(gradients.weight, op), weight.dtype};
  if (mask.bias) {
    ReduceArguments::Gradient& target = mask.weight ? reduce.second : reduce.first;
    target = {arguments.bias_partials, data_of(gradients.bias, op), bias.dtype};
  }
  const int wanted = (mask.weight ? 1 : 0) + (mask.bias ? 1 : 0);
  check_cuda(launch_reduce<centred>(reduce, wanted, device.stream()), op, "launch");
}

template <bool centred>
NormGradients norm_backward(const char* op, const Tensor& grad_output, const Tensor& input, int64_t normalized_ndim,
                            const Tensor& statistics, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, const NormMask& mask) {
  const RowView rows = norm_rows(input, normalized_ndim, op, "input");
  const RowView grad_rows = norm_rows(grad_output, normalized_ndim, op, "grad_output");
  check_like(grad_rows, rows, op, "grad_output");
  const VectorView statistics_rows = statistics_view(statistics, centred ? 2 : 1, rows, op);
  const VectorView weight_view = parameter_view(weight, rows, op, "weight");
  const VectorView bias_view = parameter_view(bias, rows, op, "bias");
  check_mask(mask.weight, weight_view, op, "weight");
  check_mask(mask.bias, bias_view, op, "bias");

  const NormGradients gradients{mask.input ? new_tensor(rows.sizes, rows.dimensions, rows.dtype, rows.device, op)
                                           : empty_gradient(rows.dtype, rows.device, op),
                                parameter_gradient(mask.weight, weight_view, weight, rows, op),
                                parameter_gradient(mask.bias, bias_view, bias, rows, op)};
  if (rows.hidden == 0 || !(mask.input || mask.weight || mask.bias)) {
    return gradients;
  }

  const OnDevice device(rows.device, op);
  const Statistics<centred> saved(const_cast<void*>(statistics_rows.data), rows.rows);
  BackwardArguments arguments{.grad_output = grad_rows.data,
                              .input = rows.data,
                              .mean = saved.mean,
                              .rstd = saved.rstd,
                              .weight = parameter_of(weight_view),
                              .grad_input = mask.input ? data_of(gradients.input, op) : nullptr,
                              .weight_partials = nullptr,
                              .bias_partials = nullptr,
                              .rows = rows.rows,
                              .grad_output_stride = grad_rows.row_stride,
                              .input_stride = rows.row_stride,
                              .columns = static_cast<int>(rows.hidden),
                              .threads_per_row = 0,
                              .cluster = 1};
  // Lives until the kernels are launched; torch's allocator reuses it for later work of the same stream only.
  std::optional<Tensor> partial_sums;
  int64_t partials = 0;
  if (rows.rows > 0) {
    const cudaError_t error = with_element(rows.dtype, op, [&]<class Element>() {
      BackwardPlan plan;
      const cudaError_t planned = plan_backward<Element, centred>(arguments, device.traits(), plan);
      if (planned != cudaSuccess) {
        return planned;
      }
      partials = plan.partials;
      const int64_t elements = partials * rows.hidden;
      if (mask.weight || mask.bias) {
        partial_sums =
            new_vector(elements * ((mask.weight ? 1 : 0) + (mask.bias ? 1 : 0)), DType::Float32, rows.device, op);
        float* memory = static_cast<float*>(data_of(*partial_sums, op));
        if (mask.weight) arguments.weight_partials = memory;
        if (mask.bias) arguments.bias_partials = memory + (mask.weight ? elements : 0);
      }
      return launch_backward<Element, centred>(plan, arguments, device.stream());
    });
    check_cuda(error, op, "launch");
  }
  if (mask.weight || mask.bias) {
    reduce_gradients<centred>(arguments, partials, gradients, weight_view, bias_view, mask, device, op);
  }
  return gradients;
}

}  // namespace fastreg::cuda
