"""What a result document says: ratios, geometric means, and the lines of its tables. Shared by terminal and README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastreg.cli.providers import COMPILE, EAGER
from fastreg.cli.workloads import BOTH, DIRECTIONS, FORWARD, call_name, describe, title

Record = dict[str, Any]


def milliseconds(record: Record, provider: str) -> float | None:
    """A provider's median, or None where it was not timed."""
    found = record["providers"].get(provider, {}).get("milliseconds")
    return None if found is None else float(found["median"])


def ratio(record: Record, baseline: str, provider: str | None = None) -> float | None:
    """How many times faster a provider (by default the backend that fastreg picks) is than another one."""
    slow, fast = milliseconds(record, baseline), milliseconds(record, provider or record["picked"])
    return None if slow is None or fast is None else slow / fast


def saved(record: Record, provider: str) -> int | None:
    """Bytes that a provider's forward keeps for backward, or None where that was not counted, as in older documents."""
    found: int | None = record["providers"].get(provider, {}).get("saved_bytes")
    return found


def saved_share(records: Iterable[Record]) -> float | None:
    """What fastreg keeps for backward over what torch eager does, of all cases together; None where nothing is kept."""
    pairs = [(saved(record, record["picked"]), saved(record, EAGER)) for record in records]
    counted = [(ours, eager) for ours, eager in pairs if ours is not None and eager is not None]
    total = sum(eager for _, eager in counted)
    return sum(ours for ours, _ in counted) / total if total else None


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


def where(record: Record) -> str:
    """The case of a record in words."""
    return f"{describe(record)} {record['direction']}"


@dataclass(frozen=True)
class Group:
    """The cases of one call in one layout, dtype and direction (or all of them) in one line.

    Attributes:
        name: what they have in common.
        cases: how many were timed.
        eager, compile: geometric mean of the ratios to torch eager and to torch.compile.
        worst: the smallest ratio to torch eager, and ``worst_case`` where that is.
        share: geometric mean of the share of the copy bandwidth.
        saved: what fastreg keeps for backward over what torch eager does; None where it was not counted.
    """

    name: tuple[str, ...]
    cases: int
    eager: float | None
    compile: float | None
    worst: float | None
    worst_case: str
    share: float | None
    saved: float | None


def group(name: tuple[str, ...], records: Sequence[Record]) -> Group:
    """Summarise some records."""
    timed = [record for record in records if milliseconds(record, record["picked"]) is not None]
    eager = [(found, record) for record in timed if (found := ratio(record, EAGER)) is not None]
    compiled = [found for record in timed if (found := ratio(record, COMPILE)) is not None]
    worst, at = min(eager, key=lambda pair: pair[0], default=(None, None))
    shares = [float(record["providers"][record["picked"]]["share_of_copy"]) for record in timed]
    return Group(
        name=name,
        cases=len(timed),
        eager=geometric_mean(found for found, _ in eager),
        compile=geometric_mean(compiled),
        worst=worst,
        worst_case=where(at) if at else "",
        share=geometric_mean(shares),
        saved=saved_share(timed),
    )


def groups(document: Record) -> list[Group]:
    """One group a call, layout, dtype and direction."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in document["cases"]:
        key = (title(record), record["dtype"], record["direction"])
        found.setdefault(key, []).append(record)
    return [group(key, records) for key, records in found.items()]


def overall(document: Record) -> list[Group]:
    """All forward and forward+backward cases, the figures a release is held to; of every op, and of each."""
    counted = [record for record in document["cases"] if record["direction"] in (FORWARD, BOTH)]
    name = f"{FORWARD} and {BOTH}"
    ops = dict.fromkeys(record["op"] for record in counted)
    return [
        group(("all ops", name), counted),
        *(group((op, name), [record for record in counted if record["op"] == op]) for op in ops),
    ]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, never in powers of ten; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    """A speed-up, 1.52x: rounded down, so that 0.996 is not shown as even."""
    return "–" if value is None else f"{math.floor(100 * value) / 100:.2f}x"


def cost_times(value: float | None) -> str:
    """A cost over another's, 1.31x: rounded up."""
    return "–" if value is None else f"{math.ceil(100 * value) / 100:.2f}x"


def percent(value: float | None) -> str:
    """A share: 87 %."""
    return "–" if value is None else f"{100 * value:.0f} %"


def size(value: float | None) -> str:
    """Bytes with three digits: 8 B, 25.2 MB."""
    if value is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{value:.0f} B"


Column = tuple[str, Callable[[Record], str]]


def case_columns(providers: Sequence[str], label: Callable[[str], str]) -> list[Column]:
    """The columns of the table of cases: heading, and what a record shows in it; times in milliseconds."""

    def time_of(name: str) -> Callable[[Record], str]:
        return lambda record: number(milliseconds(record, name))

    def ours(key: str) -> Callable[[Record], float | None]:
        return lambda record: record["providers"].get(record["picked"], {}).get(key)

    rate, share = ours("gigabytes_per_second"), ours("share_of_copy")
    return [
        ("dtype", lambda record: str(record["dtype"])),
        ("shape", lambda record: " x ".join(map(str, record["shape"]))),
        ("direction", lambda record: str(record["direction"])),
        *((label(name), time_of(name)) for name in providers),
        ("GB/s", lambda record: number(rate(record))),
        ("copy", lambda record: percent(share(record))),
        ("x eager", lambda record: times(ratio(record, EAGER))),
        ("x compile", lambda record: times(ratio(record, COMPILE))),
    ]


def saved_columns(records: Sequence[Record]) -> list[Column]:
    """What torch eager and fastreg keep for backward; nothing where no case of the op keeps much beside its arguments.

    A mask is at least an eighth of the input.
    """
    counted = [record for record in records if saved(record, EAGER) is not None]
    if not any(8 * (saved(record, EAGER) or 0) >= record["copy"]["bytes"] / 2 for record in counted):
        return []
    return [
        ("torch keeps", lambda record: size(saved(record, EAGER))),
        ("fastreg keeps", lambda record: size(saved(record, record["picked"]))),
    ]


def picked(records: Iterable[Record]) -> str:
    """The backends that fastreg picks in these cases; nearly always one."""
    return ", ".join(dict.fromkeys(str(record["picked"]) for record in records))


def unrest(document: Record, factor: float = 1.5) -> float:
    """The share of timings whose upper quartile is over ``factor`` times the lower one: how busy the machine was."""
    spreads: list[float] = [
        found["milliseconds"]["upper_quartile"] / found["milliseconds"]["lower_quartile"]
        for record in document["cases"]
        for found in record["providers"].values()
        if "milliseconds" in found
    ]
    return sum(spread > factor for spread in spreads) / max(1, len(spreads))


def timed_providers(document: Record) -> list[str]:
    """Every provider that was timed in some case, in the order in which they took turns."""
    names: dict[str, None] = {}
    for record in document["cases"]:
        names |= {name: None for name, found in record["providers"].items() if "milliseconds" in found}
    return list(names)


def untimed(document: Record) -> list[str]:
    """Which providers were missing, failed or were refused by the gate, and why; a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for record in document["cases"]:
        if record["direction"] != DIRECTIONS[0]:
            continue
        case = where(record).removesuffix(f" {record['direction']}")
        for name, reason in record["missing"].items():
            reasons.setdefault(f"{name}: {reason}", [])
        for name, found in record["providers"].items():
            for verb in ("failed", "refused"):
                if verb in found:
                    reasons.setdefault(f"{name} {verb}: {found[verb]}", []).append(case)
    return [f"{reason} [{'; '.join(cases)}]" if cases else reason for reason, cases in reasons.items()]


def machine_line(document: Record) -> str:
    """The machine, versions and date of a document in one sentence."""
    machine, versions = document["machine"], document["versions"]
    parts = [machine["name"]]
    if machine["device"] == "cpu":
        threads = machine["threads"]
        parts.append(f"{threads} thread{'s' if threads > 1 else ''}, {machine['instruction_set']}")
    else:
        parts.append(f"driver {machine['driver']}, CUDA {versions['cuda']}")
    parts += [f"torch {versions['torch']}", f"triton {versions['triton'] or 'not installed'}"]
    parts += [f"commit {document['commit'] or 'unknown'}", document["date"]]
    return ", ".join(parts)


def host_rows(document: Record) -> list[tuple[str, str, str, str, str]]:
    """Call, way of calling, torch's and our microseconds, and ours over torch's."""
    rows = []
    for record in document["host"]:
        eager = record["providers"][EAGER]["microseconds"]["median"]
        ours = record["providers"]["fastreg"]["microseconds"]["median"]
        rows.append((call_name(record), record["way"], number(eager), number(ours), cost_times(ours / eager)))
    return rows
