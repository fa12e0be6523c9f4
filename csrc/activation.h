// The activations that a norm may end with, numbered as in fastreg/_activations.py. No torch here: device code and
// the CPU kernels include this too.

#pragma once

namespace fastreg {

enum class Activation : int { identity = 0, relu = 1, leaky_relu = 2, silu = 3, gelu = 4, gelu_tanh = 5, hardswish = 6 };

constexpr int activation_count = 7;

// Whether the derivative depends on the sign of the argument only, so that one bit an element stands for it.
constexpr bool needs_sign_only(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu;
}

}  // namespace fastreg
