"""Batch normalisation, with a residual and an activation, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg import _activations, _channels
from fastreg.backends.reference._activations import activate, differentiate, differentiate_by_sign
from fastreg.backends.reference._views import accumulate_dtype, along, wide

# --- the formula, differentiable -------------------------------------------------------------------------


def batch_norm_statistics(input: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and reciprocal standard deviation of every channel, as one (2, C) tensor; differentiable."""
    mean, squares = batch_norm_moments(input)
    return torch.stack((mean, torch.rsqrt(squares / max(_per_channel(input), 1) + eps)))


def batch_norm_argument(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
) -> torch.Tensor:
    """What the activation is applied to, in the dtype of computation; differentiable."""
    x = wide(input)
    mean, rstd = statistics[0], statistics[1]
    scale = rstd if weight is None else rstd * weight.to(x.dtype)
    argument = (x - along(mean, x)) * along(scale, x)
    if bias is not None:
        argument = argument + along(bias.to(x.dtype), x)
    return argument if residual is None else argument + residual.to(x.dtype)


def batch_norm_formula(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """The output from the batch's statistics, or from given ones; differentiable."""
    if statistics is None:
        statistics = batch_norm_statistics(input, eps)
    argument = batch_norm_argument(input, residual, weight, bias, statistics)
    return activate(argument, activation, negative_slope).to(input.dtype)


# --- the operators ---------------------------------------------------------------------------------------


def batch_norm_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    skip_nonfinite: bool,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output from the batch's statistics, the statistics, and the signs; updates the running statistics."""
    moments = batch_norm_moments(input)
    count = _per_channel(input)
    if running_mean is not None and running_var is not None and count > 0:
        update_running_statistics(moments, count, running_mean, running_var, momentum, skip_nonfinite)
    statistics = torch.stack((moments[0], torch.rsqrt(moments[1] / max(count, 1) + eps)))
    output, signs = batch_norm_apply(
        input, residual, weight, bias, statistics, activation, negative_slope, keep_signs
    )
    return output, statistics, signs


def batch_norm_eval(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output from the running statistics, these as mean and rstd, and the signs."""
    statistics = running_statistics(input, running_mean, running_var, eps)
    output, signs = batch_norm_apply(
        input, residual, weight, bias, statistics, activation, negative_slope, keep_signs
    )
    return output, statistics, signs


def batch_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual, weight and bias; an empty tensor for one that is not asked for."""
    sums = batch_norm_sums(
        grad_output, input, residual, signs, statistics, weight, bias, activation, negative_slope
    )
    means = sums / max(_per_channel(input), 1) if training else None
    grad_input, grad_residual = batch_norm_bwd_apply(
        *(grad_output, input, residual, signs, statistics, weight, bias, means),
        *(activation, negative_slope, output_mask[:2]),
    )
    grad_weight = (input if weight is None else weight).new_empty(0)
    grad_bias = (input if bias is None else bias).new_empty(0)
    # Copies also where the dtypes are equal: an operator's results may not share memory.
    if output_mask[2] and weight is not None:
        grad_weight = sums[1].to(weight.dtype, copy=True)
    if output_mask[3] and bias is not None:
        grad_bias = sums[0].to(bias.dtype, copy=True)
    return grad_input, grad_residual, grad_weight, grad_bias


def batch_norm_moments(input: torch.Tensor) -> torch.Tensor:
    """Mean and sum of squared deviations of every channel, (2, C); zeros where there is nothing; differentiable."""
    x = wide(input)
    dimensions = [dimension for dimension in range(x.dim()) if dimension != 1]
    mean = x.sum(dim=dimensions) / max(_per_channel(x), 1)
    squares = (x - along(mean, x)).square().sum(dim=dimensions)
    return torch.stack((mean, squares))


def batch_norm_apply(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output from given statistics, and the signs."""
    argument = batch_norm_argument(input, residual, weight, bias, statistics)
    rows = _channels.family(input)
    signs = input.new_empty(0, dtype=torch.uint8)
    if keep_signs and residual is not None and _activations.needs_sign_only(activation):
        positive = argument > 0 if activation == _activations.LEAKY_RELU else ~(argument <= 0)
        signs = _packed(positive, rows)
    output = activate(argument, activation, negative_slope).to(input.dtype)
    return _channels.dense(output, rows), signs


def batch_norm_sums(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """Of every channel the sums of dz and of dz * xhat, (2, C), dz being the gradient before the activation."""
    dz = _before_activation(
        grad_output, input, residual, signs, statistics, weight, bias, activation, negative_slope
    )
    dimensions = [dimension for dimension in range(dz.dim()) if dimension != 1]
    return torch.stack((dz.sum(dim=dimensions), (dz * _normalized(input, statistics)).sum(dim=dimensions)))


def batch_norm_bwd_apply(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    means: torch.Tensor | None,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and residual from the means of dz and dz * xhat; from constant statistics if None."""
    grad_input, grad_residual = input.new_empty(0), input.new_empty(0)
    dz = _before_activation(
        grad_output, input, residual, signs, statistics, weight, bias, activation, negative_slope
    )
    rows = _channels.family(input)
    if output_mask[0]:
        centred = dz
        if means is not None:
            removed = _normalized(input, statistics) * along(means[1], dz)
            centred = dz - along(means[0], dz) - removed
        rstd = statistics[1]
        scale = rstd if weight is None else rstd * weight.to(dz.dtype)
        grad_input = _channels.dense((centred * along(scale, dz)).to(input.dtype), rows)
    if output_mask[1]:
        grad_residual = _channels.dense(dz.to(input.dtype, copy=True), rows)
    return grad_input, grad_residual


# --- running statistics ----------------------------------------------------------------------------------


def running_statistics(
    input: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, eps: float
) -> torch.Tensor:
    """The running statistics as mean and rstd, (2, C)."""
    dtype = accumulate_dtype(input.dtype)
    return torch.stack((running_mean.to(dtype), torch.rsqrt(running_var.to(dtype) + eps)))


def update_running_statistics(
    moments: torch.Tensor,
    count: int | torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    skip_nonfinite: bool,
) -> None:
    """Move the running statistics towards the batch's, in place; the variance is the unbiased one."""
    unbiased = moments[1] / (max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp_min(1))
    keep = ~moments.isfinite().all(dim=0) if skip_nonfinite else None
    for running, batch in ((running_mean, moments[0]), (running_var, unbiased)):
        before = running.to(batch.dtype)
        after = before * (1 - momentum) + batch * momentum
        running.copy_(after if keep is None else torch.where(keep, before, after))


# --- parts -----------------------------------------------------------------------------------------------


def _per_channel(tensor: torch.Tensor) -> int:
    return tensor.shape[0] * tensor.shape[2:].numel()


def _normalized(input: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    x = wide(input)
    return (x - along(statistics[0], x)) * along(statistics[1], x)


def _before_activation(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """dz: the gradient of what the activation was applied to."""
    grad = wide(grad_output)
    if activation == _activations.IDENTITY:
        return grad
    if signs is not None:
        positive = _unpacked(signs, input)
        return differentiate_by_sign(grad, positive, activation, negative_slope)
    argument = batch_norm_argument(input, residual, weight, bias, statistics)
    return differentiate(grad, argument, activation, negative_slope)


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _packed(positive: torch.Tensor, rows: bool) -> torch.Tensor:
    """One bit an element, the lowest first; each plane, or row of channels, begins with a new byte."""
    lines = positive.movedim(1, -1) if rows else positive
    elements = positive.shape[1] if rows else positive.shape[2:].numel()
    lines = lines.reshape(positive.numel() // max(elements, 1), elements)
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[1] % 8))
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=positive.device)
    return (lines.reshape(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def _unpacked(signs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The signs as a tensor of booleans shaped like ``like``."""
    rows = _channels.family(like)
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=signs.device)
    elements = like.shape[1] if rows else like.shape[2:].numel()
    bits = (signs[:, None] & weights) != 0
    lines = bits.reshape(like.numel() // max(elements, 1), -(-elements // 8) * 8)[:, :elements]
    if rows:
        return lines.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return lines.reshape(like.shape)
