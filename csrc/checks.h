// What every native door asks of its tensors, once, above the split into CPU and CUDA.
//
// Each tensor is looked at through a handful of C calls of torch's stable ABI, which read metadata and
// allocate nothing; the answers are kept in plain structs, so that a kernel launcher never touches a torch
// type. A violated contract raises std::runtime_error (Python's RuntimeError) with a sentence that names the
// op and the tensor.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace fastreg {

using torch::stable::Tensor;

// torch has no fixed limit, its iterators stop at 64.
constexpr int64_t maximum_dimensions = 64;

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "fastreg_native::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Status of a stable-ABI call. torch has already printed its own message by then.
inline void check_call(AOTITorchError status, const char* op, const char* action) {
  if (status != 0) [[unlikely]] {
    fail(op, "torch could not ", action, " (its own message is above).");
  }
}

// --- dtypes ------------------------------------------------------------------------------------------------

// torch's numbers for the dtypes are not part of its ABI, functions give them; they are asked for once.
struct TorchDTypes {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t float64 = aoti_torch_dtype_float64();

  static const TorchDTypes& get() {
    static const TorchDTypes dtypes;
    return dtypes;
  }
};

inline int32_t torch_dtype(DType dtype) {
  const TorchDTypes& dtypes = TorchDTypes::get();
  switch (dtype) {
    case DType::Float32:
      return dtypes.float32;
    case DType::BFloat16:
      return dtypes.bfloat16;
    case DType::Float16:
      return dtypes.float16;
    default:
      return dtypes.float64;
  }
}

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  int32_t dtype = -1;
  check_call(aoti_torch_get_dtype(tensor.get(), &dtype), op, "read a dtype");
  const TorchDTypes& dtypes = TorchDTypes::get();
  if (dtype == dtypes.float32) return DType::Float32;
  if (dtype == dtypes.bfloat16) return DType::BFloat16;
  if (dtype == dtypes.float16) return DType::Float16;
  if (dtype == dtypes.float64) return DType::Float64;
  fail(op, name, " must be float32, bfloat16, float16 or float64.");
}

// --- devices -----------------------------------------------------------------------------------------------

struct Device {
  int32_t type;
  int32_t index;

  bool operator==(const Device&) const = default;
};

inline Device device_of(const Tensor& tensor, const char* op) {
  Device device{};
  check_call(aoti_torch_get_device_type(tensor.get(), &device.type), op, "read a device");
  check_call(aoti_torch_get_device_index(tensor.get(), &device.index), op, "read a device");
  return device;
}

// --- tensors seen as rows ----------------------------------------------------------------------------------

// A tensor that can be viewed as (rows, hidden) with strides (row_stride, 1), in elements. row_stride is 0
// for an expanded tensor, more than `hidden` for a slice. `data` is only aligned to the element.
struct RowView {
  const void* data;
  const int64_t* sizes;
  int64_t dimensions;
  int64_t rows;
  int64_t hidden;
  int64_t row_stride;
  DType dtype;
  Device device;
};

inline RowView row_view(const Tensor& tensor, int64_t normalized_ndim, const char* op, const char* name) {
  RowView view{};
  const AtenTensorHandle handle = tensor.get();
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  check_call(aoti_torch_get_dim(handle, &view.dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(handle, &sizes), op, "read sizes");
  check_call(aoti_torch_get_strides(handle, &strides), op, "read strides");
  check_call(torch_get_const_data_ptr(handle, &view.data), op, "read a data pointer");
  view.sizes = sizes;
  view.dtype = dtype_of(tensor, op, name);
  view.device = device_of(tensor, op);
  if (normalized_ndim < 1 || normalized_ndim > view.dimensions || view.dimensions > maximum_dimensions) {
    fail(op, "normalized_ndim must be between 1 and ", name, "'s ", view.dimensions, " dimensions, but got ",
         normalized_ndim, ".");
  }

  // Dimensions of size 1 have meaningless strides. Each other one must continue where the next inner one
  // ends; among the rows the innermost is free, and its stride is the row stride.
  bool regular = true;
  view.hidden = 1;
  int64_t dimension = view.dimensions - 1;
  for (; dimension >= view.dimensions - normalized_ndim; --dimension) {
    if (sizes[dimension] != 1) {
      regular = regular && strides[dimension] == view.hidden;
      view.hidden *= sizes[dimension];
    }
  }
  view.rows = 1;
  view.row_stride = view.hidden;
  for (; dimension >= 0; --dimension) {
    if (sizes[dimension] != 1) {
      if (view.rows == 1) {
        view.row_stride = strides[dimension];
      } else {
        regular = regular && strides[dimension] == view.rows * view.row_stride;
      }
      view.rows *= sizes[dimension];
    }
  }
  if (view.rows == 0 || view.hidden == 0) {
    view.row_stride = view.hidden;
  } else if (!regular) {
    fail(op, name, " cannot be viewed as rows of ", view.hidden,
         " adjacent elements at one constant stride; call .contiguous() on it first.");
  }
  return view;
}

// grad_output must have the shape, dtype and device of input; its strides may differ.
inline void check_like(const RowView& view, const RowView& input, const char* op, const char* name) {
  bool same = view.dimensions == input.dimensions && view.dtype == input.dtype && view.device == input.device;
  for (int64_t dimension = 0; same && dimension < input.dimensions; ++dimension) {
    same = view.sizes[dimension] == input.sizes[dimension];
  }
  if (!same) {
    fail(op, name, " must have the shape, dtype and device of input.");
  }
}

// --- parameters and statistics -----------------------------------------------------------------------------

// A contiguous vector: weight, bias or saved statistics. `given` is false for a parameter that was None.
struct VectorView {
  bool given = false;
  const void* data = nullptr;
  DType dtype = DType::Float32;
};

inline VectorView vector_view(const Tensor& tensor, int64_t elements, const Device& device, const char* op,
                              const char* name) {
  VectorView view;
  view.given = true;
  view.dtype = dtype_of(tensor, op, name);
  int64_t found = 0;
  bool contiguous = false;
  check_call(aoti_torch_get_numel(tensor.get(), &found), op, "read a size");
  check_call(aoti_torch_is_contiguous(tensor.get(), &contiguous), op, "read strides");
  check_call(torch_get_const_data_ptr(tensor.get(), &view.data), op, "read a data pointer");
  if (found != elements) {
    fail(op, name, " must have ", elements, " elements, but has ", found, ".");
  }
  if (!contiguous) {
    fail(op, name, " must be contiguous.");
  }
  if (!(device_of(tensor, op) == device)) {
    fail(op, name, " must be on input's device.");
  }
  return view;
}

// weight or bias: one element a column; fp64 goes with fp64 only, because a mix would need a third set of
// kernels.
inline VectorView parameter_view(const std::optional<Tensor>& tensor, const RowView& input, const char* op,
                                 const char* name) {
  if (!tensor.has_value()) {
    return {};
  }
  const VectorView view = vector_view(*tensor, input.hidden, input.device, op, name);
  if ((view.dtype == DType::Float64) != (input.dtype == DType::Float64)) {
    fail(op, name, " is ", name_of(view.dtype), " but input is ", name_of(input.dtype),
         "; float64 mixes with no other dtype.");
  }
  return view;
}

inline VectorView statistics_view(const Tensor& tensor, int64_t values_per_row, const RowView& input,
                                  const char* op) {
  const VectorView view = vector_view(tensor, values_per_row * input.rows, input.device, op, "statistics");
  if (view.dtype != accumulation_dtype(input.dtype)) {
    fail(op, "statistics must be ", name_of(accumulation_dtype(input.dtype)), ".");
  }
  return view;
}

// --- outputs -----------------------------------------------------------------------------------------------

inline void contiguous_strides(const int64_t* sizes, int64_t dimensions, int64_t* strides) {
  int64_t stride = 1;
  for (int64_t dimension = dimensions - 1; dimension >= 0; --dimension) {
    strides[dimension] = stride;
    stride *= sizes[dimension] > 1 ? sizes[dimension] : 1;
  }
}

// A fresh contiguous tensor, uninitialised.
inline Tensor new_tensor(const int64_t* sizes, int64_t dimensions, DType dtype, Device device,
                         const char* op) {
  int64_t strides[maximum_dimensions];
  contiguous_strides(sizes, dimensions, strides);
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(dimensions, sizes, strides, torch_dtype(dtype), device.type,
                                      device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

inline Tensor new_vector(int64_t elements, DType dtype, Device device, const char* op) {
  return new_tensor(&elements, 1, dtype, device, op);
}

// A fresh contiguous tensor of another one's shape: the gradient of a parameter.
inline Tensor new_like(const Tensor& like, DType dtype, Device device, const char* op) {
  int64_t dimensions = 0;
  int64_t* sizes = nullptr;
  check_call(aoti_torch_get_dim(like.get(), &dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(like.get(), &sizes), op, "read sizes");
  return new_tensor(sizes, dimensions, dtype, device, op);
}

// Stands for a gradient that output_mask does not ask for.
inline Tensor empty_gradient(DType dtype, Device device, const char* op) {
  return new_vector(0, dtype, device, op);
}

// A new tensor's memory; null for one without elements.
inline void* data_of(const Tensor& tensor, const char* op) {
  void* data = nullptr;
  check_call(torch_get_mutable_data_ptr(tensor.get(), &data), op, "read a data pointer");
  return data;
}

// grad_weight and grad_bias exist only where the parameter was given.
inline void check_mask(bool wanted, const VectorView& parameter, const char* op, const char* name) {
  if (wanted && !parameter.given) {
    fail(op, "output_mask asks for the gradient of ", name, ", which was not given.");
  }
}

}  // namespace fastreg
