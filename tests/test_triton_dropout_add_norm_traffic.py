"""Bytes that dropout + residual + norm's Triton kernels move, over the least that it takes, in the mended interpreter.

The minimum of a forward is a pass over each of input, residual, sum and output; of a backward one over each of the two
gradients given, the sum and the two gradients made, and over the input for the gradient of layer_scale. Everything that
a kernel loads or stores counts against it, except that parameters, scales and the seed count once however often they
are read, as in test_triton_traffic.py.

Launches are those of an H100 with its 132 multiprocessors, not those of the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

import triton_interpreter
from fastreg.backends.reference.dropout import DTYPES
from fastreg.backends.triton import _device, _launch
from fastreg.backends.triton._dropout_add_branch import Branch
from fastreg.backends.triton.dropout_add_layer_norm import backward, forward
from test_triton_traffic import MULTIPROCESSORS, size
from triton_interpreter import Traffic, traffic

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# What is read again comes from a cache.
SMALL = ("weight", "bias", "row_scale", "layer_scale", "seed")


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: MULTIPROCESSORS)


@dataclass(frozen=True)
class Call:
    """A fused norm with its tensors, and with row_scale and layer_scale if ``scaled``."""

    rows: int
    hidden: int
    float: torch.dtype
    sum: torch.dtype
    centred: bool = True
    scaled: bool = False

    def __str__(self) -> str:
        dtypes = f"{self.float}-{self.sum}".replace("torch.", "")
        tail = "-scaled" if self.scaled else ""
        return f"{'layer' if self.centred else 'rms'}-{self.rows}x{self.hidden}-{dtypes}{tail}"

    @cached_property
    def input(self) -> torch.Tensor:
        return torch.ones(self.rows, self.hidden, dtype=self.float)

    @cached_property
    def residual(self) -> torch.Tensor:
        return torch.ones(self.rows, self.hidden, dtype=self.sum)

    @cached_property
    def weight(self) -> torch.Tensor:
        return torch.ones(self.hidden)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        return torch.ones(self.hidden) if self.centred else None

    @cached_property
    def branch(self) -> Branch:
        scales = (torch.ones(self.rows), torch.ones(self.hidden)) if self.scaled else (None, None)
        return Branch(*scales, torch.tensor(7), 6554, None)

    @property
    def small(self) -> int:
        return size(self.weight, *self.branch.scales, self.branch.seed)

    @property
    def statistics(self) -> torch.Tensor:
        return torch.ones((2, self.rows) if self.centred else (self.rows,))

    def forward(self, keep_sum: bool = True) -> Traffic:
        with traffic() as counted:
            forward(
                *(self.input, self.residual, 1, self.weight, self.bias, self.branch, 1e-5, False, keep_sum),
                centred=self.centred,
            )
        return counted

    def backward(self, mask: str) -> Traffic:
        with traffic() as counted:
            backward(
                *(torch.ones_like(self.input), torch.ones_like(self.residual), self.residual, self.input, 1),
                *(self.statistics, self.weight, self.bias, self.branch, DTYPES.index(self.float)),
                [name in mask for name in "irwbl"],
                centred=self.centred,
            )
        return counted

    def forward_minimum(self) -> int:
        rows = 2 * (size(self.input) + size(self.residual))
        return rows + size(self.statistics, self.bias) + self.small

    def backward_minimum(self, mask: str) -> int:
        rows = (3 if "l" in mask else 2) * size(self.input) + 3 * size(self.residual)
        gradients = sum(size(self.weight) for name in "wbl" if name in mask)
        return rows + size(self.statistics) + self.small + gradients


def ratio(counted: Traffic, minimum: int, small: int) -> float:
    """Bytes moved over the minimum, with what is small counted once, and prints how much more it was read."""
    again = counted.of(*SMALL) - small
    found = (counted.loaded + counted.stored - again) / minimum
    assert found >= 0.999, "the minimum is not one"
    print(f"bytes over the minimum: {found:.4f}; parameters read again: {again / minimum:.3f} minimums")
    return found


FORWARD = (
    Call(512, 64, BF16, BF16),
    Call(96, 768, BF16, F32, centred=False, scaled=True),
    Call(65, 257, F16, F16),
    Call(64, 1000, F32, F32, scaled=True),
    Call(32, 4096, BF16, BF16),
    Call(4, 8192, BF16, F32, centred=False),
    Call(4, 32768, BF16, BF16),
)


@pytest.mark.parametrize("call", FORWARD, ids=str)
def test_a_sum_is_made_and_normalised_in_four_passes(call: Call) -> None:
    counted = call.forward()
    assert ratio(counted, call.forward_minimum(), call.small + size(call.bias)) <= 1.02


def test_a_sum_that_nobody_asks_for_is_not_written() -> None:
    call = Call(64, 768, BF16, BF16)
    assert call.forward(keep_sum=False).of("total") == 0
    assert call.forward(keep_sum=True).of("total") == size(call.residual)


def test_a_long_row_is_read_again_as_its_sum() -> None:
    call = Call(2, 65536, BF16, BF16)
    for keep_sum in (True, False):
        counted = call.forward(keep_sum)
        assert counted.of("input") == counted.of("residual") == counted.of("output") == size(call.input)
        assert counted.of("total") == 2 * size(call.residual)


@pytest.mark.parametrize(
    ("call", "mask"),
    [
        (Call(1024, 64, BF16, BF16), "irwb"),
        (Call(1024, 128, BF16, F32, centred=False, scaled=True), "irwl"),
        (Call(64, 1024, BF16, BF16), "ir"),
    ],
    ids=str,
)
def test_gradients_of_a_sum_take_five_passes(call: Call, mask: str) -> None:
    counted = call.backward(mask)
    assert ratio(counted, call.backward_minimum(mask), call.small) <= 1.05


@pytest.mark.parametrize(("hidden", "sums"), [(768, 2), (1024, 3), (8192, 2), (8192, 3)])
def test_many_rows_have_the_partial_sums_of_few(hidden: int, sums: int) -> None:
    """8192 rows would take minutes here. A few show that all is read once; partial sums follow from sizes."""
    rows, counted_rows = 8192, 4
    mask = "irwbl" if sums == 3 else "irwb"
    call = Call(counted_rows, hidden, BF16, BF16, scaled=sums == 3)
    moved = call.backward(mask)
    activations = moved.of("grad_output", "input", "grad_sum", "branch", "grad_input", "grad_branch")
    assert activations == (3 + sums) * size(call.input)
    launch = _launch.backward(rows, hidden, 2, 8, sums, MULTIPROCESSORS, added=True)
    assert launch.projection is None
    partial = launch.row_programs * hidden * 4 * 2 * sums
    found = 1 + partial / (rows / counted_rows * activations)
    print(f"bytes over the minimum: {found:.4f}")
    assert found <= 1.05


def test_a_gradient_that_is_not_wanted_costs_nothing() -> None:
    call = Call(64, 256, BF16, BF16, scaled=True)
    weight_only = call.backward("w")
    assert weight_only.of("grad_sum", "branch", "grad_branch", "layer_scale", "row_scale", "seed") == 0
    assert weight_only.of("grad_output", "input") == 2 * size(call.input)
    residual_only = call.backward("r")
    assert residual_only.of("branch", "grad_branch", "layer_scale", "row_scale", "seed") == 0
    assert residual_only.of("grad_output", "input", "grad_sum", "grad_input") == 4 * size(call.input)
    scale_only = call.backward("l")
    assert scale_only.of("grad_input", "grad_branch") == 0
    assert scale_only.of("grad_output", "input", "grad_sum", "branch") == 4 * size(call.input)
    assert call.backward("") == Traffic()
