"""Root-mean-square normalisation in Triton: the kernels of layer_norm.py without centring."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.backends.triton.layer_norm import norm_backward, norm_forward


def rms_norm_fwd(
    input: torch.Tensor, normalized_ndim: int, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * rstd * weight, and rstd of every row in fp32."""
    return norm_forward(input, normalized_ndim, weight, None, eps, centred=False)


def rms_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight; an empty tensor for one that ``output_mask`` does not ask for."""
    wants_input, wants_weight = output_mask
    grad_input, grad_weight, _ = norm_backward(
        grad_output,
        input,
        normalized_ndim,
        statistics,
        weight,
        None,
        (wants_input, wants_weight, False),
        centred=False,
    )
    return grad_input, grad_weight
