"""The criterion: is a result within the rounding budget of the exact value?

The exact value is computed in float64 from the same rounded inputs, and with it, for each element, S: the sum of
the absolute values of the terms that were added to make it, including those that a rounded mean brings in. An
element may be off by half an ulp of its own dtype (the one rounding at the store) plus sixteen fp32 roundings of
those terms:

    |actual - exact| <= 0.51 * eps(dtype) * |exact| + 16 * 2^-24 * S

For float32 the first term is 0 and for float64 the unit is 2^-53. A store that always rounds the same way stays within
this; the mean signed error, in ulps, gives it away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROUNDINGS = 16
HALF_DTYPES = (torch.float16, torch.bfloat16)
_MINIMUM_SAMPLE, _LARGEST_SAMPLE = 64, 4096


class Rejected(AssertionError):
    """A result is not what the op's contract promises."""


@dataclass(frozen=True)
class Exact:
    """What one output or gradient must be.

    Attributes:
        value: the exact value in float64.
        terms: S of the module's docstring, in float64, broadcastable to ``value``.
        dtype: the dtype in which the op has to return it.
    """

    value: torch.Tensor
    terms: torch.Tensor
    dtype: torch.dtype


def _spacing(exact: Exact) -> torch.Tensor:
    """eps(dtype) * |exact|, which stops shrinking at the smallest normal number."""
    limits = torch.finfo(exact.dtype)
    return limits.eps * exact.value.abs().clamp_min(limits.smallest_normal)


def budget(exact: Exact) -> torch.Tensor:
    """The largest error allowed for each element."""
    unit = 2.0**-53 if exact.dtype == torch.float64 else 2.0**-24
    allowed = ROUNDINGS * unit * exact.terms.expand_as(exact.value)
    if exact.dtype == torch.float64:
        # The exact value is itself computed in float64.
        allowed = 2 * allowed
    if exact.dtype in HALF_DTYPES:
        allowed = allowed + 0.51 * _spacing(exact)
    else:
        allowed = allowed + torch.finfo(exact.dtype).smallest_normal
    return allowed


def check(name: str, actual: torch.Tensor, exact: Exact) -> None:
    """Raise ``Rejected`` unless ``actual`` has the promised dtype and shape and lies within the budget of ``exact``."""
    if actual.dtype != exact.dtype:
        raise Rejected(f"{name}: dtype {actual.dtype}, expected {exact.dtype}")
    if actual.shape != exact.value.shape:
        raise Rejected(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.value.shape)}")
    if actual.numel() == 0:
        return
    found = actual.detach().to("cpu", torch.float64)
    allowed = budget(exact)
    error = found - exact.value
    # Beyond the dtype's range the right result is an infinity, which the difference turns into one as well.
    overflow = exact.value.abs() + allowed > torch.finfo(exact.dtype).max
    wrong = ~(error.abs() <= allowed) & ~(overflow & (found * exact.value > 0))
    if wrong.any():
        index = tuple(torch.nonzero(wrong)[0].tolist())
        raise Rejected(
            f"{name}: {int(wrong.sum())} of {found.numel()} elements are off, the first at {index}: "
            f"{found[index].item():.9g}, exact {exact.value[index].item():.9g}, "
            f"error {error[index].item():.3g}, allowed {allowed[index].item():.3g}"
        )
    if exact.dtype in HALF_DTYPES:
        _check_signed_error(name, error, exact)


def _check_signed_error(name: str, error: torch.Tensor, exact: Exact) -> None:
    """Raise ``Rejected`` if the errors of a half-precision store lean to one side.

    An error of rounding to nearest is spread evenly over half an ulp either way: its mean over n elements has a
    standard deviation of 0.29 / sqrt(n) ulp. Six of those are allowed, and 0.2 ulp for exact values that lie on a
    grid of their own (a constant times float16 inputs) and for the fp32 part of the budget; where that part alone
    may exceed 0.1 ulp (a huge mean was subtracted) nothing can be told. A store that truncates leans by 0.5 ulp.
    """
    limits = torch.finfo(exact.dtype)
    size = exact.value.abs()
    ulp = limits.eps * torch.exp2(torch.floor(torch.log2(size)))
    counted = (size > limits.smallest_normal) & (size < limits.max / 2)
    counted &= ROUNDINGS * 2.0**-24 * exact.terms.expand_as(ulp) < 0.1 * ulp
    sample = size[counted][:_LARGEST_SAMPLE]
    # Equal significands (rows of an expanded input, powers of two apart) round alike and count as one draw.
    draws = torch.unique(torch.frexp(sample).mantissa).numel()
    # So do values that crowd between a few neighbours of the dtype: two elements, normalised, are -1 and 1 but for eps.
    rounded = torch.unique(sample.to(exact.dtype)).numel()
    if min(draws, rounded) < _MINIMUM_SAMPLE:
        return
    signed = error[counted] / ulp[counted]
    limit = 0.2 + 6 * 0.29 / math.sqrt(draws)
    toward_zero = (signed * torch.sign(exact.value[counted])).mean().item()
    for direction, mean in (("upward", signed.mean().item()), ("away from zero", toward_zero)):
        if abs(mean) > limit:
            raise Rejected(
                f"{name}: the store leans {direction} by {mean:.3f} ulp on average, allowed {limit:.3f}"
            )
