"""Launches of the batch norm kernels: sizes and strides as the kernels take them, and the tensors they fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastreg._activations import IDENTITY, RELU, needs_sign_only
from fastreg._channels import ChannelView, channel_view, empty_dense, sign_bytes
from fastreg.backends.triton import _batch_norm_launch as _launches
from fastreg.backends.triton import _device, _launch
from fastreg.backends.triton._batch_norm_backward import differentiate_channels, differentiate_slab
from fastreg.backends.triton._batch_norm_forward import normalize_channels, normalize_slab
from fastreg.backends.triton._batch_norm_moments import merge_moments, moments
from fastreg.backends.triton._batch_norm_sums import merge_sums, sum_gradients

Vector = torch.Tensor | None


def batch_statistics(
    view: ChannelView,
    input: torch.Tensor,
    running: Sequence[Vector],
    momentum: float,
    eps: float,
    skip_nonfinite: bool,
    *,
    rstd: bool,
) -> torch.Tensor:
    """Mean and rstd (or sum of squared deviations) of the batch, (2, C); moves the running statistics."""
    launch = _launches.reduction(view, input.element_size(), 1, _device.multiprocessors(input))
    merge = _launches.merge(view.channels, launch.parts)
    statistics = pairs(view, input)
    partial = torch.empty((2, launch.parts, view.channels), dtype=torch.float32, device=input.device)
    vector, strides = vector_of(view, input)
    sizes = (*_sizes(view, vector, per_channel=True), launch.blocks, launch.part)
    constants = _constants(launch, view, vector)
    with _device.current(input):
        moments[(launch.programs,)](input, *partial, *sizes, *strides, None, None, **constants)
        del constants["EVEN"]
        merge_moments[(merge.programs,)](
            *(*partial, statistics, None, *running, *sizes, launch.parts, None, float(momentum), float(eps)),
            **{**constants, "num_warps": merge.warps},
            PARTS=merge.parts,
            CHANNELS=merge.channels,
            RSTD=rstd,
            SKIP=skip_nonfinite,
        )
    return statistics


def normalize_on_chip(
    view: ChannelView,
    slab: _launches.Slab,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: Vector,
    bias: Vector,
    running: Sequence[Vector],
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    skip_nonfinite: bool,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, statistics and signs, reading once; moves the running statistics."""
    output, statistics = empty_dense(input, view.rows), pairs(view, input)
    signs = signs_of(view, input, _keeps(keep_signs, residual, activation))
    vector, strides = vector_of(view, input, residual)
    with _device.current(input):
        normalize_slab[(slab.programs,)](
            *(input, residual, weight, bias, *running, statistics, output),
            signs if signs.numel() else None,
            *_sizes(view, vector, per_channel=True),
            *(strides[0], strides[1] if residual is not None else 0),
            *(float(momentum), float(eps), float(negative_slope)),
            **_constants(slab, view, vector),
            CHUNKS=slab.chunks,
            ACTIVATION=activation,
            SKIP=skip_nonfinite,
            PACKED=slab.packed,
        )
    return output, statistics, signs


def normalize(
    view: ChannelView,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    parameters: Sequence[Vector],
    eps: float,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and signs; ``parameters``: weight, bias, running mean and variance (or None), statistics."""
    output = empty_dense(input, view.rows)
    if input.numel() == 0:
        return output, signs_of(view, input, False)
    signs = signs_of(view, input, _keeps(keep_signs, residual, activation))
    launch = _launches.elementwise(view, input.element_size(), 2 if residual is None else 3)
    vector, strides = vector_of(view, input, residual)
    with _device.current(input):
        normalize_channels[(launch.programs,)](
            *(input, residual, *parameters, output, signs if signs.numel() else None),
            *(*_sizes(view, vector), launch.blocks),
            *(strides[0], strides[1] if residual is not None else 0),
            *(float(eps), float(negative_slope)),
            **_constants(launch, view, vector),
            ACTIVATION=activation,
        )
    return output, signs


def sum_up(
    view: ChannelView,
    tensors: Sequence[torch.Tensor | None],
    parameters: Sequence[Vector],
    results: Sequence[Vector],
    written: Sequence[torch.Tensor | None],
    activation: int,
    negative_slope: float,
) -> None:
    """Fill ``results``: sums, grad_weight, grad_bias; and, on the way, ``written``: grad_input, grad_residual."""
    grad_output, input, residual, _ = tensors
    assert grad_output is not None
    assert input is not None
    sums, grad_weight, grad_bias = results
    loaded = 2 if residual is None else 3
    launch = _launches.reduction(view, input.element_size(), loaded, _device.multiprocessors(input))
    merge = _launches.merge(view.channels, launch.parts)
    shape = (launch.parts, view.channels)
    partial_sum = partial_product = None
    if sums is not None or grad_bias is not None:
        partial_sum = torch.empty(shape, dtype=torch.float32, device=input.device)
    if sums is not None or grad_weight is not None:
        partial_product = torch.empty(shape, dtype=torch.float32, device=input.device)
    vector, strides = vector_of(view, grad_output, input, residual)
    with _device.current(input):
        sum_gradients[(launch.programs,)](
            *(*tensors, *parameters, partial_sum, partial_product, *written),
            *(*_sizes(view, vector, per_channel=True), launch.blocks, launch.part),
            *(strides[0], strides[1], strides[2] if residual is not None else 0, float(negative_slope)),
            **_constants(launch, view, vector),
            ACTIVATION=activation,
        )
        merge_sums[(merge.programs,)](
            *(partial_sum, partial_product, sums, grad_weight, grad_bias, view.channels, launch.parts),
            PARTS=merge.parts,
            CHANNELS=merge.channels,
            num_warps=merge.warps,
        )


def differentiate(
    view: ChannelView,
    tensors: Sequence[torch.Tensor | None],
    parameters: Sequence[Vector],
    sums: torch.Tensor | None,
    count: int,
    gradients: Sequence[torch.Tensor | None],
    activation: int,
    negative_slope: float,
) -> None:
    """Fill ``gradients``: grad_input, grad_residual."""
    grad_output, input, residual, _ = tensors
    assert grad_output is not None
    assert input is not None
    launch = _launches.elementwise(view, input.element_size(), 3)
    vector, strides = vector_of(view, grad_output, input, residual)
    with _device.current(input):
        differentiate_channels[(launch.programs,)](
            *(*tensors, *parameters, sums, *gradients),
            *(*_sizes(view, vector), launch.blocks),
            *(strides[0], strides[1], strides[2] if residual is not None else 0),
            *(float(count), float(negative_slope)),
            **_constants(launch, view, vector),
            ACTIVATION=activation,
        )


def differentiate_on_chip(
    view: ChannelView,
    slab: _launches.Slab,
    tensors: Sequence[torch.Tensor | None],
    parameters: Sequence[Vector],
    gradients: Sequence[torch.Tensor | None],
    activation: int,
    negative_slope: float,
) -> None:
    """Fill ``gradients``, all four, reading once."""
    grad_output, input, residual, _ = tensors
    assert grad_output is not None
    assert input is not None
    vector, strides = vector_of(view, grad_output, input, residual)
    with _device.current(input):
        differentiate_slab[(slab.programs,)](
            *(*tensors, *parameters, *gradients),
            *_sizes(view, vector, per_channel=True),
            *(strides[0], strides[1], strides[2] if residual is not None else 0, float(negative_slope)),
            **_constants(slab, view, vector),
            CHUNKS=slab.chunks,
            ACTIVATION=activation,
            EXACT=exact(input, activation),
        )


# --- sizes -----------------------------------------------------------------------------------------------------------


def view_of(input: torch.Tensor) -> ChannelView:
    view = channel_view(input)
    if view is None:
        raise _irregular("input")
    return view


def _irregular(name: str) -> ValueError:
    return ValueError(
        f"{name} is neither planes of adjacent elements nor rows of adjacent channels, or is not what the "
        "input is; call .contiguous() on it first"
    )


def vector_of(
    view: ChannelView, *tensors: torch.Tensor | None, run: int | None = None
) -> tuple[int, list[int]]:
    """The unit of sizes, which all tensors align to, and the outer strides in it.

    ``run``: how many adjacent elements a kernel takes as a line, where it is not those of a plane or row.
    """
    strides = []
    aligned = True
    for tensor in tensors:
        if tensor is None:
            continue
        seen = channel_view(tensor, view.rows)
        if seen is None:
            raise _irregular("residual or grad_output")
        strides.append(seen.outer_stride)
        aligned = aligned and tensor.data_ptr() % _launch.VECTOR_BYTES == 0
    vector = _launch.vector(view.line_elements if run is None else run, *strides, aligned=aligned)
    return vector, [stride // vector for stride in strides]


def _sizes(view: ChannelView, vector: int, *, per_channel: bool = False) -> tuple[int, int, int]:
    """Lines (of one channel's planes, if ``per_channel``), vectors of a line, and channels."""
    lines = view.samples if per_channel and not view.rows else view.lines
    return lines, view.line_elements // vector, view.channels


def _constants(
    launch: _launches.Elementwise | _launches.Reduction | _launches.Slab, view: ChannelView, vector: int
) -> dict[str, Any]:
    """What every kernel that walks over tiles is compiled for."""
    return {
        "VECTOR": vector,
        "ROWS": launch.rows,
        "BLOCK": launch.block,
        "EVEN": launch.even,
        "CHANNELS_LAST": view.rows,
        "num_warps": launch.warps,
    }


# --- tensors ---------------------------------------------------------------------------------------------------------


def pairs(view: ChannelView, input: torch.Tensor, value: float | None = None) -> torch.Tensor:
    """Two fp32 numbers a channel."""
    shape = (2, view.channels)
    if value is None:
        return torch.empty(shape, dtype=torch.float32, device=input.device)
    return torch.full(shape, value, dtype=torch.float32, device=input.device)


def _keeps(keep_signs: bool, residual: torch.Tensor | None, activation: int) -> bool:
    return keep_signs and residual is not None and needs_sign_only(activation)


def signs_of(view: ChannelView, input: torch.Tensor, kept: bool) -> torch.Tensor:
    return torch.empty(sign_bytes(view) if kept else 0, dtype=torch.uint8, device=input.device)


def like(parameter: Vector, input: torch.Tensor, wanted: bool) -> torch.Tensor:
    """An uninitialised gradient of a parameter, empty where it is not wanted."""
    if parameter is None or not wanted:
        return (input if parameter is None else parameter).new_empty(0)
    return torch.empty_like(parameter)


def exact(input: torch.Tensor, activation: int) -> bool:
    """Whether dz, rounded to the input's dtype, is dz: the gradient or 0, or computed in that very dtype."""
    return input.dtype == torch.float32 or activation in (IDENTITY, RELU)
