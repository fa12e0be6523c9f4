"""The table's summary in markdown: a line for each kernel function and architecture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from bench.report import table as markdown
from bench.static_evidence.record import Record, Table

BEGIN = "<!-- static evidence -->"
END = "<!-- /static evidence: python -m bench.static_evidence --readme README.md -->"

HEADINGS = (
    "kernel",
    "sm",
    "compiled",
    "registers",
    "shared memory, KB",
    "widest load, B",
    "widest store, B",
    "threads",
    "occupancy",
)


def function(record: Record) -> str:
    """The name without its template arguments, and for CUDA the packs that it is for."""
    name, _, arguments = record.kernel.partition("<")
    width = re.match(r"[\w ]+, \w+, (\d+)", arguments)
    if width is None:
        return f"`{name}`"
    return f"`{name}`, {'one-element' if width[1] == '1' else '16-byte'} packs"


def _range(records: Iterable[Record], value: Callable[[Record], float], show: str = "{:g}") -> str:
    values = [value(each) for each in records]
    low, high = show.format(min(values)), show.format(max(values))
    return low if low == high else f"{low} to {high}"


def _row(name: str, architecture: int, records: Sequence[Record]) -> tuple[str, ...]:
    launched = [each for each in records if each.launches] or records
    threads = {count for each in launched for count in each.threads}
    return (
        name,
        str(architecture),
        str(len(records)),
        _range(records, lambda each: each.registers),
        _range(
            records, lambda each: (each.static_shared_bytes + each.dynamic_shared_bytes[1]) / 1024, "{:.1f}"
        ),
        _range(records, lambda each: each.widest_load),
        _range(records, lambda each: each.widest_store),
        str(min(threads)) if len(threads) == 1 else f"{min(threads)} to {max(threads)}",
        _range(records, lambda each: 100 * each.occupancy, "{:.0f}") + " %",
    )


def rows(table: Table) -> list[tuple[str, ...]]:
    """Of each kernel function on each architecture, the least and the most of its instances."""
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for each in table.records:
        groups[function(each), each.architecture].append(each)
    return [_row(*key, records) for key, records in sorted(groups.items())]


def _sentence(kind: str, table: Table) -> str:
    records = table.records
    architectures = ", ".join(str(each) for each in sorted(table.architectures))
    stacks = sum(
        each.stack_bytes > 0 or bool(each.spill_bytes) or each.local_accesses > 0 for each in records
    )
    unreached = len({each.kernel for each in records if not each.launches})
    return (
        f"{len(records)} {kind} of {len({each.kernel for each in records})} kernels for sm_{architectures} "
        f"({table.compiler}): {stacks or 'none'} with stack or spills"
        + (
            f"; {unreached} are launched by no realistic problem on at least one of the GPUs."
            if unreached
            else "."
        )
    )


def render(cuda: Table, triton: Table) -> str:
    """Both tables."""
    instances = _sentence("instances", cuda)
    configurations = _sentence("configurations", triton)
    return (
        "Registers, shared memory, access widths and occupancy of every compiled kernel are in "
        "[bench/results/static](bench/results/static), one line each; a test run compares those that it compiles, "
        "a complete one all.\n\n"
        f"- CUDA: {instances}\n- Triton: {configurations}\n\n"
        "<details><summary>By kernel function and architecture: least to most of its instances; occupancy, of resident "
        "warps, at the launch where it is lowest</summary>\n\n"
        f"{markdown(HEADINGS, rows(cuda))}\n\n{markdown(HEADINGS, rows(triton))}\n\n</details>\n"
    )
