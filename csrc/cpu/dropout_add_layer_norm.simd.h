// Dropout and a residual in front of layer norm and rms norm: what makes the rows that the forward kernels read, and
// where the backward kernels put the rows' gradient.
//
//   sum = residual + (keep ? input * row_scale * layer_scale * scale : 0)
//   total = dx of the norm over sum + grad_sum          dresidual = total
//   dinput = keep ? total * row_scale * layer_scale * scale : 0
//   dlayer_scale = sum over rows of keep ? total * row_scale * scale * input : 0
//
// A block of the sum is made just before its moments are taken, rounded to its type, in the place where it is kept or,
// past the caches, in a buffer that stays in them; there the norm reads it. Memory sees two reads and two writes, or
// one where the sum is not kept; backward three reads and two writes, and one read more for layer_scale. The mask is
// made twice from the seed, 512 elements at a time.

#pragma once

#include "dropout_add_layer_norm.h"
#include "dropout_apply.simd.h"
#include "layer_norm_backward.simd.h"
#include "layer_norm_forward.simd.h"

namespace fastreg::FASTREG_SIMD {

// --- mask --------------------------------------------------------------------------------------------------

struct MaskPiece {
  int64_t begin;  // elements from the beginning of the walk
  int64_t count;
  const KeepLane* lanes;
};

// Which elements are kept, for walks over them that mostly go on where the last one ended: short rows share a piece.
class ElementKeeper {
 public:
  FASTREG_INLINE explicit ElementKeeper(const DropoutBranch& branch)
      : draws_(branch.rule == KeepRule::elements), threshold_(branch.threshold), stream_(branch.seed) {
    // All or none is a mask as well: loops over columns then need not ask.
    for (KeepLane& lane : lanes_) {
      lane = branch.rule == KeepRule::none ? KeepLane(0) : KeepLane(0xffff);
    }
  }
  ElementKeeper(const ElementKeeper&) = delete;
  ElementKeeper& operator=(const ElementKeeper&) = delete;

  // Calls body(piece) for the pieces of `count` elements from `position` on.
  template <class Body>
  FASTREG_INLINE void walk(int64_t position, int64_t count, const Body& body) {
    for (int64_t done = 0; done < count;) {
      const int64_t from = position + done;
      if (from < begin_ || from >= begin_ + tile) {
        begin_ = from;
        if (draws_) {
          begin_ -= from % philox_half_lanes;
          keep_half_lanes(stream_, static_cast<uint64_t>(begin_ / philox_half_lanes), tile, threshold_, lanes_);
        }
      }
      const int64_t room = begin_ + tile - from;
      const MaskPiece piece{done, room < count - done ? room : count - done, lanes_ + (from - begin_)};
      body(piece);
      done += piece.count;
    }
  }

 private:
  static constexpr int64_t tile = 512;
  static_assert(tile % half_lanes_per_step == 0);

  bool draws_;
  uint16_t threshold_;
  PhiloxStream stream_;
  int64_t begin_ = -tile;
  // Whole vectors are read from anywhere.
  alignas(64) KeepLane lanes_[tile + lanes_of<uint16_t>];
};

template <class Scalar>
FASTREG_INLINE Scalar scale_of_row(const DropoutBranch& branch, int64_t row) {
  if (branch.row_scale == nullptr) {
    return Scalar(1);
  }
  const int64_t index = branch.rows_per_scale == 1 ? row : row / branch.rows_per_scale;
  return static_cast<const Scalar*>(branch.row_scale)[index];
}

// Asks for `count` elements of a row from `column` on: the processor itself looks ahead only while it loads, and here
// it computes most of the time. Makes forward 5 to 15 % faster in fp32.
template <class Element>
FASTREG_INLINE void prefetch(const void* rows, int64_t row, int64_t stride, int64_t column, int64_t count) {
  const char* const first = reinterpret_cast<const char*>(static_cast<const Element*>(rows) + row * stride + column);
  for (int64_t offset = 0; offset < count * int64_t{sizeof(Element)}; offset += 64) {
    __builtin_prefetch(first + offset);
  }
}

// Up to this size the rows that backward asks for stay in the L1 cache until it comes to them, and it is a tenth
// faster; of longer ones a tenth slower.
constexpr int64_t near_bytes = int64_t{24} << 10;

template <class In, class Norm>
FASTREG_INLINE bool looks_ahead(const Norm& norm, const DropoutBranch& branch) {
  return branch.rule == KeepRule::elements && norm.rows * norm.hidden * int64_t{sizeof(In)} >= far_bytes;
}

// --- forward -----------------------------------------------------------------------------------------------

// Rows that are made where the norm reads them.
template <class In, class Sum>
class SummedRows {
 public:
  using Element = Sum;
  using Scalar = Accumulator<Sum>;

  FASTREG_INLINE explicit SummedRows(const DropoutAddNormForward& norm)
      : norm_(norm), prefetches_(looks_ahead<In>(norm, norm.branch)), keeper_(norm.branch) {}

  FASTREG_INLINE Element* at(int64_t row) const {
    return norm_.buffer != nullptr ? static_cast<Sum*>(norm_.buffer)
                                   : static_cast<Sum*>(norm_.sum) + row * norm_.hidden;
  }
  FASTREG_INLINE int64_t stride() const { return norm_.hidden; }

  [[gnu::noinline]] void make(int64_t row, int count, int64_t begin, int64_t end) {
    for (int r = 0; r < count; ++r) {
      Sum* const target = at(row) + r * stride() + begin;
      keeper_.walk((row + r) * norm_.hidden + begin, end - begin, [&](const MaskPiece& piece) {
        const int64_t column = begin + piece.begin;
        if (prefetches_) {
          prefetch<In>(norm_.branch.input, row + r + count, norm_.branch.input_stride, column, piece.count);
        }
        if constexpr (sizeof(In) < sizeof(Sum)) {
          if (!norm_.wide_residual) {
            return add<In>(row + r, count, column, piece, target + piece.begin);
          }
        }
        add<Sum>(row + r, count, column, piece, target + piece.begin);
      });
    }
  }

 private:
  template <class Residual>
  FASTREG_INLINE void add(int64_t row, int64_t ahead, int64_t begin, const MaskPiece& piece, Sum* target) const {
    if (prefetches_ && norm_.residual != nullptr) {
      prefetch<Residual>(norm_.residual, row + ahead, norm_.residual_stride, begin, piece.count);
    }
    const DropoutBranch& branch = norm_.branch;
    const In* const input = static_cast<const In*>(branch.input) + row * branch.input_stride + begin;
    const Residual* const residual =
        shifted(static_cast<const Residual*>(norm_.residual), row * norm_.residual_stride + begin);
    const Scalar* const layer_scale = shifted(static_cast<const Scalar*>(branch.layer_scale), begin);
    const Vector<Scalar> row_scale = broadcast(scale_of_row<Scalar>(branch, row));
    const Vector<Scalar> scale = broadcast(static_cast<Scalar>(branch.scale));
    Sum* const sum = norm_.streams_sum ? static_cast<Sum*>(norm_.sum) + row * norm_.hidden + begin : nullptr;
    for_columns<Scalar, 4>(piece.count, [&](auto lanes, int64_t column, int) {
      // In the order of dropout's own kernels, so that the sum is theirs to the bit.
      Vector<Scalar> values = lanes.load(input + column);
      values *= layer_scale == nullptr ? row_scale : lanes.load(layer_scale + column) * row_scale;
      values *= scale;
      values = select(keep_mask<Vector<Scalar>>(piece.lanes + column), values, Vector<Scalar>{});
      if (residual != nullptr) {
        values += lanes.load(residual + column);
      }
      lanes.store(target + column, values);
      if (sum != nullptr) {
        lanes.stream(sum + column, values);
      }
    });
  }

  const DropoutAddNormForward& norm_;
  const bool prefetches_;
  ElementKeeper keeper_;
};

template <bool centred, class In, class Sum>
void forward_summed_rows(const DropoutAddNormForward& norm, int64_t begin_row, int64_t end_row) {
  SummedRows<In, Sum> rows(norm);
  forward_all<centred, In>(norm, rows, begin_row, end_row);
  if (norm.streams_sum) {
    finish_streams();
  }
}

template <bool centred, class In, class Sum>
void forward_summed_moments(const DropoutAddNormForward& norm, Moments<double>* tiles, int64_t begin_tile,
                            int64_t end_tile) {
  SummedRows<In, Sum> rows(norm);
  tile_moments<centred>(norm, rows, tiles, begin_tile, end_tile);
}

// --- backward ----------------------------------------------------------------------------------------------

// dx goes on to the residual and, through the mask and the scales, to the branch.
template <bool is_centred, class In, class Sum>
class BranchedGradient {
 public:
  static constexpr bool centred = is_centred;
  using Element = Sum;
  using Grad = In;
  using Scalar = Accumulator<Sum>;

  FASTREG_INLINE explicit BranchedGradient(const DropoutAddNormBackward& norm)
      : norm_(norm),
        prefetches_(looks_ahead<In>(norm, norm.branch) &&
                    rows_per_group * norm.hidden * int64_t{sizeof(In) + sizeof(Sum)} <= near_bytes),
        keeper_(norm.branch) {}

  // The partial sums of this chunk are those that are added to from now on; they are zero in columns [begin, end).
  FASTREG_INLINE void begin_chunk(int64_t chunk, int64_t begin, int64_t end) {
    layer_scale_partial_ = cleared_partial<Scalar>(norm_.layer_scale_partials, norm_, chunk, begin, end);
  }

  [[gnu::noinline]] void apply(int64_t row, int64_t begin, int64_t end, const RowSums& sums) {
    if (norm_.grad_input == nullptr && layer_scale_partial_ == nullptr) {
      return apply_piece<false, false>(row, begin, MaskPiece{0, end - begin, nullptr}, sums);
    }
    keeper_.walk(row * norm_.hidden + begin, end - begin, [&](const MaskPiece& piece) {
      if (prefetches_) {
        const int64_t column = begin + piece.begin;
        prefetch<In>(norm_.grad_output, row + rows_per_group, norm_.grad_output_stride, column, piece.count);
        prefetch<Sum>(norm_.input, row + rows_per_group, norm_.input_stride, column, piece.count);
      }
      if (layer_scale_partial_ == nullptr) {
        apply_piece<true, false>(row, begin + piece.begin, piece, sums);
      } else {
        apply_piece<true, true>(row, begin + piece.begin, piece, sums);
      }
    });
  }

 private:
  template <bool wants_branch, bool wants_layer_scale>
  FASTREG_INLINE void apply_piece(int64_t row, int64_t begin, const MaskPiece& piece, const RowSums& sums) const {
    const DropoutBranch& branch = norm_.branch;
    const Sum* const grad_sum =
        shifted(static_cast<const Sum*>(norm_.grad_sum), row * norm_.grad_sum_stride + begin);
    Sum* const grad_residual = shifted(static_cast<Sum*>(norm_.grad_residual), row * norm_.hidden + begin);
    In* const grad_input = shifted(static_cast<In*>(norm_.grad_input), row * norm_.hidden + begin);
    const In* const input = shifted(static_cast<const In*>(branch.input), row * branch.input_stride + begin);
    const Scalar* const layer_scale = shifted(static_cast<const Scalar*>(branch.layer_scale), begin);
    Scalar* const partial = shifted(layer_scale_partial_, begin);
    const Vector<Scalar> row_scale = broadcast(scale_of_row<Scalar>(branch, row));
    const Vector<Scalar> scale = broadcast(static_cast<Scalar>(branch.scale));
    const bool streams = norm_.streams;
    const bool streams_residual = norm_.streams_residual;
    apply_columns<centred, Sum, In>(
        norm_, row, begin, begin + piece.count, sums, [&](auto lanes, int64_t column, Vector<Scalar> gradient) {
          if (grad_sum != nullptr) {
            gradient += lanes.load(grad_sum + column);
          }
          if (grad_residual != nullptr) {
            put(streams_residual, lanes, grad_residual + column, gradient);
          }
          if constexpr (wants_branch) {
            const LaneMask<Vector<Scalar>> kept = keep_mask<Vector<Scalar>>(piece.lanes + column);
            if constexpr (wants_layer_scale) {
              const Vector<Scalar> terms = gradient * row_scale * scale * lanes.load(input + column);
              lanes.store(partial + column,
                          lanes.load(partial + column) + select(kept, terms, Vector<Scalar>{}));
            }
            if (!wants_layer_scale || grad_input != nullptr) {
              gradient *= layer_scale == nullptr ? row_scale : lanes.load(layer_scale + column) * row_scale;
              put(streams, lanes, grad_input + column, select(kept, gradient * scale, Vector<Scalar>{}));
            }
          }
        });
  }

  const DropoutAddNormBackward& norm_;
  const bool prefetches_;
  Scalar* layer_scale_partial_ = nullptr;
  ElementKeeper keeper_;
};

FASTREG_INLINE void finish_streams(const DropoutAddNormBackward& norm) {
  if (norm.streams || norm.streams_residual) {
    finish_streams();
  }
}

template <bool centred, class In, class Sum>
void backward_branched_chunks(const DropoutAddNormBackward& norm, int64_t begin_chunk, int64_t end_chunk) {
  BranchedGradient<centred, In, Sum> target(norm);
  const bool wants_rows =
      norm.grad_input != nullptr || norm.grad_residual != nullptr || norm.layer_scale_partials != nullptr;
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    if (wants_rows) {
      target.begin_chunk(chunk, 0, norm.hidden);
      backward_chunk<true>(norm, target, chunk);
    } else {
      backward_chunk<false>(norm, target, chunk);
    }
  }
  finish_streams(norm);
}

template <bool centred, class In, class Sum>
void backward_branched_apply(const DropoutAddNormBackward& norm, const RowSums* tiles, int64_t begin_tile,
                             int64_t end_tile) {
  BranchedGradient<centred, In, Sum> target(norm);
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const Tile tile = tile_at<Sum>(index, norm.hidden);
    const Rows rows = rows_of_chunk(norm, tile.row);
    target.begin_chunk(tile.row, tile.begin, tile.end);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      target.apply(row, tile.begin, tile.end, sums_of_row(tiles, blocks_of<Sum>(norm.hidden), row));
    }
  }
  finish_streams(norm);
}

// --- table -------------------------------------------------------------------------------------------------

template <bool centred, class In, class Sum>
constexpr DropoutAddNormKernels dropout_add_norm_kernels() {
  return {columns_per_block<Sum>,
          columns_per_grouped_row<Sum>,
          forward_summed_rows<centred, In, Sum>,
          forward_summed_moments<centred, In, Sum>,
          forward_statistics<centred, Sum>,
          forward_normalize<centred, Sum, In>,
          backward_branched_chunks<centred, In, Sum>,
          backward_sums<centred, Sum, In>,
          backward_branched_apply<centred, In, Sum>};
}

}  // namespace fastreg::FASTREG_SIMD
