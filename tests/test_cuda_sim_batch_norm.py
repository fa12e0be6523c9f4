"""Batch norm's CUDA kernels on the simulator: every instance launched and right, equal bits in every schedule.

test_batch_norm.py runs the operators on the same backend; here are the shapes that reach each kernel, and how many
launches a call takes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from cases import Mix, Size
from channel_norms import BATCH_NORM
from criterion import check
from cuda_sim import backend, build, mutants, plans
from cuda_sim.backend import A100, H100, ORDERS, PART_OF_AN_A100, PART_OF_AN_H100, Device
from fastreg import _activations, backends
from schedules import TRACED_SCHEDULES
from suite import make_tensors, plain_case, run_operators, same_bits, unwritten_memory_is_nan

pytestmark = pytest.mark.backend_independent

ELEMENTS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
ONE_OF_AN_A100 = Device(architecture=80, multiprocessors=1)


@dataclass(frozen=True)
class Reach:
    """A problem that reaches a kernel instance or a branch that others do not."""

    device: Device
    shape: tuple[int, ...]
    layout: str = "contiguous"
    activation: str | None = "relu"
    training: bool = True
    residual: bool = True


REACHING = (
    # streaming, planes: packs of 16 bytes and of one element, in evaluation and too large for the chip
    Reach(PART_OF_AN_H100, (3, 5, 8, 8), activation="leaky_relu", training=False),
    Reach(PART_OF_AN_H100, (3, 5, 7, 7), activation="gelu", training=False),
    Reach(ONE_OF_AN_A100, (3, 1, 120, 240), residual=False),
    Reach(ONE_OF_AN_A100, (3, 1, 28801), residual=False, activation="hardswish"),
    # streaming, rows: the same, since a row of channels is not a multiple of 16 bytes, or since it is evaluation
    Reach(PART_OF_AN_H100, (37, 24), activation="silu", training=False),
    Reach(PART_OF_AN_H100, (3, 13, 5, 5), "channels_last", activation="gelu_tanh"),
    Reach(ONE_OF_AN_A100, (5, 8, 50, 50), "channels_last", residual=False),
    # on chip, planes: one block a channel, with ragged planes; clusters; several channels a group of blocks
    Reach(PART_OF_AN_H100, (3, 5, 7, 7)),
    Reach(PART_OF_AN_H100, (8, 3, 28, 28), activation="silu"),
    Reach(PART_OF_AN_A100, (2, 37, 4, 13), activation=None),
    Reach(Device(architecture=80, multiprocessors=4), (20, 2, 25, 40)),  # blocks that wait for each other
    # on chip, rows: one block a strip of channels, and several that wait for each other
    Reach(PART_OF_AN_H100, (3, 40, 7, 7), "channels_last"),
    Reach(PART_OF_AN_H100, (2, 72, 15, 20), "channels_last", activation="silu"),
)


@pytest.fixture(autouse=True)
def _cuda_sim() -> Iterator[None]:
    backend.register()
    with backends.use("cuda_sim"):
        yield


def _case(reach: Reach, dtype: torch.dtype) -> object:
    """Activations of ``dtype`` with parameters and running statistics of other dtypes."""
    residual = dtype if reach.residual else None
    mix = Mix((dtype, residual, torch.float32, torch.bfloat16, torch.float32, torch.float16))
    arguments = {"training": reach.training, "activation": reach.activation}
    size = Size(reach.shape, {"training": True})
    layouts = {"layout": reach.layout, "grad_layout": reach.layout, "companion_layout": reach.layout}
    return plain_case(BATCH_NORM, size, mix, arguments=arguments, **layouts)


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.values())
def test_every_kernel_is_launched_and_right(element: torch.dtype) -> None:
    backend.launched()
    for reach in REACHING:
        case = _case(reach, element)
        tensors = make_tensors(BATCH_NORM, case)
        with backend.simulating(reach.device), unwritten_memory_is_nan():
            results, saved = run_operators(BATCH_NORM, case, tensors)
        exact = BATCH_NORM.exact(case, tensors)
        for key, result in {**results, **BATCH_NORM.split_saved(saved)}.items():
            check(f"{key} of {reach}", result, exact[key])
    expected = {
        kernel
        for kernel in backend.kernels()
        if kernel.startswith("batch_norm") and ("<" not in kernel or f"<{ELEMENTS[element]}" in kernel)
    }
    assert expected
    assert expected - set(backend.launched()) == set()


@pytest.mark.parametrize("activation", _activations.NAMES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_activation(layout: str, activation: str) -> None:
    named = None if activation == "identity" else activation
    shape = (3, 9, 3, 7)
    for element, training, residual in product(ELEMENTS, (True, False), (True, False)):
        case = _case(Reach(ONE_OF_AN_A100, shape, layout, named, training, residual), element)
        tensors = make_tensors(BATCH_NORM, case)
        with backend.simulating(ONE_OF_AN_A100), unwritten_memory_is_nan():
            results, saved = run_operators(BATCH_NORM, case, tensors)
        exact = BATCH_NORM.exact(case, tensors)
        for key, result in {**results, **BATCH_NORM.split_saved(saved)}.items():
            check(f"{key} in {element}, training {training}, residual {residual}", result, exact[key])


@pytest.mark.parametrize(
    "reach", [REACHING[index] for index in (2, 5, 8, 10, 12)], ids=lambda reach: str(reach.shape)
)
def test_equal_bits_in_every_schedule(reach: Reach) -> None:
    case = _case(reach, torch.bfloat16)
    tensors = make_tensors(BATCH_NORM, case)
    expected: dict[str, torch.Tensor] | None = None
    for order, at_once in zip(ORDERS, (1, 2, 3), strict=True):
        with backend.simulating(replace(reach.device, order=order, seed=7, clusters_at_once=at_once)):
            results, (results["statistics"], _) = run_operators(BATCH_NORM, case, tensors)
        expected = expected or results
        for key, result in results.items():
            assert same_bits(result, expected[key]), f"{key} depends on the order of threads ({order})"


# --- the halves, between which a synchronised batch norm exchanges ----------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (5, 8, 4, 4), (37, 40)], ids=str)
def test_the_halves_are_the_whole(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    input, residual, grad_output = (torch.randn(shape, generator=generator) + 1 for _ in range(3))
    weight, bias = torch.randn(2, shape[1], generator=generator)
    count = input.numel() / shape[1]
    with backend.simulating(PART_OF_AN_A100):
        output, statistics, signs = backend.batch_norm_fwd(
            input,
            residual,
            weight,
            bias,
            None,
            None,
            0.1,
            1e-5,
            _activations.NAMES.index("relu"),
            0.0,
            False,
            True,
        )
        mean, squares = backend.batch_norm_moments(input)
        own = torch.stack([mean, (squares / count + 1e-5).rsqrt()])
        torch.testing.assert_close(own, statistics, rtol=1e-6, atol=1e-6)
        halves = backend.batch_norm_apply(input, residual, weight, bias, statistics, 1, 0.0, True)
        assert same_bits(halves[0], output)
        assert torch.equal(halves[1], signs)

        given = (grad_output, input, None, signs, statistics, weight, bias)
        grad_input, grad_residual, grad_weight, grad_bias = backend.batch_norm_bwd(
            *given, True, 1, 0.0, [True] * 4
        )
        sums = backend.batch_norm_sums(*given, 1, 0.0)
        torch.testing.assert_close(sums, torch.stack([grad_bias, grad_weight]), rtol=1e-5, atol=1e-5)
        applied = backend.batch_norm_bwd_apply(*given, sums / count, 1, 0.0, [True, True])
    torch.testing.assert_close(applied[0], grad_input, rtol=1e-5, atol=1e-6)
    assert same_bits(applied[1], grad_residual)


def test_operators_of_nothing() -> None:
    input, parameters = torch.randn(0, 3, 5, 5), torch.randn(3)
    running = torch.ones(3), torch.ones(3)
    output, statistics, _ = backend.batch_norm_fwd(
        input, None, parameters, parameters, *running, 0.5, 1e-5, 1, 0.0, False, True
    )
    assert output.shape == input.shape
    assert all(torch.equal(each, torch.ones(3)) for each in running)
    given = (input, input, None, None, statistics, parameters, parameters)
    _, _, grad_weight, grad_bias = backend.batch_norm_bwd(*given, True, 1, 0.0, [True, False, True, True])
    for zeros in (
        grad_weight,
        grad_bias,
        *backend.batch_norm_moments(input),
        *backend.batch_norm_sums(*given, 1, 0.0),
    ):
        assert torch.equal(zeros, torch.zeros(3))


# --- launches ---------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return sorted(f"{kernel.partition('<')[0]}" for kernel in backend.launched())


def test_what_a_call_launches() -> None:
    input, vector = torch.randn(4, 6, 9, 9), torch.randn(6)
    forward = (None, vector, vector, None, None, 0.1, 1e-5, 0, 0.0, False, True)
    large = torch.randn(4, 1, 200, 100)
    one = torch.randn(1)
    with backend.simulating(ONE_OF_AN_A100):
        backend.launched()
        _, statistics, _ = backend.batch_norm_fwd(input, *forward)
        assert _names() == ["batch_norm_resident_planes_forward_kernel"]
        given = (input, input, None, None, statistics, vector, vector)
        backend.batch_norm_bwd(*given, True, 0, 0.0, [True, False, True, True])
        assert _names() == ["batch_norm_resident_planes_backward_kernel"]
        backend.batch_norm_bwd(*given, True, 0, 0.0, [False] * 4)
        assert _names() == []
        backend.batch_norm_bwd(*given, False, 0, 0.0, [True, False, False, False])
        assert _names() == ["batch_norm_gradient_kernel"]
        backend.batch_norm_bwd(*given, False, 0, 0.0, [True, False, True, True])
        assert set(_names()) <= {"batch_norm_sums_kernel", "batch_norm_merge_sums_kernel"}
        backend.batch_norm_eval(input, None, vector, vector, vector, vector.abs(), 1e-5, 0, 0.0, False)
        assert _names() == ["batch_norm_apply_kernel"]

        _, statistics, _ = backend.batch_norm_fwd(large, None, one, one, *forward[3:])
        kernels = [
            "batch_norm_apply_kernel",
            "batch_norm_merge_moments_kernel",
            "batch_norm_statistics_kernel",
        ]
        assert _names() == kernels
        given = (large, large, None, None, statistics, one, one)
        backend.batch_norm_bwd(*given, True, 0, 0.0, [True, False, True, True])
        kernels = ["batch_norm_gradient_kernel", "batch_norm_merge_sums_kernel", "batch_norm_sums_kernel"]
        assert _names() == kernels


# --- plans ------------------------------------------------------------------------------------------------------------

DEVICES = (H100, A100, PART_OF_AN_H100, Device(architecture=100, multiprocessors=148), Device(120, 170))
STREAMED = [
    plans.ChannelProblem(samples, channels, spatial, size, rows, wide, backward, whole_bytes)
    for samples, channels, spatial, size, rows, wide, backward, whole_bytes in product(
        (1, 2, 32, 256),
        (1, 3, 8, 64, 96, 2048),
        (1, 49, 196, 3136, 1 << 20),
        (2, 4),
        (True, False),
        (True, False),
        (True, False),
        (True, False),
    )
    if not wide or (channels if rows else spatial) % (16 // size) == 0
]


@pytest.mark.parametrize(
    "device", DEVICES, ids=lambda device: f"sm_{device.architecture}x{device.multiprocessors}"
)
def test_every_streaming_plan_covers_its_tensor_and_fills_the_machine(device: Device) -> None:
    for problem in STREAMED[:: 1 if device == H100 else 7]:
        plan = plans.stream_plan(problem, device)
        width = 16 // problem.element_size if problem.wide else 1
        lines = problem.samples * (problem.spatial if problem.rows else problem.channels)
        line = problem.channels if problem.rows else problem.spatial
        assert plan.line_packs * width >= line, (problem, plan)
        assert plan.threads in (32, 64, 128, 256), (problem, plan)
        assert plan.blocks == plan.across * plan.parts, (problem, plan)
        assert (plan.parts - 1) * plan.share < plan.items <= plan.parts * plan.share, (problem, plan)
        if problem.rows:
            assert plan.items == lines
            assert plan.lanes <= 32
            assert plan.lanes * plan.across >= plan.line_packs, (problem, plan)
        else:
            assert (plan.items, plan.across) == (problem.samples * plan.line_packs, problem.channels)
        byte_lanes = 8 // width if problem.whole_bytes and width < 8 else 1
        for extent in (plan.line_packs, plan.share, plan.lanes) if not problem.rows else (plan.lanes,):
            assert extent % byte_lanes == 0, (problem, plan)
        # Each multiprocessor has a block, unless there are fewer steps of all its threads than that.
        step = plan.threads // plan.lanes if problem.rows else plan.threads
        steps = -(-plan.items // step) * plan.across
        assert plan.blocks >= min(device.multiprocessors, steps) * 0.5, (problem, plan)


@pytest.mark.parametrize("rows", [False, True])
def test_few_channels_fill_the_machine(rows: bool) -> None:
    for spatial in (56 * 56, 112 * 112):
        plan = plans.stream_plan(plans.ChannelProblem(32, 64, spatial, rows=rows), H100)
        assert plan.blocks >= 4 * H100.multiprocessors, plan


# --- every access, every schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", TRACED_SCHEDULES)
def test_kernels_race_with_nobody_and_read_what_was_written(schedule: tuple[str, ...]) -> None:
    program = build.standalone(trace=True, name="standalone_batch_norm")
    finished = subprocess.run(
        [str(program), *schedule, "kernels"], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    reached = {launch.kernel for launch in backend.parse_launches(finished.stdout)}
    assert {kernel for kernel in backend.kernels() if kernel.startswith("batch_norm")} - reached == set()


@pytest.mark.complete
def test_kernels_are_clean_under_the_sanitizers() -> None:
    # bfloat16, whose vectors and signs are the most intricate; the tracer sees the bounds of every dtype.
    few = ("-DFASTREG_STANDALONE_FEW",)
    program = build.standalone(sanitize="address,undefined", extra=few, name="standalone_batch_norm")
    finished = subprocess.run(
        [str(program), *mutants.SCHEDULES[1]], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
