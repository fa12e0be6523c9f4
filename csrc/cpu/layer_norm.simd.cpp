// Layer norm's kernel table for one instruction set.

#include "layer_norm.simd.h"

namespace fastreg::FASTREG_SIMD {

const NormKernels layer_norm_kernels[4] = {norm_kernels<true, float>(), norm_kernels<true, BFloat16>(),
                                           norm_kernels<true, Float16>(), norm_kernels<true, double>()};

}  // namespace fastreg::FASTREG_SIMD
