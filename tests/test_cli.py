"""The commands: doctor, check and demo, and what they say where packages are missing."""

from __future__ import annotations

import ast
import copy
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fastreg
from fastreg import backends
from fastreg.__main__ import main
from fastreg.backends.reference import layer_norm as reference
from fastreg.cli import (
    check,
    demo,
    doctor,
    extras,
    images,
    machine,
    residual_network,
    training,
    vision_transformer,
    workloads,
)
from fastreg.cli.app import app
from fastreg.cli.training import CONVERTED, PLAIN
from fastreg.cli.workloads import Case

pytestmark = pytest.mark.backend_independent

CPU = torch.device("cpu")
RUNNER = CliRunner()
# torch's own one starts anew for every call that is checked.
_OWN_STREAM = torch.Generator()


# --- doctor -----------------------------------------------------------------------------------------------


def test_doctor_covers_every_op_device_and_dtype() -> None:
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for part in (
        fastreg.__version__,
        torch.__version__,
        "Native libraries",
        "What is missing",
        machine.cpu_name(),
    ):
        assert part in result.output
    for op in workloads.names():
        for device_type in doctor.DEVICES:
            rows = [line for line in result.output.splitlines() if line.split()[:2] == [op, device_type]]
            for dtype in doctor.DTYPES:
                assert sum(str(dtype).removeprefix("torch.") in row for row in rows) == 1


def test_doctor_names_the_backend_that_a_call_runs() -> None:
    tensor = torch.ones(2, 8)
    for name in (None, "reference"):
        with backends.use(name):
            assert doctor.choice("layer_norm", "cpu", torch.float32)[0] == backends.pick("layer_norm", tensor)


def test_doctor_says_that_calls_raise_where_the_backend_asked_for_cannot_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = backends.unavailable

    def unavailable(name: str, *arguments: Any) -> str | None:
        return "not built: make native" if name == "native" else original(name, *arguments)

    monkeypatch.setattr(backends, "unavailable", unavailable)
    with backends.use("native"):
        assert doctor.choice("layer_norm", "cpu", torch.float32)[0] == "none"
        assert "every op on cpu, every op on cuda: not built: make native" in " ".join(
            doctor.report().split()
        )


def test_doctor_survives_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str, *arguments: Any) -> str | None:
        if name == "native":
            raise OSError("libfastreg_cpu.so: truncated")
        return None

    monkeypatch.setattr(backends, "unavailable", unavailable)
    with backends.use(None):
        assert doctor.choice("layer_norm", "cpu", torch.float32) == ("none", "calls raise, see below")
        assert "OSError: libfastreg_cpu.so: truncated" in doctor.report()


def test_doctor_needs_no_extra() -> None:
    """In a process of its own, since here rich and typer are imported already."""
    names = ("rich", "typer", "matplotlib", "sklearn")
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({names}))\n"
        "from fastreg.__main__ import main\n"
        "sys.argv = ['fastreg', 'doctor']\n"
        "sys.exit(main())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "pip install typer rich matplotlib scikit-learn" in " ".join(result.stdout.split())


# --- missing packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "bench", "check", ""])
def test_message_has_the_pip_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "argv", ["fastreg", command] if command else ["fastreg"])
    assert main() == 1
    output = capsys.readouterr()
    assert output.err.strip().endswith(": pip install rich")
    assert output.out == ""


def test_every_command_lists_its_packages() -> None:
    assert set(extras.NEEDS) == {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "--backend", "cudnn"], "'cudnn' is none of native, triton, reference"),
        (["bench", "--op", "batch"], "'batch' is none of"),
        (["bench", "--dtype", "int8"], "'int8' is none of"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], text: str) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the message misses")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    result = RUNNER.invoke(app, ["demo", "--device", "cuda"])
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


# --- check ------------------------------------------------------------------------------------------------


def few(op: str, dtype: torch.dtype) -> list[Case]:
    """The first shape of every layout and chain of an op, and the last."""
    found = {(case.layout, case.chain): case for case in reversed(check.cases(op, dtype))}
    return [*found.values(), check.cases(op, dtype)[2]]


def test_check_tries_batch_norm_in_every_layout_and_chain() -> None:
    cases = check.cases("batch_norm", torch.float16)
    assert len(set(cases)) == len(cases)
    assert {case.dtype for case in cases} == {torch.float16}
    assert {len(case.shape) for case in cases} == {2, 3, 4, 5}
    kinds = {(case.layout, case.chain) for case in cases}
    chains = ("", "relu", "add+relu", "evaluation", "evaluation+add+relu")
    assert kinds == set(itertools.product(("contiguous", "channels_last"), chains))
    assert str(cases[-1]).startswith("batch_norm+evaluation+add+relu channels_last float16 (")


def test_check_passes_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.outcomes, "__defaults__", (None, few))
    result = RUNNER.invoke(app, ["check", "--backend", "reference", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    count = len(workloads.names()) * len(check.MIXES)
    assert f"all {count} are right" in result.output
    assert result.output.count("reference") == count


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda output: output * 1.001, "times its rounding budget"),
        (
            lambda output: output + 1e-7 * torch.rand(output.shape, generator=_OWN_STREAM),
            "two runs differ in output",
        ),
        (lambda output: output.flip(), "TypeError"),
    ],
    ids=["wrong", "not deterministic", "raises"],
)
def test_check_fails_on_a_wrong_backend(spoil: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, statistics = reference.layer_norm_fwd(*arguments)
        return spoil(output), statistics

    def load(op: str, operator: str) -> Any:
        return forward if operator == "layer_norm_fwd" else getattr(reference, operator)

    monkeypatch.setitem(backends._extra, "spoilt", load)
    monkeypatch.setattr(workloads, "names", lambda: ("layer_norm",))
    monkeypatch.setattr(check, "MIXES", check.MIXES[:1])
    monkeypatch.setattr(check.outcomes, "__defaults__", (None, lambda op, dtype: [Case(op, (3, 17), dtype)]))
    backends.implementation.cache_clear()
    text_out = io.StringIO()
    assert check.command(CPU, "spoilt", Console(file=text_out, width=140)) == 1
    backends.implementation.cache_clear()
    assert text in text_out.getvalue()
    assert "1 of 1 are wrong" in text_out.getvalue()


def test_check_of_nothing_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda *_: "not here")
    text = io.StringIO()
    assert check.command(CPU, None, Console(file=text, width=140)) == 1
    assert "nothing was checked" in text.getvalue()
    assert "native on cpu: not here" in text.getvalue()


# --- demo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [vision_transformer, residual_network])
def test_the_networks_know_nothing_of_fastreg(network: ModuleType) -> None:
    tree = ast.parse(Path(str(network.__file__)).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"__future__", "torch"}


def test_vision_transformer_takes_any_size() -> None:
    model = vision_transformer.VisionTransformer(width=16, depth=1, heads=2)
    for shape, patch in (((2, 1, 8, 8), None), ((1, 1, 7, 13), None), ((1, 1, 43, 64), 16)):
        logits = model(torch.randn(shape), patch)
        assert logits.shape == (shape[0], 10)
        assert logits.isfinite().all()
    rows = vision_transformer.positions(3, 5, 16, CPU)
    assert torch.unique(rows, dim=0).shape == (15, 16)


def test_residual_network_takes_any_size_and_all_its_norms_are_fused() -> None:
    model = residual_network.ResidualNetwork(width=4, depth=2, dropout=0.0)
    plain = copy.deepcopy(model)
    report = training.convert(model)
    # The norms and a dropout.
    assert len(report.replaced) == 15 + 1
    # Where a shortcut has a norm, one of the two norms that are added takes the other one's output.
    assert len(report.fused) == 13
    for shape in ((2, 1, 8, 8), (1, 1, 7, 13)):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_digits_are_split_by_writer_and_standardised() -> None:
    digits = images.digits(CPU)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert digits.train_images.std().item() == pytest.approx(1, abs=1e-3)
    moved = images.shifted(digits.train_images[:50], torch.Generator().manual_seed(0))
    assert moved.shape == (50, 1, 8, 8)
    assert not torch.equal(moved, digits.train_images[:50])


def fake_training(loss: float, accuracy: float, gradient: float = 1e-6) -> training.Training:
    """A training of one epoch in which the two models are so far apart."""
    epoch = training.Epoch(1, {PLAIN: 1.0, CONVERTED: 1 + loss}, {PLAIN: 0.9, CONVERTED: 0.9 + accuracy})
    return training.Training({}, fastreg.convert(torch.nn.Linear(1, 1)), [epoch], {PLAIN: [1.0]}, gradient)


@pytest.mark.parametrize(
    ("differences", "text"),
    [
        ((1.0, 0.0), "losses"),
        ((0.0, 0.5), "accuracies"),
        ((0.0, 0.0, 1e-2), "gradients"),
        ((float("nan"), 0.0), "losses"),
    ],
)
def test_disagreements_are_found(differences: tuple[float, ...], text: str) -> None:
    assert fake_training(1e-4, 0.0).disagreements() == []
    (line,) = fake_training(*differences).disagreements()
    assert text in line


def test_demo_fails_where_the_models_disagree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compared = SimpleNamespace(disagreements=lambda: ["the outputs differ"])
    monkeypatch.setattr(demo, "_train", lambda *_: fake_training(0.0, 0.0))
    monkeypatch.setattr(demo, "_photographs", lambda *_: compared)
    monkeypatch.setattr(demo, "_kernels", lambda *_: {"cases": [], "host": []})
    monkeypatch.setattr(demo, "_training_record", lambda *_: {})
    monkeypatch.setattr(demo, "asdict", lambda *_: {})
    monkeypatch.setattr(demo.chart, "draw", lambda *_: None)
    text = io.StringIO()
    assert demo.command(demo.QUICK, CPU, tmp_path, Console(file=text)) == 1
    assert "DISAGREEMENT: residual network: the outputs differ" in text.getvalue()


@pytest.fixture
def one_thread() -> Iterator[list[str]]:
    """The option for one thread: threads that wait for each other on busy cores make seconds into minutes."""
    before = torch.get_num_threads()
    yield ["--threads", "1"]
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("error:constrained_layout not applied")  # panels without room
def test_quick_demo_from_start_to_end(one_thread: list[str], tmp_path: Path) -> None:
    result = RUNNER.invoke(
        app, ["demo", "--quick", "--device", "cpu", "--output", str(tmp_path), *one_thread]
    )
    assert result.exit_code == 0, result.output
    for expected in (
        "plain and converted agree",
        "every figure below is the CPU's",
        "torch.nn.RMSNorm",
        "x eager",
    ):
        assert expected in result.output
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["disagreements"] == []
    assert list(found["networks"]) == list(training.NETWORKS)
    for network in found["networks"].values():
        assert [epoch["number"] for epoch in network["training"]["epochs"]] == [1, 2]
        assert network["training"]["gradient_difference"] <= training.GRADIENT_ALLOWANCE
        assert len(network["training"]["replaced"]) > 9
        assert network["photographs"]["shape"] == [2, 1, 427, 640]
    assert len(found["networks"][training.RESIDUAL_NETWORK]["training"]["fused"]) == 7
    fused = [each["what"] for each in found["networks"][training.VISION_TRANSFORMER]["training"]["fused"]]
    assert sorted(fused) == ["dropout + add"] * 2 + ["dropout + add + norm"] * 2
    saved = found["networks"][training.VISION_TRANSFORMER]["photographs"]["saved_bytes"]
    assert saved[CONVERTED] < saved[PLAIN]
    assert {record["op"] for record in found["cases"]} == set(workloads.names())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
