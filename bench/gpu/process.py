"""One command with a log, a deadline and a watch; whatever it started is ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_GRACE = 3.0
_POLL = 0.1

_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.limit = seconds

    @property
    def left(self) -> float:
        """Seconds that remain; never negative."""
        return max(0.0, self.end - time.monotonic())

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal; None where it was stopped.
        stopped: why it was stopped: "deadline", or what the watch said; empty where it ended by itself.
    """

    code: int | None
    stopped: str
    seconds: float
    log: Path

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def last_lines(self, count: int) -> list[str]:
        """The last lines that say something."""
        return [line for line in self.text().splitlines() if line.strip()][-count:]


def run(
    command: Sequence[object],
    log: Path,
    deadline: Deadline,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[], str] = lambda: "",
) -> Finished:
    """Run a command, its output appended to ``log``, until it ends, the deadline passes or ``watch`` gives a reason."""
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {' '.join(map(str, command))}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return Finished(127, "", time.monotonic() - start, log)
        with _lock:
            _running.add(process)
        try:
            stopped = _wait(process, deadline, watch)
        finally:
            _end(process)
            with _lock:
                _running.discard(process)
        if stopped:
            output.write(f"\nstopped after {time.monotonic() - start:.0f} s: {stopped}\n".encode())
    return Finished(None if stopped else process.returncode, stopped, time.monotonic() - start, log)


def _wait(process: subprocess.Popen[bytes], deadline: Deadline, watch: Callable[[], str]) -> str:
    while process.poll() is None:
        if deadline.left == 0:
            return "deadline"
        reason = watch()
        if reason:
            return reason
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and all that it started: politely, then not."""
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        # A process that waits for a hung GPU may outlast even SIGKILL for a while; it is not waited for.
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if number == signal.SIGTERM and not _group_lives(process.pid):
                return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_all() -> None:
    """End every command that still runs."""
    with _lock:
        left = list(_running)
    for process in left:
        _end(process)
