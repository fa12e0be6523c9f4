"""``python -m fastreg bench``: runs the benchmark with a progress bar, saves its result file and prints the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastreg.cli import benchmark, summary, workloads
from fastreg.cli.benchmark import Plan
from fastreg.cli.measure import Record
from fastreg.cli.workloads import BOTH, title

# On a quiet machine a few timings in a hundred scatter this much.
_UNREST = 0.1


def progress_bar(console: Console) -> Progress:
    """The progress bar of every long command."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def run(plan: Plan, console: Console) -> Record:
    """Take all steps of a plan and return its document."""
    with progress_bar(console) as progress:
        task = progress.add_task("copy bandwidth", total=plan.steps)
        document = benchmark.new_document(plan.device, plan.complete, plan.ops)
        for done, step in enumerate(plan.run(document)):
            progress.update(task, description=step, completed=done)
    return document


def path_of(document: Record, directory: Path) -> Path:
    """``<directory>/<machine>/<date>.json``; where it is not of all ops, with their names behind the date.

    A run of a part of the grid goes to ``<date>-partial.json``, so that it never stands in for a complete one.
    """
    ops = document["ops"] if document["ops"] != list(workloads.names()) else []
    name = "-".join([document["date"], *ops, *([] if document["complete"] else ["partial"])])
    return directory / str(document["machine"]["slug"]) / f"{name}.json"


def save(document: Record, directory: Path) -> Path:
    """Write the document to its place, replacing the same day's."""
    path = path_of(document, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(document))
    return path


def as_text(document: Record) -> str:
    """The document as JSON with a line for each record, so that two results can be compared line by line."""
    lists = {key: value for key, value in document.items() if key in ("cases", "host")}
    text = json.dumps({**document, **dict.fromkeys(lists, 0)}, indent=1)
    for key, records in lists.items():
        lines = ",\n  ".join(json.dumps(record) for record in records)
        text = text.replace(f'"{key}": 0', f'"{key}": [\n  {lines}\n ]' if records else f'"{key}": []', 1)
    return text + "\n"


def case_table(name: str, records: list[Record], providers: list[str]) -> Table:
    """The table of some cases of one call in one layout."""
    picked = summary.picked(records)
    heading = f"{name}: times in ms; GB/s, share of copy and speed-ups of {picked}, which fastreg picks"
    # No frame and the short names, or the table would need more columns than a terminal has.
    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    columns = summary.case_columns(providers, str)
    for position, (name, _) in enumerate(columns):
        table.add_column(name, justify="left" if position < 3 else "right", no_wrap=True)
    for record in records:
        table.add_row(*(show(record) for _, show in columns), end_section=record["direction"] == BOTH)
    return table


def print_cases(document: Record, console: Console) -> None:
    """A table for each call and layout."""
    found: dict[str, list[Record]] = {}
    for record in document["cases"]:
        found.setdefault(title(record), []).append(record)
    for name, records in found.items():
        console.print(case_table(name, records, summary.timed_providers({"cases": records})))


def print_summary(document: Record, console: Console) -> None:
    """The tables, the geometric means and everything that was not timed."""
    console.print(f"\n[bold]{summary.machine_line(document)}[/bold]")
    copy = document["large_copy"]
    console.print(f"copy bandwidth of a large buffer: {copy['gigabytes_per_second']} GB/s")
    print_cases(document, console)
    print_means(document, console)
    if document["host"]:
        table = Table(
            "op",
            "call",
            "torch, µs",
            "fastreg, µs",
            "fastreg / torch",
            title="host cost of a call on 16 elements",
        )
        for row in summary.host_rows(document):
            table.add_row(*row)
        console.print(table)
    print_notes(document, console)


def print_notes(document: Record, console: Console) -> None:
    """What was not timed and why, and whether the machine was too busy for the figures to mean much."""
    share = summary.unrest(document)
    if share > _UNREST:
        text = f"{summary.percent(share)} of timings scatter by half or more: this machine is busy with something else"
        console.print(text, style="bold yellow", highlight=False)
    for line in summary.untimed(document):
        console.print(f"not timed: {line}", style="yellow", markup=False, highlight=False)


def print_means(document: Record, console: Console) -> None:
    """The geometric means over the shapes."""
    title = (
        "geometric means over the shapes: fastreg's speed over the other's, and the bytes kept for backward"
    )
    table = Table(title=title)
    for heading in ("what", "cases", "vs eager", "vs compile", "of copy", "worst vs eager", "kept"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for found in summary.groups(document) + summary.overall(document):
        figures = (summary.times(found.eager), summary.times(found.compile), summary.percent(found.share))
        rest = (summary.times(found.worst), summary.percent(found.saved))
        table.add_row(" ".join(found.name), str(found.cases), *figures, *rest)
    console.print(table)


def command(plan: Plan, directory: Path, console: Console) -> int:
    """Run, save, print; 1 where a backend of ours is not right."""
    document: dict[str, Any] = run(plan, console)
    path = save(document, directory)
    print_summary(document, console)
    console.print(f"\n{document['seconds']} s; saved {path}")
    failures = benchmark.red(document)
    for line in failures:
        console.print(f"RED: {line}", style="bold red", markup=False, highlight=False)
    return 1 if failures else 0
