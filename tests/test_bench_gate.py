"""The equality gate: what is right passes, nothing wrong is timed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench_examples import CPU, SMALL, quick
from fastreg import backends, functional
from fastreg.cli import benchmark, gate, summary
from fastreg.cli.measure import COPY
from fastreg.cli.providers import EAGER
from fastreg.cli.workloads import FORWARD, Case, Problem, batch_norm, group_norm, instance_norm
from fastreg.cli.workloads._maps import LAYOUTS

pytestmark = pytest.mark.backend_independent

# A case of every op, and of those over channels in every chain and layout that is checked.
KINDS = [
    ("layer_norm", (40, 129), "", ""),
    ("rms_norm", (40, 129), "", ""),
    ("dropout_add_layer_norm", (40, 129), "", ""),
    ("dropout_add_rms_norm", (4, 10, 129), "", ""),
    *(
        (op, (6, 19, 5, 7), layout, chain)
        for op, norm in (
            *(("batch_norm", batch_norm), ("group_norm", group_norm)),
            ("instance_norm", instance_norm),
        )
        for layout, chain in dict.fromkeys((layout, chain) for _, layout, chain in norm.CHECKS)
    ),
    ("group_norm", (3, 24, 5, 7), "contiguous", "silu"),
    *(("dropout", (40, 129), "", chain) for chain in ("", "add", "path", "path+add")),
    *(("dropout", (6, 19, 5, 7), "channels_last", chain) for chain in ("", "path+add", "2d")),
    *(("drop_block", (4, 9, 8, 9), layout, chain) for layout in LAYOUTS for chain in ("", "shared")),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("precision", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float64, 1e-12)], ids=str
)
def test_gate_accepts_the_formula_and_finds_one_wrong_element(
    kind: tuple[str, tuple[int, ...], str, str], precision: torch.dtype, error: float
) -> None:
    op, shape, layout, chain = kind
    problem = Case(op, shape, precision, layout, chain).problem(CPU, precision)
    # In float64 torch, or our reference of a random op, is exact to a few roundings; rounding that to the dtype is the
    # best a backend can do, unless the op rounds in between as well.
    rounds = op.startswith("dropout_add") and precision.itemsize == 2
    exact = Case(op, shape, precision if rounds else torch.float64, layout, chain).problem(CPU)
    for mine, given in ((exact.arguments, problem.arguments), (exact.buffers, problem.buffers)):
        for tensor, rounded in zip(mine.values(), given.values(), strict=True):
            tensor.data.copy_(rounded)
    exact.grad_output.copy_(problem.grad_output)
    function = exact.torch_function if exact.peer_truth is None else exact.fastreg_function
    with backends.use("reference"):
        results = {name: tensor.to(precision) for name, tensor in exact.results(function).items()}
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
