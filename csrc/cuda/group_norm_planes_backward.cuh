// Group norm backward with its groups on chip (group_norm_plan.h): the kernel for planes; the formula is in
// group_norm.cuh.
//
// A warp, a block, a cluster or a few blocks that meet read input and grad_output of a sample's group once into shared
// memory. Each lane sums up dz and dz * xhat of a channel at a time: what neighbouring lanes know of a channel is
// stored for the parameters' gradients, if those are wanted, and times the channel's weight is summed up for the group.
// From what is still held the gradients are computed, while the next group arrives in the places that have been read.
// dz is computed twice, not kept: rounded to the tensors' dtype it would be too coarse.
//
// Traffic: two reads and one write of the activations; 8 bytes for each channel of a sample, and a few more where a
// channel belongs to several warps. Equal bits in every run.

#pragma once

#include "group_norm_planes.cuh"

namespace fastreg::cuda {

template <class Element, bool aligned>
__global__ void __launch_bounds__(resident_planes_backward_threads, 1)
    group_norm_planes_backward_kernel(const GroupBackwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;
  FASTREG_SHARED(Exchange<Sums>, exchange);
  const GroupNormBackwardArguments& norm = arguments.norm;
  const GroupSums& stored = arguments.sums;
  const ResidentLayout& blocks = arguments.layout.blocks;
  const int share = static_cast<int>(blocks.share);
  exchange.start(blocks.cluster);
  const GroupWalk<Element, aligned> walk(arguments.layout, norm.shape, norm.group, norm.input, norm.input_stride);
  const Planes<Element, aligned> input(norm.input, norm.input_stride, norm.shape);
  const Planes<Element, aligned> grad_output(norm.grad_output, norm.grad_output_stride, norm.shape);
  const Planes<Element, aligned> grad_input(norm.grad_input, norm.shape.dense_stride(), norm.shape);
  Data* const held = reinterpret_cast<Data*>(dynamic_shared()) + walk.slab_of_block() * 2 * share;

  const auto fetch = [&](const GroupSlab& of, int channel, int place, const Part& part) {
    input.fetch(held + place, walk.plane(input.stride, of, channel), part);
    grad_output.fetch(held + share + place, walk.plane(grad_output.stride, of, channel), part);
  };
  // dz of a chunk, and the input it was computed with.
  const auto gradients_of = [&](const Affine<1>& affine, int place, Data& data, float(&gradients)[width]) {
    data = held[place];
    argument_gradients(norm.activation, affine, held[share + place], data, false, data, false, 0u, gradients);
  };

  GroupSlab slab = walk.first_slab();
  fetch_slab(walk, slab, fetch);
  copy_async_commit();
  start_counters(blocks);
  exchange.finish_start(blocks.cluster);

  for (unsigned round = 0; walk.has(slab); ++round) {
    const GroupSlab next = walk.next(slab);
    const float mean = __ldg(norm.mean + slab.index);
    const float rstd = __ldg(norm.rstd + slab.index);
    const auto affine_of_channel = [&](int channel, float& weight) {
      const int64_t of_tensor = walk.channel(slab, channel);
      weight = load_channel(norm.weight, of_tensor, 1.0f);
      Affine<1> affine;
      affine.set(0, mean, rstd, weight, load_channel(norm.bias, of_tensor, 0.0f));
      return affine;
    };
    copy_async_wait<0>();

    Sums sums[1] = {};
    walk.each_segment([&](const GroupSegment& segment) {
      Sums of_segment{};
      float weight = 0.0f;
      if (!segment.empty()) {
        const Affine<1> affine = affine_of_channel(segment.channel, weight);
        const int skew = walk.skew(slab, segment.channel);
        walk.template each_chunk<1>(segment, skew, [&](int place, const Part& part) {
          Data data;
          float gradients[width];
          gradients_of(affine, place, data, gradients);
          // Of a chunk's elements first: what a thread adds up one after the other is shorter then.
          Sums of_chunk{};
#pragma unroll
          for (int index = 0; index < width; ++index) {
            if (part.has(index)) {
              of_chunk.plain += gradients[index];
              of_chunk.projection += gradients[index] * (value_of(data, index) - mean);
            }
          }
          of_segment = together(of_segment, of_chunk);
        });
      }
      of_segment.projection *= rstd;
      sums[0].plain += weight * of_segment.plain;
      sums[0].projection += weight * of_segment.projection;
      if (stored.data != nullptr) {
        of_segment = over_lanes(of_segment, walk.layout.lanes);
        if (walk.lane == 0 && !segment.empty()) {
          const int64_t run = blocks.rank() * stored.pieces.block_runs + segment.run;
          stored.store(slab.index, stored.pieces.slot(run, segment.channel), of_segment.plain, of_segment.projection);
        }
      }
    });
    sums[0] = over_lanes(sums[0], warp_lanes);
    if (walk.shares()) over_channel(sums, blocks, exchange, round);
    const float count = static_cast<float>(norm.per_group());
    const float plain = rstd * mean_of(sums[0].plain, count);
    const float projection = rstd * mean_of(sums[0].projection, count);

    walk.each_segment([&](const GroupSegment& segment) {
      if (segment.empty()) return;
      float weight;
      const Affine<1> affine = affine_of_channel(segment.channel, weight);
      const int skew = walk.skew(slab, segment.channel);
      const int64_t target = walk.plane(grad_input.stride, slab, segment.channel);
      const bool fetches = walk.has(next);
      const int next_skew = walk.skew(next, segment.channel);
      for (int place = segment.begin + walk.lane; place < segment.end; place += walk.layout.lanes) {
        const Part part = walk.part(segment, place, skew);
        Data data;
        float gradients[width];
        if (!part.empty()) gradients_of(affine, place, data, gradients);
        const Part next_part = walk.part(segment, place, next_skew);
        if (fetches && !next_part.empty()) fetch(next, segment.channel, place, next_part);
        if (part.empty()) continue;
#pragma unroll
        for (int index = 0; index < width; ++index) {
          const float normalized = (value_of(data, index) - mean) * rstd;
          gradients[index] = affine.scale[0] * gradients[index] - (plain + normalized * projection);
        }
        grad_input.store(target, part, pack<Element, width>(gradients));
      }
    });
    copy_async_commit();
    slab = next;
  }
}

}  // namespace fastreg::cuda
