"""Dropout + residual + layer normalisation: operators, fakes and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _library
from fastreg.backends.reference import dropout_add_layer_norm as formula
from fastreg.backends.reference.layer_norm import layer_norm_statistics
from fastreg.ops import _dropout_add_norm, _norm
from fastreg.ops.layer_norm import layer_norm


def _fake_fwd(
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
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (2, _norm.rows(input, normalized_ndim))
    statistics = input.new_empty(shape, dtype=_norm.accumulate_dtype(input))
    return *_dropout_add_norm.fake_forward(input, residual, float_sum, keep_sum), statistics


def _fake_bwd(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    input: torch.Tensor | None,
    normalized_ndim: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    input_dtype: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    found = _dropout_add_norm.fake_gradients(sum, input_dtype, layer_scale, output_mask)
    return (
        *found[:2],
        _norm.fake_gradient(weight, sum, output_mask[2]),
        _norm.fake_gradient(bias, sum, output_mask[3]),
        found[2],
    )


dropout_add_layer_norm_fwd = _library.define(
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_fwd",
    "(Tensor input, Tensor? residual, int normalized_ndim, Tensor? weight, Tensor? bias, Tensor? "
    "row_scale, Tensor? layer_scale, Tensor? seed, int threshold, Tensor? dynamic_threshold, float eps, "
    "bool float_sum, bool keep_sum) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
dropout_add_layer_norm_bwd = _library.define(
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_bwd",
    "(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? input, int normalized_ndim, Tensor "
    "statistics, Tensor? weight, Tensor? bias, Tensor? row_scale, Tensor? layer_scale, Tensor? seed, int "
    "threshold, Tensor? dynamic_threshold, int input_dtype, bool[5] output_mask) -> (Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
    _fake_bwd,
)

_dropout_add_norm.NORMS["layer_norm"] = _NORM = _dropout_add_norm.Norm(
    name="layer_norm",
    forward=dropout_add_layer_norm_fwd,
    backward=dropout_add_layer_norm_bwd,
    formula_forward=formula.dropout_add_layer_norm_fwd,
    formula_backward=formula.dropout_add_layer_norm_bwd,
    statistics=layer_norm_statistics,
    alone=layer_norm,
    has_bias=True,
)


def dropout_add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    p: float | torch.Tensor = 0.5,
    eps: float = 1e-5,
    training: bool = True,
    *,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    row_scale: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Drop elements of a residual branch, add the residual, and normalise the sum, in one kernel.

    Equivalent to ``torch.nn.functional.layer_norm(sum, normalized_shape, weight, bias, eps)`` of
    ``sum = residual + layer_scale * row_scale[..., None] * torch.nn.functional.dropout(input, p, training)``, with
    masks of another random stream.

    Formula::

        sum = residual + layer_scale * row_scale * keep * input / (1 - p)
        output = (sum - mean) / sqrt(variance + eps) * weight + bias

    where
        - ``keep`` and ``p`` are as in ``dropout``: drawn for each element, and with the same seed the same;
        - ``mean`` and ``variance`` (biased, from centred data) are taken over the last ``len(normalized_shape)``
          dimensions of the sum as it was rounded to its dtype;
        - ``residual``, ``row_scale``, ``layer_scale``, ``weight`` and ``bias`` are left out if None.

    Args:
        input: the residual branch, float32, bfloat16, float16 or float64.
            Shape: ``(*, *normalized_shape)``. Rows at any distance from each other are read in place; other layouts are
            copied once with ``.contiguous()``, and elements are counted row by row.
        residual: added to the branch.
            Shape: the input's.
        normalized_shape: the sizes of the trailing dimensions that form a row.
        weight: the scale, in any of float32, bfloat16 and float16 whatever the input's (float64 for float64 input).
            Shape: ``normalized_shape``.
        bias: the shift, likewise.
            Shape: ``normalized_shape``.
        p: the probability of an element to be dropped: a number, or a tensor as in ``dropout``.
            Shape: ``()`` or ``(1,)``.
        eps: added to the variance, in the sum's units squared.
        training: if false, nothing is dropped.
        prenorm: return the sum too, for the next residual block.
        residual_in_fp32: keep the sum in float32 whatever the dtypes of input and residual.
        row_scale: multiplies rows, or larger parts of the branch: stochastic depth, for instance.
            Shape: the first dimensions of the input's before ``normalized_shape``, one or more of them.
        layer_scale: multiplies the columns, and gets a gradient.
            Shape: ``normalized_shape``.
        seed: draw the mask from this seed, as in ``dropout``.
            Shape: ``()`` or ``(1,)``.
        generator: draw the seed from this generator instead of the device's default one.

    Returns:
        A contiguous tensor of the input's shape and dtype; with ``prenorm`` a pair of it and the sum, which has the
        wider dtype of input and residual, or float32. Under CUDA autocast, fp32, as torch's norm.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together; a backend asked for by name that cannot serve
            the call (``BackendUnavailable``).
        ValueError, NotImplementedError, TypeError: as ``dropout`` and ``layer_norm``.

    Accumulation is in fp32 (fp64 for fp64 input); sum and output are rounded once each. Deterministic given the seed,
    forward and backward. No mask is stored: backward reads the sum and computes the mask again from the seed, and input
    only where layer_scale takes a gradient. Differentiable twice, as ``layer_norm``.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450; Hinton et al., arXiv:1207.0580.
    """
    if has_torch_function_variadic(input, residual, weight, bias, row_scale, layer_scale):
        return handle_torch_function(
            dropout_add_layer_norm,
            (input, residual, weight, bias, row_scale, layer_scale),
            input,
            residual,
            normalized_shape,
            weight=weight,
            bias=bias,
            p=p,
            eps=eps,
            training=training,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            row_scale=row_scale,
            layer_scale=layer_scale,
            seed=seed,
            generator=generator,
        )
    return _dropout_add_norm.run(
        *(_NORM, input, residual, normalized_shape, weight, bias, p, eps, training, prenorm),
        *(residual_in_fp32, row_scale, layer_scale, seed, generator),
    )
