"""The gradient of the layer's scale, and of the input beside it: a sum over rows of what dropout kept.

Programs share out the columns, and the rows of each: a program walks over tiles of rows a fixed stride apart, keeps its
share of the sums in fp32 registers, and leaves it as a row of partial sums that ``reduce_partials`` adds in a fixed
order. 3 passes over the tensors and 8 bytes for each column and program; of a unit that is dropped nothing is read.
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


@triton.jit(do_not_specialize=SIZES)
def sum_layer_scale(
    grad_output: tl.tensor,
    input: tl.tensor,
    row_scale: tl.tensor,
    layer_scale: tl.tensor,
    grad_input: tl.tensor,
    partial: tl.tensor,
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.int64,
    scale: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    unit_length: tl.tensor,
    unit_columns: tl.tensor,
    row_runs: tl.tensor,
    column_runs: tl.tensor,
    row_programs: tl.tensor,
    UNITS: tl.constexpr,
    RESCALE: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    SKIP: tl.constexpr,
) -> None:
    """This program's share of the sums and, unless ``grad_input`` is None, its share of the input's gradient."""
    strips = tl.num_programs(0) // row_programs
    number = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    place = tl.arange(0, ROWS * RUNS)
    column = strip * RUNS + place % RUNS
    elements = tl.arange(0, RUN)[None, :]
    inside = column < column_runs
    scales = None
    if grad_input is not None:
        scales = load_layer_scale(layer_scale, column, column_runs, inside[:, None], RUN)
    if seed is not None:
        key = tl.load(seed)
        limit = load_limit(threshold, dynamic_threshold)
        scale = load_scale(scale, limit, dynamic_threshold, UNITS, RESCALE)
    sums = tl.zeros([ROWS * RUNS, RUN], tl.float32)
    for first in range(number * ROWS, rows, row_programs * ROWS):
        row = first + place // RUNS
        mask = (inside & (row < rows))[:, None]
        # As wide as the number of elements needs.
        run = row.to(size.dtype) * column_runs + column
        offset = (run.to(tl.int64) * RUN)[:, None] + elements
        loaded = mask
        if seed is not None:
            kept, some = keep(key, limit, run, unit_length, unit_columns, UNITS, RUN)
            if SKIP:
                loaded = mask & some
        grad = load_once(grad_output + offset, loaded)
        if row_scale is not None:
            grad *= load_row_scale(row_scale, run, row_runs, mask)
        terms = load_once(input + offset, loaded)
        if seed is not None:
            terms = tl.where(kept, grad * scale * terms, 0.0)
        else:
            terms = grad * terms
        sums += terms
        if grad_input is not None:
            grad *= scales
            if seed is not None:
                grad = tl.where(kept, grad * scale, 0.0)
            tl.store(grad_input + offset, round_to(grad, grad_input.dtype.element_ty), mask=mask)
    share = tl.sum(tl.reshape(sums, [ROWS, RUNS * RUN]), axis=0)
    column = strip * (RUNS * RUN) + tl.arange(0, RUNS * RUN)
    columns = column_runs * RUN
    tl.store(partial + number.to(tl.int64) * columns + column, share, mask=column < columns)
