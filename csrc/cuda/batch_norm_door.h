// What the doors of batch norm's operators have in common: the views of their tensors, the tensors they make, and the
// kernels' arguments. batch_norm.cu has the operators.

#pragma once

#include "../channels.h"
#include "batch_norm_launch.cuh"
#include "batch_norm_resident.cuh"
#include "door.h"

namespace fastreg::cuda {

// --- what is given ---------------------------------------------------------------------------------------------------

// The tensors that every operator is about.
struct ChannelTensors {
  ChannelView input;
  const void* residual;
  int64_t residual_stride;
  VectorView weight;
  VectorView bias;

  ChannelTensors(const Tensor& input_tensor, const std::optional<Tensor>& residual_tensor,
                 const std::optional<Tensor>& weight_tensor, const std::optional<Tensor>& bias_tensor, const char* op)
      : input(channel_view(input_tensor, op, "input")),
        residual(nullptr),
        residual_stride(0),
        weight(channel_vector(weight_tensor, input, op, "weight")),
        bias(channel_vector(bias_tensor, input, op, "bias")) {
    if (input.line_elements() > most_items) {
      fail(op, "the CUDA kernels take planes of up to ", most_items, " elements and as many channels, not ",
           input.line_elements(), ".");
    }
    if (residual_tensor.has_value()) {
      const ChannelView view = channel_view(*residual_tensor, op, "residual", &input);
      residual = view.data;
      residual_stride = view.outer_stride;
    }
  }

  bool empty() const { return input.elements() == 0; }
  ChannelShape shape() const { return {input.samples, input.channels, input.spatial, input.rows}; }
};

inline RunningStatistic running_statistic(const std::optional<Tensor>& tensor, const ChannelView& input, const char* op,
                                          const char* name) {
  const VectorView view = channel_vector(tensor, input, op, name);
  return {const_cast<void*>(view.data), view.dtype};
}

// A (2, channels) tensor is two vectors.
inline float* second_of(void* pairs, const ChannelView& input) { return static_cast<float*>(pairs) + input.channels; }

inline ActivationArguments activation_arguments(int64_t activation, double negative_slope, const char* op) {
  return {activation_of(activation, op), static_cast<float>(negative_slope)};
}

// --- what is made ----------------------------------------------------------------------------------------------------

// Of input's shape and family, dense.
inline Tensor new_dense(const ChannelView& view, const char* op) {
  int64_t strides[maximum_dimensions];
  dense_strides(view, strides);
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(view.dimensions, view.sizes, strides, torch_dtype(view.dtype), view.device.type,
                                      view.device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

inline Tensor new_pairs(const ChannelView& view, const char* op) {
  const int64_t sizes[] = {2, view.channels};
  return new_tensor(sizes, 2, DType::Float32, view.device, op);
}

inline Tensor new_bytes(int64_t count, const Device& device, const char* op) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_uint8(), device.type, device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

// Bits that are asked for and mean something, or an empty tensor.
inline Tensor new_signs(bool keep_signs, const ChannelTensors& tensors, Activation activation, const char* op) {
  const bool kept = keep_signs && tensors.residual != nullptr && needs_sign_only(activation);
  const ChannelView& view = tensors.input;
  return new_bytes(kept ? view.lines() * sign_bytes_per_line(view) : 0, view.device, op);
}

// Memory that a call needs until its kernels are launched; torch's allocator reuses it for later work of the same
// stream only.
class Workspace {
 public:
  Workspace(int64_t bytes, const Device& device, const char* op) {
    if (bytes > 0) {
      tensor_ = new_bytes(bytes, device, op);
      data_ = data_of(*tensor_, op);
    }
  }

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

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
