// What the doors of the norms over channels have in common: the views of their tensors, and the tensors they make.

#pragma once

#include "../channels.h"
#include "batch_norm.cuh"
#include "batch_norm_plan.h"
#include "door.h"

namespace fastreg::cuda {

// --- what is given ---------------------------------------------------------------------------------------------------

// The tensors that every operator is about.
struct ChannelTensors {
  ChannelView input;
  const void* residual;
  int64_t residual_stride;
  VectorView weight;
  VectorView bias;

  ChannelTensors(const Tensor& input_tensor, const std::optional<Tensor>& residual_tensor,
                 const std::optional<Tensor>& weight_tensor, const std::optional<Tensor>& bias_tensor, const char* op)
      : input(channel_view(input_tensor, op, "input")),
        residual(nullptr),
        residual_stride(0),
        weight(channel_vector(weight_tensor, input, op, "weight")),
        bias(channel_vector(bias_tensor, input, op, "bias")) {
    if (input.line_elements() > most_items) {
      fail(op, "the CUDA kernels take planes of up to ", most_items, " elements and as many channels, not ",
           input.line_elements(), ".");
    }
    if (residual_tensor.has_value()) {
      const ChannelView view = channel_view(*residual_tensor, op, "residual", &input);
      residual = view.data;
      residual_stride = view.outer_stride;
    }
  }

  bool empty() const { return input.elements() == 0; }
  ChannelShape shape() const { return {input.samples, input.channels, input.spatial, input.rows}; }
};

inline RunningStatistic running_statistic(const std::optional<Tensor>& tensor, const ChannelView& input, const char* op,
                                          const char* name) {
  const VectorView view = channel_vector(tensor, input, op, name);
  return {const_cast<void*>(view.data), view.dtype};
}

inline ActivationArguments activation_arguments(int64_t activation, double negative_slope, const char* op) {
  return {activation_of(activation, op), static_cast<float>(negative_slope)};
}

// --- what is made ----------------------------------------------------------------------------------------------------

// Of input's shape and family, dense.
inline Tensor new_dense(const ChannelView& view, const char* op) {
  int64_t strides[maximum_dimensions];
  dense_strides(view, strides);
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(view.dimensions, view.sizes, strides, torch_dtype(view.dtype), view.device.type,
                                      view.device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

inline Tensor new_bytes(int64_t count, const Device& device, const char* op) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_uint8(), device.type, device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

// Memory that a call needs until its kernels are launched; torch's allocator reuses it for later work of the same
// stream only.
class Workspace {
 public:
  Workspace(int64_t bytes, const Device& device, const char* op) {
    if (bytes > 0) {
      tensor_ = new_bytes(bytes, device, op);
      data_ = data_of(*tensor_, op);
    }
  }

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

}  // namespace fastreg::cuda
