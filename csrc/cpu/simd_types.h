// The vector types and arithmetic of the CPU kernels, for three instruction sets.
//
// Written with the compiler's vector extensions, so that the same lines become SSE2, AVX2 or AVX-512 code (or
// another machine's); intrinsics only where the extensions have no word for it. FASTREG_SIMD names the
// variant, and is the namespace everything lives in: each file that includes this header is compiled once per
// variant and linked into one library. Nothing of the standard library is used, since its inline functions
// would be shared between the variants.
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

// --- types -------------------------------------------------------------------------------------------------

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

// --- arithmetic --------------------------------------------------------------------------------------------

template <class Scalar>
FASTREG_INLINE Vector<Scalar> broadcast(Scalar value) {
  return value - Vector<Scalar>{};  // value - 0, the one form that keeps -0.0
}

// Scalars, with one rounding. The product of two floats is exact in double; the sum is rounded to odd there, and
// rounding that to float is as good as rounding the exact sum.
FASTREG_INLINE double fused_multiply_add(double factor, double other, double addend) {
  return __builtin_fma(factor, other, addend);
}

FASTREG_INLINE float fused_multiply_add(float factor, float other, float addend) {
  const double product = double(factor) * double(other);
  const double sum = product + double(addend);
  const double summand = sum - product;
  const double error = (product - (sum - summand)) + (double(addend) - summand);
  int64_t bits = bit_cast<int64_t>(sum);
  const bool inexact = error < 0 || error > 0;  // not where it is NaN: then the sum is not finite
  if (inexact && (bits & 1) == 0) {
    bits += (error > 0) == (sum > 0) ? 1 : -1;
  }
  return static_cast<float>(bit_cast<double>(bits));
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

// As above, but rounded once on every machine, so that a sign that depends on the result does not.
template <class V>
FASTREG_INLINE V fused_multiply_add(V factor, V other, V addend) {
#if defined(__FMA__)
  return multiply_add(factor, other, addend);
#else
  V result{};
#pragma GCC unroll 8
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(factor[0]); ++lane) {
    result[lane] = fused_multiply_add(factor[lane], other[lane], addend[lane]);
  }
  return result;
#endif
}

// The lanes in double: two fp32 lanes are added to one. A long sum's last additions are its largest, and in
// fp32 would cost it more digits than all others together.
FASTREG_INLINE Vector<double> in_double(Vector<double> vector) { return vector; }

FASTREG_INLINE Vector<double> in_double(Floats vector) {
  struct Halves {
    Vector<float, vector_bytes / 2> low, high;
  };
  const Halves halves = bit_cast<Halves>(vector);
  return __builtin_convertvector(halves.low, Vector<double>) +
         __builtin_convertvector(halves.high, Vector<double>);
}

// The sum of all lanes, a fixed tree.
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

}  // namespace fastreg::FASTREG_SIMD
