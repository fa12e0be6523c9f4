"""Real processes for tests of what spans several: started once, joined by gloo, then asked to run functions.

    with Processes(3, backend="reference", device="cpu") as processes:
        results = processes.run(function, argument)     # function(argument) in each; what it returned, by rank

``function`` has to be a function of a module, since it travels by its name. The processes meet through a file, so no
port has to be free. Where one of them fails, the others may wait for it for ever: all are killed, and ``run`` raises
with the traceback of the rank that failed first. The next ``run`` starts new ones.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Time that the others have to fail for a reason of their own once one has failed, in seconds.
_GRACE = 1.0


class ProcessFailed(AssertionError):
    """A process raised, died, or did not answer in time; the text has its traceback."""


class Processes:
    """``world`` processes, each a rank of one process group, with the backend under test requested.

    Args:
        world: how many.
        backend, device: as on the tests' command line.
        timeout: seconds that starting, and each ``run``, may take.
    """

    def __init__(self, world: int, *, backend: str, device: str, timeout: float = 180) -> None:
        self.world, self.backend, self.device, self.timeout = world, backend, device, timeout
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            try:
                connection.send(None)
            except OSError:
                # It has gone already.
                break
        for process in self._processes:
            process.join(timeout=5)
        self._kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returns in each process, by rank.

        Raises:
            ProcessFailed: it raised in one of them, or did not return in time.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        return self._answers(getattr(function, "__name__", str(function)))

    def _start(self) -> None:
        # Forked from one process that has imported the large packages once, and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "pytest", "hypothesis", "numpy"])
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{self._folder.name}/store"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            options = (rank, self.world, store, self.backend, self.device, self.timeout, theirs)
            process = context.Process(target=_serve, args=options, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._answers("starting")

    def _answers(self, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + self.timeout
        waiting = dict(zip(self._connections, range(self.world), strict=True))
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                failure = None
                try:
                    failure, results[rank] = connection.recv()
                except EOFError:
                    self._processes[rank].join(timeout=5)
                    failure = f"it died, exit code {self._processes[rank].exitcode}"
                if failure is not None:
                    failures.append(f"rank {rank} of {self.world}, {what}: {failure}")
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if waiting and not failures:
            failures.append(f"{what}: no answer in {self.timeout} s from ranks {sorted(waiting.values())}")
        if failures:
            self._kill()
            raise ProcessFailed("\n".join(failures))
        return [results[rank] for rank in range(self.world)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None


def _serve(
    rank: int, world: int, store: str, backend: str, device: str, timeout: float, connection: Connection
) -> None:
    """The life of a process: answer with (traceback or None, result), first for having started."""
    function: Callable[..., Any] = _join
    arguments: tuple[Any, ...] = (rank, world, store, backend, device, timeout)
    while True:
        try:
            answer = None, function(*arguments)
        except BaseException:  # noqa: BLE001  whatever it was, the one who asked has to know
            answer = traceback.format_exc(), None
        connection.send(answer)
        try:
            request = connection.recv()
        except EOFError:
            break
        if request is None:
            break
        function, arguments = request
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _join(rank: int, world: int, store: str, backend: str, device: str, timeout: float) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    if backend == "triton" and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        import triton_interpreter

        triton_interpreter.install()
    from backend_under_test import select

    select(backend, device)
    # The machine's name need not resolve to an address of its own; the loopback interface is always there.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    engine = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # NCCL wants a GPU for each process; gloo takes CUDA tensors too.
        engine = "nccl" if torch.cuda.device_count() >= world else "gloo"
    torch.distributed.init_process_group(
        engine, init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
