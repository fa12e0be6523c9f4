// Arguments of the CPU kernels of DropBlock, and the table of them that each instruction set fills. No torch here: the
// kernel files include this too.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../math.h"
#include "dispatch.h"

namespace fastreg {

FASTREG_INLINE int64_t least(int64_t left, int64_t right) { return left < right ? left : right; }

// Depth, height and width; two dimensions have a depth of one.
constexpr int drop_block_dimensions = 3;

struct DropBlockMask {
  uint64_t seed;
  bool draws;     // whether there may be a seed
  uint32_t last;  // the largest lane of one
  int64_t samples;
  int64_t channels;
  int64_t size[drop_block_dimensions];
  int64_t block[drop_block_dimensions];
  int64_t places[drop_block_dimensions];  // of seeds
  int64_t before[drop_block_dimensions];  // how far a block begins before its seed
  int64_t row_bytes;
  unsigned char* bits;  // of rows, one after the other
  int64_t* counts;      // of each sample: comes with all, goes with what is kept

  FASTREG_INLINE int64_t plane_places() const { return places[0] * places[1] * places[2]; }
  FASTREG_INLINE int64_t plane_bytes() const { return size[0] * size[1] * row_bytes; }
};

// A sample's planes as (channels, rows, width), or with the channels last.
struct DropBlockApply {
  const void* input;
  void* output;
  const unsigned char* bits;
  int64_t bits_bytes;
  const double* scales;
  bool scale_per_sample;
  int64_t samples;
  int64_t channels;
  int64_t rows;
  int64_t width;
  int64_t row_bytes;
  bool shared;   // the bits of a sample are those of all its channels
  bool streams;  // output is aligned to a cache line, and too large for the caches

  FASTREG_INLINE int64_t plane_bytes() const { return rows * row_bytes; }
  FASTREG_INLINE int64_t sample_elements() const { return channels * rows * width; }
};

// Positions of a tile of planes, and bytes of bits of a strip of channels_last: pieces of work, cut by shape alone.
constexpr int64_t drop_block_tile = 4096;
constexpr int64_t drop_block_strip = 16;

// Tiles do not cross from one sample to the next where these have different scales.
FASTREG_INLINE int64_t drop_block_tiles(const DropBlockApply& apply) {
  const int64_t spans = apply.scale_per_sample ? apply.samples : 1;
  const int64_t span = apply.samples / spans * apply.sample_elements();
  return spans * ((span + drop_block_tile - 1) / drop_block_tile);
}

FASTREG_INLINE int64_t drop_block_strips(const DropBlockApply& apply) {
  return apply.samples * ((apply.plane_bytes() + drop_block_strip - 1) / drop_block_strip);
}

// Bytes that a call of a kernel works in, aligned to a cache line.
struct DropBlockKernels {
  void (*planes)(const DropBlockApply&, int64_t begin_tile, int64_t end_tile);
  int64_t (*channels_last_scratch)(const DropBlockApply&);
  void (*channels_last)(const DropBlockApply&, void* scratch, int64_t begin_strip, int64_t end_strip);
};

struct DropBlockMaskKernels {
  int64_t (*scratch)(const DropBlockMask&);
  // Groups of drop_block_planes planes.
  void (*mask)(const DropBlockMask&, void* scratch, int64_t begin_group, int64_t end_group);
};

// Seeds that are drawn at a time, of several planes where they are small.
constexpr int64_t drop_block_seeds = 16384;

FASTREG_INLINE int64_t drop_block_planes(const DropBlockMask& mask) {
  const int64_t planes = drop_block_seeds / mask.plane_places();
  return planes > 0 ? planes : 1;
}

// One table an element type, in DType's order.
#define FASTREG_DECLARE_DROP_BLOCK_KERNELS(simd)            \
  namespace simd {                                          \
  extern const DropBlockKernels drop_block_kernels[4];      \
  extern const DropBlockMaskKernels drop_block_mask_kernels; \
  }
FASTREG_FOR_EACH_SIMD(FASTREG_DECLARE_DROP_BLOCK_KERNELS)

}  // namespace fastreg
