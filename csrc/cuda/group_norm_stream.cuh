// Group norm in three passes forward and five backward: the streaming kernels of batch norm with samples apart, for
// what is too large for the chip or lies irregularly (group_norm_plan.h). Each block leaves what it knows of a sample's
// channel or strip of channels; group_norm_finish.cuh merges that over a group's channels and parts.
//
// Traffic: forward two reads and one write of the activations, backward four reads and one write; 8 bytes for each
// channel of a sample and part. Nothing is added atomically.

#pragma once

#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"

namespace fastreg::cuda {

struct GroupStatisticsArguments {
  StatisticsArguments stream;
  GroupShape group;
};

struct GroupApplyArguments {
  ApplyArguments stream;
  GroupShape group;
};

struct GroupStreamSumsArguments {
  SumsArguments stream;
  GroupShape group;
};

struct GroupGradientArguments {
  GradientArguments stream;
  GroupShape group;
};

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    group_norm_statistics_kernel(const GroupStatisticsArguments arguments) {
  stream_statistics<Element, rows, width, true>(arguments.stream, arguments.group);
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    group_norm_apply_kernel(const GroupApplyArguments arguments) {
  stream_apply<Element, rows, width, true>(arguments.stream, arguments.group);
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    group_norm_sums_kernel(const GroupStreamSumsArguments arguments) {
  stream_sums<Element, rows, width, true>(arguments.stream, arguments.group);
}

template <class Element, bool rows, int width>
__global__ void __launch_bounds__(stream_threads, stream_minimum_blocks(width, rows))
    group_norm_gradient_kernel(const GroupGradientArguments arguments) {
  stream_gradient<Element, rows, width, true>(arguments.stream, arguments.group);
}

}  // namespace fastreg::cuda
