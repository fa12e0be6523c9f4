// Batch norm in training, backward, with its slabs on chip (batch_norm_resident_plan.h): the kernel for planes. That
// for rows is in batch_norm_resident_rows_backward.cuh. With dz = grad_output * activation'(z), xhat = (input - mean) *
// rstd and n elements a channel:
//
//   grad_bias = sum of dz, grad_weight = sum of dz * xhat, grad_residual = dz
//   grad_input = scale * (dz - grad_bias / n - xhat * grad_weight / n)
//
// A group of blocks reads input and grad_output of its channel once into shared memory, and a
// residual where z has to be computed from it; sums up, and computes the gradients from what is still held, while the
// group's next channel arrives in the places that have been read. dz is computed twice, not kept: rounded to the
// tensors' dtype it would be too coarse.
//
// Traffic: two reads and one write of the activations, one more of each for a residual. Signs are read twice, a bit an
// element, the second time from a cache. Sums are added in the order of warps and blocks: equal bits in every run.

#pragma once

#include "batch_norm_resident_planes.cuh"

namespace fastreg::cuda {

// The bits of a chunk's elements, of which a plane's first chunk may have some before the plane and its last some
// beyond.
template <int width>
__device__ __forceinline__ uint32_t load_part_signs(const unsigned char* signs, int64_t line, int64_t bytes_per_line,
                                                    const Part& part) {
  const unsigned char* const bytes = signs + line * bytes_per_line;
  // Of the first element that belongs to the plane, and of the last.
  const int first = (part.element + part.first) / 8;
  const int last = (part.element + part.end - 1) / 8;
  uint32_t bits = static_cast<uint32_t>(__ldg(bytes + first)) >> ((part.element + part.first) % 8);
  if (last != first) bits |= static_cast<uint32_t>(__ldg(bytes + last)) << (8 - (part.element + part.first) % 8);
  return bits << part.first;
}

template <class Element>
__global__ void __launch_bounds__(resident_planes_backward_threads, 1)
    batch_norm_resident_planes_backward_kernel(const ResidentBackwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;
  FASTREG_SHARED(Exchange<Sums>, exchange);
  const BatchNormBackwardArguments& norm = arguments.norm;
  const ResidentLayout& layout = arguments.layout;
  const int share = static_cast<int>(layout.share);
  exchange.start(layout.cluster);
  PlaneWalk<Element> walk(layout, norm.shape, norm.input, norm.input_stride);
  const Planes<Element> input(norm.input, norm.input_stride, norm.shape);
  const Planes<Element> grad_output(norm.grad_output, norm.grad_output_stride, norm.shape);
  const Planes<Element> residual(norm.residual, norm.residual_stride, norm.shape);
  const Planes<Element> grad_input(norm.grad_input, norm.shape.dense_stride(), norm.shape);
  const Planes<Element> grad_residual(norm.grad_residual, norm.shape.dense_stride(), norm.shape);
  const bool has_residual = norm.residual != nullptr;
  const bool has_signs = norm.signs != nullptr;
  Data* const held = reinterpret_cast<Data*>(dynamic_shared());

  const auto fetch = [&](int64_t channel) {
    const Part part = walk.part(channel);
    if (channel < norm.shape.channels && !part.empty()) {
      input.fetch(held + walk.place, walk.plane(input.stride, channel), part);
      grad_output.fetch(held + share + walk.place, walk.plane(grad_output.stride, channel), part);
      if (has_residual) residual.fetch(held + 2 * share + walk.place, walk.plane(residual.stride, channel), part);
    }
  };
  Affine<1> affine;
  // dz of the thread's chunk of a channel, and the input it was computed with.
  const auto gradients_of = [&](int64_t channel, const Part& part, Data& data, float(&gradients)[width]) {
    data = held[walk.place];
    const Data gradient = held[share + walk.place];
    const Data added = has_residual ? held[2 * share + walk.place] : Data{};
    const int64_t line = walk.sample * norm.shape.channels + channel;
    const uint32_t bits =
        has_signs ? load_part_signs<width>(norm.signs, line, norm.shape.sign_bytes_per_line(), part) : 0u;
    argument_gradients(norm.activation, affine, gradient, data, has_residual, added, has_signs, bits, gradients);
  };

  const int64_t step = layout.groups();
  int64_t channel = layout.group();
  for (walk.start(); walk.inside(); walk.advance()) fetch(channel);
  copy_async_commit();
  start_counters(layout);
  exchange.finish_start(layout.cluster);

  for (unsigned round = 0; channel < norm.shape.channels; channel += step, ++round) {
    const float mean = __ldg(norm.mean + channel);
    const float rstd = __ldg(norm.rstd + channel);
    affine.set(0, mean, rstd, load_channel(norm.weight, channel, 1.0f), load_channel(norm.bias, channel, 0.0f));
    copy_async_wait<0>();

    Sums sums[1] = {};
    for (walk.start(); walk.inside(); walk.advance()) {
      const Part part = walk.part(channel);
      if (part.empty()) continue;
      Data data;
      float gradients[width];
      gradients_of(channel, part, data, gradients);
      // Of a chunk's elements first: what a thread adds up one after the other is shorter then.
      Sums of_chunk{};
#pragma unroll
      for (int index = 0; index < width; ++index) {
        if (part.has(index)) {
          of_chunk.plain += gradients[index];
          of_chunk.projection += gradients[index] * (value_of(data, index) - mean);
        }
      }
      sums[0].plain += of_chunk.plain;
      sums[0].projection += of_chunk.projection;
    }
    sums[0] = over_lanes(sums[0], warp_lanes);
    over_channel(sums, layout, exchange, round);
    const float plain = sums[0].plain;
    const float projection = sums[0].projection * rstd;
    if (threadIdx.x == 0 && layout.rank() == 0) {
      if (norm.grad_weight != nullptr) store_parameter(norm.grad_weight, norm.weight.dtype, channel, projection);
      if (norm.grad_bias != nullptr) store_parameter(norm.grad_bias, norm.bias.dtype, channel, plain);
    }

    const float count = static_cast<float>(norm.shape.per_channel());
    const float mean_plain = mean_of(plain, count);
    const float mean_projection = mean_of(projection, count);
    for (walk.start(); walk.inside(); walk.advance()) {
      const Part part = walk.part(channel);
      Data data;
      float gradients[width];
      if (!part.empty()) gradients_of(channel, part, data, gradients);
      fetch(channel + step);
      if (part.empty()) continue;
      if (norm.grad_residual != nullptr) {
        grad_residual.store(walk.plane(grad_residual.stride, channel), part, pack<Element, width>(gradients));
      }
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const float normalized = (value_of(data, index) - mean) * rstd;
        gradients[index] = affine.scale[0] * (gradients[index] - mean_plain - normalized * mean_projection);
      }
      grad_input.store(walk.plane(grad_input.stride, channel), part, pack<Element, width>(gradients));
    }
    copy_async_commit();
  }
}

}  // namespace fastreg::cuda
