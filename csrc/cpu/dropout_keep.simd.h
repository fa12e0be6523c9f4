// Which elements of a stretch of memory dropout keeps, piece by piece.
//
// Elements, and units shorter than a tile, get a mask of a tile's elements, which stays in the L1 cache between its
// making and its use; longer units are kept or dropped as a whole, so that what is dropped is not even read.

#pragma once

#include "dropout.h"
#include "philox.simd.h"

namespace fastreg::FASTREG_SIMD {

enum class Kept { none, all, some };

struct Piece {
  int64_t count;
  Kept kept;
  const KeepLane* lanes;  // where some are kept: readable for a vector beyond `count`
};

// Elements that are masked at once.
constexpr int64_t keep_tile = 512;

// From this length on a unit is a piece of its own.
constexpr int64_t long_run = 256;

class Keeper {
 public:
  FASTREG_INLINE explicit Keeper(const DropoutMask& mask) : mask_(mask), stream_(mask.seed) {}
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;

  // The piece that begins at `position` and ends at `end` or before.
  Piece next(int64_t position, int64_t end) {
    const int64_t rest = end - position;
    switch (mask_.rule) {
      case KeepRule::all:
        return {rest, Kept::all, nullptr};
      case KeepRule::none:
        return {rest, Kept::none, nullptr};
      case KeepRule::elements: {
        const int64_t count = least(rest, keep_tile);
        const int64_t before = position % philox_half_lanes;
        keep_half_lanes(stream_, static_cast<uint64_t>(position / philox_half_lanes), before + count,
                        static_cast<uint16_t>(mask_.threshold), lanes_);
        return {count, Kept::some, lanes_ + before};
      }
      case KeepRule::runs:
        if (mask_.run >= long_run) {
          const int64_t unit = position / mask_.run;
          return {least(rest, (unit + 1) * mask_.run - position), keeps(unit) ? Kept::all : Kept::none, nullptr};
        }
        return short_runs(position, least(rest, keep_tile));
      default: {
        const int64_t sample = position / mask_.sample;
        const int64_t within = position % mask_.sample;
        const int64_t phase = within % mask_.pattern;
        return {least(rest, least(mask_.sample - within, mask_.pattern - phase)), Kept::some,
                mask_.patterns + sample * mask_.pattern + phase};
      }
    }
  }

 private:
  static FASTREG_INLINE int64_t least(int64_t left, int64_t right) { return left < right ? left : right; }

  FASTREG_INLINE bool keeps(int64_t unit) {
    if (unit / philox_lanes != block_) {
      block_ = unit / philox_lanes;
      words_ = philox(mask_.seed, static_cast<uint64_t>(block_));
    }
    return words_.words[unit % philox_lanes] >= mask_.threshold;
  }

  // Each unit's lane is written over as many elements as whole vectors take; the next unit's begin where it ends.
  FASTREG_INLINE Piece short_runs(int64_t position, int64_t count) {
    constexpr int width = 8;
    const int64_t run = mask_.run;
    const int64_t unit = position / run;
    const int64_t units = (position + count - 1) / run - unit + 1;
    if (unit < begin_ || unit + units > end_) {
      begin_ = unit / philox_lanes * philox_lanes;
      end_ = begin_ + (unit + units - begin_ + lanes_per_step - 1) / lanes_per_step * lanes_per_step;
      keep_lanes(stream_, static_cast<uint64_t>(unit / philox_lanes), end_ - begin_, mask_.threshold, units_);
    }
    const KeepLane* const keep = units_ + (unit - begin_);
    if (run == 1) {
      return {count, Kept::some, keep};
    }
    KeepLane* target = lanes_;
    for (int64_t k = 0; k < units; ++k, target += run) {
      const Vector<KeepLane, width * int{sizeof(KeepLane)}> kept = KeepLane(keep[k]) - decltype(kept){};
      for (int64_t lane = 0; lane < run; lane += width) {
        __builtin_memcpy(target + lane, &kept, sizeof(kept));
      }
    }
    return {count, Kept::some, lanes_ + position % run};
  }

  static constexpr int64_t room = philox_half_lanes + half_lanes_per_step + lanes_of<uint16_t>;

  const DropoutMask& mask_;
  PhiloxStream stream_;
  // The block of lanes that long runs came to last, and the units that are in units_.
  int64_t block_ = -1;
  PhiloxBlock words_{};
  int64_t begin_ = 0;
  int64_t end_ = 0;
  // Of a tile, with the beginning of its first unit and the end of its last.
  alignas(64) KeepLane lanes_[keep_tile + 2 * long_run + room];
  alignas(64) KeepLane units_[keep_tile + room];
};

}  // namespace fastreg::FASTREG_SIMD
