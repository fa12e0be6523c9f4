"""The machine code of group and instance norm's Triton kernels, held to what that of batch norm is held to."""

from __future__ import annotations

import pytest

from test_triton_batch_norm_compile import check_machine_code, compilations_asked_for
from triton_group_norm_offline import LAYERS, Layer
from triton_offline import ARCHITECTURES, Compilations, expect_known_spills

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compilations:
    """All compilations that this session's tests will ask for, on every core of the machine."""
    return compilations_asked_for(request, Layer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_machine_code(
    layer: Layer, architecture: int, compiled: Compilations, request: pytest.FixtureRequest
) -> None:
    expect_known_spills(request, str(layer), architecture)
    check_machine_code(compiled[layer, architecture].result(), architecture)


def test_every_kernel_is_compiled() -> None:
    kernels = {launch.kernel.__name__ for layer in LAYERS for launch in layer.launches()}
    assert kernels == {
        "moments",
        "merge_moments",
        "normalize_groups",
        "normalize_group_slab",
        "sum_group_gradients",
        "merge_group_sums",
        "merge_sums",
        "differentiate_groups",
        "differentiate_group_slab",
        "move_running_statistics",
    }
