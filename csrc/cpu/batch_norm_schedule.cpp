// The geometry and the order of batch norm's sweeps.

#include "batch_norm_schedule.h"

#include <algorithm>
#include <numeric>

#include "door.h"

namespace fastreg {
namespace {

// Of a block, whose sums are made in the dtype of accumulation: rows of at most so many columns, or planes.
constexpr int64_t columns_of_block = 512;
constexpr int64_t bytes_per_block = int64_t{64} << 10;
constexpr int64_t elements_per_block = 2048;

// Chunks are shared out among threads: enough of them, but long enough that their sums are small beside them.
constexpr int64_t maximum_chunks = 64;
constexpr int64_t elements_per_chunk = 32768;

// Of one sample, what a thread reads in a row of a group of adjacent planes, and of a group in all.
constexpr int64_t bytes_per_run = 8192;
constexpr int64_t bytes_per_group = int64_t{2} << 20;

// What may lie in the last cache between the two sweeps.
constexpr int64_t resident_bytes = int64_t{16} << 20;

struct Groups {
  int64_t channels;  // of a group
  int64_t count;
};

// plane_bytes: of all tensors that are read twice.
Groups groups_of(const BatchNormGeometry& geometry, int64_t element_bytes, int64_t plane_bytes, int64_t threads) {
  int64_t channels = columns_per_tile;
  if (!geometry.rows) {
    const int64_t run = bytes_per_run / plane_bytes;
    const int64_t resident = bytes_per_group / (plane_bytes * geometry.samples);
    const int64_t share = geometry.channels / (4 * threads);
    channels = std::clamp<int64_t>(std::min({run, resident, share}), 1, planes_per_tile);
    // Runs of whole cache lines can be written past the caches.
    const int64_t aligned = cache_line / std::gcd(cache_line, geometry.spatial * element_bytes);
    channels = channels > aligned ? channels / aligned * aligned : channels;
  }
  return {channels, parts_of(geometry.channels, channels)};
}

BatchNormTile tile_at(const BatchNormGeometry& geometry, const Groups& groups, int64_t group, int64_t chunk) {
  const int64_t channel = group * groups.channels;
  const int64_t unit = chunk * geometry.units_per_chunk;
  return {channel, std::min(channel + groups.channels, geometry.channels), unit,
          std::min(unit + geometry.units_per_chunk, geometry.units)};
}

// The tiles of groups [begin_group, end_group), as they lie in memory.
class Tiles {
 public:
  Tiles(const BatchNormGeometry& geometry, const Groups& groups, int64_t begin_group, int64_t end_group)
      : geometry_(geometry), groups_(groups), begin_group_(begin_group), count_(end_group - begin_group) {}

  int64_t count() const { return count_ * geometry_.chunks; }
  int64_t chunk(int64_t index) const { return geometry_.rows ? index / count_ : index % geometry_.chunks; }
  BatchNormTile tile(int64_t index) const {
    const int64_t group = geometry_.rows ? index % count_ : index / geometry_.chunks;
    return tile_at(geometry_, groups_, begin_group_ + group, chunk(index));
  }

 private:
  const BatchNormGeometry& geometry_;
  const Groups& groups_;
  int64_t begin_group_;
  int64_t count_;
};

// Both sweeps over some tiles, the second backwards: what was read last is read again first.
void run_tiles(const Tiles& tiles, const BatchNormGeometry& geometry, int64_t begin_channel, int64_t end_channel,
               const BatchNormSweeps& sweeps, int64_t threads) {
  if (sweeps.sums) {
    split(tiles.count(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        sweeps.sums(tiles.tile(index), tiles.chunk(index));
      }
    });
    const int64_t channels = end_channel - begin_channel;
    split(parts_of(channels, channels_per_strip), threads == 1 ? 1 : thread_count(channels * geometry.chunks),
          [&](int64_t begin, int64_t end) {
            sweeps.finish(begin_channel + begin * channels_per_strip,
                          std::min(begin_channel + end * channels_per_strip, end_channel));
          });
  }
  if (sweeps.outputs) {
    split(tiles.count(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t index = end - 1; index >= begin; --index) {
        sweeps.outputs(tiles.tile(index));
      }
    });
  }
}

}  // namespace

BatchNormGeometry batch_norm_geometry(const ChannelView& view) {
  BatchNormGeometry geometry{};
  geometry.rows = view.rows;
  geometry.samples = view.samples;
  geometry.channels = view.channels;
  geometry.spatial = view.spatial;
  if (view.elements() == 0) {
    return geometry;  // nothing to cut, and nothing will be run
  }
  if (view.rows) {
    const int64_t row_bytes = std::min(view.channels, columns_of_block) * element_size(view.dtype);
    geometry.units_per_plane = 1;
    geometry.elements_per_unit = 1;
    geometry.units = view.samples * view.spatial;
    geometry.units_per_block = std::clamp<int64_t>(bytes_per_block / row_bytes, 16, 128);
    const int64_t blocks = parts_of(geometry.units, geometry.units_per_block);
    const int64_t chunks = std::clamp<int64_t>(blocks / 2, 1, maximum_chunks);
    geometry.units_per_chunk = parts_of(blocks, chunks) * geometry.units_per_block;
  } else {
    constexpr int64_t multiple = 64;  // whole vectors and whole bytes of signs
    geometry.units_per_plane = parts_of(view.spatial, elements_per_unit);
    geometry.elements_per_unit =
        geometry.units_per_plane == 1
            ? view.spatial
            : parts_of(parts_of(view.spatial, geometry.units_per_plane), multiple) * multiple;
    geometry.units_per_plane = parts_of(view.spatial, geometry.elements_per_unit);
    geometry.units = view.samples * geometry.units_per_plane;
    geometry.units_per_block = std::clamp<int64_t>(elements_per_block / geometry.elements_per_unit, 1, 32);
    const int64_t blocks = parts_of(geometry.units, geometry.units_per_block);
    const int64_t blocks_per_chunk =
        std::max(parts_of(elements_per_chunk, geometry.units_per_block * geometry.elements_per_unit),
                 parts_of(blocks, maximum_chunks));
    geometry.units_per_chunk = blocks_per_chunk * geometry.units_per_block;
  }
  geometry.chunks = parts_of(geometry.units, geometry.units_per_chunk);
  return geometry;
}

void run_batch_norm(const BatchNormGeometry& geometry, int64_t element_bytes, const BatchNormSweeps& sweeps) {
  const int64_t threads = thread_count(geometry.per_channel() * geometry.channels);
  const int64_t plane_bytes = geometry.spatial * std::max(sweeps.bytes_read_twice, element_bytes);
  const Groups groups = groups_of(geometry, element_bytes, plane_bytes, threads);
  const int64_t group_bytes = geometry.per_channel() * groups.channels * sweeps.bytes_read_twice;
  const auto run = [&](int64_t begin_group, int64_t end_group, int64_t own_threads) {
    run_tiles(Tiles(geometry, groups, begin_group, end_group), geometry, begin_group * groups.channels,
              std::min(end_group * groups.channels, geometry.channels), sweeps, own_threads);
  };

  if (geometry.rows || !sweeps.sums || !sweeps.outputs) {
    return run(0, groups.count, threads);
  }
  // Each thread has groups of its own, where those in work at a time fit the cache together.
  if (groups.count >= 2 * threads && group_bytes * threads <= resident_bytes) {
    return split(groups.count, threads, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        run(group, group + 1, 1);
      }
    });
  }
  // Else all threads share as many groups as fit, at least one.
  const int64_t wave = std::max<int64_t>(resident_bytes / group_bytes, 1);
  for (int64_t group = 0; group < groups.count; group += wave) {
    run(group, std::min(group + wave, groups.count), threads);
  }
}

}  // namespace fastreg
