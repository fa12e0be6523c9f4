"""Dropout + residual + root-mean-square normalisation in Triton: dropout_add_layer_norm.py without centring."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.triton._dropout_add_branch import Branch
from fastreg.backends.triton.dropout_add_layer_norm import backward, forward


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
    branch = Branch(row_scale, layer_scale, seed, threshold, dynamic_threshold)
    return forward(
        *(input, residual, normalized_ndim, weight, None, branch, eps, float_sum, keep_sum), centred=False
    )


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
    branch = Branch(row_scale, layer_scale, seed, threshold, dynamic_threshold)
    wants_input, wants_residual, wants_weight, wants_layer_scale = output_mask
    grad_input, grad_residual, grad_weight, _, grad_layer_scale = backward(
        *(grad_output, grad_sum, sum, input, normalized_ndim, statistics, weight, None, branch, input_dtype),
        (wants_input, wants_residual, wants_weight, False, wants_layer_scale),
        centred=False,
    )
    return grad_input, grad_residual, grad_weight, grad_layer_scale
