// Registers RMS norm for CUDA tensors: layer norm's door and kernels without centring (rms_norm.cuh).

#include "rms_norm.cuh"

#include <tuple>
#include <vector>

#include "layer_norm_door.h"

namespace fastreg::cuda {
namespace {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& input, int64_t normalized_ndim,
                                        const std::optional<Tensor>& weight, double eps) {
  NormOutputs outputs = norm_forward<false>("rms_norm_fwd", input, normalized_ndim, weight, std::nullopt, eps);
  return {outputs.output, outputs.statistics};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& grad_output, const Tensor& input, int64_t normalized_ndim,
                                        const Tensor& statistics, const std::optional<Tensor>& weight,
                                        std::vector<bool> output_mask) {
  const NormMask mask{output_mask.at(0), output_mask.at(1), false};
  NormGradients gradients =
      norm_backward<false>("rms_norm_bwd", grad_output, input, normalized_ndim, statistics, weight, std::nullopt, mask);
  return {gradients.input, gradients.weight};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fastreg::cuda::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastreg::cuda::rms_norm_bwd));
}
