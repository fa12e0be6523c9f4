"""The dropout kernel: units are dropped, what is kept is multiplied, and a residual is added; backward is the same.

One program a stretch of memory, whatever the tensor's layout: each tensor is read or written once, and of a channel,
sample or batch that is dropped the input is not read. The last stretch is masked, in a branch of its own, so that the
others load and store 16 bytes at a time however many elements there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._dropout_tiles import (
    SIZES,
    keep,
    load_layer_scale,
    load_limit,
    load_once,
    load_row_scale,
    load_scale,
)
from fastreg.backends.triton._tiles import round_to


@triton.jit
def _drop_tile(
    input: tl.tensor,
    residual: tl.tensor,
    row_scale: tl.tensor,
    layer_scale: tl.tensor,
    output: tl.tensor,
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    unit_length: tl.tensor,
    unit_columns: tl.tensor,
    row_runs: tl.tensor,
    column_runs: tl.tensor,
    UNITS: tl.constexpr,
    RESCALE: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    SKIP: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """``drop`` of RUNS runs from ``first`` on."""
    runs = tl.arange(0, RUNS)
    within = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
    start = first * RUN
    # Indices are as wide as the number of elements needs; past the last element they may wrap.
    run = (first + runs).to(size.dtype)
    mask = None
    row_mask = None
    if MASKED:
        mask = within < size - start
        row_mask = (runs * RUN)[:, None] < size - start
    loaded = mask
    if seed is not None:
        limit = load_limit(threshold, dynamic_threshold)
        scale = load_scale(scale, limit, dynamic_threshold, UNITS, RESCALE)
        kept, some = keep(tl.load(seed), limit, run, unit_length, unit_columns, UNITS, RUN)
        if SKIP:
            loaded = some
            if MASKED:
                loaded = some & mask
    values = load_once(input + start + within, loaded)
    if row_scale is not None:
        values *= load_row_scale(row_scale, run, row_runs, row_mask)
    if layer_scale is not None:
        values *= load_layer_scale(layer_scale, run, column_runs, mask, RUN)
    if seed is not None:
        values = tl.where(kept, values * scale, 0.0)
    if residual is not None:
        values += load_once(residual + start + within, mask)
    tl.store(output + start + within, round_to(values, output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def drop(
    input: tl.tensor,
    residual: tl.tensor,
    row_scale: tl.tensor,
    layer_scale: tl.tensor,
    output: tl.tensor,
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.int64,
    scale: tl.tensor,
    size: tl.tensor,
    unit_length: tl.tensor,
    unit_columns: tl.tensor,
    row_runs: tl.tensor,
    column_runs: tl.tensor,
    UNITS: tl.constexpr,
    RESCALE: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    PARTS: tl.constexpr,
    SKIP: tl.constexpr,
) -> None:
    """Drop, multiply and add; nothing is dropped where ``seed`` is None."""
    first = tl.program_id(0).to(tl.int64) * RUNS
    if (first + RUNS) * RUN <= size:
        _drop_tile(
            *(input, residual, row_scale, layer_scale, output, seed, dynamic_threshold, threshold, scale),
            *(first, size, unit_length, unit_columns, row_runs, column_runs),
            *(UNITS, RESCALE, RUN, RUNS, SKIP, False),
        )
    else:
        # In parts, since masked loads of single elements take many registers.
        for part in range(PARTS):
            _drop_tile(
                *(input, residual, row_scale, layer_scale, output, seed, dynamic_threshold, threshold, scale),
                *(first + part * (RUNS // PARTS), size, unit_length, unit_columns, row_runs, column_runs),
                *(UNITS, RESCALE, RUN, RUNS // PARTS, SKIP, True),
            )
