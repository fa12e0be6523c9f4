// Where batch norm's units, blocks and chunks begin, and in which order the tiles are worked on.
//
// The geometry is a function of shape and dtype, so that results do not depend on the threads. The order is not, and
// cares for the caches: a channel's elements are read twice, for its sums and for the outputs, and the second read
// costs little where the first has left them in a cache.

#pragma once

#include <cstdint>
#include <functional>

#include "../channels.h"
#include "batch_norm.h"

namespace fastreg {

BatchNormGeometry batch_norm_geometry(const ChannelView& view);

// The two sweeps over the tensors. Either may be empty.
struct BatchNormSweeps {
  std::function<void(const BatchNormTile& tile, int64_t chunk)> sums;
  std::function<void(int64_t begin_channel, int64_t end_channel)> finish;
  std::function<void(const BatchNormTile& tile)> outputs;
  // Of all tensors that the second sweep reads again, an element.
  int64_t bytes_read_twice;
};

void run_batch_norm(const BatchNormGeometry& geometry, int64_t element_bytes, const BatchNormSweeps& sweeps);

}  // namespace fastreg
