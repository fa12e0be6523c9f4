"""Instance normalisation in plain PyTorch: group normalisation of every channel by itself, and running statistics."""

from __future__ import annotations

import math

import torch

from fastreg.backends.reference import group_norm as of_groups


def instance_norm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the statistics, (2, N, C); moves the running statistics."""
    count = math.prod(input.shape[2:])
    moments = of_groups.group_norm_moments(input, input.shape[1])
    if running_mean is not None and running_var is not None and input.numel() > 0:
        update_running_statistics(moments, count, running_mean, running_var, momentum)
    statistics = of_groups.statistics_of(moments, count, eps)
    output = of_groups.group_norm_apply(input, statistics, weight, bias, activation, negative_slope)
    return output, statistics


def update_running_statistics(
    moments: torch.Tensor,
    count: int,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
) -> None:
    """Move the running statistics towards the mean over the samples, in place; the variance is the unbiased one."""
    unbiased = moments[1] / max(count - 1, 1)
    for running, batch in ((running_mean, moments[0].mean(dim=0)), (running_var, unbiased.mean(dim=0))):
        running.copy_(running.to(batch.dtype) * (1 - momentum) + batch * momentum)
