// DropBlock, element by element: the input where its bit is set, times the scale of the batch or of its sample, else 0.
//
// A thread's packs are on their way while it looks up their bits: the position of a pack's first element is found with
// two or three divisions, that of the others by going on from there. In contiguous tensors neighbours share a byte of
// bits; in channels_last ones they share a bit, or have one each in as many planes of bits.
//
// Traffic: a read and a write of the activations, the bits. Equal bits in every run.

#pragma once

#include "drop_block_plan.h"
#include "dropout_mask.cuh"
#include "dropout_pack.cuh"

namespace fastreg::cuda {

struct DropBlockApplyArguments {
  const void* input;
  void* output;
  const unsigned char* bits;  // (samples, channels or 1, rows, row_bytes)
  const double* scale;        // one, or one a sample
  int64_t elements;
  int64_t row_bytes;
  Divisor sample_elements;
  Divisor channels;
  Divisor rows;   // of a plane
  Divisor width;  // of a row
  bool channels_last;
  bool shared;      // one plane of bits for all channels of a sample
  bool per_sample;  // scales

  __device__ __forceinline__ uint32_t byte(int64_t row, int64_t position) const {
    return __ldg(bits + row * row_bytes + position / 8);
  }

  // --- contiguous ---

  // Where the bits of a row of the tensor are.
  __device__ __forceinline__ int64_t row_of_bits(int64_t row) const {
    if (!shared) return row;
    const int64_t plane = quotient(row, rows);
    return quotient(plane, channels) * rows.value + (row - plane * rows.value);
  }

  template <int pack>
  __device__ __forceinline__ uint32_t bits_of_rows(int64_t element) const {
    int64_t row = quotient(element, width);
    int64_t position = element - row * width.value;
    uint32_t found = 0;
    for (int index = 0; index < pack;) {
      const int64_t rest = width.value - position;
      const int count = rest < pack - index ? static_cast<int>(rest) : pack - index;
      const int skip = static_cast<int>(position % 8);
      const int64_t source = row_of_bits(row);
      uint32_t bytes = byte(source, position);
      if (skip + count > 8) bytes |= byte(source, position + 8) << 8;
      found |= (bytes >> skip & low_bits(count)) << index;
      index += count;
      position = 0;
      ++row;
    }
    return found;
  }

  // --- channels_last ---

  template <int pack>
  __device__ __forceinline__ uint32_t bits_of_pixels(int64_t element) const {
    int64_t pixel = quotient(element, channels);
    int64_t channel = element - pixel * channels.value;
    uint32_t found = 0;
    for (int index = 0; index < pack;) {
      const int64_t rest = channels.value - channel;
      const int count = rest < pack - index ? static_cast<int>(rest) : pack - index;
      const int64_t row = quotient(pixel, width);
      const int64_t position = pixel - row * width.value;
      if (shared) {
        if ((byte(row, position) >> position % 8 & 1u) != 0) found |= low_bits(count) << index;
      } else {
        const int64_t sample = quotient(row, rows);
        int64_t source = (sample * channels.value + channel) * rows.value + (row - sample * rows.value);
        for (int of_run = 0; of_run < count; ++of_run, source += rows.value) {
          found |= (byte(source, position) >> position % 8 & 1u) << (index + of_run);
        }
      }
      index += count;
      channel = 0;
      ++pixel;
    }
    return found;
  }

  template <int pack>
  __device__ __forceinline__ uint32_t bits_of(int64_t element) const {
    return channels_last ? bits_of_pixels<pack>(element) : bits_of_rows<pack>(element);
  }

  __device__ __forceinline__ float scale_of(int64_t element) const {
    return static_cast<float>(__ldg(scale + (per_sample ? quotient(element, sample_elements) : 0)));
  }
};

// A thread's packs, from its first element on.
template <class Element, int width, int packs>
__device__ __forceinline__ void drop_block_packs_from(const DropBlockApplyArguments& arguments, int64_t first) {
  using Data = DropoutPack<Element, width>;
  constexpr int step = drop_block_threads * width;
  const Element* input = static_cast<const Element*>(arguments.input) + first;
  Element* output = static_cast<Element*>(arguments.output) + first;

  Data data[packs];
#pragma unroll
  for (int pack = 0; pack < packs; ++pack) data[pack] = Data::load(input + pack * step);
#pragma unroll
  for (int pack = 0; pack < packs; ++pack) {
    const int64_t element = first + pack * step;
    const uint32_t bits = arguments.bits_of<width>(element);
    const float scale = arguments.scale_of(element);
    float values[width];
#pragma unroll
    for (int index = 0; index < width; ++index) {
      values[index] = (bits >> index & 1u) != 0 ? data[pack][index] * scale : 0.0f;
    }
    dropout_pack<Element>(values).store(output + pack * step);
  }
}

template <class Element, int width>
__global__ void __launch_bounds__(drop_block_threads) drop_block_apply_kernel(const DropBlockApplyArguments arguments) {
  constexpr int packs = drop_block_packs;
  constexpr int64_t share = drop_block_threads * packs * width;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = blockIdx.x * share;
  if (first + share <= arguments.elements) {
    drop_block_packs_from<Element, width, packs>(arguments, first + thread * width);
  } else {
    const int64_t end = arguments.elements;
    for (int64_t element = first + thread; element < end; element += drop_block_threads) {
      drop_block_packs_from<Element, 1, 1>(arguments, element);
    }
  }
}

}  // namespace fastreg::cuda
