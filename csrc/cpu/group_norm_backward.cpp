// Door of group norm's backward operator on the CPU, and its registration.
//
//   dz = dy * activation'(z)     grad_bias = sum of dz     grad_weight = sum of dz * xhat
//   grad_input = rstd * (weight * dz - mean of weight * dz - xhat * mean of weight * dz * xhat)
//
// The first sweep makes the sums of a channel of a sample, of which those of its group follow, and after all samples
// the weight's gradients, added in the samples' order.
//
// Traffic over the activations, where the second sweep finds nothing in the caches: two reads of grad_output and input
// and one write. See group_norm_schedule.h for what the caches save. Where dz costs an exponential, and what a thread
// has in work is not too large, the second sweep reads it instead of grad_output.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "group_norm_door.h"

namespace fastreg {
namespace {

// Of what is kept between the sweeps, per thread. Best where it stays in the thread's own cache, but an exponential and
// a division cost more than the way to the last one too.
constexpr int64_t largest_kept = int64_t{4} << 20;

// Sums of every channel of every sample, (samples, channels) each.
class SampleSums {
 public:
  explicit SampleSums(const GroupNormProblem& problem)
      : bytes_(problem.input.samples * vector_bytes_of(problem.sample)),
        data_(static_cast<char*>(scratch_.reserve(2 * bytes_))) {}

  void* plain() const { return data_; }
  void* projected() const { return data_ + bytes_; }

 private:
  Scratch scratch_;
  int64_t bytes_;
  char* data_;
};

// Whether a derivative costs more than to write it down and read it again.
bool is_costly(Activation activation) {
  return activation == Activation::silu || activation == Activation::gelu || activation == Activation::gelu_tanh;
}

template <class Scalar>
class BackwardWorker : public GroupNormWorker {
 public:
  // statistics: (2, samples, groups).
  BackwardWorker(const GroupNormProblem& problem, const void* statistics, const SampleSums& sums)
      : problem_(problem),
        statistics_(static_cast<const Scalar*>(statistics)),
        sums_(sums),
        partials_(problem.norm.geometry),
        scratch_(problem.sample, 0, 5),
        means_(scratch_.array<Scalar>(0)),
        rstds_(scratch_.array<Scalar>(1)),
        scales_(scratch_.array<Scalar>(2)),
        slopes_(scratch_.array<Scalar>(3)),
        offsets_(scratch_.array<Scalar>(4)) {}

  void begin(int64_t sample, int64_t begin_group, int64_t end_group) override {
    norm_ = problem_.of_sample(sample);
    norm_.mean = means_;
    norm_.rstd = rstds_;
    norm_.scale = scales_;
    norm_.slope = slopes_;
    norm_.offset = offsets_;
    keep(begin_group, end_group);
    const int64_t before = sample * problem_.groups;
    const Scalar* const mean = statistics_ + before;
    rstd_ = mean + problem_.statistics_elements();
    plain_ = static_cast<Scalar*>(sums_.plain()) + sample * problem_.sample.channels;
    projected_ = static_cast<Scalar*>(sums_.projected()) + sample * problem_.sample.channels;
    const Scalar* const weight = static_cast<const Scalar*>(problem_.weight_row.data());
    const int64_t width = problem_.channels_per_group;
    for (int64_t group = begin_group; group < end_group; ++group) {
      hand_out(means_, group, mean[group]);
      hand_out(rstds_, group, rstd_[group]);
      for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
        scales_[channel] = weight == nullptr ? rstd_[group] : rstd_[group] * weight[channel];
      }
    }
  }

  void sums(const BatchNormTile& tile, int64_t chunk) override {
    problem_.kernels().sums(norm_, tile, partials_.chunk(chunk));
  }

  void finish(int64_t begin_group, int64_t end_group) override {
    const int64_t width = problem_.channels_per_group;
    problem_.kernels().finish_sums(problem_.norm.geometry, partials_.chunk(0),
                                   {.scale = norm_.scale,
                                    .rstd = norm_.rstd,
                                    .plain = plain_,
                                    .projected = projected_,
                                    .offset = nullptr,
                                    .slope = nullptr},
                                   begin_group * width, end_group * width);
    if (norm_.grad_input == nullptr) {
      return;
    }
    const Scalar* const weight = static_cast<const Scalar*>(problem_.weight_row.data());
    const double elements = double(problem_.group_elements());
    for (int64_t group = begin_group; group < end_group; ++group) {
      double plain = 0;
      double projected = 0;
      for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
        const double factor = weight == nullptr ? 1.0 : double(weight[channel]);
        plain += factor * double(plain_[channel]);
        projected += factor * double(projected_[channel]);
      }
      const double rstd = double(rstd_[group]);
      hand_out(offsets_, group, static_cast<Scalar>(plain / elements * rstd));
      hand_out(slopes_, group, static_cast<Scalar>(projected / elements * rstd * rstd));
    }
  }

  void outputs(const BatchNormTile& tile) override { problem_.kernels().gradient(norm_, tile); }

 private:
  // dz, so that the second sweep need not make it again. Only planes are worked on in parts of a sample, which are
  // contiguous.
  void keep(int64_t begin_group, int64_t end_group) {
    const int64_t elements = (end_group - begin_group) * problem_.group_elements();
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(Scalar));
    if (!is_costly(norm_.activation) || norm_.grad_input == nullptr || bytes > largest_kept) {
      return;
    }
    if (kept_ == nullptr) {
      const int64_t sample_bytes = problem_.sample_elements() * static_cast<int64_t>(sizeof(Scalar));
      kept_ = static_cast<Scalar*>(kept_scratch_.reserve(std::min(largest_kept, sample_bytes)));
    }
    norm_.kept = kept_ - begin_group * problem_.group_elements();
  }

  // A group's value, for each of its channels.
  void hand_out(Scalar* values, int64_t group, Scalar value) const {
    const int64_t width = problem_.channels_per_group;
    std::fill_n(values + group * width, width, value);
  }

  const GroupNormProblem& problem_;
  const Scalar* statistics_;
  const SampleSums& sums_;
  PartialScratch partials_;
  SampleScratch scratch_;
  Scalar* means_;
  Scalar* rstds_;
  Scalar* scales_;
  Scalar* slopes_;
  Scalar* offsets_;
  Scratch kept_scratch_;
  Scalar* kept_ = nullptr;
  BatchNorm norm_{};
  const Scalar* rstd_ = nullptr;
  Scalar* plain_ = nullptr;
  Scalar* projected_ = nullptr;
};

template <class Scalar>
void run_backward(const GroupNormProblem& problem, const void* statistics, const SampleSums& sums) {
  GroupNormPlan plan =
      problem.plan([&] { return std::make_unique<BackwardWorker<Scalar>>(problem, statistics, sums); });
  plan.outputs.wanted = problem.norm.grad_input != nullptr;
  plan.bytes_read_twice = 2 * element_size(problem.input.dtype);
  run_group_norm(plan);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& grad_output, const Tensor& input, int64_t groups,
                                                  const Tensor& statistics, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t activation,
                                                  double negative_slope, std::vector<bool> output_mask) {
  constexpr const char* op = "group_norm_bwd";
  GroupNormProblem problem(input, groups, weight, bias, activation, negative_slope, op);
  const ChannelView& view = problem.input;
  const VectorView saved =
      vector_view(statistics, 2 * problem.statistics_elements(), view.device, op, "statistics");
  if (saved.dtype != accumulation_dtype(view.dtype)) {
    fail(op, "statistics must be ", name_of(accumulation_dtype(view.dtype)), ".");
  }
  BatchNorm& norm = problem.norm;
  norm.grad_output = optional_input(grad_output, view, op, "grad_output");
  const bool wants_input = output_mask.at(0);
  const bool wants_weight = output_mask.at(1);
  const bool wants_bias = output_mask.at(2);
  check_mask(wants_weight, problem.weights, op, "weight");
  check_mask(wants_bias, problem.biases, op, "bias");
  Tensor grad_input = wants_input ? new_dense(view, op) : empty_gradient(view.dtype, view.device, op);
  norm.grad_input = wants_input ? data_of(grad_input, op) : nullptr;
  norm.streams = wants_input && may_stream(norm.grad_input, view);
  const auto parameter_gradient = [&](bool wanted, const VectorView& parameter) {
    const DType dtype = parameter.given ? parameter.dtype : view.dtype;
    return wanted ? new_vector(view.channels, dtype, view.device, op) : empty_gradient(dtype, view.device, op);
  };
  Tensor grad_weight = parameter_gradient(wants_weight, problem.weights);
  Tensor grad_bias = parameter_gradient(wants_bias, problem.biases);

  const SampleSums sums(problem);
  const bool runs = !problem.is_empty() && (wants_input || wants_weight || wants_bias);
  if (runs) {
    (view.dtype == DType::Float64 ? run_backward<double> : run_backward<float>)(problem, saved.data, sums);
  }
  const auto reduce = [&](bool wanted, const void* partials, const VectorView& parameter, const Tensor& gradient) {
    if (wanted && view.channels > 0) {
      reduce_partials(partials, runs ? view.samples : 0, view.channels, parameter.dtype, data_of(gradient, op));
    }
  };
  reduce(wants_weight, sums.projected(), problem.weights, grad_weight);
  reduce(wants_bias, sums.plain(), problem.biases, grad_bias);
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CPU, m) {
  m.impl("group_norm_bwd", TORCH_BOX(&fastreg::group_norm_bwd));
}
