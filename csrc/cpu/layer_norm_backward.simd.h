// Backward kernels of layer norm (centred) and rms norm.
//
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))  with g = dy * weight; rms norm lacks the middle term
//   dweight = sum over rows of dy * xhat     dbias = sum over rows of dy
//
// Four rows at a time: one sweep gives their row sums and adds their weight gradients to the partial sums of
// their chunk of rows, a second one, over the same rows in cache, stores dx. Memory sees two reads and one
// write.
//
// `Element` is the type of the rows, `Grad` that of dy. Where dx goes is a parameter: to memory, or on into what
// made the rows (dropout_add_layer_norm.simd.h).

#pragma once

#include "layer_norm_common.simd.h"

namespace fastreg::FASTREG_SIMD {

// --- backward: one block -----------------------------------------------------------------------------------

// `group` adjacent rows' columns from `begin` on: adds their weight gradients to the partial sums and, where
// dx is wanted, this block's row sums to `sums`.
template <bool centred, bool wants_input, int group, class Element, class Grad>
FASTREG_INLINE void sum_block(const NormBackward& norm, int64_t row, int64_t begin, int64_t end,
                              Accumulator<Element>* weight_partial, Accumulator<Element>* bias_partial,
                              RowSums* sums, int64_t sums_stride) {
  using Scalar = Accumulator<Element>;
  constexpr int unroll = unroll_of(group);
  const Grad* grad_output[group];
  const Element* input[group];
  Vector<Scalar> mean[group];
  Vector<Scalar> rstd[group];
  Vector<Scalar> projected[group * unroll] = {};
  Vector<Scalar> plain[group * unroll] = {};
  for (int r = 0; r < group; ++r) {
    grad_output[r] = static_cast<const Grad*>(norm.grad_output) + (row + r) * norm.grad_output_stride + begin;
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
    Vector<Scalar> dy[group];
    Vector<Scalar> xhat[group];
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vector<Scalar> x = lanes.load(input[r] + column);
      dy[r] = lanes.load(grad_output[r] + column);
      xhat[r] = (centred ? x - mean[r] : x) * rstd[r];
      if constexpr (wants_input) {
        const Vector<Scalar> g = dy[r] * weights;
        projected[r * unroll + k] = multiply_add(g, xhat[r], projected[r * unroll + k]);
        if constexpr (centred) {
          plain[r * unroll + k] += g;
        }
      }
    }
    if (weight_partial != nullptr) {
      Vector<Scalar> gradient = dy[0] * xhat[0];
#pragma GCC unroll 4
      for (int r = 1; r < group; ++r) {
        gradient = multiply_add(dy[r], xhat[r], gradient);
      }
      lanes.store(weight_partial + column, lanes.load(weight_partial + column) + gradient);
    }
    if (centred && bias_partial != nullptr) {
      Vector<Scalar> gradient = dy[0];
#pragma GCC unroll 4
      for (int r = 1; r < group; ++r) {
        gradient += dy[r];
      }
      lanes.store(bias_partial + column, lanes.load(bias_partial + column) + gradient);
    }
  });

  if constexpr (wants_input) {
    for (int r = 0; r < group; ++r) {
      sums[r * sums_stride].projected += sum_accumulators<unroll>(projected + r * unroll);
      sums[r * sums_stride].plain += sum_accumulators<unroll>(plain + r * unroll);
    }
  }
}

// Calls put(lanes, column, gradient) for columns [begin, end) of dx, which it counts from 0 on, of a row whose sums
// over all columns are known.
template <bool centred, class Element, class Grad, class Put>
FASTREG_INLINE void apply_columns(const NormBackward& norm, int64_t row, int64_t begin, int64_t end,
                                  const RowSums& sums, const Put& put) {
  using Scalar = Accumulator<Element>;
  const Grad* grad_output =
      static_cast<const Grad*>(norm.grad_output) + row * norm.grad_output_stride + begin;
  const Element* input = static_cast<const Element*>(norm.input) + row * norm.input_stride + begin;
  const Scalar* weight = shifted(static_cast<const Scalar*>(norm.weight), begin);
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
    put(lanes, column, multiply_add(gradient, rstds, -removed));
  });
}

// dx goes to memory.
template <bool is_centred, class Row>
struct StoredGradient {
  static constexpr bool centred = is_centred;
  using Element = Row;
  using Grad = Row;
  const NormBackward& norm;

  FASTREG_INLINE void apply(int64_t row, int64_t begin, int64_t end, const RowSums& sums) {
    Element* grad_input = static_cast<Element*>(norm.grad_input) + row * norm.hidden + begin;
    const bool streams = norm.streams;
    apply_columns<centred, Element, Grad>(norm, row, begin, end, sums,
                                          [&](auto lanes, int64_t column, Vector<Accumulator<Element>> gradient) {
                                            if (streams) {
                                              lanes.stream(grad_input + column, gradient);
                                            } else {
                                              lanes.store(grad_input + column, gradient);
                                            }
                                          });
  }
};

// --- backward: chunks of rows and tiles --------------------------------------------------------------------

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
FASTREG_INLINE Scalar* cleared_partial(void* partials, const NormBackward& norm, int64_t chunk, int64_t begin,
                                       int64_t end) {
  if (partials == nullptr) {
    return nullptr;
  }
  Scalar* partial = static_cast<Scalar*>(partials) + chunk * norm.hidden;
  __builtin_memset(partial + begin, 0, static_cast<size_t>(end - begin) * sizeof(Scalar));
  return partial;
}

// `target` takes dx, where it is wanted.
template <bool wants_input, class Target>
FASTREG_INLINE void backward_chunk(const NormBackward& norm, Target& target, int64_t chunk) {
  using Element = typename Target::Element;
  using Scalar = Accumulator<Element>;
  Scalar* weight_partial = cleared_partial<Scalar>(norm.weight_partials, norm, chunk, 0, norm.hidden);
  Scalar* bias_partial = cleared_partial<Scalar>(norm.bias_partials, norm, chunk, 0, norm.hidden);
  const auto group_of_rows = [&]<int group>(int64_t row) {
    RowSums sums[group] = {};
    for (int64_t begin = 0; begin < norm.hidden; begin += columns_per_block<Element>) {
      const int64_t end = end_of_block<Element>(begin, norm.hidden);
      sum_block<Target::centred, wants_input, group, Element, typename Target::Grad>(
          norm, row, begin, end, weight_partial, bias_partial, sums, 1);
    }
    if constexpr (wants_input) {
      for (int r = 0; r < group; ++r) {
        target.apply(row + r, 0, norm.hidden, sums[r]);
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
  StoredGradient<centred, Element> target{norm};
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    if (norm.grad_input != nullptr) {
      backward_chunk<true>(norm, target, chunk);
    } else {
      backward_chunk<false>(norm, target, chunk);
    }
  }
  if (norm.streams) {
    finish_streams();
  }
}

template <bool centred, bool wants_input, class Element, class Grad>
void sum_tile(const NormBackward& norm, const Tile& tile, RowSums* tiles) {
  using Scalar = Accumulator<Element>;
  const int64_t chunk = tile.row;
  Scalar* weight_partial = cleared_partial<Scalar>(norm.weight_partials, norm, chunk, tile.begin, tile.end);
  Scalar* bias_partial = cleared_partial<Scalar>(norm.bias_partials, norm, chunk, tile.begin, tile.end);
  const int64_t blocks = blocks_of<Element>(norm.hidden);
  const Rows rows = rows_of_chunk(norm, chunk);
  const auto group_of_rows = [&]<int group>(int64_t row) {
    RowSums* sums = nullptr;
    if constexpr (wants_input) {
      sums = tiles + row * blocks + tile.begin / columns_per_block<Element>;
      for (int r = 0; r < group; ++r) {
        sums[r * blocks] = {};
      }
    }
    sum_block<centred, wants_input, group, Element, Grad>(norm, row, tile.begin, tile.end, weight_partial,
                                                          bias_partial, sums, blocks);
  };
  int64_t row = rows.begin;
  for (; row + rows_per_group <= rows.end; row += rows_per_group) {
    group_of_rows.template operator()<rows_per_group>(row);
  }
  for (; row < rows.end; ++row) {
    group_of_rows.template operator()<1>(row);
  }
}

template <bool centred, class Element, class Grad>
void backward_sums(const NormBackward& norm, RowSums* tiles, int64_t begin_tile, int64_t end_tile) {
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at<Element>(index, norm.hidden);
    if (tiles != nullptr) {
      sum_tile<centred, true, Element, Grad>(norm, tile, tiles);
    } else {
      sum_tile<centred, false, Element, Grad>(norm, tile, tiles);
    }
  }
}

// The sums of a row, of those of its `blocks` tiles.
FASTREG_INLINE RowSums sums_of_row(const RowSums* tiles, int64_t blocks, int64_t row) {
  RowSums sums{};
  for (int64_t block = 0; block < blocks; ++block) {
    sums.projected += tiles[row * blocks + block].projected;
    sums.plain += tiles[row * blocks + block].plain;
  }
  return sums;
}

template <bool centred, class Element>
void backward_apply(const NormBackward& norm, const RowSums* tiles, int64_t begin_tile, int64_t end_tile) {
  StoredGradient<centred, Element> target{norm};
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at<Element>(index, norm.hidden);
    target.apply(tile.row, tile.begin, tile.end, sums_of_row(tiles, blocks_of<Element>(norm.hidden), tile.row));
  }
  if (norm.streams) {
    finish_streams();
  }
}

}  // namespace fastreg::FASTREG_SIMD
