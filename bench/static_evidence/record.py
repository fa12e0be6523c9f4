"""One kernel on one architecture as the table has it, and the table as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.static_evidence.machine_code import Accesses, Resources
from bench.static_evidence.occupancy import residency


@dataclass(frozen=True, order=True)
class Launch:
    """The part of a launch that decides how many blocks fit on a multiprocessor, and the blocks a cluster."""

    threads: int
    dynamic_shared_bytes: int
    cluster: int = 1


@dataclass(frozen=True)
class Record:
    """A line of the table.

    Attributes:
        kernel: the instance, spelled with its template arguments.
        configuration: of a Triton kernel, what it was compiled for.
        architecture: 90 for compute capability 9.0.
        maximum_threads: that a block may have.
        registers, stack_bytes: a thread.
        spill_bytes: stored and loaded, as ptxas counts them; None where its words are not kept.
        static_shared_bytes: a block.
        widest_load, widest_store: bytes that a thread moves to or from global memory at once; 0 if it never does.
        accesses: load and store instructions, "global_loads" and so on, by their width in bytes.
        launches: how many different configurations the launch code chooses at realistic problems; 0: none that
            needs this instance, and ``lowest`` is then a launch with as many threads as it allows.
        threads, dynamic_shared_bytes, clusters: least and most among them.
        lowest: the launch of which the fewest warps are resident.
        occupancy, resident_warps, limit: at that launch; what keeps more out.
    """

    kernel: str
    configuration: str
    architecture: int
    maximum_threads: int
    registers: int
    stack_bytes: int
    spill_bytes: int | None
    static_shared_bytes: int
    widest_load: int
    widest_store: int
    accesses: dict[str, dict[int, int]]
    launches: int
    threads: tuple[int, int]
    dynamic_shared_bytes: tuple[int, int]
    clusters: tuple[int, int]
    lowest: Launch
    occupancy: float
    resident_warps: int
    limit: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kernel, self.configuration, self.architecture

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.kernel, self.configuration, f"sm_{self.architecture}") if part)

    @property
    def local_accesses(self) -> int:
        return sum(self.accesses["local"].values())


class ImpossibleLaunch(Exception):
    """The launch code asks for what the compiled kernel, or the device, cannot give."""


def record(
    kernel: str,
    architecture: int,
    resources: Resources,
    accesses: Accesses,
    maximum_threads: int,
    launches: Sequence[Launch],
    configuration: str = "",
    spill_bytes: int | None = None,
) -> Record:
    """The record of a kernel that is launched like ``launches``.

    Raises:
        ImpossibleLaunch: for each launch that would fail, a line.
    """
    considered = sorted(set(launches)) or [Launch(maximum_threads, 0)]
    fits = {
        launch: residency(
            architecture,
            resources.registers,
            launch.threads,
            resources.static_shared_bytes + launch.dynamic_shared_bytes,
        )
        for launch in considered
    }
    compiled = f"{resources}, compiled for {maximum_threads} threads"
    impossible = [
        f"{kernel} sm_{architecture}: {launch} does not fit {compiled} ({fit.limit})"
        for launch, fit in fits.items()
        if fit.blocks == 0 or launch.threads > maximum_threads
    ]
    if impossible:
        raise ImpossibleLaunch("\n".join(impossible))
    lowest = min(considered, key=lambda launch: (fits[launch].warps, launch))
    counted = {kind: dict(sorted(widths.items())) for kind, widths in vars(accesses).items()}
    threads = [launch.threads for launch in considered]
    shared = [launch.dynamic_shared_bytes for launch in considered]
    clusters = [launch.cluster for launch in considered]
    return Record(
        kernel=kernel,
        configuration=configuration,
        architecture=architecture,
        maximum_threads=maximum_threads,
        registers=resources.registers,
        stack_bytes=resources.stack_bytes,
        spill_bytes=spill_bytes,
        static_shared_bytes=resources.static_shared_bytes,
        widest_load=max(accesses.global_loads, default=0),
        widest_store=max(accesses.global_stores, default=0),
        accesses=counted,
        launches=len(set(launches)),
        threads=(min(threads), max(threads)),
        dynamic_shared_bytes=(min(shared), max(shared)),
        clusters=(min(clusters), max(clusters)),
        lowest=lowest,
        occupancy=round(fits[lowest].occupancy, 4),
        resident_warps=fits[lowest].warps,
        limit=fits[lowest].limit,
    )


# --- files ------------------------------------------------------------------------------------------------------------

SCHEMA = 1


@dataclass(frozen=True)
class Table:
    """All records of one kind of kernel, and the release of the compiler that they are of."""

    compiler: str
    records: tuple[Record, ...]

    def on(self, architectures: Iterable[int]) -> Table:
        """The part that is about these."""
        kept = set(architectures)
        return replace(self, records=tuple(each for each in self.records if each.architecture in kept))

    def of(self, configurations: Iterable[tuple[str, int]]) -> Table:
        """The part that is about these configurations, each with an architecture."""
        kept = set(configurations)
        of_these = (each for each in self.records if (each.configuration, each.architecture) in kept)
        return replace(self, records=tuple(of_these))

    @property
    def architectures(self) -> set[int]:
        return {each.architecture for each in self.records}


def write(path: Path, table: Table) -> None:
    """One record a line, so that a diff reads like one."""
    lines = [json.dumps(asdict(each)) for each in sorted(table.records, key=lambda each: each.key)]
    head = f'"schema": {SCHEMA}, "compiler": {json.dumps(table.compiler)}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + head + ', "records": [\n' + ",\n".join(lines) + "\n]}\n")


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: there is none, or one of another schema.
    """
    remedy = "run python -m bench.static_evidence"
    if not path.exists():
        raise ValueError(f"{path} does not exist: {remedy}")
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {document.get('schema')}, not {SCHEMA}: {remedy}")
    return Table(document["compiler"], tuple(_record(each) for each in document["records"]))


def _record(values: dict[str, Any]) -> Record:
    accesses = {
        kind: {int(width): count for width, count in widths.items()}
        for kind, widths in values["accesses"].items()
    }
    pairs = {name: tuple(values[name]) for name in ("threads", "dynamic_shared_bytes", "clusters")}
    return Record(**{**values, **pairs, "accesses": accesses, "lowest": Launch(**values["lowest"])})
