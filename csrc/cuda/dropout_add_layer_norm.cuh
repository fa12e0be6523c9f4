// Launchers of dropout + residual + layer norm and, with centred = false, + RMS norm: raw pointers, no torch type.
//
// The kernels are in dropout_add_layer_norm_forward.cuh and dropout_add_layer_norm_backward.cuh, how they are laid out
// is in dropout_add_layer_norm_plan.h; a problem's element is the sum's.

#pragma once

#include "dropout_add_layer_norm_backward.cuh"
#include "dropout_add_layer_norm_forward.cuh"
#include "layer_norm.cuh"

namespace fastreg::cuda {

inline ForwardArguments& norm_of(DropoutAddForwardArguments& arguments) { return arguments.norm; }
inline BackwardArguments& norm_of(DropoutAddBackwardArguments& arguments) { return arguments.norm; }

// As NormKernels.
template <class Sum, bool centred>
struct DropoutAddNormKernels {
  using Element = Sum;
  static constexpr bool fused = true;

  template <int width>
  static constexpr int packs = fused_forward_packs(width);

  static ForwardPlan plan_forward(const Problem& problem, const DeviceTraits& device) {
    return fused_forward_plan(problem, device);
  }

  template <int width, int packs>
  static cudaError_t forward(const Launch& shape, const DropoutAddForwardArguments& arguments) {
    return launch<dropout_add_forward_kernel<Sum, centred, width, packs>>(shape, arguments);
  }

  template <int width>
  static cudaError_t forward_looped(const Launch& shape, const DropoutAddForwardArguments& arguments) {
    return launch<dropout_add_forward_looped_kernel<Sum, centred, width>>(shape, arguments);
  }

  template <int width, bool sums_in_shared>
  static cudaError_t backward(const Launch& shape, const DropoutAddBackwardArguments& arguments) {
    return launch<dropout_add_backward_kernel<Sum, centred, width, sums_in_shared>>(shape, arguments);
  }

  template <int width, bool sums_in_shared>
  static cudaError_t resident(const Launch& shape, int64_t& clusters) {
    return resident_clusters<dropout_add_backward_kernel<Sum, centred, width, sums_in_shared>>(shape, clusters);
  }

  template <int width>
  static cudaError_t backward_looped(const Launch& shape, const DropoutAddBackwardArguments& arguments) {
    return launch<dropout_add_backward_looped_kernel<Sum, centred, width>>(shape, arguments);
  }

  template <int width>
  static cudaError_t backward_columns(const Launch& shape, const DropoutAddBackwardArguments& arguments) {
    return launch<dropout_add_backward_columns_kernel<Sum, centred, width>>(shape, arguments);
  }

  static bool wants_input(const DropoutAddBackwardArguments& arguments) {
    return arguments.norm.grad_input != nullptr || arguments.grad_residual != nullptr ||
           arguments.scale_partials != nullptr;
  }

  static bool wants_sums(const DropoutAddBackwardArguments& arguments) {
    return arguments.norm.weight_partials != nullptr || arguments.norm.bias_partials != nullptr ||
           arguments.scale_partials != nullptr;
  }
};

// --- whether packs can be loaded -------------------------------------------------------------------------------------

// A pack of a tensor beside the sum has as many elements as one of the sum.
inline bool wide_rows_beside(const void* data, int64_t row_stride, DType dtype, int width) {
  const int64_t bytes = width * fastreg::element_size(dtype);
  return data == nullptr ||
         (aligned(data, static_cast<uintptr_t>(bytes)) && row_stride * fastreg::element_size(dtype) % bytes == 0);
}

// The arguments of a problem that may have packs of `width` elements: of the sum, 16 bytes each.
inline bool has_packs(const DropoutAddForwardArguments& arguments, int width) {
  const ForwardArguments& norm = arguments.norm;
  const int size = 16 / width;
  return norm.columns % width == 0 && wide_rows_beside(norm.input, norm.row_stride, arguments.dtype, width) &&
         wide_rows_beside(norm.output, norm.columns, arguments.dtype, width) &&
         wide_rows_beside(arguments.residual.data, arguments.residual_stride, arguments.residual.dtype, width) &&
         wide_rows(arguments.sum, norm.columns, size) && wide_parameter(norm.weight, size) &&
         wide_parameter(norm.bias, size) && wide_parameter(arguments.branch.layer_scale, size);
}

inline bool has_packs(const DropoutAddBackwardArguments& arguments, int width) {
  const BackwardArguments& norm = arguments.norm;
  const int size = 16 / width;
  return norm.columns % width == 0 &&
         wide_rows_beside(norm.grad_output, norm.grad_output_stride, arguments.dtype, width) &&
         wide_rows_beside(norm.grad_input, norm.columns, arguments.dtype, width) &&
         wide_rows_beside(arguments.input, arguments.input_stride, arguments.dtype, width) &&
         wide_rows(norm.input, norm.input_stride, size) &&
         wide_rows(arguments.grad_sum, arguments.grad_sum_stride, size) &&
         wide_rows(arguments.grad_residual, norm.columns, size) && wide_parameter(norm.weight, size) &&
         wide_parameter(arguments.branch.layer_scale, size);
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class Sum, bool centred>
cudaError_t launch_dropout_add_forward(const DropoutAddForwardArguments& arguments, const DeviceTraits& device,
                                       cudaStream_t stream) {
  const Problem problem{arguments.norm.rows, arguments.norm.columns, sizeof(Sum), centred,
                        has_packs(arguments, full_width<Sum>), true, false};
  return launch_forward<DropoutAddNormKernels<Sum, centred>>(problem, arguments, device, stream);
}

// --- backward --------------------------------------------------------------------------------------------------------

// What a caller has to know before it allocates the partial sums and, for a looped plan, the means of the rows.
template <class Sum, bool centred>
cudaError_t plan_dropout_add_backward(const DropoutAddBackwardArguments& arguments, bool wants_layer_scale,
                                      const DeviceTraits& device, BackwardPlan& plan) {
  const Problem problem{arguments.norm.rows, arguments.norm.columns, sizeof(Sum), centred,
                        has_packs(arguments, full_width<Sum>), true, wants_layer_scale};
  return plan_backward<DropoutAddNormKernels<Sum, centred>>(problem, device, plan);
}

template <class Sum, bool centred>
cudaError_t launch_dropout_add_backward(const BackwardPlan& plan, const DropoutAddBackwardArguments& arguments,
                                        cudaStream_t stream) {
  return launch_backward<DropoutAddNormKernels<Sum, centred>>(plan, arguments, stream);
}

// As launch_reduce().
template <bool centred>
cudaError_t launch_dropout_add_reduce(const ReduceArguments& arguments, int gradients, cudaStream_t stream) {
  const int64_t blocks = divide_up(arguments.columns, reduce_columns) * gradients;
  return launch<dropout_add_reduce_partials_kernel<centred>>(Launch{blocks, reduce_threads, 1, 0, false, stream},
                                                             arguments);
}

}  // namespace fastreg::cuda
