// How planes of a group lie in shared memory, and which thread has which of them.
//
// As in batch_norm_resident_planes.cuh, with the channels of a group in the place of samples: a slab is a sample's
// group, a block has a share of its planes' chunks, each of 16 bytes and of one plane. Here the order matters, since
// backward needs sums of each channel: some neighbouring lanes take a run of chunks, a whole short plane or as many as
// each warp of the block gets, and go through it plane by plane. Every phase goes the same way, so that what a thread
// copies, it reads itself and needs no barrier for.
//
// Where a slab is so small that one warp has it, the warps of a block have slabs of their own, and know nothing of each
// other.

#pragma once

#include "batch_norm_resident_planes.cuh"
#include "group_norm.cuh"

namespace fastreg::cuda {

// Numbered in 32 bits: what has more of them streams.
struct GroupSlab {
  int index;  // of its statistics
  int sample;
  int group;
};

// Chunks of a block's share that follow each other in one channel of the group.
struct GroupSegment {
  int run;  // of the block
  int channel;
  int begin;
  int end;

  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// `aligned`: planes are whole chunks, so that nothing has to be told apart.
template <class Element, bool aligned>
struct GroupWalk {
  static constexpr int width = full_width<Element>;

  const GroupLayout& layout;
  const ChannelShape& shape;
  const GroupShape& group;
  uintptr_t address;  // of a tensor that stands for all
  int64_t stride;     // of its samples
  int spatial;
  int columns;
  int first;  // chunk of the slab that the block begins with
  int count;  // chunks of the block
  int lane;
  int team;  // of lanes
  int teams;

  __device__ __forceinline__ GroupWalk(const GroupLayout& layout, const ChannelShape& shape, const GroupShape& group,
                                       const void* tensor, int64_t sample_stride)
      : layout(layout),
        shape(shape),
        group(group),
        address(reinterpret_cast<uintptr_t>(tensor)),
        stride(sample_stride),
        spatial(static_cast<int>(shape.spatial)),
        columns(layout.blocks.columns) {
    const int share = static_cast<int>(layout.blocks.share);
    first = layout.blocks.rank() * share;
    const int rest = static_cast<int>(group.channels) * columns - first;
    count = rest < share ? rest : share;
    const int thread = static_cast<int>(threadIdx.x) % layout.slab_threads;
    lane = thread % layout.lanes;
    team = thread / layout.lanes;
    teams = layout.slab_threads / layout.lanes;
  }

  // --- slabs ---

  __device__ __forceinline__ int slabs_at_once() const { return static_cast<int>(blockDim.x) / layout.slab_threads; }
  // Of those that the block has at once, this thread's.
  __device__ __forceinline__ int slab_of_block() const { return static_cast<int>(threadIdx.x) / layout.slab_threads; }
  // Whether warps or blocks have to tell each other what they know.
  __device__ __forceinline__ bool shares() const { return layout.slab_threads > warp_lanes; }
  // The thread that stores what is of the slab.
  __device__ __forceinline__ bool speaks() const {
    return static_cast<int>(threadIdx.x) % layout.slab_threads == 0 && layout.blocks.rank() == 0;
  }

  __device__ __forceinline__ GroupSlab slab(int index) const {
    const unsigned groups = static_cast<unsigned>(group.groups);
    const int sample = static_cast<int>(static_cast<unsigned>(index) / groups);
    return {index, sample, index - sample * static_cast<int>(groups)};
  }
  __device__ __forceinline__ GroupSlab first_slab() const {
    return slab(static_cast<int>(layout.blocks.group()) * slabs_at_once() + slab_of_block());
  }
  __device__ __forceinline__ GroupSlab next(const GroupSlab& before) const {
    return slab(before.index + static_cast<int>(layout.blocks.groups()) * slabs_at_once());
  }
  __device__ __forceinline__ bool has(const GroupSlab& slab) const { return slab.index < layout.blocks.slabs; }

  // Of the tensor.
  __device__ __forceinline__ int64_t channel(const GroupSlab& slab, int of_group) const {
    return slab.group * group.channels + of_group;
  }
  // Where a tensor has the plane.
  __device__ __forceinline__ int64_t plane(int64_t sample_stride, const GroupSlab& slab, int of_group) const {
    return slab.sample * sample_stride + channel(slab, of_group) * shape.spatial;
  }

  // --- chunks ---

  // Calls visit(segment) for the segments of this thread's lanes; all lanes of a warp equally often.
  template <class Visit>
  __device__ __forceinline__ void each_segment(const Visit& visit) const {
    for (int turn = 0; turn * layout.run < count; turn += teams) {
      const int run = turn + team;
      const int begin = run * layout.run < count ? run * layout.run : count;
      const int end = begin + layout.run < count ? begin + layout.run : count;
      GroupSegment segment{run, (first + begin) / columns, begin, 0};
      do {
        const int plane_end = (segment.channel + 1) * columns - first;
        segment.end = plane_end < end ? plane_end : end;
        visit(segment);
        segment.begin = segment.end;
        ++segment.channel;
      } while (segment.begin < end);
    }
  }

  // Elements between the multiple of 16 bytes that a plane's first chunk begins at and the plane.
  __device__ __forceinline__ int skew(const GroupSlab& slab, int of_group) const {
    if constexpr (aligned) return 0;
    const uintptr_t begin = address + static_cast<uintptr_t>(plane(stride, slab, of_group)) * sizeof(Element);
    return static_cast<int>(begin % 16 / sizeof(Element));
  }

  // Which of a chunk's elements belong to the plane.
  __device__ __forceinline__ Part part(const GroupSegment& segment, int place, int skew) const {
    const int element = (first + place - segment.channel * columns) * width - skew;
    if constexpr (aligned) return {element, 0, width};
    const int rest = spatial - element;
    return {element, element < 0 ? -element : 0, rest < width ? rest : width};
  }

  // Calls visit(place, part) for this thread's chunks of a segment that have anything of the plane. `at_once`: so many
  // visits side by side, where they are short.
  template <int at_once, class Visit>
  __device__ __forceinline__ void each_chunk(const GroupSegment& segment, int skew, const Visit& visit) const {
#pragma unroll at_once
    for (int place = segment.begin + lane; place < segment.end; place += layout.lanes) {
      const Part of_chunk = part(segment, place, skew);
      if (!of_chunk.empty()) visit(place, of_chunk);
    }
  }
};

// Starts the copies of a thread's chunks of a slab, if there is one.
template <class Element, bool aligned, class Fetch>
__device__ __forceinline__ void fetch_slab(const GroupWalk<Element, aligned>& walk, const GroupSlab& slab, const Fetch& fetch) {
  if (walk.has(slab)) {
    walk.each_segment([&](const GroupSegment& segment) {
      const int skew = walk.skew(slab, segment.channel);
      walk.template each_chunk<aligned ? 4 : 1>(
          segment, skew, [&](int place, const Part& part) { fetch(slab, segment.channel, place, part); });
    });
  }
}

}  // namespace fastreg::cuda
