"""The machine code of batch norm's Triton kernels, held to what test_triton_compile.py holds the row-wise norms to.

But single bytes are loaded and stored where signs are, and single parameters where all of a line are one channel's.
"""

from __future__ import annotations

import pytest

from bench.static_evidence.occupancy import WARP, residency
from triton_batch_norm_offline import LAYERS, Layer
from triton_offline import (
    ARCHITECTURES,
    Compilable,
    Compilations,
    Compiled,
    compilations,
    expect_known_spills,
)

pytestmark = pytest.mark.backend_independent

SHARED_MEMORY = 24 * 1024
WARPS = 8  # of a multiprocessor, at least


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compilations:
    """All compilations that this session's tests will ask for, on every core of the machine."""
    return compilations_asked_for(request, Layer)


def compilations_asked_for(request: pytest.FixtureRequest, kind: type[Compilable]) -> Compilations:
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return compilations(
        (each["layer"], each["architecture"])
        for each in parameters
        if isinstance(each.get("layer"), kind) and "architecture" in each
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_machine_code(
    layer: Layer, architecture: int, compiled: Compilations, request: pytest.FixtureRequest
) -> None:
    expect_known_spills(request, str(layer), architecture)
    check_machine_code(compiled[layer, architecture].result(), architecture)


def check_machine_code(results: list[Compiled], architecture: int) -> None:
    assert results
    for result in results:
        print(f"sm_{architecture} {result}")
        loads, stores = result.accesses.global_loads, result.accesses.global_stores
        assert result.stack_bytes == 0, f"registers are spilled: {result}"
        assert result.shared_bytes <= SHARED_MEMORY, result
        resident = residency(architecture, result.registers, result.warps * WARP, result.shared_bytes)
        assert resident.warps >= WARPS, f"too few warps fit: {result}"
        assert loads[16] >= result.wide_loads, f"loads are narrow: {loads}"
        assert stores[16] >= result.wide_stores, f"stores are narrow: {stores}"


def test_every_kernel_is_compiled() -> None:
    kernels = {launch.kernel.__name__ for layer in LAYERS for launch in layer.launches()}
    assert kernels == {
        "moments",
        "merge_moments",
        "normalize_channels",
        "normalize_slab",
        "sum_gradients",
        "merge_sums",
        "differentiate_channels",
        "differentiate_slab",
    }
