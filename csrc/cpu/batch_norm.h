// The CPU batch norm's arguments and the tables of kernels that each instruction set fills. No torch here: the
// kernel files include this too.
//
// The elements of a channel are a sequence of units: the planes of the samples, or blocks of long planes, in the
// planes family; single elements, one a row, in the rows family. Sums are made over blocks of units, blocks are
// merged into chunks and chunks into the channel, all in their order, and where they begin depends on the shape
// and the dtype only. A tile is some channels of some units.

#pragma once

#include <cstdint>

#include "../activation.h"
#include "../dtype.h"
#include "dispatch.h"

namespace fastreg {

// Channels of a tile at most. Tiles of the rows family begin at multiples of it.
constexpr int64_t planes_per_tile = 64;
constexpr int64_t columns_per_tile = 1024;

// Channels whose chunks are merged at a time.
constexpr int64_t channels_per_strip = 512;

// Elements of a plane that one unit has at most.
constexpr int64_t elements_per_unit = 4096;

struct BatchNormGeometry {
  bool rows;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t units_per_plane;    // 1 in the rows family
  int64_t elements_per_unit;  // of a channel; the last unit of a plane may have fewer
  int64_t units;              // of a channel
  int64_t units_per_block;
  int64_t units_per_chunk;  // whole blocks
  int64_t chunks;

  int64_t per_channel() const { return samples * spatial; }
};

// outer_stride as in ChannelView. Null data: absent.
struct BatchNormInput {
  const void* data = nullptr;
  int64_t outer_stride = 0;
};

// Pointers have the element type of the kernel table they are passed to; what has an element a channel is fp32,
// or fp64 in the fp64 table. Null: absent, or not wanted.
struct BatchNorm {
  BatchNormGeometry geometry;
  BatchNormInput input;
  BatchNormInput residual;
  BatchNormInput grad_output;
  const unsigned char* signs;
  const void* mean;
  const void* rstd;
  const void* scale;
  const void* bias;
  // The gradient of input is scale * dz - slope * (x - mean) - offset; null where the statistics are constants.
  const void* slope;
  const void* offset;
  void* output;
  unsigned char* output_signs;
  // dz in the dtype of accumulation, laid out as a dense output, which the sums of a smooth activation keep for the
  // gradient; null: made again there.
  void* kept;
  void* grad_input;
  void* grad_residual;
  Activation activation;
  double negative_slope;
  bool streams;  // the outputs are too large for the caches, and aligned to a cache line
};

struct BatchNormTile {
  int64_t begin_channel;
  int64_t end_channel;
  int64_t begin_unit;
  int64_t end_unit;
};

// Two sums a channel of each chunk, (chunks, channels): mean and squared deviations, or dz and dz * xhat.
struct BatchNormPartials {
  double* first;
  double* second;
};

// What becomes of a channel's moments. Null: not wanted.
struct BatchNormStatistics {
  const void* weight;
  void* mean;
  void* squares;
  void* rstd;
  void* scale;
  double eps;
};

// What becomes of a channel's sums. Null: not wanted.
struct BatchNormSums {
  const void* scale;
  const void* rstd;
  void* plain;      // sum of dz
  void* projected;  // sum of dz * xhat
  void* offset;     // as in BatchNorm
  void* slope;
};

// Kernels for one family and element type. The partials are those of the tile's chunk.
struct BatchNormKernels {
  void (*moments)(const BatchNorm&, const BatchNormTile&, const BatchNormPartials&);
  void (*finish_moments)(const BatchNormGeometry&, const BatchNormPartials&, const BatchNormStatistics&,
                         int64_t begin_channel, int64_t end_channel);
  // From running statistics, in the dtype of accumulation, instead.
  void (*finish_running)(const void* mean, const void* variance, const BatchNormStatistics&,
                         int64_t begin_channel, int64_t end_channel);
  void (*normalize)(const BatchNorm&, const BatchNormTile&);
  void (*sums)(const BatchNorm&, const BatchNormTile&, const BatchNormPartials&);
  void (*finish_sums)(const BatchNormGeometry&, const BatchNormPartials&, const BatchNormSums&,
                      int64_t begin_channel, int64_t end_channel);
  void (*gradient)(const BatchNorm&, const BatchNormTile&);
};

// One table a family and element type, in DType's order.
#define FASTREG_DECLARE_BATCH_NORM_KERNELS(simd)             \
  namespace simd {                                           \
  extern const BatchNormKernels batch_norm_planes_kernels[4]; \
  extern const BatchNormKernels batch_norm_rows_kernels[4];   \
  }
FASTREG_FOR_EACH_SIMD(FASTREG_DECLARE_BATCH_NORM_KERNELS)

}  // namespace fastreg
