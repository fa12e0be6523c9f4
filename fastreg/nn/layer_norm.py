"""Layer normalisation as a module."""

from __future__ import annotations

import torch

from fastreg.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias)``; the formula, the dtypes and
    what is raised are those of ``fastreg.functional.layer_norm``. Parameters of any dtype go with any input.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
