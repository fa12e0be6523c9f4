"""Tensors of a group or instance norm, and what either is equivalent to in torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from batch_norm_examples import ACTIVATIONS, leaves_of
from batch_norm_examples import tensors as with_residual
from fastreg.functional import group_norm, instance_norm

RUNNING = ("running_mean", "running_var")
# A group norm, an instance norm of its input alone, and one that moves running statistics.
KINDS = ("group_norm", "instance_norm", "tracking")


def tensors(
    device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 6, 3, 4)
) -> dict[str, torch.Tensor]:
    """An input, parameters and running statistics."""
    given = with_residual(device, dtype, shape)
    del given["residual"]
    return given


def norm_of(kind: str, ours: bool, activation: str | None = None, **options: Any) -> Any:
    """(input, weight, bias, running_mean, running_var) to the output of ours, or of what it is equivalent to."""

    def call(
        input: torch.Tensor, weight: Any = None, bias: Any = None, mean: Any = None, var: Any = None
    ) -> torch.Tensor:
        fused = {"activation": activation} if ours else {}
        if kind == "group_norm":
            function = group_norm if ours else F.group_norm
            output = function(input, 3, weight, bias, **options, **fused)
        else:
            running = (mean, var) if kind == "tracking" else (None, None)
            function = instance_norm if ours else F.instance_norm
            output = function(input, *running, weight, bias, **options, **fused)
        return output if ours else ACTIVATIONS[activation](output)  # type: ignore[no-any-return]

    return call


__all__ = ["ACTIVATIONS", "KINDS", "RUNNING", "leaves_of", "norm_of", "tensors"]
