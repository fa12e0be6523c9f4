// Weights and biases of any dtype: widened to fp32 before a kernel reads them, and their gradients reduced
// from a kernel's partial sums and rounded once to the parameter's dtype.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "dispatch.h"

namespace fastreg {

struct ParameterKernels {
  // Elements [begin, end) of `source`, a 16-bit float array of any alignment, as fp32.
  void (*widen)(DType dtype, const void* source, float* target, int64_t begin, int64_t end);
  // Sums columns [begin, end) of `partials`, (chunks, columns) of fp32 or, for a fp64 target, fp64, over the
  // chunks in their order, in double, into `target`.
  void (*reduce)(const void* partials, int64_t chunks, int64_t columns, DType dtype, void* target,
                 int64_t begin, int64_t end);
};

#define FASTREG_DECLARE_PARAMETER_KERNELS(simd)    \
  namespace simd {                                 \
  extern const ParameterKernels parameter_kernels; \
  }
FASTREG_FOR_EACH_SIMD(FASTREG_DECLARE_PARAMETER_KERNELS)

}  // namespace fastreg
