// Group norm backward with its samples on chip: the kernel for rows (group_norm_rows.cuh); the formula is in
// group_norm.cuh.
//
// A block, or blocks that meet, read input and grad_output of a sample once into shared memory, whole rows. Each thread
// sums up dz and dz * xhat of its channels; what a block knows of a channel is stored for the parameters' gradients, if
// those are wanted, and times the channel's weight is summed up for the group. From what is still held the gradients
// are computed, while the next sample arrives in the places that have been read.
//
// Traffic: two reads and one write of the activations; 8 bytes for each channel, sample and block that shares it. Equal
// bits in every run.

#pragma once

#include "group_norm_rows.cuh"

namespace fastreg::cuda {

template <class Element>
__global__ void __launch_bounds__(group_rows_backward_threads, 1)
    group_norm_rows_backward_kernel(const GroupBackwardArguments arguments) {
  constexpr int width = full_width<Element>;
  using Data = Chunk<Element>;
  const GroupNormBackwardArguments& norm = arguments.norm;
  const GroupSums& stored = arguments.sums;
  const GroupLayout& layout = arguments.layout;
  const GroupRows<Element> rows(layout, norm.shape);
  const int channels = static_cast<int>(norm.shape.channels);
  const int groups = static_cast<int>(norm.group.groups);
  const int group_channels = static_cast<int>(norm.group.channels);
  const int share = static_cast<int>(layout.blocks.share) * rows.chunks;
  Data* const held = reinterpret_cast<Data*>(dynamic_shared());
  const GroupTable table(held + 2 * share, channels, rows.step, groups);
  const Element* const input = static_cast<const Element*>(norm.input);
  const Element* const grad_output = static_cast<const Element*>(norm.grad_output);
  Element* const grad_input = static_cast<Element*>(norm.grad_input);

  const auto fetch = [&](int64_t sample, int row) {
    if (sample < norm.shape.samples) {
      Data* const place = held + rows.place(row);
      copy_async(place, input + rows.offset(norm.shape, norm.input_stride, sample, row));
      copy_async(place + share, grad_output + rows.offset(norm.shape, norm.grad_output_stride, sample, row));
    }
  };
  Affine<width> affine{};
  // dz of the thread's chunk of a row, and the input it was computed with.
  const auto gradients_of = [&](int row, Data& data, float(&gradients)[width]) {
    const Data* const place = held + rows.place(row);
    data = *place;
    argument_gradients(norm.activation, affine, place[share], data, false, data, false, 0u, gradients);
  };

  const int64_t step = layout.blocks.groups();
  int64_t sample = layout.blocks.group();
  for (int row = rows.start; row < rows.count; row += rows.step) fetch(sample, row);
  copy_async_commit();
  start_counters(layout.blocks);

  for (unsigned round = 0; sample < norm.shape.samples; sample += step, ++round) {
    const float* const rstd = norm.rstd + sample * groups;
    copy_async_wait<0>();
    if (rows.start < rows.count) {
      float plain[width] = {};
      float projection[width] = {};
      int of_channel[width];
      groups_of(rows.channel(), group_channels, of_channel);
#pragma unroll
      for (int index = 0; index < width; ++index) {
        const int64_t channel = rows.channel() + index;
        affine.set(index, __ldg(norm.mean + sample * groups + of_channel[index]), __ldg(rstd + of_channel[index]),
                   load_channel(norm.weight, channel, 1.0f), load_channel(norm.bias, channel, 0.0f));
      }
      for (int row = rows.start; row < rows.count; row += rows.step) {
        Data data;
        float gradients[width];
        gradients_of(row, data, gradients);
#pragma unroll
        for (int index = 0; index < width; ++index) {
          plain[index] += gradients[index];
          projection[index] += gradients[index] * (value_of(data, index) - affine.mean[index]);
        }
      }
      const int place = table.place(rows.start, rows.channel());
      GroupTable::put(table.first + place, plain);
      GroupTable::put(table.second + place, projection);
    }
    __syncthreads();

    // By one thread a channel: the block's sums, in the first row of the table those that count for the group.
    for (int channel = static_cast<int>(threadIdx.x); channel < channels; channel += static_cast<int>(blockDim.x)) {
      float plain = table.first[channel];
      float projection = table.second[channel];
      for (int row = 1; row < rows.down(); ++row) {
        plain += table.first[table.place(row, channel)];
        projection += table.second[table.place(row, channel)];
      }
      const int group = channel / group_channels;
      projection *= __ldg(rstd + group);
      if (stored.data != nullptr) {
        stored.store(sample * groups + group,
                     layout.blocks.rank() * group_channels + channel - group * group_channels, plain, projection);
      }
      const float weight = load_channel(norm.weight, channel, 1.0f);
      table.first[channel] = weight * plain;
      table.second[channel] = weight * projection;
    }
    __syncthreads();
    const auto own = [&](int group, int lane, int lanes) {
      return together_of<Sums>(group_channels, lane, lanes, [&](int index) {
        const int channel = group * group_channels + index;
        return Sums{table.second[channel], table.first[channel]};
      });
    };
    over_sample<Sums>(layout, groups, round, own, [&](int group, const Sums& sums) {
      const float count = static_cast<float>(norm.per_group());
      table.of_group[0][group] = __ldg(rstd + group) * mean_of(sums.plain, count);
      table.of_group[1][group] = __ldg(rstd + group) * mean_of(sums.projection, count) * __ldg(rstd + group);
    });
    __syncthreads();

    if (rows.start < rows.count) {
      float constant[width];
      float multiple[width];
      int of_channel[width];
      groups_of(rows.channel(), group_channels, of_channel);
#pragma unroll
      for (int index = 0; index < width; ++index) {
        constant[index] = table.of_group[0][of_channel[index]];
        multiple[index] = table.of_group[1][of_channel[index]];
      }
      for (int row = rows.start; row < rows.count; row += rows.step) {
        Data data;
        float gradients[width];
        gradients_of(row, data, gradients);
        fetch(sample + step, row);
#pragma unroll
        for (int index = 0; index < width; ++index) {
          const float centred = value_of(data, index) - affine.mean[index];
          gradients[index] = affine.scale[index] * gradients[index] - (constant[index] + centred * multiple[index]);
        }
        pack<Element, width>(gradients).store(grad_input + rows.offset(norm.shape, channels, sample, row));
      }
    }
    copy_async_commit();
  }
}

}  // namespace fastreg::cuda
