// Batch norm in training, backward, with its slabs on chip: the kernel for rows (batch_norm_resident_rows.cuh); the
// formula is in batch_norm_resident_backward.cuh.
//
// A group of blocks reads input and grad_output of its strip of channels once into shared memory, and a residual where
// z has to be computed from it; sums up over threads, warps and blocks, and computes the gradients from what is still
// held, while the group's next strip arrives in the places that have been read.
//
// Traffic: two reads and one write of the activations, one more of each for a residual. Signs are read twice, a bit an
// element, the second time from a cache. Equal bits in every run.

#pragma once

#include "batch_norm_resident_rows.cuh"

namespace fastreg::cuda {

struct BackwardChannel {
  static constexpr int mean = 0;
  static constexpr int scale = 1;
  static constexpr int bias = 2;
  static constexpr int mean_plain = 3;       // of dz
  static constexpr int mean_projection = 4;  // of dz * xhat, times rstd
  static constexpr int names = 5;
};

// Leaves the sums of dz * (input - mean) and of dz over this warp's rows, of its lanes' channels, in shared memory.
template <int width, class Walk>
__device__ __forceinline__ void leave_sums(const Walk& walk, const float (&projection)[width],
                                           const float (&plain)[width], Sums* values) {
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
#pragma unroll
  for (int index = 0; index < width; ++index) {
    const Sums sums{over_rows(projection[index], walk.lanes), over_rows(plain[index], walk.lanes)};
    if (lane < walk.columns) values[(warp * walk.columns + lane) * width + index] = sums;
  }
}

template <class Element>
__global__ void __launch_bounds__(resident_rows_backward_threads, 1)
    batch_norm_resident_rows_backward_kernel(const ResidentBackwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;
  using Shared = StripShared<Sums, BackwardChannel::names>;
  FASTREG_SHARED(Shared, shared);
  const BatchNormBackwardArguments& norm = arguments.norm;
  const ResidentLayout& layout = arguments.layout;
  const RowWalk<Element> walk(layout, norm.shape);
  const bool has_residual = norm.residual != nullptr;
  const bool has_signs = norm.signs != nullptr;
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = walk.columns * width;
  const int share = static_cast<int>(layout.share) * walk.columns;
  Data* const held = reinterpret_cast<Data*>(dynamic_shared());

  const auto fetch = [&](int64_t strip, int row) {
    if (strip < layout.slabs && walk.has(strip)) {
      const int64_t line = walk.row_of_tensor(row);
      const int64_t channel = walk.channel(strip);
      Data* const place = held + walk.place(row);
      copy_async(place, row_address<Element>(norm.input, norm.input_stride, line, channel));
      copy_async(place + share, row_address<Element>(norm.grad_output, norm.grad_output_stride, line, channel));
      if (has_residual) {
        copy_async(place + 2 * share, row_address<Element>(norm.residual, norm.residual_stride, line, channel));
      }
    }
  };
  Affine<width> affine{};
  // dz of the thread's chunk of a row, and the input it was computed with.
  const auto gradients_of = [&](int64_t channel, int row, Data& data, float(&gradients)[width]) {
    const Data* const place = held + walk.place(row);
    data = *place;
    const Data added = has_residual ? place[2 * share] : Data{};
    const uint32_t bits = has_signs ? load_signs(norm.signs, walk.row_of_tensor(row), norm.shape.sign_bytes_per_line(),
                                                 channel)
                                    : 0u;
    argument_gradients(norm.activation, affine, place[share], data, has_residual, added, has_signs, bits, gradients);
  };

  const int64_t step = layout.groups();
  int64_t strip = layout.group();
  for (int row = walk.start; row < walk.count; row += walk.step) fetch(strip, row);
  copy_async_commit();
  start_counters(layout);

  for (unsigned round = 0; strip < layout.slabs; strip += step, ++round) {
    const bool has = walk.has(strip);
    const int64_t channel = walk.channel(strip);
    const int64_t own = strip * channels + thread;
    const bool has_own = thread < channels && own < norm.shape.channels;
    float rstd = 0.0f;
    if (has_own) {
      rstd = __ldg(norm.rstd + own);
      shared.channel[BackwardChannel::mean][thread] = __ldg(norm.mean + own);
      shared.channel[BackwardChannel::scale][thread] = rstd * load_channel(norm.weight, own, 1.0f);
      shared.channel[BackwardChannel::bias][thread] = load_channel(norm.bias, own, 0.0f);
    }
    copy_async_wait<0>();
    __syncthreads();
    float projection[width] = {};
    float plain[width] = {};
    if (has) {
      shared.get(BackwardChannel::mean, walk.column, affine.mean);
      shared.get(BackwardChannel::scale, walk.column, affine.scale);
      shared.get(BackwardChannel::bias, walk.column, affine.bias);
      for (int row = walk.start; row < walk.count; row += walk.step) {
        Data data;
        float gradients[width];
        gradients_of(channel, row, data, gradients);
#pragma unroll
        for (int index = 0; index < width; ++index) {
          plain[index] += gradients[index];
          projection[index] += gradients[index] * (value_of(data, index) - affine.mean[index]);
        }
      }
    }
    leave_sums(walk, projection, plain, shared.values);
    const Sums sums = over_group(shared, layout, channels, walk.warps(), round);
    if (has_own) {
      const float count = static_cast<float>(norm.shape.per_channel());
      const float projected = sums.projection * rstd;
      shared.channel[BackwardChannel::mean_plain][thread] = mean_of(sums.plain, count);
      shared.channel[BackwardChannel::mean_projection][thread] = mean_of(projected, count) * rstd;
      if (walk.first_row == 0) {
        if (norm.grad_weight != nullptr) store_parameter(norm.grad_weight, norm.weight.dtype, own, projected);
        if (norm.grad_bias != nullptr) store_parameter(norm.grad_bias, norm.bias.dtype, own, sums.plain);
      }
    }
    __syncthreads();
    for (int row = walk.start; row < walk.count; row += walk.step) {
      Data data;
      float gradients[width];
      if (has) gradients_of(channel, row, data, gradients);
      fetch(strip + step, row);
      if (!has) continue;
      const int64_t place = walk.row_of_tensor(row) * norm.shape.channels + channel;
      if (norm.grad_residual != nullptr) {
        pack<Element, width>(gradients).store(static_cast<Element*>(norm.grad_residual) + place);
      }
      shared.get(BackwardChannel::mean_plain, walk.column, plain);
      shared.get(BackwardChannel::mean_projection, walk.column, projection);
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const float difference = value_of(data, index) - affine.mean[index];
        gradients[index] = affine.scale[index] * (gradients[index] - plain[index] - difference * projection[index]);
      }
      pack<Element, width>(gradients).store(static_cast<Element*>(norm.grad_input) + place);
    }
    copy_async_commit();
  }
}

}  // namespace fastreg::cuda
