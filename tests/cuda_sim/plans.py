"""The launch plans of csrc/cuda/*_plan.h, as they are computed there."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import astuple, dataclass, fields
from typing import Any

from cuda_sim.backend import Device, loaded_library


@dataclass(frozen=True)
class Problem:
    rows: int
    columns: int
    element_size: int = 2
    centred: bool = True
    wide: bool = True
    fused: bool = False  # with dropout + residual
    third_sums: bool = False  # of these, backward: with layer_scale's gradient


@dataclass(frozen=True)
class ForwardPlan:
    looped: int
    width: int
    packs: int
    rows: int
    threads_per_row: int
    threads: int
    cluster: int
    blocks: int


@dataclass(frozen=True)
class BackwardPlan:
    kind: int  # 0: sums in registers, 1: in shared memory, 2: looped
    width: int
    packs: int
    threads_per_row: int
    threads: int
    cluster: int
    blocks: int
    shared_bytes: int
    partials: int


@dataclass(frozen=True)
class ChannelProblem:
    """What a streaming kernel of batch norm is planned for."""

    samples: int
    channels: int
    spatial: int
    element_size: int = 2
    rows: bool = False
    wide: bool = True
    backward: bool = False
    whole_bytes: bool = False  # sign bits are stored


@dataclass(frozen=True)
class StreamPlan:
    threads: int
    lanes: int
    line_packs: int
    across: int
    items: int
    parts: int
    share: int
    blocks: int


@dataclass(frozen=True)
class ResidentProblem:
    """What batch norm with its slabs on chip is planned for."""

    samples: int
    channels: int
    spatial: int
    element_size: int = 2
    rows: bool = False
    tensors: int = 1  # held on chip
    signs: bool = False
    regular: bool = True
    grain: int = 16


@dataclass(frozen=True)
class ResidentPlan:
    kind: int  # 0: none, 1: a block a slab, 2: a cluster, 3: blocks that run at once
    slab_blocks: int
    threads: int
    groups: int
    slabs: int
    columns: int
    share: int
    shared_bytes: int

    @property
    def blocks(self) -> int:
        return self.groups * self.slab_blocks


@dataclass(frozen=True)
class GroupProblem:
    """What group norm is planned for."""

    samples: int
    channels: int
    spatial: int
    groups: int
    element_size: int = 2
    rows: bool = False
    tensors: int = 1  # held on chip
    regular: bool = True
    grain: int = 16


@dataclass(frozen=True)
class GroupPlan:
    kind: int  # as in ResidentPlan; 0: three passes forward, five backward
    slab_blocks: int
    threads: int
    groups: int
    slabs: int
    columns: int
    share: int
    shared_bytes: int
    slab_threads: int
    lanes: int
    run: int
    whole: int
    aligned: int
    twice: int
    workspace_bytes: int
    slots: int

    @property
    def blocks(self) -> int:
        return self.groups * self.slab_blocks


@dataclass(frozen=True)
class Pieces:
    """Where the sums of a group's channel are: ``count`` slots from ``first`` on, ``step`` apart."""

    first: int
    count: int
    step: int


@dataclass(frozen=True)
class DropoutColumnsProblem:
    """What the sums for layer_scale's gradient are planned for."""

    rows: int
    columns: int
    width: int


@dataclass(frozen=True)
class DropoutColumnsPlan:
    lanes: int
    down: int
    strips: int
    share: int
    parts: int


_TYPES = {bool: ctypes.c_bool, int: ctypes.c_int64}
# Of the fields that are no 64-bit numbers.
_SHORT = {"element_size", "tensors", "grain"}


def _fields(
    name: str, count: int, problem: Any, device: Device, short: Collection[str] = _SHORT
) -> list[int]:
    function = getattr(loaded_library(), name)
    types = [
        ctypes.c_int if each.name in short else _TYPES[type(getattr(problem, each.name))]
        for each in fields(problem)
    ]
    function.argtypes = [*[ctypes.c_int] * 2, *types, ctypes.POINTER(ctypes.c_int64)]
    function.restype = None
    values = (ctypes.c_int64 * count)()
    function(device.architecture, device.multiprocessors, *astuple(problem), values)
    return list(values)


def forward_plan(problem: Problem, device: Device) -> ForwardPlan:
    short = {"columns", "element_size"}
    return ForwardPlan(*_fields("cuda_sim_forward_plan", 8, problem, device, short))


def backward_plan(problem: Problem, device: Device) -> BackwardPlan:
    short = {"columns", "element_size"}
    return BackwardPlan(*_fields("cuda_sim_backward_plan", 9, problem, device, short))


def stream_plan(problem: ChannelProblem, device: Device) -> StreamPlan:
    return StreamPlan(*_fields("cuda_sim_stream_plan", 8, problem, device))


def resident_plan(problem: ResidentProblem, device: Device) -> ResidentPlan:
    return ResidentPlan(*_fields("cuda_sim_resident_plan", 8, problem, device))


def group_plan(problem: GroupProblem, device: Device) -> GroupPlan:
    return GroupPlan(*_fields("cuda_sim_group_plan", 16, problem, device))


def group_pieces(problem: GroupProblem, device: Device) -> list[Pieces]:
    """Of each channel of a group that stays on chip."""
    channels = problem.channels // problem.groups
    values = _fields("cuda_sim_group_pieces", 3 * channels, problem, device)
    return [Pieces(*values[3 * channel : 3 * channel + 3]) for channel in range(channels)]


def dropout_columns_plan(problem: DropoutColumnsProblem, device: Device) -> DropoutColumnsPlan:
    return DropoutColumnsPlan(*_fields("cuda_sim_dropout_columns_plan", 5, problem, device, {"width"}))


def quotient(position: int, value: int) -> int:
    """The kernels' division of a position by one of a tensor's extents."""
    function = loaded_library().cuda_sim_quotient
    function.argtypes, function.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    found: int = function(position, value)
    return found
