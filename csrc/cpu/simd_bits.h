// One bit a lane: comparisons stored as bits, and bits turned into lanes again.
//
// Element j of a line is bit j % 8 of byte j / 8. A vector of sixteen or eight lanes covers whole bytes; narrower ones
// share a byte, and the columns of a line must then be visited in their order.

#pragma once

#include <type_traits>

#include "simd.h"

namespace fastreg::FASTREG_SIMD {

// Which lanes a comparison holds for: a mask register with AVX-512, else a vector whose lanes have all bits set or
// none.
#if defined(__AVX512DQ__)
template <class V>
using LaneMask = uint32_t;
#else
template <class V>
using LaneMask = decltype(V{} < V{});
#endif

// Lanes above zero.
template <class V>
FASTREG_INLINE LaneMask<V> is_positive(V vector) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(vector[0]) == 4) {
    return _mm512_cmp_ps_mask(vector, V{}, _CMP_GT_OQ);
  } else {
    return _mm512_cmp_pd_mask(vector, V{}, _CMP_GT_OQ);
  }
#else
  return vector > V{};
#endif
}

// Lanes that are not zero or below: NaN too.
template <class V>
FASTREG_INLINE LaneMask<V> is_positive_or_nan(V vector) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(vector[0]) == 4) {
    return _mm512_cmp_ps_mask(vector, V{}, _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(vector, V{}, _CMP_NLE_UQ);
  }
#else
  return ~(vector <= V{});
#endif
}

template <class V>
FASTREG_INLINE V select(LaneMask<V> mask, V there, V elsewhere) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(there[0]) == 4) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), elsewhere, there);
  } else {
    return _mm512_mask_blend_pd(static_cast<__mmask8>(mask), elsewhere, there);
  }
#else
  return mask ? there : elsewhere;
#endif
}

template <class Scalar>
FASTREG_INLINE int lane_count(AllLanes) {
  return lanes_of<Scalar>;
}

template <class Scalar>
FASTREG_INLINE int lane_count(SomeLanes lanes) {
  return lanes.count;
}

template <class Scalar>
FASTREG_INLINE int lane_count(LastLanes lanes) {
  return lanes.count;
}

template <class V>
FASTREG_INLINE uint32_t bits_of(LaneMask<V> mask) {
#if defined(__AVX512DQ__)
  return mask;
#elif defined(__AVX2__)
  if constexpr (sizeof(V{}[0]) == 4) {
    return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(V{}[0]) == 4) {
    return static_cast<uint32_t>(_mm_movemask_ps(bit_cast<__m128>(mask)));
  } else {
    return static_cast<uint32_t>(_mm_movemask_pd(bit_cast<__m128d>(mask)));
  }
#else
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(V{}[0]); ++lane) {
    bits |= (mask[lane] != 0 ? 1u : 0u) << lane;
  }
  return bits;
#endif
}

template <class V>
FASTREG_INLINE LaneMask<V> mask_of_bits(uint32_t bits) {
#if defined(__AVX512DQ__)
  return bits;
#else
  LaneMask<V> own{};
#pragma GCC unroll 8
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(V{}[0]); ++lane) {
    own[lane] = 1 << lane;
  }
  return ((LaneMask<V>{} + bits) & own) != 0;
#endif
}

template <class Scalar, class Lanes>
FASTREG_INLINE void store_bits(Lanes lanes, unsigned char* line, int64_t column, uint32_t bits) {
  const int count = lane_count<Scalar>(lanes);
  if constexpr (std::is_same_v<Lanes, LastLanes>) {
    bits >>= lanes_of<Scalar> - count;
  } else {
    bits &= (1u << count) - 1;
  }
  unsigned char* target = line + column / 8;
  if constexpr (lanes_of<Scalar> == 16) {
    if (count > 8) {
      const uint16_t both = static_cast<uint16_t>(bits);  // little-endian, as all machines with so many lanes are
      __builtin_memcpy(target, &both, sizeof(both));
    } else {
      target[0] = static_cast<unsigned char>(bits);
    }
  } else {
    const int shift = static_cast<int>(column % 8);
    target[0] = static_cast<unsigned char>(shift == 0 ? bits : target[0] | bits << shift);
  }
}

template <class Scalar, class Lanes>
FASTREG_INLINE uint32_t load_bits(Lanes lanes, const unsigned char* line, int64_t column) {
  const unsigned char* source = line + column / 8;
  if constexpr (std::is_same_v<Lanes, LastLanes>) {
    // Sixteen bits from any one on lie in three bytes at most, eight or fewer in two.
    const int64_t begin = column + lanes.count - lanes_of<Scalar>;
    const int64_t last = (column + lanes.count - 1) / 8;
    uint32_t bytes = uint32_t{line[begin / 8]};
    if constexpr (lanes_of<Scalar> == 16) {
      bytes |= uint32_t{line[begin / 8 + 1]} << 8 | uint32_t{line[last]} << 16;
    } else {
      bytes |= uint32_t{line[last]} << 8;
    }
    return bytes >> (begin % 8);
  } else if constexpr (lanes_of<Scalar> == 16) {
    if (lane_count<Scalar>(lanes) > 8) {
      uint16_t both;
      __builtin_memcpy(&both, source, sizeof(both));
      return both;
    }
    return source[0];
  } else {
    return uint32_t{source[0]} >> (column % 8);
  }
}

}  // namespace fastreg::FASTREG_SIMD
