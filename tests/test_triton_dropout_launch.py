"""The launch configurations of dropout's and DropBlock's Triton kernels, as pure functions: no Triton, no GPU."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreg._units import BATCH, CHANNEL, ELEMENT, SAMPLE, Geometry
from fastreg.backends.triton import _drop_block_launch as blocks
from fastreg.backends.triton import _dropout_launch as launches
from fastreg.backends.triton._launch import ceil_div
from test_triton_batch_norm_launch import H100, ITEMSIZE, MULTIPROCESSORS, is_power_of_two

pytestmark = pytest.mark.backend_independent

LENGTH = st.one_of(st.integers(1, 70), st.integers(1, 2**14))
COUNT = st.one_of(st.integers(1, 70), st.integers(1, 2**24))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[int, int, Geometry]:
    """How many elements, which units, and where they lie."""
    samples, channels, spatial = draw(COUNT), draw(LENGTH), draw(LENGTH)
    sample = channels * spatial
    unit = draw(st.sampled_from([ELEMENT, CHANNEL, SAMPLE, BATCH]))
    places = {
        ELEMENT: Geometry(1, 1),
        CHANNEL: Geometry(sample, channels) if draw(st.booleans()) else Geometry(spatial, 1),
        SAMPLE: Geometry(sample, 1),
        BATCH: Geometry(samples * sample, 1),
    }
    return samples * sample, unit, places[unit]


def check_units(
    unit: int,
    geometry: Geometry,
    numel: int,
    run: int,
    found: tuple[int, int, int],
    skip: bool,
    itemsize: int,
) -> None:
    """What the kernel takes for the unit of an element is what the geometry says."""
    units, length, columns = found
    for position in {0, numel - 1, numel // 2, numel // 3, min(numel - 1, geometry.elements)}:
        index, lane = divmod(position, run)
        expected = position // geometry.elements * geometry.columns + position % geometry.columns
        if units == launches.ELEMENTS:
            assert unit == ELEMENT
        elif units == launches.SHARED:
            assert index // length == expected
        elif units == launches.ADJACENT:
            assert (index // length * columns + index % columns) * run + lane == expected
        else:
            first = index * run // length
            left = length - (index * run - first * length)
            assert (first if lane < left else first + 1) == expected
            assert length >= run
    assert not skip or run * itemsize == 16


@given(tensor=tensors(), itemsize=ITEMSIZE, lengths=st.lists(LENGTH, max_size=2))
@settings(max_examples=200, deadline=None)
def test_every_element_is_dropped_once_with_its_unit(
    tensor: tuple[int, int, Geometry], itemsize: int, lengths: list[int]
) -> None:
    numel, unit, geometry = tensor
    launch = launches.elementwise(numel, itemsize, unit, geometry, *lengths)
    assert is_power_of_two(launch.run)
    assert launch.run * itemsize <= 16
    assert all(length % launch.run == 0 for length in lengths)
    elements = launch.run * launch.runs
    assert (launch.programs - 1) * elements < numel <= launch.programs * elements
    assert launch.runs == 32 * launch.warps * launch.parts
    found = (launch.units, launch.unit_length, launch.unit_columns)
    check_units(unit, geometry, numel, launch.run, found, launch.skip, itemsize)


@given(tensor=tensors(), columns=LENGTH, itemsize=ITEMSIZE, processors=MULTIPROCESSORS)
@settings(max_examples=200, deadline=None)
def test_sums_cover_every_row_and_column_once(
    tensor: tuple[int, int, Geometry], columns: int, itemsize: int, processors: int
) -> None:
    numel, unit, geometry = tensor
    columns = math.gcd(columns, numel)
    launch = launches.sums(numel // columns, columns, itemsize, unit, geometry, processors)
    strip = launch.run * launch.runs
    assert is_power_of_two(strip)
    assert is_power_of_two(launch.rows)
    assert (launch.strips - 1) * strip < columns <= launch.strips * strip
    assert columns % launch.run == 0
    assert 1 <= launch.row_programs <= max(1, ceil_div(numel // columns, launch.rows))
    found = (launch.units, launch.unit_length, launch.unit_columns)
    check_units(unit, geometry, numel, launch.run, found, launch.skip, itemsize)


@pytest.mark.parametrize(("rows", "columns"), [(8192, 768), (8192, 1024), (16384, 4096), (2**20, 192)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_sums_fill_the_machine_and_leave_little(rows: int, columns: int, itemsize: int) -> None:
    launch = launches.sums(rows, columns, itemsize, ELEMENT, Geometry(1, 1), H100)
    assert launch.programs >= H100
    left = 8 * launch.row_programs * columns
    assert left <= 0.05 * 3 * rows * columns * itemsize


SIZE = st.one_of(st.integers(1, 80), st.integers(1, 3000))


@st.composite
def masks(draw: st.DrawFn) -> tuple[list[int], list[int], bool]:
    """The shape of a mask, the size of its blocks, and whether they may begin anywhere."""
    spatial = draw(st.lists(SIZE, min_size=2, max_size=3))
    block = [draw(st.integers(1, size)) for size in spatial]
    return [draw(LENGTH), draw(LENGTH), *spatial], block, draw(st.booleans())


@given(mask=masks(), processors=MULTIPROCESSORS)
@settings(max_examples=200, deadline=None)
def test_a_mask_covers_every_row_of_its_volumes_once(
    mask: tuple[list[int], list[int], bool], processors: int
) -> None:
    shape, block_size, anywhere = mask
    spatial = blocks.axes(shape, block_size, anywhere)
    assert [axis.size for axis in spatial] == [1] * (5 - len(shape)) + shape[2:]
    for axis in spatial:
        # A block that begins at the last place ends inside, or just past it.
        assert axis.places == axis.size - (0 if anywhere else axis.block - 1)
        assert axis.places <= axis.rows
    volumes = shape[0] * shape[1]
    launch = blocks.mask(volumes, spatial, processors)
    assert launch.words == ceil_div(shape[-1], 64)
    assert is_power_of_two(launch.word_bytes)
    assert launch.word_bytes == 8 or launch.word_bytes >= ceil_div(shape[-1], 8)
    programs = launch.programs // launch.words
    assert programs * launch.words == launch.programs
    if launch.on_chip:
        assert launch.depth >= spatial[0].rows
        assert launch.height >= spatial[1].rows
        assert (programs - 1) * launch.volumes < volumes <= programs * launch.volumes
        rows = launch.volumes * launch.depth * launch.height
        assert is_power_of_two(rows)
        assert rows <= 4 * 32 * launch.warps
        assert rows <= blocks.MOST_ROWS
    else:
        assert spatial[0].rows * spatial[1].rows > blocks.MOST_ROWS // 4
        lines = volumes * spatial[0].places * spatial[1].places
        assert (programs - 1) * blocks.SPREAD_LINES < lines <= programs * blocks.SPREAD_LINES


@given(sample=COUNT, width=LENGTH, itemsize=ITEMSIZE)
@settings(max_examples=100, deadline=None)
def test_a_run_of_planes_ends_in_the_next_row_at_the_latest(sample: int, width: int, itemsize: int) -> None:
    launch = blocks.planes(sample * width, width, itemsize)
    assert is_power_of_two(launch.run)
    assert launch.run * itemsize <= 16
    elements = launch.run * launch.runs
    assert (launch.blocks - 1) * elements < sample * width <= launch.blocks * elements
    assert launch.runs == 32 * launch.warps * launch.parts
    for column in range(min(width, 64)):
        assert column + launch.run <= 2 * width
        aligned = column % launch.run == 0
        assert not launch.single or not aligned or column // 8 == (column + launch.run - 1) // 8


@given(lines=COUNT, width=LENGTH, channels=LENGTH)
@settings(max_examples=100, deadline=None)
def test_pixels_are_covered_once(lines: int, width: int, channels: int) -> None:
    launch = blocks.pixels(lines, width, channels)
    assert (launch.line_blocks - 1) * launch.lines < lines <= launch.line_blocks * launch.lines
    pixels = 8 * launch.octets
    assert (launch.octet_blocks - 1) * pixels < width <= launch.octet_blocks * pixels
    assert (launch.strips - 1) * launch.block < channels <= launch.strips * launch.block
    assert is_power_of_two(launch.lines * pixels * launch.block)
    assert launch.lines * pixels * launch.block <= 16 * 32 * launch.warps
