"""A rate that moves from step to step."""

from __future__ import annotations

from typing import Any

import torch

from fastreg.nn._rate import Rated


class LinearSchedule:
    """Moves the rates of a model's layers linearly from one value to another, without recompiling or recapturing.

    Equivalent to ``layer.p = start + (stop - start) * min(step / steps, 1)`` for every layer of fastreg's dropout
    family in the model (``layer.drop_prob`` of timm's). The rates become tensors, which only the device reads: a
    compiled model and a captured CUDA graph go on as they are, and a step does not wait for the device.

    Args:
        model: a layer, or a model whose layers are found by type.
        start, stop: the rate before the first step and from step ``steps`` on, 0 to 1.
        steps: how many steps it takes.

    Raises:
        ValueError: a rate outside 0 to 1, fewer than one step, or a model without such layers.

    Reference: Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks", 2018,
    arXiv:1810.12890, which raises the rate linearly during training.
    """

    def __init__(self, model: torch.nn.Module, start: float, stop: float, steps: int) -> None:
        for p in (start, stop):
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if steps < 1:
            raise ValueError(f"LinearSchedule: steps must be at least 1, but got {steps}")
        self.layers = [layer for layer in model.modules() if isinstance(layer, Rated)]
        if not self.layers:
            raise ValueError(
                "LinearSchedule: the model has no layer of fastreg's dropout family; fastreg.convert(model) puts them "
                "in the place of torch's, torchvision's and timm's"
            )
        self.start, self.stop, self.steps = start, stop, steps
        self.step_count = 0
        for layer in self.layers:
            if not isinstance(layer._rate(), torch.Tensor):
                layer._set_rate(torch.tensor(self.rate, dtype=torch.float64, device=_device_of(model)))
        self._write()

    @property
    def rate(self) -> float:
        """The present rate."""
        return self.start + (self.stop - self.start) * min(self.step_count / self.steps, 1.0)

    def step(self) -> None:
        """Go on by one step; the layers' next forward has the new rate."""
        self.step_count += 1
        self._write()

    def _write(self) -> None:
        for layer in self.layers:
            # Into the tensor that a graph may have been captured with.
            layer._rate().fill_(self.rate)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here."""
        return {"step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken."""
        self.step_count = int(state["step_count"])
        self._write()


def _device_of(model: torch.nn.Module) -> torch.device:
    """Of the model's parameters or buffers; torch's default for a model without."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.get_default_device() if tensor is None else tensor.device
