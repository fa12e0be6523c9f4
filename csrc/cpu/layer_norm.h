// The CPU norms' arguments and the table of kernels that each instruction set fills. No torch here: the
// kernel files include this too.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../math.h"
#include "dispatch.h"

namespace fastreg {

// Rows that are worked on together: their sums overlap each other's latencies, and the weight gradients'
// partial sums are loaded and stored once for all of them.
constexpr int rows_per_group = 4;

// Pointers have the element type of the kernel table they are passed to; weight, bias, statistics and partial
// sums are fp32, or fp64 in the fp64 table. Null: absent, or not wanted.
struct NormForward {
  const void* input;
  const void* weight;
  const void* bias;
  void* output;
  void* mean;  // null for rms norm
  void* rstd;
  int64_t rows;
  int64_t hidden;
  int64_t input_stride;
  double eps;
  bool streams;  // output is too large for the caches, and each row is aligned to a cache line
};

// Per row: sum of grad_output * weight * xhat, and of grad_output * weight.
struct RowSums {
  double projected;
  double plain;
};

struct NormBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* mean;  // null for rms norm
  const void* rstd;
  void* grad_input;
  void* weight_partials;  // (chunks, hidden)
  void* bias_partials;    // (chunks, hidden)
  int64_t rows;
  int64_t hidden;
  int64_t grad_output_stride;
  int64_t input_stride;
  int64_t rows_per_chunk;
  bool streams;  // as above, for grad_input
};

// Kernels for one element type. Rows, chunks and tiles are half-open ranges, so that any split among threads
// gives the same bits; a tile is one column block of one row (or chunk), numbered row-major.
struct NormKernels {
  // Long rows are a sequence of blocks, whose sums are merged in order, in double.
  int64_t columns_per_block;
  // The forward pass groups rows up to this length; there forward_rows must begin at a multiple of
  // rows_per_group.
  int64_t columns_per_grouped_row;
  void (*forward_rows)(const NormForward&, int64_t begin_row, int64_t end_row);
  void (*forward_moments)(const NormForward&, Moments<double>* tiles, int64_t begin_tile, int64_t end_tile);
  void (*forward_statistics)(const NormForward&, const Moments<double>* tiles);
  void (*forward_normalize)(const NormForward&, int64_t begin_tile, int64_t end_tile);
  void (*backward_chunks)(const NormBackward&, int64_t begin_chunk, int64_t end_chunk);
  // Tiles of chunks; null where no more than the gradients of weight and bias is wanted.
  void (*backward_sums)(const NormBackward&, RowSums* tiles, int64_t begin_tile, int64_t end_tile);
  // Tiles of rows.
  void (*backward_apply)(const NormBackward&, const RowSums* tiles, int64_t begin_tile, int64_t end_tile);
};

// One table an element type, in DType's order.
#define FASTREG_DECLARE_NORM_KERNELS(simd)        \
  namespace simd {                                \
  extern const NormKernels layer_norm_kernels[4]; \
  extern const NormKernels rms_norm_kernels[4];   \
  }
FASTREG_FOR_EACH_SIMD(FASTREG_DECLARE_NORM_KERNELS)

}  // namespace fastreg
