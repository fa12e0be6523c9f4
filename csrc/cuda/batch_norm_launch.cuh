// Launchers of batch norm's streaming kernels: raw pointers, no torch type.
//
// The kernels are in batch_norm_forward.cuh, batch_norm_backward.cuh and batch_norm_finish.cuh, how they are laid out
// in batch_norm_plan.h. Who calls plans first, since the plan says how much memory the partial results take.

#pragma once

#include "batch_norm_finish.cuh"
#include "batch_norm_stream.cuh"

namespace fastreg::cuda {

// --- plans -----------------------------------------------------------------------------------------------------------

struct PlannedStream {
  ChannelProblem problem;
  StreamPlan plan;

  // Of the partial results; a channel's only block needs none.
  int64_t partial_floats() const { return plan.parts > 1 ? 2 * plan.parts * problem.channels : 0; }
};

template <class Element>
PlannedStream plan_statistics(const BatchNormForwardArguments& norm, const DeviceTraits& device) {
  const ChannelProblem problem = channel_problem<Element>(norm.shape, {{norm.input, norm.input_stride}});
  return {problem, stream_plan(problem, device, stream_forward_packs(problem.width()), false)};
}

template <class Element>
PlannedStream plan_apply(const BatchNormForwardArguments& norm, const DeviceTraits& device) {
  const ChannelProblem problem = channel_problem<Element>(norm.shape, {{norm.input, norm.input_stride},
                                                                       {norm.residual, norm.residual_stride},
                                                                       {norm.output, norm.shape.dense_stride()}});
  return {problem, stream_plan(problem, device, stream_forward_packs(problem.width()), norm.signs != nullptr)};
}

// Of the gradients too.
template <class Element>
PlannedStream plan_sums(const BatchNormBackwardArguments& norm, const DeviceTraits& device) {
  const int64_t dense = norm.shape.dense_stride();
  const ChannelProblem problem = channel_problem<Element>(norm.shape, {{norm.grad_output, norm.grad_output_stride},
                                                                       {norm.input, norm.input_stride},
                                                                       {norm.residual, norm.residual_stride},
                                                                       {norm.grad_input, dense},
                                                                       {norm.grad_residual, dense}});
  return {problem, stream_plan(problem, device, stream_backward_packs(problem.width()), false)};
}

// --- launches --------------------------------------------------------------------------------------------------------

// `partials`: planned.partial_floats() of them. `moments`: mean and M2 are wanted, not the statistics.
template <class Element>
cudaError_t launch_statistics(const PlannedStream& planned, const BatchNormForwardArguments& norm, float* partials,
                              bool moments, cudaStream_t stream) {
  const StatisticsArguments arguments{norm, planned.plan, partials, moments};
  const cudaError_t error = with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<batch_norm_statistics_kernel<Element, rows, width>>(stream_launch(planned.plan, stream), arguments);
  });
  if (error != cudaSuccess || planned.plan.parts == 1) {
    return error;
  }
  return launch<batch_norm_merge_moments_kernel>(finish_launch(norm.shape.channels, stream), arguments);
}

template <class Element>
cudaError_t launch_apply(const BatchNormForwardArguments& norm, bool evaluation, const DeviceTraits& device,
                         cudaStream_t stream) {
  const PlannedStream planned = plan_apply<Element>(norm, device);
  const ApplyArguments arguments{norm, planned.plan, evaluation};
  return with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<batch_norm_apply_kernel<Element, rows, width>>(stream_launch(planned.plan, stream), arguments);
  });
}

// `sums`: (2, channels), or null where nobody wants them.
template <class Element>
cudaError_t launch_sums(const PlannedStream& planned, const BatchNormBackwardArguments& norm, float* partials,
                        float* sums, cudaStream_t stream) {
  const SumsArguments arguments{norm, planned.plan, partials, sums};
  const cudaError_t error = with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<batch_norm_sums_kernel<Element, rows, width>>(stream_launch(planned.plan, stream), arguments);
  });
  if (error != cudaSuccess || planned.plan.parts == 1) {
    return error;
  }
  return launch<batch_norm_merge_sums_kernel>(finish_launch(norm.shape.channels, stream), arguments);
}

// The sums of nothing: zeros, in the gradients of the parameters too.
inline cudaError_t launch_zero_sums(const BatchNormBackwardArguments& norm, float* sums, cudaStream_t stream) {
  return launch<batch_norm_merge_sums_kernel>(finish_launch(norm.shape.channels, stream),
                                              SumsArguments{norm, {}, nullptr, sums});
}

template <class Element>
cudaError_t launch_gradient(const BatchNormBackwardArguments& norm, const float* sums, float share,
                            const DeviceTraits& device, cudaStream_t stream) {
  const PlannedStream planned = plan_sums<Element>(norm, device);
  const GradientArguments arguments{norm, planned.plan, sums, share};
  return with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<batch_norm_gradient_kernel<Element, rows, width>>(stream_launch(planned.plan, stream), arguments);
  });
}

// --- all of backward -------------------------------------------------------------------------------------------------

// Whether dz as stored is dz to the bit, so that it can stand for grad_output behind the activation.
template <class Element>
constexpr bool stores_gradient_exactly(Activation activation) {
  return sizeof(Element) == 4 || activation == Activation::identity || activation == Activation::relu;
}

// What each kernel is asked for.
struct StreamBackward {
  BatchNormBackwardArguments sums;
  BatchNormBackwardArguments gradient;
  bool sums_up;
  bool corrects;  // the gradient kernel follows, with the sums
  PlannedStream planned;

  int64_t sums_floats() const { return corrects ? 2 * planned.problem.channels : 0; }
  int64_t workspace_floats() const { return sums_up ? sums_floats() + planned.partial_floats() : 0; }
};

template <class Element>
StreamBackward plan_stream_backward(const BatchNormBackwardArguments& norm, const DeviceTraits& device) {
  StreamBackward plan{norm, norm, false, norm.training && norm.grad_input != nullptr, {}};
  plan.sums_up = plan.corrects || norm.grad_weight != nullptr || norm.grad_bias != nullptr;
  if (plan.corrects) {
    plan.sums.grad_input = nullptr;
    if (norm.grad_residual != nullptr && stores_gradient_exactly<Element>(norm.activation.kind)) {
      plan.gradient.grad_output = norm.grad_residual;
      plan.gradient.grad_output_stride = norm.shape.dense_stride();
      plan.gradient.activation.kind = Activation::identity;
      plan.gradient.residual = nullptr;
      plan.gradient.signs = nullptr;
      plan.gradient.grad_residual = nullptr;
    } else {
      plan.sums.grad_residual = nullptr;
    }
  }
  plan.planned = plan_sums<Element>(plan.sums, device);
  return plan;
}

template <class Element>
cudaError_t launch_stream_backward(const StreamBackward& plan, float* workspace, const DeviceTraits& device,
                                   cudaStream_t stream) {
  if (!plan.sums_up) {
    return launch_gradient<Element>(plan.gradient, nullptr, 0.0f, device, stream);
  }
  float* const sums = plan.corrects ? workspace : nullptr;
  const cudaError_t error =
      launch_sums<Element>(plan.planned, plan.sums, workspace + plan.sums_floats(), sums, stream);
  if (error != cudaSuccess || !plan.corrects) {
    return error;
  }
  const float share = 1.0f / static_cast<float>(plan.gradient.shape.per_channel());
  return launch_gradient<Element>(plan.gradient, sums, share, device, stream);
}

}  // namespace fastreg::cuda
