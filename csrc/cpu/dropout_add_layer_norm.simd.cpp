// The kernel table of dropout, residual and layer norm for one instruction set.

#include "dropout_add_layer_norm.simd.h"

namespace fastreg::FASTREG_SIMD {

const DropoutAddNormKernels dropout_add_layer_norm_kernels[4][2] = {
    {dropout_add_norm_kernels<true, float, float>(), {}},
    {dropout_add_norm_kernels<true, BFloat16, BFloat16>(), dropout_add_norm_kernels<true, BFloat16, float>()},
    {dropout_add_norm_kernels<true, Float16, Float16>(), dropout_add_norm_kernels<true, Float16, float>()},
    {dropout_add_norm_kernels<true, double, double>(), {}}};

}  // namespace fastreg::FASTREG_SIMD
