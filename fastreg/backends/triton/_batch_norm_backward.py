"""Backward kernels of batch norm.

``differentiate_channels`` computes the gradients of input and residual from the sums of _batch_norm_sums.py: 5 passes
over the tensors in all. ``differentiate_slab`` has input and gradient of a whole channel in registers: 3 passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._activations import IDENTITY
from fastreg.backends.triton._batch_norm_sums import before_activation
from fastreg.backends.triton._batch_norm_tiles import (
    SIZES,
    load_channels,
    load_tile,
    plane_of,
    scale_and_shift,
    sum_tile,
)
from fastreg.backends.triton._tiles import round_to


@triton.jit(do_not_specialize=SIZES)
def differentiate_channels(
    grad_output: tl.tensor,
    input: tl.tensor,
    residual: tl.tensor,
    signs: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    sums: tl.tensor,
    grad_input: tl.tensor,
    grad_residual: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
    residual_stride: tl.tensor,
    count: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """Gradients of input and residual of a tile; ``sums`` over ``count`` are means, None with constant statistics."""
    NEEDS_INPUT: tl.constexpr = (sums is not None and grad_input is not None) or (
        ACTIVATION != IDENTITY and signs is None
    )
    line_elements = line_vectors * VECTOR
    if CHANNELS_LAST:
        channels = line_elements
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    line = first + rows
    line_mask = line < lines
    column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = line_mask if EVEN else line_mask & (column < line_elements)
    outer = line
    base = tl.full([1, 1], 0, tl.int64)
    channel = column
    inside = column < channels
    if not CHANNELS_LAST:
        outer, channel = plane_of(first, rows, channels)
        base = channel.to(tl.int64) * line_elements
        inside = line_mask
    grads = base + outer * (grad_output_stride.to(tl.int64) * VECTOR) + column
    grad = load_tile(grad_output + grads, mask).to(tl.float32)
    values = grad
    if NEEDS_INPUT:
        inputs = base + outer * (input_stride.to(tl.int64) * VECTOR) + column
        values = load_tile(input + inputs, mask).to(tl.float32)
    mean = load_channels(statistics, channel, inside)
    rstd = load_channels(statistics + channels, channel, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)
    dz = before_activation(
        grad,
        values,
        residual,
        base + outer * (residual_stride.to(tl.int64) * VECTOR) + column,
        signs,
        line,
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
    dense = line * line_elements + column
    if grad_residual is not None:
        tl.store(grad_residual + dense, round_to(dz, grad_residual.dtype.element_ty), mask=mask)
    if grad_input is not None:
        if sums is not None:
            on_constant = load_channels(sums, channel, inside) / count
            on_normalized = load_channels(sums + channels, channel, inside) / count
            dz -= on_constant + (values - mean) * (rstd * on_normalized)
        tl.store(grad_input + dense, round_to(scale * dz, grad_input.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def differentiate_slab(
    grad_output: tl.tensor,
    input: tl.tensor,
    residual: tl.tensor,
    signs: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    grad_input: tl.tensor,
    grad_residual: tl.tensor,
    grad_weight: tl.tensor,
    grad_bias: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
    residual_stride: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """All gradients of a channel, or of a strip of channels, of which input and dz are held in registers."""
    line_elements = line_vectors * VECTOR
    if CHANNELS_LAST:
        channels = line_elements
    strip = tl.program_id(0)
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        block = strip
        columns += strip * BLOCK
        channel = columns
        base = tl.full([1, 1], 0, tl.int64)
        dense_stride = line_elements.to(tl.int64)
        count = lines.to(tl.int64)
    else:
        block = 0
        channel = strip + tl.zeros([1, 1], tl.int32)
        base = channel.to(tl.int64) * line_elements
        dense_stride = channels.to(tl.int64) * line_elements
        count = lines.to(tl.int64) * line_elements
    inside = channel < channels
    column_mask = columns < line_elements
    mean = load_channels(statistics, channel, inside)
    rstd = load_channels(statistics + channels, channel, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)

    raw_grads: tl.tensor = ()
    raw_inputs: tl.tensor = ()
    for chunk in tl.static_range(CHUNKS):
        line = (chunk * ROWS + rows).to(tl.int64)
        mask = line < lines if EVEN else (line < lines) & column_mask
        grads = base + line * (grad_output_stride.to(tl.int64) * VECTOR) + columns
        inputs = base + line * (input_stride.to(tl.int64) * VECTOR) + columns
        raw_grads = raw_grads + (load_tile(grad_output + grads, mask),)
        raw_inputs = raw_inputs + (load_tile(input + inputs, mask),)

    kept: tl.tensor = ()
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        line = (chunk * ROWS + rows).to(tl.int64)
        line_mask = line < lines
        mask = line_mask if EVEN else line_mask & column_mask
        values = raw_inputs[chunk].to(tl.float32)
        dz = before_activation(
            raw_grads[chunk].to(tl.float32),
            values,
            residual,
            base + line * (residual_stride.to(tl.int64) * VECTOR) + columns,
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
        sums += dz
        products += dz * ((values - mean) * rstd)
        if grad_residual is not None:
            dense = base + line * dense_stride + columns
            tl.store(grad_residual + dense, round_to(dz, grad_residual.dtype.element_ty), mask=mask)
        if EXACT:
            # Nothing is lost in the dtype of memory, which takes fewer registers.
            kept = kept + (round_to(dz, grad_output.dtype.element_ty),)
        else:
            kept = kept + (dz,)
    total = sum_tile(sums, CHANNELS_LAST)
    product = sum_tile(products, CHANNELS_LAST)
    if grad_weight is not None:
        tl.store(grad_weight + channel, round_to(product, grad_weight.dtype.element_ty), mask=inside)
    if grad_bias is not None:
        tl.store(grad_bias + channel, round_to(total, grad_bias.dtype.element_ty), mask=inside)
    if grad_input is not None:
        on_constant = total / count.to(tl.float32)
        on_normalized = rstd * (product / count.to(tl.float32))
        for chunk in tl.static_range(CHUNKS):
            line = (chunk * ROWS + rows).to(tl.int64)
            mask = line < lines if EVEN else (line < lines) & column_mask
            dz = kept[chunk].to(tl.float32)
            dz -= on_constant + (raw_inputs[chunk].to(tl.float32) - mean) * on_normalized
            dense = base + line * dense_stride + columns
            tl.store(grad_input + dense, round_to(scale * dz, grad_input.dtype.element_ty), mask=mask)
