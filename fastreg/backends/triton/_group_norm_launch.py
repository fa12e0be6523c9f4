"""Launch configurations of the group norm kernels: pure functions of sizes, testable without Triton or a GPU.

Where some groups, a *slab*, fit the registers of one program, and there are programs enough to fill the machine, they
are read once. Else the statistics are those of parts of a group, as many as it takes to fill the machine however few
the groups are, and so are the sums of the gradients; both are cut as batch norm's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastreg._channels import ChannelView
from fastreg.backends.triton import _batch_norm_launch as _channels
from fastreg.backends.triton._batch_norm_launch import (
    CHAIN,
    NARROW_BYTES,
    NARROWEST_PLANE,
    RESIDENT,
    SECTOR_BYTES,
    SMALL,
    SMALLEST_BLOCK,
    STRIP,
    WARPS,
    Elementwise,
    Limit,
    Merge,
    Reduction,
    block_of,
)
from fastreg.backends.triton._launch import LANES, VECTOR_BYTES, ceil_div, next_power_of_two


@dataclass(frozen=True)
class Slab:
    """Groups in the registers of one program, ``chunks`` tiles of ``samples`` x ``lines`` x ``block``.

    Attributes:
        samples, lines: samples of a program, and lines of each in a tile: channels of planes, pixels of rows.
        block: adjacent elements of a tile.
        width: channels of a group in a strip of rows, padded to a power of two; of planes the block.
        chunks: tiles one after the other; one if there are several samples.
        even: the strips cover the elements of a line exactly.
        packed: 16-bit elements stay packed in registers between their uses.
        strips, sample_blocks: programs of the same samples, and groups of samples.
        warps: of a program.
    """

    samples: int
    lines: int
    block: int
    width: int
    chunks: int
    even: bool
    packed: bool
    strips: int
    sample_blocks: int
    warps: int

    @property
    def programs(self) -> int:
        return self.strips * self.sample_blocks


@dataclass(frozen=True)
class Moments:
    """Partial statistics, and how the kernel that leaves them is to see each sample.

    Attributes:
        view: a sample, of which every channel is a group, or, if it is of rows, a channel.
        launch: of all samples of planes, of one of rows.
        programs: of the launch.
    """

    view: ChannelView
    launch: Reduction
    programs: int


# --- groups on chip --------------------------------------------------------------------------------------------------

# By the size of an element, in the order in which they are taken.
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
# A slab leaves two fp32 sums of each of its channels, 16 bytes with their second reading: samples join it until that is
# a 24th of what it moves.
_SUMS_BYTES = 16
_SUMS_SHARE = 24


def _strips(view: ChannelView, groups: int, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """The blocks that a slab can have, the best first, the width of a group in each, and how many strips there are."""
    if not view.rows:
        block = max(SMALLEST_BLOCK, next_power_of_two(view.spatial))
        yield block, block, groups
        return
    width = view.channels // groups
    padded = next_power_of_two(width)
    fewest = next_power_of_two(min(groups, ceil_div(SECTOR_BYTES // itemsize, width)))
    fewest = max(fewest, ceil_div(SMALLEST_BLOCK, padded))
    beside = max(fewest, min(STRIP // padded, next_power_of_two(groups)))
    while beside >= fewest:
        yield beside * padded, padded, ceil_div(groups, beside)
        beside //= 2


def _fitted(
    view: ChannelView, block: int, lines: int, itemsize: int, limit: Limit, joined: int
) -> tuple[int, int, int] | None:
    """Samples, lines and chunks of a slab of ``lines`` lines, and of ``joined`` samples or more, within a limit."""
    tile = LANES * limit.warps * (VECTOR_BYTES // itemsize)
    capacity = LANES * limit.warps * limit.elements
    whole = next_power_of_two(lines) * block
    samples = min(max(tile // whole, joined), next_power_of_two(view.samples))
    if samples * whole <= (tile if samples == 1 else capacity):
        return samples, next_power_of_two(lines), 1
    if joined > 1:
        return None
    rows = min(max(1, tile // block), next_power_of_two(lines))
    chunks = ceil_div(lines, rows)
    return (1, rows, chunks) if chunks * rows * block <= capacity else None


def _slab(
    view: ChannelView, groups: int, itemsize: int, limits: Sequence[Limit], joined: int
) -> Iterator[Slab]:
    """Of every width of a strip the slab within the first limit that allows one."""
    lines = view.spatial if view.rows else view.channels // groups
    for block, width, strips in _strips(view, groups, itemsize):
        even = view.spatial == block
        if view.rows:
            even = width * groups == strips * block == view.channels
        for limit in limits:
            fitted = _fitted(view, block, lines, itemsize, limit, joined)
            if fitted is None:
                continue
            samples, rows, chunks = fitted
            warps = min(limit.warps, max(1, samples * rows * block * itemsize // (LANES * VECTOR_BYTES)))
            blocks = ceil_div(view.samples, samples)
            yield Slab(samples, rows, block, width, chunks, even, limit.packed, strips, blocks, warps)
            break


def slab(
    view: ChannelView,
    groups: int,
    itemsize: int,
    limits: Sequence[Limit],
    multiprocessors: int,
    joined: Sequence[int] = (1,),
) -> Slab | None:
    """The first slab of enough programs; None where nothing fits or too few run at once.

    ``joined``: how many samples it is to have at least, the best first.
    """
    found = None
    for least in joined:
        for found in _slab(view, groups, itemsize, limits, least):
            if 2 * found.programs >= multiprocessors:
                return found
    return found if view.lines * view.line_elements <= SMALL else None


def _narrow(itemsize: int, vector: int) -> bool:
    """Whether loads are so narrow that their addresses take many registers."""
    return vector * itemsize < NARROW_BYTES


def run_of(view: ChannelView, groups: int) -> int:
    """How many adjacent elements a slab takes as a line: of padded groups of rows each is one."""
    width = view.channels // groups
    return width if view.rows and width != next_power_of_two(width) else view.line_elements


def forward_slab(
    view: ChannelView, groups: int, itemsize: int, vector: int, multiprocessors: int
) -> Slab | None:
    """How to normalise with one read of the input, where that is possible; loads are of ``vector`` elements."""
    limits = (_FORWARD_STRIPS if view.rows else _FORWARD_PLANES)[itemsize]
    if _narrow(itemsize, vector):
        limits = limits[:2]
    return slab(view, groups, itemsize, limits, multiprocessors)


def backward_slab(
    view: ChannelView, groups: int, itemsize: int, vector: int, multiprocessors: int
) -> Slab | None:
    """How to differentiate with one read of the input and of the gradient, where that is possible."""
    limits = _BACKWARD[itemsize]
    if _narrow(itemsize, vector):
        limits = limits[:2]
    joined = next_power_of_two(ceil_div(_SUMS_BYTES * _SUMS_SHARE, 3 * view.spatial * itemsize))
    joined = min(joined, next_power_of_two(view.samples))
    return slab(view, groups, itemsize, limits, multiprocessors, sorted({joined, 1}, reverse=True))


# --- element by element ----------------------------------------------------------------------------------------------

# A strip of few pixels is this many elements.
_STRIP_ELEMENTS = 1024


def _strip(view: ChannelView) -> int:
    return max(STRIP, _STRIP_ELEMENTS // next_power_of_two(view.spatial))


def _sample(view: ChannelView) -> ChannelView:
    return replace(view, samples=1)


def elementwise(view: ChannelView, itemsize: int, vector: int, tensors: int) -> Elementwise:
    """How to compute an output, element by element; of rows the programs are those of one sample."""
    if _narrow(itemsize, vector):
        tensors *= 2
    if view.rows:
        return _channels.elementwise(_sample(view), itemsize, tensors, _strip(view))
    return _channels.elementwise(view, itemsize, tensors)


# --- sums ------------------------------------------------------------------------------------------------------------

# Of a group beside another that shares its first and last sector.
_MANY_SECTORS = 8


def moments(view: ChannelView, groups: int, itemsize: int, multiprocessors: int) -> Moments:
    """How to find the statistics of parts of a group.

    A group of planes is taken for one plane, and so is that of each pixel of rows, if it is of whole sectors, or makes
    many. Else every channel has statistics of its own.
    """
    width = view.channels // groups
    sectors, rest = divmod(width * itemsize, SECTOR_BYTES)
    if not view.rows or view.spatial == 1:
        seen = ChannelView(False, 1, groups, width * view.spatial, view.outer_stride)
    elif sectors >= (_MANY_SECTORS if rest else 1):
        seen = ChannelView(False, view.spatial, groups, width, view.outer_stride)
    else:
        seen = _sample(view)
        launch = _channels.reduction(seen, itemsize, 1, ceil_div(multiprocessors, view.samples), _strip(view))
        return Moments(seen, launch, launch.programs * view.samples)
    of_all = replace(seen, channels=view.samples * groups)
    launch = _channels.reduction(of_all, itemsize, 1, multiprocessors)
    return Moments(seen, launch, launch.programs)


def sums(view: ChannelView, itemsize: int, multiprocessors: int) -> Reduction:
    """How to add up over the channels of every sample.

    A program has some planes and walks over blocks of them, or has a strip of channels and walks over pixels; of rows
    the programs are those of one sample.
    """
    if view.rows:
        processors = ceil_div(multiprocessors, view.samples)
        return _channels.reduction(_sample(view), itemsize, 2, processors, _strip(view))
    tile = LANES * WARPS * (VECTOR_BYTES // itemsize) * 2
    block = block_of(view.spatial, tile, NARROWEST_PLANE)
    rows = min(tile // block, next_power_of_two(view.lines))
    blocks = ceil_div(view.spatial, block)
    even = blocks * block == view.spatial
    strips = ceil_div(view.lines, rows)
    part = min(CHAIN, ceil_div(blocks, ceil_div(RESIDENT * multiprocessors, strips)))
    return Reduction(rows, block, blocks, even, strips, part, ceil_div(blocks, part), WARPS)


_MERGE_ELEMENTS = 1024
_MERGE_GROUPS = 8


def merge(groups: int, partials: int) -> Merge:
    """How to merge ``partials`` partial results, of channels and their parts, of each of ``groups`` groups."""
    block = min(_MERGE_GROUPS, next_power_of_two(groups))
    parts = min(_MERGE_ELEMENTS // block, next_power_of_two(partials))
    return Merge(parts, block, ceil_div(groups, block))
