"""Instance normalisation, with an activation, in Triton: group norm of every channel by itself, and running statistics.

The kernels are those of group norm and one that moves the running statistics, from mean and sum of squared deviations
of every channel of every sample. The backward is group norm's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastreg.backends.triton import _batch_norm_launch as _channels
from fastreg.backends.triton import _device
from fastreg.backends.triton._batch_norm_launchers import Vector
from fastreg.backends.triton._batch_norm_moments import move
from fastreg.backends.triton._batch_norm_sums import merged
from fastreg.backends.triton._group_norm_tiles import SIZES
from fastreg.backends.triton.group_norm import normalize_groups_of


@triton.jit(do_not_specialize=SIZES)
def move_running_statistics(
    means: tl.tensor,
    squares: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    channels: tl.tensor,
    samples: tl.tensor,
    freedom: tl.tensor,
    momentum: tl.tensor,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """A step towards the mean over the samples, of CHANNELS channels; ``freedom`` divides their ``squares``."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < channels
    keep = tl.zeros_like(inside)
    mean = merged(means, channel, channels, samples, PARTS, CHANNELS) / samples.to(tl.float32)
    move(running_mean, channel, mean, momentum, keep, inside)
    variance = merged(squares, channel, channels, samples, PARTS, CHANNELS) / freedom
    move(running_var, channel, variance, momentum, keep, inside)


def instance_norm_fwd(
    input: torch.Tensor,
    weight: Vector,
    bias: Vector,
    running_mean: Vector,
    running_var: Vector,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and mean and rstd of every channel of every sample; updates the running statistics."""
    samples, channels = input.shape[:2]
    moves = running_mean is not None and running_var is not None and input.numel() > 0
    squares = None
    if moves:
        squares = torch.empty((samples, channels), dtype=torch.float32, device=input.device)
    output, statistics = normalize_groups_of(
        input, channels, weight, bias, eps, activation, negative_slope, squares
    )
    if moves:
        merge = _channels.merge(channels, samples)
        freedom = max(input.shape[2:].numel() - 1, 1) * samples
        with _device.current(input):
            move_running_statistics[(merge.programs,)](
                *(statistics[0], squares, running_mean, running_var, channels, samples),
                *(float(freedom), float(momentum)),
                PARTS=merge.parts,
                CHANNELS=merge.channels,
                num_warps=merge.warps,
            )
    return output, statistics
