"""The exact results of group norm in float64, some groups of a sample at a time, with the terms behind each element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fastreg.cli.gate import Exact, stretch

# Elements of a stretch in float64 that stays in a CPU's last cache level.
_STRETCH = 2**18

Tensors = Mapping[str, torch.Tensor]

ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
}
# Those whose derivative jumps at 0.
KINKED = ("relu", "leaky_relu")


@dataclass(frozen=True)
class Setting:
    """What the call computes.

    Attributes:
        groups: of channels.
        activation: a key of ``ACTIVATIONS``, or None.
        momentum: of the running statistics, where there are some.
    """

    groups: int
    activation: str | None
    eps: float
    momentum: float


@dataclass(frozen=True)
class Stretch:
    """Some groups of one sample, (groups, channels of a group, positions); ``_terms`` are sums of absolute terms.

    Attributes:
        normalized, argument: before scale and shift; before the activation.
        mean, variance: of each group.
        rstd, weight: to be multiplied with what is above.
    """

    normalized: torch.Tensor
    normalized_terms: torch.Tensor
    argument: torch.Tensor
    argument_terms: torch.Tensor
    mean: torch.Tensor
    mean_terms: torch.Tensor
    variance: torch.Tensor
    variance_terms: torch.Tensor
    rstd: torch.Tensor
    weight: torch.Tensor


Part = tuple[slice, slice]


def stretches(input: torch.Tensor, groups: int) -> Iterator[Part]:
    """The samples one by one, and of each the channels of some groups."""
    samples, channels = input.shape[:2]
    of_group = channels // groups
    of_sample = max(1, input[0].numel())
    step = max(1, stretch(input.device, _STRETCH) * groups // of_sample) * of_group
    for sample in range(samples):
        for start in range(0, channels, step):
            yield slice(sample, sample + 1), slice(start, start + step)


def grouped(tensor: torch.Tensor, part: Part, of_group: int, dtype: torch.dtype) -> torch.Tensor:
    """A part as (groups, channels of a group, positions)."""
    return tensor[part].to(dtype).reshape(-1, of_group, tensor.shape[2:].numel())


def forward(arguments: Tensors, setting: Setting, part: Part, dtype: torch.dtype) -> Stretch:
    """Some groups of a sample, computed in ``dtype``."""
    input = arguments["input"]
    of_group = input.shape[1] // setting.groups
    x = grouped(input, part, of_group, dtype)
    size = x.abs()
    mean, mean_terms = x.mean((1, 2), keepdim=True), size.mean((1, 2), keepdim=True)
    centred, size = x - mean, size.add_(mean_terms)
    variance = centred.square().mean((1, 2), keepdim=True)
    variance_terms = size.square().mean((1, 2), keepdim=True)
    rstd = (variance + setting.eps).rsqrt()
    weight, bias = (
        arguments[name][part[1]].to(dtype).reshape(-1, of_group, 1) for name in ("weight", "bias")
    )
    normalized, normalized_terms = centred.mul_(rstd), size.mul_(rstd)
    return Stretch(
        *(normalized, normalized_terms),
        *(torch.addcmul(bias, normalized, weight), torch.addcmul(bias.abs(), normalized_terms, weight.abs())),
        *(mean, mean_terms, variance, variance_terms, rstd, weight),
    )


def silence_the_kink(arguments: Tensors, setting: Setting, grad_output: torch.Tensor) -> None:
    """Set the gradient to 0 where the activation's argument is so near 0 that rounding decides its sign.

    The derivative jumps there, and no rounding budget tells a right result from a wrong one. The distance is torch's,
    which rounds the norm's output to a 16-bit dtype before the activation.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    distance = max(torch.finfo(grad_output.dtype).eps, 2.0**-12)
    for part in stretches(grad_output, setting.groups):
        found = forward(arguments, setting, part, dtype)
        near = found.argument.abs_() <= found.argument_terms.mul_(distance)
        grad_output[part] = grad_output[part].masked_fill(near.reshape(grad_output[part].shape), 0)


def _activated(
    found: Stretch, dy: torch.Tensor, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and dz, each with its terms: what the argument is off by, the derivatives pass on."""
    if activation is None:
        return found.argument, found.argument_terms, dy, dy.abs()
    with torch.enable_grad():
        argument = found.argument.requires_grad_()
        output = ACTIVATIONS[activation](argument)
        (slope,) = torch.autograd.grad(
            output, argument, torch.ones_like(output), create_graph=activation == "silu"
        )
        bend = torch.zeros_like(slope)
        if activation == "silu":
            (bend,) = torch.autograd.grad(slope, argument, torch.ones_like(slope))
    slope, output = slope.detach(), output.detach()
    terms = output.abs() + slope.abs() * found.argument_terms
    return output, terms, dy * slope, dy.abs() * (slope.abs() + bend.abs() * found.argument_terms)


def exact_results(
    arguments: Tensors, buffers: Tensors, setting: Setting, grad_output: torch.Tensor
) -> Iterator[Exact]:
    """Output, gradients, and running statistics where there are some.

    The difference x - mean is made of the terms |x| and mean |x|: where it is small beside them, digits were lost.
    """
    channels = grad_output.shape[1]
    of_group = channels // setting.groups
    names = ("grad_weight", "grad_bias", "running_mean", "running_var")
    sums = {name: torch.zeros(2, channels, dtype=torch.float64, device=grad_output.device) for name in names}
    with torch.no_grad():
        for part in stretches(grad_output, setting.groups):
            shape = grad_output[part].shape
            found = forward(arguments, setting, part, torch.float64)
            dy = grouped(grad_output, part, of_group, torch.float64)
            output, terms, dz, size = _activated(found, dy, setting.activation)
            yield Exact("output", output.reshape(shape), terms.reshape(shape), part)
            one, one_terms = (each.sum(2, keepdim=True) for each in (dz, size))
            two, two_terms = (
                (each * other).sum(2, keepdim=True)
                for each, other in ((dz, found.normalized), (size, found.normalized_terms))
            )
            weight, count = found.weight, dy[0].numel()
            value = dz * weight
            value -= (one * weight).sum(1, keepdim=True) / count
            value -= found.normalized * ((two * weight).sum(1, keepdim=True) / count)
            size = size * weight.abs()
            size += (one_terms * weight.abs()).sum(1, keepdim=True) / count
            size += found.normalized_terms * ((two_terms * weight.abs()).sum(1, keepdim=True) / count)
            yield Exact(
                "grad_input",
                value.mul_(found.rstd).reshape(shape),
                size.mul_(found.rstd).reshape(shape),
                part,
            )
            unbiased = count / max(1, count - 1) / grad_output.shape[0]
            for name, *pair in (
                ("grad_weight", two, two_terms),
                ("grad_bias", one, one_terms),
                ("running_mean", found.mean / grad_output.shape[0], found.mean_terms / grad_output.shape[0]),
                ("running_var", found.variance * unbiased, found.variance_terms * unbiased),
            ):
                if name not in names[2:] or buffers:
                    sums[name][:, part[1]] += torch.stack([each.reshape(-1) for each in pair])
        for name in names[:2]:
            yield Exact(name, *sums[name])
        for name, before in buffers.items():
            old, share = before.double() * (1 - setting.momentum), setting.momentum
            yield Exact(name, old + share * sums[name][0], old.abs() + share * sums[name][1])
