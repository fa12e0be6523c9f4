// Registers instance norm for CUDA tensors: group norm with a group a channel, whose running statistics move after it.

#include "instance_norm.cuh"

#include <tuple>

#include "group_norm_door.h"

namespace fastreg::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor> instance_norm_fwd(const Tensor& input, Optional weight, Optional bias, Optional running_mean,
                                             Optional running_var, double momentum, double eps, int64_t activation,
                                             double negative_slope) {
  constexpr const char* op = "instance_norm_fwd";
  const ChannelTensors tensors(input, std::nullopt, weight, bias, op);
  const ChannelView& view = tensors.input;
  RunningArguments arguments{};
  arguments.running_mean = running_statistic(running_mean, view, op, "running_mean");
  arguments.running_var = running_statistic(running_var, view, op, "running_var");
  arguments.shape = tensors.shape();
  arguments.momentum = static_cast<float>(momentum);
  const bool given = arguments.running_mean.data != nullptr || arguments.running_var.data != nullptr;
  const bool moves = given && !tensors.empty();

  const Workspace squares(moves ? 4 * view.samples * view.channels : 0, view.device, op);
  const GroupForwardResult result =
      group_forward(tensors, {view.channels, eps, activation, negative_slope}, squares.floats(), op);
  if (moves) {
    arguments.mean = static_cast<const float*>(data_of(result.statistics, op));
    arguments.squares = squares.floats();
    const OnDevice device(view.device, op);
    const Launch shape{finish_blocks(view.channels), finish_threads, 1, 0, false, device.stream()};
    check_cuda(launch<instance_norm_running_kernel>(shape, arguments), op, "launch");
  }
  return {result.output, result.statistics};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("instance_norm_fwd", TORCH_BOX(&fastreg::cuda::instance_norm_fwd));
}
