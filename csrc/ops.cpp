// Every native schema, a line each. The same texts are defined under the namespace fastreg in Python; a test
// compares them.
//
// The kernels are registered by cpu/<op>.cpp here and by cuda/<op>.cu in a second library.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastreg_native, m) {
  m.def(
      "layer_norm_fwd(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "layer_norm_bwd(Tensor grad_output, Tensor input, int normalized_ndim, Tensor statistics, Tensor? "
      "weight, "
      "Tensor? bias, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_fwd(Tensor input, int normalized_ndim, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_bwd(Tensor grad_output, Tensor input, int normalized_ndim, Tensor statistics, Tensor? "
      "weight, "
      "bool[2] output_mask) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_fwd(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, float eps, int activation, float negative_slope, bool "
      "skip_nonfinite, bool keep_signs) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, int activation, float negative_slope, bool keep_signs) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "batch_norm_bwd(Tensor grad_output, Tensor input, Tensor? residual, Tensor? signs, Tensor statistics, "
      "Tensor? weight, Tensor? bias, bool training, int activation, float negative_slope, bool[4] "
      "output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("batch_norm_moments(Tensor input) -> Tensor");
  m.def(
      "batch_norm_apply(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor statistics, int "
      "activation, float negative_slope, bool keep_signs) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_sums(Tensor grad_output, Tensor input, Tensor? residual, Tensor? signs, Tensor statistics, "
      "Tensor? weight, Tensor? bias, int activation, float negative_slope) -> Tensor");
  m.def(
      "batch_norm_bwd_apply(Tensor grad_output, Tensor input, Tensor? residual, Tensor? signs, Tensor "
      "statistics, Tensor? weight, Tensor? bias, Tensor? means, int activation, float negative_slope, bool[2] "
      "output_mask) -> (Tensor, Tensor)");
  m.def(
      "group_norm_fwd(Tensor input, int groups, Tensor? weight, Tensor? bias, float eps, int activation, float "
      "negative_slope) -> (Tensor, Tensor)");
  m.def(
      "group_norm_bwd(Tensor grad_output, Tensor input, int groups, Tensor statistics, Tensor? weight, Tensor? "
      "bias, int activation, float negative_slope, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "instance_norm_fwd(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? "
      "running_var, float momentum, float eps, int activation, float negative_slope) -> (Tensor, Tensor)");
  m.def(
      "dropout_fwd(Tensor input, Tensor? residual, Tensor? row_scale, Tensor? layer_scale, Tensor? seed, int "
      "threshold, Tensor? dynamic_threshold, int unit, bool rescale) -> Tensor");
  m.def(
      "dropout_inplace(Tensor(a!) input, Tensor seed, int threshold, Tensor? dynamic_threshold, int unit, bool "
      "rescale) -> ()");
  m.def(
      "dropout_bwd(Tensor grad_output, Tensor? input, Tensor? row_scale, Tensor? layer_scale, Tensor? seed, int "
      "threshold, Tensor? dynamic_threshold, int unit, bool rescale, int input_dtype, bool[2] output_mask) -> "
      "(Tensor, Tensor)");
  m.def(
      "drop_block_mask(Tensor seed, int[] shape, int[] block_size, int threshold, Tensor? dynamic_threshold, bool "
      "anywhere) -> (Tensor, Tensor)");
  m.def("drop_block_apply(Tensor input, Tensor bits, Tensor scale) -> Tensor");
  m.def("drop_block_inplace(Tensor(a!) input, Tensor bits, Tensor scale) -> ()");
  m.def(
      "dropout_add_layer_norm_fwd(Tensor input, Tensor? residual, int normalized_ndim, Tensor? weight, Tensor? "
      "bias, Tensor? row_scale, Tensor? layer_scale, Tensor? seed, int threshold, Tensor? dynamic_threshold, "
      "float eps, bool float_sum, bool keep_sum) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_layer_norm_bwd(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? input, int "
      "normalized_ndim, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? row_scale, Tensor? "
      "layer_scale, Tensor? seed, int threshold, Tensor? dynamic_threshold, int input_dtype, bool[5] "
      "output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_rms_norm_fwd(Tensor input, Tensor? residual, int normalized_ndim, Tensor? weight, Tensor? "
      "row_scale, Tensor? layer_scale, Tensor? seed, int threshold, Tensor? dynamic_threshold, float eps, bool "
      "float_sum, bool keep_sum) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_rms_norm_bwd(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? input, int "
      "normalized_ndim, Tensor statistics, Tensor? weight, Tensor? row_scale, Tensor? layer_scale, Tensor? "
      "seed, int threshold, Tensor? dynamic_threshold, int input_dtype, bool[4] output_mask) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("simd() -> str");
  m.def("set_simd(str name) -> ()");
  m.def("empty_cache() -> ()");
}
