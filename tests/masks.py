"""The masks that every backend must draw: Philox4x32-10 on Python's integers, one unit after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from fastreg.backends.reference import _philox

# More lanes than this come from the reference's stream, which fewer are held against.
MANY = 10_000

_WORD = 2**32 - 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Ten rounds, as published."""
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (right >> 32) ^ counter[1] ^ key[0],
            right & _WORD,
            (left >> 32) ^ counter[3] ^ key[1],
            left & _WORD,
        )
        key = ((key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD)
    return counter


@lru_cache(maxsize=65536)
def block(seed: int, index: int) -> tuple[int, int, int, int]:
    """The four words of a block of the stream."""
    return philox((seed & _WORD, seed >> 32 & _WORD), (index & _WORD, index >> 32, 0, 0))


def half_lane(seed: int, unit: int) -> int:
    """The 16-bit lane of an element."""
    word = block(seed, unit // 8)[unit % 8 // 2]
    return word >> 16 if unit % 2 else word & 0xFFFF


def lane(seed: int, unit: int) -> int:
    """The 32-bit lane of any other unit."""
    return block(seed, unit // 4)[unit % 4]


def scale(threshold: int, lanes: int) -> float:
    """What is kept is multiplied by this."""
    return lanes / (lanes - threshold) if threshold < lanes else 0.0


def positions(tensor: torch.Tensor) -> torch.Tensor:
    """The index of every element: its place in memory if the tensor is dense, else its row-major place."""
    row_major = torch.arange(tensor.numel()).reshape(tensor.shape)
    if tensor.is_contiguous():
        return row_major
    offsets = sorted(
        sum(index * stride for index, stride in zip(place, tensor.stride(), strict=True))
        for place in itertools.product(*map(range, tensor.shape))
    )
    if offsets != list(range(tensor.numel())):
        return row_major
    return torch.arange(tensor.numel()).as_strided(tensor.shape, tensor.stride())


def keep_elements(tensor: torch.Tensor, seed: int, threshold: int) -> torch.Tensor:
    """Which elements are kept, one lane each."""
    if tensor.numel() > MANY:
        lanes = _philox.half_lanes(torch.tensor(seed), tensor.numel())
    else:
        lanes = torch.tensor([half_lane(seed, unit) for unit in range(tensor.numel())], dtype=torch.int64)
    kept = lanes >= threshold
    return kept[positions(tensor)] if tensor.numel() else kept.reshape(tensor.shape)


def keep_units(shape: Sequence[int], leading: int, seed: int, threshold: int) -> torch.Tensor:
    """Which elements are kept where all that share the first ``leading`` indices are one unit."""
    units = math.prod(shape[:leading])
    kept = torch.tensor([lane(seed, unit) >= threshold for unit in range(units)], dtype=torch.bool)
    return kept.reshape(*shape[:leading], *(1,) * (len(shape) - leading)).expand(tuple(shape))


def keep_blocks(
    shape: Sequence[int], block_size: Sequence[int], seed: int, threshold: int, anywhere: bool
) -> torch.Tensor:
    """Which positions of (N, C, *spatial) no block covers: each seed's block is cleared by itself."""
    kept = torch.ones(tuple(shape), dtype=torch.bool)
    spatial = shape[2:]
    places = [
        size if anywhere else size - length + 1 for size, length in zip(spatial, block_size, strict=True)
    ]
    for unit, place in enumerate(itertools.product(range(shape[0]), range(shape[1]), *map(range, places))):
        if lane(seed, unit) < threshold:
            first = [
                at - (length // 2 if anywhere else 0)
                for at, length in zip(place[2:], block_size, strict=True)
            ]
            window = [slice(max(at, 0), at + length) for at, length in zip(first, block_size, strict=True)]
            kept[(place[0], place[1], *window)] = False
    return kept
