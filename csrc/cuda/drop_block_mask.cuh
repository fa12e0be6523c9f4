// DropBlock's mask: seeds from the random stream, blocks grown from them, and how many positions of a sample are kept.
//
// Two kernels. The first makes a bit of every place that a seed may be in, in the order of the random stream, eight of
// its blocks for a word; it also clears the counts. In the second, a thread finds 32 neighbouring positions of a row:
// it joins the windows of the rows of seeds whose blocks reach that row, and lets the joined window grow by doubling.
// Blocks wider than 33 grow from several windows. Seeds are an eighth of a byte each and stay in the L2, so that no map
// is too large and none is computed twice.
//
// Traffic: a bit a seed written and read again, a bit a position written; 8 bytes a sample. Counts are integers and
// added atomically: equal bits in every run.

#pragma once

#include "../philox.h"
#include "drop_block_plan.h"
#include "reduce.cuh"

namespace fastreg::cuda {

struct DropBlockMaskArguments {
  const int64_t* seed;
  const int64_t* dynamic_threshold;  // null: `threshold`
  int64_t threshold;                 // places out of 2^32 that become seeds
  unsigned long long* seeds;         // (seed_words)
  unsigned char* bits;               // (samples, planes, rows, row_bytes)
  unsigned long long* counts;        // (samples)
  DropBlockShape shape;
  DropBlockGrowPlan plan;
  Divisor row_words;
  Divisor row_of_depth;  // rows of one depth of a plane
  Divisor depth_of_plane;
};

// --- seeds -----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(drop_block_threads) drop_block_seeds_kernel(const DropBlockMaskArguments arguments) {
  constexpr int blocks = 64 / philox_lanes;
  const int64_t word = static_cast<int64_t>(blockIdx.x) * drop_block_threads + static_cast<int>(threadIdx.x);
  if (word < arguments.shape.samples) arguments.counts[word] = 0;
  if (word >= arguments.shape.seed_words) return;
  const uint64_t seed = static_cast<uint64_t>(__ldg(arguments.seed));
  const bool dynamic = arguments.dynamic_threshold != nullptr;
  const uint64_t limit = static_cast<uint64_t>(dynamic ? __ldg(arguments.dynamic_threshold) : arguments.threshold);
  unsigned long long bits = 0;
#pragma unroll 4
  for (int block = 0; block < blocks; ++block) {
    const PhiloxBlock words = philox(seed, static_cast<uint64_t>(word) * blocks + block);
    unsigned nibble = 0;
#pragma unroll
    for (int lane = 0; lane < philox_lanes; ++lane) nibble |= words.words[lane] < limit ? 1u << lane : 0u;
    bits |= static_cast<unsigned long long>(nibble) << block * philox_lanes;
  }
  arguments.seeds[word] = bits;
}

// --- blocks ----------------------------------------------------------------------------------------------------------

// Bits `first` to `first` + 63 of a row of seeds that begins at bit `row`; those beyond the row are 0.
__device__ __forceinline__ unsigned long long seeds_from(const DropBlockMaskArguments& arguments, int64_t row,
                                                         int64_t first) {
  const int64_t begin = first < 0 ? 0 : first;
  const int64_t places = arguments.shape.places[2];
  const int64_t end = first + 64 < places ? first + 64 : places;
  if (begin >= end) return 0;
  const int count = static_cast<int>(end - begin);
  const unsigned long long* word = arguments.seeds + (row + begin) / 64;
  const int shift = static_cast<int>((row + begin) % 64);
  unsigned long long bits = __ldg(word) >> shift;
  if (shift + count > 64) bits |= __ldg(word + 1) << (64 - shift);
  if (count < 64) bits &= (1ull << count) - 1;
  return bits << (begin - first);
}

// Positions that are covered by a block of `width` bits or less, at most 33, that begins at a bit of the window: bit i
// says whether one of the bits i to i + width - 1 is set.
__device__ __forceinline__ uint32_t grown(unsigned long long window, int width) {
  int reach = 1;
  for (; 2 * reach <= width; reach *= 2) window |= window >> reach;
  return static_cast<uint32_t>(window | window >> (width - reach));
}

// The compilers make one instruction of it where there is one.
__device__ __forceinline__ int ones(uint32_t word) {
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0fu;
  return static_cast<int>(word * 0x01010101u >> 24);
}

// The seeds whose blocks reach a position: from `first` up to `end`.
struct SeedRange {
  int64_t first;
  int64_t end;

  __device__ __forceinline__ SeedRange(const DropBlockShape& shape, int dimension, int64_t position) {
    const int64_t last = position + shape.before[dimension];
    first = last - shape.blocks[dimension] + 1;
    if (first < 0) first = 0;
    end = last < shape.places[dimension] ? last + 1 : shape.places[dimension];
  }
};

__global__ void __launch_bounds__(drop_block_threads) drop_block_grow_kernel(const DropBlockMaskArguments arguments) {
  constexpr int window = 32;  // 63 bits hold what 32 positions see of 32 seeds each
  const DropBlockShape& shape = arguments.shape;
  const unsigned sample_blocks = static_cast<unsigned>(arguments.plan.sample_blocks);
  const int64_t sample = blockIdx.x / sample_blocks;
  const int64_t word = static_cast<int64_t>(blockIdx.x % sample_blocks) * blockDim.x + static_cast<int>(threadIdx.x);
  int kept = 0;
  if (word < shape.sample_words) {
    const int64_t row = quotient(word, arguments.row_words);
    const int64_t position = (word - row * arguments.row_words.value) * 32;
    const int64_t layer = quotient(row, arguments.row_of_depth);
    const int64_t height = row - layer * arguments.row_of_depth.value;
    const int64_t plane = quotient(layer, arguments.depth_of_plane);
    const int64_t depth = layer - plane * arguments.depth_of_plane.value;
    const int64_t seeds = (sample * shape.planes + plane) * shape.plane_seeds;
    const SeedRange depths(shape, 0, depth);
    const SeedRange heights(shape, 1, height);

    uint32_t covered = 0;
    for (int64_t done = 0; done < shape.blocks[2]; done += window) {
      const int64_t rest = shape.blocks[2] - done;
      const int64_t first = position + shape.before[2] - shape.blocks[2] + 1 + done;
      unsigned long long joined = 0;
      for (int64_t z = depths.first; z < depths.end; ++z) {
        for (int64_t y = heights.first; y < heights.end; ++y) {
          joined |= seeds_from(arguments, seeds + (z * shape.places[1] + y) * shape.places[2], first);
        }
      }
      covered |= grown(joined, rest < window ? static_cast<int>(rest) : window);
    }

    const int64_t width = shape.sizes[2] - position;
    const uint32_t bits = ~covered & (width < 32 ? (1u << width) - 1u : ~0u);
    const int64_t target = (sample * shape.planes * shape.plane_rows + row) * shape.row_bytes + position / 8;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      if (8 * byte < width) arguments.bits[target + byte] = static_cast<unsigned char>(bits >> 8 * byte);
    }
    kept = ones(bits);
  }
  kept = __reduce_add_sync(all_lanes, kept);
  if (threadIdx.x % warp_lanes == 0 && kept != 0) {
    atomicAdd(arguments.counts + sample, static_cast<unsigned long long>(kept));
  }
}

}  // namespace fastreg::cuda
