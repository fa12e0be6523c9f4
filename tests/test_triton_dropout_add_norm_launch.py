"""The launch configurations of dropout + residual + norm's Triton kernels: neither Triton nor a GPU is needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreg.backends.triton import _launch
from test_triton_launch import H100, HIDDEN, ITEMSIZE, MULTIPROCESSORS, ROWS, check_covers, check_tile

pytestmark = pytest.mark.backend_independent


@given(rows=ROWS, hidden=HIDDEN, itemsize=ITEMSIZE, aligned=st.booleans())
@settings(max_examples=300, deadline=None)
def test_forward_covers_every_element_once(rows: int, hidden: int, itemsize: int, aligned: bool) -> None:
    launch = _launch.forward(rows, hidden, itemsize, _launch.vector(hidden, aligned=aligned), added=True)
    tile = launch.tile
    check_tile(tile, itemsize)
    assert (launch.programs - 1) * tile.rows < rows <= launch.programs * tile.rows
    if launch.looped:
        assert tile.rows == tile.chunks == 1
        assert tile.even == (hidden % tile.block == 0)
    else:
        check_covers(tile, hidden)


@given(
    rows=ROWS,
    hidden=HIDDEN,
    itemsize=ITEMSIZE,
    aligned=st.booleans(),
    sums=st.integers(0, 3),
    processors=MULTIPROCESSORS,
)
@settings(max_examples=500, deadline=None)
def test_backward_covers_every_element_once(
    rows: int, hidden: int, itemsize: int, aligned: bool, sums: int, processors: int
) -> None:
    vector = _launch.vector(hidden, aligned=aligned)
    launch = _launch.backward(rows, hidden, itemsize, vector, sums, processors, added=True)
    tile = launch.tile
    check_tile(tile, itemsize)
    assert 1 <= launch.row_programs <= _launch.ceil_div(rows, tile.rows)
    if sums:
        assert launch.row_programs <= _launch.SPLIT_PROGRAMS * processors
    if launch.projection is None:
        assert launch.column_programs == 1
        check_covers(tile, hidden)
    else:
        assert tile.chunks == 1
        assert (launch.column_programs - 1) * tile.block < hidden <= launch.column_programs * tile.block
        assert launch.projection.block <= hidden


@given(hidden=HIDDEN, itemsize=ITEMSIZE)
def test_what_is_drawn_at_once_is_of_one_block_of_the_stream(hidden: int, itemsize: int) -> None:
    drawn = _launch.drawn_at_once(hidden, itemsize)
    assert 8 % drawn == 0
    assert hidden % drawn == 0
    assert drawn * itemsize <= _launch.VECTOR_BYTES
    # And a chunk is made of whole draws.
    for launch in (
        _launch.forward(64, hidden, itemsize, _launch.vector(hidden), added=True),
        _launch.backward(64, hidden, itemsize, _launch.vector(hidden), 3, H100, added=True),
    ):
        assert launch.tile.block % drawn == 0


@pytest.mark.parametrize(
    "hidden", [256, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_usual_hidden_sizes_are_not_masked(hidden: int, itemsize: int) -> None:
    assert _launch.forward(4096, hidden, itemsize, 8, added=True).tile.even


@pytest.mark.parametrize(
    ("itemsize", "sums", "longest"),
    [
        *((2, 0, 20480), (2, 1, 12288), (2, 2, 12288), (2, 3, 8192)),
        *((4, 0, 14336), (4, 1, 10240), (4, 2, 8192), (4, 3, 6144)),
    ],
)
def test_backward_reads_once_up_to(itemsize: int, sums: int, longest: int) -> None:
    assert _launch.backward(4096, longest, itemsize, 8, sums, H100, added=True).projection is None
    assert _launch.backward(4096, longest + 8, itemsize, 8, sums, H100, added=True).projection is not None


@pytest.mark.parametrize(
    ("itemsize", "vector", "longest"),
    [(2, 8, 32768), (4, 8, 20480), (2, 4, 8188), (2, 1, 8191), (4, 1, 8191)],
)
def test_forward_reads_once_up_to(itemsize: int, vector: int, longest: int) -> None:
    assert not _launch.forward(64, longest, itemsize, vector, added=True).looped
    assert _launch.forward(64, longest + 8, itemsize, vector, added=True).looped
