"""The table of the Triton kernels: every configuration that the tests compile (tests/triton_offline.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import triton

from bench.static_evidence.machine_code import Resources
from bench.static_evidence.occupancy import WARP
from bench.static_evidence.record import Launch, Record, Table, record
from triton_batch_norm_offline import LAYERS
from triton_offline import ARCHITECTURES, SHAPES, Compilable, compilations


def records(
    shapes: Iterable[Compilable] = (*SHAPES, *LAYERS), architectures: Iterable[int] = ARCHITECTURES
) -> Iterator[Record]:
    """Of every launch of every shape.

    Raises:
        ImpossibleLaunch: a launch would fail.
    """
    for (shape, architecture), results in compilations(product(shapes, architectures)).items():
        for result in results.result():
            threads = result.warps * WARP
            yield record(
                kernel=result.kernel,
                configuration=str(shape),
                architecture=architecture,
                resources=Resources(result.registers, result.stack_bytes, static_shared_bytes=0),
                accesses=result.accesses,
                maximum_threads=threads,
                # Triton asks for all of its shared memory at the launch.
                launches=[Launch(threads, result.shared_bytes)],
            )


def table() -> Table:
    """The table of the installed release of triton."""
    return Table(f"triton {triton.__version__}", tuple(sorted(records(), key=lambda each: each.key)))
