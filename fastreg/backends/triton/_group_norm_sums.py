"""The sums of group norm's backward.

dz is the gradient of what the activation was applied to; its argument is computed again from the input.
``sum_group_gradients`` leaves, of every channel of every sample, the sums of dz and of dz times the normalised input
of each part. ``merge_group_sums`` adds up those of a group, weighted, to the two means that the input's gradient is
made free of; the gradients of weight and bias are their sums over samples and parts (_batch_norm_sums.merge_sums).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._activations import IDENTITY
from fastreg.backends.triton._batch_norm_tiles import load_channels, load_tile, plane_of, scale_and_shift
from fastreg.backends.triton._group_norm_tiles import SIZES, before_activation, load_statistics, offsets


@triton.jit(do_not_specialize=SIZES)
def sum_group_gradients(
    grad_output: tl.tensor,
    input: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    partial_sum: tl.tensor,
    partial_product: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    blocks: tl.tensor,
    part: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """The sums of ``part`` tiles, of ROWS planes or of a strip of channels of a sample; None for one not wanted."""
    NEEDS_INPUT: tl.constexpr = partial_product is not None or ACTIVATION != IDENTITY
    line_elements = line_vectors * VECTOR
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        strips = blocks
        tiles = (lines + ROWS - 1) // ROWS
        share = tl.program_id(0) // strips
        number = share // samples
        sample = (share - number * samples).to(tl.int64) + tl.zeros([1, 1], tl.int64)
        columns += tl.program_id(0) % strips * BLOCK
        channel = columns
        inside = columns < line_elements
        partial = share.to(tl.int64) * line_elements + columns
    else:
        strips = (lines + ROWS - 1) // ROWS
        tiles = blocks
        number = tl.program_id(0) // strips
        first = (tl.program_id(0) % strips).to(tl.int64) * ROWS
        sample, channel = plane_of(first, rows, groups * width)
        inside = first + rows < lines
        partial = number.to(tl.int64) * lines + first + rows
    mean, rstd = load_statistics(statistics, sample, channel // width, samples, groups, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)

    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(number * part, tl.minimum((number + 1) * part, tiles)):
        if CHANNELS_LAST:
            line = tile * ROWS + rows
            column = columns
            mask = line < lines
        else:
            line = channel
            column = tile * BLOCK + columns
            mask = inside
        if not EVEN:
            mask = mask & (column < line_elements)
        stride = grad_output_stride.to(tl.int64) * VECTOR
        grads = offsets(sample, line, lines, line_elements, stride, CHANNELS_LAST) + column
        grad = load_tile(grad_output + grads, mask).to(tl.float32)
        values = grad
        if NEEDS_INPUT:
            stride = input_stride.to(tl.int64) * VECTOR
            inputs = offsets(sample, line, lines, line_elements, stride, CHANNELS_LAST) + column
            values = load_tile(input + inputs, mask).to(tl.float32)
        # Padding adds nothing to either sum: its gradient was loaded as 0.
        dz = before_activation(grad, values, mean, scale, shift, slope, ACTIVATION)
        if partial_sum is not None:
            sums += dz
        if partial_product is not None:
            products += dz * ((values - mean) * rstd)
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if partial_sum is not None:
        tl.store(partial_sum + partial, tl.sum(sums, axis=AXIS, keep_dims=True), mask=inside)
    if partial_product is not None:
        tl.store(partial_product + partial, tl.sum(products, axis=AXIS, keep_dims=True), mask=inside)


@triton.jit
def _weighted(
    partial: tl.tensor,
    weight: tl.tensor,
    group: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    inside = group < samples * groups
    sums = tl.zeros([GROUPS, PARTS], tl.float32)
    for start in range(0, parts * width, PARTS):
        index = start + tl.arange(0, PARTS)[None, :]
        mask = inside & (index < parts * width)
        number = index // width
        channel = index - number * width
        row = number.to(tl.int64) * (samples * groups) + group
        values = tl.load(partial + row * width + channel, mask=mask, other=0.0)
        if weight is not None:
            values *= load_channels(weight, group % groups * width + channel, mask)
        sums += values
    return tl.sum(sums, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=SIZES)
def merge_group_sums(
    partial_sum: tl.tensor,
    partial_product: tl.tensor,
    weight: tl.tensor,
    means: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """The means of weight * dz and of it times the normalised input, of GROUPS groups of ``count`` elements."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    inside = group < samples * groups
    sums = _weighted(partial_sum, weight, group, samples, groups, width, parts, PARTS, GROUPS)
    tl.store(means + group, sums / count, mask=inside)
    sums = _weighted(partial_product, weight, group, samples, groups, width, parts, PARTS, GROUPS)
    tl.store(means + samples * groups + group, sums / count, mask=inside)
