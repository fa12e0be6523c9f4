"""Batch normalisation, with a residual and an activation, in Triton.

The operators: which kernels a call takes. They are launched by _batch_norm_launchers.py, their configurations are
chosen by _batch_norm_launch.py. Arithmetic is fp32 whatever the dtype of memory, and two runs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastreg._activations import IDENTITY
from fastreg._channels import empty_dense
from fastreg.backends.triton import _batch_norm_launch as _launches
from fastreg.backends.triton import _device
from fastreg.backends.triton._batch_norm_launchers import (
    Vector,
    batch_statistics,
    differentiate,
    differentiate_on_chip,
    exact,
    like,
    normalize,
    normalize_on_chip,
    pairs,
    signs_of,
    sum_up,
    view_of,
)


def batch_norm_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: Vector,
    bias: Vector,
    running_mean: Vector,
    running_var: Vector,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    skip_nonfinite: bool,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output from the batch's statistics, the statistics, and the signs; updates the running statistics."""
    view = view_of(input)
    if input.numel() == 0:
        return empty_dense(input, view.rows), pairs(view, input, math.nan), signs_of(view, input, False)
    slab = _launches.forward_slab(view, input.element_size(), _device.multiprocessors(input))
    running = (running_mean, running_var)
    if slab is None:
        statistics = batch_statistics(view, input, running, momentum, eps, skip_nonfinite, rstd=True)
        parameters = (weight, bias, None, None, statistics)
        output, signs = normalize(
            view, input, residual, parameters, eps, activation, negative_slope, keep_signs
        )
        return output, statistics, signs
    return normalize_on_chip(
        *(view, slab, input, residual, weight, bias, running, momentum, eps),
        *(activation, negative_slope, skip_nonfinite, keep_signs),
    )


def batch_norm_eval(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: Vector,
    bias: Vector,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output from the running statistics, these as mean and rstd, and the signs."""
    view = view_of(input)
    statistics = pairs(view, input, math.nan if input.numel() == 0 else None)
    parameters = (weight, bias, running_mean, running_var, statistics)
    output, signs = normalize(view, input, residual, parameters, eps, activation, negative_slope, keep_signs)
    return output, statistics, signs


def batch_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: Vector,
    bias: Vector,
    training: bool,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual, weight and bias; an empty tensor for one that is not asked for."""
    view = view_of(input)
    wants_input, wants_residual = output_mask[0], output_mask[1]
    grad_input = empty_dense(input, view.rows) if wants_input else input.new_empty(0)
    grad_residual = empty_dense(input, view.rows) if wants_residual else input.new_empty(0)
    grad_weight = like(weight, input, output_mask[2])
    grad_bias = like(bias, input, output_mask[3])
    gradients = (grad_input, grad_residual, grad_weight, grad_bias)
    if input.numel() == 0:
        return grad_input, grad_residual, grad_weight.zero_(), grad_bias.zero_()
    tensors = (grad_output, input, *_of_activation(residual, signs, activation))
    parameters = (statistics, weight, bias)
    given = tuple(each if each.numel() else None for each in gradients)
    sums_wanted = given[2] is not None or given[3] is not None or (training and wants_input)
    if not sums_wanted:
        if wants_input or wants_residual:
            differentiate(view, tensors, parameters, None, 1, given[:2], activation, negative_slope)
        return gradients
    slab = _launches.backward_slab(view, input.element_size(), _device.multiprocessors(input))
    if training and slab is not None:
        differentiate_on_chip(view, slab, tensors, parameters, given, activation, negative_slope)
        return gradients
    sums = pairs(view, input) if training and wants_input else None
    # The gradient of the input waits for the sums, unless statistics are constants.
    written = (None if training else given[0], given[1])
    sum_up(view, tensors, parameters, (sums, given[2], given[3]), written, activation, negative_slope)
    if sums is not None:
        if wants_residual and exact(input, activation):
            # The residual's gradient is dz, and stands for all that it was computed from.
            tensors, activation = (grad_residual, input, None, None), IDENTITY
        wanted = (given[0], None)
        differentiate(view, tensors, parameters, sums, view.per_channel, wanted, activation, negative_slope)
    return gradients


def batch_norm_moments(input: torch.Tensor) -> torch.Tensor:
    """Mean and sum of squared deviations of every channel, (2, C)."""
    view = view_of(input)
    if input.numel() == 0:
        return pairs(view, input, 0.0)
    return batch_statistics(view, input, (None, None), 0.0, 0.0, skip_nonfinite=False, rstd=False)


def batch_norm_apply(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: Vector,
    bias: Vector,
    statistics: torch.Tensor,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output from given statistics, and the signs."""
    parameters = (weight, bias, None, None, statistics)
    return normalize(view_of(input), input, residual, parameters, 0.0, activation, negative_slope, keep_signs)


def batch_norm_sums(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: Vector,
    bias: Vector,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """Of every channel the sums of dz and of dz * xhat, (2, C), dz being the gradient before the activation."""
    view = view_of(input)
    if input.numel() == 0:
        return pairs(view, input, 0.0)
    sums = pairs(view, input)
    tensors = (grad_output, input, *_of_activation(residual, signs, activation))
    sum_up(
        view,
        tensors,
        (statistics, weight, bias),
        (sums, None, None),
        (None, None),
        activation,
        negative_slope,
    )
    return sums


def batch_norm_bwd_apply(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: Vector,
    bias: Vector,
    means: torch.Tensor | None,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and residual from the means of dz and dz * xhat; from constant statistics if None."""
    view = view_of(input)
    wanted = [
        empty_dense(input, view.rows) if each else input.new_empty(0)
        for each in (output_mask[0], output_mask[1])
    ]
    if input.numel() and any(output_mask):
        tensors = (grad_output, input, *_of_activation(residual, signs, activation))
        given = tuple(each if each.numel() else None for each in wanted)
        differentiate(view, tensors, (statistics, weight, bias), means, 1, given, activation, negative_slope)
    return wanted[0], wanted[1]


def _of_activation(
    residual: torch.Tensor | None, signs: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the derivative of the activation needs of these two."""
    if activation == IDENTITY:
        return None, None
    return (residual, None) if signs is None or signs.numel() == 0 else (None, signs)
