"""The dropout family in plain PyTorch: one function for all units, with what may be added and multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastreg import _units
from fastreg.backends.reference import _philox
from fastreg.backends.reference._views import laid_out_like, wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""By the number that the operators know a dtype by (csrc/dtype.h)."""


def keep(
    tensor: torch.Tensor,
    seed: torch.Tensor,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
) -> torch.Tensor:
    """Which elements of a dense tensor are kept, as booleans that meet its shape."""
    limit = threshold if dynamic_threshold is None else dynamic_threshold.reshape(())
    if unit == _units.ELEMENT:
        # The index of an element is its position in memory.
        kept = _philox.half_lanes(seed, tensor.numel()) >= limit
        if tensor.is_contiguous():
            return kept.reshape(tensor.shape)
        order = _units.dense_order(tensor.shape, tensor.stride())
        if order is None:
            raise RuntimeError(f"dropout's operators take dense tensors, not strides {tensor.stride()}")
        permuted = kept.reshape([tensor.shape[dimension] for dimension in order])
        return permuted.permute([order.index(dimension) for dimension in range(tensor.dim())])
    leading = {_units.CHANNEL: 2, _units.SAMPLE: 1, _units.BATCH: 0}[unit]
    shape = (*tensor.shape[:leading], *(1,) * (tensor.dim() - leading))
    return (_philox.lanes(seed, math.prod(shape)) >= limit).reshape(shape)


def keep_scale(threshold: int, dynamic_threshold: torch.Tensor | None, unit: int) -> float | torch.Tensor:
    """What is kept is multiplied by this; 0 where nothing is kept."""
    total = _units.lanes(unit)
    if dynamic_threshold is None:
        return total / (total - threshold) if threshold < total else 0.0
    kept = (total - dynamic_threshold.reshape(())).double()
    return torch.where(kept > 0, total / kept.clamp(min=1), 0.0)


def scaled(
    tensor: torch.Tensor,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> torch.Tensor:
    """``tensor`` dropped and multiplied, in the dtype of computation."""
    value = wide(tensor)
    if row_scale is not None:
        value = value * along_rows(row_scale, tensor)
    if layer_scale is not None:
        value = value * layer_scale.to(value.dtype)
    if seed is None:
        return value
    if rescale:
        scale = keep_scale(threshold, dynamic_threshold, unit)
        value = value * (scale.to(value.dtype) if isinstance(scale, torch.Tensor) else scale)
    return torch.where(keep(tensor, seed, threshold, dynamic_threshold, unit), value, 0.0)


def along_rows(row_scale: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A scale of the leading dimensions, shaped to meet ``tensor``, in the dtype of computation."""
    return wide(row_scale).reshape(*row_scale.shape, *(1,) * (tensor.dim() - row_scale.dim()))


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
    output = scaled(input, row_scale, layer_scale, seed, threshold, dynamic_threshold, unit, rescale)
    if residual is not None:
        return laid_out_like((output + wide(residual)).to(residual.dtype), input)
    return laid_out_like(output.to(input.dtype), input)


def dropout_inplace(
    input: torch.Tensor,
    seed: torch.Tensor,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> None:
    """``dropout_fwd`` of the input alone, into the input."""
    input.copy_(dropout_fwd(input, None, None, None, seed, threshold, dynamic_threshold, unit, rescale))


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
    grad_input = grad_output.new_empty(0, dtype=DTYPES[input_dtype])
    grad_layer_scale = (grad_output if layer_scale is None else layer_scale).new_empty(0)
    arguments = (seed, threshold, dynamic_threshold, unit, rescale)
    if output_mask[0]:
        grad_input = scaled(grad_output, row_scale, layer_scale, *arguments).to(DTYPES[input_dtype])
        grad_input = laid_out_like(grad_input, grad_output)
    if output_mask[1] and layer_scale is not None and input is not None:
        terms = scaled(wide(grad_output) * wide(input), row_scale, None, *arguments)
        rows = terms.reshape(terms.shape[:-1].numel(), layer_scale.numel())
        grad_layer_scale = rows.sum(dim=0).to(layer_scale.dtype)
    return grad_input, grad_layer_scale
