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
  m.def("simd() -> str");
  m.def("set_simd(str name) -> ()");
  m.def("empty_cache() -> ()");
}
