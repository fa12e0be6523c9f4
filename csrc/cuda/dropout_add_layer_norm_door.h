// The door of dropout + residual + layer norm and + RMS norm: checks, allocation, the switch on the sum's dtype, and
// the launches. `centred` says which of the two; dropout_add_layer_norm.cu and dropout_add_rms_norm.cu register them.

#pragma once

#include <utility>
#include <vector>

#include "dropout_add_layer_norm.cuh"
#include "dropout_door.h"
#include "layer_norm_door.h"

namespace fastreg::cuda {

// --- what is given ---------------------------------------------------------------------------------------------------

// What is done to the branch.
struct BranchTensors {
  const std::optional<Tensor>& row_scale;
  const std::optional<Tensor>& layer_scale;
  const std::optional<Tensor>& seed;
  int64_t threshold;
  const std::optional<Tensor>& dynamic_threshold;
};

// One for each index of the first dimensions, rows all of them.
inline VectorView row_scale_view(const std::optional<Tensor>& tensor, const RowView& rows, int64_t normalized_ndim,
                                 const char* op) {
  if (!tensor.has_value()) {
    return {};
  }
  const auto sizes = tensor->sizes();
  const int64_t given = static_cast<int64_t>(sizes.size());
  bool fits = given <= rows.dimensions - normalized_ndim;
  int64_t elements = 1;
  for (int64_t dimension = 0; fits && dimension < given; ++dimension) {
    fits = sizes[static_cast<size_t>(dimension)] == rows.sizes[dimension];
    elements *= rows.sizes[dimension];
  }
  if (!fits) {
    fail(op, "row_scale must have the first dimensions of input's shape, those before the normalised ones.");
  }
  const VectorView view = vector_view(*tensor, elements, rows.device, op, "row_scale");
  if (view.dtype == DType::Float64) {
    fail(op, "row_scale is float64 but input is ", name_of(rows.dtype), "; float64 mixes with no other dtype.");
  }
  return view;
}

inline BranchArguments branch_arguments(const BranchTensors& tensors, const VectorView& row_scale,
                                        int64_t row_scales, const VectorView& layer_scale, const RowView& rows,
                                        const char* op) {
  check_threshold(tensors.threshold, half_lane_count, op);
  return {.row_scale = parameter_of(row_scale),
          .layer_scale = parameter_of(layer_scale),
          .scale_rows = divisor_of(larger(rows.rows / larger(row_scales, 1), 1)),
          .seed = number_on_device(tensors.seed, rows.device, op, "seed"),
          .dynamic_threshold = number_on_device(tensors.dynamic_threshold, rows.device, op, "dynamic_threshold"),
          .threshold = tensors.threshold,
          .scale = static_cast<float>(keep_scale(static_cast<uint64_t>(tensors.threshold), half_lane_count))};
}

// The shape and device of another one.
inline void check_shape_like(const RowView& view, const RowView& other, const char* op, const char* name,
                             const char* other_name) {
  bool same = view.dimensions == other.dimensions && view.device == other.device;
  for (int64_t dimension = 0; same && dimension < other.dimensions; ++dimension) {
    same = view.sizes[dimension] == other.sizes[dimension];
  }
  if (!same) {
    fail(op, name, " must have the shape and device of ", other_name, ".");
  }
}

// The branch's scales and mask, of tensors with these rows.
inline BranchArguments branch_of(const BranchTensors& tensors, const VectorView& layer_scale, const RowView& rows,
                                 int64_t normalized_ndim, const char* op) {
  const VectorView row_scale = row_scale_view(tensors.row_scale, rows, normalized_ndim, op);
  int64_t row_scales = 1;
  if (row_scale.given) {
    check_call(aoti_torch_get_numel(tensors.row_scale->get(), &row_scales), op, "read a size");
  }
  return branch_arguments(tensors, row_scale, row_scales, layer_scale, rows, op);
}

// --- forward ---------------------------------------------------------------------------------------------------------

struct DropoutAddNormOutputs {
  Tensor output;
  Tensor sum;
  Tensor statistics;
};

template <bool centred>
DropoutAddNormOutputs dropout_add_norm_forward(const char* op, const Tensor& input,
                                               const std::optional<Tensor>& residual, int64_t normalized_ndim,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               const BranchTensors& tensors, double eps, bool float_sum,
                                               bool keep_sum) {
  const RowView rows = norm_rows(input, normalized_ndim, op, "input");
  const VectorView weight_view = parameter_view(weight, rows, op, "weight");
  const VectorView bias_view = parameter_view(bias, rows, op, "bias");
  const VectorView layer_scale = parameter_view(tensors.layer_scale, rows, op, "layer_scale");
  const BranchArguments branch = branch_of(tensors, layer_scale, rows, normalized_ndim, op);
  Parameter added{nullptr, DType::Float32};
  int64_t added_stride = 0;
  DType sum_dtype = rows.dtype;
  if (residual.has_value()) {
    const RowView residual_rows = norm_rows(*residual, normalized_ndim, op, "residual");
    check_shape_like(residual_rows, rows, op, "residual", "input");
    if (residual_rows.dtype != rows.dtype && residual_rows.dtype != DType::Float32) {
      fail(op, "residual must be float32 or input's ", name_of(rows.dtype), ", not ", name_of(residual_rows.dtype),
           ".");
    }
    added = {residual_rows.data, residual_rows.dtype};
    added_stride = residual_rows.row_stride;
    sum_dtype = residual_rows.dtype;
  }
  if (float_sum) sum_dtype = accumulation_dtype(rows.dtype);

  const int64_t statistics_sizes[] = {2, rows.rows};
  const auto allocate_statistics = [&] {
    return centred ? new_tensor(statistics_sizes, 2, DType::Float32, rows.device, op)
                   : new_vector(rows.rows, DType::Float32, rows.device, op);
  };
  DropoutAddNormOutputs outputs{new_tensor(rows.sizes, rows.dimensions, rows.dtype, rows.device, op),
                                keep_sum ? new_tensor(rows.sizes, rows.dimensions, sum_dtype, rows.device, op)
                                         : new_vector(0, sum_dtype, rows.device, op),
                                allocate_statistics()};
  if (rows.rows == 0 || rows.hidden == 0) {
    return outputs;
  }

  const OnDevice device(rows.device, op);
  const Statistics<centred> statistics(data_of(outputs.statistics, op), rows.rows);
  const DropoutAddForwardArguments arguments{.norm = {.input = rows.data,
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
                                                      .eps = static_cast<float>(eps)},
                                             .dtype = rows.dtype,
                                             .residual = added,
                                             .residual_stride = added_stride,
                                             .sum = keep_sum ? data_of(outputs.sum, op) : nullptr,
                                             .branch = branch};
  const cudaError_t error = with_element(sum_dtype, op, [&]<class Sum>() {
    return launch_dropout_add_forward<Sum, centred>(arguments, device.traits(), device.stream());
  });
  check_cuda(error, op, "launch");
  return outputs;
}

// --- backward --------------------------------------------------------------------------------------------------------

struct DropoutAddNormGradients {
  Tensor input;
  Tensor residual;
  Tensor weight;
  Tensor bias;
  Tensor layer_scale;
};

struct DropoutAddNormMask {
  bool input;
  bool residual;
  bool weight;
  bool bias;
  bool layer_scale;

  int parameters() const { return (weight ? 1 : 0) + (bias ? 1 : 0) + (layer_scale ? 1 : 0); }
};

inline DType dtype_of_input(int64_t number, DType sum, const char* op) {
  if (number < 0 || number > static_cast<int64_t>(DType::Float64)) {
    fail(op, "input_dtype must be a number from 0 to ", static_cast<int>(DType::Float64), ", but is ", number, ".");
  }
  const DType dtype = static_cast<DType>(number);
  if (dtype != sum && (sum != DType::Float32 || dtype == DType::Float64)) {
    fail(op, "sum must be float32 or input's ", name_of(dtype), ", not ", name_of(sum), ".");
  }
  return dtype;
}

// Adds up the partial sums, two gradients a launch; without rows there are none, and the gradients become zeros.
template <bool centred>
void reduce_dropout_add_gradients(const std::vector<ReduceArguments::Gradient>& gradients, int64_t partials,
                                  int columns, const OnDevice& device, const char* op) {
  for (size_t first = 0; first < gradients.size(); first += 2) {
    const bool two = first + 1 < gradients.size();
    const ReduceArguments reduce{gradients[first], two ? gradients[first + 1] : ReduceArguments::Gradient{}, partials,
                                 columns};
    check_cuda(launch_dropout_add_reduce<centred>(reduce, two ? 2 : 1, device.stream()), op, "launch");
  }
}

template <bool centred>
DropoutAddNormGradients dropout_add_norm_backward(
    const char* op, const Tensor& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const std::optional<Tensor>& input, int64_t normalized_ndim, const Tensor& statistics,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const BranchTensors& tensors,
    int64_t input_dtype, const DropoutAddNormMask& mask) {
  const RowView rows = norm_rows(sum, normalized_ndim, op, "sum");
  const DType dtype = dtype_of_input(input_dtype, rows.dtype, op);
  const auto view_beside = [&](const Tensor& tensor, DType expected, const char* name) {
    const RowView view = norm_rows(tensor, normalized_ndim, op, name);
    check_shape_like(view, rows, op, name, "sum");
    if (view.dtype != expected) {
      fail(op, name, " must be ", name_of(expected), ", not ", name_of(view.dtype), ".");
    }
    return view;
  };
  const RowView grad_rows = view_beside(grad_output, dtype, "grad_output");
  RowView grad_sum_rows{};
  if (grad_sum.has_value()) grad_sum_rows = view_beside(*grad_sum, rows.dtype, "grad_sum");
  const VectorView statistics_rows = statistics_view(statistics, centred ? 2 : 1, rows, op);
  const VectorView weight_view = parameter_view(weight, rows, op, "weight");
  const VectorView bias_view = parameter_view(bias, rows, op, "bias");
  const VectorView layer_scale = parameter_view(tensors.layer_scale, rows, op, "layer_scale");
  const BranchArguments branch = branch_of(tensors, layer_scale, rows, normalized_ndim, op);
  check_mask(mask.weight, weight_view, op, "weight");
  check_mask(mask.bias, bias_view, op, "bias");
  check_mask(mask.layer_scale, layer_scale, op, "layer_scale");
  RowView input_rows{};
  if (mask.layer_scale) {
    if (!input.has_value()) {
      fail(op, "output_mask asks for the gradient of layer_scale, for which input must be given.");
    }
    input_rows = view_beside(*input, dtype, "input");
  }

  const auto new_rows = [&](bool wanted, DType of_gradient) {
    return wanted ? new_tensor(rows.sizes, rows.dimensions, of_gradient, rows.device, op)
                  : empty_gradient(of_gradient, rows.device, op);
  };
  const DropoutAddNormGradients gradients{
      new_rows(mask.input, dtype), new_rows(mask.residual, rows.dtype),
      parameter_gradient(mask.weight, weight_view, weight, rows, op),
      parameter_gradient(mask.bias, bias_view, bias, rows, op),
      parameter_gradient(mask.layer_scale, layer_scale, tensors.layer_scale, rows, op)};
  if (rows.hidden == 0 || !(mask.input || mask.residual || mask.parameters() > 0)) {
    return gradients;
  }

  const OnDevice device(rows.device, op);
  const Statistics<centred> saved(const_cast<void*>(statistics_rows.data), rows.rows);
  DropoutAddBackwardArguments arguments{
      .norm = {.grad_output = grad_rows.data,
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
               .cluster = 1},
      .dtype = dtype,
      .grad_sum = grad_sum_rows.data,
      .grad_sum_stride = grad_sum_rows.row_stride,
      .grad_residual = mask.residual ? data_of(gradients.residual, op) : nullptr,
      .input = input_rows.data,
      .input_stride = input_rows.row_stride,
      .scale_partials = nullptr,
      .row_means = nullptr,
      .branch = branch};
  // Both live until the kernels are launched; torch's allocator reuses them for later work of the same stream only.
  std::optional<Tensor> partial_sums;
  std::optional<Tensor> row_means;
  int64_t partials = 0;
  if (rows.rows > 0) {
    const cudaError_t error = with_element(rows.dtype, op, [&]<class Sum>() {
      BackwardPlan plan;
      const cudaError_t planned =
          plan_dropout_add_backward<Sum, centred>(arguments, mask.layer_scale, device.traits(), plan);
      if (planned != cudaSuccess) {
        return planned;
      }
      partials = plan.partials;
      const int64_t elements = partials * rows.hidden;
      if (mask.parameters() > 0) {
        partial_sums = new_vector(elements * mask.parameters(), DType::Float32, rows.device, op);
        float* memory = static_cast<float*>(data_of(*partial_sums, op));
        const auto take = [&](bool wanted) { return wanted ? std::exchange(memory, memory + elements) : nullptr; };
        arguments.norm.weight_partials = take(mask.weight);
        arguments.norm.bias_partials = take(mask.bias);
        arguments.scale_partials = take(mask.layer_scale);
      }
      if (mask.layer_scale && plan.kind == BackwardKind::looped) {
        row_means = new_vector(rows.rows * (centred ? 2 : 1), DType::Float32, rows.device, op);
        arguments.row_means = static_cast<float*>(data_of(*row_means, op));
      }
      return launch_dropout_add_backward<Sum, centred>(plan, arguments, device.stream());
    });
    check_cuda(error, op, "launch");
  }
  std::vector<ReduceArguments::Gradient> reduced;
  if (mask.weight) {
    reduced.push_back({arguments.norm.weight_partials, data_of(gradients.weight, op), weight_view.dtype});
  }
  if (mask.bias) {
    reduced.push_back({arguments.norm.bias_partials, data_of(gradients.bias, op), bias_view.dtype});
  }
  if (mask.layer_scale) {
    reduced.push_back({arguments.scale_partials, data_of(gradients.layer_scale, op), layer_scale.dtype});
  }
  reduce_dropout_add_gradients<centred>(reduced, partials, arguments.norm.columns, device, op);
  return gradients;
}

}  // namespace fastreg::cuda
