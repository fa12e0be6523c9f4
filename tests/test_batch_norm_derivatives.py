"""Batch norm's derivatives of every kind, with residual and activation, against torch's; on the backend under test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backend_under_test import serves_float64
from batch_norm_examples import ACTIVATIONS, composite, leaves_of, tensors
from fastreg.functional import batch_norm

each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
each_phase = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


@each_activation
@each_phase
@each_format
def test_outputs_and_gradients_are_torchs(
    activation: str | None, training: bool, memory_format: Any, device: str
) -> None:
    """Once more against torch's own operations, in case the suite's exact values share a mistake of ours."""
    results = []
    for function in (batch_norm, composite):
        given = leaves_of(tensors(device))
        input = given["input"].to(memory_format=memory_format)
        output = function(**{**given, "input": input}, training=training, activation=activation)
        output.backward(torch.linspace(-1, 2, output.numel(), device=device).view(output.shape))
        results.append((output, [each.grad for each in given.values()]))
    (output, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
    assert output.is_contiguous(memory_format=memory_format)


@each_phase
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "leaky_relu"], ids=str)
def test_gradients_of_gradients(activation: str | None, training: bool, backend: str, device: str) -> None:
    exact = serves_float64(backend, device)
    given = tensors(device, torch.float64 if exact else torch.float32, (3, 2, 4))
    statistics = given.pop("running_mean"), given.pop("running_var")
    names = list(given)

    def call(function: Any) -> Any:
        return lambda *leaves: function(
            running_mean=None if training else statistics[0],
            running_var=None if training else statistics[1],
            **dict(zip(names, leaves, strict=True)),
            training=training,
            activation=activation,
        )

    leaves = [each.requires_grad_() for each in given.values()]
    if exact:
        assert torch.autograd.gradcheck(call(batch_norm), leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call(batch_norm), leaves)
        return

    def second(function: Any) -> Any:
        first = torch.autograd.grad(call(function)(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((each**2).sum() for each in first), leaves)

    torch.testing.assert_close(second(batch_norm), second(composite), rtol=1e-3, atol=1e-3)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *each: f(*each).square().sum(), argnums=(0, 1, 2, 3)),
    "jvp": lambda f: lambda *each: torch.func.jvp(f, each, tuple(one.cos() for one in each)),
    "vmap": lambda f: lambda *each: torch.vmap(f)(*[torch.stack((one, one.sin())) for one in each]),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=1),
}


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@each_phase
def test_transforms_of_torch_func(transform: str, training: bool, device: str) -> None:
    given = tensors(device, shape=(3, 2, 4))
    statistics = [None, None] if training else [given["running_mean"], given["running_var"]]

    def call(function: Any) -> Any:
        return lambda input, residual, weight, bias: function(
            input, *statistics, weight, bias, training, residual=residual, activation="silu"
        )

    inputs = [given[name] for name in ("input", "residual", "weight", "bias")]
    found, expected = (TRANSFORMS[transform](call(each))(*inputs) for each in (batch_norm, composite))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each_phase
def test_a_frozen_parameter_gets_no_gradient(training: bool, device: str) -> None:
    for frozen in ("input", "residual", "weight", "bias"):
        given = leaves_of(tensors(device))
        given[frozen].requires_grad_(False)
        batch_norm(**given, training=training, activation="relu").sum().backward()
        assert [name for name, each in given.items() if each.grad is None] == [
            name for name in given if name == frozen or "running" in name
        ]


@pytest.mark.parametrize(
    ("activation", "share"),
    [(None, 0.0), ("relu", 1 / 8), ("leaky_relu", 1 / 8), ("silu", 2.0)],
    ids=str,
)
def test_what_is_kept_of_a_residual(activation: str | None, share: float, device: str) -> None:
    """Bytes an element: nothing, a bit, or the bfloat16 residual itself; never what the activation is applied to."""
    given = leaves_of(tensors(device, torch.bfloat16, (8, 64, 8, 8)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        batch_norm(**given, training=True, activation=activation)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    numel = given["input"].numel()
    assert sum(storages.values()) == 2 * numel + share * numel + 64 * (2 * 4 + 2 * 2)
