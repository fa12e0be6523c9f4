// What the doors of batch norm's operators have in common, besides channels_door.h: the tensors they make, and the
// kernels' arguments. batch_norm.cu has the operators.

#pragma once

#include "batch_norm_launch.cuh"
#include "batch_norm_resident.cuh"
#include "channels_door.h"

namespace fastreg::cuda {

// --- what is given ---------------------------------------------------------------------------------------------------

// A (2, channels) tensor is two vectors.
inline float* second_of(void* pairs, const ChannelView& input) { return static_cast<float*>(pairs) + input.channels; }

// --- what is made ----------------------------------------------------------------------------------------------------

inline Tensor new_pairs(const ChannelView& view, const char* op) {
  const int64_t sizes[] = {2, view.channels};
  return new_tensor(sizes, 2, DType::Float32, view.device, op);
}

// Bits that are asked for and mean something, or an empty tensor.
inline Tensor new_signs(bool keep_signs, const ChannelTensors& tensors, Activation activation, const char* op) {
  const bool kept = keep_signs && tensors.residual != nullptr && needs_sign_only(activation);
  const ChannelView& view = tensors.input;
  return new_bytes(kept ? view.lines() * sign_bytes_per_line(view) : 0, view.device, op);
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Without output, signs, running statistics and the numbers that belong to them.
inline BatchNormForwardArguments forward_arguments(const ChannelTensors& tensors, void* statistics) {
  BatchNormForwardArguments arguments{};
  arguments.input = tensors.input.data;
  arguments.residual = tensors.residual;
  arguments.weight = parameter_of(tensors.weight);
  arguments.bias = parameter_of(tensors.bias);
  arguments.mean = static_cast<float*>(statistics);
  arguments.rstd = second_of(statistics, tensors.input);
  arguments.shape = tensors.shape();
  arguments.input_stride = tensors.input.outer_stride;
  arguments.residual_stride = tensors.residual_stride;
  return arguments;
}

inline void launch_moments(const BatchNormForwardArguments& arguments, const ChannelView& view, const OnDevice& device,
                           const char* op) {
  const cudaError_t error = with_element(view.dtype, op, [&]<class Element>() {
    const PlannedStream planned = plan_statistics<Element>(arguments, device.traits());
    const Workspace partials(planned.partial_floats() * 4, view.device, op);
    return launch_statistics<Element>(planned, arguments, partials.floats(), true, device.stream());
  });
  check_cuda(error, op, "launch");
}

inline void launch_output(const BatchNormForwardArguments& arguments, bool evaluation, const ChannelView& view,
                          const OnDevice& device, const char* op) {
  const cudaError_t error = with_element(view.dtype, op, [&]<class Element>() {
    return launch_apply<Element>(arguments, evaluation, device.traits(), device.stream());
  });
  check_cuda(error, op, "launch");
}

// One kernel that keeps its channels on chip where they fit, else statistics and output one after the other.
template <class Element>
cudaError_t launch_training_forward(const BatchNormForwardArguments& arguments, const ChannelView& view,
                                    const OnDevice& device, const char* op) {
  ResidentPlan resident;
  cudaError_t error = plan_resident_forward<Element>(arguments, device.traits(), resident);
  if (error != cudaSuccess) {
    return error;
  }
  if (resident.kind != ResidentKind::none) {
    const Workspace workspace(resident.workspace_bytes(), view.device, op);
    return launch_resident_forward<Element>(resident, arguments, workspace.data(), device.stream());
  }
  const PlannedStream planned = plan_statistics<Element>(arguments, device.traits());
  const Workspace partials(planned.partial_floats() * 4, view.device, op);
  error = launch_statistics<Element>(planned, arguments, partials.floats(), false, device.stream());
  if (error != cudaSuccess) {
    return error;
  }
  return launch_apply<Element>(arguments, false, device.traits(), device.stream());
}

// --- backward --------------------------------------------------------------------------------------------------------

struct ChannelGradients {
  Tensor input;
  Tensor residual;
  Tensor weight;
  Tensor bias;
};

struct ChannelMask {
  bool input;
  bool residual;
  bool weight;
  bool bias;
};

// Without what is to be computed.
inline BatchNormBackwardArguments backward_arguments(const ChannelTensors& tensors, const Tensor& grad_output,
                                                     const std::optional<Tensor>& signs, const Tensor& statistics,
                                                     const ActivationArguments& activation, const char* op) {
  const ChannelView& input = tensors.input;
  const ChannelView grad_view = channel_view(grad_output, op, "grad_output", &input);
  const VectorView saved = channel_pairs(statistics, input, op, "statistics");
  BatchNormBackwardArguments arguments{};
  arguments.grad_output = grad_view.data;
  arguments.input = input.data;
  arguments.signs = signs_view(signs, input, activation.kind, op);
  arguments.mean = static_cast<const float*>(saved.data);
  arguments.rstd = arguments.mean + input.channels;
  arguments.weight = parameter_of(tensors.weight);
  arguments.bias = parameter_of(tensors.bias);
  arguments.shape = tensors.shape();
  arguments.grad_output_stride = grad_view.outer_stride;
  arguments.input_stride = input.outer_stride;
  arguments.activation = activation;
  if (arguments.computes_argument()) {
    arguments.residual = tensors.residual;
    arguments.residual_stride = tensors.residual_stride;
  }
  return arguments;
}

// One kernel where the channels fit on chip and are read more than once at all, else streaming.
template <class Element>
cudaError_t launch_channel_backward(const BatchNormBackwardArguments& arguments, const ChannelView& view,
                                    const OnDevice& device, const char* op) {
  if (arguments.training && arguments.grad_input != nullptr) {
    ResidentPlan resident;
    const cudaError_t error = plan_resident_backward<Element>(arguments, device.traits(), resident);
    if (error != cudaSuccess) {
      return error;
    }
    if (resident.kind != ResidentKind::none) {
      const Workspace workspace(resident.workspace_bytes(), view.device, op);
      return launch_resident_backward<Element>(resident, arguments, workspace.data(), device.stream());
    }
  }
  const StreamBackward planned = plan_stream_backward<Element>(arguments, device.traits());
  const Workspace workspace(planned.workspace_floats() * 4, view.device, op);
  return launch_stream_backward<Element>(planned, workspace.floats(), device.traits(), device.stream());
}

}  // namespace fastreg::cuda
