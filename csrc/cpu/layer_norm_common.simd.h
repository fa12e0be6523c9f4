// What layer norm's forward and backward kernels share: how rows are cut up, and how partial sums are added.

#pragma once

#include "layer_norm.h"
#include "simd.h"

namespace fastreg::FASTREG_SIMD {

// Additions in a row to one accumulator, at most, before it is added to a double: bounds the rounding of long
// sums. Of fp32 with AVX-512, a block is 16 KiB, and comes from the L1 cache the second time it is read, as
// four grouped rows do.
constexpr int chained_additions = 256;

template <class Element>
constexpr int64_t columns_per_block = chained_additions * lanes_of<Accumulator<Element>>;

template <class Element>
constexpr int64_t columns_per_grouped_row = columns_per_block<Element> / 2;

// Independent accumulators for each row's sum: a group has as many chains of additions as rows, a single row
// needs several of its own to hide an addition's latency.
constexpr int unroll_of(int group) { return group == 1 ? 4 : 1; }

template <class Element>
FASTREG_INLINE int64_t end_of_block(int64_t begin, int64_t hidden) {
  const int64_t end = begin + columns_per_block<Element>;
  return end < hidden ? end : hidden;
}

template <class Pointer>
FASTREG_INLINE Pointer shifted(Pointer pointer, int64_t elements) {
  return pointer == nullptr ? nullptr : pointer + elements;
}

// The sum of all lanes of `count` accumulators.
template <int count, class V>
FASTREG_INLINE double sum_accumulators(const V* accumulators) {
  static_assert(count == 1 || count == 4);
  if constexpr (count == 1) {
    return sum_lanes(in_double(accumulators[0]));
  } else {
    return sum_lanes((in_double(accumulators[0]) + in_double(accumulators[1])) +
                     (in_double(accumulators[2]) + in_double(accumulators[3])));
  }
}

struct Tile {
  int64_t row;
  int64_t begin;
  int64_t end;
};

template <class Element>
FASTREG_INLINE int64_t blocks_of(int64_t hidden) {
  return (hidden + columns_per_block<Element> - 1) / columns_per_block<Element>;
}

template <class Element>
FASTREG_INLINE Tile tile_at(int64_t index, int64_t hidden) {
  const int64_t blocks = blocks_of<Element>(hidden);
  const int64_t begin = index % blocks * columns_per_block<Element>;
  return {index / blocks, begin, end_of_block<Element>(begin, hidden)};
}

}  // namespace fastreg::FASTREG_SIMD
