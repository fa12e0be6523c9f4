"""Proves of a run of some of the tests that it interpreted every Triton kernel."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

from bench.static_evidence import RESULTS
from bench.static_evidence.record import read


class InterpretedKernels:
    """The plugin that conftest.py registers for ``--every-kernel``: the run fails where a kernel was left out."""

    def __init__(self) -> None:
        self._left = {each.kernel for each in read(RESULTS / "triton.json").records}
        self._count = len(self._left)
        launch = GridExecutor.__call__

        @wraps(launch)
        def launched(executor: Any, *arguments: Any, **options: Any) -> Any:
            self._left.discard(executor.fn.__name__)
            return launch(executor, *arguments, **options)

        GridExecutor.__call__ = launched

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        names = ", ".join(sorted(self._left))
        terminalreporter.write_line(
            f"fastreg: not interpreted: {names}"
            if names
            else f"fastreg: all {self._count} kernels interpreted"
        )
