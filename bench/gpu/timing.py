"""Takes the measurements of a stage named bench: the copy bandwidth first, then the grid, saved after every case.

    python -m bench.gpu.timing --device cuda --out build/gpu/results --seconds 2 --left 400 --ops layer_norm,rms_norm

Cases come in an order that covers every op, dtype, layout and chain early, and none is begun that would not end in
time. A run goes on where an earlier one of the same day, machine and commit ended, and keeps what it has of other ops.
When all ops are there the document is saved as bench/results/ has it, <machine>/<date>.json; until then it is
<date>-partial.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from fastreg.cli import benchmark, summary, timing
from fastreg.cli.bench import save
from fastreg.cli.host import host_cost
from fastreg.cli.measure import Measured, Record, measure
from fastreg.cli.providers import COMPILE, Provider, providers_for
from fastreg.cli.workloads import BACKWARD, DIRECTIONS, FORWARD, Case, Problem, describe, names, workload

# Both buffers are many times larger than any L2 cache.
_COPY_BYTES = 2**30
_REHEARSED_COPY_BYTES = 2**22
# Of an op with hundreds of cases torch.compile, which takes seconds to compile each, is timed on these shapes alone.
_COMPILED = {
    "batch_norm": ((32, 512, 28, 28), (256, 256, 56, 56), (256, 1024, 14, 14)),
    "group_norm": ((8, 320, 64, 64), (1, 512, 64, 64), (2, 256, 100, 152)),
    "instance_norm": ((4, 64, 128, 128), (2, 64, 32, 32, 32)),
}


def spread(cases: list[Case]) -> list[Case]:
    """The cases ordered so that every kind of them has its first shape measured before any has its second."""
    kinds: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.op, case.dtype, case.layout, case.chain), []).append(case)
    # Ordinary sizes lie in the middle of the grid: from there outwards.
    outwards = (
        [kind[place] for place in sorted(range(len(kind)), key=lambda place: abs(place - len(kind) // 2))]
        for kind in kinds.values()
    )
    return [case for turn in itertools.zip_longest(*outwards) for case in turn if case is not None]


def warm_up(device: torch.device, seconds: float = 1.5) -> None:
    """Keep the GPU busy until its clocks have risen: an idle one copies slowly, and all shares would be too good."""
    if device.type == "cuda":
        buffer = torch.ones(2**28, device=device)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                buffer.mul_(1.0)
            torch.cuda.synchronize(device)


def uncompiled(problem: Problem, why: str) -> tuple[list[Provider], dict[str, str]]:
    """Everybody but torch.compile, which would take most of the time."""
    found, missing = providers_for(problem)
    return [each for each in found if each.name != COMPILE], {**missing, COMPILE: why}


def in_time(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    """Everybody, torch.compile on some shapes only where there are many."""
    shapes = _COMPILED.get(problem.op)
    if shapes is None or tuple(problem.input.shape) in shapes:
        return providers_for(problem)
    return uncompiled(problem, "timed on a few shapes only, since compiling takes seconds a case")


def rehearsed(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    """Everybody but torch.compile."""
    return uncompiled(problem, "left out of the rehearsal")


def continued(document: Record, out: Path, ops: list[str]) -> Record:
    """The header of a new document with what an earlier run of the same day, machine and commit measured.

    A partial document is gone on with; of a complete one the cases of these ops are measured again. The copy bandwidth,
    which all shares are of, is the higher of the two.
    """
    stem = out / document["machine"]["slug"] / document["date"]
    for path, kept in (
        (Path(f"{stem}-partial.json"), names()),
        (Path(f"{stem}.json"), set(names()) - set(ops)),
    ):
        if not path.exists():
            continue
        earlier = json.loads(path.read_text())
        if any(earlier.get(key) != document[key] for key in ("schema", "machine", "versions", "commit")):
            continue
        for key in ("cases", "host"):
            document[key] = [record for record in earlier[key] if record["op"] in kept]
        document["seconds"] = earlier["seconds"]
        copies = (earlier["large_copy"], document["large_copy"])
        document["large_copy"] = max(copies, key=lambda copy: copy["gigabytes_per_second"])
        break
    return document


def line(found: Measured, copy: float) -> str:
    """A case in a line: for each provider GB/s and the share of the copy bandwidth, forward and backward."""
    parts = []
    for name in found.samples:
        if name in found.notes:
            rates = []
            for direction in (FORWARD, BACKWARD):
                rate = found.record(direction)["providers"][name]["gigabytes_per_second"]
                rates.append(f"{rate:.0f} GB/s {summary.percent(rate / copy)}")
            parts.append(f"{name} {' / '.join(rates)}")
    return f"{found.case}: {'; '.join(parts)}"


def main() -> int:
    """Measure, save, print a line a case; 0 where all cases were measured, 3 where time ran out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for the rounds of one case")
    parser.add_argument("--left", type=float, required=True, help="seconds until all must be done")
    parser.add_argument("--ops", default=",".join(names()), help="separated by commas; all if not given")
    options = parser.parse_args()
    ops = options.ops.split(",")
    start = time.perf_counter()
    rehearsal = options.device == "cpu"
    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    warm_up(device)
    document = benchmark.new_document(
        device, complete=False, copy_size=_REHEARSED_COPY_BYTES if rehearsal else _COPY_BYTES
    )
    document["commit"] = document["commit"] or os.environ.get("FASTREG_COMMIT") or None
    if rehearsal:
        document["rehearsal"] = True
        document["machine"]["slug"] = "rehearsal"
    document = continued(document, options.out, ops)
    before = document["seconds"]
    copy = document["large_copy"]["gigabytes_per_second"]
    print(
        f"copy bandwidth: {copy} GB/s ({document['large_copy']['bytes']} bytes read and written)", flush=True
    )

    which = "rehearsal" if rehearsal else device.type
    place = {
        str(case): index for index, case in enumerate(c for op in names() for c in benchmark.cases(op, which))
    }
    there = {describe(record) for record in document["cases"]}
    grid = [case for op in ops for case in benchmark.cases(op, which)]
    left = [case for case in spread(grid) if str(case) not in there]
    clock = timing.clock_for(device)
    measured, longest = 0, 0.0
    for case in left:
        begun = time.perf_counter()
        if begun - start + 1.2 * longest > options.left:
            print(f"no time for {case} and those after it", flush=True)
            break
        seconds = min(options.seconds, workload(case.op).SECONDS)
        found = measure(case, device, clock, seconds, choose=rehearsed if rehearsal else in_time)
        measured += 1
        # The first case also pays for torch.compile's start.
        if measured > 1:
            longest = max(longest, time.perf_counter() - begun)
        document["cases"] += found.records()
        document["cases"].sort(key=lambda record: place[describe(record)])
        document["seconds"] = before + round(time.perf_counter() - start)
        save(document, options.out)
        print(line(found, copy), flush=True)
    done = measured == len(left)
    host = {(record["op"], record["chain"]) for record in document["host"]}
    for op in ops if done else ():
        for chain in workload(op).HOST_CHAINS:
            if (op, chain) not in host:
                document["host"] += host_cost(op, device, chain, rounds=3 if rehearsal else 51)
    document["host"].sort(key=lambda record: names().index(record["op"]))
    document["seconds"] = before + round(time.perf_counter() - start)
    partial = save(document, options.out)
    if len(document["cases"]) == len(place) * len(DIRECTIONS) and done and not rehearsal:
        document["complete"] = True
        save(document, options.out)
        partial.unlink()
    total = len(grid) - len(left) + measured
    print(f"{total} of {len(grid)} cases, {len(DIRECTIONS)} directions each", flush=True)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
