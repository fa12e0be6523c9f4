"""What the row-wise kernels share: loading tiles into registers, and the ordered sum of partial gradients."""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes known only at run time. Triton would compile a kernel anew for a size that is 1 or a multiple of 16; sizes come
# in units of VECTOR instead, which tells the compiler what it needs to know (_launch.vector).
SIZES = ["rows", "hidden_vectors", "grad_output_stride", "input_stride", "row_programs", "partial_rows"]


@triton.jit
def load_chunks(
    addresses: tl.tensor,
    columns: tl.tensor,
    row_mask: tl.tensor,
    hidden: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """The chunks of a tile of rows as a tuple, in the dtype of memory; 0 outside the tensor.

    A tuple, since Triton has no tensor whose size is not a power of two. Elements stay in the dtype of memory because a
    16-bit element takes half a register; they are read once, so they must not push the parameters out of L1.
    """
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK + columns
        mask = row_mask if EVEN or chunk < CHUNKS - 1 else row_mask & (column < hidden)
        chunks = chunks + (tl.load(addresses + column, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return chunks


@triton.jit
def load_parameter(
    parameter: tl.tensor, columns: tl.tensor, hidden: tl.tensor, EVEN: tl.constexpr
) -> tl.tensor:
    """One chunk of a weight or bias in fp32; every program reads it again, so it is to stay in L1."""
    if EVEN:
        values = tl.load(parameter + columns, eviction_policy="evict_last")
    else:
        values = tl.load(parameter + columns, mask=columns < hidden, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)


@triton.jit
def unpack(raw: tl.tensor, zero: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:
    """``raw`` in fp32, computed again at every use if ``PACKED``.

    A tile that is used before and after a reduction is converted once by the compiler, which keeps the fp32 values:
    twice the registers, and a spill for the longest rows. ``zero`` is always 0, but only the hardware knows; derived
    from the reduction's result, it forces the conversion to come after the reduction, from the packed elements.
    """
    if PACKED:
        raw = (raw.to(tl.int16, bitcast=True) ^ zero.to(tl.int16)).to(raw.dtype, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def round_to(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 ``values`` in ``dtype``, rounded to nearest, ties to even."""
    if dtype == tl.float32:
        rounded = values
    else:
        rounded = values.to(dtype, fp_downcast_rounding="rtne")
    return rounded


@triton.jit
def _sum_rows(
    partial: tl.tensor,
    total: tl.tensor,
    partial_rows: tl.tensor,
    columns: tl.tensor,
    hidden: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.arange(0, ROWS)[:, None]
    inside = columns < hidden
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, partial_rows, ROWS):
        row = start + rows
        mask = inside & (row < partial_rows)
        sums += tl.load(partial + row.to(tl.int64) * hidden + columns, mask=mask, other=0.0)
    tl.store(
        total + columns, round_to(tl.sum(sums, axis=0, keep_dims=True), total.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=SIZES)
def reduce_partials(
    partial_weight: tl.tensor,
    partial_bias: tl.tensor,
    grad_weight: tl.tensor,
    grad_bias: tl.tensor,
    partial_rows: tl.tensor,
    hidden_vectors: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum the rows of fp32 partial gradients, in an order that depends on the sizes alone, and round once."""
    hidden = hidden_vectors * VECTOR
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if grad_weight is not None:
        _sum_rows(partial_weight, grad_weight, partial_rows, columns, hidden, ROWS, BLOCK)
    if grad_bias is not None:
        _sum_rows(partial_bias, grad_bias, partial_rows, columns, hidden, ROWS, BLOCK)
