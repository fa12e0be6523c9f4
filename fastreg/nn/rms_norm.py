"""Root-mean-square normalisation as a module."""

from __future__ import annotations

import torch

from fastreg.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.RMSNorm(normalized_shape, eps, elementwise_affine)``; the formula, the dtypes and what is
    raised are those of ``fastreg.functional.rms_norm``. A weight of any dtype goes with any input.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
