"""What the row-wise norms share where a branch is dropped and added before them: a chunk of the sum, and of gradients.

The unit index of an element is its row times the hidden size plus its column, whatever the strides. A thread draws for
DRAW adjacent elements at once (_launch.drawn_at_once), and ``run`` is the unit index of the first of them, divided by
DRAW.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._dropout_tiles import ELEMENTS, keep
from fastreg.backends.triton._tiles import SIZES, load_parameter

# More sizes known only at run time, and what changes with the rate: nothing is compiled anew for one.
BRANCH_SIZES = [
    *SIZES,
    *("residual_stride", "grad_sum_stride", "branch_stride", "scale_rows", "threshold", "keep_scale"),
]


@triton.jit
def load_row_scale(row_scale: tl.tensor, row: tl.tensor, rows: tl.tensor, scale_rows: tl.tensor) -> tl.tensor:
    """The scale of each row in fp32, of which ``scale_rows`` rows share one; 0 for rows past the last."""
    # As wide as the number of rows needs.
    place = row.to(rows.dtype) // scale_rows
    return tl.load(row_scale + place, mask=row < rows, other=0.0).to(tl.float32)


@triton.jit
def keep_chunk(
    key: tl.tensor, limit: tl.tensor, run: tl.tensor, values: tl.tensor, DRAW: tl.constexpr
) -> tl.tensor:
    """Which of ``values`` are kept; ``run`` has their shape but for the last dimension, which is DRAW times shorter."""
    kept, _ = keep(key, limit, tl.reshape(run, [values.numel // DRAW]), 1, 1, ELEMENTS, DRAW)
    return tl.reshape(kept, values.shape)


@triton.jit
def add_branch(
    branch: tl.tensor,
    residual: tl.tensor,
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
    """The sum of what is kept of a chunk of the branch and of the residual, in fp32; 0 past the last column.

    ``residual`` counts if ADDS, ``row_scales`` if SCALES, and what decides what is dropped if DROPS.
    """
    values = branch.to(tl.float32)
    if SCALES:
        values *= row_scales
    if layer_scale is not None:
        values *= load_parameter(layer_scale, column, hidden, EVEN)
    if DROPS:
        values = tl.where(keep_chunk(key, limit, run, values, DRAW), values * keep_scale, 0.0)
    if ADDS:
        values += residual.to(tl.float32)
    if not EVEN:
        # A scale that is not finite would make numbers of the padding that are none.
        values = tl.where(column < hidden, values, 0.0)
    return values


@triton.jit
def drop_gradient(
    gradient: tl.tensor,
    branch: tl.tensor,
    row_scales: tl.tensor,
    key: tl.tensor,
    limit: tl.tensor,
    keep_scale: tl.tensor,
    run: tl.tensor,
    SUMS: tl.constexpr,
    SCALES: tl.constexpr,
    DROPS: tl.constexpr,
    DRAW: tl.constexpr,
) -> tl.tensor:
    """The gradient of the sum as it reaches what layer_scale multiplies, and the terms of layer_scale's own gradient.

    ``branch`` counts if SUMS, and there are no terms otherwise; the rest as in ``add_branch``.
    """
    if SCALES:
        gradient *= row_scales
    terms = gradient
    if DROPS:
        kept = keep_chunk(key, limit, run, gradient, DRAW)
        gradient = tl.where(kept, gradient * keep_scale, 0.0)
        terms = gradient
    if SUMS:
        terms = gradient * branch.to(tl.float32)
        if DROPS:
            terms = tl.where(kept, terms, 0.0)
    return gradient, terms
