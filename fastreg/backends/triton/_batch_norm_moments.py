"""The batch's statistics: the first half of batch norm's forward, after which SyncBatchNorm exchanges them.

``moments`` leaves mean and sum of squared deviations of every part of a channel; ``merge_moments`` merges them (Chan,
Golub and LeVeque) into statistics and moves the running ones. One pass over the tensor. Group norm takes both for the
groups of every sample (_group_norm_launchers.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._batch_norm_tiles import (
    SIZES,
    load_tile,
    part_elements,
    reciprocal_deviation,
    sum_tile,
)
from fastreg.backends.triton._tiles import round_to


@triton.jit(do_not_specialize=SIZES)
def moments(
    input: tl.tensor,
    partial_mean: tl.tensor,
    partial_squares: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    part: tl.tensor,
    input_stride: tl.tensor,
    samples: tl.tensor,
    sample_stride: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Mean and sum of squared deviations of ``part`` units of a channel, or of a strip of channels.

    ``samples``, ``sample_stride`` apart, have statistics of their own; None where all lines are one batch.
    """
    line_elements = line_vectors * VECTOR
    if CHANNELS_LAST:
        channels = line_elements
    strips = (channels + BLOCK - 1) // BLOCK if CHANNELS_LAST else channels
    strip = tl.program_id(0) % strips
    share_row = tl.program_id(0) // strips
    number = share_row
    if samples is not None:
        number = share_row // samples
        input += (share_row - number * samples) * (sample_stride.to(tl.int64) * VECTOR)
    stride = input_stride.to(tl.int64) * VECTOR
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        columns += strip * BLOCK
        base = input
    else:
        base = input + strip.to(tl.int64) * line_elements
    units = (lines + ROWS - 1) // ROWS * blocks
    first = number * part
    last = tl.minimum(first + part, units)

    # Each lane keeps the mean and the centred sum of squares of its own elements (Welford), which never cancels. The
    # last block of a plane may be partial: lanes beyond its end have seen fewer elements, all by the same number.
    tail = line_elements - (blocks - 1) * BLOCK
    before_tail = columns < tail
    means = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for unit in range(first, last):
        group = unit // blocks
        column = columns
        if not CHANNELS_LAST:
            column += (unit - group * blocks) * BLOCK
        line = group.to(tl.int64) * ROWS + rows
        mask = line < lines
        if not EVEN:
            mask = mask & (column < line_elements)
        values = load_tile(base + line * stride + column, mask).to(tl.float32)
        count = unit - first + 1
        share = 1.0 / count.to(tl.float32)
        if not EVEN and not CHANNELS_LAST:
            fewer = tl.maximum(count - ((unit + 1) // blocks - first // blocks), 1)
            share = tl.where(before_tail, share, 1.0 / fewer.to(tl.float32))
        from_mean = tl.where(mask, values - means, 0.0)
        means += from_mean * share
        squares += from_mean * (values - means)

    # The counts in closed form: units, less the tails that a lane lies beyond, less the last lines that are none.
    counts = (last - first) + tl.zeros([ROWS, BLOCK], tl.int32)
    in_last_group = tl.maximum(last - tl.maximum(first, units - blocks), 0)
    rest = rows >= lines - (units // blocks - 1).to(tl.int64) * ROWS
    if EVEN or CHANNELS_LAST:
        counts -= tl.where(rest, in_last_group, 0)
    else:
        tails = last // blocks - first // blocks
        last_tail = tl.where(last == units, 1, 0)
        counts -= tl.where(before_tail, 0, tails)
        counts -= tl.where(rest, in_last_group - tl.where(before_tail, 0, last_tail), 0)
    weights = counts.to(tl.float32)
    share = 1.0 / part_elements(number, part, units, lines, line_elements, blocks, ROWS, BLOCK, CHANNELS_LAST)
    mean = sum_tile(weights * means, CHANNELS_LAST) * share
    # What rounding left between this and the mean is small: the second sum finds it.
    from_mean = means - mean
    error = sum_tile(weights * from_mean, CHANNELS_LAST) * share
    from_mean -= error
    squares = sum_tile(squares + weights * from_mean * from_mean, CHANNELS_LAST)
    channel = columns if CHANNELS_LAST else strip + tl.zeros([1, 1], tl.int32)
    partial = share_row.to(tl.int64) * channels + channel
    tl.store(partial_mean + partial, mean + error, mask=channel < channels)
    tl.store(partial_squares + partial, squares, mask=channel < channels)


@triton.jit
def move(
    running: tl.tensor,
    channel: tl.tensor,
    value: tl.tensor,
    momentum: tl.tensor,
    keep: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Move a running statistic a step towards ``value``, except where it is to ``keep`` what it has."""
    before = tl.load(running + channel, mask=inside, other=0.0).to(tl.float32)
    after = before * (1.0 - momentum) + value * momentum
    tl.store(running + channel, round_to(after, running.dtype.element_ty), mask=inside & ~keep)


@triton.jit
def store_statistics(
    statistics: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
    count: tl.tensor,
    channels: tl.tensor,
    channel: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    SKIP: tl.constexpr,
) -> tl.tensor:
    """Store mean and rstd and move the running statistics, if SKIP not those of channels with inf or NaN; rstd."""
    inside = channel < channels
    size = count.to(tl.float32)
    rstd = reciprocal_deviation(tl.math.div_rn(squares, size + tl.zeros_like(squares)), eps)
    if running_mean is not None:
        keep = tl.zeros_like(inside)
        if SKIP:
            keep = ~((tl.abs(mean) < float("inf")) & (squares < float("inf")))
        unbiased = squares / tl.maximum(count - 1, 1).to(tl.float32)
        move(running_mean, channel, mean, momentum, keep, inside)
        move(running_var, channel, unbiased, momentum, keep, inside)
    tl.store(statistics + channel, mean, mask=inside)
    tl.store(statistics + channels + channel, rstd, mask=inside)
    return rstd


@triton.jit
def _place(index: tl.tensor, channel: tl.tensor, channels: tl.tensor, width: tl.tensor) -> tl.tensor:
    """The part that a partial result is of, and where it is: of ``width`` adjacent channels one after the other."""
    number = index
    if width is not None:
        number = index // width
        channel = channel * width + (index - number * width)
        channels = channels * width
    return number, number.to(tl.int64) * channels + channel


@triton.jit(do_not_specialize=SIZES)
def merge_moments(
    partial_mean: tl.tensor,
    partial_squares: tl.tensor,
    statistics: tl.tensor,
    squares_of: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    part: tl.tensor,
    parts: tl.tensor,
    width: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RSTD: tl.constexpr,
    SKIP: tl.constexpr,
) -> None:
    """Merge the parts of CHANNELS channels, in an order that depends on the sizes alone.

    ``statistics`` are mean and rstd if RSTD, else mean and sum of squared deviations; ``squares_of``, if given, gets
    the latter beside them. A ``width`` makes groups of as many adjacent channels each, of which there are ``channels``.
    """
    line_elements = line_vectors * VECTOR
    if CHANNELS_LAST and width is None:
        channels = line_elements
    count = lines.to(tl.int64) * (1 if CHANNELS_LAST else line_elements)
    partials = parts
    if width is not None:
        count *= width
        partials *= width
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < channels
    units = (lines + ROWS - 1) // ROWS * blocks
    # Sums of differences from the first part's mean do not lose digits to a mean that is large beside them.
    _, origin = _place(tl.zeros([1, 1], tl.int32), channel, channels, width)
    origin = tl.load(partial_mean + origin, mask=inside, other=0.0)
    sums = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, partials, PARTS):
        index = start + tl.arange(0, PARTS)[:, None]
        mask = inside & (index < partials)
        number, partial = _place(index, channel, channels, width)
        means = tl.load(partial_mean + partial, mask=mask, other=0.0)
        weights = part_elements(number, part, units, lines, line_elements, blocks, ROWS, BLOCK, CHANNELS_LAST)
        sums += tl.where(mask, weights * (means - origin), 0.0)
    mean = origin + tl.sum(sums, axis=0, keep_dims=True) / count.to(tl.float32)
    sums = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, partials, PARTS):
        index = start + tl.arange(0, PARTS)[:, None]
        mask = inside & (index < partials)
        number, partial = _place(index, channel, channels, width)
        from_mean = tl.load(partial_mean + partial, mask=mask, other=0.0) - mean
        squares = tl.load(partial_squares + partial, mask=mask, other=0.0)
        weights = part_elements(number, part, units, lines, line_elements, blocks, ROWS, BLOCK, CHANNELS_LAST)
        sums += tl.where(mask, squares + weights * from_mean * from_mean, 0.0)
    squares = tl.sum(sums, axis=0, keep_dims=True)
    if squares_of is not None:
        tl.store(squares_of + channel, squares, mask=inside)
    if RSTD:
        store_statistics(
            statistics,
            running_mean,
            running_var,
            mean,
            squares,
            count,
            channels,
            channel,
            momentum,
            eps,
            SKIP,
        )
    else:
        tl.store(statistics + channel, mean, mask=inside)
        tl.store(statistics + channels + channel, squares, mask=inside)
