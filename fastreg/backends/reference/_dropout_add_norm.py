"""Dropout + residual + row-wise norm in plain PyTorch: what layer norm's and RMS norm's share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg import _units
from fastreg.backends.reference import dropout
from fastreg.backends.reference._views import as_row, as_rows, wide


def summed(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    float_sum: bool,
) -> torch.Tensor:
    """The residual plus what is kept of the input, rounded to the dtype of the sum."""
    # Elements are counted row by row, whatever lies between the rows.
    total = dropout.scaled(
        input.contiguous(),
        row_scale,
        layer_scale,
        seed,
        threshold,
        dynamic_threshold,
        _units.ELEMENT,
        rescale=True,
    )
    if residual is not None:
        total = total + wide(residual)
    if float_sum:
        return total
    return total.to(input.dtype if residual is None else residual.dtype)


def gradients_of_sum(
    gradient: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    input: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    input_dtype: int,
    mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual and layer_scale, from that of the norm's input in the dtype of computation."""
    dtype = dropout.DTYPES[input_dtype]
    total = gradient if grad_sum is None else gradient + wide(grad_sum)
    arguments = (seed, threshold, dynamic_threshold, _units.ELEMENT, True)
    grad_input = sum.new_empty(0, dtype=dtype)
    grad_residual = sum.new_empty(0)
    grad_layer_scale = (sum if layer_scale is None else layer_scale).new_empty(0)
    if mask[0]:
        grad_input = dropout.scaled(total, row_scale, layer_scale, *arguments).to(dtype)
    if mask[1]:
        grad_residual = total.to(sum.dtype)
    if mask[2] and layer_scale is not None and input is not None:
        terms = dropout.scaled((total * wide(input)).contiguous(), row_scale, None, *arguments)
        columns = terms.reshape(-1, layer_scale.numel()).sum(dim=0)
        grad_layer_scale = columns.to(layer_scale.dtype).reshape(layer_scale.shape)
    return grad_input, grad_residual, grad_layer_scale


def norm_gradient(
    grad_output: torch.Tensor,
    sum: torch.Tensor,
    normalized_ndim: int,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of the norm's input, and grad_output and the normalised values as rows; not rounded."""
    grad = as_rows(grad_output, normalized_ndim)
    rows = as_rows(sum, normalized_ndim)
    normalized = (rows if mean is None else rows - mean[:, None]) * rstd[:, None]
    scaled = grad if weight is None else grad * as_row(weight, grad.dtype)
    projection = (scaled * normalized).mean(dim=1, keepdim=True)
    centred = scaled if mean is None else scaled - scaled.mean(dim=1, keepdim=True)
    gradient = (centred - normalized * projection) * rstd[:, None]
    return gradient.reshape(sum.shape), grad, normalized
