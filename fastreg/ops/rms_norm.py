"""Root-mean-square normalisation: schema, fakes, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _library
from fastreg.backends.reference import rms_norm as formula
from fastreg.ops import _checks, _norm
from fastreg.ops._layout import row_regular


def _fake_fwd(
    input: torch.Tensor, normalized_ndim: int, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = input.new_empty((_norm.rows(input, normalized_ndim),), dtype=_norm.accumulate_dtype(input))
    return input.new_empty(input.shape), statistics


def _fake_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return _norm.fake_gradient(input, input, output_mask[0]), _norm.fake_gradient(
        weight, input, output_mask[1]
    )


rms_norm_fwd = _library.define(
    "rms_norm",
    "rms_norm_fwd",
    "(Tensor input, int normalized_ndim, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _fake_fwd,
)
rms_norm_bwd = _library.define(
    "rms_norm",
    "rms_norm_bwd",
    "(Tensor grad_output, Tensor input, int normalized_ndim, Tensor statistics, Tensor? weight, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    _fake_bwd,
)


class RMSNormFunction(torch.autograd.Function):
    """Autograd of rms_norm; saves the input, the weight and one fp32 number a row."""

    # As in LayerNormFunction, the context is set up inside forward.

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, normalized_ndim: int, weight: torch.Tensor | None, eps: float
    ) -> Any:
        output, statistics = rms_norm_fwd(input, normalized_ndim, weight, eps)
        ctx.save_for_backward(input, weight, statistics)
        ctx.normalized_ndim, ctx.eps, ctx.run_backward = normalized_ndim, eps, rms_norm_bwd.route(input)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, statistics = ctx.saved_tensors
        ndim, grad_output = ctx.normalized_ndim, grads[0]
        wants_input, _, wants_weight, _ = ctx.needs_input_grad
        mask = (wants_input, wants_weight)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Double backward: the same formula, in torch operations that reach back to the input.
            statistics = formula.rms_norm_statistics(input, ndim, ctx.eps)
            results = formula.rms_norm_bwd(grad_output, input, ndim, statistics, weight, mask)
        else:
            if not grad_output.is_contiguous():
                grad_output = row_regular(grad_output, ndim)
            results = ctx.run_backward(grad_output, input, ndim, statistics, weight, mask)
        return results[0] if wants_input else None, None, results[1] if wants_weight else None, None


_apply = _norm.direct_apply(RMSNormFunction)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    r"""Divide every row of the input by its root mean square, then scale it.

    Equivalent to ``torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)``.

    Formula::

        output = input / sqrt(mean(input ** 2) + eps) * weight

    where
        - the mean is taken over the last ``len(normalized_shape)`` dimensions, a row, separately for every index of
          the leading dimensions;
        - ``weight`` has shape ``normalized_shape``; left out, it is 1.

    Args:
        input: the tensor to normalise, float32, bfloat16, float16 or float64.
            Shape: ``(*, *normalized_shape)``. Rows at any distance from each other are read in place; other layouts
            are copied once with ``.contiguous()``.
        normalized_shape: the sizes of the trailing dimensions that form a row.
        weight: the scale, in any of float32, bfloat16 and float16 whatever the input's (float64 for float64 input).
            Shape: ``normalized_shape``.
        eps: added to the mean square, in the input's units squared. None: the machine epsilon of the dtype of
            computation (1.19e-7, for float64 input 2.2e-16), as torch.

    Returns:
        A contiguous tensor of the input's shape and dtype. Under CUDA autocast (torch 2.12 and later),
        fp32, as torch.

    Raises:
        RuntimeError, ValueError: shapes that do not fit (torch's types and texts).
        RuntimeError: a weight's dtype or device that does not go with the input's; a backend asked for by name that
            cannot serve the call (``BackendUnavailable``).
        NotImplementedError: an input that is not floating point.
        TypeError: an argument of the wrong type.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic: two runs give equal
    bits, forward and backward. Gradients are computed only for what requires them. Differentiable twice; second
    derivatives, forward-mode differentiation and the transforms of ``torch.func`` run the plain PyTorch formula.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(
            rms_norm, (input, weight), input, normalized_shape, weight=weight, eps=eps
        )
    ndim = _checks.normalized_ndim(
        "rms_norm", input, normalized_shape, weight, None, 0.0 if eps is None else eps
    )
    if input.is_cuda:
        input, weight = _norm.autocast_to_float32("rms_norm", input, weight)
    if eps is None:
        eps = torch.finfo(_norm.accumulate_dtype(input)).eps
    if not input.is_contiguous():
        input = row_regular(input, ndim)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    output: torch.Tensor
    if _norm.transformed():
        output, _ = formula.rms_norm_fwd(input, ndim, weight, eps)
    elif not _norm.recorded(input, weight):
        output, _ = rms_norm_fwd(input, ndim, weight, eps)
    elif torch.compiler.is_compiling():
        output = RMSNormFunction.apply(input, ndim, weight, eps)
    else:
        output = _apply(input, ndim, weight, eps)
    return output
