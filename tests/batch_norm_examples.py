"""Tensors of a batch norm, and what it is equivalent to in torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
}


def composite(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *arguments: Any,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> torch.Tensor:
    """What ours is equivalent to, in torch's own operations."""
    normalized = F.batch_norm(input, running_mean, running_var, *arguments, **options)
    return ACTIVATIONS[activation](normalized if residual is None else normalized + residual)  # type: ignore[no-any-return]


def tensors(
    device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 5, 3, 2)
) -> dict[str, torch.Tensor]:
    """An input, a residual, parameters and running statistics."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": shape, "residual": shape, "weight": shape[1:2], "bias": shape[1:2]}
    drawn = {
        name: torch.randn(each, generator=generator, dtype=torch.float64) for name, each in shapes.items()
    }
    statistics = {
        "running_mean": torch.randn(shape[1], generator=generator, dtype=torch.float64),
        "running_var": torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5,
    }
    return {name: each.to(device, dtype) for name, each in {**drawn, **statistics}.items()}


def leaves_of(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Clones, those that can be differentiated requiring it."""
    return {name: each.clone().requires_grad_("running" not in name) for name, each in given.items()}
