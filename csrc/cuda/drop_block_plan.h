// How DropBlock's mask and its kernels are laid out: pure functions of the shape, testable without a GPU.
//
// A mask is made of rows of positions, the last dimension of a map. Thirty-two neighbouring positions of a row are a
// thread's; a block has those of one sample, so that a sample's count is added to by whole warps.

#pragma once

#include "dropout_plan.h"

namespace fastreg::cuda {

// Of a map's dimensions, the last one being the width; a map of two has a depth of 1.
inline constexpr int drop_block_dimensions = 3;

struct DropBlockShape {
  int64_t samples;
  int64_t planes;  // of a sample
  int64_t sizes[drop_block_dimensions];
  int64_t blocks[drop_block_dimensions];
  int64_t places[drop_block_dimensions];  // that a seed may be in
  int64_t before[drop_block_dimensions];  // positions of a block before its seed
  int64_t plane_rows;
  int64_t plane_seeds;
  int64_t row_bytes;     // of bits
  int64_t row_words;     // of 32 positions
  int64_t sample_words;  // of 32 positions
  int64_t seed_words;    // of 64 places, the last with bits to spare
};

constexpr DropBlockShape drop_block_shape(int64_t samples, int64_t planes, const int64_t* sizes, const int64_t* blocks,
                                          int dimensions, bool anywhere) {
  DropBlockShape shape{samples, planes, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 0, 0, 0, 0, 0};
  for (int dimension = 0; dimension < dimensions; ++dimension) {
    const int place = drop_block_dimensions - dimensions + dimension;
    shape.sizes[place] = sizes[dimension];
    shape.blocks[place] = blocks[dimension];
    shape.places[place] = anywhere ? sizes[dimension] : larger(sizes[dimension] - blocks[dimension] + 1, 0);
    shape.before[place] = anywhere ? blocks[dimension] / 2 : 0;
  }
  shape.plane_rows = shape.sizes[0] * shape.sizes[1];
  shape.plane_seeds = shape.places[0] * shape.places[1] * shape.places[2];
  shape.row_bytes = divide_up(shape.sizes[2], 8);
  shape.row_words = divide_up(shape.sizes[2], 32);
  shape.sample_words = planes * shape.plane_rows * shape.row_words;
  shape.seed_words = divide_up(samples * planes * shape.plane_seeds, 64);
  return shape;
}

inline constexpr int drop_block_threads = 256;
inline constexpr int drop_block_packs = 2;  // of an activation, on their way at once in each thread

struct DropBlockGrowPlan {
  int threads;
  int64_t sample_blocks;
};

// Whole warps, no more than a sample has work for.
constexpr DropBlockGrowPlan drop_block_grow_plan(const DropBlockShape& shape) {
  const int threads = static_cast<int>(smaller(divide_up(shape.sample_words, 32) * 32, drop_block_threads));
  return {threads, divide_up(shape.sample_words, threads)};
}

}  // namespace fastreg::cuda
