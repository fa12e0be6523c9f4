"""Dropout + residual + row-wise norm: autograd, and what layer norm's and RMS norm's public functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastreg import _units
from fastreg._library import Operator
from fastreg.backends.reference import dropout as dropout_formula
from fastreg.ops import _checks, _dropout, _mask, _norm
from fastreg.ops._layout import contiguous, row_regular


@dataclass(frozen=True)
class Norm:
    """What distinguishes the two norms.

    Attributes:
        name: the norm alone, "layer_norm" or "rms_norm".
        forward, backward: the operators.
        formula_forward, formula_backward: the same in plain PyTorch.
        statistics: (sum, normalized_ndim, eps) to the statistics of its rows, differentiable.
        alone: the public function of the norm alone.
        has_bias: whether the operators take a bias.
    """

    name: str
    forward: Operator
    backward: Operator
    formula_forward: Callable[..., Any]
    formula_backward: Callable[..., Any]
    statistics: Callable[[torch.Tensor, int, float], torch.Tensor]
    alone: Callable[..., torch.Tensor]
    has_bias: bool

    @property
    def op(self) -> str:
        """The name of the fused function."""
        return f"dropout_add_{self.name}"

    def parameters(
        self, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """As the operators take them."""
        return (weight, bias) if self.has_bias else (weight,)


# By the name of the norm alone; what a compiled graph has is the name.
NORMS: dict[str, Norm] = {}


class DropoutAddNormFunction(torch.autograd.Function):
    """Autograd of both; saves the sum, two or one fp32 numbers a row, the seed, and the input if layer_scale learns."""

    # The context is set up inside forward, as in LayerNormFunction, and for the same reason.

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        input: torch.Tensor,
        residual: torch.Tensor | None,
        normalized_ndim: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        layer_scale: torch.Tensor | None,
        seed: torch.Tensor | None,
        threshold: int,
        dynamic_threshold: torch.Tensor | None,
        eps: float,
        float_sum: bool,
    ) -> Any:
        norm = NORMS[name]
        output, total, statistics = norm.forward(
            input,
            *(residual, normalized_ndim, *norm.parameters(weight, bias), row_scale, layer_scale),
            *(seed, threshold, dynamic_threshold, eps, float_sum, True),
        )
        kept = input if layer_scale is not None and layer_scale.requires_grad else None
        ctx.save_for_backward(
            kept, total, statistics, weight, bias, row_scale, layer_scale, seed, dynamic_threshold
        )
        ctx.name, ctx.normalized_ndim, ctx.threshold, ctx.eps = name, normalized_ndim, threshold, eps
        ctx.dtype, ctx.has_residual = input.dtype, residual is not None
        ctx.run_backward = norm.backward.route(input)
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, total, statistics, weight, bias, row_scale, layer_scale, seed, dynamic_threshold = (
            ctx.saved_tensors
        )
        norm, ndim = NORMS[ctx.name], ctx.normalized_ndim
        _, wants_input, wants_residual, _, wants_weight, wants_bias, _, wants_layer_scale = (
            ctx.needs_input_grad[:8]
        )
        grad_output, grad_sum = grads
        if grad_output is None and grad_sum is None:
            return (None,) * 13
        if grad_output is None:
            # Only the sum was used.
            grad_output = torch.zeros_like(total, dtype=ctx.dtype)
        # Where nothing happens to the branch, its gradient is the residual's.
        same = seed is None and row_scale is None and layer_scale is None and ctx.dtype == total.dtype
        mask = (
            wants_input and not same,
            wants_residual or (wants_input and same),
            wants_weight,
            *((wants_bias,) if norm.has_bias else ()),
            wants_layer_scale,
        )
        run = ctx.run_backward
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Double backward: the same formula, in torch operations that reach back to the sum.
            run, statistics = norm.formula_backward, norm.statistics(total, ndim, ctx.eps)
        else:
            grad_output = row_regular(grad_output, ndim)
            grad_sum = None if grad_sum is None else row_regular(grad_sum, ndim)
        found = run(
            *(grad_output, grad_sum, total, input, ndim, statistics, *norm.parameters(weight, bias)),
            *(row_scale, layer_scale, seed, ctx.threshold, dynamic_threshold),
            *(dropout_formula.DTYPES.index(ctx.dtype), mask),
        )
        grad_input, grad_residual, grad_weight = found[:3]
        return (
            None,
            (grad_residual if same else grad_input) if wants_input else None,
            grad_residual if wants_residual else None,
            None,
            grad_weight if wants_weight else None,
            found[3] if wants_bias else None,
            None,
            found[-1] if wants_layer_scale else None,
            *(None,) * 5,
        )


_apply = _norm.direct_apply(DropoutAddNormFunction)


def fake_forward(
    input: torch.Tensor, residual: torch.Tensor | None, float_sum: bool, keep_sum: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fakes of output and sum."""
    dtype = sum_dtype(input, residual, float_sum)
    return input.new_empty(input.shape), input.new_empty(input.shape if keep_sum else (0,), dtype=dtype)


def sum_dtype(input: torch.Tensor, residual: torch.Tensor | None, float_sum: bool) -> torch.dtype:
    """fp32 (fp64 for fp64 input) if asked for, else the residual's, else the input's."""
    if float_sum:
        return _norm.accumulate_dtype(input)
    return input.dtype if residual is None else residual.dtype


def fake_gradients(
    sum: torch.Tensor, input_dtype: int, layer_scale: torch.Tensor | None, mask: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fakes of the gradients of input, residual and layer_scale."""
    dtype = dropout_formula.DTYPES[input_dtype]
    return (
        sum.new_empty(sum.shape if mask[0] else (0,), dtype=dtype),
        sum.new_empty(sum.shape if mask[1] else (0,)),
        _norm.fake_gradient(layer_scale, sum, mask[-1]),
    )


def run(
    norm: Norm,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    p: float | torch.Tensor,
    eps: float | None,
    training: bool,
    prenorm: bool,
    residual_in_fp32: bool,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: int | torch.Tensor | None,
    generator: torch.Generator | None,
) -> Any:
    """Check the arguments, draw the seed and call the kernel.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as the public functions say.
    """
    op = norm.op
    ndim = _checks.normalized_ndim(op, input, normalized_shape, weight, bias, 0.0 if eps is None else eps)
    _mask.check_rate(op, p, input.device)
    residual = _dropout.checked_residual(op, input, residual)
    _check_scales(op, input, ndim, row_scale, layer_scale)
    if input.is_cuda:
        given = (input, residual, weight, bias)
        input, residual, weight, bias = _norm.autocast_to_float32(norm.name, *given)
    if eps is None:
        eps = torch.finfo(_norm.accumulate_dtype(input)).eps
    drops = training and (isinstance(p, torch.Tensor) or p > 0.0)
    if not drops and residual is None and row_scale is None and layer_scale is None:
        output = norm.alone(input, normalized_shape, *norm.parameters(weight, bias), eps)
        total = input.to(_norm.accumulate_dtype(input)) if residual_in_fp32 else input
        return (output, total) if prenorm else output
    threshold, dynamic_threshold, seed_tensor = 0, None, None
    if drops:
        threshold, dynamic_threshold = _mask.thresholds(p, _units.ELEMENT)
        seed_tensor = _mask.seed_on(op, input.device, seed, generator)
    if row_scale is not None and row_scale.requires_grad and torch.is_grad_enabled():
        # No kernel differentiates it; torch does.
        rows = input.contiguous().flatten(input.dim() - ndim)
        columns = None if layer_scale is None else layer_scale.flatten()
        mask = (seed_tensor, threshold, dynamic_threshold)
        total = _dropout.run_one(rows, None, None, columns, *mask, unit=_units.ELEMENT, rescale=True)
        total = total.reshape(input.shape) * dropout_formula.along_rows(row_scale, input)
        total = total.to(input.dtype)
        total = total if residual is None else total + residual
        total = total.to(_norm.accumulate_dtype(input)) if residual_in_fp32 else total
        output = norm.alone(total, normalized_shape, *norm.parameters(weight, bias), eps).to(input.dtype)
        return (output, total) if prenorm else output
    arguments = (
        *(row_regular(input, ndim), None if residual is None else row_regular(residual, ndim), ndim),
        *map(contiguous, (weight, bias, row_scale, layer_scale)),
        *(seed_tensor, threshold, dynamic_threshold, eps, residual_in_fp32),
    )
    output, total = _call(norm, arguments, prenorm)
    return (output, total) if prenorm else output


def _call(norm: Norm, arguments: tuple[Any, ...], prenorm: bool) -> Any:
    input, residual, ndim, weight, bias, row_scale, layer_scale = arguments[:7]
    if _norm.transformed() or not _norm.recorded(input, residual, weight, bias, layer_scale):
        forward = norm.formula_forward if _norm.transformed() else norm.forward
        parameters = norm.parameters(weight, bias)
        return forward(
            *(input, residual, ndim, *parameters, row_scale, layer_scale, *arguments[7:], prenorm)
        )[:2]
    apply = DropoutAddNormFunction.apply if torch.compiler.is_compiling() else _apply
    return apply(norm.name, *arguments)


def _check_scales(
    op: str, input: torch.Tensor, normalized_ndim: int, row_scale: object, layer_scale: object
) -> None:
    leading, row = input.shape[: input.dim() - normalized_ndim], input.shape[input.dim() - normalized_ndim :]
    for name, scale in (("row_scale", row_scale), ("layer_scale", layer_scale)):
        if scale is None:
            continue
        if isinstance(scale, torch.Tensor):
            given = scale.shape
            if name == "row_scale" and not (given and leading[: len(given)] == given):
                raise RuntimeError(
                    f"{op}: expected row_scale to have the first of the dimensions {list(leading)} before the rows, "
                    f"but got {list(given)}"
                )
            if name == "layer_scale" and given != row:
                raise RuntimeError(
                    f"{op}: expected layer_scale of normalized_shape {list(row)}, but got {list(given)}"
                )
        _dropout.check_scale(op, name, scale, input)
