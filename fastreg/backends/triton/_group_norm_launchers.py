"""Launches of the group norm kernels: sizes and strides as the kernels take them, and the tensors they fill.

Statistics are found and merged by the kernels of batch norm, for which a group is a channel of one plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastreg._channels import ChannelView, empty_dense
from fastreg.backends.triton import _batch_norm_launch as _channels
from fastreg.backends.triton import _device
from fastreg.backends.triton import _group_norm_launch as _launches
from fastreg.backends.triton._batch_norm_launchers import Vector, exact, vector_of
from fastreg.backends.triton._batch_norm_moments import merge_moments, moments
from fastreg.backends.triton._batch_norm_sums import merge_sums
from fastreg.backends.triton._group_norm_backward import differentiate_group_slab, differentiate_groups
from fastreg.backends.triton._group_norm_forward import normalize_group_slab, normalize_groups
from fastreg.backends.triton._group_norm_sums import merge_group_sums, sum_group_gradients


def pairs(input: torch.Tensor, groups: int) -> torch.Tensor:
    """Two fp32 numbers a group of each sample."""
    return torch.empty((2, input.shape[0], groups), dtype=torch.float32, device=input.device)


def slab_of(
    choose: Callable[..., _launches.Slab | None], view: ChannelView, groups: int, *tensors: torch.Tensor
) -> _launches.Slab | None:
    """The slab of a call, if any, by forward_slab or backward_slab of _group_norm_launch.py."""
    vector, _ = vector_of(view, *tensors, run=_launches.run_of(view, groups))
    input = tensors[-1]
    return choose(view, groups, input.element_size(), vector, _device.multiprocessors(input))


# --- forward ---------------------------------------------------------------------------------------------------------


def find_statistics(
    view: ChannelView, input: torch.Tensor, groups: int, eps: float, squares: Vector
) -> torch.Tensor:
    """Mean and rstd of every group; ``squares``, if given, gets the sums of squared deviations."""
    found = _launches.moments(view, groups, input.element_size(), _device.multiprocessors(input))
    launch, seen = found.launch, found.view
    width = None
    merge = _channels.merge(view.samples * groups, launch.parts)
    if seen.rows:
        width = view.channels // groups
        merge = _launches.merge(view.samples * groups, launch.parts * width)
    statistics = pairs(input, groups)
    shape = (2, launch.parts, view.samples, seen.channels)
    partial = torch.empty(shape, dtype=torch.float32, device=input.device)
    vector, (stride,) = vector_of(view, input, run=seen.line_elements)
    samples_apart = stride * view.spatial if view.rows else stride
    lines = (seen.spatial if seen.rows else seen.samples, seen.line_elements // vector)
    constants = {"VECTOR": vector, "ROWS": launch.rows, "BLOCK": launch.block, "CHANNELS_LAST": seen.rows}
    with _device.current(input):
        moments[(found.programs,)](
            *(input, *partial, *lines, seen.channels, launch.blocks, launch.part, stride),
            *(view.samples, samples_apart),
            **constants,
            EVEN=launch.even,
            num_warps=launch.warps,
        )
        merge_moments[(merge.programs,)](
            *(*partial, statistics, squares, None, None, *lines, view.samples * groups),
            *(launch.blocks, launch.part, launch.parts, width, 0.0, float(eps)),
            **constants,
            PARTS=merge.parts,
            CHANNELS=merge.channels,
            RSTD=True,
            SKIP=False,
            num_warps=merge.warps,
        )
    return statistics


def normalize(
    view: ChannelView,
    input: torch.Tensor,
    groups: int,
    weight: Vector,
    bias: Vector,
    statistics: torch.Tensor,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """The output from statistics."""
    output = empty_dense(input, view.rows)
    vector, strides = vector_of(view, input)
    launch = _launches.elementwise(view, input.element_size(), vector, 2)
    with _device.current(input):
        normalize_groups[_programs(view, launch.programs)](
            *(input, weight, bias, statistics, output),
            *(*_sizes(view, groups, vector), launch.blocks, launch.programs // launch.blocks, *strides),
            float(negative_slope),
            **_constants(launch, view, vector),
            ACTIVATION=activation,
        )
    return output


def normalize_on_chip(
    view: ChannelView,
    slab: _launches.Slab,
    input: torch.Tensor,
    groups: int,
    weight: Vector,
    bias: Vector,
    eps: float,
    squares: Vector,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and statistics, reading once; ``squares``, if given, gets the sums of squared deviations."""
    output, statistics = empty_dense(input, view.rows), pairs(input, groups)
    sizes, strides, constants = _of_slab(view, slab, groups, input)
    with _device.current(input):
        normalize_group_slab[(slab.programs,)](
            *(input, weight, bias, statistics, squares, output, *sizes, *strides),
            *(float(eps), float(negative_slope)),
            **constants,
            ACTIVATION=activation,
            PACKED=slab.packed,
        )
    return output, statistics


# --- backward --------------------------------------------------------------------------------------------------------


def sum_up(
    view: ChannelView,
    tensors: Sequence[torch.Tensor],
    groups: int,
    parameters: Sequence[Vector],
    wanted: Sequence[bool],
    activation: int,
    negative_slope: float,
) -> list[Vector]:
    """The sums of dz and of dz times the normalised input, (parts, N, C); None for one that is not ``wanted``."""
    input = tensors[1]
    launch = _launches.sums(view, input.element_size(), _device.multiprocessors(input))
    partial = _partial(view, launch.parts * view.samples, input, wanted)
    vector, strides = vector_of(view, *tensors)
    with _device.current(input):
        sum_group_gradients[_programs(view, launch.programs)](
            *(*tensors, *parameters, *partial, *_sizes(view, groups, vector)),
            *(launch.strips if view.rows else launch.blocks, launch.part, *strides, float(negative_slope)),
            **_constants(launch, view, vector),
            ACTIVATION=activation,
        )
    return partial


def reduce_sums(view: ChannelView, partial: Sequence[Vector], grad_weight: Vector, grad_bias: Vector) -> None:
    """Fill the gradients of weight and bias, where not None, with the sums of the partial ones."""
    sums, products = (
        (None if grad_bias is None else partial[0]),
        (None if grad_weight is None else partial[1]),
    )
    some = products if sums is None else sums
    assert some is not None
    merge = _channels.merge(view.channels, some.shape[0])
    with _device.current(some):
        merge_sums[(merge.programs,)](
            *(sums, products, None, grad_weight, grad_bias, view.channels, some.shape[0]),
            PARTS=merge.parts,
            CHANNELS=merge.channels,
            num_warps=merge.warps,
        )


def differentiate(
    view: ChannelView,
    tensors: Sequence[torch.Tensor],
    groups: int,
    parameters: Sequence[Vector],
    partial: Sequence[Vector],
    grad_input: torch.Tensor,
    activation: int,
    negative_slope: float,
) -> None:
    """Fill ``grad_input`` from the sums over the channels of every sample."""
    input = tensors[1]
    means = pairs(input, groups)
    sums, products = partial
    assert sums is not None
    parts, width = sums.shape[0] // view.samples, view.channels // groups
    merge = _launches.merge(view.samples * groups, parts * width)
    vector, strides = vector_of(view, *tensors)
    launch = _launches.elementwise(view, input.element_size(), vector, 3)
    with _device.current(input):
        merge_group_sums[(merge.programs,)](
            *(sums, products, parameters[1], means, view.samples, groups, width, parts),
            float(width * view.spatial),
            PARTS=merge.parts,
            GROUPS=merge.channels,
            num_warps=merge.warps,
        )
        differentiate_groups[_programs(view, launch.programs)](
            *(*tensors, *parameters, means, grad_input, *_sizes(view, groups, vector)),
            *(launch.blocks, launch.programs // launch.blocks, *strides, float(negative_slope)),
            **_constants(launch, view, vector),
            ACTIVATION=activation,
        )


def differentiate_on_chip(
    view: ChannelView,
    slab: _launches.Slab,
    tensors: Sequence[torch.Tensor],
    groups: int,
    parameters: Sequence[Vector],
    grad_input: torch.Tensor,
    wanted: Sequence[bool],
    activation: int,
    negative_slope: float,
) -> list[Vector]:
    """Fill ``grad_input``, reading once; the sums that ``sum_up`` gives, of some samples together."""
    input = tensors[1]
    partial = _partial(view, slab.sample_blocks, input, wanted)
    sizes, strides, constants = _of_slab(view, slab, groups, *tensors)
    with _device.current(input):
        differentiate_group_slab[(slab.programs,)](
            *(*tensors, *parameters, grad_input, *partial, *sizes, *strides, float(negative_slope)),
            **constants,
            ACTIVATION=activation,
            EXACT=exact(input, activation),
        )
    return partial


# --- sizes and tensors -----------------------------------------------------------------------------------------------


def _partial(view: ChannelView, rows: int, input: torch.Tensor, wanted: Sequence[bool]) -> list[Vector]:
    """A row of fp32 sums for each channel, for those of dz and of dz times the normalised input."""
    shape = (rows, view.channels)
    return [torch.empty(shape, dtype=torch.float32, device=input.device) if each else None for each in wanted]


def _programs(view: ChannelView, programs: int) -> tuple[int]:
    """The programs of all samples, of rows from those of one."""
    return (programs * view.samples if view.rows else programs,)


def _sizes(view: ChannelView, groups: int, vector: int) -> tuple[int, ...]:
    """Samples, groups and their width, and lines: pixels of a sample, or the planes of all samples; their vectors."""
    lines = view.spatial if view.rows else view.lines
    return view.samples, groups, view.channels // groups, lines, view.line_elements // vector


def _of_slab(
    view: ChannelView, slab: _launches.Slab, groups: int, *tensors: torch.Tensor
) -> tuple[tuple[int, ...], list[int], dict[str, Any]]:
    """Sizes, strides and constants of a slab's launch."""
    width = view.channels // groups
    padded = view.rows and slab.width != width
    vector, strides = vector_of(view, *tensors, run=_launches.run_of(view, groups))
    lines = view.spatial if view.rows else width
    constants = {
        "VECTOR": vector,
        "SAMPLES": slab.samples,
        "LINES": slab.lines,
        "BLOCK": slab.block,
        "WIDTH": slab.width,
        "CHUNKS": slab.chunks,
        "EVEN": slab.even,
        "PADDED": padded,
        "CHANNELS_LAST": view.rows,
        "num_warps": slab.warps,
    }
    sizes = (view.samples, groups, lines, view.line_elements // vector, width // vector if padded else 0)
    return sizes, strides, constants


def _constants(
    launch: _channels.Elementwise | _channels.Reduction, view: ChannelView, vector: int
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
