// Door of batch norm's forward operators on the CPU, and their registration.
//
// Traffic over the activations, where the second sweep finds nothing in the caches: two reads of input, one of residual
// and one write; evaluation one read of each and one write. See batch_norm_schedule.h for what the caches save.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "batch_norm_door.h"

namespace fastreg {
namespace {

struct Output {
  Tensor tensor;
  Tensor signs;
};

// The tensors that the second sweep of a forward pass fills.
Output new_forward_output(BatchNormProblem& problem, bool keep_signs, const char* op) {
  BatchNorm& norm = problem.norm;
  const bool signs = keep_signs && norm.residual.data != nullptr && needs_sign_only(norm.activation);
  const int64_t bytes = problem.input.lines() * sign_bytes_per_line(problem.input);
  Output output{new_dense(problem.input, op), new_bytes(signs ? bytes : 0, problem.input.device, op)};
  norm.output = data_of(output.tensor, op);
  norm.output_signs = signs ? static_cast<unsigned char*>(data_of(output.signs, op)) : nullptr;
  norm.streams = may_stream(norm.output, problem.input);
  return output;
}

void normalize(const BatchNormProblem& problem) {
  const BatchNormKernels& kernels = kernels_for(problem.input);
  problem.run({.sums = nullptr,
               .finish = nullptr,
               .outputs = [&](const BatchNormTile& tile) { kernels.normalize(problem.norm, tile); },
               .bytes_read_twice = 0});
}

// r = (1 - momentum) * r + momentum * value, in the dtype of accumulation.
template <class Scalar>
void update_running(const VectorView& running, const ParameterRow& before, const Scalar* values, Scalar factor,
                    const Scalar* mean, const Scalar* squares, double momentum, bool skip_nonfinite,
                    const ChannelView& input) {
  const ChannelScratch scratch(input);
  Scalar* const after = static_cast<Scalar*>(scratch.data());
  const Scalar* const old = static_cast<const Scalar*>(before.data());
  const Scalar kept = static_cast<Scalar>(1 - momentum);
  const Scalar moved = static_cast<Scalar>(momentum);
  for (int64_t channel = 0; channel < input.channels; ++channel) {
    // Zero times a finite number is zero.
    const bool finite = mean[channel] * 0 + squares[channel] * 0 == 0;
    const Scalar value = kept * old[channel] + moved * (values[channel] * factor);
    after[channel] = skip_nonfinite && !finite ? old[channel] : value;
  }
  reduce_partials(after, 1, input.channels, running.dtype, const_cast<void*>(running.data));
}

template <class Scalar>
void update_both(const VectorView& running_mean, const VectorView& running_var, const void* mean,
                 const void* squares, double momentum, bool skip_nonfinite, const ChannelView& input) {
  const Scalar* const means = static_cast<const Scalar*>(mean);
  const Scalar* const deviations = static_cast<const Scalar*>(squares);
  const auto update = [&](const VectorView& running, const Scalar* values, Scalar factor) {
    if (running.given) {
      update_running(running, ParameterRow(running, input.channels), values, factor, means, deviations, momentum,
                     skip_nonfinite, input);
    }
  };
  update(running_mean, means, Scalar(1));
  update(running_var, deviations, Scalar(1.0 / double(std::max<int64_t>(input.per_channel() - 1, 1))));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(
    const Tensor& input, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& running_mean,
    const std::optional<Tensor>& running_var, double momentum, double eps, int64_t activation,
    double negative_slope, bool skip_nonfinite, bool keep_signs) {
  constexpr const char* op = "batch_norm_fwd";
  BatchNormProblem problem(input, residual, weight, bias, activation, negative_slope, op);
  const ChannelView& view = problem.input;
  const VectorView means = channel_vector(running_mean, view, op, "running_mean");
  const VectorView variances = channel_vector(running_var, view, op, "running_var");
  Tensor statistics = new_pairs(view, op);
  Output output = new_forward_output(problem, keep_signs, op);
  problem.use_statistics(data_of(statistics, op));
  if (problem.is_empty()) {
    fill_nan(data_of(statistics, op), 2 * view.channels, accumulation_dtype(view.dtype));
    return {std::move(output.tensor), std::move(statistics), std::move(output.signs)};
  }

  const BatchNormKernels& kernels = kernels_for(view);
  const PartialScratch partials(problem.geometry);
  const ChannelScratch squares(view);
  const BatchNormStatistics results{.weight = problem.weight_row.data(),
                                    .mean = const_cast<void*>(problem.norm.mean),
                                    .squares = squares.data(),
                                    .rstd = const_cast<void*>(problem.norm.rstd),
                                    .scale = problem.scale.data(),
                                    .eps = eps};
  problem.run({.sums = [&](const BatchNormTile& tile,
                           int64_t chunk) { kernels.moments(problem.norm, tile, partials.chunk(chunk)); },
               .finish =
                   [&](int64_t begin, int64_t end) {
                     kernels.finish_moments(problem.geometry, partials.chunk(0), results, begin, end);
                   },
               .outputs = [&](const BatchNormTile& tile) { kernels.normalize(problem.norm, tile); },
               .bytes_read_twice = element_size(view.dtype)});
  (view.dtype == DType::Float64 ? update_both<double> : update_both<float>)(
      means, variances, problem.norm.mean, squares.data(), momentum, skip_nonfinite, view);
  return {std::move(output.tensor), std::move(statistics), std::move(output.signs)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_eval(
    const Tensor& input, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& running_mean, const Tensor& running_var, double eps,
    int64_t activation, double negative_slope, bool keep_signs) {
  constexpr const char* op = "batch_norm_eval";
  BatchNormProblem problem(input, residual, weight, bias, activation, negative_slope, op);
  const ChannelView& view = problem.input;
  const ParameterRow means(channel_vector(running_mean, view.channels, view, op, "running_mean"), view.channels);
  const ParameterRow variances(channel_vector(running_var, view.channels, view, op, "running_var"), view.channels);
  Tensor statistics = new_pairs(view, op);
  Output output = new_forward_output(problem, keep_signs, op);
  problem.use_statistics(data_of(statistics, op));
  if (view.channels > 0) {
    kernels_for(view).finish_running(means.data(), variances.data(),
                                     {.weight = problem.weight_row.data(),
                                      .mean = const_cast<void*>(problem.norm.mean),
                                      .squares = nullptr,
                                      .rstd = const_cast<void*>(problem.norm.rstd),
                                      .scale = problem.scale.data(),
                                      .eps = eps},
                                     0, view.channels);
  }
  if (!problem.is_empty()) {
    normalize(problem);
  }
  return {std::move(output.tensor), std::move(statistics), std::move(output.signs)};
}

Tensor batch_norm_moments(const Tensor& input) {
  constexpr const char* op = "batch_norm_moments";
  BatchNormProblem problem(input, std::nullopt, std::nullopt, std::nullopt, 0, 0, op);
  Tensor moments = new_pairs(problem.input, op);
  const PairRows rows(data_of(moments, op), problem.input);
  if (problem.is_empty()) {
    fill(rows.first, 2 * problem.input.channels, accumulation_dtype(problem.input.dtype), 0);
    return moments;
  }
  const BatchNormKernels& kernels = kernels_for(problem.input);
  const PartialScratch partials(problem.geometry);
  problem.run({.sums = [&](const BatchNormTile& tile,
                           int64_t chunk) { kernels.moments(problem.norm, tile, partials.chunk(chunk)); },
               .finish =
                   [&](int64_t begin, int64_t end) {
                     kernels.finish_moments(problem.geometry, partials.chunk(0),
                                            {.weight = nullptr,
                                             .mean = rows.first,
                                             .squares = rows.second,
                                             .rstd = nullptr,
                                             .scale = nullptr,
                                             .eps = 0},
                                            begin, end);
                   },
               .outputs = nullptr,
               .bytes_read_twice = 0});
  return moments;
}

std::tuple<Tensor, Tensor> batch_norm_apply(const Tensor& input, const std::optional<Tensor>& residual,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            const Tensor& statistics, int64_t activation, double negative_slope,
                                            bool keep_signs) {
  constexpr const char* op = "batch_norm_apply";
  BatchNormProblem problem(input, residual, weight, bias, activation, negative_slope, op);
  problem.use_statistics(channel_pairs(statistics, problem.input, op, "statistics").data);
  Output output = new_forward_output(problem, keep_signs, op);
  if (!problem.is_empty()) {
    problem.use_scale();
    normalize(problem);
  }
  return {std::move(output.tensor), std::move(output.signs)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&fastreg::batch_norm_fwd));
  m.impl("batch_norm_eval", TORCH_BOX(&fastreg::batch_norm_eval));
  m.impl("batch_norm_moments", TORCH_BOX(&fastreg::batch_norm_moments));
  m.impl("batch_norm_apply", TORCH_BOX(&fastreg::batch_norm_apply));
}
