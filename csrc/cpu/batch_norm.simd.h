// CPU kernels of batch norm: templates on the family and the element type, gathered into tables.
//
// Determinism: units, blocks and chunks depend on the shape only, so the order of every addition does too, whatever the
// number of threads and the tiles that they take.

#pragma once

#include "batch_norm_backward.simd.h"
#include "batch_norm_forward.simd.h"
#include "batch_norm_moments.simd.h"

namespace fastreg::FASTREG_SIMD {

template <bool rows, class Element>
constexpr BatchNormKernels batch_norm_kernels() {
  return {moments<rows, Element>,   finish_moments<rows, Element>, finish_running<Accumulator<Element>>,
          normalize<rows, Element>, sums<rows, Element>,           finish_sums<Accumulator<Element>>,
          gradient<rows, Element>};
}

}  // namespace fastreg::FASTREG_SIMD
