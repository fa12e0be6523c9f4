// Registers batch norm for CUDA tensors: the checks, allocations and launches of its seven operators. What they have in
// common is in batch_norm_door.h; the kernels are in batch_norm_*.cuh.

#include <tuple>
#include <vector>

#include "batch_norm_door.h"

namespace fastreg::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

// --- forward ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor& input, Optional residual, Optional weight,
                                                  Optional bias, Optional running_mean, Optional running_var,
                                                  double momentum, double eps, int64_t activation,
                                                  double negative_slope, bool skip_nonfinite, bool keep_signs) {
  constexpr const char* op = "batch_norm_fwd";
  const ChannelTensors tensors(input, residual, weight, bias, op);
  const ChannelView& view = tensors.input;
  const Tensor statistics = new_pairs(view, op);
  BatchNormForwardArguments arguments = forward_arguments(tensors, data_of(statistics, op));
  arguments.running_mean = running_statistic(running_mean, view, op, "running_mean");
  arguments.running_var = running_statistic(running_var, view, op, "running_var");
  arguments.activation = activation_arguments(activation, negative_slope, op);
  arguments.momentum = static_cast<float>(momentum);
  arguments.eps = static_cast<float>(eps);
  arguments.skip_nonfinite = skip_nonfinite;

  const Tensor output = new_dense(view, op);
  const Tensor signs = new_signs(keep_signs, tensors, arguments.activation.kind, op);
  if (tensors.empty()) {
    return {output, statistics, signs};
  }
  arguments.output = data_of(output, op);
  arguments.signs = static_cast<unsigned char*>(data_of(signs, op));
  const OnDevice device(view.device, op);
  const cudaError_t error = with_element(view.dtype, op, [&]<class Element>() {
    return launch_training_forward<Element>(arguments, view, device, op);
  });
  check_cuda(error, op, "launch");
  return {output, statistics, signs};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_eval(const Tensor& input, Optional residual, Optional weight,
                                                   Optional bias, const Tensor& running_mean,
                                                   const Tensor& running_var, double eps, int64_t activation,
                                                   double negative_slope, bool keep_signs) {
  constexpr const char* op = "batch_norm_eval";
  const ChannelTensors tensors(input, residual, weight, bias, op);
  const ChannelView& view = tensors.input;
  const Tensor statistics = new_pairs(view, op);
  BatchNormForwardArguments arguments = forward_arguments(tensors, data_of(statistics, op));
  arguments.running_mean = running_statistic(running_mean, view, op, "running_mean");
  arguments.running_var = running_statistic(running_var, view, op, "running_var");
  arguments.activation = activation_arguments(activation, negative_slope, op);
  arguments.eps = static_cast<float>(eps);

  const Tensor output = new_dense(view, op);
  const Tensor signs = new_signs(keep_signs, tensors, arguments.activation.kind, op);
  if (!tensors.empty()) {
    arguments.output = data_of(output, op);
    arguments.signs = static_cast<unsigned char*>(data_of(signs, op));
    launch_output(arguments, true, view, OnDevice(view.device, op), op);
  }
  return {output, statistics, signs};
}

Tensor batch_norm_moments(const Tensor& input) {
  constexpr const char* op = "batch_norm_moments";
  const ChannelTensors tensors(input, std::nullopt, std::nullopt, std::nullopt, op);
  const ChannelView& view = tensors.input;
  const Tensor moments = new_pairs(view, op);
  if (view.channels > 0) {
    const OnDevice device(view.device, op);
    float* data = static_cast<float*>(data_of(moments, op));
    if (tensors.empty()) {
      BatchNormBackwardArguments nothing{};
      nothing.shape = tensors.shape();
      check_cuda(launch_zero_sums(nothing, data, device.stream()), op, "launch");
    } else {
      launch_moments(forward_arguments(tensors, data), view, device, op);
    }
  }
  return moments;
}

std::tuple<Tensor, Tensor> batch_norm_apply(const Tensor& input, Optional residual, Optional weight, Optional bias,
                                            const Tensor& statistics, int64_t activation, double negative_slope,
                                            bool keep_signs) {
  constexpr const char* op = "batch_norm_apply";
  const ChannelTensors tensors(input, residual, weight, bias, op);
  const ChannelView& view = tensors.input;
  const VectorView given = channel_pairs(statistics, view, op, "statistics");
  BatchNormForwardArguments arguments = forward_arguments(tensors, const_cast<void*>(given.data));
  arguments.activation = activation_arguments(activation, negative_slope, op);

  const Tensor output = new_dense(view, op);
  const Tensor signs = new_signs(keep_signs, tensors, arguments.activation.kind, op);
  if (!tensors.empty()) {
    arguments.output = data_of(output, op);
    arguments.signs = static_cast<unsigned char*>(data_of(signs, op));
    launch_output(arguments, false, view, OnDevice(view.device, op), op);
  }
  return {output, signs};
}

// --- backward --------------------------------------------------------------------------------------------------------

ChannelGradients new_gradients(const ChannelTensors& tensors, const ChannelMask& mask, const char* op) {
  const ChannelView& view = tensors.input;
  const auto of_tensor = [&](bool wanted) {
    return wanted ? new_dense(view, op) : empty_gradient(view.dtype, view.device, op);
  };
  const auto of_parameter = [&](bool wanted, const VectorView& parameter) {
    return new_vector(wanted ? view.channels : 0, parameter.given ? parameter.dtype : view.dtype, view.device, op);
  };
  return {of_tensor(mask.input), of_tensor(mask.residual), of_parameter(mask.weight, tensors.weight),
          of_parameter(mask.bias, tensors.bias)};
}

// Null for what is not asked for.
void ask_for(BatchNormBackwardArguments& arguments, const ChannelGradients& gradients, const char* op) {
  arguments.grad_input = data_of(gradients.input, op);
  arguments.grad_residual = data_of(gradients.residual, op);
  arguments.grad_weight = data_of(gradients.weight, op);
  arguments.grad_bias = data_of(gradients.bias, op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& grad_output, const Tensor& input,
                                                          Optional residual, Optional signs, const Tensor& statistics,
                                                          Optional weight, Optional bias, bool training,
                                                          int64_t activation, double negative_slope,
                                                          std::vector<bool> output_mask) {
  constexpr const char* op = "batch_norm_bwd";
  const ChannelTensors tensors(input, residual, weight, bias, op);
  const ChannelView& view = tensors.input;
  const ChannelMask mask{output_mask.at(0), output_mask.at(1), output_mask.at(2), output_mask.at(3)};
  check_mask(mask.weight, tensors.weight, op, "weight");
  check_mask(mask.bias, tensors.bias, op, "bias");
  BatchNormBackwardArguments arguments = backward_arguments(
      tensors, grad_output, signs, statistics, activation_arguments(activation, negative_slope, op), op);
  arguments.training = training;

  const ChannelGradients gradients = new_gradients(tensors, mask, op);
  ask_for(arguments, gradients, op);
  const bool of_parameters = mask.weight || mask.bias;
  if (view.channels > 0 && (of_parameters || (!tensors.empty() && (mask.input || mask.residual)))) {
    const OnDevice device(view.device, op);
    const cudaError_t error = tensors.empty() ? launch_zero_sums(arguments, nullptr, device.stream())
                                              : with_element(view.dtype, op, [&]<class Element>() {
                                                  return launch_channel_backward<Element>(arguments, view, device, op);
                                                });
    check_cuda(error, op, "launch");
  }
  return {gradients.input, gradients.residual, gradients.weight, gradients.bias};
}

Tensor batch_norm_sums(const Tensor& grad_output, const Tensor& input, Optional residual, Optional signs,
                       const Tensor& statistics, Optional weight, Optional bias, int64_t activation,
                       double negative_slope) {
  constexpr const char* op = "batch_norm_sums";
  const ChannelTensors tensors(input, residual, weight, bias, op);
  const ChannelView& view = tensors.input;
  const BatchNormBackwardArguments arguments = backward_arguments(
      tensors, grad_output, signs, statistics, activation_arguments(activation, negative_slope, op), op);
  const Tensor sums = new_pairs(view, op);
  if (view.channels > 0) {
    const OnDevice device(view.device, op);
    float* data = static_cast<float*>(data_of(sums, op));
    const auto launch_all = [&]<class Element>() {
      const PlannedStream planned = plan_sums<Element>(arguments, device.traits());
      const Workspace partials(planned.partial_floats() * 4, view.device, op);
      return launch_sums<Element>(planned, arguments, partials.floats(), data, device.stream());
    };
    check_cuda(tensors.empty() ? launch_zero_sums(arguments, data, device.stream())
                               : with_element(view.dtype, op, launch_all),
               op, "launch");
  }
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_bwd_apply(const Tensor& grad_output, const Tensor& input, Optional residual,
                                                Optional signs, const Tensor& statistics, Optional weight,
                                                Optional bias, Optional means, int64_t activation,
                                                double negative_slope, std::vector<bool> output_mask) {
  constexpr const char* op = "batch_norm_bwd_apply";
  const ChannelTensors tensors(input, residual, weight, bias, op);
  const ChannelView& view = tensors.input;
  const ChannelMask mask{output_mask.at(0), output_mask.at(1), false, false};
  BatchNormBackwardArguments arguments = backward_arguments(
      tensors, grad_output, signs, statistics, activation_arguments(activation, negative_slope, op), op);
  const VectorView given = means.has_value() ? channel_pairs(*means, view, op, "means") : VectorView{};

  const ChannelGradients gradients = new_gradients(tensors, mask, op);
  ask_for(arguments, gradients, op);
  if (!tensors.empty() && (mask.input || mask.residual)) {
    const OnDevice device(view.device, op);
    const float* data = mask.input ? static_cast<const float*>(given.data) : nullptr;
    const cudaError_t error = with_element(view.dtype, op, [&]<class Element>() {
      return launch_gradient<Element>(arguments, data, 1.0f, device.traits(), device.stream());
    });
    check_cuda(error, op, "launch");
  }
  return {gradients.input, gradients.residual};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&fastreg::cuda::batch_norm_fwd));
  m.impl("batch_norm_eval", TORCH_BOX(&fastreg::cuda::batch_norm_eval));
  m.impl("batch_norm_bwd", TORCH_BOX(&fastreg::cuda::batch_norm_bwd));
  m.impl("batch_norm_moments", TORCH_BOX(&fastreg::cuda::batch_norm_moments));
  m.impl("batch_norm_apply", TORCH_BOX(&fastreg::cuda::batch_norm_apply));
  m.impl("batch_norm_sums", TORCH_BOX(&fastreg::cuda::batch_norm_sums));
  m.impl("batch_norm_bwd_apply", TORCH_BOX(&fastreg::cuda::batch_norm_bwd_apply));
}
