"""A right row-wise norm, cut into the steps that a mutant can get wrong.

It is written like a kernel rather than like the reference: rows in fp32, one rounding at the store, weight gradients as
one fp32 sum a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

Optional = torch.Tensor | None


class RightNorm:
    """Layer norm (``centred``) or RMS norm; ``operator`` gives the functions that a backend exports."""

    def __init__(self, op: str) -> None:
        self.centred = op == "layer_norm"

    def operator(self, name: str) -> Any:
        if self.centred:
            return self.forward if name.endswith("_fwd") else self.backward
        return self._rms_forward if name.endswith("_fwd") else self._rms_backward

    # --- the operators ---

    def forward(self, input: torch.Tensor, ndim: int, weight: Optional, bias: Optional, eps: float) -> Any:
        rows = self.load(input, ndim)
        mean = self.mean(rows)
        rstd = self.rstd(self.variance(rows, mean), eps)
        normalized = (rows - mean) * rstd
        output = self.store(self.affine(normalized, weight, bias, input.dtype), input.dtype).reshape(
            input.shape
        )
        return output, self.saved(mean[:, 0], rstd[:, 0], input.dtype)

    def backward(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        ndim: int,
        saved: torch.Tensor,
        weight: Optional,
        bias: Optional,
        mask: Sequence[bool],
    ) -> Any:
        rows, grad = self.load(input, ndim), self.load_grad(grad_output, ndim)
        mean, rstd = self.restore(saved, rows)
        normalized = (rows - mean) * rstd
        mask = self.mask(mask, weight, bias)
        grad_input, grad_weight, grad_bias = (input.new_empty(0) for _ in range(3))
        if mask[0]:
            scaled = grad if weight is None else grad * self.parameter(weight, grad, input.dtype)
            grad_input = self.store(self.grad_input(scaled, normalized, rstd), input.dtype).reshape(
                input.shape
            )
        if weight is not None and mask[1]:
            grad_weight = self.store_parameter(self.column_sum(grad * normalized), weight, input)
        if bias is not None and mask[2]:
            grad_bias = self.store_parameter(self.column_sum(grad), bias, input)
        return grad_input, grad_weight, grad_bias

    def _rms_forward(self, input: torch.Tensor, ndim: int, weight: Optional, eps: float) -> Any:
        return self.forward(input, ndim, weight, None, eps)

    def _rms_backward(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        ndim: int,
        saved: Any,
        weight: Optional,
        mask: Any,
    ) -> Any:
        return self.backward(grad_output, input, ndim, saved, weight, None, (*mask, False))[:2]

    # --- the steps ---

    def load(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        columns = math.prod(tensor.shape[tensor.dim() - ndim :])
        compute = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return tensor.reshape(-1, columns).to(compute)

    def load_grad(self, tensor: torch.Tensor, ndim: int) -> torch.Tensor:
        return self.load(tensor, ndim)

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.mean(1, keepdim=True) if self.centred else torch.zeros_like(rows[:, :1])

    def variance(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return (rows - mean).square().mean(1, keepdim=True)

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        return (variance + eps).rsqrt()

    def parameter(
        self, parameter: torch.Tensor, like: torch.Tensor, input_dtype: torch.dtype
    ) -> torch.Tensor:
        return parameter.reshape(1, -1).to(like.dtype)

    def affine(
        self, rows: torch.Tensor, weight: Optional, bias: Optional, dtype: torch.dtype
    ) -> torch.Tensor:
        if weight is not None:
            rows = rows * self.parameter(weight, rows, dtype)
        if bias is not None:
            rows = rows + self.parameter(bias, rows, dtype)
        return rows

    def store(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return rows.to(dtype)

    def saved(self, mean: torch.Tensor, rstd: torch.Tensor, input_dtype: torch.dtype) -> torch.Tensor:
        return torch.stack((mean, rstd)) if self.centred else rstd

    def restore(self, saved: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.centred:
            return saved[0][:, None].to(rows.dtype), saved[1][:, None].to(rows.dtype)
        return torch.zeros_like(rows[:, :1]), saved[:, None].to(rows.dtype)

    def mask(self, mask: Sequence[bool], weight: Optional, bias: Optional) -> Sequence[bool]:
        return mask

    def grad_input(self, scaled: torch.Tensor, normalized: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        result = scaled - normalized * (scaled * normalized).mean(1, keepdim=True)
        if self.centred:
            result = result - scaled.mean(1, keepdim=True)
        return result * rstd

    def column_sum(self, terms: torch.Tensor) -> torch.Tensor:
        return terms.sum(0)

    def store_parameter(
        self, row: torch.Tensor, parameter: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor:
        return row.to(parameter.dtype).reshape(parameter.shape)
