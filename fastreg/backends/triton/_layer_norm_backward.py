"""Backward kernels of the row-wise norms; an RMS norm is a layer norm that is not CENTRED.

As many programs as multiprocessors, each of which walks over tiles of rows a fixed stride apart and keeps its share of
the weight gradients in fp32 registers: 3 passes over the tensors and, for each program, 8 bytes written and read for
each column and sum. Where the sums do not fit beside a row, ``project_looped`` finds the two projections of each row
first, and programs share out the columns too: 5 passes. ``reduce_partials`` adds the shares in a fixed order.

Where the input was the sum of a residual and of a branch that was dropped, as in the forward kernels, the gradient that
the sum has from elsewhere is added to that of the norm, and what dropout keeps of the total is the branch's: 5 passes,
or 6 with the gradient of the branch's scale, which is a third sum over the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._dropout_add_tiles import BRANCH_SIZES, drop_gradient, load_row_scale
from fastreg.backends.triton._dropout_tiles import ELEMENTS, load_limit, load_scale
from fastreg.backends.triton._tiles import SIZES, load_chunks, load_parameter, round_to, unpack


@triton.jit(do_not_specialize=SIZES)
def project_looped(
    grad_output: tl.tensor,
    input: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    projections: tl.tensor,
    rows: tl.tensor,
    hidden_vectors: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """The projections of one row's scaled gradient on its normalised values and, if CENTRED, on a constant."""
    hidden = hidden_vectors * VECTOR
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    grads = grad_output + row * (grad_output_stride.to(tl.int64) * VECTOR)
    inputs = input + row * (input_stride.to(tl.int64) * VECTOR)
    mean = 0.0
    if CENTRED:
        mean = tl.load(statistics + row)
        rstd = tl.load(statistics + rows + row)
    else:
        rstd = tl.load(statistics + row)
    on_normalized = tl.zeros([BLOCK], tl.float32)
    on_constant = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + columns
        if EVEN:
            grad = tl.load(grads + column).to(tl.float32)
            values = tl.load(inputs + column).to(tl.float32)
        else:
            grad = tl.load(grads + column, mask=column < hidden, other=0.0).to(tl.float32)
            values = tl.load(inputs + column, mask=column < hidden, other=0.0).to(tl.float32)
        if weight is not None:
            grad *= load_parameter(weight, column, hidden, EVEN)
        # Padding adds nothing to either sum: its gradient was loaded as 0.
        on_normalized += grad * ((values - mean) * rstd)
        on_constant += grad
    tl.store(projections + row, tl.sum(on_normalized) / hidden)
    if CENTRED:
        tl.store(projections + rows + row, tl.sum(on_constant) / hidden)


@triton.jit
def _load_statistics(
    statistics: tl.tensor, rows: tl.tensor, row: tl.tensor, CENTRED: tl.constexpr
) -> tl.tensor:
    """Mean (0 unless CENTRED) and reciprocal standard deviation of the rows of a tile; 0 for rows past the last."""
    if CENTRED:
        mean = tl.load(statistics + row, mask=row < rows, other=0.0)
        rstd = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
    else:
        mean = tl.zeros(row.shape, tl.float32)
        rstd = tl.load(statistics + row, mask=row < rows, other=0.0)
    return mean, rstd


@triton.jit
def _store_share(addresses: tl.tensor, sums: tl.tensor, mask: tl.tensor, ROWS: tl.constexpr) -> None:
    if ROWS == 1:
        tl.store(addresses, sums, mask=mask)
    else:
        tl.store(addresses, tl.sum(sums, axis=0, keep_dims=True), mask=mask)


@triton.jit(do_not_specialize=BRANCH_SIZES)
def differentiate(
    grad_output: tl.tensor,
    input: tl.tensor,
    statistics: tl.tensor,
    weight: tl.tensor,
    projections: tl.tensor,
    grad_input: tl.tensor,
    partial_weight: tl.tensor,
    partial_bias: tl.tensor,
    rows: tl.tensor,
    hidden_vectors: tl.tensor,
    grad_output_stride: tl.tensor,
    input_stride: tl.tensor,
    row_programs: tl.tensor,
    grad_sum: tl.tensor,
    branch: tl.tensor,
    row_scale: tl.tensor,
    layer_scale: tl.tensor,
    grad_branch: tl.tensor,
    partial_layer_scale: tl.tensor,
    seed: tl.tensor,
    dynamic_threshold: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    grad_sum_stride: tl.tensor,
    branch_stride: tl.tensor,
    scale_rows: tl.tensor,
    DRAW: tl.constexpr,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Gradients of input and branch, and this program's share of those of weight, bias and layer_scale.

    None for one not wanted, and for whatever there is not.

    If SPLIT, a program handles BLOCK * CHUNKS columns of its rows and the next program the next columns; the gradient
    of the input then needs ``projections``.
    """
    OF_BRANCH: tl.constexpr = grad_branch is not None or partial_layer_scale is not None
    OF_INPUT: tl.constexpr = grad_input is not None or OF_BRANCH
    NEEDS_INPUT: tl.constexpr = OF_INPUT or partial_weight is not None
    zero = hidden_vectors >> 31
    hidden = hidden_vectors * VECTOR
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    if SPLIT:
        # Neighbouring programs read neighbouring columns.
        column_programs = tl.num_programs(0) // row_programs
        first_column = (program % column_programs) * (BLOCK * CHUNKS)
        columns += first_column
        program = program // column_programs
    elif EVEN:
        hidden = BLOCK * CHUNKS
    tile_columns = columns + tl.zeros([ROWS, 1], tl.int32)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    step = row_programs.to(tl.int64) * ROWS
    grad_stride = grad_output_stride.to(tl.int64) * VECTOR
    stride = input_stride.to(tl.int64) * VECTOR
    if OF_BRANCH:
        run_columns = tl.arange(0, BLOCK // DRAW)[None, :]
        if SPLIT:
            run_columns += first_column // DRAW
        key = 0
        limit = 0
        if seed is not None:
            key = tl.load(seed)
            limit = load_limit(threshold, dynamic_threshold)
            keep_scale = load_scale(keep_scale, limit, dynamic_threshold, ELEMENTS, True)

    weight_sums = ()
    bias_sums = ()
    layer_scale_sums = ()
    for _chunk in tl.static_range(CHUNKS):
        if partial_weight is not None:
            weight_sums = weight_sums + (tl.zeros([ROWS, BLOCK], tl.float32),)
        if partial_bias is not None:
            bias_sums = bias_sums + (tl.zeros([ROWS, BLOCK], tl.float32),)
        if partial_layer_scale is not None:
            layer_scale_sums = layer_scale_sums + (tl.zeros([ROWS, BLOCK], tl.float32),)
    if PREFETCH:
        next_grads = load_chunks(
            grad_output + row * grad_stride, columns, row < rows, hidden, BLOCK, CHUNKS, EVEN
        )
        if NEEDS_INPUT:
            next_inputs = load_chunks(input + row * stride, columns, row < rows, hidden, BLOCK, CHUNKS, EVEN)
            next_mean, next_rstd = _load_statistics(statistics, rows, row, CENTRED)

    for _tile in range(program, (rows + ROWS - 1) // ROWS, row_programs):
        if PREFETCH:
            grads = next_grads
            next_row = row + step
            next_mask = next_row < rows
            next_grads = load_chunks(
                grad_output + next_row * grad_stride, columns, next_mask, hidden, BLOCK, CHUNKS, EVEN
            )
            if NEEDS_INPUT:
                inputs = next_inputs
                mean = next_mean
                rstd = next_rstd
                next_inputs = load_chunks(
                    input + next_row * stride, columns, next_mask, hidden, BLOCK, CHUNKS, EVEN
                )
                next_mean, next_rstd = _load_statistics(statistics, rows, next_row, CENTRED)
        else:
            grads = load_chunks(
                grad_output + row * grad_stride, columns, row < rows, hidden, BLOCK, CHUNKS, EVEN
            )
            if NEEDS_INPUT:
                inputs = load_chunks(input + row * stride, columns, row < rows, hidden, BLOCK, CHUNKS, EVEN)
                mean, rstd = _load_statistics(statistics, rows, row, CENTRED)
        if grad_sum is not None:
            address = grad_sum + row * (grad_sum_stride.to(tl.int64) * VECTOR)
            sum_grads = load_chunks(address, columns, row < rows, hidden, BLOCK, CHUNKS, EVEN)
        # What there is not, is not read.
        branches = grads
        if partial_layer_scale is not None:
            address = branch + row * (branch_stride.to(tl.int64) * VECTOR)
            branches = load_chunks(address, columns, row < rows, hidden, BLOCK, CHUNKS, EVEN)
        if OF_BRANCH:
            row_scales = 1.0
            if row_scale is not None:
                row_scales = load_row_scale(row_scale, row, rows, scale_rows)
            run = row * (hidden // DRAW) + run_columns

        # The projections of the scaled gradient, which the gradient of the input is made orthogonal to.
        on_normalized = tl.full([ROWS, 1], 0.0, tl.float32)
        on_constant = tl.full([ROWS, 1], 0.0, tl.float32)
        if OF_INPUT and SPLIT:
            on_normalized = tl.load(projections + row, mask=row < rows, other=0.0)
            if CENTRED:
                on_constant = tl.load(projections + rows + row, mask=row < rows, other=0.0)
        elif OF_INPUT:
            normalized_terms = tl.zeros([ROWS, BLOCK], tl.float32)
            constant_terms = tl.zeros([ROWS, BLOCK], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                scaled = grads[chunk].to(tl.float32)
                if weight is not None:
                    column = chunk * BLOCK + tile_columns
                    scaled *= load_parameter(weight, column, hidden, EVEN or chunk < CHUNKS - 1)
                # Padding adds nothing to either sum: its gradient was loaded as 0.
                normalized_terms += scaled * ((inputs[chunk].to(tl.float32) - mean) * rstd)
                constant_terms += scaled
            on_normalized = tl.sum(normalized_terms, axis=1, keep_dims=True) / hidden
            if CENTRED:
                on_constant = tl.sum(constant_terms, axis=1, keep_dims=True) / hidden

        zero_after = zero & on_normalized.to(tl.int32, bitcast=True)
        addresses = grad_input + row * hidden if grad_input is not None else None
        previous_weight_sums = weight_sums
        previous_bias_sums = bias_sums
        previous_layer_scale_sums = layer_scale_sums
        weight_sums = ()
        bias_sums = ()
        layer_scale_sums = ()
        for chunk in tl.static_range(CHUNKS):
            grad = unpack(grads[chunk], zero_after, PACKED)
            if NEEDS_INPUT:
                normalized = (unpack(inputs[chunk], zero_after, PACKED) - mean) * rstd
            if partial_weight is not None:
                weight_sums = weight_sums + (previous_weight_sums[chunk] + grad * normalized,)
            if partial_bias is not None:
                bias_sums = bias_sums + (previous_bias_sums[chunk] + grad,)
            if OF_INPUT:
                column = chunk * BLOCK + tile_columns
                if weight is not None:
                    grad *= load_parameter(weight, column, hidden, EVEN or chunk < CHUNKS - 1)
                values = (grad - on_constant - normalized * on_normalized) * rstd
                if grad_sum is not None:
                    values += sum_grads[chunk].to(tl.float32)
                mask = row < rows
                if not EVEN and chunk == CHUNKS - 1:
                    mask = mask & (column < hidden)
                if grad_input is not None:
                    tl.store(addresses + column, round_to(values, grad_input.dtype.element_ty), mask=mask)
                if OF_BRANCH:
                    values, terms = drop_gradient(
                        *(values, branches[chunk], row_scales, key, limit, keep_scale),
                        *(run + chunk * (BLOCK // DRAW), partial_layer_scale is not None),
                        *(row_scale is not None, seed is not None, DRAW),
                    )
                    if partial_layer_scale is not None:
                        layer_scale_sums = layer_scale_sums + (previous_layer_scale_sums[chunk] + terms,)
                    if grad_branch is not None:
                        if layer_scale is not None:
                            values *= load_parameter(layer_scale, column, hidden, EVEN or chunk < CHUNKS - 1)
                        branch_addresses = grad_branch + row * hidden + column
                        tl.store(branch_addresses, round_to(values, grad_branch.dtype.element_ty), mask=mask)
        row += step

    share = program.to(tl.int64) * hidden + columns
    for chunk in tl.static_range(CHUNKS):
        mask = chunk * BLOCK + columns < hidden
        if partial_weight is not None:
            _store_share(partial_weight + share + chunk * BLOCK, weight_sums[chunk], mask, ROWS)
        if partial_bias is not None:
            _store_share(partial_bias + share + chunk * BLOCK, bias_sums[chunk], mask, ROWS)
        if partial_layer_scale is not None:
            _store_share(partial_layer_scale + share + chunk * BLOCK, layer_scale_sums[chunk], mask, ROWS)
