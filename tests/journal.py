"""Writes what becomes of each test into a file, a line of JSON at a time; a run that is killed leaves it behind.

A line is one of

    {"collected": 412}                                   how many tests this process will run
    {"started": "tests/test_nn.py::test_hooks_run[...]"}
    {"test": ..., "outcome": "passed", "seconds": 0.21, "message": ""}

with the outcomes passed, failed, skipped and error (in a fixture), for a message what was raised, in a line, and for
what failed the end of its traceback as "details".
Tests that the file names already, be it only as started, are not run: after a crash the next process goes on with the
rest. A CUDA error that poisons its process's context would fail every test after it as well, so the process ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

# Told apart from pytest's own exit codes.
CONTEXT_LOST = 86
_MESSAGE, _DETAILS = 400, 4000


class Journal:
    """The plugin that conftest.py registers for ``--journal``."""

    def __init__(self, path: Path, device: str) -> None:
        self._device = device
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._done = {record.get("test") or record.get("started") for record in known}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._failed: tuple[str, str, str] | None = None
        self._seconds = 0.0
        self._skipped: str | None = None

    def _write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._done]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._done]
        self._write(collected=len(items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._failed, self._skipped, self._seconds = None, None, 0.0
        self._write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.failed and self._failed is None:
            outcome = "failed" if report.when == "call" else "error"
            self._failed = (outcome, message_of(report), report.longreprtext[-_DETAILS:])
        elif report.skipped:
            self._skipped = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, message, details = self._failed or ("passed", "", "")
        if self._failed is None and self._skipped is not None:
            outcome, message = "skipped", self._skipped
        more = {"details": details} if details else {}
        self._write(test=nodeid, outcome=outcome, seconds=round(self._seconds, 3), message=message, **more)
        if self._failed is not None and self._device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"the CUDA context is lost after {nodeid}: {error}", returncode=CONTEXT_LOST)


def message_of(report: pytest.TestReport) -> str:
    """What was raised, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else str(crash.message)
    return " ".join(text.split())[:_MESSAGE] or "no message"
