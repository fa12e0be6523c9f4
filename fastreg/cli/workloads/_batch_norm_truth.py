"""The exact results of batch norm in float64, a group of channels at a time, with the terms behind each element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fastreg.cli.gate import Exact, stretch

# Elements of a stretch in float64 that stays in a CPU's last cache level; but of channels_last a few channels at least,
# since whole cache lines are read for them. Copies of more than 32 MB would be fresh memory each time.
_STRETCH = 2**18
_FEWEST_CHANNELS = 4

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """What the call computes beside the norm.

    Attributes:
        training: the batch's statistics are used, and the running ones updated.
        activated: by ReLU.
    """

    training: bool
    activated: bool
    momentum: float
    eps: float


@dataclass(frozen=True)
class Stretch:
    """Some channels, from the input to what the activation is applied to; ``_terms`` are sums of absolute terms.

    Attributes:
        normalized, argument: before scale and shift; before the activation.
        mean, variance: the statistics used.
        scale: weight over standard deviation.
    """

    normalized: torch.Tensor
    normalized_terms: torch.Tensor
    argument: torch.Tensor
    argument_terms: torch.Tensor
    mean: torch.Tensor
    mean_terms: torch.Tensor
    variance: torch.Tensor
    variance_terms: torch.Tensor
    scale: torch.Tensor


def stretches(input: torch.Tensor) -> Iterator[slice]:
    """The channels in groups."""
    channels = input.shape[1]
    fewest = 1 if input.is_contiguous() else _FEWEST_CHANNELS
    step = max(fewest, stretch(input.device, _STRETCH) * channels // max(1, input.numel()))
    for start in range(0, channels, step):
        yield slice(start, start + step)


def along(vector: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A vector of one element a channel, in the dtype of ``tensor`` and shaped to meet it."""
    return vector.to(tensor.dtype).view(1, -1, *(1,) * (tensor.dim() - 2))


def batch(tensor: torch.Tensor) -> list[int]:
    """The dimensions that a channel's statistics are taken over."""
    return [dimension for dimension in range(tensor.dim()) if dimension != 1]


def forward(
    arguments: Tensors, buffers: Tensors, setting: Setting, channels: slice, dtype: torch.dtype
) -> Stretch:
    """Some channels, computed in ``dtype``."""
    x = arguments["input"][:, channels].to(dtype)
    size = x.abs()
    if setting.training:
        mean, mean_terms = x.mean(batch(x), keepdim=True), size.mean(batch(x), keepdim=True)
        centred, size = x - mean, size.add_(mean_terms)
        variance = centred.square().mean(batch(x), keepdim=True)
        variance_terms = size.square().mean(batch(x), keepdim=True)
    else:
        mean, variance = (along(buffers[name][channels], x) for name in ("running_mean", "running_var"))
        mean_terms, variance_terms = mean.abs(), variance
        centred, size = x - mean, size.add_(mean_terms)
    rstd = (variance + setting.eps).rsqrt()
    weight, bias = (along(arguments[name][channels], x) for name in ("weight", "bias"))
    normalized, normalized_terms = centred.mul_(rstd), size.mul_(rstd)
    argument = torch.addcmul(bias, normalized, weight)
    argument_terms = torch.addcmul(bias.abs(), normalized_terms, weight.abs())
    if "residual" in arguments:
        residual = arguments["residual"][:, channels].to(dtype)
        argument += residual
        argument_terms += residual.abs()
    return Stretch(
        *(normalized, normalized_terms, argument, argument_terms),
        *(mean, mean_terms, variance, variance_terms, rstd * weight),
    )


def silence_the_kink(
    arguments: Tensors, buffers: Tensors, setting: Setting, grad_output: torch.Tensor
) -> None:
    """Set the gradient to 0 where ReLU's argument is so near 0 that rounding decides its sign.

    The derivative jumps there, and no rounding budget tells a right result from a wrong one. The distance is torch's:
    its chain rounds what the residual is added to, an eps of a 16-bit dtype, and its kernel of channels_last on the CPU
    adds the hundreds of thousands of elements of a channel up one after the other, in fp32.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    distance = max(torch.finfo(grad_output.dtype).eps, 2.0**-12)
    for channels in stretches(grad_output):
        found = forward(arguments, buffers, setting, channels, dtype)
        near = found.argument.abs_() <= found.argument_terms.mul_(distance)
        grad_output[:, channels].masked_fill_(near, 0)


def exact_results(
    arguments: Tensors, buffers: Tensors, setting: Setting, grad_output: torch.Tensor
) -> Iterator[Exact]:
    """Output, running statistics and gradients.

    The difference x - mean is made of the terms |x| and mean |x|: where it is small beside them, digits were lost.
    """
    sums: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    with torch.no_grad():
        for channels in stretches(grad_output):
            part = (slice(None), channels)
            found = forward(arguments, before, setting, channels, torch.float64)
            dz = grad_output[:, channels].double()
            if setting.activated:
                dz = dz * (found.argument > 0)
                found.argument.relu_()
            yield Exact("output", found.argument, found.argument_terms, part)
            size = dz.abs()
            if "residual" in arguments:
                yield Exact("grad_residual", dz, size, part)
            one, one_terms = (each.sum(batch(dz), keepdim=True) for each in (dz, size))
            two, two_terms = (
                (each * other).sum(batch(dz), keepdim=True)
                for each, other in ((dz, found.normalized), (size, found.normalized_terms))
            )
            count = dz.numel() // dz.shape[1]
            if setting.training:
                dz = dz - found.normalized.mul_(two / count) - one / count
                size = size + found.normalized_terms.mul_(two_terms / count) + one_terms / count
            yield Exact("grad_input", dz * found.scale, size.mul_(found.scale.abs()), part)
            sums.setdefault("grad_weight", []).append((two, two_terms))
            sums.setdefault("grad_bias", []).append((one, one_terms))
            if setting.training:
                share = setting.momentum
                unbiased = count / max(1, count - 1)
                for name, value, terms in (
                    ("running_mean", found.mean, found.mean_terms),
                    ("running_var", found.variance * unbiased, found.variance_terms * unbiased),
                ):
                    old = along(before[name][channels], dz) * (1 - share)
                    sums.setdefault(name, []).append((old + share * value, old.abs() + share * terms))
        for name, pieces in sums.items():
            whole, whole_terms = (torch.cat(each, 1).flatten() for each in zip(*pieces, strict=True))
            yield Exact(name, whole, whole_terms)
        for name in () if setting.training else before:
            yield Exact(name, before[name].double(), torch.zeros_like(before[name], dtype=torch.float64))
