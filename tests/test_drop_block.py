"""DropBlock on the backend under test: covering cases, masks alone, realised rates, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastreg
from backend_under_test import emulated, serves_float64
from drop_blocks import check_drop_block, drop_blocks
from fastreg import functional as F
from masks import keep_blocks
from suite import same_bits


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "drop_block" in metafunc.fixturenames:
        options = metafunc.config.getoption
        chosen = drop_blocks(options("--backend"), options("--device"), options("--dtype"))
        metafunc.parametrize("drop_block", chosen, ids=str)


def test_case(drop_block: Any, device: str) -> None:
    check_drop_block(drop_block, device)


# --- masks ---


@pytest.mark.parametrize("seeds", ["valid", "anywhere"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_mask_alone_is_the_one_that_is_applied(seeds: str, shared: bool, device: str) -> None:
    shape, options = (2, 3, 9, 13), {"seeds": seeds, "shared": shared, "seed": 5}
    mask = F.drop_block_mask2d(shape, 0.3, (2, 5), **options, device=device)
    applied = F.drop_block2d(torch.ones(shape, device=device), 0.3, (2, 5), rescale=None, **options)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1 if shared else 3, 9, 13)
    assert torch.equal(mask.expand(shape), applied != 0)
    assert 0 < mask.sum() < mask.numel()
    for dtype in (torch.float16, torch.uint8, torch.float64):
        as_dtype = F.drop_block_mask2d(shape, 0.3, (2, 5), **options, dtype=dtype, device=device)
        assert torch.equal(as_dtype, mask.to(dtype))
    packed = F.drop_block_mask2d(shape, 0.3, (2, 5), **options, packed=True, device=device)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*mask.shape[:-1], 2)
    for column in range(16):
        bits = (packed[..., column // 8] >> (column % 8)) & 1
        assert torch.equal(
            bits.bool(), mask[..., column] if column < 13 else torch.zeros_like(bits, dtype=torch.bool)
        )


def test_a_mask_of_volumes(device: str) -> None:
    mask = F.drop_block_mask3d((2, 2, 3, 5, 9), 0.4, (2, 3, 4), gamma="exact", seed=3, device=device)
    applied = F.drop_block3d(torch.ones(mask.shape, device=device), 0.4, (2, 3, 4), gamma="exact", seed=3)
    assert torch.equal(mask, applied != 0)


def test_seeds_are_counted_row_major_over_places(device: str) -> None:
    for anywhere in (False, True):
        found = F.drop_block_mask2d(
            (3, 5, 11, 37), 0.35, 4, seeds="anywhere" if anywhere else "valid", seed=2, device=device
        )
        gamma = 0.35 * 11 * 37 / (16 * 8 * 34)
        assert torch.equal(
            found.cpu(), keep_blocks((3, 5, 11, 37), (4, 4), 2, round(gamma * 2**32), anywhere)
        )


@pytest.mark.every_kernel
def test_larger_maps(backend: str, device: str) -> None:
    """More than a tile of every kernel, wider than its words; more rows than stay on chip."""
    long = ((2, 1, 2060, 9), (5, 3))
    for shape, block in (((1, 2, 150, 200), 7), ((1, 1, 9, 600), (3, 90)), ((40, 3, 7, 7), 3), long):
        if emulated(backend, device) and shape[0] == 1:
            shape = (1, 1, *(size // 2 for size in shape[2:]))
        found = F.drop_block_mask2d(shape, 0.5, block, gamma="exact", seed=1, device=device)
        with fastreg.backends.use("reference"):
            expected = F.drop_block_mask2d(shape, 0.5, block, gamma="exact", seed=1, device=device)
        assert torch.equal(found, expected)
        assert not found.all()


# --- values ---


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_is_dropped_is_zero_whatever_it_was(poison: float, dtype: torch.dtype, device: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        input = torch.full((2, 8, 7, 7), poison, dtype=dtype, device=device).contiguous(memory_format=layout)
        kept = F.drop_block_mask2d(input.shape, 0.4, 3, seed=3, device=device)
        output = F.drop_block2d(input, 0.4, 3, seed=3)
        assert (output[~kept] == 0).all()
        assert not output[kept].isfinite().any()
        assert (F.drop_block2d(input, 1.0, 3, gamma="exact", seed=3) == 0).all()


def test_a_rate_of_zero_evaluation_and_nothing(device: str) -> None:
    input = torch.randn(2, 3, 8, 8, device=device)
    assert F.drop_block2d(input, 0.0, 3) is input
    assert F.drop_block2d(input, 0.5, 3, training=False) is input
    for shape in ((0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)):
        empty = torch.empty(shape, device=device)
        assert F.drop_block2d(empty, 0.5, 3).shape == shape
        assert F.drop_block_mask2d(shape, 0.5, 3, device=device).shape == shape


def test_half_precision_counts_more_than_it_can_hold(device: str, backend: str) -> None:
    """A count of 65,504 and more is infinite in float16; a peer's DropBlock then returns zeros only."""
    shape = (2, 3, 112, 112) if emulated(backend, device) else (4, 64, 56, 56)
    input = torch.ones(shape, dtype=torch.float16, device=device)
    output = F.drop_block2d(input, 0.1, 7, seed=1)
    kept = output != 0
    share = kept.double().mean()
    assert 0.5 < share < 0.99
    torch.testing.assert_close(output[kept].double().mean(), 1 / share, rtol=1e-3, atol=0)


def test_scales_of_batch_samples_and_expectation(device: str) -> None:
    input = torch.ones(3, 4, 9, 9, device=device)
    kept = F.drop_block_mask2d(input.shape, 0.4, 3, gamma="exact", seed=2, device=device)
    by_batch = F.drop_block2d(input, 0.4, 3, gamma="exact", seed=2)
    torch.testing.assert_close(by_batch.mean(), torch.ones((), device=device))
    by_sample = F.drop_block2d(input, 0.4, 3, gamma="exact", rescale="sample", seed=2)
    torch.testing.assert_close(by_sample.mean((1, 2, 3)), torch.ones(3, device=device))
    expected = F.drop_block2d(input, 0.4, 3, gamma="exact", rescale="expected", seed=2)
    torch.testing.assert_close(expected, kept / 0.6)


def test_only_seed_and_scale_are_kept_for_backward(device: str) -> None:
    input = torch.randn(2, 8, 16, 16, device=device, requires_grad=True)
    bytes_of: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        bytes_of.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.drop_block2d(input, 0.2, 3)
    assert bytes_of == [8, 8]


def test_second_derivatives(device: str) -> None:
    input = torch.randn(2, 3, 5, 5, device=device, requires_grad=True)
    factor = F.drop_block2d(torch.ones_like(input), 0.4, 2, seed=9).detach()
    output = F.drop_block2d(input, 0.4, 2, seed=9)
    (first,) = torch.autograd.grad(output.pow(3).sum(), input, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    torch.testing.assert_close(second, 6 * factor.pow(3) * input)


# --- arguments ---


def test_arguments_that_do_not_go_together(device: str) -> None:
    input = torch.ones(2, 3, 8, 8, device=device)
    with pytest.raises(TypeError, match="argument 'input'"):
        F.drop_block2d([1.0], 0.5, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input should be 4 dimensional. Got 3 dimensions\."):
        F.drop_block2d(input[0], 0.5, 3)
    with pytest.raises(ValueError, match=r"input should be 5 dimensional. Got 4 dimensions\."):
        F.drop_block3d(input, 0.5, 3)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        F.drop_block2d(input, 1.5, 3)
    for wrong in (0, (3,), (3, 0), (2, 2.5)):
        with pytest.raises(ValueError, match="block_size must be"):
            F.drop_block2d(input, 0.5, wrong)  # type: ignore[arg-type]
    for name, value in (("gamma", "torch"), ("seeds", "valid place"), ("rescale", "mean")):
        with pytest.raises(ValueError, match=f"{name} must be one of .*but got '{value}'"):
            F.drop_block2d(input, 0.5, 3, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a shape of 4 sizes"):
        F.drop_block_mask2d((2, 3, 4), 0.5, 3)
    with pytest.raises(NotImplementedError, match=r"torch\.int64"):
        F.drop_block2d(input.long(), 0.5, 3)
    leaf = input.clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"
    ):
        F.drop_block2d(leaf, 0.5, 3, True)
    assert (leaf == 1).all()


def test_float64_is_served_or_refused_with_the_remedy(backend: str, device: str) -> None:
    input = torch.randn(2, 3, 5, 5, dtype=torch.float64, device=device)
    if serves_float64(backend, device):
        kept = F.drop_block_mask2d(input.shape, 0.5, 3, seed=2, device=device)
        assert torch.equal(F.drop_block2d(input, 0.5, 3, rescale=None, seed=2), torch.where(kept, input, 0.0))
    else:
        with pytest.raises(RuntimeError, match=f"{backend}.*float64"):
            F.drop_block2d(input, 0.5, 3, seed=2)


# --- modules ---


def test_modules_and_their_schedule(device: str) -> None:
    layer = fastreg.nn.DropBlock2d(0.2, 3, gamma="exact", rescale="expected")
    input = torch.ones(2, 3, 8, 8, device=device)
    torch.manual_seed(1)
    output = layer(input)
    torch.manual_seed(1)
    assert same_bits(output, F.drop_block2d(input, 0.2, 3, gamma="exact", rescale="expected"))
    assert layer.eval()(input) is input
    volumes = fastreg.nn.DropBlock3d(0.2, 2).to(device)
    assert volumes(torch.ones(2, 3, 4, 4, 4, device=device)).shape == (2, 3, 4, 4, 4)
    assert "block_size=3" in repr(layer)

    model = torch.nn.Sequential(layer.train(), torch.nn.Conv2d(3, 4, 1), fastreg.nn.Dropout(0.7)).to(device)
    schedule = fastreg.nn.LinearSchedule(model, 0.0, 0.5, steps=4)
    assert torch.equal(layer(input), input)
    rates = []
    for _ in range(6):
        schedule.step()
        rates.append((layer.p.item(), model[2].p.item()))
    assert rates == [(rate, rate) for rate in (0.125, 0.25, 0.375, 0.5, 0.5, 0.5)]
    assert not torch.equal(layer(input), input)
    other = fastreg.nn.LinearSchedule(fastreg.nn.DropBlock2d(0.0, 3), 0.0, 0.5, steps=4)
    other.load_state_dict({"step_count": 3})
    assert other.layers[0].p.item() == 0.375
    # A rate is no activation: the model's dtype is not its own.
    assert model.half()[0].p.dtype == torch.float64
    assert model.state_dict().keys() == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match="no layer of fastreg's dropout family"):
        fastreg.nn.LinearSchedule(torch.nn.Linear(2, 2), 0.0, 0.5, 3)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fastreg.nn.LinearSchedule(layer, 0.0, 0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fastreg.nn.LinearSchedule(layer, 0.0, 1.5, 3)
