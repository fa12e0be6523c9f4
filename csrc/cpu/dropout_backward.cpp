// Dropout's backward operator on the CPU, and its registration.
//
// The mask is drawn again. Traffic over the activations: one read and one write; a layer scale that learns costs a
// second read, and both gradients come from one sweep. Chunks of rows and blocks of columns are cut by shape alone, and
// their partial sums are added in their order: results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>
#include <vector>

#include "dropout_door.h"

namespace fastreg {
namespace {

// Chunks of rows, as many as give each thread something to do, and long enough that their partial sums are small
// beside the rows.
int64_t rows_per_chunk_of(int64_t rows) {
  int64_t chunks = parts_of(rows, std::clamp<int64_t>(rows / 64, 16, 128));
  if (chunks <= 16) {
    chunks = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(chunks)));
  }
  return std::max<int64_t>(parts_of(rows, chunks), 1);
}

// Both gradients, or layer_scale's alone.
void run_layer_scale(const Dropout& dropout, DType input, const DenseView& inputs, DType dtype,
                     void* grad_layer_scale) {
  const int64_t rows = dropout.elements / dropout.columns;
  const int64_t rows_per_chunk = rows_per_chunk_of(rows);
  const int64_t chunks = parts_of(rows, rows_per_chunk);
  Scratch partials;
  const LayerScaleGradient gradient{
      .dropout = dropout,
      .input = inputs.data,
      .partials = partials.reserve(chunks * dropout.columns * element_size(accumulation_dtype(inputs.dtype))),
      .rows = rows,
      .rows_per_chunk = rows_per_chunk};
  const DropoutKernels& kernels = kernels_for(input, inputs.dtype);
  split(chunks * parts_of(dropout.columns, dropout_block_columns), thread_count(dropout.elements),
        [&](int64_t begin, int64_t end) { kernels.layer_scale(gradient, begin, end); });
  reduce_partials(gradient.partials, chunks, dropout.columns, dtype, grad_layer_scale);
}

DType gradient_dtype(int64_t number, const DenseView& gradients, const char* op) {
  if (number < 0 || number > static_cast<int64_t>(DType::Float64)) {
    fail(op, "input_dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64), but is ", number, ".");
  }
  const DType dtype = static_cast<DType>(number);
  if (gradients.dtype != dtype && (gradients.dtype != DType::Float32 || element_size(dtype) != 2)) {
    fail(op, "grad_output must be ", name_of(dtype), ", or float32 where that has 16 bits.");
  }
  return dtype;
}

std::tuple<Tensor, Tensor> dropout_bwd(const Tensor& grad_output, const std::optional<Tensor>& input,
                                       const std::optional<Tensor>& row_scale,
                                       const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& seed,
                                       int64_t threshold, const std::optional<Tensor>& dynamic_threshold, int64_t unit,
                                       bool rescale, int64_t input_dtype, std::vector<bool> output_mask) {
  constexpr const char* op = "dropout_bwd";
  const DenseView gradients = dense_view(grad_output, op, "grad_output");
  const DType dtype = gradient_dtype(input_dtype, gradients, op);
  const Scales scales(row_scale, layer_scale, gradients, op);
  const bool wants_input = output_mask.at(0);
  const bool wants_layer_scale = output_mask.at(1);
  check_mask(wants_layer_scale, scales.layer, op, "layer_scale");
  DenseView inputs{};
  if (wants_layer_scale) {
    if (!input.has_value()) {
      fail(op, "output_mask asks for the gradient of layer_scale, for which input must be given.");
    }
    inputs = view_like(*input, gradients, "grad_output", op, "input");
    if (inputs.dtype != dtype) {
      fail(op, "input must be ", name_of(dtype), ", as input_dtype says.");
    }
  }
  const MaskProblem problem(gradients, {seed, threshold, dynamic_threshold, unit, rescale}, op);
  const DType scale_dtype = scales.layer.given ? scales.layer.dtype : gradients.dtype;
  Tensor grad_input =
      wants_input ? new_output(gradients, dtype, op) : empty_gradient(dtype, gradients.device, op);
  Tensor grad_layer_scale = wants_layer_scale ? new_like(*layer_scale, scale_dtype, gradients.device, op)
                                              : empty_gradient(scale_dtype, gradients.device, op);
  void* const layer_gradient = data_of(grad_layer_scale, op);
  if (gradients.elements == 0) {
    if (wants_layer_scale) {
      reduce_partials(nullptr, 0, gradients.last_size(), scale_dtype, layer_gradient);
    }
    return {std::move(grad_input), std::move(grad_layer_scale)};
  }
  Dropout dropout = dropout_of(gradients, problem);
  scales.give(dropout);
  if (wants_input) {
    dropout.output = data_of(grad_input, op);
    dropout.streams = may_stream(dropout.output, gradients.elements * element_size(dtype));
  }
  if (wants_layer_scale) {
    run_layer_scale(dropout, gradients.dtype, inputs, scale_dtype, layer_gradient);
  } else if (wants_input) {
    run(dropout, gradients.dtype, dtype);
  }
  return {std::move(grad_input), std::move(grad_layer_scale)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) { m.impl("dropout_bwd", TORCH_BOX(&fastreg::dropout_bwd)); }
