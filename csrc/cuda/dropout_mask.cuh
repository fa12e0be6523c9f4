// Which elements of a pack are kept, as bits: element i of a pack has bit i.
//
// Elements have 16-bit lanes, eight to a block of the random stream: what a block says is found once for eight
// elements, by whoever computes it (dropout_apply.cuh, dropout_columns.cuh). Of channels, samples and the batch, the
// unit of a pack's first element is found with one division, and the others by going on from there.
//
// Seed and threshold are read from memory by the kernel: a launch knows neither, so that a captured graph draws anew
// and a rate that changes needs no synchronisation.

#pragma once

#include "../units.h"
#include "dropout_plan.h"
#include "vec.cuh"

namespace fastreg::cuda {

struct DropoutMaskArguments {
  const int64_t* seed;               // null: nothing is dropped
  const int64_t* dynamic_threshold;  // null: `threshold`
  int64_t threshold;                 // units dropped out of lanes_of_unit()
  float scale;                       // that goes with `threshold`
  Unit unit;
  bool rescale;
  Divisor elements;  // of UnitGeometry
  Divisor columns;
};

// The lowest `count` bits, 1 to 8.
__device__ __forceinline__ uint32_t low_bits(int count) { return (1u << count) - 1u; }

inline constexpr uint32_t keep_all = 0xffu;

struct DropoutMask {
  const DropoutMaskArguments& arguments;
  uint64_t seed;
  uint64_t threshold;
  float scale;

  __device__ __forceinline__ explicit DropoutMask(const DropoutMaskArguments& given)
      : arguments(given), seed(0), threshold(0), scale(1.0f) {
    if (!drops()) {
      return;
    }
    seed = static_cast<uint64_t>(__ldg(given.seed));
    threshold = static_cast<uint64_t>(given.threshold);
    scale = given.scale;
    if (given.dynamic_threshold != nullptr) {
      threshold = static_cast<uint64_t>(__ldg(given.dynamic_threshold));
      if (given.rescale) scale = scale_of_threshold();
    }
  }

  // keep_scale(), rounded to fp32.
  __device__ __forceinline__ float scale_of_threshold() const {
    if (by_elements()) {
      // Numbers below 2^24: one division in fp32 rounds to what one in fp64 would be rounded to.
      const uint32_t kept = static_cast<uint32_t>(half_lane_count - threshold);
      return kept == 0 ? 0.0f : static_cast<float>(half_lane_count) / static_cast<float>(kept);
    }
    return static_cast<float>(keep_scale(threshold, lane_count));
  }

  __device__ __forceinline__ bool drops() const { return arguments.seed != nullptr; }
  __device__ __forceinline__ bool by_elements() const { return arguments.unit == Unit::Element; }

  // --- elements ---

  // The eight bits of a block of the random stream.
  __device__ __forceinline__ uint32_t block_bits(uint64_t block) const {
    const PhiloxBlock words = philox(seed, block);
    const uint32_t limit = static_cast<uint32_t>(threshold);
    uint32_t bits = 0;
#pragma unroll
    for (int lane = 0; lane < philox_half_lanes; ++lane) bits |= half_lane(words, lane) >= limit ? 1u << lane : 0u;
    return bits;
  }

  // --- coarser units ---

  // Of the units that share a block of the random stream, a bit each.
  __device__ __forceinline__ uint32_t block_of_units(uint64_t block) const {
    const PhiloxBlock words = philox(seed, block);
    uint32_t bits = 0;
#pragma unroll
    for (int lane = 0; lane < philox_lanes; ++lane) bits |= words.words[lane] >= threshold ? 1u << lane : 0u;
    return bits;
  }

  // Units follow each other, each of so many adjacent elements, or take turns: an element each, as many as there are
  // columns, again and again until the next sample.
  template <int width>
  __device__ __forceinline__ uint32_t unit_bits(int64_t position) const {
    const int64_t columns = arguments.columns.value;
    const int64_t outer = quotient(position, arguments.elements);
    int64_t rest = (outer + 1) * arguments.elements.value - position;
    int64_t first = outer * columns;
    int64_t column = columns == 1 ? 0 : position - quotient(position, arguments.columns) * columns;
    uint32_t bits = 0;
#pragma unroll 1
    for (int index = 0; index < width;) {
      const uint64_t unit = static_cast<uint64_t>(first + column);
      const int lane = static_cast<int>(unit % philox_lanes);
      const uint32_t of_block = block_of_units(unit / philox_lanes) >> lane;
      // Elements of one unit, or units of an element each that share a block.
      int64_t count = columns == 1 ? rest : philox_lanes - lane;
      if (count > width - index) count = width - index;
      if (columns > 1 && count > columns - column) count = columns - column;
      const uint32_t found = columns > 1 ? of_block : (of_block & 1u) != 0 ? keep_all : 0u;
      bits |= (found & low_bits(static_cast<int>(count))) << index;
      index += static_cast<int>(count);
      rest -= count;
      column += count;
      if (column >= columns) column = 0;
      if (rest == 0) {
        first += columns;
        rest = arguments.elements.value;
      }
    }
    return bits;
  }
};

}  // namespace fastreg::cuda
