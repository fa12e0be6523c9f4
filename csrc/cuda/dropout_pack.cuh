// As many neighbouring elements of tensors of different dtypes: 16 bytes of the wider one, 8 or 16 of the other, or one
// element of each.
//
// vec.cuh's packs are 16 bytes of any dtype, and are read by a path that is for memory which the kernel does not write.
// These are read by the ordinary one, since input and output may be the same memory; once, so they may leave the caches
// first.

#pragma once

#include "vec.cuh"

namespace fastreg::cuda {

template <class Element, int width>
struct alignas(sizeof(Element) * width) DropoutPack {
  static_assert(width == 1 || width == 4 || width == 8);

  using One = std::conditional_t<sizeof(Element) == 4, unsigned, unsigned short>;
  using Some = std::conditional_t<sizeof(Element) * width == 8, uint2, uint4>;
  using Word = std::conditional_t<width == 1, One, Some>;

  Element elements[width];

  static __device__ __forceinline__ DropoutPack load(const Element* address) {
    DropoutPack pack;
    const Word bits = __ldcs(reinterpret_cast<const Word*>(address));
    memcpy(&pack, &bits, sizeof(pack));
    return pack;
  }

  __device__ __forceinline__ void store(Element* address) const {
    Word bits;
    memcpy(&bits, this, sizeof(bits));
    if constexpr (sizeof(Word) == 16) {
      store_wide(address, bits);
    } else if constexpr (width > 1) {
      // Not a plain store, for the reason that store_wide has.
      __stwb(reinterpret_cast<Word*>(address), bits);
    } else {
      *reinterpret_cast<Word*>(address) = bits;
    }
  }

  __device__ __forceinline__ float operator[](int index) const { return to_float(elements[index]); }
};

template <class Element, int width>
__device__ __forceinline__ DropoutPack<Element, width> dropout_pack(const float (&values)[width]) {
  DropoutPack<Element, width> packed;
  if constexpr (sizeof(Element) == 2 && width > 1) {
    // Two at a time: one instruction rounds and packs a pair.
    using Pair = std::conditional_t<std::is_same_v<Element, bfloat16>, __nv_bfloat162, __half2>;
    Pair pairs[width / 2];
#pragma unroll
    for (int index = 0; index < width / 2; ++index) {
      if constexpr (std::is_same_v<Element, bfloat16>) {
        pairs[index] = __floats2bfloat162_rn(values[2 * index], values[2 * index + 1]);
      } else {
        pairs[index] = __floats2half2_rn(values[2 * index], values[2 * index + 1]);
      }
    }
    memcpy(&packed, pairs, sizeof(packed));
  } else {
#pragma unroll
    for (int index = 0; index < width; ++index) packed.elements[index] = from_float<Element>(values[index]);
  }
  return packed;
}

}  // namespace fastreg::cuda
