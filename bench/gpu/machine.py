"""What the interpreter that runs the stages can see: the GPU, torch, the packages that the stages need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

# Import names. expecttest has a stand-in under tests/stand_ins.
PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis", "rich", "typer")

# In a process of its own, because a CUDA context would lie in this one's memory for all stages.
_LOOK = """
import importlib.util, json, platform, sys
missing = [name for name in sys.argv[1].split(",") if importlib.util.find_spec(name) is None]
found = {"missing": missing, "python": platform.python_version(), "torch": "", "triton": "", "gpu": False}
if "torch" not in missing:
    import torch
    found["torch"] = torch.__version__
    found["gpu"] = torch.cuda.is_available()
    if found["gpu"]:
        properties = torch.cuda.get_device_properties(0)
        found["name"] = properties.name
        found["capability"] = f"{properties.major}{properties.minor}"
        found["memory"] = torch.cuda.mem_get_info(0)[0]
if "triton" not in missing:
    import triton
    found["triton"] = triton.__version__
print(json.dumps(found))
"""


class NotUsable(RuntimeError):
    """The stages cannot run here; the text says what is missing and what to do."""


@dataclass(frozen=True)
class Machine:
    """Where the stages run.

    Attributes:
        name: of the GPU, or that this is a rehearsal.
        capability: "90" for sm_90; empty in a rehearsal.
        memory: free bytes of the GPU.
    """

    device: str
    name: str
    capability: str
    memory: int
    python: str
    torch: str
    triton: str
    cores: int

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU in this."""
        return self.device == "cpu"

    def __str__(self) -> str:
        where = f"{self.name} (sm_{self.capability})" if self.capability else self.name
        return f"{where}, torch {self.torch}, triton {self.triton}, Python {self.python}, {self.cores} cores"

    def as_dict(self) -> dict[str, object]:
        """For a result file."""
        return {**asdict(self), "rehearsal": self.rehearsal}


def look(device: str) -> Machine:
    """The machine, or NotUsable."""
    result = subprocess.run(
        [sys.executable, "-c", _LOOK, ",".join(PACKAGES)], capture_output=True, text=True, timeout=180
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotUsable(
            f"torch cannot be imported by {sys.executable}: {last}; name another one with PYTHON="
        )
    found = json.loads(result.stdout.splitlines()[-1])
    if found["missing"]:
        raise NotUsable(
            f"{sys.executable} has no {', '.join(found['missing'])}; `make gpu` uses the machine's own Python and "
            "installs nothing: install what is missing, or name another Python with PYTHON="
        )
    if device == "cuda" and not found["gpu"]:
        raise NotUsable(
            f"no GPU: torch {found['torch']} of {sys.executable} finds no usable CUDA device; `make gpu` needs a GPU, "
            "its driver and a torch built for CUDA (`python -m fastreg doctor` says more). `make gpu DEVICE=cpu` "
            "rehearses the stages without one"
        )
    gpu = device == "cuda"
    return Machine(
        device=device,
        name=found["name"] if gpu else "REHEARSAL on the CPU, which says nothing of a GPU",
        capability=found["capability"] if gpu else "",
        memory=found["memory"] if gpu else 0,
        python=found["python"],
        torch=found["torch"],
        triton=found["triton"],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def tool(name: str, *folders: str) -> Path | None:
    """An executable: beside the interpreter, on the PATH, in CUDA's folders or in one of those given."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [
        sysconfig.get_path("scripts"),
        str(Path(sys.executable).parent),
        *os.environ.get("PATH", "").split(os.pathsep),
        *(str(Path(home) / "bin") for home in homes if home),
        *folders,
    ]
    found = shutil.which(name, path=os.pathsep.join(filter(None, places)))
    return Path(found) if found else None


def packaged_tool(package: str) -> Path | None:
    """cmake or ninja as a Python package brings it, where its script is nowhere on the PATH."""
    look_up = f"import {package}; print({package}.{'CMAKE_' if package == 'cmake' else ''}BIN_DIR)"
    result = subprocess.run([sys.executable, "-c", look_up], capture_output=True, text=True)
    path = Path(result.stdout.strip() or "/nowhere", package)
    return path if result.returncode == 0 and os.access(path, os.X_OK) else None
