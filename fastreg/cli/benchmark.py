"""The committed benchmark: its grid and its result document; no printing, no pytest."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastreg import backends
from fastreg.cli import machine, timing, workloads
from fastreg.cli.host import host_cost
from fastreg.cli.measure import Record, measure
from fastreg.cli.workloads import DIRECTIONS, Case, describe

SCHEMA = 2
DTYPES = (torch.float32, torch.bfloat16)


def grid(device: torch.device, ops: Sequence[str] = (), dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    """The committed benchmark's cases for a device, or those of some ops and dtypes."""
    return [case for op in ops or workloads.names() for case in cases(op, device.type, dtypes)]


def cases(op: str, grid: str, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    """An op's cases on a device type, or for a "rehearsal": every point of its grid in every dtype."""
    settings = itertools.product(dtypes, workloads.workload(op).GRID[grid])
    return [Case(op, shape, dtype, layout, chain) for dtype, (shape, layout, chain) in settings]


@dataclass(frozen=True)
class Plan:
    """What one run measures, and how long it takes over it.

    Attributes:
        seconds: for the rounds of one case; what its workload says if None.
        host: also measure the host cost of tiny calls.
    """

    device: torch.device
    cases: tuple[Case, ...]
    complete: bool
    seconds: float | None = None
    host: bool = True

    @property
    def ops(self) -> tuple[str, ...]:
        """What the cases are of."""
        return tuple(dict.fromkeys(case.op for case in self.cases))

    @property
    def steps(self) -> int:
        """How many steps ``run`` yields."""
        return len(self.cases) + (len(self._host_calls) if self.host else 0)

    @property
    def _host_calls(self) -> list[tuple[str, str]]:
        return [(op, chain) for op in self.ops for chain in workloads.workload(op).HOST_CHAINS]

    def run(self, document: Record) -> Iterator[str]:
        """Fill the document's "cases" and "host", yielding the name of each step before it is taken."""
        start = time.perf_counter()
        clock = timing.clock_for(self.device)
        for case in self.cases:
            yield str(case)
            seconds = workloads.workload(case.op).SECONDS if self.seconds is None else self.seconds
            document["cases"] += measure(case, self.device, clock, seconds).records()
            document["seconds"] = math.ceil(time.perf_counter() - start)
        for op, chain in self._host_calls if self.host else ():
            yield f"{op} host cost"
            document["host"] += host_cost(op, self.device, chain)
        document["seconds"] = math.ceil(time.perf_counter() - start)


def new_document(
    device: torch.device, complete: bool, ops: Sequence[str] = (), copy_size: int = 2**28
) -> Record:
    """An empty result document with its header; measures the copy bandwidth of a large buffer.

    Args:
        complete: it is to hold the whole grid of these ops.
        ops: all of them if empty.
    """
    rate = timing.copy_bandwidth(device, copy_size)
    return {
        "schema": SCHEMA,
        "complete": complete,
        "ops": [op for op in workloads.names() if op in ops or not ops],
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
                lines.append(f"{name}: {describe(record)}: {reason}")
    return lines


def upgraded(document: Record) -> Record:
    """A stored document in today's schema.

    Schema 1 knew the norms over rows only, and had their shape as "rows" and "hidden_size". Early documents of schema 2
    do not say which ops they are of.

    Raises:
        ValueError: a schema that is not known.
    """
    if document.get("schema") not in (1, SCHEMA):
        raise ValueError(f"schema {document.get('schema')}, this report reads 1 to {SCHEMA}")
    if document["schema"] == 1:
        for record in document["cases"]:
            record |= {"chain": "", "layout": "", "shape": [record.pop("rows"), record.pop("hidden_size")]}
        for record in document["host"]:
            record["chain"] = ""
    ops = sorted({record["op"] for record in document["cases"]})
    return {"ops": ops, **document, "schema": SCHEMA}
