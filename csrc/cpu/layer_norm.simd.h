// CPU kernels of layer norm and rms norm: templates on the element type and on whether the row is centred
// (layer norm) or not (rms norm), gathered into a table.
//
// Determinism: chunks of rows, groups of four and blocks of columns depend on the shape only, so the order of
// every addition does too, whatever the number of threads.

#pragma once

#include "layer_norm_backward.simd.h"
#include "layer_norm_forward.simd.h"

namespace fastreg::FASTREG_SIMD {

template <bool centred, class Element>
constexpr NormKernels norm_kernels() {
  return {columns_per_block<Element>,           columns_per_grouped_row<Element>,
          forward_rows<centred, Element>,       forward_moments<centred, Element>,
          forward_statistics<centred, Element>, forward_normalize<centred, Element, Element>,
          backward_chunks<centred, Element>,    backward_sums<centred, Element, Element>,
          backward_apply<centred, Element>};
}

}  // namespace fastreg::FASTREG_SIMD
