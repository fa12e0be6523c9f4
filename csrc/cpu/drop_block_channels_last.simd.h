// Applies DropBlock's bits where the channels are adjacent: output = bit ? input * scale : 0, by selection.
//
// The bytes of a strip of each channel's plane are transposed, so that those of neighbouring channels are adjacent, and
// a vector of channels tests one bit of each. Where all channels share their bits, positions are kept or dropped as a
// whole.
//
// Memory sees one read and one write of the activations, and the bits, which are a 32nd of fp32.

#pragma once

#include "drop_block_planes.simd.h"

namespace fastreg::FASTREG_SIMD {

// --- strips ------------------------------------------------------------------------------------------------

constexpr int strip_bytes = drop_block_strip;
using Bytes = Vector<uint8_t, strip_bytes>;

// Bytes of a strip's line in the scratch: of all channels, and a vector beyond.
FASTREG_INLINE int64_t strip_line_bytes(const DropBlockApply& apply) {
  return (apply.channels + 2 * strip_bytes - 1) / strip_bytes * strip_bytes;
}

inline int64_t channels_last_scratch(const DropBlockApply& apply) {
  return apply.shared ? 0 : strip_bytes * strip_line_bytes(apply);
}

// Sixteen lines of sixteen bytes: interleaving the first half of the lines with the second, four times, transposes.
FASTREG_INLINE void transpose(Bytes* lines) {
  for (int time = 0; time < 4; ++time) {
    Bytes interleaved[strip_bytes];
#pragma GCC unroll 8
    for (int line = 0; line < strip_bytes / 2; ++line) {
      const Bytes left = lines[line];
      const Bytes right = lines[line + strip_bytes / 2];
      interleaved[2 * line] =
          __builtin_shufflevector(left, right, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      interleaved[2 * line + 1] =
          __builtin_shufflevector(left, right, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    __builtin_memcpy(lines, interleaved, sizeof(interleaved));
  }
}

// `count` bytes of each channel's plane, from `source` on, as lines of one byte a channel.
FASTREG_INLINE void transpose_strip(const DropBlockApply& apply, const unsigned char* source, int64_t count,
                                    unsigned char* target) {
  const int64_t line_bytes = strip_line_bytes(apply);
  const unsigned char* const end = apply.bits + apply.bits_bytes;
  for (int64_t channel = 0; channel < apply.channels; channel += strip_bytes) {
    Bytes lines[strip_bytes] = {};
    for (int line = 0; line < strip_bytes && channel + line < apply.channels; ++line) {
      const unsigned char* const plane = source + (channel + line) * apply.plane_bytes();
      if (end - plane >= strip_bytes) {
        __builtin_memcpy(&lines[line], plane, sizeof(Bytes));
      } else {
        for (int64_t byte = 0; byte < count; ++byte) {
          lines[line][byte] = plane[byte];
        }
      }
    }
    transpose(lines);
    for (int64_t byte = 0; byte < count; ++byte) {
      __builtin_memcpy(target + byte * line_bytes + channel, &lines[byte], sizeof(Bytes));
    }
  }
}

// Whether bit `bit` is set in each of a vector's bytes.
template <class V>
FASTREG_INLINE LaneMask<V> mask_of_bytes(const unsigned char* bytes, int bit) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  Vector<uint8_t, lanes> own;
  __builtin_memcpy(&own, bytes, sizeof(own));
#if defined(__AVX512DQ__)
  const __m128i tested = _mm_set1_epi8(static_cast<char>(1 << bit));
  if constexpr (lanes == 16) {
    return _mm_test_epi8_mask(bit_cast<__m128i>(own), tested);
  } else {
    return _mm_test_epi8_mask(_mm_cvtsi64_si128(bit_cast<long long>(own)), tested);
  }
#else
  LaneMask<V> wide;
#if defined(__AVX2__)
  if constexpr (lanes == 8) {
    wide = bit_cast<LaneMask<V>>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<long long>(own))));
  } else {
    wide = bit_cast<LaneMask<V>>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bit_cast<int>(own))));
  }
#else
  wide = __builtin_convertvector(own, LaneMask<V>);
#endif
  return (wide & (LaneMask<V>{} + (1 << bit))) != 0;
#endif
}

// --- positions ---------------------------------------------------------------------------------------------

// Adjacent elements that are all kept, or all dropped.
template <class Element>
FASTREG_INLINE void apply_alike(bool kept, bool streams, const Element* input, Element* output, int64_t count,
                                Vector<Accumulator<Element>> scale) {
  using Scalar = Accumulator<Element>;
  if (kept) {
    for_columns<Scalar, 4>(count, [&](auto lanes, int64_t column, int) {
      put_element(streams, lanes, output + column, lanes.load(input + column) * scale);
    });
  } else {
    for_columns<Scalar, 4>(count, [&](auto lanes, int64_t column, int) {
      put_element(streams, lanes, output + column, Vector<Scalar>{});
    });
  }
}

template <class Element>
void apply_channels_last(const DropBlockApply& apply, void* scratch, int64_t begin_strip, int64_t end_strip) {
  using Scalar = Accumulator<Element>;
  using V = Vector<Scalar>;
  const int64_t channels = apply.channels;
  const int64_t strips = (apply.plane_bytes() + strip_bytes - 1) / strip_bytes;
  unsigned char* const transposed = static_cast<unsigned char*>(scratch);
  for (int64_t index = begin_strip; index < end_strip; ++index) {
    const int64_t sample = index / strips;
    const int64_t first = index % strips * strip_bytes;
    const int64_t count = least(strip_bytes, apply.plane_bytes() - first);
    const unsigned char* const source =
        apply.bits + sample * (apply.shared ? 1 : channels) * apply.plane_bytes() + first;
    if (!apply.shared) {
      transpose_strip(apply, source, count, transposed);
    }
    const V scale = broadcast(static_cast<Scalar>(apply.scales[apply.scale_per_sample ? sample : 0]));
    for (int64_t byte = 0; byte < count; ++byte) {
      const int64_t row = (first + byte) / apply.row_bytes;
      const int64_t column = (first + byte) % apply.row_bytes * 8;
      const int64_t positions = least(8, apply.width - column);
      const int64_t begin = sample * apply.sample_elements() + (row * apply.width + column) * channels;
      const Element* input = static_cast<const Element*>(apply.input) + begin;
      Element* output = static_cast<Element*>(apply.output) + begin;
      if (apply.shared) {
        // Positions of a byte that are alike are one piece.
        for (int64_t place = 0; place < positions;) {
          const bool kept = (source[byte] >> place & 1) != 0;
          int64_t next = place + 1;
          while (next < positions && ((source[byte] >> next & 1) != 0) == kept) {
            ++next;
          }
          const int64_t skipped = place * channels;
          apply_alike(kept, apply.streams, input + skipped, output + skipped, (next - place) * channels, scale);
          place = next;
        }
      } else {
        const unsigned char* const bits = transposed + byte * strip_line_bytes(apply);
        for (int place = 0; place < positions; ++place, input += channels, output += channels) {
          for_columns<Scalar, 4>(channels, [&](auto lanes, int64_t channel, int) {
            const LaneMask<V> kept = mask_of_bytes<V>(bits + channel, place);
            put_element(apply.streams, lanes, output + channel,
                        select(kept, lanes.load(input + channel) * scale, V{}));
          });
        }
      }
    }
  }
  if (apply.streams) {
    finish_streams();
  }
}

}  // namespace fastreg::FASTREG_SIMD
