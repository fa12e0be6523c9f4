// Arguments of the CPU norms of a sum with dropout, beside those of the norm itself, and the tables of their kernels
// that each instruction set fills. No torch here: the kernel files include this too.

#pragma once

#include "dropout.h"
#include "layer_norm.h"

namespace fastreg {

// What is added to the residual: keep ? input * row_scale * layer_scale * scale : 0. Scales are fp32, or fp64 for
// fp64. Null: absent.
struct DropoutBranch {
  KeepRule rule;  // all, none or elements: those at row * hidden + column
  uint64_t seed;
  uint16_t threshold;
  double scale;
  const void* input;
  const void* row_scale;    // one for `rows_per_scale` rows
  const void* layer_scale;  // (hidden,)
  int64_t input_stride;
  int64_t rows_per_scale;
};

// The norm's `input` is the sum where that is made by tiles, and does not matter elsewhere.
struct DropoutAddNormForward : NormForward {
  DropoutBranch branch;
  const void* residual;  // of the input's type, or fp32
  int64_t residual_stride;
  bool wide_residual;  // fp32, though the input has 16 bits
  void* sum;           // null: not kept
  // The thread's own place for the rows that it works on; null: they are made in `sum`, which then is not null.
  void* buffer;
  bool streams_sum;  // `sum` is too large for the caches, and each row is aligned to a cache line
};

// The norm's `input` is the sum, its `grad_input` that of the branch's input.
struct DropoutAddNormBackward : NormBackward {
  DropoutBranch branch;  // its input only where layer_scale's gradient is wanted
  const void* grad_sum;  // null: absent
  int64_t grad_sum_stride;
  void* grad_residual;
  void* layer_scale_partials;  // (chunks, hidden)
  bool streams_residual;       // as `streams`, for grad_residual
};

// As NormKernels, for one type of input, output and their gradients, and one of sum, residual and theirs.
struct DropoutAddNormKernels {
  int64_t columns_per_block;
  int64_t columns_per_grouped_row;
  void (*forward_rows)(const DropoutAddNormForward&, int64_t begin_row, int64_t end_row);
  // Makes the sum as well.
  void (*forward_moments)(const DropoutAddNormForward&, Moments<double>* tiles, int64_t begin_tile, int64_t end_tile);
  void (*forward_statistics)(const NormForward&, const Moments<double>* tiles);
  void (*forward_normalize)(const NormForward&, int64_t begin_tile, int64_t end_tile);
  void (*backward_chunks)(const DropoutAddNormBackward&, int64_t begin_chunk, int64_t end_chunk);
  void (*backward_sums)(const NormBackward&, RowSums* tiles, int64_t begin_tile, int64_t end_tile);
  // Tiles of chunks.
  void (*backward_apply)(const DropoutAddNormBackward&, const RowSums* tiles, int64_t begin_tile, int64_t end_tile);
};

// Tables by the type of the input, in DType's order, and by whether the sum is fp32 though the input has 16 bits.
#define FASTREG_DECLARE_DROPOUT_ADD_NORM_KERNELS(simd)                    \
  namespace simd {                                                        \
  extern const DropoutAddNormKernels dropout_add_layer_norm_kernels[4][2]; \
  extern const DropoutAddNormKernels dropout_add_rms_norm_kernels[4][2];   \
  }
FASTREG_FOR_EACH_SIMD(FASTREG_DECLARE_DROPOUT_ADD_NORM_KERNELS)

}  // namespace fastreg
