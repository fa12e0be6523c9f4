// Registers dropout + residual + layer norm for CUDA tensors; its door is dropout_add_layer_norm_door.h, its kernels
// are dropout_add_layer_norm_*.cuh.

#include <tuple>
#include <vector>

#include "dropout_add_layer_norm_door.h"

namespace fastreg::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(const Tensor& input, Optional residual,
                                                              int64_t normalized_ndim, Optional weight, Optional bias,
                                                              Optional row_scale, Optional layer_scale, Optional seed,
                                                              int64_t threshold, Optional dynamic_threshold, double eps,
                                                              bool float_sum, bool keep_sum) {
  const BranchTensors branch{row_scale, layer_scale, seed, threshold, dynamic_threshold};
  DropoutAddNormOutputs outputs = dropout_add_norm_forward<true>(
      "dropout_add_layer_norm_fwd", input, residual, normalized_ndim, weight, bias, branch, eps, float_sum, keep_sum);
  return {outputs.output, outputs.sum, outputs.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    const Tensor& grad_output, Optional grad_sum, const Tensor& sum, Optional input, int64_t normalized_ndim,
    const Tensor& statistics, Optional weight, Optional bias, Optional row_scale, Optional layer_scale, Optional seed,
    int64_t threshold, Optional dynamic_threshold, int64_t input_dtype, std::vector<bool> output_mask) {
  const BranchTensors branch{row_scale, layer_scale, seed, threshold, dynamic_threshold};
  const DropoutAddNormMask mask{output_mask.at(0), output_mask.at(1), output_mask.at(2), output_mask.at(3),
                                output_mask.at(4)};
  DropoutAddNormGradients gradients =
      dropout_add_norm_backward<true>("dropout_add_layer_norm_bwd", grad_output, grad_sum, sum, input, normalized_ndim,
                                      statistics, weight, bias, branch, input_dtype, mask);
  return {gradients.input, gradients.residual, gradients.weight, gradients.bias, gradients.layer_scale};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("dropout_add_layer_norm_fwd", TORCH_BOX(&fastreg::cuda::dropout_add_layer_norm_fwd));
  m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&fastreg::cuda::dropout_add_layer_norm_bwd));
}
