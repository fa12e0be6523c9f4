// The kernel table of dropout, residual and rms norm for one instruction set.

#include "dropout_add_layer_norm.simd.h"

namespace fastreg::FASTREG_SIMD {

const DropoutAddNormKernels dropout_add_rms_norm_kernels[4][2] = {
    {dropout_add_norm_kernels<false, float, float>(), {}},
    {dropout_add_norm_kernels<false, BFloat16, BFloat16>(), dropout_add_norm_kernels<false, BFloat16, float>()},
    {dropout_add_norm_kernels<false, Float16, Float16>(), dropout_add_norm_kernels<false, Float16, float>()},
    {dropout_add_norm_kernels<false, double, double>(), {}}};

}  // namespace fastreg::FASTREG_SIMD
