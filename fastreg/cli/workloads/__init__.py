"""What is measured: one module an op, named like the op, found by its file name.

A workload module has

- ``make_problem(case, device, parameter_dtype=None)``, which returns a ``Problem``;
- ``GRID``: the committed benchmark for each device type, and for a "rehearsal": its points, each in every dtype;
- ``HOST_CHAINS``: the chains whose cost on the host is measured, on a shape ``TINY`` where two dimensions will not do;
- ``SECONDS``: how long the rounds of one case take unless a command says otherwise;
- ``PEERS``: the other libraries that its problems know;
- ``CHECKS``: the points that ``python -m fastreg check`` tries.

A new op adds its file here and nothing else.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastreg.cli.gate import Exact, Results

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward+backward")

# From where a gated call finds torch's random stream.
SEED = 20261126

Function = Callable[..., torch.Tensor]
# A shape, a layout and a chain, as in a ``Case``.
Point = tuple[tuple[int, ...], str, str]


def points(
    shapes: Iterable[tuple[int, ...]], layouts: Iterable[str] = ("",), chains: Iterable[str] = ("",)
) -> tuple[Point, ...]:
    """Every shape in every layout and chain."""
    return tuple(
        (shape, layout, chain) for layout, chain, shape in itertools.product(layouts, chains, shapes)
    )


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
        truth: makes the exact results, in float64, a stretch at a time; of a random op, those for the mask that fastreg
            draws from the stream at ``SEED``.
        buffers: what every call updates in place, by name; also a result.
        left_out: providers that are not run, with the reason.
        peer_truth: of a random op, the exact results for the mask that another library's results show; raises
            ``gate.Implausible`` where no such mask is drawn at the rate that was asked for.
    """

    op: str
    arguments: Mapping[str, torch.Tensor]
    grad_output: torch.Tensor
    bytes_moved: Mapping[str, int]
    torch_function: Function
    fastreg_function: Function
    peers: Mapping[str, Function | str]
    truth: Callable[[], Iterable[Exact]]
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    peer_truth: Callable[[Results], Iterable[Exact]] | None = None

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
        """Output, updated buffers and gradients by name, with the random stream at ``SEED``.

        Buffers and stream are then what they were before.
        """
        before = {name: tensor.clone() for name, tensor in self.buffers.items()}
        devices = [self.input.device] if self.input.is_cuda else []
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(SEED)
                output = self.forward(function)
            after = {name: tensor.clone() for name, tensor in self.buffers.items()}
            gradients = self.backward(output)
        finally:
            for name, tensor in before.items():
                self.buffers[name].copy_(tensor)
        names = (f"grad_{name}" for name in self.arguments)
        return {"output": output.detach(), **after, **dict(zip(names, gradients, strict=True))}


@dataclass(frozen=True)
class Case:
    """One line of the grid.

    Attributes:
        layout: of the activations in memory, for an op that knows several.
        chain: what is computed with the op in one call, joined by plus signs ("add+relu"); empty for the op alone.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = ""
    chain: str = ""

    def __str__(self) -> str:
        return describe(self.record())

    def record(self) -> dict[str, Any]:
        """The case as a result document has it."""
        return {
            "op": self.op,
            "chain": self.chain,
            "layout": self.layout,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }

    def problem(self, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
        """The tensors and functions of this case; the parameters in the workload's choice of dtype if not given."""
        problem: Problem = workload(self.op).make_problem(self, device, parameter_dtype)
        return problem


def dtype_name(dtype: torch.dtype) -> str:
    """float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def call_name(record: Mapping[str, Any]) -> str:
    """What a record of a document calls: batch_norm+add+relu."""
    return "+".join(filter(None, (record["op"], record["chain"])))


def title(record: Mapping[str, Any]) -> str:
    """What a record calls, and the layout where there are several: batch_norm+add+relu channels_last."""
    return " ".join(filter(None, (call_name(record), record["layout"])))


def describe(record: Mapping[str, Any]) -> str:
    """The case of a record in words."""
    return f"{title(record)} {record['dtype']} ({', '.join(map(str, record['shape']))})"


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
