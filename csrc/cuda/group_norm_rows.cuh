// How rows of a sample lie in shared memory, and how its groups' values are added up over threads and blocks.
//
// A block has some rows of a sample, all channels of them. Its threads lie as a table over the rows: each keeps its
// chunk of channels and goes down the rows, and leaves what it knows of each channel in shared memory. Some
// neighbouring lanes then take a group each. Blocks that share a sample write what they know of each group to global
// memory and meet at a counter; each of them merges all groups, or, where that is too much to read, some groups each:
// then they meet once more, and read the results. Everything is merged in the order of channels, rows and blocks.

#pragma once

#include "group_norm.cuh"

namespace fastreg::cuda {

// --- a thread's chunks -----------------------------------------------------------------------------------------------

// A thread's chunk of each of its block's rows. A thread reads only what it copied itself.
template <class Element>
struct GroupRows {
  static constexpr int width = full_width<Element>;

  int chunks;         // of a row
  int64_t first_row;  // of the sample
  int count;          // rows of the block
  int column;         // of this thread
  int start;          // its first row of the block; beyond all of them for threads that have none
  int step;           // rows that the block takes at once

  __device__ __forceinline__ GroupRows(const GroupLayout& layout, const ChannelShape& shape) : chunks(layout.lanes) {
    first_row = layout.blocks.rank() * layout.blocks.share;
    const int64_t rest = shape.spatial - first_row;
    count = static_cast<int>(rest < layout.blocks.share ? rest : layout.blocks.share);
    const int thread = static_cast<int>(threadIdx.x);
    step = static_cast<int>(blockDim.x) / chunks;
    start = thread / chunks;
    column = thread - start * chunks;
    if (start >= step) start = count;
  }

  __device__ __forceinline__ int channel() const { return column * width; }
  __device__ __forceinline__ int place(int row) const { return row * chunks + column; }
  // Rows that a thread has, whose first is this one.
  __device__ __forceinline__ int rows_from(int row) const { return row < count ? (count - row + step - 1) / step : 0; }
  // Rows of the table of threads that have any.
  __device__ __forceinline__ int down() const { return step < count ? step : count; }
  // Where a tensor has the thread's chunk.
  __device__ __forceinline__ int64_t offset(const ChannelShape& shape, int64_t stride, int64_t sample, int row) const {
    return (sample * shape.spatial + first_row + row) * stride + channel();
  }
};

// Two values of each thread's channels, then two of each group.
struct GroupTable {
  float* first;
  float* second;
  float* of_group[2];
  int channels;

  __device__ __forceinline__ GroupTable(void* memory, int channels, int down, int64_t groups)
      : first(static_cast<float*>(memory)), second(first + down * channels), channels(channels) {
    of_group[0] = second + down * channels;
    of_group[1] = of_group[0] + groups;
  }

  __device__ __forceinline__ int place(int row, int channel) const { return row * channels + channel; }

  template <int width>
  static __device__ __forceinline__ void put(float* target, const float (&values)[width]) {
#pragma unroll
    for (int index = 0; index < width; index += 4) {
      *reinterpret_cast<float4*>(target + index) =
          float4{values[index], values[index + 1], values[index + 2], values[index + 3]};
    }
  }
};

// The group of each of a thread's neighbouring channels.
template <int width>
__device__ __forceinline__ void groups_of(int channel, int group_channels, int (&groups)[width]) {
  int group = channel / group_channels;
  int rest = channel - group * group_channels;
#pragma unroll
  for (int index = 0; index < width; ++index) {
    groups[index] = group;
    if (++rest == group_channels) {
      rest = 0;
      ++group;
    }
  }
}

// --- over groups -----------------------------------------------------------------------------------------------------

// Calls visit(group, lane, lanes, has) with some lanes for each of the groups `start`, `start + stride`, ...; all lanes
// of a warp equally often.
template <class Visit>
__device__ __forceinline__ void each_group(int groups, int start, int stride, const Visit& visit) {
  const int number = groups > start ? (groups - start + stride - 1) / stride : 0;
  int lanes = warp_lanes;
  while (lanes > 1 && number * lanes > static_cast<int>(blockDim.x)) lanes /= 2;
  const int teams = static_cast<int>(blockDim.x) / lanes;
  const int team = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) - team * lanes;
  for (int index = 0; index < number; index += teams) {
    visit(start + (index + team) * stride, lane, lanes, index + team < number);
  }
}

// Of `count` values, those of one lane together; an empty value stands for none.
template <class Value, class Load>
__device__ __forceinline__ Value together_of(int count, int lane, int lanes, const Load& load) {
  Value value{};
  if (lane < count) value = load(lane);
#pragma unroll 4
  for (int index = lane + lanes; index < count; index += lanes) value = together(value, load(index));
  return value;
}

// What all blocks know together of each group: `own(group, lane, lanes)` is what a lane of this block knows,
// `finish(group, value)` is called once a group and block. Every thread of the group of blocks must call it, with
// `round` counting up from 0, after a barrier of the block; what finish() writes wants another one.
template <class Value, class Own, class Finish>
__device__ __forceinline__ void over_sample(const GroupLayout& layout, int groups, unsigned round, const Own& own,
                                            const Finish& finish) {
  const int blocks = layout.blocks.slab_blocks;
  const Partials<Value> partials(layout.blocks, groups, round);
  each_group(groups, 0, 1, [&](int group, int lane, int lanes, bool has) {
    Value value{};
    if (has) value = own(group, lane, lanes);
    value = over_lanes(value, lanes);
    if (has && lane == 0) {
      if (blocks == 1) {
        finish(group, value);
      } else {
        partials.store(layout.blocks.rank(), group, value);
      }
    }
  });
  if (blocks == 1) {
    return;
  }

  const unsigned meetings = layout.twice ? 2 : 1;
  const auto meet = [&](unsigned number) {
    __syncthreads();
    if (threadIdx.x == 0) meet_group(layout.blocks, number);
    __syncthreads();
  };
  meet(meetings * round);
  // As one block's partial results.
  Partials<Value> merged(layout.blocks, groups, 0);
  merged.base = layout.merged + (2 * layout.blocks.group() + round % 2) * groups * Partials<Value>::words;
  each_group(groups, layout.twice ? layout.blocks.rank() : 0, layout.twice ? blocks : 1,
             [&](int group, int lane, int lanes, bool has) {
               Value value{};
               if (has) {
                 value = together_of<Value>(blocks, lane, lanes,
                                            [&](int block) { return partials.load(block, group); });
               }
               value = over_lanes(value, lanes);
               if (has && lane == 0) {
                 if (layout.twice) {
                   merged.store(0, group, value);
                 } else {
                   finish(group, value);
                 }
               }
             });
  if (layout.twice) {
    meet(meetings * round + 1);
    for (int group = static_cast<int>(threadIdx.x); group < groups; group += static_cast<int>(blockDim.x)) {
      finish(group, merged.load(0, group));
    }
  }
}

}  // namespace fastreg::cuda
