// Philox4x32-10 on as many counters as a vector has 64-bit lanes: csrc/philox.h says which stream this is.
//
// A word lies in the low half of a 64-bit lane, where the widening multiplication reads it; what is in the high half
// does not matter until the last round. A product then is two words of the next state, the lower one in its place
// already. That is six instructions a round with AVX-512 (two multiplications, two shifts, two exclusive ors of three
// operands) for 64 lanes of 16 bits; words packed without gaps would take sixteen.
//
// The blocks come out in the order that they have in memory: the counters are dealt to the lanes so that two
// interleavings of 64-bit lanes, which stay within 128 bits, put them there.

#pragma once

#include "../philox.h"
#include "simd_bits.h"

namespace fastreg::FASTREG_SIMD {

using Counters = Vector<uint64_t>;

// Chains of rounds that are worked on at a time: one waits for its multiplications most of the time.
#if defined(__AVX512F__)
constexpr int philox_chains = 4;
#else
constexpr int philox_chains = 2;
#endif
constexpr int counters_per_step = philox_chains * lanes_of<uint64_t>;

// The words of `counters_per_step` blocks.
struct PhiloxStep {
  static constexpr int vectors = 2 * philox_chains;
  Counters vector[vectors];
};

// The products of the low halves of the lanes.
FASTREG_INLINE Counters multiply_low_halves(Counters words, Counters multiplier) {
#if defined(__AVX512F__)
  return bit_cast<Counters>(
      _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(words), bit_cast<__m512i>(multiplier)));
#elif defined(__AVX2__)
  return bit_cast<Counters>(_mm256_mul_epu32(bit_cast<__m256i>(words), bit_cast<__m256i>(multiplier)));
#elif defined(__SSE2__)
  return bit_cast<Counters>(_mm_mul_epu32(bit_cast<__m128i>(words), bit_cast<__m128i>(multiplier)));
#else
  return (words & 0xffffffff) * multiplier;
#endif
}

#if defined(__AVX512F__)
FASTREG_INLINE Counters swap_halves(Counters lanes) {
  return bit_cast<Counters>(_mm512_maskz_shuffle_epi32(0xffff, bit_cast<__m512i>(lanes), _MM_PERM_CDAB));
}
FASTREG_INLINE Counters interleave_even(Counters left, Counters right) {
  return bit_cast<Counters>(
      _mm512_maskz_unpacklo_epi64(0xff, bit_cast<__m512i>(left), bit_cast<__m512i>(right)));
}
FASTREG_INLINE Counters interleave_odd(Counters left, Counters right) {
  return bit_cast<Counters>(
      _mm512_maskz_unpackhi_epi64(0xff, bit_cast<__m512i>(left), bit_cast<__m512i>(right)));
}
#else
FASTREG_INLINE Counters swap_halves(Counters lanes) { return lanes >> 32 | lanes << 32; }
#if defined(__AVX2__)
FASTREG_INLINE Counters interleave_even(Counters left, Counters right) {
  return __builtin_shufflevector(left, right, 0, 4, 2, 6);
}
FASTREG_INLINE Counters interleave_odd(Counters left, Counters right) {
  return __builtin_shufflevector(left, right, 1, 5, 3, 7);
}
#else
FASTREG_INLINE Counters interleave_even(Counters left, Counters right) {
  return __builtin_shufflevector(left, right, 0, 2);
}
FASTREG_INLINE Counters interleave_odd(Counters left, Counters right) {
  return __builtin_shufflevector(left, right, 1, 3);
}
#endif
#endif

class PhiloxStream {
 public:
  FASTREG_INLINE explicit PhiloxStream(uint64_t seed) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < philox_rounds; ++round) {
      for (int k = 0; k < 2; ++k) {
        keys_[round][k] = broadcast(uint64_t{key[k]});
        key[k] += philox_key_steps[k];
      }
    }
    constexpr int half = lanes_of<uint64_t> / 2;
    for (int lane = 0; lane < lanes_of<uint64_t>; ++lane) {
      places_[lane] = static_cast<uint64_t>(lane % 2 * half + lane / 2);
    }
  }

  // Of the counters from `first` on.
  FASTREG_INLINE PhiloxStep step(uint64_t first) const {
    constexpr int chains = philox_chains;
    const Counters multipliers[2] = {broadcast(uint64_t{philox_multipliers[0]}),
                                     broadcast(uint64_t{philox_multipliers[1]})};
    Counters words[4][chains];
#pragma GCC unroll 4
    for (int k = 0; k < chains; ++k) {
      // The first round, with the two upper words of the counter zero.
      const Counters counter = broadcast(first + static_cast<uint64_t>(k * lanes_of<uint64_t>)) + places_;
      words[0][k] = counter >> 32 ^ keys_[0][0];
      words[1][k] = Counters{};
      words[3][k] = multiply_low_halves(counter, multipliers[0]);
      words[2][k] = words[3][k] >> 32 ^ keys_[0][1];
    }
#pragma GCC unroll 8
    for (int round = 1; round < philox_rounds - 1; ++round) {
#pragma GCC unroll 4
      for (int k = 0; k < chains; ++k) {
        const Counters product0 = multiply_low_halves(words[0][k], multipliers[0]);
        const Counters product1 = multiply_low_halves(words[2][k], multipliers[1]);
        words[0][k] = product1 >> 32 ^ words[1][k] ^ keys_[round][0];
        words[1][k] = product1;
        words[2][k] = product0 >> 32 ^ words[3][k] ^ keys_[round][1];
        words[3][k] = product0;
      }
    }
    PhiloxStep step;
#pragma GCC unroll 4
    for (int k = 0; k < chains; ++k) {
      constexpr int last = philox_rounds - 1;
      const Counters product0 = multiply_low_halves(words[0][k], multipliers[0]);
      const Counters product1 = multiply_low_halves(words[2][k], multipliers[1]);
      const Counters pair0 = swap_halves(product1) ^ (words[1][k] & 0xffffffff) ^ keys_[last][0];
      const Counters pair1 = swap_halves(product0) ^ (words[3][k] & 0xffffffff) ^ keys_[last][1];
      step.vector[2 * k] = interleave_even(pair0, pair1);
      step.vector[2 * k + 1] = interleave_odd(pair0, pair1);
    }
    return step;
  }

 private:
  Counters keys_[philox_rounds][2];
  Counters places_;
};

// --- lanes compared ----------------------------------------------------------------------------------------

// Units of 16 or 32 bits that a step decides.
constexpr int half_lanes_per_step = counters_per_step * philox_half_lanes;
constexpr int lanes_per_step = counters_per_step * philox_lanes;

// All bits of a unit that is kept, none of one that is dropped: a mask of any element type is made of these by
// one instruction.
using KeepLane = uint16_t;

// The 16-bit lanes of the blocks from `block` on, compared: `count` units at least, and up to a step more.
FASTREG_INLINE void keep_half_lanes(const PhiloxStream& stream, uint64_t block, int64_t count, uint16_t threshold,
                                    KeepLane* keep) {
  const Vector<uint16_t> limit = broadcast(threshold);
  for (int64_t unit = 0; unit < count; unit += half_lanes_per_step) {
    const PhiloxStep step = stream.step(block + static_cast<uint64_t>(unit / philox_half_lanes));
#pragma GCC unroll 8
    for (int k = 0; k < PhiloxStep::vectors; ++k) {
      const auto kept = bit_cast<Vector<uint16_t>>(step.vector[k]) >= limit;
      __builtin_memcpy(keep + unit + k * lanes_of<uint16_t>, &kept, sizeof(kept));
    }
  }
}

// The same of 32-bit lanes.
FASTREG_INLINE void keep_lanes(const PhiloxStream& stream, uint64_t block, int64_t count, uint32_t threshold,
                               KeepLane* keep) {
  const Words limit = broadcast(threshold);
  for (int64_t unit = 0; unit < count; unit += lanes_per_step) {
    const PhiloxStep step = stream.step(block + static_cast<uint64_t>(unit / philox_lanes));
#pragma GCC unroll 8
    for (int k = 0; k < PhiloxStep::vectors; ++k) {
      const HalfWords kept = upper_halves(bit_cast<Words>(bit_cast<Words>(step.vector[k]) >= limit));
      __builtin_memcpy(keep + unit + k * lanes_of<uint32_t>, &kept, sizeof(kept));
    }
  }
}

// A bit for each 32-bit lane of a step: whether it is `last` at most.
FASTREG_INLINE void put_bits_up_to(const PhiloxStep& step, uint32_t last, unsigned char* bits) {
#if defined(__AVX512F__)
  // Stored as they are: GCC 12, where it spills a mask that is widened to 32 bits, reads 16 more than it wrote.
#pragma GCC unroll 8
  for (int k = 0; k < PhiloxStep::vectors; ++k) {
    const __mmask16 some =
        _mm512_cmple_epu32_mask(bit_cast<__m512i>(step.vector[k]), bit_cast<__m512i>(broadcast(last)));
    __builtin_memcpy(bits + k * int{sizeof(some)}, &some, sizeof(some));
  }
#else
  const auto compare = [&](Counters vector) {
    return bits_of<Floats>(bit_cast<Words>(vector) <= broadcast(last));
  };
  constexpr int bytes = 2 * lanes_of<uint32_t> / 8;
#pragma GCC unroll 4
  for (int k = 0; k < philox_chains; ++k) {
    const uint32_t pair = compare(step.vector[2 * k]) | compare(step.vector[2 * k + 1]) << lanes_of<uint32_t>;
    __builtin_memcpy(bits + k * bytes, &pair, bytes);  // its low bytes: this machine is little-endian
  }
#endif
}

// Which lanes of a vector are kept, by `keep`, which is read for a whole vector.
template <class V>
FASTREG_INLINE LaneMask<V> keep_mask(const KeepLane* keep) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  Vector<KeepLane, lanes * int{sizeof(KeepLane)}> kept;
  __builtin_memcpy(&kept, keep, sizeof(kept));
#if defined(__AVX512DQ__)
  if constexpr (lanes == 16) {
    return _mm256_movepi16_mask(bit_cast<__m256i>(kept));
  } else {
    return _mm_movepi16_mask(bit_cast<__m128i>(kept));
  }
#elif defined(__AVX2__)
  if constexpr (lanes == 8) {
    return bit_cast<LaneMask<V>>(_mm256_cvtepi16_epi32(bit_cast<__m128i>(kept)));
  } else {
    return bit_cast<LaneMask<V>>(_mm256_cvtepi16_epi64(_mm_cvtsi64_si128(bit_cast<long long>(kept))));
  }
#elif defined(__SSE2__)
  __m128i words;
  if constexpr (lanes == 4) {
    words = _mm_cvtsi64_si128(bit_cast<long long>(kept));
  } else {
    words = _mm_cvtsi32_si128(bit_cast<int>(kept));
    words = _mm_unpacklo_epi16(words, words);
  }
  return bit_cast<LaneMask<V>>(_mm_unpacklo_epi16(words, words));
#else
  LaneMask<V> mask{};
  for (int lane = 0; lane < lanes; ++lane) {
    mask[lane] = kept[lane] == 0 ? 0 : -1;
  }
  return mask;
#endif
}

}  // namespace fastreg::FASTREG_SIMD
