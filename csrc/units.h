// What dropout drops at once: where the units of a tensor lie in memory, and how their lanes are compared.
//
// fastreg/_units.py says the same. No torch here: kernels include this too.

#pragma once

#include <cstdint>

#include "philox.h"

namespace fastreg {

enum class Unit : int { Element = 0, Channel = 1, Sample = 2, Batch = 3 };

// Which unit a position in memory belongs to: position / elements * columns + position % columns.
struct UnitGeometry {
  int64_t elements;  // adjacent positions after which the unit's index goes on by `columns`
  int64_t columns;   // units that take turns within these positions, or 1
};

// Of a dense tensor that is contiguous or, of channels, channels_last (`channels_last`: and more than one channel).
inline UnitGeometry unit_geometry(Unit unit, const int64_t* sizes, int64_t dimensions, bool channels_last) {
  int64_t inner[3] = {1, 1, 1};  // elements of a channel, of a sample, of the batch
  for (int64_t dimension = dimensions - 1; dimension >= 0; --dimension) {
    if (dimension >= 2) inner[0] *= sizes[dimension];
    if (dimension >= 1) inner[1] *= sizes[dimension];
    inner[2] *= sizes[dimension];
  }
  for (int64_t& elements : inner) elements = elements > 0 ? elements : 1;
  switch (unit) {
    case Unit::Channel:
      return channels_last ? UnitGeometry{inner[1], sizes[1]} : UnitGeometry{inner[0], 1};
    case Unit::Sample:
      return {inner[1], 1};
    case Unit::Batch:
      return {inner[2], 1};
    default:
      return {1, 1};
  }
}

// The number of different lanes that a threshold for these units is out of.
FASTREG_INLINE uint64_t lanes_of_unit(Unit unit) { return unit == Unit::Element ? half_lane_count : lane_count; }

}  // namespace fastreg
