// Dropout backward where layer_scale learns: its gradient together with the input's, and the sum of the partial sums.
//
//   grad_layer_scale = sum of keep ? grad_output * row_scale * scale * input : 0       over the rows
//
// The rows are cut into parts. A block has a part's rows of a strip of columns; each thread keeps its columns' scales
// and sums in registers and goes down the rows, a few of which are on their way at once. At the end a block adds up
// what its threads have of each column, in the order of their rows, and writes a row of partial sums;
// dropout_partials_kernel adds those in a fixed order. Nothing is added atomically: equal bits in every run.
//
// Traffic: a read of grad_output and of input, a write of grad_input, and 8 bytes a column and part for the partial
// sums. What is dropped counts as 0 whatever the input is.

#pragma once

#include "dropout_mask.cuh"
#include "dropout_pack.cuh"
#include "reduce.cuh"

namespace fastreg::cuda {

struct DropoutColumnsArguments {
  const void* grad_output;
  const void* input;
  void* grad_input;  // null: not asked for
  Parameter row_scale;
  Parameter layer_scale;
  float* partials;       // (parts, columns)
  Divisor row_elements;  // that have one row scale
  int64_t rows;
  int64_t columns;
  DropoutMaskArguments mask;
  DropoutColumnsPlan plan;
};

// --- partial sums ----------------------------------------------------------------------------------------------------

// The mask of a pack that begins anywhere.
template <int width>
__device__ __forceinline__ uint32_t bits_of_pack(const DropoutMask& mask, int64_t position) {
  if (!mask.drops()) return keep_all;
  if (!mask.by_elements()) return mask.unit_bits<width>(position);
  return mask.block_bits(static_cast<uint64_t>(position) / philox_half_lanes) >> position % philox_half_lanes;
}

template <int width>
struct DropoutColumnSums {
  float values[width][dropout_columns_threads];
};

template <class Gradient, class Element, int width>
__global__ void __launch_bounds__(dropout_columns_threads)
    dropout_columns_kernel(const DropoutColumnsArguments arguments) {
  constexpr int rows_at_once = dropout_columns_rows;
  using Sums = DropoutColumnSums<width>;
  using GradientPack = DropoutPack<Gradient, width>;
  using ElementPack = DropoutPack<Element, width>;
  FASTREG_SHARED(Sums, sums);
  const DropoutColumnsPlan& plan = arguments.plan;
  const Gradient* grad_output = static_cast<const Gradient*>(arguments.grad_output);
  const Element* input = static_cast<const Element*>(arguments.input);
  Element* grad_input = static_cast<Element*>(arguments.grad_input);
  const int thread = static_cast<int>(threadIdx.x);
  const int down = thread / plan.lanes;
  const int64_t part = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(plan.strips));
  const int64_t strip = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(plan.strips));
  const int64_t column = (strip * plan.lanes + thread % plan.lanes) * width;
  const bool has_columns = column < arguments.columns;
  const int64_t part_end = (part + 1) * plan.share;
  const int64_t end = part_end < arguments.rows ? part_end : arguments.rows;
  const DropoutMask mask(arguments.mask);

  float own[width] = {};
  float factors[width] = {};
  if (has_columns) load_parameter(arguments.layer_scale, column, 1.0f, factors);
  for (int64_t first = part * plan.share + down; first < end; first += rows_at_once * plan.down) {
    GradientPack gradient[rows_at_once] = {};
    ElementPack data[rows_at_once] = {};
    const auto position = [&](int place) { return (first + place * plan.down) * arguments.columns + column; };
    const auto inside = [&](int place) { return has_columns && first + place * plan.down < end; };
#pragma unroll
    for (int place = 0; place < rows_at_once; ++place) {
      if (!inside(place)) continue;
      gradient[place] = GradientPack::load(grad_output + position(place));
      data[place] = ElementPack::load(input + position(place));
    }
#pragma unroll
    for (int place = 0; place < rows_at_once; ++place) {
      if (!inside(place)) continue;
      const uint32_t bits = bits_of_pack<width>(mask, position(place));
      float row_factor[1] = {1.0f};
      if (arguments.row_scale.data != nullptr) {
        load_parameter(arguments.row_scale, quotient(position(place), arguments.row_elements), 1.0f, row_factor);
      }
      float gradients[width];
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const bool kept = (bits >> index & 1u) != 0;
        const float scaled = gradient[place][index] * row_factor[0];
        if (kept) own[index] += scaled * mask.scale * data[place][index];
        gradients[index] = kept ? scaled * factors[index] * mask.scale : 0.0f;
      }
      if (grad_input != nullptr) dropout_pack<Element>(gradients).store(grad_input + position(place));
    }
  }

#pragma unroll
  for (int index = 0; index < width; ++index) sums.values[index][thread] = own[index];
  __syncthreads();
  if (down == 0 && has_columns) {
    float total[width] = {};
    for (int other = 0; other < plan.down; ++other) {
#pragma unroll
      for (int index = 0; index < width; ++index) total[index] += sums.values[index][other * plan.lanes + thread];
    }
    float* target = arguments.partials + part * arguments.columns + column;
#pragma unroll
    for (int index = 0; index < width; ++index) target[index] = total[index];
  }
}

// --- the sum of the partial sums -------------------------------------------------------------------------------------

struct DropoutPartialsArguments {
  const float* partials;  // (parts, columns)
  Parameter scale;        // which the sums are the gradient of
  void* gradient;
  int64_t parts;
  int64_t columns;
};

inline constexpr int dropout_partials_columns = 32;
inline constexpr int dropout_partials_slices = 16;

struct DropoutPartialSums {
  float values[dropout_partials_slices][dropout_partials_columns];
};

// A block adds up 32 columns: 16 warps each every sixteenth part, then one warp their sums, in order. Without parts the
// sums are 0.
__global__ void __launch_bounds__(dropout_partials_columns* dropout_partials_slices)
    dropout_partials_kernel(const DropoutPartialsArguments arguments) {
  FASTREG_SHARED(DropoutPartialSums, sums);
  const int lane = static_cast<int>(threadIdx.x) % dropout_partials_columns;
  const int slice = static_cast<int>(threadIdx.x) / dropout_partials_columns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * dropout_partials_columns + lane;
  const bool has_column = column < arguments.columns;

  float sum = 0.0f;
  if (has_column) {
#pragma unroll 4
    for (int64_t part = slice; part < arguments.parts; part += dropout_partials_slices) {
      sum += arguments.partials[part * arguments.columns + column];
    }
  }
  sums.values[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && has_column) {
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < dropout_partials_slices; ++other) total += sums.values[other][lane];
    store_parameter(arguments.gradient, arguments.scale.dtype, column, total);
  }
}

}  // namespace fastreg::cuda
