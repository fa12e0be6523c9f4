"""What both modules of dropout + residual + norm share."""

from __future__ import annotations

from typing import Any

import torch

from fastreg.nn._rate import Rated


class DropoutAddNorm(Rated):
    """The options beside those of the norm itself.

    Mixed in before a norm of ``torch.nn``, whose parameters and state dict stay what they are; ``layer_scale`` is one
    parameter more, if asked for.
    """

    normalized_shape: tuple[int, ...]
    layer_scale: torch.nn.Parameter | None

    def _set_options(
        self,
        p: float | torch.Tensor,
        prenorm: bool,
        residual_in_fp32: bool,
        layer_scale: float | None,
        **factory: Any,
    ) -> None:
        self._set_rate(p)
        self.prenorm = prenorm
        self.residual_in_fp32 = residual_in_fp32
        if layer_scale is None:
            self.register_parameter("layer_scale", None)
        else:
            self.layer_scale = torch.nn.Parameter(torch.full(self.normalized_shape, layer_scale, **factory))

    def _options(self, row_scale: torch.Tensor | None) -> dict[str, Any]:
        return {
            "p": self.p,
            "training": self.training,
            "prenorm": self.prenorm,
            "residual_in_fp32": self.residual_in_fp32,
            "row_scale": row_scale,
            "layer_scale": self.layer_scale,
        }

    def extra_repr(self) -> str:
        options = f", p={self.p}, prenorm={self.prenorm}, residual_in_fp32={self.residual_in_fp32}"
        return super().extra_repr() + options + (", layer_scale" if self.layer_scale is not None else "")
