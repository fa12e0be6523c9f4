"""What is measured: one module an op, named like the op, found by its file name.

A workload module has ``make_problem(rows, hidden_size, dtype, device, parameter_dtype=None)``, which returns a
``Problem``, and ``GRID``, the shapes of the committed benchmark for each device type. A new op adds its file here and
nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastreg.cli.gate import Exact

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward+backward")

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One op at one shape and dtype: all that is needed to run it, to judge it and to count its bytes.

    Attributes:
        op: its name.
        arguments: the tensors that every function below takes in this order, all requiring a gradient, by name.
        grad_output: the gradient that backward starts from.
        bytes_moved: the op's minimum traffic for each direction.
        torch_function: torch's own.
        fastreg_function: ours.
        peers: functions of other libraries by name, or the reason why one is not here.
        truth: makes the exact results, in float64, a stretch of rows at a time.
    """

    op: str
    arguments: Mapping[str, torch.Tensor]
    grad_output: torch.Tensor
    bytes_moved: Mapping[str, int]
    torch_function: Function
    fastreg_function: Function
    peers: Mapping[str, Function | str]
    truth: Callable[[], Iterable[Exact]]

    @property
    def input(self) -> torch.Tensor:
        """The activation, the first argument."""
        return next(iter(self.arguments.values()))

    def forward(self, function: Function) -> torch.Tensor:
        """The output, recorded for backward."""
        return function(*self.arguments.values())

    def backward(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradients of all arguments; frees what the forward saved."""
        return torch.autograd.grad(output, tuple(self.arguments.values()), self.grad_output)

    def results(self, function: Function) -> dict[str, torch.Tensor]:
        """Output and gradients by name."""
        output = self.forward(function)
        names = (f"grad_{name}" for name in self.arguments)
        return {"output": output.detach(), **dict(zip(names, self.backward(output), strict=True))}


def names() -> tuple[str, ...]:
    """The ops that have a workload."""
    return tuple(
        sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    )


def workload(op: str) -> Any:
    """The workload module of an op.

    Raises:
        ValueError: there is none; the text lists those there are.
    """
    if op not in names():
        raise ValueError(f"no workload for {op!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{op}")
