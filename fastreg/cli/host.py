"""What a call costs the host: microseconds of Python, dispatcher and autograd on a tensor too small to matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastreg import backends
from fastreg.cli import timing
from fastreg.cli.measure import Record
from fastreg.cli.providers import EAGER
from fastreg.cli.workloads import Case, Problem, workload

TINY = (2, 8)


def _tasks(problem: Problem, calls: int) -> dict[str, dict[str, timing.Task]]:
    """For each way of calling, the tasks that time the host's work for one call, by provider."""
    arguments = tuple(problem.arguments.values())
    clock = timing.CpuClock()
    device = problem.input.device

    def task(once: Callable[[], Any], record: bool) -> timing.Task:
        def block() -> None:
            for _ in range(calls):
                once()

        def run() -> Sequence[float]:
            with torch.set_grad_enabled(record):
                timing.synchronize(device)
                seconds, _ = clock.elapsed(block)
            return (seconds / calls,)

        return run

    # fastreg as it is called by everybody, with no backend asked for by name.
    functions = {EAGER: problem.torch_function, "fastreg": problem.fastreg_function}

    def by_provider(make: Callable[[Any], Callable[[], Any]], record: bool) -> dict[str, timing.Task]:
        return {name: task(make(function), record) for name, function in functions.items()}

    return {
        "forward, no_grad": by_provider(lambda f: lambda: f(*arguments), record=False),
        "forward, recording": by_provider(lambda f: lambda: f(*arguments), record=True),
        "forward+backward": by_provider(lambda f: lambda: problem.backward(f(*arguments)), record=True),
    }


def host_cost(
    op: str, device: torch.device, chain: str = "", rounds: int = 101, calls: int = 100
) -> list[Record]:
    """Microseconds that one call on a tiny fp32 tensor costs the host, torch's and ours, taking turns."""
    shape = getattr(workload(op), "TINY", TINY)
    problem = Case(op, shape, torch.float32, chain=chain).problem(device)
    records = []
    for way, tasks in _tasks(problem, calls).items():
        for task in tasks.values():
            task()
        samples = timing.interleaved(tasks, rounds)
        providers = {
            name: {"microseconds": timing.Distribution.of([value for (value,) in rows]).as_dict(1e6)}
            for name, rows in samples.items()
        }
        picked = backends.pick(op, problem.input)
        names = {"op": op, "chain": chain, "way": way, "shape": list(shape)}
        records.append({**names, "picked": picked, "providers": providers})
    return records
