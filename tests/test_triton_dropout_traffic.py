"""Bytes that the Triton kernels of dropout and DropBlock move, over the least that it takes, in the mended interpreter.

The minimum of dropout is one pass over the input, over the residual if there is one, and over the output; backward with
the gradient of layer_scale takes a pass over input, gradient and the input's gradient. Of DropBlock it is one pass over
input and output: all of its mask counts against it. Everything that a kernel loads or stores counts, except that scales
count once however often they are read, as in test_triton_batch_norm_traffic.py.

Launches are those of an H100 with its 132 multiprocessors, not those of the interpreter. What is drawn is compared with
the reference as well: here are the ways that only large tensors take.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

import triton_interpreter
from fastreg._units import CHANNEL, ELEMENT, SAMPLE, lanes
from fastreg.backends.reference import _philox
from fastreg.backends.reference import drop_block as drop_block_formula
from fastreg.backends.reference import dropout as dropout_formula
from fastreg.backends.triton import _device, _drop_block_launch, drop_block, dropout
from fastreg.backends.triton._dropout_tiles import philox
from triton_dropout_offline import DropBlock, Dropout
from triton_interpreter import Traffic, traffic

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

MULTIPROCESSORS = 132
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL = ("row_scale", "layer_scale", "scale", "seed", "dynamic_threshold")


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: MULTIPROCESSORS)


def size(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def ratio(counted: Traffic, minimum: int, beside: int = 0) -> float:
    """Bytes moved over the minimum, with scales left out; prints it, and how much those were."""
    small = counted.of(*SMALL)
    found = (counted.loaded + counted.stored - small + beside) / minimum
    assert found >= 0.999, "the minimum is not one"
    print(f"bytes over the minimum: {found:.4f}; parameters read again: {small / minimum:.3f} minimums")
    return found


# --- dropout ---------------------------------------------------------------------------------------------------------


def mask_of(call: Dropout, rate: float) -> tuple[torch.Tensor, int, None, int, bool]:
    return torch.tensor(12345), round(rate * lanes(call.unit)), None, call.unit, True


def scales_of(call: Dropout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    row_scale = torch.rand(call.shape[: call.row_scale]) if call.row_scale else None
    layer_scale = None if call.layer_scale is None else torch.rand(call.shape[-1]).to(call.layer_scale)
    return row_scale, layer_scale


# Of a language model, a vision transformer and a convolutional network.
CALLS = (
    Dropout((16, 1024), BF16),
    Dropout((17, 1000), BF16, residual=BF16),
    Dropout((16, 1024), BF16, residual=F32),
    Dropout((16, 1024), F32, residual=F32),
    Dropout((2, 50, 384), BF16, residual=BF16, row_scale=1, layer_scale=F32),
    Dropout((2, 20, 383), F16, residual=F16, layer_scale=F16),
    Dropout((2, 32, 14, 14), BF16, CHANNEL),
    Dropout((2, 32, 7, 7), BF16, CHANNEL),
    Dropout((2, 32, 14, 14), BF16, CHANNEL, rows=True),
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_dropout_reads_once_and_writes_once(call: Dropout) -> None:
    input = call.activations("input")
    residual = None if call.residual is None else call.activations("residual", call.residual)
    scales = scales_of(call)
    arguments = (input, residual, *scales, *mask_of(call, 0.1))
    with traffic() as counted:
        output = dropout.dropout_fwd(*arguments)
    expected = dropout_formula.dropout_fwd(*arguments)
    if call.unit == ELEMENT:
        assert ratio(counted, size(input, residual, output)) <= 1.05
    assert counted.of("output") == size(output)
    if residual is None:
        assert torch.equal(output, expected)
    else:
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "call",
    [Dropout((8, 64, 12), BF16, SAMPLE), Dropout((8, 64, 8, 8), F32, SAMPLE, residual=F32)],
    ids=str,
)
def test_what_is_dropped_at_once_is_not_read(call: Dropout) -> None:
    input = call.activations("input")
    arguments = (input, None, None, None, *mask_of(call, 0.5))
    with traffic() as counted:
        output = dropout.dropout_fwd(*arguments)
    kept = int((output.flatten(1) != 0).any(dim=1).sum())
    assert 0 < kept < call.shape[0]
    assert counted.of("input") == kept * size(input) // call.shape[0]
    assert torch.equal(output, dropout_formula.dropout_fwd(*arguments))


@pytest.mark.parametrize(
    "call",
    [
        Dropout((4, 256, 64), BF16, layer_scale=F32),
        Dropout((4, 96, 192), BF16, SAMPLE, layer_scale=BF16),
        Dropout((2, 256, 64), F32, row_scale=2, layer_scale=F32),
    ],
    ids=str,
)
def test_backward_of_layer_scale_reads_once(call: Dropout) -> None:
    input, grad_output = call.activations("input"), call.activations("grad_output")
    rate = 0.0 if call.unit == SAMPLE else 0.1
    arguments = (grad_output, input, *scales_of(call), *mask_of(call, rate), call.number)
    with traffic() as counted:
        gradients = dropout.dropout_bwd(*arguments, (True, True))
    assert ratio(counted, size(input, grad_output, gradients[0])) <= 1.05
    for found, expected in zip(gradients, dropout_formula.dropout_bwd(*arguments, (True, True)), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


def test_a_gradient_that_is_not_wanted_costs_nothing() -> None:
    call = Dropout((4, 64, 64), BF16, layer_scale=F32)
    input, grad_output = call.activations("input"), call.activations("grad_output")
    arguments = (grad_output, input, *scales_of(call), *mask_of(call, 0.1), call.number)
    with traffic() as counted:
        dropout.dropout_bwd(*arguments, (False, False))
    assert counted == Traffic()
    with traffic() as counted:
        dropout.dropout_bwd(*arguments, (True, False))
    assert counted.of("input", "output") == 2 * size(input)
    with traffic() as counted:
        dropout.dropout_bwd(*arguments, (False, True))
    assert counted.of("input", "grad_output") == 2 * size(input)
    assert counted.of("grad_input") == 0


# --- DropBlock -------------------------------------------------------------------------------------------------------

# Of a ResNet, at 224 and at 32 pixels, and of a network for video.
BLOCKS = (
    DropBlock((1, 4, 56, 56), 7, BF16),
    DropBlock((1, 8, 28, 28), 7, BF16),
    DropBlock((1, 16, 14, 14), 7, BF16),
    DropBlock((2, 16, 14, 14), 7, BF16, anywhere=True),
    DropBlock((2, 16, 7, 7), 3, BF16),
    DropBlock((1, 8, 16, 16), 5, F32),
    DropBlock((2, 32, 14, 14), 7, BF16, one_plane=True),
    DropBlock((1, 16, 28, 28), 7, BF16, rows=True),
    DropBlock((1, 32, 14, 14), 7, BF16, rows=True, one_plane=True),
    DropBlock((1, 4, 4, 28, 28), 3, BF16),
)


@pytest.mark.parametrize("call", BLOCKS, ids=str)
def test_drop_block_reads_once_and_writes_once(call: DropBlock) -> None:
    input = call.activations("input")
    scale = torch.rand(call.shape[0], dtype=torch.float64)
    mask = (torch.tensor(7), call.mask_shape, call.blocks, 2**27, None, call.anywhere)
    with traffic() as counted:
        bits, kept = drop_block.drop_block_mask(*mask)
        output = drop_block.drop_block_apply(input, bits, scale)
    # The counts of volumes are added up by torch.
    beside = sum(count for (_, name), count in counted.stores.items() if name == "kept") + size(kept)
    assert ratio(counted, size(input, output), beside) <= 1.15
    expected = drop_block_formula.drop_block_mask(*mask)
    assert torch.equal(bits, expected[0])
    assert torch.equal(kept, expected[1])
    assert 0 < int(kept.sum()) < math.prod(call.mask_shape)
    assert torch.equal(output, drop_block_formula.drop_block_apply(input, bits, scale))


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((2, 3, 14, 14), (3, 5)), ((1, 2, 9, 70), (9, 66)), ((1, 2, 4, 6, 7), (2, 3, 4))],
    ids=str,
)
def test_volumes_of_too_many_rows_have_the_same_mask(
    shape: tuple[int, ...], block: tuple[int, ...], anywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = (torch.tensor(3), shape, block, 2**26, None, anywhere)
    expected = drop_block_formula.drop_block_mask(*mask)
    for most in (_drop_block_launch.MOST_ROWS, 4):
        monkeypatch.setattr(_drop_block_launch, "MOST_ROWS", most)
        found = drop_block.drop_block_mask(*mask)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


# --- the random stream -----------------------------------------------------------------------------------------------


@triton.jit
def draw(seed: tl.tensor, blocks: tl.tensor, words: tl.tensor, BLOCK: tl.constexpr) -> None:  # noqa: N803
    place = tl.arange(0, BLOCK)
    drawn = philox(tl.load(seed), tl.load(blocks + place))
    for word in tl.static_range(4):
        tl.store(words + place * 4 + word, drawn[word].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, -(2**63)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_the_stream_is_the_references(seed: int, index: torch.dtype) -> None:
    last = 2**31 - 1 if index == torch.int32 else 2**33 + 2**32 - 1
    blocks = torch.tensor([0, 1, 2, last], dtype=index)
    words = torch.empty(4, 4, dtype=torch.int64)
    draw[(1,)](torch.tensor(seed), blocks, words, 4)
    wide = blocks.long()
    zero = torch.zeros_like(wide)
    expected = _philox.philox(torch.tensor(seed), wide & 0xFFFFFFFF, wide >> 32, zero, zero)
    assert torch.equal(words, torch.stack(expected, dim=1))
    if seed == 0:
        # Of the paper's authors: key and counter 0.
        assert words[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
