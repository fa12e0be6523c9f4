// Door of the CPU norms of a sum with dropout: checks, allocation, the split among threads, and the registration of
// layer norm's operators.
//
// Traffic over the activations: forward two reads (input, residual) and two writes (sum, output), backward three reads
// (grad_output, sum, grad_sum) and two writes (grad_input, grad_residual), of which each that is absent or not wanted
// costs nothing; a layer scale that learns costs a read of the input. Results do not depend on the number of threads.

#include "dropout_add_layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../philox.h"
#include "door.h"
#include "dropout_add_layer_norm_launch.h"
#include "dropout_door.h"
#include "layer_norm_schedule.h"

namespace fastreg {
namespace {

const DropoutAddNormKernels& kernels_for(NormKind kind, DType input, DType sum) {
  const int row = static_cast<int>(input);
  const int column = sum == input ? 0 : 1;
  return kind == NormKind::layer ? FASTREG_SIMD_VARIANT(dropout_add_layer_norm_kernels)[row][column]
                                 : FASTREG_SIMD_VARIANT(dropout_add_rms_norm_kernels)[row][column];
}

bool rows_stream(const void* output, const RowView& rows, DType dtype) {
  return streams(output, rows.rows, rows.hidden * element_size(dtype));
}

// --- checks ------------------------------------------------------------------------------------------------

// A second tensor of rows, of the first one's shape.
RowView rows_like(const Tensor& tensor, const RowView& first, const char* first_name, int64_t normalized_ndim,
                  const char* op, const char* name) {
  const RowView view = row_view(tensor, normalized_ndim, op, name);
  if (view.dimensions != first.dimensions || !std::equal(view.sizes, view.sizes + view.dimensions, first.sizes) ||
      !(view.device == first.device)) {
    fail(op, name, " must have the shape and device of ", first_name, ".");
  }
  return view;
}

void check_dtype(const RowView& view, DType dtype, const char* op, const char* name) {
  if (view.dtype != dtype) {
    fail(op, name, " must be ", name_of(dtype), ", but is ", name_of(view.dtype), ".");
  }
}

// residual and sum have the input's dtype, or are fp32 where that has 16 bits.
void check_same_or_wide(const RowView& view, DType input, const char* op, const char* name) {
  if (view.dtype != input && (view.dtype != DType::Float32 || element_size(input) != 2)) {
    fail(op, name, " is ", name_of(view.dtype), " but input is ", name_of(input),
         "; it must be the same, or float32 with an input of 16 bits.");
  }
}

// One element for as many adjacent rows: its shape is a beginning of the rows'.
VectorView row_scale_view(const std::optional<Tensor>& tensor, const RowView& rows, int64_t normalized_ndim,
                          const char* op, int64_t* count) {
  *count = 1;
  if (!tensor.has_value()) {
    return {};
  }
  int64_t dimensions = 0;
  int64_t* sizes = nullptr;
  check_call(aoti_torch_get_dim(tensor->get(), &dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(tensor->get(), &sizes), op, "read sizes");
  if (dimensions > rows.dimensions - normalized_ndim || !std::equal(sizes, sizes + dimensions, rows.sizes)) {
    fail(op, "row_scale must have the first of the dimensions of input's shape before the normalized ones.");
  }
  for (int64_t dimension = 0; dimension < dimensions; ++dimension) {
    *count *= sizes[dimension];
  }
  const VectorView view = vector_view(*tensor, *count, rows.device, op, "row_scale");
  if ((view.dtype == DType::Float64) != (rows.dtype == DType::Float64)) {
    fail(op, "row_scale is ", name_of(view.dtype), " but input is ", name_of(rows.dtype),
         "; float64 mixes with no other dtype.");
  }
  return view;
}

// --- the branch --------------------------------------------------------------------------------------------

// The branch as the kernels want it.
class [[gnu::visibility("hidden")]] Branch {
 public:
  Branch(const BranchArguments& arguments, const RowView& rows, int64_t normalized_ndim, const char* op)
      : layer_scale(parameter_view(arguments.layer_scale, rows, op, "layer_scale")),
        row_scale_(row_scale_view(arguments.row_scale, rows, normalized_ndim, op, &row_scales_)),
        row_values_(row_scale_, row_scales_),
        layer_values_(layer_scale, rows.hidden) {
    constexpr int64_t lanes = static_cast<int64_t>(half_lane_count);
    int64_t threshold = arguments.threshold;
    if (threshold < 0 || threshold > lanes) {
      fail(op, "threshold must be between 0 and ", lanes, ", but is ", threshold, ".");
    }
    if (arguments.dynamic_threshold.has_value()) {
      threshold = read_integer(*arguments.dynamic_threshold, rows.device, op, "dynamic_threshold");
      threshold = std::clamp<int64_t>(threshold, 0, lanes);
    }
    given_.rule = KeepRule::all;
    given_.scale = 1;
    if (arguments.seed.has_value()) {
      if (threshold > 0) {
        given_.rule = threshold == lanes ? KeepRule::none : KeepRule::elements;
      }
      given_.seed = static_cast<uint64_t>(read_integer(*arguments.seed, rows.device, op, "seed"));
      given_.threshold = static_cast<uint16_t>(threshold);
      given_.scale = keep_scale(static_cast<uint64_t>(threshold), half_lane_count);
    }
    given_.row_scale = row_values_.data();
    given_.rows_per_scale = std::max<int64_t>(rows.rows / std::max<int64_t>(row_scales_, 1), 1);
    given_.layer_scale = layer_values_.data();
  }

  DropoutBranch of(const void* input, int64_t input_stride) const {
    DropoutBranch branch = given_;
    branch.input = input;
    branch.input_stride = input_stride;
    return branch;
  }

  const VectorView layer_scale;

 private:
  int64_t row_scales_ = 1;
  VectorView row_scale_;
  ParameterRow row_values_;
  ParameterRow layer_values_;
  DropoutBranch given_{};
};

}  // namespace

// --- launchers ---------------------------------------------------------------------------------------------

DropoutAddNormForwardResult dropout_add_norm_forward(NormKind kind, const char* op, const Tensor& input,
                                                     const std::optional<Tensor>& residual, int64_t normalized_ndim,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const BranchArguments& arguments, double eps, bool float_sum,
                                                     bool keep_sum) {
  const RowView rows = row_view(input, normalized_ndim, op, "input");
  RowView added{};
  if (residual.has_value()) {
    added = rows_like(*residual, rows, "input", normalized_ndim, op, "residual");
    check_same_or_wide(added, rows.dtype, op, "residual");
  }
  const VectorView weights = parameter_view(weight, rows, op, "weight");
  const VectorView biases = parameter_view(bias, rows, op, "bias");
  const Branch branch(arguments, rows, normalized_ndim, op);

  const DType statistics_dtype = accumulation_dtype(rows.dtype);
  const DType sum_dtype = float_sum              ? statistics_dtype
                          : residual.has_value() ? added.dtype
                                                 : rows.dtype;
  const bool centred = kind == NormKind::layer;
  const int64_t statistics_sizes[] = {2, rows.rows};
  DropoutAddNormForwardResult result{
      new_output(rows.sizes, rows.dimensions, rows.dtype, rows.device, op),
      keep_sum ? new_output(rows.sizes, rows.dimensions, sum_dtype, rows.device, op)
               : new_vector(0, sum_dtype, rows.device, op),
      centred ? new_tensor(statistics_sizes, 2, statistics_dtype, rows.device, op)
              : new_tensor(statistics_sizes + 1, 1, statistics_dtype, rows.device, op)};
  void* const saved = data_of(result.statistics, op);
  if (rows.rows == 0 || rows.hidden == 0) {
    fill_nan(saved, (centred ? 2 : 1) * rows.rows, statistics_dtype);
    return result;
  }

  const ParameterRow weight_row(weights, rows.hidden);
  const ParameterRow bias_row(biases, rows.hidden);
  const StatisticsRows statistics = statistics_rows(centred, saved, rows.rows, statistics_dtype);
  void* const output = data_of(result.output, op);
  DropoutAddNormForward norm{};
  static_cast<NormForward&>(norm) = {.input = nullptr,
                                     .weight = weight_row.data(),
                                     .bias = bias_row.data(),
                                     .output = output,
                                     .mean = statistics.mean,
                                     .rstd = statistics.rstd,
                                     .rows = rows.rows,
                                     .hidden = rows.hidden,
                                     .input_stride = rows.hidden,
                                     .eps = eps,
                                     .streams = rows_stream(output, rows, rows.dtype)};
  norm.branch = branch.of(rows.data, rows.row_stride);
  norm.residual = added.data;
  norm.residual_stride = added.row_stride;
  norm.wide_residual = residual.has_value() && added.dtype != rows.dtype;
  norm.sum = keep_sum ? data_of(result.sum, op) : nullptr;

  const DropoutAddNormKernels& kernels = kernels_for(kind, rows.dtype, sum_dtype);
  const int64_t row_bytes = rows.hidden * element_size(sum_dtype);
  if (forward_cuts_rows(rows.rows, rows.hidden, kernels.columns_per_block)) {
    // The sum is read again by whichever thread.
    Scratch sum;
    if (!keep_sum) {
      norm.sum = sum.reserve(rows.rows * row_bytes);
    }
    norm.input = norm.sum;
    run_forward_tiles(kernels, norm);
    return result;
  }
  norm.streams_sum = keep_sum && rows_stream(norm.sum, rows, sum_dtype);
  split_forward_rows(kernels, rows.rows, rows.hidden, [&](int64_t begin, int64_t end) {
    Scratch buffer;
    DropoutAddNormForward own = norm;
    if (!keep_sum || norm.streams_sum) {
      own.buffer = buffer.reserve(row_bytes * (rows.hidden <= kernels.columns_per_grouped_row ? rows_per_group : 1));
    }
    kernels.forward_rows(own, begin, end);
  });
  return result;
}

DropoutAddNormBackwardResult dropout_add_norm_backward(
    NormKind kind, const char* op, const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
    const Tensor& sum, const std::optional<Tensor>& input, int64_t normalized_ndim, const Tensor& statistics,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const BranchArguments& arguments,
    int64_t input_dtype, const DropoutAddNormMask& mask) {
  if (input_dtype < 0 || input_dtype > static_cast<int64_t>(DType::Float64)) {
    fail(op, "input_dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64), but is ", input_dtype, ".");
  }
  const DType dtype = static_cast<DType>(input_dtype);
  const RowView rows = row_view(sum, normalized_ndim, op, "sum");
  check_same_or_wide(rows, dtype, op, "sum");
  const RowView gradients = rows_like(grad_output, rows, "sum", normalized_ndim, op, "grad_output");
  check_dtype(gradients, dtype, op, "grad_output");
  RowView sum_gradients{};
  if (grad_sum.has_value()) {
    sum_gradients = rows_like(*grad_sum, rows, "sum", normalized_ndim, op, "grad_sum");
    check_dtype(sum_gradients, rows.dtype, op, "grad_sum");
  }
  const VectorView weights = parameter_view(weight, rows, op, "weight");
  const VectorView biases = parameter_view(bias, rows, op, "bias");
  const Branch branch(arguments, rows, normalized_ndim, op);
  check_mask(mask.weight, weights, op, "weight");
  check_mask(mask.bias, biases, op, "bias");
  check_mask(mask.layer_scale, branch.layer_scale, op, "layer_scale");
  RowView inputs{};
  if (mask.layer_scale) {
    if (!input.has_value()) {
      fail(op, "output_mask asks for the gradient of layer_scale, for which input must be given.");
    }
    inputs = rows_like(*input, rows, "sum", normalized_ndim, op, "input");
    check_dtype(inputs, dtype, op, "input");
  }
  const bool centred = kind == NormKind::layer;
  const VectorView saved = statistics_view(statistics, centred ? 2 : 1, rows, op);

  const auto rows_gradient = [&](bool wanted, DType of) {
    return wanted ? new_output(rows.sizes, rows.dimensions, of, rows.device, op)
                  : empty_gradient(of, rows.device, op);
  };
  const auto vector_gradient = [&](bool wanted, const VectorView& parameter, const std::optional<Tensor>& like) {
    return wanted ? new_like(*like, parameter.dtype, rows.device, op)
                  : empty_gradient(parameter.given ? parameter.dtype : rows.dtype, rows.device, op);
  };
  DropoutAddNormBackwardResult result{rows_gradient(mask.input, dtype),
                                      rows_gradient(mask.residual, rows.dtype),
                                      vector_gradient(mask.weight, weights, weight),
                                      centred ? vector_gradient(mask.bias, biases, bias) : Tensor(nullptr),
                                      vector_gradient(mask.layer_scale, branch.layer_scale, arguments.layer_scale)};
  if (rows.hidden == 0) {
    return result;
  }

  const bool wants_rows = mask.input || mask.residual || mask.layer_scale;
  const int64_t rows_per_chunk = rows_per_chunk_of(rows.rows);
  const int64_t chunks = parts_of(rows.rows, rows_per_chunk);
  const int64_t partial_bytes = chunks * rows.hidden * element_size(saved.dtype);
  Scratch weight_partials;
  Scratch bias_partials;
  Scratch layer_scale_partials;
  const ParameterRow weight_row(wants_rows ? weights : VectorView{}, rows.hidden);
  void* const grad_input = mask.input ? data_of(result.grad_input, op) : nullptr;
  void* const grad_residual = mask.residual ? data_of(result.grad_residual, op) : nullptr;
  const StatisticsRows statistics_row = statistics_rows(centred, saved.data, rows.rows, saved.dtype);
  DropoutAddNormBackward norm{};
  static_cast<NormBackward&>(norm) = {
      .grad_output = gradients.data,
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
      .streams = mask.input && rows_stream(grad_input, rows, dtype)};
  norm.branch = branch.of(inputs.data, inputs.row_stride);
  norm.grad_sum = sum_gradients.data;
  norm.grad_sum_stride = sum_gradients.row_stride;
  norm.grad_residual = grad_residual;
  norm.layer_scale_partials = mask.layer_scale ? layer_scale_partials.reserve(partial_bytes) : nullptr;
  norm.streams_residual = mask.residual && rows_stream(grad_residual, rows, rows.dtype);
  if (wants_rows || mask.weight || mask.bias) {
    run_backward(kernels_for(kind, dtype, rows.dtype), norm, chunks, wants_rows, chunks);
  }
  const auto reduce = [&](bool wanted, const void* partials, const VectorView& parameter, const Tensor& gradient) {
    if (wanted) {
      reduce_partials(partials, chunks, rows.hidden, parameter.dtype, data_of(gradient, op));
    }
  };
  reduce(mask.weight, norm.weight_partials, weights, result.grad_weight);
  reduce(mask.bias, norm.bias_partials, biases, result.grad_bias);
  reduce(mask.layer_scale, norm.layer_scale_partials, branch.layer_scale, result.grad_layer_scale);
  return result;
}

// --- layer norm --------------------------------------------------------------------------------------------

namespace {

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
    const Tensor& input, const std::optional<Tensor>& residual, int64_t normalized_ndim,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& row_scale,
    const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& seed, int64_t threshold,
    const std::optional<Tensor>& dynamic_threshold, double eps, bool float_sum, bool keep_sum) {
  DropoutAddNormForwardResult result = dropout_add_norm_forward(
      NormKind::layer, "dropout_add_layer_norm_fwd", input, residual, normalized_ndim, weight, bias,
      {row_scale, layer_scale, seed, threshold, dynamic_threshold}, eps, float_sum, keep_sum);
  return {std::move(result.output), std::move(result.sum), std::move(result.statistics)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    const Tensor& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const std::optional<Tensor>& input, int64_t normalized_ndim, const Tensor& statistics,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& row_scale,
    const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& seed, int64_t threshold,
    const std::optional<Tensor>& dynamic_threshold, int64_t input_dtype, std::vector<bool> output_mask) {
  DropoutAddNormBackwardResult result = dropout_add_norm_backward(
      NormKind::layer, "dropout_add_layer_norm_bwd", grad_output, grad_sum, sum, input, normalized_ndim, statistics,
      weight, bias, {row_scale, layer_scale, seed, threshold, dynamic_threshold}, input_dtype,
      {output_mask.at(0), output_mask.at(1), output_mask.at(2), output_mask.at(3), output_mask.at(4)});
  return {std::move(result.grad_input), std::move(result.grad_residual), std::move(result.grad_weight),
          std::move(result.grad_bias), std::move(result.grad_layer_scale)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("dropout_add_layer_norm_fwd", TORCH_BOX(&fastreg::dropout_add_layer_norm_fwd));
  m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&fastreg::dropout_add_layer_norm_bwd));
}
