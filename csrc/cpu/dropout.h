// Arguments of the CPU kernels of dropout, and the table of them that each instruction set fills. No torch here: the
// kernel files include this too.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "dispatch.h"

namespace fastreg {

// Where it is known which elements are kept.
enum class KeepRule : int {
  all,
  none,
  elements,  // each on its own: 16-bit lanes, by the position
  runs,      // `run` adjacent elements are one unit: 32-bit lanes
  patterns,  // channels_last: the elements of a sample take turns with `patterns`
};

struct DropoutMask {
  KeepRule rule;
  uint64_t seed;
  uint32_t threshold;  // below the number of lanes: else the rule is `none`
  int64_t run;
  const uint16_t* patterns;  // (samples, pattern): 0xffff or 0, see unit_patterns below
  int64_t pattern;           // a multiple of the channels
  int64_t sample;            // elements of a sample
};

// Positions in memory are counted from 0 in all tensors alike. Scales are fp32, or fp64 in the table of fp64. Null:
// absent.
struct Dropout {
  DropoutMask mask;
  double scale;              // of what is kept
  const void* input;
  const void* residual;      // of output's type
  const void* row_scale;     // one for `row` elements
  const void* layer_scale;   // (columns,)
  void* output;
  int64_t elements;
  int64_t row;
  int64_t columns;
  bool streams;  // output is aligned to a cache line, and too large for the caches
};

// What layer_scale's gradient needs beside: `dropout` is that of grad_output, its output grad_input or null.
struct LayerScaleGradient {
  Dropout dropout;
  const void* input;  // of grad_input's type
  void* partials;     // (chunks, columns)
  int64_t rows;
  int64_t rows_per_chunk;
};

// Columns of a chunk of rows that are one piece of work.
constexpr int64_t dropout_block_columns = 4096;

struct DropoutKernels {
  // Positions [begin, end); begin is a multiple of dropout_tile.
  void (*apply)(const Dropout&, int64_t begin, int64_t end);
  // Blocks of dropout_block_columns of a chunk, numbered row-major.
  void (*layer_scale)(const LayerScaleGradient&, int64_t begin_block, int64_t end_block);
};

// Elements that one piece of work has at least: by position alone, so that any split among threads gives the same
// bits, and enough for the call.
constexpr int64_t dropout_tile = 4096;

// For samples [begin, end): which of their `channels` units are kept, 0xffff or 0, repeated along `pattern` elements.
using UnitPatterns = void(uint64_t seed, uint32_t threshold, int64_t channels, int64_t pattern, uint16_t* patterns,
                          int64_t begin, int64_t end);

// Tables by the types of input and output, in DType's order; null where there is no such kernel.
#define FASTREG_DECLARE_DROPOUT_KERNELS(simd)         \
  namespace simd {                                    \
  extern const DropoutKernels dropout_kernels[4][4];  \
  extern UnitPatterns* const unit_patterns;           \
  }
FASTREG_FOR_EACH_SIMD(FASTREG_DECLARE_DROPOUT_KERNELS)

}  // namespace fastreg
