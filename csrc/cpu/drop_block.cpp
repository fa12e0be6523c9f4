// Door of DropBlock's operators on the CPU: checks, allocation, the split among threads, and their registration.
//
// Traffic: the mask writes a bit a position; applying it reads that and the activations, and writes them. Work is cut
// by shape alone, and a mask is a function of the position: results do not depend on the number of threads.

#include "drop_block.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../channels.h"
#include "../philox.h"
#include "door.h"

namespace fastreg {
namespace {

Tensor new_integers(int64_t count, Device device, const char* op) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_int64(), device.type, device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

// --- masks -------------------------------------------------------------------------------------------------

int64_t read_integer(const Tensor& tensor, const Device* device, const char* op, const char* name) {
  int64_t elements = 0;
  int32_t dtype = -1;
  const void* data = nullptr;
  check_call(aoti_torch_get_numel(tensor.get(), &elements), op, "read a size");
  check_call(aoti_torch_get_dtype(tensor.get(), &dtype), op, "read a dtype");
  check_call(torch_get_const_data_ptr(tensor.get(), &data), op, "read a data pointer");
  const bool elsewhere = device != nullptr && !(device_of(tensor, op) == *device);
  if (elements != 1 || dtype != aoti_torch_dtype_int64() || elsewhere) {
    fail(op, name, " must be one int64", device != nullptr ? " on seed's device." : ".");
  }
  return *static_cast<const int64_t*>(data);
}

void check_shape(const std::vector<int64_t>& shape, const std::vector<int64_t>& block_size, const char* op) {
  if (shape.size() != 4 && shape.size() != 5) {
    fail(op, "shape must be (N, C, spatial...) with two or three spatial sizes, but has ", shape.size(), " sizes.");
  }
  if (block_size.size() != shape.size() - 2) {
    fail(op, "block_size must have ", shape.size() - 2, " sizes, but has ", block_size.size(), ".");
  }
  for (const int64_t size : shape) {
    if (size < 0) {
      fail(op, "shape must not have negative sizes, but has ", size, ".");
    }
  }
  for (size_t dimension = 0; dimension < block_size.size(); ++dimension) {
    const int64_t size = shape[dimension + 2];
    if (size > 0 && (block_size[dimension] < 1 || block_size[dimension] > size)) {
      fail(op, "block_size must be between 1 and the size of its dimension, ", size, ", but is ",
           block_size[dimension], ".");
    }
  }
}

std::tuple<Tensor, Tensor> drop_block_mask(const Tensor& seed, std::vector<int64_t> shape,
                                           std::vector<int64_t> block_size, int64_t threshold,
                                           const std::optional<Tensor>& dynamic_threshold, bool anywhere) {
  constexpr const char* op = "drop_block_mask";
  check_shape(shape, block_size, op);
  const Device device = device_of(seed, op);
  const uint64_t key = static_cast<uint64_t>(read_integer(seed, nullptr, op, "seed"));
  const int64_t lanes = static_cast<int64_t>(lane_count);
  if (threshold < 0 || threshold > lanes) {
    fail(op, "threshold must be between 0 and ", lanes, ", but is ", threshold, ".");
  }
  if (dynamic_threshold.has_value()) {
    threshold = read_integer(*dynamic_threshold, &device, op, "dynamic_threshold");
  }

  DropBlockMask mask{};
  mask.seed = key;
  mask.samples = shape[0];
  mask.channels = shape[1];
  int64_t elements = mask.channels;
  const size_t first = drop_block_dimensions - block_size.size();
  for (size_t dimension = 0; dimension < drop_block_dimensions; ++dimension) {
    const bool given = dimension >= first;
    const int64_t size = given ? shape[2 + dimension - first] : 1;
    const int64_t block = given ? block_size[dimension - first] : 1;
    mask.size[dimension] = size;
    mask.block[dimension] = block;
    mask.places[dimension] = anywhere ? size : size - block + 1;
    mask.before[dimension] = anywhere ? block / 2 : 0;
    elements *= size;
  }
  mask.row_bytes = parts_of(mask.size[2], 8);
  std::vector<int64_t> bit_sizes = shape;
  bit_sizes.back() = mask.row_bytes;
  Tensor bits = new_bytes(bit_sizes.data(), static_cast<int64_t>(bit_sizes.size()), device, op);
  Tensor counts = new_integers(mask.samples, device, op);
  mask.bits = static_cast<unsigned char*>(data_of(bits, op));
  mask.counts = static_cast<int64_t*>(data_of(counts, op));
  std::fill_n(mask.counts, mask.samples, elements);
  if (mask.samples == 0 || elements == 0) {
    return {std::move(bits), std::move(counts)};
  }

  threshold = std::clamp<int64_t>(threshold, 0, lanes);
  mask.draws = threshold > 0;
  mask.last = static_cast<uint32_t>(threshold - 1);
  const DropBlockMaskKernels& kernels = FASTREG_SIMD_VARIANT(drop_block_mask_kernels);
  split(parts_of(mask.samples * mask.channels, drop_block_planes(mask)), thread_count(mask.samples * elements),
        [&](int64_t begin, int64_t end) {
          Scratch scratch;
          kernels.mask(mask, scratch.reserve(kernels.scratch(mask)), begin, end);
        });
  return {std::move(bits), std::move(counts)};
}

// --- applying ----------------------------------------------------------------------------------------------

// The bits, and how many channels they are of.
const unsigned char* bits_view(const Tensor& bits, const ChannelView& input, int64_t row_bytes, int64_t& channels,
                               const char* op) {
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
  bool fits = dimensions == input.dimensions && sizes[0] == input.samples &&
              (sizes[1] == input.channels || sizes[1] == 1) && sizes[dimensions - 1] == row_bytes;
  for (int64_t dimension = 2; fits && dimension < dimensions - 1; ++dimension) {
    fits = sizes[dimension] == input.sizes[dimension];
  }
  if (!fits || dtype != aoti_torch_dtype_uint8() || !contiguous || !(device_of(bits, op) == input.device)) {
    fail(op, "bits must be contiguous uint8 on input's device, of input's sizes but for ", row_bytes,
         " bytes a row and, where all share them, one channel.");
  }
  channels = sizes[1];
  return static_cast<const unsigned char*>(data);
}

// Everything but the output.
DropBlockApply apply_problem(const ChannelView& input, const Tensor& bits, const Tensor& scale, const char* op) {
  if (input.dimensions != 4 && input.dimensions != 5) {
    fail(op, "input must have 4 or 5 dimensions, but has ", input.dimensions, ".");
  }
  if (input.outer_stride != input.dense_outer_stride()) {
    fail(op, "input must be contiguous or channels_last; call .contiguous() on it first.");
  }
  int64_t scales = 0;
  check_call(aoti_torch_get_numel(scale.get(), &scales), op, "read a size");
  const VectorView factors = vector_view(scale, scales == 1 ? 1 : input.samples, input.device, op, "scale");
  if (factors.dtype != DType::Float64) {
    fail(op, "scale must be float64.");
  }
  DropBlockApply apply{};
  apply.input = input.data;
  apply.scales = static_cast<const double*>(factors.data);
  apply.scale_per_sample = scales != 1;
  apply.samples = input.samples;
  apply.channels = input.channels;
  apply.width = input.sizes[input.dimensions - 1];
  apply.rows = apply.width == 0 ? 0 : input.spatial / apply.width;
  apply.row_bytes = parts_of(apply.width, 8);
  int64_t bit_channels = 0;
  apply.bits = bits_view(bits, input, apply.row_bytes, bit_channels, op);
  apply.bits_bytes = input.samples * bit_channels * apply.plane_bytes();
  apply.shared = bit_channels != input.channels;
  return apply;
}

void run(const DropBlockApply& apply, const ChannelView& input) {
  const DropBlockKernels& kernels = FASTREG_SIMD_VARIANT(drop_block_kernels)[static_cast<int>(input.dtype)];
  const int64_t threads = thread_count(input.elements());
  if (!input.rows) {
    return split(drop_block_tiles(apply), threads,
                 [&](int64_t begin, int64_t end) { kernels.planes(apply, begin, end); });
  }
  split(drop_block_strips(apply), threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    kernels.channels_last(apply, scratch.reserve(kernels.channels_last_scratch(apply)), begin, end);
  });
}

Tensor drop_block_apply(const Tensor& input, const Tensor& bits, const Tensor& scale) {
  constexpr const char* op = "drop_block_apply";
  const ChannelView view = channel_view(input, op, "input");
  DropBlockApply apply = apply_problem(view, bits, scale, op);
  int64_t* strides = nullptr;
  check_call(aoti_torch_get_strides(input.get(), &strides), op, "read strides");
  Tensor output = new_output(view.sizes, strides, view.dimensions, view.dtype, view.device, op);
  if (view.elements() > 0) {
    apply.output = data_of(output, op);
    const int64_t bytes = element_size(view.dtype);
    apply.streams = view.rows ? streams(apply.output, view.lines(), view.line_elements() * bytes)
                              : may_stream(apply.output, view.elements() * bytes);
    run(apply, view);
  }
  return output;
}

void drop_block_inplace(const Tensor& input, const Tensor& bits, const Tensor& scale) {
  constexpr const char* op = "drop_block_inplace";
  const ChannelView view = channel_view(input, op, "input");
  DropBlockApply apply = apply_problem(view, bits, scale, op);
  if (view.elements() > 0) {
    apply.output = data_of(input, op);
    run(apply, view);
  }
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("drop_block_mask", TORCH_BOX(&fastreg::drop_block_mask));
  m.impl("drop_block_apply", TORCH_BOX(&fastreg::drop_block_apply));
  m.impl("drop_block_inplace", TORCH_BOX(&fastreg::drop_block_inplace));
}
