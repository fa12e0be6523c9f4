// What dropout + residual + norm does to its branch, forward and backward, and the tensors beside the sum.
//
// In these ops a row of the norm is the sum of a residual and of a branch that was dropped and scaled:
//
//   sum = residual + (keep ? input * row_scale * layer_scale * scale : 0)
//
// Kernels are compiled for the dtype of the sum. Where it has 16 bits every other tensor has its dtype; where it is
// fp32, those beside it may have 16 bits each, and their dtype is known at run time only: a pack of them is then four
// elements.

#pragma once

#include "../philox.h"
#include "dropout_pack.cuh"
#include "dropout_plan.h"

namespace fastreg::cuda {

struct BranchArguments {
  Parameter row_scale;    // one for each `scale_rows` rows
  Parameter layer_scale;  // one a column
  Divisor scale_rows;
  const int64_t* seed;               // null: nothing is dropped
  const int64_t* dynamic_threshold;  // null: `threshold`
  int64_t threshold;                 // elements dropped out of 2^16
  float scale;                       // that goes with `threshold`
};

// --- tensors beside the sum ------------------------------------------------------------------------------------------

// A pack as it lies in memory, in words, since the compiler would keep the halves of 16 bits in registers of their own.
template <class Sum, int width>
struct Beside {
  uint32_t words[width == 1 ? 1 : width / 2];

  __device__ __forceinline__ void load(const Parameter& tensor, int64_t offset) {
    const uint16_t* address = static_cast<const uint16_t*>(tensor.data) + offset;
    if constexpr (width == 1) {
      words[0] = __ldg(address);
    } else {
      const uint4 bits = load_streamed(address);
      memcpy(words, &bits, sizeof(bits));
    }
  }

  __device__ __forceinline__ Pack<Sum, width> get(const Parameter&) const {
    Pack<Sum, width> data;
    if constexpr (width == 1) {
      const uint16_t bits = static_cast<uint16_t>(words[0]);
      memcpy(&data, &bits, sizeof(bits));
    } else {
      uint32_t kept[width / 2];
#pragma unroll
      for (int index = 0; index < width / 2; ++index) {
        kept[index] = words[index];
        forget(kept[index]);
      }
      memcpy(&data, kept, sizeof(kept));
    }
    return data;
  }
};

template <int width>
struct Beside<float, width> {
  ParameterBits<width> bits;

  __device__ __forceinline__ void load(const Parameter& tensor, int64_t offset) { bits.load(tensor, offset); }

  // As fp32, which is exact.
  __device__ __forceinline__ Pack<float, width> get(const Parameter& tensor) const {
    float values[width];
    bits.convert(tensor, 0.0f, values);
    return pack<float, width>(values);
  }
};

template <class Sum, int width>
__device__ __forceinline__ void store_beside(void* tensor, DType dtype, int64_t offset, const float (&values)[width]) {
  if (sizeof(Sum) == 2 || dtype == DType::Float32) {
    pack<Sum, width>(values).store(static_cast<Sum*>(tensor) + offset);
  } else if constexpr (sizeof(Sum) == 4) {
    if (dtype == DType::BFloat16) {
      dropout_pack<bfloat16>(values).store(static_cast<bfloat16*>(tensor) + offset);
    } else {
      dropout_pack<float16>(values).store(static_cast<float16*>(tensor) + offset);
    }
  }
}

// --- the branch ------------------------------------------------------------------------------------------------------

// Seed and threshold are read by the kernel, as in dropout_mask.cuh; an element's index is its row-major one.
struct Branch {
  const BranchArguments& arguments;
  uint64_t seed;
  uint32_t threshold;
  float scale;

  __device__ __forceinline__ explicit Branch(const BranchArguments& given)
      : arguments(given), seed(0), threshold(0), scale(1.0f) {
    if (given.seed == nullptr) {
      return;
    }
    seed = static_cast<uint64_t>(__ldg(given.seed));
    threshold = static_cast<uint32_t>(given.threshold);
    scale = given.scale;
    if (given.dynamic_threshold != nullptr) {
      threshold = static_cast<uint32_t>(__ldg(given.dynamic_threshold));
      // keep_scale(), rounded once: a reciprocal that is off by an ulp is right after one step of Newton's, since a
      // number of 17 bits has not the one significand, all ones, for which it might not be (Markstein, "Computation of
      // elementary functions on the IBM RISC System/6000 processor", 1990). A division would be a subroutine.
      const float kept = static_cast<float>(static_cast<uint32_t>(half_lane_count) - threshold);
      const float guess = reciprocal_approximate(kept);
      const float reciprocal = fmaf(fmaf(-kept, guess, 1.0f), guess, guess);
      scale = kept > 0.0f ? static_cast<float>(half_lane_count) * reciprocal : 0.0f;
    }
  }

  // Which elements of `packs` packs are kept, a bit each from the lowest on. A pack lies within a block of the random
  // stream. The loop is not unrolled: a block takes some eighty instructions, and needs none of the others' registers.
  template <int width, int packs, class ElementOf>
  __device__ __forceinline__ uint32_t draw(const ElementOf& element_of) const {
    static_assert(width * packs <= 32);
    if (arguments.seed == nullptr) {
      return 0xffffffffu;
    }
    uint32_t bits = 0;
#pragma unroll 1
    for (int pack = 0; pack < packs; ++pack) {
      const uint64_t element = static_cast<uint64_t>(element_of(pack));
      const PhiloxBlock block = philox(seed, element / philox_half_lanes);
      bits |= keep_bits<width>(block, static_cast<int>(element % philox_half_lanes)) << pack * width;
    }
    return bits;
  }

  // `first`: the lane of the pack's first element, a multiple of the width.
  template <int width>
  __device__ __forceinline__ uint32_t keep_bits(const PhiloxBlock& block, int first) const {
    if constexpr (width == 1) {
      const uint32_t low = first < 2 ? block.words[0] : block.words[1];
      const uint32_t high = first < 6 ? block.words[2] : block.words[3];
      const uint32_t word = first < 4 ? low : high;
      return (first % 2 == 0 ? word & 0xffffu : word >> 16) >= threshold ? 1u : 0u;
    } else {
      uint32_t bits = 0;
#pragma unroll
      for (int index = 0; index < width; index += 2) {
        const uint32_t word =
            width == 4 && first != 0 ? block.words[(index + 4) / 2 % 4] : block.words[index / 2];
        bits |= (word & 0xffffu) >= threshold ? 1u << index : 0u;
        bits |= word >> 16 >= threshold ? 2u << index : 0u;
      }
      return bits;
    }
  }

  // A row's scale is asked for together with the row.
  __device__ __forceinline__ ParameterBits<1> fetch_row_scale(int64_t row) const {
    ParameterBits<1> bits;
    if (arguments.row_scale.data != nullptr) {
      bits.load(arguments.row_scale, quotient(row, arguments.scale_rows));
    }
    return bits;
  }

  // That of the row and of the mask.
  __device__ __forceinline__ float factor(const ParameterBits<1>& bits) const {
    float of_row[1];
    bits.convert(arguments.row_scale, 1.0f, of_row);
    return of_row[0] * scale;
  }
};

__device__ __forceinline__ bool is_kept(uint32_t bits, int index) { return (bits >> index & 1u) != 0; }

}  // namespace fastreg::cuda
