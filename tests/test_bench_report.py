"""The benchmark's results: documents have what figures need, are kept, and are reported right."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import report
from bench.gpu import timing as gpu_timing
from bench_examples import CHAIN, CPU, SMALL, quick
from fastreg.cli import bench, benchmark, host, summary, timing, workloads
from fastreg.cli.providers import EAGER
from fastreg.cli.workloads import (
    BACKWARD,
    DIRECTIONS,
    FORWARD,
    Case,
)

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def complete_run() -> dict[str, Any]:
    """A complete run over three tiny cases; "native" is torch itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "measure", lambda case, device, clock, seconds: quick(case))
        patch.setattr(
            benchmark,
            "host_cost",
            lambda op, device, chain: host.host_cost(op, device, chain, rounds=2, calls=2),
        )
        patch.setattr(timing, "copy_bandwidth", lambda device, size: 3.21e10)
        plan = benchmark.Plan(CPU, (SMALL, Case("rms_norm", (4, 8), torch.bfloat16), CHAIN), complete=True)
        found = bench.run(plan, Console(file=io.StringIO()))
    for record in found["cases"]:
        record["picked"] = "native"
    return found


@pytest.fixture
def document(complete_run: dict[str, Any]) -> dict[str, Any]:
    """The run's document, a copy for each test."""
    return deepcopy(complete_run)


def test_result_document_has_everything_that_a_figure_needs(document: dict[str, Any]) -> None:
    assert document["schema"] == benchmark.SCHEMA
    assert {
        "machine",
        "versions",
        "commit",
        "date",
        "large_copy",
        "seconds",
        "cases",
        "host",
    } < document.keys()
    assert {"name", "slug", "device", "threads", "instruction_set"} < document["machine"].keys()
    assert {"torch", "triton", "python", "fastreg"} < document["versions"].keys()
    assert len(document["cases"]) == 3 * len(DIRECTIONS)
    assert [record["direction"] for record in document["cases"][:3]] == list(DIRECTIONS)
    for record in document["cases"]:
        eager = record["providers"][EAGER]
        rate = record["bytes"] / (eager["milliseconds"]["median"] * 1e6)
        assert eager["gigabytes_per_second"] == pytest.approx(rate, rel=1e-2)
        share = eager["gigabytes_per_second"] / record["copy"]["gigabytes_per_second"]
        assert eager["share_of_copy"] == pytest.approx(share, rel=1e-2)
        assert eager["milliseconds"]["rounds"] == 3
    ways = [record["way"] for record in document["host"]]
    # Batch norm alone and with what follows it.
    assert ways == 4 * ["forward, no_grad", "forward, recording", "forward+backward"]
    assert all(record["providers"]["fastreg"]["microseconds"]["median"] > 0 for record in document["host"])


def test_saved_document_is_json_with_a_line_a_record(document: dict[str, Any], tmp_path: Path) -> None:
    path = bench.save(document, tmp_path)
    ops = "batch_norm-layer_norm-rms_norm"
    assert path == tmp_path / document["machine"]["slug"] / f"{document['date']}-{ops}.json"
    assert json.loads(path.read_text()) == document
    assert sum(line.startswith('  {"op"') for line in path.read_text().splitlines()) == 9 + 12
    partial = bench.save({**document, "complete": False, "host": []}, tmp_path)
    assert partial.name == f"{path.stem}-partial.json"
    assert json.loads(partial.read_text())["host"] == []
    assert [found for found, _ in report.newest(tmp_path)] == [path]


def test_means_and_ratios() -> None:
    def record(shape: int, eager: float, ours: float, direction: str = FORWARD) -> dict[str, Any]:
        def timed(median: float) -> dict[str, Any]:
            return {"milliseconds": {"median": median}, "share_of_copy": 0.5}

        providers = {EAGER: timed(eager), "compile": {"failed": "no compiler"}, "native": timed(ours)}
        case = {
            "op": "layer_norm",
            "chain": "",
            "layout": "",
            "dtype": "float32",
            "shape": [shape, 8],
            "direction": direction,
        }
        return {**case, "picked": "native", "providers": providers}

    document = {"cases": [record(1, 8, 2), record(2, 9, 9), record(3, 1, 2, BACKWARD)]}
    forward, backward = summary.groups(document)
    assert forward.eager == pytest.approx(2)
    assert forward.compile is None
    assert forward.worst == pytest.approx(1)
    assert forward.worst_case == "layer_norm float32 (2, 8) forward"
    assert backward.eager == pytest.approx(0.5)
    # What a release is held to leaves the backward alone out.
    assert summary.overall(document)[0].cases == 2


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert summary.number(value) == text


def test_report_of_stored_results(document: dict[str, Any], tmp_path: Path) -> None:
    results = tmp_path / "bench" / "results"
    bench.save(document, results)
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{report.BEGIN}\nafter\n")
    chosen = ["--results", str(results)]
    assert report.main([*chosen, "--check", str(readme)]) == 1
    assert report.main([*chosen, "--readme", str(readme)]) == 0
    assert report.main([*chosen, "--check", str(readme)]) == 0
    text = readme.read_text()
    readme.write_text(text.replace("Geometric means", "old"))
    assert report.main([*chosen, "--check", str(readme)]) == 1
    assert report.main([*chosen, "--readme", str(readme)]) == 0
    assert readme.read_text() == text
    assert text.startswith("# before\n")
    assert text.endswith("after\n")
    slug = document["machine"]["slug"]
    assert f"(bench/results/{slug}/{bench.path_of(document, tmp_path).name})" in text
    median = summary.number(document["cases"][0]["providers"][EAGER]["milliseconds"]["median"])
    assert f"| layer_norm | float32 | 5 x 33 | forward | {median} |" in text
    assert "| rms_norm | bfloat16 | forward+backward |" in text
    assert "| batch_norm+add+relu channels_last | float32 | backward |" in text
    assert "| batch_norm+add+relu channels_last | float32 | 4 x 8 x 3 x 5 | backward |" in text
    assert "| batch_norm+add+relu | forward, no_grad |" in text
    # The means, the cases of each op, and the host's cost.
    assert sum(line.startswith("| op") for line in text.splitlines()) == 5
    assert text.count("<details>") == text.count("</details>") == 3
    with pytest.raises(ValueError, match="no line"):
        report.placed("no markers", "tables")


def test_the_first_schema_is_still_read(document: dict[str, Any], tmp_path: Path) -> None:
    old = deepcopy(document)
    old["cases"] = [record for record in old["cases"] if not record["layout"]]
    old["host"] = [record for record in old["host"] if not record["chain"]]
    expected = report.section(tmp_path, old, tmp_path)
    old["schema"] = 1
    for record in old["cases"]:
        record["rows"], record["hidden_size"] = record.pop("shape")
        del record["chain"], record["layout"]
    for record in old["host"]:
        del record["chain"]
    bench.save(old, tmp_path)
    ((_, found),) = report.newest(tmp_path)
    assert found["schema"] == benchmark.SCHEMA
    assert report.section(tmp_path, found, tmp_path) == expected


def test_report_takes_each_op_from_the_newest_document_that_has_it(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """Of one day the document of some ops is the newer one; a partial one is none at all."""

    def saved(date: str, ops: list[str], complete: bool = True) -> Path:
        lists = {key: [each for each in document[key] if each["op"] in ops] for key in ("cases", "host")}
        return bench.save({**document, **lists, "date": date, "ops": ops, "complete": complete}, tmp_path)

    everything = list(workloads.names())
    old = saved("2026-01-01", everything)
    saved("2026-01-02", ["layer_norm"])
    newest = saved("2026-01-03", ["layer_norm", "rms_norm"])
    saved("2026-01-04", ["batch_norm"], complete=False)
    (first, one), (second, two) = report.newest(tmp_path)
    assert [(first, one["ops"]), (second, two["ops"])] == [
        (newest, ["layer_norm", "rms_norm"]),
        (old, [op for op in everything if op not in ("layer_norm", "rms_norm")]),
    ]
    assert {record["op"] for record in one["cases"]} == {"layer_norm", "rms_norm"}
    assert {record["op"] for record in [*two["cases"], *two["host"]]} == {"batch_norm"}
    assert report.section(second, two, tmp_path).startswith(
        f"### {document['machine']['name']}: batch_norm, "
    )
    saved("2026-01-03", everything)
    assert report.newest(tmp_path)[0][0] == newest


def test_what_is_kept_for_backward_is_a_column_where_it_says_something(
    document: dict[str, Any], tmp_path: Path
) -> None:
    def texts(kept: dict[str, tuple[int, int]] | None) -> tuple[str, str]:
        changed = deepcopy(document)
        for record in changed["cases"]:
            for name, found in record["providers"].items():
                found.pop("saved_bytes")
                if kept is not None:
                    found["saved_bytes"] = kept[record["op"]][name != EAGER]
        text = io.StringIO()
        bench.print_summary(changed, Console(file=text, width=160))
        return report.section(tmp_path, changed, tmp_path), text.getvalue()

    assert all(
        isinstance(found["saved_bytes"], int)
        for record in document["cases"]
        for found in record["providers"].values()
    )
    # Older documents do not have it.
    old, shown = texts(None)
    assert "kept for backward" not in old
    assert "keeps" not in old
    assert "geometric means" in shown
    # A mask of a byte for each of 480 elements, and statistics that are little.
    new, shown = texts({"batch_norm": (480, 8), "layer_norm": (40, 40), "rms_norm": (0, 0)})
    lines = [line for line in new.splitlines() if line.endswith(" kept for backward |")]
    assert len(lines) == 1
    assert len([line for line in new.splitlines() if line.endswith("| torch keeps | fastreg keeps |")]) == 1
    assert "| 480 B | 8 B |" in new
    rows = {
        op: next(line for line in new.splitlines() if line.startswith(f"| {op}"))
        for op in ("batch_norm", "layer_norm", "rms_norm")
    }
    assert [rows[op].split("|")[-2].strip() for op in rows] == ["2 %", "100 %", "–"]
    assert "in bytes" in new
    assert "2 %" in shown


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (8, "8 B"), (1234, "1.23 kB"), (25165824, "25.2 MB"), (3.2e9, "3.20 GB")]
)
def test_sizes_have_three_digits(value: float | None, text: str) -> None:
    assert summary.size(value) == text


def test_report_refuses_an_unknown_schema(document: dict[str, Any], tmp_path: Path) -> None:
    bench.save({**document, "schema": 99}, tmp_path)
    with pytest.raises(ValueError, match="has schema 99"):
        report.newest(tmp_path)


def test_summary_prints_every_table(document: dict[str, Any]) -> None:
    text = io.StringIO()
    bench.print_summary(document, Console(file=text, width=140))
    for expected in (
        "native, which fastreg picks",
        "host cost",
        "geometric means",
        "liger: no GPU",
        "32.1 GB/s",
    ):
        # Joined, since a title is wrapped to the width of its table.
        assert expected in " ".join(text.getvalue().split())


def test_a_gpus_run_goes_on_where_the_earlier_one_ended(document: dict[str, Any], tmp_path: Path) -> None:
    new = {**deepcopy(document), "complete": False, "cases": [], "host": [], "seconds": 0}
    new["large_copy"] = {"bytes": 1, "gigabytes_per_second": 1.0}
    assert gpu_timing.continued(deepcopy(new), tmp_path) == new
    # Complete: what is measured now replaces what was.
    bench.save(document, tmp_path)
    assert gpu_timing.continued(deepcopy(new), tmp_path) == new
    earlier = {**document, "complete": False}
    bench.save(earlier, tmp_path)
    assert gpu_timing.continued(deepcopy(new), tmp_path) == earlier
    bench.save({**earlier, "commit": "another"}, tmp_path)
    assert gpu_timing.continued(deepcopy(new), tmp_path) == new
    # Of other ops.
    bench.save(earlier, tmp_path)
    other = {**new, "ops": new["ops"][:1]}
    assert gpu_timing.continued(deepcopy(other), tmp_path) == other
