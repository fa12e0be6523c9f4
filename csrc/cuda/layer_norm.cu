// Registers layer norm for CUDA tensors; its door is layer_norm_door.h, its kernels are layer_norm_*.cuh.

#include <tuple>
#include <vector>

#include "layer_norm_door.h"

namespace fastreg::cuda {
namespace {

std::tuple<Tensor, Tensor> layer_norm_fwd(const Tensor& input, int64_t normalized_ndim,
                                          const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                          double eps) {
  NormOutputs outputs = norm_forward<true>("layer_norm_fwd", input, normalized_ndim, weight, bias, eps);
  return {outputs.output, outputs.statistics};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad_output, const Tensor& input,
                                                  int64_t normalized_ndim, const Tensor& statistics,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, std::vector<bool> output_mask) {
  const NormMask mask{output_mask.at(0), output_mask.at(1), output_mask.at(2)};
  NormGradients gradients =
      norm_backward<true>("layer_norm_bwd", grad_output, input, normalized_ndim, statistics, weight, bias, mask);
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastreg::cuda::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastreg::cuda::layer_norm_bwd));
}
