"""The activations that a norm may end with, in fp32, and their derivatives.

``ACTIVATION`` is a number of fastreg/_activations.py. All but erf are made of tl.exp: the interpreter has no libdevice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg import _activations as names

IDENTITY = tl.constexpr(names.IDENTITY)
RELU = tl.constexpr(names.RELU)
LEAKY_RELU = tl.constexpr(names.LEAKY_RELU)
SILU = tl.constexpr(names.SILU)
GELU = tl.constexpr(names.GELU)
GELU_TANH = tl.constexpr(names.GELU_TANH)
HARDSWISH = tl.constexpr(names.HARDSWISH)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# 2 * sqrt(2 / pi), and that times 0.044715.
_TANH_LINEAR = tl.constexpr(1.5957691216057308)
_TANH_CUBIC = tl.constexpr(0.07135481627260025)


@triton.jit
def activate(z: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation of ``z``; ``slope`` is leaky ReLU's."""
    result = z
    if ACTIVATION == RELU:
        # Not a maximum: a NaN stays one.
        result = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == LEAKY_RELU:
        result = tl.where(z > 0.0, z, z * slope)
    elif ACTIVATION == SILU:
        result = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == GELU:
        result = 0.5 * z * (1.0 + tl.math.erf(z * _SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 is the sigmoid of 2u, which does not cancel where tanh is near -1.
        result = z / (1.0 + tl.exp(-z * (_TANH_LINEAR + _TANH_CUBIC * z * z)))
    elif ACTIVATION == HARDSWISH:
        result = z * (tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0))
    return result


@triton.jit
def differentiate(grad: tl.tensor, z: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """``grad`` times the activation's derivative at ``z``."""
    result = grad
    if ACTIVATION == RELU:
        result = tl.where(z <= 0.0, 0.0, grad)
    elif ACTIVATION == LEAKY_RELU:
        result = tl.where(z > 0.0, grad, grad * slope)
    elif ACTIVATION == SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        result = grad * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    elif ACTIVATION == GELU:
        below = 0.5 * (1.0 + tl.math.erf(z * _SQRT_HALF))
        result = grad * (below + z * (_INVERSE_SQRT_2_PI * tl.exp(-0.5 * z * z)))
    elif ACTIVATION == GELU_TANH:
        square = z * z
        sigmoid = 1.0 / (1.0 + tl.exp(-z * (_TANH_LINEAR + _TANH_CUBIC * square)))
        # Beyond 10 the sigmoid is 0 or 1, and what it would be multiplied by may be infinite.
        inner = tl.where(tl.abs(z) < 10.0, z * (_TANH_LINEAR + 3.0 * _TANH_CUBIC * square), 0.0)
        result = grad * (sigmoid * (1.0 + (1.0 - sigmoid) * inner))
    elif ACTIVATION == HARDSWISH:
        slanted = grad * (z * (1.0 / 3.0) + 0.5)
        result = tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, slanted, grad))
    return result


@triton.jit
def differentiate_by_sign(
    grad: tl.tensor, positive: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr
) -> tl.tensor:
    """The same of ReLU and leaky ReLU, where a bit that forward kept says on which side ``z`` was."""
    result = tl.where(positive, grad, 0.0)
    if ACTIVATION == LEAKY_RELU:
        result = tl.where(positive, grad, grad * slope)
    return result
