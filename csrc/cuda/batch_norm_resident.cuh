// Launchers of batch norm with its slabs on chip: raw pointers, no torch type.
//
// The kernels are in batch_norm_resident_*.cuh, the choice of them and of their layout in batch_norm_resident_plan.h.
// What the plan cannot know, how many clusters a device runs at once, is asked here, before a caller relies on it.

#pragma once

#include "batch_norm_resident_backward.cuh"
#include "batch_norm_resident_forward.cuh"
#include "batch_norm_resident_rows_backward.cuh"
#include "batch_norm_resident_rows_forward.cuh"
#include "launch.cuh"

namespace fastreg::cuda {

// --- what the tensors allow ------------------------------------------------------------------------------------------

// The part of a problem that depends on where tensors lie: `add` each of them.
struct ResidentTensors {
  ResidentProblem& problem;
  uintptr_t first_address = 0;
  int64_t first_stride = 0;

  void add(const void* data, int64_t outer_stride) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    const int64_t stride = outer_stride * problem.element_size;
    if (problem.rows) {
      problem.regular = problem.regular && address % 16 == 0 && stride % 16 == 0;
      return;
    }
    if (first_address == 0) {
      first_address = address;
      first_stride = stride;
      const uintptr_t distances = address | static_cast<uintptr_t>(problem.samples > 1 ? stride : 0) |
                                  static_cast<uintptr_t>(problem.spatial * problem.element_size) | 16;
      problem.grain = static_cast<int>(distances & (~distances + 1));
    }
    problem.regular = problem.regular && (address - first_address) % 16 == 0 &&
                      (problem.samples == 1 || (stride - first_stride) % 16 == 0);
  }
};

template <class Element>
ResidentProblem resident_problem(const ChannelShape& shape, int tensors, bool signs) {
  const int size = static_cast<int>(sizeof(Element));
  return {shape.rows, shape.samples, shape.channels, shape.spatial, size, tensors, signs,
          !shape.rows || shape.channels * size % 16 == 0, 16};
}

// The workspace has the partial results, then the counters.
inline ResidentLayout layout_of(const ResidentPlan& plan, void* workspace) {
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  return {plan.slab_blocks,
          plan.columns,
          plan.share,
          plan.slabs,
          plan.kind == ResidentKind::cluster ? plan.slab_blocks : 1,
          reinterpret_cast<float*>(memory),
          reinterpret_cast<unsigned*>(memory + plan.partials_bytes())};
}

inline Launch resident_launch(const ResidentPlan& plan, cudaStream_t stream) {
  return {plan.blocks(), plan.threads, plan.kind == ResidentKind::cluster ? plan.slab_blocks : 1, plan.shared_bytes,
          plan.kind == ResidentKind::cooperative, stream};
}

// No more clusters than run at once: each of them goes from slab to slab.
template <auto kernel>
cudaError_t limit_clusters(ResidentPlan& plan) {
  int64_t resident = 0;
  const cudaError_t error = resident_clusters<kernel>(resident_launch(plan, nullptr), resident);
  plan.groups = smaller(plan.groups, resident);
  if (plan.groups == 0) plan = not_resident;
  return error;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class Element>
cudaError_t plan_resident_forward(const BatchNormForwardArguments& arguments, const DeviceTraits& device,
                                  ResidentPlan& plan) {
  ResidentProblem problem = resident_problem<Element>(arguments.shape, 1, arguments.signs != nullptr);
  ResidentTensors tensors{problem};
  tensors.add(arguments.input, arguments.input_stride);
  tensors.add(arguments.output, arguments.shape.dense_stride());
  if (arguments.residual != nullptr) tensors.add(arguments.residual, arguments.residual_stride);
  plan = resident_plan(problem, device);
  return plan.kind == ResidentKind::cluster ? limit_clusters<batch_norm_resident_planes_forward_kernel<Element>>(plan)
                                            : cudaSuccess;
}

template <class Element>
cudaError_t launch_resident_forward(const ResidentPlan& plan, const BatchNormForwardArguments& arguments,
                                    void* workspace, cudaStream_t stream) {
  const Launch shape = resident_launch(plan, stream);
  const ResidentForwardArguments all{arguments, layout_of(plan, workspace)};
  return arguments.shape.rows ? launch<batch_norm_resident_rows_forward_kernel<Element>>(shape, all)
                              : launch<batch_norm_resident_planes_forward_kernel<Element>>(shape, all);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <class Element>
cudaError_t plan_resident_backward(const BatchNormBackwardArguments& arguments, const DeviceTraits& device,
                                   ResidentPlan& plan) {
  const int64_t dense = arguments.shape.dense_stride();
  ResidentProblem problem = resident_problem<Element>(arguments.shape, arguments.residual != nullptr ? 3 : 2, false);
  ResidentTensors tensors{problem};
  tensors.add(arguments.input, arguments.input_stride);
  tensors.add(arguments.grad_output, arguments.grad_output_stride);
  tensors.add(arguments.grad_input, dense);
  if (arguments.residual != nullptr) tensors.add(arguments.residual, arguments.residual_stride);
  if (arguments.grad_residual != nullptr) tensors.add(arguments.grad_residual, dense);
  plan = resident_plan(problem, device);
  return plan.kind == ResidentKind::cluster ? limit_clusters<batch_norm_resident_planes_backward_kernel<Element>>(plan)
                                            : cudaSuccess;
}

template <class Element>
cudaError_t launch_resident_backward(const ResidentPlan& plan, const BatchNormBackwardArguments& arguments,
                                     void* workspace, cudaStream_t stream) {
  const Launch shape = resident_launch(plan, stream);
  const ResidentBackwardArguments all{arguments, layout_of(plan, workspace)};
  return arguments.shape.rows ? launch<batch_norm_resident_rows_backward_kernel<Element>>(shape, all)
                              : launch<batch_norm_resident_planes_backward_kernel<Element>>(shape, all);
}

}  // namespace fastreg::cuda
