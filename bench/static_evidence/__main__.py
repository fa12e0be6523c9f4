"""The command line of the static evidence; the package's docstring lists what it does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import bench.static_evidence as package
from bench.report import place
from bench.static_evidence import RESULTS, cuda_kernels, report, triton_kernels
from bench.static_evidence.comparison import INTENDED, complaints
from bench.static_evidence.record import ImpossibleLaunch, Table, read, write

REQUIRED = {80, 90, 100}  # a table without one of them is not written

KINDS: dict[str, Callable[[], Table]] = {"cuda": cuda_kernels.table, "triton": triton_kernels.table}


def _write(results: Path) -> int:
    tables = {kind: make() for kind, make in KINDS.items()}
    for kind, table in tables.items():
        if missing := REQUIRED - table.architectures:
            names = ", ".join(f"sm_{each}" for each in sorted(missing))
            print(f'{kind}: nothing is compiled for {names}: make native CUDA_ARCHITECTURES="80;90;100;120"')
            return 1
    for kind, table in tables.items():
        write(results / f"{kind}.json", table)
        print(f"{results / kind}.json: {len(table.records)} kernels, {table.compiler}")
    return 0


def check(kind: str, results: Path = RESULTS) -> tuple[list[str], list[str]]:
    """What speaks against the kernels of a kind as they are compiled here, and what was not compared.

    Raises:
        FileNotFoundError: the library, or cuobjdump, is not there.
        ImpossibleLaunch: a launch would fail.
        ValueError: there is no committed table.
    """
    return judge(kind, read(results / f"{kind}.json"), KINDS[kind]())


def judge(kind: str, committed: Table, current: Table) -> tuple[list[str], list[str]]:
    """What speaks against ``current``, and what of ``committed`` it was not compared with."""
    common = committed.architectures & current.architectures
    if not common:
        return [f"{kind}: nothing that the table has is compiled here"], []
    names = ", ".join(f"sm_{each}" for each in sorted(common))
    notes = [f"{kind}: {len(committed.on(common).records)} kernels compared, of {names}"]
    missing = committed.architectures - current.architectures
    notes += [f"{kind}: not compiled for sm_{each} here, so not compared" for each in sorted(missing)]
    if committed.compiler != current.compiler:
        notes.append(
            f"{kind}: {current.compiler} here, the table is of {committed.compiler}: only regressions are complained of"
        )
    return [f"{kind}: {each}" for each in complaints(committed, current)], notes


def _check(results: Path) -> int:
    found = []
    for kind in KINDS:
        wrong, notes = check(kind, results)
        found += wrong
        print("\n".join([*notes, *wrong, f"{kind}: {len(wrong)} complaints"]))
    if found:
        print(INTENDED)
    return 1 if found else 0


def _readme(path: Path, results: Path, only_check: bool) -> int:
    tables = report.render(read(results / "cuda.json"), read(results / "triton.json"))
    return place(path, tables, "python -m bench.static_evidence", only_check, report.BEGIN, report.END)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, check or show the tables."""
    description = (package.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.static_evidence", description=description)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the tables")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--check", action="store_true", help="compare the compiled kernels with the tables")
    asked.add_argument("--readme", type=Path, help="put the summary between this file's markers")
    asked.add_argument("--check-readme", type=Path, help="compare this file's summary with the tables")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.readme or chosen.check_readme:
            return _readme(chosen.readme or chosen.check_readme, chosen.results, chosen.readme is None)
        return _check(chosen.results) if chosen.check else _write(chosen.results)
    except (FileNotFoundError, ImpossibleLaunch, RuntimeError, ValueError) as reason:
        print(reason, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
