"""The launch plans of csrc/cuda/layer_norm_plan.h, as they are computed there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from cuda_sim.backend import Device, loaded_library


@dataclass(frozen=True)
class Problem:
    rows: int
    columns: int
    element_size: int = 2
    centred: bool = True
    wide: bool = True


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


def _fields(name: str, count: int, problem: Problem, device: Device) -> list[int]:
    function = getattr(loaded_library(), name)
    function.argtypes = [
        *[ctypes.c_int] * 2,
        ctypes.c_int64,
        *[ctypes.c_int] * 2,
        *[ctypes.c_bool] * 2,
        ctypes.POINTER(ctypes.c_int64),
    ]
    function.restype = None
    values = (ctypes.c_int64 * count)()
    function(
        device.architecture,
        device.multiprocessors,
        problem.rows,
        problem.columns,
        problem.element_size,
        problem.centred,
        problem.wide,
        values,
    )
    return list(values)


def forward_plan(problem: Problem, device: Device) -> ForwardPlan:
    return ForwardPlan(*_fields("cuda_sim_forward_plan", 8, problem, device))


def backward_plan(problem: Problem, device: Device) -> BackwardPlan:
    return BackwardPlan(*_fields("cuda_sim_backward_plan", 9, problem, device))
