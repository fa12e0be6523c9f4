"""One mistake a class. ``symptom`` is a pattern of the rejection that the mistake has to provoke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from mutants.right import Optional, RightNorm

HALVES = (torch.float16, torch.bfloat16)


class Mutant(RightNorm):
    symptom: ClassVar[str] = "output: .* off"
    ops: ClassVar[tuple[str, ...]] = ("layer_norm", "rms_norm")


# --- statistics ---


class OnePassVariance(Mutant):
    """E[x^2] - E[x]^2: cancels where the mean is far from zero."""

    ops = ("layer_norm",)

    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return (rows.square().mean(1, keepdim=True) - mean.square()).clamp_min(0)


class UnbiasedVariance(Mutant):
    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return (rows - mean).square().sum(1, keepdim=True) / max(rows.shape[1] - 1, 1)


class EpsOutsideTheRoot(Mutant):
    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return 1 / (variance.sqrt() + eps)


class NoEps(Mutant):
    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return variance.clamp_min(1e-30).rsqrt()


class CoarseReciprocalRoot(Mutant):
    """A hardware estimate with 14 good bits, without the Newton step."""

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        exact = (variance + eps).rsqrt()
        return (
            exact.to(torch.float32).view(torch.int32).bitwise_and(~0x1FF).view(torch.float32).to(exact.dtype)
        )


class PaddedLanesInVariance(Mutant):
    """Masked lanes hold 0, and 0 - mean is squared with the rest."""

    ops = ("layer_norm",)

    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        columns = rows.shape[1]
        padding = (1 << (columns - 1).bit_length()) - columns
        return ((rows - mean).square().sum(1, keepdim=True) + padding * mean.square()) / columns


class MeanOverPaddedWidth(Mutant):
    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return (rows - mean).square().sum(1, keepdim=True) / (1 << (rows.shape[1] - 1).bit_length())


class StatisticsOfAlignedColumns(Mutant):
    """The tail behind the last full vector of eight is left out of the statistics."""

    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        full = rows.shape[1] // 8 * 8 or rows.shape[1]
        return (rows - mean)[:, :full].square().mean(1, keepdim=True)


class Bfloat16Statistics(Mutant):
    symptom = "rstd: .* off"

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor, input_dtype: torch.dtype) -> torch.Tensor:
        return super().saved(mean.bfloat16().to(mean.dtype), rstd.bfloat16().to(rstd.dtype), input_dtype)


class StatisticsInInputDtype(Mutant):
    symptom = "(mean|rstd): dtype|grad_.*off"

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor, input_dtype: torch.dtype) -> torch.Tensor:
        return super().saved(mean, rstd, input_dtype).to(input_dtype)


class OverflowingSquares(Mutant):
    """The sum of squares in the input's dtype."""

    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return super().variance(rows, mean).to(torch.float16).to(rows.dtype)


class Float32ForFloat64(Mutant):
    def load(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        return super().load(tensor, ndim).float().to(super().load(tensor, ndim).dtype)


class SubtractsTheMean(Mutant):
    """An RMS norm that centres its input."""

    ops = ("rms_norm",)

    def load(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        rows = super().load(tensor, ndim)
        return rows - rows.mean(1, keepdim=True)


# --- the forward store ---


class TruncatingStore(Mutant):
    symptom = "off|leans"

    def store(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return truncated(rows, dtype)


class LeaningStore(Mutant):
    """Truncates only what an elementwise bound of one ulp cannot tell: significands just below a power of two."""

    symptom = "leans"

    def store(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        nearest, cut = rows.to(dtype), truncated(rows, dtype)
        if dtype not in HALVES:
            return nearest
        allowed = 0.5 * torch.finfo(dtype).eps * rows.abs()
        return torch.where((cut.float() - rows).abs() <= allowed, cut, nearest)


def truncated(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    nearest = rows.to(dtype)
    if dtype not in HALVES:
        return nearest
    too_far = nearest.to(rows.dtype).abs() > rows.abs()
    return torch.where(too_far & (nearest != 0), (nearest.view(torch.int16) - 1).view(dtype), nearest)


class DoubleRounding(Mutant):
    """The normalised value is rounded to the input's dtype before the weight is applied."""

    def affine(
        self, rows: torch.Tensor, weight: Optional, bias: Optional, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().affine(rows.to(dtype).to(rows.dtype), weight, bias, dtype)


class WeightRoundedToInputDtype(Mutant):
    def parameter(
        self, parameter: torch.Tensor, like: torch.Tensor, input_dtype: torch.dtype
    ) -> torch.Tensor:
        return super().parameter(parameter.to(input_dtype), like, input_dtype)


class BiasOnlyWithWeight(Mutant):
    ops = ("layer_norm",)

    def affine(
        self, rows: torch.Tensor, weight: Optional, bias: Optional, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().affine(rows, weight, bias if weight is not None else None, dtype)


class LastColumnNotWritten(Mutant):
    def store(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stored = torch.empty(rows.shape, dtype=dtype)
        stored[:, : rows.shape[1] // 2 * 2] = rows[:, : rows.shape[1] // 2 * 2].to(dtype)
        return stored


class LastRowsNotWritten(Mutant):
    """The grid is rounded down to whole blocks of four rows."""

    def store(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stored = torch.empty(rows.shape, dtype=dtype)
        written = rows.shape[0] // 4 * 4
        stored[:written] = rows[:written].to(dtype)
        return stored


class RowsRepeat(Mutant):
    """A row index taken modulo the block: row 32 is row 0 again."""

    def store(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return rows[torch.arange(rows.shape[0]) % 32].to(dtype)


# --- addressing ---


class InputReadAsContiguous(Mutant):
    def load(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        return super().load(packed(tensor), ndim)


class GradOutputReadAsContiguous(Mutant):
    symptom = "grad_"

    def load_grad(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        return self.load(packed(tensor), ndim)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that follow the first one in memory, whatever the strides say (as far as there are any)."""
    available = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if available < tensor.numel():
        return tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.reshape(tensor.shape)


class PointerRoundedDown(Mutant):
    """A vector load of a pointer that is not aligned to 16 bytes starts at the boundary below it."""

    def load(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        misaligned = tensor.data_ptr() % 16 // tensor.element_size()
        if not tensor.is_contiguous() or not 0 < misaligned <= tensor.storage_offset():
            return super().load(tensor, ndim)
        start = tensor.storage_offset() - misaligned
        return super().load(tensor.as_strided(tensor.shape, tensor.stride(), start), ndim)


# --- backward ---


class NoMeanTerm(Mutant):
    ops = ("layer_norm",)
    symptom = "grad_input: .* off"

    def grad_input(self, scaled: torch.Tensor, normalized: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return (scaled - normalized * (scaled * normalized).mean(1, keepdim=True)) * rstd


class NoProjectionTerm(Mutant):
    symptom = "grad_input: .* off"

    def grad_input(self, scaled: torch.Tensor, normalized: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return (scaled - (scaled.mean(1, keepdim=True) if self.centred else 0)) * rstd


class WeightForgottenInGradInput(Mutant):
    symptom = "grad_input: .* off"

    def backward(self, *arguments: Any) -> Any:
        grad_output, input, ndim, saved, weight, bias, mask = arguments
        grad_input = super().backward(grad_output, input, ndim, saved, None, None, (mask[0], False, False))[0]
        return (
            grad_input,
            *super().backward(grad_output, input, ndim, saved, weight, bias, (False, *mask[1:]))[1:],
        )


class NormalizedInputRounded(Mutant):
    """Backward starts from a normalised input that was kept in bfloat16."""

    symptom = "grad_.*: .* off"

    def grad_input(self, scaled: torch.Tensor, normalized: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return super().grad_input(scaled, normalized.bfloat16().to(scaled.dtype), rstd)


class Bfloat16ColumnSums(Mutant):
    symptom = "grad_(weight|bias): .* off"

    def column_sum(self, terms: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(terms.shape[1:], dtype=torch.bfloat16)
        for block in terms.split(4):
            total = total + block.sum(0).bfloat16()
        return total.to(terms.dtype)


class LastRowsMissingFromColumnSums(Mutant):
    symptom = "grad_(weight|bias): .* off"

    def column_sum(self, terms: torch.Tensor) -> torch.Tensor:
        return terms[: max(terms.shape[0] // 8 * 8, 1)].sum(0)


class RowCountedTwice(Mutant):
    """Blocks of rows overlap by one."""

    symptom = "grad_(weight|bias): .* off"

    def column_sum(self, terms: torch.Tensor) -> torch.Tensor:
        return terms.sum(0) + (terms[32] if terms.shape[0] > 32 else 0)


class UnorderedColumnSums(Mutant):
    """What atomic additions do: another order in each run."""

    symptom = "differs between two runs"

    def column_sum(self, terms: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(terms.shape[1:], dtype=terms.dtype)
        for index in torch.randperm(terms.shape[0]).tolist():
            total = total + terms[index]
        return total


class GradientsInInputDtype(Mutant):
    symptom = "grad_(weight|bias).*dtype|grad_(weight|bias): .* off"

    def store_parameter(
        self, row: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return row.to(input.dtype).reshape(parameter.shape)


class ColumnSumsRoundedTwice(Mutant):
    """Weight gradients pass through the input's dtype on their way to a wider one."""

    symptom = "grad_(weight|bias): .* off"

    def store_parameter(
        self, row: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return super().store_parameter(row.to(input.dtype), parameter, input)


class MaskIgnored(Mutant):
    symptom = "was not asked for"

    def mask(self, mask: Sequence[bool], weight: Optional, bias: Optional) -> Sequence[bool]:
        return (True, weight is not None, bias is not None)


class GradOutputOverwritten(Mutant):
    symptom = "grad_output was written to"

    def backward(self, grad_output: torch.Tensor, *arguments: Any) -> Any:
        results = super().backward(grad_output, *arguments)
        if grad_output.is_contiguous() and results[0].numel():
            grad_output.copy_(results[0])
        return results


class InputOverwritten(Mutant):
    symptom = "input was written to"

    def forward(self, input: torch.Tensor, *arguments: Any) -> Any:
        output, saved = super().forward(input, *arguments)
        if input.is_contiguous():
            input.copy_(output)
        return output, saved


MUTANTS = tuple(sorted(Mutant.__subclasses__(), key=lambda mutant: mutant.__name__))
