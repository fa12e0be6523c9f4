"""Gates and times one case: an op at a shape and dtype, every provider of it.

First the gate; then the providers that passed and a copy of the input take turns, and each turn gives three figures:
forward, backward and forward+backward. GB/s is the op's minimum traffic over the time, so a provider that makes more
passes than needed shows fewer; the share is that of the copy measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastreg import backends
from fastreg.cli import timing
from fastreg.cli.gate import Implausible, Results, Verdict, judge
from fastreg.cli.providers import Provider, providers_for
from fastreg.cli.saved import saved_bytes
from fastreg.cli.workloads import DIRECTIONS, Case, Problem

COPY = "copy"

Record = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What came of one case.

    Attributes:
        bytes_moved: the op's minimum traffic for each direction.
        copy_bytes: read and written by the copy that took part in the rounds.
        picked: the backend that a user's call would run.
        samples: a triple of seconds (forward, backward, both) a round, by provider; one figure a round for the copy.
        notes: what the gate found, by provider: "budget_used", "relative_error", and "refused" or "failed"; and
            "saved_bytes", what autograd keeps for backward beside the arguments.
        missing: why a provider did not take part.
    """

    case: Case
    bytes_moved: Mapping[str, int]
    copy_bytes: int
    picked: str
    samples: Mapping[str, Sequence[Sequence[float]]]
    notes: Mapping[str, Record]
    missing: Mapping[str, str]

    def record(self, direction: str) -> Record:
        """The line of a result document for one direction."""
        index, size = DIRECTIONS.index(direction), self.bytes_moved[direction]
        copy = timing.Distribution.of([sample[0] for sample in self.samples[COPY]])
        copy_rate = self.copy_bytes / copy.median
        providers = {name: dict(note) for name, note in self.notes.items()}
        for name, found in providers.items():
            if name in self.samples:
                spread = timing.Distribution.of([sample[index] for sample in self.samples[name]])
                found["milliseconds"] = spread.as_dict(1e3)
                found["gigabytes_per_second"] = float(f"{size / spread.median * 1e-9:.4g}")
                found["share_of_copy"] = float(f"{size / spread.median / copy_rate:.4g}")
        return {
            **self.case.record(),
            "direction": direction,
            "bytes": size,
            "picked": self.picked,
            "copy": {
                "bytes": self.copy_bytes,
                "milliseconds": copy.as_dict(1e3),
                "gigabytes_per_second": float(f"{copy_rate * 1e-9:.4g}"),
            },
            "providers": providers,
            "missing": dict(self.missing),
        }

    def records(self) -> list[Record]:
        """The lines of all directions."""
        return [self.record(direction) for direction in DIRECTIONS]


def _gated(problem: Problem, providers: Sequence[Provider]) -> tuple[list[Provider], dict[str, Record]]:
    """The providers that give the right results, and for every provider what the gate found."""
    results = {}
    notes: dict[str, Record] = {}
    for provider in providers:
        try:
            with provider.context():
                results[provider.name] = problem.results(provider.function)
        except Exception as error:  # noqa: BLE001 - any failure (no compiler, say) is a result, which the tables show
            first = (str(error).strip().splitlines() or [""])[0]
            notes[provider.name] = {"failed": f"{type(error).__name__}: {first}"}
    peers = {provider.name for provider in providers if provider.peer}
    for name, found in verdicts(problem, results, peers).items():
        if isinstance(found, Implausible):
            notes[name] = {"refused": str(found)}
            continue
        notes[name] = {
            "budget_used": float(f"{found.budget_used:.3g}"),
            "relative_error": float(f"{found.relative_error:.3g}"),
        }
        refusal = found.refusal(name in peers)
        if refusal is not None:
            notes[name]["refused"] = refusal
    passed = [p for p in providers if not {"refused", "failed"} & notes[p.name].keys()]
    for provider in passed:
        with provider.context():
            notes[provider.name]["saved_bytes"] = saved_bytes(
                partial(problem.forward, provider.function),
                (*problem.arguments.values(), *problem.buffers.values()),
            )
    return passed, notes


def verdicts(
    problem: Problem, results: Mapping[str, Results], peers: Container[str]
) -> dict[str, Verdict | Implausible]:
    """The gate's verdict on each provider's results; of a random op, on each peer's by the mask that it drew."""
    if problem.peer_truth is None:
        return dict(judge(results, problem.truth()))
    found: dict[str, Verdict | Implausible] = {}
    ours = {name: each for name, each in results.items() if name not in peers}
    if ours:
        found |= judge(ours, problem.truth())
    for name, each in results.items():
        if name in peers:
            try:
                found |= judge({name: each}, problem.peer_truth(each))
            except Implausible as reason:
                found[name] = reason
    return {name: found[name] for name in results}


def _task(problem: Problem, provider: Provider, clock: timing.Clock) -> timing.Task:
    def forward() -> torch.Tensor:
        return problem.forward(provider.function)

    def task() -> Sequence[float]:
        with provider.context():
            problem.backward(forward())
            return clock.forward_backward(forward, problem.backward)

    return task


def measure(
    case: Case,
    device: torch.device,
    clock: timing.Clock,
    seconds: float,
    fewest: int = 7,
    most: int = 101,
    choose: Callable[[Problem], tuple[list[Provider], dict[str, str]]] = providers_for,
) -> Measured:
    """Gate and time one case.

    Args:
        seconds: about how long the rounds may take; at least ``fewest`` and at most ``most`` are run.
        choose: the providers of a problem and the reasons for those that are missing.
    """
    problem = case.problem(device)
    candidates, missing = choose(problem)
    passed, notes = _gated(problem, candidates)
    tasks = {COPY: timing.copy_task(problem.input.detach(), clock)}
    tasks |= {provider.name: _task(problem, provider, clock) for provider in passed}
    rounds = timing.rounds_within(tasks, seconds, fewest, most)
    return Measured(
        case=case,
        bytes_moved=problem.bytes_moved,
        copy_bytes=2 * problem.input.numel() * problem.input.element_size(),
        picked=backends.pick(case.op, problem.input),
        samples=timing.interleaved(tasks, rounds),
        notes=notes,
        missing=missing,
    )
