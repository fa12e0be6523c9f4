// Batch norm in training, forward, with its slabs on chip: the kernel for rows (batch_norm_resident_rows.cuh).
//
// A group of blocks reads its strip of channels once into shared memory. Each thread adds up its channels, each warp
// takes the means of its rows, then the squared deviations from those; moments are merged by Chan's update over warps
// and blocks. From what is still held the output is computed, + residual, activation; as soon as a chunk has been read
// for that, the same rows of the group's next strip are on their way into its place.
//
// Traffic: one read and one write of the activations, one more read of a residual, a bit an element where signs are
// kept. Equal bits in every run. The first block of a group saves the statistics and updates the running ones.

#pragma once

#include "batch_norm_resident_rows.cuh"

namespace fastreg::cuda {

struct ForwardChannel {
  static constexpr int mean = 0;
  static constexpr int scale = 1;
  static constexpr int bias = 2;
  static constexpr int names = 3;
};

// Leaves the moments of this warp's rows of its lanes' channels in shared memory.
template <class Element>
__device__ __forceinline__ void leave_moments(const RowWalk<Element>& walk, const Chunk<Element>* held, bool has,
                                              Moments<float>* values) {
  constexpr int width = full_width<Element>;
  float sums[width] = {};
  float mean[width];
  float rows = 0.0f;
  if (has) {
    for (int row = walk.start; row < walk.count; row += walk.step) {
      const Chunk<Element> data = held[walk.place(row)];
#pragma unroll
      for (int index = 0; index < width; ++index) sums[index] += value_of(data, index);
      rows += 1.0f;
    }
  }
  const float count = over_rows(rows, walk.lanes);
#pragma unroll
  for (int index = 0; index < width; ++index) {
    mean[index] = mean_of(over_rows(sums[index], walk.lanes), count);
    sums[index] = 0.0f;
  }
  if (has) {
    for (int row = walk.start; row < walk.count; row += walk.step) {
      const Chunk<Element> data = held[walk.place(row)];
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const float difference = value_of(data, index) - mean[index];
        sums[index] += difference * difference;
      }
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
#pragma unroll
  for (int index = 0; index < width; ++index) {
    const float squares = over_rows(sums[index], walk.lanes);
    if (lane < walk.columns) {
      values[(warp * walk.columns + lane) * width + index] = {count, mean[index], squares};
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(resident_rows_threads, 1)
    batch_norm_resident_rows_forward_kernel(const ResidentForwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;
  using Shared = StripShared<Moments<float>, ForwardChannel::names>;
  FASTREG_SHARED(Shared, shared);
  const BatchNormForwardArguments& norm = arguments.norm;
  const ResidentLayout& layout = arguments.layout;
  const RowWalk<Element> walk(layout, norm.shape);
  Data* const held = reinterpret_cast<Data*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);

  const auto fetch = [&](int64_t strip, int row) {
    if (strip < layout.slabs && walk.has(strip)) {
      copy_async(held + walk.place(row), row_address<Element>(norm.input, norm.input_stride, walk.row_of_tensor(row),
                                                              walk.channel(strip)));
    }
  };
  const int64_t step = layout.groups();
  int64_t strip = layout.group();
  for (int row = walk.start; row < walk.count; row += walk.step) fetch(strip, row);
  copy_async_commit();
  start_counters(layout);

  for (unsigned round = 0; strip < layout.slabs; strip += step, ++round) {
    const bool has = walk.has(strip);
    copy_async_wait<0>();
    leave_moments(walk, held, has, shared.values);
    const Moments<float> moments = over_group(shared, layout, walk.columns * width, walk.warps(), round);
    const int64_t own = strip * walk.columns * width + thread;
    if (thread < walk.columns * width && own < norm.shape.channels) {
      const float rstd = walk.first_row == 0 ? finish_channel(norm, own, moments.mean, moments.squares)
                                             : reciprocal_deviation_of(moments.squares / moments.count, norm.eps);
      shared.channel[ForwardChannel::mean][thread] = moments.mean;
      shared.channel[ForwardChannel::scale][thread] = rstd * load_channel(norm.weight, own, 1.0f);
      shared.channel[ForwardChannel::bias][thread] = load_channel(norm.bias, own, 0.0f);
    }
    __syncthreads();
    Affine<width> affine;
    if (has) {
      shared.get(ForwardChannel::mean, walk.column, affine.mean);
      shared.get(ForwardChannel::scale, walk.column, affine.scale);
      shared.get(ForwardChannel::bias, walk.column, affine.bias);
    }

    // All lanes go round equally often: together they make bytes of their signs.
    const int64_t channel = walk.channel(strip);
    for (int first = 0; first < walk.count; first += walk.step) {
      const int row = first + walk.start;
      const bool active = has && row < walk.count;
      const int64_t line = walk.row_of_tensor(row);
      Data data{};
      Data added{};
      if (active) {
        data = held[walk.place(row)];
        if (norm.residual != nullptr) {
          added = Data::load(row_address<Element>(norm.residual, norm.residual_stride, line, channel));
        }
      }
      if (row < walk.count) fetch(strip + step, row);
      float values[width];
      arguments_of(affine, data, norm.residual != nullptr, added, values);
      if (norm.signs != nullptr) {
        store_signs<width>(norm.signs, line, norm.shape.sign_bytes_per_line(), channel, active,
                           sign_bits(norm.activation, values));
      }
      activate(norm.activation, values);
      if (active) {
        pack<Element, width>(values).store(static_cast<Element*>(norm.output) + line * norm.shape.channels + channel);
      }
    }
    copy_async_commit();
  }
}

}  // namespace fastreg::cuda
