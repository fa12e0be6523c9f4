"""Bytes that batch norm's Triton kernels move, over the least that it takes, counted in the mended interpreter.

The minimum counts passes over the activations: in evaluation one over the input and one over the output; in training
one more over the input, where a channel does not fit on chip; in backward two over input and gradient and one over the
input's gradient, or one each on chip; one over a residual and one over its gradient; a sixteenth of a bfloat16 pass
over signs. Everything that a kernel loads or stores counts against it, partial sums too, except that what belongs to a
channel (parameters, statistics, sums) counts once however often it is read, as in test_triton_traffic.py.

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
from fastreg._channels import channel_view, dense_strides, sign_bytes
from fastreg.backends.triton import _batch_norm_launch as launches
from fastreg.backends.triton import _device, batch_norm
from triton_interpreter import Traffic, traffic

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

MULTIPROCESSORS = 132
BF16, F32 = torch.bfloat16, torch.float32
# What belongs to a channel.
CHANNELS = ("weight", "bias", "running_mean", "running_var", "statistics", "sums", "grad_weight", "grad_bias")


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: MULTIPROCESSORS)


@dataclass(frozen=True)
class Layer:
    """A batch norm with its tensors."""

    samples: int
    channels: int
    side: int
    rows: bool
    float: torch.dtype
    activation: int = IDENTITY
    residual: bool = False
    tensors: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        dtype = str(self.float).removeprefix("torch.")
        tail = "-residual" if self.residual else ""
        family = "rows" if self.rows else "planes"
        return f"{self.samples}x{self.channels}x{self.side}^2-{family}-{dtype}-{self.activation}{tail}"

    def activations(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            shape = (self.samples, self.channels, self.side, self.side)
            strides = dense_strides(shape, self.rows)
            self.tensors[name] = torch.ones(shape, dtype=self.float).as_strided(shape, strides)
        return self.tensors[name]

    def on_chip(self, choose: Any) -> bool:
        view = channel_view(self.activations("input"))
        assert view is not None
        return choose(view, self.activations("input").element_size(), MULTIPROCESSORS) is not None

    @property
    def pass_bytes(self) -> int:
        tensor = self.activations("input")
        return tensor.numel() * tensor.element_size()

    @property
    def signs_bytes(self) -> int:
        view = channel_view(self.activations("input"))
        assert view is not None
        return sign_bytes(view) if self.residual and self.activation == RELU else 0

    def forward(self, training: bool) -> Traffic:
        vectors = torch.ones(4, self.channels).unbind()
        residual = self.activations("residual") if self.residual else None
        with traffic() as counted:
            if training:
                batch_norm.batch_norm_fwd(
                    *(self.activations("input"), residual, *vectors, 0.1, 1e-5, self.activation, 0.0),
                    *(False, True),
                )
            else:
                batch_norm.batch_norm_eval(
                    *(self.activations("input"), residual, *vectors, 1e-5, self.activation, 0.0, True)
                )
        return counted

    def backward(self, training: bool, mask: Sequence[bool]) -> Traffic:
        weight, bias = torch.ones(2, self.channels).unbind()
        signs = torch.ones(self.signs_bytes, dtype=torch.uint8) if self.signs_bytes else None
        residual = self.activations("residual") if self.residual and signs is None else None
        with traffic() as counted:
            batch_norm.batch_norm_bwd(
                *(self.activations("grad_output"), self.activations("input"), residual, signs),
                *(torch.ones(2, self.channels), weight, bias, training, self.activation, 0.0, mask),
            )
        return counted


def ratio(counted: Traffic, passes: float, layer: Layer, more: int = 0) -> float:
    """Bytes moved over the minimum, with what belongs to a channel left out, and prints how much that was."""
    minimum = passes * layer.pass_bytes + more
    of_channels = counted.of(*CHANNELS)
    found = (counted.loaded + counted.stored - of_channels) / minimum
    assert found >= 0.999, "the minimum is not one"
    print(
        f"bytes over the minimum: {found:.4f}; parameters and statistics: {of_channels / minimum:.3f} minimums"
    )
    return found


# Of a ResNet: a layer of many pixels and few channels, the reverse, and one between them.
LAYERS = (
    Layer(2, 64, 56, False, BF16, RELU, residual=True),
    Layer(2, 64, 56, True, BF16, RELU, residual=True),
    Layer(2, 64, 56, False, F32, SILU),
    Layer(8, 256, 14, False, BF16, IDENTITY),
    Layer(8, 256, 14, True, BF16, SILU),
    Layer(16, 512, 7, False, BF16, RELU, residual=True),
    Layer(16, 512, 7, True, F32, IDENTITY),
)
each_layer = pytest.mark.parametrize(
    "layer",
    [
        pytest.param(layer, id=str(layer), marks=pytest.mark.complete if place in (1, 2, 5) else ())
        for place, layer in enumerate(LAYERS)
    ],
)


@each_layer
def test_evaluation_reads_once_and_writes_once(layer: Layer) -> None:
    moved = layer.forward(training=False)
    assert ratio(moved, 2 + layer.residual, layer, layer.signs_bytes) <= 1.01


@each_layer
def test_training_reads_twice_or_once(layer: Layer) -> None:
    passes = 2 if layer.on_chip(launches.forward_slab) else 3
    moved = layer.forward(training=True)
    assert moved.of("input") == (passes - 1) * layer.pass_bytes
    assert ratio(moved, passes + layer.residual, layer, layer.signs_bytes) <= 1.05


@each_layer
def test_backward_reads_twice_or_once(layer: Layer) -> None:
    """With a residual its gradient is written and, in the second pass, read in place of all that it was made of."""
    on_chip = layer.on_chip(launches.backward_slab)
    moved = layer.backward(True, (True, layer.residual, True, True))
    passes = (3 if on_chip else 5) + layer.residual
    assert ratio(moved, passes, layer, layer.signs_bytes) <= 1.05


@pytest.mark.parametrize("layer", LAYERS[2:4], ids=str)
def test_backward_of_constant_statistics_reads_once(layer: Layer) -> None:
    moved = layer.backward(False, (True, False, True, True))
    assert ratio(moved, 3, layer) <= 1.05
    frozen = layer.backward(False, (True, False, False, False))
    assert frozen.of("partial_sum", "partial_product", "grad_weight", "grad_bias") == 0
    if layer.activation == IDENTITY:
        assert frozen.of("input") == 0
        assert frozen.of("grad_output", "grad_input") == 2 * layer.pass_bytes


@pytest.mark.parametrize(
    "rows", [pytest.param(False, marks=pytest.mark.complete), True], ids=["planes", "rows"]
)
def test_a_gradient_that_is_not_wanted_costs_nothing(rows: bool) -> None:
    layer = Layer(2, 64, 56, rows, BF16)
    assert layer.backward(True, (False, False, False, False)) == Traffic()
    bias = layer.backward(True, (False, False, False, True))
    assert bias.of("grad_output") == layer.pass_bytes
    assert bias.of("input", "grad_input", "partial_product", "grad_weight") == 0
    weight = layer.backward(True, (False, False, True, False))
    assert weight.of("grad_output", "input") == 2 * layer.pass_bytes
    assert weight.of("grad_input", "partial_sum", "grad_bias") == 0
    input = layer.backward(True, (True, False, False, False))
    assert input.of("grad_weight", "grad_bias") == 0


@pytest.mark.parametrize(
    ("float_", "again"), [(BF16, 3), pytest.param(F32, 2, marks=pytest.mark.complete)], ids=str
)
def test_a_rounded_gradient_of_the_residual_is_not_read_again(float_: torch.dtype, again: int) -> None:
    """SiLU's is rounded to bfloat16: the gradient of the input is then computed from all that made it."""
    layer = Layer(2, 64, 56, False, float_, SILU, residual=True)
    moved = layer.backward(True, (True, True, True, True))
    assert ratio(moved, 3 + 1 + again + 1, layer) <= 1.05
