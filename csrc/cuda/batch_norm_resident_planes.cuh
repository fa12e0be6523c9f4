// How planes lie in shared memory: a block's share of one channel, in chunks of 16 bytes as they came.
//
// A plane of S elements begins anywhere, since S is rarely a multiple of 16 bytes (7 x 7, 14 x 14). It is cut where
// memory has multiples of 16 bytes: whole chunks are read and written at once, and of its first and last chunk only the
// part that belongs to it counts. What such a chunk has beside that, other planes' elements, is read along with it,
// never used and never written. All tensors of a launch are cut at the same elements.
//
// Thread t of a block has chunks t, t + threads, t + 2 * threads, ... in every phase, so that what it copies, it reads
// itself and needs no barrier for.

#pragma once

#include "batch_norm_resident_layout.cuh"

namespace fastreg::cuda {

// A chunk of a plane: its first element is the `element`th of the plane, less than 0 where the plane begins within the
// chunk. The elements that belong to the plane are those from `first` up to `end`, none where it is not beyond `first`.
struct Part {
  int element;
  int first;
  int end;

  __device__ __forceinline__ bool has(int index) const { return index >= first && index < end; }
  __device__ __forceinline__ bool empty() const { return end <= first; }

  template <int width>
  __device__ __forceinline__ bool whole() const {
    return first == 0 && end == width;
  }

  // A bit for each; not of an empty part.
  __device__ __forceinline__ uint32_t mask() const { return (1u << end) - (1u << first); }
};

// A tensor of planes. `aligned`: of whole chunks, all of them at multiples of 16 bytes.
template <class Element, bool aligned = false>
struct Planes {
  static constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;

  Element* data;
  int64_t stride;  // of samples
  int64_t extent;  // elements from the first to the last, both counted

  __device__ __forceinline__ Planes(const void* tensor, int64_t sample_stride, const ChannelShape& shape)
      : data(static_cast<Element*>(const_cast<void*>(tensor))),
        stride(sample_stride),
        extent((shape.samples - 1) * sample_stride + shape.channels * shape.spatial) {}

  __device__ __forceinline__ bool holds(int64_t offset) const {
    return aligned || (offset >= 0 && offset + width <= extent);
  }

  // The tensor's first and last chunk: not a byte outside it is touched.
  __device__ __forceinline__ Data load_part(int64_t offset, const Part& part) const {
    Data chunk;
    memset(&chunk, 0, sizeof(chunk));
#pragma unroll
    for (int index = 0; index < width; ++index) {
      if (part.has(index)) chunk.elements[index] = __ldg(data + offset + index);
    }
    return chunk;
  }

  __device__ __forceinline__ Data load(int64_t plane, const Part& part) const {
    const int64_t offset = plane + part.element;
    return holds(offset) ? Data::load(data + offset) : load_part(offset, part);
  }

  __device__ __forceinline__ void fetch(Data* target, int64_t plane, const Part& part) const {
    const int64_t offset = plane + part.element;
    if (holds(offset)) {
      copy_async(target, data + offset);
    } else {
      *target = load_part(offset, part);
    }
  }

  __device__ __forceinline__ void store(int64_t plane, const Part& part, const Data& chunk) const {
    Element* const address = data + plane + part.element;
    if (part.whole<width>()) {
      chunk.store(address);
      return;
    }
    constexpr int in_word = static_cast<int>(sizeof(uint32_t) / sizeof(Element));
#pragma unroll
    for (int index = 0; index < width; index += in_word) {
      if (part.has(index) && part.has(index + in_word - 1)) {
        uint32_t word;
        memcpy(&word, &chunk.elements[index], sizeof(word));
        *reinterpret_cast<uint32_t*>(address + index) = word;
      } else if constexpr (in_word == 2) {
        if (part.has(index)) address[index] = chunk.elements[index];
        if (part.has(index + 1)) address[index + 1] = chunk.elements[index + 1];
      }
    }
  }
};

// A thread's chunks of its block's share, one after the other. What a block holds of a channel has far less than 2^31
// elements.
template <class Element>
struct PlaneWalk {
  static constexpr int width = full_width<Element>;

  const ResidentLayout& layout;
  int spatial;
  int columns;
  int count;          // chunks of the block
  uintptr_t address;  // of a tensor that stands for all
  int64_t stride;     // of its samples
  int next_samples;
  int next_columns;

  // Where the thread is.
  int place;  // chunk of the block
  int sample;
  int column;  // chunk of the plane

  __device__ __forceinline__ PlaneWalk(const ResidentLayout& layout, const ChannelShape& shape, const void* tensor,
                                       int64_t sample_stride)
      : layout(layout),
        spatial(static_cast<int>(shape.spatial)),
        columns(layout.columns),
        address(reinterpret_cast<uintptr_t>(tensor)),
        stride(sample_stride) {
    const int rest = static_cast<int>(shape.samples) * columns - first_chunk();
    const int share = static_cast<int>(layout.share);
    count = rest < share ? rest : share;
    const int threads = static_cast<int>(blockDim.x);
    next_samples = threads / columns;
    next_columns = threads % columns;
    start();
  }

  __device__ __forceinline__ int first_chunk() const {
    return layout.rank() * static_cast<int>(layout.share);
  }

  __device__ __forceinline__ void start() {
    place = static_cast<int>(threadIdx.x);
    const int chunk = first_chunk() + place;
    sample = chunk / columns;
    column = chunk - sample * columns;
  }

  __device__ __forceinline__ bool inside() const { return place < count; }

  __device__ __forceinline__ void advance() {
    place += static_cast<int>(blockDim.x);
    sample += next_samples;
    column += next_columns;
    if (column >= columns) {
      column -= columns;
      ++sample;
    }
  }

  // Which of the elements of the thread's chunk belong to the channel's plane.
  __device__ __forceinline__ Part part(int64_t channel) const {
    const uintptr_t begin = address + static_cast<uintptr_t>(plane(stride, channel)) * sizeof(Element);
    const int element = column * width - static_cast<int>(begin % 16 / sizeof(Element));
    const int rest = spatial - element;
    return {element, element < 0 ? -element : 0, rest < width ? rest : width};
  }

  // Where a tensor has the plane.
  __device__ __forceinline__ int64_t plane(int64_t sample_stride, int64_t channel) const {
    return sample * sample_stride + channel * spatial;
  }
};

// Each of `values`, one, is the same in all lanes of a warp and this warp's part of a channel; it becomes the whole
// channel's. Every thread of the group's blocks must call it, with `round` counting up from 0.
template <class Value>
__device__ __forceinline__ void over_channel(Value (&values)[1], const ResidentLayout& layout,
                                             Exchange<Value>& exchange, unsigned round) {
  over_warps_and_blocks(values, Team(static_cast<int>(blockDim.x)), layout.cluster, exchange, round);
  if (layout.slab_blocks > layout.cluster) {
    const Partials<Value> partials(layout, 1, round);
    if (threadIdx.x == 0) {
      partials.store(layout.rank(), 0, values[0]);
      meet_group(layout, round);
    }
    __syncthreads();
    Value part{};
    const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
    for (int block = lane; block < layout.slab_blocks; block += warp_lanes) {
      const Value other = partials.load(block, 0);
      part = block == lane ? other : together(part, other);
    }
    values[0] = over_lanes(part, warp_lanes);
  }
}

}  // namespace fastreg::cuda
