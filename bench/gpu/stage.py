"""What the stages have in common: their settings, what comes of one, and the files that it leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.machine import Machine
from bench.gpu.process import Deadline

# A file of results may be carried to another machine: short enough for that, and the end of a log tells most.
_LOG_BYTES = 8 * 2**20
_WIDTH = 150


@dataclass(frozen=True)
class Settings:
    """What a stage is asked to do.

    Attributes:
        jobs: processes at a time; None: as many as fit.
        tests: what pytest is given.
        backends: those that are tested.
        sanitizer: compute-sanitizer; None: wherever it is found.
    """

    machine: Machine
    out: Path
    deadline: Deadline
    jobs: int | None = None
    tests: tuple[str, ...] = ("tests",)
    backends: tuple[str, ...] = ("native", "triton", "reference")
    sanitizer: Path | None = None


@dataclass
class Outcome:
    """What came of a stage.

    Attributes:
        summary: its last lines.
        problems: why it failed; nothing where all is well.
        unfinished: what the deadline cut off.
        record: for its result file.
    """

    stage: str
    summary: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """In a word."""
        if self.unfinished:
            return "NOT FINISHED"
        return "FAILED" if self.problems else "ok"


def one_line(text: str, width: int = _WIDTH) -> str:
    """The text in one line of at most so many characters."""
    flat = re.sub(r"\s+", " ", text).strip()
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def write_json(path: Path, record: dict[str, Any]) -> None:
    """A result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def write_log(path: Path, logs: Sequence[Path]) -> None:
    """The logs in one file, the middle left out of those that are too long."""
    parts = [(each.name, each.read_bytes()) for each in logs if each.exists()]
    share = _LOG_BYTES // max(1, len(parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as output:
        for name, text in parts:
            output.write(f"\n===== {name} =====\n".encode())
            if len(text) > share:
                output.write(text[: share // 2])
                output.write(f"\n[... {len(text) - share} bytes left out ...]\n".encode())
                text = text[-(share // 2) :]
            output.write(text)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines with aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(headings))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
