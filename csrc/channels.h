// What the doors of the norms over channels ask of their tensors: the view of a (N, C, spatial...) tensor as planes or
// as rows, and of what belongs to it.

#pragma once

#include <optional>

#include "activation.h"
#include "checks.h"

namespace fastreg {

// A tensor of 2 to 5 dimensions, (N, C, spatial...), in one of two families:
//
//   planes  (samples, channels, spatial): the elements of a plane are adjacent, so are the planes of a sample;
//           samples lie `outer_stride` elements apart
//   rows    (samples * spatial, channels): the channels are adjacent; rows lie `outer_stride` elements apart
//
// outer_stride is 0 for an expanded tensor, more than needed for a slice of channels. `data` is only aligned to the
// element.
struct ChannelView {
  const void* data;
  const int64_t* sizes;
  int64_t dimensions;
  bool rows;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t outer_stride;
  DType dtype;
  Device device;

  int64_t per_channel() const { return samples * spatial; }
  int64_t elements() const { return samples * channels * spatial; }
  // Of the tensor cut into rows of adjacent elements: planes, or rows of channels.
  int64_t lines() const { return rows ? samples * spatial : samples * channels; }
  int64_t line_elements() const { return rows ? channels : spatial; }
  int64_t dense_outer_stride() const { return rows ? channels : channels * spatial; }
};

namespace channels {

// Each dimension of [first, last) must continue where the next inner one ends; dimensions of size 1 have meaningless
// strides. `stride` is that of the innermost, and becomes what the dimension before `first` would have.
inline bool continues(const int64_t* sizes, const int64_t* strides, int64_t first, int64_t last, int64_t& stride) {
  for (int64_t dimension = last - 1; dimension >= first; --dimension) {
    if (sizes[dimension] != 1) {
      if (strides[dimension] != stride) {
        return false;
      }
      stride *= sizes[dimension];
    }
  }
  return true;
}

inline bool is_planes(const ChannelView& view, const int64_t* strides, int64_t& outer_stride) {
  int64_t stride = 1;
  if (!continues(view.sizes, strides, 1, view.dimensions, stride)) {
    return false;
  }
  outer_stride = view.samples == 1 ? stride : strides[0];
  return true;
}

inline bool is_rows(const ChannelView& view, const int64_t* strides, int64_t& outer_stride) {
  if (view.channels != 1 && strides[1] != 1) {
    return false;
  }
  // The innermost dimension of samples and space that has more than one element gives the distance of rows.
  outer_stride = view.channels;
  for (int64_t dimension = view.dimensions - 1; dimension >= 0; --dimension) {
    if (dimension != 1 && view.sizes[dimension] != 1) {
      outer_stride = strides[dimension];
      break;
    }
  }
  int64_t stride = outer_stride;
  return continues(view.sizes, strides, 2, view.dimensions, stride) &&
         (view.samples == 1 || strides[0] == stride);
}

}  // namespace channels

// `family`: the view that decides between planes and rows; the tensor's own strides where there is none.
inline ChannelView channel_view(const Tensor& tensor, const char* op, const char* name,
                                const ChannelView* family = nullptr) {
  ChannelView view{};
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  check_call(aoti_torch_get_dim(tensor.get(), &view.dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(tensor.get(), &sizes), op, "read sizes");
  check_call(aoti_torch_get_strides(tensor.get(), &strides), op, "read strides");
  check_call(torch_get_const_data_ptr(tensor.get(), &view.data), op, "read a data pointer");
  view.sizes = sizes;
  view.dtype = dtype_of(tensor, op, name);
  view.device = device_of(tensor, op);
  if (view.dimensions < 2 || view.dimensions > maximum_dimensions) {
    fail(op, name, " must have at least 2 dimensions, but has ", view.dimensions, ".");
  }
  view.samples = sizes[0];
  view.channels = sizes[1];
  view.spatial = 1;
  for (int64_t dimension = 2; dimension < view.dimensions; ++dimension) {
    view.spatial *= sizes[dimension];
  }
  if (family != nullptr) {
    bool same = view.dimensions == family->dimensions && view.dtype == family->dtype && view.device == family->device;
    for (int64_t dimension = 0; same && dimension < view.dimensions; ++dimension) {
      same = sizes[dimension] == family->sizes[dimension];
    }
    if (!same) {
      fail(op, name, " must have the shape, dtype and device of input.");
    }
  }
  if (view.elements() == 0) {
    view.rows = family != nullptr && family->rows;
    view.outer_stride = view.dense_outer_stride();
    return view;
  }

  int64_t planes_stride = 0;
  int64_t rows_stride = 0;
  const bool planes = channels::is_planes(view, strides, planes_stride);
  const bool rows = channels::is_rows(view, strides, rows_stride);
  if (family != nullptr) {
    view.rows = family->rows;
  } else if (view.channels == 1) {
    view.rows = false;
  } else {
    view.rows = view.spatial == 1 || !planes;
  }
  if (view.rows ? !rows : !planes) {
    fail(op, name, " cannot be viewed as ",
         view.rows ? "rows of adjacent channels at one constant stride" : "planes of adjacent elements, one after the other",
         family != nullptr ? ", as input is" : "", "; call .contiguous() on it first.");
  }
  view.outer_stride = view.rows ? rows_stride : planes_stride;
  return view;
}

// A vector of one element a channel. fp64 goes with fp64 only.
inline VectorView channel_vector(const Tensor& tensor, int64_t elements, const ChannelView& input, const char* op,
                                 const char* name) {
  const VectorView view = vector_view(tensor, elements, input.device, op, name);
  if ((view.dtype == DType::Float64) != (input.dtype == DType::Float64)) {
    fail(op, name, " is ", name_of(view.dtype), " but input is ", name_of(input.dtype),
         "; float64 mixes with no other dtype.");
  }
  return view;
}

inline VectorView channel_vector(const std::optional<Tensor>& tensor, const ChannelView& input, const char* op,
                                 const char* name) {
  return tensor.has_value() ? channel_vector(*tensor, input.channels, input, op, name) : VectorView{};
}

// Two values a channel, in the dtype of accumulation: statistics, moments, sums, means.
inline VectorView channel_pairs(const Tensor& tensor, const ChannelView& input, const char* op, const char* name) {
  const VectorView view = vector_view(tensor, 2 * input.channels, input.device, op, name);
  if (view.dtype != accumulation_dtype(input.dtype)) {
    fail(op, name, " must be ", name_of(accumulation_dtype(input.dtype)), ".");
  }
  return view;
}

// Of the bits of `signs`: each line begins a new byte.
inline int64_t sign_bytes_per_line(const ChannelView& view) { return (view.line_elements() + 7) / 8; }

inline const unsigned char* signs_view(const std::optional<Tensor>& signs, const ChannelView& input,
                                       Activation activation, const char* op) {
  if (!signs.has_value()) {
    return nullptr;
  }
  int64_t elements = 0;
  int32_t dtype = -1;
  const void* data = nullptr;
  check_call(aoti_torch_get_numel(signs->get(), &elements), op, "read a size");
  check_call(aoti_torch_get_dtype(signs->get(), &dtype), op, "read a dtype");
  check_call(torch_get_const_data_ptr(signs->get(), &data), op, "read a data pointer");
  if (dtype != aoti_torch_dtype_uint8() || elements != input.lines() * sign_bytes_per_line(input) ||
      !(device_of(*signs, op) == input.device)) {
    fail(op, "signs must be uint8, of ", input.lines() * sign_bytes_per_line(input), " bytes, on input's device.");
  }
  if (!needs_sign_only(activation)) {
    fail(op, "signs are given, but they say nothing of this activation's derivative.");
  }
  return static_cast<const unsigned char*>(data);
}

inline Activation activation_of(int64_t number, const char* op) {
  if (number < 0 || number >= activation_count) {
    fail(op, "activation must be a number from 0 to ", activation_count - 1, ", but is ", number, ".");
  }
  return static_cast<Activation>(number);
}

// The strides of a dense tensor of the family.
inline void dense_strides(const ChannelView& view, int64_t* strides) {
  if (!view.rows) {
    return contiguous_strides(view.sizes, view.dimensions, strides);
  }
  int64_t stride = 1;
  const auto next = [&](int64_t dimension) {
    strides[dimension] = stride;
    stride *= view.sizes[dimension] > 1 ? view.sizes[dimension] : 1;
  };
  next(1);
  for (int64_t dimension = view.dimensions - 1; dimension >= 2; --dimension) {
    next(dimension);
  }
  next(0);
}

}  // namespace fastreg
