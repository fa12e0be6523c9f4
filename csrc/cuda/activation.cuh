// The activations that a norm may end with, and their derivatives, in fp32.
//
// Which one it is, is known at run time only, and the same for all threads: each function switches once for all the
// values that a thread has at hand, so that the branch costs nothing beside them. What `relu` and `leaky_relu` do is
// decided by comparisons whose outcome is one bit a value; backward takes either the argument or those bits.

#pragma once

#include "../activation.h"
#include "device.cuh"

namespace fastreg::cuda {

struct ActivationArguments {
  Activation kind;
  float negative_slope;  // of leaky_relu
};

// --- the parts of them that cost more than an instruction or two -----------------------------------------------------

// Four instructions. The product is off by what the argument's own rounding is off by; what overflows in the denominator
// gives 0, as it should.
__device__ __forceinline__ float sigmoid(float value) {
  constexpr float bits_of_e = 1.44269504f;  // log2(e)
  return reciprocal_approximate(1.0f + exp2_approximate(-bits_of_e * value));
}

// The standard normal distribution: the integral up to `value`, and its density there.
__device__ __forceinline__ float normal_integral(float value) { return 0.5f + 0.5f * erff(value * 0.70710678f); }
__device__ __forceinline__ float normal_density(float value) { return 0.39894228f * expf(-0.5f * value * value); }

// What gelu_tanh has in place of the integral: (1 + tanh(slope * (value + cubic * value^3))) / 2.
inline constexpr float gelu_tanh_slope = 0.79788456f;
inline constexpr float gelu_tanh_cubic = 0.044715f;

__device__ __forceinline__ float gelu_tanh_argument(float value) {
  return gelu_tanh_slope * (value + gelu_tanh_cubic * value * value * value);
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <int count>
__device__ __forceinline__ void activate(const ActivationArguments& activation, float (&values)[count]) {
  const auto each = [&](const auto& function) {
#pragma unroll
    for (int index = 0; index < count; ++index) values[index] = function(values[index]);
  };
  switch (activation.kind) {
    case Activation::identity:
      return;
    case Activation::relu:
      return each([](float value) { return value <= 0.0f ? 0.0f : value; });
    case Activation::leaky_relu:
      return each([&](float value) { return value > 0.0f ? value : value * activation.negative_slope; });
    case Activation::silu:
      return each([](float value) { return value * sigmoid(value); });
    case Activation::gelu:
      return each([](float value) { return value * normal_integral(value); });
    case Activation::gelu_tanh:
      return each([](float value) { return 0.5f * value * (1.0f + tanhf(gelu_tanh_argument(value))); });
    case Activation::hardswish:
      return each([](float value) { return value * (fminf(fmaxf(value + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f)); });
  }
}

// Bit i: what backward has to know of the i-th argument, if that is one bit.
template <int count>
__device__ __forceinline__ uint32_t sign_bits(const ActivationArguments& activation, const float (&arguments)[count]) {
  const bool relu = activation.kind == Activation::relu;
  uint32_t bits = 0;
#pragma unroll
  for (int index = 0; index < count; ++index) {
    const bool passes = relu ? !(arguments[index] <= 0.0f) : arguments[index] > 0.0f;
    bits |= passes ? 1u << index : 0u;
  }
  return bits;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Multiplies the gradients by the derivative, of relu or leaky_relu, that the bits stand for.
template <int count>
__device__ __forceinline__ void differentiate_by_bits(const ActivationArguments& activation, uint32_t bits,
                                                      float (&gradients)[count]) {
  // Not a product for relu: what does not pass is 0 even where the gradient is inf or NaN.
  const bool relu = activation.kind == Activation::relu;
#pragma unroll
  for (int index = 0; index < count; ++index) {
    const float otherwise = relu ? 0.0f : gradients[index] * activation.negative_slope;
    gradients[index] = (bits >> index & 1u) != 0 ? gradients[index] : otherwise;
  }
}

// Multiplies the gradients by the derivative at the arguments.
template <int count>
__device__ __forceinline__ void differentiate(const ActivationArguments& activation, const float (&arguments)[count],
                                              float (&gradients)[count]) {
  const auto times = [&](const auto& derivative) {
#pragma unroll
    for (int index = 0; index < count; ++index) gradients[index] *= derivative(arguments[index]);
  };
  switch (activation.kind) {
    case Activation::identity:
      return;
    case Activation::relu:
    case Activation::leaky_relu:
      return differentiate_by_bits(activation, sign_bits(activation, arguments), gradients);
    case Activation::silu:
      return times([](float value) {
        const float share = sigmoid(value);
        return share * (1.0f + value * (1.0f - share));
      });
    case Activation::gelu:
      return times([](float value) { return normal_integral(value) + value * normal_density(value); });
    case Activation::gelu_tanh:
      return times([](float value) {
        const float tangent = tanhf(gelu_tanh_argument(value));
        const float inner = gelu_tanh_slope * (1.0f + 3.0f * gelu_tanh_cubic * value * value);
        return 0.5f * (1.0f + tangent) + 0.5f * value * (1.0f - tangent * tangent) * inner;
      });
    case Activation::hardswish:
      return times([](float value) {
        return value <= -3.0f ? 0.0f : value < 3.0f ? value * (1.0f / 3.0f) + 0.5f : 1.0f;
      });
  }
}

}  // namespace fastreg::cuda
