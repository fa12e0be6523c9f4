// Batch norm in training, forward, with its slabs on chip (batch_norm_resident_plan.h): the kernel for planes. That for
// rows is in batch_norm_resident_rows_forward.cuh.
//
// A group of blocks reads its channel once into shared memory. Each warp takes the mean of its part,
// then the squared deviations from that mean; the moments of the warps and then of the blocks are merged by Chan's
// update in the order of their numbers. From what is still held the output is computed, + residual, activation; as soon
// as a chunk has been read for that, the same place of the group's next channel is on its way into it.
//
// Traffic: one read and one write of the activations, one more read of a residual, a bit an element where signs are
// kept. Equal bits in every run. One thread a channel saves the statistics and updates the running ones.

#pragma once

#include "batch_norm_resident_planes.cuh"

namespace fastreg::cuda {

// The moments of what a warp holds of a channel.
template <class Element>
__device__ __forceinline__ Moments<float> moments_of_warp(PlaneWalk<Element> walk, const Chunk<Element>* held,
                                                          int64_t channel) {
  constexpr int width = full_width<Element>;
  // Of a chunk's elements first: what a thread adds up one after the other is shorter then.
  const auto sum_of = [&](const auto& term) {
    float total = 0.0f;
    for (walk.start(); walk.inside(); walk.advance()) {
      const Part part = walk.part(channel);
      if (part.empty()) continue;
      const Chunk<Element> data = held[walk.place];
      float sum = 0.0f;
      if (part.template whole<width>()) {
#pragma unroll
        for (int index = 0; index < width; ++index) sum += term(value_of(data, index));
      } else {
#pragma unroll
        for (int index = 0; index < width; ++index) sum += part.has(index) ? term(value_of(data, index)) : 0.0f;
      }
      total += sum;
    }
    return over_lanes(total, warp_lanes);
  };
  int elements = 0;
  for (walk.start(); walk.inside(); walk.advance()) {
    const Part part = walk.part(channel);
    elements += part.empty() ? 0 : part.end - part.first;
  }
  const float count = over_lanes(static_cast<float>(elements), warp_lanes);
  const float mean = mean_of(sum_of([](float value) { return value; }), count);
  return {count, mean, sum_of([&](float value) { return (value - mean) * (value - mean); })};
}

// Bytes of signs from the bits of one chunk each, which every thread of the block has left in shared memory: the byte
// that begins in a chunk may go on in the next.
template <class Element>
__device__ __forceinline__ void write_signs(PlaneWalk<Element> walk, const unsigned char* chunk_bits,
                                            unsigned char* signs, const ChannelShape& shape, int64_t channel) {
  constexpr int width = full_width<Element>;
  constexpr int chunks = 8 / width;
  for (walk.start(); walk.inside(); walk.advance()) {
    const Part part = walk.part(channel);
    const int byte = walk.column / chunks;
    if (walk.column % chunks != 0 || byte * 8 >= walk.spatial) continue;
    const int shift = byte * 8 - part.element;
    uint32_t bits = 0;
#pragma unroll
    for (int chunk = 0; chunk <= chunks; ++chunk) {
      if (chunk * width < 8 + shift && walk.column + chunk < walk.columns) {
        bits |= static_cast<uint32_t>(chunk_bits[walk.place + chunk]) << (chunk * width);
      }
    }
    const int64_t line = walk.sample * shape.channels + channel;
    signs[line * shape.sign_bytes_per_line() + byte] = static_cast<unsigned char>(bits >> shift);
  }
}

template <class Element>
__global__ void __launch_bounds__(resident_planes_threads)
    batch_norm_resident_planes_forward_kernel(const ResidentForwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using ChannelExchange = Exchange<Moments<float>>;
  FASTREG_SHARED(ChannelExchange, exchange);
  const BatchNormForwardArguments& norm = arguments.norm;
  const ResidentLayout& layout = arguments.layout;
  exchange.start(layout.cluster);
  PlaneWalk<Element> walk(layout, norm.shape, norm.input, norm.input_stride);
  const Planes<Element> input(norm.input, norm.input_stride, norm.shape);
  const Planes<Element> residual(norm.residual, norm.residual_stride, norm.shape);
  const Planes<Element> output(norm.output, norm.shape.dense_stride(), norm.shape);
  Chunk<Element>* const held = reinterpret_cast<Chunk<Element>*>(dynamic_shared());
  unsigned char* const chunk_bits = dynamic_shared() + layout.share * static_cast<int64_t>(sizeof(uint4));

  const auto fetch = [&](int64_t channel) {
    const Part part = walk.part(channel);
    if (channel < norm.shape.channels && !part.empty()) {
      input.fetch(held + walk.place, walk.plane(input.stride, channel), part);
    }
  };
  const int64_t step = layout.groups();
  int64_t channel = layout.group();
  for (walk.start(); walk.inside(); walk.advance()) fetch(channel);
  copy_async_commit();
  start_counters(layout);
  exchange.finish_start(layout.cluster);

  for (unsigned round = 0; channel < norm.shape.channels; channel += step, ++round) {
    const float weight = load_channel(norm.weight, channel, 1.0f);
    const float bias = load_channel(norm.bias, channel, 0.0f);
    copy_async_wait<0>();
    Moments<float> moments[] = {moments_of_warp(walk, held, channel)};
    over_channel(moments, layout, exchange, round);
    const float mean = moments[0].mean;
    const float rstd = reciprocal_deviation_of(moments[0].squares / moments[0].count, norm.eps);
    if (threadIdx.x == 0 && layout.rank() == 0) {
      finish_channel(norm, channel, mean, moments[0].squares);
    }
    Affine<1> affine;
    affine.set(0, mean, rstd, weight, bias);

    for (walk.start(); walk.inside(); walk.advance()) {
      const Part part = walk.part(channel);
      Chunk<Element> data{};
      Chunk<Element> added{};
      if (!part.empty()) {
        data = held[walk.place];
        if (norm.residual != nullptr) added = residual.load(walk.plane(residual.stride, channel), part);
      }
      fetch(channel + step);
      float values[width];
      arguments_of(affine, data, norm.residual != nullptr, added, values);
      if (norm.signs != nullptr) {
        const uint32_t bits = part.empty() ? 0u : sign_bits(norm.activation, values) & part.mask();
        chunk_bits[walk.place] = static_cast<unsigned char>(bits);
      }
      activate(norm.activation, values);
      if (!part.empty()) output.store(walk.plane(output.stride, channel), part, pack<Element, width>(values));
    }
    copy_async_commit();

    if (norm.signs != nullptr) {
      __syncthreads();
      write_signs(walk, chunk_bits, norm.signs, norm.shape, channel);
    }
  }
}

}  // namespace fastreg::cuda
