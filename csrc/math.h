// Scalar formulae of the norms, shared by host and device.
//
// Every function is forced inline: the CPU kernels are compiled once per instruction set, and an out-of-line
// copy made for the widest of them must never be the one the linker keeps.

#pragma once

#if defined(__CUDACC__)
#define FASTREG_INLINE __host__ __device__ __forceinline__
#else
#define FASTREG_INLINE inline __attribute__((always_inline))
#endif

namespace fastreg {

// Count, mean and sum of squared deviations from that mean, of a part of a row.
template <class Scalar>
struct Moments {
  Scalar count;
  Scalar mean;
  Scalar squares;
};

// Chan, Golub and LeVeque's pairwise update: the moments of two parts together. Exact in the counts, free of
// the cancellation of E[x^2] - E[x]^2. Merging in a fixed order gives equal bits whoever computed the parts.
template <class Scalar>
FASTREG_INLINE Moments<Scalar> merge(const Moments<Scalar>& left, const Moments<Scalar>& right) {
  const Scalar count = left.count + right.count;
  if (count == Scalar(0)) {
    return left;
  }
  const Scalar difference = right.mean - left.mean;
  const Scalar share = right.count / count;
  return {count, left.mean + difference * share,
          left.squares + right.squares + difference * difference * left.count * share};
}

FASTREG_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
FASTREG_INLINE double square_root(double value) { return __builtin_sqrt(value); }

// rstd of both norms: `squares` is the sum of squared deviations (layer norm) or of squares (rms norm) of
// `count` elements.
template <class Scalar>
FASTREG_INLINE Scalar reciprocal_deviation(Scalar squares, Scalar count, Scalar eps) {
  return Scalar(1) / square_root(squares / count + eps);
}

}  // namespace fastreg
