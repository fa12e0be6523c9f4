"""The device side of a launch: its multiprocessors, and making it the current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from fastreg.backends.triton._launch import INTERPRETER_MULTIPROCESSORS


@cache
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the device that kernels on ``tensor`` run on; a CPU tensor is served by the interpreter."""
    if tensor.device.type == "cpu":
        return INTERPRETER_MULTIPROCESSORS
    return _cuda_multiprocessors(tensor.device.index)


def current(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches on the current one, whatever its arguments."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device.index)
