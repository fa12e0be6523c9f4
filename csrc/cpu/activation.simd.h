// The activations and their derivatives on vectors, fp32 and fp64.
//
// fp32 has polynomials of its own: exp to about an ulp, and for gelu the normal distribution's tail,
//
//   Phi(-a) = exp(-a^2 / 2) * Q(1 / (1 + 0.26 a))  for a >= 0,
//
// Q of degree 9 fitted to the relative error 5e-9, so that neither side of gelu cancels. fp64 asks the C
// library, lane by lane. Infinities and NaN give what torch's formulas give: silu(-inf) is NaN.

#pragma once

#include "../activation.h"
#include "simd.h"

namespace fastreg::FASTREG_SIMD {

template <class V>
FASTREG_INLINE V constant(double value) {
  using Scalar = decltype(V{}[0] + V{}[0]);
  return broadcast(static_cast<Scalar>(value));
}

template <class V>
struct Polynomial {
  V argument;
  V value;

  FASTREG_INLINE Polynomial then(double coefficient) const {
    return {argument, multiply_add(value, argument, constant<V>(coefficient))};
  }
};

// --- exponentials ------------------------------------------------------------------------------------------

// Zero below the smallest normal number, infinite from about 2^127 on, where nothing here needs it.
FASTREG_INLINE Floats exponential(Floats x) {
  constexpr float least = -87.3f;
  constexpr float largest = 88.3f;
  // 1.5 * 2^23: a sum with it has the rounded integer in its low bits.
  const Floats magic = constant<Floats>(0x1.8p23);
#if defined(__AVX512F__)
  // What lies beyond the bounds is replaced in the end, whatever it has become.
  const Floats bounded = x;
#else
  Floats bounded = x < least ? constant<Floats>(least) : x;
  bounded = bounded > largest ? constant<Floats>(largest) : bounded;
#endif
  const Floats shifted = multiply_add(bounded, constant<Floats>(1.44269504088896341), magic);
  const Floats power = shifted - magic;
  Floats rest = multiply_add(power, constant<Floats>(-0.693359375), bounded);
  rest = multiply_add(power, constant<Floats>(2.12194440e-4), rest);
  const Floats series = Polynomial<Floats>{rest, constant<Floats>(1.9875691500e-4)}
                            .then(1.3981999507e-3)
                            .then(8.3334519073e-3)
                            .then(4.1665795894e-2)
                            .then(1.6666665459e-1)
                            .then(5.0000001201e-1)
                            .value;
  const Floats value = multiply_add(series, rest * rest, rest) + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x, constant<Floats>(least), _CMP_NLT_UQ);
  const Floats result = _mm512_maskz_scalef_ps(is_normal, value, power);
#else
  const Words exponent = (bit_cast<Words>(shifted) - bit_cast<Words>(magic)) << 23;
  const Floats product = bit_cast<Floats>(bit_cast<Words>(value) + exponent);
  const Floats result = x < least ? Floats{} : product;
#endif
  return x > largest ? constant<Floats>(__builtin_inf()) : result;
}

FASTREG_INLINE Vector<double> exponential(Vector<double> x) {
  Vector<double> result{};
#pragma GCC unroll 1
  for (int lane = 0; lane < lanes_of<double>; ++lane) {
    result[lane] = __builtin_exp(x[lane]);
  }
  return result;
}

// --- the normal distribution -------------------------------------------------------------------------------

template <class V>
struct Normal {
  V distribution;  // Phi
  V density;       // phi
};

FASTREG_INLINE Normal<Floats> normal(Floats z) {
  const Floats magnitude = z < 0.0f ? -z : z;
  const Floats bell = exponential(-0.5f * (magnitude * magnitude));
  const Floats t = 1.0f / (1.0f + 0.26f * magnitude);
  const Floats tail = bell * Polynomial<Floats>{t, constant<Floats>(0.033918564)}
                                 .then(-0.17047586)
                                 .then(0.290877187)
                                 .then(-0.200664666)
                                 .then(0.19998929)
                                 .then(0.0312804438)
                                 .then(0.109454761)
                                 .then(0.101721596)
                                 .then(0.10390581)
                                 .then(-7.12181713e-06)
                                 .value;
  return {z < 0.0f ? tail : 1.0f - tail, bell * 0.398942280401432678f};
}

FASTREG_INLINE Normal<Vector<double>> normal(Vector<double> z) {
  Normal<Vector<double>> result{};
#pragma GCC unroll 1
  for (int lane = 0; lane < lanes_of<double>; ++lane) {
    result.distribution[lane] = 0.5 * __builtin_erfc(z[lane] * -0.707106781186547524);
  }
  result.density = exponential(-0.5 * (z * z)) * 0.398942280401432678;
  return result;
}

// --- activations with a smooth or piecewise derivative -----------------------------------------------------

// sqrt(2 / pi) twice, since tanh(u) = 2 sigmoid(2 u) - 1.
constexpr double tanh_linear = 1.59576912160573072;
constexpr double tanh_cubic = tanh_linear * 0.044715;

// silu, gelu, gelu_tanh or hardswish of z.
template <class V>
FASTREG_INLINE V activate_smooth(Activation activation, V z) {
  const V one = constant<V>(1);
  switch (activation) {
    case Activation::silu:
      return z / (one + exponential(-z));
    case Activation::gelu:
      return z * normal(z).distribution;
    case Activation::gelu_tanh:
      return z / (one + exponential(-z * multiply_add(z * z, constant<V>(tanh_cubic), constant<V>(tanh_linear))));
    default: {
      V gate = z + constant<V>(3);
      gate = gate < constant<V>(0) ? V{} : gate;
      gate = gate > constant<V>(6) ? constant<V>(6) : gate;
      return z * gate / constant<V>(6);
    }
  }
}

template <class V>
FASTREG_INLINE V derivative_smooth(Activation activation, V z) {
  const V one = constant<V>(1);
  // sigmoid(u) and its complement, either without cancellation.
  const auto sigmoid = [&](V u, V& complement) {
    const V power = exponential(-u);
    const V value = one / (one + power);
    complement = u > V{} ? power * value : one - value;
    return value;
  };
  V complement;
  switch (activation) {
    case Activation::silu: {
      const V value = sigmoid(z, complement);
      return value * multiply_add(z, complement, one);
    }
    case Activation::gelu: {
      const Normal<V> at = normal(z);
      return multiply_add(z, at.density, at.distribution);
    }
    case Activation::gelu_tanh: {
      // The derivative is 0 or 1 from here on, and the cube of a larger argument may be infinite.
      const V least = constant<V>(-30);
      const V largest = constant<V>(30);
      V bounded = z < least ? least : z;
      bounded = bounded > largest ? largest : bounded;
      const V square = bounded * bounded;
      const V argument = bounded * multiply_add(square, constant<V>(tanh_cubic), constant<V>(tanh_linear));
      const V value = sigmoid(argument, complement);
      const V inner = multiply_add(square, constant<V>(3 * tanh_cubic), constant<V>(tanh_linear));
      return multiply_add(bounded * inner, value * complement, value);
    }
    default: {
      const V middle = multiply_add(z, constant<V>(1.0 / 3.0), constant<V>(0.5));
      return z <= constant<V>(-3) ? V{} : (z < constant<V>(3) ? middle : one);
    }
  }
}

}  // namespace fastreg::FASTREG_SIMD
