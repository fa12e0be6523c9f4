"""Every path of the row-wise norms' Triton kernels where a branch is dropped and added before them: masks and values.

The op's own tests draw covering cases; here are the tiles that those are too small for, and the masks bit by bit.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import triton_interpreter
from dropout_add_norms import SEED, Branch, check_branch
from fastreg.backends.reference.dropout import DTYPES
from fastreg.backends.triton._dropout_add_tiles import keep_chunk
from fastreg.backends.triton.dropout_add_layer_norm import (
    dropout_add_layer_norm_bwd,
    dropout_add_layer_norm_fwd,
)
from fastreg.backends.triton.dropout_add_rms_norm import dropout_add_rms_norm_fwd
from masks import half_lane, keep_elements

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = ("input", "residual", "weight", "bias", "layer_scale")


def branch(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    residual: torch.dtype | None,
    wanted: tuple[str, ...] = EVERYTHING,
    *,
    p: float = 0.3,
    in_tensor: bool = False,
    layout: str = "contiguous",
) -> Branch:
    size = ((rows,), (columns,))
    return Branch(
        *(size, dtype, residual, F32, layout, layout, p, in_tensor, True, False, (), wanted),
    )


# Tiles of several chunks, even and not, and of several rows; programs with several tiles; rows that are read twice.
@pytest.mark.parametrize(
    "case",
    [
        branch(70, 64, BF16, BF16),
        branch(130, 24, BF16, F32, in_tensor=True),
        branch(270, 17, F16, F16, ("input", "layer_scale")),
        branch(9, 1024, BF16, BF16, EVERYTHING[:4]),
        branch(3, 2560, F32, F32),
        branch(3, 2568, BF16, F32, EVERYTHING[:2]),
        branch(9, 512, BF16, BF16, layout="rows"),
        branch(2, 8192, BF16, BF16),
        branch(2, 12288, BF16, BF16, EVERYTHING[:4]),
        branch(1, 16384, F32, F32),
        pytest.param(branch(1, 28680, BF16, BF16, EVERYTHING[:2]), marks=pytest.mark.complete),
        pytest.param(branch(1, 65536, BF16, BF16, ("input", "weight")), marks=pytest.mark.complete),
    ],
    ids=str,
)
def test_every_path(case: Branch, device: str) -> None:
    check_branch("layer_norm", case, device)


@pytest.mark.parametrize(
    "columns", [1, 2, 3, 4, 12, 17, 129, 257, 1000, pytest.param(8193, marks=pytest.mark.complete)]
)
@pytest.mark.parametrize(("low", "wide"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_masks(columns: int, low: torch.dtype, wide: torch.dtype, device: str) -> None:
    """Of sum and gradient, for rows of every alignment to the blocks of the stream."""
    rows, threshold = 5, 30_000
    keep = keep_elements(torch.empty(rows, columns), SEED, threshold)
    seed = torch.tensor(SEED, device=device)
    input = torch.ones(rows, columns, dtype=low, device=device)
    mask = (seed, threshold, None)
    float_sum = wide != low
    output, found, statistics = dropout_add_layer_norm_fwd(
        *(input, None, 1, None, None, None, None, *mask, 1e-5, float_sum, True)
    )
    assert found.dtype == wide
    assert torch.equal(found.cpu() != 0, keep)
    _, same, _ = dropout_add_rms_norm_fwd(
        *(input, torch.zeros_like(found), 1, None, None, None, *mask, 1e-5, False, True)
    )
    assert torch.equal(same, found)
    # A gradient of the sum alone, so that nothing but the mask can make a zero.
    grad_input, grad_residual, *_ = dropout_add_layer_norm_bwd(
        *(torch.zeros_like(output), torch.ones_like(found), found, None, 1, statistics, None, None),
        *(None, None, *mask, DTYPES.index(low), (True, True, False, False, False)),
    )
    assert (grad_residual == 1).all()
    assert torch.equal(grad_input.cpu() != 0, keep)


def test_a_dropped_element_counts_nowhere(device: str) -> None:
    """Whatever it is."""
    rows, columns, threshold = 4, 40, 30_000
    keep = keep_elements(torch.empty(rows, columns), SEED, threshold)
    seed, scale = torch.tensor(SEED, device=device), torch.ones(columns, device=device)
    input = torch.where(keep, 1.0, torch.nan).to(device)
    mask = (None, scale, seed, threshold, None)
    output, total, statistics = dropout_add_layer_norm_fwd(
        *(input, input.nan_to_num(2.0), 1, None, None, *mask, 1e-5, False, True)
    )
    assert output.isfinite().all()
    gradients = dropout_add_layer_norm_bwd(
        *(torch.ones_like(output), torch.ones_like(total), total, input, 1, statistics, None, None, *mask),
        *(0, (True, True, False, False, True)),
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    zero = dropout_add_layer_norm_fwd(
        *(input, None, 1, None, None, None, None, seed, 2**16, None, 1e-5, False, True)
    )
    assert (zero[1] == 0).all()


def test_a_scale_that_is_not_finite_stays_in_its_row(device: str) -> None:
    """And out of the padding: of a row of which all is dropped nothing is scaled."""
    input, residual = torch.ones(2, 3, 12, device=device), torch.randn(2, 3, 12, device=device)
    scale = torch.tensor([torch.inf, 1.0], device=device)
    seed = torch.tensor(SEED, device=device)
    _, total, _ = dropout_add_layer_norm_fwd(
        *(input, residual, 1, None, None, scale, None, seed, 2**16, None, 1e-5, False, True)
    )
    assert torch.equal(total, residual)
    output, total, statistics = dropout_add_layer_norm_fwd(
        *(input, residual, 1, None, None, scale, None, None, 0, None, 1e-5, False, True)
    )
    assert total[0].isinf().all()
    assert output[1].isfinite().all()
    assert statistics[:, 3:].isfinite().all()


@pytest.mark.parametrize("leading", [(6,), (6, 4), (6, 4, 2)], ids=str)
def test_rows_share_a_scale(leading: tuple[int, ...], device: str) -> None:
    input, scale = torch.ones(6, 4, 2, 24, device=device), torch.rand(leading, device=device)
    _, total, _ = dropout_add_layer_norm_fwd(
        *(input, None, 1, None, None, scale, None, None, 0, None, 1e-5, False, True)
    )
    assert torch.equal(total, input * scale.reshape(*leading, *(1,) * (4 - len(leading))))


@triton.jit
def draw(kept: tl.tensor, seed: tl.tensor, first: tl.tensor, limit: tl.tensor, DRAW: tl.constexpr) -> None:  # noqa: N803
    run = first.to(tl.int64) + tl.arange(0, 64 // DRAW)
    found = keep_chunk(tl.load(seed), limit, run, tl.zeros([64], tl.float32), DRAW)
    tl.store(kept + tl.arange(0, 64), found.to(tl.uint8))


@pytest.mark.parametrize("drawn", [1, 2, 4, 8])
def test_units_beyond_32_bits(drawn: int, device: str) -> None:
    kept = torch.empty(64, dtype=torch.uint8, device=device)
    for first in (0, 2**31 - 32, 2**35 - 32, 2**35 + 2**20):
        draw[(1,)](kept, torch.tensor(SEED, device=device), first // drawn, 30_000, drawn)
        assert kept.tolist() == [half_lane(SEED, first + place) >= 30_000 for place in range(64)]


@pytest.mark.only(device="cpu")
def test_rows_further_apart_than_32_bits() -> None:
    """Of memory that is never written, and which there is therefore none of."""

    def rows(dtype: torch.dtype) -> torch.Tensor:
        stride = 2**31 + 8
        flat = torch.empty(2 * stride, dtype=dtype)
        return flat.as_strided((2, 24), (stride, 1)).copy_(torch.randn(2, 24))

    input, residual, grad_output, grad_sum = rows(BF16), rows(F32), rows(BF16), rows(F32)
    columns, seed = torch.randn(24), torch.tensor(SEED)
    mask = (None, columns, seed, 20_000, None)

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        input, residual, grad_output, grad_sum = tensors
        output, total, statistics = dropout_add_layer_norm_fwd(
            *(input, residual, 1, columns, columns, *mask, 1e-5, False, True)
        )
        gradients = dropout_add_layer_norm_bwd(
            *(grad_output, grad_sum, total, input, 1, statistics, columns, columns, *mask),
            *(DTYPES.index(BF16), (True,) * 5),
        )
        return [output, total, statistics, *gradients]

    far = (input, residual, grad_output, grad_sum)
    for one, other in zip(call(*far), call(*(each.contiguous() for each in far)), strict=True):
        assert torch.equal(one, other)
