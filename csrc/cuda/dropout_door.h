// What the doors of dropout and DropBlock ask of their tensors, and the tensors they make.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../units.h"
#include "door.h"

namespace fastreg::cuda {

// --- tensors whose elements fill a stretch of memory ----------------------------------------------------------------

struct DenseView {
  const void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dimensions;
  int64_t elements;
  DType dtype;
  Device device;

  // Whether the dimensions lie in memory in this order, outermost first. Strides of dimensions of size 1 say nothing.
  template <class Order>
  bool in_order(const Order& order) const {
    int64_t expected = 1;
    for (int64_t place = dimensions - 1; place >= 0; --place) {
      const int64_t dimension = order(place);
      if (sizes[dimension] != 1) {
        if (strides[dimension] != expected) return false;
        expected *= sizes[dimension];
      }
    }
    return true;
  }

  bool contiguous() const {
    return elements == 0 || in_order([](int64_t place) { return place; });
  }

  bool channels_last() const {
    return dimensions > 2 && in_order([&](int64_t place) {
             return place == 0 ? 0 : place == dimensions - 1 ? int64_t{1} : place + 1;
           });
  }

  // In whatever order; `outermost` is the one that the first dimension must be, if it is not -1.
  bool dense() const {
    if (contiguous()) return true;
    const std::vector<int64_t> order = outermost_first();
    return in_order([&](int64_t place) { return order[static_cast<size_t>(place)]; });
  }

  // Whether each index of the first dimension has a stretch of memory of its own.
  bool by_samples() const {
    if (contiguous()) return true;
    const std::vector<int64_t> order = outermost_first();
    const auto outermost = std::find_if(order.begin(), order.end(), [&](int64_t each) { return sizes[each] != 1; });
    return sizes[0] == 1 || outermost == order.end() || *outermost == 0;
  }

  std::vector<int64_t> outermost_first() const {
    std::vector<int64_t> order(static_cast<size_t>(dimensions));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t left, int64_t right) {
      return std::pair(strides[left], sizes[left]) > std::pair(strides[right], sizes[right]);
    });
    return order;
  }
};

inline DenseView dense_view(const Tensor& tensor, const char* op, const char* name) {
  DenseView view{};
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  check_call(aoti_torch_get_dim(tensor.get(), &view.dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(tensor.get(), &sizes), op, "read sizes");
  check_call(aoti_torch_get_strides(tensor.get(), &strides), op, "read strides");
  check_call(aoti_torch_get_numel(tensor.get(), &view.elements), op, "read a size");
  check_call(torch_get_const_data_ptr(tensor.get(), &view.data), op, "read a data pointer");
  view.sizes = sizes;
  view.strides = strides;
  view.dtype = dtype_of(tensor, op, name);
  view.device = device_of(tensor, op);
  if (!view.dense()) {
    fail(op, name, " must be dense: its elements must fill a stretch of memory; call .contiguous() on it first.");
  }
  return view;
}

// The shape, the strides and the device of another one.
inline void check_laid_out_as(const DenseView& view, const DenseView& other, const char* op, const char* name,
                              const char* other_name) {
  bool same = view.dimensions == other.dimensions && view.device == other.device;
  for (int64_t dimension = 0; same && dimension < other.dimensions; ++dimension) {
    same = view.sizes[dimension] == other.sizes[dimension] &&
           (view.sizes[dimension] == 1 || other.elements == 0 || view.strides[dimension] == other.strides[dimension]);
  }
  if (!same) {
    fail(op, name, " must have the shape, strides and device of ", other_name, ".");
  }
}

// --- integers -------------------------------------------------------------------------------------------------------

// A tensor of one int64, which the kernels read.
inline const int64_t* number_on_device(const Tensor& tensor, const Device& device, const char* op, const char* name) {
  int32_t dtype = -1;
  int64_t elements = 0;
  const void* data = nullptr;
  check_call(aoti_torch_get_dtype(tensor.get(), &dtype), op, "read a dtype");
  check_call(aoti_torch_get_numel(tensor.get(), &elements), op, "read a size");
  check_call(torch_get_const_data_ptr(tensor.get(), &data), op, "read a data pointer");
  if (dtype != aoti_torch_dtype_int64() || elements != 1 || !(device_of(tensor, op) == device)) {
    fail(op, name, " must be one int64 on input's device.");
  }
  return static_cast<const int64_t*>(data);
}

inline const int64_t* number_on_device(const std::optional<Tensor>& tensor, const Device& device, const char* op,
                                       const char* name) {
  return tensor.has_value() ? number_on_device(*tensor, device, op, name) : nullptr;
}

inline void check_threshold(int64_t threshold, uint64_t lanes, const char* op) {
  if (threshold < 0 || static_cast<uint64_t>(threshold) > lanes) {
    fail(op, "threshold must be between 0 and ", lanes, ", but is ", threshold, ".");
  }
}

// --- what is made ---------------------------------------------------------------------------------------------------

// `dtype`: torch's number.
inline Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dimensions, int32_t dtype,
                          const Device& device, const char* op) {
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device.type, device.index, &handle), op,
             "allocate an output");
  return Tensor(handle);
}

inline Tensor new_laid_out_as(const DenseView& view, DType dtype, const char* op) {
  return new_strided(view.sizes, view.strides, view.dimensions, torch_dtype(dtype), view.device, op);
}

inline Tensor new_contiguous(const std::vector<int64_t>& sizes, int32_t dtype, const Device& device, const char* op) {
  std::vector<int64_t> strides(sizes.size());
  contiguous_strides(sizes.data(), static_cast<int64_t>(sizes.size()), strides.data());
  return new_strided(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype, device, op);
}

}  // namespace fastreg::cuda
