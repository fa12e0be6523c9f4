// What layer norm's door lends to rms norm's: the launchers of both.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../checks.h"
#include "layer_norm.h"

namespace fastreg {

enum class NormKind { layer, rms };

struct [[gnu::visibility("hidden")]] NormForwardResult {
  Tensor output;
  Tensor statistics;
};

struct [[gnu::visibility("hidden")]] NormBackwardResult {
  Tensor grad_input;
  Tensor grad_weight;
  Tensor grad_bias;  // layer norm only
};

// The gradients that are wanted.
struct NormMask {
  bool input;
  bool weight;
  bool bias;
};

NormForwardResult norm_forward(NormKind kind, const char* op, const Tensor& input, int64_t normalized_ndim,
                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                               double eps);

NormBackwardResult norm_backward(NormKind kind, const char* op, const Tensor& grad_output,
                                 const Tensor& input, int64_t normalized_ndim, const Tensor& statistics,
                                 const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                 NormMask mask);

}  // namespace fastreg
