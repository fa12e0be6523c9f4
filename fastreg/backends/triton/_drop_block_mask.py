"""The mask kernels of DropBlock: one bit a position, cleared where a block that grew from a seed covers it.

A thread has a word, 64 positions of a row. It draws the row's seeds a Philox block of four at a time, lets them grow
along the row by shifts, and the rows of a tile grow along the other dimensions by reading one another, in as many steps
as a block's size has binary digits. Words of a row that are not its first draw the seeds before them again, as far as a
block reaches. Written are the bytes of the mask and one count a volume; read is nothing. Volumes of too many rows for a
tile take a kernel for the rows and one for each other dimension, with their words in memory between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg._units import LANES
from fastreg.backends.triton import _drop_block_launch as _launches
from fastreg.backends.triton._dropout_tiles import load_limit, philox

_LANES = tl.constexpr(LANES)
WORD = tl.constexpr(_launches.WORD)
_ALL = tl.constexpr(2**_launches.WORD - 1)

SIZES = [
    *("volumes", "lines", "inner", "width", "row_bytes", "words", "threshold"),
    *(
        f"{axis}_{what}"
        for axis in ("depth", "height", "width")
        for what in ("size", "places", "block", "before")
    ),
    *("size", "places", "block", "before"),
]


@triton.jit
def _low_bits(count: tl.tensor) -> tl.tensor:
    """A word whose first ``count`` bits are set; none where that is negative, all from 64 on."""
    every = tl.full(count.shape, _ALL, tl.uint64)
    cleared = tl.minimum(tl.maximum(-(count - WORD), 0), WORD - 1).to(tl.uint64)
    return tl.where(count > 0, every >> cleared, tl.zeros_like(every))


@triton.jit
def _seeds(seed: tl.tensor, limit: tl.tensor, block: tl.tensor) -> tl.tensor:
    """Which of the four lanes of each block are seeds, as the bits of an integer."""
    w0, w1, w2, w3 = philox(seed, block)
    low = limit.to(tl.uint32)
    bits = (w0 < low).to(tl.int32) | ((w1 < low).to(tl.int32) << 1)
    bits |= ((w2 < low).to(tl.int32) << 2) | ((w3 < low).to(tl.int32) << 3)
    return tl.where(limit >= _LANES, 15, bits)


@triton.jit
def _seeds_of_word(
    seed: tl.tensor, limit: tl.tensor, row: tl.tensor, first: tl.tensor, last: tl.tensor
) -> tl.tensor:
    """The seeds at places ``first`` to ``last`` of rows that begin with unit ``row``; at most 64, maybe none."""
    start = row + first
    block = start >> 2
    skipped = (start & 3).to(tl.int32)
    words = tl.zeros(row.shape, tl.uint64)
    for number in range((last - first + 6) // 4):
        bits = _seeds(seed, limit, block + number)
        place = number * 4 - skipped
        shifted = (bits >> tl.maximum(-place, 0)).to(tl.uint64)
        shifted = shifted << tl.minimum(tl.maximum(place, 0), WORD - 1).to(tl.uint64)
        words |= tl.where(place < WORD, shifted, tl.zeros_like(shifted))
    return words & _low_bits(last - first + tl.zeros(row.shape, tl.int32))


@triton.jit
def _last_seed(
    seed: tl.tensor, limit: tl.tensor, row: tl.tensor, first: tl.tensor, last: tl.tensor
) -> tl.tensor:
    """The last place from ``first`` and before ``last`` of each row that has a seed; -1 if none has."""
    start = row + first
    block = start >> 2
    skipped = (start & 3).to(tl.int32)
    found = tl.full(row.shape, -1, tl.int32)
    for number in range((last - first + 6) // 4):
        bits = _seeds(seed, limit, block + number)
        for lane in tl.static_range(4):
            place = first + number * 4 + lane - skipped
            counts = ((bits >> lane) & 1 != 0) & (place >= first) & (place < last)
            found = tl.where(counts, place, found)
    return found


@triton.jit
def _grown_word(
    seed: tl.tensor,
    limit: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    places: tl.tensor,
    block: tl.tensor,
    before: tl.tensor,
) -> tl.tensor:
    """What of the word that begins with position ``column`` the blocks of its row's seeds cover."""
    first = column + before
    words = _seeds_of_word(seed, limit, row, first, tl.minimum(first + WORD, places))
    width = tl.minimum(block, 1)
    while width < block and width < WORD:
        step = tl.minimum(width, block - width)
        words |= words << step.to(tl.uint64)
        width += step
    reached = tl.maximum(first - block + 1, 0)
    last = _last_seed(seed, limit, row, reached, tl.minimum(first, places))
    return words | tl.where(last >= 0, _low_bits(last - first + block), tl.zeros_like(words))


@triton.jit
def _grow(words: tl.tensor, block: tl.tensor, AXIS: tl.constexpr, LENGTH: tl.constexpr) -> tl.tensor:
    """Blocks of words [volumes, depth, height] that reach ``block`` further along an axis of ``LENGTH``."""
    place = tl.arange(0, LENGTH)
    if AXIS == 1:
        place = place[None, :, None] + tl.zeros(words.shape, tl.int32)
    else:
        place = place[None, None, :] + tl.zeros(words.shape, tl.int32)
    width = tl.minimum(block, 1)
    while width < block and width < LENGTH:
        step = tl.minimum(width, block - width)
        earlier = tl.gather(words, tl.maximum(place - step, 0), AXIS)
        words |= tl.where(place >= step, earlier, tl.zeros_like(words))
        width += step
    return words


@triton.jit
def _count_bits(words: tl.tensor) -> tl.tensor:
    words -= (words >> 1) & 0x5555555555555555
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _store_words(
    bits: tl.tensor,
    words: tl.tensor,
    line: tl.tensor,
    mask: tl.tensor,
    row_bytes: tl.tensor,
    number: tl.tensor,
    BYTES: tl.constexpr,
) -> None:
    """The bytes of the word ``number`` of every line; of rows of one word the first BYTES, else all 8."""
    byte = tl.arange(0, BYTES)[None, :]
    values = (words[:, None] >> (byte * 8).to(tl.uint64)).to(tl.uint8)
    column = number * 8 + byte
    tl.store(bits + line[:, None] * row_bytes + column, values, mask=mask[:, None] & (column < row_bytes))


@triton.jit(do_not_specialize=SIZES)
def draw_blocks(
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.int64,
    bits: tl.tensor,
    kept: tl.tensor,
    volumes: tl.tensor,
    words: tl.tensor,
    row_bytes: tl.tensor,
    depth_size: tl.tensor,
    depth_places: tl.tensor,
    depth_block: tl.tensor,
    depth_before: tl.tensor,
    height_size: tl.tensor,
    height_places: tl.tensor,
    height_block: tl.tensor,
    height_before: tl.tensor,
    width_size: tl.tensor,
    width_places: tl.tensor,
    width_block: tl.tensor,
    width_before: tl.tensor,
    VOLUMES: tl.constexpr,
    DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """One word of every row of VOLUMES volumes: its bits, and how many of them are set in each volume."""
    limit = load_limit(threshold, dynamic_threshold)
    number = tl.program_id(0) % words
    first = (tl.program_id(0) // words).to(tl.int64) * VOLUMES
    line = tl.arange(0, VOLUMES * DEPTH * HEIGHT)
    volume = first + line // (DEPTH * HEIGHT)
    deep = line // HEIGHT % DEPTH
    high = line % HEIGHT
    row = ((volume * depth_places + deep) * height_places + high) * width_places
    column = number * WORD
    grown = _grown_word(tl.load(seed), limit, row, column, width_places, width_block, width_before)
    # Rows without places have no seeds.
    grown = tl.where((deep < depth_places) & (high < height_places), grown, tl.zeros_like(grown))
    grown = tl.reshape(grown, [VOLUMES, DEPTH, HEIGHT])
    grown = _grow(grown, height_block, 2, HEIGHT)
    if DEPTH > 1:
        grown = _grow(grown, depth_block, 1, DEPTH)
    left = tl.reshape(grown, [VOLUMES * DEPTH * HEIGHT])
    left = _low_bits(width_size - column + tl.zeros(line.shape, tl.int32)) & (left ^ _ALL)

    # A block begins `before` positions before its seed.
    deep -= depth_before
    high -= height_before
    mask = (deep >= 0) & (deep < depth_size) & (high >= 0) & (high < height_size) & (volume < volumes)
    _store_words(
        bits, left, (volume * depth_size + deep) * height_size + high, mask, row_bytes, number, BYTES
    )
    counts = tl.reshape(tl.where(mask, _count_bits(left), 0), [VOLUMES, DEPTH * HEIGHT])
    of_volume = first + tl.arange(0, VOLUMES)
    tl.store(kept + of_volume * words + number, tl.sum(counts, axis=1), mask=of_volume < volumes)


@triton.jit(do_not_specialize=SIZES)
def draw_rows(
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.int64,
    grown: tl.tensor,
    lines: tl.tensor,
    words: tl.tensor,
    places: tl.tensor,
    block: tl.tensor,
    before: tl.tensor,
    LINES: tl.constexpr,
) -> None:
    """One word of LINES rows of seeds, grown along the row only."""
    limit = load_limit(threshold, dynamic_threshold)
    number = tl.program_id(0) % words
    line = (tl.program_id(0) // words).to(tl.int64) * LINES + tl.arange(0, LINES)
    found = _grown_word(tl.load(seed), limit, line * places, number * WORD, places, block, before)
    tl.store(grown + line * words + number, found.to(tl.int64, bitcast=True), mask=line < lines)


@triton.jit(do_not_specialize=SIZES)
def spread_rows(
    source: tl.tensor,
    grown: tl.tensor,
    bits: tl.tensor,
    kept: tl.tensor,
    lines: tl.tensor,
    inner: tl.tensor,
    words: tl.tensor,
    row_bytes: tl.tensor,
    width: tl.tensor,
    size: tl.tensor,
    places: tl.tensor,
    block: tl.tensor,
    before: tl.tensor,
    LINES: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """One word of LINES rows, grown along another dimension, of which neighbours are ``inner`` rows apart.

    They go to ``grown`` or, if that is None, become bits and the count of each row.
    """
    number = tl.program_id(0) % words
    line = (tl.program_id(0) // words).to(tl.int64) * LINES + tl.arange(0, LINES)
    outer = line // (size * inner)
    place = line // inner % size + before
    within = outer * (places * inner) + line % inner
    found = tl.zeros(line.shape, tl.int64)
    for back in range(block):
        start = place - back
        mask = (line < lines) & (start >= 0) & (start < places)
        found |= tl.load(source + (within + start * inner) * words + number, mask=mask, other=0)
    mask = line < lines
    if grown is not None:
        tl.store(grown + line * words + number, found, mask=mask)
    else:
        left = found.to(tl.uint64, bitcast=True) ^ _ALL
        left &= _low_bits(width - number * WORD + tl.zeros(line.shape, tl.int32))
        _store_words(bits, left, line, mask, row_bytes, number, BYTES)
        tl.store(kept + line * words + number, _count_bits(left), mask=mask)
