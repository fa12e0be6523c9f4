"""DropBlock in plain PyTorch: blocks grown from seeds with a maximum over windows, kept as one bit a position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastreg.backends.reference import _philox
from fastreg.backends.reference._views import accumulate_dtype, laid_out_like, wide


def drop_block_mask(
    seed: torch.Tensor,
    shape: Sequence[int],
    block_size: Sequence[int],
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    anywhere: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of the positions that no block covers, and how many of them each sample has."""
    kept = keep(seed, shape, block_size, threshold, dynamic_threshold, anywhere)
    return pack(kept), kept.flatten(1).sum(dim=1)


def keep(
    seed: torch.Tensor,
    shape: Sequence[int],
    block_size: Sequence[int],
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    anywhere: bool,
) -> torch.Tensor:
    """Which positions no block covers, as booleans of that shape."""
    spatial = shape[2:]
    if math.prod(shape) == 0:
        return torch.ones(tuple(shape), dtype=torch.bool, device=seed.device)
    places = (
        spatial if anywhere else [size - block + 1 for size, block in zip(spatial, block_size, strict=True)]
    )
    limit = threshold if dynamic_threshold is None else dynamic_threshold.reshape(())
    seeds = _philox.lanes(seed, math.prod(shape[:2]) * math.prod(places)) < limit
    # Position x of a dimension is covered by the seeds from x + before - block + 1 to x + before.
    padding: list[int] = []
    for block in reversed(block_size):
        before = block // 2 if anywhere else 0
        padding += [block - 1 - before, before] if anywhere else [block - 1, block - 1]
    planes = seeds.reshape(-1, *places).to(torch.float32)
    padded = torch.nn.functional.pad(planes, padding)
    for dimension, block in enumerate(block_size, start=1):
        padded = padded.unfold(dimension, block, 1).amax(dim=-1)
    return (padded == 0).reshape(tuple(shape))


def pack(kept: torch.Tensor) -> torch.Tensor:
    """One bit a position: bit w % 8 of byte w // 8 of a row; the bits beyond the row are 0."""
    width = kept.shape[-1]
    row_bytes = -(-width // 8)
    padded = torch.nn.functional.pad(kept, (0, 8 * row_bytes - width))
    weights = 2 ** torch.arange(8, device=kept.device)
    octets = padded.reshape(*kept.shape[:-1], row_bytes, 8)
    return (octets * weights).sum(dim=-1).to(torch.uint8)


def unpack(bits: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of ``pack``."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> places) & 1).bool().flatten(-2)[..., :width]


def drop_block_apply(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The input where its bit is set, times the scale of the batch or of its sample; 0 elsewhere."""
    return laid_out_like(apply(input, unpack(bits, input.shape[-1]), scale), input)


def apply(input: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same of booleans."""
    factor = scale.to(accumulate_dtype(input.dtype)).reshape(-1, *(1,) * (input.dim() - 1))
    return torch.where(kept, wide(input) * factor, 0.0).to(input.dtype)


def drop_block_inplace(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> None:
    """``drop_block_apply`` into the input."""
    input.copy_(drop_block_apply(input, bits, scale))
