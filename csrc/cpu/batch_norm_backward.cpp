// Door of batch norm's backward operators on the CPU, and their registration.
//
// Traffic over the activations, where the second sweep finds nothing in the caches: two reads of grad_output and input
// and one write a gradient; one sweep where no sums are needed. See batch_norm_schedule.h for what the caches save.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "batch_norm_door.h"

namespace fastreg {
namespace {

struct Gradients {
  Tensor input;
  Tensor residual;
};

// What the backward operators have in common: dz of grad_output.
struct BackwardProblem : BatchNormProblem {
  BackwardProblem(const Tensor& grad_output, const Tensor& input_tensor, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& signs, const Tensor& statistics,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t activation,
                  double negative_slope, const char* op)
      : BatchNormProblem(input_tensor, residual, weight, bias, activation, negative_slope, op),
        offset(input),
        slope(input) {
    norm.grad_output = optional_input(grad_output, input, op, "grad_output");
    norm.signs = signs_view(signs, input, norm.activation, op);
    use_statistics(channel_pairs(statistics, input, op, "statistics").data);
    use_scale();
  }

  Gradients new_gradients(bool wants_input, bool wants_residual, const char* op) {
    Gradients gradients{wants_input ? new_dense(input, op) : empty_gradient(input.dtype, input.device, op),
                        wants_residual ? new_dense(input, op) : empty_gradient(input.dtype, input.device, op)};
    norm.grad_input = wants_input ? data_of(gradients.input, op) : nullptr;
    norm.grad_residual = wants_residual ? data_of(gradients.residual, op) : nullptr;
    norm.streams = (!wants_input || may_stream(norm.grad_input, input)) &&
                   (!wants_residual || may_stream(norm.grad_residual, input));
    return gradients;
  }

  // plain, projected: where the sums of dz and of dz * xhat go; null: not wanted.
  void run_both(bool wants_sums, void* plain, void* projected) const {
    const BatchNormKernels& kernels = kernels_for(input);
    const PartialScratch partials(geometry);
    const BatchNormSums results{.scale = norm.scale,
                                .rstd = norm.rstd,
                                .plain = plain,
                                .projected = projected,
                                .offset = const_cast<void*>(norm.offset),
                                .slope = const_cast<void*>(norm.slope)};
    BatchNormSweeps sweeps;
    if (wants_sums) {
      sweeps.sums = [&](const BatchNormTile& tile, int64_t chunk) {
        kernels.sums(norm, tile, partials.chunk(chunk));
      };
      sweeps.finish = [&](int64_t begin, int64_t end) {
        kernels.finish_sums(geometry, partials.chunk(0), results, begin, end);
      };
    }
    if (norm.grad_input != nullptr || norm.grad_residual != nullptr) {
      sweeps.outputs = [&](const BatchNormTile& tile) { kernels.gradient(norm, tile); };
    }
    sweeps.bytes_read_twice = (norm.residual.data == nullptr ? 2 : 3) * element_size(input.dtype);
    run(sweeps);
  }

  ChannelScratch offset;
  ChannelScratch slope;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(
    const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& signs, const Tensor& statistics, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool training, int64_t activation, double negative_slope,
    std::vector<bool> output_mask) {
  constexpr const char* op = "batch_norm_bwd";
  BackwardProblem problem(grad_output, input, residual, signs, statistics, weight, bias, activation,
                          negative_slope, op);
  const ChannelView& view = problem.input;
  const bool wants_input = output_mask.at(0);
  const bool wants_weight = output_mask.at(2);
  const bool wants_bias = output_mask.at(3);
  check_mask(wants_weight, problem.weights, op, "weight");
  check_mask(wants_bias, problem.biases, op, "bias");
  Gradients gradients = problem.new_gradients(wants_input, output_mask.at(1), op);
  const auto parameter_gradient = [&](bool wanted, const VectorView& parameter) {
    const DType dtype = parameter.given ? parameter.dtype : view.dtype;
    return wanted ? new_vector(view.channels, dtype, view.device, op) : empty_gradient(dtype, view.device, op);
  };
  Tensor grad_weight = parameter_gradient(wants_weight, problem.weights);
  Tensor grad_bias = parameter_gradient(wants_bias, problem.biases);

  if (training && wants_input) {
    problem.norm.offset = problem.offset.data();
    problem.norm.slope = problem.slope.data();
  }
  const ChannelScratch plain(view);
  const ChannelScratch projected(view);
  if (problem.is_empty()) {
    fill(plain.data(), view.channels, accumulation_dtype(view.dtype), 0);
    fill(projected.data(), view.channels, accumulation_dtype(view.dtype), 0);
  } else {
    problem.run_both(problem.norm.slope != nullptr || wants_weight || wants_bias,
                     wants_bias ? plain.data() : nullptr, wants_weight ? projected.data() : nullptr);
  }
  if (wants_weight) {
    reduce_partials(projected.data(), 1, view.channels, problem.weights.dtype, data_of(grad_weight, op));
  }
  if (wants_bias) {
    reduce_partials(plain.data(), 1, view.channels, problem.biases.dtype, data_of(grad_bias, op));
  }
  return {std::move(gradients.input), std::move(gradients.residual), std::move(grad_weight),
          std::move(grad_bias)};
}

Tensor batch_norm_sums(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& signs, const Tensor& statistics,
                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t activation,
                       double negative_slope) {
  constexpr const char* op = "batch_norm_sums";
  BackwardProblem problem(grad_output, input, residual, signs, statistics, weight, bias, activation,
                          negative_slope, op);
  Tensor sums = new_pairs(problem.input, op);
  const PairRows rows(data_of(sums, op), problem.input);
  if (problem.is_empty()) {
    fill(rows.first, 2 * problem.input.channels, accumulation_dtype(problem.input.dtype), 0);
  } else {
    problem.run_both(true, rows.first, rows.second);
  }
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_bwd_apply(const Tensor& grad_output, const Tensor& input,
                                                const std::optional<Tensor>& residual,
                                                const std::optional<Tensor>& signs, const Tensor& statistics,
                                                const std::optional<Tensor>& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& means, int64_t activation,
                                                double negative_slope, std::vector<bool> output_mask) {
  constexpr const char* op = "batch_norm_bwd_apply";
  BackwardProblem problem(grad_output, input, residual, signs, statistics, weight, bias, activation,
                          negative_slope, op);
  const ChannelView& view = problem.input;
  Gradients gradients = problem.new_gradients(output_mask.at(0), output_mask.at(1), op);
  if (means.has_value()) {
    const PairRows rows(channel_pairs(*means, view, op, "means").data, view);
    const auto multiply_by = view.dtype == DType::Float64 ? multiply<double> : multiply<float>;
    multiply_by(rows.first, problem.norm.scale, problem.offset.data(), view.channels);
    multiply_by(rows.second, problem.norm.scale, problem.slope.data(), view.channels);
    multiply_by(problem.slope.data(), problem.norm.rstd, problem.slope.data(), view.channels);
    problem.norm.offset = problem.offset.data();
    problem.norm.slope = problem.slope.data();
  }
  if (!problem.is_empty()) {
    problem.run_both(false, nullptr, nullptr);
  }
  return {std::move(gradients.input), std::move(gradients.residual)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("batch_norm_bwd", TORCH_BOX(&fastreg::batch_norm_bwd));
  m.impl("batch_norm_sums", TORCH_BOX(&fastreg::batch_norm_sums));
  m.impl("batch_norm_bwd_apply", TORCH_BOX(&fastreg::batch_norm_bwd_apply));
}
