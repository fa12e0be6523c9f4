"""One mistake a class. ``symptom`` is a pattern of the rejection that the mistake has to provoke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from activations import NAMES
from fastreg import _channels
from mutants.norms import packed, truncated
from mutants.right_batch_norm import Optional, RightBatchNorm


class BatchNormMutant(RightBatchNorm):
    symptom: ClassVar[str] = "output: .* off"
    ops: ClassVar[tuple[str, ...]] = ("batch_norm",)


# --- statistics ---


class OnePassVariance(BatchNormMutant):
    """E[x^2] - E[x]^2: cancels where the mean is far from zero."""

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        count = x.shape[0] * x.shape[2]
        return (self.sum(x.square()) - count * mean.square()).clamp_min(0)


class UnbiasedVariance(BatchNormMutant):
    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return super().rstd(variance * self.samples / max(self.samples - 1, 1), eps)

    def moments(self, x: torch.Tensor) -> Any:
        self.samples = x.shape[0] * x.shape[2]
        return super().moments(x)

    def evaluate(self, *arguments: Any) -> Any:
        self.samples = 10**9
        return super().evaluate(*arguments)


class EpsOutsideTheRoot(BatchNormMutant):
    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return 1 / (variance.sqrt() + eps)


class NoEps(BatchNormMutant):
    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return variance.clamp_min(1e-30).rsqrt()


class CoarseReciprocalRoot(BatchNormMutant):
    """A hardware estimate with 14 good bits, without the Newton step."""

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        exact = super().rstd(variance, eps)
        return (
            exact.to(torch.float32).view(torch.int32).bitwise_and(~0x1FF).view(torch.float32).to(exact.dtype)
        )


class PaddedLanesInVariance(BatchNormMutant):
    """Masked lanes of each plane hold 0, and 0 - mean is squared with the rest."""

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        padding = (1 << (x.shape[2] - 1).bit_length()) - x.shape[2]
        return super().squares(x, mean) + x.shape[0] * padding * mean.square()


class MeanOverPaddedPlanes(BatchNormMutant):
    def moments(self, x: torch.Tensor) -> Any:
        mean = self.sum(x) / (x.shape[0] * (1 << (x.shape[2] - 1).bit_length()))
        return mean, self.squares(x, mean)


class StatisticsOfTheFirstSample(BatchNormMutant):
    def moments(self, x: torch.Tensor) -> Any:
        mean, squares = super().moments(x[:1])
        return mean, squares * x.shape[0]


class MergedWithoutTheirDistance(BatchNormMutant):
    """Chan's merge of the samples' moments without the term of how far apart their means are."""

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return self.sum((x - x.mean(2, keepdim=True)).square())


class Bfloat16Statistics(BatchNormMutant):
    symptom = "(mean|rstd): .* off"

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return super().saved(mean.bfloat16().to(mean.dtype), rstd.bfloat16().to(rstd.dtype))


class Float32ForFloat64(BatchNormMutant):
    def load(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().load(tensor).float().to(self.compute(tensor.dtype))


class RunningStatisticsInTraining(BatchNormMutant):
    def forward(self, *arguments: Any) -> Any:
        if arguments[4] is None:
            return super().forward(*arguments)
        results = self.evaluate(*arguments[:6], *arguments[7:10], arguments[11])
        super().forward(*arguments)
        return results


class BatchStatisticsInEvaluation(BatchNormMutant):
    def evaluate(self, *arguments: Any) -> Any:
        input, residual, weight, bias, _, _, eps, *rest = arguments
        return self.forward(input, residual, weight, bias, None, None, 0.0, eps, *rest[:2], False, rest[2])


# --- running statistics ---


class BiasedRunningVariance(BatchNormMutant):
    symptom = "running_var: .* off"

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        return squares / count


class EpsInRunningVariance(BatchNormMutant):
    symptom = "running_var: .* off"

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        return super().unbiased(squares, count, eps) + eps


class MomentumReversed(BatchNormMutant):
    symptom = "running_mean: .* off"

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().moved(running, value, 1 - momentum, dtype)


class FixedMomentum(BatchNormMutant):
    symptom = "running_mean: .* off"

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().moved(running, value, 0.1, dtype)


class RunningStatisticsRoundedTwice(BatchNormMutant):
    """The batch's statistics pass through the input's dtype."""

    symptom = "running_(mean|var): .* off"

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().moved(running, value.to(dtype).to(value.dtype), momentum, dtype)


class RunningStatisticsUpdatedTwice(BatchNormMutant):
    symptom = "running_mean: .* off"

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().moved(super().moved(running, value, momentum, dtype), value, momentum, dtype)


class RunningStatisticsUpdatedInEvaluation(BatchNormMutant):
    symptom = "running_mean: .* off"

    def evaluate(self, *arguments: Any) -> Any:
        results = super().evaluate(*arguments)
        mean, _ = self.moments(self.load(arguments[0]))
        arguments[4].mul_(0.9).add_(0.1 * mean)
        return results


# --- forward ---


class ResidualAfterActivation(BatchNormMutant):
    def activate(self, z: torch.Tensor, residual: Optional, number: int, slope: float) -> torch.Tensor:
        if residual is None:
            return super().activate(z, residual, number, slope)
        return super().activate(z - residual, residual, number, slope) + residual


class ResidualIgnoredInEvaluation(BatchNormMutant):
    def evaluate(self, input: torch.Tensor, residual: Optional, *rest: Any) -> Any:
        without = None if residual is None else torch.zeros_like(residual)
        return super().evaluate(input, without, *rest)


class ResidualReadInTheInputsLayout(BatchNormMutant):
    """One stride between samples for both."""

    def load_residual(self, residual: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        available = residual.untyped_storage().nbytes() // residual.element_size() - residual.storage_offset()
        needed = 1 + sum(s * (n - 1) for s, n in zip(input.stride(), input.shape, strict=True))
        if needed > available:
            return self.load(residual)
        return self.load(residual.as_strided(input.shape, input.stride()))


class TanhForErf(BatchNormMutant):
    def activate(self, z: torch.Tensor, residual: Optional, number: int, slope: float) -> torch.Tensor:
        gelu, tanh = NAMES.index("gelu"), NAMES.index("gelu_tanh")
        return super().activate(z, residual, tanh if number == gelu else number, slope)


class FixedSlope(BatchNormMutant):
    def activate(self, z: torch.Tensor, residual: Optional, number: int, slope: float) -> torch.Tensor:
        return super().activate(z, residual, number, 0.01)


class ActivationOfARoundedArgument(BatchNormMutant):
    symptom = "output: .* off|signs: .* off"

    def argument(self, *arguments: Any) -> torch.Tensor:
        z = super().argument(*arguments)
        return z.to(arguments[-1]).to(z.dtype)


class FoldedIntoScaleAndShift(BatchNormMutant):
    """x * scale + (bias - mean * scale), which loses what the mean is larger than its distance to x."""

    def argument(
        self,
        x: torch.Tensor,
        residual: Optional,
        weight: Optional,
        bias: Optional,
        statistics: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        scale = self.scale(statistics, weight, dtype)
        shift = -statistics[0][:, None] * scale
        if bias is not None:
            shift = shift + self.parameter(bias, x, dtype)
        z = x * scale + shift
        return z if residual is None else z + residual


class TruncatingStore(BatchNormMutant):
    symptom = "off|leans"

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return truncated(values, dtype)


class WeightRoundedToInputDtype(BatchNormMutant):
    def parameter(self, parameter: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().parameter(parameter.to(dtype), x, dtype)


class LastPixelsNotWritten(BatchNormMutant):
    """The tail behind the last full vector of four."""

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stored = torch.empty(values.shape, dtype=dtype)
        full = values.shape[2] // 4 * 4
        stored[..., :full] = values[..., :full].to(dtype)
        return stored


class ContiguousOutput(BatchNormMutant):
    symptom = "is not laid out"

    def store(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return self.rounded(values, input.dtype).reshape(input.shape)


# --- addressing ---


class InputReadAsContiguous(BatchNormMutant):
    def forward(self, input: torch.Tensor, *rest: Any) -> Any:
        return super().forward(packed(input), *rest)


class GradOutputReadAsContiguous(BatchNormMutant):
    symptom = "grad_"

    def load_grad(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.load(packed(tensor))


# --- signs ---


class BitsReversed(BatchNormMutant):
    """Consistently, so that only the contract is broken: another backend could not read them."""

    symptom = "signs: .* off"

    def bits(self) -> torch.Tensor:
        return super().bits().flip(0)


class PaddingBitsSet(BatchNormMutant):
    symptom = "signs: .* off"

    def padded(self, lines: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(lines, (0, -lines.shape[1] % 8), value=1)


class SignsOfTheInput(BatchNormMutant):
    symptom = "grad_.*: .* off|signs: .* off"

    def shown(
        self, z: torch.Tensor, x: torch.Tensor, residual: Any, statistics: torch.Tensor
    ) -> torch.Tensor:
        return x


class SignsBeforeTheResidual(BatchNormMutant):
    symptom = "grad_.*: .* off|signs: .* off"

    def shown(
        self, z: torch.Tensor, x: torch.Tensor, residual: Any, statistics: torch.Tensor
    ) -> torch.Tensor:
        return z - residual


class SignsInPlanesAlways(BatchNormMutant):
    symptom = "signs: "

    def lines(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return values.flatten(0, 1)

    def unpacked(self, signs: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        x = self.load(input)
        lines = (signs[:, None] & self.bits() != 0).reshape(-1, -(-x.shape[2] // 8) * 8)
        return lines[:, : x.shape[2]].reshape(x.shape)


# --- backward ---


class GradResidualNotMasked(BatchNormMutant):
    symptom = "grad_residual: .* off"

    def grad_residual(self, dz: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        return self.load(grad_output)


class SlopeOfTheNormalized(BatchNormMutant):
    """The derivative is taken where the activation was not: without weight, bias and residual."""

    symptom = "grad_.*: .* off"

    def before(self, *arguments: Any) -> torch.Tensor:
        grad_output, input, _, signs, statistics, _, _, number, slope = arguments
        return super().before(grad_output, input, None, signs, statistics, None, None, number, slope)


class RecomputedWithoutResidual(BatchNormMutant):
    symptom = "grad_.*: .* off"

    def before(self, grad_output: torch.Tensor, input: torch.Tensor, _: Optional, *rest: Any) -> torch.Tensor:
        return super().before(grad_output, input, None, *rest)


class SlopeOfSigmoid(BatchNormMutant):
    """Of silu only the sigmoid, without z * sigmoid'."""

    symptom = "grad_.*: .* off"

    def slope(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        if NAMES[number] == "silu":
            return torch.sigmoid(z)
        return super().slope(z, number, slope)


class HardswishWithoutItsUpperEnd(BatchNormMutant):
    symptom = "grad_.*: .* off"

    def slope(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        if NAMES[number] == "hardswish":
            return torch.where(z <= -3, 0.0, z / 3 + 0.5)
        return super().slope(z, number, slope)


class NoMeanTerm(BatchNormMutant):
    symptom = "grad_input: .* off"

    def grad_input(self, dz: torch.Tensor, normalized: torch.Tensor, means: Optional) -> torch.Tensor:
        return dz if means is None else dz - normalized * means[1][:, None]


class NoProjectionTerm(BatchNormMutant):
    symptom = "grad_input: .* off"

    def grad_input(self, dz: torch.Tensor, normalized: torch.Tensor, means: Optional) -> torch.Tensor:
        return dz if means is None else dz - means[0][:, None]


class MeansOverAPlane(BatchNormMutant):
    """Sums over all samples, divided by the elements of one."""

    symptom = "grad_input: .* off"

    def mean_count(self, input: torch.Tensor) -> int:
        return input.shape[2:].numel()


class MeanTermsInEvaluation(BatchNormMutant):
    symptom = "grad_input: .* off"

    def uses_means(self, training: bool) -> bool:
        return True


class WeightForgottenInGradInput(BatchNormMutant):
    symptom = "grad_input: .* off"

    def grad_scale(self, statistics: torch.Tensor, weight: Optional, dtype: torch.dtype) -> torch.Tensor:
        return super().grad_scale(statistics, None, dtype)


class RstdForgottenInGradInput(BatchNormMutant):
    symptom = "grad_input: .* off"

    def grad_scale(self, statistics: torch.Tensor, weight: Optional, dtype: torch.dtype) -> torch.Tensor:
        return super().grad_scale(torch.ones_like(statistics), weight, dtype)


class GradWeightWithoutRstd(BatchNormMutant):
    symptom = "grad_weight: .* off"

    def sums(self, *arguments: Any) -> torch.Tensor:
        one, other = super().sums(*arguments)
        return torch.stack((one, other / arguments[4][1]))


class GradBiasBeforeTheActivation(BatchNormMutant):
    symptom = "grad_(input|bias): .* off"

    def summed(self, dz: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        return self.load(grad_output)


class Bfloat16Sums(BatchNormMutant):
    symptom = "(grad_|mean|running|output).*: .* off"

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[1], dtype=torch.bfloat16)
        for sample in x.unbind(0):
            total = total + sample.sum(1).bfloat16()
        return total.to(x.dtype)


class LastSamplesMissingFromSums(BatchNormMutant):
    symptom = "grad_(input|weight|bias): .* off"

    def sums(self, grad_output: torch.Tensor, *rest: Any) -> torch.Tensor:
        masked = grad_output.clone()
        masked[max(grad_output.shape[0] // 4 * 4, 1) :] = 0
        return super().sums(masked, *rest)


class UnorderedSums(BatchNormMutant):
    """What atomic additions do: another order in each run."""

    symptom = "differs between two runs"

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for index in torch.randperm(x.shape[0]).tolist():
            total = total + x[index].sum(1)
        return total


class GradientsInInputDtype(BatchNormMutant):
    symptom = "grad_(weight|bias).*dtype|grad_(weight|bias): .* off"

    def store_parameter(
        self, total: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return total.to(input.dtype)


class SumsRoundedTwice(BatchNormMutant):
    """Parameter gradients pass through the input's dtype on their way to a wider one."""

    symptom = "grad_(weight|bias): .* off"

    def store_parameter(
        self, total: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return super().store_parameter(total.to(input.dtype), parameter, input)


class MaskIgnored(BatchNormMutant):
    symptom = "was not asked for"

    def mask(self, mask: Sequence[bool], weight: Optional, bias: Optional) -> Sequence[bool]:
        return (True, *mask[1:2], weight is not None, bias is not None)


class GradOutputOverwritten(BatchNormMutant):
    symptom = "grad_output was written to"

    def backward(self, grad_output: torch.Tensor, *rest: Any) -> Any:
        results = super().backward(grad_output, *rest)
        if grad_output.is_contiguous() and results[0].numel():
            grad_output.copy_(results[0])
        return results


class ResidualOverwritten(BatchNormMutant):
    symptom = "residual was written to"

    def forward(self, input: torch.Tensor, residual: Optional, *rest: Any) -> Any:
        output, *saved = super().forward(input, residual, *rest)
        if residual is not None and residual.is_contiguous():
            residual.copy_(output)
        return output, *saved


class OutputThatIsTheInput(BatchNormMutant):
    symptom = "input was written to"

    def store(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        result = super().store(values, input)
        rows = _channels.family(input)
        return input.copy_(result) if _channels.dense(input, rows) is input else result


MUTANTS = tuple(sorted(BatchNormMutant.__subclasses__(), key=lambda mutant: mutant.__name__))
