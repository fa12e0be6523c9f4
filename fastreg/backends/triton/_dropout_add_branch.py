"""What the launchers of the row-wise norms are told of a branch that is dropped and added before the norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastreg import _units


@dataclass(frozen=True)
class Branch:
    """What is done to the branch, as the operators take it; nothing is dropped where ``seed`` is None."""

    row_scale: torch.Tensor | None
    layer_scale: torch.Tensor | None
    seed: torch.Tensor | None
    threshold: int
    dynamic_threshold: torch.Tensor | None

    @property
    def keep_scale(self) -> float:
        """What is kept is multiplied by this; of a rate in a tensor only the device knows it."""
        kept = _units.HALF_LANES - self.threshold
        return _units.HALF_LANES / kept if self.seed is not None and kept else 1.0

    @property
    def scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of the rows and of the columns."""
        return self.row_scale, self.layer_scale

    @property
    def draw(self) -> tuple[torch.Tensor | None, torch.Tensor | None, int, float]:
        """What decides what is kept, as the kernels take it."""
        return self.seed, self.dynamic_threshold, self.threshold, self.keep_scale

    def scale_rows(self, rows: int) -> int:
        """How many rows share a scale."""
        return 1 if self.row_scale is None else rows // self.row_scale.numel()


@dataclass(frozen=True)
class Added:
    """What is added up before a norm.

    Attributes:
        branch: what is done to the norm's input.
        residual: added to it.
        total: where the sum is written to, an empty tensor of its dtype where it is not.
    """

    branch: Branch
    residual: torch.Tensor | None
    total: torch.Tensor


@dataclass(frozen=True)
class AddedGradients:
    """What is asked for beside the gradient of a sum, and needed for it; None for what is not.

    Attributes:
        branch: what was done to the input.
        grad_sum: the gradient that the sum has from elsewhere.
        input: the input, for the gradient of layer_scale.
        grad_input, grad_layer_scale: where those gradients are written to.
    """

    branch: Branch
    grad_sum: torch.Tensor | None
    input: torch.Tensor | None
    grad_input: torch.Tensor | None
    grad_layer_scale: torch.Tensor | None


NOTHING_ADDED: tuple[Any, ...] = (None,) * 11
NO_ADDED_GRADIENTS: tuple[Any, ...] = (None,) * 14
"""Of the kernels' arguments, those that a norm alone has not: from residual to DRAW, and from grad_sum to DRAW."""
