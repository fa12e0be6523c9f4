"""One mistake a class. ``symptom`` is a pattern of the rejection that the mistake has to provoke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from activations import NAMES
from fastreg import _channels
from mutants.norms import packed, truncated
from mutants.right_group_norm import Optional, Pair, RightGroupNorm


class GroupNormMutant(RightGroupNorm):
    symptom: ClassVar[str] = "output: .* off"
    ops: ClassVar[tuple[str, ...]] = ("group_norm",)


BOTH = ("group_norm", "instance_norm")
INSTANCE = ("instance_norm",)


# --- statistics ---


class OnePassVariance(GroupNormMutant):
    """E[x^2] - E[x]^2: cancels where the mean is far from zero."""

    ops = BOTH

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return (self.sum(x.square()) - self.count(x) * mean.square()).clamp_min(0)


class UnbiasedVariance(GroupNormMutant):
    ops = BOTH

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return super().squares(x, mean) * self.count(x) / max(self.count(x) - 1, 1)


class CountOfAChannel(GroupNormMutant):
    """Sums over a group, divided by the elements of one of its channels."""

    def count(self, x: torch.Tensor) -> int:
        return x.shape[3]


class MeanOverPaddedGroups(GroupNormMutant):
    def moments(self, x: torch.Tensor) -> Pair:
        mean = self.sum(x) / (1 << (self.count(x) - 1).bit_length())
        return mean, self.squares(x, mean)


class PaddedLanesInVariance(GroupNormMutant):
    """Masked lanes of each plane hold 0, and 0 - mean is squared with the rest."""

    ops = BOTH

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        padding = (1 << (x.shape[3] - 1).bit_length()) - x.shape[3]
        return super().squares(x, mean) + x.shape[2] * padding * mean.square()


class StatisticsOfFullVectors(GroupNormMutant):
    """The channels behind the last full vector of four of a group are left out of its statistics."""

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        full = x.shape[2] // 4 * 4 or x.shape[2]
        return super().squares(x[:, :, :full], mean) * x.shape[2] / full


class MergedWithoutTheirDistance(GroupNormMutant):
    """Chan's merge of the channels' moments without the term of how far apart their means are."""

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return self.sum((x - x.mean(3, keepdim=True)).square())


class MeanOfMeansOfUnequalParts(GroupNormMutant):
    """Parts of the channels, of which the last is a shorter one, weigh the same in the merge."""

    def moments(self, x: torch.Tensor) -> Pair:
        means = [part.mean((2, 3), keepdim=True) for part in x.split(8, 2)]
        mean = torch.stack(means).mean(0)
        return mean, self.squares(x, mean)


class StatisticsOfTheFirstSample(GroupNormMutant):
    """The index of the sample is lost."""

    ops = BOTH

    def moments(self, x: torch.Tensor) -> Pair:
        mean, squares = super().moments(x[:1])
        return mean.expand(x.shape[0], -1, -1, -1), squares.expand(x.shape[0], -1, -1, -1)


class StatisticsOfAllSamples(GroupNormMutant):
    """A batch norm."""

    ops = BOTH

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return super().sum(x).mean(0, keepdim=True).expand(x.shape[0], -1, -1, -1)


class StatisticsOfTheNextSample(GroupNormMutant):
    ops = BOTH

    def moments(self, x: torch.Tensor) -> Pair:
        mean, squares = super().moments(x)
        return mean.roll(1, 0), squares.roll(1, 0)


class StatisticsOfChannels(GroupNormMutant):
    """An instance norm, whatever the groups."""

    def moments(self, x: torch.Tensor) -> Pair:
        mean = x.mean(3, keepdim=True)
        return mean[:, :, :1], (x - mean).square().sum(3, keepdim=True)[:, :, :1] * x.shape[2]


class InterleavedGroups(GroupNormMutant):
    """Channel c belongs to group c modulo the groups."""

    def load(self, tensor: torch.Tensor, groups: int) -> torch.Tensor:
        x = super().load(tensor, groups)
        samples, groups, width, spatial = x.shape
        return x.reshape(samples, width, groups, spatial).transpose(1, 2)

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().rounded(values, dtype).transpose(1, 2).contiguous()

    def parameter(self, parameter: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return parameter.to(x.dtype).reshape(1, x.shape[2], x.shape[1], 1).transpose(1, 2)


class GroupsOfTheWrongWidth(GroupNormMutant):
    """As many channels a group as there are groups."""

    def moments(self, x: torch.Tensor) -> Pair:
        width = min(x.shape[1], x.shape[2])
        mean, squares = super().moments(x[:, :, :width])
        return mean, squares * x.shape[2] / width


class Bfloat16Statistics(GroupNormMutant):
    symptom = "(mean|rstd): .* off"
    ops = BOTH

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return super().saved(mean.bfloat16().to(mean.dtype), rstd.bfloat16().to(rstd.dtype))


class HalfPrecisionSums(GroupNormMutant):
    """Sums in float16, which overflow."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return super().sum(x).half().to(x.dtype)


class Float32ForFloat64(GroupNormMutant):
    ops = BOTH

    def load(self, tensor: torch.Tensor, groups: int) -> torch.Tensor:
        return super().load(tensor, groups).float().to(self.compute(tensor.dtype))


class EpsOutsideTheRoot(GroupNormMutant):
    ops = BOTH

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return 1 / (variance.sqrt() + eps)


class NoEps(GroupNormMutant):
    ops = BOTH

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return variance.clamp_min(1e-30).rsqrt()


class FixedEps(GroupNormMutant):
    ops = BOTH

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return super().rstd(variance, 1e-5)


class CoarseReciprocalRoot(GroupNormMutant):
    """A hardware estimate with 14 good bits, without the Newton step."""

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        exact = super().rstd(variance, eps)
        coarse = exact.to(torch.float32).view(torch.int32).bitwise_and(~0x1FF).view(torch.float32)
        return coarse.to(exact.dtype)


# --- running statistics ---


class BiasedRunningVariance(GroupNormMutant):
    symptom = "running_var: .* off"
    ops = INSTANCE

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        return squares / count


class RunningVarianceOfRstd(GroupNormMutant):
    """The variance from the saved reciprocal root, and with it eps."""

    symptom = "running_var: .* off"
    ops = INSTANCE

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        return self.rstd(squares / count, eps).pow(-2) * count / max(count - 1, 1)


class RunningStatisticsSummed(GroupNormMutant):
    symptom = "running_mean: .* off"
    ops = INSTANCE

    def over_samples(self, values: torch.Tensor) -> torch.Tensor:
        return values.sum(0)


class RunningStatisticsOfTheLastSample(GroupNormMutant):
    symptom = "running_mean: .* off"
    ops = INSTANCE

    def over_samples(self, values: torch.Tensor) -> torch.Tensor:
        return values[-1]


class RunningVarianceOfTheBatch(GroupNormMutant):
    """Unbiased over the elements of all samples, as batch norm's."""

    symptom = "running_var: .* off"
    ops = INSTANCE

    def track(self, input: torch.Tensor, *rest: Any) -> Any:
        self.samples = input.shape[0]
        return super().track(input, *rest)

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        count *= self.samples
        return squares * self.samples / max(count - 1, 1)


class MomentumReversed(GroupNormMutant):
    symptom = "running_mean: .* off"
    ops = INSTANCE

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().moved(running, value, 1 - momentum, dtype)


class RunningStatisticsRoundedTwice(GroupNormMutant):
    """The statistics pass through the input's dtype."""

    symptom = "running_(mean|var): .* off"
    ops = INSTANCE

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().moved(running, value.to(dtype).to(value.dtype), momentum, dtype)


class RunningStatisticsMovedBySample(GroupNormMutant):
    """A step of momentum for every sample."""

    symptom = "running_mean: .* off"
    ops = INSTANCE

    def over_samples(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        for each in value:
            running = super().moved(running, each, momentum, dtype)
        return running


# --- forward ---


class WeightOfTheGroup(GroupNormMutant):
    """Parameters indexed by group instead of by channel."""

    def argument(
        self, x: torch.Tensor, weight: Optional, bias: Optional, statistics: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        by_group = torch.arange(x.shape[1]).repeat_interleave(x.shape[2])
        weight, bias = (None if each is None else each[by_group] for each in (weight, bias))
        return super().argument(x, weight, bias, statistics, dtype)


class WeightWithinTheGroup(GroupNormMutant):
    """Parameters indexed by the channel's place in its group."""

    def argument(
        self, x: torch.Tensor, weight: Optional, bias: Optional, statistics: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        within = torch.arange(x.shape[2]).repeat(x.shape[1])
        weight, bias = (None if each is None else each[within] for each in (weight, bias))
        return super().argument(x, weight, bias, statistics, dtype)


class BiasOnlyWithWeight(GroupNormMutant):
    def argument(
        self, x: torch.Tensor, weight: Optional, bias: Optional, statistics: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().argument(x, weight, None if weight is None else bias, statistics, dtype)


class WeightRoundedToInputDtype(GroupNormMutant):
    ops = BOTH

    def parameter(self, parameter: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().parameter(parameter.to(dtype), x, dtype)


class TanhForErf(GroupNormMutant):
    def activate(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        gelu, tanh = NAMES.index("gelu"), NAMES.index("gelu_tanh")
        return super().activate(z, tanh if number == gelu else number, slope)


class FixedSlope(GroupNormMutant):
    ops = BOTH

    def activate(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        return super().activate(z, number, 0.01)


class ActivationBeforeTheAffine(GroupNormMutant):
    def argument(self, x: torch.Tensor, weight: Optional, bias: Optional, *rest: Any) -> torch.Tensor:
        self.affine = weight, bias, rest[1]
        return super().argument(x, None, None, *rest)

    def activate(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        weight, bias, dtype = self.affine
        z = super().activate(z, number, slope)
        z = z if weight is None else z * self.parameter(weight, z, dtype)
        return z if bias is None else z + self.parameter(bias, z, dtype)


class ActivationOfARoundedArgument(GroupNormMutant):
    def argument(self, *arguments: Any) -> torch.Tensor:
        z = super().argument(*arguments)
        return z.to(arguments[-1]).to(z.dtype)


class TruncatingStore(GroupNormMutant):
    symptom = "off|leans"
    ops = BOTH

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return truncated(values, dtype)


class LastPixelsNotWritten(GroupNormMutant):
    """The tail behind the last full vector of four."""

    ops = BOTH

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stored = torch.empty(values.shape, dtype=dtype)
        full = values.shape[3] // 4 * 4
        stored[..., :full] = values[..., :full].to(dtype)
        return stored


class LastChannelsNotWritten(GroupNormMutant):
    """Groups of channels that fill no vector, cut off at the last full one."""

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stored = torch.empty(values.shape, dtype=dtype)
        full = values.shape[2] // 8 * 8 or values.shape[2]
        stored[:, :, :full] = values[:, :, :full].to(dtype)
        return stored


class ContiguousOutput(GroupNormMutant):
    symptom = "is not laid out"
    ops = BOTH

    def store(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return self.rounded(values, input.dtype).reshape(input.shape)


# --- addressing ---


class InputReadAsContiguous(GroupNormMutant):
    ops = BOTH

    def forward(self, input: torch.Tensor, *rest: Any) -> Any:
        return super().forward(packed(input), *rest)


class GradOutputReadAsContiguous(GroupNormMutant):
    symptom = "grad_"
    ops = BOTH

    def load_grad(self, tensor: torch.Tensor, groups: int) -> torch.Tensor:
        return self.load(packed(tensor), groups)


# --- backward ---


class SlopeOfTheNormalized(GroupNormMutant):
    """The derivative is taken where the activation was not: without weight and bias."""

    symptom = "grad_.*: .* off"
    ops = BOTH

    def backward(self, *arguments: Any) -> Any:
        self.plain = True
        results = super().backward(*arguments)
        self.plain = False
        return results

    def argument(self, x: torch.Tensor, weight: Optional, bias: Optional, *rest: Any) -> torch.Tensor:
        if getattr(self, "plain", False):
            weight = bias = None
        return super().argument(x, weight, bias, *rest)


class SlopeOfSigmoid(GroupNormMutant):
    """Of silu only the sigmoid, without z * sigmoid'."""

    symptom = "grad_.*: .* off"

    def slope(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        return torch.sigmoid(z) if NAMES[number] == "silu" else super().slope(z, number, slope)


class SlopeForgotten(GroupNormMutant):
    """The activation is fused into the forward alone."""

    symptom = "grad_.*: .* off"
    ops = BOTH

    def slope(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        return torch.ones_like(z)


class NoMeanTerm(GroupNormMutant):
    symptom = "grad_input: .* off"
    ops = BOTH

    def grad_input(
        self, weighted: torch.Tensor, normalized: torch.Tensor, means: list[torch.Tensor]
    ) -> torch.Tensor:
        return weighted - normalized * means[1]


class NoProjectionTerm(GroupNormMutant):
    symptom = "grad_input: .* off"
    ops = BOTH

    def grad_input(
        self, weighted: torch.Tensor, normalized: torch.Tensor, means: list[torch.Tensor]
    ) -> torch.Tensor:
        return weighted - means[0]


class WeightForgottenInTheMeans(GroupNormMutant):
    symptom = "grad_input: .* off"

    def of_groups(self, sums: torch.Tensor, factor: Any) -> torch.Tensor:
        return super().of_groups(sums, 1.0)


class WeightOutsideTheMeans(GroupNormMutant):
    """Where batch norm has it, one channel having one weight."""

    symptom = "grad_input: .* off"

    def backward(self, grad_output: torch.Tensor, input: torch.Tensor, groups: int, *rest: Any) -> Any:
        statistics, weight, bias, number, slope, mask = rest
        given = grad_output, input, groups
        results = super().backward(*given, *rest)
        if weight is None or not mask[0]:
            return results
        x, expanded = self.load(input, groups), statistics[..., None, None]
        z = self.argument(x, weight, bias, expanded, input.dtype)
        dz = self.load_grad(grad_output, groups) * self.slope(z, number, slope)
        normalized = self.normalized(x, expanded)
        means = [self.sum(each) / self.count(x) for each in (dz, dz * normalized)]
        wrong = self.grad_input(dz, normalized, means) * self.scale(x, expanded, weight, input.dtype)
        return (self.store(wrong, input), *results[1:])


class MeansOverAChannel(GroupNormMutant):
    """Sums over a group, divided by the elements of a channel."""

    symptom = "grad_input: .* off"

    def mean_count(self, x: torch.Tensor) -> int:
        return x.shape[3]


class MeansOfChannels(GroupNormMutant):
    """Of every channel by itself, as instance norm."""

    symptom = "grad_input: .* off"

    def of_groups(self, sums: torch.Tensor, factor: Any) -> torch.Tensor:
        return sums * factor * sums.shape[2]


class FirstChannelMissingFromTheMeans(GroupNormMutant):
    symptom = "grad_input: .* off"

    def of_groups(self, sums: torch.Tensor, factor: Any) -> torch.Tensor:
        weighted = sums * factor
        return weighted[:, :, 1:].sum(2, keepdim=True) if weighted.shape[2] > 1 else weighted


class ParametersOfOneSample(GroupNormMutant):
    symptom = "grad_(weight|bias): .* off"
    ops = BOTH

    def add_samples(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[0]


class ParametersOfTheBatchesMean(GroupNormMutant):
    symptom = "grad_(weight|bias): .* off"
    ops = BOTH

    def add_samples(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.mean(0)


class LastSamplesMissing(GroupNormMutant):
    """Of the workspace's samples only full blocks of four are added up."""

    symptom = "grad_(weight|bias): .* off"
    ops = BOTH

    def add_samples(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[: max(sums.shape[0] // 4 * 4, 1)].sum(0)


class HalfPrecisionWorkspace(GroupNormMutant):
    symptom = "grad_(weight|bias): .* off"
    ops = BOTH

    def add_samples(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.bfloat16().to(sums.dtype).sum(0)


class UnorderedSums(GroupNormMutant):
    """What atomic additions do: another order in each run."""

    symptom = "differs between two runs"
    ops = BOTH

    def add_samples(self, sums: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(sums[0])
        for index in torch.randperm(sums.shape[0]).tolist():
            total = total + sums[index]
        return total


class GradientsInInputDtype(GroupNormMutant):
    symptom = "grad_(weight|bias).*dtype|grad_(weight|bias): .* off"
    ops = BOTH

    def store_parameter(
        self, total: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return total.to(input.dtype)


class SumsRoundedTwice(GroupNormMutant):
    """Parameter gradients pass through the input's dtype on their way to a wider one."""

    symptom = "grad_(weight|bias): .* off"
    ops = BOTH

    def store_parameter(
        self, total: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return super().store_parameter(total.to(input.dtype), parameter, input)


class MaskIgnored(GroupNormMutant):
    symptom = "was not asked for"
    ops = BOTH

    def mask(self, mask: Sequence[bool], weight: Optional, bias: Optional) -> Sequence[bool]:
        return (True, weight is not None, bias is not None)


class GradOutputOverwritten(GroupNormMutant):
    symptom = "grad_output was written to"
    ops = BOTH

    def backward(self, grad_output: torch.Tensor, *rest: Any) -> Any:
        results = super().backward(grad_output, *rest)
        if grad_output.is_contiguous() and results[0].numel():
            grad_output.copy_(results[0])
        return results


class OutputThatIsTheInput(GroupNormMutant):
    symptom = "input was written to"
    ops = BOTH

    def store(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        result = super().store(values, input)
        rows = _channels.family(input)
        return input.copy_(result) if _channels.dense(input, rows) is input else result


MUTANTS = tuple(sorted(GroupNormMutant.__subclasses__(), key=lambda mutant: mutant.__name__))
