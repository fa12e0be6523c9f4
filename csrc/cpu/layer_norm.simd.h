// CPU kernels of layer norm and rms norm, forward and backward: templates on the element type and on whether the row is
// centred (layer norm) or not (rms norm).
//
//   layer: xhat = (x - mean) * rstd     rms: xhat = x * rstd     y = xhat * weight + bias
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))  with g = dy * weight; rms norm lacks the middle term
//   dweight = sum over rows of dy * xhat     dbias = sum over rows of dy
//
// Forward: a row is read block by block, each block twice while it is in the L1 cache (sum, then squared deviations), blocks
// are merged by Chan's rule in double, and the row is read again from the L1 or L2 cache to be normalised. Memory sees one read and one write.
// Backward: four rows at a time. One sweep gives their row sums and adds their weight gradients to the chunk's partial sums,
// a second one, over the same rows in cache, stores dx. Memory sees two reads and one write.
// Determinism: chunks of rows, groups of four and blocks of columns depend on the shape only, so the order of every addition
// does too, whatever the number of threads.

#pragma once

#include "layer_norm.h"
#include "simd.h"

namespace fastreg::FASTREG_SIMD {

// Independent accumulators for each row's sum: a group has as many chains of additions as rows, a single row needs several of
// its own to hide an addition's latency.
constexpr int unroll_of(int group) { return group == 1 ? 4 : 1; }

template <class Pointer>
FASTREG_INLINE Pointer shifted(Pointer pointer, int64_t elements) {
  return pointer == nullptr ? nullptr : pointer + elements;
}

// The sum of `count` accumulators' lanes.
template <int count, class V>
FASTREG_INLINE double sum_accumulators(const V* accumulators) {
  if constexpr (count == 1) {
    return sum_lanes(accumulators[0]);
  } else if constexpr (sizeof(V) == sizeof(Vector<double>) && sizeof(accumulators[0][0]) == sizeof(double)) {
    static_assert(count == 4);
    return sum_lanes((accumulators[0] + accumulators[1]) + (accumulators[2] + accumulators[3]));
  } else {
    static_assert(count == 4);
    return sum_lanes((add_pairs(accumulators[0]) + add_pairs(accumulators[1])) +
                     (add_pairs(accumulators[2]) + add_pairs(accumulators[3])));
  }
}

// --- forward: one block -----------------------------------------------------------------------------------------------

// Moments of one block of columns of `group` rows, `stride` elements apart.
template <bool centred, int group, class Element>
FASTREG_INLINE void block_moments(const Element* input, int64_t stride, int64_t columns, Moments<double>* moments) {
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

template <bool centred, class Element>
FASTREG_INLINE void normalize_block(const Element* input, int64_t columns, Accumulator<Element> mean,
                                    Accumulator<Element> rstd, const Accumulator<Element>* weight,
                                    const Accumulator<Element>* bias, Element* output, bool streams) {
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

// --- forward: rows and tiles ------------------------------------------------------------------------------------------

template <bool centred, class Element>
FASTREG_INLINE void store_statistics(const NormForward& norm, int64_t row, const Moments<double>& moments) {
  using Scalar = Accumulator<Element>;
  if constexpr (centred) {
    static_cast<Scalar*>(norm.mean)[row] = static_cast<Scalar>(moments.mean);
  }
  static_cast<Scalar*>(norm.rstd)[row] =
      static_cast<Scalar>(reciprocal_deviation(moments.squares, moments.count, norm.eps));
}

// Columns [begin, end) of a row whose statistics are known.
template <bool centred, class Element>
FASTREG_INLINE void normalize_columns(const NormForward& norm, int64_t row, int64_t begin, int64_t end) {
  using Scalar = Accumulator<Element>;
  const Scalar mean = centred ? static_cast<const Scalar*>(norm.mean)[row] : Scalar(0);
  const Scalar rstd = static_cast<const Scalar*>(norm.rstd)[row];
  normalize_block<centred>(static_cast<const Element*>(norm.input) + row * norm.input_stride + begin, end - begin, mean, rstd,
                           shifted(static_cast<const Scalar*>(norm.weight), begin),
                           shifted(static_cast<const Scalar*>(norm.bias), begin),
                           static_cast<Element*>(norm.output) + row * norm.hidden + begin, norm.streams);
}

template <bool centred, class Element>
FASTREG_INLINE void forward_row(const NormForward& norm, int64_t row) {
  const Element* input = static_cast<const Element*>(norm.input) + row * norm.input_stride;
  Moments<double> moments{};
  for (int64_t column = 0; column < norm.hidden; column += columns_per_block) {
    const int64_t left = norm.hidden - column;
    Moments<double> block;
    block_moments<centred, 1>(input + column, 0, left < columns_per_block ? left : columns_per_block, &block);
    moments = merge(moments, block);
  }
  store_statistics<centred, Element>(norm, row, moments);
  normalize_columns<centred, Element>(norm, row, 0, norm.hidden);
}

template <bool centred, class Element>
FASTREG_INLINE void forward_group(const NormForward& norm, int64_t row) {
  const Element* input = static_cast<const Element*>(norm.input) + row * norm.input_stride;
  Moments<double> moments[rows_per_group];
  block_moments<centred, rows_per_group>(input, norm.input_stride, norm.hidden, moments);
  for (int r = 0; r < rows_per_group; ++r) {
    store_statistics<centred, Element>(norm, row + r, moments[r]);
  }
  for (int r = 0; r < rows_per_group; ++r) {
    normalize_columns<centred, Element>(norm, row + r, 0, norm.hidden);
  }
}

template <bool centred, class Element>
void forward_rows(const NormForward& norm, int64_t begin_row, int64_t end_row) {
  int64_t row = begin_row;
  if (norm.hidden <= columns_per_grouped_row) {
    for (; row + rows_per_group <= end_row; row += rows_per_group) {
      forward_group<centred, Element>(norm, row);
    }
  }
  for (; row < end_row; ++row) {
    forward_row<centred, Element>(norm, row);
  }
  if (norm.streams) {
    finish_streams();
  }
}

struct Tile {
  int64_t row;
  int64_t begin;
  int64_t end;
};

FASTREG_INLINE Tile tile_at(int64_t index, int64_t hidden) {
  const int64_t blocks = blocks_of(hidden);
  const int64_t begin = index % blocks * columns_per_block;
  const int64_t end = begin + columns_per_block;
  return {index / blocks, begin, end < hidden ? end : hidden};
}

template <bool centred, class Element>
void forward_moments(const NormForward& norm, Moments<double>* tiles, int64_t begin_tile, int64_t end_tile) {
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at(index, norm.hidden);
    const Element* input = static_cast<const Element*>(norm.input) + tile.row * norm.input_stride;
    block_moments<centred, 1>(input + tile.begin, 0, tile.end - tile.begin, tiles + index);
  }
}

template <bool centred, class Element>
void forward_statistics(const NormForward& norm, const Moments<double>* tiles) {
  for (int64_t row = 0; row < norm.rows; ++row) {
    Moments<double> moments{};
    for (int64_t block = 0; block < blocks_of(norm.hidden); ++block) {
      moments = merge(moments, *tiles++);
    }
    store_statistics<centred, Element>(norm, row, moments);
  }
}

template <bool centred, class Element>
void forward_normalize(const NormForward& norm, int64_t begin_tile, int64_t end_tile) {
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at(index, norm.hidden);
    normalize_columns<centred, Element>(norm, tile.row, tile.begin, tile.end);
  }
  if (norm.streams) {
    finish_streams();
  }
}

// --- backward: one block ----------------------------------------------------------------------------------------------

// `group` adjacent rows' columns from `begin` on: adds their weight gradients to the partial sums and, where dx is wanted,
// this block's row sums to `sums`.
template <bool centred, bool wants_input, int group, class Element>
FASTREG_INLINE void sum_block(const NormBackward& norm, int64_t row, int64_t begin, int64_t end,
                              Accumulator<Element>* weight_partial, Accumulator<Element>* bias_partial, RowSums* sums,
                              int64_t sums_stride) {
  using Scalar = Accumulator<Element>;
  constexpr int unroll = unroll_of(group);
  const Element* grad_output[group];
  const Element* input[group];
  Vector<Scalar> mean[group];
  Vector<Scalar> rstd[group];
  Vector<Scalar> projected[group * unroll] = {};
  Vector<Scalar> plain[group * unroll] = {};
  for (int r = 0; r < group; ++r) {
    grad_output[r] = static_cast<const Element*>(norm.grad_output) + (row + r) * norm.grad_output_stride + begin;
    input[r] = static_cast<const Element*>(norm.input) + (row + r) * norm.input_stride + begin;
    mean[r] = broadcast(centred ? static_cast<const Scalar*>(norm.mean)[row + r] : Scalar(0));
    rstd[r] = broadcast(static_cast<const Scalar*>(norm.rstd)[row + r]);
  }
  const Scalar* weight = shifted(static_cast<const Scalar*>(norm.weight), begin);
  weight_partial = shifted(weight_partial, begin);
  bias_partial = shifted(bias_partial, begin);

  for_columns<Scalar, unroll>(end - begin, [&](auto lanes, int64_t column, int k) {
    const Vector<Scalar> weights =
        wants_input && weight != nullptr ? lanes.load(weight + column) : broadcast(Scalar(1));
    Vector<Scalar> weight_gradient = {};
    Vector<Scalar> bias_gradient = {};
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vector<Scalar> dy = lanes.load(grad_output[r] + column);
      const Vector<Scalar> x = lanes.load(input[r] + column);
      const Vector<Scalar> xhat = (centred ? x - mean[r] : x) * rstd[r];
      if constexpr (wants_input) {
        const Vector<Scalar> g = dy * weights;
        projected[r * unroll + k] = multiply_add(g, xhat, projected[r * unroll + k]);
        if constexpr (centred) {
          plain[r * unroll + k] += g;
        }
      }
      weight_gradient = multiply_add(dy, xhat, weight_gradient);
      bias_gradient += dy;
    }
    if (weight_partial != nullptr) {
      lanes.store(weight_partial + column, lanes.load(weight_partial + column) + weight_gradient);
    }
    if (centred && bias_partial != nullptr) {
      lanes.store(bias_partial + column, lanes.load(bias_partial + column) + bias_gradient);
    }
  });

  if constexpr (wants_input) {
    for (int r = 0; r < group; ++r) {
      sums[r * sums_stride].projected += sum_accumulators<unroll>(projected + r * unroll);
      sums[r * sums_stride].plain += sum_accumulators<unroll>(plain + r * unroll);
    }
  }
}

// Columns [begin, end) of dx, of a row whose sums over all columns are known.
template <bool centred, class Element>
FASTREG_INLINE void apply_columns(const NormBackward& norm, int64_t row, int64_t begin, int64_t end, const RowSums& sums) {
  using Scalar = Accumulator<Element>;
  const Element* grad_output = static_cast<const Element*>(norm.grad_output) + row * norm.grad_output_stride + begin;
  const Element* input = static_cast<const Element*>(norm.input) + row * norm.input_stride + begin;
  const Scalar* weight = shifted(static_cast<const Scalar*>(norm.weight), begin);
  Element* grad_input = static_cast<Element*>(norm.grad_input) + row * norm.hidden + begin;
  const double rstd = double(static_cast<const Scalar*>(norm.rstd)[row]);
  const double scale = rstd / double(norm.hidden);
  const Vector<Scalar> means = broadcast(centred ? static_cast<const Scalar*>(norm.mean)[row] : Scalar(0));
  const Vector<Scalar> rstds = broadcast(static_cast<Scalar>(rstd));
  const Vector<Scalar> projected = broadcast(static_cast<Scalar>(sums.projected * scale));
  const Vector<Scalar> plain = broadcast(static_cast<Scalar>(sums.plain * scale));
  for_columns<Scalar, 2>(end - begin, [&](auto lanes, int64_t column, int) {
    Vector<Scalar> gradient = lanes.load(grad_output + column);
    const Vector<Scalar> x = lanes.load(input + column);
    if (weight != nullptr) {
      gradient *= lanes.load(weight + column);
    }
    const Vector<Scalar> xhat = (centred ? x - means : x) * rstds;
    const Vector<Scalar> removed = centred ? multiply_add(xhat, projected, plain) : xhat * projected;
    gradient = multiply_add(gradient, rstds, -removed);
    if (norm.streams) {
      lanes.stream(grad_input + column, gradient);
    } else {
      lanes.store(grad_input + column, gradient);
    }
  });
}

// --- backward: chunks of rows and tiles -------------------------------------------------------------------------------

struct Rows {
  int64_t begin;
  int64_t end;
};

FASTREG_INLINE Rows rows_of_chunk(const NormBackward& norm, int64_t chunk) {
  const int64_t begin = chunk * norm.rows_per_chunk;
  const int64_t end = begin + norm.rows_per_chunk;
  return {begin, end < norm.rows ? end : norm.rows};
}

// A chunk's partial sums, set to zero in columns [begin, end); null where they are not wanted.
template <class Scalar>
FASTREG_INLINE Scalar* cleared_partial(void* partials, const NormBackward& norm, int64_t chunk, int64_t begin, int64_t end) {
  if (partials == nullptr) {
    return nullptr;
  }
  Scalar* partial = static_cast<Scalar*>(partials) + chunk * norm.hidden;
  __builtin_memset(partial + begin, 0, static_cast<size_t>(end - begin) * sizeof(Scalar));
  return partial;
}

template <bool centred, bool wants_input, class Element>
void backward_chunk(const NormBackward& norm, int64_t chunk) {
  using Scalar = Accumulator<Element>;
  Scalar* weight_partial = cleared_partial<Scalar>(norm.weight_partials, norm, chunk, 0, norm.hidden);
  Scalar* bias_partial = cleared_partial<Scalar>(norm.bias_partials, norm, chunk, 0, norm.hidden);
  const auto group_of_rows = [&]<int group>(int64_t row) {
    RowSums sums[group] = {};
    for (int64_t begin = 0; begin < norm.hidden; begin += columns_per_block) {
      const int64_t end = begin + columns_per_block < norm.hidden ? begin + columns_per_block : norm.hidden;
      sum_block<centred, wants_input, group, Element>(norm, row, begin, end, weight_partial, bias_partial, sums, 1);
    }
    if constexpr (wants_input) {
      for (int r = 0; r < group; ++r) {
        apply_columns<centred, Element>(norm, row + r, 0, norm.hidden, sums[r]);
      }
    }
  };
  const Rows rows = rows_of_chunk(norm, chunk);
  int64_t row = rows.begin;
  for (; row + rows_per_group <= rows.end; row += rows_per_group) {
    group_of_rows.template operator()<rows_per_group>(row);
  }
  for (; row < rows.end; ++row) {
    group_of_rows.template operator()<1>(row);
  }
}

template <bool centred, class Element>
void backward_chunks(const NormBackward& norm, int64_t begin_chunk, int64_t end_chunk) {
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    if (norm.grad_input != nullptr) {
      backward_chunk<centred, true, Element>(norm, chunk);
    } else {
      backward_chunk<centred, false, Element>(norm, chunk);
    }
  }
  if (norm.streams) {
    finish_streams();
  }
}

template <bool centred, bool wants_input, class Element>
void sum_tile(const NormBackward& norm, const Tile& tile, RowSums* tiles) {
  using Scalar = Accumulator<Element>;
  const int64_t chunk = tile.row;
  Scalar* weight_partial = cleared_partial<Scalar>(norm.weight_partials, norm, chunk, tile.begin, tile.end);
  Scalar* bias_partial = cleared_partial<Scalar>(norm.bias_partials, norm, chunk, tile.begin, tile.end);
  const int64_t blocks = blocks_of(norm.hidden);
  const Rows rows = rows_of_chunk(norm, chunk);
  const auto group_of_rows = [&]<int group>(int64_t row) {
    RowSums* sums = nullptr;
    if constexpr (wants_input) {
      sums = tiles + row * blocks + tile.begin / columns_per_block;
      for (int r = 0; r < group; ++r) {
        sums[r * blocks] = {};
      }
    }
    sum_block<centred, wants_input, group, Element>(norm, row, tile.begin, tile.end, weight_partial, bias_partial, sums,
                                                    blocks);
  };
  int64_t row = rows.begin;
  for (; row + rows_per_group <= rows.end; row += rows_per_group) {
    group_of_rows.template operator()<rows_per_group>(row);
  }
  for (; row < rows.end; ++row) {
    group_of_rows.template operator()<1>(row);
  }
}

template <bool centred, class Element>
void backward_sums(const NormBackward& norm, RowSums* tiles, int64_t begin_tile, int64_t end_tile) {
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at(index, norm.hidden);
    if (norm.grad_input != nullptr) {
      sum_tile<centred, true, Element>(norm, tile, tiles);
    } else {
      sum_tile<centred, false, Element>(norm, tile, tiles);
    }
  }
}

template <bool centred, class Element>
void backward_apply(const NormBackward& norm, const RowSums* tiles, int64_t begin_tile, int64_t end_tile) {
  const int64_t blocks = blocks_of(norm.hidden);
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at(index, norm.hidden);
    RowSums sums{};
    for (int64_t block = 0; block < blocks; ++block) {
      sums.projected += tiles[tile.row * blocks + block].projected;
      sums.plain += tiles[tile.row * blocks + block].plain;
    }
    apply_columns<centred, Element>(norm, tile.row, tile.begin, tile.end, sums);
  }
  if (norm.streams) {
    finish_streams();
  }
}

// --- the table --------------------------------------------------------------------------------------------------------

template <bool centred, class Element>
constexpr NormKernels norm_kernels() {
  return {forward_rows<centred, Element>,      forward_moments<centred, Element>, forward_statistics<centred, Element>,
          forward_normalize<centred, Element>, backward_chunks<centred, Element>, backward_sums<centred, Element>,
          backward_apply<centred, Element>};
}

}  // namespace fastreg::FASTREG_SIMD
