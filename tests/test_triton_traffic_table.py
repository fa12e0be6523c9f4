"""The table of counted bytes: from the tests' own report, and nothing that failed or is not known gets into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import triton_traffic

pytestmark = pytest.mark.backend_independent

PRINTED = "bytes over the minimum: 1.0312; parameters read again: 0.500 minimums"


def junit(folder: Path, name: str, inside: str) -> Path:
    path = folder / "report.xml"
    path.write_text(
        f'<testsuites><testsuite><testcase name="{name}">{inside}</testcase></testsuite></testsuites>'
    )
    return path


def test_what_a_test_prints_is_a_record(tmp_path: Path) -> None:
    name = "test_backward_reads_twice_or_once[8x256]"
    report = junit(tmp_path, name, f"<system-out>before\n{PRINTED}\nbytes over the minimum: 2.5</system-out>")
    assert triton_traffic.measured(report) == [
        {"test": name, "bytes_over_minimum": 1.0312, "parameters_read_again": 0.5},
        {"test": name, "bytes_over_minimum": 2.5},
    ]


@pytest.mark.parametrize(
    ("name", "inside", "why"),
    [
        (
            "test_backward_reads_twice_or_once",
            f"<failure/><system-out>{PRINTED}</system-out>",
            "did not pass",
        ),
        ("test_backward_reads_twice_or_once", "<skipped/>", "did not pass"),
        ("test_of_something_new", f"<system-out>{PRINTED}</system-out>", "no line in CALLS"),
        ("test_backward_reads_twice_or_once", "", "no test of"),
    ],
)
def test_what_is_not_measured_is_refused(name: str, inside: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        triton_traffic.measured(junit(tmp_path, name, inside))


def test_the_readme_has_the_table_of_the_results(tmp_path: Path) -> None:
    readme = triton_traffic.RESULTS.parents[1] / "README.md"
    assert triton_traffic.main(["--check-readme", str(readme)]) == 0
    old = tmp_path / "README.md"
    old.write_text(readme.read_text().replace("| batch norm in evaluation |", "| batch norm |"))
    assert triton_traffic.main(["--check-readme", str(old)]) == 1
    assert triton_traffic.main(["--readme", str(old)]) == 0
    assert old.read_text() == readme.read_text()
