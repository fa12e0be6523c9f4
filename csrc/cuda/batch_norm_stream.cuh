// What the launchers of streaming kernels ask of their tensors, and how they choose an instance.

#pragma once

#include <initializer_list>

#include "batch_norm.cuh"
#include "batch_norm_plan.h"
#include "launch.cuh"

namespace fastreg::cuda {

struct StridedTensor {
  const void* data;  // null: there is none
  int64_t stride;
};

template <class Element>
ChannelProblem channel_problem(const ChannelShape& shape, std::initializer_list<StridedTensor> tensors) {
  constexpr int64_t size = sizeof(Element);
  ChannelProblem problem{shape.samples, shape.channels, shape.spatial, size, shape.rows, false};
  problem.wide = problem.line_elements() % full_width<Element> == 0;
  for (const StridedTensor& tensor : tensors) {
    problem.wide =
        problem.wide && (tensor.data == nullptr || (aligned(tensor.data, 16) && tensor.stride * size % 16 == 0));
  }
  return problem;
}

// Calls visit.operator()<width, rows>().
template <class Element, class Visit>
cudaError_t with_packs(const ChannelProblem& problem, const Visit& visit) {
  constexpr int wide = full_width<Element>;
  if (problem.rows) {
    return problem.wide ? visit.template operator()<wide, true>() : visit.template operator()<1, true>();
  }
  return problem.wide ? visit.template operator()<wide, false>() : visit.template operator()<1, false>();
}

inline Launch stream_launch(const StreamPlan& plan, cudaStream_t stream) {
  return {plan.blocks, plan.threads, 1, 0, false, stream};
}

inline Launch finish_launch(int64_t channels, cudaStream_t stream) {
  return {finish_blocks(channels), finish_threads, 1, 0, false, stream};
}

}  // namespace fastreg::cuda
