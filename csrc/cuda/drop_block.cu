// Registers DropBlock for CUDA tensors: the checks, allocations and launches of its three operators. The kernels are in
// drop_block_mask.cuh and drop_block_apply.cuh.

#include <tuple>
#include <vector>

#include "drop_block.cuh"
#include "dropout_door.h"

namespace fastreg::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

// --- the mask --------------------------------------------------------------------------------------------------------

void check_mask_shape(const std::vector<int64_t>& shape, const std::vector<int64_t>& block_size, const char* op) {
  if (shape.size() < 4 || shape.size() > 5 || block_size.size() != shape.size() - 2) {
    fail(op, "shape must be (samples, channels) and 2 or 3 sizes, and block_size as many numbers as there are sizes.");
  }
  for (size_t dimension = 0; dimension < shape.size(); ++dimension) {
    if (shape[dimension] < 0) {
      fail(op, "shape must not be negative, but has ", shape[dimension], ".");
    }
    if (dimension >= 2 && shape[dimension] > 0 &&
        (block_size[dimension - 2] < 1 || block_size[dimension - 2] > shape[dimension])) {
      fail(op, "block_size must be between 1 and the map's size ", shape[dimension], ", but is ",
           block_size[dimension - 2], ".");
    }
  }
}

std::tuple<Tensor, Tensor> drop_block_mask(const Tensor& seed, std::vector<int64_t> shape,
                                           std::vector<int64_t> block_size, int64_t threshold,
                                           Optional dynamic_threshold, bool anywhere) {
  constexpr const char* op = "drop_block_mask";
  check_mask_shape(shape, block_size, op);
  check_threshold(threshold, lane_count, op);
  const Device where = device_of(seed, op);
  const int dimensions = static_cast<int>(block_size.size());
  DropBlockMaskArguments arguments{};
  arguments.seed = number_on_device(seed, where, op, "seed");
  arguments.dynamic_threshold = number_on_device(dynamic_threshold, where, op, "dynamic_threshold");
  arguments.threshold = threshold;
  arguments.shape = drop_block_shape(shape[0], shape[1], &shape[2], block_size.data(), dimensions, anywhere);

  std::vector<int64_t> sizes = shape;
  sizes.back() = arguments.shape.row_bytes;
  const Tensor bits = new_contiguous(sizes, aoti_torch_dtype_uint8(), where, op);
  const Tensor counts = new_contiguous({shape[0]}, aoti_torch_dtype_int64(), where, op);
  if (shape[0] == 0) {
    return {bits, counts};
  }
  const OnDevice device(where, op);
  // Lives until the kernels are launched; torch's allocator reuses it for later work of the same stream only.
  const Tensor seeds = new_contiguous({arguments.shape.seed_words}, aoti_torch_dtype_int64(), where, op);
  arguments.seeds = static_cast<unsigned long long*>(data_of(seeds, op));
  arguments.bits = static_cast<unsigned char*>(data_of(bits, op));
  arguments.counts = static_cast<unsigned long long*>(data_of(counts, op));
  check_cuda(launch_drop_block_mask(arguments, device.stream()), op, "launch");
  return {bits, counts};
}

// --- its application -------------------------------------------------------------------------------------------------

DropBlockApplyArguments apply_arguments(const DenseView& input, const Tensor& bits, const Tensor& scale,
                                        const char* op) {
  if (input.dimensions < 4 || input.dimensions > 5 || !(input.contiguous() || input.channels_last())) {
    fail(op, "input must be (samples, channels) and 2 or 3 sizes, contiguous or channels_last.");
  }
  const int64_t width = input.sizes[input.dimensions - 1];
  const int64_t rows = input.dimensions == 4 ? input.sizes[2] : input.sizes[2] * input.sizes[3];
  const int64_t samples = input.sizes[0];
  const int64_t channels = input.sizes[1];

  int64_t dimensions = 0;
  int64_t* sizes = nullptr;
  int32_t dtype = -1;
  bool contiguous = false;
  const void* data = nullptr;
  check_call(aoti_torch_get_dim(bits.get(), &dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(bits.get(), &sizes), op, "read sizes");
  check_call(aoti_torch_get_dtype(bits.get(), &dtype), op, "read a dtype");
  check_call(aoti_torch_is_contiguous(bits.get(), &contiguous), op, "read strides");
  check_call(torch_get_const_data_ptr(bits.get(), &data), op, "read a data pointer");
  bool fits = dimensions == input.dimensions && dtype == aoti_torch_dtype_uint8() && contiguous &&
              device_of(bits, op) == input.device && sizes[0] == samples && (sizes[1] == 1 || sizes[1] == channels) &&
              sizes[dimensions - 1] == divide_up(width, 8);
  for (int64_t dimension = 2; fits && dimension < dimensions - 1; ++dimension) {
    fits = sizes[dimension] == input.sizes[dimension];
  }
  if (!fits) {
    fail(op,
         "bits must be what drop_block_mask gives for input's shape, or for one channel of it: uint8, contiguous, on "
         "input's device.");
  }

  int64_t scales = 0;
  check_call(aoti_torch_get_numel(scale.get(), &scales), op, "read a size");
  const VectorView scale_view = vector_view(scale, scales == 1 ? 1 : samples, input.device, op, "scale");
  if (scale_view.dtype != DType::Float64) {
    fail(op, "scale must be float64, not ", name_of(scale_view.dtype), ".");
  }
  return {.input = input.data,
          .output = nullptr,
          .bits = static_cast<const unsigned char*>(data),
          .scale = static_cast<const double*>(scale_view.data),
          .elements = input.elements,
          .row_bytes = divide_up(width, 8),
          .sample_elements = divisor_of(larger(channels * rows * width, 1)),
          .channels = divisor_of(larger(channels, 1)),
          .rows = divisor_of(larger(rows, 1)),
          .width = divisor_of(larger(width, 1)),
          .channels_last = !input.contiguous(),
          .shared = sizes[1] == 1,
          .per_sample = scales != 1};
}

void apply(const DenseView& input, const Tensor& bits, const Tensor& scale, void* output, const char* op) {
  DropBlockApplyArguments arguments = apply_arguments(input, bits, scale, op);
  if (input.elements == 0) {
    return;
  }
  arguments.output = output;
  const OnDevice device(input.device, op);
  const cudaError_t error = with_element(
      input.dtype, op, [&]<class Element>() { return launch_drop_block_apply<Element>(arguments, device.stream()); });
  check_cuda(error, op, "launch");
}

Tensor drop_block_apply(const Tensor& input, const Tensor& bits, const Tensor& scale) {
  constexpr const char* op = "drop_block_apply";
  const DenseView view = dense_view(input, op, "input");
  const Tensor output = new_laid_out_as(view, view.dtype, op);
  apply(view, bits, scale, data_of(output, op), op);
  return output;
}

void drop_block_inplace(const Tensor& input, const Tensor& bits, const Tensor& scale) {
  constexpr const char* op = "drop_block_inplace";
  const DenseView view = dense_view(input, op, "input");
  apply(view, bits, scale, data_of(input, op), op);
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("drop_block_mask", TORCH_BOX(&fastreg::cuda::drop_block_mask));
  m.impl("drop_block_apply", TORCH_BOX(&fastreg::cuda::drop_block_apply));
  m.impl("drop_block_inplace", TORCH_BOX(&fastreg::cuda::drop_block_inplace));
}
