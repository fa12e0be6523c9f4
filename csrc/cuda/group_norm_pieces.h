// Where the sums of a sample's channel are that the parameters' gradients are made of: pure functions of the plan.
//
// Each warp, block or part that has some of a channel leaves a piece of its sums; the pieces of a sample's group lie
// side by side, and are added up in the order of their place.

#pragma once

#include "group_norm_plan.h"

namespace fastreg::cuda {

// Of a group's pieces, side by side: which are those of its channel number `channel`, and how far apart.
struct GroupPieces {
  int64_t slots;     // of a group
  int64_t channels;  // of a group
  int64_t parts;     // each has a piece of every channel; 0: planes on chip, of which a channel has pieces of its runs
  int64_t columns;
  int64_t share;
  int64_t run;
  int64_t block_runs;
  bool whole;  // runs are whole planes

  // Which run a chunk of a slab belongs to.
  FASTREG_INLINE constexpr int64_t run_of(int64_t chunk) const {
    const int64_t block = chunk / share;
    return block * block_runs + (chunk - block * share) / run;
  }
  // The slot of what a run knows of a channel. From piece to piece at least one of both numbers grows by one.
  FASTREG_INLINE constexpr int64_t slot(int64_t of_run, int64_t channel) const {
    return whole ? channel : of_run + channel;
  }

  FASTREG_INLINE constexpr int64_t first(int64_t channel) const {
    return parts > 0 ? channel : slot(run_of(channel * columns), channel);
  }
  FASTREG_INLINE constexpr int64_t count(int64_t channel) const {
    return parts > 0 ? parts : run_of((channel + 1) * columns - 1) - run_of(channel * columns) + 1;
  }
  FASTREG_INLINE constexpr int64_t step() const { return parts > 0 ? channels : 1; }
};

constexpr GroupPieces pieces_of_parts(int64_t group_channels, int64_t parts) {
  return {group_channels * parts, group_channels, parts, 0, 0, 0, 0, false};
}

constexpr GroupPieces pieces_of(const GroupProblem& problem, const GroupPlan& plan) {
  const ResidentPlan& resident = plan.resident;
  const int64_t channels = problem.group_channels();
  if (problem.rows) {
    return pieces_of_parts(channels, resident.slab_blocks);
  }
  const int64_t block_runs = divide_up(resident.share, plan.run);
  return {channels + (plan.whole ? 0 : block_runs * resident.slab_blocks),
          channels,
          0,
          resident.columns,
          resident.share,
          plan.run,
          block_runs,
          plan.whole};
}

}  // namespace fastreg::cuda
