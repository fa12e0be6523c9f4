// In which order group norm's samples and groups are worked on, and by how many threads.
//
// A group's elements are read twice, for its sums and for the outputs. Where there are groups enough to go round, a
// thread does both sweeps over a few at a time, small enough that its own cache still has them at the second; else
// all threads share as many as the last cache holds. Results depend on neither: units, blocks and chunks are those of
// batch norm's geometry, which is a function of shape and dtype.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "batch_norm.h"

namespace fastreg {

// One sample at a time: its statistics or sums, and what becomes of it. Has working memory of its own; begin() starts
// on some groups of a sample, and the other functions then mean these.
class GroupNormWorker {
 public:
  virtual ~GroupNormWorker() = default;
  virtual void begin(int64_t sample, int64_t begin_group, int64_t end_group) = 0;
  virtual void sums(const BatchNormTile& tile, int64_t chunk) = 0;
  virtual void finish(int64_t begin_group, int64_t end_group) = 0;
  virtual void outputs(const BatchNormTile& tile) = 0;
};

// One of the two sweeps over a sample: the batch norm problem that it is, and how many of its channels a group has.
struct GroupNormSweep {
  bool wanted = false;
  BatchNormGeometry geometry{};
  int64_t channels_per_group = 0;
};

struct GroupNormPlan {
  int64_t samples;
  int64_t groups;          // of a sample
  int64_t group_elements;  // of a sample
  GroupNormSweep sums;
  GroupNormSweep outputs;
  int64_t bytes_read_twice;  // of all tensors that the second sweep reads again, an element
  std::function<std::unique_ptr<GroupNormWorker>()> new_worker;
};

void run_group_norm(const GroupNormPlan& plan);

}  // namespace fastreg
