// Group norm's and instance norm's kernels against fp64, without torch; as standalone.cpp, with the same arguments and
// exit code. Each case goes forward and backward, and fails if the plan would not do what it names.

#include <vector>

#include "group_norm_launch.cuh"
#include "instance_norm.cuh"
#include "standalone_channels.h"

namespace {

// On chip: planes by warps, and planes and rows as the kinds of ResidentPlan; rows that blocks share exchange once or
// twice. Streaming, whatever fits.
enum class How { streaming, warps, block, cluster, shared, shared_twice };

struct Case {
  How how;
  int architecture;
  int multiprocessors;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t groups;
  bool rows;
  Activation activation;
  int64_t gap;    // elements between the samples or rows of what is read
  int64_t shift;  // of the first element, in elements
};

std::string describe(const Case& current) {
  constexpr const char* names[] = {"streaming", "by warps", "by blocks", "by clusters", "shared", "shared twice"};
  return std::string(names[static_cast<int>(current.how)]) + " on sm_" + std::to_string(current.architecture) +
         " with " + std::to_string(current.multiprocessors) + " multiprocessors, " + std::to_string(current.samples) +
         " x " + std::to_string(current.channels) + " x " + std::to_string(current.spatial) +
         (current.rows ? " rows, " : " planes, ") + std::to_string(current.groups) + " groups, activation " +
         std::to_string(static_cast<int>(current.activation)) + ", gap " + std::to_string(current.gap) + ", shift " +
         std::to_string(current.shift);
}

How how_of(const GroupPlan& plan) {
  switch (plan.resident.kind) {
    case ResidentKind::none:
      return How::streaming;
    case ResidentKind::block:
      return plan.slab_threads < plan.resident.threads ? How::warps : How::block;
    case ResidentKind::cluster:
      return How::cluster;
    default:
      return plan.twice ? How::shared_twice : How::shared;
  }
}

// --- one case --------------------------------------------------------------------------------------------------------

template <class Element>
struct Tensors {
  ChannelShape shape;
  GroupShape group;
  ChannelTensor<Element> input, grad_output, output, grad_input;
  Matrix<float> weight, bias, statistics, squares, running_mean, grad_weight;
  Matrix<bfloat16> running_var, grad_bias;
  std::vector<double> before_mean, before_var;

  Tensors(const Case& current, const ChannelShape& shape)
      : shape(shape),
        group{current.groups, current.channels / current.groups},
        input(shape, current.gap, current.shift),
        grad_output(shape, current.gap, current.shift),
        output(shape),
        grad_input(shape),
        weight(1, shape.channels),
        bias(1, shape.channels),
        statistics(2, shape.samples * current.groups),
        squares(1, shape.samples * current.groups),
        running_mean(1, shape.channels),
        grad_weight(1, shape.channels),
        running_var(1, shape.channels),
        grad_bias(1, shape.channels) {
    std::mt19937_64 random(static_cast<uint64_t>(shape.channels * 1000 + shape.per_channel()));
    input.fill(random, 2.0, 1.0);
    grad_output.fill(random, 0.0, 1.0);
    weight.fill(random, 0.0, 1.0);
    bias.fill(random, 0.0, 1.0);
    running_mean.fill(random, 2.0, 0.5);
    running_var.fill(random, 1.0, 0.125);
    for (int64_t channel = 0; channel < shape.channels; ++channel) {
      before_mean.push_back(running_mean.value(0, channel));
      before_var.push_back(running_var.value(0, channel));
    }
  }

  GroupNormForwardArguments forward(const Case& current) {
    GroupNormForwardArguments arguments{};
    arguments.input = input.data;
    arguments.output = output.data;
    arguments.weight = {weight.data, DType::Float32};
    arguments.bias = {bias.data, DType::Float32};
    arguments.mean = statistics.data;
    arguments.rstd = statistics.data + shape.samples * group.groups;
    arguments.squares = squares.data;
    arguments.shape = shape;
    arguments.group = group;
    arguments.input_stride = input.stride;
    arguments.activation = {current.activation, slope};
    arguments.eps = eps;
    return arguments;
  }

  GroupNormBackwardArguments backward(const Case& current) {
    GroupNormBackwardArguments arguments{};
    arguments.grad_output = grad_output.data;
    arguments.input = input.data;
    arguments.mean = statistics.data;
    arguments.rstd = statistics.data + shape.samples * group.groups;
    arguments.weight = {weight.data, DType::Float32};
    arguments.bias = {bias.data, DType::Float32};
    arguments.grad_input = grad_input.data;
    arguments.shape = shape;
    arguments.group = group;
    arguments.grad_output_stride = grad_output.stride;
    arguments.input_stride = input.stride;
    arguments.activation = {current.activation, slope};
    return arguments;
  }

  // An element of a sample's channel: its place over all samples.
  int64_t place(int64_t sample, int64_t index) const { return sample * shape.spatial + index; }

  // What the group gives to the parameters' gradients, and the terms of that, is added to `sums`: four numbers a
  // channel.
  void check_group(const Case& current, int64_t sample, int64_t number, std::vector<double>& sums) {
    const int64_t first = number * group.channels, count = group.channels * shape.spatial;
    const auto each = [&](const auto& visit) {
      for (int64_t channel = first; channel < first + group.channels; ++channel) {
        for (int64_t index = 0; index < shape.spatial; ++index) visit(channel, place(sample, index));
      }
    };
    double mean = 0, size = 0, variance = 0;
    each([&](int64_t channel, int64_t index) { mean += input.of(channel, index) / count; });
    each([&](int64_t channel, int64_t index) { size += std::abs(input.of(channel, index)) / count; });
    each([&](int64_t channel, int64_t index) { variance += std::pow(input.of(channel, index) - mean, 2) / count; });
    const double rstd = 1 / std::sqrt(variance + eps);
    const int64_t statistic = sample * group.groups + number;
    require_close<float>("mean", statistics.data[statistic], mean, size);
    require_close<float>("rstd", statistics.value(1, statistic), rstd, rstd * (1 + size * rstd));
    require_close<float>("squares", squares.value(0, statistic), variance * count, variance * count + size * size);

    std::vector<double> gradients, terms, shifts;
    double plain = 0, projection = 0, plain_size = 0, projection_size = 0;
    each([&](int64_t channel, int64_t index) {
      const double scale = weight.value(0, channel), offset = bias.value(0, channel);
      const double normalized = (input.of(channel, index) - mean) * rstd;
      const double z = normalized * scale + offset;
      const double shift = (std::abs(input.of(channel, index)) + size) * rstd;
      const double z_size = shift * std::abs(scale) + std::abs(offset);
      require_close<Element>("output", output.of(channel, index), activated(current.activation, z), 1.2 * z_size);
      gradients.push_back(grad_output.of(channel, index) * derivative(current.activation, z));
      terms.push_back(1.2 * std::abs(grad_output.of(channel, index)) * (1 + z_size));
      shifts.push_back(shift);
      double* const of_channel = &sums[static_cast<size_t>(4 * channel)];
      of_channel[0] += gradients.back();
      of_channel[1] += terms.back();
      of_channel[2] += gradients.back() * normalized;
      of_channel[3] += terms.back() * shift;
      plain += scale * gradients.back() / count;
      plain_size += std::abs(scale) * terms.back() / count;
      projection += scale * gradients.back() * normalized / count;
      projection_size += std::abs(scale) * terms.back() * shift / count;
    });
    size_t next = 0;
    each([&](int64_t channel, int64_t index) {
      const double scale = weight.value(0, channel);
      const double normalized = (input.of(channel, index) - mean) * rstd;
      require_close<Element>(
          "grad_input", grad_input.of(channel, index),
          rstd * (scale * gradients[next] - plain - normalized * projection),
          rstd * (std::abs(scale) * terms[next] + plain_size + shifts[next] * projection_size));
      ++next;
    });
  }

  void check(const Case& current) {
    std::vector<double> sums(static_cast<size_t>(4 * shape.channels));
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
      for (int64_t number = 0; number < group.groups; ++number) check_group(current, sample, number, sums);
    }
    for (int64_t channel = 0; channel < shape.channels; ++channel) {
      const double* const of_channel = &sums[static_cast<size_t>(4 * channel)];
      require_close<bfloat16>("grad_bias", grad_bias.value(0, channel), of_channel[0], of_channel[1]);
      require_close<float>("grad_weight", grad_weight.value(0, channel), of_channel[2], of_channel[3]);
      if (group.channels == 1) check_running(channel);
    }
  }

  // Of what the kernels before have found.
  void check_running(int64_t channel) {
    double mean = 0, variance = 0;
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
      const int64_t statistic = sample * group.groups + channel;
      mean += statistics.data[statistic] / shape.samples;
      variance += squares.data[statistic] / std::max<double>(shape.spatial - 1, 1) / shape.samples;
    }
    require_close<float>("running_mean", running_mean.value(0, channel),
                         0.75 * before_mean[channel] + 0.25 * mean, 8.0);
    require_close<bfloat16>("running_var", running_var.value(0, channel),
                            0.75 * before_var[channel] + 0.25 * variance, 8.0);
  }
};

template <class Element>
void run_case(const Case& current, const DeviceTraits& device) {
  const ChannelShape shape{current.samples, current.channels, current.spatial, current.rows};
  Tensors<Element> tensors(current, shape);
  const auto planned_as = [&](PlannedGroups& planned, bool backward, std::initializer_list<StridedTensor> all) {
    if (current.how == How::streaming) {
      planned.on_chip = no_group_plan;
      plan_stream<Element>(planned, shape, tensors.group, all, backward, device);
    } else if (how_of(planned.on_chip) != current.how) {
      throw std::runtime_error("the plan does something else");
    }
  };

  const GroupNormForwardArguments forward = tensors.forward(current);
  PlannedGroups planned;
  require(plan_group_forward<Element>(forward, device, planned));
  planned_as(planned, false, {{forward.input, forward.input_stride}, {forward.output, shape.dense_stride()}});
  Matrix<float> memory(1, std::max<int64_t>(group_forward_bytes(planned) / 4, 1));
  require(launch_group_forward<Element>(planned, forward, memory.data, nullptr));

  const GroupNormBackwardArguments backward = tensors.backward(current);
  require(plan_group_backward<Element>(backward, device, planned));
  planned_as(planned, true,
             {{backward.input, backward.input_stride},
              {backward.grad_output, backward.grad_output_stride},
              {backward.grad_input, shape.dense_stride()}});
  Matrix<float> workspace(1, std::max<int64_t>(GroupBackwardBytes(planned, true).all() / 4, 1));
  require(launch_group_backward<Element>(
      planned, backward, {tensors.grad_weight.data, tensors.grad_bias.data, DType::Float32, DType::BFloat16},
      workspace.data, nullptr));

  if (tensors.group.channels == 1) {
    const RunningArguments running{tensors.statistics.data, tensors.squares.data,
                                   {tensors.running_mean.data, DType::Float32},
                                   {tensors.running_var.data, DType::BFloat16}, shape, 0.25f};
    require(launch<instance_norm_running_kernel>(finish_launch(shape.channels, nullptr), running));
  }
  tensors.check(current);
}

// On chip, planes: warps with ragged slabs, some without any, and with many that are smaller than a chunk; short planes
// as wholes, long ones in runs; clusters, and blocks that wait for each other; of whole chunks too. Rows: several
// samples a block, groups that begin within a pack; blocks that share a sample, merging all groups or some each.
// Streaming: packs of 16 bytes and of one element, several parts and strips.
constexpr Case cases[] = {
    {How::warps, 90, 2, 3, 24, 49, 12, false, Activation::relu, 8, 0},
    {How::warps, 90, 1, 3, 33, 4, 33, false, Activation::gelu, 0, 0},
    {How::block, 90, 2, 2, 37, 49, 1, false, Activation::hardswish, 0, 0},
    {How::block, 90, 1, 2, 3, 1001, 1, false, Activation::silu, 0, 0},
    {How::cluster, 90, 6, 1, 12, 1037, 3, false, Activation::leaky_relu, 0, 0},
    {How::shared, 80, 4, 1, 2, 10001, 1, false, Activation::identity, 0, 0},
    {How::warps, 90, 2, 3, 24, 64, 12, false, Activation::silu, 0, 0},
    {How::cluster, 90, 6, 1, 12, 1040, 3, false, Activation::gelu, 0, 0},
    {How::block, 90, 1, 10, 40, 7, 8, true, Activation::gelu, 8, 0},
    {How::shared, 90, 6, 2, 40, 400, 8, true, Activation::silu, 0, 0},
    {How::shared_twice, 90, 6, 1, 176, 220, 176, true, Activation::gelu_tanh, 0, 0},
    {How::streaming, 90, 8, 2, 4, 520, 2, false, Activation::relu, 8, 0},
    {How::streaming, 90, 2, 3, 5, 49, 5, false, Activation::silu, 0, 1},
    {How::streaming, 90, 8, 2, 264, 37, 3, true, Activation::leaky_relu, 8, 0},
    {How::streaming, 90, 2, 3, 9, 5, 3, true, Activation::gelu, 1, 0},
};

}  // namespace

int main(int count, char** values) {
  return run_cases(cases, count, values, [](const Case& current, const DeviceTraits& device) {
    run_case<bfloat16>(current, device);
#if !defined(FASTREG_STANDALONE_FEW)
    run_case<float>(current, device);
    run_case<float16>(current, device);
#endif
  });
}
