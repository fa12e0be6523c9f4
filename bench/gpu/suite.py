"""Stage "tests": the whole suite on every backend, cut into shards, each a pytest process of its own.

Processes, and not one run, for three reasons: Triton compiles a thousand kernels here, which takes one core a quarter
of an hour; a kernel that hangs or poisons its CUDA context takes its process with it and nothing else, and the next
process goes on with the tests that are left; and tests/journal.py has written down what became of each test so far.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu.build import ROOT, WORK
from bench.gpu.machine import Machine, tool
from bench.gpu.process import Deadline, Finished, run
from bench.gpu.stage import Outcome, Settings, one_line, table, write_json, write_log

# The longest test compiles some hundred kernels, beside a dozen other processes that do the same.
HANGS_AFTER = 180.0
# tests/journal.py
_CONTEXT_LOST = 86
_CANNOT_TEST = {2: "it was interrupted", 3: "internal error or no such backend", 4: "it was called wrongly"}
# Of a GPU's memory, for a process that runs tests: its context, and tensors beyond 2^31 elements now and then.
_MEMORY = 5 * 2**30
# More of Triton's than run at a time: should time run out, some tests of every file are missing, and not all of the
# last files'.
_SHARDS = {"triton": 30, "native": 8, "reference": 1}
_SHOWN = 4
# Of the failures in the result file, which is to stay short.
_LISTED, _DETAILED = 2000, 60

FEATURES = ROOT / "tests" / "cuda_sim" / "features.cu"


def environment(machine: Machine) -> dict[str, str]:
    """For every process of every stage: caches in the build folder, one thread each, and no way to fetch anything."""
    return {
        "TRITON_CACHE_DIR": str(WORK / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "FASTREG_BACKEND": "",
    }


@dataclass
class Shard:
    """Some of a backend's tests.

    Attributes:
        trouble: why its process could not go on.
        unfinished: stopped by the deadline.
    """

    backend: str
    device: str
    part: int
    parts: int
    folder: Path
    trouble: str = ""
    unfinished: bool = False
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """For its files."""
        return f"{self.backend}-{self.device}-{self.part}"

    @property
    def journal(self) -> Path:
        """What becomes of its tests."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        """What pytest prints."""
        return self.folder / f"{self.name}.log"

    def records(self) -> list[dict[str, Any]]:
        """The journal so far; a line that is being written is left out."""
        if not self.journal.exists():
            return []
        lines = self.journal.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def under_way(self) -> str | None:
        """The test that has started and not ended."""
        records = self.records()
        return records[-1].get("started") if records else None

    def note(self, test: str, outcome: str, message: str) -> None:
        """Write down what became of a test whose process cannot."""
        with self.journal.open("a") as output:
            output.write(
                json.dumps({"test": test, "outcome": outcome, "seconds": 0, "message": message}) + "\n"
            )


def run_shard(shard: Shard, tests: tuple[str, ...], deadline: Deadline, variables: Mapping[str, str]) -> None:
    """Run a shard's tests; where a process dies over one or hangs in it, note that and go on with the next."""
    command = [
        *(sys.executable, "-m", "pytest", *tests, "--backend", shard.backend, "--device", shard.device),
        *("--shard", f"{shard.part}/{shard.parts}", "--journal", shard.journal),
        *("-q", "--tb=short", "-p", "no:cacheprovider"),
    ]
    start = time.monotonic()
    while True:
        if deadline.left == 0:
            shard.unfinished = True
            return
        before = len(shard.records())
        finished = run(command, shard.log, deadline, variables, _hang_watch(shard.journal))
        shard.seconds = time.monotonic() - start
        if finished.stopped == "deadline":
            shard.unfinished = True
            return
        if finished.code in (0, 1, 5):
            return
        test = shard.under_way()
        if test is not None:
            shard.note(test, "crashed", finished.stopped or f"its process ended with code {finished.code}")
        elif finished.code != _CONTEXT_LOST:
            why = finished.stopped or _CANNOT_TEST.get(finished.code or 0, f"exit code {finished.code}")
            said = [line for line in finished.last_lines(3) if not line.startswith("$ ")]
            shard.trouble = one_line(f"{why}: {' | '.join(said)}", 300)
            return
        if len(shard.records()) <= before:
            shard.trouble = "it makes no progress"
            return


def _hang_watch(journal: Path) -> Callable[[], str]:
    start = time.time()

    def watch() -> str:
        touched = journal.stat().st_mtime if journal.exists() else start
        silent = time.time() - max(start, touched)
        return f"it hangs: nothing for {HANGS_AFTER:.0f} s" if silent > HANGS_AFTER else ""

    return watch


@dataclass
class Results:
    """What became of one backend's tests."""

    backend: str
    collected: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    skips: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    trouble: list[str] = field(default_factory=list)
    unfinished: bool = False

    @property
    def not_run(self) -> int:
        """Collected, and nothing is known of it."""
        return self.collected - self.counts.total()

    def row(self) -> list[object]:
        """For the table."""
        counts = [self.counts[key] for key in ("passed", "failed", "error", "crashed", "skipped")]
        return [self.backend, self.collected, *counts, self.not_run, f"{self.seconds:.0f}"]

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "collected": self.collected,
            **dict(self.counts),
            "not run": self.not_run,
            "finished": not self.unfinished,
            "seconds": round(self.seconds, 1),
            "trouble": self.trouble,
            "wrong": [
                {key: value for key, value in record.items() if key != "details" or place < _DETAILED}
                for place, record in enumerate(self.wrong[:_LISTED])
            ],
            "skips": dict(self.skips),
            "slowest": self.slowest,
        }


HEADINGS = ("backend", "collected", "passed", "failed", "errors", "crashed", "skipped", "not run", "seconds")


def results_of(backend: str, shards: list[Shard]) -> Results:
    """Add up a backend's shards."""
    found = Results(backend)
    for shard in shards:
        records = shard.records()
        found.collected += next((record["collected"] for record in records if "collected" in record), 0)
        found.seconds = max(found.seconds, shard.seconds)
        found.unfinished |= shard.unfinished
        if shard.trouble and shard.trouble not in found.trouble:
            found.trouble.append(shard.trouble)
        for record in records:
            if "test" not in record:
                continue
            found.counts[record["outcome"]] += 1
            found.slowest.append((record["seconds"], record["test"]))
            if record["outcome"] == "skipped":
                found.skips[record["message"].removeprefix("Skipped: ")] += 1
            elif record["outcome"] != "passed":
                found.wrong.append(record)
        test = shard.under_way()
        if shard.unfinished and test is not None:
            found.trouble.append(f"the deadline met it in {test}")
    found.slowest = sorted(found.slowest, reverse=True)[:15]
    return found


def unexpected_skips(name: str, found: Results, folder: Path) -> list[str]:
    """What .ci/check_report.py says of the skips, which are held to the same list as everywhere."""
    suite = ElementTree.Element("testsuite")
    for _ in range(found.counts.total() - found.counts["skipped"]):
        ElementTree.SubElement(suite, "testcase")
    for reason in found.skips.elements():
        case = ElementTree.SubElement(suite, "testcase")
        ElementTree.SubElement(case, "skipped", message=reason)
    report = folder / f"{name}.xml"
    ElementTree.ElementTree(suite).write(report)
    command = [sys.executable, str(ROOT / ".ci" / "check_report.py"), name, str(report)]
    checked = subprocess.run(command, capture_output=True, text=True)
    return checked.stderr.strip().splitlines() if checked.returncode else []


def run_features(machine: Machine, deadline: Deadline) -> Finished | str:
    """Build tests/cuda_sim/features.cu for the GPU and run it: it checks itself and prints a line a feature.

    Returns how it ended, or why it was not run.
    """
    if machine.rehearsal:
        return "needs a GPU"
    if not FEATURES.exists():
        return f"there is no {FEATURES.relative_to(ROOT)}"
    log, program = WORK / "tests" / "features.log", WORK / "features"
    log.unlink(missing_ok=True)
    compiler = tool("nvcc") or Path("nvcc")
    command = [
        *(compiler, "-std=c++20", f"-arch=sm_{machine.capability}"),
        *(f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'tests' / 'cuda_sim'}", FEATURES, "-o", program),
    ]
    compiled = run(command, log, deadline)
    if compiled.code != 0:
        return compiled
    log.unlink()
    return run([program], log, deadline)


def _workers(settings: Settings) -> int:
    if settings.jobs is not None:
        return settings.jobs
    machine = settings.machine
    cores = max(1, machine.cores - 2) if machine.cores > 2 else machine.cores
    return cores if machine.rehearsal else max(1, min(cores, machine.memory // _MEMORY))


def stage(settings: Settings) -> Outcome:
    """Run the tests and say what came of them."""
    machine, folder = settings.machine, WORK / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.jsonl"), *folder.glob("*.log")):
        old.unlink()
    parts = {backend: 1 if machine.rehearsal else _SHARDS[backend] for backend in settings.backends}
    shards = [
        Shard(backend, machine.device, part, parts[backend], folder)
        for backend in settings.backends
        for part in range(1, parts[backend] + 1)
    ]
    variables = environment(machine)
    workers = _workers(settings)
    with ThreadPoolExecutor(workers) as pool:
        features: Future[Finished | str] = pool.submit(run_features, machine, settings.deadline)
        waiting = [
            pool.submit(run_shard, shard, settings.tests, settings.deadline, variables) for shard in shards
        ]
        for each in waiting:
            each.result()
    results = [
        results_of(backend, [shard for shard in shards if shard.backend == backend])
        for backend in settings.backends
    ]
    outcome = _outcome(settings, results, features.result())
    outcome.record["processes"] = workers
    write_json(settings.out / "tests.json", outcome.record)
    write_log(
        settings.out / "tests.log", [WORK / "build.log", folder / "features.log", *(s.log for s in shards)]
    )
    return outcome


def shown(found: Results) -> list[str]:
    """The first failures that differ by more than their numbers, each with a line of its error."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in found.wrong:
        kinds.setdefault(re.sub(r"[\d.]+", "#", record["message"]), []).append(record)
    lines = []
    for alike in list(kinds.values())[:_SHOWN]:
        more = f" (and {len(alike) - 1} alike)" if len(alike) > 1 else ""
        lines.append(f"{alike[0]['outcome'].upper()} {found.backend} {alike[0]['test']}{more}")
        lines.append(f"    {one_line(alike[0]['message'])}")
    if len(kinds) > _SHOWN:
        lines.append(
            f"    ... and {len(kinds) - _SHOWN} more kinds of failure of {found.backend} in tests.json"
        )
    return lines


def _outcome(settings: Settings, results: list[Results], features: Finished | str) -> Outcome:
    machine = settings.machine
    outcome = Outcome("tests", summary=table(HEADINGS, [found.row() for found in results]))
    for found in results:
        name = f"{found.backend}-{machine.device}"
        complaints = (
            [] if found.unfinished or not found.counts else unexpected_skips(name, found, WORK / "tests")
        )
        outcome.problems += [f"{found.backend}: {text}" for text in [*found.trouble, *complaints]]
        if found.wrong:
            outcome.problems.append(f"{found.backend}: {len(found.wrong)} tests failed")
        if not found.counts and not found.unfinished:
            outcome.problems.append(f"{found.backend}: no test ran")
        if found.unfinished:
            outcome.unfinished.append(f"{found.backend}: {found.not_run} of its tests did not run or end")
        outcome.summary += shown(found)
    outcome.record = {
        "backends": {found.backend: found.as_dict() for found in results},
        "features": features if isinstance(features, str) else features.text().splitlines()[-200:],
    }
    if isinstance(features, str):
        outcome.summary.append(f"CUDA features: not run: {features}")
    else:
        lines = features.text().splitlines()[1:]
        outcome.summary.append(f"CUDA features: exit code {features.code}, {len(lines)} lines")
        if features.stopped:
            outcome.unfinished.append(f"CUDA features: {features.stopped}")
        elif features.code != 0:
            outcome.problems.append(f"CUDA features: exit code {features.code}")
            outcome.summary += [f"    {one_line(line)}" for line in features.last_lines(4)]
    return outcome
