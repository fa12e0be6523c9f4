"""Launch configurations of the Triton kernels: pure functions of sizes, testable without Triton or a GPU.

A *tile* is what one program holds at a time: some rows, or a range of columns of one, each cut into ``chunks`` blocks
of ``block`` columns. A warp whose 32 lanes load 16 bytes each covers one block of the narrowest kind, 256 16-bit
elements. Cutting a row into equal chunks does three things. Hidden sizes such as 768 or 5120 are covered exactly, so
that nothing is masked. Short rows lie on different warps of a program, and no reduction leaves a warp. And the stores
of one chunk keep the compiler from loading the weights of all chunks at once.

The limits are the largest tiles for which no compiler output for sm_80, 90, 100 and 120 spills a register, whatever the
dtypes (tests/test_triton_compile.py); the registers of a multiprocessor, 64K of 32 bits, are the same on all four. Only
the number of programs depends on the device, by its multiprocessors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

LANES = 32
VECTOR_BYTES = 16

# The interpreter runs one program after the other: a few are enough for every path, partial sums included.
INTERPRETER_MULTIPROCESSORS = 4


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time.

    Attributes:
        rows: rows of a tile.
        block: columns of a chunk, a power of two.
        chunks: chunks of a row; all but the last are full.
        warps: warps of a program.
        even: the chunks cover the columns exactly, and no column is masked.
        packed: 16-bit elements stay packed in registers between their uses.
        prefetch: the next tile is loaded before this one is computed.
    """

    rows: int
    block: int
    chunks: int
    warps: int
    even: bool
    packed: bool = False
    prefetch: bool = False


@dataclass(frozen=True)
class Forward:
    """The forward of a row-wise norm: one program a tile.

    ``looped``: the row does not fit on chip; its program reads it twice, ``tile.block`` columns at a time.
    """

    tile: Tile
    programs: int
    looped: bool


@dataclass(frozen=True)
class Backward:
    """The backward of a row-wise norm.

    Attributes:
        tile: what a program holds of the input and of the output's gradient.
        row_programs: programs that share the rows; each leaves one row of partial weight gradients.
        column_programs: programs that share the columns of a row.
        projection: the tile of the kernel that finds the projections of every row beforehand, since no program sees a
            whole row at once; then input and gradient are read twice. None where whole rows fit.
    """

    tile: Tile
    row_programs: int
    column_programs: int
    projection: Tile | None

    @property
    def programs(self) -> int:
        return self.row_programs * self.column_programs


@dataclass(frozen=True)
class Reduce:
    """The ordered sum of partial weight gradients: ``rows`` x ``block`` at a time, one program a block of columns."""

    rows: int
    block: int
    programs: int
    warps: int = 4


@dataclass(frozen=True)
class _Limit:
    """Programs of ``warps`` warps may hold ``elements`` of a tensor a thread."""

    warps: int
    elements: int
    even: bool = False
    packed: bool = False
    prefetch: bool = False


def ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def vector(hidden: int, *row_strides: int, aligned: bool = True) -> int:
    """The largest power of two, up to 8, that divides the row length and every distance between rows.

    Kernels get these sizes in units of it, which is how the compiler learns that vector loads stay aligned from row to
    row. 8 elements of 16 bits are 16 bytes, the widest load. A row stride of 0 (an expanded tensor) divides by all.
    """
    return math.gcd(8, hidden, *row_strides) if aligned else 1


def drawn_at_once(hidden: int, itemsize: int) -> int:
    """How many elements of a row, next to each other, draw from the random stream at once: those of a load, or fewer.

    Never more than divide the hidden size, so that in no row these are from one block of the stream and the next.
    """
    return math.gcd(VECTOR_BYTES // itemsize, hidden)


def _narrow(itemsize: int, vector: int) -> bool:
    """Whether loads are narrower than 16 bytes: then 16-bit elements lie in a register each, with more addresses."""
    return vector * itemsize < VECTOR_BYTES


# Each row of a tile of short rows costs registers for its addresses, too. All three are powers of two, as a tile's rows
# have to be.
_SHORT_ROWS = 512
_SHORT_ROW_WARPS = 8
_SHORT_ROW_ELEMENTS = 16


def _tile(hidden: int, itemsize: int, limits: Sequence[_Limit]) -> Tile | None:
    """The tile of whole rows within the first limit that allows one, with as few warps a row as it allows."""
    lane = VECTOR_BYTES // itemsize
    if hidden <= LANES * lane:
        return _short_row_tile(hidden, itemsize, limits[0])
    for limit in limits:
        for row_warps in (1, 2, 4, 8, 16, 32):
            block = LANES * lane * row_warps
            chunks = ceil_div(hidden, block)
            even = chunks * block == hidden
            if row_warps > limit.warps or chunks * lane > limit.elements or (limit.even and not even):
                continue
            packed = limit.packed and itemsize == 2
            return Tile(limit.warps // row_warps, block, chunks, limit.warps, even, packed, limit.prefetch)
    return None


def _short_row_tile(hidden: int, itemsize: int, limit: _Limit) -> Tile:
    """A tile of rows that a warp can load at once, or several of them."""
    block = next_power_of_two(hidden)
    elements = min(_SHORT_ROW_ELEMENTS, limit.elements)
    rows = min(_SHORT_ROWS, LANES * _SHORT_ROW_WARPS * elements // block)
    return Tile(rows, block, 1, _SHORT_ROW_WARPS, block == hidden, prefetch=limit.prefetch)


# Few warps a program, so that several programs on a multiprocessor overlap the loads of one with the reduction and the
# stores of another. 32 elements a thread in about 64 registers let 4 programs of 8 warps run at a time; more elements
# are taken if they cover the row exactly, before more warps than the row needs.
_FORWARD = (
    _Limit(8, 32, even=True),
    _Limit(16, 32, even=True),
    _Limit(8, 56, even=True),
    _Limit(16, 56, even=True),
    _Limit(8, 56),
    _Limit(16, 56),
)
# A thread of 32 warps has 64 registers: 32 fp32 values beside weight and bias, or 64 packed 16-bit ones.
_FORWARD_LONG = (*_FORWARD, _Limit(32, 32))
_FORWARD_PACKED = (*_FORWARD_LONG, _Limit(32, 64, packed=True))

# Two rows to add are loaded before the first of their sums is made, and the random stream takes registers, too.
_ADDED = {
    2: (*_FORWARD, _Limit(32, 32)),
    4: (
        _Limit(8, 32, even=True),
        _Limit(16, 32, even=True),
        _Limit(8, 56, even=True),
        _Limit(8, 56),
        _Limit(16, 40),
    ),
}
_ADDED_NARROW = (_Limit(8, 32, even=True), _Limit(8, 32))

_LOOP_WARPS = 8
_LOOP_VECTORS = 2


def _loop_tile(hidden: int, itemsize: int) -> Tile:
    block = LANES * _LOOP_WARPS * (VECTOR_BYTES // itemsize) * _LOOP_VECTORS
    return Tile(1, block, 1, _LOOP_WARPS, even=hidden % block == 0)


@cache
def _forward_tile(hidden: int, itemsize: int, vector: int, added: bool) -> Tile | None:
    if added:
        return _tile(hidden, itemsize, _ADDED_NARROW if _narrow(itemsize, vector) else _ADDED[itemsize])
    if _narrow(itemsize, vector):
        return _tile(hidden, itemsize, _FORWARD)
    return _tile(hidden, itemsize, _FORWARD_PACKED if itemsize == 2 else _FORWARD_LONG)


def forward(rows: int, hidden: int, itemsize: int, vector: int, added: bool = False) -> Forward:
    """How to normalise ``rows`` rows of ``hidden`` elements of ``itemsize`` bytes, known to align to ``vector``.

    ``added``: they are sums of two rows, and ``itemsize`` is the larger of these and the sum.
    """
    tile = _forward_tile(hidden, itemsize, vector, added)
    if tile is None:
        return Forward(_loop_tile(hidden, itemsize), rows, looped=True)
    return Forward(tile, ceil_div(rows, tile.rows), looped=False)


# The input's gradient alone: nothing is carried from row to row, so programs are small and as many as there are tiles.
_GRAD_INPUT = (
    _Limit(4, 32, even=True, packed=True),
    _Limit(8, 32, even=True, packed=True),
    _Limit(4, 56, even=True, packed=True),
    _Limit(8, 56, even=True, packed=True),
    _Limit(4, 56, packed=True),
    _Limit(8, 56, packed=True),
)
_GRAD_INPUT_LONG = {2: (*_GRAD_INPUT, _Limit(16, 40, packed=True)), 4: (*_GRAD_INPUT, _Limit(16, 28))}

# With weight gradients a program keeps one or two fp32 sums a column beside both tensors, and fills a multiprocessor by
# itself. Nothing else runs there while it waits, so it loads the next tile ahead where the registers allow.
_SUMS_16_BIT = (
    _Limit(16, 16, even=True, packed=True, prefetch=True),
    _Limit(8, 24, even=True, packed=True, prefetch=True),
    _Limit(16, 16, packed=True, prefetch=True),
)
_SUMS_32_BIT = (
    _Limit(8, 24, even=True, prefetch=True),
    _Limit(8, 32, prefetch=True),
)
# By the number of sums and the size of an element.
_SUMS = {
    (1, 2): (*_SUMS_16_BIT, _Limit(16, 24, packed=True, prefetch=True), _Limit(16, 40, packed=True)),
    (1, 4): (*_SUMS_32_BIT, _Limit(16, 20, prefetch=True), _Limit(16, 24)),
    (2, 2): (*_SUMS_16_BIT, _Limit(16, 24, packed=True)),
    (2, 4): (*_SUMS_32_BIT, _Limit(16, 20)),
}
_SUMS_NARROW = (_Limit(8, 24, even=True, packed=True), _Limit(8, 32, packed=True))

# Where the rows were sums there is one tensor more to hold, or two for a third sum, and the keys of the random stream:
# fewer warps with more elements each need less for what every thread has.
_ADDED_SUMS_16_BIT = (
    _Limit(8, 24, even=True, packed=True, prefetch=True),
    _Limit(8, 32, even=True, packed=True, prefetch=True),
    _Limit(8, 32, packed=True, prefetch=True),
)
_ADDED_SUMS = {
    (1, 2): (*_ADDED_SUMS_16_BIT, _Limit(8, 48, packed=True)),
    (1, 4): (*_SUMS_32_BIT, _Limit(8, 40)),
    (2, 2): (*_ADDED_SUMS_16_BIT, _Limit(8, 48, packed=True)),
    (2, 4): (_Limit(8, 24, even=True, prefetch=True), _Limit(8, 32)),
    (3, 2): (
        _Limit(8, 24, even=True, packed=True, prefetch=True),
        _Limit(8, 32, even=True, packed=True),
        _Limit(8, 24, packed=True),
    ),
    (3, 4): (_Limit(8, 16, even=True, prefetch=True), _Limit(8, 24)),
}
# Narrow 16-bit elements lie in a register each, packed or not; to convert them again takes registers for nothing.
_ADDED_GRAD_INPUT_NARROW = (_Limit(8, 32, even=True), _Limit(8, 32))
_ADDED_SUMS_NARROW = (_Limit(8, 8, even=True, packed=True), _Limit(8, 16, packed=True))

_SPLIT_WARPS = 8
_SPLIT_VECTORS = 1
# Programs of a split row carry less, and three of them fit on a multiprocessor.
SPLIT_PROGRAMS = 3
# A program that walks over one tile only would leave as much in partial sums as it reads.
_TILES_A_PROGRAM = 2


@cache
def _backward_tile(hidden: int, itemsize: int, vector: int, sums: int, added: bool) -> Tile | None:
    narrow = _narrow(itemsize, vector)
    if sums == 0:
        limits = _GRAD_INPUT if narrow else _GRAD_INPUT_LONG[itemsize]
        return _tile(hidden, itemsize, _ADDED_GRAD_INPUT_NARROW if narrow and added else limits)
    if added:
        return _tile(hidden, itemsize, _ADDED_SUMS_NARROW if narrow else _ADDED_SUMS[sums, itemsize])
    return _tile(hidden, itemsize, _SUMS_NARROW if narrow else _SUMS[sums, itemsize])


def backward(
    rows: int,
    hidden: int,
    itemsize: int,
    vector: int,
    sums: int,
    multiprocessors: int,
    added: bool = False,
) -> Backward:
    """How to differentiate, with ``sums`` weight gradients (0 to 2) to add up over the rows.

    ``added``: the rows were sums, and so there may be twice as many gradients of rows, in and out. Then 3 stands for
    any number of sums with layer_scale's among them, for which the rows of the branch are held, too.
    """
    tile = _backward_tile(hidden, itemsize, vector, sums, added)
    if tile is not None:
        tiles = ceil_div(rows, tile.rows)
        programs = min(multiprocessors, ceil_div(tiles, _TILES_A_PROGRAM)) if sums else tiles
        return Backward(tile, programs, 1, projection=None)
    block = LANES * _SPLIT_WARPS * (VECTOR_BYTES // itemsize) * _SPLIT_VECTORS
    # Three such programs would not fit with the next tile of a sum's gradients loaded ahead.
    prefetch = vector >= 4 and not added
    tile = Tile(1, block, 1, _SPLIT_WARPS, even=hidden % block == 0, prefetch=prefetch)
    column_programs = ceil_div(hidden, block)
    row_programs = min(rows, ceil_div(SPLIT_PROGRAMS * multiprocessors, column_programs))
    return Backward(tile, row_programs, column_programs, projection=_loop_tile(hidden, itemsize))


_REDUCE_ELEMENTS = 4096
_REDUCE_BLOCKS = (32, 1024)


def reduce(hidden: int, multiprocessors: int) -> Reduce:
    """How to add up partial weight gradients of ``hidden`` columns.

    A program for each multiprocessor, if there is work; 32 fp32 columns are the 128 bytes of a memory transaction.
    """
    smallest, largest = _REDUCE_BLOCKS
    block = min(largest, max(smallest, next_power_of_two(ceil_div(hidden, multiprocessors))))
    return Reduce(_REDUCE_ELEMENTS // block, block, ceil_div(hidden, block))
