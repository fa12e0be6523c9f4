"""Layer normalisation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.reference._views import as_row, as_rows


def layer_norm_statistics(input: torch.Tensor, normalized_ndim: int, eps: float) -> torch.Tensor:
    """Mean and reciprocal standard deviation of every row, as one (2, rows) tensor; differentiable."""
    rows = as_rows(input, normalized_ndim)
    mean = rows.mean(dim=1)
    variance = (rows - mean[:, None]).square().mean(dim=1)
    return torch.stack((mean, torch.rsqrt(variance + eps)))


def layer_norm_fwd(
    input: torch.Tensor,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) * rstd * weight + bias, and the statistics of the rows."""
    statistics = layer_norm_statistics(input, normalized_ndim, eps)
    mean, rstd = statistics[0], statistics[1]
    output = (as_rows(input, normalized_ndim) - mean[:, None]) * rstd[:, None]
    if weight is not None:
        output = output * as_row(weight, output.dtype)
    if bias is not None:
        output = output + as_row(bias, output.dtype)
    return output.to(input.dtype).reshape(input.shape), statistics


def layer_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; an empty tensor for one that ``output_mask`` does not ask for."""
    grad = as_rows(grad_output, normalized_ndim)
    mean, rstd = statistics[0], statistics[1]
    normalized = (as_rows(input, normalized_ndim) - mean[:, None]) * rstd[:, None]
    grad_input = input.new_empty(0)
    grad_weight = (input if weight is None else weight).new_empty(0)
    grad_bias = (input if bias is None else bias).new_empty(0)
    if output_mask[0]:
        scaled = grad if weight is None else grad * as_row(weight, grad.dtype)
        projection = (scaled * normalized).mean(dim=1, keepdim=True)
        centred = scaled - scaled.mean(dim=1, keepdim=True) - normalized * projection
        grad_input = (centred * rstd[:, None]).to(input.dtype).reshape(input.shape)
    if output_mask[1] and weight is not None:
        grad_weight = (grad * normalized).sum(dim=0).to(weight.dtype).reshape(weight.shape)
    if output_mask[2] and bias is not None:
        grad_bias = grad.sum(dim=0).to(bias.dtype).reshape(bias.shape)
    return grad_input, grad_weight, grad_bias
