"""The machine code of dropout's and DropBlock's Triton kernels, held to what that of batch norm is held to."""

from __future__ import annotations

import re

import pytest
import torch

from bench.static_evidence import machine_code
from fastreg._units import SAMPLE
from fastreg.backends.triton import drop_block, dropout
from test_triton_batch_norm_compile import check_machine_code
from triton_dropout_offline import CALLS, DropBlock, Dropout
from triton_offline import (
    ARCHITECTURES,
    BF16,
    Compilations,
    Launch,
    compilations,
    compiled_kernel,
    cubin,
    expect_known_spills,
    record,
)

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compilations:
    """All compilations that this session's tests will ask for, on every core of the machine."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return compilations(
        (each["call"], each["architecture"])
        for each in parameters
        if isinstance(each.get("call"), Dropout | DropBlock) and "architecture" in each
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_machine_code(
    call: Dropout | DropBlock, architecture: int, compiled: Compilations, request: pytest.FixtureRequest
) -> None:
    expect_known_spills(request, str(call), architecture)
    check_machine_code(compiled[call, architecture].result(), architecture)


def test_every_kernel_is_compiled() -> None:
    kernels = {launch.kernel.__name__ for call in CALLS for launch in call.launches()}
    assert kernels == {
        *("drop", "sum_layer_scale", "reduce_partials"),
        *("draw_blocks", "draw_rows", "spread_rows", "apply_planes", "apply_pixels"),
    }


def test_a_rate_or_a_seed_compiles_nothing_anew() -> None:
    """Neither a rate beyond a half, whose threshold has more than 31 bits, nor 0 or 1."""
    input = torch.empty(64, 64)

    def launches(seed: int, threshold: int) -> list[Launch]:
        mask = (torch.tensor(seed), threshold, None, SAMPLE, True)

        def call() -> None:
            dropout.dropout_fwd(input, None, None, torch.empty(64), *mask)
            drop_block.drop_block_mask(torch.tensor(seed), (2, 2, 8, 8), (3, 3), threshold, None, False)

        return record(call)

    def keys(found: list[Launch]) -> list[object]:
        return [(each.kernel.__name__, each.types(), each.constants(), each.aligned()) for each in found]

    first = launches(1, 0)
    for threshold in (1, 16, 2**31, 2**32 - 1, 2**32):
        assert keys(launches(threshold, threshold)) == keys(first)
    for launch in first:
        fixed = {each.name for each in launch.kernel.params if each.do_not_specialize}
        assert {"threshold", "scale"} & launch.arguments.keys() <= fixed


# Until the first exit are the programs that are not masked; in instructions for each element of a thread.
@pytest.mark.parametrize(
    ("call", "most"),
    [
        (Dropout((8192, 4096), BF16, residual=BF16), 20.5),
        (DropBlock((32, 256, 56, 56), 7, BF16), 17.0),
        (DropBlock((32, 256, 28, 28), 7, BF16), 20.0),
    ],
    ids=str,
)
def test_a_mask_costs_few_instructions(call: Dropout | DropBlock, most: float) -> None:
    """And no lane is moved between threads."""
    (launch,) = [each for each in call.launches() if each.kernel.__name__ in ("drop", "apply_planes")]
    kernel = compiled_kernel(launch, 90)
    assert kernel.metadata.shared == 0
    with cubin(kernel) as path:
        code = machine_code.cuobjdump(path, "-sass")
    instructions = [line for line in code if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line)]
    (first, *_) = [place for place, line in enumerate(instructions) if re.search(r"\bEXIT\b", line)]
    elements = launch.arguments["RUN"] * launch.arguments["RUNS"] / (32 * launch.warps)
    print(f"{(first + 1) / elements:.1f} instructions an element")
    assert (first + 1) / elements <= most
    assert not [line for line in instructions if "SHFL" in line]
