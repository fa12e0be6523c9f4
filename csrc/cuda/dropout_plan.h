// How the dropout family is laid out on a GPU: pure functions of the problem and the device, testable without either.
//
// Element by element, a warp takes tiles of 256 adjacent elements, 32 blocks of the random stream. A tile is read in
// packs of 16 bytes of the wider of the two tensors, neighbouring lanes side by side, or one by one where the tensors
// are not aligned. The sums for layer_scale's gradient go down the rows: a thread keeps its pack of columns, the
// threads of a block lie as a table over columns and rows.

#pragma once

#include <cstdint>

#include "../philox.h"
#include "layer_norm_plan.h"

namespace fastreg::cuda {

// --- division by what a launch knows ---------------------------------------------------------------------------------

// Divides positions of a tensor by one of its extents, which takes a multiplication and a shift: the round-up method of
// Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994. A division by an unknown
// number is a subroutine of a hundred instructions, for which the compiler saves registers to memory.
struct Divisor {
  int64_t value;
  uint64_t multiplier;
  int shift;
};

// `value` is at least 1.
constexpr Divisor divisor_of(int64_t value) {
  int shift = 0;
  while ((uint64_t{1} << shift) < static_cast<uint64_t>(value)) ++shift;
  const unsigned __int128 excess = (uint64_t{1} << shift) - static_cast<uint64_t>(value);
  return {value, static_cast<uint64_t>((excess << 64) / static_cast<uint64_t>(value)) + 1, shift};
}

// Of a position from 0 to 2^63 - 1.
FASTREG_INLINE constexpr int64_t quotient(int64_t position, const Divisor& divisor) {
  const uint64_t dividend = static_cast<uint64_t>(position);
  const uint64_t high = static_cast<uint64_t>(static_cast<unsigned __int128>(dividend) * divisor.multiplier >> 64);
  return static_cast<int64_t>((high + dividend) >> divisor.shift);
}

// --- element by element ----------------------------------------------------------------------------------------------

inline constexpr int dropout_threads = 256;
// Blocks that a multiprocessor has room for: 64 registers a thread, and 80 where units are looked up.
FASTREG_INLINE constexpr int dropout_minimum_blocks(bool units) { return units ? 3 : 4; }
inline constexpr int dropout_tile = 32 * philox_half_lanes;  // elements

FASTREG_INLINE constexpr int dropout_width(int input_size, int output_size) {
  return 16 / (input_size > output_size ? input_size : output_size);
}

// Tiles that a warp has on its way at once: 32 bytes of a tensor in each thread.
FASTREG_INLINE constexpr int dropout_tiles(int width) { return width == 8 ? 2 : 1; }

constexpr int64_t dropout_blocks(int64_t elements, int width) {
  return divide_up(elements, int64_t{dropout_threads} / 32 * dropout_tiles(width) * dropout_tile);
}

// --- sums of columns -------------------------------------------------------------------------------------------------

inline constexpr int dropout_columns_threads = 256;
inline constexpr int dropout_columns_rows = 2;  // on their way at once in each thread

struct DropoutColumnsPlan {
  int lanes;      // threads side by side
  int down;       // threads, one below the other
  int strips;     // of columns
  int64_t share;  // rows of a part
  int64_t parts;  // each gives a row of partial sums

  constexpr int threads() const { return lanes * down; }
  constexpr int64_t blocks() const { return parts * strips; }
};

// Four blocks a multiprocessor, unless a thread then had few rows.
constexpr DropoutColumnsPlan dropout_columns_plan(int64_t rows, int64_t columns, int width, int multiprocessors) {
  constexpr int blocks_at_once = 4;
  constexpr int fewest_rows = 4 * dropout_columns_rows;
  const int64_t packs = divide_up(columns, width);
  DropoutColumnsPlan plan{};
  plan.strips = static_cast<int>(divide_up(packs, dropout_columns_threads));
  plan.lanes = team_threads(divide_up(packs, plan.strips));
  plan.down = dropout_columns_threads / plan.lanes;
  const int64_t wanted = divide_up(int64_t{blocks_at_once} * multiprocessors, plan.strips);
  plan.parts = smaller(wanted, divide_up(rows, int64_t{fewest_rows} * plan.down));
  plan.share = divide_up(rows, larger(plan.parts, 1));
  plan.parts = plan.share == 0 ? 0 : divide_up(rows, plan.share);
  return plan;
}

}  // namespace fastreg::cuda
