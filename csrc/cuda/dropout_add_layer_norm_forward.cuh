// Forward kernels of dropout + residual + layer norm, and without centring + RMS norm: those of layer_norm_forward.cuh,
// whose rows are sums that are made while they are loaded.
//
//   sum = residual + (keep ? input * row_scale * layer_scale * scale : 0)      rounded to the sum's dtype
//   output = (sum - mean) * rstd * weight + bias                               in the input's dtype
//
// A thread draws the mask of its own packs while these are on their way: at 16 bits a pack is a block of the random
// stream, at fp32 half of one. The statistics are those of the rounded sum, which stays in registers.
//
// Traffic: a read of input and of residual, a write of the sum (where it is kept) and of the output; scales, weight and
// bias come from L1 and L2. Rows beyond the chip are read, and their masks drawn, twice.

#pragma once

#include "dropout_add_layer_norm_branch.cuh"
#include "dropout_add_layer_norm_plan.h"
#include "layer_norm_forward.cuh"

namespace fastreg::cuda {

struct DropoutAddForwardArguments {
  ForwardArguments norm;  // its input is the branch
  DType dtype;            // of input and output
  Parameter residual;     // null: none
  int64_t residual_stride;
  void* sum;  // contiguous; null: not kept
  BranchArguments branch;
};

// The rows of the sum.
template <class Sum, int pack_width>
struct RowsOfSum {
  static constexpr bool fused = true;
  static constexpr int width = pack_width;
  using Data = Pack<Sum, width>;

  struct Fetched {
    Beside<Sum, width> input;
    Beside<Sum, width> residual;
  };

  struct Row {
    int64_t index;
    ParameterBits<1> scale;
  };

  const DropoutAddForwardArguments& arguments;
  const Branch& branch;

  // Two tensors' packs are on their way beside those that are there already, so fewer of each.
  static FASTREG_INLINE constexpr int at_once(int packs) { return packs / 2; }

  __device__ __forceinline__ Parameter input() const { return {arguments.norm.input, arguments.dtype}; }

  __device__ __forceinline__ Fetched fetch(const Row& row, int64_t column) const {
    Fetched fetched;
    fetched.input.load(input(), row.index * arguments.norm.row_stride + column);
    if (arguments.residual.data != nullptr) {
      fetched.residual.load(arguments.residual, row.index * arguments.residual_stride + column);
    }
    return fetched;
  }

  // Its scale is asked for before anything else; also called for rows that there are not.
  __device__ __forceinline__ Row open(int64_t row) const {
    Row opened{row, {}};
    if (row < arguments.norm.rows) opened.scale = branch.fetch_row_scale(row);
    return opened;
  }

  __device__ __forceinline__ int64_t element(const Row& row, int64_t column) const {
    return row.index * arguments.norm.columns + column;
  }

  template <int packs, class ElementOf>
  __device__ __forceinline__ uint32_t draw(const ElementOf& element_of) const {
    return branch.draw<width, packs>(element_of);
  }

  // `stores`: the first time that the sum is made.
  template <bool stores>
  __device__ __forceinline__ Data finish(const Fetched& fetched, const Row& row, uint32_t bits, int64_t column) const {
    float layer_scale[width];
    load_parameter<width>(branch.arguments.layer_scale, column, 1.0f, layer_scale);
    const float factor = branch.factor(row.scale);
    const Data input_data = fetched.input.get(input());
    float values[width];
#pragma unroll
    for (int index = 0; index < width; ++index) {
      values[index] = is_kept(bits, index) ? input_data[index] * layer_scale[index] * factor : 0.0f;
    }
    if (arguments.residual.data != nullptr) {
      const Data added = fetched.residual.get(arguments.residual);
#pragma unroll
      for (int index = 0; index < width; ++index) values[index] += added[index];
    }
    Data sum = pack<Sum, width>(values);
    sum.keep_packed();
    if (stores && arguments.sum != nullptr) sum.store(static_cast<Sum*>(arguments.sum) + element(row, column));
    return sum;
  }

  __device__ __forceinline__ void store(int64_t row, int64_t column, const float (&values)[width]) const {
    store_beside<Sum>(arguments.norm.output, arguments.dtype, row * arguments.norm.columns + column, values);
  }

  // --- along one row ---

  struct Along {
    const RowsOfSum& tensors;
    Row row;
    int64_t first;

    template <bool>
    __device__ __forceinline__ Fetched fetch(int64_t column) const {
      return tensors.fetch(row, first + column);
    }

    // `column_of`: a pack's column.
    template <int packs, class ColumnOf>
    __device__ __forceinline__ uint32_t draw(const ColumnOf& column_of) const {
      return tensors.template draw<packs>([&](int pack) { return tensors.element(row, first + column_of(pack)); });
    }

    template <bool stores>
    __device__ __forceinline__ Data finish(const Fetched& fetched, uint32_t bits, int64_t column) const {
      return tensors.template finish<stores>(fetched, row, bits, first + column);
    }

    __device__ __forceinline__ void store(int64_t column, const float (&values)[width]) const {
      tensors.store(row.index, first + column, values);
    }
  };

  __device__ __forceinline__ Along along(int64_t row, int64_t first) const { return {*this, open(row), first}; }
};

template <class Sum, bool centred, int width, int packs>
__global__ void __launch_bounds__(fused_forward_threads, fused_forward_blocks)
    dropout_add_forward_kernel(const DropoutAddForwardArguments arguments) {
  const Branch branch(arguments.branch);
  normalize_rows<centred, packs, 1>(arguments.norm, RowsOfSum<Sum, width>{arguments, branch});
}

template <class Sum, bool centred, int width>
__global__ void __launch_bounds__(looped_threads, 1)
    dropout_add_forward_looped_kernel(const DropoutAddForwardArguments arguments) {
  const Branch branch(arguments.branch);
  normalize_long_row<centred>(arguments.norm, RowsOfSum<Sum, width>{arguments, branch});
}

}  // namespace fastreg::cuda
