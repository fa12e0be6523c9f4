// Forward kernels of layer norm, and without centring of RMS norm:
//
//   output = (input - mean) * rstd * weight + bias      rstd = 1 / sqrt(variance + eps)
//
// Each row is read once and stays in registers, as packed as it came; mean, then squared deviations, then the output
// are computed from there. A warp works out the moments of its part alone, so that warps and blocks exchange one value
// a row. Traffic: one read, one write of the activations; weight and bias come from L1 and L2. Rows longer than the
// chip has room for are read twice (forward_looped_kernel).
//
// The kernels take every extent from their arguments; how many threads, packs and rows is planned in layer_norm_plan.h.
// Where a row's values come from and where the output goes is a template parameter, `Rows`: here the rows of a tensor,
// for dropout + residual + norm those of a sum that is made while it is loaded (dropout_add_layer_norm_forward.cuh).

#pragma once

#include "layer_norm_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastreg::cuda {

struct ForwardArguments {
  const void* input;
  void* output;
  float* mean;  // layer norm only
  float* rstd;
  Parameter weight;
  Parameter bias;
  int64_t rows;
  int64_t row_stride;  // of input, in elements; output is contiguous
  int columns;
  int threads_per_row;  // in each block
  int cluster;          // blocks a row
  float eps;
};

// What a row's elements add up to: moments if they are to be centred, else the sum of squares.
template <bool centred>
using RowValue = std::conditional_t<centred, Moments<float>, float>;

template <bool centred>
__device__ __forceinline__ void finish_statistics(const ForwardArguments& arguments, const RowValue<centred>& value,
                                                  float& mean, float& rstd) {
  float squares;
  if constexpr (centred) {
    mean = value.mean;
    squares = value.squares;
  } else {
    mean = 0.0f;
    squares = value;
  }
  rstd = rsqrtf(mean_of(squares, static_cast<float>(arguments.columns)) + arguments.eps);
}

template <bool centred>
__device__ __forceinline__ void store_statistics(const ForwardArguments& arguments, int64_t row, float mean,
                                                 float rstd) {
  if constexpr (centred) {
    arguments.mean[row] = mean;
  }
  arguments.rstd[row] = rstd;
}

template <bool centred, int width, class Data>
__device__ __forceinline__ void normalize(const Data& input, float mean, float rstd, const float (&weight)[width],
                                          const float (&bias)[width], float (&values)[width]) {
#pragma unroll
  for (int index = 0; index < width; ++index) {
    const float normalized = (centred ? input[index] - mean : input[index]) * rstd;
    values[index] = centred ? normalized * weight[index] + bias[index] : normalized * weight[index];
  }
}

// The rows of a tensor, and the output in its dtype: what the norms alone read and write. fetch() asks memory for a
// pack; where more has to be done (`fused`), finish() makes what is normalised of what has come.
template <class Element, int pack_width>
struct RowsOfTensor {
  static constexpr bool fused = false;
  static constexpr int width = pack_width;
  using Data = Pack<Element, width>;
  using Fetched = Data;
  using Row = const Element*;

  const ForwardArguments& arguments;

  // What is known of a row before its packs.
  __device__ __forceinline__ Row open(int64_t row) const {
    return static_cast<const Element*>(arguments.input) + row * arguments.row_stride;
  }

  __device__ __forceinline__ Data fetch(const Row& row, int64_t column) const { return Data::load(row + column); }

  __device__ __forceinline__ void store(int64_t row, int64_t column, const float (&values)[width]) const {
    pack<Element, width>(values).store(static_cast<Element*>(arguments.output) + row * arguments.columns + column);
  }

  // For kernels that stay on one row: from a column of it on.
  struct Along {
    const Element* input;
    Element* output;

    // `again`: the same thread will read it a second time.
    template <bool again>
    __device__ __forceinline__ Data fetch(int64_t column) const {
      return again ? Data::load_kept(input + column) : Data::load(input + column);
    }

    __device__ __forceinline__ void store(int64_t column, const float (&values)[width]) const {
      pack<Element, width>(values).store(output + column);
    }
  };

  __device__ __forceinline__ Along along(int64_t row, int64_t first) const {
    return {open(row) + first, static_cast<Element*>(arguments.output) + row * arguments.columns + first};
  }
};

// --- rows that stay on chip ------------------------------------------------------------------------------------------

// The moments, or sum of squares, of the packs of one row that a warp (or the part of a warp that is a team) holds.
template <bool centred, class Element, int width, int packs>
__device__ __forceinline__ RowValue<centred> row_value(Pack<Element, width> (&input)[packs], const Team& team,
                                                       const Slice& slice, bool active) {
  float mean = 0.0f;
  float count = 0.0f;
  if constexpr (centred) {
    float sum = 0.0f;
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      if (active && place * team.threads + team.lane < slice.count) {
#pragma unroll
        for (int index = 0; index < width; ++index) sum += input[place][index];
      }
    }
    count = static_cast<float>((team.threads < warp_lanes ? slice.count : slice.of_warp(team)) * width);
    sum = over_lanes(sum, team.lanes());
    mean = mean_of(sum, count);
    keep_packed(input);
  }
  float squares = 0.0f;
#pragma unroll
  for (int place = 0; place < packs; ++place) {
    if (active && place * team.threads + team.lane < slice.count) {
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const float difference = centred ? input[place][index] - mean : input[place][index];
        squares += difference * difference;
      }
    }
  }
  squares = over_lanes(squares, team.lanes());
  keep_packed(input);
  if constexpr (centred) {
    return {count, mean, squares};
  } else {
    return squares;
  }
}

// A team keeps `rows` rows of `packs` packs a thread in registers. Several rows at once keep as many bytes on their way
// as one longer row would, and share their weights and their barriers.
template <bool centred, int packs, int rows, class Rows>
__device__ __forceinline__ void normalize_rows(const ForwardArguments& arguments, const Rows& tensors) {
  constexpr int width = Rows::width;
  using Data = typename Rows::Data;
  using RowExchange = Exchange<RowValue<centred>, rows>;
  FASTREG_SHARED(RowExchange, exchange);
  constexpr bool beyond_a_warp = forward_beyond_a_warp(width, packs);
  if constexpr (beyond_a_warp) exchange.start(arguments.cluster);
  Team team(arguments.threads_per_row);
  const Slice slice(arguments.columns / width, arguments.cluster);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / arguments.cluster) * (team.count * rows) + team.index;

  Data input[rows][packs];
  if constexpr (!Rows::fused) {
#pragma unroll
    for (int turn = 0; turn < rows; ++turn) {
      const int64_t row = first_row + turn * team.count;
      const typename Rows::Row opened = tensors.open(row);
#pragma unroll
      for (int place = 0; place < packs; ++place) {
        const int offset = place * team.threads + team.lane;
        if (row < arguments.rows && offset < slice.count) {
          input[turn][place] = tensors.fetch(opened, static_cast<int64_t>(slice.first + offset) * width);
        }
      }
    }
  } else {
    static_assert(rows == 1);
    const typename Rows::Row opened = tensors.open(first_row);
    const bool active = first_row < arguments.rows;
    constexpr int at_once = Rows::at_once(packs);
#pragma unroll
    for (int begin = 0; begin < packs; begin += at_once) {
      typename Rows::Fetched fetched[at_once];
      team.template forget_places<width>();
      const auto column_of = [&](int index) {
        return static_cast<int64_t>(slice.first + (begin + index) * team.threads + team.lane) * width;
      };
#pragma unroll
      for (int index = 0; index < at_once; ++index) {
        const int offset = (begin + index) * team.threads + team.lane;
        if (active && offset < slice.count) fetched[index] = tensors.fetch(opened, column_of(index));
      }
      const uint32_t bits = tensors.template draw<at_once>(
          [&](int index) { return tensors.element(opened, column_of(index)); });
#pragma unroll
      for (int index = 0; index < at_once; ++index) {
        const int offset = (begin + index) * team.threads + team.lane;
        if (active && offset < slice.count) {
          input[0][begin + index] =
              tensors.template finish<true>(fetched[index], opened, bits >> index * width, column_of(index));
        }
      }
    }
  }

  team.forget_places<width>();
  RowValue<centred> values[rows];
#pragma unroll
  for (int turn = 0; turn < rows; ++turn) {
    const bool active = first_row + turn * team.count < arguments.rows;
    values[turn] = row_value<centred>(input[turn], team, slice, active);
  }
  if constexpr (beyond_a_warp) {
    exchange.finish_start(arguments.cluster);
    over_warps_and_blocks(values, team, arguments.cluster, exchange, 0);
  }

  float mean[rows];
  float rstd[rows];
#pragma unroll
  for (int turn = 0; turn < rows; ++turn) {
    const int64_t row = first_row + turn * team.count;
    finish_statistics<centred>(arguments, values[turn], mean[turn], rstd[turn]);
    if (row < arguments.rows && team.lane == 0 && slice.first == 0) {
      store_statistics<centred>(arguments, row, mean[turn], rstd[turn]);
    }
  }

  team.forget_places<width>();
#pragma unroll
  for (int place = 0; place < packs; ++place) {
    const int offset = place * team.threads + team.lane;
    if (offset < slice.count) {
      const int column = (slice.first + offset) * width;
      ParameterBits<width> weight_bits;
      ParameterBits<width> bias_bits;
      float weight[width];
      float bias[width];
      weight_bits.load(arguments.weight, column);
      if constexpr (centred) {
        bias_bits.load(arguments.bias, column);
        bias_bits.convert(arguments.bias, 0.0f, bias);
      }
      weight_bits.convert(arguments.weight, 1.0f, weight);
#pragma unroll
      for (int turn = 0; turn < rows; ++turn) {
        const int64_t row = first_row + turn * team.count;
        if (row < arguments.rows) {
          float values_of_pack[width];
          normalize<centred>(input[turn][place], mean[turn], rstd[turn], weight, bias, values_of_pack);
          tensors.store(row, column, values_of_pack);
        }
      }
    }
  }
}

template <class Element, bool centred, int width, int packs, int rows>
__global__ void __launch_bounds__(forward_maximum_threads(width, packs), forward_minimum_blocks(width, packs))
    forward_kernel(const ForwardArguments arguments) {
  normalize_rows<centred, packs, rows>(arguments, RowsOfTensor<Element, width>{arguments});
}

// --- rows beyond the chip --------------------------------------------------------------------------------------------

// One block, or a cluster, a row; read once for the statistics and again for the output, the second time backwards,
// since what was read last is what the caches still have.
template <bool centred, class Rows>
__device__ __forceinline__ void normalize_long_row(const ForwardArguments& arguments, const Rows& tensors) {
  constexpr int width = Rows::width;
  using Data = typename Rows::Data;
  constexpr int packs = looped_packs;
  FASTREG_SHARED(Exchange<RowValue<centred>>, exchange);
  exchange.start(arguments.cluster);
  const Team team(arguments.threads_per_row);
  const Slice slice(arguments.columns / width, arguments.cluster);
  const int64_t row = blockIdx.x / arguments.cluster;
  const auto along = tensors.along(row, static_cast<int64_t>(slice.first) * width);

  // Each thread merges the moments of a few packs at a time into its own.
  RowValue<centred> value{};
  for (int start = team.lane; start < slice.count; start += packs * team.threads) {
    typename Rows::Fetched fetched[packs];
    Data data[packs];
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      const int offset = start + place * team.threads;
      if (offset < slice.count) {
        const int64_t column = static_cast<int64_t>(offset) * width;
        if constexpr (Rows::fused) {
          fetched[place] = along.template fetch<true>(column);
        } else {
          data[place] = along.template fetch<true>(column);
        }
      }
    }
    if constexpr (Rows::fused) {
      const uint32_t bits = along.template draw<packs>(
          [&](int place) { return static_cast<int64_t>(start + place * team.threads) * width; });
#pragma unroll
      for (int place = 0; place < packs; ++place) {
        const int offset = start + place * team.threads;
        if (offset < slice.count) {
          data[place] = along.template finish<true>(fetched[place], bits >> place * width,
                                                    static_cast<int64_t>(offset) * width);
        }
      }
    }
    float sum = 0.0f;
    float count = 0.0f;
    if constexpr (centred) {
#pragma unroll
      for (int place = 0; place < packs; ++place) {
        if (start + place * team.threads < slice.count) {
#pragma unroll
          for (int index = 0; index < width; ++index) sum += data[place][index];
          count += width;
        }
      }
    }
    const float mean = centred ? mean_of(sum, count) : 0.0f;
    float squares = 0.0f;
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      if (start + place * team.threads < slice.count) {
#pragma unroll
        for (int index = 0; index < width; ++index) {
          const float difference = data[place][index] - mean;
          squares += difference * difference;
        }
      }
    }
    if constexpr (centred) {
      value = together(value, {count, mean, squares});
    } else {
      value += squares;
    }
  }
  RowValue<centred> values[] = {over_lanes(value, warp_lanes)};
  exchange.finish_start(arguments.cluster);
  over_warps_and_blocks(values, team, arguments.cluster, exchange, 0);
  float mean;
  float rstd;
  finish_statistics<centred>(arguments, values[0], mean, rstd);
  if (team.lane == 0 && slice.first == 0) {
    store_statistics<centred>(arguments, row, mean, rstd);
  }

  for (int offset = slice.count - 1 - team.lane; offset >= 0; offset -= team.threads) {
    const int column = (slice.first + offset) * width;
    float weight[width];
    float bias[width];
    load_parameter<width>(arguments.weight, column, 1.0f, weight);
    if constexpr (centred) load_parameter<width>(arguments.bias, column, 0.0f, bias);
    const int64_t place = static_cast<int64_t>(offset) * width;
    Data data;
    if constexpr (Rows::fused) {
      const typename Rows::Fetched fetched = along.template fetch<false>(place);
      const uint32_t bits = along.template draw<1>([&](int) { return place; });
      data = along.template finish<false>(fetched, bits, place);
    } else {
      data = along.template fetch<false>(place);
    }
    float values_of_pack[width];
    normalize<centred>(data, mean, rstd, weight, bias, values_of_pack);
    along.store(place, values_of_pack);
  }
}

template <class Element, bool centred, int width>
__global__ void __launch_bounds__(looped_threads, 1) forward_looped_kernel(const ForwardArguments arguments) {
  normalize_long_row<centred>(arguments, RowsOfTensor<Element, width>{arguments});
}

}  // namespace fastreg::cuda
