"""The plain and the converted model on two photographs at their own size: outputs, step time, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from fastreg import backends
from fastreg.cli import images, timing
from fastreg.cli.saved import saved_bytes
from fastreg.cli.training import CONVERTED, NAMES, PLAIN, Settings

# Relative to the largest output: two forward passes of a few dozen layers in fp32.
OUTPUT_ALLOWANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """What the photographs showed, by model's name where there are two figures.

    Attributes:
        patch_size: of a vision transformer; None for a network that has no patches.
        output_difference: the largest, relative to the largest output, in evaluation mode.
        seconds: of a step, forward and backward.
        saved_bytes: tensors that the forward keeps for the backward, counted.
        peak_bytes: what a step adds at its peak to the memory of the model at rest, measured; None where it cannot be.
    """

    shape: tuple[int, ...]
    patch_size: int | None
    output_difference: float
    seconds: dict[str, timing.Distribution]
    saved_bytes: dict[str, int]
    peak_bytes: dict[str, int] | None

    def disagreements(self) -> list[str]:
        """What is further apart than rounding explains."""
        if self.output_difference <= OUTPUT_ALLOWANCE:
            return []
        return [
            f"the outputs on the photographs differ by {self.output_difference:.3g}, allowed {OUTPUT_ALLOWANCE}"
        ]


def logits(model: torch.nn.Module, photographs: torch.Tensor, patch_size: int | None) -> torch.Tensor:
    """What a model makes of the photographs."""
    found: torch.Tensor = model(photographs) if patch_size is None else model(photographs, patch_size)
    return found


def step(model: torch.nn.Module, photographs: torch.Tensor, patch_size: int | None) -> None:
    """A forward and a backward; the gradients are dropped before, as in a training loop."""
    model.zero_grad()
    logits(model, photographs, patch_size).square().mean().backward()


def compare(
    models: dict[str, torch.nn.Module],
    settings: Settings,
    device: torch.device,
    advance: Callable[[str], None],
    rounds: int = 11,
    patch_size: int | None = 16,
) -> Comparison:
    """Run both models on the photographs; the two take turns.

    The converted model takes over the plain one's trained weights: training amplifies the rounding of 15 epochs, and
    here only the layers are to differ.

    Args:
        advance: called with the name of what comes next, ``2 + rounds`` times.
    """
    photographs = images.photographs(device)
    models[CONVERTED].load_state_dict(models[PLAIN].state_dict())
    advance("outputs")
    with torch.no_grad():
        outputs = {name: logits(model.eval(), photographs, patch_size) for name, model in models.items()}
    difference = (outputs[PLAIN] - outputs[CONVERTED]).abs().max() / outputs[PLAIN].abs().max()
    clock = timing.clock_for(device)

    def task(model: torch.nn.Module) -> timing.Task:
        return lambda: (clock.elapsed(lambda: step(model, photographs, patch_size))[0],)

    tasks = {name: task(model.train()) for name, model in models.items()}
    for run in tasks.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        advance(f"steps {number + 1} of {rounds}")
        for name, (sample,) in timing.interleaved(tasks, 1).items():
            samples[name] += sample
    advance("peak memory")
    return Comparison(
        shape=tuple(photographs.shape),
        patch_size=patch_size,
        output_difference=float(difference),
        seconds={name: timing.Distribution.of(values) for name, values in samples.items()},
        saved_bytes={
            name: saved_for_backward(model, photographs, patch_size) for name, model in models.items()
        },
        peak_bytes=_peaks(models, settings, photographs, patch_size),
    )


def saved_for_backward(model: torch.nn.Module, photographs: torch.Tensor, patch_size: int | None) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and input apart."""
    return saved_bytes(lambda: logits(model, photographs, patch_size), (*model.parameters(), photographs))


def _peaks(
    models: dict[str, torch.nn.Module], settings: Settings, photographs: torch.Tensor, patch_size: int | None
) -> dict[str, int] | None:
    if photographs.is_cuda:
        return {name: _peak_on_gpu(model, photographs, patch_size) for name, model in models.items()}
    # A process of its own for each model: in this one, memory that the other model's steps returned would be reused.
    # The allocator is told to give every freed tensor back at once: what it holds for reuse varies by 10 % a run.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "FASTREG_BACKEND": backends.requested() or "",
    }
    peaks = {}
    for name in NAMES:
        arguments = json.dumps(
            {"settings": asdict(settings), "converted": name == CONVERTED, "patch_size": patch_size}
        )
        command = [sys.executable, "-m", "fastreg.cli.memory", arguments]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found = json.loads(result.stdout)["peak_bytes"]
        if found is None:
            return None
        peaks[name] = int(found)
    return peaks


def _peak_on_gpu(model: torch.nn.Module, photographs: torch.Tensor, patch_size: int | None) -> int:
    step(model, photographs, patch_size)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    step(model, photographs, patch_size)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - rest
