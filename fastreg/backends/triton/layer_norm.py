"""Layer normalisation in Triton, and the launchers of every row-wise norm.

The kernels are in _layer_norm_forward.py and _layer_norm_backward.py; what a program holds of a row is decided by
_launch.py. Arithmetic is fp32 whatever the dtype of memory, and two runs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastreg.backends.triton import _device, _launch
from fastreg.backends.triton._dropout_add_branch import (
    NO_ADDED_GRADIENTS,
    NOTHING_ADDED,
    Added,
    AddedGradients,
)
from fastreg.backends.triton._layer_norm_backward import differentiate, project_looped
from fastreg.backends.triton._layer_norm_forward import normalize_looped, normalize_resident
from fastreg.backends.triton._tiles import reduce_partials


def layer_norm_fwd(
    input: torch.Tensor,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) * rstd * weight + bias, and (mean, rstd) of every row in fp32."""
    return norm_forward(input, normalized_ndim, weight, bias, eps, centred=True)


def layer_norm_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; an empty tensor for one that ``output_mask`` does not ask for."""
    return norm_backward(
        grad_output, input, normalized_ndim, statistics, weight, bias, output_mask, centred=True
    )


def norm_forward(
    input: torch.Tensor,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centred: bool,
    added: Added | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised input and what backward needs: mean and rstd of every row, or rstd alone unless ``centred``.

    With ``added``, what is normalised is a sum with the input.
    """
    rows, hidden = _sizes(input, normalized_ndim)
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    shape = (2, rows) if centred else (rows,)
    if rows == 0 or hidden == 0:
        # The mean of no elements is not a number.
        return output, torch.full(shape, math.nan, dtype=torch.float32, device=input.device)
    statistics = torch.empty(shape, dtype=torch.float32, device=input.device)
    stride = _row_stride(input, normalized_ndim)
    if added is None:
        vector = _launch.vector(hidden, stride, aligned=_aligned(input))
        launch = _launch.forward(rows, hidden, input.element_size(), vector)
        extras, keeps_total = NOTHING_ADDED, False
    else:
        residual, total = added.residual, added.total
        residual_stride = stride if residual is None else _row_stride(residual, normalized_ndim)
        aligned = _aligned(input) and (residual is None or _aligned(residual))
        vector = _launch.vector(hidden, stride, residual_stride, aligned=aligned)
        itemsize = max(input.element_size(), total.element_size())
        launch = _launch.forward(rows, hidden, itemsize, vector, added=True)
        keeps_total = total.numel() > 0
        if launch.looped and not keeps_total:
            # A sum that is read again has to be somewhere.
            total = torch.empty(input.shape, dtype=total.dtype, device=input.device)
        extras = (
            *(residual, *added.branch.scales, total, *added.branch.draw, residual_stride // vector),
            *(added.branch.scale_rows(rows), _launch.drawn_at_once(hidden, itemsize)),
        )
    arguments = (input, weight, bias, output, statistics, rows, hidden // vector, stride // vector, eps)
    constants = _constants(launch.tile, vector, centred)
    with _device.current(input):
        if launch.looped:
            normalize_looped[(launch.programs,)](*arguments, *extras, **constants)
        else:
            constants |= {
                "KEEPS_TOTAL": keeps_total,
                "ROWS": launch.tile.rows,
                "CHUNKS": launch.tile.chunks,
                "PACKED": launch.tile.packed,
            }
            normalize_resident[(launch.programs,)](*arguments, *extras, **constants)
    return output, statistics


def norm_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
    *,
    centred: bool,
    added: AddedGradients | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; an empty tensor for one that ``output_mask`` does not ask for.

    With ``added``, the input was a sum, and the gradients of what it was made of are written, too.
    """
    rows, hidden = _sizes(input, normalized_ndim)
    like = (input, input if weight is None else weight, input if bias is None else bias)
    gradients = tuple(
        torch.empty(tensor.shape if wanted else (0,), dtype=tensor.dtype, device=tensor.device)
        for tensor, wanted in zip(like, output_mask, strict=True)
    )
    grad_input, grad_weight, grad_bias = gradients
    if rows == 0 or hidden == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    if not any(output_mask) and added is None:
        return grad_input, grad_weight, grad_bias
    wants_input, wants_weight, wants_bias = output_mask
    needs_projections, grad_layer_scale = wants_input, None
    itemsize = input.element_size()
    read = (grad_output, input)
    if added is not None:
        grad_layer_scale = added.grad_layer_scale
        needs_projections |= added.grad_input is not None or grad_layer_scale is not None
        itemsize = max(itemsize, grad_output.element_size())
        read += tuple(each for each in (added.grad_sum, added.input) if each is not None)
    strides = [_row_stride(each, normalized_ndim) for each in read]
    vector = _launch.vector(hidden, *strides, aligned=all(map(_aligned, read)))
    processors = _device.multiprocessors(input)
    sums = int(wants_weight) + int(wants_bias) + int(grad_layer_scale is not None)
    counted = sums if grad_layer_scale is None else 3
    launch = _launch.backward(rows, hidden, itemsize, vector, counted, processors, added=added is not None)
    partial = torch.empty((sums, launch.row_programs, hidden), dtype=torch.float32, device=input.device)
    partial_weight = partial[0] if wants_weight else None
    partial_bias = partial[int(wants_weight)] if wants_bias else None
    partial_layer_scale = None if grad_layer_scale is None else partial[sums - 1]
    sizes = (rows, hidden // vector, *(stride // vector for stride in strides[:2]))
    extras = NO_ADDED_GRADIENTS
    if added is not None:
        more_strides = (
            1 if each is None else _row_stride(each, normalized_ndim) // vector
            for each in (added.grad_sum, added.input)
        )
        extras = (
            *(added.grad_sum, added.input, *added.branch.scales, added.grad_input, partial_layer_scale),
            *(*added.branch.draw, *more_strides, added.branch.scale_rows(rows)),
            _launch.drawn_at_once(hidden, itemsize),
        )
    projections = None
    with _device.current(input):
        if launch.projection is not None and needs_projections:
            projections = torch.empty_like(statistics)
            project_looped[(rows,)](
                *(grad_output, input, statistics, weight, projections, *sizes),
                **_constants(launch.projection, vector, centred),
            )
        differentiate[(launch.programs,)](
            *(grad_output, input, statistics, weight, projections),
            grad_input if wants_input else None,
            *(partial_weight, partial_bias, *sizes, launch.row_programs, *extras),
            **_constants(launch.tile, vector, centred),
            ROWS=launch.tile.rows,
            CHUNKS=launch.tile.chunks,
            SPLIT=launch.projection is not None,
            PREFETCH=launch.tile.prefetch,
            PACKED=launch.tile.packed,
        )
        reductions = []
        if wants_weight or wants_bias:
            gradients = (grad_weight if wants_weight else None, grad_bias if wants_bias else None)
            reductions.append((partial_weight, partial_bias, *gradients))
        if grad_layer_scale is not None:
            reductions.append((partial_layer_scale, None, grad_layer_scale, None))
        total = _launch.reduce(hidden, processors)
        for tensors in reductions:
            reduce_partials[(total.programs,)](
                *(*tensors, launch.row_programs, hidden // vector),
                VECTOR=vector,
                ROWS=total.rows,
                BLOCK=total.block,
                num_warps=total.warps,
            )
    return grad_input, grad_weight, grad_bias


def _sizes(input: torch.Tensor, normalized_ndim: int) -> tuple[int, int]:
    """Rows and hidden size."""
    leading = input.dim() - normalized_ndim
    return math.prod(input.shape[:leading]), math.prod(input.shape[leading:])


def _row_stride(tensor: torch.Tensor, normalized_ndim: int) -> int:
    """The distance between the rows of a row-regular tensor, in elements; 0 where there is only one."""
    leading = tensor.dim() - normalized_ndim
    for size, stride in zip(
        reversed(tensor.shape[:leading]), reversed(tensor.stride()[:leading]), strict=True
    ):
        if size != 1:
            return stride
    return 0


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % _launch.VECTOR_BYTES == 0


def _constants(tile: _launch.Tile, vector: int, centred: bool) -> dict[str, Any]:
    """What every kernel of these norms is compiled for."""
    return {
        "CENTRED": centred,
        "VECTOR": vector,
        "BLOCK": tile.block,
        "EVEN": tile.even,
        "num_warps": tile.warps,
    }
