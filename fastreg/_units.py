"""What dropout drops at once, and where the units lie in memory. Pure functions of sizes and strides.

A unit is an element, a channel of a sample, a sample, or the whole batch. csrc/units.h sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ELEMENT, CHANNEL, SAMPLE, BATCH = range(4)

HALF_LANES = 1 << 16
"""The thresholds of elements are out of so many."""
LANES = 1 << 32
"""The thresholds of all other units are out of so many."""


def lanes(unit: int) -> int:
    """What a threshold for units of this kind is out of."""
    return HALF_LANES if unit == ELEMENT else LANES


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements of ``tensor`` fill a stretch of memory, in whatever order."""
    return tensor.is_contiguous() or dense_order(tensor.shape, tensor.stride()) is not None


def dense_order(shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The dimensions from the outermost to the innermost in memory; None where there are gaps or overlaps."""
    order = sorted(range(len(shape)), key=lambda dimension: (strides[dimension], shape[dimension]))
    expected = 1
    for dimension in order:
        if shape[dimension] != 1:
            if strides[dimension] != expected:
                return None
            expected *= shape[dimension]
    return order[::-1]


@dataclass(frozen=True)
class Geometry:
    """Which unit a position in memory belongs to: ``position // elements * columns + position % columns``.

    Attributes:
        elements: adjacent positions after which the unit's index goes on by ``columns``.
        columns: units that take turns within these positions, or 1.
    """

    elements: int
    columns: int


def geometry(tensor: torch.Tensor, unit: int) -> Geometry:
    """Where the channels, samples or the batch of a tensor lie that is contiguous or, of channels, channels_last."""
    shape = tensor.shape
    if unit == BATCH:
        return Geometry(max(tensor.numel(), 1), 1)
    per_sample = max(math.prod(shape[1:]), 1)
    if unit == SAMPLE:
        return Geometry(per_sample, 1)
    channels = shape[1]
    if tensor.is_contiguous() or channels == 1:
        return Geometry(max(math.prod(shape[2:]), 1), 1)
    return Geometry(per_sample, channels)
