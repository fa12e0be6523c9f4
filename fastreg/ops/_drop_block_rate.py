"""From DropBlock's rate to the probability of a seed, and to the share of positions that is dropped then.

Pure functions of sizes. A position that ``n`` seeds could cover is dropped with probability ``1 - (1 - gamma)**n``, so
the expected share is a sum over the numbers of positions for each ``n``, and the gamma for a rate is its inverse.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch

_STEPS = 4096
_BISECTIONS = 64


def seed_places(spatial: Sequence[int], block: Sequence[int], anywhere: bool) -> tuple[int, ...]:
    """The places a seed may have in each dimension."""
    return tuple(size if anywhere else size - length + 1 for size, length in zip(spatial, block, strict=True))


def coverage(size: int, block: int, anywhere: bool) -> list[int]:
    """How many places of a seed cover each position of a dimension."""
    before = block // 2 if anywhere else 0
    places = size if anywhere else size - block + 1
    # Place i covers the positions from i - before to i - before + block - 1.
    return [
        min(places - 1, position + before) - max(0, position + before - block + 1) + 1
        for position in range(size)
    ]


@lru_cache(maxsize=256)
def covering_numbers(
    spatial: tuple[int, ...], block: tuple[int, ...], anywhere: bool
) -> tuple[tuple[int, int], ...]:
    """Pairs of the number of seed places that cover a position, and the number of positions where it is that."""
    numbers = Counter({1: 1})
    for size, length in zip(spatial, block, strict=True):
        along = Counter(coverage(size, length, anywhere))
        combined: Counter[int] = Counter()
        for number, positions in numbers.items():
            for other, others in along.items():
                combined[number * other] += positions * others
        numbers = combined
    return tuple(sorted(numbers.items()))


def dropped_share(gamma: float, spatial: tuple[int, ...], block: tuple[int, ...], anywhere: bool) -> float:
    """The expected share of positions that are dropped."""
    if gamma >= 1.0:
        return 1.0
    kept = math.log1p(-gamma)
    numbers = covering_numbers(spatial, block, anywhere)
    return sum(-math.expm1(number * kept) * positions for number, positions in numbers) / math.prod(spatial)


def paper_factor(spatial: tuple[int, ...], block: tuple[int, ...]) -> float:
    """The paper's gamma for a rate of 1: as if blocks never overlapped."""
    return math.prod(spatial) / (math.prod(block) * math.prod(seed_places(spatial, block, anywhere=False)))


@lru_cache(maxsize=1024)
def gamma_of(
    p: float, exact: bool, spatial: tuple[int, ...], block: tuple[int, ...], anywhere: bool
) -> float:
    """The probability of a seed: the paper's, or the one for which the expected share of dropped positions is ``p``."""
    if not exact:
        return min(1.0, p * paper_factor(spatial, block))
    if p in (0.0, 1.0):
        return p
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if dropped_share(middle, spatial, block, anywhere) > p else (middle, high)
    return (low + high) / 2


@lru_cache(maxsize=64)
def tables(
    exact: bool, spatial: tuple[int, ...], block: tuple[int, ...], anywhere: bool, device: torch.device
) -> torch.Tensor:
    """gamma and the expected share of kept positions for rates 0, 1/4096, ..., 1: a (2, 4097) fp64 tensor.

    For rates that only the device knows: what lies between is interpolated, which misses a share by 1e-6 at most where
    it is below 0.99, and by less than 1/4096 anywhere.
    """
    rates = torch.linspace(0.0, 1.0, _STEPS + 1, dtype=torch.float64)
    pairs = torch.tensor(covering_numbers(spatial, block, anywhere), dtype=torch.float64)
    numbers, shares = pairs[:, 0], pairs[:, 1] / math.prod(spatial)

    def kept(gamma: torch.Tensor) -> torch.Tensor:
        return ((1.0 - gamma)[:, None] ** numbers) @ shares

    gamma = (rates * paper_factor(spatial, block)).clamp(max=1.0)
    if exact:
        low, high = torch.zeros_like(rates), torch.ones_like(rates)
        for _ in range(_BISECTIONS):
            gamma = (low + high) / 2
            above = 1.0 - kept(gamma) > rates
            low, high = torch.where(above, low, gamma), torch.where(above, gamma, high)
        gamma = (low + high) / 2
        gamma[0], gamma[-1] = 0.0, 1.0
    return torch.stack((gamma, kept(gamma))).to(device)


def interpolate(table: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """gamma and the expected share of kept positions, two fp64 numbers on the device, for a rate that it knows."""
    place = p.detach().reshape(1).double().nan_to_num(0.0).clamp(0.0, 1.0) * _STEPS
    below = place.floor().clamp(max=_STEPS - 1)
    # Not table[:, index], which waits for the device.
    index = below.to(torch.int64)
    left, right = table.index_select(1, index), table.index_select(1, index + 1)
    return (left + (right - left) * (place - below)).squeeze(1)
