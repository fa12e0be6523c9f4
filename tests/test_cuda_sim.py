"""The CUDA kernels on the simulator: every instance launched and right, every plan sound, every mutant found.

The op suite runs on the same backend with ``--backend cuda_sim``; here are the shapes that reach each kernel, the
schedules, and the proof that the simulator sees mistakes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import norms
from cases import Mix, Size
from criterion import check
from cuda_sim import backend, build, mutants, plans
from cuda_sim.backend import A100, H100, ORDERS, PART_OF_AN_A100, PART_OF_AN_H100, Device
from fastreg import backends
from schedules import SCHEDULES, TRACED_SCHEDULES
from suite import OpSpec, make_tensors, plain_case, run_operators, same_bits, unwritten_memory_is_nan

pytestmark = pytest.mark.backend_independent

ALL_MUTANTS = mutants.mutants()
SPECS = {"layer_norm": norms.LAYER_NORM, "rms_norm": norms.RMS_NORM}
ELEMENTS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}

# Kernels that have files of their own: test_cuda_sim_batch_norm.py, test_cuda_sim_group_norm.py and
# test_cuda_sim_dropout.py.
OF_OTHER_FILES = ("batch_norm", "group_norm", "instance_norm", "dropout", "drop_block")

TWO_OF_AN_H100 = Device(architecture=90, multiprocessors=2)

# (device, rows, hidden size): each reaches another kernel instance or another branch of a plan. Rows and
# multiprocessors are such that persistent blocks go over several rows and the last round is not full.
REACHING = (
    (PART_OF_AN_H100, 37, 8),  # part of a warp a row
    (PART_OF_AN_H100, 37, 32),
    (PART_OF_AN_H100, 21, 384),  # a warp a row, two rows at once
    (PART_OF_AN_H100, 21, 1000),
    (PART_OF_AN_H100, 9, 2048),
    (PART_OF_AN_H100, 9, 5120),  # a block a row
    (H100, 5, 5120),  # a cluster a row, since there are few rows
    (TWO_OF_AN_H100, 3, 20480),  # a cluster a row, since it is long
    (TWO_OF_AN_H100, 9, 16640),  # the same, with two rows at once
    (PART_OF_AN_H100, 2, 66560),  # sums in shared memory
    (PART_OF_AN_H100, 2, 98432),  # looped backward by clusters
    (PART_OF_AN_A100, 4, 12288),  # sums in shared memory without clusters
    (PART_OF_AN_A100, 2, 33024),  # looped, forward too
    (PART_OF_AN_H100, 37, 3),  # one-element packs
    (PART_OF_AN_H100, 21, 131),
    (PART_OF_AN_H100, 9, 1027),
    (PART_OF_AN_H100, 3, 8195),
    (PART_OF_AN_A100, 2, 16387),
)


@pytest.fixture(autouse=True)
def _cuda_sim() -> Iterator[None]:
    backend.register()
    with backends.use("cuda_sim"):
        yield


def _size(rows: int, columns: int) -> Size:
    return Size((rows, columns), {"normalized_shape": (columns,)})


def _mix(spec: OpSpec, dtype: torch.dtype) -> Mix:
    """Activations of ``dtype`` with parameters of other dtypes."""
    return Mix((dtype, torch.float32, torch.bfloat16)[: len(spec.parameters) + 1])


# --- kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.values())
def test_every_kernel_is_launched_and_right(name: str, element: torch.dtype) -> None:
    spec = SPECS[name]
    backend.launched()
    for simulated, rows, columns in REACHING:
        case = plain_case(spec, _size(rows, columns), _mix(spec, element))
        tensors = make_tensors(spec, case)
        with backend.simulating(simulated), unwritten_memory_is_nan():
            results, saved = run_operators(spec, case, tensors)
        exact = spec.exact(case, tensors)
        for key, result in {**results, **spec.split_saved(saved)}.items():
            check(f"{key} of {rows} x {columns} on {simulated}", result, exact[key])
    of_this_case = re.compile(rf"<({ELEMENTS[element]}, )?{'true' if name == 'layer_norm' else 'false'}[,>]")
    expected = {
        kernel
        for kernel in backend.kernels()
        if of_this_case.search(kernel) and not kernel.startswith(OF_OTHER_FILES)
    }
    assert expected - set(backend.launched()) == set()


def test_every_global_function_has_instances_in_the_simulator() -> None:
    functions = backend.global_functions()
    assert functions
    assert {kernel.partition("<")[0] for kernel in backend.kernels()} == functions


@pytest.mark.parametrize("name", SPECS)
def test_equal_bits_in_every_schedule(name: str) -> None:
    spec = SPECS[name]
    for simulated, rows, columns in (
        (PART_OF_AN_H100, 40, 640),
        (PART_OF_AN_H100, 7, 20480),
        (H100, 9, 1027),
    ):
        case = plain_case(spec, _size(rows, columns), _mix(spec, torch.bfloat16))
        tensors = make_tensors(spec, case)
        expected: dict[str, torch.Tensor] | None = None
        for order, at_once in zip(ORDERS, (1, 2, 3), strict=True):
            with backend.simulating(replace(simulated, order=order, seed=columns, clusters_at_once=at_once)):
                results, saved = run_operators(spec, case, tensors)
            results["saved"] = saved
            expected = expected or results
            for key, result in results.items():
                assert same_bits(result, expected[key]), f"{key} depends on the order of threads ({order})"


def test_one_kernel_a_forward_and_nothing_for_what_is_not_asked_for() -> None:
    input, weight = torch.randn(6, 64), torch.randn(64)
    backend.launched()
    output, saved = backend.layer_norm_fwd(input, 1, weight, weight, 1e-5)
    assert list(backend.launched().values()) == [1]
    backend.layer_norm_bwd(output, input, 1, saved, weight, weight, (False, False, False))
    assert backend.launched() == {}
    backend.layer_norm_bwd(output, input, 1, saved, weight, weight, (True, False, False))
    assert [kernel.partition("<")[0] for kernel in backend.launched()] == ["backward_kernel"]


def test_without_rows_the_parameters_gradients_are_zeros() -> None:
    input, weight = torch.randn(0, 40), torch.randn(40)
    _, saved = backend.layer_norm_fwd(input, 1, weight, weight, 1e-5)
    _, grad_weight, grad_bias = backend.layer_norm_bwd(
        input, input, 1, saved, weight, weight, (True, True, True)
    )
    assert torch.equal(grad_weight, torch.zeros(40))
    assert torch.equal(grad_bias, torch.zeros(40))


# --- plans ---------------------------------------------------------------------------------------------

DEVICES = (H100, A100, PART_OF_AN_H100, Device(architecture=100, multiprocessors=148), Device(120, 170))
PROBLEMS = [
    plans.Problem(rows, columns, size, centred, wide)
    for rows, columns, size, centred, wide in product(
        (1, 7, 128, 4096, 1 << 20),
        (8, 48, 256, 768, 1024, 2048, 4096, 5120, 8192, 12288, 16384, 65536, 131072, 262144, 1 << 20),
        (2, 4),
        (True, False),
        (True, False),
    )
]


@pytest.mark.parametrize(
    "device", DEVICES, ids=lambda device: f"sm_{device.architecture}x{device.multiprocessors}"
)
def test_every_plan_holds_its_rows_and_keeps_the_limits(device: Device) -> None:
    shared_limit = {80: 163, 120: 99}.get(device.architecture, 227) * 1024
    for problem in PROBLEMS:
        packs = problem.columns // (16 // problem.element_size if problem.wide else 1)
        for plan in (plans.forward_plan(problem, device), plans.backward_plan(problem, device)):
            share = -(-packs // plan.cluster)
            assert plan.cluster in ((1, 2, 4, 8) if device.architecture >= 90 else (1,)), (problem, plan)
            assert plan.threads % 32 == 0, (problem, plan)
            assert 32 <= plan.threads <= 1024, (problem, plan)
            assert plan.threads % plan.threads_per_row == 0, (problem, plan)
            assert plan.cluster == 1 or plan.threads == plan.threads_per_row, (problem, plan)
            assert plan.blocks % plan.cluster == 0, (problem, plan)
            looped = plan.looped if isinstance(plan, plans.ForwardPlan) else plan.kind == 2
            assert looped or plan.threads_per_row * plan.packs >= share, (problem, plan)
            teams = plan.threads // plan.threads_per_row
            if isinstance(plan, plans.ForwardPlan):
                assert plan.blocks // plan.cluster * teams * plan.rows >= problem.rows, (problem, plan)
            else:
                assert plan.shared_bytes + 2048 <= shared_limit, (problem, plan)
                assert plan.partials >= 1, (problem, plan)
                persistent = 4 * device.multiprocessors
                assert looped or plan.blocks <= max(persistent, plan.cluster), (problem, plan)


@pytest.mark.parametrize(
    ("columns", "packs", "threads_per_row", "cluster"),
    [
        (256, 1, 32, 1),
        (512, 2, 32, 1),
        (1024, 4, 32, 1),
        (4096, 4, 128, 1),
        (16384, 4, 512, 1),
        (65536, 2, 512, 8),
    ],
)
def test_forward_plan_of_common_sizes(columns: int, packs: int, threads_per_row: int, cluster: int) -> None:
    plan = plans.forward_plan(plans.Problem((1 << 25) // columns, columns), H100)
    assert (plan.packs, plan.threads_per_row, plan.cluster, plan.looped) == (
        packs,
        threads_per_row,
        cluster,
        0,
    )


def test_no_common_row_is_read_twice() -> None:
    for columns, size, device in product((768, 4096, 8192, 16384, 65536), (2, 4), (H100,)):
        problem = plans.Problem(4096, columns, size)
        assert plans.forward_plan(problem, device).looped == 0
        assert plans.backward_plan(problem, device).kind == 0


# --- every access, every schedule ----------------------------------------------------------------------


def _output(program: Path, *arguments: str) -> str:
    finished = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("schedule", TRACED_SCHEDULES)
def test_kernels_race_with_nobody_and_read_what_was_written(schedule: tuple[str, ...]) -> None:
    listed = _output(build.standalone(trace=True), *schedule, "kernels")
    reached = {launch.kernel for launch in backend.parse_launches(listed)}
    assert {
        kernel for kernel in backend.kernels() if not kernel.startswith(OF_OTHER_FILES)
    } - reached == set()


@pytest.mark.complete
def test_kernels_are_clean_under_the_sanitizers() -> None:
    # float32 and bfloat16; the tracer sees the bounds of every dtype.
    few = ("-DFASTREG_STANDALONE_FEW",)
    _output(build.standalone(sanitize="address,undefined", extra=few), *mutants.SCHEDULES[1])


@pytest.mark.complete
def test_the_sanitizers_see_a_missing_bound() -> None:
    name = "forward_kernel: no bound `row < arguments.rows`"
    (mutant,) = (mutant for mutant in ALL_MUTANTS if mutant.name == name)
    assert "AddressSanitizer: heap-buffer-overflow" in mutants.run(mutant, sanitize="address")


# --- the simulator is right, and sees mistakes ---------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("trace", [False, True], ids=["plain", "traced"])
def test_what_kernels_may_use(trace: bool, schedule: tuple[str, ...]) -> None:
    lines = _output(build.features(trace), *schedule).splitlines()
    assert len(lines) == 24
    assert all(line.endswith(": ok") for line in lines), lines


@pytest.mark.complete
def test_ucontext_serves_where_there_is_no_assembly() -> None:
    _output(build.features(ucontext=True))


def test_nvcc_takes_what_kernels_may_use(tmp_path: Path) -> None:
    cache = (build.ROOT / "build" / "CMakeCache.txt").read_text()
    nvcc = re.search("^CMAKE_CUDA_COMPILER:.*=(.+)$", cache, re.MULTILINE)
    assert nvcc, "run `make native`"
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    source = build.HERE / "features.cu"
    command = [
        nvcc[1],
        "-std=c++20",
        "-Werror=all-warnings",
        *architectures,
        f"-I{build.ROOT / 'csrc' / 'cuda'}",
    ]
    subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "features.o")], check=True)


def test_every_mistake_is_reported() -> None:
    program = build.mistakes()
    expected = dict(line.split(": ", 1) for line in _output(program).splitlines())
    assert len(expected) >= 30
    reported = {name: _output(program, name).strip() for name in expected}
    assert {name: text for name, text in reported.items() if expected[name] not in text} == {}


@pytest.mark.complete
@pytest.mark.parametrize(
    "file",
    ["layer_norm.cuh", "batch_norm.cuh", "batch_norm_resident_planes.cuh", "group_norm.cuh", "dropout.cuh"],
)
def test_the_program_of_the_mutants_accepts_the_kernels(file: str) -> None:
    assert mutants.output_of(mutants.program_of(file)) == ""


@pytest.fixture(scope="module")
def mutant_outputs() -> Iterator[dict[str, Future[str]]]:
    """Every fourteenth mutant, compiled and run on all processors at once."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        yield {mutant.name: pool.submit(mutants.run, mutant) for mutant in ALL_MUTANTS[::14]}


@pytest.mark.complete
@pytest.mark.parametrize("name", [mutant.name for mutant in ALL_MUTANTS[::14]])
def test_mutant_is_found(name: str, mutant_outputs: dict[str, Future[str]]) -> None:
    found, _ = mutants.committed()
    assert mutants.check_that_found(mutant_outputs[name].result()) == found[name]


def test_every_mutant_was_found_in_these_sources() -> None:
    """All of them take eight minutes of a processor, and what they come to depends on these sources alone."""
    found, digest = mutants.committed()
    advice = "run python tests/cuda_sim/mutants.py"
    assert digest == mutants.sources_digest(), advice
    assert list(found) == [mutant.name for mutant in ALL_MUTANTS], advice
    assert set(found.values()) <= set(dict(mutants.CHECKS).values())
    assert mutants.README.read_text() == mutants.with_table(mutants.README.read_text(), found), advice


def test_every_wait_and_mask_of_the_kernels_has_a_mutant() -> None:
    """What the patterns would miss: a synchronisation spelt in another way than the ones they look for."""
    folder = build.ROOT / "csrc" / "cuda"
    synchronising = (
        r"__sync\w+\(|__threadfence\w*\(|\.sync\(|all_lanes\b(?! =)"
        r"|\b(?:cluster|mailboxes|copy_async|counter)_(?!rank)\w+[<(]|\bgrid_barrier\("
    )
    for path in sorted(folder.glob("*.cuh")):
        if path.name in ("device.cuh", "launch.cuh", "layer_norm.cuh"):
            continue
        text = path.read_text()
        mutated = [(mutant.start, mutant.end) for mutant in ALL_MUTANTS if mutant.file == path.name]
        for match in re.finditer(synchronising, text):
            line = text[text.rindex("\n", 0, match.start()) : match.start()]
            if "//" in line:
                continue
            assert any(start <= match.start() < end for start, end in mutated), f"{path.name}: {match[0]}"
