"""Root-mean-square normalisation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.reference._views import as_row, as_rows


def rms_norm_statistics(input: torch.Tensor, normalized_ndim: int, eps: float) -> torch.Tensor:
    """Reciprocal root mean square of every row, shape (rows,); differentiable."""
    return torch.rsqrt(as_rows(input, normalized_ndim).square().mean(dim=1) + eps)


def rms_norm_fwd(
    input: torch.Tensor, normalized_ndim: int, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * rstd * weight, and the statistics of the rows."""
    rstd = rms_norm_statistics(input, normalized_ndim, eps)
    output = as_rows(input, normalized_ndim) * rstd[:, None]
    if weight is not None:
        output = output * as_row(weight, output.dtype)
    return output.to(input.dtype).reshape(input.shape), rstd


def rms_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight; an empty tensor for one that ``output_mask`` does not ask for."""
    grad = as_rows(grad_output, normalized_ndim)
    normalized = as_rows(input, normalized_ndim) * statistics[:, None]
    grad_input = input.new_empty(0)
    grad_weight = (input if weight is None else weight).new_empty(0)
    if output_mask[0]:
        scaled = grad if weight is None else grad * as_row(weight, grad.dtype)
        projection = (scaled * normalized).mean(dim=1, keepdim=True)
        rows = (scaled - normalized * projection) * statistics[:, None]
        grad_input = rows.to(input.dtype).reshape(input.shape)
    if output_mask[1] and weight is not None:
        grad_weight = (grad * normalized).sum(dim=0).to(weight.dtype).reshape(weight.shape)
    return grad_input, grad_weight
