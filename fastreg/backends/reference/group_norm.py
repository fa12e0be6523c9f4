"""Group normalisation, with an activation, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastreg import _channels
from fastreg.backends.reference._activations import activate, differentiate
from fastreg.backends.reference._views import along, wide

# --- the formula, differentiable -------------------------------------------------------------------------


def group_norm_moments(input: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and sum of squared deviations of every group of every sample, (2, N, groups); differentiable."""
    x = wide(input)
    count = max(elements_of_group(input, groups), 1)
    mean = _over_group(_over_space(x), groups) / count
    squares = _over_group(_over_space((x - _of_groups(mean, x)).square()), groups)
    return torch.stack((mean, squares))


def group_norm_statistics(input: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Mean and reciprocal standard deviation of every group of every sample, (2, N, groups); differentiable."""
    return statistics_of(group_norm_moments(input, groups), elements_of_group(input, groups), eps)


def group_norm_formula(
    input: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """The output; differentiable."""
    statistics = group_norm_statistics(input, groups, eps)
    return activate(_argument(input, statistics, weight, bias), activation, negative_slope).to(input.dtype)


# --- the operators ---------------------------------------------------------------------------------------


def group_norm_fwd(
    input: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """activation((x - mean) * rstd * weight + bias), and the statistics of the groups."""
    statistics = group_norm_statistics(input, groups, eps)
    return group_norm_apply(input, statistics, weight, bias, activation, negative_slope), statistics


def group_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    groups: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; an empty tensor for one that is not asked for."""
    grad_input = input.new_empty(0)
    grad_weight = (input if weight is None else weight).new_empty(0)
    grad_bias = (input if bias is None else bias).new_empty(0)
    argument = _argument(input, statistics, weight, bias)
    dz = differentiate(wide(grad_output), argument, activation, negative_slope)
    rstd = _of_groups(statistics[1], dz)
    normalized = (wide(input) - _of_groups(statistics[0], dz)) * rstd
    plain, projected = _over_space(dz), _over_space(dz * normalized)
    if output_mask[0]:
        scaled, factor = dz, None
        if weight is not None:
            factor = weight.to(dz.dtype)
            scaled = dz * along(factor, dz)
        count = max(elements_of_group(input, groups), 1)
        means = [
            _of_groups(_over_group(sums if factor is None else sums * factor, groups) / count, dz)
            for sums in (plain, projected)
        ]
        centred = scaled - means[0] - normalized * means[1]
        grad_input = _channels.dense((rstd * centred).to(input.dtype), _channels.family(input))
    # Copies also where the dtypes are equal: an operator's results may not share memory.
    if output_mask[1] and weight is not None:
        grad_weight = projected.sum(dim=0).to(weight.dtype, copy=True)
    if output_mask[2] and bias is not None:
        grad_bias = plain.sum(dim=0).to(bias.dtype, copy=True)
    return grad_input, grad_weight, grad_bias


# --- parts, some of which instance norm uses too ---------------------------------------------------------


def elements_of_group(input: torch.Tensor, groups: int) -> int:
    """Of one sample."""
    return channels_of_group(input.shape[1], groups) * math.prod(input.shape[2:])


def channels_of_group(channels: int, groups: int) -> int:
    """An instance norm of no channels has no groups."""
    return channels // max(groups, 1)


def statistics_of(moments: torch.Tensor, count: int, eps: float) -> torch.Tensor:
    """Mean and rstd from mean and sum of squared deviations."""
    return torch.stack((moments[0], torch.rsqrt(moments[1] / max(count, 1) + eps)))


def group_norm_apply(
    input: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """The output from given statistics."""
    argument = _argument(input, statistics, weight, bias)
    output = activate(argument, activation, negative_slope).to(input.dtype)
    return _channels.dense(output, _channels.family(input))


def _argument(
    input: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """What the activation is applied to, in the dtype of computation."""
    x = wide(input)
    scale = _of_groups(statistics[1], x)
    if weight is not None:
        scale = scale * along(weight.to(x.dtype), x)
    argument = (x - _of_groups(statistics[0], x)) * scale
    return argument if bias is None else argument + along(bias.to(x.dtype), x)


def _over_space(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C): the sums of the planes."""
    # torch takes an empty list of dimensions for all of them.
    return tensor.sum(dim=list(range(2, tensor.dim()))) if tensor.dim() > 2 else tensor


def _over_group(sums: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, groups) from (N, C)."""
    return sums.reshape(sums.shape[0], groups, channels_of_group(sums.shape[1], groups)).sum(dim=2)


def _of_groups(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values of (N, groups), shaped to meet ``tensor``."""
    samples, groups = values.shape
    channels = tensor.shape[1]
    spread = values[:, :, None].expand(samples, groups, channels_of_group(channels, groups))
    return spread.reshape(samples, channels, *(1,) * (tensor.dim() - 2))
