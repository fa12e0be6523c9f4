// Launchers of layer norm and, with centred = false, of RMS norm: raw pointers, no torch type.
//
// The kernels are in layer_norm_forward.cuh, layer_norm_backward.cuh and layer_norm_backward_looped.cuh, the choice
// among them in layer_norm_plan.h.

#pragma once

#include "launch.cuh"
#include "layer_norm_backward.cuh"
#include "layer_norm_backward_looped.cuh"
#include "layer_norm_forward.cuh"

namespace fastreg::cuda {

// Packs of 16 bytes need every pointer and row stride to be a multiple of them.
inline bool wide_rows(const void* data, int64_t row_stride, int element_size) {
  return aligned(data, 16) && row_stride * element_size % 16 == 0;
}

// A pack of a parameter has as many elements as one of the activations.
inline bool wide_parameter(const Parameter& parameter, int element_size) {
  const uintptr_t bytes = static_cast<uintptr_t>(16 / element_size * fastreg::element_size(parameter.dtype));
  return parameter.data == nullptr || aligned(parameter.data, bytes < 16 ? bytes : 16);
}

// The kernels of an op, each launched by a function of this class: those of layer norm and RMS norm. Dropout + residual
// + norm has another such class (dropout_add_layer_norm.cuh).
template <class element, bool centred>
struct NormKernels {
  using Element = element;  // of the rows that are normalised
  static constexpr bool fused = false;

  static ForwardPlan plan_forward(const Problem& problem, const DeviceTraits& device) {
    return forward_plan(problem, device);
  }

  template <int width, int packs>
  static cudaError_t forward(const Launch& shape, const ForwardArguments& arguments) {
    return launch<forward_kernel<Element, centred, width, packs, forward_rows(width, packs)>>(shape, arguments);
  }

  template <int width>
  static cudaError_t forward_looped(const Launch& shape, const ForwardArguments& arguments) {
    return launch<forward_looped_kernel<Element, centred, width>>(shape, arguments);
  }

  template <int width, bool sums_in_shared>
  static cudaError_t backward(const Launch& shape, const BackwardArguments& arguments) {
    return launch<backward_kernel<Element, centred, width, sums_in_shared>>(shape, arguments);
  }

  template <int width, bool sums_in_shared>
  static cudaError_t resident(const Launch& shape, int64_t& clusters) {
    return resident_clusters<backward_kernel<Element, centred, width, sums_in_shared>>(shape, clusters);
  }

  template <int width>
  static cudaError_t backward_looped(const Launch& shape, const BackwardArguments& arguments) {
    return launch<backward_looped_kernel<Element, centred, width>>(shape, arguments);
  }

  template <int width>
  static cudaError_t backward_columns(const Launch& shape, const BackwardArguments& arguments) {
    return launch<backward_columns_kernel<Element, centred, width>>(shape, arguments);
  }

  static bool wants_input(const BackwardArguments& arguments) { return arguments.grad_input != nullptr; }
  static bool wants_sums(const BackwardArguments& arguments) {
    return arguments.weight_partials != nullptr || arguments.bias_partials != nullptr;
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

inline ForwardArguments& norm_of(ForwardArguments& arguments) { return arguments; }
inline BackwardArguments& norm_of(BackwardArguments& arguments) { return arguments; }

template <class Kernels, int width, class Arguments>
cudaError_t launch_forward_as_planned(const ForwardPlan& plan, Arguments arguments, cudaStream_t stream) {
  norm_of(arguments).threads_per_row = plan.threads_per_row;
  norm_of(arguments).cluster = plan.cluster;
  const Launch shape{plan.blocks, plan.threads, plan.cluster, 0, false, stream};
  if (plan.looped) {
    return Kernels::template forward_looped<width>(shape, arguments);
  }
  const auto with_packs = [&]<int packs>() { return Kernels::template forward<width, packs>(shape, arguments); };
  if constexpr (Kernels::fused) {
    return with_packs.template operator()<Kernels::template packs<width>>();
  } else if constexpr (width == 1) {
    return plan.packs == 4 ? with_packs.template operator()<4>() : with_packs.template operator()<32>();
  } else {
    switch (plan.packs) {
      case 1:
        return with_packs.template operator()<1>();
      case 2:
        return with_packs.template operator()<2>();
      case 4:
        return with_packs.template operator()<4>();
      default:
        return with_packs.template operator()<8>();
    }
  }
}

template <class Kernels, class Arguments>
cudaError_t launch_forward(const Problem& problem, const Arguments& arguments, const DeviceTraits& device,
                           cudaStream_t stream) {
  const ForwardPlan plan = Kernels::plan_forward(problem, device);
  return problem.wide
             ? launch_forward_as_planned<Kernels, full_width<typename Kernels::Element>>(plan, arguments, stream)
             : launch_forward_as_planned<Kernels, 1>(plan, arguments, stream);
}

template <class Element, bool centred>
cudaError_t launch_forward(const ForwardArguments& arguments, const DeviceTraits& device, cudaStream_t stream) {
  constexpr int size = sizeof(Element);
  Problem problem{arguments.rows, arguments.columns, size, centred, false};
  problem.wide = arguments.columns % full_width<Element> == 0 &&
                 wide_rows(arguments.input, arguments.row_stride, size) &&
                 wide_rows(arguments.output, arguments.columns, size) && wide_parameter(arguments.weight, size) &&
                 wide_parameter(arguments.bias, size);
  return launch_forward<NormKernels<Element, centred>>(problem, arguments, device, stream);
}

// --- backward --------------------------------------------------------------------------------------------------------

// What a caller has to know before it allocates the partial sums.
template <class Kernels>
cudaError_t plan_backward(const Problem& problem, const DeviceTraits& device, BackwardPlan& plan) {
  plan = backward_plan(problem, device);
  if (plan.kind == BackwardKind::looped || plan.cluster == 1) {
    return cudaSuccess;
  }
  const Launch shape{plan.blocks, plan.threads, plan.cluster, plan.shared_bytes, false, nullptr};
  constexpr int width = full_width<typename Kernels::Element>;
  int64_t resident = 0;
  cudaError_t error;
  if (!problem.wide) {
    error = Kernels::template resident<1, false>(shape, resident);
  } else if (plan.kind == BackwardKind::sums_in_registers) {
    error = Kernels::template resident<width, false>(shape, resident);
  } else {
    error = Kernels::template resident<width, true>(shape, resident);
  }
  plan.partials = larger(1, smaller(plan.partials, resident));
  plan.blocks = plan.partials * plan.cluster;
  return error;
}

template <class Element, bool centred>
cudaError_t plan_backward(const BackwardArguments& arguments, const DeviceTraits& device, BackwardPlan& plan) {
  constexpr int size = sizeof(Element);
  Problem problem{arguments.rows, arguments.columns, size, centred, false};
  problem.wide = arguments.columns % full_width<Element> == 0 &&
                 wide_rows(arguments.grad_output, arguments.grad_output_stride, size) &&
                 wide_rows(arguments.input, arguments.input_stride, size) &&
                 wide_rows(arguments.grad_input, arguments.columns, size) && wide_parameter(arguments.weight, size);
  return plan_backward<NormKernels<Element, centred>>(problem, device, plan);
}

template <class Kernels, int width, class Arguments>
cudaError_t launch_backward_as_planned(const BackwardPlan& plan, Arguments arguments, cudaStream_t stream) {
  norm_of(arguments).threads_per_row = plan.threads_per_row;
  norm_of(arguments).cluster = plan.cluster;
  const Launch shape{plan.blocks, plan.threads, plan.cluster, plan.shared_bytes, false, stream};
  if (plan.kind == BackwardKind::sums_in_registers) {
    return Kernels::template backward<width, false>(shape, arguments);
  }
  if constexpr (width > 1) {
    if (plan.kind == BackwardKind::sums_in_shared) {
      return Kernels::template backward<width, true>(shape, arguments);
    }
  }
  cudaError_t error = cudaSuccess;
  if (Kernels::wants_input(arguments)) {
    error = Kernels::template backward_looped<width>(shape, arguments);
  }
  if (error == cudaSuccess && Kernels::wants_sums(arguments)) {
    const int64_t blocks = divide_up(norm_of(arguments).columns / width, columns_threads) * plan.partials;
    error = Kernels::template backward_columns<width>(Launch{blocks, columns_threads, 1, 0, false, stream}, arguments);
  }
  return error;
}

template <class Kernels, class Arguments>
cudaError_t launch_backward(const BackwardPlan& plan, const Arguments& arguments, cudaStream_t stream) {
  return plan.width == 1
             ? launch_backward_as_planned<Kernels, 1>(plan, arguments, stream)
             : launch_backward_as_planned<Kernels, full_width<typename Kernels::Element>>(plan, arguments, stream);
}

template <class Element, bool centred>
cudaError_t launch_backward(const BackwardPlan& plan, const BackwardArguments& arguments, cudaStream_t stream) {
  return launch_backward<NormKernels<Element, centred>>(plan, arguments, stream);
}

constexpr int reduce_threads = reduce_columns * reduce_slices;

// `gradients`: one or two. With no partial sums they become zeros.
template <bool centred>
cudaError_t launch_reduce(const ReduceArguments& arguments, int gradients, cudaStream_t stream) {
  const int64_t blocks = divide_up(arguments.columns, reduce_columns) * gradients;
  return launch<reduce_partials_kernel<centred>>(Launch{blocks, reduce_threads, 1, 0, false, stream}, arguments);
}

}  // namespace fastreg::cuda
