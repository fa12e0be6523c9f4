"""Group norm's and instance norm's CUDA kernels on the simulator: every instance launched and right, equal bits in any
schedule.

test_group_norm.py and test_instance_norm.py run the operators on the same backend; here are the shapes that reach each
kernel, and what a call launches.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from cases import Case, Mix, Size
from criterion import check
from cuda_sim import backend, build, mutants, plans
from cuda_sim.backend import ORDERS, PART_OF_AN_H100, Device
from fastreg import backends
from group_norms import GROUP_NORM
from schedules import TRACED_SCHEDULES
from suite import make_tensors, plain_case, run_operators, same_bits, unwritten_memory_is_nan

pytestmark = pytest.mark.backend_independent

ELEMENTS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
NAMES = ("group_norm", "instance_norm")
ONE_OF_AN_H100 = Device(architecture=90, multiprocessors=1)
TWO_OF_AN_H100 = Device(architecture=90, multiprocessors=2)
ONE_OF_AN_A100 = Device(architecture=80, multiprocessors=1)


@dataclass(frozen=True)
class Reach:
    """A problem that reaches a kernel instance or a branch that others do not."""

    device: Device
    shape: tuple[int, ...]
    groups: int
    layout: str = "contiguous"
    activation: str | None = "silu"


REACHING = (
    # on chip, planes: several slabs a warp; short planes as wholes; a cluster a group; blocks that wait for each other
    Reach(ONE_OF_AN_H100, (3, 24, 7, 7), 12, activation="relu"),
    Reach(TWO_OF_AN_H100, (2, 37, 7, 7), 1),
    Reach(PART_OF_AN_H100, (1, 12, 17, 61), 3, activation="hardswish"),
    Reach(Device(architecture=80, multiprocessors=4), (1, 2, 73, 137), 1, activation=None),
    # the same of whole chunks: a warp, and a cluster
    Reach(ONE_OF_AN_H100, (3, 24, 8, 8), 12),
    Reach(PART_OF_AN_H100, (1, 12, 16, 64), 3, activation="gelu"),
    # on chip, rows: several samples a block, groups that begin within a pack; blocks that share a sample, merging all
    # groups or some each
    Reach(ONE_OF_AN_H100, (10, 40, 1, 7), 8, "channels_last", "gelu"),
    Reach(PART_OF_AN_H100, (2, 40, 20, 20), 8, "channels_last", "leaky_relu"),
    Reach(PART_OF_AN_H100, (1, 176, 11, 20), 176, "channels_last", "gelu_tanh"),
    # streaming, planes: too large for the chip; not aligned, where the group's channels are a part of a pack
    Reach(ONE_OF_AN_A100, (1, 3, 168, 168), 1),
    Reach(PART_OF_AN_H100, (3, 6, 7, 7), 3, "unaligned"),
    # streaming, rows: too many channels for a block; a row that is no multiple of 16 bytes
    Reach(PART_OF_AN_H100, (2, 4104, 1, 3), 12, "channels_last", "relu"),
    Reach(PART_OF_AN_H100, (3, 9, 5, 5), 3, "channels_last", "gelu"),
)


@pytest.fixture(autouse=True)
def _cuda_sim() -> Iterator[None]:
    backend.register()
    with backends.use("cuda_sim"):
        yield


def _case(reach: Reach, dtype: torch.dtype) -> Case:
    """Activations of ``dtype`` with parameters of other dtypes."""
    size = Size(reach.shape, {"num_groups": reach.groups})
    arguments = {"num_groups": reach.groups, "activation": reach.activation}
    layouts = {"layout": reach.layout, "grad_layout": reach.layout}
    return plain_case(
        GROUP_NORM, size, Mix((dtype, torch.float32, torch.bfloat16)), arguments=arguments, **layouts
    )


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.values())
def test_every_kernel_is_launched_and_right(element: torch.dtype) -> None:
    backend.launched()
    for reach in REACHING:
        case = _case(reach, element)
        tensors = make_tensors(GROUP_NORM, case)
        with backend.simulating(reach.device), unwritten_memory_is_nan():
            results, saved = run_operators(GROUP_NORM, case, tensors)
        exact = GROUP_NORM.exact(case, tensors)
        for key, result in {**results, **GROUP_NORM.split_saved(saved)}.items():
            check(f"{key} of {reach}", result, exact[key])
    expected = {
        kernel
        for kernel in backend.kernels()
        if kernel.startswith("group_norm") and ("<" not in kernel or f"<{ELEMENTS[element]}" in kernel)
    }
    assert expected
    assert expected - set(backend.launched()) == set()


@pytest.mark.parametrize(
    "reach",
    [REACHING[index] for index in (1, 2, 3, 5, 6, 9)],
    ids=lambda reach: f"{reach.shape}, {reach.layout}",
)
def test_equal_bits_in_every_schedule(reach: Reach) -> None:
    case = _case(reach, torch.bfloat16)
    tensors = make_tensors(GROUP_NORM, case)
    expected: dict[str, torch.Tensor] | None = None
    for order, at_once in zip(ORDERS, (1, 2, 3), strict=True):
        with backend.simulating(replace(reach.device, order=order, seed=7, clusters_at_once=at_once)):
            results, results["statistics"] = run_operators(GROUP_NORM, case, tensors)
        expected = expected or results
        for key, result in results.items():
            assert same_bits(result, expected[key]), f"{key} depends on the order of threads ({order})"


@pytest.mark.parametrize(
    ("reach", "kind"),
    [
        (Reach(TWO_OF_AN_H100, (1, 12, 128, 128), 3), 2),
        (Reach(Device(architecture=80, multiprocessors=4), (3, 16, 80, 80), 4, "channels_last"), 3),
    ],
    ids=["clusters", "blocks that meet"],
)
def test_what_shares_a_slab_goes_on_to_the_next(reach: Reach, kind: int) -> None:
    case = _case(reach, torch.bfloat16)
    samples, channels, *sides = reach.shape
    rows = reach.layout == "channels_last"
    for tensors_held in (1, 2):
        problem = plans.GroupProblem(
            *(samples, channels, sides[0] * sides[1], reach.groups), rows=rows, tensors=tensors_held
        )
        plan = plans.group_plan(problem, reach.device)
        assert plan.kind == kind
        assert plan.slabs > plan.groups
    tensors = make_tensors(GROUP_NORM, case)
    with backend.simulating(replace(reach.device, order=ORDERS[-1], seed=7, clusters_at_once=2)):
        results, saved = run_operators(GROUP_NORM, case, tensors)
    exact = GROUP_NORM.exact(case, tensors)
    for key, result in {**results, **GROUP_NORM.split_saved(saved)}.items():
        check(f"{key} of {reach}", result, exact[key])


# --- launches ---------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return sorted(f"{kernel.partition('<')[0]}" for kernel in backend.launched())


@pytest.mark.parametrize("family", ["planes", "rows"])
def test_what_a_call_launches(family: str) -> None:
    shape = (2, 16, 8, 8)
    input, vector = torch.randn(shape), torch.randn(16)
    if family == "rows":
        input = input.to(memory_format=torch.channels_last)
    backend.launched()
    output, statistics = backend.group_norm_fwd(input, 4, vector, vector, 1e-5, 0, 0.0)
    assert output.stride() == input.stride()
    assert _names() == [f"group_norm_{family}_forward_kernel"]
    given = (input, input, 4, statistics, vector, vector, 0, 0.0)
    backend.group_norm_bwd(*given, (True, True, True))
    assert _names() == ["group_norm_parameters_kernel", f"group_norm_{family}_backward_kernel"]
    backend.group_norm_bwd(*given, (True, False, False))
    assert _names() == [f"group_norm_{family}_backward_kernel"]
    empty = backend.group_norm_bwd(*given, (False, False, False))
    assert [each.numel() for each in empty] == [0, 0, 0]
    assert _names() == []
    backend.group_norm_bwd(*given, (False, False, True))
    assert _names() == ["group_norm_parameters_kernel", "group_norm_sums_kernel"]

    running = torch.zeros(16), torch.ones(16)
    backend.instance_norm_fwd(input, vector, vector, None, None, 0.1, 1e-5, 0, 0.0)
    assert _names() == [f"group_norm_{family}_forward_kernel"]
    backend.instance_norm_fwd(input, vector, vector, *running, 0.1, 1e-5, 0, 0.0)
    assert _names() == [f"group_norm_{family}_forward_kernel", "instance_norm_running_kernel"]


def test_three_passes_and_five() -> None:
    input, vector = torch.randn(2, 3, 7, 7), torch.randn(3)
    unaligned = torch.randn(295)[1:].view(2, 3, 7, 7)
    backend.launched()
    _, statistics = backend.group_norm_fwd(unaligned, 1, vector, vector, 1e-5, 0, 0.0)
    names = ["group_norm_apply_kernel", "group_norm_moments_kernel", "group_norm_statistics_kernel"]
    assert _names() == names
    backend.group_norm_bwd(input, unaligned, 1, statistics, vector, vector, 0, 0.0, (True, True, False))
    names = ["group_norm_gradient_kernel", "group_norm_means_kernel", "group_norm_parameters_kernel"]
    assert _names() == [*names, "group_norm_sums_kernel"]


def test_operators_of_nothing() -> None:
    vector, running = torch.randn(6), (torch.ones(6), torch.ones(6))
    for shape in ((0, 6, 5, 5), (2, 6, 0)):
        input = torch.randn(shape)
        output, statistics = backend.group_norm_fwd(input, 3, vector, vector, 1e-5, 0, 0.0)
        assert (output.shape, statistics.shape) == (input.shape, (2, shape[0], 3))
        backend.instance_norm_fwd(input, vector, vector, *running, 0.5, 1e-5, 0, 0.0)
        assert all(torch.equal(each, torch.ones(6)) for each in running)
        gradients = backend.group_norm_bwd(
            input, input, 3, statistics, vector, vector, 0, 0.0, (True, True, True)
        )
        assert gradients[0].shape == input.shape
        assert all(torch.equal(each, torch.zeros(6)) for each in gradients[1:])


# --- every access, every schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", TRACED_SCHEDULES)
def test_kernels_race_with_nobody_and_read_what_was_written(schedule: tuple[str, ...]) -> None:
    program = build.standalone(trace=True, name="standalone_group_norm")
    finished = subprocess.run(
        [str(program), *schedule, "kernels"], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    reached = {launch.kernel for launch in backend.parse_launches(finished.stdout)}
    assert {kernel for kernel in backend.kernels() if kernel.startswith(NAMES)} - reached == set()


@pytest.mark.complete
def test_kernels_are_clean_under_the_sanitizers() -> None:
    # bfloat16, whose vectors are the most intricate; the tracer sees the bounds of every dtype.
    few = ("-DFASTREG_STANDALONE_FEW",)
    program = build.standalone(sanitize="address,undefined", extra=few, name="standalone_group_norm")
    finished = subprocess.run(
        [str(program), *mutants.SCHEDULES[1]], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
