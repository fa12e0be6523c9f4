"""Derivatives of every kind of group norm with an activation and of instance norm; on the backend under test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from backend_under_test import serves_float64
from group_norm_examples import ACTIVATIONS, KINDS, RUNNING, leaves_of, norm_of, tensors

each_kind = pytest.mark.parametrize("kind", KINDS)


def names_of(kind: str) -> tuple[str, ...]:
    return ("input", "weight", "bias", *(RUNNING if kind == "tracking" else ()))


@pytest.mark.parametrize(
    ("kind", "activation"),
    [*(("group_norm", name) for name in ACTIVATIONS), ("instance_norm", "relu"), ("tracking", "gelu")],
)
def test_outputs_and_gradients_are_torchs(kind: str, activation: str | None, device: str) -> None:
    """Once more against torch's own operations, in case the suite's exact values share a mistake of ours."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        for ours in (True, False):
            given = leaves_of(tensors(device))
            input = given["input"].to(memory_format=memory_format)
            output = norm_of(kind, ours, activation)(input, *(given[name] for name in names_of(kind)[1:]))
            output.backward(torch.linspace(-1, 2, output.numel(), device=device).view(output.shape))
            results.append((output, [given[name].grad for name in names_of(kind)[:3]]))
            results[-1][1].extend(given[name] for name in RUNNING)
        (output, gradients), (expected, expected_gradients) = results
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
        assert output.is_contiguous(memory_format=memory_format)


@each_kind
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "leaky_relu"], ids=str)
def test_gradients_of_gradients(kind: str, activation: str | None, backend: str, device: str) -> None:
    exact = serves_float64(backend, device)
    given = tensors(device, torch.float64 if exact else torch.float32, (2, 3, 4))
    leaves = [given[name].requires_grad_() for name in ("input", "weight", "bias")]

    def call(ours: bool) -> Any:
        function = norm_of(kind, ours, activation)
        # New ones in every call: a check of derivatives calls the same function many times.
        return lambda *each: function(*each, *(given[name].clone() for name in RUNNING))

    if exact:
        # Forward mode takes no operator that changes a constant, which torch's own instance norm shares.
        assert torch.autograd.gradcheck(call(True), leaves, check_forward_ad=kind != "tracking")
        assert torch.autograd.gradgradcheck(call(True), leaves)
        return

    def second(function: Any) -> Any:
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((each**2).sum() for each in first), leaves)

    torch.testing.assert_close(second(call(True)), second(call(False)), rtol=1e-3, atol=1e-3)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *each: f(*each).square().sum(), argnums=(0, 1, 2)),
    "jvp": lambda f: lambda *each: torch.func.jvp(f, each, tuple(one.cos() for one in each)),
    "vmap": lambda f: lambda *each: torch.vmap(f)(*[torch.stack((one, one.sin())) for one in each]),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=1),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_transforms_of_torch_func(kind: str, transform: str, device: str) -> None:
    given = tensors(device, shape=(2, 3, 4))
    inputs = [given[name] for name in ("input", "weight", "bias")]
    found, expected = (TRANSFORMS[transform](norm_of(kind, ours, "silu"))(*inputs) for ours in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_within_a_transform(device: str) -> None:
    """They move once, as outside."""
    inside, outside = tensors(device), tensors(device)

    def loss(input: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        running = [given[name] for name in RUNNING]
        return (
            norm_of("tracking", True, "silu")(input, given["weight"], given["bias"], *running).square().sum()
        )

    input = outside["input"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(input, outside), [input])
    found = torch.func.grad(loss)(inside["input"], inside)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name in RUNNING:
        torch.testing.assert_close(inside[name], outside[name])


@each_kind
def test_a_frozen_parameter_gets_no_gradient(kind: str, device: str) -> None:
    for frozen in ("input", "weight", "bias"):
        given = leaves_of(tensors(device))
        given[frozen].requires_grad_(False)
        norm_of(kind, True, "relu")(*(given[name] for name in names_of(kind))).sum().backward()
        assert [name for name, each in given.items() if each.grad is None] == [
            name for name in given if name == frozen or "running" in name
        ]


@each_kind
def test_what_is_kept_for_backward(kind: str, device: str) -> None:
    """The input and two fp32 numbers a group and sample, whatever the activation."""
    given = leaves_of(tensors(device, torch.bfloat16, (2, 12, 8, 8)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        norm_of(kind, True, "silu")(*(given[name] for name in names_of(kind)))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    groups = 3 if kind == "group_norm" else 12
    assert sum(storages.values()) == 2 * given["input"].numel() + 2 * 2 * 12 + 2 * 4 * 2 * groups


def test_checkpointing(device: str) -> None:
    """A recompute moves the running statistics once more, as torch's; no gradient changes."""
    results = []
    for ours, checkpointed in ((True, True), (True, False), (False, True)):
        given = leaves_of(tensors(device))
        parameters = [given[name] for name in names_of("tracking")[1:]]

        def block(input: torch.Tensor, ours: bool = ours, parameters: Any = parameters) -> torch.Tensor:
            return norm_of("tracking", ours, "silu")(input, *parameters)  # type: ignore[no-any-return]

        input = given["input"]
        output = checkpoint(block, input, use_reentrant=False) if checkpointed else block(input)
        output.square().sum().backward()
        results.append((parameters[2:], [given[name].grad for name in ("input", "weight", "bias")]))
    torch.testing.assert_close(results[0][0], results[2][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
