"""Takes the measurements of stage "bench": the copy bandwidth first, then the grid, saved after every case.

    python -m bench.gpu.timing --device cuda --out build/gpu/results --seconds 2 --left 400

Cases come in an order that covers every op and dtype early, and none is begun that would not end in time. A complete
run is saved as bench/results/ has it, <machine>/<date>.json; until then it is <date>-partial.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from fastreg.cli import benchmark, summary, timing
from fastreg.cli.bench import save
from fastreg.cli.host import host_cost
from fastreg.cli.measure import Case, Measured, measure
from fastreg.cli.providers import COMPILE, Provider, providers_for
from fastreg.cli.workloads import BACKWARD, DIRECTIONS, FORWARD, Problem, names

# Both buffers are many times larger than any L2 cache.
_COPY_BYTES = 2**30
_REHEARSED_COPY_BYTES = 2**22
_REHEARSED_SHAPE = (64, 256)


def spread(cases: list[Case]) -> list[Case]:
    """The cases ordered so that every op and dtype has its first shape measured before any has its second."""
    kinds: dict[tuple[str, torch.dtype], list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.op, case.dtype), []).append(case)
    longest = max(map(len, kinds.values()))
    # Ordinary hidden sizes lie in the middle of the grid: from there outwards.
    middle = longest // 2
    order = sorted(range(longest), key=lambda place: abs(place - middle))
    return [kind[place] for place in order for kind in kinds.values() if place < len(kind)]


def warm_up(device: torch.device, seconds: float = 1.5) -> None:
    """Keep the GPU busy until its clocks have risen: an idle one copies slowly, and all shares would be too good."""
    if device.type == "cuda":
        buffer = torch.ones(2**28, device=device)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                buffer.mul_(1.0)
            torch.cuda.synchronize(device)


def uncompiled(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    """For a rehearsal: everybody but torch.compile, which would take most of its time."""
    found, missing = providers_for(problem)
    return [each for each in found if each.name != COMPILE], {**missing, COMPILE: "left out of the rehearsal"}


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
    options = parser.parse_args()
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
    copy = document["large_copy"]["gigabytes_per_second"]
    print(
        f"copy bandwidth: {copy} GB/s ({document['large_copy']['bytes']} bytes read and written)", flush=True
    )

    grid = benchmark.grid(device)
    if rehearsal:
        grid = [Case(op, *_REHEARSED_SHAPE, torch.float32) for op in names()]
    place = {case: index for index, case in enumerate(grid)}
    clock = timing.clock_for(device)
    measured: dict[Case, Measured] = {}
    longest = 0.0
    for case in spread(grid):
        begun = time.perf_counter()
        if begun - start + 1.2 * longest > options.left:
            print(f"no time for {case} and those after it", flush=True)
            break
        measured[case] = measure(
            *(case, device, clock, options.seconds), choose=uncompiled if rehearsal else providers_for
        )
        # The first case also pays for torch.compile's start.
        if len(measured) > 1:
            longest = max(longest, time.perf_counter() - begun)
        document["cases"] = [
            record for each in sorted(measured, key=place.__getitem__) for record in measured[each].records()
        ]
        document["seconds"] = round(time.perf_counter() - start)
        save(document, options.out)
        print(line(measured[case], copy), flush=True)
    complete = len(measured) == len(grid)
    if complete:
        for op in names():
            document["host"] += host_cost(op, device, rounds=3 if rehearsal else 51)
    document["seconds"] = round(time.perf_counter() - start)
    partial = save(document, options.out)
    if complete and not rehearsal:
        document["complete"] = True
        save(document, options.out)
        partial.unlink()
    print(f"{len(measured)} of {len(grid)} cases, {len(DIRECTIONS)} directions each", flush=True)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
