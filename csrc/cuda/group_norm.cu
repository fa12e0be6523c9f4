// Registers group norm for CUDA tensors: the checks, allocations and launches of its two operators. The kernels are in
// group_norm_*.cuh.

#include "group_norm_door.h"

#include <tuple>
#include <vector>

#include "group_norm_launch.cuh"

namespace fastreg::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

// Without channels there are no groups either.
GroupShape group_shape(const ChannelView& view, int64_t groups, const char* op) {
  if (view.channels == 0) {
    return {groups, 0};
  }
  if (groups < 1 || view.channels % groups != 0) {
    fail(op, "the number of channels, ", view.channels, ", must be a multiple of groups, ", groups, ".");
  }
  return {groups, view.channels / groups};
}

}  // namespace

// --- forward ---------------------------------------------------------------------------------------------------------

GroupForwardResult group_forward(const ChannelTensors& tensors, const GroupForwardOptions& options, float* squares,
                                 const char* op) {
  const ChannelView& view = tensors.input;
  GroupNormForwardArguments arguments{};
  arguments.input = view.data;
  arguments.weight = parameter_of(tensors.weight);
  arguments.bias = parameter_of(tensors.bias);
  arguments.squares = squares;
  arguments.shape = tensors.shape();
  arguments.group = group_shape(view, options.groups, op);
  arguments.input_stride = view.outer_stride;
  arguments.activation = activation_arguments(options.activation, options.negative_slope, op);
  arguments.eps = static_cast<float>(options.eps);

  const Tensor output = new_dense(view, op);
  const int64_t sizes[] = {2, view.samples, options.groups};
  const Tensor statistics = new_tensor(sizes, 3, DType::Float32, view.device, op);
  if (tensors.empty()) {
    return {output, statistics};
  }
  arguments.output = data_of(output, op);
  arguments.mean = static_cast<float*>(data_of(statistics, op));
  arguments.rstd = arguments.mean + view.samples * options.groups;
  const OnDevice device(view.device, op);
  const cudaError_t error = with_element(view.dtype, op, [&]<class Element>() {
    PlannedGroups planned;
    const cudaError_t refused = plan_group_forward<Element>(arguments, device.traits(), planned);
    if (refused != cudaSuccess) {
      return refused;
    }
    const Workspace workspace(group_forward_bytes(planned), view.device, op);
    return launch_group_forward<Element>(planned, arguments, workspace.data(), device.stream());
  });
  check_cuda(error, op, "launch");
  return {output, statistics};
}

namespace {

std::tuple<Tensor, Tensor> group_norm_fwd(const Tensor& input, int64_t groups, Optional weight, Optional bias,
                                          double eps, int64_t activation, double negative_slope) {
  constexpr const char* op = "group_norm_fwd";
  const ChannelTensors tensors(input, std::nullopt, weight, bias, op);
  const GroupForwardResult result = group_forward(tensors, {groups, eps, activation, negative_slope}, nullptr, op);
  return {result.output, result.statistics};
}

// --- backward --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& grad_output, const Tensor& input, int64_t groups,
                                                  const Tensor& statistics, Optional weight, Optional bias,
                                                  int64_t activation, double negative_slope,
                                                  std::vector<bool> output_mask) {
  constexpr const char* op = "group_norm_bwd";
  const ChannelTensors tensors(input, std::nullopt, weight, bias, op);
  const ChannelView& view = tensors.input;
  const ChannelView grad_view = channel_view(grad_output, op, "grad_output", &view);
  const GroupShape group = group_shape(view, groups, op);
  const int64_t statistic_count = view.samples * groups;
  const VectorView saved = vector_view(statistics, 2 * statistic_count, view.device, op, "statistics");
  if (saved.dtype != accumulation_dtype(view.dtype)) {
    fail(op, "statistics must be ", name_of(accumulation_dtype(view.dtype)), ".");
  }
  check_mask(output_mask.at(1), tensors.weight, op, "weight");
  check_mask(output_mask.at(2), tensors.bias, op, "bias");

  const auto of_parameter = [&](bool wanted, const VectorView& parameter) {
    return new_vector(wanted ? view.channels : 0, parameter.given ? parameter.dtype : view.dtype, view.device, op);
  };
  const Tensor grad_input = output_mask.at(0) ? new_dense(view, op) : empty_gradient(view.dtype, view.device, op);
  const Tensor grad_weight = of_parameter(output_mask.at(1), tensors.weight);
  const Tensor grad_bias = of_parameter(output_mask.at(2), tensors.bias);
  const GroupParameterGradients gradients{data_of(grad_weight, op), data_of(grad_bias, op), tensors.weight.dtype,
                                          tensors.bias.dtype};

  GroupNormBackwardArguments arguments{};
  arguments.grad_output = grad_view.data;
  arguments.input = view.data;
  arguments.mean = static_cast<const float*>(saved.data);
  arguments.rstd = arguments.mean + statistic_count;
  arguments.weight = parameter_of(tensors.weight);
  arguments.bias = parameter_of(tensors.bias);
  arguments.grad_input = data_of(grad_input, op);
  arguments.shape = tensors.shape();
  arguments.group = group;
  arguments.grad_output_stride = grad_view.outer_stride;
  arguments.input_stride = view.outer_stride;
  arguments.activation = activation_arguments(activation, negative_slope, op);
  if (!gradients.wanted() && (tensors.empty() || arguments.grad_input == nullptr)) {
    return {grad_input, grad_weight, grad_bias};
  }

  const OnDevice device(view.device, op);
  if (tensors.empty()) {
    check_cuda(launch_group_parameters({}, arguments.shape, groups, gradients, device.stream()), op, "launch");
    return {grad_input, grad_weight, grad_bias};
  }
  const cudaError_t error = with_element(view.dtype, op, [&]<class Element>() {
    PlannedGroups planned;
    const cudaError_t refused = plan_group_backward<Element>(arguments, device.traits(), planned);
    if (refused != cudaSuccess) {
      return refused;
    }
    const Workspace workspace(GroupBackwardBytes(planned, gradients.wanted()).all(), view.device, op);
    return launch_group_backward<Element>(planned, arguments, gradients, workspace.data(), device.stream());
  });
  check_cuda(error, op, "launch");
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("group_norm_fwd", TORCH_BOX(&fastreg::cuda::group_norm_fwd));
  m.impl("group_norm_bwd", TORCH_BOX(&fastreg::cuda::group_norm_bwd));
}
