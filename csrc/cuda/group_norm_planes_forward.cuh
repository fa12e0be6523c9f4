// Group norm forward with its groups on chip (group_norm_plan.h): the kernel for planes. That for rows is in
// group_norm_rows_forward.cuh.
//
// A warp, a block, a cluster or a few blocks that meet read a sample's group once into shared memory. Each warp takes
// the mean of its part, then the squared deviations from that mean; the moments of the warps and then of the blocks are
// merged by Chan's update in the order of their numbers. From what is still held the output is computed, with the scale
// and bias of each plane; as soon as a chunk has been read for that, the same place of the next group is on its way
// into it.
//
// Traffic: one read and one write of the activations. Equal bits in every run.

#pragma once

#include "group_norm_planes.cuh"

namespace fastreg::cuda {

// The moments of what a warp holds of a slab.
template <class Element, bool aligned>
__device__ __forceinline__ Moments<float> moments_of_planes(const GroupWalk<Element, aligned>& walk,
                                                            const GroupSlab& slab, const Chunk<Element>* held) {
  constexpr int width = full_width<Element>;
  int elements = 0;
  // Of a chunk's elements first: what a thread adds up one after the other is shorter then.
  const auto sum_of = [&](const auto& term) {
    float total = 0.0f;
    elements = 0;
    walk.each_segment([&](const GroupSegment& segment) {
      const int skew = walk.skew(slab, segment.channel);
      walk.template each_chunk<aligned ? 4 : 1>(segment, skew, [&](int place, const Part& part) {
        const Chunk<Element> data = held[place];
        float sum = 0.0f;
        if (part.template whole<width>()) {
#pragma unroll
          for (int index = 0; index < width; ++index) sum += term(value_of(data, index));
        } else {
#pragma unroll
          for (int index = 0; index < width; ++index) sum += part.has(index) ? term(value_of(data, index)) : 0.0f;
        }
        total += sum;
        elements += part.end - part.first;
      });
    });
    return over_lanes(total, warp_lanes);
  };
  const float sum = sum_of([](float value) { return value; });
  const float count = over_lanes(static_cast<float>(elements), warp_lanes);
  const float mean = mean_of(sum, count);
  return {count, mean, sum_of([&](float value) { return (value - mean) * (value - mean); })};
}

template <class Element, bool aligned>
__global__ void __launch_bounds__(resident_planes_threads)
    group_norm_planes_forward_kernel(const GroupForwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using GroupExchange = Exchange<Moments<float>>;
  FASTREG_SHARED(GroupExchange, exchange);
  const GroupNormForwardArguments& norm = arguments.norm;
  const ResidentLayout& blocks = arguments.layout.blocks;
  exchange.start(blocks.cluster);
  const GroupWalk<Element, aligned> walk(arguments.layout, norm.shape, norm.group, norm.input, norm.input_stride);
  const Planes<Element, aligned> input(norm.input, norm.input_stride, norm.shape);
  const Planes<Element, aligned> output(norm.output, norm.shape.dense_stride(), norm.shape);
  Chunk<Element>* const held =
      reinterpret_cast<Chunk<Element>*>(dynamic_shared()) + walk.slab_of_block() * blocks.share;

  GroupSlab slab = walk.first_slab();
  fetch_slab(walk, slab, [&](const GroupSlab& of, int channel, int place, const Part& part) {
    input.fetch(held + place, walk.plane(input.stride, of, channel), part);
  });
  copy_async_commit();
  start_counters(blocks);
  exchange.finish_start(blocks.cluster);

  for (unsigned round = 0; walk.has(slab); ++round) {
    const GroupSlab next = walk.next(slab);
    copy_async_wait<0>();
    Moments<float> moments[] = {moments_of_planes(walk, slab, held)};
    if (walk.shares()) over_channel(moments, blocks, exchange, round);
    const float mean = moments[0].mean;
    const float rstd = reciprocal_deviation_of(moments[0].squares / moments[0].count, norm.eps);
    if (walk.speaks()) norm.finish(slab.index, moments[0]);

    walk.each_segment([&](const GroupSegment& segment) {
      if (segment.empty()) return;
      const int64_t channel = walk.channel(slab, segment.channel);
      Affine<1> affine;
      affine.set(0, mean, rstd, load_channel(norm.weight, channel, 1.0f), load_channel(norm.bias, channel, 0.0f));
      const int skew = walk.skew(slab, segment.channel);
      const int64_t target = walk.plane(output.stride, slab, segment.channel);
      const bool fetches = walk.has(next);
      const int next_skew = walk.skew(next, segment.channel);
      const int64_t source = walk.plane(input.stride, next, segment.channel);
      for (int place = segment.begin + walk.lane; place < segment.end; place += walk.layout.lanes) {
        const Part part = walk.part(segment, place, skew);
        Chunk<Element> data{};
        if (!part.empty()) data = held[place];
        const Part next_part = walk.part(segment, place, next_skew);
        if (fetches && !next_part.empty()) input.fetch(held + place, source, next_part);
        if (part.empty()) continue;
        float values[width];
        arguments_of(affine, data, false, data, values);
        activate(norm.activation, values);
        output.store(target, part, pack<Element, width>(values));
      }
    });
    copy_async_commit();
    slab = next;
  }
}

}  // namespace fastreg::cuda
