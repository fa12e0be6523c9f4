// The simulator's operators, fastreg_cuda_sim::<name>, with the schemas of csrc/ops.cpp, and the functions that its
// Python side calls. The implementations are the doors of csrc/cuda, compiled into the same library.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "../../csrc/cuda/batch_norm_plan.h"
#include "../../csrc/cuda/batch_norm_resident_plan.h"
#include "../../csrc/cuda/drop_block_plan.h"
#include "../../csrc/cuda/dropout_add_layer_norm_plan.h"
#include "../../csrc/cuda/group_norm_pieces.h"
#include "../../csrc/cuda/layer_norm_plan.h"
#include "simulator.h"

#define fastreg_native fastreg_cuda_sim
#include "../../csrc/ops.cpp"

namespace {

fastreg::cuda::DeviceTraits traits_of(int architecture, int multiprocessors) {
  const simulator::Device device = simulator::device_of(architecture, multiprocessors);
  return {architecture, multiprocessors, device.shared_bytes_per_block, device.shared_bytes_per_multiprocessor};
}

}  // namespace

extern "C" {

void cuda_sim_configure(int architecture, int multiprocessors, int order, uint64_t seed, int clusters_at_once,
                        bool execute) {
  simulator::configure(simulator::device_of(architecture, multiprocessors),
                       {static_cast<simulator::Order>(order), seed, clusters_at_once, execute});
}

// What simulator::launches() says; valid until the next call.
const char* cuda_sim_launches() {
  static std::string text;
  text = simulator::launches();
  return text.c_str();
}

// The launch plans, in the order of their fields.
void cuda_sim_forward_plan(int architecture, int multiprocessors, int64_t rows, int columns, int element_size,
                           bool centred, bool wide, bool fused, bool third_sums, int64_t* fields) {
  const fastreg::cuda::Problem problem{rows, columns, element_size, centred, wide, fused, third_sums};
  const auto traits = traits_of(architecture, multiprocessors);
  const auto plan = fused ? fused_forward_plan(problem, traits) : forward_plan(problem, traits);
  const int64_t values[] = {plan.looped,          plan.width,   plan.packs,   plan.rows,
                            plan.threads_per_row, plan.threads, plan.cluster, plan.blocks};
  std::copy(std::begin(values), std::end(values), fields);
}

void cuda_sim_backward_plan(int architecture, int multiprocessors, int64_t rows, int columns, int element_size,
                            bool centred, bool wide, bool fused, bool third_sums, int64_t* fields) {
  const auto plan = fastreg::cuda::backward_plan({rows, columns, element_size, centred, wide, fused, third_sums},
                                                 traits_of(architecture, multiprocessors));
  const int64_t values[] = {static_cast<int64_t>(plan.kind),
                            plan.width,
                            plan.packs,
                            plan.threads_per_row,
                            plan.threads,
                            plan.cluster,
                            plan.blocks,
                            plan.shared_bytes,
                            plan.partials};
  std::copy(std::begin(values), std::end(values), fields);
}

void cuda_sim_stream_plan(int architecture, int multiprocessors, int64_t samples, int64_t channels, int64_t spatial,
                          int element_size, bool rows, bool wide, bool backward, bool whole_bytes, int64_t* fields) {
  const fastreg::cuda::ChannelProblem problem{samples, channels, spatial, element_size, rows, wide};
  const int packs = backward ? fastreg::cuda::stream_backward_packs(problem.width())
                             : fastreg::cuda::stream_forward_packs(problem.width());
  const auto plan = fastreg::cuda::stream_plan(problem, traits_of(architecture, multiprocessors), packs, whole_bytes);
  const int64_t values[] = {plan.threads, plan.lanes, plan.line_packs, plan.across,
                            plan.items,   plan.parts, plan.share,      plan.blocks};
  std::copy(std::begin(values), std::end(values), fields);
}

void cuda_sim_resident_plan(int architecture, int multiprocessors, int64_t samples, int64_t channels, int64_t spatial,
                            int element_size, bool rows, int tensors, bool signs, bool regular, int grain,
                            int64_t* fields) {
  const auto plan = fastreg::cuda::resident_plan(
      {rows, samples, channels, spatial, element_size, tensors, signs, regular, grain},
      traits_of(architecture, multiprocessors));
  const int64_t values[] = {static_cast<int64_t>(plan.kind),
                            plan.slab_blocks,
                            plan.threads,
                            plan.groups,
                            plan.slabs,
                            plan.columns,
                            plan.share,
                            plan.shared_bytes};
  std::copy(std::begin(values), std::end(values), fields);
}

void cuda_sim_group_plan(int architecture, int multiprocessors, int64_t samples, int64_t channels, int64_t spatial,
                         int64_t groups, int element_size, bool rows, int tensors, bool regular, int grain,
                         int64_t* fields) {
  const fastreg::cuda::GroupProblem problem{rows,         samples, channels, spatial, groups,
                                            element_size, tensors, regular,  grain};
  const auto plan = fastreg::cuda::group_plan(problem, traits_of(architecture, multiprocessors));
  const auto pieces = plan.resident.kind == fastreg::cuda::ResidentKind::none ? fastreg::cuda::GroupPieces{}
                                                                              : fastreg::cuda::pieces_of(problem, plan);
  const auto& resident = plan.resident;
  const int64_t values[] = {static_cast<int64_t>(resident.kind),
                            resident.slab_blocks,
                            resident.threads,
                            resident.groups,
                            resident.slabs,
                            resident.columns,
                            resident.share,
                            resident.shared_bytes,
                            plan.slab_threads,
                            plan.lanes,
                            plan.run,
                            plan.whole,
                            plan.aligned,
                            plan.twice,
                            plan.workspace_bytes,
                            pieces.slots};
  std::copy(std::begin(values), std::end(values), fields);
}

// The first slot, the number of pieces and the distance between them, of a group's channel.
void cuda_sim_group_pieces(int architecture, int multiprocessors, int64_t samples, int64_t channels, int64_t spatial,
                           int64_t groups, int element_size, bool rows, int tensors, bool regular, int grain,
                           int64_t* fields) {
  const fastreg::cuda::GroupProblem problem{rows,         samples, channels, spatial, groups,
                                            element_size, tensors, regular,  grain};
  const auto plan = fastreg::cuda::group_plan(problem, traits_of(architecture, multiprocessors));
  const auto pieces = fastreg::cuda::pieces_of(problem, plan);
  for (int64_t channel = 0; channel < problem.group_channels(); ++channel) {
    fields[3 * channel] = pieces.first(channel);
    fields[3 * channel + 1] = pieces.count(channel);
    fields[3 * channel + 2] = pieces.step();
  }
}

void cuda_sim_dropout_columns_plan(int, int multiprocessors, int64_t rows, int64_t columns, int width,
                                   int64_t* fields) {
  const auto plan = fastreg::cuda::dropout_columns_plan(rows, columns, width, multiprocessors);
  const int64_t values[] = {plan.lanes, plan.down, plan.strips, plan.share, plan.parts};
  std::copy(std::begin(values), std::end(values), fields);
}

int64_t cuda_sim_quotient(int64_t position, int64_t value) {
  return fastreg::cuda::quotient(position, fastreg::cuda::divisor_of(value));
}
}
