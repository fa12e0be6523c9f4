// Backward of layer norm and RMS norm for rows that do not fit on the chip: one kernel for the gradient of the input,
// which reads a row for its sums and again for its gradient, and one for the parameters, whose threads own columns and
// go down the rows. Up to six reads instead of two; a kernel whose result is not asked for is not launched.

#pragma once

#include "layer_norm_backward.cuh"

namespace fastreg::cuda {

// One block, or a cluster, a row.
template <class Element, bool centred, int width>
__global__ void __launch_bounds__(looped_threads) backward_looped_kernel(const BackwardArguments arguments) {
  using Data = Pack<Element, width>;
  constexpr int packs = looped_packs;
  FASTREG_SHARED(Exchange<RowSums<centred>>, exchange);
  exchange.start(arguments.cluster);
  const Team team(arguments.threads_per_row);
  const Slice slice(arguments.columns / width, arguments.cluster);
  const int64_t row = blockIdx.x / arguments.cluster;
  const int64_t first = static_cast<int64_t>(slice.first) * width;
  const Element* grad_output =
      static_cast<const Element*>(arguments.grad_output) + row * arguments.grad_output_stride + first;
  const Element* input = static_cast<const Element*>(arguments.input) + row * arguments.input_stride + first;
  Element* grad_input = static_cast<Element*>(arguments.grad_input) + row * arguments.columns + first;
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
        grad_data[place] = Data::load_kept(grad_output + static_cast<int64_t>(offset) * width);
        input_data[place] = Data::load_kept(input + static_cast<int64_t>(offset) * width);
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
  RowSums<centred> whole[] = {over_lanes(sums, warp_lanes)};
  over_warps_and_blocks(whole, team, arguments.cluster, exchange, 0);
  const RowSums<centred> means = over_columns<centred>(whole[0], arguments.columns);

  // Backwards: what was read last is what the caches still have.
  for (int offset = slice.count - 1 - team.lane; offset >= 0; offset -= team.threads) {
    float weight[width];
    load_parameter<width>(arguments.weight, (slice.first + offset) * width, 1.0f, weight);
    const Data grad_data = Data::load(grad_output + static_cast<int64_t>(offset) * width);
    const Data input_data = Data::load(input + static_cast<int64_t>(offset) * width);
    input_gradient<centred, width>(means, grad_data, input_data, mean, rstd, weight)
        .store(grad_input + static_cast<int64_t>(offset) * width);
  }
}

// A thread owns the columns of one pack; block b has columns b % column_blocks and every (number of partials)-th row.
template <class Element, bool centred, int width>
__global__ void __launch_bounds__(columns_threads) backward_columns_kernel(const BackwardArguments arguments) {
  using Data = Pack<Element, width>;
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

  float weight_sums[width] = {};
  float bias_sums[width] = {};
  for (int64_t start = split; start < arguments.rows; start += static_cast<int64_t>(splits) * columns_rows) {
    Data grad_output[columns_rows];
    Data input[columns_rows];
#pragma unroll
    for (int turn = 0; turn < columns_rows; ++turn) {
      const int64_t row = start + static_cast<int64_t>(turn) * splits;
      if (row < arguments.rows) {
        grad_output[turn] = Data::load(static_cast<const Element*>(arguments.grad_output) +
                                       row * arguments.grad_output_stride + column);
        if (wants_weight) {
          input[turn] =
              Data::load(static_cast<const Element*>(arguments.input) + row * arguments.input_stride + column);
        }
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
      }
    }
  }

  const int64_t partial = static_cast<int64_t>(split) * arguments.columns + column;
#pragma unroll
  for (int index = 0; index < width; ++index) {
    if (wants_weight) arguments.weight_partials[partial + index] = weight_sums[index];
    if (wants_bias) arguments.bias_partials[partial + index] = bias_sums[index];
  }
}

}  // namespace fastreg::cuda
