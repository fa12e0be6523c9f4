// Which batch norms in training can keep a channel's elements on the chip, and how they are laid out there: pure
// functions of the problem and the device, testable without either.
//
// Channels are independent, so that only a slab has to fit into shared memory: what all samples have of one channel
// (planes), or of a strip of neighbouring channels (rows). A slab belongs to a group of blocks that share it equally,
// hold their shares for as long as it takes to read, reduce and write them, and exchange a few floats a channel:
//
//   block        one block, no exchange
//   cluster      2, 4 or 8 blocks, through each other's shared memory (sm_90 and later)
//   cooperative  any number of blocks that run at once, through global memory and a barrier of the group: rows always;
//                planes that no cluster holds, or where there are no clusters
//   none         too large, or too few blocks to fill the machine: the kernels that read twice are better
//
// A group goes from slab to slab, and each piece of the next one is on its way as soon as the place that it goes to has
// been read for the last time: reads and writes overlap, though a block has room for one slab only.
//
// Extents are in chunks of 16 bytes. Planes of any size and alignment are cut at multiples of 16 bytes in memory, so
// that a plane's first and last chunk may belong to it in part only; rows have to be aligned.
//
// What fits is computed, what is faster is not: the thresholds are reasoned, not tuned by measurements.

#pragma once

#include <cstdint>

#include "layer_norm_plan.h"

namespace fastreg::cuda {

struct ResidentProblem {
  bool rows;         // else planes
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int element_size;
  int tensors;   // that are held: input; with grad_output in backward; and a residual that backward needs twice
  bool signs;    // whether forward keeps signs
  bool regular;  // every tensor is cut into chunks at the same elements; rows: at 16-byte boundaries
  int grain;     // planes: bytes, 16 at most, that the address of every plane is a multiple of
  int64_t step = 0;  // planes: chunks at whose multiples a share may begin, if that is known; else plane_step()

  constexpr int width() const { return 16 / element_size; }
};

enum class ResidentKind { none, block, cluster, cooperative };

struct ResidentPlan {
  ResidentKind kind;
  int slab_blocks;  // that share a slab
  int threads;
  int64_t groups;  // of so many blocks; each takes every (groups)-th slab
  int64_t slabs;   // channels, or strips of them
  int columns;     // chunks of a strip's row; planes: of a plane
  int64_t share;   // of a block: chunks of planes, or rows of a strip
  int shared_bytes;
  int slab_channels;

  // Two sets of three floats a block and channel, and a counter a group.
  constexpr int64_t partials_bytes() const {
    return kind == ResidentKind::cooperative ? int64_t{2} * 3 * 4 * blocks() * slab_channels : 0;
  }
  constexpr int64_t workspace_bytes() const {
    return kind == ResidentKind::cooperative ? partials_bytes() + 4 * groups : 0;
  }
  constexpr int64_t blocks() const { return groups * slab_blocks; }
};

inline constexpr ResidentPlan not_resident{ResidentKind::none, 0, 0, 0, 0, 0, 0, 0, 0};

// Threads that a multiprocessor runs at once, in one block or more: the kernels are compiled for 64 registers each, for
// 128 backward and for rows, and for 168 where both come together.
inline constexpr int resident_planes_threads = 1024;
inline constexpr int resident_planes_backward_threads = 512;
inline constexpr int resident_rows_threads = 512;
inline constexpr int resident_rows_backward_threads = 384;

// Static shared memory, and the kilobyte that each block loses.
inline constexpr int resident_planes_static_bytes = 2 * 1024;
inline constexpr int resident_rows_static_bytes = 15 * 1024;

// A block that has so little to read is done when a second launch would begin, however few others there are.
inline constexpr int64_t resident_short_share = 32 * 1024;

// Whether so many blocks keep the memory busy. One multiprocessor can ask for about twice its part of the bandwidth,
// but nothing then hides the phases in which a block neither reads nor writes.
constexpr bool fills(int64_t blocks, int64_t share_bytes, const DeviceTraits& device) {
  return 3 * blocks >= 2 * device.multiprocessors || share_bytes <= resident_short_share;
}

// --- slabs that any number of blocks share ---------------------------------------------------------------------------

// What is cut into shares: items, each of some chunks and bytes of all tensors, in multiples of `step`.
struct SlabShape {
  int64_t slabs;
  int64_t items;
  int64_t step;
  int64_t item_chunks;
  int columns;
  int64_t item_bytes;
  int static_bytes;
};

// One block on each multiprocessor. In few rounds with few blocks a slab, or more of both: whichever leaves each block
// less to do, where a round costs as much as so many chunks.
constexpr ResidentPlan shared_by_blocks(const SlabShape& slab, const ResidentProblem& problem,
                                        const DeviceTraits& device) {
  constexpr int64_t chunks_a_round = 1024;
  constexpr int64_t shortest_share = 512;  // chunks
  const int64_t most = (device.shared_bytes_per_block - slab.static_bytes) / slab.item_bytes / slab.step * slab.step;
  const int64_t needed = most == 0 ? device.multiprocessors + 1 : divide_up(slab.items, most);
  if (needed > device.multiprocessors) {
    return not_resident;
  }
  const int64_t useful = larger(1, slab.items * slab.item_chunks / shortest_share);
  const int64_t fewest = divide_up(slab.slabs, device.multiprocessors / needed);
  ResidentPlan best = not_resident;
  int64_t least = 0;
  for (int64_t rounds = fewest; rounds <= smaller(fewest + 3, slab.slabs); ++rounds) {
    const int64_t groups = divide_up(slab.slabs, rounds);
    const int64_t wanted = larger(needed, smaller(device.multiprocessors / groups, useful));
    const int64_t share = divide_up(divide_up(slab.items, wanted), slab.step) * slab.step;
    const int64_t blocks = divide_up(slab.items, share);
    const int64_t work = rounds * (share * slab.item_chunks * problem.tensors + chunks_a_round);
    if (best.kind == ResidentKind::none || work < least) {
      least = work;
      best.kind = blocks == 1 ? ResidentKind::block : ResidentKind::cooperative;
      best.slab_blocks = static_cast<int>(blocks);
      best.groups = groups;
      best.slabs = slab.slabs;
      best.columns = slab.columns;
      best.share = share;
      best.shared_bytes = static_cast<int>(share * slab.item_bytes);
    }
  }
  return best;
}

// --- planes ----------------------------------------------------------------------------------------------------------

// Chunks that hold a plane wherever it begins.
constexpr int64_t plane_chunks(const ResidentProblem& problem) {
  return divide_up(problem.spatial * problem.element_size + 16 - problem.grain, 16);
}

constexpr int planes_most_threads(const ResidentProblem& problem) {
  return problem.tensors == 1 ? resident_planes_threads : resident_planes_backward_threads;
}

// About ten chunks a thread, whose copies are all on their way at once.
constexpr int planes_threads(int64_t share, int most) {
  return share >= 8192 && most >= 1024 ? 1024 : share >= 2048 ? 512 : share >= 512 ? 256 : 128;
}

constexpr int64_t plane_chunk_bytes(const ResidentProblem& problem) {
  return 16 * problem.tensors + (problem.signs ? 1 : 0);
}

// Chunks at whose multiples a share may begin: a byte of signs has bits of two chunks, but never of two planes.
constexpr int64_t plane_step(const ResidentProblem& problem) {
  if (problem.step != 0) {
    return problem.step;
  }
  const int64_t columns = plane_chunks(problem);
  return problem.grain == 16 && columns % 2 == 0 ? 2 : columns;
}

// One block a channel, or a cluster.
constexpr ResidentPlan clusters_plan(const ResidentProblem& problem, const DeviceTraits& device) {
  constexpr int64_t shortest_share = 256;  // chunks
  ResidentPlan plan = not_resident;
  const int64_t columns = plane_chunks(problem);
  const int64_t chunks = problem.samples * columns;
  const int64_t step = plane_step(problem);
  for (int blocks = 1; blocks <= largest_cluster(device); blocks *= 2) {
    const int64_t share = divide_up(divide_up(chunks, blocks), step) * step;
    const int64_t bytes = share * plane_chunk_bytes(problem);
    const bool all_have_some = (blocks - 1) * share < chunks;
    if (bytes + resident_planes_static_bytes > device.shared_bytes_per_block) continue;
    if (plan.kind != ResidentKind::none && (share < shortest_share || !all_have_some)) break;
    if (!all_have_some) break;
    const int most_threads = planes_most_threads(problem);
    const int threads = planes_threads(share, most_threads);
    const int64_t by_shared = device.shared_bytes_per_multiprocessor / (bytes + resident_planes_static_bytes);
    const int64_t at_once = smaller(most_threads / threads, by_shared) * device.multiprocessors;
    const int64_t groups = larger(1, smaller(problem.channels, at_once / blocks));
    if (at_once >= blocks) {
      plan = {blocks == 1 ? ResidentKind::block : ResidentKind::cluster,
              blocks,
              threads,
              groups,
              problem.channels,
              static_cast<int>(columns),
              share,
              static_cast<int>(bytes),
              1};
    }
    // Two blocks on each multiprocessor: one works while the other waits.
    if (groups * blocks >= 2 * device.multiprocessors) break;
  }
  return plan;
}

constexpr ResidentPlan planes_plan(const ResidentProblem& problem, const DeviceTraits& device) {
  ResidentPlan plan = clusters_plan(problem, device);
  if (plan.kind == ResidentKind::none || !fills(plan.blocks(), plan.share * 16 * problem.tensors, device)) {
    const int64_t columns = plane_chunks(problem);
    const SlabShape channel{problem.channels, problem.samples * columns, plane_step(problem), 1,
                            static_cast<int>(columns), plane_chunk_bytes(problem), resident_planes_static_bytes};
    plan = shared_by_blocks(channel, problem, device);
    plan.threads = planes_threads(plan.share, planes_most_threads(problem));
    plan.slab_channels = 1;
  }
  return fills(plan.blocks(), plan.share * 16 * problem.tensors, device) ? plan : not_resident;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// A warp reads so many rows at once, of a power of two of chunks each.
FASTREG_INLINE constexpr int strip_lanes(int columns) { return columns > 4 ? 8 : columns > 2 ? 4 : 2; }

constexpr int rows_threads(const ResidentProblem& problem, int64_t chunks) {
  const int most = problem.tensors == 1 ? resident_rows_threads : resident_rows_backward_threads;
  return chunks >= 2048 ? most : chunks >= 512 ? 256 : 128;
}

// Strips of up to so many chunks, as equal as sectors of 32 bytes allow.
constexpr ResidentPlan strips_plan(const ResidentProblem& problem, const DeviceTraits& device, int most_columns) {
  const int64_t chunks = problem.channels / problem.width();
  const int64_t even = divide_up(chunks, divide_up(chunks, most_columns));
  const int columns = static_cast<int>(chunks <= most_columns ? chunks : divide_up(even, 2) * 2);
  const SlabShape strip{divide_up(chunks, columns), problem.samples * problem.spatial, 1, columns, columns,
                        int64_t{16} * columns * problem.tensors, resident_rows_static_bytes};
  ResidentPlan plan = shared_by_blocks(strip, problem, device);
  plan.threads = rows_threads(problem, plan.share * columns);
  plan.slab_channels = columns * problem.width();
  return plan;
}

constexpr ResidentPlan rows_plan(const ResidentProblem& problem, const DeviceTraits& device) {
  // Strips of 128 bytes, whole lines, where they fit; 32 bytes, one sector, at least.
  for (int most_columns = 8; most_columns >= 2; most_columns /= 2) {
    const ResidentPlan plan = strips_plan(problem, device, most_columns);
    if (plan.kind != ResidentKind::none) {
      return fills(plan.blocks(), plan.share * plan.columns * 16 * problem.tensors, device) ? plan : not_resident;
    }
  }
  return not_resident;
}

// --- both ------------------------------------------------------------------------------------------------------------

constexpr ResidentPlan resident_plan(const ResidentProblem& problem, const DeviceTraits& device) {
  if (!problem.regular || problem.samples * problem.channels * problem.spatial == 0) {
    return not_resident;
  }
  return problem.rows ? rows_plan(problem, device) : planes_plan(problem, device);
}

}  // namespace fastreg::cuda
