// What batch norm's kernels share: where the lines of a tile lie, what is known of their channels, and how a tile is
// cut into lines and blocks.
//
// A line is a run of adjacent elements: a plane or a block of one, whose elements share their channel, or the
// channels of a row. The loops over a line's elements are the same for both families; what differs is whether the
// channel's values are broadcast once or loaded beside each vector.

#pragma once

#include <type_traits>

#include "activation.simd.h"
#include "batch_norm.h"
#include "simd.h"
#include "simd_bits.h"

namespace fastreg::FASTREG_SIMD {

// --- channels ----------------------------------------------------------------------------------------------

// An array of one value a channel, as a line sees it from `channel` on.
template <bool rows, class Scalar>
struct ChannelValues;

template <class Scalar>
struct ChannelValues<false, Scalar> {
  Vector<Scalar> value{};

  FASTREG_INLINE ChannelValues(const void* data, int64_t channel) {
    if (data != nullptr) {
      value = broadcast(static_cast<const Scalar*>(data)[channel]);
    }
  }

  template <class Lanes>
  FASTREG_INLINE Vector<Scalar> at(Lanes, int64_t) const {
    return value;
  }
};

template <class Scalar>
struct ChannelValues<true, Scalar> {
  const Scalar* values;

  FASTREG_INLINE ChannelValues(const void* data, int64_t channel)
      : values(data == nullptr ? nullptr : static_cast<const Scalar*>(data) + channel) {}

  template <class Lanes>
  FASTREG_INLINE Vector<Scalar> at(Lanes lanes, int64_t column) const {
    return values == nullptr ? Vector<Scalar>{} : lanes.load(values + column);
  }
};

// --- lines -------------------------------------------------------------------------------------------------

constexpr int64_t cache_line = 64;

// Rows that are worked on together: what is known of their channels is loaded once for all of them.
constexpr int rows_per_group = 4;

// Vectors of a row that are worked on one after the other: as many as make a cache line, which is thus written at once.
template <class Element>
constexpr int vectors_per_step = sizeof(Element) == 2 ? 2 : 1;

struct Line {
  int64_t outer;    // sample, or row
  int64_t inner;    // elements from there
  int64_t channel;  // of the first element
  int64_t elements;
  int64_t signs;         // bytes from the beginning of all signs
  int64_t signs_stride;  // from one row to the next
};

// The beginnings of the lines of a group in a tensor; null in one that is absent.
template <int group, class Element>
struct LinesOf {
  Element* begin[group];
  int64_t ahead = 0;  // elements from there to what is asked for in the meantime

  FASTREG_INLINE LinesOf(Element* data, int64_t outer_stride, const Line& line) {
    for (int r = 0; r < group; ++r) {
      begin[r] = data == nullptr ? nullptr : data + (line.outer + r) * outer_stride + line.inner;
    }
  }

  FASTREG_INLINE explicit operator bool() const { return begin[0] != nullptr; }
  FASTREG_INLINE Element* operator[](int r) const { return begin[r]; }

  // Asks for what lies ahead of the k-th vector of a step, a cache line of each row: all along the loop over the
  // columns, as a core that asks for a whole line at once waits until it has places for that. With nothing ahead it
  // is the line that is read now, which is cheaper than a branch.
  FASTREG_INLINE void prefetch(int64_t column, int k) const {
    constexpr int vectors = cache_line / (lanes_of<Accumulator<std::remove_const_t<Element>>> * sizeof(Element));
    if (vectors <= 1 || k % vectors == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < group; ++r) {
        __builtin_prefetch(begin[r] + column + ahead, 0, 2);
      }
    }
  }
};

// Of a dense output.
template <int group, bool rows, class Element>
FASTREG_INLINE LinesOf<group, Element> lines_of(void* data, const BatchNormGeometry& geometry, const Line& line) {
  return {static_cast<Element*>(data), rows ? geometry.channels : geometry.channels * geometry.spatial, line};
}

// Whether the lines of a dense output that begin `stride` bytes apart, the first of them `begin` bytes from its
// beginning, are written past the caches.
FASTREG_INLINE bool lines_stream(const BatchNorm& norm, int64_t stride, int64_t begin = 0) {
  return norm.streams && stride % cache_line == 0 && begin % cache_line == 0;
}

template <bool rows, class Element>
FASTREG_INLINE bool lines_stream(const BatchNorm& norm) {
  const int64_t elements = rows ? norm.geometry.channels : norm.geometry.spatial;
  return lines_stream(norm, elements * static_cast<int64_t>(sizeof(Element)));
}

// Whether rows are written one after the other, not a group at a time: a core gathers few cache lines at once that go
// past the caches. Shorter rows gain more by what they share in a group.
template <bool rows, class Element>
FASTREG_INLINE bool one_by_one(const BatchNorm& norm) {
  constexpr int64_t least_bytes = 1024;
  return rows && norm.geometry.channels * static_cast<int64_t>(sizeof(Element)) >= least_bytes &&
         lines_stream<rows, Element>(norm);
}

template <int group, class Byte>
FASTREG_INLINE LinesOf<group, Byte> signs_of(Byte* signs, const Line& line) {
  return {signs, line.signs_stride, {0, line.signs, 0, 0, 0, 0}};
}

// Calls body.operator()<group>(line_at(unit)) for every group of units of the tile, then <1> for each that is left, or
// for all of them.
template <int group, class LineAt, class Body>
FASTREG_INLINE void for_groups(const BatchNormTile& tile, const LineAt& line_at, const Body& body, bool singly) {
  int64_t unit = tile.begin_unit;
  for (; !singly && unit + group <= tile.end_unit; unit += group) {
    body.template operator()<group>(line_at(unit));
  }
  for (; unit < tile.end_unit; ++unit) {
    body.template operator()<1>(line_at(unit));
  }
}

// Calls body.operator()<group>(line) for every line, or group of rows, of the tile, as they lie in memory.
template <bool rows, int group, class Body>
FASTREG_INLINE void for_lines(const BatchNormGeometry& geometry, const BatchNormTile& tile, const Body& body,
                              bool singly = false) {
  if constexpr (rows) {
    const int64_t bytes = (geometry.channels + 7) / 8;
    const auto line_at = [&](int64_t row) {
      return Line{row, tile.begin_channel, tile.begin_channel, tile.end_channel - tile.begin_channel,
                  row * bytes + tile.begin_channel / 8, bytes};
    };
    for_groups<group>(tile, line_at, body, singly);
  } else {
    const int64_t bytes = (geometry.spatial + 7) / 8;
    int64_t sample = tile.begin_unit / geometry.units_per_plane;
    int64_t begin = tile.begin_unit % geometry.units_per_plane * geometry.elements_per_unit;
    for (int64_t unit = tile.begin_unit; unit < tile.end_unit; ++unit) {
      const int64_t rest = geometry.spatial - begin;
      const int64_t elements = rest < geometry.elements_per_unit ? rest : geometry.elements_per_unit;
      for (int64_t channel = tile.begin_channel; channel < tile.end_channel; ++channel) {
        body.template operator()<1>(Line{sample, channel * geometry.spatial + begin, channel, elements,
                                         (sample * geometry.channels + channel) * bytes + begin / 8, 0});
      }
      begin += elements;
      if (begin == geometry.spatial) {
        begin = 0;
        ++sample;
      }
    }
  }
}

// --- memory ------------------------------------------------------------------------------------------------

// The hardware looks ahead along a few streams only, and no further than a page: the lines of a tile some units ahead
// are asked for while these are worked on.
class Ahead {
 public:
  template <class Element>
  static FASTREG_INLINE Ahead of(const BatchNormGeometry& geometry, const BatchNormTile& tile) {
    const int64_t elements = (tile.end_channel - tile.begin_channel) * (geometry.rows ? 1 : geometry.spatial);
    const int64_t run = elements * static_cast<int64_t>(sizeof(Element));
    return geometry.units_per_plane == 1 && run >= least_run ? Ahead(1 + distance / run, tile.end_unit) : nothing();
  }

  // The planes of the next tile: a second sweep has those of its own in the caches, and leaves memory idle. Where the
  // caches of a core have room for both.
  template <class Element>
  static FASTREG_INLINE Ahead next_planes(const BatchNormGeometry& geometry, const BatchNormTile& tile) {
    const int64_t channels = tile.end_channel - tile.begin_channel;
    const int64_t units = tile.end_unit - tile.begin_unit;
    const int64_t elements = channels * geometry.elements_per_unit * units;
    const bool fits = elements * static_cast<int64_t>(sizeof(Element)) <= largest_next;
    return fits && tile.end_channel + channels <= geometry.channels
               ? Ahead(0, tile.end_unit, channels * geometry.spatial)
               : nothing();
  }

  static FASTREG_INLINE Ahead nothing() { return Ahead(0, 0); }

  // Elements from a group of lines to those that are asked for while it is worked on.
  FASTREG_INLINE int64_t elements(const BatchNormInput& tensor, const Line& line, int group) const {
    return line.outer + units_ + group <= end_unit_ ? units_ * tensor.outer_stride + elements_ : 0;
  }

 private:
  static constexpr int64_t distance = 8192;  // bytes
  static constexpr int64_t least_run = 512;  // shorter rows are one stream to the hardware
  static constexpr int64_t largest_next = int64_t{256} << 10;

  FASTREG_INLINE Ahead(int64_t units, int64_t end_unit, int64_t elements = 0)
      : units_(units), end_unit_(end_unit), elements_(elements) {}

  int64_t units_;
  int64_t end_unit_;
  int64_t elements_;
};

template <int group, class Element>
FASTREG_INLINE LinesOf<group, const Element> lines_of(const BatchNormInput& tensor, const Line& line,
                                                      const Ahead& ahead = Ahead::nothing()) {
  LinesOf<group, const Element> lines(static_cast<const Element*>(tensor.data), tensor.outer_stride, line);
  lines.ahead = ahead.elements(tensor, line, group);
  return lines;
}

// --- blocks ------------------------------------------------------------------------------------------------

// Calls body(block) for every block of units in the tile, which begins with one.
template <class Body>
FASTREG_INLINE void for_blocks(const BatchNormGeometry& geometry, const BatchNormTile& tile, const Body& body) {
  BatchNormTile block = tile;
  for (; block.begin_unit < tile.end_unit; block.begin_unit = block.end_unit) {
    const int64_t end = block.begin_unit + geometry.units_per_block;
    block.end_unit = end < tile.end_unit ? end : tile.end_unit;
    body(block);
  }
}

// Elements of each channel in units [begin, end).
FASTREG_INLINE int64_t elements_before(const BatchNormGeometry& geometry, int64_t unit) {
  return unit / geometry.units_per_plane * geometry.spatial +
         unit % geometry.units_per_plane * geometry.elements_per_unit;
}

template <bool rows>
FASTREG_INLINE int64_t elements_of_channel(const BatchNormGeometry& geometry, int64_t begin, int64_t end) {
  return rows ? end - begin : elements_before(geometry, end) - elements_before(geometry, begin);
}

template <bool rows>
constexpr int64_t channels_per_tile = rows ? columns_per_tile : planes_per_tile;

// The sums of a block: a vector of lanes for a channel in the planes family, a lane in the rows family.
template <bool rows, class Scalar>
class BlockSums {
 public:
  FASTREG_INLINE void clear(int64_t channels) {
    const int64_t count = rows ? channels + lanes_of<Scalar> : channels * lanes_of<Scalar>;
    __builtin_memset(sums_, 0, static_cast<size_t>(count) * sizeof(Scalar));
  }

  // index: of a channel, or of the first of a vector of channels.
  FASTREG_INLINE void add(int64_t index, Vector<Scalar> values) {
    Scalar* const sums = sums_ + (rows ? index : index * lanes_of<Scalar>);
    AllLanes{}.store(sums, AllLanes{}.load(sums) + values);
  }

  FASTREG_INLINE double total(int64_t channel) const {
    if constexpr (rows) {
      return double(sums_[channel]);
    } else {
      return sum_lanes(in_double(AllLanes{}.load(sums_ + channel * lanes_of<Scalar>)));
    }
  }

 private:
  alignas(vector_bytes) Scalar
      sums_[rows ? columns_per_tile + lanes_of<Scalar> : planes_per_tile * lanes_of<Scalar>];
};

// Two sums over a line of a plane. Each of `unroll` accumulators takes a few additions in a row only, so that long
// sums of equal elements do not lose digits.
template <int unroll, class Scalar, class Body>
FASTREG_INLINE void sum_plane(int64_t elements, int64_t index, BlockSums<false, Scalar>& first,
                              BlockSums<false, Scalar>& second, const Body& body) {
  constexpr int64_t segment = 16 * unroll * lanes_of<Scalar>;
  for (int64_t begin = 0; begin < elements; begin += segment) {
    Vector<Scalar> first_sums[unroll] = {};
    Vector<Scalar> second_sums[unroll] = {};
    const int64_t rest = elements - begin;
    for_columns<Scalar, unroll>(rest < segment ? rest : segment, [&](auto lanes, int64_t column, int k) {
      body(lanes, begin + column, k, first_sums[k], second_sums[k]);
    });
    if constexpr (unroll == 4) {
      first.add(index, (first_sums[0] + first_sums[1]) + (first_sums[2] + first_sums[3]));
      second.add(index, (second_sums[0] + second_sums[1]) + (second_sums[2] + second_sums[3]));
    } else {
      first.add(index, first_sums[0]);
      second.add(index, second_sums[0]);
    }
  }
}

// Calls body.operator()<unroll>() with as many accumulators as lines of that length can use.
template <class Scalar, class Body>
FASTREG_INLINE void with_unroll(const BatchNormGeometry& geometry, const Body& body) {
  if (geometry.elements_per_unit < 8 * lanes_of<Scalar>) {
    body.template operator()<1>();
  } else {
    body.template operator()<4>();
  }
}

// a[0] * b[0] + a[1] * b[1] + ...
template <int group, class V>
FASTREG_INLINE V sum_of_products(const V* factors, const V* others) {
  V sum = factors[0] * others[0];
#pragma GCC unroll 4
  for (int r = 1; r < group; ++r) {
    sum = multiply_add(factors[r], others[r], sum);
  }
  return sum;
}

template <int group, class V>
FASTREG_INLINE V sum_of(const V* values) {
  if constexpr (group == 4) {
    return (values[0] + values[1]) + (values[2] + values[3]);
  } else {
    return values[0];
  }
}

}  // namespace fastreg::FASTREG_SIMD
