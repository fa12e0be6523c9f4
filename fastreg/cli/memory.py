"""A process that runs one model on the photographs and prints, as JSON, the memory that a step needs on a CPU.

The system counts a process's resident memory and keeps its peak; the peak is reset once the model, the images and
torch's own buffers are there, so the figure is what the step adds.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from fastreg.cli import images, training
from fastreg.cli.photographs import step

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    match = re.search(rf"^{which}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {which}")
    return 1024 * int(match[1])


def peak_of_a_step(
    settings: training.Settings, converted: bool, patch_size: int | None, steps: int = 3
) -> int | None:
    """Bytes that the steps add to the process at their peak; None on systems that do not tell."""
    device = torch.device("cpu")
    model = training.make_model(settings, device)
    if converted:
        training.convert(model)
    photographs = images.photographs(device)
    # A step on a corner loads the libraries' code and starts the threads.
    side = 2 * (patch_size or 16)
    step(model, photographs[:, :, :side, :side].contiguous(), patch_size)
    try:
        _RESET.write_text(_RESET_PEAK)
        rest = resident("VmRSS")
        for _ in range(steps):
            step(model, photographs, patch_size)
        return resident("VmHWM") - rest
    except OSError:
        return None


def main() -> None:
    """Read the settings from the command line, print the figure."""
    arguments = json.loads(sys.argv[1])
    settings = training.Settings(**arguments["settings"])
    print(
        json.dumps({"peak_bytes": peak_of_a_step(settings, arguments["converted"], arguments["patch_size"])})
    )


if __name__ == "__main__":
    main()
