"""Group normalisation, with an activation, in Triton.

The operators: which kernels a call takes. They are launched by _group_norm_launchers.py, their configurations are
chosen by _group_norm_launch.py. Arithmetic is fp32 whatever the dtype of memory, and two runs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastreg._channels import empty_dense
from fastreg.backends.triton import _group_norm_launch as _launches
from fastreg.backends.triton._batch_norm_launchers import Vector, like, view_of
from fastreg.backends.triton._group_norm_launchers import (
    differentiate,
    differentiate_on_chip,
    find_statistics,
    normalize,
    normalize_on_chip,
    pairs,
    reduce_sums,
    slab_of,
    sum_up,
)


def group_norm_fwd(
    input: torch.Tensor,
    groups: int,
    weight: Vector,
    bias: Vector,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and mean and rstd of every group of every sample."""
    return normalize_groups_of(input, groups, weight, bias, eps, activation, negative_slope, None)


def normalize_groups_of(
    input: torch.Tensor,
    groups: int,
    weight: Vector,
    bias: Vector,
    eps: float,
    activation: int,
    negative_slope: float,
    squares: Vector,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``group_norm_fwd``; ``squares``, (N, groups), gets the sums of squared deviations, if given."""
    view = view_of(input)
    if input.numel() == 0:
        return empty_dense(input, view.rows), pairs(input, groups).fill_(math.nan)
    slab = slab_of(_launches.forward_slab, view, groups, input)
    if slab is not None:
        return normalize_on_chip(
            view, slab, input, groups, weight, bias, eps, squares, activation, negative_slope
        )
    statistics = find_statistics(view, input, groups, eps, squares)
    output = normalize(view, input, groups, weight, bias, statistics, activation, negative_slope)
    return output, statistics


def group_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    groups: int,
    statistics: torch.Tensor,
    weight: Vector,
    bias: Vector,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; an empty tensor for one that is not asked for."""
    view = view_of(input)
    wants_input = output_mask[0]
    grad_input = empty_dense(input, view.rows) if wants_input else input.new_empty(0)
    grad_weight, grad_bias = like(weight, input, output_mask[1]), like(bias, input, output_mask[2])
    wants_weight, wants_bias = grad_weight.numel() > 0, grad_bias.numel() > 0
    if input.numel() == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    tensors, parameters = (grad_output, input), (statistics, weight, bias)
    end = (activation, negative_slope)
    slab = slab_of(_launches.backward_slab, view, groups, *tensors) if wants_input else None
    if slab is not None:
        wanted = (wants_bias, wants_weight)
        partial = differentiate_on_chip(view, slab, tensors, groups, parameters, grad_input, wanted, *end)
    elif wants_input or wants_weight or wants_bias:
        wanted = (wants_input or wants_bias, wants_input or wants_weight)
        partial = sum_up(view, tensors, groups, parameters, wanted, *end)
        if wants_input:
            differentiate(view, tensors, groups, parameters, partial, grad_input, *end)
    if wants_weight or wants_bias:
        reduce_sums(view, partial, grad_weight if wants_weight else None, grad_bias if wants_bias else None)
    return grad_input, grad_weight, grad_bias
