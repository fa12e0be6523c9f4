// Door of the CPU norms: checks, allocation, the split among threads, and layer norm's registration.
//
// Traffic over the activations: forward one read and one write, backward two reads and one write. Results do
// not depend on the number of threads: work is cut into rows, chunks of rows and column blocks by shape
// alone, and whatever is summed across them is summed in their order.

#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <tuple>
#include <vector>

#include "door.h"
#include "layer_norm_launch.h"

namespace fastreg {
namespace {

const NormKernels& kernels_for(NormKind kind, DType dtype) {
  const int index = static_cast<int>(dtype);
  return kind == NormKind::layer ? FASTREG_SIMD_VARIANT(layer_norm_kernels)[index]
                                 : FASTREG_SIMD_VARIANT(rms_norm_kernels)[index];
}

// A row of statistics inside the statistics tensor, (2, rows) for layer norm and (rows,) for rms norm.
struct StatisticsRows {
  void* mean;
  void* rstd;
};

StatisticsRows statistics_rows(NormKind kind, const void* data, const RowView& input) {
  char* bytes = static_cast<char*>(const_cast<void*>(data));
  if (kind == NormKind::rms) {
    return {nullptr, bytes};
  }
  return {bytes, bytes + input.rows * element_size(accumulation_dtype(input.dtype))};
}

bool rows_stream(const void* output, const RowView& rows) {
  return streams(output, rows.rows, rows.hidden * element_size(rows.dtype));
}

// --- forward -----------------------------------------------------------------------------------------------

void run_forward(const NormKernels& kernels, const NormForward& norm) {
  const int64_t threads = thread_count(norm.rows * norm.hidden);
  const int64_t blocks = parts_of(norm.hidden, kernels.columns_per_block);
  // Fewer than four rows a thread, and long ones: cut the rows themselves.
  if (threads > 1 && norm.rows < 4 * threads && blocks > 1) {
    const int64_t tiles = norm.rows * blocks;
    std::vector<Moments<double>> moments(static_cast<size_t>(tiles));
    split(tiles, threads,
          [&](int64_t begin, int64_t end) { kernels.forward_moments(norm, moments.data(), begin, end); });
    kernels.forward_statistics(norm, moments.data());
    split(tiles, threads, [&](int64_t begin, int64_t end) { kernels.forward_normalize(norm, begin, end); });
    return;
  }
  // Short rows are worked on in fours, and which four must not depend on the threads.
  const int64_t unit = norm.hidden <= kernels.columns_per_grouped_row ? rows_per_group : 1;
  split(parts_of(norm.rows, unit), threads, [&](int64_t begin, int64_t end) {
    kernels.forward_rows(norm, begin * unit, std::min(end * unit, norm.rows));
  });
}

// --- backward ----------------------------------------------------------------------------------------------

// Chunks of rows: enough of them to share among threads, long enough that their partial sums are small beside
// the rows. Few chunks are a power of two, so that they share out evenly.
int64_t rows_per_chunk_of(int64_t rows) {
  int64_t chunks = parts_of(rows, std::clamp<int64_t>(rows / 64, 16, 128));
  if (chunks <= 16) {
    chunks = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(chunks)));
  }
  return std::max<int64_t>(parts_of(rows, chunks), 1);
}

void run_backward(const NormKernels& kernels, const NormBackward& norm, int64_t chunks) {
  const int64_t threads = thread_count(norm.rows * norm.hidden);
  const int64_t blocks = parts_of(norm.hidden, kernels.columns_per_block);
  if (threads > 1 && chunks < threads && blocks > 1) {
    std::vector<RowSums> sums(static_cast<size_t>(norm.grad_input == nullptr ? 0 : norm.rows * blocks));
    split(chunks * blocks, threads,
          [&](int64_t begin, int64_t end) { kernels.backward_sums(norm, sums.data(), begin, end); });
    if (norm.grad_input != nullptr) {
      split(norm.rows * blocks, threads,
            [&](int64_t begin, int64_t end) { kernels.backward_apply(norm, sums.data(), begin, end); });
    }
    return;
  }
  split(chunks, threads, [&](int64_t begin, int64_t end) { kernels.backward_chunks(norm, begin, end); });
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
  const StatisticsRows statistics = statistics_rows(kind, saved, rows);
  void* const output = data_of(result.output, op);
  run_forward(kernels_for(kind, rows.dtype), NormForward{.input = rows.data,
                                                         .weight = weight_row.data(),
                                                         .bias = bias_row.data(),
                                                         .output = output,
                                                         .mean = statistics.mean,
                                                         .rstd = statistics.rstd,
                                                         .rows = rows.rows,
                                                         .hidden = rows.hidden,
                                                         .input_stride = rows.row_stride,
                                                         .eps = eps,
                                                         .streams = rows_stream(output, rows)});
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
  const StatisticsRows statistics_row = statistics_rows(kind, saved.data, rows);
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
    run_backward(kernels_for(kind, rows.dtype), norm, chunks);
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
