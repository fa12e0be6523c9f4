"""Forward kernels of batch norm.

``normalize_channels`` computes the output from statistics, the batch's (_batch_norm_moments.py; 3 passes over the
tensor in all) or the running ones (2 passes). ``normalize_slab`` has a whole channel in registers and reads it once:
2 passes in training, too. A residual is one more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._activations import LEAKY_RELU, activate
from fastreg.backends.triton._batch_norm_moments import store_statistics
from fastreg.backends.triton._batch_norm_tiles import (
    SIZES,
    load_channels,
    load_tile,
    pack_signs,
    plane_of,
    reciprocal_deviation,
    scale_and_shift,
    sum_tile,
)
from fastreg.backends.triton._tiles import round_to, unpack


@triton.jit(do_not_specialize=SIZES)
def normalize_channels(
    input: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    statistics: tl.tensor,
    output: tl.tensor,
    signs: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    input_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """The output of a tile from ``statistics``; these are written first where running statistics are given."""
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
    inputs = line * (input_stride.to(tl.int64) * VECTOR)
    residuals = line * (residual_stride.to(tl.int64) * VECTOR)
    if CHANNELS_LAST:
        channel = column
        inside = column < channels
        writes = inside & (first == 0)
    else:
        sample, channel = plane_of(first, rows, channels)
        inside = line_mask
        writes = inside & (sample == 0) & (block == 0)
        inputs = sample * (input_stride.to(tl.int64) * VECTOR) + channel.to(tl.int64) * line_elements
        residuals = sample * (residual_stride.to(tl.int64) * VECTOR) + channel.to(tl.int64) * line_elements
    values = load_tile(input + inputs + column, mask).to(tl.float32)
    if running_mean is not None:
        mean = load_channels(running_mean, channel, inside)
        variance = load_channels(running_var, channel, inside)
        rstd = reciprocal_deviation(variance, eps)
        tl.store(statistics + channel, mean, mask=writes)
        tl.store(statistics + channels + channel, rstd, mask=writes)
    else:
        mean = load_channels(statistics, channel, inside)
        rstd = load_channels(statistics + channels, channel, inside)
    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)
    z = tl.fma(values - mean, scale, shift)
    if residual is not None:
        z += load_tile(residual + residuals + column, mask).to(tl.float32)
    _store_output(
        output, signs, z, line, block, column, line_elements, line_mask, mask, slope, ROWS, BLOCK, ACTIVATION
    )


@triton.jit
def _store_output(
    output: tl.tensor,
    signs: tl.tensor,
    z: tl.tensor,
    line: tl.tensor,
    block: tl.tensor,
    column: tl.tensor,
    line_elements: tl.tensor,
    line_mask: tl.tensor,
    mask: tl.tensor,
    slope: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """The activation of a tile and, where asked for, on which side of 0 its argument was."""
    result = activate(z, slope, ACTIVATION)
    tl.store(output + line * line_elements + column, round_to(result, output.dtype.element_ty), mask=mask)
    if signs is not None:
        # Where z is not a number, ReLU passes the gradient and leaky ReLU scales it.
        positive = z > 0.0
        if ACTIVATION != LEAKY_RELU:
            positive = (z > 0.0) | (z != z)
        line_bytes = (line_elements + 7) // 8
        byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        packed = pack_signs(positive & mask, ROWS, BLOCK)
        tl.store(signs + line * line_bytes + byte, packed, mask=line_mask & (byte < line_bytes))


@triton.jit(do_not_specialize=SIZES)
def normalize_slab(
    input: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    statistics: tl.tensor,
    output: tl.tensor,
    signs: tl.tensor,
    lines: tl.tensor,
    line_vectors: tl.tensor,
    channels: tl.tensor,
    input_stride: tl.tensor,
    residual_stride: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    slope: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SKIP: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Normalise a channel, or a strip of channels, that is held in registers."""
    zero = line_vectors >> 31
    line_elements = line_vectors * VECTOR
    if CHANNELS_LAST:
        channels = line_elements
    strip = tl.program_id(0)
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    stride = input_stride.to(tl.int64) * VECTOR
    if CHANNELS_LAST:
        block = strip
        columns += strip * BLOCK
        channel = columns
        base = tl.full([1, 1], 0, tl.int64)
        count = lines.to(tl.int64)
    else:
        block = 0
        channel = strip + tl.zeros([1, 1], tl.int32)
        base = channel.to(tl.int64) * line_elements
        count = lines.to(tl.int64) * line_elements
    inside = channel < channels
    column_mask = columns < line_elements

    raw: tl.tensor = ()
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        line = (chunk * ROWS + rows).to(tl.int64)
        mask = line < lines
        if not EVEN:
            mask = mask & column_mask
        raw = raw + (load_tile(input + base + line * stride + columns, mask),)
    for chunk in tl.static_range(CHUNKS):
        sums += raw[chunk].to(tl.float32)
    mean = sum_tile(sums, CHANNELS_LAST) / count.to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    errors = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        # Padding was loaded as 0 and would count as -mean.
        mask = chunk * ROWS + rows < lines
        if not EVEN:
            mask = mask & column_mask
        values = unpack(raw[chunk], zero & mean.to(tl.int32, bitcast=True), PACKED)
        from_mean = tl.where(mask, values - mean, 0.0)
        errors += from_mean
        sums += from_mean * from_mean
    # What rounding left between this and the mean is small: the second sum finds it.
    error = sum_tile(errors, CHANNELS_LAST) / count.to(tl.float32)
    squares = sum_tile(sums, CHANNELS_LAST) - error * error * count.to(tl.float32)
    # Not a maximum: a NaN stays one.
    squares = tl.where(squares < 0.0, 0.0, squares)
    mean += error
    rstd = store_statistics(
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

    scale, shift = scale_and_shift(rstd, weight, bias, channel, inside)
    for chunk in tl.static_range(CHUNKS):
        line = (chunk * ROWS + rows).to(tl.int64)
        line_mask = line < lines
        mask = line_mask if EVEN else line_mask & column_mask
        values = unpack(raw[chunk], zero & rstd.to(tl.int32, bitcast=True), PACKED)
        z = tl.fma(values - mean, scale, shift)
        if residual is not None:
            residuals = base + line * (residual_stride.to(tl.int64) * VECTOR)
            z += load_tile(residual + residuals + columns, mask).to(tl.float32)
        plane = line if CHANNELS_LAST else line * channels + channel
        _store_output(
            output,
            signs,
            z,
            plane,
            block,
            columns,
            line_elements,
            line_mask,
            mask,
            slope,
            ROWS,
            BLOCK,
            ACTIVATION,
        )
