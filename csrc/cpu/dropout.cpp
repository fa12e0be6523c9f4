// Dropout's forward operators on the CPU, into a new tensor and into the input, and their registration.
//
// Traffic over the activations: one read and one write, and a read of the residual; of samples and channels that are
// dropped only the residual. Masks are functions of the position, and work is cut by position alone: results do not
// depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <optional>

#include "dropout_door.h"

namespace fastreg {
namespace {

Tensor dropout_fwd(const Tensor& input, const std::optional<Tensor>& residual, const std::optional<Tensor>& row_scale,
                   const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& seed, int64_t threshold,
                   const std::optional<Tensor>& dynamic_threshold, int64_t unit, bool rescale) {
  constexpr const char* op = "dropout_fwd";
  const DenseView view = dense_view(input, op, "input");
  const void* added = nullptr;
  DType dtype = view.dtype;
  if (residual.has_value()) {
    const DenseView residuals = view_like(*residual, view, "input", op, "residual");
    dtype = residuals.dtype;
    if (dtype != view.dtype && (dtype != DType::Float32 || element_size(view.dtype) != 2)) {
      fail(op, "residual must have input's dtype, or be float32 where that has 16 bits.");
    }
    added = residuals.data;
  }
  const Scales scales(row_scale, layer_scale, view, op);
  const MaskProblem problem(view, {seed, threshold, dynamic_threshold, unit, rescale}, op);
  Tensor output = new_output(view, dtype, op);
  if (view.elements == 0) {
    return output;
  }
  Dropout dropout = dropout_of(view, problem);
  scales.give(dropout);
  dropout.residual = added;
  dropout.output = data_of(output, op);
  dropout.streams = may_stream(dropout.output, view.elements * element_size(dtype));
  run(dropout, view.dtype, dtype);
  return output;
}

void dropout_inplace(const Tensor& input, const Tensor& seed, int64_t threshold,
                     const std::optional<Tensor>& dynamic_threshold, int64_t unit, bool rescale) {
  constexpr const char* op = "dropout_inplace";
  const DenseView view = dense_view(input, op, "input");
  const MaskProblem problem(view, {seed, threshold, dynamic_threshold, unit, rescale}, op);
  if (view.elements > 0) {
    Dropout dropout = dropout_of(view, problem);
    dropout.output = data_of(input, op);
    run(dropout, view.dtype, view.dtype);
  }
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("dropout_fwd", TORCH_BOX(&fastreg::dropout_fwd));
  m.impl("dropout_inplace", TORCH_BOX(&fastreg::dropout_inplace));
}
