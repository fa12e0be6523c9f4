"""Bytes that the Triton kernels move, over the least that the op can do with, counted in the mended interpreter.

The minimum of a forward is one pass over the input and one over the output, of a backward one over each of the output's
gradient, the input and its gradient, and in both the statistics of the rows and the parameters once each. Everything
that a kernel loads or stores counts against it, except that a parameter counts once however often it is read: it is
small and every program after the first finds it in a cache. How often that is, is printed beside (pytest -rP).

Launches are those of an H100 with its 132 multiprocessors, not those of the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

import triton_interpreter
from fastreg.backends.triton import _device, _launch, layer_norm
from triton_interpreter import Traffic, traffic

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

MULTIPROCESSORS = 132
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PARAMETERS = ("weight", "bias")


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: MULTIPROCESSORS)


def size(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Call:
    """A layer norm, or an RMS norm, with its tensors."""

    rows: int
    hidden: int
    float: torch.dtype
    parameter: torch.dtype
    centred: bool = True

    def __str__(self) -> str:
        dtypes = f"{self.float}-{self.parameter}".replace("torch.", "")
        return f"{'layer' if self.centred else 'rms'}-{self.rows}x{self.hidden}-{dtypes}"

    @cached_property
    def input(self) -> torch.Tensor:
        return torch.ones(self.rows, self.hidden, dtype=self.float)

    @cached_property
    def grad_output(self) -> torch.Tensor:
        return torch.ones_like(self.input)

    @cached_property
    def weight(self) -> torch.Tensor:
        return torch.ones(self.hidden, dtype=self.parameter)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        return torch.ones_like(self.weight) if self.centred else None

    @cached_property
    def statistics(self) -> torch.Tensor:
        return torch.ones((2, self.rows) if self.centred else (self.rows,))

    def forward(self) -> Traffic:
        with traffic() as counted:
            layer_norm.norm_forward(self.input, 1, self.weight, self.bias, 1e-5, centred=self.centred)
        return counted

    def backward(self, *mask: bool) -> Traffic:
        with traffic() as counted:
            layer_norm.norm_backward(
                *(self.grad_output, self.input, 1, self.statistics, self.weight, self.bias, mask),
                centred=self.centred,
            )
        return counted

    def forward_minimum(self) -> int:
        return 2 * size(self.input) + size(self.statistics, self.weight, self.bias)

    def backward_minimum(self) -> int:
        return 3 * size(self.input) + size(self.statistics, self.weight) + size(self.weight, self.bias)


def ratio(counted: Traffic, minimum: int, *parameters: torch.Tensor | None) -> float:
    """Bytes moved over the minimum, with each parameter counted once, and prints how much more it was read."""
    again = counted.of(*PARAMETERS) - size(*parameters)
    found = (counted.loaded + counted.stored - again) / minimum
    assert found >= 0.999, "the minimum is not one"
    print(f"bytes over the minimum: {found:.4f}; parameters read again: {again / minimum:.3f} minimums")
    return found


FORWARD = (
    Call(4096, 64, BF16, F32),
    Call(2000, 192, BF16, F32, centred=False),
    Call(1024, 17, F32, F32),
    Call(513, 257, F16, F32),
    Call(300, 768, BF16, BF16, centred=False),
    Call(64, 1000, F32, F32),
    Call(64, 4096, BF16, F32),
    Call(64, 4096, BF16, F32, centred=False),
    Call(16, 8193, BF16, F32),
    Call(4, 32768, F32, F32),
    Call(4, 40000, F16, F16),
    Call(4, 65536, BF16, F32),
    Call(4, 65536, F16, F16, centred=False),
)
# 1024: as many programs as multiprocessors, so the partial sums are as large as they get beside 4096 rows.
BACKWARD = (
    Call(4096, 64, BF16, F32),
    Call(4096, 33, F16, F32),
    Call(4096, 128, F32, F32),
    Call(4096, 1024, BF16, BF16),
    Call(4096, 1024, BF16, F32, centred=False),
)


@pytest.mark.parametrize("call", FORWARD, ids=str)
def test_forward_reads_once_and_writes_once(call: Call) -> None:
    found = ratio(call.forward(), call.forward_minimum(), call.weight, call.bias)
    assert found <= 1.02


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, marks=() if call.centred else pytest.mark.complete) for call in BACKWARD],
    ids=str,
)
def test_backward_reads_once_and_writes_once(call: Call) -> None:
    moved = call.backward(True, True, call.centred)
    assert ratio(moved, call.backward_minimum(), call.weight) <= 1.10


@pytest.mark.parametrize("hidden", [4096, 8192, 12288])
def test_long_rows_have_the_partial_sums_of_short_ones(hidden: int) -> None:
    """4096 long rows would take minutes here. A few show that a row is read once; partial sums follow from sizes."""
    rows, counted_rows = 4096, 8
    call = Call(counted_rows, hidden, BF16, F32)
    moved = call.backward(True, True, True)
    activations = moved.of("grad_output", "input", "grad_input")
    assert activations == 3 * size(call.input)
    launch = _launch.backward(rows, hidden, 2, 8, 2, MULTIPROCESSORS)
    minimum = rows / counted_rows * activations
    partial = launch.row_programs * hidden * 4 * 2 * 2
    print(f"bytes over the minimum: {1 + partial / minimum:.4f}")
    assert 1 + partial / minimum <= 1.10


@pytest.mark.parametrize("call", [Call(2, 262144, BF16, BF16), Call(2, 65536, F32, F32)], ids=str)
def test_rows_too_long_for_the_registers_are_read_twice_forward(call: Call) -> None:
    moved = call.forward()
    assert moved.of("input") == 2 * size(call.input)
    assert moved.of("output") == size(call.input)
    ratio(moved, call.forward_minimum(), call.weight, call.bias)


@pytest.mark.parametrize("call", [Call(2, 65536, BF16, BF16), Call(2, 16384, F32, F32)], ids=str)
def test_rows_too_long_for_the_registers_are_read_twice_backward(call: Call) -> None:
    moved = call.backward(True, True, True)
    assert moved.of("input", "grad_output") == 4 * size(call.input)
    assert moved.of("grad_input") == size(call.input)


def test_a_gradient_that_is_not_wanted_costs_nothing() -> None:
    call = Call(64, 256, BF16, F32)
    everything = call.backward(True, True, True)
    frozen = call.backward(True, False, False)
    assert frozen.of("partial_weight", "partial_bias", "grad_weight", "grad_bias") == 0
    assert frozen.of("grad_output", "input", "grad_input") == 3 * size(call.input)
    weight_only = call.backward(False, True, False)
    assert weight_only.of("weight", "grad_input", "bias") == 0
    assert weight_only.of("grad_output", "input") == 2 * size(call.input)
    bias_only = call.backward(False, False, True)
    assert bias_only.of("input", "weight", "statistics", "grad_input", "partial_weight") == 0
    assert bias_only.of("grad_output") == size(call.input)
    assert everything.loaded + everything.stored > frozen.loaded + frozen.stored
    assert call.backward(False, False, False) == Traffic()


def test_partial_sums_are_read_once() -> None:
    rows, hidden = 512, 384
    call = Call(rows, hidden, BF16, F32)
    moved = call.backward(True, True, True)
    programs = _launch.backward(rows, hidden, 2, 8, 2, MULTIPROCESSORS).row_programs
    partial = programs * hidden * 4
    assert moved.of("partial_weight") == moved.of("partial_bias") == 2 * partial
    assert moved.of("grad_weight") == moved.of("grad_bias") == size(call.weight)
    assert moved.stored == size(call.input) + 2 * partial + 2 * size(call.weight)
