"""Forward kernels of group norm.

``normalize_groups`` computes the output from the statistics of _batch_norm_moments.py: 3 passes over the tensor in all.
``normalize_group_slab`` has whole groups in registers and reads them once: 2 passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._activations import activate
from fastreg.backends.triton._batch_norm_tiles import load_tile, reciprocal_deviation, scale_and_shift
from fastreg.backends.triton._group_norm_tiles import (
    SIZES,
    load_statistics,
    offsets,
    slab_columns,
    slab_lines,
    sum_groups,
    tile_of_sample,
)
from fastreg.backends.triton._tiles import round_to, unpack


@triton.jit(do_not_specialize=SIZES)
def normalize_groups(
    input: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    statistics: tl.tensor,
    output: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    blocks: tl.tensor,
    sample_blocks: tl.tensor,
    input_stride: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """The output of a tile from ``statistics``."""
    line_elements = line_vectors * VECTOR
    channels = groups * width
    dense_stride = channels.to(tl.int64) * line_elements
    if CHANNELS_LAST:
        channels = line_elements
        dense_stride = line_elements.to(tl.int64)
    sample, line, column, line_mask = tile_of_sample(
        lines, line_elements, channels, blocks, sample_blocks, ROWS, BLOCK, CHANNELS_LAST
    )
    mask = line_mask if EVEN else line_mask & (column < line_elements)
    channel = column if CHANNELS_LAST else line
    inside = column < channels if CHANNELS_LAST else line_mask
    stride = input_stride.to(tl.int64) * VECTOR
    first = offsets(sample, line, lines, line_elements, stride, CHANNELS_LAST)
    values = load_tile(input + first + column, mask).to(tl.float32)
    mean, rstd = load_statistics(statistics, sample, channel // width, samples, groups, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)
    result = activate(tl.fma(values - mean, scale, shift), slope, ACTIVATION)
    first = offsets(sample, line, lines, line_elements, dense_stride, CHANNELS_LAST)
    tl.store(output + first + column, round_to(result, output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def normalize_group_slab(
    input: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    statistics: tl.tensor,
    squares_of: tl.tensor,
    output: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    width_vectors: tl.tensor,
    input_stride: tl.tensor,
    eps: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    SAMPLES: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Normalise groups that are held in registers; ``squares_of`` gets their sums of squared deviations, if given."""
    zero = line_vectors >> 31
    line_elements = line_vectors * VECTOR
    strips, group, column, column_mask = slab_columns(
        groups, line_vectors, width_vectors, VECTOR, BLOCK, WIDTH, PADDED, CHANNELS_LAST
    )
    sample, first_line = slab_lines(strips, SAMPLES, LINES)
    if CHANNELS_LAST:
        width = width_vectors * VECTOR if PADDED else WIDTH
        first_channel = tl.zeros([1, 1], tl.int32)
        dense_stride = line_elements.to(tl.int64)
        count = (lines * width).to(tl.float32)
    else:
        first_channel = group * lines
        dense_stride = (groups * lines).to(tl.int64) * line_elements
        count = (lines * line_elements).to(tl.float32)
    stride = input_stride.to(tl.int64) * VECTOR

    raw: tl.tensor = ()
    sums = tl.zeros([SAMPLES * LINES, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        line = chunk * LINES + first_line
        mask = (line < lines) & (sample < samples)
        if not EVEN:
            mask = mask & column_mask
        first = offsets(sample, first_channel + line, lines, line_elements, stride, CHANNELS_LAST)
        raw = raw + (load_tile(input + first + column, mask),)
    for chunk in tl.static_range(CHUNKS):
        sums += raw[chunk].to(tl.float32)
    mean = sum_groups(sums, SAMPLES, LINES, BLOCK, WIDTH) / count
    sums = tl.zeros([SAMPLES * LINES, BLOCK], tl.float32)
    errors = tl.zeros([SAMPLES * LINES, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        # Padding was loaded as 0 and would count as -mean.
        mask = (chunk * LINES + first_line < lines) & (sample < samples)
        if not EVEN:
            mask = mask & column_mask
        values = unpack(raw[chunk], zero & mean.to(tl.int32, bitcast=True), PACKED)
        from_mean = tl.where(mask, values - mean, 0.0)
        errors += from_mean
        sums += from_mean * from_mean
    # What rounding left between this and the mean is small: the second sum finds it.
    error = sum_groups(errors, SAMPLES, LINES, BLOCK, WIDTH) / count
    squares = sum_groups(sums, SAMPLES, LINES, BLOCK, WIDTH) - error * error * count
    # Not a maximum: a NaN stays one.
    squares = tl.where(squares < 0.0, 0.0, squares)
    mean += error
    rstd = reciprocal_deviation(tl.math.div_rn(squares, count + tl.zeros_like(squares)), eps)

    # One lane of a group stores what all of its lanes have.
    index = sample * groups + group
    writes = (group < groups) & (sample < samples)
    if SAMPLES * (BLOCK // WIDTH) > 1:
        index += tl.zeros([SAMPLES * LINES, BLOCK], tl.int32)
        writes = writes & (first_line == 0) & (tl.arange(0, BLOCK)[None, :] % WIDTH == 0)
    tl.store(statistics + index, mean, mask=writes)
    tl.store(statistics + samples.to(tl.int64) * groups + index, rstd, mask=writes)
    if squares_of is not None:
        tl.store(squares_of + index, squares, mask=writes)

    if CHANNELS_LAST:
        scale, shift = scale_and_shift(rstd, weight, bias, column, column_mask)
    for chunk in tl.static_range(CHUNKS):
        line = chunk * LINES + first_line
        mask = (line < lines) & (sample < samples)
        if not CHANNELS_LAST:
            scale, shift = scale_and_shift(rstd, weight, bias, first_channel + line, line < lines)
        if not EVEN:
            mask = mask & column_mask
        values = unpack(raw[chunk], zero & rstd.to(tl.int32, bitcast=True), PACKED)
        result = activate(tl.fma(values - mean, scale, shift), slope, ACTIVATION)
        first = offsets(sample, first_channel + line, lines, line_elements, dense_stride, CHANNELS_LAST)
        tl.store(output + first + column, round_to(result, output.dtype.element_ty), mask=mask)
