"""Launch configurations of the DropBlock kernels: pure functions of sizes, testable without Triton or a GPU.

A row of a map is cut into words of 64 positions, and a thread has one word of a row. Where the rows of a map, a
*volume*, fit one program, it grows its blocks on chip and leaves nothing but the mask; else the words of all rows are
left in memory and spread along one dimension after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastreg.backends.triton._launch import LANES, VECTOR_BYTES, ceil_div, next_power_of_two

WORD = 64

# Rows of a volume in one program, of which each thread has up to four words.
MOST_ROWS = 2048
_MOST_WARPS = 16
_ROWS = 128


@dataclass(frozen=True)
class Axis:
    """A dimension of the map.

    Attributes:
        size: positions.
        places: where a seed may be.
        block: positions of a block.
        before: how many of them lie before their seed.
    """

    size: int
    places: int
    block: int
    before: int

    @property
    def rows(self) -> int:
        """How many starts of blocks matter, counted from the first that lies before the map."""
        return self.size + self.before


def axes(shape: Sequence[int], block_size: Sequence[int], anywhere: bool) -> list[Axis]:
    """The spatial dimensions of a mask of ``shape``, three: a depth of 1 comes first where there are two."""
    found = [
        Axis(size, size, block, block // 2) if anywhere else Axis(size, size - block + 1, block, 0)
        for size, block in zip(shape[2:], block_size, strict=True)
    ]
    return [Axis(1, 1, 1, 0)] * (3 - len(found)) + found


@dataclass(frozen=True)
class Mask:
    """How to draw a mask.

    Attributes:
        volumes, depth, height: of a tile of rows, powers of two.
        words: of a row.
        word_bytes: that a word may have; fewer than 8 where no row is longer.
        on_chip: the tile has all rows of its volumes.
        programs: of the launch; of each word of a row the programs are next to each other.
        warps: of a program.
    """

    volumes: int
    depth: int
    height: int
    words: int
    word_bytes: int
    on_chip: bool
    programs: int
    warps: int


def mask(volumes: int, spatial: Sequence[Axis], multiprocessors: int) -> Mask:
    """How to draw the mask of so many volumes; their rows are shared out among programs of a few where they are few."""
    depth, height = (next_power_of_two(axis.rows) for axis in spatial[:2])
    words = ceil_div(spatial[2].size, WORD)
    word_bytes = min(WORD // 8, next_power_of_two(ceil_div(spatial[2].size, 8)))
    if depth * height > MOST_ROWS:
        rows = spatial[0].places * spatial[1].places
        programs = ceil_div(volumes * rows, _ROWS) * words
        return Mask(1, 1, _ROWS, words, word_bytes, False, programs, _ROWS // LANES)
    beside = max(1, _ROWS // (depth * height))
    while (
        beside > 1 and beside * depth * height > LANES and ceil_div(volumes, beside) * words < multiprocessors
    ):
        beside //= 2
    warps = min(_MOST_WARPS, max(1, beside * depth * height // LANES))
    programs = ceil_div(volumes, beside) * words
    return Mask(beside, depth, height, words, word_bytes, True, programs, warps)


def spread_programs(lines: int, words: int) -> int:
    """Programs that spread the words of so many lines along a dimension."""
    return ceil_div(lines, _ROWS) * words


SPREAD_LINES, SPREAD_WARPS = _ROWS, _ROWS // LANES


@dataclass(frozen=True)
class Planes:
    """How to apply a mask where rows of a map are adjacent in memory: stretches of one sample a program.

    Attributes:
        run: adjacent elements of a thread.
        runs: of a program.
        parts: that the last program of a sample takes its runs in.
        single: a run has all of its bits in one byte.
        blocks: programs of a sample.
        warps: of a program.
    """

    run: int
    runs: int
    parts: int
    single: bool
    blocks: int
    warps: int


_WARPS = 4
_ELEMENTS = 16


def planes(sample: int, width: int, itemsize: int) -> Planes:
    """How to apply a mask to samples of ``sample`` elements in rows of ``width``.

    A run may end in the row after the one that it begins in, but no later.
    """
    run = VECTOR_BYTES // itemsize
    while run > width + 1:
        run //= 2
    warps = min(_WARPS, next_power_of_two(ceil_div(sample, LANES * _ELEMENTS)))
    elements = LANES * warps * _ELEMENTS
    return Planes(run, elements // run, _ELEMENTS // run, width % run == 0, ceil_div(sample, elements), warps)


@dataclass(frozen=True)
class Pixels:
    """How to apply a mask where the channels of a pixel are adjacent.

    Attributes:
        lines: rows of pixels of a tile.
        octets: groups of eight pixels of each, which share a byte of a channel.
        block: channels.
        line_blocks, octet_blocks, strips: programs along each.
        warps: of a program.
    """

    lines: int
    octets: int
    block: int
    line_blocks: int
    octet_blocks: int
    strips: int
    warps: int = _WARPS

    @property
    def programs(self) -> int:
        return self.line_blocks * self.octet_blocks * self.strips


_STRIP = 256


def pixels(lines: int, width: int, channels: int) -> Pixels:
    """How to apply a mask to so many rows of ``width`` pixels."""
    tile = LANES * _WARPS * _ELEMENTS
    block = max(8, min(_STRIP, next_power_of_two(channels)))
    octets = min(tile // (8 * block), next_power_of_two(ceil_div(width, 8)))
    beside = min(tile // (8 * octets * block), next_power_of_two(lines))
    return Pixels(
        *(beside, octets, block),
        *(ceil_div(lines, beside), ceil_div(width, 8 * octets), ceil_div(channels, block)),
    )
