"""Backward kernels of group norm.

``differentiate_groups`` computes the input's gradient from the means of _group_norm_sums.py: 5 passes over the tensors
in all. ``differentiate_group_slab`` has input and gradient of whole groups in registers: 3 passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._batch_norm_tiles import load_channels, load_tile, scale_and_shift
from fastreg.backends.triton._group_norm_tiles import (
    SIZES,
    before_activation,
    load_statistics,
    offsets,
    slab_columns,
    slab_lines,
    sum_groups,
    tile_of_sample,
)
from fastreg.backends.triton._tiles import round_to


@triton.jit(do_not_specialize=SIZES)
def differentiate_groups(
    grad_output: tl.tensor,
    input: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    means: tl.tensor,
    grad_input: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    blocks: tl.tensor,
    sample_blocks: tl.tensor,
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
    """The gradient of the input of a tile, made free of the two ``means`` of its group."""
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
    stride = grad_output_stride.to(tl.int64) * VECTOR
    first = offsets(sample, line, lines, line_elements, stride, CHANNELS_LAST)
    grad = load_tile(grad_output + first + column, mask).to(tl.float32)
    stride = input_stride.to(tl.int64) * VECTOR
    first = offsets(sample, line, lines, line_elements, stride, CHANNELS_LAST)
    values = load_tile(input + first + column, mask).to(tl.float32)
    group = channel // width
    mean, rstd = load_statistics(statistics, sample, group, samples, groups, inside)
    on_constant, on_normalized = load_statistics(means, sample, group, samples, groups, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)
    dz = before_activation(grad, values, mean, scale, shift, slope, ACTIVATION)
    result = scale * dz - rstd * (on_constant + (values - mean) * (rstd * on_normalized))
    first = offsets(sample, line, lines, line_elements, dense_stride, CHANNELS_LAST)
    tl.store(grad_input + first + column, round_to(result, grad_input.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(
    partial: tl.tensor,
    sums: tl.tensor,
    strips: tl.tensor,
    channels: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    SAMPLES: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """A program's share of the channels' sums; of a column of SAMPLES times LINES of them it is added up first."""
    if SAMPLES > 1:
        sums = tl.sum(tl.reshape(sums, [SAMPLES, LINES]), axis=0, keep_dims=True)
        sums = tl.reshape(tl.broadcast_to(sums, [SAMPLES, LINES]), [SAMPLES * LINES, 1])
        mask = mask & (tl.arange(0, SAMPLES * LINES)[:, None] < LINES)
    share = (tl.program_id(0) // strips).to(tl.int64) * channels
    tl.store(partial + share + channel, sums, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def differentiate_group_slab(
    grad_output: tl.tensor,
    input: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    grad_input: tl.tensor,
    partial_sum: tl.tensor,
    partial_product: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    width_vectors: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
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
    EXACT: tl.constexpr,
) -> None:
    """The input's gradient of groups held in registers, and this program's share of the channels' sums.

    A share is the sum over SAMPLES samples; None where it is not wanted.
    """
    line_elements = line_vectors * VECTOR
    strips, group, column, column_mask = slab_columns(
        groups, line_vectors, width_vectors, VECTOR, BLOCK, WIDTH, PADDED, CHANNELS_LAST
    )
    sample, first_line = slab_lines(strips, SAMPLES, LINES)
    if CHANNELS_LAST:
        width = width_vectors * VECTOR if PADDED else WIDTH
        channels = line_elements
        first_channel = tl.zeros([1, 1], tl.int32)
        dense_stride = line_elements.to(tl.int64)
        count = (lines * width).to(tl.float32)
    else:
        channels = groups * lines
        first_channel = group * lines
        dense_stride = channels.to(tl.int64) * line_elements
        count = (lines * line_elements).to(tl.float32)
    known = (group < groups) & (sample < samples)
    mean, rstd = load_statistics(statistics, sample, group, samples, groups, known)
    grad_stride = grad_output_stride.to(tl.int64) * VECTOR
    stride = input_stride.to(tl.int64) * VECTOR

    raw_grads: tl.tensor = ()
    raw_inputs: tl.tensor = ()
    for chunk in tl.static_range(CHUNKS):
        line = chunk * LINES + first_line
        mask = (line < lines) & (sample < samples)
        if not EVEN:
            mask = mask & column_mask
        first = offsets(sample, first_channel + line, lines, line_elements, grad_stride, CHANNELS_LAST)
        raw_grads = raw_grads + (load_tile(grad_output + first + column, mask),)
        first = offsets(sample, first_channel + line, lines, line_elements, stride, CHANNELS_LAST)
        raw_inputs = raw_inputs + (load_tile(input + first + column, mask),)

    kept: tl.tensor = ()
    # Of rows the sums of each lane, of planes those of each line, which is a channel; weighted they are the group's.
    sums = tl.zeros([SAMPLES * LINES, BLOCK if CHANNELS_LAST else 1], tl.float32)
    products = tl.zeros([SAMPLES * LINES, BLOCK if CHANNELS_LAST else 1], tl.float32)
    factor = 1.0
    if CHANNELS_LAST:
        scale, shift = scale_and_shift(rstd, weight, bias, column, column_mask)
        if weight is not None:
            factor = load_channels(weight, column, column_mask)
    for chunk in tl.static_range(CHUNKS):
        line = chunk * LINES + first_line
        values = raw_inputs[chunk].to(tl.float32)
        if not CHANNELS_LAST:
            scale, shift = scale_and_shift(rstd, weight, bias, first_channel + line, line < lines)
        grad = raw_grads[chunk].to(tl.float32)
        dz = before_activation(grad, values, mean, scale, shift, slope, ACTIVATION)
        # Padding adds nothing to either sum: its gradient was loaded as 0.
        product = dz * ((values - mean) * rstd)
        if CHANNELS_LAST:
            sums += dz
            products += product
        else:
            line_sums = tl.sum(dz, axis=1, keep_dims=True)
            line_products = tl.sum(product, axis=1, keep_dims=True)
            channel = first_channel + line
            if partial_sum is not None:
                _store_sums(partial_sum, line_sums, strips, channels, channel, line < lines, SAMPLES, LINES)
            if partial_product is not None:
                _store_sums(
                    partial_product, line_products, strips, channels, channel, line < lines, SAMPLES, LINES
                )
            if weight is not None:
                factor = load_channels(weight, channel, line < lines)
            if SAMPLES > 1:
                sums = factor * dz
                products = factor * product
            else:
                sums += factor * line_sums
                products += factor * line_products
        if EXACT:
            # Nothing is lost in the dtype of memory, which takes fewer registers.
            kept = kept + (round_to(dz, grad_output.dtype.element_ty),)
        else:
            kept = kept + (dz,)
    if CHANNELS_LAST:
        if partial_sum is not None:
            line_sums = tl.sum(sums, axis=0, keep_dims=True)
            _store_sums(partial_sum, line_sums, strips, channels, column, column_mask, 1, 1)
        if partial_product is not None:
            line_products = tl.sum(products, axis=0, keep_dims=True)
            _store_sums(partial_product, line_products, strips, channels, column, column_mask, 1, 1)
        sums *= factor
        products *= factor
    on_constant = sum_groups(sums, SAMPLES, LINES, BLOCK, WIDTH) / count
    on_normalized = rstd * (sum_groups(products, SAMPLES, LINES, BLOCK, WIDTH) / count)
    for chunk in tl.static_range(CHUNKS):
        line = chunk * LINES + first_line
        mask = (line < lines) & (sample < samples)
        if not CHANNELS_LAST:
            scale, shift = scale_and_shift(rstd, weight, None, first_channel + line, line < lines)
        if not EVEN:
            mask = mask & column_mask
        values = raw_inputs[chunk].to(tl.float32)
        result = scale * kept[chunk].to(tl.float32) - rstd * (on_constant + (values - mean) * on_normalized)
        first = offsets(sample, first_channel + line, lines, line_elements, dense_stride, CHANNELS_LAST)
        tl.store(grad_input + first + column, round_to(result, grad_input.dtype.element_ty), mask=mask)
