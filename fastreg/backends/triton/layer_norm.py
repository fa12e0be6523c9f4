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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised input and what backward needs: mean and rstd of every row, or rstd alone unless ``centred``."""
    rows, hidden = _sizes(input, normalized_ndim)
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    shape = (2, rows) if centred else (rows,)
    if rows == 0 or hidden == 0:
        # The mean of no elements is not a number.
        return output, torch.full(shape, math.nan, dtype=torch.float32, device=input.device)
    statistics = torch.empty(shape, dtype=torch.float32, device=input.device)
    stride = _row_stride(input, normalized_ndim)
    vector = _launch.vector(hidden, stride, aligned=_aligned(input))
    launch = _launch.forward(rows, hidden, input.element_size(), vector)
    arguments = (input, weight, bias, output, statistics, rows, hidden // vector, stride // vector, eps)
    constants = _constants(launch.tile, vector, centred)
    with _device.current(input):
        if launch.looped:
            normalize_looped[(launch.programs,)](*arguments, **constants)
        else:
            constants |= {
                "ROWS": launch.tile.rows,
                "CHUNKS": launch.tile.chunks,
                "PACKED": launch.tile.packed,
            }
            normalize_resident[(launch.programs,)](*arguments, **constants)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; an empty tensor for one that ``output_mask`` does not ask for."""
    rows, hidden = _sizes(input, normalized_ndim)
    like = (input, input if weight is None else weight, input if bias is None else bias)
    gradients = tuple(
        torch.empty(tensor.shape if wanted else (0,), dtype=tensor.dtype, device=tensor.device)
        for tensor, wanted in zip(like, output_mask, strict=True)
    )
    grad_input, grad_weight, grad_bias = gradients
    if rows == 0 or hidden == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    if not any(output_mask):
        return grad_input, grad_weight, grad_bias
    wants_input, wants_weight, wants_bias = output_mask
    strides = (_row_stride(grad_output, normalized_ndim), _row_stride(input, normalized_ndim))
    vector = _launch.vector(hidden, *strides, aligned=_aligned(grad_output) and _aligned(input))
    processors = _device.multiprocessors(input)
    sums = int(wants_weight) + int(wants_bias)
    launch = _launch.backward(rows, hidden, input.element_size(), vector, sums, processors)
    partial = torch.empty((sums, launch.row_programs, hidden), dtype=torch.float32, device=input.device)
    partial_weight = partial[0] if wants_weight else None
    partial_bias = partial[sums - 1] if wants_bias else None
    sizes = (rows, hidden // vector, *(stride // vector for stride in strides))
    projections = None
    with _device.current(input):
        if launch.projection is not None and wants_input:
            projections = torch.empty_like(statistics)
            project_looped[(rows,)](
                *(grad_output, input, statistics, weight, projections, *sizes),
                **_constants(launch.projection, vector, centred),
            )
        differentiate[(launch.programs,)](
            *(grad_output, input, statistics, weight, projections),
            grad_input if wants_input else None,
            *(partial_weight, partial_bias, *sizes, launch.row_programs),
            **_constants(launch.tile, vector, centred),
            ROWS=launch.tile.rows,
            CHUNKS=launch.tile.chunks,
            SPLIT=launch.projection is not None,
            PREFETCH=launch.tile.prefetch,
            PACKED=launch.tile.packed,
        )
        if sums:
            total = _launch.reduce(hidden, processors)
            reduce_partials[(total.programs,)](
                *(partial_weight, partial_bias),
                grad_weight if wants_weight else None,
                grad_bias if wants_bias else None,
                *(launch.row_programs, hidden // vector),
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
