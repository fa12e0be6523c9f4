"""The committed benchmark: its grid and its result document; no printing, no pytest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastreg import backends
from fastreg.cli import machine, timing, workloads
from fastreg.cli.host import host_cost
from fastreg.cli.measure import Case, Record, measure
from fastreg.cli.workloads import DIRECTIONS

SCHEMA = 1
DTYPES = (torch.float32, torch.bfloat16)


def grid(device: torch.device, ops: Sequence[str] = (), dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    """The committed benchmark's cases for a device, or those of some ops and dtypes."""
    return [
        Case(op, rows, hidden_size, dtype)
        for op in ops or workloads.names()
        for dtype in dtypes
        for rows, hidden_size in workloads.workload(op).GRID[device.type]
    ]


@dataclass(frozen=True)
class Plan:
    """What one run measures, and how long it takes over it.

    Attributes:
        seconds: for the rounds of one case.
        host: also measure the host cost of tiny calls.
    """

    device: torch.device
    cases: tuple[Case, ...]
    complete: bool
    seconds: float = 8.0
    host: bool = True

    @property
    def steps(self) -> int:
        """How many steps ``run`` yields."""
        return len(self.cases) + (len(self._host_ops) if self.host else 0)

    @property
    def _host_ops(self) -> list[str]:
        return sorted({case.op for case in self.cases})

    def run(self, document: Record) -> Iterator[str]:
        """Fill the document's "cases" and "host", yielding the name of each step before it is taken."""
        start = time.perf_counter()
        clock = timing.clock_for(self.device)
        for case in self.cases:
            yield str(case)
            document["cases"] += measure(case, self.device, clock, self.seconds).records()
            document["seconds"] = math.ceil(time.perf_counter() - start)
        for op in self._host_ops if self.host else ():
            yield f"{op} host cost"
            document["host"] += host_cost(op, self.device)
        document["seconds"] = math.ceil(time.perf_counter() - start)


def new_document(device: torch.device, complete: bool, copy_size: int = 2**28) -> Record:
    """An empty result document with its header; measures the copy bandwidth of a large buffer."""
    rate = timing.copy_bandwidth(device, copy_size)
    return {
        "schema": SCHEMA,
        "complete": complete,
        **machine.describe(device),
        "large_copy": {"bytes": 2 * copy_size, "gigabytes_per_second": float(f"{rate * 1e-9:.4g}")},
        "seconds": 0,
        "cases": [],
        "host": [],
    }


def red(document: Record) -> list[str]:
    """The fastreg backends that failed or that the gate refused, one line each."""
    lines = []
    for record in document["cases"]:
        if record["direction"] != DIRECTIONS[0]:
            continue
        for name, found in record["providers"].items():
            reason = found.get("refused") or found.get("failed")
            if reason and name in backends.NAMES:
                where = f"{record['op']} {record['dtype']} ({record['rows']}, {record['hidden_size']})"
                lines.append(f"{name}: {where}: {reason}")
    return lines
