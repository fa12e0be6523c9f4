"""Dropout + residual + layer normalisation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.reference._dropout_add_norm import gradients_of_sum, norm_gradient, summed
from fastreg.backends.reference._views import wide
from fastreg.backends.reference.layer_norm import layer_norm_fwd


def dropout_add_layer_norm_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    eps: float,
    float_sum: bool,
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised sum, the sum, and (mean, rstd) of its rows."""
    total = summed(input, residual, row_scale, layer_scale, seed, threshold, dynamic_threshold, float_sum)
    # In the dtype of computation: the output is rounded from there to the input's.
    output, statistics = layer_norm_fwd(wide(total), normalized_ndim, weight, bias, eps)
    return output.to(input.dtype), total if keep_sum else total.new_empty(0), statistics


def dropout_add_layer_norm_bwd(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    input: torch.Tensor | None,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    input_dtype: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual, weight, bias and layer_scale, where ``output_mask`` asks for them."""
    gradient, grad, normalized = norm_gradient(
        grad_output, sum, normalized_ndim, statistics[0], statistics[1], weight
    )
    grad_input, grad_residual, grad_layer_scale = gradients_of_sum(
        *(gradient, grad_sum, sum, input, row_scale, layer_scale, seed, threshold, dynamic_threshold),
        *(input_dtype, (output_mask[0], output_mask[1], output_mask[4])),
    )
    grad_weight = (sum if weight is None else weight).new_empty(0)
    grad_bias = (sum if bias is None else bias).new_empty(0)
    if output_mask[2] and weight is not None:
        grad_weight = (grad * normalized).sum(dim=0).to(weight.dtype).reshape(weight.shape)
    if output_mask[3] and bias is not None:
        grad_bias = grad.sum(dim=0).to(bias.dtype).reshape(bias.shape)
    return grad_input, grad_residual, grad_weight, grad_bias, grad_layer_scale
