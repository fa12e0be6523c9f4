"""Which group norms stay on chip, and how, as a pure function of shape, dtype and device: no GPU is needed.

The plan is that of csrc/cuda/group_norm_plan.h, computed there. What it says here is what fits and how the blocks are
laid out, not how fast that is.
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
RESERVED_BYTES = 2 * KILOBYTE
BACKWARD = 2  # tensors held

# (samples, channels, height and width, groups): (on an H100, on an A100), two words each: planes, rows. A letter is one
# kernel: bfloat16 forward and backward, float32 forward and backward. "w": a warp holds a group; "b": a block holds a
# group, or a sample of rows; "2", "4" and "8": a cluster does; "c": blocks that run at once, and merge all groups each;
# "m": the same, where they merge some groups each; "-": three passes forward, five backward.
LAYERS: dict[tuple[int, int, int, int], tuple[str, str]] = {
    # a U-Net at batch 1, and at batch 2 for guidance; its decoder, up to images of 512 x 512
    (1, 320, 64, 32): ("8888 mmmm", "cccc mmmm"),
    (1, 640, 32, 32): ("8888 mmmm", "cccc mmmm"),
    (1, 1280, 16, 32): ("4488 mmmm", "bccc mmmm"),
    (1, 1280, 8, 32): ("bb22 cccc", "bbbb cccc"),
    (2, 320, 64, 32): ("8888 mmmm", "cccc mmmm"),
    (2, 1920, 32, 32): ("8888 mmm-", "cccc mmm-"),
    (1, 512, 64, 32): ("8888 mmmm", "cccc mmm-"),
    (1, 256, 256, 32): ("8ccc ----", "cccc ----"),
    (1, 128, 512, 32): ("cccc ----", "cccc ----"),
    # ResNets with group norm, and ConvNeXt's norm over all of a sample
    (32, 64, 112, 32): ("b2b4 cccm", "bbbc cccm"),
    (32, 256, 56, 32): ("b2b4 cccm", "bbbc cccm"),
    (32, 512, 28, 32): ("bbb2 cccc", "bbbb cccc"),
    (32, 1024, 14, 32): ("bbbb cccc", "bbbb cccc"),
    (32, 2048, 7, 32): ("bbbb ccc-", "bbbb ccc-"),
    (256, 64, 56, 32): ("bbbb cccc", "bbbb cccc"),
    (256, 512, 7, 32): ("wwww bbbb", "wwww bbbc"),
    (8, 96, 56, 1): ("cccc cccc", "cccc cccc"),
    # instance norm of images
    (1, 64, 256, 64): ("8888 mmm-", "cccc m---"),
    (8, 128, 128, 128): ("b2b4 mmmm", "bbbb mmm-"),
    (16, 256, 32, 256): ("wwww mmmm", "wwww mmmm"),
}


def problem_of(
    layer: tuple[int, int, int, int], rows: bool, element_size: int, tensors: int
) -> plans.GroupProblem:
    samples, channels, side, groups = layer
    spatial = side * side
    grain = 16 if rows else gcd(16, spatial * element_size)
    return plans.GroupProblem(samples, channels, spatial, groups, element_size, rows, tensors, grain=grain)


def letter(plan: plans.GroupPlan) -> str:
    if plan.kind == BLOCK:
        return "w" if plan.slab_threads < plan.threads or plan.threads == 32 else "b"
    return {NONE: "-", CLUSTER: str(plan.slab_blocks), COOPERATIVE: "m" if plan.twice else "c"}[plan.kind]


def word(layer: tuple[int, int, int, int], rows: bool, device: Device) -> str:
    kernels = product((2, 4), (1, BACKWARD))
    return "".join(
        letter(plans.group_plan(problem_of(layer, rows, size, tensors), device)) for size, tensors in kernels
    )


@pytest.mark.parametrize(("index", "device"), [(0, H100), (1, A100)], ids=IDS[:2])
def test_which_layers_stay_on_chip(index: int, device: Device) -> None:
    found = {layer: " ".join(word(layer, rows, device) for rows in (False, True)) for layer in LAYERS}
    assert found == {layer: words[index] for layer, words in LAYERS.items()}


# --- limits --------------------------------------------------------------------------------------------


def check_plan(problem: plans.GroupProblem, device: Device) -> plans.GroupPlan:
    plan = plans.group_plan(problem, device)
    if plan.kind == NONE:
        return plan
    context = (problem, device, plan)
    slabs_at_once = plan.threads // plan.slab_threads
    group_channels, width = problem.channels // problem.groups, 16 // problem.element_size
    if problem.rows:
        items, chunks = problem.spatial, plan.lanes
        assert chunks == problem.channels // width, context
        assert chunks <= plan.threads <= (512 if problem.tensors == 1 else 384), context
        table = 8 * (plan.threads * width + problem.groups)
        assert plan.shared_bytes == 16 * problem.tensors * plan.share * chunks + table, context
        assert plan.slabs == problem.samples, context
        assert slabs_at_once == 1, context
    else:
        plane_bytes = problem.spatial * problem.element_size
        assert plan.columns == -(-(plane_bytes + 16 - problem.grain) // 16), context
        items = group_channels * plan.columns
        assert plan.shared_bytes == 16 * problem.tensors * plan.share * slabs_at_once, context
        assert plan.slabs == problem.samples * problem.groups, context
        assert plan.threads <= (1024 if problem.tensors == 1 else 512), context
        # All chunks of a share belong to a run, and runs of whole planes to a team of lanes.
        assert plan.lanes in (1, 2, 4, 8, 16, 32), context
        if plan.whole:
            assert plan.run == plan.columns, context
            assert plan.share % plan.columns == 0, context
        else:
            assert plan.lanes == 32, context
            assert plan.run * plan.slab_threads // 32 >= plan.share, context

    # Within what the device has.
    block_bytes = plan.shared_bytes + RESERVED_BYTES
    assert block_bytes <= SHARED_BYTES[device.architecture], context
    assert plan.threads % 32 == 0, context
    at_once = SHARED_BYTES[device.architecture] // block_bytes
    if plan.kind == CLUSTER:
        assert device.architecture >= 90, context
        assert plan.slab_blocks in (2, 4, 8), context
        assert plan.blocks <= at_once * device.multiprocessors, context
    elif plan.kind == COOPERATIVE:
        assert plan.slab_blocks > 1, context
        assert plan.blocks <= device.multiprocessors, context
        exchanged = 24 * (plan.blocks * (problem.groups if problem.rows else 1))
        assert plan.workspace_bytes >= exchanged + 4 * plan.groups, context
    else:
        assert plan.slab_blocks == 1, context

    # All slabs, no block without one; all of a slab, no block without a part.
    assert 1 <= plan.groups <= -(-plan.slabs // slabs_at_once), context
    assert (plan.slab_blocks - 1) * plan.share < items <= plan.slab_blocks * plan.share, context
    return plan


def check_pieces(problem: plans.GroupProblem, device: Device, plan: plans.GroupPlan) -> None:
    """No two pieces in one place, and those of a channel are all that are stored of it."""
    pieces = plans.group_pieces(problem, device)
    if problem.rows:
        expected = [
            [block * len(pieces) + channel for block in range(plan.slab_blocks)]
            for channel in range(len(pieces))
        ]
    else:
        # As a kernel goes through a slab: block after block, run after run, channel after channel.
        expected = [[] for _ in pieces]
        block_runs, chunks = -(-plan.share // plan.run), len(pieces) * plan.columns
        for block in range(plan.slab_blocks):
            count = min(plan.share, chunks - block * plan.share)
            for run in range(-(-count // plan.run)):
                begin, end = run * plan.run, min((run + 1) * plan.run, count)
                first = (block * plan.share + begin) // plan.columns
                last = (block * plan.share + end - 1) // plan.columns
                for channel in range(first, last + 1):
                    slot = channel if plan.whole else block * block_runs + run + channel
                    expected[channel].append(slot)
    found = [[piece.first + index * piece.step for index in range(piece.count)] for piece in pieces]
    assert found == expected, (problem, device, plan)
    slots = [slot for slots in found for slot in slots]
    assert len(set(slots)) == len(slots), (problem, device, plan)
    assert max(slots) < plan.slots, (problem, device, plan)


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
def test_every_layer_keeps_the_limits(device: Device) -> None:
    for layer, rows, size, tensors in product(LAYERS, (False, True), (2, 4), (1, BACKWARD)):
        problem = problem_of(layer, rows, size, tensors)
        plan = check_plan(problem, device)
        if plan.kind != NONE:
            check_pieces(problem, device, plan)


@settings(max_examples=400, deadline=None)
@given(
    samples=st.one_of(st.integers(1, 40), st.integers(1, 1 << 20)),
    groups=st.one_of(st.integers(1, 40), st.integers(1, 4096)),
    group_channels=st.one_of(st.integers(1, 40), st.integers(1, 1000)),
    spatial=st.one_of(st.integers(1, 300), st.integers(1, 1 << 22)),
    size=st.sampled_from((2, 4)),
    rows=st.booleans(),
    tensors=st.integers(1, 2),
    device=st.sampled_from(DEVICES),
)
def test_any_problem_keeps_the_limits(
    samples: int,
    groups: int,
    group_channels: int,
    spatial: int,
    size: int,
    rows: bool,
    tensors: int,
    device: Device,
) -> None:
    channels = groups * group_channels
    regular = not rows or channels * size % 16 == 0
    grain = 16 if rows else gcd(16, spatial * size)
    problem = plans.GroupProblem(
        samples, channels, spatial, groups, size, rows, tensors, regular=regular, grain=grain
    )
    plan = check_plan(problem, device)
    if plan.kind != NONE:
        check_pieces(problem, device, plan)


# --- choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [1, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("layer", [(1, 320, 64, 32), (1, 640, 32, 32), (1, 512, 64, 32), (1, 128, 512, 32)])
def test_one_sample_of_32_groups_fills_the_machine(layer: tuple[int, int, int, int], tensors: int) -> None:
    for device in (H100, A100):
        plan = check_plan(problem_of(layer, False, 2, tensors), device)
        assert plan.kind in (CLUSTER, COOPERATIVE)
        assert plan.blocks >= device.multiprocessors * 2 // 3
    if layer[2] < 512:
        plan = check_plan(problem_of(layer, True, 2, tensors), H100)
        assert plan.kind == COOPERATIVE
        assert plan.blocks >= H100.multiprocessors * 2 // 3


def test_many_small_groups_share_a_block() -> None:
    for spatial, groups, threads in ((49, 256, 256), (196, 256, 256), (49, 32, 64)):
        plan = check_plan(plans.GroupProblem(32, 256, spatial, groups, grain=2), H100)
        assert (plan.kind, plan.slab_threads, plan.threads) == (BLOCK, 32, threads)


def test_what_is_too_large_or_lies_irregularly_streams() -> None:
    assert plans.group_plan(problem_of((1, 64, 2048, 1), False, 4, 1), H100).kind == NONE
    assert plans.group_plan(problem_of((1, 64, 1024, 32), True, 4, 1), H100).kind == NONE
    # More channels than a block has threads for; more groups than it is worth to exchange.
    assert plans.group_plan(problem_of((1, 8192, 8, 32), True, 2, 1), H100).kind == NONE
    assert plans.group_plan(problem_of((1, 2048, 16, 2048), True, 2, 1), H100).kind == NONE
    for rows in (False, True):
        problem = problem_of((32, 256, 14, 32), rows, 2, 1)
        assert plans.group_plan(problem, H100).kind != NONE
        assert plans.group_plan(replace(problem, regular=False), H100).kind == NONE
        assert plans.group_plan(replace(problem, samples=0), H100).kind == NONE
