// How rows lie in shared memory, and how the blocks that share a strip of channels add up what each of them knows.
//
// A strip is up to eight chunks of 16 bytes wide and all rows long; a block holds some of its rows. A warp takes a few
// rows at once, each lane one chunk: it keeps its channels and goes down the rows. What it knows of them is merged over
// the lanes below each other, over warps, and over the blocks of the group: those write their part to global memory,
// meet at a counter, and each of them merges all parts in the order of their numbers.

#pragma once

#include "batch_norm_resident_layout.cuh"

namespace fastreg::cuda {

// --- a strip of rows -------------------------------------------------------------------------------------------------

// A thread's chunk of each of its block's rows of a strip. Thread t reads only what it copied itself.
template <class Element>
struct RowWalk {
  static constexpr int width = full_width<Element>;

  int columns;  // chunks of a strip
  int chunks;   // of a row of the tensor
  int64_t first_row;
  int count;   // rows of the block
  int lanes;   // threads side by side
  int column;  // of this thread
  int start;   // its first row in the block
  int step;    // rows that the block takes at once

  __device__ __forceinline__ RowWalk(const ResidentLayout& layout, const ChannelShape& shape)
      : columns(layout.columns),
        chunks(static_cast<int>(shape.channels / width)),
        lanes(strip_lanes(layout.columns)) {
    first_row = layout.rank() * layout.share;
    const int64_t rest = shape.per_channel() - first_row;
    count = static_cast<int>(rest < layout.share ? rest : layout.share);
    column = static_cast<int>(threadIdx.x) % lanes;
    start = static_cast<int>(threadIdx.x) / lanes;
    step = static_cast<int>(blockDim.x) / lanes;
  }

  // Whether the thread has a chunk of the strip at all.
  __device__ __forceinline__ bool has(int64_t strip) const {
    return column < columns && strip * columns + column < chunks;
  }

  __device__ __forceinline__ int64_t channel(int64_t strip) const { return (strip * columns + column) * width; }
  __device__ __forceinline__ int place(int row) const { return row * columns + column; }
  __device__ __forceinline__ int64_t row_of_tensor(int row) const { return first_row + row; }

  // Warps that have any rows.
  __device__ __forceinline__ int warps() const {
    const int rows_of_warp = warp_lanes / lanes;
    const int needed = (count + rows_of_warp - 1) / rows_of_warp;
    const int all = static_cast<int>(blockDim.x) / warp_lanes;
    return needed < all ? needed : all;
  }
};

template <class Element>
__device__ __forceinline__ const Element* row_address(const void* tensor, int64_t stride, int64_t row,
                                                      int64_t channel) {
  return static_cast<const Element*>(tensor) + row * stride + channel;
}

// Over the lanes of a warp that have the same chunk; all of them have the result.
__device__ __forceinline__ float over_rows(float value, int lanes) {
  for (int distance = lanes; distance < warp_lanes; distance *= 2) {
    value += __shfl_xor_sync(all_lanes, value, distance);
  }
  return value;
}

// --- what a strip's channels add up to -------------------------------------------------------------------------------

inline constexpr int strip_channels = 64;  // the most: eight chunks of eight elements
inline constexpr int strip_values = strip_channels * resident_rows_threads / warp_lanes;

// `values`: (warps or parts, channels). `channel`: what threads need of each channel, by name and channel.
template <class Value, int names>
struct StripShared {
  Value values[strip_values];
  float channel[names][strip_channels];

  // The values of a thread's own channels.
  template <int width>
  __device__ __forceinline__ void get(int name, int column, float (&result)[width]) const {
#pragma unroll
    for (int index = 0; index < width; ++index) result[index] = channel[name][column * width + index];
  }
};

// Every warp that has rows has left its values of the strip's channels in `values`; the threads below `channels` get
// those of the whole strip. Every thread of the group's blocks must call it, with `round` counting up from 0.
template <class Value, int names>
__device__ __forceinline__ Value over_group(StripShared<Value, names>& shared, const ResidentLayout& layout,
                                            int channels, int warps, unsigned round) {
  const int thread = static_cast<int>(threadIdx.x);
  const int blocks = layout.slab_blocks;
  __syncthreads();
  Value value{};
  if (thread < channels) {
    value = shared.values[thread];
    for (int warp = 1; warp < warps; ++warp) value = together(value, shared.values[warp * channels + thread]);
  }
  if (blocks == 1) {
    return value;
  }

  const Partials<Value> partials(layout, channels, round);
  if (thread < channels) partials.store(layout.rank(), thread, value);
  __syncthreads();
  if (thread == 0) meet_group(layout, round);
  __syncthreads();
  const int most = static_cast<int>(blockDim.x) / channels;
  const int parts = most < blocks ? most : blocks;
  const int part = thread / channels;
  if (part < parts) {
    const int channel = thread - part * channels;
    value = partials.load(part, channel);
#pragma unroll 4
    for (int block = part + parts; block < blocks; block += parts) {
      value = together(value, partials.load(block, channel));
    }
    shared.values[thread] = value;
  }
  __syncthreads();
  if (thread < channels) {
    value = shared.values[thread];
    for (int other = 1; other < parts; ++other) value = together(value, shared.values[other * channels + thread]);
  }
  return value;
}

}  // namespace fastreg::cuda
