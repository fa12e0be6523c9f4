// Elements in memory and in registers: 16-byte packs of activations, and parameters whose dtype is known at run time
// only.
//
// Everything is computed in fp32: a load converts at once, a store rounds once, to nearest even. A pack is as wide as
// 16 bytes, or one element wide for tensors that are not aligned to 16 bytes; kernels take the width as a template
// parameter, so that no lane is ever masked.

#pragma once

#include <cstring>
#include <type_traits>

#include "../dtype.h"
#include "device.cuh"

namespace fastreg::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }

template <class Element>
__device__ __forceinline__ Element from_float(float value) {
  if constexpr (sizeof(Element) == 4) {
    return value;
  } else if constexpr (std::is_same_v<Element, bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

// --- activations -----------------------------------------------------------------------------------------------------

// The widest pack of an element type.
template <class Element>
inline constexpr int full_width = 16 / static_cast<int>(sizeof(Element));

// Neighbouring elements as they lie in memory. Loaded as one word of 16 bytes, or as one element.
template <class Element, int width>
struct alignas(sizeof(Element) * width) Pack {
  static_assert(width == 1 || width == full_width<Element>);

  Element elements[width];

  // For data that this launch reads once.
  static __device__ __forceinline__ Pack load(const Element* address) {
    Pack pack;
    if constexpr (width == 1) {
      pack.elements[0] = __ldg(address);
    } else {
      const uint4 bits = load_streamed(address);
      memcpy(&pack, &bits, sizeof(pack));
    }
    return pack;
  }

  // For data that the same thread reads again.
  static __device__ __forceinline__ Pack load_kept(const Element* address) {
    Pack pack;
    if constexpr (width == 1) {
      pack.elements[0] = __ldg(address);
    } else {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
      memcpy(&pack, &bits, sizeof(pack));
    }
    return pack;
  }

  __device__ __forceinline__ void store(Element* address) const {
    if constexpr (width == 1) {
      *address = elements[0];
    } else {
      uint4 bits;
      memcpy(&bits, this, sizeof(bits));
      store_wide(address, bits);
    }
  }

  // A pack of bfloat16, the upper half of fp32, is read from its words: of halves that are converted one by one the
  // compiler may keep each in a register of its own.
  __device__ __forceinline__ float operator[](int index) const {
    if constexpr (std::is_same_v<Element, bfloat16> && width > 1) {
      uint32_t word;
      memcpy(&word, &elements[index / 2 * 2], sizeof(word));
      return __uint_as_float(index % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return to_float(elements[index]);
    }
  }

  // Between two uses of a packed row: without it the compiler keeps the fp32 values, twice as many registers.
  __device__ __forceinline__ void keep_packed() {
    if constexpr (sizeof(Element) == 2) {
      using Word = std::conditional_t<width == 1, uint16_t, uint32_t>;
      Word words[sizeof(Pack) / sizeof(Word)];
      memcpy(words, this, sizeof(words));
#pragma unroll
      for (Word& word : words) forget(word);
      memcpy(this, words, sizeof(words));
    }
  }
};

template <class Element, int width, int packs>
__device__ __forceinline__ void keep_packed(Pack<Element, width> (&data)[packs]) {
#pragma unroll
  for (int place = 0; place < packs; ++place) data[place].keep_packed();
}

template <class Element, int width>
__device__ __forceinline__ Pack<Element, width> pack(const float (&values)[width]) {
  Pack<Element, width> packed;
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
    for (int index = 0; index < width; ++index) {
      packed.elements[index] = from_float<Element>(values[index]);
    }
  }
  return packed;
}

// --- parameters ------------------------------------------------------------------------------------------------------

// A weight or bias, or the place of its gradient. Null data: there is none.
struct Parameter {
  const void* data;
  DType dtype;
};

// `width` neighbouring elements of a parameter as they lie in memory. Loading and converting are two steps, so that a
// kernel can have several loads on their way before it waits for the first: the switch on the dtype then sits in code
// that waits for nothing.
template <int width>
struct ParameterBits {
  uint32_t words[width];

  __device__ __forceinline__ void load(const Parameter& parameter, int64_t column) {
    if (parameter.data == nullptr) {
      return;
    }
    if (parameter.dtype == DType::Float32) {
      const float* address = static_cast<const float*>(parameter.data) + column;
      if constexpr (width == 1) {
        words[0] = __float_as_uint(__ldg(address));
      } else {
#pragma unroll
        for (int first = 0; first < width; first += 4) {
          const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address + first));
          memcpy(&words[first], &bits, sizeof(bits));
        }
      }
    } else {
      const uint16_t* address = static_cast<const uint16_t*>(parameter.data) + column;
      if constexpr (width == 1) {
        words[0] = __ldg(address);
      } else if constexpr (width == 4) {
        const uint2 bits = __ldg(reinterpret_cast<const uint2*>(address));
        memcpy(words, &bits, sizeof(bits));
      } else {
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
        memcpy(words, &bits, sizeof(bits));
      }
    }
  }

  // `absent` stands for a parameter that there is none of: 1 for a weight, 0 for a bias.
  __device__ __forceinline__ void convert(const Parameter& parameter, float absent, float (&values)[width]) const {
    if (parameter.data == nullptr) {
#pragma unroll
      for (int index = 0; index < width; ++index) values[index] = absent;
    } else if (parameter.dtype == DType::Float32) {
#pragma unroll
      for (int index = 0; index < width; ++index) values[index] = __uint_as_float(words[index]);
    } else if (parameter.dtype == DType::BFloat16) {
#pragma unroll
      for (int index = 0; index < width; ++index) {
        // bfloat16 is the upper half of fp32.
        const uint32_t word = words[index / 2];
        values[index] = __uint_as_float(index % 2 == 0 ? word << 16 : word & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const uint32_t word = words[index / 2];
        __half_raw raw;
        raw.x = static_cast<unsigned short>(index % 2 == 0 ? word & 0xffffu : word >> 16);
        values[index] = __half2float(__half(raw));
      }
    }
  }
};

template <int width>
__device__ __forceinline__ void load_parameter(const Parameter& parameter, int64_t column, float absent,
                                               float (&values)[width]) {
  ParameterBits<width> bits;
  bits.load(parameter, column);
  bits.convert(parameter, absent, values);
}

__device__ __forceinline__ void store_parameter(void* data, DType dtype, int64_t column, float value) {
  if (dtype == DType::Float32) {
    static_cast<float*>(data)[column] = value;
  } else if (dtype == DType::BFloat16) {
    static_cast<bfloat16*>(data)[column] = __float2bfloat16_rn(value);
  } else {
    static_cast<float16*>(data)[column] = __float2half_rn(value);
  }
}

// Whether packs of this many bytes can be loaded from `data`.
inline bool aligned(const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

}  // namespace fastreg::cuda
