"""Layer normalisation: schema, fakes, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _library
from fastreg.backends.reference import layer_norm as formula
from fastreg.ops import _checks, _norm
from fastreg.ops._layout import row_regular


def _fake_fwd(
    input: torch.Tensor,
    normalized_ndim: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = input.new_empty((2, _norm.rows(input, normalized_ndim)), dtype=_norm.accumulate_dtype(input))
    return input.new_empty(input.shape), statistics


def _fake_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _norm.fake_gradient(input, input, output_mask[0]),
        _norm.fake_gradient(weight, input, output_mask[1]),
        _norm.fake_gradient(bias, input, output_mask[2]),
    )


layer_norm_fwd = _library.define(
    "layer_norm",
    "layer_norm_fwd",
    "(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _fake_fwd,
)
layer_norm_bwd = _library.define(
    "layer_norm",
    "layer_norm_bwd",
    "(Tensor grad_output, Tensor input, int normalized_ndim, Tensor statistics, Tensor? weight, Tensor? bias, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


class LayerNormFunction(torch.autograd.Function):
    """Autograd of layer_norm; saves the input, the parameters and two fp32 numbers a row."""

    # The context is set up inside forward, not by setup_context: the transforms of torch.func, which need the latter,
    # never get here (see _norm.transformed), and a second Python call and output a call would cost 1.5 us.

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        normalized_ndim: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> Any:
        output, statistics = layer_norm_fwd(input, normalized_ndim, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, statistics)
        ctx.normalized_ndim, ctx.eps, ctx.run_backward = normalized_ndim, eps, layer_norm_bwd.route(input)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, bias, statistics = ctx.saved_tensors
        ndim, grad_output = ctx.normalized_ndim, grads[0]
        wants_input, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        mask = (wants_input, wants_weight, wants_bias)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Double backward: the same formula, in torch operations that reach back to the input.
            statistics = formula.layer_norm_statistics(input, ndim, ctx.eps)
            results = formula.layer_norm_bwd(grad_output, input, ndim, statistics, weight, bias, mask)
        else:
            if not grad_output.is_contiguous():
                grad_output = row_regular(grad_output, ndim)
            results = ctx.run_backward(grad_output, input, ndim, statistics, weight, bias, mask)
        return (
            results[0] if wants_input else None,
            None,
            results[1] if wants_weight else None,
            results[2] if wants_bias else None,
            None,
        )


_apply = _norm.direct_apply(LayerNormFunction)


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""Normalise every row of the input to mean 0 and variance 1, then scale and shift it.

    Equivalent to ``torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)``.

    Formula::

        output = (input - mean) / sqrt(variance + eps) * weight + bias

    where
        - ``mean`` and ``variance`` (biased, from centred data) are taken over the last ``len(normalized_shape)``
          dimensions, a row, separately for every index of the leading dimensions;
        - ``weight`` and ``bias`` have shape ``normalized_shape``; left out, they are 1 and 0.

    Args:
        input: the tensor to normalise, float32, bfloat16, float16 or float64.
            Shape: ``(*, *normalized_shape)``. Rows at any distance from each other are read in place; other layouts
            are copied once with ``.contiguous()``.
        normalized_shape: the sizes of the trailing dimensions that form a row.
        weight: the scale, in any of float32, bfloat16 and float16 whatever the input's (float64 for float64 input).
            Shape: ``normalized_shape``.
        bias: the shift, likewise.
            Shape: ``normalized_shape``.
        eps: added to the variance, in the input's units squared.

    Returns:
        A contiguous tensor of the input's shape and dtype. Under CUDA autocast, fp32, as torch.

    Raises:
        RuntimeError: shapes that do not fit (torch's texts); a parameter's dtype or device that does not go with the
            input's; a backend asked for by name that cannot serve the call (``BackendUnavailable``).
        NotImplementedError: an input that is not floating point.
        TypeError: an argument of the wrong type.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic: two runs give equal
    bits, forward and backward. Gradients are computed only for what requires them. Differentiable twice; second
    derivatives, forward-mode differentiation and the transforms of ``torch.func`` run the plain PyTorch formula.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight=weight, bias=bias, eps=eps
        )
    ndim = _checks.normalized_ndim("layer_norm", input, normalized_shape, weight, bias, eps)
    if input.is_cuda:
        input, weight, bias = _norm.autocast_to_float32("layer_norm", input, weight, bias)
    if not input.is_contiguous():
        input = row_regular(input, ndim)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    output: torch.Tensor
    if _norm.transformed():
        output, _ = formula.layer_norm_fwd(input, ndim, weight, bias, eps)
    elif not _norm.recorded(input, weight, bias):
        output, _ = layer_norm_fwd(input, ndim, weight, bias, eps)
    elif torch.compiler.is_compiling():
        output = LayerNormFunction.apply(input, ndim, weight, bias, eps)
    else:
        output = _apply(input, ndim, weight, bias, eps)
    return output
