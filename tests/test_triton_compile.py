"""The machine code of the Triton kernels, compiled without a GPU (triton_offline.py).

It may not spill, has to load and store 16 bytes at a time wherever alignment allows, and has to leave room for enough
warps on a multiprocessor. A new release of Triton that does worse fails here.
"""

from __future__ import annotations

import pytest

from bench.static_evidence import machine_code
from bench.static_evidence.occupancy import WARP, residency
from triton_offline import (
    ARCHITECTURES,
    BF16,
    F32,
    SHAPES,
    Compilations,
    Launch,
    Shape,
    compilations,
    compile_launch,
    compiled_kernel,
    cubin,
    expect_known_spills,
)

pytestmark = pytest.mark.backend_independent

# Of 100 KB at least; what a program takes is taken from the cache that the parameters are to stay in.
SHARED_MEMORY = 24 * 1024
WARPS = 8  # of a multiprocessor, at least


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compilations:
    """All compilations that this session's tests will ask for, on every core of the machine."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return compilations(
        (each["shape"], each["architecture"])
        for each in parameters
        if isinstance(each.get("shape"), Shape) and "architecture" in each
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_machine_code(
    shape: Shape, architecture: int, compiled: Compilations, request: pytest.FixtureRequest
) -> None:
    expect_known_spills(request, str(shape), architecture)
    results = compiled[shape, architecture].result()
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
        if result.wide_loads:
            assert not {1, 2} & {*loads, *stores}


@pytest.mark.parametrize("shape", [Shape(1024, BF16, F32, gradients="iwb"), Shape(1002, BF16, F32)], ids=str)
def test_ptxas_keeps_the_widths(shape: Shape) -> None:
    """Of loads it drops those that are made twice, so that only stores are as many."""
    for launch in shape.launches():
        kernel = compiled_kernel(launch, 90)
        in_ptx = machine_code.accesses_in_ptx(kernel.asm["ptx"])
        with cubin(kernel) as path:
            (in_code,) = machine_code.accesses(machine_code.cuobjdump(path, "-sass")).values()
        assert in_code.global_stores == in_ptx.global_stores
        assert in_code.global_loads.keys() == in_ptx.global_loads.keys()
        assert not in_code.local


def test_a_spill_would_be_seen() -> None:
    """A row twice too long for the registers, forced onto the resident kernel."""
    (launch,) = Shape(65536, BF16, F32).launches()
    arguments = {**launch.arguments, "CHUNKS": 16}
    spilling = compile_launch(Launch(launch.kernel, arguments, launch.warps), 90)
    assert spilling.stack_bytes > 0
