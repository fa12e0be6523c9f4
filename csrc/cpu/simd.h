// One vector type and its few operations, for three instruction sets.
//
// Written with the compiler's vector extensions, so that the same lines become SSE2, AVX2 or AVX-512 code (or another
// machine's); intrinsics only where the extensions have no word for it. FASTREG_SIMD names the variant, and is the namespace
// everything lives in: each file that includes this header is compiled once per variant and linked into one library.
// Nothing of the standard library is used, since its inline functions would be shared between the variants.
//
// Elements are read as fp32 (fp64 stays fp64) and rounded once, to nearest even, when they are stored.

#pragma once

#ifndef FASTREG_SIMD
#error "compile with -DFASTREG_SIMD=baseline, avx2 or avx512"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>

#include "../math.h"

namespace fastreg::FASTREG_SIMD {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// --- types ------------------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type an element is computed in.
template <class Element>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class Element>
using Accumulator = typename AccumulatorOf<Element>::type;

template <class Scalar, int bytes>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(bytes)));
};
template <class Scalar, int bytes = vector_bytes>
using Vector = typename VectorOf<Scalar, bytes>::type;

template <class Scalar>
constexpr int lanes_of = vector_bytes / static_cast<int>(sizeof(Scalar));

constexpr int float_lanes = lanes_of<float>;
using Floats = Vector<float>;
using Words = Vector<uint32_t>;                        // a float's bits
using HalfWords = Vector<uint16_t, vector_bytes / 2>;  // as many 16-bit elements as a vector has floats

template <class To, class From>
FASTREG_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// --- arithmetic -------------------------------------------------------------------------------------------------------

template <class Scalar>
FASTREG_INLINE Vector<Scalar> broadcast(Scalar value) {
  return value - Vector<Scalar>{};  // value - 0, the one form that keeps -0.0
}

template <class V>
FASTREG_INLINE V multiply_add(V factor, V other, V addend) {
#if defined(__AVX512F__)
  if constexpr (sizeof(factor[0]) == 8) {
    return _mm512_fmadd_pd(factor, other, addend);
  } else {
    return _mm512_fmadd_ps(factor, other, addend);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(factor[0]) == 8) {
    return _mm256_fmadd_pd(factor, other, addend);
  } else {
    return _mm256_fmadd_ps(factor, other, addend);
  }
#else
  return factor * other + addend;
#endif
}

// The sum of all lanes, a fixed tree. fp32 lanes are added in double: a long sum's last additions are its largest, and would
// cost it more digits than all others together.
FASTREG_INLINE double sum_lanes(Vector<double> vector) {
  double sums[lanes_of<double>];
  __builtin_memcpy(sums, &vector, sizeof(sums));
#pragma GCC unroll 8
  for (int half = lanes_of<double> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return sums[0];
}

FASTREG_INLINE Vector<double> add_pairs(Floats vector) {
  struct Halves {
    Vector<float, vector_bytes / 2> low, high;
  };
  const Halves halves = bit_cast<Halves>(vector);
  return __builtin_convertvector(halves.low, Vector<double>) + __builtin_convertvector(halves.high, Vector<double>);
}

FASTREG_INLINE double sum_lanes(Floats vector) { return sum_lanes(add_pairs(vector)); }

// --- 16-bit elements --------------------------------------------------------------------------------------------------

// widen: words with the given low halves and zero above. upper_halves: the inverse of widen(...) << 16.
//
// Intrinsics, because GCC 12 makes three times the instructions of __builtin_convertvector, and with full masks, because it
// warns of its own header in the forms without one.
#if defined(__AVX512F__)
FASTREG_INLINE Words widen(HalfWords halves) {
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(halves)));
}
// A permutation, since the narrowing store (vpmovdw to memory), which GCC would make of a conversion, is slow on AMD.
FASTREG_INLINE HalfWords upper_halves(Words words) {
  const Vector<uint16_t> odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i packed = _mm512_maskz_permutexvar_epi16(~0u, bit_cast<__m512i>(odd), bit_cast<__m512i>(words));
  HalfWords lower;
  __builtin_memcpy(&lower, &packed, sizeof(lower));
  return lower;
}
#elif defined(__AVX2__)
FASTREG_INLINE Words widen(HalfWords halves) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
}
FASTREG_INLINE HalfWords upper_halves(Words words) {
  const __m256i bits = _mm256_srli_epi32(bit_cast<__m256i>(words), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0b1000);
  return bit_cast<HalfWords>(_mm256_castsi256_si128(packed));
}
#elif defined(__SSE2__)
FASTREG_INLINE Words widen(HalfWords halves) {
  const __m128i low = _mm_cvtsi64_si128(bit_cast<long long>(halves));
  return bit_cast<Words>(_mm_unpacklo_epi16(low, _mm_setzero_si128()));
}
// Sign-extended words pass SSE2's saturation, which is signed, unchanged.
FASTREG_INLINE HalfWords upper_halves(Words words) {
  const __m128i bits = _mm_srai_epi32(bit_cast<__m128i>(words), 16);
  return bit_cast<HalfWords>(_mm_cvtsi128_si64(_mm_packs_epi32(bits, bits)));
}
#else
FASTREG_INLINE Words widen(HalfWords halves) { return __builtin_convertvector(halves, Words); }
FASTREG_INLINE HalfWords upper_halves(Words words) { return __builtin_convertvector(words >> 16, HalfWords); }
#endif

FASTREG_INLINE Floats decode(HalfWords halves, BFloat16) { return bit_cast<Floats>(widen(halves) << 16); }

FASTREG_INLINE HalfWords encode(Floats values, BFloat16) {
  const Words bits = bit_cast<Words>(values);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Words quiet_nan = bits | 0x400000;  // rounding could carry a NaN's payload into an infinity
  return upper_halves(values == values ? rounded : quiet_nan);
}

FASTREG_INLINE Floats decode(HalfWords halves, Float16) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(halves));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(halves));
#else
  // Shifted into a float's fields the number is 2^-112 of itself, subnormals included; infinity and NaN need their
  // exponent filled.
  const Words bits = widen(halves);
  const Words magnitude = bits & 0x7fff;
  const Words scaled = bit_cast<Words>(bit_cast<Floats>(magnitude << 13) * 0x1p112f);
  const Words special = scaled | 0x7f800000;
  return bit_cast<Floats>((magnitude >= 0x7c00 ? special : scaled) | ((bits & 0x8000) << 16));
#endif
}

FASTREG_INLINE HalfWords encode(Floats values, Float16) {
#if defined(__AVX512F__)
  return bit_cast<HalfWords>(_mm512_maskz_cvtps_ph(0xffff, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<HalfWords>(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = bit_cast<Words>(values);
  const Words magnitude = bits & 0x7fffffff;
  // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that fall off; the carry of 65520 makes infinity.
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: 0.5 has the spacing of fp16's subnormals, so the addition itself rounds.
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? Words{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Words{} + 0x7e00 : result;
  return upper_halves((result << 16) | (bits & 0x80000000));
#endif
}

// --- loads and stores -------------------------------------------------------------------------------------------------

// Past the caches, for outputs too large to be found there again: saves the read of each line before it is overwritten.
// `target` must be aligned to the vector; finish_streams() makes the stores visible to other threads.
template <class V>
FASTREG_INLINE void stream_bytes(void* target, const V& vector) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(target), bit_cast<__m512i>(vector));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(target), bit_cast<__m256i>(vector));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(target), bit_cast<__m128i>(vector));
  }
#endif
  __builtin_memcpy(target, &vector, sizeof(vector));
}

FASTREG_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A vector's worth of adjacent elements, of any alignment.
struct AllLanes {
  template <class Element>
  FASTREG_INLINE Vector<Accumulator<Element>> load(const Element* source) const {
    if constexpr (sizeof(Element) == 2) {
      HalfWords halves;
      __builtin_memcpy(&halves, source, sizeof(halves));
      return decode(halves, Element{});
    } else {
      Vector<Element> vector;
      __builtin_memcpy(&vector, source, sizeof(vector));
      return vector;
    }
  }

  template <class Element>
  FASTREG_INLINE void store(Element* target, Vector<Accumulator<Element>> vector) const {
    if constexpr (sizeof(Element) == 2) {
      const HalfWords halves = encode(vector, Element{});
      __builtin_memcpy(target, &halves, sizeof(halves));
    } else {
      __builtin_memcpy(target, &vector, sizeof(vector));
    }
  }

  template <class Element>
  FASTREG_INLINE void stream(Element* target, Vector<Accumulator<Element>> vector) const {
    if constexpr (sizeof(Element) == 2) {
      stream_bytes(target, encode(vector, Element{}));
    } else {
      stream_bytes(target, vector);
    }
  }

  template <class V>
  FASTREG_INLINE V keep(V vector) const {
    return vector;
  }
};

// The first `count` lanes: the end of a row. Missing lanes load as zero and are never touched in memory.
struct SomeLanes {
  int count;

  template <class Element>
  FASTREG_INLINE Vector<Accumulator<Element>> load(const Element* source) const {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(Element) == 2) {
      return decode(bit_cast<HalfWords>(_mm256_maskz_loadu_epi16(mask(), source)), Element{});
    } else if constexpr (sizeof(Element) == 4) {
      return _mm512_maskz_loadu_ps(mask(), source);
    } else {
      return _mm512_maskz_loadu_pd(mask(), source);
    }
#else
    Element elements[lanes_of<Accumulator<Element>>] = {};
    copy(elements, source);
    return AllLanes{}.load(elements);
#endif
  }

  template <class Element>
  FASTREG_INLINE void store(Element* target, Vector<Accumulator<Element>> vector) const {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(Element) == 2) {
      _mm256_mask_storeu_epi16(target, mask(), bit_cast<__m256i>(encode(vector, Element{})));
    } else if constexpr (sizeof(Element) == 4) {
      _mm512_mask_storeu_ps(target, mask(), vector);
    } else {
      _mm512_mask_storeu_pd(target, mask(), vector);
    }
#else
    Element elements[lanes_of<Accumulator<Element>>];
    AllLanes{}.store(elements, vector);
    copy(target, elements);
#endif
  }

  template <class Element>
  FASTREG_INLINE void stream(Element* target, Vector<Accumulator<Element>> vector) const {
    store(target, vector);
  }

  // Zeroes the missing lanes.
  template <class V>
  FASTREG_INLINE V keep(V vector) const {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(vector[0]) == 4) {
      return _mm512_maskz_mov_ps(mask(), vector);
    } else {
      return _mm512_maskz_mov_pd(mask(), vector);
    }
#else
    using Scalar = decltype(vector[0] + vector[0]);
    Scalar elements[lanes_of<Scalar>] = {};
    Scalar all[lanes_of<Scalar>];
    AllLanes{}.store(all, vector);
    copy(elements, all);
    return AllLanes{}.load(elements);
#endif
  }

 private:
  FASTREG_INLINE uint16_t mask() const { return static_cast<uint16_t>((1u << count) - 1); }

  // Without unrolling: this is inlined wherever a row ends.
  template <class Element>
  FASTREG_INLINE void copy(Element* target, const Element* source) const {
#pragma GCC unroll 1
    for (int lane = 0; lane < count; ++lane) {
      target[lane] = source[lane];
    }
  }
};

// Calls body(lanes, column, k) for every vector of `columns` columns; k counts 0 .. unroll - 1 and chooses one of as many
// independent accumulators, so that additions overlap.
template <class Scalar, int unroll, class Body>
FASTREG_INLINE void for_columns(int64_t columns, const Body& body) {
  constexpr int lanes = lanes_of<Scalar>;
  int64_t column = 0;
  for (; column + unroll * lanes <= columns; column += unroll * lanes) {
#pragma GCC unroll 8
    for (int k = 0; k < unroll; ++k) {
      body(AllLanes{}, column + k * lanes, k);
    }
  }
  for (; column + lanes <= columns; column += lanes) {
    body(AllLanes{}, column, 0);
  }
  if (column < columns) {
    body(SomeLanes{static_cast<int>(columns - column)}, column, 0);
  }
}

}  // namespace fastreg::FASTREG_SIMD
