// Backward of layer norm and RMS norm for rows that do not fit on the chip: one kernel for the gradient of the input,
// which reads a row for its sums and again for its gradient, and one for the parameters, whose threads own columns and
// go down the rows. Up to six reads instead of two; a kernel whose result is not asked for is not launched.

#pragma once

#include "layer_norm_backward.cuh"

namespace fastreg::cuda {

// One block, or a cluster, a row.
template <bool centred, class Target>
__device__ __forceinline__ void differentiate_long_row(const BackwardArguments& arguments, const Target& target) {
  constexpr int width = Target::width;
  using Data = typename Target::Data;
  constexpr int packs = looped_packs;
  FASTREG_SHARED(Exchange<RowSums<centred>>, exchange);
  exchange.start(arguments.cluster);
  const Team team(arguments.threads_per_row);
  const Slice slice(arguments.columns / width, arguments.cluster);
  const int64_t row = blockIdx.x / arguments.cluster;
  const auto along = target.along(row, static_cast<int64_t>(slice.first) * width);
  const float mean = centred ? __ldg(arguments.mean + row) : 0.0f;
  const float rstd = __ldg(arguments.rstd + row);

  RowSums<centred> sums{};
  for (int start = team.lane; start < slice.count; start += packs * team.threads) {
    Data grad_data[packs];
    Data input_data[packs];
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      const int offset = start + place * team.threads;
      if (offset < slice.count) {
        const int64_t column = static_cast<int64_t>(offset) * width;
        grad_data[place] = along.template load_grad_output<true>(column);
        input_data[place] = Data::load_kept(along.input + column);
      }
    }
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      const int offset = start + place * team.threads;
      if (offset < slice.count) {
        float weight[width];
        load_parameter<width>(arguments.weight, (slice.first + offset) * width, 1.0f, weight);
        add_to_row<centred, width>(sums, grad_data[place], input_data[place], mean, rstd, weight);
      }
    }
  }
  exchange.finish_start(arguments.cluster);
  RowSums<centred> of_row[] = {over_lanes(sums, warp_lanes)};
  over_warps_and_blocks(of_row, team, arguments.cluster, exchange, 0);
  const RowSums<centred> means = over_columns<centred>(of_row[0], arguments.columns);
  if constexpr (Target::fused) {
    if (team.lane == 0 && slice.first == 0) target.store_means(row, means);
  }

  // Backwards: what was read last is what the caches still have.
  for (int offset = slice.count - 1 - team.lane; offset >= 0; offset -= team.threads) {
    float weight[width];
    load_parameter<width>(arguments.weight, (slice.first + offset) * width, 1.0f, weight);
    const int64_t column = static_cast<int64_t>(offset) * width;
    const Data grad_data = along.template load_grad_output<false>(column);
    const Data input_data = Data::load(along.input + column);
    float gradient[width];
    input_gradient<centred>(means, grad_data, input_data, mean, rstd, weight, gradient);
    along.finish(column, gradient);
  }
}

template <class Element, bool centred, int width>
__global__ void __launch_bounds__(looped_threads, 1) backward_looped_kernel(const BackwardArguments arguments) {
  differentiate_long_row<centred>(arguments, GradientOfInput<Element, width>{arguments});
}

// A thread owns the columns of one pack; block b has columns b % column_blocks and every (number of partials)-th row.
template <bool centred, class Target>
__device__ __forceinline__ void sum_columns(const BackwardArguments& arguments, const Target& target) {
  constexpr int width = Target::width;
  using Data = typename Target::Data;
  const int packs = arguments.columns / width;
  const int blocks = (packs + columns_threads - 1) / columns_threads;
  const int split = static_cast<int>(blockIdx.x) / blocks;
  const int splits = static_cast<int>(gridDim.x) / blocks;
  const int offset = (static_cast<int>(blockIdx.x) - split * blocks) * columns_threads + static_cast<int>(threadIdx.x);
  if (offset >= packs) {
    return;
  }
  const int64_t column = static_cast<int64_t>(offset) * width;
  const bool wants_weight = arguments.weight_partials != nullptr;
  const bool wants_bias = centred && arguments.bias_partials != nullptr;
  const bool wants_sums = target.wants_sums();

  float weight_sums[width] = {};
  float bias_sums[width] = {};
  float third_sums[Target::fused ? width : 1] = {};
  float weight[width];
  if constexpr (Target::fused) load_parameter<width>(arguments.weight, column, 1.0f, weight);
  for (int64_t start = split; start < arguments.rows; start += static_cast<int64_t>(splits) * columns_rows) {
    Data grad_output[columns_rows];
    Data input[columns_rows];
    typename Target::Fetched fetched[columns_rows];
    typename Target::Row opened[columns_rows];
    uint32_t bits = 0;
#pragma unroll
    for (int turn = 0; turn < columns_rows; ++turn) {
      const int64_t row = start + static_cast<int64_t>(turn) * splits;
      if (row < arguments.rows) {
        grad_output[turn] = target.load_grad_output(row, column);
        if (wants_weight || wants_sums) input[turn] = Data::load(target.input(row, column));
        if constexpr (Target::fused) {
          if (wants_sums) {
            fetched[turn] = target.fetch(row, column);
            opened[turn] = target.open(row);
          }
        }
      }
    }
    if constexpr (Target::fused) {
      if (wants_sums) {
        bits = target.template draw<columns_rows>(
            [&](int turn) { return target.element(start + static_cast<int64_t>(turn) * splits, column); });
      }
    }
#pragma unroll
    for (int turn = 0; turn < columns_rows; ++turn) {
      const int64_t row = start + static_cast<int64_t>(turn) * splits;
      if (row < arguments.rows) {
        if (wants_weight) {
          const float mean = centred ? __ldg(arguments.mean + row) : 0.0f;
          const float rstd = __ldg(arguments.rstd + row);
#pragma unroll
          for (int index = 0; index < width; ++index) {
            weight_sums[index] += grad_output[turn][index] * normalized_at<centred>(input[turn], index, mean, rstd);
          }
        }
        if (wants_bias) {
#pragma unroll
          for (int index = 0; index < width; ++index) bias_sums[index] += grad_output[turn][index];
        }
        if constexpr (Target::fused) {
          if (wants_sums) {
            const float mean = centred ? __ldg(arguments.mean + row) : 0.0f;
            const float rstd = __ldg(arguments.rstd + row);
            float gradient[width];
            input_gradient<centred>(target.template load_means<centred>(row), grad_output[turn], input[turn], mean,
                                    rstd, weight, gradient);
            target.add_to_sums(fetched[turn], opened[turn], bits >> turn * width, gradient, third_sums);
          }
        }
      }
    }
  }

  const int64_t partial = static_cast<int64_t>(split) * arguments.columns + column;
#pragma unroll
  for (int index = 0; index < width; ++index) {
    if (wants_weight) arguments.weight_partials[partial + index] = weight_sums[index];
    if (wants_bias) arguments.bias_partials[partial + index] = bias_sums[index];
    if constexpr (Target::fused) {
      if (wants_sums) target.sums_partials()[partial + index] = third_sums[index];
    }
  }
}

template <class Element, bool centred, int width>
__global__ void __launch_bounds__(columns_threads) backward_columns_kernel(const BackwardArguments arguments) {
  sum_columns<centred>(arguments, GradientOfInput<Element, width>{arguments});
}

}  // namespace fastreg::cuda
