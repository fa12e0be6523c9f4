"""Forward kernels of the row-wise norms; an RMS norm is a layer norm that is not CENTRED.

One program a tile of whole rows, which stay in registers from the only load to the only store: mean first, then the
variance of the centred values. A row too long for the registers is read twice (to merge the mean and the centred sum of
squares of each lane, and to normalise): 3 passes over the tensor instead of 2.

With a ``total`` the rows that are normalised are those of a sum: what dropout keeps of the input, and a residual, added
in fp32 and rounded to the total's dtype. The sum is made in registers in place of the loaded rows, and written once: 4
passes, or 5 where a long row is read again as the sum that was just written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._dropout_add_tiles import BRANCH_SIZES, add_branch, load_row_scale
from fastreg.backends.triton._dropout_tiles import ELEMENTS, load_limit, load_scale
from fastreg.backends.triton._tiles import load_chunks, load_parameter, round_to, unpack


@triton.jit(do_not_specialize=BRANCH_SIZES)
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
    residual: tl.tensor,
    row_scale: tl.tensor,
    layer_scale: tl.tensor,
    total: tl.tensor,
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    residual_stride: tl.tensor,
    scale_rows: tl.tensor,
    DRAW: tl.constexpr,
    KEEPS_TOTAL: tl.constexpr,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Normalise a tile of whole rows held in registers.

    If KEEPS_TOTAL, the sum is written to ``total``; otherwise ``total`` says its dtype, and nothing is added if None.
    """
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
    if total is not None:
        branches = raw
        # What there is not, is not read.
        residuals = raw
        if residual is not None:
            stride = residual_stride.to(tl.int64) * VECTOR
            residuals = load_chunks(residual + row * stride, columns, row_mask, hidden, BLOCK, CHUNKS, EVEN)
        row_scales = 1.0
        if row_scale is not None:
            row_scales = load_row_scale(row_scale, row, rows, scale_rows)
        key = 0
        limit = 0
        if seed is not None:
            key = tl.load(seed)
            limit = load_limit(threshold, dynamic_threshold)
            keep_scale = load_scale(keep_scale, limit, dynamic_threshold, ELEMENTS, True)
        run = row * (hidden // DRAW) + tl.arange(0, BLOCK // DRAW)[None, :]
        raw = ()
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + columns + tl.zeros([ROWS, 1], tl.int32)
            added = add_branch(
                *(branches[chunk], residuals[chunk], row_scales, layer_scale, key, limit, keep_scale),
                *(run + chunk * (BLOCK // DRAW), column, hidden),
                *(residual is not None, row_scale is not None, seed is not None),
                *(DRAW, EVEN or chunk < CHUNKS - 1),
            )
            raw = raw + (round_to(added, total.dtype.element_ty),)
            if KEEPS_TOTAL:
                mask = row_mask if EVEN or chunk < CHUNKS - 1 else row_mask & (column < hidden)
                tl.store(total + row * hidden + column, raw[chunk], mask=mask)

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


@triton.jit
def _sum_block(
    branches: tl.tensor,
    residuals: tl.tensor,
    totals: tl.tensor,
    row_scales: tl.tensor,
    layer_scale: tl.tensor,
    key: tl.tensor,
    limit: tl.tensor,
    keep_scale: tl.tensor,
    run: tl.tensor,
    column: tl.tensor,
    hidden: tl.tensor,
    ADDS: tl.constexpr,
    SCALES: tl.constexpr,
    DROPS: tl.constexpr,
    DRAW: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Load, add and store a block of the sum, and return it as it was rounded."""
    mask = None if EVEN else column < hidden
    other = None if EVEN else 0.0
    branch = tl.load(branches + column, mask=mask, other=other, eviction_policy="evict_first")
    residual = branch
    if ADDS:
        residual = tl.load(residuals + column, mask=mask, other=other, eviction_policy="evict_first")
    added = add_branch(
        *(branch, residual, row_scales, layer_scale, key, limit, keep_scale, run, column, hidden),
        *(ADDS, SCALES, DROPS, DRAW, EVEN),
    )
    rounded = round_to(added, totals.dtype.element_ty)
    tl.store(totals + column, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit(do_not_specialize=BRANCH_SIZES)
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
    residual: tl.tensor,
    row_scale: tl.tensor,
    layer_scale: tl.tensor,
    total: tl.tensor,
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    residual_stride: tl.tensor,
    scale_rows: tl.tensor,
    DRAW: tl.constexpr,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Normalise one row that is too long for the registers, reading it twice: then from ``total``, if there is one."""
    hidden = hidden_vectors * VECTOR
    blocks = hidden // BLOCK
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    addresses = input + row * (input_stride.to(tl.int64) * VECTOR)
    if total is not None:
        residuals = addresses
        if residual is not None:
            residuals = residual + row * (residual_stride.to(tl.int64) * VECTOR)
        row_scales = 1.0
        if row_scale is not None:
            row_scales = load_row_scale(row_scale, row, rows, scale_rows)
        key = 0
        limit = 0
        if seed is not None:
            key = tl.load(seed)
            limit = load_limit(threshold, dynamic_threshold)
            keep_scale = load_scale(keep_scale, limit, dynamic_threshold, ELEMENTS, True)
        totals = total + row * hidden
        run = row * (hidden // DRAW) + tl.arange(0, BLOCK // DRAW)

    # Each lane keeps the mean and the centred sum of squares of its own columns (Welford), which never cancels; the
    # number of columns is the same for all lanes, save those of a last, partial block.
    count = tl.full([1], 0.0, tl.float32)
    means = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        if total is None:
            values = tl.load(addresses + block * BLOCK + columns).to(tl.float32)
        else:
            values = _sum_block(
                *(addresses, residuals, totals, row_scales, layer_scale, key, limit, keep_scale),
                *(run + block * (BLOCK // DRAW), block * BLOCK + columns, hidden),
                *(residual is not None, row_scale is not None, seed is not None, DRAW, True),
            )
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
        if total is None:
            values = tl.load(addresses + blocks * BLOCK + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            values = _sum_block(
                *(addresses, residuals, totals, row_scales, layer_scale, key, limit, keep_scale),
                *(run + blocks * (BLOCK // DRAW), blocks * BLOCK + columns, hidden),
                *(residual is not None, row_scale is not None, seed is not None, DRAW, False),
            )
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

    if total is not None:
        # Another thread's part of the sum is written by now.
        tl.debug_barrier()
        addresses = totals
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
