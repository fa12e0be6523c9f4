"""DropBlock: operators, autograd, and what the public functions share.

One operator grows the mask from the random stream alone, as bits, and counts what is kept; another applies it. Backward
grows the mask again from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastreg import _library, _units
from fastreg.backends.reference import drop_block as formula
from fastreg.ops import _drop_block_rate, _mask, _norm
from fastreg.ops._dropout import check_dtype
from fastreg.ops._layout import dense_channels, laid_out_as

# --- operators -------------------------------------------------------------------------------------------


def _fake_mask(
    seed: torch.Tensor,
    shape: Sequence[int],
    block_size: Sequence[int],
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    anywhere: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    bits = seed.new_empty((*shape[:-1], (shape[-1] + 7) // 8), dtype=torch.uint8)
    return bits, seed.new_empty((shape[0],))


def _fake_apply(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return input.new_empty_strided(input.shape, input.stride())


def _fake_inplace(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> None:
    return None


drop_block_mask = _library.define(
    "drop_block",
    "drop_block_mask",
    "(Tensor seed, int[] shape, int[] block_size, int threshold, Tensor? dynamic_threshold, bool "
    "anywhere) -> (Tensor, Tensor)",
    _fake_mask,
)
drop_block_apply = _library.define(
    "drop_block", "drop_block_apply", "(Tensor input, Tensor bits, Tensor scale) -> Tensor", _fake_apply
)
drop_block_inplace = _library.define(
    "drop_block", "drop_block_inplace", "(Tensor(a!) input, Tensor bits, Tensor scale) -> ()", _fake_inplace
)


# --- autograd --------------------------------------------------------------------------------------------


class DropBlockFunction(torch.autograd.Function):
    """Autograd of DropBlock; saves the seed and the scales, never the mask or the input."""

    # The context is set up inside forward, as in LayerNormFunction, and for the same reason.

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        seed: torch.Tensor,
        shape: tuple[int, ...],
        block: tuple[int, ...],
        threshold: int,
        dynamic_threshold: torch.Tensor | None,
        anywhere: bool,
        rescale: str | None,
        expected: float | torch.Tensor,
        inplace: bool,
    ) -> Any:
        bits, counts = drop_block_mask(seed, shape, block, threshold, dynamic_threshold, anywhere)
        scale = scale_of(counts, shape, rescale, expected)
        ctx.save_for_backward(seed, dynamic_threshold, scale)
        ctx.mask = shape, block, threshold, anywhere
        ctx.strides = input.stride()
        ctx.run_mask, ctx.run_apply = drop_block_mask.route(seed), drop_block_apply.route(input)
        if inplace:
            ctx.mark_dirty(input)
            drop_block_inplace(input, bits, scale)
            return input
        return drop_block_apply(input, bits, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        seed, dynamic_threshold, scale = ctx.saved_tensors
        shape, block, threshold, anywhere = ctx.mask
        bits, _ = ctx.run_mask(seed, shape, block, threshold, dynamic_threshold, anywhere)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Double backward: in torch operations that reach back to the gradient.
            grad_input = formula.drop_block_apply(grads[0], bits, scale)
        else:
            grad_input = ctx.run_apply(laid_out_as(grads[0], ctx.strides), bits, scale)
        return grad_input, *(None,) * 9


_apply = _norm.direct_apply(DropBlockFunction)


def scale_of(
    counts: torch.Tensor, shape: Sequence[int], rescale: str | None, expected: float | torch.Tensor
) -> torch.Tensor:
    """What is kept is multiplied by this: fp64, one for the batch or one for each sample; 0 where nothing is kept."""
    if rescale in ("batch", "sample"):
        if rescale == "batch":
            counts = counts.sum(dim=0, keepdim=True)
        places = 1
        for size in shape[0 if rescale == "batch" else 1 :]:
            places *= size
        return torch.where(counts > 0, places / counts.clamp(min=1).double(), 0.0)
    if rescale is None:
        expected = 1.0
    if isinstance(expected, torch.Tensor):
        return torch.where(expected > 0, 1.0 / expected, 0.0).reshape(1)
    scale = 1.0 / expected if expected > 0 else 0.0
    return torch.full((1,), scale, dtype=torch.float64, device=counts.device)


# --- what the public functions share ---------------------------------------------------------------------

_GAMMAS = ("paper", "exact")
_SEEDS = ("valid", "anywhere")
_RESCALES = ("batch", "sample", "expected", None)


def _check_options(
    op: str, p: object, device: torch.device, gamma: str, seeds: str, rescale: str | None
) -> None:
    _mask.check_rate(op, p, device)
    for name, given, known in (
        ("gamma", gamma, _GAMMAS),
        ("seeds", seeds, _SEEDS),
        ("rescale", rescale, _RESCALES),
    ):
        if given not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, but got {given!r}")


def _block(op: str, block_size: int | Sequence[int], spatial: tuple[int, ...]) -> tuple[int, ...]:
    """The block of each dimension, no larger than the map."""
    if isinstance(block_size, int):
        if block_size < 1:
            raise ValueError(f"{op}: block_size must be at least 1, but got {block_size}")
        return (min(block_size, *spatial),) * len(spatial)
    sizes = tuple(block_size)
    if len(sizes) != len(spatial) or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(
            f"{op}: block_size must be a number of at least 1, or {len(spatial)} of them, but got {block_size!r}"
        )
    return tuple(min(size, extent) for size, extent in zip(sizes, spatial, strict=True))


# The table of a rate that only the device knows is made once, and is no part of a compiled graph.
_rate = _library.define_for_tracing(
    "drop_block_rate",
    "(Tensor p, bool exact, int[] spatial, int[] block_size, bool anywhere) -> Tensor",
    lambda p, exact, spatial, block, anywhere: _drop_block_rate.interpolate(
        _drop_block_rate.tables(exact, tuple(spatial), tuple(block), anywhere, p.device), p
    ),
    lambda p, exact, spatial, block, anywhere: p.new_empty(2, dtype=torch.float64),
)


def _threshold_and_share(
    p: float, exact: bool, spatial: tuple[int, ...], block: tuple[int, ...], anywhere: bool
) -> tuple[int, float]:
    """The threshold that stands for a rate, and the expected share of kept positions."""
    gamma = _drop_block_rate.gamma_of(p, exact, spatial, block, anywhere)
    threshold = _mask.threshold(gamma, _units.LANES)
    return threshold, 1.0 - _drop_block_rate.dropped_share(threshold / _units.LANES, spatial, block, anywhere)


# What follows from numbers alone is a constant to a compiler. This is what torch.compiler.assume_constant_result does,
# which imports the compiler first.
_threshold_and_share._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _thresholds(
    p: float | torch.Tensor, exact: bool, spatial: tuple[int, ...], block: tuple[int, ...], anywhere: bool
) -> tuple[int, torch.Tensor | None, float | torch.Tensor]:
    """The two thresholds, one of which stands for the rate, and the expected share of kept positions."""
    if isinstance(p, torch.Tensor):
        gamma, kept = _rate(p.detach(), exact, spatial, block, anywhere)
        return 0, _mask.dynamic_threshold(gamma, _units.LANES), kept
    threshold, kept_share = _threshold_and_share(float(p), exact, spatial, block, anywhere)
    return threshold, None, kept_share


def run(
    op: str,
    input: torch.Tensor,
    p: float | torch.Tensor,
    block_size: int | Sequence[int],
    inplace: bool,
    training: bool,
    gamma: str,
    seeds: str,
    shared: bool,
    rescale: str | None,
    seed: int | torch.Tensor | None,
    generator: torch.Generator | None,
    dimensions: int,
) -> torch.Tensor:
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"{op}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    _check_options(op, p, input.device, gamma, seeds, rescale)
    if input.dim() != dimensions:
        raise ValueError(f"input should be {dimensions} dimensional. Got {input.dim()} dimensions.")
    spatial = tuple(int(size) for size in input.shape[2:])
    if input.numel() == 0:
        _block(op, block_size, (1,) * len(spatial))
        return input
    block = _block(op, block_size, spatial)
    if not training or (not isinstance(p, torch.Tensor) and p == 0.0):
        return input
    check_dtype(op, input)
    if inplace and input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        # An autograd.Function raises this too, but only after it has written into the leaf.
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    anywhere = seeds == "anywhere"
    threshold, dynamic_threshold, expected = _thresholds(p, gamma == "exact", spatial, block, anywhere)
    seed_tensor = _mask.seed_on(op, input.device, seed, generator)
    given, input = input, dense_channels(input)
    shape = (int(input.shape[0]), 1 if shared else int(input.shape[1]), *spatial)
    arguments = (shape, block, threshold, dynamic_threshold, anywhere)
    writes = inplace and input is given
    if _norm.transformed():
        kept = formula.keep(seed_tensor, *arguments)
        scale = scale_of(kept.flatten(1).sum(dim=1), shape, rescale, expected)
        output = formula.apply(input, kept, scale)
        writes = False
    elif not _norm.recorded(input):
        bits, counts = drop_block_mask(seed_tensor, *arguments)
        scale = scale_of(counts, shape, rescale, expected)
        if writes:
            drop_block_inplace(input, bits, scale)
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(input)
            return input
        output = drop_block_apply(input, bits, scale)
    else:
        apply = DropBlockFunction.apply if torch.compiler.is_compiling() else _apply
        output = apply(input, seed_tensor, *arguments, rescale, expected, writes)
    return given.copy_(output) if inplace and not writes else output


def mask_alone(
    op: str,
    shape: Sequence[int],
    p: float | torch.Tensor,
    block_size: int | Sequence[int],
    gamma: str,
    seeds: str,
    shared: bool,
    dtype: torch.dtype,
    packed: bool,
    device: torch.device | str | None,
    seed: int | torch.Tensor | None,
    generator: torch.Generator | None,
    dimensions: int,
) -> torch.Tensor:
    if device is None:
        given = next((each.device for each in (p, seed) if isinstance(each, torch.Tensor)), None)
        device = given or torch.get_default_device()
    device = torch.empty(0, device=device).device
    _check_options(op, p, device, gamma, seeds, None)
    sizes = tuple(int(size) for size in shape)
    if len(sizes) != dimensions or min(sizes) < 0:
        raise ValueError(f"{op}: expected a shape of {dimensions} sizes, but got {tuple(shape)}")
    sizes = (sizes[0], 1 if shared else sizes[1], *sizes[2:])
    if min(sizes) == 0:
        shape_of_bits = (*sizes[:-1], -(-sizes[-1] // 8))
        return torch.empty(
            shape_of_bits if packed else sizes, dtype=torch.uint8 if packed else dtype, device=device
        )
    block = _block(op, block_size, sizes[2:])
    anywhere = seeds == "anywhere"
    threshold, dynamic_threshold, _ = _thresholds(p, gamma == "exact", sizes[2:], block, anywhere)
    seed_tensor = _mask.seed_on(op, device, seed, generator)
    bits, _ = drop_block_mask(seed_tensor, sizes, block, threshold, dynamic_threshold, anywhere)
    return bits if packed else formula.unpack(bits, sizes[-1]).to(dtype)
