"""The dropout family as modules."""

from __future__ import annotations

import torch

from fastreg.nn._rate import Rated
from fastreg.ops import dropout as family


class _Dropout(Rated):
    """What the subclasses of torch's dropout modules share."""

    inplace: bool

    def __init__(self, p: float | torch.Tensor = 0.5, inplace: bool = False) -> None:
        # torch's own __init__ compares p with numbers, which would wait for the device of a tensor.
        torch.nn.Module.__init__(self)
        self._set_rate(p)
        self.inplace = inplace


class Dropout(_Dropout, torch.nn.Dropout):  # type: ignore[misc]
    """``torch.nn.Dropout`` with fastreg's kernels: no mask is stored, and ``p`` may be a tensor.

    Equivalent to ``torch.nn.Dropout(p, inplace)``; the formula, the dtypes and what is raised are those of
    ``fastreg.functional.dropout``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return family.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(_Dropout, torch.nn.Dropout1d):  # type: ignore[misc]
    """``torch.nn.Dropout1d`` with fastreg's kernels: no mask is stored, and ``p`` may be a tensor.

    Equivalent to ``torch.nn.Dropout1d(p, inplace)``; the formula, the dtypes and what is raised are those of
    ``fastreg.functional.dropout1d``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return family.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(_Dropout, torch.nn.Dropout2d):  # type: ignore[misc]
    """``torch.nn.Dropout2d`` with fastreg's kernels: no mask is stored, and ``p`` may be a tensor.

    Equivalent to ``torch.nn.Dropout2d(p, inplace)``; the formula, the dtypes and what is raised are those of
    ``fastreg.functional.dropout2d``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return family.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(_Dropout, torch.nn.Dropout3d):  # type: ignore[misc]
    """``torch.nn.Dropout3d`` with fastreg's kernels: no mask is stored, and ``p`` may be a tensor.

    Equivalent to ``torch.nn.Dropout3d(p, inplace)``; the formula, the dtypes and what is raised are those of
    ``fastreg.functional.dropout3d``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return family.dropout3d(input, self.p, self.training, self.inplace)


class DropPath(Rated):
    """Stochastic depth: drops the residual branch of whole samples, and adds the residual in the same kernel if given.

    Equivalent to timm's ``DropPath(p, scale_by_keep)`` and, with ``mode="batch"`` too, to torchvision's
    ``StochasticDepth(p, mode)``; the formula, the dtypes and what is raised are those of
    ``fastreg.functional.drop_path``.

    Args:
        p: the probability of a sample (or of the batch) to be dropped: a number, or a tensor of one element.
        scale_by_keep: whether what is kept is divided by ``1 - p``.
        mode: ``"row"``, each sample by itself, or ``"batch"``, all or none.
        inplace: write the output into the input, where no residual is given.
    """

    def __init__(
        self,
        p: float | torch.Tensor = 0.5,
        scale_by_keep: bool = True,
        mode: str = "row",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("row", "batch"):
            raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
        self._set_rate(p)
        self.scale_by_keep = scale_by_keep
        self.mode = mode
        self.inplace = inplace

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return family.drop_path(
            *(input, self.p, self.training, self.inplace and residual is None),
            mode=self.mode,
            scale_by_keep=self.scale_by_keep,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}, mode={self.mode!r}"


class DropoutAdd(Rated):
    """Dropout of a residual branch and the addition of the residual, in one kernel.

    Equivalent to ``residual + torch.nn.Dropout(p)(input)``; the formula, the dtypes and what is raised are those of
    ``fastreg.functional.dropout_add``.

    Args:
        p: the probability of an element to be dropped: a number, or a tensor of one element.
    """

    def __init__(self, p: float | torch.Tensor = 0.5) -> None:
        super().__init__()
        self._set_rate(p)

    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return family.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
