// RMS norm's kernel table for one instruction set: layer norm's kernels without the centring.

#include "layer_norm.simd.h"

namespace fastreg::FASTREG_SIMD {

const NormKernels rms_norm_kernels[4] = {norm_kernels<false, float>(), norm_kernels<false, BFloat16>(),
                                         norm_kernels<false, Float16>(), norm_kernels<false, double>()};

}  // namespace fastreg::FASTREG_SIMD
