"""The activations in plain PyTorch, by number, and their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastreg import _activations as names


def activate(argument: torch.Tensor, activation: int, negative_slope: float) -> torch.Tensor:
    """The activation of ``argument``; differentiable as often as torch's own."""
    match activation:
        case names.RELU:
            return F.relu(argument)
        case names.LEAKY_RELU:
            return F.leaky_relu(argument, negative_slope)
        case names.SILU:
            return F.silu(argument)
        case names.GELU:
            return F.gelu(argument)
        case names.GELU_TANH:
            return F.gelu(argument, approximate="tanh")
        case names.HARDSWISH:
            return F.hardswish(argument)
    return argument


def differentiate(
    grad: torch.Tensor, argument: torch.Tensor, activation: int, negative_slope: float
) -> torch.Tensor:
    """``grad`` times the activation's derivative at ``argument``."""
    aten = torch.ops.aten
    match activation:
        case names.RELU:
            return torch.where(argument <= 0, 0.0, grad)
        case names.LEAKY_RELU:
            return torch.where(argument > 0, grad, grad * negative_slope)
        case names.SILU:
            # torch's own silu_backward has no derivative.
            sigmoid = torch.sigmoid(argument)
            return grad * sigmoid * (1 + argument * (1 - sigmoid))
        case names.GELU:
            return aten.gelu_backward(grad, argument)  # type: ignore[no-any-return]
        case names.GELU_TANH:
            return aten.gelu_backward(grad, argument, approximate="tanh")  # type: ignore[no-any-return]
        case names.HARDSWISH:
            return aten.hardswish_backward(grad, argument)  # type: ignore[no-any-return]
    return grad


def differentiate_by_sign(
    grad: torch.Tensor, signs: torch.Tensor, activation: int, negative_slope: float
) -> torch.Tensor:
    """``grad`` times the derivative of an activation that only a bit an element decides."""
    other: torch.Tensor | float = grad * negative_slope if activation == names.LEAKY_RELU else 0.0
    return torch.where(signs, grad, other)
