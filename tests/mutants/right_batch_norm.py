"""A right batch norm, cut into the steps that a mutant can get wrong.

Like the kernels it works on (samples, channels, spatial) in fp32 and rounds once at the store.
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


class RightBatchNorm:
    """``operator`` gives the functions that a backend exports."""

    def __init__(self, op: str) -> None:
        self.op = op

    def operator(self, name: str) -> Any:
        return {
            "fwd": self.forward,
            "eval": self.evaluate,
            "bwd": self.backward,
            "moments": lambda input: torch.stack(self.moments(self.load(input))),
            "apply": self.apply,
            "sums": self.sums,
            "bwd_apply": self.backward_apply,
        }[name.removeprefix(f"{self.op}_")]

    # --- the operators ---

    def forward(
        self,
        input: torch.Tensor,
        residual: Optional,
        weight: Optional,
        bias: Optional,
        running_mean: Optional,
        running_var: Optional,
        momentum: float,
        eps: float,
        number: int,
        slope: float,
        skip: bool,
        keep: bool,
    ) -> Any:
        count = self.count(input)
        mean, squares = self.moments(self.load(input))
        if running_mean is not None and running_var is not None:
            skipped = ~(mean.isfinite() & squares.isfinite()) & skip
            values = (running_mean, mean), (running_var, self.unbiased(squares, count, eps))
            for running, value in values:
                moved = self.moved(running.to(value.dtype), value, momentum, input.dtype)
                running.copy_(torch.where(skipped, running.to(value.dtype), moved))
        statistics = self.saved(mean, self.rstd(squares / count, eps))
        output, signs = self.apply(input, residual, weight, bias, statistics, number, slope, keep)
        return output, statistics, signs

    def evaluate(
        self,
        input: torch.Tensor,
        residual: Optional,
        weight: Optional,
        bias: Optional,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
        number: int,
        slope: float,
        keep: bool,
    ) -> Any:
        wide = self.compute(input.dtype)
        statistics = torch.stack((running_mean.to(wide), self.rstd(running_var.to(wide), eps)))
        output, signs = self.apply(input, residual, weight, bias, statistics, number, slope, keep)
        return output, statistics, signs

    def apply(
        self,
        input: torch.Tensor,
        residual: Optional,
        weight: Optional,
        bias: Optional,
        statistics: torch.Tensor,
        number: int,
        slope: float,
        keep: bool,
    ) -> Any:
        x = self.load(input)
        added = None if residual is None else self.load_residual(residual, input)
        z = self.argument(x, added, weight, bias, statistics, input.dtype)
        signs = torch.empty(0, dtype=torch.uint8)
        if keep and residual is not None and NAMES[number] in ("relu", "leaky_relu"):
            shown = self.shown(z, x, added, statistics)
            signs = self.packed(shown > 0 if NAMES[number] == "leaky_relu" else ~(shown <= 0), input)
        return self.store(self.activate(z, added, number, slope), input), signs

    def backward(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        residual: Optional,
        signs: Optional,
        statistics: torch.Tensor,
        weight: Optional,
        bias: Optional,
        training: bool,
        number: int,
        slope: float,
        mask: Sequence[bool],
    ) -> Any:
        given = (grad_output, input, residual, signs, statistics, weight, bias)
        mask = self.mask(mask, weight, bias)
        sums = self.sums(*given, number, slope)
        means = sums / self.mean_count(input) if self.uses_means(training) else None
        grad_weight, grad_bias = input.new_empty(0), input.new_empty(0)
        if weight is not None and mask[2]:
            grad_weight = self.store_parameter(sums[1], weight, input)
        if bias is not None and mask[3]:
            grad_bias = self.store_parameter(sums[0], bias, input)
        return (*self.backward_apply(*given, means, number, slope, mask[:2]), grad_weight, grad_bias)

    def sums(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        residual: Optional,
        signs: Optional,
        statistics: torch.Tensor,
        weight: Optional,
        bias: Optional,
        number: int,
        slope: float,
    ) -> torch.Tensor:
        dz = self.before(grad_output, input, residual, signs, statistics, weight, bias, number, slope)
        normalized = self.normalized(self.load(input), statistics)
        return torch.stack((self.sum(self.summed(dz, grad_output)), self.sum(dz * normalized)))

    def backward_apply(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        residual: Optional,
        signs: Optional,
        statistics: torch.Tensor,
        weight: Optional,
        bias: Optional,
        means: Optional,
        number: int,
        slope: float,
        mask: Sequence[bool],
    ) -> Any:
        dz = self.before(grad_output, input, residual, signs, statistics, weight, bias, number, slope)
        grad_input, grad_residual = input.new_empty(0), input.new_empty(0)
        if mask[0]:
            normalized = self.normalized(self.load(input), statistics)
            grad = self.grad_input(dz, normalized, means)
            grad_input = self.store(grad * self.grad_scale(statistics, weight, input.dtype), input)
        if mask[1]:
            grad_residual = self.store(self.grad_residual(dz, grad_output), input)
        return grad_input, grad_residual

    # --- the steps ---

    def compute(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def load(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = (*tensor.shape[:2], math.prod(tensor.shape[2:]))
        return tensor.reshape(shape).to(self.compute(tensor.dtype))

    def load_residual(self, residual: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return self.load(residual)

    def load_grad(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.load(tensor)

    def count(self, input: torch.Tensor) -> int:
        return input.numel() // input.shape[1]

    def mean_count(self, input: torch.Tensor) -> int:
        return self.count(input)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum((0, 2))

    def moments(self, x: torch.Tensor) -> Pair:
        mean = self.sum(x) / (x.shape[0] * x.shape[2])
        return mean, self.squares(x, mean)

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return self.sum((x - mean[:, None]).square())

    def unbiased(self, squares: torch.Tensor, count: int, eps: float) -> torch.Tensor:
        return squares / max(count - 1, 1)

    def moved(
        self, running: torch.Tensor, value: torch.Tensor, momentum: float, dtype: torch.dtype
    ) -> torch.Tensor:
        return (1 - momentum) * running + momentum * value

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return (variance + eps).rsqrt()

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return torch.stack((mean, rstd))

    def normalized(self, x: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        return (x - statistics[0][:, None]) * statistics[1][:, None]

    def parameter(self, parameter: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return parameter.to(x.dtype)[:, None]

    def scale(self, statistics: torch.Tensor, weight: Optional, dtype: torch.dtype) -> torch.Tensor:
        rstd = statistics[1][:, None]
        return rstd if weight is None else rstd * self.parameter(weight, rstd, dtype)

    def grad_scale(self, statistics: torch.Tensor, weight: Optional, dtype: torch.dtype) -> torch.Tensor:
        return self.scale(statistics, weight, dtype)

    def argument(
        self,
        x: torch.Tensor,
        residual: Optional,
        weight: Optional,
        bias: Optional,
        statistics: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        z = (x - statistics[0][:, None]) * self.scale(statistics, weight, dtype)
        if bias is not None:
            z = z + self.parameter(bias, x, dtype)
        return z if residual is None else z + residual

    def activate(self, z: torch.Tensor, residual: Optional, number: int, slope: float) -> torch.Tensor:
        return activation(NAMES[number], slope).value(z)

    def slope(self, z: torch.Tensor, number: int, slope: float) -> torch.Tensor:
        return activation(NAMES[number], slope).slope(z)

    def store(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return _channels.dense(
            self.rounded(values, input.dtype).reshape(input.shape), _channels.family(input)
        )

    def rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype)

    def shown(
        self, z: torch.Tensor, x: torch.Tensor, residual: Any, statistics: torch.Tensor
    ) -> torch.Tensor:
        """What the signs are of."""
        return z

    def lines(self, values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        rows = _channels.family(input)
        return (values.transpose(1, 2) if rows else values).flatten(0, 1)

    def packed(self, positive: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        lines = self.padded(self.lines(positive, input))
        return (lines.reshape(-1, 8) * self.bits()).sum(1, dtype=torch.uint8)

    def padded(self, lines: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(lines, (0, -lines.shape[1] % 8))

    def bits(self) -> torch.Tensor:
        return 2 ** torch.arange(8, dtype=torch.uint8)

    def unpacked(self, signs: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """The signs as booleans of the shape (samples, channels, spatial)."""
        samples, channels, spatial = self.load(input).shape
        elements = channels if _channels.family(input) else spatial
        lines = (signs[:, None] & self.bits() != 0).reshape(-1, -(-elements // 8) * 8)[:, :elements]
        if _channels.family(input):
            return lines.reshape(samples, spatial, channels).transpose(1, 2)
        return lines.reshape(samples, channels, spatial)

    def before(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        residual: Optional,
        signs: Optional,
        statistics: torch.Tensor,
        weight: Optional,
        bias: Optional,
        number: int,
        slope: float,
    ) -> torch.Tensor:
        """The gradient of what the activation was applied to."""
        grad = self.load_grad(grad_output)
        if signs is not None:
            below = slope if NAMES[number] == "leaky_relu" else 0.0
            return torch.where(self.unpacked(signs, input), grad, grad * below)
        added = None if residual is None else self.load_residual(residual, input)
        z = self.argument(self.load(input), added, weight, bias, statistics, input.dtype)
        return grad * self.slope(z, number, slope)

    def summed(self, dz: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        """What grad_bias is the sum of."""
        return dz

    def uses_means(self, training: bool) -> bool:
        return training

    def grad_input(self, dz: torch.Tensor, normalized: torch.Tensor, means: Optional) -> torch.Tensor:
        if means is None:
            return dz
        return dz - means[0][:, None] - normalized * means[1][:, None]

    def grad_residual(self, dz: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        return dz

    def mask(self, mask: Sequence[bool], weight: Optional, bias: Optional) -> Sequence[bool]:
        return mask

    def store_parameter(
        self, total: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return total.to(parameter.dtype, copy=True)
