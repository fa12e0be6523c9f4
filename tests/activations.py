"""The activations in float64, with the absolute terms that budget the roundings of each and of its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

SMOOTH = ("silu", "gelu", "gelu_tanh")
NAMES = ("identity", "relu", "leaky_relu", *SMOOTH, "hardswish")

# Beyond it 1 - tanh^2 and 1 - sigmoid are zero in every dtype, and none of their terms is left.
_SATURATED = 20.0
# Where exp(-z) is beyond fp32, 1 / (1 + exp(-z)) is 0 instead of a value below fp32's smallest normal number.
_UNDERFLOW = torch.finfo(torch.float32).smallest_normal * 2**20
_BETA, _KAPPA = math.sqrt(2 / math.pi), 0.044715

Value = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """An activation of z and what its evaluation adds up.

    Attributes:
        value, slope: the function and its derivative.
        value_terms, slope_terms: the sums of the absolute terms of each, for an exact z.
    """

    value: Value
    slope: Value
    value_terms: Value
    slope_terms: Value


def activation(name: str | None, negative_slope: float) -> Activation:
    """The activation of that name; None is the identity."""
    return {
        "relu": _piecewise(0.0),
        "leaky_relu": _piecewise(negative_slope),
        "silu": _SILU,
        "gelu": _GELU,
        "gelu_tanh": _GELU_TANH,
        "hardswish": _HARDSWISH,
    }.get(name or "identity", _piecewise(1.0))


def _piecewise(below: float) -> Activation:
    """1 above zero, ``below`` elsewhere."""

    def slope(z: torch.Tensor) -> torch.Tensor:
        return torch.full_like(z, below).masked_fill(z > 0, 1.0)

    return Activation(
        value=lambda z: z * slope(z),
        slope=slope,
        value_terms=lambda z: (z * slope(z)).abs(),
        slope_terms=lambda z: slope(z).abs(),
    )


def _silu_slope(z: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))


def _sigmoid_terms(z: torch.Tensor) -> torch.Tensor:
    """exp(-z) is off by |z| roundings, of which 1 / (1 + exp(-z)) keeps the share 1 - sigmoid; or it overflows."""
    return torch.sigmoid(z) * (1 + z.abs() * torch.sigmoid(-z)) + _UNDERFLOW


_SILU = Activation(
    value=lambda z: z * torch.sigmoid(z),
    slope=_silu_slope,
    value_terms=lambda z: z.abs() * _sigmoid_terms(z),
    # 1 - sigmoid is a difference from 1, and multiplied by z.
    slope_terms=lambda z: _sigmoid_terms(z) * (1 + z.abs().clamp_max(_SATURATED)),
)


def _density(z: torch.Tensor) -> torch.Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _erf_terms(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)).abs())


_GELU = Activation(
    value=lambda z: 0.5 * z * torch.special.erfc(-z / math.sqrt(2)),
    slope=lambda z: 0.5 * torch.special.erfc(-z / math.sqrt(2)) + z * _density(z),
    value_terms=lambda z: z.abs() * _erf_terms(z),
    slope_terms=lambda z: _erf_terms(z) + z.abs() * _density(z) * (1 + z.square() / 2),
)


def _inner(z: torch.Tensor) -> torch.Tensor:
    return _BETA * (z + _KAPPA * z**3)


def _inner_slope(z: torch.Tensor) -> torch.Tensor:
    return _BETA * (1 + 3 * _KAPPA * z.square())


def _bell(z: torch.Tensor) -> torch.Tensor:
    """1 - tanh^2 of the inner polynomial, without the cancellation."""
    return torch.cosh(_inner(z).clamp(-300, 300)).pow(-2)


def _gelu_tanh_slope_terms(z: torch.Tensor) -> torch.Tensor:
    inner = _inner(z).abs()
    # 1 - tanh^2 is a difference from 1 until it is none at all.
    difference = torch.where(inner < _SATURATED, 1.0, 0.0)
    half = 0.5 * z.abs() * _inner_slope(z)
    return 0.5 * (1 + torch.tanh(inner)) + half * (_bell(z) * (1 + inner) + difference)


_GELU_TANH = Activation(
    value=lambda z: z * torch.sigmoid(2 * _inner(z)),
    slope=lambda z: torch.sigmoid(2 * _inner(z)) + 0.5 * z * _bell(z) * _inner_slope(z),
    value_terms=lambda z: 0.5 * z.abs() * (1 + torch.tanh(_inner(z).abs()) + _bell(z) * _inner(z).abs()),
    slope_terms=_gelu_tanh_slope_terms,
)


def _hardswish_slope(z: torch.Tensor) -> torch.Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0))


_HARDSWISH = Activation(
    value=lambda z: z * (z + 3).clamp(0, 6) / 6,
    slope=_hardswish_slope,
    value_terms=lambda z: torch.where(z.abs() < 3, z.abs() * (z.abs() + 3) / 6, z.clamp_min(0)),
    slope_terms=lambda z: torch.where(z.abs() < 3, z.abs() / 3 + 0.5, (z > 0).to(z.dtype)),
)
