// Door of group norm's forward operator on the CPU, and its registration.
//
// Where the groups of a sample are contiguous, their moments are those of long planes; in the rows family those of the
// columns are merged over each group, all of them of as many elements. The second sweep is batch norm's, with the
// statistics of a group for each of its channels.
//
// Traffic over the activations, where the second sweep finds nothing in the caches: two reads of input and one write.
// See group_norm_schedule.h for what the caches save.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../math.h"
#include "group_norm_door.h"

namespace fastreg {
namespace {

// (samples, groups) each.
struct ForwardResults {
  void* mean;
  void* rstd;
  void* squares;
  double eps;
};

template <class Scalar>
class ForwardWorker : public GroupNormWorker {
 public:
  ForwardWorker(const GroupNormProblem& problem, const BatchNormGeometry& sums_geometry,
                const ForwardResults& results)
      : problem_(problem),
        results_(results),
        geometry_(sums_geometry),
        partials_(geometry_),
        scratch_(problem.sample, geometry_.rows ? 2 : 0, 2),
        means_(scratch_.array<Scalar>(0)),
        scales_(scratch_.array<Scalar>(1)) {}

  void begin(int64_t sample, int64_t, int64_t) override {
    norm_ = problem_.of_sample(sample);
    norm_.mean = means_;
    norm_.scale = scales_;
    summed_ = norm_;
    summed_.geometry = geometry_;
    const int64_t before = sample * problem_.groups;
    mean_ = static_cast<Scalar*>(results_.mean) + before;
    rstd_ = static_cast<Scalar*>(results_.rstd) + before;
    squares_ = results_.squares == nullptr ? nullptr : static_cast<Scalar*>(results_.squares) + before;
  }

  void sums(const BatchNormTile& tile, int64_t chunk) override {
    const DType dtype = problem_.input.dtype;
    const BatchNormKernels& kernels = geometry_.rows ? rows_kernels(dtype) : planes_kernels(dtype);
    kernels.moments(summed_, tile, partials_.chunk(chunk));
  }

  void finish(int64_t begin_group, int64_t end_group) override {
    if (geometry_.rows) {
      merge_columns(begin_group, end_group);
    } else {
      planes_kernels(problem_.input.dtype)
          .finish_moments(geometry_, partials_.chunk(0),
                          {.weight = nullptr,
                           .mean = mean_,
                           .squares = squares_,
                           .rstd = rstd_,
                           .scale = nullptr,
                           .eps = results_.eps},
                          begin_group, end_group);
    }
    const Scalar* const weight = static_cast<const Scalar*>(problem_.weight_row.data());
    const int64_t width = problem_.channels_per_group;
    for (int64_t group = begin_group; group < end_group; ++group) {
      const Scalar rstd = rstd_[group];
      std::fill_n(means_ + group * width, width, mean_[group]);
      for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
        scales_[channel] = weight == nullptr ? rstd : rstd * weight[channel];
      }
    }
  }

  void outputs(const BatchNormTile& tile) override { problem_.kernels().normalize(norm_, tile); }

 private:
  // Chan's rule for the columns of a group, which have equally many elements. The table of fp64 hands over what the
  // chunks give without rounding it.
  void merge_columns(int64_t begin_group, int64_t end_group) {
    const int64_t width = problem_.channels_per_group;
    double* const means = scratch_.doubles(0);
    double* const squares = scratch_.doubles(1);
    rows_kernels(DType::Float64)
        .finish_moments(geometry_, partials_.chunk(0),
                        {.weight = nullptr,
                         .mean = means,
                         .squares = squares,
                         .rstd = nullptr,
                         .scale = nullptr,
                         .eps = 0},
                        begin_group * width, end_group * width);
    const double rows = double(geometry_.spatial);
    for (int64_t group = begin_group; group < end_group; ++group) {
      const double* const column_means = means + group * width;
      const double* const column_squares = squares + group * width;
      double mean = 0;
      for (int64_t column = 0; column < width; ++column) {
        mean += column_means[column];
      }
      mean /= double(width);
      double within = 0;
      double between = 0;
      for (int64_t column = 0; column < width; ++column) {
        const double difference = column_means[column] - mean;
        within += column_squares[column];
        between += difference * difference;
      }
      const double total = within + between * rows;
      mean_[group] = static_cast<Scalar>(mean);
      rstd_[group] = static_cast<Scalar>(reciprocal_deviation(total, rows * double(width), results_.eps));
      if (squares_ != nullptr) {
        squares_[group] = static_cast<Scalar>(total);
      }
    }
  }

  const GroupNormProblem& problem_;
  ForwardResults results_;
  const BatchNormGeometry& geometry_;  // of the moments
  PartialScratch partials_;
  SampleScratch scratch_;
  Scalar* means_;
  Scalar* scales_;
  BatchNorm norm_{};
  BatchNorm summed_{};
  Scalar* mean_ = nullptr;
  Scalar* rstd_ = nullptr;
  Scalar* squares_ = nullptr;
};

template <class Scalar>
void run_forward(const GroupNormProblem& problem, const ForwardResults& results) {
  const BatchNormGeometry geometry =
      problem.contiguous_groups ? batch_norm_geometry(problem.group) : problem.norm.geometry;
  GroupNormPlan plan =
      problem.plan([&] { return std::make_unique<ForwardWorker<Scalar>>(problem, geometry, results); });
  plan.sums.geometry = geometry;
  plan.sums.channels_per_group = geometry.channels / problem.groups;
  run_group_norm(plan);
}

std::tuple<Tensor, Tensor> group_norm_fwd(const Tensor& input, int64_t groups, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps, int64_t activation,
                                          double negative_slope) {
  constexpr const char* op = "group_norm_fwd";
  GroupNormProblem problem(input, groups, weight, bias, activation, negative_slope, op);
  return group_norm_forward(problem, eps, nullptr, op);
}

}  // namespace

std::tuple<Tensor, Tensor> group_norm_forward(GroupNormProblem& problem, double eps, void* squares, const char* op) {
  const ChannelView& input = problem.input;
  const int64_t sizes[] = {2, input.samples, problem.groups};
  const DType accumulator = accumulation_dtype(input.dtype);
  Tensor output = new_dense(input, op);
  Tensor statistics = new_tensor(sizes, 3, accumulator, input.device, op);
  void* const mean = data_of(statistics, op);
  const int64_t count = problem.statistics_elements();
  if (problem.is_empty()) {
    fill_nan(mean, 2 * count, accumulator);
    return {std::move(output), std::move(statistics)};
  }
  problem.norm.output = data_of(output, op);
  problem.norm.streams = may_stream(problem.norm.output, input);
  const ForwardResults results{
      .mean = mean, .rstd = advance(mean, count, accumulator), .squares = squares, .eps = eps};
  (input.dtype == DType::Float64 ? run_forward<double> : run_forward<float>)(problem, results);
  return {std::move(output), std::move(statistics)};
}

}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&fastreg::group_norm_fwd));
}
