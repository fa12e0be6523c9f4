// Backward of dropout with a layer scale that learns: both gradients in one sweep.
//
//   dx = keep ? dy * factor * scale : 0     dlayer_scale = sum over rows of keep ? dy * row_scale * scale * x : 0
//
// The partial sums of a chunk of rows stay in the L1 cache; memory sees two reads and, where dx is wanted, one write.
// Chunks, and blocks of columns, depend on the shape only: so does the order of every addition.

#pragma once

#include <cstddef>

#include "dropout_apply.simd.h"

namespace fastreg::FASTREG_SIMD {

// Elements of one row.
struct RowPart {
  int64_t position;
  int64_t column;
  int64_t count;
};

// dx as apply_piece computes it, to the bit.
template <class In, class Out, bool masked, bool wants_input>
FASTREG_INLINE void add_terms(const LayerScaleGradient& gradient, const RowPart& part, const KeepLane* keep,
                              Accumulator<In>* partial) {
  using Scalar = Accumulator<In>;
  const Dropout& dropout = gradient.dropout;
  const In* const grad_output = static_cast<const In*>(dropout.input) + part.position;
  const Out* const input = static_cast<const Out*>(gradient.input) + part.position;
  Out* const grad_input = wants_input ? static_cast<Out*>(dropout.output) + part.position : nullptr;
  const Scalar* const layer_scale = static_cast<const Scalar*>(dropout.layer_scale) + part.column;
  const Vector<Scalar> scale = broadcast(static_cast<Scalar>(dropout.scale));
  const Vector<Scalar> row_scale =
      broadcast(dropout.row_scale == nullptr
                    ? Scalar(1)
                    : static_cast<const Scalar*>(dropout.row_scale)[part.position / dropout.row]);
  const bool streams = dropout.streams && part.position % lanes_of<Scalar> == 0;
  partial += part.column;
  for_columns<Scalar, 2>(part.count, [&](auto lanes, int64_t column, int) {
    const Vector<Scalar> dy = lanes.load(grad_output + column);
    Vector<Scalar> terms = dy * row_scale * scale * lanes.load(input + column);
    LaneMask<Vector<Scalar>> kept{};
    if constexpr (masked) {
      kept = keep_mask<Vector<Scalar>>(keep + column);
      terms = select(kept, terms, Vector<Scalar>{});
    }
    lanes.store(partial + column, lanes.load(partial + column) + terms);
    if constexpr (wants_input) {
      Vector<Scalar> dx = dy * (lanes.load(layer_scale + column) * row_scale) * scale;
      if constexpr (masked) {
        dx = select(kept, dx, Vector<Scalar>{});
      }
      put(streams, lanes, grad_input + column, dx);
    }
  });
}

// The elements from `begin` to `end`, of whole rows or of one.
template <class In, class Out, bool wants_input>
FASTREG_INLINE void sum_stretch(const LayerScaleGradient& gradient, Keeper& keeper, int64_t begin, int64_t end,
                                Accumulator<In>* partial) {
  const Dropout& dropout = gradient.dropout;
  int64_t column = begin % dropout.columns;
  for (int64_t position = begin; position < end;) {
    const Piece piece = keeper.next(position, end);
    const int64_t end_of_piece = position + piece.count;
    if (piece.kept == Kept::none) {
      if constexpr (wants_input) {
        drop_piece<Out>(dropout, position, piece.count);
      }
      column = (column + piece.count) % dropout.columns;
      position = end_of_piece;
    }
    const KeepLane* keep = piece.lanes;
    while (position < end_of_piece) {
      const int64_t rest = dropout.columns - column;
      const RowPart part{position, column, rest < end_of_piece - position ? rest : end_of_piece - position};
      if (piece.kept == Kept::all) {
        add_terms<In, Out, false, wants_input>(gradient, part, keep, partial);
      } else {
        add_terms<In, Out, true, wants_input>(gradient, part, keep, partial);
        keep += part.count;
      }
      position += part.count;
      column = part.count == rest ? 0 : column + part.count;
    }
  }
}

template <class In, class Out, bool wants_input>
void layer_scale_blocks(const LayerScaleGradient& gradient, int64_t begin_block, int64_t end_block) {
  using Scalar = Accumulator<In>;
  const int64_t columns = gradient.dropout.columns;
  const int64_t blocks = (columns + dropout_block_columns - 1) / dropout_block_columns;
  Keeper keeper(gradient.dropout.mask);
  for (int64_t index = begin_block; index < end_block; ++index) {
    const int64_t chunk = index / blocks;
    const int64_t begin = index % blocks * dropout_block_columns;
    const int64_t end = begin + dropout_block_columns < columns ? begin + dropout_block_columns : columns;
    Scalar* const partial = static_cast<Scalar*>(gradient.partials) + chunk * columns;
    __builtin_memset(partial + begin, 0, static_cast<size_t>(end - begin) * sizeof(Scalar));
    const int64_t begin_row = chunk * gradient.rows_per_chunk;
    const int64_t next_row = begin_row + gradient.rows_per_chunk;
    const int64_t end_row = next_row < gradient.rows ? next_row : gradient.rows;
    if (blocks == 1) {
      sum_stretch<In, Out, wants_input>(gradient, keeper, begin_row * columns, end_row * columns, partial);
    } else {
      for (int64_t row = begin_row; row < end_row; ++row) {
        sum_stretch<In, Out, wants_input>(gradient, keeper, row * columns + begin, row * columns + end, partial);
      }
    }
  }
  if (gradient.dropout.streams) {
    finish_streams();
  }
}

template <class In, class Out>
void layer_scale_gradient(const LayerScaleGradient& gradient, int64_t begin_block, int64_t end_block) {
  if (gradient.dropout.output != nullptr) {
    layer_scale_blocks<In, Out, true>(gradient, begin_block, end_block);
  } else {
    layer_scale_blocks<In, Out, false>(gradient, begin_block, end_block);
  }
}

}  // namespace fastreg::FASTREG_SIMD
