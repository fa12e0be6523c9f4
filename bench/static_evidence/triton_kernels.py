"""The table of the Triton kernels: every configuration that the tests compile (tests/triton_offline.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product

import triton

from bench.static_evidence.machine_code import Resources
from bench.static_evidence.occupancy import WARP
from bench.static_evidence.record import Launch, Record, Table, record
from triton_batch_norm_offline import LAYERS as BATCH_NORMS
from triton_dropout_add_norm_offline import SHAPES as DROPOUT_ADD_NORMS
from triton_dropout_offline import CALLS as DROPOUTS
from triton_group_norm_offline import LAYERS as GROUP_NORMS
from triton_offline import ARCHITECTURES, SHAPES, Compilable, compilations

Compilation = tuple[Compilable, int]

# What is compiled, a group for each family of kernels.
GROUPS: tuple[tuple[Compilable, ...], ...] = (SHAPES, BATCH_NORMS, GROUP_NORMS, DROPOUTS, DROPOUT_ADD_NORMS)


def every_compilation() -> list[Compilation]:
    """Every shape for every architecture."""
    return [pair for group in GROUPS for pair in product(group, ARCHITECTURES)]


@cache
def compilations_by_turns() -> list[Compilation]:
    """About a third of them: every shape, and every kernel for every architecture.

    The first shape that reaches a kernel is compiled for all architectures, every other shape for one, by turns.
    """
    chosen: list[Compilation] = []
    for group in GROUPS:
        reached: set[str] = set()
        for place, shape in enumerate(group):
            kernels = kernels_of(shape)
            one = ARCHITECTURES[place % len(ARCHITECTURES)]
            chosen += [(shape, each) for each in ARCHITECTURES if each == one or not kernels <= reached]
            reached |= kernels
    return chosen


@cache
def compilations_left_out() -> frozenset[Compilation]:
    """Those that only a complete run makes."""
    return frozenset(every_compilation()) - frozenset(compilations_by_turns())


def kernels_of(shape: Compilable) -> set[str]:
    return {launch.kernel.__name__ for launch in shape.launches()}


def records(chosen: Iterable[Compilation]) -> Iterator[Record]:
    """Of every launch of every shape.

    Raises:
        ImpossibleLaunch: a launch would fail.
    """
    for (shape, architecture), results in compilations(chosen).items():
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


def table(chosen: Iterable[Compilation] | None = None) -> Table:
    """The table of the installed release of triton, of all compilations if none are given."""
    found = records(every_compilation() if chosen is None else chosen)
    return Table(f"triton {triton.__version__}", tuple(sorted(found, key=lambda each: each.key)))
