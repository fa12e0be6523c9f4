// Batch norm's kernel table of the rows family for one instruction set.

#include "batch_norm.simd.h"

namespace fastreg::FASTREG_SIMD {

const BatchNormKernels batch_norm_rows_kernels[4] = {
    batch_norm_kernels<true, float>(), batch_norm_kernels<true, BFloat16>(),
    batch_norm_kernels<true, Float16>(), batch_norm_kernels<true, double>()};

}  // namespace fastreg::FASTREG_SIMD
