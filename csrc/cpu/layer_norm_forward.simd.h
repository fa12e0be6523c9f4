// Forward kernels of layer norm (centred) and rms norm: xhat = (x - mean) * rstd, y = xhat * weight + bias,
// without mean and bias for rms norm.
//
// A row is read block by block, each block twice while it is in the L1 cache (sum, then squared deviations);
// blocks are merged by Chan's rule in double, and the row is read again from the L1 or L2 cache to be
// normalised. Memory sees one read and one write. Short rows are worked on in fours.
//
// `Element` is the type of the rows, `Out` that of the output. Where the rows lie is a parameter: they are an
// operand of the norm's, or are made, a block at a time, just before they are read (dropout_add_layer_norm.simd.h).

#pragma once

#include "layer_norm_common.simd.h"

namespace fastreg::FASTREG_SIMD {

// --- forward: where the rows lie ---------------------------------------------------------------------------

// In memory, all of them.
template <class Row>
struct GivenRows {
  using Element = Row;
  const NormForward& norm;

  // Is called before columns [begin, end) of `count` rows from `row` on are read for the first time.
  FASTREG_INLINE void make(int64_t /*row*/, int /*count*/, int64_t /*begin*/, int64_t /*end*/) {}

  // A row that nothing was made of since, and how far from it the next one is.
  FASTREG_INLINE const Element* at(int64_t row) const {
    return static_cast<const Element*>(norm.input) + row * norm.input_stride;
  }
  FASTREG_INLINE int64_t stride() const { return norm.input_stride; }
};

// --- forward: one block ------------------------------------------------------------------------------------

// Moments of one block of columns of `group` rows, `stride` elements apart.
template <bool centred, int group, class Element>
FASTREG_INLINE void block_moments(const Element* input, int64_t stride, int64_t columns,
                                  Moments<double>* moments) {
  using Scalar = Accumulator<Element>;
  constexpr int unroll = unroll_of(group);
  Vector<Scalar> squares[group * unroll] = {};
  if constexpr (!centred) {
    for_columns<Scalar, unroll>(columns, [&](auto lanes, int64_t column, int k) {
#pragma GCC unroll 4
      for (int r = 0; r < group; ++r) {
        const Vector<Scalar> value = lanes.load(input + r * stride + column);
        squares[r * unroll + k] = multiply_add(value, value, squares[r * unroll + k]);
      }
    });
    for (int r = 0; r < group; ++r) {
      moments[r] = {double(columns), 0.0, sum_accumulators<unroll>(squares + r * unroll)};
    }
    return;
  }

  Vector<Scalar> sums[group * unroll] = {};
  for_columns<Scalar, unroll>(columns, [&](auto lanes, int64_t column, int k) {
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      sums[r * unroll + k] += lanes.load(input + r * stride + column);
    }
  });
  Vector<Scalar> centres[group];
  for (int r = 0; r < group; ++r) {
    moments[r].count = double(columns);
    moments[r].mean = sum_accumulators<unroll>(sums + r * unroll) / double(columns);
    centres[r] = broadcast(static_cast<Scalar>(moments[r].mean));
  }

  for_columns<Scalar, unroll>(columns, [&](auto lanes, int64_t column, int k) {
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vector<Scalar> deviation = lanes.keep(lanes.load(input + r * stride + column) - centres[r]);
      squares[r * unroll + k] = multiply_add(deviation, deviation, squares[r * unroll + k]);
    }
  });
  for (int r = 0; r < group; ++r) {
    moments[r].squares = sum_accumulators<unroll>(squares + r * unroll);
  }
}

template <bool centred, class Element, class Out>
FASTREG_INLINE void normalize_block(const Element* input, int64_t columns, Accumulator<Element> mean,
                                    Accumulator<Element> rstd, const Accumulator<Element>* weight,
                                    const Accumulator<Element>* bias, Out* output, bool streams) {
  using Scalar = Accumulator<Element>;
  const Vector<Scalar> means = broadcast(mean);
  const Vector<Scalar> rstds = broadcast(rstd);
  for_columns<Scalar, 4>(columns, [&](auto lanes, int64_t column, int) {
    Vector<Scalar> value = lanes.load(input + column);
    value = (centred ? value - means : value) * rstds;
    if (weight != nullptr) {
      value *= lanes.load(weight + column);
    }
    if (bias != nullptr) {
      value += lanes.load(bias + column);
    }
    if (streams) {
      lanes.stream(output + column, value);
    } else {
      lanes.store(output + column, value);
    }
  });
}

// --- forward: rows and tiles -------------------------------------------------------------------------------

template <bool centred, class Element>
FASTREG_INLINE void store_statistics(const NormForward& norm, int64_t row, const Moments<double>& moments) {
  using Scalar = Accumulator<Element>;
  if constexpr (centred) {
    static_cast<Scalar*>(norm.mean)[row] = static_cast<Scalar>(moments.mean);
  }
  static_cast<Scalar*>(norm.rstd)[row] =
      static_cast<Scalar>(reciprocal_deviation(moments.squares, moments.count, norm.eps));
}

// Columns [begin, end) of a row, which lies at `input`, and whose statistics are known.
template <bool centred, class Out, class Element>
FASTREG_INLINE void normalize_columns(const NormForward& norm, int64_t row, const Element* input, int64_t begin,
                                      int64_t end) {
  using Scalar = Accumulator<Element>;
  const Scalar mean = centred ? static_cast<const Scalar*>(norm.mean)[row] : Scalar(0);
  const Scalar rstd = static_cast<const Scalar*>(norm.rstd)[row];
  normalize_block<centred>(input + begin, end - begin, mean, rstd,
                           shifted(static_cast<const Scalar*>(norm.weight), begin),
                           shifted(static_cast<const Scalar*>(norm.bias), begin),
                           static_cast<Out*>(norm.output) + row * norm.hidden + begin, norm.streams);
}

template <bool centred, class Out, class Rows>
FASTREG_INLINE void forward_row(const NormForward& norm, Rows& rows, int64_t row) {
  using Element = typename Rows::Element;
  const Element* input = rows.at(row);
  Moments<double> moments{};
  for (int64_t begin = 0; begin < norm.hidden; begin += columns_per_block<Element>) {
    const int64_t end = end_of_block<Element>(begin, norm.hidden);
    Moments<double> block;
    rows.make(row, 1, begin, end);
    block_moments<centred, 1>(input + begin, 0, end - begin, &block);
    moments = merge(moments, block);
  }
  store_statistics<centred, Element>(norm, row, moments);
  normalize_columns<centred, Out>(norm, row, input, 0, norm.hidden);
}

template <bool centred, class Out, class Rows>
FASTREG_INLINE void forward_group(const NormForward& norm, Rows& rows, int64_t row) {
  using Element = typename Rows::Element;
  const Element* input = rows.at(row);
  Moments<double> moments[rows_per_group];
  rows.make(row, rows_per_group, 0, norm.hidden);
  block_moments<centred, rows_per_group>(input, rows.stride(), norm.hidden, moments);
  for (int r = 0; r < rows_per_group; ++r) {
    store_statistics<centred, Element>(norm, row + r, moments[r]);
  }
  for (int r = 0; r < rows_per_group; ++r) {
    normalize_columns<centred, Out>(norm, row + r, input + r * rows.stride(), 0, norm.hidden);
  }
}

template <bool centred, class Out, class Rows>
FASTREG_INLINE void forward_all(const NormForward& norm, Rows& rows, int64_t begin_row, int64_t end_row) {
  int64_t row = begin_row;
  if (norm.hidden <= columns_per_grouped_row<typename Rows::Element>) {
    for (; row + rows_per_group <= end_row; row += rows_per_group) {
      forward_group<centred, Out>(norm, rows, row);
    }
  }
  for (; row < end_row; ++row) {
    forward_row<centred, Out>(norm, rows, row);
  }
  if (norm.streams) {
    finish_streams();
  }
}

template <bool centred, class Element>
void forward_rows(const NormForward& norm, int64_t begin_row, int64_t end_row) {
  GivenRows<Element> rows{norm};
  forward_all<centred, Element>(norm, rows, begin_row, end_row);
}

template <bool centred, class Rows>
FASTREG_INLINE void tile_moments(const NormForward& norm, Rows& rows, Moments<double>* tiles, int64_t begin_tile,
                                 int64_t end_tile) {
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at<typename Rows::Element>(index, norm.hidden);
    rows.make(tile.row, 1, tile.begin, tile.end);
    block_moments<centred, 1>(rows.at(tile.row) + tile.begin, 0, tile.end - tile.begin, tiles + index);
  }
}

template <bool centred, class Element>
void forward_moments(const NormForward& norm, Moments<double>* tiles, int64_t begin_tile, int64_t end_tile) {
  GivenRows<Element> rows{norm};
  tile_moments<centred>(norm, rows, tiles, begin_tile, end_tile);
}

template <bool centred, class Element>
void forward_statistics(const NormForward& norm, const Moments<double>* tiles) {
  for (int64_t row = 0; row < norm.rows; ++row) {
    Moments<double> moments{};
    for (int64_t block = 0; block < blocks_of<Element>(norm.hidden); ++block) {
      moments = merge(moments, *tiles++);
    }
    store_statistics<centred, Element>(norm, row, moments);
  }
}

template <bool centred, class Element, class Out>
void forward_normalize(const NormForward& norm, int64_t begin_tile, int64_t end_tile) {
  const GivenRows<Element> rows{norm};
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at<Element>(index, norm.hidden);
    normalize_columns<centred, Out>(norm, tile.row, rows.at(tile.row), tile.begin, tile.end);
  }
  if (norm.streams) {
    finish_streams();
  }
}

}  // namespace fastreg::FASTREG_SIMD
