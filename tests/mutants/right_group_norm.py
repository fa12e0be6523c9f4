"""A right group norm, and with it a right instance norm, cut into the steps that a mutant can get wrong.

Like the kernels it works on (samples, groups, channels of a group, spatial) in fp32, rounds once at the store, and adds
the gradients of the parameters up from sums of every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from activations import NAMES, activation
from fastreg import _channels

Optional = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]


class RightGroupNorm:
    """``operator`` gives the functions that a backend exports."""

    def __init__(self, op: str) -> None:
        self.op = op

    def operator(self, name: str) -> Any:
        return {
            "group_norm_fwd": self.forward,
            "group_norm_bwd": self.backward,
            "instance_norm_fwd": self.track,
        }[name]

    # --- the operators ---

    def forward(
        self,
        input: torch.Tensor,
        groups: int,
        weight: Optional,
        bias: Optional,
        eps: float,
        number: int,
        slope: float,
    ) -> Any:
        x = self.load(input, groups)
        mean, squares = self.moments(x)
        statistics = self.saved(mean, self.rstd(squares / self.count(x), eps))
        z = self.argument(x, weight, bias, statistics, input.dtype)
        return self.store(self.activate(z, number, slope), input), statistics[..., 0, 0]

    def track(
        self,
        input: torch.Tensor,
        weight: Optional,
        bias: Optional,
        running_mean: Optional,
        running_var: Optional,
        momentum: float,
        eps: float,
        number: int,
        slope: float,
    ) -> Any:
        results = self.forward(input, input.shape[1], weight, bias, eps, number, slope)
        if running_mean is not None and running_var is not None and input.numel():
            mean, squares = self.moments(self.load(input, input.shape[1]))
            unbiased = self.unbiased(squares, input.shape[2:].numel(), eps)
            for running, value in ((running_mean, mean), (running_var, unbiased)):
                moved = self.over_samples(value[:, :, 0, 0])
                running.copy_(self.moved(running.to(moved.dtype), moved, momentum, input.dtype))
        return results

    def backward(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        groups: int,
        statistics: torch.Tensor,
        weight: Optional,
        bias: Optional,
        number: int,
        slope: float,
        mask: Sequence[bool],
    ) -> Any:
        mask = self.mask(mask, weight, bias)
        x, statistics = self.load(input, groups), statistics[..., None, None]
        z = self.argument(x, weight, bias, statistics, input.dtype)
        dz = self.load_grad(grad_output, groups) * self.slope(z, number, slope)
        normalized = self.normalized(x, statistics)
        # Of every sample and channel.
        plain, projected = dz.sum(3, keepdim=True), (dz * normalized).sum(3, keepdim=True)
        grads = [input.new_empty(0) for _ in range(3)]
        if mask[0]:
            factor = 1.0 if weight is None else self.parameter(weight, x, input.dtype)
            means = [self.of_groups(each, factor) / self.mean_count(x) for each in (plain, projected)]
            grads[0] = self.store(self.grad_input(dz * factor, normalized, means) * statistics[1], input)
        for place, parameter, sums in ((1, weight, projected), (2, bias, plain)):
            if parameter is not None and mask[place]:
                total = self.add_samples(sums[..., 0]).flatten()
                grads[place] = self.store_parameter(total, parameter, input)
        return tuple(grads)

    # --- the steps ---

    def compute(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def load(self, tensor: torch.Tensor, groups: int) -> torch.Tensor:
        samples, channels = tensor.shape[:2]
        width = channels // max(groups, 1)
        shape = (samples, groups, width, math.prod(tensor.shape[2:]))
        return tensor.reshape(shape).to(self.compute(tensor.dtype))

    def load_grad(self, tensor: torch.Tensor, groups: int) -> torch.Tensor:
        return self.load(tensor, groups)

    def count(self, x: torch.Tensor) -> int:
        return x.shape[2] * x.shape[3]

    def mean_count(self, x: torch.Tensor) -> int:
        return self.count(x)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over every group."""
        return x.sum((2, 3), keepdim=True)

    def moments(self, x: torch.Tensor) -> Pair:
        mean = self.sum(x) / self.count(x)
        return mean, self.squares(x, mean)

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return self.sum((x - mean).square())

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return (variance + eps).rsqrt()

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return torch.stack((mean, rstd))

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        return squares / max(count - 1, 1)

    def over_samples(self, values: torch.Tensor) -> torch.Tensor:
        return values.mean(0)

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return (1 - momentum) * running + momentum * value

    def normalized(self, x: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        return (x - statistics[0]) * statistics[1]

    def parameter(self, parameter: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return parameter.to(x.dtype).reshape(1, *x.shape[1:3], 1)

    def scale(self, x: torch.Tensor, statistics: torch.Tensor, weight: Optional, dtype: torch.dtype) -> Any:
        rstd = statistics[1]
        return rstd if weight is None else rstd * self.parameter(weight, x, dtype)

    def argument(
        self,
        x: torch.Tensor,
        weight: Optional,
        bias: Optional,
        statistics: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        z = (x - statistics[0]) * self.scale(x, statistics, weight, dtype)
        return z if bias is None else z + self.parameter(bias, x, dtype)

    def activate(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        return activation(NAMES[number], slope).value(z)

    def slope(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        return activation(NAMES[number], slope).slope(z)

    def store(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        rounded = self.rounded(values, input.dtype).reshape(input.shape)
        return _channels.dense(rounded, _channels.family(input))

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype)

    def of_groups(self, sums: torch.Tensor, factor: Any) -> torch.Tensor:
        """The sums of channels, each times its weight, as sums of groups."""
        return (sums * factor).sum(2, keepdim=True)

    def grad_input(
        self, weighted: torch.Tensor, normalized: torch.Tensor, means: list[torch.Tensor]
    ) -> torch.Tensor:
        return weighted - means[0] - normalized * means[1]

    def add_samples(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.sum(0)

    def mask(self, mask: Sequence[bool], weight: Optional, bias: Optional) -> Sequence[bool]:
        return mask

    def store_parameter(
        self, total: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return total.to(parameter.dtype, copy=True)
