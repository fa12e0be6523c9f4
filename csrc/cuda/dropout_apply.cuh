// Dropout, element by element: forward, into its input, and backward to the input, which is the same with other dtypes.
//
//   output = residual + (keep ? input * row_scale * layer_scale * scale : 0)
//
// What is absent is not computed. All in fp32, rounded once; what is dropped is 0 by selection, whatever the input is.
//
// A thread computes one block of the random stream for each eight elements it has. Where these are not neighbours
// (packs of four, or single elements of tensors that are not aligned), the block's eight bits reach those who need them
// through a shuffle, so that neighbouring lanes have neighbouring memory. Packs of which a channel's, sample's or
// batch's unit leaves nothing are not read.
//
// Traffic: a read of input and of residual, a write of the output. Equal bits in every run.

#pragma once

#include "dropout_mask.cuh"
#include "dropout_pack.cuh"
#include "reduce.cuh"

namespace fastreg::cuda {

struct DropoutArguments {
  const void* input;
  const void* residual;  // of the output's dtype, or null
  void* output;
  Parameter row_scale;
  Parameter layer_scale;
  Divisor row_elements;  // that have one row scale
  Divisor columns;       // of the layer scale
  int64_t elements;
  DropoutMaskArguments mask;
};

// What a pack's elements are multiplied by before the mask's scale; a pack lies within a row.
template <int width>
__device__ __forceinline__ void scale_pack(const DropoutArguments& arguments, int64_t position,
                                           float (&values)[width]) {
  if (arguments.row_scale.data != nullptr) {
    float factor[1];
    load_parameter(arguments.row_scale, quotient(position, arguments.row_elements), 1.0f, factor);
#pragma unroll
    for (int index = 0; index < width; ++index) values[index] *= factor[0];
  }
  if (arguments.layer_scale.data != nullptr) {
    float factors[width];
    const int64_t column = position - quotient(position, arguments.columns) * arguments.columns.value;
    load_parameter(arguments.layer_scale, column, 1.0f, factors);
#pragma unroll
    for (int index = 0; index < width; ++index) values[index] *= factors[index];
  }
}

// A pack, from what was loaded of it to what is stored.
template <class Input, class Output, int width>
__device__ __forceinline__ void drop_pack(const DropoutArguments& arguments, float scale, int64_t position,
                                          uint32_t bits, const DropoutPack<Input, width>& data,
                                          const DropoutPack<Output, width>& added) {
  float values[width];
#pragma unroll
  for (int index = 0; index < width; ++index) values[index] = data[index];
  scale_pack(arguments, position, values);
#pragma unroll
  for (int index = 0; index < width; ++index) {
    values[index] = (bits >> index & 1u) != 0 ? values[index] * scale : 0.0f;
    if (arguments.residual != nullptr) values[index] += added[index];
  }
  dropout_pack<Output>(values).store(static_cast<Output*>(arguments.output) + position);
}

// Tiles of a warp from element `first` on, a multiple of a tile. `units`: coarser than elements, whose bits are known
// before anything is read. `bounded`: the tensor may end within a tile.
template <class Input, class Output, int width, int tiles, bool units, bool bounded>
__device__ __forceinline__ void drop_tiles(const DropoutArguments& arguments, const DropoutMask& mask, int64_t first) {
  constexpr int packs = philox_half_lanes / width;
  constexpr int at_once = packs < 4 ? packs : bounded ? 1 : units ? 2 : 4;
  using InputPack = DropoutPack<Input, width>;
  using OutputPack = DropoutPack<Output, width>;
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const Input* input = static_cast<const Input*>(arguments.input) + first + lane * width;
  const Output* residual = static_cast<const Output*>(arguments.residual) + first + lane * width;

#pragma unroll 1
  for (int begin = 0; begin < packs; begin += at_once) {
    // From the tiles' first element on, without the lane.
    const auto offset = [&](int tile, int place) { return tile * dropout_tile + (begin + place) * warp_lanes * width; };
    const auto position = [&](int tile, int place) { return first + lane * width + offset(tile, place); };
    const auto inside = [&](int tile, int place) { return !bounded || position(tile, place) < arguments.elements; };
    uint32_t bits[tiles][at_once];
    InputPack data[tiles][at_once];
    OutputPack added[tiles][at_once];
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int place = 0; place < at_once; ++place) {
        if (!inside(tile, place)) continue;
        bits[tile][place] = units ? mask.unit_bits<width>(position(tile, place)) : keep_all;
        data[tile][place] = {};
        if (bits[tile][place] != 0) data[tile][place] = InputPack::load(input + offset(tile, place));
        if (arguments.residual != nullptr) added[tile][place] = OutputPack::load(residual + offset(tile, place));
      }
    }
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      uint32_t own = 0;
      if constexpr (!units) {
        own = mask.block_bits(static_cast<uint64_t>(first + tile * dropout_tile) / philox_half_lanes + lane);
      }
#pragma unroll
      for (int place = 0; place < at_once; ++place) {
        if constexpr (!units && packs == 1) bits[tile][place] = own;
        if constexpr (!units && packs > 1) {
          const int element = ((begin + place) * warp_lanes + lane) * width;
          bits[tile][place] = __shfl_sync(all_lanes, own, element / philox_half_lanes) >> element % philox_half_lanes;
        }
        if (inside(tile, place)) {
          drop_pack<Input, Output, width>(arguments, mask.scale, position(tile, place), bits[tile][place],
                                          data[tile][place], added[tile][place]);
        }
      }
    }
  }
}

template <class Input, class Output, int width, bool units>
__device__ __forceinline__ void drop_share_of_warp(const DropoutArguments& arguments) {
  constexpr int tiles = dropout_tiles(width);
  constexpr int warps = dropout_threads / warp_lanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / warp_lanes;
  const DropoutMask mask(arguments.mask);
  int64_t first = warp * tiles * dropout_tile;
  if (first + tiles * dropout_tile <= arguments.elements) {
    drop_tiles<Input, Output, width, tiles, units, false>(arguments, mask, first);
  } else {
    for (int tile = 0; tile < tiles; ++tile, first += dropout_tile) {
      if (first < arguments.elements) drop_tiles<Input, Output, 1, 1, units, true>(arguments, mask, first);
    }
  }
}

template <class Input, class Output, int width>
__global__ void __launch_bounds__(dropout_threads, dropout_minimum_blocks(false))
    dropout_elements_kernel(const DropoutArguments arguments) {
  drop_share_of_warp<Input, Output, width, false>(arguments);
}

template <class Input, class Output, int width>
__global__ void __launch_bounds__(dropout_threads, dropout_minimum_blocks(true))
    dropout_units_kernel(const DropoutArguments arguments) {
  drop_share_of_warp<Input, Output, width, true>(arguments);
}

}  // namespace fastreg::cuda
