"""The launch configurations of batch norm's Triton kernels, as pure functions of sizes: no Triton, no GPU."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreg._channels import ChannelView
from fastreg.backends.triton import _batch_norm_launch as launches
from fastreg.backends.triton._launch import INTERPRETER_MULTIPROCESSORS, ceil_div

pytestmark = pytest.mark.backend_independent

H100 = 132
SAMPLES = st.one_of(st.integers(1, 70), st.integers(1, 2**20))
CHANNELS = st.one_of(st.integers(1, 300), st.integers(1, 2**16))
SPATIAL = st.one_of(
    st.integers(1, 300), st.integers(1, 2**24), st.sampled_from([49 * 4**k for k in range(8)])
)
ITEMSIZE = st.sampled_from([2, 4])
MULTIPROCESSORS = st.sampled_from([INTERPRETER_MULTIPROCESSORS, 108, H100, 148, 188])


def view(rows: bool, samples: int, channels: int, spatial: int) -> ChannelView:
    return ChannelView(rows, samples, channels, spatial, channels if rows else channels * spatial)


VIEWS = st.builds(view, st.booleans(), SAMPLES, CHANNELS, SPATIAL)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def check_tile(rows: int, block: int, warps: int) -> None:
    assert is_power_of_two(rows)
    assert is_power_of_two(block)
    assert is_power_of_two(warps)
    # Eight signs, a byte, lie in one tile.
    assert block >= 8


@given(view=VIEWS, itemsize=ITEMSIZE, tensors=st.integers(2, 4))
@settings(max_examples=300, deadline=None)
def test_an_elementwise_launch_covers_every_element_once(
    view: ChannelView, itemsize: int, tensors: int
) -> None:
    launch = launches.elementwise(view, itemsize, tensors)
    check_tile(launch.rows, launch.block, launch.warps)
    assert (launch.blocks - 1) * launch.block < view.line_elements <= launch.blocks * launch.block
    assert launch.even == (view.line_elements == launch.blocks * launch.block)
    assert launch.programs % launch.blocks == 0
    groups = launch.programs // launch.blocks
    assert (groups - 1) * launch.rows < view.lines <= groups * launch.rows


@given(view=VIEWS, itemsize=ITEMSIZE, tensors=st.integers(1, 3), processors=MULTIPROCESSORS)
@settings(max_examples=500, deadline=None)
def test_a_reduction_covers_every_element_once(
    view: ChannelView, itemsize: int, tensors: int, processors: int
) -> None:
    launch = launches.reduction(view, itemsize, tensors, processors)
    check_tile(launch.rows, launch.block, launch.warps)
    blocks = ceil_div(view.line_elements, launch.block)
    assert launch.even == (view.line_elements == blocks * launch.block)
    assert launch.blocks == (1 if view.rows else blocks)
    assert launch.strips == (blocks if view.rows else view.channels)
    units = ceil_div(view.per_channel if view.rows else view.samples, launch.rows) * launch.blocks
    assert (launch.parts - 1) * launch.part < units <= launch.parts * launch.part


@given(view=VIEWS, itemsize=ITEMSIZE, tensors=st.integers(1, 3), processors=MULTIPROCESSORS)
@settings(max_examples=300, deadline=None)
def test_no_lane_adds_up_a_long_chain(
    view: ChannelView, itemsize: int, tensors: int, processors: int
) -> None:
    launch = launches.reduction(view, itemsize, tensors, processors)
    assert launch.part <= 32


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("layer", [(3, 224), (16, 112), (24, 56), (32, 112), (64, 56), (64, 112), (96, 56)])
def test_few_channels_fill_the_machine(layer: tuple[int, int], batch: int, rows: bool) -> None:
    channels, side = layer
    launch = launches.reduction(view(rows, batch, channels, side * side), 2, 1, H100)
    assert launch.programs >= 2 * H100
    launch = launches.reduction(view(rows, batch, channels, side * side), 2, 2, H100)
    assert launch.programs >= 2 * H100


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("layer", [(64, 56), (128, 28), (256, 14), (512, 7), (2048, 7), (24, 56), (1280, 7)])
def test_partial_sums_are_few_beside_what_was_read(layer: tuple[int, int], itemsize: int) -> None:
    channels, side = layer
    for rows in (False, True):
        seen = view(rows, 32, channels, side * side)
        launch = launches.reduction(seen, itemsize, 1, H100)
        partial = 2 * 8 * launch.parts * channels
        assert partial <= 0.04 * 3 * seen.lines * seen.line_elements * itemsize


@given(channels=CHANNELS, parts=st.one_of(st.integers(1, 300), st.integers(1, 2**20)))
def test_a_merge_covers_every_channel_once(channels: int, parts: int) -> None:
    launch = launches.merge(channels, parts)
    check_tile(launch.parts, launch.channels, launch.warps)
    assert (launch.programs - 1) * launch.channels < channels <= launch.programs * launch.channels


@given(view=VIEWS, itemsize=ITEMSIZE, processors=MULTIPROCESSORS)
@settings(max_examples=500, deadline=None)
def test_a_slab_holds_its_channels(view: ChannelView, itemsize: int, processors: int) -> None:
    lines = view.per_channel if view.rows else view.samples
    for slab in (
        launches.forward_slab(view, itemsize, processors),
        launches.backward_slab(view, itemsize, processors),
    ):
        if slab is None:
            continue
        check_tile(slab.rows, slab.block, slab.warps)
        assert (slab.chunks - 1) * slab.rows < lines <= slab.chunks * slab.rows
        if view.rows:
            assert (slab.programs - 1) * slab.block < view.channels <= slab.programs * slab.block
        else:
            assert slab.programs == view.channels
            assert slab.block >= view.spatial
        assert slab.even == (view.line_elements % slab.block == 0)
        assert slab.packed <= (itemsize == 2)
        # The registers of a multiprocessor hold 64K values of 32 bits.
        assert slab.chunks * slab.rows * slab.block * (itemsize if slab.packed else 4) <= 4 * 32 * 1024


def passes(layer: tuple[int, int], batch: int, rows: bool) -> tuple[int, int]:
    """Passes over bfloat16 tensors that forward and backward make in training."""
    seen = view(rows, batch, layer[0], layer[1] ** 2)
    forward = 3 if launches.forward_slab(seen, 2, H100) is None else 2
    backward = 5 if launches.backward_slab(seen, 2, H100) is None else 3
    return forward, backward


# Of planes, by channels and side of the layers of a ResNet-50 (the first two rows), an EfficientNet-B0 and a ConvNeXt-T
# with batch norm.
RESNET = ((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14))
RESNET_LAST = ((512, 14), (512, 7), (2048, 7))
EFFICIENTNET = ((32, 112), (96, 112), (144, 56), (240, 28), (480, 14), (672, 14), (1152, 7), (1280, 7))
CONVNEXT = ((96, 56), (192, 28), (384, 14), (768, 7))
ON_CHIP = {
    (32, 28): (2, 5),
    (32, 14): (2, 3),
    (32, 7): (2, 3),
    (256, 7): (2, 5),
}


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("layer", [*RESNET, *RESNET_LAST, *EFFICIENTNET, *CONVNEXT], ids=str)
def test_what_stays_on_chip_of_planes(layer: tuple[int, int], batch: int) -> None:
    assert passes(layer, batch, rows=False) == ON_CHIP.get((batch, layer[1]), (3, 5))


def test_what_stays_on_chip_of_rows() -> None:
    """Strips of at least a sector, of which few fit: late layers at small batches, and two-dimensional input."""
    assert passes((512, 7), 32, rows=True) == (3, 5)
    assert passes((2048, 7), 16, rows=True) == (2, 5)
    assert passes((2048, 7), 8, rows=True) == (2, 3)
    assert passes((4096, 1), 256, rows=True) == (2, 3)
    assert passes((64, 56), 256, rows=True) == (3, 5)
    assert passes((64, 4), 32, rows=True) == (2, 3), "a small tensor costs less than the launches"
