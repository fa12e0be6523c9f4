// The element types fastreg computes with, as one enumeration shared by the doors and the kernels.
//
// Nothing here depends on torch, CUDA or the standard library: this header is included by device code and by
// the CPU kernels, which are compiled once per instruction set and must not emit shared inline functions.

#pragma once

namespace fastreg {

enum class DType : int { Float32 = 0, BFloat16 = 1, Float16 = 2, Float64 = 3 };

constexpr long long element_size(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return 8;
    case DType::Float32:
      return 4;
    default:
      return 2;
  }
}

// fp64 tensors are computed in fp64, all others in fp32: statistics and partial sums have this type.
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::Float64 ? DType::Float64 : DType::Float32;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return "float64";
    case DType::Float32:
      return "float32";
    case DType::BFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

}  // namespace fastreg
