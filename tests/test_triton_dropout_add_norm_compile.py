"""The machine code of the row-wise norms' Triton kernels where a branch is dropped and added before them.

As in test_triton_compile.py: no spills, 16 bytes at a time wherever alignment allows, room for enough warps.
"""

from __future__ import annotations

import pytest

from bench.static_evidence.occupancy import WARP, residency
from test_triton_compile import SHARED_MEMORY, WARPS
from triton_dropout_add_norm_offline import SHAPES, DropoutAddNorm
from triton_offline import (
    ARCHITECTURES,
    BF16,
    Compilations,
    Launch,
    compilations,
    compile_launch,
    expect_known_spills,
)

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compilations:
    """All compilations that this session's tests will ask for, on every core of the machine."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return compilations(
        (each["shape"], each["architecture"])
        for each in parameters
        if isinstance(each.get("shape"), DropoutAddNorm) and "architecture" in each
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_machine_code(
    shape: DropoutAddNorm, architecture: int, compiled: Compilations, request: pytest.FixtureRequest
) -> None:
    expect_known_spills(request, str(shape), architecture)
    for result in compiled[shape, architecture].result():
        print(f"sm_{architecture} {result}")
        loads, stores = result.accesses.global_loads, result.accesses.global_stores
        assert result.stack_bytes == 0, f"registers are spilled: {result}"
        assert result.shared_bytes <= SHARED_MEMORY, result
        resident = residency(architecture, result.registers, result.warps * WARP, result.shared_bytes)
        assert resident.warps >= WARPS, f"too few warps fit: {result}"
        assert loads[16] >= result.wide_loads, f"loads are narrow: {loads}"
        assert stores[16] >= result.wide_stores, f"stores are narrow: {stores}"
        if result.wide_loads:
            assert not {1, 2} & {*loads, *stores}


def test_a_mask_moves_between_no_threads() -> None:
    """A thread draws for the elements that it holds: nothing but the reductions goes through shared memory."""
    shared = []
    for shape in (DropoutAddNorm(4096, BF16, BF16), DropoutAddNorm(4096, BF16, BF16, drops=False)):
        (launch,) = shape.launches()
        assert isinstance(launch, Launch)
        shared.append(compile_launch(launch, 90).shared_bytes)
    assert shared[0] == shared[1]
