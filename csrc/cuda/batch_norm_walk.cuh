// How a block of the streaming kernels finds its elements, and how its threads add up what each of them knows.
//
// planes: a block has a part of one channel. Its threads take the packs of the channel one after the other, sample
//         after sample, whatever the length of a plane.
// rows:   a block has some rows of a strip of channels. Its threads lie as a table over them: each keeps its pack of
//         channels and goes down the rows.
//
// Results are added up in an order that depends on the launch's shape alone: equal bits in every run.
//
// Batch norm's channels are of all samples. Group norm uses the same kernels with its samples `apart`: a launch then
// has the plan's blocks for each sample, and what a block finds out is of one sample's channels.

#pragma once

#include "batch_norm.cuh"
#include "batch_norm_plan.h"

namespace fastreg::cuda {

// Channels of a pack.
template <int width, bool rows>
inline constexpr int pack_channels = rows ? width : 1;

// Where the channels' statistics are when samples are apart: those of a group stand for all its channels.
struct GroupShape {
  int64_t groups;    // of a sample
  int64_t channels;  // of a group
};

// A thread's way through its part. Places are counted from where the part begins, in 32 bits; tensors are pointed to by
// their first element of it.
template <int width, bool rows, bool apart = false>
struct Walk {
  int64_t sample;       // 0 unless samples are apart
  int64_t channel;      // the first of this thread's
  int64_t part;
  int64_t first_outer;  // sample or row that the part begins with
  int items;            // of the part
  int step;             // items that the block's threads take at once
  int line_packs;
  int line_end;  // planes: packs that a line has; rows: 1 where the thread has channels, else 0
  int item;      // where this thread is
  int outer;     // its sample or row
  int place;     // its pack of the line
  int step_outer;
  int step_place;

  // `reversed`: the last block first, which finds in the L2 what an earlier kernel read last.
  __device__ __forceinline__ Walk(const ChannelShape& shape, const StreamPlan& plan, bool reversed) {
    unsigned block = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    sample = 0;
    if constexpr (apart) {
      const unsigned blocks = static_cast<unsigned>(plan.blocks);
      sample = block / blocks;
      block %= blocks;
    }
    const int thread = static_cast<int>(threadIdx.x);
    step = step_of(plan, rows);
    line_packs = plan.line_packs;
    if constexpr (rows) {
      // Strips of the same rows are worked on at the same time.
      const unsigned across = static_cast<unsigned>(plan.across);
      part = block / across;
      item = thread / plan.lanes;
      place = static_cast<int>(block % across) * plan.lanes + thread % plan.lanes;
      channel = static_cast<int64_t>(place) * width;
      line_end = channel < shape.channels && item < step ? 1 : 0;
      first_outer = part * plan.share + sample * shape.spatial;
      outer = item;
      step_outer = step;
      step_place = 0;
    } else {
      const unsigned parts = static_cast<unsigned>(plan.parts);
      channel = block / parts;
      part = block % parts;
      item = thread;
      line_end = static_cast<int>(shape.spatial / width);
      const int64_t begin = part * plan.share;
      first_outer = begin / line_packs;
      place = static_cast<int>(begin - first_outer * line_packs) + thread % line_packs;
      first_outer += sample;
      outer = thread / line_packs;
      if (place >= line_packs) {
        place -= line_packs;
        ++outer;
      }
      step_outer = step / line_packs;
      step_place = step % line_packs;
    }
    const int64_t left = plan.items - part * plan.share;
    items = static_cast<int>(left < plan.share ? left : plan.share);
  }

  __device__ __forceinline__ bool has_channels() const { return !rows || line_end != 0; }

  // Whether this thread has a pack here.
  __device__ __forceinline__ bool valid() const { return item < items && (rows ? line_end != 0 : place < line_end); }

  __device__ __forceinline__ void advance() {
    item += step;
    outer += step_outer;
    if constexpr (!rows) {
      place += step_place;
      if (place >= line_packs) {
        place -= line_packs;
        ++outer;
      }
    }
  }

  // Before the way is gone again: without it the compiler keeps all places from the first time.
  __device__ __forceinline__ void forget_places() {
    const auto hide = [](int& value) {
      uint32_t hidden = static_cast<uint32_t>(value);
      forget(hidden);
      value = static_cast<int>(hidden);
    };
    hide(item);
    if constexpr (!rows) {
      hide(outer);
      hide(place);
    } else {
      outer = item;
    }
  }

  // Of the pack: its first element in its line, its line, and its place in a tensor.
  __device__ __forceinline__ int64_t element() const { return static_cast<int64_t>(place) * width; }
  __device__ __forceinline__ int64_t line(const ChannelShape& shape) const {
    return rows ? first_outer + outer : (first_outer + outer) * shape.channels + channel;
  }
  template <class Element>
  __device__ __forceinline__ Element* at(Element* tensor, const ChannelShape& shape, int64_t stride) const {
    return tensor + first_outer * stride + (rows ? 0 : channel * shape.spatial) + outer * stride + element();
  }

  // Where the statistics of a channel are.
  __device__ __forceinline__ int64_t statistic(const GroupShape& group, int64_t of_channel) const {
    if constexpr (apart) {
      return sample * group.groups + static_cast<unsigned>(of_channel) / static_cast<unsigned>(group.channels);
    }
    return of_channel;
  }

  // Where a part leaves what it knows of a channel, and how many such places there are: side by side lie the channels
  // of a group, then its parts.
  __device__ __forceinline__ int64_t partial(const ChannelShape& shape, const StreamPlan& plan, const GroupShape& group,
                                             int64_t of_channel) const {
    if constexpr (apart) {
      const int64_t index = statistic(group, of_channel);
      return (index * plan.parts + part - index + sample * group.groups) * group.channels + of_channel;
    }
    return part * shape.channels + of_channel;
  }
  __device__ __forceinline__ int64_t partials(const ChannelShape& shape, const StreamPlan& plan) const {
    return plan.parts * shape.channels * (apart ? shape.samples : 1);
  }
};

// --- what a thread knows of its channels -----------------------------------------------------------------------------

template <int channels>
struct ChannelMoments {
  float count;  // of each
  float mean[channels];
  float squares[channels];
};

template <int channels>
struct ChannelSums {
  float plain[channels];       // of dz
  float projection[channels];  // of dz * xhat
};

template <int channels>
__device__ __forceinline__ ChannelMoments<channels> together(const ChannelMoments<channels>& left,
                                                             const ChannelMoments<channels>& right) {
  ChannelMoments<channels> both;
  both.count = left.count + right.count;
  const float share = mean_of(right.count, both.count);
#pragma unroll
  for (int index = 0; index < channels; ++index) {
    const float difference = right.mean[index] - left.mean[index];
    both.mean[index] = left.mean[index] + difference * share;
    both.squares[index] = left.squares[index] + right.squares[index] + difference * difference * left.count * share;
  }
  return both;
}

template <int channels>
__device__ __forceinline__ ChannelSums<channels> together(const ChannelSums<channels>& left,
                                                          const ChannelSums<channels>& right) {
  ChannelSums<channels> both;
#pragma unroll
  for (int index = 0; index < channels; ++index) {
    both.plain[index] = left.plain[index] + right.plain[index];
    both.projection[index] = left.projection[index] + right.projection[index];
  }
  return both;
}

// --- over the threads of a block -------------------------------------------------------------------------------------

// Rows: what half of the threads know, word by word, neighbouring threads side by side.
template <class Value>
struct StripExchange {
  static constexpr int words = static_cast<int>(sizeof(Value) / sizeof(float));
  float table[words][stream_threads / 2];

  __device__ __forceinline__ void put(int thread, const Value& value) {
    float parts[words];
    memcpy(parts, &value, sizeof(value));
#pragma unroll
    for (int word = 0; word < words; ++word) table[word][thread] = parts[word];
  }

  __device__ __forceinline__ Value get(int thread) const {
    float parts[words];
#pragma unroll
    for (int word = 0; word < words; ++word) parts[word] = table[word][thread];
    Value value;
    memcpy(&value, parts, sizeof(value));
    return value;
  }
};

// A tree down the columns of the table of threads: its lower half hands over to the upper one. The first row of threads
// gets the result.
template <class Value>
__device__ __forceinline__ void over_strip(Value& value, const StreamPlan& plan, StripExchange<Value>& exchange) {
  const int thread = static_cast<int>(threadIdx.x);
  const int down = thread / plan.lanes;
  for (int active = step_of(plan, true); active > 1;) {
    const int half = (active + 1) / 2;
    if (down >= half && down < active) exchange.put(thread - half * plan.lanes, value);
    __syncthreads();
    if (down < active - half) value = together(value, exchange.get(thread));
    __syncthreads();
    active = half;
  }
}

// Planes: all threads of the block have the same channel; every thread gets the result.
__device__ __forceinline__ void over_block(ChannelMoments<1>& value, Exchange<Moments<float>>& exchange) {
  Moments<float> values[] = {over_lanes(Moments<float>{value.count, value.mean[0], value.squares[0]}, warp_lanes)};
  over_warps_and_blocks(values, Team(static_cast<int>(blockDim.x)), 1, exchange, 0);
  value = {values[0].count, {values[0].mean}, {values[0].squares}};
}

__device__ __forceinline__ void over_block(ChannelSums<1>& value, Exchange<Sums>& exchange) {
  Sums values[] = {over_lanes(Sums{value.projection[0], value.plain[0]}, warp_lanes)};
  over_warps_and_blocks(values, Team(static_cast<int>(blockDim.x)), 1, exchange, 0);
  value = {{values[0].plain}, {values[0].projection}};
}

}  // namespace fastreg::cuda
