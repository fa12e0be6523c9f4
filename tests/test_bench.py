"""The benchmark: bytes are counted right, grids are what they should be, samples arrive as they were taken."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bench import harness
from bench.gpu import timing as gpu_timing
from bench_examples import CPU, SMALL, quick
from fastreg import backends
from fastreg.cli import benchmark, gate, machine, timing, workloads
from fastreg.cli.measure import COPY
from fastreg.cli.providers import COMPILE, EAGER, Provider, providers_for
from fastreg.cli.workloads import (
    BACKWARD,
    BOTH,
    DIRECTIONS,
    FORWARD,
    Case,
    _maps,
    batch_norm,
)
from fastreg.cli.workloads.layer_norm import bytes_moved

pytestmark = pytest.mark.backend_independent


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
