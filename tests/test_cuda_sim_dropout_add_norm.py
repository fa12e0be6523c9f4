"""Dropout + residual + norm's CUDA kernels on the simulator: every instance launched and right, masks, launches, plans.

test_dropout_add_layer_norm.py and test_dropout_add_rms_norm.py run the functions on the same backend; here are the
shapes that reach each kernel, the operators' masks of wanted gradients, and what a call launches.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from criterion import check
from cuda_sim import backend, build, mutants, plans
from cuda_sim.backend import A100, H100, ORDERS, PART_OF_AN_A100, PART_OF_AN_H100, Device
from dropout_add_norms import SEED, Branch, exact, make_tensors, run
from fastreg import backends
from fastreg.backends.reference.dropout import DTYPES
from masks import keep_elements, scale
from schedules import TRACED_SCHEDULES
from suite import same_bits, unwritten_memory_is_nan

pytestmark = pytest.mark.backend_independent

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NORMS = ("layer_norm", "rms_norm")
ELEMENTS = {F32: "float", BF16: "__nv_bfloat16", F16: "__half"}
# By the sum's dtype: (input, residual) that have it, the residual's dtype None where there is none, and whether the
# sum is asked for in fp32.
KINDS: dict[torch.dtype, tuple[tuple[torch.dtype, torch.dtype | None, bool], ...]] = {
    F32: ((BF16, F32, False), (F32, F32, False), (F16, F16, True), (BF16, None, True)),
    BF16: ((BF16, BF16, False),),
    F16: ((F16, F16, False),),
}
ALL = ("input", "residual", "weight", "bias", "layer_scale")

# (device, rows, hidden size): each reaches another kernel instance or another branch of a plan.
REACHING = (
    (PART_OF_AN_H100, 37, 8),  # part of a warp a row
    (PART_OF_AN_H100, 13, 200),
    (PART_OF_AN_H100, 9, 1000),  # a warp a row
    (PART_OF_AN_H100, 7, 2048),  # a block a row
    (H100, 2, 5120),  # a cluster a row
    (PART_OF_AN_A100, 1, 8704),  # sums in shared memory
    (PART_OF_AN_A100, 1, 24576),  # looped
    (PART_OF_AN_H100, 37, 3),  # one-element packs
    (PART_OF_AN_H100, 7, 515),
    (PART_OF_AN_H100, 1, 6147),
    (PART_OF_AN_A100, 1, 12291),
)


@pytest.fixture(autouse=True)
def _cuda_sim() -> Iterator[None]:
    backend.register()
    with backends.use("cuda_sim"):
        yield


def _branch(rows: int, columns: int, total: torch.dtype, turn: int = 0, **changes: Any) -> Branch:
    """Everything that there is, contiguous, the parameters in fp32."""
    dtype, residual, in_fp32 = KINDS[total][turn % len(KINDS[total])]
    whole = Branch(
        *(((rows,), (columns,)), dtype, residual, F32, "contiguous", "contiguous", 0.3),
        *(turn % 2 == 1, True, in_fp32, (), ALL),
    )
    return replace(whole, **changes)


def _tensors(norm: str, branch: Branch) -> dict[str, torch.Tensor]:
    """Aligned, so that packs are wide where the sizes allow."""
    return {name: tensor.clone() for name, tensor in make_tensors(norm, branch, "cpu").items()}


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("total", ELEMENTS, ids=ELEMENTS.values())
def test_every_kernel_is_launched_and_right(norm: str, total: torch.dtype) -> None:
    backend.launched()
    for turn, (simulated, rows, columns) in enumerate(REACHING):
        branch = _branch(rows, columns, total, turn)
        tensors = _tensors(norm, branch)
        with backend.simulating(simulated), unwritten_memory_is_nan():
            results, _ = run(norm, branch, tensors, prenorm=True)
        expected = exact(norm, branch, tensors, results["sum"])
        for name, result in results.items():
            check(f"{name} of {rows} x {columns} on {simulated}", result, expected[name])
    centred = "true" if norm == "layer_norm" else "false"
    kernels = {
        kernel
        for kernel in backend.kernels()
        if kernel.startswith("dropout_add_")
        and (f"<{ELEMENTS[total]}, {centred}" in kernel or f"<{centred}>" in kernel)
    }
    assert kernels
    assert kernels - set(backend.launched()) == set()


def test_sums_in_shared_memory_without_those_of_layer_scale() -> None:
    norm, branch = "layer_norm", _branch(1, 12288, BF16, wanted=("input", "residual", "weight"))
    tensors = _tensors(norm, branch)
    with backend.simulating(PART_OF_AN_A100), unwritten_memory_is_nan():
        results, _ = run(norm, branch, tensors, prenorm=True)
    expected = exact(norm, branch, tensors, results["sum"])
    for name, result in results.items():
        check(name, result, expected[name])
    assert any(kernel.startswith("dropout_add_backward_kernel") for kernel in backend.launched())


def test_equal_bits_in_every_schedule() -> None:
    for simulated, rows, columns, total in (
        (PART_OF_AN_H100, 40, 640, BF16),
        (H100, 2, 5120, F32),
        (PART_OF_AN_A100, 1, 3075, BF16),
    ):
        branch = _branch(rows, columns, total)
        tensors = _tensors("layer_norm", branch)
        expected: dict[str, torch.Tensor] | None = None
        for order, at_once in zip(ORDERS, (1, 2, 3), strict=True):
            with backend.simulating(replace(simulated, order=order, seed=columns, clusters_at_once=at_once)):
                results, _ = run("layer_norm", branch, tensors, prenorm=True)
            expected = expected or results
            for key, result in results.items():
                assert same_bits(result, expected[key]), f"{key} depends on the order of threads ({order})"


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", ELEMENTS, ids=ELEMENTS.values())
@pytest.mark.parametrize("shape", [(5, 1), (7, 2), (3, 17), (9, 24), (4, 129), (2, 1000)], ids=str)
def test_masks_are_those_of_the_contract(shape: tuple[int, int], total: torch.dtype) -> None:
    dtype, _, in_fp32 = KINDS[total][0]
    seed = torch.tensor(SEED)
    for threshold, dynamic in product((0, 1, 20000, 65535, 65536), (False, True)):
        given = (0, torch.tensor(threshold)) if dynamic else (threshold, None)
        # What is dropped is 0 whatever it was.
        keep = keep_elements(torch.empty(shape), SEED, threshold)
        input = torch.where(keep, 1.0, torch.inf).to(dtype)
        arguments = (
            input,
            None,
            1,
            None,
            None,
            None,
            None,
            seed,
            *given,
            1e-5,
            in_fp32 or total == F32,
            True,
        )
        _, found, _ = backend.dropout_add_layer_norm_fwd(*arguments)
        assert found.dtype == total
        assert torch.equal(found, torch.where(keep, scale(threshold, 2**16), 0.0).to(total))
        # Backward draws the same ones: behind a weight of 0 the gradient is that of the sum.
        ones, zeros = torch.ones(shape, dtype=dtype), torch.zeros(shape[1])
        grad_input, *_ = backend.dropout_add_rms_norm_bwd(
            *(ones, ones.to(total), ones.to(total), None, 1, torch.ones(shape[0]), zeros, None, None),
            *(seed, *given, DTYPES.index(dtype), (True, False, False, False)),
        )
        assert torch.equal(grad_input, torch.where(keep, scale(threshold, 2**16), 0.0).to(dtype))


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("columns", [24, 13])
def test_every_set_of_gradients(columns: int, norm: str) -> None:
    """What else is asked for changes no bit, and what is not asked for is not there."""
    generator = torch.Generator().manual_seed(columns)
    names = ALL if norm == "layer_norm" else tuple(name for name in ALL if name != "bias")
    forward = getattr(backend, f"dropout_add_{norm}_fwd")
    backward = getattr(backend, f"dropout_add_{norm}_bwd")

    def draw(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    input, residual, gradient = (draw(5, columns, dtype=BF16) for _ in range(3))
    vectors = [draw(columns) for _ in names[2:]]
    branch = (draw(5), vectors[-1], torch.tensor(SEED), 20000, None)
    _, total, statistics = forward(input, residual, 1, *vectors[:-1], *branch, 1e-5, True, True)
    tensors = (
        gradient,
        draw(5, columns),
        total,
        input,
        1,
        statistics,
        *vectors[:-1],
        *branch,
        DTYPES.index(BF16),
    )
    whole = backward(*tensors, (True,) * len(names))
    backend.launched()
    for mask in product((False, True), repeat=len(names)):
        for wanted, one, other in zip(mask, backward(*tensors, mask), whole, strict=True):
            assert same_bits(one, other) if wanted else one.shape == (0,)
            assert one.dtype == other.dtype
        assert bool(backend.launched()) == any(mask)


def test_what_a_call_launches() -> None:
    branch = _branch(6, 64, F32, 1)
    tensors = _tensors("layer_norm", branch)
    backend.launched()
    with torch.no_grad():
        run("layer_norm", replace(branch, wanted=()), tensors, prenorm=True)
    assert list(backend.launched().values()) == [1]
    run("layer_norm", replace(branch, wanted=("input", "residual")), tensors, prenorm=True)
    kernels = [kernel.partition("<")[0] for kernel in backend.launched()]
    assert sorted(kernels) == ["dropout_add_backward_kernel", "dropout_add_forward_kernel"]
    run("layer_norm", branch, tensors, prenorm=True)
    counts = {kernel.partition("<")[0]: count for kernel, count in backend.launched().items()}
    assert counts == {
        "dropout_add_forward_kernel": 1,
        "dropout_add_backward_kernel": 1,
        "dropout_add_reduce_partials_kernel": 2,
    }


def test_rows_at_any_stride() -> None:
    """The index of an element is its row-major one, wherever it lies."""
    generator = torch.Generator().manual_seed(3)
    for columns, gap in ((24, 8), (24, 3), (7, 1)):
        wide = [torch.randn(5, columns + gap, generator=generator) for _ in range(4)]
        dense = [tensor[:, :columns].contiguous() for tensor in wide]
        found = []
        for input, residual, gradient, grad_sum in ([tensor[:, :columns] for tensor in wide], dense):
            branch = (None, input[0].contiguous(), torch.tensor(SEED), 20000, None)
            output, total, statistics = backend.dropout_add_rms_norm_fwd(
                *(input, residual, 1, None, *branch, 1e-5, False, True)
            )
            gradients = backend.dropout_add_rms_norm_bwd(
                *(
                    gradient,
                    grad_sum,
                    total,
                    input,
                    1,
                    statistics,
                    None,
                    *branch,
                    0,
                    (True, True, False, True),
                )
            )
            found.append((output, total, *gradients))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(found[0][2] == 0, found[1][2] == 0)
    one_row = torch.randn(1, 24, generator=generator).expand(4, 24)
    _, total, _ = backend.dropout_add_rms_norm_fwd(
        *(one_row, None, 1, None, None, None, torch.tensor(SEED), 30000, None, 1e-5, False, True)
    )
    assert torch.equal(total != 0, keep_elements(torch.empty(4, 24), SEED, 30000))


def test_the_door_says_what_is_wrong() -> None:
    rows, columns, seed = torch.ones(3, 4), torch.ones(4), torch.tensor(1)
    branch = (None, None, seed, 9, None)

    def forward(input: torch.Tensor, residual: torch.Tensor | None, *given: Any) -> Any:
        return backend.dropout_add_rms_norm_fwd(input, residual, 1, None, *given, 1e-5, False, True)

    def backward(sum: torch.Tensor, input: torch.Tensor | None, number: int, *given: Any) -> Any:
        mask = (True, False, False, True)
        return backend.dropout_add_rms_norm_bwd(
            rows, None, sum, input, 1, torch.ones(3), None, *given, number, mask
        )

    for match, call in (
        ("residual must be float32 or input's", lambda: forward(rows, rows.half(), *branch)),
        ("residual must have the shape", lambda: forward(rows, rows[:2], *branch)),
        ("row_scale must have the first", lambda: forward(rows, None, columns, *branch[1:])),
        ("row_scale is float64", lambda: forward(rows, None, torch.ones(3).double(), *branch[1:])),
        ("layer_scale must have 4", lambda: forward(rows, None, None, torch.ones(3), *branch[2:])),
        ("seed must be one int64", lambda: forward(rows, None, None, None, columns, 9, None)),
        ("threshold must be between 0 and 65536", lambda: forward(rows, None, None, None, seed, 65537, None)),
        ("input_dtype must be", lambda: backward(rows, rows, 4, None, columns, seed, 9, None)),
        ("sum must be float32 or", lambda: backward(rows.half(), rows, 0, None, columns, seed, 9, None)),
        ("for which input must be given", lambda: backward(rows, None, 0, None, columns, seed, 9, None)),
        ("gradient of layer_scale, which was not", lambda: backward(rows, rows, 0, *branch)),
        ("grad_output must be bfloat16", lambda: backward(rows, rows, 1, None, columns, seed, 9, None)),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device",
    [H100, A100, Device(architecture=100, multiprocessors=148), Device(120, 170)],
    ids=lambda device: f"sm_{device.architecture}",
)
def test_every_plan_holds_its_rows_and_keeps_the_limits(device: Device) -> None:
    shared_limit = {80: 163, 120: 99}.get(device.architecture, 227) * 1024
    sizes = (8, 96, 256, 768, 1024, 1536, 4096, 5120, 8192, 8704, 12288, 16384, 24576, 65536, 98304, 1 << 18)
    for rows, columns, size, centred, wide in product((1, 128, 1 << 16), sizes, (2, 4), *[(True, False)] * 2):
        problem = plans.Problem(rows, columns, size, centred, wide, fused=True)
        packs = columns // (16 // size if wide else 1)
        forward = plans.forward_plan(problem, device)
        both = [plans.backward_plan(replace(problem, third_sums=third), device) for third in (False, True)]
        for plan in (forward, *both):
            teams = plan.threads // plan.threads_per_row
            assert plan.threads % 32 == plan.threads % plan.threads_per_row == plan.blocks % plan.cluster == 0
            assert plan.cluster in ((1, 2, 4, 8) if device.architecture >= 90 else (1,)), (problem, plan)
            assert plan.cluster == 1 or teams == 1, (problem, plan)
            looped = plan.looped if isinstance(plan, plans.ForwardPlan) else plan.kind == 2
            assert plan.threads <= (512 if looped else 384), (problem, plan)
            assert looped or plan.threads_per_row * plan.packs >= -(-packs // plan.cluster), (problem, plan)
        assert forward.blocks // forward.cluster * (forward.threads // forward.threads_per_row) >= rows
        for plan in both:
            assert plan.shared_bytes + 2048 <= shared_limit, (problem, plan)
        without, third = both
        if third.kind == without.kind == 0 and third.threads == without.threads:
            sums = 4 * third.packs * third.width * third.threads
            assert third.shared_bytes == without.shared_bytes + sums, (problem, third)


# --- every access, every schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", TRACED_SCHEDULES)
def test_kernels_race_with_nobody_and_read_what_was_written(schedule: tuple[str, ...]) -> None:
    program = build.standalone(trace=True, name="standalone_dropout_add_norm")
    finished = subprocess.run(
        [str(program), *schedule, "kernels"], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    reached = {launch.kernel for launch in backend.parse_launches(finished.stdout)}
    assert {kernel for kernel in backend.kernels() if kernel.startswith("dropout_add_")} - reached == set()


@pytest.mark.complete
def test_kernels_are_clean_under_the_sanitizers() -> None:
    few = ("-DFASTREG_STANDALONE_FEW",)
    program = build.standalone(sanitize="address,undefined", extra=few, name="standalone_dropout_add_norm")
    finished = subprocess.run(
        [str(program), *mutants.SCHEDULES[1]], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
