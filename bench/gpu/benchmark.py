"""The stages named bench: run bench/gpu/timing.py in time, report kernels against the copy bandwidth."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.build import WORK
from bench.gpu.process import run
from bench.gpu.stage import Outcome, Settings, one_line, table, write_log
from bench.gpu.suite import environment

# The ops, and seconds for the rounds of a case, of which there are 36, 120, 116 and 34.
STAGES = {
    "bench": (("layer_norm", "rms_norm"), 0.5),
    "bench_batch_norm": (("batch_norm",), 0.2),
    "bench_group_norm": (("group_norm", "instance_norm"), 0.2),
    "bench_dropout": (
        ("dropout", "drop_block", "dropout_add_layer_norm", "dropout_add_rms_norm"),
        0.3,
    ),
}
_REHEARSED_SECONDS = 0.1
# For the host's cost after the cases, and for the process to end.
_RESERVE = 15.0
_OURS = ("triton", "native")
_OTHERS = ("eager", "compile", "reference")
# Processes that compile; each also holds the tensors of a case.
_COMPILING = 14
# More lines than this are not read by anybody: the rest is in the document.
_MOST_CASES = 40


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def case_rows(document: dict[str, Any]) -> Iterator[list[object]]:
    """A row a case: of every provider what it moves forward and backward, over the copy bandwidth."""
    from fastreg.cli.workloads import describe

    copy = document["large_copy"]["gigabytes_per_second"]
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for record in document["cases"]:
        by_case.setdefault(describe(record), {})[record["direction"]] = record["providers"]
    for name_of_case, directions in by_case.items():
        row: list[object] = [name_of_case]
        for name in (*_OURS, *_OTHERS):
            for direction in ("forward", "backward"):
                rate = directions[direction].get(name, {}).get("gigabytes_per_second")
                if name in _OURS:
                    row.append("-" if rate is None else f"{rate:.0f}")
                row.append(_share(None if rate is None else rate / copy))
        yield row


CASE_HEADINGS = (
    "GB/s and % of copy: T triton, N native, E eager, C compile, R reference",
    *(column for name in _OURS for column in (f"{name[0].upper()} fwd", "%", f"{name[0].upper()} bwd", "%")),
    *(f"{name[0].upper()} {direction}" for name in _OTHERS for direction in ("fwd", "bwd")),
)


def mean_rows(document: dict[str, Any]) -> Iterator[list[object]]:
    """A row for each call, layout, dtype and direction, and one for each op: our backends over the others."""
    from fastreg.cli import summary
    from fastreg.cli.workloads import title

    copy = document["large_copy"]["gigabytes_per_second"]

    def row(name: str, records: list[dict[str, Any]]) -> list[object]:
        cells: list[object] = [name]
        for ours in _OURS:
            for other in ("eager", "compile"):
                found = [summary.ratio(record, other, ours) for record in records]
                cells.append(_times(summary.geometric_mean(each for each in found if each is not None)))
            rates = [record["providers"].get(ours, {}).get("gigabytes_per_second") for record in records]
            shares = summary.geometric_mean(rate / copy for rate in rates if rate is not None)
            cells.append(_share(shares))
        return cells

    records = document["cases"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        name = " ".join((title(record), record["dtype"], record["direction"]))
        kinds.setdefault(name, []).append(record)
    for name, alike in kinds.items():
        yield row(name, alike)
    for op in dict.fromkeys(each["op"] for each in records):
        yield row(f"{op}, all", [record for record in records if record["op"] == op])
    yield row("everything", records)


MEAN_HEADINGS = (
    "geometric means",
    *(f"{name} {column}" for name in _OURS for column in ("x eager", "x compile", "of copy")),
)


def stage(name: str, settings: Settings) -> Outcome:
    """Measure the ops of one of the stages and report."""
    machine, out = settings.machine, settings.out
    ops, seconds = STAGES[name]
    log = WORK / name / "timing.log"
    log.unlink(missing_ok=True)
    outcome = Outcome(name)
    command: list[str | Path] = [sys.executable, "-m", "bench.gpu.timing", "--device", machine.device]
    command += ["--out", out, "--seconds", str(_REHEARSED_SECONDS if machine.rehearsal else seconds)]
    command += ["--ops", ",".join(ops), "--left"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    variables = environment(machine)

    def left() -> str:
        return f"{max(0.0, settings.deadline.left - _RESERVE):.0f}"

    parts = 0 if machine.rehearsal else settings.jobs or max(1, min(_COMPILING, machine.cores - 2))

    def compile_part(part: int) -> None:
        # Its log alone says what went wrong: the measurement meets it again.
        where = WORK / name / f"compile-{part}.log"
        where.unlink(missing_ok=True)
        run([*command, left(), "--compile", f"{part}/{parts}"], where, settings.deadline, variables)

    with ThreadPoolExecutor(max(1, parts)) as pool:
        list(pool.map(compile_part, range(1, parts + 1)))
    if parts:
        outcome.summary.append(f"compiled by {parts} processes, until {settings.deadline.used:.0f} s")
    variables["OMP_NUM_THREADS"] = str(max(1, machine.cores // 2))
    command.append(left())
    finished = run(command, log, settings.deadline, variables)
    write_log(out / f"{name}.log", [WORK / "build.log", *sorted((WORK / name).glob("*.log"))])
    written = [path for path in out.glob("*/*.json") if before.get(path) != path.stat().st_mtime_ns]
    if finished.code == 3 or finished.stopped:
        outcome.unfinished.append(f"{finished.stopped or 'some cases did not fit'}: {finished.last_lines(1)}")
    elif finished.code != 0:
        outcome.problems.append(
            f"exit code {finished.code}: {one_line(' | '.join(finished.last_lines(3)), 400)}"
        )
    if not written:
        outcome.problems.append("no case was measured")
        return outcome
    path = max(written, key=lambda each: each.stat().st_mtime_ns)
    document = json.loads(path.read_text())
    report(document, outcome)
    where = path.relative_to(out)
    if machine.rehearsal:
        outcome.summary.append(f"saved {where}, a rehearsal: no result of any machine")
    else:
        outcome.summary.append(
            f"saved {where}; copied into bench/results/, `python -m bench.report` shows it"
            if "-partial" not in where.name
            else f"saved {where}, which lacks cases: bench/results/ takes complete ones only. The stage goes on with "
            "it on the same day, with the same OUT"
        )
    return outcome


def report(document: dict[str, Any], outcome: Outcome) -> None:
    """The tables, the means and what went wrong."""
    from fastreg.cli import benchmark, summary

    copy = document["large_copy"]
    legend, *headings = CASE_HEADINGS
    rows = list(case_rows(document))
    outcome.summary += [legend, *table(("", *headings), rows[:_MOST_CASES])]
    if len(rows) > _MOST_CASES:
        outcome.summary.append(f"... and {len(rows) - _MOST_CASES} more cases in the document")
    outcome.summary += table(MEAN_HEADINGS, list(mean_rows(document)))
    outcome.summary += [f"not timed: {one_line(each)}" for each in summary.untimed(document)[:6]]
    unrest = summary.unrest(document)
    if unrest > 0.1:
        outcome.summary.append(
            f"{100 * unrest:.0f} % of timings scatter by half or more: the machine was busy"
        )
    copies = [record["copy"]["gigabytes_per_second"] for record in document["cases"]]
    if copies:
        outcome.summary.append(
            f"copies of the inputs, between the kernels: {min(copies)} to {max(copies)} GB/s"
        )
    outcome.summary.append(
        f"copy bandwidth, measured first: {copy['gigabytes_per_second']} GB/s, {copy['bytes'] / 2**30:.3g} GiB read "
        "and written; all shares are of it"
    )
    outcome.problems += [f"wrong: {one_line(each)}" for each in benchmark.red(document)[:6]]
