"""What the autograd Functions of the row-wise norms share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_transforms_active = torch._C._are_functorch_transforms_active


def accumulate_dtype(input: torch.Tensor) -> torch.dtype:
    """The dtype of saved statistics: fp64 for fp64 input, else fp32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def rows(input: torch.Tensor, normalized_ndim: int) -> int:
    """The number of rows that a norm over the last ``normalized_ndim`` dimensions has."""
    return math.prod(input.shape[: input.dim() - normalized_ndim])


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work around this call.

    Those need rules for every operator that they meet; the plain PyTorch formula has them all, so it runs instead.
    """
    return forward_ad._current_level >= 0 or _transforms_active()


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records this call."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the Python frame of ``Function.apply``, which eager calls have no need of.

    That frame looks after transforms of ``torch.func``; it and what it calls cost 2 us, more than all our checks.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def fake_gradient(like: torch.Tensor | None, input: torch.Tensor, wanted: bool) -> torch.Tensor:
    """The fake of a gradient: shaped as its tensor where it is wanted, else empty."""
    if like is None:
        return input.new_empty(0)
    return like.new_empty(like.shape if wanted else (0,))


def autocast_to_float32(op: str, input: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[Any, ...]:
    """The arguments as torch's CUDA autocast would pass them on: in fp32, for the ops on its fp32 list.

    layer_norm and group_norm are on the list in every supported release, rms_norm from torch 2.12 on; CPU autocast
    leaves all of them alone.
    """
    tensors = (input, *parameters)
    if not (input.is_cuda and torch.is_autocast_enabled("cuda") and op in _CUDA_FLOAT32_OPS):
        return tensors
    return tuple(
        tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for tensor in tensors
    )


_TORCH_RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
_CUDA_FLOAT32_OPS = ("layer_norm", "group_norm", *(("rms_norm",) if _TORCH_RELEASE >= (2, 12) else ()))
