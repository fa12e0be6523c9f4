"""Makes the README's measured tables from the committed results.

python -m bench.report                       the tables of every machine's newest complete results, as markdown
python -m bench.report --readme README.md    put them between the two markers of that file
python -m bench.report --check README.md     exit code 1 if the file's tables are not those of the results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastreg.cli import summary
from fastreg.cli.benchmark import upgraded
from fastreg.cli.providers import label
from fastreg.cli.workloads import title

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- measured -->", "<!-- /measured: python -m bench.report --readme README.md -->"


def newest(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each machine's newest complete results, GPUs first; of each document what no newer one has.

    Of one day those that name their ops count as newer than one of all.

    Raises:
        ValueError: a result of a schema that this report does not know.
    """
    found = []
    for directory in sorted(path for path in results.glob("*") if path.is_dir()):
        # Named by their date; the folder static/ has tables that are no machine's.
        dated = directory.glob("[0-9]*.json")
        complete = (path for path in dated if not path.stem.endswith("-partial"))
        covered: set[str] = set()
        for path in sorted(complete, key=lambda path: path.stem, reverse=True):
            try:
                document = upgraded(json.loads(path.read_text()))
            except ValueError as error:
                raise ValueError(f"{path} has {error}") from None
            ops = [op for op in document["ops"] if op not in covered]
            covered.update(ops)
            if ops:
                lists = {
                    key: [each for each in document[key] if each["op"] in ops] for key in ("cases", "host")
                }
                found.append((path, {**document, "ops": ops, **lists}))
    return sorted(found, key=lambda pair: pair[1]["machine"]["device"], reverse=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A markdown table; all but the first ``left`` columns are aligned right."""
    rules = ["---" if index < left else "---:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rules, *rows))


def means(document: dict[str, Any]) -> str:
    """The geometric means over the shapes."""
    headings = [
        *("op", "dtype", "direction"),
        *("vs torch eager", "vs torch.compile", "of copy bandwidth", "worst vs eager"),
    ]
    groups, overall = summary.groups(document), summary.overall(document)
    counted = any(found.saved is not None for found in groups)

    def rest(found: summary.Group) -> list[str]:
        return [worst(found), *([summary.percent(found.saved)] if counted else [])]

    def figures(found: summary.Group) -> list[str]:
        return [summary.times(found.eager), summary.times(found.compile), summary.percent(found.share)]

    rows = [[*found.name, *figures(found), *rest(found)] for found in groups]
    for found in overall:
        op, directions = found.name
        rows.append(
            [f"**{op}**", "all", directions, *(f"**{each}**" for each in figures(found)), *rest(found)]
        )
    return table([*headings, *(["kept for backward"] if counted else [])], rows, left=3)


def worst(found: summary.Group) -> str:
    """The smallest ratio to torch eager in a group."""
    return summary.times(found.worst)


def cases(records: list[dict[str, Any]]) -> str:
    """Every case of one op."""
    providers = summary.timed_providers({"cases": records})
    columns = summary.case_columns(providers, lambda name: f"{label(name)}, ms")
    columns += summary.saved_columns(records)
    rows = [[title(record), *(show(record) for _, show in columns)] for record in records]
    return table(["op", *(heading for heading, _ in columns)], rows, left=4)


def details(document: dict[str, Any]) -> str:
    """The table of every op, folded."""
    parts = []
    for op in dict.fromkeys(record["op"] for record in document["cases"]):
        records = [record for record in document["cases"] if record["op"] == op]
        how = f"Every case of {op} (fastreg picks {summary.picked(records)}): medians of interleaved rounds"
        parts.append(f"<details><summary>{how}</summary>\n\n{cases(records)}\n\n</details>\n")
    return "\n".join(parts)


def host(document: dict[str, Any]) -> str:
    """The host cost of tiny calls."""
    headings = ("op", "call on 16 elements", "torch eager, µs", "fastreg, µs", "fastreg / torch")
    return table(headings, summary.host_rows(document), left=2)


# What is behind the columns that documents of today have.
_KEPT = "; kept for backward is what fastreg's forwards keep beside their arguments, of what torch eager's do, in bytes"


def section(path: Path, document: dict[str, Any], root: Path) -> str:
    """One machine's part of the README."""
    counted = any(summary.saved(record, record["picked"]) is not None for record in document["cases"])
    shown = path.resolve().relative_to(root.resolve()).as_posix()
    copy = document["large_copy"]["gigabytes_per_second"]
    untimed = "".join(f"- not timed: {line}\n" for line in summary.untimed(document))
    return (
        f"### {document['machine']['name']}: {', '.join(document['ops'])}\n\n"
        f"{summary.machine_line(document)}; a large copy reaches {copy} GB/s. From [{shown}]({shown}).\n\n"
        "Geometric means over the shapes, fastreg's speed over the other's; GB/s is the op's minimum traffic over the "
        f"time, its share that of a copy of the input in the same rounds{_KEPT if counted else ''}:\n\n"
        f"{means(document)}\n\n{details(document)}\n{untimed}\n"
        f"What a call costs the host:\n\n{host(document)}\n"
    )


def render(results: Path = RESULTS, root: Path = RESULTS.parents[1]) -> str:
    """The tables of all machines."""
    return "\n".join(
        ["## Measured\n", *(section(path, document, root) for path, document in newest(results))]
    )


def placed(text: str, tables: str, start: str = BEGIN, stop: str = END) -> str:
    """``text`` with the tables after its marker, in place of those that end at the second marker if there are any.

    Raises:
        ValueError: the marker is not there.
    """
    before, begin, rest = text.partition(start)
    if not begin:
        raise ValueError(f"the file has no line {start}")
    _, end, after = rest.partition(stop)
    return f"{before}{start}\n\n{tables}\n{stop}{after if end else rest}"


def place(
    path: Path, tables: str, command: str, only_check: bool, start: str = BEGIN, stop: str = END
) -> int:
    """Put the tables into a file, or only compare them with what it has; the exit code, 1 where they differ."""
    text = path.read_text()
    expected = placed(text, tables, start, stop)
    if not only_check:
        path.write_text(expected)
    elif expected != text:
        print(f"{path} is not what the results say: {command} --readme {path}")
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, place or check the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of result folders")
    parser.add_argument("--readme", type=Path, help="put the tables after this file's marker")
    parser.add_argument("--check", type=Path, help="compare this file's tables with the results")
    chosen = parser.parse_args(arguments)
    tables = render(chosen.results, chosen.results.resolve().parents[1])
    if chosen.check or chosen.readme:
        return place(chosen.check or chosen.readme, tables, parser.prog, chosen.readme is None)
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
