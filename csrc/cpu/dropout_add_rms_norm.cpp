// Door of rms norm with dropout and a residual: layer norm's launchers without centring and bias.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "dropout_add_layer_norm_launch.h"

namespace fastreg {
namespace {

std::tuple<Tensor, Tensor, Tensor> dropout_add_rms_norm_fwd(
    const Tensor& input, const std::optional<Tensor>& residual, int64_t normalized_ndim,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& row_scale,
    const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& seed, int64_t threshold,
    const std::optional<Tensor>& dynamic_threshold, double eps, bool float_sum, bool keep_sum) {
  DropoutAddNormForwardResult result = dropout_add_norm_forward(
      NormKind::rms, "dropout_add_rms_norm_fwd", input, residual, normalized_ndim, weight, std::nullopt,
      {row_scale, layer_scale, seed, threshold, dynamic_threshold}, eps, float_sum, keep_sum);
  return {std::move(result.output), std::move(result.sum), std::move(result.statistics)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_rms_norm_bwd(
    const Tensor& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const std::optional<Tensor>& input, int64_t normalized_ndim, const Tensor& statistics,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& row_scale,
    const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& seed, int64_t threshold,
    const std::optional<Tensor>& dynamic_threshold, int64_t input_dtype, std::vector<bool> output_mask) {
  DropoutAddNormBackwardResult result = dropout_add_norm_backward(
      NormKind::rms, "dropout_add_rms_norm_bwd", grad_output, grad_sum, sum, input, normalized_ndim, statistics,
      weight, std::nullopt, {row_scale, layer_scale, seed, threshold, dynamic_threshold}, input_dtype,
      {output_mask.at(0), output_mask.at(1), output_mask.at(2), false, output_mask.at(3)});
  return {std::move(result.grad_input), std::move(result.grad_residual), std::move(result.grad_weight),
          std::move(result.grad_layer_scale)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("dropout_add_rms_norm_fwd", TORCH_BOX(&fastreg::dropout_add_rms_norm_fwd));
  m.impl("dropout_add_rms_norm_bwd", TORCH_BOX(&fastreg::dropout_add_rms_norm_bwd));
}
