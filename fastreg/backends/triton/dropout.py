"""The dropout family in Triton: one kernel for all units, forward and backward.

The kernels are in _dropout_forward.py and _dropout_backward.py, their configurations are chosen by _dropout_launch.py.
Arithmetic is fp32 whatever the dtype of memory. A mask is a function of the seed and of positions in memory, so every
backend draws the same one, and two runs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastreg import _units
from fastreg._units import Geometry
from fastreg.backends.triton import _device, _launch
from fastreg.backends.triton import _dropout_launch as _launches
from fastreg.backends.triton._dropout_backward import sum_layer_scale
from fastreg.backends.triton._dropout_forward import drop
from fastreg.backends.triton._tiles import reduce_partials

# By the number that the operators know a dtype by (csrc/dtype.h).
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Mask:
    """What decides which units are dropped, as the operators take it."""

    seed: torch.Tensor | None
    threshold: int
    dynamic_threshold: torch.Tensor | None
    unit: int
    rescale: bool

    @property
    def arguments(self) -> tuple[torch.Tensor | None, torch.Tensor | None, int, float]:
        """As the kernels take it: seed, both thresholds, and what is kept is multiplied by; of a rate in a tensor only
        the device knows that."""
        lanes = _units.lanes(self.unit)
        scale = 1.0
        if self.rescale and self.threshold < lanes:
            scale = lanes / (lanes - self.threshold)
        return self.seed, self.dynamic_threshold, self.threshold, scale

    def geometry(self, tensor: torch.Tensor) -> Geometry:
        return Geometry(1, 1) if self.unit == _units.ELEMENT else _units.geometry(tensor, self.unit)


def dropout_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> torch.Tensor:
    """Drop units of the input, multiply what is kept, and add the residual, whose dtype the output has."""
    output = _like(input, input.dtype if residual is None else residual.dtype)
    mask = _Mask(seed, threshold, dynamic_threshold, unit, rescale)
    _drop(input, residual, row_scale, layer_scale, output, mask)
    return output


def dropout_inplace(
    input: torch.Tensor,
    seed: torch.Tensor,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> None:
    """``dropout_fwd`` of the input alone, into the input."""
    _drop(input, None, None, None, input, _Mask(seed, threshold, dynamic_threshold, unit, rescale))


def dropout_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
    input_dtype: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input and of layer_scale; an empty tensor for one that ``output_mask`` does not ask for."""
    wants_input = output_mask[0]
    dtype = _DTYPES[input_dtype]
    grad_input = _like(grad_output, dtype) if wants_input else grad_output.new_empty(0, dtype=dtype)
    mask = _Mask(seed, threshold, dynamic_threshold, unit, rescale)
    if not output_mask[1] or layer_scale is None or input is None:
        if wants_input:
            _drop(grad_output, None, row_scale, layer_scale, grad_input, mask)
        return grad_input, (grad_output if layer_scale is None else layer_scale).new_empty(0)
    grad_layer_scale = torch.empty_like(layer_scale)
    if grad_output.numel() == 0:
        return grad_input, grad_layer_scale.zero_()
    _differentiate(
        *(grad_output, input, row_scale, layer_scale, grad_input if wants_input else None, grad_layer_scale),
        mask,
    )
    return grad_input, grad_layer_scale


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor that lies in memory as ``tensor`` does."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)


def _elements_of_a_row(tensor: torch.Tensor, row_scale: torch.Tensor | None) -> int:
    """How many adjacent elements have one row's scale."""
    return 1 if row_scale is None else math.prod(tensor.shape[row_scale.dim() :])


def _drop(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    output: torch.Tensor,
    mask: _Mask,
) -> None:
    """Launch the one kernel of a forward, and of a backward that adds nothing up."""
    numel = input.numel()
    if numel == 0:
        return
    row = _elements_of_a_row(input, row_scale)
    columns = 1 if layer_scale is None else layer_scale.numel()
    lengths = [row] * (row_scale is not None) + [columns] * (layer_scale is not None)
    itemsize = max(input.element_size(), output.element_size())
    launch = _launches.elementwise(numel, itemsize, mask.unit, mask.geometry(input), *lengths)
    with _device.current(input):
        drop[(launch.programs,)](
            *(input, residual, row_scale, layer_scale, output, *mask.arguments, numel),
            *(launch.unit_length, launch.unit_columns, row // launch.run, columns // launch.run),
            UNITS=launch.units,
            RESCALE=mask.rescale,
            RUN=launch.run,
            RUNS=launch.runs,
            PARTS=launch.parts,
            SKIP=launch.skip,
            num_warps=launch.warps,
        )


def _differentiate(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor,
    grad_input: torch.Tensor | None,
    grad_layer_scale: torch.Tensor,
    mask: _Mask,
) -> None:
    """Launch the kernels of a backward with the gradient of layer_scale."""
    numel, columns = input.numel(), layer_scale.numel()
    rows, row = numel // columns, _elements_of_a_row(input, row_scale)
    itemsize = max(input.element_size(), grad_output.element_size())
    processors = _device.multiprocessors(input)
    launch = _launches.sums(rows, columns, itemsize, mask.unit, mask.geometry(input), processors)
    partial = torch.empty((launch.row_programs, columns), dtype=torch.float32, device=input.device)
    vector = _launch.vector(columns)
    total = _launch.reduce(columns, processors)
    with _device.current(input):
        sum_layer_scale[(launch.programs,)](
            *(grad_output, input, row_scale, layer_scale, grad_input, partial, *mask.arguments, numel, rows),
            *(launch.unit_length, launch.unit_columns, row // launch.run, columns // launch.run),
            launch.row_programs,
            UNITS=launch.units,
            RESCALE=mask.rescale,
            RUN=launch.run,
            ROWS=launch.rows,
            RUNS=launch.runs,
            SKIP=launch.skip,
            num_warps=launch.warps,
        )
        reduce_partials[(total.programs,)](
            *(partial, None, grad_layer_scale, None, launch.row_programs, columns // vector),
            VECTOR=vector,
            ROWS=total.rows,
            BLOCK=total.block,
            num_warps=total.warps,
        )
