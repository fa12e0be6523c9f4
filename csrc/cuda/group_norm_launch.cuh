// Launchers of group norm: raw pointers, no torch type.
//
// The choice of kernels and of their layout is in group_norm_plan.h. Who calls plans first, since the plan says how
// much memory partial results and sums take.

#pragma once

#include "batch_norm_resident.cuh"
#include "batch_norm_stream.cuh"
#include "group_norm_finish.cuh"
#include "group_norm_planes_backward.cuh"
#include "group_norm_planes_forward.cuh"
#include "group_norm_rows_backward.cuh"
#include "group_norm_rows_forward.cuh"
#include "group_norm_stream.cuh"

namespace fastreg::cuda {

// --- plans -----------------------------------------------------------------------------------------------------------

// What a launch does: with its slabs on chip, or streaming.
struct PlannedGroups {
  GroupPlan on_chip;
  ChannelProblem problem;  // streaming: of one sample
  StreamPlan stream;
  GroupPieces pieces;
  int64_t statistics;  // samples * groups

  bool streams() const { return on_chip.resident.kind == ResidentKind::none; }
  // Two of each piece.
  int64_t piece_floats() const { return 2 * statistics * pieces.slots; }
};

// Calls visit<aligned>(), for the kernels of planes.
template <class Visit>
cudaError_t with_alignment(const GroupPlan& plan, const Visit& visit) {
  return plan.aligned ? visit.template operator()<true>() : visit.template operator()<false>();
}

template <class Element>
GroupProblem group_problem(const ChannelShape& shape, const GroupShape& group, int tensors,
                           std::initializer_list<StridedTensor> all) {
  ResidentProblem problem = resident_problem<Element>(shape, tensors, false);
  ResidentTensors checked{problem};
  for (const StridedTensor& tensor : all) checked.add(tensor.data, tensor.stride);
  return {shape.rows,           shape.samples, shape.channels,  shape.spatial, group.groups,
          problem.element_size, tensors,       problem.regular, problem.grain};
}

template <class Element>
void plan_stream(PlannedGroups& planned, const ChannelShape& shape, const GroupShape& group,
                 std::initializer_list<StridedTensor> all, bool backward, const DeviceTraits& device) {
  planned.problem = channel_problem<Element>(shape, all);
  planned.problem.samples = 1;
  const int width = planned.problem.width();
  planned.stream = group_stream_plan(planned.problem, shape.samples, device,
                                     backward ? stream_backward_packs(width) : stream_forward_packs(width));
  planned.pieces = pieces_of_parts(group.channels, planned.stream.parts);
}

template <class Element>
cudaError_t plan_group_forward(const GroupNormForwardArguments& norm, const DeviceTraits& device,
                               PlannedGroups& planned) {
  const std::initializer_list<StridedTensor> all = {{norm.input, norm.input_stride},
                                                    {norm.output, norm.shape.dense_stride()}};
  planned = {};
  planned.statistics = norm.shape.samples * norm.group.groups;
  planned.on_chip = group_plan(group_problem<Element>(norm.shape, norm.group, 1, all), device);
  cudaError_t error = cudaSuccess;
  if (planned.on_chip.resident.kind == ResidentKind::cluster) {
    error = with_alignment(planned.on_chip, [&]<bool aligned>() {
      return limit_clusters<group_norm_planes_forward_kernel<Element, aligned>>(planned.on_chip.resident);
    });
  }
  if (planned.streams()) plan_stream<Element>(planned, norm.shape, norm.group, all, false, device);
  return error;
}

// On chip only where grad_input is wanted: else nothing is read twice.
template <class Element>
cudaError_t plan_group_backward(const GroupNormBackwardArguments& norm, const DeviceTraits& device,
                                PlannedGroups& planned) {
  const std::initializer_list<StridedTensor> all = {{norm.input, norm.input_stride},
                                                    {norm.grad_output, norm.grad_output_stride},
                                                    {norm.grad_input, norm.shape.dense_stride()}};
  planned = {};
  planned.statistics = norm.statistics();
  const GroupProblem problem = group_problem<Element>(norm.shape, norm.group, 2, all);
  planned.on_chip = norm.grad_input == nullptr ? no_group_plan : group_plan(problem, device);
  cudaError_t error = cudaSuccess;
  if (planned.on_chip.resident.kind == ResidentKind::cluster) {
    error = with_alignment(planned.on_chip, [&]<bool aligned>() {
      return limit_clusters<group_norm_planes_backward_kernel<Element, aligned>>(planned.on_chip.resident);
    });
  }
  if (planned.streams()) {
    plan_stream<Element>(planned, norm.shape, norm.group, all, true, device);
  } else {
    planned.pieces = pieces_of(problem, planned.on_chip);
  }
  return error;
}

// The workspace has what batch norm's has, then the merged results.
inline GroupLayout group_layout(const GroupPlan& plan, void* workspace) {
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  return {layout_of(plan.resident, workspace),
          plan.slab_threads,
          plan.lanes,
          plan.run,
          plan.whole,
          plan.twice,
          reinterpret_cast<float*>(memory + plan.resident.workspace_bytes())};
}

// A launch of the plan's blocks for each sample.
inline Launch group_stream_launch(const PlannedGroups& planned, int64_t samples, cudaStream_t stream) {
  return {planned.stream.blocks * samples, planned.stream.threads, 1, 0, false, stream};
}

inline Launch group_merge_launch(const PlannedGroups& planned, cudaStream_t stream) {
  return {planned.statistics, group_merge_threads(planned.pieces.slots), 1, 0, false, stream};
}

// --- forward ---------------------------------------------------------------------------------------------------------

// The kernels of batch norm know no groups; what they know of the rest.
inline BatchNormForwardArguments channel_arguments(const GroupNormForwardArguments& norm) {
  BatchNormForwardArguments arguments{};
  arguments.input = norm.input;
  arguments.output = norm.output;
  arguments.weight = norm.weight;
  arguments.bias = norm.bias;
  arguments.mean = norm.mean;
  arguments.rstd = norm.rstd;
  arguments.shape = norm.shape;
  arguments.input_stride = norm.input_stride;
  arguments.activation = norm.activation;
  arguments.eps = norm.eps;
  return arguments;
}

// Bytes of `workspace`.
inline int64_t group_forward_bytes(const PlannedGroups& planned) {
  return planned.streams() ? 4 * planned.piece_floats() : planned.on_chip.workspace_bytes;
}

template <class Element>
cudaError_t launch_group_stream_forward(const PlannedGroups& planned, const GroupNormForwardArguments& norm,
                                        float* partials, cudaStream_t stream) {
  const BatchNormForwardArguments channels = channel_arguments(norm);
  const Launch shape = group_stream_launch(planned, norm.shape.samples, stream);
  cudaError_t error = with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<group_norm_statistics_kernel<Element, rows, width>>(
        shape, GroupStatisticsArguments{{channels, planned.stream, partials, false}, norm.group});
  });
  if (error == cudaSuccess) {
    error = launch<group_norm_moments_kernel>(group_merge_launch(planned, stream),
                                              GroupMomentsArguments{norm, planned.stream, partials});
  }
  if (error != cudaSuccess) {
    return error;
  }
  return with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<group_norm_apply_kernel<Element, rows, width>>(
        shape, GroupApplyArguments{{channels, planned.stream, false}, norm.group});
  });
}

template <class Element>
cudaError_t launch_group_forward(const PlannedGroups& planned, const GroupNormForwardArguments& norm, void* workspace,
                                 cudaStream_t stream) {
  if (planned.streams()) {
    return launch_group_stream_forward<Element>(planned, norm, static_cast<float*>(workspace), stream);
  }
  const Launch shape = resident_launch(planned.on_chip.resident, stream);
  const GroupForwardArguments arguments{norm, group_layout(planned.on_chip, workspace)};
  if (norm.shape.rows) {
    return launch<group_norm_rows_forward_kernel<Element>>(shape, arguments);
  }
  return with_alignment(planned.on_chip, [&]<bool aligned>() {
    return launch<group_norm_planes_forward_kernel<Element, aligned>>(shape, arguments);
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

struct GroupParameterGradients {
  void* weight;  // null: not asked for
  void* bias;
  DType weight_dtype;
  DType bias_dtype;

  bool wanted() const { return weight != nullptr || bias != nullptr; }
};

// The workspace of backward: the sums of channels, those of groups, then what blocks on chip exchange.
struct GroupBackwardBytes {
  int64_t pieces;
  int64_t sums;
  int64_t exchange;

  GroupBackwardBytes(const PlannedGroups& planned, bool of_parameters)
      : pieces(planned.streams() || of_parameters ? 4 * planned.piece_floats() : 0),
        sums(planned.streams() ? 8 * planned.statistics : 0),
        exchange(planned.streams() ? 0 : planned.on_chip.workspace_bytes) {}

  int64_t all() const { return pieces + sums + exchange; }
};

// `sums` of no samples: zeros.
inline cudaError_t launch_group_parameters(const GroupSums& sums, const ChannelShape& shape, int64_t groups,
                                           const GroupParameterGradients& gradients, cudaStream_t stream) {
  const GroupParametersArguments arguments{
      sums,           sums.data == nullptr ? 0 : shape.samples, shape.channels, groups, gradients.weight,
      gradients.bias, gradients.weight_dtype,                   gradients.bias_dtype};
  return launch<group_norm_parameters_kernel>(finish_launch(shape.channels, stream), arguments);
}

template <class Element>
cudaError_t launch_group_stream_backward(const PlannedGroups& planned, const GroupNormBackwardArguments& norm,
                                         float* pieces, float* sums, cudaStream_t stream) {
  BatchNormBackwardArguments channels{};
  channels.grad_output = norm.grad_output;
  channels.input = norm.input;
  channels.mean = norm.mean;
  channels.rstd = norm.rstd;
  channels.weight = norm.weight;
  channels.bias = norm.bias;
  channels.grad_input = norm.grad_input;
  channels.shape = norm.shape;
  channels.grad_output_stride = norm.grad_output_stride;
  channels.input_stride = norm.input_stride;
  channels.activation = norm.activation;
  channels.training = true;

  const Launch shape = group_stream_launch(planned, norm.shape.samples, stream);
  cudaError_t error = with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<group_norm_sums_kernel<Element, rows, width>>(
        shape, GroupStreamSumsArguments{{channels, planned.stream, pieces, nullptr}, norm.group});
  });
  if (error != cudaSuccess || norm.grad_input == nullptr) {
    return error;
  }
  error = launch<group_norm_means_kernel>(group_merge_launch(planned, stream),
                                          GroupMeansArguments{norm, pieces, planned.stream.parts, sums});
  if (error != cudaSuccess) {
    return error;
  }
  const float share = 1.0f / static_cast<float>(norm.per_group());
  return with_packs<Element>(planned.problem, [&]<int width, bool rows>() {
    return launch<group_norm_gradient_kernel<Element, rows, width>>(
        shape, GroupGradientArguments{{channels, planned.stream, sums, share}, norm.group});
  });
}

// `workspace`: GroupBackwardBytes::all() bytes.
template <class Element>
cudaError_t launch_group_backward(const PlannedGroups& planned, const GroupNormBackwardArguments& norm,
                                  const GroupParameterGradients& gradients, void* workspace, cudaStream_t stream) {
  const GroupBackwardBytes bytes(planned, gradients.wanted());
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  float* const pieces = reinterpret_cast<float*>(memory);
  const GroupSums stored{bytes.pieces > 0 ? pieces : nullptr, planned.statistics, planned.pieces};
  cudaError_t error = cudaSuccess;
  if (planned.streams()) {
    float* const sums = reinterpret_cast<float*>(memory + bytes.pieces);
    error = launch_group_stream_backward<Element>(planned, norm, pieces, sums, stream);
  } else {
    const Launch shape = resident_launch(planned.on_chip.resident, stream);
    const GroupBackwardArguments arguments{norm, group_layout(planned.on_chip, memory + bytes.pieces), stored};
    error = norm.shape.rows ? launch<group_norm_rows_backward_kernel<Element>>(shape, arguments)
                            : with_alignment(planned.on_chip, [&]<bool aligned>() {
                                return launch<group_norm_planes_backward_kernel<Element, aligned>>(shape, arguments);
                              });
  }
  if (error != cudaSuccess || !gradients.wanted()) {
    return error;
  }
  return launch_group_parameters(stored, norm.shape, norm.group.groups, gradients, stream);
}

}  // namespace fastreg::cuda
