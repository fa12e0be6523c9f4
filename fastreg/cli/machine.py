"""What a measurement was taken on: machine, versions, commit, date. Never the host's or the user's name."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastreg


def first_line(*command: str) -> str | None:
    """What a command prints first, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def triton_version() -> str | None:
    """Triton's version: as ``triton`` from PyPI, or under another name where torch brought its own."""
    known = version_of("triton")
    if known is None and importlib.util.find_spec("triton") is not None:
        known = str(getattr(importlib.import_module("triton"), "__version__", "unknown"))
    return known


def cpu_name() -> str:
    """The processor's name, as it calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def device_name(device: torch.device) -> str:
    """What a heading calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(text: str) -> str:
    """Lower case, with hyphens between runs of letters and digits: a folder's name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def _commit() -> str | None:
    root = Path(fastreg.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = first_line("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = first_line(
        "git", "-C", str(root), "status", "--porcelain", "--", "fastreg", "csrc", "CMakeLists.txt"
    )
    return f"{commit} (with changes)" if commit and changed else commit


def describe(device: torch.device) -> dict[str, Any]:
    """The header of a result file."""
    machine: dict[str, Any] = {
        "name": device_name(device),
        "device": device.type,
        "slug": slug(device_name(device)),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cpu":
        machine["slug"] = slug(f"{machine['name']} {machine['threads']} threads")
    else:
        properties = torch.cuda.get_device_properties(device)
        machine["capability"] = f"sm_{properties.major}{properties.minor}"
        machine["memory_gigabytes"] = round(properties.total_memory / 1e9, 1)
        machine["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    now = datetime.now(timezone.utc)
    return {
        "machine": machine,
        "versions": {
            "fastreg": fastreg.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton_version(),
            "liger": version_of("liger-kernel"),
            "timm": version_of("timm"),
        },
        "commit": _commit(),
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M UTC"),
    }
