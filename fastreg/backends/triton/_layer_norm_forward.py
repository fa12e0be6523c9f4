"""Forward kernels of the row-wise norms; an RMS norm is a layer norm that is not CENTRED.

One program a tile of whole rows, which stay in registers from the only load to the only store: mean first, then the
variance of the centred values. A row too long for the registers is read twice (to merge the mean and the centred sum of
squares of each lane, and to normalise): 3 passes over the tensor instead of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._tiles import SIZES, load_chunks, load_parameter, round_to, unpack


@triton.jit(do_not_specialize=SIZES)
def normalize_resident(
    input: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    statistics: tl.tensor,
    rows: tl.tensor,
    hidden_vectors: tl.tensor,
    input_stride: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Normalise a tile of whole rows held in registers."""
    zero = hidden_vectors >> 31
    hidden = hidden_vectors * VECTOR
    if EVEN:
        hidden = BLOCK * CHUNKS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    row_mask = row < rows
    if ROWS == 1:
        row_mask = tl.full([1, 1], True, tl.int1)
    stride = input_stride.to(tl.int64) * VECTOR
    raw = load_chunks(input + row * stride, columns, row_mask, hidden, BLOCK, CHUNKS, EVEN)

    mean = tl.full([ROWS, 1], 0.0, tl.float32)
    if CENTRED:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            sums += raw[chunk].to(tl.float32)
        mean = tl.sum(sums, axis=1, keep_dims=True) / hidden
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centred = unpack(raw[chunk], zero & mean.to(tl.int32, bitcast=True), PACKED)
        if CENTRED:
            centred -= mean
            if not EVEN and chunk == CHUNKS - 1:
                # Padding was loaded as 0 and would count as -mean.
                centred = tl.where(chunk * BLOCK + columns < hidden, centred, 0.0)
        squares += centred * centred
    variance = tl.sum(squares, axis=1, keep_dims=True) / hidden
    rstd = tl.rsqrt(variance + eps)
    if CENTRED:
        tl.store(statistics + row, mean, mask=row_mask)
        tl.store(statistics + rows + row, rstd, mask=row_mask)
    else:
        tl.store(statistics + row, rstd, mask=row_mask)

    # Addresses of whole tiles, not of one row of parameters: each warp then loads what it needs in the layout in which
    # it needs it, where one row would be redistributed through shared memory behind a barrier.
    tile_columns = columns + tl.zeros([ROWS, 1], tl.int32)
    addresses = output + row * hidden
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK + tile_columns
        values = unpack(raw[chunk], zero & rstd.to(tl.int32, bitcast=True), PACKED)
        if CENTRED:
            values -= mean
        values *= rstd
        if weight is not None:
            values *= load_parameter(weight, column, hidden, EVEN or chunk < CHUNKS - 1)
        if bias is not None:
            values += load_parameter(bias, column, hidden, EVEN or chunk < CHUNKS - 1)
        mask = row_mask if EVEN or chunk < CHUNKS - 1 else row_mask & (column < hidden)
        tl.store(addresses + column, round_to(values, output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def normalize_looped(
    input: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    statistics: tl.tensor,
    rows: tl.tensor,
    hidden_vectors: tl.tensor,
    input_stride: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Normalise one row that is too long for the registers, reading it twice."""
    hidden = hidden_vectors * VECTOR
    blocks = hidden // BLOCK
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    addresses = input + row * (input_stride.to(tl.int64) * VECTOR)

    # Each lane keeps the mean and the centred sum of squares of its own columns (Welford), which never cancels; the
    # number of columns is the same for all lanes, save those of a last, partial block.
    count = tl.full([1], 0.0, tl.float32)
    means = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        values = tl.load(addresses + block * BLOCK + columns).to(tl.float32)
        if CENTRED:
            count += 1.0
            from_mean = values - means
            means += from_mean * (1.0 / count)
            squares += from_mean * (values - means)
        else:
            squares += values * values
    counts = count + tl.zeros([BLOCK], tl.float32)
    if not EVEN:
        mask = blocks * BLOCK + columns < hidden
        values = tl.load(addresses + blocks * BLOCK + columns, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            from_mean = tl.where(mask, values - means, 0.0)
            counts += tl.where(mask, 1.0, 0.0)
            means += from_mean * (1.0 / (count + 1.0))
            squares += tl.where(mask, from_mean * (values - means), 0.0)
        else:
            squares += values * values
    mean = 0.0
    if CENTRED:
        mean = tl.sum(means * counts) / hidden
        squares += counts * (means - mean) * (means - mean)
    rstd = tl.rsqrt(tl.sum(squares) / hidden + eps)
    if CENTRED:
        tl.store(statistics + row, mean)
        tl.store(statistics + rows + row, rstd)
    else:
        tl.store(statistics + row, rstd)

    # Last block first: it is the one that is still in the cache.
    results = output + row * hidden
    if not EVEN:
        column = blocks * BLOCK + columns
        values = tl.load(addresses + column, mask=column < hidden, other=0.0).to(tl.float32)
        values = (values - mean) * rstd
        if weight is not None:
            values *= load_parameter(weight, column, hidden, False)
        if bias is not None:
            values += load_parameter(bias, column, hidden, False)
        tl.store(results + column, round_to(values, output.dtype.element_ty), mask=column < hidden)
    for block in range(0, blocks):
        column = (blocks - 1 - block) * BLOCK + columns
        values = (tl.load(addresses + column).to(tl.float32) - mean) * rstd
        if weight is not None:
            values *= load_parameter(weight, column, hidden, True)
        if bias is not None:
            values += load_parameter(bias, column, hidden, True)
        tl.store(results + column, round_to(values, output.dtype.element_ty))
