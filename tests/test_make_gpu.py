"""``make gpu`` rehearsed on the CPU: deadlines, summaries, result files, errors; and that it fetches nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import benchmark, sanitize, suite
from bench.gpu.__main__ import STAGES, finish, main, print_summary
from bench.gpu.machine import Machine
from bench.gpu.process import Deadline, Finished, run
from bench.gpu.stage import Settings
from fastreg.cli import workloads

pytestmark = pytest.mark.backend_independent

ROOT = Path(__file__).parents[1]
# All that `make gpu` finds on its PATH beside what leaves a trace when it is called.
COMMANDS = ("sh", "bash", "nproc", "grep", "head", "tr", "ls")
FORBIDDEN = ("pip", "pip3", "curl", "wget", "uv", "conda")


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PATH with the shell's tools, and with everything that fetches made to fail and to leave a trace."""
    folder = tmp_path_factory.mktemp("bin")
    for name in COMMANDS:
        found = next(
            (Path(place, name) for place in ("/usr/bin", "/bin") if Path(place, name).exists()), None
        )
        if found is not None:
            (folder / name).symlink_to(found)
    for name in FORBIDDEN:
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\nexit 1\n')
        (folder / name).chmod(0o755)
    return folder


def start(path: Path, **variables: object) -> subprocess.Popen[str]:
    """``make gpu`` with this Python, without the environment's own variables and with no way to the network."""
    nowhere = "http://127.0.0.1:9"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FASTREG_", "TRITON_"))},
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
        "PATH": str(path),
        "VENV": "/nowhere",
    }
    for name in (
        "STAGE",
        "OUT",
        "DEVICE",
        "LIMIT",
        "TESTS",
        "BACKENDS",
        "SANITIZER",
        "MAKEFLAGS",
        "MAKELEVEL",
    ):
        environment.pop(name, None)
    settings = {"PYTHON": sys.executable, "BUILD": "no", **variables}
    command = [
        make(),
        "--no-print-directory",
        "gpu",
        *(f"{name}={value}" for name, value in settings.items()),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@dataclass(frozen=True)
class Made:
    """What a ``make gpu`` printed and wrote."""

    code: int
    lines: list[str]
    errors: str
    out: Path

    def json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / name).read_text())
        return found


@pytest.fixture(scope="module")
def stages(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Those that are rehearsed: of the benchmarks, which differ in their ops, one where a run is not complete."""
    return tuple(STAGES) if request.config.getoption("--complete") else ("tests", "sanitize", "bench_dropout")


@pytest.fixture(scope="module")
def made(
    stages: tuple[str, ...], bare_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Made]:
    """The runs that take seconds, all at once; each has the build folder's part of its own stage to itself."""
    several = {
        "STAGE": " ".join(stages),
        "DEVICE": "cpu",
        "TESTS": "tests/rehearsal.py -k fate",
        "LIMIT": 300,
    }
    variables: dict[str, dict[str, object]] = {
        "several": several,
        "no GPU": {"STAGE": "tests"},
    }
    processes = {}
    for name, given in variables.items():
        out = tmp_path_factory.mktemp("made") / "out"
        work = tmp_path_factory.mktemp("work")
        processes[name] = (start(bare_path, OUT=out, WORK=work, BACKENDS="reference", **given), out)
    found = {}
    for name, (process, out) in processes.items():
        output, errors = process.communicate(timeout=300)
        found[name] = Made(process.returncode, output.splitlines(), errors, out)
    assert not (bare_path / "called").exists(), (bare_path / "called").read_text()
    return found


def make() -> str:
    return next(str(path) for path in (Path("/usr/bin/make"), Path("/usr/local/bin/make")) if path.exists())


def assert_few_and_small(out: Path) -> None:
    """Results are copied from the machine with the GPU: two files a stage and a document, small, near the top."""
    files = [path for path in out.rglob("*") if path.is_file()]
    assert 0 < len(files) <= 3 * len(STAGES)
    for path in files:
        inside = path.relative_to(out)
        assert len(inside.parts) <= 3
        assert path.stat().st_size < 16 * 2**20
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", part) for part in inside.parts), inside


def test_a_stage_ends_at_its_deadline_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test passes, the next hangs, a third is never reached; the deadline comes once the second has begun."""
    monkeypatch.setattr(suite, "WORK", tmp_path / "work")
    rehearsal = Machine("cpu", "a REHEARSAL", "", 0, "3", torch.__version__, "3", cores=1)
    selection = (str(ROOT / "tests" / "rehearsal.py"), "-k", "runs")
    settings = Settings(
        rehearsal, tmp_path / "out", Deadline(100), jobs=1, tests=selection, backends=("reference",)
    )
    journal = tmp_path / "work" / "tests" / "reference-cpu-1.jsonl"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(suite.stage, settings)
        while not (journal.exists() and "test_that_runs_forever" in journal.read_text()):
            assert not running.done()
            assert settings.deadline.left
            time.sleep(0.05)
        settings.deadline.end = time.monotonic() + 0.2
        outcome = running.result(timeout=20)
    finish(outcome, settings)
    print_summary(outcome, settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("tests: NOT FINISHED (a REHEARSAL on the CPU)"), lines
    assert any("the deadline met it in tests/rehearsal.py::test_that_runs_forever" in line for line in lines)
    record = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert (record["result"], record["machine"]["rehearsal"]) == ("NOT FINISHED", True)
    found = record["backends"]["reference"]
    assert [found[key] for key in ("collected", "passed", "not run", "finished")] == [3, 1, 2, False]
    assert_few_and_small(tmp_path / "out")


def test_a_summary_names_what_went_wrong(made: dict[str, Made]) -> None:
    """A failure with its error, and a crash, after which the rest of the tests run all the same."""
    run = made["several"]
    assert run.code != 0
    end = next(place for place, line in enumerate(run.lines) if line.startswith("tests: "))
    assert run.lines[end].startswith("tests: FAILED (a REHEARSAL on the CPU)"), run.lines
    assert end <= 40
    failed = run.lines.index("FAILED reference tests/rehearsal.py::test_whose_fate_is_to_fail")
    assert run.lines[failed + 1].strip() == "ValueError: expected to fail, as this test does"
    crashed = run.lines.index("CRASHED reference tests/rehearsal.py::test_whose_fate_is_to_end_its_process")
    assert "ended with code 41" in run.lines[crashed + 1]
    skips = "PROBLEM: reference: reference-cpu: 1 skips for this reason, 0 expected by expected_skips.txt"
    assert any(line.startswith(skips) for line in run.lines)
    record = run.json("tests.json")
    assert (record["limit"], record["machine"]["rehearsal"]) == (300, True)
    found = record["backends"]["reference"]
    counts = [found[key] for key in ("collected", "passed", "failed", "crashed", "skipped", "not run")]
    assert counts == [5, 2, 1, 1, 1, 0]
    assert found["skips"] == {"a reason that no list expects": 1}
    assert "raise ValueError" in found["wrong"][0]["details"]


def test_every_stage_is_rehearsed(made: dict[str, Made], stages: tuple[str, ...]) -> None:
    """In order, each with a summary; a stage that fails does not keep the next from running."""
    run = made["several"]
    ends = [line for line in run.lines if re.match(rf"({'|'.join(STAGES)}): ", line)]
    assert [line.partition(":")[0] for line in ends] == list(stages), [*run.lines, run.errors]
    assert all("a REHEARSAL on the CPU" in line for line in ends)
    words = {stage: "FAILED" if stage == "tests" else "ok" for stage in stages}
    assert run.lines[-1] == "make gpu: " + ", ".join(f"{stage} {word}" for stage, word in words.items())
    assert "compute-sanitizer was not run: it needs a GPU" in run.lines
    assert any(line.startswith("copy bandwidth, measured first") for line in run.lines)
    measured = set()
    for document in (run.out / "rehearsal").glob("*-partial.json"):
        saved = json.loads(document.read_text())
        assert (saved["rehearsal"], saved["complete"]) == (True, False)
        assert {record["op"] for record in saved["cases"]} == set(saved["ops"])
        measured |= set(saved["ops"])
    ops = {op for stage in stages if stage in benchmark.STAGES for op in benchmark.STAGES[stage][0]}
    assert measured == ops
    assert {op for each, _ in benchmark.STAGES.values() for op in each} == set(workloads.names())
    assert_few_and_small(run.out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the message misses")
def test_without_a_gpu_it_says_so(made: dict[str, Made]) -> None:
    run = made["no GPU"]
    assert run.code != 0
    assert "no GPU: torch" in run.errors
    assert "`make gpu DEVICE=cpu` rehearses the stages" in run.errors
    assert run.lines == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--stage", "test"],
            f"'test' is no stage: expected {', '.join(STAGES)}, or nothing for all",
        ),
        (["--device", "gpu"], "'gpu' is no device: expected cuda, or cpu for a rehearsal"),
    ],
)
def test_what_is_not_known_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_command_and_what_it_started_end_at_the_deadline(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    program = f"sleep 1.5 && touch {mark} & echo here; sleep 60"
    finished = run(["sh", "-c", program], tmp_path / "log", Deadline(0.4))
    assert (finished.code, finished.stopped) == (None, "deadline")
    assert "here" in finished.text()
    run(["sleep", "1.5"], tmp_path / "log", Deadline(10))
    assert not mark.exists()


# --- compute-sanitizer, by what it prints -----------------------------------------------------------------------------

FOUND = """right: layer_norm 1
========= Invalid __global__ write of size 4 bytes
=========     at backward_kernel+0x120
========= ERROR SUMMARY: 2 errors
"""
RACES = """4 of 4 cases right
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
"""
CLEAN = """4 of 4 cases right
========= ERROR SUMMARY: 0 errors
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
4 of 4 cases right
"""


def judged(folder: Path, text: str, code: int | None, name: str = "memcheck") -> sanitize.Check:
    log = folder / "log"
    log.write_text(text)
    return sanitize.judge("native", name, Finished(code, "" if code is not None else "deadline", 1.0, log))


def test_what_the_tools_print_is_understood(tmp_path: Path) -> None:
    clean = judged(tmp_path, CLEAN, 0)
    assert (clean.errors, clean.cases, clean.trouble) == (0, "4 of 4", "")
    found = judged(tmp_path, FOUND, 77)
    assert (found.errors, found.trouble) == (2, "2 errors")
    assert sanitize.first_reports(FOUND) == [
        "Invalid __global__ write of size 4 bytes at backward_kernel+0x120",
    ]
    races = judged(tmp_path, RACES, 77, "racecheck")
    assert (races.errors, races.trouble) == (3, "3 errors")


def test_a_tool_that_did_not_run_proves_nothing(tmp_path: Path) -> None:
    refused = judged(tmp_path, REFUSED, 0)
    assert refused.errors is None
    assert "did not come to a summary" in refused.trouble
    assert "Device not supported" in refused.trouble
    stopped = judged(tmp_path, "right: one\n", None)
    assert stopped.unfinished
    crashed = judged(tmp_path, "========= ERROR SUMMARY: 0 errors\n", 1)
    assert crashed.trouble.startswith("exit code 1")
    wrong = judged(tmp_path, "wrong: rms_norm: off\n3 of 4 cases right\n", 1, "plain")
    assert "wrong: rms_norm: off" in wrong.trouble
