// Backward kernels of dropout + residual + layer norm, and without centring + RMS norm: those of
// layer_norm_backward*.cuh, whose gradient goes on through the sum to its residual and its branch.
//
//   total = layer norm's gradient of its input, which is the sum, + grad_sum       in fp32
//   grad_residual = total
//   grad_input = keep ? total * row_scale * layer_scale * scale : 0
//   grad_layer_scale = sum of keep ? total * row_scale * scale * input : 0         over the rows
//
// The mask is drawn again. Traffic: a read of grad_output, the sum and grad_sum, a write of grad_input and
// grad_residual, of each what there is and is asked for; with layer_scale's gradient a read of input besides. That
// gradient's sums are kept in shared memory, where the others are in registers, and go the same way from there. For
// rows beyond the chip the kernel that goes down the columns finds `total` once more, from the row's means that the
// other one left: four reads there, of grad_output, the sum, grad_sum and input.

#pragma once

#include "dropout_add_layer_norm_branch.cuh"
#include "layer_norm_backward_looped.cuh"

namespace fastreg::cuda {

struct DropoutAddBackwardArguments {
  BackwardArguments norm;  // its input is the sum, contiguous; its grad_input is the branch's
  DType dtype;             // of grad_output, input and grad_input
  const void* grad_sum;    // null: none
  int64_t grad_sum_stride;
  void* grad_residual;  // contiguous, as every gradient
  const void* input;    // the branch; used for layer_scale's gradient only
  int64_t input_stride;
  float* scale_partials;  // (partials, columns) of layer_scale's gradient
  float* row_means;       // (rows, 2), or (rows, 1) for RMS norm; for rows beyond the chip, with scale_partials
  BranchArguments branch;
};

// Sums of a thread in shared memory, four floats at a time, neighbouring threads side by side; a pack of one element
// takes one at a time.
template <int packs, int width>
struct ThirdSums {
  using Word = std::conditional_t<width == 1, float, float4>;
  static constexpr int words = width == 1 ? 1 : width / 4;
  static constexpr int word_width = width / words;

  Word* base;

  __device__ __forceinline__ explicit ThirdSums(unsigned char* memory) : base(reinterpret_cast<Word*>(memory)) {}

  __device__ __forceinline__ Word* at(int place, int word) const {
    return base + (place * words + word) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }

  __device__ __forceinline__ void clear() const {
#pragma unroll
    for (int word = 0; word < packs * words; ++word) *at(0, word) = Word{};
  }

  __device__ __forceinline__ void get(int place, float (&values)[width]) const {
#pragma unroll
    for (int word = 0; word < words; ++word) {
      const Word loaded = *at(place, word);
      memcpy(&values[word * word_width], &loaded, sizeof(loaded));
    }
  }

  __device__ __forceinline__ void add(int place, const float (&terms)[width]) const {
    float values[width];
    get(place, values);
#pragma unroll
    for (int index = 0; index < width; ++index) values[index] += terms[index];
#pragma unroll
    for (int word = 0; word < words; ++word) {
      Word stored;
      memcpy(&stored, &values[word * word_width], sizeof(stored));
      *at(place, word) = stored;
    }
  }
};

// Where the gradient of the sum goes.
template <class Sum, int pack_width>
struct GradientsOfSum {
  static constexpr bool fused = true;
  static constexpr int width = pack_width;
  using Data = Pack<Sum, width>;

  const DropoutAddBackwardArguments& arguments;
  const Branch& branch;

  __device__ __forceinline__ bool wanted() const {
    return arguments.norm.grad_input != nullptr || arguments.grad_residual != nullptr || wants_sums();
  }

  __device__ __forceinline__ const Sum* input(int64_t row, int64_t column) const {
    return static_cast<const Sum*>(arguments.norm.input) + row * arguments.norm.input_stride + column;
  }

  // --- the gradient of the output ---

  __device__ __forceinline__ Parameter grad_output() const { return {arguments.norm.grad_output, arguments.dtype}; }

  __device__ __forceinline__ int64_t grad_output_offset(int64_t row, int64_t column) const {
    return row * arguments.norm.grad_output_stride + column;
  }

  __device__ __forceinline__ int64_t grad_output_row(int64_t row) const { return grad_output_offset(row, 0); }

  __device__ __forceinline__ Data load_grad_output(int64_t row, int64_t column) const {
    Beside<Sum, width> loaded;
    loaded.load(grad_output(), grad_output_offset(row, column));
    return loaded.get(grad_output());
  }

  __device__ __forceinline__ bool is_narrow() const { return sizeof(Sum) == 4 && arguments.dtype != DType::Float32; }

  // Four elements of 16 bits take half of a place.
  __device__ __forceinline__ void copy_grad_output(Data* place, int64_t row_offset, int64_t column) const {
    const int64_t offset = row_offset + column;
    if (is_narrow()) {
      copy_async<8>(place, static_cast<const uint16_t*>(arguments.norm.grad_output) + offset);
    } else {
      copy_async(place, static_cast<const Sum*>(arguments.norm.grad_output) + offset);
    }
  }

  __device__ __forceinline__ Data copied_grad_output(const Data* place) const {
    if constexpr (sizeof(Sum) == 4) {
      if (is_narrow()) {
        const uint2 words = *reinterpret_cast<const uint2*>(place);
        Beside<Sum, width> copied;
        copied.bits.words[0] = words.x;
        copied.bits.words[1] = words.y;
        return copied.get(grad_output());
      }
    }
    return *place;
  }

  // --- what the gradient of the sum becomes ---

  struct Fetched {
    Beside<Sum, width> grad_sum;
    Beside<Sum, width> input;
  };

  using Row = ParameterBits<1>;

  // Beside a row and its sums there is room for few packs on their way.
  static FASTREG_INLINE constexpr int at_once() { return width == 1 ? 4 : 2; }

  __device__ __forceinline__ Row open(int64_t row) const { return branch.fetch_row_scale(row); }

  __device__ __forceinline__ int64_t element(int64_t row, int64_t column) const {
    return row * arguments.norm.columns + column;
  }

  template <int packs, class ElementOf>
  __device__ __forceinline__ uint32_t draw(const ElementOf& element_of) const {
    return branch.draw<width, packs>(element_of);
  }

  // Of the sum's dtype.
  __device__ __forceinline__ Parameter grad_sum() const { return {arguments.grad_sum, DType::Float32}; }

  __device__ __forceinline__ Parameter branch_input() const { return {arguments.input, arguments.dtype}; }

  __device__ __forceinline__ Fetched fetch(int64_t row, int64_t column) const {
    Fetched fetched;
    if (arguments.grad_sum != nullptr) {
      fetched.grad_sum.load(grad_sum(), row * arguments.grad_sum_stride + column);
    }
    if (wants_sums()) fetched.input.load(branch_input(), row * arguments.input_stride + column);
    return fetched;
  }

  __device__ __forceinline__ void add_grad_sum(const Fetched& fetched, float (&gradient)[width]) const {
    if (arguments.grad_sum != nullptr) {
      const Data added = fetched.grad_sum.get(grad_sum());
#pragma unroll
      for (int index = 0; index < width; ++index) gradient[index] += added[index];
    }
  }

  // Of `scaled`, the gradient of the sum times row_scale and the mask's scale.
  __device__ __forceinline__ void terms_of_sums(const Fetched& fetched, uint32_t bits, const float (&scaled)[width],
                                                float (&terms)[width]) const {
    const Data input_data = fetched.input.get(branch_input());
#pragma unroll
    for (int index = 0; index < width; ++index) {
      terms[index] = is_kept(bits, index) ? scaled[index] * input_data[index] : 0.0f;
    }
  }

  __device__ __forceinline__ void scale_gradient(const Row& opened, float (&gradient)[width]) const {
    const float factor = branch.factor(opened);
#pragma unroll
    for (int index = 0; index < width; ++index) gradient[index] *= factor;
  }

  // `packs`: of the thread in a row; 0 where no sums are kept.
  template <int packs>
  __device__ __forceinline__ void finish(const Fetched& fetched, const Row& opened, uint32_t bits, int place,
                                         int64_t row, int64_t column, float (&gradient)[width]) const {
    add_grad_sum(fetched, gradient);
    if (arguments.grad_residual != nullptr) {
      pack<Sum, width>(gradient).store(static_cast<Sum*>(arguments.grad_residual) + element(row, column));
    }
    const bool adds = packs > 0 && wants_sums();
    if (arguments.norm.grad_input == nullptr && !adds) {
      return;
    }
    scale_gradient(opened, gradient);
    if constexpr (packs > 0) {
      if (adds) {
        float terms[width];
        terms_of_sums(fetched, bits, gradient, terms);
        ThirdSums<packs, width>(dynamic_shared()).add(place, terms);
      }
    }
    if (arguments.norm.grad_input != nullptr) {
      float layer_scale[width];
      load_parameter<width>(branch.arguments.layer_scale, column, 1.0f, layer_scale);
#pragma unroll
      for (int index = 0; index < width; ++index) {
        gradient[index] = is_kept(bits, index) ? gradient[index] * layer_scale[index] : 0.0f;
      }
      store_beside<Sum>(arguments.norm.grad_input, arguments.dtype, element(row, column), gradient);
    }
  }

  // --- along one row ---

  struct Along {
    const GradientsOfSum& target;
    Row opened;
    int64_t row;
    int64_t first;
    const Sum* input;

    template <bool>
    __device__ __forceinline__ Data load_grad_output(int64_t column) const {
      return target.load_grad_output(row, first + column);
    }

    __device__ __forceinline__ void finish(int64_t column, float (&gradient)[width]) const {
      const Fetched fetched = target.fetch(row, first + column);
      const uint32_t bits = target.template draw<1>([&](int) { return target.element(row, first + column); });
      target.template finish<0>(fetched, opened, bits, 0, row, first + column, gradient);
    }
  };

  __device__ __forceinline__ Along along(int64_t row, int64_t first) const {
    return {*this, open(row), row, first, input(row, first)};
  }

  // --- sums for layer_scale ---

  __device__ __forceinline__ bool wants_sums() const { return arguments.scale_partials != nullptr; }
  __device__ __forceinline__ float* sums_partials() const { return arguments.scale_partials; }

  // At the beginning of the shared memory; returns how many bytes they take there.
  template <int packs>
  __device__ __forceinline__ int start_sums() const {
    if (!wants_sums()) {
      return 0;
    }
    ThirdSums<packs, width>(dynamic_shared()).clear();
    return static_cast<int>(sizeof(float)) * packs * width * static_cast<int>(blockDim.x);
  }

  template <int packs>
  __device__ __forceinline__ void write_sums(int64_t partial, const Team& team, const Slice& slice,
                                             float* scratch) const {
    if (!wants_sums()) {
      return;
    }
    ColumnSums<packs, width, false> sums(nullptr);
    const ThirdSums<packs, width> kept(dynamic_shared());
#pragma unroll
    for (int place = 0; place < packs; ++place) kept.get(place, sums.values[place]);
    write_partials(sums, arguments.scale_partials + partial, team, slice, scratch);
  }

  // Down the columns.
  __device__ __forceinline__ void add_to_sums(const Fetched& fetched, const Row& opened, uint32_t bits,
                                              float (&gradient)[width], float (&sums)[width]) const {
    add_grad_sum(fetched, gradient);
    scale_gradient(opened, gradient);
    float terms[width];
    terms_of_sums(fetched, bits, gradient, terms);
#pragma unroll
    for (int index = 0; index < width; ++index) sums[index] += terms[index];
  }

  // --- means of a row, from the kernel that goes along it to the one that goes down ---

  __device__ __forceinline__ void store_means(int64_t row, const Sums& means) const {
    if (wants_sums()) {
      arguments.row_means[2 * row] = means.projection;
      arguments.row_means[2 * row + 1] = means.plain;
    }
  }

  __device__ __forceinline__ void store_means(int64_t row, float means) const {
    if (wants_sums()) arguments.row_means[row] = means;
  }

  template <bool centred>
  __device__ __forceinline__ RowSums<centred> load_means(int64_t row) const {
    if constexpr (centred) {
      return {__ldg(arguments.row_means + 2 * row), __ldg(arguments.row_means + 2 * row + 1)};
    } else {
      return __ldg(arguments.row_means + row);
    }
  }
};

// Where no number of blocks is given the compiler aims at more of them than there are registers for, and spills a few.
template <class Sum, bool centred, int width, bool sums_in_shared>
__global__ void __launch_bounds__(backward_shared_threads, 1)
    dropout_add_backward_kernel(const DropoutAddBackwardArguments arguments) {
  const Branch branch(arguments.branch);
  differentiate_rows<centred, sums_in_shared>(arguments.norm, GradientsOfSum<Sum, width>{arguments, branch});
}

template <class Sum, bool centred, int width>
__global__ void __launch_bounds__(looped_threads, 1)
    dropout_add_backward_looped_kernel(const DropoutAddBackwardArguments arguments) {
  const Branch branch(arguments.branch);
  differentiate_long_row<centred>(arguments.norm, GradientsOfSum<Sum, width>{arguments, branch});
}

template <class Sum, bool centred, int width>
__global__ void __launch_bounds__(columns_threads, 3)
    dropout_add_backward_columns_kernel(const DropoutAddBackwardArguments arguments) {
  const Branch branch(arguments.branch);
  sum_columns<centred>(arguments.norm, GradientsOfSum<Sum, width>{arguments, branch});
}

template <bool centred>
__global__ void __launch_bounds__(reduce_columns* reduce_slices)
    dropout_add_reduce_partials_kernel(const ReduceArguments arguments) {
  FASTREG_SHARED(ReduceSums, sums);
  reduce_partials(arguments, sums);
}

}  // namespace fastreg::cuda
