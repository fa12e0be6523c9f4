"""The benchmark's own tests: nothing wrong is timed, bytes are counted right, results are kept and reported right."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import harness, report
from bench.gpu import timing as gpu_timing
from fastreg import backends, functional
from fastreg.cli import bench, benchmark, gate, host, machine, measure, summary, timing, workloads
from fastreg.cli.measure import COPY
from fastreg.cli.providers import COMPILE, EAGER, Provider, providers_for
from fastreg.cli.workloads import (
    BACKWARD,
    BOTH,
    DIRECTIONS,
    FORWARD,
    Case,
    Problem,
    _maps,
    batch_norm,
    group_norm,
    instance_norm,
)
from fastreg.cli.workloads.layer_norm import bytes_moved

pytestmark = pytest.mark.backend_independent

CPU = torch.device("cpu")
CHAIN = Case("batch_norm", (4, 8, 3, 5), torch.float32, "channels_last", "add+relu")
SMALL = Case("layer_norm", (5, 33), torch.float32)
# A case of every op, and of the norms over channels in every chain and layout that is checked.
KINDS = [
    ("layer_norm", (40, 129), "", ""),
    ("rms_norm", (40, 129), "", ""),
    *(
        (op, (6, 19, 5, 7), layout, chain)
        for op, norm in (
            *(("batch_norm", batch_norm), ("group_norm", group_norm)),
            ("instance_norm", instance_norm),
        )
        for layout, chain in dict.fromkeys((layout, chain) for _, layout, chain in norm.CHECKS)
    ),
    ("group_norm", (3, 24, 5, 7), "contiguous", "silu"),
]


def eager_and(name: str, function: Any) -> Any:
    """The providers of a problem: torch eager, and a backend of ours that computes ``function``."""

    def choose(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
        eager = Provider(EAGER, problem.torch_function, peer=True)
        return [eager, Provider(name, lambda *tensors: function(problem, *tensors), peer=False)], {
            "liger": "no GPU"
        }

    return choose


def quick(
    case: Case = SMALL, function: Any = lambda problem, *tensors: problem.torch_function(*tensors)
) -> Any:
    choose = eager_and("native", function)
    return measure.measure(case, CPU, timing.CpuClock(), seconds=0, fewest=3, most=3, choose=choose)


# --- the gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("precision", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float64, 1e-12)], ids=str
)
def test_gate_accepts_the_formula_and_finds_one_wrong_element(
    kind: tuple[str, tuple[int, ...], str, str], precision: torch.dtype, error: float
) -> None:
    op, shape, layout, chain = kind
    problem = Case(op, shape, precision, layout, chain).problem(CPU, precision)
    # In float64 torch is exact to a few roundings; rounding that to the dtype is the best a backend can do.
    exact = Case(op, shape, torch.float64, layout, chain).problem(CPU)
    for mine, given in ((exact.arguments, problem.arguments), (exact.buffers, problem.buffers)):
        for tensor, rounded in zip(mine.values(), given.values(), strict=True):
            tensor.data.copy_(rounded)
    exact.grad_output.copy_(problem.grad_output)
    results = {name: tensor.to(precision) for name, tensor in exact.results(exact.torch_function).items()}
    assert set(results) == {found.name for found in problem.truth()}
    assert gate.judge({"": results}, problem.truth())[""].refusal(peer=False) is None

    for name in results:
        spoilt = {**results, name: results[name].clone()}
        last = tuple(size - 1 for size in spoilt[name].shape)
        spoilt[name][last] += error * spoilt[name].abs().max()
        refusal = gate.judge({"": spoilt}, problem.truth())[""].refusal(peer=False)
        assert refusal is not None, name
        assert refusal.startswith(name)


def test_gate_allows_peers_their_own_rounding_but_no_other_function() -> None:
    problem = Case("layer_norm", (300, 64), torch.bfloat16).problem(CPU)
    results = problem.results(problem.torch_function)
    # torch's own half-precision gradients are beyond the budget and within the allowance.
    assert gate.judge({"": results}, problem.truth())[""].refusal(peer=True) is None
    for name in results:
        wrong = {**results, name: results[name] * (1.5 if name in ("grad_weight", "grad_bias") else 1.1)}
        assert gate.judge({"": wrong}, problem.truth())[""].refusal(peer=True) is not None, name


def test_gate_takes_not_a_number_and_a_wrong_shape_for_wrong() -> None:
    problem = SMALL.problem(CPU)
    results = problem.results(problem.torch_function)
    for wrong in (torch.full_like(results["grad_bias"], torch.nan), results["grad_bias"][:-1]):
        found = gate.judge({"": {**results, "grad_bias": wrong}}, problem.truth())[""]
        assert found.budget_used == math.inf
        assert found.worst == "grad_bias"


@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": 2e-5},
        {"momentum": 0.11},
        {"activation": "identity"},
        {"activation": "leaky_relu", "negative_slope": 1e-3},
        {"residual": None},
        {"training": False},
    ],
    ids=str,
)
def test_gate_finds_a_wrong_batch_norm(layout: str, wrong: dict[str, Any]) -> None:
    problem = Case("batch_norm", (8, 20, 6, 5), torch.float32, layout, "add+relu").problem(CPU)
    running_mean, running_var = problem.buffers.values()

    def call(changes: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
        input, weight, bias, residual = tensors
        options = {"training": True, "eps": 1e-5, "residual": residual, "activation": "relu", **changes}
        # What is not asked for has a gradient of zero.
        kept = 0 * residual if options["residual"] is None else 0
        return functional.batch_norm(input, running_mean, running_var, weight, bias, **options) + kept

    def refusal(changes: dict[str, Any]) -> str | None:
        with backends.use("reference"):
            results = problem.results(lambda *tensors: call(changes, *tensors))
        return gate.judge({"": results}, problem.truth())[""].refusal(peer=False)

    assert refusal({}) is None
    assert refusal(wrong) is not None


def test_results_leave_the_buffers_as_they_were() -> None:
    problem = Case("batch_norm", (8, 20), torch.float32).problem(CPU)
    before = {name: tensor.clone() for name, tensor in problem.buffers.items()}
    results = problem.results(problem.torch_function)

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        problem.torch_function(*tensors)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        problem.results(broken)
    for name, tensor in problem.buffers.items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, results[name])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_where_rounding_decides_the_sign(precision: torch.dtype) -> None:
    """And the rest of it, nearly all, is there."""
    problem = Case("batch_norm", (32, 8, 16, 16), precision, "channels_last", "add+relu").problem(CPU)
    silent = problem.grad_output == 0
    assert 0 < silent.double().mean() < 0.03
    wide = [tensor.detach().double() for tensor in problem.arguments.values()]
    input, weight, bias, residual = wide
    argument = torch.nn.functional.batch_norm(input, None, None, weight, bias, training=True) + residual
    assert argument[silent].abs().max() < 0.2
    assert argument[~silent].abs().min() > 1e-4


def test_a_wrong_backend_is_not_timed_and_makes_the_run_red() -> None:
    found = quick(function=lambda problem, *tensors: problem.torch_function(*tensors) * 1.001)
    assert set(found.samples) == {COPY, EAGER}
    assert "rounding budget" in found.notes["native"]["refused"]
    record = found.record(FORWARD)
    assert "milliseconds" not in record["providers"]["native"]
    assert benchmark.red({"cases": found.records()}) == [
        f"native: layer_norm float32 (5, 33): {found.notes['native']['refused']}"
    ]


def test_a_backend_that_raises_is_reported_with_its_message() -> None:
    def broken(problem: Problem, *tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler\nmore")

    found = quick(function=broken)
    assert found.notes["native"] == {"failed": "RuntimeError: no compiler"}
    document = {"cases": found.records()}
    assert summary.untimed(document) == [
        "liger: no GPU",
        "native failed: RuntimeError: no compiler [layer_norm float32 (5, 33)]",
    ]


# --- bytes, rounds, samples -------------------------------------------------------------------------------


def test_byte_formula() -> None:
    rows, columns = 2048, 768
    x = rows * columns * 4
    layer = bytes_moved(rows, columns, 4, 4, centred=True)
    assert layer[FORWARD] == (x + 2 * columns * 4) + (x + 2 * rows * 4)
    assert layer[BACKWARD] == (2 * x + 2 * rows * 4 + columns * 4) + (x + 2 * columns * 4)
    assert layer[BOTH] == layer[FORWARD] + layer[BACKWARD]
    root = bytes_moved(rows, columns, 2, 4, centred=False)
    assert root[FORWARD] == (x // 2 + columns * 4) + (x // 2 + rows * 4)
    assert root[BACKWARD] == (x + rows * 4 + columns * 4) + (x // 2 + columns * 4)


@pytest.mark.parametrize("chain", ["", "relu", "add+relu"])
def test_bytes_of_a_batch_norm_are_what_stays_on_chip_needs(chain: str) -> None:
    problem = Case("batch_norm", (4, 16, 8, 8), torch.bfloat16, "contiguous", chain).problem(CPU)
    x = problem.input.nbytes
    statistics, parameters = 2 * 16 * 4, 2 * 16 * 4
    passes = 3 if "add" in chain else 2
    # Running statistics are read and written.
    assert problem.bytes_moved[FORWARD] == passes * x + statistics + parameters + 2 * parameters
    assert problem.bytes_moved[BACKWARD] == (passes + 1) * x + statistics + 2 * parameters


def test_the_grid_of_batch_norm_is_of_a_resnet_50() -> None:
    for device_type, layers, relu in (("cpu", 9, 9), ("cuda", 12, 6)):
        points = batch_norm.GRID[device_type]
        assert len(set(points)) == len(points)
        shapes = {shape for shape, _, _ in points}
        assert {shape[0] for shape in shapes} == {32, 256}
        assert {(shape[1], shape[2]) for shape in shapes} <= set(batch_norm.RESNET_50)
        kinds = Counter((layout, chain) for _, layout, chain in points)
        counts = {"": layers, "relu": relu, "add+relu": layers}
        assert kinds == {(layout, chain): counts[chain] for layout in batch_norm.LAYOUTS for chain in counts}
        assert len(set(benchmark.cases("batch_norm", device_type))) == 2 * len(points)
    # Three activations and a gradient for each of five providers.
    assert max(math.prod(shape) for shape, _, _ in batch_norm.GRID["cpu"]) * 4 * 4 * 5 < 12e9


@pytest.mark.parametrize("op", ["batch_norm", "group_norm", "instance_norm"])
def test_the_reference_is_not_timed_on_large_maps(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(op, (2, 20, 4), torch.float32)
    monkeypatch.setattr(_maps, "_REFERENCE_ELEMENTS", 100)
    monkeypatch.setattr(backends, "pick", lambda op, tensor: "native")
    found, missing = providers_for(case.problem(CPU))
    assert "reference" not in {provider.name for provider in found}
    assert missing["reference"].endswith(f"a CPU's {op.replace('_', ' ')}")
    monkeypatch.setattr(backends, "pick", lambda op, tensor: "reference")
    assert not case.problem(CPU).left_out


def test_timms_layer_is_made_of_the_problems_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class BatchNormAct2d(torch.nn.BatchNorm2d):
        """timm's, as far as it matters."""

        def __init__(self, channels: int, act_layer: Any, **options: Any) -> None:
            super().__init__(channels, **options)
            self.act = act_layer(inplace=True)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.act(super().forward(input))

    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers", SimpleNamespace(BatchNormAct2d=BatchNormAct2d))
    case = Case("batch_norm", (4, 6, 5, 5), torch.float32, "channels_last", "relu")
    problem = case.problem(CPU)
    results = problem.results(problem.peers["timm"])
    assert gate.judge({"": results}, problem.truth())[""].refusal(peer=True) is None
    assert "adds no residual" in replace(case, chain="add+relu").problem(CPU).peers["timm"]


def test_bytes_of_a_problem_are_those_of_its_tensors() -> None:
    problem = Case("rms_norm", (7, 16), torch.bfloat16).problem(CPU)
    x, weight = (tensor.nbytes for tensor in problem.arguments.values())
    assert problem.bytes_moved[FORWARD] == 2 * x + weight + 7 * 4


def test_providers_take_turns() -> None:
    order = []

    def task(name: str) -> timing.Task:
        def run() -> tuple[float]:
            order.append(name)
            return (float(len(order)),)

        return run

    samples = timing.interleaved({name: task(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abcabc"
    assert samples["b"] == [(2.0,), (5.0,)]


def test_forward_and_backward_add_up() -> None:
    found = quick()
    assert set(found.samples) == {COPY, EAGER, "native"}
    for forward, backward, both in found.samples["native"]:
        assert both == pytest.approx(forward + backward)
        assert min(forward, backward) > 0


def test_samples_reach_pytest_benchmark_unchanged() -> None:
    class Fixture:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}
            self.durations: list[float] = []

        def pedantic(self, function: Any, rounds: int) -> None:
            for _ in range(rounds):
                start = harness.timer()
                function()
                self.durations.append(harness.timer() - start)

    found, fixture = quick(), Fixture()
    harness.hand_over(fixture, found, "native", BACKWARD)
    assert fixture.durations == [sample[1] for sample in found.samples["native"]]
    assert fixture.extra_info["budget_used"] <= 1
    with pytest.raises(pytest.skip.Exception, match="no GPU"):
        harness.hand_over(fixture, found, "liger", BACKWARD)


def test_a_red_gate_fails_the_benchmark_test() -> None:
    found = quick(function=lambda problem, *tensors: problem.torch_function(*tensors) + 1)
    with pytest.raises(pytest.fail.Exception, match="rounding budget"):
        harness.hand_over(object(), found, "native", FORWARD)


def test_pytest_finds_every_case_of_the_grid() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[1]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    device = machine.default_device()
    expected = sum(
        len(benchmark.grid(device, [op])) * len(DIRECTIONS) * len(harness.provider_names(op, device))
        for op in workloads.names()
    )
    assert listing.count("::test_") == expected
    assert "bench_rms_norm.py::test_rms_norm[" in listing


# --- results and report -----------------------------------------------------------------------------------


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
        (old, ["batch_norm", "group_norm", "instance_norm"]),
    ]
    assert {record["op"] for record in one["cases"]} == {"layer_norm", "rms_norm"}
    assert {record["op"] for record in [*two["cases"], *two["host"]]} == {"batch_norm"}
    assert report.section(second, two, tmp_path).startswith(
        f"### {document['machine']['name']}: batch_norm, "
    )
    saved("2026-01-03", everything)
    assert report.newest(tmp_path)[0][0] == newest


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


# --- a GPU's stages ---------------------------------------------------------------------------------------


def test_every_kind_of_case_comes_early() -> None:
    cases = gpu_timing.spread(benchmark.cases("batch_norm", "cuda"))
    assert len(set(cases)) == len(cases) == 120
    kinds = [(case.dtype, case.layout, case.chain) for case in cases]
    assert len(set(kinds[:12])) == 12
    # Six shapes of every kind; of those with a ReLU only there are no more.
    assert kinds[: 6 * 12] == kinds[:12] * 6
    rest = [kind for kind in kinds[:12] if kind[2] != "relu"]
    assert kinds[6 * 12 :] == rest * 6


def test_a_gpu_waits_for_its_host() -> None:
    """For the slowest of the last calls, a bit longer; never for nothing and never for long."""
    assert timing.waiting_cycles([1e-3, 2e-3, 5e-4]) == pytest.approx(1.5 * 2e-3 * 2e9)
    assert timing.waiting_cycles([0.0]) == pytest.approx(1e-4 * 2e9)
    assert timing.waiting_cycles([1e-3, 60.0]) == pytest.approx(1e-2 * 2e9)


@pytest.mark.parametrize("op", workloads.names())
def test_torch_compile_is_timed_on_shapes_of_the_grid(op: str) -> None:
    shapes = {case.shape for case in benchmark.cases(op, "cuda")}
    assert set(gpu_timing._COMPILED[op]) <= shapes


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


def test_what_a_gpu_compiles_is_run_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def function(name: str) -> Any:
        def run(*arguments: torch.Tensor) -> torch.Tensor:
            ran.append(name)
            if name == "triton":
                raise RuntimeError("no kernel\nat all")
            return torch.nn.functional.layer_norm(arguments[0], arguments[0].shape[1:], *arguments[1:])

        return run

    everybody = [Provider(name, function(name), peer=False) for name in (EAGER, COMPILE, "triton", "native")]
    monkeypatch.setattr(gpu_timing, "providers_for", lambda problem: (everybody, {}))
    monkeypatch.setitem(gpu_timing._COMPILED, "layer_norm", (SMALL.shape,))
    assert gpu_timing.run_once(SMALL, CPU) == "triton: RuntimeError: ['no kernel']"
    assert ran == [COMPILE, "triton"]
