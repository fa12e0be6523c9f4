// How dropout + residual + norm is laid out on a GPU: backward as the norms alone (layer_norm_plan.h), with fewer
// threads of more registers; forward as here.
//
// A forward kernel has two tensors on their way, so one number of packs a thread serves rows of all lengths: short ones
// take fewer threads, long ones clusters of blocks.

#pragma once

#include "layer_norm_plan.h"

namespace fastreg::cuda {

FASTREG_INLINE constexpr int fused_forward_packs(int width) { return width == 1 ? 8 : 4; }

// 80 registers a thread.
inline constexpr int fused_forward_threads = 384;
inline constexpr int fused_forward_blocks = 2;

constexpr ForwardPlan fused_forward_plan(const Problem& problem, const DeviceTraits& device) {
  const int width = problem.width();
  const int64_t packs = problem.packs();
  ForwardPlan plan{false, width, fused_forward_packs(width), 1, 0, 0, 1, 0};
  if (packs <= 32 * plan.packs) {
    plan.threads_per_row = team_threads(divide_up(packs, plan.packs));
    plan.threads = 128;
    plan.blocks = divide_up(problem.rows, plan.threads / plan.threads_per_row);
    return plan;
  }
  const int64_t most_packs = int64_t{fused_forward_threads} * plan.packs;
  while (plan.cluster < largest_cluster(device) && divide_up(packs, plan.cluster) > most_packs) plan.cluster *= 2;
  plan.cluster = spread_over_device(plan.cluster, problem, device);
  plan.threads_per_row = team_threads(divide_up(divide_up(packs, plan.cluster), plan.packs));
  if (plan.threads_per_row > fused_forward_threads) {
    plan.looped = true;
    plan.threads_per_row = looped_threads;
  }
  plan.threads = plan.threads_per_row;
  plan.blocks = problem.rows * plan.cluster;
  return plan;
}

}  // namespace fastreg::cuda
