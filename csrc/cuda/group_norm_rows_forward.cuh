// Group norm forward with its samples on chip: the kernel for rows (group_norm_rows.cuh).
//
// A block, or blocks that meet, read a sample once into shared memory, whole rows. Each thread takes the means of its
// channels, then the squared deviations from those; the moments of a group's channels, rows and blocks are merged by
// Chan's update. From what is still held the output is computed; as soon as a chunk has been read for that, the same
// row of the next sample is on its way into its place.
//
// Traffic: one read and one write of the activations. Equal bits in every run.

#pragma once

#include "group_norm_rows.cuh"

namespace fastreg::cuda {

// Leaves the means of a thread's channels, and the squared deviations from them, in shared memory.
template <class Element>
__device__ __forceinline__ void leave_group_moments(const GroupRows<Element>& rows, const Chunk<Element>* held,
                                                    const GroupTable& table) {
  constexpr int width = full_width<Element>;
  if (rows.start >= rows.count) {
    return;
  }
  float mean[width] = {};
  float squares[width] = {};
  for (int row = rows.start; row < rows.count; row += rows.step) {
    const Chunk<Element> data = held[rows.place(row)];
#pragma unroll
    for (int index = 0; index < width; ++index) mean[index] += value_of(data, index);
  }
  const float share = 1.0f / static_cast<float>(rows.rows_from(rows.start));
#pragma unroll
  for (int index = 0; index < width; ++index) mean[index] *= share;
  for (int row = rows.start; row < rows.count; row += rows.step) {
    const Chunk<Element> data = held[rows.place(row)];
#pragma unroll
    for (int index = 0; index < width; ++index) {
      const float difference = value_of(data, index) - mean[index];
      squares[index] += difference * difference;
    }
  }
  const int place = table.place(rows.start, rows.channel());
  GroupTable::put(table.first + place, mean);
  GroupTable::put(table.second + place, squares);
}

template <class Element>
__global__ void __launch_bounds__(group_rows_threads, 1)
    group_norm_rows_forward_kernel(const GroupForwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;
  const GroupNormForwardArguments& norm = arguments.norm;
  const GroupLayout& layout = arguments.layout;
  const GroupRows<Element> rows(layout, norm.shape);
  const int channels = static_cast<int>(norm.shape.channels);
  const int groups = static_cast<int>(norm.group.groups);
  const int group_channels = static_cast<int>(norm.group.channels);
  Data* const held = reinterpret_cast<Data*>(dynamic_shared());
  const GroupTable table(held + layout.blocks.share * rows.chunks, channels, rows.step, groups);
  const Element* const input = static_cast<const Element*>(norm.input);
  Element* const output = static_cast<Element*>(norm.output);

  const auto fetch = [&](int64_t sample, int row) {
    if (sample < norm.shape.samples) {
      copy_async(held + rows.place(row), input + rows.offset(norm.shape, norm.input_stride, sample, row));
    }
  };
  const int64_t step = layout.blocks.groups();
  int64_t sample = layout.blocks.group();
  for (int row = rows.start; row < rows.count; row += rows.step) fetch(sample, row);
  copy_async_commit();
  start_counters(layout.blocks);

  for (unsigned round = 0; sample < norm.shape.samples; sample += step, ++round) {
    copy_async_wait<0>();
    leave_group_moments(rows, held, table);
    __syncthreads();
    const auto own = [&](int group, int lane, int lanes) {
      return together_of<Moments<float>>(group_channels * rows.down(), lane, lanes, [&](int index) {
        const int row = index / group_channels;
        const int place = table.place(row, group * group_channels + index - row * group_channels);
        return Moments<float>{static_cast<float>(rows.rows_from(row)), table.first[place], table.second[place]};
      });
    };
    over_sample<Moments<float>>(layout, groups, round, own, [&](int group, const Moments<float>& moments) {
      table.of_group[0][group] = moments.mean;
      table.of_group[1][group] = layout.blocks.rank() == 0
                                     ? norm.finish(sample * groups + group, moments)
                                     : reciprocal_deviation_of(moments.squares / moments.count, norm.eps);
    });
    __syncthreads();

    Affine<width> affine{};
    if (rows.start < rows.count) {
      int of_channel[width];
      groups_of(rows.channel(), group_channels, of_channel);
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const int64_t channel = rows.channel() + index;
        affine.set(index, table.of_group[0][of_channel[index]], table.of_group[1][of_channel[index]],
                   load_channel(norm.weight, channel, 1.0f), load_channel(norm.bias, channel, 0.0f));
      }
    }
    for (int row = rows.start; row < rows.count; row += rows.step) {
      const Data data = held[rows.place(row)];
      fetch(sample + step, row);
      float values[width];
      arguments_of(affine, data, false, data, values);
      activate(norm.activation, values);
      pack<Element, width>(values).store(output + rows.offset(norm.shape, channels, sample, row));
    }
    copy_async_commit();
  }
}

}  // namespace fastreg::cuda
