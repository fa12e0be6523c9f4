"""Bytes that the Triton kernels move, over the least that it takes, as their tests count them in the interpreter.

python -m bench.triton_traffic                          run the tests, which takes minutes, into bench/results/
python -m bench.triton_traffic --readme README.md       put the table between the markers of that file
python -m bench.triton_traffic --check-readme README.md exit code 1 if the file's table is not that of the results
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.report import RESULTS, place, table
from fastreg.cli import machine
from fastreg.cli.bench import as_text

BEGIN = "<!-- triton traffic -->"
END = "<!-- /triton traffic: python -m bench.triton_traffic --readme README.md -->"
TESTS = (
    "tests/test_triton_traffic.py",
    "tests/test_triton_batch_norm_traffic.py",
    "tests/test_triton_group_norm_traffic.py",
    "tests/test_triton_dropout_traffic.py",
    "tests/test_triton_dropout_add_norm_traffic.py",
)
_PRINTED = re.compile(r"bytes over the minimum: ([\d.]+)(?:; ([a-z ]+): ([\d.]+) minimums)?")

# A test of these files -> what its cases are in the README. A test that prints a figure and is not here is an error.
CALLS = {
    "test_forward_reads_once_and_writes_once": "layer and RMS norm forward, rows held on chip (to "
    "65,536 16-bit or 32,768 float32 elements)",
    "test_rows_too_long_for_the_registers_are_read_twice_forward": "the same, longer rows, which are read twice",
    "test_backward_reads_once_and_writes_once": "layer and RMS norm backward, 4096 rows",
    "test_long_rows_have_the_partial_sums_of_short_ones": "layer norm backward, 4096 rows of 4096 to 12,288 elements",
    "test_evaluation_reads_once_and_writes_once": "batch norm in evaluation",
    "test_training_reads_twice_or_once": "batch norm in training, forward",
    "test_backward_reads_twice_or_once": "batch norm in training, backward",
    "test_a_rounded_gradient_of_the_residual_is_not_read_again": "the same with SiLU after a residual",
    "test_backward_of_constant_statistics_reads_once": "batch norm in evaluation, backward",
    "test_groups_are_read_twice_or_once": "group and instance norm, forward",
    "test_backward_of_groups_reads_twice_or_once": "group and instance norm, backward",
    "test_dropout_reads_once_and_writes_once": "dropout, with a residual and scales or without",
    "test_backward_of_layer_scale_reads_once": "dropout backward with the gradient of `layer_scale`",
    "test_a_sum_is_made_and_normalised_in_four_passes": "dropout + residual + layer or RMS norm, forward",
    "test_gradients_of_a_sum_take_five_passes": "the same, backward",
    "test_many_rows_have_the_partial_sums_of_few": "the same, backward, 8192 rows of 768 to 8192 elements",
    "test_drop_block_reads_once_and_writes_once": "DropBlock, drawing its mask included",
}


def measured(report: Path) -> list[dict[str, Any]]:
    """A record for each test that printed a figure, from pytest's JUnit file.

    Raises:
        ValueError: a test did not pass, or none printed anything, or one is not known here.
    """
    records = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        if any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
            raise ValueError(f"{name} did not pass")
        for found, what, much in _PRINTED.findall(case.findtext("system-out") or ""):
            if name.partition("[")[0] not in CALLS:
                raise ValueError(f"{name} has no line in CALLS")
            more = {what.replace(" ", "_"): float(much)} if what else {}
            records.append({"test": name, "bytes_over_minimum": float(found), **more})
    if not records:
        raise ValueError(f"no test of {', '.join(TESTS)} printed what it counted")
    return records


def measure() -> dict[str, Any]:
    """Run the tests and collect what they count."""
    options = [
        "--backend",
        "triton",
        "--complete",
        "-p",
        "no:cacheprovider",
        "-o",
        "junit_logging=system-out",
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", *TESTS, *options, f"--junitxml={report}"],
            check=True,
            cwd=RESULTS.parents[1],
        )
        records = measured(report)
    taken_on = machine.describe(torch.device("cpu"))
    return {
        "schema": 2,
        **{key: taken_on[key] for key in ("date", "commit", "versions")},
        "how": "counted in Triton's interpreter, for the launches of a GPU with 132 multiprocessors",
        "command": "python -m bench.triton_traffic",
        "cases": records,
    }


def render(document: dict[str, Any]) -> str:
    """The README's table: a line for each kind of call, least to most of its cases."""
    rows = []
    for test, call in CALLS.items():
        found = [
            record["bytes_over_minimum"]
            for record in document["cases"]
            if record["test"].partition("[")[0] == test
        ]
        least, most = (f"{each(found):.3f}" for each in (min, max))
        rows.append((call, str(len(found)), least if least == most else f"{least} to {most}"))
    return table(("call", "cases", "bytes over the minimum"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or show what was."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_traffic", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "triton-traffic.json", help="the results' file"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--readme", type=Path, help="put the table between this file's markers")
    asked.add_argument("--check-readme", type=Path, help="compare this file's table with the results")
    chosen = parser.parse_args(arguments)
    readme = chosen.readme or chosen.check_readme
    if readme is None:
        chosen.results.write_text(as_text(measure()))
        return 0
    tables = render(json.loads(chosen.results.read_text()))
    return place(readme, tables, parser.prog, chosen.readme is None, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
