"""What is worse in a table than in the committed one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from bench.static_evidence.occupancy import residency
from bench.static_evidence.record import Record, Table

INTENDED = "if this is intended: python -m bench.static_evidence, and commit the result"


def complaints(committed: Table, current: Table) -> list[str]:
    """What speaks against ``current``, a line each; of architectures that it has no kernel for, nothing is said.

    Code of the same compiler has to be what it was, better or worse: the table is then out of date. Code of another
    compiler differs anyhow, and only has to be as good.
    """
    same = committed.compiler == current.compiler
    before = {each.key: each for each in committed.on(current.architectures).records}
    now = {each.key: each for each in current.records}
    found = [f"{before[key].name}: the kernel is gone" for key in before.keys() - now.keys()]
    for key in now.keys() - before.keys():
        found += [f"{now[key].name}: not in the table"] if same else []
        found += [f"{now[key].name}: {name} {value}" for name, value in spilled(now[key]).items() if value]
    for key in before.keys() & now.keys():
        judge = differences if same else regressions
        found += [f"{now[key].name}: {difference}" for difference in judge(before[key], now[key])]
    return sorted(found)


def differences(before: Record, now: Record) -> Iterator[str]:
    """Every field that is not what it was."""
    for each in fields(Record):
        old, new = getattr(before, each.name), getattr(now, each.name)
        if old != new:
            yield f"{each.name} {old} -> {new}"


def spilled(record: Record) -> dict[str, int]:
    """What says that registers were kept in memory."""
    return {
        "stack_bytes": record.stack_bytes,
        "spill_bytes": record.spill_bytes or 0,
        "local_accesses": record.local_accesses,
    }


def regressions(before: Record, now: Record) -> Iterator[str]:
    """Memory used for registers where none was, narrower accesses, fewer warps at the same launch."""
    for (name, old), new in zip(spilled(before).items(), spilled(now).values(), strict=True):
        if new > old:
            yield f"{name} {old} -> {new}"
    for name in ("widest_load", "widest_store"):
        old, new = getattr(before, name), getattr(now, name)
        if new < old:
            yield f"{name} {old} -> {new}"
    launch = before.lowest
    shared_bytes = now.static_shared_bytes + launch.dynamic_shared_bytes
    warps = residency(now.architecture, now.registers, launch.threads, shared_bytes).warps
    if warps < before.resident_warps:
        registers = f"{before.registers} -> {now.registers} registers"
        yield f"resident warps {before.resident_warps} -> {warps} at {launch} ({registers})"
