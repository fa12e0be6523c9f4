"""Bytes that group and instance norm's Triton kernels move, over the least that it takes, in the mended interpreter.

The minimum counts passes over the activations: forward one over the input and one over the output, and one more over
the input where a group does not fit on chip; backward two over input and gradient and one over the input's gradient,
or one each on chip. Everything that a kernel loads or stores counts against it, the sums of every channel of every
sample too, except that what belongs to a channel or a group (parameters, statistics, means) counts once however often
it is read, as in test_triton_batch_norm_traffic.py.

Launches are those of an H100 with its 132 multiprocessors, not those of the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import triton_interpreter
from fastreg._activations import IDENTITY, RELU, SILU
from fastreg._channels import channel_view, dense_strides
from fastreg.backends.triton import _device, group_norm, instance_norm
from fastreg.backends.triton import _group_norm_launch as launches
from fastreg.backends.triton._group_norm_launchers import slab_of
from triton_interpreter import Traffic, traffic

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

MULTIPROCESSORS = 132
BF16, F32 = torch.bfloat16, torch.float32
# What belongs to a channel or a group.
SMALL = (
    *("weight", "bias", "running_mean", "running_var", "statistics", "means", "squares_of", "squares"),
    *("grad_weight", "grad_bias"),
)


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: MULTIPROCESSORS)
    # What is read twice because there are few groups is smaller here than there, for the interpreter's sake.
    monkeypatch.setattr(launches, "SMALL", 2**15)


@dataclass(frozen=True)
class Layer:
    """A group norm, or instance norm where each channel is a group, with its tensors."""

    samples: int
    channels: int
    groups: int
    side: int
    rows: bool
    float: torch.dtype
    activation: int = IDENTITY
    tensors: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        dtype = str(self.float).removeprefix("torch.")
        family = "rows" if self.rows else "planes"
        size = f"{self.samples}x{self.channels}x{self.side}^2"
        return f"{size}-{self.groups}-{family}-{dtype}-{self.activation}"

    def activations(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            shape = (self.samples, self.channels, self.side, self.side)
            strides = dense_strides(shape, self.rows)
            self.tensors[name] = torch.ones(shape, dtype=self.float).as_strided(shape, strides)
        return self.tensors[name]

    def on_chip(self, choose: Any, *names: str) -> bool:
        tensors = [self.activations(name) for name in names]
        view = channel_view(tensors[0])
        assert view is not None
        return slab_of(choose, view, self.groups, *tensors) is not None

    @property
    def pass_bytes(self) -> int:
        tensor = self.activations("input")
        return tensor.numel() * tensor.element_size()

    def forward(self) -> Traffic:
        weight, bias, mean, variance = torch.ones(4, self.channels).unbind()
        input, end = self.activations("input"), (1e-5, self.activation, 0.0)
        with traffic() as counted:
            if self.groups == self.channels:
                instance_norm.instance_norm_fwd(input, weight, bias, mean, variance, 0.1, *end)
            else:
                group_norm.group_norm_fwd(input, self.groups, weight, bias, *end)
        return counted

    def backward(self, mask: Sequence[bool]) -> Traffic:
        weight, bias = torch.ones(2, self.channels).unbind()
        statistics = torch.ones(2, self.samples, self.groups)
        with traffic() as counted:
            group_norm.group_norm_bwd(
                *(self.activations("grad_output"), self.activations("input"), self.groups, statistics),
                *(weight, bias, self.activation, 0.0, mask),
            )
        return counted


def ratio(counted: Traffic, passes: int, layer: Layer) -> float:
    """Bytes moved over the minimum, with what belongs to channels and groups left out; prints how much that was."""
    minimum = passes * layer.pass_bytes
    small = counted.of(*SMALL)
    found = (counted.loaded + counted.stored - small) / minimum
    assert found >= 0.999, "the minimum is not one"
    print(f"bytes over the minimum: {found:.4f}; parameters and statistics: {small / minimum:.3f} minimums")
    return found


# Of a ResNet and of a diffusion model; a batch of one; instance norm; two-dimensional input.
LAYERS = (
    Layer(2, 64, 32, 14, False, BF16, RELU),
    Layer(1, 64, 32, 28, False, BF16, SILU),
    Layer(1, 320, 32, 16, True, BF16, SILU),
    Layer(1, 96, 1, 28, True, F32, SILU),
    Layer(1, 96, 96, 28, True, BF16, RELU),
    Layer(3, 640, 32, 6, True, F32, SILU),
    Layer(6, 256, 32, 7, False, BF16, RELU),
    Layer(9, 256, 32, 7, True, BF16, RELU),
    Layer(8, 64, 64, 7, False, BF16, RELU),
    Layer(512, 256, 32, 1, True, BF16, SILU),
)
IN_PARTS = LAYERS[1:5]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_groups_are_read_twice_or_once(layer: Layer) -> None:
    passes = 2 if layer.on_chip(launches.forward_slab, "input") else 3
    moved = layer.forward()
    assert moved.of("input") == (passes - 1) * layer.pass_bytes
    assert ratio(moved, passes, layer) <= 1.05


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_backward_of_groups_reads_twice_or_once(layer: Layer) -> None:
    passes = 3 if layer.on_chip(launches.backward_slab, "grad_output", "input") else 5
    moved = layer.backward((True, True, True))
    assert ratio(moved, passes, layer) <= 1.05


def test_both_ways_are_counted() -> None:
    for layer in LAYERS:
        assert layer.on_chip(launches.forward_slab, "input") == (layer not in IN_PARTS)
        assert layer.on_chip(launches.backward_slab, "grad_output", "input") == (layer not in IN_PARTS)


@pytest.mark.parametrize("on_chip", [False, True], ids=["parts", "on-chip"])
@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_a_gradient_that_is_not_wanted_costs_nothing(
    rows: bool, on_chip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_chip:
        monkeypatch.setattr(launches, "SMALL", 0)
    layer = Layer(2, 32, 4, 16, rows, BF16)
    assert layer.backward((False, False, False)) == Traffic()
    bias = layer.backward((False, False, True))
    assert bias.of("grad_output") == layer.pass_bytes
    assert bias.of("input", "grad_input", "partial_product", "grad_weight", "means") == 0
    weight = layer.backward((False, True, False))
    assert weight.of("grad_output", "input") == 2 * layer.pass_bytes
    assert weight.of("grad_input", "partial_sum", "grad_bias", "means") == 0
    input = layer.backward((True, False, False))
    assert input.of("grad_weight", "grad_bias") == 0
    if on_chip:
        assert input.of("grad_output", "input", "grad_input") == 3 * layer.pass_bytes
        assert input.of("partial_sum", "partial_product") == 0
