"""Launch configurations of the dropout kernels: pure functions of sizes, testable without Triton or a GPU.

A thread takes *runs* of adjacent elements: as many as it loads with 16 bytes, or of 16-bit elements beside float32 ones
half of that, so that no access has gaps between threads. Eight 16-bit lanes make a Philox block, so a run of eight
costs one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastreg import _units
from fastreg._units import Geometry
from fastreg.backends.triton._launch import LANES, VECTOR_BYTES, ceil_div, next_power_of_two

ELEMENTS, SHARED, ADJACENT, BORDER = range(4)
"""How the units lie in a run: each element is one, all elements share one, each has the one after the last element's,
or there may be a border between one unit and the next."""

WARPS = 4
# Of a thread: addresses and the keys of the random stream, which it computes once, cost it less of each element.
_ELEMENTS = 16
# A strip of columns is whole sectors and no wider than a warp's loads, so that a program adds up several rows at once.
_STRIP = 256
# Programs of a multiprocessor that add up over rows, and tiles of each: a program leaves a row of partial sums.
_RESIDENT = 4
_TILES_A_PROGRAM = 4


@dataclass(frozen=True)
class Elementwise:
    """One stretch of memory a program.

    Attributes:
        run: adjacent elements of a thread.
        runs: of a program.
        parts: that the last program takes its runs in.
        units: how the units lie in a run.
        unit_length, unit_columns: of ``keep`` in _dropout_tiles.py.
        skip: runs of which nothing is kept are not read.
        programs: of the launch.
        warps: of a program.
    """

    run: int
    runs: int
    parts: int
    units: int
    unit_length: int
    unit_columns: int
    skip: bool
    programs: int
    warps: int = WARPS


@dataclass(frozen=True)
class Sums:
    """Sums over rows, of a strip of columns and of rows a fixed stride apart a program.

    Attributes:
        run: adjacent elements of a thread.
        rows, runs: of a tile.
        units, unit_length, unit_columns, skip: as of ``Elementwise``.
        strips: programs that share the columns.
        row_programs: programs that share the rows; each leaves a row of partial sums.
        warps: of a program.
    """

    run: int
    rows: int
    runs: int
    units: int
    unit_length: int
    unit_columns: int
    skip: bool
    strips: int
    row_programs: int
    warps: int = WARPS

    @property
    def programs(self) -> int:
        return self.strips * self.row_programs


def _units_of(unit: int, geometry: Geometry, run: int, numel: int) -> tuple[int, int, int] | None:
    """How units lie in runs, with their length and columns; None where a shorter run is needed."""
    if unit == _units.ELEMENT:
        return ELEMENTS, 1, 1
    if geometry.columns > 1:
        fits = geometry.columns % run == 0
        return (ADJACENT, geometry.elements // run, geometry.columns // run) if fits else None
    if geometry.elements >= numel:
        return SHARED, ceil_div(geometry.elements, run), 1
    if geometry.elements % run == 0:
        return SHARED, geometry.elements // run, 1
    return (BORDER, geometry.elements, 1) if geometry.elements >= run else None


def _runs_of(
    numel: int, itemsize: int, unit: int, geometry: Geometry, *lengths: int
) -> tuple[int, tuple[int, int, int], bool]:
    """The longest run that ends where rows of each length do, how units lie in it, and whether it may be skipped.

    Only a run that is as long as a load is: the loads of others would be masked element by element.
    """
    longest = VECTOR_BYTES // itemsize
    run = math.gcd(longest, *lengths)
    found = _units_of(unit, geometry, run, numel)
    while found is None:
        run //= 2
        found = _units_of(unit, geometry, run, numel)
    return run, found, found[0] in (SHARED, BORDER) and run == longest


def elementwise(numel: int, itemsize: int, unit: int, geometry: Geometry, *lengths: int) -> Elementwise:
    """How to run over ``numel`` elements, of up to ``itemsize`` bytes each.

    ``lengths`` are how many adjacent elements have a row's scale, and how many have one of a column each, if any have.
    """
    run, found, skip = _runs_of(numel, itemsize, unit, geometry, *lengths)
    elements = LANES * WARPS * _ELEMENTS
    parts = _ELEMENTS // run
    return Elementwise(run, elements // run, parts, *found, skip, ceil_div(numel, elements))


def sums(rows: int, columns: int, itemsize: int, unit: int, geometry: Geometry, multiprocessors: int) -> Sums:
    """How to add up over ``rows`` rows, of elements of up to ``itemsize`` bytes."""
    run, found, skip = _runs_of(rows * columns, itemsize, unit, geometry, columns)
    strip = min(_STRIP, next_power_of_two(ceil_div(columns, run)) * run)
    tile = LANES * WARPS * _ELEMENTS
    strips = ceil_div(columns, strip)
    tiles = ceil_div(rows, tile // strip)
    wanted = ceil_div(_RESIDENT * multiprocessors, strips)
    row_programs = max(1, min(wanted, tiles // _TILES_A_PROGRAM))
    return Sums(run, tile // strip, strip // run, *found, skip, strips, row_programs)
