// Dropout's straight loop over memory, for forward, backward and in place.
//
//   output = (keep ? input * factor * scale : 0) + residual,  with factor = row_scale * layer_scale
//
// Memory sees each tensor once; of a unit that is dropped as a whole only the residual. The factors of a tile are
// written out before it, so that one loop serves all lengths of rows.

#pragma once

#include "dropout_keep.simd.h"

namespace fastreg::FASTREG_SIMD {

// --- factors -----------------------------------------------------------------------------------------------

// row_scale * layer_scale of adjacent elements.
template <class Scalar>
struct Factors {
  alignas(64) Scalar values[keep_tile];

  FASTREG_INLINE void fill(const Dropout& dropout, int64_t position, int64_t count) {
    const Scalar* const rows = static_cast<const Scalar*>(dropout.row_scale);
    const Scalar* const columns = static_cast<const Scalar*>(dropout.layer_scale);
    const int64_t length = columns == nullptr ? dropout.row : dropout.columns;
    int64_t row = rows == nullptr ? 0 : position / dropout.row;
    int64_t in_row = rows == nullptr ? 0 : position % dropout.row;
    int64_t column = position % length;
    for (int64_t begin = 0; begin < count;) {
      const int64_t rest = length - column;
      const int64_t width = rest < count - begin ? rest : count - begin;
      const Vector<Scalar> factor = broadcast(rows == nullptr ? Scalar(1) : rows[row]);
      Scalar* const target = values + begin;
      if (columns == nullptr) {
        for_columns<Scalar, 1>(width, [&](auto lanes, int64_t place, int) { lanes.store(target + place, factor); });
      } else {
        const Scalar* const source = columns + column;
        for_columns<Scalar, 1>(width, [&](auto lanes, int64_t place, int) {
          lanes.store(target + place, lanes.load(source + place) * factor);
        });
      }
      begin += width;
      column = 0;
      in_row += width;
      if (rows != nullptr && in_row == dropout.row) {
        in_row = 0;
        ++row;
      }
    }
  }
};

// --- pieces ------------------------------------------------------------------------------------------------

// Calls body(lanes, column) for every vector of `count` elements from `position` on, the whole ones aligned as the
// tensor is.
template <class Scalar, class Body>
FASTREG_INLINE void for_aligned(int64_t position, int64_t count, bool aligned, const Body& body) {
  int64_t head = 0;
  if (aligned && position % lanes_of<Scalar> != 0) {
    head = lanes_of<Scalar> - position % lanes_of<Scalar>;
    head = head < count ? head : count;
    body(SomeLanes{static_cast<int>(head)}, int64_t{0});
  }
  for_columns<Scalar, 4>(count - head, [&](auto lanes, int64_t column, int) { body(lanes, head + column); });
}

template <class Out, class Lanes>
FASTREG_INLINE void put(bool streams, Lanes lanes, Out* target, Vector<Accumulator<Out>> values) {
  if (streams) {
    lanes.stream(target, values);
  } else {
    lanes.store(target, values);
  }
}

template <class In, class Out, bool masked, bool multiplied, bool adds>
void apply_piece(const Dropout& dropout, int64_t position, int64_t count, const KeepLane* keep,
                 const Accumulator<In>* factors) {
  using Scalar = Accumulator<In>;
  const In* const input = static_cast<const In*>(dropout.input) + position;
  const Out* const residual = adds ? static_cast<const Out*>(dropout.residual) + position : nullptr;
  Out* const output = static_cast<Out*>(dropout.output) + position;
  const Vector<Scalar> scale = broadcast(static_cast<Scalar>(dropout.scale));
  const bool streams = dropout.streams;
  for_aligned<Scalar>(position, count, streams, [&](auto lanes, int64_t column) {
    Vector<Scalar> values = lanes.load(input + column);
    if constexpr (multiplied) {
      values *= lanes.load(factors + column);
    }
    values *= scale;
    if constexpr (masked) {
      values = select(keep_mask<Vector<Scalar>>(keep + column), values, Vector<Scalar>{});
    }
    if constexpr (adds) {
      values += lanes.load(residual + column);
    }
    put(streams, lanes, output + column, values);
  });
}

// The residual, or zeros.
template <class Out>
void drop_piece(const Dropout& dropout, int64_t position, int64_t count) {
  using Scalar = Accumulator<Out>;
  Out* const output = static_cast<Out*>(dropout.output) + position;
  const bool streams = dropout.streams;
  if (dropout.residual == nullptr) {
    for_aligned<Scalar>(position, count, streams, [&](auto lanes, int64_t column) {
      put(streams, lanes, output + column, Vector<Scalar>{});
    });
  } else {
    const Out* const residual = static_cast<const Out*>(dropout.residual) + position;
    for_aligned<Scalar>(position, count, streams, [&](auto lanes, int64_t column) {
      put(streams, lanes, output + column, Vector<Scalar>{} + lanes.load(residual + column));
    });
  }
}

// --- positions ---------------------------------------------------------------------------------------------

// From this size on a tensor is not found in a processor's own caches.
constexpr int64_t far_bytes = int64_t{1} << 20;

// Asks for the tile after the next masks: the processor itself looks ahead only while it loads. Of a far tensor a
// quarter of the time; where it is near, the asking costs a tenth.
template <class Element>
FASTREG_INLINE void prefetch_tile(const void* data, int64_t position) {
  const char* const first = reinterpret_cast<const char*>(static_cast<const Element*>(data) + position);
#pragma GCC unroll 4
  for (int64_t offset = 0; offset < keep_tile * int64_t{sizeof(Element)}; offset += 64) {
    __builtin_prefetch(first + offset);
  }
}

template <class In, class Out, bool multiplied, bool adds>
void apply_positions(const Dropout& dropout, int64_t begin, int64_t end) {
  using Scalar = Accumulator<In>;
  Keeper keeper(dropout.mask);
  Factors<Scalar> factors;
  const bool prefetches =
      dropout.mask.rule == KeepRule::elements && dropout.elements * int64_t{sizeof(In)} >= far_bytes;
  for (int64_t position = begin; position < end;) {
    if (prefetches) {
      prefetch_tile<In>(dropout.input, position + keep_tile);
      if constexpr (adds) {
        prefetch_tile<Out>(dropout.residual, position + keep_tile);
      }
    }
    Piece piece = keeper.next(position, end);
    if (piece.kept == Kept::none) {
      drop_piece<Out>(dropout, position, piece.count);
    } else {
      if constexpr (multiplied) {
        piece.count = piece.count < keep_tile ? piece.count : keep_tile;
        factors.fill(dropout, position, piece.count);
      }
      const auto apply = piece.kept == Kept::all ? apply_piece<In, Out, false, multiplied, adds>
                                                 : apply_piece<In, Out, true, multiplied, adds>;
      apply(dropout, position, piece.count, piece.lanes, factors.values);
    }
    position += piece.count;
  }
  if (dropout.streams) {
    finish_streams();
  }
}

// Whether there is a residual, and whether there may be none, is known of some types.
template <class In, class Out>
void apply_dropout(const Dropout& dropout, int64_t begin, int64_t end) {
  const bool multiplied = dropout.row_scale != nullptr || dropout.layer_scale != nullptr;
  if constexpr (sizeof(Out) >= sizeof(In)) {
    if (dropout.residual != nullptr) {
      return multiplied ? apply_positions<In, Out, true, true>(dropout, begin, end)
                        : apply_positions<In, Out, false, true>(dropout, begin, end);
    }
  }
  if constexpr (sizeof(Out) <= sizeof(In)) {
    multiplied ? apply_positions<In, Out, true, false>(dropout, begin, end)
               : apply_positions<In, Out, false, false>(dropout, begin, end);
  }
}

}  // namespace fastreg::FASTREG_SIMD
