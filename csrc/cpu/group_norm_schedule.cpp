// The order of group norm's sweeps.

#include "group_norm_schedule.h"

#include <algorithm>
#include <vector>

#include "door.h"

namespace fastreg {
namespace {

// Of all tensors that are read twice, what a thread takes at a time where groups are small.
constexpr int64_t bytes_per_item = int64_t{128} << 10;

// What may lie in the last cache between the two sweeps.
constexpr int64_t resident_bytes = int64_t{16} << 20;

// Some groups of a sample.
struct Item {
  int64_t sample;
  int64_t begin_group;
  int64_t end_group;
};

// The tiles of a sweep over an item, as they lie in memory.
class Tiles {
 public:
  Tiles(const GroupNormSweep& sweep, const Item& item)
      : geometry_(sweep.geometry),
        begin_(item.begin_group * sweep.channels_per_group),
        end_(item.end_group * sweep.channels_per_group),
        width_(geometry_.rows ? columns_per_tile : planes_per_tile),
        pieces_(parts_of(end_ - begin_, width_)) {}

  int64_t count() const { return pieces_ * geometry_.chunks; }
  int64_t chunk(int64_t index) const { return geometry_.rows ? index / pieces_ : index % geometry_.chunks; }
  BatchNormTile tile(int64_t index) const {
    const int64_t piece = geometry_.rows ? index % pieces_ : index / geometry_.chunks;
    const int64_t channel = begin_ + piece * width_;
    const int64_t unit = chunk(index) * geometry_.units_per_chunk;
    return {channel, std::min(channel + width_, end_), unit,
            std::min(unit + geometry_.units_per_chunk, geometry_.units)};
  }

 private:
  const BatchNormGeometry& geometry_;
  int64_t begin_;
  int64_t end_;
  int64_t width_;
  int64_t pieces_;
};

// Both sweeps over an item, the second backwards: what was read last is read again first.
void run_alone(const GroupNormPlan& plan, const Item& item, GroupNormWorker& worker) {
  worker.begin(item.sample, item.begin_group, item.end_group);
  if (plan.sums.wanted) {
    const Tiles tiles(plan.sums, item);
    for (int64_t index = 0; index < tiles.count(); ++index) {
      worker.sums(tiles.tile(index), tiles.chunk(index));
    }
    worker.finish(item.begin_group, item.end_group);
  }
  if (plan.outputs.wanted) {
    const Tiles tiles(plan.outputs, item);
    for (int64_t index = tiles.count() - 1; index >= 0; --index) {
      worker.outputs(tiles.tile(index));
    }
  }
}

// The same groups of samples [begin_sample, begin_sample + workers.size()), shared by all threads.
void run_together(const GroupNormPlan& plan, int64_t begin_sample, int64_t begin_group, int64_t end_group,
                  int64_t samples, const std::vector<std::unique_ptr<GroupNormWorker>>& workers, int64_t threads) {
  const Item item{begin_sample, begin_group, end_group};
  const int64_t strip = std::max<int64_t>(channels_per_strip / plan.sums.channels_per_group, 1);
  const int64_t strips = parts_of(end_group - begin_group, strip);
  const int64_t elements = plan.groups * plan.sums.channels_per_group;
  split(samples, thread_count(samples * elements), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      workers[index]->begin(begin_sample + index, begin_group, end_group);
    }
  });
  if (plan.sums.wanted) {
    const Tiles tiles(plan.sums, item);
    split(samples * tiles.count(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        workers[index / tiles.count()]->sums(tiles.tile(index % tiles.count()), tiles.chunk(index % tiles.count()));
      }
    });
    split(samples * strips, thread_count(samples * elements * plan.sums.geometry.chunks),
          [&](int64_t begin, int64_t end) {
            for (int64_t index = begin; index < end; ++index) {
              const int64_t group = begin_group + index % strips * strip;
              workers[index / strips]->finish(group, std::min(group + strip, end_group));
            }
          });
  }
  if (plan.outputs.wanted) {
    const Tiles tiles(plan.outputs, item);
    split(samples * tiles.count(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t index = end - 1; index >= begin; --index) {
        workers[index / tiles.count()]->outputs(tiles.tile(index % tiles.count()));
      }
    });
  }
}

void run_in_waves(const GroupNormPlan& plan, int64_t group_bytes, int64_t threads) {
  const int64_t resident_groups = std::max<int64_t>(resident_bytes / group_bytes, 1);
  const int64_t samples = std::clamp<int64_t>(resident_groups / plan.groups, 1, plan.samples);
  const int64_t groups = plan.outputs.geometry.rows ? plan.groups : std::min(resident_groups, plan.groups);
  std::vector<std::unique_ptr<GroupNormWorker>> workers(samples);
  std::generate(workers.begin(), workers.end(), plan.new_worker);
  for (int64_t sample = 0; sample < plan.samples; sample += samples) {
    for (int64_t group = 0; group < plan.groups; group += groups) {
      run_together(plan, sample, group, std::min(group + groups, plan.groups),
                   std::min(samples, plan.samples - sample), workers, threads);
    }
  }
}

// Groups that a thread takes at a time. Rows are not cut, even where their sample is too large for a thread's own
// cache: what their second sweep gains is less than the shorter lines cost.
int64_t groups_of_item(const GroupNormPlan& plan, int64_t group_bytes, int64_t threads) {
  if (plan.outputs.geometry.rows) {
    return plan.groups;
  }
  const int64_t share = plan.samples * plan.groups / (4 * threads);
  return std::clamp<int64_t>(std::min(bytes_per_item / group_bytes, share), 1, plan.groups);
}

}  // namespace

void run_group_norm(const GroupNormPlan& plan) {
  const int64_t threads = thread_count(plan.samples * plan.groups * plan.group_elements);
  const int64_t group_bytes = plan.group_elements * plan.bytes_read_twice;
  const int64_t groups = groups_of_item(plan, group_bytes, threads);
  const int64_t items_per_sample = parts_of(plan.groups, groups);
  const int64_t items = plan.samples * items_per_sample;
  const bool enough = items >= 2 * threads || items % threads == 0;
  if (threads > 1 && !(enough && groups * group_bytes * threads <= resident_bytes)) {
    return run_in_waves(plan, group_bytes, threads);
  }
  split(items, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<GroupNormWorker> worker = plan.new_worker();
    for (int64_t index = begin; index < end; ++index) {
      const int64_t group = index % items_per_sample * groups;
      run_alone(plan, {index / items_per_sample, group, std::min(group + groups, plan.groups)}, *worker);
    }
  });
}

}  // namespace fastreg
