"""The launch configurations of the Triton kernels, as pure functions of sizes: neither Triton nor a GPU is needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreg.backends.triton import _launch

pytestmark = pytest.mark.backend_independent

H100 = 132
HIDDEN = st.one_of(st.integers(1, 1200), st.integers(1, 300_000), st.sampled_from([2**k for k in range(19)]))
ROWS = st.one_of(st.integers(1, 300), st.integers(1, 2**33))
ITEMSIZE = st.sampled_from([2, 4])
MULTIPROCESSORS = st.sampled_from([_launch.INTERPRETER_MULTIPROCESSORS, 108, H100, 148, 188])


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def check_tile(tile: _launch.Tile, itemsize: int) -> None:
    assert is_power_of_two(tile.rows)
    assert is_power_of_two(tile.block)
    assert is_power_of_two(tile.warps)
    assert tile.warps <= 32
    assert not tile.packed or itemsize == 2
    # The registers of a multiprocessor hold 64K values of 32 bits.
    assert tile.rows * tile.block * tile.chunks * (itemsize if tile.packed else 4) <= 4 * 64 * 1024


def check_covers(tile: _launch.Tile, hidden: int) -> None:
    """All chunks but the last are full, which is why only the last is masked."""
    assert tile.block * (tile.chunks - 1) < hidden <= tile.block * tile.chunks
    assert tile.even == (hidden == tile.block * tile.chunks)


@given(rows=ROWS, hidden=HIDDEN, itemsize=ITEMSIZE, aligned=st.booleans())
@settings(max_examples=300, deadline=None)
def test_forward_covers_every_element_once(rows: int, hidden: int, itemsize: int, aligned: bool) -> None:
    launch = _launch.forward(rows, hidden, itemsize, _launch.vector(hidden, aligned=aligned))
    tile = launch.tile
    check_tile(tile, itemsize)
    assert (launch.programs - 1) * tile.rows < rows <= launch.programs * tile.rows
    if launch.looped:
        assert tile.rows == tile.chunks == 1
        assert hidden > tile.block
        assert tile.even == (hidden % tile.block == 0)
    else:
        check_covers(tile, hidden)


@given(
    rows=ROWS,
    hidden=HIDDEN,
    itemsize=ITEMSIZE,
    aligned=st.booleans(),
    sums=st.integers(0, 2),
    processors=MULTIPROCESSORS,
)
@settings(max_examples=500, deadline=None)
def test_backward_covers_every_element_once(
    rows: int, hidden: int, itemsize: int, aligned: bool, sums: int, processors: int
) -> None:
    vector = _launch.vector(hidden, aligned=aligned)
    launch = _launch.backward(rows, hidden, itemsize, vector, sums, processors)
    tile = launch.tile
    check_tile(tile, itemsize)
    assert 1 <= launch.row_programs <= _launch.ceil_div(rows, tile.rows)
    if sums:
        assert launch.row_programs <= _launch.SPLIT_PROGRAMS * processors
    if launch.projection is None:
        assert launch.column_programs == 1
        check_covers(tile, hidden)
    else:
        # A chunk that may lie outside the row altogether has to be the only, masked one.
        assert tile.chunks == 1
        assert (launch.column_programs - 1) * tile.block < hidden <= launch.column_programs * tile.block
        assert tile.even == (hidden % tile.block == 0)
        assert launch.projection.even == (hidden % launch.projection.block == 0)
        assert launch.projection.block <= hidden


@given(hidden=HIDDEN, processors=MULTIPROCESSORS)
def test_reduce_covers_every_column_once(hidden: int, processors: int) -> None:
    launch = _launch.reduce(hidden, processors)
    assert is_power_of_two(launch.rows)
    assert is_power_of_two(launch.block)
    assert (launch.programs - 1) * launch.block < hidden <= launch.programs * launch.block


@given(hidden=HIDDEN, strides=st.lists(st.integers(0, 10**6), max_size=2))
def test_vector_divides_every_distance(hidden: int, strides: list[int]) -> None:
    vector = _launch.vector(hidden, *strides)
    assert vector in (1, 2, 4, 8)
    assert not any(size % vector for size in (hidden, *strides))
    assert _launch.vector(hidden, *strides, aligned=False) == 1


@pytest.mark.parametrize(
    "hidden", [256, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 12288]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_usual_hidden_sizes_are_not_masked_forward(hidden: int, itemsize: int) -> None:
    assert _launch.forward(4096, hidden, itemsize, 8).tile.even


@pytest.mark.parametrize(
    ("itemsize", "sums", "longest"),
    [(2, 0, 20480), (2, 1, 20480), (2, 2, 12288), (4, 0, 14336), (4, 1, 12288), (4, 2, 10240)],
)
def test_backward_reads_once_up_to(itemsize: int, sums: int, longest: int) -> None:
    assert _launch.backward(4096, longest, itemsize, 8, sums, H100).projection is None
    assert _launch.backward(4096, longest + 8, itemsize, 8, sums, H100).projection is not None


@pytest.mark.parametrize(
    ("itemsize", "vector", "longest"),
    [(2, 8, 65536), (4, 8, 32768), (4, 4, 32764), (2, 4, 28668), (2, 1, 28671)],
)
def test_forward_reads_once_up_to(itemsize: int, vector: int, longest: int) -> None:
    assert not _launch.forward(64, longest, itemsize, vector).looped
    assert _launch.forward(64, longest + 8, itemsize, vector).looped


def test_partial_sums_are_few_beside_4096_rows() -> None:
    for itemsize, hidden in (
        (2, 768),
        (2, 1024),
        (2, 4096),
        (2, 8192),
        (2, 12288),
        (2, 65536),
        (4, 4096),
        (4, 8192),
    ):
        launch = _launch.backward(4096, hidden, itemsize, 8, 2, H100)
        partial = launch.row_programs * hidden * 4 * 2 * 2
        assert partial <= 0.09 * 3 * 4096 * hidden * itemsize


def test_a_request_is_made_once() -> None:
    """The tile search runs once for a shape: it would cost more than the launch."""
    assert _launch.forward(7, 1000, 2, 8).tile is _launch.forward(9, 1000, 2, 8).tile
