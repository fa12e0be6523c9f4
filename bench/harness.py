"""Carries the timing core of ``fastreg.cli`` into pytest-benchmark.

pytest-benchmark times one test after the other, so its columns compare different minutes of a machine. Here a case is
measured once, all its providers taking turns and gated first (``fastreg.cli.measure``), and each provider's
test hands its own samples to pytest-benchmark, which keeps its tables, its files and its comparison of two commits. On
a GPU this is also how time between CUDA events gets in there.

    pytest bench                                   the grid, on the GPU where there is one
    pytest bench --benchmark-group-by=group -k "bfloat16 and backward"
    pytest bench --benchmark-json=before.json      pytest-benchmark's own file, for pytest-benchmark compare
    python -m bench                                the same without pytest, into bench/results/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from fastreg import backends
from fastreg.cli import benchmark, machine, measure, timing, workloads
from fastreg.cli.measure import Measured
from fastreg.cli.providers import COMPILE, EAGER, interpreted
from fastreg.cli.workloads import DIRECTIONS, Case

SECONDS = 2.0


class Replay:
    """A timer for pytest-benchmark that reports durations taken elsewhere: read at the start and end of each round."""

    def __init__(self) -> None:
        self._ends: Iterator[float] = iter(())
        self._running = False

    def load(self, samples: Sequence[float]) -> None:
        """The durations of the rounds to come."""
        self._ends, self._running = iter(samples), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else next(self._ends)


_replay = Replay()


def timer() -> float:
    """The timer of every benchmark here."""
    return _replay()


def provider_names(op: str, device: torch.device) -> list[str]:
    """Every provider that could take part on this device; a test each."""
    ours = [name for name in backends.NAMES if not interpreted(name, device)]
    return [EAGER, COMPILE, *ours, *(workloads.workload(op).PEERS if device.type == "cuda" else [])]


@cache
def _clock() -> timing.Clock:
    return timing.clock_for(machine.default_device())


@cache
def measured(case: Case) -> Measured:
    """Gate and time all providers of a case; the tests of one case share it."""
    return measure.measure(case, machine.default_device(), _clock(), SECONDS)


def hand_over(fixture: Any, found: Measured, provider: str, direction: str) -> None:
    """Give pytest-benchmark one provider's samples of one direction.

    Fails where the gate refused a backend of ours; skips a provider that is not here, with the reason.
    """
    if provider in found.missing:
        pytest.skip(f"{provider}: {found.missing[provider]}")
    note = found.notes[provider]
    problem = note.get("refused") or note.get("failed")
    if problem:
        (pytest.fail if provider in backends.NAMES else pytest.skip)(f"{provider}: {problem}")
    index = DIRECTIONS.index(direction)
    samples = [sample[index] for sample in found.samples[provider]]
    _replay.load(samples)
    fixture.group = f"{found.case} {direction}"
    fixture.extra_info.update(found.record(direction)["providers"][provider])
    fixture.pedantic(lambda: None, rounds=len(samples))


def benchmark_of(op: str) -> Callable[..., None]:
    """The benchmark of one op over its grid: a test for each case, direction and provider."""
    device = machine.default_device()

    @pytest.mark.benchmark(timer=timer)
    @pytest.mark.parametrize("provider", provider_names(op, device))
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("case", benchmark.grid(device, [op]), ids=str)
    def test(benchmark: Any, case: Case, direction: str, provider: str) -> None:
        hand_over(benchmark, measured(case), provider, direction)

    run: Callable[..., None] = test
    return run
