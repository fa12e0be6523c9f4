"""Loads the native libraries, once and only when something asks for them, and keeps the reason if it cannot.

``lib/libfastreg_cpu.so`` defines the operators of ``torch.ops.fastreg_native`` and their CPU kernels;
``lib/libfastreg_cuda.so`` adds the CUDA kernels and loads on a CPU-only torch as well. Neither is a Python extension:
importing torch is all they need, so one file serves every Python version.
"""

import threading
from pathlib import Path

import torch

LIBRARY_DIRECTORY = Path(__file__).parent / "lib"

_HOW_TO_BUILD = (
    "install fastreg from its source in an environment that has torch, with "
    "`pip install -U setuptools cmake ninja` and then `pip install --no-build-isolation .`"
)
_HOW_TO_BUILD_CUDA = (
    "put nvcc (CUDA 12.8 or newer) on the PATH, or `pip install -r requirements/nvcc.txt`, and then "
    "`FASTREG_CUDA=1 pip install --no-build-isolation .` in fastreg's source"
)

_lock = threading.Lock()
_reasons: dict[str, str] = {}
"""Device type to why its library is not loaded; the empty string once it is."""


def loaded(device_type: str) -> bool:
    """Whether the native kernels for ``device_type`` ("cpu" or "cuda") are loaded; the first question loads them."""
    return not reason(device_type)


def reason(device_type: str) -> str:
    """Why the native kernels for ``device_type`` are not loaded and what mends it; empty if they are."""
    if device_type not in ("cpu", "cuda"):
        return f"fastreg has no native kernels for {device_type} tensors; it has them for cpu and cuda"
    known = _reasons.get(device_type)
    if known is not None:
        return known
    with _lock:
        if not _reasons:
            _reasons.update(_load_all())
        return _reasons[device_type]


def _load_all() -> dict[str, str]:
    cpu = _load("cpu", _HOW_TO_BUILD)
    if cpu:
        # The CUDA library implements operators that the CPU library defines.
        return {"cpu": cpu, "cuda": cpu}
    return {"cpu": cpu, "cuda": _load("cuda", _HOW_TO_BUILD_CUDA)}


def _load(device_type: str, how_to_build: str) -> str:
    path = LIBRARY_DIRECTORY / f"libfastreg_{device_type}.so"
    if not path.exists():
        return f"the native {device_type} library was not built ({path} does not exist): {how_to_build}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # OSError: the loader refused the file (torch keeps the loader's own words in the cause). RuntimeError: torch
        # refused a registration in it.
        words = error.__cause__ or error
        return f"the native {device_type} library {path} does not load: {words}; to build it anew, {how_to_build}"
    return ""
