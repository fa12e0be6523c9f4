"""The machine code of the row-wise norms' Triton kernels where a branch is dropped and added before them.

As in test_triton_compile.py: no spills, 16 bytes at a time wherever alignment allows, room for enough warps.
"""

from __future__ import annotations

import pytest
import torch

from fastreg.backends.triton._dropout_add_branch import Branch
from fastreg.backends.triton.dropout_add_layer_norm import backward, forward
from test_triton_batch_norm_compile import check_machine_code
from triton_dropout_add_norm_offline import SHAPES, DropoutAddNorm
from triton_offline import (
    ARCHITECTURES,
    BF16,
    Compilations,
    Launch,
    compilations,
    compile_launch,
    expect_known_spills,
    record,
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
    results = compiled[shape, architecture].result()
    check_machine_code(results, architecture)
    for result in results:
        loads, stores = result.accesses.global_loads, result.accesses.global_stores
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


def test_a_rate_or_a_seed_compiles_nothing_anew() -> None:
    """Nor does the number of rows that share a scale, nor the distance between rows."""

    def launches(seed: int, threshold: int, samples: int, residual: torch.Tensor) -> list[Launch]:
        input, columns = torch.empty(64, 64), torch.empty(64)
        branch = Branch(torch.empty(samples), columns, torch.tensor(seed), threshold, None)

        def call() -> None:
            forward(input, residual, 1, columns, columns, branch, 1e-5, False, True, centred=True)
            gradients = (residual, residual, input, input, 1, torch.empty(2, 64), columns, columns)
            backward(*gradients, branch, 0, (True,) * 5, centred=True)

        return record(call)

    def keys(found: list[Launch]) -> list[object]:
        return [(each.kernel.__name__, each.types(), each.constants(), each.aligned()) for each in found]

    first = launches(0, 0, 64, torch.empty(64, 64))
    for seed, threshold, samples in ((1, 1, 1), (16, 16, 4), (2**40, 2**16 - 1, 32), (7, 2**16, 64)):
        for residual in (
            torch.empty(64, 64),
            torch.empty(64).expand(64, 64),
            torch.empty(64, 72)[:, :64],
        ):
            assert keys(launches(seed, threshold, samples, residual)) == keys(first)
    for launch in first:
        fixed = {each.name for each in launch.kernel.params if each.do_not_specialize}
        sizes = {name for name, value in launch.arguments.items() if isinstance(value, int | float)}
        assert sizes - {each.name for each in launch.kernel.params if each.is_constexpr} <= fixed | {"eps"}
