"""Takes the measurements of a stage named bench: the copy bandwidth first, then the grid, saved after every case.

    python -m bench.gpu.timing --device cuda --out build/gpu/results --seconds 2 --left 400 --ops layer_norm,rms_norm

Cases come in an order that covers every op, dtype, layout and chain early, and none is begun that would not end in
time. A run goes on where an earlier one of the same day, machine and commit ended. When all cases are there the
document is saved as bench/results/ has it, <machine>/<date>-<ops>.json; until then its name ends in -partial.

With ``--compile 3/8`` nothing is measured: every eighth case runs once, so that the caches of Triton and of
torch.compile have its kernels. Compiling takes longer than measuring, and eight processes do it on eight cores.
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

from fastreg.cli import bench, benchmark, summary, timing
from fastreg.cli.host import host_cost
from fastreg.cli.measure import Measured, Record, measure
from fastreg.cli.providers import COMPILE, Provider, providers_for
from fastreg.cli.workloads import BACKWARD, DIRECTIONS, FORWARD, Case, Problem, describe, names, workload

# Both buffers are many times larger than any L2 cache.
_COPY_BYTES = 2**30
_REHEARSED_COPY_BYTES = 2**22
# torch.compile, which takes seconds to compile each, is timed on these shapes alone.
_COMPILED = {
    "layer_norm": ((2**16, 1024), (2**14, 4096), (2**10, 65536)),
    "rms_norm": ((2**16, 1024), (2**14, 4096), (2**10, 65536)),
    "batch_norm": ((32, 512, 28, 28), (256, 256, 56, 56), (256, 1024, 14, 14)),
    "group_norm": ((8, 320, 64, 64), (1, 512, 64, 64), (2, 256, 100, 152)),
    "instance_norm": ((4, 64, 128, 128), (2, 64, 32, 32, 32)),
    "dropout": ((2**16, 1024), (256, 256, 1024)),
    "drop_block": ((256, 1024, 14, 14),),
    "dropout_add_layer_norm": ((2**16, 1024),),
    "dropout_add_rms_norm": ((2**16, 1024),),
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


def without(problem: Problem, reasons: dict[str, str]) -> tuple[list[Provider], dict[str, str]]:
    """Everybody but those that there is a reason for."""
    found, missing = providers_for(problem)
    return [each for each in found if each.name not in reasons], {**missing, **reasons}


def in_time(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    """Everybody whom there is time for."""
    reasons = {"reference": "plain PyTorch runs where no kernel does; a GPU's minutes go to the kernels"}
    if tuple(problem.input.shape) not in _COMPILED[problem.op]:
        reasons[COMPILE] = "timed on a few shapes only, since compiling takes seconds a case"
    return without(problem, reasons)


def rehearsed(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    """Everybody but torch.compile."""
    return without(problem, {COMPILE: "left out of the rehearsal"})


def continued(document: Record, out: Path) -> Record:
    """A new document with what an earlier run of the same ops, day, machine and commit measured before it ended.

    The copy bandwidth, which all shares are of, is the higher of the two.
    """
    path = bench.path_of(document, out)
    if not path.exists():
        return document
    earlier: Record = json.loads(path.read_text())
    if any(earlier.get(key) != document[key] for key in ("schema", "machine", "versions", "commit")):
        return document
    copies = (earlier["large_copy"], document["large_copy"])
    return {**earlier, "large_copy": max(copies, key=lambda copy: copy["gigabytes_per_second"])}


def run_once(case: Case, device: torch.device) -> str:
    """Run whatever compiles something for a case, forward and backward; what went wrong, in a line."""
    problem = case.problem(device)
    wrong = ""
    for provider in in_time(problem)[0]:
        if provider.name in (COMPILE, "triton"):
            try:
                with provider.context():
                    problem.results(provider.function)
            except Exception as error:  # noqa: BLE001 - a failure is a result, which the measurement will show
                wrong = f"{provider.name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return wrong


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
    parser.add_argument("--compile", help="3/8: only run every eighth case from the third on, once")
    options = parser.parse_args()
    ops = options.ops.split(",")
    start = time.perf_counter()
    rehearsal = options.device == "cpu"
    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    which = "rehearsal" if rehearsal else device.type
    grid = [case for op in ops for case in benchmark.cases(op, which)]
    if options.compile:
        part, parts = map(int, options.compile.split("/"))
        for case in spread(grid)[part - 1 :: parts]:
            if time.perf_counter() - start > options.left:
                return 3
            print(f"{case}: {run_once(case, device) or 'ran'}", flush=True)
        return 0
    warm_up(device)
    copy_size = _REHEARSED_COPY_BYTES if rehearsal else _COPY_BYTES
    document = benchmark.new_document(device, complete=False, ops=ops, copy_size=copy_size)
    document["commit"] = os.environ.get("FASTREG_COMMIT") or document["commit"]
    if rehearsal:
        document["rehearsal"] = True
        document["machine"]["slug"] = "rehearsal"
    document = continued(document, options.out)
    before = document["seconds"]
    copy = document["large_copy"]["gigabytes_per_second"]
    print(
        f"copy bandwidth: {copy} GB/s ({document['large_copy']['bytes']} bytes read and written)", flush=True
    )

    place = {str(case): index for index, case in enumerate(grid)}
    there = {describe(record) for record in document["cases"]}
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
        bench.save(document, options.out)
        print(line(found, copy), flush=True)
    done = measured == len(left)
    host = {(record["op"], record["chain"]) for record in document["host"]}
    for op in ops if done else ():
        for chain in workload(op).HOST_CHAINS:
            if (op, chain) not in host:
                document["host"] += host_cost(op, device, chain, rounds=3 if rehearsal else 51)
    document["host"].sort(key=lambda record: names().index(record["op"]))
    document["seconds"] = before + round(time.perf_counter() - start)
    partial = bench.save(document, options.out)
    if done and not rehearsal:
        document["complete"] = True
        bench.save(document, options.out)
        partial.unlink()
    total = len(grid) - len(left) + measured
    print(f"{total} of {len(grid)} cases, {len(DIRECTIONS)} directions each", flush=True)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
