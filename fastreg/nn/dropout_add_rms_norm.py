"""Dropout + residual + root-mean-square normalisation as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastreg.nn._dropout_add_norm import DropoutAddNorm
from fastreg.ops.dropout_add_rms_norm import dropout_add_rms_norm


class DropoutAddRMSNorm(DropoutAddNorm, torch.nn.RMSNorm):
    """Dropout of a residual branch, the addition of the residual, and ``torch.nn.RMSNorm`` of the sum, in one kernel.

    Equivalent to ``norm(residual + layer_scale * dropout(input))`` of ``torch.nn.RMSNorm`` and ``torch.nn.Dropout``;
    the formula, the dtypes and what is raised are those of ``fastreg.functional.dropout_add_rms_norm``.

    Args:
        normalized_shape, eps, elementwise_affine: as in ``torch.nn.RMSNorm``.
        p: the probability of an element to be dropped: a number, or a tensor of one element.
        prenorm: return the sum too, for the next residual block.
        residual_in_fp32: keep the sum in float32.
        layer_scale: with a number, the branch is multiplied by a learnable vector, which begins with it.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float | torch.Tensor = 0.5,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        layer_scale: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.RMSNorm.__init__(
            *(self, normalized_shape, eps, elementwise_affine),
            device=device,
            dtype=dtype,
        )
        self._set_options(p, prenorm, residual_in_fp32, layer_scale, device=device, dtype=dtype)

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
    ) -> Any:
        return dropout_add_rms_norm(
            *(input, residual, self.normalized_shape, self.weight),
            eps=self.eps,
            **self._options(row_scale),
        )
