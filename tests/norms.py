"""The specs of the row-wise norms, layer_norm and rms_norm: sizes, dtypes, and exact values with their budgets."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from cases import Case, Mix, Size
from criterion import Exact
from fastreg.ops._layout import row_regular
from suite import OpSpec, Tensors

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def _size(leading: tuple[int, ...], normalized: tuple[int, ...]) -> Size:
    return Size((*leading, *normalized), {"normalized_shape": normalized})


# Hidden sizes around every power of two and vector width; rows around the kernels' rows per block.
SIZES = (
    _size((1,), (1,)),
    _size((3,), (1,)),
    _size((33,), (2,)),
    _size((2,), (3,)),
    _size((65,), (17,)),
    _size((4,), (64,)),
    _size((3,), (127,)),
    _size((2,), (129,)),
    _size((5,), (255,)),
    _size((16,), (256,)),
    _size((37,), (257,)),
    _size((6,), (768,)),
    _size((3,), (1000,)),
    _size((8,), (1024,)),
    _size((2,), (4096,)),
    _size((1,), (8193,)),
    _size((3,), (8193,)),
    _size((), (33,)),
    _size((2, 3), (40,)),
    _size((3, 2), (4, 5)),
    _size((2, 1, 3), (2, 1, 7)),
)
LONG_ROWS = (
    *(_size((2,), (columns,)) for columns in (5000, 12289, 16384)),
    *(_size((1,), (columns,)) for columns in (32768, 65536, 131075, 262144)),
)
MANY_ROWS = _size((65537,), (3,))


def parameter_shape(case: Case) -> tuple[int, ...]:
    return tuple(case.arguments["normalized_shape"])


def _hidden(case: Case) -> int:
    return math.prod(parameter_shape(case))


def eps_of(spec_name: str, case: Case) -> float:
    eps = case.arguments.get("eps", 1e-5 if spec_name == "layer_norm" else None)
    if eps is None:
        eps = torch.finfo(F64 if case.mix.input == F64 else F32).eps
    return float(eps)


def _exact(name: str, case: Case, tensors: Tensors) -> dict[str, Exact]:
    """Exact values in float64, and the sums of absolute terms that budget their roundings.

    ``shift`` budgets the mean in units of the normalised value: a sum of terms as large as mean(abs(x)) was rounded and
    subtracted. It is added where a normalised value enters, not multiplied in, so that the budget does not vanish where
    that value is near 0. An rms_norm subtracts nothing.
    """
    hidden = _hidden(case)

    def rows(tensor: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(0) if tensor is None else tensor.detach().cpu().to(F64).reshape(-1, hidden)

    input, grad_output = rows(tensors["input"]), rows(tensors["grad_output"])
    weight, bias = tensors["weight"], tensors.get("bias")
    scale = torch.ones(1, hidden, dtype=F64) if weight is None else rows(weight)
    eps = eps_of(name, case)

    centred = input
    summed = torch.zeros(input.shape[0], 1, dtype=F64)
    if name == "layer_norm":
        mean, summed = input.mean(1, keepdim=True), input.abs().mean(1, keepdim=True)
        centred = input - mean
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normalized, shift = centred * rstd, summed * rstd

    output = normalized * scale
    output_terms = (normalized.abs() + shift) * scale.abs()
    if bias is not None:
        output, output_terms = output + rows(bias), output_terms + rows(bias).abs()

    scaled = grad_output * scale
    projection = (scaled * normalized).mean(1, keepdim=True)
    size = scaled.abs().mean(1, keepdim=True)
    grad_input = scaled - normalized * projection
    grad_terms = scaled.abs() + normalized.abs() * (scaled * normalized).abs().mean(1, keepdim=True)
    if name == "layer_norm":
        grad_input = grad_input - scaled.mean(1, keepdim=True)
        grad_terms = grad_terms + size + shift * (projection.abs() + normalized.abs() * size)

    dtype, saved = case.mix.input, F64 if case.mix.input == F64 else F32
    unit = torch.finfo(saved).eps / 2
    shape = case.size.shape
    exact = {
        "output": Exact(output.reshape(shape), output_terms.reshape(shape), dtype),
        "grad_input": Exact((grad_input * rstd).reshape(shape), (grad_terms * rstd).reshape(shape), dtype),
        # A mean that is off by a rounding adds its square to the variance: second order, but not for a huge mean.
        "rstd": Exact(rstd[:, 0], (rstd * (1 + 8 * unit * shift.square()))[:, 0], saved),
    }
    if name == "layer_norm":
        exact["mean"] = Exact(mean[:, 0], summed[:, 0], saved)
    if weight is not None:
        terms = (grad_output.abs() * (normalized.abs() + shift)).sum(0)
        exact["grad_weight"] = Exact(
            (grad_output * normalized).sum(0).reshape(weight.shape), terms.reshape(weight.shape), weight.dtype
        )
    if bias is not None:
        terms = grad_output.abs().sum(0)
        exact["grad_bias"] = Exact(
            grad_output.sum(0).reshape(bias.shape), terms.reshape(bias.shape), bias.dtype
        )
    return exact


def _regular(case: Case, tensors: Tensors) -> list[Any]:
    """grad_output, input, number of normalised dimensions, weight, bias, as the operators require them."""
    ndim = len(parameter_shape(case))
    rows = [row_regular(tensors[name], ndim) for name in ("grad_output", "input")]  # type: ignore[arg-type]
    vectors = [None if each is None else each.contiguous() for each in map(tensors.get, ("weight", "bias"))]
    return [*rows, ndim, *vectors]


def _layer_norm_forward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    _, input, ndim, weight, bias = _regular(case, tensors)
    return input, ndim, weight, bias, eps_of("layer_norm", case)


def _layer_norm_backward(case: Case, tensors: Tensors, saved: torch.Tensor) -> tuple[Any, ...]:
    grad_output, input, ndim, weight, bias = _regular(case, tensors)
    return grad_output, input, ndim, saved, weight, bias


def _rms_norm_forward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    _, input, ndim, weight, _ = _regular(case, tensors)
    return input, ndim, weight, eps_of("rms_norm", case)


def _rms_norm_backward(case: Case, tensors: Tensors, saved: torch.Tensor) -> tuple[Any, ...]:
    grad_output, input, ndim, weight, _ = _regular(case, tensors)
    return grad_output, input, ndim, saved, weight


def _of_rows(rows: int, columns: int) -> Size:
    return _size((rows,), (columns,))


def _over_the_last_dimension(
    function: Any, input: torch.Tensor, *parameters: torch.Tensor, **options: Any
) -> torch.Tensor:
    return function(input, input.shape[-1:], *parameters, **options)  # type: ignore[no-any-return]


def _parts(saved: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    parts = saved.unbind(0) if len(names) > 1 else (saved,)
    return dict(zip(names, parts, strict=True))


LAYER_NORM = OpSpec(
    name="layer_norm",
    parameters=("weight", "bias"),
    sizes=SIZES,
    mixes=(
        Mix((F32, F32, F32)),
        Mix((BF16, BF16, BF16)),
        Mix((F16, F16, F16)),
        Mix((F64, F64, F64)),
        Mix((BF16, F32, F32)),
        Mix((F16, BF16, F32)),
        Mix((F32, F16, BF16)),
        Mix((BF16, None, None)),
        Mix((F32, F32, None)),
        Mix((F16, None, F32)),
        Mix((F64, None, F64)),
    ),
    options=({}, {"eps": 1e-5}, {"eps": 1e-3}, {"eps": 1e-12}),
    parameter_shape=parameter_shape,
    exact=lambda case, tensors: _exact("layer_norm", case, tensors),
    forward=_layer_norm_forward,
    backward=_layer_norm_backward,
    split_saved=lambda saved: _parts(saved, ("mean", "rstd")),
    size=_of_rows,
    call=_over_the_last_dimension,
)

RMS_NORM = OpSpec(
    name="rms_norm",
    parameters=("weight",),
    sizes=SIZES,
    mixes=tuple(
        Mix(dtypes)
        for dtypes in (
            *itertools.product((F32, BF16, F16), (F32, BF16, F16)),
            (F32, None),
            (BF16, None),
            (F64, F64),
            (F64, None),
        )
    ),
    options=({}, {"eps": None}, {"eps": 1e-5}, {"eps": 1e-3}),
    parameter_shape=parameter_shape,
    exact=lambda case, tensors: _exact("rms_norm", case, tensors),
    forward=_rms_norm_forward,
    backward=_rms_norm_backward,
    split_saved=lambda saved: _parts(saved, ("rstd",)),
    size=_of_rows,
    call=_over_the_last_dimension,
)
