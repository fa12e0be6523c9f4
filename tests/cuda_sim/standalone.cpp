// The kernels of csrc/cuda against fp64, without torch: small enough to be compiled again for every mutant, and free of
// foreign libraries, so that the sanitizers or the tracer see every access. Every tensor ends where its memory ends.
//
//   standalone [order] [seed] [clusters at once] [what to print of the launches: kernels]
//
// Exits with 1 and one line for the first result that is wrong or error that the simulator found.

#include <vector>

#include "layer_norm.cuh"
#include "standalone.h"

namespace {

struct Case {
  int architecture;
  int multiprocessors;
  int64_t rows;
  int columns;
  int64_t gap;    // elements between the rows of input and grad_output
  int64_t shift;  // of their first element, in elements
};

std::string describe(const Case& current) {
  return "sm_" + std::to_string(current.architecture) + " with " + std::to_string(current.multiprocessors) +
         " multiprocessors, " + std::to_string(current.rows) + " x " + std::to_string(current.columns) + ", gap " +
         std::to_string(current.gap) + ", shift " + std::to_string(current.shift);
}

// --- one case --------------------------------------------------------------------------------------------------------

template <class Element, bool centred>
void run_case(const Case& current, const DeviceTraits& device) {
  const int64_t rows = current.rows;
  const int columns = current.columns;
  std::mt19937_64 random(static_cast<uint64_t>(columns));
  Matrix<Element> input(rows, columns, current.gap, current.shift);
  Matrix<Element> grad_output(rows, columns, current.gap, current.shift);
  Matrix<float> weight(1, columns);
  Matrix<bfloat16> bias(1, columns);
  input.fill(random, centred ? 3.0 : 0.0, 1.0);
  grad_output.fill(random, 0.0, 1.0);
  weight.fill(random, 0.0, 1.0);
  bias.fill(random, 0.0, 1.0);

  Matrix<Element> output(rows, columns);
  Matrix<float> mean(1, rows);
  Matrix<float> rstd(1, rows);
  const Parameter weight_parameter{weight.data, DType::Float32};
  const Parameter bias_parameter{centred ? bias.data : nullptr, DType::BFloat16};
  require(launch_forward<Element, centred>(ForwardArguments{.input = input.data,
                                                            .output = output.data,
                                                            .mean = mean.data,
                                                            .rstd = rstd.data,
                                                            .weight = weight_parameter,
                                                            .bias = bias_parameter,
                                                            .rows = rows,
                                                            .row_stride = input.stride,
                                                            .columns = columns,
                                                            .threads_per_row = 0,
                                                            .cluster = 1,
                                                            .eps = 1e-5f},
                                           device, nullptr));

  Matrix<Element> grad_input(rows, columns);
  BackwardArguments arguments{.grad_output = grad_output.data,
                              .input = input.data,
                              .mean = mean.data,
                              .rstd = rstd.data,
                              .weight = weight_parameter,
                              .grad_input = grad_input.data,
                              .weight_partials = nullptr,
                              .bias_partials = nullptr,
                              .rows = rows,
                              .grad_output_stride = grad_output.stride,
                              .input_stride = input.stride,
                              .columns = columns,
                              .threads_per_row = 0,
                              .cluster = 1};
  BackwardPlan plan;
  require(plan_backward<Element, centred>(arguments, device, plan));
  Matrix<float> weight_partials(plan.partials, columns);
  Matrix<float> bias_partials(plan.partials, columns);
  arguments.weight_partials = weight_partials.data;
  arguments.bias_partials = centred ? bias_partials.data : nullptr;
  require(launch_backward<Element, centred>(plan, arguments, nullptr));

  Matrix<float> grad_weight(1, columns);
  Matrix<bfloat16> grad_bias(1, columns);
  require(launch_reduce<centred>(ReduceArguments{{weight_partials.data, grad_weight.data, DType::Float32},
                                                 {bias_partials.data, grad_bias.data, DType::BFloat16},
                                                 plan.partials,
                                                 columns},
                                 centred ? 2 : 1, nullptr));

  std::vector<double> exact_weight(static_cast<size_t>(columns)), weight_terms(exact_weight), exact_bias(exact_weight),
      bias_terms(exact_weight);
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0, absolute = 0, squares = 0, projection = 0, plain = 0, scaled_size = 0;
    for (int64_t column = 0; column < columns; ++column) {
      sum += input.value(row, column);
      absolute += std::abs(input.value(row, column));
    }
    const double exact_mean = centred ? sum / columns : 0.0;
    for (int64_t column = 0; column < columns; ++column) squares += std::pow(input.value(row, column) - exact_mean, 2);
    const double exact_rstd = 1 / std::sqrt(squares / columns + 1e-5);
    const double shift = centred ? absolute / columns * exact_rstd : 0.0;
    for (int64_t column = 0; column < columns; ++column) {
      const double scaled = grad_output.value(row, column) * weight.value(0, column);
      projection += scaled * (input.value(row, column) - exact_mean) * exact_rstd / columns;
      plain += centred ? scaled / columns : 0.0;
      scaled_size += std::abs(scaled) / columns;
    }
    require_close<float>("rstd", rstd.value(0, row), exact_rstd, exact_rstd);
    if (centred) require_close<float>("mean", mean.value(0, row), exact_mean, absolute / columns);
    for (size_t column = 0; column < static_cast<size_t>(columns); ++column) {
      const int64_t place = static_cast<int64_t>(column);
      const double normalized = (input.value(row, place) - exact_mean) * exact_rstd;
      const double gradient = grad_output.value(row, place);
      const double scale = weight.value(0, place);
      const double offset = centred ? bias.value(0, place) : 0.0;
      require_close<Element>("output", output.value(row, place), normalized * scale + offset,
                             (std::abs(normalized) + shift) * std::abs(scale) + std::abs(offset));
      require_close<Element>(
          "grad_input", grad_input.value(row, place), (gradient * scale - plain - normalized * projection) * exact_rstd,
          (std::abs(gradient * scale) + (1 + std::abs(normalized) + shift) * (1 + shift) * scaled_size) * exact_rstd);
      exact_weight[column] += gradient * normalized;
      weight_terms[column] += std::abs(gradient) * (std::abs(normalized) + shift);
      exact_bias[column] += gradient;
      bias_terms[column] += std::abs(gradient);
    }
  }
  for (size_t column = 0; column < static_cast<size_t>(columns); ++column) {
    const int64_t place = static_cast<int64_t>(column);
    require_close<float>("grad_weight", grad_weight.value(0, place), exact_weight[column], weight_terms[column]);
    if (centred)
      require_close<bfloat16>("grad_bias", grad_bias.value(0, place), exact_bias[column], bias_terms[column]);
  }
}

// Rows within a warp, in one block, in a cluster, with sums in shared memory, beyond the chip; wide and one by one;
// each with more rows than a persistent grid holds at once.
constexpr Case cases[] = {
    {90, 2, 37, 8, 0, 0},    {90, 2, 37, 96, 0, 0},   {90, 2, 37, 200, 0, 0},  {90, 3, 70, 512, 8, 0},
    {90, 2, 17, 1536, 0, 0}, {90, 2, 5, 4104, 0, 0},  {90, 8, 5, 16384, 0, 0}, {80, 2, 5, 8704, 0, 0},
    {80, 2, 5, 33024, 0, 0}, {90, 2, 37, 3, 0, 0},    {90, 2, 19, 256, 1, 0},  {90, 2, 19, 1000, 0, 1},
    {90, 2, 7, 2051, 0, 0},  {90, 8, 3, 16400, 0, 1}, {80, 2, 3, 16401, 0, 0},
};

}  // namespace

int main(int count, char** values) {
  return run_cases(cases, count, values, [](const Case& current, const DeviceTraits& device) {
    run_case<float, true>(current, device);
    run_case<bfloat16, true>(current, device);
#if !defined(FASTREG_STANDALONE_FEW)
    run_case<float16, true>(current, device);
    run_case<float, false>(current, device);
    run_case<bfloat16, false>(current, device);
    run_case<float16, false>(current, device);
#endif
  });
}
