// What the programs of the norms over channels have in common, besides standalone.h: their tensors, and the activations
// in fp64.

#pragma once

#include "batch_norm.cuh"
#include "standalone.h"

namespace {

using fastreg::Activation;

constexpr float eps = 1e-5f;
constexpr float slope = 0.125f;

// --- tensors of channels ---------------------------------------------------------------------------------------------

template <class Element>
struct ChannelTensor : Matrix<Element> {
  ChannelShape shape;

  explicit ChannelTensor(const ChannelShape& shape, int64_t gap = 0, int64_t shift = 0)
      : Matrix<Element>(shape.rows ? shape.per_channel() : shape.samples, shape.dense_stride(), gap, shift),
        shape(shape) {}

  // The i-th element of a channel, over all samples.
  double of(int64_t channel, int64_t index) {
    return shape.rows ? this->value(index, channel)
                      : this->value(index / shape.spatial, channel * shape.spatial + index % shape.spatial);
  }
};

// --- the truth -------------------------------------------------------------------------------------------------------

double activated(Activation activation, double z) {
  switch (activation) {
    case Activation::relu:
      return z <= 0 ? 0 : z;
    case Activation::leaky_relu:
      return z > 0 ? z : z * slope;
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::gelu:
      return z * 0.5 * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return z * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::hardswish:
      return z * std::clamp(z + 3, 0.0, 6.0) / 6;
    default:
      return z;
  }
}

double derivative(Activation activation, double z) {
  switch (activation) {
    case Activation::relu:
      return z <= 0 ? 0 : 1;
    case Activation::leaky_relu:
      return z > 0 ? 1 : slope;
    case Activation::hardswish:
      return z <= -3 ? 0 : z < 3 ? z / 3 + 0.5 : 1;
    default:
      // Central differences are good to 1e-9 where nothing has a kink, a hundredth of what fp32 may be off.
      constexpr double step = 1e-5;
      return (activated(activation, z + step) - activated(activation, z - step)) / (2 * step);
  }
}

}  // namespace
