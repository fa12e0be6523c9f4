"""The ways that batch norm's CPU kernels take by shape, which the op suite's small shapes do not all reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import Mix
from channel_norms import BATCH_NORM, size
from instruction_sets import LEVELS, has, kernels_of
from suite import check_case, check_tensors, make_tensors, plain_case

pytestmark = pytest.mark.only(backend="native", device="cpu")

each_level = pytest.mark.parametrize("level", [level for level in LEVELS if has(level)])
F32, BF16 = torch.float32, torch.bfloat16


def mix(element: torch.dtype, residual: bool) -> Mix:
    """Of input, residual, weight, bias and the running statistics."""
    return Mix((element, element if residual else None, *(torch.promote_types(element, F32),) * 4))


CHAINS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (False, {}),
    "add": (True, {}),
    "relu": (False, {"activation": "relu"}),
    "add, relu": (True, {"activation": "relu"}),
    "add, leaky_relu": (True, {"activation": "leaky_relu", "negative_slope": 0.2}),
    "add, silu": (True, {"activation": "silu"}),
    "evaluation": (True, {"activation": "relu", "training": False}),
}


@each_level
@pytest.mark.parametrize("element", [F32, BF16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
# Bits that fill no byte, one word, several; runs with a rest and without; one more sample than a group has.
@pytest.mark.parametrize("shape", [(9, 5, 7, 7), (11, 3, 9, 13), (8, 70, 1, 3), (13, 24, 16, 16)], ids=str)
def test_adjacent_small_planes(shape: tuple[int, ...], chain: str, element: torch.dtype, level: str) -> None:
    residual, arguments = CHAINS[chain]
    case = plain_case(BATCH_NORM, size(*shape), mix(element, residual), arguments=arguments)
    with kernels_of(level):
        check_case(BATCH_NORM, case)


# Of 12 MiB or more: past the caches, where the lines or runs are whole cache lines, or one of the two is not.
LARGE = {
    "runs": (size(16, 5408, 7, 7), F32, "contiguous"),
    "runs of 16-bit elements": (size(16, 2688, 14, 14), BF16, "contiguous"),
    "runs that are not aligned": (size(65, 1301, 7, 8), F32, "contiguous"),
    "planes": (size(3, 24, 224, 224), F32, "contiguous"),
    "odd planes": (size(4, 25, 213, 211), F32, "contiguous"),
    "rows": (size(3, 512, 46, 46), F32, "channels_last"),
    "rows of 16-bit elements": (size(4, 544, 63, 64), BF16, "channels_last"),
    "odd rows": (size(4, 513, 46, 46), F32, "channels_last"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=() if name in ("runs", "planes", "rows of 16-bit elements") else pytest.mark.complete,
        )
        for name in LARGE
    ],
)
def test_large_outputs(name: str) -> None:
    shape, dtype, layout = LARGE[name]
    arguments = {"activation": "relu"}
    layouts = {"layout": layout, "grad_layout": layout, "companion_layout": layout}
    case = plain_case(BATCH_NORM, shape, mix(dtype, residual=True), arguments=arguments, **layouts)
    check_case(BATCH_NORM, case)


@each_level
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("far", [30.0, 1e4])
@pytest.mark.parametrize("first", [1, 3, 8, 33])
def test_a_beginning_unlike_the_rest(first: int, far: float, layout: str, level: str) -> None:
    """Deviations are taken from the mean of what was read first."""
    layouts = {"layout": layout, "grad_layout": layout, "companion_layout": layout}
    case = plain_case(BATCH_NORM, size(66, 17, 8, 8), mix(F32, residual=False), **layouts)
    tensors = make_tensors(BATCH_NORM, case)
    given = tensors["input"]
    assert given is not None
    with torch.no_grad():
        given[:first] += far
    with kernels_of(level):
        check_tensors(BATCH_NORM, case, tensors)
