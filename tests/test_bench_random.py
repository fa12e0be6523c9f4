"""The benchmark of random ops: fastreg's masks are known from the seed, others' are read off what they return."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench_examples import CPU
from fastreg import backends, functional
from fastreg.cli import benchmark, gate, measure, timing, workloads
from fastreg.cli.providers import EAGER, Provider
from fastreg.cli.saved import saved_bytes
from fastreg.cli.workloads import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Problem,
    drop_block,
    dropout,
    dropout_add_layer_norm,
)
from masks import keep_blocks, keep_elements, keep_units

pytestmark = pytest.mark.backend_independent

CASES = [
    Case("dropout", (64, 129), torch.float32),
    Case("dropout", (64, 129), torch.bfloat16, chain="add"),
    Case("dropout", (300, 3, 5), torch.float32, chain="path"),
    Case("dropout", (300, 3, 5), torch.bfloat16, chain="path+add"),
    Case("dropout", (8, 33, 5, 7), torch.float32, "channels_last", "2d"),
    Case("drop_block", (4, 9, 14, 14), torch.float32, "channels_last"),
    Case("drop_block", (16, 9, 14, 14), torch.bfloat16, "contiguous", "shared"),
    Case("drop_block", (2, 9, 9, 8, 10), torch.float32, "contiguous"),
    Case("dropout_add_layer_norm", (64, 129), torch.float32),
    Case("dropout_add_layer_norm", (5, 40, 96), torch.bfloat16),
    Case("dropout_add_rms_norm", (300, 65), torch.bfloat16),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def refusal(problem: Problem, function: Callable[..., torch.Tensor], peer: bool = True) -> str | None:
    """What the gate has against a function."""
    with backends.use("reference"):
        results = problem.results(function)
    found = measure.verdicts(problem, {"": results}, {""} if peer else ())[""]
    return str(found) if isinstance(found, gate.Implausible) else found.refusal(peer)


@each_case
def test_the_random_stream_is_the_same_at_every_gated_call_and_left_alone(case: Case) -> None:
    problem = case.problem(CPU)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with backends.use("reference"):
        first, second = (problem.results(problem.fastreg_function) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    for name, result in first.items():
        assert torch.equal(result, second[name])


@each_case
def test_the_gate_wants_the_mask_of_the_seed_from_us_and_takes_any_from_others(case: Case) -> None:
    problem = case.problem(CPU)

    def another(*tensors: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return problem.fastreg_function(*tensors)

    assert refusal(problem, problem.fastreg_function, peer=False) is None
    assert "times its rounding budget" in str(refusal(problem, another, peer=False))
    for function in (problem.fastreg_function, another, problem.torch_function):
        assert refusal(problem, function) is None


def test_our_masks_are_those_that_python_draws() -> None:
    """The gate takes them from the reference backend; here they are drawn one unit after another."""
    generator = torch.Generator().manual_seed(workloads.SEED)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    for case in (CASES[0], CASES[2], Case("drop_block", (2, 3, 8, 9), torch.float32)):
        problem = case.problem(CPU)
        if case.op == "drop_block":
            places = (8 - 7 + 1) * (9 - 7 + 1)
            kept = keep_blocks(case.shape, (7, 7), seed, round(0.1 * 72 / (49 * places) * 2**32), False)
        elif case.chain:
            kept = keep_units(case.shape, 1, seed, round(0.1 * 2**32))
        else:
            kept = keep_elements(problem.input, seed, round(0.1 * 2**16))
        zeros = {exact.name: [] for exact in problem.truth()}
        for exact in problem.truth():
            zeros[exact.name].append(exact.value == 0)
        assert torch.equal(torch.cat(zeros["grad_input"]), ~kept)
        assert torch.equal(torch.cat(zeros["output"]), ~kept)


def test_a_gradient_that_is_zero_by_chance_does_not_hide_what_was_kept() -> None:
    problem = CASES[8].problem(CPU)
    results = problem.results(problem.torch_function)
    kept = results["grad_input"] != 0
    for mask in (kept, ~kept):
        for index in mask.nonzero()[:3].tolist():
            for name in ("grad_input", "grad_residual"):
                results[name][tuple(index)] = 0.0
    assert torch.equal(dropout_add_layer_norm._kept_by(results, problem.arguments, True), kept)


class _Apart(torch.autograd.Function):
    """Backward with a mask of its own."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, 0.1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return F.dropout(grads[0], 0.1)


def _unscaled(input: torch.Tensor) -> torch.Tensor:
    return input * (torch.rand_like(input) > 0.1)


def _grown(gamma: float, block: int, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Blocks at a rate of seeds of its own."""

    def function(input: torch.Tensor) -> torch.Tensor:
        kept = 1 - F.max_pool2d(torch.rand(shape).lt(gamma).float(), block, 1, padding=block // 2)
        return input * kept * (kept.numel() / kept.sum())

    return function


def _normed(dropout: Callable[..., torch.Tensor], eps: float = 1e-5) -> Callable[..., torch.Tensor]:
    """A layer norm of a sum with that dropout."""

    def function(input: torch.Tensor, residual: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(residual + dropout(input, 0.5), input.shape[-1:], *parameters, eps=eps)

    return function


@pytest.mark.parametrize(
    ("case", "function", "text"),
    [
        (CASES[0], lambda input: F.dropout(input, 0.2), "is dropped where 0.1 was expected"),
        (CASES[0], lambda input: input + 0, "0 is dropped where 0.1 was expected"),
        (CASES[0], _unscaled, "is off by 0.1 of its largest value"),
        (CASES[0], _Apart.apply, "is off by"),
        (CASES[2], lambda input: F.dropout(input, 0.1), "is off by"),
        (CASES[1], lambda input, residual: F.dropout(input, 0.1) + 0 * residual, "output is off by"),
        (CASES[4], lambda input: F.dropout(input, 0.1), "is off by"),
        (CASES[5], lambda input: F.dropout(input, 0.1), "is not made of whole blocks"),
        (CASES[5], _grown(0.05, 7, (4, 9, 14, 14)), "is not made of whole blocks"),
        (CASES[6], _grown(0.1, 7, (16, 1, 14, 14)), "is dropped where 0.2"),
        (CASES[6], _grown(0.0031, 7, (16, 9, 14, 14)), "is off by"),
        (CASES[8], _normed(F.dropout), "is dropped where 0.1 was expected"),
        (CASES[8], _normed(lambda input, _: input * (torch.rand_like(input) > 0.1)), "is off by"),
        (CASES[8], _normed(lambda input, _: F.dropout(input, 0.1), eps=0.1), "is off by"),
        (CASES[10], _normed(lambda input, _: F.dropout(input, 0.1)), "is off by"),
    ],
    ids=[
        *(
            "rate",
            "nothing",
            "scale",
            "backward",
            "elements of samples",
            "no residual",
            "elements of channels",
        ),
        *("elements of blocks", "blocks at the border", "gamma", "not shared"),
        *("rate before a norm", "scale before a norm", "eps", "another norm"),
    ],
)
def test_the_gate_refuses_another_function(case: Case, function: Any, text: str) -> None:
    assert text in str(refusal(case.problem(CPU), function))


def test_an_implausible_mask_is_not_timed() -> None:
    providers = [
        Provider(EAGER, lambda input: F.dropout(input, 0.5), peer=True),
        Provider("reference", functional.dropout, peer=False, context=lambda: backends.use("reference")),
    ]
    found = measure.measure(
        CASES[0], CPU, timing.CpuClock(), 0, fewest=2, most=2, choose=lambda problem: (providers, {})
    )
    assert set(found.samples) == {measure.COPY}
    assert "0.1 was expected" in found.notes[EAGER]["refused"]
    # At its default rate of a half.
    assert "rounding budget" in found.notes["reference"]["refused"]
    assert benchmark.red({"cases": found.records()})


@pytest.mark.parametrize(
    ("shape", "chain"),
    [
        ((8, 16, 7, 7), ""),
        *(
            (shape, chain)
            for shape in ((8, 16, 14, 14), (8, 16, 8, 20), (32, 16, 4, 3), (2, 3, 9, 8, 11))
            for chain in ("", "shared")
        ),
    ],
)
def test_masks_of_blocks_are_plausible_until_one_position_is_not(shape: tuple[int, ...], chain: str) -> None:
    setting = drop_block.setting_of(Case("drop_block", shape, torch.float32, chain=chain))
    seeds = (torch.rand(setting.places, generator=torch.Generator().manual_seed(3)) < setting.gamma).float()
    _, padding = setting.beside
    pool = F.max_pool2d if len(shape) == 4 else F.max_pool3d
    kept = pool(F.pad(seeds, padding), setting.block, 1) == 0
    assert kept.shape == setting.shape
    drop_block.check_mask(kept, setting)
    # The middle of a block, or its corner where no part of it is cut off.
    sample, channel, *place = seeds.nonzero()[0].tolist()
    spoilt = kept.clone()
    spoilt[(sample, channel, *place)] = True
    with pytest.raises(gate.Implausible, match="whole blocks"):
        drop_block.check_mask(spoilt, setting)


def test_shares_are_held_to_six_deviations() -> None:
    kept = torch.ones(10_000, dtype=torch.bool)
    deviation = math.sqrt(0.1 * 0.9 / 10_000)
    for dropped, plausible in ((1000, True), (1175, True), (1185, False), (825, True), (815, False)):
        kept[:] = True
        kept[:dropped] = False
        if plausible:
            gate.check_share(kept, 0.1, deviation)
        else:
            with pytest.raises(gate.Implausible, match=r"6\.2 standard deviations away"):
                gate.check_share(kept, 0.1, deviation)


def test_other_libraries_are_called_as_they_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    branch = dropout._torch_branch(dropout._units.SAMPLE)
    blocks = {
        chain: drop_block._torch_function(drop_block.setting_of(case))
        for chain, case in (("", CASES[5]), ("shared", CASES[6]))
    }

    def stochastic_depth(input: torch.Tensor, p: float, mode: str) -> torch.Tensor:
        assert (p, mode) == (0.1, "row")
        return branch(input)

    def drop_path(x: torch.Tensor, drop_prob: float, training: bool) -> torch.Tensor:
        assert (drop_prob, training) == (0.1, True)
        return branch(x)

    def drop_block_of(chain: str) -> Callable[..., torch.Tensor]:
        def function(input: torch.Tensor, p: float, block_size: int) -> torch.Tensor:
            assert (p, block_size) == (0.1, 7)
            return blocks[chain](input)

        return function

    timm = SimpleNamespace(drop_path=drop_path, drop_block_2d=drop_block_of("shared"))
    torchvision = SimpleNamespace(stochastic_depth=stochastic_depth, drop_block2d=drop_block_of(""))
    for package, module, content in (("timm", "layers", timm), ("torchvision", "ops", torchvision)):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, f"{package}.{module}", content)
    there: dict[str, set[str]] = {}
    for case in (*CASES[:4], *CASES[5:7]):
        problem = case.problem(CPU)
        assert list(problem.peers) == list(workloads.workload(case.op).PEERS)
        for name, function in problem.peers.items():
            if not isinstance(function, str):
                assert refusal(problem, function) is None
                there.setdefault(name, set()).add(f"{case.op} {case.chain}".strip())
    paths = {"dropout path", "dropout path+add"}
    assert there == {"torchvision": paths | {"drop_block"}, "timm": paths | {"drop_block shared"}}


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_library_that_is_not_here_is_named_with_its_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    case = {"timm": CASES[6], "torchvision": CASES[5]}[package]
    for problem in (CASES[2].problem(CPU), case.problem(CPU)):
        assert str(problem.peers[package]).endswith(f": pip install {package}")


def test_bytes_are_passes_over_the_tensors() -> None:
    for chain, passes in (("", (2, 2)), ("add", (3, 2)), ("path", (2, 2)), ("path+add", (3, 2))):
        problem = Case("dropout", (4, 6, 8), torch.bfloat16, chain=chain).problem(CPU)
        forward, backward = (problem.input.nbytes * count for count in passes)
        assert problem.bytes_moved == {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}
    # A residual in fp32: the output has its dtype.
    wide = Case("dropout", (4, 6, 8), torch.bfloat16, chain="add").problem(CPU, torch.float32)
    x, residual = (tensor.nbytes for tensor in wide.arguments.values())
    assert (wide.bytes_moved[FORWARD], wide.bytes_moved[BACKWARD]) == (x + 2 * residual, residual + x)
    assert residual == wide.grad_output.nbytes == 2 * x
    blocks = Case("drop_block", (4, 6, 8, 8), torch.float32).problem(CPU)
    assert set(blocks.bytes_moved.values()) == {2 * blocks.input.nbytes, 4 * blocks.input.nbytes}


def test_the_grids_of_the_random_ops() -> None:
    for op in ("dropout", "drop_block"):
        module = workloads.workload(op)
        for points in (*module.GRID.values(), module.CHECKS):
            assert len(set(points)) == len(points)
        # Three tensors and as many gradients for each of six providers.
        assert max(math.prod(shape) for shape, _, _ in module.GRID["cpu"]) * 4 * 6 * 6 < 2e9
    assert {math.prod(shape) for shape, _, _ in dropout.GRID["cuda"]} == {2**26}
    ops = ("dropout", "drop_block", "dropout_add_layer_norm", "dropout_add_rms_norm")
    assert sum(len(benchmark.cases(op, "cuda")) for op in ops) <= 34
    stages = {(shape[1], shape[2]) for shape, _, _ in (*drop_block.GRID["cpu"], *drop_block.GRID["cuda"])}
    assert stages <= set(drop_block.RESNET_50)


def test_what_is_kept_for_backward_is_counted_once_and_without_the_arguments() -> None:
    x, y = (torch.randn(64, 32, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: x * y, (x, y)) == 0
    assert saved_bytes(lambda: x * y, (x,)) == y.nbytes
    assert saved_bytes(lambda: x.exp() * y, (x, y)) == x.nbytes
    assert saved_bytes(lambda: x.exp()[:1] * y[:1] + x.exp()[1:] * y[1:], (x, y)) == 2 * x.nbytes


@each_case
def test_we_keep_a_seed_and_no_mask(case: Case) -> None:
    problem = case.problem(CPU)
    with backends.use("reference"):
        kept = saved_bytes(lambda: problem.forward(problem.fastreg_function), problem.arguments.values())
    # Beside it DropBlock's scale, or the sum and its statistics.
    beside = 8 if case.op == "drop_block" else 0
    if case.op.startswith("dropout_add"):
        rows = problem.input.numel() // case.shape[-1]
        beside = problem.input.nbytes + 4 * rows * (2 if case.op.endswith("layer_norm") else 1)
    assert kept == 8 + beside
    eager = saved_bytes(lambda: problem.forward(problem.torch_function), problem.arguments.values())
    assert eager > kept
    if case.op == "dropout" and case.chain in ("", "add"):
        assert eager >= problem.input.numel()
