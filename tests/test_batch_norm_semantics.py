"""Batch norm takes, refuses and updates what torch's does; on the backend under test."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from backend_under_test import serves_float64
from batch_norm_examples import leaves_of, tensors
from fastreg.functional import batch_norm
from suite import same_bits

each_phase = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


# --- arguments ---


def test_the_signature_begins_with_torchs() -> None:
    ours = list(inspect.signature(batch_norm).parameters.values())
    torchs = list(inspect.signature(F.batch_norm).parameters.values())
    for one, other in zip(ours, torchs, strict=False):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in ours[len(torchs) :])


def test_positional_arguments(device: str) -> None:
    given = tensors(device)
    order = ("input", "running_mean", "running_var", "weight", "bias")
    expected = [each.clone() for each in (given[name] for name in order)]
    torch.testing.assert_close(
        batch_norm(*(given[name] for name in order), True, 0.3, 1e-3),
        F.batch_norm(*expected, True, 0.3, 1e-3),
    )
    for name, other in zip(order, expected, strict=True):
        torch.testing.assert_close(given[name], other)


ONES = torch.ones(3)
BAD: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one value a channel": ((1, 3), {"training": True}),
    "one value a channel, 4D": ((1, 3, 1, 1), {"training": True}),
    "one value a channel before anything else": ((1, 3), {"training": True, "weight": torch.ones(9)}),
    "eps of zero in training": ((2, 3), {"training": True, "eps": 0.0}),
    "negative eps in training": ((2, 3), {"training": True, "eps": -1e-5}),
    "negative eps in evaluation": ((2, 3), {"running_mean": ONES, "running_var": ONES, "eps": -1e-5}),
    "no running variance": ((2, 3), {"running_mean": ONES, "training": True}),
    "no running mean": ((2, 3), {"running_var": ONES, "training": True}),
    "evaluation without running statistics": ((2, 3), {}),
    "evaluation without running variance": ((2, 3), {"running_mean": ONES}),
    "evaluation without running mean": ((2, 3), {"running_var": ONES}),
    "short running mean": ((2, 4), {"running_mean": ONES, "running_var": torch.ones(4)}),
    "short running variance": ((2, 4), {"running_mean": torch.ones(4), "running_var": ONES}),
    "short running mean in training": (
        (2, 4),
        {"running_mean": ONES, "running_var": torch.ones(4), "training": True},
    ),
    "long weight": ((2, 3, 4), {"training": True, "weight": torch.ones(4)}),
    "short bias": ((2, 3, 4), {"training": True, "bias": torch.ones(2)}),
    "weight and bias of the wrong size": (
        (2, 3),
        {"training": True, "weight": torch.ones(1), "bias": torch.ones(2)},
    ),
    "momentum that is no number": ((2, 3), {"training": True, "momentum": "small"}),
    "weight that is no tensor": ((2, 3), {"training": True, "weight": 1.0}),
    "running mean that is no tensor": ((2, 3), {"running_mean": 1.0, "running_var": ONES, "training": True}),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_raise_torchs_error(name: str, device: str) -> None:
    shape, arguments = BAD[name]
    given = {
        key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()
    }
    given = {"running_mean": None, "running_var": None, **given}
    input = torch.randn(shape, device=device)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
        F.batch_norm(input, **given)
    with pytest.raises(type(expected.value)) as raised:
        batch_norm(input, **given)
    ours = str(raised.value)
    if torch.__version__ < (2, 13):
        # Older ones know one limit of eps, whether in training or not.
        ours = re.sub("eps must be (positive during training|non-negative),", "eps must be positive,", ours)
    assert ours == str(expected.value)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@each_phase
def test_running_statistics_that_require_grad_raise_torchs_error(
    name: str, training: bool, device: str
) -> None:
    given = {each: torch.ones(3, device=device) for each in ("running_mean", "running_var")}
    given[name].requires_grad_()
    input = torch.randn(2, 3, device=device, requires_grad=True)
    with pytest.raises(RuntimeError) as expected:
        F.batch_norm(input, **given, training=training)
    with pytest.raises(RuntimeError) as raised:
        batch_norm(input, **given, training=training)
    # Torch names the operator that its dispatcher came to.
    assert str(raised.value) == re.sub("'[a-z]+_batch_norm'", "'batch_norm'", str(expected.value))


def test_what_only_ours_refuses_is_named(device: str) -> None:
    given = tensors(device)
    statistics = {name: given[name] for name in ("running_mean", "running_var")}
    input = given["input"]
    for change, error, message in (
        ({"eps": "small"}, TypeError, r"argument 'eps' \(position 8\) must be float, not str"),
        (
            {"activation": "swish"},
            ValueError,
            r"unknown activation 'swish'; expected None or one of identity, re",
        ),
        (
            {"residual": input[:1]},
            RuntimeError,
            r"residual to be of the input's shape \[4, 5, 3, 2\], but got",
        ),
        ({"residual": 1.0}, TypeError, "argument 'residual' must be Tensor, not float"),
        (
            {"residual": input.long()},
            RuntimeError,
            "residual is torch.int64 where the input is torch.float32",
        ),
        (
            {"weight": torch.ones(5, 1, device=device)},
            RuntimeError,
            r"weight should contain 5 elements not a te",
        ),
        (
            {"weight": torch.ones(5, device="meta")},
            RuntimeError,
            f"weight is on meta and the input is on {device}",
        ),
    ):
        with pytest.raises(error, match=message):
            batch_norm(input, **{**statistics, **change}, training=True)
    with pytest.raises(
        RuntimeError, match=r"input of at least 2 dimensions, \(N, C, \*\), but got one of shape \[3\]"
    ):
        batch_norm(torch.ones(3, device=device), None, None, training=True)
    with pytest.raises(TypeError, match=r"argument 'input' .* must be Tensor, not list"):
        batch_norm([1.0, 2.0], None, None, training=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "unsupported", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_an_unsupported_dtype_is_named(unsupported: torch.dtype, device: str) -> None:
    with pytest.raises(NotImplementedError, match=str(unsupported)):
        batch_norm(torch.ones(3, 4, device=device).to(unsupported), None, None, training=True)
    weight = torch.ones(4, device=device).to(unsupported)
    with pytest.raises(RuntimeError, match=f"weight.*{unsupported}"):
        batch_norm(torch.ones(3, 4, device=device), None, None, weight, training=True)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "residual"])
def test_float64_mixes_with_nothing(name: str, device: str) -> None:
    for one, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        given: dict[str, Any] = dict.fromkeys(("running_mean", "running_var"))
        if name in given:
            given = {each: torch.ones(4, dtype=one, device=device) for each in given}
        given[name] = torch.ones((3, 4) if name == "residual" else 4, dtype=other, device=device)
        with pytest.raises(RuntimeError, match=f"{name} is {other} where the input is {one}"):
            batch_norm(torch.ones(3, 4, dtype=one, device=device), **given, training=True)


def test_float64_is_served_or_refused_with_the_remedy(backend: str, device: str) -> None:
    given = tensors(device, torch.float64)
    if serves_float64(backend, device):
        found = batch_norm(given["input"], None, None, training=True)
        torch.testing.assert_close(found, F.batch_norm(given["input"], None, None, training=True))
    else:
        with pytest.raises(RuntimeError, match=f"{backend}.*float64"):
            batch_norm(given["input"], None, None, training=True)


# --- running statistics ---


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0, 1])
@each_format
def test_running_statistics_are_torchs(momentum: float, memory_format: Any, device: str) -> None:
    ours, torchs = tensors(device), tensors(device)
    for given, function in ((ours, batch_norm), (torchs, F.batch_norm)):
        for scale in (1, 3):
            input = (scale * given["input"]).to(memory_format=memory_format)
            function(input, given["running_mean"], given["running_var"], training=True, momentum=momentum)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], torchs[name], rtol=5e-7, atol=5e-7)


def test_autograd_notices_that_running_statistics_changed(device: str) -> None:
    """The version counter rises in training, so that a backward that needs the old values raises; torch's CPU kernels
    leave it alone. Evaluation changes nothing."""
    given = tensors(device)
    scale = torch.ones(5, device=device, requires_grad=True)
    statistics = given["running_mean"], given["running_var"]
    for training in (False, True):
        losses = [(each * scale).sum() for each in statistics]
        batch_norm(given["input"], *statistics, training=training)
        for loss in losses:
            if training:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
            else:
                loss.backward()
    # Our own backward needs none of them, and two forwards before it do no harm.
    outputs = [batch_norm(given["input"] * scale[0], *statistics, training=True) for _ in range(2)]
    (outputs[0] + outputs[1]).square().sum().backward()


def test_running_statistics_of_no_batch_are_left_alone(device: str) -> None:
    given = tensors(device)
    before = {name: each.clone() for name, each in given.items()}
    batch_norm(given["input"][:0], given["running_mean"], given["running_var"], training=True, momentum=0.5)
    for name, each in before.items():
        assert same_bits(given[name], each)


def test_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        given, other = tensors(device), tensors(device)
        order = ("input", "running_mean", "running_var", "weight", "bias")
        found = batch_norm(*(given[name] for name in order), training=True)
        torch.testing.assert_close(found, F.batch_norm(*(other[name] for name in order), training=True))
        for name in order[1:3]:
            torch.testing.assert_close(given[name], other[name])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensor hooks"])
@pytest.mark.parametrize("skip", [False, True], ids=["as torch", "skip_recompute"])
def test_checkpointing(reentrant: bool, skip: bool, device: str) -> None:
    """By default the batch counts twice, as torch's does; skip_recompute counts it once. No gradient changes."""

    def after(function: Any, checkpointed: bool, **options: Any) -> tuple[list[torch.Tensor], list[Any]]:
        given = leaves_of(tensors(device))
        statistics = given["running_mean"], given["running_var"]

        def block(input: torch.Tensor) -> torch.Tensor:
            return function(  # type: ignore[no-any-return]
                input, *statistics, given["weight"], given["bias"], True, 0.5, **options
            )

        input = given["input"]
        output = checkpoint(block, input, use_reentrant=reentrant) if checkpointed else block(input)
        output.square().sum().backward()
        return list(statistics), [given[name].grad for name in ("input", "weight", "bias")]

    statistics, gradients = after(batch_norm, True, skip_recompute=skip)
    expected, _ = after(F.batch_norm, not skip)
    torch.testing.assert_close(statistics, expected)
    for one, other in zip(gradients, after(batch_norm, False)[1], strict=True):
        assert same_bits(one, other)
