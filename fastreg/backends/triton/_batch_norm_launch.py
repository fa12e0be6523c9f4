"""Launch configurations of the batch norm kernels: pure functions of sizes, testable without Triton or a GPU.

A tile is ``rows`` lines times ``block`` adjacent elements: of planes the lines of one channel's program are its planes
in successive samples, of rows a program has a *strip* of adjacent channels. Sums over a channel are cut into *units*, a
tile each, and a *part* of the units is one program's. There are as many parts as it takes to fill the machine, however
few the channels are; a part has at most ``CHAIN`` units, so that no lane adds up more numbers than that one after the
other, and at least so many that its partial sums are small beside what it read.

Where what belongs to a channel, a *slab*, fits the registers of one program, it is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastreg._channels import ChannelView
from fastreg.backends.triton._launch import LANES, VECTOR_BYTES, ceil_div, next_power_of_two


@dataclass(frozen=True)
class Elementwise:
    """One program a tile of ``rows`` planes, or of ``rows`` rows and ``block`` channels.

    Attributes:
        rows, block: of the tile, powers of two.
        blocks: tiles beside each other.
        even: these cover the elements of a line exactly.
        programs, warps: of the launch, and of a program.
    """

    rows: int
    block: int
    blocks: int
    even: bool
    programs: int
    warps: int


@dataclass(frozen=True)
class Reduction:
    """Partial sums over the channels.

    Attributes:
        rows, block: of the tile, powers of two.
        blocks: tiles beside each other that a program visits: of a plane all, of a strip of channels its own.
        even: they cover the elements of a line exactly.
        strips: channels, or strips of them.
        part: units of a part; the last may have fewer.
        parts: of a channel.
        warps: of a program.
    """

    rows: int
    block: int
    blocks: int
    even: bool
    strips: int
    part: int
    parts: int
    warps: int

    @property
    def programs(self) -> int:
        return self.strips * self.parts


@dataclass(frozen=True)
class Merge:
    """Partial sums of all parts: ``parts`` x ``channels`` at a time, one program for as many channels."""

    parts: int
    channels: int
    programs: int
    warps: int = 4


@dataclass(frozen=True)
class Slab:
    """A channel, or a strip of channels, in the registers of one program, ``chunks`` tiles of ``rows`` x ``block``.

    ``packed``: 16-bit elements stay packed in registers between their uses.
    """

    rows: int
    block: int
    chunks: int
    even: bool
    packed: bool
    programs: int
    warps: int


# Eight signs are one byte, which lies in one tile.
SMALLEST_BLOCK = 8
WARPS = 4
SECTOR_BYTES = 32


def block_of(elements: int, widest: int, narrowest: int) -> int:
    """The largest power of two of which at most an eighth is idle; else the one that is idle least."""
    widest = max(SMALLEST_BLOCK, min(widest, next_power_of_two(elements)))
    blocks = [widest]
    while blocks[-1] // 2 >= max(narrowest, SMALLEST_BLOCK):
        blocks.append(blocks[-1] // 2)
    covered = [ceil_div(elements, block) * block for block in blocks]
    for block, lanes in zip(blocks, covered, strict=True):
        if 8 * elements >= 7 * lanes:
            return block
    return blocks[covered.index(min(covered))]


# --- element by element ----------------------------------------------------------------------------------------------

# Loads of 16 bytes that a thread makes of all tensors together, and the channels of a strip: the more rows a tile has,
# the fewer programs load the parameters of a channel.
_VECTORS = 8
STRIP = 64
NARROWEST_PLANE = 256


def elementwise(view: ChannelView, itemsize: int, tensors: int, strip: int = STRIP) -> Elementwise:
    """How to compute an output, element by element, from ``tensors`` tensors of ``itemsize`` bytes an element.

    ``strip``: the most channels of a strip.
    """
    vectors = max(1, _VECTORS // next_power_of_two(tensors))
    tile = LANES * WARPS * (VECTOR_BYTES // itemsize) * vectors
    if view.rows:
        block = block_of(view.line_elements, min(strip, tile), SECTOR_BYTES // itemsize)
    else:
        block = block_of(view.line_elements, tile, NARROWEST_PLANE)
    rows = min(tile // block, next_power_of_two(view.lines))
    blocks = ceil_div(view.line_elements, block)
    even = blocks * block == view.line_elements
    return Elementwise(rows, block, blocks, even, ceil_div(view.lines, rows) * blocks, WARPS)


# --- sums over channels ----------------------------------------------------------------------------------------------

# 16-byte loads that a thread makes of all tensors together, at least one of each.
TILE_VECTORS = 4
CHAIN = 32
# Programs that run on a multiprocessor at a time.
RESIDENT = 8
# Rows of a part: its partial sums, 8 bytes a channel, are written and read once more.
_PART_BYTES = 256


def reduction(
    view: ChannelView, itemsize: int, tensors: int, multiprocessors: int, strip: int = STRIP
) -> Reduction:
    """How to add up over every channel of ``tensors`` tensors of ``itemsize`` bytes an element.

    ``strip``: the most channels of a strip.
    """
    vectors = min(2, TILE_VECTORS // next_power_of_two(tensors))
    tile = LANES * WARPS * (VECTOR_BYTES // itemsize) * vectors
    if not view.rows:
        return _reduction(view, tile, block_of(view.spatial, tile, NARROWEST_PLANE), 1, multiprocessors)
    narrowest = SECTOR_BYTES // itemsize
    block = block_of(view.channels, min(strip, tile), narrowest)
    while True:
        found = _reduction(view, tile, block, _PART_BYTES // itemsize, multiprocessors)
        if block <= narrowest or found.programs >= multiprocessors:
            return found
        block //= 2


def _reduction(
    view: ChannelView, tile: int, block: int, fewest_lines: int, multiprocessors: int
) -> Reduction:
    lines = view.per_channel if view.rows else view.samples
    rows = min(tile // block, next_power_of_two(lines))
    blocks = ceil_div(view.line_elements, block)
    even = blocks * block == view.line_elements
    strips = blocks if view.rows else view.channels
    if view.rows:
        blocks = 1
    units = ceil_div(lines, rows) * blocks
    wanted = ceil_div(RESIDENT * multiprocessors, strips)
    part = min(CHAIN, max(ceil_div(units, wanted), ceil_div(fewest_lines, rows)))
    return Reduction(rows, block, blocks, even, strips, part, ceil_div(units, part), WARPS)


MERGE_ELEMENTS = 2048
_MERGE_CHANNELS = (32, 8)


def merge(channels: int, parts: int) -> Merge:
    """How to merge the partial sums of ``parts`` parts; 32 fp32 channels are the 128 bytes of a transaction."""
    widest, narrowest = _MERGE_CHANNELS
    block = widest if parts * widest <= MERGE_ELEMENTS else narrowest
    return Merge(min(MERGE_ELEMENTS // block, next_power_of_two(parts)), block, ceil_div(channels, block))


# --- a channel on chip -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """Programs of ``warps`` warps may hold ``elements`` of a tensor a thread."""

    warps: int
    elements: int
    packed: bool = False


# By the size of an element, in the order in which they are taken: few warps, so that several programs of a
# multiprocessor overlap the loads of one with the sums and stores of another. Each lane of a strip has parameters.
_FORWARD_PLANES = {
    2: (Limit(4, 32), Limit(8, 32), Limit(16, 32), Limit(16, 64, packed=True)),
    4: (Limit(4, 32), Limit(8, 32), Limit(16, 32), Limit(16, 48)),
}
_FORWARD_STRIPS = {
    2: (Limit(4, 32), Limit(8, 32), Limit(16, 32)),
    4: (Limit(4, 32), Limit(8, 32), Limit(16, 24)),
}
# Input and gradient are held together.
_BACKWARD = {
    2: (Limit(4, 16), Limit(8, 16), Limit(16, 16)),
    4: (Limit(4, 16), Limit(8, 24), Limit(8, 32)),
}
# Where loads are narrower than this, addresses take the registers of the last limit.
NARROW_BYTES = 8

# Two passes by half the machine are as fast as three by all of it. And a tensor this small costs less to read than
# the launches of further kernels.
SMALL = 2**18


def _strips(view: ChannelView, itemsize: int) -> Iterator[tuple[int, int]]:
    """The widths that a slab can have, the best first, and how many slabs there are."""
    if not view.rows:
        yield max(SMALLEST_BLOCK, next_power_of_two(view.spatial)), view.channels
        return
    narrowest = max(SMALLEST_BLOCK, SECTOR_BYTES // itemsize)
    block = min(STRIP, max(narrowest, next_power_of_two(view.channels)))
    while block >= narrowest:
        yield block, ceil_div(view.channels, block)
        block //= 2


def slab(view: ChannelView, itemsize: int, limits: Sequence[Limit], multiprocessors: int) -> Slab | None:
    """The slab of a channel within the first limit that allows one; None where nothing fits or too few run at once."""
    lines = view.per_channel if view.rows else view.samples
    found = None
    for block, programs in _strips(view, itemsize):
        for limit in limits:
            tile = max(block, LANES * limit.warps * (VECTOR_BYTES // itemsize))
            rows = min(tile // block, next_power_of_two(lines))
            chunks = ceil_div(lines, rows)
            if chunks * rows * block > LANES * limit.warps * limit.elements:
                continue
            even = view.line_elements % block == 0
            found = Slab(rows, block, chunks, even, limit.packed, programs, limit.warps)
            break
        if found is not None and 2 * found.programs >= multiprocessors:
            return found
    return found if view.lines * view.line_elements <= SMALL else None


def forward_slab(view: ChannelView, itemsize: int, multiprocessors: int) -> Slab | None:
    """How to normalise with one read of the input, where that is possible."""
    limits = _FORWARD_STRIPS if view.rows else _FORWARD_PLANES
    return slab(view, itemsize, limits[itemsize], multiprocessors)


def backward_slab(view: ChannelView, itemsize: int, multiprocessors: int) -> Slab | None:
    """How to differentiate with one read of the input and of the gradient, where that is possible."""
    limits = _BACKWARD[itemsize]
    if view.line_elements * itemsize % NARROW_BYTES:
        limits = limits[:-1]
    return slab(view, itemsize, limits, multiprocessors)
