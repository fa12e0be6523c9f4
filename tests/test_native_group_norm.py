"""The ways that group norm's CPU kernels take by shape, which the op suite's small shapes do not all reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from activations import NAMES
from cases import Mix, Size
from group_norms import GROUP_NORM, size
from instruction_sets import LEVELS, has, kernels_of
from suite import check_case, check_tensors, make_tensors, plain_case, run, same_bits

pytestmark = pytest.mark.only(backend="native", device="cpu")

each_level = pytest.mark.parametrize("level", [level for level in LEVELS if has(level)])
each_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def mix(element: torch.dtype, weight: bool = True, bias: bool = True) -> Mix:
    """Of input, weight and bias."""
    wide = torch.promote_types(element, F32)
    return Mix((element, wide if weight else None, wide if bias else None))


def laid_out(layout: str) -> dict[str, str]:
    return {"layout": layout, "grad_layout": layout}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- every activation, element and instruction set --------------------------------------------------------


@each_level
@each_layout
@pytest.mark.parametrize("element", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("activation", [None, *NAMES[1:]])
# Groups of a part of a vector, of several, and planes of several units with a rest.
@pytest.mark.parametrize(
    "sized",
    [size(3, 10, 7, 7, groups=5), size(1, 36, 9, 13, groups=3), size(2, 6, 70, 71, groups=2)],
    ids=str,
)
def test_kernels(sized: Size, activation: str | None, element: torch.dtype, layout: str, level: str) -> None:
    arguments = {"activation": activation, "negative_slope": 0.2}
    case = plain_case(GROUP_NORM, sized, mix(element), arguments=arguments, **laid_out(layout))
    with kernels_of(level):
        check_case(GROUP_NORM, case)


@each_level
@each_layout
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("sized", [size(3, 10, 7, 7, groups=5), size(3, 10, groups=2)], ids=str)
def test_absent_parameters(sized: Size, weight: bool, bias: bool, layout: str, level: str) -> None:
    """Without both the channels of a group are one."""
    case = plain_case(
        GROUP_NORM, sized, mix(F32, weight, bias), arguments={"activation": "silu"}, **laid_out(layout)
    )
    with kernels_of(level):
        check_case(GROUP_NORM, case)


# --- the ways through the schedule ------------------------------------------------------------------------

# What decides: are there groups (or samples) enough to go round, and does what is read twice fit a cache.
SCHEDULES = {
    "one thread": size(2, 12, 7, 7, groups=3),
    "a few groups at a time": size(3, 64, 40, 40, groups=32),
    "more channels than a tile has": size(2, 260, 16, 17, groups=2),
    "a sample at a time": size(6, 40, 33, 35, groups=8),
    "more columns than a tile has": size(4, 1100, 7, 7, groups=11),
    "one group, shared": size(1, 24, 90, 91, groups=1),
    "three groups, shared": size(1, 24, 90, 91, groups=3),
    "samples in one wave": size(3, 4, 160, 161, groups=1),
    "samples in waves": size(3, 3, 600, 620, groups=1),
    "groups in waves": size(1, 6, 590, 600, groups=3),
    "two dimensions": size(300, 130, groups=13),
}


@each_layout
@pytest.mark.parametrize("name", SCHEDULES)
def test_bits_do_not_depend_on_threads(name: str, layout: str) -> None:
    case = plain_case(
        GROUP_NORM, SCHEDULES[name], mix(F32), arguments={"activation": "silu"}, **laid_out(layout)
    )
    tensors = make_tensors(GROUP_NORM, case)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(run(GROUP_NORM, case, tensors))
    for others in results[1:]:
        assert all(same_bits(results[0][name], others[name]) for name in results[0])
    check_tensors(GROUP_NORM, case, tensors)


# Of 12 MiB or more: past the caches, where the lines are whole cache lines.
LARGE = {
    "planes": (size(2, 32, 224, 225, groups=8), F32, "contiguous", None),
    "odd planes": (size(3, 25, 213, 211, groups=5), F32, "contiguous", "silu"),
    "planes of 16-bit elements": (size(2, 64, 224, 225, groups=32), BF16, "contiguous", "silu"),
    "rows": (size(3, 512, 46, 46, groups=32), F32, "channels_last", "silu"),
    "odd rows": (size(3, 510, 47, 46, groups=5), F32, "channels_last", "relu"),
    "rows of 16-bit elements": (size(3, 544, 63, 64, groups=32), BF16, "channels_last", None),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("odd planes", "rows of 16-bit elements") else pytest.mark.complete
        )
        for name in LARGE
    ],
)
def test_large_outputs(name: str) -> None:
    sized, dtype, layout, activation = LARGE[name]
    case = plain_case(GROUP_NORM, sized, mix(dtype), arguments={"activation": activation}, **laid_out(layout))
    check_case(GROUP_NORM, case)


# --- data -------------------------------------------------------------------------------------------------


@each_level
@each_layout
@pytest.mark.parametrize("far", [30.0, 1e4])
@pytest.mark.parametrize("first", [1, 3, 8, 33])
def test_channels_unlike_the_rest(first: int, far: float, layout: str, level: str) -> None:
    """The columns of a group are merged; its elements are measured from the mean of what was read first."""
    case = plain_case(GROUP_NORM, size(2, 66, 9, 9, groups=2), mix(F32), **laid_out(layout))
    tensors = make_tensors(GROUP_NORM, case)
    given = tensors["input"]
    assert given is not None
    with torch.no_grad():
        given[:, :first] += far
        given[1, 40:, 5:] -= far
    with kernels_of(level):
        check_tensors(GROUP_NORM, case, tensors)
