// The kernels of dropout + residual + layer norm and + RMS norm against fp64, without torch; as standalone.cpp, with
// the same arguments and exit code. What they share with the norms alone is tested for mistakes here (mutants.py).

#include <vector>

#include "dropout_add_layer_norm.cuh"
#include "standalone.h"

namespace {

constexpr uint64_t seed_value = 0xfedcba9876543210;
constexpr uint64_t threshold = 20000;  // of 2^16

struct Case {
  int architecture;
  int multiprocessors;
  int64_t rows;
  int columns;
  int64_t gap;    // elements between the rows of what is not contiguous
  int64_t shift;  // of their first element, in elements
  bool bare;      // no residual, scales, mask or gradient of the sum; the sum is not kept
};

std::string describe(const Case& current) {
  return "sm_" + std::to_string(current.architecture) + " with " + std::to_string(current.multiprocessors) +
         " multiprocessors, " + std::to_string(current.rows) + " x " + std::to_string(current.columns) + ", gap " +
         std::to_string(current.gap) + ", shift " + std::to_string(current.shift) + (current.bare ? ", bare" : "");
}

// An integer in memory of its own.
struct Number {
  std::unique_ptr<void, decltype(&release)> memory;

  explicit Number(int64_t value) : memory(allocate(sizeof(value), sizeof(value)), &release) {
    *static_cast<int64_t*>(memory.get()) = value;
    simulator::tracer::initialised(memory.get(), sizeof(value));
  }

  const int64_t* data() const { return static_cast<const int64_t*>(memory.get()); }
};

// --- one case --------------------------------------------------------------------------------------------------------

template <class Sum, class Element, bool centred>
void run_case(const Case& current, const DeviceTraits& device) {
  const int64_t rows = current.rows;
  const int columns = current.columns;
  const bool bare = current.bare;
  std::mt19937_64 random(static_cast<uint64_t>(columns));
  const auto rows_of = [&]<class Of>(double mean) {
    Matrix<Of> matrix(rows, columns, current.gap, current.shift);
    matrix.fill(random, mean, 1.0);
    return matrix;
  };
  Matrix<Element> input = rows_of.template operator()<Element>(0.0);
  Matrix<Element> residual = rows_of.template operator()<Element>(centred ? 3.0 : 0.0);
  Matrix<Element> grad_output = rows_of.template operator()<Element>(0.0);
  Matrix<Sum> grad_sum = rows_of.template operator()<Sum>(0.0);
  Matrix<float> weight(1, columns), row_scale(1, (rows + 1) / 2);
  Matrix<bfloat16> bias(1, columns), layer_scale(1, columns);
  weight.fill(random, 0.0, 1.0);
  bias.fill(random, 0.0, 1.0);
  row_scale.fill(random, 1.0, 0.25);
  layer_scale.fill(random, 1.0, 0.25);
  const Number seed(static_cast<int64_t>(seed_value)), limit(static_cast<int64_t>(threshold));
  const bool dynamic = columns % 2 == 0;
  const uint64_t given = dynamic ? threshold / 2 : threshold;  // with its scale; neither counts where one is read

  const Parameter weight_parameter{weight.data, DType::Float32};
  const Parameter layer_parameter{bare ? nullptr : layer_scale.data, DType::BFloat16};
  const BranchArguments branch{
      .row_scale = {bare ? nullptr : row_scale.data, DType::Float32},
      .layer_scale = layer_parameter,
      .scale_rows = divisor_of(2),
      .seed = bare ? nullptr : seed.data(),
      .dynamic_threshold = dynamic ? limit.data() : nullptr,
      .threshold = static_cast<int64_t>(given),
      .scale = static_cast<float>(fastreg::keep_scale(given, fastreg::half_lane_count))};

  Matrix<Element> output(rows, columns);
  Matrix<Sum> sum(rows, columns);
  Matrix<float> mean(1, rows), rstd(1, rows);
  DropoutAddForwardArguments forward{.norm = {.input = input.data,
                                              .output = output.data,
                                              .mean = mean.data,
                                              .rstd = rstd.data,
                                              .weight = weight_parameter,
                                              .bias = {centred ? bias.data : nullptr, DType::BFloat16},
                                              .rows = rows,
                                              .row_stride = input.stride,
                                              .columns = columns,
                                              .threads_per_row = 0,
                                              .cluster = 1,
                                              .eps = 1e-5f},
                                     .dtype = dtype_of<Element>(),
                                     .residual = {bare ? nullptr : residual.data, dtype_of<Element>()},
                                     .residual_stride = residual.stride,
                                     .sum = bare ? nullptr : sum.data,
                                     .branch = branch};
  require(launch_dropout_add_forward<Sum, centred>(forward, device, nullptr));
  if (bare) {
    // The sum is the input; backward reads it.
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        sum.at(row, column) = from_float<Sum>(to_float(input.at(row, column)));
      }
    }
    simulator::tracer::initialised(sum.data, static_cast<size_t>(rows * columns) * sizeof(Sum));
  }

  Matrix<Element> grad_input(rows, columns);
  Matrix<Sum> grad_residual(rows, columns);
  DropoutAddBackwardArguments backward{.norm = {.grad_output = grad_output.data,
                                                .input = sum.data,
                                                .mean = mean.data,
                                                .rstd = rstd.data,
                                                .weight = weight_parameter,
                                                .grad_input = bare ? nullptr : grad_input.data,
                                                .weight_partials = nullptr,
                                                .bias_partials = nullptr,
                                                .rows = rows,
                                                .grad_output_stride = grad_output.stride,
                                                .input_stride = columns,
                                                .columns = columns,
                                                .threads_per_row = 0,
                                                .cluster = 1},
                                       .dtype = dtype_of<Element>(),
                                       .grad_sum = bare ? nullptr : grad_sum.data,
                                       .grad_sum_stride = grad_sum.stride,
                                       .grad_residual = grad_residual.data,
                                       .input = input.data,
                                       .input_stride = input.stride,
                                       .scale_partials = nullptr,
                                       .row_means = nullptr,
                                       .branch = branch};
  BackwardPlan plan;
  require(plan_dropout_add_backward<Sum, centred>(backward, !bare, device, plan));
  Matrix<float> weight_partials(plan.partials, columns), bias_partials(plan.partials, columns),
      scale_partials(plan.partials, columns), row_means(rows, centred ? 2 : 1);
  backward.norm.weight_partials = weight_partials.data;
  backward.norm.bias_partials = centred ? bias_partials.data : nullptr;
  backward.scale_partials = bare ? nullptr : scale_partials.data;
  backward.row_means = row_means.data;
  require(launch_dropout_add_backward<Sum, centred>(plan, backward, nullptr));

  Matrix<float> grad_weight(1, columns);
  Matrix<bfloat16> grad_bias(1, columns), grad_scale(1, columns);
  require(launch_dropout_add_reduce<centred>(
      ReduceArguments{{weight_partials.data, grad_weight.data, DType::Float32},
                      {bias_partials.data, grad_bias.data, DType::BFloat16},
                      plan.partials,
                      columns},
      centred ? 2 : 1, nullptr));
  if (!bare) {
    require(launch_dropout_add_reduce<centred>(
        ReduceArguments{{scale_partials.data, grad_scale.data, DType::BFloat16}, {}, plan.partials, columns}, 1,
        nullptr));
  }

  const double scale = fastreg::keep_scale(threshold, fastreg::half_lane_count);
  const auto factor = [&](int64_t row, int64_t column) {
    if (bare) return 1.0;
    const bool kept = fastreg::half_lane_at(seed_value, static_cast<uint64_t>(row * columns + column)) >= threshold;
    return kept ? scale * row_scale.value(0, row / 2) : 0.0;
  };
  const size_t size = static_cast<size_t>(columns);
  std::vector<double> exact_weight(size), weight_terms(size), exact_bias(size), bias_terms(size), exact_scale(size),
      scale_terms(size);
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0, absolute = 0, squares = 0, projection = 0, plain = 0, scaled_size = 0;
    for (int64_t column = 0; column < columns; ++column) {
      const double layer = bare ? 1.0 : layer_scale.value(0, column);
      const double product = input.value(row, column) * factor(row, column) * layer;
      const double added = bare ? 0.0 : residual.value(row, column);
      require_close<Sum>("sum", sum.value(row, column), product + added, std::abs(product) + std::abs(added));
      total += sum.value(row, column);
      absolute += std::abs(sum.value(row, column));
    }
    const double exact_mean = centred ? total / columns : 0.0;
    for (int64_t column = 0; column < columns; ++column) squares += std::pow(sum.value(row, column) - exact_mean, 2);
    const double exact_rstd = 1 / std::sqrt(squares / columns + 1e-5);
    const double shift = centred ? absolute / columns * exact_rstd : 0.0;
    for (int64_t column = 0; column < columns; ++column) {
      const double scaled = grad_output.value(row, column) * weight.value(0, column);
      projection += scaled * (sum.value(row, column) - exact_mean) * exact_rstd / columns;
      plain += centred ? scaled / columns : 0.0;
      scaled_size += std::abs(scaled) / columns;
    }
    require_close<float>("rstd", rstd.value(0, row), exact_rstd, exact_rstd);
    if (centred) require_close<float>("mean", mean.value(0, row), exact_mean, absolute / columns);
    for (size_t column = 0; column < size; ++column) {
      const int64_t place = static_cast<int64_t>(column);
      const double normalized = (sum.value(row, place) - exact_mean) * exact_rstd;
      const double gradient = grad_output.value(row, place);
      const double of_weight = weight.value(0, place);
      const double offset = centred ? bias.value(0, place) : 0.0;
      require_close<Element>("output", output.value(row, place), normalized * of_weight + offset,
                             (std::abs(normalized) + shift) * std::abs(of_weight) + std::abs(offset));
      const double added = bare ? 0.0 : grad_sum.value(row, place);
      const double exact = (gradient * of_weight - plain - normalized * projection) * exact_rstd + added;
      const double of_norm =
          std::abs(gradient * of_weight) + (1 + std::abs(normalized) + shift) * (1 + shift) * scaled_size;
      const double terms = of_norm * exact_rstd + std::abs(added);
      require_close<Sum>("grad_residual", grad_residual.value(row, place), exact, terms);
      if (!bare) {
        const double of_branch = factor(row, place) * layer_scale.value(0, place);
        require_close<Element>("grad_input", grad_input.value(row, place), exact * of_branch,
                               terms * std::abs(of_branch));
        exact_scale[column] += exact * factor(row, place) * input.value(row, place);
        scale_terms[column] += terms * std::abs(factor(row, place) * input.value(row, place));
      }
      exact_weight[column] += gradient * normalized;
      weight_terms[column] += std::abs(gradient) * (std::abs(normalized) + shift);
      exact_bias[column] += gradient;
      bias_terms[column] += std::abs(gradient);
    }
  }
  for (size_t column = 0; column < size; ++column) {
    const int64_t place = static_cast<int64_t>(column);
    require_close<float>("grad_weight", grad_weight.value(0, place), exact_weight[column], weight_terms[column]);
    if (centred) {
      require_close<bfloat16>("grad_bias", grad_bias.value(0, place), exact_bias[column], bias_terms[column]);
    }
    if (!bare) {
      require_close<bfloat16>("grad_layer_scale", grad_scale.value(0, place), exact_scale[column],
                              scale_terms[column]);
    }
  }
}

// As in standalone.cpp: rows within a warp, in one block, in a cluster, with sums in shared memory, beyond the chip;
// wide and one by one.
constexpr Case cases[] = {
    {90, 2, 19, 96, 0, 0, false},  {90, 2, 19, 200, 8, 0, false},  {90, 2, 7, 512, 0, 0, true},
    {90, 3, 13, 512, 8, 0, false}, {90, 2, 5, 1536, 0, 0, false},  {90, 8, 3, 8192, 0, 0, false},
    {80, 1, 2, 8704, 0, 0, false}, {80, 2, 2, 24576, 0, 0, false}, {90, 2, 19, 3, 0, 0, false},
    {90, 2, 7, 1000, 0, 1, false}, {90, 2, 3, 1027, 1, 0, true},   {90, 8, 2, 8200, 0, 1, false},
    {80, 2, 2, 12301, 0, 0, false}, {90, 2, 7, 512, 1, 0, false},
};

}  // namespace

int main(int count, char** values) {
  return run_cases(cases, count, values, [](const Case& current, const DeviceTraits& device) {
    run_case<float, bfloat16, true>(current, device);
    run_case<bfloat16, bfloat16, true>(current, device);
#if !defined(FASTREG_STANDALONE_FEW)
    run_case<float, float, false>(current, device);
    run_case<bfloat16, bfloat16, false>(current, device);
    run_case<float16, float16, true>(current, device);
    run_case<float16, float16, false>(current, device);
    if (current.columns < 1024) {
      run_case<float, float16, true>(current, device);
      run_case<float, float, true>(current, device);
    }
#endif
  });
}
