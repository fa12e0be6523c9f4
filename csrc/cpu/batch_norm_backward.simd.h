// Backward kernels:
//
//   dz = dy * activation'(z)      grad_bias = sum of dz      grad_weight = sum of dz * xhat
//   grad_residual = dz            grad_input = scale * (dz - mean of dz - xhat * mean of dz * xhat)
//
// dz comes from dy alone, from a bit an element, from z, which is made again from input (and residual), or from where
// the first sweep has kept it. Two sweeps, each reading dy (or what was kept) and input; the second writes the
// gradients.

#pragma once

#include "batch_norm_forward.simd.h"
#include "batch_norm_moments.simd.h"

namespace fastreg::FASTREG_SIMD {

enum class GradientKind { plain, bits, sign, smooth, kept };

FASTREG_INLINE GradientKind gradient_kind(const BatchNorm& norm) {
  if (norm.activation == Activation::identity) {
    return GradientKind::plain;
  }
  if (norm.signs != nullptr) {
    return GradientKind::bits;
  }
  return needs_sign_only(norm.activation) ? GradientKind::sign : GradientKind::smooth;
}

constexpr bool recomputes(GradientKind kind) { return kind == GradientKind::sign || kind == GradientKind::smooth; }

// Lines of dy, and how dz is made of them; reads_input: for other things than dz too.
template <GradientKind kind, bool reads_input, bool rows, int group, class Element>
struct Gradients {
  using Scalar = Accumulator<Element>;
  using V = Vector<Scalar>;
  LinesOf<group, const Element> grad_output;
  LinesOf<group, const Element> input;
  LinesOf<group, const Element> residual;
  LinesOf<group, const unsigned char> signs;
  LinesOf<group, Scalar> kept;
  Affine<rows, Scalar> affine;
  Activating<V> activating;

  FASTREG_INLINE Gradients(const BatchNorm& norm, const Line& line, const Ahead& ahead)
      : grad_output(lines_of<group, Element>(norm.grad_output, line, ahead)),
        input(lines_of<group, Element>(norm.input, line, ahead)),
        residual(lines_of<group, Element>(norm.residual, line, ahead)),
        signs(signs_of<group>(norm.signs, line)),
        kept(lines_of<group, rows, Scalar>(norm.kept, norm.geometry, line)),
        affine(norm, line),
        activating(norm) {}

  FASTREG_INLINE void prefetch(int64_t column, int k) const {
    grad_output.prefetch(column, k);
    if constexpr (reads_input || recomputes(kind)) {
      input.prefetch(column, k);
    }
    if constexpr (recomputes(kind)) {
      if (residual) {
        residual.prefetch(column, k);
      }
    }
  }

  // For the second sweep, where that is wanted.
  template <class Lanes>
  FASTREG_INLINE void keep(Lanes lanes, int64_t column, int r, V dz) const {
    if constexpr (kind == GradientKind::smooth) {
      if (kept) {
        lanes.store(kept[r] + column, dz);
      }
    }
  }

  template <class Lanes>
  FASTREG_INLINE V dz(Lanes lanes, int64_t column, int r, const typename Affine<rows, Scalar>::Values& at,
                      V centred) const {
    if constexpr (kind == GradientKind::kept) {
      return lanes.load(kept[r] + column);
    }
    const V dy = lanes.load(grad_output[r] + column);
    if constexpr (kind == GradientKind::plain) {
      return dy;
    }
    LaneMask<V> positive;
    if constexpr (kind == GradientKind::bits) {
      positive = mask_of_bits<V>(load_bits<Scalar>(lanes, signs[r], column));
    } else {
      V z = at.argument(centred);
      if (residual) {
        z += lanes.load(residual[r] + column);
      }
      if constexpr (kind == GradientKind::smooth) {
        return dy * derivative_smooth(activating.activation, z);
      }
      positive = activating.is_one_at(z);
    }
    return select(positive, dy, activating.is_relu ? V{} : dy * activating.negative_slope);
  }
};

template <GradientKind kind>
constexpr int group_for = kind == GradientKind::smooth ? 1 : rows_per_group;

// --- sums --------------------------------------------------------------------------------------------------

template <GradientKind kind, bool rows, class Element>
FASTREG_INLINE void add_block(const BatchNorm& norm, const BatchNormTile& block, const Ahead& ahead,
                              BlockSums<rows, Accumulator<Element>>& plain,
                              BlockSums<rows, Accumulator<Element>>& projected) {
  using Scalar = Accumulator<Element>;
  using V = Vector<Scalar>;
  if constexpr (rows) {
    for_lines<true, group_for<kind>>(norm.geometry, block, [&]<int group>(const Line& line) {
      const Gradients<kind, true, true, group, Element> gradients(norm, line, ahead);
      for_columns<Scalar, 1>(line.elements, [&](auto lanes, int64_t column, int k) {
        gradients.prefetch(column, k);
        const auto at = gradients.affine.at(lanes, column);
        V centred[group];
        V dz[group];
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          centred[r] = lanes.load(gradients.input[r] + column) - at.mean;
          dz[r] = gradients.dz(lanes, column, r, at, centred[r]);
          gradients.keep(lanes, column, r, dz[r]);
        }
        plain.add(column, sum_of<group>(dz));
        projected.add(column, sum_of_products<group>(dz, centred));
      });
    });
  } else {
    with_unroll<Scalar>(norm.geometry, [&]<int unroll>() {
      for_lines<false, 1>(norm.geometry, block, [&]<int group>(const Line& line) {
        const Gradients<kind, true, false, group, Element> gradients(norm, line, ahead);
        const auto at = gradients.affine.at(AllLanes{}, 0);
        sum_plane<kind == GradientKind::smooth ? 1 : unroll>(
            line.elements, line.channel - block.begin_channel, plain, projected,
            [&](auto lanes, int64_t column, int k, V& plain_sum, V& projected_sum) {
              gradients.prefetch(column, k);
              const V centred = lanes.load(gradients.input[0] + column) - at.mean;
              // dz is zero in missing lanes, x - mean is not.
              const V dz = gradients.dz(lanes, column, 0, at, centred);
              gradients.keep(lanes, column, 0, dz);
              plain_sum += dz;
              projected_sum = multiply_add(dz, centred, projected_sum);
            });
      });
    });
  }
}

template <GradientKind kind, bool rows, class Element>
FASTREG_INLINE void sum_tile(const BatchNorm& norm, const BatchNormTile& tile, const BatchNormPartials& partials) {
  using Scalar = Accumulator<Element>;
  const int64_t channels = tile.end_channel - tile.begin_channel;
  double* plain_totals = partials.first + tile.begin_channel;
  double* projected_totals = partials.second + tile.begin_channel;
  const Scalar* rstd = static_cast<const Scalar*>(norm.rstd) + tile.begin_channel;
  __builtin_memset(plain_totals, 0, static_cast<size_t>(channels) * sizeof(double));
  __builtin_memset(projected_totals, 0, static_cast<size_t>(channels) * sizeof(double));
  BlockSums<rows, Scalar> plain;
  BlockSums<rows, Scalar> projected;
  const Ahead ahead = Ahead::of<Element>(norm.geometry, tile);
  for_blocks(norm.geometry, tile, [&](const BatchNormTile& block) {
    plain.clear(channels);
    projected.clear(channels);
    add_block<kind, rows, Element>(norm, block, ahead, plain, projected);
    for (int64_t channel = 0; channel < channels; ++channel) {
      plain_totals[channel] += plain.total(channel);
      projected_totals[channel] += projected.total(channel) * double(rstd[channel]);
    }
  });
}

template <class Body>
FASTREG_INLINE void with_gradient_kind(const BatchNorm& norm, const Body& body) {
  switch (gradient_kind(norm)) {
    case GradientKind::plain:
      return body.template operator()<GradientKind::plain>();
    case GradientKind::bits:
      return body.template operator()<GradientKind::bits>();
    case GradientKind::sign:
      return body.template operator()<GradientKind::sign>();
    default:
      return body.template operator()<GradientKind::smooth>();
  }
}

template <bool rows, class Element>
void sums(const BatchNorm& norm, const BatchNormTile& tile, const BatchNormPartials& partials) {
  with_gradient_kind(
      norm, [&]<GradientKind kind>() { sum_tile<kind, rows, Element>(norm, tile, partials); });
}

// The sums of all chunks, and the coefficients that they give.
template <class Scalar>
void finish_sums(const BatchNormGeometry& geometry, const BatchNormPartials& partials,
                 const BatchNormSums& results, int64_t begin_channel, int64_t end_channel) {
  const double reciprocal = 1.0 / double(geometry.per_channel());
  for_strips(begin_channel, end_channel, [&](int64_t begin, int64_t channels) {
    double plain[channels_per_strip] = {};
    double projected[channels_per_strip] = {};
    for (int64_t chunk = 0; chunk < geometry.chunks; ++chunk) {
      const double* chunk_plain = partials.first + chunk * geometry.channels + begin;
      const double* chunk_projected = partials.second + chunk * geometry.channels + begin;
      for (int64_t channel = 0; channel < channels; ++channel) {
        plain[channel] += chunk_plain[channel];
        projected[channel] += chunk_projected[channel];
      }
    }
    const auto store = [&](void* target, const auto& value_of) {
      if (target != nullptr) {
        Scalar* values = static_cast<Scalar*>(target) + begin;
        for (int64_t channel = 0; channel < channels; ++channel) {
          values[channel] = static_cast<Scalar>(value_of(channel));
        }
      }
    };
    const Scalar* scale = static_cast<const Scalar*>(results.scale) + begin;
    const Scalar* rstd = static_cast<const Scalar*>(results.rstd) + begin;
    store(results.plain, [&](int64_t channel) { return plain[channel]; });
    store(results.projected, [&](int64_t channel) { return projected[channel]; });
    store(results.offset, [&](int64_t channel) { return plain[channel] * reciprocal * double(scale[channel]); });
    store(results.slope, [&](int64_t channel) {
      return projected[channel] * reciprocal * double(scale[channel]) * double(rstd[channel]);
    });
  });
}

// --- gradients of input and residual -----------------------------------------------------------------------

template <GradientKind kind, bool centred, bool rows, bool prefetches, int group, class Element>
FASTREG_INLINE void gradient_lines(const BatchNorm& norm, const Line& line, const Ahead& ahead) {
  using Scalar = Accumulator<Element>;
  using V = Vector<Scalar>;
  const Gradients<kind, centred, rows, group, Element> gradients(norm, line, ahead);
  const ChannelValues<rows, Scalar> slopes(norm.slope, line.channel);
  const ChannelValues<rows, Scalar> offsets(norm.offset, line.channel);
  const auto grad_input = lines_of<group, rows, Element>(norm.grad_input, norm.geometry, line);
  const auto grad_residual = lines_of<group, rows, Element>(norm.grad_residual, norm.geometry, line);
  const Writer write{lines_stream<rows, Element>(norm)};
  constexpr int unroll = kind == GradientKind::smooth ? 1 : group == 1 ? 2 : vectors_per_step<Element>;
  map_columns<Scalar, unroll>(
      line.elements, [&](auto lanes, int64_t column, int k) {
        if constexpr (prefetches) {
          gradients.prefetch(column, k);
        }
        const auto at = gradients.affine.at(lanes, column);
        const V slope = slopes.at(lanes, column);
        const V offset = offsets.at(lanes, column);
        V deviation[group] = {};
        V dz[group];
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          if constexpr (centred || recomputes(kind)) {
            deviation[r] = lanes.load(gradients.input[r] + column) - at.mean;
          }
          dz[r] = gradients.dz(lanes, column, r, at, deviation[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          if (grad_residual) {
            write(lanes, grad_residual[r] + column, dz[r]);
          }
          if (grad_input) {
            const V gradient = centred ? multiply_add(dz[r], at.scale, -multiply_add(deviation[r], slope, offset))
                                       : dz[r] * at.scale;
            write(lanes, grad_input[r] + column, gradient);
          }
        }
      });
}

// Of what goes past the caches two rows, as there are up to two outputs: with four of each, too many cache lines are
// half written at a time.
template <GradientKind kind>
constexpr int streamed_rows = kind == GradientKind::smooth ? 1 : 2;

template <GradientKind kind, bool centred, bool rows, class Element>
FASTREG_INLINE void gradient_tile(const BatchNorm& norm, const BatchNormTile& tile) {
  const Ahead ahead =
      rows ? Ahead::of<Element>(norm.geometry, tile) : Ahead::next_planes<Element>(norm.geometry, tile);
  const auto sweep = [&]<int most_rows, bool prefetches>() {
    for_lines<rows, most_rows>(
        norm.geometry, tile,
        [&]<int group>(const Line& line) {
          gradient_lines<kind, centred, rows, prefetches, group, Element>(norm, line, ahead);
        },
        one_by_one<rows, Element>(norm));
  };
  // Rows that do not go past the caches are not too large for the last of them, which the hardware reads well.
  if constexpr (rows) {
    if (!norm.streams) {
      return sweep.template operator()<group_for<kind>, false>();
    }
  }
  sweep.template operator()<streamed_rows<kind>, true>();
}

template <GradientKind kind, bool centred, class Element>
void gradient_runs(const BatchNorm& norm, const BatchNormTile& tile) {
  using Scalar = Accumulator<Element>;
  constexpr int most_rows = streamed_rows<kind>;
  const int64_t spatial = norm.geometry.spatial;
  const Ahead next = Ahead::next_planes<Element>(norm.geometry, tile);
  Repeated<Scalar> scale;
  Repeated<Scalar> mean;
  Repeated<Scalar> bias;
  Repeated<Scalar> slope;
  Repeated<Scalar> offset;
  RunSigns<most_rows> signs;
  BatchNorm run = run_problem<Element>(norm, tile);
  run.scale = scale(norm.scale, tile, spatial);
  run.mean = mean(centred || recomputes(kind) ? norm.mean : nullptr, tile, spatial);
  run.bias = bias(recomputes(kind) ? norm.bias : nullptr, tile, spatial);
  run.slope = slope(norm.slope, tile, spatial);
  run.offset = offset(norm.offset, tile, spatial);
  run.signs = norm.signs == nullptr ? nullptr : signs.data();
  for_runs<most_rows>(norm.geometry, tile, signs.stride, [&]<int group>(const Line& line) {
    if constexpr (kind == GradientKind::bits) {
      signs.from_planes(norm.geometry, tile, line.outer, group, norm.signs);
    }
    gradient_lines<kind, centred, true, true, group, Element>(run, line, next);
  });
}

template <bool rows, class Element>
FASTREG_INLINE void gradient_of_kind(const BatchNorm& norm, const BatchNormTile& tile) {
  if (norm.kept != nullptr) {
    return gradient_tile<GradientKind::kept, true, rows, Element>(norm, tile);
  }
  with_gradient_kind(norm, [&]<GradientKind kind>() {
    const auto sweep = [&]<bool centred>() {
      if constexpr (!rows && kind != GradientKind::smooth) {
        if (is_run(norm.geometry, tile)) {
          return gradient_runs<kind, centred, Element>(norm, tile);
        }
      }
      gradient_tile<kind, centred, rows, Element>(norm, tile);
    };
    if (norm.slope != nullptr) {
      sweep.template operator()<true>();
    } else {
      sweep.template operator()<false>();
    }
  });
}

template <bool rows, class Element>
void gradient(const BatchNorm& norm, const BatchNormTile& tile) {
  gradient_of_kind<rows, Element>(norm, tile);
  if (norm.streams) {
    finish_streams();
  }
}

}  // namespace fastreg::FASTREG_SIMD
