"""The native libraries, built in place for the GPU's own architecture; the second time ninja finds it done."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.gpu.machine import Machine, NotUsable, packaged_tool, tool
from bench.gpu.process import Deadline, Finished, run

ROOT = Path(__file__).resolve().parents[2]
# Logs, caches and reports of parts; what is worth keeping goes from there to OUT.
WORK = Path(os.environ.get("FASTREG_GPU_WORK") or ROOT / "build" / "gpu")


def _found(name: str) -> Path:
    path = tool(name) or packaged_tool(name)
    if path is None:
        raise NotUsable(
            f"no {name}: neither on the PATH nor as a package of {sys.executable}; the build needs it"
        )
    return path


def build(machine: Machine, deadline: Deadline, jobs: int) -> Finished:
    """Configure and build, in the folder that `make native` uses too; without a GPU the CPU library alone."""
    cmake, log = _found("cmake"), WORK / "build.log"
    log.unlink(missing_ok=True)
    configure = [
        *(cmake, "-S", ROOT, "-B", ROOT / "build", "-G", "Ninja", "--log-level=WARNING"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={_found('ninja')}",
        f"-DFASTREG_CUDA={'AUTO' if machine.rehearsal else 'ON'}",
        *([] if machine.rehearsal else [f"-DFASTREG_CUDA_ARCHITECTURES={machine.capability}"]),
    ]
    configured = run(configure, log, deadline)
    if configured.code != 0:
        return configured
    target = ["--target", "fastreg_cpu"] if machine.rehearsal else []
    return run([cmake, "--build", ROOT / "build", "--parallel", str(jobs), *target], log, deadline)
