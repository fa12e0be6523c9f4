// Adjacent small planes as one row.
//
// A plane of 7 x 7 elements is three vectors and a rest, and what is known of its channel is loaded for those alone.
// The planes of a tile lie one behind the other in each sample, though: a run, which is a row whose columns' values are
// those of the channels, each repeated for every element of its plane. Only the bits of signs are laid out otherwise,
// as each plane begins a byte of its own.

#pragma once

#include "batch_norm_common.simd.h"

namespace fastreg::FASTREG_SIMD {

constexpr int64_t largest_run = 4096;
constexpr int64_t largest_plane_of_run = 256;
constexpr int64_t least_samples_of_run = 8;  // fewer do not pay for the repetition

// Bits [begin, begin + count) of `source`, which may be read 8 bytes past them, to the beginning of `target`.
FASTREG_INLINE void extract_bits(const unsigned char* source, int64_t begin, int64_t count, unsigned char* target) {
  for (; count > 0; begin += 56, count -= 56, target += 7) {
    uint64_t word;
    __builtin_memcpy(&word, source + begin / 8, sizeof(word));
    word >>= begin % 8;
    if (count >= 56) {
      __builtin_memcpy(target, &word, 7);
      continue;
    }
    word &= (uint64_t{1} << count) - 1;
    for (int64_t left = count; left > 0; left -= 8, word >>= 8) {
      *target++ = static_cast<unsigned char>(word);
    }
    return;
  }
}

// The other way: writes the bits of one plane behind those of another. Complete words only, until it is finished; and
// without a look at what is there, which a processor waits for where it has just been written.
class BitWriter {
 public:
  FASTREG_INLINE explicit BitWriter(unsigned char* target) : target_(target) {}

  FASTREG_INLINE void append(const unsigned char* source, int64_t count) {
    for (; count >= 64; count -= 56, source += 7) {
      uint64_t word;
      __builtin_memcpy(&word, source, sizeof(word));
      put(word & ((uint64_t{1} << 56) - 1), 56);
    }
    for (; count > 0; count -= 32, source += 4) {
      const int64_t some = count < 32 ? count : 32;
      uint64_t word = 0;
      for (int64_t byte = 0; 8 * byte < some; ++byte) {
        word |= uint64_t{source[byte]} << (8 * byte);
      }
      put(word & ((uint64_t{1} << some) - 1), some);
    }
  }

  FASTREG_INLINE void finish() { __builtin_memcpy(target_, &word_, sizeof(word_)); }

 private:
  // `count` below 64.
  FASTREG_INLINE void put(uint64_t bits, int64_t count) {
    word_ |= bits << filled_;
    filled_ += count;
    if (filled_ >= 64) {
      __builtin_memcpy(target_, &word_, sizeof(word_));
      target_ += sizeof(word_);
      filled_ -= 64;
      word_ = filled_ == 0 ? 0 : bits >> (count - filled_);
    }
  }

  unsigned char* target_;
  uint64_t word_ = 0;
  int64_t filled_ = 0;
};

// The values of a tile's channels, each repeated for every element of its plane. Null stays null.
template <class Scalar>
class Repeated {
 public:
  FASTREG_INLINE const void* operator()(const void* data, const BatchNormTile& tile, int64_t spatial) {
    if (data == nullptr) {
      return nullptr;
    }
    const Scalar* values = static_cast<const Scalar*>(data);
    Scalar* target = values_;
    for (int64_t channel = tile.begin_channel; channel < tile.end_channel; ++channel, target += spatial) {
      const Vector<Scalar> value = broadcast(values[channel]);
      // The last vector reaches into the next plane, which is filled after it.
      for (int64_t element = 0; element < spatial; element += lanes_of<Scalar>) {
        AllLanes{}.store(target + element, value);
      }
    }
    return values_;
  }

 private:
  alignas(vector_bytes) Scalar values_[largest_run + lanes_of<Scalar>];
};

FASTREG_INLINE bool is_run(const BatchNormGeometry& geometry, const BatchNormTile& tile) {
  const int64_t channels = tile.end_channel - tile.begin_channel;
  return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && geometry.units_per_plane == 1 &&
         geometry.spatial <= largest_plane_of_run && tile.end_unit - tile.begin_unit >= least_samples_of_run &&
         channels > 1 && channels * geometry.spatial <= largest_run;
}

// The problem in which the runs of a tile are rows. Who needs a value a channel repeats it.
template <class Element>
FASTREG_INLINE BatchNorm run_problem(const BatchNorm& norm, const BatchNormTile& tile) {
  constexpr int64_t bytes = sizeof(Element);
  BatchNorm run = norm;
  run.geometry.channels = norm.geometry.channels * norm.geometry.spatial;
  run.streams =
      lines_stream(norm, run.geometry.channels * bytes, tile.begin_channel * norm.geometry.spatial * bytes);
  return run;
}

// The bits of a group of runs, one after the other as the bits of a row are.
template <int most_rows>
class RunSigns {
 public:
  static constexpr int64_t stride = largest_run / 8 + 64;

  unsigned char* data() { return bits_; }

  // The bits of `rows` runs, to the signs of their planes.
  FASTREG_INLINE void to_planes(const BatchNormGeometry& geometry, const BatchNormTile& tile, int64_t sample, int rows,
                                unsigned char* signs) const {
    const int64_t bytes = (geometry.spatial + 7) / 8;
    const int64_t channels = tile.end_channel - tile.begin_channel;
    for (int r = 0; r < rows; ++r) {
      unsigned char* plane = signs + ((sample + r) * geometry.channels + tile.begin_channel) * bytes;
      for (int64_t channel = 0; channel < channels; ++channel, plane += bytes) {
        extract_bits(bits_ + r * stride, channel * geometry.spatial, geometry.spatial, plane);
      }
    }
  }

  FASTREG_INLINE void from_planes(const BatchNormGeometry& geometry, const BatchNormTile& tile, int64_t sample,
                                  int rows, const unsigned char* signs) {
    const int64_t bytes = (geometry.spatial + 7) / 8;
    const int64_t channels = tile.end_channel - tile.begin_channel;
    for (int r = 0; r < rows; ++r) {
      const unsigned char* plane = signs + ((sample + r) * geometry.channels + tile.begin_channel) * bytes;
      BitWriter writer(bits_ + r * stride);
      for (int64_t channel = 0; channel < channels; ++channel, plane += bytes) {
        writer.append(plane, geometry.spatial);
      }
      writer.finish();
    }
  }

 private:
  alignas(vector_bytes) unsigned char bits_[most_rows * stride];
};

// Calls body.operator()<group>(line) for every sample of the tile, or group of them: the line is the run there.
template <int group, class Body>
FASTREG_INLINE void for_runs(const BatchNormGeometry& geometry, const BatchNormTile& tile, int64_t signs_stride,
                             const Body& body) {
  const int64_t elements = (tile.end_channel - tile.begin_channel) * geometry.spatial;
  const auto line_at = [&](int64_t sample) {
    return Line{sample, tile.begin_channel * geometry.spatial, 0, elements, 0, signs_stride};
  };
  for_groups<group>(tile, line_at, body, false);
}

}  // namespace fastreg::FASTREG_SIMD
