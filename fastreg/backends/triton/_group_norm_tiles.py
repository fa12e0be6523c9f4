"""What the group norm kernels share: where a tile lies, and the sums of its groups.

A *slab* is what belongs to some groups of some samples, in the registers of one program: SAMPLES times LINES lines of
BLOCK adjacent elements, and if there are CHUNKS of it, the next lines. Of planes the lines are the channels of one
group. Of rows (CHANNELS_LAST) they are pixels, of which the program has a strip of whole groups, WIDTH channels each;
a group of fewer is PADDED. Whatever belongs to a channel or to a group has the shape that meets the tile, 1 where it
is the same all along.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton import _batch_norm_tiles
from fastreg.backends.triton._activations import IDENTITY, differentiate
from fastreg.backends.triton._batch_norm_tiles import load_channels, plane_of, sum_tile

SIZES = [*_batch_norm_tiles.SIZES, "groups", "width_vectors", "sample_blocks"]


@triton.jit
def slab_columns(
    groups: tl.tensor,
    line_vectors: tl.tensor,
    width_vectors: tl.tensor,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """How many strips there are, and of this program's the groups, the columns in a line, and their mask."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = column < line_vectors * VECTOR
    strips = groups
    group = tl.program_id(0) % strips + tl.zeros([1, 1], tl.int32)
    if CHANNELS_LAST:
        strips = (groups + BLOCK // WIDTH - 1) // (BLOCK // WIDTH)
        strip = tl.program_id(0) % strips
        if PADDED:
            within = column % WIDTH
            group = strip * (BLOCK // WIDTH) + column // WIDTH
            column = group * (width_vectors * VECTOR) + within
            mask = (group < groups) & (within < width_vectors * VECTOR)
        else:
            column += strip * BLOCK
            group = column // WIDTH
            mask = column < line_vectors * VECTOR
    return strips, group, column, mask


@triton.jit
def slab_lines(strips: tl.tensor, SAMPLES: tl.constexpr, LINES: tl.constexpr) -> tl.tensor:
    """The sample of each row of this program's tile, and the line in it of the first chunk."""
    row = tl.arange(0, SAMPLES * LINES)[:, None]
    first = (tl.program_id(0) // strips).to(tl.int64) * SAMPLES
    sample = first + tl.zeros([1, 1], tl.int64)
    line = row
    if SAMPLES > 1:
        sample = first + row // LINES
        line = row % LINES
    return sample, line


@triton.jit
def tile_of_sample(
    lines: tl.tensor,
    line_elements: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    sample_blocks: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """Sample, line in it and column of this program's tile, element by element, and which lines there are.

    Of planes, of which ``lines`` counts those of all samples, a tile may have some of one sample and some of the next.
    """
    row = tl.arange(0, ROWS)[:, None]
    unit = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        number = unit // sample_blocks
        sample = number.to(tl.int64) + tl.zeros([1, 1], tl.int64)
        line = (unit - number * sample_blocks) * ROWS + row
        line_mask = line < lines
    else:
        first = unit.to(tl.int64) * ROWS
        sample, line = plane_of(first, row, channels)
        line_mask = first + row < lines
    return sample, line, column, line_mask


@triton.jit
def offsets(
    sample: tl.tensor,
    line: tl.tensor,
    lines: tl.tensor,
    line_elements: tl.tensor,
    stride: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """Where a line of a sample begins: a channel of planes, one of ``lines`` pixels of rows."""
    if CHANNELS_LAST:
        offset = (sample * lines + line) * stride
    else:
        offset = sample * stride + line.to(tl.int64) * line_elements
    return offset


@triton.jit
def sum_groups(
    values: tl.tensor,
    SAMPLES: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """For every element of a slab the sum over its group; [1, 1] if the slab is of one group.

    Sums of fewer elements than a tile's, brought back into its shape, would be in a layout of their own, and the
    compiler might move the tile there: a row of it to each thread. So they keep four dimensions, in the tile's layout.
    """
    if SAMPLES * (BLOCK // WIDTH) == 1:
        sums = sum_tile(values, False)
    else:
        sums = tl.reshape(values, [SAMPLES, LINES, BLOCK // WIDTH, WIDTH])
        sums = tl.sum(tl.sum(sums, axis=1, keep_dims=True), axis=3, keep_dims=True)
        sums = tl.broadcast_to(sums, [SAMPLES, LINES, BLOCK // WIDTH, WIDTH])
        sums = tl.reshape(sums, [SAMPLES * LINES, BLOCK])
    return sums


@triton.jit
def load_statistics(
    statistics: tl.tensor,
    sample: tl.tensor,
    group: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """The two numbers of a group: mean and rstd, or the means that its gradient is made free of."""
    index = sample * groups + group
    first = load_channels(statistics, index, mask)
    return first, load_channels(statistics + samples.to(tl.int64) * groups, index, mask)


@triton.jit
def before_activation(
    grad: tl.tensor,
    values: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    slope: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """dz of a tile; 0 outside the tensor, where ``grad`` is."""
    dz = grad
    if ACTIVATION != IDENTITY:
        # Exactly as forward computed it: both have to agree on its sign.
        dz = differentiate(grad, tl.fma(values - mean, scale, shift), slope, ACTIVATION)
    return dz
