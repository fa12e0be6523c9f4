"""Layers with a rate: a number, or a tensor whose value may change without a new compilation or graph capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch


class Rated(torch.nn.Module):
    """A layer with a rate ``p``; other libraries' layers may have another name for it.

    A tensor is kept as a buffer, so that it moves with the layer; but it keeps its dtype, as a rate is no activation,
    and it is no part of the state dict, as no rate is.
    """

    _rate_name: ClassVar[str] = "p"

    p: float | torch.Tensor

    def _rate(self) -> Any:
        return getattr(self, self._rate_name)

    def _set_rate(self, p: float | torch.Tensor) -> None:
        if isinstance(p, torch.Tensor):
            self.__dict__.pop(self._rate_name, None)
            self.register_buffer(self._rate_name, p, persistent=False)
        elif not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        else:
            self._buffers.pop(self._rate_name, None)
            setattr(self, self._rate_name, p)

    def _fix_rate(self) -> None:
        """Make a number of a rate in a buffer: not every class that a layer may go back to takes a tensor."""
        if self._rate_name in self._buffers:
            p = float(self._rate())
            delattr(self, self._rate_name)
            setattr(self, self._rate_name, p)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self._rate()
        moved = super()._apply(fn, recurse)
        now = self._rate()
        if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
            setattr(self, self._rate_name, before.to(now.device))
        return moved
