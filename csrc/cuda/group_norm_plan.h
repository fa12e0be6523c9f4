// How group norm is laid out on a GPU: pure functions of the problem and the device, testable without either.
//
// A slab is what belongs together and may stay on chip for as long as it takes to read, reduce and write it:
//
//   planes   a sample's group: its channels' planes, one after the other in memory. To the plan it is a channel of
//            batch norm, with the group's channels in the place of samples: a block, a cluster or several blocks that
//            run at once hold it (batch_norm_resident_plan.h). Small slabs have a warp each, several in a block.
//   rows     a sample: whole rows, all groups at once. One block holds all of them, or blocks that run at once share
//            them, exchange what they know of each group through global memory, and meet at a counter.
//
// What is too large, or lies irregularly, streams: partial statistics of each channel and part of a sample, merged by a
// small kernel, then the output (batch_norm_plan.h); backward does the same with sums.
//
// What fits is computed, what is faster is not: the thresholds are reasoned, not tuned by measurements.

#pragma once

#include "batch_norm_plan.h"
#include "batch_norm_resident_plan.h"

namespace fastreg::cuda {

struct GroupProblem {
  bool rows;  // else planes
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t groups;
  int element_size;
  int tensors;   // that are held: input; with grad_output in backward
  bool regular;  // as in ResidentProblem
  int grain;

  constexpr int width() const { return 16 / element_size; }
  constexpr int64_t group_channels() const { return channels / groups; }
};

struct GroupPlan {
  ResidentPlan resident;
  int slab_threads;  // that share a slab: 32, or all of the block
  int lanes;         // planes: threads side by side, all with the same channel; rows: chunks of a row
  int run;           // planes: chunks that such lanes take one after the other
  bool whole;        // planes: runs are whole planes; else they go on from plane to plane
  bool aligned;      // planes: whole chunks, all of them at multiples of 16 bytes
  bool twice;        // rows: blocks merge some groups each and exchange the results, rather than merge all groups each
  int64_t workspace_bytes;

  constexpr int64_t slabs_at_once() const { return resident.threads / slab_threads; }
};

inline constexpr GroupPlan no_group_plan{not_resident, 0, 0, 0, false, false, false, 0};

// --- planes ----------------------------------------------------------------------------------------------------------

// Planes of up to so many chunks belong to few lanes, or a warp, as a whole; longer ones are cut anywhere.
inline constexpr int64_t whole_plane_chunks = 64;

// A slab of up to so many chunks has one warp: eight a lane.
inline constexpr int64_t warp_slab_chunks = 256;

// The most lanes of which three quarters and more have work.
constexpr int plane_lanes(int64_t columns) {
  int lanes = 32;
  while (divide_up(columns, lanes) * lanes * 3 > columns * 4) lanes /= 2;
  return lanes;
}

constexpr ResidentProblem group_slab(const GroupProblem& problem) {
  ResidentProblem slab{false,         problem.group_channels(), problem.samples * problem.groups,
                       problem.spatial, problem.element_size,   problem.tensors,
                       false,         problem.regular,          problem.grain,
                       1};
  const int64_t columns = plane_chunks(slab);
  if (columns <= whole_plane_chunks) slab.step = columns;
  return slab;
}

// A warp a slab, several in a block where there are enough of them.
constexpr ResidentPlan warps_plan(const ResidentProblem& slab, const DeviceTraits& device) {
  const int64_t columns = plane_chunks(slab);
  const int64_t share = slab.samples * columns;
  const int64_t slab_bytes = share * plane_chunk_bytes(slab);
  int warps = 8;
  while (warps > 1 && divide_up(slab.channels, warps) < 2 * device.multiprocessors) warps /= 2;
  const int64_t bytes = slab_bytes * warps + resident_planes_static_bytes;
  const int64_t at_once = smaller(smaller(planes_most_threads(slab) / (32 * warps), 16),
                                  device.shared_bytes_per_multiprocessor / bytes);
  return {ResidentKind::block,
          1,
          32 * warps,
          smaller(divide_up(slab.channels, warps), at_once * device.multiprocessors),
          slab.channels,
          static_cast<int>(columns),
          share,
          static_cast<int>(slab_bytes * warps),
          1};
}

constexpr GroupPlan group_planes_plan(const GroupProblem& problem, const DeviceTraits& device) {
  const ResidentProblem slab = group_slab(problem);
  const int64_t columns = plane_chunks(slab);
  const bool by_warps = slab.samples * columns <= warp_slab_chunks;
  GroupPlan plan = no_group_plan;
  plan.resident = by_warps ? warps_plan(slab, device) : planes_plan(slab, device);
  if (plan.resident.kind == ResidentKind::none) {
    return no_group_plan;
  }
  plan.slab_threads = by_warps ? 32 : plan.resident.threads;
  plan.whole = columns <= whole_plane_chunks;
  plan.aligned = problem.grain == 16;
  if (plan.whole) {
    plan.lanes = plane_lanes(columns);
    plan.run = static_cast<int>(columns);
  } else {
    plan.lanes = 32;
    plan.run = static_cast<int>(divide_up(plan.resident.share, plan.slab_threads / 32));
  }
  plan.workspace_bytes = plan.resident.workspace_bytes();
  return plan;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// The most threads of a block, which are a row's most chunks too, and what a multiprocessor runs at once: the kernels
// are compiled for 128 registers each, and for 168 backward.
inline constexpr int group_rows_threads = 512;
inline constexpr int group_rows_backward_threads = 384;

constexpr int group_rows_most_threads(const GroupProblem& problem) {
  return problem.tensors == 1 ? group_rows_threads : group_rows_backward_threads;
}

// What each thread knows of its channels, and each block of its groups: two floats each.
constexpr int64_t group_rows_table_bytes(int threads, int width, int64_t groups) {
  return 8 * (int64_t{threads} * width + groups);
}

// About eight chunks a thread.
constexpr int group_rows_block(int64_t share_chunks, int64_t row_chunks, int most) {
  int threads = 64;
  while (threads < most && (threads < row_chunks || threads * 8 < share_chunks)) threads *= 2;
  return threads < most ? threads : most;
}

// Blocks write and read three floats a group, twice, for each sample: half of what they hold at most.
constexpr bool worth_exchanging(int64_t groups, int64_t share_bytes) { return 2 * 36 * groups <= share_bytes; }

// All of a sample in one block.
constexpr ResidentPlan whole_samples_plan(const GroupProblem& problem, const DeviceTraits& device) {
  const int64_t chunks = problem.channels / problem.width();
  const int most = group_rows_most_threads(problem);
  const int threads = group_rows_block(problem.spatial * chunks, chunks, most);
  const int64_t bytes = problem.spatial * chunks * 16 * problem.tensors +
                        group_rows_table_bytes(threads, problem.width(), problem.groups);
  const int64_t with_static = bytes + resident_planes_static_bytes;
  if (with_static > device.shared_bytes_per_block) {
    return not_resident;
  }
  const int64_t at_once =
      smaller(most / threads, device.shared_bytes_per_multiprocessor / with_static) *
      device.multiprocessors;
  return {ResidentKind::block,
          1,
          threads,
          smaller(problem.samples, larger(at_once, 1)),
          problem.samples,
          static_cast<int>(chunks),
          problem.spatial,
          static_cast<int>(bytes),
          static_cast<int>(problem.groups)};
}

constexpr ResidentPlan shared_samples_plan(const GroupProblem& problem, const DeviceTraits& device) {
  const int64_t chunks = problem.channels / problem.width();
  const int most = group_rows_most_threads(problem);
  const int64_t table = group_rows_table_bytes(most, problem.width(), problem.groups);
  if (table + resident_planes_static_bytes >= device.shared_bytes_per_block) {
    return not_resident;
  }
  const SlabShape sample{problem.samples,
                         problem.spatial,
                         1,
                         chunks,
                         static_cast<int>(chunks),
                         chunks * 16 * problem.tensors,
                         static_cast<int>(table) + resident_planes_static_bytes};
  const ResidentProblem held{true, problem.samples, problem.channels, problem.spatial, problem.element_size,
                             problem.tensors, false, problem.regular, 16};
  ResidentPlan plan = shared_by_blocks(sample, held, device);
  if (plan.kind == ResidentKind::none ||
      (plan.kind == ResidentKind::cooperative && !worth_exchanging(problem.groups, plan.shared_bytes))) {
    return not_resident;
  }
  plan.threads = group_rows_block(plan.share * chunks, chunks, most);
  plan.shared_bytes += static_cast<int>(group_rows_table_bytes(plan.threads, problem.width(), problem.groups));
  plan.slab_channels = static_cast<int>(problem.groups);
  return plan;
}

constexpr GroupPlan group_rows_plan(const GroupProblem& problem, const DeviceTraits& device) {
  constexpr int64_t one_block_chunks = 512;  // of a sample that is too small to be shared
  constexpr int64_t merged_by_each = 1024;   // values that a block merges without help
  const int64_t chunks = problem.channels / problem.width();
  if (chunks > group_rows_most_threads(problem)) {
    return no_group_plan;
  }
  GroupPlan plan = no_group_plan;
  const ResidentPlan whole = whole_samples_plan(problem, device);
  const bool many = 3 * problem.samples >= 2 * device.multiprocessors;
  plan.resident = whole;
  if (whole.kind == ResidentKind::none || (!many && problem.spatial * chunks > one_block_chunks)) {
    plan.resident = shared_samples_plan(problem, device);
    const int64_t share_bytes = plan.resident.share * chunks * 16 * problem.tensors;
    if (plan.resident.kind == ResidentKind::none || !fills(plan.resident.blocks(), share_bytes, device)) {
      return no_group_plan;
    }
  }
  plan.slab_threads = plan.resident.threads;
  plan.lanes = static_cast<int>(chunks);
  plan.run = 0;
  plan.twice = plan.resident.slab_blocks * problem.groups > merged_by_each;
  // Two more sets of three floats a sample under way and group: what is exchanged.
  const bool exchanges = plan.resident.kind == ResidentKind::cooperative;
  plan.workspace_bytes =
      plan.resident.workspace_bytes() + (exchanges ? int64_t{2} * 3 * 4 * plan.resident.groups * problem.groups : 0);
  return plan;
}

// --- both ------------------------------------------------------------------------------------------------------------

// Kind none: nothing is kept on chip.
constexpr GroupPlan group_plan(const GroupProblem& problem, const DeviceTraits& device) {
  constexpr int64_t most_slabs = int64_t{1} << 30;
  if (!problem.regular || problem.samples * problem.channels * problem.spatial == 0 ||
      problem.samples * problem.groups > most_slabs) {
    return no_group_plan;
  }
  return problem.rows ? group_rows_plan(problem, device) : group_planes_plan(problem, device);
}

// The streaming plan of one sample; a launch has its blocks for each.
constexpr StreamPlan group_stream_plan(const ChannelProblem& sample, int64_t samples, const DeviceTraits& device,
                                       int packs) {
  DeviceTraits part = device;
  part.multiprocessors = static_cast<int>(divide_up(device.multiprocessors, samples));
  return stream_plan(sample, part, packs, false);
}

}  // namespace fastreg::cuda
