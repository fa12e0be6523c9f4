// Door of the CPU norms: checks, allocation, the split among threads, and layer norm's registration.
//
// Traffic over the activations: forward one read and one write, backward two reads and one write. Results do
// not depend on the number of threads: work is cut into rows, chunks of rows and column blocks by shape
// alone, and whatever is summed across them is summed in their order.

#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "door.h"
#include "layer_norm_launch.h"
#include "layer_norm_schedule.h"

namespace fastreg {
namespace {

const NormKernels& kernels_for(NormKind kind, DType dtype) {
  const int index = static_cast<int>(dtype);
  return kind == NormKind::layer ? FASTREG_SIMD_VARIANT(layer_norm_kernels)[index]
                                 : FASTREG_SIMD_VARIANT(rms_norm_kernels)[index];
}

bool rows_stream(const void* output, const RowView& rows) {
  return streams(output, rows.rows, rows.hidden * element_size(rows.dtype));
}

}  // namespace

// --- launchers ---------------------------------------------------------------------------------------------

NormForwardResult norm_forward(NormKind kind, const char* op, const Tensor& input, int64_t normalized_ndim,
                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                               double eps) {
  const RowView rows = row_view(input, normalized_ndim, op, "input");
  const VectorView weights = parameter_view(weight, rows, op, "weight");
  const VectorView biases = parameter_view(bias, rows, op, "bias");

  const DType statistics_dtype = accumulation_dtype(rows.dtype);
  const int64_t statistics_sizes[] = {2, rows.rows};
  NormForwardResult result{new_output(rows.sizes, rows.dimensions, rows.dtype, rows.device, op),
                           kind == NormKind::layer
                               ? new_tensor(statistics_sizes, 2, statistics_dtype, rows.device, op)
                               : new_tensor(statistics_sizes + 1, 1, statistics_dtype, rows.device, op)};
  void* const saved = data_of(result.statistics, op);
  if (rows.rows == 0 || rows.hidden == 0) {
    fill_nan(saved, (kind == NormKind::layer ? 2 : 1) * rows.rows, statistics_dtype);
    return result;
  }

  const ParameterRow weight_row(weights, rows.hidden);
  const ParameterRow bias_row(biases, rows.hidden);
  const StatisticsRows statistics =
      statistics_rows(kind == NormKind::layer, saved, rows.rows, statistics_dtype);
  void* const output = data_of(result.output, op);
  const NormForward norm{.input = rows.data,
                         .weight = weight_row.data(),
                         .bias = bias_row.data(),
                         .output = output,
                         .mean = statistics.mean,
                         .rstd = statistics.rstd,
                         .rows = rows.rows,
                         .hidden = rows.hidden,
                         .input_stride = rows.row_stride,
                         .eps = eps,
                         .streams = rows_stream(output, rows)};
  const NormKernels& kernels = kernels_for(kind, rows.dtype);
  if (forward_cuts_rows(norm.rows, norm.hidden, kernels.columns_per_block)) {
    run_forward_tiles(kernels, norm);
  } else {
    split_forward_rows(kernels, norm.rows, norm.hidden,
                       [&](int64_t begin, int64_t end) { kernels.forward_rows(norm, begin, end); });
  }
  return result;
}

NormBackwardResult norm_backward(NormKind kind, const char* op, const Tensor& grad_output,
                                 const Tensor& input, int64_t normalized_ndim, const Tensor& statistics,
                                 const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                 NormMask mask) {
  const RowView rows = row_view(input, normalized_ndim, op, "input");
  const RowView gradients = row_view(grad_output, normalized_ndim, op, "grad_output");
  check_like(gradients, rows, op, "grad_output");
  const VectorView weights = parameter_view(weight, rows, op, "weight");
  const VectorView biases = parameter_view(bias, rows, op, "bias");
  check_mask(mask.weight, weights, op, "weight");
  check_mask(mask.bias, biases, op, "bias");
  const VectorView saved = statistics_view(statistics, kind == NormKind::layer ? 2 : 1, rows, op);

  const auto parameter_gradient = [&](bool wanted, const VectorView& parameter,
                                      const std::optional<Tensor>& like) {
    return wanted ? new_like(*like, parameter.dtype, rows.device, op)
                  : empty_gradient(parameter.given ? parameter.dtype : rows.dtype, rows.device, op);
  };
  NormBackwardResult result{
      mask.input ? new_output(rows.sizes, rows.dimensions, rows.dtype, rows.device, op)
                 : empty_gradient(rows.dtype, rows.device, op),
      parameter_gradient(mask.weight, weights, weight),
      kind == NormKind::layer ? parameter_gradient(mask.bias, biases, bias) : Tensor(nullptr)};
  if (rows.hidden == 0) {
    return result;
  }

  const int64_t rows_per_chunk = rows_per_chunk_of(rows.rows);
  const int64_t chunks = parts_of(rows.rows, rows_per_chunk);
  const int64_t partial_bytes = chunks * rows.hidden * element_size(accumulation_dtype(rows.dtype));
  Scratch weight_partials;
  Scratch bias_partials;
  const ParameterRow weight_row(mask.input ? weights : VectorView{}, rows.hidden);
  void* const grad_input = mask.input ? data_of(result.grad_input, op) : nullptr;
  const StatisticsRows statistics_row =
      statistics_rows(kind == NormKind::layer, saved.data, rows.rows, saved.dtype);
  const NormBackward norm{.grad_output = gradients.data,
                          .input = rows.data,
                          .weight = weight_row.data(),
                          .mean = statistics_row.mean,
                          .rstd = statistics_row.rstd,
                          .grad_input = grad_input,
                          .weight_partials = mask.weight ? weight_partials.reserve(partial_bytes) : nullptr,
                          .bias_partials = mask.bias ? bias_partials.reserve(partial_bytes) : nullptr,
                          .rows = rows.rows,
                          .hidden = rows.hidden,
                          .grad_output_stride = gradients.row_stride,
                          .input_stride = rows.row_stride,
                          .rows_per_chunk = rows_per_chunk,
                          .streams = mask.input && rows_stream(grad_input, rows)};
  if (mask.input || mask.weight || mask.bias) {
    run_backward(kernels_for(kind, rows.dtype), norm, chunks, mask.input, norm.rows);
  }
  if (mask.weight) {
    reduce_partials(norm.weight_partials, chunks, rows.hidden, weights.dtype,
                    data_of(result.grad_weight, op));
  }
  if (mask.bias) {
    reduce_partials(norm.bias_partials, chunks, rows.hidden, biases.dtype, data_of(result.grad_bias, op));
  }
  return result;
}

// --- layer norm --------------------------------------------------------------------------------------------

namespace {

std::tuple<Tensor, Tensor> layer_norm_fwd(const Tensor& input, int64_t normalized_ndim,
                                          const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps) {
  NormForwardResult result =
      norm_forward(NormKind::layer, "layer_norm_fwd", input, normalized_ndim, weight, bias, eps);
  return {std::move(result.output), std::move(result.statistics)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad_output, const Tensor& input,
                                                  int64_t normalized_ndim, const Tensor& statistics,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias,
                                                  std::vector<bool> output_mask) {
  NormBackwardResult result =
      norm_backward(NormKind::layer, "layer_norm_bwd", grad_output, input, normalized_ndim, statistics,
                    weight, bias, {output_mask.at(0), output_mask.at(1), output_mask.at(2)});
  return {std::move(result.grad_input), std::move(result.grad_weight), std::move(result.grad_bias)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastreg::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastreg::layer_norm_bwd));
}
