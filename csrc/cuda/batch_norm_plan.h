// How the streaming kernels of batch norm are laid out on a GPU: pure functions of the problem and the device, testable
// without either.
//
// A channel is cut into as many parts as it takes to fill the machine: with 64 channels, a block each would leave half
// of an H100 without work. A block takes one part of one channel (planes) or of a strip of neighbouring channels
// (rows). What parts add up to is merged in the order of their index, in whatever order they ended.

#pragma once

#include "layer_norm_plan.h"

namespace fastreg::cuda {

// A tensor of (samples, channels, spatial), as in batch_norm.cuh.
struct ChannelProblem {
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int element_size;
  bool rows;  // the family; else planes
  bool wide;  // every pointer, stride and line of every tensor allows packs of 16 bytes

  constexpr int width() const { return wide ? 16 / element_size : 1; }
  constexpr int64_t lines() const { return rows ? samples * spatial : samples * channels; }
  constexpr int64_t line_elements() const { return rows ? channels : spatial; }
  constexpr int64_t elements() const { return samples * channels * spatial; }
};

inline constexpr int stream_threads = 256;
inline constexpr int strip_packs = 32;               // a strip's most, so that a warp reads 512 bytes of a row
inline constexpr int blocks_per_multiprocessor = 8;  // two waves or more: one fills the gaps that the other leaves

// Threads count in 32 bits the items of a part, and the packs of a line.
inline constexpr int64_t most_items = int64_t{1} << 30;

// Packs of a tensor that a thread has on their way at once: with 500 to 1,000 threads a multiprocessor 32 KB and more.
// Backward reads two or three tensors.
FASTREG_INLINE constexpr int stream_forward_packs(int width) { return width == 1 ? 8 : 4; }
FASTREG_INLINE constexpr int stream_backward_packs(int width) { return width == 1 ? 4 : 2; }

// Bounds the kernels are compiled for: 64 registers a thread for one-element packs, 80 for packs of 16 bytes, 128 where
// a thread keeps the scales and sums of 8 channels.
FASTREG_INLINE constexpr int stream_minimum_blocks(int width, bool rows) {
  if (width == 1) return 4;
  return rows && width == 8 ? 2 : 3;
}

// Items are what a thread takes in one step: packs of a channel (planes), rows (rows).
struct StreamPlan {
  int threads;
  int lanes;       // rows: threads side by side, each with one pack of the row; planes: all of them
  int line_packs;  // of a line; with whole_bytes more than there are, so that each byte's lanes are neighbours
  int64_t across;  // channels, or strips
  int64_t items;   // of a channel
  int64_t parts;   // blocks that share a channel or strip
  int64_t share;   // items of a part; the last may have fewer, none has none
  int64_t blocks;
};

// How many items a block takes at a time: as many as it has threads one below the other.
FASTREG_INLINE constexpr int step_of(const StreamPlan& plan, bool rows) {
  return rows ? plan.threads / plan.lanes : plan.threads;
}

// `packs` on their way at once in each thread. `whole_bytes`: sign bits are stored.
constexpr StreamPlan stream_plan(const ChannelProblem& problem, const DeviceTraits& device, int packs,
                                 bool whole_bytes) {
  const int width = problem.width();
  const int byte_lanes = whole_bytes && width < 8 ? 8 / width : 1;
  StreamPlan plan{stream_threads, stream_threads, 0, 0, 0, 0, 0, 0};
  plan.line_packs = static_cast<int>(divide_up(problem.line_elements() / width, byte_lanes) * byte_lanes);
  if (problem.rows) {
    plan.across = divide_up(plan.line_packs, strip_packs);
    plan.lanes = static_cast<int>(divide_up(divide_up(plan.line_packs, plan.across), byte_lanes) * byte_lanes);
    plan.across = divide_up(plan.line_packs, plan.lanes);
    plan.items = problem.lines();
  } else {
    plan.across = problem.channels;
    plan.items = problem.samples * plan.line_packs;
    // Short channels get short blocks, of which more run at once.
    plan.threads = 32;
    while (plan.threads < stream_threads && int64_t{plan.threads} * packs < plan.items) plan.threads *= 2;
    plan.lanes = plan.threads;
  }

  // Parts of at least one full step, unless multiprocessors would have no work.
  const int64_t step = step_of(plan, problem.rows);
  const int64_t wanted = divide_up(int64_t{blocks_per_multiprocessor} * device.multiprocessors, plan.across);
  plan.parts = smaller(wanted, divide_up(plan.items, step * packs));
  if (plan.parts * plan.across < device.multiprocessors) {
    plan.parts = smaller(divide_up(device.multiprocessors, plan.across), divide_up(plan.items, step));
  }
  plan.parts = larger(plan.parts, divide_up(plan.items, most_items));
  plan.share = divide_up(divide_up(plan.items, plan.parts), byte_lanes) * byte_lanes;
  plan.parts = divide_up(plan.items, plan.share);
  plan.blocks = plan.across * plan.parts;
  return plan;
}

// The merge of parts: a block has a few channels, and many threads for each.
inline constexpr int finish_channels = 8;  // 32 bytes of partial results
inline constexpr int finish_threads = 256;
constexpr int64_t finish_blocks(int64_t channels) { return divide_up(channels, finish_channels); }

}  // namespace fastreg::cuda
