"""Which backend serves a call, and why.

The order of precedence is: an explicit ``use(...)``, then the environment variable ``FASTREG_BACKEND`` (read once, at
import), then the preference for the tensor's device among the backends that support it. A backend that was asked for by
name and cannot serve a call raises ``BackendUnavailable``; an automatic choice never hides an exception of the backend
it chose.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

NAMES = ("native", "triton", "reference")

# On the CPU the C++ kernels win on every shape of the committed results. Where a CUDA architecture has no results for
# an op under bench/results/, Triton comes first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("triton", "native", "reference"),
}


# By compute capability, for ops that have results there. On an H100 the kernels of both backends take the same time,
# but the host takes several times as long to launch Triton's, which is what small tensors wait for.
MEASURED: dict[tuple[int, int], dict[str, tuple[str, ...]]] = {
    (9, 0): dict.fromkeys(("group_norm", "instance_norm"), ("native", "triton", "reference")),
}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in _names():
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(_names())}")
    return name


_extra: dict[str, Callable[[str, str], Any]] = {}


def _names() -> tuple[str, ...]:
    return NAMES + tuple(_extra)


_requested: str | None = _checked(os.environ.get("FASTREG_BACKEND") or None, "FASTREG_BACKEND")
_choices: dict[tuple[str | None, str, torch.device, torch.dtype], str] = {}


class use:  # noqa: N801 - reads as a verb: backends.use("triton"), with backends.use("triton"): ...
    """Ask for one backend by name from now on, or inside a ``with`` block; ``use(None)`` returns to automatic choice.

    The request holds for the whole process, not for one thread, since autograd runs backward in threads of its own; a
    backward runs on the backend that was asked for when its forward ran.

    Raises:
        ValueError: the name is not that of a backend.
    """

    def __init__(self, name: str | None) -> None:
        self._previous = _requested
        _set_requested(_checked(name, "fastreg.backends.use"))

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        _set_requested(self._previous)


def _set_requested(name: str | None) -> None:
    global _requested
    _requested = name


def requested() -> str | None:
    """The backend asked for by ``use`` or ``FASTREG_BACKEND``, or None."""
    return _requested


def register(name: str, load: Callable[[str, str], Any]) -> None:
    """Add a backend that is reached by name only, never chosen automatically.

    Args:
        name: what ``use`` will accept.
        load: called with (op, operator name), returns the implementation; it may raise ``BackendUnavailable``.
    """
    if name in NAMES:
        raise ValueError(f"{name!r} is a built-in backend and cannot be replaced")
    _extra[name] = load


def unavailable(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot serve ``op`` for this device and dtype, with the remedy; None where it can."""
    if name in _extra:
        return None if device_type == "cpu" else f"{name} serves CPU tensors only"
    if not _has_op(name, op):
        return f"the {name} backend does not implement {op}"
    if name == "reference":
        return None
    module = importlib.import_module(f"fastreg.backends.{name}")
    reason: str | None = module.unavailable(device_type, dtype)
    return reason


@cache
def _has_op(name: str, op: str) -> bool:
    return name == "native" or importlib.util.find_spec(f"fastreg.backends.{name}.{op}") is not None


def pick(op: str, tensor: torch.Tensor) -> str:
    """The name of the backend that serves ``op`` for this tensor.

    Raises:
        BackendUnavailable: a backend was asked for by name and cannot serve the call.
    """
    key = (_requested, op, tensor.device, tensor.dtype)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _decide(_requested, op, tensor.device.type, tensor.dtype)
    return choice


def _decide(request: str | None, op: str, device_type: str, dtype: torch.dtype) -> str:
    if dtype == torch.int64:
        # A seed: what masks are made for has no dtype.
        dtype = torch.float32
    if request is None:
        # The reference ends every list, so there is always one.
        order = preference(op, device_type)
        return next(name for name in order if unavailable(name, op, device_type, dtype) is None)
    reason = unavailable(request, op, device_type, dtype)
    if reason is not None:
        raise BackendUnavailable(
            f"the {request} backend was asked for and cannot serve {op} on {device_type} {dtype}: {reason}"
        )
    return request


def preference(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that an automatic choice goes through, best first; on CUDA by the current device's architecture."""
    if device_type == "cuda" and torch.cuda.is_available():
        measured = MEASURED.get(torch.cuda.get_device_capability(), {})
        if op in measured:
            return measured[op]
    return PREFERENCE.get(device_type, ("reference",))


@cache
def implementation(name: str, op: str, operator: str) -> Callable[..., Any]:
    """The function that implements ``operator`` ("layer_norm_fwd") in backend ``name``."""
    if name in _extra:
        found: Callable[..., Any] = _extra[name](op, operator)
        return found
    if name == "native":
        native = importlib.import_module("fastreg.backends.native")
        found = native.overload(operator)
        return found
    found = getattr(importlib.import_module(f"fastreg.backends.{name}.{op}"), operator)
    return found


def available(
    device_type: str = "cpu", dtype: torch.dtype = torch.float32, op: str = "layer_norm"
) -> tuple[str, ...]:
    """The names of the backends that can serve ``op`` for this device and dtype, best first."""
    order = preference(op, device_type)
    order += tuple(name for name in NAMES if name not in order)
    return tuple(name for name in order if unavailable(name, op, device_type, dtype) is None)


def explain(
    op: str = "layer_norm",
    tensor: torch.Tensor | None = None,
    *,
    device_type: str = "cpu",
    dtype: torch.dtype | None = None,
) -> str:
    """What would run ``op`` for a tensor (or for a device and dtype), and why: one line a backend."""
    if tensor is not None:
        device_type, dtype = tensor.device.type, tensor.dtype
    dtype = dtype or torch.float32
    try:
        chosen: str | None = _decide(_requested, op, device_type, dtype)
        reason = (
            f"asked for by name ({_requested})" if _requested else f"first choice available on {device_type}"
        )
        lines = [f"{op} on {device_type} {dtype}: {chosen} ({reason})"]
    except BackendUnavailable as error:
        chosen = None
        lines = [f"{op} on {device_type} {dtype}: none ({error})"]
    for name in _names():
        why = unavailable(name, op, device_type, dtype)
        lines.append(
            f"  {name}: {'available' if why is None else why}{' (chosen)' if name == chosen else ''}"
        )
    return "\n".join(lines)
