"""Which batch norms keep their slabs on chip, as a pure function of shape, dtype and device: no GPU is needed.

The plan is that of csrc/cuda/batch_norm_resident_plan.h, computed there. What it says here is what fits and how the
blocks are laid out, not how fast that is.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_sim import plans
from cuda_sim.backend import A100, H100, Device

pytestmark = pytest.mark.backend_independent

B200 = Device(architecture=100, multiprocessors=148)
RTX_5090 = Device(architecture=120, multiprocessors=170)
DEVICES = (H100, A100, B200, RTX_5090, Device(90, 6), Device(80, 4), Device(90, 1))
IDS = [f"sm_{device.architecture}x{device.multiprocessors}" for device in DEVICES]

NONE, BLOCK, CLUSTER, COOPERATIVE = range(4)
KILOBYTE = 1024
# What a multiprocessor has and one block may take, of which the kernels' static variables and the system want a part.
SHARED_BYTES = {80: 164 * KILOBYTE, 90: 228 * KILOBYTE, 100: 228 * KILOBYTE, 120: 100 * KILOBYTE}
STATIC_BYTES = {False: 1 * KILOBYTE, True: 14 * KILOBYTE}  # planes, rows
SYSTEM_BYTES = 1 * KILOBYTE
BACKWARD = 2  # tensors held

# (channels, height and width): (on an H100, on an A100), four words each: planes of 32 samples, of 256, rows of 32, of
# 256. A letter is one kernel: bfloat16 forward and backward, float32 forward and backward. "b": a block holds a
# channel; "2", "4" and "8": a cluster does; "c": blocks that run at once hold a channel or a strip; "-": it is read
# twice.
#
# On an H100 782, on an A100 740 of the 864 are on chip. Most of the others are rows of 256 samples at 56 x 56 and
# beyond, backward above all, and planes of 36,100 elements.
LAYERS = {
    # ResNet-50
    (64, 112): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (64, 56): ("8888 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (256, 56): ("2848 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (128, 56): ("4848 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (128, 28): ("4444 4888 cccc cccc", "bbbc cccc cccc cccc"),
    (512, 28): ("b2b4 4888 cccc cccc", "bbbc cccc cccc cccc"),
    (256, 28): ("2224 4888 cccc cccc", "bbbc cccc cccc cccc"),
    (256, 14): ("2222 2428 cccc cccc", "bbbb bccc cccc cccc"),
    (1024, 14): ("bbbb b428 cccc cccc", "bbbb bccc cccc cccc"),
    (512, 14): ("bbbb b428 cccc cccc", "bbbb bccc cccc cccc"),
    (512, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
    (2048, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
    # EfficientNet-B0
    (32, 112): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (16, 112): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (96, 112): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (96, 56): ("4848 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (24, 56): ("8888 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (144, 56): ("2848 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (144, 28): ("2224 4888 cccc cccc", "bbbc cccc cccc cccc"),
    (40, 28): ("8888 8888 cccc cccc", "cccc cccc cccc cccc"),
    (240, 28): ("2224 4888 cccc cccc", "bbbc cccc cccc cccc"),
    (240, 14): ("2222 2428 cccc cccc", "bbbb bccc cccc cccc"),
    (80, 14): ("2244 4448 cccc cccc", "bbbb bccc cccc cccc"),
    (480, 14): ("bbbb b428 cccc cccc", "bbbb bccc cccc cccc"),
    (112, 14): ("2244 4448 cccc cccc", "bbbb bccc cccc cccc"),
    (672, 14): ("bbbb b428 cccc cccc", "bbbb bccc cccc cccc"),
    (672, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
    (192, 7): ("bbbb 2222 cccc cccc", "bbbb bbbb cccc cccc"),
    (1152, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
    (320, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
    (1280, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
    # EfficientNet-B4
    (48, 190): ("ccc- c--- ---- ----", "ccc- ---- ---- ----"),
    (24, 190): ("ccc- c--- ---- ----", "ccc- ---- ---- ----"),
    (144, 190): ("ccc- c--- ---- ----", "ccc- ---- ---- ----"),
    (144, 95): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (32, 95): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (192, 95): ("888c cccc cccc ----", "cccc ccc- c-c- ----"),
    (192, 48): ("2848 8ccc cccc c-c-", "bccc cccc cccc ----"),
    (56, 48): ("8888 8ccc cccc c-c-", "cccc cccc cccc ----"),
    (336, 48): ("2848 8ccc cccc c-c-", "bccc cccc cccc ----"),
    (336, 24): ("b2b4 4888 cccc cccc", "bbbb cccc cccc cccc"),
    (112, 24): ("4444 4888 cccc cccc", "bbbb cccc cccc cccc"),
    (672, 24): ("b2b4 4888 cccc cccc", "bbbb cccc cccc cccc"),
    (160, 24): ("2224 4888 cccc cccc", "bbbb cccc cccc cccc"),
    (960, 24): ("b2b4 4888 cccc cccc", "bbbb cccc cccc cccc"),
    (960, 12): ("bbbb b428 cccc cccc", "bbbb bbbc cccc cccc"),
    (272, 12): ("bbbb b428 cccc cccc", "bbbb bbbc cccc cccc"),
    (1632, 12): ("bbbb b428 cccc cccc", "bbbb bbbc cccc cccc"),
    (448, 12): ("bbbb b428 cccc cccc", "bbbb bbbc cccc cccc"),
    (2688, 12): ("bbbb b428 cccc cccc", "bbbb bbbc cccc cccc"),
    (1792, 12): ("bbbb b428 cccc cccc", "bbbb bbbc cccc cccc"),
    # ConvNeXt-T with batch norm; its (96, 56) is above
    (192, 28): ("2224 4888 cccc cccc", "bbbc cccc cccc cccc"),
    (384, 14): ("bbbb b428 cccc cccc", "bbbb bccc cccc cccc"),
    (768, 7): ("bbbb bbb2 cccc cccc", "bbbb bbbb cccc cccc"),
}


def problem_of(
    layer: tuple[int, int], samples: int, rows: bool, element_size: int, tensors: int
) -> plans.ResidentProblem:
    channels, side = layer
    spatial = side * side
    return plans.ResidentProblem(
        samples, channels, spatial, element_size, rows, tensors, grain=gcd(16, spatial * element_size)
    )


def letter(plan: plans.ResidentPlan) -> str:
    return {NONE: "-", BLOCK: "b", CLUSTER: str(plan.slab_blocks), COOPERATIVE: "c"}[plan.kind]


def word(layer: tuple[int, int], samples: int, rows: bool, device: Device) -> str:
    kernels = product((2, 4), (1, BACKWARD))
    return "".join(
        letter(plans.resident_plan(problem_of(layer, samples, rows, size, tensors), device))
        for size, tensors in kernels
    )


@pytest.mark.parametrize(
    ("index", "device"), [(0, H100), pytest.param(1, A100, marks=pytest.mark.complete)], ids=IDS[:2]
)
def test_which_layers_stay_on_chip(index: int, device: Device) -> None:
    found = {
        layer: " ".join(
            word(layer, samples, rows, device) for rows, samples in product((False, True), (32, 256))
        )
        for layer in LAYERS
    }
    assert found == {layer: words[index] for layer, words in LAYERS.items()}


# --- limits --------------------------------------------------------------------------------------------


def items_of(problem: plans.ResidentProblem) -> int:
    """What a slab is cut into: rows, or chunks of planes."""
    if problem.rows:
        return problem.samples * problem.spatial
    return problem.samples * -(-(problem.spatial * problem.element_size + 16 - problem.grain) // 16)


def check_plan(problem: plans.ResidentProblem, device: Device) -> plans.ResidentPlan:
    plan = plans.resident_plan(problem, device)
    if plan.kind == NONE:
        return plan
    context = (problem, device, plan)
    chunk_bytes = 16 * problem.tensors + (0 if problem.rows else int(problem.signs))
    chunks = plan.share * (plan.columns if problem.rows else 1)
    assert plan.shared_bytes == chunks * chunk_bytes, context

    # Within what the device has.
    block_bytes = plan.shared_bytes + STATIC_BYTES[problem.rows] + SYSTEM_BYTES
    assert block_bytes <= SHARED_BYTES[device.architecture], context
    most_threads = (1024, 512) if problem.tensors == 1 else (512, 384)
    assert plan.threads % 32 == 0, context
    assert 128 <= plan.threads <= most_threads[problem.rows], context
    at_once = SHARED_BYTES[device.architecture] // block_bytes
    if plan.kind == CLUSTER:
        assert device.architecture >= 90, context
        assert plan.slab_blocks in (2, 4, 8), context
        assert plan.blocks <= at_once * device.multiprocessors, context
    elif plan.kind == COOPERATIVE:
        assert plan.slab_blocks > 1, context
        assert plan.blocks <= device.multiprocessors, context
    else:
        assert plan.slab_blocks == 1, context

    # All slabs, no group without one; all of a slab, no block without a part.
    slabs = problem.channels
    if problem.rows:
        row_chunks = problem.channels * problem.element_size // 16
        slabs = -(-row_chunks // plan.columns)
        assert 1 <= plan.columns <= 8, context
    assert plan.slabs == slabs, context
    assert 1 <= plan.groups <= slabs, context
    assert (plan.slab_blocks - 1) * plan.share < items_of(problem) <= plan.slab_blocks * plan.share, context
    if problem.rows:
        # A strip begins at a sector of 32 bytes, and so at a byte of signs.
        assert plan.slabs == 1 or plan.columns % 2 == 0, context
    elif plan.slab_blocks > 1:
        # A share begins with a plane, or at a byte of signs of one.
        columns = items_of(problem) // problem.samples
        assert plan.share % columns == 0 or (problem.grain == 16 and plan.share % 2 == columns % 2 == 0), (
            context
        )
    return plan


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
def test_every_layer_keeps_the_limits(device: Device) -> None:
    for layer, samples, rows, size, tensors in product(
        LAYERS, (2, 32, 256), (False, True), (2, 4), (1, 2, 3)
    ):
        problem = problem_of(layer, samples, rows, size, tensors)
        check_plan(problem, device)
        check_plan(replace(problem, grain=size, signs=tensors == 1), device)


@settings(max_examples=400, deadline=None)
@given(
    samples=st.one_of(st.integers(1, 40), st.integers(1, 1 << 20)),
    groups_of_8=st.one_of(st.integers(1, 40), st.integers(1, 1 << 14)),
    spatial=st.one_of(st.integers(1, 300), st.integers(1, 1 << 24)),
    size=st.sampled_from((2, 4)),
    rows=st.booleans(),
    tensors=st.integers(1, 3),
    device=st.sampled_from(DEVICES),
)
def test_any_problem_keeps_the_limits(
    samples: int, groups_of_8: int, spatial: int, size: int, rows: bool, tensors: int, device: Device
) -> None:
    grain = gcd(16, spatial * size)
    problem = plans.ResidentProblem(
        samples, 8 * groups_of_8, spatial, size, rows, tensors, tensors == 1, grain=grain
    )
    check_plan(problem, device)


# --- choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_64_channels_fill_the_machine(rows: bool) -> None:
    for samples, side in ((32, 56), (256, 28)):
        plan = check_plan(problem_of((64, side), samples, rows, 2, 1), H100)
        assert plan.blocks >= H100.multiprocessors


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_three_channels_of_images_use_all_multiprocessors_or_none(rows: bool) -> None:
    problem = plans.ResidentProblem(64, 8 if rows else 3, 224 * 224, 2, rows)
    plan = check_plan(problem, H100)
    assert plan.kind == NONE or plan.blocks >= H100.multiprocessors * 2 // 3


def test_what_is_too_large_or_lies_irregularly_is_read_twice() -> None:
    assert plans.resident_plan(problem_of((64, 224), 256, False, 4, 1), H100).kind == NONE
    assert plans.resident_plan(problem_of((64, 112), 256, True, 4, 1), H100).kind == NONE
    for rows in (False, True):
        problem = problem_of((256, 14), 32, rows, 2, 1)
        assert plans.resident_plan(problem, H100).kind != NONE
        assert plans.resident_plan(replace(problem, regular=False), H100).kind == NONE
        assert plans.resident_plan(replace(problem, samples=0), H100).kind == NONE
