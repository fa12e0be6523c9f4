// DropBlock's kernel tables for one instruction set.

#include "drop_block_channels_last.simd.h"
#include "drop_block_mask.simd.h"
#include "drop_block_planes.simd.h"

namespace fastreg::FASTREG_SIMD {
namespace {

template <class Element>
constexpr DropBlockKernels kernels() {
  return {apply_planes<Element>, channels_last_scratch, apply_channels_last<Element>};
}

}  // namespace

const DropBlockKernels drop_block_kernels[4] = {kernels<float>(), kernels<BFloat16>(), kernels<Float16>(),
                                                kernels<double>()};

const DropBlockMaskKernels drop_block_mask_kernels = {mask_scratch, mask_groups};

}  // namespace fastreg::FASTREG_SIMD
