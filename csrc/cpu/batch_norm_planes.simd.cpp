// Batch norm's kernel table of the planes family for one instruction set.

#include "batch_norm.simd.h"

namespace fastreg::FASTREG_SIMD {

const BatchNormKernels batch_norm_planes_kernels[4] = {
    batch_norm_kernels<false, float>(), batch_norm_kernels<false, BFloat16>(),
    batch_norm_kernels<false, Float16>(), batch_norm_kernels<false, double>()};

}  // namespace fastreg::FASTREG_SIMD
