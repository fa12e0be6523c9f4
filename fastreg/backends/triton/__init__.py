"""Triton kernels, for CUDA tensors; for CPU tensors in Triton's interpreter, a debugging aid of Triton's."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFERENCE = "use the reference backend"


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve a device and dtype, with the remedy; None where they can."""
    if dtype not in _DTYPES:
        native = " or, on the CPU, the native one" if dtype == torch.float64 else ""
        return f"its kernels compute in float32 and do not serve {dtype}; {_REFERENCE}{native}"
    if device_type not in ("cuda", "cpu"):
        return f"it serves CUDA tensors, not {device_type} ones; {_REFERENCE}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'triton>=3.6' (Linux)"
    if device_type == "cuda" and torch.version.hip is not None:
        return f"its launch configurations are made for NVIDIA GPUs; {_REFERENCE}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1" and "triton" not in sys.modules:
        return _NOT_INTERPRETED
    return _mode_mismatch() if device_type == "cuda" else _not_interpreted()


_NOT_INTERPRETED = (
    "it serves CPU tensors only in Triton's interpreter, which is slow; set TRITON_INTERPRET=1 before anything imports "
    f"triton, or {_REFERENCE}"
)


@cache
def _interpreted() -> tuple[bool, bool]:
    """Whether Triton's own functions are interpreted, and whether these kernels are.

    Triton reads TRITON_INTERPRET whenever a function is decorated: its own when it is imported, ours when this is
    called for the first time.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from fastreg.backends.triton._tiles import reduce_partials

    return isinstance(tl.sum, InterpretedFunction), isinstance(reduce_partials, InterpretedFunction)


def _mode_mismatch() -> str | None:
    theirs, ours = _interpreted()
    if theirs == ours:
        return None
    return (
        "TRITON_INTERPRET changed after triton had been imported; set or unset it before the process starts"
    )


def _not_interpreted() -> str | None:
    mismatch = _mode_mismatch()
    if mismatch is not None:
        return mismatch
    return None if _interpreted()[0] else _NOT_INTERPRETED
