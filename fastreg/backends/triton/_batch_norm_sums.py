"""The sums of batch norm's backward: the first half of it, after which SyncBatchNorm adds up all processes' sums.

dz is the gradient of what the activation was applied to. ``sum_gradients`` leaves the sums of dz and of dz times the
normalised input of every part of a channel, ``merge_sums`` adds them up in a fixed order. The argument of the
activation is computed again from the input (and residual), or the bits of ``signs`` stand for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._activations import IDENTITY, differentiate, differentiate_by_sign
from fastreg.backends.triton._batch_norm_tiles import (
    SIZES,
    load_channels,
    load_signs,
    load_tile,
    scale_and_shift,
    sum_tile,
)
from fastreg.backends.triton._tiles import round_to


@triton.jit
def before_activation(
    grad: tl.tensor,
    values: tl.tensor,
    residual: tl.tensor,
    residuals: tl.tensor,
    signs: tl.tensor,
    line: tl.tensor,
    block: tl.tensor,
    line_elements: tl.tensor,
    line_mask: tl.tensor,
    mask: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    slope: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """dz of a tile; 0 outside the tensor, where ``grad`` is."""
    dz = grad
    if ACTIVATION != IDENTITY:
        if signs is not None:
            positive = load_signs(signs, line, block, line_elements, line_mask, ROWS, BLOCK)
            dz = differentiate_by_sign(grad, positive, slope, ACTIVATION)
        else:
            # Exactly as forward computed it: both have to agree on its sign.
            z = tl.fma(values - mean, scale, shift)
            if residual is not None:
                z += load_tile(residual + residuals, mask).to(tl.float32)
            dz = differentiate(grad, z, slope, ACTIVATION)
    return dz


@triton.jit(do_not_specialize=SIZES)
def sum_gradients(
    grad_output: tl.tensor,
    input: tl.tensor,
    residual: tl.tensor,
    signs: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    partial_sum: tl.tensor,
    partial_product: tl.tensor,
    grad_input: tl.tensor,
    grad_residual: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    part: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
    residual_stride: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """The sums of ``part`` units of a channel, or of a strip of channels; None for one not wanted.

    Where statistics are constants the input's gradient needs no sum and is written at once. The residual's may be
    written in any case.
    """
    NEEDS_INPUT: tl.constexpr = partial_product is not None or (ACTIVATION != IDENTITY and signs is None)
    line_elements = line_vectors * VECTOR
    if CHANNELS_LAST:
        channels = line_elements
    strips = (channels + BLOCK - 1) // BLOCK if CHANNELS_LAST else channels
    strip = tl.program_id(0) % strips
    number = tl.program_id(0) // strips
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        columns += strip * BLOCK
        channel = columns
        base = tl.full([1, 1], 0, tl.int64)
        dense_stride = line_elements.to(tl.int64)
    else:
        channel = strip + tl.zeros([1, 1], tl.int32)
        base = channel.to(tl.int64) * line_elements
        dense_stride = channels.to(tl.int64) * line_elements
    inside = channel < channels
    mean = load_channels(statistics, channel, inside)
    rstd = load_channels(statistics + channels, channel, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)
    units = (lines + ROWS - 1) // ROWS * blocks
    first = number * part

    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for unit in range(first, tl.minimum(first + part, units)):
        group = unit // blocks
        block = strip
        column = columns
        if not CHANNELS_LAST:
            block = unit - group * blocks
            column += block * BLOCK
        line = group.to(tl.int64) * ROWS + rows
        line_mask = line < lines
        mask = line_mask if EVEN else line_mask & (column < line_elements)
        grads = base + line * (grad_output_stride.to(tl.int64) * VECTOR) + column
        grad = load_tile(grad_output + grads, mask).to(tl.float32)
        values = grad
        if NEEDS_INPUT:
            inputs = base + line * (input_stride.to(tl.int64) * VECTOR) + column
            values = load_tile(input + inputs, mask).to(tl.float32)
        dz = before_activation(
            grad,
            values,
            residual,
            base + line * (residual_stride.to(tl.int64) * VECTOR) + column,
            signs,
            line if CHANNELS_LAST else line * channels + channel,
            block,
            line_elements,
            line_mask,
            mask,
            mean,
            scale,
            shift,
            slope,
            ROWS,
            BLOCK,
            ACTIVATION,
        )
        # Padding adds nothing to either sum: its gradient was loaded as 0.
        if partial_sum is not None:
            sums += dz
        if partial_product is not None:
            products += dz * ((values - mean) * rstd)
        dense = base + line * dense_stride + column
        if grad_residual is not None:
            tl.store(grad_residual + dense, round_to(dz, grad_residual.dtype.element_ty), mask=mask)
        if grad_input is not None:
            tl.store(grad_input + dense, round_to(scale * dz, grad_input.dtype.element_ty), mask=mask)
    partial = number.to(tl.int64) * channels + channel
    if partial_sum is not None:
        tl.store(partial_sum + partial, sum_tile(sums, CHANNELS_LAST), mask=inside)
    if partial_product is not None:
        tl.store(partial_product + partial, sum_tile(products, CHANNELS_LAST), mask=inside)


@triton.jit
def merged(
    partial: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """The sums of the parts of CHANNELS channels, [1, CHANNELS], in an order that depends on the sizes alone."""
    inside = channel < channels
    sums = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        number = start + tl.arange(0, PARTS)[:, None]
        addresses = partial + number.to(tl.int64) * channels + channel
        sums += tl.load(addresses, mask=inside & (number < parts), other=0.0)
    return tl.sum(sums, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=SIZES)
def merge_sums(
    partial_sum: tl.tensor,
    partial_product: tl.tensor,
    sums: tl.tensor,
    grad_weight: tl.tensor,
    grad_bias: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Add up the parts of CHANNELS channels, in an order that depends on the sizes alone, and round once."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < channels
    if partial_sum is not None:
        total = merged(partial_sum, channel, channels, parts, PARTS, CHANNELS)
        if sums is not None:
            tl.store(sums + channel, total, mask=inside)
        if grad_bias is not None:
            tl.store(grad_bias + channel, round_to(total, grad_bias.dtype.element_ty), mask=inside)
    if partial_product is not None:
        total = merged(partial_product, channel, channels, parts, PARTS, CHANNELS)
        if sums is not None:
            tl.store(sums + channels + channel, total, mask=inside)
        if grad_weight is not None:
            tl.store(grad_weight + channel, round_to(total, grad_weight.dtype.element_ty), mask=inside)
