// RMS norm's door: layer norm's launchers without centring and bias.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "layer_norm_launch.h"

namespace fastreg {
namespace {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& input, int64_t normalized_ndim,
                                        const std::optional<Tensor>& weight, double eps) {
  NormForwardResult result =
      norm_forward(NormKind::rms, "rms_norm_fwd", input, normalized_ndim, weight, std::nullopt, eps);
  return {std::move(result.output), std::move(result.statistics)};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& grad_output, const Tensor& input,
                                        int64_t normalized_ndim, const Tensor& statistics,
                                        const std::optional<Tensor>& weight, std::vector<bool> output_mask) {
  NormBackwardResult result =
      norm_backward(NormKind::rms, "rms_norm_bwd", grad_output, input, normalized_ndim, statistics, weight,
                    std::nullopt, {output_mask.at(0), output_mask.at(1), false});
  return {std::move(result.grad_input), std::move(result.grad_weight)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fastreg::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastreg::rms_norm_bwd));
}
