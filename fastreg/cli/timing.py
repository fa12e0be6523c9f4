"""The one place that times anything: clocks for CPU and CUDA, interleaved rounds, and the copy bandwidth.

A machine that does other work drifts: a provider timed a second later meets another machine. So providers take turns,
A B C A B C, and are compared by the medians of their samples, never by two runs one after the other. Before each timed
call comes an untimed one of the same provider, so that caches and the allocator are in the state that this provider
itself leaves behind, not its neighbour in the round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch

Task = Callable[[], Sequence[float]]

# Larger than any L2 cache.
_SCRUB_BYTES = 2**29
# Of a GPU's clock: what it waits for longer than the host takes to queue the timed launches. Otherwise the events would
# time the host.
_CYCLES_PER_SECOND = 2e9
_MARGIN = 1.5
_SHORTEST_WAIT, _LONGEST_WAIT = 1e-4, 1e-2
_REMEMBERED = 8


@dataclass(frozen=True)
class Distribution:
    """Seconds over the rounds of one run: the median is the figure, the others say how far to trust it."""

    median: float
    minimum: float
    lower_quartile: float
    upper_quartile: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Distribution:
        lower, _, upper = statistics.quantiles(samples, n=4) if len(samples) > 1 else (samples[0],) * 3
        return cls(statistics.median(samples), min(samples), lower, upper, len(samples))

    def as_dict(self, unit: float) -> dict[str, float]:
        """The figures in another unit (1e3: milliseconds), rounded to what a clock can tell."""
        figures: dict[str, float] = {
            name: float(f"{value * unit:.5g}") for name, value in asdict(self).items() if name != "rounds"
        }
        return {**figures, "rounds": self.rounds}


class Clock(Protocol):
    """Times one call, or a forward and the backward of its result."""

    def elapsed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that ``function`` takes, and what it returns."""

    def forward_backward(
        self, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any]
    ) -> tuple[float, float, float]:
        """Seconds of the forward, of the backward, and of both together."""


class CpuClock:
    """Wall time of synchronous calls; the three figures come from one forward and its backward."""

    def elapsed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result

    def forward_backward(
        self, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any]
    ) -> tuple[float, float, float]:
        start = time.perf_counter()
        output = forward()
        middle = time.perf_counter()
        gradients = backward(output)
        end = time.perf_counter()
        del output, gradients
        return middle - start, end - middle, end - start


class CudaClock:
    """Time between two events on the current stream: of the GPU alone, each measurement with a cold L2 cache.

    The GPU is kept waiting until the host has queued everything, by what the last calls took the host. What the host
    takes is measured elsewhere (host.py).
    """

    def __init__(self, device: torch.device) -> None:
        memory = torch.cuda.get_device_properties(device).total_memory
        self._scrub = torch.zeros(min(_SCRUB_BYTES, memory // 8) // 4, device=device)
        self._host_seconds: deque[float] = deque([_LONGEST_WAIT / _MARGIN], _REMEMBERED)

    def elapsed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Reading, not writing: written lines would still have to go back to memory during the timed call.
        self._scrub.sum()
        torch.cuda._sleep(waiting_cycles(self._host_seconds))
        start.record()
        begun = time.perf_counter()
        result = function()
        self._host_seconds.append(time.perf_counter() - begun)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3, result

    def forward_backward(
        self, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any]
    ) -> tuple[float, float, float]:
        seconds_forward, output = self.elapsed(forward)
        seconds_backward, _ = self.elapsed(partial(backward, output))
        del output
        seconds_both, _ = self.elapsed(lambda: backward(forward()))
        return seconds_forward, seconds_backward, seconds_both


def waiting_cycles(host_seconds: Iterable[float]) -> int:
    """How many cycles a GPU has to wait for a host whose last calls took so long."""
    seconds = min(max(_MARGIN * max(host_seconds), _SHORTEST_WAIT), _LONGEST_WAIT)
    return int(seconds * _CYCLES_PER_SECOND)


def clock_for(device: torch.device) -> Clock:
    """The clock that fits the device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def quiet_interpreter() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(tasks: Mapping[str, Task], rounds: int) -> dict[str, list[Sequence[float]]]:
    """Run every task once a round and return its samples by name, in order."""
    samples: dict[str, list[Sequence[float]]] = {name: [] for name in tasks}
    with quiet_interpreter():
        for _ in range(rounds):
            for name, task in tasks.items():
                samples[name].append(task())
    return samples


def rounds_within(tasks: Mapping[str, Task], seconds: float, fewest: int, most: int) -> int:
    """How many rounds of the tasks fit into so many seconds, going by one round run here, which also warms up."""
    start = time.perf_counter()
    for task in tasks.values():
        task()
    return max(fewest, min(most, int(seconds / max(time.perf_counter() - start, 1e-9))))


def copy_task(source: torch.Tensor, clock: Clock) -> Task:
    """A task that times a copy of ``source`` into memory that has been written before."""
    destination = source.clone()

    def task() -> Sequence[float]:
        destination.copy_(source)
        seconds, _ = clock.elapsed(lambda: destination.copy_(source))
        return (seconds,)

    return task


def copy_bandwidth(device: torch.device, size: int, rounds: int = 11) -> float:
    """Bytes a second (read and written) of a copy of ``size`` bytes on the device, on torch's number of threads."""
    clock = clock_for(device)
    task = copy_task(torch.ones(size // 4, device=device), clock)
    samples = interleaved({"copy": task}, rounds)["copy"]
    return 2 * size / statistics.median(sample[0] for sample in samples)
