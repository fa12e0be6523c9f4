"""Dropout + residual + layer normalisation in Triton, and the launchers of both such operators.

The kernels are those of layer_norm.py, told what to add to the rows that they normalise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.triton._dropout_add_branch import Added, AddedGradients, Branch
from fastreg.backends.triton.layer_norm import norm_backward, norm_forward

# By the number that the operators know a dtype by (csrc/dtype.h).
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    branch = Branch(row_scale, layer_scale, seed, threshold, dynamic_threshold)
    return forward(
        *(input, residual, normalized_ndim, weight, bias, branch, eps, float_sum, keep_sum), centred=True
    )


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
    branch = Branch(row_scale, layer_scale, seed, threshold, dynamic_threshold)
    return backward(
        *(grad_output, grad_sum, sum, input, normalized_ndim, statistics, weight, bias, branch),
        *(input_dtype, output_mask),
        centred=True,
    )


def forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    branch: Branch,
    eps: float,
    float_sum: bool,
    keep_sum: bool,
    *,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised sum, the sum (an empty tensor unless it is to be kept), and the statistics of its rows."""
    dtype = torch.float32 if float_sum else input.dtype if residual is None else residual.dtype
    total = torch.empty(input.shape if keep_sum else (0,), dtype=dtype, device=input.device)
    output, statistics = norm_forward(
        *(input, normalized_ndim, weight, bias, eps), centred=centred, added=Added(branch, residual, total)
    )
    return output, total, statistics


def backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    input: torch.Tensor | None,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    branch: Branch,
    input_dtype: int,
    output_mask: Sequence[bool],
    *,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual, weight, bias and layer_scale, where ``output_mask`` asks for them."""
    wants_input, wants_residual, wants_weight, wants_bias, wants_layer_scale = output_mask
    grad_input = sum.new_empty(sum.shape if wants_input else (0,), dtype=_DTYPES[input_dtype])
    scale = sum if branch.layer_scale is None else branch.layer_scale
    # A sum over no rows is 0.
    empty = sum.numel() == 0
    shape = scale.shape if wants_layer_scale else (0,)
    grad_layer_scale = scale.new_zeros(shape) if empty else scale.new_empty(shape)
    added = None
    if wants_input or wants_layer_scale or (wants_residual and grad_sum is not None):
        added = AddedGradients(
            *(branch, grad_sum, input if wants_layer_scale else None),
            grad_input if wants_input else None,
            grad_layer_scale if wants_layer_scale else None,
        )
    grad_residual, grad_weight, grad_bias = norm_backward(
        *(grad_output, sum, normalized_ndim, statistics, weight, bias),
        (wants_residual, wants_weight, wants_bias),
        centred=centred,
        added=added,
    )
    return grad_input, grad_residual, grad_weight, grad_bias, grad_layer_scale
