"""DropBlock as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg.nn._rate import Rated
from fastreg.ops import drop_block


class _DropBlock(Rated):
    """What both modules share."""

    def __init__(
        self,
        p: float | torch.Tensor,
        block_size: int | Sequence[int],
        inplace: bool = False,
        *,
        gamma: str = "paper",
        seeds: str = "valid",
        shared: bool = False,
        rescale: str | None = "batch",
    ) -> None:
        super().__init__()
        self._set_rate(p)
        self.block_size = block_size
        self.inplace = inplace
        self.gamma = gamma
        self.seeds = seeds
        self.shared = shared
        self.rescale = rescale

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}, gamma={self.gamma!r}, "
            f"seeds={self.seeds!r}, shared={self.shared}, rescale={self.rescale!r}"
        )


class DropBlock2d(_DropBlock):
    """Drops contiguous blocks of feature maps in training.

    Equivalent to ``torchvision.ops.DropBlock2d(p, block_size, inplace)``; the formula, the options, the dtypes and what
    is raised are those of ``fastreg.functional.drop_block2d``. ``p`` may be a tensor of one element, which
    ``fastreg.nn.LinearSchedule`` moves from step to step.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return drop_block.drop_block2d(
            *(input, self.p, self.block_size, self.inplace, self.training),
            gamma=self.gamma,
            seeds=self.seeds,
            shared=self.shared,
            rescale=self.rescale,
        )


class DropBlock3d(_DropBlock):
    """Drops contiguous blocks of volumes in training.

    Equivalent to ``torchvision.ops.DropBlock3d(p, block_size, inplace)``; the formula, the options, the dtypes and what
    is raised are those of ``fastreg.functional.drop_block3d``. ``p`` may be a tensor of one element, which
    ``fastreg.nn.LinearSchedule`` moves from step to step.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return drop_block.drop_block3d(
            *(input, self.p, self.block_size, self.inplace, self.training),
            gamma=self.gamma,
            seeds=self.seeds,
            shared=self.shared,
            rescale=self.rescale,
        )
