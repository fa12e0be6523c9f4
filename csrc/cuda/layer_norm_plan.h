// How layer norm and RMS norm are laid out on a GPU: pure functions of the problem and the device, testable without
// either.
//
// A row should stay in registers, 16 bytes a load, with enough bytes on their way on every multiprocessor to cover the
// latency of memory (32 KB and more), and with several blocks on each, so that one block's barrier is another's work.
// Extents are in packs: 16 bytes, or one element where the tensors are not aligned to 16 bytes (width 1).

#pragma once

#include <cstdint>

#include "../math.h"

namespace fastreg::cuda {

struct DeviceTraits {
  int architecture;  // 90 for compute capability 9.0
  int multiprocessors;
  int shared_bytes_per_block;
  int shared_bytes_per_multiprocessor;
};

struct Problem {
  int64_t rows;
  int columns;
  int element_size;  // of the activations
  bool centred;      // layer norm; else RMS norm
  bool wide;         // every pointer and stride allows packs of 16 bytes
  bool fused = false;       // with dropout + residual (dropout_add_layer_norm_plan.h)
  bool third_sums = false;  // of these, backward: layer_scale's gradient beside those of weight and bias

  constexpr int width() const { return wide ? 16 / element_size : 1; }
  constexpr int packs() const { return columns / width(); }
};

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

constexpr int64_t larger(int64_t left, int64_t right) { return left < right ? right : left; }

// Threads for so many packs a thread: a power of two within a warp, else whole warps.
constexpr int team_threads(int64_t needed) {
  if (needed > 32) {
    return static_cast<int>(divide_up(needed, 32) * 32);
  }
  int threads = 1;
  while (threads < needed) threads *= 2;
  return threads;
}

// The blocks that a cluster may have: 1, 2, 4 or 8 from sm_90 on.
constexpr int largest_cluster(const DeviceTraits& device) { return device.architecture >= 90 ? 8 : 1; }

// Twice as many blocks a row as it needs, as long as there are multiprocessors without work and the slices stay long.
constexpr int spread_over_device(int cluster, const Problem& problem, const DeviceTraits& device) {
  constexpr int shortest_slice = 4096;  // bytes
  const int64_t row_bytes = static_cast<int64_t>(problem.columns) * problem.element_size;
  while (cluster < largest_cluster(device) && problem.rows * cluster * 2 <= device.multiprocessors &&
         row_bytes / (cluster * 2) >= shortest_slice) {
    cluster *= 2;
  }
  return cluster;
}

// --- kernels for rows beyond the chip --------------------------------------------------------------------------------

// Compiled for a block a multiprocessor: left to itself the compiler aims at more of them, and spills a few registers.
inline constexpr int looped_threads = 512;
inline constexpr int looped_packs = 4;  // on their way at once in each thread

// --- forward ---------------------------------------------------------------------------------------------------------

struct ForwardPlan {
  bool looped;
  int width;
  int packs;  // a thread and row
  int rows;   // a thread
  int threads_per_row;
  int threads;
  int cluster;
  int64_t blocks;
};

// Bounds the kernels are compiled for: 64 to 72 registers a thread for up to 4 packs, so that some 1,000 threads run on
// a multiprocessor; the longest rows trade threads for registers.
constexpr int forward_maximum_threads(int width, int packs) {
  if (packs == 32 || packs * width == 64) return 512;
  if (packs == 8) return 1024;
  return width > 1 && packs > 1 ? 512 : 128;
}
constexpr int forward_minimum_blocks(int width, int packs) {
  return packs >= 8 ? 1 : forward_maximum_threads(width, packs) == 512 ? 2 : 7;
}

// Whether teams of several warps use these kernels as well.
FASTREG_INLINE constexpr bool forward_beyond_a_warp(int width, int packs) { return packs > (width == 1 ? 4 : 1); }

// Rows a thread keeps at once: short ones in twos and fours.
constexpr int forward_rows(int width, int packs) {
  return width == 1 ? (packs == 4 ? 2 : 1) : packs < 4 ? 4 / packs : 1;
}

constexpr ForwardPlan forward_plan(const Problem& problem, const DeviceTraits& device) {
  const int width = problem.width();
  const int64_t packs = problem.packs();
  ForwardPlan plan{false, width, 0, 1, 0, 0, 1, 0};

  // One team, a warp or part of one, holds the row: no barrier at all.
  const int most = width == 1 ? 32 : 8;
  if (packs <= 32 * most) {
    if (width == 1) {
      plan.packs = packs <= 32 * 4 ? 4 : 32;
    } else {
      plan.packs = packs <= 32 ? 1 : packs <= 64 ? 2 : packs <= 128 ? 4 : 8;
    }
    plan.rows = forward_rows(width, plan.packs);
    plan.threads_per_row = team_threads(smaller(packs, 32));
    plan.threads = 128;
    plan.blocks = divide_up(problem.rows, plan.threads / plan.threads_per_row * plan.rows);
    return plan;
  }

  // One block, or a cluster of blocks, holds the row. Slices of up to 32 KB leave room for two blocks of 512 threads.
  const int preferred = width == 1 ? 32 : 4;
  const int64_t preferred_packs = static_cast<int64_t>(preferred) * 512;
  while (plan.cluster < largest_cluster(device) && divide_up(packs, plan.cluster) > preferred_packs) plan.cluster *= 2;
  plan.cluster = spread_over_device(plan.cluster, problem, device);
  int64_t share = divide_up(packs, plan.cluster);
  plan.packs = share <= preferred_packs ? preferred : most;

  // Rows of several blocks find little of their weights in the L1; where there are many rows, two at once share them.
  const int wider = share > preferred_packs / 2 ? plan.cluster * 2 : plan.cluster;
  if (width > 1 && plan.cluster > 1 && share <= preferred_packs && wider <= largest_cluster(device) &&
      problem.rows * wider >= int64_t{8} * device.multiprocessors) {
    plan.cluster = wider;
    plan.packs = 2;
    plan.rows = forward_rows(width, 2);
    share = divide_up(packs, plan.cluster);
  }
  plan.threads_per_row = team_threads(divide_up(share, plan.packs));
  if (plan.threads_per_row > forward_maximum_threads(width, plan.packs)) {
    plan.looped = true;
    plan.threads_per_row = looped_threads;
  }
  plan.threads = plan.threads_per_row;
  plan.blocks = divide_up(problem.rows, plan.rows) * plan.cluster;
  return plan;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Where a thread keeps its sums for the gradients of weight and bias while it goes from row to row.
enum class BackwardKind { sums_in_registers, sums_in_shared, looped };

struct BackwardPlan {
  BackwardKind kind;
  int width;
  int packs;  // a thread and row
  int threads_per_row;
  int threads;
  int cluster;
  int64_t blocks;
  int shared_bytes;
  int64_t partials;  // rows of partial sums that the gradients of the parameters come from
};

// The kernels are compiled for 512 threads a multiprocessor: 128 registers each for row, weights and sums. What is on
// its way from memory is in shared memory, so that few threads suffice.
inline constexpr int backward_threads = 512;
inline constexpr int backward_shared_threads =
    384;  // 168 registers: with sums in shared memory a thread holds twice as much
inline constexpr int backward_barrier_threads = 256;  // two such blocks: one works while the other waits at its barrier
inline constexpr int columns_threads = 128;
inline constexpr int columns_rows = 4;  // on their way at once in each thread

// Fused kernels have more in registers, and in both kinds 384 threads of 168.
constexpr int backward_threads_of(const Problem& problem, bool sums_in_shared) {
  return sums_in_shared || problem.fused ? backward_shared_threads : backward_threads;
}
constexpr int backward_barrier_threads_of(const Problem& problem) {
  return problem.fused ? backward_shared_threads / 2 : backward_barrier_threads;
}

// Elements a thread holds of a row: 16 with two sums each in registers, 32 with the sums in shared memory. Fused
// kernels of one-element packs have much to do for each, and hold 8.
FASTREG_INLINE constexpr int backward_packs(int width, bool sums_in_shared, bool fused) {
  return (sums_in_shared ? 32 : fused && width == 1 ? 8 : 16) / width;
}

// Rows that are on their way into shared memory while one is worked on: with 512 threads, 96 KB of 16-bit or 128 KB of
// fp32 elements a multiprocessor. One-element packs are too small to be copied asynchronously; beside sums in shared
// memory there is room for one row of 16-bit elements.
FASTREG_INLINE constexpr int backward_stages(int element_size, int width, bool sums_in_shared) {
  if (width == 1) return 0;
  return element_size == 2 ? (sums_in_shared ? 1 : 3) : (sums_in_shared ? 0 : 2);
}

FASTREG_INLINE constexpr int64_t backward_ring_bytes(int element_size, int width, bool sums_in_shared, int threads) {
  // One-element packs, of which fused kernels hold fewer, have no ring.
  return int64_t{2} * 16 * backward_stages(element_size, width, sums_in_shared) *
         backward_packs(width, sums_in_shared, false) * threads;
}

// Gradients of the parameters for rows beyond the chip: a thread owns the columns of one pack and goes down the rows.
constexpr int64_t column_blocks(const Problem& problem) { return divide_up(problem.packs(), columns_threads); }

constexpr BackwardPlan backward_looped_plan(const Problem& problem, const DeviceTraits& device) {
  BackwardPlan plan{BackwardKind::looped, problem.width(), looped_packs, looped_threads, looped_threads, 1, 0, 0, 0};
  plan.cluster = spread_over_device(largest_cluster(device), problem, device);
  plan.blocks = problem.rows * plan.cluster;
  const int64_t wanted = divide_up(int64_t{8} * device.multiprocessors, column_blocks(problem));
  plan.partials = smaller(wanted, divide_up(problem.rows, columns_rows));
  return plan;
}

// Shared memory of one block, or a number beyond any device where the row does not fit this kind and cluster.
constexpr int64_t backward_shared_bytes(const Problem& problem, bool sums_in_shared, int cluster, int threads_per_row,
                                        int teams) {
  const int width = problem.width();
  const int threads = threads_per_row * teams;
  const int64_t sums = int64_t{4} * backward_packs(width, sums_in_shared, problem.fused) * width * threads;
  const int64_t third = problem.third_sums ? sums : 0;
  const int64_t ring = backward_ring_bytes(problem.element_size, width, sums_in_shared, threads);
  if (sums_in_shared) {
    return third + ring + (problem.centred ? 2 : 1) * sums;
  }
  // After the last row the ring's place is where the teams' sums are added up, one parameter at a time.
  const int copies = threads_per_row < 32 ? static_cast<int>(divide_up(threads, 32)) : teams;
  return third + (cluster > 1 || copies == 1 ? ring : larger(ring, int64_t{4} * copies * problem.columns));
}

// Fills in threads and cluster for a kind; false where the row does not fit.
constexpr bool fit_backward(BackwardPlan& plan, const Problem& problem, const DeviceTraits& device) {
  const bool sums_in_shared = plan.kind == BackwardKind::sums_in_shared;
  plan.packs = backward_packs(plan.width, sums_in_shared, problem.fused);
  for (plan.cluster = 1; plan.cluster <= largest_cluster(device); plan.cluster *= 2) {
    const int64_t share = divide_up(problem.packs(), plan.cluster);
    const int64_t needed = divide_up(share, plan.packs);
    if (needed <= backward_threads_of(problem, sums_in_shared) &&
        backward_shared_bytes(problem, sums_in_shared, plan.cluster, team_threads(needed), 1) <=
            device.shared_bytes_per_block) {
      plan.cluster = spread_over_device(plan.cluster, problem, device);
      plan.threads_per_row = team_threads(divide_up(divide_up(problem.packs(), plan.cluster), plan.packs));
      if (plan.cluster > 1 && plan.threads_per_row < 32) plan.threads_per_row = 32;
      return true;
    }
  }
  return false;
}

constexpr BackwardPlan backward_plan(const Problem& problem, const DeviceTraits& device) {
  BackwardPlan plan{BackwardKind::sums_in_registers, problem.width(), 0, 0, 0, 1, 0, 0, 0};
  if (!fit_backward(plan, problem, device)) {
    plan.kind = BackwardKind::sums_in_shared;
    if (!problem.wide || !fit_backward(plan, problem, device)) {
      return backward_looped_plan(problem, device);
    }
  }
  const bool sums_in_shared = plan.kind == BackwardKind::sums_in_shared;

  // Several teams a block, all at the same barrier if they have one; fewer where there are multiprocessors without
  // work.
  int64_t teams = 1;
  if (!sums_in_shared && plan.cluster == 1) {
    const int target = plan.threads_per_row <= 32 ? backward_threads_of(problem, sums_in_shared)
                                                  : backward_barrier_threads_of(problem);
    teams = larger(1, target / plan.threads_per_row);
    teams = larger(smaller(teams, problem.rows / device.multiprocessors), 1);
    teams = larger(teams, 32 / smaller(plan.threads_per_row, 32));
    if (plan.threads_per_row < 32) teams = teams * plan.threads_per_row / 32 * 32 / plan.threads_per_row;
    while (teams > 1 && backward_shared_bytes(problem, false, 1, plan.threads_per_row, static_cast<int>(teams)) >
                            device.shared_bytes_per_block) {
      teams /= 2;
    }
  }
  plan.threads = static_cast<int>(plan.threads_per_row * teams);
  plan.shared_bytes = static_cast<int>(
      backward_shared_bytes(problem, sums_in_shared, plan.cluster, plan.threads_per_row, static_cast<int>(teams)));

  // A persistent grid: as many blocks as run at once, unless there are fewer rows than that.
  const int64_t by_threads = backward_threads_of(problem, sums_in_shared) / plan.threads;
  const int64_t by_shared = device.shared_bytes_per_multiprocessor / (plan.shared_bytes + 1024 + 1024);
  const int64_t resident = sums_in_shared ? 1 : larger(1, smaller(by_threads, by_shared));
  const int64_t clusters = larger(1, resident * device.multiprocessors / plan.cluster);
  plan.partials = smaller(clusters, divide_up(problem.rows, teams));
  plan.blocks = plan.partials * plan.cluster;
  return plan;
}

}  // namespace fastreg::cuda
