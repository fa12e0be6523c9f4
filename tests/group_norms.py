"""The specs of group_norm and instance_norm: what differs from batch_norm's in channel_norms.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from activations import NAMES
from cases import CHANNEL_LAYOUTS, Case, Mix, Size
from channel_norms import (
    BF16,
    F16,
    F32,
    F64,
    exact_values,
    in_its_family,
    number_of,
    options_of,
)
from criterion import Exact
from fastreg import _channels
from fastreg.ops._layout import contiguous, in_some_family
from suite import OpSpec, Tensors


def size(*shape: int, groups: int = 0) -> Size:
    """With the most groups of 32, 8, 4, 2 and 1 that divide the channels, unless told."""
    most = next(each for each in (32, 8, 4, 2, 1) if shape[1] % each == 0)
    return Size(shape, {"num_groups": groups or most if shape[1] else 1})


# One group, a channel a group and much between; channels that fill no vector, groups of a part of one, planes of one
# element and of a few; two dimensions, where a group is all there is of a sample.
GROUP_NORM_SIZES = (
    size(3, 1000, groups=1),
    size(5, 3, groups=3),
    size(9, 17, 1, groups=1),
    size(2, 130, 1, 2, groups=10),
    size(1, 17, 49, groups=17),
    size(2, 1, 257, groups=1),
    size(2, 24, 7, 7, groups=3),
    size(1, 64, 8, 8, groups=8),
    size(1, 8, 1000, groups=2),
    size(2, 36, 2, 4, 8, groups=4),
    size(3, 12, 3, 1, 1, groups=2),
)

# Of two dimensions there is no instance norm, nor of planes of a single element.
INSTANCE_NORM_SIZES = (
    size(3, 1, 257),
    size(9, 3, 2),
    size(1, 8, 8, 8),
    size(1, 17, 7, 7),
    size(2, 5, 2, 1, 7),
)

# What a kernel reads in place, and a gradient of zero strides, which is copied; test_properties.py draws the rest.
LAYOUTS = {
    name: CHANNEL_LAYOUTS[name]
    for name in (
        *("contiguous", "unaligned", "channels", "expanded", "scalar"),
        *("channels_last", "channels_last_unaligned", "channels_last_odd"),
    )
}
SPARED = (("size", "arguments"), ("layout", "grad_layout"), ("arguments", "grad_layout"))
WANTED = (
    ("input", "weight", "bias"),
    ("input", "weight"),
    ("weight", "bias"),
    ("bias",),
    ("weight",),
    ("input",),
    (),
)


def groups_of(case: Case) -> int:
    """Of an instance norm as many as there are channels."""
    return case.arguments.get("num_groups", case.size.shape[1])  # type: ignore[no-any-return]


def exact_values_of_groups(case: Case, tensors: Tensors) -> dict[str, Exact]:
    return exact_values(case, tensors, groups_of(case))


# --- the operators' arguments -----------------------------------------------------------------------------


def _regular(tensors: Tensors) -> tuple[Any, ...]:
    """grad_output, input, weight, bias, as the operators require them."""
    given, grad_output = tensors["input"], tensors["grad_output"]
    assert given is not None
    assert grad_output is not None
    input = in_some_family(given)
    grad_output = _channels.in_family(grad_output, _channels.family(input))
    return grad_output, input, contiguous(tensors["weight"]), contiguous(tensors["bias"])


def _group_norm_forward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    options, (_, input, weight, bias) = options_of(case), _regular(tensors)
    activated = number_of(case), options["negative_slope"]
    return input, groups_of(case), weight, bias, options["eps"], *activated


def _instance_norm_forward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    options, (_, *regular) = options_of(case), _regular(tensors)
    running = tensors["running_mean"], tensors["running_var"]
    activated = number_of(case), options["negative_slope"]
    return *regular, *running, options["momentum"], options["eps"], *activated


def _backward(case: Case, tensors: Tensors, statistics: torch.Tensor) -> tuple[Any, ...]:
    options, (grad_output, input, weight, bias) = options_of(case), _regular(tensors)
    activated = number_of(case), options["negative_slope"]
    return grad_output, input, groups_of(case), statistics, weight, bias, *activated


def _over_the_last_dimension(
    function: Callable[..., torch.Tensor], input: torch.Tensor, *parameters: torch.Tensor, **options: Any
) -> torch.Tensor:
    return function(input.movedim(-1, 1), 1, *parameters, **options).movedim(1, -1)


def _over_the_rows(
    function: Callable[..., torch.Tensor], input: torch.Tensor, *parameters: torch.Tensor, **options: Any
) -> torch.Tensor:
    """All rows of two dimensions as the plane of one sample."""
    output = function(input.unsqueeze(0).movedim(-1, 1), None, None, *parameters, **options)
    return output.movedim(1, -1).squeeze(0)


# --- the specs --------------------------------------------------------------------------------------------


def _statistics(saved: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": saved[0], "rstd": saved[1]}


GROUP_NORM = OpSpec(
    name="group_norm",
    parameters=("weight", "bias"),
    sizes=GROUP_NORM_SIZES,
    mixes=tuple(
        Mix(dtypes)
        for dtypes in (
            (F32, F32, F32),
            (BF16, BF16, BF16),
            (F64, F64, F64),
            (BF16, F32, F32),
            (F16, BF16, F32),
            (F32, BF16, None),
            (BF16, None, F16),
            (F16, None, None),
        )
    ),
    options=(
        *({"activation": name} for name in (None, *NAMES[1:]) if name != "leaky_relu"),
        {"activation": "leaky_relu", "negative_slope": 0.3, "eps": 1e-3},
    ),
    parameter_shape=lambda case: case.size.shape[1:2],
    exact=exact_values_of_groups,
    forward=_group_norm_forward,
    backward=_backward,
    split_saved=_statistics,
    size=lambda rows, columns: Size((rows, columns), {"num_groups": 1, "activation": "silu"}),
    call=_over_the_last_dimension,
    layouts=LAYOUTS,
    wanted=WANTED,
    laid_out=in_its_family,
    spared=SPARED,
)

INSTANCE_NORM = OpSpec(
    name="instance_norm",
    parameters=("weight", "bias"),
    buffers=("running_mean", "running_var"),
    sizes=tuple(Size(each.shape) for each in INSTANCE_NORM_SIZES),
    mixes=tuple(
        Mix(dtypes)
        for dtypes in (
            (F32, F32, F32, F32, F32),
            (BF16, F32, F32, F32, F32),
            (F16, BF16, None, F16, BF16),
            (F64, F64, F64, F64, F64),
            (F32, F16, BF16, None, None),
        )
    ),
    options=(
        {},
        {"activation": "relu", "momentum": 1.0},
        {"activation": "gelu", "momentum": 0.7, "eps": 1e-3},
        {"activation": "leaky_relu", "negative_slope": 0.3, "momentum": 0.0},
    ),
    parameter_shape=lambda case: case.size.shape[1:2],
    exact=exact_values_of_groups,
    forward=_instance_norm_forward,
    backward=_backward,
    split_saved=_statistics,
    size=lambda rows, columns: Size((1, columns, rows), {"activation": "silu"}),
    call=_over_the_rows,
    layouts={name: CHANNEL_LAYOUTS[name] for name in ("contiguous", "channels_last", "columns", "scalar")},
    wanted=(WANTED[0], WANTED[3], *WANTED[5:]),
    backward_operator="group_norm_bwd",
    laid_out=in_its_family,
    spared=SPARED,
)
