"""The native backend: operator name -> the overload ``fastreg_native::<name>`` of the compiled libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastreg import _native

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {"cpu": (*_FLOATS, torch.float64), "cuda": _FLOATS}

_fakes: dict[str, Callable[..., Any]] = {}
_overloads: dict[str, Callable[..., Any]] = {}


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot serve this device and dtype, with the remedy; None where they can."""
    if device_type not in _DTYPES:
        return f"the native backend serves cpu and cuda tensors, not {device_type}"
    if not _native.loaded(device_type):
        return _native.reason(device_type)
    if dtype not in _DTYPES[device_type]:
        return f"the native {device_type} kernels do not serve {dtype}; the reference backend does"
    return None


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Remember the fake of ``fastreg_native::<name>``; it is registered when the library is first used."""
    _fakes[name] = fake


def overload(name: str) -> Callable[..., Any]:
    """The cached callable of ``fastreg_native::<name>``; the library must be loaded (``unavailable`` loads it).

    It is what an OpOverload calls, without the OpOverload's own Python frame around it (0.2 us a call).
    """
    found = _overloads.get(name)
    if found is None:
        torch.library.register_fake(f"fastreg_native::{name}", _fakes[name])
        found = _overloads[name] = getattr(torch.ops.fastreg_native, name).default._op
    return found
