"""The spec of batch_norm, and the exact values of every norm over channels with their budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from activations import NAMES, activation
from cases import CHANNEL_LAYOUTS, Case, Mix, Size
from criterion import ROUNDINGS, Exact
from fastreg import _activations, _channels
from fastreg.ops._layout import contiguous, in_some_family
from fastreg.ops.batch_norm import laid_out
from suite import OpSpec, Tensors

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def size(*shape: int) -> Size:
    return Size(shape, {"training": True})


# Channels and planes around vector widths, odd ones that break alignment, and planes of a single element.
SIZES = (
    size(3, 1),
    size(5, 3),
    size(33, 17),
    size(70, 64),
    size(9, 130),
    size(2, 3, 1),
    size(3, 1, 257),
    size(1, 8, 257),
    size(3, 17, 64),
    size(2, 1, 7, 7),
    size(2, 3, 7, 7),
    size(5, 17, 1, 1),
    size(2, 24, 7, 7),
    size(4, 8, 8, 8),
    size(1, 33, 1, 3),
    size(2, 3, 2, 1, 7),
    size(2, 8, 4, 4, 4),
    size(1, 17, 2, 2, 1),
)

DEFAULTS: dict[str, Any] = {
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
    "activation": None,
    "negative_slope": 0.01,
    "skip_nonfinite": False,
}


def options_of(case: Case) -> dict[str, Any]:
    return {**DEFAULTS, **case.arguments}


def number_of(case: Case) -> int:
    return _activations.NAMES.index(options_of(case)["activation"] or "identity")


def wide(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """In float64, viewed in the given shape; a tensor that is not given is none."""
    return torch.empty(0) if tensor is None else tensor.detach().cpu().to(F64).reshape(shape)


def exact_values(case: Case, tensors: Tensors, groups: int | None = None) -> dict[str, Exact]:
    """Exact values in float64, and the sums of absolute terms that budget their roundings.

    Statistics are of a channel in all samples, or with ``groups`` of that many groups of channels in each sample. All
    is seen as (samples, groups, channels of a group, spatial).

    ``shift`` budgets the mean in units of the normalised value, as for the norms over rows. What the activation is
    applied to, z, may be off by ``reach``; what that does to the activation and its derivative is seen by evaluating
    them at both ends, so that within reach of a kink both branches are right.
    """
    options = options_of(case)
    input = tensors["input"]
    assert input is not None
    shape, saved = tuple(input.shape), F64 if input.dtype == F64 else F32
    unit = 2.0**-52 if saved == F64 else 2.0**-24
    parts = groups or shape[1]
    planes = (shape[0], parts, shape[1] // parts, math.prod(shape[2:]))
    vectors = (1, *planes[1:3], 1)
    dimensions = (0, 2, 3) if groups is None else (2, 3)
    count = math.prod(planes[dimension] for dimension in dimensions)
    x, dy = wide(input, planes), wide(tensors["grad_output"], planes)
    weight, bias, residual = tensors["weight"], tensors["bias"], tensors.get("residual")
    scale = torch.ones(vectors, dtype=F64) if weight is None else wide(weight, vectors)
    running = {name: wide(tensors.get(name), vectors) for name in ("running_mean", "running_var")}

    from_input = groups is not None or options["training"]
    if from_input:
        mean, summed = x.mean(dimensions, keepdim=True), x.abs().mean(dimensions, keepdim=True)
        variance = (x - mean).square().mean(dimensions, keepdim=True)
    else:
        mean, variance = running.values()
        summed = torch.zeros_like(mean)
    rstd = (variance + options["eps"]).rsqrt()
    normalized, shift = (x - mean) * rstd, summed * rstd
    # Of the variance, merged from parts by Chan's rule: the distance of two means that were rounded once each, squared,
    # is off by 4 * shift roundings, and rstd by half of that. A mean that is off by a rounding adds its own square.
    merged = shift / 8 + 8 * unit * shift.square()
    normalized_terms = normalized.abs() * (1 + merged) + shift

    z, z_terms = normalized * scale, normalized_terms * scale.abs()
    for tensor, viewed in ((bias, vectors), (residual, planes)):
        if tensor is not None:
            z, z_terms = z + wide(tensor, viewed), z_terms + wide(tensor, viewed).abs()
    act = activation(options["activation"], options["negative_slope"])
    reach = ROUNDINGS * unit * z_terms

    def moved(function: Any) -> torch.Tensor:
        """How far the function of z may move with z, in the unit of terms."""
        return torch.maximum(*((function(end) - function(z)).abs() for end in (z - reach, z + reach))) / (
            ROUNDINGS * unit
        )

    output, output_terms = act.value(z), act.value_terms(z) + moved(act.value)
    dz, dz_terms = dy * act.slope(z), dy.abs() * (act.slope_terms(z) + moved(act.slope))

    # The gradient of the normalised value, before what the statistics give back.
    grad_input, grad_terms = dz * scale, dz_terms * scale.abs()
    if from_input:
        means = (
            each.sum(dimensions, keepdim=True) / count
            for each in (grad_input, grad_input * normalized, grad_terms, grad_terms * normalized_terms)
        )
        average, projection, average_terms, projection_terms = means
        grad_input = grad_input - average - normalized * projection
        grad_terms = (
            grad_terms + average_terms + normalized.abs() * projection_terms + shift * projection.abs()
        )
        # Where all is constant, the product of both errors is all there is.
        grad_terms = grad_terms + ROUNDINGS * unit * shift * projection_terms + merged * grad_input.abs()

    dtype, of_groups = case.mix.input, (shape[1],) if groups is None else planes[:2]
    exact = {
        "output": Exact(output.reshape(shape), output_terms.reshape(shape), dtype),
        "mean": Exact(mean.reshape(of_groups), summed.reshape(of_groups), saved),
        "rstd": Exact(rstd.reshape(of_groups), (rstd * (1 + merged)).reshape(of_groups), saved),
        "grad_input": Exact((grad_input * rstd).reshape(shape), (grad_terms * rstd).reshape(shape), dtype),
    }
    if groups is None:
        exact["signs"] = _signs(case, tensors, z.reshape(shape), reach.reshape(shape))
    if residual is not None:
        exact["grad_residual"] = Exact(dz.reshape(shape), dz_terms.reshape(shape), residual.dtype)
    for name, parameter, terms, sizes in (
        ("bias", bias, dz, dz_terms),
        ("weight", weight, dz * normalized, dz_terms * normalized_terms),
    ):
        if parameter is not None:
            sums = (each.sum((0, 3)).flatten() for each in (terms, sizes))
            exact[f"grad_{name}"] = Exact(*sums, parameter.dtype)
    unbiased = variance * count / max(count - 1, 1)
    current = {
        "running_mean": (mean, summed),
        "running_var": (unbiased, unbiased * (1 + shift / 4) + 8 * unit * summed.square()),
    }
    for name, values in current.items():
        buffer = tensors.get(name)
        if buffer is None:
            continue
        share = options["momentum"] if from_input else 0.0
        value, value_terms = (each.mean(0, keepdim=True) for each in values)
        exact[name] = Exact(
            ((1 - share) * running[name] + share * value).flatten(),
            (abs(1 - share) * running[name].abs() + abs(share) * value_terms).flatten(),
            buffer.dtype,
        )
    return exact


# --- signs ------------------------------------------------------------------------------------------------


def keeps_signs(case: Case, tensors: Tensors) -> bool:
    return tensors["residual"] is not None and options_of(case)["activation"] in ("relu", "leaky_relu")


def _signs(case: Case, tensors: Tensors, z: torch.Tensor, reach: torch.Tensor) -> Exact:
    """The bits as zeros and ones, padding included; what is within reach of 0 may be either."""
    if not keeps_signs(case, tensors):
        return Exact(torch.empty(0, dtype=F64), torch.empty(0, dtype=F64), F32)
    unit = 2.0**-24
    either = torch.where(z.abs() < reach, 1 / (ROUNDINGS * unit), 0.0)
    rows = is_rows(tensors)
    values = _padded((z > 0).to(F64), rows)
    return Exact(values, _padded(either.to(F64), rows), F32)


def is_rows(tensors: Tensors) -> bool:
    """Whether the operators see the input as rows of channels."""
    input = tensors["input"]
    assert input is not None
    return _channels.family(in_some_family(input))


def _padded(values: torch.Tensor, rows: bool) -> torch.Tensor:
    """Plane after plane, or row after row, each filled up to whole bytes with zeros."""
    ordered = values.movedim(1, -1) if rows else values
    lines = ordered.reshape(-1, values.shape[1] if rows else math.prod(values.shape[2:]))
    padded = torch.zeros(lines.shape[0], -(-lines.shape[1] // 8) * 8, dtype=values.dtype)
    padded[:, : lines.shape[1]] = lines
    return padded.flatten()


def unpacked(signs: torch.Tensor) -> torch.Tensor:
    """Bit j of a byte is element j of eight."""
    return (signs.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().to(F32)


# --- the operators' arguments -----------------------------------------------------------------------------


def _regular(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    """grad_output, input, residual, weight, bias, as the operators require them."""
    given, grad_output = tensors["input"], tensors["grad_output"]
    assert given is not None
    assert grad_output is not None
    input, residual = laid_out(given, tensors["residual"])
    grad_output = _channels.in_family(grad_output, _channels.family(input))
    return grad_output, input, residual, contiguous(tensors["weight"]), contiguous(tensors["bias"])


def forward_arguments(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    options, (_, *regular) = options_of(case), _regular(case, tensors)
    arguments = [*regular, tensors["running_mean"], tensors["running_var"]]
    if not options["training"]:
        return (*arguments, options["eps"], number_of(case), options["negative_slope"], True)
    return (
        *(*arguments, options["momentum"], options["eps"], number_of(case), options["negative_slope"]),
        *(options["skip_nonfinite"], True),
    )


def differentiated(case: Case, tensors: Tensors, signs: torch.Tensor) -> tuple[Any, ...]:
    """grad_output, input, residual or its signs: what every backward operator begins with."""
    grad_output, input, residual, _, _ = _regular(case, tensors)
    if keeps_signs(case, tensors):
        return grad_output, input, None, signs
    return grad_output, input, None if number_of(case) == _activations.IDENTITY else residual, None


def backward_arguments(case: Case, tensors: Tensors, saved: Any) -> tuple[Any, ...]:
    options, (*_, weight, bias) = options_of(case), _regular(case, tensors)
    statistics, signs = saved
    return (
        *(*differentiated(case, tensors, signs), statistics, weight, bias),
        *(options["training"], number_of(case), options["negative_slope"]),
    )


def _over_the_last_dimension(
    function: Any, input: torch.Tensor, *parameters: torch.Tensor, **options: Any
) -> torch.Tensor:
    output = function(input.movedim(-1, 1), None, None, *parameters, training=True, **options)
    return output.movedim(1, -1)  # type: ignore[no-any-return]


def in_its_family(name: str, result: torch.Tensor, tensors: Tensors) -> bool:
    if name not in ("output", "grad_input"):
        return True
    return result.stride() == _channels.dense_strides(result.shape, is_rows(tensors))


def _sensible(case: Case) -> Case:
    """Evaluation needs running statistics."""
    if None in case.mix.dtypes[-2:]:
        return replace(case, arguments={**case.arguments, "training": True})
    return case


BATCH_NORM = OpSpec(
    name="batch_norm",
    companions=("residual",),
    parameters=("weight", "bias"),
    buffers=("running_mean", "running_var"),
    sizes=SIZES,
    mixes=tuple(
        Mix(dtypes)
        for dtypes in (
            (F32, F32, F32, F32, F32, F32),
            (F32, None, F32, F32, F32, F32),
            (BF16, BF16, BF16, BF16, BF16, BF16),
            (F16, F16, F16, F16, F16, F16),
            (F64, F64, F64, F64, F64, F64),
            (BF16, BF16, F32, F32, F32, F32),
            (BF16, None, F32, F32, F32, F32),
            (F16, F16, BF16, F32, F16, F32),
            (F32, F32, F16, BF16, BF16, F16),
            (BF16, None, None, None, F32, F32),
            (F32, F32, None, F16, None, None),
            (F16, None, F32, None, None, None),
            (F64, None, None, F64, F64, F64),
        )
    ),
    options=(
        *({"activation": name} for name in (None, *NAMES[1:])),
        *({"activation": name, "training": False} for name in (None, *NAMES[1:])),
        {"activation": "relu", "momentum": 1.0, "eps": 1e-3},
        {"activation": "leaky_relu", "negative_slope": 0.3, "momentum": 0.0, "skip_nonfinite": True},
    ),
    parameter_shape=lambda case: case.size.shape[1:2],
    exact=exact_values,
    forward=forward_arguments,
    backward=backward_arguments,
    split_saved=lambda saved: {"mean": saved[0][0], "rstd": saved[0][1], "signs": unpacked(saved[1])},
    size=lambda rows, columns: Size((rows, columns), {"training": True, "activation": "silu"}),
    call=_over_the_last_dimension,
    layouts=CHANNEL_LAYOUTS,
    wanted=(
        ("input", "residual", "weight", "bias"),
        ("input", "residual"),
        ("input", "weight"),
        ("residual", "bias"),
        ("weight", "bias"),
        ("input",),
        ("residual",),
        (),
    ),
    forward_operator=lambda case: "batch_norm_fwd" if options_of(case)["training"] else "batch_norm_eval",
    passed_on=lambda case: () if number_of(case) else ("residual",),
    laid_out=in_its_family,
    sensible=_sensible,
)
