"""One mistake a class, in dropout or DropBlock. ``symptom`` is a pattern of the rejection that it has to provoke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fastreg.backends.reference import _philox
from mutants.right_dropout import CHANNEL, Optional, RightDropout


class Mutant(RightDropout):
    symptom: ClassVar[str] = "output: .* off"
    of: ClassVar[str] = "dropout"


# --- the stream ---


class HighHalfFirst(Mutant):
    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        lanes = super().half_lanes(seed, count + count % 2)
        return lanes.reshape(-1, 2).flip(1).reshape(-1)[:count]


class OneLaneForTwoElements(Mutant):
    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return super().half_lanes(seed, count)[torch.arange(count) // 2 * 2]


class WordsOfTheBlockReversed(Mutant):
    def lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        blocks = super().lanes(seed, -(-count // 4) * 4).reshape(-1, 4)
        return blocks.flip(1).reshape(-1)[:count]


class LowHalfOfTheSeed(Mutant):
    """Seeds of 64 bits that differ in the upper half only give the same mask."""

    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return super().half_lanes(seed & 0xFFFFFFFF, count)


class WideLanesForElements(Mutant):
    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return _philox.lanes(seed, count) >> 16


class HalfLanesForUnits(Mutant):
    def lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return _philox.half_lanes(seed, count) << 16


class MaskRepeatsEveryFewRows(Mutant):
    """A peer's: the counter wraps after 32 rows."""

    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return super().half_lanes(seed, min(count, 1024))[torch.arange(count) % 1024]


class KeepsBelowTheThreshold(Mutant):
    def kept(self, lanes: torch.Tensor, limit: int) -> torch.Tensor:
        return lanes < limit


class ComparesSigned(Mutant):
    """16 bits as a signed number: half of the lanes are below every threshold."""

    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        lanes = super().half_lanes(seed, count)
        return torch.where(lanes >= 2**15, lanes - 2**16, lanes)


class WrapsAtTheLargestThreshold(Mutant):
    """2^32 in 32 bits is 0: a rate of 1 drops nothing."""

    def kept(self, lanes: torch.Tensor, limit: int) -> torch.Tensor:
        return super().kept(lanes, limit % 2**32)


# --- units ---


class RowMajorInEveryLayout(Mutant):
    """Positions of elements by their indices, not by where they lie."""

    def positions(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.arange(tensor.numel()).reshape(tensor.shape)


class ChannelsOfAllSamplesAlike(Mutant):
    def units(self, shape: Sequence[int], unit: int) -> torch.Tensor:
        units = super().units(shape, unit)
        return units % shape[1] if unit == CHANNEL else units


class SamplesInsideChannels(Mutant):
    def units(self, shape: Sequence[int], unit: int) -> torch.Tensor:
        if unit != CHANNEL:
            return super().units(shape, unit)
        index = torch.arange(shape[0] * shape[1]).reshape(shape[1], shape[0]).T
        return index.reshape(shape[0], shape[1], *(1,) * (len(shape) - 2)).expand(tuple(shape))


class EverySampleForTheBatch(Mutant):
    def units(self, shape: Sequence[int], unit: int) -> torch.Tensor:
        return super().units(shape, 2 if unit == 3 else unit)


# --- scales ---


class ScaleOfTheRateNotOfTheThreshold(Mutant):
    """1 / (1 - p) with p as given: off by 6e-6 where 16 bits hold it roughly."""

    symptom = "off"

    def scale(self, limit: int, lanes: int) -> float:
        return 1 / (1 - round(limit / lanes, 4)) if limit < lanes else 0.0


class ScalesTwice(Mutant):
    def scale(self, limit: int, lanes: int) -> float:
        return super().scale(limit, lanes) ** 2


class RescalesAlways(Mutant):
    """Also where scale_by_keep is false."""

    def branch(self, tensor, rows, layers, seed, limit, unit, rescale):  # type: ignore[no-untyped-def]
        return super().branch(tensor, rows, layers, seed, limit, unit, True)


class IgnoresTheDynamicThreshold(Mutant):
    def limit(self, threshold: int, dynamic: Optional) -> int:
        return threshold


class RowScaleOfTheFirstRow(Mutant):
    def row_scales(self, rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return super().row_scales(rows[:1].expand_as(rows), tensor)


class ScalesTheResidual(Mutant):
    def add(self, total: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return total + 2 * self.load(residual)


# --- stores and sums ---


class RoundsTheBranchFirst(Mutant):
    """To half precision, before the residual is added: two roundings."""

    def add(self, total: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return total.to(torch.bfloat16).to(total.dtype) + self.load(residual)


class TruncatingStore(Mutant):
    symptom = "off|leans"

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype != torch.bfloat16:
            return super().store(values, dtype)
        return (values.view(torch.int32) & -65536).view(torch.float32).to(dtype)


class ContiguousOutput(Mutant):
    symptom = "strides"

    def laid_out(self, result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return result.contiguous()


# --- backward ---


class BackwardDrawsAnew(Mutant):
    symptom = "grad_input: .* off"

    def backward_seed(self, seed: Optional) -> Optional:
        return None if seed is None else seed + 1


class GradientWithoutLayerScale(Mutant):
    symptom = "grad_input: .* off"

    def backward_layers(self, layers: Optional) -> Optional:
        return None


class LayerScaleGradientOfTheLastRow(Mutant):
    symptom = "grad_layer_scale: .* off"

    def column_sums(self, products: torch.Tensor) -> torch.Tensor:
        return products[-1]


class LayerScaleGradientInHalfPrecision(Mutant):
    symptom = "grad_layer_scale: .* off"

    def column_sums(self, products: torch.Tensor) -> torch.Tensor:
        return products.to(torch.bfloat16).sum(0).to(products.dtype)


# --- DropBlock ---


class BlockMutant(Mutant):
    of: ClassVar[str] = "drop_block"


class BlocksOneShort(BlockMutant):
    def reach(self, length: int) -> int:
        return max(length - 1, 1)


class BlocksOneLong(BlockMutant):
    def reach(self, length: int) -> int:
        return length + 1


class EvenBlocksShifted(BlockMutant):
    """(b - 1) // 2 instead of b // 2 before the seed."""

    def before(self, length: int, anywhere: bool) -> int:
        return (length - 1) // 2 if anywhere else 0


class CentredInTheValidRegion(BlockMutant):
    """A valid seed is a block's first corner; this one takes it for its centre."""

    def before(self, length: int, anywhere: bool) -> int:
        return length // 2


class ValidSeedsOnly(BlockMutant):
    """Also where they may be anywhere."""

    def places(self, size: int, length: int, anywhere: bool) -> int:
        return size - length + 1

    def before(self, length: int, anywhere: bool) -> int:
        return 0


class OneMaskForAllChannels(BlockMutant):
    def keep_blocks(self, seed, shape, block, limit, anywhere):  # type: ignore[no-untyped-def]
        one = super().keep_blocks(seed, (shape[0], 1, *shape[2:]), block, limit, anywhere)
        return one.expand(tuple(shape)).clone()


class CountsOfHalfPrecision(BlockMutant):
    """Infinite from 65,504 on; here already 2048 is the last odd number."""

    def counts(self, keep: torch.Tensor) -> torch.Tensor:
        return (keep.flatten(1).sum(1) // 16 * 16).to(torch.int64)


class CountsWhatIsDropped(BlockMutant):
    def counts(self, keep: torch.Tensor) -> torch.Tensor:
        return (~keep).flatten(1).sum(1)


class ScaleInHalfPrecision(BlockMutant):
    def load_scale(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (
            super()
            .load_scale(scale, dtype)
            .to(dtype)
            .to(torch.float64 if dtype == torch.float64 else torch.float32)
        )


class SeedsAboveTheThreshold(BlockMutant):
    def kept(self, lanes: torch.Tensor, limit: int) -> torch.Tensor:
        return lanes < 2**32 - limit if limit else lanes >= 0


class BlockStoreTruncates(BlockMutant, TruncatingStore):
    """Its symptom is that of dropout's."""


class BlockOutputContiguous(BlockMutant, ContiguousOutput):
    """Its symptom is that of dropout's."""


MUTANTS: tuple[type[Mutant], ...] = tuple(
    each
    for each in globals().values()
    if isinstance(each, type) and issubclass(each, Mutant) and each not in (Mutant, BlockMutant)
)
