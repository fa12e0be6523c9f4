// Mean and sum of squared deviations of every channel.
//
// One read: the deviations of a block of units from a centre, and their squares. The centre need not be exact, as the
// sum of the deviations mends the mean and the squares: it is the mean of the blocks before, and for the first block
// that of an eighth of it. However far the block's own mean lies from that, the distance is a part of what is measured:
// the squares about the mean of all elements are no less than an eighth or so of those about the centre, so that fp32
// has digits enough. Blocks and chunks are merged by Chan's rule in double.

#pragma once

#include "batch_norm_common.simd.h"

namespace fastreg::FASTREG_SIMD {

// --- blocks ------------------------------------------------------------------------------------------------

template <bool rows, class Element>
FASTREG_INLINE void add_elements(const BatchNorm& norm, const BatchNormTile& block,
                                 BlockSums<rows, Accumulator<Element>>& sums) {
  using Scalar = Accumulator<Element>;
  if constexpr (rows) {
    for_lines<true, rows_per_group>(norm.geometry, block, [&]<int group>(const Line& line) {
      const auto input = lines_of<group, Element>(norm.input, line);
      for_columns<Scalar, 2>(line.elements, [&](auto lanes, int64_t column, int) {
        Vector<Scalar> values[group];
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          values[r] = lanes.load(input[r] + column);
        }
        sums.add(column, sum_of<group>(values));
      });
    });
  } else {
    BlockSums<rows, Scalar> none;
    with_unroll<Scalar>(norm.geometry, [&]<int unroll>() {
      for_lines<false, 1>(norm.geometry, block, [&]<int group>(const Line& line) {
        const auto input = lines_of<group, Element>(norm.input, line);
        sum_plane<unroll>(line.elements, line.channel - block.begin_channel, sums, none,
                          [&](auto lanes, int64_t column, int, Vector<Scalar>& sum, Vector<Scalar>&) {
                            sum += lanes.load(input[0] + column);
                          });
      });
    });
  }
}

// The part of the first block whose mean is its centre.
template <bool rows>
FASTREG_INLINE BatchNormTile part_of(const BatchNormTile& block) {
  constexpr int64_t least = rows ? rows_per_group : 1;
  const int64_t units = block.end_unit - block.begin_unit;
  const int64_t part = units / 8 > least ? units / 8 : least;
  BatchNormTile tile = block;
  tile.end_unit = part < units ? block.begin_unit + part : block.end_unit;
  return tile;
}

template <bool rows, class Element>
FASTREG_INLINE void add_deviations(const BatchNorm& norm, const BatchNormTile& block,
                                   const Accumulator<Element>* centres,
                                   BlockSums<rows, Accumulator<Element>>& deviations,
                                   BlockSums<rows, Accumulator<Element>>& squares, const Ahead& ahead) {
  using Scalar = Accumulator<Element>;
  if constexpr (rows) {
    for_lines<true, rows_per_group>(norm.geometry, block, [&]<int group>(const Line& line) {
      const auto input = lines_of<group, Element>(norm.input, line, ahead);
      for_columns<Scalar, 2>(line.elements, [&](auto lanes, int64_t column, int k) {
        input.prefetch(column, k);
        const Vector<Scalar> centre = AllLanes{}.load(centres + column);
        Vector<Scalar> values[group];
#pragma GCC unroll 4
        for (int r = 0; r < group; ++r) {
          values[r] = lanes.load(input[r] + column) - centre;
        }
        deviations.add(column, sum_of<group>(values));
        squares.add(column, sum_of_products<group>(values, values));
      });
    });
  } else {
    with_unroll<Scalar>(norm.geometry, [&]<int unroll>() {
      for_lines<false, 1>(norm.geometry, block, [&]<int group>(const Line& line) {
        const auto input = lines_of<group, Element>(norm.input, line, ahead);
        const int64_t index = line.channel - block.begin_channel;
        const Vector<Scalar> centre = broadcast(centres[index]);
        sum_plane<unroll>(line.elements, index, deviations, squares,
                          [&](auto lanes, int64_t column, int k, Vector<Scalar>& sum, Vector<Scalar>& square_sum) {
                            input.prefetch(column, k);
                            const Vector<Scalar> value = lanes.keep(lanes.load(input[0] + column) - centre);
                            sum += value;
                            square_sum = multiply_add(value, value, square_sum);
                          });
      });
    });
  }
}

// --- tiles -------------------------------------------------------------------------------------------------

// The moments of the tile's units, into the partials of their chunk.
template <bool rows, class Element>
void moments(const BatchNorm& norm, const BatchNormTile& tile, const BatchNormPartials& partials) {
  using Scalar = Accumulator<Element>;
  const int64_t channels = tile.end_channel - tile.begin_channel;
  double* means = partials.first + tile.begin_channel;
  double* squares = partials.second + tile.begin_channel;
  BlockSums<rows, Scalar> sums;
  BlockSums<rows, Scalar> square_sums;
  Scalar centres[channels_per_tile<rows> + lanes_of<Scalar>] = {};
  const Ahead ahead = Ahead::of<Element>(norm.geometry, tile);
  int64_t before = 0;
  for_blocks(norm.geometry, tile, [&](const BatchNormTile& block) {
    const int64_t elements = elements_of_channel<rows>(norm.geometry, block.begin_unit, block.end_unit);
    const double reciprocal = 1.0 / double(elements);
    if (before == 0) {
      sums.clear(channels);
      const BatchNormTile part = part_of<rows>(block);
      add_elements<rows, Element>(norm, part, sums);
      const double share = 1.0 / double(elements_of_channel<rows>(norm.geometry, part.begin_unit, part.end_unit));
      for (int64_t channel = 0; channel < channels; ++channel) {
        centres[channel] = static_cast<Scalar>(sums.total(channel) * share);
      }
    } else {
      for (int64_t channel = 0; channel < channels; ++channel) {
        centres[channel] = static_cast<Scalar>(means[channel]);
      }
    }
    sums.clear(channels);
    square_sums.clear(channels);
    add_deviations<rows, Element>(norm, block, centres, sums, square_sums, ahead);

    const double share = double(elements) / double(before + elements);
    const double between = double(before) * share;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const double deviation = sums.total(channel);
      const double mean = double(centres[channel]) + deviation * reciprocal;
      const double within = square_sums.total(channel) - deviation * deviation * reciprocal;
      const double bounded = within < 0 ? 0 : within;  // equal elements, of which only the rounding is left
      if (before == 0) {
        means[channel] = mean;
        squares[channel] = bounded;
      } else {
        const double difference = mean - means[channel];
        means[channel] += difference * share;
        squares[channel] += bounded + difference * difference * between;
      }
    }
    before += elements;
  });
}

// --- channels ----------------------------------------------------------------------------------------------

// rstd and scale from squared deviations of `count` elements.
template <class Scalar>
FASTREG_INLINE void store_statistics(const BatchNormStatistics& results, int64_t begin, int64_t channels,
                                     const double* means, const double* squares, double count) {
  const Scalar* weight = static_cast<const Scalar*>(results.weight);
  Scalar rstds[channels_per_strip];
  for (int64_t channel = 0; channel < channels; ++channel) {
    rstds[channel] = static_cast<Scalar>(reciprocal_deviation(squares[channel], count, results.eps));
  }
  if (results.mean != nullptr) {
    Scalar* target = static_cast<Scalar*>(results.mean) + begin;
    for (int64_t channel = 0; channel < channels; ++channel) {
      target[channel] = static_cast<Scalar>(means[channel]);
    }
  }
  if (results.squares != nullptr) {
    Scalar* target = static_cast<Scalar*>(results.squares) + begin;
    for (int64_t channel = 0; channel < channels; ++channel) {
      target[channel] = static_cast<Scalar>(squares[channel]);
    }
  }
  if (results.rstd != nullptr) {
    __builtin_memcpy(static_cast<Scalar*>(results.rstd) + begin, rstds,
                     static_cast<size_t>(channels) * sizeof(Scalar));
  }
  if (results.scale != nullptr) {
    Scalar* target = static_cast<Scalar*>(results.scale) + begin;
    for (int64_t channel = 0; channel < channels; ++channel) {
      target[channel] = weight == nullptr ? rstds[channel] : rstds[channel] * weight[begin + channel];
    }
  }
}

// Calls body(begin, channels) for every strip of [begin_channel, end_channel).
template <class Body>
FASTREG_INLINE void for_strips(int64_t begin_channel, int64_t end_channel, const Body& body) {
  for (int64_t begin = begin_channel; begin < end_channel; begin += channels_per_strip) {
    const int64_t rest = end_channel - begin;
    body(begin, rest < channels_per_strip ? rest : channels_per_strip);
  }
}

template <class Scalar>
void finish_running(const void* mean, const void* variance, const BatchNormStatistics& results,
                    int64_t begin_channel, int64_t end_channel) {
  for_strips(begin_channel, end_channel, [&](int64_t begin, int64_t channels) {
    double means[channels_per_strip];
    double variances[channels_per_strip];
    for (int64_t channel = 0; channel < channels; ++channel) {
      means[channel] = double(static_cast<const Scalar*>(mean)[begin + channel]);
      variances[channel] = double(static_cast<const Scalar*>(variance)[begin + channel]);
    }
    store_statistics<Scalar>(results, begin, channels, means, variances, 1.0);
  });
}

template <bool rows, class Element>
void finish_moments(const BatchNormGeometry& geometry, const BatchNormPartials& partials,
                    const BatchNormStatistics& results, int64_t begin_channel, int64_t end_channel) {
  for_strips(begin_channel, end_channel, [&](int64_t begin, int64_t channels) {
    double means[channels_per_strip];
    double squares[channels_per_strip];
    __builtin_memcpy(means, partials.first + begin, static_cast<size_t>(channels) * sizeof(double));
    __builtin_memcpy(squares, partials.second + begin, static_cast<size_t>(channels) * sizeof(double));
    for (int64_t chunk = 1; chunk < geometry.chunks; ++chunk) {
      const int64_t first = chunk * geometry.units_per_chunk;
      const int64_t last = first + geometry.units_per_chunk;
      const int64_t before = elements_of_channel<rows>(geometry, 0, first);
      const int64_t elements =
          elements_of_channel<rows>(geometry, first, last < geometry.units ? last : geometry.units);
      const double share = double(elements) / double(before + elements);
      const double between = double(before) * share;
      const double* chunk_means = partials.first + chunk * geometry.channels + begin;
      const double* chunk_squares = partials.second + chunk * geometry.channels + begin;
      for (int64_t channel = 0; channel < channels; ++channel) {
        const double difference = chunk_means[channel] - means[channel];
        means[channel] += difference * share;
        squares[channel] += chunk_squares[channel] + difference * difference * between;
      }
    }
    store_statistics<Accumulator<Element>>(results, begin, channels, means, squares,
                                           double(geometry.per_channel()));
  });
}

}  // namespace fastreg::FASTREG_SIMD
