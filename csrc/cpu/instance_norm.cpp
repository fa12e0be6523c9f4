// Door of instance norm's forward operator on the CPU, and its registration: group norm with a group a channel, which
// also moves the running statistics. Its backward operator is group norm's.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "group_norm_door.h"

namespace fastreg {
namespace {

// r = (1 - momentum) * r + momentum * factor * mean over the samples of `values`, (samples, channels).
template <class Scalar>
void update_running(const VectorView& running, const void* values, double factor, double momentum,
                    const ChannelView& input) {
  const ParameterRow before(running, input.channels);
  const ChannelScratch scratch(input);
  const Scalar* const old = static_cast<const Scalar*>(before.data());
  Scalar* const after = static_cast<Scalar*>(scratch.data());
  reduce_partials(values, input.samples, input.channels, accumulation_dtype(input.dtype), after);
  const Scalar share = static_cast<Scalar>(factor / double(input.samples));
  const Scalar kept = static_cast<Scalar>(1 - momentum);
  const Scalar moved = static_cast<Scalar>(momentum);
  for (int64_t channel = 0; channel < input.channels; ++channel) {
    after[channel] = kept * old[channel] + moved * (after[channel] * share);
  }
  reduce_partials(after, 1, input.channels, running.dtype, const_cast<void*>(running.data));
}

std::tuple<Tensor, Tensor> instance_norm_fwd(const Tensor& input, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& running_mean,
                                             const std::optional<Tensor>& running_var, double momentum, double eps,
                                             int64_t activation, double negative_slope) {
  constexpr const char* op = "instance_norm_fwd";
  const ChannelView view = channel_view(input, op, "input");
  GroupNormProblem problem(input, view.channels, weight, bias, activation, negative_slope, op);
  const VectorView means = channel_vector(running_mean, view, op, "running_mean");
  const VectorView variances = channel_vector(running_var, view, op, "running_var");
  Scratch scratch;
  void* const squares =
      variances.given && !problem.is_empty() ? scratch.reserve(view.samples * vector_bytes_of(view)) : nullptr;
  auto [output, statistics] = group_norm_forward(problem, eps, squares, op);
  if (!problem.is_empty()) {
    const auto update = view.dtype == DType::Float64 ? update_running<double> : update_running<float>;
    if (means.given) {
      update(means, data_of(statistics, op), 1.0, momentum, view);
    }
    if (variances.given) {
      update(variances, squares, 1.0 / double(std::max<int64_t>(view.spatial - 1, 1)), momentum, view);
    }
  }
  return {std::move(output), std::move(statistics)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("instance_norm_fwd", TORCH_BOX(&fastreg::instance_norm_fwd));
}
