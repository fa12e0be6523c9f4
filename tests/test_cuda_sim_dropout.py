"""The CUDA kernels of the dropout family and of DropBlock on the simulator: every instance launched, and the
reference's results bit for bit.

test_dropout.py and test_drop_block.py run the operators on the same backend; here are the tensors that reach each
kernel, what a call launches, and what the doors refuse.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cuda_sim import backend, build, mutants, plans
from cuda_sim.backend import A100, H100, ORDERS, PART_OF_AN_H100, Device
from fastreg import _units
from fastreg._units import BATCH, CHANNEL, ELEMENT, SAMPLE
from fastreg.backends.reference import drop_block as reference_block
from fastreg.backends.reference import dropout as reference
from schedules import TRACED_SCHEDULES
from suite import unwritten_memory_is_nan

pytestmark = pytest.mark.backend_independent

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of the input and of what is added to it; backward goes from the second to the first.
PAIRS = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32))
ELEMENTS = {F32: "float", BF16: "__nv_bfloat16", F16: "__half"}
SEED = torch.tensor(-0x123456789ABCDEF)


@dataclass(frozen=True)
class Reach:
    """A problem that reaches a kernel instance or a branch that others do not."""

    shape: tuple[int, ...]
    unit: int = ELEMENT
    order: tuple[int, ...] = ()  # of the dimensions in memory
    shift: int = 0  # of the first element, in elements
    rows: int = 0  # dimensions that row_scale has
    layer: bool = False
    dynamic: bool = False
    rescale: bool = True


CHANNELS_LAST = (0, 2, 3, 1)
REACHING = (
    # whole tiles and the rest of one; any dense order; one by one
    Reach((3, 1001)),
    Reach((5, 3, 67), order=(2, 0, 1), dynamic=True),
    Reach((3, 1001), shift=1, rescale=False),
    # units longer and shorter than a pack, in turns, not aligned; the ends of samples within packs
    Reach((4, 11, 7, 7), CHANNEL),
    Reach((7, 640), CHANNEL, dynamic=True),
    Reach((3, 24, 7, 7), CHANNEL, CHANNELS_LAST),
    Reach((5, 9, 5, 5), CHANNEL, CHANNELS_LAST, shift=1, rescale=False),
    Reach((9, 7, 13), SAMPLE, order=(0, 2, 1)),
    Reach((2, 1030), BATCH),
    # scales: rows of whole packs and others, a unit that ends within a row
    Reach((37, 7, 24), rows=1, layer=True, dynamic=True),
    Reach((5, 3, 2056), SAMPLE, rows=2, layer=True),
    Reach((9, 5, 19), layer=True),
    Reach((6, 5, 304), CHANNEL, rows=1, layer=True, shift=1),
    Reach((300,), SAMPLE, layer=True),
)


def laid_out(reach: Reach, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers in the order and at the shift of a case."""
    order = reach.order or tuple(range(len(reach.shape)))
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(reach.shape).numel()
    flat = torch.randn(count + reach.shift, generator=generator).to(dtype)[reach.shift :]
    in_memory = flat.view([reach.shape[dimension] for dimension in order])
    return in_memory.permute([order.index(dimension) for dimension in range(len(order))])


def mask_arguments(reach: Reach) -> tuple[Any, ...]:
    threshold = int(0.3 * _units.lanes(reach.unit))
    given = (0, torch.tensor(threshold)) if reach.dynamic else (threshold, None)
    return (SEED, *given, reach.unit, reach.rescale)


def scales(reach: Reach, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.rand(reach.shape[: reach.rows], generator=generator) if reach.rows else None
    layer = torch.randn(reach.shape[-1], generator=generator).to(dtype) if reach.layer else None
    return rows, layer


def same(actual: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride()), what
    assert torch.equal(actual, expected), what


def check_sums(actual: torch.Tensor, arguments: tuple[Any, ...], what: object) -> None:
    """The gradient of layer_scale against the reference in fp64, within the roundings of its terms."""
    wide = [
        each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in arguments
    ]
    given = wide[:-2]  # without the input's dtype and what is wanted
    exact = reference.dropout_bwd(*given, 3, (False, True))[1]
    magnitudes = [
        each.abs() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in given
    ]
    terms = reference.dropout_bwd(*magnitudes, 3, (False, True))[1]
    rounding = 0.51 * torch.finfo(actual.dtype).eps if actual.dtype != F32 else 0.0
    assert ((actual.double() - exact).abs() <= rounding * exact.abs() + 16 * 2**-24 * terms).all(), what


def run_reach(reach: Reach, narrow: torch.dtype, wide: torch.dtype) -> None:
    """Forward, in place and backward, each as the reference has it."""
    input, residual = laid_out(reach, narrow, 1), laid_out(reach, wide, 2)
    rows, layer = scales(reach, narrow)
    mask = mask_arguments(reach)
    for added in (residual, None):
        arguments = (input, added, rows, layer, *mask)
        same(backend.dropout_fwd(*arguments), reference.dropout_fwd(*arguments), (reach, added is None))
    if rows is None and layer is None:
        # In the same memory, at the same shift.
        changed = torch.empty(reach.shift + input.numel(), dtype=narrow)[reach.shift :]
        changed = changed.as_strided(input.shape, input.stride(), reach.shift).copy_(input)
        backend.dropout_inplace(changed, *mask)
        same(changed, reference.dropout_fwd(input, None, None, None, *mask), reach)
    number = reference.DTYPES.index(narrow)
    arguments = (residual, input, rows, layer, *mask, number)
    exact, _ = reference.dropout_bwd(*arguments, (True, False))
    same(backend.dropout_bwd(*arguments, (True, False))[0], exact, reach)
    if layer is not None:
        grad_input, grad_layer = backend.dropout_bwd(*arguments, (True, True))
        same(grad_input, exact, reach)
        assert grad_layer.dtype == layer.dtype
        check_sums(grad_layer, (*arguments, (True, True)), reach)
        same(backend.dropout_bwd(*arguments, (False, True))[1], grad_layer, reach)


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join(ELEMENTS[each] for each in pair))
def test_every_dropout_kernel_is_launched_and_right(pair: tuple[torch.dtype, torch.dtype]) -> None:
    backend.launched()
    with unwritten_memory_is_nan():
        for reach in REACHING:
            run_reach(reach, *pair)
    names = [ELEMENTS[each] for each in pair]
    orders = (names, names[::-1])
    expected = {
        kernel
        for kernel in backend.kernels()
        if kernel.startswith(
            (
                *(
                    f"dropout_{units}_kernel<{', '.join(order)},"
                    for units in ("elements", "units")
                    for order in orders
                ),
                f"dropout_columns_kernel<{', '.join(orders[1])},",
                "dropout_partials_kernel",
            )
        )
    }
    assert len(expected) == (7 if names[0] == names[1] else 11)
    assert expected - set(backend.launched()) == set()


# (shape, block size, anywhere): rows of a word and of several, blocks clipped, as large as the map, wider than a
# window; volumes; a position alone; more planes than a block of threads.
MASKS: Sequence[tuple[tuple[int, ...], tuple[int, ...], bool]] = (
    ((3, 2, 7, 7), (3, 3), False),
    ((3, 2, 7, 7), (4, 4), True),
    ((2, 1, 56, 70), (7, 7), False),
    ((2, 3, 5, 100), (2, 40), False),
    ((1, 2, 9, 100), (9, 97), True),
    ((2, 2, 14, 14), (14, 14), False),
    ((2, 2, 3, 8, 40), (2, 3, 5), False),
    ((1, 2, 4, 5, 6), (4, 2, 3), True),
    ((5, 1, 1, 1), (1, 1), False),
    ((2, 130, 6, 6), (2, 2), False),
)


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.values())
def test_every_drop_block_kernel_is_launched_and_right(element: torch.dtype) -> None:
    backend.launched()
    for place, (shape, blocks, anywhere) in enumerate(MASKS):
        threshold = 2**32 // 40
        given = (threshold, None) if place % 2 else (0, torch.tensor(threshold))
        mask = (SEED, shape, blocks, *given, anywhere)
        bits, counts = backend.drop_block_mask(*mask)
        expected_bits, expected_counts = reference_block.drop_block_mask(*mask)
        same(bits, expected_bits, mask)
        same(counts, expected_counts, mask)
        for channels in {shape[1], 5} if shape[1] == 1 else {shape[1]}:
            whole = (shape[0], channels, *shape[2:])
            reach = Reach(
                whole, order=(0, *range(2, len(shape)), 1) if place % 3 else (), shift=place % 4 // 3
            )
            input = laid_out(reach, element, 3)
            for scale in (torch.tensor(1.25, dtype=torch.float64), torch.rand(shape[0], dtype=torch.float64)):
                with unwritten_memory_is_nan():
                    output = backend.drop_block_apply(input, bits, scale)
                same(output, reference_block.drop_block_apply(input, bits, scale), (reach, mask))
            backend.drop_block_inplace(input, bits, scale)
            same(input, output, (reach, mask))
    expected = {
        kernel
        for kernel in backend.kernels()
        if kernel.startswith(
            ("drop_block_seeds", "drop_block_grow", f"drop_block_apply_kernel<{ELEMENTS[element]},")
        )
    }
    assert len(expected) == 4
    assert expected - set(backend.launched()) == set()


@pytest.mark.parametrize("everything", [True, False])
def test_nothing_and_everything_is_dropped(everything: bool) -> None:
    input = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).repeat(1, 1, 3, 2)
    for unit in (ELEMENT, CHANNEL, SAMPLE, BATCH):
        threshold = _units.lanes(unit) if everything else 0
        for given in ((threshold, None), (0, torch.tensor(threshold))):
            output = backend.dropout_fwd(input, None, None, None, SEED, *given, unit, True)
            expected = torch.zeros_like(input) if everything else input
            torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    bits, counts = backend.drop_block_mask(
        SEED, (1, 1, 3, 8), (2, 2), 2**32 if everything else 0, None, False
    )
    assert counts.item() == (0 if everything else 24)
    assert bits.eq(0 if everything else 255).all()
    output = backend.drop_block_apply(input, bits, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_without_a_seed_nothing_is_dropped() -> None:
    input, residual, scale = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    arguments = (input, residual, torch.rand(6), scale, None, 1000, None, ELEMENT, True)
    same(backend.dropout_fwd(*arguments), reference.dropout_fwd(*arguments), "forward")
    arguments = (residual, input, None, scale, None, 0, None, SAMPLE, True, 0, (True, True))
    gradients = backend.dropout_bwd(*arguments)
    same(gradients[0], reference.dropout_bwd(*arguments)[0], "backward")
    check_sums(gradients[1], arguments, "sums")


@pytest.mark.parametrize("reach", [REACHING[index] for index in (0, 5, 10)], ids=str)
def test_equal_bits_in_every_schedule(reach: Reach) -> None:
    rows, layer = scales(reach, BF16)
    arguments = (laid_out(reach, F32, 2), laid_out(reach, BF16, 1), rows, layer, *mask_arguments(reach), 1)
    found = []
    for order, at_once in zip(ORDERS, (1, 2, 3), strict=True):
        with backend.simulating(replace(PART_OF_AN_H100, order=order, seed=7, clusters_at_once=at_once)):
            gradients = backend.dropout_bwd(*arguments, (True, layer is not None))
            masks = backend.drop_block_mask(SEED, (3, 2, 9, 40), (3, 3), 2**32 // 30, None, True)
            found.append((*gradients, *masks))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_division_by_multiplication() -> None:
    for value in (1, 2, 3, 5, 7, 49, 64, 641, 2**31 - 1, 2**31 + 11, 3**30, 2**62 + 1, 2**63 - 1):
        for multiple in (0, 1, 2, 1000, (2**63 - 1) // value):
            for position in (multiple * value - 1, multiple * value, multiple * value + 1):
                if 0 <= position < 2**63:
                    assert plans.quotient(position, value) == position // value, (position, value)


def test_every_plan_of_columns_has_all_rows_once() -> None:
    for device in (H100, A100, Device(architecture=90, multiprocessors=1)):
        for rows in (1, 7, 64, 1000, 1 << 20):
            for columns, width in (
                (8, 8),
                (7, 1),
                (96, 4),
                (768, 8),
                (768, 4),
                (5120, 8),
                (4097, 1),
                (1 << 20, 8),
            ):
                problem = plans.DropoutColumnsProblem(rows, columns, width)
                plan = plans.dropout_columns_plan(problem, device)
                threads = plan.lanes * plan.down
                assert threads % 32 == 0, (problem, plan)
                assert 32 <= threads <= 256, (problem, plan)
                assert plan.strips * plan.lanes * width >= columns, (problem, plan)
                assert (plan.parts - 1) * plan.share < rows <= plan.parts * plan.share, (problem, plan)


# --- launches ---------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return sorted(kernel.partition("<")[0] for kernel in backend.launched())


def test_what_a_call_launches() -> None:
    input, scale = torch.randn(6, 40), torch.randn(40)
    mask = (SEED, 1000, None)
    backend.launched()
    backend.dropout_fwd(input, input, torch.rand(6), scale, *mask, ELEMENT, True)
    assert _names() == ["dropout_elements_kernel"]
    backend.dropout_inplace(input, *mask, SAMPLE, True)
    assert _names() == ["dropout_units_kernel"]
    backward = (input, input, None, scale, *mask, ELEMENT, True, 0)
    gradients = backend.dropout_bwd(*backward, (False, False))
    assert [each.numel() for each in gradients] == [0, 0]
    assert _names() == []
    backend.dropout_bwd(*backward, (True, False))
    assert _names() == ["dropout_elements_kernel"]
    for wants_input in (True, False):
        backend.dropout_bwd(*backward, (wants_input, True))
        assert _names() == ["dropout_columns_kernel", "dropout_partials_kernel"]
    bits, _ = backend.drop_block_mask(SEED, (2, 3, 5, 5), (3, 3), 1000, None, False)
    assert _names() == ["drop_block_grow_kernel", "drop_block_seeds_kernel"]
    backend.drop_block_apply(torch.randn(2, 3, 5, 5), bits, torch.ones(2, dtype=torch.float64))
    assert _names() == ["drop_block_apply_kernel"]


def test_tensors_beyond_31_bits() -> None:
    """Launched only: nothing of the memory is touched."""
    input = torch.empty(2**31 + 24, dtype=BF16)
    with backend.simulating(replace(H100, execute=False)):
        backend.launches()
        backend.dropout_fwd(input, None, None, None, SEED, 1000, None, ELEMENT, True)
        (launch,) = backend.launches()
        assert launch.blocks == -(-input.numel() // (launch.threads * 16))


def test_operators_of_nothing() -> None:
    for shape in ((0, 40), (6, 0)):
        input, scale = torch.randn(shape), torch.randn(shape[1])
        mask = (SEED, 1000, None, ELEMENT, True)
        assert backend.dropout_fwd(input, None, None, scale, *mask).shape == shape
        gradients = backend.dropout_bwd(input, input, None, scale, *mask, 0, (True, True))
        assert gradients[0].shape == shape
        assert torch.equal(gradients[1], torch.zeros(shape[1]))
        backend.dropout_inplace(input, *mask)
    for shape in ((0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5)):
        bits, counts = backend.drop_block_mask(SEED, shape, (1, 1), 1000, None, False)
        assert bits.shape == (*shape[:3], 1)
        assert torch.equal(counts, torch.zeros(shape[0], dtype=torch.int64))
        output = backend.drop_block_apply(torch.randn(shape), bits, torch.ones(1, dtype=torch.float64))
        assert output.shape == shape


# --- what the doors refuse --------------------------------------------------------------------------------------------

X = torch.randn(4, 6, 8)
BITS = torch.zeros(4, 6, 5, 1, dtype=torch.uint8)
ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dropout_fwd", (X[:, ::2], None, None, None, SEED, 0, None, 0, True), "input must be dense"),
        (
            "dropout_fwd",
            (X, X.transpose(0, 1), None, None, SEED, 0, None, 0, True),
            "residual must have the shape",
        ),
        (
            "dropout_fwd",
            (X, X.to(BF16), None, None, SEED, 0, None, 0, True),
            "residual must be float32 or input's",
        ),
        (
            "dropout_fwd",
            (X, None, torch.rand(6), None, SEED, 0, None, 0, True),
            "row_scale must have the first",
        ),
        (
            "dropout_fwd",
            (X, None, None, torch.rand(6), SEED, 0, None, 0, True),
            "layer_scale must have 8 elements",
        ),
        (
            "dropout_fwd",
            (X.transpose(1, 2), None, None, torch.rand(6), SEED, 0, None, 0, True),
            "input must be contiguous where layer_scale is given",
        ),
        ("dropout_fwd", (X, None, None, None, SEED.int(), 0, None, 0, True), "seed must be one int64"),
        ("dropout_fwd", (X, None, None, None, SEED, 0, X, 0, True), "dynamic_threshold must be one int64"),
        (
            "dropout_fwd",
            (X, None, None, None, SEED, 65537, None, 0, True),
            "threshold must be between 0 and 65536",
        ),
        ("dropout_fwd", (X, None, None, None, SEED, 0, None, 4, True), "unit must be a number from 0 to 3"),
        (
            "dropout_inplace",
            (X.transpose(0, 1), SEED, 0, None, 1, True),
            "input's channels must be contiguous",
        ),
        (
            "dropout_inplace",
            (X.transpose(0, 1), SEED, 0, None, 2, True),
            "input's samples must be contiguous",
        ),
        ("dropout_inplace", (X[0, 0], SEED, 0, None, 1, True), "input's channels must be contiguous"),
        (
            "dropout_bwd",
            (X, X, None, None, SEED, 0, None, 0, True, 0, (True, True)),
            "layer_scale and input must be",
        ),
        (
            "dropout_bwd",
            (X.to(F16), None, None, None, SEED, 0, None, 0, True, 1, (True, False)),
            "grad_output must be",
        ),
        ("drop_block_mask", (SEED, (4, 6, 5), (3,), 0, None, False), "shape must be"),
        ("drop_block_mask", (SEED, (4, 6, 5, 5), (3, 6), 0, None, False), "block_size must be between 1 and"),
        ("drop_block_apply", (X, BITS, ONE), "input must be \\(samples, channels\\) and 2 or 3 sizes"),
        ("drop_block_apply", (X.view(4, 3, 8, 2), BITS, ONE), "bits must be what drop_block_mask gives"),
        ("drop_block_apply", (torch.randn(4, 6, 5, 8), BITS, ONE.float()), "scale must be float64"),
        ("drop_block_apply", (torch.randn(4, 6, 5, 8), BITS, ONE.repeat(3)), "scale must have 4 elements"),
    ],
)
def test_what_the_doors_refuse(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(backend, name)(*arguments)


# --- every access, every schedule -------------------------------------------------------------------------------------

NAMES = r"dropout_(?!add_)|drop_block_"


@pytest.mark.parametrize("schedule", TRACED_SCHEDULES)
def test_kernels_race_with_nobody_and_read_what_was_written(schedule: tuple[str, ...]) -> None:
    program = build.standalone(trace=True, name="standalone_dropout")
    finished = subprocess.run(
        [str(program), *schedule, "kernels"], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    reached = {launch.kernel for launch in backend.parse_launches(finished.stdout)}
    assert {kernel for kernel in backend.kernels() if re.match(NAMES, kernel)} - reached == set()


@pytest.mark.complete
def test_kernels_are_clean_under_the_sanitizers() -> None:
    # bfloat16 and float32; the tracer sees the bounds of every dtype.
    few = ("-DFASTREG_STANDALONE_FEW",)
    program = build.standalone(sanitize="address,undefined", extra=few, name="standalone_dropout")
    finished = subprocess.run(
        [str(program), *mutants.SCHEDULES[1]], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
