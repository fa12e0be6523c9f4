// What the door of layer norm with dropout and a residual lends to rms norm's: the launchers of both.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../checks.h"
#include "layer_norm_launch.h"

namespace fastreg {

// What the branch is dropped and scaled by, as the operators take it.
struct BranchArguments {
  const std::optional<Tensor>& row_scale;
  const std::optional<Tensor>& layer_scale;
  const std::optional<Tensor>& seed;
  int64_t threshold;
  const std::optional<Tensor>& dynamic_threshold;
};

struct [[gnu::visibility("hidden")]] DropoutAddNormForwardResult {
  Tensor output;
  Tensor sum;
  Tensor statistics;
};

struct [[gnu::visibility("hidden")]] DropoutAddNormBackwardResult {
  Tensor grad_input;
  Tensor grad_residual;
  Tensor grad_weight;
  Tensor grad_bias;  // layer norm only
  Tensor grad_layer_scale;
};

// The gradients that are wanted.
struct DropoutAddNormMask {
  bool input;
  bool residual;
  bool weight;
  bool bias;
  bool layer_scale;
};

DropoutAddNormForwardResult dropout_add_norm_forward(NormKind kind, const char* op, const Tensor& input,
                                                     const std::optional<Tensor>& residual, int64_t normalized_ndim,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const BranchArguments& branch, double eps, bool float_sum,
                                                     bool keep_sum);

DropoutAddNormBackwardResult dropout_add_norm_backward(
    NormKind kind, const char* op, const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
    const Tensor& sum, const std::optional<Tensor>& input, int64_t normalized_ndim, const Tensor& statistics,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const BranchArguments& branch,
    int64_t input_dtype, const DropoutAddNormMask& mask);

}  // namespace fastreg
