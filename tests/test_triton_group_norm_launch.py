"""The launch configurations of group norm's Triton kernels, as pure functions of sizes: no Triton, no GPU."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreg._channels import ChannelView
from fastreg.backends.triton import _group_norm_launch as launches
from fastreg.backends.triton._launch import ceil_div
from test_triton_batch_norm_launch import H100, ITEMSIZE, MULTIPROCESSORS, check_tile, is_power_of_two, view

pytestmark = pytest.mark.backend_independent

GROUPS = st.one_of(st.integers(1, 64), st.integers(1, 4096))
WIDTH = st.one_of(st.integers(1, 70), st.integers(1, 2**14))
VECTOR = st.sampled_from([1, 2, 4, 8])


@st.composite
def groupings(draw: st.DrawFn) -> tuple[ChannelView, int]:
    """A tensor, and how many groups its channels make."""
    groups, width = draw(GROUPS), draw(WIDTH)
    samples = draw(st.one_of(st.integers(1, 70), st.integers(1, 2**20)))
    spatial = draw(st.one_of(st.just(1), st.integers(1, 300), st.integers(1, 2**22)))
    return view(draw(st.booleans()), samples, groups * width, spatial), groups


@given(grouping=groupings(), itemsize=ITEMSIZE, vector=VECTOR, processors=MULTIPROCESSORS)
@settings(max_examples=500, deadline=None)
def test_a_slab_holds_its_groups(
    grouping: tuple[ChannelView, int], itemsize: int, vector: int, processors: int
) -> None:
    seen, groups = grouping
    width = seen.channels // groups
    lines = seen.spatial if seen.rows else width
    for choose in (launches.forward_slab, launches.backward_slab):
        slab = choose(seen, groups, itemsize, vector, processors)
        if slab is None:
            continue
        check_tile(slab.samples * slab.lines, slab.block, slab.warps)
        assert is_power_of_two(slab.samples)
        assert (slab.chunks - 1) * slab.lines < lines <= slab.chunks * slab.lines
        assert slab.chunks == 1 or slab.samples == 1
        assert (slab.sample_blocks - 1) * slab.samples < seen.samples <= slab.sample_blocks * slab.samples
        if seen.rows:
            beside = slab.block // slab.width
            assert slab.width // 2 < width <= slab.width
            assert (slab.strips - 1) * beside < groups <= slab.strips * beside
            assert slab.even == (slab.width == width and groups % beside == 0)
            # A strip is a sector wide, unless there are no more channels.
            assert beside * width * itemsize >= launches.SECTOR_BYTES or beside >= groups
        else:
            assert slab.strips == groups
            assert slab.block >= seen.spatial
            assert slab.even == (slab.block == seen.spatial)
        assert slab.packed <= (itemsize == 2)
        # The registers of a multiprocessor hold 64K values of 32 bits.
        elements = slab.chunks * slab.samples * slab.lines * slab.block
        assert elements * (itemsize if slab.packed else 4) <= 4 * 32 * 1024
        small = seen.lines * seen.line_elements <= launches.SMALL
        assert small or 2 * slab.programs >= processors


@given(grouping=groupings(), itemsize=ITEMSIZE, vector=VECTOR, tensors=st.integers(2, 3))
@settings(max_examples=300, deadline=None)
def test_an_elementwise_launch_covers_every_element_of_a_sample_once(
    grouping: tuple[ChannelView, int], itemsize: int, vector: int, tensors: int
) -> None:
    seen, _ = grouping
    launch = launches.elementwise(seen, itemsize, vector, tensors)
    check_tile(launch.rows, launch.block, launch.warps)
    assert (launch.blocks - 1) * launch.block < seen.line_elements <= launch.blocks * launch.block
    lines = seen.spatial if seen.rows else seen.lines
    tiles = launch.programs // launch.blocks
    assert launch.programs == tiles * launch.blocks
    assert (tiles - 1) * launch.rows < lines <= tiles * launch.rows


@given(grouping=groupings(), itemsize=ITEMSIZE, processors=MULTIPROCESSORS)
@settings(max_examples=500, deadline=None)
def test_sums_cover_every_element_once(
    grouping: tuple[ChannelView, int], itemsize: int, processors: int
) -> None:
    seen, _ = grouping
    launch = launches.sums(seen, itemsize, processors)
    check_tile(launch.rows, launch.block, launch.warps)
    assert launch.part <= 32
    assert launch.even == (seen.line_elements % launch.block == 0)
    blocks = ceil_div(seen.line_elements, launch.block)
    if seen.rows:
        assert launch.strips == blocks
        tiles = ceil_div(seen.spatial, launch.rows)
    else:
        assert (launch.strips - 1) * launch.rows < seen.lines <= launch.strips * launch.rows
        assert launch.blocks == blocks
        tiles = blocks
    assert (launch.parts - 1) * launch.part < tiles <= launch.parts * launch.part


@given(grouping=groupings(), itemsize=ITEMSIZE, processors=MULTIPROCESSORS)
@settings(max_examples=500, deadline=None)
def test_moments_see_every_element_of_a_sample_once(
    grouping: tuple[ChannelView, int], itemsize: int, processors: int
) -> None:
    seen, groups = grouping
    found = launches.moments(seen, groups, itemsize, processors)
    sample, launch = found.view, found.launch
    assert sample.lines * sample.line_elements == seen.channels * seen.spatial
    assert launch.part <= 32
    units = ceil_div(sample.per_channel if sample.rows else sample.samples, launch.rows) * launch.blocks
    assert (launch.parts - 1) * launch.part < units <= launch.parts * launch.part
    if sample.rows:
        assert (sample.samples, sample.channels) == (1, seen.channels)
        assert found.programs == launch.strips * launch.parts * seen.samples
    else:
        assert sample.channels == groups
        assert found.programs == groups * seen.samples * launch.parts


@given(groups=st.integers(1, 2**16), partials=st.one_of(st.integers(1, 300), st.integers(1, 2**20)))
def test_a_merge_covers_every_group_once(groups: int, partials: int) -> None:
    launch = launches.merge(groups, partials)
    assert is_power_of_two(launch.parts)
    assert is_power_of_two(launch.channels)
    assert (launch.programs - 1) * launch.channels < groups <= launch.programs * launch.channels


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize(
    ("channels", "groups", "side"), [(320, 32, 64), (128, 32, 256), (512, 32, 64), (96, 1, 56)]
)
def test_one_sample_fills_the_machine(channels: int, groups: int, side: int, rows: bool) -> None:
    seen = view(rows, 1, channels, side * side)
    assert launches.forward_slab(seen, groups, 2, 8, H100) is None
    assert launches.backward_slab(seen, groups, 2, 8, H100) is None
    assert launches.moments(seen, groups, 2, H100).programs >= H100
    assert launches.elementwise(seen, 2, 8, 2).programs >= H100 // 2
    assert launches.sums(seen, 2, H100).programs >= H100


def passes(layer: tuple[int, int], batch: int, rows: bool, groups: int = 32) -> tuple[int, int]:
    """Passes over bfloat16 tensors that forward and backward make."""
    channels, side = layer
    seen = view(rows, batch, channels, side * side)
    vector = math.gcd(8, channels if rows else side * side)
    forward = launches.forward_slab(seen, groups, 2, vector, H100)
    backward = launches.backward_slab(seen, groups, 2, vector, H100)
    return (3 if forward is None else 2), (5 if backward is None else 3)


# Of planes, of a ResNet-50 with group norm, at any batch that fills the machine.
@pytest.mark.parametrize("batch", [4, 32, 256])
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ((64, 112), (2, 5)),
        ((64, 56), (2, 3)),
        ((256, 56), (2, 5)),
        ((128, 28), (2, 3)),
        ((512, 28), (2, 5)),
        ((256, 14), (2, 3)),
        ((1024, 14), (2, 3)),
        ((2048, 7), (2, 3)),
    ],
    ids=str,
)
def test_what_stays_on_chip_of_planes(layer: tuple[int, int], expected: tuple[int, int], batch: int) -> None:
    assert passes(layer, batch, rows=False) == expected


@pytest.mark.parametrize(
    ("layer", "batch", "groups", "expected"),
    [
        ((64, 56), 32, 32, (3, 5)),
        ((1280, 16), 8, 32, (2, 5)),
        ((640, 16), 8, 32, (2, 3)),
        ((1280, 8), 8, 32, (2, 3)),
        ((2048, 7), 32, 32, (2, 3)),
        ((320, 64), 2, 32, (3, 5)),
        ((256, 1), 4096, 32, (2, 3)),
        ((64, 14), 32, 64, (2, 3)),
    ],
    ids=str,
)
def test_what_stays_on_chip_of_rows(
    layer: tuple[int, int], batch: int, groups: int, expected: tuple[int, int]
) -> None:
    assert passes(layer, batch, rows=True, groups=groups) == expected
