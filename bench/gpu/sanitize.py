"""Stage "sanitize": bench/gpu/shapes.py once as it is, then under each tool of compute-sanitizer, on both backends."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.build import WORK
from bench.gpu.machine import tool
from bench.gpu.process import Finished, run
from bench.gpu.stage import Outcome, Settings, one_line, table, write_json, write_log
from bench.gpu.suite import environment

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("native", "triton")
# The tool's exit code for an error that it found; the program's own are 0 and 1.
_FOUND = 77
# A tool makes a process many times larger and slower; more at a time do not end sooner.
_AT_A_TIME = 4
_SHOWN = 6


@dataclass(frozen=True)
class Check:
    """What one run said.

    Attributes:
        errors: that the tool counted; None where it did not come to count.
        trouble: why this run proves nothing, or what it found.
    """

    backend: str
    tool: str
    errors: int | None
    cases: str
    trouble: str
    seconds: float
    unfinished: bool = False

    def row(self) -> list[object]:
        """For the table."""
        errors = "-" if self.errors is None else self.errors
        return [f"{self.backend} {self.tool}", errors, self.cases or "-", f"{self.seconds:.0f}"]


def errors_counted(text: str) -> int | None:
    """The number in the summary line of a tool; hazards of racecheck, warnings among them, count as errors."""
    races = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
    if races:
        return max(int(races[1]), int(races[2]) + int(races[3]))
    plain = re.findall(r"ERROR SUMMARY: (\d+) errors?", text)
    return sum(map(int, plain)) if plain else None


def judge(backend: str, name: str, finished: Finished) -> Check:
    """Read a run's output."""
    text = finished.text()
    cases = re.search(r"^(\d+ of \d+) cases right$", text, re.MULTILINE)
    errors = None if name == "plain" else errors_counted(text)
    trouble = ""
    if finished.stopped:
        trouble = f"stopped: {finished.stopped}"
    elif errors:
        trouble = f"{errors} errors"
    elif name != "plain" and errors is None:
        said = [line for line in text.splitlines() if re.search("not supported|Error|error|denied", line)]
        trouble = (
            f"the tool did not come to a summary: {one_line((said or finished.last_lines(1) or [''])[0])}"
        )
    elif finished.code != 0 or cases is None:
        wrong = [line for line in text.splitlines() if line.startswith("wrong: ")]
        last = (wrong or finished.last_lines(1) or ["no output"])[0]
        trouble = f"exit code {finished.code}: {one_line(last)}"
    return Check(
        *(backend, name, errors, cases[1] if cases else "", trouble, finished.seconds),
        unfinished=finished.stopped == "deadline",
    )


def first_reports(text: str) -> list[str]:
    """The first lines of what a tool reported, and of the results that were wrong."""
    lines = text.splitlines()
    reports = [
        f"{line.removeprefix('========= ')} {lines[place + 1].removeprefix('========= ').strip()}"
        for place, line in enumerate(lines[:-1])
        if re.match(r"========= (Invalid|Uninitialized|Error|Warning|Barrier|Program hit|Misaligned)", line)
    ]
    return [one_line(line) for line in dict.fromkeys(reports)]


def stage(settings: Settings) -> Outcome:
    """Run the plain passes, then the tools."""
    folder, machine = WORK / "sanitize", settings.machine
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    outcome = Outcome("sanitize")
    sanitizer = settings.sanitizer or tool("compute-sanitizer", "/usr/local/cuda/compute-sanitizer")
    variables = {**environment(machine), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def check(backend: str, name: str) -> Check:
        command: list[str | Path] = [sys.executable, "-m", "bench.gpu.shapes"]
        command += ["--backend", backend, "--device", machine.device]
        if name != "plain":
            assert sanitizer is not None
            options = "--report-api-errors no --show-backtrace device --print-limit 50 "
            options += f"--target-processes application-only --error-exitcode {_FOUND}"
            command = [sanitizer, "--tool", name, *options.split(), *command]
        more = {"TRITON_INTERPRET": "1"} if machine.rehearsal and backend == "triton" else {}
        log = folder / f"{backend}-{name}.log"
        return judge(backend, name, run(command, log, settings.deadline, {**variables, **more}))

    with ThreadPoolExecutor(min(settings.jobs or _AT_A_TIME, _AT_A_TIME)) as pool:
        # First without a tool: this also leaves Triton's compiled kernels where the others find them.
        checks = list(pool.map(lambda backend: check(backend, "plain"), BACKENDS))
        if sanitizer is not None and not (machine.rehearsal and settings.sanitizer is None):
            pairs = [(backend, name) for name in TOOLS for backend in BACKENDS]
            checks += list(pool.map(lambda pair: check(*pair), pairs))
        elif machine.rehearsal:
            outcome.summary.append("compute-sanitizer was not run: it needs a GPU")
        else:
            outcome.problems.append(
                "compute-sanitizer is neither on the PATH nor in CUDA's folders: put CUDA's bin folder on the PATH, or "
                "name it with SANITIZER="
            )
    outcome.summary += table(("run", "errors", "cases right", "seconds"), [each.row() for each in checks])
    for each in checks:
        if each.unfinished:
            outcome.unfinished.append(f"{each.backend} {each.tool}")
        elif each.trouble:
            outcome.problems.append(f"{each.backend} {each.tool}: {each.trouble}")
            reports = first_reports((folder / f"{each.backend}-{each.tool}.log").read_text(errors="replace"))
            outcome.summary += [f"    {each.backend} {each.tool}: {line}" for line in reports[:_SHOWN]]
    outcome.record = {
        "sanitizer": str(sanitizer.name) if sanitizer else None,
        "runs": [
            {
                "backend": each.backend,
                "tool": each.tool,
                "errors": each.errors,
                "cases right": each.cases,
                "trouble": each.trouble,
                "seconds": round(each.seconds, 1),
            }
            for each in checks
        ],
    }
    write_json(settings.out / "sanitize.json", outcome.record)
    write_log(settings.out / "sanitize.log", [WORK / "build.log", *sorted(folder.glob("*.log"))])
    return outcome
