// y = activation(fma(x - mean, scale, bias) + residual), and the bits that stand for the activation's derivative.
//
// One sweep: reads input and residual once, writes the output once.

#pragma once

#include "batch_norm_common.simd.h"
#include "batch_norm_runs.simd.h"

namespace fastreg::FASTREG_SIMD {

// Activations by what their code needs: nothing, a comparison, or a formula.
enum class ActivationKind { none, sign, smooth };

// mean, scale and bias of a line, from which z is made: equal instructions in both directions, so that equal signs.
template <bool rows, class Scalar>
struct Affine {
  ChannelValues<rows, Scalar> mean;
  ChannelValues<rows, Scalar> scale;
  ChannelValues<rows, Scalar> bias;

  FASTREG_INLINE Affine(const BatchNorm& norm, const Line& line)
      : mean(norm.mean, line.channel), scale(norm.scale, line.channel), bias(norm.bias, line.channel) {}

  struct Values {
    Vector<Scalar> mean;
    Vector<Scalar> scale;
    Vector<Scalar> bias;

    FASTREG_INLINE Vector<Scalar> argument(Vector<Scalar> centred) const {
      return fused_multiply_add(centred, scale, bias);
    }
  };

  template <class Lanes>
  FASTREG_INLINE Values at(Lanes lanes, int64_t column) const {
    return {mean.at(lanes, column), scale.at(lanes, column), bias.at(lanes, column)};
  }
};

// The activation, and what its code needs in registers.
template <class V>
struct Activating {
  Activation activation;
  bool is_relu;
  V negative_slope;

  FASTREG_INLINE explicit Activating(const BatchNorm& norm)
      : activation(norm.activation),
        is_relu(norm.activation == Activation::relu),
        negative_slope(constant<V>(norm.negative_slope)) {}

  // Where the derivative of relu or leaky_relu is 1.
  FASTREG_INLINE LaneMask<V> is_one_at(V z) const { return is_relu ? is_positive_or_nan(z) : is_positive(z); }

  template <ActivationKind kind>
  FASTREG_INLINE V apply(V z) const {
    if constexpr (kind == ActivationKind::none) {
      return z;
    } else if constexpr (kind == ActivationKind::sign) {
      // Not z * 0 for relu: z may be infinite.
      return select(is_one_at(z), z, is_relu ? V{} : z * negative_slope);
    } else {
      return activate_smooth(activation, z);
    }
  }
};

// How an output is written.
struct Writer {
  bool streams;

  template <class Lanes, class Element>
  FASTREG_INLINE void operator()(Lanes lanes, Element* target, Vector<Accumulator<Element>> value) const {
    if (streams) {
      lanes.stream(target, value);
    } else {
      lanes.store(target, value);
    }
  }
};

template <ActivationKind kind, bool rows, int group, class Element>
FASTREG_INLINE void normalize_lines(const BatchNorm& norm, const Line& line, const Ahead& input_ahead,
                                    const Ahead& ahead) {
  using Scalar = Accumulator<Element>;
  using V = Vector<Scalar>;
  const auto input = lines_of<group, Element>(norm.input, line, input_ahead);
  const auto residual = lines_of<group, Element>(norm.residual, line, ahead);
  const auto output = lines_of<group, rows, Element>(norm.output, norm.geometry, line);
  const auto signs = signs_of<group>(norm.output_signs, line);
  const Affine<rows, Scalar> affine(norm, line);
  const Activating<V> activating(norm);
  const Writer write{lines_stream<rows, Element>(norm)};
  constexpr int unroll = kind == ActivationKind::smooth ? 1 : group == 1 ? 2 : vectors_per_step<Element>;
  map_columns<Scalar, unroll>(
      line.elements, [&](auto lanes, int64_t column, int k) {
        input.prefetch(column, k);
        if (residual) {
          residual.prefetch(column, k);
        }
        const auto at = affine.at(lanes, column);
        // All loads before all stores: rows may lie a multiple of 4096 bytes apart.
        V z[group];
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          z[r] = at.argument(lanes.load(input[r] + column) - at.mean);
          if (residual) {
            z[r] += lanes.load(residual[r] + column);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          if constexpr (kind == ActivationKind::sign) {
            if (signs) {
              store_bits<Scalar>(lanes, signs[r], column, bits_of<V>(activating.is_one_at(z[r])));
            }
          }
          write(lanes, output[r] + column, activating.template apply<kind>(z[r]));
        }
      });
}

template <bool rows, class Element, ActivationKind kind>
FASTREG_INLINE void normalize_tile(const BatchNorm& norm, const BatchNormTile& tile) {
  const Ahead ahead = Ahead::of<Element>(norm.geometry, tile);
  // What the first sweep has read is in the caches: of planes this tile, of rows all that is not too large.
  const Ahead input_ahead = !rows          ? Ahead::next_planes<Element>(norm.geometry, tile)
                            : norm.streams ? ahead
                                           : Ahead::nothing();
  for_lines<rows, kind == ActivationKind::smooth ? 1 : rows_per_group>(
      norm.geometry, tile,
      [&]<int group>(const Line& line) {
        normalize_lines<kind, rows, group, Element>(norm, line, input_ahead, ahead);
      },
      one_by_one<rows, Element>(norm));
}

template <class Element, ActivationKind kind>
void normalize_runs(const BatchNorm& norm, const BatchNormTile& tile) {
  using Scalar = Accumulator<Element>;
  const int64_t spatial = norm.geometry.spatial;
  const Ahead ahead = Ahead::of<Element>(norm.geometry, tile);
  const Ahead next = Ahead::next_planes<Element>(norm.geometry, tile);
  Repeated<Scalar> mean;
  Repeated<Scalar> scale;
  Repeated<Scalar> bias;
  RunSigns<rows_per_group> signs;
  BatchNorm run = run_problem<Element>(norm, tile);
  run.mean = mean(norm.mean, tile, spatial);
  run.scale = scale(norm.scale, tile, spatial);
  run.bias = bias(norm.bias, tile, spatial);
  run.output_signs = norm.output_signs == nullptr ? nullptr : signs.data();
  for_runs<rows_per_group>(norm.geometry, tile, signs.stride, [&]<int group>(const Line& line) {
    normalize_lines<kind, true, group, Element>(run, line, next, ahead);
    if (norm.output_signs != nullptr) {
      signs.to_planes(norm.geometry, tile, line.outer, group, norm.output_signs);
    }
  });
}

template <bool rows, class Element>
void normalize(const BatchNorm& norm, const BatchNormTile& tile) {
  const auto sweep = [&]<ActivationKind kind>() {
    if constexpr (!rows && kind != ActivationKind::smooth) {
      if (is_run(norm.geometry, tile)) {
        return normalize_runs<Element, kind>(norm, tile);
      }
    }
    normalize_tile<rows, Element, kind>(norm, tile);
  };
  if (norm.activation == Activation::identity) {
    sweep.template operator()<ActivationKind::none>();
  } else if (needs_sign_only(norm.activation)) {
    sweep.template operator()<ActivationKind::sign>();
  } else {
    sweep.template operator()<ActivationKind::smooth>();
  }
  if (norm.streams) {
    finish_streams();
  }
}

}  // namespace fastreg::FASTREG_SIMD
