"""Dropout + residual + root-mean-square normalisation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.reference._dropout_add_norm import gradients_of_sum, norm_gradient, summed
from fastreg.backends.reference._views import wide
from fastreg.backends.reference.rms_norm import rms_norm_fwd


def dropout_add_rms_norm_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    eps: float,
    float_sum: bool,
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised sum, the sum, and the reciprocal root mean square of its rows."""
    total = summed(input, residual, row_scale, layer_scale, seed, threshold, dynamic_threshold, float_sum)
    output, statistics = rms_norm_fwd(wide(total), normalized_ndim, weight, eps)
    return output.to(input.dtype), total if keep_sum else total.new_empty(0), statistics


def dropout_add_rms_norm_bwd(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    input: torch.Tensor | None,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    input_dtype: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual, weight and layer_scale, where ``output_mask`` asks for them."""
    gradient, grad, normalized = norm_gradient(grad_output, sum, normalized_ndim, None, statistics, weight)
    grad_input, grad_residual, grad_layer_scale = gradients_of_sum(
        *(gradient, grad_sum, sum, input, row_scale, layer_scale, seed, threshold, dynamic_threshold),
        *(input_dtype, (output_mask[0], output_mask[1], output_mask[3])),
    )
    grad_weight = (sum if weight is None else weight).new_empty(0)
    if output_mask[2] and weight is not None:
        grad_weight = (grad * normalized).sum(dim=0).to(weight.dtype).reshape(weight.shape)
    return grad_input, grad_residual, grad_weight, grad_layer_scale
