"""Hypothesis draws shapes, strides, dtypes and options; every draw is held to the same criterion as the suite's cases.

Draws are the same in every run. ``--hypothesis-profile explore`` draws new ones, and many more.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations import NAMES as ACTIVATIONS
from backend_under_test import emulated, serves_float64
from cases import DATA, Case, Mix, Size
from group_norms import INSTANCE_NORM
from specs import SPECS
from suite import OpSpec, check_tensors, make_tensors, subsets

settings.register_profile(
    "repeat",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=list(HealthCheck),
    database=None,
)
settings.register_profile(
    "explore", parent=settings.get_profile("repeat"), derandomize=False, max_examples=1000
)
settings.load_profile("repeat")

LOW = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def views(draw: Any, values: torch.Tensor) -> torch.Tensor:
    """``values`` in some strided layout: dimensions in any order in memory, with gaps, offset, or expanded."""
    order = draw(st.permutations(range(values.dim())))
    steps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in order]
    padding = [draw(st.integers(0, 3)) for _ in order]
    buffer_shape = [
        values.shape[axis] * step + pad for axis, step, pad in zip(order, steps, padding, strict=True)
    ]
    buffer = torch.full(buffer_shape, torch.nan, dtype=values.dtype, device=values.device)
    window = tuple(
        slice(pad, pad + values.shape[axis] * step, step)
        for axis, step, pad in zip(order, steps, padding, strict=True)
    )
    back = [order.index(axis) for axis in range(values.dim())]
    view = buffer[window].permute(back).copy_(values)
    for axis in range(values.dim()):
        if view.shape[axis] and draw(st.integers(0, 9)) == 0:
            view = view.narrow(axis, 0, 1).expand(values.shape)
    return view


@st.composite
def norm_cases(draw: Any, spec: OpSpec, float64: bool, few: bool) -> Case:
    leading = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    last = st.one_of(st.integers(1, 40), st.sampled_from((64, 127, 128, 129, 255, 257, 513, 1000, 1025)))
    normalized = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(last))
    if float64 and draw(st.integers(0, 5)) == 0:
        dtypes: tuple[Any, ...] = (torch.float64,) * (1 + len(spec.parameters))
    else:
        dtypes = (draw(st.sampled_from(LOW)), *[draw(st.sampled_from((*LOW, None))) for _ in spec.parameters])
    eps = draw(st.sampled_from((1e-12, 1e-6, 1e-5, 1e-3, 1.0)))
    return Case(
        size=Size((*leading, *normalized), {"normalized_shape": normalized}),
        mix=Mix(dtypes),
        data=draw(st.sampled_from(sorted(DATA))),
        wanted=draw(st.sampled_from(subsets(spec.differentiable))),
        arguments={"normalized_shape": normalized, "eps": eps},
    )


@st.composite
def channel_norm_cases(draw: Any, spec: OpSpec, float64: bool, few: bool) -> Case:
    many = st.one_of(st.integers(1, 20), st.sampled_from((33, 64, 129)))
    samples, channels = draw(st.integers(1, 5)), draw(st.integers(1, 12) if few else many)
    shape = (samples, channels, *draw(st.lists(st.integers(1, 7), max_size=3)))
    training = draw(st.booleans()) and math.prod(shape) > channels
    if float64 and draw(st.integers(0, 5)) == 0:
        low: tuple[Any, ...] = (torch.float64,)
    else:
        low = LOW
    input, statistics = draw(st.sampled_from(low)), [draw(st.sampled_from(low)) for _ in spec.buffers]
    if training and draw(st.booleans()):
        statistics = [None] * len(statistics)
    residual = draw(st.sampled_from((None, input)))
    arguments = {
        "training": training,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "negative_slope": draw(st.sampled_from((0.01, 0.5, -0.2))),
        "momentum": draw(st.sampled_from((0.0, 0.1, 0.7, 1.0))),
        "eps": draw(st.sampled_from((1e-6, 1e-5, 1e-3, 1.0))),
    }
    return Case(
        size=Size(shape),
        mix=Mix(
            (input, residual, *[draw(st.sampled_from((*low, None))) for _ in spec.parameters], *statistics)
        ),
        data=draw(st.sampled_from(sorted(DATA))),
        wanted=draw(st.sampled_from(subsets(spec.differentiable))),
        arguments=arguments,
    )


@st.composite
def group_norm_cases(draw: Any, spec: OpSpec, float64: bool, few: bool) -> Case:
    low = (torch.float64,) if float64 and draw(st.integers(0, 5)) == 0 else LOW
    samples, spatial = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 7), max_size=3))
    arguments = {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "negative_slope": draw(st.sampled_from((0.01, 0.5, -0.2))),
        "eps": draw(st.sampled_from((1e-6, 1e-5, 1e-3, 1.0))),
    }
    statistics: list[Any] = [draw(st.sampled_from(low)) for _ in spec.buffers]
    if spec is INSTANCE_NORM:
        channels = draw(st.sampled_from((1, 2, 3, 4, 7, 9)))
        arguments["momentum"] = draw(st.sampled_from((0.0, 0.1, 0.7, 1.0)))
        # More than one spatial element.
        spatial = spatial if math.prod(spatial) > 1 else [2, *spatial[1:]]
        statistics = draw(st.sampled_from((statistics, [None] * len(statistics))))
    else:
        width, groups = draw(
            st.sampled_from(((1, 5), (20, 1), (5, 3), (3, 4), (16, 2), (1, 1), (33, 2), (129, 1)))
        )
        channels, arguments["num_groups"] = width * groups, groups
        if samples * width * math.prod(spatial) == 1:
            samples = 2
    dtypes = (draw(st.sampled_from(low)), *[draw(st.sampled_from((*low, None))) for _ in spec.parameters])
    return Case(
        size=Size((samples, channels, *spatial)),
        mix=Mix((*dtypes, *statistics)),
        data=draw(st.sampled_from(sorted(DATA))),
        wanted=draw(st.sampled_from(subsets(spec.differentiable))),
        arguments=arguments,
    )


KINDS = {"batch_norm": channel_norm_cases, "group_norm": group_norm_cases, "instance_norm": group_norm_cases}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@given(data=st.data())
def test_any_shape_stride_dtype_and_option(spec: OpSpec, data: Any, backend: str, device: str) -> None:
    kind = KINDS.get(spec.name, norm_cases)
    # Channels, or samples and groups, are programs, which an emulated backend runs one by one.
    case = data.draw(kind(spec, serves_float64(backend, device), few=emulated(backend, device)))
    tensors = make_tensors(spec, case, device)
    for name, values in tensors.items():
        # What is changed in place cannot be expanded.
        if values is not None and name not in spec.buffers:
            tensors[name] = data.draw(views(values), label=name)
    check_tensors(spec, case, tensors)
