"""``python -m fastreg doctor``: what is here, what would run, what is missing and the command that mends it.

Plain text and no package besides torch, because it has to work where something is missing.
"""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

import fastreg
from fastreg import _native, backends
from fastreg.cli import extras, machine, workloads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda")
_BROKEN = "broken, calls raise"
_WIDTH = 116


def report() -> str:
    """Everything the doctor has to say."""
    sections = (_versions, _native_libraries, _choices, _reasons, _remedies)
    return "\n\n".join("\n".join(section()) for section in sections)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrapped(name: str, text: str, width: int = 14) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"  {name:<{width}}",
        subsequent_indent=" " * (width + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _nvcc() -> str | None:
    """nvcc's version, found where CMake looks for it too."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for command in ("nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)):
        line = machine.first_line("sh", "-c", f'"{command}" --version 2>/dev/null | grep release')
        if line:
            return line
    return None


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            f"torch is built for CUDA {built} but finds no usable device"
            if built
            else "torch is built for the CPU only"
        )
        yield "GPU", f"none ({why})"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}",
            f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 1e9:.0f} GB",
        )


def _versions() -> Iterator[str]:
    yield f"fastreg {fastreg.__version__}"
    yield _wrapped("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _wrapped("torch", torch.__version__)
    yield _wrapped("triton", machine.triton_version() or "not installed")
    yield _wrapped("nvcc", _nvcc() or "not found (needed only to build the CUDA library)")
    capability = torch.backends.cpu.get_cpu_capability()
    cores, threads = machine.usable_cores(), torch.get_num_threads()
    yield _wrapped(
        "CPU", f"{machine.cpu_name()}, {cores} usable core(s), {capability}; torch uses {threads} thread(s)"
    )
    for name, text in _gpus():
        yield _wrapped(name, text)


def _native_libraries() -> Iterator[str]:
    yield "Native libraries"
    for device_type in DEVICES:
        loaded = f"loaded from {_native.LIBRARY_DIRECTORY}"
        yield _wrapped(device_type, loaded if _native.loaded(device_type) else "not loaded, see the end")


def unavailable(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve; one that fails at the question is broken, which the doctor has to survive."""
    try:
        return backends.unavailable(name, op, device_type, dtype)
    except Exception as error:  # noqa: BLE001 - a broken installation fails in ways nobody can list
        return f"{_BROKEN} {type(error).__name__}: {error}"


def choice(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that would run an op, and why; "none" where the one asked for cannot."""
    requested = backends.requested()
    if requested is None:
        wanted = backends.preference(op, device_type)
        reasons = [unavailable(name, op, device_type, dtype) for name in wanted]
        first = wanted[reasons.index(None)]
        passed = wanted[: reasons.index(None)]
        if any(reason is not None and reason.startswith(_BROKEN) for reason in reasons[: len(passed)]):
            return "none", "calls raise, see below"
        return first, f"{', '.join(passed)} cannot, see below" if passed else "first choice"
    reason = unavailable(requested, op, device_type, dtype)
    if reason is None:
        return requested, "asked for by name"
    return "none", f"calls raise: {requested} was asked for by name and cannot serve this"


def _choices() -> Iterator[str]:
    requested = backends.requested()
    asked = f"; {requested} is asked for by name (FASTREG_BACKEND or backends.use)" if requested else ""
    yield f"Which backend runs{asked}"
    yield f"  {'op':<24}{'device':<8}{'backend':<12}{'dtypes':<40}why"
    for op, device_type in product(workloads.names(), DEVICES):
        absent = device_type == "cuda" and not torch.cuda.is_available()
        note = " (if there were a GPU)" if absent else ""
        dtypes: dict[tuple[str, str], list[str]] = {}
        for dtype in DTYPES:
            dtypes.setdefault(choice(op, device_type, dtype), []).append(_name(dtype))
        for (backend, why), names in dtypes.items():
            yield f"  {op:<24}{device_type:<8}{backend:<12}{', '.join(names):<40}{why}{note}"


def _reasons() -> Iterator[str]:
    """Why a backend does not serve, each reason once with the cases that it holds for."""
    yield "Why not the others"
    cases: dict[tuple[str, str], dict[tuple[str, str], dict[str, None]]] = {}
    for op, device_type, dtype in product(workloads.names(), DEVICES, DTYPES):
        for name in backends.NAMES:
            reason = unavailable(name, op, device_type, dtype)
            if reason is not None and name == "native" and reason == _native.reason(device_type):
                reason = f"the native {device_type} library is not loaded, see the end"
            if reason is not None:
                where = cases.setdefault((name, reason), {}).setdefault((op, device_type), {})
                where[_name(dtype)] = None
    for (name, reason), places_of in cases.items():
        kinds: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        for place, dtypes in places_of.items():
            kinds.setdefault(tuple(dtypes), []).append(place)
        shown = "; ".join(
            ", ".join(_places(places)) + ("" if len(dtypes) == len(DTYPES) else f" in {', '.join(dtypes)}")
            for dtypes, places in kinds.items()
        )
        yield _wrapped(name, f"{shown}: {reason}")
    if not cases:
        yield "  every backend serves every op, device and dtype"


def _places(cases: list[tuple[str, str]]) -> Iterator[str]:
    """Ops, each with the type of a device, in as few words as there are."""
    for device_type in DEVICES:
        ops = [op for op, where in cases if where == device_type]
        if len(ops) == len(workloads.names()):
            yield f"every op on {device_type}"
        elif ops:
            yield f"{', '.join(ops)} on {device_type}"


def _remedies() -> Iterator[str]:
    yield "What is missing"
    found = False
    for device_type in DEVICES:
        if not _native.loaded(device_type):
            found = True
            yield _wrapped(f"native {device_type}", _native.reason(device_type))
    if machine.triton_version() is None:
        found = True
        yield _wrapped("triton", "the triton backend needs it: pip install 'triton>=3.6'")
    for command in extras.NEEDS:
        packages = extras.missing(command)
        if packages:
            found = True
            yield _wrapped(command, extras.message(command, packages))
    if not found:
        yield "  nothing"
