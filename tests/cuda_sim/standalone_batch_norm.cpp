// Batch norm's kernels against fp64, without torch; as standalone.cpp, with the same arguments and exit code. Each case
// goes forward and backward, streaming or with its slabs on chip, and fails if the plan would not do what it names.

#include <vector>

#include "batch_norm_launch.cuh"
#include "standalone_channels.h"
#if !defined(FASTREG_STANDALONE_STREAMING)
#include "batch_norm_resident.cuh"
#endif

namespace {

enum class How { streaming, evaluation, resident };

struct Case {
  How how;
  int architecture;
  int multiprocessors;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  bool rows;
  Activation activation;
  bool residual;
  bool signs;     // kept for backward
  int64_t gap;    // elements between the samples or rows of what is read
  int64_t shift;  // of the first element, in elements
};

std::string describe(const Case& current) {
  constexpr const char* names[] = {"streaming", "evaluation", "resident"};
  return std::string(names[static_cast<int>(current.how)]) + " on sm_" + std::to_string(current.architecture) +
         " with " + std::to_string(current.multiprocessors) + " multiprocessors, " + std::to_string(current.samples) +
         " x " + std::to_string(current.channels) + " x " + std::to_string(current.spatial) +
         (current.rows ? " rows" : " planes") + ", activation " +
         std::to_string(static_cast<int>(current.activation)) + (current.residual ? ", residual" : "") +
         (current.signs ? ", signs" : "") + ", gap " + std::to_string(current.gap) + ", shift " +
         std::to_string(current.shift);
}

constexpr float momentum = 0.25f;

// --- one case --------------------------------------------------------------------------------------------------------

template <class Element>
struct Tensors {
  ChannelShape shape;
  ChannelTensor<Element> input, residual, grad_output, output, grad_input, grad_residual;
  Matrix<float> weight, bias, statistics, running_mean, grad_weight, grad_bias;
  Matrix<bfloat16> running_var;
  Bytes signs;
  std::vector<double> before_mean, before_var;

  Tensors(const Case& current, const ChannelShape& shape)
      : shape(shape),
        input(shape, current.gap, current.shift),
        residual(shape, current.gap, current.shift),
        grad_output(shape, current.gap, current.shift),
        output(shape),
        grad_input(shape),
        grad_residual(shape),
        weight(1, shape.channels),
        bias(1, shape.channels),
        statistics(2, shape.channels),
        running_mean(1, shape.channels),
        grad_weight(1, shape.channels),
        grad_bias(1, shape.channels),
        running_var(1, shape.channels),
        signs((shape.rows ? shape.per_channel() : shape.samples * shape.channels) * shape.sign_bytes_per_line()) {
    std::mt19937_64 random(static_cast<uint64_t>(shape.channels * 1000 + shape.per_channel()));
    input.fill(random, 2.0, 1.0);
    residual.fill(random, 0.0, 1.0);
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

  BatchNormForwardArguments forward(const Case& current) {
    BatchNormForwardArguments arguments{};
    arguments.input = input.data;
    arguments.residual = current.residual ? residual.data : nullptr;
    arguments.output = output.data;
    arguments.signs = current.signs ? signs.data() : nullptr;
    arguments.weight = {weight.data, DType::Float32};
    arguments.bias = {bias.data, DType::Float32};
    arguments.running_mean = {running_mean.data, DType::Float32};
    arguments.running_var = {running_var.data, DType::BFloat16};
    arguments.mean = statistics.data;
    arguments.rstd = statistics.data + shape.channels;
    arguments.shape = shape;
    arguments.input_stride = input.stride;
    arguments.residual_stride = residual.stride;
    arguments.activation = {current.activation, slope};
    arguments.momentum = momentum;
    arguments.eps = eps;
    return arguments;
  }

  BatchNormBackwardArguments backward(const Case& current) {
    BatchNormBackwardArguments arguments{};
    arguments.grad_output = grad_output.data;
    arguments.input = input.data;
    arguments.residual = current.residual && !current.signs ? residual.data : nullptr;
    arguments.signs = current.signs ? signs.data() : nullptr;
    arguments.mean = statistics.data;
    arguments.rstd = statistics.data + shape.channels;
    arguments.weight = {weight.data, DType::Float32};
    arguments.bias = {bias.data, DType::Float32};
    arguments.grad_input = grad_input.data;
    arguments.grad_residual = current.residual ? grad_residual.data : nullptr;
    arguments.grad_weight = grad_weight.data;
    arguments.grad_bias = grad_bias.data;
    arguments.shape = shape;
    arguments.grad_output_stride = grad_output.stride;
    arguments.input_stride = input.stride;
    arguments.residual_stride = residual.stride;
    arguments.activation = {current.activation, slope};
    arguments.training = current.how != How::evaluation;
    return arguments;
  }

  void check_channel(const Case& current, int64_t channel) {
    const bool training = current.how != How::evaluation;
    const int64_t count = shape.per_channel();
    double mean = 0, size = 0, variance = 0;
    for (int64_t index = 0; index < count; ++index) mean += input.of(channel, index) / count;
    for (int64_t index = 0; index < count; ++index) size += std::abs(input.of(channel, index)) / count;
    for (int64_t index = 0; index < count; ++index) variance += std::pow(input.of(channel, index) - mean, 2) / count;
    const double unbiased = variance * count / std::max<int64_t>(count - 1, 1);
    if (training) {
      require_close<float>("running_mean", running_mean.value(0, channel),
                           (1 - momentum) * before_mean[channel] + momentum * mean, size + 4);
      require_close<bfloat16>("running_var", running_var.value(0, channel),
                              (1 - momentum) * before_var[channel] + momentum * unbiased, unbiased + 2);
    } else {
      mean = before_mean[channel];
      size = std::abs(mean);
      variance = before_var[channel];
    }
    const double rstd = 1 / std::sqrt(variance + eps);
    require_close<float>("mean", statistics.value(0, channel), mean, size);
    require_close<float>("rstd", statistics.value(1, channel), rstd, rstd * (1 + size * rstd));

    const double scale = weight.value(0, channel), offset = bias.value(0, channel);
    std::vector<double> gradients, terms, shifts;
    double plain = 0, projection = 0, plain_size = 0, projection_size = 0;
    for (int64_t index = 0; index < count; ++index) {
      const double normalized = (input.of(channel, index) - mean) * rstd;
      const double added = current.residual ? residual.of(channel, index) : 0.0;
      const double z = normalized * scale + offset + added;
      const double shift = (std::abs(input.of(channel, index)) + size) * rstd;
      const double z_size = shift * std::abs(scale) + std::abs(offset) + std::abs(added);
      require_close<Element>("output", output.of(channel, index), activated(current.activation, z), 1.2 * z_size);
      gradients.push_back(grad_output.of(channel, index) * derivative(current.activation, z));
      terms.push_back(1.2 * std::abs(grad_output.of(channel, index)) * (1 + z_size));
      shifts.push_back(shift);
      if (current.residual) {
        require_close<Element>("grad_residual", grad_residual.of(channel, index), gradients.back(), terms.back());
      }
      plain += gradients.back();
      plain_size += terms.back();
      projection += gradients.back() * normalized;
      projection_size += terms.back() * shift;
    }
    require_close<float>("grad_bias", grad_bias.value(0, channel), plain, plain_size);
    require_close<float>("grad_weight", grad_weight.value(0, channel), projection, projection_size);
    const double share = training ? 1.0 / count : 0.0;
    for (size_t index = 0; index < gradients.size(); ++index) {
      const int64_t place = static_cast<int64_t>(index);
      const double normalized = (input.of(channel, place) - mean) * rstd;
      require_close<Element>(
          "grad_input", grad_input.of(channel, place),
          rstd * scale * (gradients[index] - share * (plain + normalized * projection)),
          rstd * std::abs(scale) * (terms[index] + share * (plain_size + shifts[index] * projection_size)));
    }
  }
};

template <class Element>
void run_streaming(const Case& current, Tensors<Element>& tensors, const DeviceTraits& device) {
  const BatchNormForwardArguments forward = tensors.forward(current);
  const bool evaluation = current.how == How::evaluation;
  if (!evaluation) {
    const PlannedStream planned = plan_statistics<Element>(forward, device);
    Matrix<float> partials(1, std::max<int64_t>(planned.partial_floats(), 1));
    require(launch_statistics<Element>(planned, forward, partials.data, false, nullptr));
  }
  require(launch_apply<Element>(forward, evaluation, device, nullptr));
  const StreamBackward planned = plan_stream_backward<Element>(tensors.backward(current), device);
  Matrix<float> workspace(1, std::max<int64_t>(planned.workspace_floats(), 1));
  require(launch_stream_backward<Element>(planned, workspace.data, device, nullptr));
}

#if !defined(FASTREG_STANDALONE_STREAMING)
template <class Element>
void run_resident(const Case& current, Tensors<Element>& tensors, const DeviceTraits& device) {
  const auto launch_planned = [&](const ResidentPlan& plan, const auto& launch_it) {
    if (plan.kind == ResidentKind::none) throw std::runtime_error("the plan does not keep this case on chip");
    Matrix<float> workspace(1, std::max<int64_t>(plan.workspace_bytes() / 4, 1));
    require(launch_it(workspace.data));
  };
  ResidentPlan plan;
  const BatchNormForwardArguments forward = tensors.forward(current);
  require(plan_resident_forward<Element>(forward, device, plan));
  launch_planned(plan, [&](void* memory) { return launch_resident_forward<Element>(plan, forward, memory, nullptr); });
  const BatchNormBackwardArguments backward = tensors.backward(current);
  require(plan_resident_backward<Element>(backward, device, plan));
  launch_planned(plan,
                 [&](void* memory) { return launch_resident_backward<Element>(plan, backward, memory, nullptr); });
}
#endif

template <class Element>
void run_case(const Case& current, const DeviceTraits& device) {
  const ChannelShape shape{current.samples, current.channels, current.spatial, current.rows};
  Tensors<Element> tensors(current, shape);
  if (current.how != How::resident) {
#if !defined(FASTREG_STANDALONE_RESIDENT)
    run_streaming(current, tensors, device);
    for (int64_t channel = 0; channel < shape.channels; ++channel) tensors.check_channel(current, channel);
#endif
  } else {
#if !defined(FASTREG_STANDALONE_STREAMING)
    run_resident(current, tensors, device);
    for (int64_t channel = 0; channel < shape.channels; ++channel) tensors.check_channel(current, channel);
#endif
  }
}

// Streaming: packs of 16 bytes and of one element, planes that are not aligned though samples are; one block a channel or
// strip, and several; lanes without channels, the last step of a part not full; every activation. On chip: planes and
// rows in a block, in clusters and in several blocks that wait for each other; ragged planes, more slabs than groups, a
// last strip that is short.
constexpr Case cases[] = {
    {How::streaming, 90, 2, 3, 8, 25, false, Activation::relu, true, true, 0, 0},
    {How::streaming, 90, 8, 3, 1, 49, false, Activation::hardswish, true, false, 1, 0},
    {How::streaming, 90, 8, 5, 3, 72, false, Activation::leaky_relu, true, true, 8, 0},
    {How::streaming, 90, 2, 2, 9, 40, false, Activation::silu, false, false, 0, 0},
    {How::evaluation, 90, 8, 3, 2, 49, false, Activation::relu, true, true, 0, 1},
    {How::streaming, 90, 2, 37, 24, 1, true, Activation::gelu, true, false, 0, 0},
    {How::streaming, 90, 2, 5, 5, 9, true, Activation::relu, true, true, 0, 0},
    {How::streaming, 90, 40, 7, 264, 45, true, Activation::identity, false, false, 8, 0},
    {How::streaming, 90, 8, 41, 9, 2, true, Activation::gelu_tanh, true, false, 2, 1},
    {How::evaluation, 90, 8, 19, 40, 1, true, Activation::leaky_relu, true, true, 0, 0},
    {How::resident, 90, 2, 3, 5, 49, false, Activation::relu, true, true, 0, 0},
    {How::resident, 90, 2, 2, 37, 52, false, Activation::identity, false, false, 0, 0},
    {How::resident, 90, 6, 8, 3, 784, false, Activation::leaky_relu, true, true, 0, 0},
    {How::resident, 90, 6, 7, 3, 777, false, Activation::silu, true, false, 8, 0},
    {How::resident, 80, 4, 20, 2, 1000, false, Activation::relu, true, true, 0, 0},
    {How::resident, 90, 2, 3, 40, 49, true, Activation::relu, true, true, 0, 0},
    {How::resident, 90, 6, 2, 24, 100, true, Activation::silu, true, false, 8, 0},
    {How::resident, 90, 6, 2, 72, 300, true, Activation::relu, false, false, 0, 0},
    {How::resident, 90, 2, 3, 136, 7, true, Activation::gelu, false, false, 0, 0},
    {How::resident, 90, 2, 1, 72, 400, true, Activation::leaky_relu, true, true, 0, 0},
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
